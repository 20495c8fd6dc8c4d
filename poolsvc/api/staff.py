"""People as the pool's staff sees them, and who is of the staff."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter
from pydantic import Field, StringConstraints
from sqlalchemy import func, or_, select

from poolsvc import standing
from poolsvc.api.accounts import ApiTokenCreated
from poolsvc.api.idempotent import idempotent
from poolsvc.api.paging import Page, PagingDep
from poolsvc.api.request import (
    Document,
    IdPath,
    Line,
    NowDep,
    PrincipalDep,
    Reason,
    SessionDep,
    TextQuery,
)
from poolsvc.auth import Operation
from poolsvc.models import StaffRole, User

router = APIRouter(prefix="/v1")


class UserView(Document):
    id: int
    email: str | None
    name: str
    staff: StaffRole | None
    created_at: datetime
    confirmed_at: datetime | None = Field(description="when they proved that the mail address is theirs")
    blocked_at: datetime | None
    blocked_reason: str | None
    erased_at: datetime | None


class StaffRequest(Document):
    role: StaffRole


class ViewRequest(Document):
    # What a token's label has room for.
    reason: Annotated[Line, StringConstraints(strip_whitespace=True, min_length=1, max_length=80)] = Field(
        description="the person sees it"
    )


@router.get("/users")
async def list_users(
    principal: PrincipalDep, session: SessionDep, paging: PagingDep, q: TextQuery = None
) -> Page[UserView]:
    """All people, or those whose name or mail address begins so."""
    principal.may(Operation.READ_POOL)
    found = select(User)
    if q is not None:
        found = found.where(
            or_(
                User.email.startswith(q.lower(), autoescape=True),
                func.lower(User.name).startswith(q.lower(), autoescape=True),
            )
        )
    rows, further = await paging.rows(session, found, User.id)
    return Page(items=[UserView.model_validate(row) for row in rows], next=further)


@router.put("/users/{user}/block")
async def block_user(
    user: IdPath, body: Reason, principal: PrincipalDep, session: SessionDep, now: NowDep
) -> UserView:
    """Refuse a person's sessions and tokens from now on. Their members and servers are not touched."""
    principal.may(Operation.JUDGE_USER)
    return UserView.model_validate(
        await standing.block_user(session, user, body.reason, now=now, by=principal.user_id)
    )


@router.delete("/users/{user}/block")
async def unblock_user(user: IdPath, principal: PrincipalDep, session: SessionDep) -> UserView:
    """Let a person in again."""
    principal.may(Operation.JUDGE_USER)
    return UserView.model_validate(await standing.unblock_user(session, user))


@router.post("/users/{user}/view", status_code=201)
@idempotent
async def view_as(
    user: IdPath, body: ViewRequest, principal: PrincipalDep, session: SessionDep, now: NowDep
) -> ApiTokenCreated:
    """A token to read what a person can read, for half an hour: to see what they ask about. It changes nothing."""
    principal.may(Operation.VIEW_AS)
    row, text = await standing.view_as(session, user, body.reason, now, by=principal.user_id)
    return ApiTokenCreated.of(row, token=text)


@router.put("/users/{user}/staff")
async def appoint(user: IdPath, body: StaffRequest, principal: PrincipalDep, session: SessionDep) -> UserView:
    """Make a person an operator, or support, which reads everything and changes nothing."""
    principal.may(Operation.APPOINT_STAFF)
    return UserView.model_validate(await standing.appoint(session, user, body.role))


@router.delete("/users/{user}/staff")
async def dismiss(user: IdPath, principal: PrincipalDep, session: SessionDep) -> UserView:
    """Make a person staff no longer. The last operator stays."""
    principal.may(Operation.APPOINT_STAFF)
    return UserView.model_validate(await standing.appoint(session, user, None))
