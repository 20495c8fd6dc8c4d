"""The life of a server: one table of transitions, and the only function that changes a state.

    REGISTERED -> VERIFIED -> CERTIFIED -> ACTIVE <-> SUSPENDED
    without a proved address: REGISTERED again
    any of these -> LEAVING -> REMOVED; LEAVING for a later day -> VERIFIED

Rules:

1. `apply` is the only writer of `Server.state`; each change is an event with actor, reason and time, and its
   people are told.
2. Only proofs and probes raise a state. What an agent says never does.
3. Holds suspend; each is lifted only by its own kind.
4. A name that was sent to DNS is never given again. One that was not is released when it expires.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import Select, and_, bindparam, delete, exists, func, or_, select, true, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import joinedload, selectinload

from nts_core.certificates import renew_at
from nts_core.control import ServerState, Stage, StageStatus
from poolsvc import members, scoring
from poolsvc.config import Settings
from poolsvc.db import queue_for
from poolsvc.errors import (
    AddressTaken,
    ConfusableName,
    InvalidDocument,
    LimitReached,
    NameTaken,
    NotFound,
    WrongState,
)
from poolsvc.models import (
    ENDED_STATES,
    Address,
    Event,
    Hold,
    HoldKind,
    Member,
    MonitorView,
    Order,
    OrderStatus,
    Server,
    StageRecord,
)
from poolsvc.names import check_addresses, check_name, is_label, reserved_lookalike, skeleton
from poolsvc.notices import NoticeKind, announce
from poolsvc.outbound import Guard


class EventKind(StrEnum):
    """What may happen to a server."""

    REGISTERED = "registered"
    ADDRESS_PROVED = "address-proved"
    ADDRESSES_LOST = "addresses-lost"
    CERTIFICATE_SEEN = "certificate-seen"
    NTS_CONFIRMED = "nts-confirmed"
    HOLD_SET = "hold-set"
    HOLDS_LIFTED = "holds-lifted"
    LEAVE = "leave"
    LEAVE_CANCELLED = "leave-cancelled"
    CLOSED = "closed"
    EXPIRED = "expired"
    # These change no state.
    ADDRESS_WITHDRAWN = "address-withdrawn"
    BURNT = "burnt"
    RENEWAL_ORDERED = "renewal-ordered"  # by hand


_S = ServerState
_E = EventKind
TRANSITIONS: dict[tuple[ServerState, EventKind], ServerState] = {
    (_S.REGISTERED, _E.ADDRESS_PROVED): _S.VERIFIED,
    (_S.VERIFIED, _E.CERTIFICATE_SEEN): _S.CERTIFIED,
    (_S.CERTIFIED, _E.NTS_CONFIRMED): _S.ACTIVE,
    (_S.ACTIVE, _E.HOLD_SET): _S.SUSPENDED,
    (_S.SUSPENDED, _E.HOLDS_LIFTED): _S.ACTIVE,
    **{
        (state, _E.ADDRESSES_LOST): _S.REGISTERED
        for state in (_S.VERIFIED, _S.CERTIFIED, _S.ACTIVE, _S.SUSPENDED)
    },
    **{
        (state, _E.LEAVE): _S.LEAVING
        for state in (_S.REGISTERED, _S.VERIFIED, _S.CERTIFIED, _S.ACTIVE, _S.SUSPENDED)
    },
    (_S.LEAVING, _E.LEAVE): _S.LEAVING,  # at once, instead of on a later day
    (_S.LEAVING, _E.LEAVE_CANCELLED): _S.VERIFIED,
    (_S.LEAVING, _E.CLOSED): _S.REMOVED,
    (_S.REGISTERED, _E.EXPIRED): _S.REMOVED,
}

# What the server's people are told of a change.
NOTICES: Mapping[EventKind, NoticeKind] = {
    _E.NTS_CONFIRMED: NoticeKind.ADMITTED,
    _E.HOLD_SET: NoticeKind.SUSPENDED,
    _E.HOLDS_LIFTED: NoticeKind.RECOVERED,
    _E.CLOSED: NoticeKind.REMOVED,
    _E.EXPIRED: NoticeKind.REMOVED,
}

# States in which a server's addresses and CAA are in DNS, and are probed: a suspended one's too, or it could never
# come back.
NAMED_STATES = frozenset({_S.VERIFIED, _S.CERTIFIED, _S.ACTIVE, _S.SUSPENDED})
# Those who leave on a later day may stay after all until then.
LIVING = or_(
    Server.state.not_in(ENDED_STATES),
    and_(Server.state == _S.LEAVING, Server.leave_at.is_not(None), Server.leave_final.is_(False)),
)
_EXPIRED = 50  # at a time
# How far ahead leaving may be scheduled: time enough for clients to go, and not for ever.
LEAVE_AHEAD = (timedelta(hours=3), timedelta(days=90))

# What `poolsvc.journal` writes outside the database, so that a restored one cannot forget it.
_JOURNALLED = frozenset({_E.LEAVE, _E.LEAVE_CANCELLED, _E.CLOSED})


async def apply(
    session: AsyncSession,
    server: Server,
    kind: EventKind,
    *,
    actor: str,
    reason: str,
    now: datetime,
    **told: Any,
) -> None:
    """Move a server along the table, record it, and tell its people, with `told` as data.

    Raises WrongState when the table has no such way.
    """
    after = TRANSITIONS.get((server.state, kind))
    if after is None:
        raise WrongState(f"{server.name} is {server.state}: {kind} does not apply")
    before = {"state": server.state}
    note(session, server, kind, before=before, after={"state": after}, actor=actor, reason=reason, now=now)
    if kind in _JOURNALLED:
        server.journal_due_at = now
    server.state, server.state_since = after, now
    await session.flush()
    if (notice := NOTICES.get(kind)) is not None:
        await tell(session, server, notice, now=now, reason=reason[:300], **told)


def note(
    session: AsyncSession,
    server: Server,
    kind: EventKind,
    *,
    actor: str,
    now: datetime,
    subject: str | None = None,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
    reason: str = "",
) -> None:
    """An event in the log of a server; its subject is the server itself unless another one is named."""
    session.add(
        Event(
            server_id=server.id,
            at=now,
            actor=actor,
            kind=kind,
            subject=subject or f"server {server.id}",
            before=before,
            after=after,
            reason=reason[:300],
        )
    )


async def tell(
    session: AsyncSession, server: Server, kind: NoticeKind, *, now: datetime, **data: Any
) -> None:
    """A notice about a server to its people."""
    await announce(
        session, kind, member_id=server.member_id, server_id=server.id, now=now, server=server.name, **data
    )


async def register(
    session: AsyncSession,
    settings: Settings,
    member_id: int,
    name: str,
    addresses: Sequence[str],
    now: datetime,
    *,
    actor: str,
    agentless: bool = False,
) -> Server:
    """A new server of a member.

    Raises InvalidName, ConfusableName, NameTaken, InvalidAddress, AddressTaken, LimitReached, and WrongState for a
    member that was blocked or closed meanwhile.
    """
    label = check_name(name)
    checked = checked_addresses(settings, addresses)
    member = await members.lock(session, member_id)
    members.must_be_active(member)
    await check_room(session, settings, member)
    await _refuse_hoarding(session, settings, member)
    held = await session.scalar(
        select(Server).where(Server.name == label, Server.released_at.is_(None)).with_for_update()
    )
    if held is not None:
        burnt = held.state is ServerState.REMOVED
        raise NameTaken(
            f"the name {label!r} " + ("was used before and is never given again" if burnt else "is taken"),
            remedy="choose another name",
            field="name",
        )
    await _refuse_lookalike(session, member_id, label)
    await refuse_taken(session, checked)
    server = Server(
        member_id=member_id,
        name=label,
        skeleton=skeleton(label),
        agentless=agentless,
        state=ServerState.REGISTERED,
        state_since=now,
        created_at=now,
    )
    session.add(server)
    await session.flush()
    session.add_all(Address(server_id=server.id, address=address, confirmed_at=now) for address in checked)
    note(session, server, EventKind.REGISTERED, after={"state": server.state}, actor=actor, now=now)
    await session.flush()
    return server


async def check_room(session: AsyncSession, settings: Settings, member: Member) -> None:
    """Raise LimitReached unless a member, which is locked, may have one more server."""
    limit = settings.policy.servers_per_member if member.max_servers is None else member.max_servers
    count = await session.scalar(select(func.count()).where(Server.member_id == member.id, LIVING)) or 0
    if count >= limit:
        raise LimitReached(
            f"a member like this has at most {limit} servers", remedy="remove one, or ask the pool's operator"
        )


async def _refuse_hoarding(session: AsyncSession, settings: Settings, member: Member) -> None:
    """Raise LimitReached for one more registration of a member, which is locked, while several lack a proof."""
    limit = settings.policy.unproved_servers_per_member
    unproved = select(func.count()).where(
        Server.member_id == member.id, Server.state == ServerState.REGISTERED, Server.burnt_at.is_(None)
    )
    if (await session.scalar(unproved) or 0) >= limit:
        raise LimitReached(
            f"the member has {limit} registrations without a proved address, as many as are allowed",
            remedy="prove an address of one of them, or remove it",
        )


async def _refuse_lookalike(session: AsyncSession, member_id: int, label: str) -> None:
    """Raise ConfusableName when people would take the name for the pool's own, or for another member's server.

    A member may have `time1` and `time-1`; nobody is deceived but itself.
    """
    own = skeleton(label)
    resembled = None if (reserved := reserved_lookalike(label)) is None else f"the reserved name {reserved!r}"
    if resembled is None:
        await queue_for(session, f"skeleton {own}")
        others = select(Server.id).where(
            Server.skeleton == own, Server.member_id != member_id, Server.released_at.is_(None)
        )
        if await session.scalar(others.limit(1)) is not None:
            # Which one is not said: names of servers that are not public would be told.
            resembled = "the name of another server"
    if resembled is not None:
        raise ConfusableName(
            f"the name {label!r} looks like {resembled}", remedy="choose another name", field="name"
        )


def checked_addresses(settings: Settings, texts: Sequence[str]) -> list[str]:
    """The addresses of one server, in canonical form, which the registry may dial. Raises InvalidAddress."""
    checked = check_addresses(texts, allow_private=settings.allow_private_addresses)
    guard = Guard(settings)
    for address in checked:
        guard.check(address, settings.ports.http, settings.ports.ke)
    return checked


async def refuse_taken(session: AsyncSession, addresses: Sequence[str]) -> None:
    """Raise AddressTaken when one of these new addresses has an owner."""
    if (taken := await taken_address(session, addresses)) is not None:
        raise AddressTaken(
            f"{taken} belongs to another server of this pool",
            remedy="list the addresses of this server only, or remove the other server first",
            field="addresses",
        )


async def taken_address(
    session: AsyncSession, addresses: Sequence[str], *, besides: int | None = None
) -> str | None:
    """One of the addresses that a server of the pool, `besides` one, has proved: it has one owner from then on.

    An unproved claim keeps nobody out. A server that is to leave on a later day may still change its mind.
    """
    return await session.scalar(
        select(Address.address)
        .join(Server, Server.id == Address.server_id)
        .where(
            Address.address.in_(addresses),
            Address.proved_at.is_not(None),
            Server.id != besides if besides is not None else true(),
            LIVING,
        )
        .limit(1)
    )


async def find(session: AsyncSession, name: str) -> Server:
    """The server that holds, or last held, a name, with everything that `explain` reads."""
    server = None
    if is_label(name):
        found = select(Server).where(Server.name == name.lower()).order_by(Server.id.desc()).limit(1)
        server = await session.scalar(found.options(*WHOLE))
    if server is None:
        raise NotFound(f"there is no server named {name!r}", remedy="check the name")
    return server


async def get(session: AsyncSession, server_id: int) -> Server:
    """A server by id, with everything that `explain` reads, locked for a change.

    As it is once the lock is there, also when the session has seen it before.
    """
    server: Server | None = await session.scalar(_LOCKED, {"server": server_id})
    if server is None:
        raise NotFound("there is no such server")
    return server


async def get_reporting(session: AsyncSession, server_id: int) -> tuple[Server, bool]:
    """A server whose agent reports, as `get` does, and whether its last probe was a full one.

    Without holds and stages, which a report of a server in DNS does not need: reports are most of the API's work.
    """
    found = await session.execute(_REPORTING, {"server": server_id})
    row = found.unique().one_or_none()
    if row is None:
        raise NotFound("there is no such server")
    server, is_full = row
    return server, is_full


def _locked(*columns: Any) -> Select[Any]:
    chosen = select(Server, *columns).where(Server.id == bindparam("server"))
    return chosen.with_for_update(of=Server).execution_options(populate_existing=True)


WHOLE = (
    selectinload(Server.addresses),
    selectinload(Server.orders),
    selectinload(Server.holds),
    selectinload(Server.stages),
)
# Made once each, for they are executed all the time.
_LOCKED = _locked().options(*WHOLE)
_UNMET = exists().where(StageRecord.server_id == Server.id, StageRecord.status != StageStatus.MET)
# Few addresses come with the server's own row, orders with their chains do not.
_REPORTING = _locked(~_UNMET).options(joinedload(Server.addresses), selectinload(Server.orders))


def publishable(server: Server) -> list[Address]:
    """The proved addresses of the families that the member wants published."""
    return [
        row
        for row in server.addresses
        if row.proved_at is not None and is_wanted(row.address, ipv4=server.ipv4, ipv6=server.ipv6)
    ]


def is_wanted(address: str, *, ipv4: bool, ipv6: bool) -> bool:
    """Whether an address is of a family that the member wants published."""
    return ipv6 if ":" in address else ipv4


def published_addresses(server: Server) -> list[str]:
    """The addresses for DNS: the publishable ones, without those that fail while another one serves."""
    return without_failing([(row.address, row.score) for row in publishable(server)])


def without_failing(proved: Sequence[tuple[str, float | None]]) -> list[str]:
    """Those of a server's publishable addresses, with their scores, that are published: the good ones, else all."""
    good = [address for address, score in proved if scoring.is_good(score)]
    return good or [address for address, _ in proved]


