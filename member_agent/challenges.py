"""The agent's answers on port 80: ACME key authorizations and signed address proofs, and nothing else.

The table is fixed: a path is answered only when it was published, for a name confirmed at join, and the
answer never echoes what was asked. One request a connection, without a body; every connection has one
deadline, and idle ones make room for new ones, so that they cannot delay a validation.
"""

import asyncio
import re
import socket
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from http import HTTPStatus
from types import TracebackType
from typing import Self

import h11

from nts_core.control import ACME_PATH, PROOF_PATH, HttpChallenge

HEADER_LIMIT = 8192  # octets of request line and header fields
BODY_LIMIT = 1024  # octets of one published answer; a key authorization has 172 at most
ENTRY_LIMIT = 64  # published paths of one name
BACKLOG = 1024  # connections that wait for accept; the kernel may allow fewer
LINGER_LIMIT = 65_536  # octets read and dropped after the answer, so that no reset overtakes it
ACCEPT_PAUSE = 0.05  # seconds before the next accept when the system is out of descriptors

_TOKEN = re.compile(r"[A-Za-z0-9_-]{22,128}")
_THUMBPRINT = re.compile(r"[A-Za-z0-9_-]{43}")
_NONCE = re.compile(r"[A-Za-z0-9_-]{1,128}")
_AUTHORITY = re.compile(r"([^:/@\[\]\s]+?)\.?(?::[0-9]{1,5})?")
_ABSOLUTE = re.compile(r"http://([^/?#]*)(/.*)", re.IGNORECASE)


class ChallengeError(Exception):
    """What the registry relayed is not of the form that the agent answers with."""


class Outcome(StrEnum):
    """How a connection ended; the counters' labels."""

    SERVED = "served"
    NOT_FOUND = "not-found"
    MISDIRECTED = "misdirected"
    METHOD = "method"
    BODY = "body"
    MALFORMED = "malformed"
    TOO_LARGE = "too-large"
    TIMEOUT = "timeout"
    EVICTED = "evicted"
    CLOSED = "closed"  # the peer left before a whole request
    ACCEPT_FAILED = "accept-failed"


_STATUS = {
    Outcome.SERVED: HTTPStatus.OK,
    Outcome.NOT_FOUND: HTTPStatus.NOT_FOUND,
    Outcome.MISDIRECTED: HTTPStatus.MISDIRECTED_REQUEST,
    Outcome.METHOD: HTTPStatus.METHOD_NOT_ALLOWED,
    Outcome.BODY: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    Outcome.MALFORMED: HTTPStatus.BAD_REQUEST,
    Outcome.TOO_LARGE: HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
}


def validate_challenge(challenge: HttpChallenge) -> None:
    """Enforce the form of RFC 8555 sections 8.1 and 8.3; ChallengeError names the part that is wrong."""
    if not _TOKEN.fullmatch(challenge.token):
        raise ChallengeError("the challenge token is not 22 to 128 characters of base64url")
    token, dot, thumbprint = challenge.key_authorization.partition(".")
    if token != challenge.token or not dot:
        raise ChallengeError("the key authorization does not begin with its token and a dot")
    if not _THUMBPRINT.fullmatch(thumbprint):
        raise ChallengeError("the key authorization does not end with a SHA-256 thumbprint in base64url")


@dataclass(slots=True, eq=False)
class _Connection:
    sock: socket.socket
    idle: bool = True  # until a whole request has been read, and again while it lingers
    counted: bool = False
    task: asyncio.Task[None] | None = None


