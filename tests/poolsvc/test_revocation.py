"""Servers without an agent that leave: control of the name is proved by a real Pebble's DNS queries, and what was seen is revoked.

The front before Pebble obeys CAA, and lets an account revoke by its authorizations. DNS answers what the registry wants
in its zone, as soon as `publish` says so.
"""

import time
from datetime import timedelta

import pytest
from sqlalchemy import select, update

from lab.ca_front import Fault, Resource
from nts_core.acme import AcmeAccount, AcmeError, OrderState
from nts_core.certificates import chain_facts, load_chain
from nts_core.control import ACME_PATH, ProbeResult, ServerState
from nts_core.tls import new_key_and_csr
from poolsvc import issuance, monitoring, onboarding, own_account, removal, servers
from poolsvc.authorities import UNKNOWN_CA
from poolsvc.config import AuthoritySettings
from poolsvc.db import LEASE
from poolsvc.errors import WrongState
from poolsvc.models import Order, RevocationOrder
from poolsvc.pool import the_pool
from poolsvc.publication import Publication
from poolsvc.publisher import Observation

S = ServerState
NAME = "alice.servers.pool.example"
OWNER, TEXT, PARENT = f"{NAME}.", f"_acme-challenge.{NAME}.", "servers.pool.example."
BOTH = pytest.mark.parametrize("engine", ["sqlite", "postgresql"], indirect=True)
SECOND, DAY = timedelta(seconds=1), timedelta(days=1)
HERE = "127.0.0.1"


class Departure:
    """The server alice, whose member has a certificate by an account of its own at the pool's CA."""

    def __init__(self, flow, caa, txt):
        self.flow, self.registry, self.caa, self.txt = flow, flow.registry, caa, txt
        self.database, self.lab = flow.database, flow.lab

    async def start(self, *, with_agent=False):
        """With an agent: it has a certificate of the registry's as well, from before its own account."""
        ca = self.flow.ca
        update = {"directory_url": ca.directory_url, "account_key_file": self.lab.directory / "pool.pem"}
        settings = self.flow.settings.model_copy(
            update={"ca": self.flow.settings.ca.model_copy(update={**update, "ca_file": ca.ca_file})}
        )
        self.settings = self.registry.settings = self.flow.settings = settings
        self.account = await (self.flow.account() if with_agent else self.open_account("pool.pem"))
        await self.registry.open_account(self.account.uri)
        if with_agent:
            await self.publish()
            self.before = await self.flow.certified()
        own = await self.open_account("own.pem")
        async with self.registry.change(self.flow.server_id) as (_, server):
            server.agentless = not with_agent
            own_account.choose(settings, server, own.uri)
        await self.publish()
        self.chain = await self.order_as(own)
        await self.see(self.chain)
        return self

    async def open_account(self, file):
        config = self.lab.config(self.flow.ca)
        config = type(config)(config.directory_url, self.lab.directory / file, ca_file=config.ca_file)
        account = await AcmeAccount.open(config)
        self.lab.callback(account.close)
        return account

    async def order_as(self, account):
        """As the member's ACME client does it, on port 80."""
        csr = new_key_and_csr(NAME)[1]
        order = await account.order(csr, NAME)
        if order.token is not None:
            self.lab.responder.publish(NAME, ACME_PATH + order.token, order.key_authorization.encode())
            await account.answer(order.challenge_url)
        end, finalized = time.monotonic() + 20, False
        while (status := (await account.poll(order.url)).status) is not OrderState.VALID:
            assert time.monotonic() < end, status
            assert status is not OrderState.INVALID
            if status is OrderState.READY and not finalized:
                await account.finalize(order.url, csr)
                finalized = True
        return await account.download(order.url)

    async def see(self, chain, *, leaf=True):
        """What a probe finds."""
        facts = chain_facts(chain)
        self.flow.now += SECOND
        found = ProbeResult(
            HERE,
            None,
            "",
            fingerprint=facts.fingerprint,
            serial=facts.serial,
            not_before=int(facts.not_before.timestamp()),
            not_after=int(facts.not_after.timestamp()),
            leaf=chain[: chain.index("-----END")] + "-----END CERTIFICATE-----\n" if leaf else None,
        )
        async with self.registry.change(self.flow.server_id) as (session, server):
            await monitoring.record(session, self.settings, server, [found], self.flow.now)

    async def server(self):
        return await self.flow.server()

    async def leave(self, *, emergency=True):
        async with self.registry.change(self.flow.server_id) as (session, server):
            await servers.leave(
                session, server, actor="user 1", reason="enough", now=self.flow.now, emergency=emergency
            )

    async def publish(self, *, noted=True):
        """The zone as it should be is what DNS answers, and every nameserver was seen to show it."""
        leader = Publication(self.database, self.settings)
        assert await leader.look(self.flow.now)
        zone = leader.whole()
        self.caa.clear()
        self.txt.clear()
        for (owner, kind), rrset in zone.items():
            if kind == "CAA":
                self.caa[owner] = sorted(rrset.rdatas)
            elif owner.startswith("_acme-challenge."):
                self.txt[owner] = sorted(text.strip('"') for text in rrset.rdatas)
        if noted:
            leader._seen = Observation(1, {}, 2, None)
            leader._unconfirmed.clear()
            await leader._note(zone, self.flow.now)
        return zone

    async def advance(self, account=None, after=SECOND):
        """The worker's pass over the removal, some time later."""
        self.flow.now += after

        async def accounts(name, _now):
            assert name == self.settings.ca.name
            return account or self.account

        await removal.advance(self.database, self.settings, accounts, self.flow.server_id, self.flow.now)
        return await self.server()

    async def to_the_end(self, *, account=None, passes=200):
        """Passes of leader and worker until the server is out."""
        for _ in range(passes):
            await self.publish()
            server = await self.advance(account, after=timedelta(minutes=1))
            if server.state is S.REMOVED:
                return server
        raise AssertionError(f"never removed: {self.receipt(server)}")

    async def attempts(self):
        async with self.database.transaction() as session:
            return list(await session.scalars(select(RevocationOrder).order_by(RevocationOrder.id)))

    def receipt(self, server):
        return removal.receipt(server, self.settings)

    @property
    def serial(self):
        return chain_facts(self.chain).serial


