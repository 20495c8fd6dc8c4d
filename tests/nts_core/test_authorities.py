"""Lookups without a resolver, down a real hierarchy in a network of its own, past servers that lead nowhere."""

import asyncio
import os
import time

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rrset
import pytest

from lab.knot import Knot
from lab.namespaces import in_namespace
from nts_core.authorities import MAX_QUESTIONS, ROOT_SERVERS, Authorities, Cut
from nts_core.resolve import NoAnswer, ResolveError, Resolver, Resolvers, TrustAnchors, addresses, listing

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace of its own takes root")

PARENT, CHILD, DEAD, LAME = "198.51.1.53", "198.51.2.53", "198.51.3.53", "198.51.4.53"
RECORDS = ("_ntske._tcp SRV 0 10 4460 alice.servers", "alice.servers A 192.0.2.1")


def at(server, address):
    """A name server at port 53 of an address of the namespace."""
    server.address, server.port = address, 53
    return server


def in_hierarchy(tmp_path, story, *, delegation=None):
    """`example` delegates pool.example; `story(parent, child)` runs beside both."""

    def run():
        with at(Knot(tmp_path / "child", records=RECORDS), CHILD) as child:
            lines = delegation or [
                "pool NS ns1.pool",
                "pool NS ns2.pool",
                f"ns1.pool A {DEAD}",
                f"ns2.pool A {CHILD}",
            ]
            with at(
                Knot(tmp_path / "parent", zone="example", records=[*lines, child.ds()]), PARENT
            ) as parent:
                asyncio.run(story(parent, child))

    in_namespace(run, [f"{address}/32" for address in (PARENT, CHILD, LAME)])


def authorities(parent, **options):
    anchors = TrustAnchors.parse(parent.trust_anchor())
    start = Cut(dns.name.from_text("example"), (PARENT,))
    return Authorities(anchors, start=start, **{"allow_private": True, "timeout": 6.0} | options)


async def test_the_root_servers_are_public_addresses_of_both_families():
    assert len(ROOT_SERVERS.addresses) == len(set(ROOT_SERVERS.addresses)) == 26


def test_a_pool_is_found_from_the_zone_above_it(tmp_path):
    async def story(parent, _child):
        lookup = authorities(parent)
        now = time.time()
        (target,) = (await listing(lookup, "pool.example", now)).targets
        assert target.name == "alice.servers.pool.example"
        assert await addresses(lookup, target.name, now) == ["192.0.2.1"]
        with pytest.raises(NoAnswer) as caught:
            await lookup.lookup("nobody.servers.pool.example.", "A", now)
        assert caught.value.kind == "nxdomain"

    in_hierarchy(tmp_path, story)


def test_servers_whose_addresses_are_not_told_are_looked_up(tmp_path):
    async def story(parent, _child):
        assert await addresses(authorities(parent), "alice.servers.pool.example", time.time()) == [
            "192.0.2.1"
        ]

    in_hierarchy(tmp_path, story, delegation=["pool NS ns.elsewhere", f"ns.elsewhere A {CHILD}"])


def test_a_resolver_of_no_use_is_passed_over_for_them(tmp_path):
    async def story(parent, _child):
        anchors = TrustAnchors.parse(parent.trust_anchor())
        lookup = Resolvers([Resolver(DEAD, 53, anchors, 0.3)], authorities(parent))
        assert await addresses(lookup, "alice.servers.pool.example", time.time()) == ["192.0.2.1"]
        assert lookup.is_direct
        assert [error.code for error in lookup.passed_over.values()] == ["resolver-unreachable"]

    in_hierarchy(tmp_path, story)


def test_when_they_are_out_of_reach_it_is_the_resolver_that_is_named(tmp_path):
    async def story(parent, _child):
        anchors = TrustAnchors.parse(parent.trust_anchor())
        start = Cut(dns.name.from_text("example"), (DEAD,))
        nobody = Authorities(anchors, start=start, allow_private=True)
        lookup = Resolvers([Resolver(DEAD, 53, anchors, 0.3)], nobody)
        with pytest.raises(ResolveError) as caught:
            await lookup.lookup("alice.servers.pool.example.", "A", time.time())
        assert caught.value.code == "resolver-unreachable"
        assert not lookup.is_direct

    in_hierarchy(tmp_path, story)


