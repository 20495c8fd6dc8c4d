"""Removals against a strict Pebble: each step once, in any order of failures, and the receipt's times stay."""

import asyncio
from datetime import timedelta

import pytest
from sqlalchemy import func, select

from nts_core.acme import AcmeError, OrderState
from nts_core.certificates import chain_facts
from nts_core.control import ServerState
from poolsvc import issuance, removal, servers
from poolsvc.models import Order, OrderStatus

S = ServerState
BOTH = pytest.mark.parametrize("engine", ["sqlite", "postgresql"], indirect=True)


async def leave(flow, *, dns=True):
    """The member's word, and what the publication notes once DNS shows nothing any more."""
    async with flow.registry.change(flow.server_id) as (session, server):
        await servers.leave(session, server, actor="member 1", reason="removed by member", now=flow.now)
    if dns:
        await broken_in_dns(flow)


async def broken_in_dns(flow):
    async with flow.registry.change(flow.server_id) as (_, server):
        server.srv_withdrawn_at = server.name_broken_at = flow.now


async def advance(flow, account):
    """A pass with this account; None while the CA is out of reach."""

    async def accounts(_name, _now):
        if account is None:
            raise AcmeError("unreachable", "out of reach")
        return account

    await removal.advance(flow.database, flow.settings, accounts, flow.server_id, flow.now)
    return await flow.server()


def receipt(flow, server):
    return removal.receipt(server, flow.settings)


@BOTH
async def test_a_certified_server_is_revoked_and_removed_with_a_full_receipt(flow):
    flow = await flow()
    order = await flow.certified()
    issued_at = flow.now
    flow.now += timedelta(minutes=5)
    assert receipt(flow, await flow.server()) is None
    await leave(flow)
    server = await advance(flow, await flow.account())
    assert server.state is S.REMOVED
    assert flow.pebble.certificate_status(order.serial) == "Revoked"
    found = receipt(flow, server)
    assert found.authorization_deactivated_at == issued_at, "it ended with the issue already"
    assert found.certificate_revoked_at == found.removed_at == found.name_broken_at == flow.now
    assert (found.error, found.outstanding, found.last_certificate_ends_at) == (None, (), order.not_after)
    assert order.not_after.isoformat() in found.exposure
    assert (await flow.order()).revoked_at == flow.now
    flow.now += timedelta(minutes=5)
    assert receipt(flow, await advance(flow, await flow.account())) == found


@BOTH
async def test_the_ca_is_not_kept_waiting_by_dns_and_every_step_keeps_its_time(flow):
    flow = await flow()
    order = await flow.certified()
    await leave(flow, dns=False)
    flow.now += flow.settings.leaving_grace
    server = await advance(flow, await flow.account())
    assert server.state is S.LEAVING
    assert flow.pebble.certificate_status(order.serial) == "Revoked"
    first = receipt(flow, server)
    assert first.certificate_revoked_at == flow.now
    assert (first.srv_withdrawn_at, first.name_broken_at, first.removed_at) == (None, None, None)
    assert [words.partition(":")[0] for words in first.outstanding] == ["SRV", "addresses and CAA"]
    assert server.removal_due_at == flow.now + timedelta(seconds=10)
    flow.now += timedelta(hours=1)
    await broken_in_dns(flow)
    server = await advance(flow, await flow.account())
    last = receipt(flow, server)
    assert (server.state, server.removal_due_at) == (S.REMOVED, None)
    assert last.certificate_revoked_at == first.certificate_revoked_at
    assert last.authorization_deactivated_at == first.authorization_deactivated_at
    assert last.removed_at == flow.now


async def test_without_any_order_the_steps_keep_their_times_too(flow):
    flow = await flow()
    await leave(flow, dns=False)
    flow.now += flow.settings.leaving_grace
    first = receipt(flow, await advance(flow, await flow.account()))
    assert first.authorization_deactivated_at == first.certificate_revoked_at == flow.now
    flow.now += timedelta(hours=1)
    assert receipt(flow, await advance(flow, await flow.account())) == first


