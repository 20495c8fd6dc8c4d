"""`poolsvc dns serve` that ends by SIGKILL at one chosen moment of its work: just before it, or just after.

    python -m lab.mortal_dns 3 after dns serve --config poolsvc.toml

Moments are what it commits, and what it puts in its place on the disk.
"""

import sqlite3
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lab.moments import moments
from poolsvc import cli


def main() -> None:
    at, when, *arguments = sys.argv[1:]
    moment = moments(at, when)

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            if sql != "COMMIT":
                return super().execute(sql, *parameters)
            with moment():
                return super().execute(sql, *parameters)

    replace = Path.replace

    def placed(self: Path, target: Path) -> Path:
        with moment():
            return replace(self, target)

    sys.argv[1:] = arguments
    with (
        patch.object(sqlite3, "connect", partial(sqlite3.connect, factory=Connection)),
        patch.object(Path, "replace", placed),
    ):
        cli.main()


if __name__ == "__main__":
    main()
