"""The CAs, as far as they can be asked without an account."""

import asyncio
from dataclasses import replace

from poolsvc.acme import AcmeConfig, AcmeError, read_terms
from poolsvc.config import AUTO_PROFILE, AuthoritySettings
from poolsvc.doctor.report import DEADLINE, Examination, Finding, Verdict, fail, ok, warn


async def directory(at: Examination) -> Finding:
    """Each reachable over TLS that we trust, and of the name, profile and terms that the settings suppose."""
    authorities = at.settings.ca.with_rehearsal
    found = await asyncio.gather(*map(_directory, authorities))
    worst = max(found, key=lambda finding: list(Verdict).index(finding.verdict))
    texts = [f"{ca.name}: {finding.found}" for ca, finding in zip(authorities, found, strict=True)]
    return replace(worst, found="; ".join(texts)) if len(texts) > 1 else worst


async def _directory(ca: AuthoritySettings) -> Finding:
    try:
        terms = await read_terms(replace(AcmeConfig.of(ca), timeout=int(DEADLINE / 3)))
    except AcmeError as error:
        return fail(
            f"{ca.directory_url}: {error.detail}",
            "check ca.directory_url and ca.ca_file, the network, and the CA's status page",
        )
    if terms.account_binding and ca.binding_key_id is None:
        return fail(
            "the CA wants accounts that are bound to a customer",
            "set ca.binding_key_id and ca.binding_key_file to what the CA gave you",
        )
    if ca.profile != AUTO_PROFILE and ca.profile not in terms.profiles:
        offered = ", ".join(terms.profiles) or "none"
        return fail(
            f"the CA has no profile {ca.profile}",
            f'set ca.profile to "{AUTO_PROFILE}" or to one that it has: {offered}',
        )
    if terms.caa_identities and ca.caa_identity not in terms.caa_identities:
        names = ", ".join(terms.caa_identities)
        return fail(
            f"the CA does not know itself as {ca.caa_identity}",
            f"set ca.caa_identity to one of its names: {names}",
        )
    if not terms.caa_identities:
        return warn(
            "reachable; its directory names no CAA identity",
            f"see in the CA's documents that {ca.caa_identity} is its name in CAA records",
        )
    return ok(f"reachable, {ca.caa_identity}; terms of service: {terms.terms_of_service or 'none'}")
