"""`poolsvc doctor`: is everything that the registry stands on in order, and if not, what to do.

Each check is one entry of `CHECKS`: it has a deadline, runs beside the others, and hides none of them. Nothing here
changes anything, at the CA, in the zone or on this host.
"""

import asyncio

import dns.resolver

from poolsvc.config import ConfigError
from poolsvc.doctor import ca, host, zone
from poolsvc.doctor.report import DEADLINE, Check, Examination, Result, Unknowable, Verdict, fail, skipped
from poolsvc.errors import PoolError
from poolsvc.publisher import Nameserver

CHECKS = (
    Check("files", "the files that the settings name", host.files),
    Check("secrets", "who may read the secrets", host.secrets),
    Check("database", "its tables, writing, space", host.database),
    Check("clock", "the kernel's word on this host's clock", host.clock),
    Check("listen", "the registry's own ports", host.listen),
    Check("certificate", "the registry's TLS certificate", host.certificate),
    Check("public-url", "where agents find the registry", host.public_url),
    Check("primary", "answers over UDP and TCP", zone.primary),
    Check("transfer", "AXFR with the TSIG key", zone.transfer),
    Check("update", "the rights and the clock of the TSIG key", zone.update),
    Check("nameservers", "authority and serial of each", zone.nameservers),
    Check("negative-ttl", "how long a new name is denied", zone.negative_ttl),
    Check("signatures", "DNSSEC of the zone itself", zone.signatures),
    Check("caa", "which CAs may issue", zone.caa),
    Check("delegation", "NS at the parent", zone.delegation),
    Check("ds", "DS at the parent", zone.ds),
    Check("chain", "DNSSEC from the trust anchor down", zone.chain),
    Check("ca", "directory, terms, name in CAA", ca.directory),
)


async def examine(examination: Examination) -> tuple[Result, ...]:
    """Run all checks at once; the results are in the order of `CHECKS`."""
    return tuple(await asyncio.gather(*(_run(check, examination) for check in CHECKS)))


def unusable(error: ConfigError) -> tuple[Result, ...]:
    """The results when the settings cannot be read, on which all other checks depend."""
    first = Result(
        "settings", Verdict.FAIL, str(error), "correct the setting; docs/operators.md explains each"
    )
    rest = (Result(check.name, Verdict.SKIPPED, "needs the settings", "") for check in CHECKS)
    return first, *rest


def system_resolver() -> Nameserver | None:
    """The first resolver of this host's own configuration."""
    try:
        return Nameserver(str(dns.resolver.Resolver().nameservers[0]))
    except (dns.resolver.NoResolverConfiguration, IndexError):
        return None


async def _run(check: Check, examination: Examination) -> Result:
    try:
        async with asyncio.timeout(DEADLINE):
            finding = await check.run(examination)
    except TimeoutError:
        finding = fail(
            f"no end within {DEADLINE:g} s", "see what keeps this host's network or disk busy, then repeat"
        )
    except Unknowable as error:
        finding = skipped(str(error))
    except PoolError as error:
        finding = fail(error.detail, error.remedy)
    except Exception as error:  # noqa: BLE001 - a check's root: what breaks one must not hide the others
        finding = fail(f"{type(error).__name__}: {error}", "the check itself failed: report this as a fault")
    return Result(check.name, finding.verdict, finding.found, finding.remedy)
