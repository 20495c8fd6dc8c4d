"""Targets of what DNS says: validated lookups with a resolver that lies (RFC 4035), and the metadata of servers.

An input of the first is one octet that says what is looked up, then the answers, one a question: how it is put right,
its length (16 bits), its octets. A zone's true key signs what the input wants signed, so that what lies behind
validation is reached too; and only what was signed may ever be returned.
"""

import asyncio
import socket
from functools import cache
from typing import cast

import dns.dnssec
import dns.dnssectypes
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from dns.rdtypes.ANY.DNSKEY import DNSKEY

from fuzz.target import NOW, Plan, Target, hold
from nts_core.metadata import MAX_TEXT, parse
from nts_core.resolve import (
    MAX_ANSWERS,
    MAX_QUESTIONS,
    TRIES,
    NoAnswer,
    ResolveError,
    Resolver,
    TrustAnchors,
    addresses,
    listing,
)

_POOL = "pool.example"
_ZONE = dns.name.from_text(_POOL)
_SECRET = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
_DAY = 86_400
# Long, as a busy machine is no finding: every question is answered.
_TIMEOUT = 60.0
# How an answer is put right.
_FITS = 1  # identifier, question and flags are those of an answer to the question
_SIGNED = 2  # the zone's key signs each RRset of the answer section
_KEYS = 4  # instead: the zone's true keys, signed
_OVER_TCP = 8  # UDP says "truncated", and the answer comes over TCP


@cache
def _key() -> DNSKEY:
    return dns.dnssec.make_dnskey(_SECRET.public_key(), dns.dnssectypes.Algorithm.ED25519, flags=257)


class _Liar(asyncio.DatagramProtocol):
    """Answers each question with the next answer of the plan, then refuses."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._held: bytes | None = None
        self.questions = 0
        self.signed: set[tuple[dns.name.Name, str]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not an instance of DatagramTransport in asyncio of Python 3.11.
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        self.questions += 1
        query = dns.message.from_wire(data)
        answer, over_tcp = self._next(query)
        if over_tcp:
            self._held = answer
            truncated = dns.message.make_response(query)
            truncated.flags |= dns.flags.TC
            answer = truncated.to_wire()
        self._transport.sendto(answer, address)

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A question over TCP gets what was held back for it."""
        await reader.readexactly(int.from_bytes(await reader.readexactly(2)))
        held, self._held = self._held or b"", None
        writer.write(len(held).to_bytes(2) + held)
        writer.close()
        await writer.wait_closed()

    def _next(self, query: dns.message.Message) -> tuple[bytes, bool]:
        if not self._plan:
            refused = dns.message.make_response(query)
            refused.set_rcode(dns.rcode.REFUSED)
            return refused.to_wire(), False
        how = self._plan.octet()
        octets = self._plan.take(self._plan.number())
        if how & _KEYS:
            response = dns.message.make_response(query)
            response.answer.append(dns.rrset.from_rdata_list(_ZONE, 60, [_key()]))
            self._sign(response)
            octets = response.to_wire()
        elif how & _FITS:
            octets = self._fitted(query, octets, is_signed=bool(how & _SIGNED))
        # asyncio sends no empty datagram, and a question without answer would only cost time.
        return octets or b"\0", bool(how & _OVER_TCP)

    def _fitted(self, query: dns.message.Message, octets: bytes, *, is_signed: bool) -> bytes:
        try:
            response = dns.message.from_wire(octets, ignore_trailing=True)
        except (dns.exception.DNSException, ValueError):
            return query.to_wire()[:2] + octets[2:]
        response.id, response.question = query.id, query.question
        response.flags |= dns.flags.QR
        if is_signed:
            self._sign(response)
        try:
            return response.to_wire(max_size=65535)
        except (dns.exception.DNSException, ValueError):
            return query.to_wire()[:2] + octets[2:]

    def _sign(self, response: dns.message.Message) -> None:
        for rrset in list(response.answer):
            if rrset.rdtype == dns.rdatatype.RRSIG or not len(rrset):
                continue
            try:
                signature = dns.dnssec.sign(
                    rrset, _SECRET, _ZONE, _key(), inception=NOW - _DAY, expiration=NOW + _DAY
                )
            except (dns.exception.DNSException, ValueError):
                continue
            covering = dns.rrset.from_rdata_list(rrset.name, rrset.ttl, [signature])
            response.answer.append(covering)
            self.signed |= {(rrset.name, rdata.to_text().lower()) for rdata in rrset}


