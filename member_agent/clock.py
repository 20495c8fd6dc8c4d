"""What this host may truthfully say of its clock.

The kernel knows whether its clock is disciplined and how wrong it may be, but not over how many servers the time
came. So a server says leap 3 and stratum 16 (not synchronised) unless `--local-stratum` vouches for the clock.
"""

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass

from nts_core import ntptime
from nts_core.packet import ClockState, Leap

_STA_UNSYNC = 0x0040
_TIME_INSERT, _TIME_DELETE, _TIME_ERROR = 1, 2, 5
_UNSYNCHRONISED_STRATUM = 16
# Claimed when the clock is vouched for but the kernel keeps no account of its error.
_VOUCHED_ERROR_NS = 1_000_000
# time.time_ns() has steps of well under a microsecond: 2**-20 s.
_PRECISION = -20
# 127.127.1.1, the address that chrony and ntpd give to an undisciplined local clock.
_LOCAL_CLOCK = bytes((127, 127, 1, 1))


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


class Clock:
    """The time that is served, and what is said of it.

    `offset_ns` is a test option: it is added to receive and transmit times alike, and `describe` shows it.
    """

    # How long a reading of the kernel's state is used before it is asked again.
    _REFRESH_NS = 1_000_000_000

    def __init__(
        self,
        local_stratum: int | None = None,
        offset_ns: int = 0,
        kernel: Callable[[], KernelClock] = read_kernel,
    ) -> None:
        self._local_stratum = local_stratum
        self.offset_ns = offset_ns
        self._kernel = kernel
        self._read_at = 0
        self._state = self._make_state(0)

    def now_ns(self) -> int:
        """Unix nanoseconds to be served."""
        return time.time_ns() + self.offset_ns

    def state(self, now_ns: int) -> ClockState:
        """What to say at the time `now_ns`."""
        if not 0 <= now_ns - self._read_at < self._REFRESH_NS:
            self._read_at = now_ns
            self._state = self._make_state(now_ns)
        return self._state

    def _make_state(self, now_ns: int) -> ClockState:
        kernel = self._kernel()
        if self._local_stratum is None:
            leap, stratum, error_ns, reference_id = Leap.UNSYNCHRONISED, _UNSYNCHRONISED_STRATUM, 0, bytes(4)
        else:
            leap = kernel.leap if kernel.synchronised else Leap.NONE
            stratum = self._local_stratum
            error_ns = kernel.max_error_ns if kernel.synchronised else _VOUCHED_ERROR_NS
            reference_id = b"LOCL" if stratum == 1 else _LOCAL_CLOCK
        return ClockState(
            leap=leap,
            stratum=stratum,
            precision=_PRECISION,
            root_delay=0,
            root_dispersion=ntptime.short(error_ns),
            reference_id=reference_id,
            reference=ntptime.timestamp(now_ns) if stratum < _UNSYNCHRONISED_STRATUM else 0,
        )

    def describe(self) -> str:
        """One line for every status."""
        kernel = "synchronised" if self._kernel().synchronised else "not synchronised"
        parts = [f"kernel clock {kernel}"]
        if self._local_stratum is None:
            parts.append("served as not synchronised: nobody vouches for it (--local-stratum)")
        else:
            parts.append(f"vouched for as stratum {self._local_stratum}")
        if self.offset_ns:
            parts.append(f"TEST OFFSET of {self.offset_ns / 1e9:+g} s")
        return ", ".join(parts)
