"""The publisher on every kind of primary and of secondary, each with the configuration that `poolsvc init` writes."""

import time
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import dns.flags
import dns.message
import dns.query
import dns.rcode
import dns.tsig
import dns.xfr
import dns.zone
import pytest
from dns.rdatatype import RRSIG, SRV

from lab.bind import Bind
from lab.embedded import Embedded
from lab.knot import Knot, KnotSecondary
from lab.powerdns import PowerDns
from lab.primaries import PRIMARIES
from lab.unbound import Unbound
from poolsvc import setup
from poolsvc.publisher import Conflict, Fenced, PublishError, Rejected, Unreachable
from poolsvc.zone import Change, RRset, diff

SERVICE = ("_ntske._tcp.pool.example.", "SRV")
SOME = ("alice", "bob", "carol")


def owner(name):
    return f"{name}.servers.pool.example."


ALICE, BOB = owner("alice"), owner("bob")


def ask(server, name, rdtype, *, payload=1232):
    query = dns.message.make_query(name, rdtype, want_dnssec=True, payload=payload)
    return dns.query.udp(query, server.address, timeout=5, port=server.port)


async def test_the_first_publish_fills_the_zone_and_every_server_shows_it_signed(zone):
    wanted = zone.pool(*SOME)
    assert len(await zone.publish(wanted)) == len(wanted)
    assert await zone.seen() == wanted
    await zone.shown(wanted)


async def test_publishing_the_same_again_changes_nothing(zone):
    await zone.publish(zone.pool(*SOME))
    before = zone.primary.serial()
    assert await zone.publish(zone.pool(*SOME)) == ()
    assert zone.primary.serial() == before


async def test_the_secondary_shows_every_kind_of_change(zone):
    first = zone.pool(*SOME)
    await zone.publish(first)
    await zone.shown(first)
    more = zone.pool(*SOME, "dave")
    more[ALICE, "A"] = replace(more[ALICE, "A"], rdatas=frozenset({"198.51.100.1"}))
    more[BOB, "AAAA"] = replace(more[BOB, "AAAA"], ttl=7)
    await zone.publish(more)
    await zone.shown(more)
    await zone.publish(first)
    await zone.shown(first, *(more.keys() - first.keys()))


async def test_each_message_moves_the_serial(zone):
    """Or a secondary would not come for it."""
    serials = [zone.primary.serial()]
    for name in SOME:
        await zone.publisher.apply(
            diff({(owner(name), "A"): RRset.of(1, "A", ["192.0.2.1"])}, {}), zone.epoch
        )
        serials.append(zone.primary.serial())
    assert serials == sorted(set(serials))


async def test_a_member_that_leaves_takes_its_texts_along_and_no_names_below(zone):
    proving = zone.pool(*SOME, proofs=("text",))
    await zone.publish(proving)
    child = f"_4460._tcp.{ALICE}"
    assert zone.by_hand(lambda update: update.add(child, 1, "TXT", "by hand")) == dns.rcode.NOERROR
    rest = zone.pool("bob", "carol", proofs=("text",))
    for key in rest:
        rest[key] = proving[key] if key != SERVICE else rest[key]
    changes = await zone.publish(rest)
    gone = {(ALICE, kind) for kind in ("A", "AAAA", "CAA")} | {(f"_acme-challenge.{ALICE}", "TXT")}
    assert {(change.owner, change.rdtype) for change in changes} == gone | {SERVICE}
    await zone.shown(rest, *gone)
    assert ask(zone.primary, child, "TXT").answer
    zone.by_hand(lambda update: update.delete(child, "TXT"))


@pytest.mark.parametrize("name", ["alice", "bob"])
async def test_a_change_against_an_older_zone_is_a_conflict_and_nothing_of_it_is_made(zone, name):
    """Alice's address was to be deleted and has changed; Bob's was to be created and exists."""
    await zone.publish(zone.pool("alice"))
    changes = diff(zone.pool("bob"), await zone.seen())
    zone.by_hand(lambda update: update.replace(owner(name), 1, "A", "198.51.100.9"))
    before = await zone.seen()
    with pytest.raises(Conflict):
        await zone.publisher.apply(changes, zone.epoch)
    assert await zone.seen() == before