@pytest.fixture
def departure(flow, caa, txt):
    """Makes a Departure; options are those of `flow`."""

    async def make(*, with_agent=False, **options):
        made = Departure(await flow(**{"front": {}, **options}), caa, txt)
        return await made.start(with_agent=with_agent)

    return make


@BOTH
async def test_what_the_members_own_account_ordered_is_revoked_and_every_step_has_its_time(departure):
    leaving = await departure()
    front, own = leaving.flow.ca, leaving.caa[OWNER]
    assert "validationmethods=http-01" in own[0]
    finalized = front.asked[Resource.FINALIZE]
    await leaving.leave()
    assert (await leaving.advance()).revoking_since == leaving.flow.now
    await leaving.publish()
    (turned,) = leaving.caa[OWNER]
    account = leaving.account.uri
    assert turned == f'0 issue "ca.example; accounturi={account}; validationmethods=dns-01"'
    (order,) = await leaving.attempts()
    assert leaving.txt == {TEXT: [order.txt]}
    assert order.due_at == order.served_at + timedelta(seconds=leaving.settings.dns.address_ttl)
    server = await leaving.advance()
    assert (await leaving.attempts())[0].answered_at is None, "the CA's resolver may know the CAA of before"
    assert leaving.receipt(server).outstanding[-2:] == (
        "control of the name: not proved to the CA",
        "certificate: its member's own, not revoked by the CA",
    )
    server = await leaving.to_the_end()
    assert front.certificate_status(leaving.serial) == "Revoked"
    found = leaving.receipt(server)
    times = [
        found.caa_turned_at,
        found.control_proved_at,
        found.certificate_revoked_at,
        found.caa_closed_at,
        found.removed_at,
    ]
    assert None not in times
    assert times == sorted(times)
    assert None not in (found.srv_withdrawn_at, found.name_broken_at, found.authorization_deactivated_at)
    assert (found.outstanding, found.error, found.not_revoked) == ((), None, None)
    assert "it was not revoked" not in found.exposure
    assert "a certificate that no probe saw is not revoked" in found.exposure
    assert (leaving.caa, leaving.txt) == ({PARENT: ['0 issue ";"']}, {})
    assert front.asked[Resource.FINALIZE] == finalized, "no certificate comes of it"
    assert len(server.orders) == 1
    assert server.orders[0].revoked_at == found.certificate_revoked_at
    assert await leaving.advance() is not None
    assert leaving.receipt(await leaving.server()) == found


