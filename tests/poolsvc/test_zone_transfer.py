"""Transfers from a real Knot, and from primaries that send whatever they like."""

import asyncio
import os
from contextlib import asynccontextmanager
from itertools import chain, cycle
from pathlib import Path

import dns.flags
import dns.message
import dns.query
import dns.rcode
import dns.rdatatype
import dns.rrset
import dns.tsig
import dns.update
import dns.xfr
import dns.zone
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.knot import Knot
from lab.processes import free_port
from poolsvc import zone_transfer
from poolsvc.primary import PublishError, Rejected, Unreachable, primary_errors
from poolsvc.zone import RRset
from poolsvc.zone_transfer import Inbound, NotIncremental, Since, Soa, Source, Whole

KEY = dns.tsig.Key("publisher.pool.example", "c2VjcmV0LW9mLXRoZS1wdWJsaXNoZXI=", "hmac-sha256")
ALICE, BOB = "alice.servers.pool.example.", "bob.servers.pool.example."


def source_of(address="127.0.0.1", port=1, **values):
    known = {
        "zone": "pool.example.",
        "tsig_name": KEY.name.to_text(),
        "tsig_secret": "c2VjcmV0LW9mLXRoZS1wdWJsaXNoZXI=",
        "tsig_algorithm": "hmac-sha256",
        "owners": ("servers.pool.example.", "_ntske._tcp.pool.example."),
        "types": ("A", "AAAA", "CAA", "SRV", "TXT"),
        "timeout": 2.0,
    }
    return Source(address=address, port=port, **known | values)


def soa(serial):
    return f"pool.example. 60 SOA ns1.pool.example. hostmaster.pool.example. {serial} 3600 600 604800 30"


def wires(query, *messages, signed=None):
    return stream(query, messages, signed)


def stream(query, messages, signed=None):
    """A transfer's messages, each of records as text; `signed` says which of them are, all without it."""
    context = None
    for number, lines in enumerate(messages):
        answer = dns.message.make_response(query)
        answer.flags |= dns.flags.AA
        for line in lines:
            owner, ttl, kind, text = line.split(" ", 3)
            rrset = dns.rrset.from_text(owner, int(ttl), "IN", kind, text)
            answer.answer.append(rrset)
        if signed is None or signed[number]:
            answer.use_tsig(KEY)
            answer.request_mac = query.mac
            wire = answer.to_wire(multi=True, tsig_ctx=context)
            context = answer.tsig_ctx
        else:
            answer.keyring = answer.tsig = None
            wire = answer.to_wire()
            if context is not None:
                context.update(wire)
        yield wire


@asynccontextmanager
async def primary(answer, *, ends=True):
    """One that answers a question with the wire messages that `answer(query)` gives."""

    async def serve(reader, writer):
        try:
            octets = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
            query = dns.message.from_wire(octets, keyring={KEY.name: KEY})
            for wire in answer(query):
                writer.write(len(wire).to_bytes(2, "big") + wire)
                await writer.drain()
                await asyncio.sleep(0)
            if not ends:
                await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield source_of(port=server.sockets[0].getsockname()[1])


def rdatas(*texts, ttl=60):
    return RRset(ttl, frozenset(texts))


RECORDS = [
    "_ntske._tcp.pool.example. 60 SRV 0 10 4460 Alice.servers.pool.example.",
    f"{ALICE} 60 A 192.0.2.1",
    "ALICE.servers.pool.example. 60 A 192.0.2.2",
    f"{ALICE} 60 RRSIG A 13 4 60 20300101000000 20200101000000 1 pool.example. AAAA",
    f'{ALICE} 60 CAA 0 issue "ca.example; x=y"',
    "other.pool.example. 60 A 192.0.2.9",
]
WANTED = {
    ("_ntske._tcp.pool.example.", "SRV"): rdatas("0 10 4460 alice.servers.pool.example."),
    (ALICE, "A"): rdatas("192.0.2.1", "192.0.2.2"),
    (ALICE, "CAA"): rdatas('0 issue "ca.example; x=y"'),
}


