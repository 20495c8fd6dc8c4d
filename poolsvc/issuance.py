"""Certificates: one order at a time for each server, moved on step by step from one table.

    WANTED -> REQUESTED -> PENDING -> ANSWERED -> FINALIZING -> ISSUED (-> authorization deactivated)
                   any step that the CA refuses for good: FAILED, and a new order after a wait

Every step names its resources by the URLs in the order's row, is safe to repeat, and is taken under a lease; a
process that dies leaves the order to the next one. No network I/O happens inside a transaction.

An order goes to the first CA, and to another one only before a CA has taken it: `_choose_ca` and `_other_ca`. With a
staging CA in the settings an order of a server without a certificate goes through REQUESTED to FINALIZING there first
and is never finalized; then it begins anew, with nothing that the staging CA gave: `_rehearse_at`, `Order.rehearsal`.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from http import HTTPStatus
from itertools import takewhile

import structlog
from sqlalchemy import ColumnElement, or_, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import selectinload

from nts_core.acme import (
    SHORT_LIVED,
    AcmeAccount,
    AcmeError,
    OrderFailed,
    OrderState,
    RevocationReason,
    poll_wait,
)
from nts_core.acme import OrderStatus as AcmeOrderStatus
from nts_core.certificates import (
    ChainError,
    CsrError,
    certificate_id,
    chain_facts,
    check_chain,
    check_csr,
    csr_key_sha256,
    renew_at,
)
from nts_core.control import HttpChallenge, IssuedCertificate, TlsChallenge, Validation
from poolsvc import onboarding, own_account, servers, troubles, validation
from poolsvc.authorities import UNKNOWN_CA, Accounts, account_uris, offers
from poolsvc.config import Settings
from poolsvc.db import Database
from poolsvc.errors import InvalidCsr, WrongState
from poolsvc.models import OPEN_ORDERS, Order, OrderStatus, Server
from poolsvc.outbound import FetchError

_log = structlog.get_logger()
_GONE = frozenset({HTTPStatus.NOT_FOUND, HTTPStatus.GONE})
# After about an hour, or seven minutes where the CA has told of a failure and keeps the challenge open, as some do.
_MAX_POLLS, _MAX_POLLS_OF_FAILED = 128, 20
# Of a step at a staging CA that is away or busy: a rehearsal holds up an order for minutes at most.
_REHEARSAL_TRIES = 4
# Rehearsals that fail in a row: a staging CA that always refuses keeps nobody from the real one.
_MOST_REHEARSALS = 2
# How long an authorization is left to a newer order, which may wait for an agent that never reports.
_LOAN = timedelta(hours=1)
# After which no CA of which we know uses an authorization again, whatever it does not tell us.
AUTHORIZATION_LIFE = timedelta(days=30)


class _NotValidated(OrderFailed):
    """The CA has looked at the member's host, and says what it found there."""


def open_order(server: Server) -> Order | None:
    """The order under way, if any."""
    return next((order for order in reversed(server.orders) if order.status in OPEN_ORDERS), None)


def want(server: Server, now: datetime) -> None:
    """Begin the order that has become due, unless one is under way."""
    server.order_due_at = None
    if own_account.is_used(server):
        # The member's own account may order from now on: there will be something to be seen.
        server.probe_due_at = server.probe_due_at or now
        return
    if needs_certificate(server) and open_order(server) is None:
        server.orders.append(Order(server_id=server.id, status=OrderStatus.WANTED, created_at=now))


def start_anew(server: Server, now: datetime) -> None:
    """An agent has joined. One that joined again has lost the keys of all orders before: order once more."""
    order = open_order(server)
    if order is not None:
        _drop(order, "the agent joined again", now)
    if server.named_at is not None:
        server.order_due_at = now


