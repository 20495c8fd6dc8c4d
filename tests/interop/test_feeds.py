"""Real daemons on members of a pool: chronyd, ntpd-rs and NTPsec's ntpd do what the feed wants of them, and tell it."""

import asyncio
import os
import shlex
import sys

import pytest

from lab.certificates import Authority
from lab.namespaces import in_namespace
from lab.nts_server import NtsServer
from lab.peers import (
    CHRONY,
    CHRONY_TRIXIE,
    NO_CLOCK,
    NTPD_RS_TRIXIE,
    NTPSEC,
    STILL_CLOCK,
    Chronyd,
    library_environment,
    with_hosts,
)
from lab.processes import Process
from nts_core import feed as feeds
from nts_core.asking import Unanswered
from nts_core.feed import Feed, What
from nts_core.feeding import judge
from nts_core.feeding.hand import DAEMONS, Hand
from nts_core.independence import Candidate
from nts_core.membership import Look
from nts_core.roster import Fault

POOL = "pool.example"
SECOND = 1_000_000_000
DEADLINE = 40.0
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a hosts file of its own takes root")


def domain(letter):
    return f"{letter}.servers.{POOL}"


def address(letter):
    return f"127.{ord(letter)}.0.1"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(autouse=True)
def _impatience(monkeypatch):
    monkeypatch.setattr(feeds, "ASK_EVERY", 0.2)
    monkeypatch.setattr(judge, "PATIENCE", dict.fromkeys(Fault, 1.0))


class Members:
    """Servers of one letter each, and what DNS says of them."""

    pool = POOL

    def __init__(self, authority):
        self._authority = authority
        self.servers = {}
        self.listed = []

    async def add(self, letters, *, offset=0):
        for letter in letters:
            server = NtsServer(self._authority.issue(domain(letter)), address(letter))
            server.offset = offset
            await server.start()
            self.servers[letter] = server
            self.listed.append(letter)

    async def look(self, held, _now):
        listed = [
            Candidate(domain(letter), self.servers[letter].ke_port, 0, (address(letter),))
            for letter in self.listed
        ]
        gone = {each.name for each in held} - {each.name for each in listed}
        return Look(listed=listed, gone=gone, again_in=0.2)

    async def stop(self):
        for server in self.servers.values():
            await server.stop()

    def establishments(self):
        return {letter: server.establishments for letter, server in self.servers.items()}


HOSTS = {domain(letter): address(letter) for letter in "abcdef"}


async def until(condition, what):
    """Poll a coroutine, while servers and feeds go on."""
    try:
        async with asyncio.timeout(DEADLINE):
            while True:
                if found := await condition():
                    return found
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"never: {what}") from None


async def fed(feed, condition, what):
    """Until something is so while the feed runs; a later one goes on from the daemon's file."""
    task = asyncio.create_task(feed.run())
    try:
        return await until(condition, what)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def letters(members):
    return "".join(sorted(member.name[0] for member in members))


def told(news, what):
    return ["".join(sorted(name[0] for name in each.names)) for each in news if each.what is what]


class Rows:
    """What chronyd tells of its sources, by letter."""

    def __init__(self, chronyd):
        self._chronyd = chronyd

    async def __call__(self):
        sources, statistics = [
            await asyncio.to_thread(self._chronyd.report, name) for name in ("sources", "sourcestats")
        ]
        by_address = {address(letter): letter for letter in "abcdef"}
        samples = {by_address.get(row[0]): int(row[1]) for row in statistics}
        return {
            by_address.get(row[2]): (row[1], int(row[5], 8), samples.get(by_address.get(row[2]), 0))
            for row in sources
        }