def open_holds(server: Server) -> list[Hold]:
    """What holds the server now."""
    return [hold for hold in server.holds if hold.lifted_at is None]


def held(server: Server, kind: HoldKind) -> Hold | None:
    """The hold of a kind that is set now."""
    return next((hold for hold in open_holds(server) if hold.kind is kind), None)


async def set_hold(
    session: AsyncSession, server: Server, kind: HoldKind, *, reason: str, actor: str, now: datetime
) -> None:
    """Suspend a server for one more reason; the same kind twice is one hold."""
    if held(server, kind) is not None:
        return
    server.holds.append(Hold(server_id=server.id, kind=kind, reason=reason[:300], set_at=now))
    if server.state is ServerState.ACTIVE:
        failed = first_failure(server)
        await apply(
            session,
            server,
            EventKind.HOLD_SET,
            actor=actor,
            reason=f"{kind}: {reason}",
            now=now,
            hold=kind,
            # A stage that fails says nothing about a suspension for another reason.
            stage=failed.stage if failed is not None and kind is HoldKind.SCORE else None,
        )


def first_failure(server: Server) -> StageRecord | None:
    """The first stage that the last probe found failed."""
    failed = [row for row in server.stages if row.status is StageStatus.FAILED]
    return min(failed, key=lambda row: tuple(Stage).index(row.stage), default=None)


