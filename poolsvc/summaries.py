"""What samples came to, hour by hour and day by day: made before the samples go, and kept for years.

Each hour is summed up once it is over and no report about it can come any more, each day once its hours are. It is done in
pieces, by addresses; what is done is noted in the same transaction as the piece, so that each sample counts once whatever
happens in between, and whichever process does it.
"""

from contextlib import suppress
from datetime import UTC, datetime, time, timedelta
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Date,
    Double,
    Select,
    case,
    cast,
    delete,
    func,
    insert,
    literal,
    select,
    tuple_,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from poolsvc.config import Settings
from poolsvc.db import Database, UtcDateTime
from poolsvc.models import Address, DailySummary, HourlySummary, SampleRecord, SummaryProgress
from poolsvc.verdicts import FRESH

_HOUR, _DAY = timedelta(hours=1), timedelta(days=1)
_LATE = FRESH + timedelta(minutes=5)  # until every report about an hour is here
_ADDRESSES = 20_000  # of one statement
_PIECES = 50  # of one call
_DELETED = 5_000  # rows in one statement
_BEGIN = datetime(2000, 1, 1, tzinfo=UTC)
_HOURS, _DAYS = "hours", "days"
_MEANS = ("probes", "failures", "step", "score", "offset_ns", "offset_most_ns", "delay_ns")


async def make(database: Database, now: datetime) -> bool:
    """Sum up some of what is over; whether there is more."""
    for _ in range(_PIECES):
        async with database.transaction() as session:
            if not (await _next_hour(session, now) or await _next_day(session)):
                return False
    return True


async def done_until(session: AsyncSession) -> datetime | None:
    """Samples before this moment are in summaries; None while none are."""
    return await session.scalar(select(SummaryProgress.until).where(SummaryProgress.kind == _HOURS))


async def forget_old(database: Database, settings: Settings, now: datetime) -> bool:
    """Delete some of the summaries that are older than the policy says; whether there may be more."""
    oldest = now - settings.policy.summaries_days * _DAY
    is_more = False
    for table, key, before in (
        (HourlySummary, HourlySummary.hour, oldest),
        (DailySummary, DailySummary.day, oldest.date()),
    ):
        names = (table.address_id, key, table.monitor)
        old = select(*names).where(key < before).limit(_DELETED)
        async with database.transaction() as session:
            rows = (await session.execute(old)).all()
            if rows:
                await session.execute(
                    delete(table)
                    .where(tuple_(*names).in_([tuple(row) for row in rows]))
                    .execution_options(synchronize_session=False)
                )
        is_more = is_more or len(rows) == _DELETED
    return is_more


async def _next_hour(session: AsyncSession, now: datetime) -> bool:
    """One piece of the oldest hour that is over and not done; whether there was one."""
    progress = await _progress(session, _HOURS)
    if progress is None:
        return False
    if progress.address_id == 0:
        # Hours without a sample are passed over.
        first = await session.scalar(
            select(func.min(SampleRecord.at)).where(SampleRecord.at >= progress.until)
        )
        latest = _floor(now - _LATE)
        progress.until = max(progress.until, min(latest, latest if first is None else _floor(first)))
    if progress.until + _HOUR + _LATE > now:
        return False
    until = progress.until + _HOUR
    piece = _piece(progress)
    await session.execute(
        insert(HourlySummary).from_select(
            ["address_id", "hour", "monitor", *_MEANS], _of_hour(progress.until, until, *piece)
        )
    )
    await _move(session, progress, until)
    return True


async def _next_day(session: AsyncSession) -> bool:
    progress, hours = await _progress(session, _DAYS), await done_until(session)
    if progress is None or hours is None:
        return False
    if progress.address_id == 0:
        first = await session.scalar(
            select(func.min(HourlySummary.hour)).where(HourlySummary.hour >= progress.until)
        )
        latest = datetime.combine(hours.date(), time(), UTC)
        begin = latest if first is None else datetime.combine(first.date(), time(), UTC)
        progress.until = max(progress.until, min(latest, begin))
    if progress.until + _DAY > hours:
        return False
    until = progress.until + _DAY
    piece = _piece(progress)
    await session.execute(
        insert(DailySummary).from_select(
            ["address_id", "day", "monitor", *_MEANS], _of_day(progress.until, until, *piece)
        )
    )
    await _move(session, progress, until)
    return True


