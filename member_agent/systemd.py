"""What systemd and this service tell each other: readiness and the watchdog, sockets that it opened, secrets (I/O).

sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3) and credentials. Without systemd nothing here does anything.
"""

import asyncio
import contextlib
import functools
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from member_agent.errors import AgentError, ExitStatus
from nts_core.errors import printable

_log = structlog.get_logger()
_FIRST_PASSED, _MOST_PASSED = 3, 64  # the first is SD_LISTEN_FDS_START
_MAX_STATUS, _MAX_CREDENTIAL = 200, 4096


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
    microseconds = _number("WATCHDOG_USEC")
    pid = _number("WATCHDOG_PID")
    return microseconds / 2e6 if microseconds and pid in (None, os.getpid()) else None


def _number(variable: str) -> int | None:
    """The number of a variable, which is removed."""
    text = os.environ.pop(variable, "")
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def credential(name: str) -> str | None:
    """The secret of that name that systemd holds for this service (LoadCredential=), without white space around it.

    None when there is none. Raises AgentError for one that cannot be read or is no text.
    """
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        return None
    file = Path(directory, name)
    try:
        with file.open("rb") as secret:
            return secret.read(_MAX_CREDENTIAL).decode("ascii").strip() or None
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "not a text"
        raise AgentError(
            f"the credential {name}: {what}", f"check what the unit gives as {name}", ExitStatus.CONFIGURATION
        ) from None


@dataclass(slots=True)
class _Passed:
    """A socket of systemd's, which stays open, and who has a duplicate of it."""

    sock: socket.socket
    handed: socket.socket | None = None

    @property
    def is_free(self) -> bool:
        return self.handed is None or self.handed.fileno() < 0

    def is_at(self, address: str, port: int, kind: socket.SocketKind) -> bool:
        host, bound_port = self.sock.getsockname()[:2]
        return (_ip(host), bound_port, self.sock.type) == (_ip(address), port, kind)


def inherited(address: str, port: int, kind: socket.SocketKind) -> socket.socket | None:
    """The non-blocking socket that systemd opened for us there, or None. It has one owner at a time: after a close it is
    there again, as the kernel goes on listening.

    The address is compared as it stands: a socket at 0.0.0.0 is not one at 192.0.2.1.
    """
    for each in _passed():
        if each.is_free and each.is_at(address, port, kind):
            each.handed = each.sock.dup()
            return each.handed
    return None


@functools.cache
def _passed() -> tuple[_Passed, ...]:
    """The sockets that systemd passed; those that nobody can ask for are closed."""
    pid, count = _number("LISTEN_PID"), _number("LISTEN_FDS")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != os.getpid() or count is None:
        return ()
    found = []
    for descriptor in range(_FIRST_PASSED, _FIRST_PASSED + min(count, _MOST_PASSED)):
        try:
            os.set_inheritable(descriptor, False)
            sock = socket.socket(fileno=descriptor)
        except OSError as error:
            _log.warning("passed_socket_unusable", descriptor=descriptor, detail=error.strerror)
            continue
        sock.setblocking(False)
        fault = _fault(sock)
        if fault is None:
            found.append(_Passed(sock))
        else:
            _log.warning("passed_socket_unusable", descriptor=descriptor, detail=fault)
            sock.close()
    return tuple(found)


def _fault(sock: socket.socket) -> str | None:
    """Why a passed socket cannot be one of ours: they have one family each, as those have that we bind."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return "neither IPv4 nor IPv6"
    everywhere = _ip(sock.getsockname()[0]) == IPv6Address("::")
    if everywhere and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
        return "both IPv6 and IPv4: set BindIPv6Only=ipv6-only"
    if sock.type == socket.SOCK_STREAM and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return "a connection: set Accept=no"
    return None


def _ip(host: str) -> IPv4Address | IPv6Address:
    """Without the zone, which a link-local address has."""
    return ip_address(host.partition("%")[0])
