"""`python -m bench.drawing`: how long a draw of answer sets takes, and how load spreads over members with so many of them.

A draw is that of the pool's name and 250 countries. Load is simulated: resolvers of Zipf's sizes that keep an answer for a TTL of
a minute, whose clients each use four of its eight servers, for an hour. Members have weights from 1 to 10. A minute is one of a
member, a share that of the clients of an hour over that of the weights.
"""

import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import command
from poolsvc.drawing import Candidate, Draw, Rules, sets_for
from poolsvc.regions import CONTINENT_OF, WORLD, regions_of

_RULES = Rules(8)
_NOW = datetime(2026, 1, 1, tzinfo=UTC)
_MINUTES, _USED = 60, 4
_RESOLVERS, _LOOKUPS = 20_000, 1_000_000  # of an hour
_VARIANTS = (1, 16, 64, 256, 1_024)
_SMALL = (8, 16, 32, 64, 128, 256, 512, 1_024)
_MAX_SERVERS = 200_000


def _zipf(count: int) -> list[float]:
    return list(accumulate(1 / rank for rank in range(1, count + 1)))


def crowd(count: int, seed: int = 1) -> list[Candidate]:
    """Servers as a large pool has them: members with one to twenty, a few large networks, one in ten of a young account."""
    rng, countries = random.Random(seed), sorted(CONTINENT_OF)
    rng.shuffle(countries)
    everywhere, networks = _zipf(len(countries)), _zipf(3_000)
    members = [member for member in range(count) for _ in range(min(20, int(rng.paretovariate(1.3))))][:count]
    return [
        Candidate(
            f"m{number}",
            member,
            rng.randint(10, 100),
            networks=(rng.choices(range(3_000), cum_weights=networks)[0],),
            prefixes=(f"{rng.randrange(count)}",),
            regions=regions_of([rng.choices(countries, cum_weights=everywhere)[0].upper()]),
            since=_NOW - timedelta(days=10 if member % 10 == 0 else 400),
        )
        for number, member in enumerate(members)
    ]


def draw_all(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """One draw of the pool's name and all countries, and then that without one server."""
    began = time.process_time()
    draw = Draw(candidates, CONTINENT_OF, _RULES, 1, _NOW)
    sets = draw.sets()
    whole = time.process_time() - began
    gone = candidates[0].name
    began = time.process_time()
    without = Draw([one for one in candidates if one.name != gone], CONTINENT_OF, _RULES, 1, _NOW).again(
        sets, [gone]
    )
    assert not any(gone in names for some in without.values() for names in some)
    return {
        "servers": len(candidates),
        "regions": len(CONTINENT_OF),
        "sets": sum(map(len, sets.values())),
        "sets_of_the_pool": len(sets[WORLD]),
        "thin_regions": sum(map(draw.is_thin, CONTINENT_OF)),
        "draw_s": round(whole, 2),
        "again_s": round(time.process_time() - began, 2),
    }


def spread(candidates: Sequence[Candidate], variants: int, lookups: int, seed: int = 1) -> dict[str, Any]:
    """An hour of `lookups` clients, with so many sets drawn anew each minute."""
    rng, resolvers = random.Random(seed), _zipf(_RESOLVERS)
    busiest, hour = 0, Counter[str]()
    idle = 0  # minutes of members in which nobody came
    for minute in range(_MINUTES):
        draw = Draw(candidates, (), _RULES, minute, _NOW)
        sets = [draw.set_at(WORLD, index) for index in range(variants)]
        came = Counter[str]()
        asking = Counter(rng.choices(range(_RESOLVERS), cum_weights=resolvers, k=lookups // _MINUTES))
        for clients in asking.values():
            names = rng.choice(sets)
            for _ in range(clients):
                came.update(rng.sample(names, min(_USED, len(names))))
        busiest = max(busiest, *came.values())
        idle += len(candidates) - len(came)
        hour += came
    weight = sum(one.weight for one in candidates)
    shares = sorted(hour[one.name] * weight / (one.weight * hour.total()) for one in candidates)
    return {
        "servers": len(candidates),
        "sets": variants,
        "mean_minute": round(hour.total() / _MINUTES / len(candidates), 1),
        "busiest_minute": busiest,
        "unused_percent": round(100 * (1 - len(hour) / len(candidates)), 1),
        "idle_minutes_percent": round(100 * idle / _MINUTES / len(candidates), 1),
        "share_p5": round(shares[len(shares) // 20], 2),
        "share_median": round(statistics.median(shares), 2),
        "share_p95": round(shares[-1 - len(shares) // 20], 2),
    }


def plain(count: int, seed: int = 1) -> list[Candidate]:
    """Members with one server each, that nothing but their weights tells apart."""
    rng = random.Random(seed)
    return [Candidate(f"m{number}", number, rng.randint(1, 10)) for number in range(count)]


def measure(servers: int) -> dict[str, list[dict[str, Any]]]:
    """The draw, the spread of a pool of this size by number of sets, and that of small pools with one set a name."""
    candidates = plain(servers)
    return {
        "draw": [draw_all(crowd(servers))],
        "spread": [spread(candidates, variants, _LOOKUPS) for variants in _VARIANTS],
        # As many clients a member as in the large pool.
        "one_set": [spread(plain(size), 1, _LOOKUPS * size // 10_000) for size in _SMALL],
        "several_sets": [
            spread(plain(size), sets_for(size, _RULES.places), _LOOKUPS * size // 10_000)
            for size in _SMALL[1:]
        ],
    }


def _show(title: str, results: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title=title, title_justify="left")
    for name in results[0]:
        table.add_column(name, justify="right")
    for result in results:
        table.add_row(*(f"{value:,}" for value in result.values()))
    Console(width=160).print(table)


def main() -> int:
    parser = command.parser("drawing", __doc__)
    parser.add_argument("--servers", type=int, default=10_000)
    parser.add_argument(
        "--draw-only", action="store_true", help="without the simulations, which take minutes"
    )
    options = command.parse(parser)
    if not 100 <= options.servers <= _MAX_SERVERS:
        parser.error(f"100 to {_MAX_SERVERS} servers")
    results = {"draw": [draw_all(crowd(options.servers))]} if options.draw_only else measure(options.servers)
    if options.json:
        print(json.dumps({"bench": "drawing", "results": results}, indent=1))
    else:
        for title, some in results.items():
            _show(title, some)
    return 0


if __name__ == "__main__":
    sys.exit(main())
