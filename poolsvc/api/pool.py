"""What everybody may know of the pool; needs no token."""

from datetime import date, datetime
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import Field
from sqlalchemy import select
from sqlalchemy.orm import selectinload

from nts_core.control import ServerState
from poolsvc import alarms, monitors, samples, servers
from poolsvc.api.paging import Page, PagingDep
from poolsvc.api.request import Document, NowDep, ServicesDep, SessionDep
from poolsvc.api.servers import is_in_dns
from poolsvc.config import Settings
from poolsvc.models import Server
from poolsvc.pool import the_pool

router = APIRouter(prefix="/v1")


class PoolView(Document):
    """What everybody may know of the pool."""

    pool: str
    servers_domain: str
    ke_port: int
    opened_at: datetime | None
    active_servers: int
    quorum: str = Field(
        description='how many monitors have to agree; "bootstrap" while one or two are all that there are'
    )
    monitors: int = Field(description="that have a say and are heard; those of one member are one")
    unknown_addresses: int = Field(
        description="of servers, that too few monitors know: that is the pool's fault, and nothing changes"
    )
    allow_private_addresses: bool
    alarms: list[str]


@router.get("/pool")
async def read_pool(services: ServicesDep, session: SessionDep, now: NowDep) -> PoolView:
    """The pool and the state of its own parts; needs no token."""
    settings = services.settings
    pool = await the_pool(session, settings)
    census = await services.census.get(session)
    found = await alarms.current(session, now)
    standing = await monitors.council(session, settings, now)
    unknown = await monitors.count_unknown(session)
    if census.kept_low:
        found.append(
            f"scores: {census.kept_low} failing servers are kept listed, since too few others are active, or too many would leave at once"
        )
    return PoolView(
        pool=settings.pool,
        servers_domain=settings.servers_domain,
        ke_port=settings.ports.ke,
        opened_at=pool.opened_at,
        active_servers=census.active,
        quorum="bootstrap" if standing.quorum.is_bootstrap else str(standing.quorum.number),
        monitors=standing.heard,
        unknown_addresses=unknown,
        allow_private_addresses=settings.allow_private_addresses,
        alarms=found,
    )


class DayView(Document):
    """The pool on one day."""

    day: date
    counts: dict[str, int] = Field(description="servers by state")


@router.get("/pool/history")
async def read_history(session: SessionDep, days: Annotated[int, Query(ge=1, le=400)] = 30) -> list[DayView]:
    """How many servers the pool had, day by day, the newest first; needs no token."""
    return [DayView.model_validate(row) for row in await samples.history(session, days)]


class PublicServerView(Document):
    """A server whose member agreed to have it shown."""

    name: str
    domain: str
    state: ServerState
    state_since: datetime
    in_dns: bool = Field(description="whether the SRV answer may hold it now")
    addresses: list[str] = Field(description="those in DNS")
    member: str | None = Field(description="the member's name, if that may be shown")
    operator_id: str = Field(description="equal for all servers of one member")


@router.get("/pool/servers")
async def list_public_servers(
    services: ServicesDep, session: SessionDep, paging: PagingDep
) -> Page[PublicServerView]:
    """The servers whose members agreed to have them shown; needs no token."""
    shown = (
        select(Server)
        .where(Server.public, Server.state.in_(servers.NAMED_STATES))
        .options(selectinload(Server.addresses), selectinload(Server.member))
    )
    rows, further = await paging.rows(session, shown, Server.id)
    return Page(items=[_public(services.settings, row) for row in rows], next=further)


def _public(settings: Settings, server: Server) -> PublicServerView:
    return PublicServerView(
        name=server.name,
        domain=settings.domain_of(server.name),
        state=server.state,
        state_since=server.state_since,
        in_dns=is_in_dns(server),
        addresses=servers.published_addresses(server),
        member=server.member.name if server.member.public else None,
        operator_id=server.member.opaque_id,
    )
