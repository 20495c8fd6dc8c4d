"""Orders whose challenge the registry answers in DNS: at a strict Pebble that asks a DNS server, and in a real Knot."""

import base64
import hashlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import dns.message
import dns.query
import pytest
from sqlalchemy import select

from nts_core.acme import AcmeError, Challenge, OrderState
from nts_core.control import ServerState
from nts_core.tls import new_key_and_csr
from poolsvc import issuance, own_account, servers
from poolsvc.acme_process import RULES, Charge
from poolsvc.models import Order, OrderStatus, RevocationOrder, Server, ZoneChange
from poolsvc.publication import Publication

S, ST = ServerState, OrderStatus
NAME = "alice.servers.pool.example"
OWNER, TEXT = f"{NAME}.", f"_acme-challenge.{NAME}."
BOTH = pytest.mark.parametrize("engine", ["sqlite", "postgresql"], indirect=True)


async def test_the_ca_finds_the_text_that_its_challenge_asks_for(lab, txt):
    account = await lab.account(lab.pebble())
    order = await account.order(new_key_and_csr(NAME)[1], NAME, challenge=Challenge.DNS_01)
    digest = hashlib.sha256(f"{order.token}.{account._network.thumbprint}".encode()).digest()
    assert order.txt == base64.urlsafe_b64encode(digest).decode().rstrip("=")
    assert order.key_authorization is None, "nobody is to serve it"
    txt[TEXT] = ["of an order before", order.txt]
    await account.answer(order.challenge_url)
    assert (await lab.decided(account, order.url)).status is OrderState.READY


@pytest.mark.parametrize("texts", [[], ["another text"]])
async def test_without_the_text_the_order_fails_with_the_cas_words(lab, txt, texts):
    account = await lab.account(lab.pebble())
    order = await account.authorize(NAME, Challenge.DNS_01)
    txt[TEXT] = texts
    await account.answer(order.challenge_url)
    status = await lab.decided(account, order.url)
    assert status.status is OrderState.INVALID
    assert status.error_detail.startswith("unauthorized: ")


def test_the_process_with_the_key_proves_in_dns_for_servers_of_the_pool_alone(settings):
    web = {
        "public_url": "https://registry.example.net",
        "web_tls": {"acme": True},
        "policy": {"dns_01": True},
    }
    charge = Charge.of(type(settings).model_validate(settings.model_dump() | web), settings.ca)
    host = {"csr_pem": "", "domain": "registry.example.net"}
    RULES["order"](charge, host | {"challenge": Challenge.HTTP_01})
    for call, arguments in (
        ("order", host | {"challenge": Challenge.DNS_01}),
        ("authorize", host | {"challenge": Challenge.DNS_01}),
        ("authorize", {"domain": "servers.pool.example", "challenge": Challenge.DNS_01}),
    ):
        with pytest.raises(AcmeError) as caught:
            RULES[call](charge, arguments)
        assert (caught.value.code, caught.value.permanent) == ("refused", True)
    for is_let in (True, False):
        of_server = {"csr_pem": "", "domain": NAME, "challenge": Challenge.DNS_01}
        charge = replace(charge, dns_01=is_let)
        RULES["authorize"](charge, of_server)
        if is_let:
            RULES["order"](charge, of_server)
        else:
            with pytest.raises(AcmeError, match=r"policy\.dns_01"):
                RULES["order"](charge, of_server)


@pytest.fixture
async def chosen(flow):
    """A server whose member chose that the registry answers, where the policy lets it; no agent serves anything."""
    made = await flow()
    policy = made.settings.policy.model_copy(update={"dns_01": True})
    made.settings = made.registry.settings = made.settings.model_copy(update={"policy": policy})
    async with made.registry.change(made.server_id) as (_, server):
        issuance.set_dns_01(made.settings, server, wanted=True)
    return made


async def shown(flow):
    """As the publication notes it once every nameserver shows the text."""
    async with flow.registry.change(flow.server_id) as (_, server):
        server.orders[-1].served_at = server.orders[-1].due_at = flow.now


@BOTH
async def test_an_order_is_answered_in_dns_and_the_agent_is_asked_for_nothing_but_a_key(chosen, txt):
    account = await chosen.account()
    await chosen.begin()
    order = await chosen.step(account)
    assert (order.status, order.due_at, order.served_at) == (ST.PENDING, None, None)
    server = await chosen.server()
    assert issuance.challenges(server) == ()
    async with chosen.registry.change(chosen.server_id) as (_, row):
        issuance.note_serving(row, (order.token,), chosen.now)
    assert (await chosen.order()).served_at is None, "what an agent says is not what nameservers show"
    txt[TEXT] = [order.txt]
    await shown(chosen)
    assert (await chosen.step(account)).status is ST.ANSWERED, "nothing listens on port 80"
    found = await chosen.until(ST.ISSUED)
    assert (await chosen.step(account)).deactivated_at is not None
    assert found.txt == order.txt


