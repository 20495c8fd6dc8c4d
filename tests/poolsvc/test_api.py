"""The API as its callers see it: documents, and errors as problem documents (RFC 9457)."""

import asyncio
import base64
import json
import re
import shutil
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from sqlalchemy import event, make_url, select, update

from nts_core.control import ServerState, Stage, StageStatus
from nts_core.tls import new_key_and_csr
from poolsvc import auth, issuance, members, servers
from poolsvc.alarms import report, resign
from poolsvc.app import Part, create_app
from poolsvc.db import Database
from poolsvc.derived import RegistryKey
from poolsvc.gate import MAX_BODY
from poolsvc.models import Address, ConnectBack, Member, Order, OrderStatus, Server, TokenKind

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
KEY = base64.b64encode(bytes(range(32))).decode()
HERE = "198.18.0.1"
PROBLEM = {"type", "title", "status", "code", "detail", "remedy", "field"}


@pytest.fixture
async def world(registry, client):
    """A member, an operator, and clients for both; the agent of alice calls from alice's address."""
    owner = await registry.member("Owner")
    async with registry.database.transaction() as session:
        _, operator = await members.create_operator(session, datetime.now(UTC))
    member = await registry.owner_token(owner)
    async with client(operator) as for_operator, client(member) as for_member, client() as public:
        yield SimpleNamespace(
            registry=registry, owner=owner, operator=for_operator, member=for_member, public=public
        )


@pytest.fixture
async def alice(world, client):
    """A server in REGISTERED with its agent."""
    world.server = await world.registry.server("alice", HERE, member=world.owner)
    async with world.registry.database.transaction() as session:
        _, token = await auth.issue(session, TokenKind.AGENT, now=NOW, server_id=world.server)
    async with client(token, source=HERE) as agent:
        world.agent = agent
        yield world


def problem(answer, status, code, field=None):
    """The document of a refusal, after checking its form."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    document = answer.json()
    assert set(document) == PROBLEM
    assert (answer.status_code, document["status"], document["code"]) == (status, status, code), document
    assert document["field"] == field
    assert document["detail"]
    assert isinstance(document["remedy"], str)
    return document


async def test_a_server_is_registered_and_seen_with_all_its_stages(world):
    body = {"name": "Alice", "addresses": [HERE, "FD00::1"]}
    created = await world.member.post("/v1/servers", json=body)
    assert created.status_code == 201
    join = created.json()["join"]
    assert join["command"].endswith(f"pool-agent join http://127.0.0.1:8080 --token {join['join_token']}")
    life = datetime.fromisoformat(join["expires_at"]) - datetime.now(UTC)
    assert timedelta(hours=71) < life <= timedelta(hours=72)
    view = created.json()["server"]
    assert (view["name"], view["domain"]) == ("alice", "alice.servers.pool.example")
    assert (view["state"], view["in_dns"], view["receipt"]) == ("registered", False, None)
    assert [entry["address"] for entry in view["addresses"]] == [HERE, "fd00::1"]
    assert [stage["stage"] for stage in view["stages"]] == list(Stage)
    assert {stage["status"] for stage in view["stages"]} == {StageStatus.WAITING}
    assert view["why"].startswith("name: no agent has joined (run ")
    for reader in (world.member, world.operator):
        assert (await reader.get("/v1/servers/ALICE")).json() == view


async def test_everybody_may_see_the_pool_and_nothing_of_its_members(alice):
    answer = await alice.public.get("/v1/pool")
    assert answer.json() == {
        "pool": "pool.example",
        "servers_domain": "servers.pool.example",
        "ke_port": 4460,
        "opened_at": None,
        "active_servers": 0,
        "quorum": "bootstrap",
        "monitors": 1,
        "unknown_addresses": 0,
        "allow_private_addresses": True,
        "alarms": ["worker: none has been seen for 60 s"],
    }


async def test_servers_are_shown_to_everybody_only_if_their_member_agreed(world):
    registry = world.registry
    shown = await registry.server("shown", "198.18.1.1", "198.18.1.2", state=ServerState.ACTIVE)
    named = await registry.server("named", "198.18.1.3", state=ServerState.VERIFIED)
    await registry.server("hidden", "198.18.1.4", state=ServerState.ACTIVE)
    gone = await registry.server("gone", "198.18.1.5", state=ServerState.REMOVED)
    young = await registry.server("young", "198.18.1.6")
    for identifier in (shown, named, gone, young):
        async with registry.change(identifier) as (_, server):
            server.public = True
    async with registry.change(shown) as (session, server):
        server.addresses[1].proved_at, server.listed_at = None, NOW
        member = await session.get_one(Member, server.member_id)
        member.public = True
    answer = await world.public.get("/v1/pool/servers")
    first, second = answer.json()["items"]
    assert first == {
        "name": "shown",
        "domain": "shown.servers.pool.example",
        "state": "active",
        "state_since": first["state_since"],
        "in_dns": True,
        "addresses": ["198.18.1.1"],
        "member": "member of shown",
        "operator_id": member.opaque_id,
    }
    assert (second["name"], second["in_dns"], second["member"]) == ("named", False, None)


async def test_what_any_worker_sees_is_public_while_that_worker_lives(alice, registry):
    """The API of one process shows what the workers of all of them say."""
    dns, ca = "DNS: not every authoritative server shows the zone", "CA: away"

    async def say(holder, alarms, seconds):
        async with registry.database.transaction() as session:
            await report(session, holder, alarms, datetime.now(UTC) - timedelta(seconds=seconds))

    async def shown():
        return (await alice.public.get("/v1/pool")).json()["alarms"]

    await say("one", [dns, ca], 5)
    await say("two", [ca], 50)
    await say("dead", ["CA: gone long ago"], 61)
    assert await shown() == [ca, dns]
    await say("one", [], 0)
    assert await shown() == [ca]
    await say("two", [ca], 61)
    assert await shown() == []
    async with registry.database.transaction() as session:
        await resign(session, "one")
    assert await shown() == ["worker: none has been seen for 60 s"]


async def test_counting_every_server_is_done_once_a_second_however_often_it_is_asked(alice, database):
    """Nobody needs a token for it."""
    counts = []
    engine = database.engine.sync_engine
    event.listen(
        engine,
        "before_cursor_execute",
        lambda *args: counts.append(args[2]) if "GROUP BY" in args[2] else None,
    )
    began = time.monotonic()
    for _ in range(20):
        await alice.public.get("/v1/pool")
    assert 1 <= len(counts) <= 1 + (time.monotonic() - began)


async def test_idle_agents_report_less_often_the_more_of_them_there_are(alice, registry, app, client):
    """All together they stay below the policy's rate, and no two keep step."""
    bob = await registry.server("bob", "198.18.0.2", state=ServerState.ACTIVE)
    async with registry.database.transaction() as session:
        _, token = await auth.issue(session, TokenKind.AGENT, now=NOW, server_id=bob)

    async def waits(rate):
        policy = registry.settings.policy.model_copy(update={"agent_requests_per_second": rate})
        settings = registry.settings.model_copy(update={"policy": policy})
        app.state.services = replace(app.state.services, settings=settings)
        async with client(token) as http:
            answers = [await http.post("/v1/agent/sync", json={"engine": "e"}) for _ in range(10)]
        return [answer.json()["poll_after"] for answer in answers]

    idle = registry.settings.policy.agent_interval
    few, many = await waits(100), await waits(0.001)
    assert all(idle <= wait <= 1.1 * idle for wait in few)
    assert all(2 / 0.001 <= wait <= 1.1 * 2 / 0.001 for wait in many), "two servers, one report in 1,000 s"
    assert len(set(few)) > 1


