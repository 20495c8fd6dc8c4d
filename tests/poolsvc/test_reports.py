"""What monitors are told to look at, and what becomes of their reports; on both engines."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import func, select, update

from nts_core.control import MonitorReport, MonitorSample, MonitorStatus, ProbeResult, ServerState, Stage
from poolsvc import monitors, reports
from poolsvc.errors import InvalidDocument, WrongState
from poolsvc.models import Monitor, MonitorView, SampleRecord, Server, ViewRole

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
S = ServerState
OURS = "0a" * 32
LITTLE_MORE = pytest.approx(12.4)


def good(offset=0, **values):
    values = {"stratum": 2, "leap": 0, "asked": 2, "cookies": 2, "delay": 1000} | values
    return ProbeResult("198.18.0.1", None, "", offset=offset, **values)


def bad(stage=Stage.TCP):
    return ProbeResult("198.18.0.1", stage, "no answer")


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
    assert await tell(monitor, (target, good(), 10.0), (target, good(), 10.0), (target, good(), 5.0)) == 2
    assert await tell(monitor, (target, bad(), 5.0), (target, bad(), 9.0)) == 0
    assert await tell(monitor, (target, good(), 0.0)) == 1


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
    hostile = ProbeResult("\0", Stage.TLS, "\0" * 100_000, kiss="\0")
    assert await tell(monitor, (target, hostile), now=NOW + MINUTE) == 1


async def test_a_report_of_too_many_samples_is_refused(registry, tell):
    monitor, _ = await registry.monitor()
    with pytest.raises(InvalidDocument) as caught:
        await tell(monitor, *[(1, good())] * (monitors.MAX_SAMPLES + 1))
    assert caught.value.field == "samples"
