"""Certificates of a member's own account, once its server is out: the registry proves control of the name, and revokes them.

    CAA names the registry's accounts -> order -> its TXT everywhere -> control proved -> revoked -> authorization ended
    -> CAA closed

RFC 8555 section 7.6 lets an account revoke what another one ordered if it holds authorizations for all names in it. The
order for them is never finalized. What is revoked is what probes have seen.

Rules:

1. Neither SRV nor addresses wait for it, and the server is REMOVED without it, when the CA refuses for good or the
   pool's patience ends. The receipt then says why, and until when the certificate is valid. A proof that the CA has
   taken is ended before, or has lapsed, unless the CA refuses that as well.
2. CAA lets only the registry's accounts prove control meanwhile, and only in DNS, where the member cannot.
3. Every step can be repeated; what it came to is in the rows of the server, its certificates and `RevocationOrder`
   before the authorization, by which it could be repeated, is ended.
4. Patience is for CAs. No time counts in which DNS does not show what they are to see: the removal waits for DNS anyway.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import structlog
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.acme import AcmeAccount, AcmeError, OrderState, PendingOrder
from nts_core.certificates import ChainError
from poolsvc import issuance, onboarding, servers
from poolsvc.authorities import UNKNOWN_CA, Accounts
from poolsvc.config import Settings
from poolsvc.db import Database
from poolsvc.models import Order, RevocationOrder, Server

_log = structlog.get_logger()
_MAX_TEXT = 1000
_NO_COPY = "no copy of it was kept when it was seen"
# Codes that CAs use for what will not change, and for what will: only so many of them in a row are a refusal.
_DOUBTFUL = {"malformed", "unauthorized"}
_TRIES = 5
# What is no answer of an ACME server, or asks a person to do something first.
_NO_REFUSAL = {"badNonce", "server-error", "userActionRequired"}
# After which the CA is asked nothing more in the same pass.
_CLOSED = {"rate-limited", "unreachable"}


def begin(server: Server, now: datetime) -> None:
    """If probes have seen certificates that are still good, CAA is turned to the registry's accounts."""
    if server.revoking_since is not None or server.not_revoked is not None:
        return
    if any(_is_to_revoke(order, now) for order in server.orders):
        server.revoking_since = now
    elif _good(server, now):
        server.not_revoked = _NO_COPY


def is_under_way(server: Server) -> bool:
    return server.revoking_since is not None and server.revoking_ended_at is None


async def load_orders(session: AsyncSession, server: Server) -> None:
    """Few servers have any: they are not read with each one."""
    await session.refresh(server, ["revocation_orders"])


def is_any_left(server: Server) -> bool:
    """Whether the CA has an order, or an authorization that came of one, that is to be ended yet."""
    return any(one.ended_at is None for one in server.revocation_orders)


def _good(server: Server, now: datetime) -> list[Order]:
    """Certificates that have been seen, and that clients may trust."""
    return [
        order
        for order in server.orders
        if issuance.is_seen(order)
        and order.revoked_at is None
        and order.not_after is not None
        and order.not_after > now
    ]


def _is_to_revoke(order: Order, now: datetime) -> bool:
    """What the CA has refused is not asked for again."""
    return issuance.is_seen(order) and order.error is None and issuance.is_valid(order, now)


@dataclass(slots=True)
class _Pass:
    """One pass at one CA: what was there when it began, and what it came to."""

    ca: str
    attempt: RevocationOrder | None  # the order under way
    certificates: Sequence[Order]
    next_at: datetime  # when an order may be placed if there is none

    placed: PendingOrder | None = None
    answered: bool = False
    proved: bool = False
    failed: str | None = None  # why the order proves nothing any more
    revoked: set[int] = field(default_factory=set)
    doubted: set[int] = field(default_factory=set)  # refused, but perhaps not for good
    refused: dict[int, str] = field(default_factory=dict)
    deactivated: bool = False
    trouble: AcmeError | None = None  # for which a step is tried again

    @property
    def has_moved(self) -> bool:
        """Whether the next step can be taken at once."""
        return self.answered or self.proved or bool(self.revoked) or bool(self.refused)


