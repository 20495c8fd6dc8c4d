"""The server on its sockets: updates that outlive it, transfers, news to secondaries, peers that are slow or hostile."""

import asyncio
import base64
import socket
import time
from contextlib import asynccontextmanager, suppress

import dns.asyncquery
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.query
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.tsig
import dns.update
import dns.xfr
import dns.zone
import pytest

from poolsvc.nameserver import records
from poolsvc.nameserver.exchange import Peer, Right
from poolsvc.nameserver.keys import KeyState
from poolsvc.nameserver.primary import Apex, Primary
from poolsvc.nameserver.server import NameServer, Secondary, Terms
from poolsvc.nameserver.sets import NO_DRAW, Head
from poolsvc.nameserver.store import Store, StoreUnusable
from tests.nameserver.conftest import APEX, ORIGIN

HERE = "127.0.0.1"
DEADLINE = 5.0


def key(name, octet):
    return dns.tsig.Key(name, base64.b64encode(bytes([octet]) * 32).decode(), "hmac-sha256")


PUBLISHER, PLAIN, EDGE, STRANGER = (
    key(name, octet) for octet, name in enumerate(("publisher", "plain", "edge", "stranger"))
)
TERMS = Terms(
    peers=[
        Peer(PUBLISHER, frozenset(Right)),
        Peer(PLAIN, frozenset({Right.TRANSFER})),
        Peer(EDGE, frozenset({Right.TRANSFER}), signs=True),
    ],
    secondaries=[],
    parents=[],
    responses_per_second=1000,
    responses_at_once=1000,
)


def apex(**changes):
    terms = {"ttl": 3600, "negative_ttl": 60, "longest_ttl": 300, "ds_ttl": 3600, "margin": 0} | changes
    return Apex(APEX, {"ns1.pool.example.": ["192.0.2.53", "2001:db8::53"]}, **terms)


class Served:
    def __init__(self, primary, server, port):
        self.primary, self.server, self.port = primary, server, port

    async def tcp(self, query):
        return await dns.asyncquery.tcp(query, HERE, DEADLINE, self.port)

    async def udp(self, query):
        return await dns.asyncquery.udp(query, HERE, DEADLINE, self.port)

    async def ask(self, owner, kind="A", *, by=PUBLISHER):
        query = dns.message.make_query(dns.name.from_text(owner, ORIGIN), kind, want_dnssec=True)
        query.use_tsig(by)
        return await self.udp(query)

    async def update(self, change, *, by=PUBLISHER):
        update = dns.update.UpdateMessage("pool.example.", keyring=by)
        change(update)
        return (await self.tcp(update)).rcode()

    async def transfer(self, zone, serial=None, *, by=PLAIN):
        query, _ = dns.xfr.make_query(zone, serial=serial, keyring=by)
        await dns.asyncquery.inbound_xfr(HERE, zone, query, self.port, timeout=DEADLINE)
        return zone

    def connect(self):
        return asyncio.open_connection(HERE, self.port)


@asynccontextmanager
async def serving(directory, terms=TERMS, **changes):
    primary = await Primary.open(directory, apex(**changes), int(time.time()))
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    tcp = socket.socket()
    tcp.bind((HERE, 0))
    udp.bind(tcp.getsockname())
    server = NameServer(primary, terms)
    task = asyncio.create_task(server.run([udp], [tcp]))
    await asyncio.sleep(0)
    try:
        yield Served(primary, server, tcp.getsockname()[1])
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await primary.close()


@pytest.fixture
async def served(tmp_path):
    async with serving(tmp_path) as served:
        yield served


def add_alice(update):
    update.add("alice.servers", 300, "A", "198.51.100.1")
    update.add("_ntske._tcp", 60, "SRV", "0 10 4460 alice.servers")


def whole(zone):
    return {
        (name.to_text(), rdataset.rdtype, rdata.to_text())
        for name, rdataset in zone.iterate_rdatasets()
        for rdata in rdataset
    }


def shadow():
    return dns.zone.Zone(ORIGIN, relativize=False)


