"""Address proofs: the connection back to real servers, good and bad, and what is recorded of it."""

import asyncio
import base64
import contextlib
import re
import ssl
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import func, select, update

from lab.certificates import Authority
from lab.processes import free_port
from lab.web import WebServer, by_tls, http, says
from member_agent.challenges import Responder
from nts_core.control import PROOF_ALPN, PROOF_PATH, ProofWay, ServerState, proof_statement
from poolsvc import proofs, servers, worker
from poolsvc.db import Database
from poolsvc.errors import TooManyRequests
from poolsvc.models import Address, ConnectBack, Event, Order, OrderStatus
from poolsvc.proofs import wants_call

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
HERE = "127.0.0.1"
NAME = "alice.servers.pool.example"


def signature(key, *, pool="pool.example", server="alice", address=HERE, nonce) -> bytes:
    statement = proof_statement(pool=pool, server=server, address=address, nonce=nonce)
    return base64.b64encode(key.sign(statement))


@pytest.fixture
async def responder():
    async with Responder([NAME]) as responder:
        await responder.listen((HERE, 0))
        yield responder


@pytest.fixture
def key():
    return Ed25519PrivateKey.generate()


@pytest.fixture
async def alice(registry, key):
    """A registered server at 127.0.0.1 whose agent has joined; settings get their HTTP port by `at`."""
    registry.alice = await registry.server("alice", HERE)
    async with registry.change(registry.alice) as (_, server):
        server.agent_key = base64.b64encode(key.public_key().public_bytes_raw()).decode()
        server.joined_at = NOW
    return registry


async def call(registry, server_id, address=HERE, now=NOW, by=ProofWay.HTTP):
    """The agent's call; the address' id and the nonce."""
    async with registry.change(server_id) as (session, server):
        nonce = await proofs.call(session, registry.settings, server, address, address, now, by=by)
        return next(row.id for row in server.addresses if row.address == address), nonce


async def proved(registry, port, *, answer=None, responder=None, now=NOW, **settings):
    """Alice's address after a call and the connection back to `port`."""
    ports = registry.settings.ports.model_copy(update={"http": port})
    policy = registry.settings.policy.model_copy(update=settings)
    registry.settings = registry.settings.model_copy(update={"ports": ports, "policy": policy})
    address, nonce = await call(registry, registry.alice, now=now)
    if responder is not None:
        responder.replace(NAME, {PROOF_PATH + nonce: answer(nonce)})
    await proofs.prove(registry.database, registry.settings, address, now)
    return (await registry.get(registry.alice)).addresses[0]


def port_of(responder):
    return responder.endpoints[0][1]


async def test_the_right_signature_proves_the_address_and_verifies_the_server(alice, responder, key):
    row = await proved(
        alice, port_of(responder), responder=responder, answer=lambda nonce: signature(key, nonce=nonce)
    )
    assert (row.proved_at, row.proof_error, row.nonce, row.proof_due_at) == (NOW, None, None, None)
    assert row.called_at == NOW
    assert (await alice.get(alice.alice)).state is ServerState.VERIFIED
    async with alice.database.transaction() as session:
        last = (await session.scalars(select(Event).where(Event.kind == "address-proved"))).one()
        assert await session.scalar(select(func.count()).select_from(ConnectBack)) == 1
    assert (last.actor, last.after) == ("worker", {"state": "verified"})
    assert HERE in last.reason


OTHER_KEY = Ed25519PrivateKey.generate()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda key, nonce: signature(OTHER_KEY, nonce=nonce), "not signed by this server's agent"),
        (lambda key, nonce: signature(key, nonce="another"), "not signed by this server's agent"),
        (lambda key, nonce: signature(key, nonce=nonce, server="bob"), "not signed by this server's agent"),
        (lambda key, nonce: signature(key, nonce=nonce, address="::1"), "not signed by this server's agent"),
        (lambda key, nonce: signature(key, nonce=nonce, pool="x.example"), "not signed by this server's"),
        (lambda key, nonce: signature(key, nonce=nonce)[:-4], "not signed|not a signature"),
        (lambda key, nonce: b"<html>It works!</html>", "not a signature"),
        (lambda key, nonce: b"\xff\xfe", "not a signature"),
        (lambda key, nonce: b"", "not signed|not a signature"),
        (lambda key, nonce: b"A" * 300, "more than 256 octets"),
    ],
)
async def test_other_answers_prove_nothing_and_say_why(sqlite_alice, responder, key, answer, error):
    row = await proved(
        sqlite_alice, port_of(responder), responder=responder, answer=lambda nonce: answer(key, nonce)
    )
    assert row.proved_at is None
    assert (await sqlite_alice.get(sqlite_alice.alice)).state is ServerState.REGISTERED
    assert re.search(error, row.proof_error)


