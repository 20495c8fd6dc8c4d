"""The leader's picture of the pool, on both engines, and what becomes of it in a real Knot."""

import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import dns.message
import dns.query
import dns.rcode
import dns.tsig
import dns.update
import pytest
from sqlalchemy import delete, select, update

from lab import mmdb
from lab.knot import Knot
from lab.processes import free_port
from nts_core.control import ServerState
from poolsvc import own_account, plans, publication, servers
from poolsvc.config import GeoSettings
from poolsvc.derived import RegistryKey
from poolsvc.models import Address, Event, HoldKind, Region, Server, ZoneChange, ZonePlan
from poolsvc.primary import Unreachable
from poolsvc.publication import Publication, primary_config
from poolsvc.publisher import Publisher
from poolsvc.servers import EventKind
from poolsvc.zone import Change, RRset, diff

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


async def test_whose_a_server_is_and_where_is_in_dns(world, tmp_path):
    """A new file counts from the next full pass; the order and the serial are those of any other change."""
    file = tmp_path / "geo.mmdb"
    mmdb.write(file, {"192.0.2.0/24": {"asn": "AS64500", "country_code": "DE"}})
    geo = GeoSettings(database=(file,))
    world.registry.settings = world.registry.settings.model_copy(update={"geo": geo})
    alice = await world.server("alice", "192.0.2.1")
    await world.server("bob", "198.51.100.1")
    world.begin()
    assert await world.passes()
    key = RegistryKey.load(world.registry.settings.key_file)
    members = [key.operator_id((await world.registry.get(number)).member_id) for number in (alice, alice + 1)]
    known = [f'"v=truechimer1 op={members[0]} as=64500 cc=DE"']
    assert world.ask(owner("alice"), "TXT") == known
    assert world.ask(owner("bob"), "TXT") == [f'"v=truechimer1 op={members[1]}"']

    mmdb.write(file, {"192.0.2.0/24": {"asn": "AS64501"}})
    await world.passes(2)
    assert world.ask(owner("alice"), "TXT") == known
    serial = world.serial()
    world.now += timedelta(seconds=600)
    assert await world.passes()
    assert world.ask(owner("alice"), "TXT") == [f'"v=truechimer1 op={members[0]} as=64501"']
    assert world.serial() != serial

    file.write_bytes(b"damaged")
    world.now += timedelta(seconds=600)
    await world.passes()
    assert world.ask(owner("alice"), "TXT") == [f'"v=truechimer1 op={members[0]} as=64501"']
    assert world.publication.geo_trouble.startswith("geo.mmdb")


async def test_a_region_has_its_own_servers_in_dns_and_one_that_is_thin_is_told(world, tmp_path):
    file = mmdb.write(
        tmp_path / "geo.mmdb",
        {f"{net}.0/24": {"country_code": code} for net, code in (("192.0.2", "DE"), ("198.51.100", "JP"))},
    )
    world.registry.settings = world.registry.settings.model_copy(
        update={
            "geo": GeoSettings(database=(file,)),
            "policy": world.registry.settings.policy.model_copy(update={"region_size": 4}),
        }
    )
    for number in range(1, 9):
        await world.server(f"de{number}", f"192.0.2.{number}", S.ACTIVE)
    jp = await world.server("jp", "198.51.100.1", S.ACTIVE)
    async with world.database.transaction() as session:
        session.add_all(Region(label=label, on_since=NOW) for label in ("europe", "jp"))
    world.begin()
    assert await world.passes()
    names = {
        label: {text.split()[-1] for text in world.ask(f"_ntske._tcp.{label}pool.example.", "SRV")}
        for label in ("", "europe.", "jp.", "de.")
    }
    assert names["europe."] == {owner(f"de{number}") for number in range(1, 9)}
    assert owner("jp") in names["jp."]
    assert [len(some) for some in names.values()] == [8, 8, 8, 0]
    (thin,) = world.publication.thin_regions
    assert (thin.region, thin.servers, thin.filled_from) == ("jp", 1, ("asia", ""))
    # Who leaves is out of the SRV only when no region lists it any more.
    async with world.registry.change(jp) as (session, server):
        await servers.leave(session, server, actor="test", reason="", now=NOW, emergency=True)
    await world.passes(2)
    assert (await world.registry.get(jp)).srv_withdrawn_at is not None
    found = world.ask("_ntske._tcp.jp.pool.example.", "SRV")
    assert len(found) == 8
    assert owner("jp") not in {text.split()[-1] for text in found}


