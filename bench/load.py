"""A client that keeps a UDP server busy: datagrams made beforehand, sent again and again, a window in flight.

sendmmsg(2) and recvmmsg(2) carry a batch a call; with one system call a datagram a Python client is slower than
chronyd, which it is meant to keep busy. For servers that are faster there is `bench.native`.
"""

import ctypes
import errno
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

# Fits the receive buffers that sockets have by default: a short datagram counts as 1,280 octets there, and the
# kernel gives back three quarters of the room at once, the rest later.
WINDOW = 96
_BATCH = 32
_LONGEST_REPLY = 512
# A client that waited in poll(2) would be woken at the server's expense, once an answer. Ours sleeps as long as
# the server has taken for so many answers, at most so many seconds.
_NAP_ANSWERS = _BATCH // 2
_LONGEST_NAP = 2e-3
# On loopback an answer that takes longer will not come.
_SILENCE = 0.25


class LoadError(Exception):
    """The server cannot be measured: it refuses, or is silent."""


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Header(ctypes.Structure):
    """struct msghdr."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("vectors", ctypes.POINTER(_IoVec)),
        ("vector_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Message(ctypes.Structure):
    """struct mmsghdr; `moved` is how many octets the call carried."""

    _fields_ = (("header", _Header), ("moved", ctypes.c_uint))


_libc = ctypes.CDLL(None, use_errno=True)


class _Batch:
    """Buffers of one length in one piece of memory, and the structures that name them to the kernel."""

    def __init__(self, octets: bytes, length: int) -> None:
        self.count = len(octets) // length
        self._length = length
        self._memory = ctypes.create_string_buffer(octets, len(octets))
        start = ctypes.addressof(self._memory)
        self._vectors = (_IoVec * self.count)(
            *(_IoVec(start + position * length, length) for position in range(self.count))
        )
        self._messages = (_Message * self.count)()
        for message, vector in zip(self._messages, self._vectors, strict=True):
            message.header.vectors = ctypes.pointer(vector)
            message.header.vector_count = 1

    def send(self, sock: socket.socket, first: int, count: int) -> int:
        """Send `count` datagrams from number `first` on; how many the kernel took."""
        place = ctypes.byref(self._messages, first * ctypes.sizeof(_Message))
        return _taken(_libc.sendmmsg(sock.fileno(), place, count, socket.MSG_DONTWAIT))

    def receive(self, sock: socket.socket) -> list[int]:
        """The lengths of the datagrams that are there now, possibly none."""
        place = ctypes.byref(self._messages)
        count = _taken(_libc.recvmmsg(sock.fileno(), place, self.count, socket.MSG_DONTWAIT, None))
        return [self._messages[position].moved for position in range(count)]

    def datagram(self, position: int, length: int) -> bytes:
        return ctypes.string_at(ctypes.addressof(self._memory) + position * self._length, length)


def _taken(result: int) -> int:
    if result >= 0:
        return result
    code = ctypes.get_errno()
    if code in (errno.EAGAIN, errno.ENOBUFS):
        return 0
    raise LoadError(f"the server is gone: {os.strerror(code)}")


@dataclass(frozen=True, slots=True)
class Burst:
    """What one run of the load brought; `sample` holds some of the replies, evenly taken.

    `cpu_ns` is the client's processor time: when it is near `seconds`, the client may be what limits the rate.
    """

    answered: int
    lost: int
    seconds: float
    cpu_ns: int
    sample: tuple[bytes, ...]


class LoadClient(Protocol):
    """Requests for one server, ready to be sent."""

    def run(self, seconds: float, *, samples: int) -> Burst:
        """Keep the server busy for `seconds`, then wait for what is under way.

        Keeps `samples` replies at most. Raises LoadError for a server that answers nothing.
        """


class Load:
    """Requests of one length for one server."""

    def __init__(self, address: str, port: int, requests: Sequence[bytes], source: str | None = None) -> None:
        if len({len(request) for request in requests}) != 1 or len(requests) < WINDOW:
            raise ValueError(f"a load needs {WINDOW} or more requests of one length")
        self._requests = _Batch(b"".join(requests), len(requests[0]))
        self._replies = _Batch(bytes(_BATCH * _LONGEST_REPLY), _LONGEST_REPLY)
        self._peer = (address, port)
        self._source = source
        self._next = 0

    def run(self, seconds: float, *, samples: int) -> Burst:
        """Keep the window full for `seconds`, then wait for what is under way."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            if self._source is not None:
                sock.bind((self._source, 0))
            sock.connect(self._peer)
            return self._run(sock, seconds, samples)

    def _run(self, sock: socket.socket, seconds: float, samples: int) -> Burst:
        sent = answered = lost = 0
        sample: list[bytes] = []
        before = time.thread_time_ns()
        started = heard = gave_up = time.monotonic()
        while (now := time.monotonic()) - started < seconds or sent > answered + lost:
            if now - started < seconds and sent - answered - lost <= WINDOW - _BATCH:
                sent += self._send(sock)
            lengths = self._replies.receive(sock)
            if lengths:
                heard = now
                answered += len(lengths)
                # As many from the beginning of the run as from its end.
                if len(sample) < samples * (now - started) / seconds and len(sample) < samples:
                    sample.append(self._replies.datagram(0, lengths[0]))
            elif now - max(heard, gave_up) > _SILENCE:
                lost, gave_up = sent - answered, now
            else:
                time.sleep(min(_NAP_ANSWERS * (now - started) / (answered + 1), _LONGEST_NAP))
        if not answered:
            raise LoadError(f"no answer to {sent} requests")
        cpu_ns = time.thread_time_ns() - before
        return Burst(answered, lost, heard - started, cpu_ns, tuple(sample))

    def _send(self, sock: socket.socket) -> int:
        taken = self._requests.send(sock, self._next, min(_BATCH, self._requests.count - self._next))
        self._next = (self._next + taken) % self._requests.count
        return taken
