"""Webhooks: signed notices for members' programs, by the rules of Standard Webhooks.

1. A webhook is enabled by its own endpoint, which echoes a challenge: nobody makes the registry call a stranger.
2. Every call is signed over its id, its time and its body. For a day after a rotation the secret before signs too.
3. What is dialled is checked by `poolsvc.outbound`; a redirect is a failure like any other.
4. An endpoint that fails for a day and twenty times in a row is disabled, one that answers 410 at once.
"""

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from http import HTTPStatus
from typing import Any

import httpx
from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.errors import printable
from poolsvc import members, notices
from poolsvc.config import Settings
from poolsvc.db import Database
from poolsvc.derived import Purpose, RegistryKey
from poolsvc.errors import InvalidUrl, LimitReached, NotFound, TooManyRequests, WrongState
from poolsvc.models import Delivery, DeliveryStatus, Notice, Webhook
from poolsvc.notices import NoticeKind
from poolsvc.outbound import FetchError, Outbound

MAX_WEBHOOKS = 5  # of one member
_CREATED_PER_HOUR = 10  # each is a call to where its member says
_HOUR = timedelta(hours=1)
MAX_URL = 500
_MAX_PORT = 65535
DEADLINE = 10.0
# Far more than an endpoint has to say; the body of a notice's answer is not looked at.
_MAX_ANSWER = 64 * 1024
_MAX_ERROR = 300
_CHALLENGE_WAITS = (
    timedelta(seconds=30),
    timedelta(minutes=2),
    timedelta(minutes=10),
    timedelta(minutes=45),
)
_OVERLAP = timedelta(hours=24)
_DISABLED_AFTER = timedelta(hours=24)
_DISABLED_FAILURES = 20


def check_url(settings: Settings, text: str) -> str:
    """The URL of an endpoint. Raises InvalidUrl; whether it may be dialled is found out when it is."""
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, UnicodeError):
        url = httpx.URL("")
    schemes = ("https", "http") if settings.allow_private_addresses else ("https",)
    is_plain = text.isascii() and text.isprintable() and " " not in text and len(text) <= MAX_URL
    is_whole = url.host and (url.port or 0) <= _MAX_PORT
    if not is_plain or url.scheme not in schemes or not is_whole or url.userinfo or url.fragment:
        raise InvalidUrl(
            "not the address of a webhook",
            remedy=f"write it as https://HOST/PATH, with {MAX_URL} characters at most and no password in it",
            field="url",
        )
    return text


async def create(
    session: AsyncSession, settings: Settings, member_id: int, url: str, now: datetime
) -> Webhook:
    """A webhook that is challenged at once. Raises InvalidUrl, LimitReached, TooManyRequests."""
    checked = check_url(settings, url)
    # Locked, so that many requests at once do not make more than one after the other could.
    await members.lock(session, member_id)
    recent = select(func.count()).where(Webhook.member_id == member_id, Webhook.created_at > now - _HOUR)
    if (await session.scalar(recent) or 0) >= _CREATED_PER_HOUR:
        raise TooManyRequests(f"{_CREATED_PER_HOUR} webhooks within an hour", remedy="wait an hour")
    living = select(func.count()).where(Webhook.member_id == member_id, Webhook.deleted_at.is_(None))
    if (await session.scalar(living) or 0) >= MAX_WEBHOOKS:
        raise LimitReached(f"a member has {MAX_WEBHOOKS} webhooks at most", remedy="delete one first")
    hook = Webhook(member_id=member_id, url=checked, created_at=now, challenge_due_at=now)
    session.add(hook)
    await session.flush()
    return hook


async def find(session: AsyncSession, member_id: int, hook_id: int) -> Webhook:
    """A webhook of a member, locked for a change. Raises NotFound."""
    hook = await session.scalar(
        select(Webhook)
        .where(Webhook.id == hook_id, Webhook.member_id == member_id, Webhook.deleted_at.is_(None))
        .with_for_update()
    )
    if hook is None:
        raise NotFound("the member has no such webhook")
    return hook


