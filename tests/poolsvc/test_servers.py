"""The life of a server: the table, its events, holds, names, and a random walk through all of it."""

import asyncio
from datetime import UTC, datetime, timedelta
from itertools import count, pairwise

import hypothesis
import pytest
from hypothesis import HealthCheck, strategies
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import select

from nts_core.control import ServerState
from poolsvc import removal, servers
from poolsvc.db import Database
from poolsvc.errors import (
    AddressTaken,
    ConfusableName,
    InvalidDocument,
    LimitReached,
    NameTaken,
    NotFound,
    WrongState,
)
from poolsvc.models import Event, Hold, HoldKind, Member, MemberStatus
from poolsvc.pool import the_pool
from poolsvc.publication import Publication
from poolsvc.servers import TRANSITIONS, EventKind

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)
S, E = ServerState, EventKind


async def events(session, server_id):
    """The changes of a server's state."""
    kinds = list(EventKind)
    found = select(Event).where(Event.server_id == server_id, Event.kind.in_(kinds)).order_by(Event.id)
    return list(await session.scalars(found))


def states(entry):
    before = None if entry.before is None else entry.before["state"]
    return before, entry.after["state"]


def test_the_table_is_the_one_of_the_design():
    """REGISTERED, VERIFIED, CERTIFIED, ACTIVE <-> SUSPENDED; without addresses REGISTERED again; LEAVING; REMOVED."""
    ways = {(before, after) for (before, _), after in TRANSITIONS.items()}
    onward = {(S.REGISTERED, S.VERIFIED), (S.VERIFIED, S.CERTIFIED), (S.CERTIFIED, S.ACTIVE)}
    living = {S.REGISTERED, S.VERIFIED, S.CERTIFIED, S.ACTIVE, S.SUSPENDED}
    holds = {(S.ACTIVE, S.SUSPENDED), (S.SUSPENDED, S.ACTIVE)}
    leaving = {(state, S.LEAVING) for state in living}
    lost = {(state, S.REGISTERED) for state in living - {S.REGISTERED}}
    stays = {(S.LEAVING, S.VERIFIED), (S.LEAVING, S.LEAVING)}
    assert ways == onward | holds | leaving | stays | lost | {
        (S.LEAVING, S.REMOVED),
        (S.REGISTERED, S.REMOVED),
    }
    assert not any(before is S.REMOVED for before, _ in ways)


@pytest.mark.parametrize("state", S)
async def test_from_each_state_the_table_leads_on_and_everything_else_is_refused(registry, state):
    for number, kind in enumerate(EventKind):
        identifier = await registry.server(f"s{number}", f"198.18.1.{number}", state=state)
        after = TRANSITIONS.get((state, kind))
        async with registry.change(identifier) as (session, server):
            before = len(await events(session, identifier))
            if after is None:
                with pytest.raises(WrongState, match=f"s{number} is {state}"):
                    await servers.apply(session, server, kind, actor="a", reason="r", now=LATER)
            else:
                await servers.apply(session, server, kind, actor="a", reason="r", now=LATER)
        async with registry.change(identifier) as (session, server):
            found = await events(session, identifier)
            if after is None:
                assert (server.state, len(found)) == (state, before)
                continue
            assert (server.state, server.state_since) == (after, LATER)
            assert len(found) == before + 1
            last = found[-1]
            assert (*states(last), last.kind) == (state, after, kind)
            assert (last.actor, last.reason, last.at) == ("a", "r", LATER)


async def test_a_new_server_has_its_first_event_and_nothing_proved(registry):
    identifier = await registry.server("alice", "198.18.0.1", "fd00::1")
    async with registry.change(identifier) as (session, server):
        (first,) = await events(session, identifier)
        assert (*states(first), first.kind) == (None, S.REGISTERED, E.REGISTERED)
        assert [row.address for row in server.addresses] == ["198.18.0.1", "fd00::1"]
        assert servers.published_addresses(server) == []


