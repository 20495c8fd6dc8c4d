"""Leaving on a later day and staying after all, and what becomes of servers that are dead for long."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select

from nts_core.control import ServerState
from poolsvc import addresses, issuance, members, removal, servers, standing
from poolsvc.errors import AddressTaken, InvalidDocument, WrongState
from poolsvc.models import Hold, HoldKind, MaintenanceWindow, Notice, Order, OrderStatus, Server
from poolsvc.notices import NoticeKind
from poolsvc.pool import the_pool
from poolsvc.publication import Publication

S = ServerState
HOUR, DAY, SECOND = timedelta(hours=1), timedelta(days=1), timedelta(seconds=1)
SERVICE = ("_ntske._tcp.pool.example.", "SRV")
OWNER = "alice.servers.pool.example."


async def schedule(registry, server_id, ahead):
    async with registry.change(server_id) as (session, server):
        await servers.schedule_leave(
            session, server, at=registry.now + ahead, actor="user 1", reason="moving", now=registry.now
        )
    return await registry.get(server_id)


async def stay(registry, server_id, after):
    async with registry.change(server_id) as (session, server):
        await servers.cancel_leave(session, server, actor="user 1", now=registry.now + after)
    return await registry.get(server_id)


async def remove(registry, server_id, after):
    """What the worker does about a removal at that time."""
    await removal.advance(registry.database, registry.settings, None, server_id, registry.now + after)
    return await registry.get(server_id)


async def said(registry, kind):
    async with registry.database.transaction() as session:
        return [notice.data for notice in await session.scalars(select(Notice).where(Notice.kind == kind))]


@pytest.fixture
async def alice(registry):
    """An ACTIVE server in an open pool."""
    await registry.open_account()
    async with registry.database.transaction() as session:
        (await the_pool(session, registry.settings)).opened_at = registry.now
    registry.alice = await registry.server(state=S.ACTIVE)
    return registry


async def zone(registry, after):
    made = Publication(registry.database, registry.settings)
    await made.look(registry.now + after)
    return made.whole(), {kind for owner, kind in made.whole() if owner == OWNER}


@pytest.mark.parametrize("state", [S.VERIFIED, S.CERTIFIED, S.ACTIVE, S.SUSPENDED])
async def test_the_srv_goes_at_once_and_the_name_lives_until_its_day(alice, state):
    server = alice.alice if state is S.ACTIVE else await alice.server("bob", "198.18.0.2", state=state)
    found = await schedule(alice, server, 30 * DAY)
    assert (found.state, found.leave_at, found.probe_due_at) == (S.LEAVING, alice.now + 30 * DAY, None)
    made, _ = await zone(alice, DAY)
    owner = f"{found.name}.servers.pool.example."
    assert {(owner, "A"), (owner, "CAA")} <= set(made)
    assert owner not in str(made.get(SERVICE))


async def test_nothing_of_the_removal_is_done_before_its_day_and_all_of_it_then(alice):
    found = await schedule(alice, alice.alice, 30 * DAY)
    async with alice.change(alice.alice) as (_, server):
        server.srv_withdrawn_at = alice.now + HOUR
    found = await remove(alice, alice.alice, 30 * DAY - SECOND)
    assert (found.state, found.removal_due_at) == (S.LEAVING, alice.now + 30 * DAY)
    assert found.certificate_revoked_at is None
    _, kinds = await zone(alice, 30 * DAY - SECOND)
    assert kinds == {"A", "CAA", "TXT"}
    assert (await remove(alice, alice.alice, 30 * DAY)).state is S.LEAVING
    _, kinds = await zone(alice, 30 * DAY)
    assert kinds == set()
    async with alice.change(alice.alice) as (_, server):
        server.name_broken_at = alice.now + 30 * DAY
    assert (await remove(alice, alice.alice, 30 * DAY)).state is S.REMOVED


@pytest.mark.parametrize(
    ("ahead", "fits"),
    [(3 * HOUR, True), (3 * HOUR - SECOND, False), (90 * DAY, True), (90 * DAY + SECOND, False)],
)
async def test_a_day_too_soon_or_too_far_is_refused(alice, ahead, fits):
    if fits:
        assert (await schedule(alice, alice.alice, ahead)).state is S.LEAVING
        return
    with pytest.raises(InvalidDocument) as caught:
        await schedule(alice, alice.alice, ahead)
    assert caught.value.field == "at"
    assert (await alice.get(alice.alice)).state is S.ACTIVE


@pytest.mark.parametrize("state", [S.REGISTERED, S.LEAVING, S.REMOVED])
async def test_what_is_not_in_dns_cannot_leave_later(registry, state):
    server = await registry.server(state=state)
    with pytest.raises(WrongState):
        await schedule(registry, server, DAY)


async def test_who_stays_after_all_begins_with_probes_again(alice):
    await schedule(alice, alice.alice, 30 * DAY)
    async with alice.change(alice.alice) as (_, server):
        server.srv_withdrawn_at = alice.now + HOUR
    found = await stay(alice, alice.alice, 20 * DAY)
    assert (found.state, found.leave_at, found.leave_reason) == (S.VERIFIED, None, None)
    assert (found.srv_withdrawn_at, found.removal_due_at) == (None, None)
    assert found.probe_due_at == alice.now + 20 * DAY
    assert [(row.score, row.full_probes) for row in found.addresses] == [(None, 0)]
    made, kinds = await zone(alice, 20 * DAY)
    assert kinds == {"A", "CAA", "TXT"}
    assert OWNER not in str(made.get(SERVICE))
    await addresses.withdraw_stale(alice.database, alice.settings, alice.now + 50 * DAY - SECOND)
    assert (await alice.get(alice.alice)).state is S.VERIFIED, "nobody looked while it was leaving"


async def test_on_its_day_it_is_too_late_to_stay(alice):
    await schedule(alice, alice.alice, DAY)
    found = await remove(alice, alice.alice, DAY)
    assert (found.leave_final, found.order_due_at) == (True, None)
    with pytest.raises(WrongState, match="not to leave on a later day"):
        await stay(alice, alice.alice, DAY)
    assert (await alice.get(alice.alice)).state is S.LEAVING


@pytest.mark.parametrize("state", [S.ACTIVE, S.LEAVING, S.REMOVED])
async def test_who_leaves_at_once_or_not_at_all_has_nothing_to_cancel(registry, state):
    server = await registry.server(state=state)
    with pytest.raises(WrongState):
        await stay(registry, server, HOUR)


async def test_leaving_at_once_is_possible_meanwhile(alice):
    await schedule(alice, alice.alice, 30 * DAY)
    async with alice.change(alice.alice) as (session, server):
        await servers.leave(session, server, actor="user 1", reason="now", now=alice.now + HOUR)
        assert (server.leave_final, server.removal_due_at) == (True, alice.now + HOUR)
        assert (server.state_since, server.journal_due_at) == (alice.now + HOUR, alice.now + HOUR)
    with pytest.raises(WrongState):
        await stay(alice, alice.alice, HOUR)


async def test_members_are_told_of_the_day_and_that_it_was_cancelled(alice):
    await schedule(alice, alice.alice, DAY)
    day = (alice.now + DAY).isoformat()
    assert await said(alice, NoticeKind.LEAVING_SCHEDULED) == [
        {"server": "alice", "leave_at": day, "reason": "moving"}
    ]
    await stay(alice, alice.alice, HOUR)
    assert await said(alice, NoticeKind.LEAVING_CANCELLED) == [{"server": "alice", "leave_at": day}]


async def test_the_addresses_of_one_that_may_still_stay_are_its_own(alice):
    await schedule(alice, alice.alice, DAY)
    with pytest.raises(AddressTaken):
        await alice.server("bob", "198.18.0.1")
    async with alice.change(alice.alice) as (session, server):
        await servers.leave(session, server, actor="user 1", reason="now", now=alice.now)
    await alice.server("carol", "198.18.0.1")


@pytest.mark.parametrize(("life", "renewed"), [(90, False), (31, False), (29, True)])
async def test_a_certificate_is_renewed_only_if_it_ends_before_the_day(alice, life, renewed):
    async with alice.change(alice.alice) as (session, _):
        session.add(
            Order(
                server_id=alice.alice,
                status=OrderStatus.ISSUED,
                created_at=alice.now,
                not_before=alice.now,
                not_after=alice.now + life * DAY,
            )
        )
    await schedule(alice, alice.alice, 30 * DAY)
    async with alice.change(alice.alice) as (session, server):
        issuance.want(server, alice.now + 20 * DAY)
        await session.flush()
        opened = issuance.open_order(server)
        assert (opened is not None) is renewed
        if opened is not None:
            assert issuance.wants_csr(server, opened)
    found = await stay(alice, alice.alice, 21 * DAY)
    assert found.order_due_at == alice.now + life * DAY / 3 * 2, "what was let go is taken up again"


async def test_leaving_later_over_the_api(alice, client):
    owner = (await alice.get(alice.alice)).member_id
    url = "/v1/servers/alice"
    async with client(await alice.owner_token(owner)) as http:
        for at in ("2999-01-01T00:00:00Z", "2026-01-01T00:00:00Z"):
            assert (await http.post(f"{url}/leaving", json={"at": at})).json()["field"] == "at"
        assert (await http.post(f"{url}/leaving", json={"at": "2026-01-01T00:00:00"})).status_code == 422
        assert (await http.delete(f"{url}/leaving")).json()["code"] == "wrong-state"
        gone = await http.post(f"{url}/leaving", json={"reason": "enough"})
        assert (gone.status_code, gone.json()["state"]) == (202, "leaving")
        assert gone.json()["why"].endswith(" UTC: enough")
        assert (await http.delete(f"{url}/leaving")).json()["code"] == "wrong-state"


async def test_the_name_of_one_that_leaves_at_once_outlives_its_srv_and_nobody_may_order_for_it(alice):
    async with alice.change(alice.alice) as (session, server):
        await servers.leave(session, server, actor="user 1", reason="now", now=alice.now)
    grace = alice.settings.leaving_grace
    await remove(alice, alice.alice, 10 * grace)
    made, kinds = await zone(alice, 10 * grace)
    assert kinds == {"A", "CAA", "TXT"}, "its SRV was seen to be out nowhere yet"
    assert made[OWNER, "CAA"].rdatas == {'0 issue ";"'}
    assert OWNER not in str(made.get(SERVICE))
    async with alice.change(alice.alice) as (_, server):
        server.srv_withdrawn_at = alice.now + 10 * grace
    await remove(alice, alice.alice, 11 * grace - SECOND)
    assert (await zone(alice, 11 * grace))[1] == {"A", "CAA", "TXT"}
    await remove(alice, alice.alice, 11 * grace)
    assert (await zone(alice, 11 * grace))[1] == set()


async def test_an_emergency_is_the_operators_and_the_name_goes_with_the_srv(alice, call):
    owner = (await alice.get(alice.alice)).member_id
    async with alice.database.transaction() as session:
        _, operator = await members.create_operator(session, datetime.now(UTC))
    url = "/v1/servers/alice?emergency=true"
    refused = await call(await alice.owner_token(owner), "DELETE", url)
    assert refused.status_code == 403
    assert (await alice.get(alice.alice)).state is S.ACTIVE
    taken = await call(operator, "DELETE", url)
    assert (taken.status_code, taken.json()["leave_at"]) == (202, None)
    assert taken.json()["receipt"]["outstanding"][0].startswith("SRV: ")
    async with alice.change(alice.alice) as (_, server):
        server.srv_withdrawn_at = alice.now
    assert (await zone(alice, SECOND))[1] == set()


@pytest.fixture
async def dying(registry):
    """A server that its score holds since the registry's now."""
    registry.dying = await registry.server(state=S.ACTIVE)
    async with registry.change(registry.dying) as (session, server):
        await servers.set_hold(
            session, server, HoldKind.SCORE, reason="score -100", actor="prober", now=registry.now
        )
    return registry


