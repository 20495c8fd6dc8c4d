"""What a source may say to an edge, and what its settings may be; the whole of it is in test_subsets."""

import asyncio
from contextlib import asynccontextmanager

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import dns.tsig
import pytest

from poolsvc import edge
from poolsvc.edge import EdgeSettings, EdgeUnusable, Fetched, Inbound, Source, configuration
from poolsvc.nameserver import records, sets
from poolsvc.nameserver.sets import NO_DRAW, Head
from poolsvc.primary import Rejected, Unreachable

POOL = dns.name.from_text("pool.example.")
APEX = records.to_wire(POOL)
SECRET = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
SERVICE, MARKER = "_ntske._tcp.pool.example.", "_draw.pool.example."
HEAD = MARKER, Head(0, 1, "1-a.7").encode()


def wire(text):
    return records.to_wire(dns.name.from_text(text, POOL))


def some(*targets):
    (data,) = sets.encode(APEX, [[b"\0\0\0\x0a\x11\x6c" + wire(one) for one in targets]])
    return SERVICE, data


def rrsets(*found):
    kind = dns.rdatatype.RdataType.make(records.SETS)
    return [
        dns.rrset.from_rdata(owner, 60, dns.rdata.GenericRdata(dns.rdataclass.IN, kind, data))
        for owner, data in found
    ]


def test_sets_come_between_two_heads_in_as_many_messages_as_it_takes():
    inbound = Inbound(APEX, None)
    assert inbound.take(rrsets(HEAD, some("a.servers", "b.servers"))) is None
    fetched = inbound.take(rrsets(some("c.servers"), HEAD))
    assert (fetched.version, fetched.head.draw, fetched.count) == ("1-a.7", "1-a", 2)
    lines = configuration(fetched).decode().splitlines()
    assert lines[1:] == [
        "_ntske._tcp.pool.example.:",
        "  - weight: 1",
        '    SRV: ["0 10 4460 a.servers.pool.example.", "0 10 4460 b.servers.pool.example."]',
        "  - weight: 1",
        '    SRV: ["0 10 4460 c.servers.pool.example."]',
        "_draw.pool.example.:",
        "  - weight: 1",
        '    TXT: "1-a"',
    ]


@pytest.mark.parametrize("token", ["1-a.7", NO_DRAW])
def test_the_head_alone_says_that_there_are_no_others(token):
    fetched = Inbound(APEX, "1-a.7").take(rrsets((MARKER, Head(0, 1, token).encode())))
    assert (fetched.version, fetched.count) == (token, 0)


@pytest.mark.parametrize(
    "found",
    [
        [some("a.servers")],
        [HEAD, (MARKER, Head(0, 1, "2-b.8").encode())],
        [HEAD, (SERVICE, b"\2garbage")],
        [HEAD, (SERVICE, b"\1garbage that goes on")],
        [("pool.example.net.", HEAD[1])],
    ],
)
def test_garbage_is_told(found):
    with pytest.raises(Unreachable):
        Inbound(APEX, None).take(rrsets(*found))


def test_records_of_other_types_are_garbage():
    with pytest.raises(Unreachable):
        Inbound(APEX, None).take([dns.rrset.from_text("pool.example.", 60, "IN", "A", "192.0.2.1")])


def test_there_is_an_end_to_what_is_taken(monkeypatch):
    monkeypatch.setattr(edge, "_MOST_SETS", 2)
    inbound = Inbound(APEX, None)
    inbound.take(rrsets(HEAD, some("a.servers"), some("b.servers")))
    with pytest.raises(Unreachable, match="more than"):
        inbound.take(rrsets(some("c.servers")))


@pytest.mark.parametrize("label", ['a"]', "a b", "a\\\\b", "ä", "a:", "a#"])
def test_a_name_that_means_something_to_knot_is_not_written(label):
    labels = (label.encode(), b"servers", *POOL.labels)
    rdata = b"\0\0\0\x0a\x11\x6c" + records.to_wire(dns.name.Name(labels))
    fetched = Fetched(wire("_draw"), Head(0, 1, "1-a"), {wire("_ntske._tcp"): [(rdata,)]})
    with pytest.raises(Rejected):
        configuration(fetched)


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "edge.secret").write_text(SECRET)

    def write(port=1, **changes):
        values = {
            "pool": "pool.example",
            "source": f"127.0.0.1:{port}",
            "tsig_name": "edge.pool.example",
            "tsig_secret_file": "edge.secret",
            "sets_file": "sets.conf",
        } | changes
        file = tmp_path / "edge.toml"
        file.write_text("".join(f'{name} = "{value}"\n' for name, value in values.items()))
        return EdgeSettings.read(file)

    return write


def test_paths_are_relative_to_the_settings(settings, tmp_path):
    found = settings()
    assert (found.tsig_secret_file, found.sets_file) == (tmp_path / "edge.secret", tmp_path / "sets.conf")
    assert str(found.knot_config) == "/etc/knot/knot.conf"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"pool": "no domain"}, "pool"),
        ({"source": "nowhere"}, "source"),
        ({"unknown": "x"}, "unknown"),
        ({"tsig_secret_file": "none"}, "tsig_secret_file"),
    ],
)
def test_a_wrong_setting_is_named(settings, changes, word):
    with pytest.raises(EdgeUnusable, match=word):
        Source(settings(**changes))


@asynccontextmanager
async def saying(*answers):
    """A source that gives one answer after the other to the first question, then says no more."""

    async def talk(reader, writer):
        size = int.from_bytes(await reader.readexactly(2), "big")
        question = await reader.readexactly(size)
        for answer in answers:
            octets = answer(question)
            writer.write(len(octets).to_bytes(2, "big") + octets)
        await reader.read()
        writer.close()
        await writer.wait_closed()
        ended.set()

    ended = asyncio.Event()
    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
        await asyncio.wait_for(ended.wait(), 5)


def unsigned(rcode, *found):
    def answer(question):
        response = dns.message.Message(int.from_bytes(question[:2], "big"))
        response.flags = dns.flags.QR
        response.set_rcode(rcode)
        response.answer.extend(rrsets(*found))
        return response.to_wire()

    return answer


def signed(*found):
    def answer(question):
        key = dns.tsig.Key("edge.pool.example", SECRET, "hmac-sha256")
        response = dns.message.make_response(dns.message.from_wire(question, keyring=key))
        response.answer.extend(rrsets(*found))
        return response.to_wire()

    return answer


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ([unsigned(dns.rcode.NOERROR, HEAD)], Rejected),
        ([unsigned(dns.rcode.REFUSED)], Rejected),
        ([signed()], Rejected),
        ([signed(HEAD)], Unreachable),
        ([lambda question: b"garbage"], Unreachable),
        ([lambda question: question], Rejected),
        ([lambda question: b""], Unreachable),
        ([], Unreachable),
    ],
    ids=["unsigned", "refused", "empty", "cut off", "garbage", "echo", "nothing", "silent"],
)
async def test_a_source_that_errs_is_told_in_time(settings, monkeypatch, answers, error):
    monkeypatch.setattr(edge, "_MESSAGE", 0.2)
    async with saying(*answers) as port:
        with pytest.raises(error):
            await Source(settings(port)).fetch(None)


async def test_one_signed_message_may_have_it_all(settings):
    async with saying(signed(HEAD, some("a.servers"), HEAD)) as port:
        assert (await Source(settings(port)).fetch(None)).count == 1