@BOTH
async def test_of_an_agent_with_its_own_account_both_accounts_certificates_are_revoked(departure):
    leaving = await departure(with_agent=True)
    ours = leaving.before.serial
    assert leaving.flow.ca.certificate_status(ours) == "Valid"
    await leaving.leave()
    server = await leaving.advance()
    assert leaving.flow.ca.certificate_status(ours) == "Revoked", "that waits for no DNS"
    found = leaving.receipt(server)
    assert found.authorization_deactivated_at is not None
    assert found.certificate_revoked_at is None, "one is left"
    assert found.outstanding[-1] == "certificate: its member's own, not revoked by the CA"
    server = await leaving.to_the_end()
    assert leaving.flow.ca.certificate_status(leaving.serial) == "Revoked"
    found = leaving.receipt(server)
    assert (found.outstanding, found.error, found.not_revoked) == ((), None, None)
    assert found.certificate_revoked_at == max(order.revoked_at for order in server.orders)
    (attempt,) = await leaving.attempts()
    assert found.authorization_deactivated_at == attempt.deactivated_at
    assert "a certificate that no probe saw is not revoked" in found.exposure


async def test_what_an_agents_own_account_ordered_is_given_up_as_without_an_agent(departure):
    leaving = await departure(with_agent=True)
    async with leaving.registry.change(leaving.flow.server_id) as (_, server):
        next(order for order in server.orders if issuance.is_seen(order)).chain = None
    await leaving.leave()
    server = await leaving.to_the_end()
    found = leaving.receipt(server)
    assert found.not_revoked == "no copy of it was kept when it was seen"
    assert found.certificate_revoked_at is None
    assert leaving.flow.ca.certificate_status(leaving.before.serial) == "Revoked"


async def test_in_order_nothing_is_turned_while_clients_may_still_come(departure):
    leaving = await departure()
    await leaving.leave(emergency=False)
    server = await leaving.advance()
    assert (server.revoking_since, await leaving.attempts()) == (None, [])
    await leaving.publish()
    assert leaving.caa[OWNER] == ['0 issue ";"']
    server = await leaving.to_the_end()
    assert server.revoking_since >= server.srv_withdrawn_at + leaving.settings.leaving_grace
    assert leaving.flow.ca.certificate_status(leaving.serial) == "Revoked"


class Killed(BaseException):
    """The end of the process."""


class Mortal:
    """An account whose process ends once, when the CA has answered a call and before anybody hears of it."""

    def __init__(self, account, call):
        self._account, self._call, self.lost = account, call, False

    def __getattr__(self, name):
        async def call(*arguments):
            result = await getattr(self._account, name)(*arguments)
            if name == self._call:
                self._call = None
                raise Killed
            return result

        return call


