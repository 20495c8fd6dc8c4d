"""What monitors are told to look at, and what becomes of their reports; on both engines."""

import asyncio
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import delete, func, select, update

from nts_core.control import (
    MonitorReport,
    MonitorSample,
    MonitorStatus,
    ProbeResult,
    ServerState,
    Stage,
    StageStatus,
)
from poolsvc import maintenance, monitoring, monitors, reports, reviews, scoring, standing
from poolsvc.derived import RegistryKey
from poolsvc.errors import InvalidDocument, TooManyRequests, WrongState
from poolsvc.models import (
    Event,
    Monitor,
    MonitorView,
    Notice,
    Order,
    OrderStatus,
    SampleRecord,
    Server,
    ViewRole,
    ZoneChange,
)
from poolsvc.models import Pool as PoolRow
from poolsvc.notices import NoticeKind
from poolsvc.pool import the_pool
from poolsvc.worker import JUDGEMENTS, claim

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
S = ServerState
OURS = "0a" * 32
LITTLE_MORE = pytest.approx(12.4)


def good(offset=0, **values):
    values = {"stratum": 2, "leap": 0, "asked": 2, "cookies": 2, "delay": 1000} | values
    return ProbeResult("198.18.0.1", None, "", offset=offset, **values)


def bad(stage=Stage.TCP):
    return ProbeResult("198.18.0.1", stage, "no answer", is_silent=True)


@pytest.fixture
def tell(registry):
    """`tell(monitor, *samples)`: one report; each sample is (target, result) or (target, result, age). How many counted."""
    sequence = iter(range(1, 10_000))

    async def report(monitor_id, *samples, now=None, sound=True, number=None, **options):
        document = MonitorReport(
            sequence=next(sequence) if number is None else number,
            sound=sound,
            samples=tuple(MonitorSample(target, (*age, 0.0)[0], result) for target, result, *age in samples),
            **options,
        )
        async with registry.database.transaction("test") as session:
            monitor = await monitors.reporting(session, monitor_id)
            monitor.seen_at = now or registry.now
            return await reports.take(session, registry.settings, monitor, document, now or registry.now)

    return report


async def view_of(registry, monitor_id, address_id):
    async with registry.database.transaction() as session:
        return await session.get_one(MonitorView, (address_id, monitor_id))


async def work(registry, monitor_id, now=None):
    async with registry.database.transaction("test") as session:
        monitor = await monitors.reporting(session, monitor_id)
        return await monitors.work(session, registry.settings, monitor, now or registry.now)


async def test_a_monitor_is_told_of_its_own_targets_that_are_due_and_of_each_once(registry):
    monitor, _ = await registry.monitor()
    other, _ = await registry.monitor("paris")
    server = await registry.server("alice", "198.18.0.1", "fd00::1", state=S.ACTIVE)
    await registry.server("bob", "198.18.0.2", state=S.ACTIVE)
    first, second = await registry.look(monitor, server)
    found = await work(registry, monitor)
    assert [(task.target, task.address, task.domain) for task in found.tasks] == [
        (first, "198.18.0.1", "alice.servers.pool.example"),
        (second, "fd00::1", "alice.servers.pool.example"),
    ]
    assert set(found.tasks[0].own_addresses) == {"198.18.0.1", "fd00::1"}
    assert (await work(registry, monitor)).tasks == (), "they are the monitor's for a while"
    assert (await work(registry, other)).tasks == ()
    assert len((await work(registry, monitor, NOW + 5 * MINUTE)).tasks) == 2, "its report never came"


async def test_a_monitor_is_not_sent_where_it_cannot_look_or_where_nobody_is_to(registry):
    monitor, _ = await registry.monitor()
    for number, state in enumerate((S.REGISTERED, S.LEAVING, S.REMOVED), start=1):
        server = await registry.server(f"s{number}", f"198.18.0.{number}", state=state)
        await registry.look(monitor, server)
    await registry.look(monitor, await registry.server("six", "fd00::6", state=S.ACTIVE))
    paused = await registry.server("paused", "198.18.0.7", state=S.ACTIVE)
    await registry.look(monitor, paused, ViewRole.PAUSED)
    async with registry.database.transaction() as session:
        await session.execute(update(Monitor).where(Monitor.id == monitor).values(ipv6=False))
    assert (await work(registry, monitor)).tasks == ()