async def test_holds_of_different_kinds_are_lifted_separately(registry):
    identifier = await registry.server(state=S.ACTIVE)

    async def change(function, kind):
        async with registry.change(identifier) as (session, server):
            await function(session, server, kind, reason="why", actor="test", now=LATER)
            return server.state

    assert await change(servers.set_hold, HoldKind.SCORE) is S.SUSPENDED
    assert await change(servers.set_hold, HoldKind.OPERATOR) is S.SUSPENDED
    assert await change(servers.set_hold, HoldKind.OPERATOR) is S.SUSPENDED
    assert await change(servers.lift_hold, HoldKind.MAINTENANCE) is S.SUSPENDED
    assert await change(servers.lift_hold, HoldKind.SCORE) is S.SUSPENDED
    assert await change(servers.lift_hold, HoldKind.OPERATOR) is S.ACTIVE
    async with registry.database.transaction() as session:
        holds = list(await session.scalars(select(Hold).where(Hold.server_id == identifier)))
        kinds = [entry.kind for entry in await events(session, identifier)][-2:]
    assert sorted(hold.kind for hold in holds) == [HoldKind.OPERATOR, HoldKind.SCORE]
    assert all(hold.lifted_at == LATER for hold in holds)
    assert kinds == [E.HOLD_SET, E.HOLDS_LIFTED]


async def test_leaving_is_begun_once_and_ends_all_other_work(registry):
    identifier = await registry.server(state=S.ACTIVE)
    async with registry.change(identifier) as (_, server):
        server.order_due_at = server.probe_due_at = server.addresses[0].proof_due_at = LATER
        server.addresses[0].nonce = "n"
    for reason in ("first", "second"):
        async with registry.change(identifier) as (session, server):
            await servers.leave(session, server, actor="member 1", reason=reason, now=LATER)
    async with registry.change(identifier) as (session, server):
        assert (server.state, server.leave_reason) == (S.LEAVING, "first")
        assert server.removal_due_at == LATER
        assert (server.order_due_at, server.probe_due_at) == (None, None)
        assert (server.addresses[0].nonce, server.addresses[0].proof_due_at) == (None, None)
        assert [entry.kind for entry in await events(session, identifier)].count(E.LEAVE) == 1


async def register(registry, name, *addresses):
    return await registry.server(name, *(addresses or (f"198.18.9.{len(name)}",)), member=registry.owner)


@pytest.fixture
async def owned(registry):
    registry.owner = await registry.member()
    return registry


async def test_a_name_is_held_in_every_spelling_until_it_is_released(owned):
    await register(owned, "alice", "198.18.0.1")
    with pytest.raises(NameTaken, match="is taken") as caught:
        await register(owned, " ALICE ", "198.18.0.2")
    assert caught.value.field == "name"
    assert caught.value.remedy


async def test_an_unfinished_registration_expires_and_frees_its_name(owned):
    first = await register(owned, "alice")
    hours = owned.settings.policy.registration_hours

    async def expire(after):
        async with owned.database.transaction() as session:
            await servers.expire_unfinished(session, owned.settings, NOW + after)

    await expire(timedelta(hours=hours))
    assert (await owned.get(first)).state is S.REGISTERED
    await expire(timedelta(hours=hours, seconds=1))
    assert (await owned.get(first)).state is S.REMOVED
    second = await register(owned, "alice")
    async with owned.database.transaction() as session:
        assert (await servers.find(session, "Alice")).id == second


@pytest.mark.parametrize("state", [S.VERIFIED, S.CERTIFIED, S.ACTIVE, S.SUSPENDED, S.LEAVING])
async def test_only_registrations_without_a_proof_expire(registry, state):
    identifier = await registry.server(state=state)
    async with registry.database.transaction() as session:
        await servers.expire_unfinished(session, registry.settings, NOW + timedelta(days=900))
    assert (await registry.get(identifier)).state is state


