"""The API against its own description: whatever is sent, the answer is one that the description allows."""

import threading
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import CHECKS, not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from lab.processes import free_port
from poolsvc import auth, members
from poolsvc.app import create_app
from poolsvc.db import Database
from poolsvc.derived import RegistryKey
from poolsvc.models import StaffRole, TokenKind

CHECKED = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
]
BEARERS = ["nobody", "operator", "support", "owner", "agent"]


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
async def service(registry, settings, database_url):
    """A registry with one server, and a token of each kind."""
    member = await registry.member("Owner")
    server = await registry.server("alice", member=member)
    tokens = {"nobody": None, "owner": await registry.owner_token(member)}
    async with registry.database.transaction("test") as session:
        _, tokens["operator"] = await members.create_operator(session, datetime.now(UTC))
        support = await members.create_user(session, registry.now, staff=StaffRole.SUPPORT)
        _, tokens["support"] = await auth.issue(session, TokenKind.API, now=registry.now, user_id=support.id)
        _, tokens["agent"] = await auth.issue(session, TokenKind.AGENT, now=registry.now, server_id=server)
    generous = {"requests_per_second_and_address": 1e6, "requests_per_second_and_token": 1e6}
    policy = settings.policy.model_copy(update={**generous, "request_burst": 10**6})
    database = Database(database_url)
    app = create_app(settings.model_copy(update={"policy": policy}), database, [], RegistryKey(bytes(32)))
    port = free_port()
    with Service(app, port, database):
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", tokens=tokens)


def hammer(service, bearer, examples):
    """Every operation with documents that fit its description and with such as do not."""
    schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json", wait_for_schema=20)
    token = service.tokens[bearer]
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 10
    for operation in operations:

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def one(case):
            case.call_and_validate(headers=headers, checks=CHECKED)

        one()


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
