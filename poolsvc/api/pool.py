"""What everybody may know of the pool; needs no token."""

from datetime import datetime

from fastapi import APIRouter

from poolsvc import servers
from poolsvc.api.request import Document, ServicesDep, SessionDep

router = APIRouter(prefix="/v1")


class PoolView(Document):
    """What everybody may know of the pool."""

    pool: str
    servers_domain: str
    ke_port: int
    opened_at: datetime | None
    active_servers: int
    quorum: str
    allow_private_addresses: bool
    alarms: list[str]


@router.get("/pool")
async def read_pool(services: ServicesDep, session: SessionDep) -> PoolView:
    """The pool and the state of its own parts; needs no token."""
    settings, health = services.settings, services.health
    pool = await servers.the_pool(session, settings)
    alarms = [f"{part}: {text}" for part, text in (("DNS", health.dns), ("CA", health.ca)) if text]
    alarms += [f"worker: {work.strip('_')} failed with {error}" for work, error in health.work.items()]
    if kept := await servers.count_kept_low(session):
        alarms.append(f"scores: {kept} failing servers are kept listed, since too few others are active")
    return PoolView(
        pool=settings.pool,
        servers_domain=settings.servers_domain,
        ke_port=settings.ports.ke,
        opened_at=pool.opened_at,
        active_servers=await servers.count_active(session),
        quorum="bootstrap",
        allow_private_addresses=settings.allow_private_addresses,
        alarms=alarms,
    )