def _one_port() -> tuple[socket.socket, socket.socket]:
    """A TCP and a UDP socket of the same port; other programs may have one of the two."""
    while True:
        listening = socket.create_server(("127.0.0.1", 0))
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            udp.bind(listening.getsockname())
        except OSError:
            listening.close()
            udp.close()
            continue
        return listening, udp


def _lookups(data: bytes) -> str:
    return asyncio.run(_lookup(data))


async def _lookup(data: bytes) -> str:
    plan = Plan(data)
    what, liar = plan.octet() % 3, _Liar(plan)
    loop = asyncio.get_running_loop()
    listening, udp = _one_port()
    host, port = udp.getsockname()
    server = await asyncio.start_server(liar.connected, sock=listening)
    transport, _ = await loop.create_datagram_endpoint(lambda: liar, sock=udp)
    anchors = TrustAnchors({_ZONE: (_key(),)})
    try:
        return await _ask(what, Resolver(host, port, anchors, _TIMEOUT), liar)
    except NoAnswer as error:
        return error.kind
    except ResolveError as error:
        hold(error.remedy and error.message, "an error has a message and a remedy")
        return error.code
    finally:
        hold(liar.questions <= MAX_QUESTIONS * TRIES, "questions are bounded")
        transport.close()
        server.close()
        await server.wait_closed()


async def _ask(what: int, resolver: Resolver, liar: _Liar) -> str:
    owner = f"alice.servers.{_POOL}"
    match what:
        case 0:
            targets = (await listing(resolver, _POOL, NOW)).targets
            hold(1 <= len(targets) <= MAX_ANSWERS, "targets are few")
            said = {text.split()[-1] for name, text in liar.signed if name != _ZONE}
            hold({f"{target.name}." for target in targets} <= said, "only what was signed is returned")
            return "targets"
        case 1:
            found = await addresses(resolver, owner, NOW)
            hold(1 <= len(found) <= MAX_ANSWERS, "addresses are few")
            hold(
                {(dns.name.from_text(owner), text) for text in found} <= liar.signed, "only signed addresses"
            )
            return "addresses"
        case _:
            answer = await resolver.lookup(f"{owner}.", "CAA", NOW)
            hold(0 <= answer.ttl <= _DAY, "the TTL ends with the signature")
            records = {(dns.name.from_text(owner), rdata.to_text().lower()) for rdata in answer.rdatas}
            hold(records <= liar.signed, "only what was signed is returned")
            return "records"


def _metadata(data: bytes) -> str:
    """Records end with a line, their character-strings with an octet 0."""
    records = [tuple(record.split(b"\0")) for record in data.split(b"\n")]
    found = parse(records)
    if found is None:
        return "nothing"
    text = found.to_text().encode()
    hold(len(text) <= MAX_TEXT, "a record fits one character-string")
    hold(parse([(text,)]) == found, "metadata survives being written")
    return "read"


TARGETS = (
    Target(
        "dns",
        "Only ResolveError, with a remedy; questions are bounded; only what the zone's key signed is returned.",
        _lookups,
        frozenset(
            {
                *(
                    "targets",
                    "addresses",
                    "records",
                    "nodata",
                    "nxdomain",
                    "no-srv",
                    "no-service",
                    "no-address",
                ),
                *("bogus", "cname", "unsigned", "resolver-failed", "resolver-no-dnssec"),
            }
        ),
        tokens=(
            b"\xc0\x0c",
            b"\x05alice\x07servers",
            b"\x00\x2e\x00\x01",
            b"\x00\x30\x00\x01",
            b"\x00\x21\x00\x01",
        ),
    ),
    Target(
        "metadata",
        "No exception; what is read fits one character-string and survives being written.",
        _metadata,
        frozenset({"nothing", "read"}),
        tokens=(b"v=truechimer1", b" op=abcdefghij234", b" as=64500", b" cc=DE", b",", b"\n", b"\0"),
    ),
)
