"""One full probe of one address of a server: what a client would do, with the stage at which it ended."""

import asyncio
import hashlib
import secrets
from collections import deque
from collections.abc import Awaitable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from ipaddress import ip_address
from random import Random, SystemRandom
from typing import Protocol

import structlog
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from nts_core import select
from nts_core.aead import SUPPORTED, AeadId
from nts_core.association import Association, Sample
from nts_core.client import NTP_TIMEOUT, ClientError, Established, Failure, establish, exchange
from nts_core.control import NameFinding, ProbeResult, Stage
from nts_core.cookies import MAX_COOKIES
from nts_core.errors import KissOfDeath, OutOfCookies, printable
from nts_core.tls import Trust
from poolsvc.config import join_endpoint
from poolsvc.errors import InvalidAddress
from poolsvc.lookups import Lookup, judge

_log = structlog.get_logger()
_STAGE_OF = {
    Failure.TCP: Stage.TCP,
    Failure.TLS: Stage.TLS,
    Failure.CERTIFICATE: Stage.CERTIFICATE,
    Failure.KE: Stage.KE,
}
# Octets of a leaf's PEM that are kept, so that it can be revoked; those of CAs have a quarter.
_LEAF_LIMIT = 8192
# Exchanges by NTP, and seconds between two of them.
EXCHANGES, SPACING = 3, 2.0
# A client that has lost no packet asks for the cookie that it has used, and so sends no placeholders: how often we do so.
_NO_PLACEHOLDERS = 0.5
# Where a request with so many placeholders is always lost, clients run out of cookies after a few lost packets.
_SUFFERED = 2
# Admission wants a full step, which ends at 25 ms; the stage tells people of what makes a server useless.
OFFSET_LIMIT = 100_000_000


class ProbeImpossible(Exception):
    """We could not probe: out of descriptors, memory or network."""


def refuse_own_fault(error: Exception) -> None:
    """Raise ProbeImpossible for what says nothing of the server."""
    if isinstance(error, ClientError) and error.code == Failure.LOCAL:
        raise ProbeImpossible(error.message) from None


class Guarding(Protocol):
    """Says which addresses are dialled."""

    def check(self, text: str, *ports: int) -> None:
        """Refuse an address for these ports. Raises InvalidAddress, which says why."""


async def probe(
    domain: str,
    address: str,
    ke_port: int,
    trust: Trust,
    *,
    own_addresses: AbstractSet[str],
    guard: Guarding,
    is_own: bool = False,
    names: Lookup | None = None,
    spacing: float = SPACING,
    patience: float = NTP_TIMEOUT,
    random: Random | None = None,
) -> ProbeResult:
    """All that a client does at one address, as a client does it: the same packets, from new ports, at no fixed times.

    The name as the zone's nameservers give it; key establishment; EXCHANGES by NTP, `spacing` seconds apart, give or take a
    quarter: the first with a cookie from key establishment, the next ones with cookies got by NTP, each with a random number
    of placeholders. One that was lost, and that the others do not speak for, is repeated: five at most, each with `patience`
    seconds. ICMP errors are not listened to: only silence counts. What is wrong with the name is told and fails nothing:
    it is the pool's. Raises ProbeImpossible.
    """
    looking = asyncio.create_task(_named(names, domain, address, own_addresses))
    try:
        found, established = await key_establishment(
            domain, address, ke_port, trust, own_addresses=own_addresses, guard=guard, is_own=is_own
        )
        if established is not None:
            found = await _exchanges(_Course(established, patience), found, spacing, random or SystemRandom())
        finding, detail, took = await looking
    finally:
        looking.cancel()
    return replace(found, names=finding, names_detail=detail, name_took=took)


async def settled(probing: Awaitable[ProbeResult], domain: str, address: str) -> ProbeResult:
    """A probe that always has a result: whatever a server does to the prober counts against that server.

    Raises ProbeImpossible.
    """
    try:
        return await probing
    except ProbeImpossible:
        raise
    except Exception as error:  # noqa: BLE001 - or a server that crashes its probes would keep its score
        _log.error("probe_crashed", domain=domain, address=address, exc_info=error)
        return ProbeResult(address, Stage.TLS, f"the probe failed with {type(error).__name__}")


async def _named(
    names: Lookup | None, domain: str, address: str, own_addresses: AbstractSet[str]
) -> tuple[NameFinding, str, int | None]:
    if names is None:
        return NameFinding.UNKNOWN, "", None
    found = await names.find(domain)
    finding, detail = judge(found, address, own_addresses)
    return finding, detail, None if found is None else found.took


