"""Signing up and signing in: links in mails and detours by OpenID providers, and the sessions that come of them.

1. Nobody learns from an answer which addresses have accounts: what is asked with an address is answered in the same
   way for every address, after the same work. What there is to say is said in a mail to that address.
2. A link and a way back from a provider are good once, for `LIFE`. Their secrets are derived from the registry's key
   and the id of their row: whoever reads the database can sign in as nobody.
3. An account comes into being when its link is opened, not before: a wish that nobody confirms leaves nothing.
4. Rows hold addresses of people who may not want an account. They are deleted after an hour (`expire`).
"""

import hmac
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from poolsvc import auth, members, teams, terms
from poolsvc.config import Settings, SignUp
from poolsvc.db import act_as
from poolsvc.derived import Purpose, RegistryKey
from poolsvc.errors import (
    IdentityTaken,
    InvalidEmail,
    InvitationNeeded,
    LimitReached,
    NameTaken,
    NotFound,
    ProviderFailed,
    SignInInvalid,
    SignUpNeeded,
    TooManyRequests,
)
from poolsvc.models import (
    Identity,
    Invitation,
    Member,
    MemberKind,
    Membership,
    MemberStatus,
    SignIn,
    SignInKind,
    StaffRole,
    Token,
    TokenKind,
    User,
)
from poolsvc.notices import Letter, NoticeKind, announce, write_to
from poolsvc.oidc import Claims, Detour

LIFE = timedelta(minutes=15)
SESSION_LIFE = timedelta(days=14)
MAX_SESSIONS = 50
LINKS_PER_ADDRESS = 5
MAX_IDENTITIES = 10
_WINDOW = timedelta(hours=1)
_DETOURS = 10_000  # in the window: each is a row that a stranger has made
_KEPT = timedelta(days=30)  # so long an ended session says why it is one


@dataclass(frozen=True, slots=True)
class Wish:
    """The account that somebody wants to have. `member` is None for who joins the member of an invitation."""

    name: str
    member: str | None
    kind: MemberKind
    accepted: tuple[terms.Accepted, ...]
    invitation: int | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_json(cls, document: dict[str, Any]) -> "Wish":
        accepted = tuple((name, version) for name, version in document["accepted"])
        return cls(**{**document, "kind": MemberKind(document["kind"]), "accepted": accepted})


async def request_link(session: AsyncSession, settings: Settings, email: str, now: datetime) -> None:
    """Mail a link to the address if it has an account, or how to get one. Raises InvalidEmail."""
    letter = None if settings.sign_up is SignUp.INVITATION else Letter.NO_ACCOUNT
    await _write_link(session, settings, email, now, known=Letter.SIGN_IN, unknown=letter)


async def request_account(
    session: AsyncSession, settings: Settings, email: str, wish: Wish, now: datetime
) -> None:
    """Mail a link that makes the account; who has one is told so instead. Raises InvalidEmail."""
    await _write_link(
        session, settings, email, now, known=Letter.HAS_ACCOUNT, unknown=Letter.SIGN_UP, wish=wish
    )


async def request_address(
    session: AsyncSession, settings: Settings, user: User, email: str, now: datetime
) -> None:
    """Mail a link that gives the account this address. Raises InvalidEmail, TooManyRequests."""
    await _write_link(
        session, settings, email, now, known=Letter.HAS_ACCOUNT, unknown=Letter.NEW_ADDRESS, whose=user
    )


async def _write_link(
    session: AsyncSession,
    settings: Settings,
    email: str,
    now: datetime,
    *,
    known: Letter,
    unknown: Letter | None,
    wish: Wish | None = None,
    whose: User | None = None,
) -> None:
    """One row and at most one mail; beyond the limits none, of which only `whose`, who is signed in, learns.

    Strangers can use up the mails to addresses without account, but not those of anybody's account; of these each
    link signs in, whoever asked for it.
    """
    address = members.check_email(email)
    owner = await session.scalar(select(User).where(User.email == address))
    recent = select(func.count()).select_from(SignIn).where(SignIn.created_at > now - _WINDOW)
    to_address = await session.scalar(recent.where(SignIn.email == address)) or 0
    to_strangers = await session.scalar(
        recent.where(SignIn.kind == SignInKind.LINK, SignIn.user_id.is_(None))
    )
    if to_address >= LINKS_PER_ADDRESS:
        if whose is not None:
            raise TooManyRequests(
                f"{LINKS_PER_ADDRESS} links to this address within an hour",
                remedy="open the last one, or wait an hour",
                field="email",
            )
        return
    if owner is None and whose is None and (to_strangers or 0) >= settings.policy.links_per_hour:
        return
    changes = owner is None and whose is not None
    row = SignIn(
        kind=SignInKind.ADDRESS if changes else SignInKind.LINK,
        email=address,
        user_id=whose.id if changes and whose else owner.id if owner else None,
        wish=wish.as_json() if wish is not None and owner is None else None,
        created_at=now,
        expires_at=now + LIFE,
    )
    session.add(row)
    await session.flush()
    letter = unknown if owner is None else known
    if letter is not None:
        await write_to(
            session, NoticeKind.SIGN_IN, owner or address, now, sign_in=row.id, letter=letter.value
        )


