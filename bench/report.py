"""Rounds in which both servers take turns, what they come to, and the command line of both benches."""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from bench.contenders import Contender
from bench.load import LoadError
from lab.processes import LabError
from nts_core.client import ClientError
from nts_core.errors import NtsError

_C = TypeVar("_C", bound=Contender)
DEFAULT_SECONDS = 20.0
DEFAULT_ROUNDS = 5
_MAX_SECONDS = 600.0
_MAX_ROUNDS = 100


@dataclass(frozen=True, slots=True)
class Turn:
    """One server's part of a round; `checked` answers were found authentic, `cpu_ns` is the server's."""

    answered: int
    lost: int
    checked: int
    seconds: float
    cpu_ns: int

    @property
    def rate(self) -> float:
        """Answers a second of time that passed."""
        return self.answered / self.seconds

    @property
    def cpu_us(self) -> float:
        """The server's processor time an answer, in microseconds."""
        return self.cpu_ns / 1000 / self.answered

    @property
    def busy(self) -> float:
        """The share of one core that the server took."""
        return self.cpu_ns / 1e9 / self.seconds


@dataclass(frozen=True, slots=True)
class Spread:
    """One figure over all rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def render(self, digits: int) -> str:
        return f"{self.median:,.{digits}f} ({self.min:,.{digits}f} - {self.max:,.{digits}f})"


@dataclass(frozen=True, slots=True)
class Comparison:
    """All turns of both servers, by their names, ours first, in the order of the rounds."""

    turns: dict[str, tuple[Turn, ...]]

    @classmethod
    def run(cls, contenders: Sequence[_C], rounds: int, turn: Callable[[_C], Turn]) -> "Comparison":
        """Take turns, so that what else the machine does meets both alike."""
        taken: dict[str, list[Turn]] = {contender.name: [] for contender in contenders}
        for _ in range(rounds):
            for contender in contenders:
                taken[contender.name].append(turn(contender))
        return cls({name: tuple(turns) for name, turns in taken.items()})

    @property
    def ratio(self) -> Spread:
        """Our answers a second of server processor time over the other's, round by round."""
        return Spread.of(
            [theirs.cpu_us / ours.cpu_us for ours, theirs in zip(*self.turns.values(), strict=True)]
        )

    @property
    def rate_ratio(self) -> Spread:
        """The same of the time that passed."""
        return Spread.of([ours.rate / theirs.rate for ours, theirs in zip(*self.turns.values(), strict=True)])

    def document(self) -> dict[str, Any]:
        """The JSON form: totals, and every figure as its median and its range over the rounds."""
        servers = {
            name: {
                "rate": asdict(Spread.of([turn.rate for turn in turns])),
                "cpu_us": asdict(Spread.of([turn.cpu_us for turn in turns])),
                "busy": asdict(Spread.of([turn.busy for turn in turns])),
                **{
                    total: sum(getattr(turn, total) for turn in turns)
                    for total in ("answered", "lost", "checked")
                },
            }
            for name, turns in self.turns.items()
        }
        return {
            "servers": servers,
            "ratio": asdict(self.ratio),
            "rate_ratio": asdict(self.rate_ratio),
        }

    def show(self, title: str, unit: str) -> None:
        """The same for people; `unit` is what an answer is."""
        table = Table(title=title, title_justify="left")
        for column in ("server", f"{unit}/s", f"server CPU per {unit}, µs", "cores busy", "lost", "checked"):
            table.add_column(column, justify="left" if column == "server" else "right")
        for name, turns in self.turns.items():
            table.add_row(
                name,
                Spread.of([turn.rate for turn in turns]).render(0),
                Spread.of([turn.cpu_us for turn in turns]).render(1),
                Spread.of([turn.busy for turn in turns]).render(2),
                str(sum(turn.lost for turn in turns)),
                str(sum(turn.checked for turn in turns)),
            )
        console = Console(width=130)
        console.print(table)
        ours, theirs = self.turns
        inverse = 1 / self.ratio.median
        console.print(
            f"{ours} over {theirs}, {unit}s a server CPU second: {self.ratio.render(3)}, 1/{inverse:.1f}"
        )
        console.print(f"{ours} over {theirs}, {unit}s a second: {self.rate_ratio.render(3)}\n")


def main(
    name: str,
    description: str,
    measure: Callable[[float, int], dict[str, Comparison]],
    titles: Mapping[str, tuple[str, str]],
) -> int:
    """Run `measure(seconds, rounds)` as a program; `titles` gives a heading and a unit for each comparison."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description)
    parser.add_argument("--seconds", type=float, default=DEFAULT_SECONDS, help="seconds of load in all")
    parser.add_argument("--rounds", type=int, default=DEFAULT_ROUNDS, help="turns of each server")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args()
    if not (0 < arguments.seconds <= _MAX_SECONDS and 1 <= arguments.rounds <= _MAX_ROUNDS):
        parser.error(f"at most {_MAX_SECONDS:g} seconds and {_MAX_ROUNDS} rounds, and some of either")
    try:
        results = measure(arguments.seconds, arguments.rounds)
    except (LabError, LoadError, ClientError, NtsError) as error:
        print(f"bench failed: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        documents = {kind: result.document() for kind, result in results.items()}
        print(json.dumps({"bench": name, "rounds": arguments.rounds, "results": documents}, indent=1))
    else:
        for kind, result in results.items():
            result.show(*titles[kind])
    return 0
