"""One's own account: who one is, how one signs in, one's sessions and tokens, and its end."""

from datetime import datetime
from typing import Any, Self

from fastapi import APIRouter, Response
from pydantic import Field
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from poolsvc import auth, members, people, sign_in, terms
from poolsvc.api.detours import BeginView, ComeBackRequest, identify, provider_named
from poolsvc.api.etags import NOT_MODIFIED, IfMatch, IfNoneMatch, etag_of, require_match, tagged
from poolsvc.api.idempotent import idempotent
from poolsvc.api.paging import Page, Paging, PagingDep
from poolsvc.api.request import (
    CallerDep,
    Document,
    IdPath,
    Line,
    MailedToken,
    Moment,
    NowDep,
    PrincipalDep,
    ServicesDep,
    SessionDep,
)
from poolsvc.auth import Operation, Principal
from poolsvc.config import Settings
from poolsvc.errors import Forbidden
from poolsvc.models import Identity, MemberRole, Membership, Scope, StaffRole, Token, TokenKind, User

router = APIRouter(prefix="/v1/me")


class MembershipView(Document):
    member: int
    role: MemberRole


class TermsStateView(Document):
    document: str
    version: str
    title: str
    url: str
    accepted_at: datetime | None


class SelfView(Document):
    id: int
    email: str | None
    name: str
    staff: StaffRole | None
    created_at: datetime
    memberships: list[MembershipView] = Field(description="the members that the account acts for")
    terms: list[TermsStateView] = Field(description="the current ones; all are accepted before registering")


class SelfChange(Document):
    """What is left out stays as it is."""

    name: Line | None = Field(
        None, max_length=members.MAX_NAME, description="display name, not a mail address; may be empty"
    )
    email: Line | None = Field(None, max_length=254, description="takes effect by the link in a mail to it")


class SessionView(Document):
    id: int
    created_at: datetime
    last_used_at: datetime | None = Field(description="to the hour")
    expires_at: datetime | None
    current: bool


class NewApiToken(Document):
    label: Line = Field(max_length=people.MAX_LABEL, description="what it is for")
    scopes: set[Scope] = Field(min_length=1)
    member: int | None = Field(None, description="if it is to be good for this member only")
    expires_at: Moment | None = Field(None, description="within a year; in 90 days if left out")


class ApiTokenView(Document):
    id: int
    label: str
    hint: str = Field(description="the first letters of its secret part")
    scopes: list[Scope]
    member: int | None
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None = Field(description="to the hour")

    @classmethod
    def of(cls, row: Token, **more: str) -> Self:
        return cls(
            id=row.id,
            label=row.label,
            hint=row.hint,
            scopes=[Scope(scope) for scope in row.scopes],
            member=row.member_id,
            created_at=row.created_at,
            expires_at=row.expires_at,
            last_used_at=row.last_used_at,
            **more,
        )


class ApiTokenCreated(ApiTokenView):
    token: str = Field(description="shown only now")


class Accepted(Document):
    document: Line = Field(max_length=50)
    version: Line = Field(max_length=50)


class TermsAcceptance(Document):
    accept: list[Accepted] = Field(max_length=16, description="all current terms: GET /v1/me/terms")


class IdentityRequest(Document):
    provider: Line = Field(max_length=64, description="from GET /v1/oidc")


class IdentityView(Document):
    id: int
    issuer: str
    subject: str
    created_at: datetime


async def view_of(session: AsyncSession, settings: Settings, user_id: int) -> SelfView:
    user = await session.get_one(User, user_id)
    own = await session.scalars(
        select(Membership).where(Membership.user_id == user_id).order_by(Membership.id)
    )
    current = await terms.state(session, settings, user_id)
    return SelfView(
        id=user.id,
        email=user.email,
        name=user.name,
        staff=user.staff,
        created_at=user.created_at,
        memberships=[MembershipView(member=row.member_id, role=row.role) for row in own],
        terms=[TermsStateView.model_validate(entry) for entry in current],
    )


def whole_account(principal: Principal, operation: Operation) -> int:
    """The user. A token for one member is not for all of its user's account. Raises Forbidden."""
    principal.may(operation)
    if principal.member_id is not None:
        raise Forbidden(
            f"a token for one member cannot {operation}",
            remedy="sign in, or use a token for the whole account",
        )
    assert principal.user_id is not None, "the table allows this to people only"
    return principal.user_id


