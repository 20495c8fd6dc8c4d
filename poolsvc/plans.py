"""What an operator sees of the zone, and says to it: what would change, a word for what was stopped, who shows what.

Only the leader writes the zone. An operator's word is a row of `zone_plans`, good for exactly the plan that was looked
at, for an hour, once; the leader finds it when its own plan has the same checksum.
"""

import asyncio
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.control import ServerState
from poolsvc import leases, subsets
from poolsvc.config import Settings
from poolsvc.db import Database
from poolsvc.errors import WrongState
from poolsvc.leader import LEASE
from poolsvc.models import Server, ZonePlan
from poolsvc.names import is_label
from poolsvc.pool import count_by_state, the_pool
from poolsvc.primary import PublishError
from poolsvc.publication import Publication, primary_config, zone_policy
from poolsvc.publisher import Mismatch, Publisher
from poolsvc.zone import Change, Key, Question, Zone, ordered

_GOOD_FOR = timedelta(hours=1)
_NAMES = 2_000  # asked for at a time
# A nameserver that is a moment behind the primary is asked again, so often and with such pauses (seconds).
_ROUNDS, _PAUSE = 5, 1.0


@dataclass(frozen=True, slots=True)
class Outlook:
    """What the registry would do to the zone; `question` is that part of `changes` which waits for a word."""

    frozen_at: datetime | None
    epoch: int | None  # the zone's
    changes: tuple[Change, ...]
    unknown: tuple[str, ...]  # names in the zone that no server has
    servers: Mapping[ServerState, int]
    question: Question = field(default_factory=Question)
    is_ready: bool = True  # not without an account at a CA
    is_led: bool = True  # a process publishes, or would


async def look(database: Database, settings: Settings, now: datetime) -> Outlook:
    """Compare the zone on the primary with what would be published. Raises PublishError, OSError."""
    publication = Publication(database, settings, only_looks=True)
    is_ready = await publication.look(now, even_frozen=True)
    async with database.transaction() as session:
        pool = await the_pool(session, settings)
        states = await count_by_state(session)
    is_led = await leases.is_held(database, LEASE)
    if not is_ready:
        return Outlook(pool.frozen_at, None, (), (), states, is_ready=False, is_led=is_led)
    seen = await publication.publisher.observe()
    epoch = int(seen.epoch) if seen.epoch is not None and seen.epoch.isdecimal() else None
    made = await publication.plan(seen.zone)
    below = f".{settings.servers_domain}."
    names = sorted({owner.removesuffix(below) for owner, _ in seen.zone if owner.endswith(below)})
    async with database.transaction() as session:
        held = await held_names(session, filter(is_label, names))
    return Outlook(
        pool.frozen_at,
        epoch,
        ordered((*made, *publication.question.changes)),
        tuple(name for name in names if is_label(name) and name not in held),
        states,
        publication.question,
        is_led=is_led,
    )


async def held_names(session: AsyncSession, names: Iterable[str]) -> set[str]:
    """Those of some names that a server has, or had and keeps."""
    asked, held = sorted(names), set[str]()
    for start in range(0, len(asked), _NAMES):
        some = asked[start : start + _NAMES]
        found = select(Server.name).where(Server.name.in_(some), Server.released_at.is_(None))
        held.update(await session.scalars(found))
    return held


async def approve(session: AsyncSession, question: Question, now: datetime) -> datetime:
    """An operator's word for what was stopped; until when it is good. Saying it twice changes nothing."""
    known: datetime | None = await session.scalar(
        select(ZonePlan.expires_at).where(
            ZonePlan.checksum == question.checksum, ZonePlan.made_at.is_(None), ZonePlan.expires_at > now
        )
    )
    if known is not None:
        return known
    plan = ZonePlan(
        checksum=question.checksum,
        deleted=question.deleted,
        replaced=question.replaced,
        withdrawn=len(question.kept),
        approved_at=now,
        expires_at=now + _GOOD_FOR,
    )
    session.add(plan)
    return plan.expires_at


async def may_write(settings: Settings, region: str) -> None:
    """Whether the primary lets us write a region's SRV; if it did not, nothing at all could be published any more.

    Raises WrongState.
    """
    try:
        await Publisher(zone_policy(settings), primary_config(settings)).rehearse_region(region)
    except (PublishError, OSError) as error:
        raise WrongState(
            f"the primary would not take the SRV of {region}: {error}",
            remedy="give the publisher's key the right to it, as in the files of `poolsvc init`; docs/answers.md",
        ) from None


@dataclass(frozen=True, slots=True)
class Checked:
    """What the authoritative servers show of the zone that the primary has."""

    serial: int
    asked: int  # RRsets
    mismatches: tuple[Mismatch, ...]
    due: int  # RRsets that the zone itself does not hold as the database would have them

    @property
    def is_good(self) -> bool:
        return not self.mismatches and not self.due


async def check(database: Database, settings: Settings, now: datetime, count: int | None = None) -> Checked:
    """Ask every authoritative server for the zone as the primary has it, or for `count` RRsets of it, by chance.

    Who is only a moment behind is no fault, nor is a change that is under way: only what stays so is. Serials tell nothing of
    that: a server that signs by itself has its own. Raises PublishError, OSError.
    """
    began = time.monotonic()
    publication = Publication(database, settings, only_looks=True)
    if await publication.look(now, even_frozen=True):
        publisher = publication.publisher
    else:
        publisher = Publisher(zone_policy(settings), primary_config(settings))
    seen = await publisher.observe()
    keys: Sequence[Key] = sorted(seen.zone)
    if count is not None and count < len(keys):
        keys = random.sample(keys, count)
    asked = len(keys)
    draw = await subsets.in_place(publisher, seen.zone)
    wrong, due = await publisher.verify(keys, seen.zone, draw), await _due(publication, seen.zone)
    for _ in range(_ROUNDS - 1):
        if not wrong and not due:
            break
        await asyncio.sleep(_PAUSE)
        seen, _ = await publisher.follow(seen)
        await publication.look(now + timedelta(seconds=time.monotonic() - began), even_frozen=True)
        # One that was silent was not asked to the end.
        if all(mismatch.key is not None for mismatch in wrong):
            keys = sorted({mismatch.key for mismatch in wrong if mismatch.key is not None})
        draw = await subsets.in_place(publisher, seen.zone)
        wrong = await publisher.verify(keys, seen.zone, draw)
        due &= await _due(publication, seen.zone)
    return Checked(seen.serial, asked, wrong, len(due))


async def _due(publication: Publication, zone: Zone) -> set[Key]:
    """What the zone does not hold as the database would have it."""
    made = await publication.plan(zone) if publication.is_ready else ()
    return {change.key for change in (*made, *publication.question.changes)}