@pytest.mark.parametrize("size", [1, 3, 100])
async def test_of_a_whole_zone_comes_what_is_wanted_in_however_many_messages(size):
    lines = [soa(7), *RECORDS, soa(7)]
    messages = [lines[start : start + size] for start in range(0, len(lines), size)]
    async with primary(lambda query: wires(query, *messages)) as source:
        assert await zone_transfer.whole(source, 20) == Whole(Soa(7, 30), WANTED)


async def test_a_real_zone_reads_as_the_library_reads_it(tmp_path):
    """With names that have to be written with care."""
    records = [
        "alice.servers A 192.0.2.1",
        "alice.servers AAAA 2001:db8::1",
        r'a\.b.servers CAA 0 issue "\;"',
        r"sp\032ace.servers A 192.0.2.3",
        "UPPER.Servers A 192.0.2.4",
        r'\200\255.servers TXT "te\"xt" "two\255"',
        "_ntske._tcp SRV 0 10 4460 alice.servers",
        "beside A 192.0.2.5",
    ]
    with Knot(tmp_path / "knot", records=records) as knot:
        source = source_of(knot.address, knot.port, tsig_name=knot.tsig_name, tsig_secret=knot.tsig_secret)
        found = await zone_transfer.whole(source, 20)
        key = dns.tsig.Key(knot.tsig_name, knot.tsig_secret, "hmac-sha256")
        zone = dns.zone.Zone("pool.example.", relativize=False)
        query, _ = dns.xfr.make_query(zone, serial=None, keyring=key)
        dns.query.inbound_xfr(knot.address, zone, query, port=knot.port, timeout=5)
    expected = {
        (owner, kind): RRset.of(rdataset.ttl, kind, [rdata.to_text() for rdata in rdataset])
        for name, rdataset in zone.iterate_rdatasets()
        if (owner := name.to_text().lower()).endswith(source.owners)
        and (kind := dns.rdatatype.to_text(rdataset.rdtype)) in source.types
    }
    assert len(expected) == 7
    assert found == Whole(Soa(zone.get_soa().serial, 2), expected)


async def test_what_happened_since_comes_in_steps_without_noise():
    answer = [
        soa(9), soa(7), RECORDS[1], RECORDS[3], soa(8), f"{BOB} 60 A 192.0.2.5", RECORDS[3],
        soa(8), f"{BOB} 60 A 192.0.2.5", soa(9), f"{BOB} 30 A 192.0.2.6", soa(9),
    ]  # fmt: skip
    for cut in range(1, len(answer)):
        async with primary(lambda query, at=cut: wires(query, answer[:at], answer[at:])) as source:
            found = await zone_transfer.since(source, 7)
        assert isinstance(found, Since)
        assert found.soa == Soa(9, 30)
        assert [
            [(one.owner, one.ttl, one.text) for one in side]
            for step in found.steps
            for side in (step.deleted, step.added)
        ] == [
            [(ALICE, 60, "192.0.2.1")],
            [(BOB, 60, "192.0.2.5")],
            [(BOB, 60, "192.0.2.5")],
            [(BOB, 30, "192.0.2.6")],
        ]


async def test_a_zone_that_is_still_at_the_serial_is_no_news():
    async with primary(lambda query: wires(query, [soa(7)])) as source:
        assert await zone_transfer.since(source, 7) == Since(Soa(7, 30), ())


@pytest.mark.parametrize("records", [RECORDS, RECORDS[-1:]])
async def test_a_small_whole_zone_may_come_in_place_of_what_happened(records):
    """As PowerDNS does always; also one in which nothing is wanted."""
    async with primary(lambda query: wires(query, [soa(9)], [*records, soa(9)])) as source:
        found = await zone_transfer.since(source, 7)
    assert found == Whole(Soa(9, 30), WANTED if records is RECORDS else {})


@pytest.mark.parametrize(
    "answer",
    [
        [soa(5)],
        [soa(9), soa(8), soa(9), soa(9)],
        [soa(9), soa(7), soa(8), soa(7), soa(9), soa(9)],
    ],
    ids=["gone back", "another beginning", "a gap"],
)
async def test_what_does_not_lead_on_from_the_serial_needs_the_whole_zone(answer):
    async with primary(lambda query: wires(query, answer)) as source:
        with pytest.raises(NotIncremental):
            await zone_transfer.since(source, 7)