def note_agent(
    settings: Settings, server: Server, by: Validation, account_uri: str | None, now: datetime
) -> None:
    """An agent says how its host answers the CA, and who orders: what CAA lacks for that, it has before an order.

    An order under way that this spoils is dropped. Raises InvalidDocument for what is no account of a CA here.
    """
    order, reason = open_order(server), None
    if by is not server.validation:
        before, server.validation = validation.allowed(settings, server), by
        is_other_caa = validation.allowed(settings, server) != before
        if is_other_caa:
            servers.await_caa(server)
        if order is not None and order.txt is None and (is_other_caa or order.status is OrderStatus.PENDING):
            reason = f"its host answers by {by} now"
    if account_uri != server.own_account_uri:
        own_account.choose(settings, server, account_uri)
        reason = f"{'its agent' if account_uri else 'the registry'} orders from now on"
    if order is None or reason is None:
        return
    _drop(order, reason, now)
    if server.named_at is not None:
        server.order_due_at = servers.soonest_order(settings, server, now)


def _drop(order: Order, reason: str, now: datetime) -> None:
    """Give an order up; what the CA has of it is ended."""
    _give_up(order, reason)
    order.due_at = now if order.authorization_url else None


def revoke_compromised(server: Server, now: datetime) -> None:
    """Others may know the keys that the server had: its certificates are revoked, another one is ordered for a new key.

    The agent, which makes a key for each order, serves what it has until the other one is there. Raises WrongState.
    """
    lost = [order for order in server.orders if is_revocable(order, now) and order.compromised_at is None]
    if not lost:
        raise WrongState(
            f"{server.name} has no certificate of the pool's that is not revoked already",
            remedy="one that your own ACME client got is revoked by that client",
        )
    if (order := open_order(server)) is not None:
        _give_up(order, "its key may be known to others")
        order.due_at = None
        lost += [order] if order.authorization_url else []
    for order in lost:
        order.compromised_at = order.due_at = now
    server.order_due_at = now


def _give_up(order: Order, reason: str) -> None:
    """End an order for what is no CA's doing; what no CA has taken keeps no request that one could have refused."""
    order.status, order.error = OrderStatus.FAILED, reason
    order.csr = None if order.url is None else order.csr


def _refuse_own_account(server: Server, field: str, remedy: str) -> None:
    """Raise WrongState for a server whose orders are not the registry's to shape."""
    if own_account.is_used(server):
        raise WrongState(
            f"the certificates of {server.name} are ordered by its member's own account",
            remedy=remedy,
            field=field,
        )


async def set_short_lived(session: AsyncSession, settings: Settings, server: Server, *, wanted: bool) -> None:
    """Whether orders from now on ask for certificates that live for days. Raises WrongState."""
    if wanted and not server.short_lived:
        _refuse_own_account(server, "short_lived", "ask for the CA's profile of short life there")
        if not await offers(session, settings, SHORT_LIVED):
            raise WrongState(
                "no CA of this pool has certificates of short life",
                remedy="leave short_lived out; the operator decides which CAs there are",
                field="short_lived",
            )
    server.short_lived = wanted


def set_dns_01(settings: Settings, server: Server, *, wanted: bool) -> None:
    """Whether the registry answers the CA for orders from now on, in DNS. Raises WrongState."""
    if wanted and not server.dns_01:
        _refuse_own_account(
            server, "dns_01", "let its host answer; only the registry writes to the pool's zone"
        )
        if not settings.policy.dns_01:
            raise WrongState(
                "in this pool the host of each server answers the CA",
                remedy="leave dns_01 out and let the agent have port 80; the operator decides this (policy.dns_01)",
                field="dns_01",
            )
    server.dns_01 = wanted


def is_valid(order: Order, now: datetime) -> bool:
    """Whether there is a copy of a certificate that has neither ended nor been revoked."""
    if order.chain is None:
        return False
    return order.revoked_at is None and order.not_after is not None and order.not_after > now


def is_revocable(order: Order, now: datetime) -> bool:
    """Whether a certificate is ours to revoke: not one that was only seen, of a member's own account."""
    return not is_seen(order) and is_valid(order, now)


def is_seen(order: Order) -> bool:
    """Whether it stands for a certificate that the registry did not order."""
    return order.status is OrderStatus.ISSUED and order.url is None


def lapses_at(order: Order) -> datetime:
    """From when on nothing can come of an order any more, though its CA was told nothing."""
    ends = [] if order.not_after is None else [order.not_after]
    if order.authorization_url is not None and order.deactivated_at is None:
        ends.append(order.created_at + AUTHORIZATION_LIFE)
    return max(ends, default=order.created_at)


