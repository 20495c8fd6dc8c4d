"""Whether CAA lets a CA issue, by the rule that Boulder follows (RFC 8659, RFC 8657).

The name and all its parents are asked at once. The set of the nearest one that has any decides; that a name does not
exist counts as an empty set; any other failure refuses, unless a nearer set has decided.
"""

import asyncio
from dataclasses import dataclass

import dns.asyncquery
import dns.exception
import dns.message
import dns.rcode
import dns.rdatatype
from dns.rdtypes.ANY.CAA import CAA

_DEADLINE = 5.0
_KNOWN = frozenset({b"issue", b"issuewild", b"issuemail", b"iodef"})
_CRITICAL = 0x80


@dataclass(frozen=True, slots=True)
class Issuer:
    """A CA that wants to issue: its CAA identity, the account that asks, and how control was proved."""

    identity: str
    account_uri: str
    method: str | None


async def refusal(resolver: tuple[str, int], name: str, issuer: Issuer) -> str | None:
    """Why the CA must not issue for a name; None when it may."""
    labels = name.rstrip(".").split(".")
    names = [".".join(labels[start:]) for start in range(len(labels))]
    found = await asyncio.gather(*(_records(resolver, one) for one in names), return_exceptions=True)
    for one, records in zip(names, found, strict=True):
        if isinstance(records, BaseException):
            return f"While processing CAA for {name}: looking up CAA for {one}: {records}"
        if records:
            return None if _permits(records, issuer) else f"CAA record for {one} prevents issuance"
    return None


async def _records(resolver: tuple[str, int], name: str) -> list[CAA]:
    query = dns.message.make_query(name, dns.rdatatype.CAA)
    try:
        answer, _ = await dns.asyncquery.udp_with_fallback(query, resolver[0], _DEADLINE, resolver[1])
    except dns.exception.Timeout:
        raise OSError("no answer") from None
    if answer.rcode() not in {dns.rcode.NOERROR, dns.rcode.NXDOMAIN}:
        raise OSError(dns.rcode.to_text(answer.rcode()))
    return [rdata for rrset in answer.answer for rdata in rrset if isinstance(rdata, CAA)]


def _permits(records: list[CAA], issuer: Issuer) -> bool:
    if any(record.flags & _CRITICAL and record.tag.lower() not in _KNOWN for record in records):
        return False
    values = [record.value.decode() for record in records if record.tag.lower() == b"issue"]
    return not values or any(_names(value, issuer) for value in values)


def _names(value: str, issuer: Issuer) -> bool:
    """Whether one `issue` value lets the issuer; a parameter given twice lets nobody."""
    identity, *rest = (part.strip() for part in value.split(";"))
    pairs = [part.partition("=")[::2] for part in rest if part]
    parameters = dict(pairs)
    if identity != issuer.identity or len(parameters) < len(pairs):
        return False
    methods = parameters.get("validationmethods")
    return parameters.get("accounturi", issuer.account_uri) == issuer.account_uri and (
        methods is None or issuer.method in methods.split(",")
    )
