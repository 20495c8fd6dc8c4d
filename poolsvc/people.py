"""A person's own account: their API tokens, all that is kept about them, and its end."""

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Select, delete, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import selectinload

from nts_core.control import ServerState
from poolsvc import auth, members, standing, teams
from poolsvc.auth import Principal
from poolsvc.errors import Forbidden, InvalidDocument, LastOwner, LimitReached, NotFound
from poolsvc.models import (
    Acceptance,
    Delivery,
    DeliveryStatus,
    Event,
    Identity,
    Invitation,
    Membership,
    Scope,
    Server,
    SignIn,
    StaffRole,
    Token,
    TokenKind,
    User,
)

MAX_TOKEN_LIFE = timedelta(days=365)
MAX_TOKENS = 50
MAX_LABEL = 100
# Of an export: an operator of many years has made more changes than one document can hold.
MAX_EVENTS = 10_000
# A token's hash, what is to be served for a proof, and what answers the CA.
_SECRET = frozenset({"sha256", "nonce", "token", "key_authorization"})


def _own(principal: Principal, kind: TokenKind, now: datetime) -> Sequence[Any]:
    """The conditions on the tokens in use that the bearer may see and end."""
    found = [
        Token.user_id == principal.user_id,
        Token.kind == kind,
        Token.revoked_at.is_(None),
        or_(Token.expires_at.is_(None), Token.expires_at > now),
    ]
    if principal.member_id is not None:
        found.append(Token.member_id == principal.member_id)
    return found


def tokens(principal: Principal, kind: TokenKind, now: datetime) -> Select[Token]:
    """The bearer's tokens of a kind that are in use."""
    return select(Token).where(*_own(principal, kind, now))


async def make_token(
    session: AsyncSession,
    principal: Principal,
    *,
    label: str,
    scopes: Collection[Scope],
    member_id: int | None,
    expires_at: datetime | None,
    now: datetime,
) -> tuple[Token, str]:
    """An API token that can do no more, and lives no longer, than the one that asks for it; and its text.

    Raises Forbidden, InvalidDocument, LimitReached.
    """
    label = " ".join(label.split())
    if not 1 <= len(label) <= MAX_LABEL or not label.isprintable():
        raise InvalidDocument(
            "the label is empty, too long, or cannot be shown",
            remedy=f"say in 1 to {MAX_LABEL} characters what the token is for",
            field="label",
        )
    expires_at = expires_at or now + auth.TOKEN_LIFE
    if not now < expires_at <= now + MAX_TOKEN_LIFE:
        raise InvalidDocument(
            "the token's end is in the past, or more than a year ahead",
            remedy="leave it out for 90 days",
            field="expires_at",
        )
    if beyond := set(scopes) - principal.scopes:
        raise Forbidden(
            f"your own token has not the scope {min(beyond)}",
            remedy="leave it out, or sign in",
            field="scopes",
        )
    if member_id is not None and member_id not in principal.members:
        raise Forbidden("you do not act for this member", remedy="name one of yours", field="member")
    if principal.member_id not in (None, member_id):
        raise Forbidden(
            "your own token is for one member only",
            remedy=f"make this one for member {principal.member_id} too, or sign in",
            field="member",
        )
    own = await session.get_one(Token, principal.token_id)
    if principal.kind is TokenKind.API and own.expires_at is not None:
        expires_at = min(expires_at, own.expires_at)
    # The user's row is locked, so that many requests at once do not make more than one after the other could.
    await session.get_one(User, principal.user_id, with_for_update=True)
    there = select(func.count()).select_from(Token).where(*_own(principal, TokenKind.API, now))
    if (await session.scalar(there) or 0) >= MAX_TOKENS:
        raise LimitReached(f"you have {MAX_TOKENS} tokens", remedy="revoke those that nothing uses")
    return await auth.issue(
        session,
        TokenKind.API,
        now=now,
        user_id=principal.user_id,
        member_id=member_id,
        scopes=scopes,
        label=label,
        expires_at=expires_at,
    )


async def make_operator(
    session: AsyncSession, now: datetime, *, email: str | None, name: str
) -> tuple[User, str]:
    """An operator by the console's word, with an API token: somebody new, or who has an account, which keeps its name.

    Raises InvalidEmail, InvalidName, WrongState when the account is blocked.
    """
    address = None if email is None else members.check_email(email)
    known = None if address is None else await session.scalar(select(User.id).where(User.email == address))
    if known is None:
        return await members.create_operator(session, now, email=address, name=name)
    user = await standing.appoint(session, known, StaffRole.OPERATOR)
    return user, await members.first_token(session, user, now)


async def end_token(
    session: AsyncSession, principal: Principal, kind: TokenKind, token_id: int, now: datetime
) -> None:
    """End one of the bearer's tokens. Raises NotFound."""
    if not await auth.revoke(session, now, *_own(principal, kind, now), Token.id == token_id):
        raise NotFound("you have no such token", remedy="see the list; it may have ended")


