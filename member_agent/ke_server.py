"""TCP around `nts_core.tls` and `nts_core.ke`: one deadline a connection, slots shared among peers, counters."""

import asyncio
import contextlib
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from member_agent.config import Limits
from member_agent.sockets import Endpoint, bound_endpoint
from nts_core.acceptor import Acceptor
from nts_core.aead import SUPPORTED, AeadId
from nts_core.cookies import Keyring
from nts_core.errors import TlsError
from nts_core.ke import KeReply, KeServer, KeTerms, NtpService
from nts_core.ratelimit import Cap, RateLimiter, Slots
from nts_core.shell import affordable_connections
from nts_core.tls import NamedCredentials, ServerCredentials, TlsChannel

# The whole exchange, TLS included. chrony allows 2 s, ntpd-rs 1 s; mobile networks need more than either.
DEADLINE = 5.0
# For the peer's close after our answer.
LINGER = 1.0
# All that a peer may send, TLS included: a request of 16 KiB and a large ClientHello fit several times.
MAX_RECEIVED = 64 * 1024
# Descriptors that connections leave to the rest of the agent: NTP, files, the registry, port 80.
RESERVED_DESCRIPTORS = 64
_READ = 16 * 1024
# After these there is nothing that the peer would have to read yet.
_UNSAID = ("tls-timeout", "connection-lost")

_log = structlog.get_logger()

# Counters that count something else than a connection that came.
_ERRORS = ("accept-error", "no-descriptor")
# Connections come in bursts: at once as many as the cap allows in so many seconds.
_CAP_AT_ONCE = 6.0

# What NTP service belongs to a connection that came in on a local address, and was shown a certificate of these names.
ServiceAt = Callable[[str, tuple[str, ...]], NtpService]


def connections(counters: Counter[str]) -> int:
    """Connections that came and have ended, or got no slot."""
    return counters.total() - sum(counters[name] for name in _ERRORS)


