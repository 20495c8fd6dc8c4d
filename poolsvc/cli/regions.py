"""`poolsvc regions`: which regions have a name in DNS, and how they come out. Rendering only."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer

from poolsvc import plans
from poolsvc.cli.common import ConfigOption, ExitStatus, in_transaction, read_settings, refuse
from poolsvc.concentration import Concentration
from poolsvc.errors import PoolError
from poolsvc.regional import Atlas, Place

app = typer.Typer(no_args_is_help=True, help="regions of the pool that have a name of their own")
LabelArgument = Annotated[
    str, typer.Argument(metavar="REGION", help="a country's code or a continent, such as de or north-america")
]


@app.command("list")
def show(
    config: ConfigOption,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document")] = False,
) -> None:
    """Print the regions that are switched on, and those that have a server."""
    settings = read_settings(config)
    found = in_transaction(settings, Atlas(settings).look)
    if as_json:
        typer.echo(json.dumps([_document(label, place) for label, place in found.items()], indent=2))
        return
    typer.echo(f"{'region':14} {'':3} {'servers':>7} {'members':>7}  {'young':>12}  filled from")
    for label, place in found.items():
        one = place.standing
        is_on = label == "" or place.on_since is not None
        young = f"{one.young_wanted:4.0%} -> {one.young_given:4.0%}"
        typer.echo(
            f"{label or 'world':14} {'on' if is_on else 'off':3} {one.servers:7} {one.members:7}  {young:>12}"
            f"  {', '.join(around or 'world' for around in one.filled_from) or '-'}"
        )
    typer.echo(
        f"a region needs {settings.policy.region_size} servers; young: of its weight, what accounts younger than"
        f" {settings.policy.young_days:g} days would have, and what they have"
    )


@app.command()
def independence(
    config: ConfigOption,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document")] = False,
) -> None:
    """Print in how few hands the pool and its regions are: answers, the largest, and what a hostile majority takes."""
    found = in_transaction(settings := read_settings(config), Atlas(settings).concentration)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found.values()], indent=2))
        return
    for one in found.values():
        typer.echo(f"{one.region or 'world'}: {one.servers} servers of {one.members} members")
        for line in _lines(one):
            typer.echo(f"  {line}")


def _lines(one: Concentration) -> Iterator[str]:
    if one.varied is not None:
        yield (
            f"answers with four different operators {one.varied.operators:.0%}, networks {one.varied.networks:.0%},"
            f" prefixes {one.varied.prefixes:.0%}, all of that {one.varied.all:.0%}"
        )
    for what, found in (("member", one.operator), ("AS", one.network), ("country", one.country)):
        if found is not None:
            yield f"the largest {what}, {found.what}, has {found.share:.0%} of the weight"
    if one.to_add is not None:
        yield f"a hostile majority of a client's four takes {one.to_add} more servers of as many accounts and networks"
    if one.to_take is not None:
        yield f"or {one.to_take} of the present members together, the heaviest first"


@app.command()
def on(config: ConfigOption, region: LabelArgument) -> None:
    """Give a region its name in DNS; it needs enough servers, and the right to write it on the primary."""
    settings = read_settings(config)
    atlas, now = Atlas(settings), datetime.now(UTC)
    if in_transaction(settings, lambda session: atlas.check(session, region)).on_since is None:
        try:
            asyncio.run(plans.may_write(settings, region))
        except PoolError as error:
            refuse(ExitStatus.PEER, error)
        in_transaction(settings, lambda session: atlas.switch_on(session, region, now))
    typer.echo(f"{region} is on: clients may be given the pool {region}.{settings.pool}")


@app.command()
def off(config: ConfigOption, region: LabelArgument) -> None:
    """Take a region's name out of DNS; clients that were given it find no servers any more."""
    settings = read_settings(config)
    atlas = Atlas(settings)
    in_transaction(settings, lambda session: atlas.switch_off(session, region))
    typer.echo(f"{region} is off")


def _document(label: str, place: Place) -> dict[str, object]:
    one = place.standing
    return {
        "region": label or "world",
        "on_since": None if place.on_since is None else place.on_since.isoformat(),
        "servers": one.servers,
        "members": one.members,
        "filled_from": [around or "world" for around in one.filled_from],
        "young_wanted": round(one.young_wanted, 4),
        "young_given": round(one.young_given, 4),
    }
