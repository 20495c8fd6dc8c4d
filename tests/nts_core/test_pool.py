"""A pool's client with real sockets, keys and files on loopback; DNS is a book of our own, which tests change."""

import asyncio
import json
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import dns.rdataclass
import dns.rdataset
import pytest
from cryptography import x509

from lab.certificates import Authority
from lab.nts_server import NtsServer
from lab.processes import free_port
from nts_core import membership
from nts_core.client import ClientError, Failure
from nts_core.panel import BURST, PATIENCE, Standing
from nts_core.pool import PoolClient
from nts_core.resolve import Answer, NoAnswer, Proof, ResolveError
from nts_core.roster import Fault
from nts_core.source import SystemClock

POOL = "pool.example"
SECOND = 1_000_000_000
GOOD = SystemClock(is_good=lambda: True)


def domain(name):
    return f"{name}.servers.{POOL}"


class Book:
    """What DNS says: servers by name, and which of them the SRV answer names."""

    def __init__(self):
        self.members = {}
        self.listed = []
        self.first = set()
        self.outage = False
        self.looks = 0

    def add(self, name, server, operator=None, *, is_first=False):
        self.members[domain(name)] = server.host, server.ke_port, operator or name
        self.first |= {domain(name)} if is_first else set()
        self.listed.append(domain(name))

    def remove(self, name):
        del self.members[domain(name)]
        if domain(name) in self.listed:
            self.listed.remove(domain(name))

    async def lookup(self, owner, rdtype, now):
        if self.outage:
            raise ResolveError("resolver-unreachable", "nobody answers", "wait")
        name = owner.removesuffix(".")
        found = []
        if rdtype == "SRV":
            self.looks += 1
            found = [
                f"{0 if each in self.first else 1} 10 {self.members[each][1]} {each}." for each in self.listed
            ]
        elif name in self.members and rdtype in {"A", "TXT"}:
            host, _, operator = self.members[name]
            found = [host] if rdtype == "A" else [f'"v=truechimer1 op={operator * 3:a<13.13}"']
        if not found:
            raise NoAnswer("nodata", f"there is no {rdtype} at {owner}")
        return Answer(owner, rdtype, dns.rdataset.from_text("IN", rdtype, 1, *found), 1, Proof.PROVEN)

    async def deny(self, name):
        return name not in self.members


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def pairs(authority):
    """Certificates are made once."""
    return {name: authority.issue(domain(name)) for name in "abcdefgh"}


@pytest.fixture(scope="module")
def roots(authority):
    return x509.load_pem_x509_certificates(authority.root.read_bytes())


class Lab:
    """A pool of servers with one letter as their name, each of an operator and a network of its own."""

    def __init__(self, pairs, roots, state):
        self._pairs, self._roots, self._state = pairs, roots, state
        self.book = Book()
        self.servers = {}

    async def add(self, *names, operator=None, is_first=False):
        for name in names:
            server = NtsServer(self._pairs[name], f"127.{ord(name)}.0.1")
            await server.start()
            self.servers[name] = server
            self.book.add(name, server, operator, is_first=is_first)

    def client(self, **options):
        defaults = {
            "lookup": self.book,
            "denier": self.book,
            "roots": self._roots,
            "interval": 0.05,
            "clock": GOOD,
        }
        return PoolClient(POOL, **(defaults | options))

    @property
    def state(self):
        return self._state

    async def close(self):
        for server in self.servers.values():
            await server.stop()
            assert max(server.cookies.values(), default=0) <= 1, "a cookie was seen twice"


@pytest.fixture
async def lab(pairs, roots, tmp_path, monkeypatch):
    monkeypatch.setattr(membership, "MIN_LOOK", 0.1)
    made = Lab(pairs, roots, tmp_path / "state")
    yield made
    await made.close()


def used(view, *standings):
    return sorted(
        source.candidate.name[0] for source in view.sources if not standings or source.standing in standings
    )


def holds(view):
    """Who is held back and why, by letter."""
    return {source.candidate.name[0]: source.hold for source in view.held}


