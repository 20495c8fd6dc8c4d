"""Runs migrations over the application's own async engine; the URL comes from the settings or alembic.ini."""

import asyncio
import time
from typing import Any

from alembic import context
from alembic.util.exc import CommandError
from sqlalchemy import Connection, event, text

import poolsvc.models  # noqa: F401 - makes the tables known
from poolsvc.db import Base, Database
from poolsvc.schema import DatabaseUnusable

target_metadata = Base.metadata
# PostgreSQL's advisory lock of whoever migrates; it ends with the connection.
MIGRATION_LOCK = 0x7472_7565_0002
TURN = 600.0  # seconds that one machine waits for another


def _is_described(name: str | None, kind: str, _parents: object) -> bool:
    """Partitions of the samples come and go without a migration."""
    return kind != "table" or name is None or not name.startswith("samples_")


def _take_turn(connection: Connection) -> None:
    """Of two machines that migrate at once the second one waits, and then finds nothing to do.

    Not within a statement: an index that is built without a lock waits for all that are under way.
    """
    end = time.monotonic() + TURN
    while not connection.scalar(text("SELECT pg_try_advisory_lock(:lock)"), {"lock": MIGRATION_LOCK}):
        connection.commit()
        if time.monotonic() > end:
            raise DatabaseUnusable(
                "the database: another machine migrates it, and does not come to an end",
                remedy="wait for it: whatever ends it has it begin anew",
            )
        time.sleep(0.2)
    connection.commit()


def _run(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        _take_turn(connection)
        # A migration that cannot get its lock gives up instead of stopping everybody behind it.
        connection.execute(text("SET lock_timeout = '2s'"))
        connection.commit()
    context.configure(
        connection=connection,
        target_metadata=target_metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        transaction_per_migration=True,
        compare_type=True,
        include_name=_is_described,
    )
    with context.begin_transaction():
        context.run_migrations()
    if connection.dialect.name == "sqlite":
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
        if broken:
            raise CommandError(f"{len(broken)} rows refer to rows that are not there")


def _let_tables_be_replaced(connection: Any, _record: object) -> None:
    """SQLite changes a table by making it anew, which its own references forbid; they are checked at the end."""
    connection.execute("PRAGMA foreign_keys=OFF").close()


async def _run_online() -> None:
    config = context.config
    url: str = config.attributes.get("url") or config.get_main_option("sqlalchemy.url") or ""
    database = Database(url, patient=True)
    if database.engine.dialect.name == "sqlite":
        event.listen(database.engine.sync_engine, "connect", _let_tables_be_replaced)
    try:
        async with database.engine.connect() as connection:
            await connection.run_sync(_run)
            await connection.commit()
    finally:
        await database.close()


asyncio.run(_run_online())
