"""What an agent asks for its server: maintenance, leaving on a later day, a renewal, a check; and what it is shown."""

import asyncio
import json
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta

import pytest
from pydantic import TypeAdapter
from sqlalchemy import select, update

from lab.processes import free_port
from member_agent.commands import lines_of
from nts_core.client import load_roots
from nts_core.control import CheckAnswer, CheckStatus, ServerState, ServerStatus, Stage
from poolsvc import auth, inspection, members, onboarding, servers
from poolsvc.app import create_app
from poolsvc.derived import RegistryKey
from poolsvc.models import (
    Address,
    Command,
    CommandKind,
    Event,
    HoldKind,
    Member,
    MemberStatus,
    Monitor,
    MonitorView,
    Order,
    OrderStatus,
    Server,
    TokenKind,
    ViewRole,
)

S = ServerState
KEY = RegistryKey(bytes(32))
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
STATUS = TypeAdapter(ServerStatus)


@pytest.fixture
async def agent(registry, call):
    """`await agent(METHOD, PATH, json=...)` of the active server alice, which has a certificate; and its owner."""
    return await Agent.of(registry, call)


class Agent:
    @classmethod
    async def of(cls, registry, call, state=S.ACTIVE):
        self = cls()
        self.registry, self.call = registry, call
        self.member = await registry.member("Owner")
        self.owner = await registry.owner_token(self.member, kind=TokenKind.SESSION)
        self.server = await registry.server("alice", state=state, member=self.member)
        self.now = datetime.now(UTC)
        async with registry.database.transaction("test") as session:
            _, self.token = await auth.issue(session, TokenKind.AGENT, now=self.now, server_id=self.server)
        return self

    async def __call__(self, method, path="", token=None, name="alice", **options):
        return await self.call(token or self.token, method, f"/v1/servers/{name}{path}", **options)

    async def certified(self, *issued):
        """One certificate of each time, the last of which is renewed in a month."""
        async with self.registry.change(self.server) as (session, server):
            session.add_all(
                Order(
                    server_id=self.server,
                    status=OrderStatus.ISSUED,
                    created_at=at,
                    issued_at=at,
                    fingerprint=f"{number:064x}",
                    serial=f"{number:x}",
                    chain="PEM",
                    not_before=at,
                    not_after=at + 90 * DAY,
                )
                for number, at in enumerate(issued)
            )
            server.counted_at, server.order_due_at = issued[0], self.now + 30 * DAY

    async def events(self, *kinds):
        async with self.registry.database.transaction() as session:
            found = await session.scalars(select(Event).where(Event.kind.in_(kinds)).order_by(Event.id))
            return list(found)

    async def of_server(self):
        return await self.registry.get(self.server)

    async def change(self, **values):
        async with self.registry.database.transaction("test") as session:
            await session.execute(update(Server).where(Server.id == self.server).values(**values))


async def test_an_agent_pauses_and_resumes_its_server_in_its_own_name(agent):
    until = agent.now + HOUR
    made = await agent("POST", "/maintenance", json={"ends_at": until.isoformat(), "reason": "new disk"})
    assert made.status_code == 201
    view = (await agent("GET")).json()
    assert (view["state"], view["share"]) == ("suspended", 0.0)
    (hold,) = view["holds"]
    assert (hold["kind"], hold["reason"][-10:]) == ("maintenance", ": new disk")
    assert [row["id"] for row in (await agent("GET", "/maintenance")).json()["items"]] == [made.json()["id"]]
    assert (await agent("DELETE", f"/maintenance/{made.json()['id']}")).json()["cancelled_at"] is not None
    changes = await agent.events("maintenance-created", "hold-set", "hold-created", "maintenance-changed")
    assert len(changes) == 4
    assert {event.actor for event in changes} == {f"agent {agent.server}"}


async def test_an_agent_leaves_on_a_later_day_only_and_may_take_it_back(agent):
    at_once = await agent("POST", "/leaving", json={})
    assert (at_once.status_code, at_once.json()["code"]) == (403, "forbidden")
    assert (await agent("DELETE")).status_code == 403
    wish = {"at": (agent.now + DAY).isoformat()}
    left = await agent("POST", "/leaving", json=wish)
    assert (left.status_code, left.json()["state"]) == (202, "leaving")
    server = await agent.of_server()
    assert (server.leave_reason, server.leave_by_operator) == ("removed by its agent", False)
    assert (await agent("DELETE", "/leaving")).json()["state"] == "verified"
    changes = await agent.events("leave", "leave-cancelled")
    assert [event.actor for event in changes] == [f"agent {agent.server}"] * 2