async def test_a_member_is_created_with_a_token_that_works(world, client):
    created = await world.operator.post("/v1/members", json={"name": "  New   member "})
    assert (created.status_code, created.json()["name"]) == (201, "New member")
    async with client(created.json()["token"]) as http:
        answer = await http.post("/v1/servers", json={"name": "bob", "addresses": ["198.18.0.2"]})
    assert answer.status_code == 201


async def test_members_names_that_are_refused(world):
    for name, code in (
        *((name, "invalid-name") for name in ("", " ", "me@example.org", "\u202e")),
        *((name, "invalid-document") for name in ("be\x07ll", "nul\x00", "a" * 101)),
    ):
        answer = await world.operator.post("/v1/members", json={"name": name})
        assert problem(answer, 422, code, "name")["remedy"]
    for name in ("Owner", " Owner "):
        answer = await world.operator.post("/v1/members", json={"name": name})
        assert problem(answer, 409, "name-taken", "name")["remedy"]


REFUSED_REGISTRATIONS = [
    ({"name": "-", "addresses": ["198.18.0.9"]}, 422, "invalid-name", "name"),
    ({"name": "www", "addresses": ["198.18.0.9"]}, 422, "reserved-name", "name"),
    ({"name": "älice", "addresses": ["198.18.0.9"]}, 422, "invalid-name", "name"),
    ({"name": "alice", "addresses": ["198.18.0.9"]}, 409, "name-taken", "name"),
    ({"name": "carol", "addresses": ["198.18.0.2"]}, 409, "address-taken", "addresses"),
    ({"name": "carol", "addresses": []}, 422, "invalid-address", "addresses"),
    ({"name": "carol", "addresses": ["nowhere"]}, 422, "invalid-address", "addresses"),
    ({"name": "carol", "addresses": ["224.0.0.1"]}, 422, "invalid-address", "addresses"),
    ({"name": "carol", "addresses": ["::ffff:1.2.3.4"]}, 422, "invalid-address", "addresses"),
    ({"name": "carol", "addresses": ["198.18.0.9"] * 2}, 422, "invalid-address", "addresses"),
    ({"name": "carol", "addresses": ["x"] * 65}, 422, "invalid-document", "addresses"),
    ({"name": "carol"}, 422, "invalid-document", "addresses"),
    ({"name": "a" * 201, "addresses": ["198.18.0.9"]}, 422, "invalid-document", "name"),
    ({"name": 7, "addresses": ["198.18.0.9"]}, 422, "invalid-document", "name"),
    ({"name": "carol", "addresses": "198.18.0.9"}, 422, "invalid-document", "addresses"),
    ({"name": "carol", "addresses": [7]}, 422, "invalid-document", "addresses.0"),
    ({"name": "carol", "addresses": ["198.18.0.9"], "weight": 9}, 422, "invalid-document", "weight"),
    ([], 422, "invalid-document", None),
    (None, 422, "invalid-document", None),
]


