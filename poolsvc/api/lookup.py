"""The server that a path names, for who may do with it what they ask."""

from sqlalchemy.ext.asyncio import AsyncSession

from poolsvc import members, servers
from poolsvc.auth import Operation, Principal, refuse_when_blocked
from poolsvc.errors import Gone, WrongState
from poolsvc.models import ENDED_STATES, MemberStatus, Server


async def server_to_read(
    session: AsyncSession,
    principal: Principal,
    name: str,
    operation: Operation = Operation.READ_SERVER_DETAILS,
) -> Server:
    """As it is. Raises NotFound, Forbidden."""
    server = await servers.find(session, name)
    principal.may(operation, server=server)
    return server


async def server_for(
    session: AsyncSession, principal: Principal, name: str, operation: Operation, *, staying: bool = False
) -> Server:
    """Locked for a change; `staying`: one that is not to leave.

    Raises NotFound, Forbidden, MemberBlocked, Gone, WrongState.
    """
    found = await servers.find(session, name)
    principal.may(operation, server=found)
    server = await servers.get(session, found.id)
    # Once more: it may have become another member's while we waited for it.
    principal.may(operation, server=server)
    if principal.server_id is not None:
        # An agent may no more than the people whose it is.
        member = await members.get(session, server.member_id)
        if member.status is not MemberStatus.ACTIVE:
            refuse_when_blocked(operation)
    if staying:
        refuse_gone(server)
    return server


def refuse_gone(server: Server) -> None:
    """Raise Gone for a server that is out for good, WrongState for one that is to leave on a later day."""
    if servers.may_stay(server):
        raise WrongState(f"{server.name} is to leave", remedy="cancel that first: DELETE .../leaving")
    if server.state in ENDED_STATES:
        raise Gone(f"{server.name} is {server.state}", remedy="register another name")
