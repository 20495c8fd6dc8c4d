"""What systemd gives this service: sockets that it opened, and secrets (I/O): sd_listen_fds(3) and credentials.

Without systemd nothing here does anything. What the service tells it is in `nts_core.systemd`.
"""

import functools
import os
import socket
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import structlog

from member_agent.errors import AgentError, ExitStatus
from nts_core.systemd import take_number

_log = structlog.get_logger()
_FIRST_PASSED, _MOST_PASSED = 3, 64  # the first is SD_LISTEN_FDS_START
_MAX_CREDENTIAL = 4096


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
    pid, count = take_number("LISTEN_PID"), take_number("LISTEN_FDS")
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