def test_the_text_of_a_rehearsal_is_nothing_to_the_real_ca():
    order = Order(ca="staging.example", status=ST.FINALIZING, txt="a-text", served_at=datetime.now(UTC))
    issuance._begin_at("ca.example")(order, datetime.now(UTC))
    assert (order.status, order.txt, order.served_at) == (ST.REQUESTED, None, None)


async def test_where_the_policy_is_taken_back_the_host_answers_again(chosen):
    policy = chosen.settings.policy.model_copy(update={"dns_01": False})
    chosen.settings = chosen.settings.model_copy(update={"policy": policy})
    await chosen.begin()
    order = await chosen.step(await chosen.account())
    assert (order.txt, order.key_authorization is None) == (None, False)


class Zone:
    """One server whose zone is on Knot, with a leader."""

    def __init__(self, registry, knot):
        self.registry, self.knot, self.now = registry, knot, datetime(2026, 3, 1, 12, tzinfo=UTC)
        self.begin()

    def begin(self):
        """A leader that knows nothing yet."""
        self.publication = Publication(self.registry.database, self.registry.settings)

    async def passes(self, times=1):
        for _ in range(times):
            self.now += timedelta(seconds=1)
            assert await self.publication.look(self.now)
            if self.publication.is_due(self.now):
                await self.publication.publish(1, self.now)

    def ask(self, owner, kind):
        query = dns.message.make_query(owner, kind)
        answer = dns.query.udp(query, self.knot.address, timeout=5, port=self.knot.port)
        return sorted(rdata.to_text() for rrset in answer.answer for rdata in rrset)

    async def order(self, **values):
        """A new order of the server, with its text."""
        async with self.registry.change(self.server) as (session, server):
            session.add(
                Order(server_id=server.id, status=ST.REQUESTED, created_at=self.now, csr="x", url="https://x")
            )
        await self.set(**{"status": ST.PENDING, "txt": "a-text", **values})

    async def set(self, **values):
        async with self.registry.change(self.server) as (_, server):
            for name, value in values.items():
                setattr(server.orders[-1], name, value)

    async def newest(self):
        return (await self.registry.get(self.server)).orders[-1]


@pytest.fixture
async def zone(database, knot, published_by, registry_of):
    settings = published_by(
        reconcile_interval=60, full_pass_interval=600, dns_01=True, dns={"address_ttl": 7}
    )
    registry = registry_of(database, settings)
    await registry.open_account()
    zone = Zone(registry, knot)
    zone.server = await registry.server("alice", "192.0.2.1", state=S.VERIFIED)
    await zone.publication.look(zone.now)
    await zone.publication.publisher.take_fence(1)
    await zone.passes()
    return zone


async def test_the_text_is_there_while_the_ca_may_look_and_no_longer(zone):
    assert zone.ask(TEXT, "TXT") == []
    await zone.order()
    await zone.passes()
    assert zone.ask(TEXT, "TXT") == ['"a-text"']
    order = await zone.newest()
    assert order.served_at >= zone.now
    assert order.due_at == order.served_at + timedelta(seconds=7), "until resolvers forget what was there"
    assert "validationmethods=http-01,dns-01" in zone.ask(OWNER, "CAA")[0]
    await zone.set(status=ST.ANSWERED)
    await zone.passes()
    assert zone.ask(TEXT, "TXT") == ['"a-text"']
    assert (await zone.newest()).due_at == order.due_at, "it is told once"
    await zone.set(status=ST.FINALIZING)
    await zone.passes()
    assert zone.ask(TEXT, "TXT") == []
    assert zone.ask(OWNER, "CAA")[0].endswith('validationmethods=http-01"'), "no more than it takes"
    await zone.order(txt="b-text")
    await zone.passes()
    assert zone.ask(TEXT, "TXT") == ['"b-text"']


async def end_by_failure(zone, _session, server):
    server.orders[-1].status = ST.FAILED


async def end_by_a_new_agent(zone, _session, server):
    issuance.start_anew(server, zone.now)


async def end_by_leaving(zone, session, server):
    await servers.leave(session, server, actor="test", reason="", now=zone.now)


async def end_by_lost_addresses(zone, session, server):
    await servers.apply(
        session, server, servers.EventKind.ADDRESSES_LOST, actor="test", reason="", now=zone.now
    )


@pytest.mark.parametrize(
    "end",
    [end_by_failure, end_by_a_new_agent, end_by_leaving, end_by_lost_addresses],
    ids=lambda end: end.__name__,
)
async def test_whatever_ends_the_order_ends_the_text(zone, end):
    await zone.order()
    await zone.passes()
    assert zone.ask(TEXT, "TXT")
    async with zone.registry.change(zone.server) as (session, server):
        await end(zone, session, server)
    await zone.passes()
    assert zone.ask(TEXT, "TXT") == []
    zone.begin()
    await zone.passes(2)
    assert zone.ask(TEXT, "TXT") == []