@router.get("", response_model=SelfView, responses=NOT_MODIFIED)
async def read_self(
    principal: PrincipalDep,
    services: ServicesDep,
    session: SessionDep,
    response: Response,
    if_none_match: IfNoneMatch = None,
) -> SelfView | Response:
    """The account that the token belongs to, with its tag; to a token for one member, what concerns that member."""
    principal.may(Operation.READ_SELF)
    view = await view_of(session, services.settings, principal.user_id or 0)
    if principal.member_id is not None:
        own = [row for row in view.memberships if row.member == principal.member_id]
        view = view.model_copy(update={"email": None, "staff": None, "memberships": own})
    return tagged(view, response, if_none_match)


@router.patch("", status_code=202)
async def change_self(
    body: SelfChange,
    principal: PrincipalDep,
    services: ServicesDep,
    session: SessionDep,
    now: NowDep,
    response: Response,
    if_match: IfMatch = None,
) -> SelfView:
    """Change the name at once; and the address once the link in a mail to it was opened: POST /v1/me/email.

    With `If-Match` only if the account still is what the caller has read.
    """
    user_id = whole_account(principal, Operation.CHANGE_SELF)
    user = await session.get_one(User, user_id, with_for_update={"key_share": True}, populate_existing=True)
    require_match(if_match, etag_of(await view_of(session, services.settings, user_id)))
    if body.name is not None:
        user.name = members.check_display_name(body.name) if body.name else ""
    if body.email is not None:
        principal.may(Operation.CHANGE_IDENTITY)
        await sign_in.request_address(session, services.settings, user, body.email, now)
    view = await view_of(session, services.settings, user.id)
    response.headers["ETag"] = etag_of(view)
    return view


@router.post("/email")
async def change_email(
    body: MailedToken, principal: PrincipalDep, services: ServicesDep, session: SessionDep, now: NowDep
) -> SelfView:
    """Take the new address, with the token that was mailed to it. The old address is told."""
    user = await session.get_one(User, whole_account(principal, Operation.CHANGE_IDENTITY))
    await sign_in.change_address(session, services.key, user, body.token, now)
    return await view_of(session, services.settings, user.id)


@router.delete("", status_code=204)
async def erase_self(principal: PrincipalDep, session: SessionDep, now: NowDep) -> None:
    """Erase the account for good; everything that it could be entered with ends."""
    await people.erase(session, whole_account(principal, Operation.CHANGE_IDENTITY), now)


@router.get("/export")
async def export_self(principal: PrincipalDep, session: SessionDep) -> dict[str, Any]:
    """All that is kept about oneself; of events and mails the newest 10,000."""
    return await people.export(session, whole_account(principal, Operation.READ_SELF))


@router.get("/sessions")
async def list_sessions(
    principal: PrincipalDep, session: SessionDep, now: NowDep, paging: PagingDep
) -> Page[SessionView]:
    """Where one is signed in, the newest first."""
    whole_account(principal, Operation.READ_SELF)
    found = people.tokens(principal, TokenKind.SESSION, now)
    rows, further = await paging.rows(session, found, Token.id, newest_first=True)
    items = [
        SessionView(
            id=row.id,
            created_at=row.created_at,
            last_used_at=row.last_used_at,
            expires_at=row.expires_at,
            current=row.id == principal.token_id,
        )
        for row in rows
    ]
    return Page(items=items, next=further)


@router.delete("/sessions", status_code=204)
async def end_other_sessions(principal: PrincipalDep, session: SessionDep, now: NowDep) -> None:
    """Sign out everywhere but here."""
    user_id = whole_account(principal, Operation.CHANGE_SELF)
    await auth.revoke(
        session,
        now,
        Token.user_id == user_id,
        Token.kind == TokenKind.SESSION,
        Token.id != principal.token_id,
    )


@router.delete("/sessions/{session_id}", status_code=204)
async def end_session(session_id: IdPath, principal: PrincipalDep, session: SessionDep, now: NowDep) -> None:
    """Sign out somewhere."""
    whole_account(principal, Operation.CHANGE_SELF)
    await people.end_token(session, principal, TokenKind.SESSION, session_id, now)


@router.delete("/session", status_code=204)
async def sign_out(principal: PrincipalDep, session: SessionDep, now: NowDep) -> None:
    """End the token that is used for this."""
    principal.may(Operation.READ_SELF)
    await auth.revoke(session, now, Token.id == principal.token_id)