@pytest.mark.parametrize("status", [MonitorStatus.PENDING, MonitorStatus.PAUSED])
async def test_a_monitor_that_does_not_work_is_told_why_and_changes_nothing(registry, tell, status):
    monitor, _ = await registry.monitor(status=status)
    (target,) = await registry.look(monitor, await registry.server(state=S.ACTIVE))
    found = await work(registry, monitor)
    assert (found.tasks, found.status) == ((), status)
    assert found.reason.startswith(status)
    assert await tell(monitor, (target, bad())) == 0
    assert (await view_of(registry, monitor, target)).at is None


async def test_a_sample_moves_the_view_and_the_address(registry, tell):
    monitor, _ = await registry.monitor()
    server = await registry.server(state=S.ACTIVE)
    (target,) = await registry.look(monitor, server)
    assert await tell(monitor, (target, good(offset=1000), 30.0)) == 1
    view = await view_of(registry, monitor, target)
    assert (view.at, view.score, view.offset_ns, view.failed) == (NOW - MINUTE / 2, LITTLE_MORE, 1000, None)
    assert view.due_at > NOW
    async with registry.database.transaction() as session:
        sample = (await session.scalars(select(SampleRecord))).one()
        assert (sample.monitor, sample.at, sample.score) == ("frankfurt", NOW - MINUTE / 2, LITTLE_MORE)
        assert (await session.get_one(Server, server)).judge_due_at == NOW, "its stages are not known yet"


async def test_only_what_is_newer_than_what_is_known_counts(registry, tell):
    monitor, _ = await registry.monitor()
    (target,) = await registry.look(monitor, await registry.server(state=S.ACTIVE))
    assert await tell(monitor, (target, good(), 100.0), (target, good(), 100.0), (target, good(), 60.0)) == 2
    assert await tell(monitor, (target, bad(), 60.0), (target, bad(), 90.0)) == 0
    assert await tell(monitor, (target, good(), 0.0)) == 1


async def test_more_than_was_asked_for_does_not_count(registry, tell):
    """Else one monitor could bring its own server up, or another one down, in a minute."""
    monitor, _ = await registry.monitor()
    (target,) = await registry.look(monitor, await registry.server(state=S.ACTIVE))
    assert await tell(monitor, *((target, good(), float(age)) for age in range(59, -1, -1))) == 2


async def test_what_is_said_of_another_address_than_it_is_now_does_not_count(registry, tell):
    monitor, _ = await registry.monitor()
    (target,) = await registry.look(monitor, await registry.server(state=S.ACTIVE))
    assert await tell(monitor, (target, replace(good(), address="203.0.113.9"))) == 0


async def test_a_monitor_does_not_judge_its_own_members_server(registry, tell):
    """As after a server has come to another member."""
    member = await registry.member()
    monitor, _ = await registry.monitor(member=member)
    (target,) = await registry.look(monitor, await registry.server(state=S.ACTIVE, member=member))
    assert await tell(monitor, (target, good())) == 0


async def test_what_was_seen_by_a_clock_that_was_ahead_is_no_last_word(registry, tell):
    monitor, _ = await registry.monitor()
    (target,) = await registry.look(monitor, await registry.server(state=S.ACTIVE))
    assert await tell(monitor, (target, good()), now=NOW + timedelta(days=1)) == 1
    assert await tell(monitor, (target, bad()), number=2**62) == 1


async def test_a_report_that_comes_again_counts_once_and_an_older_one_not_at_all(registry, tell):
    monitor, _ = await registry.monitor()
    (target,) = await registry.look(monitor, await registry.server(state=S.ACTIVE))
    assert await tell(monitor, (target, good(), 10.0), number=7) == 1
    assert await tell(monitor, (target, good(), 1.0), number=7) == 1
    async with registry.database.transaction() as session:
        assert await session.scalar(select(func.count()).select_from(SampleRecord)) == 1
        assert (await session.get_one(Monitor, monitor)).samples == 1
    with pytest.raises(WrongState):
        await tell(monitor, (target, good()), number=6)
    for number in (0, -1, 2**63):
        with pytest.raises(InvalidDocument):
            await tell(monitor, (target, good()), number=number)


