"""When a certificate is renewed and by whom: the CA's window, `replaces`, profiles, and other CAs for one that is away."""

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import select

from lab.ca_front import Fault, Resource
from lab.pebble import PROFILES, is_known
from lab.peers import PEBBLE_SID
from lab.processes import free_port
from nts_core.acme import AcmeError, RevocationReason
from nts_core.certificates import certificate_id, renew_at, renew_by
from nts_core.control import ServerState
from poolsvc import issuance, removal, renewals, servers
from poolsvc.authorities import Authorities
from poolsvc.errors import WrongState
from poolsvc.models import CaAccount, Order, OrderStatus, Server

S = OrderStatus
BOTH = pytest.mark.parametrize("engine", ["sqlite", "postgresql"], indirect=True)
newer = pytest.mark.skipif(not PEBBLE_SID.is_there(), reason="Pebble of Debian sid is not unpacked")
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


async def ask(flow, order=None):
    """One look at what the CA says of the renewal; the order and the server after it."""
    order = order or await flow.order()
    await renewals.ask(flow.database, flow.settings, flow.accounts, order.id, flow.now)
    server = await flow.server()
    return next(row for row in server.orders if row.id == order.id), server


def leaf(order):
    return order.chain.split("-----END CERTIFICATE-----")[0] + "-----END CERTIFICATE-----\n"


async def known(flow):
    """A certificate that this Pebble can find when another is to replace it."""
    while not is_known((issued := await flow.certified()).chain):
        pass
    return issued


@pytest.fixture
def modern(flow):
    """A Flow with a CA that has renewal information and profiles."""
    return lambda **options: flow(newer=True, profiles=PROFILES, **options)


@newer
@BOTH
async def test_the_cas_window_decides_and_the_moment_is_drawn_once(modern):
    flow = await modern()
    issued = await flow.certified()
    server = await flow.server()
    ours = renew_at(issued.not_before, issued.not_after)
    assert (server.order_due_at, issued.window_due_at, issued.renew_at) == (ours, flow.now, None)
    start, end = flow.now + 3 * DAY, flow.now + 5 * DAY
    flow.pebble.set_renewal_window(leaf(issued), start, end, why="https://ca.example/why")
    order, server = await ask(flow)
    assert (order.window_start, order.window_end) == (start, end)
    assert start <= order.renew_at <= end
    assert server.order_due_at == order.renew_at == servers.renewal_at(server)
    assert order.window_url == "https://ca.example/why"
    assert timedelta(minutes=1) <= order.window_due_at - flow.now <= DAY
    flow.now += HOUR
    again, server = await ask(flow)
    assert (again.renew_at, server.order_due_at) == (order.renew_at, order.renew_at), "drawn anew"
    assert again.window_due_at == order.window_due_at + HOUR
    other = start + 10 * DAY, end + 10 * DAY
    flow.pebble.set_renewal_window(leaf(issued), *other)
    moved, server = await ask(flow)
    assert other[0] <= moved.renew_at == server.order_due_at <= other[1]
    assert moved.window_url is None


@newer
async def test_a_window_in_the_past_means_now_and_the_new_certificate_replaces_the_old_one(modern):
    flow = await modern()
    issued = await known(flow)
    flow.now += HOUR
    flow.pebble.set_renewal_window(leaf(issued), flow.now - 2 * DAY, flow.now - DAY)
    order, server = await ask(flow)
    assert order.renew_at < flow.now
    assert server.order_due_at <= flow.now, "the worker begins an order at once"
    account = await flow.account()
    pending = await account.order(
        issued.csr, "alice.servers.pool.example", replaces=certificate_id(issued.chain)
    )
    assert pending.replaces == certificate_id(issued.chain), "the control: the CA takes it"
    renewed = await flow.certified()
    assert renewed.id != issued.id
    with pytest.raises(AcmeError) as caught:
        await raw_order(account, replaces=certificate_id(issued.chain))
    assert caught.value.status == 409, "the CA does not know that it was replaced"
    order, server = await ask(flow, issued)
    assert order.window_due_at is None, "nobody asks of a certificate that was replaced"
    assert server.order_due_at > flow.now


