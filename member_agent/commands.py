"""What a volunteer asks of an agent that has joined: how it stands, what is wrong, and to do something now."""

import asyncio
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from pydantic import TypeAdapter

from member_agent import checks, leaving, local, web_servers
from member_agent.config import AcmeMode, load_settings
from member_agent.errors import AgentError, ExitStatus
from member_agent.privileges import become_owner
from member_agent.registry import Registry
from member_agent.state import MemberDirectory, Membership, StateDirectory
from member_agent.web_servers import WebServer
from nts_core.control import AddressStatus, CheckStatus, Finding, ServerStatus, SightStatus, WeightStatus
from nts_core.errors import printable
from nts_core.shell import configure_logging

DEFAULT_STATE = Path("/var/lib/pool-agent")
StateOption = Annotated[Path, typer.Option("--state", metavar="DIR", help="where the agent keeps its keys")]
ServerOption = Annotated[
    str | None,
    typer.Option("--server", metavar="DOMAIN", help="which server, where this host is several"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="as one JSON object")]
_UNIT = "pool-agent"
_DURATION = re.compile(r"([1-9][0-9]{0,5})([mhd])")
_UNITS = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}
# The registry wants three hours: until then people can take back what somebody did with a stolen token.
_SOONEST = timedelta(hours=3, minutes=1)
_MARKS = {CheckStatus.OK: "ok", CheckStatus.FAILED: "FAILED", CheckStatus.SKIPPED: "-"}
_T = TypeVar("_T")

app = typer.Typer()


def say(line: str, *, err: bool = False) -> None:
    """Print one line. What a registry says in it is text, whatever it is made of."""
    typer.echo(printable(line, None), err=err)


def fail(error: AgentError) -> NoReturn:
    typer.echo(error.told(), err=True)
    raise typer.Exit(error.status)


@contextmanager
def failing() -> Iterator[None]:
    """An AgentError ends the program by its status."""
    try:
        yield
    except AgentError as error:
        fail(error)


@dataclass(frozen=True, slots=True)
class _Server:
    """One server that this host is."""

    me: Membership
    directory: MemberDirectory

    @property
    def registry(self) -> Registry:
        return Registry(self.me.registry, self.me.token, Path(self.me.ca) if self.me.ca else None)


def _servers(state: Path) -> list[_Server]:
    """As the agent's user: what is written on the way must be the agent's. One that is damaged is said."""
    become_owner(state)
    servers = []
    for directory in StateDirectory(state, create=False).require_members().values():
        try:
            servers.append(_Server(directory.membership(), directory))
        except AgentError as error:
            say(f"{error.message}; {error.remedy}", err=True)
    return servers


def _the_server(state: Path, domain: str | None) -> _Server:
    """The only one, or the one that is named by its domain or its label."""
    return _the_one({server.me.domain: server for server in _servers(state)}, domain)


def _the_one(servers: Mapping[str, _T], domain: str | None) -> _T:
    names = ", ".join(servers)
    if domain is None and len(servers) == 1:
        return next(iter(servers.values()))
    if domain is None:
        raise AgentError(f"this host is several servers: {names}", "say which: --server", ExitStatus.USAGE)
    wanted = domain.lower().rstrip(".")
    found = [each for name, each in servers.items() if wanted in {name, name.partition(".")[0]}]
    if len(found) != 1:
        what = "is not one server of this host" if not found else "is several servers of this host"
        raise AgentError(f"--server {domain} {what}", f"it is one of {names}", ExitStatus.USAGE)
    return found[0]


def _moment(text: str, option: str, now: datetime) -> datetime:
    """`90m`, `12h`, `3d`, or a time of RFC 3339; without a zone it is this host's."""
    if duration := _DURATION.fullmatch(text):
        return now + int(duration[1]) * _UNITS[duration[2]]
    try:
        moment = datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        raise AgentError(
            f"{option} {text}: not a time", "write 90m, 12h, 3d or 2026-12-01T18:00:00Z", ExitStatus.USAGE
        ) from None
    if moment <= now:
        raise AgentError(f"{option} {text}: that is over", "give a time that is to come", ExitStatus.USAGE)
    return moment


