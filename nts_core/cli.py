"""`pool-client`: ask one server or a whole pool for authenticated time."""

import asyncio
import ipaddress
import json
import math
import re
import shlex
import signal
import sys
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from nts_core import show
from nts_core.aead import SUPPORTED, AeadId, parse_algorithms
from nts_core.authorities import Authorities
from nts_core.check import Check
from nts_core.client import ClientError, Failure, load_roots
from nts_core.denial import Witnesses
from nts_core.diagnosis import Step
from nts_core.feed import Feed, News
from nts_core.feeding import Kind, Member
from nts_core.feeding.hand import DAEMONS, Hand
from nts_core.ke import KE_PORT
from nts_core.membership import Membership
from nts_core.pool import COUNT, PoolClient, PoolView, shortage
from nts_core.resolve import (
    MAX_RESOLVERS,
    ROOT,
    Dnssec,
    Proof,
    ResolveError,
    Resolver,
    Resolvers,
    TrustAnchors,
    system_resolvers,
)
from nts_core.session import CertificateTime
from nts_core.shell import parse_host_port
from nts_core.source import INTERVAL, CertificateCheck, QueryResult, Source, query
from nts_core.verdict import Verdict

app = typer.Typer(
    name="pool-client",
    no_args_is_help=True,
    add_completion=False,
    help=__doc__,
    pretty_exceptions_enable=False,
)
_RESOLVER_TIMEOUT = 3.0
MAX_SAMPLES = 64
_WIDE = 200
# A pool's answer holds eight targets at most.
MAX_COUNT = 8
_MIN_INTERVAL, _MAX_INTERVAL = 16, 1024
_SHOW_EVERY = 1.0
_DOMAIN = re.compile(r"(?=.{1,253}$)([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_-]{1,63}")


class ExitStatus(IntEnum):
    """How `pool-client` ends."""

    OK = 0
    USAGE = 2
    DNS = 3
    NOT_ESTABLISHED = 4
    NO_TIME = 5
    TOO_FEW_SOURCES = 6
    NOT_TOLD = 7


_STATUS = {
    Failure.CONFIGURATION: ExitStatus.USAGE,
    Failure.LOCAL: ExitStatus.NOT_ESTABLISHED,
    Failure.DNS: ExitStatus.DNS,
    Failure.NTP: ExitStatus.NO_TIME,
    Failure.KISS: ExitStatus.NO_TIME,
    Failure.UNSYNCHRONISED: ExitStatus.NO_TIME,
    Failure.CLOCK: ExitStatus.NO_TIME,
    Failure.TOO_FEW_SOURCES: ExitStatus.TOO_FEW_SOURCES,
    Failure.DAEMON: ExitStatus.NOT_TOLD,
}


def exit_status(failure: Failure) -> ExitStatus:
    """The status that stands for a failure."""
    return _STATUS.get(failure, ExitStatus.NOT_ESTABLISHED)


@dataclass(frozen=True, slots=True)
class Endpoint:
    host: str
    port: int


def parse_endpoint(text: str, default_port: int) -> Endpoint:
    """HOST, HOST:PORT, [IPV6] or [IPV6]:PORT. Raises ClientError."""
    try:
        return Endpoint(*parse_host_port(text, default_port))
    except ValueError as error:
        message, _, remedy = str(error).partition(": write ")
        raise _unusable(message, f"write {remedy}") from None


def _unusable(message: str, remedy: str) -> ClientError:
    return ClientError(Failure.CONFIGURATION, message, remedy)


def _load_anchors(file: Path) -> TrustAnchors:
    try:
        return TrustAnchors.parse(file.read_text())
    except OSError as error:
        raise _unusable(
            f"--trust-anchor {file}: {error}", "give a readable file of DS or DNSKEY lines"
        ) from None
    except (ResolveError, UnicodeDecodeError) as error:
        raise _unusable(
            f"--trust-anchor {file}: {error}", "put the zone's DS or DNSKEY lines in it"
        ) from None