async def raw_order(account, **wishes):
    """An order as it is, without the ways out that `order` has."""
    name = {"type": "dns", "value": "alice.servers.pool.example"}
    order = {"identifiers": [name], **wishes}
    return await asyncio.to_thread(account._network.call, account._directory["newOrder"], order)


@newer
async def test_what_was_replaced_or_is_another_accounts_or_is_none_does_not_keep_an_order_from_being_made(
    modern, lab
):
    flow = await modern()
    first = await flow.certified()
    await flow.certified()
    account = await flow.account()
    name, known = "alice.servers.pool.example", certificate_id(first.chain)
    assert (await account.order(first.csr, name, replaces=known)).replaces is None
    for other in ("x.y", "aYhba4dGQEHhs3uEe6CuLN4ByNQ.AIdlQyE", "a" * 2000):
        assert (await account.order(first.csr, name, replaces=other)).replaces is None
    third = await flow.certified()
    (lab.directory / "keys" / "account.pem").unlink()
    stranger = await flow.account()
    pending = await stranger.order(third.csr, name, replaces=certificate_id(third.chain))
    assert pending.replaces is None, "only the account that got it may replace it"


@newer
async def test_a_ca_that_breaks_over_what_is_replaced_still_renews(modern, monkeypatch):
    flow = await modern()
    issued, account = await flow.certified(), await flow.account()
    asked, call = [], account._network.call

    def broken(url, payload=None, *rest, **options):
        if isinstance(payload, dict) and "identifiers" in payload:
            asked.append("replaces" in payload)
            if asked[-1]:
                raise AcmeError("server-error", "no such certificate", status=500)
        return call(url, payload, *rest, **options)

    monkeypatch.setattr(account._network, "call", broken)
    name, before = "alice.servers.pool.example", certificate_id(issued.chain)
    assert (await account.order(issued.csr, name, replaces=before)).replaces is None
    assert asked == [True, False]


@newer
async def test_only_what_the_same_account_got_is_named_as_replaced(modern, lab):
    flow = await modern()
    issued = await flow.certified()
    assert issued.account_uri == (await flow.account()).uri
    server = await flow.server()
    assert issuance._replaced(server, issued.account_uri) == certificate_id(issued.chain)
    assert issuance._replaced(server, f"{issued.account_uri}0") is None
    server.orders[-1].chain = None
    assert issuance._replaced(server, issued.account_uri) is None, "seen, and not ours"


@newer
async def test_a_certificate_of_a_lost_key_is_replaced_as_such_and_nobody_asks_of_it(modern):
    """Its successor is the most urgent one of all."""
    flow = await modern()
    lost = await flow.certified()
    async with flow.registry.change(flow.server_id) as (_, server):
        issuance.revoke_compromised(server, flow.now)
        assert issuance._replaced(server, lost.account_uri) == certificate_id(lost.chain)
    order, server = await ask(flow)
    assert (order.window_due_at, order.renew_at, server.order_due_at) == (None, None, flow.now)
    await flow.step()
    renewed = await flow.certified()
    assert renewed.status is S.ISSUED
    assert flow.pebble.certificate_status(lost.serial) == "Revoked"


@newer
async def test_a_window_that_is_too_late_is_not_waited_for(modern):
    flow = await modern()
    issued = await flow.certified()
    late = issued.not_after - HOUR
    flow.pebble.set_renewal_window(leaf(issued), late, late + 2 * HOUR)
    order, server = await ask(flow)
    assert order.renew_at == server.order_due_at == renew_by(issued.not_before, issued.not_after)
    assert order.renew_at < order.ending_due_at, "before anybody is told of trouble"


