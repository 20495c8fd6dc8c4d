"""What a member may choose of its server, as one document with a tag."""

from fastapi import APIRouter, Response
from pydantic import Field

from poolsvc import addresses, issuance
from poolsvc.api.etags import NOT_MODIFIED, IfMatch, IfNoneMatch, etag_of, require_match, tagged
from poolsvc.api.lookup import server_for, server_to_read
from poolsvc.api.request import Document, Line, NamePath, NowDep, PrincipalDep, ServicesDep, SessionDep
from poolsvc.auth import Operation
from poolsvc.models import Server

router = APIRouter(prefix="/v1")
MAX_WEIGHT = 1000


class SettingsView(Document):
    """A server's settings. The answer's `ETag` names this very state of them."""

    weight: int = Field(description="the share of clients, relative to other servers")
    ipv4: bool = Field(description="whether addresses of this family are published")
    ipv6: bool
    public: bool = Field(description="whether everybody may see the server's page")
    addresses: list[str]
    short_lived: bool = Field(
        description="whether its certificates live for days, and die soon after the server was removed"
    )
    dns_01: bool = Field(
        description="whether the registry answers the CA, in DNS, and not the server's host on port 80"
    )
    waive_source: bool = Field(description="proof calls may come from elsewhere (NAT); the operator's to set")
    traffic_cap: float | None = Field(
        description="NTP requests a second that it answers at most; the agent's to set, [limits] ntp_pps"
    )
    ke_cap: float | None = Field(
        description="NTS-KE connections a minute that it takes at most; the agent's to set, [limits] ke_per_minute"
    )


class SettingsChange(Document):
    """What is to be different; what is left out stays. `addresses` is the whole list."""

    weight: int | None = Field(None, ge=1, le=MAX_WEIGHT, strict=True)
    ipv4: bool | None = Field(None, strict=True)
    ipv6: bool | None = Field(None, strict=True)
    public: bool | None = Field(None, strict=True)
    addresses: list[Line] | None = Field(None, max_length=64)
    short_lived: bool | None = Field(None, strict=True)
    dns_01: bool | None = Field(None, strict=True)
    waive_source: bool | None = Field(None, strict=True)


def _view(server: Server) -> SettingsView:
    return SettingsView(
        weight=server.weight,
        ipv4=server.ipv4,
        ipv6=server.ipv6,
        public=server.public,
        addresses=[row.address for row in server.addresses],
        short_lived=server.short_lived,
        dns_01=server.dns_01,
        waive_source=server.waive_source,
        traffic_cap=server.traffic_cap,
        ke_cap=server.ke_cap,
    )


@router.get("/servers/{name}/settings", response_model=SettingsView, responses=NOT_MODIFIED)
async def read_settings(
    name: NamePath,
    principal: PrincipalDep,
    session: SessionDep,
    response: Response,
    if_none_match: IfNoneMatch = None,
) -> SettingsView | Response:
    """A server's settings, with their tag."""
    server = await server_to_read(session, principal, name)
    return tagged(_view(server), response, if_none_match)


@router.patch("/servers/{name}/settings")
async def change_settings(
    name: NamePath,
    body: SettingsChange,
    principal: PrincipalDep,
    services: ServicesDep,
    session: SessionDep,
    now: NowDep,
    response: Response,
    if_match: IfMatch = None,
) -> SettingsView:
    """Change some settings; with `If-Match` only if they still are what the caller has read."""
    server = await server_for(session, principal, name, Operation.CHANGE_SERVER, staying=True)
    require_match(if_match, etag_of(_view(server)))
    if body.waive_source is not None and body.waive_source != server.waive_source:
        principal.may(Operation.JUDGE_SERVER, server=server)
        server.waive_source = body.waive_source
    if body.short_lived is not None:
        await issuance.set_short_lived(session, services.settings, server, wanted=body.short_lived)
    if body.dns_01 is not None:
        issuance.set_dns_01(services.settings, server, wanted=body.dns_01)
    if body.weight is not None:
        server.weight = body.weight
    if body.public is not None:
        server.public = body.public
    await addresses.change(
        session,
        services.settings,
        server,
        listed=body.addresses,
        ipv4=server.ipv4 if body.ipv4 is None else body.ipv4,
        ipv6=server.ipv6 if body.ipv6 is None else body.ipv6,
        actor=principal.actor,
        now=now,
    )
    view = _view(server)
    response.headers["ETag"] = etag_of(view)
    return view
