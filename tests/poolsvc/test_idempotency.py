"""Requests that come twice: one effect, one answer, no secret in the database; and how often one may ask."""

import asyncio
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from sqlalchemy import func, select, update

from nts_core.control import ServerState
from poolsvc.app import create_app
from poolsvc.derived import RegistryKey
from poolsvc.idempotency import LIFE, forget_old
from poolsvc.models import ConnectBack, Event, IdempotencyKey, MaintenanceWindow, Notice, Server, Webhook

KEY = {"Idempotency-Key": "8e03978e-40d5-43dd-bc93-6894a57f9324"}
BODY = {"name": "alice", "addresses": ["198.18.0.1"]}


@pytest.fixture
async def owner(registry, client):
    registry.owner = await registry.member("Owner")
    async with client(await registry.owner_token(registry.owner), source="198.18.0.2") as http:
        yield http


async def count(registry, table):
    async with registry.database.transaction() as session:
        return await session.scalar(select(func.count()).select_from(table))


async def test_a_repeated_request_has_one_effect_and_the_same_answer(owner, registry):
    first = await owner.post("/v1/servers", json=BODY, headers=KEY)
    again = await owner.post("/v1/servers", json=BODY, headers=KEY)
    assert first.status_code == again.status_code == 201
    assert first.json() == again.json()
    assert (first.headers.get("Idempotency-Replayed"), again.headers["Idempotency-Replayed"]) == (
        None,
        "true",
    )
    assert again.headers["content-type"] == "application/json"
    assert await count(registry, Server) == 1
    plain = await owner.post("/v1/servers", json=BODY)
    assert (plain.status_code, plain.json()["code"]) == (409, "name-taken")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("servers/alice/maintenance", {"ends_at": (datetime.now(UTC) + timedelta(days=1)).isoformat()}),
        ("servers/alice/leaving", {"at": (datetime.now(UTC) + timedelta(days=9)).isoformat()}),
        ("servers/erin/proofs", {"address": "198.18.0.2"}),
        ("members/{member}/webhooks/{hook}/test", None),
    ],
)
async def test_what_is_begun_is_begun_once(owner, registry, path, body):
    await registry.server("alice", state=ServerState.ACTIVE, member=registry.owner)
    await registry.server("erin", "198.18.0.2", member=registry.owner, agentless=True)
    async with registry.database.transaction() as session:
        hook = Webhook(
            member_id=registry.owner,
            url="https://example.org/",
            created_at=registry.now,
            enabled_at=registry.now,
        )
        session.add(hook)
    url = "/v1/" + path.format(member=registry.owner, hook=hook.id)
    first = await owner.post(url, json=body, headers=KEY)
    assert first.status_code in {201, 202}, first.text
    tables = (Notice, MaintenanceWindow, ConnectBack, Event)
    before = [await count(registry, table) for table in tables]
    again = await owner.post(url, json=body, headers=KEY)
    assert (again.json(), again.headers["Idempotency-Replayed"]) == (first.json(), "true")
    assert [await count(registry, table) for table in tables] == before


async def test_the_secret_in_the_answer_is_not_in_the_database(owner, registry):
    answer = await owner.post("/v1/servers", json=BODY, headers=KEY)
    token = answer.json()["join"]["join_token"]
    async with registry.database.transaction() as session:
        (row,) = await session.scalars(select(IdempotencyKey))
    assert token.encode() not in row.sealed
    assert KEY["Idempotency-Key"] not in row.key_sha256
    assert b"alice" not in row.sealed


async def test_a_key_is_its_senders_own(owner, registry, client):
    await owner.post("/v1/servers", json=BODY, headers=KEY)
    async with client(await registry.owner_token(registry.owner)) as other:
        answer = await other.post("/v1/servers", json={**BODY, "name": "bob"}, headers=KEY)
    assert answer.status_code == 201


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/servers", {**BODY, "name": "bob"}), ("/v1/servers/alice/join-token", None)]
)
async def test_a_key_for_another_request_is_refused(owner, path, body):
    await owner.post("/v1/servers", json=BODY, headers=KEY)
    answer = await owner.post(path, json=body, headers=KEY)
    assert (answer.status_code, answer.json()["code"]) == (409, "idempotency-mismatch")
    assert answer.json()["remedy"]


