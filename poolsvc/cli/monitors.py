"""`poolsvc monitors`: who probes for the pool, who has a say, how many have to agree. Rendering only."""

import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.control import MonitorStatus
from poolsvc import disagreements, monitors, reviews, servers
from poolsvc.cli.common import (
    ConfigOption,
    ExitStatus,
    fail,
    in_transaction,
    read_registry_key,
    read_settings,
)
from poolsvc.config import Settings
from poolsvc.models import Monitor
from poolsvc.reviews import Explained

app = typer.Typer(no_args_is_help=True, help="monitors, which probe servers from other places")
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="the monitor's")]
ReasonOption = Annotated[str, typer.Option("--reason", help="kept in the log, and shown to its member")]
T = TypeVar("T")
# The step up that `approve` takes.
_APPROVED = {MonitorStatus.PENDING: MonitorStatus.TESTING, MonitorStatus.TESTING: MonitorStatus.ACTIVE}


@app.command("list")
def list_all(
    config: ConfigOption,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document")] = False,
) -> None:
    """Print every monitor that has not ended."""
    found = in_transaction(read_settings(config), monitors.living)
    if as_json:
        typer.echo(json.dumps([_document(monitor) for monitor in found], indent=2))
        return
    for monitor in found:
        typer.echo(_line(monitor))


@app.command()
def add(
    config: ConfigOption,
    name: NameArgument,
    member: Annotated[
        int | None, typer.Option(metavar="ID", help="whose it is; the pool's own without it")
    ] = None,
) -> None:
    """Register a monitor and print its token once. It works as soon as you approve it."""
    settings = read_settings(config)
    _, token = in_transaction(
        settings,
        lambda session: monitors.register(session, settings, name, member, datetime.now(UTC)),
    )
    typer.echo(token)


@app.command()
def approve(config: ConfigOption, name: NameArgument, reason: ReasonOption = "approved") -> None:
    """Let a pending monitor work on trial, and one on trial have a say."""

    async def one_up(session: AsyncSession, monitor: Monitor) -> None:
        wanted = _APPROVED.get(monitor.status, MonitorStatus.ACTIVE)
        await monitors.set_status(session, monitor, wanted, reason, datetime.now(UTC))

    typer.echo(_line(_with_monitor(read_settings(config), name, one_up)))


@app.command()
def pause(config: ConfigOption, name: NameArgument, reason: ReasonOption) -> None:
    """Let a monitor rest."""
    _become(config, name, MonitorStatus.PAUSED, reason)


@app.command()
def resume(
    config: ConfigOption,
    name: NameArgument,
    *,
    on_trial: Annotated[bool, typer.Option("--on-trial", help="without a say at first")] = False,
    reason: ReasonOption = "resumed",
) -> None:
    """Let a monitor work again."""
    _become(config, name, MonitorStatus.TESTING if on_trial else MonitorStatus.ACTIVE, reason)


@app.command()
def end(config: ConfigOption, name: NameArgument, reason: ReasonOption) -> None:
    """End a monitor for good; its token is worth nothing from now on."""
    _become(config, name, MonitorStatus.ENDED, reason)


@app.command()
def token(config: ConfigOption, name: NameArgument) -> None:
    """Print a new token for a monitor once; the one before is worth nothing from now on."""
    made: list[str] = []

    async def renew(session: AsyncSession, monitor: Monitor) -> None:
        made.append(await monitors.renew_token(session, monitor, datetime.now(UTC)))

    _with_monitor(read_settings(config), name, renew)
    typer.echo(made[0])


@app.command()
def quorum(
    config: ConfigOption,
    number: Annotated[
        int | None,
        typer.Argument(metavar="N", help="how many have to agree; without it the present one is shown"),
    ] = None,
    reason: Annotated[str, typer.Option(help="kept in the log; needed with N")] = "",
) -> None:
    """Show how many monitors have to agree, or let it be fewer. It rises again by itself."""
    settings, now = read_settings(config), datetime.now(UTC)
    if number is not None and not reason:
        fail(ExitStatus.USAGE, "a change needs --reason", "say why: it is kept in the log")

    async def look(session: AsyncSession) -> monitors.Council:
        if number is not None:
            await monitors.set_quorum(session, settings, number, reason, actor="console", now=now)
        return await monitors.council(session, settings, now)

    standing = in_transaction(settings, look)
    kind = " (bootstrap)" if standing.quorum.is_bootstrap else ""
    typer.echo(f"{standing.quorum.number}{kind} have to agree; {standing.heard} with a say are heard")


