"""Which regions the pool answers for, and how they came out: switched on by an operator, once they have the servers."""

from datetime import timedelta

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.srv import targets_that_fit
from poolsvc.config import Settings
from poolsvc.drawing import Rules
from poolsvc.models import Region


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
