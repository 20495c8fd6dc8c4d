"""Children of the laboratory: free ports, start, wait until ready, stop."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

READY_DEADLINE = 40.0  # on a machine that has much else to do
STOP_DEADLINE = 10.0
_PORTS = range(12000, 32000)
# The last ones that were given out here.
_drawn: deque[int] = deque(maxlen=1000)


class LabError(Exception):
    """A peer is missing, did not come up, or ended early; the text holds the end of its log."""


def is_free(address: str, port: int) -> bool:
    """Whether nobody listens on the port of `address`, neither by TCP nor by UDP."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(family, kind) as probe:
            try:
                probe.bind((address, port))
            except OSError:
                return False
    return True


def free_port(*addresses: str) -> int:
    """A port that is free now on all `addresses` (127.0.0.1 without any).

    Below the range from which the kernel takes the ports of outgoing connections: one of those could take
    the port again before its server does.
    """
    for _ in range(100):
        port = secrets.choice(_PORTS)
        # Two that are drawn before the first is bound must not be the same.
        if port not in _drawn and all(is_free(address, port) for address in addresses or ("127.0.0.1",)):
            _drawn.append(port)
            return port
    raise LabError(f"no free port on {', '.join(addresses)}")


def require(program: str) -> str:
    """The path of an installed program, /usr/sbin included; LabError with the remedy when it is missing."""
    path = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        raise LabError(f"{program} is not installed; run `make setup`")
    return path


def wait_until(condition: Callable[[], object], what: str, deadline: float = READY_DEADLINE) -> None:
    """Poll `condition` until it is true; LabError when `deadline` seconds have passed."""
    end = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > end:
            raise LabError(f"{what}: not within {deadline:g} s")
        time.sleep(0.02)


class Process:
    """One child in the foreground, its output in a log file; a context manager that ends it."""

    def __init__(
        self, name: str, argv: Sequence[str], directory: Path, *, env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.argv = [require(argv[0]), *argv[1:]] if "/" not in argv[0] else list(argv)
        self.directory = directory
        self.env = {**os.environ, **(env or {})}
        self.log = directory / f"{name}.log"
        self._child: subprocess.Popen[bytes] | None = None

    def start(self, ready: Callable[[], object] | None = None, deadline: float = READY_DEADLINE) -> Self:
        """Start the child and wait until `ready` holds."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                self.argv, cwd=self.directory, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        if ready is not None:
            try:
                wait_until(lambda: self._alive() and ready(), f"{self.name} ready", deadline)
            except BaseException:
                self.stop()
                raise
        return self

    def _alive(self) -> bool:
        if self._child is None or self._child.poll() is not None:
            code = None if self._child is None else self._child.returncode
            raise LabError(f"{self.name} ended with {code}:\n{self.tail()}")
        return True

    @property
    def pid(self) -> int:
        assert self._child is not None, f"{self.name} was not started"
        return self._child.pid

    def running(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def tail(self, characters: int = 2000) -> str:
        return self.output()[-characters:]

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, deadline: float = STOP_DEADLINE) -> int:
        """The exit status, waiting `deadline` seconds at most."""
        assert self._child is not None
        return self._child.wait(deadline)

    def stop(self) -> None:
        """SIGTERM, then SIGKILL; the child is always reaped (knotd refuses to start over a stale pid)."""
        if self._child is None:
            return
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
            try:
                self._child.wait(STOP_DEADLINE)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
        self._child = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
