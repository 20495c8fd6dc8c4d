"""Reports of monitors: taken whole, in few statements, and told to the servers that they are about.

Most samples say of a healthy server what was known. For those the numbers are brought up to date here, for all servers of a
report at once (`settle`). Whatever may change more than a number is left to `monitoring.judge`, server by server, which
`Server.judge_due_at` calls. Locks are taken in one order everywhere: monitor, servers by id, views.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import bindparam, func, insert, select, true, update
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.control import MonitorReport, MonitorSample, ProbeResult, ServerState, Stage, StageStatus
from nts_core.errors import printable
from poolsvc import monitoring, monitors, reviews, scoring, servers, views
from poolsvc.config import Settings
from poolsvc.db import Database
from poolsvc.errors import InvalidDocument, WrongState
from poolsvc.models import (
    Address,
    MaintenanceWindow,
    Member,
    MemberStatus,
    Monitor,
    MonitorView,
    Order,
    OrderStatus,
    SampleRecord,
    Server,
    StageRecord,
    ViewRole,
)
from poolsvc.monitoring import Judged
from poolsvc.monitors import Council
from poolsvc.verdicts import FRESH
from poolsvc.views import PROBED

# Servers of one report whose certificates are new to the pool: each takes statements of its own.
_MAX_NEW = 50
# What an age may be: what was seen longer ago says nothing of now.
_MAX_AGE = FRESH.total_seconds()
_MAX_SEQUENCE = 2**63 - 1
_LEAST_APART = (
    0.5  # of the spacing between two probes of an address: they begin a little late, and so not all alike
)
_MAX_NS = 10**18  # of what is measured: thirty years
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_SERIAL = re.compile(r"[0-9a-f]{1,64}")
_MAX_LEAF = 8192
_MAX_ID = 2**31
_MAX_SECONDS = 253_370_764_800  # of the year 9999


@dataclass(slots=True)
class _View:
    """A row of `MonitorView` that is read and written in bulk; of others than the reporting monitor only what is judged."""

    address_id: int
    monitor_id: int
    role: ViewRole
    due_at: datetime | None
    at: datetime | None
    score: float | None
    shadow_score: float | None
    full_probes: int
    failed: Stage | None
    silent_since: datetime | None
    detail: str
    step_reason: str
    fingerprint: str | None
    failed_since: datetime | None = None
    points: int = 0
    names: str | None = None
    step: float | None = None
    mean_delay_ns: int | None = None


_OWN = ("failed_since", "points", "mean_delay_ns")
_JUDGED = tuple(
    getattr(MonitorView, field.name) for field in fields(_View) if field.name not in (*_OWN, "step", "names")
)


@dataclass(slots=True)
class _Batch:
    """Servers, locked, with their addresses and what every monitor sees there."""

    servers: Mapping[int, Any]
    addresses: Mapping[int, Any]  # by address
    views: Mapping[int, Sequence[_View]]  # by address

    def of_server(self) -> Mapping[int, list[Any]]:
        """The addresses that are in DNS, by server."""
        found: dict[int, list[Any]] = defaultdict(list)
        for row in self.addresses.values():
            server = self.servers[row.server_id]
            if row.proved_at is not None and servers.is_wanted(
                row.address, ipv4=server.ipv4, ipv6=server.ipv6
            ):
                found[row.server_id].append(row)
        return found


async def take(
    session: AsyncSession, settings: Settings, monitor: Monitor, report: MonitorReport, now: datetime
) -> int:
    """Let a report of a monitor, which is locked, take effect; how many samples counted.

    Raises InvalidDocument, and WrongState for a report that is older than one which is known.
    """
    if not 1 <= report.sequence <= _MAX_SEQUENCE:
        raise InvalidDocument(
            "the sequence is no number from 1 to 2^63 - 1",
            remedy="count reports, or take the time in nanoseconds",
            field="sequence",
        )
    if len(report.samples) > monitors.MAX_SAMPLES:
        raise InvalidDocument(
            f"more than {monitors.MAX_SAMPLES} samples", remedy="send several reports", field="samples"
        )
    if report.sequence == monitor.sequence:
        return monitor.taken
    if report.sequence < monitor.sequence:
        raise WrongState(
            f"report {report.sequence} comes after {monitor.sequence}",
            remedy="let each report have a greater sequence, or ask for a new token",
        )
    monitor.sequence, monitor.program = report.sequence, printable(report.program, 100)
    monitors.note_soundness(
        monitor,
        is_sound=report.sound,
        detail=report.detail,
        has_ipv4=report.ipv4,
        has_ipv6=report.ipv6,
        now=now,
    )
    monitor.taken = await _take(session, settings, monitor, report.samples, now)
    monitor.samples += monitor.taken
    return monitor.taken


async def _take(
    session: AsyncSession,
    settings: Settings,
    monitor: Monitor,
    samples: Sequence[MonitorSample],
    now: datetime,
) -> int:
    if monitor.status not in monitors.WORKING or not monitors.is_sound(monitor):
        return 0
    if not samples or await _is_blocked(session, monitor):
        return 0
    believable = sorted(
        (sample for sample in samples if _is_believable(sample)), key=lambda sample: -sample.age
    )
    targets = {sample.target for sample in believable if 0 < sample.target < _MAX_ID}
    batch = await _batch_of(session, await _servers_of(session, monitor, targets), targets)
    await _complete(session, monitor, batch)
    standing = await monitors.council(session, settings, now)
    windows = await _windows(session, batch, now)
    rows: list[dict[str, Any]] = []
    touched: dict[int, _View] = {}
    last: dict[int, dict[str, Any]] = {}
    shown: dict[int, list[ProbeResult]] = defaultdict(list)
    apart = _LEAST_APART * timedelta(seconds=settings.policy.probe_spacing)
    for view, address, result, at in _counting(monitor, batch, believable, apart, now):
        is_exempt = any(starts <= now and at < ends for starts, ends in windows[address.server_id])
        after = views.after(
            view, result, at, standing.measure, begins_with=address.score, is_exempt=is_exempt
        )
        for name in _KEPT:
            setattr(view, name, after[name])
        touched[view.address_id] = view
        last[view.address_id] = {name: after[name] for name in _MEASURED}
        shown[address.server_id].append(result)
        rows.append(
            {
                "address_id": view.address_id,
                "at": at,
                "monitor": monitor.name,
                "failed": result.failed,
                "step": view.step,
                "score": view.score,
                **last[view.address_id],
            }
        )
    if not rows:
        return 0
    dues = _next_dues(settings, monitor, batch, shown, now)
    for address_id, view in touched.items():
        view.due_at = dues[batch.addresses[address_id].server_id]
    await session.execute(insert(SampleRecord), rows)
    connection = await session.connection()
    await connection.execute(
        _UPDATE_VIEW, [_values(view, last[view.address_id]) for view in touched.values()]
    )
    orders = await _orders(session, batch)
    if monitor.id in standing.own:
        await _note_new(session, orders, shown, now)
    await _settle(session, standing, batch, orders, now)
    return len(rows)


def _counting(
    monitor: Monitor, batch: _Batch, samples: Sequence[MonitorSample], apart: timedelta, now: datetime
) -> Iterator[tuple[_View, Any, ProbeResult, datetime]]:
    """The samples that count, the oldest first: of the monitor's own targets, each so much later than what is known by then.

    No more than probes that were asked for can be: else one monitor could tell of a hundred in a minute.
    """
    mine = {
        view.address_id: view
        for some in batch.views.values()
        for view in some
        if view.monitor_id == monitor.id and view.role is not ViewRole.PAUSED
    }
    for sample in samples:
        view, at = mine.get(sample.target), now - timedelta(seconds=sample.age)
        if view is None or (view.at is not None and not views.is_later(view.at, at, apart, now)):
            continue
        address = batch.addresses[sample.target]
        server = batch.servers[address.server_id]
        is_reached = monitor.ipv6 if ":" in address.address else monitor.ipv4
        is_own = monitor.member_id is not None and monitor.member_id == server.member_id
        is_same = sample.result.address in {"", address.address}
        if is_reached and is_same and not is_own and server.state in servers.NAMED_STATES:
            yield view, address, replace(sample.result, address=address.address), at


async def _is_blocked(session: AsyncSession, monitor: Monitor) -> bool:
    if monitor.member_id is None:
        return False
    status = await session.scalar(select(Member.status).where(Member.id == monitor.member_id))
    return status is not MemberStatus.ACTIVE


def _is_believable(sample: MonitorSample) -> bool:
    """Whether it could be what a probe of late found, and fits the columns."""
    result = sample.result
    figures = (result.offset, result.delay, result.root_distance)
    moments = (result.not_before, result.not_after)
    return (
        0 <= sample.age <= _MAX_AGE
        and all(figure is None or abs(figure) <= _MAX_NS for figure in figures)
        and (result.delay is None or result.delay > 0)
        and all(moment is None or 0 <= moment < _MAX_SECONDS for moment in moments)
        and (result.stratum is None or 0 <= result.stratum <= 255)
        and 0 <= result.cookies <= result.asked <= 1000
        and (result.kiss is None or len(result.kiss) <= 8)
        and (result.failed is None or result.failed in PROBED)
        and (result.failed is not None or result.offset is not None)
        and (result.fingerprint is None or _FINGERPRINT.fullmatch(result.fingerprint) is not None)
        and (result.serial is None or _SERIAL.fullmatch(result.serial) is not None)
        and (result.leaf is None or (len(result.leaf) <= _MAX_LEAF and "\0" not in result.leaf))
    )


async def _servers_of(session: AsyncSession, monitor: Monitor, targets: Collection[int]) -> Sequence[int]:
    """The servers that a report is about, as far as they are the monitor's."""
    found = await session.scalars(
        select(Address.server_id)
        .join(MonitorView, MonitorView.address_id == Address.id)
        .where(MonitorView.monitor_id == monitor.id, MonitorView.address_id.in_(targets))
        .distinct()
    )
    return found.all()


