"""Accounts at real CAs: opened once, opened again, each apart from the others, and in everybody's CAA from the start."""

import asyncio
import contextlib
import socket
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import select

from lab.pebble import PROFILES
from lab.peers import PEBBLE_SID
from lab.processes import free_port
from nts_core.acme import SHORT_LIVED, AcmeError, OrderState
from nts_core.control import ServerState
from nts_core.tls import new_key_and_csr
from poolsvc.authorities import Authorities, account_uris, offers
from poolsvc.derived import RegistryKey
from poolsvc.models import CaAccount, Order, OrderStatus
from poolsvc.publication import Publication
from poolsvc.worker import Health, Worker

newer = pytest.mark.skipif(not PEBBLE_SID.is_there(), reason="Pebble of Debian sid is not unpacked")


class Office:
    """The authorities of a registry, with what they say is wrong."""

    def __init__(self, registry, ca):
        self.settings = registry.settings.model_copy(update={"ca": ca})
        self.registry = registry
        self.registry.settings = self.settings
        self.away, self.faults = {}, {}
        self.authorities = Authorities(registry.database, self.settings, self.away, self.faults)
        self.retry = timedelta(seconds=self.settings.policy.step_retry)

    async def open(self, now, ca=0):
        """The account at a CA; None while it is out of reach, which ends no order."""
        try:
            return await self.authorities.account(self.settings.ca.all[ca].name, now)
        except AcmeError as error:
            if error.permanent:
                raise
            return None

    async def uris(self):
        async with self.registry.database.transaction() as session:
            return await account_uris(session)


@pytest.fixture
def office(registry):
    with contextlib.ExitStack() as stack:

        def make(ca):
            made = Office(registry, ca)
            stack.callback(made.authorities.close)
            return made

        yield make


@pytest.fixture
def now(registry):
    return registry.now


async def test_a_ca_that_refuses_is_asked_again_only_after_a_wait(office, lab, now):
    """The next success ends it."""
    pebble = lab.pebble()
    made = office(lab.settings(pebble))
    pebble.stop()
    assert await made.open(now) is None
    assert [*made.away] == [made.settings.ca.name]
    pebble.start()
    with pytest.raises(AcmeError) as caught:
        await made.authorities.account(made.settings.ca.name, now + made.retry / 2)
    assert caught.value.retry_after == (made.retry / 2).total_seconds()
    assert await made.open(now + made.retry) is not None
    assert made.away == {}


async def test_an_account_is_opened_once_for_all_who_ask_at_the_same_time(office, lab, now):
    made = office(lab.settings(lab.pebble()))
    found = await asyncio.gather(*(made.open(now) for _ in range(3)))
    assert len({id(account) for account in found}) == 1


async def test_an_account_is_opened_again_when_the_ca_has_lost_it(office, lab, now):
    pebble = lab.pebble()
    made = office(lab.settings(pebble))
    first = await made.open(now)
    assert await made.open(now) is first
    before = await made.uris()
    pebble.restart()
    with contextlib.suppress(AcmeError):
        await first.poll(pebble.directory_url.replace("dir", "my-order/1"))
    assert first.lost
    second = await made.open(now)
    assert second is not first
    assert not second.lost
    assert (await made.uris()) == {made.settings.ca.name: second.uri} != before


async def test_a_ca_that_the_settings_do_not_have_is_refused_for_good(office, lab, now):
    """Of an order of long ago, that nobody can settle any more."""
    made = office(lab.settings(lab.pebble()))
    with pytest.raises(AcmeError, match=r"acme\.gone\.example") as caught:
        await made.authorities.account("acme.gone.example", now)
    assert (caught.value.code, caught.value.permanent) == ("unknown-ca", True)


async def test_one_ca_that_is_away_holds_up_nothing_of_the_other(office, lab, now):
    first, second = lab.pebble(), lab.pebble("second")
    made = office(lab.settings(first, second))
    first.stop()
    await made.authorities.keep(now)
    assert await made.open(now, 1) is not None
    assert await made.open(now, 0) is None
    assert [*made.away] == [made.settings.ca.name]
    assert [*await made.uris()] == [made.settings.ca.all[1].name]


async def test_what_nobody_foresaw_at_one_ca_is_told_after_the_others_are_looked_after(office, lab, now):
    ca = lab.settings(lab.pebble(), lab.pebble("second"))
    made = office(ca.model_copy(update={"account_key_file": Path("\udcff")}))
    with pytest.raises(ExceptionGroup) as caught:
        await made.authorities.keep(now)
    (failure,) = caught.value.exceptions
    assert isinstance(failure, ValueError), "a path that no document can have"
    assert [*await made.uris()] == [ca.fallback[0].name]


async def test_all_cas_are_in_the_caa_of_every_name_from_the_start(office, lab, registry, now):
    made = office(lab.settings(lab.pebble(), lab.pebble("second")))
    await registry.server("alice", "192.0.2.1", state=ServerState.VERIFIED)
    leader = Publication(registry.database, made.settings)
    assert await leader.look(now) is False, "there is no account yet"
    await made.authorities.keep(now)
    uris = await made.uris()
    assert await leader.look(now)
    records = leader.whole()["alice.servers.pool.example.", "CAA"].rdatas
    assert sorted(records) == sorted(
        f'0 issue "{ca.caa_identity}; accounturi={uris[ca.name]}; validationmethods=http-01"'
        for ca in made.settings.ca.all
    )


