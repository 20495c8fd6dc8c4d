"""Who is asking, and what they may do: bearer tokens, stored as hashes, and one permission table."""

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from poolsvc.errors import Forbidden, TokenExpired, TokenUsed, Unauthenticated
from poolsvc.models import Server, Token, TokenKind


class Operation(StrEnum):
    """What the API lets people and programs do."""

    CREATE_MEMBER = "create-member"
    REGISTER_SERVER = "register-server"
    READ_SERVER = "read-server"
    REMOVE_SERVER = "remove-server"
    JOIN = "join"
    AGENT = "agent"


# A member's operations reach its own servers only, a join or agent token exactly one.
PERMISSIONS: dict[Operation, frozenset[TokenKind]] = {
    Operation.CREATE_MEMBER: frozenset({TokenKind.OPERATOR}),
    Operation.REGISTER_SERVER: frozenset({TokenKind.MEMBER}),
    Operation.READ_SERVER: frozenset({TokenKind.OPERATOR, TokenKind.MEMBER}),
    Operation.REMOVE_SERVER: frozenset({TokenKind.OPERATOR, TokenKind.MEMBER}),
    Operation.JOIN: frozenset({TokenKind.JOIN}),
    Operation.AGENT: frozenset({TokenKind.AGENT}),
}


@dataclass(frozen=True, slots=True)
class Principal:
    """The bearer of a valid token."""

    token_id: int
    kind: TokenKind
    member_id: int | None
    server_id: int | None

    @property
    def actor(self) -> str:
        """How events name this principal: by ids, never by names or tokens."""
        subject = self.server_id if self.kind in (TokenKind.AGENT, TokenKind.JOIN) else self.member_id
        return f"{self.kind} {self.token_id if subject is None else subject}"

    def may(self, operation: Operation, server: Server | None = None) -> None:
        """Raise Forbidden unless the table and the ownership allow it."""
        if self.kind not in PERMISSIONS[operation]:
            raise Forbidden(
                f"a token of kind {self.kind} cannot {operation}",
                remedy=f"use one of kind {' or '.join(sorted(PERMISSIONS[operation]))}",
            )
        if server is not None and self.kind is TokenKind.MEMBER and server.member_id != self.member_id:
            raise Forbidden(f"{server.name} belongs to another member")


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


async def issue(
    session: AsyncSession,
    kind: TokenKind,
    *,
    now: datetime,
    member_id: int | None = None,
    server_id: int | None = None,
    expires_at: datetime | None = None,
) -> str:
    """A new token; the only time that its text exists here."""
    secret = f"tc_{kind}_{secrets.token_urlsafe(32)}"
    session.add(
        Token(
            kind=kind,
            sha256=_hash(secret),
            member_id=member_id,
            server_id=server_id,
            created_at=now,
            expires_at=expires_at,
        )
    )
    await session.flush()
    return secret


async def revoke_server_tokens(session: AsyncSession, server_id: int, kind: TokenKind, now: datetime) -> None:
    await session.execute(
        update(Token)
        .where(Token.server_id == server_id, Token.kind == kind, Token.revoked_at.is_(None))
        .values(revoked_at=now)
    )


async def authenticate(session: AsyncSession, secret: str | None, now: datetime) -> Principal:
    """The principal of a token. Looking a hash up leaks nothing of the token by its timing."""
    if not secret:
        raise Unauthenticated("no token", remedy="send it as `Authorization: Bearer TOKEN`")
    token = await session.scalar(select(Token).where(Token.sha256 == _hash(secret)))
    if token is None:
        raise Unauthenticated("the token is not valid", remedy="check that it was copied whole")
    if token.kind is TokenKind.JOIN and token.used_at is not None:
        raise TokenUsed("the join token was used already", remedy=_NEW_JOIN_TOKEN)
    is_servers = token.kind in (TokenKind.JOIN, TokenKind.AGENT)
    remedy = _NEW_JOIN_TOKEN if is_servers else "ask the pool's operator for a new one"
    if token.revoked_at is not None:
        raise Unauthenticated("the token was revoked", remedy=remedy)
    if token.expires_at is not None and token.expires_at <= now:
        raise TokenExpired("the token has expired", remedy=remedy)
    return Principal(token.id, token.kind, token.member_id, token.server_id)


_NEW_JOIN_TOKEN = "ask for a new one: POST /v1/servers/NAME/join-token"  # noqa: S105 - advice, not a secret


async def use_up(session: AsyncSession, principal: Principal, now: datetime) -> None:
    """Make a join token useless. Raises TokenUsed when another request was faster."""
    used = await session.scalar(
        update(Token)
        .where(Token.id == principal.token_id, Token.used_at.is_(None))
        .values(used_at=now)
        .returning(Token.id)
    )
    if used is None:
        raise TokenUsed("the join token was used already", remedy=_NEW_JOIN_TOKEN)
