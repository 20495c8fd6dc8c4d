"""Addresses to listen on, as people write them, and the sockets bound there."""

import errno
import ipaddress
import os
import re
import socket
from contextlib import ExitStack
from typing import NamedTuple

from member_agent import systemd
from member_agent.errors import AgentError, ExitStatus
from nts_core import acceptor
from nts_core.kernel import deal_by_source


class Endpoint(NamedTuple):
    """An IP address and a port; port 0 lets the kernel choose."""

    address: str
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self.address else socket.AF_INET

    @property
    def is_wildcard(self) -> bool:
        return ipaddress.ip_address(self.address).is_unspecified


def parse_endpoint(text: str, option: str) -> Endpoint:
    """ADDR:PORT or [ADDR6]:PORT; AgentError names the option."""
    host, _, port = text.rpartition(":")
    # Five digits at most: Python refuses to read thousands with a ValueError of its own.
    is_port = re.fullmatch(r"[0-9]{1,5}", port) is not None and int(port) < 65536
    is_bracketed = host.startswith("[") and host.endswith("]")
    try:
        address = str(ipaddress.ip_address(host[1:-1] if is_bracketed else host))
    except ValueError:
        address = ""
    if not address or not is_port or is_bracketed != (":" in address):
        raise AgentError(
            f"{option} {text}: not an IP address and a port",
            "write ADDRESS:PORT, and IPv6 as [ADDRESS]:PORT",
            ExitStatus.CONFIGURATION,
        )
    return Endpoint(address, int(port))


def packed(family: int, peer: tuple[str, int] | tuple[str, int, int, int]) -> bytes:
    """The address of a peer, as sockets of the family tell it, in 4 or 16 octets."""
    return socket.inet_pton(family, peer[0])


def bound_endpoint(sock: socket.socket) -> Endpoint:
    address, port = sock.getsockname()[:2]
    return Endpoint(address, port)


def bind(endpoint: Endpoint, kind: socket.SocketKind) -> socket.socket:
    """A non-blocking socket bound there, systemd's where it handed one over; IPv6 sockets carry IPv6 only.

    AgentError with the remedy.
    """
    try:
        handed = systemd.inherited(endpoint.address, endpoint.port, kind)
        sock = handed or acceptor.bind(endpoint.address, endpoint.port, kind)
    except OSError as error:
        raise _not_bound(endpoint, error) from None
    sock.setblocking(False)
    return sock


def bind_shared(endpoint: Endpoint, kind: socket.SocketKind, count: int) -> list[socket.socket]:
    """As many sockets bound to the same place, each for another process; streams listen. What one address sends always
    comes to the same one. AgentError with the remedy.
    """
    sockets = [bind(endpoint, kind)] if count == 1 else _bind_several(endpoint, kind, count)
    try:
        for sock in sockets if kind is socket.SOCK_STREAM else ():
            # In this order: by it the kernel numbers those that share.
            sock.listen(acceptor.BACKLOG)
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise _not_bound(endpoint, error) from None
    return sockets


def _bind_several(endpoint: Endpoint, kind: socket.SocketKind, count: int) -> list[socket.socket]:
    handed = systemd.inherited(endpoint.address, endpoint.port, kind)
    if handed is not None:
        handed.close()
        raise AgentError(
            f"{endpoint}: several processes cannot share the one socket that systemd handed over",
            "set workers = 1, or disable the socket unit",
            ExitStatus.CONFIGURATION,
        )
    # Whoever shares must not find another agent of this user there, with which it would share as well.
    bind(endpoint, kind).close()
    with ExitStack() as stack:
        found: list[socket.socket] = []
        for number in range(count):
            try:
                sock = stack.enter_context(acceptor.bind(endpoint.address, endpoint.port, kind, shared=True))
                if number == 0:
                    deal_by_source(sock, count)
            except OSError as error:
                raise _not_bound(endpoint, error) from None
            sock.setblocking(False)
            found.append(sock)
            endpoint = bound_endpoint(sock)
        stack.pop_all()
        return found


def _not_bound(endpoint: Endpoint, error: OSError) -> AgentError:
    return AgentError(
        f"cannot listen on {endpoint}: {os.strerror(error.errno or 0)}",
        _REMEDIES.get(error.errno or 0, "check the address and the port"),
        ExitStatus.CONFIGURATION,
    )


_REMEDIES = {
    errno.EADDRINUSE: "another program listens there: stop it, or choose another address or port",
    errno.EACCES: "ports below 1024 need root or the capability CAP_NET_BIND_SERVICE",
    errno.EADDRNOTAVAIL: "this host does not have the address: check `ip address`",
}


def is_local(address: str) -> bool:
    """Whether this host can listen on the address; it cannot when the address is translated (NAT)."""
    try:
        with socket.socket(Endpoint(address, 0).family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True
