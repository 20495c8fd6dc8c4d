"""`python -m bench.flood`: the memory of each server while it is sent far more than it can answer, from many addresses.

A third of the flood is requests that deserve an answer, a third has cookies that nobody sealed, and a third is noise.
What an honest client has of a server meanwhile is told by `bench.quality`.
"""

import argparse
import asyncio
import json
import secrets
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from bench.contenders import ADDRESS, CHRONYD, NATIVE, PYTHON, Contest, TimeServer, contest, possible
from bench.load import LoadError
from bench.native import NativeLoad
from bench.ntp import nts_questions
from bench.processes import rss_mib
from lab.processes import LabError

SERVERS = (NATIVE, PYTHON, CHRONYD)
DEFAULT_SECONDS = 60.0
_MAX_SECONDS = 600.0
# More than any server answers.
_RATE = 800_000.0
_SOURCES = tuple(f"127.0.{number}.1" for number in range(1, 65))
# Whatever a server fetches once, it has by then.
_WARM_UP = 2.0
_LOOK = 0.25
_COOKIE = slice(48 + 36 + 4, 48 + 36 + 4 + 100)


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident MiB of all processes of a server: after some seconds of the flood, at most, and at its end."""

    early: float
    most: float
    late: float
    answered: int


def _of(server: TimeServer) -> float:
    return sum(map(rss_mib, server.pids()))


def _flood(server: TimeServer, running: Contest) -> NativeLoad:
    """In this order each batch has some of all kinds."""
    datagrams: list[bytes] = []
    for question in asyncio.run(nts_questions(server, running.trust)):
        forged = bytearray(question.datagram)
        forged[_COOKIE] = secrets.token_bytes(len(forged[_COOKIE]))
        datagrams += [question.datagram, bytes(forged), secrets.token_bytes(len(forged))]
    return NativeLoad(ADDRESS, server.ntp_port, datagrams, _SOURCES)


def measure(seconds: float) -> dict[str, Memory]:
    """Each server in turn, for so many seconds."""
    found: dict[str, Memory] = {}
    with contest(possible(*SERVERS)) as running, ThreadPoolExecutor(1) as flooding:
        for server in running.contenders:
            load = _flood(server, running)
            load.run(_WARM_UP, samples=0, rate=_RATE)
            sizes = [_of(server)]
            flood = flooding.submit(load.run, seconds, samples=0, rate=_RATE)
            while not flood.done():
                wait((flood,), _LOOK)
                sizes.append(_of(server))
            found[server.name] = Memory(sizes[0], max(sizes), sizes[-1], flood.result().answered)
    return found


def _show(found: dict[str, Memory]) -> None:
    table = Table(title="Memory in a flood, MiB", title_justify="left")
    for column in ("server", "at first", "at most", "at the end", "answers"):
        table.add_column(column, justify="left" if column == "server" else "right")
    for name, memory in found.items():
        sizes = (f"{size:.1f}" for size in (memory.early, memory.most, memory.late))
        table.add_row(name, *sizes, f"{memory.answered:,}")
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.flood", description="memory in a flood")
    parser.add_argument("--seconds", type=float, default=DEFAULT_SECONDS, help="of flood for each server")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    given = parser.parse_args()
    if not 0 < given.seconds <= _MAX_SECONDS:
        parser.error(f"at most {_MAX_SECONDS:g} seconds")
    try:
        found = measure(given.seconds)
    except (LabError, LoadError) as error:
        print(f"bench failed: {error}", file=sys.stderr)
        return 1
    if given.json:
        print(json.dumps({name: asdict(memory) for name, memory in found.items()}))
    else:
        _show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