async def find_living(session: AsyncSession, hook_id: int) -> Webhook | None:
    """A webhook that is not deleted, locked for a change."""
    return await session.scalar(
        select(Webhook).where(Webhook.id == hook_id, Webhook.deleted_at.is_(None)).with_for_update()
    )


def is_enabled(hook: Webhook) -> bool:
    return hook.enabled_at is not None and hook.disabled_at is None and hook.deleted_at is None


async def delete(session: AsyncSession, hook: Webhook, now: datetime) -> None:
    """End a webhook for good. What was on its way to it is not sent any more, and says so."""
    hook.deleted_at, hook.challenge_due_at = now, None
    await _drop_pending(session, hook, "the webhook was deleted", now)


def rotate(hook: Webhook, now: datetime) -> None:
    """A new secret; the one before signs beside it for a day."""
    hook.generation += 1
    hook.rotated_at = now


def ask_again(hook: Webhook, now: datetime) -> None:
    """Challenge a webhook once more. Raises WrongState when it is enabled or being challenged."""
    if is_enabled(hook) or hook.challenge_due_at is not None:
        raise WrongState(
            "the webhook is enabled, or waits for its endpoint to answer the challenge",
            remedy="look at its `error`; an endpoint is asked five times within an hour",
        )
    hook.challenge_due_at, hook.failures, hook.error = now, 0, None


async def try_out(session: AsyncSession, hook: Webhook, now: datetime) -> None:
    """Send a test. Raises WrongState while the webhook is not enabled, or another test is under way."""
    if not is_enabled(hook):
        raise WrongState("the webhook is not enabled", remedy="let its endpoint answer the challenge first")
    under_way = (
        select(Delivery.id)
        .join(Delivery.notice)
        .where(
            Delivery.webhook_id == hook.id,
            Delivery.status == DeliveryStatus.PENDING,
            Notice.kind == NoticeKind.WEBHOOK_TEST,
        )
    )
    if await session.scalar(under_way.limit(1)) is not None:
        raise WrongState("a test is under way", remedy="look at the notices of the member")
    await notices.try_out(session, hook, now)


def secret_of(key: RegistryKey, hook: Webhook) -> str:
    """The webhook's secret as its owner gets it, once."""
    return "whsec_" + base64.b64encode(_secret(key, hook, hook.generation)).decode()


def _secret(key: RegistryKey, hook: Webhook, generation: int) -> bytes:
    return key.secret(Purpose.WEBHOOK, hook.id, generation)


def _headers(key: RegistryKey, hook: Webhook, call_id: str, body: bytes, now: datetime) -> dict[str, str]:
    generations = [hook.generation]
    if hook.rotated_at is not None and now - hook.rotated_at < _OVERLAP:
        generations.append(hook.generation - 1)
    timestamp = str(int(now.timestamp()))
    signed = f"{call_id}.{timestamp}.".encode() + body
    tags = [hmac.digest(_secret(key, hook, number), signed, hashlib.sha256) for number in generations]
    return {
        "content-type": "application/json",
        "user-agent": "truechimer-webhook",
        "webhook-id": call_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": " ".join(f"v1,{base64.b64encode(tag).decode()}" for tag in tags),
    }


class Unwanted(Exception):
    """The endpoint answered 410: it wants no more notices."""


async def call(
    outbound: Outbound,
    key: RegistryKey,
    hook: Webhook,
    call_id: str,
    document: Mapping[str, Any],
    now: datetime,
) -> bytes:
    """POST a document; the body of the answer. Raises FetchError, Unwanted."""
    body = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    headers = _headers(key, hook, call_id, body, now)
    answer = await outbound.post(
        hook.url, content=body, headers=headers, deadline=DEADLINE, limit=_MAX_ANSWER
    )
    if answer.status == HTTPStatus.GONE:
        raise Unwanted
    if not HTTPStatus.OK <= answer.status < HTTPStatus.MULTIPLE_CHOICES:
        raise FetchError(f"HTTP status {answer.status} instead of 2xx")
    return answer.body