async def lift_hold(
    session: AsyncSession, server: Server, kind: HoldKind, *, reason: str, actor: str, now: datetime
) -> None:
    """Lift the hold of one kind; the server is ACTIVE again when none is left."""
    if (hold := held(server, kind)) is None:
        return
    hold.lifted_at = now
    if kind is HoldKind.SCORE:
        server.dead_warnings = 0
    if server.state is ServerState.SUSPENDED and not open_holds(server):
        since = server.state_since.isoformat()
        await apply(
            session,
            server,
            EventKind.HOLDS_LIFTED,
            actor=actor,
            reason=reason,
            now=now,
            suspended_at=since,
        )


def may_stay(server: Server) -> bool:
    """Whether a server that leaves has its name until a later day, and may change its mind.

    On that day the worker makes it final, before it does anything that cannot be undone.
    """
    return server.state is ServerState.LEAVING and server.leave_at is not None and not server.leave_final


def newest_certificate(server: Server) -> Order | None:
    """The order of the last certificate that was issued to the server, or seen on one without an agent."""
    return next((order for order in reversed(server.orders) if order.status is OrderStatus.ISSUED), None)


def seen_certificate(server: Server) -> str | None:
    """The fingerprint of its newest certificate that probes found working."""
    seen = (order for order in server.orders if order.seen_at is not None)
    newest = max(seen, key=lambda order: (order.issued_at or order.created_at, order.id), default=None)
    return None if newest is None else newest.fingerprint


