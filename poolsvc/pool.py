"""The pool's one row, and the pool in numbers."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from sqlalchemy import func, or_, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.control import ServerState
from poolsvc import scoring
from poolsvc.config import Settings
from poolsvc.errors import WrongState
from poolsvc.models import Address, Pool, Server

_KEPT, _KEPT_MAX = 1.0, 30.0
_KEPT_SHARE = 100  # a look takes a hundredth of the time between two
T = TypeVar("T")


async def the_pool(session: AsyncSession, settings: Settings, *, lock: bool = False) -> Pool:
    """The pool's row, made on first use; locked for those who change it.

    Raises WrongState when the database is of another pool.
    """
    pool = await session.get(Pool, 1, with_for_update=True if lock else None)
    if pool is None:
        # Another process may make the row at the same moment; then its row it is.
        with suppress(IntegrityError):
            async with session.begin_nested():
                session.add(Pool(id=1, domain=settings.pool, epoch=0))
        pool = await session.get_one(Pool, 1, with_for_update=True if lock else None)
    if pool.domain != settings.pool:
        raise WrongState(f"the database is that of the pool {pool.domain}, not of {settings.pool}")
    return pool


async def count_active(session: AsyncSession, *, limit: int) -> int:
    """How many servers are ACTIVE, counted no further than `limit`: it is asked whether there are enough."""
    some = select(Server.id).where(Server.state == ServerState.ACTIVE).limit(limit).subquery()
    return await session.scalar(select(func.count()).select_from(some)) or 0


async def count_until_open(session: AsyncSession, pool: Pool, settings: Settings) -> int:
    """How many servers are ACTIVE in a pool that has not opened yet; in an open one it matters no more."""
    if pool.opened_at is not None:
        return settings.policy.opening_size
    return await count_active(session, limit=settings.policy.opening_size)


async def count_kept_low(session: AsyncSession) -> int:
    """ACTIVE servers without one good address: kept in the answer because too few others are active."""
    # In the words of the index `ix_addresses_failing`, so that it is used.
    failing = select(Address.server_id).where(
        text(f"score < {scoring.CUTOFF:g}"), Address.proved_at.is_not(None)
    )
    good = select(Address.server_id).where(
        Address.server_id == Server.id,
        or_(Address.score.is_(None), Address.score >= scoring.CUTOFF),
        Address.proved_at.is_not(None),
    )
    kept = select(func.count()).where(
        Server.state == ServerState.ACTIVE, Server.id.in_(failing), ~good.exists()
    )
    return await session.scalar(kept) or 0


async def count_by_state(session: AsyncSession) -> dict[ServerState, int]:
    found = await session.execute(select(Server.state, func.count().label("servers")).group_by(Server.state))
    return {row.state: row.servers for row in found}


@dataclass(frozen=True, slots=True)
class Census:
    """The pool in numbers."""

    by_state: Mapping[ServerState, int]
    kept_low: int

    @property
    def active(self) -> int:
        return self.by_state.get(ServerState.ACTIVE, 0)

    @property
    def reporting(self) -> int:
        """Servers whose agents report."""
        return sum(count for state, count in self.by_state.items() if state is not ServerState.REMOVED)


async def take_census(session: AsyncSession) -> Census:
    """Count every server."""
    return Census(await count_by_state(session), await count_kept_low(session))


class Kept(Generic[T]):
    """What takes a look at every server: done once a second at most, and less often in a large pool, however often asked.

    Never twice at a time: who asks meanwhile is content with what was found last, and waits only for the first one.
    """

    def __init__(self, look: Callable[[AsyncSession], Awaitable[T]]) -> None:
        self._look = look
        self._last: T | None = None
        self._due_at = 0.0
        self._looking = asyncio.Lock()

    async def get(self, session: AsyncSession) -> T:
        """What was found, some seconds ago at most."""
        if self._last is not None and (self._looking.locked() or time.monotonic() < self._due_at):
            return self._last
        async with self._looking:
            began = time.monotonic()
            if self._last is None or began >= self._due_at:
                self._last = await self._look(session)
                took = time.monotonic() - began
                self._due_at = began + min(max(_KEPT, _KEPT_SHARE * took), _KEPT_MAX)
        return self._last

    def forget(self) -> None:
        """What was found is true no longer: who asks next waits for another look."""
        self._last, self._due_at = None, 0.0