async def check_wish(session: AsyncSession, settings: Settings, wish: Wish) -> None:
    """Refuse what could not become an account; of addresses it knows nothing.

    Raises InvalidDocument, InvalidName, NameTaken, InvitationNeeded.
    """
    terms.check_current(settings, wish.accepted, shown="GET /v1/sign-up")
    if settings.sign_up is SignUp.INVITATION and wish.invitation is None:
        raise InvitationNeeded(
            "accounts of this pool are by invitation",
            remedy="ask the pool's operator, or an owner of your member, to invite you",
            field="invitation",
        )
    if wish.name:
        members.check_display_name(wish.name)
    if wish.member is not None:
        name = members.check_display_name(wish.member, field="member.name")
        if await session.scalar(select(Member.id).where(Member.name == name)) is not None:
            raise NameTaken(
                f"there is a member named {name!r}", remedy="choose another name", field="member.name"
            )


async def find_invitation(session: AsyncSession, key: RegistryKey, token: str, now: datetime) -> Invitation:
    """The open invitation of a token. Raises InvitationNeeded."""
    return await _open_invitation(session, key.read(Purpose.INVITATION, token), now)


async def _open_invitation(
    session: AsyncSession, identifier: int | None, now: datetime, *, lock: bool = False
) -> Invitation:
    open_one = (
        select(Invitation)
        .where(Invitation.id == identifier, teams.is_open(now))
        .execution_options(populate_existing=True)
    )
    found: Invitation | None = await session.scalar(open_one.with_for_update() if lock else open_one)
    if found is None:
        raise InvitationNeeded(
            "the invitation is not valid, or was used, revoked or too old",
            remedy="ask who invited you for a new one",
            field="invitation",
        )
    return found


async def confirm(
    session: AsyncSession, settings: Settings, key: RegistryKey, token: str, now: datetime
) -> tuple[User, str]:
    """Who opened a link, and the token of their new session. Raises SignInInvalid, NameTaken, InvitationNeeded."""
    row = await _take(session, key.read(Purpose.SIGN_IN, token), SignInKind.LINK, now)
    user = await _opener(session, settings, row, now)
    return user, await open_session(session, user, now)


async def _opener(session: AsyncSession, settings: Settings, row: SignIn, now: datetime) -> User:
    if row.user_id is not None:
        user = await session.get_one(User, row.user_id)
        # None: the link is the console's. Otherwise it went to an address that may be somebody else's by now.
        if row.email is not None and row.email != user.email:
            raise _invalid()
    else:
        found = await session.scalar(select(User).where(User.email == row.email))
        if found is None and row.wish is None:
            raise _invalid()
        if found is None:
            return await _make_account(session, settings, Wish.of_json(row.wish or {}), row.email, now)
        user = found
    auth.refuse_blocked(user)
    act_as(session, f"user {user.id}")
    if row.email is not None and user.confirmed_at is None:
        user.confirmed_at = now
    return user


async def _take(session: AsyncSession, identifier: int | None, kind: SignInKind, now: datetime) -> SignIn:
    """Use a row up; of several that try at the same time one succeeds. Raises SignInInvalid."""
    row: SignIn | None = await session.scalar(
        update(SignIn)
        .where(
            SignIn.id == identifier, SignIn.kind == kind, SignIn.used_at.is_(None), SignIn.expires_at > now
        )
        .values(used_at=now)
        .returning(SignIn)
    )
    if identifier is None or row is None:
        raise _invalid()
    return row


def _invalid() -> SignInInvalid:
    return SignInInvalid(
        "the link is not valid, was used, or is too old",
        remedy="ask for a new one, and open it in 15 minutes",
    )


async def _make_account(
    session: AsyncSession, settings: Settings, wish: Wish, email: str | None, now: datetime
) -> User:
    """The account of a wish, with its member. Raises NameTaken, InvitationNeeded, WrongState, LimitReached."""
    user = await members.create_user(session, now, email=email, name=wish.name)
    act_as(session, f"user {user.id}")
    user.confirmed_at = None if email is None else now
    await terms.record(session, user.id, wish.accepted, now)
    waits = settings.sign_up is SignUp.APPROVAL
    if wish.invitation is not None:
        invitation = await _open_invitation(session, wish.invitation, now)
        if invitation.member_id is not None:
            await teams.accept(session, settings, invitation.id, user.id, now)
            return user
        invitation = await _open_invitation(session, wish.invitation, now, lock=True)
        invitation.accepted_at, invitation.email = now, None
        waits = False
    if wish.member is not None:
        status = MemberStatus.PENDING if waits else MemberStatus.ACTIVE
        await members.create(session, wish.member, now, owner=user, kind=wish.kind, status=status)
    return user