@pytest.fixture
async def sqlite_alice(sqlite_url, settings, registry_of, key):
    """The same on one engine, for what does not touch the database in another way."""
    database = Database(sqlite_url)
    registry = registry_of(database, settings)
    registry.alice = await registry.server("alice", HERE)
    async with registry.change(registry.alice) as (_, server):
        server.agent_key = base64.b64encode(key.public_key().public_bytes_raw()).decode()
    yield registry
    await database.close()


async def test_an_agent_that_serves_another_nonce_is_no_proof(alice, responder, key):
    row = await proved(
        alice, port_of(responder), responder=responder, answer=lambda nonce: signature(key, nonce=nonce)
    )
    assert row.proved_at is not None
    async with alice.database.transaction() as session:
        await session.execute(update(Address).values(proved_at=None))
    _, nonce = await call(alice, alice.alice)
    responder.replace(NAME, {PROOF_PATH + "old": signature(key, nonce=nonce)})
    await proofs.prove(alice.database, alice.settings, row.id, NOW)
    row = (await alice.get(alice.alice)).addresses[0]
    assert (row.proved_at, row.proof_error) == (None, "HTTP status 404 instead of 200")


async def test_a_long_answer_of_garbage_is_recorded_bounded_and_printable(alice):
    """PostgreSQL refuses what does not fit its column, and NULs."""
    async with WebServer(says(b"\x00\x1b[31m" + b"garbage " * 200 + b"\r\n\r\n")) as web:
        row = await proved(alice, web.port)
    assert row.proved_at is None
    assert row.proof_error.isprintable()
    assert len(row.proof_error) <= 300


async def test_after_a_failure_the_agent_is_asked_to_call_again_when_the_wait_is_over(alice):
    """The worker's own look at the due row must not push the time away from the agent."""
    row = await proved(alice, free_port())
    wait = timedelta(hours=1) / alice.settings.policy.proofs_per_hour
    assert row.proof_error is not None
    assert row.proof_due_at == NOW + wait
    assert not wants_call(alice.settings, row, NOW + wait / 2)
    due = NOW + wait
    for identifier in await worker.claim(alice.database, worker.PROOFS, due):
        await proofs.prove(alice.database, alice.settings, identifier, due)
    for minutes in (0, 1, 3, 60):
        assert wants_call(
            alice.settings, (await alice.get(alice.alice)).addresses[0], due + timedelta(minutes=minutes)
        )


async def test_an_agent_that_knows_nothing_of_its_call_may_call_again_at_once(alice, responder, key):
    """The answer was lost, by a crash of one of the two: no connection is spent on it, and no hour's share of five."""
    address, _ = await call(alice, alice.alice)
    later = proofs.look_at(alice.settings, NOW)
    async with alice.change(alice.alice) as (_, server):
        server.agent_seen_at = NOW + timedelta(seconds=1)
    await proofs.prove(alice.database, alice.settings, address, later)
    row = (await alice.get(alice.alice)).addresses[0]
    assert (row.nonce, row.proof_error, row.proof_due_at) == (None, None, None)
    assert wants_call(alice.settings, row, later)
    async with alice.database.transaction() as session:
        assert await session.scalar(select(func.count()).select_from(ConnectBack)) == 0
    row = await proved(
        alice,
        port_of(responder),
        responder=responder,
        answer=lambda nonce: signature(key, nonce=nonce),
        now=later,
    )
    assert row.proved_at == later, "an agent that has not reported since is looked for all the same"


async def test_an_address_is_wanted_once_until_its_proof_is_decided(alice):
    row = (await alice.get(alice.alice)).addresses[0]
    assert wants_call(alice.settings, row, NOW)
    await call(alice, alice.alice)
    row = (await alice.get(alice.alice)).addresses[0]
    assert not wants_call(alice.settings, row, NOW)
    row.nonce, row.proof_due_at, row.proved_at = None, None, NOW
    assert not wants_call(alice.settings, row, NOW)


