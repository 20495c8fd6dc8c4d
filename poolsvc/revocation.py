"""Certificates of a member's own account, once its server is out: the registry proves control of the name, and revokes them.

    CAA names the registry's accounts -> order -> its TXT everywhere -> control proved -> revoked -> authorization ended
    -> CAA closed

RFC 8555 section 7.6 lets an account revoke what another one ordered if it holds authorizations for all names in it. The
order for them is never finalized. What is revoked is what probes have seen.

Rules:

1. Nothing waits for it: neither SRV nor addresses, and the server is REMOVED without it, when the CA refuses for good or
   the pool's patience ends. The receipt then says why, and until when the certificate is valid.
2. CAA lets only the registry's accounts prove control meanwhile, and only in DNS, where the member cannot.
3. Every step can be repeated; what it came to is in the rows of the server, its certificates and `RevocationOrder`
   before the next one is taken.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import structlog
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from poolsvc import issuance, onboarding, servers
from poolsvc.acme import AcmeAccount, AcmeError, OrderState, PendingOrder
from poolsvc.authorities import Accounts
from poolsvc.config import Settings
from poolsvc.db import Database
from poolsvc.models import Order, RevocationOrder, Server

_log = structlog.get_logger()
_MAX_TEXT = 1000
_NO_COPY = "no copy of it was kept when it was seen"


def begin(server: Server, now: datetime) -> None:
    """If probes have seen certificates that are still good, CAA is turned to the registry's accounts."""
    if not server.agentless or server.revoking_since is not None or server.not_revoked is not None:
        return
    if any(_is_to_revoke(order, now) for order in server.orders):
        server.revoking_since = now
    elif _good(server, now):
        server.not_revoked = _NO_COPY


def is_under_way(server: Server) -> bool:
    return server.revoking_since is not None and server.revoking_ended_at is None


def _good(server: Server, now: datetime) -> list[Order]:
    """Certificates that have been seen, and that clients may trust."""
    return [
        order
        for order in server.orders
        if order.revoked_at is None and order.not_after is not None and order.not_after > now
    ]


def _is_to_revoke(order: Order, now: datetime) -> bool:
    """What the CA has refused is not asked for again."""
    return order.ca is not None and order.error is None and issuance.is_valid(order, now)


@dataclass(slots=True)
class _Done:
    """What one pass came to at one CA."""

    placed: PendingOrder | None = None
    answered: bool = False
    proved: bool = False
    failed: str | None = None  # why the order proves nothing any more
    revoked: set[int] = field(default_factory=set)
    refused: dict[int, str] = field(default_factory=dict)
    deactivated: bool = False
    trouble: AcmeError | None = None  # for which a step is tried again


async def advance(
    database: Database, settings: Settings, accounts: Accounts, server_id: int, now: datetime, deadline: float
) -> AcmeError | None:
    """Take the next step at each CA of the certificates; what keeps it from going on at one, if anything does.

    `deadline`: seconds for the calls to the CAs. What nobody foresaw at one CA is raised once all others' steps are
    recorded.
    """
    async with database.transaction() as session:
        server = await servers.get(session, server_id)
        if not is_under_way(server):
            return None
        attempts = await _attempts(session, server)
    by_ca: dict[str, list[Order]] = {}
    for order in server.orders:
        if order.ca is not None and _is_to_revoke(order, now):
            by_ca.setdefault(order.ca, []).append(order)
    # One whose certificates are all done has an authorization to be ended yet.
    cas = [*by_ca, *(one.ca for one in attempts if one.ended_at is None and one.ca not in by_ca)]
    domain = settings.domain_of(server.name)
    passes = (
        _pass_at(database, settings, accounts, domain, ca, by_ca.get(ca, []), attempts, now, deadline)
        for ca in cas
    )
    outcomes = dict(zip(cas, await asyncio.gather(*passes, return_exceptions=True), strict=True))
    found = {ca: outcome for ca, outcome in outcomes.items() if isinstance(outcome, _Done)}
    async with database.transaction() as session:
        server = await servers.get(session, server_id)
        attempts = await _attempts(session, server)
        for ca, done in found.items():
            _note(session, server, ca, attempts, done, now)
        trouble = next((done.trouble for done in found.values() if done.trouble is not None), None)
        _end_if_over(settings, server, attempts, trouble, now)
    if failures := [outcome for outcome in outcomes.values() if isinstance(outcome, BaseException)]:
        raise BaseExceptionGroup("steps at CAs failed", failures)
    return trouble if is_under_way(server) else None


async def _attempts(session: AsyncSession, server: Server) -> list[RevocationOrder]:
    chosen = select(RevocationOrder).where(RevocationOrder.server_id == server.id)
    return list(await session.scalars(chosen.order_by(RevocationOrder.id)))


def _present(attempts: Sequence[RevocationOrder], ca: str) -> RevocationOrder | None:
    """The order under way at a CA."""
    return next((one for one in attempts if one.ca == ca and one.ended_at is None), None)


async def _pass_at(
    database: Database,
    settings: Settings,
    accounts: Accounts,
    domain: str,
    ca: str,
    certificates: Sequence[Order],
    attempts: Sequence[RevocationOrder],
    now: datetime,
    deadline: float,
) -> _Done:
    done, attempt = _Done(), _present(attempts, ca)
    if attempt is None and now < _next_at(settings, ca, attempts, now):
        return done
    try:
        async with asyncio.timeout(deadline):
            account = await accounts(ca, now)
            if attempt is None:
                done.placed = await onboarding.authorize(database, settings, account, ca, domain, now)
            else:
                await _go_on(account, attempt, certificates, done, now)
    except AcmeError as error:
        if attempt is None and error.permanent:
            done.refused = dict.fromkeys((order.id for order in certificates), error.detail)
        else:
            done.trouble = error
    except TimeoutError:
        done.trouble = AcmeError("unreachable", f"{ca} does not answer")
    if done.trouble is not None and attempt is None:
        # The CA may have taken an order of which we have not heard, and counts it.
        least = settings.policy.order_wait(0).total_seconds()
        done.trouble.retry_after = max(done.trouble.retry_after or 0, least)
    return done


