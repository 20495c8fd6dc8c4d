"""Orders that are tried at a staging CA first: two real CAs, of which one never gives a certificate."""

import asyncio
import time
from datetime import timedelta
from urllib.parse import urlsplit

import pytest
from sqlalchemy import delete, update
from structlog.testing import capture_logs

from lab.ca_front import Fault, Resource
from lab.processes import free_port
from nts_core.acme import AcmeError, OrderState
from nts_core.control import ServerState
from poolsvc import issuance, onboarding, removal, servers
from poolsvc.authorities import Authorities, account_uris
from poolsvc.models import CaAccount, CaRefusal, Order, OrderStatus
from poolsvc.publication import Publication

S = OrderStatus
BOTH = pytest.mark.parametrize("engine", ["sqlite", "postgresql"], indirect=True)
MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)
# What a whole rehearsal may take at a CA that is as slow as it can be.
LONGEST = 40 * MINUTE
GIVEN = ("url", "authorization_url", "challenge_url", "token", "key_authorization", "account_uri")


@pytest.fixture
async def staged(flow, lab):
    """Makes a Flow with a staging CA behind a front, and with the accounts at both; options are the staging Pebble's."""
    made = []

    async def make(*, fallback=(), **options):
        one = await flow(front={}, nonce_reject=0)
        one.staging_pebble = lab.pebble("staging", nonce_reject=0, **options)
        one.staging = lab.front(one.staging_pebble)
        ca = lab.settings(one.ca, *fallback, rehearsal=one.staging)
        one.settings = one.settings.model_copy(update={"ca": ca})
        one.real_name, one.staging_name = ca.name, ca.rehearsal.name
        one.authorities = None
        made.append(one)
        await renew_process(one)
        return one

    yield make
    for one in made:
        one.authorities.close()


async def renew_process(flow):
    """All that the process before knew is lost, but for the database."""
    if flow.authorities is not None:
        flow.authorities.close()
    flow.away = {}
    flow.authorities = Authorities(flow.database, flow.settings, flow.away, {})
    await flow.authorities.keep(flow.now)


async def at_real_ca(flow):
    """Steps until the order has left the staging CA; time passes only where the order waits."""
    began = flow.now
    while (order := await flow.order()).ca == flow.staging_name and order.status is not S.FAILED:
        assert flow.now - began < LONGEST, f"still {order.status}: {order.error}"
        await flow.serve()
        flow.now = max(flow.now, (await flow.order()).due_at or flow.now)
        await flow.step()
        await asyncio.sleep(0.02)
    return order


def hosts(order):
    return {urlsplit(text).netloc for name in GIVEN if (text := getattr(order, name)) and "://" in text}


def requests(front, *resources):
    return [front.asked[one] for one in resources]


@BOTH
async def test_a_first_order_is_rehearsed_without_a_certificate_and_begins_anew(staged):
    flow = await staged(authz_reuse=100)
    await flow.begin()
    assert (await flow.order()).ca == flow.staging_name
    tried = await flow.step()
    assert (tried.status, hosts(tried)) == (S.PENDING, {flow.staging_name})
    order = await at_real_ca(flow)
    assert (order.id, order.status, order.ca, order.ca_since) == (
        tried.id,
        S.REQUESTED,
        flow.real_name,
        flow.now,
    )
    assert (order.due_at, order.served_at, order.attempts, order.error) == (flow.now, None, 0, None)
    assert [getattr(order, name) for name in GIVEN] == [None] * len(GIVEN)
    assert issuance.challenges(await flow.server()) == ()
    assert requests(flow.ca, Resource.NEW_ORDER) == [0], "the real CA has heard nothing yet"

    issued = await flow.until(S.ISSUED)
    assert (issued.id, issued.ca, hosts(issued)) == (tried.id, flow.real_name, {flow.real_name})
    assert issued.token != tried.token
    assert flow.pebble.certificate_status(issued.serial) == "Valid"
    assert requests(flow.staging, Resource.NEW_ORDER, Resource.CHALLENGE, Resource.FINALIZE) == [1, 1, 0]
    assert requests(flow.ca, Resource.NEW_ORDER, Resource.FINALIZE) == [1, 1]
    assert (await flow.server()).order_failures == 0

    account = await flow.authorities.account(flow.staging_name, flow.now)
    assert (await account.order(order.csr, flow.settings.domain_of("alice"))).token is not None, (
        "the authorization of the rehearsal has ended, or this CA would use it again"
    )


