"""The JSON API, version 1. Requests and answers are documents; decisions live in the modules behind it."""

import base64
import binascii
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.control import (
    AddressAssignment,
    AgentReport,
    Assignment,
    JoinAnswer,
    JoinRequest,
    ProofAnswer,
    ProofRequest,
    ServerState,
)
from poolsvc import auth, issuance, members, proofs, removal, servers
from poolsvc.auth import Operation, Principal
from poolsvc.config import Settings
from poolsvc.db import Database
from poolsvc.errors import Gone, InvalidDocument
from poolsvc.explain import StageView, explain, why_not
from poolsvc.models import Member, Server, TokenKind
from poolsvc.removal import Receipt
from poolsvc.worker import Health

router = APIRouter(prefix="/v1")


@dataclass(frozen=True, slots=True)
class Services:
    """What the application lends to every request."""

    settings: Settings
    database: Database
    health: Health


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(_services)]


async def _session(services: ServicesDep) -> AsyncIterator[AsyncSession]:
    """One request is one transaction: it commits when the endpoint returns and rolls back when it raises."""
    async with services.database.transaction() as session:
        yield session


# Scope "function": the transaction has ended before the answer leaves, so an answer never promises too much.
SessionDep = Annotated[AsyncSession, Depends(_session, scope="function")]


def _now() -> datetime:
    return datetime.now(UTC)


NowDep = Annotated[datetime, Depends(_now)]
_bearer = HTTPBearer(auto_error=False, description="an operator's, member's, agent's or join token")


