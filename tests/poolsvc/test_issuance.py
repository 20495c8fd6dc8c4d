"""Orders step by step against a strict Pebble: any process may take the next step, and every refusal ends well."""

import asyncio
from datetime import timedelta

import pytest
from sqlalchemy import select, update

from lab.processes import free_port
from nts_core.acme import OrderState, RevocationReason
from nts_core.certificates import chain_facts, check_chain, renew_at
from nts_core.control import ACME_PATH, ServerState
from poolsvc import issuance, servers
from poolsvc.errors import WrongState
from poolsvc.models import Event, Notice, Order, OrderStatus
from poolsvc.notices import NoticeKind

NAME = "alice.servers.pool.example"
S = OrderStatus
BOTH = pytest.mark.parametrize("engine", ["sqlite", "postgresql"], indirect=True)


@BOTH
async def test_a_whole_order_one_step_a_process(flow):
    """Every step has an account object of its own, as after a crash."""
    flow = await flow()
    await flow.begin()
    order = await flow.step()
    assert (order.status, order.due_at) == (S.PENDING, None), "it waits for the agent"
    (challenge,) = issuance.challenges(await flow.server())
    assert challenge.key_authorization.startswith(challenge.token + ".")
    await flow.serve()
    order = await flow.order()
    assert (order.served_at, order.due_at) == (flow.now, flow.now)
    assert (await flow.step()).status is S.ANSWERED
    seen = [S.ANSWERED]
    for _ in range(200):
        order = await flow.step()
        if order.status is not seen[-1]:
            seen.append(order.status)
        if order.status is S.ISSUED:
            break
        assert order.due_at > flow.now
        await asyncio.sleep(0.02)
    assert seen == [S.ANSWERED, S.FINALIZING, S.ISSUED]
    assert (order.deactivated_at, order.due_at) == (None, flow.now), "one step is left"
    check_chain(order.chain, order.csr, NAME)
    facts = chain_facts(order.chain)
    assert (order.fingerprint, order.serial) == (facts.fingerprint, facts.serial)
    assert (order.not_before, order.not_after) == (facts.not_before, facts.not_after)
    assert flow.pebble.certificate_status(order.serial) == "Valid"
    server = await flow.server()
    assert server.order_due_at == renew_at(facts.not_before, facts.not_after)
    assert server.order_due_at < order.ending_due_at < order.not_after
    assert (server.order_failures, server.probe_due_at) == (0, flow.now)
    assert issuance.newest(server).fingerprint == facts.fingerprint
    assert issuance.challenges(server) == ()
    order = await flow.step()
    assert (order.status, order.deactivated_at, order.due_at) == (S.ISSUED, flow.now, None)
    assert order.error is None


async def test_a_process_that_dies_before_it_records_a_step_repeats_it(flow):
    """Each step is done at the CA, its record is lost, and it is done again."""
    flow = await flow()
    await flow.begin()
    for status in (S.REQUESTED, S.PENDING, S.ANSWERED, S.FINALIZING, S.ISSUED):
        before = await flow.order()
        assert before.status is status
        forgotten = {
            column: getattr(before, column)
            for column in (
                "status",
                "url",
                "authorization_url",
                "challenge_url",
                "token",
                "key_authorization",
            )
        }
        for attempt in (1, 2):
            if status is S.PENDING:
                await flow.serve()
            after = await flow.order()
            for _ in range(200):
                if status is S.ISSUED:
                    after = await flow.step()
                    break
                if after.status is not status:
                    break
                after = await flow.step()
                await asyncio.sleep(0.02)
            if attempt == 1:
                async with flow.database.transaction() as session:
                    await session.execute(update(Order).values(**forgotten, deactivated_at=None))
    order = await flow.order()
    assert (order.status, order.error) == (S.ISSUED, None)
    assert order.deactivated_at is not None
    check_chain(order.chain, order.csr, NAME)