async def look(registry, day):
    """The worker's look on that day; the days of the warnings so far, and the state."""
    await removal.bury_the_dead(registry.database, registry.now + day * DAY)
    warnings = [data["days"] for data in await said(registry, NoticeKind.DEAD_WARNING)]
    return warnings, (await registry.get(registry.dying)).state


async def test_a_dead_server_leaves_after_three_warnings(dying):
    seen = {}
    for day in range(46):
        warnings, state = await look(dying, day)
        seen.setdefault(tuple(warnings), day)
        assert state is (S.LEAVING if day == 45 else S.SUSPENDED), day
    assert seen == {(): 0, (15,): 15, (15, 30): 30, (15, 30, 40): 40}
    found = await dying.get(dying.dying)
    assert "45 days, after 3 warnings" in found.leave_reason
    (first, *_) = await said(dying, NoticeKind.DEAD_WARNING)
    assert first == {"server": "alice", "days": 15, "remove_at": (dying.now + 45 * DAY).isoformat()}


async def test_after_an_outage_of_the_registry_each_warning_still_comes_with_time_to_act(dying):
    days = {day: await look(dying, day) for day in range(60, 77)}
    assert [days[day][0] for day in (60, 64, 65, 69, 70, 74)] == [
        [60],
        [60],
        [60, 65],
        [60, 65],
        [60, 65, 70],
        [60, 65, 70],
    ]
    assert (days[74][1], days[75][1]) == (S.SUSPENDED, S.LEAVING)
    ends = [data["remove_at"] for data in await said(dying, NoticeKind.DEAD_WARNING)]
    assert ends == [(dying.now + 75 * DAY).isoformat()] * 3


