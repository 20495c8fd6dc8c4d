"""One full probe of one address of a server: what a client would do, with the stage at which it ended."""

import hashlib
import secrets
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from ipaddress import ip_address

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from nts_core import select
from nts_core.aead import SUPPORTED, AeadId
from nts_core.association import Association, Sample
from nts_core.client import ClientError, Established, Failure, establish, exchange
from nts_core.control import ProbeResult, Stage
from nts_core.cookies import MAX_COOKIES
from nts_core.errors import KissOfDeath, OutOfCookies
from nts_core.tls import Trust
from poolsvc.errors import InvalidAddress
from poolsvc.outbound import Guard

_STAGE_OF = {
    Failure.TCP: Stage.TCP,
    Failure.TLS: Stage.TLS,
    Failure.CERTIFICATE: Stage.CERTIFICATE,
    Failure.KE: Stage.KE,
}
# Octets of a leaf's PEM that are kept, so that it can be revoked; those of CAs have a quarter.
_LEAF_LIMIT = 8192
# Admission wants a full step, which ends at 25 ms; the stage tells people of what makes a server useless.
OFFSET_LIMIT = 100_000_000


class ProbeImpossible(Exception):
    """We could not probe: out of descriptors, memory or network."""


def refuse_own_fault(error: Exception) -> None:
    """Raise ProbeImpossible for what says nothing of the server."""
    if isinstance(error, ClientError) and error.code == Failure.LOCAL:
        raise ProbeImpossible(error.message) from None


async def probe(
    domain: str,
    address: str,
    ke_port: int,
    trust: Trust,
    *,
    own_addresses: AbstractSet[str],
    guard: Guard,
    is_own: bool = False,
) -> ProbeResult:
    """Key establishment, an exchange with a cookie from it, another with a cookie got by NTP. Raises ProbeImpossible."""
    found, established = await key_establishment(
        domain,
        address,
        ke_port,
        trust,
        own_addresses=own_addresses,
        guard=guard,
        is_own=is_own,
    )
    return found if established is None else await _exchanges(established, found)


async def key_establishment(
    domain: str,
    address: str,
    ke_port: int,
    trust: Trust,
    *,
    own_addresses: AbstractSet[str],
    guard: Guard,
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
        return ProbeResult(address, _STAGE_OF[Failure(error.code)], error.message), None
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


def _astray(established: Established, own_addresses: AbstractSet[str], guard: Guard) -> str | None:
    """Why nothing is sent to where records 6 and 7 lead: only the server's own addresses are probed."""
    try:
        guard.check(established.ntp_host, established.ntp_port)
    except InvalidAddress as error:
        return error.detail
    if str(ip_address(established.ntp_host)) not in own_addresses:
        return f"{established.ntp_host} is not a proved address of the server"
    return None


async def _exchanges(established: Established, found: ProbeResult) -> ProbeResult:
    # With a single cookie from key establishment, the second exchange must use one that came by NTP.
    association = Association(
        replace(established.result, cookies=established.result.cookies[:1]), secrets.token_bytes
    )
    samples: list[Sample] = []
    for stage in (Stage.NTP_KE_COOKIE, Stage.NTP_NTP_COOKIE):
        try:
            samples.append(await exchange(association, established.ntp_host, established.ntp_port))
        except (ClientError, OutOfCookies) as error:
            refuse_own_fault(error)
            return replace(found, failed=stage, detail=str(error))
        except KissOfDeath as kiss:
            # NTSN means that the server lost the key of a cookie that it has just given.
            code = kiss.code if kiss.authentic else None
            return replace(found, failed=stage, detail=str(kiss), kiss=code)
    return measured(found, samples)


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