async def test_a_leader_that_dies_between_publishing_and_noting_leaves_it_to_the_next(zone):
    await zone.order()
    await zone.publication.look(zone.now)
    await zone.publication._bring(zone.publication.publisher, 1, zone.now)
    assert zone.ask(TEXT, "TXT") == ['"a-text"']
    assert (await zone.newest()).served_at is None
    zone.begin()
    await zone.passes()
    assert (await zone.newest()).served_at is not None


async def test_with_the_primary_away_the_ca_is_not_told_to_look(zone):
    zone.knot.stop()
    await zone.order()
    with pytest.raises(Exception, match="refused"):
        await zone.passes()
    assert (await zone.newest()).served_at is None
    zone.knot.start()
    await zone.passes(2)
    assert (await zone.newest()).served_at is not None


async def test_an_order_that_has_ended_meanwhile_is_not_woken(zone):
    await zone.order()
    await zone.publication.look(zone.now)
    await zone.set(status=ST.FAILED)
    await zone.publication.publish(1, zone.now)
    order = await zone.newest()
    assert (order.served_at, order.due_at) == (None, None)


async def test_what_the_member_chose_is_in_caa_before_there_is_an_order(zone):
    async with zone.registry.change(zone.server) as (_, server):
        issuance.set_dns_01(zone.registry.settings, server, wanted=True)
    await zone.passes()
    assert "validationmethods=http-01,dns-01" in zone.ask(OWNER, "CAA")[0]


async def test_orders_that_the_host_answers_are_nothing_to_dns(zone):
    await zone.order(txt=None)
    await zone.set(status=ST.ANSWERED)
    async with zone.registry.database.transaction() as session:
        assert list(await session.scalars(select(ZoneChange.id))) == []


@pytest.fixture
async def departing(zone):
    """A server without an agent that leaves in an emergency, whose member's account ordered something."""
    zone.server = await zone.registry.server("carol", "192.0.2.3", state=S.ACTIVE, agentless=True)
    async with zone.registry.change(zone.server) as (session, server):
        own_account.choose(zone.registry.settings, server, "https://ca.example/acct/7")
        await session.flush()
    await zone.passes()
    async with zone.registry.change(zone.server) as (session, server):
        await servers.leave(session, server, actor="t", reason="", now=zone.now, emergency=True)
        server.revoking_since = zone.now
    return zone


def proof(server, **values):
    return RevocationOrder(
        server_id=server,
        ca="ca.example",
        created_at=datetime(2026, 3, 1, tzinfo=UTC),
        url="https://ca.example/order/1",
        authorization_url="https://ca.example/authz/1",
        txt="c-text",
        **values,
    )


CAROL, CAROLS_TEXT = "carol.servers.pool.example.", "_acme-challenge.carol.servers.pool.example."


async def test_while_the_registry_proves_control_nothing_but_that_is_left_of_the_name(departing):
    zone = departing
    async with zone.registry.database.transaction() as session:
        session.add(proof(zone.server))
    await zone.passes(2)
    ours = '0 issue "ca.example; accounturi=https://ca.example/acct/1; validationmethods=dns-01"'
    assert zone.ask(CAROL, "CAA") == [ours]
    assert zone.ask(CAROL, "A") == [], "clients wait for no CA"
    assert zone.ask(CAROLS_TEXT, "TXT") == ['"c-text"']
    found = await zone.registry.get(zone.server)
    assert None not in (found.srv_withdrawn_at, found.name_broken_at, found.caa_turned_at)
    assert found.caa_closed_at is None
    async with zone.registry.database.transaction() as session:
        row = (await session.scalars(select(RevocationOrder))).one()
        assert row.due_at == row.served_at + timedelta(seconds=7)
        row.ended_at = zone.now
        (await session.get(Server, zone.server)).revoking_ended_at = zone.now
    await zone.passes()
    assert zone.ask(CAROL, "CAA") == zone.ask(CAROLS_TEXT, "TXT") == []
    closed = (await zone.registry.get(zone.server)).caa_closed_at
    assert closed >= zone.now
    zone.begin()
    await zone.passes(2)
    assert (await zone.registry.get(zone.server)).caa_closed_at == closed
    assert not zone.publication.is_due(zone.now), "nobody waits for anything"


async def test_a_leader_that_begins_while_control_is_proved_leaves_it_as_it_is(departing):
    zone = departing
    async with zone.registry.database.transaction() as session:
        session.add(proof(zone.server))
    await zone.passes(2)
    before = zone.ask("pool.example.", "SOA")
    zone.begin()
    await zone.passes(2)
    assert zone.ask("pool.example.", "SOA") == before
