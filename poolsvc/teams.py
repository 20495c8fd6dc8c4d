"""Who acts for a member: its people with their roles, and the invitations that bring more of them.

Rules:

1. A member keeps an owner who can act, until it is closed: the last one neither goes nor becomes a technician.
2. An invitation is a secret in a mail, good once and for some days. Whoever brings it is let in, with whatever
   account: people have several addresses, and who reads the mail could make an account with it anyhow.
3. An invitation is made in the same way whether its address has an account or not, so it tells nobody.
4. The address is kept for as long as the invitation is open, and no longer.
5. Who goes takes their open invitations and the member's API tokens of theirs along.
"""

from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, and_, func, select, true
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import selectinload

from poolsvc import auth, members
from poolsvc.config import Settings
from poolsvc.errors import LastOwner, LimitReached, NotFound, OfferOver, TooManyRequests, WrongState
from poolsvc.models import Invitation, Member, MemberRole, Membership, MemberStatus, Token, User
from poolsvc.notices import NoticeKind, announce, write_to

# Of expired invitations whose addresses one pass empties.
_BATCH = 500


async def find(session: AsyncSession, member_id: int, user_id: int) -> Membership:
    """What a person is to a member, with the person. Raises NotFound."""
    membership = await session.scalar(
        select(Membership)
        .where(Membership.member_id == member_id, Membership.user_id == user_id)
        .options(selectinload(Membership.user))
        .execution_options(populate_existing=True)
    )
    if membership is None:
        raise NotFound("nobody with this id acts for the member", remedy="see the list of its users")
    return membership


async def change_role(
    session: AsyncSession, member_id: int, user_id: int, role: MemberRole, now: datetime
) -> None:
    """Make somebody an owner or a technician. Raises NotFound, LastOwner."""
    member = await members.lock(session, member_id)
    membership = await find(session, member_id, user_id)
    if membership.role is MemberRole.OWNER and role is not MemberRole.OWNER:
        await _keep_an_owner(session, member, user_id)
        await _revoke_invitations(session, now, _invited_by(member_id, user_id))
    membership.role = role


async def remove(session: AsyncSession, member_id: int, user_id: int, now: datetime) -> None:
    """End what a person is to a member, at once. All its people are told, they too. Raises NotFound, LastOwner."""
    member = await members.lock(session, member_id)
    membership = await find(session, member_id, user_id)
    if membership.role is MemberRole.OWNER:
        await _keep_an_owner(session, member, user_id)
    await announce(session, NoticeKind.USER_LEFT, member_id=member_id, now=now, user=user_id)
    await _revoke_invitations(session, now, _invited_by(member_id, user_id))
    await auth.revoke(session, now, Token.user_id == user_id, Token.member_id == member_id)
    await session.delete(membership)
    await session.flush()


async def _keep_an_owner(session: AsyncSession, member: Member, leaver: int) -> None:
    """Raise LastOwner when nobody else could act as an owner of a member, which is locked."""
    others = (
        select(func.count())
        .select_from(Membership)
        .join(User)
        .where(
            Membership.member_id == member.id,
            Membership.role == MemberRole.OWNER,
            Membership.user_id != leaver,
            User.blocked_at.is_(None),
            User.erased_at.is_(None),
        )
    )
    if member.status is not MemberStatus.CLOSED and not await session.scalar(others):
        raise LastOwner(
            "this is the member's last owner", remedy="make somebody else an owner first, or close the member"
        )


def is_open(now: datetime) -> ColumnElement[bool]:
    """The condition on invitations that can still be accepted."""
    return and_(
        Invitation.accepted_at.is_(None), Invitation.revoked_at.is_(None), Invitation.expires_at > now
    )


async def invite(
    session: AsyncSession,
    settings: Settings,
    email: str,
    now: datetime,
    *,
    by: int,
    member_id: int | None = None,
    role: MemberRole | None = None,
) -> Invitation:
    """Mail somebody an invitation: to a member, or, without one, to the pool.

    Raises InvalidEmail, LimitReached, TooManyRequests, WrongState.
    """
    address = members.check_email(email)
    if member_id is not None:
        member = await members.lock(session, member_id)
        members.must_be_active(member)
        await _check_limits(session, settings, member, now)
    invitation = Invitation(
        member_id=member_id,
        email=address,
        role=role,
        invited_by=by,
        created_at=now,
        expires_at=now + timedelta(days=settings.policy.invitation_days),
    )
    session.add(invitation)
    await session.flush()
    await write_to(session, NoticeKind.INVITATION, address, now, invitation=invitation.id)
    return invitation


