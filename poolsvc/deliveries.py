"""Deliveries on their way: what is due is sent outside of transactions, and what came of it is recorded.

1. A delivery ends as SENT, FAILED or SUPPRESSED, the latter two with the reason. None is dropped in silence.
2. At least once: who dies between sending and recording leaves it to the next one, which sends it again under the
   same Message-ID or webhook-id. A claim keeps two workers from sending the same one at the same time.
3. Over a limit a mail or call waits, it is never dropped. Several mails that wait for one recipient become one.
4. The secret of a link exists in the mail only: it is derived when it is sent, and in no error.
"""

import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from email.message import EmailMessage
from types import MappingProxyType
from typing import Any

import structlog
from sqlalchemy import delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import selectinload

from poolsvc import notices, webhooks
from poolsvc.config import MailSettings, Settings
from poolsvc.db import Database
from poolsvc.derived import Purpose, RegistryKey
from poolsvc.mail import Mailer, MailError, envelope
from poolsvc.models import (
    Channel,
    Delivery,
    DeliveryStatus,
    Invitation,
    Member,
    Membership,
    Notice,
    SentMail,
    SignIn,
)
from poolsvc.notices import NoticeKind, settle
from poolsvc.outbound import FetchError, Outbound
from poolsvc.texts import Text, joined, text_of

_log = structlog.get_logger()
_MINUTE, _HOUR = timedelta(minutes=1), timedelta(hours=1)
# Three days of tries; the last wait is tried again and again.
MAIL_WAITS = (_MINUTE, 5 * _MINUTE, 30 * _MINUTE, 2 * _HOUR, *[6 * _HOUR] * 11)
WEBHOOK_WAITS = (
    timedelta(seconds=10),
    _MINUTE,
    10 * _MINUTE,
    _HOUR,
    6 * _HOUR,
    12 * _HOUR,
    24 * _HOUR,
    24 * _HOUR,
)
# More deliveries than this to one recipient at the same moment go as one mail.
_SINGLES = 3
# Of the mails of a minute one in five is kept for links, since somebody waits for them.
_FOR_LINKS = 5
# Calls to one webhook follow each other; they end well before the lease does.
_CALLS_BUDGET = 60.0
_ADDRESS = re.compile(r"[^\s<>]*@[^\s<>]*")
_LINKS = {NoticeKind.SIGN_IN: Purpose.SIGN_IN, NoticeKind.INVITATION: Purpose.INVITATION}
# The data of a link's notice has the id of its row under this name.
_LINK_ID = {NoticeKind.SIGN_IN: "sign_in", NoticeKind.INVITATION: "invitation"}


@dataclass(frozen=True, slots=True)
class Letter:
    """One mail that is ready to go, with the deliveries that it carries."""

    deliveries: tuple[int, ...]
    recipient: str = field(repr=False)
    message: EmailMessage = field(repr=False)
    is_link: bool


@dataclass(frozen=True, slots=True)
class Calls:
    """Deliveries to one webhook, in their order."""

    webhook: int
    deliveries: tuple[int, ...]


