"""The regions of the pool: which have a name of their own, and how they come out."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Path
from pydantic import Field

from poolsvc import plans
from poolsvc.api.request import CallerDep, Document, NowDep, PrincipalDep, ServicesDep, SessionDep
from poolsvc.auth import Operation
from poolsvc.concentration import Concentration
from poolsvc.config import Settings
from poolsvc.regional import Place
from poolsvc.regions import WORLD

router = APIRouter(prefix="/v1")
RegionPath = Annotated[
    str, Path(max_length=20, pattern="^[a-z-]+$", description="such as `de` or `north-america`")
]


class RegionView(Document):
    """One region: how many servers are in DNS there, and what that means for who asks for it."""

    region: str = Field(description="a country's code (ISO 3166-1), a continent, or `world`")
    pool: str = Field(description="what a client is given as its pool")
    on_since: datetime | None = Field(
        description="when it was switched on; empty while it has no name in DNS"
    )
    servers: int = Field(description="of its own, in DNS now")
    members: int = Field(description="that these are of")
    wanted: int = Field(description="servers with which it needs none from around it")
    filled_from: list[str] = Field(description="the regions whose servers are in its answers too")
    young_wanted: float = Field(
        description="the part of its weight that young accounts would have", ge=0, le=1
    )
    young_given: float = Field(description="the part that they have", ge=0, le=1)


def _view(settings: Settings, label: str, place: Place) -> RegionView:
    found = place.standing
    return RegionView(
        region=label or "world",
        pool=f"{label}.{settings.pool}" if label else settings.pool,
        on_since=place.on_since,
        servers=found.servers,
        members=found.members,
        wanted=settings.policy.opening_size if label == WORLD else settings.policy.region_size,
        filled_from=[around or "world" for around in found.filled_from],
        young_wanted=found.young_wanted,
        young_given=found.young_given,
    )


@router.get("/regions")
async def list_regions(services: ServicesDep, session: SessionDep) -> list[RegionView]:
    """The world, all regions that are switched on, and all that have a server; needs no token."""
    found = await services.regions.get(session)
    return [_view(services.settings, label, place) for label, place in found.items()]


class VariedView(Document):
    """Parts of the answers, from 0 to 1, with four different ones, so that a client finds independent sources in each."""

    operators: float
    networks: float = Field(description="AS")
    prefixes: float = Field(description="/24 and /48")
    all: float = Field(description="of all three kinds at once")


class IndependenceView(Document):
    """In how few hands the pool or a region is. Operators are not named here."""

    region: str
    servers: int
    members: int
    answers: VariedView | None = Field(description="empty while there are none")
    largest_operator_share: float | None = Field(description="of the weight, from 0 to 1")
    largest_network: int | None = Field(description="AS number; empty without a file that knows networks")
    largest_network_share: float | None
    largest_country: str | None
    largest_country_share: float | None
    hostile_to_add: int | None = Field(
        description="servers of typical weight, of as many accounts, networks and prefixes, with which every second client"
        " that takes four of an answer would have a hostile majority"
    )
    hostile_members: int | None = Field(
        description="present members, the heaviest first, with whom it would be so; empty if all are too few"
    )


@router.get("/pool/independence")
async def read_independence(services: ServicesDep, session: SessionDep) -> list[IndependenceView]:
    """In how few hands the world is, and each region that has a name; needs no token."""
    found = await services.concentration.get(session)
    return [_independence(one) for one in found.values()]


def _independence(one: Concentration) -> IndependenceView:
    network, country = one.network, one.country
    return IndependenceView(
        region=one.region or "world",
        servers=one.servers,
        members=one.members,
        answers=None if one.varied is None else VariedView.model_validate(one.varied),
        largest_operator_share=None if one.operator is None else one.operator.share,
        largest_network=None if network is None else int(str(network.what)),
        largest_network_share=None if network is None else network.share,
        largest_country=None if country is None else str(country.what),
        largest_country_share=None if country is None else country.share,
        hostile_to_add=one.to_add,
        hostile_members=one.to_take,
    )


@router.put("/regions/{region}")
async def switch_on(region: RegionPath, caller: CallerDep, services: ServicesDep, now: NowDep) -> RegionView:
    """Give a region its name in DNS. It needs `policy.region_size` servers of enough members."""
    caller.may(Operation.SET_REGIONS)
    async with services.database.transaction(caller.actor) as session:
        place = await services.atlas.check(session, region)
    if place.on_since is None:
        # Not in a transaction: somebody else is asked.
        await plans.may_write(services.settings, region)
        async with services.database.transaction(caller.actor) as session:
            place = await services.atlas.switch_on(session, region, now)
    services.regions.forget()
    return _view(services.settings, region, place)


@router.delete("/regions/{region}", status_code=204)
async def switch_off(
    region: RegionPath, principal: PrincipalDep, services: ServicesDep, session: SessionDep
) -> None:
    """Take a region's name out of DNS. Clients that were given it find no servers any more."""
    principal.may(Operation.SET_REGIONS)
    await services.atlas.switch_off(session, region)
    services.regions.forget()