def revocation_reason(order: Order) -> RevocationReason:
    is_lost = order.compromised_at is not None
    return RevocationReason.KEY_COMPROMISE if is_lost else RevocationReason.CESSATION_OF_OPERATION


def wants_csr(server: Server, order: Order) -> bool:
    """Whether the agent is asked for a signing request; not for a server that leaves."""
    return order.status is OrderStatus.WANTED and needs_certificate(server)


def needs_certificate(server: Server) -> bool:
    """One that leaves on a later day needs no other certificate, if it has one that lasts till then.

    What a member's own account orders is none of this.
    """
    if own_account.is_used(server):
        return False
    if servers.may_stay(server) and server.leave_at is not None:
        ends = {order: order.not_after for order in server.orders if order.not_after is not None}
        lasts = any(end >= server.leave_at and order.compromised_at is None for order, end in ends.items())
        return bool(ends) and not lasts
    return server.state in servers.NAMED_STATES


async def take_csr(
    session: AsyncSession, settings: Settings, server: Server, order_id: int, pem: str, now: datetime
) -> None:
    """The agent's answer to a WANTED order, for a key of its own. Raises InvalidCsr; repeating it changes nothing."""
    order = next((order for order in server.orders if order.id == order_id), None)
    if order is None or not wants_csr(server, order):
        return
    try:
        check_csr(pem, settings.domain_of(server.name))
    except CsrError as error:
        raise InvalidCsr(str(error), remedy="let pool-agent make the request", field="csr") from None
    key = csr_key_sha256(pem)
    if await session.scalar(select(Order.id).where(Order.key_sha256 == key)) is not None:
        raise InvalidCsr(
            "the key was in an order before",
            remedy="make another key for each order, as pool-agent does",
            field="csr",
        )
    order.csr, order.key_sha256 = pem, key
    order.status, order.due_at = OrderStatus.REQUESTED, now
    staging = await _rehearse_at(session, settings, server, now)
    order.rehearsal = staging is not None
    order.ca, order.ca_since = staging or _choose_ca(settings, server, now), now


def ca_of(settings: Settings, order: Order) -> str:
    """The name of an order's CA."""
    return order.ca or settings.ca.name


def is_out_of_reach(settings: Settings, order: Order) -> bool:
    """Whether its CA was taken out of the settings: nothing of it can be ended or revoked."""
    return ca_of(settings, order) not in (ca.name for ca in settings.ca.with_rehearsal)


def _is_of_first(settings: Settings, order: Order) -> bool:
    """Whether an order is at the CA whose limits the queue is for."""
    return ca_of(settings, order) == settings.ca.name


async def _rehearse_at(
    session: AsyncSession, settings: Settings, server: Server, now: datetime
) -> str | None:
    """The CA at which a new order is tried first: the first one of a server, or one after a failure.

    None while a certificate is valid, which must not end for a staging CA's sake; and while there is no account, which
    CAA would have to name.
    """
    rehearsal, served = settings.ca.rehearsal, servers.newest_certificate(server)
    if rehearsal is None or (served is not None and (server.order_failures == 0 or is_valid(served, now))):
        return None
    if rehearsal.name not in await account_uris(session):
        reason = "no account there"
    elif _failed_rehearsals(server) >= _MOST_REHEARSALS:
        reason = f"it has failed {_MOST_REHEARSALS} times"
    else:
        return rehearsal.name
    _log.warning("order_not_rehearsed", server=server.name, ca=rehearsal.name, reason=reason)
    return None


def _failed_rehearsals(server: Server) -> int:
    """How many there were since the last order at a real CA. What no CA was to see has no request."""
    ended = (
        order
        for order in reversed(server.orders)
        if order.csr is not None and order.status not in OPEN_ORDERS
    )
    return sum(1 for _ in takewhile(lambda order: order.rehearsal, ended))


def shares_of(settings: Settings) -> Iterator[tuple[str, ColumnElement[bool]]]:
    """Each CA, with the condition on its orders; what no CA of the settings has is the first one's to look at."""
    others = [ca.name for ca in settings.ca.with_rehearsal if ca.name != settings.ca.name]
    yield settings.ca.name, or_(Order.ca.is_(None), Order.ca.not_in(others))
    yield from ((name, Order.ca == name) for name in others)


