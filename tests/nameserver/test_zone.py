"""Every edition of the zone is whole: signed, closed by NSEC, and told to others exactly by its difference."""

from random import Random

import dns.dnssec
import dns.name
import dns.rdatatype
import dns.rrset
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poolsvc.nameserver import records
from poolsvc.nameserver.keys import REFRESH, VALID_AFTER, VALID_BEFORE, Keyring, KeyState
from poolsvc.nameserver.zone import SignedZone
from tests.nameserver.conftest import APEX, NOW, ORIGIN, make, name, new_key, new_zone, rrset

NAMES = ("a", "b.a", "c.b.a", "servers", "x.servers", "y.servers", "z.y.servers", "_t.x.servers", "ns1")
KINDS = {records.A: "192.0.2.1", records.AAAA: "2001:db8::1", records.TXT: '"text"'}


def lines(zone):
    """All records but the SOA, in wire form."""
    found = []
    for owner, node in zone.copy().items():
        for rdtype, signed in node.items():
            some = list(records.records(owner, rdtype, signed))
            found += some[1:] if rdtype == records.SOA else some
    return found


def check(zone, now=NOW):
    """The whole zone as a validator sees it: signatures by the keys in it, one ring of NSEC with the right types."""
    content = zone.copy()
    apex = content[APEX]
    keys = {ORIGIN: as_rrset(APEX, records.DNSKEY, apex[records.DNSKEY])}
    for owner, node in content.items():
        for rdtype, signed in node.items():
            data = as_rrset(owner, rdtype, signed)
            for one in signed.signatures:
                signature = dns.rdata.from_wire("IN", "RRSIG", one, 0, len(one))
                dns.dnssec.validate_rrsig(data, signature, keys, now=now)
    owners = sorted(content, key=records.from_wire)
    for number, owner in enumerate(owners):
        (data,) = content[owner][records.NSEC].rrset.rdatas
        nsec = dns.rdata.from_wire("IN", "NSEC", data, 0, len(data))
        assert records.to_wire(nsec.next) == owners[(number + 1) % len(owners)]
        assert data.endswith(records.bitmap(frozenset(content[owner]) | {records.RRSIG}))
        assert content[owner][records.NSEC].rrset.ttl == content[APEX][records.NSEC].rrset.ttl


def as_rrset(owner, rdtype, signed):
    found = [dns.rdata.from_wire("IN", rdtype, one, 0, len(one)) for one in signed.rrset.rdatas]
    return dns.rrset.from_rdata_list(records.from_wire(owner), signed.rrset.ttl, found)


def data_of(zone):
    """What the zone's owners put there."""
    return {
        (owner, rdtype): signed.rrset
        for owner, node in zone.copy().items()
        for rdtype, signed in node.items()
        if rdtype not in {*records.SIGNER_TYPES, records.SOA}
    }


def test_a_new_zone_is_whole(zone):
    check(zone)


