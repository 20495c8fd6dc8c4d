"""What an update asks of the zone (RFC 2136 section 3), and whether it may. Pure.

An update is made as a whole or not at all. What would break the zone is ignored as the RFC says (an alias beside other
data, the last NS of the apex, a serial that goes back); what this server could not serve right is refused: wildcards,
delegations and DNAME, and the records that signing adds.
"""

from collections.abc import Iterable

import dns.name
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import dns.update

from poolsvc.nameserver import records
from poolsvc.nameserver.records import Key, Name, RRset
from poolsvc.nameserver.zone import SignedZone

# Octets of one RRset: it has to fit one message with its signatures and its name.
_MOST_OCTETS = 48_000
_ALONE = frozenset({records.SOA, records.CNAME})
_REFUSED = records.SIGNER_TYPES | {
    records.DS,
    records.DNAME,
    records.NSEC3,
    records.NSEC3PARAM,
    int(dns.rdatatype.CSYNC),
}


class Refused(Exception):
    """The update is not made; `rcode` says why to its sender, the text to the log."""

    def __init__(self, rcode: dns.rcode.Rcode, reason: str) -> None:
        super().__init__(reason)
        self.rcode = rcode


def evaluate(message: dns.update.UpdateMessage, zone: SignedZone) -> dict[Key, RRset | None]:
    """The RRsets that the update changes as they will be, None for those that go. Raises Refused.

    The message was read with each record apart, in its order. Answer sets are none of the zone (`draws`).
    """
    if len(message.zone) != 1 or message.zone[0].rdtype != dns.rdatatype.SOA:
        raise Refused(dns.rcode.FORMERR, "the zone section is not one SOA")
    if records.to_wire(message.zone[0].name) != zone.apex or message.zone[0].rdclass != dns.rdataclass.IN:
        raise Refused(dns.rcode.NOTAUTH, "another zone")
    _require(message.prerequisite, zone)
    draft = _Draft(zone)
    for rrset in message.update:
        if rrset.rdtype != records.SETS:
            draft.take(rrset)
    return draft.changed()


def _owner(rrset: dns.rrset.RRset, zone: SignedZone) -> Name:
    owner = records.to_wire(rrset.name)
    if not records.is_below(owner, zone.apex):
        raise Refused(dns.rcode.NOTZONE, f"{rrset.name} is not in the zone")
    return owner


def _require(prerequisites: Iterable[dns.rrset.RRset], zone: SignedZone) -> None:
    """Section 3.2. Raises Refused."""
    values: dict[Key, set[bytes]] = {}
    for rrset in prerequisites:
        owner = _owner(rrset, zone)
        node = zone.node(owner) or {}
        is_name = rrset.rdtype == dns.rdatatype.ANY
        if rrset.deleting is None:
            values.setdefault((owner, rrset.rdtype), set()).update(map(records.canonical, rrset))
        elif rrset.deleting == dns.rdataclass.ANY and not (bool(node) if is_name else rrset.rdtype in node):
            rcode = dns.rcode.NXDOMAIN if is_name else dns.rcode.NXRRSET
            raise Refused(rcode, f"{rrset.name} is not there")
        elif rrset.deleting == dns.rdataclass.NONE and (bool(node) if is_name else rrset.rdtype in node):
            rcode = dns.rcode.YXDOMAIN if is_name else dns.rcode.YXRRSET
            raise Refused(rcode, f"{rrset.name} is there")
    for (owner, rdtype), rdatas in values.items():
        held = (zone.node(owner) or {}).get(rdtype)
        if held is None or set(held.rrset.rdatas) != rdatas:
            raise Refused(dns.rcode.NXRRSET, f"{records.describe((owner, rdtype))} has another value")


