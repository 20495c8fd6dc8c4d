"""Taking a server out for good: the CA's side of it, and the receipt. DNS's side is `poolsvc.publication`.

The four steps do not wait for each other where they need not: a dead DNS server delays no revocation, and a
dead CA delays no withdrawal. REMOVED is reached when each step has its time. What a member's own account has ordered
`poolsvc.revocation` revokes if the CA lets it.
"""

import asyncio
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import structlog
from sqlalchemy import Select, and_, or_, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from nts_core.acme import AcmeError
from nts_core.control import ServerState
from poolsvc import issuance, journal, own_account, revocation, servers
from poolsvc.authorities import Accounts
from poolsvc.config import Settings
from poolsvc.db import Database
from poolsvc.models import ENDED_STATES, Hold, HoldKind, Notice, Order, OrderStatus, Server
from poolsvc.notices import NoticeKind
from poolsvc.pool import the_pool
from poolsvc.servers import EventKind

_log = structlog.get_logger()
# For the steps at one CA; what is left is done in the next pass.
_CA_DEADLINE = 30.0
# For so long a CA may believe the CAA that it saw when control of a name was proved (Baseline Requirements 3.2.2.8).
_CAA_LIFE = timedelta(hours=8)


@dataclass(frozen=True, slots=True)
class Receipt:
    """When each step of a removal was done; None while it is outstanding.

    Where the member's own account has ordered: CAA is turned to the registry's accounts, which prove control of the name and
    revoke. None also for what was given up; `not_revoked` says why.
    """

    srv_withdrawn_at: datetime | None
    name_broken_at: datetime | None
    caa_turned_at: datetime | None
    control_proved_at: datetime | None
    authorization_deactivated_at: datetime | None
    certificate_revoked_at: datetime | None
    caa_closed_at: datetime | None
    removed_at: datetime | None
    last_certificate_ends_at: datetime | None
    outstanding: tuple[str, ...]
    error: str | None
    not_revoked: str | None
    exposure: str


def receipt(server: Server, settings: Settings) -> Receipt | None:
    """The receipt of a server that leaves or has left; None for any other."""
    if server.state not in ENDED_STATES:
        return None
    ends = max((order.not_after for order in server.orders if order.not_after), default=None)
    return Receipt(
        srv_withdrawn_at=server.srv_withdrawn_at,
        name_broken_at=server.name_broken_at,
        caa_turned_at=server.caa_turned_at,
        control_proved_at=server.control_proved_at,
        authorization_deactivated_at=server.authorization_deactivated_at,
        certificate_revoked_at=server.certificate_revoked_at,
        caa_closed_at=server.name_broken_at if server.revoking_since is None else server.caa_closed_at,
        removed_at=server.state_since if server.state is ServerState.REMOVED else None,
        last_certificate_ends_at=ends,
        outstanding=_outstanding(server),
        error=server.removal_error,
        not_revoked=server.not_revoked,
        exposure=_exposure(server, settings, ends),
    )


def _outstanding(server: Server) -> tuple[str, ...]:
    """The steps that are not done."""
    what = "addresses and CAA" if server.revoking_since is None else "addresses"
    name = f"{what}: not seen removed on every nameserver"
    if server.leave_at is not None and server.srv_withdrawn_at is not None:
        name = f"addresses: they stay until {server.leave_at.isoformat()}, for clients that have the SRV"
    steps = [
        (server.srv_withdrawn_at, "SRV: not seen withdrawn on every nameserver"),
        (server.name_broken_at, name),
    ]
    if not server.agentless:
        steps += [
            (server.authorization_deactivated_at, "authorization: not ended at the CA"),
        ]
    if not server.agentless and server.revoking_since is None and server.not_revoked is None:
        steps += [(server.certificate_revoked_at, "certificate: not revoked by the CA")]
    elif revocation.is_under_way(server):
        steps += [
            (server.caa_turned_at, "CAA: not seen turned to the registry's account on every nameserver"),
            (server.control_proved_at, "control of the name: not proved to the CA"),
            (None, "certificate: its member's own, not revoked by the CA"),
        ]
    elif server.revoking_since is not None:
        steps += [(server.caa_closed_at, "CAA: not seen closed on every nameserver")]
        if server.control_proved_at is not None and server.state is ServerState.LEAVING:
            proof = "authorization: by which control of the name was proved, not ended at the CA"
            steps += [(server.authorization_deactivated_at, proof)]
    return tuple(words for done_at, words in steps if done_at is None)


