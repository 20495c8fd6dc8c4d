"""A client's sources as those who decide together what time it is (RFC 5905 section 11.2), over months. Pure.

    standing      what it means                                               it is dismissed
    PENDING       it has not been asked often enough for its word to count    when it gives no keys or no answer
    TRUECHIMER    the majority, of which it is one                            when it falls silent
    FALSETICKER   the others outvote it                                       at once, or if it was good after OUTVOTED samples
    UNFIT         it says itself that it is not synchronised, or far off      after its patience, in polls
    SILENT        its last answer is so old that nothing of it counts         when it gives no keys or no answer

A source that was good before is given more patience than a new one. Who refuses us (DENY, RSTR) is dismissed at once. That
a source cannot be reached is held against it only if another one was good meanwhile: else it may be this host's own network.
Without a majority nobody knows who is wrong: of those that were never good the one with whom the fewest agree goes, if
somebody else is there, until there is a majority.

Times are nanoseconds: `monotonic` of a clock that nobody sets and that goes on while the host sleeps; `base` is the system's
clock minus that one, so that samples taken before the system's clock was set still count.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from nts_core import select
from nts_core.association import Sample
from nts_core.roster import Fault

# Exchanges with a new source before its word counts.
BURST = 4
# Polls in vain before a source is dismissed: one that was good before, and a new one.
PATIENCE, NO_PATIENCE = 8, 4
# Samples against the majority before one that was good is dismissed.
OUTVOTED = 3
# Samples of a source that are kept, as in RFC 5905's clock filter.
_WINDOW = 8
# RFC 5905's PHI: how much worse a sample becomes in a second, in nanoseconds.
_WANDER = 15_000
_SECOND = 1_000_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TIED_REASON = "the sources disagree, and the fewest agree with it"
_OUTVOTED_REASON = "its time disagrees with the majority"


class Standing(StrEnum):
    """What is thought of a source."""

    PENDING = "pending"
    TRUECHIMER = "truechimer"
    FALSETICKER = "falseticker"
    UNFIT = "unfit"
    SILENT = "silent"


class Failing(StrEnum):
    """How an attempt failed, as far as anything depends on it."""

    CONTACT = "contact"  # it could not be asked for keys, and none are left
    KEYS = "keys"  # it gave none, and none are left
    POLL = "poll"  # no answer, or one without a time
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Reading:
    """The time as a majority agrees on it, in nanoseconds since 1970; `error` is how far off it can be.

    `offset` is that minus the system's clock. The error holds as long as the majority is right.
    """

    unix: int
    error: int
    offset: int
    sources: tuple[str, ...]

    @property
    def time(self) -> datetime:
        """As an aware datetime, in whole microseconds."""
        return _EPOCH + timedelta(microseconds=self.unix // 1000)


@dataclass(frozen=True, slots=True)
class Dismissal:
    """A source that is of no use."""

    name: str
    fault: Fault
    reason: str


@dataclass(frozen=True, slots=True)
class _Observation:
    sample: Sample
    at: int
    base: int

    def aged(self, monotonic: int, base: int) -> Sample:
        """The sample as it counts now: against the system's clock of now, and wider by the time since."""
        return replace(
            self.sample,
            offset=self.sample.offset + self.base - base,
            root_dispersion=self.sample.root_dispersion + (monotonic - self.at) * _WANDER // _SECOND,
        )


@dataclass(slots=True)
class Seat:
    """One source since it became one: what it said, and how it behaved."""

    since: int
    standing: Standing = Standing.PENDING
    samples: int = 0
    trouble: str = ""
    observations: deque[_Observation] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    misses: int = 0
    outvoted: int = 0
    was_good: bool = False
    failing: Failing | None = None
    good_at: int | None = None
    # Since when nothing good has come of it.
    bad_since: int | None = None

    @property
    def is_heard(self) -> bool:
        """Whether its word counts."""
        return self.samples >= BURST

    @property
    def patience(self) -> int:
        """How many polls in vain it is given."""
        return PATIENCE if self.was_good else NO_PATIENCE

    def best(self, monotonic: int, base: int) -> Sample | None:
        """The best of its samples, as it counts now."""
        samples = [each.aged(monotonic, base) for each in self.observations]
        return select.best(samples) if samples else None


