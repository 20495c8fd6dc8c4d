"""What the zone's own nameservers say of a server's name (I/O). They are asked directly, and no resolver.

What is said is kept for some seconds, for the other family of the same server. A nameserver that is silent or refuses is
left alone for a while: it must not slow down each probe, and it is no member's fault. Nothing is validated: whoever forges
an answer makes the pool look wrong for a moment, and no server.
"""

import time
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Protocol

import dns.asyncquery
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
from dns.rdatatype import RdataType

from nts_core.control import NameFinding
from nts_core.resolve import PAYLOAD

_TIMEOUT = 1.5  # seconds for one question
_TRIES = 2  # nameservers that are asked for one name
_REST = 30.0  # seconds for which one that did not answer is left alone
_KEPT_FOR = 20.0  # seconds
_KEPT = 20_000  # names
_MAX_ADDRESSES = 64
_MAX_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Named:
    """The addresses of a name, and whether it is an alias; `took` is in nanoseconds, and 0 where it was known."""

    addresses: frozenset[str]
    is_alias: bool
    took: int


class Lookup(Protocol):
    """Who is asked for a name."""

    async def find(self, domain: str) -> Named | None:
        """What is said of it; None when nobody tells."""


class Nameservers:
    """The zone's authoritative servers, by address and port. They take turns."""

    def __init__(self, servers: Sequence[tuple[str, int]], *, timeout: float = _TIMEOUT) -> None:
        self._servers = list(dict.fromkeys(servers))
        self._timeout = timeout
        self._resting: dict[tuple[str, int], float] = {}
        self._kept: dict[str, tuple[Named, float]] = {}

    @property
    def resting(self) -> int:
        """How many of them did not answer when they were asked last."""
        now = time.monotonic()
        return sum(until > now for until in self._resting.values())

    async def find(self, domain: str) -> Named | None:
        """As `Lookup.find`."""
        known = self._kept.get(domain)
        if known is not None and known[1] > time.monotonic():
            return known[0]
        try:
            owner = dns.name.from_text(domain)
        except dns.exception.DNSException:
            return None
        for server in self._in_turn():
            started = time.monotonic_ns()
            found = await self._ask(owner, *server)
            if found is not None:
                self._keep(domain, found)
                return Named(*found, took=time.monotonic_ns() - started)
            self._resting[server] = time.monotonic() + _REST
        return None

    def _in_turn(self) -> list[tuple[str, int]]:
        if self._servers:
            self._servers.append(self._servers.pop(0))
        now = time.monotonic()
        return [server for server in self._servers if self._resting.get(server, 0) <= now][:_TRIES]

    def _keep(self, domain: str, found: tuple[frozenset[str], bool]) -> None:
        self._kept.pop(domain, None)
        while len(self._kept) >= _KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[domain] = Named(*found, took=0), time.monotonic() + _KEPT_FOR

    async def _ask(self, owner: dns.name.Name, address: str, port: int) -> tuple[frozenset[str], bool] | None:
        addresses: set[str] = set()
        for rdtype in (RdataType.A, RdataType.AAAA):
            query = dns.message.make_query(owner, rdtype, payload=PAYLOAD)
            query.flags &= ~dns.flags.RD
            try:
                answer, _ = await dns.asyncquery.udp_with_fallback(
                    query, address, self._timeout, port, ignore_unexpected=True, ignore_errors=True
                )
            except (OSError, EOFError, dns.exception.DNSException):
                return None
            is_told = answer.rcode() in {dns.rcode.NOERROR, dns.rcode.NXDOMAIN}
            if not is_told or not answer.flags & dns.flags.AA:
                return None
            if any(rrset.rdtype in {RdataType.CNAME, RdataType.DNAME} for rrset in answer.answer):
                return frozenset(), True
            found = (rrset for rrset in answer.answer if rrset.rdtype == rdtype and rrset.name == owner)
            addresses |= {record.address for rrset in found for record in rrset}
        return frozenset(sorted(addresses)[:_MAX_ADDRESSES]), False


def judge(found: Named | None, address: str, own: AbstractSet[str]) -> tuple[NameFinding, str]:
    """What that means for a client that looks for the server at `address`, and what is seen; `own` are the server's."""
    if found is None:
        return NameFinding.UNKNOWN, "no nameserver of the zone told"
    if found.is_alias:
        return NameFinding.ALIAS, "the name is an alias (CNAME)"
    if not found.addresses:
        return NameFinding.ABSENT, "the name has no addresses"
    known = {ip_address(text) for text in (*own, address)}
    foreign = [text for text in sorted(found.addresses) if ip_address(text) not in known]
    if foreign:
        return NameFinding.ELSEWHERE, f"the name has {_some(foreign)}, not the server's"
    if ip_address(address) not in {ip_address(text) for text in found.addresses}:
        return NameFinding.UNLISTED, f"the name has {_some(sorted(found.addresses))} alone"
    return NameFinding.OK, ""


def _some(addresses: Iterable[str]) -> str:
    shown = list(addresses)
    more = f" and {len(shown) - _MAX_SHOWN} more" if len(shown) > _MAX_SHOWN else ""
    return ", ".join(shown[:_MAX_SHOWN]) + more
