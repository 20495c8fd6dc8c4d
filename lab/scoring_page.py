"""What comes of rules and of a simulated pool, as the tables and charts of docs/scoring.md.

python -m lab.scoring_page                     the situations of thirty days as a table, with 10,000 servers
python -m lab.scoring_page --docs              writes the page's tables and charts
python -m lab.scoring_page --servers 500 --days 20
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from lab import course
from lab.charts import chart
from lab.course import FULL, SILENCE, follow
from lab.world import (
    A_DAY,
    ALWAYS,
    DRIFT,
    DRIFTING,
    FALSE,
    FLAPPING,
    ISLANDS,
    LIES,
    LOSSY,
    ROUND,
    Server,
    World,
)
from nts_core.control import ProbeResult
from poolsvc.scoring import CUTOFF, FULL_SHARE
from poolsvc.verdicts import SCORERS

DOCS = Path(__file__).parent.parent / "docs"


def table(world: World) -> Iterator[str]:
    """Each situation's outcome, as the lines of a Markdown table."""
    yield "| situation | servers concerned | good ones that lost their place | bad ones: out after | back after | no verdict |"
    yield "|---|---|---|---|---|---|"
    for name, found in world.outcomes.items():
        out = (
            f"{_spread(found.out, 'min')}{f'; {found.missed} stay' if found.missed else ''}"
            if found.out
            else ""
        )
        erring = f" ({min(found.wrong):.0%} or more of their monitors erred)" if found.wrong else ""
        unknown = f"{found.unknown / max(1, found.concerned):.1f} h a server" if found.unknown else ""
        cells = (
            name,
            f"{found.concerned:,}",
            f"{len(found.wrong)}{erring}",
            out,
            _spread(found.back, "h"),
            unknown,
        )
        yield f"| {' | '.join(cells)} |"


def _spread(found: Sequence[float], unit: str) -> str:
    if not found:
        return ""
    digits = 0 if unit == "min" else 1
    return f"{statistics.median(found):.{digits}f} {unit} (at most {max(found):.{digits}f})"


def always(world: World) -> Iterator[str]:
    """What became of servers that are all the time as they are, as the lines of a Markdown table."""
    yield "| servers | how many | changes a server and week | mean share | in the answer at the end | what else |"
    yield "|---|---|---|---|---|---|"
    weeks = world.rounds / A_DAY / 7
    for kind in (FLAPPING, LOSSY, DRIFTING, FALSE):
        those = [one for one in world.servers if one.kind == kind]
        moves = sum(len(world.changes.get(one.number, ())) for one in those)
        listed = sum(one.is_listed for one in those)
        mean = f"{world.shares[kind] / len(those) / world.rounds:.0%}" if kind in ALWAYS else ""
        cells = (
            f"{len(those)}",
            f"{moves / len(those) / weeks:.1f}",
            mean,
            f"{listed}",
            _else(world, kind, those),
        )
        yield f"| {_KINDS[kind]} | {' | '.join(cells)} |"
    island = next((one for one in world.servers if one.region == ISLANDS), None)
    if island is not None:
        moves = len(world.changes.get(island.number, ()))
        yield f"| the only one of its region, which has no monitor | 1 | {moves / weeks:.1f} | | {int(island.is_listed)} | |"


_KINDS = {
    FLAPPING: "silent for 18 minutes every three hours",
    LOSSY: "3 % of probes are lost",
    DRIFTING: "a clock that drifts 20 ms a day",
    FALSE: "good for those that probe it regularly, silent for others",
}


def _else(world: World, kind: str, those: Sequence[Server]) -> str:
    if kind == DRIFTING:
        out = [world.changes[one.number][0][0] for one in those if world.changes.get(one.number)]
        if out:
            return f"out at {1000 * DRIFT * statistics.median(out) / A_DAY:.0f} ms, after {statistics.median(out) / A_DAY:.1f} days"
    if kind == FALSE:
        flagged = [world.flags[one.number][0] for one in those if one.number in world.flags]
        wrong = sum(not world.servers[number].kind for number in world.flags)
        if flagged:
            hours = max(flagged) * ROUND / timedelta(hours=1)
            return f"{len(flagged)} flagged within {hours:.0f} hours, and {wrong} of as many good ones"
    return ""


def lies_table(found: Mapping[str, Sequence[tuple[float, float]]]) -> Iterator[str]:
    """What comes of lies, as the lines of a Markdown table."""
    shown = [count for count in LIES if count]
    yield f"| monitors of 40 that lie | {' | '.join(map(str, shown))} |"
    yield f"|---|{'---|' * len(shown)}"
    for way, points in found.items():
        values = dict(points)
        cells = [f"{values[count]:.2f} %" if count in values else "" for count in shown]
        yield f"| {way} | {' | '.join(cells)} |"


