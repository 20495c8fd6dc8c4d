"""What a monitor probes next: pure; times are seconds of any clock that does not go back.

Rules:

1. A probe begins when the work says, a random moment later.
2. Never two at once of one address, and never more than `at_once` altogether.
3. What could not begin in time is left out and counted. It is not made up for: late probes would come in a bunch, and the
   registry asks again anyhow.
"""

import heapq
import math
from collections import Counter
from collections.abc import Iterable
from enum import StrEnum
from random import Random

from nts_core.control import MonitorTask

MAX_PLANNED = 20_000
# Of what a registry says, nothing further ahead is believed.
_MAX_AHEAD = 3600.0


class Skip(StrEnum):
    """Why a probe was left out."""

    LATE = "late"
    CROWDED = "crowded"  # too many at a time
    BUSY = "busy"  # its address is being probed
    BEYOND = "beyond"  # more than can be planned
    UNSOUND = "unsound"  # the local check was not good
    FAMILY = "family"  # not one of the settings'
    REFUSED = "refused"  # an address that is not dialled


class Schedule:
    """Probes that were asked for, and those that are under way."""

    def __init__(self, *, at_once: int, jitter: float, lateness: float, random: Random) -> None:
        self._at_once = at_once
        self._jitter = jitter
        self._lateness = lateness
        self._random = random
        self._planned: dict[int, tuple[float, MonitorTask]] = {}
        self._order: list[tuple[float, int]] = []
        self._busy: set[str] = set()
        self.skipped: Counter[str] = Counter()

    @property
    def planned(self) -> int:
        return len(self._planned)

    @property
    def under_way(self) -> int:
        return len(self._busy)

    def take(self, tasks: Iterable[MonitorTask], now: float) -> None:
        """Plan more; a target's new task replaces its old one."""
        for task in tasks:
            if task.target not in self._planned and len(self._planned) >= MAX_PLANNED:
                self.skip(Skip.BEYOND)
                continue
            ahead = min(max(task.after, 0.0), _MAX_AHEAD) if math.isfinite(task.after) else 0.0
            at = now + ahead + self._random.uniform(0, self._jitter)
            self._planned[task.target] = at, task
            heapq.heappush(self._order, (at, task.target))
        if len(self._order) > 2 * len(self._planned) + 1000:
            self._order = [(at, target) for target, (at, _) in self._planned.items()]
            heapq.heapify(self._order)

    def clear(self) -> None:
        """Begin nothing more of what was planned."""
        self._planned.clear()
        self._order.clear()

    def next_at(self) -> float | None:
        """When something may be due."""
        return self._order[0][0] if self._order else None

    def due(self, now: float) -> list[MonitorTask]:
        """What begins now; each is under way until `end`."""
        found = []
        while self._order and self._order[0][0] <= now:
            at, target = heapq.heappop(self._order)
            planned = self._planned.get(target)
            if planned is None or planned[0] != at:
                continue  # replaced
            del self._planned[target]
            task = planned[1]
            if now - at > self._lateness:
                self.skip(Skip.LATE)
            elif task.address in self._busy:
                self.skip(Skip.BUSY)
            elif len(self._busy) >= self._at_once:
                self.skip(Skip.CROWDED)
            else:
                self._busy.add(task.address)
                found.append(task)
        return found

    def end(self, task: MonitorTask) -> None:
        """It is not under way any more."""
        self._busy.discard(task.address)

    def skip(self, why: Skip) -> None:
        """Count one that was left out."""
        self.skipped[why] += 1