@pytest.mark.parametrize("sound", [False, None])
async def test_a_monitor_that_is_not_sound_changes_nothing(registry, tell, sound):
    member = await registry.member()
    monitor, _ = await registry.monitor(member=member)
    (target,) = await registry.look(monitor, await registry.server(state=S.ACTIVE))
    assert await tell(monitor, (target, bad()), sound=sound, detail="the clock is 1 s off") == 0
    assert (await view_of(registry, monitor, target)).at is None
    async with registry.database.transaction() as session:
        row = await session.get_one(Monitor, monitor)
        assert (row.sound, row.sound_since, row.sound_detail) == (sound, NOW, "the clock is 1 s off")


async def test_targets_of_others_and_what_nobody_could_have_seen_are_passed_over(registry, tell):
    monitor, _ = await registry.monitor()
    other, _ = await registry.monitor("paris")
    (target,) = await registry.look(monitor, await registry.server(state=S.ACTIVE))
    (foreign,) = await registry.look(other, await registry.server("bob", "198.18.0.2", state=S.ACTIVE))
    garbage = [
        (foreign, good()),
        (0, good()),
        (-1, good()),
        (2**40, good()),
        (target, good(), -1.0),
        (target, good(), 1201.0),
        (target, good(), float("nan")),
        (target, good(), float("inf")),
        (target, good(offset=10**30)),
        (target, good(delay=-(10**30))),
        (target, good(stratum=300)),
        (target, good(cookies=9)),
        (target, good(kiss="much too long")),
        (target, good(fingerprint="\0" * 64)),
        (target, good(serial="xyz")),
        (target, good(not_after=10**15)),
        (target, good(leaf="x" * 9000)),
        (target, ProbeResult("", Stage.SCORE, "")),
        (target, ProbeResult("", None, "")),
    ]
    assert await tell(monitor, *garbage) == 0
    assert await tell(monitor, *garbage, (target, bad())) == 1
    hostile = ProbeResult("", Stage.TLS, "\0" * 100_000, kiss="\0")
    assert await tell(monitor, (target, hostile), now=NOW + MINUTE) == 1


async def test_a_report_of_too_many_samples_is_refused(registry, tell):
    monitor, _ = await registry.monitor()
    with pytest.raises(InvalidDocument) as caught:
        await tell(monitor, *[(1, good())] * (monitors.MAX_SAMPLES + 1))
    assert caught.value.field == "samples"


class Pool:
    """Some monitors that all look at some servers, and what became of these."""

    def __init__(self, registry, tell):
        self.registry, self.tell, self.now = registry, tell, NOW
        self.monitors, self.targets = [], {}

    async def begin(self, count, quorum, *, members=()):
        """So many monitors, and the registry's own at rest."""
        for number in range(count):
            member = members[number] if number < len(members) else None
            self.monitors.append((await self.registry.monitor(f"m{number}", member))[0])
        async with self.registry.database.transaction() as session:
            inner = await monitors.inner(session)
            inner.status = MonitorStatus.PAUSED if count else inner.status
            (await the_pool(session, self.registry.settings)).quorum = quorum
        return self

    async def server(self, name, address, state=S.ACTIVE, member=None):
        server = await self.registry.server(name, address, state=state, member=member)
        async with self.registry.database.transaction() as session:
            session.add(
                Order(
                    server_id=server,
                    status=OrderStatus.ISSUED,
                    created_at=NOW,
                    fingerprint=OURS,
                    seen_at=NOW,
                    chain="PEM",
                )
            )
        for monitor in self.monitors:
            (self.targets[server],) = await self.registry.look(monitor, server)
        return server

    async def round(self, server, *results, minutes=1):
        """Each monitor says one thing, or nothing (None); the server's state after the worker has judged it."""
        self.now += minutes * MINUTE
        for monitor, result in zip(self.monitors, results, strict=False):
            if result is not None:
                await self.tell(monitor, (self.targets[server], result), now=self.now)
        return await self.judge(server)

    async def judge(self, server, minutes=0):
        self.now += minutes * MINUTE
        database, settings = self.registry.database, self.registry.settings
        for row in await claim(database, JUDGEMENTS, self.now):
            for left in await reports.settle_due(database, settings, [row], self.now):
                await monitoring.judge_due(database, settings, left, self.now)
        return (await self.registry.get(server)).state

    async def address(self, server):
        return (await self.registry.get(server)).addresses[0]


