"""What must happen before a restored registry may act: nobody comes back who has left since the copy was made.

1. In the transaction that fills the database: every server that a journal knows to be gone leaves again; names that
   only a journal knows are burnt; every token is revoked, every invitation and offer of a server is void; the pool
   is frozen.
2. While it is frozen nothing is published. An operator looks at the difference between the zone and what would be
   published, and confirms it (`thaw`).
3. From then on the publisher takes an epoch above the zone's, so that a registry from before can write no more.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.control import ServerState
from poolsvc import auth, backup, journal, plans, servers, teams, transfers
from poolsvc.backup import BackupError
from poolsvc.config import Settings
from poolsvc.db import Database
from poolsvc.journal import Entry
from poolsvc.models import ENDED_STATES, Member, MemberStatus, Server, SignIn, User
from poolsvc.names import skeleton
from poolsvc.plans import Outlook
from poolsvc.pool import the_pool
from poolsvc.servers import EventKind

_ACTOR = "restore"


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did besides filling the tables."""

    created_at: datetime
    rows: int
    left_again: tuple[str, ...]
    burnt: tuple[str, ...]
    tokens_revoked: int


async def restore(
    database: Database, settings: Settings, file: Path, journals: Sequence[Path], now: datetime
) -> Restored:
    """Fill an empty database from a backup and the journals of removals, and leave it frozen.

    All or nothing. Raises BackupError, JournalError, OSError.
    """
    gone = journal.latest(journals, settings.pool)
    async with database.transaction(_ACTOR) as session:
        connection = await session.connection()
        manifest = await backup.load(database, file, connection)
        if manifest.pool != settings.pool:
            raise BackupError(
                f"the backup is of the pool {manifest.pool}, not of {settings.pool}", "check the settings"
            )
        left = await _leave_again(session, gone, now)
        names = {entry.name: entry.at for entry in gone.values() if entry.burnt}
        burnt = await _burn(session, names, now, why="known from the journal of removals only")
        # Who was dismissed since the copy would run the pool once more: operators are made anew.
        for user in await session.scalars(select(User).where(User.staff.is_not(None))):
            user.staff = None
        # Agents get new ones by their keys, people sign in again, programs need new ones.
        revoked = await auth.revoke(session, now)
        for attempt in await session.scalars(select(SignIn).where(SignIn.used_at.is_(None))):
            attempt.used_at = now
        # What was revoked, declined or taken back since the copy would be open once more.
        await teams.end_invitations(session, now)
        await transfers.end_offers(session, now)
        pool = await the_pool(session, settings, lock=True)
        pool.frozen_at = now
    rows = sum(content.rows for content in manifest.tables.values())
    return Restored(manifest.created_at, rows, tuple(left), tuple(burnt), revoked)


async def _leave_again(
    session: AsyncSession, gone: Mapping[tuple[int, str], Entry], now: datetime
) -> list[str]:
    """Take out what has left since the copy was made, and let stay what was taken back."""
    left = []
    for entry in gone.values():
        server = await session.scalar(select(Server).where(Server.id == entry.server).options(*servers.WHOLE))
        if server is None or server.name != entry.name:
            continue
        if not entry.is_gone:
            if servers.may_stay(server) and entry.at > server.state_since:
                await servers.cancel_leave(session, server, actor=_ACTOR, now=now)
            continue
        if entry.burnt:
            server.burnt_at = server.burnt_at or entry.at
        if _is_on_its_way(server, entry):
            continue
        reason = f"left on {entry.at.date().isoformat()}, after the copy that was restored was made"
        await servers.leave(session, server, actor=_ACTOR, reason=reason, now=now, emergency=True)
        # Or its addresses would be published once more, to be withdrawn in order.
        server.srv_withdrawn_at = server.srv_withdrawn_at or entry.at
        left.append(server.name)
    return left


def _is_on_its_way(server: Server, entry: Entry) -> bool:
    """Whether the copy knows of the removal already; one that was to leave later may have left at once since."""
    if servers.may_stay(server):
        return entry.at <= server.state_since
    return server.state in ENDED_STATES


async def _burn(
    session: AsyncSession, names: Mapping[str, datetime], now: datetime, *, why: str
) -> list[str]:
    """Keep names that were in DNS, and that the database does not know, from ever being given again."""
    burnt: list[str] = []
    held = await plans.held_names(session, names)
    for name, at in names.items():
        if name in held:
            continue
        keeper = await _keeper(session, now)
        server = Server(
            member_id=keeper.id,
            name=name,
            skeleton=skeleton(name),
            state=ServerState.REMOVED,
            state_since=now,
            created_at=now,
            burnt_at=at,
            leave_reason=why,
        )
        session.add(server)
        await session.flush()
        servers.note(
            session,
            server,
            EventKind.BURNT,
            after={"state": ServerState.REMOVED},
            actor=_ACTOR,
            reason=why,
            now=now,
        )
        burnt.append(name)
    return burnt


async def _keeper(session: AsyncSession, now: datetime) -> Member:
    """The member that keeps names of servers whose members the copy does not know."""
    name = "Servers of lost records"
    member = await session.scalar(select(Member).where(Member.name == name))
    if member is None:
        member = Member(name=name, status=MemberStatus.CLOSED, created_at=now, opaque_id=secrets.token_hex(8))
        session.add(member)
        await session.flush()
    return member


async def thaw(database: Database, settings: Settings, outlook: Outlook, now: datetime) -> None:
    """Let the registry publish again what was looked at, with an epoch above the zone's.

    Confirmed with it is what the guard would stop. Names in the zone that no server has are burnt: their certificates may still be good.
    """
    async with database.transaction("console") as session:
        names = dict.fromkeys(outlook.unknown, now)
        await _burn(session, names, now, why="it was in the zone when the registry was restored")
        pool = await the_pool(session, settings, lock=True)
        pool.epoch = max(pool.epoch, outlook.epoch or 0)
        pool.frozen_at = None
        if outlook.question:
            await plans.approve(session, outlook.question, now)


async def move(source: Database, target: Database, settings: Settings, now: datetime) -> dict[str, int]:
    """Copy a database into an empty one and freeze the source, so that nobody serves both. Raises BackupError."""
    counts = await backup.move(source, target)
    async with source.transaction("console") as session:
        (await the_pool(session, settings, lock=True)).frozen_at = now
    return counts
