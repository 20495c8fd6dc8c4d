"""Who gets into which answer: sets of SRV targets for the pool's name and for each of its regions. Pure.

1. A set is drawn by weight, one server after the other, none twice. Drawing again whenever a server may not be in it is the
   same as drawing among those that may.
2. In one set at most one server is of a member, of a network (AS) and of a /24 or /48, while there are others. Where there
   are not, networks are forgiven first, then prefixes, then members: a set that is too small serves nobody.
3. A region is drawn from its own servers while it is of the wanted size. Below it, its own have a quarter of the places and
   the region around it has the others: who is alone in a country is in each answer, but never a part of it that counts.
4. Once older servers suffice, those of young accounts together have no more than their part of a region's weight.
5. Many sets lie on a name, as many as the pool's size wants, and all are drawn anew each TTL. The same draw of the same
   servers gives the same sets.
"""

import math
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import IntEnum
from hashlib import blake2b
from itertools import accumulate

from poolsvc.regions import WORLD, wider

_TRIES = 48  # before those that may follow are looked for one by one
_OWN_SHARE = 4  # of the places of a thin region, its own servers get one of so many
_HALVINGS = 50  # of a stretch of time: more than a share needs
# Sets on the pool's name by its size: enough that each server is in several each minute (docs/answers.md).
_SETS = ((100, 16), (1_000, 64), (20_000, 256), (50_000, 2_048))
_MOST_SETS = 8_192


@dataclass(frozen=True, slots=True)
class Candidate:
    """A server that may be a target; `weight` is relative to the others.

    `networks` are AS numbers, `prefixes` the /24 and /48 of its addresses, `regions` the labels of continents and countries
    that it is in. `since` is when its member's account began, aware UTC; None: long ago.
    """

    name: str
    member: int
    weight: int = 1
    networks: tuple[int, ...] = ()
    prefixes: tuple[str, ...] = ()
    regions: frozenset[str] = frozenset()
    since: datetime | None = None

    def __post_init__(self) -> None:
        if self.weight < 1:
            raise ValueError(f"{self.name}: the weight must be positive")


@dataclass(frozen=True, slots=True)
class Rules:
    """What the pool decided of its answers: `places` in a set, `region_size` servers in a region that needs no others.

    Accounts younger than `young` together have `young_percent` of a region's weight at most.
    """

    places: int
    region_size: int = 16
    region_sets: int = 16
    young: timedelta = timedelta(days=30)
    young_percent: int = 20


Names = tuple[str, ...]
AnswerSets = Mapping[str, tuple[Names, ...]]
"""By region label the sets on its name."""


def sets_for(servers: int, places: int) -> int:
    """How many sets lie on the pool's name when so many servers are candidates."""
    if servers <= places:
        return 1
    return next((sets for size, sets in _SETS if servers <= size), _MOST_SETS)


class _Leniency(IntEnum):
    """What two servers of one set may have in common; each forgives what those before do."""

    NOTHING = 0
    NETWORK = 1
    PREFIX = 2
    MEMBER = 3


@dataclass(slots=True)
class _Set:
    """A set while it is drawn."""

    names: dict[str, None] = field(default_factory=dict)
    members: set[int] = field(default_factory=set)
    networks: set[int] = field(default_factory=set)
    prefixes: set[str] = field(default_factory=set)

    def takes(self, one: Candidate, leniency: _Leniency) -> bool:
        if one.name in self.names:
            return False
        if leniency >= _Leniency.MEMBER:
            return True
        if one.member in self.members:
            return False
        if leniency < _Leniency.PREFIX and not self.prefixes.isdisjoint(one.prefixes):
            return False
        return leniency >= _Leniency.NETWORK or self.networks.isdisjoint(one.networks)

    def add(self, one: Candidate) -> None:
        self.names[one.name] = None
        self.members.add(one.member)
        self.networks.update(one.networks)
        self.prefixes.update(one.prefixes)