async def test_a_name_that_was_in_dns_is_never_given_again(owned):
    await owned.server("alice", state=S.REMOVED)
    with pytest.raises(NameTaken, match="never given again"):
        await register(owned, "alice", "198.18.0.2")


async def test_a_name_like_that_of_another_members_server_is_refused_and_ones_own_is_not(owned):
    await register(owned, "modern", "198.18.0.1")
    await register(owned, "modem", "198.18.0.2")
    other = await owned.member("other")
    for name in ("modern", "m0dern", "mod-ern"):
        with pytest.raises((ConfusableName, NameTaken)) as caught:
            await owned.server(name, "198.18.0.3", member=other)
        assert caught.value.field == "name"
        if name != "modern":
            assert caught.value.code == "confusable-name"
            assert "another server" in caught.value.detail


async def test_a_name_like_a_burnt_one_is_refused_and_one_like_a_released_one_is_not(registry):
    await registry.server("alice", state=S.REMOVED)
    with pytest.raises(ConfusableName):
        await registry.server("a1ice", "198.18.0.2")
    freed = await registry.server("bobby", "198.18.0.3")
    async with registry.change(freed) as (_, server):
        server.released_at = NOW
    await registry.server("bo-bby", "198.18.0.4")


async def test_a_name_like_a_reserved_one_is_refused_and_told_so(registry):
    with pytest.raises(ConfusableName, match="looks like the reserved name 'mail'"):
        await registry.server("rnail")


async def test_of_two_names_alike_that_come_at_once_one_is_registered(postgresql, settings, registry_of):
    registry = registry_of(postgresql, settings)
    owners = [await registry.member(f"member {number}") for number in range(2)]
    names = ("alice", "a1ice")
    outcomes = await asyncio.gather(
        *(
            registry.server(name, f"198.18.0.{number}", member=owners[number])
            for number, name in enumerate(names)
        ),
        return_exceptions=True,
    )
    assert sorted(isinstance(outcome, ConfusableName) for outcome in outcomes) == [False, True], outcomes


async def test_a_member_has_so_many_servers_without_a_proof_and_no_more(owned):
    first = await register(owned, "one", "198.18.0.1")
    await register(owned, "two", "198.18.0.2")
    with pytest.raises(LimitReached, match="2 registrations without a proved address") as caught:
        await register(owned, "three", "198.18.0.3")
    assert caught.value.remedy
    async with owned.change(first) as (session, server):
        await servers.apply(session, server, E.ADDRESS_PROVED, actor="test", reason="", now=NOW)
    await register(owned, "three", "198.18.0.3")


@pytest.mark.parametrize(("own", "allowed"), [(None, 3), (1, 1), (4, 4), (0, 0)])
async def test_a_members_own_number_of_servers_comes_before_the_pools(registry, tuned, own, allowed):
    registry.settings = tuned(servers_per_member=3, unproved_servers_per_member=9)
    owner = await registry.member()
    async with registry.database.transaction() as session:
        (await session.get_one(Member, owner)).max_servers = own
    # What is removed does not count.
    if allowed:
        await registry.server("gone", "198.18.3.1", state=S.REMOVED, member=owner)
    for number in range(allowed):
        await registry.server(f"s{number}-x", f"198.18.2.{number}", member=owner, state=S.ACTIVE)
    with pytest.raises(LimitReached, match=f"at most {allowed} servers"):
        await registry.server("more", "198.18.0.9", member=owner)


async def test_of_two_registrations_at_once_only_as_many_as_allowed_succeed(
    postgresql, settings, registry_of
):
    registry = registry_of(postgresql, settings)
    owner = await registry.member()
    outcomes = await asyncio.gather(
        *(registry.server(f"{name}-x", f"198.18.0.{ord(name)}", member=owner) for name in "abdefgh"),
        return_exceptions=True,
    )
    assert sum(isinstance(outcome, int) for outcome in outcomes) == 2
    assert sum(isinstance(outcome, LimitReached) for outcome in outcomes) == 5


