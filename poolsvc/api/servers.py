"""Servers of the pool as their members and the operators see them, and what these may do with them."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import Field
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.control import ServerState, Validation
from poolsvc import (
    addresses,
    auth,
    issuance,
    onboarding,
    own_account,
    regional,
    removal,
    scoring,
    servers,
    terms,
)
from poolsvc.api.idempotent import idempotent
from poolsvc.api.lookup import server_for, server_to_read
from poolsvc.api.paging import Page, PagingDep
from poolsvc.api.request import (
    Document,
    Line,
    NamePath,
    NowDep,
    PrincipalDep,
    Services,
    ServicesDep,
    SessionDep,
    TextQuery,
)
from poolsvc.api.sights import SightView, sights_of
from poolsvc.auth import Operation, Principal
from poolsvc.budget import Place
from poolsvc.config import Settings
from poolsvc.drawing import is_young
from poolsvc.errors import WrongState
from poolsvc.explain import StageView, expected_at, explain, why_not
from poolsvc.models import Address, HoldKind, Member, Server, Token, TokenKind
from poolsvc.pool import count_until_open, the_pool
from poolsvc.removal import Receipt

router = APIRouter(prefix="/v1")


class ServerRequest(Document):
    name: Line = Field(max_length=200, description="one host label of at most 36 characters, such as alice")
    member: int | None = Field(None, description="whose it is to be; needed by those who act for several")
    addresses: list[Line] = Field(max_length=64, description="the server's IPv4 and IPv6 addresses")
    agentless: bool = Field(
        False, description="the member runs an ACME client and a server of its own choice"
    )


class JoinToken(Document):
    join_token: str = Field(description="shown only now; good for one agent")
    expires_at: datetime
    command: str = Field(description="what to run on the server")


class CertificateView(Document):
    status: str
    serial: str | None
    fingerprint: str | None
    ca: str | None = Field(description="the host of its CA's directory")
    profile: str | None = Field(description="of its CA, that was asked for")
    not_before: datetime | None
    not_after: datetime | None
    renew_at: datetime | None = Field(description="as its CA suggests; empty while it does not")
    window_url: str | None = Field(description="where the CA explains that")
    revoked_at: datetime | None
    error: str | None


class AddressView(Document):
    address: str
    proved_at: datetime | None
    proof_error: str | None
    proof_ends_at: datetime | None = Field(description="unless probes, or a proof, confirm it until then")
    score: float | None = Field(description="by all its monitors together; null until it is admitted")
    shadow_score: float | None = Field(
        description="the same by the scorer on trial, of which nothing follows; null without one"
    )
    score_reason: str = Field(description="why its probes are no full steps, if they are not")
    judged_at: datetime | None = Field(description="when enough monitors last knew it")
    unknown: str | None = Field(
        description="why the pool does not know it now: its own fault, for which nothing changes"
    )
    monitors: list[SightView] = Field(description="as each monitor sees it, those that have a say first")


class WeightView(Document):
    """Of what a server's share of the answers is made, beside its member's and network's other servers."""

    wanted: int = Field(description="its weight, as its member wants it")
    score: float = Field(description="the part of it that its score gives, which grows from 10 to 15")
    capacity: float = Field(description="the part that it answers, by its caps and what comes")
    young: bool = Field(description="whether its account is young: such share a part of the answers together")


class AgentView(Document):
    seen_at: datetime | None
    engine: str
    clock: str
    problem: str | None
    traffic_cap: float | None = Field(description="NTP requests a second that it answers at most")
    traffic: float | None = Field(description="and how many come, as the agent says")
    ke_cap: float | None = Field(description="NTS-KE connections a minute that it takes at most")
    ke_traffic: float | None = Field(description="and how many come, as the agent says")
    validation: Validation = Field(description="how the host answers the CA")


class HoldView(Document):
    """A reason for which it is out of the answer now."""

    kind: HoldKind
    reason: str
    set_at: datetime


class CurrentCertificateView(Document):
    """The certificate that it has, as far as the pool knows, and the next one."""

    serial: str | None
    fingerprint: str | None
    not_after: datetime | None
    renewal_at: datetime | None = Field(
        description="when the next one is ordered; empty while that is under way, and where the member's own account orders"
    )
    ordering: bool = Field(description="whether an order is under way")
    problem: str | None = Field(description="why the last order failed, or does not come on")


class QueueView(Document):
    """Its place among the servers that wait for the CA's limits."""

    position: int = Field(description="the next has 1; everybody's first server goes before anybody's second")
    waiting: int
    turn_at: datetime = Field(description="when its order begins, as things stand")


