"""The validating lookup against a real Knot, a real Unbound, and servers that lie."""

import asyncio
import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import dns.dnssec
import dns.flags
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.rdata
import dns.rdatatype
import dns.rrset
import pytest

from lab.knot import Knot
from lab.processes import free_port
from lab.unbound import Unbound
from nts_core.metadata import Metadata
from nts_core.resolve import (
    ROOT,
    Dnssec,
    NoAnswer,
    Proof,
    ResolveError,
    Resolver,
    Resolvers,
    SrvTarget,
    TrustAnchors,
    addresses,
    listing,
    metadata,
)

YEAR = 365 * 86400
ALICE = "alice.servers.pool.example."
RECORDS = (
    "_ntske._tcp SRV 0 10 4460 Alice.servers",
    "alice.servers A 192.0.2.1",
    "alice.servers AAAA 2001:db8::1",
    'alice.servers TXT "v=spf1 -all"',
    'alice.servers TXT "v=truechimer1 op=abcdefghij234 as=64500,64501 cc=DE"',
    "four.servers A 192.0.2.4",
    'odd.servers TXT "v=truechimer1 op=ALICE"',
    *(f'talkative.servers TXT "v=truechimer1 op=abcdefghij23{n}"' for n in range(2, 8)),
    "alias.servers CNAME alice.servers",
    "*.wild.servers A 192.0.2.7",
    "_ntske._tcp.off SRV 0 0 0 .",
    "unsigned NS ns1.unsigned",
    "ns1.unsigned A 127.0.0.1",
    *(f"_ntske._tcp.big SRV {n % 2} 10 4460 a-name-of-some-length-{n}.servers" for n in range(60)),
    *(f"many.servers A 192.0.2.{n}" for n in range(20)),
)


@pytest.fixture(scope="module")
def knot(tmp_path_factory):
    with Knot(tmp_path_factory.mktemp("knot"), records=RECORDS) as running:
        yield running


@pytest.fixture(scope="module")
def unbound(tmp_path_factory, knot):
    with Unbound(tmp_path_factory.mktemp("unbound"), [knot]) as running:
        yield running


@pytest.fixture(params=["knot", "unbound"])
def resolver(request, knot):
    """Both an authoritative and a recursive server will do."""
    server = request.getfixturevalue(request.param)
    return Resolver(server.address, server.port, TrustAnchors.parse(knot.trust_anchor()), 3.0)


class Liar(asyncio.DatagramProtocol):
    """Answers with what `alter` makes of the true answer: a message, octets, or None for silence."""

    def __init__(self, knot, alter):
        self.knot = knot
        self.alter = alter
        self.questions = 0

    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, address):
        self.questions += 1
        query = dns.message.from_wire(data)
        answer = self.alter(dns.query.tcp(query, self.knot.address, timeout=5, port=self.knot.port))
        if answer is not None:
            octets = answer if isinstance(answer, bytes) else answer.to_wire(max_size=65535)
            self.transport.sendto(octets, address)


@asynccontextmanager
async def lying(knot, alter, *, timeout=3.0):
    loop = asyncio.get_running_loop()
    transport, liar = await loop.create_datagram_endpoint(
        lambda: Liar(knot, alter), local_addr=("127.0.0.1", free_port())
    )
    host, port = transport.get_extra_info("sockname")
    resolver = Resolver(host, port, TrustAnchors.parse(knot.trust_anchor()), timeout)
    resolver.liar = liar
    try:
        yield resolver
    finally:
        transport.close()


async def failure(coroutine):
    with pytest.raises(ResolveError) as caught:
        await coroutine
    assert caught.value.message
    assert caught.value.remedy
    return caught.value


# Lookups that succeed, directly and through a resolver


async def test_a_signed_answer_is_returned(resolver):
    answer = await resolver.lookup(ALICE, "A", time.time())
    assert [record.address for record in answer.rdatas] == ["192.0.2.1"]
    assert (answer.owner, answer.rdtype) == (ALICE, "A")
    assert 0 <= answer.ttl <= 2


async def test_an_aware_datetime_is_a_time_too(resolver):
    assert (await resolver.lookup(ALICE, "A", datetime.now(UTC))).rdatas


