"""The worker: what it claims, under which lease, and that nothing it meets ends it."""

import asyncio
import time
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import event, func, select, update
from sqlalchemy.exc import OperationalError

from lab.processes import free_port
from nts_core.control import ServerState
from poolsvc import alarms, members, servers, teams
from poolsvc import worker as engine
from poolsvc.db import LEASE, Database
from poolsvc.derived import RegistryKey
from poolsvc.errors import NotFound
from poolsvc.models import Address, Invitation, Order, OrderStatus, Server
from poolsvc.worker import ORDERS, Health, Worker, claim, hold

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
STEP = LEASE / 10


async def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "not in time"
        await asyncio.sleep(0.01)
    return found


@pytest.fixture
async def orders(registry):
    """Ids of orders that are due one step apart, the latest first, and of one that is not due."""
    server = await registry.server()
    async with registry.database.transaction() as session:
        rows = [
            Order(server_id=server, status=OrderStatus.REQUESTED, created_at=NOW, due_at=NOW - number * STEP)
            for number in range(5)
        ]
        never = Order(server_id=server, status=OrderStatus.WANTED, created_at=NOW)
        session.add_all([*rows, never])
    return [row.id for row in rows]


async def take(database, now):
    return sorted(await claim(database, ORDERS, now))


async def test_what_is_due_is_claimed_longest_due_first(database, orders):
    assert await take(database, NOW - 10 * STEP) == []
    assert await take(database, NOW - 3 * STEP) == sorted(orders[3:])
    assert await take(database, NOW - 2 * STEP) == [orders[2]]


async def test_a_claim_is_a_lease_that_ends_by_itself(database, orders):
    assert set(await take(database, NOW)) == set(orders)
    assert await take(database, NOW + LEASE - timedelta(seconds=1)) == []
    assert set(await take(database, NOW + LEASE)) == set(orders)


async def test_a_step_that_sets_its_own_time_ends_the_lease(database, orders):
    await take(database, NOW)
    async with database.transaction() as session:
        await session.execute(update(Order).where(Order.id == orders[0]).values(due_at=NOW + STEP))
        await session.execute(update(Order).where(Order.id != orders[0]).values(due_at=None))
    assert await take(database, NOW + STEP) == orders[:1]


async def test_one_claim_takes_a_bounded_batch_and_the_next_one_the_rest(database, orders):
    async with database.transaction() as session:
        server = (await session.scalars(select(Server.id))).one()
        session.add_all(
            Order(server_id=server, status=OrderStatus.REQUESTED, created_at=NOW, due_at=NOW + STEP)
            for _ in range(70)
        )
    first = await take(database, NOW + STEP)
    second = await take(database, NOW + STEP)
    assert (len(first), len(second)) == (50, 25)
    assert set(orders) < set(first), "the longest due come first"
    assert not set(first) & set(second)


async def test_claimers_at_the_same_time_never_get_the_same_row(database, database_url, orders):
    """Each has connections of its own, as another process would."""
    others = [Database(database_url) for _ in range(3)]
    try:
        found = await asyncio.gather(*(take(one, NOW) for one in (database, *others, database, *others)))
    finally:
        for other in others:
            await other.close()
    claimed = [identifier for ids in found for identifier in ids]
    assert sorted(claimed) == sorted(orders)


async def test_on_postgresql_a_claimer_skips_rows_that_another_one_holds(postgresql, settings, registry_of):
    """It neither waits for them nor takes them twice."""
    registry = registry_of(postgresql, settings)
    server = await registry.server()
    async with postgresql.transaction() as session:
        rows = [
            Order(server_id=server, status=OrderStatus.REQUESTED, created_at=NOW, due_at=NOW)
            for _ in range(4)
        ]
        session.add_all(rows)
    held, free = [row.id for row in rows[:2]], [row.id for row in rows[2:]]
    async with postgresql.transaction() as session:
        await session.execute(select(Order).where(Order.id.in_(held)).with_for_update())
        async with asyncio.timeout(5):
            assert sorted(await take(postgresql, NOW)) == free
    assert sorted(await take(postgresql, NOW)) == held


async def test_on_postgresql_a_claim_is_one_statement_that_takes_no_more_than_its_batch(
    postgresql, orders_of
):
    """What others see of it is all or nothing."""
    ids = await orders_of(postgresql, ORDERS.batch + 5)
    statements = []
    engine = postgresql.engine.sync_engine
    event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2].split()[0]))
    taken = await take(postgresql, NOW)
    assert (len(taken), statements) == (ORDERS.batch, ["WITH"])
    assert set(taken) <= set(ids)


