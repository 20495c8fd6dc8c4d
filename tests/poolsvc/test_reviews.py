"""Which monitors are given to a server, on both engines; how they are chosen is `vantage`'s own test."""

import itertools
from datetime import UTC, datetime, timedelta

from sqlalchemy import select

from nts_core.control import MonitorStatus, ServerState
from poolsvc import monitors, reviews
from poolsvc.models import INNER, Monitor, MonitorView, Server, ViewRole
from poolsvc.worker import REVIEWS, claim

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
S, R = ServerState, ViewRole
LOT = bytes(32)


async def review(registry, server_id, now=NOW):
    """The role of each monitor by its name after a review; one address alone."""
    async with registry.change(server_id) as (session, server):
        await reviews.review(session, registry.settings, [server], LOT, now)
    async with registry.database.transaction() as session:
        found = await session.execute(
            select(Monitor.name, MonitorView).join(MonitorView, MonitorView.monitor_id == Monitor.id)
        )
        return {row.name: row.MonitorView for row in found}


async def test_every_monitor_that_works_gets_a_view_with_its_role_and_why(registry):
    member = await registry.member()
    for number in range(3):
        await registry.monitor(f"m{number}")
    await registry.monitor("own", member)
    await registry.monitor("pending", status=MonitorStatus.PENDING)
    server = await registry.server("alice", state=S.ACTIVE, member=member)
    found = await review(registry, server)
    assert {name: view.role for name, view in found.items()} == {
        INNER: R.ACTIVE,
        **{f"m{number}": R.ACTIVE for number in range(3)},
        "own": R.PAUSED,
    }
    assert found["own"].role_reason == "it is the server's own member's"
    assert (found["own"].due_at, found[INNER].due_at) == (None, None)
    assert NOW <= found["m1"].due_at <= NOW + MINUTE
    assert NOW + 18 * MINUTE <= (await registry.get(server)).review_due_at <= NOW + 22 * MINUTE


async def test_a_monitor_that_works_no_more_is_active_for_nobody(registry):
    monitor, _ = await registry.monitor()
    server = await registry.server(state=S.ACTIVE)
    assert (await review(registry, server))["frankfurt"].role is R.ACTIVE
    async with registry.database.transaction() as session:
        row = await session.get_one(Monitor, monitor, with_for_update=True)
        await monitors.set_status(session, row, MonitorStatus.PAUSED, "r", NOW)
    view = (await review(registry, server, NOW + MINUTE))["frankfurt"]
    assert (view.role, view.role_reason, view.due_at) == (R.CANDIDATE, "it does not work now", None)


async def test_a_monitor_in_the_servers_own_network_does_not_look_at_it(registry):
    for name in ("near", "far"):
        await registry.monitor(name)
    async with registry.database.transaction() as session:
        near = await monitors.find(session, "near")
        monitors.note_source(near, "198.18.0.77", NOW)
    found = await review(registry, await registry.server(state=S.ACTIVE))
    assert (found["near"].role, found["far"].role) == (R.PAUSED, R.ACTIVE)


async def test_a_dry_run_explains_each_choice_and_changes_nothing(registry):
    await registry.monitor()
    server = await registry.server(state=S.ACTIVE)
    async with registry.change(server) as (session, row):
        found = await reviews.explain(session, row, LOT, NOW)
    assert {(each.address, each.monitor, each.role, each.is_change) for each in found} == {
        ("198.18.0.1", INNER, R.ACTIVE, True),
        ("198.18.0.1", "frankfurt", R.ACTIVE, True),
    }
    async with registry.database.transaction() as session:
        assert (await session.scalars(select(MonitorView))).all() == []


async def test_a_server_is_reviewed_once_an_address_of_it_is_proved_and_no_more_when_it_leaves(registry):
    server = await registry.server(state=S.ACTIVE)
    async with registry.change(server) as (_, row):
        row.review_due_at = NOW
    assert await claim(registry.database, REVIEWS, NOW) == [server]
    left = await registry.server("bob", "198.18.0.2", state=S.LEAVING)
    await review(registry, left)
    async with registry.database.transaction() as session:
        assert (await session.get_one(Server, left)).review_due_at is None


async def test_two_monitors_do_not_come_within_the_spacing(registry):
    ids = [(await registry.monitor(f"m{number}"))[0] for number in range(5)]
    server = await registry.server(state=S.ACTIVE)
    await review(registry, server)
    gap = timedelta(seconds=registry.settings.policy.probe_spacing)
    async with registry.database.transaction() as session:
        row = await session.get_one(Server, server)
        views = (await session.scalars(select(MonitorView))).all()
        for monitor in ids * 2:
            due = reviews.next_due(registry.settings, monitor, row, views, NOW)
            next(view for view in views if view.monitor_id == monitor).due_at = due
        dues = sorted(view.due_at for view in views if view.due_at is not None)
    assert all(later - sooner >= gap for sooner, later in itertools.pairwise(dues))
