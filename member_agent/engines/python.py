"""Packets in Python: in this process and, where one core is not enough, in workers like it."""

import asyncio
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from member_agent.clock import Clock
from member_agent.config import AgentSettings, PacketEngine
from member_agent.engines.serving import Charge, Counts, PemPair, Place, Protocol, Server
from member_agent.engines.workers import ClockOrders, Crew, Orders
from nts_core.cookies import Keyring

# Octets of datagrams that wait while this process does something else. Native packets do with what sockets have: they are
# quick, and what waits for long is of no use to a client.
_RECEIVE_BUFFER = 4 * 1024 * 1024


class PythonPackets:
    """As `packets.Packets`; this process has the first socket of each place."""

    name = PacketEngine.PYTHON

    def __init__(self, settings: AgentSettings, clock: Clock, keyring: Keyring) -> None:
        self._clock = clock
        charge = Charge.of(settings)
        self._server = Server(charge, clock, keyring)
        self._crew = Crew(settings.workers - 1, Orders(charge, self._clock_orders(), keyring))

    def check(self, pair: PemPair) -> None:
        """What TLS has a use for, OpenSSL has."""

    async def use_pairs(self, pairs: Mapping[str, PemPair]) -> None:
        self._server.use_credentials({domain: pair.credentials() for domain, pair in pairs.items()})
        await self._crew.follow(replace(self._crew.orders, pairs=pairs))

    def use_keyring(self, keyring: Keyring) -> None:
        self._server.use_keyring(keyring)
        self._crew.tell(replace(self._crew.orders, keyring=keyring))

    def use_clock(self) -> None:
        """Workers have none of their own; this process reads it for each answer."""
        self._crew.tell(replace(self._crew.orders, clock=self._clock_orders()))

    def _clock_orders(self) -> ClockOrders:
        return ClockOrders(self._clock.local_stratum, self._clock.offset_ns, *self._clock.last_heard)

    def listen(self, sockets: Mapping[Place, Sequence[socket.socket]]) -> None:
        for place, shared in sockets.items():
            if place.protocol is Protocol.NTP:
                for sock in shared:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
            self._server.open(place, shared[0])
        self._crew.tell(replace(self._crew.orders, sockets={**self._crew.orders.sockets, **sockets}))

    async def leave(self, places: Collection[Place]) -> None:
        """In the workers first: a place is free when nobody has it."""
        sockets = self._crew.orders.sockets
        kept = {place: shared for place, shared in sockets.items() if place not in places}
        await self._crew.follow(replace(self._crew.orders, sockets=kept))
        for place in places:
            self._server.leave(place)
            for sock in sockets[place][1:]:
                sock.close()

    async def tend(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        await self._crew.close()
        await self._server.close()
        for shared in self._crew.orders.sockets.values():
            for sock in shared[1:]:
                sock.close()

    @property
    def counts(self) -> Counts:
        return self._server.counts + self._crew.counts

    @property
    def workers(self) -> int:
        return 1 + self._crew.alive

    @property
    def restarts(self) -> int:
        return self._crew.restarts
