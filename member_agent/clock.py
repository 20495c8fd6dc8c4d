"""What this host may truthfully say of its clock.

The time daemon knows over how many servers the time came, from whom, and how wrong the clock may be: what it says
is what is served, with an error that grows until it is heard again. The kernel knows less: whether its clock is
disciplined, and a bound of its error. Where no daemon says that the clock is synchronised, a server says leap 3
and stratum 16 (not synchronised) unless `--local-stratum` vouches for the clock.
"""

import asyncio
import ipaddress
import time
from collections.abc import Callable

import structlog

from member_agent.config import AgentSettings
from member_agent.tracking import (
    KERNEL,
    MAX_STRATUM,
    ClockSource,
    Tracking,
    ask,
    boottime_ns,
    parse_source,
)
from nts_core import ntptime
from nts_core.asking import Unanswered
from nts_core.kernel import KernelClock, read_kernel
from nts_core.packet import ClockState, Leap

_log = structlog.get_logger()

# Claimed when the clock is vouched for but the kernel keeps no account of its error.
_VOUCHED_ERROR_NS = 1_000_000
# time.time_ns() has steps of well under a microsecond: 2**-20 s.
_PRECISION = -20
# 127.127.1.1, the address that chrony and ntpd give to an undisciplined local clock.
_LOCAL_CLOCK = bytes((127, 127, 1, 1))
# Seconds from one question to the next. While answers agree the time doubles: each costs a few milliseconds of a
# processor. The longest is shorter than nearly all polls of daemons, so that their news is served soon; it holds too
# while there is nobody to ask.
_INTERVAL_S, _LONGEST_S = 4.0, 16.0
# How long a daemon that has fallen silent is believed: it may be restarted meanwhile.
_MAX_AGE_NS = 300_000_000_000
# RFC 5905 section 7.2: beyond this dispersion (MAXDISP) a clock is not synchronised.
_MAX_DISPERSION_NS = 16_000_000_000
_DAY_NS = 86_400_000_000_000
_LEAP_WORDS = {Leap.INSERT: "a second will be inserted", Leap.DELETE: "a second will be deleted"}