async def test_a_pool_gives_its_targets_and_these_their_addresses_ipv6_first(resolver):
    now = time.time()
    assert list((await listing(resolver, "pool.example", now)).targets) == [
        SrvTarget("alice.servers.pool.example", 4460, 0, 10)
    ]
    assert await addresses(resolver, "alice.servers.pool.example", now) == ["2001:db8::1", "192.0.2.1"]
    assert await addresses(resolver, "four.servers.pool.example", now) == ["192.0.2.4"]


async def test_a_target_has_metadata_or_none(resolver):
    now = time.time()
    found = Metadata("abcdefghij234", (64500, 64501), ("DE",))
    assert await metadata(resolver, "alice.servers.pool.example", now) == found
    for name in ("four", "odd", "talkative", "nobody", "alias"):
        assert await metadata(resolver, f"{name}.servers.pool.example", now) is None


@pytest.mark.parametrize("offset", [-2 * YEAR, 2 * YEAR])
async def test_metadata_that_is_not_valid_now_is_none(resolver, offset):
    assert await metadata(resolver, "alice.servers.pool.example", time.time() + offset) is None


async def test_metadata_is_believed_only_as_it_was_signed(knot):
    def flatter(answer):
        for rrset in answer.answer:
            if rrset.rdtype == dns.rdatatype.TXT:
                rrset.update(dns.rrset.from_text(ALICE, 2, "IN", "TXT", '"v=truechimer1 op=zzzzzzzzzzzzz"'))
        return answer

    async with lying(knot, flatter) as resolver:
        assert await metadata(resolver, "alice.servers.pool.example", time.time()) is None


async def test_an_answer_too_long_for_udp_comes_over_tcp_and_is_bounded(resolver):
    targets = (await listing(resolver, "big.pool.example", time.time())).targets
    assert len(targets) == 16
    assert [target.priority for target in targets] == [0] * 16
    assert len(await addresses(resolver, "many.servers.pool.example", time.time())) == 16


async def test_a_ds_is_as_good_an_anchor_as_a_key(knot):
    resolver = Resolver(knot.address, knot.port, TrustAnchors.parse(knot.ds()))
    assert (await resolver.lookup(ALICE, "A", time.time())).rdatas


async def test_a_child_zone_is_validated_through_its_ds_in_the_parent(tmp_path, knot):
    parent_records = [
        "pool NS ns1.pool",
        "ns1.pool A 127.0.0.1",
        knot.ds(),
    ]
    with (
        Knot(tmp_path / "parent", zone="example", records=parent_records) as parent,
        Unbound(tmp_path / "unbound", [parent, knot]) as unbound,
    ):
        anchors = TrustAnchors.parse(parent.trust_anchor())
        resolver = Resolver(unbound.address, unbound.port, anchors)
        assert (await resolver.lookup(ALICE, "A", time.time())).rdatas


async def test_a_child_zone_with_another_ds_is_bogus(tmp_path, knot):
    digest = "pool DS 1 13 2 " + "00" * 32
    with (
        Knot(tmp_path / "parent", zone="example", records=["pool NS ns1.pool", digest]) as parent,
        Unbound(tmp_path / "unbound", [parent, knot]) as unbound,
    ):
        resolver = Resolver(unbound.address, unbound.port, TrustAnchors.parse(parent.trust_anchor()))
        assert (await failure(resolver.lookup(ALICE, "A", time.time()))).code == "bogus"


async def test_a_child_zone_without_ds_is_unsigned(tmp_path, knot):
    with (
        Knot(tmp_path / "parent", zone="example", records=["pool NS ns1.pool"]) as parent,
        Unbound(tmp_path / "unbound", [parent, knot]) as unbound,
    ):
        resolver = Resolver(unbound.address, unbound.port, TrustAnchors.parse(parent.trust_anchor()))
        assert (await failure(resolver.lookup(ALICE, "A", time.time()))).code == "unsigned"


async def test_keys_are_asked_for_once_while_their_ttl_lasts(knot):
    async with lying(knot, lambda answer: answer) as resolver:
        now = time.time()
        await resolver.lookup(ALICE, "A", now)
        await resolver.lookup(ALICE, "AAAA", now)
        assert resolver.liar.questions == 3
        await resolver.lookup(ALICE, "AAAA", now + 10)
        assert resolver.liar.questions == 5


# Absence


