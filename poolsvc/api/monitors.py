"""Monitors as operators, their members and everybody see them, and what is decided about them."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import Field
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.control import MonitorStatus
from poolsvc import monitors, reviews
from poolsvc.api.idempotent import idempotent
from poolsvc.api.lookup import server_to_read
from poolsvc.api.paging import Page, PagingDep
from poolsvc.api.request import (
    Document,
    Line,
    NamePath,
    NowDep,
    PrincipalDep,
    ReasonText,
    ServicesDep,
    SessionDep,
)
from poolsvc.auth import Operation, Principal
from poolsvc.models import Monitor, ViewRole

router = APIRouter(prefix="/v1")


class MonitorRequest(Document):
    name: Line = Field(
        max_length=64, description="a host label of at most 36 characters, such as frankfurt-1"
    )
    member: int | None = Field(
        None, description="whose it is to be; an operator's without one is the pool's own"
    )


class MonitorChange(Document):
    """What it is to be from now on, and why."""

    status: MonitorStatus
    reason: ReasonText = Field(min_length=1)


class MonitorView(Document):
    name: str
    member: int | None = Field(description="None: the pool's own")
    status: MonitorStatus
    status_reason: str
    status_since: datetime
    created_at: datetime
    program: str
    seen_at: datetime | None
    sound: bool | None = Field(description="by its own check of clock and network; None without one")
    sound_since: datetime | None
    sound_detail: str
    ipv4: bool
    ipv6: bool
    ipv4_address: str | None
    ipv6_address: str | None
    network: int | None = Field(description="AS number, as far as it is known")
    country: str | None
    samples: int = Field(description="that counted since it was registered")

    @classmethod
    def of(cls, row: Monitor) -> "MonitorView":
        values = {name: getattr(row, name) for name in cls.model_fields if name != "member"}
        return cls(member=row.member_id, **values)


class MonitorCreated(MonitorView):
    token: str = Field(description="shown only now; for `token` in the monitor's file of settings")


class PublicMonitorView(Document):
    """A monitor as everybody may see it."""

    name: str
    status: MonitorStatus
    status_since: datetime
    sound: bool | None
    country: str | None


class GivenView(Document):
    """What one monitor is for one address of a server."""

    address: str
    monitor: str
    role: ViewRole | None = Field(description="active ones have a say; None before the first review")
    reason: str
    next: ViewRole | None = Field(None, description="what a review would make of it now; only with `dry_run`")
    next_reason: str | None = None


class ScorersView(Document):
    """The scorer that rules, and one on trial, with what would become of the pool by it."""

    scorer: str
    shadow: str | None
    difference: str | None = Field(description='such as "would drop 3, add 1"')
    dropped: list[str] = Field(description="servers that would not be good any more")
    added: list[str]


class WitnessView(Document):
    """A monitor without a say that saw the contrary of those with one."""

    monitor: str
    at: datetime
    step: float = Field(description="of its last probe; 0.5 and more is good")
    reason: str = Field(description="why that was not a full step")


class DisagreementView(Document):
    """An address of which most monitors without a say see the contrary of what those with a say found."""

    server: str
    address: str
    score: float = Field(description="by those with a say; 10 and more is good")
    asked: int = Field(description="parties without a say that have looked of late")
    against: int = Field(description="of them, that saw the contrary")
    witnesses: list[WitnessView] = Field(description="the monitors of these, at most 20")


class QuorumRequest(Document):
    quorum: int = Field(ge=1, le=3, description="how many monitors have to agree; it rises again by itself")
    reason: ReasonText = Field(min_length=1)


class QuorumView(Document):
    quorum: int
    heard: int = Field(description="parties with a say that are heard now")


@router.get("/pool/monitors")
async def list_public_monitors(session: SessionDep, paging: PagingDep) -> Page[PublicMonitorView]:
    """The monitors that work for the pool, without their addresses; needs no token."""
    shown = select(Monitor).where(Monitor.status.in_(monitors.WORKING))
    rows, further = await paging.rows(session, shown, Monitor.id)
    return Page(items=[PublicMonitorView.model_validate(row) for row in rows], next=further)


@router.get("/monitors")
async def list_monitors(principal: PrincipalDep, session: SessionDep, paging: PagingDep) -> Page[MonitorView]:
    """All monitors for the pool's staff, those of one's members for others."""
    principal.may(Operation.READ_SELF)
    found = select(Monitor)
    if not principal.reads_pool:
        found = found.where(Monitor.member_id.in_(principal.acts_for))
    rows, further = await paging.rows(session, found, Monitor.id)
    return Page(items=[MonitorView.of(row) for row in rows], next=further)


@router.post("/monitors", status_code=201)
@idempotent
async def register_monitor(
    body: MonitorRequest,
    principal: PrincipalDep,
    services: ServicesDep,
    session: SessionDep,
    now: NowDep,
) -> MonitorCreated:
    """A new monitor, with its token. An operator has to approve it."""
    if body.member is None and not principal.reads_pool and principal.acts_for:
        member: int | None = principal.member_for(Operation.REGISTER_MONITOR, None)
    else:
        member = body.member
        principal.may(Operation.REGISTER_MONITOR, member=member)
    row, token = await monitors.register(session, services.settings, body.name, member, now)
    return MonitorCreated(**MonitorView.of(row).model_dump(), token=token)


@router.get("/monitors/{monitor}")
async def read_monitor(monitor: NamePath, principal: PrincipalDep, session: SessionDep) -> MonitorView:
    """One monitor."""
    return MonitorView.of(await _monitor(session, principal, monitor, Operation.READ_MONITOR))


@router.patch("/monitors/{monitor}")
async def change_monitor(
    monitor: NamePath, body: MonitorChange, principal: PrincipalDep, session: SessionDep, now: NowDep
) -> MonitorView:
    """Approve, pause or end a monitor. Its member may pause and end it; what lets it have a say is an operator's."""
    row = await _monitor(session, principal, monitor, Operation.CHANGE_MONITOR, lock=True)
    if body.status not in monitors.BY_OWNERS:
        principal.may(Operation.JUDGE_MONITOR)
    await monitors.set_status(session, row, body.status, body.reason, now)
    return MonitorView.of(row)


