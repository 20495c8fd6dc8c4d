"""The queue for the CA's limits: in the database, among workers, after refusals, and as people see it."""

import asyncio
import random
import ssl
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
import sqlalchemy as sa
from alembic import command
from sqlalchemy import func, select, update

from lab.buckets import ExactBucket
from lab.ca_front import Fault, Resource
from lab.web import WebServer, http, says
from nts_core.acme import AcmeError
from nts_core.control import ServerState, Stage
from nts_core.tls import new_key_and_csr
from poolsvc import auth, issuance, members, onboarding, servers
from poolsvc.budget import Limit, Place
from poolsvc.config import LimitSettings
from poolsvc.db import Database
from poolsvc.derived import RegistryKey
from poolsvc.errors import InvalidDocument
from poolsvc.explain import explain
from poolsvc.models import (
    CaLimits,
    Event,
    Member,
    MemberKind,
    Order,
    OrderStatus,
    Pool,
    RevocationOrder,
    Server,
    TokenKind,
)
from poolsvc.worker import Health, Worker

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
WEEK, DAY, HOUR, MINUTE = (timedelta(**{unit: 1}) for unit in ("weeks", "days", "hours", "minutes"))
FIFTY = Limit(50, WEEK)
SLOT = FIFTY.interval
S = OrderStatus


async def populate(database, arrivals, *, member_of=lambda number: number, agentless=()):
    """Verified servers whose names were in DNS at these times, and that may order a minute later."""
    async with database.transaction("test") as session:
        for number in sorted({member_of(number) for number in range(len(arrivals))}):
            session.add(
                Member(
                    id=1000 + number,
                    name=f"m{number}",
                    kind=MemberKind.PERSON,
                    opaque_id=f"{number:016x}",
                    created_at=NOW,
                )
            )
        await session.flush()
        for number, at in enumerate(arrivals):
            session.add(
                Server(
                    id=number + 1,
                    member_id=1000 + member_of(number),
                    name=f"s{number}",
                    state=ServerState.VERIFIED,
                    state_since=at,
                    created_at=at,
                    named_at=at,
                    joined_at=at,
                    order_due_at=at + MINUTE,
                    agentless=number in agentless,
                )
            )


async def issue(database, server_ids, now, *, status=S.ISSUED, life=45 * DAY):
    """What comes of the orders under way of these servers."""
    async with database.transaction("test") as session:
        for server_id in server_ids:
            server = await servers.get(session, server_id)
            order = server.orders[-1]
            order.status = status
            if status is S.ISSUED:
                order.issued_at, order.not_before, order.not_after = now, now, now + life
                server.counted_at = server.counted_at or now
                server.order_due_at = now + life * 2 / 3
            else:
                order.token = "token"
                server.order_due_at = now + MINUTE


async def rows(database, *columns, where=()):
    async with database.transaction() as session:
        return list(await session.execute(select(*columns).where(*where).order_by(Server.id)))


async def begun(database):
    """The servers that have an order under way."""
    async with database.transaction() as session:
        found = await session.scalars(select(Order.server_id).where(Order.status == S.WANTED))
        return sorted(found)


async def look(database, settings, now):
    """One pass of a worker that knows nothing but the database."""
    await Worker(database, settings, [], Health(), RegistryKey(bytes(32)))._begin_orders(now)


