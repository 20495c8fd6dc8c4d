"""The engine inside the agent: which certificates, cookie keys and sockets there are, swapped while it runs.

All sockets are bound here; what answers on them is one of `packets`.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime

import structlog

from member_agent.clock import Clock
from member_agent.config import AgentSettings
from member_agent.engines import EngineError, Service
from member_agent.engines.packets import packets_of
from member_agent.engines.serving import MOST_PLACES, Counts, PemPair, Place, Protocol
from member_agent.errors import AgentError, ExitStatus
from member_agent.install import InstalledPair, InstallError, load_pair
from member_agent.ke_server import connections
from member_agent.ntp_server import prepare, requests
from member_agent.sockets import Endpoint, bind_shared, bound_endpoint
from member_agent.state import StateDirectory
from nts_core.cookies import Keyring, Schedule
from nts_core.errors import TlsError
from nts_core.shell import until

_log = structlog.get_logger()
# Seconds: the clock that tells when a key's time has come may be set meanwhile.
_LONGEST_SLEEP = 3600.0


class BuiltinEngine:
    """Serves from the first `apply` to `close`."""

    name = "builtin"
    patience: tuple[float, ...] = (0.0,)  # a socket costs nothing

    def __init__(self, clock: Clock, settings: AgentSettings, state: StateDirectory | None) -> None:
        """Cookie keys are kept in `state`; without one they die with the process. Raises AgentError."""
        self._settings = settings
        self._state = state
        self.keyring = self._first_keyring()
        self.clock = clock
        self._packets = packets_of(settings, clock, self.keyring)
        # What is served now: the place that was asked for, which may leave the port open, and the one that is bound.
        self._bound: dict[Place, Place] = {}
        self._pairs: Mapping[str, PemPair] = {}
        self._applying = asyncio.Lock()
        clock.heard = self._packets.use_clock
        _log.info("packets", engine=self.packets, workers=settings.workers)

    def _first_keyring(self) -> Keyring:
        """The keys of the last run under the schedule that holds now, or fresh ones."""
        schedule = Schedule(self._settings.cookie_rotation, self._settings.cookie_history)
        keyring = self._state.keyring() if self._state else None
        if keyring is None:
            keyring = Keyring.new(int(time.time()), secrets.token_bytes, schedule)
            self._save(keyring)
            return keyring
        kept, keyring = keyring, keyring.under(schedule.rotation, schedule.history)
        if keyring.schedule != kept.schedule:
            self._save(keyring)
        if keyring.schedule.rotation != schedule.rotation:
            _log.info("cookie_rotation_is_that_of_the_ratchet", seconds=keyring.schedule.rotation)
        return keyring

    def _save(self, keyring: Keyring) -> None:
        """Before the keyring is used, so that no cookie outlives its key in a crash."""
        if self._state is not None:
            self._state.save_keyring(keyring)

    async def apply(self, service: Service) -> None:
        """Serve this instead of what is served now. On EngineError nothing has changed."""
        async with self._applying:
            pairs = await asyncio.to_thread(_read_pairs, service.pairs, self._packets.check)
            wanted = [Place(Protocol.KE, endpoint) for endpoint in service.ke]
            wanted += [Place(Protocol.NTP, endpoint) for endpoint in service.ntp]
            if len(wanted) > MOST_PLACES:
                raise EngineError(
                    f"{len(wanted)} places to listen on are too many",
                    f"listen on {MOST_PLACES} at most",
                    ExitStatus.CONFIGURATION,
                )
            # Before the places: who waits at a socket that was handed over is answered at once.
            await self._packets.use_pairs(pairs)
            try:
                await self._move(wanted)
            except EngineError:
                await self._packets.use_pairs(self._pairs)
                raise
            self._pairs = pairs

    async def _move(self, wanted: Sequence[Place]) -> None:
        """Listen at these places only. What is new is bound before anything is closed that is not in its way."""
        gone = [place for place in self._bound if place not in wanted]
        fresh = [place for place in dict.fromkeys(wanted) if place not in self._bound]
        blocking = [old for old in gone if any(self._bound[old].is_in_the_way_of(new) for new in fresh)]
        await self._leave(blocking)
        try:
            self._listen(fresh)
        except AgentError as error:
            try:
                self._listen(blocking)
            except AgentError as lost:
                _log.error("listener_lost", detail=lost.message)
            raise EngineError(error.message, error.remedy, error.status) from None
        await self._leave([place for place in gone if place not in blocking])

    def _listen(self, places: Sequence[Place]) -> None:
        """Bind all of them, then answer. Raises AgentError when one cannot be bound."""
        count = self._settings.workers
        with ExitStack() as stack:
            found = {}
            for place in places:
                sockets = bind_shared(place.endpoint, place.kind, count)
                for sock in sockets:
                    stack.enter_context(sock)
                found[place] = sockets
            bound = {
                place: replace(place, endpoint=bound_endpoint(sockets[0])) for place, sockets in found.items()
            }
            for place, sockets in found.items():
                if place.protocol is Protocol.NTP:
                    for sock in sockets:
                        prepare(sock)
            try:
                self._packets.listen({bound[place]: sockets for place, sockets in found.items()})
            except OSError as error:
                raise AgentError(
                    f"cannot answer on {', '.join(str(place.endpoint) for place in bound.values())}: {error}",
                    "pool-agent logs may say more",
                    ExitStatus.CONFIGURATION,
                ) from None
            stack.pop_all()
        self._bound.update(bound)

    async def _leave(self, places: Sequence[Place]) -> None:
        """Close these; the places are free then."""
        if closing := {self._bound.pop(place) for place in places}:
            await self._packets.leave(closing)

    async def close(self) -> None:
        """Answer no more."""
        await self._packets.close()

    async def remove(self) -> None:
        """Serve nothing, until there is something again."""
        await self.apply(Service({}, (), ()))

    @property
    def requests(self) -> int:
        return requests(self.counts.ntp)

    @property
    def ke_requests(self) -> int:
        """NTS-KE connections so far."""
        return connections(self.counts.ke)

    @property
    def counts(self) -> Counts:
        """May be read in another thread."""
        return self._packets.counts

    @property
    def packets(self) -> str:
        """What answers: native or python."""
        return self._packets.name

    @property
    def workers(self) -> int:
        """How many processes, or threads of the native engine, serve now."""
        return self._packets.workers

    @property
    def restarts(self) -> int:
        """How often one of them had to be started again."""
        return self._packets.restarts

    def endpoints(self, protocol: Protocol) -> list[Endpoint]:
        """Where it is served, in the order in which that was asked for."""
        return [place.endpoint for place in self._bound.values() if place.protocol is protocol]

    async def tend(self) -> None:
        """Change cookie keys when their time has come, and keep what answers up to date, for ever. Raises AgentError."""
        await until(asyncio.Event(), *map(asyncio.create_task, (self._rotate(), self._packets.tend())))

    async def _rotate(self) -> None:
        while True:
            try:
                self.rotate_if_due()
            except AgentError as error:
                # The old key goes on sealing; a full disk must not stop the service.
                _log.error("cookie_key_not_saved", detail=error.message)
            await asyncio.sleep(min(self.seconds_to_rotation(), _LONGEST_SLEEP))

    def rotate_if_due(self) -> None:
        """Seal with the key that was made ahead once its time has come, and make the next."""
        rotated = self.keyring.at(int(time.time()), secrets.token_bytes)
        if rotated is self.keyring:
            return
        self._save(rotated)
        self.keyring = rotated
        self._packets.use_keyring(rotated)

    def seconds_to_rotation(self) -> float:
        return max(1.0, self.keyring.next_at - time.time())


def _read_pairs(pairs: Mapping[str, InstalledPair], check: Callable[[PemPair], None]) -> dict[str, PemPair]:
    """What the files hold now, each pair checked. Raises EngineError."""
    found = {}
    for domain, files in pairs.items():
        try:
            load_pair(files.chain_path, files.key_path)
            pair = PemPair(files.chain_path.read_text("ascii"), files.key_path.read_text("ascii"))
            begins, ends = pair.credentials().validity
            check(pair)
        except InstallError as error:
            raise EngineError(error.message, error.remedy, ExitStatus.CERTIFICATE) from None
        except (OSError, TlsError, ValueError) as error:
            raise _unusable(files, error) from None
        if not begins <= datetime.now(UTC) <= ends:
            # It may be the clock that is wrong, so it is served all the same.
            _log.warning(
                "certificate_not_valid_now", domain=domain, begins=begins.isoformat(), ends=ends.isoformat()
            )
        found[domain] = pair
    return found


def _unusable(files: InstalledPair, error: Exception) -> EngineError:
    return EngineError(
        f"{files.chain_path}, {files.key_path}: {error}",
        "check both files; the key has to be of a kind that TLS uses, such as P-256",
        ExitStatus.CERTIFICATE,
    )