class _Draft:
    """The RRsets that an update has touched so far."""

    def __init__(self, zone: SignedZone) -> None:
        self._zone = zone
        self._touched: dict[Key, RRset | None] = {}
        self._kinds: dict[Name, set[int]] = {}  # of the names that it has touched

    def changed(self) -> dict[Key, RRset | None]:
        return {key: rrset for key, rrset in self._touched.items() if rrset != self._present(key)}

    def take(self, rrset: dns.rrset.RRset) -> None:
        """Section 3.4: one record of the update section."""
        owner, rdtype = _owner(rrset, self._zone), int(rrset.rdtype)
        if rrset.deleting is None:
            (rdata,) = rrset
            self._check(owner, rdtype, rdata)
            self._add((owner, rdtype), rrset.ttl, records.canonical(rdata))
        elif rrset.deleting == dns.rdataclass.ANY and rdtype == records.ANY:
            for kind in self._types(owner):
                self._remove((owner, kind))
        elif rdtype in _REFUSED or dns.rdatatype.is_metatype(rrset.rdtype):
            raise Refused(dns.rcode.REFUSED, f"{records.describe((owner, rdtype))} is not the sender's")
        elif rrset.deleting == dns.rdataclass.ANY:
            self._remove((owner, rdtype))
        else:
            self._remove_one((owner, rdtype), {records.canonical(rdata) for rdata in rrset})

    def _check(self, owner: Name, rdtype: int, rdata: dns.rdata.Rdata) -> None:
        is_apex = owner == self._zone.apex
        if dns.rdatatype.is_metatype(rdata.rdtype) or not rdtype or rdata.rdclass != dns.rdataclass.IN:
            raise Refused(dns.rcode.FORMERR, "a type or a class that no zone holds")
        if (
            rdtype in _REFUSED
            or b"*" in records.labels(owner)
            or (rdtype == records.NS and not is_apex)
            or (rdtype == records.SOA and not is_apex)
        ):
            raise Refused(dns.rcode.REFUSED, f"{records.describe((owner, rdtype))} is not served here")

    def _held(self, key: Key) -> RRset | None:
        return self._touched[key] if key in self._touched else self._present(key)

    def _present(self, key: Key) -> RRset | None:
        signed = (self._zone.node(key[0]) or {}).get(key[1])
        return None if signed is None else signed.rrset

    def _types(self, owner: Name) -> set[int]:
        """The types of the sender's own that a name has now."""
        types = self._kinds.get(owner, set()) | set(self._zone.node(owner) or ())
        return {rdtype for rdtype in types - _REFUSED if self._held((owner, rdtype)) is not None}

    def _add(self, key: Key, ttl: int, rdata: bytes) -> None:
        owner, rdtype = key
        others = self._types(owner) - {rdtype}
        held = self._held(key)
        if records.CNAME in others or (rdtype == records.CNAME and others):
            return
        if rdtype == records.SOA and not (held is None or _is_later(rdata, held.rdatas[0])):
            return
        present = () if held is None or rdtype in _ALONE else held.rdatas
        after = RRset.of(ttl, (*present, rdata))
        if sum(map(len, after.rdatas)) + 32 * len(after.rdatas) > _MOST_OCTETS:
            raise Refused(dns.rcode.REFUSED, f"{records.describe(key)} would not fit a message")
        self._touch(key, after)

    def _touch(self, key: Key, after: RRset | None) -> None:
        self._touched[key] = after
        self._kinds.setdefault(key[0], set()).add(key[1])

    def _remove(self, key: Key) -> None:
        if key[0] == self._zone.apex and key[1] in (records.SOA, records.NS):
            return
        if self._held(key) is not None:
            self._touch(key, None)

    def _remove_one(self, key: Key, rdatas: set[bytes]) -> None:
        held = self._held(key)
        if held is None or key[1] == records.SOA:
            return
        rest = tuple(rdata for rdata in held.rdatas if rdata not in rdatas)
        if rest:
            self._touch(key, RRset(held.ttl, rest))
        else:
            self._remove(key)


def _is_later(rdata: bytes, held: bytes) -> bool:
    return 0 < (records.soa_serial(rdata) - records.soa_serial(held)) % 2**32 < 2**31