class Simulation:
    """Members who arrive, a CA that refuses what is too much, and renewals meanwhile; time is a number."""

    def __init__(self, database, settings, members, renewing):
        chance = random.Random(5)
        self.database, self.settings, self.members = database, settings, members
        self.ca = ExactBucket(FIFTY, NOW - WEEK)
        self.arrivals = sorted(NOW + 3 * DAY * chance.random() for _ in range(members))
        # Ids say nothing of the order of arrival.
        chance.shuffle(self.arrivals)
        span = (members - 50) * SLOT
        self.renewals = {members + 1 + number: NOW + span * chance.random() for number in range(renewing)}
        self.entered, self.promised, self.began = {}, {}, {}
        self.renewed = {}

    async def run(self):
        await populate(self.database, [*self.arrivals, *(NOW - 99 * DAY for _ in self.renewals)])
        async with self.database.transaction("test") as session:
            for server_id, due in self.renewals.items():
                session.add(
                    Order(
                        server_id=server_id,
                        status=S.ISSUED,
                        created_at=NOW - 98 * DAY,
                        issued_at=NOW - 98 * DAY,
                    )
                )
                await session.execute(
                    update(Server)
                    .where(Server.id == server_id)
                    .values(order_due_at=due, counted_at=NOW - 98 * DAY)
                )
        while (now := await self._next()) is not None:
            await asyncio.gather(*(look(self.database, self.settings, now) for _ in range(2)))
            await self._note(now)
        return self

    async def _next(self):
        due = [row.order_due_at for row in await rows(self.database, Server.order_due_at) if row[0]]
        return min(due, default=None)

    async def _note(self, now):
        for row in await rows(
            self.database, Server.id, Server.order_due_at, where=[Server.queue_round.is_not(None)]
        ):
            self.entered.setdefault(row.id, now)
            self.promised.setdefault(row.id, row.order_due_at)
        done = await begun(self.database)
        for server_id in done:
            if server_id in self.renewals:
                self.renewed[server_id] = now
            else:
                self.ca.take(now + MINUTE)
                self.began[server_id] = now
        await issue(self.database, done, now + MINUTE, life=9999 * DAY)
        async with self.database.transaction() as session:
            await session.execute(
                update(Server)
                .where(Server.counted_at.is_not(None), Server.id.in_(done))
                .values(order_due_at=None)
            )


@pytest.mark.parametrize(
    "members", [120, pytest.param(500, marks=[pytest.mark.long, pytest.mark.timeout(1800)])]
)
async def test_on_boarding_of_many_members_at_once(database, settings, members):
    """The order of the queue, times that hold, and renewals that are never late, at fifty a week."""
    found = await Simulation(database, settings, members, renewing=20).run()
    assert len(found.began) == members
    by_arrival = sorted(found.began, key=lambda server_id: found.arrivals[server_id - 1])
    assert sorted(
        found.began, key=lambda server_id: (found.began[server_id], by_arrival.index(server_id))
    ) == (by_arrival)
    assert found.renewed == found.renewals
    late = []
    for server_id, promised in found.promised.items():
        waited = found.began[server_id] - found.entered[server_id]
        late.append(abs(found.began[server_id] - promised) / waited)
    assert len(late) >= members - 75, "most had to wait"
    assert max(late) <= 0.05
    took = max(found.began.values()) - NOW
    assert took <= (members - 50) * SLOT + 3 * DAY, "and nothing is left lying"


async def test_workers_at_once_never_take_more_than_there_is(postgresql_url, settings):
    """Each has claimed another share of those that are due, and none sees what the others have not committed."""
    now = NOW + HOUR
    databases = [Database(postgresql_url) for _ in range(4)]

    async def begin(database, claimed):
        async with database.transaction() as session:
            for server in await onboarding.admit(session, settings, claimed, now):
                issuance.want(server, now)

    try:
        await populate(databases[0], [NOW] * 100)
        shares = [range(first, 101, len(databases)) for first in range(1, len(databases) + 1)]
        await asyncio.gather(*map(begin, databases, shares))
        assert len(await begun(databases[0])) == 50
        await asyncio.gather(*(look(database, settings, now + MINUTE) for database in databases))
        assert len(await begun(databases[0])) == 50
    finally:
        for database in databases:
            await database.close()


async def test_who_waits_is_not_claimed_before_its_turn(database, settings):
    await populate(database, [NOW] * 52)
    now = NOW + HOUR
    await look(database, settings, now)
    waiting = await rows(database, Server.id, Server.order_due_at, where=[Server.queue_round.is_not(None)])
    assert [(row.id, row.order_due_at) for row in waiting] == [(51, now + SLOT), (52, now + 2 * SLOT)]
    async with database.transaction() as session:
        due = select(func.count()).where(Server.order_due_at <= now + SLOT - MINUTE)
        assert await session.scalar(due) == 0


async def test_a_member_with_many_servers_lets_the_others_by(database, settings, tuned):
    tight = tuned(ca={"limits": settings.ca.limits.model_copy(update={"certificates": one_a_day()})})
    # Member 0 has ten servers and was there before everybody.
    await populate(database, [NOW] * 10 + [NOW + MINUTE] * 3, member_of=lambda number: max(0, number - 9))
    now = NOW + HOUR
    order = []
    for _ in range(13):
        await look(database, tight, now)
        (server_id,) = await begun(database)
        order.append(server_id)
        await issue(database, [server_id], now, life=9999 * DAY)
        now += DAY
    assert order[:4] == [1, 11, 12, 13]
    assert order[4:] == list(range(2, 11))


