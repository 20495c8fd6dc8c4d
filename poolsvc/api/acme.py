"""The CA's limits: what is left of them, and what the CA granted beyond them."""

from datetime import datetime

from fastapi import APIRouter, Response
from pydantic import Field

from poolsvc import onboarding
from poolsvc.api.etags import NOT_MODIFIED, IfMatch, IfNoneMatch, etag_of, require_match, tagged
from poolsvc.api.request import Document, Line, Moment, NowDep, PrincipalDep, ServicesDep, SessionDep
from poolsvc.auth import Operation
from poolsvc.budget import MOST, Bucket
from poolsvc.models import CaLimits

router = APIRouter(prefix="/v1")


class LimitView(Document):
    """One limit as it stands."""

    count: int
    hours: float
    spent: int = Field(description="within the last `hours`")
    left: int
    next_at: datetime | None = Field(description="when there is one more; empty while none is missing")


class RefusalView(Document):
    """The CA's last 429 to a first order."""

    at: datetime
    until: datetime = Field(description="when the CA may be asked again")
    detail: str


class BudgetView(Document):
    """What the CA allows for servers that have no certificate yet."""

    certificates: LimitView = Field(description="new certificates in the pool's registered domain")
    orders: LimitView = Field(description="orders for them")
    reserved: int = Field(description="orders under way, which will each take a certificate")
    waiting: int = Field(description="servers in the queue")
    last_turn_at: datetime | None = Field(description="when the last of them has its turn, as things stand")
    refusal: RefusalView | None


class GrantView(Document):
    """What the CA has granted in place of the settings' limits. The answer's `ETag` names this very state."""

    certificates: int | None = Field(description="for the period of `ca.limits.certificates`; empty: its own")
    orders: int | None = Field(description="for the period of `ca.limits.orders`; empty: its own")
    until: datetime | None = Field(description="when the settings' limits hold again; empty: never")
    note: str


class GrantWish(Document):
    """The whole of it: what is left out is as in the settings."""

    certificates: int | None = Field(None, ge=1, le=MOST, strict=True)
    orders: int | None = Field(None, ge=1, le=MOST, strict=True)
    until: Moment | None = None
    note: Line = Field(
        "", max_length=onboarding.MAX_NOTE, description="kept in the log: without names of people"
    )


def _view(found: CaLimits | None) -> GrantView:
    if found is None:
        return GrantView(certificates=None, orders=None, until=None, note="")
    return GrantView.model_validate(found)


def _limit_view(bucket: Bucket, now: datetime) -> LimitView:
    return LimitView(
        count=bucket.limit.count,
        hours=bucket.limit.period.total_seconds() / 3600,
        spent=bucket.spent,
        left=bucket.left(now),
        next_at=bucket.next_at(now),
    )


@router.get("/acme/budget")
async def read_budget(
    principal: PrincipalDep, services: ServicesDep, session: SessionDep, now: NowDep
) -> BudgetView:
    """What is left of the CA's limits, and how many servers wait for them."""
    principal.may(Operation.READ_POOL)
    state = await onboarding.state(session, services.settings, now)
    return BudgetView(
        certificates=_limit_view(state.budget.certificates, now),
        orders=_limit_view(state.budget.orders, now),
        reserved=state.budget.reserved,
        waiting=state.waiting,
        last_turn_at=state.last_turn_at,
        refusal=None if state.refusal is None else RefusalView.model_validate(state.refusal),
    )


@router.get("/acme/limits", response_model=GrantView, responses=NOT_MODIFIED)
async def read_limits(
    principal: PrincipalDep, session: SessionDep, response: Response, if_none_match: IfNoneMatch = None
) -> GrantView | Response:
    """What the CA has granted, with its tag."""
    principal.may(Operation.READ_POOL)
    return tagged(_view(await onboarding.granted(session)), response, if_none_match)


@router.put("/acme/limits")
async def set_limits(
    body: GrantWish,
    principal: PrincipalDep,
    session: SessionDep,
    now: NowDep,
    response: Response,
    if_match: IfMatch = None,
) -> GrantView:
    """Say what the CA has granted; with `If-Match` only if it still is what the caller has read.

    The queue follows within a minute.
    """
    principal.may(Operation.SET_CA_LIMITS)
    require_match(if_match, etag_of(_view(await onboarding.granted(session, lock=True))))
    view = _view(
        await onboarding.grant(
            session,
            certificates=body.certificates,
            orders=body.orders,
            until=body.until,
            note=body.note,
            now=now,
        )
    )
    response.headers["ETag"] = etag_of(view)
    return view
