"""Lookups that trust no resolver, unless told to: every answer is checked from its signature up to a trust anchor.

The questions go to any recursive or authoritative server with CD and DO set (RFC 4035 section 3.2), and
the positive chain is validated here: the RRset by its zone's keys, those by the DS in the parent, and so
on up to an anchor. Denials are not proved, so `NoAnswer` is the server's word only. What this refuses
though DNSSEC allows it: wildcards and aliases, neither of which a pool's zone has. The work that a hostile
answer can cause is bounded (CVE-2023-50387, "KeyTrap").

With `Dnssec.TRUST_RESOLVER` the resolver validates and its AD bit is believed (RFC 6840 section 5.8), for a path to it that
nobody can get at. With `Dnssec.OFF` anything is believed; an answer says how it is proved, and what is not leads to no
servers outside of the pool's own names.
"""

import asyncio
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from ipaddress import ip_address
from pathlib import Path
from typing import NoReturn, Protocol

import dns.asyncquery
import dns.dnssec
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdataset
import dns.rdatatype
import dns.rrset
import dns.zonefile
from dns.rdatatype import RdataType
from dns.rdtypes.ANY.DNSKEY import DNSKEY
from dns.rdtypes.ANY.DS import DS
from dns.rdtypes.ANY.RRSIG import RRSIG
from dns.rdtypes.ANY.TXT import TXT
from dns.rdtypes.dnskeybase import Flag
from dns.rdtypes.IN.SRV import SRV

from nts_core.errors import NtsError
from nts_core.metadata import Metadata, parse
from nts_core.srv import is_own, service_name

PAYLOAD = 1232  # octets of a UDP answer that no path has to fragment
TRIES = 2
MAX_QUESTIONS = 40  # of one lookup
MAX_KEYS = 16  # in one zone
MAX_SIGNATURES = 8  # tried on one RRset
MAX_ANSWERS = 16  # SRV targets of a pool, addresses of a name
MAX_ANCHORS = 64
MAX_RESOLVERS = 3  # as in resolv.conf(5)
DIRECT = 600.0  # seconds for which resolvers of no use are left alone
# What one resolver may do to an answer, and another one need not. A denial is anybody's word.
_ELSEWHERE = frozenset(
    {"ad", "bogus", "expired", "resolver-failed", "resolver-no-dnssec", "resolver-unreachable", "unsigned"}
)

_REMEDIES = {
    "ad": "use a validating resolver over a path that can be trusted, or validate here (--dnssec require)",
    "anchor": "give the zone's DS or DNSKEY records, one a line",
    "bogus": "check the trust anchor and try another resolver; answers may be altered on the way",
    "cname": "tell the pool's operator: a target must not be an alias (RFC 2782)",
    "foreign": "validate the answer (--dnssec require), as the name of a region needs; or tell the pool's operator",
    "expired": "your clock may be wrong: set it to within a day, then try again",
    "name": "check the name",
    "no-address": "tell the pool's operator: a target has no addresses",
    "no-answer": "check the name",
    "no-service": "the pool offers no NTS now; try later or another pool",
    "no-srv": "check the pool's name; a new pool lists servers once enough of them work",
    "not-under-anchor": "add the trust anchor of the zone or of one above it",
    "resolver-failed": "try another resolver",
    "resolver-no-dnssec": "use a resolver that passes DNSSEC records on",
    "resolver-unreachable": "check the resolver's address and port and the network",
    "unsigned": "tell the zone's operator that it is not signed up to the trust anchor",
}


class Dnssec(StrEnum):
    """Who validates."""

    REQUIRE = "require"  # we do
    TRUST_RESOLVER = "trust-resolver"
    OFF = "off"  # nobody


class Proof(StrEnum):
    """How an answer is proved."""

    PROVEN = "proven"  # by us
    RESOLVER = "resolver"  # by the resolver's word
    UNPROVEN = "unproven"


