"""A small signed zone, and what others make of it."""

from random import Random

import dns.name
import dns.rdata
import pytest

from poolsvc.nameserver import records
from poolsvc.nameserver.keys import Keyring, KeyState, SigningKey, new_private
from poolsvc.nameserver.records import RRset
from poolsvc.nameserver.zone import SignedZone

NOW = 1_800_000_000
ORIGIN = dns.name.from_text("pool.example.")
APEX = records.to_wire(ORIGIN)


def name(text):
    """A name of the zone in wire form; empty is the apex."""
    return records.to_wire(dns.name.from_text(text, ORIGIN))


def rrset(kind, *texts, ttl=300):
    found = (dns.rdata.from_text("IN", kind, text, origin=ORIGIN, relativize=False) for text in texts)
    return RRset.of(ttl, map(records.canonical, found))


def run(steps):
    """A change to its end, without pauses."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def make(zone, wanted, now=NOW, **options):
    edition = run(zone.edit(wanted, now, **options))
    if edition is not None:
        zone.adopt(edition)
    return edition


def new_key(state=KeyState.ACTIVE):
    return SigningKey.of(new_private(), state)


def new_zone(minimum=60):
    zone = SignedZone(Keyring(APEX, [new_key()]), {}, Random(1), NOW)
    make(
        zone,
        {
            (APEX, records.SOA): rrset("SOA", f"ns1 hostmaster 1 3600 600 86400 {minimum}", ttl=3600),
            (APEX, records.NS): rrset("NS", "ns1", ttl=3600),
            (name("ns1"), records.A): rrset("A", "192.0.2.53"),
        },
    )
    return zone


@pytest.fixture
def zone():
    """With two servers, the SRV of both, and names that only have names under them."""
    zone = new_zone()
    make(
        zone,
        {
            (name("servers"), int(dns.rdatatype.CAA)): rrset("CAA", '0 issue ";"'),
            (name("alice.servers"), records.A): rrset("A", "198.51.100.1"),
            (name("alice.servers"), records.AAAA): rrset("AAAA", "2001:db8::1"),
            (name("bob.servers"), records.A): rrset("A", "198.51.100.2"),
            (name("_ntske._tcp"), records.SRV): rrset(
                "SRV", "0 10 4460 alice.servers", "0 10 4460 bob.servers", ttl=60
            ),
            (name("_acme-challenge.alice.servers"), records.TXT): rrset("TXT", '"token"'),
            (name("www"), records.CNAME): rrset("CNAME", "registry.example.net."),
        },
    )
    return zone
