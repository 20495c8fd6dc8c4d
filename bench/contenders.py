"""The two servers that are measured side by side, and the processor time that they take."""

import ctypes
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from lab.certificates import Authority
from lab.peers import ChronydServer
from lab.programs import AgentServer
from nts_core.aead import AeadId
from nts_core.tls import Trust

OURS = "pool-agent"
THEIRS = "chronyd"
ADDRESS = "127.0.0.1"
# What everybody speaks, chronyd 4.3 nothing else.
AEAD = AeadId.AES_SIV_CMAC_256
# What both say of their clock, so that both answer as synchronised.
_STRATUM = 10
_getcpuclockid = ctypes.CDLL(None).clock_getcpuclockid


@dataclass(frozen=True, slots=True)
class Contender:
    """A running server; `pid` is its first process."""

    name: str
    pid: int

    def cpu_ns(self) -> int:
        """User and system time in nanoseconds of all its threads, and of the processes below it.

        chronyd leaves NTS-KE to helper processes. The clocks of clock_getcpuclockid(3) count what the fields
        utime and stime of /proc/PID/stat count, without their steps of 10 ms.
        """
        return sum(self.each_cpu_ns())

    def each_cpu_ns(self) -> list[int]:
        """The same for each of its processes."""
        return [_process_ns(pid) for pid in self.pids()]

    def pids(self) -> list[int]:
        """It and the processes below it."""
        return list(_family(self.pid))


@dataclass(frozen=True, slots=True)
class TimeServer(Contender):
    """One of NTS-KE and NTP."""

    ke_port: int
    ntp_port: int


def _process_ns(pid: int) -> int:
    clock = ctypes.c_int()
    error = _getcpuclockid(pid, ctypes.byref(clock))
    if error:
        raise OSError(error, os.strerror(error))
    return time.clock_gettime_ns(clock.value)


def _family(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from _family(int(child))


@dataclass(frozen=True, slots=True)
class Contest:
    """Both servers, ours first, and what their certificates are checked with."""

    contenders: tuple[TimeServer, TimeServer]
    trust: Trust


@contextmanager
def contest() -> Iterator[Contest]:
    """Start `pool-agent serve` and chronyd with P-256 certificates of one authority; LabError if one fails."""
    with tempfile.TemporaryDirectory(prefix="truechimer-bench-") as name:
        directory = Path(name)
        authority = Authority(directory / "authority")
        pair = authority.issue(ADDRESS)
        roots = x509.load_pem_x509_certificates(authority.root.read_bytes())
        agent = AgentServer(directory / OURS, pair, f"--local-stratum={_STRATUM}")
        with agent, ChronydServer(directory / THEIRS, pair, stratum=_STRATUM) as chronyd:
            yield Contest(
                (
                    TimeServer(OURS, agent.process.pid, agent.ke_port, agent.ntp_port),
                    TimeServer(THEIRS, chronyd.process.pid, chronyd.ke_port, chronyd.ntp_port),
                ),
                Trust.of(roots, datetime.now(UTC)),
            )