@pytest.mark.parametrize("call", ["authorize", "answer", "poll", "revoke", "deactivate_authorization"])
async def test_a_kill_between_the_ca_and_the_database_is_made_up_for(departure, call):
    leaving = await departure()
    await leaving.leave()
    mortal, kills, server = Mortal(leaving.account, call), 0, await leaving.server()
    for _ in range(200):
        await leaving.publish()
        try:
            server = await leaving.advance(mortal, after=timedelta(minutes=1))
        except* Killed:
            kills += 1
        if server.state is S.REMOVED:
            break
    assert (kills, server.state) == (1, S.REMOVED)
    assert leaving.flow.ca.certificate_status(leaving.serial) == "Revoked"
    assert leaving.receipt(server).certificate_revoked_at is not None
    assert len(await leaving.attempts()) == 1


async def test_a_ca_that_refuses_is_told_in_its_own_words_and_keeps_nobody(departure):
    """Pebble itself lets no account revoke what another one ordered."""
    leaving = await departure(front=None)
    await leaving.leave()
    server = await leaving.to_the_end()
    found = leaving.receipt(server)
    assert found.control_proved_at is not None
    assert found.authorization_deactivated_at is not None
    assert (found.certificate_revoked_at, found.outstanding, found.error) == (None, (), None)
    assert "not associated with account" in found.not_revoked
    assert (
        f"not revoked, and stays valid until {found.last_certificate_ends_at.isoformat()}" in found.exposure
    )
    assert leaving.flow.pebble.certificate_status(leaving.serial) == "Valid"
    assert (leaving.caa, leaving.txt) == ({PARENT: ['0 issue ";"']}, {})


async def test_addresses_wait_for_no_ca_and_a_ca_that_stays_away_for_no_longer_than_the_pools_patience(
    departure,
):
    leaving = await departure()
    leaving.flow.ca.faults = dict.fromkeys(Resource, Fault.UNAVAILABLE)
    await leaving.leave()
    await leaving.advance()
    server = await leaving.advance()
    assert server.removal_due_at == leaving.flow.now + timedelta(seconds=120), "as its Retry-After says"
    for _ in range(3):
        await leaving.publish()
    found = leaving.receipt(await leaving.advance())
    assert None not in (found.srv_withdrawn_at, found.name_broken_at, found.caa_turned_at)
    assert found.error.startswith("CA: ")
    began = (await leaving.server()).caa_turned_at
    leaving.flow.now = began + DAY - 2 * SECOND
    assert (await leaving.advance()).revoking_ended_at is None
    server = await leaving.advance()
    assert server.revoking_ended_at == began + DAY
    assert server.not_revoked.startswith("CA: ")
    assert leaving.receipt(server).outstanding == ("CAA: not seen closed on every nameserver",)
    server = await leaving.to_the_end()
    assert leaving.flow.ca.certificate_status(leaving.serial) == "Valid"


async def test_a_ca_that_takes_orders_and_does_not_say_so_is_not_asked_again_at_once(departure):
    leaving = await departure()
    leaving.flow.ca.faults = {Resource.NEW_ORDER: Fault.BROKEN}
    await leaving.leave()
    server = await leaving.advance()
    assert server.removal_due_at == leaving.flow.now + timedelta(seconds=leaving.settings.policy.retry[0])
    assert await leaving.attempts() == []


async def test_with_the_primary_away_the_receipt_says_what_is_outstanding_and_nothing_is_given_up(departure):
    leaving = await departure()
    await leaving.leave()
    for _ in range(5):
        server = await leaving.advance()
    assert [text.partition(":")[0] for text in leaving.receipt(server).outstanding] == [
        "SRV",
        "addresses",
        "CAA",
        "control of the name",
        "certificate",
    ]
    assert len(await leaving.attempts()) == 1, "the CA has one order, which waits"
    server = await leaving.advance(after=2 * DAY)
    assert (server.not_revoked, server.revoking_ended_at) == (None, None)
    server = await leaving.to_the_end()
    assert leaving.txt == {}
    assert leaving.flow.ca.certificate_status(leaving.serial) == "Revoked"


