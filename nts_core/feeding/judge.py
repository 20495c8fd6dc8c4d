"""When a daemon's word on a server is reason enough to replace it. Pure.

1. A fault counts when the daemon has found it each time it was asked, for as long as `PATIENCE` says, and `LEAST_LOOKS`
   times at least. One look without it, or without an answer, begins that anew.
2. Who is outvoted is judged by the daemon's majority: so two of the pool's servers at least must be good then.
3. Where no server is good, nothing is held against any while this host finds nothing in DNS either. While DNS answers, it
   counts that a server is not reached, as `Fault.UNREACHED`: it may be chosen again soon.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from nts_core.feeding import Verdict
from nts_core.panel import Dismissal
from nts_core.roster import Fault

# In seconds. Eight polls at chronyd's and ntpd's first interval take nine minutes.
PATIENCE = {Fault.FALSETICKER: 600.0, Fault.UNREACHABLE: 1200.0, Fault.UNFIT: 3600.0}
LEAST_LOOKS = 3
_LEAST_MAJORITY = 2


@dataclass(slots=True)
class _Complaint:
    fault: Fault
    since: float
    looks: int = 1


class Judge:
    """Hears what a daemon says of its servers. `now` is in seconds of a clock that does not go back."""

    def __init__(self) -> None:
        self._complaints: dict[str, _Complaint] = {}

    def silence(self) -> None:
        """The daemon gave no answer."""
        self._complaints.clear()

    def heard(
        self, verdicts: Mapping[str, Verdict | None], now: float, *, is_online: bool
    ) -> list[Dismissal]:
        """Who is of no use by now, the longest so first. `is_online`: DNS answered when it was asked last."""
        good = sum(verdict is not None and verdict.is_good for verdict in verdicts.values())
        before, self._complaints = self._complaints, {}
        found = []
        for name, verdict in verdicts.items():
            fault = None if verdict is None else verdict.fault
            if verdict is None or fault is None or not _counts(fault, good, is_online=is_online):
                continue
            complaint = before.get(name)
            if complaint is None or complaint.fault is not fault:
                complaint = _Complaint(fault, now)
            else:
                complaint.looks += 1
            self._complaints[name] = complaint
            if complaint.looks >= LEAST_LOOKS and now - complaint.since >= PATIENCE[fault]:
                is_alone = good > 0 or fault is not Fault.UNREACHABLE
                found.append(Dismissal(name, fault if is_alone else Fault.UNREACHED, verdict.reason))
        return sorted(found, key=lambda dismissal: self._complaints[dismissal.name].since)


def _counts(fault: Fault, good: int, *, is_online: bool) -> bool:
    match fault:
        case Fault.FALSETICKER:
            return good >= _LEAST_MAJORITY
        case _:
            return good > 0 or is_online