async def due(registry):
    return (await registry.get(registry.alice)).addresses[0].proof_due_at


async def say_serving(registry, *nonces, now):
    async with registry.change(registry.alice) as (_, server):
        proofs.note_serving(server, nonces, now)


async def test_the_registry_looks_when_the_agent_says_that_it_serves_and_anyway_after_a_while(alice):
    """Between the call and the agent's own look at its answer there is nothing to be found."""
    deadline = timedelta(seconds=alice.settings.policy.proof_deadline)
    soon = NOW + deadline / 2
    _, nonce = await call(alice, alice.alice)
    assert await due(alice) == NOW + deadline
    await say_serving(alice, "another", now=soon)
    assert await due(alice) == NOW + deadline
    await say_serving(alice, "another", nonce, now=soon)
    assert await due(alice) == soon


async def test_an_agent_that_repeats_itself_does_not_make_the_registry_connect_again(alice):
    """It reports more often than a silent port takes to be given up: the lease of the first look stays."""
    _, nonce = await call(alice, alice.alice)
    await say_serving(alice, nonce, now=NOW)
    assert len(await worker.claim(alice.database, worker.PROOFS, NOW)) == 1
    for seconds in (1, 2, 5):
        later = NOW + timedelta(seconds=seconds)
        await say_serving(alice, nonce, now=later)
        assert await worker.claim(alice.database, worker.PROOFS, later) == []


async def test_a_second_call_makes_the_first_nonce_worthless(alice, responder, key):
    alice.settings = alice.settings.model_copy(
        update={"ports": alice.settings.ports.model_copy(update={"http": port_of(responder)})}
    )
    _, first = await call(alice, alice.alice)
    identifier, second = await call(alice, alice.alice)
    assert first != second
    responder.replace(NAME, {PROOF_PATH + first: signature(key, nonce=first)})
    await proofs.prove(alice.database, alice.settings, identifier, NOW)
    assert (await alice.get(alice.alice)).addresses[0].proved_at is None


async def test_no_more_connections_leave_within_an_hour_than_the_limit_however_the_calls_come(registry):
    """All members of one prefix call before the first connection is made."""
    registry.settings = registry.settings.model_copy(
        update={
            "ports": registry.settings.ports.model_copy(update={"http": free_port()}),
            "policy": registry.settings.policy.model_copy(update={"require_source_address": False}),
        }
    )
    limit = registry.settings.policy.proofs_per_hour
    due = []
    for number in range(1, limit + 3):
        server = await registry.server(f"s{number}", f"127.0.0.{number}")
        with contextlib.suppress(TooManyRequests):
            due.append((await call(registry, server, f"127.0.0.{number}"))[0])
    for identifier in due:
        await proofs.prove(registry.database, registry.settings, identifier, NOW)
    async with registry.database.transaction() as session:
        assert await session.scalar(select(func.count()).select_from(ConnectBack)) == limit


async def test_an_address_of_another_server_cannot_be_proved_as_well(alice, responder, key):
    """Two members may claim an address; from its proof on it has one owner."""
    bob = await alice.server("bob", HERE)
    bob_address = (await alice.get(bob)).addresses[0].id
    async with alice.change(bob) as (_, server):
        server.agent_key = base64.b64encode(key.public_key().public_bytes_raw()).decode()
    row = await proved(
        alice, port_of(responder), responder=responder, answer=lambda nonce: signature(key, nonce=nonce)
    )
    assert row.proved_at is not None
    async with Responder(["bob.servers.pool.example"]) as other:
        await other.listen((HERE, 0))
        ports = alice.settings.ports.model_copy(update={"http": port_of(other)})
        alice.settings = alice.settings.model_copy(update={"ports": ports})
        _, nonce = await call(alice, bob)
        other.publish(
            "bob.servers.pool.example", PROOF_PATH + nonce, signature(key, server="bob", nonce=nonce)
        )
        await proofs.prove(alice.database, alice.settings, bob_address, NOW)
    found = await alice.get(bob)
    assert found.addresses[0].proved_at is None
    assert found.state is ServerState.REGISTERED
    assert "another server" in found.addresses[0].proof_error


