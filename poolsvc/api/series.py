"""What was measured of a server over time, as JSON or as CSV."""

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from ipaddress import ip_address
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from poolsvc import series
from poolsvc.api.lookup import server_to_read
from poolsvc.api.paging import CursorQuery, cursor_of, key_of, no_cursor
from poolsvc.api.request import (
    Document,
    Line,
    Moment,
    NamePath,
    PrincipalDep,
    ServicesDep,
    SessionDep,
)
from poolsvc.api.tables import Cell, csv_answer, table
from poolsvc.errors import InvalidAddress
from poolsvc.models import Address, Server
from poolsvc.names import is_label
from poolsvc.series import Mark, Point, Span, Stretch

router = APIRouter(prefix="/v1")
DEFAULT_LIMIT, MAX_LIMIT = 200, 1000
_MAX_ID = 2**31
_EPOCH, _TICK = datetime(1970, 1, 1, tzinfo=UTC), timedelta(microseconds=1)


class Format(StrEnum):
    JSON = "json"
    CSV = "csv"


class PointView(Document):
    """What one monitor measured of one address: by one probe, or in an hour or a day."""

    address: str
    at: datetime = Field(description="of the probe, or when the hour or the day (UTC) began")
    monitor: str
    probes: int
    failures: int = Field(description="probes in which a stage failed")
    failed: str | None = Field(description="the stage that failed, of a single probe")
    step: float = Field(description="the mean, of an hour or a day")
    score: float | None = Field(
        description="by this monitor's probes alone, after the last of them; null until the server is admitted"
    )
    offset_ns: int | None = Field(description="the server's clock less the monitor's; the mean")
    offset_most_ns: int | None = Field(description="the greatest, either way")
    delay_ns: int | None = Field(description="the mean")


class SeriesView(Document):
    server: str
    span: Span
    scorer: str = Field(description="the one that rules now; earlier scores may be by the one before")
    items: list[PointView]
    next: str | None = Field(description="the `cursor` of the page after; null on the last")


_COLUMNS = tuple(name for name in PointView.model_fields if name != "at")
_CSV: dict[int | str, dict[str, Any]] = {200: {"content": {"text/csv": {"schema": {"type": "string"}}}}}


@router.get("/servers/{name}/history", response_model=SeriesView, responses=_CSV)
async def read_series(
    request: Request,
    name: NamePath,
    principal: PrincipalDep,
    services: ServicesDep,
    session: SessionDep,
    span: Annotated[Span, Query(description="what one row is; samples are kept for days")] = Span.SAMPLES,
    address: Annotated[Line | None, Query(max_length=45, description="of this address alone")] = None,
    monitor: Annotated[Line | None, Query(max_length=64, description="by this monitor alone")] = None,
    since: Moment | None = None,
    until: Annotated[Moment | None, Query(description="before this moment")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT, description="rows in a page")] = DEFAULT_LIMIT,
    cursor: CursorQuery = None,
    form: Annotated[Format, Query(alias="format", description="csv: the same rows, for spreadsheets")] = (
        Format.JSON
    ),
) -> SeriesView | Response:
    """What monitors measured of a server, the newest first, within `since` and before `until`.

    Hours and days are there once they are over. In CSV the address of the next page is in the header `Link`.
    """
    server = await server_to_read(session, principal, name)
    stretch = Stretch(
        addresses=_addresses(server, address),
        since=since,
        until=until,
        monitor=None if monitor is None else monitor.lower(),
    )
    after = None if cursor is None else _mark(cursor)
    points, has_more = await series.read(session, span, stretch, after=after, limit=limit)
    further = _cursor(points[-1].mark) if has_more else None
    scorer = services.settings.policy.scorer
    if form is Format.CSV:
        url = None if further is None else str(request.url.include_query_params(cursor=further))
        content = table(
            ("server", "span", "scorer", "at", *_COLUMNS),
            ((server.name, span.value, scorer, *_row(_view(point))) for point in points),
        )
        return csv_answer(f"{server.name}-{span}", content, url)
    return SeriesView(
        server=server.name,
        span=span,
        scorer=scorer,
        items=[_view(point) for point in points],
        next=further,
    )


def _addresses(server: Server, wanted: str | None) -> list[Address]:
    if wanted is None:
        return list(server.addresses)
    try:
        address = str(ip_address(wanted))
    except ValueError:
        raise InvalidAddress(
            f"{wanted!r} is no IP address", remedy="give one of the server's addresses", field="address"
        ) from None
    return [row for row in server.addresses if row.address == address]


def _view(point: Point) -> PointView:
    return PointView(
        address=point.address,
        at=point.mark.at,
        monitor=point.mark.monitor,
        probes=point.probes,
        failures=point.failures,
        failed=point.failed,
        step=point.step,
        score=point.score,
        offset_ns=point.offset_ns,
        offset_most_ns=point.offset_most_ns,
        delay_ns=point.delay_ns,
    )


def _row(view: PointView) -> list[Cell]:
    return [view.at.strftime("%Y-%m-%dT%H:%M:%S.%fZ"), *(getattr(view, name) for name in _COLUMNS)]


def _cursor(mark: Mark) -> str:
    return cursor_of(f"{(mark.at - _EPOCH) // _TICK}.{mark.address_id}.{mark.monitor}")


def _mark(cursor: str) -> Mark:
    """Raises InvalidCursor."""
    try:
        ticks, address_id, monitor = key_of(cursor).split(".")
        mark = Mark(_EPOCH + int(ticks) * _TICK, int(address_id), monitor)
    except (ValueError, OverflowError):
        raise no_cursor() from None
    # As it was given, and not merely like it.
    if not 0 < mark.address_id < _MAX_ID or not is_label(monitor) or _cursor(mark) != cursor:
        raise no_cursor()
    return mark