@dataclass(frozen=True, slots=True)
class Outcome:
    """When the next pass is due, and what kept this one from going on at one CA, if anything did."""

    due_at: datetime
    trouble: AcmeError | None
    failures: tuple[BaseException, ...]  # what nobody foresaw


async def advance(
    database: Database, settings: Settings, accounts: Accounts, server_id: int, now: datetime, deadline: float
) -> Outcome | None:
    """Take the next step at each CA of the certificates, and record it; None when nothing is left.

    `deadline`: seconds for the calls to the CAs.
    """
    async with database.transaction() as session:
        server = await servers.get(session, server_id)
        await load_orders(session, server)
        if not is_under_way(server) and not is_any_left(server):
            return None
    by_ca: dict[str, list[Order]] = {}
    for order in server.orders if is_under_way(server) else ():
        if _is_to_revoke(order, now):
            by_ca.setdefault(issuance.ca_of(settings, order), []).append(order)
    # One whose certificates are all done has an authorization to be ended yet.
    attempts = server.revocation_orders
    passes = [
        _Pass(ca, _present(attempts, ca), by_ca.get(ca, ()), _next_at(settings, ca, attempts, now))
        for ca in dict.fromkeys([*by_ca, *(one.ca for one in attempts if one.ended_at is None)])
    ]
    domain = settings.domain_of(server.name)
    outcomes = await asyncio.gather(
        *(_take(one, database, settings, accounts, domain, now, deadline) for one in passes),
        return_exceptions=True,
    )
    async with database.transaction() as session:
        server = await servers.get(session, server_id)
        await load_orders(session, server)
        for one in passes:
            _note_certificates(settings, server, one, now)
            _note(server, one, now)
        trouble = next((one.trouble for one in passes if one.trouble is not None), None)
        _end_if_over(settings, server, trouble, now)
        due_at = min((_due_at(settings, server, one, now) for one in passes), default=now)
    failures = tuple(outcome for outcome in outcomes if outcome is not None)
    return Outcome(due_at, trouble if is_under_way(server) or is_any_left(server) else None, failures)


def _present(attempts: Sequence[RevocationOrder], ca: str) -> RevocationOrder | None:
    """The order under way at a CA."""
    return next((one for one in attempts if one.ca == ca and one.ended_at is None), None)


async def _take(
    one: _Pass,
    database: Database,
    settings: Settings,
    accounts: Accounts,
    domain: str,
    now: datetime,
    deadline: float,
) -> None:
    if one.attempt is None and now < one.next_at:
        return
    try:
        async with asyncio.timeout(deadline):
            account = await accounts(one.ca, now)
            if one.attempt is None:
                one.placed = await onboarding.authorize(database, settings, account, one.ca, domain, now)
            else:
                await _go_on(settings, account, one, one.attempt, now)
    except AcmeError as error:
        # A CA that the settings name no more may be named again.
        if one.attempt is None and error.permanent and error.code != UNKNOWN_CA:
            one.refused = dict.fromkeys((order.id for order in one.certificates), error.detail)
        else:
            one.trouble = error
    except TimeoutError:
        one.trouble = AcmeError("unreachable", f"{one.ca} does not answer")
    if one.trouble is not None and one.attempt is None:
        # The CA may have taken an order of which we have not heard, and counts it.
        least = settings.policy.order_wait(0).total_seconds()
        one.trouble.retry_after = max(one.trouble.retry_after or 0, least)


def _next_at(settings: Settings, ca: str, attempts: Sequence[RevocationOrder], now: datetime) -> datetime:
    """When another order may follow those that failed at a CA."""
    ended = [one.ended_at for one in attempts if one.ca == ca and one.ended_at is not None]
    return max(ended) + settings.policy.order_wait(len(ended) - 1) if ended else now


