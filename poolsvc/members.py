"""Accounts: people, and the members that they act for."""

import secrets
from datetime import datetime

from email_validator import EmailNotValidError, validate_email
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from poolsvc import auth
from poolsvc.errors import InvalidEmail, InvalidName, NameTaken
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
    cleaned = check_display_name(name)
    if await session.scalar(select(Member.id).where(Member.name == cleaned)) is not None:
        raise NameTaken(f"there is a member named {cleaned!r}", remedy="choose another name", field="name")
    member = Member(name=cleaned, kind=kind, status=status, created_at=now, opaque_id=secrets.token_hex(8))
    session.add(member)
    await session.flush()
    session.add(Membership(member_id=member.id, user_id=owner.id, role=MemberRole.OWNER, created_at=now))
    await session.flush()
    return member


async def create_operator(
    session: AsyncSession, now: datetime, *, email: str | None = None, name: str = ""
) -> tuple[User, str]:
    """A person who runs the pool, with an API token for their programs."""
    user = await create_user(session, now, email=email, name=name, staff=StaffRole.OPERATOR)
    _, token = await auth.issue(session, TokenKind.API, now=now, user_id=user.id, label="first token")
    return user, token