@app.command()
def explain(
    config: ConfigOption, server: Annotated[str, typer.Argument(metavar="SERVER", help="its name")]
) -> None:
    """Print which monitors a review would give a server now, and why. Changes nothing."""
    settings = read_settings(config)
    lot = reviews.lot_of(read_registry_key(settings))

    async def look(session: AsyncSession) -> list[Explained]:
        found = await servers.find(session, server)
        return list(await reviews.explain(session, found, lot, datetime.now(UTC)))

    for each in in_transaction(settings, look):
        mark = "*" if each.is_change else " "
        typer.echo(f"{mark} {each.address:<39} {each.monitor:<20} {each.role:<10} {each.reason}")


@app.command()
def shadow(
    config: ConfigOption,
    *,
    names: Annotated[bool, typer.Option("--names", help="also the servers' names")] = False,
) -> None:
    """Print what the scorer on trial, `policy.shadow_scorer`, would change."""
    settings = read_settings(config)
    if settings.policy.shadow_scorer is None:
        fail(ExitStatus.USAGE, "no scorer is on trial", "set policy.shadow_scorer")
    found = in_transaction(settings, monitors.compare)
    typer.echo(f"{settings.policy.shadow_scorer} beside {settings.policy.scorer}: {found}")
    for sign, some in (("-", found.dropped), ("+", found.added)):
        for name in some if names else ():
            typer.echo(f"{sign} {name}")


@app.command("disagreements")
def list_disagreements(config: ConfigOption) -> None:
    """Print servers of which most monitors without a say see the contrary of those with one."""
    settings = read_settings(config)
    found = in_transaction(settings, lambda session: disagreements.look(session, settings, datetime.now(UTC)))
    for each in found:
        verdict, contrary = ("good", "bad") if each.is_good else ("bad", "good")
        typer.echo(
            f"{each.server} {each.address}: {verdict} to those with a say (score {each.score:.1f}), {contrary} to"
            f" {each.against} of {each.asked} others"
        )
        for witness in each.witnesses:
            typer.echo(
                f"    {witness.monitor:<20} {witness.at:%Y-%m-%d %H:%M} UTC  {witness.reason or 'good'}"
            )


def _become(config: Path, name: str, status: MonitorStatus, reason: str) -> None:
    async def change(session: AsyncSession, monitor: Monitor) -> None:
        await monitors.set_status(session, monitor, status, reason, datetime.now(UTC))

    typer.echo(_line(_with_monitor(read_settings(config), name, change)))


def _with_monitor(
    settings: Settings, name: str, work: Callable[[AsyncSession, Monitor], Awaitable[None]]
) -> Monitor:
    async def run(session: AsyncSession) -> Monitor:
        monitor = await monitors.find(session, name, lock=True)
        await work(session, monitor)
        return monitor

    return in_transaction(settings, run)


def _document(monitor: Monitor) -> dict[str, object]:
    moments = {"seen_at": monitor.seen_at, "status_since": monitor.status_since}
    return {
        "name": monitor.name,
        "member": monitor.member_id,
        "status": monitor.status,
        "status_reason": monitor.status_reason,
        "sound": monitor.sound,
        "sound_detail": monitor.sound_detail,
        "ipv4": monitor.ipv4,
        "ipv6": monitor.ipv6,
        "ipv4_address": monitor.ipv4_address,
        "ipv6_address": monitor.ipv6_address,
        "network": monitor.network,
        "country": monitor.country,
        "samples": monitor.samples,
        **{key: None if moment is None else moment.isoformat() for key, moment in moments.items()},
    }


def _line(monitor: Monitor) -> str:
    whose = "own" if monitor.member_id is None else f"member {monitor.member_id}"
    check = {True: "sound", False: f"not sound: {monitor.sound_detail}", None: "unchecked"}[monitor.sound]
    check += "".join(f", no IPv{version}" for version in (4, 6) if not monitors.has_family(monitor, version))
    seen = "never seen" if monitor.seen_at is None else f"seen {monitor.seen_at:%Y-%m-%d %H:%M:%S} UTC"
    return f"{monitor.name:<20} {monitor.status:<8} {whose:<12} {seen}; {check}; {monitor.status_reason}"
