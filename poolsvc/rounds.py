"""Rounds of probes by the registry's own monitor, until it is known whether they say anything of servers: pure.

Times are seconds of any clock that does not go back. Rules:

1. With references, a round counts for a family only if the local check before it began, and the one that began after it ended,
   and all between, were good for that family. Of a network that goes down between two checks nothing is recorded.
2. A round in which a good address was silent waits for `window`, in which the others are looked at. If by then more than half
   of the servers that were good, and at least MASS of them, were silent by that family, it is this host's own network: no
   silence by that family is recorded.
3. A family to which this host knows no way is not seen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from ipaddress import ip_address

from nts_core.control import ProbeResult
from poolsvc.monitor.soundness import Soundness
from poolsvc.views import is_silence

VERSIONS = (4, 6)
MASS = 3
MAX_WAITING = 10_000
_LONGEST = 45.0  # a round, with some delay


def version_of(address: str) -> int:
    """4 or 6."""
    return ip_address(address).version


@dataclass(frozen=True, slots=True)
class Begun:
    """A round under way: since when, also as aware UTC, and how often the local check had failed by then, for each family."""

    server_id: int
    at: datetime
    began: float
    faults: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Round:
    """What came of it, and when it ended; `good` are the addresses that were good before."""

    begun: Begun
    ended: float
    results: Sequence[ProbeResult]
    good: frozenset[str]

    def silent(self, version: int) -> bool | None:
        """Whether all that was good by this family was silent; None when nothing was."""
        found = [each for each in self.results if each.address in self.good]
        some = [is_silence(each) for each in found if version_of(each.address) == version]
        return all(some) if some else None


@dataclass(slots=True)
class _Look:
    """When a server that is good was last looked at by one family, and was last silent."""

    at: float
    silent_at: float | None


class Rounds:
    """Those that wait, and what is known of this host; `fault` says what is wrong with its own network."""

    def __init__(self, window: float, *, is_checked: bool = False) -> None:
        self._window = window
        self._is_checked = is_checked
        self._soundness: Soundness | None = None
        self._checked_at: float | None = None
        self._faults = dict.fromkeys(VERSIONS, 0)
        self._has_route = dict.fromkeys(VERSIONS, True)
        self._waiting: dict[int, Round] = {}
        self._looks: dict[int, dict[int, _Look]] = {version: {} for version in VERSIONS}
        self.fault: str | None = None

    @property
    def waiting(self) -> int:
        """How many of them."""
        return len(self._waiting)

    def __contains__(self, server_id: int) -> bool:
        return server_id in self._waiting

    def may_look(self, version: int) -> bool:
        """Whether a probe by this family that begins now may count."""
        return not self._is_checked or (self._soundness is not None and self._soundness.holds(version))

    def sees(self, version: int) -> bool:
        """Whether this host reaches anybody by this family, as far as is known."""
        found = self._soundness
        is_reached = found is None or (found.ipv6 if version == 6 else found.ipv4)
        return is_reached and self._has_route[version]

    def note_route(self, version: int, *, has_route: bool) -> None:
        """Whether this host knows a way to an address of this family."""
        self._has_route[version] = has_route

    def check(self, soundness: Soundness, began: float) -> None:
        """A local check that began then has this verdict."""
        self._soundness, self._checked_at = soundness, began
        for version in VERSIONS:
            self._faults[version] += not soundness.holds(version)

    def begin(self, server_id: int, at: datetime, now: float) -> Begun:
        """A round begins, of addresses at which it `may_look`."""
        return Begun(server_id, at, now, dict(self._faults))

    def add(self, one: Round) -> None:
        """What it found waits as long as it must; the oldest is dropped when there are too many."""
        server_id = one.begun.server_id
        for version, looks in self._looks.items():
            is_silent = one.silent(version)
            if is_silent is None:
                looks.pop(server_id, None)
                continue
            look = looks.setdefault(server_id, _Look(one.ended, None))
            look.at = one.ended
            if is_silent:
                look.silent_at = one.ended
        self._waiting.pop(server_id, None)
        self._waiting[server_id] = one
        if len(self._waiting) > MAX_WAITING:
            del self._waiting[next(iter(self._waiting))]

    def ready(self, now: float) -> list[Round]:
        """The rounds that need not wait any more, with what counts of them; without anything they are dropped."""
        self._forget(now - 2 * self._window - _LONGEST)
        mute = self._mute()
        found = []
        for one in [each for each in self._waiting.values() if not self._must_wait(each, now)]:
            del self._waiting[one.begun.server_id]
            results = [each for each in one.results if self._counts(each, one.begun, mute)]
            if results:
                found.append(replace(one, results=results))
        return found

    def _must_wait(self, one: Round, now: float) -> bool:
        if self._is_checked and (self._checked_at is None or self._checked_at < one.ended):
            return True
        # However few others are known yet: a process that begins in an outage does not know them.
        return now < one.ended + self._window and any(map(one.silent, VERSIONS))

    def _counts(self, result: ProbeResult, begun: Begun, mute: Mapping[int, str]) -> bool:
        version = version_of(result.address)
        is_sound = begun.faults[version] == self._faults[version]
        return is_sound and not (version in mute and is_silence(result))

    def _mute(self) -> Mapping[int, str]:
        """The families by which nearly nobody is heard, with words for it."""
        found = {}
        for version, looks in self._looks.items():
            silent = sum(look.silent_at is not None for look in looks.values())
            if silent >= MASS and 2 * silent > len(looks):
                found[version] = (
                    f"{silent} of {len(looks)} good servers were silent at once by IPv{version}:"
                    " no such silence counts, and nothing falls by it"
                )
        self.fault = "; ".join(found.values()) or None
        return found

    def _forget(self, horizon: float) -> None:
        for looks in self._looks.values():
            for server_id, look in list(looks.items()):
                if look.at < horizon:
                    del looks[server_id]
                elif look.silent_at is not None and look.silent_at < horizon:
                    look.silent_at = None
