"""Monitors: who may probe for the pool, who has a say, how many have to agree, and what each is to look at.

Rules:

1. `TRANSITIONS` is the only way a status changes; each change has a reason, and the audit log has it.
2. A monitor has a say while it is active, sound by its own check, and its member is not blocked. One that has no references
   to check itself by is believed only if it is the pool's own.
3. The monitors of one member are one party, with one vote. Each of the pool's own is a party of its own: nobody can lie by
   them but the operator, who need not.
4. What a probe sees of certificates counts only when one of the pool's own has seen it: it ends proofs, lets agents forget
   keys and revokes, which a member's monitor must not be able to do to others. So one of them is always active.
5. The quorum rises by itself, and falls by an operator's word alone.
"""

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from types import MappingProxyType
from typing import Any

import structlog
from sqlalchemy import Select, func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.control import MonitorStatus, MonitorTask, MonitorWork, ServerState
from nts_core.errors import printable
from poolsvc import auth, members, servers, verdicts
from poolsvc.config import Settings
from poolsvc.db import Database
from poolsvc.errors import (
    InvalidDocument,
    InvalidName,
    LimitReached,
    NameTaken,
    NotFound,
    TooManyRequests,
    WrongState,
)
from poolsvc.geo import Geo, Place
from poolsvc.models import (
    INNER,
    Address,
    Event,
    Member,
    MemberStatus,
    Monitor,
    MonitorView,
    Pool,
    Server,
    Token,
    TokenKind,
    ViewRole,
)
from poolsvc.names import is_label
from poolsvc.pool import the_pool
from poolsvc.verdicts import Difference, Quorum, Scorer, View
from poolsvc.views import Measure

_log = structlog.get_logger()
_S = MonitorStatus
TRANSITIONS: Mapping[MonitorStatus, frozenset[MonitorStatus]] = MappingProxyType(
    {
        _S.PENDING: frozenset({_S.TESTING, _S.ENDED}),
        _S.TESTING: frozenset({_S.ACTIVE, _S.PAUSED, _S.ENDED}),
        _S.ACTIVE: frozenset({_S.TESTING, _S.PAUSED, _S.ENDED}),
        _S.PAUSED: frozenset({_S.TESTING, _S.ACTIVE, _S.ENDED}),
        _S.ENDED: frozenset(),
    }
)
# What a member may do to its own without an operator.
BY_OWNERS = frozenset({_S.PAUSED, _S.ENDED})
WORKING = frozenset({_S.TESTING, _S.ACTIVE})
SPEAKING = frozenset({_S.ACTIVE})
MAX_TASKS = 500  # of one answer
MAX_SAMPLES = 500  # of one report
LATE = timedelta(minutes=5)  # without a word, after which a monitor is no reason to raise the quorum
# How long what was handed out is the monitor's: until its report is here, or it has ended.
_LEASE = timedelta(minutes=2)
_SOON = 1.0  # seconds, when there is more to do than one answer holds
_PUT_OFF = 5_000  # views that one question puts off
_ONE_AT_A_TIME = timedelta(seconds=1)  # after which a monitor that was answered 429 asks again
_FEWEST = 2  # who have to agree where others may not look
WORD = timedelta(days=1)  # for which an operator's word on the quorum holds; then it rises by itself again
_NOT_YET = timedelta(minutes=5)  # until a view is looked at again whose server is not to be probed now
_TRIED = 200  # addresses by which it is found out whether a higher quorum would know the servers
_KNOWN_SHARE = 0.9
_MAX_MONITORS = 1000


def is_sound(monitor: Monitor) -> bool:
    """Whether what it sees may be the servers' doing."""
    return monitor.sound is True or (monitor.sound is None and monitor.member_id is None)


def has_family(monitor: Monitor, version: int) -> bool:
    """Whether it reaches others by IPv4, or IPv6."""
    return monitor.ipv6 if version == 6 else monitor.ipv4