@router.get("/tokens")
async def list_tokens(
    principal: PrincipalDep, session: SessionDep, now: NowDep, paging: PagingDep
) -> Page[ApiTokenView]:
    """The tokens of one's programs, the newest first."""
    principal.may(Operation.READ_SELF)
    found = people.tokens(principal, TokenKind.API, now)
    rows, further = await paging.rows(session, found, Token.id, newest_first=True)
    return Page(items=[ApiTokenView.of(row) for row in rows], next=further)


@router.post("/tokens", status_code=201)
@idempotent
async def make_token(
    body: NewApiToken, principal: PrincipalDep, session: SessionDep, now: NowDep
) -> ApiTokenCreated:
    """A token for a program."""
    principal.may(Operation.CHANGE_SELF)
    row, text = await people.make_token(
        session,
        principal,
        label=body.label,
        scopes=body.scopes,
        member_id=body.member,
        expires_at=body.expires_at,
        now=now,
    )
    return ApiTokenCreated.of(row, token=text)


@router.delete("/tokens/{token_id}", status_code=204)
async def revoke_token(token_id: IdPath, principal: PrincipalDep, session: SessionDep, now: NowDep) -> None:
    """Make a token useless."""
    principal.may(Operation.CHANGE_SELF)
    await people.end_token(session, principal, TokenKind.API, token_id, now)


@router.get("/terms")
async def read_terms(
    principal: PrincipalDep, services: ServicesDep, session: SessionDep
) -> list[TermsStateView]:
    """The current terms, and when one accepted them."""
    principal.may(Operation.READ_SELF)
    found = await terms.state(session, services.settings, principal.user_id)
    return [TermsStateView.model_validate(entry) for entry in found]


@router.post("/terms")
async def accept_terms(
    body: TermsAcceptance, principal: PrincipalDep, services: ServicesDep, session: SessionDep, now: NowDep
) -> list[TermsStateView]:
    """Accept the current terms, each with its version."""
    principal.may(Operation.ACCEPT_TERMS)
    assert principal.user_id is not None, "the table allows this to people only"
    given = [(entry.document, entry.version) for entry in body.accept]
    await terms.accept(session, services.settings, principal.user_id, given, now)
    return await read_terms(principal, services, session)


@router.get("/identities")
async def list_identities(
    principal: PrincipalDep, session: SessionDep, paging: PagingDep
) -> Page[IdentityView]:
    """The providers' identities that sign one in."""
    return await _identities(session, whole_account(principal, Operation.READ_SELF), paging)


async def _identities(session: AsyncSession, user_id: int, paging: Paging) -> Page[IdentityView]:
    found = select(Identity).where(Identity.user_id == user_id)
    rows, further = await paging.rows(session, found, Identity.id)
    return Page(items=[IdentityView.model_validate(row) for row in rows], next=further)


@router.post("/identities")
async def begin_link(
    body: IdentityRequest, caller: CallerDep, services: ServicesDep, now: NowDep
) -> BeginView:
    """Where to go to link an identity of a provider."""
    user_id = whole_account(caller, Operation.CHANGE_IDENTITY)
    provider = provider_named(services, body.provider)
    async with services.database.transaction(caller.actor) as session:
        detour = await sign_in.begin_detour(session, services.key, provider.issuer, now, user_id=user_id)
    return BeginView(url=await provider.authorization_url(detour, now), binding=detour.binding)


@router.post("/identities/finish")
async def finish_link(
    body: ComeBackRequest, caller: CallerDep, services: ServicesDep, now: NowDep
) -> Page[IdentityView]:
    """Link the identity that one came back with; the answer is the list's first page. All people of one's members are told."""
    user_id = whole_account(caller, Operation.CHANGE_IDENTITY)
    _, claims = await identify(services, body, now, user_id=user_id)
    async with services.database.transaction(caller.actor) as session:
        await sign_in.link(session, await session.get_one(User, user_id), claims, now)
        return await _identities(session, user_id, Paging())


@router.delete("/identities/{identity_id}", status_code=204)
async def unlink(identity_id: IdPath, principal: PrincipalDep, session: SessionDep, now: NowDep) -> None:
    """Unlink an identity. All people of one's members are told."""
    user = await session.get_one(User, whole_account(principal, Operation.CHANGE_IDENTITY))
    await sign_in.unlink(session, user, identity_id, now)