async def _go_on(
    settings: Settings, account: AcmeAccount, one: _Pass, attempt: RevocationOrder, now: datetime
) -> None:
    """From an order to the end of its authorization, as far as it can be repeated. Raises AcmeError."""
    if attempt.proved_at is None:
        if attempt.txt is None or (attempt.due_at is not None and now >= attempt.due_at):
            await _prove(account, attempt, one)
        if not one.proved:
            return
    if one.certificates:
        await _revoke(settings, account, one)
        return  # to be kept first: without the authorization the same could not be asked for again
    if one.proved:
        return
    try:
        await account.deactivate_authorization(attempt.authorization_url)
        one.deactivated = True
    except AcmeError as error:
        if not _is_refusal(error, account):
            raise
        one.failed = f"the authorization was not ended: {error.detail}"


async def _revoke(settings: Settings, account: AcmeAccount, one: _Pass) -> None:
    """Each of them, whatever becomes of the others."""
    for order in one.certificates:
        assert order.chain is not None
        try:
            await account.revoke(order.chain, issuance.revocation_reason(order))
            one.revoked.add(order.id)
        except ChainError as error:
            one.refused[order.id] = f"the copy of it cannot be read: {error}"
        except AcmeError as error:
            is_refused = _is_refusal(error, account)
            if is_refused and (error.code not in _DOUBTFUL or order.attempts + 1 >= _TRIES):
                one.refused[order.id] = error.detail
                continue
            if is_refused:
                one.doubted.add(order.id)
                error.retry_after = settings.policy.step_wait(order.attempts).total_seconds()
            one.trouble = error
            if error.code in _CLOSED:
                return


async def _prove(account: AcmeAccount, attempt: RevocationOrder, one: _Pass) -> None:
    try:
        status = await account.poll(attempt.url)
    except AcmeError as error:
        if not _is_refusal(error, account):
            raise
        one.failed = error.detail
        return
    match status.status:
        case OrderState.INVALID:
            one.failed = status.error_detail or "the CA declared the order invalid"
        case OrderState.PENDING:
            if attempt.answered_at is None and attempt.challenge_url is not None:
                await account.answer(attempt.challenge_url)
                one.answered = True
        case _:
            one.proved = True


def _is_refusal(error: AcmeError, account: AcmeAccount) -> bool:
    """Whether the CA itself has understood and said no. A proxy before it speaks no ACME."""
    if error.permanent:
        return True
    return error.is_refusal and error.code not in _NO_REFUSAL and not account.lost


def _note_certificates(settings: Settings, server: Server, one: _Pass, now: datetime) -> None:
    for order in server.orders:
        if order.id in one.revoked:
            order.revoked_at = now
        elif order.id in one.doubted:
            order.attempts += 1
        elif order.id in one.refused:
            _note_refusal(settings, one.ca, order, one.refused[order.id], now)


def _note_refusal(settings: Settings, ca: str, order: Order, why: str, now: datetime) -> None:
    """Whose it is was guessed by the account that CAA named when it was seen: all CAs are asked then, in turn."""
    names = [one.name for one in settings.ca.all]
    is_guess = order.ca_since is None
    rest = names if is_guess else names[names.index(ca) + 1 :] if ca in names else []
    other = next((name for name in rest if name != ca), None)
    if other is None:
        order.error = f"{ca}: {why}"[:_MAX_TEXT]
    else:
        order.ca, order.ca_since, order.attempts = other, now, 0


def _note(server: Server, one: _Pass, now: datetime) -> None:
    if one.placed is not None:
        _note_placed(server, one.ca, one.placed, now)
    under_way = None if one.attempt is None else one.attempt.id
    attempt = next((row for row in server.revocation_orders if row.id == under_way), None)
    if attempt is None or attempt.ended_at is not None:
        return  # another pass has ended it meanwhile
    attempt.answered_at = now if one.answered else attempt.answered_at
    if one.proved:
        attempt.proved_at = now
        server.control_proved_at = now
        _log.info("control_proved", server=server.name, ca=one.ca)
    if one.deactivated:
        attempt.deactivated_at = attempt.ended_at = now
    elif one.failed is not None:
        attempt.error, attempt.ended_at = one.failed[:_MAX_TEXT], now
        _log.warning("revocation_order_failed", server=server.name, ca=one.ca, reason=one.failed)
    elif attempt.proved_at is not None and now >= attempt.created_at + issuance.AUTHORIZATION_LIFE:
        attempt.ended_at = now  # by itself


