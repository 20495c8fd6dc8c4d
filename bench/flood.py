"""`python -m bench.flood`: the memory of each server while it is sent far more than it can answer, from many addresses.

A third of the flood of NTP is requests that deserve an answer, a third has cookies that nobody sealed, and a third is
noise. What an honest client has of a server meanwhile is told by `bench.quality`. NTS-KE is beset by the clients of
`bench.hostile`, while an honest one establishes keys all the time.
"""

import asyncio
import json
import secrets
import sys
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from multiprocessing import get_context

from rich.console import Console
from rich.table import Table

from bench import command, hostile
from bench.contenders import ADDRESS, AEAD, CHRONYD, NATIVE, PYTHON, Contest, TimeServer, contest, possible
from bench.load import LoadError
from bench.native import NativeLoad
from bench.ntp import nts_questions
from bench.processes import rss_mib
from bench.quality import Figure
from nts_core.client import ClientError, establish
from nts_core.tls import Trust

SERVERS = (NATIVE, PYTHON, CHRONYD)
DEFAULT_SECONDS = 60.0
_MAX_SECONDS = 600.0
# More than any server answers.
_RATE = 800_000.0
_SOURCES = tuple(f"127.0.{number}.1" for number in range(1, 65))
# Whatever a server fetches once, it has by then; and whatever it keeps for the slowest of the hostile clients.
_WARM_UP, _KE_WARM_UP = 2.0, hostile.PATIENCE
_LOOK = 0.25
_COOKIE = slice(48 + 36 + 4, 48 + 36 + 4 + 100)
# How long the honest client is watched at most before the hostile ones come, and its wait between key establishments.
_CALM = 5.0
_PAUSE = 0.02


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident MiB of all processes of a server: once the flood is settled, at most from then on, and at its end."""

    early: float
    most: float
    late: float

    @classmethod
    def of(cls, sizes: list[float]) -> "Memory":
        return cls(sizes[0], max(sizes), sizes[-1])


@dataclass(frozen=True, slots=True)
class NtpFlood:
    memory: Memory
    answered: int


@dataclass(frozen=True, slots=True)
class Honest:
    """What an honest client gets: key establishments, those that failed, and what the others take."""

    established: int
    failed: int
    took: Figure | None


@dataclass(frozen=True, slots=True)
class KeFlood:
    """`connections` are those of the hostile clients, by their kind."""

    memory: Memory
    connections: dict[str, int]
    calm: Honest
    beset: Honest


def _of(server: TimeServer) -> float:
    return sum(map(rss_mib, server.pids()))


def _flood(server: TimeServer, trust: Trust) -> NativeLoad:
    """In this order each batch has some of all kinds."""
    datagrams: list[bytes] = []
    for question in asyncio.run(nts_questions(server, trust)):
        forged = bytearray(question.datagram)
        forged[_COOKIE] = secrets.token_bytes(len(forged[_COOKIE]))
        datagrams += [question.datagram, bytes(forged), secrets.token_bytes(len(forged))]
    return NativeLoad(ADDRESS, server.ntp_port, datagrams, _SOURCES)


def _ntp(server: TimeServer, running: Contest, seconds: float) -> NtpFlood:
    load = _flood(server, running.trust)
    load.run(_WARM_UP, samples=0, rate=_RATE)
    sizes = [_of(server)]
    with ThreadPoolExecutor(1) as flooding:
        flood = flooding.submit(load.run, seconds, samples=0, rate=_RATE)
        while not flood.done():
            wait((flood,), _LOOK)
            sizes.append(_of(server))
    return NtpFlood(Memory.of(sizes), flood.result().answered)


async def _honest(server: TimeServer, trust: Trust, seconds: float) -> Honest:
    """One key establishment after the other."""
    took: list[float] = []
    failed = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            established = await establish(ADDRESS, ADDRESS, server.ke_port, trust, offered=(AEAD,))
            took.append(established.took / 1e9)
        except ClientError:
            failed += 1
        await asyncio.sleep(_PAUSE)
    return Honest(len(took), failed, Figure.of(took))


async def _ke(server: TimeServer, running: Contest, seconds: float, besetting: Executor) -> KeFlood:
    calm = await _honest(server, running.trust, min(seconds, _CALM))
    place = (ADDRESS, server.ke_port)
    flood = asyncio.get_running_loop().run_in_executor(
        besetting, hostile.attack, place, running.root, _KE_WARM_UP + seconds
    )
    await asyncio.sleep(_KE_WARM_UP)
    sizes = [_of(server)]
    async with asyncio.TaskGroup() as group:
        asking = group.create_task(_honest(server, running.trust, seconds))
        while not flood.done():
            await asyncio.wait((flood,), timeout=_LOOK)
            sizes.append(_of(server))
    return KeFlood(Memory.of(sizes), await flood, calm, asking.result())


def floods_of_ntp(seconds: float) -> dict[str, NtpFlood]:
    """Each server in turn, for so many seconds."""
    with contest(possible(*SERVERS)) as running:
        return {server.name: _ntp(server, running, seconds) for server in running.contenders}


def floods_of_ke(seconds: float) -> dict[str, KeFlood]:
    """The same of servers that nobody has asked yet."""
    with (
        contest(possible(*SERVERS)) as running,
        ProcessPoolExecutor(1, get_context("spawn")) as besetting,
    ):
        return {
            server.name: asyncio.run(_ke(server, running, seconds, besetting))
            for server in running.contenders
        }


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("server", "at first", "at most", "at the end", *columns):
        table.add_column(column, justify="left" if column == "server" else "right")
    return table


def _sizes(memory: Memory) -> list[str]:
    return [f"{size:.1f}" for size in (memory.early, memory.most, memory.late)]


def _told(honest: Honest) -> list[str]:
    took = honest.took
    times = f"{took.median / 1e3:.1f} / {took.p99 / 1e3:.1f}" if took else ""
    return [f"{honest.established:,} / {honest.failed:,}", times]


def _show(ntp: dict[str, NtpFlood], ke: dict[str, KeFlood]) -> None:
    of_ntp = _table("NTP: memory in a flood, MiB", "answers")
    for name, flood in ntp.items():
        of_ntp.add_row(name, *_sizes(flood.memory), f"{flood.answered:,}")
    of_ke = _table(
        "NTS-KE: memory beside hostile clients, MiB; key establishments of an honest client: done / failed, and how"
        " long those that are done took: median / p99, ms",
        "hostile connections",
        *("calm", "calm, ms", "beset", "beset, ms"),
    )
    for name, beset in ke.items():
        connections = f"{sum(beset.connections.values()):,}"
        of_ke.add_row(name, *_sizes(beset.memory), connections, *_told(beset.calm), *_told(beset.beset))
    console = Console(width=120)
    console.print(of_ntp)
    console.print(of_ke)


def main() -> int:
    parser = command.parser("flood", "memory in a flood")
    parser.add_argument(
        "--seconds", type=float, default=DEFAULT_SECONDS, help="of flood for each server and protocol"
    )
    given = command.parse(parser)
    if not 0 < given.seconds <= _MAX_SECONDS:
        parser.error(f"at most {_MAX_SECONDS:g} seconds")
    with command.failing(LoadError):
        ntp, ke = floods_of_ntp(given.seconds), floods_of_ke(given.seconds)
    if given.json:
        found = {
            "ntp": {name: asdict(flood) for name, flood in ntp.items()},
            "ke": {name: asdict(flood) for name, flood in ke.items()},
        }
        print(json.dumps(found))
    else:
        _show(ntp, ke)
    return 0


if __name__ == "__main__":
    sys.exit(main())