async def export(session: AsyncSession, user_id: int) -> dict[str, Any]:
    """All that is kept about a person, as JSON has it; hashes and secrets are left out."""

    async def rows(model: Any, *conditions: Any) -> list[dict[str, Any]]:
        found = await session.scalars(select(model).where(*conditions).order_by(model.id))
        return [plain(row) for row in found]

    user = await session.get_one(User, user_id)
    memberships = await session.scalars(
        select(Membership)
        .where(Membership.user_id == user_id)
        .options(selectinload(Membership.member))
        .order_by(Membership.id)
    )
    concerns = or_(Event.user_id == user_id, Event.actor == f"user {user_id}")
    events = await session.scalars(select(Event).where(concerns).order_by(Event.id.desc()).limit(MAX_EVENTS))
    deliveries = await session.scalars(
        select(Delivery)
        .where(Delivery.user_id == user_id)
        .options(selectinload(Delivery.notice))
        .order_by(Delivery.id.desc())
        .limit(MAX_EVENTS)
    )
    return {
        "account": plain(user),
        "memberships": [{**plain(row), "member": row.member.name} for row in memberships],
        "acceptances": await rows(Acceptance, Acceptance.user_id == user_id),
        "identities": await rows(Identity, Identity.user_id == user_id),
        "tokens": await rows(Token, Token.user_id == user_id),
        "sign_ins": await rows(SignIn, SignIn.user_id == user_id),
        "invitations": [] if user.email is None else await rows(Invitation, Invitation.email == user.email),
        "events": [plain(row) for row in events],
        "events_in_all": await session.scalar(select(func.count()).select_from(Event).where(concerns)),
        "deliveries": [
            {**plain(row), "kind": row.notice.kind, "data": row.notice.data} for row in deliveries
        ],
    }


def plain(row: Any) -> dict[str, Any]:
    """A row as an export has it: without what proves something to somebody."""
    return {
        column.key: getattr(row, column.key)
        for column in row.__mapper__.column_attrs
        if column.key not in _SECRET
    }


async def erase(session: AsyncSession, user_id: int, now: datetime) -> None:
    """Forget a person for good: what stays are ids, in the log and in what they accepted. Raises LastOwner.

    A member that nobody owns afterwards is closed, and loses its name, which may be theirs. The pool keeps an operator.
    """
    own = select(Membership.member_id).where(Membership.user_id == user_id).order_by(Membership.member_id)
    for member_id in list(await session.scalars(own)):
        await _leave(session, member_id, user_id, now)
    user = await standing.appoint(session, user_id, None)
    await auth.revoke(session, now, Token.user_id == user_id)
    for identity in await session.scalars(select(Identity).where(Identity.user_id == user_id)):
        await session.delete(identity)
    await session.execute(delete(SignIn).where(SignIn.user_id == user_id))
    await _send_nothing(session, Delivery.user_id == user_id, now)
    if user.email is not None:
        await _forget_address(session, user.email, now)
    user.email, user.name, user.confirmed_at = None, "", None
    user.erased_at = now
    await session.flush()


async def _forget_address(session: AsyncSession, address: str, now: datetime) -> None:
    await session.execute(delete(SignIn).where(SignIn.email == address))
    await _send_nothing(session, Delivery.email == address, now)
    for invitation in await session.scalars(select(Invitation).where(Invitation.email == address)):
        invitation.email, invitation.revoked_at = None, invitation.revoked_at or now


async def _send_nothing(session: AsyncSession, which: ColumnElement[bool], now: datetime) -> None:
    await session.execute(
        update(Delivery)
        .where(which, Delivery.status == DeliveryStatus.PENDING)
        .values(
            status=DeliveryStatus.SUPPRESSED,
            due_at=None,
            done_at=now,
            error="the account was erased",
            email=None,
        )
    )


async def _leave(session: AsyncSession, member_id: int, user_id: int, now: datetime) -> None:
    try:
        await teams.remove(session, member_id, user_id, now)
    except LastOwner:
        # The member stays locked: of its last two owners, who erase themselves at once, one sees the other gone.
        await _close(session, member_id, user_id, now)
        await teams.remove(session, member_id, user_id, now)


async def _close(session: AsyncSession, member_id: int, user_id: int, now: datetime) -> None:
    """Close the member that its last owner leaves. Somebody has to answer for its servers until they are out."""
    member = await members.get(session, member_id)
    living = await session.scalar(
        select(func.count())
        .select_from(Server)
        .where(Server.member_id == member_id, Server.state != ServerState.REMOVED)
    )
    if living:
        raise LastOwner(
            f"you are the last owner of {member.name!r}, which has {living} servers in the pool",
            remedy="make somebody else an owner, or remove the servers and wait for their receipts",
        )
    actor = f"user {user_id}"
    await standing.close(session, member_id, now, actor=actor, by="owner", remove_servers=False)
