"""Moving a server: both members consent, once; what goes along, and what does not."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select, update

from nts_core.control import ServerState
from poolsvc import auth, servers, standing, transfers
from poolsvc.errors import LimitReached, NotFound, OfferOver, TokenUsed, Unauthenticated, WrongState
from poolsvc.models import (
    Delivery,
    Event,
    Member,
    MemberRole,
    MemberStatus,
    Notice,
    StaffRole,
    TokenKind,
    Transfer,
)

DAYS = timedelta(days=7)


@pytest.fixture
async def two(registry):
    return await prepare(registry)


async def prepare(registry):
    """The server alice of the member `giver`, and the member `taker`, each with an owner."""
    registry.giver, registry.taker = await registry.member("Giver"), await registry.member("Taker")
    registry.offerer, registry.accepter = [
        await registry.person(member, email=f"{member}@example.org")
        for member in (registry.giver, registry.taker)
    ]
    registry.alice = await registry.server("alice", state=ServerState.ACTIVE, member=registry.giver)
    async with registry.database.transaction() as session:
        registry.to = (await session.get_one(Member, registry.taker)).opaque_id
    return registry


async def run(registry, work, *arguments, now=None):
    async with registry.database.transaction() as session:
        return await work(session, *arguments, now or registry.now)


async def offer(registry, server=None, to=None, now=None):
    return await run(
        registry,
        transfers.offer,
        registry.settings,
        server or registry.alice,
        to or registry.to,
        now=now,
    )


async def accept(registry, transfer, now=None):
    return await run(registry, transfers.accept, registry.settings, transfer.id, now=now)


async def told(registry, kind):
    """The members that a notice of a kind was for, with how many of their people get a mail."""
    async with registry.database.transaction() as session:
        found = select(Notice.member_id, Delivery.email, Delivery.due_at, Notice.data).join(Delivery)
        rows = await session.execute(found.where(Notice.kind == kind, Delivery.due_at.is_not(None)))
        return [(row.member_id, row.data["server"]) for row in rows]


async def test_a_server_moves_when_the_other_member_accepts(call, two):
    agent_token = await token_of(two, TokenKind.AGENT)
    join_token = await token_of(two, TokenKind.JOIN)
    offered = await call(two.offerer.token, "POST", "/v1/servers/alice/transfer", json={"to": two.to})
    assert offered.status_code == 201
    view = offered.json()
    assert (view["server"], view["to_member"], view["accepted_at"]) == ("alice", two.to, None)
    life = datetime.fromisoformat(view["expires_at"]) - datetime.fromisoformat(view["created_at"])
    assert life == DAYS
    assert await told(two, "server-offered") == [(two.giver, "alice"), (two.taker, "alice")]
    before = await two.get(two.alice)
    assert before.member_id == two.giver

    accepted = await call(two.accepter.token, "POST", f"/v1/transfers/{view['id']}/accept")
    assert accepted.status_code == 200
    assert accepted.json()["accepted_at"] is not None
    after = await two.get(two.alice)
    assert (after.member_id, after.state, after.state_since) == (two.taker, before.state, before.state_since)
    assert await told(two, "server-moved") == [(two.giver, "alice"), (two.taker, "alice")]
    # Rights follow the membership at once, the agent goes on, and the giver's join token is void.
    assert (await call(two.offerer.token, "GET", "/v1/servers/alice")).json()["code"] == "forbidden"
    assert (await call(two.accepter.token, "GET", "/v1/servers/alice")).status_code == 200
    assert (await call(agent_token, "POST", "/v1/agent/sync", json={"engine": "e"})).status_code == 200
    async with two.database.transaction() as session:
        with pytest.raises((Unauthenticated, TokenUsed)):
            await auth.authenticate(session, join_token, two.now)
        changed = await session.scalar(
            select(Event).where(Event.kind == "server-changed", Event.actor == f"user {two.accepter.id}")
        )
    assert (changed.before, changed.after) == ({"member_id": two.giver}, {"member_id": two.taker})


async def token_of(registry, kind):
    async with registry.database.transaction() as session:
        _, text = await auth.issue(session, kind, now=registry.now, server_id=registry.alice)
        return text


async def test_the_history_goes_with_the_server(call, two):
    await run(two, transfers.accept, two.settings, (await offer(two)).id)

    async def kinds(person, member):
        answer = await call(person.token, "GET", f"/v1/members/{member}/events", params={"limit": 200})
        return {(entry["kind"], entry["server"]) for entry in answer.json()["items"]}

    assert ("registered", two.alice) in await kinds(two.accepter, two.taker)
    left = await kinds(two.offerer, two.giver)
    assert {server for _, server in left} == {None}
    assert ("member-created", None) in left
    shown = await call(two.offerer.token, "GET", f"/v1/members/{two.giver}/transfers")
    assert [entry["server"] for entry in shown.json()["items"]] == ["alice"]


async def test_one_offer_at_a_time_that_can_be_taken_back_or_declined_once(two):
    first = await offer(two)
    with pytest.raises(WrongState, match="offered already"):
        await offer(two)
    await run(two, transfers.take_back, two.alice)
    with pytest.raises(NotFound):
        await run(two, transfers.take_back, two.alice)
    second = await offer(two)
    await run(two, transfers.decline, second.id)
    for over in (first, second):
        with pytest.raises(OfferOver):
            await accept(two, over)
        with pytest.raises(OfferOver):
            await run(two, transfers.decline, over.id)
    assert (await two.get(two.alice)).member_id == two.giver


async def test_an_offer_ends_after_its_days_and_makes_room_for_another(two):
    made = await offer(two)
    with pytest.raises(OfferOver):
        await accept(two, made, two.now + DAYS)
    await offer(two, now=two.now + DAYS)
    await accept(two, await latest(two), two.now + DAYS + timedelta(seconds=1))
    assert (await two.get(two.alice)).member_id == two.taker


async def latest(registry):
    async with registry.database.transaction() as session:
        return await session.scalar(select(Transfer).order_by(Transfer.id.desc()).limit(1))


@pytest.mark.parametrize("role", ["technician", "offerer", "stranger", "operator", "support"])
async def test_only_an_owner_who_gets_it_answers_an_offer(call, two, role):
    person = {
        "technician": await two.person(two.taker, MemberRole.TECHNICIAN),
        "offerer": two.offerer,
        "stranger": await two.person(await two.member("Stranger")),
        "operator": await two.person(staff=StaffRole.OPERATOR),
        "support": await two.person(staff=StaffRole.SUPPORT),
    }[role]
    made = await offer(two, now=datetime.now(UTC))
    for answer in ("accept", "decline"):
        refused = await call(person.token, "POST", f"/v1/transfers/{made.id}/{answer}")
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
    assert (await two.get(two.alice)).member_id == two.giver


async def test_an_operator_offers_for_a_member_and_no_more(call, two):
    operator = await two.person(staff=StaffRole.OPERATOR)
    answer = await call(operator.token, "POST", "/v1/servers/alice/transfer", json={"to": two.to})
    assert answer.status_code == 201
    taken_back = await call(two.offerer.token, "DELETE", "/v1/servers/alice/transfer")
    assert (taken_back.status_code, taken_back.json()["declined_at"] is None) == (200, False)


async def test_the_quota_of_who_takes_it_counts(two):
    async with two.database.transaction() as session:
        (await session.get_one(Member, two.taker)).max_servers = 1
    await two.server("bob", "198.18.0.2", member=two.taker)
    made = await offer(two)
    with pytest.raises(LimitReached):
        await accept(two, made)
    assert (await two.get(two.alice)).member_id == two.giver
    async with two.database.transaction() as session:
        bob = await servers.find(session, "bob")
        await servers.leave(session, bob, actor="test", reason="", now=two.now)
    await accept(two, made)


@pytest.mark.parametrize("side", ["giver", "taker"])
@pytest.mark.parametrize("status", [MemberStatus.BLOCKED, MemberStatus.PENDING, MemberStatus.CLOSED])
async def test_nothing_moves_from_or_to_a_member_that_is_not_active(two, side, status):
    made = await offer(two)
    async with two.database.transaction() as session:
        await session.execute(update(Member).where(Member.id == getattr(two, side)).values(status=status))
    with pytest.raises(WrongState):
        await accept(two, made)
    await run(two, transfers.decline, made.id)
    if side == "taker":
        with pytest.raises(NotFound) as caught:
            await offer(two)
        assert caught.value.field == "to"


async def test_an_unknown_member_and_a_blocked_one_are_the_same_to_who_offers(call, two):
    async with two.database.transaction() as session:
        await standing.block(session, two.taker, "a test", two.now, actor="test")
    path = "/v1/servers/alice/transfer"
    blocked, unknown = [
        (await call(two.offerer.token, "POST", path, json={"to": to})).json() for to in (two.to, "0" * 16)
    ]
    assert blocked == unknown
    assert (blocked["status"], blocked["field"]) == (404, "to")


async def test_a_server_that_leaves_moves_no_more(two):
    made = await offer(two)
    async with two.change(two.alice) as (session, server):
        await servers.leave(session, server, actor="test", reason="", now=two.now)
    with pytest.raises(WrongState, match="leaving"):
        await accept(two, made)
    await run(two, transfers.decline, made.id)
    with pytest.raises(WrongState, match="leaving"):
        await offer(two)


@pytest.mark.parametrize("to", ["", "x", "0" * 17, "G" * 16, "\x00" * 16, 7, None])
async def test_what_names_no_member_is_refused(call, two, to):
    answer = await call(two.offerer.token, "POST", "/v1/servers/alice/transfer", json={"to": to})
    assert (answer.status_code, answer.json()["field"]) == (422, "to")


async def test_a_member_does_not_offer_a_server_to_itself(two):
    async with two.database.transaction() as session:
        own = (await session.get_one(Member, two.giver)).opaque_id
    with pytest.raises(WrongState, match="already"):
        await offer(two, to=own)


async def together(*work):
    async with asyncio.timeout(20):
        outcomes = await asyncio.gather(*work, return_exceptions=True)
    return sorted(type(outcome).__name__ for outcome in outcomes)


async def test_of_answers_at_once_one_counts(postgresql, settings, registry_of):
    two = await prepare(registry_of(postgresql, settings))
    made = await offer(two)
    assert await together(accept(two, made), accept(two, made)) == ["OfferOver", "Transfer"]
    two.alice = await two.server("bob", "198.18.0.2", member=two.giver)
    made = await offer(two)
    outcomes = await together(accept(two, made), run(two, transfers.take_back, two.alice))
    assert outcomes in (["OfferOver", "Transfer"], ["NotFound", "Transfer"])
    row = await latest(two)
    assert (row.accepted_at is None) != (row.declined_at is None)
    moved = (await two.get(two.alice)).member_id == two.taker
    assert moved is (row.accepted_at is not None)


async def test_of_offers_at_once_one_is_made(postgresql, settings, registry_of):
    two = await prepare(registry_of(postgresql, settings))
    assert await together(offer(two), offer(two), offer(two)) == ["Transfer", "WrongState", "WrongState"]


async def test_servers_that_arrive_at_once_keep_the_quota(postgresql, registry_of, tuned):
    """By registration and by two transfers, with room for one."""
    two = await prepare(registry_of(postgresql, tuned(servers_per_member=2)))
    await two.server("first", "198.18.0.9", member=two.taker)
    bob = await two.server("bob", "198.18.0.2", member=two.giver)
    offers = [await offer(two, server) for server in (two.alice, bob)]
    outcomes = await together(
        *(accept(two, made) for made in offers), two.server("carol", "198.18.0.3", member=two.taker)
    )
    assert outcomes.count("LimitReached") == 2


async def test_a_block_and_an_acceptance_at_once_leave_no_server_behind(postgresql, settings, registry_of):
    """Either the server moves and is not held, or it stays and is."""
    two = await prepare(registry_of(postgresql, settings))
    made = await offer(two)

    async def block():
        async with postgresql.transaction() as session:
            await standing.block(session, two.giver, "a test", two.now, actor="test")

    await together(block(), accept(two, made))
    server = await two.get(two.alice)
    expected = ServerState.ACTIVE if server.member_id == two.taker else ServerState.SUSPENDED
    assert server.state is expected
