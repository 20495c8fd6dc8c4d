"""What a round of probes does to a server: stages, admission, scores, holds."""

import resource
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from sqlalchemy import select, update

from lab.certificates import Authority
from lab.processes import free_port
from nts_core.client import load_roots
from nts_core.control import ProbeResult, ServerState, Stage, StageStatus
from nts_core.tls import Trust
from poolsvc import monitoring, scoring, servers
from poolsvc.derived import RegistryKey
from poolsvc.models import Address, Event, HoldKind, Notice, Order, OrderStatus, StageRecord
from poolsvc.notices import NoticeKind
from poolsvc.outbound import Guard
from poolsvc.pool import count_kept_low
from poolsvc.prober import ProbeImpossible, probe
from poolsvc.rounds import Rounds
from poolsvc.worker import Health, Worker

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
S = ServerState
ONE, OTHER = "198.18.0.1", "fd00::1"
OURS, STRANGERS = "0a" * 32, "0b" * 32
MET, FAILED, WAITING = StageStatus.MET, StageStatus.FAILED, StageStatus.WAITING


def good(address=ONE, **values):
    values = {"offset": 0, "delay": 1000, "stratum": 2, "leap": 0, "asked": 2, "cookies": 2} | values
    return ProbeResult(address, None, "", **{"fingerprint": OURS, **values})


def bad(stage=Stage.TCP, address=ONE, detail="no answer", **values):
    return ProbeResult(address, stage, detail, **values)


async def issue(registry, server_id, fingerprint=OURS, **values):
    async with registry.database.transaction() as session:
        session.add(
            Order(
                server_id=server_id,
                status=OrderStatus.ISSUED,
                created_at=NOW,
                fingerprint=fingerprint,
                chain="PEM",
                **values,
            )
        )


@pytest.fixture
def rounds(registry):
    """`rounds(server, *results)` lets one round of probes take effect; `now` moves by a minute each time."""
    registry.clock = NOW

    async def probe(server_id, *results):
        registry.clock += timedelta(minutes=1)
        async with registry.change(server_id) as (session, server):
            await monitoring.record(session, registry.settings, server, results, registry.clock)
            return server.state

    return probe


async def stages(registry, server_id):
    async with registry.database.transaction() as session:
        found = await session.scalars(select(StageRecord).where(StageRecord.server_id == server_id))
        return {row.stage: row for row in found}


async def reasons(registry, server_id):
    async with registry.database.transaction() as session:
        found = await session.scalars(select(Event).where(Event.server_id == server_id).order_by(Event.id))
        return [(event.kind, event.actor, event.reason) for event in found]


async def test_the_certificate_seen_on_every_address_certifies(registry, rounds):
    server = await registry.server("alice", ONE, OTHER, state=S.VERIFIED)
    await issue(registry, server)
    assert await rounds(server, good(), bad(address=OTHER)) is S.VERIFIED
    assert await rounds(server, good(), good(OTHER, fingerprint=None)) is S.VERIFIED
    assert await rounds(server, good(), bad(Stage.OFFSET, OTHER, fingerprint=OURS)) is S.CERTIFIED
    assert (await reasons(registry, server))[-1][:2] == ("certificate-seen", "prober")


async def test_a_certificate_was_seen_when_every_address_works_with_it(registry, rounds):
    server = await registry.server("alice", ONE, OTHER, state=S.ACTIVE)
    await issue(registry, server, fingerprint="00" * 32)
    await issue(registry, server)

    async def seen():
        async with registry.change(server) as (_, found):
            return servers.seen_certificate(found)

    for faulty in (
        bad(address=OTHER),
        good(OTHER, fingerprint="00" * 32),
        bad(Stage.OFFSET, OTHER, fingerprint=OURS),
        good(OTHER, fingerprint=None),
    ):
        await rounds(server, good(), faulty)
        assert await seen() is None
    await rounds(server, good(), good(OTHER))
    assert await seen() == OURS
    await rounds(server, good(fingerprint="00" * 32), good(OTHER, fingerprint="00" * 32))
    assert await seen() == OURS, "the newest of those that were seen"


async def test_a_valid_certificate_that_was_not_ordered_certifies_nothing(registry, rounds):
    server = await registry.server(state=S.VERIFIED)
    await issue(registry, server)
    for _ in range(5):
        assert await rounds(server, good(fingerprint=STRANGERS)) is S.VERIFIED


