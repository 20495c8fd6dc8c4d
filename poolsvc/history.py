"""Reading the audit log: which events are whose, and how those who made them are named.

What concerns a server is read by the member whose it is now: its history goes with it. The rest of a member's log
stays the member's.
"""

from collections.abc import Collection, Mapping, Sequence

from sqlalchemy import ColumnElement, and_, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from poolsvc.models import Event, Membership, Server, User

_OPERATOR = "operator"
_PERSON = "user "


def of_member(member_id: int) -> ColumnElement[bool]:
    """The condition on events of a member and of the servers that are its own now."""
    own = select(Server.id).where(Server.member_id == member_id)
    return or_(and_(Event.member_id == member_id, Event.server_id.is_(None)), Event.server_id.in_(own))


async def team(session: AsyncSession, member_id: int) -> frozenset[int]:
    """The people whom a member knows by their ids: its own."""
    found = select(Membership.user_id).where(Membership.member_id == member_id)
    return frozenset(await session.scalars(found))


async def names_for(
    session: AsyncSession, events: Sequence[Event], known: Collection[int]
) -> Mapping[str, str]:
    """How readers who are not staff see the actors of events: which of the staff, then or now, it was is not said.

    People in `known` are named by their ids, whatever else they are.
    """
    actors = {event.actor for event in events}
    people = {int(actor.removeprefix(_PERSON)) for actor in actors if actor.startswith(_PERSON)}
    staff = set(
        await session.scalars(select(User.id).where(User.id.in_(people - set(known)), User.was_staff))
    )
    hidden = {f"{_PERSON}{identifier}" for identifier in staff} | {"console"}
    return {actor: _OPERATOR if actor in hidden else actor for actor in actors}
