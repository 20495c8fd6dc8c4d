"""What is done for a server at once, because its people or its agent ask."""

from fastapi import APIRouter

from nts_core.control import CheckAnswer
from poolsvc import inspection, renewals
from poolsvc.api.idempotent import idempotent
from poolsvc.api.lookup import server_for
from poolsvc.api.request import CallerDep, NamePath, NowDep, PrincipalDep, ServicesDep, SessionDep
from poolsvc.api.servers import ServerView, changed_view
from poolsvc.auth import Operation

router = APIRouter(prefix="/v1")


@router.post("/servers/{name}/renewal", status_code=202)
@idempotent
async def order_certificate(
    name: NamePath, principal: PrincipalDep, services: ServicesDep, session: SessionDep, now: NowDep
) -> ServerView:
    """Order a certificate now, once a day at most; `certificate` then says how that goes on. For its agent too."""
    server = await server_for(session, principal, name, Operation.TEND_SERVER, staying=True)
    await renewals.order_now(session, services.settings, server, actor=principal.actor, now=now)
    return await changed_view(session, services, server, now)


@router.post("/servers/{name}/check")
async def check_server(name: NamePath, caller: CallerDep, services: ServicesDep, now: NowDep) -> CheckAnswer:
    """Look at a server from outside, which takes up to 20 s; nothing follows from what is found. For its agent too.

    Looked at are addresses that are proved, or that the agent called from within the last hour.
    """
    with services.inspector.place():
        async with services.database.transaction(caller.actor) as session:
            server = await server_for(session, caller, name, Operation.TEND_SERVER, staying=True)
            await inspection.begin(session, services.settings, server, now)
        return CheckAnswer(await services.inspector.inspect(server, now))
