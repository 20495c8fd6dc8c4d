"""`python -m fuzz TARGET` or `--all`: fuzz for a time, or `--replay` the corpus without the engine.

What the engine learns is kept in `.fuzz/corpus/TARGET` and used by the next run; an input that breaks an oracle is
written to `.fuzz/faults`. A fault that was mended belongs into `fuzz/corpus/TARGET`, under a name that says what it is.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fuzz.target import Target
from fuzz.targets import TARGETS

DEFAULT_SECONDS = 60
_MAX_SECONDS = 86_400
_WORK = Path(".fuzz")
# A whole input must be done in this time, and within this memory.
_INPUT_SECONDS = 20
_MEMORY_MIB = 2048
# Loading and instrumenting everything, and reading the corpus.
_START_SECONDS = 120
# Octets of a fault's input that a report shows.
_SHOWN = 1024
NO_ENGINE = (
    "atheris is not installed, as it has no wheel for this platform or Python: only the corpus can be replayed"
    " (python -m fuzz --all --replay)"
)


@dataclass(frozen=True, slots=True)
class Fault:
    """An input for which a target's oracle does not hold, or the engine's words when there is no input."""

    target: str
    report: str
    input: Path | None

    def __str__(self) -> str:
        where = "no input was kept"
        if self.input is not None:
            octets = self.input.read_bytes()
            rest = f"... ({len(octets)} octets)" if len(octets) > _SHOWN else ""
            where = f"{self.input}\nhex: {octets[:_SHOWN].hex()}{rest}"
        return f"{self.target}: {self.report.strip()}\ninput: {where}"


def has_engine() -> bool:
    """Whether atheris is there; found and not imported, as it leaves nothing in a process as it was."""
    try:
        return importlib.util.find_spec("atheris") is not None
    except ValueError:
        # Python was told that there is none.
        return False


def replay(target: Target) -> list[Fault]:
    """Run the corpus in the tree through a target, in this process."""
    faults, reached = [], set()
    for path in target.inputs():
        try:
            reached.add(target.run(path.read_bytes()))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
            faults.append(Fault(target.name, f"{type(error).__name__}: {error}", path))
    missing = sorted(target.reaches - reached)
    if missing:
        faults.append(Fault(target.name, f"no input of the corpus is {', '.join(missing)} any more", None))
    return faults


def fuzz(target: Target, seconds: int, work: Path) -> tuple[Fault | None, str]:
    """Let the engine look for faults in a process of its own; also the engine's last words.

    `work` is where it keeps what it learns, and faults.
    """
    grown, faults = work / "corpus" / target.name, work / "faults"
    grown.mkdir(parents=True, exist_ok=True)
    faults.mkdir(parents=True, exist_ok=True)
    before = set(faults.iterdir())
    with tempfile.NamedTemporaryFile("w", suffix=".dict") as words:
        words.writelines(_quoted(token) for token in target.tokens)
        words.flush()
        options = [
            f"-max_total_time={seconds}",
            f"-max_len={target.longest}",
            f"-timeout={_INPUT_SECONDS}",
            f"-rss_limit_mb={_MEMORY_MIB}",
            f"-artifact_prefix={faults}/{target.name}-",
            "-print_final_stats=1",
            # An empty dictionary is an error to the engine.
            *([f"-dict={words.name}"] if target.tokens else []),
        ]
        command = [sys.executable, "-m", "fuzz.engine", target.name, *options, str(grown), str(target.corpus)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=seconds + _START_SECONDS + 2 * _INPUT_SECONDS,
        )
    if done.returncode == 0:
        return None, _figures(done.stderr)
    found = sorted(set(faults.iterdir()) - before)
    report = _excerpt(done.stdout + done.stderr) or f"the engine ended with status {done.returncode}"
    return Fault(target.name, report, found[0] if found else None), _figures(done.stderr)


def _quoted(token: bytes) -> str:
    """One line of libFuzzer's dictionary."""
    return '"' + "".join(f"\\x{octet:02x}" for octet in token) + '"\n'


def _excerpt(output: str) -> str:
    """The part of the engine's output that tells of the fault."""
    lines = output.splitlines()
    for mark in (" === Uncaught Python exception: ===", "ERROR: libFuzzer", "Traceback", "error:", "Error:"):
        start = next((n for n, line in enumerate(lines) if mark in line), None)
        if start is not None:
            return "\n".join(lines[start : start + 40])
    return "\n".join(lines[-20:])


def _figures(output: str) -> str:
    """Inputs tried and coverage, as the engine counts them."""
    runs = [line.split()[-1] for line in output.splitlines() if "number_of_executed_units" in line]
    coverage = [line.split("cov: ")[1].split()[0] for line in output.splitlines() if " cov: " in line]
    return f"{runs[-1] if runs else '?'} inputs, {coverage[-1] if coverage else '?'} branches"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument(
        "target", nargs="?", choices=sorted(TARGETS), metavar="TARGET", help=", ".join(TARGETS)
    )
    parser.add_argument("--all", action="store_true", help="every target in turn")
    parser.add_argument(
        "--seconds", type=int, default=DEFAULT_SECONDS, help=f"a target (default {DEFAULT_SECONDS})"
    )
    parser.add_argument(
        "--replay", action="store_true", help="only the corpus in the tree, without the engine"
    )
    parser.add_argument("--input", type=Path, help="only this file, with its traceback")
    arguments = parser.parse_args()
    if (arguments.target is None) == (not arguments.all):
        parser.error("name a target, or give --all")
    if not 1 <= arguments.seconds <= _MAX_SECONDS:
        parser.error(f"--seconds {arguments.seconds} is out of range: give 1 to {_MAX_SECONDS}")
    if arguments.input is not None and arguments.target is None:
        parser.error("--input is for one target")
    return arguments


def main() -> int:
    arguments = _arguments()
    targets = list(TARGETS.values()) if arguments.all else [TARGETS[arguments.target]]
    if arguments.input is not None:
        print(targets[0].run(arguments.input.read_bytes()))
        return 0
    if not arguments.replay and not has_engine():
        print(f"error: {NO_ENGINE}", file=sys.stderr)
        return 2
    found: list[Fault] = []
    for target in targets:
        faults = replay(target)
        figures = f"{len(target.inputs())} inputs of the corpus"
        if not arguments.replay and not faults:
            fault, figures = fuzz(target, arguments.seconds, _WORK)
            faults = [fault] if fault is not None else []
        print(f"{target.name:18} {'FAULT' if faults else 'sound'}  {figures}", flush=True)
        for each in faults:
            print(each, file=sys.stderr, flush=True)
        found += faults
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