def _choose_ca(settings: Settings, server: Server, now: datetime) -> str:
    """The first CA that has not let orders of this server fail for longer than the pool's patience.

    What it found at the member's host is not its doing: such an order has kept its token.
    """
    names = [ca.name for ca in settings.ca.all]
    failing_since: dict[str, datetime] = {}
    for order in reversed(server.orders if server.order_failures else []):
        if order.status is OrderStatus.ISSUED:
            break
        is_failed = order.status is OrderStatus.FAILED and order.csr is not None
        if is_failed and order.token is None:
            failing_since[ca_of(settings, order)] = order.created_at
    patience = timedelta(seconds=settings.policy.ca_patience)
    return next((name for name in names if now - failing_since.get(name, now) < patience), names[0])


def _other_ca(settings: Settings, order: Order, server: Server, again: datetime, now: datetime) -> str | None:
    """Which CA gets an order that its own does not take before `again`; None: that is soon enough.

    In time: within the pool's patience, and before the certificate ends. What a CA has taken stays there.
    """
    names, present = [ca.name for ca in settings.ca.all], ca_of(settings, order)
    if order.status is not OrderStatus.REQUESTED or present not in names or len(names) == 1:
        return None
    following = names.index(present) + 1
    served = servers.newest_certificate(server)
    ends = None if served is None else served.not_after
    since, patience = order.ca_since or order.created_at, timedelta(seconds=settings.policy.ca_patience)
    is_too_late = again - since >= patience or (ends is not None and again >= ends)
    if is_too_late and following < len(names):
        return names[following]
    return names[following % len(names)] if now - since >= patience else None


def note_serving(server: Server, serving: tuple[str, ...], now: datetime) -> None:
    """The agent says which challenges it answers; the precheck finds out whether that is so."""
    order = open_order(server)
    if order is None or order.status is not OrderStatus.PENDING or order.served_at is not None:
        return
    if validation.is_served(order, serving):
        order.served_at = order.due_at = now


def challenges(server: Server) -> tuple[HttpChallenge, ...]:
    """What the agent has to serve over HTTP now."""
    return validation.http_challenges(open_order(server))


def tls_challenges(server: Server) -> tuple[TlsChallenge, ...]:
    """And by TLS."""
    return validation.tls_challenges(open_order(server))


def newest(server: Server) -> IssuedCertificate | None:
    """The certificate that the agent has to install; none for a key of an agent before it, nor before its own account's."""
    if own_account.is_used(server):
        return None
    for order in reversed(server.orders):
        if server.joined_at is None or order.created_at < server.joined_at or is_seen(order):
            return None
        if order.status is OrderStatus.ISSUED and order.chain and order.fingerprint:
            return IssuedCertificate(order.id, order.chain, order.fingerprint)
    return None


async def advance(
    database: Database, settings: Settings, accounts: Accounts, order_id: int, now: datetime
) -> None:
    """Take the next step of an order and record it, or record why it could not be taken."""
    async with database.transaction() as session:
        order = await load(session, order_id)
        server = order.server
        if _is_of_first(settings, order) and await _is_held_back(session, settings, order, now):
            return
    steps = _REHEARSAL_STEPS if order.rehearsal else _STEPS
    step = steps.get(order.status)
    if step is None:
        return
    account: AcmeAccount | None = None
    try:
        account = await accounts(ca_of(settings, order), now)
        change = await step(settings, account, order, server, now)
    except AcmeError as error:
        change = _refused(settings, order, server, account, error, now)
        await _note_refusal(database, settings, order, error, now)
    except (OrderFailed, CsrError, ChainError) as error:
        change = _failed(order, str(error), is_of_member=isinstance(error, _NotValidated))
    except FetchError as error:
        change = _wait(order, f"precheck: {error}", now + settings.policy.step_wait(0))
    async with database.transaction() as session:
        server = await servers.get(session, order.server_id)
        current = next(row for row in server.orders if row.id == order_id)
        if (current.status, current.ca) != (order.status, order.ca):
            return
        change(current, now)
        if current.status is OrderStatus.FAILED:
            if _schedule_retry(settings, server, current, now) and server.order_failures == 1:
                await troubles.tell_order(session, server, current, now)
        elif order.status is OrderStatus.FINALIZING and current.status is OrderStatus.ISSUED:
            _note_issue(settings, server, current, now)