async def test_what_an_agent_scheduled_its_people_cancel_and_what_an_operator_did_no_agent(agent):
    wish = {"at": (agent.now + DAY).isoformat()}
    assert (await agent("POST", "/leaving", json=wish)).status_code == 202
    assert (await agent("DELETE", "/leaving", agent.owner)).status_code == 200
    async with agent.registry.database.transaction("test") as session:
        _, operator = await members.create_operator(session, agent.now)
    assert (await agent("POST", "/leaving", operator, json=wish)).status_code == 202
    refused = await agent("DELETE", "/leaving")
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
    assert (await agent.of_server()).state is S.LEAVING


async def test_the_agent_of_a_blocked_member_may_no_more_than_its_people(agent):
    async with agent.registry.database.transaction("test") as session:
        blocked = {"status": MemberStatus.BLOCKED}
        await session.execute(update(Member).where(Member.id == agent.member).values(**blocked))
    until = {"ends_at": (agent.now + HOUR).isoformat()}
    for method, path, body in (
        ("POST", "/maintenance", until),
        ("POST", "/renewal", None),
        ("POST", "/check", None),
    ):
        for token in (agent.token, agent.owner):
            answer = await agent(method, path, token, json=body)
            assert (answer.status_code, answer.json()["code"]) == (403, "member-blocked"), path
    assert (await agent("GET")).status_code == 200
    wish = {"at": (agent.now + DAY).isoformat()}
    assert (await agent("POST", "/leaving", json=wish)).status_code == 202


async def test_a_renewal_by_hand_is_an_order_that_is_due_now_and_once_a_day(agent):
    await agent.certified(agent.now - 20 * DAY)
    before = (await agent("GET")).json()["certificate"]
    assert before["renewal_at"] == (agent.now + 30 * DAY).isoformat().replace("+00:00", "Z")
    assert (before["ordering"], before["problem"]) == (False, None)
    assert (await agent("POST", "/renewal")).status_code == 202
    due = (await agent.of_server()).order_due_at
    assert agent.now <= due <= datetime.now(UTC)
    async with agent.registry.database.transaction() as session:
        going = await onboarding.admit(session, agent.registry.settings, [agent.server], due)
        assert [server.id for server in going] == [agent.server]
    again = await agent("POST", "/renewal")
    assert (again.status_code, again.json()["code"]) == (409, "wrong-state")
    await agent.change(order_due_at=agent.now + 30 * DAY)
    again = await agent("POST", "/renewal", agent.owner)
    assert (again.status_code, again.json()["code"]) == (429, "too-many-requests")
    assert 86_000 < int(again.headers["Retry-After"]) <= 86_400
    (event,) = await agent.events("renewal-ordered")
    assert (event.actor, event.server_id) == (f"agent {agent.server}", agent.server)
    async with agent.registry.database.transaction("test") as session:
        await session.execute(update(Command).values(at=agent.now - DAY))
    assert (await agent("POST", "/renewal")).status_code == 202
    async with agent.registry.database.transaction() as session:
        assert len(list(await session.scalars(select(Command)))) == 1, "what is old is forgotten"


async def test_a_renewal_waits_for_an_open_order(agent):
    await agent.certified(agent.now - 20 * DAY)
    async with agent.registry.database.transaction("test") as session:
        wanted = {"status": OrderStatus.WANTED, "error": "the agent is silent"}
        session.add(Order(server_id=agent.server, created_at=agent.now, **wanted))
    refused = await agent("POST", "/renewal")
    assert (refused.status_code, "open already" in refused.json()["detail"]) == (409, True)
    found = (await agent("GET")).json()["certificate"]
    assert (found["ordering"], found["renewal_at"]) == (True, None)
    assert (found["serial"], found["problem"]) == ("0", "the agent is silent")


async def test_a_renewal_waits_for_what_the_ca_lets_one_name_have(agent):
    await agent.certified(*(agent.now - number * HOUR for number in range(5, 0, -1)))
    refused = await agent("POST", "/renewal")
    assert (refused.status_code, "CA's limits" in refused.json()["detail"]) == (429, True)
    # One of five in a week comes back after a fifth of that.
    assert DAY < timedelta(seconds=int(refused.headers["Retry-After"])) < 2 * DAY
    assert (await agent.of_server()).order_due_at == agent.now + 30 * DAY


