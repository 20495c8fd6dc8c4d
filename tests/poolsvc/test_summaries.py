"""What is kept of samples for years, on both engines."""

import asyncio
from datetime import UTC, date, datetime, timedelta

import pytest
from sqlalchemy import func, select

from poolsvc import samples, summaries
from poolsvc.db import Database
from poolsvc.models import Address, DailySummary, HourlySummary, SampleRecord

NOW = datetime(2026, 3, 3, 12, 30, tzinfo=UTC)
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)


@pytest.fixture
def put(registry):
    """`put(address, at, **values)`: one sample."""

    async def add(address, at, monitor="frankfurt", **values):
        values = {"step": 1.0, "score": 20.0, "offset_ns": 0, "delay_ns": 1000} | values
        async with registry.database.transaction() as session:
            session.add(SampleRecord(address_id=address, at=at, monitor=monitor, **values))

    return add


async def rows(registry, table):
    async with registry.database.transaction() as session:
        return (await session.scalars(select(table).order_by(*table.__table__.primary_key))).all()


async def test_an_hour_and_a_day_of_each_monitor_are_summed_up(registry, put):
    await registry.server()
    await put(1, NOON, offset_ns=100, score=19.0)
    await put(1, NOON + MINUTE, offset_ns=-400, score=18.0, delay_ns=3000)
    await put(1, NOON + 2 * MINUTE, failed="tcp", step=-5.0, score=13.5, offset_ns=None, delay_ns=None)
    await put(1, NOON + HOUR, offset_ns=700, score=14.0)
    await put(1, NOON, monitor="paris")
    while await summaries.make(registry.database, NOW):
        pass
    first, later, other = sorted(await rows(registry, HourlySummary), key=lambda row: (row.monitor, row.hour))
    assert (first.hour, first.probes, first.failures, first.score) == (NOON, 3, 1, 13.5)
    assert first.step == pytest.approx(-1.0)
    assert (first.offset_ns, first.offset_most_ns, first.delay_ns) == (-150, 400, 2000)
    assert (later.hour, later.probes, other.monitor) == (NOON + HOUR, 1, "paris")
    day, _ = await rows(registry, DailySummary)
    assert (day.day, day.probes, day.failures, day.score) == (date(2026, 3, 1), 4, 1, 14.0)
    assert day.step == pytest.approx(-0.5)
    assert (day.offset_ns, day.offset_most_ns) == (round((3 * -150 + 700) / 4), 700)


async def test_an_hour_waits_for_reports_that_are_on_their_way(registry, put):
    await put(1, NOON)
    await summaries.make(registry.database, NOON + HOUR + 20 * MINUTE)
    assert await rows(registry, HourlySummary) == []
    await summaries.make(registry.database, NOON + HOUR + 25 * MINUTE)
    assert len(await rows(registry, HourlySummary)) == 1


async def test_each_sample_counts_once_in_pieces_and_by_several_at_once(
    registry, put, monkeypatch, database_url
):
    monkeypatch.setattr(summaries, "_ADDRESSES", 2)
    monkeypatch.setattr(summaries, "_PIECES", 1)
    for number in range(1, 6):
        await registry.server(f"s{number}", f"198.18.0.{number}")
        for hour in range(3):
            await put(number, NOON + hour * HOUR)
            await put(number, NOON + hour * HOUR + MINUTE)
    other = Database(database_url)
    try:
        pending = True
        while pending:
            both = (summaries.make(one, NOW) for one in (registry.database, other))
            pending = any(await asyncio.gather(*both))
    finally:
        await other.close()
    assert [row.probes for row in await rows(registry, HourlySummary)] == [2] * 15
    assert [row.probes for row in await rows(registry, DailySummary)] == [6] * 5


async def test_samples_stay_until_they_are_summed_up_and_summaries_go_after_years(registry, put, monkeypatch):
    server = await registry.server()
    async with registry.database.transaction() as session:
        (address,) = await session.scalars(select(Address.id).where(Address.server_id == server))
    for hour in range(4):
        await put(address, NOON + hour * HOUR)
    late = NOON + timedelta(days=40)
    monkeypatch.setattr(summaries, "_PIECES", 1)
    counts = []
    while await samples.keep_house(registry.database, registry.settings, late):
        async with registry.database.transaction() as session:
            counts.append(await session.scalar(select(func.count()).select_from(SampleRecord)))
    assert counts[:3] == [4, 4, 4]
    assert await rows(registry, SampleRecord) == []
    assert sum(row.probes for row in await rows(registry, HourlySummary)) == 4
    years = timedelta(days=registry.settings.policy.summaries_days)
    assert not await summaries.forget_old(registry.database, registry.settings, NOON + years)
    assert len(await rows(registry, HourlySummary)) == 4
    await summaries.forget_old(registry.database, registry.settings, NOON + years + timedelta(days=2))
    assert (await rows(registry, HourlySummary), await rows(registry, DailySummary)) == ([], [])
