"""`poolsvc`: run the registry, prepare its database, make the first operator. Rendering only."""

import json
import os
import socket
from collections.abc import Collection
from typing import Annotated

import structlog
import typer
from sqlalchemy import make_url

from nts_core import acceptor
from nts_core.client import load_roots
from nts_core.shell import configure_logging, raise_descriptor_limit
from poolsvc import embedded_dns, schema
from poolsvc.app import Part, create_app
from poolsvc.cli import accounts, acme, data, dayone, dns, keys, monitor, monitors, regions, zone
from poolsvc.cli.common import ConfigOption, ExitStatus, fail, read_registry_key, read_settings, refuse
from poolsvc.config import Settings, split_endpoint
from poolsvc.db import Database
from poolsvc.files import ACCOUNT_FILES, GEO_FILES, UnusableFile, check_files
from poolsvc.names import narrowness
from poolsvc.schema import DatabaseUnusable
from poolsvc.serving import Duty, create_server

app = typer.Typer(
    name="poolsvc", no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False
)
config_app = typer.Typer(no_args_is_help=True, help="the settings")
database_app = typer.Typer(no_args_is_help=True, help="the database")
app.add_typer(accounts.app, name="operator")
app.add_typer(acme.app, name="acme")
app.add_typer(config_app, name="config")
app.add_typer(dns.app, name="dns")
app.add_typer(keys.app, name="key")
app.add_typer(regions.app, name="regions")
app.add_typer(monitors.app, name="monitors")
app.add_typer(zone.app, name="zone")
app.command("init")(dayone.init)
app.command("parent-records")(dayone.show_parent_records)
app.command("doctor")(dayone.examine)
app.command("backup")(data.write_backup)
app.command("restore")(data.restore)
app.command("thaw")(data.thaw)
app.command("monitor")(monitor.run)
app.add_typer(database_app, name="db")
database_app.command("move")(data.move)


@app.command()
def migrate(config: ConfigOption) -> None:
    """Bring the database to this version's tables."""
    try:
        schema.upgrade(read_settings(config))
    except DatabaseUnusable as error:
        refuse(ExitStatus.DATABASE, error)
    typer.echo("the database is up to date")


@app.command()
def serve(
    config: ConfigOption,
    part: Annotated[Part, typer.Option("--role", help="what this process does; several need PostgreSQL")] = (
        Part.ALL
    ),
) -> None:
    """Run the API and the worker, in one process or each in its own."""
    settings = read_settings(config)
    configure_logging()
    raise_descriptor_limit()
    _check_migrated(settings)
    dns_server = _dns_server(settings, part)
    _check_files(settings, without=(*ACCOUNT_FILES, *GEO_FILES))
    if settings.allow_private_addresses:
        structlog.get_logger().warning("private_addresses_allowed")
    listening = [_bind("listen", endpoint) for endpoint in settings.listen]
    plain = [
        _bind("web_tls.http_listen", endpoint)
        for endpoint in settings.web_tls.http_listen
        if settings.web_tls.acme
    ]
    roots, key = load_roots(settings.roots_file), read_registry_key(settings)
    application = create_app(settings, Database(settings.database), roots, key, part)
    create_server(settings, application, listening, plain, dns_server).run()


def _dns_server(settings: Settings, part: Part) -> list[Duty]:
    """The embedded server, if it is this process's to run."""
    embedded = settings.dns.embedded
    if embedded is None:
        return []
    if part is not Part.ALL and not embedded.own_process:
        fail(
            ExitStatus.CONFIGURATION,
            f"dns.embedded: `serve --role {part}` runs no DNS server",
            "set dns.embedded.own_process and run `poolsvc dns serve` on one machine; on others name it as dns.primary",
        )
    charge = embedded_dns.Charge.of(settings)
    try:
        charge.prepare()
        return [] if embedded.own_process else [embedded_dns.Child(charge, embedded_dns.bind(charge)).run]
    except embedded_dns.DnsUnusable as error:
        refuse(ExitStatus.CONFIGURATION, error)


def _bind(setting: str, endpoint: str) -> socket.socket:
    """A socket that does not listen yet: nobody is kept waiting for what is not there."""
    try:
        return acceptor.bind(*split_endpoint(endpoint), socket.SOCK_STREAM)
    except OSError as error:
        fail(
            ExitStatus.CONFIGURATION,
            f"{setting} {endpoint}: {os.strerror(error.errno or 0)}",
            "choose another address or port",
        )


def _check_migrated(settings: Settings) -> None:
    try:
        schema.check_current(settings)
    except DatabaseUnusable as error:
        refuse(ExitStatus.DATABASE, error)


def _check_files(settings: Settings, without: Collection[str] = ()) -> None:
    try:
        check_files(settings, without)
    except UnusableFile as error:
        refuse(ExitStatus.CONFIGURATION, error)


@config_app.command("check")
def config_check(config: ConfigOption) -> None:
    """Say whether the settings and the files that they name can be used."""
    settings = read_settings(config)
    _check_files(settings)
    if (note := narrowness(settings.pool)) is not None:
        typer.echo(f"note: {note}")
    typer.echo("ok, for a trial: allow_private_addresses is on" if settings.allow_private_addresses else "ok")


@config_app.command("show")
def config_show(config: ConfigOption) -> None:
    """Print the effective settings. Secrets are only ever named by file."""
    shown = read_settings(config).model_dump(mode="json")
    shown["database"] = make_url(shown["database"]).render_as_string(hide_password=True)
    typer.echo(json.dumps(shown, indent=2))


def main() -> None:
    app()