async def _batch_of(
    session: AsyncSession, server_ids: Sequence[int], targets: Collection[int] | None = None
) -> _Batch:
    """Lock these servers, and read what there is of them, or of these addresses of theirs."""
    columns = (
        Server.id,
        Server.member_id,
        Server.state,
        Server.state_since,
        Server.ipv4,
        Server.ipv6,
        Server.judge_due_at,
        Server.probe_due_at,
    )
    locked = await session.execute(
        select(*columns).where(Server.id.in_(server_ids)).order_by(Server.id).with_for_update(of=Server)
    )
    batch = {row.id: row for row in locked}
    found = await session.execute(
        select(
            Address.id,
            Address.server_id,
            Address.address,
            Address.proved_at,
            Address.score,
            Address.unknown,
            Address.confirmed_at,
        ).where(Address.server_id.in_(batch), true() if targets is None else Address.id.in_(targets))
    )
    addresses = {row.id: row for row in found}
    by_address: dict[int, list[_View]] = {identifier: [] for identifier in addresses}
    for values in await session.execute(select(*_JUDGED).where(MonitorView.address_id.in_(addresses))):
        view = _View(*values)
        by_address[view.address_id].append(view)
    return _Batch(batch, addresses, by_address)


async def _complete(session: AsyncSession, monitor: Monitor, batch: _Batch) -> None:
    """Read what else there is of the monitor's own views."""
    mine = {
        view.address_id: view
        for some in batch.views.values()
        for view in some
        if view.monitor_id == monitor.id
    }
    found = await session.execute(
        select(MonitorView.address_id, *(getattr(MonitorView, name) for name in _OWN)).where(
            MonitorView.monitor_id == monitor.id, MonitorView.address_id.in_(mine)
        )
    )
    for address_id, *values in found:
        for name, value in zip(_OWN, values, strict=True):
            setattr(mine[address_id], name, value)