async def test_an_order_that_fails_is_followed_by_another_one_after_a_wait(departure):
    leaving = await departure()
    await leaving.leave()
    await leaving.advance()
    await leaving.publish()
    right = leaving.txt.pop(TEXT)
    leaving.flow.now += timedelta(seconds=leaving.settings.dns.address_ttl)
    for _ in range(100):
        await leaving.advance(after=timedelta())
        (order,) = await leaving.attempts()
        if order.ended_at is not None:
            break
    assert order.error
    wait = leaving.settings.policy.retry[0]
    await leaving.advance(after=timedelta(seconds=wait - 1))
    assert len(await leaving.attempts()) == 1
    await leaving.publish()
    assert leaving.txt == {}, "nothing is to be proved meanwhile"
    server = await leaving.to_the_end()
    _, second = await leaving.attempts()
    assert second.txt != right
    assert leaving.receipt(server).certificate_revoked_at is not None


async def freeze(leaving, moment):
    async with leaving.database.transaction() as session:
        (await the_pool(session, leaving.settings, lock=True)).frozen_at = moment


async def test_while_the_pool_is_frozen_nothing_begins_and_patience_does_not_end(departure):
    leaving = await departure()
    await leaving.leave()
    await freeze(leaving, leaving.flow.now)
    assert (await leaving.advance()).revoking_since is None
    await freeze(leaving, None)
    await leaving.advance()
    for _ in range(2):
        await leaving.publish()
    await leaving.advance()
    await freeze(leaving, leaving.flow.now)
    assert (await leaving.advance(after=DAY + timedelta(hours=1))).revoking_ended_at is None
    await freeze(leaving, None)
    server = await leaving.to_the_end()
    assert leaving.receipt(server).certificate_revoked_at is not None


async def test_a_registry_that_was_away_for_a_day_goes_on(departure):
    leaving = await departure()
    await leaving.leave()
    await leaving.advance()
    await leaving.publish()
    server = await leaving.advance(after=DAY + timedelta(hours=1))
    assert server.revoking_ended_at is None
    assert leaving.receipt(await leaving.to_the_end()).certificate_revoked_at is not None


async def test_a_ca_that_decides_nothing_is_left_after_twice_the_patience(departure):
    leaving = await departure()
    leaving.flow.ca.faults = {Resource.ORDER: Fault.UNDECIDED}
    await leaving.leave()
    await leaving.advance()
    await leaving.publish()
    (order,) = await leaving.attempts()
    leaving.flow.now = order.served_at + 2 * DAY - 2 * SECOND
    assert (await leaving.advance()).revoking_ended_at is None
    server = await leaving.advance()
    assert server.revoking_ended_at == leaving.flow.now
    assert server.not_revoked == "control of the name was not proved in time"


async def to_the_proof(leaving):
    for _ in range(100):
        await leaving.publish()
        server = await leaving.advance(after=timedelta(minutes=1))
        if server.control_proved_at is not None:
            return server
    raise AssertionError


@pytest.mark.parametrize("fault", [Fault.FORBIDDEN, Fault.BROKEN])
async def test_what_is_no_answer_of_acme_ends_nothing(departure, fault):
    leaving = await departure()
    leaving.flow.ca.faults = {Resource.REVOCATION: fault}
    await leaving.leave()
    await to_the_proof(leaving)
    for _ in range(10):
        server = await leaving.advance(after=timedelta(minutes=1))
        assert (server.orders[0].error, server.revoking_ended_at) == (None, None)
    leaving.flow.ca.faults = {}
    await leaving.to_the_end()
    assert leaving.flow.ca.certificate_status(leaving.serial) == "Revoked"


