"""People, the members that they act for, and what proves who they are."""

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, ForeignKey, Index, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column, relationship, validates

from poolsvc.db import Base, UtcDateTime, random_key, text_enum


class StaffRole(StrEnum):
    """What a person is to the pool; most are nothing."""

    OPERATOR = "operator"
    SUPPORT = "support"  # reads everything, changes nothing


class MemberRole(StrEnum):
    """What a person is to a member."""

    OWNER = "owner"
    TECHNICIAN = "technician"  # runs servers, but neither people nor the account


class MemberKind(StrEnum):
    PERSON = "person"
    ORGANISATION = "organisation"


class MemberStatus(StrEnum):
    PENDING = "pending"  # signed up, waits for the operator's approval
    ACTIVE = "active"
    BLOCKED = "blocked"  # by the operator: reads, exports and leaves, nothing else
    CLOSED = "closed"


class TokenKind(StrEnum):
    """What a token is for."""

    SESSION = "session"  # a person who signed in
    API = "api"  # a person's program, within scopes
    JOIN = "join"  # an agent that is to join, once
    AGENT = "agent"
    MONITOR = "monitor"


class Scope(StrEnum):
    """What an API token is limited to; a session has all of them."""

    READ = "read"
    SERVERS = "servers"  # register, change and remove servers
    ACCOUNT = "account"  # people, members, tokens
    POOL = "pool"  # the operator's own operations


class SignInKind(StrEnum):
    LINK = "link"  # a link sent by mail
    ADDRESS = "address"  # a link to the address that an account is to have from now on
    OIDC = "oidc"  # a detour by an OpenID provider


class User(Base):
    """A person. One without a mail address signs in by OIDC or has tokens only."""

    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str | None] = mapped_column(String(254), unique=True)  # lower case
    name: Mapped[str] = mapped_column(String(100), default="")  # never a mail address
    staff: Mapped[StaffRole | None] = mapped_column(text_enum(StaffRole, "staff"))
    was_staff: Mapped[bool] = mapped_column(default=False)  # now or ever: members do not learn who it was
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    confirmed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # the address is theirs
    blocked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    blocked_reason: Mapped[str | None] = mapped_column(String(300))
    erased_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    memberships: Mapped[list["Membership"]] = relationship(lazy="raise", back_populates="user")

    @validates("staff")
    def _remember_staff(self, _name: str, role: StaffRole | None) -> StaffRole | None:
        self.was_staff = self.was_staff or role is not None
        return role


class Member(Base):
    """An account holder: a person or an organisation, with one or more users."""

    __tablename__ = "members"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    kind: Mapped[MemberKind] = mapped_column(text_enum(MemberKind, "kind"), default=MemberKind.PERSON)
    status: Mapped[MemberStatus] = mapped_column(
        text_enum(MemberStatus, "status"), default=MemberStatus.ACTIVE, index=True
    )
    status_reason: Mapped[str | None] = mapped_column(String(300))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    opaque_id: Mapped[str] = mapped_column(
        String(16), unique=True
    )  # how others name it, such as to offer it a server
    public: Mapped[bool] = mapped_column(default=False)  # its name may be shown to everybody
    max_servers: Mapped[int | None] = mapped_column()  # None: the pool's policy

    memberships: Mapped[list["Membership"]] = relationship(lazy="raise", back_populates="member")


class Membership(Base):
    """What one user is to one member, and whether its notices are mailed to them."""

    __tablename__ = "memberships"
    __table_args__ = (UniqueConstraint("member_id", "user_id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    member_id: Mapped[int] = mapped_column(ForeignKey("members.id"))
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), index=True)
    role: Mapped[MemberRole] = mapped_column(text_enum(MemberRole, "role"))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    mail: Mapped[bool] = mapped_column(default=True)

    member: Mapped[Member] = relationship(lazy="raise", back_populates="memberships")
    user: Mapped[User] = relationship(lazy="raise", back_populates="memberships")


class Invitation(Base):
    """A mail that lets somebody in: to a member, or, without one, to the pool.

    Its secret is derived from the registry's key (`poolsvc.derived`); no part of it is stored.
    """

    __tablename__ = "invitations"

    id: Mapped[int] = random_key()
    member_id: Mapped[int | None] = mapped_column(ForeignKey("members.id"), index=True)
    email: Mapped[str | None] = mapped_column(String(254))  # None once it is over: nobody's address is kept
    role: Mapped[MemberRole | None] = mapped_column(text_enum(MemberRole, "role"))
    invited_by: Mapped[int] = mapped_column(ForeignKey("users.id"))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
    accepted_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class Acceptance(Base):
    """A user accepted one version of one document, such as the CA's subscriber terms."""

    __tablename__ = "acceptances"
    __table_args__ = (UniqueConstraint("user_id", "document", "version"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    document: Mapped[str] = mapped_column(String(50))
    version: Mapped[str] = mapped_column(String(50))
    at: Mapped[datetime] = mapped_column(UtcDateTime)


class Identity(Base):
    """A user as an OpenID provider knows them (OpenID Connect Core section 2: iss and sub)."""

    __tablename__ = "identities"
    __table_args__ = (UniqueConstraint("issuer", "subject"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), index=True)
    issuer: Mapped[str] = mapped_column(String(255))
    subject: Mapped[str] = mapped_column(String(255))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class SignIn(Base):
    """A proof that is under way: a link in somebody's mail, or a detour by a provider.

    The link's secret and the provider's state are derived from the registry's key, nothing of them is stored.
    With `user_id` it is for that account; `wish` is the account that somebody without one wants to have.
    """

    __tablename__ = "sign_ins"

    id: Mapped[int] = random_key()
    kind: Mapped[SignInKind] = mapped_column(text_enum(SignInKind, "kind"))
    email: Mapped[str | None] = mapped_column(String(254), index=True)
    user_id: Mapped[int | None] = mapped_column(ForeignKey("users.id"))
    issuer: Mapped[str | None] = mapped_column(String(255))
    wish: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
    used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class Token(Base):
    """A bearer token; only its SHA-256 is kept, and a few letters by which people recognise it."""

    __tablename__ = "tokens"
    __table_args__ = (Index("ix_tokens_kind_expires_at", "kind", "expires_at"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[TokenKind] = mapped_column(text_enum(TokenKind, "kind"))
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    hint: Mapped[str] = mapped_column(String(8), default="")
    label: Mapped[str] = mapped_column(String(100), default="")
    user_id: Mapped[int | None] = mapped_column(ForeignKey("users.id"), index=True)
    viewer_id: Mapped[int | None] = mapped_column(
        ForeignKey("users.id")
    )  # of the staff, who reads as `user_id`
    member_id: Mapped[int | None] = mapped_column(ForeignKey("members.id"))  # good for this member only
    server_id: Mapped[int | None] = mapped_column(ForeignKey("servers.id"), index=True)
    monitor_id: Mapped[int | None] = mapped_column(ForeignKey("monitors.id"), index=True)
    scopes: Mapped[list[str]] = mapped_column(JSON, default=list)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # a join token is good once
    last_used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # to the hour
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    user: Mapped[User | None] = relationship(lazy="raise", foreign_keys=user_id)
