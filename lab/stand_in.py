"""A registry of one server, alice, on loopback: it wants of her agent what a test says, or behaves as no registry should.

What the real one does with reports is not its matter: it keeps them.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Self

from lab.processes import free_port

# What it does with a connection instead of an answer; it may wait.
Fault = Callable[[asyncio.StreamWriter], Awaitable[None]]
_NAMES = {"pool": "pool.example", "server": "alice", "domain": "alice.servers.pool.example"}


class StandIn:
    """`wanted` is what an assignment says; `reports` what came, `calls` the paths asked for.

    An answer of its own may be set by path in `answers`; `fault` comes before all of them. `heed` is told what was asked,
    by path, before it is answered.
    """

    def __init__(self, **wanted: Any) -> None:
        self.wanted = {**_NAMES, "state": "active", "http_port": 8080, "ke_port": 4460, "poll_after": 0.05}
        self.wanted |= {"addresses": [], **wanted}
        self.answers: dict[str, dict[str, Any]] = {
            "/v1/agent/proof": {"address": "127.0.0.1", "nonce": "nonce-1"},
            "/v1/agent/rejoin-challenge": {"nonce": "nonce-2"},
            "/v1/agent/rejoin": {"token": "tc_agent_y", **_NAMES},
            "/v1/agent/join": {"token": "tc_agent_x", **_NAMES},
        }
        self.fault: Fault | None = None
        self.heed: Callable[[str, dict[str, Any]], Awaitable[None]] | None = None
        self.calls: list[str] = []
        self.reports: list[dict[str, Any]] = []
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        # One turn of the loop lets the transports close their sockets.
        await asyncio.sleep(0)

    async def open(self) -> None:
        """As `close` undoes it."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "asyncio calls this in a task"
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        # Who asks may be gone, or be ended, at any time.
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            path, length = head.split()[1], head.lower().partition("content-length: ")[2].split()[0]
            body = await reader.readexactly(int(length))
            self.calls.append(path)
            if self.fault is None:
                said = json.loads(body or b"{}")
                if path == "/v1/agent/sync":
                    self.reports.append(said)
                if self.heed is not None:
                    await self.heed(path, said)
            if self.fault is not None:
                await self.fault(writer)
            else:
                answer = json.dumps(self.answers.get(path, self.wanted)).encode()
                writer.write(http("200 OK", answer))
                await writer.drain()
        writer.transport.abort() if self.fault is not None else writer.close()

    @asynccontextmanager
    async def failing(self, fault: Fault) -> AsyncIterator[None]:
        self.fault = fault
        try:
            yield
        finally:
            self.fault = None


def http(status: str, body: bytes, *fields: str) -> bytes:
    """One answer, after which the connection ends."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *fields, "", ""]
    return "\r\n".join(lines).encode() + body


def saying(octets: bytes) -> Fault:
    """The fault of an answer that is always the same."""

    async def say(writer: asyncio.StreamWriter) -> None:
        writer.write(octets)
        # All of it is sent before the connection is given up.
        writer.close()
        await writer.wait_closed()

    return say