def _ask(
    state: Path, domain: str | None, question: Callable[[Registry, str], Awaitable[_T]]
) -> tuple[Membership, _T]:
    """Ask the server's registry, and have the agent report at once."""
    server = _the_server(state, domain)

    async def asked() -> _T:
        return await question(server.registry, server.me.server)

    answer = asyncio.run(asked())
    local.ask(state, "wake")
    return server.me, answer


# How it stands


async def _status_of(server: _Server) -> tuple[ServerStatus | None, str | None]:
    """What the registry says of it, or why it says nothing."""
    try:
        return await server.registry.status(server.me.server), None
    except AgentError as error:
        return None, error.message


@app.command()
def status(*, state: StateOption = DEFAULT_STATE, as_json: JsonOption = False) -> None:
    """How it stands: in this host, and in the registry's eyes."""
    configure_logging(logging.ERROR)
    with failing():
        servers = _servers(state)
        settings = load_settings(state, {})
        running = local.ask(state, "status")
        clock = running["clock"] if running else asyncio.run(checks.describe_clock(settings))
    known = {each["domain"]: each for each in running["servers"]} if running else {}
    rows = []
    for server in servers:
        seen, error = asyncio.run(_status_of(server))
        rows.append(
            {
                "domain": server.me.domain,
                "registry": server.me.registry,
                "registry_says": None
                if seen is None
                else TypeAdapter(ServerStatus).dump_python(seen, mode="json"),
                "registry_error": error,
                "agent_says": known.get(server.me.domain),
                "given_up": server.directory.is_given_up,
            }
        )
    engine = running["engine"] if running else None
    # An agent that was started before it was upgraded does not say.
    packets = running.get("packets") if running else None
    document = {
        "running": running is not None,
        "engine": engine,
        "packets": packets,
        "clock": clock,
        "servers": rows,
    }
    if as_json:
        typer.echo(json.dumps(document))
        return
    serves = f"running, engine {engine}" + (f", {packets} packets" if packets else "")
    typer.echo(f"agent      {serves if running else 'not running: pool-agent run'}")
    typer.echo(f"clock      {clock}")
    for row in rows:
        typer.echo("")
        for line in _lines(row, datetime.now(UTC)):
            say(line)


def _lines(row: dict[str, Any], now: datetime) -> Iterator[str]:
    """One server as people read it."""
    yield f"server     {row['domain']}"
    yield f"registry   {row['registry']}"
    says, agent = row["registry_says"], row["agent_says"] or {}
    if says is None:
        yield f"           {row['registry_error']}"
    else:
        yield from lines_of(TypeAdapter(ServerStatus).validate_python(says), now)
    if agent.get("contact_error"):
        since = datetime.fromtimestamp(agent["contact_error_at"], UTC)
        how = (
            "was first refused by the registry"
            if agent["contact_refused"]
            else "has not reached the registry"
        )
        yield f"agent      {how} {_ago(since, now)}: {agent['contact_error']}"
    elif agent.get("contact_at"):
        yield f"agent      last spoke to the registry {_ago(datetime.fromtimestamp(agent['contact_at'], UTC), now)}"
    if row["given_up"]:
        yield "leaving    it is given up here, and not gone yet: see pool-agent logs, or say `leave --local` again"
    if agent.get("problem"):
        yield f"problem    {agent['problem']}"
    if agent.get("own_account"):
        yield from _lines_of_account(agent["own_account"], now)
    if agent.get("certificate_ends"):
        ends = datetime.fromtimestamp(agent["certificate_ends"], UTC)
        seen = "seen working" if agent["seen_from_outside"] else "not yet seen"
        yield f"installed  a certificate that ends {ends:%Y-%m-%d %H:%M} UTC, {seen} from outside"


