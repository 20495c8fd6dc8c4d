"""The servers of a pool that one client uses, drops and holds back, over months. Pure.

    state    what it means                                      chosen   failed   exchanged   gone
    LISTED   the pool's newest answer names it                  USED                          -
    USED     one of the client's sources                                 HELD     LISTED      -
    HELD     it failed, lied or refused: not before its time             HELD                 HELD

Rules:

1. The pool's answer is a part of its servers, drawn anew each TTL: who is not in it may still be a member. Only `gone`
   takes a server out, and that at once.
2. Who failed is held back for an hour, twice as long each time, a day at most: so nobody asks a server for keys more
   than once an hour. Who refused us (DENY, RSTR) is held back for a week. The count of failures ends when the server
   has been a source for longer than the longest hold.
3. Two names with one address are one source.
4. The choice is `independence.choose`'s. When the pool later offers somebody with whom the sources depend less on each
   other, one source is exchanged, and no other one within the hour.

`now` is in seconds of any clock that does not go back.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from nts_core.independence import Candidate, GivenUp, choose, dependence, given_up

MIN_HOLD, MAX_HOLD = 3600.0, 86_400.0
REFUSED_HOLD = 7 * 86_400.0
MIN_UNREACHED_HOLD, MAX_UNREACHED_HOLD = 60.0, 960.0
EXCHANGE_EVERY = 3600.0
# A pool cannot make us remember more; the oldest holds go first.
MAX_HOLDS = 256
_MAX_DOUBLINGS = 5


class Fault(StrEnum):
    """Why a source is of no use."""

    UNREACHABLE = "unreachable"
    UNREACHED = "unreached"  # as all others were then
    TIED = "tied"  # no majority tells who is wrong
    FALSETICKER = "falseticker"
    UNFIT = "unfit"
    REFUSED = "refused"


_BLAMELESS = frozenset({Fault.UNREACHED, Fault.TIED})


@dataclass(frozen=True, slots=True)
class Hold:
    """A server that is not chosen before `until`. `failures` is how often in a row it was of no use."""

    until: float
    failures: int
    fault: Fault
    reason: str


class Roster:
    """Keeps `count` servers in use out of those that the pool lists."""

    def __init__(self, count: int, holds: Mapping[str, Hold] | None = None) -> None:
        self.count = count
        self._listed: dict[str, Candidate] = {}
        self._used: dict[str, Candidate] = {}
        self._used_since: dict[str, float] = {}
        self._holds: dict[str, Hold] = dict(holds or {})
        self._exchange_at: float | None = None

    @property
    def used(self) -> tuple[Candidate, ...]:
        """The sources, in the order in which they were chosen."""
        return tuple(self._used.values())

    @property
    def given_up(self) -> tuple[GivenUp, ...]:
        """Where sources are not independent of each other."""
        return given_up(self.used)

    @property
    def holds(self) -> Mapping[str, Hold]:
        """Who failed, also if the time is over: the next failure counts on."""
        return self._holds

    def held(self, now: float) -> dict[str, Hold]:
        """Who is held back now."""
        return {name: hold for name, hold in self._holds.items() if hold.until > now}

    def listed(self, candidates: Iterable[Candidate]) -> None:
        """The pool's newest answer, in the order of RFC 2782. What it says of sources replaces what was known."""
        self._listed = {candidate.name: candidate for candidate in candidates}
        self.known(self._listed.values())

    def known(self, candidates: Iterable[Candidate]) -> None:
        """The newest facts about sources, whether listed or not."""
        for candidate in candidates:
            if candidate.name in self._used:
                self._used[candidate.name] = candidate

    def resume(self, candidates: Iterable[Candidate], now: float) -> list[Candidate]:
        """Sources of an earlier run that are still members; returns those that there is room for."""
        resumed = self._free(candidates, now)[: self.count - len(self._used)]
        for candidate in resumed:
            self._use(candidate, now)
        return resumed

    def gone(self, names: Iterable[str]) -> list[Candidate]:
        """These are members no longer. Returns those that were sources until now."""
        dropped = []
        for name in names:
            self._listed.pop(name, None)
            if (candidate := self._drop(name)) is not None:
                dropped.append(candidate)
        return dropped

    def failed(self, name: str, fault: Fault, reason: str, now: float) -> None:
        """A server was of no use; if it was a source, it is one no longer."""
        since = self._used_since.get(name, now)
        self._drop(name)
        before = self._holds.pop(name, None)
        is_first = (
            before is None
            or now - since > MAX_HOLD
            or (before.fault in _BLAMELESS and before.fault is not fault)
        )
        failures = 1 if before is None or is_first else before.failures + 1
        self._holds[name] = Hold(now + _length(fault, failures), failures, fault, reason)
        while len(self._holds) > MAX_HOLDS:
            del self._holds[next(iter(self._holds))]

    def release(self, fault: Fault) -> None:
        """Who is held back for this alone may be chosen at once."""
        self._holds = {name: hold for name, hold in self._holds.items() if hold.fault is not fault}

    def has_choice(self, now: float) -> bool:
        """Whether `choose` would find somebody."""
        return len(self._used) < self.count and self.has_spare(now)

    def has_spare(self, now: float) -> bool:
        """Whether somebody could take the place of a source."""
        return bool(self._free(self._listed.values(), now))

    def choose(self, now: float) -> list[Candidate]:
        """Fill the places that are free, and return who is new."""
        room = self.count - len(self._used)
        chosen = choose(self._free(self._listed.values(), now), room, beside=self.used) if room > 0 else []
        for candidate in chosen:
            self._use(candidate, now)
        return chosen

    def exchange(self, now: float) -> tuple[Candidate, Candidate] | None:
        """Who goes and who comes, when that makes the sources less dependent on each other. Both are done."""
        if self._exchange_at is not None and now < self._exchange_at:
            return None
        cost = dependence(self.used)
        best: tuple[int, Candidate, Candidate] | None = None
        for leaving in self.used if cost else ():
            staying = [candidate for candidate in self.used if candidate is not leaving]
            for coming in self._free(self._listed.values(), now, beside=staying):
                # A server of a lower priority number goes before everything (RFC 2782).
                would_be = dependence([*staying, coming])
                if would_be < (cost if best is None else best[0]) and coming.priority <= leaving.priority:
                    best = would_be, leaving, coming
        if best is None:
            return None
        _, leaving, coming = best
        self._drop(leaving.name)
        self._use(coming, now)
        self._exchange_at = now + EXCHANGE_EVERY
        return leaving, coming

    def next_release(self, now: float) -> float | None:
        """When the next listed server that is held back may be chosen."""
        times = [hold.until for name, hold in self.held(now).items() if name in self._listed]
        return min(times, default=None)

    def _free(
        self, candidates: Iterable[Candidate], now: float, *, beside: Sequence[Candidate] | None = None
    ) -> list[Candidate]:
        """Who may be chosen, without two that share an address with each other or with one of those beside."""
        taken = {
            address for other in (self.used if beside is None else beside) for address in other.addresses
        }
        held, free = self.held(now), []
        for candidate in candidates:
            if (
                candidate.name in self._used
                or candidate.name in held
                or not taken.isdisjoint(candidate.addresses)
            ):
                continue
            taken.update(candidate.addresses)
            free.append(candidate)
        return free

    def _use(self, candidate: Candidate, now: float) -> None:
        self._used[candidate.name] = candidate
        self._used_since[candidate.name] = now

    def _drop(self, name: str) -> Candidate | None:
        self._used_since.pop(name, None)
        return self._used.pop(name, None)


def shifted(holds: Mapping[str, Hold], by: float) -> dict[str, Hold]:
    """With times of another clock."""
    return {name: replace(hold, until=hold.until + by) for name, hold in holds.items()}


def _length(fault: Fault, failures: int) -> float:
    """For how long a server is held back."""
    doubled = 2.0 ** min(failures - 1, _MAX_DOUBLINGS)
    match fault:
        case Fault.REFUSED:
            return REFUSED_HOLD
        case Fault.UNREACHED | Fault.TIED:
            return min(MIN_UNREACHED_HOLD * doubled, MAX_UNREACHED_HOLD)
        case _:
            return min(MIN_HOLD * doubled, MAX_HOLD)
