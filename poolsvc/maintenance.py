"""Maintenance windows: times in which a member works on its server. Then it is held, and nothing counts against it.

Rules:

1. The hold is set while a window is open that was not cancelled.
2. Time raises no status: from the end of the last window on probes count again, and the first full one lifts the hold
   (`poolsvc.monitoring`). A server whose score falls below the cutoff instead is held for that from then on.
3. A server that is not suspended has no status to win, and its hold is lifted at once.
"""

from datetime import datetime, timedelta

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.control import ServerState
from poolsvc import servers
from poolsvc.db import Database
from poolsvc.errors import InvalidDocument, LimitReached, NotFound
from poolsvc.models import HoldKind, MaintenanceWindow, Server

MAX_LENGTH = timedelta(days=30)
MAX_AHEAD = timedelta(days=366)
MAX_OPEN = 10
# A clock that is a little ahead of ours means "now".
_SLACK = timedelta(minutes=5)


async def add(
    session: AsyncSession,
    server: Server,
    *,
    starts_at: datetime | None,
    ends_at: datetime,
    reason: str,
    actor: str,
    now: datetime,
) -> MaintenanceWindow:
    """A new window, from now on unless told when. Raises InvalidDocument or LimitReached."""
    starts_at = now if starts_at is None else starts_at
    if not now - _SLACK <= starts_at <= now + MAX_AHEAD:
        raise InvalidDocument(
            "maintenance begins now or within a year", remedy="leave the time out for now", field="starts_at"
        )
    starts_at = max(starts_at, now)
    if not starts_at < ends_at <= starts_at + MAX_LENGTH:
        raise InvalidDocument(
            f"maintenance ends after its beginning and within {MAX_LENGTH.days} days",
            remedy="a server that is away for longer should leave",
            field="ends_at",
        )
    ahead = select(func.count()).where(
        MaintenanceWindow.server_id == server.id,
        MaintenanceWindow.cancelled_at.is_(None),
        MaintenanceWindow.ends_at > now,
    )
    if (await session.scalar(ahead) or 0) >= MAX_OPEN:
        raise LimitReached(f"there are {MAX_OPEN} windows already", remedy="cancel one")
    window = MaintenanceWindow(
        server_id=server.id,
        starts_at=starts_at,
        ends_at=ends_at,
        reason=reason,
        created_at=now,
        due_at=_next_turn(starts_at, ends_at, now),
    )
    session.add(window)
    await session.flush()
    await _settle(session, server, actor=actor, now=now)
    return window


async def cancel(
    session: AsyncSession, server: Server, window_id: int, *, actor: str, now: datetime
) -> MaintenanceWindow:
    """End a window before its time; one that is over stays as it was. Raises NotFound."""
    window = await session.get(MaintenanceWindow, window_id)
    if window is None or window.server_id != server.id:
        raise NotFound(f"{server.name} has no such maintenance window")
    if window.cancelled_at is None and now < window.ends_at:
        window.cancelled_at, window.due_at = now, None
        await session.flush()
        await _settle(session, server, actor=actor, now=now)
    return window


async def turn(database: Database, window_id: int, now: datetime) -> None:
    """A window begins or ends."""
    async with database.transaction() as session:
        window = await session.get_one(MaintenanceWindow, window_id)
        server = await servers.get(session, window.server_id)
        await session.refresh(window)
        is_over = window.cancelled_at is not None or server.state is ServerState.REMOVED
        window.due_at = None if is_over else _next_turn(window.starts_at, window.ends_at, now)
        await _settle(session, server, actor="worker", now=now)


def _next_turn(starts_at: datetime, ends_at: datetime, now: datetime) -> datetime | None:
    return next((turn for turn in (starts_at, ends_at) if now < turn), None)


async def is_under_way(session: AsyncSession, server: Server, now: datetime) -> bool:
    """Whether a window is open, in which nothing counts against the server."""
    return await _open_window(session, server, now) is not None


async def ended_at(session: AsyncSession, server: Server, now: datetime) -> datetime | None:
    """When the last window that is over ended."""
    ends = func.coalesce(MaintenanceWindow.cancelled_at, MaintenanceWindow.ends_at)
    found = await session.scalar(
        select(MaintenanceWindow)
        .where(MaintenanceWindow.server_id == server.id, ends <= now)
        .order_by(ends.desc())
        .limit(1)
    )
    return None if found is None else found.cancelled_at or found.ends_at


async def _open_window(session: AsyncSession, server: Server, now: datetime) -> MaintenanceWindow | None:
    """Of the windows that are open now the one that ends last."""
    return await session.scalar(
        select(MaintenanceWindow)
        .where(
            MaintenanceWindow.server_id == server.id,
            MaintenanceWindow.cancelled_at.is_(None),
            MaintenanceWindow.starts_at <= now,
            MaintenanceWindow.ends_at > now,
        )
        .order_by(MaintenanceWindow.ends_at.desc())
        .limit(1)
    )


async def _settle(session: AsyncSession, server: Server, *, actor: str, now: datetime) -> None:
    if server.state is ServerState.REMOVED:
        return
    hold, window = servers.held(server, HoldKind.MAINTENANCE), await _open_window(session, server, now)
    if window is not None:
        reason = f"until {window.ends_at:%Y-%m-%d %H:%M} UTC" + (
            f": {window.reason}" if window.reason else ""
        )
        if hold is not None:
            hold.reason = reason[:300]
        await servers.set_hold(session, server, HoldKind.MAINTENANCE, reason=reason, actor=actor, now=now)
    elif server.state is not ServerState.SUSPENDED:
        await servers.lift_hold(
            session, server, HoldKind.MAINTENANCE, reason="the maintenance is over", actor=actor, now=now
        )
    elif hold is not None:
        hold.reason, server.probe_due_at = "it is over, and waits for a good probe", now
