"""Which rounds of the registry's own monitor count: by its own check, and by whether nearly everybody is silent to it."""

import asyncio
import json
import time
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select

from lab.certificates import Authority
from lab.namespaces import in_namespace
from lab.nts_server import NtsServer
from lab.processes import free_port
from nts_core.client import load_roots
from nts_core.control import ProbeResult, ServerState, Stage, StageStatus
from poolsvc import monitoring, monitors, scoring, servers
from poolsvc.config import ConfigError, OwnMonitorSettings, load_settings
from poolsvc.db import Database
from poolsvc.derived import RegistryKey
from poolsvc.local_check import LocalCheck
from poolsvc.models import Order, OrderStatus, SampleRecord
from poolsvc.monitor.soundness import Soundness
from poolsvc.rounds import MAX_WAITING, Round, Rounds
from poolsvc.worker import Health, Worker

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
S = ServerState
WINDOW = 60.0
MS = 1_000_000
HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
OTHERS = ("127.0.0.4", "127.0.0.5", "127.0.0.6")
OURS = "0a" * 32


def v4(number):
    return f"198.18.{number}.1"


def v6(number):
    return f"fd00::{number}"


def answer(address):
    return ProbeResult(
        address, None, "", offset=0, delay=1000, stratum=2, leap=0, asked=2, cookies=2, fingerprint=OURS
    )


def silence(address):
    return ProbeResult(address, Stage.TCP, "no answer", is_silent=True)


def add(rounds, server, now, *results, good=True):
    begun = rounds.begin(server, NOW + timedelta(seconds=now), now)
    addresses = frozenset(result.address for result in results) if good else frozenset()
    rounds.add(Round(begun, now + 5, results, addresses))


def ready(rounds, now):
    return {one.begun.server_id: [result.address for result in one.results] for one in rounds.ready(now)}


def verdict(*, ipv4=True, ipv6=True):
    return Soundness(ipv4 or ipv6, "", ipv4, ipv6, 3, 3)


# Silence of nearly everybody


def test_when_all_are_silent_at_once_nothing_is_said_of_any():
    rounds = Rounds(WINDOW)
    for number in range(6):
        add(rounds, number, number * 10.0, answer(v4(number)))
        assert ready(rounds, number * 10.0 + 5) == {number: [v4(number)]}, "an answer waits for nobody"
    for number in range(6):
        add(rounds, number, 60 + number * 10.0, silence(v4(number)))
        assert ready(rounds, 65 + number * 10.0) == {}
    assert rounds.fault.startswith("6 of 6 good servers were silent at once by IPv4")
    for second in range(120, 200):
        assert ready(rounds, float(second)) == {}
    assert rounds.waiting == 0
    assert ready(rounds, 400.0) == {}
    assert rounds.fault is None


def test_silence_that_ends_while_it_is_waited_for_is_the_networks_to_the_last():
    rounds = Rounds(WINDOW)
    for number in range(6):
        add(rounds, number, number * 10.0, silence(v4(number)))
    for number in range(6):
        add(rounds, number, 60 + number * 10.0, answer(v4(number)))
        assert ready(rounds, 65 + number * 10.0) == {number: [v4(number)]}


def test_of_one_that_is_silent_it_is_said_once_the_others_have_answered():
    rounds = Rounds(WINDOW)
    for number in range(6):
        result = silence if number == 2 else answer
        add(rounds, number, number * 10.0, result(v4(number)))
    assert set(ready(rounds, 60.0)) == {0, 1, 3, 4, 5}
    assert (2 in rounds, rounds.fault) == (True, None)
    assert ready(rounds, 20 + 5 + WINDOW) == {2: [v4(2)]}


@pytest.mark.parametrize(
    ("silent", "total", "is_ours"), [(2, 2, False), (2, 3, False), (3, 6, False), (4, 6, True)]
)
def test_it_takes_more_than_half_and_at_least_three(silent, total, is_ours):
    rounds = Rounds(WINDOW)
    for number in range(total):
        add(rounds, number, 0.0, (silence if number < silent else answer)(v4(number)))
    counted = ready(rounds, 5 + WINDOW)
    assert (rounds.fault is not None) is is_ours
    assert len(counted) == (total - silent if is_ours else total)


