"""The API against its own description: whatever is sent, the answer is one that the description allows."""

import json
import threading
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import CHECKS, not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from sqlalchemy import select

from lab.processes import free_port
from nts_core.client import load_roots
from nts_core.control import ServerState
from poolsvc import auth, maintenance, members, notices, people, servers, teams, transfers
from poolsvc.app import create_app
from poolsvc.db import Database
from poolsvc.derived import RegistryKey
from poolsvc.models import Delivery, Identity, Member, MemberRole, StaffRole, TokenKind, Webhook
from poolsvc.notices import NoticeKind

CHECKED = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
]
BEARERS = ["nobody", "operator", "support", "owner", "agent"]
# How many operations each gets done at least, so that "not found" and "forbidden" are not all that is seen.
DONE = {"nobody": 4, "operator": 40, "support": 20, "owner": 30, "agent": 8}
# Those after which there is less to reach come last, and these come last of all.
ENDING = [
    ("POST", "/v1/servers/{name}/leaving"),
    ("DELETE", "/v1/servers/{name}"),
    ("DELETE", "/v1/members/{member}"),
    ("DELETE", "/v1/me"),
    ("DELETE", "/v1/me/session"),
]
# Of this host, since a check connects to it; nothing listens there.
ADDRESS = "127.77.18.1"


class Service(uvicorn.Server):
    """The application on a socket of its own, in a thread."""

    def __init__(self, app, port, database):
        self.database = database
        super().__init__(uvicorn.Config(app, port=port, lifespan="off", log_level="critical"))
        self.thread = threading.Thread(target=self.run)

    async def shutdown(self, sockets=None):
        await super().shutdown(sockets)
        await self.database.close()

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture
async def world(registry):
    """A member with one of everything: a token of each kind, and the ids that paths take."""
    now = datetime.now(UTC)
    member, other = await registry.member("Owner"), await registry.member("Other")
    alice = await registry.server("alice", ADDRESS, state=ServerState.ACTIVE, member=member)
    await registry.server("erin", "198.18.0.2", member=member, agentless=True)
    moving = await registry.server("moving", "198.18.0.3", member=other)
    _, eyes = await registry.monitor("eyes", member)
    colleague = await registry.person(member, MemberRole.TECHNICIAN)
    owner = await registry.person(member)
    tokens = {"nobody": None, "owner": owner.token, "monitor": eyes}
    async with registry.database.transaction("test") as session:
        _, tokens["operator"] = await members.create_operator(session, now)
        support = await members.create_user(session, now, staff=StaffRole.SUPPORT)
        _, tokens["support"] = await auth.issue(session, TokenKind.API, now=now, user_id=support.id)
        _, tokens["agent"] = await auth.issue(session, TokenKind.AGENT, now=now, server_id=alice)
        signed_in, _ = await auth.issue(session, TokenKind.SESSION, now=now, user_id=owner.id)
        program, _ = await auth.issue(session, TokenKind.API, now=now, user_id=owner.id)
        identity = Identity(user_id=owner.id, issuer="https://i.example", subject="s", created_at=now)
        hook = Webhook(member_id=member, url="https://example.org/", created_at=now, enabled_at=now)
        session.add_all((identity, hook))
        await session.flush()
        notice = await notices.announce(session, NoticeKind.ADMITTED, member_id=member, now=now)
        delivery = await session.scalar(select(Delivery.id).where(Delivery.notice_id == notice.id).limit(1))
        settings, to = registry.settings, (await session.get_one(Member, member)).opaque_id
        invited = [
            await teams.invite(session, settings, "x@example.org", now, by=owner.id, member_id=of)
            for of in (member, None)
        ]
        offer = await transfers.offer(session, settings, moving, to, now)
        window = await maintenance.add(
            session,
            await servers.get(session, alice),
            starts_at=now + timedelta(days=1),
            ends_at=now + timedelta(days=2),
            reason="",
            actor="test",
            now=now,
        )
    ids = {
        "name": "alice",
        "member": member,
        "user": colleague.id,
        "hook": hook.id,
        "delivery": delivery,
        "transfer": offer.id,
        "window": window.id,
        "session_id": signed_in.id,
        "token_id": program.id,
        "identity_id": identity.id,
        "invitation": invited[0].id,
        "address": "198.18.0.2",
        "monitor": "eyes",
    }
    special = {
        "/v1/servers/{name}/proofs": {"name": "erin"},
        "/v1/servers/{name}/proofs/{address}/ready": {"name": "erin"},
        "/v1/servers/{name}/acme-account": {"name": "erin"},
        "/v1/invitations/{invitation}": {"invitation": invited[1].id},
    }
    return SimpleNamespace(tokens=tokens, ids=lambda path: ids | special.get(path, {}))


@pytest.fixture
async def service(world, settings, database_url):
    """That registry on a socket."""
    generous = {"requests_per_second_and_address": 1e6, "requests_per_second_and_token": 1e6}
    policy = settings.policy.model_copy(update={**generous, "request_burst": 10**6})
    database = Database(database_url)
    changed = settings.model_copy(update={"policy": policy})
    app = create_app(changed, database, load_roots(None), RegistryKey(bytes(32)))
    port = free_port()
    with Service(app, port, database):
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", tokens=world.tokens, ids=world.ids)


def hammer(service, bearer, examples):
    """Every operation with documents that fit its description and with such as do not; mostly on what there is."""
    schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json", wait_for_schema=20)
    token = service.tokens[bearer]
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    operations = [found.ok() for found in schema.get_all_operations()]
    last = {operation: place for place, operation in enumerate(ENDING, start=1)}
    operations.sort(key=lambda operation: last.get((operation.method.upper(), operation.path), 0))
    assert {(operation.method.upper(), operation.path) for operation in operations} >= set(ENDING)
    done = [operation.label for operation in operations if is_done(service, operation, headers, examples)]
    assert len(done) >= DONE[bearer], done


