"""When certificates are renewed: at a moment of the window that their CA suggests (RFC 9773), if it does.

The window, the moment that was drawn from it and the next look are in the row of the order that the certificate came of.
"""

from datetime import datetime, timedelta
from http import HTTPStatus
from random import SystemRandom

import structlog
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.acme import AcmeError, RenewalInfo
from nts_core.certificates import ChainError, certificate_id, moment_of, renew_by
from poolsvc import commands, issuance, onboarding, own_account, servers
from poolsvc.authorities import Accounts
from poolsvc.config import Settings
from poolsvc.db import Database
from poolsvc.errors import TooManyRequests, WrongState
from poolsvc.models import CommandKind, Order, Server
from poolsvc.servers import EventKind

_log = structlog.get_logger()
# Before a CA is asked again for renewal information that it does not have, refused, or could not give now.
_NOT_OFFERED = timedelta(days=1)
_REFUSED = timedelta(hours=6)
_FAILED = timedelta(hours=1)
_DAY = timedelta(days=1)
_random = SystemRandom()
# Certificates that one server orders by hand within a day.
BY_HAND = 1


async def order_now(
    session: AsyncSession, settings: Settings, server: Server, *, actor: str, now: datetime
) -> None:
    """Order a certificate before its time; what comes of it is an order like any other, under the same limits.

    Raises WrongState, or TooManyRequests while the CA's limits or ours are in the way.
    """
    if own_account.is_used(server):
        raise WrongState(
            f"the certificates of {server.name} are ordered by its member's own account",
            remedy="renew there",
        )
    if server.named_at is None or not issuance.needs_certificate(server):
        raise WrongState(
            f"{server.name} is {server.state}, and its name is not in DNS yet",
            remedy="prove an address; the first certificate is ordered by itself",
        )
    due_at = server.order_due_at
    if issuance.open_order(server) is not None or (due_at is not None and due_at <= now):
        raise WrongState(f"an order for {server.name} is open already", remedy="wait for what comes of it")
    free_at = onboarding.free_at(settings, server, now)
    if server.queue_round is not None and due_at is not None:
        free_at = due_at
    if free_at > now:
        raise TooManyRequests(
            f"the CA's limits leave no order for {server.name} before {free_at:%Y-%m-%d %H:%M} UTC",
            remedy="wait until then; what is due is ordered by itself",
            retry_after=free_at - now,
        )
    await commands.take(session, server, CommandKind.RENEWAL, BY_HAND, now)
    server.order_due_at = now
    servers.note(session, server, EventKind.RENEWAL_ORDERED, actor=actor, now=now)


async def ask(
    database: Database, settings: Settings, accounts: Accounts, order_id: int, now: datetime
) -> None:
    """Ask the CA when it would have a certificate renewed (RFC 9773), and plan the renewal for a moment of that window.

    What the CA does not say, or cannot say now, is left as it was: at first our own rule, `renew_at`.
    """
    async with database.transaction() as session:
        order = await issuance.load(session, order_id)
    info, wait = None, _NOT_OFFERED
    if _is_to_be_renewed(order.server, order, now):
        try:
            account = await accounts(issuance.ca_of(settings, order), now)
            info = await account.renewal_info(certificate_id(order.chain or ""))
        except AcmeError as error:
            is_refused = error.status is not None and error.status < HTTPStatus.INTERNAL_SERVER_ERROR
            wait = _REFUSED if is_refused else _FAILED
            wait = max(wait, timedelta(seconds=error.retry_after or 0))
            _log.info("renewal_not_told", order=order_id, code=error.code, detail=error.detail)
        except ChainError as error:
            _log.info("renewal_not_told", order=order_id, detail=str(error))
    async with database.transaction() as session:
        server = await servers.get(session, order.server_id)
        current = next(row for row in server.orders if row.id == order_id)
        if not _is_to_be_renewed(server, current, now):
            current.window_due_at = None
            return
        current.window_due_at = now + wait
        if info is not None:
            current.window_due_at = now + timedelta(seconds=info.retry_after)
            _plan(settings, server, current, info, now)


def _is_to_be_renewed(server: Server, order: Order, now: datetime) -> bool:
    is_newest = order is servers.newest_certificate(server)
    return (
        is_newest
        and issuance.is_revocable(order, now)
        and order.compromised_at is None
        and issuance.needs_certificate(server)
    )


def _plan(settings: Settings, server: Server, order: Order, info: RenewalInfo, now: datetime) -> None:
    """Draw the moment once for each window, and let the renewal be due then; one that is due already stays so."""
    assert order.not_before is not None
    assert order.not_after is not None
    order.window_url = info.explanation_url and info.explanation_url[:1000]
    if (order.window_start, order.window_end) != (info.start, info.end):
        drawn = moment_of(info.start, info.end, _random.random())
        order.window_start, order.window_end = info.start, info.end
        order.renew_at = min(drawn, renew_by(order.not_before, order.not_after))
        _log.info("renewal_planned", server=server.name, at=order.renew_at.isoformat(), why=order.window_url)
    is_planned = server.order_due_at is not None and server.order_due_at > now and not server.order_failures
    if is_planned and issuance.open_order(server) is None and order.renew_at is not None:
        server.order_due_at = max(order.renew_at, _soonest(settings, server, now))


def _soonest(settings: Settings, server: Server, now: datetime) -> datetime:
    """A CA that wants everything renewed at once gets that, but each time of a day later than the last."""
    today = [at for order in server.orders if (at := order.issued_at) is not None and now - at < _DAY]
    return max(today) + settings.policy.order_wait(len(today) - 1) if today else now
