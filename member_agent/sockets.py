"""Addresses to listen on, as people write them, and the sockets bound there."""

import errno
import ipaddress
import os
import re
import socket
from dataclasses import dataclass

from member_agent.errors import AgentError, ExitStatus


@dataclass(frozen=True, slots=True)
class Endpoint:
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
    """A non-blocking socket bound there; IPv6 sockets carry IPv6 only. AgentError with the remedy."""
    sock = socket.socket(endpoint.family, kind)
    try:
        sock.setblocking(False)
        if kind is socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if endpoint.family is socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((endpoint.address, endpoint.port))
    except OSError as error:
        sock.close()
        raise AgentError(
            f"cannot listen on {endpoint}: {os.strerror(error.errno or 0)}",
            _REMEDIES.get(error.errno or 0, "check the address and the port"),
            ExitStatus.CONFIGURATION,
        ) from None
    return sock


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