class Post:
    """Sends notices by mail and webhooks. `trouble` is why no mail goes out at present."""

    def __init__(self, database: Database, settings: Settings, key: RegistryKey, outbound: Outbound) -> None:
        self._database = database
        self._settings = settings
        self._key = key
        self._outbound = outbound
        mail = settings.mail
        self._mailer = (
            None if mail is None else Mailer(mail, pool=settings.pool, public_url=settings.public_url)
        )
        self.trouble: str | None = None

    async def letters(self, ids: Sequence[int], now: datetime) -> list[Letter]:
        """The mails to send for these deliveries, which the caller has claimed; the others are settled or put off."""
        async with self._database.transaction() as session:
            found = await session.scalars(
                select(Delivery)
                .where(Delivery.id.in_(ids), Delivery.status == DeliveryStatus.PENDING)
                .options(selectinload(Delivery.notice), selectinload(Delivery.user))
                .order_by(Delivery.id)
            )
            await session.execute(delete(SentMail).where(SentMail.at <= now - _HOUR))
            ready: list[Letter] = []
            for address, rows in await self._sorted(session, list(found), now):
                letter = await self._letter(session, address, rows, now)
                ready += [letter] if letter is not None else []
            return ready

    async def _sorted(
        self, session: AsyncSession, found: Sequence[Delivery], now: datetime
    ) -> list[tuple[str, list[Delivery]]]:
        """What goes into each mail: links first and alone, then notices by recipient."""
        links: list[tuple[str, list[Delivery]]] = []
        by_address: dict[str, list[Delivery]] = defaultdict(list)
        for row in found:
            reason = await self._why_not(session, row, now)
            address = row.user.email if row.user is not None else row.email
            if reason is not None or address is None:
                settle(row, DeliveryStatus.SUPPRESSED, now, reason or "there is no mail address")
            elif row.notice.kind in _LINKS:
                links.append((address, [row]))
            else:
                by_address[address].append(row)
        for address, rows in by_address.items():
            size = len(rows) if len(rows) > _SINGLES else 1
            links += [(address, rows[start : start + size]) for start in range(0, len(rows), size)]
        return links

    async def _why_not(self, session: AsyncSession, row: Delivery, now: datetime) -> str | None:
        """Why a mail is not to be sent, as things are now."""
        if self._mailer is None:
            return "no mail server is configured"
        kind = NoticeKind(row.notice.kind)
        if kind in _LINKS:
            return await _why_no_link(session, kind, row.notice, now)
        if row.user is None:
            return None
        membership = await session.scalar(
            select(Membership).where(
                Membership.member_id == row.notice.member_id, Membership.user_id == row.user_id
            )
        )
        is_farewell = kind is NoticeKind.USER_LEFT and row.notice.data["user"] == row.user_id
        if membership is None and row.notice.member_id is not None and not is_farewell:
            return "they act for this member no longer"
        return notices.why_no_mail(kind, row.user, membership)

    async def _letter(
        self, session: AsyncSession, address: str, rows: Sequence[Delivery], now: datetime
    ) -> Letter | None:
        assert self._mailer is not None
        assert self._settings.mail is not None
        kinds = [NoticeKind(row.notice.kind) for row in rows]
        is_link = kinds[0] in _LINKS
        try:
            recipient = envelope(address)
        except MailError as error:
            for row in rows:
                settle(row, DeliveryStatus.FAILED, now, error.detail)
            return None
        tag = self._key.secret(Purpose.MAIL_RECIPIENT, address).hex()
        wait = await _full(session, self._settings.mail, tag, now, is_link=is_link)
        if wait is not None:
            for row in rows:
                row.due_at, row.error = wait
            return None
        session.add(SentMail(recipient=tag, at=now))
        await session.flush()
        texts = [notice_text(self._settings, row.notice) for row in rows]
        if is_link:
            texts = [await self._link(session, kinds[0], rows[0].notice)]
        message = self._mailer.compose(
            recipient,
            texts[0] if len(texts) == 1 else joined(texts),
            deliveries=[row.id for row in rows],
            kinds=kinds,
            now=now,
        )
        return Letter(tuple(row.id for row in rows), recipient, message, is_link)

    async def _link(self, session: AsyncSession, kind: NoticeKind, notice: Notice) -> Text:
        """The text with the secret, and with what an invitation is to."""
        identifier = notice.data[_LINK_ID[kind]]
        more: dict[str, Any] = {}
        if kind is NoticeKind.INVITATION:
            offer = await session.get_one(Invitation, identifier)
            member = await session.get(Member, offer.member_id) if offer.member_id is not None else None
            more = {"role": offer.role, "expires_at": offer.expires_at.isoformat()}
            more |= {} if member is None else {"member": member.name}
        token = self._key.token(_LINKS[kind], identifier)
        return notice_text(self._settings, notice, token=token, more=more)

    async def send(self, letter: Letter, now: datetime) -> None:
        """Send one mail and record what came of it."""
        assert self._mailer is not None
        failure: MailError | None = None
        try:
            await self._mailer.send(letter.message, letter.recipient)
        except MailError as error:
            failure = error
        reason = "" if failure is None else _reason(letter, failure)
        self._note_mail_server(None if failure is None or failure.permanent else _trouble(failure))
        async with self._database.transaction() as session:
            for row in await _pending(session, letter.deliveries):
                if failure is None:
                    row.attempts += 1
                    settle(row, DeliveryStatus.SENT, now)
                else:
                    _try_again(row, MAIL_WAITS, reason, now, final=failure.permanent)

    def _note_mail_server(self, trouble: str | None) -> None:
        """A mail that is refused for good was refused by a server that works."""
        if trouble is not None and self.trouble is None:
            _log.error("mail_failed", detail=trouble)
        self.trouble = trouble

    async def challenge(self, webhook_id: int, now: datetime) -> None:
        """Ask the endpoint of a webhook whether it wants notices."""
        await webhooks.challenge(self._database, self._outbound, self._key, webhook_id, now)

    async def calls(self, ids: Sequence[int]) -> list[Calls]:
        """These deliveries, which the caller has claimed, by webhook."""
        async with self._database.transaction() as session:
            by_webhook: dict[int, list[int]] = defaultdict(list)
            for row in await _pending(session, ids):
                if row.webhook_id is not None:
                    by_webhook[row.webhook_id].append(row.id)
            return [Calls(webhook, tuple(rows)) for webhook, rows in by_webhook.items()]

    async def call(self, calls: Calls, now: datetime) -> None:
        """Call one webhook with one notice after the other, until one fails; the rest waits with that one."""
        end = time.monotonic() + _CALLS_BUDGET
        for position, identifier in enumerate(calls.deliveries):
            due = now if time.monotonic() > end else await self._call(identifier, now)
            if due is not None:
                async with self._database.transaction() as session:
                    for row in await _pending(session, calls.deliveries[position:]):
                        row.due_at = due
                return

    async def _call(self, identifier: int, now: datetime) -> datetime | None:
        """When to go on, if not at once."""
        async with self._database.transaction() as session:
            row = await session.scalar(
                select(Delivery)
                .where(Delivery.id == identifier, Delivery.status == DeliveryStatus.PENDING)
                .options(selectinload(Delivery.notice), selectinload(Delivery.webhook))
            )
            if row is None or row.webhook is None:
                return None
            if not webhooks.is_enabled(row.webhook):
                settle(row, DeliveryStatus.SUPPRESSED, now, "the webhook is not enabled")
                return None
            limit = self._settings.policy.webhook_calls_per_hour
            if (wait := await _no_room(session, row.webhook.id, limit, now)) is not None:
                row.error = f"waits: {limit} calls within an hour"
                return wait
        failure, unwanted = None, False
        document = {
            "type": row.notice.kind,
            "at": row.notice.at.isoformat(),
            "server": row.notice.data.get("server"),
            "data": row.notice.data,
            "text": notice_text(self._settings, row.notice).body,
        }
        try:
            await webhooks.call(self._outbound, self._key, row.webhook, f"notice_{row.id}", document, now)
        except FetchError as error:
            failure = error.detail
        except webhooks.Unwanted:
            failure, unwanted = "HTTP status 410: the endpoint wants no more", True
        async with self._database.transaction() as session:
            hook = await webhooks.find_living(session, row.webhook.id)
            pending = await _pending(session, [identifier])
            if hook is None or not pending:
                return None
            if failure is None:
                pending[0].attempts += 1
                settle(pending[0], DeliveryStatus.SENT, now)
                webhooks.note_success(hook)
                return None
            _try_again(pending[0], WEBHOOK_WAITS, failure, now, final=unwanted)
            due = pending[0].due_at
            await session.flush()
            await webhooks.note_failure(session, hook, failure, now, unwanted=unwanted)
            return due