def fingerprints(server: Server) -> frozenset[str]:
    """Of its certificates, those whose key nobody else has."""
    return frozenset(
        order.fingerprint
        for order in server.orders
        if order.status is OrderStatus.ISSUED
        and order.compromised_at is None
        and order.fingerprint is not None
    )


def renewal_at(server: Server) -> datetime | None:
    """When the newest certificate is to be renewed; None without one that its agent can use till then."""
    newest = newest_certificate(server)
    if newest is None or newest.not_before is None or newest.not_after is None:
        return None
    is_lost = server.joined_at is not None and newest.created_at < server.joined_at
    if is_lost or newest.compromised_at is not None:
        return None
    return newest.renew_at or renew_at(newest.not_before, newest.not_after)


def await_caa(server: Server) -> None:
    """Nobody orders before every nameserver shows the CAA that is new, and every resolver has forgotten the one before."""
    server.caa_changed = server.caa_changed or server.burnt_at is not None
    server.named_at = server.order_due_at = None


def soonest_order(settings: Settings, server: Server, now: datetime) -> datetime:
    """Each order of a day that came to nothing makes the next one wait longer, also after what would let it begin anew."""
    failed = [
        order.created_at
        for order in server.orders
        if order.status is OrderStatus.FAILED
        and order.url is not None
        and now - order.created_at < timedelta(days=1)
    ]
    return max(failed) + settings.policy.order_wait(len(failed) - 1) if failed else now