async def _windows(
    session: AsyncSession, batch: _Batch, now: datetime
) -> Mapping[int, Sequence[tuple[datetime, datetime]]]:
    """Maintenance, with begin and end, that a probe of late may have met."""
    ends = func.coalesce(MaintenanceWindow.cancelled_at, MaintenanceWindow.ends_at)
    found = await session.execute(
        select(
            MaintenanceWindow.server_id,
            MaintenanceWindow.starts_at,
            MaintenanceWindow.ends_at,
            MaintenanceWindow.cancelled_at,
        ).where(
            MaintenanceWindow.server_id.in_(batch.servers),
            MaintenanceWindow.starts_at <= now,
            ends > now - FRESH,
        )
    )
    windows: dict[int, list[tuple[datetime, datetime]]] = defaultdict(list)
    for row in found:
        windows[row.server_id].append((row.starts_at, row.cancelled_at or row.ends_at))
    return windows


# What of a view a probe changes; the rest of it stays.
_MEASURED = ("offset_ns", "delay_ns")
_FIXED = ("address_id", "monitor_id", "role", "due_at")
_KEPT = tuple(field.name for field in fields(_View) if field.name not in _FIXED)
_UPDATE_VIEW = (
    update(MonitorView)
    .where(
        MonitorView.address_id == bindparam("of_address"), MonitorView.monitor_id == bindparam("of_monitor")
    )
    .values({name: bindparam(name) for name in (*_KEPT, "due_at", *_MEASURED)})
)