@newer
async def test_a_ca_that_wants_everything_at_once_for_ever_is_obeyed_ever_more_slowly(modern):
    flow = await modern()
    waits = flow.settings.policy.retry
    for wait in waits[:3]:
        issued = await flow.certified()
        flow.pebble.set_renewal_window(leaf(issued), flow.now - 2 * DAY, flow.now - DAY)
        _, server = await ask(flow)
        assert server.order_due_at == flow.now + timedelta(seconds=wait)
        flow.now = server.order_due_at
        async with flow.registry.change(flow.server_id) as (_, server):
            server.order_due_at = None


async def test_a_ca_without_renewal_information_leaves_the_renewal_to_our_own_rule(flow):
    flow = await flow()
    issued = await flow.certified()
    order, server = await ask(flow)
    assert order.window_due_at == flow.now + DAY
    assert (order.renew_at, order.window_start) == (None, None)
    assert server.order_due_at == renew_at(issued.not_before, issued.not_after)
    assert (await (await flow.account()).renewal_info(certificate_id(issued.chain))) is None
    pending = await (await flow.account()).order(
        issued.csr, "alice.servers.pool.example", replaces=certificate_id(issued.chain)
    )
    assert pending.replaces is None, "never said to a CA that does not know it"


@newer
async def test_a_ca_that_is_away_or_knows_nothing_is_asked_again_later_and_the_plan_stays(modern):
    flow = await modern()
    issued = await flow.certified()
    start = flow.now + 3 * DAY
    flow.pebble.set_renewal_window(leaf(issued), start, start + DAY)
    planned, _ = await ask(flow)
    account = await flow.account()
    flow.authorities = SameAccount(account)
    flow.pebble.stop()
    order, server = await ask(flow)
    assert order.window_due_at == flow.now + HOUR
    assert order.renew_at == server.order_due_at == planned.renew_at
    flow.pebble.start()
    order, server = await ask(flow)
    assert order.window_due_at == flow.now + 6 * HOUR, "this CA has lost its data: 404"
    assert order.renew_at == server.order_due_at == planned.renew_at


class SameAccount:
    """An account that is never opened anew."""

    def __init__(self, account):
        self._account = account

    async def account(self, _name, _now):
        return self._account


@newer
async def test_what_is_due_already_stays_due(modern):
    """The agent joined again, or an order has failed: that does not wait for a window."""
    flow = await modern()
    issued = await flow.certified()
    start = flow.now + 20 * DAY
    flow.pebble.set_renewal_window(leaf(issued), start, start + DAY)
    async with flow.registry.change(flow.server_id) as (_, server):
        issuance.start_anew(server, flow.now)
    order, server = await ask(flow)
    assert (server.order_due_at, order.renew_at > flow.now) == (flow.now, True)
    async with flow.registry.change(flow.server_id) as (_, server):
        server.order_due_at, server.order_failures = flow.now + HOUR, 1
    assert (await ask(flow))[1].order_due_at == flow.now + HOUR


@newer
async def test_of_a_server_that_leaves_nobody_asks(modern):
    flow = await modern()
    await flow.certified()
    async with flow.registry.change(flow.server_id) as (session, server):
        await servers.leave(session, server, actor="member 1", reason="test", now=flow.now)
    order, server = await ask(flow)
    assert (order.window_due_at, server.order_due_at) == (None, None)


# Profiles


@newer
@pytest.mark.parametrize(
    ("settled", "short_lived", "wanted"),
    [
        ("auto", False, "tlsserver"),
        ("auto", True, "shortlived"),
        ("classic", False, "classic"),
        ("classic", True, "shortlived"),
        ("unheard-of", False, None),
    ],
)
async def test_the_profile_of_an_order(modern, lab, settled, short_lived, wanted):
    flow = await modern()
    flow.settings = flow.settings.model_copy(update={"ca": lab.settings(flow.pebble, profile=settled)})
    flow.authorities = Authorities(flow.database, flow.settings, {}, {})
    try:
        async with flow.registry.change(flow.server_id) as (_, server):
            server.short_lived = short_lived
        order = await flow.certified()
    finally:
        flow.authorities.close()
    assert order.profile == wanted
    lives = set(PROFILES.values()) if wanted is None else {PROFILES[wanted]}
    assert any(abs((order.not_after - order.not_before).total_seconds() - life) < 60 for life in lives)


