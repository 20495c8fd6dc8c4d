"""SIGKILL at every moment of the embedded server's work, and at random ones: what it acknowledged is there, and the zone whole."""

import random
import sys
import threading
import time
from contextlib import suppress

import dns.exception
import dns.name
import dns.query
import dns.rcode
import dns.tsig
import dns.update
import dns.xfr
import dns.zone
import pytest

from lab.embedded import Embedded
from lab.processes import Process, wait_until
from poolsvc.nameserver import records
from poolsvc.nameserver.keys import Keyring, KeyState, SigningKey, new_private
from poolsvc.nameserver.records import RRset, Signed
from poolsvc.nameserver.zone import SignedZone
from tests.nameserver.conftest import APEX, ORIGIN
from tests.nameserver.test_zone import check

UNREACHABLE = (OSError, EOFError, dns.exception.Timeout)
UPDATES = 3


def key(server):
    return dns.tsig.Key(server.tsig_name, server.tsig_secret, "hmac-sha256")


def send(server, number):
    """One update that is seen as a whole or not at all; whether it was acknowledged."""
    update = dns.update.UpdateMessage(ORIGIN, keyring=key(server))
    update.replace(f"m{number % 50}.servers", 60, "A", f"198.51.{number // 250}.{number % 250}")
    update.replace(f"m{number % 50}.servers", 60, "TXT", f'"{number}"')
    try:
        answer = dns.query.tcp(update, server.address, timeout=5, port=server.port)
    except UNREACHABLE:
        return False
    assert answer.rcode() == dns.rcode.NOERROR
    return True


def transfer(server, zone=None):
    """The zone by AXFR, or by IXFR what it lacks."""
    serial = None if zone is None else zone.get_soa().serial
    zone = zone or dns.zone.Zone(ORIGIN, relativize=False)
    query, _ = dns.xfr.make_query(zone, serial=serial, keyring=key(server))
    dns.query.inbound_xfr(server.address, zone, query, server.port, timeout=5)
    return zone


def whole(zone):
    return {
        (name.to_text(), rdataset.ttl, rdata.to_text())
        for name, rdataset in zone.iterate_rdatasets()
        for rdata in rdataset
    }


def check_whole(zone):
    """What was transferred as a validator sees it."""
    content = {}
    signatures = {}
    for name, rdataset in zone.iterate_rdatasets():
        owner = records.to_wire(name)
        rdatas = [rdata.to_digestable() for rdata in rdataset]
        if rdataset.rdtype == records.RRSIG:
            signatures[owner, int(rdataset.covers)] = tuple(rdata.to_wire() for rdata in rdataset)
        else:
            content[owner, int(rdataset.rdtype)] = RRset.of(rdataset.ttl, rdatas)
    assert content.keys() == signatures.keys()
    signed = {each: Signed(rrset, signatures[each], 0) for each, rrset in content.items()}
    any_key = SigningKey.of(new_private(), KeyState.ACTIVE)
    now = int(time.time())
    check(SignedZone(Keyring(APEX, [any_key]), signed, random.Random(1), now), now=now)


def texts(zone):
    """What each name was last set to, by both of its records."""
    found = {}
    for name, rdataset in zone.iterate_rdatasets("TXT"):
        (rdata,) = rdataset
        number = int(rdata.strings[0])
        (address,) = zone.get_rdataset(name, "A")
        assert address.to_text() == f"198.51.{number // 250}.{number % 250}", "an update is made as a whole"
        found[number % 50] = number
    return found


def check_acknowledged(found, acknowledged, sent):
    for name, number in acknowledged.items():
        assert number <= found.get(name, -1) <= sent[name]


class Mortal(Embedded):
    """One that dies at a moment; the next start is one that lives."""

    def doom(self, at, when):
        argv = [sys.executable, "-m", "lab.mortal_dns", str(at), when, *self.argv[1:]]
        self.prepare()
        return Process("mortal", argv, self.directory)


@pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.long), "after"])
@pytest.mark.parametrize("at", range(1, 5 + UPDATES + 1))
def test_killed_at_each_moment_it_goes_on_where_it_was(tmp_path, at, when):
    server = Mortal(tmp_path)
    mortal = server.doom(at, when)
    mortal.start()
    acknowledged = {}
    try:
        for number in range(UPDATES):
            wait_until(lambda: not mortal.running() or server._is_ready(), "ready or dead")
            if mortal.running() and send(server, number):
                acknowledged[number] = number
        assert mortal.wait() == -9
    finally:
        mortal.stop()
    with server:
        zone = transfer(server)
        check_whole(zone)
        found = texts(zone)
        check_acknowledged(found, acknowledged, {number: number for number in range(UPDATES)})
        assert len(acknowledged) <= len(found) <= len(acknowledged) + 1
        for number in range(UPDATES):
            assert send(server, number)
        assert texts(transfer(server)) == {number: number for number in range(UPDATES)}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.long)])
def test_killed_at_random_it_has_what_it_acknowledged_and_secondaries_follow(tmp_path, kills):
    server = Embedded(tmp_path)
    acknowledged, sent, ending = {}, {}, threading.Event()

    def write():
        number = 0
        while not ending.is_set():
            sent[number % 50] = number
            if send(server, number):
                acknowledged[number % 50] = number
                number += 1
            else:
                time.sleep(0.02)

    with server:
        shadow, behind = transfer(server), None
        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(kills):
                time.sleep(random.uniform(0, 0.4))
                with suppress(*UNREACHABLE, dns.exception.DNSException):
                    behind = transfer(server)
                server.kill()
                before = dict(acknowledged)
                server.start()
                zone = transfer(server)
                check_acknowledged(texts(zone), before, sent)
                check_whole(zone)
                transfer(server, shadow)
        finally:
            ending.set()
            writer.join()
        newest = whole(transfer(server))
        for each in filter(None, (shadow, behind)):
            transfer(server, each)
            assert whole(each) == newest, "the differences lead from every edition to the newest"
