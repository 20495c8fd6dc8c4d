"""What the parent zone should hold, by what the primary serves; and plain questions to DNS servers."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import dns.asyncquery
import dns.dnssec
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset
from dns.rdatatype import RdataType
from dns.rdtypes.ANY.DNSKEY import DNSKEY
from dns.rdtypes.ANY.DS import DS
from dns.rdtypes.ANY.NS import NS
from dns.rdtypes.dnskeybase import Flag

from poolsvc.errors import PoolError
from poolsvc.primary import Nameserver
from poolsvc.zone import CLOSED

PAYLOAD = 1232
TRIES = 2
PARENT_TTL = 3600
MAX_RECORDS = 16  # nameservers or keys of a zone, addresses of a nameserver


class NoReply(PoolError):
    """A DNS server that is silent, or answers with nothing to rely on."""

    code = "no-reply"


@dataclass(frozen=True, slots=True)
class ParentRecords:
    """Lines in zone-file form; an unsigned zone has no `ds`. The CAA belongs into the pool's own zone."""

    ns: tuple[str, ...]
    glue: tuple[str, ...]
    ds: tuple[str, ...]
    caa: str


def planned_records(pool: str, nameservers: Mapping[str, Iterable[str]]) -> ParentRecords:
    """The records for a zone that is not there yet, with the addresses of its nameservers by their names."""
    glue = [
        _line(name, "AAAA" if ":" in address else "A", address)
        for name, addresses in nameservers.items()
        if _is_inside(name, pool)
        for address in addresses
    ]
    return ParentRecords(
        ns=tuple(_line(pool, "NS", f"{name}.") for name in nameservers),
        glue=tuple(glue),
        ds=(),
        caa=_line(pool, "CAA", CLOSED),
    )


async def parent_records(pool: str, primary: Nameserver, timeout: float = 5.0) -> ParentRecords:
    """The records by what the primary serves; `timeout` (seconds) is for each question. Raises NoReply."""
    answer = await ask(primary, pool, RdataType.NS, timeout=timeout)
    names = [target.to_text(omit_final_dot=True).lower() for target in _targets(answer)]
    if not names:
        raise NoReply(
            f"the primary {primary} does not serve {pool}", remedy="begin the zone, as `poolsvc init` says"
        )
    glue = [
        _line(name, RdataType.to_text(rdtype), record.to_text())
        for name in names
        if _is_inside(name, pool)
        for rdtype in (RdataType.AAAA, RdataType.A)
        for record in answered(await ask(primary, name, rdtype, timeout=timeout))[:MAX_RECORDS]
    ]
    keys = answered(await ask(primary, pool, RdataType.DNSKEY, timeout=timeout))
    return ParentRecords(
        ns=tuple(_line(pool, "NS", f"{name}.") for name in names),
        glue=tuple(glue),
        ds=tuple(_line(pool, "DS", record.to_text()) for record in digests(pool, keys)),
        caa=_line(pool, "CAA", CLOSED),
    )


def digests(pool: str, keys: Sequence[dns.rdata.Rdata]) -> list[DS]:
    """The DS (SHA-256) of each key that is meant for the parent to name."""
    return [
        dns.dnssec.make_ds(dns.name.from_text(pool), key, "SHA256")
        for key in keys[:MAX_RECORDS]
        if isinstance(key, DNSKEY) and key.flags & Flag.SEP and not key.flags & Flag.REVOKE
    ]


async def ask(
    server: Nameserver,
    name: str,
    rdtype: RdataType,
    *,
    flags: int = 0,
    tcp: bool = False,
    timeout: float = 5.0,
) -> dns.message.Message:
    """One question, over TCP when told or when the answer is truncated; any rcode returns. Raises NoReply."""
    query = dns.message.make_query(name, rdtype, want_dnssec=True, payload=PAYLOAD, flags=flags)
    failure = ""
    for _ in range(1 if tcp else TRIES):
        try:
            if tcp:
                return await dns.asyncquery.tcp(query, server.address, timeout, server.port)
            answer, _ = await dns.asyncquery.udp_with_fallback(
                query,
                server.address,
                timeout / TRIES,
                server.port,
                ignore_unexpected=True,
                ignore_errors=True,
            )
            return answer
        except dns.exception.Timeout:
            failure = f"nothing within {timeout:g} s"
        except OSError as error:
            failure = os.strerror(error.errno) if error.errno else str(error)
        except (EOFError, dns.exception.DNSException) as error:
            failure = str(error) or type(error).__name__
    raise NoReply(
        f"{server} does not answer over {'TCP' if tcp else 'UDP'}: {failure}",
        remedy=f"see that it runs, and that port {server.port} is open for UDP and TCP on the way to it",
    )


def answered(answer: dns.message.Message) -> list[dns.rdata.Rdata]:
    """The records that were asked for; none when there are none."""
    asked = answer.question[0]
    rrset = answer.get_rrset(answer.answer, asked.name, dns.rdataclass.IN, asked.rdtype)
    return list(rrset or ())


def _targets(answer: dns.message.Message) -> list[dns.name.Name]:
    return [record.target for record in answered(answer) if isinstance(record, NS)][:MAX_RECORDS]


def _is_inside(name: str, pool: str) -> bool:
    """Whether the parent has to know the address, as the name cannot be asked for without it."""
    return name == pool or name.endswith(f".{pool}")


def _line(owner: str, rdtype: str, text: str) -> str:
    return f"{owner}. {PARENT_TTL} IN {rdtype} {text}"