def _load_endpoints(texts: list[str]) -> list[Endpoint]:
    """Where the resolvers are."""
    if len(texts) > MAX_RESOLVERS:
        raise _unusable(f"--resolver is given {len(texts)} times", f"give it {MAX_RESOLVERS} times at most")
    return [_load_endpoint(text) for text in texts or _system_resolvers()]


def _load_endpoint(text: str) -> Endpoint:
    endpoint = parse_endpoint(text, 53)
    try:
        return Endpoint(str(ipaddress.ip_address(endpoint.host)), endpoint.port)
    except ValueError:
        raise _unusable(f"--resolver {text}: not an IP address", "give it as ADDRESS:PORT") from None


def _system_resolvers() -> list[str]:
    found = system_resolvers()
    if not found:
        raise _unusable("/etc/resolv.conf names no resolver", "give one with --resolver ADDRESS:PORT")
    return [f"[{address}]:53" for address in found]


def _check_range(option: str, value: int, maximum: int) -> None:
    """Here and not by the option parser, so that `--json` also says this as one object."""
    if not 1 <= value <= maximum:
        raise _unusable(f"{option} {value} is out of range", f"give a number from 1 to {maximum}")


def _error(error: ClientError | None) -> dict[str, str] | None:
    return None if error is None else {"code": error.code, "message": error.message, "remedy": error.remedy}


def _finish(document: dict[str, Any], error: ClientError | None, *, as_json: bool) -> None:
    """Print what is for machines or the error for people, and end with the status that fits."""
    if as_json:
        typer.echo(json.dumps(document))
    elif error is not None:
        typer.echo(f"error ({error.code}): {error.message}", err=True)
        if error.remedy:
            typer.echo(f"  {error.remedy}", err=True)
    if error is not None:
        raise typer.Exit(exit_status(Failure(error.code)))


def _query_document(
    endpoint: Endpoint | None, host: str | None, found: QueryResult | None, warnings: list[str]
) -> dict[str, Any]:
    best = None if found is None else found.best
    return {
        "authenticated": found is not None,
        "server": endpoint.host if endpoint else host,
        "ke_port": endpoint.port if endpoint else None,
        "ntp_address": found.ntp_host if found else None,
        "ntp_port": found.ntp_port if found else None,
        "aead": int(found.aead) if found else None,
        "cookies": found.cookies if found else None,
        "key_establishment": found.key_establishment if found else None,
        "certificate_time": found.certificate_time if found else None,
        "offset_ns": best.offset if best else None,
        "delay_ns": best.delay if best else None,
        "stratum": best.stratum if best else None,
        "leap": best.leap if best else None,
        "warnings": warnings,
    }


@app.command("query")
def query_command(
    host: Annotated[str, typer.Argument(metavar="HOST[:KEPORT]", help="the server's TLS name")],
    ca: Annotated[Path | None, typer.Option(help="trusted roots (PEM) instead of the system's")] = None,
    address: Annotated[str | None, typer.Option(help="connect to this IP address")] = None,
    samples: Annotated[int, typer.Option(help="authenticated exchanges, 1 to 64")] = 4,
    aead: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="AEAD algorithms to offer, the preferred first, such as 30,15"),
    ] = None,
    state: Annotated[Path | None, typer.Option(help="keep cookies and the last known time here")] = None,
    certificate_time: Annotated[
        CertificateCheck, typer.Option(help="auto goes without a right clock if --state is given")
    ] = CertificateCheck.AUTO,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,  # noqa: FBT002 - a flag
) -> None:
    """Key establishment and authenticated exchanges with one server."""
    endpoint: Endpoint | None = None
    source: Source | None = None
    found: QueryResult | None = None
    failure: ClientError | None = None
    try:
        endpoint = parse_endpoint(host, KE_PORT)
        _check_range("--samples", samples, MAX_SAMPLES)
        if address is not None:
            address = _parse_address(address)
        source = Source(
            endpoint.host,
            endpoint.port,
            load_roots(ca),
            addresses=[] if address is None else [address],
            state=state,
            check=certificate_time,
            interval=0,
            offered=_parse_aead(aead) if aead is not None else SUPPORTED,
        )
        found = asyncio.run(query(source, samples))
        if not found.best.synchronised:
            failure = ClientError(Failure.UNSYNCHRONISED, f"{endpoint.host} says that it is not synchronised")
    except ClientError as error:
        failure = error
    warnings = [] if source is None else source.warnings
    if not as_json:
        for warning in warnings:
            typer.echo(f"warning: {warning}", err=True)
        if found is not None:
            _show_query(host, found)
    document = {**_query_document(endpoint, host, found, warnings), "error": _error(failure)}
    _finish(document, failure, as_json=as_json)


