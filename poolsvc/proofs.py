"""Proof that a member controls an address (design: the registry is never a scanner).

1. The agent calls from the address. Only that makes the registry connect, and at most a few times an hour.
2. The registry connects back to the address with a nonce: over HTTP in the path, following no redirect, or by TLS on the
   NTS-KE port, verifying no certificate.
3. The answer is the agent key's signature over nonce, pool, server and address. Members without an agent put a
   text there that only they were told, and that the path does not tell.
4. A server with a certificate needs no answer where it shows that it has the key: at first the registry shakes hands as
   a client of NTS-KE would. If the certificate is not there, the answer is looked for, by a connection that counts too.
"""

import base64
import binascii
import hashlib
import hmac
import secrets
import ssl
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.control import PROOF_ALPN, PROOF_PATH, ProofWay, proof_statement
from nts_core.independence import prefix_of
from nts_core.tls import ALPN
from poolsvc import addresses, servers
from poolsvc.config import Settings
from poolsvc.db import Database, queue_for
from poolsvc.errors import AddressMismatch, NotFound, TooManyRequests, WrongState
from poolsvc.models import Address, ConnectBack, Server
from poolsvc.names import check_address
from poolsvc.outbound import FetchError, Guard, Outbound, http_origin

_HOUR = timedelta(hours=1)
# Old rows that one call removes: more than it adds.
_FORGOTTEN = 20
# A signature is 88 characters of base64; whoever sends more is not an agent.
_MAX_ANSWER = 256
# Octets of randomness: the agent's nonce; a file's name and content. As text both fit the nonce's column.
_NONCE, _FILE_NAME, _FILE_CONTENT = 32, 16, 24


async def call(
    session: AsyncSession,
    settings: Settings,
    server: Server,
    text: str,
    source: str,
    now: datetime,
    *,
    by: ProofWay = ProofWay.HTTP,
) -> str:
    """An agent's call from one of its addresses: the nonce that is to be signed there, and how that is asked for.

    Raises NotFound, InvalidAddress, AddressMismatch, TooManyRequests.
    """
    row = next((row for row in server.addresses if row.address == text), None)
    if row is None:
        raise NotFound(f"{text} is not an address of {server.name}", field="address")
    # Registered is not enough: a network may have opted out since.
    Guard(settings).check(row.address, settings.ports.ke if by is ProofWay.TLS else settings.ports.http)
    waived = server.waive_source or not settings.policy.require_source_address
    if not waived and _canonical(source) != row.address:
        raise AddressMismatch(
            f"the call for {row.address} came from {source}",
            remedy="call from the address itself, or ask the operator to waive that for hosts behind NAT",
            field="address",
        )
    await _limit(session, settings, row.address, now)
    row.called_at = now
    parts = (_FILE_NAME, _FILE_CONTENT) if server.agentless else (_NONCE,)
    row.nonce, row.served_at, row.proof_by = ".".join(map(secrets.token_urlsafe, parts)), None, by
    # The agent's next report says that it serves the answer (`note_serving`); if none comes, we look anyway.
    row.proof_due_at = look_at(settings, now)
    return row.nonce


def look_at(settings: Settings, now: datetime) -> datetime:
    """When the registry connects back after a call, unless told earlier that the answer is there."""
    return now + timedelta(seconds=settings.policy.proof_deadline)


def file_of(nonce: str) -> tuple[str, str]:
    """Name and content of the file that proves an address without an agent."""
    name, _, content = nonce.partition(".")
    return name, content


def note_serving(server: Server, nonces: tuple[str, ...], now: datetime) -> None:
    """The agent says which nonces it answers, which it does again and again: time to connect back, once."""
    for row in server.addresses:
        if row.nonce in nonces:
            _look_now(row, now)


def ready(server: Server, address: str, now: datetime) -> Address:
    """A member without an agent says that its answer is there. Raises NotFound or WrongState."""
    row = next((row for row in server.addresses if row.address == address), None)
    if row is None:
        raise NotFound(f"{address} is not an address of {server.name}", field="address")
    if row.nonce is None:
        raise WrongState(f"no proof of {address} is under way", remedy="ask for one: POST .../proofs")
    _look_now(row, now)
    return row


