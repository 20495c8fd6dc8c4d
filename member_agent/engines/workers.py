"""Further processes that serve, each with its own sockets: this module is both ends of the pipe between them and the
agent.

The agent binds all sockets and hands them down with the certificates and the cookie keys; a worker has no file, no
network but those sockets, and no right of its own. What comes while a worker is started again waits in its sockets.
It ends when the pipe does, so it never outlives the agent.
"""

import asyncio
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import structlog
from pydantic import BaseModel, ConfigDict

from member_agent.clock import Clock
from member_agent.engines.serving import MOST_PLACES, Charge, Counts, PemPair, Place, Server
from member_agent.tracking import Tracking
from nts_core.children import environment_without, keep_running, wait_or_kill
from nts_core.cookies import Keyring
from nts_core.errors import TlsError, WireError
from nts_core.shell import configure_logging, raise_descriptor_limit

# A hundred chains of the greatest length, and the keys.
_MOST_OCTETS = 32 * 1024 * 1024
_REPORT_OCTETS = 64 * 1024
_LENGTH = struct.Struct("!I")
_READ = 256 * 1024
# For a worker to take what it is told, and to have done it.
_TELLING, _SETTLING, _AGAIN = 10.0, 10.0, 0.05
_REPORT_EVERY = 1.0

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ClockOrders:
    """What a worker says of the clock, which it never asks itself."""

    local_stratum: int | None
    offset_ns: int
    tracking: Tracking | None
    silence: str


@dataclass(frozen=True, slots=True)
class Orders:
    """All that the workers are to do; `sockets` has one for each process at each place, the agent's own first."""

    charge: Charge
    clock: ClockOrders
    keyring: Keyring
    pairs: Mapping[str, PemPair] = field(default_factory=dict)
    sockets: Mapping[Place, Sequence[socket.socket]] = field(default_factory=dict)
    number: int = 0


class News(BaseModel):
    """What is different from what a worker knows; None is as before. The sockets of `opened` come with it, in order."""

    # Most agents have no worker, and need not hold what reads and writes these.
    model_config = ConfigDict(frozen=True, ser_json_bytes="base64", val_json_bytes="base64", defer_build=True)

    number: int
    charge: Charge | None = None
    clock: ClockOrders | None = None
    keyring: str | None = None
    pairs: dict[str, PemPair] | None = None
    opened: tuple[Place, ...] = ()
    closed: tuple[Place, ...] = ()

    @classmethod
    def since(cls, told: Orders | None, orders: Orders) -> "News":
        before = told.sockets.keys() if told else set[Place]()
        return cls(
            number=orders.number,
            charge=orders.charge if told is None else None,
            clock=orders.clock if told is None or told.clock != orders.clock else None,
            keyring=orders.keyring.dump().decode()
            if told is None or told.keyring is not orders.keyring
            else None,
            pairs=dict(orders.pairs) if told is None or told.pairs is not orders.pairs else None,
            opened=tuple(orders.sockets.keys() - before),
            closed=tuple(before - orders.sockets.keys()),
        )


class Report(BaseModel):
    """What a worker has done: the last orders that it follows, and its counts."""

    model_config = ConfigDict(frozen=True, defer_build=True)

    number: int
    counts: Counts


# The agent's end


class Crew:
    """All workers of one agent."""

    def __init__(self, count: int, orders: Orders) -> None:
        self.orders = orders
        self._workers = [_Worker(self, position) for position in range(1, count + 1)]
        self._tasks: list[asyncio.Task[None]] = []

    async def follow(self, orders: Orders) -> bool:
        """Have every worker do this from now on; whether all that live do, after a deadline at most."""
        self.tell(orders)
        if not self._tasks:
            self._tasks = [asyncio.create_task(worker.run()) for worker in self._workers]
        with suppress(TimeoutError):
            async with asyncio.timeout(_SETTLING):
                for worker in self._workers:
                    await worker.settled.wait()
                return True
        _log.error("workers_do_not_follow")
        return False

    def tell(self, orders: Orders) -> None:
        """The same without waiting for it."""
        self.orders = replace(orders, number=self.orders.number + 1)
        for worker in self._workers:
            worker.due.set()
            worker.settled.clear()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def counts(self) -> Counts:
        """Of all workers that ever lived."""
        return sum((worker.counts for worker in self._workers), Counts())

    @property
    def alive(self) -> int:
        return sum(worker.is_alive for worker in self._workers)

    @property
    def restarts(self) -> int:
        return sum(worker.restarts for worker in self._workers)


