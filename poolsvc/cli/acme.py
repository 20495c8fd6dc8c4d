"""`poolsvc acme`: the account at the CA in a process of its own, and the CA's limits. Rendering only."""

from datetime import UTC, datetime
from typing import Annotated

import typer
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.shell import configure_logging
from poolsvc import acme_process, onboarding
from poolsvc.budget import MOST, Bucket
from poolsvc.cli.common import ConfigOption, ExitStatus, fail, in_transaction, read_settings, refuse
from poolsvc.files import UnusableFile, check_account_files

app = typer.Typer(no_args_is_help=True, help="the account at the CA, and the CA's limits")


@app.command("serve")
def serve(config: ConfigOption) -> None:
    """Hold the account's key, and order for those who call on `ca.socket`, until SIGTERM."""
    settings = read_settings(config)
    if settings.ca.socket is None:
        fail(
            ExitStatus.CONFIGURATION,
            "ca.socket: there is none",
            "name one; without it `poolsvc serve` starts this process itself",
        )
    configure_logging()
    try:
        check_account_files(settings)
        acme_process.serve(settings)
    except (UnusableFile, acme_process.SocketUnusable) as error:
        refuse(ExitStatus.CONFIGURATION, error)


@app.command("budget")
def budget(config: ConfigOption) -> None:
    """Print what is left of the CA's limits, and how many servers wait for them."""
    settings, now = read_settings(config), datetime.now(UTC)

    async def read(session: AsyncSession) -> onboarding.State:
        return await onboarding.state(session, settings, now)

    state = in_transaction(settings, read)
    typer.echo(_line("certificates", state.budget.certificates, now))
    typer.echo(_line("orders", state.budget.orders, now))
    typer.echo(f"under way     {state.budget.reserved}")
    last = "" if state.last_turn_at is None else f", the last until about {_moment(state.last_turn_at)}"
    typer.echo(f"waiting       {state.waiting}{last}")
    if (refusal := state.refusal) is not None:
        typer.echo(f"last refusal  {_moment(refusal.at)}, until {_moment(refusal.until)}: {refusal.detail}")


def _line(name: str, bucket: Bucket, now: datetime) -> str:
    hours = bucket.limit.period.total_seconds() / 3600
    next_at = bucket.next_at(now)
    more = "" if next_at is None else f", one more at {_moment(next_at)}"
    return f"{name:12}  {bucket.left(now)} of {bucket.limit.count} left, {bucket.spent} spent in {hours:g} h{more}"


def _moment(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M} UTC"


@app.command("limits")
def limits(
    config: ConfigOption,
    certificates: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="in the period of ca.limits.certificates; as in the settings"),
    ] = None,
    orders: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="in the period of ca.limits.orders; as in the settings"),
    ] = None,
    until: Annotated[
        datetime | None,
        typer.Option(formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M"], help="UTC, when they end; never"),
    ] = None,
    note: Annotated[str, typer.Option(help="where the CA says so")] = "",
) -> None:
    """Say what the CA has granted, as a whole: without options, nothing."""
    now, end = datetime.now(UTC), None if until is None else until.replace(tzinfo=UTC)

    async def write(session: AsyncSession) -> None:
        await onboarding.grant(
            session, certificates=certificates, orders=orders, until=end, note=note, now=now
        )

    in_transaction(read_settings(config), write)
    typer.echo("the queue follows within a minute; `poolsvc acme budget` shows what is left")
