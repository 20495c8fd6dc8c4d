"""What agents say, and what they are told."""

import base64
import binascii
import json
import math
import random
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from typing import Annotated, Any, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from fastapi import APIRouter
from pydantic import AfterValidator
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.control import (
    AddressAssignment,
    AgentReport,
    Assignment,
    JoinAnswer,
    JoinRequest,
    ProofAnswer,
    ProofRequest,
    ProofWay,
    RejoinChallenge,
    RejoinQuestion,
    RejoinRequest,
    ServerState,
    join_statement,
    rejoin_statement,
)
from nts_core.errors import printable
from poolsvc import auth, issuance, onboarding, own_account, proofs, servers, troubles, validation
from poolsvc.api.lookup import refuse_gone
from poolsvc.api.request import (
    CredentialsDep,
    NowDep,
    PrincipalDep,
    Services,
    ServicesDep,
    SessionDep,
    SourceDep,
)
from poolsvc.api.servers import is_in_dns, stages_of
from poolsvc.auth import Operation
from poolsvc.config import Settings
from poolsvc.db import LEASE, act_as
from poolsvc.derived import Purpose
from poolsvc.errors import Gone, InvalidDocument, NotFound, Unauthenticated
from poolsvc.explain import why_not
from poolsvc.models import Address, Order, Server, Token, TokenKind
from poolsvc.notices import NoticeKind

router = APIRouter(prefix="/v1")
_REJOIN_LIFE = timedelta(minutes=2)
# Seconds between the reports of an agent whose order has just begun.
_QUICK = 0.05
# And of one whose order begins within a lease.
_NEAR = 0.2
# Requests a second: more than any wire carries. Comparisons with it also fail for what is not a number.
_MAX_TRAFFIC = 1e9
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


def _whole(document: Any) -> Any:
    """Refuse half a character (a lone surrogate): JSON can name one, and nothing can write it down."""
    json.dumps(asdict(document), ensure_ascii=False).encode()
    return document


T = TypeVar("T")
# A document as agents send it. They are dataclasses that know nothing of what a text may hold.
Said = Annotated[T, AfterValidator(_whole)]


@router.post("/agent/join")
async def join(
    body: Said[JoinRequest],
    principal: PrincipalDep,
    credentials: CredentialsDep,
    services: ServicesDep,
    session: SessionDep,
    now: NowDep,
) -> JoinAnswer:
    """An agent joins with its join token and its own public key; the token is useless afterwards.

    But for that very agent: the registry may have ended between the commit and the answer.
    """
    if not principal.used:
        principal.may(Operation.JOIN)
    server = await servers.get(session, principal.server_id or 0)
    if not (principal.used and credentials and _is_the_same(server, body, credentials.credentials)):
        principal.may(Operation.JOIN)
        refuse_gone(server)
        _check_public_key(body.public_key)
        await auth.use_up(session, principal, now)
        server.agent_key, server.joined_at = body.public_key, now
        issuance.start_anew(server, now)
        await servers.tell(session, server, NoticeKind.JOINED, now=now)
    return await _let_in(session, services.settings, server, now)


async def _let_in(session: AsyncSession, settings: Settings, server: Server, now: datetime) -> JoinAnswer:
    """A new token for the server's agent; those before it are useless from now on."""
    await auth.revoke(session, now, Token.server_id == server.id, Token.kind == TokenKind.AGENT)
    _, token = await auth.issue(session, TokenKind.AGENT, now=now, server_id=server.id)
    return JoinAnswer(
        token=token, pool=settings.pool, server=server.name, domain=settings.domain_of(server.name)
    )


def _is_the_same(server: Server, body: JoinRequest, token: str) -> bool:
    """Whether the agent that joined with this token asks once more, and holds its key."""
    statement = join_statement(token=token, public_key=body.public_key)
    return body.public_key == server.agent_key and _is_signed(body.public_key, body.signature, statement)