@BOTH
async def test_a_challenge_that_the_ca_cannot_fetch_fails_the_order_and_later_ones_wait_longer(flow):
    """The CA looks at another port than the precheck: what a firewall does."""
    flow = await flow(http_port=free_port())
    for wait in (60, 600, 6000, 86_400, 86_400):
        await flow.begin()
        order = await flow.until(S.FAILED)
        assert order.error.startswith("connection: ")
        assert order.due_at == flow.now, "its authorization has to be deactivated"
        server = await flow.server()
        assert server.order_due_at == flow.now + timedelta(seconds=wait)
        order = await flow.step()
        assert (order.deactivated_at, order.due_at) == (flow.now, None)
        assert (await flow.server()).order_due_at == server.order_due_at, "cleaning up changes no schedule"
        flow.now = server.order_due_at
    assert (await flow.server()).order_failures == 5
    async with flow.database.transaction() as session:
        found = select(Notice).where(Notice.kind == NoticeKind.CERTIFICATE_TROUBLE)
        (notice,) = await session.scalars(found)
    assert notice.data["reason"].startswith("connection: "), "the first of a series is told"
    assert notice.data["next_at"] == (notice.at + timedelta(seconds=60)).isoformat()
    assert issuance.newest(await flow.server()) is None


async def test_success_begins_the_waits_anew(flow):
    flow = await flow()
    async with flow.registry.change(flow.server_id) as (_, server):
        server.order_failures = 3
    await flow.certified()
    assert (await flow.server()).order_failures == 0


@BOTH
async def test_a_ca_that_is_away_is_told_and_asked_again_later_and_later(flow):
    flow = await flow()
    await flow.begin()
    account = await flow.account()
    flow.pebble.stop()
    for attempt in range(1, 4):
        order = await flow.step(account)
        assert (order.status, order.attempts) == (S.REQUESTED, attempt)
        assert order.error.startswith("CA: ")
        assert order.due_at == flow.now + timedelta(seconds=10 * 2 ** (attempt - 1))
    assert (await flow.server()).order_due_at is None, "the order stays, no other one is begun"
    flow.pebble.start()
    order = await flow.until(S.ISSUED)
    assert (order.attempts, order.error) == (0, None)


@pytest.mark.parametrize("status", [S.PENDING, S.ANSWERED])
async def test_an_order_that_the_ca_knows_no_more_fails_and_another_one_is_begun(flow, status):
    """Orders end after a while (7 days at Let's Encrypt), and a CA may lose them."""
    flow = await flow()
    await flow.begin()
    await flow.until(status)
    flow.pebble.restart()
    await flow.serve()
    for _ in range(3):
        order = await flow.step()
    assert order.status is S.FAILED, order.error
    server = await flow.server()
    assert server.order_due_at is not None
    flow.now = server.order_due_at
    assert (await flow.certified()).status is S.ISSUED


async def test_until_the_precheck_succeeds_the_ca_is_not_told_to_look(flow):
    flow = await flow()
    await flow.begin()
    await flow.step()
    await flow.serve()
    pending = await flow.order()
    path = ACME_PATH + pending.token
    flow.responder.replace(NAME, {})
    order = await flow.step()
    assert order.status is S.PENDING
    assert order.error == "precheck: HTTP status 404 instead of 200"
    assert order.due_at == flow.now + timedelta(seconds=10)
    flow.responder.publish(NAME, path, f"{order.token}.{'x' * 43}".encode())
    order = await flow.step()
    assert order.error == "precheck: 127.0.0.1 answers the challenge with something else"
    settings, closed = flow.settings, flow.settings.ports.model_copy(update={"http": free_port()})
    flow.settings = settings.model_copy(update={"ports": closed})
    order = await flow.step()
    assert (order.status, order.error[:9]) == (S.PENDING, "precheck:")
    assert order.attempts == 3
    account = await flow.account()
    assert (await account.poll(order.url)).status is OrderState.PENDING
    flow.settings = settings
    flow.responder.publish(NAME, path, order.key_authorization.encode())
    assert (await flow.until(S.ISSUED)).error is None


