"""How connections are accepted, and how long one may take: uvicorn's HTTP under deadlines and shared slots.

uvicorn waits without end for a TLS handshake, for a request's head and for its body, and a thousand such connections
would close the API. Here every wait for a peer has a deadline, no network can take all connections, and when there
are too many, the one whose peer is waited for longest makes room.

Each connection takes the certificate that is newest when it is accepted.
"""

import asyncio
import contextlib
import errno
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from ssl import SSLContext
from types import FrameType
from typing import Any

import h11
import structlog
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from nts_core.acceptor import Acceptor
from nts_core.ratelimit import NoSlot, Slots
from nts_core.shell import affordable_connections

# Until it is logged again that there was no descriptor for a connection.
_QUIET = 60.0
# Descriptors that connections leave to the database, the worker's own connections, and files.
_RESERVED_DESCRIPTORS = 128

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds for each wait, and connections: of all, of an IPv4 address or /64, of a /48."""

    handshake: float = 10
    head: float = 10  # from the first octet, or from the connection's beginning
    body: float = 30
    answer: float = 60  # the registry's own work, and the peer's reading
    idle: int = 15
    closing: float = 5
    connections: int = 1000
    per_address: int = 64
    per_prefix: int = 256


class Phase(StrEnum):
    """What a connection waits for; with "-timeout", the label of a counter."""

    HANDSHAKE = "handshake"
    HEAD = "head"
    BODY = "body"
    ANSWER = "answer"
    IDLE = "idle"
    CLOSING = "closing"


@dataclass(slots=True, eq=False)
class _Peer:
    """One accepted connection. `slot` is the address that its slot counts for; a trusted proxy has none."""

    sock: socket.socket
    slot: bytes | None
    since: float  # when the present phase began
    phase: Phase = Phase.HANDSHAKE
    transport: asyncio.Transport | None = None

    def end(self) -> None:
        """Without waiting for the peer; before there is a transport its maker meets the end of the stream."""
        if self.transport is not None:
            self.transport.abort()
        else:
            with suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)


class Listeners:
    """The sockets of one service. `tls` tells the context for a new connection; without it, plain HTTP."""

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        limits: Limits | None = None,
        tls: Callable[[], SSLContext] | None = None,
        trusted_proxies: Collection[IPv4Address | IPv6Address] = (),
    ) -> None:
        self.limits = limits or Limits()
        self.counters: Counter[str] = Counter()
        self.config = config
        self.state = ServerState()
        self.app_state: dict[str, Any] = {}
        self._tls = tls
        self._trusted = {address.packed for address in trusted_proxies}
        self._total = affordable_connections(self.limits.connections, _RESERVED_DESCRIPTORS)
        # One more, so that it decides also when all are taken who may have the place of another.
        self._slots = Slots(
            self._total + 1, per_address=self.limits.per_address, per_prefix=self.limits.per_prefix
        )
        self._acceptor = Acceptor(self._admit, self._begin_one, self.counters, exhausted=self._tell_exhausted)
        self._peers: set[_Peer] = set()
        self._beginning: set[asyncio.Task[None]] = set()
        self._quiet_until = 0.0
        if not config.loaded:
            config.load()

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._peers)

    def listen(self, sock: socket.socket) -> None:
        """Answer on a bound socket."""
        self._acceptor.listen(sock)

    def close(self) -> None:
        """Accept no more. Connections that are open go on."""
        self._acceptor.close()

    async def end_connections(self) -> None:
        """End what is still open, and return once nothing is."""
        for peer in tuple(self._peers):
            peer.end()
        await asyncio.gather(*self._beginning, return_exceptions=True)

    def _begin_one(self, connection: socket.socket, address: bytes, _listener: socket.socket) -> None:
        peer = _Peer(connection, None if address in self._trusted else address, time.monotonic())
        self._peers.add(peer)
        task = asyncio.get_running_loop().create_task(self._begin(peer))
        self._beginning.add(task)
        task.add_done_callback(self._beginning.discard)

    def _tell_exhausted(self, number: int) -> None:
        """There is no descriptor for a connection."""
        now = asyncio.get_running_loop().time()
        if now >= self._quiet_until:
            self._quiet_until = now + _QUIET
            _log.error("accept_paused", reason=errno.errorcode[number], connections=len(self._peers))
        self._make_room()

    def _admit(self, address: bytes) -> NoSlot | None:
        """Take a slot for the address, or tell why it gets none. What is full makes room, if it can."""
        is_trusted = address in self._trusted
        refused = None if is_trusted else self._slots.take(address)
        if refused is None and len(self._peers) >= self._total and not self._make_room():
            refused = NoSlot.ALL
            if not is_trusted:
                self._slots.give_back(address)
        return refused

    def _make_room(self) -> bool:
        """End the connection whose peer is waited for longest; none where the registry has to answer."""
        waiting = (peer for peer in self._peers if peer.phase is not Phase.ANSWER)
        longest = min(waiting, key=lambda peer: peer.since, default=None)
        if longest is None:
            return False
        self.counters["evicted"] += 1
        self.forget(longest)
        longest.end()
        return True

    def forget(self, peer: _Peer) -> None:
        """Give a connection's slot back; doing it again changes nothing."""
        if peer in self._peers:
            self._peers.remove(peer)
            if peer.slot is not None:
                self._slots.give_back(peer.slot)

    async def _begin(self, peer: _Peer) -> None:
        """Make the transport, which for TLS includes the handshake."""
        loop = asyncio.get_running_loop()
        deadlines: dict[str, Any] = {}
        try:
            # asyncio does so only for sockets that were made with the protocol's number.
            peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                deadlines = {
                    "ssl": self._tls(),
                    "ssl_handshake_timeout": self.limits.handshake,
                    "ssl_shutdown_timeout": self.limits.closing,
                }
            await loop.connect_accepted_socket(partial(_Connection, self, peer), peer.sock, **deadlines)
        except OSError:  # the peer left, did not speak TLS, or not in time
            self.counters["handshake-failed"] += 1
            self.forget(peer)
        except BaseException:
            self.forget(peer)
            peer.sock.close()
            raise


