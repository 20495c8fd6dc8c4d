"""Times in which a server is not in the answer though it might be: maintenance, an operator's hold, leaving."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Path
from pydantic import Field
from sqlalchemy import select

from poolsvc import maintenance, servers, standing
from poolsvc.api.idempotent import idempotent
from poolsvc.api.lookup import server_for, server_to_read
from poolsvc.api.paging import Page, PagingDep
from poolsvc.api.request import (
    Document,
    IdPath,
    Moment,
    NamePath,
    NowDep,
    PrincipalDep,
    Reason,
    ReasonText,
    ServicesDep,
    SessionDep,
)
from poolsvc.api.servers import ServerView, changed_view, removal_reason, side_of
from poolsvc.auth import Operation
from poolsvc.models import HoldKind, MaintenanceWindow

router = APIRouter(prefix="/v1")


class WindowRequest(Document):
    starts_at: Moment | None = Field(None, description="now, unless told when")
    ends_at: Moment = Field(description="at most 30 days later")
    reason: ReasonText = ""


class WindowView(Document):
    id: int
    starts_at: datetime
    ends_at: datetime
    reason: str
    cancelled_at: datetime | None


class LeaveRequest(Document):
    at: Moment | None = Field(None, description="3 hours to 90 days ahead; at once without")
    reason: ReasonText = ""


@router.get("/servers/{name}/maintenance")
async def list_maintenance(
    name: NamePath, principal: PrincipalDep, session: SessionDep, paging: PagingDep
) -> Page[WindowView]:
    """The server's maintenance windows, those that were announced last first."""
    server = await server_to_read(session, principal, name, Operation.READ_SERVER)
    found = select(MaintenanceWindow).where(MaintenanceWindow.server_id == server.id)
    rows, further = await paging.rows(session, found, MaintenanceWindow.id, newest_first=True)
    return Page(items=[WindowView.model_validate(row) for row in rows], next=further)


@router.post("/servers/{name}/maintenance", status_code=201)
@idempotent
async def add_maintenance(
    name: NamePath, body: WindowRequest, principal: PrincipalDep, session: SessionDep, now: NowDep
) -> WindowView:
    """Announce maintenance: the server is out of the answer then, and nothing counts against it."""
    server = await server_for(session, principal, name, Operation.TEND_SERVER, staying=True)
    window = await maintenance.add(
        session,
        server,
        starts_at=body.starts_at,
        ends_at=body.ends_at,
        reason=body.reason,
        actor=principal.actor,
        now=now,
    )
    return WindowView.model_validate(window)


@router.delete("/servers/{name}/maintenance/{window}")
async def cancel_maintenance(
    name: NamePath,
    window: Annotated[IdPath, Path(description="the window's id")],
    principal: PrincipalDep,
    session: SessionDep,
    now: NowDep,
) -> WindowView:
    """End maintenance before its time, or before it began."""
    server = await server_for(session, principal, name, Operation.TEND_SERVER)
    cancelled = await maintenance.cancel(session, server, window, actor=principal.actor, now=now)
    return WindowView.model_validate(cancelled)


@router.put("/servers/{name}/hold")
async def hold_server(
    name: NamePath,
    body: Reason,
    principal: PrincipalDep,
    services: ServicesDep,
    session: SessionDep,
    now: NowDep,
) -> ServerView:
    """Keep a server out of the answer until the hold is lifted; for operators. Its member sees the reason."""
    server = await server_for(session, principal, name, Operation.JUDGE_SERVER, staying=True)
    if (hold := servers.held(server, HoldKind.OPERATOR)) is not None:
        hold.reason = body.reason
    await servers.set_hold(
        session, server, HoldKind.OPERATOR, reason=body.reason, actor=principal.actor, now=now
    )
    return await changed_view(session, services, server, now)


@router.delete("/servers/{name}/hold")
async def lift_hold(
    name: NamePath, principal: PrincipalDep, services: ServicesDep, session: SessionDep, now: NowDep
) -> ServerView:
    """Lift the operator's hold; others stay, and so does that of a member who is blocked."""
    server = await server_for(session, principal, name, Operation.JUDGE_SERVER)
    await standing.release(session, server, now, actor=principal.actor)
    return await changed_view(session, services, server, now)


@router.post("/servers/{name}/leaving", status_code=202)
@idempotent
async def leave(
    name: NamePath,
    body: LeaveRequest,
    principal: PrincipalDep,
    services: ServicesDep,
    session: SessionDep,
    now: NowDep,
) -> ServerView:
    """Leave the pool: at once and for good, or out of the answer now and for good on a later day.

    An agent says `at`: who has its token must not end the server's name.
    """
    operation = Operation.REMOVE_SERVER if body.at is None else Operation.LEAVE_SERVER
    server = await server_for(session, principal, name, operation)
    reason = body.reason or removal_reason(server, principal)
    if body.at is None:
        await servers.leave(session, server, actor=principal.actor, reason=reason, now=now)
    else:
        await servers.schedule_leave(
            session,
            server,
            at=body.at,
            actor=principal.actor,
            reason=reason,
            now=now,
            by_operator=side_of(server, principal) == "operator",
        )
    return await changed_view(session, services, server, now)


@router.delete("/servers/{name}/leaving")
async def stay(
    name: NamePath, principal: PrincipalDep, services: ServicesDep, session: SessionDep, now: NowDep
) -> ServerView:
    """Cancel what was to come on a later day. The server is in the answer again after good probes.

    What an operator scheduled, only operators cancel.
    """
    server = await server_for(session, principal, name, Operation.TEND_SERVER)
    if servers.may_stay(server) and server.leave_by_operator:
        principal.may(Operation.JUDGE_SERVER)
    await servers.cancel_leave(session, server, actor=principal.actor, now=now)
    return await changed_view(session, services, server, now)
