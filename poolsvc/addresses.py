"""The addresses of a server. Each is listed, proved, published and withdrawn by itself.

1. The state follows the addresses: with a proved one of a published family a server is VERIFIED, without any it is
   REGISTERED again (`settle`).
2. A proved address is confirmed by each probe that sees the server's certificate there. One that was not confirmed
   for `address_proof_days` is to be proved again; when nothing comes, it counts as unproved.
3. One that stays unproved for `unproved_address_days` is dropped, unless it is the server's last.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta

import structlog
from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.control import ServerState
from poolsvc import servers
from poolsvc.config import Settings
from poolsvc.db import Database
from poolsvc.errors import InvalidDocument
from poolsvc.models import ENDED_STATES, Address, OrderStatus, Server
from poolsvc.notices import NoticeKind
from poolsvc.servers import EventKind

_log = structlog.get_logger()
_ACTOR = "worker"
_SERVERS_AT_ONCE = 100


async def change(
    session: AsyncSession,
    settings: Settings,
    server: Server,
    *,
    listed: Sequence[str] | None,
    ipv4: bool,
    ipv6: bool,
    actor: str,
    now: datetime,
) -> None:
    """What the member wants: the whole list of addresses (None leaves it), and the families to publish.

    New addresses need their proof; those that are not listed any more go at once. Raises InvalidAddress,
    AddressTaken, InvalidDocument.
    """
    if not (ipv4 or ipv6):
        raise InvalidDocument(
            "neither family would be published",
            remedy="keep one; to be out of the answer for a while there is maintenance, and leaving for good",
            field="ipv4",
        )
    server.ipv4, server.ipv6 = ipv4, ipv6
    if listed is not None:
        await _list(session, settings, server, listed, now)
    await settle(session, server, actor=actor, reason="the settings were changed", now=now)


async def _list(
    session: AsyncSession, settings: Settings, server: Server, texts: Sequence[str], now: datetime
) -> None:
    checked = servers.checked_addresses(settings, texts)
    before = {row.address: row for row in server.addresses}
    added = [address for address in checked if address not in before]
    await servers.refuse_taken(session, added)
    for address in added:
        session.add(Address(server_id=server.id, address=address, confirmed_at=now))
    for address, row in before.items():
        if address not in checked:
            await servers.delete_address(session, row)
    await session.flush()
    await session.refresh(server, ["addresses"])


async def settle(session: AsyncSession, server: Server, *, actor: str, reason: str, now: datetime) -> None:
    """Bring the state in step with the addresses that may be published."""
    found = servers.publishable(server)
    server.review_due_at = now if found else None
    if server.state is ServerState.REGISTERED and found:
        await servers.apply(session, server, EventKind.ADDRESS_PROVED, actor=actor, reason=reason, now=now)
        if any(order.status is OrderStatus.ISSUED for order in server.orders):
            # It was here before: its certificate can be seen at once.
            server.probe_due_at = now
    elif server.state in servers.NAMED_STATES and not found:
        # Out of DNS altogether; once an address is proved, all begins as if the name were new.
        await servers.forget_scores(session, server, now)
        server.named_at = server.listed_at = None
        await servers.apply(session, server, EventKind.ADDRESSES_LOST, actor=actor, reason=reason, now=now)


def is_to_be_proved_again(row: Address, settings: Settings, now: datetime) -> bool:
    """Whether nothing has confirmed a proved address for too long."""
    return row.confirmed_at is not None and row.confirmed_at <= now - _life(settings)


def proof_ends_at(row: Address, settings: Settings) -> datetime | None:
    """When a proved address is withdrawn, unless a probe or a proof confirms it before."""
    if row.proved_at is None or row.confirmed_at is None:
        return None
    return row.confirmed_at + _life(settings) + _patience(settings)


def _life(settings: Settings) -> timedelta:
    return timedelta(days=settings.policy.address_proof_days)


def _patience(settings: Settings) -> timedelta:
    return timedelta(days=settings.policy.unproved_address_days)


async def withdraw_stale(database: Database, settings: Settings, now: datetime) -> None:
    """Withdraw the addresses that nobody has confirmed, each alone."""
    async with database.transaction() as session:
        found = await session.scalars(
            select(Address.server_id)
            .join(Server, Server.id == Address.server_id)
            .where(
                Server.state.not_in(ENDED_STATES),
                Address.confirmed_at <= now - _patience(settings),
                or_(
                    Address.proved_at.is_(None),
                    Address.confirmed_at <= now - _life(settings) - _patience(settings),
                ),
            )
            .distinct()
            .limit(_SERVERS_AT_ONCE)
        )
        stale = list(found)
    for identifier in stale:
        async with database.transaction() as session:
            await _withdraw_stale(session, settings, await servers.get(session, identifier), now)


async def _withdraw_stale(session: AsyncSession, settings: Settings, server: Server, now: datetime) -> None:
    if server.state in ENDED_STATES:
        return
    for row in list(server.addresses):
        if row.confirmed_at is None:
            continue
        days = (now - row.confirmed_at) // timedelta(days=1)
        if row.proved_at is None and row.confirmed_at <= now - _patience(settings):
            if len(server.addresses) == 1:
                # Nothing could be asked of a server without addresses.
                row.confirmed_at = now
                continue
            server.addresses.remove(row)
            await servers.delete_address(session, row)
            await _tell(session, server, row, f"not proved within {days} days", now)
        elif (ends := proof_ends_at(row, settings)) is not None and ends <= now:
            reason = f"neither probed with its certificate nor proved again for {days} days"
            row.proved_at = row.nonce = row.proof_due_at = None
            row.step_reason, row.proof_error, row.confirmed_at = "", reason, now
            await servers.forget_address_scores(session, [row])
            await _tell(session, server, row, reason, now)
    await settle(session, server, actor=_ACTOR, reason="no address is confirmed any more", now=now)


async def _tell(session: AsyncSession, server: Server, row: Address, reason: str, now: datetime) -> None:
    servers.note(
        session,
        server,
        EventKind.ADDRESS_WITHDRAWN,
        subject=f"address {row.id}",
        before={"address": row.address},
        actor=_ACTOR,
        reason=reason,
        now=now,
    )
    kind = NoticeKind.ADDRESS_WITHDRAWN
    await servers.tell(session, server, kind, now=now, address=row.address, reason=reason)
    _log.info("address_withdrawn", server=server.name, address=row.address)
