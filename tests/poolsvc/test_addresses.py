"""Addresses live singly: listed, proved, confirmed and withdrawn each by itself, and the state follows them."""

import asyncio
import base64
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import select

from member_agent.challenges import Responder
from nts_core.control import PROOF_PATH, ProbeResult, ServerState, Stage, proof_statement
from poolsvc import addresses, monitoring, notices, proofs, servers
from poolsvc.errors import AddressTaken, InvalidAddress, InvalidDocument
from poolsvc.models import Event, HoldKind, Notice, Order, OrderStatus
from poolsvc.pool import the_pool
from poolsvc.publication import Publication

S = ServerState
ONE, TWO, SIX = "198.18.0.1", "198.18.0.2", "fd00::1"
DAY = timedelta(days=1)


async def change(registry, server_id, listed=None, *, ipv4=True, ipv6=True):
    async with registry.change(server_id) as (session, server):
        await addresses.change(
            session,
            registry.settings,
            server,
            listed=listed,
            ipv4=ipv4,
            ipv6=ipv6,
            actor="user 1",
            now=registry.now,
        )
    return await registry.get(server_id)


def listed(server):
    return {row.address: row.proved_at is not None for row in server.addresses}


async def withdraw(registry, after):
    await addresses.withdraw_stale(registry.database, registry.settings, registry.now + after)


async def told(registry, server_id):
    """What was said about withdrawn addresses: the notices and the events."""
    async with registry.database.transaction() as session:
        said = await session.scalars(
            select(Notice).where(
                Notice.server_id == server_id, Notice.kind == notices.NoticeKind.ADDRESS_WITHDRAWN
            )
        )
        noted = await session.scalars(
            select(Event).where(Event.server_id == server_id, Event.kind == "address-withdrawn")
        )
        return [notice.data["address"] for notice in said], [event.before["address"] for event in noted]


async def test_an_added_address_waits_for_its_proof_and_a_removed_one_goes_at_once(registry):
    server = await registry.server("alice", ONE, SIX, state=S.ACTIVE)
    found = await change(registry, server, [TWO, SIX])
    assert listed(found) == {SIX: True, TWO: False}
    assert (found.state, servers.published_addresses(found)) == (S.ACTIVE, [SIX])
    assert proofs.wants_call(registry.settings, found.addresses[-1], registry.now)


async def test_a_list_that_changes_nothing_keeps_proofs_and_scores(registry):
    server = await registry.server("alice", ONE, SIX, state=S.ACTIVE)
    before = await registry.get(server)
    found = await change(registry, server, [SIX, ONE])
    assert [(row.id, row.proved_at, row.score) for row in found.addresses] == [
        (row.id, row.proved_at, row.score) for row in before.addresses
    ]


@pytest.mark.parametrize("state", [S.VERIFIED, S.CERTIFIED, S.ACTIVE, S.SUSPENDED])
async def test_without_a_proved_address_a_server_is_registered_again_and_out_of_dns(registry, state):
    server = await registry.server("alice", ONE, state=state)
    await registry.open_account()
    async with registry.database.transaction() as session:
        (await the_pool(session, registry.settings)).opened_at = registry.now
    leader = Publication(registry.database, registry.settings)
    await leader.look(registry.now)
    assert (f"alice.servers.{registry.settings.pool}.", "A") in leader.whole()
    found = await change(registry, server, [TWO])
    assert (found.state, found.named_at, found.listed_at) == (S.REGISTERED, None, None)
    assert found.burnt_at == registry.now
    await leader.look(registry.now)
    assert not any("alice" in owner for owner, _ in leader.whole())
    assert not any("alice" in text for rrset in leader.whole().values() for text in rrset.rdatas)
    async with registry.database.transaction() as session:
        await servers.expire_unfinished(session, registry.settings, registry.now + 900 * DAY)
    assert (await registry.get(server)).state is S.REGISTERED, "a burnt name does not expire"


