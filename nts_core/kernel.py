"""What Python does not say for us to the Linux kernel (I/O): its clock, the time of a datagram, who gets it of several
sockets, what a process may do.
"""

import ctypes
import os
import socket
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass

from nts_core.packet import Leap

# asm-generic/socket.h; Python names it from 3.13 on only. It is the option, and the kind of the control message
# that it asks for, which holds a struct timespec.
SO_TIMESTAMPNS = 35
TIMESPEC = struct.Struct("@qq")
# asm-generic/socket.h and linux/filter.h.
_SO_ATTACH_REUSEPORT_CBPF = 51
_NETWORK_HEADER = 0xFFF0_0000
_LOAD, _SHIFT_RIGHT, _MULTIPLY, _MODULO, _TO_X, _XOR_X, _RETURN = 0x20, 0x74, 0x24, 0x94, 0x07, 0xAC, 0x16
# 2**32 divided by the golden ratio: its multiples lie far apart, also those of neighbours.
_SCATTER = 0x9E37_79B1
# linux/prctl.h and linux/capability.h.
_PR_SET_KEEPCAPS = 8
_CAPABILITY_VERSION = 0x2008_0522
_NET_BIND_SERVICE = 1 << 10
_STA_UNSYNC = 0x0040
_TIME_INSERT, _TIME_DELETE, _TIME_ERROR = 1, 2, 5


class _Timex(ctypes.Structure):
    """struct timex of adjtimex(2)."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("constant", ctypes.c_long),
        ("precision", ctypes.c_long),
        ("tolerance", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("fraction", ctypes.c_long),
        ("tick", ctypes.c_long),
        # Statistics of a pulse-per-second signal and room for what the kernel may add.
        ("rest", ctypes.c_long * 24),
    )


class _CapabilityHeader(ctypes.Structure):
    """struct __user_cap_header_struct, of this thread."""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Capabilities(ctypes.Structure):
    """struct __user_cap_data_struct: half of the capabilities."""

    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


class _Instruction(ctypes.Structure):
    """struct sock_filter: one instruction of classic BPF."""

    _fields_ = (
        ("code", ctypes.c_ushort),
        ("if_true", ctypes.c_ubyte),
        ("if_false", ctypes.c_ubyte),
        ("operand", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("first", ctypes.POINTER(_Instruction)))


_libc = ctypes.CDLL(None, use_errno=True)
_adjtimex = _libc.adjtimex


@dataclass(frozen=True, slots=True)
class KernelClock:
    """The kernel's view of its clock."""

    synchronised: bool
    leap: Leap
    max_error_ns: int


def read_kernel() -> KernelClock:
    """Ask adjtimex(2) without changing anything; a kernel that refuses counts as not synchronised."""
    timex = _Timex(modes=0)
    state = _adjtimex(ctypes.byref(timex))
    if state < 0 or state == _TIME_ERROR or timex.status & _STA_UNSYNC:
        return KernelClock(synchronised=False, leap=Leap.UNSYNCHRONISED, max_error_ns=0)
    leap = {_TIME_INSERT: Leap.INSERT, _TIME_DELETE: Leap.DELETE}.get(state, Leap.NONE)
    return KernelClock(synchronised=True, leap=leap, max_error_ns=timex.maxerror * 1000)


def steady_ns() -> int:
    """A clock that nobody sets, and that goes on while this host sleeps, in nanoseconds."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def receive_time(ancillary: Iterable[tuple[int, int, bytes]]) -> int | None:
    """When a datagram came, in Unix nanoseconds, by what recvmsg(2) gave with it; None if it does not say."""
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS and len(data) >= TIMESPEC.size:
            seconds, nanoseconds = TIMESPEC.unpack_from(data)
            return int(seconds * 1_000_000_000 + nanoseconds)
    return None


def deal_by_source(sock: socket.socket, count: int) -> None:
    """Deal what comes to a shared place to its `count` sockets by who sent it; `sock` is one of them. Raises OSError.

    What one address sends always comes to the same socket, and all of an IPv6 /48, so that whoever reads there may
    limit them alone. For TCP the call comes before the first listen().
    """
    if sock.family is socket.AF_INET:
        source = [(_LOAD, _NETWORK_HEADER + 12)]
    else:
        source = [
            (_LOAD, _NETWORK_HEADER + 12),
            (_SHIFT_RIGHT, 16),
            (_TO_X, 0),
            (_LOAD, _NETWORK_HEADER + 8),
            (_XOR_X, 0),
        ]
    steps = [*source, (_MULTIPLY, _SCATTER), (_SHIFT_RIGHT, 16), (_MODULO, count), (_RETURN, 0)]
    instructions = (_Instruction * len(steps))(*(_Instruction(code, 0, 0, value) for code, value in steps))
    program = bytes(_Program(len(steps), instructions))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, program)


def keep_capabilities() -> None:
    """Keep what this process may do when it becomes another user. Raises OSError."""
    if _libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0):
        raise _error()


def keep_only_low_ports() -> None:
    """Give up all capabilities but CAP_NET_BIND_SERVICE, which no child inherits. Raises OSError.

    It holds for the calling thread and those that it starts.
    """
    header, halves = _CapabilityHeader(_CAPABILITY_VERSION, 0), (_Capabilities * 2)()
    if _libc.capget(ctypes.byref(header), halves):
        raise _error()
    kept = halves[0].permitted & _NET_BIND_SERVICE
    limited = (_Capabilities * 2)(_Capabilities(kept, kept, 0), _Capabilities(0, 0, 0))
    if _libc.capset(ctypes.byref(header), limited):
        raise _error()


def _error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
