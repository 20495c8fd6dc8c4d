"""Servers whose agent orders by an account of its own: what CAA names, when it may order, and the way back."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select

from nts_core.control import ProbeResult, ServerState, Stage, Validation
from poolsvc import auth, issuance, monitoring, onboarding, own_account, servers, transfers, validation
from poolsvc.errors import InvalidDocument, WrongState
from poolsvc.explain import explain
from poolsvc.models import Member, Notice, Order, OrderStatus, TokenKind
from poolsvc.pool import the_pool
from poolsvc.publication import Publication
from poolsvc.publisher import Observation

S, ST, V = ServerState, OrderStatus, Validation
HERE = "198.18.0.1"
NAME = "alice.servers.pool.example"
OURS, OWN = "https://ca.example/acct/1", "https://ca.example/acct/7"
ENDS = datetime(2027, 6, 1, tzinfo=UTC)


class Alice:
    """A server in DNS whose agent reports."""

    def __init__(self, registry, call):
        self.registry, self.settings, self._call = registry, registry.settings, call

    async def start(self):
        self.owner = await self.registry.member("Owner")
        self.id = await self.registry.server("alice", HERE, state=S.VERIFIED, member=self.owner)
        async with self.registry.change(self.id) as (session, server):
            server.joined_at = self.registry.now
            _, self.token = await auth.issue(
                session, TokenKind.AGENT, now=self.registry.now, server_id=self.id
            )
        await self.registry.open_account(OURS)
        return self

    async def sync(self, **said):
        return await self._call(self.token, "POST", "/v1/agent/sync", json={"engine": "builtin", **said})

    async def assignment(self, **said):
        answer = await self.sync(**said)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def server(self):
        return await self.registry.get(self.id)

    async def leader(self):
        leader = Publication(self.registry.database, self.settings)
        assert await leader.look(self.registry.now)
        return leader

    async def note(self, leader=None, now=None):
        """What the publication notes once every nameserver shows all of it."""
        leader = leader or await self.leader()
        leader._seen = Observation(1, {}, 60, None)
        leader._unconfirmed.clear()
        await leader._note(leader.whole(), now or self.registry.now)
        return await self.server()

    async def caa(self):
        (text,) = (await self.leader()).whole()[f"{NAME}.", "CAA"].rdatas
        return text

    async def see(self, fingerprint, **values):
        """What a probe finds."""
        found = ProbeResult(
            HERE,
            None,
            "",
            **{"offset": 0, "delay": 1000, "stratum": 2, "leap": 0, "asked": 2, "cookies": 2} | values,
            fingerprint=fingerprint,
            serial="abc",
            not_before=int((ENDS - timedelta(days=90)).timestamp()),
            not_after=int(ENDS.timestamp()),
            leaf="PEM",
        )
        self.registry.now += timedelta(minutes=1)
        async with self.registry.change(self.id) as (session, server):
            await monitoring.record(session, self.settings, server, [found], self.registry.now)
        return await self.server()

    @property
    def forgetting(self):
        return timedelta(seconds=self.settings.dns.address_ttl)


@pytest.fixture
async def alice(registry, call):
    return await Alice(registry, call).start()


async def test_the_agents_account_may_order_when_everybody_knows_the_caa_that_names_it(alice):
    told = await alice.assignment(account_uri=OWN)
    assert (told["may_order"], told["csr_for"], told["certificate"]) == (False, None, None)
    server = await alice.server()
    assert (server.own_account_uri, server.named_at, server.order_due_at) == (OWN, None, None)
    assert await alice.caa() == f'0 issue "ca.example; accounturi={OWN}; validationmethods=http-01"'
    now = datetime.now(UTC)
    server = await alice.note(now=now)
    assert server.order_due_at == now + alice.forgetting
    assert (await alice.assignment(account_uri=OWN))["may_order"] is False, "resolvers know the one before"
    async with alice.registry.change(alice.id) as (session, server):
        due = server.order_due_at
        await onboarding.admit(session, alice.settings, [server.id], due)
        assert server.counted_at == due, "the registry sees the certificate late, and counts it now"
        issuance.want(server, due)
        await session.flush()
        assert (server.orders, server.probe_due_at) == ([], due)
    assert (await alice.assignment(account_uri=OWN))["may_order"] is True
    assert (await alice.assignment(account_uri=OWN))["csr_for"] is None
    refused = await alice.assignment(account_uri="https://elsewhere.example/acct/7")
    assert (refused["account_refused"] == "", refused["may_order"]) == (False, False), "CAA names another one"


@pytest.mark.parametrize(
    "uri",
    ["", "https://elsewhere.example/acct/7", "http://ca.example/acct/7", "https://ca.example/", "x" * 5000],
)
async def test_what_is_no_account_of_the_pools_cas_is_refused_and_the_rest_is_heard(alice, uri):
    told = await alice.assignment(account_uri=uri, problem="something else")
    assert told["account_refused"] == "not the URI of an account at https://ca.example"
    server = await alice.server()
    assert (server.own_account_uri, server.named_at is None) == (None, False)
    assert server.agent_problem == "something else"
    await alice.assignment(account_uri=OWN)
    told = await alice.assignment(account_uri=uri)
    assert (told["account_refused"] == "", (await alice.server()).own_account_uri) == (False, OWN)
    assert (await alice.assignment(account_uri=OWN))["account_refused"] == ""


async def test_an_agent_whose_ca_was_taken_out_of_the_settings_is_still_heard(alice):
    await alice.assignment(account_uri=OWN)
    ca = alice.settings.ca.model_copy(update={"directory_url": "https://other.example/dir"})
    server = await alice.server()
    own_account.choose(alice.settings.model_copy(update={"ca": ca}), server, OWN)
    with pytest.raises(InvalidDocument):
        own_account.choose(alice.settings.model_copy(update={"ca": ca}), server, OWN + "1")


async def test_the_same_report_again_changes_nothing(alice):
    await alice.assignment(account_uri=OWN, validation="tls-alpn-01")
    await alice.note()
    before = await alice.server()
    await alice.assignment(account_uri=OWN, validation="tls-alpn-01")
    after = await alice.server()
    assert after.named_at is not None
    assert (before.named_at, before.order_due_at) == (after.named_at, after.order_due_at)


async def test_caa_lets_the_agents_account_use_what_its_host_answers(alice):
    await alice.assignment(account_uri=OWN, validation="tls-alpn-01")
    async with alice.registry.change(alice.id) as (_, server):
        server.dns_01 = True  # from before: only the registry could use it
    assert (await alice.caa()).endswith('validationmethods=http-01,tls-alpn-01"')


async def test_an_order_of_the_registrys_ends_when_the_agents_account_takes_over(alice):
    async with alice.registry.change(alice.id) as (_, server):
        order = Order(server_id=alice.id, status=ST.ANSWERED, created_at=alice.registry.now)
        order.url, order.authorization_url = "https://ca.example/order/1", "https://ca.example/authz/1"
        server.orders.append(order)
    await alice.assignment(account_uri=OWN)
    (order,) = (await alice.server()).orders
    assert (order.status, order.error) == (ST.FAILED, "its agent orders from now on")
    assert order.due_at is not None, "the CA ends its authorization"


async def test_what_probes_see_of_the_agents_own_is_taken_note_of_and_no_cause_for_alarm(alice):
    assert (await alice.assignment(account_uri=OWN))["seen"] is None
    await alice.note()
    server = await alice.see("0a" * 32)
    assert server.state is S.CERTIFIED
    assert (await alice.assignment(account_uri=OWN))["seen"] == "0a" * 32
    (seen,) = server.orders
    assert (seen.ca, seen.chain, seen.url) == ("ca.example", "PEM", None)
    assert issuance.is_seen(seen)
    assert not issuance.is_revocable(seen, alice.registry.now)
    assert issuance.newest(server) is None
    async with alice.registry.database.transaction() as session:
        assert (await session.scalars(select(Notice).where(Notice.kind.contains("ordered")))).all() == []


async def test_the_way_back_is_the_registrys_account_and_an_order_in_its_time(alice):
    await alice.assignment(account_uri=OWN)
    await alice.note()
    await alice.see("0a" * 32)
    await alice.assignment()
    server = await alice.server()
    assert (server.own_account_uri, server.named_at) == (None, None)
    assert OURS in await alice.caa()
    server = await alice.note()
    assert server.order_due_at == servers.renewal_at(server), "what the agent has serves until then"
    assert issuance.newest(server) is None, "it is not the registry's to hand out"
    server = await alice.see("0a" * 32)
    assert server.orders[-1].fingerprint == "0a" * 32
    assert monitoring.is_ours(server, ProbeResult(HERE, None, "", fingerprint="0a" * 32))


async def test_an_account_that_changes_before_dns_was_read_again_is_not_taken_for_seen(alice):
    for said in ({"account_uri": OWN}, {"validation": "tls-alpn-01"}):
        leader = await alice.leader()
        await alice.assignment(**said)
        assert (await alice.note(leader)).named_at is None
        assert (await alice.note()).named_at is not None


async def test_another_caa_waits_for_resolvers_and_a_first_one_for_the_absence_alone(alice):
    async with alice.registry.change(alice.id) as (_, server):
        server.burnt_at = server.named_at = None
    await alice.assignment(validation="tls-alpn-01")
    server = await alice.note()
    assert server.order_due_at == alice.registry.now + timedelta(seconds=60), "the zone's negative TTL"
    await alice.assignment(validation="http-01")
    server = await alice.server()
    assert (server.named_at, server.caa_changed) == (None, True)
    server = await alice.note()
    assert (server.order_due_at, server.caa_changed) == (alice.registry.now + alice.forgetting, False)


async def test_nothing_is_ordered_while_another_caa_is_on_its_way(alice):
    """A renewal that fell due meanwhile too, which waits for no limit."""
    async with alice.registry.change(alice.id) as (_, server):
        server.orders.append(Order(server_id=alice.id, status=ST.ISSUED, created_at=alice.registry.now))
    await alice.assignment(validation="tls-alpn-01")
    async with alice.registry.change(alice.id) as (session, server):
        server.order_due_at = alice.registry.now
        await session.flush()
        assert await onboarding.admit(session, alice.settings, [alice.id], alice.registry.now) == []
        assert server.order_due_at is None


async def test_an_agent_that_joined_again_does_not_wait_for_the_renewal_of_what_it_lost(alice):
    now = alice.registry.now
    async with alice.registry.change(alice.id) as (_, server):
        order = Order(server_id=alice.id, status=ST.ISSUED, created_at=now, url="https://ca.example/order/1")
        order.not_before, order.not_after = now, now + timedelta(days=90)
        server.orders.append(order)
        assert servers.renewal_at(server) == now + timedelta(days=60)
        server.joined_at = now + timedelta(seconds=1)
    await alice.assignment(validation="tls-alpn-01")
    assert (await alice.note()).order_due_at == now + alice.forgetting


async def test_a_server_that_is_on_its_way_out_changes_nothing_any_more(alice):
    async with alice.registry.change(alice.id) as (session, server):
        await servers.leave(session, server, actor="t", reason="", now=alice.registry.now)
    told = await alice.assignment(account_uri=OWN, validation="tls-alpn-01")
    server = await alice.server()
    assert (server.own_account_uri, server.validation, told["may_order"]) == (None, V.HTTP_01, False)


async def test_where_the_agents_account_orders_the_registrys_choices_are_refused(alice, tuned):
    await alice.assignment(account_uri=OWN)
    settings = tuned(dns_01=True)
    async with alice.registry.change(alice.id) as (session, server):
        with pytest.raises(WrongState, match="own account"):
            issuance.set_dns_01(settings, server, wanted=True)
        with pytest.raises(WrongState, match="own account"):
            await issuance.set_short_lived(session, settings, server, wanted=True)


async def test_why_it_is_not_in_dns_says_what_the_account_waits_for(alice):
    async def issuance_stage():
        async with alice.registry.database.transaction() as session:
            server, pool = await servers.find(session, "alice"), await the_pool(session, alice.settings)
            views = explain(server, pool, alice.settings, active=0)
        return next(view for view in views if view.stage is Stage.ISSUANCE)

    await alice.assignment(account_uri=OWN)
    assert (await issuance_stage()).detail == "on the way into DNS"
    server = await alice.note()
    assert (
        await issuance_stage()
    ).detail == f"your account may order from {server.order_due_at.isoformat()} on"


async def test_a_server_that_moves_keeps_its_agent_and_so_its_account(alice):
    await alice.assignment(account_uri=OWN)
    other, now = await alice.registry.member("Other"), alice.registry.now
    async with alice.registry.database.transaction("test") as session:
        opaque_id = (await session.get_one(Member, other)).opaque_id
        offer = await transfers.offer(session, alice.settings, alice.id, opaque_id, now)
        await transfers.accept(session, alice.settings, offer.id, now)
    server = await alice.server()
    assert (server.member_id, server.own_account_uri) == (other, OWN)


async def test_what_the_agent_says_of_its_host_is_seen_by_its_member(alice, call):
    await alice.assignment(validation="redirect")
    token = await alice.registry.owner_token(alice.owner)
    view = (await call(token, "GET", "/v1/servers/alice")).json()
    assert view["agent"]["validation"] == "redirect"
    await alice.assignment(validation="carrier-pigeon")
    assert (await alice.server()).validation is V.HTTP_01
    for bad in (7, None, ["http-01"], {"a": 1}):
        assert (await alice.sync(validation=bad)).status_code == 422
        assert (await alice.sync(account_uri=bad)).status_code == (200 if bad is None else 422)


async def test_a_tls_challenge_is_relayed_by_its_digest(alice):
    key_authorization = "t" * 43 + "." + "k" * 43
    await alice.assignment(validation="tls-alpn-01")
    async with alice.registry.change(alice.id) as (_, server):
        order = Order(server_id=alice.id, status=ST.PENDING, created_at=alice.registry.now)
        order.validation, order.token, order.key_authorization = (
            V.TLS_ALPN_01,
            "t" * 43,
            key_authorization,
        )
        server.orders.append(order)
    told = await alice.assignment(validation="tls-alpn-01")
    (challenge,) = told["tls_challenges"]
    assert (told["challenges"], told["tls_port"]) == ([], alice.settings.ports.tls)
    assert set(challenge) == {"digest"}
    assert "k" * 43 not in str(told)
    assert validation.is_served(order, (challenge["digest"],))
