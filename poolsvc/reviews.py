"""Which monitors look at which server: `vantage` decides, here it is asked and its answer kept.

Each server is reviewed by itself, every `policy.review_interval`; few monitors change at a time. Every monitor that works has a
view of every address that it may look at, if only to glance: by that it is known how near it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import ip_address
from random import SystemRandom
from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import selectinload

from nts_core.control import MonitorStatus, ServerState
from poolsvc import monitors, servers, vantage
from poolsvc.config import Settings
from poolsvc.db import Database
from poolsvc.derived import Purpose, RegistryKey
from poolsvc.models import INNER, Address, Member, MemberStatus, Monitor, MonitorView, Server, ViewRole
from poolsvc.regions import CONTINENT_OF
from poolsvc.vantage import Candidate, Choice, Target

_MAX_MONITORS = 1000
# Nobody is to know a monitor by its hour.
_RANDOM = SystemRandom()
# Within which a new candidate glances first, so that it is soon known how near it is.
_FIRST_GLANCE = timedelta(minutes=20)
_NEW_STATES = frozenset({ServerState.VERIFIED, ServerState.CERTIFIED, ServerState.ACTIVE})


@dataclass(frozen=True, slots=True)
class Explained:
    """What a monitor is for an address, or is to be, and why."""

    address: str
    monitor: str
    role: ViewRole
    reason: str
    is_change: bool = False


def lot_of(key: RegistryKey) -> bytes:
    """The secret of the pool's that draws monitors."""
    return key.secret(Purpose.VANTAGE)


async def review_due(
    database: Database, settings: Settings, key: RegistryKey, server_ids: Sequence[int], now: datetime
) -> None:
    """Choose the monitors of some servers anew."""
    async with database.transaction() as session:
        found = await session.scalars(
            select(Server)
            .where(Server.id.in_(server_ids))
            .order_by(Server.id)
            .options(selectinload(Server.addresses))
            .with_for_update(of=Server)
        )
        await review(session, settings, found.all(), lot_of(key), now)


async def review(
    session: AsyncSession, settings: Settings, some: Sequence[Server], lot: bytes, now: datetime
) -> None:
    """Choose the monitors of servers, which are locked, anew."""
    found = await _views_of(session, some)
    eyes = await _monitors(session)
    for server in some:
        if server.state not in servers.NAMED_STATES:
            server.review_due_at = None
            continue
        for row in servers.publishable(server):
            session.add_all(_review(settings, server, row, eyes, found.get(row.id, {}), lot, now))
        server.review_due_at = now + timedelta(
            seconds=settings.policy.review_interval * _RANDOM.uniform(0.9, 1.1)
        )


def _review(
    settings: Settings,
    server: Server,
    row: Address,
    eyes: Sequence[Monitor],
    mine: Mapping[int, MonitorView],
    lot: bytes,
    now: datetime,
) -> Iterator[MonitorView]:
    """Bring the views of an address in step with what is chosen now; the new ones."""
    working = {monitor.id: monitor.name for monitor in eyes}
    for choice in _choose(server, row, eyes, mine, lot, now):
        view = mine.get(choice.monitor)
        if view is None:
            view = MonitorView(
                address_id=row.id, monitor_id=choice.monitor, full_probes=0, points=0, role_since=now
            )
            yield view
        _give(settings, view, choice, now)
        if working[choice.monitor] == INNER:
            view.due_at = None  # its rounds are `Server.probe_due_at`
    for monitor_id, view in mine.items():
        if monitor_id not in working and view.role is not ViewRole.CANDIDATE:
            view.role, view.role_since, view.role_reason = ViewRole.CANDIDATE, now, "it does not work now"
            view.due_at = None


def _give(settings: Settings, view: MonitorView, choice: Choice, now: datetime) -> None:
    """Let a view be what was chosen; it looks soon when it has more to do than before."""
    view.role_reason = choice.reason[:200]
    is_new = view.role is not choice.role
    if is_new:
        view.role, view.role_since, view.points = choice.role, now, 0
    if choice.role is ViewRole.PAUSED:
        view.due_at = None
        return
    if is_new or view.due_at is None:
        pace = settings.policy.probe_spacing / vantage.LEAST
        most = _FIRST_GLANCE if choice.role is ViewRole.CANDIDATE else timedelta(seconds=vantage.LEAST)
        soon = now + most * pace * _RANDOM.random()
        view.due_at = soon if view.due_at is None else min(view.due_at, soon)