async def test_registrations_that_are_refused(alice):
    await alice.registry.server("bob", "198.18.0.2", state=ServerState.VERIFIED)
    for body, status, code, field in REFUSED_REGISTRATIONS:
        answer = await alice.member.post("/v1/servers", json=body)
        assert problem(answer, status, code, field)["remedy"]


async def test_a_refused_registration_leaves_nothing(world):
    await world.member.post("/v1/servers", json={"name": "carol", "addresses": ["224.0.0.1"]})
    problem(await world.member.get("/v1/servers/carol"), 404, "not-found")


async def test_a_body_that_is_no_json_document_is_refused(world):
    headers = {"content-type": "application/json"}
    for body in (b"{", b"", b"\xff\xfe", b'{"name": "a"', b"nul", b'{"name": "\xff"}', b"[" * 60_000):
        answer = await world.member.post("/v1/servers", content=body, headers=headers)
        assert problem(answer, 422, "invalid-document", None)["remedy"]  # a field is named, not a position
    answer = await world.member.post("/v1/servers", content=b'{"name": "\\ud800"}', headers=headers)
    problem(answer, 422, "invalid-document", "name")


async def test_a_body_of_another_content_type_is_refused(world):
    answer = await world.member.post("/v1/servers", data={"name": "carol", "addresses": "198.18.0.9"})
    problem(answer, 422, "invalid-document")


async def test_a_body_that_is_too_large_or_of_unknown_length_is_refused_before_it_is_read(world):
    async def pieces():
        pytest.fail("the body was read")
        yield b""

    for length in (str(MAX_BODY + 1), None, "-1", "9" * 5000, b"\xb2"):
        headers = {} if length is None else {"content-length": length}
        answer = await world.public.post("/v1/members", content=pieces(), headers=headers)
        problem(answer, 413, "too-large")
    fits = json.dumps({"name": "x" * (MAX_BODY - 12)}).encode()
    assert len(fits) == MAX_BODY
    answer = await world.operator.post(
        "/v1/members", content=fits, headers={"content-type": "application/json"}
    )
    problem(answer, 422, "invalid-document", "name")


async def test_what_is_not_there(world):
    for method, path, status, code in (
        ("GET", "/nothing", 404, "not-found"),
        ("GET", "/v1/servers/nobody", 404, "not-found"),
        ("DELETE", "/v1/servers/nobody", 404, "not-found"),
        ("GET", "/v1/servers/%2e%2e%2fetc", 404, "not-found"),
        ("PUT", "/v1/pool", 405, "method-not-allowed"),
    ):
        assert problem(await world.operator.request(method, path), status, code)["remedy"]


@pytest.mark.parametrize(
    ("method", "path", "header", "field"),
    [
        ("GET", "/v1/events?limit=0", None, "limit"),
        ("GET", "/v1/events?cursor=" + "x" * 121, None, "cursor"),
        ("GET", "/v1/members/0", None, "member"),
        ("GET", "/v1/acme/limits", "If-None-Match", "If-None-Match"),
        ("PUT", "/v1/acme/limits", "If-Match", "If-Match"),
        ("POST", "/v1/members", "Idempotency-Key", "Idempotency-Key"),
    ],
)
async def test_a_part_of_a_request_is_named_as_its_caller_does(world, method, path, header, field):
    """As in the refusals that are the pool's own, such as that of a cursor."""
    headers = {header: "x" * 1001} if header else {}
    body = {"name": "New"} if method == "POST" else {}
    answer = await world.operator.request(method, path, headers=headers, json=body)
    assert problem(answer, 422, "invalid-document", field)["remedy"]


@pytest.mark.parametrize("path", ["/v1/members/", "/v1/pool/", "/healthz/", "/openapi.json/"])
async def test_a_slash_too_many_leads_nowhere_and_the_host_that_a_caller_names_is_not_repeated(world, path):
    answer = await world.operator.get(path, headers={"Host": "evil.example"})
    problem(answer, 404, "not-found")
    assert "evil" not in str(answer.headers) + answer.text