@pytest.mark.parametrize("package", [CHRONY, pytest.param(CHRONY_TRIXIE, marks=pytest.mark.long)], ids=str)
async def test_chronyd_keeps_what_it_measured_of_those_who_stay(tmp_path, monkeypatch, authority, package):
    directory = tmp_path / "sources.d"
    directory.mkdir()
    chronyd = Chronyd(
        tmp_path / "chrony",
        f"sourcedir {directory}\nnosystemcert\nntstrustedcerts {authority.root}\nport 0\n",
        package,
    )
    chronyd.process.argv = with_hosts(chronyd.directory, chronyd.process.argv, HOSTS)
    chronyd.put_chronyc(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    hand = Hand(
        DAEMONS["chrony"], POOL, directory=directory, options=["minpoll -3 maxpoll -3", "maxsamples 64"]
    )
    pool, rows, news = Members(authority), Rows(chronyd), []
    await pool.add("abcd")
    feed = Feed(hand, pool, 4, news.append)
    try:
        await asyncio.to_thread(chronyd.start)

        async def is_measuring():
            found = await rows()
            return all(found.get(letter, ("?", 0, 0))[2] >= 5 for letter in "abcd") and found

        before = await fed(feed, is_measuring, "chronyd measures all four")

        # One member leaves, and the next that the pool offers lies.
        pool.listed.remove("b")
        await pool.add("e", offset=5 * SECOND)
        feed = Feed(hand, pool, 4, news.append)

        async def is_replaced():
            found = await rows()
            return found if set(found) == set("acde") else None

        after = await fed(feed, is_replaced, "b is gone and e is there")
        # What stayed has gone on: an unbroken register, and no sample less.
        for letter in "acd":
            assert after[letter][1] == 0o377 or after[letter][1] >= before[letter][1]
            assert after[letter][2] >= before[letter][2]
        assert told(news, What.GONE) == ["b"]

        # chronyd outvotes the liar, and does not find who takes its place; the next one is good.
        await pool.add("gf")
        feed = Feed(hand, pool, 4, news.append)

        async def is_honest():
            found = await rows()
            is_so = set(found) == set("acdf") and all(found[letter][0] in "*+-" for letter in found)
            return found if is_so else None

        await fed(feed, is_honest, "the liar is replaced")
        assert told(news, What.DISMISSED) == ["e", "g"]
        assert f"{domain('g')} is replaced: chronyd does not find its address" in [
            each.words for each in news
        ]
        assert letters(feed.members) == "acdf"
        # All this took no second key establishment with anybody.
        assert pool.establishments() == dict.fromkeys("abcdef", 1) | {"g": 0}
    finally:
        await asyncio.to_thread(chronyd.stop)
        await pool.stop()


async def test_a_chronyd_that_is_not_there(tmp_path, monkeypatch):
    Chronyd(tmp_path / "chrony", "").put_chronyc(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(Unanswered, match="says nothing"):
        await DAEMONS["chrony"].ask(tmp_path)


class Restarting:
    """A daemon that starts again whenever it ends, as systemd would have it; `tell` ends it."""

    def __init__(self, directory, argv, env=None):
        self._pid = directory / "pid"
        loop = f"trap 'kill $child; exit' TERM; while :; do {shlex.join(argv)} & child=$!; echo $child > {self._pid}; wait $child; done"
        self.process = Process("daemon", ["sh", "-c", loop], directory, env=env)
        self.tell = [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import os; os.kill(int(open({str(self._pid)!r}).read()), 15)",
        ]

    def __enter__(self):
        self.process.start(self._pid.exists)
        return self

    def __exit__(self, *_):
        self.process.stop()


def asked(hand, wanted):
    """The daemon's verdicts once they are as wanted."""

    async def answer():
        try:
            found = await hand.verdicts(await hand.members())
        except Unanswered:
            return None
        return found if wanted({name[0]: verdict for name, verdict in found.items()}) else None

    return answer


_NTP_TOML = """\
[observability]
observation-path = "{directory}/observe"
[source-defaults]
poll-interval-limits = {{ min = 0, max = 0 }}
initial-poll-interval = 0
"""


async def test_ntpd_rs_restarts_for_a_member_that_is_gone(tmp_path, authority):
    (tmp_path / "ntp.toml").write_text(_NTP_TOML.format(directory=tmp_path))
    daemon = NTPD_RS_TRIXIE.command("usr/bin/ntp-daemon")
    argv = with_hosts(tmp_path, [*NO_CLOCK, *STILL_CLOCK, *daemon, "-c", str(tmp_path / "ntp.toml")], HOSTS)
    pool, news = Members(authority), []
    await pool.add("abc")
    await pool.add("d", offset=5 * SECOND)
    try:
        with Restarting(tmp_path, argv) as running:
            hand = Hand(
                DAEMONS["ntpd-rs"],
                POOL,
                directory=tmp_path,
                options=[f'certificate-authority = "{authority.root}"'],
                tell=running.tell,
            )
            # It has read its file without them.
            await until(lambda: asyncio.to_thread((tmp_path / "observe").exists), "ntpd-rs is there")
            await Feed(hand, pool, 4, news.append).once()
            await until(
                asked(
                    hand,
                    lambda found: (
                        all(found[letter].is_good for letter in "abc")
                        and found["d"].fault is Fault.FALSETICKER
                    ),
                ),
                "ntpd-rs has measured all four",
            )
            pool.listed.remove("b")
            await Feed(hand, pool, 4, news.append).once()
            assert letters(await hand.members()) == "acd"
            await until(
                asked(hand, lambda found: all(found[letter].is_good for letter in "ac")),
                "it began anew",
            )
            assert told(news, What.TOLD) == ["abcd", "acd"]
            assert pool.establishments() == {"a": 2, "b": 1, "c": 2, "d": 2}
    finally:
        await pool.stop()


_NTP_CONF = """\
driftfile {directory}/drift
tos minsane 1 minclock 1
restrict default kod nomodify nopeer noquery limited
restrict 127.0.0.1
"""


@pytest.mark.long
def test_ntpsec_restarts_for_a_member_that_is_gone(tmp_path, authority):
    directory = tmp_path / "ntp.d"
    directory.mkdir()
    (tmp_path / "ntp.conf").write_text(_NTP_CONF.format(directory=tmp_path))
    daemon = NTPSEC.command("usr/sbin/ntpd")
    argv = with_hosts(tmp_path, [*NO_CLOCK, *daemon, "-n", "-c", str(tmp_path / "ntp.conf")], HOSTS)

    async def story():
        pool, news = Members(authority), []
        await pool.add("abcd")
        try:
            with Restarting(tmp_path, argv, library_environment()) as running:
                hand = Hand(
                    DAEMONS["ntpsec"],
                    POOL,
                    directory=directory,
                    options=[f"ca {authority.root} minpoll 0 maxpoll 0"],
                    tell=running.tell,
                )
                await Feed(hand, pool, 4, news.append).once()
                await until(
                    asked(hand, lambda found: all(verdict and verdict.is_good for verdict in found.values())),
                    "ntpd selects all four",
                )
                pool.listed.remove("b")
                await Feed(hand, pool, 4, news.append).once()
                assert letters(await hand.members()) == "acd"
                await until(
                    asked(hand, lambda found: all(verdict and verdict.is_good for verdict in found.values())),
                    "it began anew",
                )
                assert pool.establishments() == {"a": 2, "b": 1, "c": 2, "d": 2}
        finally:
            await pool.stop()

    in_namespace(lambda: asyncio.run(story()))
