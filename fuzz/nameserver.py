"""Targets of the embedded DNS server: questions by UDP (RFC 1035, 6891, 7873), updates (RFC 2136) of a true key.

Updates may have parts of a draw of answer sets, which edges get from the server as answers of their own.
"""

import struct
from collections.abc import Generator, Mapping
from functools import cache
from random import Random
from typing import TypeVar

import dns.exception
import dns.message
import dns.name
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import dns.update
from cryptography.hazmat.primitives.asymmetric import ec

from fuzz.target import NOW, Drawn, Target, hold
from poolsvc.edge import Inbound, configuration
from poolsvc.nameserver import records
from poolsvc.nameserver.answers import Answers
from poolsvc.nameserver.draws import Draws
from poolsvc.nameserver.keys import Keyring, KeyState, SigningKey
from poolsvc.nameserver.records import Key, RRset
from poolsvc.nameserver.responder import UDP_PAYLOAD, Other, Responder
from poolsvc.nameserver.sets import NO_DRAW, target
from poolsvc.nameserver.updates import Refused, evaluate
from poolsvc.nameserver.zone import SignedZone
from poolsvc.primary import Rejected, Unreachable

_ZONE = dns.name.from_text("pool.example.")
_APEX = records.to_wire(_ZONE)
_ADDRESS = b"\xc0\0\2\1"
_LEAST = 512
_T = TypeVar("_T")


def _run(steps: Generator[None, None, _T]) -> _T:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: _T = end.value
            return result


def _rrset(kind: str, *texts: str) -> RRset:
    found = (dns.rdata.from_text("IN", kind, text, origin=_ZONE, relativize=False) for text in texts)
    return RRset.of(300, map(records.canonical, found))


def _seed() -> Mapping[Key, RRset]:
    texts = {
        "@ SOA": ("ns1 hostmaster 1 3600 600 86400 60",),
        "@ NS": ("ns1",),
        "ns1 A": ("192.0.2.53",),
        "servers CAA": ('0 issue ";"',),
        "alice.servers A": ("198.51.100.1",),
        "_ntske._tcp SRV": ("0 10 4460 alice.servers",),
        "big TXT": tuple(f'"{number:0200}"' for number in range(8)),
        "www CNAME": ("registry.example.net.",),
    }
    seed = {}
    for line, rdatas in texts.items():
        owner, kind = line.split()
        key = records.to_wire(dns.name.from_text(owner, _ZONE)), int(dns.rdatatype.from_text(kind))
        seed[key] = _rrset(kind, *rdatas)
    return seed


@cache
def _signed() -> SignedZone:
    key = SigningKey.of(ec.derive_private_key(2**200 + 1, ec.SECP256R1()), KeyState.ACTIVE)
    zone = SignedZone(Keyring(_APEX, [key]), {}, Random(1), NOW)
    edition = _run(zone.edit(_seed(), NOW))
    assert edition is not None
    zone.adopt(edition)
    return zone


def _fresh() -> SignedZone:
    """The same zone again, for an update of its own."""
    zone = _signed()
    content = {(owner, kind): signed for owner, node in zone.copy().items() for kind, signed in node.items()}
    return SignedZone(zone.keyring, content, Random(1), NOW)


def _question(data: bytes) -> str:
    """The octets are a datagram."""
    responder = Responder(
        Answers(_signed()),
        Drawn(b"responder"),
        responses_per_second=1,
        responses_at_once=1,
        uniform=Random(1).random,
    )
    try:
        reply = responder.over_udp(data, _ADDRESS, NOW, 0)
    except Other:
        return "other"
    if reply is None:
        hold(len(data) < 12 or data[2] & 0x80, "only answers and what is no message are ignored")
        return "ignored"
    limited = responder.over_udp(data, _ADDRESS, NOW, 0), responder.over_udp(data, _ADDRESS, NOW, 0)
    has_cookie = responder.counters["limited"] == 0
    hold(has_cookie or None in limited, "of two over the limit one gets nothing")
    for each in limited:
        hold(
            has_cookie or each is None or len(each) <= max(len(data) + 16, 12),
            "what is over the limit gains nothing",
        )
    hold(reply[:2] == data[:2] and reply[2] & 0x80, "a reply is one to this message")
    if len(reply) == 12:
        return "malformed"
    message = dns.message.from_wire(reply)
    hold(not message.errors, "a reply can be read")
    hold(len(reply) <= (_LEAST if message.edns < 0 else UDP_PAYLOAD), "a reply fits what was asked for")
    end = 12 + _length(reply)
    hold(reply[12:end] == data[12:end], "the question comes back as it was")
    for rrset in message.answer:
        node = _signed().node(records.to_wire(rrset.name)) or {}
        kinds = {int(rrset.rdtype), int(rrset.covers)}
        hold(kinds & set(node), "only what is in the zone is answered")
    if message.flags & dns.flags.TC:
        hold(not message.answer, "what is cut has nothing in it")
        return "truncated"
    if message.rcode() == dns.rcode.NOERROR:
        return "answer" if message.answer else "no-data"
    hold(not message.answer, "a refusal has no answer")
    return dns.rcode.to_text(message.rcode()).lower()


def _length(reply: bytes) -> int:
    """Of the question."""
    at = 12
    while reply[at]:
        at += 1 + reply[at]
    return at + 5 - 12


def _update_of(data: bytes) -> dns.update.UpdateMessage | str:
    """The update that the octets are, or what became of them."""
    try:
        message = dns.message.from_wire(data, one_rr_per_rrset=True)
    except (dns.exception.DNSException, ValueError, struct.error):
        return "unread"
    return message if isinstance(message, dns.update.UpdateMessage) else "no-update"