@router.post("/monitors/{monitor}/token", status_code=201)
@idempotent
async def renew_monitor_token(
    monitor: NamePath, principal: PrincipalDep, session: SessionDep, now: NowDep
) -> MonitorCreated:
    """A new token for a monitor; the one before is worth nothing from now on."""
    row = await _monitor(session, principal, monitor, Operation.CHANGE_MONITOR, lock=True)
    token = await monitors.renew_token(session, row, now)
    return MonitorCreated(**MonitorView.of(row).model_dump(), token=token)


@router.put("/quorum")
async def set_quorum(
    body: QuorumRequest,
    principal: PrincipalDep,
    services: ServicesDep,
    session: SessionDep,
    now: NowDep,
) -> QuorumView:
    """Let fewer monitors have to agree, when too few are left; it rises by itself when there are more."""
    principal.may(Operation.JUDGE_MONITOR)
    settings = services.settings
    pool = await monitors.set_quorum(
        session, settings, body.quorum, body.reason, actor=principal.actor, now=now
    )
    standing = await monitors.council(session, settings, now)
    return QuorumView(quorum=pool.quorum, heard=standing.heard)


@router.get("/servers/{name}/monitors")
async def list_monitors_of_server(
    name: NamePath,
    principal: PrincipalDep,
    services: ServicesDep,
    session: SessionDep,
    now: NowDep,
    dry_run: Annotated[bool | None, Query(description="also what a review would choose now")] = None,
) -> list[GivenView]:
    """The monitors of a server's addresses, each with its role and why it has it."""
    server = await server_to_read(session, principal, name)
    present = await reviews.present(session, server)
    if not dry_run:
        return [
            GivenView(address=each.address, monitor=each.monitor, role=each.role, reason=each.reason)
            for each in present
        ]
    before = {(each.address, each.monitor): each for each in present}
    chosen = await reviews.explain(session, server, reviews.lot_of(services.key), now)
    found = []
    for each in chosen:
        was = before.get((each.address, each.monitor))
        found.append(
            GivenView(
                address=each.address,
                monitor=each.monitor,
                role=None if was is None else was.role,
                reason="" if was is None else was.reason,
                next=each.role,
                next_reason=each.reason,
            )
        )
    return found


@router.get("/disagreements")
async def list_disagreements(
    principal: PrincipalDep, services: ServicesDep, session: SessionDep
) -> list[DisagreementView]:
    """Servers that are good only for the monitors that they have, or bad only for them; at most 200 addresses."""
    principal.may(Operation.READ_POOL)
    found = await services.disagreements.get(session)
    return [DisagreementView.model_validate(each) for each in found]


@router.get("/scorers")
async def compare_scorers(principal: PrincipalDep, services: ServicesDep, session: SessionDep) -> ScorersView:
    """What the scorer on trial would change, beside the one that rules."""
    principal.may(Operation.READ_POOL)
    policy = services.settings.policy
    found = None if policy.shadow_scorer is None else await monitors.compare(session)
    return ScorersView(
        scorer=policy.scorer,
        shadow=policy.shadow_scorer,
        difference=None if found is None else str(found),
        dropped=[] if found is None else list(found.dropped),
        added=[] if found is None else list(found.added),
    )


async def _monitor(
    session: AsyncSession, principal: Principal, name: str, operation: Operation, *, lock: bool = False
) -> Monitor:
    """Raises NotFound, Forbidden."""
    row = await monitors.find(session, name, lock=lock)
    principal.may(operation, member=row.member_id)
    return row
