"""What members were told, what came of it, and their webhooks."""

from datetime import datetime
from typing import Any

from fastapi import APIRouter
from pydantic import Field
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import selectinload

from poolsvc import deliveries, members, webhooks
from poolsvc.api.idempotent import idempotent
from poolsvc.api.paging import Page, PagingDep
from poolsvc.api.request import (
    Document,
    IdPath,
    Line,
    NowDep,
    PrincipalDep,
    RandomIdPath,
    ServicesDep,
    SessionDep,
)
from poolsvc.auth import Operation
from poolsvc.config import Settings
from poolsvc.errors import NotFound, WrongState
from poolsvc.models import Channel, Delivery, DeliveryStatus, Notice, Webhook

router = APIRouter(prefix="/v1")


class WebhookRequest(Document):
    url: Line = Field(max_length=webhooks.MAX_URL, description="https://HOST/PATH")


class WebhookView(Document):
    id: int
    url: str
    enabled: bool = Field(description="whether notices are sent to it")
    challenged: bool = Field(description="whether its endpoint is still asked for the challenge")
    created_at: datetime
    enabled_at: datetime | None
    disabled_at: datetime | None
    failures: int = Field(description="in a row")
    error: str | None = Field(description="why the last call failed")


class WebhookSecret(Document):
    webhook: WebhookView
    secret: str = Field(description="what its calls are signed with; shown only now")


class DeliveryView(Document):
    id: int
    channel: Channel
    user: int | None
    webhook: int | None
    status: DeliveryStatus
    attempts: int
    due_at: datetime | None
    done_at: datetime | None
    error: str | None = Field(description="why it was not sent, or why the last attempt failed")


class NoticeView(Document):
    id: int
    at: datetime
    kind: str
    server: str | None
    subject: str
    text: str
    data: dict[str, Any]
    deliveries: list[DeliveryView]


@router.get("/members/{member}/webhooks")
async def list_webhooks(
    member: IdPath, principal: PrincipalDep, session: SessionDep, paging: PagingDep
) -> Page[WebhookView]:
    """The webhooks of a member."""
    await _check(session, principal, Operation.READ_MEMBER, member)
    found = select(Webhook).where(Webhook.member_id == member, Webhook.deleted_at.is_(None))
    rows, further = await paging.rows(session, found, Webhook.id)
    return Page(items=[_webhook(hook) for hook in rows], next=further)


@router.post("/members/{member}/webhooks", status_code=201)
@idempotent
async def create_webhook(
    member: IdPath,
    body: WebhookRequest,
    principal: PrincipalDep,
    services: ServicesDep,
    session: SessionDep,
    now: NowDep,
) -> WebhookSecret:
    """A webhook. Its endpoint is sent a challenge, and has to answer with it within ten seconds."""
    await _check(session, principal, Operation.MANAGE_WEBHOOKS, member)
    hook = await webhooks.create(session, services.settings, member, body.url, now)
    return WebhookSecret(webhook=_webhook(hook), secret=webhooks.secret_of(services.key, hook))


@router.delete("/members/{member}/webhooks/{hook}")
async def delete_webhook(
    member: IdPath, hook: RandomIdPath, principal: PrincipalDep, session: SessionDep, now: NowDep
) -> WebhookView:
    """End a webhook for good."""
    found = await _find(session, principal, member, hook)
    await webhooks.delete(session, found, now)
    return _webhook(found)


@router.post("/members/{member}/webhooks/{hook}/rotate")
@idempotent
async def rotate_webhook(
    member: IdPath,
    hook: RandomIdPath,
    principal: PrincipalDep,
    services: ServicesDep,
    session: SessionDep,
    now: NowDep,
) -> WebhookSecret:
    """A new secret. For 24 hours calls are signed with both, the new one first."""
    found = await _find(session, principal, member, hook)
    webhooks.rotate(found, now)
    return WebhookSecret(webhook=_webhook(found), secret=webhooks.secret_of(services.key, found))