async def test_an_update_is_seen_at_once_and_outlives_the_server(tmp_path):
    async with serving(tmp_path) as served:
        first = served.primary.zone.serial
        assert await served.update(add_alice) == dns.rcode.NOERROR
        assert served.primary.zone.serial == first + 1
        assert (await served.ask("alice.servers")).answer[0][0].address == "198.51.100.1"
        keys = (await served.ask("@", "DNSKEY")).answer[0]
        before = whole(await served.transfer(shadow()))
    async with serving(tmp_path) as served:
        assert served.primary.zone.serial == first + 1
        assert (await served.ask("@", "DNSKEY")).answer[0] == keys
        assert whole(await served.transfer(shadow())) == before


async def test_the_same_update_again_is_no_new_serial(served):
    await served.update(add_alice)
    serial = served.primary.zone.serial
    assert await served.update(add_alice) == dns.rcode.NOERROR
    assert served.primary.zone.serial == serial


async def test_an_incremental_transfer_is_the_difference_to_the_letter(served):
    kept = await served.transfer(shadow())
    for number in range(5):
        await served.update(add_alice)
        await served.update(
            lambda u, number=number: u.replace("bob.servers", 300, "A", f"198.51.100.{number}")
        )
    await served.update(lambda u: u.delete("alice.servers"))
    serial = kept.get_soa().serial
    await served.transfer(kept, serial)
    assert kept.get_soa().serial == served.primary.zone.serial
    assert whole(kept) == whole(await served.transfer(shadow()))
    assert served.server.counters["ixfr"] == 1
    await served.transfer(kept, kept.get_soa().serial)
    assert served.server.counters["axfr"] == 2, "who has the newest gets the SOA alone"


async def test_who_is_too_far_behind_gets_the_whole_zone(served):
    kept = await served.transfer(shadow())
    await served.update(add_alice)
    await served.transfer(kept, 12345)
    assert served.server.counters["ixfr-as-axfr"] == 1
    assert whole(kept) == whole(await served.transfer(shadow()))


async def test_an_edge_that_signs_gets_the_zone_without_signatures(served):
    await served.update(add_alice)
    kept = await served.transfer(shadow(), by=EDGE)
    types = {rdataset.rdtype for _, rdataset in kept.iterate_rdatasets()}
    assert not types & records.SIGNER_TYPES
    assert {records.SOA, records.NS, records.A, records.AAAA, records.SRV} == types
    await served.update(lambda u: u.add("bob.servers", 300, "A", "198.51.100.2"))
    await served.update(lambda u: u.delete("alice.servers"))
    await served.transfer(kept, kept.get_soa().serial, by=EDGE)
    assert whole(kept) == whole(await served.transfer(shadow(), by=EDGE))


async def test_a_large_zone_is_transferred_while_it_changes(served):
    def members(first):
        def change(update):
            for number in range(first, first + 200):
                update.add(f"m{number}.servers", 300, "A", f"198.51.{number // 250}.{number % 250}")

        return change

    for first in range(0, 800, 200):
        await served.update(members(first))
    kept = shadow()
    async with asyncio.TaskGroup() as group:
        group.create_task(served.transfer(kept))
        for number in range(20):
            await served.update(lambda u, number=number: u.delete(f"m{number}.servers"))
    await served.transfer(kept, kept.get_soa().serial)
    assert whole(kept) == whole(await served.transfer(shadow()))


@pytest.mark.parametrize("kind", ["AXFR", "IXFR"])
@pytest.mark.parametrize("over", ["tcp", "udp"])
async def test_nothing_is_transferred_without_a_key(served, kind, over):
    query = dns.message.make_query(ORIGIN, kind)
    if kind == "IXFR":
        query.authority.append(dns.rrset.from_text(ORIGIN, 0, "IN", "SOA", ". . 1 0 0 0 0"))
    assert (await getattr(served, over)(query)).rcode() == dns.rcode.REFUSED


async def test_a_whole_zone_is_not_for_udp(served):
    query = dns.message.make_query(ORIGIN, "AXFR")
    query.use_tsig(PLAIN)
    assert (await served.udp(query)).rcode() == dns.rcode.FORMERR


async def test_updates_need_the_right_key(served):
    update = dns.update.UpdateMessage("pool.example.")
    update.add("mallory.servers", 300, "A", "203.0.113.1")
    for over in (served.tcp, served.udp):
        assert (await over(update)).rcode() == dns.rcode.REFUSED
    assert await served.update(add_alice, by=PLAIN) == dns.rcode.REFUSED
    assert (await served.ask("mallory.servers")).rcode() == dns.rcode.NXDOMAIN