async def test_a_refused_request_leaves_the_key_free(owner):
    refused = await owner.post("/v1/servers", json={**BODY, "name": "-"}, headers=KEY)
    assert refused.status_code == 422
    assert (await owner.post("/v1/servers", json=BODY, headers=KEY)).status_code == 201


@pytest.mark.parametrize("key", ["", "short", "x" * 129, "with space", 'quo"te-inside', "\x7f" * 10])
async def test_what_is_no_key_is_refused(owner, key):
    answer = await owner.post("/v1/servers", json=BODY, headers={"Idempotency-Key": key})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid-idempotency-key")
    assert answer.json()["field"] == "Idempotency-Key"


async def test_the_quoted_form_of_the_draft_is_the_same_key(owner):
    first = await owner.post("/v1/servers", json=BODY, headers=KEY)
    quoted = {"Idempotency-Key": f'"{KEY["Idempotency-Key"]}"'}
    assert (await owner.post("/v1/servers", json=BODY, headers=quoted)).json() == first.json()


async def test_two_at_the_same_moment_have_one_effect(owner, registry):
    answers = await asyncio.gather(*(owner.post("/v1/servers", json=BODY, headers=KEY) for _ in range(5)))
    assert {answer.status_code for answer in answers} <= {201, 409}
    assert await count(registry, Server) == 1
    last = await owner.post("/v1/servers", json=BODY, headers=KEY)
    assert (last.status_code, last.headers["Idempotency-Replayed"]) == (201, "true")


async def test_a_key_is_good_for_a_day(owner, registry):
    await owner.post("/v1/servers", json=BODY, headers=KEY)
    async with registry.database.transaction() as session:
        made = await session.scalar(select(IdempotencyKey.created_at))
        await session.execute(update(IdempotencyKey).values(created_at=made - LIFE))
    answer = await owner.post("/v1/servers", json={**BODY, "name": "bob"}, headers=KEY)
    assert answer.status_code == 201
    for age, left in ((timedelta(hours=1), 1), (timedelta(hours=25), 0)):
        async with registry.database.transaction() as session:
            await forget_old(session, made + age)
        assert await count(registry, IdempotencyKey) == left


@pytest.fixture
def slow(database, tuned):
    """The application with limits that a test can reach."""
    settings = tuned(
        requests_per_second_and_address=0.01, requests_per_second_and_token=0.01, request_burst=5
    )
    app = create_app(settings, database, [], RegistryKey(bytes(32)))

    def make(host, token=None):
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        transport = httpx.ASGITransport(app, client=(host, 1))
        return httpx.AsyncClient(transport=transport, base_url="https://registry", headers=headers)

    return make


async def test_one_address_may_ask_so_often_and_others_go_on(slow):
    async with slow("192.0.2.1") as one, slow("192.0.2.2") as other:
        answers = [await one.get("/v1/pool") for _ in range(6)]
        assert [answer.status_code for answer in answers] == [200] * 5 + [429]
        assert answers[-1].json()["code"] == "rate-limited"
        assert answers[-1].headers["Retry-After"] == "1"
        assert (await other.get("/v1/pool")).status_code == 200


async def test_one_network_of_ipv6_counts_as_one_and_guesses_of_tokens_count_too(slow):
    for number in range(6):
        async with slow(f"2001:db8::{number}", "tc_api_guess") as http:
            last = await http.get("/v1/me")
    assert last.status_code == 429


async def test_one_token_may_ask_so_often_from_wherever(slow, registry):
    token = await registry.owner_token(await registry.member())
    codes = []
    for number in range(6):
        async with slow(f"192.0.2.{number}", token) as http:
            codes.append((await http.get("/v1/me")).status_code)
    assert codes == [200] * 5 + [429]
