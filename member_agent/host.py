"""What the servers of one agent share: port 80, port 443, the clock, and the engine that serves them all."""

import asyncio
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import structlog

from member_agent.attend import Attendant
from member_agent.challenges import Responder
from member_agent.clock import Clock
from member_agent.config import AgentSettings
from member_agent.engines import Engine, Service
from member_agent.engines.succession import Succession
from member_agent.errors import AgentError
from member_agent.install import InstalledPair
from member_agent.sockets import Endpoint, is_local
from member_agent.tls_answers import AlpnResponder, ProofResponder

_log = structlog.get_logger()
_WILDCARDS = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}


@dataclass(frozen=True, slots=True)
class Served:
    """What the engine is to serve for one server."""

    pair: InstalledPair
    ke: tuple[Endpoint, ...]
    ntp: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class _Failure:
    """What the engine could not serve, how often that was tried, and until when (monotonic) it is left alone."""

    served: Served
    error: AgentError
    attempts: int
    until: float

    def again(self) -> AgentError:
        return AgentError(self.error.message, self.error.remedy, self.error.status)


class Host:
    """Sockets and engine of one agent. Servers say what they need; what all of them need together is listened on."""

    def __init__(self, settings: AgentSettings, clock: Clock, engine: Engine, succession: Succession) -> None:
        self.clock = clock
        self.engine = engine
        self._succession = succession
        self.http = Responder()
        self.alpn = AlpnResponder()
        self.proofs = ProofResponder()
        self._listen = tuple(map(str, settings.listen))
        self._wanted: dict[Attendant, dict[str, tuple[Endpoint, ...]]] = {
            attendant: {} for attendant in self._attendants
        }
        self._served: dict[str, Served] = {}
        self._failures: dict[str, _Failure] = {}
        # Families of which an address is translated on the way (NAT): once so, always so, as two kinds of sockets would
        # be in each other's way.
        self._translated: set[socket.AddressFamily] = set()
        self._changing = asyncio.Lock()

    @property
    def _attendants(self) -> tuple[Attendant, Attendant, Attendant]:
        return self.http, self.alpn, self.proofs

    def addresses(self, registered: Iterable[str]) -> tuple[str, ...]:
        """Where to listen for a server: on its addresses, or on all of a family where one is not this host's (NAT)."""
        if self._listen:
            return self._listen
        families = {address: Endpoint(address, 0).family for address in registered}
        self._translated |= {family for address, family in families.items() if not is_local(address)}
        return tuple(
            dict.fromkeys(
                _WILDCARDS[family] if family in self._translated else address
                for address, family in families.items()
            )
        )

    async def answer(self, attendant: Attendant, domain: str, endpoints: Sequence[Endpoint]) -> None:
        """Have one of the responders listen for a server there. Raises AgentError."""
        async with self._changing:
            before = self._wanted[attendant]
            self._wanted[attendant] = {**before, domain: tuple(endpoints)}
            try:
                await self._listen_on(attendant)
            except AgentError:
                # Or every other server would want these, too, and fail.
                self._wanted[attendant] = before
                raise

    async def _listen_on(self, attendant: Attendant) -> None:
        wanted = dict.fromkeys(each for some in self._wanted[attendant].values() for each in some)
        if attendant is self.proofs:
            # The engine's certificate is the proof where it serves.
            taken = {each for served in self._served.values() for each in served.ke}
            wanted = dict.fromkeys(each for each in wanted if each not in taken)
        await attendant.listen(*wanted)

    async def serve(self, domain: str, served: Served) -> None:
        """Have the engine serve this for a server; no change costs nothing. Raises AgentError, and what was goes on.

        What failed is tried again when the engine's patience is over, and raises the same error until then.
        """
        async with self._changing:
            if self._served.get(domain) != served:
                await self._try(domain, served)
                _log.info(
                    "serving", domain=domain, ke=list(map(str, served.ke)), ntp=list(map(str, served.ntp))
                )

    async def resume(self, served: Mapping[str, Served]) -> None:
        """Have the engine go on with all that it served in the last run, at once. Raises AgentError."""
        async with self._changing:
            if served:
                await self._apply({**self._served, **served})

    async def _try(self, domain: str, served: Served) -> None:
        failure = self._failures.get(domain)
        if failure is not None and failure.served == served and time.monotonic() < failure.until:
            raise failure.again()
        attempts = failure.attempts if failure is not None and failure.served == served else 0
        try:
            await self._apply({**self._served, domain: served})
        except AgentError as error:
            patience = self.engine.patience
            until = time.monotonic() + patience[min(attempts, len(patience) - 1)]
            self._failures[domain] = _Failure(served, error, attempts + 1, until)
            raise
        self._failures.pop(domain, None)

    async def _apply(self, served: dict[str, Served]) -> None:
        before, self._served = self._served, served
        try:
            await self._listen_on(self.proofs)
            if served:
                await self._succession.begin()
                await self.engine.apply(self._service())
            else:
                await self.engine.remove()
                await self._succession.end()
        except BaseException:
            self._served = before
            raise

    def _service(self) -> Service:
        ke = dict.fromkeys(each for one in self._served.values() for each in one.ke)
        ntp = dict.fromkeys(each for one in self._served.values() for each in one.ntp)
        pairs = {domain: one.pair for domain, one in self._served.items()}
        return Service(pairs, tuple(ke), tuple(ntp))

    async def forget(self, domain: str, *, has_served: bool) -> None:
        """A server has left its pool: nothing here answers for it any more.

        If it `has_served`, in whatever run, a time daemon may have lines for it. Raises AgentError.
        """
        async with self._changing:
            for attendant in self._attendants:
                attendant.forget(domain)
                self._wanted[attendant].pop(domain, None)
                await self._listen_on(attendant)
            left = {name: served for name, served in self._served.items() if name != domain}
            if left != self._served or (has_served and not left):
                await self._apply(left)

    async def close(self) -> None:
        """The agent ends. A driven daemon goes on."""
        for attendant in self._attendants:
            await attendant.close()
        await self.engine.close()