@BOTH
async def test_clients_that_still_come_are_served_with_a_certificate_that_is_not_revoked(flow):
    """The SRV is out after a minute; its TTL and the margin later the name may go, and the CA's steps are due."""
    flow = await flow()
    order, account = await flow.certified(), await flow.account()
    began, minute, second = flow.now, timedelta(minutes=1), timedelta(seconds=1)
    assert flow.settings.leaving_grace == timedelta(seconds=flow.settings.dns.srv_ttl + 60)
    await leave(flow, dns=False)
    server = await advance(flow, account)
    assert server.leave_at == began + flow.settings.leaving_grace
    flow.now = began + minute
    async with flow.registry.change(flow.server_id) as (_, server):
        server.srv_withdrawn_at = flow.now
    ends = flow.now + flow.settings.leaving_grace
    server = await advance(flow, account)
    assert (server.leave_at, server.removal_due_at) == (ends, flow.now + timedelta(seconds=10))
    assert ends.isoformat() in receipt(flow, server).outstanding[0]
    flow.now = began + flow.settings.leaving_grace - second
    await advance(flow, account)
    assert flow.pebble.certificate_status(order.serial) == "Valid"
    flow.now = ends - second
    assert (await advance(flow, account)).leave_at == ends
    flow.now = ends
    server = await advance(flow, account)
    assert (server.leave_at, server.state) == (None, S.LEAVING)
    assert flow.pebble.certificate_status(order.serial) == "Revoked"


@BOTH
async def test_in_an_emergency_nothing_waits_also_when_it_leaves_in_order_already(flow):
    flow = await flow()
    order = await flow.certified()
    await leave(flow, dns=False)
    assert (await advance(flow, await flow.account())).leave_at is not None
    for _ in range(2):
        async with flow.registry.change(flow.server_id) as (session, server):
            await servers.leave(
                session, server, actor="user 1", reason="attacked", now=flow.now, emergency=True
            )
    server = await advance(flow, await flow.account())
    assert server.leave_at is None
    assert flow.pebble.certificate_status(order.serial) == "Revoked"
    assert [words.partition(":")[0] for words in receipt(flow, server).outstanding] == [
        "SRV",
        "addresses and CAA",
    ]
    await broken_in_dns(flow)
    assert (await advance(flow, await flow.account())).state is S.REMOVED


@BOTH
async def test_a_certificate_that_comes_while_the_server_leaves_is_revoked(flow):
    """The CA has the request already: the order cannot be taken back."""
    flow = await flow()
    await flow.begin()
    order = await flow.until(OrderStatus.FINALIZING)
    await leave(flow)
    account = await flow.account()
    for _ in range(200):
        server = await advance(flow, account)
        if server.state is S.REMOVED:
            break
        await asyncio.sleep(0.02)
    assert server.state is S.REMOVED, server.removal_error
    late = await flow.order()
    assert (late.status, late.revoked_at) == (OrderStatus.ISSUED, flow.now)
    assert flow.pebble.certificate_status(late.serial) == "Revoked"
    assert receipt(flow, server).last_certificate_ends_at == late.not_after
    assert late.url == order.url


@pytest.mark.parametrize("status", [OrderStatus.REQUESTED, OrderStatus.PENDING, OrderStatus.ANSWERED])
async def test_an_order_under_way_is_ended_and_can_become_nothing(flow, status):
    flow = await flow()
    await flow.begin()
    await flow.until(status)
    await leave(flow)
    account = await flow.account()
    server = await advance(flow, account)
    assert server.state is S.REMOVED, server.removal_error
    order = await flow.order()
    assert (order.status, order.error, order.due_at) == (
        OrderStatus.FAILED,
        "the server leaves the pool",
        None,
    )
    if order.url is not None:
        assert (await account.poll(order.url)).status is OrderState.INVALID
    assert (await flow.step(account)).status is OrderStatus.FAILED
    assert (await flow.server()).order_due_at is None, "no order is begun for a server that has left"


@BOTH
async def test_with_the_ca_away_the_server_stays_leaving_and_the_rest_is_done_later(flow):
    flow = await flow()
    order = await flow.certified()
    await leave(flow)
    server = await advance(flow, None)
    assert (server.state, server.removal_error) == (S.LEAVING, "CA: out of reach")
    assert receipt(flow, server).error == "CA: out of reach"
    assert receipt(flow, server).certificate_revoked_at is None
    assert server.removal_due_at == flow.now + timedelta(seconds=10)
    flow.now += timedelta(hours=1)
    server = await advance(flow, await flow.account())
    assert (server.state, server.removal_error) == (S.REMOVED, None)
    assert flow.pebble.certificate_status(order.serial) == "Revoked"


