"""Who publishes: one process at a time, under the lease `publisher`, with an epoch of its own in the zone's fence.

The lease keeps the processes of one database out of each other's way, and says within seconds that a leader is dead.
The fence keeps the zone right even if a leader is only slow: an update with an old epoch is refused by the primary.

Epochs are the database's: each leader takes one above all that were ever used (`Pool.epoch`). A zone with a higher
epoch than the database ever gave belongs to another registry, or to the one that this database is an old copy of. Then
the pool is frozen until an operator has looked (`poolsvc.recovery`): two registries never take a zone from each other
by themselves.

What is wrong is told in three ways: `alarm` while nothing can be published, or not everybody shows it; `warnings` while
a plan waits for an operator, and for an hour after somebody else wrote the zone.
"""

import asyncio
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta

import structlog
from sqlalchemy import select

from poolsvc import leases
from poolsvc.config import Settings
from poolsvc.db import Database
from poolsvc.drawing import Standing
from poolsvc.leases import Held, LeaseLost
from poolsvc.models import ZoneChange
from poolsvc.pool import the_pool
from poolsvc.primary import Fenced, PublishError
from poolsvc.publication import Publication
from poolsvc.publisher import Publisher
from poolsvc.zone import Change, Question

_log = structlog.get_logger()
LEASE = "publisher"
_LIFE = timedelta(seconds=10)
# A lease of which so much is left is not renewed before a pass.
_FRESH = 7.0
# How long it is shown that somebody else wrote the zone.
_DRIFT_SHOWN = timedelta(hours=1)
_LOGGED_DRIFT = 10

FROZEN = "frozen: nothing is published until `poolsvc thaw`"


class Leader:
    """Publishes while this process leads.

    `alarm` is what is wrong with DNS as far as it knows, `geo_alarm` with the files that tell where servers are.
    """

    def __init__(self, database: Database, settings: Settings, holder: str) -> None:
        self._database = database
        self._settings = settings
        self._holder = holder
        self._held: Held | None = None
        self._epoch: int | None = None
        self._publication: Publication | None = None
        self._not_before: datetime | None = None
        self._is_waiting = False
        self._idle_until: datetime | None = None
        self._drift_alarm: tuple[datetime, str] | None = None
        self.drifted = 0  # RRsets that somebody else changed, since this process began
        self.alarm: str | None = None
        self.geo_alarm: str | None = None
        self.published_at: datetime | None = None

    async def step(self, now: datetime) -> bool:
        """Lead if nobody else does, and do what is due for DNS; whether there is more at once.

        Between two full looks, one each `tick`, only the outbox is asked, by one small query.
        """
        if self._idle_until is not None and now < self._idle_until and not await self._is_told():
            return False
        self._idle_until = now + timedelta(seconds=self._settings.policy.tick)
        is_waiting = self._is_waiting = self._not_before is not None and now < self._not_before
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

    @property
    def question(self) -> Question:
        """What waits for an operator's word."""
        return Question() if self._publication is None else self._publication.question

    def warnings(self, now: datetime) -> Iterator[str]:
        """What an operator should look at while DNS is as it should be otherwise."""
        if question := self.question:
            yield _asked(question)
        if self._publication is not None:
            yield from map(_thin, self._publication.thin_regions)
        if self._drift_alarm is not None and now - self._drift_alarm[0] < _DRIFT_SHOWN:
            yield self._drift_alarm[1]

    async def _is_told(self) -> bool:
        """Whether this process leads, and something has changed since it last looked."""
        publication = self._publication
        if self._held is None or publication is None or self._is_waiting:
            return False
        if publication.is_frozen or not publication.is_ready:
            return False
        async with self._database.snapshot() as connection:
            return await connection.scalar(select(ZoneChange.id).limit(1)) is not None

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
        held = await leases.acquire(self._database, LEASE, self._holder, _LIFE)
        if held is None or self._held is None or held.epoch != self._held.epoch:
            # What was known of the zone is what was known before somebody else may have written it.
            self._follow()
            if held is not None:
                _log.info("publisher_leads", lease_epoch=held.epoch)
        self._held = held
        return held

    def _follow(self) -> None:
        self._held = self._epoch = self._publication = self.alarm = self.geo_alarm = None

    def _wait(self, alarm: str, now: datetime) -> None:
        self.alarm = alarm
        self._not_before = now + timedelta(seconds=self._settings.policy.step_retry)

    async def _pass(self, held: Held, now: datetime) -> bool:
        if self._publication is None:
            self._publication = Publication(self._database, self._settings)
        publication = self._publication
        is_ready = await publication.look(now)
        self.geo_alarm = publication.geo_trouble
        if publication.is_frozen:
            self.alarm = FROZEN
            return False
        if self.alarm == FROZEN:
            self.alarm = None
        if not is_ready or not publication.is_due(now):
            return False
        if self._epoch is None:
            self._epoch = await self._take_epoch(held, publication.publisher, now)
        try:
            await publication.publish(self._epoch, now)
        finally:
            self._tell_drift(publication.take_drift(), now)
        self.published_at = now
        is_late = publication.is_late(now)
        self.alarm = "not every authoritative server shows the zone" if is_late else None
        if publication.ask_at is not None and self._idle_until is not None:
            self._idle_until = min(self._idle_until, publication.ask_at)
        return publication.has_more

    def _tell_drift(self, drift: Sequence[Change], now: datetime) -> None:
        """Somebody else writes the zone: an operator should know, though it is repaired."""
        if not drift:
            return
        self.drifted += len(drift)
        for change in drift[:_LOGGED_DRIFT]:
            kind = "removed" if change.after is None else "added" if change.before is None else "changed"
            _log.warning("zone_drift", owner=change.owner, type=change.rdtype, change=kind)
        some = ", ".join(f"{change.owner} {change.rdtype}" for change in drift[:3])
        more = f" and {len(drift) - 3} more" if len(drift) > 3 else ""
        text = f"somebody else changed {some}{more} in the zone at {now:%H:%M} UTC; it is put back"
        _log.warning("zone_drift_repaired", rrsets=len(drift))
        self._drift_alarm = now, text

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


def _thin(region: Standing) -> str:
    """A region that has shrunk, as an operator reads of it."""
    around = " and ".join(label or "the world" for label in region.filled_from)
    return (
        f"the region {region.region} has {region.servers} servers of {region.members} members, too few: its answers"
        f" are filled from {around}; see `poolsvc regions list`"
    )


def _asked(question: Question) -> str:
    """What waits for an operator, and the command by which to answer."""
    parts = []
    if question.changes:
        parts.append(
            f"{question.deleted} records would be deleted and {question.replaced} replaced, of"
            f" {question.existing}"
        )
        if question.is_of_settings:
            parts.append("as after other settings (TTL, CAs, geo.database, key_file)")
    if question.kept:
        parts.append(f"{len(question.kept)} servers would leave the SRV at once, and stay until they recover")
    return (
        f"{', '.join(parts)}: look with `poolsvc zone diff`, then confirm with"
        f" `poolsvc zone apply --plan {question.checksum}`"
    )
