"""What monitors without a say see differently: which servers are told, and which are not; on both engines."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update

from nts_core.control import MonitorStatus, ServerState
from poolsvc import disagreements, members, monitors
from poolsvc.derived import RegistryKey
from poolsvc.disagreements import LASTING, Found, Vigil, borne_out
from poolsvc.models import Address, Monitor, MonitorView, ViewRole
from poolsvc.worker import Worker

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
R = ViewRole


@pytest.fixture
async def told(registry):
    """Let monitors say of a new server what they saw last; what the look then finds of it."""
    made = {}

    async def tell(score, listed, others, *, state=ServerState.ACTIVE, at=NOW, parties=True):
        server = await registry.server("alice", state=state) if not made else made["server"]
        made["server"] = server
        member = None if parties else made.setdefault("member", await registry.member("Many"))
        for number, (role, step) in enumerate(
            [(R.ACTIVE, step) for step in listed]
            + [(R.TESTING if number % 2 else R.CANDIDATE, step) for number, step in enumerate(others)]
        ):
            of = member if role is not R.ACTIVE else None
            monitor, _ = await registry.monitor(f"m{number}", of)
            await registry.look(monitor, server, role)
            async with registry.database.transaction() as session:
                values = {"at": at, "step": step, "score": score, "step_reason": f"step {step}"}
                await session.execute(
                    update(MonitorView).where(MonitorView.monitor_id == monitor).values(**values)
                )
        async with registry.database.transaction() as session:
            await session.execute(update(Address).values(score=score))
        return await look(registry)

    return tell


async def look(registry, now=NOW):
    async with registry.database.transaction() as session:
        return await disagreements.look(session, registry.settings, now)


async def test_a_server_that_is_good_only_for_its_own_monitors_is_told_with_its_witnesses(registry, told):
    (found,) = await told(20.0, (1.0, 1.0), (-5.0, 1.0, -4.0))
    assert (found.server, found.address, found.score) == ("alice", "198.18.0.1", 20.0)
    assert (found.asked, found.against, found.is_good) == (3, 2, True)
    assert [(each.monitor, each.step, each.reason) for each in found.witnesses] == [
        ("m2", -5.0, "step -5.0"),
        ("m4", -4.0, "step -4.0"),
    ]


async def test_one_that_is_bad_only_for_its_own_monitors_is_told(told):
    (found,) = await told(-20.0, (-5.0, -5.0), (1.0, 1.0, 1.0), state=ServerState.SUSPENDED)
    assert (found.against, found.is_good) == (3, False)


@pytest.mark.parametrize(
    ("score", "listed", "others", "more"),
    [
        (20.0, (1.0, 1.0), (-5.0, -5.0), {}),  # two are not enough
        (20.0, (1.0, 1.0), (-5.0, 1.0, 1.0, -5.0), {}),  # nor half of them
        (20.0, (-5.0, -5.0), (-5.0, -5.0, -5.0), {}),  # it has just failed, and its score is on its way
        (-20.0, (1.0, 1.0), (1.0, 1.0, 1.0), {}),  # it has just recovered
        (20.0, (1.0, 1.0), (-5.0, -5.0, -5.0), {"at": NOW - timedelta(days=2)}),  # long ago
        (20.0, (1.0, 1.0), (-5.0, -5.0, -5.0), {"parties": False}),  # the monitors of one member are one
        (20.0, (1.0, 1.0), (-5.0, -5.0, -5.0), {"state": ServerState.LEAVING}),
        (None, (), (-5.0, -5.0, -5.0), {"state": ServerState.CERTIFIED}),
    ],
)
async def test_what_is_no_disagreement(told, score, listed, others, more):
    assert await told(score, listed, others, **more) == []


async def test_monitors_that_are_not_believed_say_nothing(registry, told):
    assert await told(20.0, (1.0, 1.0), (-5.0, -5.0, -5.0))
    for values in ({"sound": False}, {"sound": True, "status": MonitorStatus.PAUSED}):
        async with registry.database.transaction() as session:
            row = await monitors.find(session, "m2")
            await session.execute(update(Monitor).where(Monitor.id == row.id).values(**values))
        assert await look(registry) == []


async def test_an_address_that_the_pool_does_not_know_is_not_told(registry, told):
    assert await told(20.0, (1.0, 1.0), (-5.0, -5.0, -5.0))
    async with registry.database.transaction() as session:
        await session.execute(update(Address).values(unknown="too few"))
    assert await look(registry) == []


async def test_of_a_great_many_those_with_most_against_them_are_told(registry, told, monkeypatch):
    monkeypatch.setattr(disagreements, "MOST", 1)
    assert await told(20.0, (1.0, 1.0), (-5.0, -5.0, -5.0, -5.0))
    async with registry.database.transaction() as session:
        ids = [(await monitors.find(session, f"m{number}")).id for number in range(5)]
    other = await registry.server("bob", "198.18.0.2", state=ServerState.ACTIVE)
    for number, monitor in enumerate(ids):
        (address,) = await registry.look(monitor, other, R.ACTIVE if number < 2 else R.TESTING)
        async with registry.database.transaction() as session:
            view = await session.get_one(MonitorView, (address, monitor))
            view.at, view.step = NOW, 1.0 if number < 2 else -5.0
            (await session.get_one(Address, address)).score = 20.0
    assert [each.server for each in await look(registry)] == ["alice"]
    monkeypatch.setattr(disagreements, "MOST", 9)
    assert [each.server for each in await look(registry)] == ["alice", "bob"]


async def test_operators_read_it(registry, call, told):
    """As of now: what was seen in the tests' past says nothing there."""
    await told(20.0, (1.0, 1.0), (-5.0, -5.0, -5.0), at=datetime.now(UTC))
    async with registry.database.transaction() as session:
        _, token = await members.create_operator(session, datetime.now(UTC))
    (found,) = (await call(token, "GET", "/v1/disagreements")).json()
    assert (found["server"], found["asked"], found["against"]) == ("alice", 3, 3)
    assert [each["monitor"] for each in found["witnesses"]] == ["m2", "m3", "m4"]


