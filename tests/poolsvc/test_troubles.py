"""What people are told of their servers: each event once, over a whole life, and never a silent drop."""

import base64
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select

from lab.smtp import MailServer
from nts_core.control import ProbeResult, ServerState, Stage, StageStatus
from poolsvc import auth, members, monitoring, removal, servers, troubles
from poolsvc.config import MailSettings
from poolsvc.derived import RegistryKey
from poolsvc.models import (
    Delivery,
    DeliveryStatus,
    HoldKind,
    Notice,
    Order,
    OrderStatus,
    StageRecord,
    TokenKind,
)
from poolsvc.notices import NoticeKind
from poolsvc.servers import NOTICES, TRANSITIONS, EventKind
from poolsvc.worker import Health, Worker

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
S = ServerState


async def told(registry):
    async with registry.database.transaction() as session:
        return list(await session.scalars(select(Notice).order_by(Notice.id)))


async def kinds(registry):
    return [notice.kind for notice in await told(registry)]


def test_every_way_of_the_table_that_people_have_to_know_of_is_told():
    """Proof and certificate are steps of a registration that somebody watches; nothing is lost by them."""
    quiet = {EventKind.ADDRESS_PROVED, EventKind.CERTIFICATE_SEEN}
    # By who knows more: whether it is to leave now or later, and which address was lost.
    elsewhere = {EventKind.LEAVE, EventKind.LEAVE_CANCELLED, EventKind.ADDRESSES_LOST}
    assert {kind for _, kind in TRANSITIONS} == set(NOTICES) | quiet | elsewhere


async def test_a_suspension_is_told_with_its_hold_stage_and_reason_and_the_way_back(registry):
    server = await registry.server(state=S.ACTIVE)
    async with registry.change(server) as (session, row):
        for stage in (Stage.OFFSET, Stage.KE):
            row.stages.append(
                StageRecord(server_id=server, stage=stage, status=StageStatus.FAILED, since=NOW)
            )
        await servers.set_hold(session, row, HoldKind.SCORE, reason="score 3.2", actor="prober", now=NOW)
        await servers.set_hold(session, row, HoldKind.OPERATOR, reason="see mail", actor="x", now=NOW)
    async with registry.change(server) as (session, row):
        for kind in (HoldKind.SCORE, HoldKind.OPERATOR):
            await servers.lift_hold(session, row, kind, reason="good again", actor="x", now=NOW + HOUR)
    _, suspended, recovered = await told(registry)
    assert suspended.kind == "suspended"
    assert suspended.data == {
        "server": "alice",
        "hold": "score",
        "stage": "ke",
        "reason": "score: score 3.2",
    }
    assert recovered.kind == "recovered"
    assert recovered.data["suspended_at"] == NOW.isoformat()


async def test_a_hold_of_the_operator_names_no_stage_that_happens_to_fail(registry):
    server = await registry.server(state=S.ACTIVE)
    async with registry.change(server) as (session, row):
        row.stages.append(StageRecord(server_id=server, stage=Stage.KE, status=StageStatus.FAILED, since=NOW))
        await servers.set_hold(session, row, HoldKind.OPERATOR, reason="abuse", actor="x", now=NOW)
    assert (await told(registry))[-1].data["stage"] is None


async def test_what_rolls_back_was_not_told(registry):
    server = await registry.server(state=S.ACTIVE)

    async def leave_and_fail():
        async with registry.change(server) as (session, row):
            await servers.leave(session, row, actor="x", reason="x", now=NOW)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await leave_and_fail()
    assert await kinds(registry) == ["admitted"]


async def test_a_registration_that_expires_is_told(registry):
    await registry.server()
    async with registry.database.transaction() as session:
        await servers.expire_unfinished(session, registry.settings, NOW + 30 * DAY)
    (notice,) = await told(registry)
    assert (notice.kind, notice.data["reason"]) == ("removed", "no address was proved")