async def test_the_precheck_asks_every_published_address(flow):
    """A CA may ask any of them; the second one has no responder."""
    flow = await flow()
    async with flow.registry.change(flow.server_id) as (session, server):
        session.add(servers.Address(server_id=server.id, address="127.0.0.2", proved_at=flow.now))
    await flow.begin()
    await flow.step()
    await flow.serve()
    order = await flow.step()
    assert order.status is S.PENDING
    assert order.error.startswith("precheck: ")


async def test_a_cached_authorization_is_used_by_an_order_and_is_gone_after_it(flow):
    """The control for deactivation: this CA uses every valid authorization again."""
    flow = await flow(authz_reuse=100)
    await flow.begin()
    first = await flow.until(S.ISSUED)
    await flow.begin()
    second = await flow.step()
    assert (second.status, second.token) == (S.ANSWERED, None), "the CA asked for no challenge"
    assert second.authorization_url == first.authorization_url
    assert issuance.challenges(await flow.server()) == ()
    second = await flow.until(S.ISSUED)
    assert second.serial != first.serial
    assert (await flow.step()).deactivated_at == flow.now
    await flow.begin()
    third = await flow.step()
    assert third.status is S.PENDING, "after the deactivation there is a new challenge"
    assert third.authorization_url != first.authorization_url


async def test_an_authorization_does_not_end_under_a_newer_order_that_rests_on_it(flow):
    """The process of the account died between the issue and the end of the authorization, and a renewal began."""
    flow = await flow(authz_reuse=100)
    await flow.begin()
    first = await flow.until(S.ISSUED)
    await flow.begin()
    second = await flow.step()
    assert second.authorization_url == first.authorization_url
    first = await flow.step(order=first.id)
    assert (first.deactivated_at, first.error) == (None, None)
    assert first.due_at == flow.now + flow.settings.policy.step_wait(0)
    second = await flow.until(S.ISSUED)
    assert second.url != first.url
    assert (await flow.step()).deactivated_at == flow.now
    first = await flow.step(order=first.id)
    assert (first.deactivated_at, first.error, first.due_at) == (flow.now, None, None)


async def test_an_authorization_ends_though_the_agent_never_answers_for_the_newer_order(flow):
    flow = await flow(authz_reuse=100)
    await flow.begin()
    first = await flow.until(S.ISSUED)
    await (await flow.account()).deactivate_authorization(first.authorization_url)  # not used again
    flow.now += timedelta(days=1)
    await flow.begin()
    second = await flow.step()
    assert (second.status, second.due_at) == (S.PENDING, None)
    assert second.authorization_url != first.authorization_url
    flow.now += timedelta(hours=1) - timedelta(seconds=1)
    assert (await flow.step(order=first.id)).deactivated_at is None
    flow.now += timedelta(seconds=1)
    first = await flow.step(order=first.id)
    assert (first.deactivated_at, first.due_at, first.error) == (flow.now, None, None)
    assert (await flow.until(S.ISSUED)).id == second.id, "the newer one is none the worse for it"


async def test_an_authorization_of_a_key_that_others_know_ends_at_once(flow):
    flow = await flow(authz_reuse=100)
    await flow.begin()
    first = await flow.until(S.ISSUED)
    async with flow.registry.change(flow.server_id) as (_, server):
        issuance.revoke_compromised(server, flow.now)
    await flow.begin()
    await flow.step()
    first = await flow.step(order=first.id)
    assert (first.deactivated_at, first.revoked_at) == (flow.now, flow.now)


async def test_two_processes_with_the_same_order_make_one_certificate_of_it(flow):
    """A lease may end while its holder still works."""
    flow = await flow()
    await flow.begin()
    accounts = [await flow.account(), await flow.account()]
    for _ in range(200):
        await asyncio.gather(*(flow.step(account) for account in accounts))
        await flow.serve()
        if (await flow.order()).deactivated_at is not None:
            break
        await asyncio.sleep(0.02)
    order = await flow.order()
    assert (order.status, order.error) == (S.ISSUED, None)
    check_chain(order.chain, order.csr, NAME)