def _parse_address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text.strip("[]")))
    except ValueError:
        raise _unusable(f"--address {text}: not an IP address", "give an IPv4 or IPv6 address") from None


def _parse_aead(text: str) -> tuple[AeadId, ...]:
    try:
        return parse_algorithms(text)
    except ValueError as error:
        raise _unusable(
            f"--aead {text}: {error}", "give numbers with commas between, such as 30,15"
        ) from None


def _show_query(host: str, found: QueryResult) -> None:
    best = found.best
    now = datetime.fromtimestamp((time.time_ns() + best.offset) / 1e9, UTC)
    typer.echo(f"{host} at {found.ntp_host} port {found.ntp_port}, authenticated")
    typer.echo(f"  time    {now.isoformat(timespec='milliseconds')}")
    typer.echo(f"  offset  {show.milliseconds(best.offset)}   delay {show.milliseconds(best.delay)}")
    typer.echo(f"  stratum {best.stratum}   leap {best.leap}   samples {len(found.samples)}")
    if not found.key_establishment:
        typer.echo("  kept cookies were used, without key establishment")
    if found.certificate_time is CertificateTime.FLOOR:
        typer.echo("  certificate time not checked strictly: this machine's clock is not known to be right")


Pool = Annotated[str, typer.Argument(help="the pool's domain, such as pool.example")]
TrustAnchor = Annotated[Path | None, typer.Option(help="file of DS or DNSKEY lines instead of the root's")]
ResolverList = Annotated[
    list[str] | None,
    typer.Option(metavar="ADDR:PORT", help="instead of the system's; may be given up to three times"),
]
Roots = Annotated[Path | None, typer.Option(help="trusted roots (PEM) instead of the system's")]
Count = Annotated[int, typer.Option(help="how many sources must agree, 1 to 8")]
State = Annotated[
    Path | None, typer.Option(help="keep the choice, cookies and the last known time here between runs")
]
DnssecMode = Annotated[
    Dnssec,
    typer.Option("--dnssec", help="who validates: this program, the resolver (over a safe path), or nobody"),
]
ClockUse = Annotated[
    CertificateCheck,
    typer.Option(
        "--clock",
        help="auto finds the time from the pool where this machine's is wrong, strict goes by it alone",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


class _Session:
    """A PoolClient made of the command line, and its resolvers. Raises ClientError."""

    def __init__(
        self,
        pool: str,
        *,
        trust_anchor: Path | None,
        resolver: list[str] | None,
        ca: Path | None,
        count: int,
        state: Path | None,
        dnssec: Dnssec,
        clock: CertificateCheck,
        interval: float = INTERVAL,
    ) -> None:
        _check_range("--count", count, MAX_COUNT)
        self.resolvers, witnesses = _load_lookups(trust_anchor, resolver, dnssec)
        self.client = PoolClient(
            _parse_pool(pool),
            count=count,
            lookup=self.resolvers,
            denier=witnesses,
            roots=load_roots(ca),
            state=state,
            interval=interval,
            check=clock,
        )

    @property
    def warnings(self) -> list[str]:
        """Which resolvers are passed over, and for whom."""
        told = [
            f"{name} is passed over: {error.message}" for name, error in self.resolvers.passed_over.items()
        ]
        return [*told, "the zones' own servers are asked directly"] if self.resolvers.is_direct else told


def _load_resolvers(
    trust_anchor: Path | None, texts: list[str] | None, dnssec: Dnssec = Dnssec.REQUIRE
) -> list[Resolver]:
    anchors = ROOT if trust_anchor is None else _load_anchors(trust_anchor)
    return [
        Resolver(each.host, each.port, anchors, _RESOLVER_TIMEOUT, dnssec=dnssec)
        for each in _load_endpoints(texts or [])
    ]


def _load_lookups(
    trust_anchor: Path | None, texts: list[str] | None, dnssec: Dnssec
) -> tuple[Resolvers, Witnesses]:
    """Who finds a pool's members, and who confirms that one is gone. Raises ClientError."""
    if dnssec is not Dnssec.REQUIRE and trust_anchor is not None:
        raise _unusable(
            f"--trust-anchor is of no use with --dnssec {dnssec}",
            "leave one of the two out: nothing is validated here",
        )
    resolvers = _load_resolvers(trust_anchor, texts, dnssec)
    # A zone of another anchor may be one that the root does not know.
    is_public = dnssec is Dnssec.REQUIRE and trust_anchor is None
    witnesses = Witnesses([(each.address, each.port) for each in resolvers])
    return Resolvers(resolvers, Authorities(ROOT) if is_public else None), witnesses


def _parse_pool(text: str) -> str:
    name = text.removesuffix(".").lower()
    if not _DOMAIN.fullmatch(name):
        raise _unusable(f"{text!r} is not a domain name", "give the pool's domain, such as pool.example")
    return name


@app.command("sources")
def sources_command(
    pool: Pool,
    trust_anchor: TrustAnchor = None,
    dnssec: DnssecMode = Dnssec.REQUIRE,
    count: Count = COUNT,
    resolver: ResolverList = None,
    ca: Roots = None,
    state: State = None,
    clock: ClockUse = CertificateCheck.AUTO,
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Find a pool's members by DNSSEC, and keep those that tell the same time."""
    document: dict[str, Any] = _empty_view(pool)
    failure: ClientError | None = None
    try:
        session = _Session(
            pool,
            trust_anchor=trust_anchor,
            dnssec=dnssec,
            resolver=resolver,
            ca=ca,
            count=count,
            state=state,
            clock=clock,
        )
        view = asyncio.run(_settle(session.client))
        view = replace(view, warnings=(*view.warnings, *session.warnings))
        document = show.document(view)
        if view.truechimers < count:
            failure = shortage(view, count)
        if not as_json:
            _show_sources(view)
    except ClientError as error:
        failure = error
    _finish({**document, "error": _error(failure)}, failure, as_json=as_json)


async def _settle(client: PoolClient) -> PoolView:
    async with client:
        return await client.settled()


def _empty_view(pool: str | None) -> dict[str, Any]:
    """What is printed where nothing was found: every field, without a value."""
    nothing = PoolView(pool or "", (), (), {}, (), None, None, 0.0, is_settled=True, warnings=())
    return {**show.document(nothing), "pool": pool}


def _console() -> Console:
    """Off a terminal nothing is cut."""
    return Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)


def _show_sources(view: PoolView) -> None:
    for warning in view.warnings:
        typer.echo(f"warning: {warning}", err=True)
    console = _console()
    console.print(show.table(view))
    for line in show.summary(view):
        console.print(Text(line))


@app.command("watch")
def watch_command(
    pool: Pool,
    trust_anchor: TrustAnchor = None,
    dnssec: DnssecMode = Dnssec.REQUIRE,
    count: Count = COUNT,
    resolver: ResolverList = None,
    ca: Roots = None,
    state: State = None,
    clock: ClockUse = CertificateCheck.AUTO,
    interval: Annotated[int, typer.Option(help="seconds between polls of a source, 16 to 1024")] = round(
        INTERVAL
    ),
    until: Annotated[
        float | None, typer.Option("--for", metavar="SECONDS", help="end after so long; else at Ctrl-C")
    ] = None,
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Keep several sources of a pool, and show what becomes of them."""
    failure: ClientError | None = None
    try:
        if not _MIN_INTERVAL <= interval <= _MAX_INTERVAL:
            raise _unusable(
                f"--interval {interval} is out of range", f"give {_MIN_INTERVAL} to {_MAX_INTERVAL} seconds"
            )
        if until is not None and not 0 < until < math.inf:
            raise _unusable(f"--for {until:g} is no time to watch", "give seconds, more than 0")
        session = _Session(
            pool,
            trust_anchor=trust_anchor,
            dnssec=dnssec,
            resolver=resolver,
            ca=ca,
            count=count,
            state=state,
            clock=clock,
            interval=interval,
        )
        asyncio.run(_until_signal(_watch(session, until, as_json=as_json)))
    except ClientError as error:
        failure = error
    if failure is not None:
        _finish({**_empty_view(pool), "error": _error(failure)}, failure, as_json=as_json)


async def _watch(session: _Session, until: float | None, *, as_json: bool) -> None:
    """Show each view that says something new, no more than one a second; a terminal's picture is kept up to date."""
    screen = _Screen(as_json=as_json)
    with suppress(TimeoutError), screen:
        async with asyncio.timeout(until), session.client as client:
            async for view in client.views(every=_SHOW_EVERY if screen.is_live else None):
                screen.show(replace(view, warnings=(*view.warnings, *session.warnings)))
                await asyncio.sleep(_SHOW_EVERY)


class _Screen:
    """Where `watch` shows its views: a terminal, a file of lines for people, or one of JSON."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._live = (
            Live(console=_console(), auto_refresh=False) if sys.stdout.isatty() and not as_json else None
        )
        self._last: PoolView | None = None

    @property
    def is_live(self) -> bool:
        """Whether a picture is kept up to date."""
        return self._live is not None

    def __enter__(self) -> None:
        if self._live is not None:
            self._live.start()

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, view: PoolView) -> None:
        if self._live is not None:
            lines = [
                f"{view.pool}: sources that agree: {view.truechimers}; next look at DNS in {show.seconds(view.look_in)}"
            ]
            lines += [*show.summary(view), *(f"warning: {warning}" for warning in view.warnings)]
            self._live.update(Group(show.table(view, is_live=True), *map(Text, lines)), refresh=True)
        elif self._as_json:
            typer.echo(json.dumps({"at": _now(), **show.document(view)}))
        else:
            for line in show.changes(self._last, view):
                typer.echo(f"{_now()} {line}")
        self._last = view


@app.command("check")
def check_command(
    pool: Pool,
    trust_anchor: TrustAnchor = None,
    resolver: ResolverList = None,
    ca: Roots = None,
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Find out whether a pool can be used from here, and what to mend if not: DNS, clock, NTS-KE, long NTP packets."""
    document: dict[str, Any] = show.examination(pool, (), None)
    failure: ClientError | None = None
    try:
        resolvers = _load_resolvers(trust_anchor, resolver)
        check = Check(_parse_pool(pool), resolvers, load_roots(ca), tell=_hide if as_json else _show_step)
        summary = asyncio.run(check.run())
        document, failure = show.examination(check.pool, check.steps, summary), summary.error
        if not as_json:
            typer.echo()
            for line in show.conclusion(summary):
                typer.echo(line)
    except ClientError as error:
        failure = error
    _finish({**document, "error": _error(failure)}, failure, as_json=as_json)


_COLOURS = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "red", Verdict.SKIPPED: None}


def _hide(step: Step) -> None:
    """What machines read is one object at the end."""


def _show_step(step: Step) -> None:
    for word, rest in show.step_lines(step):
        typer.echo(f"{typer.style(f'{word:7}', fg=_COLOURS[step.verdict])}  {rest}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@app.command("feed")
def feed_command(
    pool: Pool,
    to: Annotated[Kind, typer.Option(help="the time daemon of this host")],
    directory: Annotated[
        Path | None, typer.Option("--dir", help="where it reads of its sources, instead of Debian's place")
    ] = None,
    count: Annotated[int, typer.Option(help="how many members it is to have, 1 to 8")] = COUNT,
    reload: Annotated[
        str | None,
        typer.Option(metavar="COMMAND", help="what makes it read that, instead of its usual command"),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="added to each source as it is; may be given several times"),
    ] = None,
    trust_anchor: TrustAnchor = None,
    dnssec: DnssecMode = Dnssec.REQUIRE,
    resolver: ResolverList = None,
    state: Annotated[
        Path | None, typer.Option(help="keep here between runs which members are held back")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="look and tell the daemon once, and end")] = False,  # noqa: FBT002 - a flag
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Keep the time daemon of this host on several members of a pool."""
    failure: ClientError | None = None
    members: tuple[Member, ...] = ()
    proof: Proof | None = None
    try:
        _check_range("--count", count, MAX_COUNT)
        name = _parse_pool(pool)
        resolvers, witnesses = _load_lookups(trust_anchor, resolver, dnssec)
        hand = Hand(
            DAEMONS[to],
            name,
            directory=directory,
            options=[_parse_option(text) for text in option or []],
            tell=[] if reload is None else _parse_command(reload),
        )
        feed = Feed(
            hand,
            Membership(name, resolvers, witnesses),
            count,
            lambda news: _show_news(news, as_json=as_json),
            state=state,
        )
        asyncio.run(feed.once() if once else _until_signal(feed.run()))
        failure, members, proof = feed.problem if once else None, feed.members, feed.proof
    except ClientError as error:
        failure = error
    if once or failure is not None:
        document = {"pool": pool, "members": [str(member) for member in members], "membership": proof}
        _finish({**document, "error": _error(failure)}, failure, as_json=as_json)


def _parse_option(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise _unusable(f"--option {text!r} is not one line of text", "give it as the daemon's manual has it")
    return text.strip()


def _parse_command(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise _unusable(f"--reload {text}: {error}", "correct its quotes") from None
    if not words:
        raise _unusable("--reload is empty", "give a program and its arguments")
    return words


async def _until_signal(work: Coroutine[Any, Any, None]) -> None:
    """To its end, or until SIGTERM or SIGINT."""
    task = asyncio.ensure_future(work)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    with suppress(asyncio.CancelledError):
        await task


def _show_news(news: News, *, as_json: bool) -> None:
    if as_json:
        told = {"at": _now(), "what": news.what, "names": news.names, "words": news.words}
        typer.echo(json.dumps({**told, "error": _error(news.error)}))
    else:
        typer.echo(f"{_now()} {news.words}")
    # A log is a pipe, perhaps.
    sys.stdout.flush()


# typer carries its own click inside and exports of its usage errors only this one: the root is one above.
_UsageError: Any = typer.BadParameter.__base__


def _empty_document() -> dict[str, Any]:
    """What a command whose line could not be read prints: every field that it has, without a value."""
    if {"sources", "watch"} & set(sys.argv):
        return _empty_view(None)
    if "check" in sys.argv:
        return {**show.examination("", (), None), "pool": None}
    return _query_document(None, None, None, []) if "query" in sys.argv else {}


def main() -> None:
    """Run a command. Also a command line that cannot be read is one JSON object where that was asked for."""
    try:
        sys.exit(app(standalone_mode=False))
    except typer.Abort:
        sys.exit(ExitStatus.USAGE)
    except _UsageError as error:
        if "--json" in sys.argv:
            typer.echo(
                json.dumps(
                    {**_empty_document(), "error": _error(_unusable(error.format_message(), "see --help"))}
                )
            )
        else:
            error.show()
        sys.exit(ExitStatus.USAGE)