def _is_signed(public_key: str, signature: str, statement: bytes) -> bool:
    try:
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(public_key))
        key.verify(base64.b64decode(signature, validate=True), statement)
    except (InvalidSignature, ValueError):
        return False
    return True


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


@router.post("/agent/rejoin-challenge")
async def ask_to_rejoin(body: Said[RejoinQuestion], services: ServicesDep, now: NowDep) -> RejoinChallenge:
    """Something to sign for an agent whose token is good no more. Says nothing of whether there is such a server."""
    name = body.server[:64].lower()
    return RejoinChallenge(services.key.challenge(Purpose.REJOIN, name, now + _REJOIN_LIFE))


@router.post("/agent/rejoin")
async def rejoin(
    body: Said[RejoinRequest], services: ServicesDep, session: SessionDep, now: NowDep
) -> JoinAnswer:
    """A new token for the agent that holds the key which joined; its certificate and orders stay.

    So a registry that was restored, and has revoked every token, is joined again without hands.
    """
    settings, name = services.settings, body.server[:64].lower()
    server = await _server_of_key(session, settings, name, body)
    if server is None or not services.key.is_challenge(Purpose.REJOIN, name, body.nonce, now):
        raise Unauthenticated(
            "the signature is not that of the agent which joined, or too old",
            remedy="ask for a new join token: POST /v1/servers/NAME/join-token",
        )
    if server.state is ServerState.REMOVED:
        raise Gone(f"{server.name} has left the pool", remedy="the agent can be stopped and removed")
    act_as(session, f"agent {server.id}")
    return await _let_in(session, settings, server, now)


async def _server_of_key(
    session: AsyncSession, settings: Settings, name: str, body: RejoinRequest
) -> Server | None:
    """The server whose agent made the signature, if any."""
    try:
        server = await servers.get(session, (await servers.find(session, name)).id)
        statement = rejoin_statement(pool=settings.pool, server=server.name, nonce=body.nonce)
    except (NotFound, UnicodeEncodeError):
        return None
    return server if _is_signed(server.agent_key or "", body.signature, statement) else None


@router.post("/agent/proof")
async def request_proof(
    body: Said[ProofRequest],
    source: SourceDep,
    principal: PrincipalDep,
    services: ServicesDep,
    session: SessionDep,
    now: NowDep,
) -> ProofAnswer:
    """Sent from one of the server's addresses: the registry connects back to it and expects the nonce signed."""
    principal.may(Operation.AGENT)
    server = await servers.get(session, principal.server_id or 0)
    refuse_gone(server)
    nonce = await proofs.call(session, services.settings, server, body.address, source, now, by=_way(body.by))
    return ProofAnswer(address=body.address, nonce=nonce)


def _way(text: str) -> ProofWay:
    try:
        return ProofWay(text)
    except ValueError:
        raise InvalidDocument(
            f"an address is proved by {' or '.join(ProofWay)}", remedy="update pool-agent", field="by"
        ) from None


@router.post("/agent/sync")
async def sync(
    report: Said[AgentReport],
    principal: PrincipalDep,
    services: ServicesDep,
    session: SessionDep,
    now: NowDep,
) -> Assignment:
    """The agent reports, and learns what the registry wants of it. Its word raises no status."""
    principal.may(Operation.AGENT)
    server, is_full = await servers.get_reporting(session, principal.server_id or 0)
    if server.state is ServerState.REMOVED:
        raise Gone(f"{server.name} has left the pool", remedy="the agent can be stopped and removed")
    settings = services.settings
    server.agent_seen_at = now
    server.agent_engine = printable(report.engine, 100)
    server.agent_clock = printable(report.clock, 300)
    problem = printable(report.problem, 1000) if report.problem else None
    await troubles.note_report(session, server, problem, now)
    server.traffic_cap, server.traffic = _figure(report.traffic_cap), _figure(report.traffic)
    server.ke_cap, server.ke_traffic = _figure(report.ke_cap), _figure(report.ke_traffic)
    account, refusal = report.account_uri, own_account.refusal(settings, server, report.account_uri)
    if refusal is not None:
        account = server.own_account_uri  # as before: what else the agent says counts all the same
    if not server.leave_final:
        issuance.note_agent(settings, server, validation.said(report.validation), account, now)
    if report.csr is not None:
        await issuance.take_csr(session, settings, server, report.csr.order, report.csr.pem, now)
    issuance.note_serving(server, report.serving, now)
    proofs.note_serving(server, report.serving, now)
    why = "" if is_full and is_in_dns(server) else await _why(session, settings, server)
    assignment = await _assignment(session, services, server, why, now)
    if refusal is None:
        return assignment
    # Another account may: the one that CAA names.
    return replace(assignment, account_refused=refusal.detail, may_order=False)