async def not_ordered(registry):
    async with registry.database.transaction() as session:
        kind = NoticeKind.CERTIFICATE_NOT_ORDERED
        return [notice.data for notice in await session.scalars(select(Notice).where(Notice.kind == kind))]


async def test_a_certificate_that_was_not_ordered_is_told_once_and_is_an_alarm_for_a_week(registry, rounds):
    server = await registry.server(state=S.ACTIVE)
    await issue(registry, server)
    await rounds(server, good(serial="a1"))
    assert await not_ordered(registry) == []
    for _ in range(3):
        await rounds(server, good(fingerprint=STRANGERS, serial="b2"))
    assert await not_ordered(registry) == [{"server": "alice", "address": ONE, "serial": "b2"}]
    await rounds(server, good(fingerprint="0c" * 32, serial="c3"))
    assert len(await not_ordered(registry)) == 1, "who shows another one each time is told of once an hour"
    registry.clock += timedelta(hours=1)
    await rounds(server, good(fingerprint="0c" * 32, serial="c3"))
    assert [data["serial"] for data in await not_ordered(registry)] == ["b2", "c3"]
    health = Health()
    worker = Worker(registry.database, registry.settings, [], health, RegistryKey(bytes(32)))
    await worker._watch(registry.clock)
    assert health.alarms() == ["certificates: 1 servers showed one that the pool did not order, in a week"]
    await worker._watch(registry.clock + timedelta(days=8))
    assert health.alarms() == []


async def test_the_certificate_of_a_server_without_an_agent_is_its_members(registry, rounds):
    server = await registry.server(state=S.ACTIVE, agentless=True)
    await rounds(server, good(fingerprint=STRANGERS, serial="b2"))
    assert await not_ordered(registry) == []


async def test_no_probe_at_all_raises_nothing(registry, rounds):
    """`all` of no results is true: nothing seen must not count as all seen."""
    server = await registry.server(state=S.VERIFIED)
    await issue(registry, server)
    assert await rounds(server) is S.VERIFIED


async def test_admission_takes_full_probes_in_a_row_and_a_bad_one_begins_anew(registry, rounds):
    server = await registry.server(state=S.CERTIFIED)
    await issue(registry, server)
    needed = registry.settings.policy.admission_probes
    assert needed == 3
    for _ in range(needed - 1):
        assert await rounds(server, good()) is S.CERTIFIED
    assert await rounds(server, bad()) is S.CERTIFIED
    assert (await registry.get(server)).addresses[0].full_probes == 0
    for _ in range(needed - 1):
        assert await rounds(server, good()) is S.CERTIFIED
    assert await rounds(server, good()) is S.ACTIVE
    found = await registry.get(server)
    assert found.addresses[0].score == scoring.ADMITTED
    assert found.probe_due_at == registry.clock + timedelta(seconds=registry.settings.policy.probe_interval)
    assert "bootstrap" in (await reasons(registry, server))[-1][2]


@pytest.mark.parametrize(
    "flawed", [good(offset=30_000_000), good(stratum=8), good(leap=3), good(cookies=1), bad(Stage.COOKIES)]
)
async def test_a_probe_with_a_flaw_is_no_full_probe(registry, rounds, flawed):
    server = await registry.server(state=S.CERTIFIED)
    await issue(registry, server)
    for _ in range(5):
        assert await rounds(server, good()) is S.CERTIFIED
        assert (await registry.get(server)).addresses[0].step_reason == ""
        assert await rounds(server, flawed) is S.CERTIFIED
    assert (await registry.get(server)).addresses[0].full_probes == 0


async def test_admission_waits_for_every_proved_address(registry, rounds):
    server = await registry.server("alice", ONE, OTHER, state=S.CERTIFIED)
    await issue(registry, server)
    for _ in range(4):
        assert await rounds(server, good(), bad(address=OTHER)) is S.CERTIFIED
    for _ in range(3):
        state = await rounds(server, good(), good(OTHER))
    assert state is S.ACTIVE
    assert [row.score for row in (await registry.get(server)).addresses] == [scoring.ADMITTED] * 2


async def test_a_server_under_a_hold_is_not_admitted(registry, rounds):
    """ACTIVE means that no hold is set."""
    server = await registry.server(state=S.CERTIFIED)
    await issue(registry, server)
    async with registry.change(server) as (session, row):
        await servers.set_hold(session, row, HoldKind.OPERATOR, reason="r", actor="operator 1", now=NOW)
    for _ in range(4):
        state = await rounds(server, good())
    assert state is not S.ACTIVE