def party_of(monitor: Monitor) -> int:
    """Who speaks by it."""
    return -monitor.id if monitor.member_id is None else monitor.member_id


@dataclass(frozen=True, slots=True)
class Council:
    """Who has a say, how many have to agree, and how what they say becomes one score."""

    quorum: Quorum
    approved: Mapping[int, int]  # parties of the monitors that are active, sound or not, by id
    parties: Mapping[int, int]  # of those that have a say
    own: frozenset[int]  # those of the pool's own that work, by whom certificates are known
    heard: int  # parties that have spoken of late
    scorer: Scorer
    shadow: Scorer | None
    measure: Measure
    seeing: Mapping[int, int]  # parties that have a say and reach others by IPv4, by IPv6
    own_families: frozenset[int]  # by which the pool's own reach others

    def why_unseen(self, address: str) -> str | None:
        """Why no quorum can look at an address: too few have its family."""
        version = ip_address(address).version
        if (seeing := self.seeing[version]) >= self.quorum.number:
            return None
        return f"{seeing} of the {self.quorum.number} monitors that it takes have IPv{version}"

    @property
    def is_met(self) -> bool:
        return self.heard >= self.quorum.number

    def quorum_for(self, rows: Iterable[Any]) -> Quorum:
        """The quorum for an address of which these are all views: smaller by those who may never look at it, but two at least.

        Else no server of a member that runs monitors could come in while the pool has few of them. Who is not heard, or not
        sound, counts: for that the quorum falls by an operator's word alone.
        """
        if self.quorum.number <= _FEWEST:
            return self.quorum
        barred = {row.monitor_id for row in rows if row.role is ViewRole.PAUSED} & self.approved.keys()
        if not barred:
            return self.quorum
        everybody = set(self.approved.values())
        able = {party for monitor, party in self.approved.items() if monitor not in barred}
        spare = max(0, len(everybody) - self.quorum.number)
        missing = max(0, len(everybody) - len(able) - spare)
        return replace(self.quorum, number=max(_FEWEST, self.quorum.number - missing))

    def at(self, rows: Iterable[Any]) -> "Council":
        """As it stands for an address of which these are all views."""
        quorum = self.quorum_for(rows)
        return self if quorum is self.quorum else replace(self, quorum=quorum)

    def view(self, row: Any) -> View:
        """A row of `MonitorView`, or what has its columns, as the rules read it; of a monitor without a say, it is none that counts."""
        return View(
            monitor=row.monitor_id,
            party=self.parties.get(row.monitor_id, 0),
            is_active=row.role is ViewRole.ACTIVE and row.monitor_id in self.parties,
            score=row.score,
            full_probes=row.full_probes,
            at=row.at,
            silent_since=row.silent_since,
        )


_WORKING: Select[Monitor] = (
    select(Monitor)
    .outerjoin(Member, Member.id == Monitor.member_id)
    .where(
        Monitor.status.in_(WORKING), or_(Monitor.member_id.is_(None), Member.status == MemberStatus.ACTIVE)
    )
    .limit(_MAX_MONITORS)
)


async def believed(session: AsyncSession) -> Sequence[Monitor]:
    """Those that work, with a say or on trial, and are sound, of members that are not blocked."""
    return [monitor for monitor in await _working(session) if is_sound(monitor)]


async def _working(session: AsyncSession) -> Sequence[Monitor]:
    working = (await session.scalars(_WORKING)).all()
    if not working and (first := await inner(session)).status in WORKING:
        return [first]
    return working