async def open_session(session: AsyncSession, user: User, now: datetime) -> str:
    """The token of a new session; the oldest ends when there would be too many."""
    _, token = await auth.issue(
        session, TokenKind.SESSION, now=now, user_id=user.id, expires_at=now + SESSION_LIFE
    )
    open_ones = (
        select(Token)
        .where(
            Token.user_id == user.id,
            Token.kind == TokenKind.SESSION,
            Token.revoked_at.is_(None),
            Token.expires_at > now,
        )
        .order_by(Token.id.desc())
        .offset(MAX_SESSIONS)
    )
    for old in await session.scalars(open_ones):
        old.revoked_at = now
    return token


async def console_link(session: AsyncSession, key: RegistryKey, email: str, now: datetime) -> str:
    """The token of a link that nobody mailed, for an operator. Raises InvalidEmail, NotFound."""
    address = members.check_email(email)
    user = await session.scalar(select(User).where(User.email == address, User.staff == StaffRole.OPERATOR))
    if user is None:
        raise NotFound(
            "no operator has this mail address", remedy="make one: `poolsvc operator create --email EMAIL`"
        )
    row = SignIn(kind=SignInKind.LINK, user_id=user.id, created_at=now, expires_at=now + LIFE)
    session.add(row)
    await session.flush()
    return key.token(Purpose.SIGN_IN, row.id)


async def change_address(
    session: AsyncSession, key: RegistryKey, user: User, token: str, now: datetime
) -> None:
    """Give the account the address to which the link was mailed. Raises SignInInvalid.

    Only who is signed in to that account can: a mistyped address is somebody else's, who would get the account.
    """
    row = await _take(session, key.read(Purpose.SIGN_IN, token), SignInKind.ADDRESS, now)
    taken = await session.scalar(select(User.id).where(User.email == row.email))
    if row.user_id != user.id or taken is not None:
        raise _invalid()
    before, user.email = user.email, row.email
    user.confirmed_at = now
    await session.flush()
    if before is not None:
        await write_to(session, NoticeKind.IDENTITY_CHANGED, before, now, user=user.id, what="address")
    await _tell_of_identity(session, user, "address", now)


async def _tell_of_identity(session: AsyncSession, user: User, what: str, now: datetime) -> None:
    """Mail all people of the user's members, or the user alone: a thief would have changed this too."""
    owned = select(Membership.member_id).where(Membership.user_id == user.id).order_by(Membership.id)
    found = list(await session.scalars(owned))
    for member in found:
        await announce(
            session, NoticeKind.IDENTITY_CHANGED, member_id=member, now=now, user=user.id, what=what
        )
    if not found and user.email is not None:
        await write_to(session, NoticeKind.IDENTITY_CHANGED, user, now, user=user.id, what=what)


async def begin_detour(
    session: AsyncSession,
    key: RegistryKey,
    issuer: str,
    now: datetime,
    *,
    user_id: int | None = None,
    wish: Wish | None = None,
) -> Detour:
    """A detour by a provider: to sign in, or to link an identity to the user's account. Raises TooManyRequests."""
    recent = (
        select(func.count())
        .select_from(SignIn)
        .where(SignIn.kind == SignInKind.OIDC, SignIn.created_at > now - _WINDOW)
    )
    if (await session.scalar(recent) or 0) >= _DETOURS:
        raise TooManyRequests(
            "too many people are on their way to providers", remedy="try again later, or sign in by mail"
        )
    row = SignIn(
        kind=SignInKind.OIDC,
        issuer=issuer,
        user_id=user_id,
        wish=None if wish is None else wish.as_json(),
        created_at=now,
        expires_at=now + LIFE,
    )
    session.add(row)
    await session.flush()
    return Detour.of(key, row.id)


async def take_detour(
    session: AsyncSession,
    key: RegistryKey,
    state: str,
    binding: str,
    now: datetime,
    *,
    user_id: int | None = None,
) -> tuple[SignIn, Detour]:
    """The row of a way back, used up, and what was said on it. One that began for an account ends there only.

    Raises SignInInvalid.
    """
    identifier = key.read(Purpose.OIDC_STATE, state)
    if identifier is None:
        raise _invalid()
    detour = Detour.of(key, identifier)
    if not hmac.compare_digest(detour.binding.encode(), binding.encode()):
        raise _invalid()
    row = await _take(session, identifier, SignInKind.OIDC, now)
    if row.user_id != user_id:
        raise _invalid()
    return row, detour


