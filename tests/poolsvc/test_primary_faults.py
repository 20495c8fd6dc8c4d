"""Primaries that fail in every way, seen by everybody at every moment: nothing is lost, and no SRV is ever wrong."""

import asyncio
import itertools
from datetime import timedelta

import dns.query
import dns.tsig
import dns.zone
import pytest

from lab.dns_front import DnsFront, Fault
from lab.nsd import Nsd
from lab.primaries import PRIMARIES, SECONDARIES
from lab.processes import wait_until
from lab.unbound import Unbound
from lab.watcher import Watcher
from nts_core.control import ServerState
from poolsvc.leader import Leader
from poolsvc.publisher import Fenced, PublishError, Rejected, Unreachable
from poolsvc.zone import diff

# What stands between publisher and primary matters little to the kind of the primary.
FRONTED = pytest.mark.parametrize(
    "pair",
    [
        pytest.param((kind, "nsd"), id=f"{kind}+nsd", marks=() if kind == "bind" else pytest.mark.long)
        for kind in PRIMARIES
    ],
    indirect=True,
)
# Sudden ends cost the most time: the short run has a server that journals in files, and ours.
SUDDEN = pytest.mark.parametrize(
    "pair",
    [
        pytest.param(
            pair,
            id="+".join(pair),
            marks=() if pair in {("bind", "nsd"), ("embedded", "nsd")} else pytest.mark.long,
        )
        for pair in itertools.product(PRIMARIES, SECONDARIES)
    ],
    indirect=True,
)
MINUTE = timedelta(minutes=1)
_SETTLED = 20  # answers of a secondary that has come back
SERVICE = ("_ntske._tcp.pool.example.", "SRV")


def targets(zone):
    return {text.split()[-1] for text in zone[SERVICE].rdatas}


class Watched:
    """A zone with a watcher at the primary, its secondary and a resolver; `wanted` is what it should hold."""

    def __init__(self, zone, watcher, wanted):
        self.zone, self.watcher, self.wanted = zone, watcher, wanted

    def want(self, *names, **options):
        """From here on the SRV may be that of these servers too."""
        self.wanted = self.zone.pool(*names, **options)
        self.watcher.allow(targets(self.wanted))
        return self.wanted

    async def done(self):
        """The primary has what is wanted, and nobody shows anything else once all servers have it."""
        assert await self.zone.seen() == self.wanted
        self.watcher.settled(targets(self.wanted), "primary")
        await self.zone.shown(self.wanted)
        self.watcher.settled(targets(self.wanted))
        # Each is seen once more after that.
        before = self.watcher.answers.copy()
        await asyncio.to_thread(
            wait_until,
            lambda: all(self.watcher.answers[name] > before[name] + 1 for name in self.watcher.names),
            "an answer of each server",
        )
        assert self.watcher.faults == []


@pytest.fixture
async def watched(zone, tmp_path):
    wanted = zone.pool("alice", "bob", "carol")
    await zone.publish(wanted)
    await zone.shown(wanted)
    with Unbound(tmp_path / "unbound", [zone.primary]) as unbound:
        servers = {"primary": zone.primary, "secondary": zone.primary.secondaries[0], "resolver": unbound}
        watcher = Watcher(SERVICE[0], servers, ttl=zone.policy.srv_ttl + 1)
        watcher.allow(targets(wanted))
        with watcher:
            yield Watched(zone, watcher, wanted)


@FRONTED
async def test_after_each_fault_the_zone_becomes_what_is_wanted(watched, zone):
    names = ("alice", "bob", "carol", "dave")
    with DnsFront(zone.primary) as front:
        fronted = {"address": front.address, "port": front.port}
        for number, fault in enumerate(Fault):
            wanted = watched.want(*(name for name in names if name != names[number % 4]))
            front.fault = fault
            timeout = 0.5 if fault in {Fault.SILENT, Fault.SLOW} else zone.config.timeout
            with pytest.raises(Rejected if fault is Fault.REFUSED else Unreachable):
                await zone.publish(wanted, zone.publisher_with(**fronted, timeout=timeout))
            front.fault = None
            await zone.publish(wanted, zone.publisher_with(**fronted))
            watched.watcher.settled(targets(wanted), "primary")
    await watched.done()


@FRONTED
async def test_a_message_that_comes_late_does_not_undo_what_came_after_it(watched, zone):
    """The publisher gave up on it, and has made another change since."""
    with DnsFront(zone.primary) as front:
        slow = zone.publisher_with(address=front.address, port=front.port, timeout=0.5)
        front.fault = Fault.SLOW
        before = watched.wanted
        late = diff(watched.want("alice"), before)
        with pytest.raises(Unreachable):
            await slow.apply(late, zone.epoch)
        wanted = watched.want("bob", "carol", "dave")
        await zone.publish(wanted)
        watched.watcher.settled(targets(wanted), "primary")
        serial = zone.primary.serial()
        await asyncio.to_thread(wait_until, lambda: front.passed == 1, "the late message")
        assert zone.primary.serial() == serial
    await watched.done()


