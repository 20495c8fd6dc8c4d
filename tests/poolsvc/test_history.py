"""Reading the audit log: whose events are whose, and how staff appears in them."""

from datetime import timedelta

import pytest

from nts_core.control import ServerState
from poolsvc import standing
from poolsvc.db import act_as
from poolsvc.models import Event, StaffRole


@pytest.fixture
async def log(registry, call):
    """Two members with a server each; an operator has blocked the first and unblocked it."""
    registry.first, registry.second = await registry.member("First"), await registry.member("Second")
    registry.owner = await registry.person(registry.first)
    registry.operator = await registry.person(staff=StaffRole.OPERATOR)
    registry.support = await registry.person(staff=StaffRole.SUPPORT)
    registry.alice = await registry.server("alice", state=ServerState.ACTIVE, member=registry.first)
    await registry.server("bob", "198.18.0.2", member=registry.second)
    path = f"/v1/members/{registry.first}/block"
    await call(registry.operator.token, "PUT", path, json={"reason": "a test"})
    await call(registry.operator.token, "DELETE", path)

    async def read(person, path, **params):
        answer = await call(person.token, "GET", path, params={"limit": 200, **params})
        assert answer.status_code == 200, answer.text
        return answer.json()["items"]

    registry.read = read
    return registry


async def test_a_member_reads_what_is_its_own_and_its_servers(log):
    shown = await log.read(log.owner, f"/v1/members/{log.first}/events")
    assert [entry["id"] for entry in shown] == sorted((entry["id"] for entry in shown), reverse=True)
    assert {entry["member"] for entry in shown} <= {log.first, None}
    assert {entry["server"] for entry in shown} == {log.alice, None}
    (blocked, *_) = [entry for entry in shown if (entry["after"] or {}).get("status") == "blocked"]
    assert blocked["before"]["status"] == "active"
    assert (blocked["kind"], blocked["after"]["status_reason"]) == ("member-changed", "a test")


@pytest.mark.parametrize("path", ["/v1/members/{first}/events", "/v1/servers/alice/events"])
async def test_staff_appears_as_the_operator_to_members_and_by_id_to_staff(log, path):
    path = path.format(first=log.first)
    actors = {entry["actor"] for entry in await log.read(log.owner, path)}
    assert "operator" in actors
    assert f"user {log.operator.id}" not in actors
    for reader in (log.operator, log.support):
        assert f"user {log.operator.id}" in {entry["actor"] for entry in await log.read(reader, path)}


async def test_people_of_the_member_appear_by_their_ids_whatever_else_they_are(log, call):
    path = f"/v1/members/{log.first}"
    await call(log.owner.token, "PATCH", path, json={"public": True})
    async with log.database.transaction("console") as session:
        await standing.appoint(session, log.owner.id, StaffRole.SUPPORT)
    technician = await log.person(log.first)
    actors = [entry["actor"] for entry in await log.read(technician, path + "/events")]
    assert f"user {log.owner.id}" in actors


async def test_one_reads_of_oneself_and_sees_no_names_of_staff(log, call):
    await call(log.operator.token, "PUT", f"/v1/users/{log.owner.id}/block", json={"reason": "a test"})
    await call(log.operator.token, "DELETE", f"/v1/users/{log.owner.id}/block")
    shown = await log.read(log.owner, "/v1/me/events")
    assert {entry["user"] for entry in shown} == {log.owner.id}
    assert {entry["actor"] for entry in shown} == {"test", "operator"}
    reasons = [(entry["after"] or {}).get("blocked_reason") for entry in shown]
    assert "a test" in reasons


async def test_the_events_of_a_server_are_its_own_whole_life(log):
    shown = await log.read(log.owner, "/v1/servers/alice/events")
    assert {entry["server"] for entry in shown} == {log.alice}
    assert "registered" in {entry["kind"] for entry in shown}


async def test_staff_filters_the_whole_log(log):
    everything = await log.read(log.support, "/v1/events")
    for name, value, of in (
        ("server", log.alice, lambda entry: entry["server"] == log.alice),
        ("user", log.owner.id, lambda entry: entry["user"] == log.owner.id),
        ("kind", "hold-set", lambda entry: entry["kind"] == "hold-set"),
        ("actor", "test", lambda entry: entry["actor"] == "test"),
        ("member", log.second, lambda entry: entry["member"] == log.second or entry["server"] == 2),
    ):
        found = await log.read(log.support, "/v1/events", **{name: value})
        assert found == [entry for entry in everything if of(entry)], name
        assert 0 < len(found) < len(everything), name


async def test_staff_reads_a_stretch_of_time(log):
    moment = log.now + timedelta(days=400)
    async with log.database.transaction() as session:
        act_as(session, "test")
        for seconds in (0, 1, 2):
            at = moment + timedelta(seconds=seconds)
            session.add(Event(at=at, actor="test", kind="tick", subject=f"tick {seconds}"))
    stretch = {
        "since": (moment + timedelta(seconds=1)).isoformat(),
        "until": (moment + timedelta(seconds=2)).isoformat(),
    }
    assert [entry["subject"] for entry in await log.read(log.support, "/v1/events", **stretch)] == ["tick 1"]


@pytest.mark.parametrize("path", ["/v1/members/{first}/events", "/v1/servers/alice/events", "/v1/me/events"])
async def test_who_is_concerned_reads_a_stretch_of_time(log, path):
    path, moment = path.format(first=log.first), log.now + timedelta(days=400)
    async with log.database.transaction() as session:
        act_as(session, "test")
        for seconds in (0, 1, 2):
            event = Event(actor="test", kind="tick", subject=f"tick {seconds}")
            event.at = moment + timedelta(seconds=seconds)
            event.member_id, event.server_id, event.user_id = log.first, log.alice, log.owner.id
            session.add(event)
    for bounds, ticks in (((1, 2), [1]), ((1, None), [2, 1]), ((0, 1), [0])):
        params = {
            name: (moment + timedelta(seconds=bound)).isoformat()
            for name, bound in zip(("since", "until"), bounds, strict=True)
            if bound is not None
        }
        found = await log.read(log.owner, path, **params)
        assert [entry["subject"] for entry in found] == [f"tick {tick}" for tick in ticks]


@pytest.mark.parametrize(
    "params",
    [
        {"since": "yesterday"},
        {"since": "2026-03-01T12:00:00"},
        {"since": "0001-01-01T00:00:00+23:59"},
        {"until": "9999-12-31T23:59:59-23:59"},
        {"member": 0},
        {"server": "alice"},
        {"kind": "a\x00"},
        {"actor": "x" * 101},
    ],
)
async def test_filters_that_are_none_are_refused(log, call, params):
    answer = await call(log.support.token, "GET", "/v1/events", params=params)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid-document")
