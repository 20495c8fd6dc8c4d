"""A feed from look to look: who stays, who goes at once, who is replaced; a daemon of our own says what tests want."""

import json
import signal
from dataclasses import replace

import pytest

from lab.knot import Knot
from lab.pool_zone import PoolZone
from lab.processes import Process, wait_until
from lab.programs import run, script
from nts_core import feed as feeds
from nts_core.asking import Unanswered
from nts_core.cli import ExitStatus
from nts_core.client import ClientError, Failure
from nts_core.feed import ASK_EVERY, Feed, What
from nts_core.feeding import Kind, Verdict
from nts_core.feeding.hand import DAEMONS, Hand
from nts_core.feeding.judge import LEAST_LOOKS
from nts_core.independence import Candidate
from nts_core.membership import Look
from nts_core.metadata import Metadata
from nts_core.resolve import ResolveError
from nts_core.roster import MIN_HOLD, Fault

POOL = "pool.example"
OUTAGE = ResolveError("resolver-unreachable", "nobody answers", "wait")
LIES = Verdict(fault=Fault.FALSETICKER, reason="it lies")


def candidate(letter, operator=None):
    whose = Metadata((operator or letter) * 13)
    return Candidate(f"{letter}.servers.{POOL}", 4460, 0, (f"192.{ord(letter)}.2.1",), whose)


def letters(members):
    return "".join(sorted(each.name[0] for each in members))


class Pool:
    """What DNS says when it is asked."""

    pool = POOL

    def __init__(self, listed):
        self.listed = [candidate(letter) for letter in listed]
        self.is_out = False
        self.held = []

    def remove(self, letter):
        self.listed = [each for each in self.listed if each.name[0] != letter]

    async def look(self, held, _now):
        self.held.append(letters(held))
        if self.is_out:
            return Look(problem=OUTAGE, again_in=30.0)
        names = {each.name for each in self.listed}
        return Look(listed=list(self.listed), gone={each.name for each in held} - names, again_in=30.0)


