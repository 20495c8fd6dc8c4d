"""`poolsvc`: run the registry, prepare its database, make the first operator. Rendering only."""

import asyncio
import base64
import contextlib
import io
import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from typing import Annotated, NoReturn

import structlog
import typer
import uvicorn
from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.util.exc import CommandError
from cryptography import x509
from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError

import migrations
from nts_core.client import ClientError, load_roots
from nts_core.shell import configure_logging, raise_descriptor_limit
from poolsvc import members
from poolsvc.app import create_app
from poolsvc.config import ConfigError, Settings, load_settings, split_endpoint
from poolsvc.db import Database
from poolsvc.derived import RegistryKey
from poolsvc.errors import PoolError

app = typer.Typer(
    name="poolsvc", no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False
)
operator_app = typer.Typer(no_args_is_help=True, help="operators of the pool")
config_app = typer.Typer(no_args_is_help=True, help="the settings")
app.add_typer(operator_app, name="operator")
app.add_typer(config_app, name="config")

ConfigOption = Annotated[Path, typer.Option("--config", metavar="FILE", help="the settings file (TOML)")]


class ExitStatus(IntEnum):
    """How `poolsvc` ends."""

    OK = 0
    USAGE = 2
    CONFIGURATION = 3
    DATABASE = 4


def _fail(status: ExitStatus, message: str, remedy: str) -> NoReturn:
    typer.echo(f"error: {message}\n  {remedy}", err=True)
    raise typer.Exit(status)


def _settings(file: Path) -> Settings:
    try:
        return load_settings(file)
    except ConfigError as error:
        _fail(ExitStatus.CONFIGURATION, str(error), "correct the setting; docs/operators.md explains each")


def _alembic(settings: Settings) -> AlembicConfig:
    config = AlembicConfig(stdout=io.StringIO())
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.attributes["url"] = settings.database
    return config


@app.command()
def migrate(config: ConfigOption) -> None:
    """Bring the database to this version's tables."""
    try:
        command.upgrade(_alembic(_settings(config)), "head")
    except (SQLAlchemyError, CommandError, OSError) as error:
        _fail(ExitStatus.DATABASE, f"the database: {error}", "check `database` in the settings")
    typer.echo("the database is up to date")


@app.command()
def serve(config: ConfigOption) -> None:
    """Run the API and the worker in one process."""
    settings = _settings(config)
    configure_logging()
    raise_descriptor_limit()
    _check_migrated(settings)
    _check_files(settings)
    if settings.allow_private_addresses:
        structlog.get_logger().warning("private_addresses_allowed")
    sockets = [_bind(endpoint) for endpoint in settings.listen]
    application = create_app(settings, Database(settings.database), _roots(settings), _key(settings))
    try:
        server_config = uvicorn.Config(
            application,
            log_level="warning",
            server_header=False,
            proxy_headers=bool(settings.trusted_proxies),
            forwarded_allow_ips=[str(address) for address in settings.trusted_proxies],
            ssl_certfile=settings.tls_certificate,
            ssl_keyfile=settings.tls_key,
            limit_concurrency=1000,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=5,
        )
        server_config.load()
    except OSError as error:
        _fail(ExitStatus.CONFIGURATION, f"tls_certificate, tls_key: {error}", "give a PEM chain and its key")
    _Server(server_config).run(sockets=sockets)


class _Server(uvicorn.Server):
    """Ends with status 0 on SIGTERM: uvicorn would raise the signal again once it has stopped in order."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            yield
            self._captured_signals.clear()


def _bind(endpoint: str) -> socket.socket:
    address, port = split_endpoint(endpoint)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family, backlog=512)
    except OSError as error:
        _fail(
            ExitStatus.CONFIGURATION,
            f"listen {endpoint}: {os.strerror(error.errno or 0)}",
            "choose another address or port",
        )


def _check_migrated(settings: Settings) -> None:
    try:
        command.current(_alembic(settings), check_heads=True)
    except CommandError as error:
        _fail(ExitStatus.DATABASE, f"the database: {error}", "run `poolsvc migrate --config FILE` first")
    except (SQLAlchemyError, OSError) as error:
        _fail(
            ExitStatus.DATABASE,
            f"the database: {error}",
            "check `database` in the settings, and that it runs",
        )


def _check_files(settings: Settings) -> None:
    """What the worker will need; a mistake is better said now than in an alarm."""
    try:
        base64.b64decode(settings.dns.tsig_secret_file.read_text().strip(), validate=True)
    except (OSError, ValueError) as error:
        _fail(
            ExitStatus.CONFIGURATION,
            f"dns.tsig_secret_file: {error}",
            "give a readable file with the key's base64 secret",
        )
    if settings.ca.ca_file is not None:
        try:
            load_roots(settings.ca.ca_file)
        except ClientError as error:
            _fail(ExitStatus.CONFIGURATION, f"ca.ca_file: {error.message}", error.remedy)


def _roots(settings: Settings) -> list[x509.Certificate]:
    try:
        return load_roots(settings.roots_file)
    except ClientError as error:
        _fail(ExitStatus.CONFIGURATION, f"roots_file: {error.message}", error.remedy)


def _key(settings: Settings) -> RegistryKey:
    try:
        return RegistryKey.load(settings.key_file)
    except (OSError, ValueError) as error:
        _fail(ExitStatus.CONFIGURATION, f"key_file: {error}", "give a file that `poolsvc` can read and make")


@operator_app.command("create")
def operator_create(
    config: ConfigOption,
    email: Annotated[str | None, typer.Option(help="to sign in with")] = None,
    name: Annotated[str, typer.Option(help="a display name")] = "",
) -> None:
    """Make an operator, and print an API token of theirs once."""
    settings = _settings(config)
    _check_migrated(settings)

    async def create() -> str:
        database = Database(settings.database)
        try:
            async with database.transaction("console") as session:
                _, token = await members.create_operator(session, datetime.now(UTC), email=email, name=name)
                return token
        finally:
            await database.close()

    try:
        token = asyncio.run(create())
    except PoolError as error:
        _fail(ExitStatus.USAGE, error.detail, error.remedy)
    except (SQLAlchemyError, OSError) as error:
        _fail(ExitStatus.DATABASE, f"the database: {error}", "check `database` in the settings")
    typer.echo(token)


@config_app.command("show")
def config_show(config: ConfigOption) -> None:
    """Print the effective settings. Secrets are only ever named by file."""
    shown = _settings(config).model_dump(mode="json")
    shown["database"] = make_url(shown["database"]).render_as_string(hide_password=True)
    typer.echo(json.dumps(shown, indent=2))


def main() -> None:
    app()