async def test_a_refusal_that_may_be_for_the_moment_is_asked_for_again(departure):
    leaving = await departure()
    leaving.flow.ca.forgetful = True
    await leaving.leave()
    server = await to_the_proof(leaving)
    assert (server.orders[0].attempts, server.orders[0].error) == (1, None)
    assert server.removal_due_at == leaving.flow.now + leaving.settings.policy.step_wait(0)
    server = await leaving.advance(after=timedelta(minutes=1))
    assert server.removal_due_at == leaving.flow.now + leaving.settings.policy.step_wait(1)
    leaving.flow.ca.forgetful = False
    assert leaving.receipt(await leaving.to_the_end()).certificate_revoked_at is not None


async def test_one_that_the_ca_cannot_revoke_keeps_no_other_and_its_authorization_is_ended(departure):
    leaving = await departure()
    second = await leaving.order_as(await leaving.open_account("own.pem"))
    await leaving.see(second)
    leaving.flow.ca.broken_for = {leaving.serial}
    await leaving.leave()
    await to_the_proof(leaving)
    assert leaving.flow.ca.certificate_status(chain_facts(second).serial) == "Revoked"
    server = await leaving.advance(after=DAY)
    assert (server.not_revoked, server.state) == ("CA: serverInternal: the CA is broken", S.LEAVING)
    assert leaving.receipt(server).outstanding[-1].startswith("authorization: ")
    server = await leaving.to_the_end()
    (order,) = await leaving.attempts()
    assert order.ended_at == order.deactivated_at == leaving.receipt(server).authorization_deactivated_at
    assert order.deactivated_at > server.revoking_ended_at
    assert leaving.receipt(server).outstanding == ()


class Faulty:
    """An account with a fault of ours, at one certificate."""

    def __init__(self, account, serial):
        self._account, self._serial, self.lost = account, serial, False

    def __getattr__(self, name):
        return getattr(self._account, name)

    async def revoke(self, chain, reason):
        if chain_facts(chain).serial == self._serial:
            raise LookupError
        await self._account.revoke(chain, reason)


async def test_what_nobody_foresaw_throws_away_nothing_that_was_done(departure):
    leaving = await departure()
    second = await leaving.order_as(await leaving.open_account("own.pem"))
    await leaving.see(second)
    await leaving.leave()
    faulty, raised = Faulty(leaving.account, chain_facts(second).serial), 0
    for _ in range(20):
        await leaving.publish()
        try:
            await leaving.advance(faulty, after=timedelta(minutes=1))
        except* LookupError:
            raised += 1
            server = await leaving.server()
            assert server.removal_due_at > leaving.flow.now
    assert raised > 1
    assert leaving.flow.ca.certificate_status(leaving.serial) == "Revoked"
    assert [order.revoked_at is not None for order in server.orders] == [True, False]


async def test_a_copy_that_cannot_be_read_is_given_up_and_keeps_no_other(departure):
    leaving = await departure()
    second = await leaving.order_as(await leaving.open_account("own.pem"))
    await leaving.see(second)
    first = (await leaving.server()).orders[0]
    async with leaving.database.transaction() as session:
        await session.execute(update(Order).where(Order.id == first.id).values(chain="garbage"))
    await leaving.leave()
    server = await leaving.to_the_end()
    assert "cannot be read" in server.not_revoked
    assert leaving.flow.ca.certificate_status(chain_facts(second).serial) == "Revoked"


class Slow:
    """An account whose CA answers a call only when something else has happened; with a wait of its own, if it is told so."""

    def __init__(self, account, meanwhile, wait=None):
        self._account, self._meanwhile, self._wait, self.lost = account, meanwhile, wait, False

    def __getattr__(self, name):
        return getattr(self._account, name)

    async def authorize(self, domain, challenge):
        if self._wait is not None:
            raise AcmeError("rate-limited", "too many", retry_after=self._wait, status=429)
        order = await self._account.authorize(domain, challenge)
        await self._meanwhile()
        return order


