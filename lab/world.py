"""A pool over weeks, by the registry's own pure rules.

Time goes in rounds of nine minutes, in which every active monitor probes each of its servers once. What decides is
`poolsvc.scoring`, `poolsvc.verdicts` and `poolsvc.vantage`, called for every probe and server with something going on. A view
that is at full score and sees a full probe is left as it is, since that is what the rules would do with it; so is one within a
tenth of full score. A server all of whose views are heard and worth a whole share is in the answer by any scorer; only of
the others is a verdict asked for. Monitors are chosen anew when some are lost: for the rest a review changes nothing.
Monitors that lie on some day report a round trip of 0 on all days. Losses fall on any probe, one in a thousand, and the first probes of an outage are told as the servers' silence, one in three,
until the monitor's own check finds the fault.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from ipaddress import IPv4Address
from random import Random

from lab.course import DENIAL, FULL, QUORUM, SILENCE, START, off
from nts_core.control import ProbeResult
from poolsvc.scoring import (
    FULL_SHARE,
    FULL_STEP,
    HOPELESS,
    MAX_SCORE,
    Step,
    advance,
    is_good,
    share,
    step,
)
from poolsvc.vantage import (
    ACTIVE,
    POINTS,
    Candidate,
    Choice,
    Disagreement,
    Glance,
    Target,
    ViewRole,
    disagreement,
    review,
)
from poolsvc.verdicts import (
    MEDIAN,
    QUARTILE,
    Difference,
    Scorer,
    View,
    compare,
    first_score,
    is_silent,
    overall,
)

ROUND = timedelta(minutes=9)
A_DAY = 160  # rounds
_HOUR = A_DAY // 24
_LOSS = 0.001
_MISTOLD = 1 / 3
_ALMOST = MAX_SCORE - 0.1
_HOPELESS_ROUNDS = 13
_LOST_ROUNDS = 7
_GLANCE_ROUNDS = 53
_LEAST_LISTED = 4

# Regions around a ring, with their parts of servers and monitors; the islands have one server and no monitor.
REGIONS = ("Europe", "North America", "Asia", "Oceania", "South America", "Africa", "the islands")
_SERVERS = (0.50, 0.22, 0.15, 0.05, 0.04, 0.04)
_MONITORS = (14, 10, 7, 3, 3, 3)
_DELAYS = (20, 90, 160, 230, 290)  # ms, by regions between
ISLANDS = REGIONS.index("the islands")
_HOSTILE = 10  # monitors of ten members in one AS, all in Europe
_LIARS = (10, 11, 12)  # three others there
_NONE, _LONG = 0, 10**9  # round trips that nobody has, in ns
_CLAIMS: Mapping[int, int] = dict.fromkeys((*range(_HOSTILE), *_LIARS), _NONE)  # by monitor


@dataclass(slots=True)
class Monitor:
    """A vantage point of a member of its own."""

    number: int
    region: int
    network: int
    address: IPv4Address
    heard: int = 0  # the last round in which it was sound


@dataclass(slots=True)
class Server:
    """One address; `scores` are those of its active monitors that are not full."""

    number: int
    region: int
    kind: str
    target: Target
    delays: Sequence[int]
    roles: dict[int, ViewRole] = field(default_factory=dict)
    active: tuple[int, ...] = ()
    scores: dict[int, float] = field(default_factory=dict)
    new: set[int] = field(default_factory=set)  # active monitors that have not probed it yet
    since: dict[int, int] = field(default_factory=dict)  # the round in which a view began
    silent: dict[int, int] = field(default_factory=dict)
    score: float | None = MAX_SCORE
    is_listed: bool = True
    bad_until: int = -(10**9)  # the last round in which something was really wrong with it
    settled: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Situation:
    """Something that happens from round `first` to before `last`.

    `lying` say of all their servers that they are silent; `away` are monitors that find that out themselves; `unheard` are
    sound, and their reports do not arrive; between the regions `cut` nothing passes; the servers of `fault` are wrong.
    """

    name: str
    first: int
    last: int
    lying: frozenset[int] = frozenset()
    away: frozenset[int] = frozenset()
    unheard: frozenset[int] = frozenset()
    cut: tuple[int, int] | None = None
    fault: ProbeResult | None = None
    part: range = range(0)


@dataclass(slots=True)
class Outcome:
    """What came of a situation. `wrong` is for each good server that lost its place the part of its monitors that erred."""

    concerned: int = 0
    wrong: list[float] = field(default_factory=list)
    out: list[float] = field(default_factory=list)  # minutes until bad ones were out
    back: list[float] = field(default_factory=list)  # hours until they were back, from the end of the fault
    missed: int = 0  # bad ones that stayed
    unknown: float = 0.0  # hours of servers without a verdict
    trial: Difference | None = None  # what the quartile would have made of its last round


def situations(servers: int, days: int) -> list[Situation]:
    """What happens in the month, one thing after the other; what does not fit into so many days is left out."""
    part = max(1, servers // 50)

    def at(day: float, hours: float) -> tuple[int, int]:
        return round(day * A_DAY), round(day * A_DAY + hours * _HOUR)

    away = frozenset(number for number in range(40) if number % 8 < 5)
    every = [
        Situation("three monitors of one region lie", *at(1, 8), lying=frozenset(_LIARS)),
        Situation("ten monitors in one AS lie", *at(3, 8), lying=frozenset(range(_HOSTILE))),
        Situation("25 of 40 monitors lose their network", *at(5, 6), away=away),
        Situation("35 of 40 monitors do not reach the registry", *at(7, 6), unheard=frozenset(range(35))),
        Situation("Europe and North America do not reach each other", *at(9, 6), cut=(0, 1)),
        Situation("clocks 5 s off", *at(11, 6), fault=off(5), part=range(part, 2 * part)),
        Situation("clocks 1 s off", *at(13, 6), fault=off(1), part=range(2 * part, 3 * part)),
        Situation("clocks 200 ms off", *at(15, 6), fault=off(0.2), part=range(3 * part, 4 * part)),
        Situation("silent servers", *at(17, 3), fault=SILENCE, part=range(4 * part, 5 * part)),
        Situation("servers that say DENY", *at(19, 3), fault=DENIAL, part=range(5 * part, 6 * part)),
        Situation("silence of 9 minutes", *at(21, 0.15), fault=SILENCE, part=range(6 * part, 7 * part)),
        Situation(
            "a third of all servers is silent",
            *at(23, 3),
            fault=SILENCE,
            part=range(7 * part, 7 * part + servers // 3),
        ),
    ]
    return [one for one in every if one.last + A_DAY <= days * A_DAY]


# Who lies, one after the other, and what round trip they claim; None is the true one.
_FAR_APART = tuple(_HOSTILE + number * 7 % 30 for number in range(20))  # each in an AS of its own
_ONE_REGION = (*range(_HOSTILE, 14), *range(_HOSTILE))
_WAYS: Mapping[str, tuple[Sequence[int], int | None]] = {
    "far apart, true delays": (_FAR_APART, None),
    "far apart, delay 0": (_FAR_APART, _NONE),
    "far apart, delay 1 s": (_FAR_APART, _LONG),
    "one region, delay 0": (_ONE_REGION, _NONE),
    "one AS, delay 0": (tuple(range(_HOSTILE)), _NONE),
}
LIES = (0, 3, 4, 6, 8, 10, 12, 16, 20)

# Some servers are as they are all the time.
FLAPPING, DRIFTING, LOSSY, FALSE = "flapping", "drifting", "lossy", "good for its monitors only"
ALWAYS = frozenset((FLAPPING, DRIFTING, LOSSY))
DRIFT = 0.020  # seconds a day
# The same whichever scorer rules.
_USUAL: Mapping[int, Step] = {id(result): step(result) for result in (FULL, SILENCE)}


class World:
    """Servers, monitors, and what each makes of the other; `run` lets it live."""

    def __init__(self, servers: int = 10_000, days: int = 30, seed: int = 1, scorer: Scorer = MEDIAN) -> None:
        self._random = Random(seed)
        self._scorer = scorer
        self.rounds = days * A_DAY
        self.monitors = list(self._make_monitors())
        self.servers = list(self._make_servers(servers))
        self._looked_at: dict[int, set[int]] = defaultdict(set)
        for server in self.servers:
            self._settle(server, 0)
        self._at_first = [server.roles for server in self.servers]
        self._busy: set[int] = {one.number for one in self.servers if one.kind in ALWAYS}
        self.situations = situations(servers, days)
        self.outcomes = {one.name: Outcome() for one in self.situations}
        self.outcomes["otherwise, losses only"] = Outcome(concerned=servers)
        self.changes: dict[int, list[tuple[int, bool]]] = defaultdict(list)
        self.listed = [(0, servers)]
        self.unknown = [(0, 0)]
        self.shares: dict[str, float] = defaultdict(float)  # of all of a kind, over all rounds
        self.flags: dict[int, tuple[int, Disagreement]] = {}
        self.probes = self.verdicts = self._moved = 0
        self._lost_probes: set[tuple[int, int]] = set()

    def _make_monitors(self) -> Iterator[Monitor]:
        regions = [region for region, count in enumerate(_MONITORS) for _ in range(count)]
        for number, region in enumerate(regions):
            network = 64512 if number < _HOSTILE else 64600 + number
            yield Monitor(number, region, network, IPv4Address((10 << 24) + (number << 16) + 1))

    def _make_servers(self, count: int) -> Iterator[Server]:
        some = max(1, count // 200)
        kinds = [kind for kind in (FLAPPING, DRIFTING, LOSSY, FALSE) for _ in range(some)]
        for number in range(count):
            is_island = number == count - 1 - len(kinds)
            drawn = self._random.choices(range(len(_SERVERS)), _SERVERS)[0]
            region = ISLANDS if is_island else drawn
            kind = kinds[number - count] if count - number <= len(kinds) else ""
            address = IPv4Address((20 << 24) + (number << 8) + 1)
            delays = [round(1e6 * self._delay(region, monitor.region)) for monitor in self.monitors]
            yield Server(number, region, kind, Target(address, 1000 + number, (address,)), delays)

    def _delay(self, one: int, other: int) -> float:
        around = abs(one - other)
        apart = 4 if ISLANDS in (one, other) else min(around, ISLANDS - around)
        return _DELAYS[apart] * self._random.uniform(0.6, 1.5)

    def run(self) -> "World":
        """Live through all rounds."""
        for number in range(self.rounds):
            self._live(number)
        for one in self.situations:
            self._tell(one)
        return self

    # Which monitors look at a server.

    def _settle(self, server: Server, number: int) -> None:
        while self._review(server, number):
            pass

    def _review(self, server: Server, number: int) -> bool:
        """One review of a server's monitors; whether it changed anything."""
        choices = self._choose(server, server.roles, _CLAIMS, number)
        before = set(server.active)
        server.roles = {choice.monitor: choice.role for choice in choices}
        server.active = tuple(choice.monitor for choice in choices if choice.role is ViewRole.ACTIVE)
        for monitor in before - set(server.active):
            server.scores.pop(monitor, None)
            server.new.discard(monitor)
            self._looked_at[monitor].discard(server.number)
        for monitor in set(server.active) - before:
            self._looked_at[monitor].add(server.number)
            server.since[monitor] = number
            if number:
                server.new.add(monitor)
                self._busy.add(server.number)
        return any(choice.is_change for choice in choices)

    def _choose(
        self, server: Server, roles: Mapping[int, ViewRole], claims: Mapping[int, int], number: int
    ) -> list[Choice]:
        """What a review makes of the roles; `claims` are round trips that monitors report in place of the true ones."""
        lost = self._lost(number)
        since = START + ROUND * number - timedelta(hours=2)
        candidates = [
            Candidate(
                monitor.number,
                monitor.number,
                addresses=(monitor.address,),
                network=monitor.network,
                region=REGIONS[monitor.region],
                lost_since=since if monitor.number in lost else None,
                role=roles.get(monitor.number, ViewRole.CANDIDATE),
                points=POINTS,
                mean_delay_ns=claims.get(monitor.number, server.delays[monitor.number]),
            )
            for monitor in self.monitors
        ]
        return review(server.target, candidates, START + ROUND * number)

    def _lost(self, number: int) -> frozenset[int]:
        return frozenset(one.number for one in self.monitors if number - one.heard >= _LOST_ROUNDS)

    # One round.

    def _live(self, number: int) -> None:
        now = [one for one in self.situations if one.first <= number < one.last]
        for one in now:
            if number == one.first:
                everybody = one.away or one.unheard
                self.outcomes[one.name].concerned = len(self.servers if everybody else self._concerned(one))
        unheard = self._listen(number, now)
        self._lose()
        self._review_all(number)
        is_known = {True: 0, False: 0}
        for each in sorted(self._touched(number, now)):
            server = self.servers[each]
            self._probe(server, number, now, unheard)
            is_known[self._judge(server, number, now)] += 1
            if server.kind in ALWAYS and server.is_listed and server.score is not None:
                self.shares[server.kind] += share(server.score)
        for one in now:
            if number == one.last - 1:
                self.outcomes[one.name].trial = self._try(QUARTILE, number)
            self.outcomes[one.name].unknown += is_known[False] * ROUND / timedelta(hours=1)
        if number % _HOUR == 0:
            self._glance(number)
        self.unknown.append((number, is_known[False]))
        self.listed.append((number, self.listed[-1][1] + self._moved))
        self._moved = 0

    def _listen(self, number: int, now: Sequence[Situation]) -> set[int]:
        """The monitors from which nothing comes in this round; all others are heard."""
        away = {monitor for one in now for monitor in one.away if number > one.first}
        unheard = {monitor for one in now for monitor in one.unheard} | away
        for monitor in self.monitors:
            if monitor.number not in unheard:
                monitor.heard = number
        return unheard

    def _touched(self, number: int, now: Sequence[Situation]) -> set[int]:
        """Servers with something going on."""
        found = set(self._busy)
        for one in now:
            found |= self._concerned(one)
        for monitor in self.monitors:
            if number - monitor.heard > 1:
                found |= self._looked_at[monitor.number]
        return found

    def _review_all(self, number: int) -> None:
        """Every second round, until nothing changes any more: when monitors were lost or are back."""
        lost = self._lost(number)
        if number % 2:
            return
        for server in self.servers:
            if server.settled != lost and not self._review(server, number):
                server.settled = lost

    def _lose(self) -> None:
        """One probe in a thousand comes to nothing, of all that are made in this round."""
        total, at = len(self.servers) * ACTIVE, -1
        self._lost_probes = set()
        while True:
            at += 1 + int(math.log(1 - self._random.random()) / math.log(1 - _LOSS))
            if at >= total:
                return
            server = self.servers[at // ACTIVE]
            if at % ACTIVE < len(server.active):
                self._lost_probes.add((server.number, server.active[at % ACTIVE]))
                self._busy.add(server.number)

    def _concerned(self, one: Situation) -> set[int]:
        found: set[int] = set()
        for monitor in one.lying:
            found |= self._looked_at[monitor]
        for monitor in one.away:
            found |= self._looked_at[monitor]
        if one.cut is not None:
            found |= {server.number for server in self.servers if server.region in one.cut}
        found |= set(one.part)
        return found

    def _result(self, server: Server, monitor: int, number: int, now: Sequence[Situation]) -> ProbeResult:
        """What a monitor tells of a server."""
        for one in now:
            if monitor in one.lying:
                return SILENCE
            if monitor in one.away and self._random.random() < _MISTOLD:
                return SILENCE
            if one.cut is not None and {server.region, self.monitors[monitor].region} == set(one.cut):
                return SILENCE
        if (server.number, monitor) in self._lost_probes:
            return SILENCE
        return self._truth(server, number, now)

    def _truth(self, server: Server, number: int, now: Sequence[Situation]) -> ProbeResult:
        """What there is to see of it."""
        for one in now:
            if one.fault is not None and server.number in one.part:
                return one.fault
        if server.kind == FLAPPING and (number + server.number) % 20 < 2:
            return SILENCE
        if server.kind == DRIFTING:
            return off(round(DRIFT * number / A_DAY, 3))
        if server.kind == LOSSY and self._random.random() < 0.03:
            return SILENCE
        return FULL

    def _probe(self, server: Server, number: int, now: Sequence[Situation], unheard: Collection[int]) -> None:
        if self._truth_is_bad(server, now):
            server.bad_until = number
        monitors: Iterable[int] = server.active
        if not now and server.kind not in ALWAYS:
            monitors = [
                one
                for one in server.active
                if one in server.scores or one in server.new or (server.number, one) in self._lost_probes
            ]
        for monitor in monitors:
            if monitor not in unheard:
                self._look(server, monitor, number, now)
        if server.scores or server.new or server.kind in ALWAYS:
            self._busy.add(server.number)
        else:
            self._busy.discard(server.number)

    def _look(self, server: Server, monitor: int, number: int, now: Sequence[Situation]) -> None:
        """One probe, if it is time for one."""
        score = server.scores.get(monitor, MAX_SCORE)
        if score <= HOPELESS and (number + monitor) % _HOPELESS_ROUNDS:
            return
        result = self._result(server, monitor, number, now)
        self.probes += 1
        if result is SILENCE:
            server.silent.setdefault(monitor, number)
        else:
            server.silent.pop(monitor, None)
        is_new = monitor in server.new
        if score == MAX_SCORE and result is FULL and not is_new:
            return
        found = _USUAL.get(id(result)) or step(result, rule=self._scorer.rule)
        if is_new:
            server.new.discard(monitor)
            full = int(found.value >= FULL_STEP)
            score = first_score(View(monitor, monitor, is_active=True, score=None, full_probes=full, at=None))
        score = advance(score, found, self._scorer.rule)
        if score >= _ALMOST:
            server.scores.pop(monitor, None)
        else:
            server.scores[monitor] = score

    def _truth_is_bad(self, server: Server, now: Sequence[Situation]) -> bool:
        if server.kind in ALWAYS:
            return True
        return any(one.fault is not None and server.number in one.part for one in now)

    def views(self, server: Server) -> list[View]:
        """What its active monitors last said, as a registry has it."""
        return [
            View(
                monitor,
                monitor,
                is_active=True,
                score=None if monitor in server.new else server.scores.get(monitor, MAX_SCORE),
                full_probes=0,
                at=START + ROUND * max(self.monitors[monitor].heard, server.since.get(monitor, 0)),
                silent_since=START + ROUND * server.silent[monitor] if monitor in server.silent else None,
            )
            for monitor in server.active
        ]

    def _judge(self, server: Server, number: int, now: Sequence[Situation]) -> bool:
        """Let the verdict on a server take effect; whether it is known."""
        is_heard = all(number - self.monitors[monitor].heard <= 1 for monitor in server.active)
        if (
            is_heard
            and not server.new
            and all(score >= FULL_SHARE for score in server.scores.values())
            and server.is_listed
        ):
            server.score = MAX_SCORE
            return True
        self.verdicts += 1
        moment = START + ROUND * number
        views = self.views(server)
        verdict = overall(views, QUORUM, moment, self._scorer)
        if verdict.score is None:
            if server.is_listed and is_silent(views, QUORUM, moment) and self.listed[-1][1] > _LEAST_LISTED:
                self._move(server, number, now, into=False)
            return False
        server.score = verdict.score
        if is_good(verdict.score) is not server.is_listed:
            self._move(server, number, now, into=not server.is_listed)
        return True

    def _move(self, server: Server, number: int, now: Sequence[Situation], *, into: bool) -> None:
        server.is_listed = into
        self._moved += 1 if into else -1
        self.changes[server.number].append((number, into))
        if not into and number - server.bad_until > A_DAY:
            causes = [one for one in now if server.number in self._concerned(one)]
            name = causes[0].name if causes else "otherwise, losses only"
            erring = sum(not is_good(server.scores.get(monitor, MAX_SCORE)) for monitor in server.active)
            self.outcomes[name].wrong.append(erring / len(server.active))

    def _glance(self, number: int) -> None:
        """What unlisted monitors see of servers that are good for the listed ones only, and of as many good ones.

        Each glances every eight hours; sampled, since all good servers look alike to them.
        """
        some = [one for one in self.servers if one.kind == FALSE]
        for server in [*some, *self.servers[: len(some)]]:
            if server.number in self.flags:
                continue
            seen = []
            for monitor in self.monitors:
                if server.roles[monitor.number] is not ViewRole.CANDIDATE:
                    continue
                ago = (number - 7 * monitor.number) % _GLANCE_ROUNDS
                if ago <= number:
                    found = step(SILENCE if server.kind == FALSE else FULL)
                    seen.append(Glance(monitor.number, found.value, START + ROUND * (number - ago)))
            if (what := disagreement(server.score, seen, START + ROUND * number)).is_flagged:
                self.flags[server.number] = (number, what)

    def _try(self, scorer: Scorer, number: int) -> Difference:
        """What another way to count the votes would make of the pool."""
        now = START + ROUND * number
        each = ((f"{one.number}", self.views(one)) for one in self.servers)
        return compare(
            (name, overall(views, QUORUM, now, MEDIAN).score, overall(views, QUORUM, now, scorer).score)
            for name, views in each
        )

    # What came of it.

    def _tell(self, one: Situation) -> None:
        found = self.outcomes[one.name]
        for number in one.part:
            if number >= len(self.servers) or self.servers[number].kind:
                continue
            moves = self.changes.get(number, [])
            out = next((at for at, into in moves if not into and one.first <= at < one.last + _HOUR), None)
            if out is None:
                found.missed += 1
                continue
            found.out.append((out - one.first + 1) * ROUND / timedelta(minutes=1))
            back = next((at for at, into in moves if into and at >= one.last), None)
            if back is not None:
                found.back.append((back - one.last + 1) * ROUND / timedelta(hours=1))

    @cached_property
    def lies(self) -> Mapping[str, Sequence[tuple[float, float]]]:
        """Per cent of servers that so many monitors bring down by saying that all are silent, for each way to choose those."""
        return {name: list(self._lie(who, claim)) for name, (who, claim) in _WAYS.items()}

    def _lie(self, who: Sequence[int], claim: int | None) -> Iterator[tuple[float, float]]:
        """One after the other lies from the first day, and claims a round trip, for long: all reviews that follow are held."""
        roles = list(self._at_first)
        for count in (number for number in LIES if number <= len(who)):
            lying = who[:count]
            claims = {} if claim is None else dict.fromkeys(lying, claim)
            lost = 0
            for number, server in enumerate(self.servers):
                roles[number] = found = self._settled(server, roles[number], claims)
                lost += self._is_brought_down(
                    [one for one, role in found.items() if role is ViewRole.ACTIVE], lying
                )
            yield count, 100 * lost / len(self.servers)

    def _settled(
        self, server: Server, roles: Mapping[int, ViewRole], claims: Mapping[int, int]
    ) -> dict[int, ViewRole]:
        while True:
            choices = self._choose(server, roles, claims, 0)
            roles = {choice.monitor: choice.role for choice in choices}
            if not any(choice.is_change for choice in choices):
                return roles

    def _is_brought_down(self, active: Iterable[int], lying: Collection[int]) -> bool:
        views = [
            View(
                one,
                one,
                is_active=True,
                score=-100.0 if one in lying else MAX_SCORE,
                full_probes=0,
                at=START,
            )
            for one in active
        ]
        verdict = overall(views, QUORUM, START, self._scorer)
        return verdict.is_known and not is_good(verdict.score)
