"""Transactions that wait for each other."""

import asyncio

import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import TimeoutError as PoolTimeout

from poolsvc import db
from poolsvc.models import Server

# PostgreSQL has many transactions at a time.
ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@ON_SQLITE
async def test_transactions_come_in_the_order_in_which_they_were_asked_for(registry):
    """Its own way, to try again after longer and longer pauses, lets one of many wait for ever."""
    came = []

    async def work(number):
        async with registry.database.transaction() as session:
            await session.scalar(select(func.count()).select_from(Server))
            came.append(number)

    async with asyncio.TaskGroup() as group:
        for number in range(60):
            group.create_task(work(number))
    assert came == list(range(60))


@ON_SQLITE
async def test_who_gets_no_turn_is_told_so_and_keeps_nobody_waiting(registry, call, monkeypatch):
    monkeypatch.setattr(db, "_TURN", 0.05)
    async with registry.database.transaction():
        with pytest.raises(PoolTimeout, match=r"no turn at the database within 0\.05 s"):
            async with registry.database.transaction():
                pass
        answer = await call(None, "GET", "/v1/pool")
        assert (answer.status_code, answer.json()["code"]) == (503, "database-unavailable")
        assert answer.headers["Retry-After"]
    assert (await call(None, "GET", "/v1/pool")).status_code == 200
