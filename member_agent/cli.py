"""`pool-agent`: serve authenticated time, alone or as a member of a pool."""

import asyncio
from collections.abc import Callable, Coroutine
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from member_agent import cookie_keys, daemon
from member_agent.config import load_settings
from member_agent.errors import AgentError
from member_agent.sockets import Endpoint, parse_endpoint
from member_agent.state import StateDirectory
from member_agent.tracking import OPTION
from nts_core.client import KE_PORT
from nts_core.cookies import Keyring
from nts_core.shell import configure_logging, raise_descriptor_limit

app = typer.Typer(
    name="pool-agent",
    no_args_is_help=True,
    add_completion=False,
    help=__doc__,
    pretty_exceptions_enable=False,
)
_DEFAULT_STATE = Path("/var/lib/pool-agent")

StateOption = Annotated[Path, typer.Option("--state", metavar="DIR", help="where the agent keeps its keys")]
StratumOption = Annotated[
    int | None,
    typer.Option(
        "--local-stratum", min=1, max=15, help="vouch for this host's clock where no time daemon does"
    ),
]
SourceOption = Annotated[
    str | None,
    typer.Option(
        OPTION,
        metavar="SOURCE",
        help="whom to ask of the clock: auto (default), chronyd[:SOCKET or ADDR:PORT], ntpd[:ADDR:PORT], kernel",
    ),
]
OffsetOption = Annotated[
    float | None, typer.Option("--clock-offset", metavar="SECONDS", help="test option: serve a wrong time")
]
MetricsOption = Annotated[
    str | None, typer.Option("--metrics", metavar="ADDR:PORT", help="serve /metrics there")
]
AeadOption = Annotated[
    str | None,
    typer.Option("--aead", metavar="LIST", help="AEAD algorithms, the preferred first, such as 30,15"),
]
NtpServerOption = Annotated[
    str | None,
    typer.Option(
        "--ntp-server", metavar="HOST[:PORT]", help="send clients there for NTP; it has our cookie keys"
    ),
]
RotationOption = Annotated[
    int | None,
    typer.Option("--cookie-rotation", metavar="SECONDS", help="until the next cookie key seals (a day)"),
]
HistoryOption = Annotated[
    int | None,
    typer.Option("--cookie-history", metavar="SECONDS", help="for which old keys open cookies (ten days)"),
]
IntervalOption = Annotated[
    float | None,
    typer.Option(
        "--ntp-interval",
        metavar="SECONDS",
        help="rate limit: answer an address once in so many seconds on average, after a burst",
    ),
]
AllowOption = Annotated[
    list[str] | None, typer.Option("--allow", metavar="PREFIX", help="serve only these prefixes")
]
DenyOption = Annotated[
    list[str] | None, typer.Option("--deny", metavar="PREFIX", help="do not serve these prefixes")
]


def _limits(interval: float | None, allow: list[str] | None, deny: list[str] | None) -> dict[str, Any] | None:
    """None without any, as an empty table would hide what is wrong with another one."""
    flags = {"ntp_interval": interval, "allow": allow, "deny": deny}
    return {name: value for name, value in flags.items() if value not in (None, [])} or None


def _run(work: Coroutine[Any, Any, None]) -> None:
    configure_logging()
    raise_descriptor_limit()
    try:
        asyncio.run(work)
    except AgentError as error:
        _fail(error)


def _fail(error: AgentError) -> NoReturn:
    typer.echo(f"error: {error.message}\n  {error.remedy}", err=True)
    raise typer.Exit(error.status)


@app.command()
def serve(
    cert: Annotated[Path, typer.Option(metavar="FULLCHAIN.pem", help="certificate chain, leaf first")],
    key: Annotated[Path, typer.Option(metavar="KEY.pem", help="its private key")],
    ke: Annotated[list[str] | None, typer.Option(metavar="ADDR:PORT", help="NTS-KE listeners")] = None,
    ntp: Annotated[list[str] | None, typer.Option(metavar="ADDR:PORT", help="NTP listeners")] = None,
    state: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="keep cookie keys there; without it they die with the process"),
    ] = None,
    clock_source: SourceOption = None,
    local_stratum: StratumOption = None,
    clock_offset: OffsetOption = None,
    metrics: MetricsOption = None,
    aead: AeadOption = None,
    ntp_server: NtpServerOption = None,
    cookie_rotation: RotationOption = None,
    cookie_history: HistoryOption = None,
    ntp_interval: IntervalOption = None,
    allow: AllowOption = None,
    deny: DenyOption = None,
) -> None:
    """A stand-alone NTS server. SIGHUP loads the certificate anew, SIGTERM ends."""

    async def work() -> None:
        flags = {
            "clock_source": clock_source,
            "local_stratum": local_stratum,
            "clock_offset": clock_offset,
            "metrics": metrics,
            "aead": aead,
            "ntp_server": ntp_server,
            "cookie_rotation": cookie_rotation,
            "cookie_history": cookie_history,
            "limits": _limits(ntp_interval, allow, deny),
        }
        settings = load_settings(state, flags)
        hosts = [str(address) for address in settings.listen] or ["0.0.0.0", "::"]
        await daemon.serve(
            settings,
            cert=cert,
            key=key,
            ke=[parse_endpoint(text, "--ke") for text in ke or ()]
            or [Endpoint(host, KE_PORT) for host in hosts],
            ntp=[parse_endpoint(text, "--ntp") for text in ntp or ()]
            or [Endpoint(host, settings.ntp_port) for host in hosts],
            state=StateDirectory(state) if state else None,
            ready=lambda line: print(line, flush=True),  # noqa: T201 - the line that callers wait for
        )

    _run(work())


