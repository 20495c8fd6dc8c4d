"""A pool's client for people and for machines: documents, tables, and what has changed. Pure."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from nts_core.client import Failure
from nts_core.diagnosis import Outcome, Step, Summary
from nts_core.independence import Candidate
from nts_core.panel import Standing
from nts_core.pool import PoolView, SourceView
from nts_core.resolve import Proof, ResolveError
from nts_core.roster import Fault

_COLOURS = {"truechimer": "green", "falseticker": "red", "failed": "yellow"}
UNPROVEN = {
    Proof.RESOLVER: "membership on the resolver's word",
    Proof.UNPROVEN: "membership unproven: anybody on the way may have chosen these servers",
}
_RIGHT = frozenset({"offset", "delay", "next poll"})


def milliseconds(nanoseconds: int | None) -> str:
    """For people; nothing for nothing."""
    return "" if nanoseconds is None else f"{nanoseconds / 1e6:+.3f} ms"


def seconds(duration: float) -> str:
    """A duration in the unit that says most."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if duration >= 2 * size:
            return f"{duration / size:.0f} {unit}"
    return f"{duration:.0f} s"


def verdict(source: SourceView) -> str:
    """One of truechimer, falseticker, pending and failed."""
    if source.hold is not None:
        return "falseticker" if source.hold.fault is Fault.FALSETICKER else "failed"
    return source.standing if source.standing in _PLAIN else "failed"


_PLAIN = frozenset({Standing.TRUECHIMER, Standing.FALSETICKER, Standing.PENDING})


def everybody(view: PoolView) -> Iterator[SourceView]:
    """The sources, those that are held back, and those of which the zone does not say enough."""
    yield from view.sources
    yield from view.held
    for name, why in view.unusable.items():
        yield SourceView(Candidate(name), standing=Standing.UNFIT, trouble=why)


def document(view: PoolView) -> dict[str, Any]:
    """A view as JSON has it."""
    reading, problem = view.reading, view.problem
    return {
        "pool": view.pool,
        "membership": view.membership,
        "sources": [_source(source) for source in everybody(view)],
        "agreeing": view.truechimers,
        "offset_ns": None if reading is None else reading.offset,
        "error_ns": None if reading is None else reading.error,
        "not_independent": [
            {"names": list(pair.names), "same": [bond.name.lower() for bond in pair.bonds]}
            for pair in view.given_up
        ],
        "departed": list(view.departed),
        "shortcuts": list(view.shortcuts),
        "problem": None
        if problem is None
        else {"code": problem.code, "message": problem.message, "remedy": problem.remedy},
        "next_look_s": round(view.look_in, 1),
        "warnings": list(view.warnings),
    }


def _source(source: SourceView) -> dict[str, Any]:
    known = source.candidate.metadata
    return {
        "name": source.candidate.name,
        "port": source.candidate.port,
        "address": source.address,
        "operator": None if known is None else known.operator,
        "networks": [] if known is None else list(known.networks),
        "countries": [] if known is None else list(known.countries),
        "offset_ns": source.offset,
        "delay_ns": source.delay,
        "verdict": verdict(source),
        "reason": source.trouble or None,
        "samples": source.samples,
        "listed": source.is_listed,
        "next_poll_s": None if source.next_in is None else round(source.next_in, 1),
        "held_s": None if source.hold is None else round(source.hold.until, 1),
    }


def table(view: PoolView, *, is_live: bool = False) -> Table:
    """The sources, a row each; with what comes next if they are watched. Nothing that a peer says is markup."""
    shown = Table(box=None, pad_edge=False)
    for column in (
        "source",
        "address",
        "offset",
        "delay",
        *(("next poll", "listed") if is_live else ()),
        "verdict",
    ):
        shown.add_column(column, justify="right" if column in _RIGHT else "left", overflow="fold")
    for source in everybody(view):
        word = verdict(source)
        said = Text(word, style=_COLOURS.get(word, ""))
        if source.trouble:
            said.append(f" {source.trouble}", style="default")
        shown.add_row(
            Text(source.candidate.name),
            Text(source.address or ""),
            milliseconds(source.offset),
            milliseconds(source.delay),
            *((_next(source), "yes" if source.is_listed else "") if is_live else ()),
            said,
        )
    return shown


