"""`poolsvc key`: a new key in place of one that was lost or seen. Rendering only."""

import asyncio
from datetime import UTC, datetime

import typer

from poolsvc import keys, sign_in
from poolsvc.acme import AcmeConfig, AcmeError, roll_account_key
from poolsvc.cli.common import ConfigOption, ExitStatus, fail, in_transaction, read_settings, refuse

app = typer.Typer(no_args_is_help=True, help="new keys; docs/runbook.md has the rest")


@app.command("tsig")
def tsig(config: ConfigOption) -> None:
    """Make a new TSIG secret, and say how the primary gets it."""
    try:
        made = keys.renew_tsig(read_settings(config))
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
2. Restart `poolsvc serve`.
3. poolsvc doctor --config {config}
   transfer and update are ok.
4. rm {made.old}"""
    )


@app.command("acme-account")
def acme_account(config: ConfigOption) -> None:
    """Give the account at the CA a new key; the account and all CAA records stay. Stop `serve` first."""
    ca = read_settings(config).ca
    try:
        uri = asyncio.run(roll_account_key(AcmeConfig.of(ca)))
    except AcmeError as error:
        fail(
            ExitStatus.CONFIGURATION if error.code == "account-key" else ExitStatus.PEER,
            f"the account's key is the one before: {error.detail}",
            "docs/runbook.md says what to do without the key"
            if error.code in {"account-key", "accountDoesNotExist"}
            else "repeat the command when the CA answers; it goes on where it ended",
        )
    typer.echo(f"{uri} has a new key, in {ca.account_key_file}; keep a copy of it, and start `serve`")


@app.command("sessions")
def sessions(config: ConfigOption) -> None:
    """Sign everybody out, and make a new registry key: links in mails are void, webhooks get another secret."""
    settings = read_settings(config)

    ended = in_transaction(settings, lambda session: sign_in.end_all_sessions(session, datetime.now(UTC)))
    try:
        keys.renew_registry_key(settings)
    except keys.KeyNotRenewed as error:
        refuse(ExitStatus.CONFIGURATION, error)
    typer.echo(
        f"""\
{ended} sessions are ended, and {settings.key_file} has a new key.
1. Restart `poolsvc serve`: until then it makes and takes links of the key before.
2. Tell those who have webhooks to fetch their new secrets.
Programs' tokens are as they were."""
    )