@pytest.fixture
def short_lease(monkeypatch):
    """A lease that is renewed while a test waits for it."""
    monkeypatch.setattr(engine, "LEASE", timedelta(seconds=1))


async def times(database):
    async with database.transaction() as session:
        rows = await session.execute(
            select(Order.id, Order.due_at).where(Order.status == OrderStatus.REQUESTED)
        )
        return dict(rows.all())


async def renewed(database, ids):
    """The times of all orders, as soon as those of some have been pushed."""
    before, end = await times(database), time.monotonic() + 30
    while True:
        now = await times(database)
        if all(now[row] > before[row] for row in ids):
            return now
        assert time.monotonic() < end, "not renewed"
        await asyncio.sleep(0.02)


async def test_a_lease_lasts_as_long_as_the_work(database, orders, short_lease):
    """What a step has set itself is not touched."""
    async with hold(database, ORDERS, datetime.now(UTC)) as ids:
        assert set(ids) == set(orders)
        own, idle, *others = orders
        async with database.transaction() as session:
            await session.execute(update(Order).where(Order.id == own).values(due_at=NOW))
            await session.execute(update(Order).where(Order.id == idle).values(due_at=None))
        for _ in range(2):
            now = await renewed(database, others)
        assert (now[own], now[idle]) == (NOW, None)


async def test_a_lease_that_is_over_is_renewed_no_more(database, orders, short_lease):
    async with hold(database, ORDERS, datetime.now(UTC)):
        pass
    given = await times(database)
    end = time.monotonic() + 30
    while not await claim(database, ORDERS, datetime.now(UTC)):
        assert time.monotonic() < end, "it never ended"
        await asyncio.sleep(0.02)
    assert all(row <= datetime.now(UTC) for row in given.values())


async def test_on_postgresql_renewal_waits_for_no_step(postgresql, orders_of, short_lease):
    """A step that holds one row and wants another would otherwise wait for us, and we for it."""
    held, *others = await orders_of(postgresql, 3)
    async with hold(postgresql, ORDERS, datetime.now(UTC)), postgresql.transaction() as session:
        await session.execute(select(Order).where(Order.id == held).with_for_update())
        before = await times(postgresql)
        now = await renewed(postgresql, others)
        assert now[held] == before[held]


@pytest.fixture
def orders_of(settings, registry_of):
    """So many orders that are due, in a database."""

    async def make(database, count):
        server = await registry_of(database, settings).server()
        async with database.transaction() as session:
            rows = [
                Order(server_id=server, status=OrderStatus.REQUESTED, created_at=NOW, due_at=NOW)
                for _ in range(count)
            ]
            session.add_all(rows)
        return [row.id for row in rows]

    return make


@pytest.fixture
async def start(database, tuned):
    """Starts a worker that cannot reach anything but the database; `start(work)` repeats that work alone."""
    settings = tuned(
        tick=0.01,
        step_retry=0.05,
        dns={"primary": f"127.0.0.1:{free_port()}"},
        ca={"directory_url": f"https://127.0.0.1:{free_port()}/dir"},
    )
    health, tasks = Health(), []

    def run(work=None):
        worker = Worker(database, settings, [], health, RegistryKey(bytes(32)))
        worker.health = health
        coroutine = worker.run() if work is None else worker._repeat(lambda now: work(worker, now))
        tasks.append(asyncio.create_task(coroutine))
        return worker

    yield run
    for task in tasks:
        assert not task.done(), f"the worker ended by itself: {task}"
        task.cancel()
    _, alive = await asyncio.wait(tasks, timeout=5)
    for task in alive:
        task.cancel()
    assert not alive, "the worker did not end when it was told to"


@pytest.mark.parametrize(
    "error",
    [
        lambda: OperationalError("SELECT 1", {}, OSError("gone")),
        lambda: NotFound("gone"),
    ],
    ids=["database", "pool"],
)
async def test_an_error_in_one_piece_of_work_ends_neither_the_worker_nor_the_other_pieces(start, error):
    done, rounds = [], []

    async def piece(identifier):
        if identifier == 1:
            raise error()
        for _ in range(10):
            await asyncio.sleep(0)
        done.append(identifier)

    async def work(worker, now):
        rounds.append(now)
        await worker._each([1, 2, 3], piece, 2)

    start(work)
    await until(lambda: len(rounds) >= 3)
    assert {2, 3} <= set(done), "a failing neighbour stopped the others"