@pytest.mark.parametrize("state", [ServerState.LEAVING, ServerState.REMOVED])
async def test_a_proof_under_way_when_the_server_leaves_counts_for_nothing(alice, responder, key, state):
    identifier, nonce = await call(alice, alice.alice)
    left = asyncio.Event()

    async def serve(_reader, writer):
        async with alice.change(alice.alice) as (session, server):
            await servers.leave(session, server, actor="member", reason="", now=NOW)
            if state is ServerState.REMOVED:
                await servers.apply(session, server, servers.EventKind.CLOSED, actor="w", reason="", now=NOW)
        left.set()
        writer.write(http("200 OK", signature(key, nonce=nonce)))
        await writer.drain()

    async with WebServer(serve) as web:
        ports = alice.settings.ports.model_copy(update={"http": web.port})
        await proofs.prove(
            alice.database, alice.settings.model_copy(update={"ports": ports}), identifier, NOW
        )
    assert left.is_set(), "no transaction may be open while the network is waited for"
    found = await alice.get(alice.alice)
    assert (found.state, found.addresses[0].proved_at) == (state, None)


async def test_calls_of_long_ago_are_not_counted_and_removed_in_bounded_numbers(alice):
    """However many there are: a call removes more than it adds, and waits for no great deletion."""
    async with alice.database.transaction() as session:
        session.add_all(
            ConnectBack(address="198.18.0.1", prefix="198.18.0.0/24", at=NOW - timedelta(hours=2))
            for _ in range(100)
        )
    await call(alice, alice.alice)
    async with alice.database.transaction() as session:
        left = await session.scalar(select(func.count()).select_from(ConnectBack))
    assert left == 80


@pytest.fixture
def pair(tmp_path):
    """An agent's certificate for its KE port, which nobody trusts."""
    return Authority(tmp_path / "authority").issue(NAME)


async def proved_at_ke(registry, web, *, by=ProofWay.TLS, now=NOW, responder=None):
    """Alice's address after a call and the connection back to the KE port, where `web` is."""
    http_port = free_port() if responder is None else port_of(responder)
    ports = registry.settings.ports.model_copy(update={"ke": web.port, "http": http_port})
    registry.settings = registry.settings.model_copy(update={"ports": ports})
    address, nonce = await call(registry, registry.alice, now=now, by=by)
    web.nonce = nonce
    await proofs.prove(registry.database, registry.settings, address, now)
    return (await registry.get(registry.alice)).addresses[0]


def signing(key, context, answer=lambda good: good + b"\n", **options):
    """Who signs what it is asked by TLS."""

    async def serve(_reader, writer):
        writer.write(answer(signature(key, nonce=web.heads[-1].rstrip("\n"))))
        await writer.drain()

    web = WebServer(serve, tls=context, until=b"\n", **options)
    return web


async def test_the_right_signature_by_tls_proves_the_address(alice, key, pair):
    names = []
    context = by_tls(pair, "ntske/1", PROOF_ALPN)
    context.sni_callback = lambda _socket, name, _context: names.append(name)
    async with signing(key, context) as web:
        row = await proved_at_ke(alice, web)
        assert (row.proved_at, row.proof_error, row.proof_by) == (NOW, None, ProofWay.TLS)
        assert web.heads == [web.nonce + "\n"]
    assert names == [NAME]
    assert (await alice.get(alice.alice)).state is ServerState.VERIFIED
    async with alice.database.transaction() as session:
        assert await session.scalar(select(func.count()).select_from(ConnectBack)) == 1


@pytest.mark.parametrize(
    ("protocols", "answer", "error"),
    [
        ((PROOF_ALPN,), lambda good: good[:-4] + b"AAA=\n", "not signed by this server's agent"),
        ((PROOF_ALPN,), lambda _: b"<html>It works!</html>\n", "not a signature"),
        ((PROOF_ALPN,), lambda _: b"\xff\xfe\n", "not a signature"),
        ((PROOF_ALPN,), lambda _: b"\n", "not signed|not a signature"),
        ((PROOF_ALPN,), lambda good: good, "the connection ended"),
        ((PROOF_ALPN,), lambda _: b"", "the connection ended"),
        ((PROOF_ALPN,), lambda _: b"A" * 300 + b"\n", "more than 256 octets"),
        ((PROOF_ALPN,), lambda _: b"A" * 1_000_000, "more than 256 octets"),
        (("ntske/1",), lambda good: good + b"\n", "does not speak truechimer-proof/1"),
        ((), lambda good: good + b"\n", "does not speak truechimer-proof/1"),
    ],
)
async def test_other_answers_by_tls_prove_nothing(sqlite_alice, key, pair, protocols, answer, error):
    async with signing(key, by_tls(pair, *protocols), answer) as web:
        row = await proved_at_ke(sqlite_alice, web)
    assert row.proved_at is None
    assert re.search(error, row.proof_error), row.proof_error