class _Urn:
    """The servers of one region, to be drawn by weight."""

    def __init__(self, candidates: Sequence[Candidate], rules: Rules, now: datetime) -> None:
        self.candidates = candidates
        self.members = {one.member for one in candidates}
        self._is_young = [is_young(one.since, rules, now) for one in candidates]
        self.weights = _weights(candidates, self._is_young, rules)
        self._sums = list(accumulate(self.weights))

    def shares(self) -> Iterator[tuple[Candidate, float, bool]]:
        """Of each server the weight by which it is drawn, and whether its account is young."""
        return zip(self.candidates, self.weights, self._is_young, strict=True)

    def fill(self, drawn: _Set, places: int, chance: Callable[[], float]) -> None:
        """Draw until so many are in the set, or all are."""
        for leniency in _Leniency:
            if leniency < _Leniency.MEMBER and self.members <= drawn.members:
                continue
            rest: Sequence[int] | None = None  # those that may follow, once they had to be looked for
            while len(drawn.names) < places:
                one = self._by_chance(drawn, leniency, chance) if rest is None else None
                if one is None:
                    some = range(len(self.candidates)) if rest is None else rest
                    rest = [at for at in some if drawn.takes(self.candidates[at], leniency)]
                    if not rest:
                        break
                    sums = list(accumulate(self.weights[at] for at in rest))
                    one = self.candidates[rest[self._at(sums, chance() * sums[-1])]]
                drawn.add(one)

    def _by_chance(self, drawn: _Set, leniency: _Leniency, chance: Callable[[], float]) -> Candidate | None:
        """One that may follow, if a few drawings find any."""
        for _ in range(_TRIES if self.candidates else 0):
            one = self.candidates[self._at(self._sums, chance() * self._sums[-1])]
            if drawn.takes(one, leniency):
                return one
        return None

    @staticmethod
    def _at(sums: Sequence[float], value: float) -> int:
        """Whose share of the sum a value lies in; rounding may put it at the very end."""
        return min(bisect_right(sums, value), len(sums) - 1)


def is_young(since: datetime | None, rules: Rules, now: datetime) -> bool:
    """Whether an account is too young for its servers to have their whole weight."""
    return since is not None and now - since < rules.young


def _weights(candidates: Sequence[Candidate], young: Sequence[bool], rules: Rules) -> list[float]:
    """Of each its weight, but that young accounts together have no more than their part once older servers suffice."""
    if not any(young):
        return [float(one.weight) for one in candidates]
    factor = young_factor(
        ((one.member, one.weight, is_new) for one, is_new in zip(candidates, young, strict=True)), rules
    )
    return [one.weight * (factor if is_new else 1.0) for one, is_new in zip(candidates, young, strict=True)]


def young_factor(servers: Iterable[tuple[int, float, bool]], rules: Rules) -> float:
    """What part of their weight servers of young accounts have; of each its member, its weight and whether it is one.

    Older servers suffice when those of so many members as there are places need nobody else to fill a set.
    """
    sums, members = {True: 0.0, False: 0.0}, set[int]()
    for member, weight, is_new in servers:
        sums[is_new] += weight
        if not is_new:
            members.add(member)
    most = sums[False] * rules.young_percent / (100 - rules.young_percent)
    if len(members) < rules.places or sums[True] <= most:
        return 1.0
    return most / sums[True]


@dataclass(frozen=True, slots=True)
class Standing:
    """How a region came out of a draw: its own servers, and from which regions its sets are filled while it is thin.

    `young_wanted` is the part of its weight, from 0 to 1, that young accounts would have, `young_given` what they have.
    """

    region: str
    servers: int
    members: int
    filled_from: tuple[str, ...]
    young_wanted: float
    young_given: float

    @property
    def is_thin(self) -> bool:
        return bool(self.filled_from)


def _part(some: float, of: float) -> float:
    return some / of if of else 0.0