async def key_establishment(
    domain: str,
    address: str,
    ke_port: int,
    trust: Trust,
    *,
    own_addresses: AbstractSet[str],
    guard: Guarding,
    is_own: bool = False,
    offered: Sequence[AeadId] = SUPPORTED,
) -> tuple[ProbeResult, Established | None]:
    """The first part of a probe: what was found so far, and what NTP may be asked with if nothing was wrong.

    Proved or not, each address is checked again before it is dialled: settings may have changed since, or the
    database have come from elsewhere. A certificate that `is_own`, ordered by the member's account, has to be one that
    the pool could revoke. Raises ProbeImpossible when the fault is this host's: nothing was found out about the server.
    """
    try:
        guard.check(address, ke_port)
    except InvalidAddress as error:
        return ProbeResult(address, Stage.TCP, f"not dialled: {error.detail}"), None
    try:
        established = await establish(domain, address, ke_port, trust, offered=offered)
    except ClientError as error:
        refuse_own_fault(error)
        stage = _STAGE_OF[Failure(error.code)]
        is_silent = error.is_silent or stage is Stage.TCP
        return ProbeResult(address, stage, error.message, is_silent=is_silent), None
    leaf = established.chain[0]
    found = ProbeResult(
        address,
        None,
        "",
        fingerprint=hashlib.sha256(leaf.public_bytes(Encoding.DER)).hexdigest(),
        serial=f"{leaf.serial_number:x}",
        not_before=int(leaf.not_valid_before_utc.timestamp()),
        not_after=int(leaf.not_valid_after_utc.timestamp()),
        leaf=_copy(leaf),
        aead=established.result.keys.aead,
        ntp=join_endpoint(printable(established.ntp_host), established.ntp_port),
        tcp_took=established.connected,
        tls_took=established.secured - established.connected,
        ke_took=established.took - established.secured,
    )
    if is_own and (why := why_irrevocable(leaf, domain)) is not None:
        return replace(found, failed=Stage.CERTIFICATE, detail=why), None
    if (astray := _astray(established, own_addresses, guard)) is not None:
        return replace(found, failed=Stage.KE, detail=f"sends clients astray: {astray}"), None
    if len(established.result.cookies) < MAX_COOKIES:
        detail = f"gave {len(established.result.cookies)} cookies instead of {MAX_COOKIES}"
        return replace(found, failed=Stage.COOKIES, detail=detail), None
    return found, established


def _copy(leaf: x509.Certificate) -> str | None:
    """What is kept of a certificate, unless it is too long."""
    pem = leaf.public_bytes(Encoding.PEM).decode()
    return pem if len(pem) <= _LEAF_LIMIT else None


def why_irrevocable(leaf: x509.Certificate, domain: str) -> str | None:
    """Why the pool could not have a certificate of a member's own account revoked, and what to do.

    Its accounts can prove control of the pool's names alone, and it keeps no copy of any length.
    """
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if [name.value for name in names] != [domain]:
        return f"the certificate is for other names as well: order one for {domain} alone"
    if _copy(leaf) is None:
        return f"the certificate has more than {_LEAF_LIMIT} characters of PEM: order a shorter one"
    return None


def _astray(established: Established, own_addresses: AbstractSet[str], guard: Guarding) -> str | None:
    """Why nothing is sent to where records 6 and 7 lead: only the server's own addresses are probed."""
    try:
        guard.check(established.ntp_host, established.ntp_port)
    except InvalidAddress as error:
        return error.detail
    if str(ip_address(established.ntp_host)) not in own_addresses:
        return f"{established.ntp_host} is not a proved address of the server"
    return None


@dataclass(frozen=True, slots=True)
class _Lost:
    """A request without an authentic answer."""

    octets: int
    placeholders: int
    why: str


class _Request(Association):
    """One request that knows how long it was."""

    octets = 0

    def poll(self) -> bytes:
        datagram = super().poll()
        self.octets = len(datagram)
        return datagram


class _Kissed(Exception):
    """An authentic kiss code."""

    def __init__(self, kiss: KissOfDeath, stage: Stage) -> None:
        super().__init__(str(kiss))
        self.kiss = kiss
        self.stage = stage