async def forget_scores(session: AsyncSession, server: Server, now: datetime) -> None:
    """Only probes raise the server again, from the beginning; a hold for scores that are forgotten is over."""
    await forget_address_scores(session, server.addresses)
    server.dead_warnings = 0
    if (hold := held(server, HoldKind.SCORE)) is not None:
        hold.lifted_at = now


async def forget_address_scores(session: AsyncSession, addresses: Sequence[Address]) -> None:
    """Let no monitor's view of them be worth anything any more."""
    for row in addresses:
        row.score, row.full_probes = None, 0
    views = update(MonitorView).where(MonitorView.address_id.in_([row.id for row in addresses]))
    with session.no_autoflush:
        await session.execute(views.values(score=None, full_probes=0, at=None, silent_since=None))


async def delete_address(session: AsyncSession, row: Address) -> None:
    """An address that the server has no more, with what monitors saw of it."""
    with session.no_autoflush:
        await session.execute(delete(MonitorView).where(MonitorView.address_id == row.id))
    await session.delete(row)


async def leave(
    session: AsyncSession, server: Server, *, actor: str, reason: str, now: datetime, emergency: bool = False
) -> None:
    """Begin to take a server out for good, also one that was to leave later. Repeating it changes nothing.

    Its name lives on until resolvers have forgotten the SRV, since clients come for as long; in an emergency it goes
    as soon as the SRV is out, also when the server leaves in order already.
    """
    if may_stay(server):
        await apply(session, server, EventKind.LEAVE, actor=actor, reason=reason, now=now)
        await tell(session, server, NoticeKind.LEAVING, now=now, reason=reason[:300])
        begin_removal(server, now)
    elif server.state not in ENDED_STATES:
        await _begin_to_leave(session, server, actor=actor, reason=reason, now=now)
        await tell(session, server, NoticeKind.LEAVING, now=now, reason=reason[:300])
        begin_removal(server, now)
        if server.burnt_at is None:
            # It never was in DNS: there is nothing to take out.
            server.srv_withdrawn_at = server.name_broken_at = now
    if emergency and server.state is ServerState.LEAVING:
        server.leave_at, server.removal_due_at = None, now