def one_a_day():
    return LimitSettings(count=1, hours=24)


async def use_up(database, *, first=101, count=50, at=NOW):
    """Certificates that others have got."""
    async with database.transaction("test") as session:
        session.add(Member(id=999, name="m", kind=MemberKind.PERSON, opaque_id="f" * 16, created_at=NOW))
        await session.flush()
        session.add_all(
            Server(
                id=first + number,
                member_id=999,
                name=f"old{number}",
                state=ServerState.ACTIVE,
                state_since=at,
                created_at=at,
                named_at=at,
                counted_at=at,
            )
            for number in range(count)
        )


async def test_a_renewal_never_waits_and_a_first_order_does(database, settings):
    await use_up(database)
    await populate(database, [NOW, NOW])
    async with database.transaction("test") as session:
        session.add(Order(server_id=2, status=S.ISSUED, created_at=NOW, issued_at=NOW))
        await session.execute(update(Server).where(Server.id == 2).values(counted_at=NOW))
    await look(database, settings, NOW + HOUR)
    assert await begun(database) == [2]


async def reinstall(database, settings, times):
    """Server 1 gets a certificate at each of these times; each time its agent has lost the key before."""
    for number, at in enumerate(times):
        async with database.transaction("test") as session:
            server = await servers.get(session, 1)
            if number:
                server.joined_at = at
                issuance.start_anew(server, at)
        await look(database, settings, at)
        if 1 not in await begun(database):
            return number
        await issue(database, [1], at)
    return len(times)


async def test_a_host_that_is_installed_again_and_again_waits_for_its_own_name_only(database, settings):
    await populate(database, [NOW - HOUR, NOW])
    times = [NOW + number * HOUR for number in range(7)]
    assert await reinstall(database, settings, times) == 5, "five of one name within a week"
    (row,) = await rows(database, Server.order_due_at, Server.queue_round, where=[Server.id == 1])
    assert row.order_due_at == NOW + Limit(5, WEEK).interval, "the first of them is back"
    assert row.queue_round is None
    async with database.transaction() as session:
        other = await session.get_one(Server, 2)
        assert other.order_due_at is None, "another one has begun meanwhile"
    await look(database, settings, row.order_due_at)
    assert await begun(database) == [1, 2]


async def test_a_name_that_failed_too_often_waits_for_itself_alone(database, settings):
    await populate(database, [NOW, NOW + MINUTE])
    now = NOW + HOUR
    async with database.transaction("test") as session:
        session.add_all(
            Order(server_id=1, status=S.FAILED, token="token", created_at=now - number * MINUTE)
            for number in range(5)
        )
    await look(database, settings, now)
    assert await begun(database) == [2]
    (row,) = await rows(database, Server.order_due_at, where=[Server.id == 1])
    assert row.order_due_at == now - 4 * MINUTE + 12 * MINUTE
    await look(database, settings, row.order_due_at)
    assert await begun(database) == [1, 2]


async def test_an_order_that_failed_gives_back_what_it_would_have_taken(database, settings):
    await populate(database, [NOW] * 51)
    await look(database, settings, NOW + HOUR)
    assert len(await begun(database)) == 50
    await issue(database, [50], NOW + HOUR, status=S.FAILED)
    await look(database, settings, NOW + HOUR + timedelta(seconds=1))
    assert (await begun(database))[-1] == 51
    (row,) = await rows(database, Server.order_due_at, Server.queue_round, where=[Server.id == 50])
    assert row == (NOW + HOUR + MINUTE, None), "it has a wait of its own"
    await look(database, settings, NOW + HOUR + MINUTE)
    (row,) = await rows(database, Server.queue_round, where=[Server.id == 50])
    assert row.queue_round == 0, "and then is in the queue again"


async def test_an_agent_that_does_nothing_holds_no_certificate_back_for_longer_than_an_hour(
    database, settings
):
    await populate(database, [NOW] * 51)
    await look(database, settings, NOW + HOUR)
    await look(database, settings, NOW + 2 * HOUR - MINUTE)
    assert 51 not in await begun(database)
    async with database.transaction("test") as session:
        done = select(Order.id).where(Order.server_id <= 49)
        await session.execute(update(Order).where(Order.id.in_(done)).values(status=S.REQUESTED))
    await look(database, settings, NOW + 2 * HOUR)
    assert await begun(database) == [50, 51]
    async with database.transaction() as session:
        assert (await onboarding.state(session, settings, NOW + 2 * HOUR)).budget.reserved == 50


