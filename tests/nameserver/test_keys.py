"""Keys that change hands while everybody looks: a validating resolver never sees a bogus moment."""

import asyncio
import re
import threading
from contextlib import contextmanager
from itertools import count

import dns.dnssec
import dns.flags
import dns.message
import dns.query
import dns.rcode
import dns.tsig
import dns.update
import pytest

from lab.embedded import Embedded
from lab.knot import Knot, KnotEdge
from lab.nsd import Nsd
from lab.processes import wait_until
from lab.unbound import Unbound
from poolsvc.primary import PrimaryConfig
from poolsvc.publisher import Publisher
from poolsvc.subsets import Sink
from poolsvc.zone import ZonePolicy

SERVERS = [f"m{number}.servers" for number in range(8)]
DELEGATION = ["pool NS ns1.pool", "ns1.pool A 127.0.0.1"]


def send(primary, change):
    update = dns.update.UpdateMessage(
        f"{primary.zone}.", keyring=dns.tsig.Key(primary.tsig_name, primary.tsig_secret, "hmac-sha256")
    )
    change(update)
    assert dns.query.tcp(update, primary.address, timeout=5, port=primary.port).rcode() == dns.rcode.NOERROR


def fill(embedded):
    def change(update):
        for number, owner in enumerate(SERVERS):
            update.add(owner, 1, "A", f"198.51.100.{number}")
        update.add("_ntske._tcp", 1, "SRV", "0 10 4460 m0.servers")

    send(embedded, change)
    asyncio.run(draw(embedded))


async def draw(embedded):
    policy = ZonePolicy(embedded.zone, srv_ttl=1, address_ttl=1, ke_port=4460, caa=())
    config = PrimaryConfig(
        address=embedded.address,
        port=embedded.port,
        tsig_name=embedded.tsig_name,
        tsig_secret=embedded.tsig_secret,
        nameservers=(),
    )
    publisher = Publisher(policy, config)
    await publisher.take_fence(1)
    sets = [[f"m{number}", f"m{(number + 1) % 8}"] for number in range(8)]
    await Sink(publisher).publish({policy.service: sets}, 1, 1)


def ask(server, name, kind="A"):
    query = dns.message.make_query(f"{name}.", kind, want_dnssec=True)
    return dns.query.udp(query, server.address, timeout=5, port=server.port)


class Parent(Knot):
    """One whose publisher changes the DS of the pool."""

    def _configuration(self):
        text = super()._configuration()
        for shipped, own in (
            ("update-type: [A, AAAA, CAA, TXT, SRV]", "update-type: [DS]"),
            (
                "update-owner-name: [servers.example., _tcp.example., _fence.example.]",
                "update-owner-name: [pool.example.]",
            ),
        ):
            assert shipped in text
            text = text.replace(shipped, own)
        return text


class Watcher:
    """Asks the resolver all the time for what is there and what is not; `seen` counts proved answers, `wrong` has others."""

    def __init__(self, resolver):
        self.resolver, self.seen, self.wrong = resolver, 0, []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        for number in count():
            if self._end.is_set():
                return
            either = ("A", "MX")[number % 2]
            for name, kind in (
                (f"{SERVERS[number % 8]}.pool.example", either),
                (f"x{number}.servers.pool.example", either),
                ("pool.example", either),
                ("_ntske._tcp.pool.example", "SRV"),
            ):
                answer = ask(self.resolver, name, kind)
                if answer.rcode() in {dns.rcode.NOERROR, dns.rcode.NXDOMAIN} and answer.flags & dns.flags.AD:
                    self.seen += 1
                else:
                    self.wrong.append((name, kind, dns.rcode.to_text(answer.rcode()), str(answer.flags)))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()


@contextmanager
def delegated(tmp_path, *, asks):
    """The embedded server under a signed parent with its DS, and a resolver that trusts the parent alone."""
    embedded = Embedded(tmp_path / "embedded", ttl=1, soa_minimum=1)
    parent = Parent(tmp_path / "parent", zone="example", ttl=1, soa_minimum=1, records=DELEGATION)
    embedded.more = "ds_ttl = 1\nmargin = 1\n"
    if asks:
        embedded.more += f'parents = ["{parent.address}:{parent.port}"]\n'
    with embedded, parent:
        fill(embedded)
        name_in_parent(parent, embedded)
        with Unbound(tmp_path / "unbound", [parent, embedded]) as resolver:
            yield embedded, parent, resolver


def name_in_parent(parent, embedded, tag=None):
    """What an operator, or a parent that reads CDS, does: the DS is that of the CDS."""
    texts = [one.to_text() for rrset in ask(embedded, "pool.example", "CDS").answer for one in rrset]
    ds = next(text for text in texts if re.match(r"\d+ 13 2 ", text))
    assert tag is None or ds.startswith(f"{tag} ")
    secret = parent.tsig_secret
    key = dns.tsig.Key(parent.tsig_name, secret, "hmac-sha256")
    update = dns.update.UpdateMessage("example.", keyring=key)
    update.replace("pool", 1, "DS", ds)
    answer = dns.query.tcp(update, parent.address, timeout=5, port=parent.port)
    assert answer.rcode() == dns.rcode.NOERROR


