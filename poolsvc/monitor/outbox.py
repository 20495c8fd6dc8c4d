"""What was found and not yet told: pure; times are seconds of any clock that does not go back.

Rules:

1. A result is told only if the local check before its probe began, and the one that began after its probe ended, and all
   between, were good for its family. Of a network that goes down between two checks nothing is told.
2. What the registry has not taken after MAX_AGE is dropped, and so is the oldest when there are more than MAX_HELD.
3. A report that was not answered is sent again under its number, so that the registry counts it once.
"""

from collections import Counter, deque
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_address

from nts_core.control import MonitorSample, MonitorTask, ProbeResult
from poolsvc.monitor.soundness import Soundness

MAX_AGE = 1200.0
MAX_HELD = 50_000
_VERSIONS = (4, 6)


class Drop(StrEnum):
    """Why nothing is told of a probe that was made."""

    UNSOUND = "unsound"
    OLD = "old"
    FULL = "full"
    REFUSED = "refused"  # by the registry


@dataclass(frozen=True, slots=True)
class Begun:
    """A probe under way: since when, and how often the local check had failed by then."""

    task: MonitorTask
    at: float
    faults: int

    @property
    def version(self) -> int:
        return ip_address(self.task.address).version


@dataclass(frozen=True, slots=True)
class Found:
    """What came of it, and when it ended."""

    begun: Begun
    ended: float
    result: ProbeResult


class Outbox:
    """Results on their way; `dropped` counts by reason."""

    def __init__(self) -> None:
        self._held: deque[Found] = deque()
        self._ready: deque[Found] = deque()
        self._sending: tuple[Found, ...] = ()
        self._faults = dict.fromkeys(_VERSIONS, 0)
        self.dropped: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._held) + len(self._ready) + len(self._sending)

    @property
    def has_ready(self) -> bool:
        """Whether there is something to tell."""
        return bool(self._ready or self._sending)

    @property
    def is_repeating(self) -> bool:
        """Whether the next batch was sent before, and not answered."""
        return bool(self._sending)

    def begin(self, task: MonitorTask, now: float) -> Begun:
        """A probe begins, while the last local check is good for its family."""
        return Begun(task, now, self._faults[ip_address(task.address).version])

    def add(self, begun: Begun, result: ProbeResult, now: float) -> None:
        """What it found waits for the next check."""
        self._held.append(Found(begun, now, result))
        if len(self) > MAX_HELD:
            (self._ready or self._held).popleft()
            self.dropped[Drop.FULL] += 1

    def check(self, soundness: Soundness, began: float) -> None:
        """A local check that began then has this verdict."""
        for version in _VERSIONS:
            self._faults[version] += not soundness.holds(version)
        waiting: deque[Found] = deque()
        for found in self._held:
            if found.begun.faults != self._faults[found.begun.version]:
                self.dropped[Drop.UNSOUND] += 1
            elif found.ended <= began:
                self._ready.append(found)
            else:
                waiting.append(found)
        self._held = waiting

    def batch(self, limit: int, now: float) -> tuple[MonitorSample, ...]:
        """What to tell next: the same as before until it is `taken` or given up, less what is too old by now."""
        self._drop_old(now)
        if not self._sending:
            self._sending = tuple(self._ready.popleft() for _ in range(min(limit, len(self._ready))))
        return tuple(
            MonitorSample(found.begun.task.target, round(now - found.begun.at, 3), found.result)
            for found in self._sending
        )

    def taken(self) -> None:
        """The registry has the batch."""
        self._sending = ()

    def give_up(self, why: Drop) -> None:
        """The batch is not told any more."""
        self._count(why, len(self._sending))
        self._sending = ()

    def _drop_old(self, now: float) -> None:
        def is_old(found: Found) -> bool:
            return now - found.begun.at > MAX_AGE

        before = len(self)
        self._sending = tuple(found for found in self._sending if not is_old(found))
        for queue in (self._ready, self._held):
            while queue and is_old(queue[0]):
                queue.popleft()
        self._count(Drop.OLD, before - len(self))

    def _count(self, why: Drop, number: int) -> None:
        if number:
            self.dropped[why] += number
