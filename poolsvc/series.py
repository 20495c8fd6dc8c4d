"""What monitors measured of a server over time: each probe while samples are kept, hours and days beyond that.

The newest comes first. A list goes on from the last row of the one before, so that each row comes once whatever is
measured meanwhile.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, and_, false, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from poolsvc.models import Address, DailySummary, HourlySummary, SampleRecord


class Span(StrEnum):
    """What one row stands for."""

    SAMPLES = "samples"
    HOURS = "hours"
    DAYS = "days"


_TABLES: dict[Span, tuple[Any, Any]] = {
    Span.SAMPLES: (SampleRecord, SampleRecord.at),
    Span.HOURS: (HourlySummary, HourlySummary.hour),
    Span.DAYS: (DailySummary, DailySummary.day),
}


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a list stopped: its last row."""

    at: datetime
    address_id: int
    monitor: str


@dataclass(frozen=True, slots=True)
class Stretch:
    """Which rows are asked for: of addresses, within `since` and before `until`, by one monitor or all."""

    addresses: Sequence[Address]
    since: datetime | None = None
    until: datetime | None = None
    monitor: str | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """What one monitor measured of one address, by one probe or in one hour or day (UTC) that began at `at`.

    `score` is the last one by that monitor's probes, `offset_most_ns` the greatest offset, either way. Offset and delay
    are means over the probes that measured any.
    """

    mark: Mark
    address: str
    probes: int
    failures: int
    failed: str | None
    step: float
    score: float | None
    offset_ns: int | None
    offset_most_ns: int | None
    delay_ns: int | None


async def read(
    session: AsyncSession, span: Span, stretch: Stretch, *, after: Mark | None = None, limit: int
) -> tuple[Sequence[Point], bool]:
    """At most `limit` rows, the newest first, and whether there are more."""
    table, at = _TABLES[span]
    names = {row.id: row.address for row in stretch.addresses}
    rows: list[tuple[datetime, int, Any]] = []
    # Each address for itself, since the tables' keys begin with it: no more is read than may be in the page.
    for address_id in names:
        found = await session.scalars(
            select(table)
            .where(table.address_id == address_id, *_within(span, stretch), *_beyond(span, address_id, after))
            .order_by(at.desc(), table.monitor.desc())
            .limit(limit + 1)
        )
        rows += [(_moment(getattr(row, at.key)), address_id, row) for row in found]
    # Rows of one address and moment stay in the database's order.
    rows.sort(key=lambda row: row[:2], reverse=True)
    points = [_point(names[address_id], begin, row) for begin, address_id, row in rows[:limit]]
    return points, len(rows) > limit


def _within(span: Span, stretch: Stretch) -> list[ColumnElement[bool]]:
    table, at = _TABLES[span]
    found: list[ColumnElement[bool]] = []
    if stretch.since is not None:
        found.append(at >= _first(span, stretch.since))
    if stretch.until is not None:
        found.append(at < _first(span, stretch.until))
    if stretch.monitor is not None:
        found.append(table.monitor == stretch.monitor)
    return found


def _beyond(span: Span, address_id: int, after: Mark | None) -> list[ColumnElement[bool]]:
    """The rows of an address that come after a mark, by moment, address and monitor, all descending."""
    if after is None:
        return []
    table, at = _TABLES[span]
    moment = after.at.date() if span is Span.DAYS else after.at
    same: ColumnElement[bool] = false()
    if address_id < after.address_id:
        same = at == moment
    elif address_id == after.address_id:
        same = and_(at == moment, table.monitor < after.monitor)
    return [at <= moment, or_(at < moment, same)]


def _first(span: Span, moment: datetime) -> Any:
    """The first key of rows that begin at or after a moment."""
    if span is not Span.DAYS:
        return moment
    day = moment.astimezone(UTC).date()
    return day if moment == _moment(day) else day + timedelta(days=1)


def _moment(key: Any) -> datetime:
    return key if isinstance(key, datetime) else datetime.combine(key, time(), UTC)


def _point(address: str, begin: datetime, row: Any) -> Point:
    is_sample = isinstance(row, SampleRecord)
    most = row.offset_ns if is_sample else row.offset_most_ns
    return Point(
        mark=Mark(begin, row.address_id, row.monitor),
        address=address,
        probes=1 if is_sample else row.probes,
        failures=int(row.failed is not None) if is_sample else row.failures,
        failed=row.failed if is_sample else None,
        step=row.step,
        score=row.score,
        offset_ns=row.offset_ns,
        offset_most_ns=None if most is None else abs(most),
        delay_ns=row.delay_ns,
    )
