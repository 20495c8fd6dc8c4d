"""The people of members, and invitations."""

from datetime import datetime

from fastapi import APIRouter
from pydantic import Field
from sqlalchemy import select
from sqlalchemy.orm import selectinload

from poolsvc import teams
from poolsvc.api.accounts import whole_account
from poolsvc.api.idempotent import idempotent
from poolsvc.api.paging import Page, PagingDep
from poolsvc.api.request import (
    Document,
    IdPath,
    Line,
    MailedToken,
    NowDep,
    PrincipalDep,
    RandomIdPath,
    ServicesDep,
    SessionDep,
)
from poolsvc.auth import Operation, Principal
from poolsvc.derived import Purpose
from poolsvc.errors import Forbidden, NotFound
from poolsvc.models import Invitation, MemberRole, Membership

router = APIRouter(prefix="/v1")


class PersonView(Document):
    """Somebody who acts for a member."""

    user: int
    name: str
    email: str | None = Field(description="null unless it is one's own or one manages the member's users")
    role: MemberRole
    since: datetime
    mail: bool = Field(description="whether they get the member's notices by mail")


class PersonChange(Document):
    """What is left out stays as it is."""

    role: MemberRole | None = None
    mail: bool | None = Field(None, description="only for oneself")


class PoolInvitationRequest(Document):
    email: Line = Field(max_length=254, description="where the invitation is mailed")


class InvitationRequest(PoolInvitationRequest):
    role: MemberRole = MemberRole.TECHNICIAN


class InvitationView(Document):
    id: int
    email: str | None = Field(description="null once it is over")
    role: MemberRole | None = Field(description="null for an invitation to the pool")
    invited_by: int
    created_at: datetime
    expires_at: datetime
    accepted_at: datetime | None
    revoked_at: datetime | None


class JoinedView(Document):
    member: int
    role: MemberRole


@router.get("/members/{member}/users")
async def list_users_of_member(
    member: IdPath, principal: PrincipalDep, session: SessionDep, paging: PagingDep
) -> Page[PersonView]:
    """Who acts for the member."""
    principal.may(Operation.READ_MEMBER, member=member)
    found = select(Membership).where(Membership.member_id == member).options(selectinload(Membership.user))
    rows, further = await paging.rows(session, found, Membership.id)
    return Page(items=[_person(row, principal) for row in rows], next=further)


def _person(row: Membership, principal: Principal) -> PersonView:
    shown = row.user_id == principal.user_id or _manages(principal, row.member_id)
    return PersonView(
        user=row.user_id,
        name=row.user.name,
        email=row.user.email if shown else None,
        role=row.role,
        since=row.created_at,
        mail=row.mail,
    )


def _manages(principal: Principal, member: int) -> bool:
    try:
        principal.may(Operation.MANAGE_USERS, member=member)
    except Forbidden:
        return False
    return True


@router.patch("/members/{member}/users/{user}")
async def change_user_of_member(
    member: IdPath,
    user: IdPath,
    body: PersonChange,
    principal: PrincipalDep,
    session: SessionDep,
    now: NowDep,
) -> PersonView:
    """Change somebody's role in the member; or, for oneself, whether its notices come by mail."""
    if body.role is not None or not _is_self(principal, member, user):
        principal.may(Operation.MANAGE_USERS, member=member)
    if body.mail is not None:
        principal.may(Operation.CHANGE_SELF)
        if not _is_self(principal, member, user):
            raise Forbidden("whether mails come is their own choice", field="mail")
    if body.role is not None:
        await teams.change_role(session, member, user, body.role, now)
    row = await teams.find(session, member, user)
    if body.mail is not None:
        row.mail = body.mail
    return _person(row, principal)


