"""A front before a primary, over TCP as the publisher asks it, which fails in one of the ways that servers and networks fail."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Any

import dns.message
import dns.rcode

from lab.nameservers import NameServer
from lab.processes import free_port
from lab.threads import InThread

SLOW = 2.0  # seconds
_READ = 16 * 1024


class Fault(StrEnum):
    """What becomes of a connection, by its first message."""

    CLOSED = "closed"  # reset without an answer
    SILENT = "silent"
    REFUSED = "refused"
    SERVFAIL = "servfail"
    GARBAGE = "garbage"
    SLOW = "slow"  # passed on when the asker has given up
    UNHEARD = "unheard"  # passed on, and the answer is lost


class DnsFront(InThread):
    """Passes on to a server whatever comes, unless there is a `fault`; `passed` counts what the server has answered."""

    def __init__(self, server: NameServer) -> None:
        super().__init__("the front of a primary")
        self.address = "127.0.0.1"
        self.port = free_port(self.address)
        self.fault: Fault | None = None
        self.passed = 0
        self._server = server
        self._connections: set[asyncio.Task[Any]] = set()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        async with await asyncio.start_server(self._serve, self.address, self.port):
            yield

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The loop itself keeps only weak references to tasks.
        task = asyncio.current_task()
        assert task is not None, "asyncio calls this in a task"
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        try:
            length = await reader.readexactly(2)
            message = await reader.readexactly(int.from_bytes(length, "big"))
            await self._answer(length + message, writer)
        except (OSError, EOFError):
            pass  # An end that is gone ends the other.
        finally:
            writer.close()

    async def _answer(self, request: bytes, writer: asyncio.StreamWriter) -> None:
        match fault := self.fault:
            case Fault.CLOSED:
                writer.transport.abort()
            case Fault.SILENT:
                await asyncio.Event().wait()
            case (
                Fault.REFUSED | Fault.SERVFAIL
            ):  # without a signature, as from a server that has no key at hand
                answer = dns.message.make_response(dns.message.from_wire(request[2:], keyring=False))
                answer.set_rcode(dns.rcode.from_text(fault))
                writer.write(answer.to_wire(prepend_length=True))
            case Fault.GARBAGE:
                writer.write(request[:2] + bytes(len(request) - 2))
            case Fault.SLOW:
                await asyncio.sleep(SLOW)
                await self._pass(request, writer)
            case _:
                await self._pass(request, writer, is_heard=fault is None)

    async def _pass(self, request: bytes, writer: asyncio.StreamWriter, *, is_heard: bool = True) -> None:
        reader, upstream = await asyncio.open_connection(self._server.address, self._server.port)
        try:
            upstream.write(request)
            octets = await reader.read(_READ)
            self.passed += 1
            while octets and is_heard:
                writer.write(octets)
                await writer.drain()
                octets = await reader.read(_READ)
        finally:
            upstream.close()
