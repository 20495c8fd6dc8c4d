"""Who is asking, and what they may do: bearer tokens, stored as hashes, and one permission table."""

import hashlib
import hmac
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum

from sqlalchemy import ColumnExpressionArgument, bindparam, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import joinedload

from poolsvc.errors import Forbidden, MemberBlocked, TokenExpired, TokenUsed, Unauthenticated
from poolsvc.models import Member, MemberRole, MemberStatus, Scope, Server, StaffRole, Token, TokenKind, User


class Role(StrEnum):
    """What the bearer of a token is to what an operation is about."""

    OPERATOR = "operator"
    SUPPORT = "support"
    OWNER = "owner"
    TECHNICIAN = "technician"
    USER = "user"  # any person who signed in
    AGENT = "agent"
    JOIN = "join"
    MONITOR = "monitor"


class Operation(StrEnum):
    """What the API lets people and programs do; each endpoint asks for exactly one."""

    # one's own account
    READ_SELF = "read-self"
    CHANGE_SELF = "change-self"
    ACCEPT_TERMS = "accept-terms"
    CHANGE_IDENTITY = "change-identity"  # how one signs in, and whether one has an account
    # a member: its people, its servers as a list, its log
    FOUND_MEMBER = "found-member"
    READ_MEMBER = "read-member"
    CHANGE_MEMBER = "change-member"
    MANAGE_USERS = "manage-users"
    MANAGE_WEBHOOKS = "manage-webhooks"
    CLOSE_MEMBER = "close-member"
    EXPORT_MEMBER = "export-member"
    # a server
    REGISTER_SERVER = "register-server"
    READ_SERVER = "read-server"  # as it is, and its maintenance
    READ_SERVER_DETAILS = "read-server-details"  # its log, its samples, its settings
    CHANGE_SERVER = "change-server"
    TEND_SERVER = (
        "tend-server"  # what its agent may do as well: maintenance, to stay after all, renewal, check
    )
    LEAVE_SERVER = "leave-server"  # on a later day
    REMOVE_SERVER = "remove-server"  # at once
    OFFER_SERVER = "offer-server"
    TAKE_SERVER = "take-server"
    PROVE_ADDRESS = "prove-address"
    # the pool
    READ_POOL = "read-pool"
    CREATE_MEMBER = "create-member"
    JUDGE_MEMBER = "judge-member"
    JUDGE_USER = "judge-user"
    VIEW_AS = "view-as"  # to read what somebody else reads
    JUDGE_SERVER = "judge-server"
    INVITE = "invite"
    APPOINT_STAFF = "appoint-staff"
    SET_CA_LIMITS = "set-ca-limits"
    JUDGE_MONITOR = "judge-monitor"  # to let it have a say, and how many have to agree
    # a member's monitors, and the pool's own
    READ_MONITOR = "read-monitor"
    REGISTER_MONITOR = "register-monitor"
    CHANGE_MONITOR = "change-monitor"  # to pause or end it, and its token
    SET_REGIONS = "set-regions"
    # programs
    JOIN = "join"
    AGENT = "agent"
    MONITOR = "monitor"


@dataclass(frozen=True, slots=True)
class Permission:
    """Who may, and which scope an API token needs for it; without one, people have to be signed in.

    `when_blocked`: also people of a blocked member.
    """

    roles: frozenset[Role]
    scope: Scope | None = None
    when_blocked: bool = False


def _permission(roles: str, scope: Scope | None, *, when_blocked: bool = False) -> Permission:
    return Permission(frozenset(map(Role, roles.split())), scope, when_blocked)


