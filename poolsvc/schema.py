"""The database's tables and this version's migrations: bring them together, or say that they differ."""

import io
from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy.exc import SQLAlchemyError

import migrations
from poolsvc.config import Settings
from poolsvc.errors import PoolError

_PLACE = str(Path(migrations.__file__).parent)
_FAULTS = (SQLAlchemyError, CommandError, OSError)


class DatabaseUnusable(PoolError):
    """The database is away, refuses, or has other tables than this version."""

    code = "database"


def upgrade(settings: Settings) -> None:
    """Bring the database to this version's tables. Blocks; no event loop may run in this thread."""
    try:
        command.upgrade(_alembic(settings), "head")
    except _FAULTS as error:
        raise DatabaseUnusable(f"the database: {error}", remedy="check `database` in the settings") from None


def check_current(settings: Settings) -> None:
    """Whether the tables are this version's. Blocks as `upgrade` does."""
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


@cache
def heads() -> frozenset[str]:
    """The version of this program's tables, as the database notes it. Reads files."""
    return frozenset(ScriptDirectory(_PLACE).get_heads())


def _alembic(settings: Settings) -> Config:
    config = Config(stdout=io.StringIO())
    config.set_main_option("script_location", _PLACE)
    config.attributes["url"] = settings.database
    return config