async def test_a_good_score_ends_the_count(dying):
    await look(dying, 15)
    async with dying.change(dying.dying) as (session, server):
        assert server.dead_warnings == 1
        await servers.lift_hold(
            session, server, HoldKind.SCORE, reason="good", actor="prober", now=dying.now + 16 * DAY
        )
        assert server.dead_warnings == 0
        await servers.set_hold(
            session, server, HoldKind.SCORE, reason="bad", actor="prober", now=dying.now + 17 * DAY
        )
    assert await look(dying, 31) == ([15], S.SUSPENDED)
    assert await look(dying, 32) == ([15, 15], S.SUSPENDED)
    assert await look(dying, 46) == ([15, 15], S.SUSPENDED)


async def test_nobody_is_buried_during_maintenance_or_for_another_hold(dying):
    other = await dying.server("bob", "198.18.0.2", state=S.SUSPENDED)
    async with dying.change(dying.dying) as (session, server):
        session.add(
            MaintenanceWindow(
                server_id=server.id, starts_at=dying.now, ends_at=dying.now + DAY, created_at=dying.now
            )
        )
        await servers.set_hold(
            session, server, HoldKind.MAINTENANCE, reason="work", actor="user 1", now=dying.now
        )
    assert await look(dying, 44) == ([], S.SUSPENDED)
    assert (await dying.get(other)).state is S.SUSPENDED