async def _principal(
    session: SessionDep,
    now: NowDep,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Principal:
    return await auth.authenticate(session, credentials.credentials if credentials else None, now)


PrincipalDep = Annotated[Principal, Depends(_principal)]
# Ed25519 points of small order: one constant signature of theirs fits every statement.
_SMALL_ORDER = frozenset(
    map(
        bytes.fromhex,
        (
            "00" * 32,
            "01" + "00" * 31,
            "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
            "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
            "ec" + "ff" * 30 + "7f",
            "ed" + "ff" * 30 + "7f",
            "ee" + "ff" * 30 + "7f",
        ),
    )
)
NamePath = Annotated[str, Path(max_length=64)]


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", from_attributes=True)


class MemberRequest(_Document):
    name: str = Field(max_length=200, description="display name; may be shown publicly")


class MemberCreated(_Document):
    id: int
    name: str
    token: str = Field(description="shown only now")


class ServerRequest(_Document):
    name: str = Field(max_length=200, description="one host label, such as alice")
    addresses: list[str] = Field(max_length=64, description="the server's IPv4 and IPv6 addresses")


class JoinToken(_Document):
    join_token: str = Field(description="shown only now; good for one agent")
    expires_at: datetime
    command: str = Field(description="what to run on the server")


class CertificateView(_Document):
    status: str
    serial: str | None
    fingerprint: str | None
    not_before: datetime | None
    not_after: datetime | None
    revoked_at: datetime | None
    error: str | None


class AddressView(_Document):
    address: str
    proved_at: datetime | None
    proof_error: str | None
    score: float | None


class AgentView(_Document):
    seen_at: datetime | None
    engine: str
    clock: str
    problem: str | None


class ServerView(_Document):
    """A server as its member and the operator see it."""

    name: str
    domain: str
    state: ServerState
    state_since: datetime
    in_dns: bool = Field(description="whether the SRV answer may hold it now")
    why: str = Field(description="why it is not in DNS: the first stage that is not met; empty when it is")
    stages: list[StageView]
    addresses: list[AddressView]
    agent: AgentView
    certificates: list[CertificateView]
    receipt: Receipt | None


class ServerCreated(_Document):
    server: ServerView
    join: JoinToken


class PoolView(_Document):
    """What everybody may know of the pool."""

    pool: str
    servers_domain: str
    ke_port: int
    opened_at: datetime | None
    active_servers: int
    quorum: str
    allow_private_addresses: bool
    alarms: list[str]


@router.get("/pool")
async def read_pool(services: ServicesDep, session: SessionDep) -> PoolView:
    """The pool and the state of its own parts; needs no token."""
    settings, health = services.settings, services.health
    pool = await servers.the_pool(session, settings)
    alarms = [f"{part}: {text}" for part, text in (("DNS", health.dns), ("CA", health.ca)) if text]
    alarms += [f"worker: {work.strip('_')} failed with {error}" for work, error in health.work.items()]
    if kept := await servers.count_kept_low(session):
        alarms.append(f"scores: {kept} failing servers are kept listed, since too few others are active")
    return PoolView(
        pool=settings.pool,
        servers_domain=settings.servers_domain,
        ke_port=settings.ports.ke,
        opened_at=pool.opened_at,
        active_servers=await servers.count_active(session),
        quorum="bootstrap",
        allow_private_addresses=settings.allow_private_addresses,
        alarms=alarms,
    )


@router.post("/members", status_code=201)
async def create_member(
    body: MemberRequest, principal: PrincipalDep, session: SessionDep, now: NowDep
) -> MemberCreated:
    """Create a member; for operators."""
    principal.may(Operation.CREATE_MEMBER)
    member, token = await members.create(session, body.name, now)
    return MemberCreated(id=member.id, name=member.name, token=token)


@router.post("/servers", status_code=201)
async def register_server(
    body: ServerRequest, principal: PrincipalDep, services: ServicesDep, session: SessionDep, now: NowDep
) -> ServerCreated:
    """Register a server under a name of the pool; for members."""
    principal.may(Operation.REGISTER_SERVER)
    member = await session.get_one(Member, principal.member_id)
    server = await servers.register(session, services.settings, member, body.name, body.addresses, now)
    join = await _join_token(session, services.settings, server, now)
    return ServerCreated(server=await _view(session, services.settings, server.id), join=join)


@router.get("/servers/{name}")
async def read_server(
    name: NamePath, principal: PrincipalDep, services: ServicesDep, session: SessionDep
) -> ServerView:
    """A server with its stages and why it is, or is not, in DNS; a removed one with its receipt."""
    server = await servers.find(session, name)
    principal.may(Operation.READ_SERVER, server)
    return await _view(session, services.settings, server.id)


@router.delete("/servers/{name}", status_code=202)
async def remove_server(
    name: NamePath, principal: PrincipalDep, services: ServicesDep, session: SessionDep, now: NowDep
) -> ServerView:
    """Take a server out for good. The receipt fills as the steps are done; repeating changes nothing."""
    found = await servers.find(session, name)
    principal.may(Operation.REMOVE_SERVER, found)
    server = await servers.get(session, found.id)
    await servers.leave(
        session, server, actor=principal.actor, reason=f"removed by {principal.kind}", now=now
    )
    return await _view(session, services.settings, server.id)


@router.post("/servers/{name}/join-token", status_code=201)
async def renew_join_token(
    name: NamePath, principal: PrincipalDep, services: ServicesDep, session: SessionDep, now: NowDep
) -> JoinToken:
    """A new join token, after the old one expired or the server was installed again."""
    server = await servers.find(session, name)
    principal.may(Operation.REGISTER_SERVER)
    principal.may(Operation.READ_SERVER, server)
    _refuse_gone(server)
    await auth.revoke_server_tokens(session, server.id, TokenKind.JOIN, now)
    return await _join_token(session, services.settings, server, now)


@router.post("/agent/join")
async def join(
    body: JoinRequest, principal: PrincipalDep, services: ServicesDep, session: SessionDep, now: NowDep
) -> JoinAnswer:
    """An agent joins with its join token and its own public key; the token is useless afterwards."""
    principal.may(Operation.JOIN)
    server = await servers.get(session, principal.server_id or 0)
    _refuse_gone(server)
    _check_public_key(body.public_key)
    await auth.use_up(session, principal, now)
    await auth.revoke_server_tokens(session, server.id, TokenKind.AGENT, now)
    server.agent_key, server.joined_at = body.public_key, now
    issuance.start_anew(server, now)
    token = await auth.issue(session, TokenKind.AGENT, now=now, server_id=server.id)
    settings = services.settings
    return JoinAnswer(
        token=token, pool=settings.pool, server=server.name, domain=settings.domain_of(server.name)
    )


def _check_public_key(text: str) -> None:
    try:
        key = base64.b64decode(text, validate=True)
        if len(key) == 32 and key[:31] + bytes((key[31] & 0x7F,)) not in _SMALL_ORDER:
            return
    except (binascii.Error, ValueError):
        pass
    raise InvalidDocument(
        "the public key is not 32 octets of base64", remedy="let pool-agent join", field="public_key"
    )


@router.post("/agent/proof")
async def request_proof(
    body: ProofRequest,
    request: Request,
    principal: PrincipalDep,
    services: ServicesDep,
    session: SessionDep,
    now: NowDep,
) -> ProofAnswer:
    """Sent from one of the server's addresses: the registry connects back to it and expects the nonce signed."""
    principal.may(Operation.AGENT)
    server = await servers.get(session, principal.server_id or 0)
    _refuse_gone(server)
    source = request.client.host if request.client else ""
    nonce = await proofs.call(session, services.settings, server, body.address, source, now)
    return ProofAnswer(address=body.address, nonce=nonce)


@router.post("/agent/sync")
async def sync(
    report: AgentReport, principal: PrincipalDep, services: ServicesDep, session: SessionDep, now: NowDep
) -> Assignment:
    """The agent reports, and learns what the registry wants of it. Its word raises no status."""
    principal.may(Operation.AGENT)
    server = await servers.get(session, principal.server_id or 0)
    if server.state is ServerState.REMOVED:
        raise Gone(f"{server.name} has left the pool", remedy="the agent can be stopped and removed")
    settings = services.settings
    server.agent_seen_at = now
    server.agent_engine = _clean(report.engine, 100)
    server.agent_clock = _clean(report.clock, 300)
    server.agent_problem = _clean(report.problem, 1000) if report.problem else None
    if report.csr is not None:
        issuance.take_csr(settings, server, report.csr.order, report.csr.pem, now)
    issuance.note_serving(server, report.serving, now)
    proofs.note_serving(server, report.serving, now)
    return await _assignment(session, settings, server, now)


def _clean(text: str, limit: int) -> str:
    """What an agent says, as printable text of bounded length."""
    return "".join(character if character.isprintable() else " " for character in text)[:limit]


def _refuse_gone(server: Server) -> None:
    if server.state in (ServerState.LEAVING, ServerState.REMOVED):
        raise Gone(f"{server.name} is {server.state}", remedy="register another name")


async def _join_token(session: AsyncSession, settings: Settings, server: Server, now: datetime) -> JoinToken:
    expires = now + settings.join_token_life
    token = await auth.issue(session, TokenKind.JOIN, now=now, server_id=server.id, expires_at=expires)
    command = f"pool-agent join {settings.public_url} --token {token}"
    return JoinToken(join_token=token, expires_at=expires, command=command)


async def _assignment(session: AsyncSession, settings: Settings, server: Server, now: datetime) -> Assignment:
    order = issuance.open_order(server)
    pool = await servers.the_pool(session, settings)
    views = explain(server, pool, settings, active=await servers.count_active(session))
    busy = order is not None or server.state in (ServerState.REGISTERED, ServerState.LEAVING)
    interval = settings.policy.agent_interval
    return Assignment(
        pool=settings.pool,
        server=server.name,
        domain=settings.domain_of(server.name),
        state=server.state,
        addresses=tuple(
            AddressAssignment(row.address, row.proved_at is not None, proofs.wants_call(row, now))
            for row in server.addresses
        ),
        http_port=settings.ports.http,
        ke_port=settings.ports.ke,
        poll_after=min(interval, 2 * settings.policy.tick) if busy else interval,
        csr_for=order.id if order is not None and issuance.wants_csr(server, order) else None,
        challenges=issuance.challenges(server),
        certificate=issuance.newest(server),
        why=why_not(views, server),
    )


async def _view(session: AsyncSession, settings: Settings, server_id: int) -> ServerView:
    server = await servers.get(session, server_id)
    await session.refresh(server, ["addresses", "orders", "holds", "stages"])
    pool = await servers.the_pool(session, settings)
    views = explain(server, pool, settings, active=await servers.count_active(session))
    return ServerView(
        name=server.name,
        domain=settings.domain_of(server.name),
        state=server.state,
        state_since=server.state_since,
        in_dns=server.state is ServerState.ACTIVE and server.listed_at is not None,
        why=why_not(views, server),
        stages=views,
        addresses=[AddressView.model_validate(row) for row in server.addresses],
        agent=AgentView(
            seen_at=server.agent_seen_at,
            engine=server.agent_engine,
            clock=server.agent_clock,
            problem=server.agent_problem,
        ),
        certificates=[CertificateView.model_validate(order) for order in server.orders],
        receipt=removal.receipt(server, settings),
    )
