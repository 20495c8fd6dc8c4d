"""Lookups without any resolver: the zones' own servers are asked, from the root down (RFC 1034 section 5.3.3; asyncio).

For a host whose resolvers do not pass DNSSEC on. What servers say of delegations and addresses is not checked: it only
decides whom to ask, and the answer is validated as any other (`resolve`). So a lie can waste questions, whose number, time
and depth are bounded, and leads to no place but port 53 of public addresses.
"""

import random
import time
from collections.abc import Iterable, Sequence
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

from nts_core.resolve import PAYLOAD, Answer, Moment, ResolveError, Resolver, TrustAnchors
from nts_core.routed import is_global_unicast

MAX_QUESTIONS = 100  # datagrams of one lookup
MAX_CUTS = 12  # delegations on the way to one name
MAX_SERVERS = 6  # addresses of one zone that are tried
MAX_DEPTH = 3  # lookups of servers' addresses for lookups of servers' addresses
_QUESTION = 1.5  # seconds
_TIMEOUT = 15.0
_KEPT = 256  # zones whose servers are remembered
_KEPT_FOR = 3600.0  # seconds at most: a server that a zone has left may serve it as it was then
_REMEDY = "use a resolver that passes DNSSEC records on, or let this host reach DNS servers on port 53"


@dataclass(frozen=True, slots=True)
class Cut:
    """A zone and where it is served, until a time of the monotonic clock."""

    zone: dns.name.Name
    addresses: tuple[str, ...]
    until: float = float("inf")


# The thirteen servers of the root, as IANA lists them.
ROOT_SERVERS = Cut(
    dns.name.root,
    (
        *("198.41.0.4", "170.247.170.2", "192.33.4.12", "199.7.91.13", "192.203.230.10", "192.5.5.241"),
        *("192.112.36.4", "198.97.190.53", "192.36.148.17", "192.58.128.30", "193.0.14.129", "199.7.83.42"),
        *("202.12.27.33", "2001:503:ba3e::2:30", "2801:1b8:10::b", "2001:500:2::c", "2001:500:2d::d"),
        *("2001:500:a8::e", "2001:500:2f::f", "2001:500:12::d0d", "2001:500:1::53", "2001:7fe::53"),
        *("2001:503:c27::2:30", "2001:7fd::1", "2001:500:9f::42", "2001:dc3::35"),
    ),
)


class Authorities:
    """In place of a resolver. `start` is where the way down begins; only laboratories have other addresses than public ones."""

    def __init__(
        self,
        anchors: TrustAnchors,
        *,
        start: Cut = ROOT_SERVERS,
        port: int = 53,
        timeout: float = _TIMEOUT,
        allow_private: bool = False,
    ) -> None:
        self.anchors = anchors
        self.port = port
        self.timeout = timeout
        self._allow_private = allow_private
        self._start = start
        self._cuts: dict[dns.name.Name, Cut] = {}
        self._lookups = Resolver("", port, anchors)

    async def lookup(self, owner: str, rdtype: str, now: Moment) -> Answer:
        """As `Resolver.lookup`."""
        return await _Descent(self, self._lookups).lookup(owner, rdtype, now)

    def known(self, name: dns.name.Name) -> Cut:
        """The deepest zone on the way to a name whose servers are known."""
        while name != dns.name.root:
            cut = self._cuts.get(name)
            if cut is not None and cut.until > time.monotonic():
                return cut
            name = name.parent()
        return self._start

    def keep(self, cut: Cut) -> None:
        """Remember a zone's servers; the oldest are forgotten."""
        self._cuts.pop(cut.zone, None)
        while len(self._cuts) >= _KEPT:
            del self._cuts[next(iter(self._cuts))]
        self._cuts[cut.zone] = cut

    def forget(self, cut: Cut) -> None:
        """A zone's servers are of no use, or others are by now."""
        self._cuts.pop(cut.zone, None)

    def usable(self, addresses: Iterable[str]) -> tuple[str, ...]:
        """Those that may be asked, MAX_SERVERS at most: in no order, and with both families in turn."""
        allowed = [
            address
            for address in dict.fromkeys(addresses)
            if self._allow_private or is_global_unicast(ip_address(address))
        ]
        random.shuffle(allowed)
        families: dict[int, int] = {4: 0, 6: 0}
        turns: dict[str, int] = {}
        for address in allowed:
            version = ip_address(address).version
            turns[address] = families[version] = families[version] + 1
        return tuple(sorted(allowed, key=turns.__getitem__)[:MAX_SERVERS])

    def __str__(self) -> str:
        return "the zones' own servers"