def _note_placed(server: Server, ca: str, order: PendingOrder, now: datetime) -> None:
    """Two passes at a time may place one each, or be given the same one: the first that was recorded counts."""
    made = RevocationOrder(
        server_id=server.id,
        ca=ca,
        created_at=now,
        url=order.url,
        authorization_url=order.authorization_url,
        challenge_url=order.challenge_url,
        txt=order.txt,
    )
    if (first := _present(server.revocation_orders, ca)) is not None:
        if first.url == order.url:
            return
        made.ended_at, made.error = now, "another one was placed at the same moment"
    server.revocation_orders.append(made)


def _due_at(settings: Settings, server: Server, one: _Pass, now: datetime) -> datetime:
    """When to go on at one CA: as it says, within the pool's patience; or when resolvers have forgotten what was there."""
    attempt, wait = _present(server.revocation_orders, one.ca), timedelta(seconds=settings.policy.step_retry)
    patience = timedelta(seconds=settings.policy.revocation_patience)
    late_at = _late_at(settings, server)
    if one.trouble is not None:
        wait = max(wait, timedelta(seconds=one.trouble.retry_after or 0))
    elif one.has_moved:
        wait = timedelta(seconds=settings.policy.tick)
    elif attempt is not None and attempt.answered_at is None and attempt.due_at is not None:
        wait = max(wait, attempt.due_at - now)
    latest = patience if late_at is None or late_at <= now else late_at - now
    return now + min(wait, latest)


def _late_at(settings: Settings, server: Server) -> datetime | None:
    """When patience ends; None while DNS does not show what the CA is to see first."""
    if server.revoking_since is None or server.caa_turned_at is None:
        return None
    began = max(server.revoking_since, server.caa_turned_at)
    if (first := next(iter(server.revocation_orders), None)) is not None:
        if first.served_at is None and first.txt is not None and first.ended_at is None:
            return None
        began = max(began, first.served_at or began)
    return began + timedelta(seconds=settings.policy.revocation_patience)


def _is_to_give_up(settings: Settings, server: Server, trouble: AcmeError | None, now: datetime) -> bool:
    """Patience has ended and something has failed. What goes on well has as much again: the registry may have been away."""
    late_at = _late_at(settings, server)
    if late_at is None or now < late_at:
        return False
    has_failed = trouble is not None or any(one.error is not None for one in server.revocation_orders)
    return has_failed or now >= late_at + timedelta(seconds=settings.policy.revocation_patience)


def _end_if_over(settings: Settings, server: Server, trouble: AcmeError | None, now: datetime) -> None:
    """All is done, or refused, or has taken too long: CAA is closed."""
    ended = [one.deactivated_at for one in server.revocation_orders]
    server.authorization_deactivated_at = max(
        filter(None, [server.authorization_deactivated_at, *ended]), default=None
    )
    if not is_under_way(server):
        return
    is_left = any(_is_to_revoke(order, now) for order in server.orders)
    if (is_left or is_any_left(server)) and not _is_to_give_up(settings, server, trouble, now):
        return
    for attempt in server.revocation_orders:
        if attempt.ended_at is None and attempt.proved_at is None:
            attempt.ended_at = now
    server.revoking_ended_at = now
    good = _good(server, now)
    if not good:
        server.certificate_revoked_at = max(
            (order.revoked_at for order in server.orders if order.revoked_at is not None), default=None
        )
        _log.info("own_certificates_revoked", server=server.name)
        return
    server.not_revoked = _why_not(server, good, trouble)[:_MAX_TEXT]
    _log.warning("revocation_given_up", server=server.name, reason=server.not_revoked)


def _why_not(server: Server, good: Sequence[Order], trouble: AcmeError | None) -> str:
    """What the CA has refused, or the step that did not come in time."""
    refused = next((order.error for order in good if order.error is not None), None)
    if refused is not None:
        return refused
    if all(order.chain is None for order in good):
        return _NO_COPY
    if trouble is not None:
        return f"CA: {trouble.detail}"
    failed = [one.error for one in server.revocation_orders if one.error is not None]
    return failed[-1] if failed else "control of the name was not proved in time"