def _next(source: SourceView) -> str:
    if source.hold is not None:
        return f"held {seconds(source.hold.until)}"
    return "" if source.next_in is None else seconds(source.next_in)


def summary(view: PoolView) -> list[str]:
    """What is to be said of all the sources together."""
    lines = []
    if view.reading is not None:
        offset, error = view.reading.offset, view.reading.error
        lines.append(
            f"the truechimers agree on an offset of {milliseconds(offset)}, within {milliseconds(error)[1:]}"
        )
    if view.membership in UNPROVEN:
        lines.append(UNPROVEN[view.membership])
    lines += [f"shortcut: {sentence}" for sentence in view.shortcuts]
    lines += [f"not independent: {pair}" for pair in view.given_up]
    lines += [f"{name} is a member no longer" for name in view.departed]
    if view.problem is not None:
        lines.append(_sentence(view.problem))
    return lines


def _sentence(problem: ResolveError) -> str:
    subject = "clock" if problem.code == Failure.CLOCK else "DNS"
    return f"{subject}: {problem.message}; {problem.remedy}"


def changes(before: PoolView | None, after: PoolView) -> list[str]:
    """What somebody who reads a log wants to know, in sentences."""
    old = {} if before is None else _verdicts(before)
    new = _verdicts(after)
    lines = []
    for name, (word, why) in new.items():
        if (was := old.get(name, ("", ""))[0]) != word:
            lines.append(f"{name}: {word}{f', {why}' if why else ''}{f' (was {was})' if was else ''}")
    gone = old.keys() - new.keys()
    lines += [
        f"{name}: {'no member' if name in after.departed else 'no source'} any more" for name in sorted(gone)
    ]
    told = None if before is None or before.problem is None else before.problem.message
    if after.problem is not None and after.problem.message != told:
        lines.append(_sentence(after.problem))
    if after.problem is None and told is not None:
        lines.append("DNS: it answers again")
    lines += [f"warning: {text}" for text in after.warnings if before is None or text not in before.warnings]
    lines += [
        f"shortcut: {text}" for text in after.shortcuts if before is None or text not in before.shortcuts
    ]
    if after.membership in UNPROVEN and (before is None or before.membership is not after.membership):
        lines.append(UNPROVEN[after.membership])
    if after.truechimers != (None if before is None else before.truechimers):
        lines.append(f"sources that agree: {after.truechimers}")
    return lines


def _verdicts(view: PoolView) -> dict[str, tuple[str, str]]:
    return {source.candidate.name: (verdict(source), source.trouble) for source in everybody(view)}


# A check of a pool


def examination(pool: str, steps: Sequence[Step], summary: Summary | None) -> dict[str, Any]:
    """All steps as JSON has them; without a summary when there was no check."""
    return {
        "pool": pool,
        "outcome": None if summary is None else str(summary.outcome),
        "servers": None if summary is None else summary.servers,
        "operators": None if summary is None else summary.operators,
        "first": None if summary is None or summary.first is None else _step(summary.first),
        "steps": [_step(step) for step in steps],
    }


def _step(step: Step) -> dict[str, str | None]:
    return {
        "name": str(step.part),
        "about": step.about,
        "verdict": str(step.verdict),
        "code": step.code or None,
        "found": step.found,
        "remedy": step.remedy,
    }


def step_lines(step: Step) -> Iterator[tuple[str, str]]:
    """A step for people: each line's verdict, or nothing, and the rest of it."""
    yield str(step.verdict), f"{step.part:12}  {step.about}: {step.found}"
    if step.remedy:
        yield "", f"{'':12}  > {step.remedy}"


def conclusion(summary: Summary) -> Iterator[str]:
    """What a check comes to. What is an error as well is told there."""
    yield str(summary)
    if summary.first is not None and summary.outcome is not Outcome.UNUSABLE:
        yield f"  to mend first: {summary.first.part}, {summary.first.about}: {summary.first.found}"
        yield f"  > {summary.first.remedy}"
