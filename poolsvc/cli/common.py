"""What all commands of `poolsvc` share: how they end, and where their settings are."""

from enum import IntEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from poolsvc.config import ConfigError, Settings, load_settings
from poolsvc.errors import PoolError

ConfigOption = Annotated[Path, typer.Option("--config", metavar="FILE", help="the settings file (TOML)")]


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
