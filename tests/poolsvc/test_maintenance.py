"""Maintenance windows and the operator's hold: when a server is held, and what counts against it meanwhile."""

from datetime import UTC, datetime, timedelta
from itertools import count

import pytest

from nts_core.control import ProbeResult, ServerState, Stage
from poolsvc import maintenance, members, monitoring, scoring, worker
from poolsvc.errors import InvalidDocument, LimitReached, NotFound
from poolsvc.models import HoldKind, MaintenanceWindow

S = ServerState
ONE = "198.18.0.1"
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
BAD = ProbeResult(ONE, Stage.TCP, "no answer")
GOOD = ProbeResult(ONE, None, "", offset=0, delay=1000, stratum=2, leap=0, asked=2, cookies=2)


async def add(registry, server_id, begin, end, *, now=timedelta(0), reason=""):
    """A window by offsets from the registry's now; `begin` None is now."""
    async with registry.change(server_id) as (session, server):
        window = await maintenance.add(
            session,
            server,
            starts_at=None if begin is None else registry.now + begin,
            ends_at=registry.now + end,
            reason=reason,
            actor="user 1",
            now=registry.now + now,
        )
        return window.id


async def work(registry, after):
    """What the worker does at that time; the server's state then."""
    now = registry.now + after
    for window in await worker.claim(registry.database, worker.WINDOWS, now):
        await maintenance.turn(registry.database, window, now)


async def state(registry, server_id):
    return (await registry.get(server_id)).state


async def probe(registry, server_id, result, after=HOUR, ticks=count()):  # noqa: B008 - one for all tests
    """One round, each at another moment soon after that time; the address then."""
    now = registry.now + after + timedelta(milliseconds=next(ticks))
    async with registry.change(server_id) as (session, server):
        await monitoring.record(session, registry.settings, server, [result], now)
        return server.addresses[0]


async def test_a_window_that_begins_now_holds_at_once_and_ends_by_itself(registry):
    server = await registry.server(state=S.ACTIVE)
    await add(registry, server, None, 2 * HOUR, reason="new disk")
    found = await registry.get(server)
    assert found.state is S.SUSPENDED
    assert found.holds[0].reason == "until 2026-03-01 14:00 UTC: new disk"
    await work(registry, 2 * HOUR - timedelta(seconds=1))
    assert await state(registry, server) is S.SUSPENDED
    await work(registry, 2 * HOUR)
    found = await registry.get(server)
    assert (found.state, found.probe_due_at) == (S.SUSPENDED, registry.now + 2 * HOUR)
    assert found.holds[0].reason == "it is over, and waits for a good probe"
    await probe(registry, server, GOOD, 2 * HOUR)
    assert await state(registry, server) is S.ACTIVE
    async with registry.database.transaction() as session:
        assert (await session.get_one(MaintenanceWindow, 1)).due_at is None


async def test_a_probe_that_was_on_its_way_when_the_window_began_does_not_end_it(registry):
    server = await registry.server(state=S.ACTIVE)
    await add(registry, server, None, 2 * HOUR)
    await probe(registry, server, GOOD, -timedelta(seconds=5))
    assert await state(registry, server) is S.SUSPENDED


async def test_a_window_of_later_begins_and_ends_at_its_times(registry):
    server = await registry.server(state=S.ACTIVE)
    await add(registry, server, HOUR, 2 * HOUR)
    for after, expected in ((0.9, S.ACTIVE), (1, S.SUSPENDED), (1.9, S.SUSPENDED), (2, S.ACTIVE)):
        await work(registry, after * HOUR)
        await probe(registry, server, GOOD, after * HOUR)
        assert await state(registry, server) is expected, after


async def test_a_window_that_a_sleeping_worker_missed_leaves_nothing_behind(registry):
    server = await registry.server(state=S.ACTIVE)
    await add(registry, server, HOUR, 2 * HOUR)
    await work(registry, 3 * HOUR)
    found = await registry.get(server)
    assert (found.state, found.holds) == (S.ACTIVE, [])


