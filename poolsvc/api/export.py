"""All that is held about a member, to take along: every list is its newest rows, up to a bound, the newest first."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from sqlalchemy import ColumnElement, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute, selectinload

from poolsvc import history, members, transfers
from poolsvc.api.request import IdPath, PrincipalDep, SessionDep
from poolsvc.api.transfers import views_of
from poolsvc.auth import Operation
from poolsvc.models import (
    Address,
    Event,
    Hold,
    Invitation,
    MaintenanceWindow,
    Membership,
    Notice,
    Order,
    RevocationOrder,
    Server,
    Transfer,
    Webhook,
)
from poolsvc.people import MAX_EVENTS, plain

router = APIRouter(prefix="/v1")
_OF_SERVERS: dict[str, tuple[Any, InstrumentedAttribute[int]]] = {
    "addresses": (Address, Address.server_id),
    "certificates": (Order, Order.server_id),
    "revocation_orders": (RevocationOrder, RevocationOrder.server_id),
    "holds": (Hold, Hold.server_id),
    "maintenance": (MaintenanceWindow, MaintenanceWindow.server_id),
}


@router.get("/members/{member}/export")
async def export_member(member: IdPath, principal: PrincipalDep, session: SessionDep) -> dict[str, Any]:
    """All that is kept about a member and its servers, without secrets; of each list the newest 10,000.

    What probes measured is not in it: GET /v1/servers/NAME/history.
    """
    principal.may(Operation.EXPORT_MEMBER, member=member)
    own = await members.get(session, member)
    servers = await _newest(session, Server, Server.member_id == member)
    events = await _newest(session, Event, history.of_member(member))
    known = await history.team(session, member)
    actors = {} if principal.reads_pool else await history.names_for(session, events, known)
    notices = await _newest(
        session, Notice, Notice.member_id == member, options=(selectinload(Notice.deliveries),)
    )
    offers = await _newest(session, Transfer, transfers.concerns(member))
    return {
        "member": plain(own),
        "people": await _plain(session, Membership, Membership.member_id == member),
        "servers": [plain(row) for row in servers],
        **{
            name: await _plain(
                session, model, server_id.in_(select(Server.id).where(Server.member_id == member))
            )
            for name, (model, server_id) in _OF_SERVERS.items()
        },
        "events": [{**plain(row), "actor": actors.get(row.actor, row.actor)} for row in events],
        "invitations": await _plain(session, Invitation, Invitation.member_id == member),
        "transfers": await views_of(session, offers),
        "webhooks": await _plain(session, Webhook, Webhook.member_id == member),
        "notices": [
            {**plain(row), "deliveries": [plain(delivery) for delivery in row.deliveries]} for row in notices
        ],
    }


async def _newest(
    session: AsyncSession, model: Any, condition: ColumnElement[bool], options: Sequence[Any] = ()
) -> Sequence[Any]:
    found = select(model).where(condition).order_by(model.id.desc()).limit(MAX_EVENTS).options(*options)
    return (await session.scalars(found)).all()


async def _plain(session: AsyncSession, model: Any, condition: ColumnElement[bool]) -> list[dict[str, Any]]:
    return [plain(row) for row in await _newest(session, model, condition)]
