"""Whether what this monitor sees may be the servers' doing: pure judgement of its own clock and network.

Rules:

1. The clock is good when more than half of all references, by name, agree with it within LIMIT. One that is silent, says
   that it is not synchronised, or admits to a root distance of more than 1.5 s, agrees with nobody.
2. Of a reference that is reached in several ways the answer with the least delay counts.
3. A family is good when a reference that was reached by it agrees.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from nts_core import select
from nts_core.association import Sample
from nts_core.ke import DEFAULT_NTP_PORT, KE_PORT
from nts_core.shell import parse_host_port

# The NTP Pool's line for its monitors; a full step ends at 25 ms.
LIMIT = 10_000_000
_SHOWN = 8
MIN_REFERENCES, MAX_REFERENCES = 3, 16


class Kind(StrEnum):
    """How a reference is asked."""

    NTS = "nts"
    NTP = "ntp"


@dataclass(frozen=True, slots=True)
class Reference:
    """A server whose time the monitor's own clock is compared with."""

    kind: Kind
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.kind}:{self.host}"


def parse_reference(text: str) -> Reference:
    """nts:HOST[:PORT] or ntp:HOST[:PORT]. Raises ValueError."""
    kind, _, place = text.partition(":")
    if kind not in set(Kind):
        raise ValueError(f"{text!r}: write nts:HOST[:PORT] or ntp:HOST[:PORT]")
    host, port = parse_host_port(place, KE_PORT if kind == Kind.NTS else DEFAULT_NTP_PORT)
    return Reference(Kind(kind), host, port)


def check_independent(references: Iterable[Reference]) -> None:
    """Raises ValueError for a host that is there twice."""
    hosts = [each.host for each in references]
    if len(set(hosts)) < len(hosts):
        raise ValueError("a host is there twice; name servers of different operators")


@dataclass(frozen=True, slots=True)
class Reading:
    """What one reference said over one family, 4 or 6; without a sample, why there is none."""

    reference: str
    version: int
    sample: Sample | None
    why: str = ""

    @property
    def fault(self) -> str | None:
        """Why it does not agree."""
        if self.sample is None:
            return self.why or "silent"
        if (unfit := select.unfit(self.sample)) is not None:
            return unfit
        if abs(self.sample.offset) > LIMIT:
            return f"{-self.sample.offset / 1e6:+.1f} ms is this clock to it"
        return None


@dataclass(frozen=True, slots=True)
class Soundness:
    """A verdict with its reason; `ipv4` and `ipv6` are the families in which it holds."""

    is_sound: bool
    detail: str
    ipv4: bool
    ipv6: bool
    agreeing: int
    references: int

    def holds(self, version: int) -> bool:
        """Whether results over this family count."""
        return self.is_sound and (self.ipv6 if version == 6 else self.ipv4)


def agrees(readings: Iterable[Reading], references: Sequence[str]) -> Soundness:
    """The verdict on this host; `references` are all that should have been read."""
    by_reference: dict[str, list[Reading]] = {name: [] for name in references}
    good = set()
    for reading in readings:
        by_reference[reading.reference].append(reading)
        if reading.fault is None:
            good.add(reading.version)
    faults = {name: _fault(found) for name, found in by_reference.items()}
    agreeing = sum(fault is None for fault in faults.values())
    is_sound = 2 * agreeing > len(faults)
    detail = "" if is_sound else _detail(faults, agreeing)
    return Soundness(is_sound, detail, 4 in good, 6 in good, agreeing, len(faults))


def _fault(readings: Sequence[Reading]) -> str | None:
    answered = [(reading.sample.delay, reading) for reading in readings if reading.sample is not None]
    if answered:
        return min(answered, key=lambda each: each[0])[1].fault
    return readings[0].fault if readings else "not asked"


def _detail(faults: dict[str, str | None], agreeing: int) -> str:
    told = [f"{name}: {fault}" for name, fault in faults.items() if fault is not None][:_SHOWN]
    return f"{agreeing} of {len(faults)} references agree with this host's clock; {'; '.join(told)}"[:300]
