"""Authenticated time from a pool, for as long as a program wants (asyncio).

    async with PoolClient("pool.example") as pool:
        now = await pool.time()

`membership` says who may be used, `roster` whom to use, `source` asks one server, `panel` finds out who is right. Here
they meet real clocks and files. Nothing touches the system's clock. Who is dismissed, was exchanged or is a member no
longer is replaced at once; a server that is gone is forgotten with its cookies.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Self

from cryptography import x509

from nts_core.authorities import Authorities
from nts_core.bootstrap import Bootstrap, bootstrap
from nts_core.built import BUILT
from nts_core.client import ClientError, Failure, load_roots
from nts_core.denial import Witnesses
from nts_core.independence import Candidate, GivenUp
from nts_core.kernel import steady_ns
from nts_core.membership import MAX_RETRY, MIN_LOOK, Denier, Look, Membership
from nts_core.panel import BURST, Failing, Panel, Reading, Seat, Standing
from nts_core.resolve import ROOT, Lookup, Proof, ResolveError, Resolver, Resolvers, system_resolvers
from nts_core.roster import Fault, Hold, Roster, shifted
from nts_core.session import CertificateTime, Phase, Stop
from nts_core.source import INTERVAL, CertificateCheck, Source, SystemClock
from nts_core.srv import MAX_TARGETS
from nts_core.store import PoolFile, TimeRecord

COUNT = 4
# How long a sample counts: in polls, and in seconds at least.
_LIFE, _MIN_LIFE = 10, 600.0
_SECOND = 1_000_000_000
# A clock so little before a time that was recorded may have been set a bit; nothing checked by it is worth less for that.
_A_LITTLE = 600 * _SECOND
# How many that have left the pool are named.
_DEPARTED = 8
_FAILING = {
    Failure.NTP: Failing.POLL,
    Failure.KISS: Failing.POLL,
    Failure.UNSYNCHRONISED: Failing.POLL,
    Failure.TLS: Failing.KEYS,
    Failure.CERTIFICATE: Failing.KEYS,
    Failure.KE: Failing.KEYS,
}
_FLOOR = "certificates were accepted as of any time since the last recorded one: this machine's clock is not known to be right"
_STINGY = ClientError(Failure.KE, "it gives no cookies with its answers")
_AT_ONCE = frozenset({Failing.POLL, Failing.REFUSED})


@dataclass(frozen=True, slots=True)
class SourceView:
    """One source now, or as it was when it was dismissed: then there is a `hold`, until so many seconds from now.

    Offset (to the system's clock) and delay are in nanoseconds, `next_in` in seconds. `is_listed`: the pool's newest
    answer names it; a member of a large pool need not be in it.
    """

    candidate: Candidate
    address: str | None = None
    standing: Standing = Standing.PENDING
    offset: int | None = None
    delay: int | None = None
    samples: int = 0
    next_in: float | None = None
    is_listed: bool = False
    trouble: str = ""
    hold: Hold | None = None


@dataclass(frozen=True, slots=True)
class PoolView:
    """A pool as its client sees it now.

    `held` are held back. Of `unusable` ones the zone does not say enough. `problem` is what the last look at DNS could
    not find out; the next look is in `look_in` seconds. `departed` were sources and are members no longer, the last
    ones by name. `membership` is how it is proved who is a member, None before anybody was found. `is_settled`: nobody is left to be asked now.
    """

    pool: str
    sources: tuple[SourceView, ...]
    held: tuple[SourceView, ...]
    unusable: Mapping[str, str]
    given_up: tuple[GivenUp, ...]
    reading: Reading | None
    problem: ResolveError | None
    look_in: float
    is_settled: bool
    warnings: tuple[str, ...]
    departed: tuple[str, ...] = ()
    membership: Proof | None = None
    shortcuts: tuple[str, ...] = ()

    @property
    def truechimers(self) -> int:
        return sum(source.standing is Standing.TRUECHIMER for source in self.sources)


@dataclass(slots=True)
class _Member:
    """A source at work."""

    candidate: Candidate
    source: Source
    task: asyncio.Task[None] | None = None
    is_gone: bool = False


class PoolClient:
    """Keeps `count` independent sources of a pool while the context lasts.

    `lookup` finds the members and `denier` confirms who is gone; by default both ask the system's resolvers, and
    what these say is validated from the root; if none is of use, the zones' own servers are asked. `roots` (by default the system's) are trusted for certificates.
    `interval` between polls is in seconds. With `state`, a directory, a later run goes on with the same sources and
    their cookies. Raises ClientError for what can never be used.
    """

    def __init__(
        self,
        pool: str,
        *,
        count: int = COUNT,
        lookup: Lookup | None = None,
        denier: Denier | None = None,
        roots: Sequence[x509.Certificate] | None = None,
        state: Path | None = None,
        interval: float = INTERVAL,
        check: CertificateCheck = CertificateCheck.AUTO,
        clock: SystemClock | None = None,
    ) -> None:
        if not 1 <= count <= MAX_TARGETS:
            raise ClientError(
                Failure.CONFIGURATION,
                f"a count of {count} is out of range",
                f"give 1 to {MAX_TARGETS} sources",
            )
        if lookup is None or denier is None:
            found = _system_resolvers()
            asked = [Resolver(address, 53, ROOT) for address in found]
            lookup = lookup or Resolvers(asked, Authorities(ROOT))
            denier = denier or Witnesses([(address, 53) for address in found])
        self._lookup = lookup
        self._membership = Membership(pool, lookup, denier)
        self._count = count
        self._roots = tuple(load_roots(None) if roots is None else roots)
        self._state = state
        self._interval = interval
        self._check = check
        self._system_clock = clock or SystemClock()
        # What the sources agree on is better than the system's clock, for certificates and signatures too.
        self._clock = SystemClock(self._unix, self._is_sure)
        self._roster = Roster(count)
        self._panel = Panel(count, round(max(_MIN_LIFE, _LIFE * interval) * _SECOND))
        self._bootstrap: Bootstrap | None = None
        # Seconds until it is tried again.
        self._bootstrap_retry = MIN_LOOK
        # Somebody's certificate is not good at this machine's time.
        self._has_misdated = False
        # The truth minus the clock that is never set, once there was a majority.
        self._truth: int | None = None
        self._members: dict[str, _Member] = {}
        # Of those that are held back, what was seen last.
        self._left: dict[str, SourceView] = {}
        self._file: PoolFile | None = None
        self._listed: frozenset[str] = frozenset()
        self._unusable: Mapping[str, str] = {}
        self._problem: ResolveError | None = None
        self._look_at = 0.0
        self._proof: Proof | None = None
        self._departed: deque[str] = deque(maxlen=_DEPARTED)
        self._warnings: list[str] = []
        self._is_begun = False
        self._wake = asyncio.Event()
        self._changed = asyncio.Condition()
        self._version = 0
        self._runner: asyncio.Task[None] | None = None

    @property
    def pool(self) -> str:
        """The pool's name, lower-case and without its last dot."""
        return self._membership.pool

    async def __aenter__(self) -> Self:
        """Begin. Raises ClientError when the state cannot be used, or another process uses it."""
        if self._state is not None:
            self._file = PoolFile.open(self._state, self.pool)
            used, holds, self._proof, fault = self._file.load(self._unix())
            self._roster = Roster(self._count, shifted(holds, time.monotonic()))
            self._roster.resume(used, time.monotonic())
            self._warnings += [] if fault is None else [fault]
        self._runner = asyncio.create_task(self._run(), name=f"the sources of {self.pool}")
        return self

    async def __aexit__(self, *_: object) -> None:
        """End, and keep what a later run can go on with."""
        try:
            if self._runner is not None:
                self._runner.cancel()
                await asyncio.wait({self._runner})
        finally:
            if self._file is not None:
                self._keep()
                self._file.close()

    # What a program asks

    async def time(self, timeout: float = 30.0) -> datetime:
        """The time now, as `reading` has it."""
        return (await self.reading(timeout)).time

    async def reading(self, timeout: float = 30.0) -> Reading:
        """What more than half of the wanted sources agree on. Waits no longer than somebody is left to be asked.

        Raises ClientError, whose message says of each source why it does not count.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                async for view in self.views():
                    if view.reading is not None:
                        return view.reading
                    if view.is_settled:
                        break
        raise shortage(self.view(), self._panel.quorum)

    async def settled(self, timeout: float = 60.0) -> PoolView:
        """The view once as many as wanted agree, or nobody is left to be asked; else what there is at the deadline."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                async for view in self.views():
                    if view.is_settled:
                        return view
        return self.view()

    async def views(self, every: float | None = None) -> AsyncIterator[PoolView]:
        """The view now, and again whenever something has changed, or after so many seconds. Raises what has ended the client."""
        seen = -1
        while not self._has_ended:
            with suppress(TimeoutError):
                async with asyncio.timeout(every), self._changed:
                    while self._version == seen and not self._has_ended:
                        await self._changed.wait()
            seen = self._version
            yield self.view()
        if self._runner is not None:
            await self._runner

    def view(self) -> PoolView:
        """Everything as it is now."""
        now, warnings = time.monotonic(), list(self._warnings)
        self._panel.judge(*_clocks())
        for member in self._members.values():
            warnings += member.source.warnings
        return PoolView(
            pool=self.pool,
            sources=tuple(
                self._view_of(member, self._panel.seats[name]) for name, member in self._members.items()
            ),
            held=tuple(
                replace(self._left.get(name) or SourceView(Candidate(name)), hold=hold, trouble=hold.reason)
                for name, hold in shifted(self._roster.held(now), -now).items()
            ),
            unusable=self._unusable,
            given_up=self._roster.given_up,
            reading=self._panel.reading(steady_ns()),
            problem=self._problem,
            look_in=max(0.0, self._look_at - now),
            is_settled=self._is_settled(now),
            warnings=tuple(dict.fromkeys(warnings)),
            departed=tuple(self._departed),
            membership=self._proof,
            shortcuts=self._shortcuts,
        )

    @property
    def _shortcuts(self) -> tuple[str, ...]:
        """What was first believed without a known time."""
        used = [member.source.credentials for member in self._members.values()]
        has_floor = any(each is not None and each.certificate_time is CertificateTime.FLOOR for each in used)
        return (
            *(() if self._bootstrap is None else self._bootstrap.shortcuts),
            *((_FLOOR,) if has_floor else ()),
        )

    def _view_of(self, member: _Member, seat: Seat) -> SourceView:
        best, action = seat.best(*_clocks()), member.source.action
        return SourceView(
            candidate=member.candidate,
            address=member.source.address,
            standing=seat.standing,
            offset=None if best is None else best.offset,
            delay=None if best is None else best.delay,
            samples=seat.samples,
            next_in=None if isinstance(action, Stop) else max(0, action.at - time.monotonic_ns()) / _SECOND,
            is_listed=member.candidate.name in self._listed,
            trouble=seat.trouble,
        )

    @property
    def _has_ended(self) -> bool:
        return self._runner is None or self._runner.done()

    def _is_settled(self, now: float) -> bool:
        return self._is_begun and self._has_nobody_left(now) and not self._is_misdated

    def _has_nobody_left(self, now: float) -> bool:
        return not self._panel.is_waiting and not self._roster.has_choice(now)

    # The life of the client

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    await self._look()
                    while (now := time.monotonic()) < self._look_at:
                        await self._after_misdated()
                        self._fill(tasks, now)
                        await self._tell()
                        await self._rest(now)
        finally:
            await self._tell()

    async def _rest(self, now: float) -> None:
        """Until the next look is due, or there may be something to do before."""
        until = min(self._look_at, self._roster.next_release(now) or self._look_at)
        with suppress(TimeoutError):
            async with asyncio.timeout(until - now):
                await self._wake.wait()
        self._wake.clear()

    async def _tell(self) -> None:
        """Whoever reads the views gets this one."""
        self._version += 1
        async with self._changed:
            self._changed.notify_all()

    async def _look(self) -> None:
        """Who is a member now."""
        found = await self._find_members()
        now = time.monotonic()
        if found.problem is None and self._problem is not None:
            # The network is back: what failed without it says nothing.
            self._roster.release(Fault.UNREACHED)
        self._problem, self._look_at = found.problem, now + found.again_in
        self._roster.known(found.others)
        here = {candidate.name for candidate in (*found.listed, *found.others)}
        self._departed = deque((name for name in self._departed if name not in here), _DEPARTED)
        if found.listed or found.problem is None:
            self._roster.listed(found.listed)
            self._listed = frozenset(candidate.name for candidate in found.listed)
            self._unusable = found.unusable
        if found.proof is not None:
            self._proof = found.proof
        for candidate in self._roster.gone(found.gone):
            self._departed.append(candidate.name)
            if (member := self._members.get(candidate.name)) is None:
                await self._forget(candidate)
            else:
                member.is_gone = True
                self._stop(candidate.name)

    async def _find_members(self) -> Look:
        """Strictly at this machine's time, unless that is certainly wrong, or the signatures say that it may be."""
        problem: ResolveError | None = None
        if self._is_lost and self._system_clock.now() < _unix_ns(self._floor()) - _A_LITTLE:
            problem = await self._find_time("this machine's clock is before the last time that is known")
            if problem is not None:
                return self._timeless(problem)
        found = await self._membership.look(self._roster.used, self._unix() / _SECOND)
        if found.problem is None or found.problem.code != "expired" or not self._is_lost:
            return found
        problem = await self._find_time(found.problem.message)
        if problem is not None:
            return self._timeless(problem)
        return await self._membership.look(self._roster.used, self._unix() / _SECOND)

    def _timeless(self, problem: ResolveError) -> Look:
        """Nothing can be looked up; the pool's servers are not asked again soon."""
        again_in, self._bootstrap_retry = self._bootstrap_retry, min(2 * self._bootstrap_retry, MAX_RETRY)
        return Look(problem=problem, again_in=again_in)

    @property
    def _is_lost(self) -> bool:
        """Whether the time may be looked for in other ways than the strict one."""
        return not self._is_sure() and self._check is CertificateCheck.AUTO

    def _floor(self) -> datetime:
        """What is certainly past."""
        if self._state is None:
            return BUILT
        floor, fault = TimeRecord(self._state).floor()
        self._warnings = list(dict.fromkeys((*self._warnings, *(() if fault is None else (fault,)))))
        return floor

    async def _find_time(self, why: str) -> ResolveError | None:
        """Get the time from the pool; what is then looked up is looked up at that time. Returns why there is none."""
        try:
            self._bootstrap = await bootstrap(self.pool, self._lookup, self._roots, self._floor())
        except ClientError as error:
            return ResolveError(
                Failure.CLOCK, f"{why}; the time cannot be had from the pool: {error.message}", error.remedy
            )
        self._truth = self._bootstrap.truth
        return None

    @property
    def _is_misdated(self) -> bool:
        """Whether certificates that are not good now may be so because the clock is wrong."""
        return self._has_misdated and self._is_lost and self._panel.reading(steady_ns()) is None

    async def _after_misdated(self) -> None:
        """Once nobody else is left to be asked, the time is looked for."""
        if self._is_misdated and self._has_nobody_left(time.monotonic()):
            self._problem = await self._find_time("certificates are not good at this machine's time")
            if self._problem is None:
                self._roster.release(Fault.UNREACHABLE)
            self._has_misdated = False

    def _fill(self, tasks: asyncio.TaskGroup, now: float) -> None:
        """Every place has its source."""
        self._roster.choose(now)
        if self._is_begun and self._is_settled(now) and (exchanged := self._roster.exchange(now)) is not None:
            self._stop(exchanged[0].name)
        for candidate in self._roster.used:
            if candidate.name not in self._members:
                self._start(tasks, candidate)
        self._is_begun = True

    async def _forget(self, candidate: Candidate) -> None:
        """What an earlier run has kept of a server."""
        with suppress(ClientError):
            async with self._source(candidate) as source:
                source.forget()

    def _source(self, candidate: Candidate) -> Source:
        return Source(
            candidate.name,
            candidate.port,
            self._roots,
            addresses=candidate.addresses,
            state=self._state,
            check=self._check,
            interval=0,
            clock=self._clock,
            must_keep=False,
        )

    def _start(self, tasks: asyncio.TaskGroup, candidate: Candidate) -> None:
        member = self._members[candidate.name] = _Member(candidate, self._source(candidate))
        self._panel.seat(candidate.name, steady_ns())
        member.task = tasks.create_task(self._follow(member), name=candidate.name)
        self._keep()

    def _stop(self, name: str) -> None:
        member = self._members.pop(name)
        self._panel.leave(name)
        if member.task is not None and member.task is not asyncio.current_task():
            member.task.cancel()
        self._keep()
        self._wake.set()

    async def _follow(self, member: _Member) -> None:
        """One source for as long as it is one."""
        try:
            async with member.source as source:
                try:
                    while self._is_used(member):
                        await self._ask(member)
                finally:
                    if member.is_gone:
                        source.forget()
        except ClientError as error:
            # What is kept of it cannot be used.
            self._failed(member, Failing.CONTACT, error)
            await self._tell()

    def _is_used(self, member: _Member) -> bool:
        return self._members.get(member.candidate.name) is member

    async def _ask(self, member: _Member) -> None:
        """The next thing that is due at a source, and what follows from it."""
        source, name = member.source, member.candidate.name
        try:
            sample = await source.next()
        except ClientError as error:
            failing = _FAILING.get(Failure(error.code), Failing.CONTACT)
            if isinstance(source.action, Stop):
                failing = Failing.REFUSED
            has_keys = source.credentials is not None and source.credentials.cookies
            # Keys that are left serve on, whatever became of new ones.
            if failing in _AT_ONCE or not has_keys or self._is_expired(source):
                self._failed(member, failing, error)
        else:
            self._panel.sampled(name, sample, *_clocks())
            if self._panel.seats[name].samples == BURST - 1:
                # From the next poll on.
                source.interval = self._interval
            self._after_verdict()
            if source.phase is Phase.EMPTY:
                self._failed(member, Failing.KEYS, _STINGY)
            elif self._is_expired(source):
                source.renew()
        await self._tell()

    def _failed(self, member: _Member, failing: Failing, error: ClientError) -> None:
        if self._is_used(member):
            self._has_misdated |= error.code == Failure.CERTIFICATE
            self._panel.failed(member.candidate.name, failing, error.message, *_clocks())
            self._after_verdict()

    def _after_verdict(self) -> None:
        """Sources that are of no use leave; the clock is what the others say."""
        now, steady = time.monotonic(), steady_ns()
        for dismissal in self._panel.dismissals(has_spare=self._roster.has_spare(now)):
            name, member = dismissal.name, self._members[dismissal.name]
            self._roster.failed(name, dismissal.fault, dismissal.reason, now)
            last = self._view_of(member, self._panel.seats[name])
            held = self._roster.held(now)
            self._left = {each: view for each, view in self._left.items() if each in held} | {
                name: replace(last, next_in=None, is_listed=False)
            }
            self._stop(name)
        if (reading := self._panel.reading(steady)) is not None:
            self._truth = reading.unix - steady

    def _is_expired(self, source: Source) -> bool:
        """Whether the certificate that vouched for a source's keys has ended since."""
        credentials = source.credentials
        return self._is_sure() and credentials is not None and credentials.not_after < self._unix()

    def _unix(self) -> int:
        """The time in Unix nanoseconds, as good as it is known here."""
        return self._system_clock.now() if self._truth is None else steady_ns() + self._truth

    def _is_sure(self) -> bool:
        return self._truth is not None or self._system_clock.is_good()

    def _keep(self) -> None:
        """For a later run. A full disk is no reason to end this one."""
        if self._file is None:
            return
        holds = shifted(self._roster.holds, -time.monotonic())
        try:
            self._file.save(self._roster.used, holds, self._proof, self._unix())
        except ClientError as error:
            self._warnings = list(dict.fromkeys((*self._warnings, error.message)))


