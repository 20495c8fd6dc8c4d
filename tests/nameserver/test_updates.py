"""RFC 2136, clause by clause, and what this server refuses."""

import dns.message
import dns.rcode
import dns.update
import pytest

from poolsvc.nameserver import records
from poolsvc.nameserver.updates import Refused, evaluate
from tests.nameserver.conftest import APEX, make, name

ALICE = "alice.servers"


def evaluated(zone, change, origin="pool.example."):
    update = dns.update.UpdateMessage(origin)
    change(update)
    return evaluate(dns.message.from_wire(update.to_wire(), one_rr_per_rrset=True), zone)


def refused(zone, change, **options):
    with pytest.raises(Refused) as caught:
        evaluated(zone, change, **options)
    return caught.value.rcode


def texts(zone, change, key):
    """The records of a key after a change; None when it does not touch it."""
    changed = evaluated(zone, change)
    assert set(changed) <= {key}
    return changed.get(key, "as it was")


PREREQUISITES = [
    (lambda u: u.present(ALICE), None),
    (lambda u: u.present("nobody"), dns.rcode.NXDOMAIN),
    (lambda u: u.present("_tcp"), dns.rcode.NXDOMAIN),  # a name that has only names under it is not in use
    (lambda u: u.absent("nobody"), None),
    (lambda u: u.absent(ALICE), dns.rcode.YXDOMAIN),
    (lambda u: u.absent("_tcp"), None),
    (lambda u: u.present(ALICE, "A"), None),
    (lambda u: u.present(ALICE, "MX"), dns.rcode.NXRRSET),
    (lambda u: u.absent(ALICE, "MX"), None),
    (lambda u: u.absent(ALICE, "A"), dns.rcode.YXRRSET),
    (lambda u: u.present(ALICE, "A", "198.51.100.1"), None),
    (lambda u: u.present(ALICE, "A", "198.51.100.9"), dns.rcode.NXRRSET),
    (lambda u: u.present("nobody", "A", "198.51.100.9"), dns.rcode.NXRRSET),
    (lambda u: u.present("_ntske._tcp", "SRV", "0 10 4460 alice.servers"), dns.rcode.NXRRSET),  # only a part
    (lambda u: u.present("_ntske._tcp", "SRV", "0 10 4460 BOB.servers", "0 10 4460 alice.servers"), None),
]


@pytest.mark.parametrize(("require", "rcode"), PREREQUISITES)
def test_prerequisites(zone, require, rcode):
    def change(update):
        require(update)
        update.add("new", 60, "A", "192.0.2.1")

    if rcode is None:
        assert set(evaluated(zone, change)) == {(name("new"), records.A)}
    else:
        assert refused(zone, change) == rcode


def test_a_record_is_added_to_those_that_are_there_and_its_ttl_is_theirs(zone):
    key = name(ALICE), records.A
    after = texts(zone, lambda u: u.add(ALICE, 60, "A", "198.51.100.9"), key)
    assert (after.ttl, len(after.rdatas)) == (60, 2)
    assert texts(zone, lambda u: u.add(ALICE, 300, "A", "198.51.100.1"), key) == "as it was"


def test_steps_are_taken_in_their_order(zone):
    def change(update):
        update.add(ALICE, 300, "A", "198.51.100.9")
        update.delete(ALICE, "A")
        update.add(ALICE, 300, "A", "198.51.100.7")

    after = texts(zone, change, (name(ALICE), records.A))
    assert after.rdatas == (bytes([198, 51, 100, 7]),)


def test_an_rrset_a_record_or_a_name_is_deleted(zone):
    assert texts(zone, lambda u: u.delete(ALICE, "A"), (name(ALICE), records.A)) is None
    srv = name("_ntske._tcp"), records.SRV
    assert (
        len(texts(zone, lambda u: u.delete("_ntske._tcp", "SRV", "0 10 4460 bob.servers"), srv).rdatas) == 1
    )
    assert texts(zone, lambda u: u.delete(ALICE, "MX"), (name(ALICE), records.MX)) == "as it was"
    gone = evaluated(zone, lambda u: u.delete(ALICE))
    assert gone == {(name(ALICE), records.A): None, (name(ALICE), records.AAAA): None}
    make(zone, gone)
    assert zone.node(name("_acme-challenge.alice.servers")), "names under it stay"