def _note_issue(settings: Settings, server: Server, order: Order, now: datetime) -> None:
    """What follows from a new certificate."""
    assert order.not_before is not None
    assert order.not_after is not None
    server.order_failures = 0
    server.counted_at = server.counted_at or now
    # Never at once again, whatever times a CA writes into its certificates.
    soonest = now + settings.policy.order_wait(0)
    server.order_due_at = max(renew_at(order.not_before, order.not_after), soonest)
    order.window_due_at = now
    server.probe_due_at = server.probe_due_at or now
    troubles.watch_end(order)


async def load(session: AsyncSession, order_id: int) -> Order:
    """An order to look at, with its server, and that one's addresses and other orders."""
    return (
        await session.scalars(
            select(Order)
            .where(Order.id == order_id)
            .options(
                selectinload(Order.server).selectinload(Server.addresses),
                selectinload(Order.server).selectinload(Server.orders),
            )
        )
    ).one()


# What a step does to its order once the network has answered; applied inside a transaction.
Change = Callable[[Order, datetime], None]
Step = Callable[[Settings, AcmeAccount, Order, Server, datetime], Awaitable[Change]]


async def _request(
    settings: Settings, account: AcmeAccount, order: Order, server: Server, _now: datetime
) -> Change:
    assert order.csr is not None
    by = server.validation
    pending = await account.order(
        order.csr,
        settings.domain_of(server.name),
        challenge=validation.challenge_for(settings, server),
        short_lived=server.short_lived,
        replaces=_replaced(server, account.uri),
    )

    def change(row: Order, now: datetime) -> None:
        row.ca, row.account_uri, row.profile = ca_of(settings, row), account.uri, pending.profile
        row.url, row.authorization_url = pending.url, pending.authorization_url
        row.challenge_url, row.token = pending.challenge_url, pending.token
        row.key_authorization, row.txt, row.validation = pending.key_authorization, pending.txt, by
        row.attempts, row.error = 0, None
        # Without a challenge the CA still trusts an earlier validation. With one, the agent's report of
        # serving it wakes the order up, or the publication that has seen it on every nameserver. What the member's
        # web server redirects, the registry serves from now on.
        row.status = OrderStatus.PENDING if pending.token else OrderStatus.ANSWERED
        if pending.key_authorization is not None and by is Validation.REDIRECT:
            row.served_at = now
        row.due_at = now if row.served_at is not None or not pending.token else None
        _log.info("order_placed", order=row.id, ca=row.ca, profile=pending.profile, replaces=pending.replaces)

    return change


def _replaced(server: Server, account_uri: str) -> str | None:
    """The certificate before, by its identifier, if this account got it; a CA takes its successor beyond its limits.

    Also one whose key is known to others: it is the predecessor all the same, and its successor is urgent.
    """
    served = servers.newest_certificate(server)
    if served is None or served.chain is None or served.account_uri != account_uri:
        return None
    with suppress(ChainError):
        return certificate_id(served.chain)
    return None


async def _answer(
    settings: Settings, account: AcmeAccount, order: Order, server: Server, _now: datetime
) -> Change:
    """The precheck from here on every published address, then the CA is told to look.

    What is in DNS the nameservers have shown already.
    """
    assert order.challenge_url is not None
    if order.txt is None:
        await validation.look(settings, order, server)
    await account.answer(order.challenge_url)
    return _move(OrderStatus.ANSWERED)


async def _await_validation(
    _settings: Settings, account: AcmeAccount, order: Order, _server: Server, now: datetime
) -> Change:
    assert order.url is not None
    assert order.csr is not None
    found = await account.poll(order.url)
    match found.status:
        case OrderState.PENDING:
            return _poll_again(order, found, now)
        case OrderState.INVALID:
            raise _verdict(order, found, "the CA declared the order invalid")
        case OrderState.READY:
            await account.finalize(order.url, order.csr)
    return _move(OrderStatus.FINALIZING)