async def test_what_was_lost_is_raised_again_from_the_beginning_by_proof_and_probes_alone(registry):
    """The score hold goes with the scores, or it could never be lifted; other holds stay."""
    server = await registry.server("alice", ONE, state=S.ACTIVE)
    async with registry.change(server) as (session, row):
        for kind in (HoldKind.SCORE, HoldKind.OPERATOR):
            await servers.set_hold(session, row, kind, reason="r", actor="a", now=registry.now)
    found = await change(registry, server, [TWO])
    assert {hold.kind: hold.lifted_at is None for hold in found.holds} == {
        HoldKind.SCORE: False,
        HoldKind.OPERATOR: True,
    }
    async with registry.change(server) as (session, row):
        row.addresses[0].proved_at = registry.now
        await addresses.settle(session, row, actor="worker", reason="proved", now=registry.now)
        assert row.state is S.VERIFIED
        assert (row.addresses[0].score, row.addresses[0].full_probes) == (None, 0)


async def test_a_certificate_from_before_is_probed_at_once_and_renewed_in_its_time(registry):
    server = await registry.server("alice", ONE, state=S.ACTIVE)
    async with registry.change(server) as (session, row):
        session.add(
            Order(
                server_id=server,
                status=OrderStatus.ISSUED,
                created_at=registry.now,
                not_before=registry.now,
                not_after=registry.now + 90 * DAY,
            )
        )
    await change(registry, server, [TWO])
    async with registry.change(server) as (session, row):
        row.addresses[0].proved_at = registry.now
        await addresses.settle(session, row, actor="worker", reason="proved", now=registry.now)
        assert row.probe_due_at == registry.now
        assert servers.renewal_at(row) == registry.now + 60 * DAY


@pytest.mark.parametrize(
    ("ipv4", "ipv6", "published"), [(True, True, [ONE, SIX]), (True, False, [ONE]), (False, True, [SIX])]
)
async def test_only_addresses_of_the_wanted_families_are_published(registry, ipv4, ipv6, published):
    server = await registry.server("alice", ONE, SIX, state=S.ACTIVE)
    found = await change(registry, server, ipv4=ipv4, ipv6=ipv6)
    assert servers.published_addresses(found) == published
    assert found.state is S.ACTIVE
    assert listed(found) == {ONE: True, SIX: True}, "a proof is kept while the family is off"


async def test_both_families_off_is_refused(registry):
    server = await registry.server("alice", ONE, SIX, state=S.ACTIVE)
    with pytest.raises(InvalidDocument, match="neither family"):
        await change(registry, server, ipv4=False, ipv6=False)
    assert (await registry.get(server)).ipv4


async def test_the_family_of_the_only_address_off_and_on_again(registry):
    server = await registry.server("alice", ONE, state=S.ACTIVE)
    assert (await change(registry, server, ipv4=False)).state is S.REGISTERED
    assert (await change(registry, server)).state is S.VERIFIED


async def test_a_bad_score_of_a_family_that_is_off_neither_holds_nor_saves_a_server(registry):
    registry.settings = registry.settings.model_copy(
        update={"policy": registry.settings.policy.model_copy(update={"opening_size": 1})}
    )
    await registry.server("other", "198.18.5.5", state=S.ACTIVE)
    server = await registry.server("alice", ONE, SIX, state=S.ACTIVE)
    async with registry.change(server) as (session, row):
        row.ipv6 = False
        row.addresses[0].score, row.addresses[1].score = -50.0, 20.0
        bad = ProbeResult(ONE, Stage.TCP, "no answer")
        await monitoring.record(session, registry.settings, row, [bad], registry.now)
        assert row.state is S.SUSPENDED