def tags(server):
    answer = ask(server, server.zone, "DNSKEY")
    return {
        dns.dnssec.key_id(key)
        for rrset in answer.answer
        if rrset.rdtype == dns.rdatatype.DNSKEY
        for key in rrset
    }


def signer(server, name, kind="A"):
    """The tag of the key that signed a name's records."""
    signatures = (one for one in ask(server, name, kind).answer if one.rdtype == dns.rdatatype.RRSIG)
    return next((rrset[0].key_tag for rrset in signatures), None)


def states(embedded):
    listed = embedded.poolsvc("dns", "keys", "list").stdout
    return dict(re.findall(r"^ *(\d+) +(\w+) ", listed, re.MULTILINE))


@pytest.mark.parametrize("asks", [True, False], ids=["parent is asked", "operator says"])
def test_a_roll_over_is_never_a_bogus_moment(tmp_path, asks):
    with delegated(tmp_path, asks=asks) as (embedded, parent, resolver), Watcher(resolver) as watcher:
        (old,) = tags(embedded)
        done = embedded.poolsvc("dns", "keys", "roll")
        assert done.status == 0, done.stderr
        new = int(re.search(r"^Key (\d+)", done.stdout).group(1))
        again = embedded.poolsvc("dns", "keys", "roll")
        assert again.status != 0
        assert "is not over" in again.stderr
        wait_until(lambda: tags(embedded) == {old, new}, "both keys are published")
        wait_until(
            lambda: states(embedded) == {str(old): "retiring", str(new): "active"}, "the new key signs"
        )
        wait_until(lambda: signer(embedded, "m1.servers.pool.example") == new, "the data are signed anew")
        wait_until(
            lambda: {signer(embedded, "_ntske._tcp.pool.example", "SRV") for _ in range(50)} == {new},
            "the sets are signed anew",
        )
        assert states(embedded) == {str(old): "retiring", str(new): "active"}, (
            "until the parent names the new one"
        )
        name_in_parent(parent, embedded, new)
        if not asks:
            assert tags(embedded) == {old, new}, "nobody has said that the parent names the new one"
            noted = embedded.poolsvc("dns", "keys", "ds-seen", str(new))
            assert noted.status == 0, noted.stderr
        wait_until(lambda: tags(embedded) == {new}, "the old key is gone")
        seen = watcher.seen
        wait_until(lambda: watcher.seen > seen + 100, "the watcher has looked on")
    assert watcher.wrong == []


def test_the_key_moves_to_a_knot_edge_without_a_bogus_moment(tmp_path):
    embedded = Embedded(tmp_path / "embedded", ttl=1, soa_minimum=1)
    edge, plain = KnotEdge(tmp_path / "edge", embedded), Nsd(tmp_path / "plain", embedded)
    with embedded:
        fill(embedded)
        edge.prepare()
        copied = embedded.poolsvc(
            "dns", "keys", "copy-to-knot", "--knot-config", str(edge.directory / "knot.conf")
        )
        assert copied.status == 0, copied.stderr
        edge.stop()
        with edge, plain:
            assert tags(edge) == tags(embedded) == tags(plain)
            # Both are asked in turn, so that every answer of one has to hold beside all that is known of the other.
            with Unbound(tmp_path / "unbound", [embedded]) as resolver, Watcher(resolver) as watcher:
                for number in range(10):
                    send(
                        embedded,
                        lambda update, number=number: update.replace(
                            SERVERS[0], 1, "A", f"198.51.100.{100 + number}"
                        ),
                    )
                    wait_until(
                        lambda number=number: (
                            (answer := ask(edge, "m0.servers.pool.example").answer)
                            and answer[0][0].address == f"198.51.100.{100 + number}"
                            and len(answer) == 2
                        ),
                        "the edge has the change, signed",
                    )
                embedded.stop()
                seen = watcher.seen
                wait_until(lambda: watcher.seen > seen + 200, "the edge alone answers")
            assert watcher.wrong == []


def test_a_wrong_tag_or_config_is_told(tmp_path):
    with Embedded(tmp_path / "embedded") as embedded:
        wrong = embedded.poolsvc("dns", "keys", "ds-seen", "1")
        assert wrong.status != 0
        assert "the active key is" in wrong.stderr
        missing = embedded.poolsvc(
            "dns", "keys", "copy-to-knot", "--knot-config", str(tmp_path / "none.conf")
        )
        assert missing.status != 0
        assert "keymgr" in missing.stderr
        assert len(tags(embedded)) == 1