async def test_a_members_own_account_is_named_at_its_own_ca_alone(office, lab, registry, now):
    made = office(lab.settings(lab.pebble(), lab.pebble("second")))
    await made.authorities.keep(now)
    alice = await registry.server("alice", "192.0.2.1", state=ServerState.VERIFIED, agentless=True)
    own = f"https://{made.settings.ca.all[1].name}/my-account/7"
    async with registry.change(alice) as (_, server):
        server.own_account_uri = own
    leader = Publication(registry.database, made.settings)
    await leader.look(now)
    (record,) = leader.whole()["alice.servers.pool.example.", "CAA"].rdatas
    assert record.startswith(f'0 issue "second.example; accounturi={own};')


@newer
async def test_a_profile_that_the_ca_lost_is_told_and_the_account_works_on(office, lab, registry, now):
    pebble = lab.pebble(newer=True, profiles=PROFILES)
    made = office(lab.settings(pebble, profile="classical"))
    await made.open(now)
    assert "no profile classical" in made.faults[made.settings.ca.name]
    right = office(lab.settings(pebble, profile="classic"))
    await right.open(now)
    assert right.faults == {}
    async with registry.database.transaction() as session:
        assert await offers(session, right.settings, SHORT_LIVED)
        assert not await offers(session, right.settings, "classical")
        row = (await session.scalars(select(CaAccount))).one()
        row.profiles = []
    await right.authorities.keep(now + timedelta(hours=23))
    async with registry.database.transaction() as session:
        assert not await offers(session, right.settings, SHORT_LIVED), "it was not read again"
    await right.authorities.keep(now + timedelta(hours=24))
    async with registry.database.transaction() as session:
        assert await offers(session, right.settings, SHORT_LIVED)


async def test_an_account_that_is_bound_to_one_at_the_ca(office, lab, tmp_path, now):
    pebble = lab.pebble(binding_keys={"customer-7": b"k" * 32})
    file = tmp_path / "binding.key"
    ca = lab.settings(pebble, binding_key_id="customer-7", binding_key_file=file)
    file.touch(mode=0o600)
    file.write_text("a2tra2tra2tra2tra2tra2tra2tra2tra2tra2tra2s\n")
    made = office(ca)
    account = await made.open(now)
    assert account is not None, made.away
    with pytest.raises(AcmeError):
        assert (await account.poll(pebble.directory_url)).status is OrderState.PENDING


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (None, "external account binding|externalAccountRequired"),
        ("eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHg", "unauthorized|MAC|signature|verif"),
        ("not base64!", "binding.key cannot be used"),
        ("", "there is no key in the file"),
    ],
)
async def test_an_account_that_is_bound_wrongly_is_none(office, lab, tmp_path, now, key, words):
    pebble = lab.pebble(binding_keys={"customer-7": b"k" * 32})
    options = {}
    if key is not None:
        (tmp_path / "binding.key").touch(mode=0o600)
        (tmp_path / "binding.key").write_text(key)
        options = {"binding_key_id": "customer-7", "binding_key_file": tmp_path / "binding.key"}
    made = office(lab.settings(pebble, **options))
    assert await made.open(now) is None
    (said,) = made.away.values()
    assert any(word in said for word in words.split("|")), said


async def test_a_directory_that_is_none_is_told(office, lab, now):
    ca = lab.settings(lab.pebble())
    ca = ca.model_copy(update={"directory_url": f"https://127.0.0.1:{free_port()}/dir"})
    made = office(ca)
    await made.authorities.keep(now)
    assert [*made.away] == [ca.name]


async def test_a_ca_that_never_answers_holds_up_no_order_of_the_other(registry, lab):
    """The connection is taken, and nothing comes: what a firewall or a dead proxy does."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        second = lab.pebble("second")
        url = f"https://127.0.0.1:{silent.getsockname()[1]}/dir"
        ca = lab.settings(lab.pebble(), second).model_copy(update={"directory_url": url})
        settings = registry.settings.model_copy(update={"ca": ca})
        registry.now = datetime.now(UTC)
        names = ("alice", "bob")
        ids = [
            await registry.server(name, f"198.18.0.{number}", state=ServerState.VERIFIED)
            for number, name in enumerate(names, 1)
        ]
        async with registry.database.transaction() as session:
            session.add_all(
                Order(
                    server_id=server_id,
                    status=OrderStatus.REQUESTED,
                    created_at=registry.now,
                    due_at=registry.now,
                    ca=chosen.name,
                    ca_since=registry.now,
                    csr=new_key_and_csr(f"{name}.servers.pool.example")[1],
                )
                for server_id, name, chosen in zip(ids, names, ca.all, strict=True)
            )
        health = Health()
        worker = asyncio.create_task(
            Worker(registry.database, settings, [], health, RegistryKey(bytes(32))).run()
        )
        try:
            end = time.monotonic() + 20
            while (await registry.get(ids[1])).orders[0].status is not OrderStatus.PENDING:
                assert time.monotonic() < end
                await asyncio.sleep(0.02)
            assert (await registry.get(ids[0])).orders[0].error is None, "its CA is still being waited for"
        finally:
            worker.cancel()
            await asyncio.wait({worker})
