"""Keeps a stock time daemon on independent members of a pool, which it could not find itself (asyncio).

`membership` says who may be used, `roster` whom to use; `feeding` tells the daemon, and hears what it thinks of them. The
daemon's own file is the memory: who is in it stays, also over a restart of the feed, until it is a member no longer, or
was of no use for a while and somebody else is there to take its place. Nothing that goes wrong ends the feed: what does
is told once, and tried again.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import NoReturn

from nts_core.asking import Unanswered
from nts_core.client import ClientError, Failure
from nts_core.feeding import Member, member_of
from nts_core.feeding.hand import Applied, Hand
from nts_core.feeding.judge import Judge
from nts_core.independence import Candidate
from nts_core.membership import Membership
from nts_core.resolve import Proof
from nts_core.roster import Fault, Hold, Roster, shifted
from nts_core.show import UNPROVEN
from nts_core.store import PoolFile

ASK_EVERY = 60.0
# Seconds before the daemon is told again after that failed, and then twice as long each time.
MIN_RETRY, MAX_RETRY = 60.0, 960.0


class What(StrEnum):
    """What may happen."""

    KEPT = "kept"
    TAKEN = "taken"
    GONE = "gone"
    DISMISSED = "dismissed"
    EXCHANGED = "exchanged"
    TOLD = "told"
    WAITING = "waiting"
    PROBLEM = "problem"
    SOLVED = "solved"
    MEMBERSHIP = "membership"


@dataclass(frozen=True, slots=True)
class News:
    """Something that happened, in words, and whom it is about."""

    what: What
    words: str
    names: tuple[str, ...] = ()
    error: ClientError | None = None


class _Topic(StrEnum):
    """What a problem is with; of each there is one at a time."""

    DNS = "DNS"
    FILE = "the daemon's file"
    ANSWERS = "the daemon's answers"
    SOURCES = "the daemon's sources"
    COUNT = "the number of members"
    STATE = "the state"


@dataclass(slots=True)
class _Due:
    """When what is done next, in seconds of the monotonic clock."""

    look: float = 0.0
    ask: float = 0.0
    tell: float = 0.0
    retry: float = field(default=MIN_RETRY)


class Feed:
    """One daemon's, of one pool. `tell` is told what happens.

    With `state`, a directory, a later run knows whom this one holds back.
    """

    def __init__(
        self,
        hand: Hand,
        membership: Membership,
        count: int,
        tell: Callable[[News], None],
        *,
        state: Path | None = None,
    ) -> None:
        self._hand = hand
        self._membership = membership
        self._state = state
        self._tell = tell
        self._roster = Roster(count)
        self._judge = Judge()
        self._due = _Due()
        self._problems: dict[_Topic, ClientError] = {}
        self._has_begun = False
        self._is_online = False
        # How it is proved who is a member, once that is known.
        self.proof: Proof | None = None
        # Members no longer, of which the daemon was not told yet.
        self._gone: set[str] = set()
        self._applied = Applied(())
        self._is_waiting = False
        # Whom the daemon did not know when it was asked last.
        self._unknown: tuple[str, ...] = ()
        self._file: PoolFile | None = None
        # What is in it.
        self._kept: tuple[tuple[Candidate, ...], dict[str, Hold]] | None = None

    @property
    def members(self) -> tuple[Member, ...]:
        """Whom the daemon's file names."""
        return self._applied.members

    @property
    def problem(self) -> ClientError | None:
        """What is in the way now; of several things the first in the order of what is needed."""
        order = (_Topic.STATE, _Topic.FILE, _Topic.DNS, _Topic.COUNT)
        return next((self._problems[topic] for topic in order if topic in self._problems), None)

    async def once(self) -> None:
        """Look, choose, and tell the daemon, once; what it thinks of its sources needs a longer run."""
        with self._opened():
            await self._step(is_asking=False)

    async def run(self) -> NoReturn:
        """For as long as it is not cancelled. The daemon's file stays."""
        with self._opened():
            while True:
                await self._step(is_asking=True)
                await asyncio.sleep(max(0.0, self._next() - time.monotonic()))

    def _opened(self) -> ExitStack:
        """With the holds of an earlier run. Raises ClientError when the state is of no use."""
        stack = ExitStack()
        if self._state is not None:
            self._file = PoolFile.open(self._state, self._membership.pool)
            stack.callback(self._file.close)
            _, holds, self.proof, fault = self._file.load(time.time_ns())
            self._roster = Roster(self._roster.count, shifted(holds, time.monotonic()))
            if fault is not None:
                self._tell(News(What.PROBLEM, f"the state: {fault}"))
        return stack

    def _next(self) -> float:
        """When there is something to do again: in a minute at most, once it has begun."""
        if not self._has_begun:
            return self._due.tell
        release = self._roster.next_release(time.monotonic())
        return min(self._due.look, self._due.ask, self._due.look if release is None else release)

    async def _step(self, *, is_asking: bool) -> None:
        if not self._has_begun and not await self._begin():
            return
        now = time.monotonic()
        if now >= self._due.look:
            await self._look()
        if is_asking and now >= self._due.ask:
            self._due.ask = now + ASK_EVERY
            await self._ask()
        self._fill()
        if time.monotonic() >= self._due.tell:
            await self._apply()

    async def _begin(self) -> bool:
        """Who is in the daemon's file stays. False when that cannot be read: then nothing is done yet."""
        try:
            members = await self._hand.members()
        except ClientError as error:
            self._problem(_Topic.FILE, error)
            self._put_off()
            return False
        self._solved(_Topic.FILE)
        earlier = [Candidate(member.name, member.port) for member in members]
        kept = self._roster.resume(earlier, time.monotonic())
        if kept:
            names = tuple(candidate.name for candidate in kept)
            self._tell(News(What.KEPT, f"{self._program} has {_list(names)} from before", names))
        self._applied = Applied(members)
        self._has_begun = True
        return True

    async def _look(self) -> None:
        """Who is a member now."""
        found = await self._membership.look(self._roster.used, time.time())
        now = time.monotonic()
        self._due.look, self._is_online = now + found.again_in, found.problem is None
        if found.problem is None:
            if _Topic.DNS in self._problems:
                # The network is back: what failed without it says nothing.
                self._roster.release(Fault.UNREACHED)
            self._solved(_Topic.DNS)
        else:
            self._problem(_Topic.DNS, ClientError(Failure.DNS, found.problem.message, found.problem.remedy))
        if found.proof is not None and found.proof is not self.proof:
            if self.proof is not None or found.proof is not Proof.PROVEN:
                self._tell(News(What.MEMBERSHIP, UNPROVEN.get(found.proof, "membership proven")))
            self.proof = found.proof
        self._roster.known(found.others)
        if found.listed or found.problem is None:
            self._roster.listed(each for each in found.listed if _can_be_written(each))
        for candidate in self._roster.gone(found.gone):
            self._gone.add(candidate.name)
            self._due.tell = now
            self._tell(
                News(What.GONE, f"{candidate.name} is a member of the pool no longer", (candidate.name,))
            )

    async def _ask(self) -> None:
        """What the daemon thinks of its sources, and what follows from that."""
        try:
            verdicts = await self._hand.verdicts(self._applied.members)
        except Unanswered as error:
            self._judge.silence()
            self._unknown = ()
            self._problem(
                _Topic.ANSWERS,
                ClientError(
                    Failure.DAEMON,
                    str(error),
                    f"until {self._program} says what it thinks, none is replaced for that",
                ),
            )
            return
        self._solved(_Topic.ANSWERS)
        now = time.monotonic()
        self._note_unknown([name for name, verdict in verdicts.items() if verdict is None])
        used = {candidate.name for candidate in self._roster.used}
        for dismissal in self._judge.heard(verdicts, now, is_online=self._is_online):
            # With nobody to take its place it stays: the daemon does not follow it, and it may come back.
            if dismissal.name not in used or not self._roster.has_spare(now):
                continue
            self._roster.failed(dismissal.name, dismissal.fault, dismissal.reason, now)
            self._tell(
                News(What.DISMISSED, f"{dismissal.name} is replaced: {dismissal.reason}", (dismissal.name,))
            )
            self._fill()

    def _note_unknown(self, names: Sequence[str]) -> None:
        """A daemon that was told a moment ago is given until the next time."""
        still = [name for name in names if name in self._unknown]
        self._unknown = tuple(names)
        if not still:
            self._solved(_Topic.SOURCES)
            return
        self._problem(
            _Topic.SOURCES,
            ClientError(
                Failure.DAEMON,
                f"{self._program} does not know {_list(still)}, though {self._hand.path} names them",
                self._hand.daemon.remedy.format(directory=self._hand.directory),
            ),
        )

    def _fill(self) -> None:
        """Every place has its server."""
        now = time.monotonic()
        for candidate in self._roster.choose(now):
            self._tell(News(What.TAKEN, f"{candidate.name} is taken", (candidate.name,)))
        if (exchanged := self._roster.exchange(now)) is not None:
            left, came = (candidate.name for candidate in exchanged)
            self._tell(
                News(
                    What.EXCHANGED,
                    f"{came} takes the place of {left}: it depends less on the others",
                    (left, came),
                )
            )
        missing = self._roster.count - len(self._roster.used)
        if missing > 0 and _Topic.DNS in self._problems:
            # That says it all.
            self._problems.pop(_Topic.COUNT, None)
        elif missing > 0:
            self._problem(
                _Topic.COUNT,
                ClientError(
                    Failure.TOO_FEW_SOURCES,
                    f"{missing} of {self._roster.count} places are free: the pool offers nobody else now",
                    "wait until it lists more, or ask for fewer with --count",
                ),
            )
        else:
            self._solved(_Topic.COUNT)
        self._keep()

    async def _apply(self) -> None:
        """The daemon has what was chosen."""
        wanted = [Member(candidate.name, candidate.port) for candidate in self._roster.used]
        try:
            applied = await self._hand.apply(wanted, is_urgent=bool(self._gone))
        except ClientError as error:
            self._problem(_Topic.FILE, error)
            self._put_off()
            return
        self._solved(_Topic.FILE)
        self._due.tell, self._due.retry = 0.0, MIN_RETRY
        names = tuple(member.name for member in applied.members)
        if applied.is_told:
            self._tell(News(What.TOLD, f"{self._program} was told: {_list(names) or 'nobody'}", names))
        if applied.due_in is None:
            self._gone.clear()
        elif not self._is_waiting:
            self._tell(
                News(
                    What.WAITING,
                    f"{self._program} is told of that in {applied.due_in / 60:.0f} minutes: it begins anew then",
                    names,
                )
            )
        self._is_waiting = applied.due_in is not None
        self._applied = applied

    def _put_off(self) -> None:
        """After a failure the daemon's file is left alone for a while."""
        self._due.tell = time.monotonic() + self._due.retry
        self._due.retry = min(2 * self._due.retry, MAX_RETRY)

    def _keep(self) -> None:
        """For a later run."""
        now_kept = self._roster.used, dict(self._roster.holds)
        if self._file is None or now_kept == self._kept:
            return
        used, holds = now_kept
        try:
            self._file.save(used, shifted(holds, -time.monotonic()), self.proof, time.time_ns())
        except ClientError as error:
            self._problem(_Topic.STATE, error)
        else:
            self._kept = now_kept
            self._solved(_Topic.STATE)

    def _problem(self, topic: _Topic, error: ClientError) -> None:
        """Told once, until it is another one."""
        before = self._problems.get(topic)
        self._problems[topic] = error
        if before is None or before.message != error.message:
            remedy = f"; {error.remedy}" if error.remedy else ""
            self._tell(News(What.PROBLEM, f"{topic}: {error.message}{remedy}", error=error))

    def _solved(self, topic: _Topic) -> None:
        if self._problems.pop(topic, None) is not None:
            self._tell(News(What.SOLVED, f"{topic}: all is well again"))

    @property
    def _program(self) -> str:
        return self._hand.daemon.program


def _can_be_written(candidate: Candidate) -> bool:
    """DNS allows names that would be more than a name in a daemon's file."""
    member = Member(candidate.name, candidate.port)
    return member_of(str(member)) == member


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)