_O = Operation
_STAFF, _TEAM = "operator support", "owner technician"
PERMISSIONS: Mapping[Operation, Permission] = {
    _O.READ_SELF: _permission("user", Scope.READ, when_blocked=True),
    _O.CHANGE_SELF: _permission("user", Scope.ACCOUNT, when_blocked=True),
    # With a token for one member too: a new member's owner has nothing else at first.
    _O.ACCEPT_TERMS: _permission("user", Scope.ACCOUNT, when_blocked=True),
    # Not for a program: whoever finds its token would keep the account for good.
    _O.CHANGE_IDENTITY: _permission("user", None, when_blocked=True),
    _O.FOUND_MEMBER: _permission("user", Scope.ACCOUNT),
    _O.READ_MEMBER: _permission(f"{_STAFF} {_TEAM}", Scope.READ, when_blocked=True),
    _O.CHANGE_MEMBER: _permission("operator owner", Scope.ACCOUNT),
    _O.MANAGE_USERS: _permission("operator owner", Scope.ACCOUNT),
    _O.MANAGE_WEBHOOKS: _permission(f"operator {_TEAM}", Scope.ACCOUNT),
    _O.CLOSE_MEMBER: _permission("operator owner", Scope.ACCOUNT, when_blocked=True),
    _O.EXPORT_MEMBER: _permission("operator owner", Scope.ACCOUNT, when_blocked=True),
    _O.REGISTER_SERVER: _permission(_TEAM, Scope.SERVERS),
    _O.READ_SERVER: _permission(f"{_STAFF} {_TEAM} agent", Scope.READ, when_blocked=True),
    # Not for an agent: the log tells of people.
    _O.READ_SERVER_DETAILS: _permission(f"{_STAFF} {_TEAM}", Scope.READ, when_blocked=True),
    _O.CHANGE_SERVER: _permission(f"operator {_TEAM}", Scope.SERVERS),
    _O.TEND_SERVER: _permission(f"operator {_TEAM} agent", Scope.SERVERS),
    # Until that day its people can cancel what an agent in wrong hands did.
    _O.LEAVE_SERVER: _permission(f"operator {_TEAM} agent", Scope.SERVERS, when_blocked=True),
    _O.REMOVE_SERVER: _permission(f"operator {_TEAM}", Scope.SERVERS, when_blocked=True),
    _O.OFFER_SERVER: _permission("operator owner", Scope.SERVERS),
    _O.TAKE_SERVER: _permission("owner", Scope.SERVERS),
    _O.PROVE_ADDRESS: _permission(_TEAM, Scope.SERVERS),
    _O.READ_POOL: _permission(_STAFF, Scope.READ),
    _O.CREATE_MEMBER: _permission("operator", Scope.POOL),
    _O.JUDGE_MEMBER: _permission("operator", Scope.POOL),
    _O.JUDGE_USER: _permission("operator", Scope.POOL),
    # Not for a program: who looks has a name.
    _O.VIEW_AS: _permission(_STAFF, None),
    _O.JUDGE_SERVER: _permission("operator", Scope.POOL),
    _O.INVITE: _permission("operator", Scope.POOL),
    _O.APPOINT_STAFF: _permission("operator", Scope.POOL),
    _O.SET_CA_LIMITS: _permission("operator", Scope.POOL),
    _O.JUDGE_MONITOR: _permission("operator", Scope.POOL),
    _O.READ_MONITOR: _permission(f"{_STAFF} {_TEAM}", Scope.READ, when_blocked=True),
    _O.REGISTER_MONITOR: _permission("operator owner", Scope.SERVERS),
    _O.CHANGE_MONITOR: _permission("operator owner", Scope.SERVERS),
    _O.SET_REGIONS: _permission("operator", Scope.POOL),
    _O.JOIN: _permission("join", None),
    _O.AGENT: _permission("agent", None),
    _O.MONITOR: _permission("monitor", None),
}