async def _collect(
    settings: Settings, account: AcmeAccount, order: Order, server: Server, now: datetime
) -> Change:
    assert order.url is not None
    assert order.csr is not None
    found = await account.poll(order.url)
    if found.status is OrderState.INVALID:
        raise OrderFailed(found.error_detail or "the CA declared the order invalid")
    if found.status is not OrderState.VALID:
        return _poll_again(order, found, now)
    chain = await account.download(order.url)
    check_chain(chain, order.csr, settings.domain_of(server.name))

    def change(row: Order, now: datetime) -> None:
        row.status, row.issued_at, row.due_at = OrderStatus.ISSUED, now, now
        keep_chain(row, chain)
        row.attempts, row.error = 0, None
        _log.info("certificate_issued", server=server.name, serial=row.serial)

    return change


async def _await_rehearsal(
    settings: Settings, account: AcmeAccount, order: Order, server: Server, now: datetime
) -> Change:
    """As far as an order comes without a certificate."""
    assert order.url is not None
    found = await account.poll(order.url)
    if found.status is OrderState.INVALID:
        raise OrderFailed(found.error_detail or "the CA declared the order invalid")
    if found.status in (OrderState.READY, OrderState.VALID):
        return _move(OrderStatus.FINALIZING)
    asked = timedelta(seconds=found.retry_after or 0)
    if order.attempts < _MAX_POLLS_OF_FAILED and asked < _patience_of_rehearsal(settings):
        return _poll_again(order, found, now)
    if found.error_detail is not None:
        raise OrderFailed(found.error_detail)
    return _give_up_rehearsal(settings, order, server, f"the CA left the order {found.status}", now)


async def _end_rehearsal(
    settings: Settings, account: AcmeAccount, order: Order, server: Server, now: datetime
) -> Change:
    """A step of its own, as an order whose authorization has ended looks like one that was refused."""
    if order.authorization_url is not None:
        await account.deactivate_authorization(order.authorization_url)
    _log.info("order_rehearsed", order=order.id, ca=order.ca)
    return _begin_at(_choose_ca(settings, server, now))


def _begin_at(ca: str) -> Change:
    """The rehearsal is over, and the order begins."""

    def change(row: Order, now: datetime) -> None:
        row.ca, row.ca_since, row.rehearsal = ca, now, False
        row.status, row.due_at = OrderStatus.REQUESTED, now
        row.account_uri = row.profile = row.url = row.authorization_url = None
        row.challenge_url = row.token = row.key_authorization = row.txt = row.served_at = None
        row.attempts, row.error = 0, None

    return change


def _patience_of_rehearsal(settings: Settings) -> timedelta:
    """A step that has to wait for longer is not waited for; as many waits as there are tries come before that."""
    return settings.policy.step_wait(_REHEARSAL_TRIES)


def _give_up_rehearsal(
    settings: Settings, order: Order, server: Server, reason: str, now: datetime
) -> Change:
    """What the staging CA does not do has to be done without it; an authorization there ends by itself."""
    if order.status is OrderStatus.FAILED:
        return _failed(order, reason)
    _log.warning("rehearsal_given_up", order=order.id, ca=order.ca, step=order.status, reason=reason)
    return _begin_at(_choose_ca(settings, server, now))


async def settle(account: AcmeAccount, order: Order) -> str | None:
    """End an order's authorization; then an order under way can only have become a certificate already.

    Returns the chain of such a certificate, which nobody asked for any more and which has to be revoked one
    day. Raises AcmeError, also while the CA still works on the order.
    """
    if order.authorization_url is not None:
        await account.deactivate_authorization(order.authorization_url)
    if order.url is None or order.chain is not None or order.rehearsal:
        return None
    try:
        status = (await account.poll(order.url)).status
    except AcmeError as error:
        if error.status in _GONE and not account.lost:
            return None
        raise
    if status is OrderState.PROCESSING:
        raise AcmeError("orderNotReady", "the CA is still working on an order")
    return await account.download(order.url) if status is OrderState.VALID else None


def keep_chain(order: Order, chain: str) -> None:
    """Note a certificate with what is needed to recognise, renew and revoke it."""
    facts = chain_facts(chain)
    order.chain, order.fingerprint, order.serial = chain, facts.fingerprint, facts.serial
    order.not_before, order.not_after = facts.not_before, facts.not_after