def _lines_of_account(account: dict[str, Any], now: datetime) -> Iterator[str]:
    """The agent's own account at a CA, and what it does next."""
    at = datetime.fromtimestamp(account["order_at"], UTC)
    if account["uri"] is None:
        yield "account    none at the CA yet"
    elif not account["may_order"]:
        yield f"account    {account['uri']}, which waits until CAA names it everywhere"
    elif account["ordering"]:
        yield f"account    {account['uri']}, which has an order open"
    else:
        when = "now" if at <= now else f"about {at:%Y-%m-%d %H:%M} UTC"
        yield f"account    {account['uri']}, which orders the next certificate {when}"


def lines_of(seen: ServerStatus, now: datetime) -> Iterator[str]:
    """What the registry says."""
    place = f"in DNS, named in {seen.share:.1%} of the pool's answers" if seen.in_dns else "not in DNS"
    yield f"state      {seen.state} {_ago(seen.state_since, now)}, {place}"
    yield from _reasons(seen, now)
    if seen.queue is not None:
        yield (
            f"queue      number {seen.queue.position} of {seen.queue.waiting} for a certificate,"
            f" about {seen.queue.turn_at:%Y-%m-%d %H:%M} UTC"
        )
    if seen.expected_at is not None:
        yield f"expected   {expectation(seen, now)}"
    for hold in seen.holds:
        yield f"hold       {hold.kind}: {hold.reason}"
    for address in seen.addresses:
        yield from _lines_of_address(address, now)
    if seen.certificate is not None and seen.certificate.not_after is not None:
        renewal = seen.certificate.renewal_at
        renewed = f", renewed about {renewal:%Y-%m-%d}" if renewal else ", a new one is being ordered"
        yield f"certificate ends {seen.certificate.not_after:%Y-%m-%d %H:%M} UTC{renewed}"
    if seen.leave_at is not None:
        yield f"leaving    for good at {seen.leave_at:%Y-%m-%d %H:%M} UTC; `pool-agent leave --cancel` takes it back"


def _reasons(seen: ServerStatus, now: datetime) -> Iterator[str]:
    """Why it is not in DNS, stage by stage, or has less of the answers than it might."""
    if seen.in_dns and (lessened := _lessened(seen.weight)):
        yield f"share      less than its weight: {lessened}"
    if not seen.why:
        return
    yield f"why        {seen.why}"
    for stage in seen.stages:
        if stage.since is not None:
            yield f"stage      {stage.stage} {stage.status} {_ago(stage.since, now)}"


def _lines_of_address(address: AddressStatus, now: datetime) -> Iterator[str]:
    """Its proof, its score, and what each monitor sees of it."""
    proof = "proved" if address.proved_at else f"not proved: {address.proof_error or 'not tried yet'}"
    score = "no score yet" if address.score is None else f"score {address.score:.1f}"
    yield f"address    {address.address}: {proof}, {score}"
    if address.unknown is not None:
        yield f"           unknown to the pool, which is the pool's fault: {address.unknown}"
    for sight in address.monitors:
        if sight.at is not None:
            yield f"           {_sight(sight, now)}"


def _lessened(weight: WeightStatus) -> str:
    """Why a server has less of the answers than its member wants."""
    parts = []
    if weight.score < 1:
        parts.append(f"{weight.score:.0%} by its score, which gives all from 15 up")
    if weight.capacity < 1:
        parts.append(f"{weight.capacity:.0%} by its traffic caps")
    if weight.young:
        parts.append("the account is young, and shares a part with other young ones")
    return "; ".join(parts)


def _sight(sight: SightStatus, now: datetime) -> str:
    """What one monitor sees."""
    assert sight.at is not None
    where = f" ({sight.country})" if sight.country else ""
    say = "" if sight.counts else ", without a say"
    score = "not admitted yet" if sight.score is None else f"score {sight.score:.1f}"
    text = f"{sight.monitor}{where}{say}: {score}, looked {_ago(sight.at, now)}"
    if sight.failed is not None:
        since = "" if sight.failed_since is None else f" since {sight.failed_since:%Y-%m-%d %H:%M} UTC"
        return f"{text}; {sight.failed}{since}: {sight.detail}"
    return f"{text}; {sight.step_reason}" if sight.step_reason else text