async def test_an_address_that_its_score_takes_out_of_dns_is_told_once(registry):
    good, bad = "198.18.0.1", "198.18.0.2"
    server = await registry.server("alice", good, bad, state=S.ACTIVE)
    for minute in range(8):
        async with registry.change(server) as (session, row):
            row.addresses[0].score = 20.0
            results = [ProbeResult(good, Stage.OFFSET, "late"), ProbeResult(bad, Stage.TCP, "refused")]
            await monitoring.record(session, registry.settings, row, results, NOW + minute * MINUTE)
    found = [notice for notice in await told(registry) if notice.kind == "address-withdrawn"]
    assert [notice.data["address"] for notice in found] == [bad]
    assert found[0].data["reason"].startswith("score ")


async def report(registry, server, problem, now):
    async with registry.change(server) as (session, row):
        row.agent_seen_at = now
        await troubles.note_report(session, row, problem, now)


async def test_a_problem_of_the_agent_is_told_when_it_begins_and_once_an_hour_at_most(registry):
    server = await registry.server()
    for minutes, problem, expected in (
        (0, None, 0),
        (1, "no clock", 1),
        (2, "no clock", 1),
        (300, "no clock", 1),
        (301, None, 1),
        (302, "no clock", 2),
        (303, "disk full", 2),
        (320, "disk full 2", 2),
        (362, "disk full 3", 3),
        (363, None, 3),
        (364, "disk full 3", 3),
        (423, "disk full 3", 3),
        (424, None, 3),
        (425, "disk full 3", 4),
    ):
        await report(registry, server, problem, NOW + minutes * MINUTE)
        assert len(await told(registry)) == expected, f"after {minutes} minutes"
    assert {notice.kind for notice in await told(registry)} == {"agent-trouble"}
    assert (await registry.get(server)).agent_problem == "disk full 3"


async def silence(registry, now):
    async with registry.database.transaction() as session:
        await troubles.tell_silence(session, now)
    return len(await told(registry))


async def test_an_agent_that_is_silent_for_a_day_is_told_once_for_each_silence(registry):
    server = await registry.server()
    assert await silence(registry, NOW + 9 * DAY) == 0, "no agent has joined"
    async with registry.change(server) as (_, row):
        row.joined_at = NOW
    assert await silence(registry, NOW + DAY) == 0
    assert await silence(registry, NOW + DAY + MINUTE) == 1, "not even a first report"
    assert await silence(registry, NOW + 5 * DAY) == 1
    await report(registry, server, None, NOW + 6 * DAY)
    assert await silence(registry, NOW + 7 * DAY) == 1
    assert await silence(registry, NOW + 7 * DAY + MINUTE) == 2
    assert (await told(registry))[-1].data["seen_at"] == (NOW + 6 * DAY).isoformat()
    async with registry.change(server) as (session, row):
        row.silent_told_at = None
        await servers.leave(session, row, actor="x", reason="x", now=NOW)
    assert await silence(registry, NOW + 9 * DAY) == 3, "the third is that it leaves"


async def order(registry, server, status, **values):
    async with registry.change(server) as (_, row):
        row.orders.append(Order(server_id=server, status=status, created_at=NOW, **values))
    return (await registry.get(server)).orders[-1].id


async def test_a_certificate_is_told_of_halfway_from_its_renewal_to_its_end(registry):
    server = await registry.server(state=S.ACTIVE)
    life = {"not_before": NOW, "not_after": NOW + 90 * DAY}
    row = Order(**life)
    troubles.watch_end(row)
    assert row.ending_due_at == NOW + 75 * DAY
    first = await order(registry, server, OrderStatus.ISSUED, ending_due_at=row.ending_due_at, **life)
    worker = Worker(registry.database, registry.settings, [], Health(), RegistryKey(bytes(32)))
    for days, expected in ((74, 0), (75, 1), (76, 1)):
        await worker._watch(NOW + days * DAY)
        assert (await kinds(registry)).count("certificate-trouble") == expected
    assert (await told(registry))[-1].data["ends_at"] == (NOW + 90 * DAY).isoformat()
    await order(registry, server, OrderStatus.ISSUED, **life)
    async with registry.change(server) as (_, found):
        found.orders[0].ending_due_at = NOW
    await worker._watch(NOW + 76 * DAY)
    assert (await kinds(registry)).count("certificate-trouble") == 1, "there is a newer one"
    assert next(row for row in (await registry.get(server)).orders if row.id == first).ending_due_at is None


