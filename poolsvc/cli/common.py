"""What all commands of `poolsvc` share: how they end, and where their settings are."""

import asyncio
from collections.abc import Awaitable, Callable
from enum import IntEnum
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import typer
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from poolsvc import schema
from poolsvc.config import AuthoritySettings, ConfigError, Settings, load_settings
from poolsvc.db import Database
from poolsvc.derived import RegistryKey
from poolsvc.errors import PoolError
from poolsvc.primary import PublishError
from poolsvc.schema import DatabaseUnusable

T = TypeVar("T")

ConfigOption = Annotated[Path, typer.Option("--config", metavar="FILE", help="the settings file (TOML)")]

CaOption = Annotated[
    str | None,
    typer.Option("--ca", metavar="HOST", help="the CA, by the host of its directory; the first if left out"),
]


class ExitStatus(IntEnum):
    """How `poolsvc` ends."""

    OK = 0
    USAGE = 2
    CONFIGURATION = 3
    DATABASE = 4
    DOCTOR = 5
    PEER = 6


def fail(status: ExitStatus, message: str, remedy: str) -> NoReturn:
    typer.echo(f"error: {message}\n  {remedy}", err=True)
    raise typer.Exit(status)


def refuse(status: ExitStatus, error: PoolError) -> NoReturn:
    fail(status, error.detail, error.remedy)


def read_settings(file: Path) -> Settings:
    try:
        return load_settings(file)
    except ConfigError as error:
        fail(ExitStatus.CONFIGURATION, str(error), "correct the setting; docs/operators.md explains each")


def authority(settings: Settings, name: str | None) -> AuthoritySettings:
    """The CA that a command is for."""
    known = {ca.name: ca for ca in settings.ca.with_rehearsal}
    if name is None or name in known:
        return known.get(name or settings.ca.name, settings.ca)
    fail(ExitStatus.USAGE, f"--ca {name}: the settings have no such CA", f"give one of: {', '.join(known)}")


def read_registry_key(settings: Settings) -> RegistryKey:
    try:
        return RegistryKey.load(settings.key_file)
    except (OSError, ValueError) as error:
        fail(
            ExitStatus.CONFIGURATION,
            f"key_file: {error}",
            "give a file that `poolsvc` can read, or a place where it can make one",
        )


def in_transaction(settings: Settings, work: Callable[[AsyncSession], Awaitable[T]]) -> T:
    """What `work` gives; the log says that the console did it. What goes wrong ends the program."""

    async def run() -> T:
        database = Database(settings.database)
        try:
            async with database.transaction("console") as session:
                return await work(session)
        finally:
            await database.close()

    try:
        schema.check_current(settings)
        return asyncio.run(run())
    except DatabaseUnusable as error:
        refuse(ExitStatus.DATABASE, error)
    except PoolError as error:
        refuse(ExitStatus.USAGE, error)
    except (SQLAlchemyError, OSError) as error:
        fail(ExitStatus.DATABASE, f"the database: {error}", "check `database` in the settings")


def with_database(settings: Settings, work: Callable[[Database], Awaitable[T]]) -> T:
    """Do something with the database, and say what went wrong in words."""

    async def run() -> T:
        database = Database(settings.database, patient=True)
        try:
            return await work(database)
        finally:
            await database.close()

    try:
        schema.check_current(settings)
        return asyncio.run(run())
    except PublishError as error:
        fail(ExitStatus.PEER, f"the primary: {error}", "poolsvc doctor says more")
    except PoolError as error:
        refuse(ExitStatus.DATABASE, error)
    except SQLAlchemyError as error:
        fail(ExitStatus.DATABASE, f"the database: {error}", "check `database` in the settings")
    except OSError as error:
        fail(ExitStatus.CONFIGURATION, str(error), "check the file's name, rights and space")
