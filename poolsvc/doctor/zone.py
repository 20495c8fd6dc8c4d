"""The zone: what the primary lets us do, what every nameserver shows, and how the parent points to it."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import dns.dnssec
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rrset
from dns.rdatatype import RdataType
from dns.rdtypes.ANY.DNSKEY import DNSKEY
from dns.rdtypes.ANY.DS import DS
from dns.rdtypes.ANY.RRSIG import RRSIG
from dns.rdtypes.ANY.SOA import SOA

from nts_core.resolve import ResolveError, Resolver, is_vouched
from nts_core.srv import ANSWER_OCTETS, MAX_TARGETS
from nts_core.verdict import Verdict
from poolsvc.config import split_endpoint
from poolsvc.delegation import MAX_RECORDS, NoReply, answered, ask
from poolsvc.doctor.report import (
    QUESTION_TIMEOUT,
    Examination,
    Finding,
    Unknowable,
    fail,
    ok,
    skipped,
    warn,
    worst,
)
from poolsvc.errors import InvalidAddress
from poolsvc.names import check_address, narrowness
from poolsvc.primary import Nameserver, PublishError, Unreachable
from poolsvc.publication import primary_config, zone_policy
from poolsvc.publisher import Publisher
from poolsvc.zone import CLOSED

TRANSFER_TIMEOUT = 20.0
SKEW = timedelta(seconds=60)  # of the 300 s at which TSIG ends
LONGEST_DENIAL = 300  # seconds for which a new server's name may be denied
SHORTEST_SIGNATURE = timedelta(days=3)


async def primary(at: Examination) -> Finding:
    return await _authority(at, Nameserver(*split_endpoint(at.settings.dns.primary)))


async def transfer(at: Examination) -> Finding:
    try:
        seen = await _publisher(at).observe()
    except Unreachable as error:
        return fail(str(error), "see the check primary")
    except PublishError as error:
        return fail(
            str(error), "allow AXFR with the key of dns.tsig_name and the secret of dns.tsig_secret_file"
        )
    epoch = "not written by a registry yet" if seen.epoch is None else f"epoch {seen.epoch}"
    return ok(f"serial {seen.serial}, {len(seen.zone)} RRsets of ours, {epoch}")


async def update(at: Examination) -> Finding:
    try:
        signed = await _publisher(at).rehearse()
    except Unreachable as error:
        return fail(str(error), "see the check primary")
    except PublishError as error:
        return fail(
            str(error),
            "compare the key and the update rights at the primary with those that `poolsvc init` writes",
        )
    skew = abs(datetime.now(UTC) - signed)
    text = f"allowed; the clocks differ by {skew.total_seconds():.0f} s"
    return warn(text, "set both clocks: from 300 s on the primary refuses") if skew > SKEW else ok(text)


async def nameservers(at: Examination) -> Finding:
    """Serials that differ for a moment are normal, and for good where a server signs by itself."""
    servers = _nameservers(at)
    found = worst(await asyncio.gather(*(_authority(at, server) for server in servers)))
    private = [
        server.address
        for server in servers
        if not at.settings.allow_private_addresses and not _is_public(server)
    ]
    if found.verdict is Verdict.OK and private:
        return fail(f"{', '.join(private)}: not public", "give the addresses at which clients reach them")
    if found.verdict is not Verdict.OK:
        return found
    soas = await asyncio.gather(*(_soa(at, server) for server in servers))
    serials = {str(server): soa.serial for server, soa in zip(servers, soas, strict=True) if soa is not None}
    if len(set(serials.values())) > 1:
        shown = ", ".join(f"{server} has {serial}" for server, serial in serials.items())
        return warn(
            f"the serials differ: {shown}", "repeat; if they stay so, see why transfers to a secondary fail"
        )
    return ok(f"{len(servers)} answer with authority, serial {next(iter(serials.values()), '-')}")


async def negative_ttl(at: Examination) -> Finding:
    soa, ttl = await _first_soa(at)
    denial = min(ttl, soa.minimum)
    text = f"{denial} s"
    if denial > LONGEST_DENIAL:
        return warn(
            text, f"lower the SOA minimum to 60: each new server waits {denial} s for its certificate"
        )
    return ok(text)


async def answer_size(at: Examination) -> Finding:
    note = narrowness(at.settings.pool)
    if note is not None:
        return warn(note, "a shorter name would offer clients more servers at a time")
    return ok(f"{MAX_TARGETS} servers fit an SRV answer of {ANSWER_OCTETS} octets")


async def signatures(at: Examination) -> Finding:
    return worst(await asyncio.gather(*(_signed(at, server) for server in _nameservers(at))))


async def caa(at: Examination) -> Finding:
    """`servers.POOL` closes every name that has no CAA of its own; the publisher makes it."""
    servers = f"servers.{at.settings.pool}"
    below, apex = await asyncio.gather(
        _ask_any(at, servers, RdataType.CAA), _ask_any(at, at.settings.pool, RdataType.CAA)
    )
    texts = [record.to_text() for record in answered(below)]
    if texts and texts != [CLOSED]:
        return fail(
            f"{servers} CAA is {', '.join(texts[:MAX_RECORDS])}",
            f"remove what was added by hand; the registry keeps only {CLOSED} there",
        )
    if not texts:
        return warn(f"{servers} has no CAA", "`serve` publishes it first; repeat when it runs")
    if not answered(apex):
        return warn(f"any CA may issue for {at.settings.pool} itself", f"add to the zone: @ CAA {CLOSED}")
    return ok(f"{servers} and {at.settings.pool} are closed")


async def delegation(at: Examination) -> Finding:
    """By a resolver, which may know the zone's own NS only; without a delegation it knows none."""
    if at.resolver is None:
        return skipped("no resolver", "give --resolver ADDRESS")
    pool = at.settings.pool
    answer, ours = await asyncio.gather(
        _resolve(at, at.resolver, RdataType.NS), _ask_any(at, pool, RdataType.NS)
    )
    found, wanted = ({record.to_text().lower() for record in answered(each)} for each in (answer, ours))
    remedy = "give the parent the NS lines of `poolsvc parent-records --config FILE`"
    if not found:
        return fail(f"the resolver finds no NS for {pool} ({_rcode(answer)})", remedy)
    if found != wanted:
        return fail(f"resolvers are told {_list(found)}, the zone says {_list(wanted)}", remedy)
    return ok(_list(found))


