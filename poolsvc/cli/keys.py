"""`poolsvc key`: a new key in place of one that was lost or seen. Rendering only."""

import asyncio
from datetime import UTC, datetime
from typing import Annotated

import typer
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.acme import AcmeError, roll_account_key
from poolsvc import issuance, keys, servers, sign_in, webhooks
from poolsvc.acme_process import account_of
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

app = typer.Typer(no_args_is_help=True, help="new keys; docs/runbook.md has the rest")


@app.command("tsig")
def tsig(config: ConfigOption) -> None:
    """Make a new TSIG secret, and say how the primary gets it."""
    settings = read_settings(config)
    try:
        if settings.dns.embedded is not None:
            keys.renew_embedded_tsig(settings)
            first = (
                "`poolsvc dns serve`, then `serve`"
                if settings.dns.embedded.own_process
                else "`poolsvc serve`"
            )
            typer.echo(
                f"{settings.dns.tsig_secret_file} has a new secret. Restart {first}; until then nothing is published."
            )
            return
        made = keys.renew_tsig(settings)
    except keys.KeyNotRenewed as error:
        refuse(ExitStatus.CONFIGURATION, error)
    typer.echo(
        f"""\
{made.secret} has a new secret; the one before is in {made.old}.
Until the primary and the registry both have the new one, nothing is published; what is published stays.
1. Give it to the primary. With Knot:
     install -o knot -m 0600 -t /etc/knot {made.knot}
     knotc reload
   With BIND:
     install -o bind -m 0600 -t /etc/bind {made.bind}
     rndc reconfig
   With PowerDNS:
     sh {made.powerdns}
2. Restart `poolsvc serve`.
3. poolsvc doctor --config {config}
   transfer and update are ok.
4. rm {made.old}"""
    )


@app.command("acme-account")
def acme_account(config: ConfigOption, name: CaOption = None) -> None:
    """Give the account at a CA a new key; the account and all CAA records stay. Stop `serve` first."""
    ca = authority(read_settings(config), name)
    try:
        uri = asyncio.run(roll_account_key(account_of(ca)))
    except AcmeError as error:
        fail(
            ExitStatus.CONFIGURATION if error.code == "account-key" else ExitStatus.PEER,
            f"the account's key is the one before: {error.detail}",
            "docs/runbook.md says what to do without the key"
            if error.code in {"account-key", "accountDoesNotExist"}
            else "repeat the command when the CA answers; it goes on where it ended",
        )
    typer.echo(f"{uri} has a new key, in {ca.account_key_file}; keep a copy of it, and start `serve`")


@app.command("certificate")
def certificate(
    name: Annotated[str, typer.Argument(metavar="NAME", help="the server's name, such as alice")],
    config: ConfigOption,
) -> None:
    """The key of a server's certificate is lost or known to others: revoke it, and order one with another key."""
    now = datetime.now(UTC)

    async def revoke(session: AsyncSession) -> None:
        found = await servers.find(session, name)
        issuance.revoke_compromised(await servers.get(session, found.id), now)

    in_transaction(read_settings(config), revoke)
    typer.echo(
        f"""`poolsvc serve` revokes the certificates of {name} as compromised, and orders another one.
The agent makes a new key for it, and serves what it has until then."""
    )


@app.command("sessions")
def sessions(config: ConfigOption) -> None:
    """Sign everybody out, and make a new registry key: links in mails are void, webhooks are disabled."""
    settings, now = read_settings(config), datetime.now(UTC)

    async def end(session: AsyncSession) -> tuple[int, int]:
        return await sign_in.end_all_sessions(session, now), await webhooks.disable_all(session, now)

    ended, disabled = in_transaction(settings, end)
    try:
        keys.renew_registry_key(settings)
    except keys.KeyNotRenewed as error:
        refuse(ExitStatus.CONFIGURATION, error)
    typer.echo(
        f"""\
{ended} sessions are ended, and {settings.key_file} has a new key.
1. Restart `poolsvc serve`: until then it makes and takes links of the key before.
2. {disabled} webhooks are disabled, and their members are told: each rotates the secret of its own, then enables it.
Programs' tokens are as they were."""
    )