async def present(session: AsyncSession, server: Server) -> Sequence[Explained]:
    """What each monitor is now for each address of a server."""
    found = await session.execute(
        select(Address.address, Monitor.name, MonitorView.role, MonitorView.role_reason)
        .join(MonitorView, MonitorView.address_id == Address.id)
        .join(Monitor, Monitor.id == MonitorView.monitor_id)
        .where(Address.server_id == server.id)
        .order_by(Address.id, Monitor.name)
    )
    return [Explained(row.address, row.name, row.role, row.role_reason) for row in found]


async def explain(session: AsyncSession, server: Server, lot: bytes, now: datetime) -> Sequence[Explained]:
    """What a review would choose now, address by address; changes nothing."""
    present = await _views_of(session, [server])
    eyes = await _monitors(session)
    names = {monitor.id: monitor.name for monitor in eyes}
    found = []
    for row in servers.publishable(server):
        mine = present.get(row.id, {})
        for choice in _choose(server, row, eyes, mine, lot, now):
            view = mine.get(choice.monitor)
            found.append(
                Explained(
                    row.address,
                    names[choice.monitor],
                    choice.role,
                    choice.reason,
                    choice.is_change or view is None,
                )
            )
    return found


async def _views_of(session: AsyncSession, some: Sequence[Server]) -> Mapping[int, Mapping[int, MonitorView]]:
    """By address and monitor."""
    found: dict[int, dict[int, MonitorView]] = {}
    ids = [row.id for server in some for row in server.addresses]
    for view in await session.scalars(select(MonitorView).where(MonitorView.address_id.in_(ids))):
        found.setdefault(view.address_id, {})[view.monitor_id] = view
    return found


async def _monitors(session: AsyncSession) -> Sequence[Monitor]:
    """Those that work and whose members are not blocked."""
    await monitors.inner(session)
    found = await session.scalars(
        select(Monitor)
        .outerjoin(Member, Member.id == Monitor.member_id)
        .where(
            Monitor.status.in_(monitors.WORKING),
            or_(Monitor.member_id.is_(None), Member.status == MemberStatus.ACTIVE),
        )
        .order_by(Monitor.id)
        .limit(_MAX_MONITORS)
    )
    return found.all()


def _choose(
    server: Server,
    row: Address,
    eyes: Sequence[Monitor],
    present: Mapping[int, MonitorView],
    lot: bytes,
    now: datetime,
) -> list[Choice]:
    beside = tuple(ip_address(each.address) for each in server.addresses)
    target = Target(ip_address(row.address), server.member_id, beside)
    candidates = [_candidate(monitor, present.get(monitor.id)) for monitor in eyes]
    return vantage.review(target, candidates, now, lot=lot)


def _candidate(monitor: Monitor, view: MonitorView | None) -> Candidate:
    known = (monitor.ipv4_address, monitor.ipv6_address)
    families = {4: monitor.ipv4, 6: monitor.ipv6}
    return Candidate(
        monitor=monitor.id,
        party=monitors.party_of(monitor),
        is_active=monitor.status is MonitorStatus.ACTIVE,
        addresses=tuple(ip_address(text) for text in known if text is not None),
        families=frozenset(family for family, has in families.items() if has),
        network=monitor.network,
        region=None if monitor.country is None else CONTINENT_OF.get(monitor.country.lower()),
        lost_since=_lost_since(monitor),
        role=ViewRole.CANDIDATE if view is None else view.role,
        points=0 if view is None else view.points,
        mean_delay_ns=None if view is None else view.mean_delay_ns,
    )


def _lost_since(monitor: Monitor) -> datetime | None:
    """Since when nothing sound came from it."""
    if not monitors.is_sound(monitor):
        return monitor.sound_since or monitor.status_since
    return None if monitor.name == INNER else monitor.seen_at or monitor.status_since


def next_due(
    settings: Settings, monitor_id: int, server: Any, views: Sequence[Any], now: datetime
) -> datetime | None:
    """When a monitor is to look at a server again, of which these are all views; None when it may not.

    `server` and `views` are rows, or have their columns. Between two probes of a server lies `policy.probe_spacing`, whoever
    makes them.
    """
    mine = [view for view in views if view.monitor_id == monitor_id]
    roles = {view.monitor_id for view in views if view.role is ViewRole.ACTIVE}
    least = settings.policy.probe_spacing
    age = now - server.state_since if server.state in _NEW_STATES else vantage.NEW
    seconds = [
        vantage.interval(view.role, view.score, monitor=monitor_id, active=len(roles), age=age, least=least)
        for view in mine
    ]
    looking = [each for each in seconds if each is not None]
    if not looking:
        return None
    others = {view.monitor_id: view.due_at for view in views if view.monitor_id != monitor_id}
    taken = [moment for moment in (*others.values(), server.probe_due_at) if moment is not None]
    return vantage.next_probe(now, min(looking), taken, _RANDOM.random, least)