def _look_now(row: Address, now: datetime) -> None:
    if row.served_at is None:
        row.served_at = row.proof_due_at = now


def _canonical(source: str) -> str:
    address = check_address(source.removeprefix("::ffff:"), allow_private=True)
    return str(address)


async def _limit(session: AsyncSession, settings: Settings, address: str, now: datetime) -> None:
    old = (
        select(ConnectBack.id).where(ConnectBack.at < now - _HOUR).order_by(ConnectBack.at).limit(_FORGOTTEN)
    )
    await session.execute(delete(ConnectBack).where(ConnectBack.id.in_(old)))
    prefix = prefix_of(address)
    for what, column, value, limit in (
        ("the address", ConnectBack.address, address, settings.policy.proofs_per_hour),
        ("its network", ConnectBack.prefix, prefix, settings.policy.proofs_per_hour_and_prefix),
    ):
        counted = select(func.count()).where(column == value, ConnectBack.at >= now - _HOUR)
        made = await session.scalar(counted) or 0
        if made >= limit:
            raise TooManyRequests(
                f"{made} connections to {what} {value} within an hour",
                remedy="wait an hour; the agent asks again by itself",
            )


def wants_call(settings: Settings, row: Address, now: datetime) -> bool:
    """Whether the agent should call from this address now."""
    needed = row.proved_at is None or addresses.is_to_be_proved_again(row, settings, now)
    return needed and row.nonce is None and (row.proof_due_at is None or row.proof_due_at <= now)


async def prove(database: Database, settings: Settings, address_id: int, now: datetime) -> None:
    """Connect back to one address that called, and record what came of it."""
    async with database.transaction() as session:
        row = await session.get(Address, address_id)
        if row is None:
            return
        server = await servers.get(session, row.server_id)
        if row.nonce is None:
            # The wait after a failure is over: the agent may call again.
            row.proof_due_at = None
            return
        if _is_lost(server, row):
            # It may call again at once: nothing was asked of the address, and nobody is to wait for our own crash.
            row.nonce = row.proof_due_at = None
            return
        question = _Question.of(settings, server, row)
    proved_by, failure = await _ask(database, settings, question, now)
    async with database.transaction() as session:
        server = await servers.get(session, row.server_id)
        current = next((entry for entry in server.addresses if entry.id == address_id), None)
        if current is None or current.nonce != question.nonce:
            return
        if failure is None:
            # Of two servers that answer for one address at the same moment, one has to be the first.
            await queue_for(session, f"address {row.address}")
            if await servers.taken_address(session, [row.address], besides=server.id) is not None:
                failure = "the address belongs to another server of this pool"
        await _record(session, settings, server, current, proved_by, failure, now)


def _is_lost(server: Server, row: Address) -> bool:
    """Whether the agent reported since its call, and knows nothing of the nonce: the answer was lost, or it died with it."""
    if server.agentless or row.served_at is not None or row.called_at is None:
        return False
    return server.agent_seen_at is not None and server.agent_seen_at > row.called_at


async def _record(
    session: AsyncSession,
    settings: Settings,
    server: Server,
    row: Address,
    proved_by: str | None,
    failure: str | None,
    now: datetime,
) -> None:
    row.nonce = None
    row.proof_error = failure and failure[:300]
    if failure is not None:
        row.proof_due_at = now + _HOUR / settings.policy.proofs_per_hour
        return
    row.proved_at, row.confirmed_at, row.proof_due_at = row.proved_at or now, now, None
    await addresses.settle(
        session,
        server,
        actor="worker",
        reason=f"{row.address} answered with {proved_by}",
        now=now,
    )