class ServerView(Document):
    """A server as its member and the operator see it."""

    name: str
    domain: str
    state: ServerState
    state_since: datetime
    leave_at: datetime | None = Field(description="until when the name of a server that leaves lives")
    in_dns: bool = Field(description="whether the SRV answer may hold it now")
    why: str = Field(description="why it is not in DNS: the first stage that is not met; empty when it is")
    stages: list[StageView]
    share: float = Field(description="the part of the pool's answers that name it, from 0 to 1", ge=0, le=1)
    weight: WeightView = Field(description="of what that is made")
    holds: list[HoldView] = Field(description="why it is suspended")
    queue: QueueView | None = Field(description="empty unless its first order waits for the CA's limits")
    expected_at: datetime | None = Field(
        description="when a server on its way into the pool can be in DNS, if nothing fails and the pool is open"
    )
    addresses: list[AddressView]
    agent: AgentView
    agentless: bool
    acme_account: str | None = Field(
        description="the member's own account that orders, in place of the registry's"
    )
    may_order_at: datetime | None = Field(description="from when on it may; empty while that is not known")
    certificate: CurrentCertificateView | None = Field(description="empty before the first one")
    certificates: list[CertificateView]
    receipt: Receipt | None


class ServerSummary(Document):
    """A server in a list."""

    id: int = Field(description="how the log names it")
    name: str
    domain: str
    member: int
    state: ServerState
    state_since: datetime
    in_dns: bool


class ServerCreated(Document):
    server: ServerView
    join: JoinToken | None = Field(description="for the agent; none for a server without one")


@router.get("/servers")
async def list_servers(
    principal: PrincipalDep,
    services: ServicesDep,
    session: SessionDep,
    paging: PagingDep,
    state: ServerState | None = None,
    member: Annotated[int | None, Query(ge=1, le=2**31 - 1)] = None,
    q: TextQuery = None,
) -> Page[ServerSummary]:
    """The servers of one's members, removed ones too; all of them for the pool's staff. `q`: how the name begins."""
    principal.may(Operation.READ_SELF)
    found = select(Server)
    if not principal.reads_pool:
        found = found.where(Server.member_id.in_(principal.acts_for))
    if state is not None:
        found = found.where(Server.state == state)
    if member is not None:
        found = found.where(Server.member_id == member)
    if q is not None:
        found = found.where(Server.name.startswith(q.lower(), autoescape=True))
    rows, further = await paging.rows(session, found, Server.id)
    items = [
        ServerSummary(
            id=row.id,
            name=row.name,
            domain=services.settings.domain_of(row.name),
            member=row.member_id,
            state=row.state,
            state_since=row.state_since,
            in_dns=is_in_dns(row),
        )
        for row in rows
    ]
    return Page(items=items, next=further)


@router.post("/servers", status_code=201)
@idempotent
async def register_server(
    body: ServerRequest, principal: PrincipalDep, services: ServicesDep, session: SessionDep, now: NowDep
) -> ServerCreated:
    """Register a server under a name of the pool; for members."""
    member_id = principal.member_for(Operation.REGISTER_SERVER, body.member)
    await terms.require(session, services.settings, principal.user_id)
    server = await servers.register(
        session,
        services.settings,
        member_id,
        body.name,
        body.addresses,
        now,
        actor=principal.actor,
        agentless=body.agentless,
    )
    join = None if server.agentless else await new_join_token(session, services.settings, server, now)
    return ServerCreated(server=await changed_view(session, services, server, now), join=join)


@router.get("/servers/{name}")
async def read_server(
    name: NamePath, principal: PrincipalDep, services: ServicesDep, session: SessionDep, now: NowDep
) -> ServerView:
    """A server with its stages and why it is, or is not, in DNS; a removed one with its receipt.

    For its agent too.
    """
    server = await server_to_read(session, principal, name, Operation.READ_SERVER)
    return await view_of(session, services, server, now)


@router.delete("/servers/{name}", status_code=202)
async def remove_server(
    name: NamePath,
    principal: PrincipalDep,
    services: ServicesDep,
    session: SessionDep,
    now: NowDep,
    *,
    emergency: bool = False,
) -> ServerView:
    """Take a server out for good. The receipt fills as the steps are done; repeating changes nothing.

    Its name lives on until resolvers have forgotten the SRV. In an `emergency` it does not; for operators.
    """
    operation = Operation.JUDGE_SERVER if emergency else Operation.REMOVE_SERVER
    server = await server_for(session, principal, name, operation)
    reason = removal_reason(server, principal)
    await servers.leave(session, server, actor=principal.actor, reason=reason, now=now, emergency=emergency)
    return await changed_view(session, services, server, now)


def removal_reason(server: Server, principal: Principal) -> str:
    """The reason of a removal for which none was given."""
    return f"removed by its {side_of(server, principal)}"


def side_of(server: Server, principal: Principal) -> str:
    """On whose behalf a server is changed."""
    if principal.server_id is not None:
        return "agent"
    return "member" if server.member_id in principal.members else "operator"


@router.post("/servers/{name}/join-token", status_code=201)
@idempotent
async def renew_join_token(
    name: NamePath, principal: PrincipalDep, services: ServicesDep, session: SessionDep, now: NowDep
) -> JoinToken:
    """A new join token, after the old one expired or the server was installed again."""
    server = await server_for(session, principal, name, Operation.CHANGE_SERVER, staying=True)
    if server.agentless:
        raise WrongState(f"{server.name} was registered to have no agent", remedy="register another name")
    await auth.revoke(session, now, Token.server_id == server.id, Token.kind == TokenKind.JOIN)
    return await new_join_token(session, services.settings, server, now)