async def test_a_worker_has_nothing_to_describe(settings, database):
    app = create_app(settings, database, [], RegistryKey(bytes(32)), Part.WORKER)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="https://worker") as http:
        problem(await http.get("/openapi.json"), 404, "not-found")
        problem(await http.get("/v1/pool"), 404, "not-found")
        assert (await http.get("/healthz")).status_code == 200


async def test_a_name_with_a_nul_is_no_servers_name(world):
    """PostgreSQL stores no NUL and refuses even to compare with one."""
    answer = await world.operator.get("/v1/servers/al%00ice")
    problem(answer, 422, "invalid-document", "name")


async def test_a_name_longer_than_any_server_has_is_refused(world):
    answer = await world.operator.get("/v1/servers/" + "a" * 65)
    problem(answer, 422, "invalid-document", "name")


@pytest.fixture
async def away(database_url, tmp_path):
    """A database that was there when the registry began, and is not any more."""
    before = set(threading.enumerate())
    if database_url.startswith("sqlite"):
        place = tmp_path / "away"
        place.mkdir()
        database = Database(f"sqlite+aiosqlite:///{place / 'registry.db'}")
        shutil.rmtree(place)
    else:
        database = Database(make_url(database_url).set(database="away").render_as_string(hide_password=False))
    yield database
    await database.close()
    # The driver leaves the thread of a connection that failed to itself; it must not outlive the loop it answers to.
    for thread in set(threading.enumerate()) - before:
        await asyncio.to_thread(thread.join, 10)


async def test_a_database_that_is_away_is_a_problem_document_too(away, settings):
    """The worker survives it and tries again, and so do the API's callers, who must be able to read it."""
    transport = httpx.ASGITransport(
        create_app(settings, away, [], RegistryKey(bytes(32))), raise_app_exceptions=False
    )
    async with httpx.AsyncClient(transport=transport, base_url="http://registry") as http:
        answer = await http.get("/v1/pool")
    assert problem(answer, 503, "database-unavailable")["remedy"]
    assert answer.headers["Retry-After"]
    assert "away" not in answer.text, "nothing of the driver's words leaves the registry"


async def test_of_many_registrations_of_one_name_at_once_one_wins_and_all_are_answered(world):
    """On PostgreSQL the requests run side by side, and the table's own rule decides."""
    answers = await asyncio.gather(
        *(
            world.member.post("/v1/servers", json={"name": "alice", "addresses": [f"198.18.0.{number}"]})
            for number in range(1, 6)
        )
    )
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409, 409]
    assert {answer.json()["code"] for answer in answers if answer.is_error} <= {"name-taken", "conflict"}


async def test_the_openapi_document_names_every_route_and_the_bearer_scheme(world):
    answer = await world.public.get("/openapi.json")
    document = json.loads(answer.text)
    assert document["openapi"].startswith("3.")
    assert {"/v1/pool", "/v1/agent/sync"} <= set(document["paths"])  # all of them: test_auth.py
    assert [scheme["scheme"] for scheme in document["components"]["securitySchemes"].values()] == ["bearer"]
    for path, methods in document["paths"].items():
        for method, entry in methods.items():
            assert entry.get("summary"), f"{method} {path}"
            is_public = path.startswith(
                ("/v1/pool", "/v1/agent/rejoin", "/v1/sign-up", "/v1/sign-in", "/v1/oidc")
            ) or (method, path) == ("get", "/v1/regions")
            assert bool(entry.get("security")) is not is_public, f"{method} {path}"


async def test_requests_are_counted_by_route_and_status_without_names(alice, client):
    await alice.operator.get("/v1/servers/alice")
    await alice.operator.get("/v1/servers/secret-name")
    await alice.public.get("/nothing")
    async with client(source="127.0.0.1") as http:
        text = (await http.get("/metrics")).text
    for status in (200, 404):
        labels = f'method="GET",route="/v1/servers/{{name}}",status="{status}"'
        assert f"poolsvc_requests_total{{{labels}}} 1.0" in text
    assert "secret-name" not in text
    assert "/nothing" not in text


@pytest.mark.parametrize(
    ("method", "path", "field", "there"),
    [
        (
            "GET",
            "/v1/events?limit=1&limt=1",
            "limt",
            "`actor`, `cursor`, `kind`, `limit`, `member`, `server`",
        ),
        ("GET", "/v1/servers/alice?q=x", "q", "none"),
        ("GET", "/v1/pool?%00=", "\x00", "none"),
        ("GET", "/v1/members?" + "x" * 9_000, "x" * 100, "`cursor`, `limit`, `q`, `status`"),
        ("DELETE", "/v1/servers/alice?emergncy=true", "emergncy", "`emergency`"),
        ("PATCH", "/v1/servers/alice/settings?weight=0.5", "weight", "none"),
    ],
)
async def test_a_parameter_that_a_call_does_not_have_is_refused(alice, method, path, field, there):
    """One that was misspelt must not be left out: what it should have limited would be done in full."""
    found = problem(await alice.operator.request(method, path), 422, "invalid-document", field)
    assert there in found["remedy"]
    assert (await alice.operator.get("/v1/servers/alice")).json()["state"] == "registered"


