"""Which of many answers a question gets: the answer sets that the publisher drew, checked, signed, and put in place. Pure.

Rules:

1. A draw comes in parts (`sets`), each checked as a whole and signed as it comes, and is in place with its last part: all
   sets of all owners at once, in place of those before. A part that is not the next one of its draw is refused.
2. A set names only targets that have an address in the zone. The edition of the zone that takes a target's last address
   takes the sets that name it at the same moment, those also that are not in place yet.
3. What was drawn answers only where the zone has an RRset of that owner and type, so that NSEC says what is true. An owner
   without sets answers with the zone's RRset.
4. Signatures are the zone's active key's, and are renewed as the zone's are; a set that comes again keeps its own.

Nothing of it is on the disk: there is another draw within a minute, and until then the zone's own RRset answers.
"""

from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import dns.rcode
import dns.rdataclass
import dns.rrset
import dns.update

from poolsvc.nameserver import records, sets
from poolsvc.nameserver.answers import Answer, Answers, Several, positive
from poolsvc.nameserver.keys import REFRESH, VALID_AFTER
from poolsvc.nameserver.records import Key, Name, RRset, Signed
from poolsvc.nameserver.sets import Head, Malformed
from poolsvc.nameserver.updates import Refused
from poolsvc.nameserver.zone import Edition, SignedZone

# Of one draw.
_MOST_SETS, _MOST_OWNERS = 32_768, 1_024
# What ends so much sooner than the first to be renewed is renewed with it, seconds.
_TOGETHER = 3_600

_Lot = tuple[Signed, Answer, Answer]
"""A set, and the answers to those who ask without DNSSEC and with it."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one message says of a draw: sets by their owner."""

    marker: Name
    ttl: int
    head: Head
    found: Mapping[Name, Sequence[RRset]]


@dataclass(slots=True)
class _Staged:
    """A draw of which parts are missing yet."""

    first: Part
    parts: int = 0
    lots: dict[Key, list[_Lot]] = field(default_factory=dict)
    held: dict[Key, Mapping[RRset, _Lot]] = field(
        default_factory=dict
    )  # of the draw before, signed and not due

    def is_next(self, part: Part) -> bool:
        mine = self.first.marker, self.first.head.token, self.first.head.count, self.parts
        return mine == (part.marker, part.head.token, part.head.count, part.head.index)

    def fits(self, part: Part) -> bool:
        sets_then = sum(map(len, self.lots.values())) + sum(map(len, part.found.values()))
        return sets_then <= _MOST_SETS and len(self.lots) + len(part.found) <= _MOST_OWNERS