@dataclass(frozen=True, slots=True)
class _Question:
    """What is asked of an address, and what would be an answer."""

    pool: str
    server: str
    domain: str
    address: str
    nonce: str
    by: ProofWay
    key: str  # of the agent
    is_agentless: bool
    certificates: Collection[str]  # fingerprints of those whose key the server alone has

    @classmethod
    def of(cls, settings: Settings, server: Server, row: Address) -> "_Question":
        assert row.nonce is not None
        return cls(
            pool=settings.pool,
            server=server.name,
            domain=settings.domain_of(server.name),
            address=row.address,
            nonce=row.nonce,
            by=row.proof_by,
            key=server.agent_key or "",
            is_agentless=server.agentless,
            certificates=servers.fingerprints(server),
        )


async def _ask(
    database: Database, settings: Settings, question: _Question, now: datetime
) -> tuple[str | None, str | None]:
    """By what the address is proved; or what was wrong."""
    looks = [("the server's certificate", _shake_hands)] if question.certificates else []
    if question.is_agentless:
        looks.append(("the file asked for", _look_for_file))
    else:
        looks.append(("a signature asked for", _look_for_signature))
    failure = None
    for what, look in looks:
        failure = await _take_connection(database, settings, question.address, now) or await look(
            settings, question
        )
        if failure is None:
            return what, None
    return None, failure


async def _take_connection(database: Database, settings: Settings, address: str, now: datetime) -> str | None:
    """Count a connection; or why there is to be none."""
    async with database.transaction() as session:
        try:
            await _limit(session, settings, address, now)
        except TooManyRequests as error:
            return error.detail
        session.add(ConnectBack(address=address, prefix=prefix_of(address), at=now))
    return None


async def _shake_hands(settings: Settings, question: _Question) -> str | None:
    """What is wrong, if the server at the address does not have the key of its certificate."""
    try:
        answer = await Outbound(settings).tls(
            question.address,
            settings.ports.ke,
            name=question.domain,
            protocol=ALPN.decode(),
            least=ssl.TLSVersion.TLSv1_3,
            deadline=settings.policy.proof_deadline,
        )
    except FetchError as error:
        return str(error)
    if hashlib.sha256(answer.certificate).hexdigest() not in question.certificates:
        return "another certificate than the server's is shown"
    return None


async def _look_for_signature(settings: Settings, question: _Question) -> str | None:
    """What is wrong, if the nonce is not signed by the agent."""
    fetch = _signature_by_tls if question.by is ProofWay.TLS else _signature_by_http
    statement = proof_statement(
        pool=question.pool, server=question.server, address=question.address, nonce=question.nonce
    )
    try:
        signature = base64.b64decode((await fetch(settings, question)).strip(), validate=True)
        Ed25519PublicKey.from_public_bytes(base64.b64decode(question.key)).verify(signature, statement)
    except FetchError as error:
        return str(error)
    except (binascii.Error, ValueError):
        return "the answer is not a signature: another server may answer on this address"
    except InvalidSignature:
        return "the answer is not signed by this server's agent"
    return None


async def _signature_by_http(settings: Settings, question: _Question) -> bytes:
    return await _get(settings, question, question.nonce)


async def _signature_by_tls(settings: Settings, question: _Question) -> bytes:
    answer = await Outbound(settings).tls(
        question.address,
        settings.ports.ke,
        name=question.domain,
        protocol=PROOF_ALPN,
        say=f"{question.nonce}\n".encode(),
        least=ssl.TLSVersion.TLSv1_3,
        deadline=settings.policy.proof_deadline,
        limit=_MAX_ANSWER,
    )
    return answer.line


async def _look_for_file(settings: Settings, question: _Question) -> str | None:
    """What is wrong, if the file of a member without an agent is not there."""
    file, content = file_of(question.nonce)
    try:
        body = await _get(settings, question, file)
    except FetchError as error:
        return str(error)
    if not hmac.compare_digest(body.strip(), content.encode("ascii")):
        return "the answer is not the content that was asked for"
    return None


async def _get(settings: Settings, question: _Question, name: str) -> bytes:
    answer = await Outbound(settings).get(
        f"{http_origin(question.address, settings.ports.http)}{PROOF_PATH}{name}",
        host=question.domain,
        deadline=settings.policy.proof_deadline,
        limit=_MAX_ANSWER,
    )
    return answer.require_ok()