async def test_of_two_windows_that_overlap_the_later_end_counts(registry):
    server = await registry.server(state=S.ACTIVE)
    await add(registry, server, None, 2 * HOUR)
    await add(registry, server, HOUR, 3 * HOUR)
    for after, expected in ((1, S.SUSPENDED), (2, S.SUSPENDED), (3, S.ACTIVE)):
        await work(registry, after * HOUR)
        await probe(registry, server, GOOD, after * HOUR)
        assert await state(registry, server) is expected, after


async def test_a_cancelled_window_ends_at_once_and_another_one_still_holds(registry):
    server = await registry.server(state=S.ACTIVE)
    first = await add(registry, server, None, 2 * HOUR)
    second = await add(registry, server, None, 3 * HOUR)
    for window, expected in ((second, S.SUSPENDED), (first, S.ACTIVE), (first, S.ACTIVE)):
        async with registry.change(server) as (session, row):
            await maintenance.cancel(session, row, window, actor="user 1", now=registry.now)
        await probe(registry, server, GOOD)
        assert await state(registry, server) is expected
    await work(registry, 5 * HOUR)
    assert await state(registry, server) is S.ACTIVE


async def test_a_window_of_another_server_cannot_be_cancelled(registry):
    server = await registry.server(state=S.ACTIVE)
    other = await registry.server("bob", "198.18.0.2", state=S.ACTIVE)
    window = await add(registry, server, None, HOUR)
    for identifier in (window, 99):
        with pytest.raises(NotFound):
            async with registry.change(other) as (session, row):
                await maintenance.cancel(session, row, identifier, actor="user 1", now=registry.now)
    assert await state(registry, server) is S.SUSPENDED


async def test_the_end_of_maintenance_lifts_no_other_hold(registry):
    server = await registry.server(state=S.SUSPENDED)
    await add(registry, server, None, HOUR)
    await work(registry, HOUR)
    await probe(registry, server, GOOD)
    found = await registry.get(server)
    assert found.state is S.SUSPENDED
    assert [hold.kind for hold in found.holds if hold.lifted_at is None] == [HoldKind.OPERATOR]


@pytest.mark.parametrize(
    ("begin", "end", "field"),
    [
        (-HOUR, HOUR, "starts_at"),
        (400 * DAY, 401 * DAY, "starts_at"),
        (None, timedelta(0), "ends_at"),
        (None, -HOUR, "ends_at"),
        (None, 30 * DAY + HOUR, "ends_at"),
        (2 * HOUR, HOUR, "ends_at"),
    ],
)
async def test_an_impossible_window_is_refused(registry, begin, end, field):
    server = await registry.server(state=S.ACTIVE)
    with pytest.raises(InvalidDocument) as caught:
        await add(registry, server, begin, end)
    assert caught.value.field == field
    assert await state(registry, server) is S.ACTIVE


async def test_ten_windows_may_be_ahead_and_past_ones_do_not_count(registry):
    server = await registry.server(state=S.ACTIVE)
    for number in range(1, 11):
        await add(registry, server, number * DAY, number * DAY + HOUR)
    with pytest.raises(LimitReached):
        await add(registry, server, 20 * DAY, 21 * DAY)
    await add(registry, server, 20 * DAY, 21 * DAY, now=2 * DAY)


async def test_during_maintenance_nothing_counts_against_a_score_and_good_probes_do(registry):
    server = await registry.server(state=S.ACTIVE)
    await add(registry, server, None, 30 * DAY)
    for _ in range(20):
        assert (await probe(registry, server, BAD)).score == 12.0
    assert (await probe(registry, server, GOOD)).score > 12.0
    found = await registry.get(server)
    assert [hold.kind for hold in found.holds] == [HoldKind.MAINTENANCE]
    assert found.addresses[0].step_reason == "", "the last probe is shown all the same"


async def test_during_maintenance_the_way_to_admission_stands_still(registry):
    server = await registry.server(state=S.CERTIFIED)
    await probe(registry, server, GOOD)
    await add(registry, server, None, DAY)
    for result in (BAD, GOOD, GOOD, GOOD, GOOD):
        assert (await probe(registry, server, result)).full_probes == 1
    assert await state(registry, server) is S.CERTIFIED


