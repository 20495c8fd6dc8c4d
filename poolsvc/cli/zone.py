"""`poolsvc zone`: what would change in the zone, a word for what was stopped, and who shows what. Rendering only."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from poolsvc import plans
from poolsvc.cli.common import ConfigOption, ExitStatus, fail, in_transaction, read_settings, with_database
from poolsvc.config import Settings
from poolsvc.leader import FROZEN
from poolsvc.plans import Outlook
from poolsvc.zone import Change, RRset

app = typer.Typer(no_args_is_help=True, help="the pool's zone")
_SHOWN = 50


@app.command()
def diff(
    config: ConfigOption,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document")] = False,
) -> None:
    """Print what the registry would change in the zone, and the checksum of what waits for your word."""
    outlook = _look(_settings(config))
    if as_json:
        typer.echo(json.dumps(_document(outlook), indent=2))
    else:
        show(outlook, outlook.changes)


@app.command()
def apply(
    config: ConfigOption,
    plan: Annotated[
        str | None,
        typer.Option(metavar="CHECKSUM", help="what `zone diff` printed; without it you are asked"),
    ] = None,
) -> None:
    """Let the leader make what it has stopped: exactly the plan that you have looked at."""
    settings = _settings(config)
    outlook = _look(settings)
    question = outlook.question
    if plan is not None and plan != question.checksum:
        now = f"now it is {question.checksum}" if question else "now nothing waits for a word"
        fail(ExitStatus.USAGE, f"--plan {plan}: {now}", "look again with `poolsvc zone diff`")
    if plan is None:
        show(outlook, outlook.changes[:_SHOWN])
    if not question or (plan is None and not typer.confirm("Make this?")):
        return
    at = datetime.now(UTC)
    until = in_transaction(settings, lambda session: plans.approve(session, question, at))
    typer.echo(f"{_when(outlook)}; the word is good until {until:%H:%M} UTC")


@app.command()
def check(
    config: ConfigOption,
    sample: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="ask for so many RRsets only, chosen by chance")
    ] = None,
) -> None:
    """Ask every authoritative server for the zone, with signatures. Exit status 0 only if all show it."""
    settings = _settings(config)
    found = with_database(
        settings, lambda database: plans.check(database, settings, datetime.now(UTC), sample)
    )
    for mismatch in found.mismatches:
        what = "" if mismatch.key is None else f"{' '.join(mismatch.key)} "
        typer.echo(f"{mismatch.nameserver}  {what}{mismatch.reason}  > {mismatch.remedy}")
    if found.due:
        typer.echo(f"the primary  {found.due} RRsets are not as the registry has them  > poolsvc zone diff")
    typer.echo(
        f"serial {found.serial}: {found.asked} RRsets asked of {len(settings.dns.nameservers)} nameservers,"
        f" {len(found.mismatches)} mismatches"
    )
    if not found.is_good:
        raise typer.Exit(ExitStatus.DOCTOR)


def show(outlook: Outlook, changes: Sequence[Change]) -> None:
    """What would change, some of it line by line."""
    if not outlook.is_ready:
        typer.echo("there is no account at any CA yet, without which nothing is published")
        return
    stopped = set(outlook.question.changes)
    for change in changes:
        mark = "?" if change in stopped else " "
        typer.echo(f"{mark} {change.owner} {change.rdtype}  {_text(change.before)} -> {_text(change.after)}")
    if len(outlook.changes) > len(changes):
        typer.echo(f"... and {len(outlook.changes) - len(changes)} more")
    counts = _counts(outlook)
    typer.echo(
        f"{len(outlook.changes)} RRsets of the zone would change: {counts['created']} created,"
        f" {counts['replaced']} replaced, {counts['deleted']} deleted"
    )
    for name in outlook.question.kept:
        typer.echo(f"? {name} would leave the SRV")
    if outlook.question:
        typer.echo(
            f"What is marked with ? waits for your word: poolsvc zone apply --plan {outlook.question.checksum}"
        )


def _settings(config: Path) -> Settings:
    """With what the embedded server makes at its first start, without which nobody can ask it for the zone."""
    settings = read_settings(config)
    if settings.dns.embedded is not None and not settings.dns.tsig_secret_file.exists():
        fail(
            ExitStatus.CONFIGURATION,
            "the embedded DNS server has not begun the zone yet",
            "start `poolsvc serve`",
        )
    return settings


def _when(outlook: Outlook) -> str:
    """When the plan is made that an operator has confirmed."""
    if outlook.frozen_at is not None:
        return FROZEN
    if not outlook.is_led:
        return "no process publishes now: it is made when `poolsvc serve` runs"
    return "the leader makes it within seconds"


def _look(settings: Settings) -> Outlook:
    return with_database(settings, lambda database: plans.look(database, settings, datetime.now(UTC)))


def _text(rrset: RRset | None) -> str:
    return "nothing" if rrset is None else f"{rrset.ttl} {' | '.join(sorted(rrset.rdatas))}"


def _counts(outlook: Outlook) -> dict[str, int]:
    kinds = [
        "created" if change.before is None else "deleted" if change.after is None else "replaced"
        for change in outlook.changes
    ]
    return {kind: kinds.count(kind) for kind in ("created", "replaced", "deleted")}


def _document(outlook: Outlook) -> dict[str, Any]:
    question = outlook.question
    stopped = set(question.changes)

    def side(rrset: RRset | None) -> dict[str, Any] | None:
        return None if rrset is None else {"ttl": rrset.ttl, "records": sorted(rrset.rdatas)}

    return {
        "frozen": outlook.frozen_at is not None,
        "ready": outlook.is_ready,
        "counts": _counts(outlook),
        "changes": [
            {
                "owner": change.owner,
                "type": change.rdtype,
                "before": side(change.before),
                "after": side(change.after),
                "stopped": change in stopped,
            }
            for change in outlook.changes
        ],
        "leave_srv": list(question.kept),
        "plan": question.checksum if question else None,
    }
