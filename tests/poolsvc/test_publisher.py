"""The publisher against a real Knot that signs, and what a validating Unbound makes of it."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import count

import dns.dnssec
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.query
import dns.rcode
import dns.rdatatype
import dns.rrset
import dns.tsig
import dns.update
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from lab.knot import Knot
from lab.processes import free_port
from lab.unbound import Unbound
from lab.zones import wanted
from nts_core.metadata import Metadata
from poolsvc import publisher as production
from poolsvc import setup
from poolsvc.primary import Conflict, Fenced, Nameserver, PrimaryConfig, Rejected, Unreachable
from poolsvc.publisher import Mismatch
from poolsvc.zone import CaaIssuer, Change, RRset, ServerRecords, ZonePolicy, diff

POLICY = ZonePolicy(
    pool="pool.example",
    srv_ttl=2,
    address_ttl=2,
    ke_port=4460,
    caa=(CaaIssuer("ca.example", "https://ca.example/acct/1"),),
)
SERVICE = ("_ntske._tcp.pool.example.", "SRV")
ALICE = "alice.servers.pool.example."


class Publisher(production.Publisher):
    """One that is told the whole zone."""

    async def publish(self, wanted, epoch, seen=None):
        async def plan(zone):
            return diff(wanted, zone)

        return await self.bring(plan, epoch, seen)


def pool(*names, unlisted=(), **options):
    some = [
        ServerRecords(
            name,
            number,
            (f"198.18.{number // 256}.{number % 256}", f"2001:db8::{number:x}"),
            listed=name not in unlisted,
        )
        for number, name in enumerate(names, start=1)
    ]
    return wanted(some, POLICY, is_open=True, draw=options.get("draw", 0))


@pytest.fixture
def config(knot):
    return config_of(knot)


def config_of(knot):
    return PrimaryConfig(
        address=knot.address,
        port=knot.port,
        tsig_name=knot.tsig_name,
        tsig_secret=knot.tsig_secret,
        nameservers=(Nameserver(knot.address, knot.port),),
        timeout=3.0,
    )


@pytest.fixture
def publisher(config):
    return Publisher(POLICY, config)


def by_hand(knot, change):
    """An update that the publisher knows nothing of."""
    key = dns.tsig.Key(knot.tsig_name, knot.tsig_secret, "hmac-sha256")
    update = dns.update.UpdateMessage(f"{knot.zone}.", keyring=key)
    change(update)
    answer = dns.query.tcp(update, knot.address, timeout=5, port=knot.port)
    assert answer.rcode() == dns.rcode.NOERROR


async def test_the_first_publish_fills_the_zone_and_every_server_shows_it(publisher):
    await publisher.take_fence(1)
    zone = pool("alice", "bob", "carol")
    published = await publisher.publish(zone, 1)
    seen = await publisher.observe()
    assert seen.zone == zone
    assert published.seen == seen
    assert (seen.epoch, seen.soa_minimum) == ("1", 2)
    assert len(published.changes) == len(zone)
    assert await publisher.verify(zone, zone) == ()


async def test_publishing_the_same_again_changes_nothing(publisher):
    await publisher.take_fence(1)
    first = await publisher.publish(pool("alice", "bob"), 1)
    assert await publisher.publish(pool("alice", "bob"), 1) == replace(first, changes=())


async def test_a_member_that_leaves_takes_only_its_own_records_along(publisher):
    await publisher.take_fence(1)
    await publisher.publish(pool("bob", "alice"), 1)
    published = await publisher.publish(pool("bob"), 1)
    assert [(change.owner, change.rdtype) for change in published.changes] == [
        SERVICE,
        (ALICE, "A"),
        (ALICE, "AAAA"),
        (ALICE, "CAA"),
    ]
    gone = {(ALICE, "A"), (ALICE, "AAAA"), (ALICE, "CAA"), SERVICE}
    assert await publisher.verify(gone, pool("bob")) == ()


async def test_a_rehearsal_changes_nothing_whatever_is_there(publisher):
    await publisher.rehearse()
    await publisher.take_fence(1)
    await publisher.publish(pool("alice"), 1)
    before = await publisher.observe()
    signed = await publisher.rehearse()
    assert abs(datetime.now(UTC) - signed) < timedelta(seconds=60)
    assert await publisher.observe() == before


@pytest.mark.parametrize(
    ("right", "owner"),
    [
        ("AAAA, ", "_trial.servers"),
        ("TXT, ", "_trial.servers"),
        ("_tcp.pool.example., ", "_ntske._tcp"),
        (", _fence.pool.example.", "_fence"),
    ],
)
async def test_a_rehearsal_names_the_right_that_is_not_granted(tmp_path, monkeypatch, right, owner):
    shipped = setup._NAMESERVERS["knot-pool.conf"]
    strict = shipped.replace(right.replace("pool.example", "$pool"), "")
    assert strict != shipped
    monkeypatch.setitem(setup._NAMESERVERS, "knot-pool.conf", strict)
    with Knot(tmp_path / "strict") as strict, pytest.raises(Rejected, match=f"{owner}.pool.example"):
        await Publisher(POLICY, config_of(strict)).rehearse()


async def test_a_ttl_is_changed_alone(publisher):
    await publisher.take_fence(1)
    zone = pool("alice")
    await publisher.publish(zone, 1)
    zone[ALICE, "A"] = replace(zone[ALICE, "A"], ttl=7)
    published = await publisher.publish(zone, 1)
    assert [(change.owner, change.rdtype) for change in published.changes] == [(ALICE, "A")]


async def test_drift_is_found_and_repaired(publisher, knot):
    await publisher.take_fence(1)
    zone = pool("alice", "bob")
    await publisher.publish(zone, 1)
    by_hand(knot, lambda update: update.replace(ALICE, 2, "A", "198.51.100.9"))
    by_hand(knot, lambda update: update.add("mallory.servers.pool.example.", 2, "A", "198.51.100.9"))
    by_hand(knot, lambda update: update.delete(*SERVICE))
    assert {mismatch.key for mismatch in await publisher.verify(zone, zone)} == {(ALICE, "A"), SERVICE}
    published = await publisher.publish(zone, 1)
    assert len(published.changes) == 3
    assert (await publisher.observe()).zone == zone


async def test_what_the_operator_put_beside_it_is_left_alone(publisher, knot):
    await publisher.take_fence(1)
    beside = f"_dmarc.{ALICE}"
    by_hand(knot, lambda update: update.add(beside, 2, "TXT", "hello"))
    await publisher.publish(pool("alice"), 1)
    await publisher.publish(pool("bob"), 1)
    query = dns.message.make_query(beside, "TXT")
    assert dns.query.tcp(query, knot.address, timeout=5, port=knot.port).answer


async def test_a_text_of_somebody_else_at_a_servers_name_is_drift(publisher, knot):
    await publisher.take_fence(1)
    server = ServerRecords("alice", 1, ("192.0.2.1",), listed=False, metadata=Metadata("abcdefghij234"))
    zone = wanted([server], POLICY, is_open=False, draw=0)
    await publisher.publish(zone, 1)
    by_hand(knot, lambda update: update.add(ALICE, 300, "TXT", '"v=truechimer1 op=zzzzzzzzzzzzz"'))
    assert {mismatch.key for mismatch in await publisher.verify(zone, zone)} == {(ALICE, "TXT")}
    await publisher.publish(zone, 1)
    assert (await publisher.observe()).zone == zone


async def test_a_text_for_a_ca_comes_and_goes_with_its_server(publisher):
    await publisher.take_fence(1)
    proving = ServerRecords("alice", 1, ("192.0.2.1",), listed=False, proofs=("b-text", "a_text"))
    zone = wanted([proving], POLICY, is_open=False, draw=0)
    text = ("_acme-challenge.alice.servers.pool.example.", "TXT")
    assert zone[text].rdatas == {'"a_text"', '"b-text"'}
    await publisher.publish(zone, 1)
    assert (await publisher.observe()).zone == zone
    assert await publisher.verify(zone, zone) == ()
    await publisher.publish(wanted([replace(proving, proofs=())], POLICY, is_open=False, draw=0), 1)
    assert text not in (await publisher.observe()).zone


async def test_a_stale_leader_is_fenced_and_changes_nothing(publisher):
    await publisher.take_fence(4)
    await publisher.publish(pool("alice"), 4)
    changes = diff(pool("bob"), (await publisher.observe()).zone)
    await publisher.take_fence(5)
    for attempt in (
        publisher.take_fence(4),
        publisher.publish(pool("alice"), 4),
        publisher.apply(changes, 4),
    ):
        with pytest.raises(Fenced, match="epoch is 5"):
            await attempt
    seen = await publisher.observe()
    assert (seen.zone, seen.epoch) == (pool("alice"), "5")


@pytest.mark.parametrize("is_first", [True, False])
async def test_a_leader_that_was_overtaken_between_reading_and_writing_does_not_lower_the_fence(
    publisher, config, knot, is_first
):
    if not is_first:
        await publisher.take_fence(1)
    gate, asked, connections = asyncio.Event(), asyncio.Event(), count()

    async def forward(reader, writer):
        message = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
        if next(connections) == 1:
            asked.set()
            await gate.wait()
        upstream_reader, upstream = await asyncio.open_connection(knot.address, knot.port)
        upstream.write(len(message).to_bytes(2, "big") + message)
        size = await upstream_reader.readexactly(2)
        writer.write(size + await upstream_reader.readexactly(int.from_bytes(size, "big")))
        for stream in (upstream, writer):
            stream.close()
            await stream.wait_closed()

    async with await asyncio.start_server(forward, "127.0.0.1", 0) as server:
        slow = Publisher(POLICY, replace(config, port=server.sockets[0].getsockname()[1]))
        overtaken = asyncio.create_task(slow.take_fence(2))
        await asyncio.wait_for(asked.wait(), 5)
        await publisher.take_fence(3)
        gate.set()
        with pytest.raises(Fenced):
            await overtaken
    assert (await publisher.observe()).epoch == "3"


async def test_without_a_fence_nothing_is_written(publisher):
    with pytest.raises(Fenced):
        await publisher.publish(pool("alice"), 1)
    assert (await publisher.observe()).zone == {}


async def test_a_fence_that_is_not_a_number_needs_the_operator(publisher, knot):
    by_hand(knot, lambda update: update.add(POLICY.fence, 0, "TXT", "mine"))
    with pytest.raises(Rejected, match="mine"):
        await publisher.take_fence(1)


@pytest.mark.parametrize("name", ["alice", "bob"])
async def test_a_change_against_an_older_zone_is_a_conflict(publisher, knot, name):
    """Alice's address was to be deleted and has changed; Bob's was to be created and exists."""
    await publisher.take_fence(1)
    await publisher.publish(pool("alice"), 1)
    changes = diff(pool("bob"), (await publisher.observe()).zone)
    by_hand(knot, lambda update: update.replace(f"{name}.servers.pool.example.", 2, "A", "198.51.100.9"))
    before = await publisher.observe()
    with pytest.raises(Conflict):
        await publisher.apply(changes, 1)
    assert await publisher.observe() == before


async def test_an_update_that_is_acknowledged_and_ignored_is_reported(publisher, knot):
    """Knot answers NOERROR to an address beside a CNAME and keeps the CNAME alone."""
    knot.stop()
    with Knot(knot.directory.parent / "other", records=["alice.servers CNAME ns1"]) as other:
        config = PrimaryConfig(
            address=other.address,
            port=other.port,
            tsig_name=other.tsig_name,
            tsig_secret=other.tsig_secret,
            nameservers=(),
        )
        publisher = Publisher(POLICY, config)
        await publisher.take_fence(1)
        with pytest.raises(Rejected, match="not kept: alice"):
            await publisher.publish(pool("alice"), 1)


async def test_a_wrong_secret_is_named(config):
    wrong = Publisher(POLICY, replace(config, tsig_secret="AAAA"))
    for attempt in (wrong.observe(), wrong.take_fence(1), wrong.apply(diff(pool("alice"), {}), 1)):
        with pytest.raises(Rejected, match="the secrets differ"):
            await attempt


async def test_a_key_that_the_primary_does_not_know_is_named(config):
    with pytest.raises(Rejected, match="does not know the TSIG key"):
        await Publisher(POLICY, replace(config, tsig_name="stranger")).observe()


async def test_a_type_that_the_primary_does_not_grant_is_rejected(publisher):
    await publisher.take_fence(1)
    change = Change(ALICE, "TLSA", None, RRset(2, frozenset({f"3 1 1 {'00' * 32}"})))
    with pytest.raises(Rejected, match="grant"):
        await publisher.apply([change], 1)


def test_the_secret_is_in_no_repr(config):
    assert config.tsig_secret not in repr(config)


async def test_a_primary_that_is_down_is_unreachable_and_comes_back_with_its_data(publisher, knot):
    await publisher.take_fence(3)
    await publisher.publish(pool("alice"), 3)
    knot.stop()
    for attempt in (publisher.observe(), publisher.publish(pool("bob"), 3), publisher.take_fence(4)):
        with pytest.raises(Unreachable):
            await attempt
    knot.start()
    seen = await publisher.observe()
    assert (seen.zone, seen.epoch) == (pool("alice"), "3")
    await publisher.publish(pool("bob"), 3)
    assert (await publisher.observe()).zone == pool("bob")


async def test_five_hundred_members_are_published_and_verified_in_chunks(publisher):
    await publisher.take_fence(1)
    names = [f"member{number}" for number in range(250)]
    half = pool(*names)
    await publisher.publish(half, 1)
    whole = pool(*names, *(f"late{number}" for number in range(250)))
    await publisher.publish(whole, 1)
    assert (await publisher.observe()).zone == whole
    assert await publisher.verify(whole, whole) == ()
    await publisher.publish(half, 1)
    assert (await publisher.observe()).zone == half


@pytest.mark.parametrize(
    ("members", "rdtype", "text"),
    [(900, "A", "192.0.2.1"), (200, "CAA", f'0 issue "{"x" * 400}"')],
    ids=["records", "octets"],
)
async def test_neither_many_nor_long_records_overflow_a_message(publisher, members, rdtype, text):
    await publisher.take_fence(1)
    before = await publisher.observe()
    zone = {
        (f"m{number}.servers.pool.example.", rdtype): RRset.of(2, rdtype, [text]) for number in range(members)
    }
    await publisher.apply(diff(zone, {}), 1)
    after = await publisher.observe()
    assert after.zone == zone
    assert after.serial - before.serial == 3


async def test_verify_tells_a_missing_record_a_leftover_and_a_silent_server(config, knot):
    silent = Nameserver("127.0.0.1", free_port())
    both = replace(config, nameservers=(*config.nameservers, silent), timeout=1.0)
    publisher = Publisher(POLICY, both)
    await publisher.take_fence(1)
    await publisher.publish(pool("alice", "bob"), 1)
    expected = pool("alice", "carol")
    keys = [(ALICE, "CAA"), ("bob.servers.pool.example.", "AAAA"), ("carol.servers.pool.example.", "A")]
    found = await publisher.verify(keys, expected)
    assert [(some.nameserver, some.key, some.reason) for some in found[:2]] == [
        (config.nameservers[0], keys[1], "still shows the records"),
        (config.nameservers[0], keys[2], "does not show the records"),
    ]
    assert [(some.nameserver, some.key) for some in found[2:]] == [(silent, None)]
    assert "timed out" in found[2].reason


async def test_a_server_that_is_behind_the_serial_or_silent_is_named(publisher, config, tmp_path):
    """The other one answers for the same zone and never heard of the updates."""
    await publisher.take_fence(1)
    published = await publisher.publish(pool("alice"), 1)
    serial = published.seen.serial
    assert await publisher.behind(serial) == ()
    silent = Nameserver("127.0.0.1", free_port())
    with Knot(tmp_path / "old") as old:
        late = Nameserver(old.address, old.port)
        all_three = replace(config, nameservers=(*config.nameservers, late, silent), timeout=1.0)
        found = await Publisher(POLICY, all_three).behind(serial)
    assert found == (late, silent)


class Heard(asyncio.DatagramProtocol):
    def __init__(self):
        self.messages = asyncio.Queue()

    def datagram_received(self, data, address):
        self.messages.put_nowait(data)


@pytest.mark.parametrize("is_told", [True, False])
async def test_nameservers_are_told_of_a_change_if_they_are_to_be(config, is_told):
    key = dns.tsig.Key(config.tsig_name, config.tsig_secret, config.tsig_algorithm)
    loop = asyncio.get_running_loop()
    transport, heard = await loop.create_datagram_endpoint(Heard, local_addr=("127.0.0.1", 0))
    told = Nameserver(*transport.get_extra_info("sockname"))
    dead = Nameserver("127.0.0.1", free_port())
    try:
        await Publisher(POLICY, replace(config, nameservers=(dead, told), notify=is_told)).notify()
        await Publisher(POLICY, replace(config, nameservers=(told,), notify=True)).notify()
        for _ in range(1 + is_told):
            message = dns.message.from_wire(await asyncio.wait_for(heard.messages.get(), 5), keyring=key)
            assert (message.opcode(), message.had_tsig) == (dns.opcode.NOTIFY, True)
            assert message.question[0].to_text() == "pool.example. IN SOA"
        assert heard.messages.empty()
    finally:
        transport.close()


LOST = object()


class Altered(asyncio.DatagramProtocol):
    """An authoritative server that answers as Knot does, but for what `alter` does to the message."""

    def __init__(self, knot, alter):
        self.knot = knot
        self.alter = alter

    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, address):
        query = dns.message.from_wire(data)
        answer = dns.query.udp(query, self.knot.address, timeout=5, port=self.knot.port)
        if self.alter(answer) is not LOST:
            self.transport.sendto(answer.to_wire(), address)


def refuse(answer):
    answer.set_rcode(dns.rcode.REFUSED)
    answer.answer.clear()


def from_a_cache(answer):
    answer.flags &= ~dns.flags.AA


def unsigned(answer):
    answer.answer = [rrset for rrset in answer.answer if rrset.rdtype != dns.rdatatype.RRSIG]


def one_less(answer):
    if len(answer.answer[0]) > 1:
        answer.answer[0].pop()


def broken_signature(answer):
    for rrset in answer.answer:
        if rrset.rdtype == dns.rdatatype.RRSIG and rrset.covers != dns.rdatatype.DNSKEY:
            rdata = rrset.pop()
            rrset.add(rdata.replace(signature=bytes(64)))


def other_keys(answer):
    """As of a server that signs by itself and has lost its keys: no DNSKEY is signed by what is there."""
    if answer.question[0].rdtype == dns.rdatatype.DNSKEY:
        answer.answer = answer.answer[:1]


def many_signatures(answer):
    for rrset in answer.answer:
        if rrset.rdtype == dns.rdatatype.RRSIG and rrset.covers == dns.rdatatype.SRV:
            rdata = rrset.pop()
            for number in range(9):
                rrset.add(rdata.replace(signature=bytes([number] * 64)))


class Resigned:
    """Signs what Knot shows with a key of its own, from and to when it is told."""

    def __init__(self, begin, end):
        self.times = {"inception": begin, "expiration": end}
        self.private = ec.generate_private_key(ec.SECP256R1())
        self.public = dns.dnssec.make_dnskey(self.private.public_key(), "ECDSAP256SHA256", flags=257)

    def __call__(self, answer):
        apex = dns.name.from_text("pool.example.")
        rrset = answer.answer[0]
        times = self.times
        if rrset.rdtype == dns.rdatatype.DNSKEY:
            rrset = dns.rrset.from_rdata(apex, rrset.ttl, self.public)
            times = {"inception": 0, "lifetime": 2**31 - 1}
        signature = dns.dnssec.sign(rrset, self.private, apex, self.public, **times)
        answer.answer = [rrset, dns.rrset.from_rdata(rrset.name, rrset.ttl, signature)]


@asynccontextmanager
async def altered(knot, alter):
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(
        lambda: Altered(knot, alter), local_addr=("127.0.0.1", 0)
    )
    try:
        yield Nameserver(*transport.get_extra_info("sockname"))
    finally:
        transport.close()


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (refuse, "answers REFUSED"),
        (from_a_cache, "is not authoritative"),
        (unsigned, "shows the records without a signature"),
        (one_less, "shows other records"),
        (broken_signature, "shows a signature that does not hold by the zone's keys"),
        (other_keys, "shows no DNSKEY that signs itself"),
        (many_signatures, "shows more than 4 signatures over the records"),
        (Resigned(0, 1_000_000_000), "shows a signature that ended on 2001-09-09 01:46 UTC"),
        (Resigned(4_000_000_000, 4_000_000_001), "shows a signature that begins on 2096-10-02 07:06 UTC"),
    ],
)
async def test_verify_says_what_is_wrong_with_a_server(publisher, config, knot, alter, reason):
    await publisher.take_fence(1)
    zone = pool("alice", "bob")
    await publisher.publish(zone, 1)
    async with altered(knot, alter) as wrong:
        both = Publisher(POLICY, replace(config, nameservers=(*config.nameservers, wrong)))
        found = await both.verify([SERVICE], zone)
    assert found == (Mismatch(wrong, SERVICE, reason),)
    assert found[0].remedy


async def test_signatures_of_another_key_that_a_server_shows_too_are_good(publisher, config, knot):
    """Each of several edges that sign may have a key of its own."""
    await publisher.take_fence(1)
    await publisher.publish(pool("alice"), 1)
    async with altered(knot, Resigned(0, 4_000_000_000)) as edge:
        other = Publisher(POLICY, replace(config, nameservers=(edge,)))
        assert await other.verify([SERVICE], pool("alice")) == ()


async def test_what_happened_is_followed_whoever_did_it_and_re_signing_is_none_of_it(publisher, knot):
    await publisher.take_fence(1)
    first = (await publisher.publish(pool("alice", "bob"), 1)).seen
    assert await publisher.follow(first) == (first, ())
    by_hand(knot, lambda update: update.replace(ALICE, 7, "A", "198.51.100.9"))
    by_hand(knot, lambda update: update.delete(*SERVICE))
    by_hand(knot, lambda update: update.add("beside._tcp.pool.example.", 7, "A", "198.51.100.9"))
    seen, happened = await publisher.follow(first)
    assert seen == await publisher.observe()
    assert {change.key: change.after for change in happened} == {
        (ALICE, "A"): RRset(7, frozenset({"198.51.100.9"})),
        SERVICE: None,
    }
    knot.sign_anew()
    again, happened = await publisher.follow(seen)
    assert happened == ()
    assert again.serial != seen.serial
    assert again.zone is seen.zone


async def test_a_fence_that_another_leader_took_is_followed_too(publisher):
    await publisher.take_fence(1)
    first = await publisher.observe()
    await publisher.take_fence(2)
    seen, happened = await publisher.follow(first)
    assert (seen.epoch, happened) == ("2", ())


@pytest.mark.parametrize("ahead", [1_000, 0], ids=["gone back", "wrong"])
async def test_what_was_seen_of_another_zone_is_observed_anew(publisher, ahead):
    """A primary that lost its data, or a picture that is wrong."""
    await publisher.take_fence(1)
    seen = (await publisher.publish(pool("alice"), 1)).seen
    now = (await publisher.publish(pool("bob"), 1)).seen
    other = replace(seen, serial=seen.serial + ahead, zone=pool("mallory"))
    again, happened = await publisher.follow(other)
    assert again == now
    assert {change.key for change in happened} == {
        key for key in pool("bob") | pool("mallory") if pool("bob").get(key) != pool("mallory").get(key)
    }


async def test_a_conflict_that_nothing_explains_means_that_the_picture_was_wrong(publisher):
    await publisher.take_fence(1)
    seen = (await publisher.publish(pool("alice"), 1)).seen
    published = await publisher.publish(pool("bob"), 1, replace(seen, zone=pool("mallory")))
    assert published.seen.zone == pool("bob")


async def test_what_others_do_meanwhile_is_told_apart_from_our_own_doing(publisher, knot):
    await publisher.take_fence(1)
    seen = (await publisher.publish(pool("alice", "bob"), 1)).seen
    by_hand(knot, lambda update: update.replace(ALICE, 2, "A", "198.51.100.9"))
    wanted = pool("alice", "bob", "carol")
    published = await publisher.publish(wanted, 1, seen)
    assert published.seen.zone == wanted
    assert [(change.key, change.after.rdatas) for change in published.foreign] == [
        ((ALICE, "A"), {"198.51.100.9"})
    ]
    assert (ALICE, "A") in {change.key for change in published.changes}


async def test_a_lost_datagram_is_no_mismatch(publisher, config, knot):
    await publisher.take_fence(1)
    await publisher.publish(pool("alice"), 1)
    losses = iter([LOST])
    async with altered(knot, lambda answer: next(losses, None)) as lossy:
        again = Publisher(POLICY, replace(config, nameservers=(lossy,), timeout=1.0))
        assert await again.verify([SERVICE], pool("alice")) == ()


async def test_a_resolver_validates_what_was_published(publisher, knot, tmp_path):
    await publisher.take_fence(1)
    await publisher.publish(pool("alice"), 1)
    with Unbound(tmp_path / "unbound", [knot]) as unbound:
        for owner, rdtype in (SERVICE, (ALICE, "A"), (ALICE, "AAAA"), (ALICE, "CAA")):
            query = dns.message.make_query(owner, rdtype, want_dnssec=True)
            answer = dns.query.udp(query, unbound.address, timeout=5, port=unbound.port)
            assert answer.flags & dns.flags.AD
            assert any(dns.rdatatype.to_text(rrset.rdtype) == rdtype for rrset in answer.answer)