async def council(session: AsyncSession, settings: Settings, now: datetime) -> Council:
    """As it stands now."""
    policy = settings.policy
    working = await _working(session)
    found = [monitor for monitor in working if is_sound(monitor)]
    speaking = [monitor for monitor in found if monitor.status is MonitorStatus.ACTIVE]
    own = [monitor for monitor in found if monitor.member_id is None]
    least = await session.scalar(select(Pool.quorum).where(Pool.id == 1)) or 1
    scorer = verdicts.SCORERS[policy.scorer]
    shadow = None if policy.shadow_scorer is None else verdicts.SCORERS[policy.shadow_scorer]
    return Council(
        quorum=verdicts.quorum(0, least, policy.admission_probes),
        approved={one.id: party_of(one) for one in working if one.status is MonitorStatus.ACTIVE},
        parties={monitor.id: party_of(monitor) for monitor in speaking},
        own=frozenset(monitor.id for monitor in own),
        heard=_heard(speaking, now),
        scorer=scorer,
        shadow=shadow,
        measure=Measure(policy.max_stratum, scorer.rule, None if shadow is None else shadow.rule),
        seeing={
            version: len({party_of(monitor) for monitor in speaking if has_family(monitor, version)})
            for version in (4, 6)
        },
        own_families=frozenset(
            version for version in (4, 6) if any(has_family(monitor, version) for monitor in own)
        ),
    )


def _heard(speaking: Sequence[Monitor], now: datetime) -> int:
    """How many parties have given a sign of life; the registry's own monitor gives one by living."""
    return len(
        {
            party_of(monitor)
            for monitor in speaking
            if monitor.name == INNER or (monitor.seen_at is not None and now - monitor.seen_at <= LATE)
        }
    )


def alarm(standing: Council, unknown: int, amiss: int = 0) -> str | None:
    """What everybody may know of a pool that has too few monitors, for all servers or for some addresses."""
    if not standing.is_met:
        return (
            f"{standing.heard} of the {standing.quorum.number} monitors that have to agree are heard:"
            " no server rises or falls meanwhile, and that is the pool's fault"
        )
    if unknown:
        return (
            f"too few say the same of {unknown} addresses: these neither rise nor fall meanwhile,"
            " and that is the pool's fault"
        )
    if amiss:
        return (
            f"of {amiss} addresses monitors see the name wrong in DNS: an alias, no address, or one that is not the server's;"
            " that is the pool's fault"
        )
    return None


async def raise_quorum(session: AsyncSession, settings: Settings, now: datetime) -> int:
    """Let as many have to agree as can, and never fewer than before; how many that is.

    Only once most servers are known by as many: approval alone must not make the whole pool unknown.
    """
    standing = await council(session, settings, now)
    pool = await the_pool(session, settings)
    if pool.quorum_set_at is not None and now - pool.quorum_set_at < WORD:
        return standing.quorum.number
    wanted = verdicts.quorum(standing.heard, standing.quorum.number, settings.policy.admission_probes)
    if wanted.number > standing.quorum.number and await _would_be_known(session, standing, wanted, now):
        pool = await the_pool(session, settings, lock=True)
        pool.quorum = max(pool.quorum, wanted.number)
        _log.info("quorum_raised", quorum=pool.quorum)
        return pool.quorum
    return standing.quorum.number


async def _would_be_known(session: AsyncSession, standing: Council, wanted: Quorum, now: datetime) -> bool:
    tried = (
        select(Address.id)
        .join(Server, Server.id == Address.server_id)
        .where(Address.score.is_not(None), Server.state == ServerState.ACTIVE)
        .order_by(Address.id.desc())
        .limit(_TRIED)
    )
    ids = list(await session.scalars(tried))
    rows: dict[int, list[MonitorView]] = {identifier: [] for identifier in ids}
    for row in await session.scalars(select(MonitorView).where(MonitorView.address_id.in_(ids))):
        rows[row.address_id].append(row)
    rising = replace(standing, quorum=wanted)
    known = 0
    for some in rows.values():
        said = map(standing.view, some)
        votes = {
            view.party for view in said if view.is_active and view.score is not None and view.is_fresh(now)
        }
        known += len(votes) >= rising.quorum_for(some).number
    return known >= _KNOWN_SHARE * len(ids)


