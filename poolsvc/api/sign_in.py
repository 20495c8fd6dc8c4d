"""Signing up and in, for people who are nobody yet: by mail, and by providers of OpenID Connect."""

from datetime import datetime

from fastapi import APIRouter
from pydantic import Field
from sqlalchemy.ext.asyncio import AsyncSession

from poolsvc import members, sign_in, terms
from poolsvc.api.accounts import Accepted, SelfView, view_of
from poolsvc.api.detours import BeginView, ComeBackRequest, identify, provider_named
from poolsvc.api.request import (
    Document,
    Line,
    MailedToken,
    NamePath,
    NowDep,
    Services,
    ServicesDep,
    SessionDep,
)
from poolsvc.config import SignUp
from poolsvc.errors import InvalidDocument
from poolsvc.models import MemberKind, User
from poolsvc.sign_in import Wish

router = APIRouter(prefix="/v1")


class Mailed(Document):
    """The same for every address."""

    detail: str = "If there is something to say to this address, it is in a mail to it."


class TermsView(Document):
    document: str
    version: str
    title: str
    url: str


class SignUpView(Document):
    """How one gets an account."""

    sign_up: SignUp
    terms: list[TermsView]


class LinkRequest(Document):
    email: Line = Field(max_length=254)


class SignedIn(Document):
    token: str = Field(description="of the session; shown only now")
    expires_at: datetime
    account: SelfView


class NewMember(Document):
    name: Line = Field(max_length=members.MAX_NAME, description="display name; may be shown publicly")
    kind: MemberKind = MemberKind.PERSON


class NewAccount(Document):
    name: Line = Field(
        "", max_length=members.MAX_NAME, description="your own display name, not a mail address"
    )
    member: NewMember | None = Field(
        None, description="who gives the servers; needed but for who is invited to a member"
    )
    accept: list[Accepted] = Field(
        default=[], max_length=16, description="all current terms: GET /v1/sign-up"
    )
    invitation: Line | None = Field(None, max_length=200, description="the token of an invitation")


class SignUpRequest(NewAccount):
    email: Line = Field(max_length=254)


class ProviderView(Document):
    name: str
    issuer: str


class BeginRequest(Document):
    sign_up: NewAccount | None = Field(None, description="the account to make for who has none")


@router.get("/sign-up")
async def read_sign_up(services: ServicesDep, session: SessionDep) -> SignUpView:
    """Who gets an account, and the terms to accept for one."""
    current = await terms.state(session, services.settings, None)
    return SignUpView(
        sign_up=services.settings.sign_up, terms=[TermsView(**_shown(entry)) for entry in current]
    )


def _shown(entry: terms.TermsState) -> dict[str, str]:
    return {name: getattr(entry, name) for name in TermsView.model_fields}


@router.post("/sign-up", status_code=202)
async def sign_up(body: SignUpRequest, services: ServicesDep, session: SessionDep, now: NowDep) -> Mailed:
    """Ask for an account. It comes into being when the link in the mail is opened within 15 minutes."""
    wish = await _wish(session, services, body, now)
    await sign_in.request_account(session, services.settings, body.email, wish, now)
    return Mailed()


async def _wish(session: AsyncSession, services: Services, body: NewAccount, now: datetime) -> Wish:
    invitation = None
    if body.invitation is not None:
        invitation = await sign_in.find_invitation(session, services.key, body.invitation, now)
    joins = invitation is not None and invitation.member_id is not None
    if joins == (body.member is not None):
        raise InvalidDocument(
            "`member` names whom you found: needed, unless the invitation is to a member",
            remedy="leave it out" if joins else "give its name",
            field="member",
        )
    wish = Wish(
        name=body.name,
        member=None if body.member is None else body.member.name,
        kind=MemberKind.PERSON if body.member is None else body.member.kind,
        accepted=tuple((entry.document, entry.version) for entry in body.accept),
        invitation=None if invitation is None else invitation.id,
    )
    await sign_in.check_wish(session, services.settings, wish)
    return wish


@router.post("/sign-in", status_code=202)
async def request_link(body: LinkRequest, services: ServicesDep, session: SessionDep, now: NowDep) -> Mailed:
    """Ask for a link by mail. It is good once, for 15 minutes."""
    await sign_in.request_link(session, services.settings, body.email, now)
    return Mailed()


@router.post("/sign-in/confirm")
async def confirm(body: MailedToken, services: ServicesDep, session: SessionDep, now: NowDep) -> SignedIn:
    """Open a session with the token of a link."""
    user, token = await sign_in.confirm(session, services.settings, services.key, body.token, now)
    return await _signed_in(session, services, user, token, now)


async def _signed_in(
    session: AsyncSession, services: Services, user: User, token: str, now: datetime
) -> SignedIn:
    return SignedIn(
        token=token,
        expires_at=now + sign_in.SESSION_LIFE,
        account=await view_of(session, services.settings, user.id),
    )


@router.get("/oidc")
async def list_providers(services: ServicesDep) -> list[ProviderView]:
    """The providers with whom one can sign in."""
    return [ProviderView(name=each.name, issuer=each.issuer) for each in services.providers.values()]


@router.post("/oidc/{name}/begin")
async def begin(name: NamePath, body: BeginRequest, services: ServicesDep, now: NowDep) -> BeginView:
    """Where to go to sign in with a provider, and what to keep until one comes back."""
    provider = provider_named(services, name)
    async with services.database.transaction("anybody") as session:
        wish = None if body.sign_up is None else await _wish(session, services, body.sign_up, now)
        detour = await sign_in.begin_detour(session, services.key, provider.issuer, now, wish=wish)
    return BeginView(url=await provider.authorization_url(detour, now), binding=detour.binding)


@router.post("/oidc/finish")
async def finish(body: ComeBackRequest, services: ServicesDep, now: NowDep) -> SignedIn:
    """Open a session with what the provider sent one back with."""
    row, claims = await identify(services, body, now)
    async with services.database.transaction("anybody") as session:
        user, token = await sign_in.finish_detour(session, services.settings, row, claims, now)
        return await _signed_in(session, services, user, token, now)
