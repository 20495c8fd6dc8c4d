"""Who is a member: a real zone that changes, behind a real validating resolver, and DNS that fails or lies."""

import asyncio
import time
from contextlib import AsyncExitStack, asynccontextmanager

import dns.flags
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.rrset
import pytest

from lab.knot import Knot
from lab.pool_zone import PoolZone
from lab.processes import free_port
from lab.unbound import Unbound
from nts_core.denial import Witnesses
from nts_core.independence import Candidate
from nts_core.membership import MAX_RETRY, MIN_LOOK, Membership
from nts_core.metadata import Metadata
from nts_core.resolve import ResolveError, Resolver, TrustAnchors
from nts_core.srv import MAX_TARGETS, is_own, is_own_around, targets_that_fit

POOL = "pool.example"
OPERATOR = "abcdefghij234"


@pytest.fixture(scope="module")
def knot(tmp_path_factory):
    with Knot(tmp_path_factory.mktemp("knot"), ttl=1, soa_minimum=1) as running:
        yield running


@pytest.fixture
def zone(knot):
    return PoolZone(knot)


def added(*names):
    return [(name, f"192.0.2.{number}", f"op={OPERATOR}") for number, name in enumerate(names, 1)]


@pytest.fixture(scope="module")
def unbound(tmp_path_factory, knot):
    with Unbound(tmp_path_factory.mktemp("unbound"), [knot]) as running:
        yield running


def asked(knot, server=None):
    """A resolver that validates by the zone's own key."""
    server = server or knot
    return Resolver(server.address, server.port, TrustAnchors.parse(knot.trust_anchor()), 3.0)


def servers(*names):
    return [Candidate(f"{name}.servers.{POOL}") for name in names]


def labels(candidates):
    return [each.name.partition(".")[0] for each in candidates]


class NobodyKnows:
    async def deny(self, name):
        raise ResolveError("denial-unproved", f"nobody tells of {name}", "remedy")


class Denies:
    """Says yes, and keeps who it was asked about."""

    def __init__(self):
        self.asked = []

    async def deny(self, name):
        self.asked.append(name)
        return True


def test_the_pools_own_names():
    assert is_own("alice.servers.pool.example", POOL)
    for name in (
        "servers.pool.example",
        "alice.pool.example",
        "a.b.servers.pool.example",
        ".servers.pool.example",
    ):
        assert not is_own(name, POOL)
        assert not is_own_around(name, f"europe.{POOL}")
    assert not is_own("alice.servers.pool.example", f"europe.{POOL}"), (
        "anybody could have the name around a pool's"
    )
    for name in ("alice.servers.pool.example", "alice.servers.europe.pool.example"):
        assert is_own_around(name, f"europe.{POOL}")


async def test_a_look_finds_the_listed_with_what_the_zone_says_of_them(zone, knot):
    zone.add(*added("alice", "bob"))
    zone.list(["alice", "bob"])
    look = await Membership(f"{POOL}.", asked(knot), Denies()).look([], time.time())
    assert sorted(labels(look.listed)) == ["alice", "bob"]
    assert all(each.metadata == Metadata(OPERATOR) and len(each.addresses) == 1 for each in look.listed)
    assert (look.others, look.gone, look.unusable, look.problem) == ([], set(), {}, None)
    assert look.again_in == MIN_LOOK, "the TTL of a second is not taken at its word"


async def test_a_server_whose_name_is_gone_is_a_member_no_longer(zone, knot, unbound):
    """The answer is full, so that it alone tells nothing of who is not in it."""
    full = [f"s{number}" for number in range(targets_that_fit(POOL))]
    zone.add(*added(*full, "old", "out"))
    zone.list(full)
    membership = Membership(POOL, asked(knot), Witnesses([(unbound.address, unbound.port)]))
    held = servers("old", "out", "s0")
    look = await membership.look(held, time.time())
    assert sorted(labels(look.others)) == ["old", "out"]
    assert (len(look.listed), look.gone) == (MAX_TARGETS, set())
    zone.remove("out")
    async with asyncio.timeout(20):
        while not look.gone:
            # What is known of a server is not asked for again within its TTL, here a second or two.
            await asyncio.sleep(0.2)
            look = await membership.look(held, time.time())
    assert look.gone == {f"out.servers.{POOL}"}
    assert labels(look.others) == ["old"]


