"""The leader's picture of the pool, on both engines, and what becomes of it in a real Knot."""

from datetime import UTC, datetime, timedelta

import dns.message
import dns.query
import dns.rcode
import dns.tsig
import dns.update
import pytest
from sqlalchemy import delete, select, update

from lab.processes import free_port
from nts_core.control import ServerState
from poolsvc import agentless, servers
from poolsvc.models import Address, HoldKind, Server, ZoneChange
from poolsvc.publication import Publication
from poolsvc.servers import EventKind

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
S = ServerState
SERVICE = "_ntske._tcp.pool.example."
SECOND = timedelta(seconds=1)


class World:
    """A registry whose zone is on Knot; `passes` is what a leader does in one tick."""

    def __init__(self, registry, knot):
        self.registry, self.knot, self.database = registry, knot, registry.database
        self.now = NOW
        self.publication = self.begin()

    def begin(self):
        """A leader that knows nothing yet."""
        self.publication = Publication(self.database, self.registry.settings)
        return self.publication

    async def passes(self, times=1):
        """Whether the last of some passes found every nameserver to show the zone; None when nothing was due."""
        found = None
        for _ in range(times):
            self.now += SECOND
            assert await self.publication.look(self.now)
            found = await self.publication.publish(1, self.now) if self.publication.is_due(self.now) else None
        return found

    async def outbox(self):
        async with self.database.transaction() as session:
            return list(await session.scalars(select(ZoneChange.server_id).order_by(ZoneChange.id)))

    async def server(self, name, address, state=S.VERIFIED):
        """A new server that DNS has never seen."""
        identifier = await self.registry.server(name, address, state=state)
        async with self.database.transaction() as session:
            await session.execute(
                update(Server).where(Server.id == identifier).values(burnt_at=None, named_at=None)
            )
        return identifier

    def ask(self, owner, kind):
        query = dns.message.make_query(owner, kind)
        answer = dns.query.udp(query, self.knot.address, timeout=5, port=self.knot.port)
        return sorted(rdata.to_text() for rrset in answer.answer for rdata in rrset)

    def serial(self):
        return int(self.ask("pool.example.", "SOA")[0].split()[2])

    def by_hand(self, *change):
        key = dns.tsig.Key(self.knot.tsig_name, self.knot.tsig_secret, "hmac-sha256")
        message = dns.update.UpdateMessage("pool.example.", keyring=key)
        message.replace(*change)
        assert dns.query.tcp(message, self.knot.address, timeout=5, port=self.knot.port).rcode() == 0

    def transfers(self):
        """How often the zone was transferred, as Knot logged it."""
        return self.knot._process.output().count("AXFR, outgoing") // 2


def owner(name):
    return f"{name}.servers.pool.example."


@pytest.fixture
async def world(database, knot, published_by, registry_of):
    registry = registry_of(database, published_by(reconcile_interval=60, full_pass_interval=600))
    await registry.open_account()
    world = World(registry, knot)
    await world.publication.look(NOW)
    await world.publication.publisher.take_fence(1)
    return world


async def test_without_an_account_nothing_is_looked_at(registry):
    """No CAA can be made; what changes waits in the outbox."""
    await registry.server(state=S.VERIFIED)
    publication = Publication(registry.database, registry.settings)
    assert not await publication.look(NOW)
    async with registry.database.transaction() as session:
        assert await session.scalar(select(ZoneChange.id).limit(1)) is not None


async def test_a_name_is_burnt_before_anything_of_it_leaves(world):
    alice = await world.server("alice", "192.0.2.1")
    assert await world.publication.look(NOW)
    assert (await world.registry.get(alice)).burnt_at == NOW
    assert world.ask(owner("alice"), "A") == []
    assert await world.publication.publish(1, NOW)
    assert world.ask(owner("alice"), "A") == ["192.0.2.1"]