async def test_servers_of_one_member_have_one_operator(world):
    alice = await world.server("alice", "192.0.2.1")
    await world.server("bob", "198.51.100.1")
    async with world.database.transaction() as session:
        member = await session.scalar(select(Server.member_id).where(Server.id == alice))
        await session.execute(update(Server).values(member_id=member))
        session.add_all(ZoneChange(server_id=number) for number in (alice, alice + 1))
    assert await world.passes()
    assert world.ask(owner("alice"), "TXT") == world.ask(owner("bob"), "TXT") != []


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
    assert world.transfers() == 1, "at the beginning; what an update did is seen by what happened since"


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
        own_account.choose(world.registry.settings, server, first)
    await world.publication.look(NOW)
    async with world.registry.change(identifier) as (_, server):
        own_account.choose(world.registry.settings, server, second)
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
    world.now += timedelta(seconds=60)
    assert await world.passes()
    assert world.transfers() == 1


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
    world.now += timedelta(seconds=20)
    assert await world.passes()
    assert (await world.registry.get(alice)).named_at is not None


async def test_a_change_does_not_wait_for_the_verification_of_the_others(world, monkeypatch):
    """A pass asks for a few keys only, those of the last change first; the others have their turns."""
    monkeypatch.setattr(publication, "_QUESTIONS", 6)
    ids = [await world.server(f"s{number}", f"192.0.2.{number}") for number in range(1, 9)]
    assert await world.passes()
    assert world.publication.has_more
    alice = await world.server("alice", "192.0.2.99")
    await world.passes()
    assert (await world.registry.get(alice)).named_at is not None
    assert None in {(await world.registry.get(one)).named_at for one in ids}
    await world.passes(8)
    assert None not in {(await world.registry.get(one)).named_at for one in ids}
    assert not world.publication.has_more


async def test_what_a_nameserver_does_not_show_keeps_nothing_else_from_being_asked_for(
    database, knot, published_by, world, registry_of, monkeypatch
):
    """The other one has a zone without any server, and shows what is gone as it should be."""
    monkeypatch.setattr(publication, "_QUESTIONS", 8)
    with Knot(knot.directory / "other") as other:
        both = tuple(f"{one.address}:{one.port}" for one in (knot, other))
        world.registry = registry_of(database, published_by(dns={"nameservers": both}))
        world.begin()
        alice = await world.server("alice", "192.0.2.1")
        for number in range(2, 8):
            await world.server(f"s{number}", f"192.0.2.{number}")
        assert await world.passes(9) is False
        async with world.registry.change(alice) as (session, server):
            await servers.leave(session, server, actor="test", reason="", now=NOW, emergency=True)
        await world.passes(3)
        assert (await world.registry.get(alice)).name_broken_at is not None
        world.now += timedelta(seconds=20)
        await world.passes()
        assert world.publication.is_late(world.now)


async def test_a_server_with_a_serial_of_its_own_is_judged_by_what_it_shows(
    database, knot, published_by, world, registry_of
):
    """An edge signs by itself: its serial is behind for ever, and its contents are right."""
    with Knot(knot.directory / "edge") as edge:
        both = tuple(f"{one.address}:{one.port}" for one in (knot, edge))
        world.registry = registry_of(database, published_by(dns={"nameservers": both}))
        world.begin()
        alice = await world.server("alice", "192.0.2.1")
        await world.passes()
        at_edge = Publisher(
            world.publication._the_policy,
            replace(
                primary_config(world.registry.settings),
                address=edge.address,
                port=edge.port,
                tsig_secret=edge.tsig_secret,
            ),
        )
        await at_edge.take_fence(1)
        await at_edge.apply(diff(world.publication.whole(), {}), 1)
        for _ in range(3):
            await world.publication.publisher.apply(
                [Change(owner("x"), "A", None, RRset.of(2, "A", ["192.0.2.9"]))], 1
            )
            await world.publication.publisher.apply(
                [Change(owner("x"), "A", RRset.of(2, "A", ["192.0.2.9"]), None)], 1
            )
        world.now += timedelta(seconds=60)
        await world.passes(2)
        assert await world.publication.publisher.behind(world.serial())
        assert (await world.registry.get(alice)).named_at is not None
        world.now += timedelta(seconds=60)
        assert await world.passes()
        assert not world.publication.is_late(world.now)
        message = [Change(owner("alice"), "A", RRset.of(2, "A", ["192.0.2.1"]), None)]
        await at_edge.apply(message, 1)
        world.now += timedelta(seconds=60)
        assert await world.passes() is False, "and that it lost a record is seen by the same sign"


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


