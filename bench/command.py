"""What the command lines of benches have in common: their name, `--json`, and one line of what goes wrong."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lab.processes import LabError


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Of `python -m bench.NAME`, for the options that are its own."""
    return argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description)


def parse(own: argparse.ArgumentParser) -> argparse.Namespace:
    """What was given of a bench's own options and of `--json`, which comes last."""
    own.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return own.parse_args()


@contextmanager
def failing(*errors: type[Exception], what: str = "bench") -> Iterator[None]:
    """LabError and these errors end the program with a line and status 1."""
    told: tuple[type[Exception], ...] = (LabError, *errors)
    try:
        yield
    except told as error:
        print(f"{what} failed: {error}", file=sys.stderr)
        raise SystemExit(1) from None