async def ds(at: Examination) -> Finding:
    if at.resolver is None:
        return skipped("no resolver", "give --resolver ADDRESS")
    pool = at.settings.pool
    answer, ours = await asyncio.gather(
        _resolve(at, at.resolver, RdataType.DS), _ask_any(at, pool, RdataType.DNSKEY)
    )
    records = [record for record in answered(answer)[:MAX_RECORDS] if isinstance(record, DS)]
    keys = [key for key in answered(ours)[:MAX_RECORDS] if isinstance(key, DNSKEY)]
    remedy = "give the parent the DS lines of `poolsvc parent-records --config FILE`"
    if not records:
        return fail(f"the parent has no DS for {pool} ({_rcode(answer)})", remedy)
    name = dns.name.from_text(pool)
    strange = [record for record in records if not any(is_vouched(name, key, [record]) for key in keys)]
    tags = ", ".join(str(record.key_tag) for record in strange)
    if len(strange) == len(records):
        return fail(
            f"no DS is of a key of the zone (key tags {tags})",
            f"{remedy}; until then resolvers refuse the zone",
        )
    if strange:
        return warn(
            f"of the DS some are of no key of the zone (key tags {tags})", "remove them at the parent"
        )
    return ok(f"{len(records)} DS, each of a key of the zone")


async def chain(at: Examination) -> Finding:
    if at.resolver is None:
        return skipped("no resolver", "give --resolver ADDRESS")
    pool = at.settings.pool
    if at.anchors is not None:
        resolver = Resolver(at.resolver.address, at.resolver.port, at.anchors, QUESTION_TIMEOUT)
        try:
            await resolver.lookup(f"{pool}.", "SOA", at.now)
        except ResolveError as error:
            return fail(error.message, error.remedy)
        return ok("valid from the trust anchor down")
    answer = await ask(
        at.resolver, pool, RdataType.SOA, flags=dns.flags.RD | dns.flags.AD, timeout=QUESTION_TIMEOUT
    )
    if answer.rcode() != dns.rcode.NOERROR or not answered(answer):
        return fail(f"the resolver answers {_rcode(answer)}", "see the checks delegation, ds and signatures")
    if not answer.flags & dns.flags.AD:
        return warn(
            "the resolver does not say that it has validated",
            "give one that validates with --resolver, or a --trust-anchor",
        )
    return ok("the resolver has validated it")


async def _authority(at: Examination, server: Nameserver) -> Finding:
    """Whether it answers for the zone as one who has it, over UDP and TCP."""
    answers = await asyncio.gather(
        *(_asked(server, at.settings.pool, RdataType.SOA, tcp=tcp) for tcp in (False, True))
    )
    for answer in answers:
        if isinstance(answer, NoReply):
            return fail(answer.detail, answer.remedy)
        if answer.rcode() != dns.rcode.NOERROR or not answer.flags & dns.flags.AA or not answered(answer):
            return fail(
                f"{server} is not authoritative for {at.settings.pool} ({_rcode(answer)})",
                "make it serve the zone, or take it out of dns.nameservers and the NS records",
            )
    return ok(f"{server} answers over UDP and TCP")