async def test_a_ca_that_fails_during_the_removal_is_told_in_its_own_words(flow):
    flow = await flow()
    await flow.certified()
    account = await flow.account()
    await leave(flow)
    flow.pebble.stop()
    server = await advance(flow, account)
    assert server.state is S.LEAVING
    assert server.removal_error.startswith("CA: ")
    assert receipt(flow, server).certificate_revoked_at is None


async def test_a_server_without_a_certificate_needs_no_ca(flow):
    flow = await flow()
    await leave(flow)
    server = await advance(flow, None)
    assert (server.state, server.removal_error) == (S.REMOVED, None)


async def test_an_expired_certificate_is_not_waited_for(flow):
    flow = await flow()
    order = await flow.certified()
    await leave(flow)
    flow.now = order.not_after + timedelta(seconds=1)
    server = await advance(flow, None)
    assert (server.state, server.removal_error) == (S.REMOVED, None)


async def test_orders_that_the_ca_knows_no_more_keep_nobody_in_the_pool(flow):
    """A failed order of long ago, whose authorization was never seen to end."""
    flow = await flow()
    await flow.begin()
    await flow.until(OrderStatus.PENDING)
    await leave(flow)
    flow.pebble.restart()
    server = await advance(flow, await flow.account())
    assert server.state is S.REMOVED, server.removal_error


async def test_every_certificate_is_revoked_not_only_the_newest(flow):
    flow = await flow()
    first = await flow.certified()
    second = await flow.certified()
    assert first.serial != second.serial
    await leave(flow)
    assert (await advance(flow, await flow.account())).state is S.REMOVED
    for order in (first, second):
        assert flow.pebble.certificate_status(order.serial) == "Revoked"


async def test_a_certificate_of_an_order_that_the_agent_gave_up_is_revoked_as_well(flow):
    """The agent joined again while the CA was issuing for the key before."""
    flow = await flow()
    await flow.begin()
    order = await flow.until(OrderStatus.FINALIZING)
    async with flow.registry.change(flow.server_id) as (_, server):
        issuance.start_anew(server, flow.now)
    account = await flow.account()
    for _ in range(200):
        if (await account.poll(order.url)).status is OrderState.VALID:
            break
        await asyncio.sleep(0.02)
    serial = chain_facts(await account.download(order.url)).serial
    await flow.step(account)
    await leave(flow)
    for _ in range(5):
        server = await advance(flow, account)
    assert server.state is S.REMOVED
    assert flow.pebble.certificate_status(serial) == "Revoked"


@pytest.mark.parametrize("state", [S.REGISTERED, S.VERIFIED, S.ACTIVE, S.REMOVED])
async def test_only_a_leaving_server_is_advanced(registry, state):
    identifier = await registry.server(state=state)
    before = await registry.get(identifier)
    await removal.advance(registry.database, registry.settings, None, identifier, registry.now)
    after = await registry.get(identifier)
    assert (after.state, after.removal_due_at) == (state, before.removal_due_at)
    assert after.certificate_revoked_at is None
    async with registry.database.transaction() as session:
        assert await session.scalar(select(func.count()).select_from(Order)) == 0


async def test_a_name_that_never_was_in_dns_is_free_again_after_the_removal(registry):
    """It can have been seen by nobody, so nobody has to be kept from it."""
    owner = await registry.member()
    first = await registry.server("alice", member=owner)
    async with registry.change(first) as (session, server):
        await servers.leave(session, server, actor="member 1", reason="typing error", now=registry.now)
    await removal.advance(registry.database, registry.settings, None, first, registry.now)
    assert (await registry.get(first)).state is S.REMOVED
    async with registry.database.transaction() as session:
        second = await servers.register(
            session, registry.settings, owner, "alice", ["198.18.0.1"], registry.now, actor="test"
        )
    assert second.id != first
