"""TCP around `nts_core.tls` and `nts_core.ke`: one deadline a connection, a cap on connections, counters."""

import asyncio
import contextlib
import secrets
import socket
from collections import Counter
from collections.abc import Callable
from functools import partial

from member_agent.sockets import Endpoint, bind, bound_endpoint
from nts_core.aead import SUPPORTED, AeadId
from nts_core.cookies import Keyring
from nts_core.errors import TlsError
from nts_core.ke import KeReply, KeServer, KeTerms, NtpService
from nts_core.tls import ServerCredentials, TlsChannel

# The whole exchange, TLS included. chrony allows 2 s, ntpd-rs 1 s; mobile networks need more than either.
DEADLINE = 5.0
# For the peer's close after our answer.
LINGER = 1.0
# Idle and slow peers cost a slot for the deadline and no more; ntpd-rs has 512 slots.
MAX_CONNECTIONS = 1024
_BACKLOG = 512
_READ = 16 * 1024


# What NTP service belongs to a connection that came in on a local address.
ServiceAt = Callable[[str], NtpService]


class KeListeners:
    """The NTS-KE sockets of one engine. Credentials and keyring may be replaced at any time: connections
    under way finish with what they began with.
    """

    def __init__(
        self, credentials: ServerCredentials, keyring: Keyring, preference: tuple[AeadId, ...] = SUPPORTED
    ) -> None:
        self.credentials = credentials
        self.keyring = keyring
        self._preference = preference
        self.counters: Counter[str] = Counter()
        self.connections = 0
        self._servers: list[asyncio.Server] = []
        self.endpoints: list[Endpoint] = []

    def bind(self, endpoint: Endpoint) -> socket.socket:
        """Bind without listening yet: nothing is answered before everything is bound."""
        sock = bind(endpoint, socket.SOCK_STREAM)
        self.endpoints.append(bound_endpoint(sock))
        return sock

    async def listen(self, sock: socket.socket, ntp: ServiceAt) -> None:
        """Answer on a bound socket; `ntp` tells where NTP is for clients of a local address."""
        # asyncio pauses a listener for a second when accept() finds no free descriptor, and goes on.
        accepted = partial(self._accepted, ntp)
        self._servers.append(await asyncio.start_server(accepted, sock=sock, backlog=_BACKLOG))

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        self._servers.clear()

    async def _accepted(
        self, ntp: ServiceAt, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if self.connections >= MAX_CONNECTIONS:
            self.counters["too-many-connections"] += 1
            writer.transport.abort()
            return
        self.connections += 1
        try:
            self.counters[await self._serve(ntp, reader, writer)] += 1
            await _linger(reader, writer)
        finally:
            self.connections -= 1
            writer.close()

    async def _serve(self, ntp: ServiceAt, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        channel = self.credentials.channel()
        local = writer.get_extra_info("sockname")[0]
        terms = KeTerms(self.keyring, ntp(local), self._preference)
        ke = KeServer(terms, channel.export, secrets.token_bytes)
        try:
            async with asyncio.timeout(DEADLINE):
                return await _converse(channel, ke, reader, writer)
        except TimeoutError:
            if not channel.established:
                return "tls-timeout"
            reply = ke.timeout()
            _finish(channel, reply, writer)
            return reply.outcome
        except TlsError:
            return "tls-failed"
        except OSError:
            return "connection-lost"


async def _converse(
    channel: TlsChannel, ke: KeServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> str:
    while True:
        octets = await reader.read(_READ)
        if not octets:
            return "connection-lost"
        try:
            plaintext = channel.receive(octets)
            reply = ke.receive(plaintext) if plaintext else None
        finally:
            # Also on failure: the client then gets the alert that says why.
            writer.write(channel.to_send())
        if reply is not None:
            _finish(channel, reply, writer)
            await writer.drain()
            return reply.outcome
        if channel.closed_by_peer:
            return "connection-lost"
        await writer.drain()


def _finish(channel: TlsChannel, reply: KeReply, writer: asyncio.StreamWriter) -> None:
    """The answer in one write, with the close_notify that section 4 asks for behind it."""
    channel.send(reply.octets)
    channel.close()
    writer.write(channel.to_send())


async def _linger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Wait for the peer to close: closing over unread octets would reset our answer away on its way."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(LINGER):
            writer.write_eof()
            while await reader.read(_READ):
                pass