@pytest.mark.parametrize(
    ("owner", "rdtype", "kind"),
    [(ALICE, "CAA", "nodata"), ("nobody.servers.pool.example.", "A", "nxdomain")],
)
async def test_absence_is_told_by_kind(resolver, owner, rdtype, kind):
    with pytest.raises(NoAnswer) as caught:
        await resolver.lookup(owner, rdtype, time.time())
    assert caught.value.kind == kind


async def test_a_pool_without_srv_or_that_offers_nothing_and_a_target_without_addresses(resolver):
    now = time.time()
    assert (await failure(listing(resolver, "none.pool.example", now))).code == "no-srv"
    assert (await failure(listing(resolver, "off.pool.example", now))).code == "no-service"
    assert (await failure(addresses(resolver, "nobody.servers.pool.example", now))).code == "no-address"


# What is refused


async def test_a_target_that_is_an_alias_is_refused(resolver):
    found = await failure(addresses(resolver, "alias.servers.pool.example", time.time()))
    assert found.code == "cname"


async def test_a_wildcard_answer_is_refused(resolver):
    found = await failure(resolver.lookup("any.wild.servers.pool.example.", "A", time.time()))
    assert found.code == "bogus"
    assert "wildcard" in found.message


@pytest.mark.parametrize("offset", [YEAR, -YEAR])
async def test_a_clock_that_is_a_year_off_is_named_as_the_likely_cause(resolver, offset):
    found = await failure(resolver.lookup(ALICE, "A", time.time() + offset))
    assert found.code == "expired"
    assert "clock" in found.remedy


async def test_a_name_outside_the_anchors_zone_is_not_even_asked_for(knot):
    resolver = Resolver("127.0.0.1", free_port(), TrustAnchors.parse(knot.trust_anchor()))
    found = await failure(resolver.lookup("alice.servers.other.example.", "A", time.time()))
    assert found.code == "not-under-anchor"


async def test_an_anchor_below_the_signing_zone_covers_nothing(knot):
    anchors = TrustAnchors.parse(knot.trust_anchor().replace("pool.example", "servers.pool.example"))
    resolver = Resolver(knot.address, knot.port, anchors)
    assert (await failure(resolver.lookup(ALICE, "A", time.time()))).code == "not-under-anchor"


async def test_the_anchor_of_another_key_makes_the_zone_bogus(tmp_path, resolver):
    with Knot(tmp_path / "other") as other:
        for anchor in (other.trust_anchor(), other.ds()):
            wrong = Resolver(resolver.address, resolver.port, TrustAnchors.parse(anchor))
            assert (await failure(wrong.lookup(ALICE, "A", time.time()))).code == "bogus"


async def test_a_name_that_is_none_is_refused(resolver):
    assert (await failure(resolver.lookup("a..b.pool.example.", "A", time.time()))).code == "name"


# Servers that lie


def flip_an_octet(answer):
    return answer.to_wire().replace(bytes([192, 0, 2, 1]), bytes([192, 0, 2, 66]))


def other_record(answer):
    for rrset in answer.answer:
        if rrset.rdtype == dns.rdatatype.A:
            rrset.add(dns.rdata.from_text("IN", "A", "192.0.2.66"))
    return answer


def without_signatures(*rdtypes):
    def alter(answer):
        if not rdtypes or answer.question[0].rdtype in rdtypes:
            answer.answer = [rrset for rrset in answer.answer if rrset.rdtype != dns.rdatatype.RRSIG]
        return answer

    return alter


def many_signatures(answer):
    """As in KeyTrap: a hundred signatures that carry the right tag stand before the good one.

    Each is an RRset of its own here, because dnspython shuffles the records of one when it writes them.
    """
    for rrset in answer.answer:
        if rrset.covers == dns.rdatatype.A:
            bad = [rrset[0].replace(signature=number.to_bytes(64, "big")) for number in range(1, 101)]
            alone = [dns.rrset.from_rdata(rrset.name, rrset.ttl, record) for record in (*bad, rrset[0])]
            answer.answer = [other for other in answer.answer if other is not rrset] + alone
    return answer


def many_keys(answer):
    for rrset in answer.answer:
        if rrset.rdtype == dns.rdatatype.DNSKEY:
            for number in range(20):
                rrset.add(rrset[0].replace(key=number.to_bytes(64, "big")))
    return answer


def signed_by(signer):
    def alter(answer):
        for rrset in answer.answer:
            if rrset.covers == dns.rdatatype.A:
                record = rrset[0].replace(signer=dns.name.from_text(signer))
                rrset.clear()
                rrset.add(record)
        return answer

    return alter