async def test_the_worst_address_speaks_for_each_stage(registry, rounds):
    server = await registry.server("alice", ONE, OTHER, state=S.VERIFIED)
    await rounds(server, bad(Stage.OFFSET, detail="1 s off"), bad(Stage.TLS, OTHER, detail="not TLS"))
    found = await stages(registry, server)
    assert {stage: row.status for stage, row in found.items()} == {
        Stage.TCP: MET,
        Stage.TLS: FAILED,
        Stage.CERTIFICATE: WAITING,
        Stage.KE: WAITING,
        Stage.COOKIES: WAITING,
        Stage.NTP_KE_COOKIE: WAITING,
        Stage.NTP_NTP_COOKIE: WAITING,
        Stage.OFFSET: WAITING,
    }
    assert found[Stage.TLS].detail == f"{OTHER}: not TLS"
    await rounds(server, good(), good(OTHER))
    assert {row.status for row in (await stages(registry, server)).values()} == {MET}
    assert {row.detail for row in (await stages(registry, server)).values()} == {""}


async def test_a_stage_says_since_when_it_is_so(registry, rounds):
    server = await registry.server(state=S.VERIFIED)
    await rounds(server, bad(Stage.TLS, detail="one thing"))
    first = registry.clock
    await rounds(server, bad(Stage.TLS, detail="another"))
    found = (await stages(registry, server))[Stage.TLS]
    assert (found.since, found.detail) == (first, f"{ONE}: another")
    await rounds(server, good())
    assert (await stages(registry, server))[Stage.TLS].since == registry.clock
    assert (await stages(registry, server))[Stage.TCP].since == first


async def test_a_long_detail_fits_its_column(registry, rounds):
    server = await registry.server(state=S.VERIFIED)
    await rounds(server, bad(Stage.TLS, detail="x" * 5000))
    assert len((await stages(registry, server))[Stage.TLS].detail) == 300


async def crowd(registry, count):
    """So many ACTIVE servers; their ids."""
    return [
        await registry.server(f"s{number}", f"198.18.{number}.1", state=S.ACTIVE)
        for number in range(1, count + 1)
    ]


async def fail(rounds, server, address, times=3):
    for _ in range(times):
        state = await rounds(server, bad(Stage.NTP_KE_COOKIE, address, "no answer"))
    return state


async def test_a_low_score_suspends_while_enough_others_serve_and_a_good_one_lifts_it(registry, rounds):
    size = registry.settings.policy.opening_size
    first, second, *_ = await crowd(registry, size + 1)
    assert await fail(rounds, first, "198.18.1.1") is S.SUSPENDED
    (hold,) = (await registry.get(first)).holds
    assert (hold.kind, hold.lifted_at) == (HoldKind.SCORE, None)
    assert "ntp-ke-cookie: 198.18.1.1: no answer" in hold.reason
    assert await fail(rounds, second, "198.18.2.1") is S.ACTIVE, "the pool keeps its opening size"
    assert (await registry.get(second)).holds == []
    state, probes = S.SUSPENDED, 0
    while state is S.SUSPENDED:
        state, probes = await rounds(first, good("198.18.1.1")), probes + 1
        assert probes < 100
    found = await registry.get(first)
    assert found.addresses[0].score >= scoring.CUTOFF
    assert found.holds[0].lifted_at == registry.clock
    assert await fail(rounds, second, "198.18.2.1", 1) is S.SUSPENDED, "now there are enough again"


async def test_of_a_small_pool_not_much_falls_at_once(registry, rounds):
    """Of nine two may within ten minutes, and a third one later."""
    ids = await crowd(registry, 9)
    assert await fail(rounds, ids[0], "198.18.1.1") is S.SUSPENDED
    assert await fail(rounds, ids[1], "198.18.2.1", 3) is S.SUSPENDED
    assert await fail(rounds, ids[2], "198.18.3.1", 3) is S.ACTIVE
    registry.clock += timedelta(minutes=11)
    assert await fail(rounds, ids[2], "198.18.3.1", 1) is S.SUSPENDED


async def test_servers_that_are_kept_for_want_of_others_are_counted(registry, rounds):
    """The pool's alarm: failing, and listed all the same."""

    async def kept():
        async with registry.database.transaction() as session:
            return await count_kept_low(session)

    ids = await crowd(registry, 2)
    assert await kept() == 0
    assert await fail(rounds, ids[0], "198.18.1.1") is S.ACTIVE
    assert await kept() == 1