async def until(pool, wanted, timeout=15.0):
    """The first view of which `wanted` holds."""
    view = None
    try:
        async with asyncio.timeout(timeout):
            async for view in pool.views():
                if wanted(view):
                    return view
    except TimeoutError:
        raise AssertionError(f"never came: {view}") from None
    raise AssertionError("the client has ended")


# The time


async def test_the_time_of_four_that_agree(lab):
    await lab.add(*"abcd")
    async with lab.client() as pool:
        found = await pool.time()
        assert abs(found - datetime.now(UTC)) < timedelta(seconds=1)
        view = await pool.settled()
    assert used(view, Standing.TRUECHIMER) == list("abcd")
    assert view.given_up == ()
    assert (view.held, view.problem, view.warnings) == ((), None, ())
    reading = view.reading
    assert abs(reading.offset) < SECOND
    assert 0 < reading.error < SECOND
    assert all(server.establishments == 1 for server in lab.servers.values())


async def test_a_clock_that_is_wrong_is_told_of_and_not_set(lab):
    """All servers say that it is an hour later."""
    await lab.add(*"abcd")
    for server in lab.servers.values():
        server.offset = 3600 * SECOND
    before = time.time_ns() - time.monotonic_ns()
    async with lab.client() as pool:
        found = await pool.reading()
    assert abs(found.offset - 3600 * SECOND) < SECOND
    assert abs(found.unix - time.time_ns() - 3600 * SECOND) < 2 * SECOND
    assert abs(time.time_ns() - time.monotonic_ns() - before) < SECOND


async def test_a_host_that_slept_and_a_clock_that_was_set_do_no_harm(lab, monkeypatch):
    await lab.add(*"abcd")
    steady, system = time.clock_gettime_ns, time.time_ns
    async with lab.client(interval=3600) as pool:
        await pool.settled()
        # An hour of sleep: both clocks go on, the one of the event loop does not.
        monkeypatch.setattr(time, "clock_gettime_ns", lambda clock: steady(clock) + 3600 * SECOND)
        monkeypatch.setattr(time, "time_ns", lambda: system() + 3600 * SECOND)
        assert abs((await pool.reading()).unix - system() - 3600 * SECOND) < SECOND
        # Then somebody sets the system's clock a day ahead.
        monkeypatch.setattr(time, "time_ns", lambda: system() + 25 * 3600 * SECOND)
        reading = await pool.reading()
        assert abs(reading.unix - system() - 3600 * SECOND) < SECOND
        assert all(abs(each.offset + 24 * 3600 * SECOND) < SECOND for each in pool.view().sources)


async def test_no_more_servers_than_wanted_are_asked(lab):
    await lab.add(*"abcdef")
    async with lab.client(count=3) as pool:
        await pool.settled()
    assert sum(server.establishments for server in lab.servers.values()) == 3


# Replacement


async def test_a_falseticker_is_replaced_at_once_and_held_back(lab):
    await lab.add(*"acde")
    await lab.add("b", is_first=True)
    lab.servers["b"].offset = 30 * SECOND
    async with lab.client() as pool:
        view = await pool.settled()
        assert used(view, Standing.TRUECHIMER) == list("acde")
        assert holds(view)["b"].fault is Fault.FALSETICKER
        asked = sum(lab.servers["b"].cookies.values())
        assert BURST <= asked <= BURST + 1
        await until(pool, lambda view: min(source.samples for source in view.sources) > 2 * BURST)
        assert sum(lab.servers["b"].cookies.values()) == asked, "nobody asks it any more"


async def test_a_source_that_begins_to_lie_is_replaced(lab):
    await lab.add(*"abcde")
    async with lab.client() as pool:
        view = await pool.settled()
        liar = used(view)[0]
        lab.servers[liar].offset = -5 * SECOND
        view = await until(pool, lambda view: view.truechimers == 4 and liar not in used(view))
    assert holds(view)[liar].fault is Fault.FALSETICKER