def rcode(value):
    def alter(answer):
        answer.set_rcode(value)
        answer.answer.clear()
        return answer

    return alter


def other_question(answer):
    answer.question[0].name = dns.name.from_text("other.example.")
    return answer


@pytest.mark.parametrize(
    ("alter", "code"),
    [
        (flip_an_octet, "bogus"),
        (other_record, "bogus"),
        (many_signatures, "bogus"),
        (signed_by("bob.servers.pool.example."), "bogus"),
        (signed_by("example."), "not-under-anchor"),
        (without_signatures(), "resolver-no-dnssec"),
        (without_signatures(dns.rdatatype.A), "unsigned"),
        (rcode(dns.rcode.SERVFAIL), "resolver-failed"),
        (rcode(dns.rcode.REFUSED), "resolver-failed"),
        (other_question, "resolver-failed"),
        (lambda answer: b"garbage", "resolver-failed"),
        (lambda answer: b"\x00", "resolver-failed"),
        (lambda answer: answer.to_wire()[:40], "resolver-failed"),
        (lambda answer: answer.to_wire()[:-9], "resolver-failed"),
        (lambda answer: b"\xff\xff" + answer.to_wire()[2:], "resolver-failed"),
        (lambda answer: None, "resolver-unreachable"),
    ],
)
async def test_a_server_that_lies_gets_its_name_within_the_deadline(knot, alter, code):
    async with lying(knot, alter, timeout=1.0) as resolver:
        begin = time.monotonic()
        found = await failure(resolver.lookup(ALICE, "A", time.time()))
        assert time.monotonic() - begin < 1.5
    assert found.code == code


async def test_the_liar_is_believed_when_it_does_not_lie(knot):
    """Without this the table above could pass for a reason of the liar's own."""
    async with lying(knot, lambda answer: answer) as resolver:
        assert (await resolver.lookup(ALICE, "A", time.time())).rdatas


async def test_a_zone_with_too_many_keys_is_refused_for_their_number(knot):
    async with lying(knot, many_keys) as resolver:
        found = await failure(resolver.lookup(ALICE, "A", time.time()))
    assert (found.code, "more than 16" in found.message) == ("bogus", True)


async def test_one_bad_datagram_is_asked_again(knot):
    bad = iter([b"garbage"])
    async with lying(knot, lambda answer: next(bad, answer)) as resolver:
        assert (await resolver.lookup(ALICE, "A", time.time())).rdatas


async def test_a_truncated_answer_without_tcp_is_unreachable(knot):
    def truncate(answer):
        answer.flags |= dns.flags.TC
        return answer

    async with lying(knot, truncate, timeout=1.0) as resolver:
        assert (await failure(resolver.lookup(ALICE, "A", time.time()))).code == "resolver-unreachable"


async def test_a_silent_tcp_side_ends_with_the_timeout(knot):
    """Every wait of every try together stays under the one timeout of the lookup."""

    def truncate(answer):
        answer.flags |= dns.flags.TC
        return answer

    closed = asyncio.Queue()

    async def listen_only(reader, writer):
        await reader.read()
        writer.close()
        await writer.wait_closed()
        closed.put_nowait(writer)

    async with (
        lying(knot, truncate, timeout=1.0) as resolver,
        await asyncio.start_server(listen_only, "127.0.0.1", resolver.port),
    ):
        begin = time.monotonic()
        found = await failure(resolver.lookup(ALICE, "A", time.time()))
        assert time.monotonic() - begin < 1.5
        for _ in range(2):
            await asyncio.wait_for(closed.get(), 5)
    assert found.code == "resolver-unreachable"


async def test_a_chain_without_end_costs_forty_questions(knot):
    """Each zone is said to be signed by its own parent, sixty deep."""

    def deeper(answer):
        (question,) = answer.question
        now = int(time.time())
        signer = question.name if question.rdtype == dns.rdatatype.DNSKEY else question.name.parent()
        labels = len(question.name) - 1
        kind = dns.rdatatype.to_text(question.rdtype)
        key = dns.rdata.from_text("IN", "DNSKEY", "257 3 13 " + "A" * 88)
        record = {
            "A": "192.0.2.1",
            "DNSKEY": key.to_text(),
            "DS": dns.dnssec.make_ds(question.name, key, "SHA256").to_text(),
        }[kind]
        signature = f"{kind} 13 {labels} 2 {now + 999} {now - 999} {key.key_id()} {signer} {'A' * 88}"
        answer.set_rcode(dns.rcode.NOERROR)
        answer.answer = [
            dns.rrset.from_text(question.name, 2, "IN", kind, record),
            dns.rrset.from_text(question.name, 2, "IN", "RRSIG", signature),
        ]
        return answer

    async with lying(knot, deeper) as resolver:
        found = await failure(resolver.lookup("a." * 60 + "pool.example.", "A", time.time()))
        assert found.code == "bogus"
        assert "40" in found.message
        assert resolver.liar.questions == 40