async def test_a_ca_that_wants_to_wait_for_a_week_is_asked_once_more_when_patience_ends(departure):
    leaving = await departure()
    await leaving.leave()
    limited = Slow(leaving.account, None, wait=7 * DAY.total_seconds())
    server = await leaving.advance(limited)
    assert server.removal_due_at == leaving.flow.now + DAY
    for _ in range(3):
        await leaving.publish()
    server = await leaving.advance(limited)
    assert server.removal_due_at == server.caa_turned_at + DAY


async def test_who_hurries_a_removal_while_a_pass_runs_is_heard(departure):
    leaving = await departure()
    await leaving.leave()
    async with leaving.registry.change(leaving.flow.server_id) as (_, server):
        server.removal_due_at = leaving.flow.now + LEASE

    async def hurry():
        await leaving.leave()

    server = await leaving.advance(Slow(leaving.account, hurry))
    assert server.removal_due_at == leaving.flow.now


@BOTH
async def test_of_two_passes_at_a_time_one_order_counts_and_no_other_is_left_open(departure):
    leaving = await departure()
    await leaving.leave()

    async def meanwhile():
        await leaving.advance(after=timedelta())

    await leaving.advance(Slow(leaving.account, meanwhile))
    first, *others = await leaving.attempts()
    assert first.ended_at is None
    assert [one.error for one in others if one.ended_at is not None] == [
        "another one was placed at the same moment" for _ in others
    ]
    server = await leaving.to_the_end()
    assert leaving.receipt(server).certificate_revoked_at is not None


async def test_the_leader_leaves_a_pass_that_may_be_under_way_its_lease(departure):
    leaving = await departure()
    await leaving.leave()
    await leaving.advance()
    await leaving.publish()
    due_at = leaving.flow.now + LEASE
    for due, after in ((due_at, due_at), (due_at + SECOND, leaving.flow.now)):
        async with leaving.registry.change(leaving.flow.server_id) as (_, server):
            server.removal_due_at, server.name_broken_at = due, None
        await leaving.publish()
        server = await leaving.server()
        assert (server.name_broken_at, server.removal_due_at) == (leaving.flow.now, after)


async def test_a_ca_taken_out_of_the_settings_is_waited_for_and_no_longer(departure):
    leaving = await departure()
    async with leaving.database.transaction() as session:
        await session.execute(update(Order).values(ca="gone.example"))
    await leaving.leave()

    async def accounts(name, _now):
        raise AcmeError(UNKNOWN_CA, f"the settings have no CA {name} (any more)", permanent=True)

    for _ in range(3):
        await leaving.publish()
        leaving.flow.now += timedelta(minutes=1)
        await removal.advance(
            leaving.database, leaving.settings, accounts, leaving.flow.server_id, leaving.flow.now
        )
    assert (await leaving.server()).revoking_ended_at is None
    leaving.flow.now += DAY
    for _ in range(3):
        await removal.advance(
            leaving.database, leaving.settings, accounts, leaving.flow.server_id, leaving.flow.now
        )
        await leaving.publish()
        leaving.flow.now += SECOND
    server = await leaving.server()
    assert server.state is S.REMOVED
    assert "the settings have no CA gone.example" in server.not_revoked
    assert leaving.receipt(server).error is None or "ended at" not in leaving.receipt(server).error


async def test_one_seen_while_caa_named_no_account_is_revoked_at_the_pools_ca(departure):
    leaving = await departure()
    async with leaving.database.transaction() as session:
        await session.execute(update(Order).values(ca=None))
    await leaving.leave()
    assert leaving.receipt(await leaving.to_the_end()).certificate_revoked_at is not None