class _Connection(H11Protocol):
    """uvicorn's connection, with a deadline for each phase and for all octets of it together."""

    def __init__(self, listeners: Listeners, peer: _Peer) -> None:
        super().__init__(listeners.config, listeners.state, listeners.app_state, asyncio.get_running_loop())
        self.timeout_keep_alive = listeners.limits.idle
        self._listeners = listeners
        self._peer = peer
        self._timer: asyncio.TimerHandle | None = None
        # A phase of the request that is under way: two requests in a row have a deadline each.
        self._watched: tuple[Phase, object] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._peer.transport = transport
        super().connection_made(transport)
        self._watch(Phase.HEAD)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch(Phase.HEAD)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch(Phase.IDLE)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch(Phase.IDLE)

    def send_400_response(self, msg: str) -> None:
        """Uvicorn does so also beside an answer that is given or will be, which h11 refuses by an exception."""
        if self.cycle is not None:
            self.cycle.disconnected = True
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()

    def shutdown(self) -> None:
        super().shutdown()
        self._watch(Phase.IDLE)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._listeners.forget(self._peer)
        super().connection_lost(exc)

    def _watch(self, between_requests: Phase) -> None:
        """Begin the deadline of the phase that holds now; one that goes on keeps its own."""
        phase = self._phase(between_requests)
        if self._watched == (phase, self.cycle):
            return
        self._watched = (phase, self.cycle)
        self._peer.phase, self._peer.since = phase, time.monotonic()
        if self._timer is not None:
            self._timer.cancel()
        # uvicorn itself ends idle connections, by `timeout_keep_alive`.
        self._timer = (
            None
            if phase is Phase.IDLE
            else self.loop.call_later(getattr(self._listeners.limits, phase), self._expire, phase)
        )

    def _phase(self, between_requests: Phase) -> Phase:
        if self.transport.is_closing():
            return Phase.CLOSING
        if self.conn.their_state is h11.SEND_BODY:
            return Phase.BODY
        if self.cycle is not None and not self.cycle.response_complete:
            return Phase.ANSWER
        return between_requests

    def _expire(self, phase: Phase) -> None:
        self._listeners.counters[f"{phase}-timeout"] += 1
        self.transport.abort()


@dataclass(frozen=True, slots=True)
class Service:
    """Listeners and their sockets, which are bound already, so that a mistake is told at the start."""

    listeners: Listeners
    sockets: Sequence[socket.socket]
    ready: asyncio.Event | None = None

    async def open(self) -> None:
        """Listen, once `ready`."""
        if self.ready is not None:
            await self.ready.wait()
        for sock in self.sockets:
            self.listeners.listen(sock)


class Server(uvicorn.Server):
    """Serves until SIGTERM: first `stopping` is set, and the services go on for `stop_delay` seconds, so that whoever
    asks for readiness can see it; then nothing more is accepted, and requests under way get their time.

    The second signal ends the process at once, as a crash would: every step can be repeated. `duties` run meanwhile.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        services: Sequence[Service],
        *,
        stopping: asyncio.Event,
        stop_delay: float = 0,
        duties: Sequence[Callable[[], Coroutine[Any, Any, None]]] = (),
    ) -> None:
        super().__init__(config)
        self._services = services
        self._stopping = stopping
        self._stop_delay = stop_delay
        self._duties = duties
        self._tasks: list[asyncio.Task[None]] = []
        for service in services:
            service.listeners.state = self.server_state

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        del sockets  # the services have their own
        await super().startup(sockets=[])
        for service in self._services:
            service.listeners.app_state = self.lifespan.state
        work = [*(service.open for service in self._services), *self._duties]
        self._tasks = [asyncio.create_task(each()) for each in work]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        del sockets
        self._stopping.set()
        await asyncio.sleep(self._stop_delay)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for service in self._services:
            service.listeners.close()
        await super().shutdown(sockets=[])
        for service in self._services:
            await service.listeners.end_connections()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Uvicorn would raise the signal again once it has stopped in order; the status is 0 instead."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        super().handle_exit(sig, frame)
