"""`pool-client`: ask one server or a whole pool for authenticated time."""

import asyncio
import ipaddress
import json
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nts_core.aead import SUPPORTED, AeadId, parse_algorithms
from nts_core.client import (
    ClientError,
    Failure,
    PoolView,
    Verdict,
    load_roots,
    sources,
)
from nts_core.ke import KE_PORT
from nts_core.resolve import (
    MAX_RESOLVERS,
    ROOT,
    ResolveError,
    Resolver,
    Resolvers,
    TrustAnchors,
    system_resolvers,
)
from nts_core.session import CertificateTime
from nts_core.shell import parse_host_port
from nts_core.source import CertificateCheck, QueryResult, Source, query
from nts_core.tls import Trust

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


class ExitStatus(IntEnum):
    """How `pool-client` ends."""

    OK = 0
    USAGE = 2
    DNS = 3
    NOT_ESTABLISHED = 4
    NO_TIME = 5
    TOO_FEW_SOURCES = 6


_STATUS = {
    Failure.CONFIGURATION: ExitStatus.USAGE,
    Failure.LOCAL: ExitStatus.NOT_ESTABLISHED,
    Failure.DNS: ExitStatus.DNS,
    Failure.NTP: ExitStatus.NO_TIME,
    Failure.KISS: ExitStatus.NO_TIME,
    Failure.UNSYNCHRONISED: ExitStatus.NO_TIME,
    Failure.TOO_FEW_SOURCES: ExitStatus.TOO_FEW_SOURCES,
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


def _load_resolvers(texts: list[str], anchors: TrustAnchors) -> Resolvers:
    if len(texts) > MAX_RESOLVERS:
        raise _unusable(f"--resolver is given {len(texts)} times", f"give it {MAX_RESOLVERS} times at most")
    return Resolvers([_load_resolver(text, anchors) for text in texts or _system_resolvers()])


def _load_resolver(text: str, anchors: TrustAnchors) -> Resolver:
    endpoint = parse_endpoint(text, 53)
    try:
        address = str(ipaddress.ip_address(endpoint.host))
    except ValueError:
        raise _unusable(f"--resolver {text}: not an IP address", "give it as ADDRESS:PORT") from None
    return Resolver(address, endpoint.port, anchors, _RESOLVER_TIMEOUT)


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
    typer.echo(f"  offset  {_milliseconds(best.offset)}   delay {_milliseconds(best.delay)}")
    typer.echo(f"  stratum {best.stratum}   leap {best.leap}   samples {len(found.samples)}")
    if not found.key_establishment:
        typer.echo("  kept cookies were used, without key establishment")
    if found.certificate_time is CertificateTime.FLOOR:
        typer.echo("  certificate time not checked strictly: this machine's clock is not known to be right")


def _milliseconds(nanoseconds: int | None) -> str:
    return "" if nanoseconds is None else f"{nanoseconds / 1e6:+.3f} ms"


def _sources_document(pool: str | None, view: PoolView | None) -> dict[str, Any]:
    found = view.sources if view else ()
    return {
        "pool": pool,
        "sources": [
            {
                "name": source.name,
                "address": source.address,
                "operator": source.metadata.operator if source.metadata else None,
                "networks": list(source.metadata.networks) if source.metadata else [],
                "countries": list(source.metadata.countries) if source.metadata else [],
                "offset_ns": source.measurement.best.offset if source.measurement else None,
                "delay_ns": source.measurement.best.delay if source.measurement else None,
                "verdict": source.verdict,
                "reason": source.reason or None,
            }
            for source in found
        ],
        "offset_ns": view.offset if view else None,
        "not_independent": [
            {"names": list(pair.names), "same": [bond.name.lower() for bond in pair.bonds]}
            for pair in (view.given_up if view else ())
        ],
    }


@app.command("sources")
def sources_command(
    pool: Annotated[str, typer.Argument(help="the pool's domain, such as pool.example")],
    trust_anchor: Annotated[
        Path | None, typer.Option(help="file of DS or DNSKEY lines instead of the root's")
    ] = None,
    count: Annotated[int, typer.Option(help="how many sources must agree, 1 to 8")] = 4,
    resolver: Annotated[
        list[str] | None,
        typer.Option(metavar="ADDR:PORT", help="instead of the system's; may be given up to three times"),
    ] = None,
    ca: Annotated[Path | None, typer.Option(help="trusted roots (PEM) instead of the system's")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,  # noqa: FBT002 - a flag
) -> None:
    """Find a pool's members by DNSSEC, and keep those that tell the same time."""
    view: PoolView | None = None
    failure: ClientError | None = None
    resolvers: Resolvers | None = None
    try:
        _check_range("--count", count, MAX_COUNT)
        now = datetime.now(UTC)
        anchors = ROOT if trust_anchor is None else _load_anchors(trust_anchor)
        resolvers = _load_resolvers(resolver or [], anchors)
        trust = Trust.of(load_roots(ca), now)
        view = asyncio.run(sources(pool.rstrip(".").lower(), resolvers, trust, now, count=count))
        if view.truechimers < count:
            failure = ClientError(
                Failure.TOO_FEW_SOURCES,
                f"{view.truechimers} of {count} sources agree",
                "see each source's reason; ask again in a minute, or accept fewer with --count",
            )
    except ClientError as error:
        failure = error
    passed_over = resolvers.passed_over if resolvers is not None else {}
    warnings = [f"{name} is passed over: {error.message}" for name, error in passed_over.items()]
    if not as_json:
        for warning in warnings:
            typer.echo(f"warning: {warning}", err=True)
        if view is not None:
            _show_sources(view)
    document = {**_sources_document(pool, view), "warnings": warnings, "error": _error(failure)}
    _finish(document, failure, as_json=as_json)


_COLOURS = {Verdict.TRUECHIMER: "green", Verdict.FALSETICKER: "red", Verdict.FAILED: "yellow"}


def _show_sources(view: PoolView) -> None:
    # Off a terminal nothing is cut; and what a peer chose to say of itself is text, never markup.
    console = Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)
    table = Table(box=None, pad_edge=False)
    for column in ("source", "address", "offset", "delay", "verdict"):
        table.add_column(
            column, justify="right" if column in {"offset", "delay"} else "left", overflow="fold"
        )
    for source in view.sources:
        best = source.measurement.best if source.measurement else None
        verdict = Text(source.verdict, style=_COLOURS[source.verdict])
        table.add_row(
            Text(source.name),
            Text(source.address or ""),
            _milliseconds(best.offset if best else None),
            _milliseconds(best.delay if best else None),
            verdict.append(f" {source.reason}" if source.reason else "", style="default"),
        )
    console.print(table)
    if view.offset is not None:
        console.print(f"the truechimers agree on an offset of {_milliseconds(view.offset)}")
    for pair in view.given_up:
        console.print(Text(f"not independent: {pair}"))


# typer carries its own click inside and exports of its usage errors only this one: the root is one above.
_UsageError: Any = typer.BadParameter.__base__


def _empty_document() -> dict[str, Any]:
    """What a command whose line could not be read prints: every field that it has, without a value."""
    if "sources" in sys.argv:
        return {**_sources_document(None, None), "warnings": []}
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
