"""What probes measured, how long it is kept, and the pool day by day; on both engines."""

import asyncio
from datetime import UTC, date, datetime, timedelta

import pytest
from sqlalchemy import func, select, text

from nts_core.control import ProbeResult, ServerState, Stage
from poolsvc import monitoring, samples, series, servers
from poolsvc.db import Database
from poolsvc.models import Address, DailyCount, SampleRecord
from poolsvc.series import Span, Stretch

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)
ONE, OTHER = "198.18.0.1", "fd00::1"
S = ServerState


def good(address=ONE, offset=-1500):
    return ProbeResult(
        address, None, "", offset=offset, delay=9_000_000_000, stratum=2, leap=0, asked=2, cookies=2
    )


async def probe(registry, server_id, now, *results):
    async with registry.change(server_id) as (session, server):
        await monitoring.record(session, registry.settings, server, results, now)


async def put(registry, address_id, *times):
    async with registry.database.transaction() as session:
        session.add_all(
            SampleRecord(address_id=address_id, at=at, monitor="registry", step=1.0) for at in times
        )


async def read(registry, server_id):
    async with registry.database.transaction() as session:
        server = await servers.get(session, server_id)
        found, _ = await series.read(session, Span.SAMPLES, Stretch(server.addresses), limit=10)
    return found


async def count(registry):
    async with registry.database.transaction() as session:
        return await session.scalar(select(func.count()).select_from(SampleRecord))


async def partitions(database):
    async with database.transaction() as session:
        found = await session.scalars(
            text("SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'samples'::regclass")
        )
        return set(found)


async def keep_house(registry, now):
    return await samples.keep_house(registry.database, registry.settings, now)


async def test_each_probed_address_leaves_one_sample_with_the_score_after_it(registry):
    server = await registry.server("alice", ONE, OTHER, state=S.ACTIVE)
    await probe(registry, server, NOW, good(), ProbeResult(OTHER, Stage.TCP, "no answer"))
    await probe(registry, server, NOW + DAY, good())
    found = await read(registry, server)
    async with registry.database.transaction() as session:
        scores = {row.address: row.score for row in await session.scalars(select(Address))}
    assert [(point.address, point.mark.at, point.failed) for point in found] == [
        (ONE, NOW + DAY, None),
        (OTHER, NOW, "tcp"),
        (ONE, NOW, None),
    ]
    assert [(point.step, point.offset_ns, point.delay_ns) for point in found[1:]] == [
        (-5.0, None, None),
        (1.0, -1500, 9_000_000_000),
    ]
    assert [found[0].score, found[1].score] == [scores[ONE], scores[OTHER]]


async def test_old_samples_go_and_those_of_the_days_that_are_kept_stay(registry):
    """Whether they are in a partition or in the one for the rest."""
    server = await registry.server()
    kept = registry.settings.policy.samples_days
    midnight = datetime(2026, 3, 1, tzinfo=UTC)
    await put(registry, server, midnight - kept * DAY, midnight - kept * DAY - timedelta(microseconds=1))
    await keep_house(registry, NOW)
    assert await count(registry) == 1
    await put(registry, server, NOW, NOW + 3 * DAY)
    await keep_house(registry, NOW + (kept + 1) * DAY)
    assert await count(registry) == 1
    await keep_house(registry, NOW + (kept + 4) * DAY)
    assert await count(registry) == 0


async def test_a_great_many_old_samples_go_in_bounded_pieces(registry, monkeypatch):
    monkeypatch.setattr(samples, "_DELETED", 3)
    server = await registry.server()
    await put(registry, server, *(NOW - 100 * DAY + number * timedelta(seconds=1) for number in range(7)))
    seen = []
    while await keep_house(registry, NOW):
        seen.append(await count(registry))
    assert seen == [4, 1]
    assert await count(registry) == 0


async def test_the_pool_of_each_day_is_counted_once(registry):
    await registry.server("alice", ONE, state=S.ACTIVE)
    await keep_house(registry, NOW)
    await registry.server("bob", "198.18.0.2", state=S.VERIFIED)
    await keep_house(registry, NOW + timedelta(hours=5))
    await keep_house(registry, NOW + DAY)
    async with registry.database.transaction() as session:
        found = await samples.history(session, 10)
    assert [(row.day, row.counts) for row in found] == [
        (date(2026, 3, 2), {"active": 1, "verified": 1}),
        (date(2026, 3, 1), {"active": 1}),
    ]


class TestPartitions:
    @pytest.fixture
    def registry(self, postgresql, settings, registry_of):
        return registry_of(postgresql, settings)

    async def test_days_are_made_ahead_filled_and_dropped_whole(self, registry):
        await keep_house(registry, NOW)
        days = {f"samples_202603{number:02}" for number in range(1, 9)}
        assert await partitions(registry.database) == days | {"samples_default"}
        server = await registry.server()
        await put(registry, server, NOW, NOW + 7 * DAY)
        async with registry.database.transaction() as session:
            first, last, rest = [
                await session.scalar(text(f"SELECT count(*) FROM {name}"))
                for name in ("samples_20260301", "samples_20260308", "samples_default")
            ]
        assert (first, last, rest) == (1, 1, 0)
        await keep_house(registry, NOW + 16 * DAY)
        found = await partitions(registry.database)
        assert "samples_20260301" not in found
        assert {"samples_20260302", "samples_20260308", "samples_20260324", "samples_default"} <= found

    async def test_by_two_at_once_and_once_more_it_is_the_same(self, registry, postgresql_url):
        other = Database(postgresql_url)
        try:
            both = (registry.database, other)
            await asyncio.gather(*(samples.keep_house(one, registry.settings, NOW) for one in both))
        finally:
            await other.close()
        await keep_house(registry, NOW)
        assert len(await partitions(registry.database)) == 9

    async def test_a_day_that_began_without_a_partition_goes_on_in_the_default_one(self, registry):
        """Its samples are there already; the next days get theirs all the same."""
        server = await registry.server()
        await put(registry, server, NOW)
        await keep_house(registry, NOW)
        found = await partitions(registry.database)
        assert "samples_20260301" not in found
        assert "samples_20260302" in found
        await put(registry, server, NOW + timedelta(seconds=1))
        assert await count(registry) == 2

    async def test_who_reads_an_old_day_is_not_waited_for_and_stops_nobody(self, registry):
        """The day is dropped the next time."""
        await keep_house(registry, NOW)
        server = await registry.server()
        await put(registry, server, NOW)
        async with registry.database.transaction() as session:
            await session.execute(text("SELECT count(*) FROM samples_20260301"))
            await keep_house(registry, NOW + 16 * DAY)
            await put(registry, server, NOW + 16 * DAY)
            assert "samples_20260301" in await partitions(registry.database)
        await keep_house(registry, NOW + 16 * DAY)
        assert "samples_20260301" not in await partitions(registry.database)


class TestApi:
    async def test_the_history_is_public_and_bounded(self, registry, client):
        async with registry.database.transaction() as session:
            session.add_all(
                DailyCount(day=date(2026, 3, number), counts={"active": number}) for number in (1, 2, 3)
            )
        async with client() as http:
            answer = await http.get("/v1/pool/history?days=2")
            assert answer.json() == [
                {"day": "2026-03-03", "counts": {"active": 3}},
                {"day": "2026-03-02", "counts": {"active": 2}},
            ]
            for days in ("0", "401", "x"):
                assert (await http.get(f"/v1/pool/history?days={days}")).status_code == 422