async def test_a_good_score_lifts_no_hold_of_another_kind(registry, rounds):
    server = await registry.server(state=S.SUSPENDED)
    assert await rounds(server, good()) is S.SUSPENDED
    assert [hold.lifted_at for hold in (await registry.get(server)).holds] == [None]


async def test_a_failing_address_is_withdrawn_alone_and_comes_back(registry, rounds):
    registry.settings = registry.settings.model_copy(
        update={"policy": registry.settings.policy.model_copy(update={"opening_size": 1})}
    )
    await crowd(registry, 3)
    server = await registry.server("alice", ONE, OTHER, state=S.ACTIVE)
    for _ in range(3):
        assert await rounds(server, good(), bad(address=OTHER)) is S.ACTIVE
    assert servers.published_addresses(await registry.get(server)) == [ONE]
    for _ in range(60):
        await rounds(server, good(), good(OTHER))
    assert servers.published_addresses(await registry.get(server)) == [ONE, OTHER]


async def test_an_address_proved_after_the_admission_is_admitted_by_itself(registry, rounds):
    server = await registry.server("alice", ONE, OTHER, state=S.ACTIVE)
    async with registry.database.transaction() as session:
        await session.execute(update(Address).where(Address.address == OTHER).values(score=None))
    for _ in range(3):
        await rounds(server, good(), good(OTHER))
    found = {row.address: row.score for row in (await registry.get(server)).addresses}
    assert found[OTHER] == scoring.ADMITTED


async def changed_its_address(registry, state):
    """A server whose only scored address was exchanged for one that was proved and never probed."""
    server = await registry.server("alice", OTHER, state=state)
    async with registry.database.transaction() as session:
        await session.execute(update(Address).values(score=None))
    for number in range(5):
        await registry.server(f"s{number}", f"198.18.7.{number + 1}", state=S.ACTIVE)
    return server


async def test_a_server_that_moves_to_a_dead_address_is_suspended_by_the_first_probe(registry, rounds):
    server = await changed_its_address(registry, S.ACTIVE)
    assert await rounds(server, bad(Stage.NTP_KE_COOKIE, OTHER)) is S.SUSPENDED
    (why,) = [reason for kind, _, reason in await reasons(registry, server) if kind == "hold-set"]
    assert why.startswith("score: no address is admitted yet, ntp-ke-cookie")


async def test_no_failed_probe_of_a_new_address_lifts_the_hold_of_an_old_score(registry, rounds):
    server = await changed_its_address(registry, S.ACTIVE)
    async with registry.change(server) as (session, row):
        await servers.set_hold(session, row, HoldKind.SCORE, reason="", actor="test", now=NOW)
    for _ in range(10):
        assert await rounds(server, bad(address=OTHER)) is S.SUSPENDED
    states = [await rounds(server, good(OTHER)) for _ in range(3)]
    assert states == [S.SUSPENDED, S.SUSPENDED, S.ACTIVE]


@pytest.mark.parametrize("state", [S.REGISTERED, S.LEAVING, S.REMOVED])
async def test_probes_of_a_server_that_is_out_of_the_answer_change_nothing(registry, rounds, state):
    server = await registry.server(state=state)
    await issue(registry, server)
    for _ in range(4):
        assert await rounds(server, good()) is state
    found = await registry.get(server)
    assert found.probe_due_at is None
    assert await stages(registry, server) == {}


async def test_a_result_for_an_address_that_is_gone_is_ignored(registry, rounds):
    server = await registry.server(state=S.CERTIFIED)
    await issue(registry, server)
    for _ in range(4):
        assert await rounds(server, good("198.18.9.9")) is S.CERTIFIED
    assert (await registry.get(server)).addresses[0].full_probes == 0


async def test_a_probe_goes_to_the_proved_addresses_once_there_is_a_certificate(registry, tuned, tmp_path):
    """Nothing listens on the port: the round is recorded as a failure of the first stage."""
    registry.settings = tuned(ports={"ke": free_port()})
    server = await registry.server("alice", "127.0.0.1", state=S.VERIFIED)
    roots = x509.load_pem_x509_certificates(Authority(tmp_path / "authority").root.read_bytes())

    async def probe():
        await monitoring.probe_server(registry.database, registry.settings, roots, server, NOW, Rounds(0))
        return await stages(registry, server)

    assert await probe() == {}, "there is no certificate to be seen yet"
    await issue(registry, server)
    assert (await probe())[Stage.TCP].status is FAILED
    assert (await registry.get(server)).probe_due_at > NOW


