"""A CA that fails in every way: its words are kept, nothing is held up, the next try is right, and nobody has to help."""

import asyncio
from datetime import timedelta

import pytest
from sqlalchemy import update

from lab.ca_front import Fault, Resource
from lab.caddy import Caddy
from nts_core.acme import AcmeError, OrderState
from poolsvc import issuance
from poolsvc.db import Database
from poolsvc.models import Order, OrderStatus
from poolsvc.worker import ORDERS, claim

NAME = "alice.servers.pool.example"
S = OrderStatus

# What the operator and the member read, and the wait that the CA asked for.
FAULTS = {
    Fault.DOWN: ("CA: ", 0),
    Fault.ENDLESS: ("CA: an answer of more than 262144 octets", 0),
    Fault.LIMITED: ("CA: rateLimited: too many requests of this kind", 120),
    Fault.LIMITED_UNTIL: ("CA: rateLimited: too many requests of this kind", 120),
    Fault.UNAVAILABLE: ("CA: HTTP 503: the CA is under maintenance", 120),
    Fault.BROKEN: ("CA: serverInternal: the CA is broken", 0),
}
NOT_ACME = {
    Fault.BAD_JSON: ("CA: ", 0),
    Fault.HTML: ("CA: ", 0),
}

# Each state of an order, and what the step from there needs of the CA.
STEPS = [
    (S.REQUESTED, Resource.NEW_ORDER, FAULTS | NOT_ACME),
    (S.REQUESTED, Resource.AUTHORIZATION, FAULTS | NOT_ACME),
    (S.PENDING, Resource.CHALLENGE, FAULTS),
    (S.ANSWERED, Resource.ORDER, FAULTS | NOT_ACME),
    (S.ANSWERED, Resource.FINALIZE, FAULTS),
    (S.FINALIZING, Resource.CERTIFICATE, FAULTS | NOT_ACME),
    (S.ISSUED, Resource.AUTHORIZATION, FAULTS),
]


@pytest.mark.parametrize(("status", "resource", "faults"), STEPS)
async def test_a_step_that_the_ca_fails_says_why_waits_as_asked_and_is_taken_later(
    flow, status, resource, faults
):
    flow = await flow(front={}, nonce_reject=0, authz_reuse=0)
    await flow.begin()
    await flow.until(status)
    if resource is Resource.FINALIZE:
        await until_the_ca_says(flow, OrderState.READY)
    for fault, (words, wait) in faults.items():
        await flow.serve()
        account, before = await flow.account(), await flow.order()
        flow.ca.faults = {resource: fault}
        after = await flow.step(account)
        assert after.status is status, f"{fault}: {after.error}"
        assert after.error.startswith(words), f"{fault}: {after.error}"
        least = max(flow.settings.policy.step_wait(before.attempts), timedelta(seconds=wait))
        assert abs(after.due_at - flow.now - least) < timedelta(seconds=10), fault
        flow.ca.faults = {}
        flow.now = after.due_at  # before that no order for a new name is tried
    order = await flow.until(S.ISSUED)
    order = await flow.step()
    assert (order.error, order.deactivated_at) == (None, flow.now)
    assert flow.pebble.certificate_status(order.serial) == "Valid"
    assert flow.ca.asked[Resource.FINALIZE] <= len(faults) + 1


async def until_the_ca_says(flow, state):
    """Without a step of the registry's."""
    account, url = await flow.account(), (await flow.order()).url
    for _ in range(500):
        if (await account.poll(url)).status is state:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"never {state}")


@pytest.mark.parametrize("fault", [Fault.SLOW_HEAD, Fault.SLOW_BODY])
@pytest.mark.parametrize("resource", [Resource.ORDER, Resource.AUTHORIZATION])
async def test_a_slow_ca_holds_the_accounts_thread_no_longer_than_a_call_may_take(flow, fault, resource):
    """Octets come all the time, so that no single read ever takes too long."""
    flow = await flow(front={}, nonce_reject=0)
    await flow.begin()
    url = (await flow.step()).url
    account = await flow.lab.account(flow.ca, timeout=1)
    flow.ca.faults = {resource: fault}
    async with asyncio.timeout(30):
        with pytest.raises(AcmeError) as caught:
            await account.poll(url)
    assert caught.value.code == "unreachable"
    flow.ca.faults = {}
    assert (await account.poll(url)).status is OrderState.PENDING, "the thread works again"


