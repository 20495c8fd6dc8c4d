"""The database's tables and this version's migrations: bring them together, or say that they differ."""

import asyncio
import io
import time
from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from psycopg.errors import LockNotAvailable
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

import migrations
from poolsvc.config import Settings
from poolsvc.db import Database
from poolsvc.errors import PoolError

_PLACE = str(Path(migrations.__file__).parent)
_FAULTS = (SQLAlchemyError, CommandError, OSError)
_WAITS = (1.0, 2.0)  # before the second and the third attempt


class DatabaseUnusable(PoolError):
    """The database is away, refuses, or has other tables than this version."""

    code = "database"


def upgrade(settings: Settings) -> None:
    """Bring the database to this version's tables. Blocks; no event loop may run in this thread.

    A lock that somebody holds for a moment is waited for, a few times for seconds; else the tables stay as they were.
    """
    for wait in (*_WAITS, None):
        try:
            command.upgrade(_alembic(settings), "head")
        except DBAPIError as error:
            if not isinstance(error.orig, LockNotAvailable):
                raise _unusable(error) from None
            if wait is None:
                raise DatabaseUnusable(
                    "the database: another session holds a lock that the migration needs; nothing was changed",
                    remedy="end that session, or try again when it has ended",
                ) from None
            time.sleep(wait)
        except _FAULTS as error:
            raise _unusable(error) from None
        else:
            return


def _unusable(error: Exception) -> DatabaseUnusable:
    return DatabaseUnusable(f"the database: {error}", remedy="check `database` in the settings")


def check_current(settings: Settings) -> None:
    """Whether the tables are this version's, and the pool in them is that of the settings. Blocks as `upgrade` does."""
    try:
        command.current(_alembic(settings), check_heads=True)
    except CommandError as error:
        raise DatabaseUnusable(
            f"the database: {error}", remedy="run `poolsvc migrate --config FILE` first"
        ) from None
    except _FAULTS as error:
        raise DatabaseUnusable(
            f"the database: {error}", remedy="check `database` in the settings, and that it runs"
        ) from None
    if (found := asyncio.run(_pool_in(settings))) not in (None, settings.pool):
        raise DatabaseUnusable(
            f"the database is that of the pool {found}, not of {settings.pool}",
            remedy="check `database` and `pool` in the settings",
            field="database",
        )


async def _pool_in(settings: Settings) -> str | None:
    database = Database(settings.database)
    try:
        async with database.transaction() as session:
            found: str | None = await session.scalar(text("SELECT domain FROM pool"))
            return found
    finally:
        await database.close()


@cache
def heads() -> frozenset[str]:
    """The version of this program's tables, as the database notes it. Reads files."""
    return frozenset(ScriptDirectory(_PLACE).get_heads())


def _alembic(settings: Settings) -> Config:
    config = Config(stdout=io.StringIO())
    config.set_main_option("script_location", _PLACE)
    config.attributes["url"] = settings.database
    return config