async def test_a_part_of_an_rrset_is_no_old_value(zone):
    await zone.publish(zone.pool("alice"))
    zone.by_hand(lambda update: update.add(ALICE, 1, "A", "198.51.100.9"))
    before = await zone.seen()
    old = zone.pool("alice")[ALICE, "A"]
    with pytest.raises(Conflict):
        await zone.publisher.apply([Change(ALICE, "A", old, None)], zone.epoch)
    assert await zone.seen() == before


async def test_a_stale_leader_is_fenced_and_changes_nothing(zone):
    await zone.publish(zone.pool("alice"))
    changes = diff(zone.pool("bob"), await zone.seen())
    await zone.publisher.take_fence(zone.epoch + 1)
    for attempt in (
        zone.publisher.take_fence(zone.epoch),
        zone.publish(zone.pool("bob")),
        zone.publisher.apply(changes, zone.epoch),
    ):
        with pytest.raises(Fenced, match=f"epoch is {zone.epoch + 1}"):
            await attempt
    assert await zone.seen() == zone.pool("alice")


async def test_drift_is_found_and_repaired(zone):
    wanted = zone.pool("alice", "bob")
    await zone.publish(wanted)
    await zone.shown(wanted)
    zone.by_hand(lambda update: update.replace(ALICE, 1, "A", "198.51.100.9"))
    zone.by_hand(lambda update: update.replace("MALLORY.servers.pool.example.", 1, "A", "198.51.100.9"))
    zone.by_hand(lambda update: update.delete(*SERVICE))
    assert {(ALICE, "A"), SERVICE} <= {found.key for found in await zone.publisher.verify(wanted, wanted)}
    assert len(await zone.publish(wanted)) == 3
    await zone.shown(wanted, (owner("mallory"), "A"))


async def test_an_address_beside_a_cname_is_told(zone):
    """BIND and Knot acknowledge it and keep the CNAME alone; PowerDNS refuses it."""
    with pytest.raises(Rejected, match=r"not kept: cname\..*CNAME|answers REFUSED"):
        await zone.publish(zone.pool("cname"))


async def test_eight_targets_with_the_longest_labels_fit_one_datagram_signed(zone):
    names = [f"{number}{'x' * 35}" for number in range(8)]
    wanted = zone.pool(*names)
    await zone.publish(wanted)
    await zone.shown(wanted)
    for server in zone.servers:
        answer = ask(server, *SERVICE)
        if isinstance(server, PowerDns):
            # It counts the addresses in, with their signatures: resolvers have to come again by TCP.
            assert answer.flags & dns.flags.TC
            continue
        assert not answer.flags & dns.flags.TC
        assert [(rrset.rdtype, len(rrset)) for rrset in answer.answer] == [(SRV, 8), (RRSIG, 1)]
        assert len(answer.wire) <= 1232
        # Only Knot has no minimal answers.
        assert bool(answer.additional) == isinstance(server, Knot | KnotSecondary)


async def test_a_resolver_validates_what_is_there_and_what_is_not(zone, tmp_path):
    wanted = zone.pool("alice", "bob")
    await zone.publish(wanted)
    await zone.shown(wanted)
    with Unbound(tmp_path / "unbound", [zone.primary]) as unbound:
        for name, rdtype, rcode, has_answer in (
            (*SERVICE, dns.rcode.NOERROR, True),
            (ALICE, "A", dns.rcode.NOERROR, True),
            (ALICE, "CAA", dns.rcode.NOERROR, True),
            (ALICE, "TXT", dns.rcode.NOERROR, False),
            ("_tcp.pool.example.", "A", dns.rcode.NOERROR, False),  # an empty non-terminal
            (f"_acme-challenge.{ALICE}", "TXT", dns.rcode.NXDOMAIN, False),
            (owner("nobody"), "A", dns.rcode.NXDOMAIN, False),
            ("nobody.pool.example.", "A", dns.rcode.NXDOMAIN, False),
        ):
            answer = ask(unbound, name, rdtype)
            found = answer.rcode(), bool(answer.answer), bool(answer.flags & dns.flags.AD)
            assert found == (rcode, has_answer, True), (name, rdtype)


