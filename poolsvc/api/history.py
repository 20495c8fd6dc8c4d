"""The audit log, for whom it concerns."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from pydantic import Field
from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncSession

from poolsvc import history
from poolsvc.api.accounts import whole_account
from poolsvc.api.lookup import server_to_read
from poolsvc.api.paging import Page, Paging, PagingDep
from poolsvc.api.request import Document, IdPath, Moment, NamePath, PrincipalDep, SessionDep, TextQuery
from poolsvc.auth import Operation, Principal
from poolsvc.models import Event

router = APIRouter(prefix="/v1")
IdQuery = Annotated[int | None, Query(ge=1, le=2**31 - 1)]


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Which time is asked for."""

    since: datetime | None
    until: datetime | None

    def of(self, found: Select[Event]) -> Select[Event]:
        if self.since is not None:
            found = found.where(Event.at >= self.since)
        if self.until is not None:
            found = found.where(Event.at < self.until)
        return found


async def _stretch(
    since: Moment | None = None,
    until: Annotated[Moment | None, Query(description="before this moment")] = None,
) -> _Stretch:
    return _Stretch(since, until)


StretchDep = Annotated[_Stretch, Depends(_stretch)]


class EventView(Document):
    """One change. Nothing in it names people or holds addresses or secrets."""

    id: int
    at: datetime
    actor: str = Field(description="such as `user 7`, `agent 3`, `worker`; `operator` for the pool's staff")
    kind: str
    subject: str = Field(description="what changed, such as `address 12`")
    member: int | None
    server: int | None
    user: int | None
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    reason: str


@router.get("/events")
async def list_events(
    principal: PrincipalDep,
    session: SessionDep,
    paging: PagingDep,
    stretch: StretchDep,
    member: Annotated[
        IdQuery, Query(description="of this member and the servers that are its own now")
    ] = None,
    server: Annotated[IdQuery, Query(description="the server's id")] = None,
    user: IdQuery = None,
    kind: TextQuery = None,
    actor: TextQuery = None,
) -> Page[EventView]:
    """What happened, the newest first; for the pool's staff."""
    principal.may(Operation.READ_POOL)
    found = select(Event)
    same = ((Event.server_id, server), (Event.user_id, user), (Event.kind, kind), (Event.actor, actor))
    for column, wanted in same:
        if wanted is not None:
            found = found.where(column == wanted)
    if member is not None:
        found = found.where(history.of_member(member))
    return await _page(session, paging, stretch.of(found), principal)


@router.get("/members/{member}/events")
async def list_events_of_member(
    member: IdPath, principal: PrincipalDep, session: SessionDep, paging: PagingDep, stretch: StretchDep
) -> Page[EventView]:
    """What happened to a member and to the servers that are its own now, the newest first."""
    principal.may(Operation.READ_MEMBER, member=member)
    known = await history.team(session, member)
    found = select(Event).where(history.of_member(member))
    return await _page(session, paging, stretch.of(found), principal, known)


@router.get("/servers/{name}/events")
async def list_events_of_server(
    name: NamePath, principal: PrincipalDep, session: SessionDep, paging: PagingDep, stretch: StretchDep
) -> Page[EventView]:
    """What happened to a server, under each member that had it, the newest first."""
    server = await server_to_read(session, principal, name)
    known = await history.team(session, server.member_id)
    found = select(Event).where(Event.server_id == server.id)
    return await _page(session, paging, stretch.of(found), principal, known)


@router.get("/me/events")
async def list_own_events(
    principal: PrincipalDep, session: SessionDep, paging: PagingDep, stretch: StretchDep
) -> Page[EventView]:
    """What happened to one's own account, the newest first."""
    user_id = whole_account(principal, Operation.READ_SELF)
    found = select(Event).where(Event.user_id == user_id)
    return await _page(session, paging, stretch.of(found), principal, [user_id])


async def _page(
    session: AsyncSession,
    paging: Paging,
    found: Select[Event],
    principal: Principal,
    known: Collection[int] = (),
) -> Page[EventView]:
    rows, further = await paging.rows(session, found, Event.id, newest_first=True)
    names = {} if principal.reads_pool else await history.names_for(session, rows, known)
    items = [
        EventView(
            id=row.id,
            at=row.at,
            actor=names.get(row.actor, row.actor),
            kind=row.kind,
            subject=row.subject,
            member=row.member_id,
            server=row.server_id,
            user=row.user_id,
            before=row.before,
            after=row.after,
            reason=row.reason,
        )
        for row in rows
    ]
    return Page(items=items, next=further)
