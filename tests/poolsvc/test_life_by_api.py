"""A server's life against the API, in any order: what a model of the table says, and an event for every change.

People and the operator call the API; proofs and probes, which alone raise a state, come by the functions that the
worker calls. The model is the table of `poolsvc.servers`.
"""

import asyncio
from datetime import UTC, datetime, timedelta
from itertools import count, pairwise

import httpx
import hypothesis
from hypothesis import HealthCheck, strategies
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from nts_core.control import ServerState
from poolsvc import servers
from poolsvc.app import create_app
from poolsvc.db import Database
from poolsvc.derived import RegistryKey
from poolsvc.models import StaffRole
from poolsvc.servers import TRANSITIONS, EventKind

S, E = ServerState, EventKind
LIVING = (S.REGISTERED, S.VERIFIED, S.CERTIFIED, S.ACTIVE, S.SUSPENDED)


class ApiLife(RuleBasedStateMachine):
    """One server at a time; a new one when it has left."""

    registry = None
    run = None
    http = None  # by role
    machines = count()

    def __init__(self):
        super().__init__()
        self.numbers = count()
        self.space = next(self.machines)
        self.state = None  # what the model says
        self.holds = set()
        self.scheduled = None  # by whom, for a later day

    def call(self, role, method, path, body=None):
        return self.run(self.http[role].request(method, f"/v1/servers{path}", json=body))

    def expect(self, answer, kind, *, status):
        """The answer to something that is the event `kind`, or that the table refuses."""
        after = TRANSITIONS.get((self.state, kind))
        if after is None:
            assert answer.status_code in {409, 410}, answer.text
            assert answer.json()["remedy"]
        else:
            assert answer.status_code == status, answer.text
            self.state = after

    def register(self):
        number = next(self.numbers)
        self.name = f"box{self.space}-{number}"
        body = {"name": self.name, "addresses": [f"fd00:{self.space:x}::{number:x}"]}
        answer = self.call("owner", "POST", "", body)
        assert answer.status_code == 201, answer.text
        self.state, self.holds, self.scheduled = S.REGISTERED, set(), None

    @rule()
    def begin(self):
        if self.state in (None, S.REMOVED):
            self.register()
        else:
            again = self.call("owner", "POST", "", {"name": self.name, "addresses": ["fd00:ffff::1"]})
            assert (again.status_code, again.json()["code"]) == (409, "name-taken")

    @precondition(lambda self: self.state in LIVING)
    @rule(kind=strategies.sampled_from([E.ADDRESS_PROVED, E.CERTIFICATE_SEEN, E.NTS_CONFIRMED]))
    def worker_raises(self, kind):
        after = TRANSITIONS.get((self.state, kind))
        if after is None:
            return

        async def work():
            async with self.registry.database.transaction() as session:
                server = await servers.get(session, (await servers.find(session, self.name)).id)
                await servers.apply(session, server, kind, actor="worker", reason="", now=datetime.now(UTC))
                if kind is E.ADDRESS_PROVED:
                    server.burnt_at = server.named_at = datetime.now(UTC)
                    for row in server.addresses:
                        row.proved_at = row.confirmed_at = datetime.now(UTC)

        self.run(work())
        self.state = after

    @precondition(lambda self: self.state in (S.ACTIVE, S.SUSPENDED))
    @rule(held=strategies.booleans())
    def operator_holds(self, held):
        method, body = ("PUT", {"reason": "x"}) if held else ("DELETE", None)
        answer = self.call("operator", method, f"/{self.name}/hold", body)
        assert answer.status_code == 200, answer.text
        (self.holds.add if held else self.holds.discard)("operator")
        self.state = S.SUSPENDED if self.holds else S.ACTIVE

    @precondition(lambda self: self.state in (S.ACTIVE, S.SUSPENDED))
    @rule()
    def maintain(self):
        ends = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
        answer = self.call("owner", "POST", f"/{self.name}/maintenance", {"ends_at": ends})
        if "maintenance" in self.holds:
            assert answer.status_code in {201, 409, 422}, answer.text
            return
        assert answer.status_code == 201, answer.text
        self.holds.add("maintenance")
        self.state = S.SUSPENDED

    @precondition(lambda self: "maintenance" in self.holds and self.state is S.SUSPENDED)
    @rule()
    def end_maintenance(self):
        for window in self.call("owner", "GET", f"/{self.name}/maintenance").json()["items"]:
            if window["cancelled_at"] is None:
                answer = self.call("owner", "DELETE", f"/{self.name}/maintenance/{window['id']}")
                assert answer.status_code in {200, 409}, answer.text
        self.holds.discard("maintenance")
        self.state = S.SUSPENDED if self.holds else S.ACTIVE

    @precondition(lambda self: self.state is not None)
    @rule(role=strategies.sampled_from(["owner", "operator"]))
    def leave_later(self, role):
        at = (datetime.now(UTC) + timedelta(days=1)).isoformat()
        answer = self.call(role, "POST", f"/{self.name}/leaving", {"at": at})
        if self.state in servers.NAMED_STATES:
            assert answer.status_code == 202, answer.text
            self.state, self.scheduled = S.LEAVING, role
        else:
            assert answer.status_code == 409, answer.text

    @precondition(lambda self: self.state is not None)
    @rule(role=strategies.sampled_from(["owner", "operator"]))
    def stay(self, role):
        """What an operator scheduled, no member cancels."""
        answer = self.call(role, "DELETE", f"/{self.name}/leaving")
        if (self.scheduled, role) == ("operator", "owner"):
            assert answer.status_code == 403, answer.text
        elif self.state is S.LEAVING and self.scheduled:
            assert answer.status_code == 200, answer.text
            self.state, self.scheduled = S.VERIFIED, None
        else:
            assert answer.status_code == 409, answer.text

    @precondition(lambda self: self.state is not None)
    @rule(role=strategies.sampled_from(["owner", "operator"]))
    def leave(self, role):
        answer = self.call(role, "DELETE", f"/{self.name}")
        assert answer.status_code == 202, answer.text
        if self.state is not S.REMOVED:
            self.state, self.scheduled = S.LEAVING, None

    @precondition(lambda self: self.state is not None)
    @rule(role=strategies.sampled_from(["stranger", "support"]))
    def others_change_nothing(self, role):
        for method, path in (("DELETE", ""), ("POST", "/leaving"), ("DELETE", "/leaving"), ("PUT", "/hold")):
            body = {"reason": "x"} if method in {"POST", "PUT"} else None
            answer = self.call(role, method, f"/{self.name}{path}", body)
            assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")

    @precondition(lambda self: self.state is S.LEAVING and not self.scheduled)
    @rule()
    def worker_closes(self):
        async def work():
            async with self.registry.database.transaction() as session:
                server = await servers.get(session, (await servers.find(session, self.name)).id)
                await servers.apply(
                    session, server, E.CLOSED, actor="worker", reason="", now=datetime.now(UTC)
                )
                server.removal_due_at = None

        self.run(work())
        self.state = S.REMOVED

    @invariant()
    def the_api_says_what_the_model_says(self):
        if self.state is None:
            return
        view = self.call("owner", "GET", f"/{self.name}").json()
        assert view["state"] == self.state
        assert view["in_dns"] is False  # nothing is published here
        assert view["why"]
        assert (view["receipt"] is not None) is (self.state in (S.LEAVING, S.REMOVED))

    @invariant()
    def every_transition_has_its_event(self):
        if self.state is None:
            return
        entries = self.call("owner", "GET", f"/{self.name}/events?limit=200").json()["items"]
        life = [entry for entry in reversed(entries) if entry["kind"] in set(EventKind)]
        assert (life[0]["kind"], life[0]["before"]) == (E.REGISTERED, None)
        for one, other in pairwise(life):
            assert one["after"] == other["before"]
            assert TRANSITIONS[S(other["before"]["state"]), E(other["kind"])] == other["after"]["state"]
        assert life[-1]["after"]["state"] == self.state
        assert all(entry["actor"] for entry in entries)