class _Course:
    """The exchanges of one probe. Cookies got by NTP are used before those of key establishment, each once."""

    def __init__(self, established: Established, patience: float) -> None:
        self._established = established
        self._patience = patience
        self._from_ke = deque(established.result.cookies)
        self._by_ntp: deque[bytes] = deque()
        self.samples: list[Sample] = []
        self.lost: list[_Lost] = []
        self.longest: int | None = None
        self.has_ntp_cookie_worked = False

    @property
    def may_have_lost_cookie(self) -> bool:
        """Whether no cookie that came by NTP has worked, though there is one to try."""
        return bool(self._by_ntp) and not self.has_ntp_cookie_worked

    @property
    def suspect(self) -> _Lost | None:
        """The shortest request that was lost, and is longer than all that were answered."""
        longer = [each for each in self.lost if self.longest is not None and each.octets > self.longest]
        return min(longer, key=lambda each: each.octets, default=None)

    async def exchange(self, placeholders: int) -> None:
        """One more, from a new port. Raises _Kissed, ProbeImpossible, OutOfCookies."""
        is_by_ntp = bool(self._by_ntp)
        if not is_by_ntp and not self._from_ke:
            raise OutOfCookies("no cookies left")
        cookie = (self._by_ntp if is_by_ntp else self._from_ke).popleft()
        # As many placeholders as a client sends that has so many cookies left.
        jar = (cookie,) * (MAX_COOKIES - placeholders)
        request = _Request(replace(self._established.result, cookies=jar), secrets.token_bytes)
        try:
            sample = await exchange(
                request,
                self._established.ntp_host,
                self._established.ntp_port,
                timeout=self._patience,
            )
        except KissOfDeath as kiss:
            if kiss.authentic:
                raise _Kissed(kiss, _stage_of(is_by_ntp=is_by_ntp)) from None
            # NTSN means that the server lost the key of a cookie that it has just given; anybody may have said so.
            self.lost.append(_Lost(request.octets, placeholders, str(kiss)))
        except ClientError as error:
            refuse_own_fault(error)
            self.lost.append(_Lost(request.octets, placeholders, error.message))
        else:
            self.samples.append(sample)
            self.longest = max(self.longest or 0, request.octets)
            self.has_ntp_cookie_worked |= is_by_ntp
            self._by_ntp.extend(list(request.jar)[-sample.cookies :] if sample.cookies else ())


def _stage_of(*, is_by_ntp: bool) -> Stage:
    return Stage.NTP_NTP_COOKIE if is_by_ntp else Stage.NTP_KE_COOKIE


def _draw_placeholders(random: Random) -> int:
    """As clients have it: mostly none, and more after lost packets."""
    return 0 if random.random() < _NO_PLACEHOLDERS else random.randrange(1, MAX_COOKIES)


async def _exchanges(course: _Course, found: ProbeResult, spacing: float, random: Random) -> ProbeResult:
    wait = False

    async def one_more(placeholders: int) -> None:
        nonlocal wait
        if wait:
            await asyncio.sleep(spacing * random.uniform(0.75, 1.25))
        wait = True
        await course.exchange(placeholders)

    filtered: _Lost | None = None
    try:
        for _ in range(EXCHANGES):
            await one_more(_draw_placeholders(random))
        # What was lost by chance is made up for, so that what is left is no chance.
        if course.may_have_lost_cookie:
            await one_more(0)
        if (suspect := course.suspect) is not None:
            lost_before = len(course.lost)
            await one_more(suspect.placeholders)
            filtered = suspect if len(course.lost) > lost_before else None
    except OutOfCookies:
        pass
    except _Kissed as kissed:
        found = _counted(found, course, filtered)
        return replace(found, failed=kissed.stage, detail=str(kissed), kiss=kissed.kiss.code)
    found = _counted(found, course, filtered)
    if not course.samples or course.may_have_lost_cookie:
        stage = _stage_of(is_by_ntp=bool(course.samples))
        return replace(found, failed=stage, detail=course.lost[-1].why, is_silent=not course.samples)
    result = measured(found, course.samples)
    if filtered is not None and filtered.placeholders <= _SUFFERED and result.failed is None:
        detail = (
            f"no answer to {filtered.octets} octets, while {course.longest} pass: clients lose their cookies"
        )
        asked = result.asked + filtered.placeholders + 1
        return replace(result, failed=Stage.COOKIES, detail=detail, asked=asked)
    return result


def _counted(found: ProbeResult, course: _Course, filtered: _Lost | None) -> ProbeResult:
    return replace(
        found,
        exchanges=len(course.samples) + len(course.lost),
        lost=sum(filtered is None or each.octets < filtered.octets for each in course.lost),
        longest=course.longest,
        filtered=None if filtered is None else filtered.octets,
    )


def measured(found: ProbeResult, samples: Sequence[Sample]) -> ProbeResult:
    """What is found with these samples, of which there is at least one."""
    best = select.best(samples)
    result = replace(
        found,
        offset=best.offset,
        delay=best.delay,
        stratum=best.stratum,
        leap=best.leap,
        root_distance=best.root_distance,
        asked=sum(sample.asked for sample in samples),
        cookies=sum(sample.cookies for sample in samples),
    )
    if result.cookies < result.asked:
        detail = f"{result.cookies} of {result.asked} cookies came by NTP"
        return replace(result, failed=Stage.COOKIES, detail=detail)
    if not best.synchronised:
        return replace(result, failed=Stage.OFFSET, detail="the server says that it is not synchronised")
    if abs(best.offset) > OFFSET_LIMIT:
        detail = f"the clock is {best.offset / 1e9:+.3f} s off; at most {OFFSET_LIMIT / 1e9:g} s is useful"
        return replace(result, failed=Stage.OFFSET, detail=detail)
    return result
