"""Lookups without any resolver: the zones' own servers are asked, from the root down (RFC 1034 section 5.3.3; asyncio).

For a host whose resolvers do not pass DNSSEC on. What servers say of delegations and addresses is not checked: it only
decides whom to ask, and the answer is validated as any other (`resolve`). So a lie can waste questions, whose number, time
and depth are bounded, and can lead to no place but port 53 of public addresses.
"""

from dataclasses import dataclass
from ipaddress import ip_address

import dns.asyncquery
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
from dns.rdatatype import RdataType

from nts_core.resolve import PAYLOAD, ResolveError, Resolver, TrustAnchors

MAX_QUESTIONS = 100  # datagrams of one lookup
MAX_CUTS = 12  # delegations on the way to one name
MAX_SERVERS = 6  # addresses of one zone that are tried
MAX_DEPTH = 3  # lookups of servers' addresses for lookups of servers' addresses
_QUESTION = 1.5  # seconds
_TIMEOUT = 15.0
_KEPT = 256  # zones whose servers are remembered
_REMEDY = "use a resolver that passes DNSSEC records on, or let this host reach DNS servers on port 53"


@dataclass(frozen=True, slots=True)
class Cut:
    """A zone and where it is served."""

    zone: dns.name.Name
    addresses: tuple[str, ...]


# https://www.iana.org/domains/root/servers
ROOT_SERVERS = Cut(
    dns.name.root,
    (
        "198.41.0.4",
        "2001:503:ba3e::2:30",
        "170.247.170.2",
        "2801:1b8:10::b",
        "192.33.4.12",
        "2001:500:2::c",
        "199.7.91.13",
        "2001:500:2d::d",
        "192.203.230.10",
        "2001:500:a8::e",
        "192.5.5.241",
        "2001:500:2f::f",
        "193.0.14.129",
        "2001:7fd::1",
        "199.7.83.42",
        "2001:500:9f::42",
        "202.12.27.33",
        "2001:dc3::35",
    ),
)


class Authorities(Resolver):
    """In place of a resolver. `start` is where the way down begins; other addresses than public ones are for laboratories."""

    def __init__(
        self,
        anchors: TrustAnchors,
        *,
        start: Cut = ROOT_SERVERS,
        port: int = 53,
        timeout: float = _TIMEOUT,
        allow_private: bool = False,
    ) -> None:
        super().__init__(start.addresses[0], port, anchors, timeout)
        self._start = start
        self._allow_private = allow_private
        self._cuts: dict[dns.name.Name, Cut] = {start.zone: start}

    async def ask(self, name: dns.name.Name, rdtype: RdataType) -> dns.message.Message:
        """The answer of the servers of the zone that `name` is in; of a DS, of its parent's (RFC 4035 section 3.1.4.1)."""
        return await _Descent(self, self._start, self._cuts, allow_private=self._allow_private).ask(
            name, rdtype
        )

    def __str__(self) -> str:
        return "the zones' own servers"


class _Descent:
    """One question's way down, with its budget."""

    def __init__(
        self, owner: Authorities, start: Cut, cuts: dict[dns.name.Name, Cut], *, allow_private: bool
    ) -> None:
        self._owner = owner
        self._start = start
        self._cuts = cuts
        self._allow_private = allow_private
        self._questions = MAX_QUESTIONS

    async def ask(self, name: dns.name.Name, rdtype: RdataType, depth: int = 0) -> dns.message.Message:
        below = name.parent() if rdtype == RdataType.DS and name != dns.name.root else name
        cut = self._closest(below)
        for _ in range(MAX_CUTS):
            answer = await self._ask_one_of(cut, name, rdtype)
            child = self._referral(answer, cut, below)
            if child is None:
                return answer
            cut = await self._cut(child, answer, depth)
        raise _failed(f"{name} is delegated too often")

    def _closest(self, name: dns.name.Name) -> Cut:
        """The deepest zone on the way to a name whose servers are known."""
        while name not in self._cuts:
            if name == dns.name.root:
                return self._start
            name = name.parent()
        return self._cuts[name]

    def _referral(self, answer: dns.message.Message, cut: Cut, name: dns.name.Name) -> dns.name.Name | None:
        """The zone below this one that the servers send us to (RFC 1034 section 4.2.1)."""
        if answer.answer or answer.flags & dns.flags.AA:
            return None
        for rrset in answer.authority:
            is_below = rrset.name != cut.zone and rrset.name.is_subdomain(cut.zone)
            if rrset.rdtype == RdataType.NS and is_below and name.is_subdomain(rrset.name):
                return rrset.name
        raise _failed(f"a server of {cut.zone} neither answers nor delegates {name}")

    async def _cut(self, zone: dns.name.Name, answer: dns.message.Message, depth: int) -> Cut:
        """Where the zone of a referral is served, by the addresses beside it or by looking them up."""
        names = [
            record.target
            for rrset in answer.authority
            if rrset.rdtype == RdataType.NS and rrset.name == zone
            for record in rrset
        ][:MAX_SERVERS]
        found = [
            record.address
            for rrset in answer.additional
            if rrset.rdtype in {RdataType.A, RdataType.AAAA} and rrset.name in names
            for record in rrset
        ]
        if not found and depth < MAX_DEPTH:
            for name in names:
                found += await self._addresses(name, depth + 1)
                if found:
                    break
        addresses = tuple(filter(self._is_allowed, dict.fromkeys(found)))[:MAX_SERVERS]
        if not addresses:
            raise _failed(f"the servers of {zone} have no usable addresses")
        cut = Cut(zone, addresses)
        if len(self._cuts) < _KEPT:
            self._cuts[zone] = cut
        return cut

    async def _addresses(self, name: dns.name.Name, depth: int) -> list[str]:
        found: list[str] = []
        for rdtype in (RdataType.A, RdataType.AAAA):
            try:
                answer = await self.ask(name, rdtype, depth)
            except ResolveError:
                continue
            found += [record.address for rrset in answer.answer if rrset.rdtype == rdtype for record in rrset]
        return found

    def _is_allowed(self, address: str) -> bool:
        return self._allow_private or ip_address(address).is_global

    async def _ask_one_of(self, cut: Cut, name: dns.name.Name, rdtype: RdataType) -> dns.message.Message:
        for address in cut.addresses[:MAX_SERVERS] if cut is not self._start else cut.addresses:
            if self._questions == 0:
                raise _failed(f"{name} needs more than {MAX_QUESTIONS} questions")
            self._questions -= 1
            query = dns.message.make_query(name, rdtype, want_dnssec=True, payload=PAYLOAD)
            query.flags &= ~dns.flags.RD
            try:
                answer, _ = await dns.asyncquery.udp_with_fallback(
                    query, address, _QUESTION, self._owner.port, ignore_unexpected=True
                )
            except (OSError, EOFError, dns.exception.DNSException):
                continue
            if answer.rcode() in {dns.rcode.NOERROR, dns.rcode.NXDOMAIN}:
                return answer
        if cut is not self._start:
            # Its servers may have changed since.
            self._cuts.pop(cut.zone, None)
        raise _failed(f"no server of {cut.zone} answers for {name}")


def _failed(message: str) -> ResolveError:
    return ResolveError("resolver-failed", message, _REMEDY)