def begin_removal(server: Server, now: datetime) -> None:
    """The day of a server that was to leave later has come, or its member waits no longer: it cannot stay any more.

    `poolsvc.removal` finds out how long its name has to live yet.
    """
    server.leave_final = True
    server.leave_at = server.removal_due_at = now
    server.order_due_at = None


async def schedule_leave(
    session: AsyncSession,
    server: Server,
    *,
    at: datetime,
    actor: str,
    reason: str,
    now: datetime,
    by_operator: bool = False,
) -> None:
    """Out of the answer at once; name and certificate live until `at`, for the clients that have them.

    One that an operator scheduled is the operators' to cancel.

    Raises InvalidDocument or WrongState.
    """
    least, most = LEAVE_AHEAD
    if not least <= at - now <= most:
        raise InvalidDocument(
            f"leaving is scheduled {least // timedelta(hours=1)} hours to {most.days} days ahead",
            remedy="leave the time out to leave at once",
            field="at",
        )
    if server.state not in NAMED_STATES:
        raise WrongState(
            f"{server.name} is {server.state}: it has no clients who need time",
            remedy="leave at once, or cancel what is scheduled first",
        )
    await _begin_to_leave(session, server, actor=actor, reason=reason, now=now)
    server.leave_at = server.removal_due_at = at
    server.leave_by_operator = by_operator
    scheduled = NoticeKind.LEAVING_SCHEDULED
    await tell(session, server, scheduled, now=now, leave_at=at.isoformat(), reason=reason[:300])


async def _begin_to_leave(
    session: AsyncSession, server: Server, *, actor: str, reason: str, now: datetime
) -> None:
    await apply(session, server, EventKind.LEAVE, actor=actor, reason=reason, now=now)
    server.leave_reason = reason[:300]
    server.probe_due_at = None
    for address in server.addresses:
        address.nonce = address.proof_due_at = None


async def cancel_leave(session: AsyncSession, server: Server, *, actor: str, now: datetime) -> None:
    """Stay after all, while the name lives; only probes raise the server again. Raises WrongState."""
    if not may_stay(server):
        raise WrongState(
            f"{server.name} is {server.state}, and is not to leave on a later day",
            remedy="a removal that has begun is final; register another name",
        )
    announced = None if server.leave_at is None else server.leave_at.isoformat()
    await apply(session, server, EventKind.LEAVE_CANCELLED, actor=actor, reason="it stays after all", now=now)
    server.leave_at = server.leave_reason = server.removal_due_at = server.srv_withdrawn_at = None
    server.leave_by_operator = False
    if (newest := newest_certificate(server)) is not None:
        newest.window_due_at = now  # the CA was asked no more when to renew it
    await forget_scores(session, server, now)
    server.probe_due_at = server.review_due_at = now
    for row in server.addresses:
        # Nobody looked meanwhile: silence does not count.
        row.confirmed_at = now
    if server.named_at is not None:
        # What fell due meanwhile was let go, if the certificate lasted till the end.
        server.order_due_at = server.order_due_at or renewal_at(server) or now
    await tell(session, server, NoticeKind.LEAVING_CANCELLED, now=now, leave_at=announced)


async def expire_unfinished(session: AsyncSession, settings: Settings, now: datetime) -> bool:
    """Free the names of registrations that never proved an address, a bounded number; whether more may be left."""
    oldest = now - timedelta(hours=settings.policy.registration_hours)
    found = await session.scalars(
        select(Server)
        .where(Server.state == ServerState.REGISTERED, Server.burnt_at.is_(None), Server.state_since < oldest)
        .order_by(Server.state_since)
        .limit(_EXPIRED)
        .with_for_update(skip_locked=True)
    )
    stale = list(found)
    for server in stale:
        await apply(
            session, server, EventKind.EXPIRED, actor="worker", reason="no address was proved", now=now
        )
        server.released_at = now
    return len(stale) == _EXPIRED