@pytest.fixture
def pool(registry, tell):
    return Pool(registry, tell)


FULL = good(fingerprint=OURS)


async def crowd(pool):
    """Enough others that one may go."""
    for number in range(6):
        await pool.registry.server(f"s{number}", f"198.18.7.{number + 1}", state=S.ACTIVE)


async def test_a_quorum_of_full_probes_admits_a_server(pool):
    await pool.begin(3, 3)
    server = await pool.server("alice", "198.18.0.1", state=S.CERTIFIED)
    assert await pool.round(server, FULL, FULL, FULL) is S.CERTIFIED
    assert await pool.round(server, FULL, FULL, bad()) is S.CERTIFIED, "two are no quorum of three"
    assert await pool.round(server, FULL, FULL, FULL) is S.CERTIFIED
    assert await pool.round(server, FULL, FULL, FULL) is S.ACTIVE
    assert (await pool.address(server)).score == 12.0


async def test_one_that_lies_brings_nobody_down_and_most_of_them_do(pool):
    await crowd(pool)
    await pool.begin(3, 3)
    server = await pool.server("alice", "198.18.0.1")
    for _ in range(10):
        assert await pool.round(server, FULL, FULL, bad()) is S.ACTIVE
    assert (await pool.address(server)).score > 12
    stage = next(row for row in (await pool.registry.get(server)).stages if row.stage is Stage.TCP)
    assert stage.status is StageStatus.MET, "one monitor's word fails no stage"
    for _ in range(5):
        state = await pool.round(server, FULL, bad(), bad())
    assert state is S.SUSPENDED
    for _ in range(60):
        state = await pool.round(server, FULL, FULL, bad())
    assert state is S.ACTIVE


async def test_monitors_of_one_member_are_one_vote(pool):
    await crowd(pool)
    member = await pool.registry.member()
    await pool.begin(5, 3, members=[member] * 3)
    server = await pool.server("alice", "198.18.0.1")
    for _ in range(10):
        assert await pool.round(server, bad(), bad(), bad(), FULL, FULL) is S.ACTIVE


async def test_below_the_quorum_nothing_rises_or_falls_and_it_is_the_pools_fault(pool):
    await crowd(pool)
    await pool.begin(3, 3)
    server = await pool.server("alice", "198.18.0.1")
    fresh = await pool.server("bob", "198.18.0.2", state=S.CERTIFIED)
    await pool.round(server, FULL, FULL, FULL)
    score = (await pool.address(server)).score
    assert await pool.judge(server, minutes=25) is S.ACTIVE
    found = await pool.address(server)
    assert (found.score, found.unknown) == (score, "0 of the 3 monitors that it takes know it")
    for _ in range(5):
        assert await pool.round(server, bad(), bad()) is S.ACTIVE
        assert await pool.round(fresh, FULL, FULL) is S.CERTIFIED
    assert (await pool.address(server)).score == score
    await pool.round(server, FULL, FULL, FULL)
    assert (await pool.address(server)).unknown is None
    async with pool.registry.database.transaction() as session:
        standing = await monitors.council(session, pool.registry.settings, pool.now + 6 * MINUTE)
        assert (standing.heard, standing.is_met) == (0, False)
        assert "0 of the 3" in monitors.alarm(standing, 0)