async def test_after_a_full_batch_the_rest_is_done_at_once(start):
    """Not after the tick, which would be the limit of what a worker can do."""
    rounds = []

    async def work(worker, now):
        rounds.append(now)
        return len(rounds) < 4

    worker = start(work)
    worker._settings = worker._settings.model_copy(
        update={"policy": worker._settings.policy.model_copy(update={"tick": 3600})}
    )
    await until(lambda: len(rounds) == 4)


async def test_unfinished_registrations_expire_in_bounded_numbers(start, registry):
    """And all of them in the end."""
    owner = await registry.member()
    long_ago = NOW - timedelta(days=900)
    async with registry.database.transaction() as session:
        session.add_all(
            Server(
                member_id=owner,
                name=f"s{n}",
                state=ServerState.REGISTERED,
                state_since=long_ago,
                created_at=NOW,
            )
            for n in range(120)
        )
    async with registry.database.transaction() as session:
        assert await servers.expire_unfinished(session, registry.settings, NOW)
        left = select(func.count()).where(Server.state == ServerState.REGISTERED)
        assert await session.scalar(left) == 70
    start()
    end = time.monotonic() + 30
    while True:
        async with registry.database.transaction() as session:
            if not await session.scalar(left):
                break
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


async def test_a_worker_says_what_it_sees_and_that_it_ends(start, registry):
    async def shown():
        async with registry.database.transaction() as session:
            return await alarms.current(session, datetime.now(UTC))

    worker = start()
    end = time.monotonic() + 30
    while not any(alarm.startswith("CA: ") for alarm in await shown()):
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
    await worker._resign()
    assert [alarm for alarm in await shown() if "none has been seen" in alarm]


async def test_a_database_that_goes_away_and_comes_back_is_worked_on_again(start, registry):
    """Registrations expire again once the table is back."""
    async with registry.database.transaction() as session:
        await session.execute(update(Server).values(name="x"))
        connection = await session.connection()
        await connection.exec_driver_sql("ALTER TABLE servers RENAME TO elsewhere")
    worker = start()
    await until(lambda: worker.health.work)
    async with registry.database.transaction() as session:
        connection = await session.connection()
        await connection.exec_driver_sql("ALTER TABLE elsewhere RENAME TO servers")
    server = await registry.server()
    async with registry.database.transaction() as session:
        await session.execute(update(Server).values(state_since=NOW - timedelta(days=900)))
    end = time.monotonic() + 30
    while (await registry.get(server)).state is not ServerState.REMOVED:
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
    await until(lambda: not worker.health.work)


async def test_addresses_of_expired_invitations_are_forgotten(start, registry):
    async with registry.database.transaction() as session:
        user = await members.create_user(session, NOW)
        made = await teams.invite(session, registry.settings, "new@example.org", NOW, by=user.id)
    start()
    end, kept = time.monotonic() + 10, made.email
    while kept is not None:
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
        async with registry.database.transaction() as session:
            kept = await session.scalar(select(Invitation.email))


async def test_a_ca_that_is_away_is_told_and_holds_up_nothing_else(start, registry):
    server = await registry.server(state=ServerState.REGISTERED)
    async with registry.database.transaction() as session:
        await session.execute(update(Server).values(state_since=NOW - timedelta(days=900)))
    worker = start()
    await until(lambda: worker.health.cas)
    end = time.monotonic() + 30
    while (await registry.get(server)).state is not ServerState.REMOVED:
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


async def test_due_orders_become_wanted_orders(start, registry):
    named = await registry.server("alice", "198.18.0.1", state=ServerState.VERIFIED)
    unproved = await registry.server("bob", "198.18.0.2")
    async with registry.database.transaction() as session:
        await session.execute(update(Server).values(order_due_at=NOW))
        await session.execute(update(Address).values(confirmed_at=datetime.now(UTC)))
    start()
    end = time.monotonic() + 30
    while not (orders := (await registry.get(named)).orders):
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
    assert [order.status for order in orders] == [OrderStatus.WANTED]
    while (found := await registry.get(unproved)).order_due_at is not None:
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
    assert found.orders == [], "only a server that is in DNS can be certified"