def _figure(value: float | None) -> float | None:
    """How many come, or may come, as an agent says; None when it cannot be."""
    return value if value is not None and 0 <= value <= _MAX_TRAFFIC else None


async def _why(session: AsyncSession, settings: Settings, server: Server) -> str:
    await session.refresh(server, ["holds", "stages"])
    place = await onboarding.place_of(session, settings, server)
    return why_not(await stages_of(session, settings, server, place), server)


async def _assignment(
    session: AsyncSession, services: Services, server: Server, why: str, now: datetime
) -> Assignment:
    settings = services.settings
    order = issuance.open_order(server)
    is_new = server.state is ServerState.REGISTERED and server.burnt_at is None
    leaves_now = server.state is ServerState.LEAVING and server.leave_at is None
    busy = order is not None or is_new or leaves_now
    interval = _interval(settings, (await services.census.get(session)).reporting)
    return Assignment(
        pool=settings.pool,
        server=server.name,
        domain=settings.domain_of(server.name),
        state=server.state,
        addresses=tuple(
            AddressAssignment(row.address, row.proved_at is not None, _calls(settings, server, row, now))
            for row in server.addresses
        ),
        http_port=settings.ports.http,
        ke_port=settings.ports.ke,
        poll_after=min(interval, _pace(server, order, now), *([2 * settings.policy.tick] if busy else [])),
        csr_for=order.id if order is not None and issuance.wants_csr(server, order) else None,
        challenges=issuance.challenges(server),
        certificate=issuance.newest(server),
        why=why,
        tls_port=settings.ports.tls,
        tls_challenges=issuance.tls_challenges(server),
        may_order=not leaves_now and _may_order(server, now),
        in_dns=validation.is_in_dns(settings, server),
        seen=servers.seen_certificate(server),
    )


def _may_order(server: Server, now: datetime) -> bool:
    begin = own_account.may_order_at(server)
    return begin is not None and begin <= now


def _pace(server: Server, order: Order | None, now: datetime) -> float:
    """Seconds between the reports of an agent whose order is near: few far from it, many while it is young."""
    begins = server.order_due_at if order is None else order.created_at
    if begins is None:
        return math.inf
    distance = (now - begins).total_seconds()
    if distance > 0:
        return max(_QUICK, distance / 10)
    # A time so near may be the lease of a worker that is beginning the order.
    return _NEAR if distance > -LEASE.total_seconds() else -distance / 2


def _interval(settings: Settings, servers_reporting: int) -> float:
    """Seconds between the reports of an idle agent: all of them together stay below the policy's rate.

    No two the same, or agents that were started together would always come together.
    """
    policy = settings.policy
    fair = servers_reporting / policy.agent_requests_per_second
    return max(policy.agent_interval, fair) * random.uniform(1, 1.1)  # noqa: S311 - nobody gains by guessing it


def _calls(settings: Settings, server: Server, row: Address, now: datetime) -> bool:
    return server.state is not ServerState.LEAVING and proofs.wants_call(settings, row, now)
