"""The servers that are measured side by side, and the processor time that they take."""

import ctypes
import importlib.util
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from cryptography import x509

from bench.native import has_cargo, program
from lab.certificates import Authority, Pair
from lab.peers import ChronydServer, NtpdRsServer
from lab.programs import AgentServer
from member_agent.ntp_server import prepare
from nts_core import acceptor
from nts_core.aead import AeadId
from nts_core.tls import Trust

# `pool-agent serve` with either engine; the native one has one thread for NTP, or two.
NATIVE, NATIVE_2, PYTHON = "native", "native, 2 threads", "python"
CHRONYD, NTPD_RS = "chronyd", "ntpd-rs"
# Sends back what it gets, and does nothing else: what the way of a packet costs.
ECHO = "echo"
ADDRESS = "127.0.0.1"
# Two addresses that the kernel gives to different ones of two processes or threads.
SOURCES = ("127.0.0.1", "127.0.0.2")
# What everybody speaks, chronyd 4.3 nothing else.
AEAD = AeadId.AES_SIV_CMAC_256
# What all say of their clock, so that they answer as synchronised.
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
    """One of NTS-KE and NTP, but the echo; `sources` is where it is asked from, an address for each of its threads."""

    ke_port: int
    ntp_port: int
    sources: tuple[str, ...] = (ADDRESS,)


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


def is_native_here() -> bool:
    """Whether the native engine is installed."""
    return importlib.util.find_spec("nts_engine") is not None


@contextmanager
def _agent(engine: str, threads: int, name: str, directory: Path, pair: Pair) -> Iterator[TimeServer]:
    server = AgentServer(directory, pair, f"--local-stratum={_STRATUM}")
    server.process.env |= {"POOL_AGENT_ENGINE__PACKETS": engine, "POOL_AGENT_WORKERS": str(threads)}
    with server:
        yield TimeServer(name, server.process.pid, server.ke_port, server.ntp_port, SOURCES[:threads])


@contextmanager
def _peer(
    kind: type[ChronydServer | NtpdRsServer], name: str, directory: Path, pair: Pair
) -> Iterator[TimeServer]:
    with kind(directory, pair, stratum=_STRATUM) as server:
        yield TimeServer(name, server.process.pid, server.ke_port, server.ntp_port)


@contextmanager
def _echo(name: str, _directory: Path, _pair: Pair) -> Iterator[TimeServer]:
    """With a socket that was bound and prepared as the agent's are."""
    with acceptor.bind(ADDRESS, 0, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        prepare(sock)
        with subprocess.Popen([program("echo")], stdin=sock.fileno()) as child:
            try:
                yield TimeServer(name, child.pid, 0, sock.getsockname()[1])
            finally:
                child.terminate()


_STARTS: dict[str, Callable[[str, Path, Pair], AbstractContextManager[TimeServer]]] = {
    NATIVE: partial(_agent, "native", 1),
    NATIVE_2: partial(_agent, "native", 2),
    PYTHON: partial(_agent, "python", 1),
    CHRONYD: partial(_peer, ChronydServer),
    NTPD_RS: partial(_peer, NtpdRsServer),
    ECHO: _echo,
}


@dataclass(frozen=True, slots=True)
class Contest:
    """The servers, what their certificates are checked with, and the certificate itself, which is that of all."""

    contenders: tuple[TimeServer, ...]
    root: Path
    trust: Trust
    pair: Pair


@contextmanager
def contest(names: Sequence[str]) -> Iterator[Contest]:
    """Start these servers with P-256 certificates of one authority; LabError if one fails."""
    with tempfile.TemporaryDirectory(prefix="truechimer-bench-") as scratch, ExitStack() as stack:
        directory = Path(scratch)
        authority = Authority(directory / "authority")
        pair = authority.issue(ADDRESS)
        roots = x509.load_pem_x509_certificates(authority.root.read_bytes())
        started = [
            stack.enter_context(_STARTS[name](name, directory / str(number), pair))
            for number, name in enumerate(names)
        ]
        yield Contest(tuple(started), authority.root, Trust.of(roots, datetime.now(UTC)), pair)


def possible(*names: str) -> tuple[str, ...]:
    """Those of these servers that this machine can run: the native engine has to be installed, and the echo built."""
    missing: set[str] = set()
    if not is_native_here():
        missing |= {NATIVE, NATIVE_2}
    if not has_cargo():
        missing |= {ECHO}
    return tuple(name for name in names if name not in missing)