@newer
async def test_a_profile_that_the_ca_drops_meanwhile_ends_no_order(modern):
    """The account has read the directory before."""
    flow = await modern()
    account = await flow.account()
    csr = (await flow.certified()).csr
    account._directory["meta"]["profiles"]["unheard-of"] = "as it was"
    account._config = replace(account._config, profile="unheard-of")
    with pytest.raises(AcmeError, match="invalidProfile"):
        await raw_order(account, profile="unheard-of")
    assert (await account.order(csr, "alice.servers.pool.example")).profile is None


async def test_a_member_may_choose_short_life_where_a_ca_has_it(registry):
    alice = await registry.server(state=ServerState.ACTIVE)
    await registry.open_account()

    async def choose(*, wanted):
        async with registry.change(alice) as (session, server):
            await issuance.set_short_lived(session, registry.settings, server, wanted=wanted)
            return server.short_lived

    with pytest.raises(WrongState) as caught:
        await choose(wanted=True)
    assert caught.value.field == "short_lived"
    assert await choose(wanted=False) is False
    async with registry.database.transaction() as session:
        (await session.scalars(select(CaAccount))).one().profiles = ["classic", "shortlived"]
    assert await choose(wanted=True) is True
    async with registry.database.transaction() as session:
        (await session.scalars(select(CaAccount))).one().profiles = []
    assert await choose(wanted=True) is True, "what is settled is no new wish"
    bob = await registry.server("bob", "198.18.0.2", agentless=True)
    async with registry.change(bob) as (session, server):
        with pytest.raises(WrongState, match="own account"):
            await issuance.set_short_lived(session, registry.settings, server, wanted=True)


# Several CAs

PATIENCE = 6 * HOUR


@pytest.fixture
async def two(flow, lab):
    """A Flow whose settings have two CAs, with the registry's accounts there."""
    made: list[Authorities] = []

    async def make(**options):
        one = await flow(**options)
        one.second = lab.pebble("second")
        one.settings = one.settings.model_copy(update={"ca": lab.settings(one.ca, one.second)})
        one.first_name, one.second_name = (ca.name for ca in one.settings.ca.all)
        one.away = {}
        one.authorities = Authorities(one.database, one.settings, one.away, {})
        made.append(one.authorities)
        return one

    yield make
    for authorities in made:
        authorities.close()


@BOTH
async def test_an_order_waits_for_its_ca_and_then_another_one_gets_it(two):
    flow = await two()
    flow.pebble.stop()
    await flow.begin()
    began = flow.now
    order = await flow.step()
    assert (order.status, order.ca) == (S.REQUESTED, flow.first_name)
    assert order.error.startswith("CA: ")
    flow.now = began + PATIENCE - timedelta(minutes=1)
    assert (await flow.step()).ca == flow.first_name
    flow.now = began + PATIENCE
    order = await flow.step()
    assert (order.ca, order.ca_since, order.due_at, order.attempts) == (
        flow.second_name,
        flow.now,
        flow.now,
        0,
    )
    issued = await flow.until(S.ISSUED)
    assert (issued.ca, issued.id) == (flow.second_name, order.id)
    assert flow.second.certificate_status(issued.serial) == "Valid"
    assert (await flow.step()).deactivated_at == flow.now


