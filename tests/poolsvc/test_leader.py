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

from lab.processes import Process, free_port, wait_until
from lab.programs import script
from nts_core.control import ServerState
from poolsvc import leases, recovery
from poolsvc.db import Database
from poolsvc.leader import FROZEN, Leader
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
    key = dns.tsig.Key(knot.tsig_name, knot.tsig_secret, "hmac-sha256")
    message = dns.update.UpdateMessage("pool.example.", keyring=key)
    message.replace(FENCE, 0, "TXT", str(epoch))
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
    return recovery.Outlook(NOW, epoch, (), (), {})


@pytest.fixture
async def world(database, knot, published_by, registry_of):
    registry = registry_of(database, published_by(step_retry=10))
    await registry.open_account()
    return World(registry, knot)


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
    outlook = await recovery.look(world.database, world.registry.settings, world.now)
    assert (outlook.epoch, len(outlook.changes)) == (57, 3)
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