class Panel:
    """The sources in use. More than half of `count` make a reading; `life` is how long a sample counts."""

    def __init__(self, count: int, life: int) -> None:
        self.quorum = count // 2 + 1
        self._life = life
        self._seats: dict[str, Seat] = {}
        self._reading: Reading | None = None
        self._read_at = 0
        # Samples in a row after which there was no majority.
        self._ties = 0
        # What each voter claimed when that was last judged.
        self._claims: dict[str, select.Estimate] = {}

    @property
    def seats(self) -> Mapping[str, Seat]:
        """The sources by name."""
        return self._seats

    @property
    def truechimers(self) -> list[str]:
        """Who agree with each other, by name."""
        return [name for name, seat in self._seats.items() if seat.standing is Standing.TRUECHIMER]

    @property
    def is_waiting(self) -> bool:
        """Whether a source's first word is still to come, or its next one after a time in which nobody was asked."""
        return any(
            seat.standing is Standing.PENDING or (seat.standing is Standing.SILENT and not seat.misses)
            for seat in self._seats.values()
        )

    def reading(self, monotonic: int) -> Reading | None:
        """The time at this moment of the monotonic clock, unless the last majority is too long ago."""
        age = monotonic - self._read_at
        if self._reading is None or age > self._life:
            return None
        return replace(
            self._reading,
            unix=self._reading.unix + age,
            error=self._reading.error + age * _WANDER // _SECOND,
        )

    def seat(self, name: str, monotonic: int) -> None:
        """A new source."""
        self._seats[name] = Seat(monotonic)

    def leave(self, name: str) -> None:
        """A source that is one no longer, for whatever reason."""
        self._seats.pop(name, None)
        self._claims.pop(name, None)

    def sampled(self, name: str, sample: Sample, monotonic: int, base: int) -> None:
        """A source has answered."""
        seat = self._seats[name]
        seat.observations.append(_Observation(sample, monotonic, base))
        seat.samples += 1
        if (unfit := select.unfit(sample)) is None:
            seat.misses, seat.trouble, seat.failing = 0, "", None
            seat.good_at, seat.bad_since = monotonic, None
        else:
            seat.misses, seat.trouble = seat.misses + 1, unfit
        self.judge(monotonic, base)
        if seat.standing is Standing.FALSETICKER:
            seat.outvoted += 1
        is_tied = not self.truechimers and seat.standing is Standing.FALSETICKER
        self._ties = self._ties + 1 if is_tied else 0

    def failed(self, name: str, failing: Failing, reason: str, monotonic: int, base: int) -> None:
        """A source has not answered."""
        seat = self._seats[name]
        seat.trouble = reason
        if seat.bad_since is None:
            seat.bad_since = seat.since if seat.good_at is None else monotonic
        if failing is Failing.POLL:
            seat.misses += 1
        else:
            seat.failing = failing
        self.judge(monotonic, base)

    def dismissals(self, *, has_spare: bool = False) -> list[Dismissal]:
        """Who is of no use by now. With `has_spare` somebody goes also if no majority tells who is wrong."""
        is_complete = not self.is_waiting
        found = (self._dismissal(name, seat, is_complete=is_complete) for name, seat in self._seats.items())
        dismissed = [dismissal for dismissal in found if dismissal is not None]
        if not dismissed and has_spare and is_complete and self._ties >= (OUTVOTED if self._reading else 1):
            self._ties = 0
            name = min(self._claims, key=lambda name: (self._seats[name].was_good, self._supporters(name)))
            dismissed.append(Dismissal(name, Fault.TIED, _TIED_REASON))
        return dismissed

    def _dismissal(self, name: str, seat: Seat, *, is_complete: bool) -> Dismissal | None:
        if (fault := self._fault(seat)) is not None:
            return Dismissal(name, fault, seat.trouble)
        if seat.standing is Standing.FALSETICKER and len(self.truechimers) >= self.quorum:
            is_sure = seat.outvoted >= OUTVOTED if seat.was_good else is_complete
            return Dismissal(name, Fault.FALSETICKER, _OUTVOTED_REASON) if is_sure else None
        return None

    def _fault(self, seat: Seat) -> Fault | None:
        """What a source has done wrong by itself."""
        match seat.failing:
            case Failing.REFUSED:
                return Fault.REFUSED
            case Failing.KEYS:
                return Fault.UNREACHABLE
            case None if seat.misses < seat.patience:
                return None
            case None if seat.standing is Standing.UNFIT:
                return Fault.UNFIT
            case _:
                return Fault.UNREACHABLE if self._was_another_good(seat) else Fault.UNREACHED

    def _supporters(self, name: str) -> int:
        """How many others claim something that can be true together with what this one claims."""
        mine = self._claims[name]
        return sum(
            abs(mine.offset - other.offset) <= mine.distance + other.distance
            for other in self._claims.values()
        )

    def _was_another_good(self, seat: Seat) -> bool:
        since = seat.bad_since
        return since is not None and any(
            other.good_at is not None and other.good_at > since
            for other in self._seats.values()
            if other is not seat
        )

    def judge(self, monotonic: int, base: int) -> None:
        """Who is right, by all that counts now; also when nothing was heard for long."""
        voters: list[tuple[str, Seat]] = []
        self._claims = {}
        for name, seat in self._seats.items():
            recent = [each for each in seat.observations if monotonic - each.at <= self._life]
            seat.standing = _standing(seat, recent)
            if seat.standing is Standing.TRUECHIMER:
                voters.append((name, seat))
                self._claims[name] = select.estimate([each.aged(monotonic, base) for each in recent])
        selection = select.select(list(self._claims.values()))
        right = [voters[index] for index in sorted(selection.truechimers)]
        for index, (_, seat) in enumerate(voters):
            if index not in selection.truechimers:
                seat.standing = Standing.FALSETICKER
                seat.trouble = _OUTVOTED_REASON if right else "the sources disagree"
        if selection.offset is None or len(right) < self.quorum:
            return
        for _, seat in right:
            seat.was_good, seat.outvoted = True, 0
        low, high = selection.interval
        self._reading = Reading(
            unix=monotonic + base + selection.offset,
            error=max(high - selection.offset, selection.offset - low),
            offset=selection.offset,
            sources=tuple(name for name, _ in right),
        )
        self._read_at = monotonic


def _standing(seat: Seat, recent: Iterable[_Observation]) -> Standing:
    """What is thought of a source before the others are heard; TRUECHIMER of one that may vote."""
    samples = [each.sample for each in recent]
    if not samples:
        return Standing.SILENT if seat.was_good else Standing.PENDING
    if select.unfit(samples[-1]) is not None:
        return Standing.UNFIT
    return Standing.TRUECHIMER if seat.is_heard else Standing.PENDING
