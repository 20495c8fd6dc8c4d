"""In how few hands a pool is: what one answer is made of, who holds most, and what a majority of a client's sources takes. Pure.

The model is a client that takes TAKEN of the servers of one answer, whichever, and believes what MAJORITY of them say. An
answer of which a part of TIPPING is hostile gives it a hostile majority every second time.

1. `to_add`: so many hostile servers, of a typical weight and each of an account, a network and a prefix of its own, would
   have to join. While their accounts are young they cannot get there, once older servers suffice.
2. `to_take`: so many of the present members, the heaviest first, would have to be hostile together.

A thin region gives its own servers a quarter of the places at most, so that a majority has to come from around it, or after
so many have joined that it is thin no more.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from poolsvc.drawing import Candidate, Draw, Names, Odds, Rules
from poolsvc.regions import CONTINENT_OF, WORLD, wider

TAKEN, MAJORITY = 4, 3
TIPPING = 0.6143  # p where p^4 + 4 p^3 (1 - p) is one half


@dataclass(frozen=True, slots=True)
class Largest:
    """Who or what holds most of a region's weight, and which part of it."""

    what: Hashable
    share: float


@dataclass(frozen=True, slots=True)
class Varied:
    """Parts of the answers, from 0 to 1, with TAKEN different operators, networks or prefixes, and with all of that at once."""

    operators: float
    networks: float
    prefixes: float
    all: float


@dataclass(frozen=True, slots=True)
class Concentration:
    """One region. None where nobody is, or nobody's place is known; `to_take` is None too if all members are too few."""

    region: str
    servers: int
    members: int
    varied: Varied | None
    operator: Largest | None
    network: Largest | None
    country: Largest | None
    to_add: int | None
    to_take: int | None


def look(draw: Draw, sets: Mapping[str, Sequence[Names]], rules: Rules) -> dict[str, Concentration]:
    """All regions of a draw; `sets` are those of that draw."""
    return {region: _region(draw, region, some, rules) for region, some in sets.items()}


def _region(draw: Draw, region: str, sets: Sequence[Names], rules: Rules) -> Concentration:
    weights = draw.weights(region)
    standing = draw.standing(region)
    return Concentration(
        region=region,
        servers=standing.servers,
        members=standing.members,
        varied=_varied(sets, {one.name: one for one, _ in draw.weights(WORLD)}),
        operator=_largest(weights, lambda one: (one.member,)),
        network=_largest(weights, lambda one: one.networks),
        country=_largest(weights, lambda one: one.regions & CONTINENT_OF.keys()),
        to_add=_to_add(draw, region, rules),
        to_take=_to_take(draw, region, rules),
    )


def _varied(sets: Sequence[Names], by_name: Mapping[str, Candidate]) -> Varied | None:
    kinds: tuple[Callable[[Candidate], Collection[Hashable]], ...] = (
        lambda one: (one.member,),
        lambda one: one.networks,
        lambda one: one.prefixes,
    )
    answers = [[by_name[name] for name in names] for names in sets if names]
    if not answers:
        return None
    found = [[_different(some, kind) >= TAKEN for kind in kinds] for some in answers]
    operators, networks, prefixes = (sum(column) / len(found) for column in zip(*found, strict=True))
    return Varied(operators, networks, prefixes, sum(map(all, found)) / len(found))


def _different(servers: Iterable[Candidate], kind: Callable[[Candidate], Collection[Hashable]]) -> int:
    """How many of them have nothing of a kind in common, counted one after the other; what is not known is shared by nobody."""
    seen, count = set[Hashable](), 0
    for one in servers:
        values = set(kind(one))
        count += seen.isdisjoint(values)
        seen |= values
    return count


def _largest(
    weights: Iterable[tuple[Candidate, float]], kind: Callable[[Candidate], Collection[Hashable]]
) -> Largest | None:
    held, total = defaultdict[Hashable, float](float), 0.0
    for one, weight in weights:
        total += weight
        for value in kind(one):
            held[value] += weight
    if not held:
        return None
    what, most = max(held.items(), key=lambda item: (item[1], str(item[0])))
    return Largest(what, most / total)


def _to_add(draw: Draw, region: str, rules: Rules) -> int | None:
    weights = [weight for _, weight in draw.weights(region)]
    around = None if region == WORLD else _to_add(draw, wider(region), rules)
    if not weights:
        return around
    needed = max(MAJORITY, math.ceil(TIPPING / (1 - TIPPING) * sum(weights) / median(weights)))
    if not draw.is_thin(region):
        return needed
    standing = draw.standing(region)
    needed = max(needed, rules.region_size - standing.servers, rules.places - standing.members)
    return needed if around is None else min(needed, around)


def _to_take(draw: Draw, region: str, rules: Rules) -> int | None:
    while draw.is_thin(region):
        region = wider(region)
    weights = draw.weights(region)
    odds = Odds.of(((one.member, weight, False) for one, weight in weights), rules)
    chances = defaultdict[int, float](float)
    for one, weight in weights:
        chances[one.member] += odds.chance(one.member, weight)
    needed, held = TIPPING * min(rules.places, len(weights)), 0.0
    for number, chance in enumerate(sorted(chances.values(), reverse=True), 1):
        held += chance
        if held >= needed:
            return number
    return None
