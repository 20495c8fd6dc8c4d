"""A relay between an NTS client and a server, which can lose a share of the NTP packets, or all that are long.

It listens on an address of its own; with the server's NTP port there, a client follows record 7 into the relay. Its ends
may lie in different network namespaces. What is lost is drawn from a seeded generator, in both directions alike. TCP is
passed on whole.
"""

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from lab.processes import LabError
from lab.threads import InThread

SocketMaker = Callable[[socket.SocketKind], socket.socket]
Endpoint = tuple[str, int]
_READ = 16 * 1024
# One for each source port of a client; the oldest is closed first.
_MAX_FLOWS = 64


def host_socket(kind: socket.SocketKind) -> socket.socket:
    """An IPv4 socket of this process's own network."""
    return socket.socket(socket.AF_INET, kind)


class Relay(InThread):
    """From `address` to a server's two endpoints; a context manager that runs in a thread of its own.

    `loss` is the share of datagrams that get lost, and those of more than `longest` octets all do; both may be changed
    while it runs. `lost` and `passed` count datagrams, and `last_request` is what was passed to the server last.
    """

    def __init__(
        self,
        address: str,
        *,
        ke: tuple[int, Endpoint],
        ntp: tuple[int, Endpoint],
        loss: float = 0.0,
        longest: int = _READ,
        seed: int = 1,
        listening: SocketMaker = host_socket,
        sending: SocketMaker = host_socket,
    ) -> None:
        super().__init__(f"the relay on {address}")
        self.address = address
        self.ke_port, self._ke_target = ke
        self.ntp_port, self._ntp_target = ntp
        self.loss = loss
        self.longest = longest
        self.lost = 0
        self.passed = 0
        self.last_request = b""
        self._listening = listening
        self._sending = sending
        self._draw = random.Random(seed)
        self._flows: dict[Endpoint, socket.socket] = {}
        self._streams: set[asyncio.Task[Any]] = set()

    def passes(self, octets: int) -> bool:
        """The fate of one datagram of so many octets, drawn unless it is too long."""
        if octets > self.longest or self._draw.random() < self.loss:
            self.lost += 1
            return False
        self.passed += 1
        return True

    def _note(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.failure = context.get("exception") or LabError(context["message"])

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        self._loop.set_exception_handler(self._note)
        with self._bound(socket.SOCK_DGRAM, self.ntp_port) as udp:
            tcp = self._bound(socket.SOCK_STREAM, self.ke_port)
            async with await asyncio.start_server(self._pass_stream, sock=tcp):
                self._loop.add_reader(udp, self._from_client, udp)
                yield
            self._loop.remove_reader(udp)
        while self._flows:
            self._close_oldest()

    def _bound(self, kind: socket.SocketKind, port: int) -> socket.socket:
        made = self._listening(kind)
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((self.address, port))
        return made

    def _from_client(self, udp: socket.socket) -> None:
        octets, client = udp.recvfrom(_READ)
        if not self.passes(len(octets)):
            return
        if client not in self._flows:
            if len(self._flows) >= _MAX_FLOWS:
                self._close_oldest()
            made = self._sending(socket.SOCK_DGRAM)
            made.setblocking(False)
            made.connect(self._ntp_target)
            self._loop.add_reader(made, self._from_server, made, udp, client)
            self._flows[client] = made
        self.last_request = octets
        # A server that is down is as silent as a lost packet.
        with suppress(ConnectionRefusedError):
            self._flows[client].send(octets)

    def _from_server(self, flow: socket.socket, udp: socket.socket, client: Endpoint) -> None:
        with suppress(ConnectionRefusedError):
            octets = flow.recv(_READ)
            if self.passes(len(octets)):
                udp.sendto(octets, client)

    def _close_oldest(self) -> None:
        flow = self._flows.pop(next(iter(self._flows)))
        self._loop.remove_reader(flow)
        flow.close()

    async def _pass_stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The loop itself keeps only weak references to tasks.
        task = asyncio.current_task()
        assert task is not None, "asyncio calls this in a task"
        self._streams.add(task)
        task.add_done_callback(self._streams.discard)
        made = self._sending(socket.SOCK_STREAM)
        made.setblocking(False)
        try:
            await self._loop.sock_connect(made, self._ke_target)
        except OSError:
            # As a server that is down would look to the client.
            made.close()
            writer.transport.abort()
            return
        far_reader, far_writer = await asyncio.open_connection(sock=made)
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(_pump(reader, far_writer))
                both.create_task(_pump(far_reader, writer))
        except* OSError:
            pass  # An end that was reset resets the other.
        finally:
            far_writer.transport.abort()
            writer.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on one direction, and its end."""
    while octets := await reader.read(_READ):
        writer.write(octets)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