async def test_those_in_maintenance_hide_nobody_and_one_look_takes_a_hundred(registry):
    member = await registry.member()
    async with registry.database.transaction("test") as session:
        for number in range(250):
            at = registry.now + number * SECOND
            server = Server(
                member_id=member,
                name=f"dead{number}",
                state=S.SUSPENDED,
                state_since=at,
                created_at=at,
                holds=[Hold(kind=HoldKind.SCORE, reason="", set_at=at)],
            )
            if number < 100:
                server.holds.append(Hold(kind=HoldKind.MAINTENANCE, reason="", set_at=at))
            session.add(server)

    async def warned(day):
        is_more = await removal.bury_the_dead(registry.database, registry.now + day * DAY + HOUR)
        return is_more, {int(data["server"][4:]) for data in await said(registry, NoticeKind.DEAD_WARNING)}

    assert await warned(15) == (True, set(range(100, 200)))
    assert await warned(15) == (False, set(range(100, 250)))
    assert len(await said(registry, NoticeKind.DEAD_WARNING)) == 150
    await warned(16)
    assert len(await said(registry, NoticeKind.DEAD_WARNING)) == 150, "they were told not long ago"


@pytest.mark.parametrize("by_operator", [True, False])
async def test_what_an_operator_scheduled_only_operators_cancel(alice, client, by_operator):
    owner = (await alice.get(alice.alice)).member_id
    async with alice.database.transaction("test") as session:
        _, operator = await members.create_operator(session, datetime.now(UTC))
    token, at = await alice.owner_token(owner), (datetime.now(UTC) + 10 * DAY).isoformat()
    async with client(operator if by_operator else token) as http:
        assert (await http.post("/v1/servers/alice/leaving", json={"at": at})).status_code == 202
    async with client(token) as http:
        answer = await http.delete("/v1/servers/alice/leaving")
    if not by_operator:
        assert (answer.status_code, answer.json()["state"]) == (200, "verified")
        return
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert answer.json()["remedy"] == "it takes operator"
    assert (await alice.get(alice.alice)).state is S.LEAVING
    async with client(operator) as http:
        assert (await http.delete("/v1/servers/alice/leaving")).json()["state"] == "verified"
    # What the member decides later is the member's again.
    async with client(token) as http:
        assert (await http.post("/v1/servers/alice/leaving", json={"at": at})).status_code == 202
        assert (await http.delete("/v1/servers/alice/leaving")).status_code == 200


async def test_a_blocked_member_leaves_and_does_not_come_back_by_itself(alice, client):
    owner = (await alice.get(alice.alice)).member_id
    token, at = await alice.owner_token(owner), (datetime.now(UTC) + 10 * DAY).isoformat()
    async with alice.database.transaction("test") as session:
        await standing.block(session, owner, "abuse", alice.now, actor="user 1")
    async with client(token) as http:
        assert (await http.post("/v1/servers/alice/leaving", json={"at": at})).status_code == 202
        answer = await http.delete("/v1/servers/alice/leaving")
    assert (answer.status_code, answer.json()["code"]) == (403, "member-blocked")
    assert (await alice.get(alice.alice)).state is S.LEAVING