async def test_who_leaves_gives_the_place_to_the_next(database, settings):
    await use_up(database, at=NOW)
    await populate(database, [NOW, NOW + MINUTE, NOW + 2 * MINUTE])
    await look(database, settings, NOW + HOUR)
    async with database.transaction("test") as session:
        left = await servers.get(session, 1)
        await servers.leave(session, left, actor="test", reason="test", now=NOW + HOUR)
    async with database.transaction("test") as session:
        lost = await servers.get(session, 2)
        lost.named_at = None
    await look(database, settings, NOW + HOUR + MINUTE)
    (row,) = await rows(database, Server.order_due_at, where=[Server.id == 3])
    assert row.order_due_at == NOW + SLOT
    await look(database, settings, NOW + SLOT)
    assert await begun(database) == [3]


async def test_a_server_that_is_out_of_dns_again_begins_no_order(database, settings):
    await populate(database, [NOW])
    async with database.transaction("test") as session:
        await session.execute(update(Server).values(named_at=None))
    await look(database, settings, NOW + HOUR)
    assert await begun(database) == []
    (row,) = await rows(database, Server.order_due_at, Server.queue_round)
    assert row == (None, None)


async def test_members_without_an_agent_are_in_the_queue_and_counted_when_they_may_order(database, settings):
    await use_up(database, count=49, at=NOW + MINUTE)
    await populate(database, [NOW, NOW + MINUTE], agentless={0, 1})
    now = NOW + HOUR
    await look(database, settings, now)
    first, second = await rows(
        database, Server.order_due_at, Server.counted_at, Server.queue_round, where=[Server.id <= 2]
    )
    assert first == (None, now, None)
    assert second == (NOW + MINUTE + SLOT, None, 0), "which the registry shows as `may_order_at`"
    assert await begun(database) == []
    async with database.transaction("test") as session:
        await session.execute(update(Server).where(Server.id == 1).values(order_due_at=now + MINUTE))
    await look(database, settings, now + MINUTE)
    (again,) = await rows(database, Server.order_due_at, Server.counted_at, where=[Server.id == 1])
    assert again == (None, now), "with another account it does not wait again"


async def grant(database, now, **values):
    async with database.transaction("user 1") as session:
        wanted = {"certificates": None, "orders": None, "until": None, "note": ""} | values
        await onboarding.grant(session, **wanted, now=now)


async def test_what_the_ca_grants_lets_more_go_at_once(database, settings):
    await use_up(database)
    await populate(database, [NOW] * 3)
    now = NOW + HOUR
    await look(database, settings, now)
    assert await begun(database) == []
    await grant(database, now, certificates=52, note="ticket 7")
    await look(database, settings, now + MINUTE)
    assert await begun(database) == [1, 2]
    async with database.transaction() as session:
        (event,) = await session.scalars(select(Event).where(Event.kind.like("ca-limits%")))
        assert (event.kind, event.actor) == ("ca-limits-created", "user 1")
        assert event.after == {"certificates": 52, "note": "ticket 7"}
    await grant(database, now)
    async with database.transaction() as session:
        state = await onboarding.state(session, settings, now + MINUTE)
        assert (state.budget.certificates.limit, state.waiting) == (FIFTY, 1)
        last = await session.scalar(select(Event).where(Event.kind == "ca-limits-changed"))
        assert last.before == {"certificates": 52, "note": "ticket 7"}


@pytest.mark.parametrize(
    "values", [{"until": NOW}, {"note": "x" * 201}, {"note": "a\0b"}, {"note": "two\nlines"}]
)
async def test_a_grant_that_is_over_or_whose_note_is_no_line_is_refused(database, values):
    with pytest.raises(InvalidDocument) as caught:
        await grant(database, NOW, certificates=100, **values)
    assert caught.value.field == next(iter(values))
    async with database.transaction() as session:
        assert await session.get(CaLimits, 1) is None


# The CA says no.

LIMITED = http(
    "429 Too Many Requests",
    b'{"type": "urn:ietf:params:acme:error:rateLimited", "detail": "too many certificates"}',
    "Content-Type: application/problem+json\r\nRetry-After: 7200\r\n",
)


