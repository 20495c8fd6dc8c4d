"""Accounts: people, and the members that they act for."""

import secrets
from datetime import datetime

from email_validator import EmailNotValidError, validate_email
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from poolsvc import auth
from poolsvc.config import Settings, SignUp
from poolsvc.errors import Forbidden, InvalidEmail, InvalidName, LimitReached, NameTaken, NotFound, WrongState
from poolsvc.models import (
    Member,
    MemberKind,
    MemberRole,
    Membership,
    MemberStatus,
    StaffRole,
    TokenKind,
    User,
)

MAX_NAME = 100


def check_display_name(name: str, *, field: str = "name") -> str:
    """A name that may be shown publicly. Raises InvalidName."""
    cleaned = " ".join(name.split())
    if not 1 <= len(cleaned) <= MAX_NAME or not cleaned.isprintable() or "@" in cleaned:
        raise InvalidName(
            "the name is empty, too long, or an e-mail address",
            remedy=f"give a display name of 1 to {MAX_NAME} characters; it may be shown publicly",
            field=field,
        )
    return cleaned


def check_email(text: str) -> str:
    """A mail address as it is stored and compared, in lower case. Raises InvalidEmail."""
    try:
        # Whether the domain takes mail is for the mail server to find out.
        found = validate_email(text.strip(), check_deliverability=False, test_environment=True)
    except EmailNotValidError as error:
        raise InvalidEmail(
            f"not a mail address: {error}", remedy="write it as NAME@DOMAIN", field="email"
        ) from None
    return found.normalized.lower()


async def create_user(
    session: AsyncSession,
    now: datetime,
    *,
    email: str | None = None,
    name: str = "",
    staff: StaffRole | None = None,
) -> User:
    """A new person. Raises InvalidEmail, InvalidName, NameTaken when the address has an account."""
    address = None if email is None else check_email(email)
    if address is not None and await session.scalar(select(User.id).where(User.email == address)) is not None:
        raise NameTaken("there is an account with this mail address", remedy="sign in", field="email")
    user = User(email=address, name=check_display_name(name) if name else "", staff=staff, created_at=now)
    session.add(user)
    await session.flush()
    return user


async def create(
    session: AsyncSession,
    name: str,
    now: datetime,
    *,
    owner: User,
    kind: MemberKind = MemberKind.PERSON,
    status: MemberStatus = MemberStatus.ACTIVE,
) -> Member:
    """A new member with its first owner. Raises InvalidName or NameTaken."""
    cleaned = await _free_name(session, name)
    member = Member(name=cleaned, kind=kind, status=status, created_at=now, opaque_id=secrets.token_hex(8))
    session.add(member)
    await session.flush()
    session.add(Membership(member_id=member.id, user_id=owner.id, role=MemberRole.OWNER, created_at=now))
    await session.flush()
    return member


async def _free_name(session: AsyncSession, name: str) -> str:
    cleaned = check_display_name(name)
    if await session.scalar(select(Member.id).where(Member.name == cleaned)) is not None:
        raise NameTaken(f"there is a member named {cleaned!r}", remedy="choose another name", field="name")
    return cleaned


async def found(
    session: AsyncSession, settings: Settings, user_id: int, name: str, kind: MemberKind, now: datetime
) -> Member:
    """A member that a person makes for themself; unless sign-up is open it waits for the operator's approval.

    Raises Forbidden, LimitReached, InvalidName, NameTaken.
    """
    # Locked, so that many requests at once do not found more than one after the other could.
    owner = await session.get_one(User, user_id, with_for_update={"key_share": True})
    if owner.confirmed_at is None:
        raise Forbidden("your mail address is not confirmed", remedy="sign in by a link in a mail first")
    owned = (
        select(func.count())
        .select_from(Membership)
        .join(Member)
        .where(
            Membership.user_id == user_id,
            Membership.role == MemberRole.OWNER,
            Member.status != MemberStatus.CLOSED,
        )
    )
    limit = settings.policy.members_per_person
    if (await session.scalar(owned) or 0) >= limit:
        raise LimitReached(f"you own {limit} members already", remedy="close one of them")
    status = MemberStatus.ACTIVE if settings.sign_up is SignUp.OPEN else MemberStatus.PENDING
    return await create(session, name, now, owner=owner, kind=kind, status=status)


async def get(session: AsyncSession, member_id: int) -> Member:
    """A member by id. Raises NotFound."""
    member = await session.get(Member, member_id)
    if member is None:
        raise NotFound("there is no such member", remedy="check its id")
    return member


async def lock(session: AsyncSession, member_id: int) -> Member:
    """A member by id, as it is now; nobody else changes it, its people or its number of servers meanwhile.

    Members are locked before servers, several of them by ascending id. Raises NotFound.
    """
    member = await session.scalar(
        select(Member)
        .where(Member.id == member_id)
        # Not the key: whoever notes something about the member must not wait.
        .with_for_update(key_share=True)
        .execution_options(populate_existing=True)
    )
    if member is None:
        raise NotFound("there is no such member", remedy="check its id")
    return member


def must_be_active(member: Member) -> None:
    """Raise WrongState for a member, which is locked, that waits for approval, is blocked or closed."""
    if member.status is not MemberStatus.ACTIVE:
        raise WrongState(f"the member is {member.status}", remedy="ask the pool's operator")


async def change(
    session: AsyncSession,
    member_id: int,
    *,
    name: str | None = None,
    kind: MemberKind | None = None,
    public: bool | None = None,
) -> Member:
    """Change what is not None. Raises NotFound, WrongState, InvalidName, NameTaken."""
    member = await lock(session, member_id)
    if member.status is MemberStatus.CLOSED:
        raise WrongState("the member is closed")
    if name is not None and check_display_name(name) != member.name:
        member.name = await _free_name(session, name)
    member.kind = kind or member.kind
    member.public = member.public if public is None else public
    return member


async def create_operator(
    session: AsyncSession, now: datetime, *, email: str | None = None, name: str = ""
) -> tuple[User, str]:
    """A person who runs the pool, with an API token for their programs."""
    user = await create_user(session, now, email=email, name=name, staff=StaffRole.OPERATOR)
    return user, await first_token(session, user, now)


async def first_token(
    session: AsyncSession, user: User, now: datetime, *, member_id: int | None = None
) -> str:
    """An API token for somebody who has none to ask for it with, such as after a restore."""
    _, token = await auth.issue(
        session,
        TokenKind.API,
        now=now,
        user_id=user.id,
        member_id=member_id,
        label="first token",
        expires_at=now + auth.TOKEN_LIFE,
    )
    return token