async def test_what_a_ca_has_taken_stays_there(two):
    """However long it is away, and whatever the other one could do."""
    flow = await two()
    await flow.begin()
    pending = await flow.step()
    assert (pending.status, pending.ca) == (S.PENDING, flow.first_name)
    await flow.serve()
    flow.pebble.stop()
    flow.now += 10 * PATIENCE
    order = await flow.step()
    assert (order.ca, order.url, order.status) == (flow.first_name, pending.url, S.PENDING)


async def test_the_first_ca_gets_the_next_order_again(two):
    flow = await two()
    flow.pebble.stop()
    await flow.begin()
    flow.now += PATIENCE
    await flow.step()
    assert (await flow.until(S.ISSUED)).ca == flow.second_name
    await flow.step()
    flow.pebble.start()
    flow.now += DAY
    await flow.begin()
    assert (await flow.until(S.ISSUED)).ca == flow.first_name


async def test_with_all_cas_away_an_order_goes_round(two):
    flow = await two()
    flow.pebble.stop()
    flow.second.stop()
    await flow.begin()
    seen = []
    for _ in range(4):
        flow.now += PATIENCE
        seen.append((await flow.step()).ca)
    assert seen == [flow.second_name, flow.first_name] * 2


async def at_second(flow):
    """A whole order at the second CA, as if the first one had been away."""
    await flow.begin()
    async with flow.registry.change(flow.server_id) as (_, server):
        server.orders[-1].ca = flow.second_name
    await flow.until(S.ISSUED)
    return await flow.step()


async def taken_out(flow):
    async with flow.registry.change(flow.server_id) as (session, server):
        await servers.leave(session, server, actor="member 1", reason="test", now=flow.now)
        server.srv_withdrawn_at = server.name_broken_at = flow.now
    await removal.advance(flow.database, flow.settings, flow.accounts, flow.server_id, flow.now)
    return await flow.server()


@BOTH
async def test_a_removal_revokes_at_the_ca_of_each_certificate(two):
    flow = await two()
    first, second = await flow.certified(), await at_second(flow)
    assert (first.ca, second.ca) == (flow.first_name, flow.second_name)
    assert (await taken_out(flow)).state is ServerState.REMOVED
    assert flow.pebble.certificate_status(first.serial) == "Revoked"
    assert flow.second.certificate_status(second.serial) == "Revoked"


async def test_a_ca_that_is_away_keeps_a_removal_from_nothing_at_the_other(two):
    flow = await two()
    await flow.certified()
    second = await at_second(flow)
    flow.pebble.stop()
    server = await taken_out(flow)
    assert server.state is ServerState.LEAVING
    assert server.removal_error.startswith("CA: ")
    assert flow.second.certificate_status(second.serial) == "Revoked"
    assert [order.revoked_at for order in server.orders] == [None, flow.now]


@BOTH
async def test_what_nobody_foresaw_at_one_ca_loses_nothing_that_the_other_one_did(two):
    flow = await two()
    first, second = await flow.certified(), await at_second(flow)
    authorities = flow.authorities

    async def broken(name, now):
        if name == flow.first_name:
            raise RuntimeError("a fault of ours")
        return await authorities.account(name, now)

    async with flow.registry.change(flow.server_id) as (session, server):
        await servers.leave(session, server, actor="member 1", reason="test", now=flow.now)
        server.srv_withdrawn_at = server.name_broken_at = flow.now
    with pytest.raises(ExceptionGroup) as caught:
        await removal.advance(flow.database, flow.settings, broken, flow.server_id, flow.now)
    assert [str(failure) for failure in caught.value.exceptions] == ["a fault of ours"]
    server = await flow.server()
    assert server.state is ServerState.LEAVING
    assert server.removal_due_at > flow.now
    assert {order.id: order.revoked_at for order in server.orders} == {first.id: None, second.id: flow.now}
    assert (await look_at_removal(flow)).state is ServerState.REMOVED


def without_second(flow, lab):
    """Take the second CA out of the settings."""
    flow.settings = flow.settings.model_copy(update={"ca": lab.settings(flow.pebble)})
    flow.authorities.close()
    flow.authorities = Authorities(flow.database, flow.settings, {}, {})


