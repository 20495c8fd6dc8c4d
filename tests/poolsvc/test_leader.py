"""Who publishes: one leader at a time, its fence, and who comes after it."""

import asyncio
import os
import signal
from datetime import UTC, datetime, timedelta

import dns.message
import dns.query
import dns.tsig
import dns.update
import pytest
from sqlalchemy import event, update

from lab import mmdb
from lab.processes import Process, free_port, wait_until
from lab.programs import script
from nts_core.control import ServerState
from poolsvc import leases, plans, recovery
from poolsvc.config import GeoSettings
from poolsvc.db import Database
from poolsvc.leader import FROZEN, Leader
from poolsvc.models import Server
from poolsvc.pool import the_pool

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
FENCE = "_fence.pool.example."
# Seconds on a machine with nothing else to do; ten times that on one that is busy.
_TAKE_OVER = 60.0


def ask(knot, owner, kind):
    query = dns.message.make_query(owner, kind)
    answer = dns.query.udp(query, knot.address, timeout=5, port=knot.port)
    return [rdata.to_text().strip('"') for rrset in answer.answer for rdata in rrset]


def address(knot, name):
    return ask(knot, f"{name}.servers.pool.example.", "A")


def set_fence(knot, epoch):
    """As another registry would take the zone."""
    by_hand(knot, FENCE, "TXT", str(epoch), ttl=0)


def by_hand(knot, owner, kind, text, ttl=2):
    key = dns.tsig.Key(knot.tsig_name, knot.tsig_secret, "hmac-sha256")
    message = dns.update.UpdateMessage("pool.example.", keyring=key)
    message.replace(owner, ttl, kind, text)
    assert dns.query.tcp(message, knot.address, timeout=5, port=knot.port).rcode() == 0


class World:
    def __init__(self, registry, knot):
        self.registry, self.database, self.knot = registry, registry.database, knot
        self.now = NOW

    def leader(self, holder, database=None):
        return Leader(database or self.database, self.registry.settings, holder)

    async def step(self, leader, seconds=1):
        self.now += timedelta(seconds=seconds)
        return await leader.step(self.now)

    async def epoch(self):
        async with self.database.transaction() as session:
            return (await the_pool(session, self.registry.settings)).epoch

    async def verified(self, name, address):
        return await self.registry.server(name, address, state=ServerState.VERIFIED)


def seen(epoch):
    """What an operator saw of a zone with this epoch."""
    return plans.Outlook(NOW, epoch, (), (), {})


@pytest.fixture
async def world(database, knot, published_by, registry_of):
    registry = registry_of(database, published_by(step_retry=10))
    await registry.open_account()
    return World(registry, knot)


async def test_a_file_of_networks_that_is_missing_is_an_alarm_and_stops_nothing(world, tmp_path):
    geo = GeoSettings(database=(tmp_path / "networks.mmdb",))
    world.registry.settings = world.registry.settings.model_copy(update={"geo": geo})
    leader = world.leader("one")
    await world.verified("alice", "192.0.2.1")
    await world.step(leader)
    assert address(world.knot, "alice") == ["192.0.2.1"]
    assert leader.alarm is None
    assert leader.geo_alarm == "networks.mmdb: there is no such file"
    mmdb.write(tmp_path / "networks.mmdb", {"192.0.2.0/24": {"asn": "AS64500"}})
    await world.step(leader, world.registry.settings.policy.full_pass_interval)
    assert leader.geo_alarm is None
    (text,) = ask(world.knot, "alice.servers.pool.example.", "TXT")
    assert text.endswith(" as=64500")


async def test_one_leads_and_publishes_and_the_other_one_follows(world):
    first, second = world.leader("one"), world.leader("two")
    await world.verified("alice", "192.0.2.1")
    await world.step(first)
    await world.step(second)
    assert address(world.knot, "alice") == ["192.0.2.1"]
    assert ask(world.knot, FENCE, "TXT") == [str(await world.epoch())]
    await world.verified("bob", "192.0.2.2")
    await world.step(second)
    assert address(world.knot, "bob") == []
    await world.step(first)
    assert address(world.knot, "bob") == ["192.0.2.2"]
    assert (first.alarm, second.alarm) == (None, None), "to follow is no fault"


async def test_a_leader_that_stops_is_followed_at_once_and_under_a_higher_epoch(world):
    first, second = world.leader("one"), world.leader("two")
    await world.step(first)
    before = await world.epoch()
    await first.stop()
    await world.verified("alice", "192.0.2.1")
    await world.step(second)
    assert address(world.knot, "alice") == ["192.0.2.1"]
    assert await world.epoch() > before
    await world.step(first)
    assert ask(world.knot, FENCE, "TXT") == [str(await world.epoch())]