class Draw:
    """The sets of one draw, and those again in which somebody was who is gone.

    `regions` are the labels that are switched on, the world aside, `number` is the draw's; `now` tells who is young.
    """

    def __init__(
        self,
        candidates: Iterable[Candidate],
        regions: Collection[str],
        rules: Rules,
        number: int,
        now: datetime,
    ) -> None:
        self._number = number
        self._rules = rules
        self._regions = [WORLD, *sorted(regions)]
        # In the order of their names: the same servers are drawn alike, whatever order they come in.
        everybody = sorted(candidates, key=lambda one: one.name)
        around = {wider(region) for region in regions} | {wider(wider(region)) for region in regions}
        own: dict[str, list[Candidate]] = {label: [] for label in {*self._regions, *around}}
        own[WORLD] = everybody
        for one in everybody:
            for region in own.keys() & one.regions:
                own[region].append(one)
        self._urns = {region: _Urn(some, rules, now) for region, some in own.items()}

    def standing(self, region: str) -> Standing:
        """How one of its regions came out, the world among them."""
        urn, filled_from = self._urns[region], list[str]()
        around = region
        while self.is_thin(around):
            around = wider(around)
            filled_from.append(around)
        young = [(one.weight, given) for one, given, is_new in urn.shares() if is_new]
        return Standing(
            region,
            servers=len(urn.candidates),
            members=len(urn.members),
            filled_from=tuple(filled_from),
            young_wanted=_part(sum(wanted for wanted, _ in young), sum(one.weight for one in urn.candidates)),
            young_given=_part(sum(given for _, given in young), sum(urn.weights)),
        )

    def weights(self, region: str) -> Sequence[tuple[Candidate, float]]:
        """A region's own servers, or those around one, with the weight by which each is drawn."""
        return [(one, weight) for one, weight, _ in self._urns[region].shares()]

    def is_thin(self, region: str) -> bool:
        """Whether a region takes servers from around it: too few of its own, or of too few members."""
        urn = self._urns[region]
        is_small = len(urn.candidates) < self._rules.region_size
        return region != WORLD and (is_small or len(urn.members) < self._rules.places)

    def sets(self) -> dict[str, tuple[Names, ...]]:
        """All of it."""
        return {
            region: tuple(self.set_at(region, index) for index in range(self._count(region)))
            for region in self._regions
        }

    def again(self, sets: AnswerSets, gone: Collection[str]) -> dict[str, tuple[Names, ...]]:
        """The sets of an earlier one of the same number and regions; those that name one of the gone are drawn anew.

        Nobody else moves, and who came meanwhile waits for the next draw.
        """
        out = frozenset(gone)
        return {
            region: tuple(
                names if out.isdisjoint(names) else self.set_at(region, index)
                for index, names in enumerate(some)
            )
            for region, some in sets.items()
        }

    def _count(self, region: str) -> int:
        servers, places = len(self._urns[WORLD].candidates), self._rules.places
        sets = sets_for(servers, places)
        return sets if region == WORLD else min(sets, self._rules.region_sets)

    def set_at(self, region: str, index: int) -> Names:
        """One of the sets, of which there may be as many as anybody wants."""
        seed = blake2b(f"{self._number} {region} {index}".encode(), digest_size=8).digest()
        chance = random.Random(int.from_bytes(seed, "big")).random  # noqa: S311 - it repeats, so that a draw does
        drawn = _Set()
        for urn, places in self._shares(region):
            urn.fill(drawn, places, chance)
        return tuple(sorted(drawn.names))

    def _shares(self, region: str) -> Iterator[tuple[_Urn, int]]:
        """From where a set is filled, and up to how many."""
        filled = 0
        while self.is_thin(region):
            filled += max(1, self._rules.places // _OWN_SHARE)
            yield self._urns[region], filled
            region = wider(region)
        yield self._urns[region], self._rules.places


@dataclass(frozen=True, slots=True)
class Odds:
    """How often a server is in a set on the pool's name, over all draws; what has to be known of the others.

    Its waiting times are exponential, so a server is chosen before a moment with the chance 1 - exp(-weight * moment).
    The set is taken for full at the moments until which as many are chosen, on average, as there is room for: `first`
    for one server of each member, `rest` for the others. Exact among equals, and good to a few percent else; that of a
    network or a prefix there is one server as well is not counted.
    """

    members: Mapping[int, float]  # the weight of all servers of each
    first: float
    rest: float
    young: float = 1.0  # the part of its weight by which the server of a young account is drawn

    @classmethod
    def of(cls, candidates: Iterable[tuple[int, float, bool]], rules: Rules) -> "Odds":
        """Of all candidates: member and weight of each, and whether its account is young."""
        servers, count = list(candidates), rules.places
        young = young_factor(servers, rules)
        weights, members = Counter[float](), dict[int, float]()
        for member, full, is_new in servers:
            weight = full * young if is_new else full
            weights[weight] += 1
            members[member] = members.get(member, 0.0) + weight
        of_members = Counter(members.values())
        room = count - len(members)  # beside one server of each
        first, rest = math.inf, 0.0
        if room < 0:
            first = _moment(lambda moment: _chosen(of_members, moment), count)
        elif weights.total() <= count:
            rest = math.inf
        elif room > 0:
            rest = _moment(lambda moment: _chosen(weights, moment) - _chosen(of_members, moment), room)
        return cls(members, first, rest, young)

    def chance(self, member: int, weight: float, *, is_young: bool = False) -> float:
        """The part of the answers, from 0 to 1, that a candidate is in."""
        weight *= self.young if is_young else 1.0
        of_member = max(self.members.get(member, 0), weight)
        is_first = weight / of_member  # of its member's servers
        as_first = is_first * _passed(of_member, self.first)
        return as_first + _passed(weight, self.rest) - is_first * _passed(of_member, self.rest)


def _passed(weight: float, moment: float) -> float:
    return -math.expm1(-weight * moment)


def _chosen(weights: Mapping[float, int], moment: float) -> float:
    """How many of so many of each weight are chosen until a moment, on average."""
    return sum(number * _passed(weight, moment) for weight, number in weights.items())


def _moment(chosen: Callable[[float], float], wanted: int) -> float:
    """Until when so many are chosen; `chosen` grows with the moment, beyond that."""
    low, high = 0.0, 1.0
    while chosen(high) < wanted:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if chosen(middle) < wanted else (low, middle)
    return high