async def test_a_whole_life_in_dns_and_when_each_step_is_noted(world):
    alice = await world.server("alice", "192.0.2.1")
    bob = await world.server("bob", "192.0.2.2", S.ACTIVE)
    assert await world.passes()
    found = await world.registry.get(alice)
    assert found.named_at >= world.now
    assert found.order_due_at == found.named_at + timedelta(seconds=2), "the zone's negative TTL"
    assert (await world.registry.get(bob)).listed_at is None, "the pool is not open"
    async with world.registry.change(alice) as (session, server):
        for kind in (EventKind.CERTIFICATE_SEEN, EventKind.NTS_CONFIRMED):
            await servers.apply(session, server, kind, actor="test", reason="", now=NOW)
    assert await world.passes()
    assert len(world.ask(SERVICE, "SRV")) == 2
    assert None not in {(await world.registry.get(one)).listed_at for one in (alice, bob)}
    async with world.registry.change(bob) as (session, server):
        await servers.set_hold(session, server, HoldKind.OPERATOR, reason="", actor="test", now=NOW)
    assert await world.passes()
    assert [text.split()[-1] for text in world.ask(SERVICE, "SRV")] == [owner("alice")]
    assert (await world.registry.get(bob)).listed_at is None
    async with world.registry.change(alice) as (session, server):
        await servers.leave(session, server, actor="test", reason="", now=NOW, emergency=True)
    assert await world.passes()
    found = await world.registry.get(alice)
    assert (found.srv_withdrawn_at is None, found.name_broken_at) == (False, None)
    assert world.ask(owner("alice"), "A"), "the name goes after its SRV"
    assert await world.passes()
    found = await world.registry.get(alice)
    assert found.name_broken_at >= found.srv_withdrawn_at
    assert found.removal_due_at is not None
    for kind in ("A", "AAAA", "CAA"):
        assert world.ask(owner("alice"), kind) == []
    assert await world.passes(3) is None, "nothing is left to do"
    assert world.transfers() == 2, "the first pass looks before and after its update; no other one does"


async def test_when_nothing_has_changed_nobody_is_asked(world):
    await world.server("alice", "192.0.2.1")
    await world.passes(2)
    world.knot.stop()
    assert await world.passes(3) is None


async def test_what_was_published_and_not_noted_is_noted_by_the_next_leader_and_not_published_again(world):
    """A leader dies between the two."""
    alice = await world.server("alice", "192.0.2.1")
    await world.publication.look(NOW)
    await world.publication._bring(world.publication.publisher, 1, NOW)
    assert (await world.registry.get(alice)).named_at is None
    assert await world.outbox()
    serial = world.serial()
    world.begin()
    assert await world.passes()
    assert (await world.registry.get(alice)).named_at is not None
    assert await world.outbox() == []
    assert world.serial() == serial


async def test_what_was_noted_and_not_forgotten_is_not_published_again(world):
    alice = await world.server("alice", "192.0.2.1")
    await world.passes()
    serial, named = world.serial(), (await world.registry.get(alice)).named_at
    async with world.database.transaction() as session:
        session.add_all(ZoneChange(server_id=number) for number in (alice, alice, 4711))
    assert await world.passes()
    assert (world.serial(), (await world.registry.get(alice)).named_at) == (serial, named)
    assert await world.outbox() == []


async def test_a_change_during_a_pass_is_not_lost(world):
    """Between the look and the end of the pass: its row of the outbox outlives the pass, and so does the change."""
    alice = await world.server("alice", "192.0.2.1")
    await world.passes()
    async with world.registry.change(alice) as (session, _):
        session.add(Address(server_id=alice, address="192.0.2.7", proved_at=NOW))
    await world.publication.look(NOW)
    async with world.registry.change(alice) as (session, _):
        session.add(Address(server_id=alice, address="192.0.2.8", proved_at=NOW))
    await world.publication.publish(1, NOW)
    assert world.ask(owner("alice"), "A") == ["192.0.2.1", "192.0.2.7"]
    assert await world.outbox() == [alice]
    await world.passes()
    assert world.ask(owner("alice"), "A") == ["192.0.2.1", "192.0.2.7", "192.0.2.8"]


async def test_a_row_that_changed_during_the_pass_learns_nothing_of_it(world):
    """It leaves while the pass that names it is under way."""
    alice = await world.server("alice", "192.0.2.1")
    await world.publication.look(NOW)
    async with world.registry.change(alice) as (session, server):
        await servers.leave(session, server, actor="test", reason="", now=NOW, emergency=True)
    await world.publication.publish(1, NOW)
    found = await world.registry.get(alice)
    assert (found.named_at, found.srv_withdrawn_at, found.name_broken_at) == (None, None, None)
    await world.passes(2)
    assert (await world.registry.get(alice)).name_broken_at is not None
    assert world.ask(owner("alice"), "A") == []