@pytest.mark.parametrize("is_first_right", [False, True])
async def test_what_one_ca_does_not_know_is_asked_of_the_others(departure, is_first_right):
    leaving = await departure()
    ca = leaving.settings.ca
    other = AuthoritySettings(
        directory_url="https://other.example/dir",
        account_key_file=leaving.lab.directory / "other.pem",
        caa_identity="other.example",
    )
    leaving.settings = leaving.settings.model_copy(
        update={"ca": ca.model_copy(update={"fallback": (other,)})}
    )
    async with leaving.database.transaction() as session:
        await session.execute(update(Order).values(ca=ca.name if is_first_right else other.name))
    await leaving.leave()
    asked = []

    async def accounts(name, _now):
        asked.append(name)
        if name == ca.name and not is_first_right:
            return leaving.account
        raise AcmeError("rejectedIdentifier", f"{name} does not know it", permanent=True, status=400)

    for _ in range(20):
        await leaving.publish()
        leaving.flow.now += timedelta(minutes=1)
        await removal.advance(
            leaving.database, leaving.settings, accounts, leaving.flow.server_id, leaving.flow.now
        )
    server = await leaving.server()
    assert server.state is S.REMOVED
    assert list(dict.fromkeys(asked)) == ([ca.name, other.name] if is_first_right else [other.name, ca.name])
    if is_first_right:
        assert server.not_revoked == f"{other.name}: {other.name} does not know it"
    else:
        assert server.certificate_revoked_at is not None


async def test_every_certificate_that_was_seen_is_revoked(departure):
    leaving = await departure()
    own = await leaving.open_account("own.pem")
    second = await leaving.order_as(own)
    await leaving.see(second)
    await leaving.leave()
    await leaving.to_the_end()
    for chain in (leaving.chain, second):
        assert leaving.flow.ca.certificate_status(chain_facts(chain).serial) == "Revoked"


async def test_what_was_seen_before_copies_were_kept_gets_one_when_it_is_seen_again(departure):
    leaving = await departure()
    async with leaving.database.transaction() as session:
        await session.execute(update(Order).values(chain=None, ca=None))
    await leaving.see(leaving.chain)
    (order,) = (await leaving.server()).orders
    assert load_chain(order.chain) == load_chain(leaving.chain)[:1], "the leaf and nothing else"
    with pytest.raises(WrongState):
        issuance.revoke_compromised(await leaving.server(), leaving.flow.now)
    await leaving.leave()
    assert (await leaving.to_the_end()).certificate_revoked_at is not None


async def test_without_a_copy_the_receipt_says_so_and_nothing_is_waited_for(departure):
    leaving = await departure()
    async with leaving.database.transaction() as session:
        await session.execute(update(Order).values(chain=None))
    await leaving.see(leaving.chain, leaf=False)
    await leaving.leave()
    server = await leaving.to_the_end()
    assert server.not_revoked == "no copy of it was kept when it was seen"
    assert await leaving.attempts() == []


async def test_one_without_a_copy_keeps_no_other_one_from_being_revoked(departure):
    leaving = await departure()
    second = await leaving.order_as(await leaving.open_account("own.pem"))
    await leaving.see(second, leaf=False)
    await leaving.leave()
    server = await leaving.to_the_end()
    assert leaving.flow.ca.certificate_status(leaving.serial) == "Revoked"
    assert server.not_revoked == "no copy of it was kept when it was seen"
    assert server.certificate_revoked_at is None, "not all of them are"
    assert leaving.receipt(server).authorization_deactivated_at is not None


async def test_a_certificate_that_has_ended_is_not_waited_for(departure):
    leaving = await departure()
    await leaving.leave()
    leaving.flow.now += 8 * DAY
    server = await leaving.to_the_end(passes=4)
    assert (server.revoking_since, server.not_revoked, await leaving.attempts()) == (None, None, [])


async def test_it_counts_as_an_order_and_as_nothing_else(departure):
    leaving = await departure()

    async def budget():
        async with leaving.database.transaction() as session:
            return (await onboarding.state(session, leaving.settings, leaving.flow.now)).budget

    before = await budget()
    await leaving.leave()
    await leaving.advance()
    assert len(await leaving.attempts()) == 1
    after = await budget()
    assert after.orders.spent == before.orders.spent + 1
    assert (after.certificates.spent, after.reserved) == (before.certificates.spent, before.reserved)