@router.post("/members/{member}/webhooks/{hook}/enable", status_code=202)
async def enable_webhook(
    member: IdPath, hook: RandomIdPath, principal: PrincipalDep, session: SessionDep, now: NowDep
) -> WebhookView:
    """Send the challenge again, to a webhook that is not enabled."""
    found = await _find(session, principal, member, hook)
    webhooks.ask_again(found, now)
    return _webhook(found)


@router.post("/members/{member}/webhooks/{hook}/test", status_code=202)
@idempotent
async def try_webhook(
    member: IdPath, hook: RandomIdPath, principal: PrincipalDep, session: SessionDep, now: NowDep
) -> WebhookView:
    """Send a notice of no meaning; what came of it is shown among the member's notices."""
    found = await _find(session, principal, member, hook)
    await webhooks.try_out(session, found, now)
    return _webhook(found)


@router.get("/members/{member}/notices")
async def list_notices(
    member: IdPath, principal: PrincipalDep, services: ServicesDep, session: SessionDep, paging: PagingDep
) -> Page[NoticeView]:
    """What a member was told, newest first, with what came of each delivery."""
    await _check(session, principal, Operation.READ_MEMBER, member)
    found = select(Notice).where(Notice.member_id == member).options(selectinload(Notice.deliveries))
    rows, further = await paging.rows(session, found, Notice.id, newest_first=True)
    return Page(items=[_notice(services.settings, row) for row in rows], next=further)


@router.post("/deliveries/{delivery}/retry", status_code=202)
async def retry_delivery(
    delivery: IdPath, principal: PrincipalDep, session: SessionDep, now: NowDep
) -> DeliveryView:
    """Try a delivery once more that was given up or not sent. The reasons for not sending hold as before."""
    row = await session.scalar(
        select(Delivery)
        .where(Delivery.id == delivery)
        .options(selectinload(Delivery.notice))
        .with_for_update(of=Delivery)
    )
    # Links are nobody's to repeat but their receiver's, who asks for a new one.
    if row is None or row.notice.member_id is None:
        principal.may(Operation.READ_SELF)
        raise NotFound("there is no such delivery")
    principal.may(Operation.MANAGE_WEBHOOKS, member=row.notice.member_id)
    if not deliveries.send_again(row, now):
        raise WrongState(f"the delivery is {row.status}", remedy="only one that was given up is tried again")
    return _delivery(row)


async def _check(session: AsyncSession, principal: PrincipalDep, operation: Operation, member: int) -> None:
    principal.may(operation, member=member)
    await members.get(session, member)


async def _find(session: AsyncSession, principal: PrincipalDep, member: int, hook: int) -> Webhook:
    principal.may(Operation.MANAGE_WEBHOOKS, member=member)
    return await webhooks.find(session, member, hook)


def _webhook(hook: Webhook) -> WebhookView:
    return WebhookView(
        id=hook.id,
        url=hook.url,
        enabled=webhooks.is_enabled(hook),
        challenged=hook.challenge_due_at is not None,
        created_at=hook.created_at,
        enabled_at=hook.enabled_at,
        disabled_at=hook.disabled_at,
        failures=hook.failures,
        error=hook.error,
    )


def _notice(settings: Settings, notice: Notice) -> NoticeView:
    text = deliveries.notice_text(settings, notice)
    return NoticeView(
        id=notice.id,
        at=notice.at,
        kind=notice.kind,
        server=notice.data.get("server"),
        subject=text.subject,
        text=text.body,
        data=notice.data,
        deliveries=[_delivery(row) for row in sorted(notice.deliveries, key=lambda row: row.id)],
    )


def _delivery(row: Delivery) -> DeliveryView:
    return DeliveryView(
        id=row.id,
        channel=row.channel,
        user=row.user_id,
        webhook=row.webhook_id,
        status=row.status,
        attempts=row.attempts,
        due_at=row.due_at,
        done_at=row.done_at,
        error=row.error,
    )
