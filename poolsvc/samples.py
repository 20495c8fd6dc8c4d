"""What probes measured: one row for each probe of an address, kept for some days; and the pool's size day by day.

On PostgreSQL each day is a partition of its own, made ahead and dropped whole. What no partition was made for is in
`samples_default`, and goes row by row, as everything does on SQLite.
"""

from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, date, datetime, time, timedelta

import structlog
from sqlalchemy import CursorResult, TextClause, bindparam, func, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.control import ProbeResult
from poolsvc import summaries
from poolsvc.config import Settings
from poolsvc.db import Database, UtcDateTime
from poolsvc.models import DailyCount, SampleRecord
from poolsvc.pool import count_by_state

_log = structlog.get_logger()
_AHEAD = 7  # days with a partition before they begin
_DELETED = 5_000  # rows in one statement
_LOCK = 0x7472_7565_0001  # PostgreSQL's advisory lock for partitions
_DAY = timedelta(days=1)
# Whoever reads or writes samples is not to wait behind a table that comes or goes.
_IMPATIENT = text("SET LOCAL lock_timeout = '1s'")


def sample(
    address_id: int, monitor: str, result: ProbeResult, step: float, score: float | None, at: datetime
) -> SampleRecord:
    """One probe of an address by a monitor, with that one's score of it after the step."""
    return SampleRecord(
        address_id=address_id,
        at=at,
        monitor=monitor,
        failed=result.failed,
        step=step,
        score=score,
        offset_ns=result.offset,
        delay_ns=result.delay,
    )


async def keep_house(database: Database, settings: Settings, now: datetime) -> bool:
    """Partitions ahead, old samples gone, the day counted; whether there is more to remove at once."""
    async with database.transaction() as session:
        await _count_day(session, now.date())
    is_more = await summaries.make(database, now)
    async with database.transaction() as session:
        done = await summaries.done_until(session)
    # What is not summed up yet stays, however old it is.
    done_until = date.min if done is None else done.date()
    oldest = min(done_until, now.date() - settings.policy.samples_days * _DAY)
    is_more = await summaries.forget_old(database, settings, now) or is_more
    return await _remove(database, now, oldest) or is_more


async def _remove(database: Database, now: datetime, oldest: date) -> bool:
    if database.engine.dialect.name == "sqlite":
        return await _delete_older(database, "samples", oldest)
    async with database.transaction() as session:
        partitions = set(await session.scalars(_PARTITIONS))
    days = [now.date() + ahead * _DAY for ahead in range(_AHEAD + 1)]
    for day in days:
        if _partition(day) not in partitions:
            await _change(database, _attach(day))
    for name in sorted(partitions):
        # The names sort as their days do.
        if name < _partition(oldest) and name != _DEFAULT:
            await _change(database, [text(f"DROP TABLE {name}")])
    return await _delete_older(database, _DEFAULT, oldest)


async def history(session: AsyncSession, limit: int) -> Sequence[DailyCount]:
    """The newest days, newest first."""
    found = await session.scalars(select(DailyCount).order_by(DailyCount.day.desc()).limit(limit))
    return found.all()


async def _count_day(session: AsyncSession, day: date) -> None:
    """The pool as the day found it, once."""
    if await session.get(DailyCount, day) is not None:
        return
    counts = await count_by_state(session)
    # Another process may count at the same moment.
    with suppress(IntegrityError):
        async with session.begin_nested():
            session.add(DailyCount(day=day, counts={state.value: count for state, count in counts.items()}))


_DEFAULT = "samples_default"
_PARTITIONS = text(
    "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid"
    " WHERE i.inhparent = 'samples'::regclass"
)


def _partition(day: date) -> str:
    return f"samples_{day:%Y%m%d}"


def _attach(day: date) -> list[TextClause]:
    """A partition is made aside and attached: that stops nobody who reads or writes another one."""
    name, end = _partition(day), day + _DAY
    return [
        text(f"CREATE TABLE {name} (LIKE samples INCLUDING ALL)"),
        text(
            f"ALTER TABLE samples ATTACH PARTITION {name}"
            f" FOR VALUES FROM ('{day.isoformat()} 00:00+00') TO ('{end.isoformat()} 00:00+00')"
        ),
    ]


async def _change(database: Database, statements: Sequence[TextClause]) -> None:
    """Change partitions, one process at a time and without waiting; what fails now is tried at the next house-keeping.

    A day whose first samples are in the default partition already stays there, for one.
    """
    try:
        async with database.transaction() as session:
            await session.execute(_IMPATIENT)
            if await session.scalar(select(func.pg_try_advisory_xact_lock(_LOCK))):
                for statement in statements:
                    await session.execute(statement)
    except DBAPIError as error:
        _log.warning("samples_partition_not_changed", statement=str(statements[0]), error=str(error.orig))


async def _delete_older(database: Database, name: str, oldest: date) -> bool:
    """Delete some of the rows before a day; whether there may be more."""
    place = "rowid" if database.engine.dialect.name == "sqlite" else "ctid"
    old = f"SELECT {place} FROM {name} WHERE at < :before LIMIT {_DELETED}"  # noqa: S608 - names of this module
    statement = text(f"DELETE FROM {name} WHERE {place} IN ({old})")  # noqa: S608 - the same
    before = bindparam("before", datetime.combine(oldest, time(), UTC), UtcDateTime)
    async with database.transaction() as session:
        done = await session.execute(statement.bindparams(before))
    return isinstance(done, CursorResult) and done.rowcount == _DELETED