async def test_a_server_that_was_silent_to_all_for_long_goes_below_the_quorum_too(pool):
    await crowd(pool)
    await pool.begin(2, 3)
    server = await pool.server("alice", "198.18.0.1")
    states = [await pool.round(server, bad(), bad(), minutes=10) for _ in range(4)]
    assert states == [S.ACTIVE, S.ACTIVE, S.ACTIVE, S.SUSPENDED]
    (hold,) = (await pool.registry.get(server)).holds
    assert hold.reason == "silent for 30 minutes to every monitor that looks"


async def test_a_monitor_of_a_blocked_member_has_no_say(pool):
    await crowd(pool)
    member = await pool.registry.member()
    await pool.begin(3, 3, members=[member])
    server = await pool.server("alice", "198.18.0.1")
    await pool.round(server, FULL, FULL, FULL)
    async with pool.registry.database.transaction() as session:
        await standing.block(session, member, "r", pool.now, actor="user 1")
    assert await pool.tell(pool.monitors[0], (pool.targets[server], bad()), now=pool.now + MINUTE) == 0
    await pool.judge(server, minutes=1)
    await pool.round(server, None, FULL, FULL)
    assert (await pool.address(server)).unknown == "2 of the 3 monitors that it takes know it"


async def test_what_a_members_monitor_says_of_certificates_counts_for_nothing(pool):
    """It could end the proof of an address, and have keys forgotten."""
    member = await pool.registry.member()
    await pool.begin(1, 1, members=[member])
    server = await pool.server("alice", "198.18.0.1", state=S.VERIFIED)
    for fingerprint in (OURS, "0b" * 32):
        assert await pool.round(server, good(fingerprint=fingerprint, serial="1", leaf="PEM")) is S.VERIFIED
    assert (await pool.address(server)).confirmed_at == NOW
    async with pool.registry.database.transaction() as session:
        assert await session.scalar(select(func.count()).select_from(Order)) == 1
        assert await session.scalar(select(func.count()).select_from(Notice)) == 0


async def test_one_of_the_pools_own_certifies_confirms_and_tells(pool):
    await pool.begin(1, 1)
    server = await pool.server("alice", "198.18.0.1", state=S.VERIFIED)
    async with pool.registry.change(server) as (_, row):
        row.probe_due_at = NOW
    assert await pool.round(server, good(fingerprint="0b" * 32, serial="1")) is S.VERIFIED
    async with pool.registry.database.transaction() as session:
        (notice,) = await session.scalars(select(Notice))
        assert notice.kind == NoticeKind.CERTIFICATE_NOT_ORDERED
    assert await pool.round(server, FULL) is S.CERTIFIED
    assert (await pool.address(server)).confirmed_at == pool.now


async def test_nothing_counts_during_maintenance_and_a_full_probe_after_it_ends_the_hold(pool):
    await pool.begin(3, 3)
    server = await pool.server("alice", "198.18.0.1")
    async with pool.registry.change(server) as (session, row):
        end = NOW + 10 * MINUTE
        await maintenance.add(session, row, starts_at=NOW, ends_at=end, reason="", actor="user 1", now=NOW)
    for _ in range(9):
        assert await pool.round(server, bad(), bad(), bad()) is S.SUSPENDED
    assert (await pool.address(server)).score == 12.0
    assert await pool.round(server, FULL, FULL, FULL, minutes=5) is S.ACTIVE


async def test_the_quorum_rises_by_itself_once_servers_are_known_and_falls_by_a_word(pool):
    await pool.begin(3, 1)
    server = await pool.server("alice", "198.18.0.1")
    settings = pool.registry.settings

    async def raised():
        async with pool.registry.database.transaction() as session:
            return await monitors.raise_quorum(session, settings, pool.now)

    assert await raised() == 1, "no server is known by three"
    await pool.round(server, FULL, FULL, FULL)
    assert await raised() == 3
    pool.now += 30 * MINUTE
    assert await raised() == 3, "it never falls by itself"
    async with pool.registry.database.transaction("user 1") as session:
        await monitors.set_quorum(session, settings, 2, "two are away", actor="user 1", now=pool.now)
        with pytest.raises(InvalidDocument):
            await monitors.set_quorum(session, settings, 4, "r", actor="user 1", now=pool.now)
        event = await session.scalar(select(Event).where(Event.kind == "quorum-set"))
        assert (event.before, event.after, event.reason) == ({"quorum": 3}, {"quorum": 2}, "two are away")
    async with pool.registry.database.transaction() as session:
        assert (await session.get_one(PoolRow, 1)).quorum == 2