class _Descent(Resolver):
    """One lookup: all its questions go from the top down, out of one budget."""

    def __init__(self, owner: Authorities, shared: Resolver) -> None:
        super().__init__("", owner.port, owner.anchors, owner.timeout)
        self.keys = shared.keys
        self._owner = owner
        self._questions = MAX_QUESTIONS

    async def ask(self, name: dns.name.Name, rdtype: RdataType) -> dns.message.Message:
        """The answer of the servers of the zone that `name` is in; of a DS, of its parent's (RFC 4035 section 3.1.4.1)."""
        return await self._descend(name, rdtype, 0)

    def __str__(self) -> str:
        return str(self._owner)

    async def _descend(self, name: dns.name.Name, rdtype: RdataType, depth: int) -> dns.message.Message:
        below = name.parent() if rdtype == RdataType.DS and name != dns.name.root else name
        cut = self._owner.known(below)
        for _ in range(MAX_CUTS):
            answer, child = await self._ask_one_of(cut, name, rdtype, below)
            if child is None:
                return answer
            cut = await self._cut(cut, child, answer, depth)
        raise _failed(f"{name} is delegated too often")

    async def _ask_one_of(
        self, cut: Cut, name: dns.name.Name, rdtype: RdataType, below: dns.name.Name
    ) -> tuple[dns.message.Message, dns.name.Name | None]:
        """The first answer of use, or a referral and where it leads."""
        for address in self._owner.usable(cut.addresses):
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
            if answer.rcode() not in {dns.rcode.NOERROR, dns.rcode.NXDOMAIN}:
                continue
            if answer.flags & dns.flags.AA or answer.answer:
                return answer, None
            if (child := _referral(answer, cut, below)) is not None:
                return answer, child
        self._owner.forget(cut)
        raise _failed(f"no server of {cut.zone} answers for {name}")

    async def _cut(self, above: Cut, zone: dns.name.Name, answer: dns.message.Message, depth: int) -> Cut:
        """Where the zone of a referral is served: by the addresses beside it, or by looking them up."""
        (listed,) = (
            rrset for rrset in answer.authority if rrset.rdtype == RdataType.NS and rrset.name == zone
        )
        names: Sequence[dns.name.Name] = [record.target for record in listed][:MAX_SERVERS]
        # Of names elsewhere this server is not the one to say the addresses.
        inside = {name for name in names if name.is_subdomain(above.zone)}
        glue = [
            record.address
            for rrset in answer.additional
            if rrset.rdtype in {RdataType.A, RdataType.AAAA} and rrset.name in inside
            for record in rrset
        ]
        addresses = self._owner.usable(glue)
        for name in names if depth < MAX_DEPTH else ():
            if addresses:
                break
            addresses = self._owner.usable(await self._addresses(name, depth + 1))
        if not addresses:
            raise _failed(f"the servers of {zone} have no usable addresses")
        cut = Cut(zone, addresses, time.monotonic() + min(listed.ttl, _KEPT_FOR))
        self._owner.keep(cut)
        return cut

    async def _addresses(self, name: dns.name.Name, depth: int) -> list[str]:
        found: list[str] = []
        for rdtype in (RdataType.A, RdataType.AAAA):
            try:
                answer = await self._descend(name, rdtype, depth)
            except ResolveError:
                continue
            found += [record.address for rrset in answer.answer if rrset.rdtype == rdtype for record in rrset]
        return found


def _referral(answer: dns.message.Message, cut: Cut, name: dns.name.Name) -> dns.name.Name | None:
    """The zone further down that a server sends us to (RFC 1034 section 4.2.1)."""
    for rrset in answer.authority:
        is_below = rrset.name != cut.zone and rrset.name.is_subdomain(cut.zone)
        if rrset.rdtype == RdataType.NS and is_below and name.is_subdomain(rrset.name):
            return rrset.name
    return None


def _failed(message: str) -> ResolveError:
    return ResolveError("resolver-failed", message, _REMEDY)
