"""`poolsvc operator`: who runs the pool, and their way in without a mail. Rendering only."""

from datetime import UTC, datetime
from typing import Annotated

import typer

from poolsvc import people, sign_in
from poolsvc.cli.common import ConfigOption, in_transaction, read_registry_key, read_settings

app = typer.Typer(no_args_is_help=True, help="operators of the pool")


@app.command("create")
def create(
    config: ConfigOption,
    email: Annotated[str | None, typer.Option(help="to sign in with")] = None,
    name: Annotated[str, typer.Option(help="a display name")] = "",
) -> None:
    """Make an operator, also of who has an account, and print an API token of theirs once."""
    _, token = in_transaction(
        read_settings(config),
        lambda session: people.make_operator(session, datetime.now(UTC), email=email, name=name),
    )
    typer.echo(token)


@app.command("sign-in")
def sign_in_once(
    config: ConfigOption, email: Annotated[str, typer.Option(help="of the operator's account")]
) -> None:
    """Print a token that signs an operator in once, within 15 minutes: for one whose mail does not come."""
    settings = read_settings(config)
    key = read_registry_key(settings)
    token = in_transaction(
        settings, lambda session: sign_in.console_link(session, key, email, datetime.now(UTC))
    )
    typer.echo(token)
