"""The zone's keys and what they sign (RFC 4034 sections 2 and 3; ECDSA P-256, RFC 6605). Pure.

Each key is a combined signing key: it signs the data of the zone and the set of keys. A roll-over (RFC 6781 section
4.1.3) goes by the table `TRANSITIONS`, each step after a time that lets everybody forget what was before:

0. MADE: a command has made it, and nobody has seen it yet.
1. PUBLISHED: in the set of keys, which it signs as well. The data are still signed by the key before.
2. ACTIVE: signs the data. CDS and CDNSKEY (RFC 7344) tell the parent of it, and of no other.
3. RETIRING: signs the set of keys only, as long as the parent may name it and caches may hold what it signed.
4. REMOVED: no more in the zone.
"""

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import dns.dnssec
import dns.rdata
import dns.rdataclass
import dns.rdatatype
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils
from dns.dnssectypes import DSDigest
from dns.rdtypes.ANY.DNSKEY import DNSKEY

from poolsvc.nameserver import records
from poolsvc.nameserver.records import Name, RRset, Signed

ALGORITHM = 13  # ECDSAP256SHA256
# Clients with wrong clocks are our customers; and what is removed can be shown for no longer than this.
VALID_BEFORE, VALID_AFTER = 7 * 86_400, 7 * 86_400
# Signed anew when so much is left, which is about once a day.
REFRESH = 6 * 86_400
_FLAGS = 257  # zone key, secure entry point
_PROTOCOL = 3
_POINT = 64
_HEAD = struct.Struct("!HBBIIIH")
_ECDSA = ec.ECDSA(hashes.SHA256())


class KeyState(StrEnum):
    MADE = "made"
    PUBLISHED = "published"
    ACTIVE = "active"
    RETIRING = "retiring"
    REMOVED = "removed"


TRANSITIONS: Mapping[KeyState, KeyState] = {
    KeyState.MADE: KeyState.PUBLISHED,
    KeyState.PUBLISHED: KeyState.ACTIVE,
    KeyState.ACTIVE: KeyState.RETIRING,
    KeyState.RETIRING: KeyState.REMOVED,
}


@dataclass(frozen=True, slots=True, eq=False)
class SigningKey:
    """A private key with its place in a roll-over."""

    private: ec.EllipticCurvePrivateKey
    state: KeyState
    dnskey: bytes  # data of its DNSKEY
    tag: int

    @classmethod
    def of(cls, private: ec.EllipticCurvePrivateKey, state: KeyState) -> "SigningKey":
        point = private.public_key().public_bytes(
            serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
        )
        dnskey = struct.pack("!HBB", _FLAGS, _PROTOCOL, ALGORITHM) + point[1:]
        return cls(private, state, dnskey, dns.dnssec.key_id(_parsed(dnskey)))

    def sign(self, octets: bytes) -> bytes:
        r, s = utils.decode_dss_signature(self.private.sign(octets, _ECDSA))
        return r.to_bytes(_POINT // 2, "big") + s.to_bytes(_POINT // 2, "big")

    def ds(self, apex: Name, digest: DSDigest = DSDigest.SHA256) -> bytes:
        """Data of the DS that the parent should have for it."""
        return records.canonical(dns.dnssec.make_ds(records.from_wire(apex), _parsed(self.dnskey), digest))


def _parsed(dnskey: bytes) -> DNSKEY:
    found = dns.rdata.from_wire(dns.rdataclass.IN, dns.rdatatype.DNSKEY, dnskey, 0, len(dnskey))
    assert isinstance(found, DNSKEY)
    return found


def new_private() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


class Keyring:
    """The keys of one zone that are in it; exactly one of them is active, else ValueError."""

    def __init__(self, apex: Name, keys: Iterable[SigningKey]) -> None:
        self.apex = apex
        self.keys = tuple(key for key in keys if key.state is not KeyState.MADE)
        (self.active,) = (key for key in self.keys if key.state is KeyState.ACTIVE)

    def sets(self, ttl: int) -> dict[int, RRset]:
        """The RRsets at the apex that the keys are responsible for."""
        return {
            records.DNSKEY: RRset.of(ttl, (key.dnskey for key in self.keys)),
            records.CDS: RRset.of(ttl, (self.active.ds(self.apex),)),
            records.CDNSKEY: RRset.of(ttl, (self.active.dnskey,)),
        }

    def signers(self, rdtype: int) -> tuple[SigningKey, ...]:
        """Who signs: what is about keys, everyone that a parent may name (RFC 7344 section 4.1)."""
        is_about_keys = rdtype in (records.DNSKEY, records.CDS, records.CDNSKEY)
        return self.keys if is_about_keys else (self.active,)

    def sign(self, owner: Name, rdtype: int, rrset: RRset, now: int, *, early: int = 0) -> Signed:
        """`now` is Unix time. It ends `early` seconds before it could, so that not all has to be signed anew at once."""
        expires = now + VALID_AFTER - early
        head = records.record(owner, rdtype, rrset.ttl, b"")[:-2]
        data = b"".join(
            part for rdata in rrset.rdatas for part in (head, len(rdata).to_bytes(2, "big"), rdata)
        )
        count = len(records.labels(owner))
        signatures = []
        for key in self.signers(rdtype):
            fixed = _HEAD.pack(
                rdtype, ALGORITHM, count, rrset.ttl, expires % 2**32, (now - VALID_BEFORE) % 2**32, key.tag
            )
            fixed += self.apex
            signatures.append(fixed + key.sign(fixed + data))
        return Signed(rrset, tuple(signatures), expires)