def is_done(service, operation, headers, examples):
    """Whether one of the examples succeeded."""
    there, answers = service.ids(operation.path), []

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(), strange=st.sampled_from([False, False, False, True]))
    def one(case, strange):
        if not strange:
            case.path_parameters.update({name: there[name] for name in case.path_parameters if name in there})
        answers.append(case.call_and_validate(headers=headers, checks=CHECKED).status_code)

    one()
    return any(status < 300 for status in answers)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("bearer", BEARERS)
async def test_no_request_gets_an_answer_that_the_description_does_not_allow(service, bearer):
    hammer(service, bearer, 4)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("bearer", BEARERS)
async def test_no_request_gets_an_answer_that_the_description_does_not_allow_at_length(service, bearer):
    hammer(service, bearer, 100)


def test_the_checks_are_there():
    """A renamed check of the library must not be left out in silence."""
    assert set(CHECKED) <= set(CHECKS.get_all())


def resolved(schema, document):
    """A schema without references to others, and without null where there is something else."""
    while "$ref" in schema or "anyOf" in schema:
        schema = (
            document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
            if "$ref" in schema
            else schema["anyOf"][0]
        )
    return schema


def whole(schema, document):
    """Something that fits a schema, with all that is optional."""
    schema = resolved(schema, document)
    match schema.get("type"):
        case "object":
            return {name: whole(part, document) for name, part in schema.get("properties", {}).items()}
        case "array":
            return [whole(schema["items"], document)]
        case "string" if "enum" in schema:
            return schema["enum"][0]
        case "string":
            soon = datetime.now(UTC) + timedelta(days=1)
            return soon.isoformat() if schema.get("format") == "date-time" else "0" * 16
        case kind:
            return {"integer": 1, "number": 1.0, "boolean": False}[kind]


def spoilt(body, text):
    """The body once for each string in it, with another text there."""
    match body:
        case str():
            yield text
        case dict() | list():
            for place in body if isinstance(body, dict) else range(len(body)):
                for part in spoilt(body[place], text):
                    other = deepcopy(body)
                    other[place] = part
                    yield other


def parameters(entry, document, where):
    """Names and schemas of an operation's texts in its path or query."""
    for row in entry.get("parameters", ()):
        schema = resolved(row["schema"], document)
        if row["in"] == where and schema.get("type") == "string":
            yield row["name"], schema


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("text", ["a\x00b", "a\x1b[31m"])
async def test_no_text_with_control_characters_comes_further_than_its_document(world, app, client, text):
    """PostgreSQL stores no NUL and refuses even to compare with one. Agents' words are cleaned, not refused."""
    document, asked = app.openapi(), 0
    async with (
        client(world.tokens["operator"]) as http,
        client(world.tokens["agent"]) as agent,
        client(world.tokens["monitor"]) as monitor,
    ):

        async def refuses(method, template, *, ids=None, strict=True, **options):
            path = template.format(**{"name": "lab"} | world.ids(template) | (ids or {}))
            sender = {"agent": agent, "monitor": monitor}.get(template.split("/")[2], http)
            answer = await sender.request(method, path, **options)
            assert answer.status_code < 500, (method, path, options)
            assert not strict or answer.status_code == 422, (method, path, options, answer.text)

        for template, methods in document["paths"].items():
            for method, entry in methods.items():
                for name, _ in parameters(entry, document, "query"):
                    await refuses(method, template, params={name: text})
                    asked += 1
                for name, _ in parameters(entry, document, "path"):
                    await refuses(method, template, ids={name: "".join(f"%{ord(sign):02x}" for sign in text)})
                    asked += 1
                body = (
                    entry.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
                )
                if body is not None:
                    strict = resolved(body, document).get("additionalProperties") is False
                    for bad in spoilt(whole(body, document), text):
                        await refuses(method, template, strict=strict, json=bad)
                        asked += 1
    assert asked > 80


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_half_a_character_is_no_text(world, app, client):
    """JSON can name a surrogate alone, which no encoding can write."""
    document = app.openapi()
    async with client(world.tokens["operator"]) as http:
        for template, methods in document["paths"].items():
            for method, entry in methods.items():
                body = (
                    entry.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
                )
                if body is None:
                    continue
                for bad in spoilt(whole(body, document), "a\ud800"):
                    answer = await http.request(
                        method,
                        template.format(**{"name": "lab"} | world.ids(template)),
                        content=json.dumps(bad),
                        headers={"Content-Type": "application/json"},
                    )
                    assert answer.status_code == 422, (method, template, bad, answer.text)


def test_names_and_labels_are_described_as_they_are_taken(app):
    schemas = app.openapi()["components"]["schemas"]
    for document, name in (
        *((document, "name") for document in ("SelfChange", "MemberRequest", "MemberChange")),
        *((document, "name") for document in ("NewMember", "NewAccount")),
        ("NewApiToken", "label"),
    ):
        schema = resolved(schemas[document]["properties"][name], {"components": {"schemas": schemas}})
        assert schema["maxLength"] == {"name": members.MAX_NAME, "label": people.MAX_LABEL}[name], document


def test_each_document_has_a_name_of_its_own(app):
    """Of two that share one, FastAPI tells them apart by the paths of their modules."""
    assert [name for name in app.openapi()["components"]["schemas"] if "__" in name] == []
