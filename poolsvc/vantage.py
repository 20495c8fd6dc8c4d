"""Which monitors look at which address, and when: pure.

Of each address some monitors are active, which have its say, and some are testing, from whom the next active ones come. All
others are candidates, which only glance at it. Who looks at a server must not be near it in name or network, and those who
look at one server must not fail or lie together. All places are drawn by lot, some among the nearer half, whose probes say
most of the server and least of the way there, and as many among the farther half, for the nearer alone would never see that
half of the world does not reach a server. What a monitor says of a server moves it from one half into the other at most, and
neither half fills a majority of the places: nobody comes to more of them by what he says.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from hashlib import blake2b
from ipaddress import IPv4Address, IPv6Address

from poolsvc.scoring import CUTOFF, HOPELESS, MAX_SCORE, is_good

ACTIVE, TESTING = 7, 5
POINTS = 9  # sound probes, before a testing one may become active
LOST = timedelta(minutes=60)
PER_PARTY = PER_NETWORK = 2
_CHANGES, _CHANGES_BLOCKED, _CHANGES_NONE = 2, 3, 4
_LOYALTY = 0.75  # what an incumbent's lot counts, so that a small advantage changes nobody
_BESIDE = {4: 24, 6: 48}
_NEIGHBOURS = {4: 20, 6: 44}

IpAddress = IPv4Address | IPv6Address


class ViewRole(StrEnum):
    """What a monitor's view of an address is for."""

    CANDIDATE = "candidate"  # it looks now and then, and has no say
    TESTING = "testing"  # it looks regularly, and has no say yet
    ACTIVE = "active"
    PAUSED = "paused"  # it may not look at this address


@dataclass(frozen=True, slots=True)
class Target:
    """An address that is to be looked at, its server's member, and all of its server's addresses."""

    address: IpAddress
    party: int
    beside: Sequence[IpAddress] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A monitor as one address may have it.

    `party` is its member, or a number of its own: no two monitors of the pool itself are one party. `is_active` is one that
    may have a say. `addresses` are where it calls from, as far as that is known, and `network` and `region` whose and where those
    are; `families` are those in which it can probe. Since `lost_since` nothing sound came from it. `points` are its sound
    probes of the address since it has its role, `mean_delay_ns` is the round trip over about a day, as it says.
    """

    monitor: int
    party: int
    is_active: bool = True
    addresses: Sequence[IpAddress] = ()
    families: frozenset[int] = frozenset((4, 6))
    network: int | None = None
    region: str | None = None
    lost_since: datetime | None = None
    role: ViewRole = ViewRole.CANDIDATE
    points: int = 0
    mean_delay_ns: float | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """The role that a monitor is to have for an address, and why."""

    monitor: int
    role: ViewRole
    reason: str
    is_change: bool


def review(
    target: Target, candidates: Iterable[Candidate], now: datetime, *, quorum: int = 3, lot: bytes = b""
) -> list[Choice]:
    """Every monitor's role for an address, some few changes from the present ones; in the order of `candidates`.

    What is never waived: no monitor looks at its own member's server. Where fewer than `quorum` could be active otherwise,
    neighbours may be active together; where none could, one in the server's own network may. `lot` is a secret of the pool,
    or members could have the monitors drawn that they like.
    """
    everybody = list(candidates)
    blocked = {one.monitor: reason for one in everybody if (reason := _blocked(target, one))}
    beside = {one.monitor for one in everybody if one.monitor not in blocked and _is_beside(target, one)}
    free = [one for one in everybody if one.monitor not in blocked and one.monitor not in beside]
    rule = _Rule(knows_networks=_are_mostly_known(everybody))
    lost = {one.monitor for one in everybody if _is_lost(one, now) or _is_mute(target, one)}
    if not any(one.is_active and one.monitor not in lost for one in free):
        # None would be active: better one from the server's own network than none.
        free, beside = [one for one in everybody if one.monitor not in blocked], set()
    blocked |= dict.fromkeys(beside, "it is in the server's own network")
    order = _Order(free, target, lot)

    incumbents = [one for one in free if one.role is ViewRole.ACTIVE]
    heard = [one for one in free if one.monitor not in lost]
    serving = sum(one.role is ViewRole.ACTIVE for one in heard)
    able = [one for one in heard if one.is_active and _may_be_active(one, serving)]
    wanted = _choose(order, able, ACTIVE, ViewRole.ACTIVE, rule)
    if len(wanted.chosen) < quorum:
        rule = replace(rule, bears_neighbours=True)
        wanted = _choose(order, able, quorum, ViewRole.ACTIVE, rule, wanted)
    was_blocked = sum(one.role is ViewRole.ACTIVE and one.monitor in blocked for one in everybody)
    active = _settle(
        order, [one for one in incumbents if one.is_active], wanted, ACTIVE, was_blocked, rule, lost
    )

    places = TESTING + ACTIVE - len(active)
    rest = [one for one in heard if one.monitor not in active]
    # Where others can be had, no more than one of the testing ones is itself on trial everywhere.
    spare = sorted(rest, key=lambda one: (not one.is_active, order.rank(one, ViewRole.TESTING)))
    ready = sum(one.is_active for one in rest)
    others = wanted.rejected
    wanted = _choose(order, spare[: max(ready + 1, places)], places, ViewRole.TESTING, rule)
    was_testing = [one for one in free if one.role is ViewRole.TESTING and one.monitor not in active]
    testing = _settle(order, was_testing, wanted, places, 0, rule, lost)

    found = []
    for one in everybody:
        if one.monitor in blocked:
            role, reason = ViewRole.PAUSED, blocked[one.monitor]
        elif one.monitor in active:
            role, reason = ViewRole.ACTIVE, active[one.monitor]
        elif one.monitor in testing:
            role, reason = ViewRole.TESTING, testing[one.monitor]
        else:
            role = ViewRole.CANDIDATE
            objection = (
                others.get(one.monitor) or wanted.rejected.get(one.monitor) or "others have the places"
            )
            reason = "nothing sound has come from it for an hour" if one.monitor in lost else objection
        found.append(Choice(one.monitor, role, reason, role is not one.role))
    return found


def _blocked(target: Target, one: Candidate) -> str | None:
    """Why a monitor may never look at an address, whatever else there is."""
    if one.party == target.party:
        return "it is the server's own member's"
    if _is_mute(target, one) and one.role not in {ViewRole.ACTIVE, ViewRole.TESTING}:
        return f"it has no IPv{target.address.version}"
    return None


def _is_mute(target: Target, one: Candidate) -> bool:
    """Whether it has not the address's family; one that had it is as good as lost, and is not sent away before another is there."""
    return target.address.version not in one.families