def _for_notice(made: Receipt | None, now: datetime) -> dict[str, Any]:
    """A receipt as the data of the notice that closes the removal."""
    assert made is not None
    return {
        name: value.isoformat() if isinstance(value, datetime) else value
        for name, value in asdict(replace(made, removed_at=now)).items()
    }


def _exposure(server: Server, settings: Settings, ends: datetime | None) -> str:
    cached = max(settings.dns.srv_ttl, settings.dns.address_ttl)
    text = f"resolvers may know the name for {cached} s after it was broken"
    is_own = own_account.is_used(server) or server.revoking_since is not None
    if is_own or server.not_revoked is not None:
        return text + _own_exposure(server, ends)
    if ends is not None:
        text += f"; a client that never looks at DNS or revocation may use its keys until {ends.isoformat()}"
    return text


def _own_exposure(server: Server, ends: datetime | None) -> str:
    """Of certificates that the member's own account ordered, the registry knows what its probes have seen."""
    text = ""
    if ends is not None:
        what = (
            "a client that never looks at DNS or revocation may use the keys of certificates that probes saw"
        )
        text += f"; {what} until {ends.isoformat()}"
    if server.certificate_revoked_at is None:
        until = f", and stays valid until {ends.isoformat()}" if ends is not None else ""
        text += f"; its certificate is the member's own: it was not revoked{until}; CAA lets no CA renew it"
    hours = _CAA_LIFE // timedelta(hours=1)
    return (
        f"{text}; a certificate that no probe saw is not revoked: one that was never served, or that the member's account "
        f"finalized up to {hours} hours after the removal began, with a proof from before it"
    )


async def advance(
    database: Database, settings: Settings, accounts: Accounts, server_id: int, now: datetime
) -> None:
    """Take the CAs' steps of a removal that are left, and close the removal when nothing is.

    What nobody foresaw at one CA is raised once all others' steps are recorded.
    """
    async with database.transaction() as session:
        server = await servers.get(session, server_id)
        if server.state is not ServerState.LEAVING:
            return
        if not _is_time(settings, server, now):
            return
        # A zone that nobody writes shows no CA anything.
        is_frozen = (await the_pool(session, settings)).frozen_at is not None
        if not is_frozen:
            revocation.begin(server, now)
        claimed = server.removal_due_at
    done = await _ca_steps(settings, accounts, server, now)
    due_at, outcome = now + timedelta(seconds=settings.policy.step_retry), None
    if server.revoking_since is not None and not is_frozen:
        outcome = await revocation.advance(database, settings, accounts, server_id, now, _CA_DEADLINE)
    if outcome is not None:
        due_at = outcome.due_at
        done.failures += outcome.failures
        if outcome.trouble is not None:
            done.error = f"CA: {outcome.trouble.detail}"[:1000]
    async with database.transaction() as session:
        server = await servers.get(session, server_id)
        await revocation.load_orders(session, server)
        _note_ca_steps(server, done, now)
        server.removal_error = done.error
        # Somebody may have hurried it meanwhile; a lease that was renewed is later, and ends here.
        if claimed is None or server.removal_due_at is None or server.removal_due_at >= claimed:
            server.removal_due_at = due_at
        if _is_complete(server, now):
            await _close(session, settings, server, now)
    if done.failures:
        raise BaseExceptionGroup("steps at CAs failed", done.failures)


def _is_time(settings: Settings, server: Server, now: datetime) -> bool:
    """Whether the CA is to be told; until then `removal_due_at` says when to look again."""
    if servers.may_stay(server) and server.leave_at is not None:
        if now < server.leave_at:
            server.removal_due_at = server.leave_at
            return False
        servers.begin_removal(server, now)
    _let_name_live(server, settings, now)
    if server.leave_at is not None and now < server.state_since + settings.leaving_grace:
        # Its certificate serves the clients that still come.
        server.removal_due_at = min(server.leave_at, now + timedelta(seconds=settings.policy.step_retry))
        return False
    return True


async def _close(session: AsyncSession, settings: Settings, server: Server, now: datetime) -> None:
    """REMOVED, and its people are told."""
    server.removal_error = server.removal_error or _unrevoked(settings, server)
    if server.journal_due_at is not None:
        # Or a copy of before, restored, would know nothing of what people were told is done.
        journal.write(settings, [server])
    server.removal_due_at = None
    if server.burnt_at is None:
        server.released_at = now  # nobody can have seen the name
    await servers.apply(
        session,
        server,
        EventKind.CLOSED,
        actor="worker",
        reason=server.leave_reason or "every step is done",
        now=now,
        receipt=_for_notice(receipt(server, settings), now),
    )
    _log.info("server_removed", server=server.name)