# Trust anchors


@pytest.mark.parametrize(
    "form",
    [
        "; the pool's key\n\n{owner} {ttl} IN {kind} {rest}\n",
        "{owner} IN {kind} {rest} ; a comment",
        "{owner} {kind} {rest}",
        "{owner} 3600 {kind} {rest}",
        "pool.example {kind} {rest}",
        "POOL.Example. IN {kind} ( {rest} )",
    ],
)
async def test_anchors_are_read_in_each_zone_file_form(knot, form):
    for line in (knot.trust_anchor(), knot.ds()):
        owner, ttl, _, kind, rest = line.strip().split(maxsplit=4)
        anchors = TrustAnchors.parse(form.format(owner=owner, ttl=ttl, kind=kind, rest=rest))
        resolver = Resolver(knot.address, knot.port, anchors)
        assert (await resolver.lookup(ALICE, "A", time.time())).rdatas


@pytest.mark.parametrize(
    "text",
    [
        "",
        "; nothing\n",
        "hello",
        "\x00\xff",
        "pool.example. IN A 192.0.2.1",
        "pool.example. IN DS 1 13 2 00",
        "pool.example. IN DNSKEY 257 3 13 not-base64!",
        f"pool.example. IN DNSKEY 0 3 13 {'A' * 88}",
        f"pool.example. IN DNSKEY 385 3 13 {'A' * 88}",
        "\n".join(f"pool.example. IN DS {n} 13 2 {'00' * 32}" for n in range(65)),
    ],
    ids=[
        "empty",
        "comment",
        "word",
        "binary",
        "address",
        "short",
        "base64",
        "not-a-zone-key",
        "revoked",
        "many",
    ],
)
def test_what_is_not_a_trust_anchor_is_refused_with_a_remedy(text):
    with pytest.raises(ResolveError) as caught:
        TrustAnchors.parse(text)
    assert caught.value.code == "anchor"
    assert "DNSKEY" in caught.value.remedy


def test_the_closest_anchor_counts():
    key = f"DNSKEY 257 3 13 {'A' * 88}"
    anchors = TrustAnchors.parse(f". {key}\nexample. {key}\nother.example. {key}")
    assert anchors.above(dns.name.from_text("a.pool.example.")).to_text() == "example."


# Several resolvers


@pytest.mark.parametrize(
    ("alter", "code"),
    [
        (flip_an_octet, "bogus"),
        (without_signatures(), "resolver-no-dnssec"),
        (without_signatures(dns.rdatatype.A), "unsigned"),
        (rcode(dns.rcode.SERVFAIL), "resolver-failed"),
        (lambda answer: None, "resolver-unreachable"),
    ],
)
async def test_a_resolver_of_no_use_is_passed_over_and_asked_last_from_then_on(knot, alter, code):
    good = Resolver(knot.address, knot.port, TrustAnchors.parse(knot.trust_anchor()))
    async with lying(knot, alter, timeout=0.5) as liar:
        both = Resolvers([liar, good])
        assert [row.address for row in (await both.lookup(ALICE, "A", time.time())).rdatas] == ["192.0.2.1"]
        assert {name: error.code for name, error in both.passed_over.items()} == {str(liar): code}
        asked = liar.liar.questions
        await both.lookup(ALICE, "AAAA", time.time())
        assert liar.liar.questions == asked
        only = Resolvers([liar, liar])
        assert (await failure(only.lookup(ALICE, "A", time.time()))).code == code