async def _wind_up(
    settings: Settings, account: AcmeAccount, order: Order, server: Server, now: datetime
) -> Change:
    """A cached authorization would let a removed name be renewed: it ends with the order it was made for.

    A certificate whose key is known to others ends as well, and that at once.
    """
    if order.compromised_at is None and _is_lent(settings, order, server, now):
        return _wait(order, None, now + settings.policy.step_wait(order.attempts))
    late_chain = await settle(account, order)
    chain = late_chain or (order.chain if is_revocable(order, now) else None)
    revoked = False
    if order.compromised_at is not None and chain is not None:
        await account.revoke(chain, revocation_reason(order))
        revoked = True

    def change(row: Order, now: datetime) -> None:
        if late_chain is not None:
            keep_chain(row, late_chain)
        row.deactivated_at = row.deactivated_at or now
        row.revoked_at = now if revoked else row.revoked_at
        # Somebody may have said meanwhile that the key is lost.
        row.due_at = now if row.compromised_at is not None and is_revocable(row, now) else None
        row.attempts = 0
        _tell(row, None)

    return change


def _is_lent(settings: Settings, order: Order, server: Server, now: datetime) -> bool:
    """Whether a newer order at the same CA is on its way: it may rest on this one's authorization, and would fail."""
    newest, ca = server.orders[-1], ca_of(settings, order)
    is_under_way = newest.status in OPEN_ORDERS and newest.status is not OrderStatus.WANTED
    is_soon_over = now - (newest.ca_since or newest.created_at) < _LOAN
    return newest.id != order.id and is_under_way and is_soon_over and ca_of(settings, newest) == ca


_STEPS: dict[OrderStatus, Step] = {
    OrderStatus.REQUESTED: _request,
    OrderStatus.PENDING: _answer,
    OrderStatus.ANSWERED: _await_validation,
    OrderStatus.FINALIZING: _collect,
    OrderStatus.ISSUED: _wind_up,
    OrderStatus.FAILED: _wind_up,
}
_REHEARSAL_STEPS: dict[OrderStatus, Step] = _STEPS | {
    OrderStatus.ANSWERED: _await_rehearsal,
    OrderStatus.FINALIZING: _end_rehearsal,
}


def _move(status: OrderStatus) -> Change:
    def change(row: Order, now: datetime) -> None:
        row.status, row.due_at = status, now + poll_wait(0)
        row.attempts, row.error = 0, None

    return change


def _wait(order: Order, error: str | None, until: datetime) -> Change:
    attempts = order.attempts + 1

    def change(row: Order, _now: datetime) -> None:
        row.attempts, row.due_at = attempts, until
        _tell(row, error)

    return change


def _tell(row: Order, error: str | None) -> None:
    """Let people know how it goes. What an order failed for is not hidden by how its cleaning goes."""
    if row.status is not OrderStatus.FAILED or row.error is None:
        row.error = error and error[:1000]


def _poll_again(order: Order, found: AcmeOrderStatus, now: datetime) -> Change:
    """Ask later what became of it. Raises OrderFailed for an order that the CA leaves undecided."""
    detail = found.error_detail
    if order.attempts >= (_MAX_POLLS if detail is None else _MAX_POLLS_OF_FAILED):
        raise _verdict(order, found, f"the CA left the order {found.status}, asked {order.attempts} times")
    return _wait(
        order, detail, now + max(poll_wait(order.attempts), timedelta(seconds=found.retry_after or 0))
    )


def _verdict(order: Order, found: AcmeOrderStatus, otherwise: str) -> OrderFailed:
    """Why an order is over, in the CA's words if there are any."""
    if order.status is OrderStatus.ANSWERED and found.error_detail is not None:
        return _NotValidated(found.error_detail)
    return OrderFailed(found.error_detail or otherwise)


async def _note_refusal(
    database: Database, settings: Settings, order: Order, error: AcmeError, now: datetime
) -> None:
    if _is_of_first(settings, order):
        until = _again_at(settings, order, error, now)
        await onboarding.note_refusal(database, order.server, error, now, until)


