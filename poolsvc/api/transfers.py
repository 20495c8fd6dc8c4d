"""Moving a server to another member."""

from collections.abc import Sequence
from datetime import datetime

from fastapi import APIRouter
from pydantic import Field
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from poolsvc import transfers
from poolsvc.api.idempotent import idempotent
from poolsvc.api.lookup import server_for
from poolsvc.api.paging import Page, PagingDep
from poolsvc.api.request import Document, IdPath, NamePath, NowDep, PrincipalDep, ServicesDep, SessionDep
from poolsvc.auth import Operation
from poolsvc.models import Member, Server, Transfer

router = APIRouter(prefix="/v1")


class OfferRequest(Document):
    to: str = Field(
        pattern=r"^[0-9a-f]{16}$", description="`opaque_id` of the member that is to have the server"
    )


class TransferView(Document):
    """An offer of a server; open until it expires, is accepted or is declined."""

    id: int
    server: str
    from_member: str = Field(description="its `opaque_id`")
    to_member: str
    created_at: datetime
    expires_at: datetime
    accepted_at: datetime | None
    declined_at: datetime | None = Field(description="or taken back")


@router.post("/servers/{name}/transfer", status_code=201)
@idempotent
async def offer_server(
    name: NamePath,
    body: OfferRequest,
    principal: PrincipalDep,
    services: ServicesDep,
    session: SessionDep,
    now: NowDep,
) -> TransferView:
    """Offer a server to another member; it moves when an owner there accepts."""
    server = await server_for(session, principal, name, Operation.OFFER_SERVER)
    return await _view(session, await transfers.offer(session, services.settings, server.id, body.to, now))


@router.delete("/servers/{name}/transfer")
async def take_back_server(
    name: NamePath, principal: PrincipalDep, session: SessionDep, now: NowDep
) -> TransferView:
    """Take the open offer of a server back."""
    server = await server_for(session, principal, name, Operation.OFFER_SERVER)
    return await _view(session, await transfers.take_back(session, server.id, now))


@router.get("/members/{member}/transfers")
async def list_transfers(
    member: IdPath, principal: PrincipalDep, session: SessionDep, paging: PagingDep
) -> Page[TransferView]:
    """The offers that the member made and got, the newest first, with those that are over."""
    principal.may(Operation.READ_MEMBER, member=member)
    found = select(Transfer).where(transfers.concerns(member))
    rows, further = await paging.rows(session, found, Transfer.id, newest_first=True)
    return Page(items=await views_of(session, rows), next=further)


@router.post("/transfers/{transfer}/accept")
@idempotent
async def accept_server(
    transfer: IdPath, principal: PrincipalDep, services: ServicesDep, session: SessionDep, now: NowDep
) -> TransferView:
    """Take an offered server: name, agent and certificate go on as they are."""
    found = await transfers.get(session, transfer)
    principal.may(Operation.TAKE_SERVER, member=found.to_member_id)
    return await _view(session, await transfers.accept(session, services.settings, transfer, now))


@router.post("/transfers/{transfer}/decline")
@idempotent
async def decline_server(
    transfer: IdPath, principal: PrincipalDep, session: SessionDep, now: NowDep
) -> TransferView:
    """Refuse an offered server."""
    found = await transfers.get(session, transfer)
    principal.may(Operation.TAKE_SERVER, member=found.to_member_id)
    return await _view(session, await transfers.decline(session, transfer, now))


async def _view(session: AsyncSession, row: Transfer) -> TransferView:
    (view,) = await views_of(session, [row])
    return view


async def views_of(session: AsyncSession, rows: Sequence[Transfer]) -> list[TransferView]:
    of_servers = select(Server.id, Server.name).where(Server.id.in_({row.server_id for row in rows}))
    both = {member for row in rows for member in (row.from_member_id, row.to_member_id)}
    of_members = select(Member.id, Member.opaque_id).where(Member.id.in_(both))
    names = {row.id: row.name for row in await session.execute(of_servers)}
    opaque = {row.id: row.opaque_id for row in await session.execute(of_members)}
    return [
        TransferView(
            id=row.id,
            server=names[row.server_id],
            from_member=opaque[row.from_member_id],
            to_member=opaque[row.to_member_id],
            created_at=row.created_at,
            expires_at=row.expires_at,
            accepted_at=row.accepted_at,
            declined_at=row.declined_at,
        )
        for row in rows
    ]