changes = st.lists(
    st.tuples(st.sampled_from(NAMES), st.sampled_from(sorted(KINDS)), st.integers(0, 3)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(changes, min_size=1, max_size=5))
def test_after_any_changes_the_zone_is_what_was_wanted_and_the_differences_tell_it(editions):
    zone = new_zone()
    for edition_changes in editions:
        wanted = {
            (name(owner), rdtype): rrset(dns.rdatatype.to_text(rdtype), KINDS[rdtype], ttl=ttl * 100)
            if ttl
            else None
            for owner, rdtype, ttl in edition_changes
        }
        before, expected, serial = lines(zone), data_of(zone), zone.serial
        expected = {key: value for key, value in (expected | wanted).items() if value is not None}
        edition = make(zone, wanted)
        assert data_of(zone) == expected
        check(zone)
        if edition is None:
            assert (zone.serial, lines(zone)) == (serial, before)
            continue
        assert zone.serial == serial + 1
        for gone in edition.deleted:
            before.remove(gone)
        assert sorted([*before, *edition.added]) == sorted(lines(zone))
        assert not set(edition.deleted) & set(edition.added)


@settings(max_examples=30, deadline=None)
@given(st.lists(changes, min_size=1, max_size=3))
def test_a_zone_that_is_loaded_goes_on_where_it_was(editions):
    zone = new_zone()
    for some in editions:
        make(
            zone,
            {(name(owner), kind): rrset(dns.rdatatype.to_text(kind), KINDS[kind]) for owner, kind, _ in some},
        )
    content = {(owner, kind): signed for owner, node in zone.copy().items() for kind, signed in node.items()}
    loaded = SignedZone(zone.keyring, content, Random(1), NOW)
    for owner in (*NAMES, "nope", "b", "nope.a"):
        assert loaded.node(name(owner)) == zone.node(name(owner))
        assert loaded.covering(name(owner)) == zone.covering(name(owner))
    make(loaded, {(name("new"), records.A): rrset("A", "192.0.2.9")})
    check(loaded)


def test_the_same_again_is_no_edition(zone):
    assert make(zone, {(name("alice.servers"), records.A): rrset("A", "198.51.100.1")}) is None
    assert make(zone, {(name("nobody"), records.A): None}) is None
    assert make(zone, {}) is None


def test_names_between_exist_as_long_as_there_is_something_under_them(zone):
    assert zone.node(name("_tcp")) == {}
    make(zone, {(name("_ntske._tcp"), records.SRV): None})
    assert zone.node(name("_tcp")) is None


def test_a_serial_is_only_ever_raised(zone):
    def soa(serial):
        return {(APEX, records.SOA): rrset("SOA", f"ns1 hostmaster {serial} 3600 600 86400 60", ttl=3600)}

    held = zone.serial
    make(zone, soa(held))
    assert zone.serial == held, "the same SOA is the same zone"
    make(zone, soa(held + 7))
    assert zone.serial == held + 7
    make(zone, soa(held) | {(name("new"), records.A): rrset("A", "192.0.2.9")})
    assert zone.serial == held + 8


def test_a_serial_goes_round():
    zone = new_zone()
    for serial in (2**31 - 2, 2**32 - 4, 2**32 - 1):
        make(
            zone, {(APEX, records.SOA): rrset("SOA", f"ns1 hostmaster {serial} 3600 600 86400 60", ttl=3600)}
        )
    make(zone, {(name("new"), records.A): rrset("A", "192.0.2.9")})
    assert zone.serial == 0
    check(zone)


def test_another_negative_ttl_is_that_of_every_proof(zone):
    make(zone, {(APEX, records.SOA): rrset("SOA", "ns1 hostmaster 1 3600 600 86400 30", ttl=3600)})
    assert {node[records.NSEC].rrset.ttl for node in zone.copy().values()} == {30}
    check(zone)


def test_signatures_reach_a_week_into_both_directions_and_are_renewed_after_a_day(zone):
    (signature,) = zone.soa.signatures
    data = dns.rdata.from_wire("IN", "RRSIG", signature, 0, len(signature))
    assert (data.inception, data.expiration) == (NOW - VALID_BEFORE, NOW + VALID_AFTER)
    assert zone.due(NOW + VALID_AFTER - REFRESH - 43_200, 10) == []
    later = NOW + VALID_AFTER - REFRESH + 1
    total = sum(map(len, zone.copy().values()))
    due = zone.due(later, 1000)
    assert len(due) == total, "a day later all of a zone that was signed at once"
    assert zone.due(later, 5) == due[:5], "the most urgent first, and what was not renewed is due again"
    make(zone, {}, later, renewed=due)
    assert zone.due(later, 10) == []
    check(zone, later)
    check(zone, later + VALID_AFTER - 43_201)


def test_a_roll_over_signs_as_each_state_says(zone):
    (old,) = zone.keyring.keys
    new = new_key(KeyState.PUBLISHED)
    make(zone, {}, keyring=Keyring(APEX, [old, new]))
    check(zone)
    assert len(zone.copy()[APEX][records.DNSKEY].signatures) == 2
    assert zone.due(NOW, 1000) == [], "the data are still the old key's to sign"
    old, new = (
        type(key)(key.private, state, key.dnskey, key.tag)
        for key, state in ((old, KeyState.RETIRING), (new, KeyState.ACTIVE))
    )
    make(zone, {}, keyring=Keyring(APEX, [old, new]))
    check(zone)
    assert zone.copy()[APEX][records.CDS].rrset.rdatas == (new.ds(APEX),)
    while some := zone.due(NOW, 3):
        make(zone, {}, renewed=some)
        check(zone)
    make(zone, {}, keyring=Keyring(APEX, [new]))
    check(zone)
    assert {
        one[16:18] for node in zone.copy().values() for signed in node.values() for one in signed.signatures
    } == {new.tag.to_bytes(2, "big")}


def test_exactly_one_key_is_active():
    with pytest.raises(ValueError, match="not enough values"):
        Keyring(APEX, [new_key(KeyState.PUBLISHED)])


@given(
    st.lists(st.binary(min_size=1, max_size=8), min_size=1, max_size=5),
    st.lists(st.binary(min_size=1, max_size=8), min_size=1, max_size=5),
)
def test_names_are_in_the_order_of_dnssec(some, others):
    first, second = (dns.name.Name([*labels, b""]).canonicalize() for labels in (some, others))
    assert (records.order(records.to_wire(first)) < records.order(records.to_wire(second))) == (
        first < second
    )


def test_what_a_clock_signed_that_was_ahead_is_signed_anew(zone):
    ahead = NOW + 30 * 86_400
    make(zone, {(name("new"), records.A): rrset("A", "192.0.2.9")}, ahead)
    assert zone.due(NOW, 100) == []
    zone.survey(NOW)
    due = zone.due(NOW, 100)
    assert (name("new"), records.A) in due
    make(zone, {}, renewed=due)
    check(zone)


def test_the_memory_of_signatures_does_not_grow_with_editions(zone):
    for number in range(3000):
        make(zone, {(name("new"), records.A): rrset("A", f"192.0.{number // 250}.{number % 250}")})
    assert len(zone._aging) < 12_000


def test_what_is_due_within_an_hour_is_renewed_together(zone):
    ends = sorted(signed.expires for node in zone.copy().values() for signed in node.values())
    first = ends[0] - REFRESH
    assert len(zone.due(first + 1, 100)) == sum(end < ends[0] + 3601 for end in ends)