def expectation(seen: ServerStatus | None, now: datetime) -> str:
    """How long it takes until a server that has just joined is in DNS."""
    if seen is None or seen.expected_at is None:
        return "the registry does not say now how long that takes"
    minutes = max(1, math.ceil((seen.expected_at - now).total_seconds() / 60))
    days = "" if minutes < 1440 else f", in {minutes / 1440:.1f} days"
    near = f", in about {minutes} min" if minutes < 120 else days
    return f"in DNS about {seen.expected_at:%Y-%m-%d %H:%M} UTC{near}, if nothing fails and the pool is open"


def _ago(then: datetime, now: datetime) -> str:
    seconds = max(0, int((now - then).total_seconds()))
    for length, word in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds // length} {word} ago" if word != "d" else f"{seconds // length} days ago"
    return f"{seconds} s ago"


# What is wrong


@app.command()
def check(
    *, state: StateOption = DEFAULT_STATE, server: ServerOption = None, as_json: JsonOption = False
) -> None:
    """Look for what is wrong: on this host, and from outside through the registry. Each fault comes with its remedy."""
    configure_logging(logging.ERROR)
    with failing():
        one = _the_server(state, server)
        settings = load_settings(state, {})
        found = asyncio.run(_look(one, settings, local.ask(state, "status")))
    if as_json:
        typer.echo(TypeAdapter(list[Finding]).dump_json(found).decode())
    else:
        for finding in found:
            where = f" {finding.address}" if finding.address else ""
            say(f"{_MARKS[finding.status]:7}{finding.check}{where}: {finding.detail}")
            if finding.remedy:
                say(f"       {finding.remedy}")
    if any(finding.status is CheckStatus.FAILED for finding in found):
        raise typer.Exit(ExitStatus.CHECK)


async def _look(server: _Server, settings: Any, running: dict[str, Any] | None) -> list[Finding]:
    here = await checks.look_here(server.me, server.directory, settings, running)
    try:
        return [*here, *await server.registry.check(server.me.server)]
    except AgentError as error:
        return [*here, Finding("", "from outside", CheckStatus.SKIPPED, error.message, error.remedy)]


@app.command("web-server")
def web_server(
    kind: Annotated[WebServer, typer.Argument(help="which web server holds port 80")],
    state: StateOption = DEFAULT_STATE,
    server: ServerOption = None,
) -> None:
    """Print what it has to say for acme.validation = "redirect": a block for this server's name alone."""
    with failing():
        me = _the_server(state, server).me
    typer.echo(web_servers.block(kind, me.domain, me.registry), nl=False)


# Do something now


@app.command()
def renew(state: StateOption = DEFAULT_STATE, server: ServerOption = None) -> None:
    """Have a new certificate ordered now, as after the key may have been read. With an account of this host's own at the
    CA, one for each of its servers.
    """
    with failing():
        if load_settings(state, {}).acme.mode is AcmeMode.OWN_ACCOUNT:
            if local.ask(state, "renew") is None:
                raise AgentError(
                    "no agent runs on this state directory",
                    "start it: systemctl start pool-agent",
                    ExitStatus.STATE,
                )
            typer.echo("certificates are being ordered; `pool-agent status` shows how it goes")
            return
        me, _ = _ask(state, server, lambda registry, name: registry.renew(name))
    typer.echo(f"a certificate for {me.domain} is being ordered; `pool-agent status` shows how it goes")


@app.command()
def pause(
    until: Annotated[str, typer.Option(metavar="TIME", help="90m, 12h, 3d or a time; at most 30 days ahead")],
    reason: Annotated[str, typer.Option(help="for the operator's eyes")] = "",
    state: StateOption = DEFAULT_STATE,
    server: ServerOption = None,
) -> None:
    """Take the server out of the pool's answers until then; nothing counts against it meanwhile."""
    with failing():
        end = _moment(until, "--until", datetime.now(UTC))
        me, _ = _ask(state, server, lambda registry, name: registry.pause(name, end, reason))
    typer.echo(f"{me.domain} is out of the pool's answers until {end:%Y-%m-%d %H:%M} UTC")
    typer.echo("leave it running for another hour if you can: clients that know it go on asking")


