"""One address under the pool's rules, probe by probe: seven monitors at their own times, and what they come to.

Everything that decides is the registry's own: steps, scores, intervals, verdicts. Only the clock is simulated.
"""

import heapq
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from random import Random

from nts_core.control import ProbeResult, Stage
from poolsvc.scoring import FULL_SHARE, MAX_SCORE, advance, is_good, step
from poolsvc.vantage import ACTIVE, ViewRole, interval, next_probe
from poolsvc.verdicts import FULL_QUORUM, MEDIAN, Scorer, View, overall, quorum

START = datetime(2027, 1, 1, tzinfo=UTC)
FULL = ProbeResult("198.18.0.1", None, "", offset=0, delay=20_000_000, stratum=2, leap=0, asked=4, cookies=4)
SILENCE = ProbeResult("198.18.0.1", Stage.TCP, "no answer")
DENIAL = replace(SILENCE, failed=Stage.NTP_KE_COOKIE, kiss="DENY")
QUORUM = quorum(ACTIVE, FULL_QUORUM, 3)
_SEASONED = timedelta(days=30)

# What a monitor finds, so long after the start.
Behaviour = Callable[[timedelta, int], ProbeResult]


def off(seconds: float) -> ProbeResult:
    """What a probe finds of a clock that is so wrong."""
    return replace(FULL, offset=round(seconds * 1e9))


@dataclass(slots=True)
class Course:
    """What became of an address: its score at each probe, and when it was in the answer; in hours from the start."""

    scores: list[tuple[float, float | None]] = field(default_factory=list)
    changes: list[tuple[float, bool]] = field(default_factory=list)  # into the answer, or out of it
    probes: list[tuple[float, int]] = field(default_factory=list)  # and by whom

    def first_change(self, *, into: bool, after: float = 0.0) -> float | None:
        """When it first got into the answer, or out of it."""
        return next((at for at, is_in in self.changes if is_in is into and at >= after), None)

    def rounds(self, since: float, until: float) -> int:
        """How often the monitor that probed it last had probed it in that time."""
        seen = [monitor for at, monitor in self.probes if since <= at <= until]
        return seen.count(seen[-1])


def follow(
    behaviour: Behaviour,
    lasts: timedelta,
    *,
    seed: int = 1,
    score: float = MAX_SCORE,
    scorer: Scorer = MEDIAN,
    monitors: int = ACTIVE,
) -> Course:
    """An address that begins with `score` in the eyes of all its monitors, and is in the answer if that is good."""
    draw = Random(seed).random
    found, is_in = Course(), is_good(score)
    views = {
        number: View(number, number, is_active=True, score=score, full_probes=0, at=START)
        for number in range(monitors)
    }
    due = {number: START + timedelta(seconds=540 * (number + draw()) / monitors) for number in views}
    queue = [(at, number) for number, at in due.items()]
    heapq.heapify(queue)
    while queue[0][0] < START + lasts:
        now, number = heapq.heappop(queue)
        result = behaviour(now - START, number)
        before = views[number].score
        assert before is not None
        after = advance(before, step(result, rule=scorer.rule), scorer.rule)
        silent = (views[number].silent_since or now) if result.failed is Stage.TCP else None
        views[number] = replace(views[number], score=after, at=now, silent_since=silent)
        verdict = overall(views.values(), QUORUM, now, scorer)
        hours = (now - START) / timedelta(hours=1)
        found.probes.append((hours, number))
        found.scores.append((hours, verdict.score))
        if verdict.is_known and is_good(verdict.score) is not is_in:
            is_in = not is_in
            found.changes.append((hours, is_in))
        seconds = interval(ViewRole.ACTIVE, after, monitor=number, active=monitors, age=_SEASONED)
        assert seconds is not None
        others = [at for other, at in due.items() if other != number]
        due[number] = next_probe(now, seconds, [*others, now], draw)
        heapq.heappush(queue, (due[number], number))
    return found


@dataclass(frozen=True, slots=True)
class Times:
    """A fault's course: each monitor's probes until it is out, and the time; and from its end until it is back, and whole.

    Medians over some runs, and the longest of each; None of what did not happen.
    """

    rounds: float | None
    out: tuple[float, float] | None  # minutes
    back: tuple[float, float] | None  # hours
    whole: tuple[float, float] | None  # hours


FAULT_HOURS = 6.0


def times(fault: ProbeResult, runs: int = 11, *, scorer: Scorer = MEDIAN, reach: int = ACTIVE) -> Times:
    """From full score: the fault for six hours at `reach` of the monitors, and then none."""
    lasts = timedelta(hours=FAULT_HOURS)
    rounds, out, back, whole = [], [], [], []

    def behaviour(since: timedelta, monitor: int) -> ProbeResult:
        return fault if since < lasts and monitor < reach else FULL

    for seed in range(runs):
        course = follow(behaviour, timedelta(hours=FAULT_HOURS + 30), seed=seed, scorer=scorer)
        if (left := course.first_change(into=False)) is None:
            continue
        rounds.append(course.rounds(0, left))
        out.append(60 * left)
        if (again := course.first_change(into=True, after=FAULT_HOURS)) is not None:
            back.append(again - FAULT_HOURS)
        full = (
            at
            for at, score in course.scores
            if at > FAULT_HOURS and score is not None and score >= FULL_SHARE
        )
        if (at := next(full, None)) is not None:
            whole.append(at - FAULT_HOURS)
    return Times(statistics.median(rounds) if rounds else None, _spread(out), _spread(back), _spread(whole))


def _spread(found: list[float]) -> tuple[float, float] | None:
    return (statistics.median(found), max(found)) if found else None


FAULTS: Mapping[str, ProbeResult] = {
    "clock 5 s off": off(5),
    "DENY": DENIAL,
    "silence": SILENCE,
    "clock 1 s off": off(1),
    "stratum 16, leap 3 or a root distance over 1.5 s": replace(FULL, stratum=16, leap=3),
    "clock 400 ms off": off(0.4),
    "clock 200 ms off": off(0.2),
    "clock 150 ms off": off(0.15),
    "clock 90 ms off": off(0.09),
}


def table(runs: int = 11) -> Iterator[str]:
    """Every fault's times, as the lines of a Markdown table."""
    yield "| fault, of six hours | probes of each monitor until it is out | out after | back after its end | whole share after |"
    yield "|---|---|---|---|---|"
    for name, fault in FAULTS.items():
        found = times(fault, runs)
        rounds = "stays in" if found.rounds is None else f"{found.rounds:.0f}"
        cells = (_cell(found.out, "min"), _cell(found.back, "h"), _cell(found.whole, "h"))
        yield f"| {name} | {rounds} | {' | '.join(cells)} |"


def _cell(found: tuple[float, float] | None, unit: str) -> str:
    if found is None:
        return ""
    digits = 0 if unit == "min" else 1
    return f"{found[0]:.{digits}f} {unit} (at most {found[1]:.{digits}f})"