@pytest.mark.parametrize("status", [MemberStatus.PENDING, MemberStatus.BLOCKED, MemberStatus.CLOSED])
async def test_a_member_that_is_not_active_any_more_registers_nothing(registry, status):
    """Whoever asked may have been let in before the member was blocked or closed."""
    owner = await registry.member()
    async with registry.database.transaction() as session:
        (await session.get_one(Member, owner)).status = status
    with pytest.raises(WrongState, match=f"the member is {status}"):
        await registry.server("alice", member=owner)


async def test_a_proved_address_has_one_owner_and_an_unproved_claim_keeps_nobody_out(owned):
    await owned.server("alice", "198.18.0.1", "198.18.0.2")
    bob = await owned.server("bob", "198.18.0.1", state=S.VERIFIED)
    with pytest.raises(AddressTaken, match=r"198\.18\.0\.1 belongs") as caught:
        await register(owned, "carol", "198.18.0.3", "198.18.0.1")
    assert caught.value.field == "addresses"
    async with owned.change(bob) as (session, server):
        await servers.leave(session, server, actor="test", reason="", now=NOW)
    await register(owned, "carol", "198.18.0.3", "198.18.0.1")


async def test_unknown_servers_are_not_found(registry):
    async with registry.database.transaction() as session:
        with pytest.raises(NotFound):
            await servers.find(session, "nobody")
        with pytest.raises(NotFound):
            await servers.get(session, 1)


async def test_a_database_serves_one_pool_for_ever(registry):
    async with registry.database.transaction() as session:
        assert (await the_pool(session, registry.settings)).domain == "pool.example"
    other = registry.settings.model_copy(update={"pool": "other.example"})
    async with registry.database.transaction() as session:
        with pytest.raises(WrongState, match=r"pool\.example, not of other\.example"):
            await the_pool(session, other)


@pytest.mark.parametrize(
    ("scores", "published"),
    [
        ((None, None), [0, 1]),
        ((12.0, None), [0]),
        ((9.9, None), [0, 1]),
        ((10.0, 9.9), [0]),
        ((-100.0, 20.0), [1]),
        ((9.9, -100.0), [0, 1]),
    ],
)
async def test_an_address_that_fails_while_another_serves_is_withdrawn_alone(registry, scores, published):
    addresses = ("198.18.0.1", "fd00::1")
    identifier = await registry.server("alice", *addresses, state=S.ACTIVE)
    async with registry.change(identifier) as (_, server):
        for row, score in zip(server.addresses, scores, strict=True):
            row.score = score
        assert servers.published_addresses(server) == [addresses[index] for index in published]


async def test_the_first_use_of_the_pool_by_many_processes_makes_one_row(postgresql, settings):
    async def use():
        async with postgresql.transaction() as session:
            return (await the_pool(session, settings)).id

    assert await asyncio.gather(*(use() for _ in range(4))) == [1] * 4


async def test_a_reader_of_the_pool_does_not_wait_for_a_writer_of_it(postgresql, settings):
    """Every agent's report reads the pool; the publisher writes servers while it holds the pool's row."""
    async with postgresql.transaction() as session:
        await the_pool(session, settings)
    async with postgresql.transaction() as writer, postgresql.transaction() as reader:
        (await the_pool(writer, settings)).epoch = 7
        await writer.flush()
        async with asyncio.timeout(3):
            assert (await the_pool(reader, settings)).epoch == 0


async def test_a_report_and_a_publication_at_once_do_not_lock_each_other_out(
    postgresql, settings, registry_of
):
    """A report locks its server and then reads the pool; a publication reads the pool, then writes servers."""
    registry = registry_of(postgresql, settings)
    identifier = await registry.server(state=S.ACTIVE)
    async with postgresql.transaction() as session:
        await the_pool(session, settings)
    both_hold_one = asyncio.Barrier(2)

    async def report():
        async with postgresql.transaction() as session:
            (await servers.get(session, identifier)).agent_seen_at = NOW
            await both_hold_one.wait()
            await the_pool(session, settings)

    async def publication_pass():
        async with postgresql.transaction() as session:
            await the_pool(session, settings)
            await both_hold_one.wait()
            await servers.get(session, identifier)

    async with asyncio.timeout(10):
        await asyncio.gather(report(), publication_pass())


