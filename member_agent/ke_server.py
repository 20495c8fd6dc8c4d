"""TCP around `nts_core.tls` and `nts_core.ke`: one deadline a connection, slots shared among peers, counters.

Connections are accepted here and not by asyncio's server, because what a connection costs is decided before it has
a transport, and because asyncio (3.11) logs hundreds of lines for one accept() that finds no free descriptor.
"""

import asyncio
import contextlib
import errno
import secrets
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable

import structlog

from member_agent.config import Limits
from member_agent.sockets import Endpoint, bind, bound_endpoint, packed
from nts_core.aead import SUPPORTED, AeadId
from nts_core.cookies import Keyring
from nts_core.errors import TlsError
from nts_core.ke import KeReply, KeServer, KeTerms, NtpService
from nts_core.ratelimit import RateLimiter, Slots
from nts_core.shell import affordable_connections
from nts_core.tls import ServerCredentials, TlsChannel

# The whole exchange, TLS included. chrony allows 2 s, ntpd-rs 1 s; mobile networks need more than either.
DEADLINE = 5.0
# For the peer's close after our answer.
LINGER = 1.0
# All that a peer may send, TLS included: a request of 16 KiB and a large ClientHello fit several times.
MAX_RECEIVED = 64 * 1024
# Descriptors that connections leave to the rest of the agent: NTP, files, the registry, port 80.
RESERVED_DESCRIPTORS = 64
_BACKLOG = 512
# Connections accepted before NTP gets its turn.
_BATCH = 64
_READ = 16 * 1024
# Until the next look when there was no descriptor for a connection.
_PAUSE = 0.1
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
# A close that sends a reset: nothing is left to wait for in the kernel.
_ABORT = struct.pack("ii", 1, 0)
# After these there is nothing that the peer would have to read yet.
_UNSAID = ("tls-timeout", "connection-lost")

_log = structlog.get_logger()

# What NTP service belongs to a connection that came in on a local address.
ServiceAt = Callable[[str], NtpService]


class KeListeners:
    """The NTS-KE sockets of one engine. Credentials and keyring may be replaced at any time: connections
    under way finish with what they began with.
    """

    def __init__(
        self,
        credentials: ServerCredentials,
        keyring: Keyring,
        limits: Limits,
        preference: tuple[AeadId, ...] = SUPPORTED,
    ) -> None:
        self.credentials = credentials
        self.keyring = keyring
        self._preference = preference
        self.counters: Counter[str] = Counter()
        self.endpoints: list[Endpoint] = []
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
        self._listening: dict[socket.socket, ServiceAt] = {}
        self._pauses: dict[socket.socket, asyncio.TimerHandle] = {}
        self._connections: set[asyncio.Task[None]] = set()

    def bind(self, endpoint: Endpoint) -> socket.socket:
        """Bind without listening yet: nothing is answered before everything is bound."""
        sock = bind(endpoint, socket.SOCK_STREAM)
        self.endpoints.append(bound_endpoint(sock))
        return sock

    def listen(self, sock: socket.socket, ntp: ServiceAt) -> None:
        """Answer on a bound socket; `ntp` tells where NTP is for clients of a local address."""
        sock.listen(_BACKLOG)
        self._listening[sock] = ntp
        asyncio.get_running_loop().add_reader(sock, self._accept, sock)

    async def close(self) -> None:
        """Stop listening, and end what is under way."""
        for pause in self._pauses.values():
            pause.cancel()
        for sock in self._listening:
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()
        self._pauses.clear()
        self._listening.clear()
        # A task that is cancelled before it begins would never give back what it was made with.
        await asyncio.sleep(0)
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, sock: socket.socket) -> None:
        for _ in range(_BATCH):
            try:
                connection, peer = sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _OUT_OF_RESOURCES:
                    self.counters["no-descriptor"] += 1
                    self._pause(sock)
                    return
                # accept(2): errors of the network on that connection, which is gone.
                self.counters["accept-error"] += 1
                continue
            address = packed(sock.family, peer)
            refused = self._refuse(address)
            if refused is None:
                attend = self._attend(connection, address, self._listening[sock])
                task = asyncio.get_running_loop().create_task(attend)
                self._connections.add(task)
                task.add_done_callback(self._connections.discard)
            else:
                self.counters[refused] += 1
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
                connection.close()

    def _refuse(self, address: bytes) -> str | None:
        """Take a slot for the address, or tell why it gets none."""
        if self._access is not None and not self._access.allows(address):
            return "denied"
        if self._limiter is not None and not self._limiter.take(address, time.monotonic_ns()):
            return "rate-limited"
        return self.slots.take(address)

    def _pause(self, sock: socket.socket) -> None:
        """Leave the socket alone for a moment: it stays readable, and the loop would spin."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(sock)

        def resume() -> None:
            del self._pauses[sock]
            loop.add_reader(sock, self._accept, sock)

        self._pauses[sock] = loop.call_later(_PAUSE, resume)

    async def _attend(self, connection: socket.socket, address: bytes, ntp: ServiceAt) -> None:
        try:
            connection.setblocking(False)
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
        channel: TlsChannel | None = None
        ke: KeServer | None = None
        try:
            channel = self.credentials.channel()
            local = writer.get_extra_info("sockname")[0]
            ke = KeServer(
                KeTerms(self.keyring, ntp(local), self._preference), channel.export, secrets.token_bytes
            )
            return await _within_deadline(channel, ke, reader, writer)
        except Exception:  # noqa: BLE001 - the root of a connection's task
            # Whatever it is, it is our own fault, and the client has to be told so.
            _log.exception("key_establishment_failed")
            if channel is not None and ke is not None and channel.established:
                return _finish(channel, ke.internal_error(), writer)
            return "internal-error"


async def _within_deadline(
    channel: TlsChannel, ke: KeServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> str:
    try:
        async with asyncio.timeout(DEADLINE):
            return await _converse(channel, ke, reader, writer)
    except TimeoutError:
        return _finish(channel, ke.timeout(), writer) if channel.established else "tls-timeout"
    except TlsError:
        return "tls-failed"
    except OSError:
        return "connection-lost"


async def _converse(
    channel: TlsChannel, ke: KeServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> str:
    received = 0
    while True:
        octets = await reader.read(_READ)
        if not octets:
            return _cut_short(channel, ke, writer)
        received += len(octets)
        if received > MAX_RECEIVED:
            return "too-long"
        try:
            plaintext = channel.receive(octets)
            reply = ke.receive(plaintext) if plaintext else None
        finally:
            # Also on failure: the client then gets the alert that says why.
            writer.write(channel.to_send())
        if reply is not None:
            return _finish(channel, reply, writer)
        if channel.closed_by_peer:
            return _cut_short(channel, ke, writer)
        await writer.drain()


def _cut_short(channel: TlsChannel, ke: KeServer, writer: asyncio.StreamWriter) -> str:
    return _finish(channel, ke.cut_short(), writer) if channel.established else "connection-lost"


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
