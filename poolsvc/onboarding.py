"""The queue of servers that wait for their first order, because a CA allows so many new certificates and no more.

Rules:

1. A server that has a certificate for its agent's key never waits: renewals are outside the CA's limits of a domain.
2. Who waits has a round, and in `order_due_at` the time at which its turn comes. Both are kept in its row; what was
   taken of the limits follows from the rows of servers and orders (`poolsvc.budget`).
3. One transaction at a time decides who goes: together, workers never take more than there is.
4. A 429 is kept until the time that it named. It holds back first orders, those under way included.
5. Orders for no certificate, which let others' be revoked, leave a part of the orders for certificates (`authorize`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, and_, case, func, not_, or_, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import selectinload

from nts_core.acme import AcmeAccount, AcmeError, Challenge, PendingOrder
from poolsvc import budget, own_account, servers
from poolsvc.budget import Budget, Grant, Place, Refusal, Waiting
from poolsvc.config import Settings
from poolsvc.db import Database, queue_for
from poolsvc.errors import InvalidDocument
from poolsvc.models import (
    OPEN_ORDERS,
    CaLimits,
    CaRefusal,
    Order,
    OrderStatus,
    RevocationOrder,
    Server,
)

_THING = "the CA's limits"
# How often the queue is looked at without a turn: orders fail, servers leave, the operator is granted more.
LOOK = timedelta(minutes=1)
# As many get a time of their own; more wait behind them.
_PLANNED = 5000
# As many begin in one transaction.
_AT_ONCE = 200
# An order takes what it may come to need, but not from an agent that does nothing for so long.
_PATIENCE = timedelta(hours=1)
_ON_AGENT = (OrderStatus.WANTED, OrderStatus.PENDING)
# One of so many orders is not for revocations.
_KEPT = 4
_MAX_DETAIL = 1000
MAX_NOTE = 200

_WAITS = and_(
    Server.queue_round.is_not(None),
    Server.order_due_at.is_not(None),
    Server.named_at.is_not(None),
    Server.counted_at.is_(None),
    Server.state.in_(servers.NAMED_STATES),
)
# Of such an order no CA with limits has heard.
_FAILED_REHEARSAL = and_(Order.status == OrderStatus.FAILED, Order.rehearsal)
# As `Waiting` sorts.
_TURN = (Server.queue_round, Server.named_at, Server.id)


async def admit(session: AsyncSession, settings: Settings, due: Sequence[int], now: datetime) -> list[Server]:
    """The servers whose order begins now, locked: of those that are due, and of those that wait.

    The others of both have the time of their turn.
    """
    await queue_for(session, _THING)
    going: list[Server] = []
    entering: list[Server] = []
    for server in await _locked(session, due):
        if server.named_at is None and _is_to_certify(server):
            # Out of DNS again, or another CAA is on the way there. Once it is, another time is set.
            server.order_due_at = None
        elif not _is_to_certify(server) or _renews(server):
            going.append(server)
        elif server.counted_at is not None:
            # Its agent has lost the key: nothing but the name's own limits is in the way.
            at = free_at(settings, server, now)
            if at <= now:
                going.append(server)
            else:
                server.order_due_at = at
        else:
            entering.append(server)
    await _enter(session, entering)
    starts = await _plan(session, settings, now)
    turn = [server_id for server_id, at in starts.items() if at <= now][:_AT_ONCE]
    going += await _locked(session, turn, skip_locked=True)
    last = max(starts.values(), default=now)
    unplanned = {row.id: last for row in entering if row.id not in starts}
    await _set_times(session, {key: at for key, at in starts.items() if key not in turn} | unplanned)
    for server in going:
        server.queue_round = None
        if own_account.is_used(server) and _is_to_certify(server):
            # Its member orders when it likes, and the registry sees it late: it is counted now.
            server.counted_at = server.counted_at or now
    return going


async def _locked(session: AsyncSession, ids: Sequence[int], *, skip_locked: bool = False) -> list[Server]:
    """Those of the servers that still want an order.

    Who has locked servers before must not wait for others: somebody may hold these, and wait for those.
    """
    found = await session.scalars(
        select(Server)
        .where(Server.id.in_(ids), Server.order_due_at.is_not(None))
        .order_by(Server.id)
        .options(selectinload(Server.orders))
        .with_for_update(of=Server, skip_locked=skip_locked)
        .execution_options(populate_existing=True)
    )
    return list(found)


def _is_to_certify(server: Server) -> bool:
    """Whether an order would be begun at all."""
    is_under_way = any(order.status in OPEN_ORDERS for order in server.orders)
    return server.state in servers.NAMED_STATES and not is_under_way


def _renews(server: Server) -> bool:
    newest = servers.newest_certificate(server)
    return newest is not None and (server.joined_at is None or newest.created_at >= server.joined_at)


def free_at(settings: Settings, server: Server, now: datetime) -> datetime:
    """When the CA takes another order for the name, by what it has issued and refused for it."""
    limits = settings.ca.limits.terms
    issued = [order.issued_at for order in server.orders if order.issued_at is not None]
    failed = [order.created_at for order in server.orders if _was_looked_at(order)]
    return max(
        budget.fill(limits.same_name, issued, now).there_at(1),
        budget.fill(limits.failed_validations, failed, now).there_at(1),
    )


def _was_looked_at(order: Order) -> bool:
    is_failed = order.status is OrderStatus.FAILED and order.token is not None
    return is_failed and not order.rehearsal


async def _enter(session: AsyncSession, entering: Sequence[Server]) -> None:
    """Give those that have no round one, the first in DNS first; who has had a turn goes behind all who wait."""
    new = [server for server in entering if server.queue_round is None]
    if not new:
        return
    found = await session.execute(select(Server.member_id, Server.queue_round).where(_WAITS))
    rounds = [(row.member_id, row.queue_round or 0) for row in found]
    for server in sorted(new, key=lambda row: (row.named_at, row.id)):
        number = budget.next_round(rounds, server.member_id)
        if server.orders:
            number = max([number, *(waiting + 1 for _, waiting in rounds)])
        server.queue_round = number
        rounds.append((server.member_id, server.queue_round))
    await session.flush()


async def _plan(session: AsyncSession, settings: Settings, now: datetime) -> dict[int, datetime]:
    """The turns of all that wait, as far as they are planned."""
    limits = settings.ca.limits.terms
    columns = (Server.id, Server.member_id, Server.queue_round, Server.named_at)
    rows = list(await session.execute(select(*columns).where(_WAITS).order_by(*_TURN).limit(_PLANNED)))
    if not rows:
        return {}
    failures = await _failures(session, settings, now)
    waiting = [
        Waiting(
            round=row.queue_round or 0,
            since=row.named_at or now,
            server=row.id,
            member=row.member_id,
            ready_at=budget.fill(limits.failed_validations, failures.get(row.id, ()), now).there_at(1),
        )
        for row in rows
    ]
    return budget.plan(waiting, await _stand(session, settings, now), now)


async def _failures(session: AsyncSession, settings: Settings, now: datetime) -> Mapping[int, list[datetime]]:
    """When orders of those that wait were begun, for which the CA found no answer."""
    memory = settings.ca.limits.terms.failed_validations.memory
    found = await session.execute(
        select(Order.server_id, Order.created_at)
        .join(Server, Server.id == Order.server_id)
        .where(
            _WAITS,
            Order.status == OrderStatus.FAILED,
            Order.token.is_not(None),
            Order.created_at > now - memory,
            not_(_FAILED_REHEARSAL),
        )
    )
    failures: dict[int, list[datetime]] = {}
    for row in found:
        failures.setdefault(row.server_id, []).append(row.created_at)
    return failures


async def _set_times(session: AsyncSession, starts: Mapping[int, datetime]) -> None:
    """Give those that wait the time of their turn. Who is busy with something else gets it the next time."""
    found = await session.execute(select(Server.id, Server.order_due_at).where(Server.id.in_(starts), _WAITS))
    moved = [row.id for row in found if row.order_due_at != starts[row.id]]
    free = select(Server.id).where(Server.id.in_(moved), _WAITS).with_for_update(skip_locked=True)
    if ids := list(await session.scalars(free)):
        await session.execute(
            update(Server), [{"id": server_id, "order_due_at": starts[server_id]} for server_id in ids]
        )


async def _stand(session: AsyncSession, settings: Settings, now: datetime) -> Budget:
    limits = settings.ca.limits.terms
    refused = await session.get(CaRefusal, 1)
    certificates = await session.scalars(
        select(Server.counted_at).where(Server.counted_at > now - limits.certificates.memory)
    )
    orders = await session.scalars(
        select(Order.created_at)
        .join(Server, Server.id == Order.server_id)
        .where(
            Order.created_at > now - limits.orders.memory,
            _is_first(),
            # One that was given up before the CA could hear of it has cost nothing.
            or_(Order.csr.is_not(None), Order.status.in_(OPEN_ORDERS)),
            not_(_FAILED_REHEARSAL),
        )
    )
    # Those for no certificate are orders all the same, at the first CA as at any other.
    to_revoke = await session.scalars(
        select(RevocationOrder.created_at).where(
            RevocationOrder.created_at > now - limits.orders.memory, RevocationOrder.ca == settings.ca.name
        )
    )
    return budget.stand(
        limits,
        await _grant(session),
        None if refused is None else Refusal(refused.at, refused.until),
        certificates=[at for at in certificates if at is not None],
        orders=sorted([*orders, *to_revoke]),
        reserved=await _reserved(session, now),
        now=now,
    )


async def _grant(session: AsyncSession) -> Grant | None:
    found = await granted(session)
    return None if found is None else Grant(found.certificates, found.orders, found.until)


def _is_first() -> ColumnElement[bool]:
    """Whether an order is one for a server's first certificate; the others are outside the limit."""
    return or_(Server.counted_at.is_(None), Order.created_at <= Server.counted_at)