async def set_quorum(
    session: AsyncSession, settings: Settings, number: int, reason: str, *, actor: str, now: datetime
) -> Pool:
    """An operator's word for how many have to agree, with a reason for the log. Raises InvalidDocument."""
    if not 1 <= number <= verdicts.FULL_QUORUM:
        raise InvalidDocument(
            f"the quorum is 1 to {verdicts.FULL_QUORUM}", remedy="more never have to agree", field="quorum"
        )
    pool = await the_pool(session, settings, lock=True)
    event = Event(
        at=now,
        actor=actor,
        kind="quorum-set",
        subject="pool 1",
        before={"quorum": pool.quorum},
        after={"quorum": number},
        reason=reason[:300],
    )
    session.add(event)
    pool.quorum, pool.quorum_set_at = number, now
    await session.flush()
    return pool


async def compare(session: AsyncSession) -> Difference:
    """What the scorer on trial would change in the pool."""
    found = await session.execute(
        select(Server.name, Address.score, Address.shadow_score)
        .join(Address, Address.server_id == Server.id)
        .where(Server.state.in_((ServerState.ACTIVE, ServerState.SUSPENDED)), Address.proved_at.is_not(None))
    )
    return verdicts.compare((row.name, row.score, row.shadow_score) for row in found)


async def count_unknown(session: AsyncSession) -> int:
    """Addresses with a score that too few monitors know now."""
    unknown = (
        select(func.count())
        .select_from(Address)
        .where(Address.unknown.is_not(None), Address.score.is_not(None))
    )
    return await session.scalar(unknown) or 0


async def count_amiss(session: AsyncSession, standing: Council, now: datetime) -> int:
    """Addresses whose names monitors with a say have of late seen to be wrong in DNS: two of them, where there are more."""
    seen = (
        select(MonitorView.address_id)
        .where(
            MonitorView.names.is_not(None),
            MonitorView.at > now - verdicts.FRESH,
            MonitorView.monitor_id.in_(standing.parties),
        )
        .group_by(MonitorView.address_id)
        .having(func.count() >= min(_FEWEST, len(standing.parties)))
        .subquery()
    )
    return await session.scalar(select(func.count()).select_from(seen)) or 0


async def living(session: AsyncSession) -> Sequence[Monitor]:
    """All that have not ended, by name."""
    found = await session.scalars(
        select(Monitor)
        .where(Monitor.status != MonitorStatus.ENDED)
        .order_by(Monitor.name)
        .limit(_MAX_MONITORS)
    )
    return found.all()


async def place(database: Database, geo: Geo) -> None:
    """Find out in which networks and countries monitors are that call from elsewhere; until then they are where they were."""
    async with database.transaction() as session:
        nowhere = {
            monitor.id: address
            for monitor in await living(session)
            if (address := monitor.ipv4_address or monitor.ipv6_address) is not None
            and address != monitor.placed_for
        }
    if not nowhere:
        return
    places = await asyncio.to_thread(_look_up, geo, tuple(nowhere.values()))
    async with database.transaction() as session:
        for monitor_id, address in nowhere.items():
            found = places[address]
            monitor = await session.get_one(Monitor, monitor_id, with_for_update={"key_share": True})
            monitor.network, monitor.country, monitor.placed_for = found.network, found.country, address


def _look_up(geo: Geo, addresses: Sequence[str]) -> Mapping[str, Place]:
    geo.refresh()
    return geo.places(addresses)


async def inner(session: AsyncSession) -> Monitor:
    """The monitor inside the registry, made on first use."""
    query = select(Monitor).where(Monitor.name == INNER)
    if (found := await session.scalar(query)) is not None:
        return found
    now = datetime.now(UTC)
    # Another process may make it at the same moment; then its row it is.
    with suppress(IntegrityError):
        async with session.begin_nested():
            session.add(
                Monitor(
                    name=INNER,
                    status=MonitorStatus.ACTIVE,
                    status_reason="the pool's own, in the registry",
                    status_since=now,
                    created_at=now,
                )
            )
    return (await session.scalars(query)).one()


