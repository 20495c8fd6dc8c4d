"""The database: SQLite for one process, PostgreSQL for many. One request or step is one transaction.

Network I/O never happens inside a transaction. Times are aware UTC; a naive one is refused.
"""

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import partial
from typing import Any

from sqlalchemy import BigInteger, DateTime, Dialect, Enum, Integer, MetaData, event, func, select, text
from sqlalchemy.engine import Connection
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Session, mapped_column
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.types import TypeDecorator

# To PostgreSQL, of one process. All are kept: to open one costs the server more than twenty requests do, and it would
# have to just when there are too many requests already.
_CONNECTIONS: dict[str, Any] = {"pool_size": 15, "max_overflow": 0, "pool_use_lifo": True, "pool_timeout": 10}
# What one session of PostgreSQL may take, on its side of the connection and on ours: a machine that has gone, or a
# process that hangs, would else keep its locks, the leader's among them, for hours.
_DEADLINES = {
    "idle_in_transaction_session_timeout": "15s",
    "lock_timeout": "10s",
    "statement_timeout": "60s",
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "15s",
}
_REACHING = {
    "connect_timeout": 10,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
# How long a row that is due stays with the worker that took it; renewed while it works.
LEASE = timedelta(seconds=20)
_TURN = 10.0  # seconds that a transaction waits for those before it, on SQLite; for another process as well
_IDLE = 5.0  # seconds after which a connection is asked whether it lives
_NAMING = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC in Python; `timestamptz` on PostgreSQL, naive UTC text on SQLite."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a zone")
        utc = value.astimezone(UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if dialect.name == "sqlite" else value.astimezone(UTC)


# What JSON's readers take for a whole number, and what a key of SQLite's rows can be.
RANDOM_KEY = BigInteger().with_variant(Integer, "sqlite")
_RANDOM_BITS = 52


def random_key() -> Any:
    """A primary key that never comes again, not even in a restored database.

    Secrets are derived from the keys of such rows: with a counted key, an old secret would open a new row.
    """
    return mapped_column(
        RANDOM_KEY, primary_key=True, autoincrement=False, default=lambda: secrets.randbits(_RANDOM_BITS) + 1
    )


def text_enum(kind: type[StrEnum], name: str) -> Enum:
    """A column type: text with a CHECK, the same on both engines."""

    def values(members: Any) -> list[str]:
        return [member.value for member in members]

    return Enum(kind, native_enum=False, values_callable=values, name=name, length=32, create_constraint=True)


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=_NAMING)


class RecordedSession(Session):
    """A session whose changes `poolsvc.models.audit` notes under the name in `info["actor"]`."""


class Database:
    """An engine and its sessions. `patient`: for migrations and copies, whose statements take as long as they take."""

    def __init__(self, url: str, *, patient: bool = False) -> None:
        # Parameters stay out of errors: some are hashes of tokens.
        more = {} if url.startswith("sqlite") else {**_CONNECTIONS, "connect_args": _REACHING}
        self.engine: AsyncEngine = create_async_engine(url, hide_parameters=True, **more)
        self._sessions = async_sessionmaker(
            self.engine, expire_on_commit=False, sync_session_class=RecordedSession
        )
        self._turn = asyncio.Lock()
        if self.engine.dialect.name == "sqlite":
            _make_private(self.engine.url.database)
            event.listen(self.engine.sync_engine, "connect", _prepare_sqlite)
            event.listen(self.engine.sync_engine, "begin", _begin_immediate)
        else:
            if not patient:
                event.listen(self.engine.sync_engine, "connect", _set_deadlines)
            event.listen(self.engine.sync_engine, "checkin", _note_use)
            event.listen(self.engine.sync_engine, "checkout", partial(_check_idle, self.engine.dialect))

    @asynccontextmanager
    async def transaction(self, actor: str = "worker") -> AsyncIterator[AsyncSession]:
        """A session that commits at the end, or rolls back when an exception leaves it.

        `actor` is who the audit log says made the changes; `act_as` names another one later.
        """
        async with (
            self._in_turn() if self.engine.dialect.name == "sqlite" else nullcontext(),
            self._sessions(info={"actor": actor}) as session,
            session.begin(),
        ):
            yield session

    @asynccontextmanager
    async def _in_turn(self) -> AsyncIterator[None]:
        """One after the other, as they came: SQLite has one writer at a time, and takes the next by chance."""
        try:
            async with asyncio.timeout(_TURN):
                await self._turn.acquire()
        except TimeoutError:
            raise PoolTimeout(f"no turn at the database within {_TURN:g} s") from None
        try:
            yield
        finally:
            self._turn.release()

    @asynccontextmanager
    async def snapshot(self, *, exclusive: bool = False) -> AsyncIterator[AsyncConnection]:
        """The database at one moment, to read only; `exclusive` keeps others from changing it meanwhile."""
        async with self.engine.connect() as connection:
            if self.engine.dialect.name == "sqlite":
                await connection.execution_options(begin="IMMEDIATE" if exclusive else "DEFERRED")
            else:
                await connection.execution_options(isolation_level="REPEATABLE READ")
            async with connection.begin():
                if exclusive and self.engine.dialect.name == "postgresql":
                    tables = ", ".join(table.name for table in Base.metadata.sorted_tables)
                    await connection.execute(text(f"LOCK TABLE {tables} IN SHARE MODE"))
                yield connection

    async def close(self) -> None:
        await self.engine.dispose()


def act_as(session: AsyncSession, actor: str) -> None:
    """What the session changes from now on is this one's doing."""
    session.info["actor"] = actor


async def queue_for(session: AsyncSession, thing: str) -> None:
    """Wait until no other transaction is at this thing, which need not be a row; held until the transaction ends.

    On SQLite there is never another transaction that writes.
    """
    if session.get_bind().dialect.name == "postgresql":
        await session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(thing, 0))))


def _note_use(_connection: object, record: ConnectionPoolEntry) -> None:
    record.info["used_at"] = time.monotonic()


def _check_idle(
    dialect: Dialect, connection: DBAPIConnection, record: ConnectionPoolEntry, _proxy: object
) -> None:
    """Ask whether a connection still lives, if it was idle for long; each time would cost more than many statements."""
    used_at = record.info.get("used_at")
    if used_at is None or time.monotonic() - used_at < _IDLE:
        return
    try:
        dialect.do_ping(connection)
    except dialect.loaded_dbapi.Error as error:
        raise DisconnectionError("the connection was idle and is gone") from error


def _make_private(file: str | None) -> None:
    """Let nobody but the owner read a database that SQLite is about to make."""
    if file and file != ":memory:":
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # The driver would begin transactions late, at the first write, and then lose to another writer.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "foreign_keys=ON",
        f"busy_timeout={_TURN * 1000:.0f}",
        "synchronous=NORMAL",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _set_deadlines(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("; ".join(f"SET {name} = '{value}'" for name, value in _DEADLINES.items()))
    cursor.close()
    connection.commit()


def _begin_immediate(connection: Connection) -> None:
    # A transaction that turned into a writer late would lose to another writer.
    mode = connection.get_execution_options().get("begin", "IMMEDIATE")
    connection.exec_driver_sql(f"BEGIN {mode}")
