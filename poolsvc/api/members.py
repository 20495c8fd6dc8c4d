"""Members: who they are, and how they stand with the pool."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query, Response
from pydantic import Field
from sqlalchemy import func, select

from poolsvc import members, standing
from poolsvc.api.accounts import whole_account
from poolsvc.api.etags import NOT_MODIFIED, IfMatch, IfNoneMatch, etag_of, require_match, tagged
from poolsvc.api.idempotent import idempotent
from poolsvc.api.paging import Page, PagingDep
from poolsvc.api.request import (
    Document,
    IdPath,
    Line,
    NowDep,
    PrincipalDep,
    Reason,
    ServicesDep,
    SessionDep,
    TextQuery,
)
from poolsvc.auth import Operation, Role
from poolsvc.errors import InvalidDocument
from poolsvc.models import Member, MemberKind, MemberStatus

router = APIRouter(prefix="/v1")


class MemberView(Document):
    """A member as its people and the operators see it."""

    id: int
    name: str
    kind: MemberKind
    status: MemberStatus
    status_reason: str | None
    created_at: datetime
    opaque_id: str = Field(description="how others name it, such as to offer it a server")
    public: bool
    max_servers: int | None = Field(description="null: as many as the pool's policy says")


class MemberRequest(Document):
    name: Line = Field(max_length=members.MAX_NAME, description="display name; may be shown publicly")
    kind: MemberKind = MemberKind.PERSON
    email: Line | None = Field(
        None, max_length=254, description="of its first owner, when an operator makes the member"
    )


class MemberCreated(Document):
    id: int
    name: str
    status: MemberStatus
    token: str | None = Field(
        description="an API token of the first owner that an operator gave it; shown only now"
    )


class MemberChange(Document):
    """What is left out stays as it is."""

    name: Line | None = Field(None, max_length=members.MAX_NAME)
    kind: MemberKind | None = None
    public: bool | None = Field(None, description="whether everybody may see its name")
    max_servers: int | None = Field(None, ge=0, le=100_000, description="for operators; null: the policy's")


@router.get("/members")
async def list_members(
    principal: PrincipalDep,
    session: SessionDep,
    paging: PagingDep,
    status: MemberStatus | None = None,
    q: TextQuery = None,
) -> Page[MemberView]:
    """The members that one acts for; all of them for the pool's staff. `q` is how the name begins."""
    principal.may(Operation.READ_SELF)
    found = select(Member)
    if not principal.reads_pool:
        found = found.where(Member.id.in_(principal.acts_for))
    if status is not None:
        found = found.where(Member.status == status)
    if q is not None:
        found = found.where(func.lower(Member.name).startswith(q.lower(), autoescape=True))
    rows, further = await paging.rows(session, found, Member.id)
    return Page(items=[MemberView.model_validate(row) for row in rows], next=further)


@router.post("/members", status_code=201)
@idempotent
async def create_member(
    body: MemberRequest, principal: PrincipalDep, services: ServicesDep, session: SessionDep, now: NowDep
) -> MemberCreated:
    """Operators make a member with a new first owner. Others found one of their own, which waits for approval."""
    if Role.OPERATOR not in principal.roles():
        user_id = whole_account(principal, Operation.FOUND_MEMBER)
        if body.email is not None:
            raise InvalidDocument("you are the first owner", remedy="leave `email` out", field="email")
        found = await members.found(session, services.settings, user_id, body.name, body.kind, now)
        return MemberCreated(id=found.id, name=found.name, status=found.status, token=None)
    principal.may(Operation.CREATE_MEMBER)
    owner = await members.create_user(session, now, email=body.email)
    member = await members.create(session, body.name, now, owner=owner, kind=body.kind)
    token = await members.first_token(session, owner, now, member_id=member.id)
    return MemberCreated(id=member.id, name=member.name, status=member.status, token=token)


@router.get("/members/{member}", response_model=MemberView, responses=NOT_MODIFIED)
async def read_member(
    member: IdPath,
    principal: PrincipalDep,
    session: SessionDep,
    response: Response,
    if_none_match: IfNoneMatch = None,
) -> MemberView | Response:
    """One member, with its tag."""
    principal.may(Operation.READ_MEMBER, member=member)
    return tagged(MemberView.model_validate(await members.get(session, member)), response, if_none_match)


@router.patch("/members/{member}")
async def change_member(
    member: IdPath,
    body: MemberChange,
    principal: PrincipalDep,
    session: SessionDep,
    response: Response,
    if_match: IfMatch = None,
) -> MemberView:
    """Change a member's name, kind, whether it is public, and, as an operator, how many servers it may have.

    With `If-Match` only if it still is what the caller has read.
    """
    principal.may(Operation.CHANGE_MEMBER, member=member)
    limits = "max_servers" in body.model_fields_set
    if limits:
        principal.may(Operation.JUDGE_MEMBER)
    require_match(if_match, etag_of(MemberView.model_validate(await members.lock(session, member))))
    row = await members.change(session, member, name=body.name, kind=body.kind, public=body.public)
    if limits:
        row.max_servers = body.max_servers
    view = MemberView.model_validate(row)
    response.headers["ETag"] = etag_of(view)
    return view


@router.delete("/members/{member}")
async def close_member(
    member: IdPath,
    principal: PrincipalDep,
    session: SessionDep,
    now: NowDep,
    *,
    remove_servers: Annotated[bool, Query(description="take its servers out of the pool for good")] = False,
) -> MemberView:
    """Close a member for good. Its name is free again; its log and the receipts of its servers stay."""
    principal.may(Operation.CLOSE_MEMBER, member=member)
    by = "owner" if member in principal.acts_for else "operator"
    row = await standing.close(
        session, member, now, actor=principal.actor, by=by, remove_servers=remove_servers
    )
    return MemberView.model_validate(row)


@router.put("/members/{member}/approval")
async def approve_member(
    member: IdPath, principal: PrincipalDep, session: SessionDep, now: NowDep
) -> MemberView:
    """Let a member in that waits for it."""
    principal.may(Operation.JUDGE_MEMBER)
    return MemberView.model_validate(await standing.approve(session, member, now))


@router.put("/members/{member}/block")
async def block_member(
    member: IdPath, body: Reason, principal: PrincipalDep, session: SessionDep, now: NowDep
) -> MemberView:
    """Suspend a member and hold its servers. Its people can still read, and leave."""
    principal.may(Operation.JUDGE_MEMBER)
    return MemberView.model_validate(
        await standing.block(session, member, body.reason, now, actor=principal.actor)
    )


@router.delete("/members/{member}/block")
async def unblock_member(
    member: IdPath, principal: PrincipalDep, session: SessionDep, now: NowDep
) -> MemberView:
    """End the block, and the holds that it set; other holds stay."""
    principal.may(Operation.JUDGE_MEMBER)
    return MemberView.model_validate(await standing.unblock(session, member, now, actor=principal.actor))