async def test_what_machines_ask_may_have_any_parameters(alice):
    for path in ("/healthz", "/openapi.json"):
        assert (await alice.public.get(f"{path}?probe=1")).status_code == 200


async def test_deleting_twice_changes_nothing_more(alice):
    first = await alice.member.delete("/v1/servers/alice")
    second = await alice.operator.delete("/v1/servers/alice")
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json() == second.json()
    view = first.json()
    assert view["state"] == "leaving"
    assert re.fullmatch(r"leaving on [-0-9]+ [:0-9]+ UTC: removed by its member", view["why"])
    assert view["receipt"]["removed_at"] is None
    assert view["receipt"]["exposure"]


@pytest.mark.parametrize("state", [ServerState.LEAVING, ServerState.REMOVED])
async def test_a_server_that_leaves_takes_no_new_agent(world, client, state):
    server = await world.registry.server("alice", member=world.owner)
    async with world.registry.database.transaction() as session:
        _, token = await auth.issue(session, TokenKind.JOIN, now=NOW, server_id=server)
        await session.execute(update(Server).values(state=state))
    async with client(token) as http:
        problem(await http.post("/v1/agent/join", json={"public_key": KEY}), 410, "removed")
    problem(await world.member.post("/v1/servers/alice/join-token"), 410, "removed")


async def sync(world, **report):
    return await world.agent.post("/v1/agent/sync", json={"engine": "builtin 1.0", **report})


async def test_an_agent_reports_and_learns_what_is_wanted_of_it(alice):
    answer = await sync(alice, clock="chrony, synchronised", unknown="ignored", version=7)
    assert answer.status_code == 200
    found = answer.json()
    assert (found["pool"], found["server"], found["state"]) == ("pool.example", "alice", "registered")
    assert found["domain"] == "alice.servers.pool.example"
    assert found["addresses"] == [{"address": HERE, "proved": False, "call": True}]
    assert (found["csr_for"], found["challenges"], found["certificate"]) == (None, [], None)
    assert found["why"].startswith("name: ")
    agent = (await alice.member.get("/v1/servers/alice")).json()["agent"]
    assert (agent["engine"], agent["clock"], agent["problem"]) == (
        "builtin 1.0",
        "chrony, synchronised",
        None,
    )
    assert datetime.now(UTC) - datetime.fromisoformat(agent["seen_at"]) < timedelta(minutes=1)


async def test_an_agents_words_are_kept_bounded_and_printable(alice):
    answer = await sync(
        alice, engine="e\x1b[31m\x00" + "x" * 500, clock="c\nd\u202e" + "x" * 900, problem="p\r" + "x" * 5000
    )
    assert answer.status_code == 200
    agent = (await alice.member.get("/v1/servers/alice")).json()["agent"]
    assert agent["engine"].startswith("e [31m x")
    assert agent["clock"].startswith("c d x")
    assert agent["problem"].startswith("p x")
    assert [len(agent[name]) for name in ("engine", "clock", "problem")] == [100, 300, 1000]


@pytest.mark.parametrize("state", ServerState)
async def test_an_agents_report_raises_no_status(world, client, state):
    """Its word that all is installed and served counts for nothing."""
    server = await world.registry.server("alice", HERE, state=state, member=world.owner)
    async with world.registry.database.transaction() as session:
        _, token = await auth.issue(session, TokenKind.AGENT, now=NOW, server_id=server)
    async with client(token, source=HERE) as agent:
        answer = await agent.post(
            "/v1/agent/sync", json={"engine": "e", "installed": "0" * 64, "serving": ["t"] * 50}
        )
    if state is ServerState.REMOVED:
        assert problem(answer, 410, "removed")["remedy"]
    else:
        assert answer.status_code == 200
    assert (await world.registry.get(server)).state is state


async def test_an_agent_joins_with_a_key_of_32_octets(alice, client):
    renewed = await alice.member.post("/v1/servers/alice/join-token")
    small_order = bytes((1, *bytes(31)))  # one constant signature of it fits every statement
    wrong = [base64.b64encode(key).decode() for key in (b"", bytes(31), bytes(33), bytes(32), small_order)]
    async with client(renewed.json()["join_token"]) as http:
        for text in (*wrong, "é", KEY[:-1], "\x00" + KEY, "A" * 40_000):
            answer = await http.post("/v1/agent/join", json={"public_key": text})
            problem(answer, 422, "invalid-document", "public_key")
        joined = await http.post("/v1/agent/join", json={"public_key": KEY, "later": 1})
    assert joined.json()["domain"] == "alice.servers.pool.example"
    assert "token" in joined.json()
    assert (await alice.registry.get(alice.server)).agent_key == KEY


