"""Leases: one holder at a time, on both engines, whatever clocks and processes do."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import DBAPIError, OperationalError

from poolsvc import db, leases
from poolsvc.db import Database
from poolsvc.leases import LeaseLost
from poolsvc.models import Lease

LIFE = timedelta(seconds=10)
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


async def take(database, holder="one", life=LIFE):
    return await leases.acquire(database, "work", holder, life)


async def let_it_end(database):
    async with database.transaction() as session:
        await session.execute(update(Lease).values(expires_at=LONG_AGO))


async def test_one_holds_it_and_renews_it_and_nobody_else_gets_it(database):
    held = await take(database)
    assert (held.holder, held.epoch) == ("one", 1)
    assert await take(database, "other") is None
    assert (await take(database)).epoch == 1
    assert (await leases.acquire(database, "other work", "other", LIFE)).epoch == 1


async def test_an_ended_lease_is_anybodys_and_every_new_holder_has_a_higher_epoch(database):
    await take(database)
    await let_it_end(database)
    assert (await take(database, "other")).epoch == 2
    assert await take(database, "one") is None
    await let_it_end(database)
    assert (await take(database, "one")).epoch == 3
    await let_it_end(database)
    assert (await take(database, "one")).epoch == 3, "nobody was between"


async def test_a_lease_that_is_given_up_is_free_at_once_and_its_epochs_go_on(database):
    await leases.release(database, await take(database))
    other = await take(database, "other")
    assert other.epoch == 2
    await leases.release(database, other)
    assert (await take(database)).epoch == 3


async def test_who_lost_it_cannot_give_up_anothers(database):
    mine = await take(database)
    await let_it_end(database)
    await take(database, "other")
    await leases.release(database, mine)
    assert await take(database) is None


async def test_of_many_that_ask_at_once_one_gets_it(database, database_url):
    """Each has connections of its own, as another process would."""
    others = [Database(database_url) for _ in range(4)]
    try:
        found = await asyncio.gather(
            *(take(one, f"holder {number}") for number, one in enumerate([database, *others, *others]))
        )
    finally:
        for other in others:
            await other.close()
    assert sum(held is not None for held in found) == 1


async def test_a_holder_that_stops_in_mid_transaction_keeps_nobody_from_taking_over(
    postgresql_url, postgresql, monkeypatch
):
    """As a machine that loses its power would leave it: the server sees no end of the connection."""
    monkeypatch.setitem(db._DEADLINES, "idle_in_transaction_session_timeout", "2s")
    await take(postgresql)
    await let_it_end(postgresql)
    stopped = Database(postgresql_url)
    try:
        async with stopped.engine.connect() as connection:
            await connection.execute(update(Lease).values(holder="nobody"))
            assert (await take(postgresql, "other")).epoch == 2
            with pytest.raises(DBAPIError, match="idle-in-transaction"):
                await connection.execute(select(Lease))
    finally:
        await stopped.close()


async def test_nobody_waits_without_end_for_anothers_lock(postgresql_url, postgresql, monkeypatch):
    monkeypatch.setitem(db._DEADLINES, "lock_timeout", "200ms")
    await take(postgresql)
    hurried = Database(postgresql_url)
    try:
        async with postgresql.transaction() as session:
            await session.execute(update(Lease).values(holder="busy"))
            with pytest.raises(OperationalError, match="lock timeout"):
                await take(hurried, "other")
    finally:
        await hurried.close()


async def test_on_postgresql_its_clock_alone_counts(postgresql, monkeypatch):
    """A machine whose clock is a day ahead neither ends another's lease nor gets a longer one."""

    class Ahead(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(days=1)

    await take(postgresql)
    monkeypatch.setattr(leases, "datetime", Ahead)
    assert await take(postgresql, "ahead") is None
    await let_it_end(postgresql)
    assert (await take(postgresql, "ahead")).epoch == 2
    async with postgresql.transaction() as session:
        expires_at = await session.scalar(select(Lease.expires_at))
    assert expires_at < datetime.now(UTC) + timedelta(hours=1)


async def test_it_is_renewed_for_as_long_as_the_work_takes(database):
    life = timedelta(seconds=0.6)
    held = await take(database, life=life)
    async with leases.keep(database, held, life):
        end = asyncio.get_running_loop().time() + 3 * life.total_seconds()
        while asyncio.get_running_loop().time() < end:
            assert await take(database, "other", life) is None
            await asyncio.sleep(0.02)


async def test_work_whose_lease_another_one_took_is_cancelled(database):
    life = timedelta(seconds=0.6)
    held = await take(database, life=life)

    async def work():
        async with asyncio.timeout(20), leases.keep(database, held, life):
            await let_it_end(database)
            assert await take(database, "other") is not None
            await asyncio.Event().wait()

    with pytest.raises(LeaseLost):
        await work()
    assert await take(database, "one") is None


async def test_work_is_cancelled_when_the_database_is_away_for_longer_than_the_lease(database):
    """Nobody can say then who holds it: the other side of a cut network may have it by now."""
    life = timedelta(seconds=0.5)
    held = await take(database, life=life)

    async def work():
        async with asyncio.timeout(20), leases.keep(database, held, life):
            async with database.transaction() as session:
                connection = await session.connection()
                await connection.exec_driver_sql("ALTER TABLE leases RENAME TO elsewhere")
            await asyncio.Event().wait()

    with pytest.raises(LeaseLost):
        await work()


async def test_what_ends_the_work_is_seen_as_it_is(database):
    """A timeout of the work itself, and the cancellation of the whole, are not the lease's."""
    with pytest.raises(TimeoutError):
        async with leases.keep(database, await take(database), LIFE):
            raise TimeoutError
    entered = asyncio.Event()

    async def work():
        async with leases.keep(database, await take(database), LIFE):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.wait_for(entered.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 10)


def test_no_two_processes_have_the_same_name():
    assert len({leases.new_holder() for _ in range(100)}) == 100
    assert all(len(leases.new_holder()) <= 100 for _ in range(10))