async def test_a_key_that_is_unknown_wrong_or_late_is_told_so(served, monkeypatch):
    with pytest.raises(dns.tsig.PeerBadKey):
        await served.update(add_alice, by=STRANGER)
    with pytest.raises(dns.tsig.PeerBadSignature):
        await served.update(add_alice, by=key("publisher", 77))
    update = dns.update.UpdateMessage("pool.example.", keyring=PUBLISHER)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 1000)
    wire = update.to_wire()
    monkeypatch.undo()
    reader, writer = await served.connect()
    writer.write(len(wire).to_bytes(2, "big") + wire)
    size = int.from_bytes(await reader.readexactly(2), "big")
    reply = await reader.readexactly(size)
    writer.close()
    with pytest.raises(dns.tsig.PeerBadTime):
        dns.message.from_wire(reply, keyring=PUBLISHER, request_mac=update.mac)
    assert served.primary.zone.serial == served.primary.zone.serial


async def test_small_updates_may_come_by_udp(served):
    update = dns.update.UpdateMessage("pool.example.", keyring=PUBLISHER)
    add_alice(update)
    assert (await served.udp(update)).rcode() == dns.rcode.NOERROR


async def test_signed_questions_get_signed_answers(served):
    answer = await served.ask("ns1", by=EDGE)
    assert answer.had_tsig
    assert answer.answer[0][0].address == "192.0.2.53"


async def test_answer_sets_are_for_who_gets_the_zone(served):
    def question(by=None):
        query = dns.message.make_query(ORIGIN, records.SETS, want_dnssec=True)
        if by is not None:
            query.use_tsig(by)
        return query

    for by in (EDGE, PUBLISHER):
        (head,) = (await served.tcp(question(by))).answer
        assert Head.decode(records.canonical(head[0])).token == NO_DRAW
    plain = await served.tcp(question())
    assert (plain.rcode(), plain.answer) == (dns.rcode.NOERROR, []), "to all others there is no such type"
    assert any(rrset.rdtype == dns.rdatatype.NSEC for rrset in plain.authority)
    forged = question()
    forged.authority.append(head)
    assert (await served.tcp(forged)).rcode() == dns.rcode.REFUSED


async def test_answer_sets_are_from_who_may_change_the_zone(served):
    def draw(update):
        head = Head(0, 1, "1-a").encode()
        update.add("_draw", 0, dns.rdata.GenericRdata(dns.rdataclass.IN, records.SETS, head))

    assert await served.update(draw, by=EDGE) == dns.rcode.REFUSED
    assert served.primary.draws.token == NO_DRAW
    assert await served.update(draw) == dns.rcode.NOERROR
    assert served.primary.draws.token == "1-a"


async def test_other_operations_are_not_implemented(served):
    query = dns.message.make_query(ORIGIN, "SOA")
    query.set_opcode(dns.opcode.NOTIFY)
    query.use_tsig(PUBLISHER)
    assert (await served.udp(query)).rcode() == dns.rcode.NOTIMP


async def test_many_questions_of_one_connection_are_answered_in_their_order(served):
    reader, writer = await served.connect()
    queries = [dns.message.make_query(ORIGIN, kind) for kind in ("SOA", "NS", "DNSKEY")] * 20
    for query in queries:
        writer.write(query.to_wire(prepend_length=True))
    for query in queries:
        size = int.from_bytes(await reader.readexactly(2), "big")
        assert query.is_response(dns.message.from_wire(await reader.readexactly(size)))
    writer.close()


@pytest.mark.parametrize(
    "octets", [b"\0\1", b"\0\0", b"\0\5hello", b"\xff\xff" + bytes(70_000), b"GET / HTTP/1.1\r\n\r\n"]
)
async def test_garbage_ends_a_connection_and_nothing_else(served, octets):
    reader, writer = await served.connect()
    writer.write(octets)
    writer.write_eof()
    async with asyncio.timeout(DEADLINE):
        with suppress(ConnectionResetError):
            assert await reader.read() == b""
    writer.close()
    assert (await served.ask("ns1")).answer