async def test_an_account_that_changes_during_the_pass_is_not_taken_for_the_one_that_was_seen(world):
    """Else its member would be told to order while CAA lets another account do so."""
    identifier = await world.registry.server("alice", "192.0.2.1", state=S.VERIFIED, agentless=True)
    first, second = (f"{world.registry.settings.ca.directory_url}/acct/{number}" for number in (1, 2))
    async with world.registry.change(identifier) as (_, server):
        agentless.set_account(world.registry.settings, server, first)
    await world.publication.look(NOW)
    async with world.registry.change(identifier) as (_, server):
        agentless.set_account(world.registry.settings, server, second)
    await world.publication.publish(1, NOW)
    found = await world.registry.get(identifier)
    assert first in world.ask(owner("alice"), "CAA")[0]
    assert (found.named_at, found.order_due_at) == (None, None)
    await world.passes(2)
    found = await world.registry.get(identifier)
    assert second in world.ask(owner("alice"), "CAA")[0]
    assert None not in (found.named_at, found.order_due_at)


async def test_a_hand_on_a_record_that_changes_is_found_in_the_same_pass(world):
    alice = await world.server("alice", "192.0.2.1")
    await world.server("bob", "192.0.2.2")
    await world.passes()
    world.by_hand(owner("alice"), 2, "A", "198.51.100.9")
    async with world.registry.change(alice) as (session, _):
        session.add(Address(server_id=alice, address="192.0.2.7", proved_at=NOW))
    assert await world.passes()
    assert world.ask(owner("alice"), "A") == ["192.0.2.1", "192.0.2.7"]


async def test_a_hand_on_any_other_record_is_found_by_the_serial(world):
    await world.server("alice", "192.0.2.1")
    await world.passes(2)
    world.by_hand(owner("alice"), 2, "A", "198.51.100.9")
    assert await world.passes() is None, "not before the interval is over"
    world.now += timedelta(seconds=60)
    assert await world.passes()
    assert world.ask(owner("alice"), "A") == ["192.0.2.1"]
    transfers = world.transfers()
    world.now += timedelta(seconds=60)
    assert await world.passes()
    assert world.transfers() == transfers, "its serial is as it was left"


async def test_what_no_session_did_is_found_by_the_full_pass(world):
    alice = await world.server("alice", "192.0.2.1")
    await world.passes()
    async with world.database.transaction() as session:
        await session.execute(update(Address).where(Address.server_id == alice).values(address="192.0.2.9"))
    await world.passes(2)
    assert world.ask(owner("alice"), "A") == ["192.0.2.1"]
    world.now += timedelta(seconds=600)
    await world.passes()
    assert world.ask(owner("alice"), "A") == ["192.0.2.9"]


async def test_another_account_turns_the_caa_of_every_name(world):
    await world.server("alice", "192.0.2.1")
    await world.server("bob", "192.0.2.2")
    await world.passes()
    transfers = world.transfers()
    await world.registry.open_account("https://ca.example/acct/2")
    assert await world.passes()
    for name in ("alice", "bob"):
        (caa,) = world.ask(owner(name), "CAA")
        assert "accounturi=https://ca.example/acct/2" in caa
    assert world.transfers() == transfers


async def test_a_removed_address_and_an_address_that_fails_beside_another_leave_dns(world):
    alice = await world.registry.server("alice", "192.0.2.1", "192.0.2.2", "192.0.2.3", state=S.ACTIVE)
    await world.passes()
    assert len(world.ask(owner("alice"), "A")) == 3
    async with world.registry.change(alice) as (_, server):
        server.addresses[0].score = 9.0
    assert await world.outbox() == [alice]
    async with world.registry.change(alice) as (session, server):
        await session.delete(server.addresses[1])
    await world.passes()
    assert world.ask(owner("alice"), "A") == ["192.0.2.3"]


async def test_while_a_nameserver_is_silent_nothing_is_noted_and_it_is_asked_again(
    database, knot, published_by, world, registry_of
):
    silent = ("127.0.0.1", free_port())
    both = (f"{knot.address}:{knot.port}", f"{silent[0]}:{silent[1]}")
    world.registry = registry_of(database, published_by(dns={"nameservers": both}))
    world.begin()
    alice = await world.server("alice", "192.0.2.1")
    assert await world.passes() is False
    assert world.ask(owner("alice"), "A") == ["192.0.2.1"]
    assert (await world.registry.get(alice)).named_at is None
    world.registry.settings = published_by()
    world.publication._settings = world.registry.settings
    assert await world.passes()
    assert (await world.registry.get(alice)).named_at is not None


