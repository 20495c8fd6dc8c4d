"""Scores of server addresses: pure, the NTP Pool's proven rule with |offset| and two more checks.

    s = min(0.95 s + step, cap), from -100 to 20; in the answer from 10 up

Twenty times the mean step is where a score settles, so the cutoff stands for a mean step of one half.
"""

from dataclasses import dataclass

from nts_core.control import ProbeResult
from nts_core.packet import Leap

DECAY = 0.95
MAX_SCORE = 20.0
CUTOFF = 10.0
ADMITTED = 12.0
FULL_STEP = 1.0
_SECOND = 1_000_000_000
_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class Step:
    """What one probe adds to a score, and the score that cannot be passed with it."""

    value: float
    cap: float = MAX_SCORE


def step(result: ProbeResult, *, max_stratum: int = 7) -> Step:
    """The lowest step that applies to a probe; the pool does not want strata above `max_stratum`."""
    if result.kiss is not None:
        return _KISSES.get(result.kiss, Step(-2, 5))
    if result.offset is None or result.stratum is None:
        return Step(-5)
    return min(_faults(result, max_stratum), key=lambda found: found.value)


_KISSES = {"RATE": Step(-3.5), "DENY": Step(-10, -50), "RSTR": Step(-10, -50)}


def _faults(result: ProbeResult, max_stratum: int) -> list[Step]:
    assert result.offset is not None
    assert result.stratum is not None
    found = [_offset_step(abs(result.offset))]
    if result.stratum > max_stratum:
        found.append(Step(-4))
    if result.leap == Leap.UNSYNCHRONISED:
        found.append(Step(-4))
    if result.root_distance > 3 * _SECOND // 2:
        found.append(Step(-4))
    if result.cookies < result.asked:
        found.append(Step(-1))
    return found


def _offset_step(offset: int) -> Step:
    """`offset` in nanoseconds, not negative; the line segments of the NTP Pool's scorer."""
    seconds = offset / _SECOND
    if offset > 3 * _SECOND:
        return Step(-4, -20)
    if offset > 750 * _MS:
        return Step(-2)
    if offset > 100 * _MS:
        return Step(-2.308 * seconds + 0.731)
    if offset > 25 * _MS:
        return Step(-6.667 * seconds + 1.167)
    return Step(FULL_STEP)


def advance(score: float, found: Step) -> float:
    """The score after a step."""
    return max(-100.0, min(DECAY * score + found.value, found.cap))