async def test_a_source_that_falls_silent_is_replaced_with_patience(lab, monkeypatch):
    monkeypatch.setattr("nts_core.client.NTP_TIMEOUT", 0.05)
    monkeypatch.setattr("nts_core.client.exchange.__kwdefaults__", {"timeout": 0.05})
    await lab.add(*"abcde")
    async with lab.client() as pool:
        mute = used(await pool.settled())[0]
        asked = sum(lab.servers[mute].cookies.values())
        lab.servers[mute].is_silent = True
        view = await until(pool, lambda view: view.truechimers == 4 and mute not in used(view))
    assert holds(view)[mute].fault is Fault.UNREACHABLE
    assert sum(lab.servers[mute].cookies.values()) >= asked + PATIENCE - 1


async def test_a_dead_server_is_replaced_at_once(lab):
    await lab.add(*"bcde")
    lab.book.add("a", NtsServerStub(), is_first=True)
    async with lab.client() as pool:
        view = await pool.settled()
    assert used(view, Standing.TRUECHIMER) == list("bcde")


class NtsServerStub:
    """An address where nobody is."""

    def __init__(self):
        self.host, self.ke_port = "127.0.0.77", free_port()


@pytest.mark.parametrize("code", [b"DENY", b"RSTR"])
async def test_who_refuses_is_left_alone(lab, code):
    await lab.add(*"bcde")
    await lab.add("a", is_first=True)
    rude = lab.servers["a"]
    rude.before, rude.is_silent = rude.kiss(code), True
    async with lab.client() as pool:
        view = await pool.settled()
        assert used(view, Standing.TRUECHIMER) == list("bcde")
    assert holds(view)["a"].fault is Fault.REFUSED
    assert sum(rude.cookies.values()) == 1


async def test_who_is_not_synchronised_is_replaced(lab):
    await lab.add(*"cde")
    await lab.add(*"ab", is_first=True)
    for name in "ab":
        lab.servers[name].clock = replace(lab.servers[name].clock, leap=3, stratum=16)
    async with lab.client(count=3) as pool:
        view = await pool.settled()
    assert used(view, Standing.TRUECHIMER) == list("cde")
    assert {name: hold.fault for name, hold in holds(view).items()} == dict.fromkeys("ab", Fault.UNFIT)


