"""Which regions the pool answers for, and how they came out: switched on by an operator, once they have the servers."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Select, and_, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.control import ServerState
from nts_core.independence import prefix_of
from nts_core.srv import targets_that_fit
from poolsvc import concentration, scoring, servers
from poolsvc.concentration import Concentration
from poolsvc.config import Settings
from poolsvc.drawing import Candidate, Draw, Odds, Rules, Standing, is_young
from poolsvc.errors import InvalidRegion, WrongState
from poolsvc.geo import Geo
from poolsvc.geo import Place as Location
from poolsvc.models import Address, Member, Region, Server
from poolsvc.pool import the_pool
from poolsvc.regions import REGIONS, WORLD, regions_of

_LISTED = and_(Server.state == ServerState.ACTIVE, Server.listed_at.is_not(None))


def rules_of(settings: Settings) -> Rules:
    """What the settings say of answers."""
    policy = settings.policy
    return Rules(
        places=targets_that_fit(settings.pool),
        region_size=policy.region_size,
        region_sets=policy.region_sets,
        young=timedelta(days=policy.young_days),
        young_percent=policy.young_percent,
    )


async def switched_on(session: AsyncSession) -> frozenset[str]:
    """The labels of the regions that have a name in DNS."""
    return frozenset(await session.scalars(select(Region.label)))


async def odds_of(session: AsyncSession, settings: Settings) -> Odds:
    """How often the servers that are in DNS get into an answer of the pool's name."""
    rules, now = rules_of(settings), datetime.now(UTC)
    best = (
        select(func.max(Address.score))
        .where(Address.server_id == Server.id, Address.proved_at.is_not(None))
        .scalar_subquery()
    )
    rows = await session.execute(_weighed(best.label("score")).where(_LISTED))
    return Odds.of(
        ((row.member_id, _weight(row, [row.score]), is_young(row.created_at, rules, now)) for row in rows),
        rules,
    )


def chance(odds: Odds, server: Server, since: datetime, settings: Settings, now: datetime) -> float:
    """The part of the answers, from 0 to 1, that a server in DNS is in, whose member's account began then."""
    weight = _weight(server, (row.score for row in servers.publishable(server)))
    return odds.chance(server.member_id, weight, is_young=is_young(since, rules_of(settings), now))


def _weighed(*columns: Any) -> Select[Any]:
    """Of servers all that their weight depends on, their scores aside."""
    traffic = (Server.traffic_cap, Server.traffic, Server.ke_cap, Server.ke_traffic)
    return select(Server.member_id, Server.weight, *traffic, Member.created_at, *columns).join(
        Member, Member.id == Server.member_id
    )


def _weight(row: Any, scores: Iterable[float | None]) -> int:
    return scoring.sampling_weight(
        row.weight,
        row.traffic_cap,
        row.traffic,
        row.ke_cap,
        row.ke_traffic,
        score=scoring.best(scores),
    )


@dataclass(frozen=True, slots=True)
class Place:
    """One region: since when it is switched on, if it is, and how it comes out."""

    on_since: datetime | None
    standing: Standing


class Atlas:
    """Which regions there are, by the files that tell where servers are."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._rules = rules_of(settings)
        self._geo = Geo(settings.geo.database)
        self._is_blank = not settings.geo.database
        self._one_at_a_time = asyncio.Lock()

    async def look(self, session: AsyncSession) -> dict[str, Place]:
        """By label the world, all regions that are switched on, and all that have a server in DNS now."""
        found = await session.execute(select(Region.label, Region.on_since))
        on = {row.label: row.on_since for row in found}
        candidates = await self._candidates(session)
        now = datetime.now(UTC)

        def come_out() -> dict[str, Place]:
            labels = on.keys() | {label for one in candidates for label in one.regions}
            draw = Draw(candidates, labels, self._rules, 0, now)
            return {label: Place(on.get(label), draw.standing(label)) for label in (WORLD, *sorted(labels))}

        return await asyncio.to_thread(come_out)

    async def concentration(self, session: AsyncSession) -> dict[str, Concentration]:
        """In how few hands the world is, and each region that is switched on."""
        on, candidates, now = await switched_on(session), await self._candidates(session), datetime.now(UTC)

        def look() -> dict[str, Concentration]:
            draw = Draw(candidates, on, self._rules, 0, now)
            return concentration.look(draw, draw.sets(), self._rules)

        return await asyncio.to_thread(look)

    async def check(self, session: AsyncSession, label: str) -> Place:
        """A region that is switched on, or has all that it needs for that. Raises InvalidRegion, WrongState."""
        place = (await self.look(session)).get(_known(label))
        if place is not None and (place.on_since is not None or not place.standing.is_thin):
            return place
        servers, members = (0, 0) if place is None else (place.standing.servers, place.standing.members)
        raise WrongState(
            f"{label} has {servers} servers of {members} members in DNS, and needs {self._rules.region_size} of"
            f" {self._rules.places}",
            remedy="name files in `geo.database`, or nobody is known to be anywhere"
            if self._is_blank
            else "wait for more servers there, or lower `policy.region_size`",
        )

    async def switch_on(self, session: AsyncSession, label: str, now: datetime) -> Place:
        """Answer for a region from the next draw on. Repeating it changes nothing. Raises as `check`."""
        # Of two at once the second one finds what the first did.
        await the_pool(session, self._settings, lock=True)
        place = await self.check(session, label)
        if place.on_since is not None:
            return place
        session.add(Region(label=label, on_since=now))
        return replace(place, on_since=now)

    async def switch_off(self, session: AsyncSession, label: str) -> None:
        """Answer for a region no longer. Repeating it changes nothing. Raises InvalidRegion."""
        row = await session.scalar(select(Region).where(Region.label == _known(label)))
        if row is not None:
            await session.delete(row)

    async def _candidates(self, session: AsyncSession) -> list[Candidate]:
        """As `poolsvc.publication` has them."""
        proved: dict[int, list[tuple[str, float | None]]] = {}
        for server_id, address, score, ipv4, ipv6 in await session.execute(
            select(Address.server_id, Address.address, Address.score, Server.ipv4, Server.ipv6)
            .join(Server, Server.id == Address.server_id)
            .where(_LISTED, Address.proved_at.is_not(None))
        ):
            if servers.is_wanted(address, ipv4=ipv4, ipv6=ipv6):
                proved.setdefault(server_id, []).append((address, score))
        rows = await session.execute(_weighed(Server.id, Server.name).where(_LISTED))
        found = [row for row in rows if row.id in proved]
        async with self._one_at_a_time:
            everywhere = [text for some in proved.values() for text, _ in some]
            places = await asyncio.to_thread(self._find, everywhere)
        return [_candidate(row, proved[row.id], places) for row in found]

    def _find(self, addresses: Iterable[str]) -> dict[str, Location]:
        self._geo.refresh()
        return self._geo.places(addresses)


def _candidate(
    row: Any, proved: Sequence[tuple[str, float | None]], places: Mapping[str, Location]
) -> Candidate:
    here = [places[text] for text, _ in proved]
    return Candidate(
        row.name,
        row.member_id,
        _weight(row, (score for _, score in proved)),
        networks=tuple(sorted({place.network for place in here if place.network is not None})),
        prefixes=tuple(sorted({prefix_of(text) for text, _ in proved})),
        regions=regions_of(place.country for place in here if place.country is not None),
        since=row.created_at,
    )


def _known(label: str) -> str:
    if label not in REGIONS:
        raise InvalidRegion(
            f"{label!r} is no region",
            remedy="give a country's code (ISO 3166-1, lower case) or a continent, such as de or north-america",
            field="region",
        )
    return label