def shortage(view: PoolView, wanted: int) -> ClientError:
    """Why fewer than `wanted` sources agree."""
    if not view.sources and not view.held and view.problem is not None:
        code = Failure.CLOCK if view.problem.code == Failure.CLOCK else Failure.DNS
        return ClientError(code, view.problem.message, view.problem.remedy)
    reasons = [
        f"{source.candidate.name}: {source.trouble or source.standing}"
        for source in view.sources
        if source.standing is not Standing.TRUECHIMER
    ]
    reasons += [f"{source.candidate.name}: {source.trouble}" for source in view.held]
    reasons += [f"{name}: {why}" for name, why in view.unusable.items()]
    return ClientError(
        Failure.TOO_FEW_SOURCES,
        "; ".join([f"{view.truechimers} of {wanted} sources agree", *reasons]),
        "see each source's reason; ask again in a minute, or accept fewer",
    )


def pool_time(pool: str, *, timeout: float = 30.0, state: Path | None = None) -> datetime:
    """The time now as a pool's servers agree on it, for programs without an event loop. Raises ClientError."""

    async def ask() -> datetime:
        async with PoolClient(pool, state=state) as client:
            return await client.time(timeout)

    return asyncio.run(ask())


def _system_resolvers() -> list[str]:
    found = system_resolvers()
    if not found:
        raise ClientError(
            Failure.CONFIGURATION, "/etc/resolv.conf names no resolver", "name one there, or give `lookup`"
        )
    return found


def _unix_ns(moment: datetime) -> int:
    return int(moment.timestamp()) * _SECOND


def _clocks() -> tuple[int, int]:
    """That clock, and the system's minus that one."""
    steady = steady_ns()
    return steady, time.time_ns() - steady