async def test_nobody_orders_out_of_turn(agent):
    turn = agent.now + 3 * HOUR
    await agent.change(queue_round=1, order_due_at=turn)
    refused = await agent("POST", "/renewal")
    assert refused.status_code == 429
    assert f"{turn:%Y-%m-%d %H:%M}" in refused.json()["detail"]
    assert (await agent.of_server()).order_due_at == turn


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"agentless": True}, "own account"),
        ({"named_at": None}, "not in DNS yet"),
        ({"state": S.REGISTERED}, "not in DNS yet"),
    ],
)
async def test_who_orders_otherwise_or_not_yet_has_nothing_to_renew(agent, values, words):
    await agent.change(**values)
    refused = await agent("POST", "/renewal", agent.owner)
    assert (refused.status_code, refused.json()["code"]) == (409, "wrong-state")
    assert words in refused.json()["detail"]
    assert refused.json()["remedy"]


async def test_of_two_renewals_at_a_time_one_is_ordered(agent):
    await agent.certified(agent.now - 20 * DAY)
    answers = await asyncio.gather(*(agent("POST", "/renewal") for _ in range(3)))
    assert sorted(answer.status_code for answer in answers) == [202, 409, 409]


async def test_a_repeated_renewal_is_answered_as_before(agent):
    await agent.certified(agent.now - 20 * DAY)
    key = {"Idempotency-Key": "0123456789"}
    first, second = [await agent("POST", "/renewal", headers=key, json={}) for _ in range(2)]
    assert (first.status_code, second.status_code) == (202, 202)
    assert second.headers["Idempotency-Replayed"] == "true"


@pytest.mark.parametrize("state", S)
async def test_an_agent_reads_every_state_of_its_server(registry, call, state):
    agent = await Agent.of(registry, call, state)
    answer = await agent("GET")
    found = STATUS.validate_json(answer.content)
    assert (found.name, found.domain, found.state) == ("alice", "alice.servers.pool.example", state)
    assert (found.in_dns, found.share, found.certificate, found.queue) == (False, 0.0, None, None)
    assert found.why == answer.json()["why"] != ""
    assert [row.address for row in found.addresses] == ["198.18.0.1"]
    assert [hold.kind for hold in found.holds] == ["operator"] * (state is S.SUSPENDED)


async def test_an_agent_reads_all_that_is_known_of_its_server(agent):
    await agent.certified(agent.now - 20 * DAY)
    turn = agent.now + 3 * HOUR
    async with agent.registry.change(agent.server) as (session, server):
        server.agent_seen_at, server.agent_problem = agent.now, "the disk is full"
        server.addresses[0].score, server.addresses[0].proof_error = 17.5, "no answer"
        await servers.set_hold(session, server, HoldKind.SCORE, reason="low", actor="test", now=agent.now)
        server.queue_round, server.order_due_at, server.counted_at = 1, turn, None
    body = (await agent("GET")).json()
    found = STATUS.validate_json(json.dumps(body))
    assert (found.agent.seen_at, found.agent.problem) == (agent.now, "the disk is full")
    assert (found.addresses[0].score, found.addresses[0].proof_error) == (17.5, "no answer")
    assert [(hold.kind, hold.reason) for hold in found.holds] == [("score", "low")]
    assert (found.queue.position, found.queue.waiting, found.queue.turn_at) == (1, 1, turn)
    assert (found.certificate.not_after, found.certificate.renewal_at) == (agent.now + 70 * DAY, turn)
    assert set(body) > {"stages", "receipt"}, "what it does not show it does not mind"


@pytest.mark.parametrize(("pool", "share"), [(3, 1.0), (12, 8 / 12)])
async def test_the_share_is_the_part_of_the_answers_that_name_a_server(agent, pool, share):
    for number in range(2, pool + 1):
        await agent.registry.server(f"s{number}", f"198.18.1.{number}", state=S.ACTIVE)
    async with agent.registry.database.transaction("test") as session:
        await session.execute(update(Server).values(listed_at=agent.now))
        await session.execute(update(Address).values(score=20.0))
    assert (await agent("GET")).json()["share"] == pytest.approx(share, abs=1e-6)
    await agent.change(traffic_cap=50.0, traffic=100.0)
    less = (await agent("GET")).json()["share"]
    assert less == 1.0 if share == 1.0 else less < share * 0.8
    await agent.change(ke_cap=10.0, ke_traffic=10_000.0)
    least = (await agent("GET")).json()["share"]
    assert least == 1.0 if share == 1.0 else least < less / 2


