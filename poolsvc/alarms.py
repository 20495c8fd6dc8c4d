"""What is wrong with the pool's own parts: each worker process says it in a row of its own, any process reads it."""

from datetime import datetime, timedelta

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from poolsvc.models import WorkerReport

REPORT_EVERY = timedelta(seconds=10)
_SILENCE = timedelta(seconds=60)
_FORGOTTEN = timedelta(days=1)
_MAX_WORKERS = 100  # whose alarms are read
_MAX_TEXT = 1000


async def report(session: AsyncSession, holder: str, alarms: list[str], now: datetime) -> None:
    """One worker process lives, and sees these alarms."""
    await session.merge(
        WorkerReport(holder=holder, seen_at=now, alarms=[alarm[:_MAX_TEXT] for alarm in alarms])
    )
    await session.execute(delete(WorkerReport).where(WorkerReport.seen_at < now - _FORGOTTEN))


async def resign(session: AsyncSession, holder: str) -> None:
    """A worker process that ends in order is not missed."""
    await session.execute(delete(WorkerReport).where(WorkerReport.holder == holder))


async def current(session: AsyncSession, now: datetime) -> list[str]:
    """What the workers of the last minute see, each alarm once; that there is no worker is one itself."""
    found = await session.scalars(
        select(WorkerReport)
        .where(WorkerReport.seen_at > now - _SILENCE)
        .order_by(WorkerReport.seen_at.desc())
        .limit(_MAX_WORKERS)
    )
    reports = list(found)
    if not reports:
        return [f"worker: none has been seen for {_SILENCE.seconds} s"]
    return sorted({alarm for one in reports for alarm in one.alarms})
