"""Answer sets as they travel: from the publisher in updates, to edges in answers of their own. Pure.

An owner name may have many SRV RRsets, of which each question gets one. They are no zone data, so they are in no transfer.
They travel as records of a private type (RFC 6895 section 3.1), whose data begin with an octet that says what follows:

0. A head, at the marker: this part's index and the number of parts (16 bits each), then the draw's token. To edges a dot and
   a number follow, which is another one whenever sets have left the draw.
1. Sets, at their owner: priority, weight and port of all targets (16 bits each), then set after set. One is the number of
   its targets (an octet), then for each the length (an octet) of its name, which is relative to the zone: its labels.

The marker is a name whose TXT is the token, so that whoever asks for it knows from which draw a server answers.
"""

import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from poolsvc.nameserver import records
from poolsvc.nameserver.records import Name

MOST_TARGETS = 8  # of one set, which then fits a datagram with its signature
NO_DRAW = "-"
"""The marker's TXT in the zone itself: who shows it answers from the zone alone."""

_TOKEN = re.compile(rb"[0-9a-z.-]{1,64}")
_HEAD = struct.Struct("!BHH")
_SETS = struct.Struct("!BHHH")
_OF_TARGETS = slice(1, 7)  # priority, weight, port, as each SRV begins
_LONGEST_NAME = 255
# Octets of the sets in one record; a message of the zone's size limit has room for some.
_RECORD = 8_000


class Malformed(ValueError):
    """The data are not of this form; the text says why."""


@dataclass(frozen=True, slots=True)
class Head:
    """Which part of which draw; the last part puts the draw in place."""

    index: int
    count: int
    token: str

    @property
    def draw(self) -> str:
        """The token of the draw, without the number that tells what is left of it."""
        return self.token.partition(".")[0]

    def encode(self) -> bytes:
        return _HEAD.pack(0, self.index, self.count) + self.token.encode()

    @classmethod
    def decode(cls, data: bytes) -> "Head":
        """Raises Malformed."""
        if len(data) < _HEAD.size or data[0]:
            raise Malformed("no head")
        _, index, count = _HEAD.unpack_from(data)
        token = data[_HEAD.size :]
        if index >= count or not _TOKEN.fullmatch(token):
            raise Malformed("a head with a wrong index or token")
        return cls(index, count, token.decode())


def encode(apex: Name, sets: Iterable[Sequence[bytes]]) -> Iterator[bytes]:
    """The data of the records for one owner's sets, each of SRV data with the same beginning and targets in the zone."""
    head, parts, octets = b"", list[bytes](), 0
    for rdatas in sets:
        begins = b"\1" + rdatas[0][: _OF_TARGETS.stop - 1]
        names = [rdata[6 : -len(apex)] for rdata in rdatas]
        part = bytes((len(names),)) + b"".join(bytes((len(name),)) + name for name in names)
        if parts and (begins != head or octets + len(part) > _RECORD):
            yield head + b"".join(parts)
            parts, octets = [], 0
        head = begins
        parts.append(part)
        octets += len(part)
    if parts:
        yield head + b"".join(parts)


def decode(data: bytes, apex: Name) -> list[tuple[bytes, ...]]:
    """Each set as SRV data in canonical form. Raises Malformed."""
    if len(data) < _SETS.size or data[0] != 1:
        raise Malformed("no sets")
    found, known = list[tuple[bytes, ...]](), dict[bytes, bytes]()
    at, end = _SETS.size, len(data)
    try:
        while at < end:
            count = data[at]
            at += 1
            if not 1 <= count <= MOST_TARGETS:
                raise Malformed(f"a set of {count} targets")
            names = set[bytes]()
            for _ in range(count):
                after = at + 1 + data[at]
                names.add(data[at + 1 : after])
                at = after
            if at > end:
                raise Malformed("a name that ends after the data")
            if len(names) != count:
                raise Malformed("a set that has a target twice")
            for name in names - known.keys():
                known[name] = data[_OF_TARGETS] + _absolute(name, apex)
            found.append(tuple(sorted(known[name] for name in names)))
    except IndexError:
        raise Malformed("a set that ends after the data") from None
    return found


def _absolute(labels: bytes, apex: Name) -> Name:
    """Raises Malformed, IndexError."""
    at = 0
    while at < len(labels):
        if not 1 <= labels[at] <= 63:
            raise Malformed("a label of a wrong length")
        at += 1 + labels[at]
    if at != len(labels) or not at or at + len(apex) > _LONGEST_NAME:
        raise Malformed("a name that is none")
    return labels.lower() + apex


def target(rdata: bytes) -> Name:
    """Whom SRV data name."""
    return rdata[6:]


def records_of(apex: Name, owner: Name, ttl: int, some: Iterable[Sequence[bytes]]) -> Iterator[bytes]:
    """An owner's sets as records in wire form."""
    for data in encode(apex, some):
        yield records.record(owner, records.SETS, ttl, data)
