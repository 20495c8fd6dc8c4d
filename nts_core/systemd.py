"""What a service tells systemd: that it is ready, how it is, that it lives (I/O): sd_notify(3), sd_watchdog_enabled(3).

Without systemd nothing here does anything.
"""

import asyncio
import contextlib
import os
import re
import socket
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import structlog

from nts_core.errors import printable

_log = structlog.get_logger()
_MAX_STATUS = 200


class Notifier:
    """Tells systemd how this service is, while it is entered; whoever leaves it begins to stop.

    The watchdog is fed by the event loop that serves: it goes hungry when that loop hangs, as it should.
    """

    def __init__(self) -> None:
        self._address: str | None = None
        self._socket: socket.socket | None = None
        self._next_feed: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        # The variables are for this process, not for the programs that it starts.
        address = os.environ.pop("NOTIFY_SOCKET", "")
        interval = _watchdog_interval()
        if address.startswith(("/", "@")):
            self._address = f"\0{address[1:]}" if address[0] == "@" else address
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
            if interval is not None:
                self._feed(interval)
        elif address:
            _log.warning("systemd_not_told", detail="NOTIFY_SOCKET is neither a path nor an abstract name")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._next_feed is not None:
            self._next_feed.cancel()
            self._next_feed = None
        self._tell("STOPPING=1")
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def ready(self, status: str) -> None:
        """The start is over."""
        self._tell("READY=1", _status(status))

    def status(self, text: str) -> None:
        """One line for people, which `systemctl status` shows."""
        self._tell(_status(text))

    @contextlib.contextmanager
    def reloading(self) -> Iterator[None]:
        """Around what SIGHUP asks for."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            yield
        finally:
            self._tell("READY=1")

    def _feed(self, interval: float) -> None:
        self._tell("WATCHDOG=1")
        self._next_feed = asyncio.get_running_loop().call_later(interval, self._feed, interval)

    def _tell(self, *assignments: str) -> None:
        if self._socket is None or self._address is None:
            return
        try:
            self._socket.sendto("\n".join(assignments).encode(errors="replace"), self._address)
        except OSError as error:
            # It is systemd's to decide what becomes of a service that it does not hear.
            _log.warning("systemd_not_told", detail=os.strerror(error.errno or 0))


def _status(text: str) -> str:
    """One line, whatever somebody else said in it: each further line would be an assignment."""
    return f"STATUS={printable(text, _MAX_STATUS)}"


def _watchdog_interval() -> float | None:
    """Seconds between two signs of life, half of what systemd waits for; None when it waits for none of ours."""
    microseconds = take_number("WATCHDOG_USEC")
    pid = take_number("WATCHDOG_PID")
    return microseconds / 2e6 if microseconds and pid in (None, os.getpid()) else None


def take_number(variable: str) -> int | None:
    """The number of a variable, which is removed."""
    text = os.environ.pop(variable, "")
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None