async def test_idlers_take_no_more_than_their_share(served):
    connections = []
    for _ in range(60):
        with suppress(ConnectionResetError):
            connections.append(await served.connect())
    assert served.server.counters["too-many-of-address"] >= 20
    assert (await served.ask("ns1")).answer, "UDP knows nothing of it"
    for _, writer in connections:
        writer.close()


async def test_one_directory_is_served_once(served, tmp_path):
    with pytest.raises(StoreUnusable, match="another process serves from here"):
        await Primary.open(tmp_path, apex(), int(time.time()))


async def test_the_settings_of_the_apex_hold_after_a_restart(tmp_path):
    async with serving(tmp_path) as served:
        await served.update(lambda u: u.add("@", 3600, "TXT", '"of the operator"'))
    async with serving(tmp_path, negative_ttl=30) as served:
        assert (await served.ask("@", "SOA")).answer[0][0].minimum == 30
        assert (await served.ask("@", "TXT")).answer[0][0].strings == (b"of the operator",)


async def test_a_zone_that_was_lost_begins_anew_with_its_key_and_a_later_serial(tmp_path):
    async with serving(tmp_path) as served:
        await served.update(add_alice)
        keys, serial = (await served.ask("@", "DNSKEY")).answer[0], served.primary.zone.serial
    for file in tmp_path.glob("zone.db*"):
        file.unlink()
    async with serving(tmp_path) as served:
        assert (await served.ask("@", "DNSKEY")).answer[0] == keys
        assert served.primary.zone.serial > serial
        assert (await served.ask("alice.servers")).rcode() == dns.rcode.NXDOMAIN


async def test_a_disk_that_is_full_refuses_an_update_and_changes_nothing(served, monkeypatch):
    def fail(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(served.primary._store, "commit", fail)
    serial = served.primary.zone.serial
    assert await served.update(add_alice) == dns.rcode.SERVFAIL
    assert served.primary.zone.serial == serial
    monkeypatch.undo()
    assert await served.update(add_alice) == dns.rcode.NOERROR


class Listener(asyncio.DatagramProtocol):
    """A secondary that hears, from the `deaf`-th notification on."""

    def __init__(self, deaf):
        self.heard, self.deaf = asyncio.Queue(), deaf

    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, addr):
        message = dns.message.from_wire(data, keyring={PLAIN.name: PLAIN})
        self.heard.put_nowait(message)
        if self.deaf:
            self.deaf -= 1
            return
        self.transport.sendto(dns.message.make_response(message).to_wire(), addr)


@pytest.mark.parametrize("deaf", [0, 1])
async def test_secondaries_are_told_of_changes_until_they_hear(tmp_path, deaf):
    loop = asyncio.get_running_loop()
    transport, listener = await loop.create_datagram_endpoint(lambda: Listener(deaf), (HERE, 0))
    port = transport.get_extra_info("sockname")[1]
    terms = Terms(TERMS.peers, [Secondary(HERE, port, PLAIN)], [], 1000, 1000)
    async with serving(tmp_path, terms) as served, asyncio.timeout(DEADLINE):
        for _ in range(deaf + 1):
            message = await listener.heard.get()
            assert (message.opcode(), message.had_tsig) == (dns.opcode.NOTIFY, True)
        await served.update(add_alice)
        await listener.heard.get()
    transport.close()


# Found by a hostile review


async def roll_in(directory, state=KeyState.MADE):
    """What a command of another process does."""
    store = Store.open(directory, APEX, as_server=False)
    try:
        return store.add_key(state, 1)
    finally:
        store.close()


async def settle(served, number=1):
    for _ in range(number):
        await served.primary.maintain(int(time.time()))


async def test_a_key_that_was_made_while_the_server_was_off_is_published_before_it_signs(tmp_path):
    async with serving(tmp_path) as served:
        (old,) = served.primary.zone.keyring.keys
    made = await roll_in(tmp_path)
    async with serving(tmp_path) as served:
        await settle(served)
        keyring = served.primary.zone.keyring
        assert {key.tag for key in keyring.keys} == {old.tag, made.key.tag}
        assert keyring.active.tag == old.tag