# Of a program's token, unless who makes it says otherwise; none lives for ever.
TOKEN_LIFE = timedelta(days=90)
_KIND_ROLES = {TokenKind.JOIN: Role.JOIN, TokenKind.AGENT: Role.AGENT, TokenKind.MONITOR: Role.MONITOR}
# How often `last_used_at` moves: people want to know whether a token is in use, not when.
_SEEN = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Principal:
    """The bearer of a valid token. `member_id` limits an API token to one member."""

    token_id: int
    kind: TokenKind
    user_id: int | None = None
    staff: StaffRole | None = None
    members: Mapping[int, MemberRole] = field(default_factory=dict)
    blocked: frozenset[int] = frozenset()  # those of `members` that may only read and leave
    member_id: int | None = None
    server_id: int | None = None
    monitor_id: int | None = None
    scopes: frozenset[Scope] = frozenset(Scope)
    used: bool = False  # a join token that an agent has joined with

    @property
    def actor(self) -> str:
        """How events name this principal: by ids, never by names or tokens."""
        if self.kind not in _KIND_ROLES:
            return f"user {self.user_id}"
        return f"{self.kind} {self.server_id or self.monitor_id}"

    def roles(self, member_id: int | None = None) -> frozenset[Role]:
        """What the principal is to a member, or to the pool when none is named."""
        if (own := _KIND_ROLES.get(self.kind)) is not None:
            return frozenset({own})
        found = {Role.USER}
        if self.staff is not None and self.member_id is None:
            found.add(Role(self.staff.value))
        if member_id is not None and member_id in self.members and self.member_id in (None, member_id):
            found.add(Role(self.members[member_id].value))
        return frozenset(found)

    @property
    def acts_for(self) -> tuple[int, ...]:
        """The members that the bearer may speak for with this token."""
        return tuple(member for member in self.members if self.member_id in (None, member))

    @property
    def reads_pool(self) -> bool:
        """Whether lists show what is everybody's, and not the bearer's own alone."""
        return bool(self.roles() & PERMISSIONS[Operation.READ_POOL].roles)

    def may(self, operation: Operation, *, member: int | None = None, server: Server | None = None) -> None:
        """Raise Forbidden, MemberBlocked or TokenUsed unless the table allows it for that member or server.

        Whether the member of an agent's server is blocked is not known here (`poolsvc.api.lookup`).
        """
        if self.used:
            raise TokenUsed("the join token was used already", remedy=_REMEDIES[TokenKind.JOIN])
        permission = PERMISSIONS[operation]
        member = server.member_id if server is not None else member
        matching = self.roles(member) & permission.roles
        if self.server_id is not None and server is not None and server.id != self.server_id:
            raise Forbidden(
                f"you cannot {operation} of another agent", remedy="an agent's token is for its own server"
            )
        if not matching:
            is_foreign = self.user_id is not None and member not in (None, *self.acts_for)
            whose = " of another member" if is_foreign else ""
            raise Forbidden(
                f"you cannot {operation}{whose}", remedy=f"it takes {' or '.join(sorted(permission.roles))}"
            )
        if self.kind is TokenKind.API and permission.scope is None:
            raise Forbidden(f"a program's token cannot {operation}", remedy="sign in: POST /v1/sign-in")
        if self.kind is TokenKind.API and permission.scope not in self.scopes:
            raise Forbidden(
                f"the token's scopes do not allow to {operation}",
                remedy=f"make a token with the scope {permission.scope}",
            )
        # An operator acts on blocked members; their own people do not.
        by_membership = not matching & {Role.OPERATOR, Role.SUPPORT}
        if member in self.blocked and by_membership:
            refuse_when_blocked(operation)

    def member_for(self, operation: Operation, wanted: int | None) -> int:
        """The member that an operation is for, when the request need not name one. Raises Forbidden."""
        if wanted is None:
            own = self.acts_for
            if len(own) != 1:
                raise Forbidden(
                    f"you act for {len(own)} members", remedy="name one of them in `member`", field="member"
                )
            wanted = own[0]
        self.may(operation, member=wanted)
        return wanted


def refuse_when_blocked(operation: Operation) -> None:
    """Raise MemberBlocked unless people and agents of a blocked member may do that."""
    if not PERMISSIONS[operation].when_blocked:
        raise MemberBlocked(
            f"the member is blocked or waits for approval: you cannot {operation}",
            remedy="ask the pool's operator",
        )


