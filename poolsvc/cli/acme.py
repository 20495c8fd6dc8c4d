"""`poolsvc acme`: the account at the CA in a process of its own. Rendering only."""

import typer

from nts_core.shell import configure_logging
from poolsvc import acme_process
from poolsvc.cli.common import ConfigOption, ExitStatus, fail, read_settings, refuse
from poolsvc.files import UnusableFile, check_account_files

app = typer.Typer(no_args_is_help=True, help="the account at the CA")


@app.callback()
def commands() -> None:
    """Without this, one command alone would need no name."""


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