async def _check_limits(session: AsyncSession, settings: Settings, member: Member, now: datetime) -> None:
    policy = settings.policy
    own = select(func.count()).where(Invitation.member_id == member.id)
    if (await session.scalar(own.where(is_open(now))) or 0) >= policy.pending_invitations:
        raise TooManyRequests(
            f"{policy.pending_invitations} invitations of this member are open",
            remedy="wait until one is accepted, or revoke one",
        )
    lately = own.where(Invitation.created_at > now - timedelta(days=1))
    if (await session.scalar(lately) or 0) >= policy.invitations_per_day:
        raise TooManyRequests(
            f"this member made {policy.invitations_per_day} invitations within a day", remedy="wait a day"
        )


async def revoke_invitation(
    session: AsyncSession, member_id: int | None, invitation_id: int, now: datetime
) -> None:
    """Make an invitation of a member, or of the pool, useless. Raises NotFound; OfferOver when it is over."""
    invitation = await _get_invitation(session, invitation_id, lock=True)
    if invitation.member_id != member_id:
        raise NotFound("there is no such invitation", remedy="see the list of invitations")
    _must_be_open(invitation, now)
    invitation.revoked_at, invitation.email = now, None


async def accept(
    session: AsyncSession, settings: Settings, invitation_id: int, user_id: int, now: datetime
) -> Membership:
    """Let the bearer of an invitation into its member; all its people are told. The secret was checked before.

    Raises NotFound, OfferOver, WrongState, LimitReached.
    """
    member_id = (await _get_invitation(session, invitation_id)).member_id
    if member_id is None:
        raise WrongState("this invitation is for people who have no account", remedy="you need none")
    member = await members.lock(session, member_id)
    invitation = await _get_invitation(session, invitation_id, lock=True)
    _must_be_open(invitation, now)
    members.must_be_active(member)
    people = list(await session.scalars(select(Membership.user_id).where(Membership.member_id == member_id)))
    if user_id in people:
        raise WrongState("you act for this member already", remedy="ask one of its owners for another role")
    if len(people) >= settings.policy.people_per_member:
        raise LimitReached(f"the member has {len(people)} people", remedy="somebody has to leave it first")
    invitation.accepted_at, invitation.email = now, None
    role = invitation.role or MemberRole.TECHNICIAN
    membership = Membership(member_id=member_id, user_id=user_id, role=role, created_at=now)
    session.add(membership)
    await session.flush()
    await announce(session, NoticeKind.USER_JOINED, member_id=member_id, now=now, user=user_id, role=role)
    return membership


async def end_invitations(session: AsyncSession, now: datetime, *, member_id: int | None = None) -> None:
    """Revoke what is open of a member that is closed, or of the whole pool."""
    await _revoke_invitations(
        session, now, true() if member_id is None else Invitation.member_id == member_id
    )


async def forget_expired(session: AsyncSession, now: datetime) -> None:
    """Empty the addresses of invitations that nobody accepted in time."""
    expired = select(Invitation).where(Invitation.email.is_not(None), Invitation.expires_at <= now)
    for invitation in await session.scalars(expired.limit(_BATCH).with_for_update(skip_locked=True)):
        invitation.email = None


def _invited_by(member_id: int, user_id: int) -> ColumnElement[bool]:
    return and_(Invitation.member_id == member_id, Invitation.invited_by == user_id)


async def _revoke_invitations(session: AsyncSession, now: datetime, which: ColumnElement[bool]) -> None:
    for invitation in await session.scalars(select(Invitation).where(which, is_open(now)).with_for_update()):
        invitation.revoked_at, invitation.email = now, None


async def _get_invitation(session: AsyncSession, invitation_id: int, *, lock: bool = False) -> Invitation:
    invitation = await session.get(
        Invitation, invitation_id, with_for_update=True if lock else None, populate_existing=True
    )
    if invitation is None:
        raise NotFound("there is no such invitation", remedy="see the list of invitations")
    return invitation


def _must_be_open(invitation: Invitation, now: datetime) -> None:
    over = {
        "accepted": invitation.accepted_at is not None,
        "revoked": invitation.revoked_at is not None,
        "expired": invitation.expires_at <= now,
    }
    if how := [word for word, is_so in over.items() if is_so]:
        raise OfferOver(f"the invitation is {how[0]}", remedy="ask for a new one")
