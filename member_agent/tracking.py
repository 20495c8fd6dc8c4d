"""What the time daemon of this host says of the system's clock: chronyd's tracking, ntpd's system variables.

They are asked as `nts_core.asking` does it. Both speak of the clock of this host, so what they say - stratum, reference,
distances - is what this host may say to its clients. Whoever answers is not trusted to be well: every answer has a
grammar as well as a bound and a deadline.
"""

import contextlib
import ipaddress
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from member_agent.errors import AgentError, ExitStatus
from member_agent.sockets import Endpoint, parse_endpoint
from nts_core import ntptime
from nts_core.asking import Unanswered, ask_chronyc, asking_ntpd, read_variables
from nts_core.packet import Leap

OPTION = "--clock-source"
MAX_STRATUM = 16
# RFC 5905 section 7.2: how far an undisturbed clock may drift, 15 parts in a million (PHI).
_DRIFT_PPB = 15_000
_NTPD = Endpoint("127.0.0.1", 123)
# chrony's reference id for time that it smooths; ntpd's for time that it smears is 254 and the offset.
_CHRONY_SMOOTHED = bytes((127, 127, 1, 255))
_NTPD_SMEARED = 254
_CHRONY_LEAP = {
    "Normal": Leap.NONE,
    "Insert second": Leap.INSERT,
    "Delete second": Leap.DELETE,
    "Not synchronised": Leap.UNSYNCHRONISED,
}
# A correction of the system's clock that is worth a word in the status.
_REMARKABLE_NS = 1_000_000


class Daemon(StrEnum):
    CHRONYD = "chronyd"
    NTPD = "ntpd"


@dataclass(frozen=True, slots=True)
class ClockSource:
    """Whom to ask, in this order, and where; nobody leaves the kernel alone.

    `chronyd` is a socket's path or an endpoint for `chronyc -h`; None leaves the places to chronyc.
    """

    daemons: tuple[Daemon, ...]
    chronyd: str | Endpoint | None = None
    ntpd: Endpoint = _NTPD


KERNEL = ClockSource(())
AUTO = ClockSource((Daemon.CHRONYD, Daemon.NTPD))


def parse_source(text: str) -> ClockSource:
    """`auto`, `kernel`, `chronyd[:SOCKET or ADDR:PORT]`, `ntpd[:ADDR:PORT]`; AgentError names the option.

    Addresses are this host's loopback only: another host's daemon speaks of another clock.
    """
    name, colon, place = text.partition(":")
    if not colon and name in ("auto", "kernel"):
        return AUTO if name == "auto" else KERNEL
    if name == Daemon.CHRONYD and (place or not colon):
        if place.startswith("/") or not colon:
            return ClockSource((Daemon.CHRONYD,), chronyd=place or None)
        return ClockSource((Daemon.CHRONYD,), chronyd=_loopback(place))
    if name == Daemon.NTPD and (place or not colon):
        return ClockSource((Daemon.NTPD,), ntpd=_loopback(place) if colon else _NTPD)
    raise AgentError(
        f"{OPTION} {text}: no such source",
        "use auto, kernel, chronyd, chronyd:/PATH/OF/ITS/SOCKET, chronyd:127.0.0.1:323, ntpd or ntpd:127.0.0.1:123",
        ExitStatus.CONFIGURATION,
    )


def _loopback(text: str) -> Endpoint:
    endpoint = parse_endpoint(text, OPTION)
    if not ipaddress.ip_address(endpoint.address).is_loopback or not endpoint.port:
        raise AgentError(
            f"{OPTION} {text}: not a port on this host",
            "name a loopback address: a daemon of another host speaks of another clock",
            ExitStatus.CONFIGURATION,
        )
    return endpoint