async def no_server_is_known(world):
    """A statement that no session sees: the database is one in which nobody has these names."""
    async with world.database.transaction() as session:
        await session.execute(update(Server).values(state=S.REGISTERED, name=Server.name + "-other"))


async def confirm(world):
    async with world.database.transaction("console") as session:
        await plans.approve(session, world.publication.question, world.now)


class TestGuard:
    """What would take much of the zone waits for a word."""

    @pytest.fixture
    async def crowd(self, world):
        """Twelve active servers in an open pool, all listed."""
        self.world = world
        ids = [await world.registry.server(f"s{n}", f"192.0.2.{n}", state=S.ACTIVE) for n in range(1, 13)]
        await world.passes(2)
        assert await self.listed() == set(ids)
        return ids

    async def listed(self):
        async with self.world.database.transaction() as session:
            return set(await session.scalars(select(Server.id).where(Server.listed_at.is_not(None))))

    async def kept(self):
        async with self.world.database.transaction() as session:
            return set(await session.scalars(select(Server.id).where(Server.kept_at.is_not(None))))

    async def hold(self, identifier, kind=HoldKind.SCORE):
        async with self.world.registry.change(identifier) as (session, server):
            await servers.set_hold(session, server, kind, reason="", actor="test", now=self.world.now)

    def zone(self):
        return {owner(f"s{n}"): self.world.ask(owner(f"s{n}"), "A") for n in range(1, 13)}

    async def test_a_database_without_its_servers_empties_no_zone(self, world, crowd):
        zone, targets = self.zone(), world.ask(SERVICE, "SRV")
        await no_server_is_known(world)
        for _ in range(2):
            world.now += timedelta(seconds=600)
            await world.passes(2)
            assert (self.zone(), world.ask(SERVICE, "SRV")) == (zone, targets)
            question = world.publication.question
            assert (question.deleted, question.existing) == (36, 37)
            world.begin()
        await world.passes(2)
        await confirm(world)
        await world.passes()
        assert set(map(tuple, self.zone().values())) == {()}
        assert world.ask(SERVICE, "SRV") == []
        assert not world.publication.question

    async def test_a_word_is_good_for_that_plan_for_an_hour_and_once(self, world, crowd):
        await no_server_is_known(world)
        world.now += timedelta(seconds=600)
        await world.passes()
        zone = self.zone()
        await confirm(world)
        async with world.database.transaction() as session:
            plan = await session.scalar(select(ZonePlan))
            events = list(await session.scalars(select(Event.kind).where(Event.actor == "console")))
            assert events == ["zone-plan-created"]
            good, plan.checksum = plan.checksum, "0" * 16
        await world.passes(2)
        assert self.zone() == zone, "another plan"
        async with world.database.transaction() as session:
            (await session.scalar(select(ZonePlan))).checksum = good
        world.now += timedelta(hours=1)
        await world.passes(2)
        assert self.zone() == zone, "too late"
        await confirm(world)
        await world.passes(2)
        assert self.zone() != zone
        async with world.database.transaction() as session:
            first, second = await session.scalars(select(ZonePlan).order_by(ZonePlan.id))
            assert (first.made_at is None, second.made_at is None) == (True, False)

    async def test_servers_that_leave_in_order_are_not_asked_for(self, world, crowd):
        for identifier in crowd:
            async with world.registry.change(identifier) as (session, server):
                await servers.leave(session, server, actor="test", reason="", now=NOW, emergency=True)
        await world.passes(3)
        assert set(map(tuple, self.zone().values())) == {()}
        assert not world.publication.question

    async def test_the_names_of_removed_servers_may_go_from_an_old_zone(self, world, crowd):
        async with world.database.transaction() as session:
            await session.execute(
                update(Server).where(Server.id != crowd[0]).values(state=S.REMOVED, listed_at=None)
            )
        world.begin()
        await world.passes(2)
        assert [name for name, addresses in self.zone().items() if addresses] == [owner("s1")]

    async def test_other_settings_wait_and_are_made_when_confirmed(self, world, crowd, published_by):
        world.publication._settings = published_by(dns={"address_ttl": 77})
        await world.passes(2)
        assert world.publication.question.is_of_settings
        assert await world.server("new", "192.0.2.99")
        await world.passes(2)
        assert world.ask(owner("new"), "A") == ["192.0.2.99"], "what does not count is made"
        await confirm(world)
        await world.passes(2)
        assert not world.publication.question
        assert world.publication._seen.zone[owner("s1"), "A"].ttl == 77

    async def test_other_settings_that_wait_hold_up_no_loss_below_the_threshold(
        self, world, crowd, published_by
    ):
        world.publication._settings = published_by(dns={"address_ttl": 77})
        await world.passes(2)
        question = world.publication.question
        async with world.registry.change(crowd[0]) as (session, server):
            await servers.apply(
                session, server, EventKind.ADDRESSES_LOST, actor="test", reason="", now=world.now
            )
            server.addresses[0].proved_at = None
        await world.passes(2)
        assert world.ask(owner("s1"), "A") == []
        assert owner("s1") not in {text.split()[-1] for text in world.ask(SERVICE, "SRV")}
        assert world.publication.question.is_of_settings
        assert world.publication.question.checksum != question.checksum

    async def test_a_wave_of_servers_that_the_database_knows_leaves_the_srv_before_a_word(self, world, crowd):
        """Their addresses wait for it; but nobody is a target who is not active."""
        async with world.database.transaction() as session:
            await session.execute(update(Server).where(Server.id.in_(crowd[:8])).values(state=S.REGISTERED))
        world.now += timedelta(seconds=600)
        await world.passes(2)
        assert world.ask(owner("s1"), "A") == ["192.0.2.1"]
        shown = {text.split()[-1] for text in world.ask(SERVICE, "SRV")}
        assert shown == {owner(f"s{n}") for n in range(9, 13)}

    async def test_a_word_for_another_plan_lets_nobody_go(self, world, crowd):
        """It was said of seven; an eighth has fallen before the leader made it."""
        for identifier in crowd[:7]:
            await self.hold(identifier)
        await world.passes()
        await confirm(world)
        await self.hold(crowd[7])
        await world.passes(2)
        assert await self.kept() == {*crowd[:8]}
        assert len(world.publication.question.kept) == 8

    async def test_a_leader_that_died_after_a_plan_was_made_is_followed_by_one_that_does_not_ask_again(
        self, world, crowd
    ):
        for identifier in crowd[:7]:
            await self.hold(identifier)
        await world.passes()
        await confirm(world)
        await world.publication.look(world.now)
        await world.publication._bring(world.publication.publisher, 1, world.now)
        world.begin()
        await world.passes()
        assert not world.publication.question
        assert (await self.kept(), await self.listed()) == (set(), {*crowd[7:]})

    async def test_one_that_was_let_go_and_came_back_is_kept_like_any_other(self, world, crowd):
        for identifier in crowd[:7]:
            await self.hold(identifier)
        await world.passes()
        await confirm(world)
        await world.passes(2)
        for identifier in crowd[:7]:
            async with world.registry.change(identifier) as (session, server):
                await servers.lift_hold(session, server, HoldKind.SCORE, reason="", actor="t", now=world.now)
        await world.passes(2)
        assert await self.listed() == {*crowd}
        for identifier in crowd[:7]:
            await self.hold(identifier)
        await world.passes()
        assert await self.kept() == {*crowd[:7]}

    async def test_falling_scores_take_no_more_than_three_of_ten_out_of_the_srv(self, world, crowd):
        for identifier in crowd[:7]:
            await self.hold(identifier)
            await world.passes()
        assert await self.listed() == {*crowd[3:]}
        assert await self.kept() == {*crowd[3:7]}
        assert world.publication.question.kept == ("s4", "s5", "s6", "s7")
        world.begin()
        world.now += timedelta(seconds=600)
        await world.passes(2)
        assert await self.kept() == {*crowd[3:7]}, "as the next leader finds them"

    async def test_one_that_is_kept_recovers_or_is_held_by_an_operator_or_leaves(self, world, crowd):
        for identifier in crowd[:7]:
            await self.hold(identifier)
        await world.passes()
        assert await self.kept() == {*crowd[:7]}
        async with world.registry.change(crowd[0]) as (session, server):
            await servers.lift_hold(session, server, HoldKind.SCORE, reason="", actor="t", now=world.now)
        await self.hold(crowd[1], HoldKind.OPERATOR)
        async with world.registry.change(crowd[2]) as (session, server):
            await servers.leave(session, server, actor="test", reason="", now=NOW)
        await world.passes(2)
        assert await self.kept() == {*crowd[3:7]}
        assert await self.listed() == {crowd[0], *crowd[3:]}

    async def test_those_that_are_kept_go_when_an_operator_says_so(self, world, crowd):
        for identifier in crowd[:7]:
            await self.hold(identifier)
        await world.passes()
        assert len(world.ask(SERVICE, "SRV")) == 8
        await confirm(world)
        await world.passes(2)
        assert (await self.kept(), await self.listed()) == (set(), {*crowd[7:]})
        shown = {text.split()[-1] for text in world.ask(SERVICE, "SRV")}
        assert shown == {owner(f"s{n}") for n in range(8, 13)}
        world.begin()
        await world.passes(2)
        assert not world.publication.question