@app.command()
def join(
    registry_url: Annotated[str, typer.Argument(help="the registry's address")],
    token: Annotated[str, typer.Option(help="the join token of the registration", envvar="POOL_JOIN_TOKEN")],
    state: StateOption = _DEFAULT_STATE,
    ca: Annotated[
        Path | None, typer.Option(help="roots (PEM) for the registry instead of the system's")
    ] = None,
) -> None:
    """Make this host the server that the token was made for."""

    async def work() -> None:
        agent = f"pool-agent/{version('truechimer')}"
        membership = await daemon.join(registry_url, token, StateDirectory(state), ca, agent)
        typer.echo(f"joined the pool {membership.pool} as {membership.domain}")
        typer.echo(f"next: pool-agent run --state {state}")

    _run(work())


@app.command()
def run(
    state: StateOption = _DEFAULT_STATE,
    ntp_port: Annotated[int | None, typer.Option(min=1, max=65535, help="UDP port of NTP (123)")] = None,
    clock_source: SourceOption = None,
    local_stratum: StratumOption = None,
    clock_offset: OffsetOption = None,
    metrics: MetricsOption = None,
    aead: AeadOption = None,
    cookie_rotation: RotationOption = None,
    cookie_history: HistoryOption = None,
    ntp_interval: IntervalOption = None,
    allow: AllowOption = None,
    deny: DenyOption = None,
) -> None:
    """Serve as a member of the pool, and keep the certificate and the registry up to date."""

    async def work() -> None:
        flags = {
            "ntp_port": ntp_port,
            "clock_source": clock_source,
            "local_stratum": local_stratum,
            "clock_offset": clock_offset,
            "metrics": metrics,
            "aead": aead,
            "cookie_rotation": cookie_rotation,
            "cookie_history": cookie_history,
            "limits": _limits(ntp_interval, allow, deny),
        }
        settings = load_settings(state, flags)
        await daemon.Member(StateDirectory(state, create=False), settings).run()

    _run(work())


@app.command()
def status(state: StateOption = _DEFAULT_STATE) -> None:
    """Who this host is in the pool, and what its clock looks like."""

    async def work() -> None:
        membership = StateDirectory(state, create=False).require_membership()
        settings = load_settings(state, {})
        clock = daemon.clock_of(settings)
        await clock.refresh()
        typer.echo(f"server    {membership.domain}")
        typer.echo(f"registry  {membership.registry}")
        typer.echo("engine    builtin (Python)")
        typer.echo(f"clock     {clock.describe()}")

    _run(work())


keys_app = typer.Typer(no_args_is_help=True, help="The keys that cookies are sealed with.")
app.add_typer(keys_app, name="cookie-keys")
ShareArgument = Annotated[Path, typer.Argument(metavar="FILE", help="the shared keys; secret")]


def _with_keys(
    work: Callable[[StateDirectory], Keyring | None], state: Path, *notes: str, create: bool = False
) -> None:
    try:
        keyring = work(StateDirectory(state, create=create))
    except AgentError as error:
        _fail(error)
    typer.echo("\n".join((cookie_keys.describe(keyring), *notes)))


@keys_app.command("show")
def show_keys(state: StateOption = _DEFAULT_STATE) -> None:
    """How the keys follow each other; no secrets."""
    _with_keys(cookie_keys.look, state)


@keys_app.command("renew")
def renew_keys(state: StateOption = _DEFAULT_STATE) -> None:
    """Replace all keys, as after they may have been read. Clients come for new cookies by themselves."""
    _with_keys(
        cookie_keys.renew, state, "start pool-agent again; hosts that shared the old keys need a new share"
    )


@keys_app.command("share")
def share_keys(file: ShareArgument, state: StateOption = _DEFAULT_STATE) -> None:
    """Write what other hosts behind the same name adopt, so that all open each other's cookies for good."""
    note = f"carry {file} to each other host by a safe way, adopt it there, and delete every copy"
    _with_keys(lambda directory: cookie_keys.share(directory, file), state, note, create=True)


@keys_app.command("adopt")
def adopt_keys(file: ShareArgument, state: StateOption = _DEFAULT_STATE) -> None:
    """Follow the keys of another host from now on."""
    note = f"delete {file} now"
    _with_keys(lambda directory: cookie_keys.adopt(directory, file), state, note, create=True)


def main() -> None:
    app()
