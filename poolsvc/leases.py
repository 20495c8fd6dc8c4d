"""Named leases: what one process at a time may do, on one machine or on many.

Each call is one statement, so the database decides who holds a lease. On PostgreSQL its clock alone counts: machines
whose clocks differ never hold one lease both. SQLite is for the processes of one machine, which share a clock.
"""

import asyncio
import os
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog
from sqlalchemy import case, func, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from poolsvc.db import Database
from poolsvc.models import Lease

_log = structlog.get_logger()
# Renewals within one life: two may be lost before the lease is.
_RENEWALS = 3


class LeaseLost(Exception):
    """The lease has another holder, or could not be renewed before it ended."""


@dataclass(frozen=True, slots=True)
class Held:
    """A lease that this process holds. `epoch` is higher than that of every holder before.

    `until` is the event loop's time at which it may end: life after the request, so never later than the database's.
    """

    name: str
    holder: str
    epoch: int
    until: float


def new_holder() -> str:
    """How one process names itself, never the same twice."""
    return f"{socket.gethostname()[:60]}:{os.getpid()}:{secrets.token_hex(8)}"


async def acquire(database: Database, name: str, holder: str, life: timedelta) -> Held | None:
    """Take a free or ended lease, or renew one's own; None while somebody else holds it."""
    until = asyncio.get_running_loop().time() + life.total_seconds()
    is_postgresql = database.engine.dialect.name == "postgresql"
    insert: Any = postgresql.insert if is_postgresql else sqlite.insert
    now = _now(database)
    values = {"name": name, "holder": holder, "epoch": 1, "expires_at": now + life}
    same = Lease.holder == holder
    statement = (
        insert(Lease)
        .values(values)
        .on_conflict_do_update(
            index_elements=[Lease.name],
            set_={
                "holder": holder,
                "expires_at": now + life,
                "epoch": Lease.epoch + case((same, 0), else_=1),
            },
            where=or_(same, Lease.expires_at <= now),
        )
        .returning(Lease.epoch)
    )
    async with database.transaction() as session:
        epoch = await session.scalar(statement)
    return None if epoch is None else Held(name, holder, epoch, until)


async def is_held(database: Database, name: str) -> bool:
    """Whether anybody holds it now."""
    held = select(Lease.epoch).where(
        Lease.name == name, Lease.holder != "", Lease.expires_at > _now(database)
    )
    async with database.transaction() as session:
        return await session.scalar(held) is not None


async def release(database: Database, held: Held) -> None:
    """Let others have it at once. The row stays, or its epoch would begin anew."""
    mine = Lease.name == held.name, Lease.holder == held.holder, Lease.epoch == held.epoch
    async with database.transaction() as session:
        await session.execute(update(Lease).where(*mine).values(expires_at=_now(database), holder=""))


@asynccontextmanager
async def keep(database: Database, held: Held, life: timedelta) -> AsyncIterator[None]:
    """Renew a lease while the body runs. When that fails, the body is cancelled and LeaseLost raised."""
    try:
        async with asyncio.timeout_at(held.until) as deadline:
            renewing = asyncio.create_task(_renew(database, held, life, deadline))
            try:
                yield
            finally:
                renewing.cancel()
                # Not awaited itself: its end by cancellation would hide that of the body.
                await asyncio.wait({renewing})
    except TimeoutError:
        if deadline.expired():
            raise LeaseLost(f"the lease {held.name} was lost") from None
        raise


async def _renew(database: Database, held: Held, life: timedelta, deadline: asyncio.Timeout) -> None:
    while True:
        await asyncio.sleep(life.total_seconds() / _RENEWALS)
        try:
            renewed = await acquire(database, held.name, held.holder, life)
        except (SQLAlchemyError, OSError) as error:
            _log.warning("lease_not_renewed", lease=held.name, error=type(error).__name__)
            continue
        if renewed is None or renewed.epoch != held.epoch:
            deadline.reschedule(asyncio.get_running_loop().time())
            return
        deadline.reschedule(renewed.until)


def _now(database: Database) -> Any:
    """The moment by the clock that decides: the database's, unless all processes share one."""
    if database.engine.dialect.name == "postgresql":
        return func.now()
    return datetime.now(UTC)