async def test_a_certificate_that_has_ended_is_renewed_or_ends_the_source(lab, authority, monkeypatch):
    """Its name is still in the zone, and its old keys still work."""
    monkeypatch.setattr("nts_core.session.MIN_RETRY", SECOND // 2)
    now = datetime.now(UTC)
    await lab.add(*"abcd")
    for name in "ab":
        lab.servers[name].certify(
            authority.issue(
                domain(name),
                not_before=now - timedelta(days=1),
                not_after=now + timedelta(seconds=3),
                file=f"short-{name}",
            )
        )
    async with lab.client() as pool:
        assert used(await pool.settled(), Standing.TRUECHIMER) == list("abcd")
        lab.servers["b"].certify(authority.issue(domain("b"), file="long-b"))
        view = await until(pool, lambda view: "a" in holds(view) and lab.servers["b"].establishments == 2)
    assert "certificate" in holds(view)["a"].reason
    assert used(view) == list("bcd")


# Membership


async def test_who_leaves_the_pool_is_dropped_at_once_with_its_cookies(lab):
    """It still serves, and hands out cookies gladly."""
    await lab.add(*"abcde")
    async with lab.client(state=lab.state) as pool:
        leaver = used(await pool.settled())[0]
        lab.book.remove(leaver)
        view = await until(pool, lambda view: leaver not in used(view) and view.truechimers == 4)
        asked = lab.servers[leaver].establishments, sum(lab.servers[leaver].cookies.values())
        assert leaver not in holds(view)
        assert view.departed == (domain(leaver),)
        looks = lab.book.looks
        await until(pool, lambda _: lab.book.looks > looks + 3)
        assert (lab.servers[leaver].establishments, sum(lab.servers[leaver].cookies.values())) == asked
    assert not list(lab.state.glob(f"{leaver}.*.json"))


async def test_an_outage_of_dns_removes_nobody(lab):
    await lab.add(*"abcd")
    async with lab.client() as pool:
        await pool.settled()
        lab.book.outage = True
        view = await until(pool, lambda view: view.problem is not None)
        taken = max(source.samples for source in view.sources)
        view = await until(pool, lambda view: min(source.samples for source in view.sources) > taken + 3)
        assert used(view, Standing.TRUECHIMER) == list("abcd")
        lab.book.outage = False
        view = await until(pool, lambda view: view.problem is None)
    assert used(view) == list("abcd")


async def test_one_source_at_a_time_is_exchanged_for_another_operators(lab):
    await lab.add("a", "b", operator="same")
    async with lab.client(count=2) as pool:
        view = await pool.settled()
        assert len(view.given_up) == 1
        await lab.add("c")
        view = await until(pool, lambda view: view.given_up == () and view.truechimers == 2)
    assert "c" in used(view)


async def test_who_leaves_and_comes_back_is_told_of_no_more(lab):
    await lab.add(*"abcd")
    async with lab.client() as pool:
        await pool.settled()
        lab.book.remove("a")
        await until(pool, lambda view: view.departed == (domain("a"),))
        lab.book.add("a", lab.servers["a"])
        view = await until(pool, lambda view: "a" in used(view))
        assert view.departed == ()


async def test_a_target_that_is_no_host_is_told_and_ends_nothing(lab):
    await lab.add(*"abcd")
    lab.book.add("a_b!", lab.servers["a"], is_first=True)
    async with lab.client() as pool:
        view = await pool.settled()
    assert view.truechimers == 4
    assert view.unusable == {domain("a_b!"): "its name is not that of a host"}


# Ties


async def test_while_no_majority_tells_who_is_wrong_others_are_tried(lab):
    """Four at first, of which two lie, each in its own way."""
    await lab.add(*"cdefgh")
    await lab.add(*"ab", is_first=True)
    lab.servers["a"].offset, lab.servers["b"].offset = 30 * SECOND, -30 * SECOND
    async with lab.client() as pool:
        view = await until(pool, lambda view: view.truechimers == 4)
    assert not {"a", "b"} & set(used(view))


async def test_with_nobody_else_a_tie_is_told(lab):
    await lab.add(*"ab")
    lab.servers["a"].offset = 30 * SECOND
    async with lab.client(count=2) as pool:
        with pytest.raises(ClientError) as caught:
            await pool.time()
        assert used(pool.view()) == ["a", "b"]
    assert "the sources disagree" in caught.value.message


# Disks


async def test_a_full_disk_is_a_warning_and_costs_no_sample(lab, monkeypatch):
    def full(*_):
        raise ClientError(Failure.CONFIGURATION, "no space left", "free some")

    await lab.add(*"abcd")
    async with lab.client(state=lab.state) as pool:
        taken = max(source.samples for source in (await pool.settled()).sources)
        monkeypatch.setattr("nts_core.store.CookieFile.save", full)
        monkeypatch.setattr("nts_core.store.PoolFile.save", full)
        view = await until(pool, lambda view: min(source.samples for source in view.sources) > taken + 20)
        assert "no space left" in view.warnings
        assert used(view, Standing.TRUECHIMER) == list("abcd")
        assert not list(lab.state.glob("?.servers*.json")), "no cookie that may be used is there"


@pytest.mark.parametrize("count", [-1, 0, 9])
def test_a_count_that_no_pool_can_have(lab, count):
    with pytest.raises(ClientError) as caught:
        lab.client(count=count)
    assert caught.value.code == Failure.CONFIGURATION


# Too few


async def test_too_few_servers_are_told_one_by_one(lab):
    await lab.add(*"ab")
    lab.book.add("c", NtsServerStub())
    async with lab.client() as pool:
        with pytest.raises(ClientError) as caught:
            await pool.time()
    assert caught.value.code == Failure.TOO_FEW_SOURCES
    assert "2 of 3" in caught.value.message
    assert domain("c") in caught.value.message
    assert caught.value.remedy


async def test_a_pool_that_cannot_be_looked_up_is_told_at_once(lab):
    lab.book.outage = True
    async with lab.client() as pool:
        with pytest.raises(ClientError) as caught:
            await pool.time()
    assert (caught.value.code, caught.value.message) == (Failure.DNS, "nobody answers")


async def test_while_nobody_answers_nobody_is_blamed_and_it_goes_on_when_the_network_is_back(
    lab, monkeypatch
):
    await lab.add(*"abcd")
    there = dict(lab.book.members)
    lab.book.members = {name: ("127.0.0.78", port, who) for name, (_, port, who) in there.items()}
    async with lab.client() as pool:
        view = await pool.settled()
        assert {hold.fault for hold in holds(view).values()} == {Fault.UNREACHED}
        lab.book.outage = True
        await until(pool, lambda view: view.problem is not None)
        lab.book.members, lab.book.outage = there, False
        assert used(await until(pool, lambda view: view.truechimers == 4)) == list("abcd")


# State


async def test_a_later_run_goes_on_with_the_same_sources_and_no_key_establishment(lab):
    await lab.add(*"abcdefgh")
    async with lab.client(state=lab.state) as pool:
        before = used(await pool.settled())
    lab.book.listed.reverse()
    async with lab.client(state=lab.state) as pool:
        assert used(await pool.settled()) == before
    assert sum(server.establishments for server in lab.servers.values()) == 4
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in lab.state.iterdir())