def test_a_process_that_begins_in_an_outage_waits_before_it_blames_the_first():
    rounds = Rounds(WINDOW)
    add(rounds, 1, 0.0, silence(v4(1)))
    assert ready(rounds, 5.0) == {}
    for number in range(2, 5):
        add(rounds, number, number * 10.0, silence(v4(number)))
    assert ready(rounds, 5 + WINDOW) == {}
    assert 1 not in rounds


def test_of_two_servers_it_is_said_that_they_are_silent():
    rounds = Rounds(WINDOW)
    for number in (1, 2):
        add(rounds, number, 0.0, silence(v4(number)))
    assert set(ready(rounds, 5 + WINDOW)) == {1, 2}


def test_each_family_is_judged_by_itself():
    rounds = Rounds(WINDOW)
    for number in range(4):
        add(rounds, number, 0.0, answer(v4(number)), silence(v6(number)))
    assert ready(rounds, 10.0) == {}
    assert ready(rounds, 5 + WINDOW) == {number: [v4(number)] for number in range(4)}
    assert "IPv6" in rounds.fault
    assert "IPv4" not in rounds.fault


def test_who_was_bad_before_says_nothing_of_the_network():
    rounds = Rounds(WINDOW)
    for number in range(6):
        add(rounds, number, 0.0, silence(v4(number)), good=False)
    assert set(ready(rounds, 5.0)) == set(range(6))
    assert rounds.fault is None


def test_no_more_than_so_many_wait():
    rounds = Rounds(WINDOW, is_checked=True)
    rounds.check(verdict(), 0.0)
    for number in range(MAX_WAITING + 5):
        add(rounds, number, 1.0, answer(v4(1)))
    assert rounds.waiting == MAX_WAITING
    assert 0 not in rounds


# The local check


def test_a_round_counts_between_two_good_checks():
    rounds = Rounds(WINDOW, is_checked=True)
    assert not rounds.may_look(4), "nothing is known yet"
    rounds.check(verdict(), 0.0)
    assert rounds.may_look(4)
    add(rounds, 1, 10.0, answer(v4(1)), answer(v6(1)))
    assert ready(rounds, 100.0) == {}
    rounds.check(verdict(), 14.0)
    assert ready(rounds, 101.0) == {}, "it began before the round had ended"
    rounds.check(verdict(), 15.0)
    assert ready(rounds, 102.0) == {1: [v4(1), v6(1)]}


@pytest.mark.parametrize("bad", [verdict(ipv4=False, ipv6=False), verdict(ipv4=False)])
def test_a_bad_check_after_a_round_or_within_it_drops_it(bad):
    rounds = Rounds(WINDOW, is_checked=True)
    rounds.check(verdict(), 0.0)
    add(rounds, 1, 10.0, answer(v4(1)))
    rounds.check(bad, 12.0)
    assert not rounds.may_look(4)
    rounds.check(verdict(), 20.0)
    assert ready(rounds, 21.0) == {}
    assert rounds.waiting == 0


def test_a_family_whose_check_fails_is_left_out_of_the_round():
    rounds = Rounds(WINDOW, is_checked=True)
    rounds.check(verdict(), 0.0)
    add(rounds, 1, 10.0, answer(v4(1)), answer(v6(1)))
    rounds.check(verdict(ipv6=False), 20.0)
    assert ready(rounds, 20.0) == {1: [v4(1)]}
    assert (rounds.sees(4), rounds.sees(6)) == (True, False)


@pytest.mark.parametrize(
    "references",
    [["ntp:a"], ["ntp:a", "ntp:b", "nts:b"], ["ntp:a", "ntp:b", "http:c"], [f"ntp:h{n}" for n in range(17)]],
)
def test_references_that_cannot_judge_are_refused(tmp_path, references):
    file = tmp_path / "registry.toml"
    ca = '[ca]\ndirectory_url = "https://ca.example"\ncaa_identity = "ca.example"\naccount_key_file = "k"\n'
    listen = '[dns.embedded]\nlisten = ["127.0.0.1:5300"]\n'
    head = f'pool = "pool.example"\n{ca}{listen}'
    file.write_text(head)
    assert load_settings(file).monitor.references == ()
    file.write_text(f"{head}[monitor]\nreferences = {json.dumps(references)}\n")
    with pytest.raises(ConfigError, match=r"monitor\.references"):
        load_settings(file)


# In the registry


async def issue(registry, *ids):
    async with registry.database.transaction() as session:
        for server_id in ids:
            values = {"created_at": NOW, "fingerprint": OURS, "chain": "PEM"}
            session.add(Order(server_id=server_id, status=OrderStatus.ISSUED, **values))