class ResolveError(NtsError):
    """A lookup gave nothing to rely on; `code` is stable, `remedy` says what the reader can do."""

    def __init__(self, code: str, message: str, remedy: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.remedy = remedy


class NoAnswer(ResolveError):
    """The server says that there is nothing, without proof; `kind` is "nxdomain" or "nodata"."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__("no-answer", message, _REMEDIES["no-answer"])
        self.kind = kind


def _error(code: str, message: str) -> ResolveError:
    return ResolveError(code, message, _REMEDIES[code])


@dataclass(frozen=True, slots=True)
class TrustAnchors:
    """DS and DNSKEY records that are trusted as they stand, by zone."""

    zones: dict[dns.name.Name, tuple[dns.rdata.Rdata, ...]]

    @classmethod
    def parse(cls, text: str) -> "TrustAnchors":
        """Read zone-file text (TTL and class optional); ResolveError "anchor" when it is not usable."""
        try:
            rrsets = dns.zonefile.read_rrsets(text, rdclass=None, default_ttl=0)
        except (dns.exception.DNSException, ValueError) as error:
            raise _error("anchor", f"not DS or DNSKEY records: {error}") from None
        zones: dict[dns.name.Name, tuple[dns.rdata.Rdata, ...]] = {}
        for rrset in rrsets:
            for record in rrset:
                if not isinstance(record, DS) and not (isinstance(record, DNSKEY) and _usable(record)):
                    kind = dns.rdatatype.to_text(record.rdtype)
                    raise _error("anchor", f"{rrset.name} {kind} cannot be a trust anchor")
                zones[rrset.name] = (*zones.get(rrset.name, ()), record)
        if not zones or sum(map(len, zones.values())) > MAX_ANCHORS:
            raise _error("anchor", f"there must be between one and {MAX_ANCHORS} trust anchors")
        return cls(zones)

    def above(self, name: dns.name.Name) -> dns.name.Name:
        """The closest zone with an anchor at or above `name`."""
        zones = [zone for zone in self.zones if name.is_subdomain(zone)]
        if not zones:
            raise _error("not-under-anchor", f"no trust anchor covers {name}")
        return max(zones, key=len)


# The root's key-signing keys of 2017 and 2024 (https://data.iana.org/root-anchors/root-anchors.xml).
ROOT = TrustAnchors.parse(
    """
. DS 20326 8 2 E06D44B80B8F1D39A95C0B0D7C65D08458E880409BBC683457104237C7F8EC8D
. DS 38696 8 2 683D2D0ACB8C9B712A1948B27F741219298D0A450D612C483AF444A4C0FB2B16
"""
)


@dataclass(frozen=True, slots=True)
class Answer:
    """An RRset; `ttl` (seconds) ends with the signature at the latest."""

    owner: str
    rdtype: str
    rdatas: dns.rdataset.Rdataset
    ttl: int
    proof: Proof


@dataclass(frozen=True, slots=True)
class SrvTarget:
    """One server of a pool; `name` is lower-case without the final dot."""

    name: str
    port: int
    priority: int
    weight: int


@dataclass(frozen=True, slots=True)
class _Valid:
    """An RRset whose signature was checked, and the seconds since 1970 between which that holds."""

    rrset: dns.rrset.RRset
    since: float
    until: float


@dataclass(slots=True)
class Window:
    """From when to when, in seconds since 1970, the present may be. For who does not know the time (`bootstrap`).

    A lookup that is given one in place of the time accepts what was valid at some moment in it, and narrows it to the
    moments at which all of that was: so all signatures of all lookups with one window held together once. The times of
    signatures are read as they stand, as dnspython does; by serial arithmetic (RFC 4034 section 3.1.5) they would mean
    the same from 1970 to 2106 only to who knows the time.
    """

    since: float
    until: float = math.inf
    is_open: bool = True
    # Keys of zones that were valid within it, with when.
    keys: dict[dns.name.Name, _Valid] = field(default_factory=dict)

    @classmethod
    def at(cls, now: datetime | float) -> "Window":
        """A moment that is known."""
        moment = now.timestamp() if isinstance(now, datetime) else now
        return cls(moment, moment, is_open=False)

    def admits(self, since: float, until: float) -> bool:
        """Whether there is a moment in both."""
        return max(self.since, since) <= min(self.until, until)

    def narrow(self, since: float, until: float) -> None:
        """Leave the moments in both."""
        self.since, self.until = max(self.since, since), min(self.until, until)


Moment = datetime | float | Window


class Resolver:
    """Asks one server and validates what it says; keeps the zones' keys for their TTL.

    `timeout` (seconds) bounds a whole lookup.
    """

    def __init__(
        self,
        address: str,
        port: int,
        anchors: TrustAnchors,
        timeout: float = 5.0,
        *,
        dnssec: Dnssec = Dnssec.REQUIRE,
    ) -> None:
        self.address = address
        self.port = port
        self.anchors = anchors
        self.timeout = timeout
        self.dnssec = dnssec
        self.keys: dict[dns.name.Name, _Valid] = {}

    async def lookup(self, owner: str, rdtype: str, now: Moment) -> Answer:
        """The RRset, valid at `now` (seconds since 1970, an aware datetime, or a window, which is narrowed).

        Raises NoAnswer when the server says there is none, else ResolveError.
        """
        try:
            name = dns.name.from_text(owner)
        except dns.exception.DNSException as error:
            raise _error("name", f"{owner!r} is not a domain name: {error}") from None
        window = replace(now) if isinstance(now, Window) else Window.at(now)
        try:
            async with asyncio.timeout(self.timeout):
                if self.dnssec is not Dnssec.REQUIRE:
                    return await self._believed(owner, name, RdataType.make(rdtype))
                valid = await _Walk(self, self.anchors.above(name), window).validated(
                    name, RdataType.make(rdtype)
                )
        except TimeoutError:
            raise _error("resolver-unreachable", f"{self} did not answer in time") from None
        if isinstance(now, Window):
            # Others may have narrowed it meanwhile.
            if not now.admits(window.since, window.until):
                raise _expired(name)
            now.narrow(window.since, window.until)
        ttl = 0 if window.is_open else int(max(0, min(valid.rrset.ttl, valid.until - window.since)))
        return Answer(owner, rdtype, valid.rrset, ttl, Proof.PROVEN)

    async def _believed(self, owner: str, name: dns.name.Name, rdtype: RdataType) -> Answer:
        """What the server says, if it says that it has validated it, or if that is not asked for."""
        answer = await self.ask(name, rdtype)
        has_ad = bool(answer.flags & dns.flags.AD)
        rrset = answer.get_rrset(answer.answer, name, dns.rdataclass.IN, rdtype)
        if rrset is None:
            _raise_absence(answer, name, rdtype)
        if self.dnssec is Dnssec.TRUST_RESOLVER and not has_ad:
            raise _error("ad", f"{self} does not say that it has validated {name}")
        proof = Proof.RESOLVER if self.dnssec is Dnssec.TRUST_RESOLVER else Proof.UNPROVEN
        return Answer(owner, dns.rdatatype.to_text(rdtype), rrset, rrset.ttl, proof)

    async def ask(self, name: dns.name.Name, rdtype: RdataType) -> dns.message.Message:
        """One question over UDP, over TCP when the answer is truncated; NOERROR and NXDOMAIN return."""
        failure = _error("resolver-unreachable", f"{self} did not answer")
        for _ in range(TRIES):
            query = dns.message.make_query(name, rdtype, want_dnssec=True, payload=PAYLOAD)
            query.flags |= dns.flags.CD if self.dnssec is Dnssec.REQUIRE else dns.flags.AD
            try:
                answer, _ = await dns.asyncquery.udp_with_fallback(
                    query, self.address, self.timeout / (TRIES + 1), self.port, ignore_unexpected=True
                )
            except (OSError, EOFError, dns.exception.Timeout) as error:
                failure = _error("resolver-unreachable", f"{self} did not answer: {error}")
                continue
            except dns.exception.DNSException as error:
                failure = _error("resolver-failed", f"{self} sent no DNS answer: {error}")
                continue
            if answer.rcode() in {dns.rcode.NOERROR, dns.rcode.NXDOMAIN}:
                return answer
            text = dns.rcode.to_text(answer.rcode())
            raise _error("resolver-failed", f"{self} answered {text} for {name}")
        raise failure

    def __str__(self) -> str:
        return f"the resolver {self.address} port {self.port}"


class Lookup(Protocol):
    """What gives validated answers: a Resolver, or several."""

    async def lookup(self, owner: str, rdtype: str, now: Moment) -> Answer:
        """As `Resolver.lookup`."""


class Resolvers:
    """Several resolvers, in their order: one that does not answer, strips signatures or alters answers is passed over.

    `passed_over` says which and why, until it is good again. The one that was good last is asked first. With a
    `last_resort`, that is asked when none is good, and for DIRECT seconds alone; then they are tried again.
    """

    def __init__(self, resolvers: Sequence[Resolver], last_resort: Lookup | None = None) -> None:
        self._resolvers = list(resolvers[:MAX_RESOLVERS])
        self._last_resort = last_resort
        self._direct_until = -math.inf
        self.passed_over: dict[str, ResolveError] = {}

    @property
    def is_direct(self) -> bool:
        """Whether the last resort has answered, and is asked first for now."""
        return time.monotonic() < self._direct_until

    async def lookup(self, owner: str, rdtype: str, now: Moment) -> Answer:
        """As `Resolver.lookup`. Raises the first one's error when none is good, or what the last resort knows better."""
        if self.is_direct:
            try:
                return await self._ask_last_resort(owner, rdtype, now)
            except ResolveError as error:
                if error.code not in _ELSEWHERE:
                    raise
                self._direct_until = -math.inf
        failure: ResolveError | None = None
        for resolver in tuple(self._resolvers):
            try:
                answer = await resolver.lookup(owner, rdtype, now)
            except ResolveError as error:
                if error.code not in _ELSEWHERE:
                    self._prefer(resolver)
                    raise
                failure = failure or error
                self.passed_over[str(resolver)] = error
                continue
            self._prefer(resolver)
            return answer
        if self._last_resort is None:
            assert failure is not None
            raise failure
        try:
            return await self._ask_last_resort(owner, rdtype, now)
        except ResolveError as error:
            # That port 53 is closed to the world is common, and says nothing of the pool.
            raise failure if failure is not None and error.code == "resolver-failed" else error from None

    async def _ask_last_resort(self, owner: str, rdtype: str, now: Moment) -> Answer:
        assert self._last_resort is not None
        try:
            answer = await self._last_resort.lookup(owner, rdtype, now)
        except NoAnswer:
            self._direct_until = time.monotonic() + DIRECT
            raise
        self._direct_until = time.monotonic() + DIRECT
        return answer

    def _prefer(self, resolver: Resolver) -> None:
        self.passed_over.pop(str(resolver), None)
        if self._resolvers[0] is not resolver:
            self._resolvers.remove(resolver)
            self._resolvers.insert(0, resolver)


class _Walk:
    """One lookup's way from the RRset up to the anchor, with its budget of questions."""

    def __init__(self, resolver: Resolver, anchor: dns.name.Name, window: Window) -> None:
        self._resolver = resolver
        self._anchor = anchor
        self._window = window
        self._questions = MAX_QUESTIONS

    async def validated(self, name: dns.name.Name, rdtype: RdataType) -> _Valid:
        rrset, signatures = await self._signed(name, rdtype)
        return await self._check(rrset, signatures)

    async def _ask(self, name: dns.name.Name, rdtype: RdataType) -> dns.message.Message:
        if self._questions == 0:
            raise _error("bogus", f"{name} needs more than {MAX_QUESTIONS} questions")
        self._questions -= 1
        return await self._resolver.ask(name, rdtype)

    async def _signed(self, name: dns.name.Name, rdtype: RdataType) -> tuple[dns.rrset.RRset, list[RRSIG]]:
        """The RRset that the server gives and its signatures, nothing checked yet."""
        answer = await self._ask(name, rdtype)
        rrset = answer.get_rrset(answer.answer, name, dns.rdataclass.IN, rdtype)
        if rrset is None:
            _raise_absence(answer, name, rdtype)
        covering = answer.get_rrset(answer.answer, name, dns.rdataclass.IN, RdataType.RRSIG, rdtype)
        signatures = [record for record in covering or () if isinstance(record, RRSIG)]
        if not signatures:
            # Whether this zone is unsigned or the server strips signatures shows at the anchor's keys.
            keys = await self._ask(self._anchor, RdataType.DNSKEY)
            if any(found.rdtype == RdataType.RRSIG for found in keys.answer):
                raise _error("unsigned", f"{name} {dns.rdatatype.to_text(rdtype)} is not signed")
            raise _error("resolver-no-dnssec", f"{self._resolver} leaves out the signatures")
        return rrset, signatures

    async def _check(
        self, rrset: dns.rrset.RRset, signatures: list[RRSIG], keys: dns.rdataset.Rdataset | None = None
    ) -> _Valid:
        """The RRset with the first signature that holds, by `keys` or else by the signer's own keys."""
        kind = dns.rdatatype.to_text(rrset.rdtype)
        failure: ResolveError | None = None
        for signature in signatures[:MAX_SIGNATURES]:
            misfit = self._misfit(rrset, signature)
            if misfit is not None:
                failure = failure or misfit
                continue
            trusted = keys if keys is not None else await self._keys(signature.signer)
            if not self._window.admits(signature.inception, signature.expiration):
                # The keys have narrowed it.
                failure = failure or _expired(rrset.name)
                continue
            now = max(self._window.since, signature.inception)
            try:
                dns.dnssec.validate_rrsig(rrset, signature, {signature.signer: trusted}, now=now)
            except (dns.exception.ValidationFailure, dns.exception.UnsupportedAlgorithm):
                continue
            self._window.narrow(signature.inception, signature.expiration)
            if self._window.is_open:
                return _Valid(rrset, self._window.since, self._window.until)
            until = min(now + min(rrset.ttl, signature.original_ttl), signature.expiration)
            return _Valid(rrset, signature.inception, until)
        raise failure or _error("bogus", f"no signature over {rrset.name} {kind} is valid")

    def _misfit(self, rrset: dns.rrset.RRset, signature: RRSIG) -> ResolveError | None:
        """Why a signature cannot hold whatever the keys are (RFC 4035 section 5.3.1)."""
        name, signer = rrset.name, signature.signer
        is_wrong_side = (name == signer) != (rrset.rdtype == RdataType.DNSKEY)
        if not name.is_subdomain(signer) or (
            rrset.rdtype in {RdataType.DS, RdataType.DNSKEY} and is_wrong_side
        ):
            return _error("bogus", f"{name} is signed by {signer}, which may not")
        if not signer.is_subdomain(self._anchor):
            return _error("not-under-anchor", f"{name} is signed by {signer}, above the trust anchor")
        if signature.labels != len(name) - 1:
            return _error("bogus", f"{name} comes from a wildcard, which no pool has")
        if not self._window.admits(signature.inception, signature.expiration):
            return _expired(name, is_open=self._window.is_open)
        return None

    async def _keys(self, zone: dns.name.Name) -> dns.rrset.RRset:
        """The keys of a zone at or below the anchor."""
        known = self._known(zone)
        if known is not None and self._window.admits(known.since, known.until):
            self._window.narrow(known.since, known.until)
            return known.rrset
        rrset, signatures = await self._signed(zone, RdataType.DNSKEY)
        if len(rrset) > MAX_KEYS:
            raise _error("bogus", f"{zone} has more than {MAX_KEYS} keys")
        records = await self._vouchers(zone)
        vouched = [key for key in rrset if isinstance(key, DNSKEY) and is_vouched(zone, key, records)]
        if not vouched:
            raise _error("bogus", f"none of the keys of {zone} is the one that its DS or anchor names")
        valid = await self._check(rrset, signatures, dns.rdataset.from_rdata_list(rrset.ttl, vouched))
        if self._window.is_open:
            self._window.keys[zone] = valid
        else:
            self._resolver.keys[zone] = valid
        return valid.rrset

    def _known(self, zone: dns.name.Name) -> _Valid | None:
        """What an earlier lookup found out; what one found with the time left open only another such one may use."""
        return (self._window.keys if self._window.is_open else self._resolver.keys).get(zone)

    async def _vouchers(self, zone: dns.name.Name) -> Iterable[dns.rdata.Rdata]:
        """The records that say which keys of the zone to trust: the anchor's, or the parent's DS."""
        if zone == self._anchor:
            return self._resolver.anchors.zones[zone]
        try:
            return (await self.validated(zone, RdataType.DS)).rrset
        except NoAnswer:
            raise _error("unsigned", f"no signed delegation leads to {zone}") from None


def _expired(name: dns.name.Name, *, is_open: bool = True) -> ResolveError:
    if is_open:
        return _error(
            "expired", f"the signature over {name} had ended, or was not valid together with the others"
        )
    return _error("expired", f"the signature over {name} is not valid at the present time")


def _raise_absence(answer: dns.message.Message, name: dns.name.Name, rdtype: RdataType) -> NoReturn:
    if any(rrset.rdtype in {RdataType.CNAME, RdataType.DNAME} for rrset in answer.answer):
        raise _error("cname", f"{name} is an alias")
    kind = "nxdomain" if answer.rcode() == dns.rcode.NXDOMAIN else "nodata"
    raise NoAnswer(kind, f"there is no {dns.rdatatype.to_text(rdtype)} at {name}")


def _usable(key: DNSKEY) -> bool:
    """A zone key that was not revoked (RFC 4034 section 2.1, RFC 5011 section 2.1)."""
    return bool(key.flags & Flag.ZONE) and not key.flags & Flag.REVOKE and key.protocol == 3


def is_vouched(zone: dns.name.Name, key: DNSKEY, records: Iterable[dns.rdata.Rdata]) -> bool:
    """Whether one of the records is the key itself or its DS, with a digest that RFC 9904 still allows."""
    for record in records:
        if record == key:
            return _usable(key)
        if isinstance(record, DS) and (record.key_tag, record.algorithm) == (key.key_id(), key.algorithm):
            try:
                if dns.dnssec.make_ds(zone, key, record.digest_type, validating=True) == record:
                    return _usable(key)
            except (dns.exception.UnsupportedAlgorithm, dns.exception.DeniedByPolicy):
                continue
    return False


@dataclass(frozen=True, slots=True)
class Listing:
    """The pool's answer: its servers in the order to try them (RFC 2782), MAX_ANSWERS at most.

    `refused` are the names of targets that the pool itself does not name, in an answer that is not proved.
    """

    targets: tuple[SrvTarget, ...]
    refused: tuple[str, ...]
    proof: Proof


async def listing(resolver: Lookup, pool: str, now: Moment) -> Listing:
    """Look the pool's servers up. Raises ResolveError, also when there is nobody to use."""
    pool = pool.removesuffix(".").lower()
    try:
        answer = await resolver.lookup(service_name(pool), "SRV", now)
    except NoAnswer as error:
        raise _error("no-srv", f"the pool {pool} lists no servers: {error}") from None
    ordered = answer.rdatas.processing_order()
    records = [srv for srv in ordered if isinstance(srv, SRV) and srv.target != dns.name.root]
    if not records:
        raise _error("no-service", f"the pool {pool} says that it does not offer NTS")
    targets = [
        SrvTarget(srv.target.to_text(omit_final_dot=True).lower(), srv.port, srv.priority, srv.weight)
        for srv in records[:MAX_ANSWERS]
    ]
    # Whoever forged such an answer could name servers with good certificates of their own.
    foreign = (
        [target for target in targets if not is_own(target.name, pool)]
        if answer.proof is Proof.UNPROVEN
        else []
    )
    if len(foreign) == len(targets):
        raise _error(
            "foreign", f"no server of the answer is below servers.{pool}, and nothing proves the answer"
        )
    kept = tuple(target for target in targets if target not in foreign)
    return Listing(kept, tuple(target.name for target in foreign), answer.proof)


async def addresses(resolver: Lookup, name: str, now: Moment) -> list[str]:
    """The addresses of a name, IPv6 first, MAX_ANSWERS at most."""
    found: list[str] = []
    for rdtype in ("AAAA", "A"):
        try:
            answer = await resolver.lookup(f"{name.removesuffix('.')}.", rdtype, now)
        except NoAnswer:
            continue
        found += [record.address for record in answer.rdatas]
    if not found:
        raise _error("no-address", f"{name} has no addresses")
    return found[:MAX_ANSWERS]


async def metadata(resolver: Lookup, name: str, now: Moment) -> Metadata | None:
    """What the pool says of a server, beside its addresses; None when it says nothing that can be relied on."""
    try:
        answer = await resolver.lookup(f"{name.removesuffix('.')}.", "TXT", now)
    except ResolveError:
        return None
    return parse(record.strings for record in answer.rdatas if isinstance(record, TXT))


def system_resolvers() -> list[str]:
    """The addresses of the system's resolvers (resolv.conf(5)), MAX_RESOLVERS at most; none is an empty list."""
    try:
        lines = Path("/etc/resolv.conf").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    words = [line.split() for line in lines]
    named = [each[1] for each in words if len(each) > 1 and each[0] == "nameserver"]
    return [text for text in named if _is_address(text)][:MAX_RESOLVERS]


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
