"""Whether a pool can be used from this host (asyncio): what `pool-client check` sees, step by step.

`diagnosis` judges what is seen here. Bounds: so many resolvers as `Resolvers` knows; MAX_SERVERS servers, each at one
address of each IP version; there one key establishment and nine NTP packets at most, one after the other. Each
question has a deadline. Nothing is kept, and nothing touches the system's clock.
"""

import asyncio
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from ipaddress import ip_address, ip_network

import dns.asyncquery
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
from cryptography import x509
from dns.rdatatype import RdataType

from nts_core.aead import AeadId
from nts_core.association import Association, Plain, Sample
from nts_core.client import (
    KE_TIMEOUT,
    NTP_TIMEOUT,
    ClientError,
    Established,
    Failure,
    establish,
    exchange,
    ntp_address,
)
from nts_core.cookies import MAX_COOKIES
from nts_core.denial import Witnesses
from nts_core.diagnosis import (
    KeSeen,
    MembersSeen,
    NtpSeen,
    Part,
    ResolverSeen,
    Step,
    Summary,
    Told,
    family,
    judge_clock,
    judge_ke,
    judge_members,
    judge_ntp,
    judge_resolver,
    judge_routes,
    judge_time,
    skipped,
    summarise,
)
from nts_core.errors import KissOfDeath
from nts_core.independence import Candidate
from nts_core.kernel import read_kernel
from nts_core.membership import Membership
from nts_core.pool import COUNT
from nts_core.resolve import NoAnswer, ResolveError, Resolver, Resolvers
from nts_core.srv import MAX_TARGETS, service_name
from nts_core.tls import Trust