async def test_a_check_needs_an_address_that_somebody_was_at(registry, call):
    agent = await Agent.of(registry, call, S.REGISTERED)
    refused = await agent("POST", "/check")
    assert (refused.status_code, refused.json()["code"]) == (409, "wrong-state")
    async with registry.database.transaction("test") as session:
        await session.execute(update(Address).values(called_at=agent.now - HOUR))
    assert (await agent("POST", "/check")).status_code == 409
    async with registry.database.transaction() as session:
        assert list(await session.scalars(select(Command))) == []


async def test_a_check_answers_with_findings_and_counts(registry, client, tuned):
    """Nothing runs there; what is found where something does is in `test_inspection`."""
    server = await registry.server("here", "127.77.18.1", state=S.ACTIVE)
    async with registry.database.transaction("test") as session:
        _, token = await auth.issue(session, TokenKind.AGENT, now=datetime.now(UTC), server_id=server)
    ports = {"http": free_port(), "ke": free_port()}
    app = create_app(tuned(ports=ports, checks_per_hour=1), registry.database, load_roots(None), KEY)
    async with client(token, app=app) as http:
        answer = await http.post("/v1/servers/here/check")
        assert (await http.post("/v1/servers/here/check")).status_code == 429
    found = TypeAdapter(CheckAnswer).validate_json(answer.content).findings
    assert [finding.check for finding in found] == list(inspection.Check)
    assert {finding.address for finding in found} == {"127.77.18.1"}
    failed = [finding for finding in found if finding.status is CheckStatus.FAILED]
    assert [finding.check for finding in failed] == ["http", "tcp"]
    assert all(finding.remedy for finding in failed)


async def test_a_server_is_checked_some_times_an_hour(agent):
    limit = agent.registry.settings.policy.checks_per_hour
    async with agent.registry.database.transaction("test") as session:
        session.add_all(
            Command(server_id=agent.server, kind=CommandKind.CHECK, at=agent.now - number * HOUR / 10)
            for number in range(1, limit + 1)
        )
        session.add(Command(server_id=agent.server, kind=CommandKind.RENEWAL, at=agent.now))
    refused = await agent("POST", "/check")
    assert (refused.status_code, refused.json()["code"]) == (429, "too-many-requests")
    assert 0 < int(refused.headers["Retry-After"]) <= 3600 - limit * 360 + 1


async def test_few_servers_are_checked_at_a_time(agent, app):
    with ExitStack() as stack:
        for _ in range(inspection.MAX_AT_ONCE):
            stack.enter_context(app.state.services.inspector.place())
        refused = await agent("POST", "/check")
    assert (refused.status_code, refused.json()["code"]) == (429, "rate-limited")
    assert int(refused.headers["Retry-After"]) > 0
    async with agent.registry.database.transaction() as session:
        assert list(await session.scalars(select(Command))) == []


async def test_a_status_has_what_each_monitor_sees_and_of_what_the_share_is_made(agent):
    """The agent's document reads all of it; an older registry's answer, without, is read as well."""
    bob, _ = await agent.registry.monitor("frankfurt")
    async with agent.registry.change(agent.server) as (session, server):
        (await session.get_one(Monitor, bob)).country = "DE"
        (address,) = server.addresses
        address.score, address.unknown = 12.0, "1 of the 3 monitors that it takes know it"
        session.add(
            MonitorView(
                address_id=address.id,
                monitor_id=bob,
                role=ViewRole.ACTIVE,
                role_since=agent.now,
                at=agent.now - HOUR,
                failed=Stage.NTP_KE_COOKIE,
                failed_since=agent.now - 2 * HOUR,
                detail="no answer",
                score=3.5,
                step=-5.0,
            )
        )
        server.listed_at, server.traffic_cap, server.traffic = agent.now, 50.0, 100.0
    body = (await agent("GET")).json()
    seen = STATUS.validate_python(body)
    assert (seen.weight.wanted, seen.weight.score, seen.weight.capacity) == (1, pytest.approx(0.4), 0.5)
    (address,) = seen.addresses
    (sight,) = [sight for sight in address.monitors if sight.monitor == "frankfurt"]
    assert (sight.country, sight.counts, sight.failed, sight.score) == ("DE", True, "ntp-ke-cookie", 3.5)
    said = "\n".join(lines_of(seen, agent.now))
    assert "share      less than its weight: 40% by its score" in said
    assert "50% by its traffic caps" in said
    assert "unknown to the pool, which is the pool's fault: 1 of the 3" in said
    assert "frankfurt (DE): score 3.5, looked 60 min ago; ntp-ke-cookie since" in said
    older = STATUS.validate_python(
        {key: body[key] for key in ("name", "domain", "state", "state_since", "in_dns")}
    )
    assert (older.weight.score, older.stages, older.addresses) == (1.0, (), ())