class TestDrift:
    """What others do to the zone is undone and told; what we began ourselves is not theirs."""

    def told(self, world):
        return {change.key for change in world.publication.take_drift()}

    async def test_a_hand_on_the_zone_is_told_once(self, world):
        await world.server("alice", "192.0.2.1")
        await world.server("bob", "192.0.2.2")
        await world.passes(2)
        assert self.told(world) == set()
        world.by_hand(owner("alice"), 2, "A", "198.51.100.9")
        world.by_hand(owner("mallory"), 2, "A", "198.51.100.9")
        world.now += timedelta(seconds=60)
        assert await world.passes()
        assert self.told(world) == {(owner("alice"), "A"), (owner("mallory"), "A")}
        assert (world.ask(owner("alice"), "A"), world.ask(owner("mallory"), "A")) == (["192.0.2.1"], [])
        world.now += timedelta(seconds=60)
        await world.passes(2)
        assert self.told(world) == set()

    async def test_a_hand_on_what_changes_is_told_apart(self, world):
        alice = await world.server("alice", "192.0.2.1")
        await world.passes()
        world.by_hand(owner("alice"), 2, "A", "198.51.100.9")
        async with world.registry.change(alice) as (session, _):
            session.add(Address(server_id=alice, address="192.0.2.7", proved_at=NOW))
        await world.passes()
        assert self.told(world) == {(owner("alice"), "A")}

    async def test_the_work_of_a_leader_that_died_is_not_drift_and_what_nobody_of_ours_did_is(self, world):
        await world.server("alice", "192.0.2.1")
        await world.passes()
        bob = await world.server("bob", "192.0.2.2")
        await world.publication.look(world.now)
        await world.publication._bring(world.publication.publisher, 1, world.now)
        async with world.registry.change(bob) as (session, _):
            session.add(Address(server_id=bob, address="192.0.2.7", proved_at=NOW))
        world.begin()
        await world.passes()
        assert self.told(world) == set()
        assert world.ask(owner("bob"), "A") == ["192.0.2.2", "192.0.2.7"]
        world.by_hand(owner("alice"), 2, "A", "198.51.100.9")
        world.begin()
        await world.passes()
        assert self.told(world) == {(owner("alice"), "A")}

    async def test_a_hand_is_told_from_other_settings_by_the_next_leader(self, world, published_by):
        """Other settings change all that is alike; a CAA, a text or a TTL of one server alone was a hand's."""
        for number, name in enumerate(("alice", "bob", "carol"), start=1):
            await world.server(name, f"192.0.2.{number}")
        await world.passes(2)
        world.by_hand(owner("alice"), 2, "CAA", '0 issue "evil.example"')
        world.by_hand(owner("bob"), 2, "TXT", '"v=truechimer1 op=mallory"')
        world.by_hand(owner("carol"), 9, "A", "192.0.2.3")
        world.by_hand(f"_acme-challenge.{owner('carol')}", 2, "TXT", "x" * 43)
        hand = {(owner("alice"), "CAA"), (owner("bob"), "TXT"), (owner("carol"), "A")}
        world.begin()
        await world.passes()
        assert self.told(world) == {*hand, (f"_acme-challenge.{owner('carol')}", "TXT")}
        await world.registry.open_account("https://ca.example/acct/2")
        world.begin()
        await world.passes()
        assert self.told(world) == set()
        (caa,) = world.ask(owner("bob"), "CAA")
        assert "acct/2" in caa

    async def test_a_pass_that_failed_half_way_is_not_drift(self, world):
        """The primary made the change, and its answer never came."""
        await world.server("alice", "192.0.2.1")
        await world.passes()
        await world.server("bob", "192.0.2.2")
        await world.publication.look(world.now)
        seen = world.publication._seen
        await world.publication._bring(world.publication.publisher, 1, world.now)
        world.publication._in_flight = {
            change.key: change for change in diff(world.publication._seen.zone, seen.zone)
        }
        world.publication._seen, world.publication._is_astray = seen, True
        await world.passes()
        assert self.told(world) == set()

    async def test_a_primary_that_lost_its_data_is_filled_again(self, world):
        await world.server("alice", "192.0.2.1")
        await world.passes(2)
        world.knot.stop()
        shutil.rmtree(world.knot.directory / "db")
        (world.knot.directory / "db").mkdir()
        world.knot.start()
        await world.publication.publisher.take_fence(1)
        world.now += timedelta(seconds=60)
        await world.passes(2)
        assert world.ask(owner("alice"), "A") == ["192.0.2.1"]
        assert self.told(world)

    async def test_the_whole_zone_is_transferred_once_a_day_and_after_a_failure(self, world):
        await world.server("alice", "192.0.2.1")
        await world.passes(2)
        for seconds, transfers in ((3600, 1), (86400, 2), (86400, 3)):
            world.now += timedelta(seconds=seconds)
            await world.passes()
            assert world.transfers() == transfers
        world.knot.stop()
        world.now += timedelta(seconds=60)
        with pytest.raises(Unreachable):
            await world.passes()
        world.knot.start()
        assert await world.passes()
        assert self.told(world) == set()


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
    @pytest.mark.parametrize(("cap", "come"), [("traffic_cap", "traffic"), ("ke_cap", "ke_traffic")])
    async def test_traffic_is_none_of_dns_until_it_changes_a_servers_share(
        self, registry, cap, come, traffic, is_noted
    ):
        alice = await registry.server(state=S.ACTIVE)
        async with registry.change(alice) as (_, server):
            setattr(server, cap, 100.0)
            setattr(server, come, 10.0)
        await self.changes(registry)
        async with registry.change(alice) as (_, server):
            setattr(server, come, traffic)
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
            (15.0, 20.0, False),
            (12.0, 12.2, False),
            (12.0, 15.0, True),
            (12.0, 9.9, True),
            (9.9, 10.0, True),
            (3.0, -100.0, False),
            (None, 12.0, True),
            (None, 9.9, True),
            (None, 20.0, True),
        ],
    )
    async def test_a_score_counts_when_it_crosses_the_cutoff_or_makes_another_share(
        self, registry, before, after, is_noted
    ):
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

    @pytest.mark.parametrize(("kind", "is_noted"), [(HoldKind.OPERATOR, True), (HoldKind.MAINTENANCE, False)])
    async def test_an_operators_hold_on_a_suspended_server_is_noted(self, registry, kind, is_noted):
        """It tells that the server was meant to go."""
        alice = await registry.server(state=S.ACTIVE)
        async with registry.change(alice) as (session, server):
            await servers.set_hold(session, server, HoldKind.SCORE, reason="", actor="test", now=NOW)
        await self.changes(registry)
        async with registry.change(alice) as (session, server):
            await servers.set_hold(session, server, kind, reason="", actor="test", now=NOW)
        assert await self.changes(registry) == [alice] * is_noted
        async with registry.change(alice) as (session, server):
            await servers.lift_hold(session, server, kind, reason="", actor="test", now=NOW)
        assert await self.changes(registry) == [alice] * is_noted

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