def test_the_apex_keeps_its_soa_and_ns(zone):
    for change in (
        lambda u: u.delete("@"),
        lambda u: u.delete("@", "NS"),
        lambda u: u.delete("@", "SOA"),
        lambda u: u.delete("@", "NS", "ns1"),
    ):
        assert evaluated(zone, change) == {}
    added = evaluated(zone, lambda u: u.add("@", 3600, "NS", "ns2"))
    assert len(added[APEX, records.NS].rdatas) == 2


def test_an_alias_is_alone(zone):
    assert evaluated(zone, lambda u: u.add(ALICE, 60, "CNAME", "bob.servers")) == {}
    assert evaluated(zone, lambda u: u.add("www", 60, "A", "192.0.2.1")) == {}
    after = texts(zone, lambda u: u.add("www", 60, "CNAME", "bob.servers"), (name("www"), records.CNAME))
    assert len(after.rdatas) == 1


def test_a_serial_is_raised_and_never_lowered(zone):
    key = APEX, records.SOA

    def soa(serial):
        return lambda u: u.add("@", 3600, "SOA", f"ns1 hostmaster {serial} 3600 600 86400 60")

    assert records.soa_serial(texts(zone, soa(zone.serial + 5), key).rdatas[0]) == zone.serial + 5
    assert texts(zone, soa(zone.serial), key) == "as it was"
    assert texts(zone, soa(zone.serial - 1), key) == "as it was"


@pytest.mark.parametrize(
    "change",
    [
        lambda u: u.add("*.servers", 60, "A", "192.0.2.1"),
        lambda u: u.add("foo.*.servers", 60, "A", "192.0.2.1"),
        lambda u: u.add("sub", 60, "NS", "ns1"),
        lambda u: u.add("sub", 60, "DNAME", "example.net."),
        lambda u: u.add("sub", 60, "DS", "1 13 2 " + "00" * 32),
        lambda u: u.add("@", 60, "DNSKEY", "257 3 13 " + "AAAA" * 4),
        lambda u: u.add(ALICE, 60, "NSEC", "bob.servers A"),
        lambda u: u.add(ALICE, 60, "RRSIG", "A 13 4 300 20300101000000 20200101000000 1 pool.example. AAAA"),
        lambda u: u.add("sub", 60, "SOA", "ns1 hostmaster 1 1 1 1 1"),
        lambda u: u.add("@", 60, "CDS", "0 0 0 00"),
        lambda u: u.delete(ALICE, "NSEC"),
        lambda u: u.delete("@", "DNSKEY"),
        lambda u: u.delete("@", "CDS", "0 0 0 00"),
    ],
)
def test_what_is_the_signers_or_could_not_be_served_right_is_refused_as_a_whole(zone, change):
    def both(update):
        update.add("new", 60, "A", "192.0.2.1")
        change(update)

    assert refused(zone, both) == dns.rcode.REFUSED


def test_names_of_other_zones_are_refused(zone):
    assert refused(zone, lambda u: u.add("a.example.net.", 60, "A", "192.0.2.1")) == dns.rcode.NOTZONE
    assert refused(zone, lambda u: u.present("a.example.net.")) == dns.rcode.NOTZONE
    assert refused(zone, lambda u: None, origin="servers.pool.example.") == dns.rcode.NOTAUTH


def test_an_rrset_that_fits_no_message_is_refused(zone):
    def change(update):
        for number in range(200):
            update.add("big", 60, "TXT", f'"{number:0250}"')

    assert refused(zone, change) == dns.rcode.REFUSED


def test_a_record_of_another_class_is_malformed(zone):
    update = dns.update.UpdateMessage("pool.example.")
    update.add("new", 60, "TYPE65280", r"\# 1 00")
    wire = update.to_wire().replace(b"\xff\x00\x00\x01", b"\xff\x00\x00\x03")
    with pytest.raises(Refused) as caught:
        evaluate(dns.message.from_wire(wire, one_rr_per_rrset=True), zone)
    assert caught.value.rcode == dns.rcode.FORMERR