@BOTH
async def test_a_process_that_dies_in_a_rehearsal_leaves_it_to_the_next_one(staged):
    """Each step is done by a process that dies before it records it, and again by another one."""
    flow = await staged()
    await flow.begin()
    for status in (S.REQUESTED, S.PENDING, S.ANSWERED, S.FINALIZING):
        before = await flow.order()
        assert (before.status, before.ca) == (status, flow.staging_name)
        forgotten = {
            name: getattr(before, name) for name in (*GIVEN, "status", "ca", "ca_since", "rehearsal")
        }
        for attempt in (1, 2):
            await flow.serve()
            for _ in range(200):
                after = await flow.step()
                if after.status is not status:
                    break
                await asyncio.sleep(0.02)
            assert after.status is not status
            if attempt == 1:
                async with flow.database.transaction() as session:
                    await session.execute(update(Order).values(**forgotten))
                await renew_process(flow)
    assert (await flow.order()).ca == flow.real_name
    assert (await flow.until(S.ISSUED)).ca == flow.real_name
    assert requests(flow.staging, Resource.FINALIZE) == [0]


@BOTH
async def test_what_the_staging_ca_refuses_costs_nothing_at_the_real_one(staged):
    """It looks at another port than the precheck: what a firewall does."""
    flow = await staged(http_port=free_port())
    for wait in (60, 600):
        await flow.begin()
        order = await at_real_ca(flow)
        assert (order.status, order.ca) == (S.FAILED, flow.staging_name)
        assert order.error.startswith("rehearsal: connection: ")
        server = await flow.server()
        assert server.order_due_at == flow.now + timedelta(seconds=wait)
        ended = await flow.step()
        assert (ended.deactivated_at, ended.due_at, ended.error) == (flow.now, None, order.error)
        flow.now = server.order_due_at
    assert requests(flow.ca, Resource.NEW_ORDER) == [0]
    async with flow.database.transaction() as session:
        state = await onboarding.state(session, flow.settings, flow.now)
    assert (state.budget.orders.spent, state.budget.reserved) == (0, 0)
    assert onboarding.free_at(flow.settings, await flow.server(), flow.now) <= flow.now


@BOTH
async def test_a_staging_ca_that_always_refuses_keeps_nobody_from_the_real_one(staged):
    flow = await staged(http_port=free_port())
    for _ in range(2):
        await flow.begin()
        assert (await at_real_ca(flow)).error.startswith("rehearsal: ")
    with capture_logs() as logs:
        await flow.begin()
    assert [line["event"] for line in logs] == ["order_not_rehearsed"]
    flow.ca.faults = {Resource.CERTIFICATE: Fault.OTHER_KEY}
    assert (await flow.until(S.FAILED)).ca == flow.real_name
    flow.ca.faults = {}

    await flow.begin()
    assert (await flow.order()).ca == flow.staging_name, "the real CA has failed meanwhile"
    assert (await at_real_ca(flow)).status is S.FAILED
    async with flow.registry.change(flow.server_id) as (_, server):
        issuance.want(server, flow.now)
        issuance.start_anew(server, flow.now)
    await flow.begin()
    assert (await at_real_ca(flow)).error.startswith("rehearsal: "), (
        "an order that no CA was to see changes nothing"
    )
    await flow.begin()
    assert (await flow.until(S.ISSUED)).ca == flow.real_name