@pytest.fixture
async def ordered(alice):
    """Alice in VERIFIED with an order that waits for the agent's request."""
    async with alice.registry.change(alice.server) as (session, server):
        await servers.apply(
            session, server, servers.EventKind.ADDRESS_PROVED, actor="test", reason="", now=NOW
        )
        server.joined_at = server.named_at = NOW
        session.add(Order(server_id=alice.server, status=OrderStatus.WANTED, created_at=NOW))
    alice.order = (await sync(alice)).json()["csr_for"]
    assert alice.order is not None
    return alice


async def the_order(world):
    async with world.registry.database.transaction() as session:
        return (await session.scalars(select(Order))).one()


async def test_a_request_for_the_order_makes_it_go_on(ordered):
    pem = new_key_and_csr("alice.servers.pool.example")[1]
    answer = await sync(ordered, csr={"order": ordered.order, "pem": pem})
    assert answer.json()["csr_for"] is None
    order = await the_order(ordered)
    assert (order.status, order.csr) == (OrderStatus.REQUESTED, pem)
    assert order.due_at is not None
    again = new_key_and_csr("alice.servers.pool.example")[1]
    await sync(ordered, csr={"order": ordered.order, "pem": again})
    assert (await the_order(ordered)).csr == pem, "the first one counts"


async def test_an_agent_reports_more_often_the_nearer_its_order_is(ordered):
    async def poll_after(**values):
        async with ordered.registry.database.transaction() as session:
            now, table = datetime.now(UTC), Order if "created_at" in values else Server
            await session.execute(update(table).values({name: now + by for name, by in values.items()}))
        return (await sync(ordered)).json()["poll_after"]

    tick, idle = 2 * ordered.registry.settings.policy.tick, ordered.registry.settings.policy.agent_interval
    assert await poll_after(created_at=timedelta(0)) == pytest.approx(min(0.05, tick))
    assert await poll_after(created_at=timedelta(hours=-1)) == pytest.approx(tick)
    async with ordered.registry.database.transaction() as session:
        await session.execute(update(Order).values(status=OrderStatus.FAILED))
    assert idle <= await poll_after(order_due_at=timedelta(days=30)) <= 1.1 * idle
    assert await poll_after(order_due_at=timedelta(seconds=60)) == pytest.approx(30, abs=5)
    assert await poll_after(order_due_at=timedelta(seconds=15)) == pytest.approx(0.2)
    assert await poll_after(order_due_at=timedelta(0)) < 5


async def test_a_request_for_another_order_is_ignored(ordered):
    bob = await ordered.registry.server("bob", "198.18.0.2")
    async with ordered.registry.database.transaction() as session:
        session.add(Order(server_id=bob, status=OrderStatus.WANTED, created_at=NOW))
    pem = new_key_and_csr("alice.servers.pool.example")[1]
    for order in (ordered.order + 1, 0, -1, 2**80):
        answer = await sync(ordered, csr={"order": order, "pem": pem})
        assert answer.json()["csr_for"] == ordered.order
    async with ordered.registry.database.transaction() as session:
        assert [row.csr for row in await session.scalars(select(Order))] == [None, None]


async def test_a_key_is_in_one_order_only(ordered):
    """Also not in the next one of the same server, and not in another request for it."""
    private, pem = new_key_and_csr("alice.servers.pool.example")
    await sync(ordered, csr={"order": ordered.order, "pem": pem})
    async with ordered.registry.database.transaction() as session:
        await session.execute(update(Order).values(status=OrderStatus.FAILED))
        session.add(Order(server_id=ordered.server, status=OrderStatus.WANTED, created_at=NOW))
    wanted = (await sync(ordered)).json()["csr_for"]
    assert wanted != ordered.order
    key = serialization.load_pem_private_key(private.encode(), None)
    names = x509.SubjectAlternativeName([x509.DNSName("alice.servers.pool.example")])
    builder = x509.CertificateSigningRequestBuilder(x509.Name([])).add_extension(names, critical=False)
    other = builder.sign(key, hashes.SHA512()).public_bytes(serialization.Encoding.PEM).decode()
    for again in (pem, other):
        answer = await sync(ordered, csr={"order": wanted, "pem": again})
        assert "another key" in problem(answer, 422, "invalid-csr", "csr")["remedy"]
    fresh = new_key_and_csr("alice.servers.pool.example")[1]
    assert (await sync(ordered, csr={"order": wanted, "pem": fresh})).json()["csr_for"] is None


async def test_a_request_that_is_not_for_the_domain_is_refused(ordered):
    for pem in ("", "garbage", new_key_and_csr("bob.servers.pool.example")[1], "x" * 60_000):
        answer = await sync(ordered, csr={"order": ordered.order, "pem": pem})
        assert problem(answer, 422, "invalid-csr", "csr")["remedy"]
    order = await the_order(ordered)
    assert (order.status, order.csr) == (OrderStatus.WANTED, None)