async def look_at_removal(flow):
    await removal.advance(flow.database, flow.settings, flow.accounts, flow.server_id, flow.now)
    return await flow.server()


async def test_a_removal_waits_for_the_end_of_a_certificate_whose_ca_the_settings_name_no_more(two, lab):
    flow = await two()
    first, second = await flow.certified(), await at_second(flow)
    without_second(flow, lab)
    server = await taken_out(flow)
    assert server.state is ServerState.LEAVING
    assert flow.second_name in server.removal_error
    assert flow.second.certificate_status(second.serial) == "Valid"
    flow.now = second.not_after - timedelta(seconds=1)
    assert (await look_at_removal(flow)).state is ServerState.LEAVING
    flow.now = second.not_after
    server = await look_at_removal(flow)
    assert server.state is ServerState.REMOVED
    receipt = removal.receipt(server, flow.settings)
    end = second.not_after.isoformat()
    assert receipt.error == f"not revoked: its CA is named no more in the settings; ended at {end}"
    assert [order.revoked_at is None for order in server.orders] == [False, True]
    assert flow.pebble.certificate_status(first.serial) == "Revoked"
    flow.authorities.close()


async def test_a_removal_revokes_at_a_ca_that_is_named_again(two, lab):
    flow = await two()
    second = await at_second(flow)
    with_both = flow.settings
    without_second(flow, lab)
    assert (await taken_out(flow)).state is ServerState.LEAVING
    flow.settings = with_both
    flow.authorities.close()
    flow.authorities = Authorities(flow.database, flow.settings, {}, {})
    server = await look_at_removal(flow)
    assert (server.state, server.removal_error) == (ServerState.REMOVED, None)
    assert flow.second.certificate_status(second.serial) == "Revoked"
    flow.authorities.close()


@BOTH
async def test_an_authorization_whose_ca_the_settings_name_no_more_ends_by_itself(two, lab):
    """The certificate of six days has ended long before."""
    flow = await two()
    second = await at_second(flow)
    async with flow.registry.change(flow.server_id) as (_, server):
        server.orders[-1].deactivated_at = None
    without_second(flow, lab)
    assert (await taken_out(flow)).state is ServerState.LEAVING
    end = second.created_at + 30 * DAY
    flow.now = end - timedelta(seconds=1)
    server = await look_at_removal(flow)
    assert (server.state, server.authorization_deactivated_at) == (ServerState.LEAVING, None)
    assert flow.second_name in server.removal_error
    flow.now = end
    server = await look_at_removal(flow)
    assert server.state is ServerState.REMOVED
    assert server.authorization_deactivated_at == end
    assert "not revoked: " in server.removal_error
    flow.authorities.close()


async def test_what_is_due_at_a_ca_that_the_settings_name_no_more_is_forgotten_once_it_has_ended(two, lab):
    flow = await two()
    second = await at_second(flow)
    async with flow.registry.change(flow.server_id) as (_, server):
        order = server.orders[-1]
        order.deactivated_at, order.due_at, order.compromised_at = None, flow.now, flow.now
    without_second(flow, lab)
    assert (await flow.step()).due_at > flow.now
    flow.now = second.created_at + 30 * DAY
    assert (await flow.step()).due_at is None
    flow.authorities.close()