async def test_failed_rehearsals_let_a_waiting_server_have_its_turn(staged):
    """Five in an hour would be all that a CA allows of one name."""
    flow = await staged(http_port=free_port())
    async with flow.registry.change(flow.server_id) as (session, server):
        server.named_at, server.queue_round, server.order_due_at = flow.now, 0, flow.now
        made = {"status": S.FAILED, "created_at": flow.now, "ca": flow.staging_name, "csr": "x", "token": "x"}
        session.add_all(Order(server_id=server.id, rehearsal=True, **made) for _ in range(5))
    async with flow.database.transaction() as session:
        starts = await onboarding._plan(session, flow.settings, flow.now)
        assert starts == {flow.server_id: flow.now}
        await session.execute(update(Order).values(rehearsal=False))
        starts = await onboarding._plan(session, flow.settings, flow.now)
    assert starts[flow.server_id] > flow.now, "the control"


async def test_failed_rehearsals_say_nothing_of_the_first_ca(staged, lab):
    flow = await staged(http_port=free_port(), fallback=(lab.pebble("second"),))
    await flow.begin()
    assert (await at_real_ca(flow)).status is S.FAILED
    flow.now += timedelta(seconds=flow.settings.policy.ca_patience)
    assert issuance._choose_ca(flow.settings, await flow.server(), flow.now) == flow.real_name


@pytest.mark.parametrize(
    ("resource", "fault"),
    [
        (Resource.NEW_ORDER, Fault.DOWN),
        (Resource.NEW_ORDER, Fault.LIMITED),
        (Resource.NEW_ORDER, Fault.LIMITED_UNTIL),
        (Resource.CHALLENGE, Fault.BROKEN),
        (Resource.CHALLENGE, Fault.HTML),
        (Resource.ORDER, Fault.UNAVAILABLE),
        (Resource.ORDER, Fault.UNDECIDED),
        (Resource.AUTHORIZATION, Fault.BAD_JSON),
    ],
)
async def test_a_staging_ca_that_fails_holds_up_no_order_for_long(staged, resource, fault):
    flow = await staged()
    flow.staging.faults = {resource: fault}
    await flow.begin()
    with capture_logs() as logs:
        order = await at_real_ca(flow)
    assert (order.status, order.ca, order.error) == (S.REQUESTED, flow.real_name, None)
    (given_up,) = [line for line in logs if line["event"] == "rehearsal_given_up"]
    assert (given_up["order"], given_up["ca"]) == (order.id, flow.staging_name)
    assert (await flow.until(S.ISSUED)).ca == flow.real_name
    assert (await flow.server()).order_failures == 0


async def test_a_staging_ca_that_is_known_to_be_away_is_not_waited_for(staged):
    """It has been tried so often that the next try is far away."""
    flow = await staged()
    flow.staging.faults = {Resource.DIRECTORY: Fault.DOWN}
    flow.authorities.close()
    flow.authorities = Authorities(flow.database, flow.settings, flow.away, {})
    for _ in range(6):
        with pytest.raises(AcmeError) as caught:
            await flow.authorities.account(flow.staging_name, flow.now)
        flow.now += timedelta(seconds=caught.value.retry_after)
    flow.now -= MINUTE * 3
    await flow.begin()
    assert (await flow.order()).ca == flow.staging_name
    assert (await flow.step()).ca == flow.real_name
    assert [*flow.away] == [flow.staging_name]


async def test_a_staging_ca_that_has_lost_everything_holds_up_no_order(staged):
    """Such CAs are begun anew from time to time."""
    flow = await staged()
    await flow.begin()
    await flow.step()
    await flow.serve()
    await asyncio.to_thread(flow.staging_pebble.restart)
    order = await at_real_ca(flow)
    assert (order.status, order.ca) == (S.REQUESTED, flow.real_name)


async def test_before_there_is_an_account_at_the_staging_ca_nothing_is_rehearsed(staged):
    flow = await staged()
    async with flow.database.transaction() as session:
        await session.execute(delete(CaAccount).where(CaAccount.ca == flow.staging_name))
    with capture_logs() as logs:
        await flow.begin()
    assert (await flow.order()).ca == flow.real_name
    assert [line["event"] for line in logs] == ["order_not_rehearsed"]