async def test_a_leader_that_slept_over_its_lease_writes_nothing_and_knows_nothing_any_more(world):
    """What it knew of the zone is what was there before its successor."""
    first, second = world.leader("one"), world.leader("two")
    await world.verified("alice", "192.0.2.1")
    await world.step(first)
    await leases.release(world.database, first._held)
    first._held = leases.Held("publisher", "one", first._held.epoch, asyncio.get_running_loop().time())
    await world.step(second)
    epoch = await world.epoch()
    await world.verified("bob", "192.0.2.2")
    await world.step(first)
    assert address(world.knot, "bob") == []
    assert (first._publication, first._epoch) == (None, None)
    await world.step(second)
    assert address(world.knot, "bob") == ["192.0.2.2"]
    assert ask(world.knot, FENCE, "TXT") == [str(epoch)]


async def test_a_leader_that_another_process_of_its_database_fenced_comes_back_above_it(world):
    leader = world.leader("one")
    await world.step(leader)
    await recovery.thaw(world.database, world.registry.settings, seen(9), NOW)
    set_fence(world.knot, 9)
    await world.verified("alice", "192.0.2.1")
    await world.step(leader)
    assert address(world.knot, "alice") == []
    assert "epoch is 9" in leader.alarm
    assert await leases.acquire(world.database, "publisher", "anybody", timedelta(0)), "the lease is free"
    await world.step(leader, 1)
    assert ask(world.knot, FENCE, "TXT") == ["9"], "not at once: two that fight would never stop"
    await world.step(leader, 10)
    assert address(world.knot, "alice") == ["192.0.2.1"]
    assert leader.alarm is None
    assert ask(world.knot, FENCE, "TXT") == ["10"]


async def test_a_zone_of_another_registry_is_left_alone_until_an_operator_has_decided(world):
    """A database restored from a copy, or two registries with one zone: neither takes it from the other by itself."""
    set_fence(world.knot, 57)
    await world.verified("alice", "192.0.2.1")
    leaders = [world.leader("one"), world.leader("two")]
    await world.step(leaders[0], 10)
    assert "epoch is 57, and this database never gave more than 0" in leaders[0].alarm
    for _ in range(80):
        for leader in leaders:
            await world.step(leader, 10)
    assert ask(world.knot, FENCE, "TXT") == ["57"]
    assert address(world.knot, "alice") == []
    assert await world.epoch() == 0, (
        "however often it is tried, its own epochs do not climb up to the other's"
    )
    assert FROZEN in {leader.alarm for leader in leaders}
    outlook = await plans.look(world.database, world.registry.settings, world.now)
    assert (outlook.epoch, len(outlook.changes)) == (57, 4)
    await recovery.thaw(world.database, world.registry.settings, outlook, NOW)
    for leader in leaders:
        await world.step(leader, 10)
    assert address(world.knot, "alice") == ["192.0.2.1"]
    assert int(ask(world.knot, FENCE, "TXT")[0]) > 57
    assert {leader.alarm for leader in leaders} == {None}


async def test_a_thaw_that_comes_late_leaves_the_registry_frozen_out(world):
    """The other registry went on after the operator had looked: its epoch is above what was confirmed."""
    set_fence(world.knot, 57)
    leader = world.leader("one")
    await world.step(leader, 10)
    set_fence(world.knot, 60)
    await recovery.thaw(world.database, world.registry.settings, seen(57), NOW)
    await world.step(leader, 10)
    assert "epoch is 60" in leader.alarm
    assert ask(world.knot, FENCE, "TXT") == ["60"]


async def test_a_dead_primary_is_an_alarm_and_the_lease_is_kept(world):
    leader, other = world.leader("one"), world.leader("two")
    await world.step(leader)
    world.knot.stop()
    await world.verified("alice", "192.0.2.1")
    await world.step(leader)
    assert leader.alarm
    await world.step(other)
    assert other.alarm is None
    world.knot.start()
    await world.step(leader, 10)
    assert address(world.knot, "alice") == ["192.0.2.1"]
    assert leader.alarm is None


async def test_a_hand_on_the_zone_is_told_for_an_hour_and_counted(world):
    leader = world.leader("one")
    await world.verified("alice", "192.0.2.1")
    await world.step(leader)
    assert (leader.drifted, list(leader.warnings(world.now))) == (0, [])
    by_hand(world.knot, "alice.servers.pool.example.", "A", "198.51.100.9")
    await world.step(leader, 60)
    assert address(world.knot, "alice") == ["192.0.2.1"]
    (text,) = leader.warnings(world.now + timedelta(minutes=59))
    assert "somebody else changed alice.servers.pool.example. A" in text
    assert (leader.drifted, leader.alarm) == (1, None)
    assert list(leader.warnings(world.now + timedelta(minutes=61))) == []


async def test_what_waits_for_a_word_is_an_alarm_with_the_command(world):
    leader = world.leader("one")
    for number in range(1, 11):
        await world.verified(f"s{number}", f"192.0.2.{number}")
    await world.step(leader)
    async with world.database.transaction() as session:
        await session.execute(update(Server).values(state=ServerState.REGISTERED))
    await world.step(leader, 601)
    assert address(world.knot, "s1") == ["192.0.2.1"]
    (text,) = leader.warnings(world.now)
    assert text.startswith("30 records would be deleted and 0 replaced, of 31: ")
    assert text.endswith(f"`poolsvc zone apply --plan {leader.question.checksum}`")
    async with world.database.transaction() as session:
        await plans.approve(session, leader.question, world.now)
    await world.step(leader)
    assert address(world.knot, "s1") == []
    assert list(leader.warnings(world.now)) == []


