"""`python -m bench.sets`: answer sets that are drawn anew, from the leader to the embedded server and to a Knot edge.

A draw of so many sets of eight for the pool's name, and of 16 for each of 250 regions, is sent, signed and put in place, again
and again, each time with other sets. Then a Knot edge fetches it, signs it itself and answers from it.
"""

import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import command
from bench.dns import POLICY, publisher_of, start_edge
from bench.processes import cpu_s, rss_mib
from lab.embedded import Embedded
from lab.knot import KnotEdge
from lab.processes import LabError
from lab.programs import poolsvc
from lab.zones import wanted
from poolsvc.primary import PublishError
from poolsvc.publisher import Publisher
from poolsvc.subsets import Sink
from poolsvc.zone import Key, RRset, ServerRecords, diff

_REGIONS, _OF_A_REGION, _TARGETS = 250, 16, 8
_OWNERS = tuple(f"_ntske._tcp.r{number}.pool.example." for number in range(_REGIONS))
_WORLDS = (256, 8192)
_MAX_SERVERS, _MAX_DRAWS = 100_000, 100
_EPOCH = 1


def _sets(names: Sequence[str], world: int, seed: int) -> Mapping[str, list[list[str]]]:
    """Any targets: how they are drawn is measured by `bench.drawing`."""
    chosen = random.Random(seed)

    def some(count: int) -> list[list[str]]:
        return [chosen.sample(names, _TARGETS) for _ in range(count)]

    return {POLICY.service: some(world)} | {owner: some(_OF_A_REGION) for owner in _OWNERS}


async def _fill(publisher: Publisher, names: Sequence[str]) -> None:
    servers = [
        ServerRecords(
            name, number, (f"198.{18 + number // 65_536}.{number // 256 % 256}.{number % 256}",), listed=True
        )
        for number, name in enumerate(names)
    ]
    await publisher.take_fence(_EPOCH)
    zone = wanted(servers, POLICY, is_open=True, draw=1)
    service: dict[Key, RRset] = {(owner, "SRV"): zone[POLICY.service, "SRV"] for owner in _OWNERS}
    await publisher.apply(diff(zone | service, {}), _EPOCH)


class Bench:
    def __init__(self, primary: Embedded, edge: KnotEdge, names: Sequence[str]) -> None:
        self._primary = primary
        self._edge = edge
        self._names = names
        self._sink = Sink(publisher_of(primary))
        self._draw = 0

    def measure(self, world: int, draws: int) -> dict[str, Any]:
        """The median of all draws; memory after the last."""
        turns = [self._turn(world) for _ in range(draws)]
        figures: dict[str, Any] = {"sets": world + _REGIONS * _OF_A_REGION}
        figures |= {name: round(statistics.median(turn[name] for turn in turns), 3) for name in turns[0]}
        figures |= {"embedded_rss_mib": rss_mib(self._primary.pid), "edge_rss_mib": rss_mib(self._edge.pid)}
        return figures

    def _turn(self, world: int) -> dict[str, float]:
        self._draw += 1
        sets = _sets(self._names, world, self._draw)
        began, ours, its = time.monotonic(), time.process_time(), cpu_s(self._primary.pid)
        asyncio.run(self._sink.publish(sets, self._draw, _EPOCH))
        figures = {
            "published_s": time.monotonic() - began,
            "leader_cpu_s": time.process_time() - ours,
            "embedded_cpu_s": cpu_s(self._primary.pid) - its,
        }
        began, its = time.monotonic(), cpu_s(self._edge.pid)
        done = poolsvc(self._edge.settings, "dns", "edge", "--once")
        if done.status:
            raise LabError(done.stderr)
        return figures | {
            "edge_s": time.monotonic() - began,
            "edge_knotd_cpu_s": cpu_s(self._edge.pid) - its,
        }


def measure(servers: int, draws: int) -> list[dict[str, Any]]:
    names = [f"m{number}" for number in range(servers)]
    with tempfile.TemporaryDirectory(prefix="truechimer-bench-") as name, ExitStack() as stack:
        directory = Path(name)
        primary = Embedded(directory / "embedded", ttl=60, soa_minimum=60)
        edge = KnotEdge(directory / "edge", primary)
        stack.enter_context(primary)
        asyncio.run(_fill(publisher_of(primary), names))
        stack.callback(edge.stop)
        before = rss_mib(primary.pid)
        start_edge(edge, primary)
        bench = Bench(primary, edge, names)
        return [
            {"servers": servers, "embedded_rss_before_mib": before, **bench.measure(world, draws)}
            for world in _WORLDS
        ]


def _show(results: Sequence[Mapping[str, Any]]) -> None:
    table = Table("figure", title="a draw of answer sets", title_justify="left")
    for result in results:
        table.add_column(f"{result['sets']:,} sets", justify="right")
    for figure in results[0]:
        table.add_row(figure, *(f"{result[figure]:,.2f}".removesuffix(".00") for result in results))
    Console(width=110).print(table)


def main() -> int:
    parser = command.parser("sets", __doc__)
    parser.add_argument("--servers", type=int, default=10_000)
    parser.add_argument("--draws", type=int, default=5, help="one after the other")
    options = command.parse(parser)
    if not (_TARGETS <= options.servers <= _MAX_SERVERS and 1 <= options.draws <= _MAX_DRAWS):
        parser.error(f"{_TARGETS} to {_MAX_SERVERS} servers and 1 to {_MAX_DRAWS} draws")
    with command.failing(PublishError, OSError):
        results = measure(options.servers, options.draws)
    if options.json:
        print(json.dumps({"bench": "sets", "results": results}, indent=1))
    else:
        _show(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
