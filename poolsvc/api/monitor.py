"""What a monitor is told to look at, and what it has found."""

from fastapi import APIRouter

from nts_core.control import MonitorAnswer, MonitorReport, MonitorWork
from poolsvc import monitors, reports
from poolsvc.api.agent import Said
from poolsvc.api.request import NowDep, PrincipalDep, ServicesDep, SessionDep, SourceDep
from poolsvc.auth import Operation

router = APIRouter(prefix="/v1")


@router.get("/monitor/work")
async def work(
    source: SourceDep,
    principal: PrincipalDep,
    services: ServicesDep,
    session: SessionDep,
    now: NowDep,
) -> MonitorWork:
    """What to probe until the next question, and how soon that is."""
    principal.may(Operation.MONITOR)
    monitor = await monitors.reporting(session, principal.monitor_id or 0)
    monitors.note_source(monitor, source, now)
    return await monitors.work(session, services.settings, monitor, now)


@router.post("/monitor/report")
async def report(
    body: Said[MonitorReport],
    source: SourceDep,
    principal: PrincipalDep,
    services: ServicesDep,
    session: SessionDep,
    now: NowDep,
) -> MonitorAnswer:
    """What was found, and whether the monitor may be believed. The same report again counts once."""
    principal.may(Operation.MONITOR)
    monitor = await monitors.reporting(session, principal.monitor_id or 0)
    monitors.note_source(monitor, source, now)
    return MonitorAnswer(taken=await reports.take(session, services.settings, monitor, body, now))
