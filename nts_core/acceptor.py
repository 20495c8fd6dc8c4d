"""Accepting TCP connections where what one costs is decided before it has a transport.

asyncio's own server accepts first and asks later, and (3.11) logs hundreds of tracebacks for one accept() that finds no
descriptor.
"""

import asyncio
import errno
import socket
import struct
from collections import Counter
from collections.abc import Callable

BACKLOG = 512
# Connections accepted before everybody else gets a turn.
_BATCH = 64
# Until the next look when there was no descriptor for a connection.
_PAUSE = 0.1
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
# A close that sends a reset: nothing is left to wait for in the kernel.
RESET = struct.pack("ii", 1, 0)


def bind(address: str, port: int, kind: socket.SocketKind, *, shared: bool = False) -> socket.socket:
    """A socket bound there, which does not listen yet; IPv6 sockets carry IPv6 only. Raises OSError.

    The kernel deals what comes for one place to all sockets of one user that are bound there `shared` (SO_REUSEPORT).
    """
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    try:
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if kind is socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sock.family is socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
    except OSError:
        sock.close()
        raise
    return sock


class Acceptor:
    """Some listening sockets. `counters` has the connections that were refused, by reason, and failures of accept()."""

    def __init__(
        self,
        admit: Callable[[bytes], str | None],
        begin: Callable[[socket.socket, bytes, socket.socket], None],
        counters: Counter[str],
        *,
        exhausted: Callable[[int], None] | None = None,
    ) -> None:
        """`admit` says why an address gets no connection, or None; `begin` takes over one that was admitted, with its
        address and the socket that it came by. `exhausted` is told of the error when there is no descriptor.
        """
        self._admit = admit
        self._begin = begin
        self._counters = counters
        self._exhausted = exhausted
        self._sockets: set[socket.socket] = set()
        self._pauses: dict[socket.socket, asyncio.TimerHandle] = {}

    def listen(self, sock: socket.socket) -> None:
        """Accept on a bound socket."""
        sock.setblocking(False)
        sock.listen(BACKLOG)
        self._sockets.add(sock)
        asyncio.get_running_loop().add_reader(sock, self._accept, sock)

    def leave(self, sock: socket.socket) -> None:
        """Accept no more on one socket, and close it. Connections are those who began them to end."""
        pause = self._pauses.pop(sock, None)
        if pause is not None:
            pause.cancel()
        asyncio.get_running_loop().remove_reader(sock)
        self._sockets.remove(sock)
        sock.close()

    def close(self) -> None:
        """Leave all sockets."""
        for sock in tuple(self._sockets):
            self.leave(sock)

    def _accept(self, sock: socket.socket) -> None:
        for _ in range(_BATCH):
            try:
                connection, remote = sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _OUT_OF_RESOURCES:
                    self._pause(sock, error.errno)
                    return
                # accept(2): errors of the network on that connection, which is gone.
                self._counters["accept-error"] += 1
                continue
            # A link-local address comes with its interface.
            address = socket.inet_pton(sock.family, remote[0].partition("%")[0])
            refused = self._admit(address)
            if refused is None:
                connection.setblocking(False)
                self._begin(connection, address, sock)
            else:
                self._counters[refused] += 1
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                connection.close()

    def _pause(self, sock: socket.socket, number: int) -> None:
        """Leave the socket alone for a moment: it stays readable, and the loop would spin."""
        loop = asyncio.get_running_loop()
        self._counters["no-descriptor"] += 1
        if self._exhausted is not None:
            self._exhausted(number)
        loop.remove_reader(sock)

        def resume() -> None:
            del self._pauses[sock]
            loop.add_reader(sock, self._accept, sock)

        self._pauses[sock] = loop.call_later(_PAUSE, resume)
