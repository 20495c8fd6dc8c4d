"""`python -m bench.scoring`: what the pure rules of scores cost on one core.

Every server has two addresses, each with seven active monitors' views: all are judged anew, once by the ruling scorer and once
by another one, and both are compared. Beside it: the same views' plain medians, without any rule; the steps and scores of as
many probes as come in nine minutes; and a review of the monitors of some of the addresses, with 40 monitors to choose from.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from ipaddress import IPv4Address
from random import Random
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from lab.course import FULL, QUORUM, SILENCE, START, off
from poolsvc.scoring import MAX_SCORE, advance, step
from poolsvc.vantage import ACTIVE, POINTS, Candidate, Target, ViewRole, review
from poolsvc.verdicts import MEDIAN, QUARTILE, View, compare, overall

_T = TypeVar("_T")
_ADDRESSES = 2
_MONITORS = 40
_LIMIT = 10.0


def _timed(run: Callable[[], _T]) -> tuple[float, _T]:
    """Processor seconds, and what came of it."""
    before = time.process_time()
    found = run()
    return time.process_time() - before, found


def _views(servers: int, random: Random) -> list[list[View]]:
    """One in twenty views is of any score, the others are full."""
    return [
        [
            View(
                monitor,
                monitor,
                is_active=True,
                score=random.uniform(-100, 20) if random.random() < 0.05 else MAX_SCORE,
                full_probes=3,
                at=START - timedelta(seconds=random.uniform(0, 1100)),
            )
            for monitor in random.sample(range(_MONITORS), ACTIVE)
        ]
        for _ in range(servers * _ADDRESSES)
    ]


def _probe_all(count: int) -> float:
    results = (FULL, FULL, FULL, SILENCE, off(0.04))
    score = MAX_SCORE
    for number in range(count):
        score = advance(score, step(results[number % len(results)]))
    return score


def _review_all(count: int) -> int:
    """Of addresses that have their monitors; how many would change."""
    found = 0
    for number in range(count):
        address = IPv4Address((20 << 24) + (number << 8) + 1)
        candidates = [
            Candidate(
                monitor,
                monitor,
                addresses=(IPv4Address((10 << 24) + (monitor << 16) + 1),),
                network=64512 + monitor,
                role=ViewRole.ACTIVE if monitor < ACTIVE else ViewRole.CANDIDATE,
                points=POINTS,
                mean_delay_ns=1e7 + 1e6 * ((monitor * 7 + number) % _MONITORS),
            )
            for monitor in range(_MONITORS)
        ]
        found += any(choice.is_change for choice in review(Target(address, -1), candidates, START))
    return found


def measure(servers: int) -> dict[str, float]:
    """Seconds of one core by what was done, and how many servers or addresses that was."""
    views = _views(servers, Random(1))
    plain, _ = _timed(lambda: [statistics.median_low(one.score or 0 for one in those) for those in views])
    ruling, verdicts = _timed(lambda: [overall(those, QUORUM, START, MEDIAN) for those in views])
    other, trials = _timed(lambda: [overall(those, QUORUM, START, QUARTILE) for those in views])
    rows = [
        (f"s{number // _ADDRESSES}", one.score, trial.score)
        for number, (one, trial) in enumerate(zip(verdicts, trials, strict=True))
    ]
    comparing, difference = _timed(lambda: compare(rows))
    probes = servers * _ADDRESSES * ACTIVE
    probing, _ = _timed(lambda: _probe_all(probes))
    reviews = max(1, servers // 50)
    reviewing, _ = _timed(lambda: _review_all(reviews))
    return {
        "servers": servers,
        "addresses": len(views),
        "plain_median_s": plain,
        "rescoring_s": ruling,
        "shadow_s": other,
        "comparison_s": comparing,
        "would_drop": len(difference.dropped),
        "would_add": len(difference.added),
        "probes": probes,
        "probes_s": probing,
        "reviews": reviews,
        "reviews_s": reviewing,
        "review_all_every_20_minutes": reviewing / reviews * len(views) / 1200,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scoring", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--servers", type=int, default=100_000)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if not 1 <= given.servers <= 1_000_000:
        parser.error("from 1 to 1,000,000 servers")
    found = measure(given.servers)
    if given.json:
        print(json.dumps(found))
        return
    table = Table("what", "of", "seconds of one core", title=f"{given.servers:,} servers, two addresses each")
    table.add_row(
        "plain medians, no rule", f"{found['addresses']:,.0f} addresses", f"{found['plain_median_s']:.2f}"
    )
    table.add_row("rescoring", f"{found['addresses']:,.0f} addresses", f"{found['rescoring_s']:.2f}")
    table.add_row(
        "the same by a shadow scorer", f"{found['addresses']:,.0f} addresses", f"{found['shadow_s']:.2f}"
    )
    table.add_row("both compared", f"{found['addresses']:,.0f} addresses", f"{found['comparison_s']:.2f}")
    table.add_row("steps and scores", f"{found['probes']:,.0f} probes", f"{found['probes_s']:.2f}")
    table.add_row("reviews of monitors", f"{found['reviews']:,.0f} addresses", f"{found['reviews_s']:.2f}")
    Console().print(table)
    part = found["review_all_every_20_minutes"]
    Console().print(f"Reviewing every address each 20 minutes takes {part:.1%} of a core.")
    if given.servers >= 100_000 and found["rescoring_s"] > _LIMIT:
        raise SystemExit(f"error: rescoring took more than {_LIMIT:g} s")


if __name__ == "__main__":
    main()