class Clock:
    """The time of feeds, which goes on when tests say so."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def time(self):
        return 1_800_000_000.0 + self.now

    def time_ns(self):
        return round(self.time() * 1e9)


class Lab:
    def __init__(self, directory, monkeypatch):
        self.directory = directory
        self.verdicts = {}
        self.answer = self.say
        self.clock = Clock()
        self.news = []
        self.kind = Kind.CHRONY
        self.command = directory / "tell"
        self.command.write_text(
            "#!/bin/sh\nexit $(cat status)\n".replace("status", str(directory / "status"))
        )
        self.command.chmod(0o700)
        self.breaks(0)
        monkeypatch.setattr(feeds, "time", self.clock)

    def breaks(self, status):
        (self.directory / "status").write_text(f"{status}\n")

    async def say(self, _directory):
        return {
            f"{letter}.servers.{POOL}": self.verdicts.get(letter, Verdict(is_good=True))
            for letter in "abcdefgh"
        }

    def hand(self, **changes):
        async def ask(directory):
            return await self.answer(directory)

        daemon = replace(DAEMONS[self.kind], **({"ask": ask} | changes))
        return Hand(daemon, POOL, directory=self.directory, tell=[str(self.command)])

    def feed(self, pool, count=4, *, hand=None, state=None):
        return Feed(hand or self.hand(), pool, count, self.news.append, state=state)

    async def run(self, feed, seconds, before=None):
        """Let it run for so long; `before` is called before each step with the seconds so far."""
        begin = self.clock.now
        with feed._opened():
            while self.clock.now < begin + seconds:
                if before is not None:
                    before(self.clock.now - begin)
                await feed._step(is_asking=True)
                self.clock.now = max(feed._next(), self.clock.now + 0.001)

    def told(self, what):
        return ["".join(sorted(name[0] for name in news.names)) for news in self.news if news.what is what]

    def problems(self):
        return [news.error.code for news in self.news if news.what is What.PROBLEM]


@pytest.fixture
def lab(tmp_path, monkeypatch):
    return Lab(tmp_path, monkeypatch)


# Who is chosen


async def test_four_of_a_pool(lab):
    feed = lab.feed(Pool("abcdef"))
    await feed.once()
    assert letters(feed.members) == "abcd"
    assert feed.problem is None
    assert lab.told(What.TOLD) == ["abcd"]


async def test_who_is_in_the_daemons_file_stays_over_a_restart(lab):
    await lab.feed(Pool("cdef")).once()
    later = lab.feed(Pool("abcdefgh"))
    await later.once()
    assert letters(later.members) == "cdef"
    assert lab.told(What.KEPT) == ["cdef"]
    assert lab.told(What.TOLD) == ["cdef"]


async def test_a_smaller_count_lets_some_go(lab):
    await lab.feed(Pool("abcd")).once()
    later = lab.feed(Pool("abcd"), count=2)
    await later.once()
    assert letters(later.members) == "ab"


async def test_too_few_are_better_than_none_and_are_told(lab):
    feed = lab.feed(Pool("ab"))
    await feed.once()
    assert letters(feed.members) == "ab"
    assert feed.problem.code is Failure.TOO_FEW_SOURCES
    assert "2 of 4" in feed.problem.message


async def test_two_of_one_operator_become_independent(lab):
    pool = Pool("abc")
    pool.listed.append(candidate("d", operator="a"))
    feed = lab.feed(pool)
    await feed.once()

    def later(seconds):
        if seconds > 100:
            pool.listed = [*pool.listed[:4], candidate("e")]

    await lab.run(feed, 400, later)
    assert letters(feed.members) in ("abce", "bcde")
    assert len(lab.told(What.EXCHANGED)) == 1


@pytest.mark.parametrize(
    "name",
    ["a\\010server b", "a#b.servers.pool.example", "*.pool.example", "a b.example", '"', "a.example\n"],
)
async def test_a_name_that_would_be_more_than_a_name_is_nobody(lab, name):
    pool = Pool("abcd")
    pool.listed.insert(0, replace(candidate("x"), name=name))
    feed = lab.feed(pool)
    await feed.once()
    assert letters(feed.members) == "abcd"
    assert name not in lab.hand().path.read_text()


# Membership


async def test_who_is_gone_leaves_at_once_and_is_replaced(lab):
    lab.kind = Kind.NTPSEC
    pool = Pool("abcdef")
    feed = lab.feed(pool)

    def later(seconds):
        if 100 < seconds < 131:
            pool.remove("b")

    await lab.run(feed, 200, later)
    assert letters(feed.members) == "acde"
    assert lab.told(What.GONE) == ["b"]
    assert lab.told(What.TOLD) == ["abcd", "acde"]


async def test_an_outage_of_dns_changes_nothing(lab):
    await lab.feed(Pool("abcd")).once()
    before = lab.hand().path.read_bytes()
    lab.news.clear()
    pool = Pool("abcd")
    pool.is_out = True
    feed = lab.feed(pool)
    await lab.run(feed, 7200)
    assert lab.hand().path.read_bytes() == before
    assert feed.problem.code is Failure.DNS
    assert lab.problems() == [Failure.DNS]
    pool.is_out = False
    await lab.run(feed, 100)
    assert feed.problem is None
    assert lab.told(What.SOLVED) == [""]


async def test_a_pool_that_has_nobody_any_more_leaves_the_daemon_with_nobody(lab):
    pool = Pool("abcd")
    feed = lab.feed(pool)
    await feed.once()
    pool.listed = []
    await lab.run(feed, 100)
    assert feed.members == ()
    assert feed.problem.code is Failure.TOO_FEW_SOURCES


# The daemon's word


async def test_who_the_daemon_outvotes_is_replaced_and_held_back(lab):
    lab.verdicts["b"] = LIES
    feed = lab.feed(Pool("abcde"))
    await lab.run(feed, 700)
    assert letters(feed.members) == "acde"
    assert lab.told(What.DISMISSED) == ["b"]
    lab.verdicts.clear()
    # Others go for good; it comes back only when its time is over.
    lab.verdicts["c"] = LIES
    await lab.run(feed, MIN_HOLD - 300)
    assert letters(feed.members) == "acde"
    await lab.run(feed, 600)
    assert letters(feed.members) == "abde"


async def test_with_nobody_to_take_its_place_it_stays(lab):
    lab.verdicts["b"] = LIES
    feed = lab.feed(Pool("abcd"))
    await lab.run(feed, 7200)
    assert letters(feed.members) == "abcd"
    assert lab.told(What.DISMISSED) == []


async def test_what_passes_is_no_reason(lab):
    feed = lab.feed(Pool("abcde"))

    def flap(seconds):
        lab.verdicts["b"] = LIES if seconds % (LEAST_LOOKS * ASK_EVERY) < 1 else Verdict(is_good=True)

    await lab.run(feed, 7200, flap)
    assert lab.told(What.DISMISSED) == []


async def test_holds_are_kept_for_a_later_run(lab, tmp_path):
    lab.verdicts["b"] = LIES
    state = tmp_path / "state"
    await lab.run(lab.feed(Pool("abcde"), state=state), 700)
    pool = Pool("abcde")
    pool.remove("a")
    later = lab.feed(pool, state=state)
    await lab.run(later, 600)
    assert letters(later.members) == "cde"
    await lab.run(later, MIN_HOLD)
    assert letters(later.members) == "bcde"


async def test_a_state_of_another_process_is_refused(lab, tmp_path):
    state = tmp_path / "state"
    with (
        lab.feed(Pool("abcd"), state=state)._opened(),
        pytest.raises(ClientError, match="another process"),
    ):
        await lab.feed(Pool("abcd"), state=state).once()


async def test_a_daemon_that_is_away_and_comes_back(lab):
    async def away(_directory):
        raise Unanswered("chronyd: 506 Cannot talk to daemon")

    lab.answer = away
    feed = lab.feed(Pool("abcd"))
    await lab.run(feed, 600)
    assert letters(feed.members) == "abcd"
    assert lab.problems() == [Failure.DAEMON]
    lab.answer = lab.say
    await lab.run(feed, 100)
    assert lab.told(What.SOLVED) == [""]


async def test_a_daemon_that_does_not_read_our_file(lab):
    async def nothing(_directory):
        return {}

    lab.answer = nothing
    feed = lab.feed(Pool("abcd"))
    await lab.run(feed, 300)
    (problem,) = [news for news in lab.news if news.what is What.PROBLEM]
    assert "chronyd does not know a.servers" in problem.words
    assert f"sourcedir {lab.directory}" in problem.words


# What fails is tried again


async def test_a_command_that_fails_is_tried_again_ever_more_seldom(lab):
    lab.breaks(1)
    feed = lab.feed(Pool("abcd"))
    attempts = []
    apply = feed._hand.apply

    async def counted(*arguments, **options):
        attempts.append(lab.clock.now)
        return await apply(*arguments, **options)

    feed._hand.apply = counted
    await lab.run(feed, 3600)
    assert lab.problems() == [Failure.DAEMON]
    assert 5 <= len(attempts) <= 8
    lab.breaks(0)
    await lab.run(feed, 1000)
    assert lab.told(What.TOLD) == ["abcd"]
    assert lab.told(What.SOLVED) == [""]


async def test_a_directory_that_comes_later(lab, tmp_path):
    hand = lab.hand()
    hand.directory = tmp_path / "later"
    hand.path = hand.directory / hand.path.name
    hand._told = hand.directory / hand._told.name
    feed = lab.feed(Pool("abcd"), hand=hand)
    await lab.run(feed, 200)
    assert feed.problem.code is Failure.CONFIGURATION
    assert lab.problems() == [Failure.CONFIGURATION]
    hand.directory.mkdir()
    await lab.run(feed, 1000)
    assert letters(feed.members) == "abcd"
    assert feed.problem is None


async def test_a_change_that_has_to_wait_is_told_once(lab):
    lab.kind = Kind.NTPD_RS
    (lab.directory / "ntp.toml").write_text("")
    lab.verdicts["b"] = LIES
    feed = lab.feed(Pool("abcde"))
    await lab.run(feed, 1500)
    assert letters(feed.members) == "abcd"
    assert lab.told(What.WAITING) == ["abcd"]


# The command


@pytest.fixture(scope="module")
def knot(tmp_path_factory):
    with Knot(tmp_path_factory.mktemp("knot"), ttl=1, soa_minimum=1) as running:
        yield running


@pytest.fixture(scope="module")
def pool(knot):
    zone = PoolZone(knot)
    zone.add(*((name, f"192.0.2.{number}", f"op={name * 13}") for number, name in enumerate("abcd", 1)))
    zone.list("abcd", port=14460)
    return zone


@pytest.fixture
def options(tmp_path, knot, pool):
    anchor = tmp_path / "anchor"
    anchor.write_text(knot.trust_anchor())
    return [
        *("feed", POOL, "--to=chrony", f"--dir={tmp_path}", f"--trust-anchor={anchor}", "--json"),
        *(f"--resolver={knot.address}:{knot.port}", "--reload=true"),
    ]


def test_the_command_once(tmp_path, options):
    done = run("pool-client", *options, "--once")
    *news, last = map(json.loads, done.stdout.splitlines())
    assert done.status == ExitStatus.OK
    assert last == {
        "pool": POOL,
        "members": [f"{name}.servers.{POOL}:14460" for name in "abcd"],
        "membership": "proven",
        "error": None,
    }
    assert [each["what"] for each in news] == [*["taken"] * 4, "told"]
    assert (
        f"server a.servers.{POOL} nts iburst ntsport 14460\n"
        in (tmp_path / f"truechimer-{POOL}.sources").read_text()
    )


def test_an_unproven_membership_is_told(options):
    others = [option for option in options if not option.startswith("--trust-anchor")]
    done = run("pool-client", *others, "--once", "--dnssec=off")
    *news, last = map(json.loads, done.stdout.splitlines())
    assert last["membership"] == "unproven"
    assert [each["words"] for each in news if each["what"] == "membership"] == [
        "membership unproven: anybody on the way may have chosen these servers"
    ]


def test_the_command_until_it_is_ended(tmp_path, options):
    service = Process("feed", [script("pool-client"), *options], tmp_path)
    file = tmp_path / f"truechimer-{POOL}.sources"
    with service.start():
        wait_until(lambda: '"told"' in service.output(), "the daemon is told")
        service.signal(signal.SIGTERM)
        assert service.wait() == 0
    assert file.read_text().count("server ") == 4


@pytest.mark.parametrize(
    ("more", "status", "code"),
    [
        (["--dir=/does/not/exist"], ExitStatus.USAGE, "configuration"),
        (["--count=9"], ExitStatus.USAGE, "configuration"),
        (["--option=two\nlines"], ExitStatus.USAGE, "configuration"),
        (["--reload='"], ExitStatus.USAGE, "configuration"),
        (["--reload="], ExitStatus.USAGE, "configuration"),
        (["--reload=false"], ExitStatus.NOT_TOLD, "daemon"),
        (["--count=5"], ExitStatus.TOO_FEW_SOURCES, "too-few-sources"),
        (["--resolver=127.0.0.1:1"], ExitStatus.DNS, "dns"),
    ],
)
def test_how_the_command_ends(tmp_path, options, more, status, code):
    if more[0].startswith("--resolver"):
        options = [option for option in options if not option.startswith("--resolver")]
    done = run("pool-client", *options, "--once", *more)
    last = json.loads(done.stdout.splitlines()[-1])
    assert (done.status, last["error"]["code"]) == (status, code)
    assert last["error"]["remedy"]