MAX_SERVERS = MAX_TARGETS
# All servers have to know it, and of what clients of today offer first it makes the longest requests.
_OFFERED = (AeadId.AES_SIV_CMAC_256,)
_PLACEHOLDERS = MAX_COOKIES - 1
# Of no use for what lies elsewhere: link-local addresses and IPv6's unique local ones (RFC 4193).
_LOCAL = tuple(map(ip_network, ("169.254.0.0/16", "fe80::/10", "fc00::/7")))
# A packet may be lost for no reason.
_TRIES = 2


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds for one question: to a resolver, to an NTS-KE port, to an NTP port."""

    dns: float = 3.0
    ke: float = KE_TIMEOUT
    ntp: float = NTP_TIMEOUT


class Check:
    """One look at a pool. `tell` is given each step as soon as it is known, in their order."""

    def __init__(
        self,
        pool: str,
        resolvers: Sequence[Resolver],
        roots: Sequence[x509.Certificate],
        *,
        tell: Callable[[Step], object] = lambda _step: None,
        patience: Patience | None = None,
        now: Callable[[], float] = time.time,
        is_synchronised: Callable[[], bool] = lambda: read_kernel().synchronised,
    ) -> None:
        self.pool = pool
        self.steps: list[Step] = []
        self._resolvers = tuple(resolvers)
        self._roots = tuple(roots)
        self._tell = tell
        self._patience = patience or Patience()
        self._now = now
        self._is_synchronised = is_synchronised

    async def run(self) -> Summary:
        """Go through all steps; `steps` has them then. Never raises for what the network or a server does."""
        working: list[Candidate] = []
        good = await self._look_at_resolvers()
        if good:
            members = await self._look_at_members(good)
            working = await self._look_at_servers(members)
        else:
            self._skip(Part.SRV, "no resolver gives answers to rely on")
        return summarise(self.steps, working, COUNT)

    def _note(self, *steps: Step) -> None:
        for step in steps:
            self.steps.append(step)
            self._tell(step)

    def _skip(self, first: Part, why: str) -> None:
        """All parts from one on."""
        parts = list(Part)
        self._note(*(skipped(part, self.pool, why) for part in parts[parts.index(first) :]))

    # DNS

    async def _look_at_resolvers(self) -> list[Resolver]:
        """Those that can be relied on."""
        seen = await asyncio.gather(*map(self._ask_resolver, self._resolvers))
        for each in seen:
            self._note(*judge_resolver(each))
        good = [resolver for resolver, each in zip(self._resolvers, seen, strict=True) if each.is_good]
        now = datetime.fromtimestamp(self._now(), UTC)
        is_expired = not good and any(each.is_expired for each in seen)
        self._note(judge_clock(now, is_synchronised=self._is_synchronised(), is_expired=is_expired))
        return good

    async def _ask_resolver(self, resolver: Resolver) -> ResolverSeen:
        about = f"{resolver.address} port {resolver.port}"
        short = await self._question(resolver, over_tcp=False)
        if short is not None:
            return ResolverSeen(about, short)
        validated, tcp = await asyncio.gather(
            self._validate(resolver), self._question(resolver, over_tcp=True)
        )
        return ResolverSeen(about, short, validated, tcp)

    async def _question(self, resolver: Resolver, *, over_tcp: bool) -> ResolveError | None:
        """Why there is no answer to a question without DNSSEC, for which 512 octets are enough over UDP."""
        query = dns.message.make_query(service_name(self.pool), RdataType.SRV)
        query.flags |= dns.flags.CD
        timeout = self._patience.dns / _TRIES
        error = ""
        for _ in range(_TRIES):
            try:
                if over_tcp:
                    answer = await dns.asyncquery.tcp(query, resolver.address, timeout, resolver.port)
                else:
                    answer = await dns.asyncquery.udp(
                        query, resolver.address, timeout, resolver.port, ignore_unexpected=True
                    )
            except (OSError, EOFError, dns.exception.DNSException) as caught:
                error = str(caught) or type(caught).__name__
                continue
            if answer.rcode() in {dns.rcode.NOERROR, dns.rcode.NXDOMAIN}:
                return None
            text = dns.rcode.to_text(answer.rcode())
            return ResolveError(
                "resolver-failed", f"it answers {text} for {self.pool}", "try another resolver"
            )
        return ResolveError(
            "resolver-unreachable",
            f"it does not answer: {error}",
            "check its address and port, and that UDP and TCP to it pass; or try another resolver",
        )

    async def _validate(self, resolver: Resolver) -> ResolveError | None:
        """Why the pool's list is not valid; of a pool without one, the keys of the anchor's zone."""
        owner = service_name(self.pool)
        try:
            with suppress(NoAnswer):
                await resolver.lookup(owner, "SRV", self._now())
                return None
            anchor = resolver.anchors.above(dns.name.from_text(owner))
            await resolver.lookup(str(anchor), "DNSKEY", self._now())
        except ResolveError as error:
            return error
        return None

    async def _look_at_members(self, resolvers: Sequence[Resolver]) -> list[Candidate]:
        lookup = Resolvers(resolvers)
        seen = MembersSeen()
        try:
            answer = await lookup.lookup(service_name(self.pool), "SRV", self._now())
            seen = MembersSeen(ttl=answer.ttl)
        except ResolveError:
            pass  # The look below says what it means.
        denier = Witnesses([(each.address, each.port) for each in resolvers])
        look = await Membership(self.pool, lookup, denier).look((), self._now())
        seen = replace(seen, listed=look.listed, unusable=look.unusable, problem=look.problem)
        self._note(*judge_members(self.pool, seen, COUNT))
        return look.listed[:MAX_SERVERS]

    # Servers

    async def _look_at_servers(self, members: Sequence[Candidate]) -> list[Candidate]:
        """Those that can be used, with the same time."""
        if not members:
            self._skip(Part.KE, "there are no servers to ask")
            return []
        places = [(server, address) for server in members for address in _one_of_each_version(server)]
        reached = [(server, address) for server, address in places if _has_route(address, server.port)]
        missing = {family(address) for _, address in places} - {family(address) for _, address in reached}
        self._note(*judge_routes(self.pool, sorted(missing), is_any_left=bool(reached)))
        if not reached:
            self._skip(Part.NTP, "no server can be reached")
            return []
        established = await asyncio.gather(*(self._establish(server, address) for server, address in reached))
        now = datetime.fromtimestamp(self._now(), UTC)
        self._note(*(judge_ke(seen, now) for seen, _ in established))
        asked = [
            (server, each)
            for (server, _), (_, each) in zip(reached, established, strict=True)
            if each is not None
        ]
        if not asked:
            self._skip(Part.NTP, "no server gave cookies")
            return []
        seen = await asyncio.gather(*(self._ask_ntp(server.name, each) for server, each in asked))
        self._note(*map(judge_ntp, seen))
        told: dict[str, Told] = {}
        for (server, _), each in zip(asked, seen, strict=True):
            if each.sample is not None:
                told.setdefault(server.name, Told(server, each.sample))
        step, right = judge_time(self.pool, list(told.values()))
        self._note(step)
        return right

    async def _establish(self, server: Candidate, address: str) -> tuple[KeSeen, Established | None]:
        trust = Trust.of(self._roots, datetime.fromtimestamp(self._now(), UTC))
        seen = KeSeen(server.name, address, server.port)
        try:
            done = await establish(
                server.name, address, server.port, trust, offered=_OFFERED, timeout=self._patience.ke
            )
        except ClientError as error:
            return replace(seen, error=error), None
        result = done.result
        found = replace(
            seen, chain=done.chain, aead=result.keys.aead, cookies=len(result.cookies), took=done.took
        )
        return found, done

    async def _ask_ntp(self, name: str, established: Established) -> NtpSeen:
        seen = NtpSeen(name, established.address, established.ntp_port)
        try:
            host = await ntp_address(established)
            return await _Lengths(established, host, self._patience.ntp).measure(replace(seen, address=host))
        except ClientError as error:
            return replace(seen, error=error)


def _one_of_each_version(server: Candidate) -> list[str]:
    return list({family(address): address for address in reversed(server.addresses)}.values())


def _has_route(address: str, port: int) -> bool:
    """Whether this host would know where to send to, and from an address that can be answered; nothing is sent."""
    kind = socket.AF_INET6 if family(address) == 6 else socket.AF_INET
    try:
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect((address, port))
            own = ip_address(probe.getsockname()[0])
    except OSError:
        return False
    return not any(own in network and ip_address(address) not in network for network in _LOCAL)


@dataclass(frozen=True, slots=True)
class _Came:
    """What an answer brought: a time, or a kiss code."""

    sample: Sample | None = None
    kiss: str = ""


class _Lengths:
    """Requests of different lengths to one NTP port, one after the other, each with a cookie of its own.

    The longest goes first after the plain one; only if it is not answered, shorter ones follow: the shortest, and then
    halfway between what is answered and what is not. Of a packet, so much can be lost on its way there or back.
    """

    def __init__(self, established: Established, host: str, timeout: float) -> None:
        self._established = established
        self._cookies = list(established.result.cookies)
        self._host = host
        self._timeout = timeout

    async def measure(self, seen: NtpSeen) -> NtpSeen:
        """Raises ClientError when nothing can be sent from here."""
        plain = await self._answered(lambda: Plain(secrets.token_bytes))
        seen = replace(seen, is_plain_answered=plain is not None, full=self._length(_PLACEHOLDERS))
        came = await self._request(_PLACEHOLDERS)
        if came is not None:
            return replace(seen, longest=seen.full, sample=came.sample, kiss=came.kiss)
        passes, fails = 0, _PLACEHOLDERS
        came = await self._request(passes)
        if came is None:
            return seen
        while fails - passes > 1 and self._cookies:
            between = (passes + fails) // 2
            if await self._request(between, tries=1) is None:
                fails = between
            else:
                passes = between
        return replace(seen, longest=self._length(passes), sample=came.sample, kiss=came.kiss)

    def _association(self, cookie: bytes, placeholders: int) -> Association:
        """For one request: it asks for as many cookies as are missing, and a jar of copies is never drawn from again."""
        jar = (cookie,) * (MAX_COOKIES - placeholders)
        return Association(replace(self._established.result, cookies=jar), secrets.token_bytes)

    def _length(self, placeholders: int) -> int:
        """Of a request, in octets; it is not sent."""
        return len(self._association(self._established.result.cookies[0], placeholders).poll())

    async def _request(self, placeholders: int, tries: int = _TRIES) -> _Came | None:
        def fresh() -> Association:
            return self._association(self._cookies.pop(0), placeholders)

        return await self._answered(fresh, min(tries, len(self._cookies)))

    async def _answered(self, make: Callable[[], Association | Plain], tries: int = _TRIES) -> _Came | None:
        """What came back, None for silence. Raises ClientError when this host cannot send."""
        for _ in range(tries):
            try:
                port = self._established.ntp_port
                return _Came(await exchange(make(), self._host, port, timeout=self._timeout))
            except KissOfDeath as kiss:
                return _Came(kiss=kiss.code)
            except ClientError as error:
                if error.code == Failure.LOCAL:
                    raise
        return None