@pytest.mark.parametrize("rcode", [dns.rcode.NOTIMP, dns.rcode.FORMERR])
async def test_a_primary_without_incremental_transfers(rcode):
    async with primary(lambda query: [refusal(query, rcode)]) as source:
        with pytest.raises(NotIncremental):
            await zone_transfer.since(source, 7)


async def test_a_large_whole_zone_in_place_of_what_happened_is_not_read_to_the_end(monkeypatch):
    monkeypatch.setattr(zone_transfer, "INLINE_OCTETS", 20_000)
    sent = 0

    def endless(query):
        nonlocal sent
        texts = ([f"{ALICE} 60 TXT {'x' * 250}"] for _ in range(100_000))
        for wire in stream(query, chain([[soa(9)]], texts)):
            sent += 1
            yield wire

    async with primary(endless) as source:
        with pytest.raises(NotIncremental):
            await zone_transfer.since(source, 7)
    assert sent < 90_000


async def test_more_steps_than_are_held_need_the_whole_zone(monkeypatch):
    monkeypatch.setattr(zone_transfer, "STEPS_OCTETS", 1_000)
    steps = [
        soa(9),
        soa(7),
        soa(9),
        *(f"m{n}.servers.pool.example. 60 A 192.0.2.1" for n in range(99)),
        soa(9),
    ]
    async with primary(lambda query: wires(query, steps)) as source:
        with pytest.raises(NotIncremental):
            await zone_transfer.since(source, 7)


def refusal(query, rcode):
    answer = dns.message.make_response(query)
    answer.set_rcode(rcode)
    answer.use_tsig(KEY)
    answer.request_mac = query.mac
    return answer.to_wire()


GOOD = [[soa(9)], RECORDS, [soa(9)]]


def unsigned(query):
    return wires(query, *GOOD, signed=[False] * 3)


def unsigned_end(query):
    return wires(query, *GOOD, signed=[True, True, False])


def other_key(query):
    query.keyring = None
    first, *rest = wires(query, *GOOD)
    yield first[:-30] + bytes(24) + first[-6:]
    yield from rest


def tampered(query):
    first, second, last = wires(query, *GOOD, signed=[True, False, True])
    yield from (first, second.replace(bytes((192, 0, 2, 1)), bytes((192, 0, 2, 66))), last)


def cut_off(query):
    yield next(iter(wires(query, *GOOD)))


def half_a_message(query):
    first, second, _ = wires(query, *GOOD)
    yield from (first, second[:-40])


def other_question(query):
    query.id ^= 1
    return wires(query, *GOOD)


def garbage(query):
    yield b"\xc0\xff" * 500


def other_end(query):
    return wires(query, GOOD[0], RECORDS, [soa(10)])


def more_than_the_end(query):
    return wires(query, GOOD[0], RECORDS, [soa(9), RECORDS[0]])


def no_soa(query):
    return wires(query, RECORDS)


def foreign_soa(query):
    return wires(query, ["other.example. 60 SOA a. b. 9 1 1 1 1"], [soa(9)])


def refused(query):
    yield refusal(query, dns.rcode.REFUSED)


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (unsigned, Rejected, "no TSIG"),
        (unsigned_end, Rejected, "no TSIG"),
        (other_key, Rejected, "TSIG"),
        (tampered, Rejected, "TSIG"),
        (cut_off, Unreachable, "."),
        (half_a_message, Unreachable, "cut off|too few|garbage"),
        (other_question, Unreachable, "not an answer"),
        (garbage, Unreachable, "not an answer"),
        (other_end, Unreachable, "another SOA"),
        (more_than_the_end, Unreachable, "after the zone's last"),
        (no_soa, Unreachable, "does not begin"),
        (foreign_soa, Unreachable, "another zone"),
        (refused, Rejected, "REFUSED"),
    ],
)
@pytest.mark.parametrize("is_whole", [True, False])
async def test_a_bad_transfer_is_an_error_and_gives_nothing(answer, error, text, is_whole):
    async with primary(answer) as source:
        with pytest.raises(error, match=text):
            await (zone_transfer.whole(source, 20) if is_whole else zone_transfer.since(source, 7))