def _let_name_live(server: Server, settings: Settings, now: datetime) -> None:
    """Until when the addresses of a server that leaves in order stay; in an emergency `leave_at` is empty already."""
    if server.leave_at is None:
        return
    if server.srv_withdrawn_at is None:
        # At the earliest. The same at each look: it is in the audit log, and DNS may be away for a day.
        server.leave_at = max(server.leave_at, server.state_since + settings.leaving_grace)
        return
    server.leave_at = server.srv_withdrawn_at + settings.leaving_grace
    if server.name_broken_at is not None or server.leave_at <= now:
        server.leave_at = None


def _note_ca_steps(server: Server, done: "_Done", now: datetime) -> None:
    for order in server.orders:
        _note(server, order, done, now)
    if server.agentless:
        return
    ended = [order.deactivated_at for order in server.orders if _has_authorization(order)]
    if None not in ended:
        # Each order's authorization ends with its issue already: the receipt tells when the last one did.
        known = filter(None, [server.authorization_deactivated_at, *ended])
        server.authorization_deactivated_at = max(known, default=now)
    is_own = server.revoking_since is not None or server.not_revoked is not None
    if not is_own and not any(issuance.is_revocable(order, now) for order in server.orders):
        server.certificate_revoked_at = server.certificate_revoked_at or now


def _unrevoked(settings: Settings, server: Server) -> str | None:
    """What a removal had to wait for, since no CA could be told; it waits for no certificate of its member's own."""
    if server.agentless:
        return None
    ends = [
        order.not_after
        for order in server.orders
        if order.not_after is not None
        and order.revoked_at is None
        and not issuance.is_seen(order)
        and issuance.is_out_of_reach(settings, order)
    ]
    end = max(ends, default=server.state_since)
    if end <= server.state_since:
        return None
    return f"not revoked: its CA is named no more in the settings; ended at {end.isoformat()}"


def _is_complete(server: Server, now: datetime) -> bool:
    steps = [server.srv_withdrawn_at, server.name_broken_at]
    if not server.agentless:
        steps.append(server.authorization_deactivated_at)
    if server.revoking_since is not None:
        # Whether it was done or given up, as the receipt says.
        steps += [server.revoking_ended_at, server.caa_closed_at]
    is_ours_left = any(issuance.is_revocable(order, now) for order in server.orders)
    return None not in steps and not is_ours_left and not revocation.is_any_left(server)


@dataclass(slots=True)
class _Done:
    """What the CA did in one pass, by order id."""

    settled: dict[int, datetime] = field(default_factory=dict)  # and since when
    revoked: set[int] = field(default_factory=set)
    late_chains: dict[int, str] = field(default_factory=dict)
    error: str | None = None
    failures: list[BaseException] = field(default_factory=list)  # of ours


async def _ca_steps(settings: Settings, accounts: Accounts, server: Server, now: datetime) -> _Done:
    """Each order's steps at its own CA; one that is away holds up no other."""
    done, by_ca = _Done(), dict[str, list[Order]]()
    for order in server.orders:
        if _has_lapsed(settings, order, now):
            done.settled[order.id] = issuance.lapses_at(order)
        elif _is_unsettled(order) or issuance.is_revocable(order, now):
            by_ca.setdefault(issuance.ca_of(settings, order), []).append(order)
    steps = (_steps_at(accounts, ca, orders, done, now) for ca, orders in by_ca.items())
    for outcome in await asyncio.gather(*steps, return_exceptions=True):
        if isinstance(outcome, Exception):
            done.failures.append(outcome)
    return done


async def _steps_at(accounts: Accounts, ca: str, orders: list[Order], done: _Done, now: datetime) -> None:
    try:
        async with asyncio.timeout(_CA_DEADLINE):
            await _settle_and_revoke(accounts, ca, orders, done, now)
    except TimeoutError:
        done.error = f"CA: {ca} does not answer"


async def _settle_and_revoke(
    accounts: Accounts, ca: str, orders: list[Order], done: _Done, now: datetime
) -> None:
    for order in orders:
        try:
            account = await accounts(ca, now)
            if _is_unsettled(order):
                late = await issuance.settle(account, order)
                done.settled[order.id] = now
                if late is not None:
                    done.late_chains[order.id] = late
            chain = done.late_chains.get(order.id) or (
                order.chain if issuance.is_revocable(order, now) else None
            )
            if chain is not None:
                await account.revoke(chain, issuance.revocation_reason(order))
                done.revoked.add(order.id)
        except AcmeError as failure:
            done.error = f"CA: {failure.detail}"[:1000]