async def test_an_open_pool_with_more_servers_than_fit_draws_its_targets_anew(
    database, published_by, world, registry_of
):
    world.registry = registry_of(database, published_by(dns={"srv_ttl": 60}, reconcile_interval=900))
    world.begin()
    for number in range(1, 13):
        await world.registry.server(f"s{number}", f"192.0.2.{number}", state=S.ACTIVE)
    await world.passes()
    seen = {tuple(world.ask(SERVICE, "SRV"))}
    for _ in range(5):
        world.now += timedelta(seconds=60)
        await world.passes()
        seen.add(tuple(world.ask(SERVICE, "SRV")))
    assert {len(targets) for targets in seen} == {8}
    assert len(seen) > 1


class TestOutbox:
    """What is noted for the publisher, and what is not worth a look."""

    async def changes(self, registry):
        async with registry.database.transaction() as session:
            found = list(await session.scalars(select(ZoneChange.server_id)))
            await session.execute(delete(ZoneChange))
            return found

    @pytest.mark.parametrize(
        ("traffic", "is_noted"), [(50.0, False), (101.0, False), (200.0, True), (None, False)]
    )
    async def test_traffic_is_none_of_dns_until_it_changes_a_servers_share(self, registry, traffic, is_noted):
        alice = await registry.server(state=S.ACTIVE)
        async with registry.change(alice) as (_, server):
            server.traffic_cap, server.traffic = 100.0, 10.0
        await self.changes(registry)
        async with registry.change(alice) as (_, server):
            server.traffic = traffic
        assert await self.changes(registry) == [alice] * is_noted

    async def test_a_day_on_which_a_server_leaves_is_noted_when_it_is_set_and_when_it_has_come(
        self, registry
    ):
        alice = await registry.server(state=S.LEAVING)
        for day in (NOW + timedelta(days=1), None):
            await self.changes(registry)
            async with registry.change(alice) as (_, server):
                server.leave_at = day
            assert await self.changes(registry) == [alice]

    async def test_a_server_that_changes_hands_is_noted(self, registry):
        alice, other = await registry.server(state=S.ACTIVE), await registry.member("Other")
        await self.changes(registry)
        async with registry.change(alice) as (_, server):
            server.member_id = other
        assert await self.changes(registry) == [alice]

    async def test_a_registration_is_none_of_dns_and_a_proved_address_is(self, registry):
        alice = await registry.server(state=S.REGISTERED)
        assert await self.changes(registry) == []
        async with registry.change(alice) as (_, server):
            server.addresses[0].proved_at = NOW
        assert await self.changes(registry) == [alice]

    @pytest.mark.parametrize(
        ("before", "after", "is_noted"),
        [
            (12.0, 20.0, False),
            (12.0, 9.9, True),
            (9.9, 10.0, True),
            (3.0, -100.0, False),
            (None, 12.0, True),
            (None, 9.9, False),
        ],
    )
    async def test_a_score_counts_when_it_crosses_the_cutoff(self, registry, before, after, is_noted):
        alice = await registry.server(state=S.ACTIVE)
        async with registry.change(alice) as (_, server):
            server.addresses[0].score = before
        await self.changes(registry)
        async with registry.change(alice) as (_, server):
            server.addresses[0].score = after
        assert await self.changes(registry) == ([alice] if is_noted else [])

    async def test_what_agents_and_probes_write_all_the_time_is_not_noted(self, registry):
        alice = await registry.server(state=S.ACTIVE)
        await self.changes(registry)
        async with registry.change(alice) as (_, server):
            server.agent_seen_at = server.probe_due_at = server.listed_at = NOW
            server.agent_clock = "fine"
            server.addresses[0].full_probes += 1
        assert await self.changes(registry) == []

    @pytest.mark.parametrize(
        "values",
        [
            {"weight": 5},
            {"ipv6": False},
            {"own_account_uri": "https://ca.example/2"},
            {"srv_withdrawn_at": NOW},
        ],
        ids=lambda values: next(iter(values)),
    )
    async def test_what_dns_shows_of_a_server_is_noted(self, registry, values):
        alice = await registry.server(state=S.ACTIVE)
        await self.changes(registry)
        async with registry.change(alice) as (_, server):
            for name, value in values.items():
                setattr(server, name, value)
        assert await self.changes(registry) == [alice]

    async def test_a_change_that_is_rolled_back_is_not_noted(self, registry):
        alice = await registry.server(state=S.ACTIVE)
        await self.changes(registry)

        async def interrupted():
            async with registry.change(alice) as (session, server):
                server.weight = 9
                await session.flush()
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await interrupted()
        assert await self.changes(registry) == []