async def test_a_certificate_of_the_staging_ca_is_nobodys(staged):
    """However one came to be: here the test itself asks for it."""
    flow = await staged()
    await flow.begin()
    order = await flow.until(S.ANSWERED)
    account = await flow.authorities.account(flow.staging_name, flow.now)
    for wanted in (OrderState.READY, OrderState.VALID):
        end = time.monotonic() + 10
        while (await account.poll(order.url)).status is not wanted:
            assert time.monotonic() < end
            await asyncio.sleep(0.02)
        if wanted is OrderState.READY:
            await account.finalize(order.url, order.csr)
    assert (await flow.step()).status is S.FINALIZING
    async with flow.registry.change(flow.server_id) as (_, server):
        issuance.start_anew(server, flow.now)
    ended = await flow.step()
    assert (ended.status, ended.deactivated_at, ended.chain) == (S.FAILED, flow.now, None)


async def test_a_late_answer_of_the_staging_ca_is_not_taken_for_one_of_the_real_ca(staged):
    """Another process has given up the rehearsal meanwhile; the order is REQUESTED again."""
    flow = await staged()
    await flow.begin()
    order = await flow.order()

    async def slow(name, now):
        async with flow.database.transaction() as session:
            await session.execute(update(Order).values(ca=flow.real_name, rehearsal=False))
        return await flow.authorities.account(name, now)

    await issuance.advance(flow.database, flow.settings, slow, order.id, flow.now)
    assert requests(flow.staging, Resource.NEW_ORDER) == [1]
    order = await flow.order()
    assert (order.status, order.ca, order.url) == (S.REQUESTED, flow.real_name, None)


async def test_no_renewal_is_rehearsed_while_the_certificate_is_valid(staged):
    """Whatever has failed: a staging CA may be the one that always does."""
    flow = await staged()
    served = await flow.certified()
    assert requests(flow.staging, Resource.NEW_ORDER) == [1]
    flow.now += DAY
    await flow.begin()
    assert (await flow.order()).ca == flow.real_name
    flow.ca.faults = {Resource.CERTIFICATE: Fault.OTHER_KEY}
    assert (await flow.until(S.FAILED)).ca == flow.real_name
    flow.ca.faults = {}
    await flow.step()
    async with flow.database.transaction() as session:
        server = await servers.get(session, flow.server_id)
        assert server.order_failures == 1
        rehearsed_at = [
            await issuance._rehearse_at(session, flow.settings, server, at)
            for at in (served.not_after - MINUTE, served.not_after)
        ]
    assert rehearsed_at == [None, flow.staging_name]
    await flow.begin()
    assert (await flow.until(S.ISSUED)).ca == flow.real_name
    assert requests(flow.staging, Resource.NEW_ORDER) == [1]


async def test_a_429_of_the_real_ca_holds_up_no_rehearsal_and_one_of_the_staging_ca_nobody(staged):
    flow = await staged()
    await flow.begin()
    flow.staging.faults = {Resource.NEW_ORDER: Fault.LIMITED}
    assert (await flow.step()).error.startswith("CA: ")
    until = flow.now + DAY
    async with flow.database.transaction() as session:
        assert await session.get(CaRefusal, 1) is None
        session.add(CaRefusal(id=1, at=flow.now, until=until, detail="too many"))
    flow.staging.faults = {}
    order = await at_real_ca(flow)
    assert order.ca == flow.real_name
    assert (await flow.step()).due_at == until


async def test_caa_names_the_account_of_the_staging_ca_and_its_ca_is_content(staged, caa):
    flow = await staged()
    leader = Publication(flow.database, flow.settings)
    assert await leader.look(flow.now)
    owner = f"{flow.settings.domain_of('alice')}."
    records = sorted(leader.whole()[owner, "CAA"].rdatas)
    async with flow.database.transaction() as session:
        uris = await account_uris(session)
    assert len(records) == 2
    assert any(f"accounturi={uris[flow.staging_name]};" in record for record in records)
    identities = {record.split('"')[1].split(";")[0]: "ca.example" for record in records}
    for name, known in identities.items():
        records = [record.replace(name, known) for record in records]
    caa[owner] = [record for record in records if uris[flow.staging_name] not in record]
    await flow.begin()
    order = await at_real_ca(flow)
    assert order.error.startswith("rehearsal: caa: "), "the control"
    caa[owner] = records
    await flow.begin()
    assert (await flow.until(S.ISSUED)).ca == flow.real_name


