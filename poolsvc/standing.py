"""How members and people stand with the pool: approval, blocks, closing, staff; and what follows for servers.

Rules:

1. A blocked member's servers are held, with a reason by which the end of the block knows its own holds.
   Its people go on reading, exporting and leaving.
2. A member is closed for good. It loses its name, which is free again, since a name may be a person's; its log
   and its servers' receipts stay. Its people keep what they are to it, to be told of its last servers.
3. The pool keeps an operator who can act.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from poolsvc import auth, members, monitors, servers, teams, transfers
from poolsvc.errors import LastOwner, NotFound, WrongState
from poolsvc.models import HoldKind, Member, MemberStatus, Scope, Server, StaffRole, Token, TokenKind, User
from poolsvc.notices import NoticeKind, announce

BLOCK_HOLD = "its member is blocked"
VIEW_LIFE = timedelta(minutes=30)
VIEW_LABEL = "the pool's staff: "


async def approve(session: AsyncSession, member_id: int, now: datetime) -> Member:
    """Let a member that signed up in. Repeating it changes nothing. Raises NotFound, WrongState."""
    member = await members.lock(session, member_id)
    if member.status is MemberStatus.PENDING:
        member.status, member.status_reason = MemberStatus.ACTIVE, None
        await announce(session, NoticeKind.MEMBER_APPROVED, member_id=member.id, now=now)
    elif member.status is not MemberStatus.ACTIVE:
        raise WrongState(f"the member is {member.status}", remedy="unblock it, if it is blocked")
    return member


async def block(session: AsyncSession, member_id: int, reason: str, now: datetime, *, actor: str) -> Member:
    """Suspend a member and all its servers. Repeating it changes the reason. Raises NotFound, WrongState."""
    member = await members.lock(session, member_id)
    if member.status not in (MemberStatus.ACTIVE, MemberStatus.BLOCKED):
        raise WrongState(f"the member is {member.status}", remedy="close it, if it is not to come in")
    if (member.status, member.status_reason) == (MemberStatus.BLOCKED, reason):
        return member
    member.status, member.status_reason = MemberStatus.BLOCKED, reason
    for server in await _living(session, member):
        await servers.set_hold(session, server, HoldKind.OPERATOR, reason=BLOCK_HOLD, actor=actor, now=now)
    await announce(session, NoticeKind.MEMBER_BLOCKED, member_id=member.id, now=now, reason=reason)
    return member


async def unblock(session: AsyncSession, member_id: int, now: datetime, *, actor: str) -> Member:
    """End a block, and the holds that it set. Repeating it changes nothing. Raises NotFound, WrongState."""
    member = await members.lock(session, member_id)
    if member.status is MemberStatus.ACTIVE:
        return member
    if member.status is not MemberStatus.BLOCKED:
        raise WrongState(f"the member is {member.status}, not blocked")
    member.status, member.status_reason = MemberStatus.ACTIVE, None
    for server in await _living(session, member):
        if any(hold.reason == BLOCK_HOLD and hold.lifted_at is None for hold in server.holds):
            await servers.lift_hold(
                session, server, HoldKind.OPERATOR, reason="its member is unblocked", actor=actor, now=now
            )
    await announce(session, NoticeKind.MEMBER_UNBLOCKED, member_id=member.id, now=now)
    return member


async def release(session: AsyncSession, server: Server, now: datetime, *, actor: str) -> None:
    """Lift the operator's hold of one server. While its member is blocked, that of the block takes its place."""
    member = await members.get(session, server.member_id)
    hold = servers.held(server, HoldKind.OPERATOR)
    if member.status is MemberStatus.BLOCKED and hold is not None:
        hold.reason = BLOCK_HOLD
        return
    await servers.lift_hold(
        session, server, HoldKind.OPERATOR, reason="lifted by an operator", actor=actor, now=now
    )


