"""The life of a server: one table of transitions, and the only function that changes a state.

    REGISTERED -> VERIFIED -> CERTIFIED -> ACTIVE <-> SUSPENDED
    any of these -> LEAVING -> REMOVED

Rules:

1. `apply` is the only writer of `Server.state`; each change is an event with actor, reason and time.
2. Only proofs and probes raise a state. What an agent says never does.
3. Holds suspend; each is lifted only by its own kind.
4. A name that was sent to DNS is never given again. One that was not is released when it expires.
"""

from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from enum import StrEnum

from sqlalchemy import func, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import selectinload

from nts_core.control import ServerState
from poolsvc import members, scoring
from poolsvc.config import Settings
from poolsvc.errors import AddressTaken, LimitReached, NameTaken, NotFound, WrongState
from poolsvc.models import Address, Event, Hold, HoldKind, Member, Pool, Server
from poolsvc.names import check_addresses, check_name, is_label
from poolsvc.outbound import Guard


class EventKind(StrEnum):
    """What may happen to a server."""

    REGISTERED = "registered"
    ADDRESS_PROVED = "address-proved"
    CERTIFICATE_SEEN = "certificate-seen"
    NTS_CONFIRMED = "nts-confirmed"
    HOLD_SET = "hold-set"
    HOLDS_LIFTED = "holds-lifted"
    LEAVE = "leave"
    CLOSED = "closed"
    EXPIRED = "expired"


_S = ServerState
_E = EventKind
TRANSITIONS: dict[tuple[ServerState, EventKind], ServerState] = {
    (_S.REGISTERED, _E.ADDRESS_PROVED): _S.VERIFIED,
    (_S.VERIFIED, _E.CERTIFICATE_SEEN): _S.CERTIFIED,
    (_S.CERTIFIED, _E.NTS_CONFIRMED): _S.ACTIVE,
    (_S.ACTIVE, _E.HOLD_SET): _S.SUSPENDED,
    (_S.SUSPENDED, _E.HOLDS_LIFTED): _S.ACTIVE,
    **{
        (state, _E.LEAVE): _S.LEAVING
        for state in (_S.REGISTERED, _S.VERIFIED, _S.CERTIFIED, _S.ACTIVE, _S.SUSPENDED)
    },
    (_S.LEAVING, _E.CLOSED): _S.REMOVED,
    (_S.REGISTERED, _E.EXPIRED): _S.REMOVED,
}

# States in which a server's addresses and CAA are in DNS.
NAMED_STATES = frozenset({_S.VERIFIED, _S.CERTIFIED, _S.ACTIVE, _S.SUSPENDED})
# States from which a server does not come back.
ENDED_STATES = frozenset({_S.LEAVING, _S.REMOVED})
# States in which a server's addresses are probed; a suspended one is, or it could never come back.
PROBED_STATES = NAMED_STATES

# What `poolsvc.journal` writes outside the database, so that a restored one cannot forget it.
_JOURNALLED = frozenset({_E.LEAVE, _E.CLOSED})


async def apply(
    session: AsyncSession, server: Server, kind: EventKind, *, actor: str, reason: str, now: datetime
) -> None:
    """Move a server along the table and record it. Raises WrongState when the table has no such way."""
    after = TRANSITIONS.get((server.state, kind))
    if after is None:
        raise WrongState(f"{server.name} is {server.state}: {kind} does not apply")
    session.add(
        Event(
            server_id=server.id,
            at=now,
            actor=actor,
            kind=kind,
            subject=f"server {server.id}",
            before={"state": server.state},
            after={"state": after},
            reason=reason[:300],
        )
    )
    if kind in _JOURNALLED:
        server.journal_due_at = now
    server.state, server.state_since = after, now
    await session.flush()


async def register(
    session: AsyncSession,
    settings: Settings,
    member_id: int,
    name: str,
    addresses: Sequence[str],
    now: datetime,
    *,
    actor: str,
) -> Server:
    """A new server of a member. Raises InvalidName, NameTaken, InvalidAddress, AddressTaken, LimitReached."""
    label = check_name(name)
    checked = check_addresses(addresses, allow_private=settings.allow_private_addresses)
    guard = Guard(settings)
    for address in checked:
        guard.check(address, settings.ports.http, settings.ports.ke)
    await check_room(session, settings, await members.lock(session, member_id))
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
    if (taken := await taken_address(session, checked)) is not None:
        raise AddressTaken(
            f"{taken} belongs to another server of this pool",
            remedy="list the addresses of this server only, or remove the other server first",
            field="addresses",
        )
    server = Server(
        member_id=member_id, name=label, state=ServerState.REGISTERED, state_since=now, created_at=now
    )
    session.add(server)
    await session.flush()
    session.add_all(Address(server_id=server.id, address=address) for address in checked)
    session.add(
        Event(
            server_id=server.id,
            at=now,
            actor=actor,
            kind=EventKind.REGISTERED,
            subject=f"server {server.id}",
            before=None,
            after={"state": ServerState.REGISTERED},
        )
    )
    await session.flush()
    return server