async def find(session: AsyncSession, name: str, *, lock: bool = False) -> Monitor:
    """Raises NotFound."""
    query = select(Monitor).where(Monitor.name == name.lower()[:40])
    found = await session.scalar(query.with_for_update(key_share=True) if lock else query)
    if found is None:
        raise NotFound(f"there is no monitor named {name[:40]!r}", remedy="check the name")
    return found


async def register(
    session: AsyncSession,
    settings: Settings,
    name: str,
    member_id: int | None,
    now: datetime,
) -> tuple[Monitor, str]:
    """A new monitor with its token, which exists nowhere afterwards; an operator has to approve it.

    Raises InvalidName, NameTaken, LimitReached, WrongState.
    """
    label = name.strip().lower()
    if not is_label(label):
        raise InvalidName(
            "the name is not a host label of at most 36 characters",
            remedy="use letters, digits and hyphens, such as `frankfurt-1`",
            field="name",
        )
    if member_id is not None:
        member = await members.lock(session, member_id)
        members.must_be_active(member)
        await _check_room(session, settings, member)
    if await session.scalar(select(Monitor.id).where(Monitor.name == label)) is not None:
        raise NameTaken(f"there is a monitor named {label!r}", remedy="choose another name", field="name")
    monitor = Monitor(
        name=label,
        member_id=member_id,
        status=MonitorStatus.PENDING,
        status_reason="an operator has to approve it",
        status_since=now,
        created_at=now,
    )
    session.add(monitor)
    await session.flush()
    return monitor, await _issue(session, monitor, now)


async def _check_room(session: AsyncSession, settings: Settings, member: Member) -> None:
    limit = settings.policy.monitors_per_member
    living = select(func.count()).where(Monitor.member_id == member.id, Monitor.status != MonitorStatus.ENDED)
    if (await session.scalar(living) or 0) >= limit:
        raise LimitReached(
            f"a member has at most {limit} monitors, which are one vote", remedy="end one of them"
        )


async def _issue(session: AsyncSession, monitor: Monitor, now: datetime) -> str:
    _, text = await auth.issue(
        session, TokenKind.MONITOR, now=now, monitor_id=monitor.id, member_id=monitor.member_id
    )
    return text


async def renew_token(session: AsyncSession, monitor: Monitor, now: datetime) -> str:
    """A new token; those before it are useless from now on. Raises WrongState."""
    if monitor.status is MonitorStatus.ENDED or monitor.name == INNER:
        raise WrongState(f"{monitor.name} needs no token", remedy="register another monitor, if you want one")
    await auth.revoke(session, now, Token.monitor_id == monitor.id)
    monitor.sequence = 0
    return await _issue(session, monitor, now)


async def set_status(
    session: AsyncSession, monitor: Monitor, status: MonitorStatus, reason: str, now: datetime
) -> None:
    """Move a monitor, which is locked, along the table. The same status again changes the reason. Raises WrongState."""
    if status is not monitor.status:
        if status not in TRANSITIONS[monitor.status]:
            ways = " or ".join(sorted(TRANSITIONS[monitor.status])) or "nothing else"
            raise WrongState(
                f"{monitor.name} is {monitor.status}, and can become {ways}", remedy="choose one of these"
            )
        if monitor.name == INNER and status is MonitorStatus.ENDED:
            raise WrongState("the registry's own monitor does not end", remedy="pause it")
        if monitor.member_id is None and monitor.status is MonitorStatus.ACTIVE:
            await _leave_another(session, monitor)
        monitor.status, monitor.status_since = status, now
        if status is MonitorStatus.ENDED:
            await auth.revoke(session, now, Token.monitor_id == monitor.id)
            await session.execute(
                update(MonitorView).where(MonitorView.monitor_id == monitor.id).values(due_at=None)
            )
    monitor.status_reason = reason[:300]
    await session.flush()


