"""What running programs take of the machine, and when they have come to rest."""

import os
import time
from collections.abc import Collection
from pathlib import Path

from lab.processes import LabError, Process

# At rest: for so many seconds less than this share of a core.
_QUIET, _IDLE, SETTLED_WITHIN = 2.0, 0.2, 120.0


def rss_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def cpu_s(pid: int) -> float:
    """User and system time of a process, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def settle(running: Collection[Process], within: float = SETTLED_WITHIN) -> None:
    """Wait until the processes have done what they do once: a leader reads the whole pool."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        before = sum(cpu_s(process.pid) for process in running)
        time.sleep(_QUIET)
        if sum(cpu_s(process.pid) for process in running) - before < _IDLE * _QUIET:
            return
    raise LabError(f"the registry has not come to rest within {within:g} s")
