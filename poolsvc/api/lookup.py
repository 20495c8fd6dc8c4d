"""The server that a path names, for who may do with it what they ask."""

from sqlalchemy.ext.asyncio import AsyncSession

from poolsvc import servers
from poolsvc.auth import Operation, Principal
from poolsvc.errors import Gone, WrongState
from poolsvc.models import ENDED_STATES, Server


async def server_to_read(session: AsyncSession, principal: Principal, name: str) -> Server:
    """As it is. Raises NotFound, Forbidden."""
    server = await servers.find(session, name)
    principal.may(Operation.READ_SERVER, server=server)
    return server


async def server_for(
    session: AsyncSession, principal: Principal, name: str, operation: Operation, *, staying: bool = False
) -> Server:
    """Locked for a change; `staying`: one that is not to leave. Raises NotFound, Forbidden, Gone, WrongState."""
    found = await servers.find(session, name)
    principal.may(operation, server=found)
    server = await servers.get(session, found.id)
    # Once more: it may have become another member's while we waited for it.
    principal.may(operation, server=server)
    if staying:
        refuse_gone(server)
    return server


def refuse_gone(server: Server) -> None:
    """Raise Gone for a server that is out for good, WrongState for one that is to leave on a later day."""
    if servers.may_stay(server):
        raise WrongState(f"{server.name} is to leave", remedy="cancel that first: DELETE .../leaving")
    if server.state in ENDED_STATES:
        raise Gone(f"{server.name} is {server.state}", remedy="register another name")
