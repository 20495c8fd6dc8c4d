"""Whether this process can do its work: one question at a time, however many ask."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from poolsvc import schema
from poolsvc.db import Database
from poolsvc.worker import Health

# How long the database may take, and how long its answer is good for.
PATIENCE = 2.0
_KEEP = 1.0

_T = TypeVar("_T")


class Look(Generic[_T]):
    """A question to the database that strangers may cause: asked again only when its answer is older than `keep`
    seconds, and never twice at a time. Who asks waits at most `patience` seconds; the question itself goes on.
    """

    def __init__(
        self, question: Callable[[], Awaitable[_T]], *, keep: float, patience: float = PATIENCE
    ) -> None:
        self._question = question
        self._keep = keep
        self._patience = patience
        self._asking: asyncio.Future[_T] | None = None
        self._good_until = 0.0

    async def answer(self) -> _T:
        """Raises TimeoutError, and what the question raised."""
        now = asyncio.get_running_loop().time()
        if self._asking is None or (self._asking.done() and now >= self._good_until):
            self._asking = asyncio.ensure_future(self._question())
            self._good_until = now + self._keep
        done, _ = await asyncio.wait({self._asking}, timeout=self._patience)
        if not done:
            raise TimeoutError
        return self._asking.result()

    async def close(self) -> None:
        """End a question that is under way."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait({self._asking})


class Readiness:
    """What has to hold before requests are sent to this process."""

    def __init__(self, database: Database, health: Health, *, has_worker: bool = True) -> None:
        self._has_worker = has_worker
        self.worker: asyncio.Task[None] | None = None
        self._health = health
        self._database = database
        self._migrated = Look(self._is_migrated, keep=_KEEP)

    async def fault(self) -> str | None:
        """The first part that fails, in words that everybody may read; None when all is well."""
        if self._health.stopping.is_set():
            return "the registry is stopping"
        if self._has_worker and (self.worker is None or self.worker.done()):
            return "the worker does not run"
        try:
            is_migrated = await self._migrated.answer()
        except (SQLAlchemyError, OSError):  # TimeoutError is one
            return "the database does not answer"
        return None if is_migrated else "the database's tables are of another version"

    async def close(self) -> None:
        await self._migrated.close()

    async def _is_migrated(self) -> bool:
        wanted = await asyncio.to_thread(schema.heads)
        async with self._database.transaction() as session:
            found = await session.scalars(text("SELECT version_num FROM alembic_version"))
            return frozenset(found) == wanted