@pytest.mark.parametrize("engine", ["sqlite", "postgresql"], indirect=True)
async def test_a_429_holds_back_all_first_orders_until_its_time_and_no_renewal(flow, engine_url):
    """The account is one at Pebble; at its port another server says what a CA whose limit is reached says."""
    flow = await flow()
    await flow.begin()
    account = await flow.account()
    flow.pebble.stop()
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(
        flow.lab.directory / "pebble" / "front.pem", flow.lab.directory / "pebble" / "front.key"
    )
    port = int(flow.pebble.directory_url.split(":")[2].split("/")[0])
    async with WebServer(says(LIMITED), port=port, tls=tls):
        order = await flow.step(account)
    assert order.status is S.REQUESTED
    assert order.error == "CA: rateLimited: too many certificates"
    until = flow.now + timedelta(hours=2)
    assert order.due_at == until

    other = await flow.registry.server("bob", "198.18.0.2", state=ServerState.VERIFIED)
    third = await flow.registry.server("carol", "198.18.0.3", state=ServerState.VERIFIED)
    renewing = await flow.registry.server("dave", "198.18.0.4", state=ServerState.ACTIVE)
    async with flow.database.transaction("test") as session:
        csr = new_key_and_csr("bob.servers.pool.example")[1]
        session.add(Order(server_id=other, status=S.REQUESTED, csr=csr, created_at=flow.now))
        session.add(Order(server_id=renewing, status=S.ISSUED, created_at=NOW, issued_at=NOW))
        await session.execute(update(Server).where(Server.id == renewing).values(counted_at=NOW))
        due = Server.id.in_((third, renewing))
        await session.execute(update(Server).where(due).values(order_due_at=flow.now))

    # As after a restart: nothing but the database.
    await flow.database.close()
    again = Database(engine_url)
    try:
        await look(again, flow.settings, flow.now + MINUTE)
        assert await begun(again) == [renewing]
        (row,) = await rows(again, Server.order_due_at, where=[Server.id == third])
        # Alice's and bob's orders are under way, and take the first two of what there is then.
        assert row.order_due_at == until + 2 * SLOT
        async with again.transaction() as session:
            held = await session.scalar(select(Order.id).where(Order.server_id == other))
            state = await onboarding.state(session, flow.settings, flow.now + MINUTE)
            assert (state.refusal.until, state.refusal.detail) == (
                until,
                "rateLimited: too many certificates",
            )

        async def accounts(_name, _now):
            return account

        # The CA is away: had it been asked, the step would have been noted as a failed one.
        await issuance.advance(again, flow.settings, accounts, held, flow.now + MINUTE)
        async with again.transaction() as session:
            order = await session.get_one(Order, held)
            assert (order.due_at, order.attempts) == (until, 0)
            assert order.error.startswith("the CA takes no order for a new name before ")
        await issuance.advance(again, flow.settings, accounts, held, until)
        async with again.transaction() as session:
            assert (await session.get_one(Order, held)).attempts == 1, "at that time it is asked"
    finally:
        await again.close()


async def test_of_refusals_the_one_that_lasts_longest_counts(database, settings):
    await populate(database, [NOW])
    (server,) = await rows(database, Server)

    async def refuse(at, wait, code="rate-limited"):
        error = AcmeError(code, f"after {wait}")
        await onboarding.note_refusal(database, server.Server, error, at, at + wait)
        async with database.transaction() as session:
            found = (await onboarding.state(session, settings, at)).refusal
            return found and (found.at, found.until, found.detail)

    assert await refuse(NOW, HOUR, "server-error") is None
    first = await refuse(NOW, 2 * HOUR)
    assert first == (NOW, NOW + 2 * HOUR, "after 2:00:00")
    assert await refuse(NOW + MINUTE, MINUTE) == first
    assert await refuse(NOW + HOUR, 2 * HOUR) == (NOW + HOUR, NOW + 3 * HOUR, "after 2:00:00")
    assert await refuse(NOW + DAY, MINUTE) == (NOW + DAY, NOW + DAY + MINUTE, "after 0:01:00")
    server.Server.counted_at = NOW
    assert (await refuse(NOW + 2 * DAY, HOUR))[0] == NOW + DAY, "a renewal's 429 is its own"


async def placed_to_revoke(flow, count, ca):
    """Orders that a mass removal has placed just now."""
    made = {
        "server_id": flow.server_id,
        "ca": ca,
        "created_at": flow.now,
        "url": "x",
        "authorization_url": "x",
    }
    async with flow.database.transaction("test") as session:
        session.add_all(RevocationOrder(**made) for _ in range(count))