async def test_another_agent_and_tls_of_before_1_3_prove_nothing(sqlite_alice, key, pair):
    async with signing(OTHER_KEY, by_tls(pair, PROOF_ALPN)) as web:
        row = await proved_at_ke(sqlite_alice, web)
    assert row.proof_error == "the answer is not signed by this server's agent"
    old = by_tls(pair, PROOF_ALPN)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    async with signing(key, old) as web:
        row = await proved_at_ke(sqlite_alice, web)
    assert row.proof_error.startswith("no TLS answer: ")
    assert web.connections == 0


async def test_a_server_that_stays_silent_after_the_handshake_has_a_deadline(sqlite_alice, pair):
    async def wait(_reader, _writer):
        await asyncio.sleep(60)

    policy = sqlite_alice.settings.policy.model_copy(update={"proof_deadline": 0.3})
    sqlite_alice.settings = sqlite_alice.settings.model_copy(update={"policy": policy})
    async with WebServer(wait, tls=by_tls(pair, PROOF_ALPN), until=b"\n") as web:
        row = await proved_at_ke(sqlite_alice, web)
    assert row.proof_error == "no TLS answer within 0.3 s"


async def test_the_next_call_says_anew_how_it_is_answered(sqlite_alice, responder):
    async with WebServer(says(b""), until=b"\n") as web:
        assert (await proved_at_ke(sqlite_alice, web)).proof_by is ProofWay.TLS
        row = await proved_at_ke(sqlite_alice, web, by=ProofWay.HTTP, responder=responder)
    assert (row.proof_by, row.proof_error) == (ProofWay.HTTP, "HTTP status 404 instead of 200")


def ordered(registry, pair, **values):
    """The certificate of the pair as one that was issued to alice."""
    chain = x509.load_pem_x509_certificates(pair.cert.read_bytes())
    return Order(
        server_id=registry.alice,
        status=OrderStatus.ISSUED,
        created_at=NOW,
        fingerprint=chain[0].fingerprint(hashes.SHA256()).hex(),
        **values,
    )


async def test_once_there_is_a_certificate_its_key_proves_an_address_without_an_answer(alice, pair):
    async with alice.change(alice.alice) as (_, server):
        server.orders.append(ordered(alice, pair))
    async with WebServer(says(b""), tls=by_tls(pair, "ntske/1"), until=b"\n") as web:
        row = await proved_at_ke(alice, web, by=ProofWay.HTTP)
        assert web.connections == 1
    assert (row.proved_at, row.proof_error) == (NOW, None)
    async with alice.database.transaction() as session:
        last = (await session.scalars(select(Event).where(Event.kind == "address-proved"))).one()
        assert await session.scalar(select(func.count()).select_from(ConnectBack)) == 1
    assert last.reason == f"{HERE} answered with the server's certificate"


@pytest.mark.parametrize("values", [{}, {"compromised_at": NOW}], ids=["another", "compromised"])
async def test_another_certificate_proves_nothing_and_the_agent_is_asked(
    sqlite_alice, responder, key, pair, values, tmp_path
):
    other = pair if values else Authority(tmp_path / "other").issue(NAME)
    async with sqlite_alice.change(sqlite_alice.alice) as (_, server):
        server.orders.append(ordered(sqlite_alice, other, **values))
    async with WebServer(says(b""), tls=by_tls(pair, "ntske/1"), until=b"\n") as web:
        row = await proved_at_ke(sqlite_alice, web, by=ProofWay.HTTP, responder=responder)
        assert (row.proved_at, row.proof_error) == (None, "HTTP status 404 instead of 200")
        assert web.connections == (0 if values else 1)
    async with sqlite_alice.database.transaction() as session:
        made = await session.scalar(select(func.count()).select_from(ConnectBack))
    assert made == (1 if values else 2), "each connection counts"