class KeListeners:
    """The NTS-KE sockets of one engine. Credentials and keyring may be replaced at any time: connections
    under way finish with what they began with.
    """

    def __init__(
        self,
        credentials: ServerCredentials | NamedCredentials,
        keyring: Keyring,
        limits: Limits,
        preference: tuple[AeadId, ...] = SUPPORTED,
    ) -> None:
        self.credentials = credentials
        self.keyring = keyring
        self._preference = preference
        self.counters: Counter[str] = Counter()
        self.slots = Slots(
            affordable_connections(limits.ke_connections, RESERVED_DESCRIPTORS),
            per_address=limits.ke_connections_per_address,
            per_prefix=limits.ke_connections_per_48,
        )
        self._access = limits.access()
        self._limiter = (
            RateLimiter(round(limits.ke_interval * 1e9), limits.ke_burst, secrets.token_bytes)
            if limits.ke_interval
            else None
        )
        self._cap = Cap(limits.ke_per_minute / 60, _CAP_AT_ONCE) if limits.ke_per_minute else None
        self._services: dict[socket.socket, ServiceAt] = {}
        self._acceptor = Acceptor(self._refuse, self._begin, self.counters)
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def endpoints(self) -> list[Endpoint]:
        return [bound_endpoint(sock) for sock in self._services]

    def listen(self, sock: socket.socket, ntp: ServiceAt) -> None:
        """Answer on a bound socket; `ntp` tells where NTP is for clients of a local address."""
        self._services[sock] = ntp
        self._acceptor.listen(sock)

    def leave(self, sock: socket.socket) -> None:
        """Close a socket; connections that came by it go on."""
        del self._services[sock]
        self._acceptor.leave(sock)

    async def close(self) -> None:
        """Stop listening, and end what is under way."""
        self._acceptor.close()
        self._services.clear()
        # A task that is cancelled before it begins would never give back what it was made with.
        await asyncio.sleep(0)
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _begin(self, connection: socket.socket, address: bytes, listener: socket.socket) -> None:
        attend = self._attend(connection, address, self._services[listener])
        task = asyncio.get_running_loop().create_task(attend)
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    def _refuse(self, address: bytes) -> str | None:
        """Take a slot for the address, or tell why it gets none."""
        if self._access is not None and not self._access.allows(address):
            return "denied"
        if self._limiter is not None and not self._limiter.take(address, time.monotonic_ns()):
            return "rate-limited"
        refused = self.slots.take(address)
        if refused is None and self._cap is not None and not self._cap.take(time.monotonic_ns()):
            self.slots.give_back(address)
            return "over-cap"
        return refused

    async def _attend(self, connection: socket.socket, address: bytes, ntp: ServiceAt) -> None:
        try:
            try:
                reader, writer = await asyncio.open_connection(sock=connection, limit=_READ)
            except BaseException:
                connection.close()
                raise
            try:
                writer.transport.set_write_buffer_limits(high=_READ)
                outcome = await self._serve(ntp, reader, writer)
                self.counters[outcome] += 1
                if outcome not in _UNSAID:
                    await _linger(reader, writer)
            finally:
                # Not close(), which waits for a peer that never reads, without a slot and without a deadline.
                writer.transport.abort()
        finally:
            self.slots.give_back(address)

    async def _serve(self, ntp: ServiceAt, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        session: _Session | None = None
        try:
            keyring, local = self.keyring, writer.get_extra_info("sockname")[0]
            session = _Session(
                self.credentials.channel(),
                lambda names: KeTerms(keyring, ntp(local, names), self._preference),
            )
            return await _within_deadline(session, reader, writer)
        except Exception:  # noqa: BLE001 - the root of a connection's task
            # Whatever it is, it is our own fault, and the client has to be told so.
            _log.exception("key_establishment_failed")
            if session is not None and session.channel.established:
                return _finish(session.channel, KeServer.internal_error(), writer)
            return "internal-error"


@dataclass(slots=True)
class _Session:
    """One connection: its TLS, and from the handshake on, when it is known who is asked for, what it is given."""

    channel: TlsChannel
    terms: Callable[[tuple[str, ...]], KeTerms]
    _ke: KeServer | None = None

    @property
    def ke(self) -> KeServer:
        if self._ke is None:
            terms = self.terms(self.channel.names)
            self._ke = KeServer(terms, self.channel.export, secrets.token_bytes)
        return self._ke


async def _within_deadline(
    session: _Session, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> str:
    channel = session.channel
    try:
        async with asyncio.timeout(DEADLINE):
            return await _converse(session, reader, writer)
    except TimeoutError:
        return _finish(channel, KeServer.timeout(), writer) if channel.established else "tls-timeout"
    except TlsError:
        return "tls-failed"
    except OSError:
        return "connection-lost"


async def _converse(session: _Session, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
    channel = session.channel
    received = 0
    while True:
        octets = await reader.read(_READ)
        if not octets:
            return _cut_short(channel, writer)
        received += len(octets)
        if received > MAX_RECEIVED:
            return "too-long"
        try:
            plaintext = channel.receive(octets)
            reply = session.ke.receive(plaintext) if plaintext else None
        finally:
            # Also on failure: the client then gets the alert that says why.
            writer.write(channel.to_send())
        if reply is not None:
            return _finish(channel, reply, writer)
        if channel.closed_by_peer:
            return _cut_short(channel, writer)
        await writer.drain()


def _cut_short(channel: TlsChannel, writer: asyncio.StreamWriter) -> str:
    return _finish(channel, KeServer.cut_short(), writer) if channel.established else "connection-lost"


def _finish(channel: TlsChannel, reply: KeReply, writer: asyncio.StreamWriter) -> str:
    """The answer in one write, with the close_notify that section 4 asks for behind it; its outcome."""
    channel.send(reply.octets)
    channel.close()
    writer.write(channel.to_send())
    return reply.outcome


async def _linger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Wait for the peer to close: closing over unread octets would reset our answer away on its way."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(LINGER):
            writer.write_eof()
            while await reader.read(_READ):
                pass
