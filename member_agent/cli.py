"""`pool-agent`: serve authenticated time, alone or as a member of a pool."""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from member_agent import commands, cookie_keys, daemon, engine_commands, joining, running, systemd
from member_agent.commands import DEFAULT_STATE, StateOption, failing, say
from member_agent.config import AgentSettings, load_settings
from member_agent.engines.choice import AUTO, BUILTIN, ENGINES, choose, explain
from member_agent.errors import AgentError, ExitStatus
from member_agent.privileges import become_owner
from member_agent.sockets import Endpoint, parse_endpoint
from member_agent.state import StateDirectory
from member_agent.tracking import OPTION
from nts_core.cookies import Keyring
from nts_core.ke import KE_PORT
from nts_core.shell import configure_logging, raise_descriptor_limit

app = typer.Typer(
    name="pool-agent",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    help=__doc__,
    pretty_exceptions_enable=False,
)
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
    with failing():
        asyncio.run(work)


@app.callback()
def main_options(
    *,
    show_version: Annotated[bool, typer.Option("--version", help="print the version and end")] = False,
) -> None:
    if show_version:
        typer.echo(f"pool-agent {version('truechimer')}")
        raise typer.Exit


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
    *,
    token: Annotated[
        str | None, typer.Option(help="the join token of the registration", envvar="POOL_JOIN_TOKEN")
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            metavar="ENGINE",
            help=f"what serves: auto (a time daemon that runs here, else builtin), {', '.join(ENGINES)}",
        ),
    ] = AUTO,
    yes: Annotated[
        bool, typer.Option("--yes", help="do not ask before a time daemon is made to serve")
    ] = False,
    state: StateOption = DEFAULT_STATE,
    ca: Annotated[
        Path | None, typer.Option(help="roots (PEM) for the registry instead of the system's")
    ] = None,
    wait: Annotated[
        float, typer.Option(min=0, max=600, help="seconds to prove the addresses in; 0: leave that to `run`")
    ] = 30,
) -> None:
    """Make this host the server that the token was made for, and prove its addresses."""

    async def work() -> None:
        settings = load_settings(state, {})
        told = token or systemd.credential("join-token")
        if told is None:
            raise AgentError(
                "there is no join token",
                "give --token, or POOL_JOIN_TOKEN in the environment",
                ExitStatus.USAGE,
            )
        directory = StateDirectory(state)
        kind = _agree_to_engine(engine, settings, directory, yes=yes)
        agent = f"pool-agent/{version('truechimer')}"
        membership = await joining.join(registry_url, told, directory, ca, agent)
        directory.save_engine(kind)
        say(f"joined the pool {membership.pool} as {membership.domain}")
        looking = joining.prove(membership, directory, settings, wait) if wait else joining.look(membership)
        seen = await looking
        for line in [] if seen is None else commands.lines_of(seen, datetime.now(UTC)):
            say(line)
        typer.echo(f"next: systemctl enable --now pool-agent, or pool-agent run --state {state}")
        typer.echo("then: the name enters DNS, a certificate is ordered in its turn, and probes look")
        typer.echo(f"      {commands.expectation(seen, datetime.now(UTC))}")
        typer.echo("      pool-agent status says how far it is, pool-agent check what is wrong")

    with failing():
        become_owner(state)
    _run(work())


def _agree_to_engine(wanted: str, settings: AgentSettings, directory: StateDirectory, *, yes: bool) -> str:
    """Show what the engine changes on this host, and ask; its kind. Settings that name one, and an earlier choice, are not asked."""
    if wanted not in {AUTO, *ENGINES}:
        raise AgentError(
            f"--engine {wanted}: there is no such engine", f"one of {', '.join(ENGINES)}", ExitStatus.USAGE
        )
    if settings.engine.kind != AUTO:
        if wanted not in {AUTO, settings.engine.kind}:
            raise AgentError(
                f"--engine {wanted}: the settings name {settings.engine.kind}",
                "change engine.kind",
                ExitStatus.USAGE,
            )
        wanted = settings.engine.kind
    elif wanted == AUTO and (agreed := directory.engine()) is not None:
        wanted = agreed
    kind = choose(wanted, settings)
    typer.echo("\n".join(explain(kind, settings, directory)))
    is_new = kind != BUILTIN and directory.engine() != kind
    if is_new and not yes:
        if not sys.stdin.isatty():
            raise AgentError(
                f"nobody is there to agree to {kind} as the engine",
                "say --yes, or choose --engine builtin",
                ExitStatus.USAGE,
            )
        if not typer.confirm("Agreed?"):
            raise AgentError("nothing was changed", "choose another --engine", ExitStatus.USAGE)
    return kind


@app.command()
def run(
    state: StateOption = DEFAULT_STATE,
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
    running.become(state, flags)


app.add_typer(commands.app)
app.add_typer(engine_commands.app, name="engine")

keys_app = typer.Typer(no_args_is_help=True, help="The keys that cookies are sealed with.")
app.add_typer(keys_app, name="cookie-keys")
ShareArgument = Annotated[Path, typer.Argument(metavar="FILE", help="the shared keys; secret")]


def _with_keys(
    work: Callable[[StateDirectory], Keyring | None], state: Path, *notes: str, create: bool = False
) -> None:
    with failing():
        keyring = work(StateDirectory(state, create=create))
    typer.echo("\n".join((cookie_keys.describe(keyring), *notes)))


@keys_app.command("show")
def show_keys(state: StateOption = DEFAULT_STATE) -> None:
    """How the keys follow each other; no secrets."""
    _with_keys(cookie_keys.look, state)


@keys_app.command("renew")
def renew_keys(state: StateOption = DEFAULT_STATE) -> None:
    """Replace all keys, as after they may have been read. Clients come for new cookies by themselves."""
    _with_keys(
        cookie_keys.renew, state, "start pool-agent again; hosts that shared the old keys need a new share"
    )


@keys_app.command("share")
def share_keys(file: ShareArgument, state: StateOption = DEFAULT_STATE) -> None:
    """Write what other hosts behind the same name adopt, so that all open each other's cookies for good."""
    note = f"carry {file} to each other host by a safe way, adopt it there, and delete every copy"
    _with_keys(lambda directory: cookie_keys.share(directory, file), state, note, create=True)


@keys_app.command("adopt")
def adopt_keys(file: ShareArgument, state: StateOption = DEFAULT_STATE) -> None:
    """Follow the keys of another host from now on."""
    note = f"delete {file} now"
    _with_keys(lambda directory: cookie_keys.adopt(directory, file), state, note, create=True)


def main() -> None:
    app()
