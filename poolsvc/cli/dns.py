"""`poolsvc dns`: the embedded DNS server, and the zone's keys. Rendering only."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from nts_core.shell import configure_logging, raise_descriptor_limit
from poolsvc import edge, embedded_dns
from poolsvc.cli.common import ConfigOption, ExitStatus, fail, read_settings, refuse
from poolsvc.embedded_dns import Charge
from poolsvc.nameserver import rollover
from poolsvc.nameserver.keys import KeyState
from poolsvc.nameserver.store import Store, StoreUnusable
from poolsvc.primary import PublishError

app = typer.Typer(no_args_is_help=True, help="the embedded DNS server")
keys_app = typer.Typer(no_args_is_help=True, help="the keys of its zone; docs/runbook.md has the rest")
app.add_typer(keys_app, name="keys")


@app.command()
def serve(config: ConfigOption) -> None:
    """Run the embedded server alone, for `dns.embedded.own_process`."""
    charge = _read(config)
    configure_logging()
    raise_descriptor_limit()
    try:
        embedded_dns.serve(charge)
    except embedded_dns.DnsUnusable as error:
        refuse(ExitStatus.CONFIGURATION, error)


@app.command("edge")
def run_edge(
    config: Annotated[
        Path,
        typer.Option("--config", metavar="FILE", help="the settings of this edge, as `init` writes them"),
    ],
    *,
    once: Annotated[bool, typer.Option("--once", help="fetch what is new, and end")] = False,
) -> None:
    """Keep a knotd on this host at the answer sets of the pool; runs knotc."""
    try:
        settings = edge.EdgeSettings.read(config)
        if not once:
            configure_logging()
            asyncio.run(edge.serve(settings))
            return
        is_new = asyncio.run(edge.once(settings))
    except edge.EdgeUnusable as error:
        refuse(ExitStatus.CONFIGURATION, error)
    except (PublishError, edge.NotServed, OSError) as error:
        fail(ExitStatus.PEER, str(error), "knotd goes on with the sets that it has; see docs/dns-servers.md")
    typer.echo("knotd has new answer sets" if is_new else "nothing new")


@keys_app.command("list")
def list_keys(config: ConfigOption) -> None:
    """Print the keys with their DS, and what each waits for."""
    charge = _read(config)
    with _store(charge) as store:
        rows = store.key_rows()
    for row in rows:
        text, moment = rollover.explain(row, rows, charge.apex.waits)
        until = "" if moment is None else f", at {_time(moment)}"
        typer.echo(f"{row.key.tag:5}  {row.key.state:9}  since {_time(row.since)}  {text}{until}".rstrip())
        typer.echo(f"       {embedded_dns.ds_text(charge, row.key)}")


@keys_app.command("roll")
def roll(config: ConfigOption) -> None:
    """Begin to replace the key. It goes on by itself, but for the DS in the parent."""
    charge = _read(config)
    with _store(charge) as store:
        if len(store.key_rows()) != 1:
            fail(
                ExitStatus.CONFIGURATION,
                "the roll-over before this one is not over",
                "see what it waits for: poolsvc dns keys list",
            )
        row, waits = store.add_key(KeyState.MADE, _now()), charge.apex.waits
        moment = row.since + waits.keys + waits.margin
    typer.echo(
        f"""\
Key {row.key.tag} is made, and published within seconds of a server that runs.
1. Keep a copy of {store.key_file(row)}.
2. From about {_time(moment)} on it signs the zone, and CDS and CDNSKEY name it. Then give the parent, in place of
   the DS that it has, unless it reads CDS itself:
     {embedded_dns.ds_text(charge, row.key)}
3. With `dns.embedded.parents` that is noticed; without, say it once all servers of the parent show it:
     poolsvc dns keys ds-seen {row.key.tag} --config {config}
The key before goes when nobody needs it any more: poolsvc dns keys list"""
    )


@keys_app.command("ds-seen")
def ds_seen(
    tag: Annotated[int, typer.Argument(metavar="TAG", help="of the key that the parent names now")],
    config: ConfigOption,
) -> None:
    """Say that every server of the parent names the active key, and no other, in its DS."""
    with _store(_read(config)) as store:
        rows = store.key_rows()
        active = next(row for row in rows if row.key.state is KeyState.ACTIVE)
        if active.key.tag != tag or not store.note_ds(active, _now()):
            fail(
                ExitStatus.USAGE,
                f"the active key is {active.key.tag}, not {tag}",
                "the parent has to name the active key: poolsvc dns keys list",
            )
    is_last = any(row.key.state is KeyState.RETIRING for row in rows)
    typer.echo(
        f"noted; the key before {tag} goes once the old DS has left all caches" if is_last else "noted"
    )


@keys_app.command("copy-to-knot")
def copy_to_knot(
    knot_config: Annotated[
        Path, typer.Option("--knot-config", metavar="FILE", help="the configuration of the edge's knotd")
    ],
    config: ConfigOption,
) -> None:
    """Give a Knot edge on this host the zone's key, so that both sign alike; runs keymgr."""
    charge = _read(config)
    with _store(charge) as store:
        try:
            tag = embedded_dns.copy_to_knot(charge, store, knot_config)
        except embedded_dns.DnsUnusable as error:
            refuse(ExitStatus.CONFIGURATION, error)
    typer.echo(
        f"Knot has the key {tag}; docs/operators.md says how its answers are compared before the NS change"
    )


def _now() -> int:
    return int(datetime.now(UTC).timestamp())


def _time(moment: int) -> str:
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _read(config: Path) -> Charge:
    settings = read_settings(config)
    if settings.dns.embedded is None:
        fail(
            ExitStatus.CONFIGURATION,
            "dns.primary: this pool has a primary of its own",
            "see that server's own commands; or take dns.primary away, and the embedded server holds the zone",
        )
    return Charge.of(settings)


@contextmanager
def _store(charge: Charge) -> Iterator[Store]:
    try:
        store = Store.open(charge.embedded.directory, charge.zone, as_server=False)
    except StoreUnusable as error:
        fail(ExitStatus.CONFIGURATION, str(error), "see dns.embedded.directory")
    try:
        yield store
    except StoreUnusable as error:
        fail(ExitStatus.CONFIGURATION, str(error), "see dns.embedded.directory")
    finally:
        store.close()