@dataclass(frozen=True, slots=True)
class Tracking:
    """What a daemon said of this host's clock; `asked_at` is nanoseconds of `boottime_ns`.

    `root_dispersion_ns` bounds the error of the *system* clock at that moment, with the correction that is
    still under way; `drift_ppb` is how fast it grows, in nanoseconds a second. `reference_ns` is None when
    the daemon does not tell when it last set the clock right. `smear_id` is the reference id by which the
    daemon's own source says that its time is smeared. `remark` is for people.
    """

    daemon: Daemon
    asked_at: int
    leap: Leap
    stratum: int
    reference_id: bytes
    reference_ns: int | None
    root_delay_ns: int
    root_dispersion_ns: int
    drift_ppb: int = _DRIFT_PPB
    smear_id: bytes | None = None
    remark: str = ""

    @property
    def is_synchronised(self) -> bool:
        return self.leap is not Leap.UNSYNCHRONISED and 0 < self.stratum < MAX_STRATUM

    def dispersion_ns(self, age_ns: int) -> int:
        """The bound of the clock's error after `age_ns` without news (RFC 5905 section 11.2, PHI)."""
        return self.root_dispersion_ns + -(-age_ns * self.drift_ppb // 1_000_000_000)


def boottime_ns() -> int:
    """Nanoseconds that nobody sets, and that go on while the host sleeps."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


async def ask(source: ClockSource) -> Tracking:
    """The answer of the first daemon that gives one. Raises Unanswered with the reason of each."""
    reasons = []
    for daemon in source.daemons:
        try:
            if daemon is Daemon.CHRONYD:
                return await _ask_chronyd(source.chronyd)
            return await _ask_ntpd(source.ntpd)
        except Unanswered as error:
            reasons.append(str(error))
    raise Unanswered("; ".join(reasons))


def is_smeared(reference_id: bytes, now_ns: int) -> bool:
    """Whether a server's reference id says that it smears a leap second.

    chrony says 127.127.1.255, ntpd 254.x.y.z. The latter may also be the hash of an IPv6 address, so it
    counts only within a day of a month's end, where leap seconds are.
    """
    if reference_id == _CHRONY_SMOOTHED:
        return True
    now = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=now_ns // 1000)
    day = timedelta(days=1)
    return reference_id[0] == _NTPD_SMEARED and (now - day).month != (now + day).month


# chronyd


async def _ask_chronyd(place: str | Endpoint | None) -> Tracking:
    asked_at = boottime_ns()
    report = await ask_chronyc("tracking", "ntpdata", where=chronyc_options(place))
    return parse_chronyc(report, asked_at=asked_at, now_ns=time.time_ns())


def chronyc_options(place: str | Endpoint | None) -> tuple[str, ...]:
    """Where chronyc is to ask."""
    if isinstance(place, Endpoint):
        return "-h", place.address, "-p", str(place.port)
    return () if place is None else ("-h", place)


def parse_chronyc(report: str, *, asked_at: int, now_ns: int) -> Tracking:
    """`chronyc -c -n -m tracking ntpdata`; Unanswered when the first row is no tracking.

    The rest may be missing: chronyd tells of its sources to users of its Unix socket only.
    """
    first, *rows = report.split("\n")
    fields = first.split(",")
    if len(fields) != 14:
        # chronyc's own words, such as "506 Cannot talk to daemon", made safe for a log line.
        words = " ".join(re.sub(r"[^ -~]", " ", first).split())[:60]
        raise Unanswered(f"chronyd: {words or 'chronyc says nothing'}")
    try:
        leap = _CHRONY_LEAP[fields[13].strip()]
        stratum = int(_decimal(fields[2], 0))
        reference_id = bytes.fromhex(fields[0])
        reference_ns = _decimal(fields[3], 9)
        correction_ns = abs(_decimal(fields[4], 9))
        drift_ppb = abs(_decimal(fields[8], 3)) + abs(_decimal(fields[9], 3)) + _DRIFT_PPB
        root_delay_ns, root_dispersion_ns = _decimal(fields[10], 9), _decimal(fields[11], 9)
    except (KeyError, ValueError):
        raise Unanswered("chronyd: chronyc's report is not understood") from None
    _check(Daemon.CHRONYD, stratum, reference_id, root_dispersion_ns)
    sent = _sent_by_source(rows, fields[1])
    remarks = []
    if correction_ns >= _REMARKABLE_NS:
        remarks.append(f"the system's clock is {correction_ns / 1e6:.3g} ms off and being corrected")
    if sent is None and _is_address(fields[1]):
        remarks.append("chronyd does not show whether its source smears")
    return Tracking(
        daemon=Daemon.CHRONYD,
        asked_at=asked_at,
        leap=leap,
        stratum=stratum,
        reference_id=reference_id,
        reference_ns=reference_ns if reference_ns > 0 else None,
        # Network corrections may leave chronyd with a delay slightly below nothing.
        root_delay_ns=max(root_delay_ns, 0),
        # chronyd serves its own corrected time. We serve the system's clock, which is off by the rest.
        root_dispersion_ns=root_dispersion_ns + correction_ns,
        drift_ppb=drift_ppb,
        smear_id=sent if sent is not None and is_smeared(sent, now_ns) else None,
        remark=", ".join(remarks),
    )


def _sent_by_source(rows: list[str], reference: str) -> bytes | None:
    """The reference id that the source in use sent, from the rows of `ntpdata`."""
    for row in rows:
        fields = row.split(",")
        if len(fields) > 15 and reference and fields[0] == reference:
            with contextlib.suppress(ValueError):
                found = bytes.fromhex(fields[15])
                if len(found) == 4:
                    return found
    return None


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


# ntpd


async def _ask_ntpd(endpoint: Endpoint) -> Tracking:
    asked_at = boottime_ns()
    async with asking_ntpd(endpoint.address, endpoint.port) as udp:
        system = await read_variables(udp, 0)
        peer = {}
        if system.get("peer", "0") not in ("", "0"):
            with contextlib.suppress(Unanswered, ValueError):
                association = _decimal(system["peer"], 0)
                peer = await read_variables(udp, association & 0xFFFF)
    return ntpd_tracking(system, peer, asked_at=asked_at, now_ns=time.time_ns())


async def ask_ntpd(endpoint: Endpoint, *names: str) -> dict[str, str]:
    """These variables of the system. Raises Unanswered, also when there is one that ntpd does not know."""
    async with asking_ntpd(endpoint.address, endpoint.port) as udp:
        return await read_variables(udp, 0, names)


def ntpd_tracking(
    system: Mapping[str, str], peer: Mapping[str, str], *, asked_at: int, now_ns: int
) -> Tracking:
    """What ntpd's system variables say, and those of the peer that it follows; Unanswered if that is nothing.

    ntpd's root dispersion grows with time and holds the offset that it is correcting (RFC 5905 section 11.2.3).
    """
    try:
        leap = Leap(_decimal(system["leap"], 0))
        stratum = _decimal(system["stratum"], 0)
        reference_id = _ntpd_reference_id(system["refid"])
        reference = _ntpd_timestamp(system["reftime"])
        root_delay_ns = _decimal(system["rootdelay"], 6)
        root_dispersion_ns = _decimal(system["rootdisp"], 6)
    except (KeyError, ValueError):
        raise Unanswered("ntpd: its variables are not understood") from None
    _check(Daemon.NTPD, stratum, reference_id, root_dispersion_ns)
    smear_id = None
    with contextlib.suppress(KeyError, ValueError):
        sent = _ntpd_reference_id(peer["refid"])
        smear_id = sent if is_smeared(sent, now_ns) else None
    smear = system.get("leapsmearoffset", "0").strip("-0.")
    return Tracking(
        daemon=Daemon.NTPD,
        asked_at=asked_at,
        leap=leap,
        stratum=stratum,
        reference_id=reference_id,
        reference_ns=ntptime.unix_ns(reference, now_ns) if reference else None,
        root_delay_ns=max(root_delay_ns, 0),
        root_dispersion_ns=root_dispersion_ns,
        smear_id=smear_id,
        # ntpd smears what it sends; the system's clock, which we serve, is not smeared by that.
        remark="ntpd smears the time that it sends itself, this server does not" if smear else "",
    )


def _ntpd_reference_id(text: str) -> bytes:
    """A dotted quad, or up to four characters of a reference clock's name."""
    with contextlib.suppress(ValueError):
        return ipaddress.IPv4Address(text).packed
    name = text.encode("ascii")
    if len(name) > 4:
        raise ValueError(text)
    return name.ljust(4, b"\0")


def _ntpd_timestamp(text: str) -> int:
    """The 64 bits of `0xe8a1b2c3.12345678`; classic ntpd leaves out `0x`."""
    found = re.fullmatch(r"(?:0x)?([0-9a-f]{8})[.]([0-9a-f]{8})(?:\s.*)?", text)
    if found is None:
        raise ValueError(text)
    return int(found[1] + found[2], 16)


# Both


def _decimal(text: str, places: int) -> int:
    """A decimal number in units of 10**-`places`, digits beyond that cut off; ValueError for anything else."""
    found = re.fullmatch(r"\s*([+-]?)([0-9]{1,15})(?:[.]([0-9]{0,15}))?\s*", text)
    if found is None:
        raise ValueError(text)
    number = int(found[2] + (found[3] or "")[:places].ljust(places, "0"))
    return -number if found[1] == "-" else number


def _check(daemon: Daemon, stratum: int, reference_id: bytes, root_dispersion_ns: int) -> None:
    if not 0 <= stratum <= MAX_STRATUM or len(reference_id) != 4 or root_dispersion_ns < 0:
        raise Unanswered(f"{daemon}: its answer makes no sense")