async def test_between_two_full_looks_only_the_outbox_is_asked(database, knot, published_by, registry_of):
    """And what is found there is published at once."""
    registry = registry_of(database, published_by(tick=60))
    await registry.open_account()
    world = World(registry, knot)
    leader, other = world.leader("one"), world.leader("two")
    await world.step(leader)
    await world.step(other)
    statements = []
    event.listen(
        database.engine.sync_engine, "before_cursor_execute", lambda *args: statements.append(args[2])
    )
    await world.step(leader)
    await world.step(other)
    assert [text for text in statements if "FROM" in text] == [
        text for text in statements if "zone_changes" in text
    ]
    assert len([text for text in statements if "zone_changes" in text]) == 1
    await world.verified("alice", "192.0.2.1")
    await world.step(leader)
    assert address(knot, "alice") == ["192.0.2.1"]


async def test_without_an_account_the_outbox_is_looked_at_once_a_tick(
    database, knot, published_by, registry_of
):
    """Not ten times a second for as long as there is none."""
    registry = registry_of(database, published_by(tick=60))
    world = World(registry, knot)
    leader = world.leader("one")
    await world.verified("alice", "192.0.2.1")
    await world.step(leader)
    statements = []
    event.listen(
        database.engine.sync_engine, "before_cursor_execute", lambda *args: statements.append(args[2])
    )
    await world.step(leader)
    assert statements == []
    await registry.open_account()
    await world.step(leader, 60)
    assert address(knot, "alice") == ["192.0.2.1"]


async def test_a_nameserver_that_is_a_moment_late_is_no_alarm_and_holds_nothing_up(
    database, knot, published_by, registry_of
):
    endpoint, silent = f"{knot.address}:{knot.port}", f"127.0.0.1:{free_port()}"
    registry = registry_of(database, published_by(dns={"nameservers": (endpoint, silent)}))
    await registry.open_account()
    world = World(registry, knot)
    leader = world.leader("one")
    await world.verified("alice", "192.0.2.1")
    await world.step(leader)
    assert leader.alarm is None
    await world.verified("bob", "192.0.2.2")
    await world.step(leader)
    assert address(knot, "bob") == ["192.0.2.2"]
    await world.step(leader, 30)
    assert leader.alarm == "not every authoritative server shows the zone"


CONFIG = """\
pool = "pool.example"
database = "{database}"
listen = ["127.0.0.1:{port}"]
allow_private_addresses = true

[dns]
primary = "{dns}"
tsig_name = "{tsig_name}"
tsig_secret_file = "tsig.secret"
nameservers = ["{dns}"]
address_ttl = 2

[ca]
directory_url = "https://127.0.0.1:{nothing}/dir"
caa_identity = "ca.example"
account_key_file = "account.pem"
"""


def worker_process(knot, directory, database, nothing):
    directory.mkdir()
    (directory / "tsig.secret").write_text(knot.tsig_secret)
    port = free_port()
    config = directory / "poolsvc.toml"
    config.write_text(
        CONFIG.format(
            database=database,
            port=port,
            dns=f"{knot.address}:{knot.port}",
            tsig_name=knot.tsig_name,
            nothing=nothing,
        )
    )
    argv = [script("poolsvc"), "serve", "--role", "worker", "--config", str(config)]
    return Process(directory.name, argv, directory)


def test_a_killed_leader_is_followed_within_seconds(
    knot, postgresql_url, published_by, tmp_path, registry_of
):
    """Two real processes at one PostgreSQL, with the lives and intervals of a real pool."""
    nothing = free_port()  # where both look for the CA
    settings = published_by(ca={"directory_url": f"https://127.0.0.1:{nothing}/dir"})

    def in_registry(work):
        async def run():
            database = Database(postgresql_url)
            try:
                return await work(registry_of(database, settings))
            finally:
                await database.close()

        return asyncio.run(run())

    async def add_alice(registry):
        # A worker with a clock of today would withdraw an address that was confirmed months ago.
        registry.now = datetime.now(UTC)
        await registry.server("alice", "127.0.0.1", state=ServerState.VERIFIED)

    in_registry(lambda registry: registry.open_account())
    first, second = (
        worker_process(knot, tmp_path / name, postgresql_url, nothing) for name in ("first", "second")
    )
    with first, second:
        first.start(lambda: ask(knot, FENCE, "TXT"))
        second.start()
        wait_until(lambda: "lease_epoch" in first.output(), "the first one leads")
        epoch = int(ask(knot, FENCE, "TXT")[0])
        os.kill(first.pid, signal.SIGKILL)
        in_registry(add_alice)
        wait_until(lambda: address(knot, "alice"), "the second one publishes", _TAKE_OVER)
        assert int(ask(knot, FENCE, "TXT")[0]) > epoch
        first.wait()
