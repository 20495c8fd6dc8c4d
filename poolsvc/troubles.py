"""Trouble that changes no state: told when it begins, and not again while it lasts."""

from datetime import datetime, timedelta

import structlog
from sqlalchemy import func, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.certificates import renew_at
from nts_core.control import ProbeResult, ServerState
from poolsvc import servers
from poolsvc.models import Notice, Order, Server
from poolsvc.notices import NoticeKind

_log = structlog.get_logger()
_SILENCE = timedelta(hours=24)
_ALARMED = timedelta(days=7)
# An agent whose problem changes with every report is not told of more often.
_QUIET = timedelta(hours=1)
_BATCH = 50
_WITH_AGENT = tuple(servers.NAMED_STATES | {ServerState.REGISTERED})


async def note_report(session: AsyncSession, server: Server, problem: str | None, now: datetime) -> None:
    """An agent has reported, and perhaps a problem: a new one is told, once an hour at most."""
    before, server.agent_problem = server.agent_problem, problem
    server.silent_told_at = None
    if problem is None:
        return
    last = await session.scalar(
        select(Notice)
        .where(Notice.server_id == server.id, Notice.kind == NoticeKind.AGENT_TROUBLE)
        .order_by(Notice.id.desc())
        .limit(1)
    )
    is_told = last is not None and before is not None and last.data.get("problem") == problem
    if not is_told and (last is None or now - last.at >= _QUIET):
        await servers.tell(session, server, NoticeKind.AGENT_TROUBLE, now=now, problem=problem)


async def tell_silence(session: AsyncSession, now: datetime) -> bool:
    """Tell of agents that have not reported for a day, once for each silence; whether there may be more."""
    limit = now - _SILENCE
    silent = await session.scalars(
        select(Server)
        .where(
            Server.state.in_(_WITH_AGENT),
            Server.joined_at < limit,
            or_(Server.agent_seen_at.is_(None), Server.agent_seen_at < limit),
            Server.silent_told_at.is_(None),
        )
        .limit(_BATCH)
        .with_for_update(skip_locked=True)
    )
    found = list(silent)
    for server in found:
        seen = server.agent_seen_at or server.joined_at
        server.silent_told_at = now
        await servers.tell(
            session, server, NoticeKind.AGENT_SILENT, now=now, seen_at=seen and seen.isoformat()
        )
    return len(found) == _BATCH


def watch_end(order: Order) -> None:
    """A certificate was issued: halfway from its renewal to its end, a newer one has to be there."""
    assert order.not_before is not None
    assert order.not_after is not None
    renewal = renew_at(order.not_before, order.not_after)
    order.ending_due_at = renewal + (order.not_after - renewal) / 2


async def tell_end(session: AsyncSession, order_id: int, now: datetime) -> None:
    """Tell of a certificate that is about to end, unless there is a newer one."""
    order = await session.get_one(Order, order_id)
    order.ending_due_at = None
    server = await servers.get(session, order.server_id)
    newest = servers.newest_certificate(server)
    if server.state in servers.NAMED_STATES and newest is not None and newest.id == order_id:
        await _tell_certificate(session, server, order, "no newer certificate was issued", now)


async def tell_order(session: AsyncSession, server: Server, order: Order, now: datetime) -> None:
    """Tell of an order that has failed, the first of a series."""
    if server.state in servers.NAMED_STATES:
        served = servers.newest_certificate(server)
        await _tell_certificate(session, server, served, order.error or "", now)


async def tell_not_ordered(session: AsyncSession, server: Server, seen: ProbeResult, now: datetime) -> None:
    """Tell of a valid certificate that is none of the pool's: once of each, and once an hour at most."""
    kind = NoticeKind.CERTIFICATE_NOT_ORDERED
    found = await session.scalars(
        select(Notice)
        .where(Notice.server_id == server.id, Notice.kind == kind)
        .order_by(Notice.id.desc())
        .limit(_BATCH)
    )
    told = list(found)
    if any(notice.data["serial"] == seen.serial for notice in told) or (told and now - told[0].at < _QUIET):
        return
    await servers.tell(session, server, kind, now=now, address=seen.address, serial=seen.serial)
    _log.error("certificate_not_ordered", server=server.name, serial=seen.serial)


async def count_not_ordered(session: AsyncSession, now: datetime) -> int:
    """On how many servers the last week's probes were the first to see such a certificate."""
    found = select(func.count(Notice.server_id.distinct())).where(
        Notice.at > now - _ALARMED, Notice.kind == NoticeKind.CERTIFICATE_NOT_ORDERED
    )
    return await session.scalar(found) or 0


async def _tell_certificate(
    session: AsyncSession, server: Server, served: Order | None, reason: str, now: datetime
) -> None:
    ends, due = served and served.not_after, server.order_due_at
    await servers.tell(
        session,
        server,
        NoticeKind.CERTIFICATE_TROUBLE,
        now=now,
        reason=reason,
        ends_at=ends and ends.isoformat(),
        next_at=due and due.isoformat(),
    )