async def _progress(session: AsyncSession, kind: str) -> SummaryProgress | None:
    """How far it is, locked; None while another process is at it."""
    query = select(SummaryProgress).where(SummaryProgress.kind == kind)
    found = await session.scalar(query.with_for_update(skip_locked=True))
    if found is None:
        # Another process may begin at the same moment, or be at it.
        with suppress(IntegrityError):
            async with session.begin_nested():
                session.add(SummaryProgress(kind=kind, until=_BEGIN, address_id=0))
            return await session.scalar(query.with_for_update(skip_locked=True))
    return found


def _floor(moment: datetime) -> datetime:
    return moment.replace(minute=0, second=0, microsecond=0)


def _piece(progress: SummaryProgress) -> tuple[int, int]:
    return progress.address_id, progress.address_id + _ADDRESSES


async def _move(session: AsyncSession, progress: SummaryProgress, until: datetime) -> None:
    """A piece is done; after the last one the whole span is."""
    progress.address_id += _ADDRESSES
    if progress.address_id > (await session.scalar(select(func.max(Address.id))) or 0):
        progress.until, progress.address_id = until, 0


def _of_hour(begin: datetime, end: datetime, first: int, last: int) -> Select[Any]:
    each = (
        select(
            SampleRecord.address_id,
            SampleRecord.monitor,
            SampleRecord.failed,
            SampleRecord.step,
            SampleRecord.score,
            SampleRecord.offset_ns,
            SampleRecord.delay_ns,
            _rank(SampleRecord.address_id, SampleRecord.monitor, last=SampleRecord.at),
        )
        .where(
            SampleRecord.at >= begin,
            SampleRecord.at < end,
            SampleRecord.address_id >= first,
            SampleRecord.address_id < last,
        )
        .subquery()
    )
    columns = each.c
    return select(
        columns.address_id,
        literal(begin, UtcDateTime),
        columns.monitor,
        func.count(),
        func.count(columns.failed),
        func.avg(columns.step),
        func.max(case((columns.rank == 1, columns.score))),
        cast(func.avg(columns.offset_ns), BigInteger),
        func.max(func.abs(columns.offset_ns)),
        cast(func.avg(columns.delay_ns), BigInteger),
    ).group_by(columns.address_id, columns.monitor)


def _of_day(begin: datetime, end: datetime, first: int, last: int) -> Select[Any]:
    each = (
        select(
            HourlySummary.address_id,
            HourlySummary.monitor,
            *(getattr(HourlySummary, name) for name in _MEANS),
            _rank(HourlySummary.address_id, HourlySummary.monitor, last=HourlySummary.hour),
        )
        .where(
            HourlySummary.hour >= begin,
            HourlySummary.hour < end,
            HourlySummary.address_id >= first,
            HourlySummary.address_id < last,
        )
        .subquery()
    )
    columns = each.c
    return select(
        columns.address_id,
        literal(begin.date(), Date),
        columns.monitor,
        func.sum(columns.probes),
        func.sum(columns.failures),
        _mean(columns.step, columns.probes),
        func.max(case((columns.rank == 1, columns.score))),
        cast(_mean(columns.offset_ns, columns.probes), BigInteger),
        func.max(columns.offset_most_ns),
        cast(_mean(columns.delay_ns, columns.probes), BigInteger),
    ).group_by(columns.address_id, columns.monitor)


def _rank(*group: Any, last: Any) -> ColumnElement[int]:
    return func.row_number().over(partition_by=group, order_by=last.desc()).label("rank")


def _mean(value: ColumnElement[Any], weight: ColumnElement[Any]) -> ColumnElement[Any]:
    """Of the hours that have a value, weighted by their probes."""
    counted = func.sum(case((value.is_not(None), weight)))
    return func.sum(cast(value, Double) * weight) / counted