class Clock:
    """The time that is served, and what is said of it.

    `offset_ns` is a test option: it is added to receive and transmit times alike, and `describe` shows it.
    `refresh` and `follow` ask the time daemon; `state` uses its last answer and never waits.
    """

    # How long what is said is used before it is worked out again.
    _REFRESH_NS = 1_000_000_000

    def __init__(
        self,
        local_stratum: int | None = None,
        offset_ns: int = 0,
        source: ClockSource = KERNEL,
        *,
        kernel: Callable[[], KernelClock] = read_kernel,
        boottime: Callable[[], int] = boottime_ns,
    ) -> None:
        self.local_stratum = local_stratum
        self.offset_ns = offset_ns
        self._source = source
        self._kernel = kernel
        self._boottime = boottime
        self._tracking: Tracking | None = None
        # Why the last question had no answer; empty when it had one.
        self._silence = "no time daemon was asked yet" if source.daemons else ""
        # Called after each answer, and after each question that had none.
        self.heard: Callable[[], None] = lambda: None
        self._logged: tuple[object, ...] = ()
        self._read_at = 0
        self._state = self.said_at(0)

    def now_ns(self) -> int:
        """Unix nanoseconds to be served."""
        return time.time_ns() + self.offset_ns

    def state(self, now_ns: int) -> ClockState:
        """What to say at the time `now_ns`."""
        if not 0 <= now_ns - self._read_at < self._REFRESH_NS:
            self._read_at = now_ns
            self._state = self.said_at(now_ns)
        return self._state

    @property
    def is_smeared(self) -> bool:
        """Whether the source of the time that is served says that it smears a leap second."""
        tracking, _ = self._usable()
        return tracking is not None and tracking.smear_id is not None

    async def follow(self) -> None:
        """Ask the time daemon, for ever."""
        wait = _INTERVAL_S
        while True:
            await asyncio.sleep(wait)
            is_news = await self.refresh()
            # A search costs more than a question, and nothing is known that could grow old.
            is_search = bool(self._silence) and self._usable()[0] is None
            if is_search:
                wait = _LONGEST_S
            else:
                wait = _INTERVAL_S if is_news or self._silence else min(2 * wait, _LONGEST_S)

    async def refresh(self) -> bool:
        """Ask the time daemon once. What changes in what is said of the clock is logged; whether something did."""
        if self._source.daemons:
            try:
                self.hear(await ask(self._source))
            except Unanswered as error:
                self.hear(None, str(error))
            except Exception as error:  # noqa: BLE001 - a task's root: the last answer ages, the service goes on
                self.hear(None, f"the time daemon cannot be asked: {type(error).__name__}")
        return self._log_change()

    def hear(self, tracking: Tracking | None, silence: str = "") -> None:
        """Take a daemon's answer, or the reason why there is none; then the last answer grows old."""
        if tracking is not None:
            self._tracking = tracking
        self._silence = silence
        # Before any time, so that the next question finds the news.
        self._read_at = -self._REFRESH_NS
        self.heard()

    @property
    def last_heard(self) -> tuple[Tracking | None, str]:
        """What `hear` takes: the last answer, and why there was none since."""
        return self._tracking, self._silence

    def _log_change(self) -> bool:
        said = self.state(self.now_ns())
        found = (said.leap, said.stratum, said.reference_id, self.is_smeared, self._silence)
        if found == self._logged:
            return False
        self._logged = found
        is_well = said.leap is not Leap.UNSYNCHRONISED and not self._silence
        (_log.info if is_well else _log.warning)("clock", said=self.describe())
        return True

    def _usable(self) -> tuple[Tracking | None, str]:
        """The daemon's last answer if it may be served, or else why not; no reason when no daemon is asked."""
        tracking = self._tracking
        if tracking is None:
            return None, self._silence
        if not tracking.is_synchronised:
            return None, f"{tracking.daemon} is not synchronised"
        age_ns = self._boottime() - tracking.asked_at
        if age_ns > _MAX_AGE_NS:
            return (
                None,
                f"{tracking.daemon} has not answered for {age_ns // 1_000_000_000} s ({self._silence})",
            )
        if (error_ns := tracking.dispersion_ns(age_ns)) >= _MAX_DISPERSION_NS:
            return None, f"{tracking.daemon} says that the clock may be {error_ns / 1e9:.0f} s off"
        return tracking, ""

    def said_at(self, now_ns: int) -> ClockState:
        tracking, _ = self._usable()
        if tracking is not None:
            return self._tracked(tracking, now_ns)
        if self.local_stratum is not None:
            return self._vouched(self.local_stratum, now_ns)
        return ClockState(
            leap=Leap.UNSYNCHRONISED,
            stratum=MAX_STRATUM,
            precision=_PRECISION,
            root_delay=0,
            root_dispersion=0,
            reference_id=bytes(4),
            reference=0,
        )

    def _tracked(self, tracking: Tracking, now_ns: int) -> ClockState:
        """What the daemon said, grown older: we serve the same clock, so its stratum is ours."""
        age_ns = self._boottime() - tracking.asked_at
        # The warning is about the end of the day on which it was given.
        is_same_day = (now_ns - age_ns) // _DAY_NS == now_ns // _DAY_NS
        reference_ns = tracking.reference_ns
        return ClockState(
            leap=tracking.leap if is_same_day else Leap.NONE,
            stratum=tracking.stratum,
            precision=_PRECISION,
            root_delay=ntptime.short(tracking.root_delay_ns),
            root_dispersion=ntptime.short(tracking.dispersion_ns(age_ns)),
            reference_id=tracking.smear_id or tracking.reference_id,
            # RFC 5905 has clients refuse a reference after the transmission.
            reference=0
            if reference_ns is None
            else ntptime.timestamp(min(reference_ns + self.offset_ns, now_ns)),
        )

    def _vouched(self, stratum: int, now_ns: int) -> ClockState:
        kernel = self._kernel()
        error_ns = kernel.max_error_ns if kernel.synchronised else _VOUCHED_ERROR_NS
        return ClockState(
            leap=kernel.leap if kernel.synchronised else Leap.NONE,
            stratum=stratum,
            precision=_PRECISION,
            root_delay=0,
            root_dispersion=ntptime.short(error_ns),
            reference_id=b"LOCL" if stratum == 1 else _LOCAL_CLOCK,
            reference=ntptime.timestamp(now_ns),
        )

    def describe(self) -> str:
        """One line for every status: what is said of the clock, and why."""
        tracking, doubt = self._usable()
        if not doubt:
            kernel = "synchronised" if self._kernel().synchronised else "not synchronised"
            doubt = f"kernel clock {kernel}, no time daemon asked"
        if tracking is not None:
            parts = [self._describe_tracked(tracking)]
        elif self.local_stratum is not None:
            parts = [f"vouched for as stratum {self.local_stratum}: {doubt}"]
        else:
            parts = [f"served as not synchronised: {doubt}, nobody vouches for it (--local-stratum)"]
        if self.offset_ns:
            parts.append(f"TEST OFFSET of {self.offset_ns / 1e9:+g} s")
        return ", ".join(parts)

    def _describe_tracked(self, tracking: Tracking) -> str:
        said = self.state(self.now_ns())
        parts = [
            f"stratum {said.stratum} by {tracking.daemon}",
            f"reference {_reference_words(tracking)}",
            f"root delay {ntptime.short_ns(said.root_delay) / 1e6:.3g} ms",
            f"root dispersion {ntptime.short_ns(said.root_dispersion) / 1e6:.3g} ms",
        ]
        if said.leap in _LEAP_WORDS:
            parts.append(_LEAP_WORDS[said.leap])
        if tracking.smear_id is not None:
            parts.append(f"SMEARED by its source ({ipaddress.IPv4Address(tracking.smear_id)})")
        if tracking.remark:
            parts.append(tracking.remark)
        if self._silence:
            parts.append(f"as it was before: {self._silence}")
        return ", ".join(parts)


def _reference_words(tracking: Tracking) -> str:
    """A reference clock's name at stratum 1, else the octets as an address, which for IPv6 is a hash."""
    name = tracking.reference_id.rstrip(b"\0")
    if tracking.stratum == 1 and name.isalnum():
        return name.decode("ascii")
    return str(ipaddress.IPv4Address(tracking.reference_id))


def clock_of(settings: AgentSettings) -> Clock:
    """The clock that a member's settings ask for. Raises AgentError that names the option."""
    return Clock(
        settings.local_stratum, round(settings.clock_offset * 1e9), parse_source(settings.clock_source)
    )
