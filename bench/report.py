"""Rounds in which servers take turns, what they come to, and the command line of the benches that compare them."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from bench import command
from bench.contenders import Contender
from bench.load import LoadError
from nts_core.client import ClientError
from nts_core.errors import NtsError

_C = TypeVar("_C", bound=Contender)
DEFAULT_SECONDS = 20.0
DEFAULT_ROUNDS = 5
_MAX_SECONDS = 600.0
_MAX_ROUNDS = 100


@dataclass(frozen=True, slots=True)
class Turn:
    """One server's part of a round; `checked` answers were found authentic.

    `cpu_ns` is the server's, `client_ns` that of the client, 0 where it is not known: near `seconds`, it is the client
    that limits the rate.
    """

    answered: int
    lost: int
    checked: int
    seconds: float
    cpu_ns: int
    client_ns: int = 0

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

    @property
    def client_busy(self) -> float:
        """The same of the client."""
        return self.client_ns / 1e9 / self.seconds


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
class Goal:
    """One server's answers a second of its processor time over another's, and how much is asked for, if anything."""

    ours: str
    theirs: str
    at_least: float | None = None

    def verdict(self, ratio: float) -> str:
        if self.at_least is None:
            return ""
        return f", {self.at_least:.3g} is asked for: {'met' if ratio >= self.at_least else 'MISSED'}"


# Of one turn: its heading (with the unit for {}), digits, and the figure.
_FIGURES: dict[str, tuple[str, int, Callable[[Turn], float]]] = {
    "rate": ("{}/s", 0, lambda turn: turn.rate),
    "cpu_us": ("server CPU per {}, µs", 2, lambda turn: turn.cpu_us),
    "busy": ("cores busy", 2, lambda turn: turn.busy),
    "client_busy": ("client busy", 2, lambda turn: turn.client_busy),
}
_TOTALS = ("answered", "lost", "checked")


@dataclass(frozen=True, slots=True)
class Comparison:
    """All turns of the servers, by their names, in the order of the rounds, and what they are held against."""

    turns: dict[str, tuple[Turn, ...]]
    goals: tuple[Goal, ...]

    @classmethod
    def run(
        cls, contenders: Sequence[_C], rounds: int, turn: Callable[[_C], Turn], goals: Sequence[Goal]
    ) -> "Comparison":
        """Take turns, so that what else the machine does meets all alike. Goals of servers that are missing are left out.

        Raises LoadError when one has answered nothing in its turn.
        """
        taken: dict[str, list[Turn]] = {contender.name: [] for contender in contenders}
        for _ in range(rounds):
            for contender in contenders:
                done = turn(contender)
                if not done.answered:
                    raise LoadError(
                        f"{contender.name} answered nothing in {done.seconds:.1f} s: more --seconds"
                    )
                taken[contender.name].append(done)
        return cls(
            {name: tuple(turns) for name, turns in taken.items()},
            tuple(goal for goal in goals if {goal.ours, goal.theirs} <= taken.keys()),
        )

    def ratio(self, goal: Goal) -> Spread:
        """Answers a second of server processor time, round by round."""
        return self._ratio(goal, lambda turn: 1 / turn.cpu_us)

    def rate_ratio(self, goal: Goal) -> Spread:
        """The same of the time that passed."""
        return self._ratio(goal, lambda turn: turn.rate)

    def _ratio(self, goal: Goal, figure: Callable[[Turn], float]) -> Spread:
        pairs = zip(self.turns[goal.ours], self.turns[goal.theirs], strict=True)
        return Spread.of([figure(ours) / figure(theirs) for ours, theirs in pairs])

    def document(self) -> dict[str, Any]:
        """For machines."""
        return {
            "servers": {
                name: {
                    **{key: asdict(Spread.of([*map(of, turns)])) for key, (_, _, of) in _FIGURES.items()},
                    **{total: sum(getattr(turn, total) for turn in turns) for total in _TOTALS},
                }
                for name, turns in self.turns.items()
            },
            "ratios": [
                {
                    **asdict(goal),
                    "ratio": asdict(self.ratio(goal)),
                    "rate_ratio": asdict(self.rate_ratio(goal)),
                }
                for goal in self.goals
            ],
        }

    def show(self, title: str, unit: str) -> None:
        """The same for people; `unit` is what an answer is."""
        table = Table(title=title, title_justify="left")
        table.add_column("server")
        for heading in (*(heading.format(unit) for heading, _, _ in _FIGURES.values()), *_TOTALS[1:]):
            table.add_column(heading, justify="right")
        for name, turns in self.turns.items():
            table.add_row(
                name,
                *(Spread.of([*map(of, turns)]).render(digits) for _, digits, of in _FIGURES.values()),
                *(str(sum(getattr(turn, total) for turn in turns)) for total in _TOTALS[1:]),
            )
        console = Console(width=140)
        console.print(table)
        for goal in self.goals:
            ratio = self.ratio(goal)
            console.print(
                f"{goal.ours} over {goal.theirs}, {unit}s a server CPU second: {ratio.render(3)}"
                f"{goal.verdict(ratio.median)} (a second: {self.rate_ratio(goal).render(2)})",
                highlight=False,
            )
        console.print()


def main(
    name: str,
    description: str,
    measure: Callable[[float, int], dict[str, Comparison]],
    titles: Mapping[str, tuple[str, str]],
    default_seconds: float = DEFAULT_SECONDS,
) -> int:
    """Run `measure(seconds, rounds)` as a program; `titles` gives a heading and a unit for each comparison."""
    parser = command.parser(name, description)
    parser.add_argument("--seconds", type=float, default=default_seconds, help="seconds of load in all")
    parser.add_argument("--rounds", type=int, default=DEFAULT_ROUNDS, help="turns of each server")
    arguments = command.parse(parser)
    if not (0 < arguments.seconds <= _MAX_SECONDS and 1 <= arguments.rounds <= _MAX_ROUNDS):
        parser.error(f"at most {_MAX_SECONDS:g} seconds and {_MAX_ROUNDS} rounds, and some of either")
    with command.failing(LoadError, ClientError, NtsError):
        results = measure(arguments.seconds, arguments.rounds)
    if arguments.json:
        documents = {kind: result.document() for kind, result in results.items()}
        print(json.dumps({"bench": name, "rounds": arguments.rounds, "results": documents}, indent=1))
    else:
        for kind, result in results.items():
            result.show(*titles[kind])
    return 0