async def _reserved(session: AsyncSession, now: datetime) -> int:
    is_waited_for = or_(Order.status.not_in(_ON_AGENT), Order.created_at > now - _PATIENCE)
    count = (
        select(func.count(Order.server_id.distinct()))
        .join(Server, Server.id == Order.server_id)
        .where(
            Order.status.in_(OPEN_ORDERS),
            Server.counted_at.is_(None),
            Server.state.in_(servers.NAMED_STATES),
            is_waited_for,
        )
    )
    return await session.scalar(count) or 0


async def note_refusal(
    database: Database, server: Server, error: AcmeError, now: datetime, until: datetime
) -> None:
    """If the CA has refused a first certificate by a 429, no other one is asked for until then."""
    if error.code == "rate-limited" and server.counted_at is None:
        await _keep_refusal(database, error, now, until)


async def _keep_refusal(database: Database, error: AcmeError, now: datetime, until: datetime) -> None:
    async with database.transaction() as session:
        await queue_for(session, _THING)
        refused = await session.get(CaRefusal, 1)
        if refused is None:
            session.add(CaRefusal(id=1, at=now, until=until, detail=error.detail[:_MAX_DETAIL]))
        elif until > refused.until:
            refused.at, refused.until, refused.detail = now, until, error.detail[:_MAX_DETAIL]