def _update(data: bytes) -> str:
    """The octets are an update; whoever has the key may send what they like."""
    message = _update_of(data)
    if isinstance(message, str):
        return message
    zone = _fresh()
    try:
        changed = evaluate(message, zone)
    except Refused as refusal:
        return dns.rcode.to_text(refusal.rcode).lower()
    edition = _run(zone.edit(changed, NOW))
    if edition is None:
        return "nothing"
    zone.adopt(edition)
    content = zone.copy()
    apex = content[_APEX]
    hold({records.SOA, records.NS, records.DNSKEY} <= set(apex), "the apex keeps what it needs")
    hold(zone.serial != _signed().serial, "another zone has another serial")
    hold(not {kind for _, kind in changed} & records.SIGNER_TYPES, "nobody signs but us")
    at, seen = _APEX, 0
    while True:
        node = content[at]
        hold(records.CNAME not in node or set(node) == {records.CNAME, records.NSEC}, "an alias is alone")
        (nsec,) = node[records.NSEC].rrset.rdatas
        at, seen = records.to_wire(dns.name.from_wire(nsec, 0)[0]), seen + 1
        if at == _APEX:
            break
    hold(seen == len(content), "NSEC is one ring through all names")
    return "made"


def _draw(data: bytes) -> str:
    """The octets are an update with answer sets."""
    message = _update_of(data)
    if isinstance(message, str):
        return message
    zone = _fresh()
    answers = Answers(zone)
    draws = Draws(zone, answers, NOW)
    try:
        part = draws.read(message)
        if part is None:
            return "no-sets"
        _run(draws.take(part, NOW))
    except Refused as refusal:
        return dns.rcode.to_text(refusal.rcode).lower()
    hold(zone.copy() == _signed().copy(), "sets are no zone data")
    if draws.token == NO_DRAW:
        hold(part.head.count > 1, "the last part puts the draw in place")
        return "part"
    inbound, listed = Inbound(_APEX, None), dns.message.Message()
    for record in draws.listed(None):
        owner, _ = dns.name.from_wire(record, 0)
        rdata = record[len(records.to_wire(owner)) + 10 :]
        generic = dns.rdata.GenericRdata(dns.rdataclass.IN, dns.rdatatype.RdataType.make(records.SETS), rdata)
        listed.answer.append(dns.rrset.from_rdata(owner, 0, generic))
    fetched = inbound.take(listed.answer)
    hold(fetched is not None and fetched.head.draw == part.head.draw, "an edge gets the draw")
    assert fetched is not None
    hold(fetched.count == len(draws), "an edge gets all sets")
    for owner_of, found in fetched.found.items():
        hold(records.is_below(owner_of, _APEX), "sets are in the zone")
        for rdata in {rdata for rdatas in found for rdata in rdatas}:
            node = zone.node(target(rdata)) or {}
            hold({records.A, records.AAAA} & set(node), "who is named has an address")
    return "in-place"


def _edge(data: bytes) -> str:
    """The octets are a message of the source's answer."""
    try:
        message = dns.message.from_wire(data, one_rr_per_rrset=True)
    except (dns.exception.DNSException, ValueError, struct.error):
        return "unread"
    try:
        fetched = Inbound(_APEX, "1-a.1").take(message.answer)
        if fetched is None:
            return "more"
        lines = configuration(fetched).decode().splitlines()
    except Rejected:
        return "rejected"
    except Unreachable:
        return "garbage"
    hold(sum("SRV: [" in line for line in lines) == fetched.count, "each set is one line")
    hold(sum("TXT: " in line for line in lines) == 1, "there is one marker")
    return "sets" if fetched.found else "no-sets"


TARGETS = (
    Target(
        "dns-question",
        "A reply fits, repeats the question, and has only what is in the zone; over the limit nobody gains by asking.",
        _question,
        frozenset(
            {
                *("answer", "no-data", "nxdomain", "refused", "truncated", "badvers", "malformed"),
                *("ignored", "other"),
            }
        ),
        longest=1024,
        tokens=(
            b"\4pool\7example\0",
            b"\5alice\7servers",
            b"\6_ntske\4_tcp",
            b"\0\0\x29\x04\xd0\0\0\x80\0\0\0",
            b"\0\x0a\0\x08",
        ),
    ),
    Target(
        "dns-update",
        "An update is refused with a code, or made as a whole; then the zone is still whole: apex, aliases, NSEC.",
        _update,
        frozenset(
            {
                *(
                    "made",
                    "nothing",
                    "refused",
                    "nxrrset",
                    "yxrrset",
                    "nxdomain",
                    "yxdomain",
                    "notzone",
                    "notauth",
                ),
                *("formerr", "unread", "no-update"),
            }
        ),
        longest=2048,
        tokens=(b"\4pool\7example\0", b"\5alice\7servers", b"\x28\0", b"\0\xfe", b"\0\xff", b"\xc0\x0c"),
    ),
    Target(
        "dns-sets",
        "Sets are refused with a code or in place as a whole, name only who has an address, and reach an edge; no zone data.",
        _draw,
        frozenset(
            {
                *("in-place", "part", "no-sets", "formerr", "nxdomain", "nxrrset", "notzone"),
                *("unread", "no-update"),
            }
        ),
        longest=2048,
        tokens=(b"\xff\x78\0\1", b"\x0dalice\7servers", b"\0\0\x0a\x11\x6c", b"\0\0\0\0\1"),
    ),
    Target(
        "dns-edge",
        "What a source says is read or is garbage, and becomes a line of Knot's file for each set, whatever names it has.",
        _edge,
        frozenset({"sets", "no-sets", "more", "garbage", "rejected", "unread"}),
        longest=2048,
        tokens=(b"\xff\x78\0\1", b"\x0dalice\7servers", b"\0\0\x0a\x11\x6c", b"\0\0\0\0\1"),
    ),
)
