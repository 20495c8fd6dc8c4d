"""What several monitors' views of one address come to: pure.

1. A monitor has a say for an address while it is one of its active ones and its last sound probe is fresh.
2. The monitors of one member are one vote, and none is ever on that member's servers (`poolsvc.vantage`).
3. A quorum of votes is needed to say anything. Below it the address is unknown: that is the pool's fault, and nothing changes.
4. The votes come to one number, by the scorer that rules: their median, the lower one of two in the middle.
5. Fewer than half of its monitors never bring an address down by the median, whatever became of the others.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import MappingProxyType

from poolsvc.scoring import ADMITTED, HOPELESS, RULE, Line, Rule, is_good

FRESH = timedelta(minutes=20)
AHEAD = timedelta(minutes=1)  # that a clock may be set back by, without what was seen being of no more use
FRESH_HOPELESS = timedelta(hours=4.5)  # two of the longest intervals: who looks seldom has a say for longer
SILENT = timedelta(minutes=30)
FULL_QUORUM = 3
_PROBES = 2  # full ones in a row, of each monitor of a quorum of several


@dataclass(frozen=True, slots=True)
class View:
    """What one monitor last said of one address.

    `party` is who speaks, equal for the monitors of one member. `score` is by this monitor's probes alone, None until the
    address was admitted; `full_probes` are those in a row; `at` is of the last sound one, aware UTC. Since `silent_since`
    nothing answered it.
    """

    monitor: int
    party: int
    is_active: bool
    score: float | None
    full_probes: int
    at: datetime | None
    silent_since: datetime | None = None

    @property
    def lasts(self) -> timedelta:
        """How long a probe is the last word: the hopeless are looked at seldom."""
        return FRESH_HOPELESS if self.score is not None and self.score <= HOPELESS else FRESH

    def is_fresh(self, now: datetime) -> bool:
        """Whether its last probe is still the last word. One of a time to come is of a clock that was ahead."""
        return self.at is not None and -AHEAD <= now - self.at <= self.lasts


@dataclass(frozen=True, slots=True)
class Quorum:
    """How many votes it takes, and how many full probes in a row each of them needs to admit an address."""

    number: int
    probes: int

    @property
    def is_bootstrap(self) -> bool:
        """Whether the pool has too few monitors for one of them to be wrong: then all must agree."""
        return self.number < FULL_QUORUM


def quorum(approved: int, least: int, admission_probes: int) -> Quorum:
    """The quorum of a pool with so many approved parties, which never falls below `least` by itself.

    `admission_probes` are those that the policy asks of a single monitor.
    """
    number = max(1, least, min(approved, FULL_QUORUM))
    return Quorum(number, admission_probes if number == 1 else min(_PROBES, admission_probes))


@dataclass(frozen=True, slots=True)
class Scorer:
    """A whole way to judge: each monitor's score by `rule`, and of their votes the one at `fraction`, from the worst on."""

    name: str
    fraction: float
    rule: Rule = RULE

    def of(self, votes: Sequence[float]) -> float:
        """Of two in the middle the lower one; there is at least one vote."""
        return sorted(votes)[math.floor((len(votes) - 1) * self.fraction)]


MEDIAN = Scorer("median", 0.5)
# Who cannot be reached from a quarter of the world loses: the median of near and healthy monitors is an optimist.
QUARTILE = Scorer("quartile", 0.25)
# Half of the offset that the ruling one bears: full up to 10 ms, good up to 50.
CLOSE = Scorer(
    "close", 0.5, Rule(0.95, 1.0, (Line(0.01, 0, 1), Line(0.05, -12.5, 1.125), Line(0.75, -2.143, 0.607)))
)
# A memory half as long: out after one silent probe, and back in half of the time.
BRISK = Scorer("brisk", 0.5, Rule(0.9, 2.0, RULE.lines))
SCORERS: Mapping[str, Scorer] = MappingProxyType(
    {scorer.name: scorer for scorer in (MEDIAN, QUARTILE, CLOSE, BRISK)}
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One number for an address, or None with the reason why the pool does not know it."""

    score: float | None
    votes: int
    reason: str = ""

    @property
    def is_known(self) -> bool:
        return self.score is not None


def overall(views: Iterable[View], needed: Quorum, now: datetime, scorer: Scorer = MEDIAN) -> Verdict:
    """What an admitted address's monitors say together."""
    active = [view for view in views if view.is_active]
    parties = {view.party for view in active}
    votes = _votes((view for view in active if view.is_fresh(now)), scorer)
    if len(votes) < needed.number:
        return Verdict(
            None, len(votes), f"{len(votes)} of the {needed.number} monitors that it takes know it"
        )
    good = sum(map(is_good, votes))
    if needed.is_bootstrap and 0 < good < len(votes):
        return Verdict(None, len(votes), "the pool's few monitors do not agree")
    score, bad = scorer.of(votes), len(votes) - good
    if not is_good(score) and bad < scorer.fraction * len(parties):
        reason = f"{bad} of its {len(parties)} monitors find it bad, and too few others are heard"
        return Verdict(None, len(votes), reason)
    return Verdict(score, len(votes))


def _votes(views: Iterable[View], scorer: Scorer) -> list[float]:
    """One for each party: that of its monitors together."""
    by_party: dict[int, list[float]] = defaultdict(list)
    for view in views:
        if view.score is not None:
            by_party[view.party].append(view.score)
    return [scorer.of(scores) for scores in by_party.values()]


def admits(views: Iterable[View], needed: Quorum, now: datetime) -> bool:
    """Whether a quorum has confirmed an address that is new; while there are few monitors, all of them."""
    fresh = [view for view in views if view.is_active and view.is_fresh(now)]
    full = {view.party for view in fresh if view.full_probes >= needed.probes}
    others = {view.party for view in fresh} - full
    return len(full) >= needed.number and not (needed.is_bootstrap and others)


def first_score(view: View) -> float:
    """Where a view's score begins when its address is admitted."""
    return ADMITTED if view.full_probes else 0.0


def is_silent(views: Iterable[View], needed: Quorum, now: datetime) -> bool:
    """Whether nobody who looks has heard anything of it for long: reason enough even below the quorum.

    Two parties have to look, unless the quorum is one: it could be the only one's own network.
    """
    fresh = [view for view in views if view.is_fresh(now)]
    looking = len({view.party for view in fresh})
    return looking >= min(needed.number, 2) and all(
        view.silent_since is not None and now - view.silent_since >= SILENT for view in fresh
    )


@dataclass(frozen=True, slots=True)
class Difference:
    """What would become of the pool's servers by another scorer, by name."""

    dropped: Sequence[str]
    added: Sequence[str]

    def __str__(self) -> str:
        return f"would drop {len(self.dropped)}, add {len(self.added)}"


def compare(addresses: Iterable[tuple[str, float | None, float | None]]) -> Difference:
    """Two scorers over a pool: for each address its server, the score by the one that rules, and by the other one.

    A server is good by its best address. An address that one of both does not know says nothing.
    """
    by_server: dict[str, tuple[bool, bool]] = {}
    for server, ruling, shadow in addresses:
        if ruling is None or shadow is None:
            continue
        is_in, would_be = by_server.get(server, (False, False))
        by_server[server] = is_in or is_good(ruling), would_be or is_good(shadow)
    return Difference(
        sorted(server for server, (is_in, would_be) in by_server.items() if is_in and not would_be),
        sorted(server for server, (is_in, would_be) in by_server.items() if would_be and not is_in),
    )
