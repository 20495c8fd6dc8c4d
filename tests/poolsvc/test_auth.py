"""Who may do what: the permission table, every endpoint by role, and the life of tokens."""

import base64
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from sqlalchemy import select, update

from nts_core.control import ServerState
from poolsvc import auth, members
from poolsvc.auth import PERMISSIONS, Operation, Principal
from poolsvc.errors import Forbidden, TokenExpired, TokenUsed, Unauthenticated
from poolsvc.models import Base, Server, Token, TokenKind

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
KEY = base64.b64encode(bytes(range(32))).decode()

# Written out once more, so that a slip in the table is seen.
ALLOWED = {
    (Operation.CREATE_MEMBER, TokenKind.OPERATOR),
    (Operation.REGISTER_SERVER, TokenKind.MEMBER),
    (Operation.READ_SERVER, TokenKind.OPERATOR),
    (Operation.READ_SERVER, TokenKind.MEMBER),
    (Operation.REMOVE_SERVER, TokenKind.OPERATOR),
    (Operation.REMOVE_SERVER, TokenKind.MEMBER),
    (Operation.JOIN, TokenKind.JOIN),
    (Operation.AGENT, TokenKind.AGENT),
}


@pytest.mark.parametrize("operation", Operation)
@pytest.mark.parametrize("kind", TokenKind)
def test_each_kind_of_token_may_do_what_the_table_says(kind, operation):
    principal = Principal(token_id=1, kind=kind, member_id=1, server_id=1)
    if (operation, kind) in ALLOWED:
        principal.may(operation)
        return
    with pytest.raises(Forbidden, match=f"of kind {kind} cannot {operation}") as caught:
        principal.may(operation)
    assert caught.value.remedy


def test_the_table_has_a_row_for_every_operation():
    assert set(PERMISSIONS) == set(Operation)


def test_a_member_reaches_its_own_servers_only_and_the_operator_all():
    server = Server(name="alice", member_id=2)
    Principal(1, TokenKind.OPERATOR, None, None).may(Operation.REMOVE_SERVER, server)
    Principal(1, TokenKind.MEMBER, 2, None).may(Operation.REMOVE_SERVER, server)
    with pytest.raises(Forbidden, match="another member"):
        Principal(1, TokenKind.MEMBER, 1, None).may(Operation.REMOVE_SERVER, server)


@pytest.fixture
async def world(registry):
    """Two members with a server each, and a token of every kind around the first server."""
    owner = await registry.member("Owner")
    server = await registry.server("alice", state=ServerState.REGISTERED, member=owner)
    async with registry.database.transaction() as session:
        _, foreign = await members.create(session, "Foreigner", NOW)
        tokens = {
            TokenKind.OPERATOR: await members.create_operator(session, NOW),
            TokenKind.MEMBER: await auth.issue(session, TokenKind.MEMBER, now=NOW, member_id=owner),
            TokenKind.JOIN: await auth.issue(session, TokenKind.JOIN, now=NOW, server_id=server),
            TokenKind.AGENT: await auth.issue(session, TokenKind.AGENT, now=NOW, server_id=server),
        }
    return SimpleNamespace(tokens=tokens, foreign=foreign, server=server, owner=owner)


# Method, path, body, and the operation that it needs; in an order in which each can succeed once.
ENDPOINTS = [
    ("POST", "/v1/members", {"name": "New member"}, Operation.CREATE_MEMBER),
    ("POST", "/v1/servers", {"name": "carol", "addresses": ["198.18.7.7"]}, Operation.REGISTER_SERVER),
    ("GET", "/v1/servers/alice", None, Operation.READ_SERVER),
    ("POST", "/v1/servers/alice/join-token", None, Operation.REGISTER_SERVER),
    ("POST", "/v1/agent/proof", {"address": "198.18.0.1"}, Operation.AGENT),
    ("POST", "/v1/agent/sync", {"engine": "builtin"}, Operation.AGENT),
    ("DELETE", "/v1/servers/alice", None, Operation.REMOVE_SERVER),
    ("POST", "/v1/agent/join", {"public_key": KEY}, Operation.JOIN),
]


@pytest.mark.parametrize("kind", TokenKind)
async def test_every_endpoint_by_role(world, client, kind):
    async with client(world.tokens[kind], source="198.18.0.1") as http:
        for method, path, body, operation in ENDPOINTS:
            answer = await http.request(method, path, json=body)
            if (operation, kind) in ALLOWED:
                assert answer.status_code in {200, 201, 202}, f"{path}: {answer.text}"
            else:
                assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), path


def test_the_endpoints_above_are_all_that_there_are(app):
    """A new endpoint has to be added to the table; /v1/pool is public."""
    routes = {
        (method.upper(), path)
        for path, entry in app.openapi()["paths"].items()
        for method in entry
        if path.startswith("/v1/")
    }
    known = {(method, path.replace("alice", "{name}")) for method, path, _, _ in ENDPOINTS}
    assert routes == known | {("GET", "/v1/pool")}


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer wrong", "Basic b3A6b3A=", "Bearer tc_operator_"])
async def test_no_endpoint_without_a_valid_token(world, client, header):
    async with client() as http:
        for method, path, body, _ in ENDPOINTS:
            answer = await http.request(
                method, path, json=body, headers={} if header is None else {"Authorization": header}
            )
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated"), path
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert answer.json()["remedy"]


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/servers/alice"), ("DELETE", "/v1/servers/alice"), ("POST", "/v1/servers/alice/join-token")],
)
async def test_a_foreign_member_reaches_nothing_of_a_server(world, registry, client, method, path):
    async with client(world.foreign) as http:
        answer = await http.request(method, path)
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert (await registry.get(world.server)).state is ServerState.REGISTERED