@router.delete("/members/{member}/users/{user}", status_code=204)
async def remove_user_of_member(
    member: IdPath, user: IdPath, principal: PrincipalDep, session: SessionDep, now: NowDep
) -> None:
    """Let somebody act for the member no longer, at once; everybody may leave it themself."""
    if _is_self(principal, member, user):
        principal.may(Operation.CHANGE_SELF)
    else:
        principal.may(Operation.MANAGE_USERS, member=member)
    await teams.remove(session, member, user, now)


def _is_self(principal: Principal, member: int, user: int) -> bool:
    return principal.user_id == user and member in principal.acts_for


@router.post("/members/{member}/invitations", status_code=201)
@idempotent
async def invite_to_member(
    member: IdPath,
    body: InvitationRequest,
    principal: PrincipalDep,
    services: ServicesDep,
    session: SessionDep,
    now: NowDep,
) -> InvitationView:
    """Mail somebody an invitation to act for the member. The answer does not tell who has an account."""
    principal.may(Operation.MANAGE_USERS, member=member)
    invitation = await teams.invite(
        session,
        services.settings,
        body.email,
        now,
        by=principal.user_id or 0,
        member_id=member,
        role=body.role,
    )
    return InvitationView.model_validate(invitation)


@router.get("/members/{member}/invitations")
async def list_invitations_of_member(
    member: IdPath, principal: PrincipalDep, session: SessionDep, paging: PagingDep
) -> Page[InvitationView]:
    """The member's invitations, with those that are over."""
    principal.may(Operation.MANAGE_USERS, member=member)
    found = select(Invitation).where(Invitation.member_id == member)
    rows, further = await paging.rows(session, found, Invitation.id)
    return Page(items=[InvitationView.model_validate(row) for row in rows], next=further)


@router.delete("/members/{member}/invitations/{invitation}", status_code=204)
async def revoke_invitation_to_member(
    member: IdPath, invitation: RandomIdPath, principal: PrincipalDep, session: SessionDep, now: NowDep
) -> None:
    """Make an invitation useless."""
    principal.may(Operation.MANAGE_USERS, member=member)
    await teams.revoke_invitation(session, member, invitation, now)


@router.post("/invitations", status_code=201)
@idempotent
async def invite_to_pool(
    body: PoolInvitationRequest,
    principal: PrincipalDep,
    services: ServicesDep,
    session: SessionDep,
    now: NowDep,
) -> InvitationView:
    """Mail somebody an invitation to sign up."""
    principal.may(Operation.INVITE)
    invitation = await teams.invite(session, services.settings, body.email, now, by=principal.user_id or 0)
    return InvitationView.model_validate(invitation)


@router.get("/invitations")
async def list_invitations_to_pool(
    principal: PrincipalDep, session: SessionDep, paging: PagingDep
) -> Page[InvitationView]:
    """The invitations to the pool, with those that are over."""
    principal.may(Operation.INVITE)
    found = select(Invitation).where(Invitation.member_id.is_(None))
    rows, further = await paging.rows(session, found, Invitation.id)
    return Page(items=[InvitationView.model_validate(row) for row in rows], next=further)


@router.delete("/invitations/{invitation}", status_code=204)
async def revoke_invitation_to_pool(
    invitation: RandomIdPath, principal: PrincipalDep, session: SessionDep, now: NowDep
) -> None:
    """Make an invitation useless."""
    principal.may(Operation.INVITE)
    await teams.revoke_invitation(session, None, invitation, now)


@router.post("/invitations/accept")
@idempotent
async def accept_invitation(
    body: MailedToken, principal: PrincipalDep, services: ServicesDep, session: SessionDep, now: NowDep
) -> JoinedView:
    """Act for a member from now on. The account's address need not be the one that got the mail."""
    user_id = whole_account(principal, Operation.CHANGE_SELF)
    invitation = services.key.read(Purpose.INVITATION, body.token)
    if invitation is None:
        raise NotFound("there is no such invitation", remedy="copy the whole link", field="token")
    membership = await teams.accept(session, services.settings, invitation, user_id, now)
    return JoinedView(member=membership.member_id, role=membership.role)
