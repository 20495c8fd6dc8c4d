"""Whether a name is gone from a pool's zone, on more than one server's word (asyncio, UDP and TCP).

A removed server must be dropped at once, and a broken resolver must remove nobody. So a denial counts when a resolver says
that it has validated it (AD, RFC 4035 section 3.2.3), or when two of the zone's own servers say the same (AA). Proofs
of absence (NSEC, NSEC3) are not validated here: who forges them on the way can take servers from a client, as it can by
silence, and gives it no others.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import dns.asyncquery
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
from dns.rdatatype import RdataType

from nts_core.resolve import PAYLOAD, ResolveError

WITNESSES = 2
MAX_SERVERS = 4  # of a zone that are asked
_TIMEOUT = 2.0  # seconds for a question
_WHOLE = 10.0  # and for all of them
_ADDRESSES = (RdataType.A, RdataType.AAAA)
_REMEDY = "use a validating resolver, or let this host reach the pool's own DNS servers"


@dataclass(frozen=True, slots=True)
class _Word:
    """What one server says of a name: whether it has addresses, how sure it is, and whose zone that is."""

    is_denied: bool
    is_validated: bool
    is_authoritative: bool
    zone: dns.name.Name | None


class Witnesses:
    """Asks resolvers (address and port), and the servers of the zone that they name at `authority_port`."""

    def __init__(self, resolvers: Sequence[tuple[str, int]], *, authority_port: int = 53) -> None:
        self._resolvers = tuple(resolvers)
        self._authority_port = authority_port

    async def deny(self, name: str) -> bool:
        """Whether a name (absolute or not) has no addresses any more; False when somebody has seen some.

        Raises ResolveError when too few can be asked.
        """
        owner = dns.name.from_text(name)
        try:
            async with asyncio.timeout(_WHOLE):
                return await self._deny(owner)
        except TimeoutError:
            raise _unknown(f"nobody told in time whether {owner} is gone") from None

    async def _deny(self, owner: dns.name.Name) -> bool:
        for address, port in self._resolvers:
            word = await _word(owner, address, port, is_recursive=True)
            if word is None:
                continue
            if not word.is_denied or word.is_validated:
                return word.is_denied
            if word.zone is not None and owner.is_subdomain(word.zone):
                return await self._zones_own(owner, word.zone, (address, port))
        raise _unknown(f"no resolver tells whether {owner} is gone")

    async def _zones_own(self, owner: dns.name.Name, zone: dns.name.Name, resolver: tuple[str, int]) -> bool:
        asked, denials = 0, 0
        async for address in _servers(zone, *resolver):
            word = await _word(owner, address, self._authority_port, is_recursive=False)
            if word is not None and word.is_authoritative:
                if not word.is_denied:
                    return False
                denials += 1
            asked += 1
            if denials == WITNESSES:
                return True
            if asked == MAX_SERVERS:
                break
        raise _unknown(f"{denials} of the {WITNESSES} servers needed say that {owner} is gone")


async def _word(owner: dns.name.Name, address: str, port: int, *, is_recursive: bool) -> _Word | None:
    """What a server says of both kinds of addresses; None when it says nothing of use."""
    is_validated = is_authoritative = True
    zone: dns.name.Name | None = None
    for rdtype in _ADDRESSES:
        answer = await _ask(owner, rdtype, address, port, is_recursive=is_recursive)
        if answer is None:
            return None
        is_validated &= bool(answer.flags & dns.flags.AD)
        is_authoritative &= bool(answer.flags & dns.flags.AA)
        if any(rrset.name == owner and rrset.rdtype != RdataType.RRSIG for rrset in answer.answer):
            return _Word(False, is_validated, is_authoritative, None)
        soa = [rrset.name for rrset in answer.authority if rrset.rdtype == RdataType.SOA]
        zone = soa[0] if soa else zone
        if answer.rcode() == dns.rcode.NXDOMAIN:
            break
    return _Word(True, is_validated, is_authoritative, zone)


async def _servers(zone: dns.name.Name, address: str, port: int) -> AsyncIterator[str]:
    """The addresses of a zone's servers, each once, no two of the first ones under one name."""
    listed = await _ask(zone, RdataType.NS, address, port, is_recursive=True)
    names = _data(listed, RdataType.NS)[:MAX_SERVERS]
    seen: set[str] = set()
    for rdtype in _ADDRESSES:
        for name in names:
            answer = await _ask(dns.name.from_text(name), rdtype, address, port, is_recursive=True)
            for found in _data(answer, rdtype)[:1]:
                if found not in seen:
                    seen.add(found)
                    yield found


def _data(answer: dns.message.Message | None, rdtype: RdataType) -> list[str]:
    found = [] if answer is None else [rrset for rrset in answer.answer if rrset.rdtype == rdtype]
    return [record.to_text() for rrset in found for record in rrset]


async def _ask(
    name: dns.name.Name, rdtype: RdataType, address: str, port: int, *, is_recursive: bool
) -> dns.message.Message | None:
    """One answer, NOERROR or NXDOMAIN; anything else is none."""
    query = dns.message.make_query(name, rdtype, want_dnssec=True, payload=PAYLOAD)
    query.flags = (query.flags | dns.flags.AD) if is_recursive else query.flags & ~dns.flags.RD
    try:
        answer, _ = await dns.asyncquery.udp_with_fallback(
            query, address, _TIMEOUT, port, ignore_unexpected=True
        )
    except (OSError, EOFError, dns.exception.DNSException):
        return None
    return answer if answer.rcode() in {dns.rcode.NOERROR, dns.rcode.NXDOMAIN} else None


def _unknown(message: str) -> ResolveError:
    return ResolveError("denial-unproved", message, _REMEDY)