async def own(registry):
    async with registry.database.transaction() as session:
        return await monitors.inner(session)


class Minutes:
    """The registry's own monitor as a worker has it: each server is looked at once a minute."""

    def __init__(self, registry, ids):
        self.registry, self.ids = registry, ids
        self.rounds = Rounds(WINDOW)
        self.seconds = 0.0

    async def pass_by(self, *silent):
        """One minute in which these are silent, by their place."""
        for place, server in enumerate(self.ids, 1):
            found = await self.registry.get(server)
            if server not in self.rounds:
                result = silence if place in silent else answer
                add(
                    self.rounds,
                    server,
                    self.seconds,
                    result(v4(place)),
                    good=found.state is S.ACTIVE and scoring.is_good(found.addresses[0].score),
                )
            self.seconds += 60 / len(self.ids)
            await monitoring.settle(self.registry.database, self.registry.settings, self.rounds, self.seconds)

    async def states(self):
        return [(await self.registry.get(server)).state for server in self.ids]


@pytest.fixture
async def minutes(registry):
    ids = [await registry.server(f"s{number}", v4(number), state=S.ACTIVE) for number in range(1, 7)]
    await issue(registry, *ids)
    return Minutes(registry, ids)


async def test_an_outage_of_the_registrys_own_network_takes_nobody_out(registry, minutes):
    await minutes.pass_by()
    scores = [(await registry.get(server)).addresses[0].score for server in minutes.ids]
    for _ in range(5):
        await minutes.pass_by(1, 2, 3, 4, 5, 6)
    assert await minutes.states() == [S.ACTIVE] * 6
    assert [(await registry.get(server)).addresses[0].score for server in minutes.ids] == scores
    assert "6 of 6" in minutes.rounds.fault
    for _ in range(4):
        await minutes.pass_by()
    assert minutes.rounds.fault is None
    assert await minutes.states() == [S.ACTIVE] * 6
    assert (await registry.get(minutes.ids[0])).addresses[0].score > scores[0]


async def test_one_server_that_is_silent_falls(minutes):
    await minutes.pass_by()
    for _ in range(3):
        await minutes.pass_by(2)
    assert await minutes.states() == [S.ACTIVE, S.SUSPENDED, *[S.ACTIVE] * 4]


def places(references):
    return tuple(f"ntp:{each.host}:{each.ntp_port}" for each in references)


@pytest.fixture
async def references(tmp_path):
    authority = Authority(tmp_path / "authority")
    found = [NtsServer(authority.issue(host), host) for host in (*HOSTS, *OTHERS)]
    for each in found:
        await each.start()
    yield found
    for each in found:
        await each.stop()


async def test_the_registry_checks_itself_and_with_a_wrong_clock_probes_nothing(registry, tuned, references):
    own_monitor = OwnMonitorSettings(references=places(references[:3]), check_interval=0.1)
    registry.settings = tuned(ports={"ke": free_port()}).model_copy(update={"monitor": own_monitor})
    roots = load_roots(None)
    server = await registry.server("alice", "127.0.0.1", state=S.VERIFIED)
    await issue(registry, server)
    local = LocalCheck(registry.database, registry.settings, roots)

    async def probe():
        await monitoring.probe_server(registry.database, registry.settings, roots, server, NOW, local.rounds)

    async def look():
        local._due_at = 0.0
        await local.look()
        await monitoring.settle(registry.database, registry.settings, local.rounds, time.monotonic())

    assert not local.may_probe
    await look()
    found = await own(registry)
    assert (found.sound, found.ipv4, found.ipv6, local.alarm) == (True, True, False, None)
    await probe()
    held = await registry.get(server)
    assert (held.stages, held.probe_due_at > NOW) == ([], True), "it waits for the next check"
    await look()
    held = await registry.get(server)
    assert {row.stage: row.status for row in held.stages}[Stage.TCP] is StageStatus.FAILED

    later = NOW + timedelta(minutes=1)
    await monitoring.probe_server(registry.database, registry.settings, roots, server, later, local.rounds)
    for each in references[:2]:
        each.offset = 30 * MS
    await look()
    found = await own(registry)
    assert (found.sound, local.may_probe) == (False, False)
    assert "1 of 3 references agree" in found.sound_detail
    assert "it probes nothing" in local.alarm
    async with registry.database.transaction() as session:
        assert not monitors.is_sound(found)
        assert len((await session.scalars(select(SampleRecord))).all()) == 1, "what waited is not recorded"

    health = Health()
    worker = Worker(registry.database, registry.settings, roots, health, RegistryKey(bytes(32)))
    await worker._check_locally(NOW)
    async with registry.change(server) as (_, row):
        row.probe_due_at = NOW
    await worker._probe(NOW + timedelta(hours=1))
    assert (await registry.get(server)).probe_due_at == NOW, "it is not even claimed"
    (alarm,) = health.alarms()
    assert alarm.startswith("registry: its own clock or network")