async def test_a_resolver_with_another_key_gets_nothing(zone, tmp_path):
    await zone.publish(zone.pool("alice"))
    key = zone.primary.trust_anchor().split()
    key[-1] = key[-1][::-1]
    with Unbound(tmp_path / "unbound", [zone.primary], anchor=" ".join(key)) as unbound:
        for name, rdtype in (SERVICE, (ALICE, "TXT"), (owner("nobody"), "A")):
            assert ask(unbound, name, rdtype).rcode() == dns.rcode.SERVFAIL


NO_KEY = "does not know the TSIG key"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tsig_name": "stranger"}, NO_KEY),
        ({"tsig_secret": "AAAA"}, f"the secrets differ|{NO_KEY}"),
        ({"tsig_algorithm": "hmac-sha512"}, f"{NO_KEY}|the secrets differ"),
    ],
    ids=["name", "secret", "algorithm"],
)
async def test_a_wrong_key_is_named(zone, options, text):
    wrong = zone.publisher_with(**options)
    for attempt in (
        wrong.observe(),
        wrong.take_fence(zone.epoch + 1),
        wrong.apply(diff(zone.pool("alice"), {}), zone.epoch),
        wrong.rehearse(),
    ):
        with pytest.raises(Rejected, match=text):
            await attempt
    assert await zone.seen() == {}


async def test_a_wrong_clock_is_named(zone, monkeypatch):
    changes = diff(zone.pool("alice"), {})
    monkeypatch.setattr("dns.message.time", SimpleNamespace(time=lambda: time.time() - 900))
    with pytest.raises(Rejected, match="clock"):
        await zone.publisher.apply(changes, zone.epoch)
    monkeypatch.undo()
    assert await zone.seen() == {}


async def test_what_the_key_may_not_change_stays_as_it_is(zone):
    """PowerDNS acknowledges what its script denies; others refuse it. The embedded server's key is the operator's too."""
    before = zone.primary.serial()
    for name, rdtype, text in (
        (ALICE, "TLSA", f"3 1 1 {'00' * 32}"),
        ("www.pool.example.", "A", "192.0.2.1"),
    ):
        change = Change(name, rdtype, None, RRset(1, frozenset({text})))
        if isinstance(zone.primary, Embedded):
            await zone.publisher.apply([change], zone.epoch)
            assert ask(zone.primary, name, rdtype).answer
            await zone.publisher.apply([Change(name, rdtype, change.after, None)], zone.epoch)
        elif isinstance(zone.primary, PowerDns):
            await zone.publisher.apply([change], zone.epoch)
        else:
            with pytest.raises(Rejected, match="does not grant"):
                await zone.publisher.apply([change], zone.epoch)
        assert not ask(zone.primary, name, rdtype).answer
    assert zone.primary.serial() == before + (4 if isinstance(zone.primary, Embedded) else 0)


async def test_nobody_but_the_publisher_changes_the_zone(zone):
    """The key of the secondaries reads it, and without a key there is not even that."""
    before = zone.primary.serial()
    transfer = {"name": f"transfer.{zone.primary.zone}", "secret": zone.primary.transfer_secret}
    for key in (transfer, {"name": None}):
        with suppress(dns.tsig.PeerError):
            zone.by_hand(lambda update: update.add(ALICE, 1, "A", "198.51.100.9"), **key)
        assert zone.primary.serial() == before
        assert await zone.seen() == {}
    for server in zone.servers:
        with pytest.raises((dns.xfr.TransferError, EOFError)):
            dns.zone.from_xfr(dns.query.xfr(server.address, "pool.example.", port=server.port, timeout=5))
    reader = zone.publisher_with(tsig_name=transfer["name"], tsig_secret=transfer["secret"])
    assert (await reader.observe()).zone == {}