async def _signed(at: Examination, server: Nameserver) -> Finding:
    """Whether the SOA's signature holds by the keys that the server shows, and for how long."""
    pool = at.settings.pool
    remedy = "turn signing on at the primary; see the policy that `poolsvc init` writes"
    answer, shown = await asyncio.gather(
        *(_asked(server, pool, rdtype) for rdtype in (RdataType.SOA, RdataType.DNSKEY))
    )
    for each in (answer, shown):
        if isinstance(each, NoReply):
            return fail(each.detail, each.remedy)
    assert isinstance(answer, dns.message.Message)
    assert isinstance(shown, dns.message.Message)
    name = dns.name.from_text(pool)
    soa = answer.get_rrset(answer.answer, name, dns.rdataclass.IN, RdataType.SOA)
    keys = shown.get_rrset(shown.answer, name, dns.rdataclass.IN, RdataType.DNSKEY)
    if not keys:
        return fail(f"{server} shows no DNSKEY: the zone is not signed", remedy)
    covering = answer.get_rrset(answer.answer, name, dns.rdataclass.IN, RdataType.RRSIG, RdataType.SOA)
    if soa is None or not covering:
        return fail(f"{server} shows no signature over the SOA", remedy)
    ends = [
        datetime.fromtimestamp(signature.expiration, UTC)
        for signature in list(covering)[:MAX_RECORDS]
        if isinstance(signature, RRSIG) and _holds(soa, signature, keys, at.now)
    ]
    if not ends:
        return fail(
            f"{server}: no signature over the SOA is valid now", "see why the primary does not sign anew"
        )
    text = f"{server}: valid until {max(ends):%Y-%m-%d %H:%M} UTC"
    if max(ends) - at.now < SHORTEST_SIGNATURE:
        return warn(text, "let the primary sign earlier: rrsig-refresh 7d on Knot")
    return ok(text)


def _holds(soa: dns.rrset.RRset, signature: RRSIG, keys: dns.rrset.RRset, now: datetime) -> bool:
    try:
        dns.dnssec.validate_rrsig(soa, signature, {keys.name: keys}, now=now.timestamp())
    except (dns.exception.ValidationFailure, dns.exception.UnsupportedAlgorithm):
        return False
    return True


async def _soa(at: Examination, server: Nameserver) -> SOA | None:
    answer = await _asked(server, at.settings.pool, RdataType.SOA)
    records = [] if isinstance(answer, NoReply) else answered(answer)
    return next((record for record in records if isinstance(record, SOA)), None)


async def _first_soa(at: Examination) -> tuple[SOA, int]:
    """The SOA by the first nameserver that has it, and its TTL."""
    answer = await _ask_any(at, at.settings.pool, RdataType.SOA)
    for rrset in answer.answer:
        if rrset.rdtype == RdataType.SOA and isinstance(rrset[0], SOA):
            return rrset[0], rrset.ttl
    raise Unknowable("no nameserver has an SOA for the zone")


async def _ask_any(at: Examination, name: str, rdtype: RdataType) -> dns.message.Message:
    """The answer of the first nameserver that answers for the zone. Raises Unknowable."""
    answers = await asyncio.gather(*(_asked(server, name, rdtype) for server in _nameservers(at)))
    for answer in answers:
        if not isinstance(answer, NoReply) and answer.flags & dns.flags.AA:
            return answer
    raise Unknowable("no nameserver answers for the zone")


async def _asked(
    server: Nameserver, name: str, rdtype: RdataType, *, tcp: bool = False
) -> dns.message.Message | NoReply:
    try:
        return await ask(server, name, rdtype, tcp=tcp, timeout=QUESTION_TIMEOUT)
    except NoReply as silence:
        return silence


async def _resolve(at: Examination, resolver: Nameserver, rdtype: RdataType) -> dns.message.Message:
    """What a resolver is told, valid or not."""
    flags = dns.flags.RD | dns.flags.CD
    answer = await ask(resolver, at.settings.pool, rdtype, flags=flags, timeout=QUESTION_TIMEOUT)
    if answer.rcode() not in {dns.rcode.NOERROR, dns.rcode.NXDOMAIN}:
        raise NoReply(
            f"the resolver {resolver} answers {_rcode(answer)}", remedy="give another one with --resolver"
        )
    return answer


def _publisher(at: Examination) -> Publisher:
    """As `serve` makes it, but for the CAs, and with less patience."""
    try:
        config = primary_config(at.settings)
        patience = replace(config, timeout=QUESTION_TIMEOUT, transfer_timeout=TRANSFER_TIMEOUT)
        return Publisher(zone_policy(at.settings), patience)
    except (OSError, ValueError, dns.exception.DNSException):
        raise Unknowable("needs dns.tsig_name and dns.tsig_secret_file") from None


def _nameservers(at: Examination) -> list[Nameserver]:
    return [Nameserver(*split_endpoint(text)) for text in at.settings.dns.nameservers[:MAX_RECORDS]]


def _is_public(server: Nameserver) -> bool:
    try:
        check_address(server.address, allow_private=False)
    except InvalidAddress:
        return False
    return True


def _rcode(answer: dns.message.Message) -> str:
    return dns.rcode.to_text(answer.rcode())


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names)[:MAX_RECORDS]) or "none"
