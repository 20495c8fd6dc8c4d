"""Members and their people."""

from fastapi import APIRouter
from pydantic import Field

from poolsvc import auth, members
from poolsvc.api.idempotent import idempotent
from poolsvc.api.request import Document, NowDep, PrincipalDep, SessionDep
from poolsvc.auth import Operation
from poolsvc.models import MemberKind, TokenKind

router = APIRouter(prefix="/v1")


class MemberRequest(Document):
    name: str = Field(max_length=200, description="display name; may be shown publicly")
    kind: MemberKind = MemberKind.PERSON
    email: str | None = Field(None, max_length=254, description="the mail address of its first owner")


class MemberCreated(Document):
    id: int
    name: str
    token: str = Field(description="an API token of its first owner; shown only now")


@router.post("/members", status_code=201)
@idempotent
async def create_member(
    body: MemberRequest, principal: PrincipalDep, session: SessionDep, now: NowDep
) -> MemberCreated:
    """Create a member with its first owner; for operators."""
    principal.may(Operation.CREATE_MEMBER)
    owner = await members.create_user(session, now, email=body.email)
    member = await members.create(session, body.name, now, owner=owner, kind=body.kind)
    _, token = await auth.issue(
        session, TokenKind.API, now=now, user_id=owner.id, member_id=member.id, label="first token"
    )
    return MemberCreated(id=member.id, name=member.name, token=token)
