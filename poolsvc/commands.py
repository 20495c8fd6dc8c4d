"""What people and agents have done for a server at once, and how often they may."""

from datetime import datetime, timedelta

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from poolsvc.errors import TooManyRequests
from poolsvc.models import Command, CommandKind, Server

_PERIODS = {CommandKind.RENEWAL: timedelta(days=1), CommandKind.CHECK: timedelta(hours=1)}
_WORDS = {CommandKind.RENEWAL: "order a certificate by hand", CommandKind.CHECK: "be checked"}


async def take(session: AsyncSession, server: Server, kind: CommandKind, limit: int, now: datetime) -> None:
    """Count one more, of `limit` in the kind's period; the server is locked. Raises TooManyRequests."""
    period = _PERIODS[kind]
    mine = (Command.server_id == server.id, Command.kind == kind)
    await session.execute(delete(Command).where(*mine, Command.at <= now - period))
    made = list(
        await session.scalars(select(Command.at).where(*mine).order_by(Command.at.desc()).limit(limit))
    )
    if len(made) == limit:
        again = made[-1] + period
        raise TooManyRequests(
            f"{server.name} may {_WORDS[kind]} no more now: {limit} in {period // timedelta(hours=1)} h",
            remedy=f"ask again at {again:%Y-%m-%d %H:%M:%S} UTC",
            retry_after=again - now,
        )
    session.add(Command(server_id=server.id, kind=kind, at=now))