def trial(world: World) -> Iterator[str]:
    """What the quartile would have made of each situation, as the lines of a Markdown table."""
    yield "| at the end of the situation | the quartile |"
    yield "|---|---|"
    for name, found in world.outcomes.items():
        if found.trial is not None:
            yield f"| {name} | {found.trial} |"


_PAGE = DOCS / "scoring.md"
_SERVERS_SHOWN, _DAYS_SHOWN = 10_000, 30


def fill(page: str, parts: Mapping[str, Iterable[str]]) -> str:
    """The page with its generated parts, each between two lines of its name; LookupError if it has no place for one."""
    for name, lines in parts.items():
        opening, closing = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
        if opening not in page or closing not in page:
            raise LookupError(f"{_PAGE.name} has no lines {opening.strip()} and {closing.strip()}")
        before, rest = page.split(opening, 1)
        after = rest.split(closing, 1)[1]
        page = before + opening + "".join(f"{line}\n" for line in lines) + closing + after
    return page


def rules_parts() -> dict[str, Iterable[str]]:
    """What of the page needs no world."""
    return {"times": course.table()}


def world_parts(world: World) -> dict[str, Iterable[str]]:
    """What of the page is a world's."""
    return {
        "situations": table(world),
        "always": always(world),
        "lies": lies_table(world.lies),
        "trial": trial(world),
    }


def rule_charts() -> dict[str, str]:
    """Charts by file name: a fault of six hours, and a link that flaps."""
    lasts, cut = timedelta(hours=18), ("in the answer from 10", CUTOFF)
    faults = {
        name: course.FAULTS[name]
        for name in ("clock 5 s off", "silence", "clock 1 s off", "clock 200 ms off")
    }

    def scores(name: str) -> list[tuple[float, float]]:
        until = timedelta(hours=course.FAULT_HOURS)
        found = follow(lambda since, _: faults[name] if since < until else FULL, lasts)
        return [(at, score) for at, score in found.scores if score is not None]

    def flaps(since: timedelta, _: int) -> ProbeResult:
        return SILENCE if since % timedelta(hours=3) >= timedelta(hours=2, minutes=42) else FULL

    flapping = {
        name: [
            (at, score)
            for at, score in follow(flaps, timedelta(hours=24), scorer=SCORERS[name]).scores
            if score is not None
        ]
        for name in ("median", "brisk")
    }
    return {
        "scoring-faults.svg": chart(
            "A fault of six hours, from full score",
            {name: scores(name) for name in faults},
            x=("hours", 0, 18),
            y=("score", -100, 20),
            marks=dict([cut]),
        ),
        "scoring-flapping.svg": chart(
            "Silent for 18 minutes every three hours",
            flapping,
            x=("hours", 0, 24),
            y=("score", -10, 20),
            marks={cut[0]: cut[1], "whole share from 15": FULL_SHARE},
        ),
    }


def world_charts(world: World) -> dict[str, str]:
    """Charts by file name: the month, and liars."""
    days = world.rounds / A_DAY
    count = len(world.servers)

    def parts(points: Sequence[tuple[int, int]]) -> list[tuple[float, float]]:
        return [(number / A_DAY, 100 * some / count) for number, some in points]

    return {
        "scoring-month.svg": chart(
            f"{count:,} servers over {days:.0f} days",
            {"in the answer": parts(world.listed), "without a verdict": parts(world.unknown)},
            x=("days", 0, days),
            y=("per cent of servers", 0, 100),
        ),
        "scoring-lies.svg": chart(
            "Servers that lying monitors bring down",
            {way: points for way, points in world.lies.items() if any(part for _, part in points)},
            x=("lying monitors of 40", 0, 20),
            y=("per cent of servers", 0, 100),
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.scoring_page", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--servers", type=int, default=_SERVERS_SHOWN)
    parser.add_argument("--days", type=int, default=_DAYS_SHOWN)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--docs", action="store_true", help="write the tables and charts of docs/")
    given = parser.parse_args()
    if not 100 <= given.servers <= 50_000 or not 1 <= given.days <= 60:
        parser.error("from 100 to 50,000 servers, from 1 to 60 days")
    world = World(given.servers, given.days, given.seed).run()
    parts = world_parts(world)
    if given.docs:
        _PAGE.write_text(fill(_PAGE.read_text(), rules_parts() | parts))
        for name, drawing in (rule_charts() | world_charts(world)).items():
            (DOCS / name).write_text(drawing)
        return 0
    for lines in parts.values():
        print("\n".join(lines), end="\n\n")
    print(json.dumps({"probes": world.probes, "verdicts": world.verdicts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
