"""Addresses of which monitors without a say see the contrary of what those with a say found.

Such a server is good only for its monitors, or its monitors are wrong. Nothing follows of itself: it is for an operator to
look, so monitors that nobody has approved can put no server out.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import and_, func, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.control import ServerState
from poolsvc import monitors, vantage
from poolsvc.config import Settings
from poolsvc.models import Address, Monitor, MonitorView, Server, ViewRole
from poolsvc.monitors import Council
from poolsvc.scoring import CUTOFF, is_good
from poolsvc.vantage import GOOD_STEP, LEAST_AGAINST, REMEMBERED, Glance

MOST = 200  # addresses that are looked at, those with most against them first
_SHOWN = 20  # witnesses of one address
LASTING = timedelta(hours=1)
_UNLISTED = (ViewRole.CANDIDATE, ViewRole.TESTING)


@dataclass(frozen=True, slots=True)
class Witness:
    """A monitor without a say that saw the contrary."""

    monitor: str
    at: datetime
    step: float
    reason: str


@dataclass(frozen=True, slots=True)
class Found:
    """An address on which they disagree; `asked` parties without a say have looked, `against` saw the contrary."""

    address_id: int
    server: str
    address: str
    score: float
    asked: int
    against: int
    witnesses: Sequence[Witness]

    @property
    def is_good(self) -> bool:
        """What those with a say found."""
        return is_good(self.score)


async def look(session: AsyncSession, settings: Settings, now: datetime) -> Sequence[Found]:
    """All that there are, by server; of more than `MOST` those with most against them."""
    believed = {monitor.id: monitor for monitor in await monitors.believed(session)}
    standing = await monitors.council(session, settings, now)
    contrary = or_(
        and_(Address.score >= CUTOFF, MonitorView.step < GOOD_STEP),
        and_(Address.score < CUTOFF, MonitorView.step >= GOOD_STEP),
    )
    suspects = await session.execute(
        select(Address.id, Address.address, Address.score, Server.name)
        .join(Server, Server.id == Address.server_id)
        .join(MonitorView, MonitorView.address_id == Address.id)
        .where(
            Server.state.in_((ServerState.ACTIVE, ServerState.SUSPENDED)),
            Address.proved_at.is_not(None),
            Address.unknown.is_(None),
            MonitorView.role.in_(_UNLISTED),
            MonitorView.monitor_id.in_(believed),
            MonitorView.at >= now - REMEMBERED,
            contrary,
        )
        .group_by(Address.id, Address.address, Address.score, Server.name)
        .having(func.count() >= LEAST_AGAINST)
        .order_by(func.count().desc(), Address.id)
        .limit(MOST)
    )
    rows = {row.id: row for row in suspects}
    views: dict[int, list[MonitorView]] = defaultdict(list)
    for view in await session.scalars(select(MonitorView).where(MonitorView.address_id.in_(rows))):
        views[view.address_id].append(view)
    found = [
        each
        for row in rows.values()
        if (each := _judge(row, views[row.id], standing, believed, now)) is not None
    ]
    return sorted(found, key=lambda each: (each.server, each.address))


def _judge(
    row: Any,
    views: Iterable[MonitorView],
    standing: Council,
    believed: Mapping[int, Monitor],
    now: datetime,
) -> Found | None:
    """What the views of one address come to; None where nobody disagrees."""
    listed: list[float] = []
    others: list[Witness] = []
    glances: list[Glance] = []
    for view in views:
        if view.step is None or view.at is None or view.monitor_id not in believed:
            continue
        seen = standing.view(view)
        if seen.is_active and seen.is_fresh(now):
            listed.append(view.step)
        elif view.role in _UNLISTED:
            by = believed[view.monitor_id]
            others.append(Witness(by.name, view.at, view.step, view.step_reason))
            glances.append(Glance(monitors.party_of(by), view.step, view.at))
    verdict = vantage.disagreement(borne_out(row.score, listed), glances, now)
    if not verdict.is_flagged:
        return None
    against = [each for each in others if (each.step >= GOOD_STEP) is not is_good(row.score)]
    return Found(
        address_id=row.id,
        server=row.name,
        address=row.address,
        score=row.score,
        asked=verdict.asked,
        against=verdict.against,
        witnesses=sorted(against, key=lambda each: each.monitor)[:_SHOWN],
    )


def borne_out(score: float, steps: Iterable[float]) -> float | None:
    """The score, if what those with a say saw last bears it out; None of one on its way up or down, or not looked at.

    A score needs hours to say of a server what every monitor sees at once.
    """
    good = [step >= GOOD_STEP for step in steps]
    agreeing = sum(each is is_good(score) for each in good)
    return score if 2 * agreeing > len(good) else None


class Vigil:
    """Since when this process has seen each disagreement: what goes by is worth no alarm."""

    def __init__(self) -> None:
        self._since: dict[int, datetime] = {}
        self._last: Sequence[Found] = ()

    def note(self, found: Sequence[Found], now: datetime) -> None:
        """What a look found."""
        self._since = {each.address_id: self._since.get(each.address_id, now) for each in found}
        self._last = found

    def count(self, *, is_good: bool) -> int:
        """Servers that are good, or bad, for those with a say, and the contrary for others, at the last look."""
        return len({each.server for each in self._last if each.is_good is is_good})

    def alarms(self, now: datetime) -> list[str]:
        """What has lasted for an hour."""
        lasting = [each for each in self._last if now - self._since[each.address_id] >= LASTING]
        texts = []
        for found, contrary in (("good", "bad"), ("bad", "good")):
            count = len({each.server for each in lasting if each.is_good is (found == "good")})
            if count:
                noun = "1 server looks" if count == 1 else f"{count} servers look"
                texts.append(f"{noun} {found} to monitors with a say and {contrary} to others, for an hour")
        return texts