async def test_a_server_that_an_answer_has_room_for_and_does_not_name_is_a_member_no_longer(zone, knot):
    zone.add(*added("here", "delisted"))
    zone.list(["here"])
    look = await Membership(POOL, asked(knot), NobodyKnows()).look(servers("here", "delisted"), time.time())
    assert look.gone == {f"delisted.servers.{POOL}"}
    assert look.problem is None


async def test_a_region_is_a_pool_with_the_servers_of_the_pool_around_it(zone, knot):
    """What is proved leads to them, and away from those that it does not name."""
    region = f"europe.{POOL}"
    zone.add(*added("alice", "bob"))
    zone.list(["alice", "bob"], region="europe")
    membership = Membership(region, asked(knot), Denies())
    look = await membership.look([], time.time())
    assert (sorted(labels(look.listed)), look.unusable) == (["alice", "bob"], {})
    zone.list(["alice"], region="europe")
    look = await Membership(region, asked(knot), NobodyKnows()).look(servers("alice", "bob"), time.time())
    assert look.gone == {f"bob.servers.{POOL}"}


async def test_a_pool_that_lists_nobody_keeps_those_whose_names_are_there(zone, knot):
    zone.add(*added("left"))
    zone.remove("right")
    zone.list([])
    denier = Denies()
    look = await Membership(POOL, asked(knot), denier).look(servers("left", "right"), time.time())
    assert look.problem.code == "no-srv"
    assert labels(look.others) == ["left"]
    assert look.gone == {f"right.servers.{POOL}"}
    assert denier.asked == [f"right.servers.{POOL}"]


async def test_an_absence_that_nobody_confirms_removes_nobody(zone, knot):
    zone.remove("phantom")
    zone.list([])
    look = await Membership(POOL, asked(knot), NobodyKnows()).look(servers("phantom"), time.time())
    assert look.gone == set()
    assert look.problem is not None


async def test_an_outage_removes_nobody_and_is_asked_about_ever_less_often(zone, knot):
    silent = Resolver("127.0.0.1", free_port(), TrustAnchors.parse(knot.trust_anchor()), 0.2)
    membership = Membership(POOL, silent, Denies())
    waits = []
    for _ in range(9):
        look = await membership.look(servers("alice"), time.time())
        assert (look.problem.code, look.gone, look.listed) == ("resolver-unreachable", set(), [])
        waits.append(look.again_in)
    assert waits[:3] == [MIN_LOOK, 2 * MIN_LOOK, 4 * MIN_LOOK]
    assert waits[-2:] == [MAX_RETRY, MAX_RETRY]


# Denials


class Says(asyncio.DatagramProtocol):
    """Answers with what `alter` makes of the true answer: a message, octets, or None for silence."""

    def __init__(self, knot, alter):
        self.knot = knot
        self.alter = alter
        self.questions = []

    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, address):
        query = dns.message.from_wire(data)
        self.questions.append(query)
        answer = self.alter(dns.query.tcp(query, self.knot.address, timeout=5, port=self.knot.port))
        if answer is not None:
            self.transport.sendto(answer if isinstance(answer, bytes) else answer.to_wire(), address)


@asynccontextmanager
async def saying(knot, port, **servers):
    """Servers at addresses of loopback (`one=alter` is 127.0.0.1) and one port."""
    numbers = {"one": 1, "two": 2, "three": 3}
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        made = {}
        for name, alter in servers.items():
            transport, made[name] = await loop.create_datagram_endpoint(
                lambda alter=alter: Says(knot, alter), local_addr=(f"127.0.0.{numbers[name]}", port)
            )
            stack.callback(transport.close)
        yield made


