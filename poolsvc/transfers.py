"""Moving a server to another member, which takes both: an owner who offers it and an owner who takes it.

Rules:

1. One offer of a server is open at a time, for some days. It can be taken back, accepted or declined, once.
2. Nobody moves a server without the consent of who gets it. Operators can offer for a member; no more.
3. Neither of the two may be blocked, and who takes it must have room for it.
4. The server goes on as it is: name, agent, certificate, score. Its history goes with it. Join tokens that its
   former member made are void.
"""

from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, and_, or_, select, true
from sqlalchemy.ext.asyncio import AsyncSession

from poolsvc import auth, members, servers
from poolsvc.config import Settings
from poolsvc.errors import NotFound, OfferOver, WrongState
from poolsvc.models import ENDED_STATES, Member, MemberStatus, Server, Token, TokenKind, Transfer
from poolsvc.notices import NoticeKind, announce


def is_open(now: datetime) -> ColumnElement[bool]:
    """The condition on offers that can still be accepted."""
    return and_(Transfer.accepted_at.is_(None), Transfer.declined_at.is_(None), Transfer.expires_at > now)


def concerns(member_id: int) -> ColumnElement[bool]:
    """The condition on offers that a member made or got."""
    return or_(Transfer.from_member_id == member_id, Transfer.to_member_id == member_id)


async def get(session: AsyncSession, transfer_id: int) -> Transfer:
    """An offer by id. Raises NotFound."""
    transfer = await session.get(Transfer, transfer_id)
    if transfer is None:
        raise NotFound("there is no such offer", remedy="see the member's list of transfers")
    return transfer


async def offer(
    session: AsyncSession, settings: Settings, server_id: int, opaque_id: str, now: datetime
) -> Transfer:
    """Offer a server to the member of that opaque id; the people of both are told. Raises NotFound, WrongState."""
    server = await servers.get(session, server_id)
    _must_stay(server)
    target = await session.scalar(
        select(Member).where(Member.opaque_id == opaque_id, Member.status == MemberStatus.ACTIVE)
    )
    if target is None:
        raise NotFound(
            "no member that can take servers has this id", remedy="ask its owner for `opaque_id`", field="to"
        )
    if target.id == server.member_id:
        raise WrongState("the server is this member's already", remedy="name another member", field="to")
    if await _open_offer(session, server, now) is not None:
        raise WrongState(f"{server.name} is offered already", remedy="take that offer back first")
    transfer = Transfer(
        server_id=server.id,
        from_member_id=server.member_id,
        to_member_id=target.id,
        created_at=now,
        expires_at=now + timedelta(days=settings.policy.transfer_days),
    )
    session.add(transfer)
    await session.flush()
    await _tell_both(session, NoticeKind.SERVER_OFFERED, transfer, server, now)
    return transfer


async def take_back(session: AsyncSession, server_id: int, now: datetime) -> Transfer:
    """End the open offer of a server. Raises NotFound."""
    server = await servers.get(session, server_id)
    transfer = await _open_offer(session, server, now)
    if transfer is None:
        raise NotFound(f"{server.name} is offered to nobody")
    transfer.declined_at = now
    return transfer


async def decline(session: AsyncSession, transfer_id: int, now: datetime) -> Transfer:
    """Refuse an offer. Raises NotFound, OfferOver."""
    transfer = await get(session, transfer_id)
    await servers.get(session, transfer.server_id)
    await _must_be_open(session, transfer, now)
    transfer.declined_at = now
    return transfer


async def accept(session: AsyncSession, settings: Settings, transfer_id: int, now: datetime) -> Transfer:
    """Move the server; the people of both members are told.

    Raises NotFound, OfferOver, WrongState, LimitReached.
    """
    transfer = await get(session, transfer_id)
    both = {
        identifier: await members.lock(session, identifier)
        for identifier in sorted((transfer.from_member_id, transfer.to_member_id))
    }
    server = await servers.get(session, transfer.server_id)
    await _must_be_open(session, transfer, now)
    _must_stay(server)
    for member in both.values():
        if member.status is not MemberStatus.ACTIVE:
            raise WrongState("one of the two members is not active", remedy="ask the pool's operator")
    target = both[transfer.to_member_id]
    await servers.check_room(session, settings, target)
    server.member_id, transfer.accepted_at = target.id, now
    # From now on the new member's monitors may not look at it.
    server.review_due_at = now
    if server.agentless:
        # The new member's ACME client has another account; the old one orders no more.
        server.own_account_uri = None
    await auth.revoke(session, now, Token.server_id == server.id, Token.kind == TokenKind.JOIN)
    await _tell_both(session, NoticeKind.SERVER_MOVED, transfer, server, now)
    return transfer


async def end_offers(session: AsyncSession, now: datetime, *, member_id: int | None = None) -> None:
    """Take back what is offered by and to a member that is closed, or in the whole pool."""
    which = true() if member_id is None else concerns(member_id)
    for transfer in await session.scalars(select(Transfer).where(which, is_open(now))):
        transfer.declined_at = now


async def _open_offer(session: AsyncSession, server: Server, now: datetime) -> Transfer | None:
    """The open offer of a server, which is locked: so nobody else answers or makes one meanwhile."""
    found = select(Transfer).where(Transfer.server_id == server.id, is_open(now))
    return await session.scalar(found.execution_options(populate_existing=True))


async def _must_be_open(session: AsyncSession, transfer: Transfer, now: datetime) -> None:
    """Raise OfferOver unless an offer, whose server is locked, can still be answered."""
    await session.refresh(transfer)
    if transfer.accepted_at or transfer.declined_at or transfer.expires_at <= now:
        raise OfferOver("the offer was answered or taken back, or has expired", remedy="ask for a new one")


def _must_stay(server: Server) -> None:
    if server.state in ENDED_STATES:
        raise WrongState(f"{server.name} is {server.state}: it moves no more")


async def _tell_both(
    session: AsyncSession, kind: NoticeKind, transfer: Transfer, server: Server, now: datetime
) -> None:
    for member_id in (transfer.from_member_id, transfer.to_member_id):
        await announce(
            session,
            kind,
            member_id=member_id,
            server_id=server.id,
            now=now,
            server=server.name,
            transfer=transfer.id,
        )
