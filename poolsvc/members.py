"""Accounts: operators and members, each with a token."""

from datetime import datetime

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from poolsvc import auth
from poolsvc.errors import InvalidName, NameTaken
from poolsvc.models import Member, TokenKind

MAX_NAME = 100


async def create_operator(session: AsyncSession, now: datetime) -> str:
    """A token for an operator of the pool."""
    return await auth.issue(session, TokenKind.OPERATOR, now=now)


async def create(session: AsyncSession, name: str, now: datetime) -> tuple[Member, str]:
    """A new member and its token. Raises InvalidName or NameTaken."""
    cleaned = " ".join(name.split())
    if not 1 <= len(cleaned) <= MAX_NAME or not cleaned.isprintable() or "@" in cleaned:
        raise InvalidName(
            "the member's name is empty, too long, or an e-mail address",
            remedy=f"give a display name of 1 to {MAX_NAME} characters; it may be shown publicly",
            field="name",
        )
    if await session.scalar(select(Member.id).where(Member.name == cleaned)) is not None:
        raise NameTaken(f"there is a member named {cleaned!r}", remedy="choose another name", field="name")
    member = Member(name=cleaned, created_at=now)
    session.add(member)
    await session.flush()
    return member, await auth.issue(session, TokenKind.MEMBER, now=now, member_id=member.id)