@router.post("/servers/{name}/certificate/compromised", status_code=202)
async def revoke_compromised(
    name: NamePath, principal: PrincipalDep, services: ServicesDep, session: SessionDep, now: NowDep
) -> ServerView:
    """The key of a server's certificate is lost or known to others: revoke it, and order one with another key."""
    server = await server_for(session, principal, name, Operation.CHANGE_SERVER)
    issuance.revoke_compromised(server, now)
    return await changed_view(session, services, server, now)


def is_in_dns(server: Server) -> bool:
    return server.state is ServerState.ACTIVE and server.listed_at is not None


async def new_join_token(
    session: AsyncSession, settings: Settings, server: Server, now: datetime
) -> JoinToken:
    expires = now + settings.join_token_life
    _, token = await auth.issue(session, TokenKind.JOIN, now=now, server_id=server.id, expires_at=expires)
    command = f"pool-agent join {settings.public_url} --token {token}"
    return JoinToken(join_token=token, expires_at=expires, command=command)


def address_view(settings: Settings, row: Address, sights: Sequence[SightView] = ()) -> AddressView:
    return AddressView(
        address=row.address,
        proved_at=row.proved_at,
        proof_error=row.proof_error,
        proof_ends_at=addresses.proof_ends_at(row, settings),
        score=row.score,
        shadow_score=row.shadow_score,
        score_reason=row.step_reason,
        judged_at=row.judged_at,
        unknown=row.unknown,
        monitors=list(sights),
    )


async def stages_of(
    session: AsyncSession, settings: Settings, server: Server, place: Place | None
) -> list[StageView]:
    """What `explain` says of a server in its pool, and at its place in the queue."""
    pool = await the_pool(session, settings)
    active = await count_until_open(session, pool, settings)
    return explain(server, pool, settings, active=active, place=place)


async def changed_view(
    session: AsyncSession, services: Services, server: Server, now: datetime
) -> ServerView:
    """A server that this transaction has changed, with all that belongs to it now."""
    await session.flush()
    return await view_of(session, services, await servers.get(session, server.id), now)


async def _share(
    session: AsyncSession, services: Services, server: Server, member: Member, now: datetime
) -> float:
    if not is_in_dns(server):
        return 0.0
    odds = await services.odds.get(session)
    return regional.chance(odds, server, member.created_at, services.settings, now)


def _weight(server: Server, member: Member, settings: Settings, now: datetime) -> WeightView:
    best = scoring.best(row.score for row in servers.publishable(server))
    return WeightView(
        wanted=server.weight,
        score=scoring.share(best),
        capacity=scoring.capacity(server.traffic_cap, server.traffic, server.ke_cap, server.ke_traffic),
        young=is_young(member.created_at, regional.rules_of(settings), now),
    )


def _certificate(server: Server) -> CurrentCertificateView | None:
    if (newest := servers.newest_certificate(server)) is None:
        return None
    is_ordering = issuance.open_order(server) is not None
    return CurrentCertificateView(
        serial=newest.serial,
        fingerprint=newest.fingerprint,
        not_after=newest.not_after,
        renewal_at=None if is_ordering or own_account.is_used(server) else server.order_due_at,
        ordering=is_ordering,
        problem=server.orders[-1].error,
    )


async def view_of(session: AsyncSession, services: Services, server: Server, now: datetime) -> ServerView:
    settings = services.settings
    place = await onboarding.place_of(session, settings, server)
    views = await stages_of(session, settings, server, place)
    member = await session.get_one(Member, server.member_id)
    sights = await sights_of(session, server)
    return ServerView(
        name=server.name,
        domain=settings.domain_of(server.name),
        state=server.state,
        state_since=server.state_since,
        leave_at=server.leave_at,
        in_dns=is_in_dns(server),
        why=why_not(views, server),
        stages=views,
        share=await _share(session, services, server, member, now),
        weight=_weight(server, member, settings, now),
        holds=[HoldView.model_validate(hold) for hold in servers.open_holds(server)],
        queue=None if place is None else QueueView.model_validate(place),
        expected_at=expected_at(server, await the_pool(session, settings), settings, place, now),
        addresses=[address_view(settings, row, sights.get(row.id, ())) for row in server.addresses],
        agent=AgentView(
            seen_at=server.agent_seen_at,
            engine=server.agent_engine,
            clock=server.agent_clock,
            problem=server.agent_problem,
            traffic_cap=server.traffic_cap,
            traffic=server.traffic,
            ke_cap=server.ke_cap,
            ke_traffic=server.ke_traffic,
            validation=server.validation,
        ),
        agentless=server.agentless,
        acme_account=server.own_account_uri,
        may_order_at=own_account.may_order_at(server),
        certificate=_certificate(server),
        certificates=[CertificateView.model_validate(order) for order in server.orders],
        receipt=removal.receipt(server, settings),
    )
