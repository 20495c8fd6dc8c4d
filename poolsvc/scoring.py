"""Scores of server addresses: pure, the NTP Pool's proven rule with |offset| and two more checks.

    s = min(0.95 s + step, cap), from -100 to 20; in the answer from 10 up

Twenty times the mean step is where a score settles, so the cutoff stands for a mean step of one half. That holds for every
`Rule`: one on trial may forget faster or ask for better clocks, and its scores still mean the same.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from nts_core.control import ProbeResult
from nts_core.packet import Leap
from nts_core.select import MAX_DISTANCE

MIN_SCORE = -100.0
MAX_SCORE = 20.0
CUTOFF = 10.0
FULL_SHARE = 15.0
ADMITTED = 12.0
HOPELESS = -90.0  # who is so low is looked at seldom
FULL_STEP = 1.0
_SECOND = 1_000_000_000


def is_good(score: float | None) -> bool:
    """Whether an address with that score may be in DNS beside others; None is one that was not admitted yet."""
    return score is not None and score >= CUTOFF


def share(score: float) -> float:
    """The part of its weight that a server has in the answers, from 0 to 1: who was just bad comes back by degrees."""
    return min(1.0, max(0.0, (score - CUTOFF) / (FULL_SHARE - CUTOFF)))


def best(scores: Iterable[float | None]) -> float:
    """The score by which a server is drawn: that of its best address, the full one where none has any yet."""
    return max((score for score in scores if score is not None), default=MAX_SCORE)


def tenths(score: float | None) -> int | None:
    """A score's share in tenths, which is all that weights know of it."""
    return None if score is None else round(10 * share(score))


@dataclass(frozen=True, slots=True)
class Step:
    """What one probe adds to a score, the score that cannot be passed with it, and why it is not a full step."""

    value: float
    cap: float = MAX_SCORE
    reason: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Line:
    """Up to an offset of `until` seconds, either way, the step is `slope` times it, and `start`."""

    until: float
    slope: float
    start: float


@dataclass(frozen=True, slots=True)
class Rule:
    """How much of a score is kept at each probe, how much a step counts, and what offsets are worth up to 750 ms.

    `gain` is 20 (1 - `decay`), so that a score settles at twenty times the mean step. The lines follow each other.
    """

    decay: float
    gain: float
    lines: Sequence[Line]


RULE = Rule(0.95, 1.0, (Line(0.025, 0, 1), Line(0.1, -6.667, 1.167), Line(0.75, -2.308, 0.731)))


def step(result: ProbeResult, *, max_stratum: int = 7, rule: Rule = RULE) -> Step:
    """The lowest step that applies to a probe; the pool does not want strata above `max_stratum`."""
    if result.kiss is not None:
        value, cap = _KISSES.get(result.kiss, (-2.0, 5.0))
        return Step(value, cap, f"the kiss code {result.kiss}")
    if result.offset is None or result.stratum is None:
        return Step(-5, reason="no authenticated answer")
    return min(_faults(result, max_stratum, rule), key=lambda found: found.value)


# With one exchange of a probe lost, and with more.
_LOSSES = (0.75, 0.25)
_KISSES = {"RATE": (-3.5, MAX_SCORE), "DENY": (-10.0, -50.0), "RSTR": (-10.0, -50.0)}


def _faults(result: ProbeResult, max_stratum: int, rule: Rule) -> list[Step]:
    assert result.offset is not None
    assert result.stratum is not None
    found = [_offset_step(abs(result.offset), rule)]
    if result.stratum > max_stratum:
        found.append(Step(-4, reason=f"stratum {result.stratum}, where {max_stratum} is the pool's limit"))
    if result.leap == Leap.UNSYNCHRONISED:
        found.append(Step(-4, reason="the server is not synchronised"))
    if result.root_distance > MAX_DISTANCE:
        found.append(Step(-4, reason=f"a root distance of {result.root_distance / _SECOND:.1f} s"))
    if result.lost > 0:
        # Losses alone settle at a third of all round trips: a server that loses more is out.
        value = _LOSSES[min(result.lost, len(_LOSSES)) - 1]
        found.append(Step(value, reason=f"{result.lost} of {result.exchanges} exchanges lost"))
    if result.cookies < result.asked:
        found.append(Step(-1, reason=f"{result.cookies} of {result.asked} cookies"))
    return found


def _offset_step(offset: int, rule: Rule) -> Step:
    """`offset` in nanoseconds, not negative."""
    seconds = offset / _SECOND
    reason = f"the clock is {seconds:.3f} s off, where {rule.lines[0].until:.3f} s is a full step"
    if offset > 3 * _SECOND:
        return Step(-4, -20, reason)
    for line in rule.lines:
        if seconds <= line.until:
            value = line.slope * seconds + line.start
            return Step(value, reason=reason if value < FULL_STEP else "")
    return Step(-2, reason=reason)


def advance(score: float, found: Step, rule: Rule = RULE) -> float:
    """The score after a step."""
    return max(MIN_SCORE, min(rule.decay * score + rule.gain * found.value, found.cap))


def sampling_weight(
    weight: int,
    cap: float | None,
    traffic: float | None,
    ke_cap: float | None = None,
    ke_traffic: float | None = None,
    *,
    score: float = MAX_SCORE,
) -> int:
    """The share of a server in the answer, in tenths: as its member wants it, less what it cannot answer.

    `cap` and `traffic` are NTP requests a second, `ke_cap` and `ke_traffic` NTS-KE connections a minute; the worse of
    both counts, since a client needs both. `score` is that of its best address: who was just bad comes back by degrees.
    Both are in tenths, so that not every flutter draws the answer anew.
    """
    answered = capacity(cap, traffic, ke_cap, ke_traffic)
    return max(1, round(weight * answered * round(10 * share(score))))


def capacity(
    cap: float | None, traffic: float | None, ke_cap: float | None = None, ke_traffic: float | None = None
) -> float:
    """The part of what comes that a server answers, from 0 to 1, by its own caps."""
    return min(_answered(cap, traffic), _answered(ke_cap, ke_traffic))


def _answered(cap: float | None, traffic: float | None) -> float:
    return min(1.0, cap / traffic) if cap is not None and traffic else 1.0
