"""Who publishes: one process at a time, under the lease `publisher`, with an epoch of its own in the zone's fence.

The lease keeps the processes of one database out of each other's way, and says within seconds that a leader is dead.
The fence keeps the zone right even if a leader is only slow: an update with an old epoch is refused by the primary.

Epochs are the database's: each leader takes one above all that were ever used (`Pool.epoch`). A zone with a higher
epoch than the database ever gave belongs to another registry, or to the one that this database is an old copy of. Then
the pool is frozen until an operator has looked (`poolsvc.recovery`): two registries never take a zone from each other
by themselves.
"""

import asyncio
from datetime import datetime, timedelta

import structlog

from poolsvc import leases
from poolsvc.config import Settings
from poolsvc.db import Database
from poolsvc.leases import Held, LeaseLost
from poolsvc.pool import the_pool
from poolsvc.publication import Publication
from poolsvc.publisher import Fenced, Publisher, PublishError

_log = structlog.get_logger()
_NAME = "publisher"
_LIFE = timedelta(seconds=10)
# A lease of which so much is left is not renewed before a pass.
_FRESH = 7.0

FROZEN = "frozen: nothing is published until `poolsvc thaw`"


class Leader:
    """Publishes while this process leads; `alarm` is what is wrong with DNS as far as it knows."""

    def __init__(self, database: Database, settings: Settings, holder: str) -> None:
        self._database = database
        self._settings = settings
        self._holder = holder
        self._held: Held | None = None
        self._epoch: int | None = None
        self._publication: Publication | None = None
        self._not_before: datetime | None = None
        self.alarm: str | None = None
        self.published_at: datetime | None = None

    async def step(self, now: datetime) -> bool:
        """Lead if nobody else does, and do what is due for DNS; whether there is more at once."""
        is_waiting = self._not_before is not None and now < self._not_before
        if is_waiting and self._held is None:
            return False
        held = await self._lead()
        if held is None or is_waiting:
            return False
        try:
            async with leases.keep(self._database, held, _LIFE):
                return await self._pass(held, now)
        except LeaseLost as error:
            _log.warning("publisher_lease_lost", detail=str(error))
            self._follow()
        except Fenced as error:
            _log.error("publisher_fenced", detail=str(error))
            await self.stop()
            self._wait(str(error), now)
        except (PublishError, OSError) as error:
            _log.error("publish_failed", detail=str(error))
            self._wait(str(error), now)
        return False

    async def stop(self) -> None:
        """Let another process lead at once."""
        held = self._held
        self._follow()
        if held is not None:
            await leases.release(self._database, held)

    async def _lead(self) -> Held | None:
        held = self._held
        if held is not None and held.until - asyncio.get_running_loop().time() > _FRESH:
            return held
        held = await leases.acquire(self._database, _NAME, self._holder, _LIFE)
        if held is None or self._held is None or held.epoch != self._held.epoch:
            # What was known of the zone is what was known before somebody else may have written it.
            self._follow()
            if held is not None:
                _log.info("publisher_leads", lease_epoch=held.epoch)
        self._held = held
        return held

    def _follow(self) -> None:
        self._held = self._epoch = self._publication = self.alarm = None

    def _wait(self, alarm: str, now: datetime) -> None:
        self.alarm = alarm
        self._not_before = now + timedelta(seconds=self._settings.policy.step_retry)

    async def _pass(self, held: Held, now: datetime) -> bool:
        if self._publication is None:
            self._publication = Publication(self._database, self._settings)
        publication = self._publication
        is_ready = await publication.look(now)
        if publication.is_frozen:
            self.alarm = FROZEN
            return False
        if self.alarm == FROZEN:
            self.alarm = None
        if not is_ready or not publication.is_due(now):
            return False
        if self._epoch is None:
            self._epoch = await self._take_epoch(held, publication.publisher, now)
        is_everywhere = await publication.publish(self._epoch, now)
        self.published_at = now
        if not is_everywhere:
            self._wait("not every authoritative server shows the zone", now)
            return False
        self.alarm = None
        return publication.has_more

    async def _take_epoch(self, held: Held, publisher: Publisher, now: datetime) -> int:
        """An epoch above all earlier ones: whoever published before cannot any more."""
        fence = await publisher.fence()
        async with self._database.transaction() as session:
            pool = await the_pool(session, self._settings, lock=True)
            before = pool.epoch
            is_foreign = fence is not None and fence > before
            if is_foreign:
                pool.frozen_at = now
            else:
                pool.epoch = max(before, held.epoch) + 1
        if is_foreign:
            raise Fenced(
                f"the zone's epoch is {fence}, and this database never gave more than {before}: another registry"
                f" writes the zone, or this database is an old copy; {FROZEN}"
            )
        epoch: int = pool.epoch
        await publisher.take_fence(epoch)
        return epoch