async def finish_detour(
    session: AsyncSession, settings: Settings, row: SignIn, claims: Claims, now: datetime
) -> tuple[User, str]:
    """Whom the provider knows, and the token of their new session.

    An identity that is seen for the first time becomes that of the account with its address only when the provider
    has verified the address and the account has as well: an account with an address that nobody proved may have been
    made by somebody else, who could get in afterwards. It never becomes that of an operator or supporter, who link it
    when they are signed in: a provider that lies about an address must not get the pool. Everybody else gets the
    account that they wished for. Raises SignUpNeeded, IdentityTaken, NameTaken, InvitationNeeded.
    """
    user = await _owner_of(session, claims)
    if user is None:
        user = await _newcomer(session, settings, row, claims, now)
    auth.refuse_blocked(user)
    act_as(session, f"user {user.id}")
    return user, await open_session(session, user, now)


async def _owner_of(session: AsyncSession, claims: Claims) -> User | None:
    user: User | None = await session.scalar(
        select(User)
        .join(Identity, Identity.user_id == User.id)
        .where(Identity.issuer == claims.issuer, Identity.subject == claims.subject)
    )
    return user


async def link(session: AsyncSession, user: User, claims: Claims, now: datetime) -> None:
    """Let the identity sign in its account from now on. Raises IdentityTaken, LimitReached."""
    owner = await _owner_of(session, claims)
    if owner is not None and owner.id != user.id:
        raise IdentityTaken(
            "another account has this identity", remedy="sign in with it, and unlink it there first"
        )
    if owner is None:
        await _add_identity(session, user, claims, now)


async def _newcomer(
    session: AsyncSession, settings: Settings, row: SignIn, claims: Claims, now: datetime
) -> User:
    email = _address_of(claims)
    user = await session.scalar(select(User).where(User.email == email)) if email is not None else None
    if user is not None and (user.confirmed_at is None or user.staff is not None):
        raise IdentityTaken(
            "the address that the provider names has an account to which this identity is not linked",
            remedy="sign in by mail, then link the identity: POST /v1/me/identities",
        )
    if user is None and row.wish is None:
        raise SignUpNeeded(
            "nobody's account has this identity",
            remedy="sign up with it: `sign_up` in POST /v1/oidc/NAME/begin; or link it to your account",
        )
    if user is None:
        user = await _make_account(session, settings, Wish.of_json(row.wish or {}), email, now)
    auth.refuse_blocked(user)
    await _add_identity(session, user, claims, now)
    return user


def _address_of(claims: Claims) -> str | None:
    try:
        return None if claims.email is None else members.check_email(claims.email)
    except InvalidEmail as error:
        raise ProviderFailed(
            f"the provider says of the address: {error.detail}", remedy="tell the pool's operator"
        ) from None


async def _add_identity(session: AsyncSession, user: User, claims: Claims, now: datetime) -> None:
    act_as(session, f"user {user.id}")
    own = select(func.count()).select_from(Identity).where(Identity.user_id == user.id)
    if (await session.scalar(own) or 0) >= MAX_IDENTITIES:
        raise LimitReached(f"the account has {MAX_IDENTITIES} identities", remedy="unlink one of them")
    session.add(Identity(user_id=user.id, issuer=claims.issuer, subject=claims.subject, created_at=now))
    await session.flush()
    await _tell_of_identity(session, user, "identity-linked", now)


async def unlink(session: AsyncSession, user: User, identity_id: int, now: datetime) -> None:
    """Take an identity from an account. Raises NotFound, IdentityTaken when nothing else lets its user in."""
    own = await session.scalars(select(Identity).where(Identity.user_id == user.id).with_for_update())
    identities = {row.id: row for row in own}
    if identity_id not in identities:
        raise NotFound("you have no such identity")
    if len(identities) == 1 and user.email is None:
        raise IdentityTaken(
            "this identity is all that you can sign in with", remedy="give your account a mail address first"
        )
    await session.delete(identities[identity_id])
    await session.flush()
    await _tell_of_identity(session, user, "identity-unlinked", now)


async def expire(session: AsyncSession, now: datetime) -> None:
    """Forget the addresses of who wanted to sign in, and sessions that ended long ago."""
    await session.execute(delete(SignIn).where(SignIn.created_at <= now - _WINDOW))
    await session.execute(
        delete(Token).where(Token.kind == TokenKind.SESSION, Token.expires_at <= now - _KEPT)
    )


async def end_all_sessions(session: AsyncSession, now: datetime) -> int:
    """Sign everybody out, and end what the staff reads as others; how many sessions that were."""
    await auth.revoke(session, now, Token.viewer_id.is_not(None))
    return await auth.revoke(session, now, Token.kind == TokenKind.SESSION)