@app.command()
def resume(state: StateOption = DEFAULT_STATE, server: ServerOption = None) -> None:
    """End the pause: the next good probe brings the server back."""
    with failing():
        me, ended = _ask(state, server, lambda registry, name: registry.resume(name, datetime.now(UTC)))
    typer.echo(f"{me.domain} comes back with the next good probe" if ended else f"{me.domain} was not paused")


@app.command()
def leave(
    *,
    at: Annotated[
        str | None, typer.Option(metavar="TIME", help="12h, 3d or a time; three hours ahead without")
    ] = None,
    reason: Annotated[str, typer.Option(help="for the operator's eyes")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="take it back and stay")] = False,
    here: Annotated[
        bool, typer.Option("--local", help="at once, on this host alone: for a pool that is gone for good")
    ] = False,
    state: StateOption = DEFAULT_STATE,
    server: ServerOption = None,
) -> None:
    """Leave the pool: out of its answers now, and at that time for good, with every line of ours on this host."""
    with failing():
        if here:
            if cancel or at is not None or reason:
                raise AgentError(
                    "--local is at once, and nobody is told",
                    "leave --at, --reason and --cancel out",
                    ExitStatus.USAGE,
                )
            _leave_here(state, server, yes=yes)
            return
        one = _the_server(state, server)
        if cancel:
            me, _ = _ask(state, one.me.domain, lambda registry, name: registry.stay(name))
            typer.echo(f"{me.domain} stays")
            return
        now = datetime.now(UTC)
        end = now + _SOONEST if at is None else _moment(at, "--at", now)
        if end < now + _SOONEST:
            raise AgentError(
                f"--at {at}: that is too soon", "give a time at least three hours ahead", ExitStatus.USAGE
            )
        typer.echo(f"{one.me.domain} leaves the pool for good at {end:%Y-%m-%d %H:%M} UTC.")
        typer.echo(
            "Its name is never given to anybody again, its certificate is revoked, and its keys are removed here."
        )
        if not yes and not typer.confirm("Go on?"):
            typer.echo("nothing was changed")
            raise typer.Exit(ExitStatus.USAGE)
        _ask(state, one.me.domain, lambda registry, name: registry.leave(name, end, reason))
    typer.echo(
        "leave the agent running until then: it ends by itself; `pool-agent leave --cancel` takes it back"
    )


def _leave_here(state: Path, domain: str | None, *, yes: bool) -> None:
    """Also a server whose membership is damaged."""
    become_owner(state)
    directories = StateDirectory(state, create=False)
    if not directories.members():
        # What a crash has left of the last one.
        directories.lock()
        directories.clean()
    directory = _the_one(directories.require_members(), domain)
    name = directory.path.name
    typer.echo(
        f"{name} is removed from this host: its keys, its certificates, and every line of ours for it."
    )
    typer.echo(
        "This cannot be taken back, and its registry is not asked. What only the pool can remove stays:"
    )
    typer.echo(
        "its names in DNS, and its certificate, which is not revoked. While the registry answers, leave"
    )
    typer.echo("without --local.")
    if not yes and not typer.confirm("Go on?"):
        typer.echo("nothing was changed")
        raise typer.Exit(ExitStatus.USAGE)
    configure_logging(logging.WARNING)
    asyncio.run(leaving.leave_here(directories, load_settings(state, {}), directory))
    left = ", ".join(directories.members())
    typer.echo(
        f"{name} is gone from this host, which goes on as {left}"
        if left
        else f"{name} is gone from this host"
    )


@app.command()
def logs(
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on as they come")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="how many of the last")] = 50,
) -> None:
    """The agent's log, under systemd."""
    program = shutil.which("journalctl")
    if program is None:
        fail(
            AgentError(
                "journalctl is not on this host",
                "the agent logs to its standard error: look where it was started",
                ExitStatus.USAGE,
            )
        )
    arguments = [program, "--unit", _UNIT, "--output", "cat", "--lines", str(lines)]
    os.execv(program, [*arguments, *(["--follow"] if follow else [])])  # noqa: S606 - there is no shell