async def test_a_disk_that_is_full_when_a_key_is_published_delays_it_only(served, tmp_path, monkeypatch):
    await settle(served)
    made = await roll_in(tmp_path)

    def fail(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(served.primary._store, "commit", fail)
    with pytest.raises(OSError, match="No space"):
        await settle(served)
    monkeypatch.undo()
    await settle(served)
    assert made.key.tag in {key.tag for key in served.primary.zone.keyring.keys}


async def test_a_ds_is_noted_for_the_active_key_only(served, tmp_path):
    made = await roll_in(tmp_path)
    store = Store.open(tmp_path, APEX, as_server=False)
    assert not store.note_ds(made, 5)
    (active, other) = store.key_rows()
    assert store.note_ds(active, 5)
    assert [row.ds_seen for row in store.key_rows()] == [5, None]
    assert other.key.state is KeyState.MADE
    store.close()


async def test_after_more_than_a_week_without_a_server_nothing_expired_is_shown(tmp_path):
    async with serving(tmp_path) as served:
        await served.update(add_alice)
    now = int(time.time()) + 8 * 86_400
    primary = await Primary.open(tmp_path, apex(), now)
    assert all(signed.expires > now for node in primary.zone.copy().values() for signed in node.values())
    await primary.close()


async def test_a_serial_outlives_the_zone_however_fast_it_went(tmp_path):
    async with serving(tmp_path) as served:
        for number in range(30):
            await served.update(
                lambda u, number=number: u.replace("a.servers", 60, "A", f"198.51.100.{number}")
            )
        serial = served.primary.zone.serial
    for file in tmp_path.glob("zone.db*"):
        file.unlink()
    async with serving(tmp_path) as served:
        assert served.primary.zone.serial > serial


async def test_the_file_of_a_removed_key_is_not_taken_for_a_key(tmp_path):
    async with serving(tmp_path, ttl=1, longest_ttl=1, ds_ttl=1) as served:
        (old,) = served.primary.zone.keyring.keys
        made = await roll_in(tmp_path)
        for seconds in range(0, 40, 4):
            await served.primary.maintain(int(time.time()) + seconds)
            await served.primary.note_ds(int(time.time()) + seconds)
        assert [key.tag for key in served.primary.zone.keyring.keys] == [made.key.tag]
    assert sorted(path.suffix for path in tmp_path.glob("*.pem*")) == [".pem", ".removed"]
    for file in tmp_path.glob("zone.db*"):
        file.unlink()
    async with serving(tmp_path) as served:
        assert [key.tag for key in served.primary.zone.keyring.keys] == [made.key.tag]
        assert old.tag != made.key.tag


async def test_what_is_taken_out_of_the_settings_is_taken_out_of_the_zone(tmp_path):
    async with serving(tmp_path) as served:
        assert (await served.ask("ns1", "AAAA")).answer
    there = Apex(APEX, {"ns1.pool.example.": ["192.0.2.53"]}, 3600, 60, 300, 3600, 0)
    primary = await Primary.open(tmp_path, there, int(time.time()))
    assert records.AAAA not in primary.zone.node(records.to_wire(dns.name.from_text("ns1", ORIGIN)))
    await primary.close()


async def test_peers_without_a_key_hold_up_no_update(served):
    """Each asks for the zone again and again, and never reads the refusals."""
    query = dns.message.make_query(ORIGIN, "AXFR").to_wire(prepend_length=True)
    greedy = [await served.connect() for _ in range(10)]
    for _, writer in greedy:
        writer.write(query * 20_000)
    async with asyncio.timeout(DEADLINE):
        assert await served.update(add_alice) == dns.rcode.NOERROR
    for _, writer in greedy:
        writer.transport.abort()


async def test_who_floods_by_tcp_gets_one_answer_a_turn(served):
    query = dns.message.make_query(ORIGIN, "SOA").to_wire(prepend_length=True)
    _, writer = await served.connect()
    writer.write(query * 2000)
    turns = 0
    while served.server.counters["tcp"] < 500:
        await asyncio.sleep(0)
        turns += 1
    assert turns >= 250
    writer.transport.abort()


async def test_an_unsigned_message_gets_no_more_than_it_was(served):
    query = dns.message.make_query(ORIGIN, "SOA", use_edns=0, pad=468)
    query.set_opcode(dns.opcode.NOTIFY)
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        await loop.sock_sendto(sock, query.to_wire(), (HERE, served.port))
        async with asyncio.timeout(DEADLINE):
            assert len(await loop.sock_recv(sock, 4096)) == 12