async def changes(pool):
    async with pool.registry.database.transaction() as session:
        return await session.scalar(select(func.count()).select_from(ZoneChange))


async def test_a_steady_server_costs_no_judgement_and_is_looked_at_again_before_it_is_forgotten(pool):
    await pool.begin(3, 3)
    server = await pool.server("alice", "198.18.0.1")
    await pool.round(server, FULL, FULL, FULL)
    before = await changes(pool)
    await pool.round(server, FULL, FULL, FULL)
    row = await pool.registry.get(server)
    assert row.judge_due_at == pool.now + 19 * MINUTE + timedelta(seconds=1)
    assert await changes(pool) == before
    address = await pool.address(server)
    assert (address.judged_at, address.confirmed_at) == (pool.now, pool.now)


async def test_a_shadow_scorer_is_reckoned_beside_the_one_that_rules(pool, tuned):
    pool.registry.settings = tuned(shadow_scorer="quartile")
    await pool.begin(4, 3)
    server = await pool.server("alice", "198.18.0.1")
    for _ in range(4):
        assert await pool.round(server, FULL, FULL, FULL, bad()) is S.ACTIVE
    found = await pool.address(server)
    assert found.score > scoring.CUTOFF > found.shadow_score


async def test_what_is_wrong_with_a_name_in_dns_is_the_pools_alarm(registry, tell):
    """Two monitors with a say have to see it; it holds against nobody's score."""
    (first, _), (second, _) = await registry.monitor("one"), await registry.monitor("two")
    server = await registry.server(state=S.ACTIVE)
    (target,) = await registry.look(first, server)
    await registry.look(second, server)
    async with registry.database.transaction("test") as session:
        (await the_pool(session, registry.settings)).quorum = 2
    wrong = replace(good(), names="alias")

    async def amiss():
        async with registry.database.transaction() as session:
            standing = await monitors.council(session, registry.settings, NOW)
            return await monitors.count_amiss(session, standing, NOW), monitors.alarm(standing, 0, 1)

    assert await tell(first, (target, wrong)) == 1
    assert (await amiss())[0] == 0
    assert await tell(second, (target, wrong)) == 1
    count, text = await amiss()
    assert count == 1
    assert "of 1 addresses monitors see the name wrong in DNS" in text
    assert await tell(second, (target, good()), now=NOW + MINUTE) == 1
    assert (await amiss())[0] == 0


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_reports_reviews_and_questions_at_the_same_time_never_wait_in_a_circle(registry, tell):
    names = [f"eye-{number}" for number in range(3)]
    eyes = [(await registry.monitor(name))[0] for name in names]
    ids = [
        await registry.server(f"s{number}", f"198.18.0.{number}", state=S.ACTIVE) for number in range(1, 9)
    ]
    targets = {eye: [(await registry.look(eye, server))[0] for server in ids] for eye in eyes}
    key = RegistryKey(bytes(32))

    async def report(eye):
        for number in range(1, 11):
            at = NOW + number * MINUTE
            samples = [(target, replace(good(), address="")) for target in targets[eye]]
            with suppress(TooManyRequests):
                await tell(eye, *samples, now=at, number=number)

    async def ask(eye):
        for number in range(10):
            async with registry.database.transaction() as session:
                with suppress(TooManyRequests):
                    monitor = await monitors.reporting(session, eye)
                    await monitors.work(session, registry.settings, monitor, NOW + number * MINUTE)

    async def review():
        for number in range(10):
            # A view that is missing is made, which refers to its monitor.
            async with registry.database.transaction() as session:
                await session.execute(
                    delete(MonitorView).where(MonitorView.address_id == targets[eyes[0]][number % 8])
                )
            await reviews.review_due(registry.database, registry.settings, key, ids, NOW + number * MINUTE)

    await asyncio.gather(*map(report, eyes), *map(ask, eyes), review(), review())