def _is_beside(target: Target, one: Candidate) -> bool:
    theirs = {_prefix(address, _BESIDE) for address in (target.address, *target.beside)}
    return any(_prefix(address, _BESIDE) in theirs for address in one.addresses)


def _prefix(address: IpAddress, lengths: Mapping[int, int]) -> tuple[int, int]:
    return address.version, int(address) >> (address.max_prefixlen - lengths[address.version])


def _is_lost(one: Candidate, now: datetime) -> bool:
    return one.lost_since is not None and now - one.lost_since >= LOST


def _may_be_active(one: Candidate, serving: int) -> bool:
    """While too few are active, nobody has to have been tested."""
    is_tested = one.role is ViewRole.TESTING and one.points >= POINTS
    return one.role is ViewRole.ACTIVE or is_tested or serving < max(1, ACTIVE - 2)


def _are_mostly_known(everybody: Collection[Candidate]) -> bool:
    """Whether one whose network is not known is an exception."""
    return 2 * sum(one.network is not None for one in everybody) > len(everybody)


class _Order:
    """Monitors as an address sees them: which are near, the lot of each, and how many there are of each region.

    By those that may have a say, if any: others would move the middle.
    """

    def __init__(self, free: Sequence[Candidate], target: Target, lot: bytes) -> None:
        drawn = {
            one.monitor: blake2b(
                f"{target.address} {one.monitor}".encode(), key=lot[:64], digest_size=16
            ).digest()
            for one in free
        }
        self._lots = {monitor: int.from_bytes(digest[:8]) for monitor, digest in drawn.items()}

        def distance(one: Candidate) -> tuple[float, bytes]:
            delay = math.inf if one.mean_delay_ns is None else one.mean_delay_ns
            return delay, drawn[one.monitor][8:]

        speaking = [one for one in free if one.is_active] or free
        ordered = sorted(map(distance, speaking))
        self.near = {one.monitor for one in free if distance(one) <= ordered[(len(ordered) - 1) // 2]}
        self._regions = Counter(one.region for one in speaking)

    def rank(self, one: Candidate, role: ViewRole) -> float:
        """By which the first have the places of a role. The lot is stable for an address and monitor, and nobody's to choose."""
        lot = self._lots[one.monitor]
        return lot * _LOYALTY if one.role is role else lot

    def most(self, region: str | None, places: int) -> int:
        """Of so many places those of one region: fewer than half, or its part of all monitors if that is more."""
        part = math.ceil(places * self._regions[region] / self._regions.total())
        return max((places - 1) // 2, part)


@dataclass(frozen=True, slots=True)
class _Rule:
    """Who may look at one server together."""

    knows_networks: bool = False  # of most: those that are not known may be one
    bears_neighbours: bool = False

    def objection(self, one: Candidate, others: Iterable[Candidate]) -> str | None:
        """Why a monitor cannot be beside those, or None."""
        others = list(others)
        if sum(other.party == one.party for other in others) >= PER_PARTY:
            return f"{PER_PARTY} monitors of its member look at it already"
        if self.bears_neighbours:
            return None
        is_limited = one.network is not None or self.knows_networks
        if is_limited and sum(other.network == one.network for other in others) >= PER_NETWORK:
            name = "unknown networks" if one.network is None else f"AS{one.network}"
            return f"{PER_NETWORK} monitors of {name} look at it already"
        mine = {_prefix(address, _NEIGHBOURS) for address in one.addresses}
        if any(_prefix(address, _NEIGHBOURS) in mine for other in others for address in other.addresses):
            return "a monitor of its own neighbourhood looks at it already"
        return None


@dataclass(slots=True)
class _Wanted:
    """Who should have a place, in the order of need, and why; and why others should not."""

    chosen: dict[int, Candidate] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    rejected: dict[int, str] = field(default_factory=dict)


def _choose(
    order: _Order,
    able: Sequence[Candidate],
    places: int,
    role: ViewRole,
    rule: _Rule,
    first: _Wanted | None = None,
) -> _Wanted:
    """Beside those of `first`: by lot fewer than half from the nearer half, as many from the farther, the rest from all."""
    found = _Wanted() if first is None else _Wanted(first.chosen, first.reasons)
    every = sorted(able, key=lambda one: order.rank(one, role))
    regions = Counter(one.region for one in found.chosen.values())

    def take(those: Iterable[Candidate], most: int, why: str, *, minds_regions: bool = True) -> None:
        for one in those:
            if most <= 0 or len(found.chosen) >= places:
                return
            if one.monitor in found.chosen or one.monitor in found.rejected:
                continue
            if minds_regions and regions[one.region] >= order.most(one.region, places):
                continue
            if (objection := rule.objection(one, found.chosen.values())) is not None:
                found.rejected[one.monitor] = objection
                continue
            found.chosen[one.monitor] = one
            found.reasons[one.monitor] = why
            regions[one.region] += 1
            most -= 1

    few = (places - 1) // 2
    take((one for one in every if one.monitor in order.near), few, "drawn from the nearer half")
    take((one for one in every if one.monitor not in order.near), few, "drawn from the farther half")
    take(every, places, "drawn from all")
    take(every, places, "drawn from all, since other regions have too few", minds_regions=False)
    return found


def _settle(
    order: _Order,
    incumbents: Sequence[Candidate],
    wanted: _Wanted,
    places: int,
    blocked: int,
    rule: _Rule,
    lost: Collection[int],
) -> dict[int, str]:
    """Some steps from those who have the places to those who should; with their reasons.

    Nobody leaves for a worse lot than others' before a better one has come.
    """
    few = _CHANGES_BLOCKED if blocked > 1 else _CHANGES
    limit = few if any(one.monitor not in lost for one in incumbents) else _CHANGES_NONE
    members = {one.monitor: one for one in incumbents}
    # First who is not heard, then who may not be beside the others, then the last by lot. All have the same role.
    leaving = sorted(
        (one for one in incumbents if one.monitor not in wanted.chosen),
        key=lambda one: (
            one.monitor not in lost,
            one.monitor not in wanted.rejected,
            -order.rank(one, one.role),
        ),
    )
    joining = [one for monitor, one in wanted.chosen.items() if monitor not in members]
    for one in joining[:limit]:
        while leaving and rule.objection(one, members.values()) is not None:
            members.pop(leaving.pop(0).monitor)
        if leaving and len(members) >= places:
            members.pop(leaving.pop(0).monitor)
        members[one.monitor] = one
    for one in leaving:
        is_too_many = len(members) > places
        if is_too_many or (one.monitor in wanted.rejected and len(members) > max(1, places - 2)):
            members.pop(one.monitor)
    kept = "it stays until a better one comes"
    return {monitor: wanted.reasons.get(monitor, kept) for monitor in members}


# Primes, in seconds: no two monitors of an address keep step. Twice the longest, and a twentieth, is what counts as fresh.
_EVERY_ACTIVE = (509, 521, 523, 541, 547, 557, 563, 569, 571)
_EVERY_TESTING = (2503, 2539, 2593, 2647, 2699, 2749, 2801)
_EVERY_NEW = (251, 257, 263, 269, 271, 277, 281)
_EVERY_HOPELESS = (7013, 7103, 7207, 7307, 7411)
_EVERY_GLANCE = (27_011, 28_001, 28_807, 29_717, 30_713)
_SPREAD = 0.05
LEAST = 60.0
NEW = timedelta(hours=2)


def interval(
    role: ViewRole,
    score: float | None,
    *,
    monitor: int,
    active: int,
    age: timedelta,
    least: float = LEAST,
) -> float | None:
    """Seconds between two probes of an address by a monitor, before any randomness; None of one that may not look.

    `score` is the address's by this monitor's own probes, `age` since when it is admitted or waits for that. `active` is how many
    monitors are active for it: the fewer there are, the more often each looks, so that a small pool finds a fault as fast as
    a large one. `least` seconds lie between two probes of an address, whoever makes them; all else is in proportion.
    """
    pace = least / LEAST
    if role is ViewRole.PAUSED:
        return None
    if role is ViewRole.CANDIDATE:
        return pace * _of(_EVERY_GLANCE, monitor)
    if score is not None and score <= HOPELESS:
        return pace * _of(_EVERY_HOPELESS, monitor)
    if role is ViewRole.TESTING:
        return pace * _of(_EVERY_TESTING, monitor)
    usual = _of(_EVERY_NEW if age < NEW else _EVERY_ACTIVE, monitor)
    return pace * max(LEAST, usual * min(1.0, active / ACTIVE))


def _of(choices: Sequence[int], monitor: int) -> int:
    return choices[monitor % len(choices)]


def next_probe(
    last: datetime, seconds: float, taken: Iterable[datetime], draw: Callable[[], float], least: float = LEAST
) -> datetime:
    """When to probe again: about so many seconds after the last one, and `least` from all others' times of that address.

    `draw` gives numbers from 0 to 1: a server should not know a monitor by its hour.
    """
    gap = timedelta(seconds=least)
    at = last + timedelta(seconds=seconds * (1 - _SPREAD + 2 * _SPREAD * draw()))
    for other in sorted(taken):
        if abs(other - at) < gap:
            at = other + gap + timedelta(seconds=least * _SPREAD * draw())
    return at


# Glances of so long ago still say something: nobody glances less often.
REMEMBERED = timedelta(seconds=2 * max(_EVERY_GLANCE))
_LEAST_GLANCES = 3
LEAST_AGAINST = _LEAST_GLANCES // 2 + 1
GOOD_STEP = CUTOFF / MAX_SCORE


@dataclass(frozen=True, slots=True)
class Glance:
    """The step of a monitor's last probe of an address for which it was not chosen."""

    party: int
    step: float
    at: datetime


@dataclass(frozen=True, slots=True)
class Disagreement:
    """How many parties have glanced at an address, and how many of them saw the contrary of what those with a say found."""

    asked: int
    against: int

    @property
    def is_flagged(self) -> bool:
        """More than half of three or more: a server that is good only for its monitors, or monitors that lie."""
        return self.asked >= _LEAST_GLANCES and 2 * self.against > self.asked


def disagreement(score: float | None, glances: Iterable[Glance], now: datetime) -> Disagreement:
    """Unlisted monitors beside the listed ones, whose verdict is `score`; an unknown one nobody contradicts."""
    by_party: dict[int, Counter[bool]] = {}
    for glance in glances:
        if now - glance.at <= REMEMBERED:
            by_party.setdefault(glance.party, Counter())[glance.step >= GOOD_STEP] += 1
    if score is None:
        return Disagreement(len(by_party), 0)
    found = is_good(score)
    return Disagreement(len(by_party), sum(seen[not found] > seen[found] for seen in by_party.values()))
