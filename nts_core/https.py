"""One HTTP request over TCP or TLS, with a deadline and bounds: all that a registry is asked by (I/O).

httpx, with what it needs, would be a tenth of an idle agent's memory (docs/performance.md).
"""

import asyncio
import re
import ssl
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import NamedTuple
from urllib.parse import urlsplit

import h11

# A server's own patience with an idle connection is five seconds or more.
_KEPT = 4.0
_READ = 64 * 1024
_NEXT_ADDRESS = 0.25  # seconds before the next address is tried beside the first (RFC 8305)
# What a head may have beside the body.
_MAX_HEAD = 32 * 1024
_SECONDS = re.compile(rb"[0-9]{1,9}")


class TooLong(ConnectionError):
    """An answer of more octets than was allowed."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes
    retry_after: float | None = None  # seconds; None where it was not said, or in another form


class _Connection(NamedTuple):
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    http: h11.Connection


class Client:
    """Asks one server. The connection is kept for a request that follows within seconds."""

    def __init__(self, url: str, tls: ssl.SSLContext, *, max_answer: int) -> None:
        """What is asked for lies under `url`; `tls` is for `https` only."""
        parts = urlsplit(url)
        self._above = parts.path
        self._host = parts.hostname or ""
        self._is_address = _is_address(self._host)
        self._tls = tls if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._authority = parts.netloc.rpartition("@")[2]
        self._max_answer = max_answer
        self._kept: tuple[_Connection, float] | None = None

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: dict[str, str],
        timeout: float,
        source: str | None = None,
    ) -> Answer:
        """The answer, whatever its status; no redirect is followed. It leaves from the address `source`, if given.

        Raises OSError: TooLong, TimeoutError when it takes longer than `timeout` seconds, or what befell the connection.
        """
        async with asyncio.timeout(timeout):
            connection = (self._take_kept() if source is None else None) or await self._connect(source)
            is_reusable = False
            try:
                answer = await self._exchange(connection, method, path, body, headers)
                is_reusable = source is None and _begin_anew(connection.http)
            except h11.ProtocolError as error:
                raise ConnectionError(f"not HTTP: {error}") from None
            finally:
                if not is_reusable:
                    # Nothing is under way that would have to arrive.
                    connection.writer.transport.abort()
            if is_reusable:
                self.close()
                self._kept = connection, time.monotonic()
            return answer

    def close(self) -> None:
        """Let go of a connection that was kept."""
        if self._kept is not None:
            self._kept[0].writer.transport.abort()
            self._kept = None

    def _take_kept(self) -> _Connection | None:
        if self._kept is None:
            return None
        (connection, since), self._kept = self._kept, None
        if time.monotonic() - since < _KEPT and not connection.reader.at_eof():
            return connection
        connection.writer.transport.abort()
        return None

    async def _connect(self, source: str | None) -> _Connection:
        reader, writer = await asyncio.open_connection(
            self._host,
            self._port,
            ssl=self._tls,
            local_addr=None if source is None else (source, 0),
            # One family that leads nowhere must not take all the time there is. A race that is cancelled may leave a socket
            # open, so an address runs none.
            happy_eyeballs_delay=_NEXT_ADDRESS if source is None and not self._is_address else None,
            limit=_READ,
        )
        return _Connection(reader, writer, h11.Connection(h11.CLIENT, _MAX_HEAD))

    async def _exchange(
        self, connection: _Connection, method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> Answer:
        reader, writer, http = connection
        fields = {"Host": self._authority, "Content-Length": str(len(body or b"")), **headers}
        octets = (
            http.send(h11.Request(method=method, target=self._above + path, headers=list(fields.items())))
            or b""
        )
        if body:
            octets += http.send(h11.Data(body)) or b""
        writer.write(octets + (http.send(h11.EndOfMessage()) or b""))
        # A server may answer, and close, before it has taken all.
        with suppress(ConnectionError):
            await writer.drain()
        status, retry_after, found, received = 0, None, bytearray(), 0
        while True:
            match http.next_event():
                case h11.Response(status_code=status, headers=fields_of_answer):
                    retry_after = _seconds(fields_of_answer)
                case h11.Data(data=data):
                    found += data
                    if len(found) > self._max_answer:
                        raise TooLong("the answer is too long")
                case h11.EndOfMessage():
                    return Answer(status, bytes(found), retry_after)
                case h11.NEED_DATA:
                    octets = await reader.read(_READ)
                    received += len(octets)
                    if received > 2 * self._max_answer + _MAX_HEAD:
                        raise TooLong("the answer is too long")
                    http.receive_data(octets)
                case h11.ConnectionClosed():
                    raise ConnectionError("closed without an answer")


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _seconds(fields: Iterable[tuple[bytes, bytes]]) -> float | None:
    """Retry-After (RFC 9110 section 10.2.3), as a number: a date would have to trust two clocks."""
    value = next((value for name, value in fields if name == b"retry-after"), b"")
    return float(value) if _SECONDS.fullmatch(value) else None


def _begin_anew(http: h11.Connection) -> bool:
    """Make ready for the next request; whether there may be one."""
    if http.our_state is not h11.DONE or http.their_state is not h11.DONE:
        return False
    http.start_next_cycle()
    return True