async def test_an_agents_token_reaches_its_own_server_only(world, registry, client):
    """An agent names no server: the token does."""
    other = await registry.server("bob", "198.18.0.2")
    async with client(world.tokens[TokenKind.AGENT], source="198.18.0.2") as http:
        answer = await http.post("/v1/agent/sync", json={"engine": "builtin"})
        assert answer.json()["server"] == "alice"
        proof = await http.post("/v1/agent/proof", json={"address": "198.18.0.2"})
        assert (proof.status_code, proof.json()["code"]) == (404, "not-found")
    assert (await registry.get(other)).agent_seen_at is None


async def authenticated(registry, secret, now=NOW):
    async with registry.database.transaction() as session:
        return await auth.authenticate(session, secret, now)


@pytest.mark.parametrize("kind", TokenKind)
async def test_a_token_names_its_bearer(world, registry, kind):
    principal = await authenticated(registry, world.tokens[kind])
    assert principal.kind is kind
    expected = {
        TokenKind.OPERATOR: (None, None, f"operator {principal.token_id}"),
        TokenKind.MEMBER: (world.owner, None, f"member {world.owner}"),
        TokenKind.JOIN: (None, world.server, f"join {world.server}"),
        TokenKind.AGENT: (None, world.server, f"agent {world.server}"),
    }
    assert (principal.member_id, principal.server_id, principal.actor) == expected[kind]


async def test_a_join_token_ends_at_its_time(world, registry):
    life = timedelta(hours=72)
    async with registry.database.transaction() as session:
        token = await auth.issue(
            session, TokenKind.JOIN, now=NOW, server_id=world.server, expires_at=NOW + life
        )
    await authenticated(registry, token, NOW + life - timedelta(seconds=1))
    with pytest.raises(TokenExpired) as caught:
        await authenticated(registry, token, NOW + life)
    assert "join-token" in caught.value.remedy


async def test_a_join_token_is_used_up_once(world, registry):
    secret = world.tokens[TokenKind.JOIN]
    principal = await authenticated(registry, secret)
    async with registry.database.transaction() as session:
        await auth.use_up(session, principal, NOW)
    with pytest.raises(TokenUsed):
        await authenticated(registry, secret)
    with pytest.raises(TokenUsed):
        async with registry.database.transaction() as session:
            await auth.use_up(session, principal, NOW)


async def test_an_expired_join_token_is_told_from_a_used_one_by_the_api(world, registry, client):
    async with registry.database.transaction() as session:
        await session.execute(update(Token).where(Token.kind == TokenKind.JOIN).values(expires_at=NOW))
    async with client(world.tokens[TokenKind.JOIN]) as http:
        answer = await http.post("/v1/agent/join", json={"public_key": KEY})
    assert (answer.status_code, answer.json()["code"]) == (401, "token-expired")
    assert "join-token" in answer.json()["remedy"]


async def test_joining_twice_with_one_token_is_refused_and_leaves_the_first_agent_in_place(
    world, registry, client
):
    async with client(world.tokens[TokenKind.JOIN]) as http:
        first = await http.post("/v1/agent/join", json={"public_key": KEY})
        other = base64.b64encode(b"\x01" * 32).decode()
        second = await http.post("/v1/agent/join", json={"public_key": other})
    assert first.status_code == 200
    assert (second.status_code, second.json()["code"]) == (401, "token-used")
    assert (await registry.get(world.server)).agent_key == KEY
    async with client(first.json()["token"]) as http:
        assert (await http.post("/v1/agent/sync", json={"engine": "e"})).status_code == 200


async def test_joining_ends_the_tokens_of_agents_before(world, client):
    async with client(world.tokens[TokenKind.JOIN]) as http:
        await http.post("/v1/agent/join", json={"public_key": KEY})
    async with client(world.tokens[TokenKind.AGENT]) as http:
        answer = await http.post("/v1/agent/sync", json={"engine": "e"})
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")


async def test_a_new_join_token_ends_the_one_before(world, client):
    async with client(world.tokens[TokenKind.MEMBER]) as http:
        new = await http.post("/v1/servers/alice/join-token")
    async with client(world.tokens[TokenKind.JOIN]) as http:
        old = await http.post("/v1/agent/join", json={"public_key": KEY})
    assert (old.status_code, old.json()["code"]) == (401, "unauthenticated")
    async with client(new.json()["join_token"]) as http:
        assert (await http.post("/v1/agent/join", json={"public_key": KEY})).status_code == 200


async def test_a_revoked_token_opens_nothing(world, registry):
    async with registry.database.transaction() as session:
        await auth.revoke_server_tokens(session, world.server, TokenKind.AGENT, NOW)
    with pytest.raises(Unauthenticated, match="revoked"):
        await authenticated(registry, world.tokens[TokenKind.AGENT])
    await authenticated(registry, world.tokens[TokenKind.JOIN])


@pytest.mark.parametrize("secret", [None, "", "x", "tc_agent_" + "A" * 43, "\x00", "é" * 10_000])
async def test_what_is_no_token_is_refused(registry, secret):
    with pytest.raises(Unauthenticated):
        await authenticated(registry, secret)


async def test_no_token_is_in_the_database(world, registry):
    """Every value of every table is searched for the secrets' texts."""
    async with registry.database.transaction() as session:
        found = [await session.execute(select(table)) for table in Base.metadata.sorted_tables]
        dump = "\n".join(repr(row) for result in found for row in result.all())
        hashes = list(await session.scalars(select(Token.sha256)))
    assert "alice" in dump
    secrets = [*world.tokens.values(), world.foreign]
    for secret in secrets:
        assert secret not in dump
        assert secret.split("_", 2)[2] not in dump
    assert len(set(secrets)) == len(secrets) <= len(hashes)