async def test_a_later_run_needs_no_dns_while_it_has_cookies(lab):
    await lab.add(*"abcd")
    async with lab.client(state=lab.state) as pool:
        await pool.settled()
    lab.book.outage = True
    async with lab.client(state=lab.state) as pool:
        assert abs(await pool.time() - datetime.now(UTC)) < timedelta(seconds=1)
        assert used(await pool.settled(), Standing.TRUECHIMER) == list("abcd")
        assert pool.view().problem is not None, "and that is told"
    assert all(server.establishments == 1 for server in lab.servers.values())


async def test_who_left_the_pool_between_two_runs_is_not_asked(lab):
    await lab.add(*"abcd")
    async with lab.client(state=lab.state) as pool:
        await pool.settled()
    lab.book.remove("a")
    asked = sum(lab.servers["a"].cookies.values())
    async with lab.client(state=lab.state) as pool:
        assert used(await pool.settled()) == list("bcd")
    assert sum(lab.servers["a"].cookies.values()) == asked
    assert not list(lab.state.glob("a.*.json"))


async def test_who_is_held_back_is_so_in_a_later_run(lab):
    await lab.add(*"bcd")
    await lab.add("a", is_first=True)
    lab.servers["a"].offset = 30 * SECOND
    async with lab.client(count=3, state=lab.state) as pool:
        await until(pool, lambda view: "a" in holds(view))
    async with lab.client(count=3, state=lab.state) as pool:
        view = await pool.settled()
    assert holds(view)["a"].fault is Fault.FALSETICKER
    assert 3500 < holds(view)["a"].until <= 3600
    assert used(view, Standing.TRUECHIMER) == list("bcd")


async def test_two_clients_do_not_share_a_state(lab):
    await lab.add("a")
    async with lab.client(state=lab.state):
        with pytest.raises(ClientError) as caught:
            async with lab.client(state=lab.state):
                pass
    assert caught.value.code == Failure.CONFIGURATION


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"\xff" * 100,
        b'{"version": 1, "pool": "pool.example", "membership": null, "used": [{"name": "", "port": 0}], "holds": []}',
    ],
)
async def test_a_damaged_state_is_set_aside_and_told(lab, content):
    await lab.add(*"abcd")
    async with lab.client(state=lab.state) as pool:
        await pool.settled()
    (file,) = lab.state.glob("pool-*.json")
    file.write_bytes(content)
    async with lab.client(state=lab.state) as pool:
        view = await pool.settled()
    assert len(view.warnings) == 1
    assert view.truechimers == 4
    assert len(json.loads(file.read_text())["used"]) == 4