async def taken_out(flow):
    async with flow.registry.change(flow.server_id) as (session, server):
        await servers.leave(session, server, actor="member 1", reason="test", now=flow.now)
        server.srv_withdrawn_at = server.name_broken_at = flow.now
    await removal.advance(flow.database, flow.settings, flow.accounts, flow.server_id, flow.now)
    return await flow.server()


async def test_a_removal_does_not_wait_for_the_staging_ca(staged):
    flow = await staged()
    await flow.begin()
    await flow.step()
    flow.staging.faults = dict.fromkeys(Resource, Fault.DOWN)
    server = await taken_out(flow)
    assert (server.state, server.removal_error) == (ServerState.REMOVED, None)
    (order,) = server.orders
    assert (order.status, order.error, order.due_at) == (S.FAILED, "the server leaves the pool", flow.now)
    flow.staging.faults = {}
    ended = await flow.step()
    assert (ended.deactivated_at, ended.due_at) == (flow.now, None), "it is ended all the same"


async def test_what_cannot_be_ended_at_the_staging_ca_is_left_there(staged):
    flow = await staged(http_port=free_port())
    await flow.begin()
    failed = await at_real_ca(flow)
    flow.staging.faults = {Resource.AUTHORIZATION: Fault.UNAVAILABLE}
    for _ in range(10):
        if (order := await flow.step()).due_at is None:
            break
        flow.now = order.due_at
    assert (order.due_at, order.deactivated_at, order.error) == (None, None, failed.error)


async def without_staging_ca(flow):
    """The operator has taken it out of the settings."""
    ca = flow.settings.ca.model_copy(update={"rehearsal": None})
    flow.settings = flow.settings.model_copy(update={"ca": ca})
    await renew_process(flow)


async def test_without_its_ca_in_the_settings_a_rehearsal_is_over_and_the_order_begins(staged):
    flow = await staged()
    await flow.begin()
    tried = await flow.step()
    assert (tried.status, tried.rehearsal) == (S.PENDING, True)
    await without_staging_ca(flow)
    await flow.serve()
    order = await flow.step()
    assert (order.status, order.ca, order.rehearsal) == (S.REQUESTED, flow.real_name, False)
    issued = await flow.until(S.ISSUED)
    assert (issued.id, issued.ca) == (tried.id, flow.real_name)
    assert (await flow.server()).order_failures == 0


@BOTH
@pytest.mark.parametrize("has_failed", [False, True])
async def test_without_its_ca_in_the_settings_a_rehearsal_holds_up_no_removal(staged, has_failed):
    flow = await staged(http_port=free_port())
    await flow.begin()
    await (at_real_ca(flow) if has_failed else flow.step())
    assert (await flow.order()).authorization_url is not None
    await without_staging_ca(flow)
    server = await taken_out(flow)
    assert (server.state, server.removal_error) == (ServerState.REMOVED, None)


async def test_without_its_ca_in_the_settings_a_failed_rehearsal_costs_nothing_of_the_limits(staged):
    flow = await staged(http_port=free_port())
    await flow.begin()
    failed = await at_real_ca(flow)
    await without_staging_ca(flow)
    async with flow.database.transaction() as session:
        state = await onboarding.state(session, flow.settings, flow.now)
    assert state.budget.orders.spent == 0
    assert not onboarding._was_looked_at(failed)
    for _ in range(10):
        if (order := await flow.step()).due_at is None:
            break
        flow.now = order.due_at
    assert (order.due_at, order.deactivated_at, order.error) == (None, None, failed.error), "left there"


async def test_an_agent_that_joins_again_ends_the_rehearsal(staged):
    flow = await staged()
    await flow.begin()
    await flow.step()
    async with flow.registry.change(flow.server_id) as (_, server):
        issuance.start_anew(server, flow.now)
    ended = await flow.step()
    assert (ended.status, ended.deactivated_at) == (S.FAILED, flow.now)
    await flow.begin()
    assert (await flow.until(S.ISSUED)).ca == flow.real_name