async def test_a_resolver_that_is_good_again_is_not_said_to_be_passed_over(knot):
    lies = [True]
    good = Resolver(knot.address, free_port(), TrustAnchors.parse(knot.trust_anchor()), 0.5)
    async with lying(knot, lambda answer: b"garbage" if lies else answer, timeout=2) as liar:
        both = Resolvers([liar, good])
        await failure(both.lookup(ALICE, "A", time.time()))
        assert set(both.passed_over) == {str(liar), str(good)}
        lies.clear()
        await both.lookup(ALICE, "A", time.time())
        assert set(both.passed_over) == {str(good)}


async def test_an_absence_is_no_reason_to_ask_another_resolver(knot):
    good = Resolver(knot.address, knot.port, TrustAnchors.parse(knot.trust_anchor()))
    async with lying(knot, lambda answer: answer) as other:
        both = Resolvers([good, other])
        with pytest.raises(NoAnswer):
            await both.lookup("nobody.servers.pool.example.", "A", time.time())
        assert (await failure(both.lookup("bank.test.", "A", time.time()))).code == "not-under-anchor"
        assert (other.liar.questions, both.passed_over) == (0, {})


def test_the_roots_keys_are_those_that_debian_ships():
    """In its package `dns-root-data`; both keys, so that a roll-over to the new one is no event."""
    known = {(record.key_tag, record.digest.hex()) for record in ROOT.zones[dns.name.root]}
    assert {tag for tag, _ in known} == {20326, 38696}
    anchors = TrustAnchors.parse(Path("/usr/share/dns/root.ds").read_text())
    assert {(record.key_tag, record.digest.hex()) for record in anchors.zones[dns.name.root]} <= known


# Others validate, or nobody


def asked(server, knot, dnssec):
    return Resolver(server.address, server.port, TrustAnchors.parse(knot.trust_anchor()), 3.0, dnssec=dnssec)


async def test_a_resolver_that_is_trusted_has_to_say_that_it_validated(knot, unbound):
    found = await listing(asked(unbound, knot, Dnssec.TRUST_RESOLVER), "pool.example", time.time())
    assert (len(found.targets), found.proof) == (1, Proof.RESOLVER)
    error = await failure(asked(knot, knot, Dnssec.TRUST_RESOLVER).lookup(ALICE, "A", time.time()))
    assert error.code == "ad", "an authoritative server validates nothing"


async def test_with_validation_off_the_answer_says_so(knot):
    found = await listing(asked(knot, knot, Dnssec.OFF), "pool.example", time.time())
    assert [target.name for target in found.targets] == ["alice.servers.pool.example"]
    assert (found.refused, found.proof) == ((), Proof.UNPROVEN)
    assert (
        await failure(listing(asked(knot, knot, Dnssec.OFF), "none.pool.example", time.time()))
    ).code == "no-srv"


@pytest.mark.parametrize("has_own", [True, False])
async def test_an_unproven_answer_leads_to_no_servers_but_the_pools_own(knot, has_own):
    """Whoever forges it may have good certificates for names of its own."""

    def forge(answer):
        if answer.question[0].rdtype == dns.rdatatype.SRV:
            own = ["0 10 4460 alice.servers.pool.example."] if has_own else []
            lies = ["0 0 4460 evil.example.", "0 0 4460 servers.pool.example.evil.example."]
            answer.answer = [dns.rrset.from_text(answer.question[0].name, 2, "IN", "SRV", *own, *lies)]
        return answer

    async with lying(knot, forge) as resolver:
        resolver.dnssec = Dnssec.OFF
        if has_own:
            found = await listing(resolver, "pool.example", time.time())
            assert [target.name for target in found.targets] == ["alice.servers.pool.example"]
            assert set(found.refused) == {"evil.example", "servers.pool.example.evil.example"}
        else:
            assert (await failure(listing(resolver, "pool.example", time.time()))).code == "foreign"
        # Nor does a region's name, of which nobody can tell by itself that it is one.
        assert (await failure(listing(resolver, "europe.pool.example", time.time()))).code == "foreign"
        # Validated here, the same answer is worth nothing at all.
        resolver.dnssec = Dnssec.REQUIRE
        assert (await failure(listing(resolver, "pool.example", time.time()))).code in {"bogus", "unsigned"}


async def test_an_alias_is_refused_whoever_validates(knot, unbound):
    for dnssec in (Dnssec.OFF, Dnssec.TRUST_RESOLVER):
        error = await failure(
            asked(unbound, knot, dnssec).lookup("alias.servers.pool.example.", "A", time.time())
        )
        assert error.code == "cname"
