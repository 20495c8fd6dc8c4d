"""What is more than a plain question: updates, transfers (RFC 5936, RFC 1995), and everything that is signed.

Without a key that the settings name nothing of it is done. What a key may do is in its `Peer`.
"""

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from enum import StrEnum

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.tsig
import dns.update
import structlog

from poolsvc.nameserver import records, sets, tsig
from poolsvc.nameserver.primary import Primary
from poolsvc.nameserver.responder import UDP_PAYLOAD, Malformed, Other, Responder
from poolsvc.nameserver.store import Step
from poolsvc.nameserver.updates import Refused
from poolsvc.nameserver.zone import Node

_log = structlog.get_logger()
# Zones on their way at one time, if there are no more keys.
_TRANSFERS = 8
# Octets of one message of a transfer, its signature not counted; and of all records of an incremental one.
_MESSAGE = 16_000
_MOST_INCREMENTAL = 8 * 1024 * 1024
# For the largest signature, by a key with a long name.
_TSIG_ROOM = 400


class Right(StrEnum):
    """What a key may do."""

    UPDATE = "update"
    TRANSFER = "transfer"


@dataclass(frozen=True, slots=True)
class Peer:
    """Who has a key. One that `signs` the zone itself gets it without what our signing adds."""

    key: dns.tsig.Key
    rights: frozenset[Right]
    signs: bool = False


class Exchange:
    """`clock` tells Unix time."""

    def __init__(
        self, primary: Primary, responder: Responder, peers: Iterable[Peer], clock: Callable[[], float]
    ) -> None:
        self._primary = primary
        self._responder = responder
        self._peers = {peer.key.name: peer for peer in peers}
        self._keys: Mapping[dns.name.Name, dns.tsig.Key] = {
            name: peer.key for name, peer in self._peers.items()
        }
        self._clock = clock
        self._transfers = asyncio.Semaphore(max(_TRANSFERS, len(self._peers)))

    async def replies(
        self, wire: bytes, address: bytes, *, over_udp: bool = False
    ) -> AsyncGenerator[bytes, None]:
        """The messages that answer one; none where it is no message at all. Raises Malformed."""
        try:
            message, signer = tsig.read(wire, self._keys, self._now)
        except tsig.Unproved as error:
            self._count("tsig-" + str(error))
            yield error.reply
            return
        except dns.exception.DNSException:
            raise Malformed from None
        if message.flags & dns.flags.QR:
            raise Malformed
        if signer is None:
            self._count("unsigned")
            yield self._responder.refuse(wire, dns.rcode.REFUSED)
            return
        peer = self._peers[signer.key.name]
        async with aclosing(self._answer(message, peer, address, over_udp=over_udp)) as answers:
            async for reply, is_one_of_many in answers:
                yield signer.sign(reply, self._now, is_one_of_many=is_one_of_many)

    @property
    def _now(self) -> int:
        return int(self._clock())

    def _count(self, what: str) -> None:
        self._responder.counters[what] += 1

    async def _answer(
        self, message: dns.message.Message, peer: Peer, address: bytes, *, over_udp: bool
    ) -> AsyncGenerator[tuple[bytes, bool], None]:
        """Replies without their signatures, and whether each is one of many."""
        if isinstance(message, dns.update.UpdateMessage):
            yield await self._update(message, peer), False
        elif message.opcode() != dns.opcode.QUERY:
            yield self._refuse(message, dns.rcode.NOTIMP), False
        elif len(message.question) == 1 and message.question[0].rdtype in (records.AXFR, records.IXFR):
            if Right.TRANSFER not in peer.rights:
                yield self._refuse(message, dns.rcode.REFUSED), False
                return
            async with (
                self._transfers,
                aclosing(self._transfer(message, peer, over_udp=over_udp)) as replies,
            ):
                async for reply in replies:
                    yield reply, True
        elif len(message.question) == 1 and message.question[0].rdtype == records.SETS and not over_udp:
            for reply in self._sets(message, peer):
                yield reply, True
        else:
            yield self._question(message, address, over_udp=over_udp), False

    def _question(self, message: dns.message.Message, address: bytes, *, over_udp: bool) -> bytes:
        message.tsig = None
        limit = UDP_PAYLOAD - _TSIG_ROOM if over_udp else 65_535 - _TSIG_ROOM
        try:
            return self._responder.reply(message.to_wire(), address, self._now, limit)
        except (Malformed, Other):
            return self._refuse(message, dns.rcode.FORMERR)

    async def _update(self, message: dns.update.UpdateMessage, peer: Peer) -> bytes:
        if Right.UPDATE not in peer.rights:
            return self._refuse(message, dns.rcode.REFUSED)
        rcode = dns.rcode.NOERROR
        try:
            await self._primary.update(message, self._now)
        except Refused as refusal:
            rcode = refusal.rcode
            self._count("update-refused")
            _log.info("update_refused", rcode=dns.rcode.to_text(rcode), reason=str(refusal))
        except (OSError, sqlite3.Error) as error:
            rcode = dns.rcode.SERVFAIL
            self._count("update-failed")
            _log.error("update_not_kept", error=str(error))
        else:
            self._count("update")
        return self._refuse(message, rcode)

    def _refuse(self, message: dns.message.Message, rcode: dns.rcode.Rcode) -> bytes:
        """A reply with nothing in it but the question."""
        payload = min(message.payload, UDP_PAYLOAD) if message.edns >= 0 else UDP_PAYLOAD
        reply = dns.message.make_response(message, our_payload=payload, pad=0)
        reply.tsig = None  # the signer's to add
        reply.set_rcode(rcode)
        return reply.to_wire()

    async def _transfer(
        self, message: dns.message.Message, peer: Peer, *, over_udp: bool
    ) -> AsyncGenerator[bytes, None]:
        question = message.question[0]
        primary = self._primary
        if records.to_wire(question.name) != primary.zone.apex or question.rdclass != dns.rdataclass.IN:
            yield self._refuse(message, dns.rcode.NOTAUTH)
            return
        head = _Head.of(message)
        if question.rdtype == records.AXFR:
            if over_udp:
                yield self._refuse(message, dns.rcode.FORMERR)
                return
            listed = self._whole(peer)
        else:
            serial = _known_serial(message)
            if serial is None:
                yield self._refuse(message, dns.rcode.FORMERR)
                return
            if serial == primary.zone.serial or over_udp:  # the SOA alone asks to come again by TCP
                listed = iter((_soa(primary),))
            else:
                steps = await primary.steps(serial, _MOST_INCREMENTAL)
                self._count("ixfr" if steps else "ixfr-as-axfr")
                listed = self._difference(peer, steps) if steps else self._whole(peer)
        for reply in head.messages(listed):
            yield reply

    def _sets(self, message: dns.message.Message, peer: Peer) -> Iterator[bytes]:
        """The answer sets, for an edge that answers with them; the head of those that it has is in its authority section."""
        if Right.TRANSFER not in peer.rights:
            yield self._refuse(message, dns.rcode.REFUSED)
            return
        self._count("sets")
        yield from _Head.of(message).messages(self._primary.draws.listed(_known_draw(message)))

    def _whole(self, peer: Peer) -> Iterator[bytes]:
        self._count("axfr")
        zone = self._primary.zone
        return _whole(zone.apex, zone.copy(), _soa(self._primary), signs=peer.signs)

    @staticmethod
    def _difference(peer: Peer, steps: list[Step]) -> Iterator[bytes]:
        newest = steps[-1].soa_after
        yield newest
        for step in steps:
            yield step.soa_before
            yield from _shown(step.deleted, signs=peer.signs)
            yield step.soa_after
            yield from _shown(step.added, signs=peer.signs)
        yield newest


