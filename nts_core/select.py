"""Which sources tell the truth, and what they say together (RFC 5905 section 11.2): pure.

Each source claims that the true offset lies within its root distance of the offset measured. The intersection
algorithm finds the smallest interval that a majority of the claims share; who does not reach into it is a
falseticker. Of the others the cluster algorithm leaves out who scatters the result most, while enough are left; the
survivors' offsets are combined.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nts_core.association import Sample

# chrony's and ntpd's bound, above RFC 5905's MAXDIST of one second: who admits to be worse is of no use, and could hide any error behind its admission.
MAX_DISTANCE = 1_500_000_000
# RFC 5905's MINDISP: no claim is believed to be narrower, whatever a local network makes of it.
MIN_DISTANCE = 5_000_000
# RFC 5905's NMIN: so many survivors are left whatever they say.
MIN_SURVIVORS = 3


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one source claims: offset, root distance, and the jitter of its samples, in nanoseconds."""

    offset: int
    distance: int
    jitter: float = 0.0


@dataclass(frozen=True, slots=True)
class Selection:
    """The indices of the truechimers, and what they say: `offset` is None when there is no majority.

    `survivors` are those of them whose offsets make it, `jitter` (nanoseconds) how far these are apart, `interval`
    from where to where the truth lies if the majority is right.
    """

    truechimers: frozenset[int]
    offset: int | None
    survivors: frozenset[int] = frozenset()
    jitter: float = 0.0
    interval: tuple[int, int] = (0, 0)


def unfit(sample: Sample) -> str | None:
    """Why a source may not even vote, by its own words (RFC 5905's fit test); None when it may."""
    if not sample.synchronised:
        return "it says that it is not synchronised"
    if sample.root_distance > MAX_DISTANCE:
        return f"it admits to be up to {sample.root_distance / 1e9:.1f} s wrong"
    return None


def best(samples: Sequence[Sample]) -> Sample:
    """The sample with the least delay: the one least disturbed on its way (RFC 5905 section 10)."""
    return min(samples, key=lambda sample: sample.delay)


def estimate(samples: Sequence[Sample]) -> Estimate:
    """One source's claim from its samples: the best one, widened by how far the others scatter.

    The jitter is the mean square of that (RFC 5905 section 10), or the clock's resolution if that is more.
    """
    chosen = best(samples)
    scatter = [abs(sample.offset - chosen.offset) for sample in samples]
    mean = math.sqrt(sum(each * each for each in scatter) / max(1, len(samples) - 1))
    resolution = 1e9 * 2.0 ** min(chosen.precision, 0)
    return Estimate(
        chosen.offset, max(chosen.root_distance, MIN_DISTANCE) + max(scatter), max(mean, resolution)
    )


def select(estimates: Sequence[Estimate]) -> Selection:
    """Split the sources into truechimers and the rest, and combine the truechimers' offsets.

    As few falsetickers as possible are allowed for, always fewer than half of the sources.
    """
    for falsetickers in range((len(estimates) + 1) // 2):
        interval = _intersection(estimates, len(estimates) - falsetickers)
        if interval is None:
            continue
        low, high = interval
        chosen = frozenset(
            index
            for index, claim in enumerate(estimates)
            if claim.offset - claim.distance <= high and claim.offset + claim.distance >= low
        )
        survivors, jitter = _cluster(estimates, chosen)
        offset = _combine([estimates[index] for index in survivors])
        return Selection(chosen, offset, survivors, jitter, interval)
    return Selection(frozenset(), None)


def _intersection(estimates: Sequence[Estimate], wanted: int) -> tuple[int, int] | None:
    """From the lowest to the highest point that at least `wanted` claims cover, None when there is none."""
    low = _lowest(((claim.offset, claim.distance) for claim in estimates), wanted)
    mirrored = _lowest(((-claim.offset, claim.distance) for claim in estimates), wanted)
    return None if low is None or mirrored is None else (low, -mirrored)


def _lowest(claims: Iterable[tuple[int, int]], wanted: int) -> int | None:
    edges = sorted(
        edge for offset, distance in claims for edge in ((offset - distance, 0), (offset + distance, 1))
    )
    covering = 0
    for point, is_upper in edges:
        covering += -1 if is_upper else 1
        if covering >= wanted:
            return point
    return None


def _cluster(estimates: Sequence[Estimate], chosen: frozenset[int]) -> tuple[frozenset[int], float]:
    """Leave out who is farthest from the others, until that is less than a source's own jitter (section 11.2.2)."""
    left = set(chosen)
    while True:
        farthest, spread = max(
            ((index, _spread(estimates, index, left)) for index in sorted(left)), key=lambda found: found[1]
        )
        if len(left) <= MIN_SURVIVORS or spread < min(estimates[index].jitter for index in left):
            return frozenset(left), spread
        left.remove(farthest)


def _spread(estimates: Sequence[Estimate], index: int, left: set[int]) -> float:
    """The selection jitter of one source: how far the others are from it."""
    squares = sum((estimates[index].offset - estimates[other].offset) ** 2 for other in left)
    return math.sqrt(squares / max(1, len(left) - 1))


def _combine(chosen: Sequence[Estimate]) -> int:
    """The mean of the offsets weighted by the inverse of the distances (RFC 5905 section 11.2.3)."""
    weights = [1 / claim.distance for claim in chosen]
    return round(
        sum(claim.offset * weight for claim, weight in zip(chosen, weights, strict=True)) / sum(weights)
    )
