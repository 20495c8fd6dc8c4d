"""`python -m bench.quality`: the time that a chronyd client gets of a server that is idle, loaded or flooded, beside chronyd.

Each server has a client of its own, a chronyd that asks it 64 times a second by NTS and corrects no clock (-x,
noselect). All have this host's clock, so that the true offset is nought. `chronyc ntpdata` tells of each answer its
offset, its delay and how long the server had the request. The client takes the kernel's times of sending and receiving,
so that it does not matter when a busy machine lets it run. Where there are several cores, servers have one that nobody
else is put on: a load that shares it would interrupt the server that leaves it more room.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import command
from bench.contenders import ADDRESS, CHRONYD, NATIVE, PYTHON, TimeServer, contest, possible
from bench.load import LoadError
from bench.native import NativeLoad
from bench.ntp import nts_questions
from lab.peers import Chronyd
from lab.processes import wait_until

# What is asked beside the client: nothing, half of what the slower server can answer, or twice of what the one that is
# asked can.
IDLE, LOADED, FLOODED = CONDITIONS = ("idle", "loaded", "flooded")
DEFAULT_SECONDS = 60.0
DEFAULT_ROUNDS = 3
_MAX_SECONDS = 600.0
_CLIENT = """\
server {address} port {server.ntp_port} nts ntsport {server.ke_port} iburst minpoll -6 maxpoll -6 noselect
nosystemcert
ntstrustedcerts {root}
port 0
"""
# Columns of `chronyc -c ntpdata`: seconds, and counts of packets.
_OFFSET, _DELAY, _RESPONSE, _SENT, _VALID = 18, 19, 21, 30, 32
# An answer comes every 16 ms.
_LOOK = 4e-3
_SETTLED = 100
_FEWEST = 10
_SATURATED = 1.0


@dataclass(frozen=True, slots=True)
class Figure:
    """Of many values in microseconds: the median, and what one in a hundred is above."""

    median: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Figure | None":
        """None of too few to say anything."""
        if len(seconds) < _FEWEST:
            return None
        values = [value * 1e6 for value in seconds]
        return cls(statistics.median(values), statistics.quantiles(values, n=100)[98])


@dataclass(slots=True)
class Seen:
    """What a client has seen of one server in one condition, in seconds."""

    sent: int = 0
    valid: int = 0
    offsets: list[float] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    responses: list[float] = field(default_factory=list)

    @property
    def lost(self) -> float:
        """The share of requests that nothing valid came back to."""
        return max(0.0, 1 - self.valid / max(self.sent, 1))

    def figures(self) -> dict[str, Figure | None]:
        return {
            "offset": Figure.of([*map(abs, self.offsets)]),
            "response": Figure.of(self.responses),
            "delay": Figure.of(self.delays),
        }


class Client:
    """A chronyd that asks one server, and the `chronyc` that asks it."""

    def __init__(self, directory: Path, server: TimeServer, root: Path) -> None:
        self._directory = directory
        self._chronyd = Chronyd(directory, _CLIENT.format(address=ADDRESS, server=server, root=root))
        self._chronyc: subprocess.Popen[str]

    @contextmanager
    def running(self) -> Iterator["Client"]:
        self._chronyd.put_chronyc(self._directory)
        with (
            self._chronyd,
            subprocess.Popen(
                [self._directory / "chronyc", "-n", "-c"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            ) as self._chronyc,
        ):
            wait_until(lambda: int(self._data()[_VALID]) >= _SETTLED, "answers to the client")
            yield self

    def _data(self) -> list[str]:
        """Of the last answer."""
        assert self._chronyc.stdin is not None
        assert self._chronyc.stdout is not None
        print("ntpdata", file=self._chronyc.stdin, flush=True)
        return self._chronyc.stdout.readline().split(",")

    def watch(self, seconds: float, seen: Seen) -> None:
        """Note what comes within so many seconds."""
        before = last = self._data()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(_LOOK)
            data = self._data()
            if data[_VALID] != last[_VALID]:
                seen.offsets.append(float(data[_OFFSET]))
                seen.delays.append(float(data[_DELAY]))
                seen.responses.append(float(data[_RESPONSE]))
            last = data
        seen.sent += int(last[_SENT]) - int(before[_SENT])
        seen.valid += int(last[_VALID]) - int(before[_VALID])


def _give_a_core(servers: Sequence[TimeServer]) -> None:
    """To these servers the last one, and to this process and what it starts from now on the others, if there are any."""
    *others, last = sorted(os.sched_getaffinity(0))
    if others:
        for server in servers:
            for pid in server.pids():
                _confine(pid, {last})
        _confine(os.getpid(), set(others))


def _confine(pid: int, cores: set[int]) -> None:
    """All threads of a process, and those that they start from now on."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), cores)