async def authorize(
    database: Database, settings: Settings, account: AcmeAccount, ca: str, domain: str, now: datetime
) -> PendingOrder:
    """An order that proves control of a name in DNS, for no certificate. Raises AcmeError.

    The first CA gets none while few are left: members' certificates come before what was a former member's. Those that
    workers place at the same time do not see each other; what is kept is more than these.
    """
    is_limited = ca == settings.ca.name
    if is_limited:
        async with database.transaction() as session:
            orders = (await _stand(session, settings, now)).orders
        wait = orders.there_at(orders.limit.count // _KEPT + 1) - now
        if wait > timedelta(0):
            detail = "what is left of the CA's orders is kept for certificates"
            raise AcmeError("rate-limited", detail, retry_after=wait.total_seconds())
    try:
        return await account.authorize(domain, Challenge.DNS_01)
    except AcmeError as error:
        if is_limited and error.code == "rate-limited":
            await _keep_refusal(database, error, now, now + timedelta(seconds=error.retry_after or 0))
        raise


async def refusal_for(session: AsyncSession, server: Server, order: Order, now: datetime) -> CaRefusal | None:
    """The 429 to another one that holds back an order which the CA has not seen yet, if there is one."""
    if order.status is not OrderStatus.REQUESTED or server.counted_at is not None:
        return None
    refused = await session.get(CaRefusal, 1)
    return refused if refused is not None and refused.until > now else None


async def place_of(session: AsyncSession, settings: Settings, server: Server) -> Place | None:
    """Where a server stands in the queue, with the limit that holds at its turn; None for one that is not in it."""
    if server.queue_round is None or server.order_due_at is None or server.named_at is None:
        return None
    mine = tuple_(server.queue_round, server.named_at, server.id, types=[column.type for column in _TURN])
    is_ahead = tuple_(*_TURN) < mine
    ahead = func.coalesce(func.sum(case((is_ahead, 1), else_=0)), 0).label("ahead")
    waits = func.coalesce(func.sum(case((Server.id == server.id, 1), else_=0)), 0).label("waits")
    row = (await session.execute(select(func.count().label("all"), ahead, waits).where(_WAITS))).one()
    if not row.waits:
        return None
    limits = budget.grant_to(settings.ca.limits.terms, await _grant(session), server.order_due_at)
    return Place(row.ahead + 1, row.all, server.order_due_at, limits.certificates)


@dataclass(frozen=True, slots=True)
class Queue:
    """How many servers wait, and when the last of them has its turn, as things stand."""

    waiting: int
    last_turn_at: datetime | None

    def wait(self, now: datetime) -> timedelta:
        """How long the last one waits yet."""
        return timedelta(0) if self.last_turn_at is None else max(timedelta(0), self.last_turn_at - now)


async def queue(session: AsyncSession) -> Queue:
    """The queue by the times that were given last, which is a minute ago at most: no plan is made."""
    found = select(func.count(), func.max(Server.order_due_at)).where(_WAITS)
    waiting, last = (await session.execute(found)).one()
    return Queue(waiting, last)


def alarm(settings: Settings, queue: Queue, now: datetime) -> str | None:
    """What the operator is told of a queue that has become too long."""
    if queue.wait(now) <= timedelta(seconds=settings.policy.queue_patience):
        return None
    return f"{queue.waiting} servers wait for the CA's limits, the last until about {queue.last_turn_at:%Y-%m-%d}"


@dataclass(frozen=True, slots=True)
class State:
    """The budget, and who waits for it: all of that for first certificates."""

    budget: Budget
    waiting: int
    last_turn_at: datetime | None  # of those that are planned
    refusal: CaRefusal | None


async def state(session: AsyncSession, settings: Settings, now: datetime) -> State:
    """How things stand, for the operator."""
    starts = await _plan(session, settings, now)
    return State(
        budget=await _stand(session, settings, now),
        waiting=await session.scalar(select(func.count()).where(_WAITS)) or 0,
        last_turn_at=max(starts.values(), default=None),
        refusal=await session.get(CaRefusal, 1),
    )


async def granted(session: AsyncSession, *, lock: bool = False) -> CaLimits | None:
    """What the CA granted; locked for those who change it."""
    if lock:
        await queue_for(session, _THING)
    return await session.get(CaLimits, 1)


async def grant(
    session: AsyncSession,
    *,
    certificates: int | None,
    orders: int | None,
    until: datetime | None,
    note: str,
    now: datetime,
) -> CaLimits:
    """Reckon with these counts, which the CA has granted, in place of the settings'; None leaves the settings'.

    Raises InvalidDocument for a time that has passed, and for a note that is too long for a line.
    """
    if len(note) > MAX_NOTE or not note.isprintable():
        raise InvalidDocument(
            f"the note is not one line of at most {MAX_NOTE} characters", remedy="say less", field="note"
        )
    if until is not None and until <= now:
        raise InvalidDocument(
            "the limits would have ended already", remedy="give a time that is ahead", field="until"
        )
    found = await granted(session, lock=True)
    if found is None:
        found = CaLimits(id=1)
        session.add(found)
    found.certificates, found.orders, found.until, found.note = certificates, orders, until, note
    await session.flush()
    return found
