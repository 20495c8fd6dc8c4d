"""What each monitor sees of a server, for those who run it: its part of why the server is, or is not, in DNS."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime

from pydantic import Field
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import joinedload

from nts_core.control import Stage
from poolsvc import monitors
from poolsvc.api.request import Document
from poolsvc.models import MonitorView, Server, ViewRole

_SHOWN = 100  # monitors of one server's addresses, those with a say first
_ORDER = {ViewRole.ACTIVE: 0, ViewRole.TESTING: 1, ViewRole.CANDIDATE: 2, ViewRole.PAUSED: 3}


class SightView(Document):
    """One address as one monitor last saw it."""

    monitor: str
    country: str | None = Field(description="where the monitor is, as far as that is known")
    role: ViewRole = Field(
        description="active: it has a say; testing: not yet; candidate: it looks now and then"
    )
    role_since: datetime
    role_reason: str = Field(description="why it was chosen, or was not")
    counts: bool = Field(description="whether it has a say now: active, approved, and sound by its own check")
    at: datetime | None = Field(description="of its last probe")
    failed: Stage | None = Field(description="the stage that failed; null for a probe without a fault")
    failed_since: datetime | None
    detail: str
    step: float | None
    step_reason: str = Field(description="why that probe was not a full step")
    score: float | None = Field(description="by its probes alone; null until the address is admitted")
    full_probes: int = Field(description="in a row, before admission")
    names: str | None = Field(
        description="what it saw to be wrong with the name in DNS, which is the pool's doing; null if nothing"
    )
    offset_ns: int | None = Field(description="the server's clock less the monitor's")
    delay_ns: int | None


async def sights_of(session: AsyncSession, server: Server) -> Mapping[int, Sequence[SightView]]:
    """By address what monitors see of it, the ones with a say first."""
    rows = await session.scalars(
        select(MonitorView)
        .where(MonitorView.address_id.in_([row.id for row in server.addresses]))
        .options(joinedload(MonitorView.monitor))
    )
    seen = [row for row in rows if row.at is not None or row.role in (ViewRole.ACTIVE, ViewRole.TESTING)]
    found: dict[int, list[SightView]] = defaultdict(list)
    for row in sorted(seen, key=lambda row: (_ORDER[row.role], row.monitor.name))[:_SHOWN]:
        by = row.monitor
        has_say = by.status in monitors.SPEAKING and monitors.is_sound(by)
        found[row.address_id].append(
            SightView(
                monitor=by.name,
                country=by.country,
                role=row.role,
                role_since=row.role_since,
                role_reason=row.role_reason,
                counts=row.role is ViewRole.ACTIVE and has_say,
                at=row.at,
                failed=row.failed,
                failed_since=row.failed_since,
                detail=row.detail,
                step=row.step,
                step_reason=row.step_reason,
                score=row.score,
                full_probes=row.full_probes,
                names=row.names,
                offset_ns=row.offset_ns,
                delay_ns=row.delay_ns,
            )
        )
    return found