@pytest.mark.parametrize(
    ("resource", "fault"),
    [(Resource.CERTIFICATE, Fault.OTHER_KEY), (Resource.ORDER, Fault.UNDECIDED)],
)
async def test_orders_that_a_ca_lets_fail_for_too_long_go_to_another_one(two, resource, fault):
    flow = await two(front={}, nonce_reject=0, authz_reuse=0)
    flow.ca.faults = {resource: fault}
    began = flow.now
    for after in (timedelta(0), PATIENCE - HOUR):
        flow.now = began + after
        await flow.begin()
        await flow.until(S.ANSWERED)
        async with flow.registry.change(flow.server_id) as (_, server):
            server.orders[-1].attempts = 128  # an hour has passed with the same answer
        order = await flow.until(S.FAILED)
        assert order.ca == flow.first_name
        await flow.step()
    flow.now = began + PATIENCE
    await flow.begin()
    order = await flow.until(S.ISSUED)
    assert order.ca == flow.second_name
    await flow.step()
    await flow.begin()
    assert (await flow.order()).ca == flow.first_name, "success begins anew"


async def test_orders_that_a_member_lets_fail_stay_at_the_first_ca(two):
    """No CA finds the challenge, as behind a firewall: the next one would refuse in the same way."""
    flow = await two(http_port=free_port())
    for _ in range(2):
        await flow.begin()
        assert (await flow.until(S.FAILED)).token is not None
        await flow.step()
        flow.now += PATIENCE
    await flow.begin()
    assert (await flow.order()).ca == flow.first_name


@pytest.mark.parametrize("status", [S.WANTED, S.REQUESTED, S.PENDING])
async def test_what_fails_for_other_reasons_than_the_ca_does_not_count(two, status):
    flow = await two()
    await flow.begin()
    if status is S.PENDING:
        await flow.until(status)
    async with flow.registry.change(flow.server_id) as (_, server):
        if status is S.WANTED:
            server.orders[-1].status, server.orders[-1].csr = status, None
        issuance.start_anew(server, flow.now)
        server.order_failures = 1  # of another order
    flow.now += 2 * PATIENCE
    await flow.begin()
    assert (await flow.order()).ca == flow.first_name


async def test_an_order_that_no_ca_would_take_counts(two):
    """One without a URL: the control of those that were given up."""
    flow = await two()
    await flow.begin()
    async with flow.registry.change(flow.server_id) as (_, server):
        server.orders[-1].status, server.order_failures = S.FAILED, 1
    flow.now += 2 * PATIENCE
    await flow.begin()
    assert (await flow.order()).ca == flow.second_name


@pytest.mark.parametrize(
    ("wait", "ends", "turns"),
    [
        (PATIENCE, None, True),
        (3 * DAY, 5 * DAY, True),
        (PATIENCE / 2, PATIENCE / 4, True),
        (PATIENCE / 2, PATIENCE / 2, True),
        (PATIENCE / 2, DAY, False),
        (PATIENCE / 2, None, False),
    ],
)
async def test_what_a_ca_says_to_come_after_patience_or_the_certificate_is_not_waited_for(
    two, wait, ends, turns
):
    flow = await two()
    again = flow.now + wait
    served = Order(status=S.ISSUED, not_after=ends and flow.now + ends)
    order = Order(status=S.REQUESTED, ca=flow.first_name, ca_since=flow.now)
    server = Server(name="alice", orders=[served, order] if ends else [order])
    wanted = flow.second_name if turns else None
    assert issuance._other_ca(flow.settings, order, server, again, flow.now) == wanted
    order.ca = flow.second_name
    assert issuance._other_ca(flow.settings, order, server, again, flow.now) is None, "it would turn for ever"


async def test_one_ca_alone_keeps_its_orders(flow):
    flow = await flow()
    await flow.begin()
    account = await flow.account()
    flow.pebble.stop()
    flow.now += 100 * DAY
    order = await flow.step(account)
    assert (order.status, order.ca) == (S.REQUESTED, flow.settings.ca.name)


async def test_a_loss_of_a_key_revokes_at_the_ca_that_issued(two):
    flow = await two()
    lost = await at_second(flow)
    async with flow.registry.change(flow.server_id) as (_, server):
        issuance.revoke_compromised(server, flow.now)
    assert (await flow.step()).revoked_at == flow.now
    assert flow.second.revocation_reason(lost.serial) == RevocationReason.KEY_COMPROMISE