def _values(view: _View, measured: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: getattr(view, name) for name in (*_KEPT, "due_at")}
    return {"of_address": view.address_id, "of_monitor": view.monitor_id, **kept, **measured}


def _next_dues(
    settings: Settings,
    monitor: Monitor,
    batch: _Batch,
    shown: Mapping[int, Sequence[ProbeResult]],
    now: datetime,
) -> dict[int, datetime | None]:
    """When the monitor is to look at each server again: all its addresses at once, and apart from others."""
    by_server: dict[int, list[_View]] = defaultdict(list)
    for address_id, some in batch.views.items():
        by_server[batch.addresses[address_id].server_id].extend(some)
    return {
        server_id: reviews.next_due(settings, monitor.id, batch.servers[server_id], by_server[server_id], now)
        for server_id in shown
    }


async def _orders(session: AsyncSession, batch: _Batch) -> Mapping[int, Sequence[Any]]:
    """The certificates of each server, the newest last."""
    found = await session.execute(
        select(Order.server_id, Order.fingerprint, Order.not_after, Order.seen_at, Order.compromised_at)
        .where(Order.server_id.in_(batch.servers), Order.status == OrderStatus.ISSUED)
        .order_by(Order.id)
    )
    by_server: dict[int, list[Any]] = defaultdict(list)
    for row in found:
        by_server[row.server_id].append(row)
    return by_server


async def _note_new(
    session: AsyncSession,
    orders: Mapping[int, Sequence[Any]],
    shown: Mapping[int, Sequence[ProbeResult]],
    now: datetime,
) -> None:
    """Let certificates be noted that nobody has seen before."""
    left = _MAX_NEW
    for server_id, results in shown.items():
        known = {order.fingerprint for order in orders[server_id]}
        if left and any(each.fingerprint is not None and each.fingerprint not in known for each in results):
            server = await servers.get(session, server_id)
            await monitoring.note_certificates(session, server, results, now)
            left -= 1