async def test_one_process_that_is_not_well_does_not_speak_for_another_one_that_is(
    registry, tuned, references
):
    def process(some):
        own_monitor = OwnMonitorSettings(references=places(some), check_interval=60)
        settings = tuned().model_copy(update={"monitor": own_monitor})
        return LocalCheck(registry.database, settings, load_roots(None))

    for each in references[3:]:
        each.offset = 30 * MS
    well, ill = process(references[:3]), process(references[3:])
    await ill.look()
    assert (await own(registry)).sound is False
    await well.look()
    ill._due_at = 0.0
    await ill.look()
    assert (await own(registry)).sound is True
    assert not ill.may_probe
    for each in references[:3]:
        each.offset = 30 * MS
    well._due_at = 0.0
    await well.look()
    assert (await own(registry)).sound is False


async def test_without_references_any_more_the_pools_own_is_believed_again(registry):
    async with registry.database.transaction() as session:
        (await monitors.inner(session)).sound = False
    await LocalCheck(registry.database, registry.settings, []).look()
    found = await own(registry)
    assert (found.sound, found.sound_detail) == (None, "")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_host_without_ipv6_probes_by_ipv4(registry, database_url):
    """In a network of its own that has IPv4 addresses alone."""
    server = await registry.server("alice", "198.18.0.1", "fd00::1", state=S.VERIFIED)
    await issue(registry, server)

    async def probe():
        database = Database(database_url)
        local = LocalCheck(database, registry.settings, [])
        await monitoring.probe_server(
            database, registry.settings, load_roots(None), server, NOW, local.rounds
        )
        await local.look()
        await database.close()

    await asyncio.to_thread(in_namespace, lambda: asyncio.run(probe()), ["198.18.0.1/32"])
    found = await registry.get(server)
    async with registry.database.transaction() as session:
        (probed,) = await session.scalars(select(SampleRecord.address_id))
    assert {row.id: row.address for row in found.addresses}[probed] == "198.18.0.1"
    eye = await own(registry)
    assert (eye.ipv4, eye.ipv6) == (True, False)
    assert found.probe_due_at == NOW + timedelta(seconds=registry.settings.policy.probe_interval)


async def test_what_no_quorum_can_see_keeps_nobody_out_and_is_not_published(registry):
    server = await registry.server("alice", v4(1), v6(1), state=S.VERIFIED)
    await issue(registry, server)

    async def look(minute, *results):
        async with registry.change(server) as (session, row):
            now = NOW + timedelta(minutes=minute)
            await monitoring.record(session, registry.settings, row, results, now)
        found = await registry.get(server)
        return found.state, {each.address: each for each in found.addresses}

    async def let_see(*, ipv6):
        async with registry.database.transaction() as session:
            (await monitors.inner(session)).ipv6 = ipv6

    await let_see(ipv6=True)
    for minute in range(1, 5):
        state, _ = await look(minute, answer(v4(1)))
    assert state is S.VERIFIED, "one that could be seen is waited for"
    await let_see(ipv6=False)
    state, _ = await look(5, answer(v4(1)))
    assert state is S.ACTIVE
    _, rows = await look(6, answer(v4(1)))
    assert rows[v6(1)].score is None
    assert rows[v6(1)].unknown == "0 of the 1 monitors that it takes have IPv6"
    assert servers.published_addresses(await registry.get(server)) == [v4(1)]
    async with registry.database.transaction() as session:
        standing = await monitors.council(session, registry.settings, NOW + timedelta(minutes=6))
        assert monitors.alarm(standing, await monitors.count_unknown(session)) is None
    await let_see(ipv6=True)
    for minute in range(7, 10):
        _, rows = await look(minute, answer(v4(1)), answer(v6(1)))
    assert (rows[v6(1)].score, rows[v6(1)].unknown) == (scoring.ADMITTED, None)
    assert len(servers.published_addresses(await registry.get(server))) == 2