async def challenge(
    database: Database, outbound: Outbound, key: RegistryKey, hook_id: int, now: datetime
) -> None:
    """Ask an endpoint to echo what only it is told; it is enabled when it does."""
    async with database.transaction() as session:
        hook = await session.get_one(Webhook, hook_id)
        if is_enabled(hook) or hook.deleted_at is not None:
            hook.challenge_due_at = None
            return
    asked = int(now.timestamp())
    secret = key.secret(Purpose.WEBHOOK_CHALLENGE, hook.id, hook.generation, asked)
    expected = base64.urlsafe_b64encode(secret).decode()
    failure = None
    try:
        document = {"type": "challenge", "challenge": expected}
        answer = await call(outbound, key, hook, f"challenge_{hook.id}_{asked}", document, now)
        if not _echoes(answer, expected):
            failure = "the endpoint did not answer with the challenge"
    except FetchError as error:
        failure = error.detail
    except Unwanted:
        failure = "HTTP status 410 instead of 2xx"
    async with database.transaction() as session:
        hook = await session.get_one(Webhook, hook_id, with_for_update=True)
        if hook.challenge_due_at is None:
            return
        if failure is None:
            hook.enabled_at, hook.disabled_at, hook.challenge_due_at = now, None, None
            hook.failures, hook.failing_since, hook.error = 0, None, None
            return
        wait = _CHALLENGE_WAITS[hook.failures] if hook.failures < len(_CHALLENGE_WAITS) else None
        hook.failures += 1
        hook.challenge_due_at = None if wait is None else now + wait
        hook.error = f"challenge: {printable(failure)}"[:_MAX_ERROR]


def _echoes(answer: bytes, expected: str) -> bool:
    """Whether an answer is the challenge and nothing else: what merely reflects its requests has not agreed."""
    if answer.strip() == expected.encode():
        return True
    try:
        return bool(json.loads(answer) == {"challenge": expected})
    except (ValueError, RecursionError):
        return False


def note_success(hook: Webhook) -> None:
    hook.failures, hook.failing_since, hook.error = 0, None, None


async def note_failure(
    session: AsyncSession, hook: Webhook, detail: str, now: datetime, *, unwanted: bool = False
) -> None:
    """Count a failed call; the last one that is borne disables the webhook, and its member is told."""
    hook.failures += 1
    hook.failing_since = hook.failing_since or now
    hook.error = printable(detail)[:_MAX_ERROR]
    is_over = hook.failures >= _DISABLED_FAILURES and now - hook.failing_since >= _DISABLED_AFTER
    if is_enabled(hook) and (unwanted or is_over):
        await _disable(session, hook, now)
        await _tell_disabled(session, hook, now)


async def disable_all(session: AsyncSession, now: datetime) -> int:
    """The registry's key changes, and with it every secret: nobody could check a call. How many are disabled."""
    living = select(Webhook).where(Webhook.deleted_at.is_(None), Webhook.disabled_at.is_(None))
    found = list(await session.scalars(living.order_by(Webhook.id).with_for_update()))
    for hook in found:
        hook.error = "the registry's key changed: rotate the secret, then enable the webhook again"
        await _disable(session, hook, now)
    await session.flush()
    for hook in found:
        await _tell_disabled(session, hook, now)
    return len(found)


async def _disable(session: AsyncSession, hook: Webhook, now: datetime) -> None:
    hook.disabled_at, hook.challenge_due_at = now, None
    await _drop_pending(session, hook, "the webhook was disabled", now)


async def _tell_disabled(session: AsyncSession, hook: Webhook, now: datetime) -> None:
    await notices.announce(
        session,
        NoticeKind.WEBHOOK_DISABLED,
        member_id=hook.member_id,
        now=now,
        webhook=hook.id,
        host=httpx.URL(hook.url).host,
        reason=hook.error,
    )


async def _drop_pending(session: AsyncSession, hook: Webhook, reason: str, now: datetime) -> None:
    await session.execute(
        update(Delivery)
        .where(Delivery.webhook_id == hook.id, Delivery.status == DeliveryStatus.PENDING)
        .values(status=DeliveryStatus.SUPPRESSED, error=reason, done_at=now, due_at=None)
    )
