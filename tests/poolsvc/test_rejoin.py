"""An agent whose token is good no more gets a new one by its key, and nobody else does."""

import base64
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import select, update

from nts_core.control import ServerState, join_statement, rejoin_statement
from poolsvc import auth
from poolsvc.derived import Purpose, RegistryKey
from poolsvc.models import Event, Server, Token, TokenKind

KEY, OTHER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()


def public(key):
    return base64.b64encode(key.public_key().public_bytes_raw()).decode()


@pytest.fixture
async def alice(registry, client):
    """The server alice, whose agent has joined with KEY and whose tokens were all revoked then."""
    server = await registry.server("alice")
    async with registry.change(server) as (_, row):
        row.agent_key, row.joined_at = public(KEY), registry.now
    async with client() as http:
        yield SimpleNamespace(registry=registry, id=server, http=http)


async def rejoin(alice, *, key=KEY, server="alice", nonce=None, **changes):
    if nonce is None:
        asked = await alice.http.post("/v1/agent/rejoin-challenge", json={"server": server})
        assert asked.status_code == 200
        nonce = asked.json()["nonce"]
    statement = rejoin_statement(pool="pool.example", server=server, nonce=nonce)
    body = {"server": server, "nonce": nonce, "signature": base64.b64encode(key.sign(statement)).decode()}
    return await alice.http.post("/v1/agent/rejoin", json=body | changes)


async def test_the_key_that_joined_gets_a_token_that_works_and_ends_the_one_before(alice, client):
    tokens = []
    for _ in range(2):
        answer = await rejoin(alice)
        assert answer.status_code == 200, answer.text
        assert (answer.json()["server"], answer.json()["domain"]) == ("alice", "alice.servers.pool.example")
        tokens.append(answer.json()["token"])
    for token, status in zip(tokens, (401, 200), strict=True):
        async with client(token) as http:
            assert (await http.post("/v1/agent/sync", json={"engine": "e"})).status_code == status


def challenge(key=RegistryKey(bytes(32)), subject="alice", minutes=1):  # noqa: B008 - a constant
    return key.challenge(Purpose.REJOIN, subject, datetime.now(UTC) + timedelta(minutes=minutes))


@pytest.mark.parametrize(
    "wrong",
    [
        {"key": OTHER},
        {"nonce": challenge(minutes=-1)},
        {"nonce": challenge(subject="bob")},
        {"nonce": challenge(RegistryKey(b"\x01" * 32))},
        {"nonce": "9999999999.AAAA"},
        {"nonce": ""},
        {"nonce": "." * 5000},
        {"signature": ""},
        {"signature": "not base64!"},
        {"signature": base64.b64encode(bytes(64)).decode()},
        {"server": "nobody"},
        {"server": "a" * 5000},
        {"server": "."},
    ],
)
async def test_all_others_get_the_same_refusal(alice, wrong):
    answer = await rejoin(alice, **wrong)
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
    assert answer.json()["detail"] == "the signature is not that of the agent which joined, or too old"
    assert answer.json()["remedy"]
    async with alice.registry.database.transaction() as session:
        assert (await session.execute(update(Token).values(label=""))).rowcount == 0


async def test_a_server_that_no_agent_has_joined_takes_none_back(alice):
    async with alice.registry.database.transaction() as session:
        await session.execute(update(Server).values(agent_key=None))
    assert (await rejoin(alice)).status_code == 401


async def test_a_server_that_leaves_still_hears_so_and_a_removed_one_is_told(alice):
    for state, status in ((ServerState.LEAVING, 200), (ServerState.REMOVED, 410)):
        async with alice.registry.database.transaction() as session:
            await session.execute(update(Server).values(state=state))
        assert (await rejoin(alice)).status_code == status


async def test_the_log_names_the_agent(alice):
    await rejoin(alice)
    async with alice.registry.database.transaction() as session:
        kinds = await session.execute(
            select(Event.kind, Event.actor).where(Event.kind == "token-created").order_by(Event.id.desc())
        )
    assert kinds.first() == ("token-created", f"agent {alice.id}")


async def join(client, token, *, key=KEY, signer=None, signed=None):
    statement = join_statement(token=signed or token, public_key=public(key))
    signature = base64.b64encode((signer or key).sign(statement)).decode()
    async with client(token) as http:
        return await http.post("/v1/agent/join", json={"public_key": public(key), "signature": signature})


async def test_an_agent_whose_answer_got_lost_joins_again_with_the_same_token(alice, client):
    async with alice.registry.database.transaction() as session:
        _, token = await auth.issue(session, TokenKind.JOIN, now=alice.registry.now, server_id=alice.id)
    lost = await join(client, token)
    orders = len((await alice.registry.get(alice.id)).orders)
    again = await join(client, token)
    assert (lost.status_code, again.status_code) == (200, 200)
    assert len((await alice.registry.get(alice.id)).orders) == orders
    for answer, status in ((lost, 401), (again, 200)):
        async with client(answer.json()["token"]) as http:
            assert (await http.post("/v1/agent/sync", json={"engine": "e"})).status_code == status


@pytest.mark.parametrize(
    "wrong", [{"key": OTHER}, {"signer": OTHER}, {"signed": "tc_join_other"}, {"key": OTHER, "signer": KEY}]
)
async def test_nobody_else_joins_with_a_used_token(alice, client, wrong):
    async with alice.registry.database.transaction() as session:
        _, token = await auth.issue(session, TokenKind.JOIN, now=alice.registry.now, server_id=alice.id)
    first = await join(client, token)
    answer = await join(client, token, **wrong)
    assert (answer.status_code, answer.json()["code"]) == (401, "token-used")
    async with client(first.json()["token"]) as http:
        assert (await http.post("/v1/agent/sync", json={"engine": "e"})).status_code == 200