async def test_messages_between_may_go_unsigned_but_not_too_many():
    def answer(count):
        messages = [[soa(9)], *([record] for record in RECORDS * 17), [soa(9)]]
        chosen = [*messages[: count + 1], messages[-1]]
        signed = [True, *[False] * count, True]
        return lambda query: wires(query, *chosen, signed=signed)

    async with primary(answer(99)) as source:
        assert (await zone_transfer.since(source, 7)).records == WANTED
    async with primary(answer(100)) as source:
        with pytest.raises(Rejected, match="no TSIG"):
            await zone_transfer.since(source, 7)


async def test_a_primary_that_says_nothing_more_is_given_up():
    async with primary(lambda query: wires(query, GOOD[0]), ends=False) as source:
        quick = source_of(port=source.port, timeout=0.3)
        for attempt in (zone_transfer.whole(quick, 20), zone_transfer.since(quick, 7)):
            with pytest.raises(Unreachable):
                await attempt


def children():
    """Processes of this one that transfer."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            status = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            line = (entry / "cmdline").read_bytes()
        except (OSError, IndexError):
            continue
        if int(status[1]) == os.getpid() and status[0] != "Z" and b"poolsvc.zone_transfer" in line:
            found.append(entry.name)
    return found


def drip(query):
    """A transfer that never ends, though something comes all the time."""
    return stream(query, chain(GOOD[:1], ([record] for record in cycle(RECORDS))))


async def test_a_transfer_that_never_ends_is_ended_at_its_deadline_and_its_process_with_it():
    async with primary(drip) as source:
        with pytest.raises(Unreachable, match="within 1 s"):
            await zone_transfer.whole(source, 1)
    assert children() == []


async def test_who_does_not_wait_leaves_no_process_behind():
    asked = asyncio.Event()

    def answer(query):
        asked.set()
        yield from wires(query, GOOD[0])

    async with primary(answer, ends=False) as source:
        waiting = asyncio.create_task(zone_transfer.whole(source, 60))
        await asyncio.wait_for(asked.wait(), 20)
        assert len(children()) == 1
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert children() == []


async def test_nobody_there():
    source = source_of(port=free_port())
    for attempt in (zone_transfer.whole(source, 20), zone_transfer.since(source, 7)):
        with pytest.raises(Unreachable, match="refused"):
            await attempt


def test_the_secret_is_in_no_repr():
    assert "c2VjcmV0" not in repr(source_of())


def inbound_and_wires(since, messages):
    inbound = Inbound(source_of(), since)
    query = dns.message.from_wire(inbound.query[2:], keyring={KEY.name: KEY})
    return inbound, list(wires(query, *messages))


@given(
    st.sampled_from([None, 7]),
    st.lists(st.tuples(st.integers(0, 4_000), st.binary(min_size=1, max_size=4)), max_size=4),
    st.integers(0, 4_000),
)
def test_damaged_messages_are_taken_whole_or_refused_in_this_modules_words(since, damages, cut):
    inbound, octets = inbound_and_wires(since, [[soa(9), soa(7), *RECORDS, soa(9), *RECORDS, soa(9)]])
    if since is None:
        inbound, octets = inbound_and_wires(since, [[soa(9), *RECORDS, soa(9)]])
    wire = bytearray(octets[0])
    for position, some in damages:
        wire[position : position + len(some)] = some
    damaged = bytes(wire[: cut or None])
    try:
        with primary_errors():
            is_last = inbound.take(damaged)
    except (PublishError, NotIncremental):
        assert damaged != octets[0]
    else:
        assert is_last
        assert damaged == octets[0]


@given(st.binary(max_size=600))
def test_names_of_any_octets_end(tail):
    """Pointers to themselves, ahead, in circles; after a header that promises a record."""
    inbound, _ = inbound_and_wires(None, [GOOD[0]])
    identifier = inbound.query[2:4]
    wire = identifier + bytes((0x84, 0, 0, 0, 0, 3, 0, 0, 0, 0)) + tail
    with pytest.raises(PublishError), primary_errors():
        inbound.take(wire)