@pytest.mark.parametrize("engine", ["sqlite", "postgresql"], indirect=True)
async def test_a_mass_removal_leaves_a_quarter_of_the_orders_for_certificates(flow):
    flow = await flow(front={}, nonce_reject=0)
    account, first = await flow.account(), flow.settings.ca.name

    async def authorize(ca):
        where = flow.settings.domain_of("alice")
        return await onboarding.authorize(flow.database, flow.settings, account, ca, where, flow.now)

    limit = flow.settings.ca.limits.terms.orders
    await placed_to_revoke(flow, limit.count * 3 // 4 - 1, first)
    await placed_to_revoke(flow, limit.count, "acme.second.example")
    assert (await authorize(first)).txt is not None
    await placed_to_revoke(flow, 1, first)
    asked = flow.ca.asked[Resource.NEW_ORDER]
    with pytest.raises(AcmeError, match="kept for certificates") as caught:
        await authorize(first)
    assert (caught.value.code, caught.value.retry_after) == ("rate-limited", limit.interval.total_seconds())
    assert flow.ca.asked[Resource.NEW_ORDER] == asked, "the CA is not asked"
    async with flow.database.transaction() as session:
        assert (await onboarding.state(session, flow.settings, flow.now)).refusal is None, (
            "nor has it refused"
        )
    assert (await authorize("acme.second.example")).txt is not None, "the limits are the first CA's"
    flow.now += limit.interval
    assert (await authorize(first)).txt is not None


async def test_a_429_to_a_revocation_holds_back_first_orders(flow):
    flow = await flow(front={}, nonce_reject=0)
    flow.ca.faults = {Resource.NEW_ORDER: Fault.LIMITED}
    account = await flow.account()

    async def refused(ca):
        with pytest.raises(AcmeError) as caught:
            await onboarding.authorize(flow.database, flow.settings, account, ca, "x.example", flow.now)
        async with flow.database.transaction() as session:
            return caught.value, (await onboarding.state(session, flow.settings, flow.now)).refusal

    assert (await refused("acme.second.example"))[1] is None, "that of another CA"
    error, kept = await refused(flow.settings.ca.name)
    assert (kept.at, kept.until) == (flow.now, flow.now + timedelta(seconds=error.retry_after))
    assert kept.detail == error.detail
    async with flow.registry.change(flow.server_id) as (session, server):
        waiting = Order(server_id=server.id, status=S.REQUESTED)
        assert await onboarding.refusal_for(session, server, waiting, flow.now) is not None


# What people see.


@pytest.fixture
async def waiting(registry, database, settings):
    """Fifty certificates are spent, and three servers wait: those of two members, in this order: alice, carol, bob."""
    await use_up(database, at=NOW)
    ann, cid = await registry.member("Ann"), await registry.member("Cid")
    ids = [
        await registry.server(name, f"198.18.0.{number}", state=ServerState.VERIFIED, member=member)
        for number, (name, member) in enumerate([("alice", ann), ("bob", ann), ("carol", cid)], start=1)
    ]
    async with database.transaction("test") as session:
        for minutes, server_id in enumerate(ids):
            at = NOW + minutes * MINUTE
            values = {"named_at": at, "joined_at": at, "order_due_at": at}
            await session.execute(update(Server).where(Server.id == server_id).values(**values))
        _, operator = await members.create_operator(session, datetime.now(UTC))
        _, agent = await auth.issue(session, TokenKind.AGENT, now=NOW, server_id=ids[1])
    await look(database, settings, NOW + HOUR)
    return SimpleNamespace(ids=ids, operator=operator, agent=agent, ann=await registry.owner_token(ann))


async def test_a_member_sees_its_place_and_when_its_turn_comes(waiting, call):
    found = (await call(waiting.ann, "GET", "/v1/servers/bob")).json()
    turn = NOW + 3 * SLOT
    assert found["queue"] == {"position": 3, "waiting": 3, "turn_at": turn.isoformat().replace("+00:00", "Z")}
    why = (
        "3rd of 3 that wait for the CA's limit of 50 new certificates in 7 days;"
        f" about {turn:%Y-%m-%d %H:%M} UTC"
    )
    assert found["why"] == f"issuance: {why} (nothing: you are let in when it is your turn)"
    first = (await call(waiting.ann, "GET", "/v1/servers/alice")).json()
    assert (first["queue"]["position"], first["queue"]["waiting"]) == (1, 3)


async def test_an_agent_is_told_so_too(waiting, call):
    answer = await call(waiting.agent, "POST", "/v1/agent/sync", json={"engine": "builtin"})
    assert answer.json()["why"].startswith("issuance: 3rd of 3 that wait for the CA's limit of 50")


async def test_who_does_not_wait_has_no_place(waiting, call, database):
    async with database.transaction("test") as session:
        await session.execute(update(Server).where(Server.id == waiting.ids[0]).values(order_due_at=None))
    found = (await call(waiting.ann, "GET", "/v1/servers/alice")).json()
    assert found["queue"] is None
    assert found["why"].startswith("issuance: no order yet")
    assert (await call(waiting.ann, "GET", "/v1/servers/bob")).json()["queue"]["position"] == 2


ORDINALS = {1: "1st", 2: "2nd", 3: "3rd", 4: "4th", 11: "11th", 12: "12th", 13: "13th", 21: "21st"}
ORDINALS |= {100: "100th", 111: "111th", 112: "112th", 123: "123rd"}


@pytest.mark.parametrize(("number", "text"), ORDINALS.items())
def test_places_read_as_people_say_them(settings, number, text):
    server = Server(name="alice", state=ServerState.VERIFIED, created_at=NOW, named_at=NOW)
    server.orders.append(Order(status=S.FAILED, created_at=NOW, error="port 80 is closed"))
    place = Place(number, 200, NOW, Limit(7, DAY))
    views = explain(server, Pool(id=1, domain="pool.example", quorum=1), settings, active=5, place=place)
    (view,) = [view for view in views if view.stage is Stage.ISSUANCE]
    assert view.detail == (
        f"{text} of 200 that wait for the CA's limit of 7 new certificates in 1 days; about 2026-03-01 12:00 UTC"
        "; the order before: port 80 is closed"
    )


async def test_the_operator_sees_the_budget_and_sets_what_the_ca_granted(waiting, call, database, settings):
    now = datetime.now(UTC)
    async with database.transaction("test") as session:
        # The API's clock is the machine's.
        await session.execute(update(Server).where(Server.counted_at.is_not(None)).values(counted_at=now))
    found = (await call(waiting.operator, "GET", "/v1/acme/budget")).json()
    certificates = found.pop("certificates")
    next_at = datetime.fromisoformat(certificates.pop("next_at"))
    assert certificates == {"count": 50, "hours": 168, "spent": 50, "left": 0}
    assert abs(next_at - now - SLOT) < MINUTE
    assert found.pop("orders") == {"count": 300, "hours": 3, "spent": 0, "left": 300, "next_at": None}
    last = datetime.fromisoformat(found.pop("last_turn_at"))
    assert abs(last - now - 3 * SLOT) < MINUTE
    assert found == {"reserved": 0, "waiting": 3, "refusal": None}

    read = await call(waiting.operator, "GET", "/v1/acme/limits")
    assert read.json() == {"certificates": None, "orders": None, "until": None, "note": ""}
    tag = {"If-Match": read.headers["ETag"]}
    wish = {"certificates": 300, "until": "2099-01-01T00:00:00Z", "note": "ticket 7"}
    changed = await call(waiting.operator, "PUT", "/v1/acme/limits", json=wish, headers=tag)
    assert changed.json() == {**wish, "orders": None}
    again = await call(waiting.operator, "PUT", "/v1/acme/limits", json=wish, headers=tag)
    assert (again.status_code, again.json()["code"]) == (412, "precondition-failed")
    read = await call(
        waiting.operator, "GET", "/v1/acme/limits", headers={"If-None-Match": changed.headers["ETag"]}
    )
    assert read.status_code == 304
    found = (await call(waiting.operator, "GET", "/v1/acme/budget")).json()["certificates"]
    assert (found["count"], found["left"]) == (300, 250)
    await look(database, settings, now + MINUTE)
    assert await begun(database) == waiting.ids


async def test_a_queue_that_is_too_long_is_an_alarm(waiting, database, tuned):
    now = datetime.now(UTC)
    async with database.transaction("test") as session:
        assert await onboarding.queue(session) == onboarding.Queue(3, NOW + 3 * SLOT)
        last = now + DAY
        await session.execute(update(Server).where(Server.id == waiting.ids[2]).values(order_due_at=last))
        queue = await onboarding.queue(session)
    assert queue == onboarding.Queue(3, last)
    assert queue.wait(now) == DAY
    assert queue.wait(now + 2 * DAY) == timedelta(0)
    text = f"queue: 3 servers wait for the CA's limits, the last until about {last:%Y-%m-%d}"
    for patience, alarms in ((DAY + MINUTE, []), (DAY - MINUTE, [text])):
        health = Health()
        policy = tuned(queue_patience=patience.total_seconds())
        await Worker(database, policy, [], health, RegistryKey(bytes(32)))._watch(now)
        assert health.alarms() == alarms


async def test_without_a_queue_there_is_no_wait_and_no_alarm(database, tuned):
    async with database.transaction() as session:
        queue = await onboarding.queue(session)
    assert queue == onboarding.Queue(0, None)
    assert queue.wait(NOW) == timedelta(0)
    assert onboarding.alarm(tuned(queue_patience=0.001), queue, NOW) is None


NONSENSE = [
    {"certificates": 0},
    {"certificates": -1},
    {"certificates": 10**7},
    {"certificates": 10**30},
    {"orders": 1.5},
    {"orders": "9"},
    {"until": "2099-01-01T00:00:00"},
    {"until": "0001-01-01T00:00:00+23:59"},
    {"until": "9999-12-31T23:59:59-23:59"},
    {"until": "2020-01-01T00:00:00Z"},
    {"note": "x" * 201},
    {"note": "a\0b"},
    {"what": 1},
    [],
]


async def test_nonsense_is_refused_and_changes_nothing(registry, client):
    async with registry.database.transaction("test") as session:
        _, operator = await members.create_operator(session, datetime.now(UTC))
    async with client(operator) as http:
        before = (await http.get("/v1/acme/limits")).headers["ETag"]
        for body in NONSENSE:
            answer = await http.put("/v1/acme/limits", json=body)
            assert answer.status_code in {400, 422}, f"{body}: {answer.text}"
        assert (await http.get("/v1/acme/limits")).headers["ETag"] == before


async def test_two_operators_at_once_lose_nothing(registry, call):
    async with registry.database.transaction("test") as session:
        _, operator = await members.create_operator(session, datetime.now(UTC))
    tag = {"If-Match": (await call(operator, "GET", "/v1/acme/limits")).headers["ETag"]}
    wishes = [
        call(operator, "PUT", "/v1/acme/limits", json={"certificates": count}, headers=tag)
        for count in (100, 200)
    ]
    answers = await asyncio.gather(*wishes)
    assert sorted(answer.status_code for answer in answers) == [200, 412]


def test_migrating_counts_the_certificates_that_there_are(cluster, alembic, tmp_path):
    for url in (f"sqlite+aiosqlite:///{tmp_path / 'old.db'}", cluster.create_database()):
        command.upgrade(alembic(url), "8c1f0e5b72d3")
        engine = sa.create_engine(url.replace("+aiosqlite", ""), poolclass=sa.NullPool)
        at = [f"2026-01-0{day} 00:00:00" for day in (1, 2, 3)]
        with engine.begin() as session:
            session.execute(
                sa.text(
                    "INSERT INTO members (id, name, kind, opaque_id, created_at, status, public, status_reason)"
                    " VALUES (1, 'm', 'person', 'x', :at, 'active', false, '')"
                ),
                {"at": at[0]},
            )
            for server_id in (1, 2):
                session.execute(
                    sa.text(
                        "INSERT INTO servers (id, member_id, name, state, state_since, created_at, weight, ipv4, ipv6,"
                        " public, agentless, waive_source, skeleton, agent_engine, agent_clock, order_failures,"
                        " leave_by_operator, dead_warnings) VALUES (:id, 1, :name, 'active', :at, :at, 1, true, true,"
                        " false, false, false, '', '', '', 0, false, 0)"
                    ),
                    {"id": server_id, "name": f"s{server_id}", "at": at[0]},
                )
            for number, issued in enumerate((None, at[1], at[2]), start=1):
                session.execute(
                    sa.text(
                        "INSERT INTO orders (id, server_id, status, created_at, attempts, issued_at)"
                        " VALUES (:id, 1, 'issued', :at, 0, :issued)"
                    ),
                    {"id": number, "at": at[0], "issued": issued},
                )
        command.upgrade(alembic(url), "head")
        with engine.connect() as session:
            found = list(session.execute(sa.text("SELECT counted_at FROM servers ORDER BY id")))
        assert [str(row[0])[:10] if row[0] else None for row in found] == ["2026-01-02", None]
