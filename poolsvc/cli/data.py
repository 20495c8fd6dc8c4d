"""`poolsvc backup`, `restore`, `thaw` and `move`: copies of the database. Rendering only."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from pydantic import TypeAdapter, ValidationError

from poolsvc import backup, plans, recovery, schema
from poolsvc.cli import zone
from poolsvc.cli.common import ConfigOption, ExitStatus, fail, read_settings, refuse, with_database
from poolsvc.config import DatabaseUrl
from poolsvc.db import Database
from poolsvc.errors import PoolError
from poolsvc.plans import Outlook

_SHOWN = 50


def write_backup(file: Annotated[Path, typer.Argument(help="a new file")], config: ConfigOption) -> None:
    """Copy the whole database into a file, while the registry runs."""
    settings = read_settings(config)
    made = with_database(
        settings, lambda database: backup.dump(database, file, settings.pool, datetime.now(UTC))
    )
    rows = sum(content.rows for content in made.tables.values())
    typer.echo(f"{file} holds {rows} rows of {len(made.tables)} tables")
    typer.echo(
        "It has no keys: keep copies of the files that `config show` names, and of the journal, elsewhere."
    )


def restore(
    file: Annotated[Path, typer.Argument(help="what `poolsvc backup` wrote")],
    config: ConfigOption,
    journal: Annotated[
        list[Path] | None,
        typer.Option(help="a journal of removals; once for each machine that ran a worker"),
    ] = None,
    *,
    no_journal: Annotated[
        bool, typer.Option(help="there is none: who left since the copy comes back")
    ] = False,
) -> None:
    """Fill an empty database from a backup, and freeze it until `poolsvc thaw`."""
    settings = read_settings(config)
    journals = journal or ([settings.journal_file] if settings.journal_file.is_file() else [])
    if not journals and not no_journal:
        fail(
            ExitStatus.USAGE,
            f"no journal of removals: {settings.journal_file} is not there",
            "give each machine's with --journal FILE; without them, who left since comes back (--no-journal)",
        )
    now = datetime.now(UTC)
    done = with_database(settings, lambda database: recovery.restore(database, settings, file, journals, now))
    typer.echo(f"{done.rows} rows of {done.created_at.isoformat(timespec='seconds')}")
    typer.echo(f"taken out again: {', '.join(done.left_again) or 'none'}")
    typer.echo(f"names burnt by the journal alone: {', '.join(done.burnt) or 'none'}")
    typer.echo(f"{done.tokens_revoked} tokens revoked: people sign in again, agents come back by themselves")
    typer.echo("nobody is staff: `poolsvc operator create --email EMAIL` makes you one; appoint the others")
    typer.echo("people who were removed, blocked or erased since the copy are back: do it once more")
    typer.echo("Nothing is published until `poolsvc thaw`.")


def thaw(
    config: ConfigOption,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
    """Show what a restored registry would change in the zone, and let it once that is confirmed."""
    settings = read_settings(config)
    outlook = with_database(settings, lambda database: plans.look(database, settings, datetime.now(UTC)))
    if outlook.frozen_at is None:
        typer.echo("the registry is not frozen")
        return
    _show(outlook)
    if not yes and not typer.confirm("Publish this?"):
        raise typer.Exit(ExitStatus.OK)
    with_database(settings, lambda database: recovery.thaw(database, settings, outlook, datetime.now(UTC)))
    typer.echo("the registry publishes from now on")


def _show(outlook: Outlook) -> None:
    counts = ", ".join(f"{count} {state}" for state, count in sorted(outlook.servers.items()))
    typer.echo(f"servers: {counts or 'none'}")
    zone.show(outlook, outlook.changes[:_SHOWN])
    if outlook.unknown:
        typer.echo(f"in the zone and unknown here, never to be given again: {', '.join(outlook.unknown)}")


def move(
    config: ConfigOption,
    to: Annotated[str, typer.Option("--to", metavar="URL", help="an empty database, such as PostgreSQL's")],
) -> None:
    """Copy the database into another one, from SQLite to PostgreSQL for instance. Stop `serve` first."""
    settings = read_settings(config)
    try:
        url = TypeAdapter[str](DatabaseUrl).validate_python(to)
    except ValidationError as error:
        fail(ExitStatus.USAGE, f"--to: {error.errors()[0]['msg']}", "give the new database's URL")
    target = settings.model_copy(update={"database": url})

    async def copy(database: Database) -> dict[str, int]:
        other = Database(url, patient=True)
        try:
            return await recovery.move(database, other, settings, datetime.now(UTC))
        finally:
            await other.close()

    if target.database == settings.database:
        fail(ExitStatus.USAGE, "--to: it is the present database", "give another one")
    try:
        schema.upgrade(target)
    except PoolError as error:
        refuse(ExitStatus.DATABASE, error)
    counts = with_database(settings, copy)
    typer.echo(f"{sum(counts.values())} rows of {len(counts)} tables are there")
    typer.echo(
        "Set `database` to the new one, start `poolsvc serve`, and keep the old one until you trust it."
    )
