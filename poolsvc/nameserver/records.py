"""Names and RRsets in wire form, in the order and the form that DNSSEC signs (RFC 4034 section 6). Pure.

A name here is its uncompressed wire form in lower case. An RRset's data are sorted as octets and without twins.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import dns.name
import dns.rdata
import dns.rdataclass
import dns.rdatatype

Name = bytes
Key = tuple[Name, int]
"""Owner and type of an RRset."""

A, NS, CNAME, SOA, MX, TXT, AAAA = 1, 2, 5, 6, 15, 16, 28
SRV, DNAME, OPT, DS, RRSIG, NSEC, DNSKEY = 33, 39, 41, 43, 46, 47, 48
NSEC3, NSEC3PARAM, CDS, CDNSKEY, TSIG, IXFR, AXFR, ANY = 50, 51, 59, 60, 250, 251, 252, 255
SETS = 65_400  # private use: `poolsvc.nameserver.sets`
IN = 1
# What DNSSEC adds to a zone; a secondary that signs itself does not want it.
SIGNER_TYPES = frozenset({RRSIG, NSEC, DNSKEY, CDS, CDNSKEY})

_HEAD = struct.Struct("!HHIH")  # type, class, TTL, length of the data
_SERIAL = struct.Struct("!I")


@dataclass(frozen=True, slots=True)
class RRset:
    """The records of one owner and type: TTL in seconds, each one's data in canonical form."""

    ttl: int
    rdatas: tuple[bytes, ...]

    @classmethod
    def of(cls, ttl: int, rdatas: Iterable[bytes]) -> "RRset":
        return cls(ttl, tuple(sorted(set(rdatas))))


@dataclass(frozen=True, slots=True)
class Signed:
    """An RRset and its signatures, each the data of an RRSIG; the first of them ends at `expires` (Unix time)."""

    rrset: RRset
    signatures: tuple[bytes, ...]
    expires: int


def to_wire(name: dns.name.Name) -> Name:
    """Raises NeedAbsoluteNameOrOrigin for a relative name."""
    wire = name.canonicalize().to_wire()
    assert wire is not None
    return wire


def from_wire(name: Name) -> dns.name.Name:
    found, _ = dns.name.from_wire(name, 0)
    return found


def canonical(rdata: dns.rdata.Rdata) -> bytes:
    """A record's data as it is signed: names in it uncompressed and in lower case."""
    return rdata.to_digestable()


def text(name: Name) -> str:
    return from_wire(name).to_text()


def labels(name: Name) -> list[bytes]:
    """The labels, without that of the root."""
    found, at = [], 0
    while length := name[at]:
        found.append(name[at + 1 : at + 1 + length])
        at += 1 + length
    return found


def ancestors(name: Name, apex: Name) -> Iterator[Name]:
    """The names above, up to the apex, which is the last."""
    while name != apex:
        name = name[1 + name[0] :]
        yield name


def is_below(name: Name, apex: Name) -> bool:
    """Whether the name is the apex or under it."""
    at, end = 0, len(name) - len(apex)
    while at < end:
        at += 1 + name[at]
    return at == end and name[at:] == apex


def order(name: Name) -> bytes:
    """What sorts names as DNSSEC does: by labels from the root, each as octets, a parent before its children."""
    # Octets 0 and 1 make room for the separator, which comes before all others.
    return b"\0".join(
        label.replace(b"\1", b"\1\2").replace(b"\0", b"\1\1") for label in reversed(labels(name))
    )


@lru_cache(maxsize=4096)
def bitmap(types: frozenset[int]) -> bytes:
    """The types of a name as NSEC tells them (RFC 4034 section 4.1.2)."""
    windows: dict[int, bytearray] = {}
    for number in sorted(types):
        window, bit = divmod(number, 256)
        bits = windows.setdefault(window, bytearray())
        bits.extend(bytes(bit // 8 + 1 - len(bits)))
        bits[bit // 8] |= 0x80 >> bit % 8
    return b"".join(bytes((window, len(bits))) + bits for window, bits in windows.items())


def record(owner: bytes, rdtype: int, ttl: int, rdata: bytes) -> bytes:
    """One resource record; the owner may be compressed."""
    return b"".join((owner, _HEAD.pack(rdtype, IN, ttl, len(rdata)), rdata))


def records(owner: bytes, rdtype: int, signed: Signed) -> Iterator[bytes]:
    """An RRset's records, then its signatures."""
    rrset = signed.rrset
    for rdata in rrset.rdatas:
        yield record(owner, rdtype, rrset.ttl, rdata)
    for signature in signed.signatures:
        yield record(owner, RRSIG, rrset.ttl, signature)


def type_of(wire: bytes) -> int:
    """The type of a record whose owner is not compressed."""
    at = 0
    while wire[at]:
        at += 1 + wire[at]
    return int.from_bytes(wire[at + 1 : at + 3], "big")


def soa_serial(rdata: bytes) -> int:
    serial: int = _SERIAL.unpack_from(rdata, len(rdata) - 20)[0]
    return serial


def with_serial(rdata: bytes, serial: int) -> bytes:
    """A SOA's data with another serial."""
    return rdata[:-20] + _SERIAL.pack(serial) + rdata[-16:]


def soa_minimum(rdata: bytes) -> int:
    """For how long resolvers may keep that something does not exist (RFC 2308 section 5)."""
    minimum: int = _SERIAL.unpack_from(rdata, len(rdata) - 4)[0]
    return minimum


def describe(key: Key) -> str:
    return f"{text(key[0])} {dns.rdatatype.to_text(dns.rdatatype.RdataType.make(key[1]))}"
