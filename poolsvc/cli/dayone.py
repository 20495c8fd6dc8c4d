"""`poolsvc init`, `parent-records` and `doctor`. Rendering only."""

import asyncio
import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from nts_core.resolve import ResolveError, TrustAnchors
from nts_core.shell import parse_host_port
from nts_core.verdict import Verdict
from poolsvc import delegation, doctor, setup
from poolsvc.cli.common import ConfigOption, ExitStatus, fail, read_settings, refuse
from poolsvc.config import ConfigError, load_settings, split_endpoint
from poolsvc.delegation import NoReply, ParentRecords
from poolsvc.doctor.report import Examination
from poolsvc.names import narrowness
from poolsvc.primary import Nameserver
from poolsvc.setup import Answers, InvalidAnswer, NotWritten, WouldOverwrite

_LETS_ENCRYPT = "https://acme-v02.api.letsencrypt.org/directory"
_GLANCE = 2.0  # seconds for a primary that need not be there yet
_COLOURS = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "red", Verdict.SKIPPED: None}


def init(
    pool: Annotated[str, typer.Argument(metavar="POOL", help="the pool's domain, such as pool.example")],
    directory: Annotated[
        Path | None, typer.Option(metavar="DIR", help="where to write; a new directory named as the pool")
    ] = None,
    nameserver: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=ADDRESS", help="an authoritative server, the primary first; without any, this host"
        ),
    ] = None,
    *,
    own_primary: Annotated[
        bool,
        typer.Option(
            "--own-primary",
            help="the first nameserver is a Knot, BIND or PowerDNS of yours, not the registry itself",
        ),
    ] = False,
    public_url: Annotated[
        str, typer.Option(metavar="URL", help="the registry's address, not under the pool's domain")
    ] = "http://127.0.0.1:8080",
    ca: Annotated[str, typer.Option(metavar="URL", help="the CA's ACME directory")] = _LETS_ENCRYPT,
    caa_identity: Annotated[
        str | None,
        typer.Option(metavar="DOMAIN", help="the CA's name in CAA records, if it is not Let's Encrypt"),
    ] = None,
    contact: Annotated[
        list[str] | None, typer.Option(metavar="mailto:ADDRESS", help="where the CA can reach you")
    ] = None,
) -> None:
    """Write settings, keys and the primary's configuration for a new pool."""
    try:
        answers = setup.check_answers(
            pool=pool,
            nameservers=nameserver or (),
            public_url=public_url,
            ca=ca,
            caa_identity=caa_identity,
            contact=contact or (),
            own_primary=own_primary,
        )
        place = (directory or Path(answers.pool)).absolute()
        files = setup.render(answers, directory=place, program=Path(sys.executable).with_name("poolsvc"))
        setup.write(place, files)
    except InvalidAnswer as error:
        refuse(ExitStatus.USAGE, error)
    except (WouldOverwrite, NotWritten) as error:
        refuse(ExitStatus.CONFIGURATION, error)
    primary = Nameserver(answers.primary.address, answers.primary.port)
    try:
        records = asyncio.run(delegation.parent_records(answers.pool, primary, _GLANCE))
    except NoReply:
        records = delegation.planned_records(answers.pool, answers.nameserver_addresses())
    if (note := narrowness(answers.pool)) is not None:
        typer.echo(f"note: {note}", err=True)
    typer.echo(_next_steps(answers, place, files, records))


def show_parent_records(config: ConfigOption) -> None:
    """Print the NS, glue, DS and CAA lines for the parent, by what the primary serves."""
    settings = read_settings(config)
    primary = Nameserver(*split_endpoint(settings.dns.primary))
    try:
        records = asyncio.run(delegation.parent_records(settings.pool, primary))
    except NoReply as error:
        refuse(ExitStatus.PEER, error)
    typer.echo(_lines(records))


def examine(
    config: ConfigOption,
    resolver: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS[:PORT]", help="whom to ask about the parent zone; this host's resolver"
        ),
    ] = None,
    trust_anchor: Annotated[
        Path | None, typer.Option(metavar="FILE", help="DS or DNSKEY records to validate from")
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document")] = False,
) -> None:
    """Check what the registry stands on, and say what to do."""
    asked = doctor.system_resolver() if resolver is None else _resolver(resolver)
    anchors = None if trust_anchor is None else _anchors(trust_anchor)
    now = datetime.now(UTC)
    try:
        examination = Examination(load_settings(config), config, now, asked, anchors)
        results = asyncio.run(doctor.examine(examination))
    except ConfigError as error:
        results = doctor.unusable(error)
    is_healthy = all(result.verdict is not Verdict.FAIL for result in results)
    if as_json:
        document = {
            "at": now.isoformat(),
            "healthy": is_healthy,
            "checks": [asdict(each) for each in results],
        }
        typer.echo(json.dumps(document, indent=2))
    else:
        for result in results:
            mark = typer.style(f"{result.verdict:7}", fg=_COLOURS[result.verdict])
            typer.echo(f"{mark}  {result.name:12}  {result.found}")
            if result.remedy:
                typer.echo(f"{'':23}> {result.remedy}")
    if not is_healthy:
        raise typer.Exit(ExitStatus.DOCTOR)


