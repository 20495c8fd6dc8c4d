"""One's own account: who one is, one's sessions and tokens."""

from datetime import datetime

from fastapi import APIRouter
from pydantic import Field

from poolsvc.api.request import Document, PrincipalDep, SessionDep
from poolsvc.auth import Operation
from poolsvc.models import MemberRole, StaffRole, User

router = APIRouter(prefix="/v1")


class MembershipView(Document):
    member: int
    role: MemberRole


class SelfView(Document):
    id: int
    email: str | None
    name: str
    staff: StaffRole | None
    created_at: datetime
    memberships: list[MembershipView] = Field(description="the members that the account acts for")


@router.get("/me")
async def read_self(principal: PrincipalDep, session: SessionDep) -> SelfView:
    """The account that the token belongs to."""
    principal.may(Operation.READ_SELF)
    user = await session.get_one(User, principal.user_id)
    return SelfView(
        id=user.id,
        email=user.email,
        name=user.name,
        staff=user.staff,
        created_at=user.created_at,
        memberships=[MembershipView(member=member, role=role) for member, role in principal.members.items()],
    )