@SUDDEN
async def test_what_was_acknowledged_is_there_after_a_sudden_end(watched, zone):
    for number, end in enumerate((zone.primary.kill, zone.primary.stop)):
        before = watched.wanted
        wanted = watched.want("alice", "bob", *(f"member{number}-{one}" for one in range(40)))
        acknowledged = await _written_until(zone, diff(wanted, before), end)
        await asyncio.to_thread(zone.primary.start)
        seen = await zone.seen()
        assert all(seen.get((change.owner, change.rdtype)) == change.after for change in acknowledged)
        await zone.publish(wanted)
        watched.watcher.settled(targets(wanted), "primary")
    await watched.done()


async def _written_until(zone, changes, end):
    """What the primary had acknowledged when it came to its end, in the middle of the changes."""
    acknowledged, enough = [], asyncio.Event()

    async def write():
        for change in changes:
            await zone.publisher.apply([change], zone.epoch)
            acknowledged.append(change)
            if len(acknowledged) == 20:
                enough.set()

    writing, reached = asyncio.create_task(write()), asyncio.create_task(enough.wait())
    await asyncio.wait((writing, reached), return_when=asyncio.FIRST_COMPLETED)
    assert not writing.done(), writing.exception()
    await asyncio.to_thread(end)
    with pytest.raises(Unreachable):
        await writing
    return acknowledged


@SUDDEN
async def test_a_secondary_that_was_killed_catches_up(watched, zone):
    secondary = zone.primary.secondaries[0]
    if isinstance(secondary, Nsd):
        await asyncio.to_thread(wait_until, secondary.saved, "NSD's file of the zone")
    await asyncio.to_thread(secondary.kill)
    wanted = watched.want("alice", "dave")
    await zone.publish(wanted)
    await asyncio.to_thread(secondary.start)
    if isinstance(secondary, Nsd):
        # It may show the zone that it last wrote to its disk for a moment, as any deployed one does: what was right
        # before is no fault until it has shown the new one for a while.
        await zone.shown(wanted)
        before = watched.watcher.answers["secondary"]
        await asyncio.to_thread(
            wait_until, lambda: watched.watcher.answers["secondary"] > before + _SETTLED, "answers of NSD"
        )
    await watched.done()


@SUDDEN
async def test_a_primary_that_lost_its_data_is_filled_again_by_the_next_leader(watched, zone):
    """The operator begins it anew from the seed and the saved key, with a serial beyond that of the secondaries."""
    secondary = zone.primary.secondaries[0]
    await asyncio.to_thread(zone.primary.stop)
    with pytest.raises(PublishError):
        await zone.publish(watched.wanted)
    await asyncio.to_thread(zone.primary.lose, secondary.serial() + 1)
    await asyncio.to_thread(zone.primary.start)
    assert await zone.seen() == {}
    with pytest.raises(Fenced, match="epoch is None"):
        await zone.publish(watched.wanted)
    assert await zone.publisher.fence() is None
    zone.epoch += 1
    await zone.publisher.take_fence(zone.epoch)
    await zone.publish(watched.wanted)
    await watched.done()


def addresses(knot):
    """The last octet of every address in the zone."""
    key = dns.tsig.Key(knot.tsig_name, knot.tsig_secret, "hmac-sha256")
    transfer = dns.query.xfr(knot.address, knot.zone, port=knot.port, keyring=key, timeout=5, lifetime=5)
    found = dns.zone.from_xfr(transfer).iterate_rdatas("A")
    return {int(rdata.address.split(".")[-1]) for name, _, rdata in found if "servers" in name.to_text()}


async def test_a_leader_gets_over_every_fault_by_itself(database, knot, published_by, registry_of):
    """What members did meanwhile is published when the primary is back; also into a zone that was begun anew."""
    with DnsFront(knot) as front:
        endpoint = f"{front.address}:{front.port}"
        registry = registry_of(database, published_by(dns={"primary": endpoint}, step_retry=10))
        await registry.open_account()
        leader, now = Leader(database, registry.settings, "one"), registry.now
        faults = [fault for fault in Fault if fault not in {Fault.SILENT, Fault.SLOW}]
        for number, fault in enumerate(faults, start=1):
            await registry.server(f"member{number}", f"192.0.2.{number}", state=ServerState.VERIFIED)
            front.fault = fault
            await leader.step(now := now + MINUTE)
            assert leader.alarm is not None, fault
            front.fault = None
            await leader.step(now := now + MINUTE)
            assert leader.alarm is None, fault
            assert addresses(knot) == set(range(1, number + 1))
        serial = knot.serial()
        await asyncio.to_thread(knot.stop)
        knot.lose(serial + 1)
        await registry.server("late", f"192.0.2.{len(faults) + 1}", state=ServerState.VERIFIED)
        await leader.step(now := now + MINUTE)
        assert leader.alarm is not None
        await asyncio.to_thread(knot.start)
        for _ in range(3):
            await leader.step(now := now + MINUTE)
        assert leader.alarm is None
        assert addresses(knot) == set(range(1, len(faults) + 2))
        await leader.stop()
