"""Whether enough monitors are there to say how servers are, and whether the registry's own may speak."""

from sqlalchemy.exc import SQLAlchemyError

from nts_core.client import ClientError, load_roots
from nts_core.control import MonitorStatus
from poolsvc import monitors
from poolsvc.db import Database
from poolsvc.doctor.report import Examination, Finding, Unknowable, fail, ok, warn
from poolsvc.monitor.references import References
from poolsvc.monitor.soundness import agrees
from poolsvc.rounds import VERSIONS


async def enough(at: Examination) -> Finding:
    """As many as have to agree are heard, and each of them is sound."""
    file = at.settings.database_file
    if file is not None and not file.exists():
        raise Unknowable("needs the database")
    opened = Database(at.settings.database)
    try:
        async with opened.transaction() as session:
            standing = await monitors.council(session, at.settings, at.now)
            eyes = await monitors.living(session)
            unknown = await monitors.count_unknown(session)
    except (SQLAlchemyError, OSError):
        raise Unknowable("needs the database") from None
    finally:
        await opened.close()
    if not standing.is_met:
        return fail(
            monitors.alarm(standing, unknown) or "",
            "see `poolsvc monitors list`; `poolsvc monitors quorum N --reason TEXT` lets fewer agree",
        )
    bad = [
        f"{each.name} is not sound ({each.sound_detail or 'it has no check of its clock'})"
        for each in eyes
        if each.status in monitors.WORKING and not monitors.is_sound(each)
    ]
    if bad:
        return warn("; ".join(bad), "correct the clock and network of their hosts")
    waiting = [each.name for each in eyes if each.status is MonitorStatus.PENDING]
    if waiting:
        return warn(f"{', '.join(waiting)} wait for approval", "poolsvc monitors approve NAME")
    kind = ", bootstrap" if standing.quorum.is_bootstrap else ""
    text = f"{standing.heard} are heard, {standing.quorum.number} have to agree{kind}"
    if unknown:
        return warn(
            f"{text}; {unknown} addresses are known by too few", "see which monitors are paused or late"
        )
    return ok(text)


async def references(at: Examination) -> Finding:
    """Most of the servers that the registry's own monitor compares its clock with agree with this host's."""
    chosen = at.settings.monitor.parsed_references
    if not chosen:
        return warn(
            "no references: the registry's clock and network are not checked",
            "name three or more time servers of different operators in monitor.references",
        )
    try:
        roots = load_roots(at.settings.roots_file)
    except ClientError as error:
        raise Unknowable(error.message) from None
    asked = References(chosen, roots, VERSIONS)
    found = agrees(await asked.read(), asked.names)
    if not found.is_sound:
        return fail(
            found.detail, "correct this host's clock, let UDP 123 and TCP 4460 out, or name other references"
        )
    families = " and ".join(f"IPv{version}" for version in VERSIONS if found.holds(version))
    return ok(f"{found.agreeing} of {found.references} agree with this host's clock, by {families}")