async def end_all(session: AsyncSession, member_id: int, reason: str, now: datetime) -> None:
    """End the monitors of a member. Before its servers are locked: that is the order of locks."""
    found = await session.scalars(
        select(Monitor)
        .where(Monitor.member_id == member_id, Monitor.status != MonitorStatus.ENDED)
        .order_by(Monitor.id)
        .with_for_update(key_share=True)
    )
    for monitor in found.all():
        await set_status(session, monitor, MonitorStatus.ENDED, reason, now)


async def _leave_another(session: AsyncSession, monitor: Monitor) -> None:
    """Raise WrongState unless another one of the pool's own is active: nobody else is believed about certificates."""
    await inner(session)
    others = select(Monitor.id).where(
        Monitor.member_id.is_(None), Monitor.status == MonitorStatus.ACTIVE, Monitor.id != monitor.id
    )
    if await session.scalar(others.limit(1)) is None:
        raise WrongState(
            f"{monitor.name} is the last active one of the pool's own",
            remedy="make another one of the pool's own active first",
        )


async def reporting(session: AsyncSession, monitor_id: int) -> Monitor:
    """A monitor that asks or reports, locked: it does one thing at a time. Raises TooManyRequests while it does another.

    So that one that sends many at once keeps no connection to the database waiting. Reviews may refer to it meanwhile.
    """
    query = select(Monitor).where(Monitor.id == monitor_id).with_for_update(key_share=True, skip_locked=True)
    found = await session.scalar(query.execution_options(populate_existing=True))
    if found is None:
        raise TooManyRequests(
            "the monitor's last request is not answered yet",
            remedy="send one after the other",
            retry_after=_ONE_AT_A_TIME,
        )
    return found


def note_source(monitor: Monitor, source: str, now: datetime) -> None:
    """Where it called from, for each family: it looks at no server beside it."""
    monitor.seen_at = now
    try:
        address = ip_address(source)
    except ValueError:
        return  # no address: a socket of this host
    text = str(address)
    if address.version == 4 and monitor.ipv4_address != text:
        monitor.ipv4_address = text
    elif address.version == 6 and monitor.ipv6_address != text:
        monitor.ipv6_address = text


def note_soundness(
    monitor: Monitor,
    *,
    is_sound: bool | None,
    detail: str,
    has_ipv4: bool,
    has_ipv6: bool,
    now: datetime,
) -> None:
    """What its own check of clock and network says."""
    if monitor.sound is not is_sound or monitor.sound_since is None:
        monitor.sound, monitor.sound_since = is_sound, now
    monitor.sound_detail = printable(detail)[:300]
    monitor.ipv4, monitor.ipv6 = has_ipv4, has_ipv6


def why_idle(monitor: Monitor) -> str:
    """Why it has nothing to do; empty when it works."""
    if monitor.status in WORKING:
        return ""
    return f"{monitor.status}: {monitor.status_reason}"


async def work(session: AsyncSession, settings: Settings, monitor: Monitor, now: datetime) -> MonitorWork:
    """What the monitor, which is locked, is to do until it asks again: what is due until then, and is its own for a while."""
    tasks: list[MonitorTask] = []
    is_more = False
    if monitor.status in WORKING:
        tasks, is_more = await _tasks(session, settings, monitor, now)
    return MonitorWork(
        pool=settings.pool,
        monitor=monitor.name,
        status=monitor.status,
        ke_port=settings.ports.ke,
        poll_after=min(settings.policy.monitor_poll, _SOON) if is_more else settings.policy.monitor_poll,
        nameservers=tuple(settings.dns.nameservers),
        tasks=tuple(tasks),
        reason=why_idle(monitor),
        max_samples=MAX_SAMPLES,
    )