def _refused(
    settings: Settings,
    order: Order,
    server: Server,
    account: AcmeAccount | None,
    error: AcmeError,
    now: datetime,
) -> Change:
    """What follows when the CA does not take a step."""
    if _is_over(error, order, account, now):
        is_lost = order.rehearsal and (not error.permanent or error.code == UNKNOWN_CA)
        if is_lost:
            # Staging CAs forget, and are taken out of the settings.
            return _give_up_rehearsal(settings, order, server, error.detail, now)
        return _failed(order, error.detail)
    return _try_later(settings, order, server, error, now)


def _is_over(error: AcmeError, order: Order, account: AcmeAccount | None, now: datetime) -> bool:
    """Whether no repetition helps. An order that the CA knows no more has expired, or the CA has lost its data.

    A CA that the settings name no more may be named again: as long as it matters, what is due there is not forgotten.
    """
    if error.code == UNKNOWN_CA and order.status not in OPEN_ORDERS:
        return lapses_at(order) <= now
    is_gone = error.status in _GONE and account is not None and not account.lost
    return error.permanent or is_gone


def _again_at(settings: Settings, order: Order, error: AcmeError, now: datetime) -> datetime:
    """When a step is tried again that the CA could not, or would not, take."""
    return now + max(settings.policy.step_wait(order.attempts), timedelta(seconds=error.retry_after or 0))


def _try_later(settings: Settings, order: Order, server: Server, error: AcmeError, now: datetime) -> Change:
    """The CA is away or busy: the same step again later, and the order stays, unless another CA gets it."""
    again = _again_at(settings, order, error, now)
    if order.rehearsal and again - now >= _patience_of_rehearsal(settings):
        return _give_up_rehearsal(settings, order, server, error.detail, now)
    asked = now + timedelta(seconds=error.retry_after or 0)
    if (other := _other_ca(settings, order, server, asked, now)) is not None:
        return _turn_to(other, error.detail)
    _log.warning("ca_step_failed", order=order.id, step=order.status, code=error.code)
    return _wait(order, f"CA: {error.detail}", again)


async def _is_held_back(session: AsyncSession, settings: Settings, order: Order, now: datetime) -> bool:
    """Whether the CA has refused another server's order by a 429; then this one waits, or turns to another CA."""
    refusal = await onboarding.refusal_for(session, order.server, order, now)
    if refusal is None:
        return False
    # The CA's words may name somebody else's server.
    reason = f"the CA takes no order for a new name before {refusal.until:%Y-%m-%d %H:%M} UTC"
    if (other := _other_ca(settings, order, order.server, refusal.until, now)) is not None:
        _turn_to(other, reason)(order, now)
    else:
        order.error, order.due_at = reason, refusal.until
    return True


def _turn_to(ca: str, reason: str) -> Change:
    """Another CA gets the order, from the beginning."""

    def change(row: Order, now: datetime) -> None:
        _log.warning("order_turns_to_other_ca", order=row.id, ca=ca, reason=reason)
        row.ca, row.ca_since, row.due_at = ca, now, now
        row.rehearsal = False
        row.attempts, row.error = 0, f"the CA before: {reason}"[:1000]

    return change


def _failed(order: Order, reason: str, *, is_of_member: bool = False) -> Change:
    """The order is over; it keeps its token if the CA looked for that in vain.

    A failure while cleaning up after one only ends the cleaning.
    """
    is_over = order.status in (OrderStatus.ISSUED, OrderStatus.FAILED)
    if order.rehearsal:
        reason = f"rehearsal: {reason}"

    def change(row: Order, now: datetime) -> None:
        _tell(row, reason)
        row.due_at = None if is_over or row.authorization_url is None else now
        if not is_over:
            row.status = OrderStatus.FAILED
            row.token = row.token if is_of_member else None
            _log.warning("order_failed", order=row.id, reason=reason)

    return change


def _schedule_retry(settings: Settings, server: Server, order: Order, now: datetime) -> bool:
    """A new order after 1, 10, 100 minutes, then daily (what Let's Encrypt asks of clients); False: not now."""
    if server.order_due_at is not None or order.deactivated_at is not None or server.orders[-1] is not order:
        return False
    server.order_due_at = now + settings.policy.order_wait(server.order_failures)
    server.order_failures += 1
    return True