def _has_authorization(order: Order) -> bool:
    """Of a rehearsal none counts: it gives certificates that nobody trusts, and a removal does not wait for its end."""
    return order.authorization_url is not None and not order.rehearsal


def _is_unsettled(order: Order) -> bool:
    return _has_authorization(order) and order.deactivated_at is None


def _has_lapsed(settings: Settings, order: Order, now: datetime) -> bool:
    """Whether a CA that cannot be told need not be told any more."""
    is_left = issuance.is_out_of_reach(settings, order) and _is_unsettled(order)
    return is_left and issuance.lapses_at(order) <= now


def _note(server: Server, order: Order, done: _Done, now: datetime) -> None:
    if order.id in done.late_chains:
        issuance.keep_chain(order, done.late_chains[order.id])
        order.status, order.issued_at = OrderStatus.ISSUED, now
        server.counted_at = server.counted_at or now
    if order.id in done.settled and order.deactivated_at is None:
        order.deactivated_at = done.settled[order.id]
    if order.id in done.revoked:
        order.revoked_at = now
    if order.status not in (OrderStatus.ISSUED, OrderStatus.FAILED):
        order.status, order.error, order.due_at = OrderStatus.FAILED, "the server leaves the pool", now
    if not order.rehearsal:
        order.due_at = None


# A server whose score holds it for so long is dead; its member is warned three times before it is taken out.
DEAD_AFTER = timedelta(days=45)
WARN_AFTER = (timedelta(days=15), timedelta(days=30), timedelta(days=40))
# Between warnings, and from the last one to the end, also when the registry itself was away meanwhile.
_LEAST_NOTICE = timedelta(days=5)
_DEAD_AT_ONCE = 100


async def bury_the_dead(database: Database, now: datetime) -> bool:
    """Warn the members of servers that are dead, and take out those for which all warnings were given.

    A bounded number of those whose next step is due; whether there may be more of them.
    """
    async with database.transaction() as session:
        found = await session.scalars(_dying(now).order_by(Hold.set_at, Hold.id).limit(_DEAD_AT_ONCE))
        dying = list(found)
    for identifier in dying:
        async with database.transaction() as session:
            await _warn_or_remove(session, await servers.get(session, identifier), now)
    return len(dying) == _DEAD_AT_ONCE


def _dying(now: datetime) -> Select[int]:
    """The ids of servers that are to be warned or taken out now; maintenance and a late warning give them time."""
    under_work = aliased(Hold)
    in_maintenance = select(under_work.id).where(
        under_work.server_id == Server.id,
        under_work.kind == HoldKind.MAINTENANCE,
        under_work.lifted_at.is_(None),
    )
    warned_lately = select(Notice.id).where(
        Notice.server_id == Server.id,
        Notice.kind == NoticeKind.DEAD_WARNING,
        Notice.at >= Hold.set_at,
        Notice.at > now - _LEAST_NOTICE,
    )
    is_time = or_(
        *(
            and_(Server.dead_warnings == warnings, Hold.set_at <= now - after)
            for warnings, after in enumerate((*WARN_AFTER, DEAD_AFTER))
        )
    )
    return (
        select(Server.id)
        .join(Hold, Hold.server_id == Server.id)
        .where(
            Server.state == ServerState.SUSPENDED,
            Hold.kind == HoldKind.SCORE,
            Hold.lifted_at.is_(None),
            is_time,
            ~in_maintenance.exists(),
            ~warned_lately.exists(),
        )
    )


async def _warn_or_remove(session: AsyncSession, server: Server, now: datetime) -> None:
    hold = servers.held(server, HoldKind.SCORE)
    if hold is None or await session.scalar(_dying(now).where(Server.id == server.id)) is None:
        return
    dead_for = now - hold.set_at
    if server.dead_warnings < len(WARN_AFTER):
        server.dead_warnings += 1
        left = _LEAST_NOTICE * (len(WARN_AFTER) - server.dead_warnings + 1)
        remove_at = max(hold.set_at + DEAD_AFTER, now + left).isoformat()
        warning = NoticeKind.DEAD_WARNING
        await servers.tell(session, server, warning, now=now, days=dead_for.days, remove_at=remove_at)
        return
    reason = f"out of the answer for its score for {dead_for.days} days, after {len(WARN_AFTER)} warnings"
    await servers.leave(session, server, actor="worker", reason=reason, now=now)
    _log.warning("dead_server_leaves", server=server.name, days=dead_for.days)