async def test_a_score_that_is_bad_holds_once_the_maintenance_is_over(registry):
    for number in range(registry.settings.policy.opening_size):
        await registry.server(f"s{number}-x", f"198.18.9.{number}", state=S.ACTIVE)
    server = await registry.server(state=S.ACTIVE)
    await add(registry, server, None, DAY)
    await probe(registry, server, BAD)
    await work(registry, DAY)
    for _ in range(3):
        await probe(registry, server, BAD, DAY + HOUR)
    assert [hold.kind for hold in (await registry.get(server)).holds if hold.lifted_at is None] == ["score"]


async def test_a_server_that_fails_when_the_maintenance_ends_is_not_in_the_answer(registry):
    """Its score is as good as it was before; the clock alone lifts nothing."""
    server = await registry.server(state=S.ACTIVE)
    async with registry.change(server) as (_, row):
        row.addresses[0].score = 20.0
    await add(registry, server, None, HOUR)
    await probe(registry, server, GOOD, HOUR / 2)
    assert await state(registry, server) is S.SUSPENDED, "a good probe ends no window"
    await work(registry, HOUR)
    before = (await registry.get(server)).addresses[0].score
    after = (await probe(registry, server, BAD)).score
    assert before > after > scoring.CUTOFF, "probes count again"
    assert await state(registry, server) is S.SUSPENDED
    await probe(registry, server, GOOD)
    assert await state(registry, server) is S.ACTIVE


async def test_a_server_that_does_not_come_back_is_held_for_its_score_as_any_other(registry):
    """And so is warned, and taken out in the end."""
    server = await registry.server(state=S.ACTIVE)
    await add(registry, server, None, HOUR)
    await work(registry, HOUR)
    for _ in range(4):
        await probe(registry, server, BAD)
    held = {hold.kind for hold in (await registry.get(server)).holds if hold.lifted_at is None}
    assert (held, await state(registry, server)) == ({HoldKind.SCORE}, S.SUSPENDED)
    for _ in range(40):
        await probe(registry, server, GOOD)
    assert await state(registry, server) is S.ACTIVE


@pytest.mark.parametrize("before", [S.REGISTERED, S.VERIFIED, S.CERTIFIED])
async def test_a_server_that_has_no_status_to_win_is_let_go_at_once(registry, before):
    server = await registry.server(state=before)
    await add(registry, server, None, HOUR)
    await work(registry, HOUR)
    found = await registry.get(server)
    assert found.state is before
    assert [hold.lifted_at for hold in found.holds] == [registry.now + HOUR]


@pytest.fixture
async def alice(registry):
    owner = await registry.member("Owner")
    registry.alice = await registry.server(state=S.ACTIVE, member=owner)
    registry.token = await registry.owner_token(owner)
    async with registry.database.transaction() as session:
        _, registry.operator = await members.create_operator(session, datetime.now(UTC))
    return registry


URL = "/v1/servers/alice"


async def test_a_member_announces_looks_and_cancels(alice, client):
    async with client(alice.token) as http:
        soon = "2999-01-01T00:00:00Z"
        refused = await http.post(f"{URL}/maintenance", json={"ends_at": soon})
        assert (refused.status_code, refused.json()["field"]) == (422, "ends_at")
        naive = await http.post(f"{URL}/maintenance", json={"ends_at": "2026-01-01T00:00:00"})
        assert (naive.status_code, naive.json()["field"]) == (422, "ends_at")
        assert (await http.get(f"{URL}/maintenance")).json()["items"] == []


async def test_an_operators_hold_has_a_reason_that_the_member_sees_and_is_lifted_alone(alice, client):
    async with client(alice.operator) as http:
        for reason in ("a look", "a longer look"):
            held = await http.put(f"{URL}/hold", json={"reason": reason})
            assert held.json()["state"] == "suspended"
        assert (await http.put(f"{URL}/hold", json={"reason": ""})).status_code == 422
    async with client(alice.token) as http:
        view = (await http.get(URL)).json()
        assert "operator: a longer look" in view["stages"][-2]["detail"]
        assert (await http.delete(f"{URL}/hold")).status_code == 403
    async with client(alice.operator) as http:
        assert (await http.delete(f"{URL}/hold")).json()["state"] == "active"
        assert (await http.delete(f"{URL}/hold")).json()["state"] == "active"
    holds = (await alice.get(alice.alice)).holds
    assert [(hold.kind, hold.reason) for hold in holds] == [(HoldKind.OPERATOR, "a longer look")]