def notice_text(
    settings: Settings,
    notice: Notice,
    *,
    token: str | None = None,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> Text:
    """The words of a notice of this pool."""
    return text_of(
        NoticeKind(notice.kind),
        {**notice.data, **more},
        at=notice.at,
        pool=settings.pool,
        public_url=settings.public_url,
        token=token,
    )


def send_again(row: Delivery, now: datetime) -> bool:
    """Let a delivery that was given up be tried once more; whether it can be."""
    is_over = row.status in (DeliveryStatus.FAILED, DeliveryStatus.SUPPRESSED)
    if not is_over or (row.channel is Channel.MAIL and row.user_id is None):
        return False
    row.status, row.attempts, row.due_at, row.done_at = DeliveryStatus.PENDING, 0, now, None
    return True


async def _why_no_link(session: AsyncSession, kind: NoticeKind, notice: Notice, now: datetime) -> str | None:
    """A link that nobody can use any more is not sent."""
    identifier = notice.data[_LINK_ID[kind]]
    if kind is NoticeKind.SIGN_IN:
        attempt = await session.get(SignIn, identifier)
        over = attempt is None or attempt.used_at is not None or attempt.expires_at <= now
    else:
        offer = await session.get(Invitation, identifier)
        over = offer is None or bool(offer.accepted_at or offer.revoked_at) or offer.expires_at <= now
    return "the link had ended before it could be sent" if over else None


async def _full(
    session: AsyncSession, limits: MailSettings, recipient: str, now: datetime, *, is_link: bool
) -> tuple[datetime, str] | None:
    """Until when a mail has to wait, and why; None when it may go."""
    by_minute = limits.mails_per_minute
    if not is_link:
        by_minute = max(1, by_minute - by_minute // _FOR_LINKS)
    last = select(func.count(), func.min(SentMail.at)).where(SentMail.at > now - _MINUTE)
    sent, first = (await session.execute(last)).one()
    if sent >= by_minute:
        return first + _MINUTE, f"waits: {sent} mails within a minute"
    of_hour = select(SentMail.at).where(SentMail.recipient == recipient, SentMail.at > now - _HOUR)
    times = list(await session.scalars(of_hour.order_by(SentMail.at)))
    by_hour = limits.mails_per_hour_and_recipient
    if len(times) >= by_hour:
        return times[-by_hour] + _HOUR, f"waits: {len(times)} mails to one recipient within an hour"
    return None


async def _no_room(session: AsyncSession, webhook: int, limit: int, now: datetime) -> datetime | None:
    """Until when a call has to wait; those that fail wait by themselves, and are not counted."""
    made = (
        select(Delivery.done_at)
        .where(
            Delivery.webhook_id == webhook,
            Delivery.status == DeliveryStatus.SENT,
            Delivery.done_at > now - _HOUR,
        )
        .order_by(Delivery.done_at.desc())
        .offset(limit - 1)
        .limit(1)
    )
    first = await session.scalar(made)
    return None if first is None else first + _HOUR


async def _pending(session: AsyncSession, ids: Sequence[int]) -> list[Delivery]:
    """Those that nobody has settled meanwhile, locked."""
    found = await session.scalars(
        select(Delivery)
        .where(Delivery.id.in_(ids), Delivery.status == DeliveryStatus.PENDING)
        .order_by(Delivery.id)
        .with_for_update()
    )
    return list(found)


def _try_again(row: Delivery, waits: Sequence[timedelta], reason: str, now: datetime, *, final: bool) -> None:
    row.attempts += 1
    if final or row.attempts > len(waits):
        settle(row, DeliveryStatus.FAILED, now, reason)
        _log.warning("delivery_failed", delivery=row.id, channel=row.channel, reason=reason)
    else:
        row.due_at, row.error = now + waits[row.attempts - 1], reason


def _reason(letter: Letter, failure: MailError) -> str:
    """Why a mail failed. A server's own words may repeat what it was given: no link and no address is kept."""
    if letter.is_link and failure.code is not None:
        return _trouble(failure)
    return _ADDRESS.sub("(address)", failure.detail)


def _trouble(failure: MailError) -> str:
    """Why no mail goes out, for an alarm that everybody may read."""
    if failure.code is not None:
        return f"the mail server answered {failure.code}"
    return _ADDRESS.sub("(address)", failure.detail)
