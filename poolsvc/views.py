"""What a probe makes of a monitor's view of an address, and what several views of it come to in words: pure.

A view is a row of `poolsvc.models.MonitorView`, or anything with the same names.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol

from nts_core.control import NameFinding, ProbeResult, Stage
from nts_core.errors import printable
from poolsvc import scoring
from poolsvc.scoring import RULE, Rule, Step
from poolsvc.verdicts import AHEAD, FRESH_HOPELESS

# What is wrong with a name in DNS, and so with the pool.
_AMISS = frozenset({NameFinding.ALIAS, NameFinding.ABSENT, NameFinding.ELSEWHERE})
PROBED = tuple(Stage)[tuple(Stage).index(Stage.TCP) : tuple(Stage).index(Stage.OFFSET) + 1]
_AVERAGED = timedelta(days=1)  # over which means move
_LEAST_SHARE = 1 / 500  # of one probe in a mean, however soon it comes


class Seen(Protocol):
    """What is read of a view."""

    @property
    def score(self) -> float | None: ...
    @property
    def shadow_score(self) -> float | None: ...
    @property
    def points(self) -> int: ...
    @property
    def full_probes(self) -> int: ...
    @property
    def at(self) -> datetime | None: ...
    @property
    def failed(self) -> Stage | None: ...
    @property
    def failed_since(self) -> datetime | None: ...
    @property
    def silent_since(self) -> datetime | None: ...
    @property
    def detail(self) -> str: ...
    @property
    def mean_delay_ns(self) -> int | None: ...


def is_full(result: ProbeResult, step: Step) -> bool:
    """Whether nothing was found wrong. A name that clients cannot use is the pool's fault and no step; it admits nobody."""
    is_found = result.names not in {NameFinding.ALIAS, NameFinding.ABSENT}
    return step.value >= scoring.FULL_STEP and result.failed is None and is_found


def is_silence(result: ProbeResult) -> bool:
    """Whether nothing came of it that only the server could have sent."""
    return result.is_silent and result.offset is None and result.kiss is None


@dataclass(frozen=True, slots=True)
class Measure:
    """How probes are turned into scores: by the rule that counts, and by one on trial."""

    max_stratum: int
    rule: Rule = RULE
    shadow: Rule | None = None

    def step(self, result: ProbeResult) -> Step:
        return scoring.step(result, max_stratum=self.max_stratum, rule=self.rule)


def is_later(before: datetime, at: datetime, apart: timedelta, now: datetime) -> bool:
    """Whether a probe is later than the last one by what lies between two. A last one that is yet to come never was."""
    return at - before >= apart if before <= now + AHEAD else True


def after(
    before: Seen,
    result: ProbeResult,
    at: datetime,
    measure: Measure,
    *,
    begins_with: float | None,
    is_exempt: bool,
) -> dict[str, Any]:
    """What the view is after a probe that began at `at`, later than the one before.

    `begins_with` is the pool's own score of the address, where a view begins that has none yet, or has seen nothing for so long
    that it says nothing of now: of a monitor that was away, or was not well; None before admission.
    One that is exempt, during maintenance, does not count against the server.
    """
    step = measure.step(result)
    is_old = before.at is not None and not -FRESH_HOPELESS <= at - before.at <= FRESH_HOPELESS
    score, full_probes = (None, 0) if is_old else (before.score, before.full_probes)
    if score is None:
        score = begins_with
    if score is not None:
        score = _moved(score, step, measure.rule, is_exempt=is_exempt)
    elif not is_exempt:
        full_probes = full_probes + 1 if is_full(result, step) else 0
    shadow = None
    if score is not None and (rule := measure.shadow) is not None:
        known = (None, None) if is_old else (before.shadow_score, before.score)
        begin = next((each for each in (*known, begins_with) if each is not None), None)
        by_rule = scoring.step(result, max_stratum=measure.max_stratum, rule=rule)
        shadow = score if begin is None else _moved(begin, by_rule, rule, is_exempt=is_exempt)
    share = _share(before.at, at)
    return {
        "at": at,
        "score": score,
        "shadow_score": shadow,
        "full_probes": full_probes,
        "points": before.points + 1,
        "failed": result.failed,
        "failed_since": _since(before.failed_since, at, is_so=result.failed is not None),
        "silent_since": _since(before.silent_since, at, is_so=is_silence(result)),
        "detail": printable(result.detail)[:300],
        "step": step.value,
        "step_reason": printable(step.reason)[:200],
        "offset_ns": result.offset,
        "delay_ns": result.delay,
        "fingerprint": result.fingerprint,
        "names": result.names if result.names in _AMISS else None,
        "mean_delay_ns": before.mean_delay_ns
        if result.delay is None
        else round(_mean(before.mean_delay_ns, result.delay, share)),
    }


def _moved(score: float, step: Step, rule: Rule, *, is_exempt: bool) -> float:
    moved = scoring.advance(score, step, rule)
    return max(score, moved) if is_exempt else moved


def _since(before: datetime | None, at: datetime, *, is_so: bool) -> datetime | None:
    return (before or at) if is_so else None


def _share(before: datetime | None, at: datetime) -> float:
    """The weight of a probe in a moving average: all of the first one, little of one that comes soon."""
    if before is None:
        return 1.0
    return max(_LEAST_SHARE, 1 - math.exp(-(at - before) / _AVERAGED))


def _mean(before: float | None, value: float, share: float) -> float:
    return value if before is None else before + share * (value - before)


def first_failure(views: Sequence[Seen]) -> tuple[int, str]:
    """The first stage that more than half of some views find not met, as its place in `PROBED`, and what one says of it.

    The place after the last one when there is none.
    """
    places = sorted(
        (len(PROBED) if view.failed is None else PROBED.index(view.failed), view.detail) for view in views
    )
    return places[len(places) // 2] if places else (len(PROBED), "")