def _resolver(text: str) -> Nameserver:
    try:
        return Nameserver(*parse_host_port(text, 53))
    except ValueError as error:
        fail(ExitStatus.USAGE, f"--resolver: {error}", "give the address of a resolver")


def _anchors(file: Path) -> TrustAnchors:
    try:
        return TrustAnchors.parse(file.read_text())
    except (OSError, ValueError) as error:
        fail(ExitStatus.USAGE, f"--trust-anchor: {error}", "give a file of DS or DNSKEY records, one a line")
    except ResolveError as error:
        fail(ExitStatus.USAGE, f"--trust-anchor: {error.message}", error.remedy)


def _lines(records: ParentRecords) -> str:
    return "\n".join(
        (
            *records.ns,
            *records.glue,
            *(records.ds or ("; DS: the zone is not signed yet",)),
            "; in the zone itself:",
            records.caa,
        )
    )


def _next_steps(answers: Answers, directory: Path, files: dict[str, bytes], records: ParentRecords) -> str:
    settings = directory / setup.SETTINGS
    written = "\n".join(f"  {directory / name}" for name in files)
    lines = "\n".join(f"     {line}" for line in _lines(records).splitlines())
    parent = f"""\
The parent zone, which takes these; `poolsvc parent-records --config {settings}` prints them
   again, with DS once the zone is signed:
{lines}"""
    start = f"""\
Keep a copy of {directory / setup.ACCOUNT_KEY}, and start:
     poolsvc operator create --config {settings} --email EMAIL
     poolsvc serve --config {settings}
   or as a service of a user of its own, who also runs the commands above:
     useradd --system poolsvc && chown -R poolsvc {directory}
     install -m 0644 -t /etc/systemd/system {directory}/poolsvc.service
     systemctl enable --now poolsvc"""
    migrate = f"poolsvc migrate --config {settings}"
    examine = f"poolsvc doctor --config {settings}"
    secondaries = "Each secondary, by its kind, includes one of knot-secondary.conf, bind-secondary.conf, nsd-secondary.conf."
    if answers.own_primary:
        steps = [
            f"The primary. With Knot:\n{_primary_steps(answers, directory)}\n   {secondaries}",
            f"{parent}\n   When it has the DS, with Knot: knotc zone-ksk-submitted {answers.pool}",
            f"Put everything else in order:\n     {migrate}\n     {examine}",
            start,
        ]
    else:
        secondaries = f"\n   {secondaries}" if answers.secondaries else ""
        steps = [
            f"Make the tables:\n     {migrate}",
            f"{start}\n   The zone is served from then on. Keep a copy of its key, in {directory / 'dns'}.{secondaries}",
            parent,
            f"See what is missing, until nothing is:\n     {examine}",
        ]
    numbered = "\n".join(f"{number}. {step}" for number, step in enumerate(steps, start=1))
    return f"{answers.pool} is set up in files that only you can read:\n{written}\n\n{numbered}"


def _primary_steps(answers: Answers, directory: Path) -> str:
    """How each kind of primary begins to serve the zone."""
    commands = "\n".join(f"     {line}" for line in setup.knot_commands(answers))
    return f"""\
     install -o knot -m 0600 -t /etc/knot {directory}/{setup.KNOT_TSIG} {directory}/knot-pool.conf
     and in /etc/knot/knot.conf: include: knot-pool.conf
     knotc reload
{commands}
   With BIND:
     install -o bind -m 0600 -t /etc/bind {directory}/{setup.BIND_TSIG} {directory}/bind-pool.conf
     install -o bind -m 0644 {directory}/pool.zone /var/lib/bind/{answers.pool}.zone
     and in /etc/bind/named.conf.local: include "/etc/bind/bind-pool.conf";
     on a host that serves no other zones: bind-options.conf in place of named.conf.options
     rndc reconfig
   With PowerDNS and its database in SQLite:
     install -o pdns -m 0600 -t /etc/powerdns {directory}/pdns-pool.lua
     install -o pdns -m 0600 -t /etc/powerdns/pdns.d {directory}/pdns-pool.conf
     sqlite3 /var/lib/powerdns/pdns.sqlite3 </usr/share/pdns-backend-sqlite3/schema/schema.sqlite3.sql
     sh {directory}/pdns-pool.sh
     chown pdns: /var/lib/powerdns/pdns.sqlite3*
     systemctl restart pdns"""