def _next_at(settings: Settings, ca: str, attempts: Sequence[RevocationOrder], now: datetime) -> datetime:
    """When another order may follow those that failed at a CA."""
    ended = [one.ended_at for one in attempts if one.ca == ca and one.ended_at is not None]
    return max(ended) + settings.policy.order_wait(len(ended) - 1) if ended else now


async def _go_on(
    account: AcmeAccount, attempt: RevocationOrder, certificates: Sequence[Order], done: _Done, now: datetime
) -> None:
    """The next step from an order to the end of its authorization. Raises AcmeError."""
    if attempt.proved_at is None:
        if attempt.txt is None or (attempt.due_at is not None and now >= attempt.due_at):
            await _prove(account, attempt, done)
        return
    for order in certificates:
        assert order.chain is not None
        try:
            await account.revoke(order.chain, issuance.revocation_reason(order))
            done.revoked.add(order.id)
        except AcmeError as error:
            if not _is_final(error, account):
                raise
            done.refused[order.id] = error.detail
    if certificates:
        return  # to be kept first: without the authorization the same could not be asked for again
    try:
        await account.deactivate_authorization(attempt.authorization_url)
        done.deactivated = True
    except AcmeError as error:
        if not _is_final(error, account):
            raise
        done.failed = f"the authorization was not ended: {error.detail}"


async def _prove(account: AcmeAccount, attempt: RevocationOrder, done: _Done) -> None:
    try:
        status = await account.poll(attempt.url)
    except AcmeError as error:
        if not _is_final(error, account):
            raise
        done.failed = error.detail
        return
    match status.status:
        case OrderState.INVALID:
            done.failed = status.error_detail or "the CA declared the order invalid"
        case OrderState.PENDING:
            if attempt.answered_at is None and attempt.challenge_url is not None:
                await account.answer(attempt.challenge_url)
                done.answered = True
        case _:
            done.proved = True


def _is_final(error: AcmeError, account: AcmeAccount) -> bool:
    """Whether the CA has said no to this, and will again."""
    return error.permanent or (error.is_refusal and error.code != "badNonce" and not account.lost)


def _note(
    session: AsyncSession,
    server: Server,
    ca: str,
    attempts: list[RevocationOrder],
    done: _Done,
    now: datetime,
) -> None:
    for order in server.orders:
        if order.id in done.revoked:
            order.revoked_at = now
        elif order.id in done.refused:
            order.error = done.refused[order.id][:_MAX_TEXT]
    attempt = _present(attempts, ca)
    if attempt is None:
        if done.placed is not None:
            session.add(made := _placed(server, ca, done.placed, now))
            attempts.append(made)
        return
    attempt.answered_at = now if done.answered else attempt.answered_at
    if done.proved:
        attempt.proved_at = now
        server.control_proved_at = now
        _log.info("control_proved", server=server.name, ca=ca)
    if done.deactivated:
        attempt.deactivated_at = attempt.ended_at = now
    elif done.failed is not None:
        attempt.error, attempt.ended_at = done.failed[:_MAX_TEXT], now
        _log.warning("revocation_order_failed", server=server.name, ca=ca, reason=done.failed)


def _placed(server: Server, ca: str, order: PendingOrder, now: datetime) -> RevocationOrder:
    return RevocationOrder(
        server_id=server.id,
        ca=ca,
        created_at=now,
        url=order.url,
        authorization_url=order.authorization_url,
        challenge_url=order.challenge_url,
        txt=order.txt,
    )


def _end_if_over(
    settings: Settings,
    server: Server,
    attempts: Sequence[RevocationOrder],
    trouble: AcmeError | None,
    now: datetime,
) -> None:
    """All is done, or refused, or has taken too long: CAA is closed."""
    assert server.revoking_since is not None
    is_open = any(one.ended_at is None for one in attempts)
    is_left = any(_is_to_revoke(order, now) for order in server.orders)
    is_late = now >= server.revoking_since + timedelta(seconds=settings.policy.revocation_patience)
    if (is_open or is_left) and not is_late:
        return
    for attempt in attempts:
        if attempt.ended_at is None:
            attempt.ended_at = now
    server.revoking_ended_at = now
    server.authorization_deactivated_at = max(
        (one.deactivated_at for one in attempts if one.deactivated_at is not None), default=None
    )
    good = _good(server, now)
    if not good:
        server.certificate_revoked_at = max(
            (order.revoked_at for order in server.orders if order.revoked_at is not None), default=None
        )
        _log.info("own_certificates_revoked", server=server.name)
        return
    server.not_revoked = _why_not(server, good, attempts, trouble)[:_MAX_TEXT]
    _log.warning("revocation_given_up", server=server.name, reason=server.not_revoked)


def _why_not(
    server: Server, good: Sequence[Order], attempts: Sequence[RevocationOrder], trouble: AcmeError | None
) -> str:
    """What the CA has refused, or the step that did not come in time."""
    refused = next((order.error for order in good if order.error is not None), None)
    if refused is not None:
        return refused
    if all(order.chain is None for order in good):
        return _NO_COPY
    if trouble is not None:
        return f"CA: {trouble.detail}"
    failed = [one.error for one in attempts if one.error is not None]
    if failed:
        return failed[-1]
    if server.caa_turned_at is None:
        return "DNS: CAA was not seen turned to the registry's account on every nameserver"
    return "control of the name was not proved in time"