def test_the_life_of_a_server_against_the_api(database_url, tuned, registry_of):
    generous = {"requests_per_second_and_address": 1e6, "requests_per_second_and_token": 1e6}
    settings = tuned(
        **generous, request_burst=10**6, servers_per_member=10**4, unproved_servers_per_member=10**4
    )
    profile = hypothesis.settings(
        max_examples=10,
        stateful_step_count=20,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        # Not shrunk: with a database behind it that takes longer than reading the steps.
        phases=[hypothesis.Phase.reuse, hypothesis.Phase.generate],
    )
    with asyncio.Runner() as runner:
        database = Database(database_url)
        registry = registry_of(database, settings)
        app = create_app(settings, database, [], RegistryKey(bytes(32)))

        async def prepare():
            owner, other = await registry.member("Owner"), await registry.member("Other")
            return {
                "operator": (await registry.person(staff=StaffRole.OPERATOR)).token,
                "owner": (await registry.person(owner)).token,
                "stranger": (await registry.person(other)).token,
                "support": (await registry.person(staff=StaffRole.SUPPORT)).token,
            }

        def client(token):
            return httpx.AsyncClient(
                transport=httpx.ASGITransport(app),
                base_url="https://registry",
                headers={"Authorization": f"Bearer {token}"},
            )

        ApiLife.registry, ApiLife.run = registry, staticmethod(runner.run)
        ApiLife.http = {role: client(token) for role, token in runner.run(prepare()).items()}
        try:
            run_state_machine_as_test(ApiLife, settings=profile)
        finally:
            runner.run(database.close())