@pytest.mark.parametrize(
    ("listing", "error"),
    [
        ([], InvalidAddress),
        (["alice"], InvalidAddress),
        ([ONE, ONE], InvalidAddress),
        (["224.0.0.1"], InvalidAddress),
        ([ONE, "198.18.7.7"], AddressTaken),
    ],
)
async def test_a_bad_list_changes_nothing(registry, listing, error):
    await registry.server("bob", "198.18.7.7", state=S.VERIFIED)
    server = await registry.server("alice", ONE, SIX, state=S.ACTIVE)
    with pytest.raises(error) as caught:
        await change(registry, server, listing)
    assert caught.value.field == "addresses"
    assert listed(await registry.get(server)) == {ONE: True, SIX: True}


async def test_an_unproved_address_is_dropped_alone_after_a_week(registry):
    server = await registry.server("alice", ONE, state=S.ACTIVE)
    await change(registry, server, [ONE, TWO])
    await withdraw(registry, 7 * DAY - timedelta(seconds=1))
    assert listed(await registry.get(server)) == {ONE: True, TWO: False}
    await withdraw(registry, 7 * DAY)
    found = await registry.get(server)
    assert (found.state, listed(found)) == (S.ACTIVE, {ONE: True})
    assert await told(registry, server) == ([TWO], [TWO])


async def test_the_last_address_stays_listed(registry):
    server = await registry.server("alice", ONE)
    await withdraw(registry, 8 * DAY)
    await withdraw(registry, 16 * DAY)
    assert listed(await registry.get(server)) == {ONE: False}
    assert await told(registry, server) == ([], [])


async def test_a_proved_address_that_nothing_confirms_is_asked_for_then_withdrawn_alone(registry):
    server = await registry.server("alice", ONE, SIX, state=S.ACTIVE)
    async with registry.change(server) as (_, row):
        row.addresses[1].confirmed_at = registry.now + 30 * DAY

    async def asked(after):
        rows = (await registry.get(server)).addresses
        return [proofs.wants_call(registry.settings, row, registry.now + after) for row in rows]

    assert await asked(30 * DAY - timedelta(seconds=1)) == [False, False]
    assert await asked(30 * DAY) == [True, False]
    ends = [addresses.proof_ends_at(row, registry.settings) for row in (await registry.get(server)).addresses]
    assert ends == [registry.now + 37 * DAY, registry.now + 67 * DAY]
    await withdraw(registry, 37 * DAY - timedelta(seconds=1))
    found = await registry.get(server)
    assert servers.published_addresses(found) == [ONE, SIX], "it stays published until then"
    await withdraw(registry, 37 * DAY)
    found = await registry.get(server)
    assert (found.state, servers.published_addresses(found)) == (S.ACTIVE, [SIX])
    assert "37 days" in found.addresses[0].proof_error
    assert (found.addresses[0].score, found.addresses[1].score) == (None, 12.0)
    assert await told(registry, server) == ([ONE], [ONE])
    assert await asked(37 * DAY) == [True, False]
    await withdraw(registry, 44 * DAY)
    assert listed(await registry.get(server)) == {SIX: True}


async def test_a_server_whose_last_address_is_withdrawn_is_registered_again(registry):
    server = await registry.server("alice", ONE, state=S.ACTIVE)
    await withdraw(registry, 37 * DAY)
    found = await registry.get(server)
    assert (found.state, listed(found)) == (S.REGISTERED, {ONE: False})
    async with registry.database.transaction() as session:
        last = (await session.scalars(select(Event).where(Event.kind == "addresses-lost"))).one()
    assert (last.actor, last.before, last.after) == ("worker", {"state": "active"}, {"state": "registered"})


@pytest.mark.parametrize("state", [S.LEAVING, S.REMOVED])
async def test_addresses_of_a_server_that_leaves_are_left_alone(registry, state):
    server = await registry.server("alice", ONE, SIX, state=state)
    await withdraw(registry, 900 * DAY)
    assert listed(await registry.get(server)) == {ONE: True, SIX: True}