class _Worker:
    """One process, started again when it ends."""

    def __init__(self, crew: Crew, position: int) -> None:
        self._crew = crew
        self._position = position
        self._earlier = self._current = Counts()
        self.due = asyncio.Event()
        # Set when it has followed the last orders.
        self.settled = asyncio.Event()
        self.is_alive = False
        self.restarts = 0

    @property
    def counts(self) -> Counts:
        return self._earlier + self._current

    async def run(self) -> None:
        await keep_running(self._run_once, self._note_end)

    def _note_end(self, status: int, next_in: float) -> None:
        self.restarts += 1
        _log.error("worker_ended", worker=self._position, status=status, next_in=next_in)

    async def _run_once(self) -> int:
        ours, theirs = socket.socketpair()
        with ours:
            ours.setblocking(False)
            try:
                with theirs:
                    child = await asyncio.create_subprocess_exec(
                        *(sys.executable, "-P", "-m", "member_agent.engines.workers"),
                        stdin=theirs.fileno(),
                        stdout=subprocess.PIPE,
                        limit=_REPORT_OCTETS,
                        env=environment_without("POOL_"),
                    )
            except OSError as error:
                _log.error("worker_not_started", worker=self._position, reason=error.strerror)
                return -1
            self.is_alive = True
            assert child.stdout is not None
            work = [
                asyncio.create_task(self._inform(ours)),
                asyncio.create_task(self._listen(child.stdout)),
            ]
            try:
                await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in work:
                    task.cancel()
                for fault in await asyncio.gather(*work, return_exceptions=True):
                    if isinstance(fault, Exception):
                        _log.error("worker_out_of_reach", worker=self._position, reason=type(fault).__name__)
                ours.close()
                status = await wait_or_kill(child)
                self._note_last()
            return status

    def _note_last(self) -> None:
        self.is_alive = False
        self._earlier = replace(self.counts, ke_open=0)
        self._current = Counts()

    async def _inform(self, pipe: socket.socket) -> None:
        told: Orders | None = None
        while True:
            self.due.clear()
            orders = self._crew.orders
            news = News.since(told, orders)
            descriptors = [orders.sockets[place][self._position].fileno() for place in news.opened]
            await _send(pipe, news.model_dump_json().encode(), descriptors)
            told = orders
            await self.due.wait()

    async def _listen(self, reports: asyncio.StreamReader) -> None:
        while line := await reports.readline():
            report = Report.model_validate_json(line)
            self._current = report.counts
            if report.number == self._crew.orders.number:
                self.settled.set()


async def _send(pipe: socket.socket, octets: bytes, descriptors: Sequence[int]) -> None:
    """Raises OSError, TimeoutError."""
    async with asyncio.timeout(_TELLING):
        while True:
            try:
                socket.send_fds(pipe, [_LENGTH.pack(len(octets))], descriptors)
                break
            except BlockingIOError:
                await asyncio.sleep(_AGAIN)
        await asyncio.get_running_loop().sock_sendall(pipe, octets)


# The worker's end


class _Serving:
    """What the worker does: whatever the pipe says."""

    def __init__(self, pipe: socket.socket, reports: int) -> None:
        self._pipe = pipe
        self._reports = reports
        self._octets = bytearray()
        self._descriptors: list[int] = []
        self._server: Server | None = None
        self._clock: Clock | None = None
        self._number = 0
        self._reported = b""
        self._ended = asyncio.Event()
        self._status = 0

    async def run(self) -> int:
        """Until the agent ends, or says what cannot be understood; the exit status."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._pipe, self._hear)
        while not self._ended.is_set():
            self._report()
            with suppress(TimeoutError):
                async with asyncio.timeout(_REPORT_EVERY):
                    await self._ended.wait()
        loop.remove_reader(self._pipe)
        if self._server is not None:
            await self._server.close()
        return self._status

    def _hear(self) -> None:
        try:
            octets, descriptors, _, _ = socket.recv_fds(self._pipe, _READ, MOST_PLACES)
            self._descriptors += descriptors
            self._octets += octets
            while (news := self._next_news()) is not None:
                self._follow(news)
            if not octets:
                self._ended.set()
        except BlockingIOError:
            return
        except (OSError, ValueError, KeyError, IndexError, TlsError, WireError) as error:
            _log.error("orders_not_followed", reason=type(error).__name__)
            self._status = 1
            self._ended.set()

    def _next_news(self) -> News | None:
        if len(self._octets) < _LENGTH.size:
            return None
        end = _LENGTH.size + _LENGTH.unpack_from(self._octets)[0]
        if end > _MOST_OCTETS:
            raise ValueError("too long")
        if len(self._octets) < end:
            return None
        document = bytes(self._octets[_LENGTH.size : end])
        del self._octets[:end]
        return News.model_validate_json(document)

    def _follow(self, news: News) -> None:
        if news.clock is not None:
            if self._clock is None:
                self._clock = Clock(news.clock.local_stratum, news.clock.offset_ns)
            self._clock.hear(news.clock.tracking, news.clock.silence)
        keyring = Keyring.load(news.keyring.encode()) if news.keyring is not None else None
        if self._server is None:
            if news.charge is None or self._clock is None or keyring is None:
                raise ValueError("the first orders are not whole")
            self._server = Server(news.charge, self._clock, keyring)
        elif keyring is not None:
            self._server.use_keyring(keyring)
        if news.pairs is not None:
            self._server.use_credentials({domain: pair.credentials() for domain, pair in news.pairs.items()})
        for place in news.closed:
            self._server.leave(place)
        for place in news.opened:
            self._server.open(place, socket.socket(fileno=self._descriptors.pop(0)))
        self._number = news.number
        self._report()

    def _report(self) -> None:
        """Say what is new; nothing while the agent does not listen."""
        if self._server is None:
            return
        line = Report(number=self._number, counts=self._server.counts).model_dump_json().encode() + b"\n"
        if line != self._reported:
            with suppress(BlockingIOError, BrokenPipeError):
                os.write(self._reports, line)
                self._reported = line


def main() -> None:
    """Serve until standard input ends; reports go to standard output."""
    configure_logging()
    raise_descriptor_limit()
    # A signal for the whole group is the agent's to answer.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.set_blocking(sys.stdout.fileno(), False)
    with socket.socket(fileno=os.dup(0)) as pipe:
        pipe.setblocking(False)

        async def serve() -> int:
            return await _Serving(pipe, sys.stdout.fileno()).run()

        sys.exit(asyncio.run(serve()))


if __name__ == "__main__":
    main()