class Draws:
    """The answer sets of one zone; `now` is Unix time in whole seconds."""

    def __init__(self, zone: SignedZone, answers: Answers, now: int) -> None:
        self.token = sets.NO_DRAW
        self._zone = zone
        self._answers = answers
        self._edition = now  # another number for each change, also beyond this process
        self._marker: tuple[Name, int] | None = None
        self._drawn: dict[Key, Several] = {}
        self._staged: _Staged | None = None
        self._gone: set[Name] = set()  # that lost their addresses while something is worked out
        self._ends: tuple[int, int] | None = None  # when the first and the last signature end
        self._tags: frozenset[bytes] = frozenset()

    def __len__(self) -> int:
        """How many sets are in place."""
        return sum(
            len(several.signed) for (_, rdtype), several in self._drawn.items() if rdtype == records.SRV
        )

    def read(self, message: dns.update.UpdateMessage) -> Part | None:
        """The part of a draw that an update is; None for an update of the zone. Raises Refused."""
        found = [rrset for rrset in message.update if rrset.rdtype == records.SETS]
        if not found:
            return None
        if len(found) < len(message.update):
            raise Refused(dns.rcode.FORMERR, "answer sets beside other records")
        try:
            head, *rest = found
            marker, ttl, data = self._record(head)
            by_owner: dict[Name, list[RRset]] = {}
            for rrset in rest:
                owner, set_ttl, rdata = self._record(rrset)
                some = sets.decode(rdata, self._zone.apex)
                by_owner.setdefault(owner, []).extend(RRset(set_ttl, rdatas) for rdatas in some)
            return Part(marker, ttl, Head.decode(data), by_owner)
        except Malformed as error:
            raise Refused(dns.rcode.FORMERR, f"answer sets: {error}") from None

    def _record(self, rrset: dns.rrset.RRset) -> tuple[Name, int, bytes]:
        owner = records.to_wire(rrset.name)
        if rrset.deleting is not None or rrset.rdclass != dns.rdataclass.IN:
            raise Refused(dns.rcode.FORMERR, "answer sets are replaced by others, never deleted")
        if not records.is_below(owner, self._zone.apex):
            raise Refused(dns.rcode.NOTZONE, f"{rrset.name} is not in the zone")
        (rdata,) = rrset
        return owner, rrset.ttl, records.canonical(rdata)

    def take(self, part: Part, now: int) -> Generator[None, None, None]:
        """Sign a part, with pauses; the last one puts its draw in place. One part at a time. Raises Refused."""
        if not part.head.index:
            self._staged = _Staged(part)
        staged = self._staged
        if staged is None or not staged.is_next(part):
            raise Refused(dns.rcode.NXRRSET, "not the next part of its draw")
        if not staged.fits(part):
            self._staged = None
            raise Refused(dns.rcode.REFUSED, f"more than {_MOST_SETS} answer sets or {_MOST_OWNERS} owners")
        self._check(part)
        self._gone.clear()
        fresh: dict[Key, list[_Lot]] = {}
        for owner, found in part.found.items():
            key = owner, records.SRV
            if key not in staged.held:
                staged.held[key] = self._held(key, now)
            held = staged.held[key]
            lots = fresh[key] = []
            for rrset in found:
                lots.append(held.get(rrset) or self._lot(key, rrset, now))
                yield
        if self._staged is not staged:
            raise Refused(dns.rcode.NXRRSET, "another draw has begun")
        for key, lots in fresh.items():
            staged.lots.setdefault(key, []).extend(_without(lots, self._gone))
        staged.parts += 1
        if staged.parts == part.head.count:
            self._staged, self.token, self._marker = None, part.head.token, (part.marker, part.ttl)
            self._place(staged.lots, now)

    def _check(self, part: Part) -> None:
        for found in part.found.values():
            for name in {sets.target(rdata) for rrset in found for rdata in rrset.rdatas}:
                if not self._has_address(name):
                    self._staged = None
                    raise Refused(dns.rcode.NXDOMAIN, f"{records.text(name)} has no address")

    def drop(self, edition: Edition) -> None:
        """Take out what names a target that has no address any more since an edition, which was adopted."""
        lost = (
            owner for (owner, kind), signed in edition.changed.items() if signed is None and _is_address(kind)
        )
        gone = {owner for owner in lost if not self._has_address(owner)}
        if not gone:
            return
        self._gone |= gone
        if self._staged is not None:
            self._staged.lots = {key: _without(lots, gone) for key, lots in self._staged.lots.items()}
        lots = {key: list(zip(*several, strict=True)) for key, several in self._drawn.items()}
        left = {key: _without(some, gone) for key, some in lots.items() if key[1] == records.SRV}
        if any(len(left[key]) < len(lots[key]) for key in left):
            self._place(left, edition.made_at)

    def is_due(self, now: int) -> bool:
        """Whether something has to be signed anew: it ages, it is another key's, or of a clock that was ahead."""
        if self._ends is None:
            return False
        first, last = self._ends
        return self._tags != {self._tag} or first < now + REFRESH or last > now + VALID_AFTER

    def renew(self, now: int) -> Generator[None, None, None]:
        """Sign anew what has to be, with pauses; not while a part is taken."""
        self._gone.clear()
        fresh: dict[Key, list[_Lot]] = {}
        for key, several in self._drawn.items():
            if key[1] != records.SRV:
                continue
            lots = fresh[key] = []
            for lot in zip(*several, strict=True):
                lots.append(lot if self._is_fresh(lot[0], now) else self._lot(key, lot[0].rrset, now))
                yield
        self._place({key: _without(lots, self._gone) for key, lots in fresh.items()}, now)

    def listed(self, known: str | None) -> Iterator[bytes]:
        """What is in place as records, for edges: a head, the sets, the head again.

        The head alone for one who has it, or asks for no more by `sets.NO_DRAW`.
        """
        marker, ttl = self._marker or (self._zone.apex, 0)
        token = f"{self.token}.{self._edition}" if self._marker else sets.NO_DRAW
        head = records.record(marker, records.SETS, ttl, Head(0, 1, token).encode())
        yield head
        if known in (token, sets.NO_DRAW) or not self._marker:
            return
        drawn = self._drawn
        for (owner, rdtype), several in drawn.items():
            if rdtype == records.SRV:
                some = [signed.rrset.rdatas for signed in several.signed]
                ttl = several.signed[0].rrset.ttl
                yield from sets.records_of(self._zone.apex, owner, ttl, some)
        yield head

    def _place(self, lots: Mapping[Key, Sequence[_Lot]], now: int) -> None:
        assert self._marker is not None
        marker, ttl = self._marker
        token = self.token.encode()
        key = marker, records.TXT
        text = RRset(ttl, (bytes((len(token),)) + token,))
        with_marker = {**lots, key: [self._lot(key, text, now)]}
        self._drawn = {key: Several(*zip(*some, strict=True)) for key, some in with_marker.items() if some}
        signed = [one for several in self._drawn.values() for one in several.signed]
        self._ends = min(one.expires for one in signed), max(one.expires for one in signed)
        self._tags = frozenset(one.signatures[0][16:18] for one in signed)
        self._edition += 1
        self._answers.draw(self._drawn)

    def _lot(self, key: Key, rrset: RRset, now: int) -> _Lot:
        signed = self._zone.keyring.sign(*key, rrset, now)
        plain, proved = (positive(*key, signed, dnssec=dnssec) for dnssec in (False, True))
        return signed, plain, proved

    def _held(self, key: Key, now: int) -> Mapping[RRset, _Lot]:
        """Sets that are signed already, and not due."""
        several = self._drawn.get(key)
        if several is None:
            return {}
        return {lot[0].rrset: lot for lot in zip(*several, strict=True) if self._is_fresh(lot[0], now)}

    def _is_fresh(self, signed: Signed, now: int) -> bool:
        is_of_age = now + REFRESH + _TOGETHER <= signed.expires <= now + VALID_AFTER
        return is_of_age and signed.signatures[0][16:18] == self._tag

    @property
    def _tag(self) -> bytes:
        return self._zone.keyring.active.tag.to_bytes(2, "big")

    def _has_address(self, name: Name) -> bool:
        return any(map(_is_address, self._zone.node(name) or ()))


def _is_address(rdtype: int) -> bool:
    return rdtype in (records.A, records.AAAA)


def _without(lots: Iterable[_Lot], gone: Collection[Name]) -> list[_Lot]:
    if not gone:
        return list(lots)
    return [lot for lot in lots if not any(sets.target(rdata) in gone for rdata in lot[0].rrset.rdatas)]