def measure(seconds: float, rounds: int) -> dict[str, dict[str, Seen]]:
    """By condition and server, which take turns; `seconds` of watching in all."""
    with (
        contest((*(possible(NATIVE) or (PYTHON,)), CHRONYD)) as running,
        tempfile.TemporaryDirectory(prefix="truechimer-bench-") as scratch,
        ExitStack() as stack,
        ThreadPoolExecutor(1) as loading,
    ):
        _give_a_core(running.contenders)
        clients: dict[str, Client] = {}
        loads: dict[str, NativeLoad] = {}
        rates: dict[str, float] = {}
        for number, server in enumerate(running.contenders):
            client = Client(Path(scratch) / str(number), server, running.root)
            clients[server.name] = stack.enter_context(client.running())
            questions = asyncio.run(nts_questions(server, running.trust))
            datagrams = [question.datagram for question in questions]
            loads[server.name] = load = NativeLoad(ADDRESS, server.ntp_port, datagrams, server.sources)
            burst = load.run(_SATURATED, samples=0)
            rates[server.name] = burst.answered / burst.seconds
        length = seconds / (rounds * len(CONDITIONS) * len(clients))
        found = {condition: {name: Seen() for name in clients} for condition in CONDITIONS}
        for _ in range(rounds):
            for condition in CONDITIONS:
                for name, client in clients.items():
                    rate = {LOADED: min(rates.values()) / 2, FLOODED: rates[name] * 2}.get(condition)
                    flood = rate and loading.submit(loads[name].run, length, samples=0, rate=rate)
                    client.watch(length, found[condition][name])
                    if flood:
                        flood.result()
        return found


def _document(found: dict[str, dict[str, Seen]]) -> dict[str, object]:
    return {
        condition: {
            name: {
                "answers": len(seen.offsets),
                "lost": seen.lost,
                **{key: figure and asdict(figure) for key, figure in seen.figures().items()},
            }
            for name, seen in of_servers.items()
        }
        for condition, of_servers in found.items()
    }


def _show(found: dict[str, dict[str, Seen]]) -> None:
    table = Table(title="As a chronyd client sees it: median / p99, µs", title_justify="left")
    for column in ("", "server", "answers seen", "lost, %", "|offset|", "time in the server", "delay"):
        table.add_column(column, justify="left" if column in ("", "server") else "right")
    for condition, of_servers in found.items():
        for name, seen in of_servers.items():
            figures = [
                f"{each.median:.1f} / {each.p99:.1f}" if each else "" for each in seen.figures().values()
            ]
            table.add_row(condition, name, str(len(seen.offsets)), f"{seen.lost:.1%}"[:-1], *figures)
    Console(width=120).print(table)


def main() -> int:
    parser = command.parser("quality", "the quality of the time")
    parser.add_argument("--seconds", type=float, default=DEFAULT_SECONDS, help="of watching in all")
    parser.add_argument("--rounds", type=int, default=DEFAULT_ROUNDS, help="turns of each server")
    given = command.parse(parser)
    if not (0 < given.seconds <= _MAX_SECONDS and 1 <= given.rounds <= given.seconds):
        parser.error(f"at most {_MAX_SECONDS:g} seconds, and one at least for each round")
    with command.failing(LoadError):
        found = measure(given.seconds, given.rounds)
    if given.json:
        print(json.dumps(_document(found)))
    else:
        _show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