def test_one_lame_server_does_not_end_a_lookup(tmp_path):
    async def story(parent, _child):
        loop = asyncio.get_running_loop()
        transport, lame = await loop.create_datagram_endpoint(
            lambda: Liar(referral(lambda _query: ".", "a.root.example.")), local_addr=(LAME, 53)
        )
        for _ in range(8):
            lookup = authorities(parent)
            assert await addresses(lookup, "alice.servers.pool.example", time.time()) == ["192.0.2.1"]
        transport.close()
        await asyncio.sleep(0)
        assert lame.asked > 0

    both = ["pool NS ns1.pool", "pool NS ns2.pool", f"ns1.pool A {LAME}", f"ns2.pool A {CHILD}"]
    in_hierarchy(tmp_path, story, delegation=both)


@pytest.mark.parametrize(
    "delegation",
    [
        ["pool NS ns.pool", "ns.pool A 127.0.0.1"],
        ["pool NS ns.pool", "ns.pool A 10.0.0.1"],
        ["pool NS ns.pool"],
        ["pool NS ns.loop", "loop NS ns.pool"],
    ],
    ids=["loopback", "private", "no-glue", "a-loop"],
)
def test_a_delegation_leads_to_public_addresses_or_nowhere(tmp_path, delegation):
    async def story(parent, _child):
        lookup = authorities(parent, allow_private=False)
        with pytest.raises(ResolveError) as caught:
            await lookup.lookup("alice.servers.pool.example.", "A", time.time())
        assert caught.value.code == "resolver-failed"
        assert caught.value.remedy

    in_hierarchy(tmp_path, story, delegation=delegation)


class Liar(asyncio.DatagramProtocol):
    """A server that answers with what `says(query)` makes."""

    def __init__(self, says):
        self.says = says
        self.asked = 0

    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, address):
        self.asked += 1
        self.transport.sendto(self.says(dns.message.from_wire(data)), address)


def referral(zone, *servers, glue=()):
    def says(query):
        answer = dns.message.make_response(query)
        answer.flags &= ~dns.flags.AA
        answer.authority.append(dns.rrset.from_text(zone(query), 60, "IN", "NS", *servers))
        answer.additional += [dns.rrset.from_text(name, 60, "IN", "A", where) for name, where in glue]
        return answer.to_wire()

    return says


def deeper(query):
    """One label below whatever was asked for last: a way without an end."""
    return query.question[0].name


@pytest.mark.parametrize(
    "says",
    [
        lambda _query: b"garbage",
        lambda query: dns.message.make_response(query).to_wire(),
        referral(lambda _query: "example.", "ns.example."),
        referral(lambda _query: ".", "a.root.example.", glue=[("a.root.example.", PARENT)]),
        referral(lambda _query: "other.", "ns.other.", glue=[("ns.other.", PARENT)]),
        referral(lambda _query: "pool.example.", "ns.pool.example.", glue=[("ns.pool.example.", PARENT)]),
        referral(deeper, *(f"ns{number}.far.example." for number in range(30))),
    ],
    ids=["garbage", "empty", "sideways", "upward", "elsewhere", "itself", "many-without-addresses"],
)
def test_a_server_that_leads_astray_costs_a_bounded_number_of_questions(tmp_path, says):
    async def story():
        loop = asyncio.get_running_loop()
        transport, liar = await loop.create_datagram_endpoint(lambda: Liar(says), local_addr=(PARENT, 53))
        start = Cut(dns.name.from_text("example"), (PARENT,))
        anchors = TrustAnchors.parse("example. DS 1 13 2 " + "00" * 32)
        lookup = Authorities(anchors, start=start, allow_private=True, timeout=5.0)
        with pytest.raises(ResolveError):
            await lookup.lookup("alice.servers.pool.example.", "A", time.time())
        assert 0 < liar.asked <= MAX_QUESTIONS
        transport.close()
        await asyncio.sleep(0)

    in_namespace(lambda: asyncio.run(story()), [f"{PARENT}/32"])
