"""A server of raw octets, over HTTP or by TLS alone, for tests of what dials it."""

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Self

from lab.certificates import Pair

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def says(octets: bytes) -> Serve:
    """Answers every request with these octets."""

    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(octets)
        await writer.drain()

    return serve


def http(status: str, body: bytes = b"", more: str = "") -> bytes:
    """An answer; `more` is header lines."""
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{more}\r\n"
    return head.encode() + body


def by_tls(pair: Pair, *protocols: str) -> ssl.SSLContext:
    """For a server with this certificate that speaks these ALPN protocols."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    context.set_alpn_protocols(protocols)
    return context


class WebServer:
    """Lets `serve(reader, writer)` answer once the head of a request has come, which ends with `until`, then closes.

    `connections` counts all that were made, `heads` holds what they asked.
    """

    def __init__(
        self,
        serve: Serve,
        *,
        address: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        until: bytes = b"\r\n\r\n",
    ) -> None:
        self._serve, self._address, self._tls, self._until = serve, address, tls, until
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = port
        self.connections = 0
        self.heads: list[str] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._handle, self._address, self.port, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # One turn of the loop lets the transports close their sockets.
        await asyncio.sleep(0)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            # The client may have seen enough.
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                self.heads.append((await reader.readuntil(self._until)).decode())
                await self._serve(reader, writer)
        finally:
            writer.close()
