"""The agent's answers on port 80: ACME key authorizations and signed address proofs, and nothing else.

The table is fixed: a path is answered only when it was published, for a name confirmed at join, and the
answer never echoes what was asked. One request a connection, without a body (`member_agent.attend`).
"""

import asyncio
import re
import socket
from collections.abc import Iterable, Mapping
from enum import StrEnum
from http import HTTPStatus

import h11

from member_agent import attend
from member_agent.attend import Attendant, Connection
from nts_core.control import ACME_PATH, PROOF_PATH, HttpChallenge

HEADER_LIMIT = 8192  # octets of request line and header fields
BODY_LIMIT = 1024  # octets of one published answer; a key authorization has 172 at most
ENTRY_LIMIT = 64  # published paths of one name

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
    TIMEOUT = attend.TIMEOUT
    EVICTED = attend.EVICTED
    CLOSED = attend.CLOSED  # the peer left before a whole request
    ACCEPT_FAILED = attend.ACCEPT_FAILED


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


class Responder(Attendant):
    """An HTTP/1.1 responder for `names`, and for those that something is published for. It counts by `Outcome`."""

    def __init__(self, names: Iterable[str] = (), *, limit: int = 1024, deadline: float = 5.0) -> None:
        super().__init__(limit=limit, deadline=deadline)
        self._tables: dict[str, dict[str, bytes]] = {_canonical(name): {} for name in names}

    def publish(self, host: str, path: str, body: bytes) -> None:
        """Answer `path`, too, for `host` with `body`. Raises ChallengeError."""
        self.replace(host, {**self._tables.get(_canonical(host), {}), path: body})

    def replace(self, host: str, entries: Mapping[str, bytes]) -> None:
        """Publish exactly `entries`, bodies by path, for `host`; when one is refused nothing changes.

        Raises ChallengeError for a path or a form that is never answered.
        """
        if len(entries) > ENTRY_LIMIT:
            raise ChallengeError(f"more than {ENTRY_LIMIT} published paths for {host}")
        for path, body in entries.items():
            _validate_entry(path, body)
        self._tables[_canonical(host)] = dict(entries)

    def forget(self, domain: str) -> None:
        self._tables.pop(_canonical(domain), None)

    async def answer(self, connection: Connection) -> tuple[Outcome, bytes]:
        """No octets when the peer left before a whole request."""
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
