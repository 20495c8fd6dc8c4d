"""The leader and the embedded server: many answers on one name, and nobody in any of them who has left."""

from datetime import timedelta

import dns.message
import dns.query
import pytest
from sqlalchemy import delete, update

from lab.embedded import Embedded
from nts_core.control import ServerState as S
from poolsvc.models import Region, Server
from tests.poolsvc.conftest import NOW
from tests.poolsvc.test_publication import SERVICE, World, owner

# What is different between the databases is tested by what publishes to Knot.
pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
EUROPE = "_ntske._tcp.europe.pool.example."
SERVERS = [f"s{number}" for number in range(14)]
# One of 16 sets is missed in so many questions with a chance below 16 (15/16)^600 < 1e-15.
ENOUGH = 600


class Answering(World):
    def answers(self, name=SERVICE, times=ENOUGH):
        query = dns.message.make_query(name, "SRV", want_dnssec=True)
        found = set()
        for _ in range(times):
            answer = dns.query.udp(query, self.knot.address, timeout=5, port=self.knot.port).answer
            found.add(frozenset(one.target.to_text() for one in answer[0]) if answer else frozenset())
        return found

    def everybody(self, name=SERVICE):
        return {target for names in self.answers(name) for target in names}

    async def next_draw(self):
        """A TTL later."""
        self.now += timedelta(seconds=60)
        await self.passes(3)


@pytest.fixture
async def world(database, tmp_path, tuned, registry_of):
    with Embedded(tmp_path / "embedded", ttl=60, soa_minimum=1) as primary:
        secret = tmp_path / "tsig.secret"
        secret.write_text(primary.tsig_secret)
        here = f"{primary.address}:{primary.port}"
        section = {
            "primary": here,
            "nameservers": (here,),
            "tsig_name": primary.tsig_name,
            "tsig_secret_file": secret,
        }
        policy = {"reconcile_interval": 60, "full_pass_interval": 600}
        registry = registry_of(database, tuned(dns=section, **policy))
        await registry.open_account()
        world = Answering(registry, primary)
        await world.publication.look(NOW)
        await world.publication.publisher.take_fence(1)
        world.ids = {}
        for number, name in enumerate(SERVERS, 1):
            world.ids[name] = await world.server(name, f"198.51.{number}.1", S.ACTIVE)
        await world.passes(6)
        yield world


async def listed(world, name):
    return (await world.registry.get(world.ids[name])).listed_at


async def test_an_answer_is_one_of_many_and_another_draw_has_others(world):
    first = world.answers()
    assert 10 < len(first) <= 16
    assert {len(names) for names in first} == {8}
    assert {target for names in first for target in names} == set(map(owner, SERVERS))
    assert all([await listed(world, name) for name in SERVERS])
    await world.next_draw()
    assert world.answers().isdisjoint(first) or len(world.answers() & first) < 4


async def test_who_leaves_is_in_no_answer_before_that_is_noted(world):
    leaver = SERVERS[3]
    assert owner(leaver) in world.everybody()
    async with world.database.transaction() as session:
        server = await session.get_one(Server, world.ids[leaver])
        server.state, server.leave_at = S.LEAVING, NOW + timedelta(days=1)
    await world.passes(4)
    assert (await world.registry.get(world.ids[leaver])).srv_withdrawn_at is not None
    assert owner(leaver) not in world.everybody()


async def test_a_primary_that_has_lost_its_draw_is_given_it_again(world):
    world.knot.stop()
    world.knot.start()
    assert len(world.answers()) == 1, "the zone's own"
    await world.next_draw()
    assert len(world.answers()) > 10


async def test_a_region_has_a_name_while_it_is_switched_on(world):
    async with world.database.transaction() as session:
        session.add(Region(label="europe", on_since=NOW))
    await world.next_draw()
    assert len(world.answers(EUROPE)) > 10
    assert world.everybody(EUROPE) <= set(map(owner, SERVERS))
    assert len(world.answers()) > 10
    async with world.database.transaction() as session:
        await session.execute(delete(Region))
    await world.next_draw()
    assert world.answers(EUROPE, 5) == {frozenset()}


async def test_a_pool_that_fits_one_answer_again_has_one(world):
    async with world.database.transaction() as session:
        await session.execute(update(Server).where(Server.name.in_(SERVERS[8:])).values(state=S.REMOVED))
    world.now += timedelta(seconds=600)
    await world.passes(4)
    assert world.answers() == {frozenset(map(owner, SERVERS[:8]))}


async def test_a_new_leader_takes_away_what_the_one_before_it_left(world):
    """Eight are left, who fit one answer: it never gave any sets itself."""
    async with world.database.transaction() as session:
        await session.execute(update(Server).where(Server.name.in_(SERVERS[8:])).values(state=S.REMOVED))
    world.begin()
    await world.publication.look(world.now)
    await world.passes(4)
    assert world.answers() == {frozenset(map(owner, SERVERS[:8]))}