async def test_a_request_with_a_nul_beside_it_is_refused(ordered):
    """PEM readers skip what stands around the armour; PostgreSQL cannot store it."""
    pem = new_key_and_csr("alice.servers.pool.example")[1]
    answer = await sync(ordered, csr={"order": ordered.order, "pem": f"{pem}\x00"})
    problem(answer, 422, "invalid-csr", "csr")


async def test_a_challenge_is_relayed_until_its_order_is_over(ordered):
    async def set_order(**values):
        async with ordered.registry.database.transaction() as session:
            await session.execute(update(Order).values(**values))

    await set_order(status=OrderStatus.PENDING, csr="x", token="t" * 43, key_authorization="t.k")
    found = (await sync(ordered)).json()
    assert found["challenges"] == [{"token": "t" * 43, "key_authorization": "t.k"}]
    assert (await the_order(ordered)).served_at is None
    await sync(ordered, serving=["other"])
    assert (await the_order(ordered)).served_at is None
    await sync(ordered, serving=["other", "t" * 43])
    order = await the_order(ordered)
    assert order.served_at is not None
    assert order.due_at == order.served_at
    await set_order(status=OrderStatus.FAILED)
    assert (await sync(ordered)).json()["challenges"] == []


async def issued(world):
    """The order became a certificate, and the one after it failed."""
    async with world.registry.database.transaction() as session:
        values = {"chain": "PEM", "fingerprint": "ab", "csr": "x", "url": "https://ca.example/order/1"}
        await session.execute(update(Order).values(status=OrderStatus.ISSUED, **values))
        session.add(Order(server_id=world.server, status=OrderStatus.FAILED, created_at=NOW))


async def test_the_newest_certificate_is_handed_out(ordered):
    await issued(ordered)
    assert (await sync(ordered)).json()["certificate"] == {
        "order": ordered.order,
        "chain": "PEM",
        "fingerprint": "ab",
    }


async def join_again(world, client):
    renewed = await world.member.post("/v1/servers/alice/join-token")
    async with client(renewed.json()["join_token"]) as http:
        joined = await http.post("/v1/agent/join", json={"public_key": KEY})
    world.agent.headers["Authorization"] = f"Bearer {joined.json()['token']}"


async def test_an_agent_that_joins_again_gets_no_certificate_of_a_key_that_it_lost(ordered, client):
    await issued(ordered)
    await join_again(ordered, client)
    assert (await sync(ordered)).json()["certificate"] is None
    assert (await ordered.registry.get(ordered.server)).order_due_at is not None


async def test_an_agent_that_joins_again_ends_the_order_under_way(ordered, client):
    async with ordered.registry.database.transaction() as session:
        await session.execute(
            update(Order).values(status=OrderStatus.PENDING, authorization_url="https://ca.example/authz")
        )
    await join_again(ordered, client)
    order = await the_order(ordered)
    assert (order.status, order.error) == (OrderStatus.FAILED, "the agent joined again")
    assert order.due_at is not None, "its authorization has to be deactivated"
    assert (await ordered.registry.get(ordered.server)).order_due_at is not None


async def call(world, address=HERE):
    return await world.agent.post("/v1/agent/proof", json={"address": address})


async def test_a_call_from_the_address_gets_a_nonce_and_makes_the_proof_due(alice):
    answer = await call(alice)
    assert answer.status_code == 200
    async with alice.registry.database.transaction() as session:
        (row,) = await session.scalars(select(Address))
    assert (row.nonce, row.address) == (answer.json()["nonce"], HERE)
    assert len(row.nonce) >= 43
    assert row.proof_due_at > datetime.now(UTC), "the agent may set its answer up first"
    assert (await sync(alice, serving=[row.nonce])).json()["addresses"][0]["call"] is False
    async with alice.registry.database.transaction() as session:
        (row,) = await session.scalars(select(Address))
    assert row.proof_due_at <= datetime.now(UTC)


async def test_a_call_from_another_address_is_refused(alice, client, app):
    token = alice.agent.headers["Authorization"].removeprefix("Bearer ")
    for source in ("198.18.0.2", "::1", "127.0.0.1"):
        async with client(token, source=source) as http:
            answer = await http.post("/v1/agent/proof", json={"address": HERE})
        document = problem(answer, 409, "address-mismatch", "address")
        assert source in document["detail"]
    async with alice.registry.database.transaction() as session:
        assert [row.nonce for row in await session.scalars(select(Address))] == [None]


async def test_a_call_over_a_dual_stack_socket_is_from_the_ipv4_address(alice, client):
    token = alice.agent.headers["Authorization"].removeprefix("Bearer ")
    async with client(token, source=f"::ffff:{HERE}") as http:
        assert (await http.post("/v1/agent/proof", json={"address": HERE})).status_code == 200


