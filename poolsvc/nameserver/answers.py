"""What the zone answers to a question (RFC 1034 section 4.3.2, RFC 4035 section 3.1), ready to be sent. Pure.

An answer is made once and kept until its name changes: everything after the question, with pointers into the question,
which are right for every client that asks the same. Answers are minimal (nothing in the additional section, no NS in
the authority section), and to ANY there is one RRset (RFC 8482). In place of an RRset of the zone there may be several that
were drawn (`draws`), of which each client gets one.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import dns.rcode

from poolsvc.nameserver import records
from poolsvc.nameserver.records import Key, Name, Signed
from poolsvc.nameserver.zone import Edition, Node, SignedZone

_QNAME = 12  # where the question's name begins in every message
_OWNER = b"\xc0\x0c"
# Proofs that a name does not exist which are kept; there are hardly more gaps than names.
_MOST_PROOFS = 50_000
# Answers of one name that are kept; a question of any type gets an alias.
_MOST_TYPES = 64


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """`head` has the flags of an answer without the question's own, and the rcode; `counts` those of answer and authority.

    `kind` is what rate limiting counts by: what a flood of questions gets again and again.
    """

    head: int
    counts: bytes
    body: bytes
    kind: bytes


AUTHORITATIVE = 0x8400  # QR, AA


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What a question gets: one of these, each as likely; `longest` is the octets of the longest body."""

    answers: tuple[Answer, ...]
    longest: int

    @classmethod
    def of(cls, *answers: Answer) -> "Found":
        return cls(answers, max(len(answer.body) for answer in answers))


class Several(NamedTuple):
    """The RRsets of which each client gets one, signed, and as answers: without signatures, and with them."""

    signed: tuple[Signed, ...]
    plain: tuple[Answer, ...]
    proved: tuple[Answer, ...]


class Answers:
    """The answers of one zone; told of each edition that the zone adopts."""

    def __init__(self, zone: SignedZone) -> None:
        self.edition = 0  # another number for each
        self._zone = zone
        self._of_names: dict[Name, dict[tuple[int, bool], Found]] = {}
        self._drawn: Mapping[Key, Several] = {}
        # What proves an absence has the SOA in it, and so lasts for one edition.
        self._no_data: dict[tuple[Name, bool], Found] = {}
        self._proofs: dict[tuple[Name, Name, int, bool], Found] = {}

    def renew(self, edition: Edition) -> None:
        """Forget what an edition, which was adopted, has changed."""
        self.edition += 1
        self._no_data.clear()
        self._proofs.clear()
        for name, _ in edition.changed:
            self._of_names.pop(name, None)

    def draw(self, drawn: Mapping[Key, Several]) -> None:
        """Answer from these from now on wherever the zone has an RRset of that owner and type."""
        self.edition += 1
        for name, _ in (*self._drawn, *drawn):
            self._of_names.pop(name, None)
        self._drawn = drawn

    def find(self, name: Name, rdtype: int, *, dnssec: bool) -> Found | None:
        """The answer for a name in lower case; None when it is not in this zone."""
        kept = self._of_names.get(name)
        if kept is not None and (found := kept.get((rdtype, dnssec))) is not None:
            return found
        return self._make(name, rdtype, dnssec=dnssec)

    def _make(self, name: Name, rdtype: int, *, dnssec: bool) -> Found | None:
        if not records.is_below(name, self._zone.apex):
            return None
        node = self._zone.node(name)
        if node is None:
            return self._no_such_name(name, dnssec=dnssec)
        found = self._shown(node, rdtype)
        if found is None:
            return self._no_such_data(name, node, dnssec=dnssec)
        kept = self._of_names.setdefault(name, {})
        if len(kept) >= _MOST_TYPES:
            kept.clear()
        made = kept[rdtype, dnssec] = self._found(name, *found, dnssec=dnssec, rdtype=rdtype)
        return made

    def _found(self, name: Name, kind: int, signed: Signed, *, dnssec: bool, rdtype: int) -> Found:
        several = self._drawn.get((name, kind))
        if rdtype == records.RRSIG:
            signed = signed if several is None else several.signed[0]
            lines = list(records.records(_OWNER, kind, signed))[len(signed.rrset.rdatas) :]
            return Found.of(Answer(AUTHORITATIVE, _counts(len(lines), 0), b"".join(lines), name))
        if several is not None:
            return Found.of(*(several.proved if dnssec else several.plain))
        return Found.of(positive(name, kind, signed, dnssec=dnssec))

    @staticmethod
    def _shown(node: Node, rdtype: int) -> tuple[int, Signed] | None:
        """The RRset that a question of a type gets."""
        kinds = sorted(node) if rdtype in (records.ANY, records.RRSIG) else (rdtype, records.CNAME)
        return next(((kind, node[kind]) for kind in kinds if kind in node), None)

    def _no_such_data(self, name: Name, node: Node, *, dnssec: bool) -> Found:
        answer = self._no_data.get((name, dnssec))
        if answer is None:
            # A name that has only names under it owns no NSEC: the one before it ends under it.
            owners = [name if node else self._zone.covering(name)]
            answer = Found.of(self._negative(name, owners, dns.rcode.NOERROR, dnssec=dnssec))
            self._no_data[name, dnssec] = answer
        return answer

    def _no_such_name(self, name: Name, *, dnssec: bool) -> Found:
        wildcard = b"\x01*" + self._zone.encloser(name)
        owners = self._zone.covering(name), self._zone.covering(wildcard)
        key = (*owners, len(name), dnssec)
        if (found := self._proofs.get(key)) is not None:
            return found
        if len(self._proofs) >= _MOST_PROOFS:
            self._proofs.clear()
        answer = self._negative(name, dict.fromkeys(owners), dns.rcode.NXDOMAIN, dnssec=dnssec)
        made = self._proofs[key] = Found.of(answer)
        return made

    def _negative(
        self, name: Name, owners: Iterable[Name], rcode: dns.rcode.Rcode, *, dnssec: bool
    ) -> Answer:
        """The SOA (RFC 2308 section 3) and the NSEC of `owners`."""
        apex, soa = self._zone.apex, self._zone.soa
        pointer = (0xC000 | _QNAME + len(name) - len(apex)).to_bytes(2, "big")
        minimum = min(soa.rrset.ttl, records.soa_minimum(soa.rrset.rdatas[0]))
        lines = [records.record(pointer, records.SOA, minimum, soa.rrset.rdatas[0])]
        if dnssec:
            # The signature's own TTL is the SOA's; what is sent of it must not outlive the rest.
            lines += [records.record(pointer, records.RRSIG, minimum, one) for one in soa.signatures]
            for owner in owners:
                node = self._zone.node(owner)
                assert node is not None
                lines += records.records(owner[: -len(apex)] + pointer, records.NSEC, node[records.NSEC])
        return Answer(AUTHORITATIVE | rcode, _counts(0, len(lines)), b"".join(lines), b"\0" + apex)


def positive(name: Name, rdtype: int, signed: Signed, *, dnssec: bool) -> Answer:
    """An RRset as the answer to a question for it."""
    lines = list(_lines(rdtype, signed, dnssec=dnssec))
    return Answer(AUTHORITATIVE, _counts(len(lines), 0), b"".join(lines), name)


def _lines(rdtype: int, signed: Signed, *, dnssec: bool) -> Iterator[bytes]:
    lines = records.records(_OWNER, rdtype, signed)
    return lines if dnssec else (next(lines) for _ in signed.rrset.rdatas)


def _counts(answer: int, authority: int) -> bytes:
    return answer.to_bytes(2, "big") + authority.to_bytes(2, "big")