class Life(RuleBasedStateMachine):
    """Members, proofs, probes, operators and time do to a few servers what they like, in any order."""

    registry = None
    run = None
    machines = count()

    def __init__(self):
        super().__init__()
        self.space = next(self.machines)
        self.addresses = count(1)
        self.clock = NOW
        self.known = set()
        self.owner = self.run(self.registry.member(f"member {self.space}"))

    ids = Bundle("ids")

    def apply(self, identifier, kind):
        """Whether the event took effect; a refused one must leave everything as it was."""

        async def work():
            async with self.registry.change(identifier) as (session, server):
                before = server.state
                try:
                    await servers.apply(session, server, kind, actor="test", reason="", now=self.clock)
                except WrongState:
                    assert (before, kind) not in TRANSITIONS
                    assert server.state is before
                else:
                    assert server.state is TRANSITIONS[before, kind]

        self.run(work())

    @rule(target=ids, label=strategies.sampled_from(["alice", "bob"]))
    def register(self, label):
        name = f"{label}-{self.space}"
        address = f"fd00:{self.space:x}::{next(self.addresses):x}"

        async def work():
            async with self.registry.database.transaction() as session:
                held = [
                    row for row in await self.all(session) if row.name == name and row.released_at is None
                ]
                try:
                    made = await servers.register(
                        session, self.registry.settings, self.owner, name, [address], self.clock, actor="test"
                    )
                except NameTaken:
                    assert held
                    return None
                assert not held
                return made.id

        identifier = self.run(work())
        if identifier is None:
            return multiple()
        self.known.add(identifier)
        return identifier

    async def all(self, session):
        return [await servers.get(session, identifier) for identifier in sorted(self.known)]

    @rule(identifier=ids)
    def prove(self, identifier):
        self.apply(identifier, E.ADDRESS_PROVED)

    @rule(identifier=ids)
    def certify(self, identifier):
        self.apply(identifier, E.CERTIFICATE_SEEN)

    @rule(identifier=ids)
    def admit(self, identifier):
        self.apply(identifier, E.NTS_CONFIRMED)

    @rule(identifier=ids, kind=strategies.sampled_from(EventKind))
    def anything(self, identifier, kind):
        more_than_an_event = (E.EXPIRED, E.HOLD_SET, E.HOLDS_LIFTED, E.LEAVE, E.LEAVE_CANCELLED, E.CLOSED)
        if kind not in more_than_an_event:
            self.apply(identifier, kind)

    @rule(identifier=ids, kind=strategies.sampled_from(HoldKind), lift=strategies.booleans())
    def hold_or_lift(self, identifier, kind, lift):
        async def work():
            async with self.registry.change(identifier) as (session, server):
                if server.state not in (S.ACTIVE, S.SUSPENDED):
                    return
                change = servers.lift_hold if lift else servers.set_hold
                await change(session, server, kind, reason="", actor="test", now=self.clock)

        self.run(work())

    @rule(identifier=ids)
    def lose(self, identifier):
        self.apply(identifier, E.ADDRESSES_LOST)

    @rule(identifier=ids, hours=strategies.sampled_from([1, 3, 90, 9000]))
    def leave_later(self, identifier, hours):
        async def work():
            async with self.registry.change(identifier) as (session, server):
                before, at = server.state, self.clock + timedelta(hours=hours)
                possible = before in servers.NAMED_STATES and hours in (3, 90)
                try:
                    await servers.schedule_leave(
                        session, server, at=at, actor="test", reason="", now=self.clock
                    )
                except (WrongState, InvalidDocument):
                    assert not possible
                    assert server.state is before
                else:
                    assert possible
                    assert (server.state, server.leave_at) == (S.LEAVING, at)

        self.run(work())

    @rule(identifier=ids)
    def stay(self, identifier):
        async def work():
            async with self.registry.change(identifier) as (session, server):
                before = server.state
                possible = (
                    before is S.LEAVING and server.leave_at is not None and self.clock < server.leave_at
                )
                try:
                    await servers.cancel_leave(session, server, actor="test", now=self.clock)
                except WrongState:
                    assert not possible
                    assert server.state is before
                else:
                    assert possible
                    assert (server.state, server.leave_at, server.removal_due_at) == (S.VERIFIED, None, None)

        self.run(work())

    @rule(identifier=consumes(ids))
    def leave(self, identifier):
        async def work():
            async with self.registry.change(identifier) as (session, server):
                await servers.leave(session, server, actor="test", reason="", now=self.clock)

        self.run(work())

    @precondition(lambda self: self.known)
    @rule(data=strategies.data())
    def close(self, data):
        """The removal as the worker does it, once DNS shows nothing any more."""
        identifier = data.draw(strategies.sampled_from(sorted(self.known)))

        async def work():
            async with self.registry.change(identifier) as (_, server):
                lives = server.leave_at is not None and self.clock < server.leave_at
                if server.state is S.LEAVING:
                    server.srv_withdrawn_at = self.clock
                    server.name_broken_at = None if lives else self.clock
            await removal.advance(
                self.registry.database, self.registry.settings, None, identifier, self.clock
            )
            if lives:
                assert (await self.registry.get(identifier)).state is S.LEAVING, (
                    "the name lives until its day"
                )

        self.run(work())

    @rule()
    def publish(self):
        self.run(Publication(self.registry.database, self.registry.settings).look(self.clock))

    @rule(hours=strategies.sampled_from([1, 73]))
    def pass_time(self, hours):
        self.clock += timedelta(hours=hours)

        async def work():
            async with self.registry.database.transaction() as session:
                await servers.expire_unfinished(session, self.registry.settings, self.clock)

        self.run(work())

    @invariant()
    def holds(self):
        async def work():
            async with self.registry.database.transaction() as session:
                for server in await self.all(session):
                    self.check(server, await events(session, server.id))
                return [(row.name, row.released_at) for row in await self.all(session)]

        held = [name for name, released in self.run(work()) if released is None]
        assert len(held) == len(set(held)), "a name belongs to one server at a time"

    @staticmethod
    def check(server, life):
        assert (states(life[0])[0], life[0].kind) == (None, E.REGISTERED)
        for one, other in pairwise(life):
            before, after = states(other)
            assert states(one)[1] == before
            assert before != S.REMOVED, "there is no way out of REMOVED"
            assert TRANSITIONS[S(before), EventKind(other.kind)] == after
            assert one.at <= other.at
        assert (states(life[-1])[1], life[-1].at) == (server.state, server.state_since)
        held = [hold.kind for hold in server.holds if hold.lifted_at is None]
        assert len(held) == len(set(held))
        if server.state in (S.ACTIVE, S.SUSPENDED):
            assert bool(held) is (server.state is S.SUSPENDED)
        if server.state is S.LEAVING:
            assert server.removal_due_at is not None, "somebody goes on with the removal"
        elif server.state is not S.REMOVED:
            assert (server.leave_at, server.removal_due_at, server.srv_withdrawn_at) == (None, None, None)
        if server.burnt_at is not None:
            assert server.released_at is None, "a burnt name is never given again"


def test_the_life_of_servers_in_any_order(database_url, tuned, registry_of):
    profile = hypothesis.settings(
        max_examples=12, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
    )
    with asyncio.Runner() as runner:
        database = Database(database_url)
        settings = tuned(servers_per_member=1000, unproved_servers_per_member=1000)
        Life.registry, Life.run = registry_of(database, settings), staticmethod(runner.run)
        runner.run(Life.registry.open_account())
        try:
            run_state_machine_as_test(Life, settings=profile)
        finally:
            runner.run(database.close())
