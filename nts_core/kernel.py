"""What the Linux kernel says of its clock and of a datagram's time (I/O). Nothing here sets anything."""

import ctypes
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from nts_core.packet import Leap

# asm-generic/socket.h; Python names it from 3.13 on only. It is the option, and the kind of the control message
# that it asks for, which holds a struct timespec.
SO_TIMESTAMPNS = 35
TIMESPEC = struct.Struct("@qq")
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


_adjtimex = ctypes.CDLL(None, use_errno=True).adjtimex


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


def receive_time(ancillary: Iterable[tuple[int, int, bytes]]) -> int | None:
    """When a datagram came, in Unix nanoseconds, by what recvmsg(2) gave with it; None if it does not say."""
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS and len(data) >= TIMESPEC.size:
            seconds, nanoseconds = TIMESPEC.unpack_from(data)
            return int(seconds * 1_000_000_000 + nanoseconds)
    return None
