"""`poolsvc doctor`: is everything that the registry stands on in order, and if not, what to do.

Each check is one entry of `CHECKS`: it has a deadline, runs beside the others, and hides none of them. Nothing here
changes anything, at the CA, in the zone or on this host.
"""

import asyncio

import dns.resolver

from nts_core.verdict import Verdict
from poolsvc.config import ConfigError
from poolsvc.doctor import ca, host, mail, monitors, zone
from poolsvc.doctor.report import DEADLINE, Check, Examination, Result, Unknowable, fail, skipped
from poolsvc.errors import PoolError
from poolsvc.primary import Nameserver

CHECKS = (
    Check("files", host.files),
    Check("secrets", host.secrets),
    Check("database", host.database),
    Check("clock", host.clock),
    Check("listen", host.listen),
    Check("certificate", host.certificate),
    Check("public-url", host.public_url),
    Check("primary", zone.primary),
    Check("transfer", zone.transfer),
    Check("update", zone.update),
    Check("nameservers", zone.nameservers),
    Check("negative-ttl", zone.negative_ttl),
    Check("answer-size", zone.answer_size),
    Check("signatures", zone.signatures),
    Check("caa", zone.caa),
    Check("delegation", zone.delegation),
    Check("ds", zone.ds),
    Check("chain", zone.chain),
    Check("ca", ca.directory),
    Check("ca-socket", ca.sockets),
    Check("mail", mail.server),
    Check("monitors", monitors.enough),
    Check("references", monitors.references),
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