class Responder:
    """An HTTP/1.1 responder for `names`; start it with `listen`, end it with `close`.

    `deadline` is seconds for a whole connection. `counters` counts by outcome.
    """

    def __init__(self, names: Iterable[str], *, limit: int = 1024, deadline: float = 5.0) -> None:
        self.counters: Counter[Outcome] = Counter()
        self._tables: dict[str, dict[str, bytes]] = {_canonical(name): {} for name in names}
        self._limit = limit
        self._deadline = deadline
        self._listeners: list[socket.socket] = []
        self._acceptors: list[asyncio.Task[None]] = []
        self._connections: dict[_Connection, None] = {}  # ordered by age

    @property
    def endpoints(self) -> tuple[tuple[str, int], ...]:
        """Address and port of each listener, the port as the system chose it when 0 was asked."""
        return tuple(listener.getsockname()[:2] for listener in self._listeners)

    def publish(self, host: str, path: str, body: bytes) -> None:
        """Answer `path` for `host` with `body`; ChallengeError for a foreign name, path or form."""
        table = self._table(host)
        _validate_entry(path, body)
        if path not in table and len(table) >= ENTRY_LIMIT:
            raise ChallengeError(f"more than {ENTRY_LIMIT} published paths for {host}")
        table[path] = body

    def withdraw(self, host: str, path: str) -> None:
        """Answer `path` with 404 from now on; nothing happens when it was not published."""
        self._table(host).pop(path, None)

    def replace(self, host: str, entries: Mapping[str, bytes]) -> None:
        """Publish exactly `entries` for `host`; when one is refused nothing changes."""
        table = self._table(host)
        if len(entries) > ENTRY_LIMIT:
            raise ChallengeError(f"more than {ENTRY_LIMIT} published paths for {host}")
        for path, body in entries.items():
            _validate_entry(path, body)
        table.clear()
        table.update(entries)

    def _table(self, host: str) -> dict[str, bytes]:
        try:
            return self._tables[_canonical(host)]
        except KeyError:
            raise ChallengeError(f"{host} is not a name of this agent") from None

    async def listen(self, *endpoints: tuple[str, int]) -> None:
        """Listen on each (address, port); OSError when one is taken, and then on none of these."""
        opened: list[socket.socket] = []
        try:
            for address, port in endpoints:
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                listener = socket.create_server((address, port), family=family, backlog=BACKLOG)
                listener.setblocking(False)
                opened.append(listener)
        except OSError:
            for listener in opened:
                listener.close()
            raise
        self._listeners += opened
        self._acceptors += [asyncio.create_task(self._accept(listener)) for listener in opened]

    async def close(self) -> None:
        """Stop listening and end every connection."""
        tasks = self._acceptors + [c.task for c in self._connections if c.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for listener in self._listeners:
            listener.close()
        self._acceptors, self._listeners = [], []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError:  # out of descriptors or memory: give up the oldest connection and go on
                self.counters[Outcome.ACCEPT_FAILED] += 1
                self._evict()
                await asyncio.sleep(ACCEPT_PAUSE)
                continue
            if len(self._connections) >= self._limit:
                self._evict()
            connection = _Connection(sock)
            self._connections[connection] = None
            connection.task = asyncio.create_task(self._serve(connection))
            connection.task.add_done_callback(partial(self._forget, connection))
            await asyncio.sleep(0)  # sock_accept does not yield while the backlog has more

    def _evict(self) -> None:
        """End the oldest idle connection, or the oldest of all when each is being answered."""
        oldest = next(iter(self._connections), None)
        victim = next((c for c in self._connections if c.idle), oldest)
        if victim is not None and victim.task is not None:
            del self._connections[victim]
            self._count(victim, Outcome.EVICTED)
            victim.task.cancel()

    def _forget(self, connection: _Connection, _task: object) -> None:
        """Close the socket; also for a task that was cancelled before its first step."""
        connection.sock.close()
        self._connections.pop(connection, None)

    def _count(self, connection: _Connection, outcome: Outcome) -> None:
        """Count a connection once, by what happened to it first."""
        if not connection.counted:
            self.counters[outcome] += 1
            connection.counted = True

    async def _serve(self, connection: _Connection) -> None:
        try:
            async with asyncio.timeout(self._deadline):
                outcome, response = await self._answer(connection)
                self._count(connection, outcome)
                connection.idle = False
                await _send_and_linger(connection, response)
        except TimeoutError:
            self._count(connection, Outcome.TIMEOUT)
        except OSError:
            self._count(connection, Outcome.CLOSED)

    async def _answer(self, connection: _Connection) -> tuple[Outcome, bytes]:
        """The outcome and the response's octets, none when the peer left before a whole request."""
        try:
            request = await _read_request(connection.sock)
        except h11.RemoteProtocolError:
            return Outcome.MALFORMED, _response(Outcome.MALFORMED)
        if isinstance(request, Outcome):
            return request, _response(request) if request in _STATUS else b""
        outcome, body = self._decide(request)
        return outcome, _response(outcome, body, head=request.method == b"HEAD")

    def _decide(self, request: h11.Request) -> tuple[Outcome, bytes]:
        if not request.http_version.startswith(b"1."):
            return Outcome.MALFORMED, b""
        target = request.target.decode("latin-1")
        fields = [(name, value.decode("latin-1")) for name, value in request.headers]
        hosts = [_host(value) for name, value in fields if name == b"host"]
        if len(hosts) != 1:
            return Outcome.MISDIRECTED, b""
        if absolute := _ABSOLUTE.fullmatch(target):  # RFC 9112 section 3.2.2: this host counts
            hosts, target = [*hosts, _host(absolute[1])], absolute[2]
        if any(host != hosts[0] or host not in self._tables for host in hosts):
            return Outcome.MISDIRECTED, b""
        if request.method not in {b"GET", b"HEAD"}:
            return Outcome.METHOD, b""
        if any(n == b"transfer-encoding" or (n == b"content-length" and v.strip("0")) for n, v in fields):
            return Outcome.BODY, b""
        body = self._tables[hosts[0]].get(target)
        return (Outcome.NOT_FOUND, b"") if body is None else (Outcome.SERVED, body)


def _host(authority: str) -> str:
    """The host part without trailing dot and port; empty for an address literal or garbage."""
    match = _AUTHORITY.fullmatch(authority)
    return match[1].lower() if match else ""


def _canonical(name: str) -> str:
    return name.lower().removesuffix(".")


def _validate_entry(path: str, body: bytes) -> None:
    if len(body) > BODY_LIMIT:
        raise ChallengeError(f"an answer of more than {BODY_LIMIT} octets")
    if path.startswith(ACME_PATH):
        validate_challenge(HttpChallenge(path.removeprefix(ACME_PATH), body.decode("latin-1")))
    elif not (path.startswith(PROOF_PATH) and _NONCE.fullmatch(path.removeprefix(PROOF_PATH))):
        raise ChallengeError("the path is neither an ACME challenge nor an address proof")


async def _read_request(sock: socket.socket) -> h11.Request | Outcome:
    """One request's head; an Outcome when there is none. h11 checks the Host count (RFC 9112 3.2)."""
    loop = asyncio.get_running_loop()
    parser = h11.Connection(h11.SERVER)
    room = HEADER_LIMIT
    while not isinstance(event := parser.next_event(), h11.Request):
        if event is not h11.NEED_DATA:
            return Outcome.CLOSED
        if room == 0:
            return Outcome.TOO_LARGE
        data = await loop.sock_recv(sock, room)
        room -= len(data)
        parser.receive_data(data)
    return event


def _response(outcome: Outcome, body: bytes = b"", *, head: bool = False) -> bytes:
    status = _STATUS[outcome]
    allow = "Allow: GET, HEAD\r\n" if outcome is Outcome.METHOD else ""
    lines = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/octet-stream\r\n"
        f"Content-Length: {len(body)}\r\n{allow}Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return lines.encode("ascii") + (b"" if head else body)


async def _send_and_linger(connection: _Connection, response: bytes) -> None:
    """Send, then read what is still coming: closing over unread octets would reset the connection."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection.sock, response)
    connection.sock.shutdown(socket.SHUT_WR)
    connection.idle = True
    dropped = 0
    while dropped < LINGER_LIMIT and (data := await loop.sock_recv(connection.sock, 8192)):
        dropped += len(data)