async def test_a_probe_that_sees_the_ordered_certificate_confirms_its_address_only(registry):
    server = await registry.server("alice", ONE, SIX, state=S.ACTIVE)
    async with registry.database.transaction() as session:
        session.add(
            Order(
                server_id=server,
                status=OrderStatus.ISSUED,
                created_at=registry.now,
                fingerprint="0a" * 32,
                chain="PEM",
            )
        )
    results = [
        ProbeResult(ONE, Stage.OFFSET, "1 s off", offset=10**9, stratum=2, fingerprint="0a" * 32),
        ProbeResult(SIX, None, "", offset=0, stratum=2, fingerprint="0b" * 32),
    ]
    later = registry.now + DAY
    async with registry.change(server) as (session, row):
        await monitoring.record(session, registry.settings, row, results, later)
    assert [row.confirmed_at for row in (await registry.get(server)).addresses] == [later, registry.now]


class Agents:
    """Two servers that claim one address, each with an agent that answers there."""

    def __init__(self, registry, responder):
        self.registry, self.responder = registry, responder
        self.key = Ed25519PrivateKey.generate()

    async def call(self, name):
        server_id = await self.registry.server(name, "127.0.0.1")
        public = base64.b64encode(self.key.public_key().public_bytes_raw()).decode()
        async with self.registry.change(server_id) as (session, server):
            server.agent_key = public
            nonce = await proofs.call(
                session, self.registry.settings, server, "127.0.0.1", "127.0.0.1", self.registry.now
            )
        statement = proof_statement(pool="pool.example", server=name, address="127.0.0.1", nonce=nonce)
        domain = self.registry.settings.domain_of(name)
        self.responder.publish(domain, PROOF_PATH + nonce, base64.b64encode(self.key.sign(statement)))
        return server_id, (await self.registry.get(server_id)).addresses[0].id


async def test_of_two_servers_that_prove_one_address_at_once_one_gets_it(postgresql, settings, registry_of):
    names = ("alice", "bob")
    async with Responder([settings.domain_of(name) for name in names]) as responder:
        await responder.listen(("127.0.0.1", 0))
        ports = settings.ports.model_copy(update={"http": responder.endpoints[0][1]})
        policy = settings.policy.model_copy(update={"proofs_per_hour": 9, "proofs_per_hour_and_prefix": 9})
        registry = registry_of(postgresql, settings.model_copy(update={"ports": ports, "policy": policy}))
        agents = Agents(registry, responder)
        called = [await agents.call(name) for name in names]
        await asyncio.gather(
            *(proofs.prove(postgresql, registry.settings, address, registry.now) for _, address in called)
        )
    found = [await registry.get(server) for server, _ in called]
    assert sorted(server.state for server in found) == [S.REGISTERED, S.VERIFIED]
    (loser,) = (server for server in found if server.state is S.REGISTERED)
    assert "another server" in loser.addresses[0].proof_error


async def test_a_failed_proof_again_takes_nothing_yet_and_is_told(registry):
    async with Responder([registry.settings.domain_of("alice")]) as responder:
        await responder.listen(("127.0.0.1", 0))
        ports = registry.settings.ports.model_copy(update={"http": responder.endpoints[0][1]})
        registry.settings = registry.settings.model_copy(update={"ports": ports})
        server, address = await Agents(registry, responder).call("alice")
        await proofs.prove(registry.database, registry.settings, address, registry.now)
        later = registry.now + 31 * DAY
        async with registry.change(server) as (session, row):
            nonce = await proofs.call(session, registry.settings, row, "127.0.0.1", "127.0.0.1", later)
        responder.replace(registry.settings.domain_of("alice"), {PROOF_PATH + nonce: b"<html>"})
        await proofs.prove(registry.database, registry.settings, address, later)
        row = (await registry.get(server)).addresses[0]
        assert (row.proved_at, row.confirmed_at) == (registry.now, registry.now)
        assert "not a signature" in row.proof_error
