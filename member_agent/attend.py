"""Connections that each get one answer within one deadline, and that cannot hold each other up.

Where there are too many, or no descriptors are left, the oldest idle one makes room for the next: thousands of idle
connections do not delay a validation. After each connection everybody else gets a turn, so that what waited in the
backlog is answered before what came later.
"""

import asyncio
import socket
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

from member_agent.sockets import Endpoint, bind, bound_endpoint

TIMEOUT, EVICTED, CLOSED, ACCEPT_FAILED = "timeout", "evicted", "closed", "accept-failed"

_BACKLOG = 1024  # connections that wait for accept; the kernel may allow fewer
_PAUSE = 0.05  # seconds before the next accept when the system is out of descriptors
_LINGER_LIMIT = 65_536  # octets read and dropped after the answer, so that no reset overtakes it


@dataclass(slots=True, eq=False)
class Connection:
    """One accepted socket, which does not block. It is `idle` until a whole request has been read."""

    sock: socket.socket
    idle: bool = True
    counted: bool = False
    task: asyncio.Task[None] | None = None

    async def finish(self, octets: bytes) -> None:
        """Send the last octets, then read what is still coming: closing over unread ones would reset the connection."""
        loop = asyncio.get_running_loop()
        self.idle = False
        await loop.sock_sendall(self.sock, octets)
        self.sock.shutdown(socket.SHUT_WR)
        self.idle = True
        dropped = 0
        while dropped < _LINGER_LIMIT and (data := await loop.sock_recv(self.sock, 8192)):
            dropped += len(data)


class Attendant(ABC):
    """Listening sockets and their connections. `counters` counts connections by outcome.

    `limit` is open connections, `deadline` seconds for a whole one. Start it with `listen`, end it with `close`.
    """

    def __init__(self, *, limit: int = 1024, deadline: float = 5.0) -> None:
        self.counters: Counter[str] = Counter()
        self._limit = limit
        self._deadline = deadline
        self._listeners: dict[Endpoint, tuple[socket.socket, asyncio.Task[None]]] = {}
        self._connections: dict[Connection, None] = {}  # ordered by age

    @abstractmethod
    async def answer(self, connection: Connection) -> tuple[str, bytes]:
        """Read what is asked and decide: the outcome to count, and the octets to end with."""

    @abstractmethod
    def forget(self, domain: str) -> None:
        """The domain is not one of ours any more."""

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """Where it listens, with ports as the system chose them when 0 was asked."""
        return tuple(bound_endpoint(sock) for sock, _ in self._listeners.values())

    async def listen(self, *wanted: tuple[str, int]) -> None:
        """Listen on these and no others. Raises AgentError when one cannot be had, and then opens none of the new ones."""
        endpoints = [Endpoint(*each) for each in wanted]
        # First, as one that goes may be in the way of one that comes: an address, and all of its family.
        for endpoint in self._listeners.keys() - set(endpoints):
            await self._close(endpoint)
        opened: dict[Endpoint, socket.socket] = {}
        try:
            for endpoint in dict.fromkeys(endpoints):
                if endpoint not in self._listeners:
                    opened[endpoint] = bind(endpoint, socket.SOCK_STREAM)
                    opened[endpoint].listen(_BACKLOG)
        except BaseException:
            for sock in opened.values():
                sock.close()
            raise
        for endpoint, sock in opened.items():
            self._listeners[endpoint] = sock, asyncio.create_task(self._accept(sock))

    async def _close(self, endpoint: Endpoint) -> None:
        sock, accepting = self._listeners.pop(endpoint)
        accepting.cancel()
        await asyncio.gather(accepting, return_exceptions=True)
        sock.close()

    async def close(self) -> None:
        """Stop listening and end every connection."""
        for endpoint in tuple(self._listeners):
            await self._close(endpoint)
        tasks = [connection.task for connection in self._connections if connection.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

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
                self.counters[ACCEPT_FAILED] += 1
                self._evict()
                await asyncio.sleep(_PAUSE)
                continue
            if len(self._connections) >= self._limit:
                self._evict()
            connection = Connection(sock)
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
            self._count(victim, EVICTED)
            victim.task.cancel()

    def _forget(self, connection: Connection, _task: object) -> None:
        """Close the socket; also for a task that was cancelled before its first step."""
        connection.sock.close()
        self._connections.pop(connection, None)

    def _count(self, connection: Connection, outcome: str) -> None:
        """Count a connection once, by what happened to it first."""
        if not connection.counted:
            self.counters[outcome] += 1
            connection.counted = True

    async def _serve(self, connection: Connection) -> None:
        try:
            async with asyncio.timeout(self._deadline):
                outcome, octets = await self.answer(connection)
                self._count(connection, outcome)
                await connection.finish(octets)
        except TimeoutError:
            self._count(connection, TIMEOUT)
        except OSError:
            self._count(connection, CLOSED)