@pytest.mark.parametrize("fault", [Fault.SLOW_HEAD, Fault.SLOW_BODY, Fault.ENDLESS, Fault.HTML, Fault.DOWN])
async def test_a_directory_that_is_not_one_holds_nobody(lab, fault):
    front = lab.front(lab.pebble(nonce_reject=0))
    front.faults = {Resource.DIRECTORY: fault}
    async with asyncio.timeout(30):
        with pytest.raises(AcmeError) as caught:
            await lab.account(front, timeout=1)
    assert not caught.value.permanent
    front.faults = {}
    assert (await lab.account(front)).uri


async def test_what_the_ca_asked_to_wait_outlives_the_process(flow, engine_url):
    flow = await flow(front={}, nonce_reject=0)
    await flow.begin()
    flow.ca.faults = {Resource.NEW_ORDER: Fault.LIMITED_UNTIL}
    order = await flow.step()
    another = Database(engine_url)
    try:
        assert await claim(another, ORDERS, flow.now + timedelta(seconds=100)) == []
        async with another.transaction() as session:
            kept = await session.get_one(Order, order.id)
            assert kept.error == "CA: rateLimited: too many requests of this kind"
        assert await claim(another, ORDERS, flow.now + timedelta(seconds=130)) == [order.id]
    finally:
        await another.close()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault.OTHER_KEY, "the certificate is not for the request's key"),
        (Fault.OTHER_NAME, "mallory.example"),
    ],
)
async def test_a_chain_for_something_else_is_never_installed(flow, fault, words):
    flow = await flow(front={}, nonce_reject=0, authz_reuse=0)
    await flow.begin()
    await flow.until(S.FINALIZING)
    flow.ca.faults = {Resource.CERTIFICATE: fault}
    order = await flow.until(S.FAILED)
    assert words in order.error
    assert issuance.newest(await flow.server()) is None
    assert (await flow.server()).order_due_at == flow.now + timedelta(seconds=60)
    flow.ca.faults = {}
    await flow.step()
    flow.now = (await flow.server()).order_due_at
    await flow.certified()
    assert (await flow.server()).order_failures == 0


@pytest.mark.parametrize("engine", ["sqlite", "postgresql"], indirect=True)
@pytest.mark.parametrize("status", [S.ANSWERED, S.FINALIZING])
async def test_an_order_that_the_ca_never_decides_is_given_up_and_another_one_succeeds(flow, status):
    flow = await flow(front={}, nonce_reject=0, authz_reuse=0)
    await flow.begin()
    await flow.until(status)
    if status is S.FINALIZING:
        await until_the_ca_says(flow, OrderState.VALID)
    flow.ca.faults = {Resource.ORDER: Fault.UNDECIDED}
    order = await flow.step()
    assert (order.status, order.due_at > flow.now) == (status, True)
    async with flow.database.transaction() as session:
        await session.execute(update(Order).values(attempts=127))
    assert (await flow.step()).status is status
    order = await flow.step()
    assert order.status is S.FAILED
    assert order.error.startswith("the CA left the order ")
    assert (await flow.server()).order_due_at == flow.now + timedelta(seconds=60)
    flow.ca.faults = {}
    order = await flow.step()
    assert order.deactivated_at == flow.now
    assert (order.chain is not None) == (status is S.FINALIZING), (
        "a late certificate is kept for its revocation"
    )
    flow.now += timedelta(seconds=60)
    await flow.certified()


async def test_a_ca_that_keeps_a_failed_challenge_open_is_not_asked_for_ever(flow):
    """Caddy's way; its words are shown meanwhile, and the next order is a new one, here at another CA."""
    flow = await flow()
    flow.ca = flow.lab.enter_context(Caddy(flow.lab.directory / "caddy", name=NAME))
    await flow.begin()
    await flow.until(S.ANSWERED)
    account, words = await flow.account(), ""
    for _ in range(500):
        order = await flow.step(account)
        if order.status is S.FAILED:
            break
        words = order.error or words
        await asyncio.sleep(0.02)
    assert order.status is S.FAILED
    assert order.error == words == "connection: The server could not connect to validation target"
    assert (await flow.server()).order_due_at == flow.now + timedelta(seconds=60)
    order = await flow.step(account)
    assert (order.status, order.deactivated_at) == (S.FAILED, None)
    assert order.error == words, "how its cleaning goes does not hide why it failed"
    assert order.due_at > flow.now, "Caddy ends no authorization; they end by themselves"
    flow.ca = flow.pebble
    flow.now += timedelta(seconds=60)
    await flow.certified()