async def settle_due(
    database: Database, settings: Settings, server_ids: Sequence[int], now: datetime
) -> list[int]:
    """Judge servers whose time has come, as far as numbers do; those that are left."""
    async with database.transaction() as session:
        batch = await _batch_of(session, server_ids)
        standing = await monitors.council(session, settings, now)
        orders = await _orders(session, batch)
        return await _settle(session, standing, batch, orders, now, is_due=True)


async def _settle(
    session: AsyncSession,
    standing: Council,
    batch: _Batch,
    orders: Mapping[int, Sequence[Any]],
    now: datetime,
    *,
    is_due: bool = False,
) -> list[int]:
    """Bring the numbers of servers up to date of which nothing else changes, and call for a judgement of the others."""
    met = await session.execute(
        select(StageRecord.server_id, func.count().label("stages"))
        .where(StageRecord.server_id.in_(batch.servers), StageRecord.status == StageStatus.MET)
        .group_by(StageRecord.server_id)
    )
    sound = {row.server_id for row in met if row.stages == len(PROBED)}
    in_dns = batch.of_server()
    numbers: list[dict[str, Any]] = []
    later: list[dict[str, Any]] = []
    rest: list[int] = []
    for server_id, server in batch.servers.items():
        current = [monitoring.judged(row, batch.views[row.id], standing, now) for row in in_dns[server_id]]
        usual = _usual(orders[server_id], now)
        if (
            server.state is not ServerState.ACTIVE
            or server_id not in sound
            or not current
            or usual is None
            or not all(_is_steady(each, usual) for each in current)
        ):
            rest.append(server_id)
            continue
        numbers += [_numbers(each, usual, now) for each in current]
        if is_due or server.judge_due_at is None or server.judge_due_at <= now:
            later.append({"of_server": server_id, "due": monitoring.next_look(current, now)})
    connection = await session.connection()
    if numbers:
        await connection.execute(_UPDATE_ADDRESS, numbers)
    if later:
        await connection.execute(_UPDATE_DUE, later)
    if rest and not is_due:
        waiting = update(Server).where(Server.id.in_(rest), Server.state.in_(servers.NAMED_STATES))
        await connection.execute(waiting.values(judge_due_at=now))
    return rest


def _usual(orders: Sequence[Any], now: datetime) -> frozenset[str | None] | None:
    """The certificates that need nothing more to be done when they are seen; None when the newest has ended."""
    if orders and orders[-1].not_after is not None and orders[-1].not_after <= now:
        return None
    return frozenset(
        order.fingerprint for order in orders if order.seen_at is not None and order.compromised_at is None
    )


def _is_steady(each: Judged, usual: frozenset[str | None]) -> bool:
    """Whether no more than the numbers of an address changes."""
    is_known = each.verdict.is_known and each.row.unknown is None
    is_good = scoring.is_good(each.row.score) and scoring.is_good(each.verdict.score)
    is_met = views.first_failure(each.speaking)[0] == len(PROBED)
    return (
        is_known
        and is_good
        and is_met
        and all(view.fingerprint is None or view.fingerprint in usual for view in each.own)
    )


_UPDATE_ADDRESS = (
    update(Address)
    .where(Address.id == bindparam("of_address"))
    .values(
        {
            name: bindparam(name)
            for name in ("score", "shadow_score", "judged_at", "step_reason", "confirmed_at")
        }
    )
)
_UPDATE_DUE = update(Server).where(Server.id == bindparam("of_server")).values(judge_due_at=bindparam("due"))


def _numbers(each: Judged, usual: frozenset[str | None], now: datetime) -> dict[str, Any]:
    seen = [view.at for view in each.own if view.fingerprint in usual and view.at is not None]
    before = [each.row.confirmed_at] if each.row.confirmed_at is not None else []
    return {
        "of_address": each.row.id,
        "score": each.verdict.score,
        "shadow_score": each.shadow,
        "judged_at": now,
        "step_reason": monitoring.deciding(each).step_reason,
        "confirmed_at": max(seen + before, default=None),
    }