def _whole(apex: bytes, content: Mapping[bytes, Node], soa: bytes, *, signs: bool) -> Iterator[bytes]:
    yield soa
    for owner, node in content.items():
        for rdtype, signed in node.items():
            is_soa = owner == apex and rdtype == records.SOA
            if is_soa and not signs:
                yield from list(records.records(owner, rdtype, signed))[1:]
            elif signs and not is_soa and rdtype not in records.SIGNER_TYPES:
                yield from (
                    records.record(owner, rdtype, signed.rrset.ttl, one) for one in signed.rrset.rdatas
                )
            elif not signs:
                yield from records.records(owner, rdtype, signed)
    yield soa


def _shown(lines: tuple[bytes, ...], *, signs: bool) -> Iterable[bytes]:
    if not signs:
        return lines
    return (line for line in lines if records.type_of(line) not in records.SIGNER_TYPES)


def _soa(primary: Primary) -> bytes:
    rrset = primary.zone.soa.rrset
    return records.record(primary.zone.apex, records.SOA, rrset.ttl, rrset.rdatas[0])


def _known_serial(message: dns.message.Message) -> int | None:
    """The serial that the asker of an IXFR has."""
    for rrset in message.authority:
        if rrset.rdtype == dns.rdatatype.SOA and rrset.name == message.question[0].name:
            serial: int = rrset[0].serial
            return serial
    return None


def _known_draw(message: dns.message.Message) -> str | None:
    """The token of the answer sets that an edge has."""
    for rrset in message.authority:
        if rrset.rdtype == records.SETS:
            with suppress(sets.Malformed):
                return sets.Head.decode(records.canonical(rrset[0])).token
    return None


@dataclass(frozen=True, slots=True)
class _Head:
    """How each message of a transfer begins; the first one repeats the question."""

    identifier: bytes
    question: bytes

    @classmethod
    def of(cls, message: dns.message.Message) -> "_Head":
        asked = message.question[0]
        name = asked.name.to_wire()
        assert name is not None
        question = name + int(asked.rdtype).to_bytes(2, "big") + b"\0\1"
        return cls(message.id.to_bytes(2, "big"), question)

    def messages(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        question, held, octets = self.question, list[bytes](), 0
        for line in lines:
            if held and octets + len(line) > _MESSAGE:
                yield self._message(question, held)
                question, held, octets = b"", [], 0
            held.append(line)
            octets += len(line)
        yield self._message(question, held)

    def _message(self, question: bytes, lines: list[bytes]) -> bytes:
        asked = b"\0\1" if question else b"\0\0"
        counts = asked + len(lines).to_bytes(2, "big") + bytes(4)
        return b"".join((self.identifier, b"\x84\0", counts, question, *lines))