async def test_a_call_for_an_address_that_is_not_listed_is_refused(alice):
    problem(await call(alice, "198.18.0.77"), 404, "not-found", "address")


async def test_the_operator_may_waive_the_source_address_for_members_behind_nat(alice, tuned, database):
    app = create_app(tuned(require_source_address=False), database, [], RegistryKey(bytes(32)))
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
    headers = alice.agent.headers
    async with httpx.AsyncClient(transport=transport, base_url="https://r", headers=headers) as http:
        assert (await http.post("/v1/agent/proof", json={"address": HERE})).status_code == 200


async def test_an_address_and_its_prefix_are_connected_to_five_times_an_hour(alice):
    """Connections of more than an hour ago do not count."""

    async def connected(address, prefix, age):
        at = datetime.now(UTC) - age
        async with alice.registry.database.transaction() as session:
            session.add(ConnectBack(address=address, prefix=prefix, at=at))

    minute = timedelta(minutes=1)
    for _ in range(9):
        await connected(HERE, "198.18.0.0/24", 61 * minute)
        await connected("198.18.9.1", "198.18.9.0/24", minute)
    for last in range(4):
        await connected(f"198.18.0.{last}", "198.18.0.0/24", minute)
    assert (await call(alice)).status_code == 200
    await connected("198.18.0.9", "198.18.0.0/24", minute)
    assert problem(await call(alice), 429, "too-many-requests")["remedy"]


async def test_after_the_removal_the_agent_is_told_to_stop(alice):
    async with alice.registry.database.transaction() as session:
        await session.execute(update(Server).values(state=ServerState.REMOVED))
    problem(await sync(alice), 410, "removed")
    problem(await call(alice), 410, "removed")


async def test_a_leaving_server_may_still_report_but_not_prove(alice):
    await alice.member.delete("/v1/servers/alice")
    assert (await sync(alice)).json()["state"] == "leaving"
    problem(await call(alice), 410, "removed")


async def test_a_wanted_order_of_a_leaving_server_is_not_begun(ordered):
    await ordered.member.delete("/v1/servers/alice")
    assert (await sync(ordered)).json()["csr_for"] is None
    pem = new_key_and_csr("alice.servers.pool.example")[1]
    await sync(ordered, csr={"order": ordered.order, "pem": pem})
    assert (await the_order(ordered)).due_at is None


async def test_certificates_and_their_errors_are_shown(ordered):
    async with ordered.registry.database.transaction() as session:
        await session.execute(
            update(Order).values(status=OrderStatus.FAILED, error="CA: unauthorized: wrong body")
        )
    view = (await ordered.member.get("/v1/servers/alice")).json()
    assert [entry["error"] for entry in view["certificates"]] == ["CA: unauthorized: wrong body"]
    issuance_stage = next(stage for stage in view["stages"] if stage["stage"] == Stage.ISSUANCE)
    assert issuance_stage["status"] == StageStatus.FAILED
    assert issuance_stage["remedy"]


async def test_an_answer_is_sent_only_after_its_transaction_has_ended(alice):
    """What a 201 promised must be there for the next request, of whichever process."""
    for number in range(5):
        await alice.operator.post("/v1/members", json={"name": f"member {number}"})
        async with alice.registry.database.transaction() as session:
            names = set(await session.scalars(select(Member.name)))
        assert f"member {number}" in names
    assert issuance.open_order(await alice.registry.get(alice.server)) is None


TRAFFIC = ("traffic_cap", "traffic", "ke_cap", "ke_traffic")


@pytest.mark.parametrize("figure", [None, 0, 12.5, 1e9])
async def test_what_an_agent_says_of_its_traffic_is_kept(registry, client, figure):
    server, token = await _agent(registry)
    async with client(token) as http:
        body = {"engine": "builtin"} | dict.fromkeys(TRAFFIC, figure)
        assert (await http.post("/v1/agent/sync", json=body)).status_code == 200
    found = await registry.get(server)
    assert [getattr(found, name) for name in TRAFFIC] == [figure] * 4


@pytest.mark.parametrize("figure", ["NaN", "Infinity", "-Infinity", "-1", "1e300"])
async def test_figures_that_cannot_be_are_not_kept(registry, client, figure):
    server, token = await _agent(registry)
    figures = ", ".join(f'"{name}": {figure}' for name in TRAFFIC)
    text = f'{{"engine": "builtin", {figures}}}'
    async with client(token) as http:
        answer = await http.post("/v1/agent/sync", content=text, headers={"Content-Type": "application/json"})
        assert answer.status_code in {200, 422}
    found = await registry.get(server)
    assert [getattr(found, name) for name in TRAFFIC] == [None] * 4


async def _agent(registry):
    server = await registry.server("alice", "198.18.0.1")
    async with registry.database.transaction() as session:
        _, token = await auth.issue(session, TokenKind.AGENT, now=NOW, server_id=server)
    return server, token