async def _tasks(
    session: AsyncSession, settings: Settings, monitor: Monitor, now: datetime
) -> tuple[list[MonitorTask], bool]:
    """The next tasks, and whether there are more of them at once."""
    horizon = now + timedelta(seconds=settings.policy.monitor_poll)
    mine = (MonitorView.monitor_id == monitor.id, MonitorView.role != ViewRole.PAUSED)
    due = await session.execute(
        select(MonitorView.address_id, MonitorView.due_at, Address.address, Server)
        .join(Address, Address.id == MonitorView.address_id)
        .join(Server, Server.id == Address.server_id)
        .where(*mine, MonitorView.due_at <= horizon, *_to_be_probed())
        .order_by(MonitorView.due_at)
        .limit(MAX_TASKS)
    )
    rows = due.all()
    found = [
        (row, row.Server)
        for row in rows
        if servers.is_wanted(row.address, ipv4=row.Server.ipv4, ipv6=row.Server.ipv6)
        and (monitor.ipv6 if ":" in row.address else monitor.ipv4)
    ]
    everywhere = await _addresses_of(session, [server.id for _, server in found])
    ids = {row.address_id for row, _ in found}
    # What was read and is not handed out would be found again each time.
    await _put_off(session, monitor, ids, horizon + _LEASE)
    await _put_off(session, monitor, {row.address_id for row in rows} - ids, now + _NOT_YET)
    if len(rows) < MAX_TASKS:
        rest = select(MonitorView.address_id).where(*mine, MonitorView.due_at <= now).limit(_PUT_OFF)
        await _put_off(session, monitor, set(await session.scalars(rest)), now + _NOT_YET)
    tasks = [
        MonitorTask(
            target=row.address_id,
            domain=settings.domain_of(server.name),
            address=row.address,
            after=max(0.0, (row.due_at - now).total_seconds()),
            own_addresses=everywhere[server.id],
            own_account=server.agentless or server.own_account_uri is not None,
            spacing=settings.policy.exchange_spacing,
        )
        for row, server in found
    ]
    return tasks, len(rows) == MAX_TASKS


async def _put_off(session: AsyncSession, monitor: Monitor, ids: Collection[int], until: datetime) -> None:
    """Let the monitor's views of these addresses be due then, but for those that somebody is writing at this moment.

    They are locked in the order of their addresses, as everywhere.
    """
    mine = (MonitorView.monitor_id == monitor.id, MonitorView.address_id.in_(sorted(ids)))
    locked = await session.scalars(
        select(MonitorView.address_id)
        .where(*mine)
        .order_by(MonitorView.address_id)
        .with_for_update(skip_locked=True)
    )
    chosen = list(locked)
    if chosen:
        only = (MonitorView.monitor_id == monitor.id, MonitorView.address_id.in_(chosen))
        await session.execute(update(MonitorView).where(*only).values(due_at=until))


def _to_be_probed() -> Sequence[Any]:
    """Of servers that have a certificate, or may have one by now."""
    return (
        Address.proved_at.is_not(None),
        Server.state.in_(servers.NAMED_STATES),
        or_(Server.state != ServerState.VERIFIED, Server.probe_due_at.is_not(None)),
    )


async def _addresses_of(session: AsyncSession, server_ids: Sequence[int]) -> dict[int, tuple[str, ...]]:
    """The addresses in DNS of each server, where its key establishment may send clients."""
    found = await session.execute(
        select(Address.server_id, Address.address, Server.ipv4, Server.ipv6)
        .join(Server, Server.id == Address.server_id)
        .where(Address.server_id.in_(server_ids), Address.proved_at.is_not(None))
    )
    addresses: dict[int, tuple[str, ...]] = {}
    for row in found:
        if servers.is_wanted(row.address, ipv4=row.ipv4, ipv6=row.ipv6):
            addresses[row.server_id] = (*addresses.get(row.server_id, ()), row.address)
    return addresses
