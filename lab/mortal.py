"""`poolsvc` that ends by SIGKILL at one chosen change of its database: just before the commit, or just after.

    python -m lab.mortal 7 after serve --config poolsvc.toml

Changes are what makes the registry's work go on. Leases, reports and samples come with the clock and do not count.
"""

import os
import re
import signal
import sys
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine

from poolsvc import cli
from poolsvc.db import RecordedSession

_WRITES = re.compile(r"\s*(?:WITH\b.*?\)\s*)?(?:INSERT INTO|UPDATE|DELETE FROM)\s+\"?(\w+)", re.DOTALL)
_CLOCKWORK = frozenset({"leases", "samples", "daily_counts", "workers", "connect_backs"})


class _Fate:
    """Counts commits that change something, and ends the process at one of them."""

    def __init__(self, at: int, *, after: bool) -> None:
        self._left, self._after, self._doomed = at, after, False

    def note(self, connection: Connection, cursor: Any, statement: str, *_: Any) -> None:
        found = _WRITES.match(statement)
        if found is not None and cursor.rowcount > 0 and found[1] not in _CLOCKWORK:
            connection.info["changed"] = True

    def commit(self, connection: Connection) -> None:
        if connection.info.pop("changed", False):
            self._left -= 1
            if self._left == 0:
                self._doomed = True
                if not self._after:
                    _end()

    def committed(self, _session: Any) -> None:
        if self._doomed:
            _end()


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    at, when, *arguments = sys.argv[1:]
    fate = _Fate(int(at), after=when == "after")
    event.listen(Engine, "after_cursor_execute", fate.note)
    event.listen(Engine, "commit", fate.commit)
    event.listen(RecordedSession, "after_commit", fate.committed)
    sys.argv[1:] = arguments
    cli.main()


if __name__ == "__main__":
    main()
