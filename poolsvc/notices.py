"""What people are told. A notice is a row, made in the transaction of what it tells, and so is each of its deliveries.

Nothing is dropped in silence: who cannot or does not want to be told has a delivery that says so.
"""

from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import joinedload

from poolsvc.config import Settings
from poolsvc.models import Channel, Delivery, DeliveryStatus, Membership, Notice, User, Webhook


class NoticeKind(StrEnum):
    """What a notice is about. Its words are made when it is shown or sent."""

    # to one person, by mail only; the secret in it is derived when it is sent
    SIGN_IN = "sign-in"
    INVITATION = "invitation"
    # about an account
    MEMBER_APPROVED = "member-approved"
    MEMBER_BLOCKED = "member-blocked"
    MEMBER_UNBLOCKED = "member-unblocked"
    USER_JOINED = "user-joined"
    USER_LEFT = "user-left"
    IDENTITY_CHANGED = "identity-changed"
    SERVER_OFFERED = "server-offered"
    SERVER_MOVED = "server-moved"
    WEBHOOK_DISABLED = "webhook-disabled"
    WEBHOOK_TEST = "webhook-test"  # to one webhook only
    # about a server
    JOINED = "joined"
    ADMITTED = "admitted"
    SUSPENDED = "suspended"
    RECOVERED = "recovered"
    ADDRESS_WITHDRAWN = "address-withdrawn"
    CERTIFICATE_TROUBLE = "certificate-trouble"
    CERTIFICATE_NOT_ORDERED = "certificate-not-ordered"
    AGENT_SILENT = "agent-silent"
    AGENT_TROUBLE = "agent-trouble"
    DEAD_WARNING = "dead-warning"
    LEAVING_SCHEDULED = "leaving-scheduled"
    LEAVING_CANCELLED = "leaving-cancelled"
    LEAVING = "leaving"
    REMOVED = "removed"


class Letter(StrEnum):
    """What a mail of the kind SIGN_IN says (`data["letter"]`); `data["sign_in"]` is the row that its link is for."""

    SIGN_IN = "sign-in"  # here is your link
    SIGN_UP = "sign-up"  # here is the link that makes your account
    HAS_ACCOUNT = "has-account"  # somebody wanted a new account for you; you have one, and here is its link
    NEW_ADDRESS = "new-address"  # here is the link that gives your account this address; open it signed in
    NO_ACCOUNT = "no-account"  # you have none, and this is how to sign up; no link


_FORGOTTEN = 1000  # notices at a time

# Nobody can turn these off: who could would not learn of a theft.
ALWAYS = frozenset(
    {NoticeKind.IDENTITY_CHANGED, NoticeKind.MEMBER_BLOCKED, NoticeKind.USER_JOINED, NoticeKind.REMOVED}
)


async def announce(
    session: AsyncSession,
    kind: NoticeKind,
    *,
    member_id: int,
    now: datetime,
    server_id: int | None = None,
    **data: Any,
) -> Notice:
    """Tell all people of a member, and its webhooks. `data` is what the text needs, as JSON."""
    people = await session.scalars(
        select(Membership)
        .where(Membership.member_id == member_id)
        .options(joinedload(Membership.user))
        .order_by(Membership.id)
    )
    hooks = await session.scalars(
        select(Webhook).where(
            Webhook.member_id == member_id,
            Webhook.enabled_at.is_not(None),
            Webhook.disabled_at.is_(None),
            Webhook.deleted_at.is_(None),
        )
    )
    notice = Notice(at=now, kind=kind, member_id=member_id, server_id=server_id, data=data)
    session.add(notice)
    session.add_all(_by_mail(notice, membership, now) for membership in people)
    session.add_all(_by_webhook(notice, hook, now) for hook in hooks)
    await session.flush()
    return notice


async def try_out(session: AsyncSession, hook: Webhook, now: datetime) -> Notice:
    """A notice of no meaning, to one webhook only."""
    notice = Notice(at=now, kind=NoticeKind.WEBHOOK_TEST, member_id=hook.member_id, data={})
    session.add_all((notice, _by_webhook(notice, hook, now)))
    await session.flush()
    return notice


def _by_webhook(notice: Notice, hook: Webhook, now: datetime) -> Delivery:
    return Delivery(
        notice=notice,
        channel=Channel.WEBHOOK,
        webhook_id=hook.id,
        status=DeliveryStatus.PENDING,
        due_at=now,
    )


def why_no_mail(kind: NoticeKind, user: User, membership: Membership | None) -> str | None:
    """Why a person gets no mail of a notice; None when they get one."""
    if user.erased_at is not None:
        return "the account was erased"
    if user.email is None:
        return "the account has no mail address"
    if membership is not None and not membership.mail and kind not in ALWAYS:
        return "mails are turned off for this member"
    return None


def _by_mail(notice: Notice, membership: Membership, now: datetime) -> Delivery:
    reason = why_no_mail(NoticeKind(notice.kind), membership.user, membership)
    return Delivery(
        notice=notice,
        channel=Channel.MAIL,
        user_id=membership.user_id,
        status=DeliveryStatus.PENDING if reason is None else DeliveryStatus.SUPPRESSED,
        due_at=now if reason is None else None,
        error=reason,
        done_at=None if reason is None else now,
    )


def settle(delivery: Delivery, status: DeliveryStatus, now: datetime, error: str | None = None) -> None:
    """End a delivery. Nobody's address is kept for longer than it is needed."""
    delivery.status, delivery.error, delivery.done_at = status, error, now
    delivery.due_at = delivery.email = None


async def write_to(
    session: AsyncSession, kind: NoticeKind, recipient: User | str, now: datetime, **data: Any
) -> Notice:
    """A mail to one person, or to an address that has no account."""
    notice = Notice(at=now, kind=kind, data=data)
    session.add(notice)
    await session.flush()
    session.add(
        Delivery(
            notice_id=notice.id,
            channel=Channel.MAIL,
            user_id=recipient.id if isinstance(recipient, User) else None,
            email=recipient if isinstance(recipient, str) else None,
            status=DeliveryStatus.PENDING,
            due_at=now,
        )
    )
    await session.flush()
    return notice


async def forget_old(session: AsyncSession, settings: Settings, now: datetime) -> bool:
    """Delete old notices and their deliveries, a bounded number; whether there may be more."""
    oldest = now - timedelta(days=settings.policy.notices_days)
    found = await session.scalars(
        select(Notice.id).where(Notice.at <= oldest).order_by(Notice.at).limit(_FORGOTTEN)
    )
    old = list(found)
    await session.execute(delete(Delivery).where(Delivery.notice_id.in_(old)))
    await session.execute(delete(Notice).where(Notice.id.in_(old)))
    return len(old) == _FORGOTTEN