def hash_secret(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


async def issue(
    session: AsyncSession,
    kind: TokenKind,
    *,
    now: datetime,
    user_id: int | None = None,
    member_id: int | None = None,
    server_id: int | None = None,
    monitor_id: int | None = None,
    viewer_id: int | None = None,
    scopes: Collection[Scope] = frozenset(Scope),
    label: str = "",
    expires_at: datetime | None = None,
) -> tuple[Token, str]:
    """A new token with its text, which exists nowhere afterwards."""
    secret = secrets.token_urlsafe(32)
    text = f"tc_{kind}_{secret}"
    token = Token(
        kind=kind,
        sha256=hash_secret(text),
        hint=secret[:4],
        label=label,
        user_id=user_id,
        member_id=member_id,
        server_id=server_id,
        monitor_id=monitor_id,
        viewer_id=viewer_id,
        scopes=sorted(scopes) if kind is TokenKind.API else [],
        created_at=now,
        expires_at=expires_at,
    )
    session.add(token)
    await session.flush()
    return token, text


async def revoke(session: AsyncSession, now: datetime, *conditions: ColumnExpressionArgument[bool]) -> int:
    """Make tokens useless; how many were not so before."""
    found = list(await session.scalars(select(Token).where(Token.revoked_at.is_(None), *conditions)))
    for token in found:
        token.revoked_at = now
    return len(found)


# Made once: it is looked up with every request.
_BY_HASH = (
    select(Token)
    .where(Token.sha256 == bindparam("sha256"))
    .options(joinedload(Token.user).selectinload(User.memberships))
)


async def authenticate(session: AsyncSession, secret: str | None, now: datetime) -> Principal:
    """The principal of a token. Neither the lookup by hash nor the comparison tells of it by its timing."""
    if not secret:
        raise Unauthenticated("no token", remedy="send it as `Authorization: Bearer TOKEN`")
    digest = hash_secret(secret)
    token = await session.scalar(_BY_HASH, {"sha256": digest})
    if token is None or not hmac.compare_digest(token.sha256, digest):
        raise Unauthenticated("the token is not valid", remedy="check that it was copied whole")
    if token.revoked_at is not None:
        raise Unauthenticated("the token was revoked", remedy=_REMEDIES[token.kind])
    if token.expires_at is not None and token.expires_at <= now:
        raise TokenExpired("the token has expired", remedy=_REMEDIES[token.kind])
    if token.last_used_at is None or now - token.last_used_at >= _SEEN:
        token.last_used_at = now
    if token.user is None:
        used = token.kind is TokenKind.JOIN and token.used_at is not None
        return Principal(
            token.id,
            token.kind,
            server_id=token.server_id,
            monitor_id=token.monitor_id,
            scopes=frozenset(),
            used=used,
        )
    return await _person(session, token, token.user)


def refuse_blocked(user: User) -> None:
    if user.blocked_at is not None or user.erased_at is not None:
        raise Unauthenticated("the account is blocked or erased", remedy="ask the pool's operator")


async def _refuse_view(session: AsyncSession, viewer_id: int, user: User) -> None:
    """A view lasts no longer than what it was given for: its maker is staff, and who is looked at is not."""
    viewer = await session.get_one(User, viewer_id)
    if viewer.staff is None or viewer.blocked_at is not None or user.staff is not None:
        raise Unauthenticated("the view has ended", remedy="ask for another one: POST /v1/users/U/view")


async def _person(session: AsyncSession, token: Token, user: User) -> Principal:
    refuse_blocked(user)
    if token.viewer_id is not None:
        await _refuse_view(session, token.viewer_id, user)
    roles = {membership.member_id: membership.role for membership in user.memberships}
    limited = await session.scalars(
        select(Member.id).where(Member.id.in_(roles), Member.status != MemberStatus.ACTIVE)
    )
    is_session = token.kind is TokenKind.SESSION
    return Principal(
        token.id,
        token.kind,
        user_id=user.id,
        staff=user.staff,
        members=roles,
        blocked=frozenset(limited),
        member_id=token.member_id,
        scopes=frozenset(Scope) if is_session else frozenset(map(Scope, token.scopes)),
    )


_NEW_JOIN_TOKEN = "ask for a new one: POST /v1/servers/NAME/join-token"  # noqa: S105 - advice, not a secret
_REMEDIES = {
    TokenKind.SESSION: "sign in again",
    TokenKind.API: "make a new one: POST /v1/me/tokens",
    TokenKind.JOIN: _NEW_JOIN_TOKEN,
    TokenKind.AGENT: _NEW_JOIN_TOKEN,
    TokenKind.MONITOR: "ask for a new one: POST /v1/monitors/NAME/token",
}


async def use_up(session: AsyncSession, principal: Principal, now: datetime) -> None:
    """Make a join token useless. Raises TokenUsed when another request was faster."""
    unused = (
        select(Token)
        .where(Token.id == principal.token_id, Token.used_at.is_(None))
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    token = await session.scalar(unused)
    if token is None:
        raise TokenUsed("the join token was used already", remedy=_REMEDIES[TokenKind.JOIN])
    token.used_at = now
