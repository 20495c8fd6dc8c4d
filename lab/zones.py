"""The zone of a pool of given servers, with one answer drawn."""

from collections.abc import Iterable
from datetime import UTC, datetime

from poolsvc import zone
from poolsvc.drawing import Candidate, Draw, Rules
from poolsvc.zone import ServerRecords, Zone, ZonePolicy

_NOW = datetime(2026, 1, 1, tzinfo=UTC)


def wanted(servers: Iterable[ServerRecords], policy: ZonePolicy, *, is_open: bool, draw: int) -> Zone:
    """As `zone.wanted`, with a draw of that number among the listed ones if the pool is open."""
    present = list(servers)
    candidates = [
        Candidate(one.name, one.member, one.weight) for one in present if one.listed and one.addresses
    ]
    drawn = Draw(candidates, (), Rules(policy.max_targets), draw, _NOW).sets() if is_open else {}
    return zone.wanted(present, policy, {region: sets[0] for region, sets in drawn.items()})