async def test_a_kiss_code_of_control_characters_is_scored_on_both_databases(registry, rounds):
    """PostgreSQL refuses NUL: a member could have frozen its score with one."""
    server = await registry.server(state=S.ACTIVE)
    await issue(registry, server)
    hostile = replace(good(), kiss="\0XYZ", offset=None, failed=Stage.NTP_KE_COOKIE, detail="kiss \0XYZ")
    before = (await registry.get(server)).addresses[0].score
    await rounds(server, hostile)
    assert (await registry.get(server)).addresses[0].score < before


async def test_a_probe_that_fails_for_want_of_descriptors_is_no_members_fault(settings):
    """Idle connections of strangers can use up the registry's descriptors; members must not pay for it."""
    trust, guard = Trust.of(load_roots(None), NOW), Guard(settings)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(ProbeImpossible):
            await probe(
                "alice.servers.pool.example", "127.0.0.1", 9, trust, own_addresses=frozenset(), guard=guard
            )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


EXPIRED = bad(Stage.CERTIFICATE, detail="the certificate has expired")
DAYS_90 = timedelta(days=90)


async def test_an_ended_certificate_suspends_even_the_last_server_until_a_valid_one_is_seen(registry, rounds):
    server = await registry.server(state=S.ACTIVE)
    await issue(registry, server, not_after=NOW + timedelta(minutes=2))
    assert await rounds(server, bad(Stage.CERTIFICATE)) is S.ACTIVE, (
        "it has not ended yet: that is for the score"
    )
    assert await rounds(server, EXPIRED) is S.SUSPENDED
    (hold,) = (await registry.get(server)).holds
    assert (hold.kind, hold.reason) == (
        HoldKind.CERTIFICATE,
        "the newest certificate ended on 2026-03-01 12:02 UTC",
    )
    assert ("hold-set", "worker") in [entry[:2] for entry in await reasons(registry, server)]
    await issue(registry, server, STRANGERS, not_after=NOW + DAYS_90)
    assert await rounds(server, EXPIRED) is S.SUSPENDED, "the new one is not served yet"
    assert await rounds(server, good(fingerprint="0c" * 32)) is S.SUSPENDED, "nobody ordered that one"
    assert await rounds(server, good(fingerprint=STRANGERS)) is S.ACTIVE
    async with registry.database.transaction() as session:
        told = list(await session.scalars(select(Notice.kind).order_by(Notice.id)))
    assert told[-3:] == [NoticeKind.SUSPENDED, NoticeKind.CERTIFICATE_NOT_ORDERED, NoticeKind.RECOVERED]


async def test_a_server_that_was_long_without_a_certificate_earns_its_score_before_it_is_back(
    registry, rounds
):
    for number in range(1, 7):
        await registry.server(f"s{number}", f"198.18.2.{number}", state=S.ACTIVE)
    server = await registry.server(state=S.ACTIVE)
    await issue(registry, server, not_after=NOW)
    for _ in range(5):
        assert await rounds(server, EXPIRED) is S.SUSPENDED
    await issue(registry, server, STRANGERS, not_after=NOW + DAYS_90)
    assert await rounds(server, good(fingerprint=STRANGERS)) is S.SUSPENDED
    kinds = {hold.kind: hold.lifted_at is None for hold in (await registry.get(server)).holds}
    assert kinds == {HoldKind.CERTIFICATE: False, HoldKind.SCORE: True}
    for _ in range(60):
        state = await rounds(server, good(fingerprint=STRANGERS))
    assert state is S.ACTIVE


async def test_of_a_server_without_an_agent_any_valid_certificate_lifts_the_hold(registry, rounds):
    server = await registry.server(state=S.ACTIVE, agentless=True)
    ends = int((NOW + timedelta(minutes=2)).timestamp())
    assert await rounds(server, good(not_before=ends - 600, not_after=ends)) is S.ACTIVE
    assert await rounds(server, EXPIRED) is S.SUSPENDED
    later = good(fingerprint=STRANGERS, not_before=ends, not_after=ends + 7_000_000)
    assert await rounds(server, later) is S.ACTIVE


async def test_a_hold_for_a_certificate_does_not_outlive_it_while_a_server_is_admitted(registry, rounds):
    server = await registry.server(state=S.VERIFIED)
    await issue(registry, server, not_after=NOW + DAYS_90)
    async with registry.change(server) as (session, row):
        await servers.set_hold(session, row, HoldKind.CERTIFICATE, reason="r", actor="worker", now=NOW)
    for _ in range(3):
        state = await rounds(server, good())
    assert state is S.ACTIVE