def honest(answer):
    return answer


def unsure(answer):
    """As a resolver that does not validate."""
    answer.flags &= ~(dns.flags.AD | dns.flags.AA)
    return answer


def names_two(answer):
    """A resolver that does not validate, and knows where the zone's servers are."""
    question = answer.question[0]
    if question.name == dns.name.from_text("ns.pool.example") and question.rdtype == dns.rdatatype.A:
        answer.set_rcode(dns.rcode.NOERROR)
        answer.answer = [dns.rrset.from_text("ns.pool.example.", 1, "IN", "A", "127.0.0.2")]
    if question.name == dns.name.from_text("ns2.pool.example") and question.rdtype == dns.rdatatype.A:
        answer.set_rcode(dns.rcode.NOERROR)
        answer.answer = [dns.rrset.from_text("ns2.pool.example.", 1, "IN", "A", "127.0.0.3")]
    if question.rdtype == dns.rdatatype.NS:
        answer.answer = [
            dns.rrset.from_text("pool.example.", 1, "IN", "NS", "ns.pool.example.", "ns2.pool.example.")
        ]
    return unsure(answer)


def has_it(answer):
    answer.set_rcode(dns.rcode.NOERROR)
    answer.answer = [dns.rrset.from_text(answer.question[0].name, 1, "IN", "A", "192.0.2.9")]
    return answer


def broken(answer):
    answer.set_rcode(dns.rcode.SERVFAIL)
    return answer


async def test_a_validated_denial_counts(zone, knot, unbound):
    zone.add(*added("there"))
    witnesses = Witnesses([(unbound.address, unbound.port)])
    assert await witnesses.deny("never-there.servers.pool.example")
    assert not await witnesses.deny("there.servers.pool.example.")


@pytest.mark.parametrize(
    ("two", "three", "expected"),
    [
        (honest, honest, True),
        (honest, has_it, False),
        (has_it, honest, False),
        (honest, broken, None),
        (honest, unsure, None),
        (lambda _: None, honest, None),
        (lambda _: b"garbage", honest, None),
    ],
    ids=[
        "both",
        "one-has-it",
        "the-other-has-it",
        "one-is-broken",
        "one-is-no-authority",
        "silence",
        "garbage",
    ],
)
async def test_two_of_the_zones_own_servers_count(knot, monkeypatch, two, three, expected):
    monkeypatch.setattr("nts_core.denial._TIMEOUT", 0.3)
    port = free_port()
    async with saying(knot, port, one=names_two, two=two, three=three) as made:
        witnesses = Witnesses([("127.0.0.1", port)], authority_port=port)
        if expected is None:
            with pytest.raises(ResolveError) as caught:
                await witnesses.deny("gone.servers.pool.example")
            assert caught.value.code == "denial-unproved"
        else:
            assert await witnesses.deny("gone.servers.pool.example") is expected
        assert all(len(server.questions) <= 8 for server in made.values())


async def test_a_resolver_that_fails_is_passed_over(knot, unbound):
    port = free_port()
    async with saying(knot, port, one=broken):
        assert await Witnesses([("127.0.0.1", port), (unbound.address, unbound.port)]).deny(
            "gone.servers.pool.example"
        )


@pytest.mark.parametrize(
    "alter", [broken, lambda _: b"\0" * 600, lambda _: None], ids=["broken", "garbage", "silent"]
)
async def test_without_a_usable_word_nothing_is_known(knot, monkeypatch, alter):
    monkeypatch.setattr("nts_core.denial._TIMEOUT", 0.3)
    port = free_port()
    async with saying(knot, port, one=alter):
        with pytest.raises(ResolveError):
            await Witnesses([("127.0.0.1", port)]).deny("gone.servers.pool.example")