async def close(
    session: AsyncSession, member_id: int, now: datetime, *, actor: str, by: str, remove_servers: bool
) -> Member:
    """Close a member for good. Repeating it changes nothing.

    Raises NotFound; WrongState when it has servers that stay and are not to be removed.
    """
    member = await members.lock(session, member_id)
    if member.status is MemberStatus.CLOSED:
        return member
    await monitors.end_all(session, member.id, "its member was closed", now)
    living = await _living(session, member)
    if living and not remove_servers:
        raise WrongState(
            f"the member has {len(living)} servers in the pool",
            remedy="remove or move them first, or say `remove_servers=true`",
        )
    for server in living:
        await servers.leave(session, server, actor=actor, reason="its member was closed", now=now)
    await transfers.end_offers(session, now, member_id=member.id)
    await teams.end_invitations(session, now, member_id=member.id)
    member.status, member.status_reason = MemberStatus.CLOSED, f"closed by its {by}"
    member.name, member.public = f"closed {member.opaque_id}", False
    return member


async def _living(session: AsyncSession, member: Member) -> Sequence[Server]:
    """The servers of a member, which is locked, that have not left; locked, in order."""
    found = select(Server.id).where(Server.member_id == member.id, servers.LIVING)
    ids = list(await session.scalars(found.order_by(Server.id)))
    return [await servers.get(session, identifier) for identifier in ids]


async def block_user(
    session: AsyncSession, user_id: int, reason: str, *, now: datetime, by: int | None
) -> User:
    """Let a person in no more: their sessions and tokens are refused. Raises NotFound, WrongState, LastOwner."""
    if user_id == by:
        raise WrongState("you cannot block yourself", remedy="ask another operator")
    user = await _lock_user(session, user_id)
    await _keep_an_operator(session, user)
    user.blocked_at, user.blocked_reason = user.blocked_at or now, reason
    return user


async def unblock_user(session: AsyncSession, user_id: int) -> User:
    """Let a person in again. Repeating it changes nothing. Raises NotFound."""
    user = await _lock_user(session, user_id)
    user.blocked_at = user.blocked_reason = None
    return user


async def view_as(
    session: AsyncSession, user_id: int, reason: str, now: datetime, *, by: int | None
) -> tuple[Token, str]:
    """A token that reads what a person can read, and its text. They see it among their own, with the reason.

    It ends soon, with its maker's being staff, or when the person ends it. Raises NotFound, WrongState.
    """
    user = await _lock_user(session, user_id)
    if user.staff is not None:
        raise WrongState("the person is staff", remedy="ask them what they see")
    if user.blocked_at is not None:
        raise WrongState("the person is blocked, and can read nothing", remedy="unblock them first")
    return await auth.issue(
        session,
        TokenKind.API,
        now=now,
        user_id=user.id,
        viewer_id=by,
        scopes={Scope.READ},
        label=f"{VIEW_LABEL}{reason}",
        expires_at=now + VIEW_LIFE,
    )


async def appoint(session: AsyncSession, user_id: int, role: StaffRole | None) -> User:
    """Make somebody staff of the pool, or, with None, no longer. Raises NotFound, WrongState, LastOwner."""
    user = await _lock_user(session, user_id)
    if role is not None and user.blocked_at is not None:
        raise WrongState("the person is blocked", remedy="unblock them first")
    if role is not StaffRole.OPERATOR:
        await _keep_an_operator(session, user)
    user.staff = role
    return user


async def _lock_user(session: AsyncSession, user_id: int) -> User:
    """A person, and with them all operators: two of these must not end each other at once. Raises NotFound."""
    found = await session.scalars(
        select(User)
        .where((User.id == user_id) | (User.staff == StaffRole.OPERATOR))
        .order_by(User.id)
        .with_for_update(key_share=True)
        .execution_options(populate_existing=True)
    )
    user = {row.id: row for row in found}.get(user_id)
    if user is None or user.erased_at is not None:
        raise NotFound("there is no such user", remedy="check the id")
    return user


async def _keep_an_operator(session: AsyncSession, leaver: User) -> None:
    """Raise LastOwner when nobody else could run the pool; the operators are locked."""
    if leaver.staff is not StaffRole.OPERATOR or leaver.blocked_at is not None:
        return
    other = await session.scalar(
        select(User.id)
        .where(
            User.staff == StaffRole.OPERATOR,
            User.id != leaver.id,
            User.blocked_at.is_(None),
            User.erased_at.is_(None),
        )
        .limit(1)
    )
    if other is None:
        raise LastOwner("this is the pool's last operator", remedy="make somebody else an operator first")