def test_a_score_on_its_way_is_no_verdict():
    assert borne_out(20.0, [1.0, 1.0, -5.0]) == 20.0
    assert borne_out(20.0, [1.0, -5.0]) is None
    assert borne_out(-20.0, [-5.0]) == -20.0
    assert borne_out(20.0, []) is None


def test_what_lasts_for_an_hour_is_an_alarm_and_what_goes_by_is_none():
    one = Found(1, "alice", "198.18.0.1", 20.0, 3, 3, ())
    sixth, other = replace(one, address_id=2, address="fd00::1"), replace(one, address_id=3, server="bob")
    bad = replace(one, address_id=4, server="carol", score=-5.0)
    vigil = Vigil()
    vigil.note([one, sixth, bad], NOW)
    assert (vigil.count(is_good=True), vigil.count(is_good=False), vigil.alarms(NOW)) == (1, 1, [])
    vigil.note([one, sixth, other], NOW + LASTING)
    assert vigil.alarms(NOW + LASTING) == [
        "1 server looks good to monitors with a say and bad to others, for an hour"
    ]
    vigil.note([other, bad], NOW + LASTING + MINUTE)
    assert vigil.alarms(NOW + LASTING + MINUTE) == []
    vigil.note([one, other, bad], NOW + 2 * LASTING)
    vigil.note([one, other, bad], NOW + 3 * LASTING)
    assert vigil.alarms(NOW + 3 * LASTING) == [
        "2 servers look good to monitors with a say and bad to others, for an hour",
        "1 server looks bad to monitors with a say and good to others, for an hour",
    ]


async def test_the_worker_looks_now_and_then_and_tells(registry, app, told):
    health = app.state.metrics.health
    await told(20.0, (1.0, 1.0), (-5.0, -5.0, -5.0))
    worker = Worker(registry.database, registry.settings, [], health, RegistryKey(bytes(32)))
    await worker._watch(NOW)
    assert health.alarms() == []
    assert 'poolsvc_disagreements{verdict="good"} 1.0' in (await app.state.metrics.render()).decode()
    async with registry.database.transaction() as session:
        await session.execute(update(MonitorView).values(at=NOW + LASTING))
    await worker._watch(NOW + MINUTE)
    assert health.alarms() == []
    await worker._watch(NOW + LASTING)
    (text,) = [text for text in health.alarms() if "others" in text]
    assert text == "monitors: 1 server looks good to monitors with a say and bad to others, for an hour"
