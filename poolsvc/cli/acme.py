"""`poolsvc acme`: the accounts at the CAs, the processes that hold their keys, and the CA's limits. Rendering only."""

import asyncio
from collections.abc import Awaitable
from datetime import UTC, datetime
from typing import Annotated

import typer
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.acme import AccountFacts, AcmeError, change_contact, read_account
from nts_core.shell import check_contact, configure_logging
from poolsvc import acme_process, onboarding
from poolsvc.budget import MOST, Bucket
from poolsvc.cli.common import (
    CaOption,
    ConfigOption,
    ExitStatus,
    authority,
    fail,
    in_transaction,
    read_settings,
    refuse,
)
from poolsvc.config import AuthoritySettings
from poolsvc.files import UnusableFile, check_account_files

app = typer.Typer(no_args_is_help=True, help="the accounts at the CAs, and the CA's limits")


@app.command("serve")
def serve(config: ConfigOption, name: CaOption = None) -> None:
    """Hold the key of the account at a CA, and order for those who call on its `socket`, until SIGTERM."""
    settings = read_settings(config)
    ca = authority(settings, name)
    if ca.socket is None:
        fail(
            ExitStatus.CONFIGURATION,
            f"ca.socket: {ca.name} has none",
            "name one; without it `poolsvc serve` starts this process itself",
        )
    configure_logging()
    try:
        check_account_files(ca)
        acme_process.serve(settings, ca)
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


@app.command("account")
def account(config: ConfigOption, name: CaOption = None) -> None:
    """Show the account at a CA, and what that CA says of itself."""
    ca = authority(read_settings(config), name)
    _show(ca, _asked(ca, read_account(acme_process.account_of(ca))))


@app.command("contact")
def contact(
    config: ConfigOption,
    urls: Annotated[
        list[str], typer.Argument(metavar="URL...", help="all there are to be, as mailto:NAME@DOMAIN")
    ],
    name: CaOption = None,
) -> None:
    """Give the account at a CA other contacts, in place of all that it has."""
    ca = authority(read_settings(config), name)
    for url in urls:
        try:
            check_contact(url)
        except ValueError as error:
            fail(ExitStatus.USAGE, f"{url}: {error}", "give URLs, such as mailto:operator@example.net")
    _show(ca, _asked(ca, change_contact(acme_process.account_of(ca), tuple(urls))))
    if tuple(urls) != ca.contact:
        typer.echo("set `contact` of this CA in the settings likewise: a new account would get that")


def _asked(ca: AuthoritySettings, asking: Awaitable[AccountFacts]) -> AccountFacts:
    async def ask() -> AccountFacts:
        return await asking

    try:
        return asyncio.run(ask())
    except AcmeError as error:
        remedies = {
            "account-key": "give the account's key; `poolsvc serve` makes key and account at its start",
            "accountDoesNotExist": "start `poolsvc serve`, which makes the account",
            "invalidContact": "give an address that the CA takes",
            "unsupportedContact": "give an address of the form mailto:NAME@DOMAIN",
        }
        is_ours = error.code == "account-key"
        fail(
            ExitStatus.CONFIGURATION if is_ours else ExitStatus.PEER,
            f"{ca.name}: {error.detail}",
            remedies.get(error.code, "repeat the command when the CA answers; `poolsvc doctor` tells more"),
        )


def _show(ca: AuthoritySettings, facts: AccountFacts) -> None:
    terms = facts.terms
    for label, text in (
        ("CA", f"{ca.name}, in CAA {ca.caa_identity}"),
        ("account", facts.uri),
        ("contact", ", ".join(facts.contact) or "none that the CA shows"),
        ("terms", terms.terms_of_service or "none"),
        ("profiles", ", ".join(terms.profiles) or "none"),
        ("profile asked for", ca.profile),
    ):
        typer.echo(f"{label + ':':<19}{text}")