async def test_a_restart_loses_nothing(zone):
    wanted = zone.pool(*SOME)
    await zone.publish(wanted)
    await zone.shown(wanted)
    secondary = zone.primary.secondaries[0]
    zone.primary.restart()
    assert await zone.seen() == wanted
    zone.primary.stop()
    try:
        with pytest.raises(Unreachable):
            await zone.publisher.observe()
        assert ask(secondary, *SERVICE).answer
    finally:
        zone.primary.start()
    await zone.publish({})
    await zone.shown({}, *wanted)


async def test_regions_are_written_and_nothing_else_with_such_names(zone):
    some = RRset.of(60, "SRV", [f"0 10 4460 {ALICE}"])
    regions = {(f"_ntske._tcp.{label}.pool.example.", "SRV"): some for label in ("aq", "europe", "zw")}
    wanted = zone.pool("alice") | regions
    for label in ("aq", "europe", "zw"):
        await zone.publisher.rehearse_region(label)
    await zone.publish(wanted)
    await zone.shown(wanted)
    if isinstance(zone.primary, Knot | PowerDns):
        other = "_ntske._udp.de.pool.example."
        with suppress(Rejected):
            await zone.publisher.apply([Change(other, "SRV", None, some)], zone.epoch)
        assert not ask(zone.primary, other, "SRV").answer
    await zone.publish({})
    await zone.shown({}, *regions)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("knot", "knot-pool.conf"), ("bind", "bind-pool.conf"), ("powerdns", "pdns-pool.lua")],
    ids=["knot", "bind", "powerdns"],
)
async def test_a_right_that_is_missing_is_named(kind, name, tmp_path, monkeypatch, signed_zone):
    """By a rehearsal, where the primary checks rights before prerequisites and says so; else by the first publish."""
    strict = setup._NAMESERVERS[name]
    for right in (", CAA", " CAA", ", [pdns.CAA] = true"):
        strict = strict.replace(right, "")
    assert strict != setup._NAMESERVERS[name]
    monkeypatch.setitem(setup._NAMESERVERS, name, strict)
    with PRIMARIES[kind](tmp_path / "strict") as primary:
        zone = await signed_zone(primary).begin()
        if kind == "powerdns":
            await zone.publisher.rehearse()
        else:
            with pytest.raises(Rejected, match=r"_trial\.servers.*grant"):
                await zone.publisher.rehearse()
        with pytest.raises(PublishError, match=r"grant"):
            await zone.publish(zone.pool("alice"))


async def test_bind_tells_a_missing_right_of_what_is_there_already(tmp_path, monkeypatch, signed_zone):
    """BIND 9.18 looked at the prerequisites first at one time."""
    shipped = setup._NAMESERVERS["bind-pool.conf"]
    strict = shipped.replace('grant "$tsig_name" name _fence.$pool. TXT;', "")
    assert strict != shipped
    monkeypatch.setitem(setup._NAMESERVERS, "bind-pool.conf", strict)
    with (
        Bind(tmp_path / "strict", records=['_fence TXT "1"']) as primary,
        pytest.raises(Rejected, match=r"_fence\..*grant"),
    ):
        await signed_zone(primary).publisher.rehearse()


INTRUSION = """
local intruded = false
local policy = updatepolicy
function updatepolicy(update)
    local allowed = policy(update)
    if not intruded and update:getQName() == newDN("alice.servers.pool.example") and update:getQType() == pdns.CAA then
        intruded = true
        os.execute("python3 intrude.py")
    end
    return allowed
end
"""
INTRUDER = """
import sqlite3
with sqlite3.connect("pdns.sqlite3") as database:
    database.execute("UPDATE domains SET account = 'intruder'")
"""


async def test_an_update_that_met_another_writer_is_sent_once_more(tmp_path, monkeypatch, signed_zone):
    """PowerDNS does such a thing to itself, once a minute; here it happens in the middle of an update."""
    monkeypatch.setitem(setup._NAMESERVERS, "pdns-pool.lua", setup._NAMESERVERS["pdns-pool.lua"] + INTRUSION)
    (tmp_path / "intrude.py").write_text(INTRUDER)
    with PowerDns(tmp_path) as primary:
        zone = await signed_zone(primary).begin()
        wanted = zone.pool("alice")
        await zone.publish(wanted)
        assert await zone.seen() == wanted
        assert "database is locked" in primary._process.output()
