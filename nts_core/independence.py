"""Which servers of a pool to use, so that they neither fail nor lie together (draft-ladd-nts-for-ntp-pool-00). Pure.

Two servers are independent when they share no operator, no autonomous system, no /24 or /48 and no country. What is not
known of a server is not assumed to be the same as another's.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from ipaddress import ip_address, ip_network
from itertools import combinations

from nts_core.metadata import Metadata

# Every choice of some of so many is looked at: 12,870 of them at most.
MAX_CANDIDATES = 16
# By IP version: what one site is commonly given as a whole.
_PREFIX = {4: 24, 6: 48}


class Bond(IntEnum):
    """What two servers may have in common, the worst first."""

    OPERATOR = 0
    NETWORK = 1
    PREFIX = 2
    COUNTRY = 3

    def __str__(self) -> str:
        return _WORDS[self]


_WORDS = {
    Bond.OPERATOR: "operator",
    Bond.NETWORK: "network",
    Bond.PREFIX: "address prefix",
    Bond.COUNTRY: "country",
}


@dataclass(frozen=True)
class Candidate:
    """One target of the pool's SRV answer, with what the pool's zone says of it."""

    name: str
    port: int = 4460
    priority: int = 0
    addresses: tuple[str, ...] = ()
    metadata: Metadata | None = None

    @cached_property
    def traits(self) -> tuple[frozenset[object], ...]:
        """What of it may be shared, by Bond."""
        known = self.metadata
        return (
            frozenset(() if known is None else (known.operator,)),
            frozenset(() if known is None else known.networks),
            frozenset(map(prefix_of, self.addresses)),
            frozenset(() if known is None else known.countries),
        )

    def bonds(self, other: "Candidate") -> tuple[Bond, ...]:
        """What the two have in common."""
        return tuple(bond for bond in Bond if self.traits[bond] & other.traits[bond])


def prefix_of(address: str) -> str:
    """The /24 or /48 that an IP address is in."""
    version = ip_address(address).version
    return str(ip_network((address, _PREFIX[version]), strict=False))


@dataclass(frozen=True, slots=True)
class GivenUp:
    """Two servers that are used together though they share something; by names, in the order of the alphabet."""

    names: tuple[str, str]
    bonds: tuple[Bond, ...]

    def __str__(self) -> str:
        return f"{' and '.join(self.names)} have the same {', '.join(map(str, self.bonds))}"


def given_up(used: Sequence[Candidate]) -> tuple[GivenUp, ...]:
    """Where servers in use are not independent of each other."""
    return tuple(
        GivenUp((min(one.name, other.name), max(one.name, other.name)), bonds)
        for one, other in combinations(used, 2)
        if (bonds := one.bonds(other))
    )


def dependence(used: Sequence[Candidate]) -> int:
    """How much servers in use depend on each other: less is better, 0 is not at all."""
    return _weigh(combinations(used, 2))


def choose(waiting: Sequence[Candidate], count: int, *, beside: Sequence[Candidate] = ()) -> list[Candidate]:
    """The `count` of `waiting` to use beside those in use, or all if there are fewer, in the order of `waiting`.

    That is the order of RFC 2782. A lower priority goes before everything. Among servers of one priority, that choice is
    taken which has the fewest pairs of one operator; of such choices the one with the fewest pairs of one network; then
    prefix; then country; and of those that are left the one that comes first. All choices are looked at, so that a first
    server that is tied to many others does not spoil it. Only the first MAX_CANDIDATES count.
    """
    chosen: list[Candidate] = []
    limited = waiting[:MAX_CANDIDATES]
    for priority in sorted({candidate.priority for candidate in limited}):
        level = [candidate for candidate in limited if candidate.priority == priority]
        room = min(count - len(chosen), len(level))
        chosen += _best(level, room, [*beside, *chosen])
    return chosen


def _best(level: Sequence[Candidate], count: int, beside: Sequence[Candidate]) -> list[Candidate]:
    to_used = [_weigh((candidate, other) for other in beside) for candidate in level]
    between = {
        pair: _weigh([(level[pair[0]], level[pair[1]])]) for pair in combinations(range(len(level)), 2)
    }

    def cost(choice: tuple[int, ...]) -> int:
        return sum(to_used[index] for index in choice) + sum(
            between[pair] for pair in combinations(choice, 2)
        )

    # Choices come in lexicographic order, and `min` takes the first of equals.
    return [level[index] for index in min(combinations(range(len(level)), count), key=cost)]


def _weigh(pairs: Iterable[tuple[Candidate, Candidate]]) -> int:
    """The pairs' bonds as one number, in which one worse bond weighs more than all better ones together."""
    return sum(_WEIGHTS[bond] for one, other in pairs for bond in one.bonds(other))


# A server is in a pair with each other one at most; the number of pairs stays far below the ratio.
_WEIGHTS = {bond: 10_000 ** (len(Bond) - 1 - bond) for bond in Bond}