async def check_room(session: AsyncSession, settings: Settings, member: Member) -> None:
    """Raise LimitReached unless a member, which is locked, may have one more server."""
    limit = settings.policy.servers_per_member if member.max_servers is None else member.max_servers
    living = select(func.count()).where(Server.member_id == member.id, Server.state.not_in(ENDED_STATES))
    if (await session.scalar(living) or 0) >= limit:
        raise LimitReached(
            f"a member like this has at most {limit} servers", remedy="remove one, or ask the pool's operator"
        )


async def taken_address(session: AsyncSession, addresses: Sequence[str]) -> str | None:
    """One of the addresses that a server of the pool has proved: it has one owner from then on.

    An unproved claim keeps nobody out.
    """
    return await session.scalar(
        select(Address.address)
        .join(Server, Server.id == Address.server_id)
        .where(
            Address.address.in_(addresses),
            Address.proved_at.is_not(None),
            Server.state.not_in(ENDED_STATES),
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
    """A server by id, with everything that `explain` reads, locked for a change."""
    server = await session.scalar(
        select(Server).where(Server.id == server_id).options(*WHOLE).with_for_update(of=Server)
    )
    if server is None:
        raise NotFound("there is no such server")
    return server


WHOLE = (
    selectinload(Server.addresses),
    selectinload(Server.orders),
    selectinload(Server.holds),
    selectinload(Server.stages),
)


def published_addresses(server: Server) -> list[str]:
    """The addresses for DNS: the proved ones, without those that fail while another one serves."""
    proved = [address for address in server.addresses if address.proved_at is not None]
    good = [row for row in proved if row.score is None or row.score >= scoring.CUTOFF]
    return [row.address for row in (good or proved)]


async def set_hold(
    session: AsyncSession, server: Server, kind: HoldKind, *, reason: str, actor: str, now: datetime
) -> None:
    """Suspend a server for one more reason; the same kind twice is one hold."""
    if any(hold.kind is kind and hold.lifted_at is None for hold in server.holds):
        return
    server.holds.append(Hold(server_id=server.id, kind=kind, reason=reason[:300], set_at=now))
    if server.state is ServerState.ACTIVE:
        await apply(session, server, EventKind.HOLD_SET, actor=actor, reason=f"{kind}: {reason}", now=now)


async def lift_hold(
    session: AsyncSession, server: Server, kind: HoldKind, *, reason: str, actor: str, now: datetime
) -> None:
    """Lift the holds of one kind; the server is ACTIVE again when none is left."""
    for hold in server.holds:
        if hold.kind is kind and hold.lifted_at is None:
            hold.lifted_at = now
    if server.state is ServerState.SUSPENDED and not any(hold.lifted_at is None for hold in server.holds):
        await apply(session, server, EventKind.HOLDS_LIFTED, actor=actor, reason=reason, now=now)


async def leave(session: AsyncSession, server: Server, *, actor: str, reason: str, now: datetime) -> None:
    """Begin to take a server out for good. Repeating it changes nothing."""
    if server.state in ENDED_STATES:
        return
    await apply(session, server, EventKind.LEAVE, actor=actor, reason=reason, now=now)
    server.leave_reason = reason[:300]
    server.removal_due_at = now
    if server.burnt_at is None:
        # It never was in DNS: there is nothing to take out.
        server.srv_withdrawn_at = server.name_broken_at = now
    server.order_due_at = server.probe_due_at = None
    for address in server.addresses:
        address.nonce = address.proof_due_at = None


async def expire_unfinished(session: AsyncSession, settings: Settings, now: datetime) -> None:
    """Free the names of registrations that never proved an address."""
    oldest = now - timedelta(hours=settings.policy.registration_hours)
    stale = await session.scalars(
        select(Server)
        .where(Server.state == ServerState.REGISTERED, Server.burnt_at.is_(None), Server.state_since < oldest)
        .with_for_update(skip_locked=True)
    )
    for server in stale:
        await apply(
            session, server, EventKind.EXPIRED, actor="worker", reason="no address was proved", now=now
        )
        server.released_at = now


async def the_pool(session: AsyncSession, settings: Settings, *, lock: bool = False) -> Pool:
    """The pool's row, made on first use; locked for those who change it.

    Raises WrongState when the database is of another pool.
    """
    pool = await session.get(Pool, 1, with_for_update=True if lock else None)
    if pool is None:
        # Another process may make the row at the same moment; then its row it is.
        with suppress(IntegrityError):
            async with session.begin_nested():
                session.add(Pool(id=1, domain=settings.pool, epoch=0))
        pool = await session.get_one(Pool, 1, with_for_update=True if lock else None)
    if pool.domain != settings.pool:
        raise WrongState(f"the database is that of the pool {pool.domain}, not of {settings.pool}")
    return pool


async def count_active(session: AsyncSession) -> int:
    return await session.scalar(select(func.count()).where(Server.state == ServerState.ACTIVE)) or 0


async def count_kept_low(session: AsyncSession) -> int:
    """ACTIVE servers without one good address: kept in the answer because too few others are active."""
    good = select(Address.server_id).where(
        or_(Address.score.is_(None), Address.score >= scoring.CUTOFF), Address.proved_at.is_not(None)
    )
    kept = select(func.count()).where(Server.state == ServerState.ACTIVE, Server.id.not_in(good))
    return await session.scalar(kept) or 0