async def test_a_whole_life_is_told_in_order_and_every_delivery_has_an_end(registry, client):
    """With mail for one person, and none for others: whoever is not told has a row that says why."""
    async with registry.database.transaction() as session:
        owner = await members.create_user(session, NOW, email="owner@example.org")
        member = (await members.create(session, "Member", NOW, owner=owner)).id
    await registry.owner_token(member)
    server = await registry.server("alice", "198.18.0.1", member=member)
    async with registry.database.transaction() as session:
        _, token = await auth.issue(session, TokenKind.JOIN, now=NOW, server_id=server)
    key = base64.b64encode(bytes(range(32))).decode()
    async with client(token) as agent:
        answer = await agent.post("/v1/agent/join", json={"public_key": key})
    async with client(answer.json()["token"]) as agent:
        await agent.post("/v1/agent/sync", json={"engine": "x", "problem": "the clock is not\nset"})
    async with registry.change(server) as (session, row):
        row.burnt_at = row.named_at = NOW
        row.addresses[0].proved_at = NOW
        for kind in (EventKind.ADDRESS_PROVED, EventKind.CERTIFICATE_SEEN, EventKind.NTS_CONFIRMED):
            await servers.apply(session, row, kind, actor="test", reason="x", now=NOW)
        await servers.set_hold(session, row, HoldKind.SCORE, reason="score 1.0", actor="prober", now=NOW)
    async with registry.change(server) as (session, row):
        await servers.lift_hold(session, row, HoldKind.SCORE, reason="good", actor="prober", now=NOW)
    assert await silence(registry, datetime.now(UTC) + 2 * DAY)
    async with registry.change(server) as (session, row):
        await servers.leave(session, row, actor="user 1", reason="removed by its member", now=NOW)
        row.srv_withdrawn_at = row.name_broken_at = NOW + MINUTE
    await removal.advance(registry.database, registry.settings, None, server, NOW + HOUR)
    assert (await registry.get(server)).state is S.REMOVED
    notices = await told(registry)
    assert [notice.kind for notice in notices] == [
        "joined",
        "agent-trouble",
        "admitted",
        "suspended",
        "recovered",
        "agent-silent",
        "leaving",
        "removed",
    ]
    assert notices[1].data["problem"] == "the clock is not set"
    receipt = notices[-1].data["receipt"]
    assert receipt["srv_withdrawn_at"] == (NOW + MINUTE).isoformat()
    assert receipt["removed_at"] == (NOW + HOUR).isoformat()
    assert receipt["exposure"]
    async with MailServer() as server:
        mail = MailSettings(
            smtp=f"127.0.0.1:{server.port}", security="none", sender="pool@registry.example.net"
        )
        worker = Worker(
            registry.database,
            registry.settings.model_copy(update={"mail": mail}),
            [],
            Health(),
            RegistryKey(bytes(32)),
        )
        await worker._mail(datetime.now(UTC) + 3 * DAY)
        (received,) = server.received
    assert all(f"alice {words}" in received.message.get_content() for words in ("is back", "has left"))
    async with registry.database.transaction() as session:
        rows = list(await session.scalars(select(Delivery)))
    assert len(rows) == 2 * len(notices)
    for row in rows:
        assert row.done_at is not None
        assert row.status is DeliveryStatus.SENT or row.error == "the account has no mail address"
    assert {row.status for row in rows} == {DeliveryStatus.SENT, DeliveryStatus.SUPPRESSED}


def test_every_kind_that_the_issue_asks_for_is_there():
    asked = "joined admitted suspended recovered certificate-trouble agent-trouble leaving-scheduled removed"
    assert set(asked.split()) <= set(NoticeKind)