async def test_an_order_is_begun_once_and_only_for_a_server_in_dns(flow):
    flow = await flow()
    await flow.begin()
    async with flow.registry.change(flow.server_id) as (_, server):
        issuance.want(server, flow.now)
        assert len(server.orders) == 1
        assert server.order_due_at is None
    other = await flow.registry.server("bob", "127.0.0.3", state=ServerState.REGISTERED)
    async with flow.registry.change(other) as (_, server):
        issuance.want(server, flow.now)
        assert server.orders == []


async def test_what_an_agent_with_lost_keys_left_behind_is_failed_and_deactivated(flow):
    flow = await flow()
    await flow.begin()
    pending = await flow.until(S.PENDING)
    async with flow.registry.change(flow.server_id) as (_, server):
        issuance.start_anew(server, flow.now)
    order = await flow.step()
    assert (order.status, order.deactivated_at) == (S.FAILED, flow.now)
    account = await flow.account()
    assert (await account.poll(pending.url)).status is OrderState.INVALID
    assert (await flow.certified()).status is S.ISSUED


async def compromised(flow):
    async with flow.registry.change(flow.server_id) as (_, server):
        issuance.revoke_compromised(server, flow.now)


@BOTH
async def test_a_certificate_whose_key_is_lost_is_revoked_as_that_and_another_one_gets_another_key(flow):
    flow = await flow()
    lost = await flow.certified()
    await compromised(flow)
    server = await flow.server()
    assert server.order_due_at == flow.now
    assert issuance.newest(server).fingerprint == lost.fingerprint, "served until there is another one"
    revoked = await flow.step()
    assert (revoked.status, revoked.revoked_at, revoked.due_at) == (S.ISSUED, flow.now, None)
    assert revoked.deactivated_at == lost.deactivated_at
    assert flow.pebble.revocation_reason(lost.serial) == RevocationReason.KEY_COMPROMISE
    other = await flow.certified()
    assert chain_facts(other.chain).fingerprint == issuance.newest(await flow.server()).fingerprint
    assert flow.pebble.certificate_status(other.serial) == "Valid"
    assert (other.id != lost.id, other.compromised_at, other.csr == lost.csr) == (True, None, False)
    async with flow.database.transaction() as session:
        found = await session.scalars(select(Event).where(Event.subject == f"order {lost.id}"))
        assert any("compromised_at" in (event.after or {}) for event in found)


async def test_a_loss_that_is_told_during_an_order_ends_that_order_too(flow):
    """Its key was on the same host."""
    flow = await flow()
    lost = await flow.certified()
    await flow.begin()
    pending = await flow.until(S.FINALIZING)
    await compromised(flow)
    end = asyncio.get_running_loop().time() + 20
    while (order := await flow.step()).due_at is not None:
        assert asyncio.get_running_loop().time() < end
        await asyncio.sleep(0.02)
    assert (order.id, order.status) == (pending.id, S.FAILED)
    if order.serial is not None:
        assert flow.pebble.revocation_reason(order.serial) == RevocationReason.KEY_COMPROMISE
        assert order.revoked_at == flow.now
    await issuance.advance(flow.database, flow.settings, flow.accounts, lost.id, flow.now)
    assert flow.pebble.certificate_status(lost.serial) == "Revoked"
    assert (await flow.certified()).status is S.ISSUED


async def test_a_loss_that_is_told_while_the_order_is_wound_up_is_not_forgotten(flow):
    """The step began before, and records itself after."""
    flow = await flow()
    await flow.begin()
    issued = await flow.until(S.ISSUED)
    change = await issuance._wind_up(
        flow.settings, await flow.account(), issued, await flow.server(), flow.now
    )
    await compromised(flow)
    async with flow.registry.change(flow.server_id) as (_, server):
        change(server.orders[-1], flow.now)
        assert server.orders[-1].due_at == flow.now
    assert (await flow.step()).revoked_at == flow.now


async def test_without_a_certificate_of_ours_there_is_nothing_to_revoke(flow):
    flow = await flow()
    with pytest.raises(WrongState):
        await compromised(flow)
    await flow.certified()
    await compromised(flow)
    with pytest.raises(WrongState):
        await compromised(flow)
