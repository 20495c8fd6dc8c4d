"""An agent's own account at a real Pebble: its schedule, its journal, and a CA that fails. Times are arguments."""

import asyncio
import contextlib
import json
import signal
import socketserver
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dns.message
import pytest
from pydantic import TypeAdapter

from lab.ca_front import CaFront, Fault, Limit, Limits, Resource
from lab.certificates import Authority, shown_certificate
from lab.pebble import Pebble, is_known
from lab.peers import PEBBLE_SID
from lab.processes import free_port
from lab.programs import alice as joined
from lab.programs import run, script
from lab.web import WebServer, http
from member_agent import local
from member_agent.config import Acme, AcmeMode, AgentSettings
from member_agent.daemon import Agent
from member_agent.errors import ExitStatus
from member_agent.install import CertificateStore, InstalledPair, chain_fingerprint, load_pair
from member_agent.own_account import (
    JOURNAL,
    Journal,
    OpenOrder,
    OwnAccount,
    after_failure,
    after_issue,
    after_look,
    look_at,
    order_at,
)
from member_agent.state import Listening, StateDirectory
from nts_core.acme import AcmeAccount, AcmeError, RenewalInfo
from nts_core.certificates import certificate_id, renew_at, renew_by
from nts_core.control import HttpChallenge, TlsChallenge, Validation

newer = pytest.mark.skipif(not PEBBLE_SID.is_there(), reason=f"{PEBBLE_SID} has left the archive")
NAME = "alice.servers.pool.example"
NOW = datetime(2026, 3, 1, tzinfo=UTC)
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
CA = "https://ca.example/dir"
BARE = Journal(CA)
PAIR = InstalledPair(Path("chain"), Path("key"), "0a" * 32, NOW, NOW + 90 * DAY)
ORDER = OpenOrder(
    1,
    NOW,
    "https://ca.example/order/1",
    "https://ca.example/authz/1",
    "https://ca.example/chall/1",
    HttpChallenge("t" * 43, f"{'t' * 43}.{'k' * 43}"),
    Validation.HTTP_01,
)


def window(start, end):
    return RenewalInfo(NOW + start, NOW + end, None, 3600.0)


def dump(journal):
    return TypeAdapter(Journal).dump_json(journal)


# The schedule


@pytest.mark.parametrize(
    ("journal", "pair", "due"),
    [
        (BARE, None, NOW),
        (BARE, PAIR, NOW + 60 * DAY),
        (BARE, replace(PAIR, not_after=NOW + 6 * DAY), NOW + 3 * DAY),
        (replace(BARE, order=ORDER), PAIR, NOW),
        (replace(BARE, by_hand=True), PAIR, NOW),
        (replace(BARE, by_hand=True, again_at=NOW + HOUR), PAIR, NOW + HOUR),
        (replace(BARE, order=ORDER, again_at=NOW + HOUR), PAIR, NOW + HOUR),
        (replace(BARE, again_at=NOW - HOUR), None, NOW),
        # The clock was set back since.
        (replace(BARE, again_at=NOW + 30 * DAY), None, NOW),
    ],
)
def test_when_a_certificate_is_ordered(journal, pair, due):
    assert order_at(journal, pair, NOW) == due


def test_failures_are_repeated_after_1_10_100_minutes_and_then_daily():
    journal, waits = BARE, []
    for _ in range(5):
        journal = after_failure(journal, "no\nwords", NOW, asked=None, draw=0.0)
        waits.append(journal.again_at - NOW)
    assert waits == [MINUTE, 10 * MINUTE, 100 * MINUTE, DAY, DAY]
    assert journal.problem == "no words"
    later = after_failure(BARE, "", NOW, asked=None, draw=1.0)
    assert later.again_at == NOW + 1.25 * MINUTE, "not all agents at the same moment"


def test_what_the_ca_asks_for_in_retry_after_is_waited_for():
    assert after_failure(BARE, "", NOW, asked=7200, draw=0.0).again_at == NOW + 2 * HOUR
    longest = after_failure(BARE, "", NOW, asked=7 * 86_400, draw=1.0)
    assert order_at(longest, None, NOW) == longest.again_at


def test_a_ca_that_wants_everything_renewed_at_once_gets_it_later_each_time():
    journal, waits = BARE, []
    for _ in range(6):
        journal = after_issue(journal, NOW)
        waits.append(None if journal.again_at is None else journal.again_at - NOW)
    assert waits == [None, MINUTE, 10 * MINUTE, 100 * MINUTE, DAY, DAY]
    assert len(journal.issued) < 6
    assert after_issue(journal, NOW + 2 * DAY).again_at is None


def test_a_moment_is_drawn_once_for_each_window_and_not_too_late():
    first = after_look(BARE, PAIR, window(50 * DAY, 52 * DAY), NOW, wait=HOUR, draw=0.5)
    assert order_at(first, PAIR, NOW) == NOW + 51 * DAY
    assert look_at(first, PAIR, NOW) == NOW + HOUR
    again = after_look(first, PAIR, window(50 * DAY, 52 * DAY), NOW, wait=HOUR, draw=0.9)
    assert order_at(again, PAIR, NOW) == NOW + 51 * DAY
    untold = after_look(again, PAIR, None, NOW, wait=DAY, draw=0.9)
    assert order_at(untold, PAIR, NOW) == NOW + 51 * DAY
    assert look_at(untold, PAIR, NOW) == NOW + DAY
    urgent = after_look(untold, PAIR, window(-DAY, -HOUR), NOW, wait=HOUR, draw=0.5)
    assert order_at(urgent, PAIR, NOW) < NOW
    late = after_look(BARE, PAIR, window(80 * DAY, 400 * DAY), NOW, wait=HOUR, draw=1.0)
    assert order_at(late, PAIR, NOW) == renew_by(PAIR.not_before, PAIR.not_after)
    other = replace(PAIR, fingerprint="0b" * 32)
    assert order_at(first, other, NOW) == renew_at(other.not_before, other.not_after)
    assert look_at(first, other, NOW) == NOW


def test_a_look_that_a_clock_set_back_has_put_off_is_had_now():
    told = after_look(BARE, PAIR, None, NOW + 400 * DAY, wait=HOUR, draw=0.5)
    assert look_at(told, PAIR, NOW) == NOW


# A real CA


class Dns(socketserver.BaseRequestHandler):
    """Every name is there and has no records: CAA lets everybody order."""

    def handle(self):
        octets, sock = self.request
        sock.sendto(dns.message.make_response(dns.message.from_wire(octets)).to_wire(), self.client_address)


@pytest.fixture(scope="module")
def pebble(tmp_path_factory):
    """It believes every answer to a challenge."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEBBLE_VA_ALWAYS_VALID", "1")
        with Pebble(
            tmp_path_factory.mktemp("pebble"),
            resolver=f"127.0.0.1:{free_port()}",
            http_port=free_port(),
            nonce_reject=0,
        ) as pebble:
            yield pebble


@pytest.fixture(scope="module")
def resolver():
    with socketserver.ThreadingUDPServer(("127.0.0.1", 0), Dns) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server.server_address
        server.shutdown()
        thread.join()


@pytest.fixture
def ca(pebble, resolver):
    limits = Limits(domain=Limit(1000, 1), name=Limit(1000, 1))
    with CaFront(pebble, identity="ca.pool.test", resolver=resolver, limits=limits) as front:
        yield front


class Alice:
    """One server's account, which begins anew when its process does."""

    def __init__(self, path, ca, **settings):
        self.directory = StateDirectory(path).member(NAME)
        self.store = CertificateStore(self.directory.certificates, NAME)
        self.settings = {"directory_url": ca.directory_url, "ca_file": ca.ca_file, **settings}
        self.news = self.installs = 0
        self.start()

    def start(self, **settings):
        self.settings |= settings
        acme = Acme(mode=AcmeMode.OWN_ACCOUNT, **self.settings)
        self.account = OwnAccount(
            self.directory, self.store, NAME, acme, install=self.install, changed=self.note
        )
        return self.account

    async def install(self, order, chain):
        self.store.stage(order, chain, now=datetime.now(UTC))
        self.store.adopt()
        self.installs += 1

    def note(self):
        self.news += 1

    def journal(self):
        return json.loads((self.directory.path / JOURNAL).read_text())

    async def settled(self):
        """With an account that CAA names."""
        await self.account.step(datetime.now(UTC))
        assert self.account.problem is None
        self.account.allow(may_order=True)
        return self.account

    async def until_ordered(self):
        """In the middle of an order, which goes on meanwhile."""
        task = asyncio.create_task(self.account.step(datetime.now(UTC)))
        end = time.monotonic() + 20
        while not (self.account.challenges or self.account.tls_challenges):
            assert time.monotonic() < end, self.account.problem
            await asyncio.wait({task}, timeout=0.01)
        return task


@pytest.fixture
def alice(tmp_path, ca):
    return Alice(tmp_path / "state", ca)


async def ended(task):
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_the_account_orders_when_it_may_and_the_host_answers(alice, ca):
    account = alice.account
    await account.step(datetime.now(UTC))
    assert account.uri is not None
    for forbid in (lambda: None, lambda: account.allow(may_order=False), account.hold):
        forbid()
        await account.step(datetime.now(UTC))
    account.allow(may_order=True)
    account.hold()
    await account.step(datetime.now(UTC))
    assert (ca.asked[Resource.NEW_ORDER], alice.store.current()) == (0, None)

    account.allow(may_order=None)
    before = alice.news
    await account.step(datetime.now(UTC))
    pair = alice.store.current()
    assert pair is not None, account.problem
    assert (alice.installs, account.problem, account.challenges) == (1, None, ())
    assert alice.news >= before + 2, "a challenge to answer, a certificate to serve"
    now = datetime.now(UTC)
    due = await account.step(now)
    assert due == renew_at(pair.not_before, pair.not_after)
    assert ca.asked[Resource.NEW_ORDER] == 1


async def test_every_certificate_has_a_key_of_its_own_and_one_ordered_by_hand_is_had_once(alice, ca):
    account = await alice.settled()
    await account.step(datetime.now(UTC))
    first = alice.store.current()
    key = first.key_path.read_bytes()
    account.renew()
    assert alice.start()._journal.by_hand, "it was asked for before the process ended"
    alice.account.allow(may_order=None)
    for _ in range(2):
        await alice.account.step(datetime.now(UTC))
    second = alice.store.current()
    assert second.fingerprint != first.fingerprint
    assert second.key_path.read_bytes() != key
    assert ca.asked[Resource.NEW_ORDER] == 2


async def test_an_order_that_the_ca_has_is_gone_on_with(alice, ca):
    await alice.settled()
    ca.faults[Resource.ORDER] = Fault.UNDECIDED
    task = await alice.until_ordered()
    before = alice.journal()["order"]
    await ended(task)
    ca.faults.clear()

    again = alice.start()
    assert again.challenges[0].token == before["challenge"]["token"]
    again.allow(may_order=None)
    await again.step(datetime.now(UTC))
    assert alice.store.current() is not None, again.problem
    assert ca.asked[Resource.NEW_ORDER] == 1
    assert alice.journal()["order"] is None


async def test_an_order_whose_url_was_lost_is_gone_on_with_where_the_ca_gives_it_again(alice, ca):
    """Let's Encrypt does."""
    account = await alice.settled()
    ca.reusing, ca.faults[Resource.NEW_ORDER] = True, Fault.LOST
    now = datetime.now(UTC)
    await account.step(now)
    assert (alice.journal()["order"], ca.orders) == (None, 1)
    ca.faults.clear()

    again = alice.start()
    again.allow(may_order=None)
    await again.step(now + 2 * MINUTE)
    assert alice.store.current() is not None, again.problem
    assert (ca.orders, ca.asked[Resource.NEW_ORDER]) == (1, 2)
    again.renew()
    await again.step(now + 4 * MINUTE)
    assert ca.orders == 2, "one that has come to its end is not given again"


async def test_tls_alpn_01_is_answered_by_the_digest_of_the_key_authorization(tmp_path, ca):
    alice = Alice(tmp_path, ca, validation=Validation.TLS_ALPN_01)
    account = await alice.settled()
    ca.faults[Resource.ORDER] = Fault.UNDECIDED
    task = await alice.until_ordered()
    assert account.challenges == ()
    (challenge,) = account.tls_challenges
    assert challenge == TlsChallenge(challenge.digest)
    assert len(challenge.digest) == 64
    await ended(task)
    ca.faults.clear()

    # The member opens port 80 instead: that order cannot be answered any more.
    again = alice.start(validation=Validation.HTTP_01)
    again.allow(may_order=True)
    await again.step(datetime.now(UTC))
    assert alice.store.current() is not None, again.problem
    assert ca.asked[Resource.NEW_ORDER] == 2


async def test_the_ca_is_told_of_nothing_that_is_not_on_the_disk(alice, ca):
    account = await alice.settled()
    in_the_way = alice.directory.path / f".{JOURNAL}.new"
    in_the_way.mkdir()
    await account.step(now := datetime.now(UTC))
    assert "own ACME account: " in account.problem
    assert (ca.asked[Resource.NEW_ORDER], ca.asked[Resource.CHALLENGE]) == (1, 0)
    in_the_way.rmdir()
    await account.step(now + 2 * MINUTE)
    assert alice.store.current() is not None, account.problem
    assert (account.problem, ca.asked[Resource.NEW_ORDER]) == (None, 1)


async def test_retry_after_is_kept_when_the_agent_starts_again(alice, ca):
    account = await alice.settled()
    ca.faults[Resource.NEW_ORDER] = Fault.LIMITED
    now = datetime.now(UTC)
    await account.step(now)
    assert account.problem is not None
    assert account.facts(None, now)["order_at"] >= int((now + timedelta(seconds=120)).timestamp())
    ca.faults.clear()
    ca.asked.clear()
    again = alice.start()
    assert again.problem == account.problem
    again.allow(may_order=None)
    due = await again.step(now + timedelta(seconds=119))
    assert (due > now + timedelta(seconds=119), sum(ca.asked.values())) == (True, 0)
    await again.step(due)
    assert again.problem is None
    assert alice.store.current() is not None


@pytest.mark.parametrize(
    ("resource", "fault"),
    [
        (Resource.DIRECTORY, Fault.HTML),
        (Resource.NEW_ACCOUNT, Fault.FORBIDDEN),
        (Resource.NEW_ORDER, Fault.BAD_JSON),
        (Resource.ORDER, Fault.DOWN),
        (Resource.ORDER, Fault.FORBIDDEN),
        (Resource.CHALLENGE, Fault.BROKEN),
        (Resource.FINALIZE, Fault.UNAVAILABLE),
        (Resource.CERTIFICATE, Fault.HTML),
    ],
)
async def test_a_ca_that_fails_is_a_problem_and_no_end(alice, ca, resource, fault):
    account = await alice.settled()
    ca.faults[resource] = fault
    now = datetime.now(UTC)
    await account.step(now)
    assert account.problem
    due = await account.step(now)
    assert due >= now + MINUTE, "it does not spin"
    ca.faults.clear()
    await account.step(due)
    assert alice.store.current() is not None, account.problem
    assert account.problem is None
    # Only an order whose URL never came is placed again.
    assert ca.asked[Resource.NEW_ORDER] == (2 if resource is Resource.NEW_ORDER else 1)


@pytest.mark.parametrize("fault", [Fault.OTHER_KEY, Fault.OTHER_NAME])
async def test_a_certificate_that_is_not_ours_is_not_installed(alice, ca, fault):
    account = await alice.settled()
    ca.faults[Resource.CERTIFICATE] = fault
    now = datetime.now(UTC)
    await account.step(now)
    assert account.problem
    assert (alice.store.current(), alice.journal()["order"]) == (None, None)
    ca.faults.clear()
    await account.step(now + 2 * MINUTE)
    assert alice.store.current() is not None, account.problem
    assert ca.asked[Resource.NEW_ORDER] == 2


async def test_a_ca_that_has_lost_the_account_makes_another_one_that_caa_has_to_name_first(alice, ca, pebble):
    account = await alice.settled()
    await account.step(datetime.now(UTC))
    first, orders = account.uri, ca.asked[Resource.NEW_ORDER]
    pebble.restart()
    account.renew()
    await account.step(datetime.now(UTC))
    assert (account.uri == first, ca.asked[Resource.NEW_ORDER]) == (False, orders)
    assert alice.journal()["may_order"] is False
    account.allow(may_order=True)
    await account.step(datetime.now(UTC))
    assert (alice.installs, account.problem) == (2, None)


async def test_a_ca_out_of_reach_is_asked_again_after_a_minute(tmp_path, ca):
    alice = Alice(tmp_path, ca, directory_url=f"https://127.0.0.1:{free_port()}/dir")
    now = datetime.now(UTC)
    await alice.account.step(now)
    assert (alice.account.uri, alice.account.problem is None) == (None, False)
    due = await alice.account.step(now)
    assert now + MINUTE <= due <= now + 1.25 * MINUTE


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense",
        b"[]",
        b"\x00" * 4096,
        b'{"directory_url": 7}',
        b'{"directory_url": "https://ca.example/dir", "again_at": "2026-03-01T00:00:00"}',
        b'{"directory_url": "https://ca.example/dir", "order": {"number": "one"}}',
        dump(replace(BARE, order=replace(ORDER, challenge=HttpChallenge("../x", "../x.y")))),
        b"[" * 100_000,
    ],
)
def test_a_damaged_journal_is_begun_anew(alice, content):
    (alice.directory.path / JOURNAL).write_bytes(content)
    account = alice.start(directory_url=CA)
    assert (account.uri, account.problem, account.challenges) == (None, None, ())


async def test_the_journal_of_another_ca_says_nothing(alice, ca):
    await alice.settled()
    assert alice.start(directory_url="https://other.example/dir").uri is None


def test_the_journal_comes_back_as_it_was(alice):
    account = alice.account
    whole = Journal(
        account._journal.directory_url,
        "https://ca.example/acct/1",
        may_order=True,
        by_hand=True,
        order=ORDER,
        plan=after_look(BARE, PAIR, window(DAY, 2 * DAY), NOW, wait=HOUR, draw=0.5).plan,
        issued=(NOW,),
        failures=3,
        again_at=NOW,
        problem="text",
    )
    account._save(whole)
    assert alice.start()._journal == whole
    assert (alice.directory.path / JOURNAL).stat().st_mode & 0o777 == 0o600


# Renewal information


@newer
async def test_a_window_of_the_cas_is_obeyed_and_the_order_says_what_it_replaces(tmp_path, monkeypatch):
    monkeypatch.setenv("PEBBLE_VA_ALWAYS_VALID", "1")
    ports = {"resolver": f"127.0.0.1:{free_port()}", "http_port": free_port()}
    with Pebble(tmp_path / "ca", **ports, nonce_reject=0, newer=True) as pebble:
        alice = Alice(tmp_path / "state", pebble)
        account = await alice.settled()
        first = await known(alice)
        leaf = first.chain_path.read_text().partition("-----END CERTIFICATE-----\n")
        now = datetime.now(UTC)
        pebble.set_renewal_window(leaf[0] + leaf[1], now + HOUR, now + 2 * HOUR)
        due = await account.step(now)
        assert now + HOUR <= due <= now + 2 * HOUR
        assert alice.start().facts(first, now)["order_at"] == int(due.timestamp()), "the drawn time is kept"
        alice.account.allow(may_order=None)
        await alice.account.step(due)
        assert alice.store.current().fingerprint != first.fingerprint
        # The CA lets a certificate be replaced once.
        assert "alreadyReplaced" in await refusal(alice, first)


@newer
async def test_an_order_to_replace_a_certificate_whose_url_was_lost_is_gone_on_with(
    tmp_path, monkeypatch, resolver
):
    """The CA takes the second request for another replacement, and has the first order for one without that."""
    monkeypatch.setenv("PEBBLE_VA_ALWAYS_VALID", "1")
    ports = {"resolver": f"127.0.0.1:{free_port()}", "http_port": free_port()}
    with (
        Pebble(tmp_path / "ca", **ports, nonce_reject=0, newer=True) as pebble,
        CaFront(pebble, identity="ca.pool.test", resolver=resolver) as ca,
    ):
        alice = Alice(tmp_path / "state", ca)
        account = await alice.settled()
        first, orders = await known(alice), ca.orders
        account.renew()
        ca.reusing, ca.faults[Resource.NEW_ORDER] = True, Fault.LOST
        now = datetime.now(UTC)
        await account.step(now)
        assert ca.orders == orders + 1
        ca.faults.clear()
        await account.step(now + 2 * MINUTE)
        assert alice.store.current().fingerprint != first.fingerprint, account.problem
        assert (ca.orders, ca.refusals) == (orders + 1, ["it has been replaced"])


async def known(alice):
    """A first certificate that this Pebble can find when another is to replace it."""
    await alice.account.step(datetime.now(UTC))
    while not is_known(alice.store.current().chain_path.read_text()):
        alice.account.renew()
        await alice.account.step(datetime.now(UTC))
    return alice.store.current()


async def refusal(alice, pair):
    """What the CA says to another order that replaces this certificate."""
    with contextlib.closing(await AcmeAccount.open(alice.account._config)) as account:
        order = {
            "identifiers": [{"type": "dns", "value": NAME}],
            "replaces": certificate_id(pair.chain_path.read_text()),
        }
        with pytest.raises(AcmeError) as refused:
            account._network.call(account._directory["newOrder"], order)
    return str(refused.value)


# In the agent


class Registry(WebServer):
    """A registry on loopback that wants all it can at each report; `reports` are what it was told."""

    def __init__(self, **wanted):
        super().__init__(self._answer)
        self.reports = []
        self._document = {
            "pool": "pool.example",
            "server": "alice",
            "domain": NAME,
            "state": "verified",
            "addresses": [{"address": "127.0.0.1", "proved": True, "call": False}],
            "ke_port": free_port(),
            "poll_after": 0.05,
            "may_order": True,
            **wanted,
        }

    async def _answer(self, reader, writer):
        length = int(self.heads[-1].lower().partition("content-length: ")[2].partition("\r\n")[0])
        self.reports.append(json.loads(await reader.readexactly(length)))
        writer.write(http("200 OK", json.dumps(self._document).encode()))
        await writer.drain()


@contextlib.asynccontextmanager
async def running(alice, registry_port, **more):
    """An agent with what Alice has."""
    joined(alice.directory.path.parents[1], f"http://127.0.0.1:{registry_port}")
    acme = {"mode": "own-account", **alice.settings}
    settings = AgentSettings(acme=acme, ntp_port=free_port(), local_stratum=10, clock_source="kernel", **more)
    task = asyncio.create_task(Agent(StateDirectory(alice.directory.path.parents[1]), settings).run())
    try:
        yield task
    finally:
        await ended(task)


async def until(condition, task):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        assert not task.done(), task.result()
        await asyncio.wait({task}, timeout=0.05)


def shown(port):
    """The fingerprint of what is served."""
    return chain_fingerprint(shown_certificate("127.0.0.1", port))


async def test_nothing_is_ordered_while_the_host_does_not_answer_and_nothing_of_the_registrys_is_done(
    alice, ca
):
    taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", port := free_port())
    certificate = {"order": 5, "chain": "PEM", "fingerprint": "0a" * 32}
    async with Registry(http_port=port, csr_for=5, certificate=certificate) as registry:
        hooked = alice.directory.path / "hook"
        async with running(alice, registry.port, hooks={"before": ("touch", str(hooked))}) as task:
            await until(lambda: any(report["account_uri"] for report in registry.reports), task)
            seen = len(registry.reports)
            await until(lambda: len(registry.reports) > seen + 2, task)
            assert ca.asked[Resource.NEW_ORDER] == 0
            assert "cannot listen" in registry.reports[-1]["problem"]
            assert not hooked.exists()
            taken.close()
            await until(lambda: registry.reports[-1]["installed"] and alice.journal()["plan"], task)
        assert (registry.reports[-1]["problem"], hooked.exists()) == (None, True)
        assert [report["csr"] for report in registry.reports if report["csr"]] == []
    assert ca.asked[Resource.NEW_ORDER] == 1


async def test_an_account_that_the_registry_refuses_is_said_with_its_setting_and_stops_nothing_else(
    alice, ca
):
    refused = "not the URI of an account at https://ca.example"
    pending = alice.store.pending(1)
    await alice.install(1, Authority(alice.directory.path / "authority").chain_for(pending))
    async with (
        Registry(http_port=free_port(), account_refused=refused, may_order=False) as registry,
        running(alice, registry.port) as task,
    ):
        await until(lambda: registry.reports and registry.reports[-1]["problem"], task)
        status = await asyncio.to_thread(local.ask, alice.directory.path.parents[1], "status")
        (told,) = status["servers"]
        assert told["contact_error"] is None
        for word in (refused, "let acme.directory_url be"):
            assert word in registry.reports[-1]["problem"]
            assert word in told["problem"]
        assert registry.reports[-1]["installed"] == alice.store.current().fingerprint
        registry._document |= {"account_refused": ""}
        await until(lambda: registry.reports[-1]["problem"] is None, task)
    assert ca.asked[Resource.NEW_ORDER] == 0


async def test_a_registry_that_is_away_is_not_missed(alice, ca):
    """Not even by an agent that starts while it is."""
    await alice.settled()
    ke_port = free_port()
    alice.directory.save_listening(Listening(("127.0.0.1",), ke_port, free_port(), free_port()))
    async with running(alice, free_port()) as task:
        await until(lambda: alice.journal()["plan"], task)
        first = alice.store.current()
        path = alice.directory.path.parents[1]
        (path / "agent.toml").write_text(
            f'[acme]\nmode = "own-account"\ndirectory_url = "{ca.directory_url}"\n'
        )
        done = await asyncio.to_thread(run, "pool-agent", "renew", "--state", str(path))
        assert (done.status, "are being ordered" in done.stdout) == (0, True), done
        await until(lambda: alice.journal()["plan"]["fingerprint"] != first.fingerprint, task)
        await until(lambda: alice.store.current().fingerprint != first.fingerprint, task)
        assert await asyncio.to_thread(shown, ke_port) == alice.store.current().fingerprint
    assert ca.asked[Resource.NEW_ORDER] == 2
    stopped = await asyncio.to_thread(run, "pool-agent", "renew", "--state", str(path))
    assert (stopped.status, "no agent runs" in stopped.stderr) == (ExitStatus.STATE, True)


@contextlib.asynccontextmanager
async def program(*argv):
    process = await asyncio.create_subprocess_exec(
        *argv, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def dies_at(path, ca, number, when):
    """Whether the agent died. The next one ends in the same place, by the order that the first had the CA make."""
    ca.asked.clear()
    ca.reusing, orders = True, ca.orders
    alice, run_it = Alice(path, ca), ("run", "--state", str(path))

    def is_done():
        try:
            journal = alice.journal()
        except FileNotFoundError:
            return False
        is_told = bool(registry.reports) and registry.reports[-1]["installed"] is not None
        return is_told and journal["order"] is None and journal["plan"] is not None

    async with Registry(http_port=free_port()) as registry:
        joined(path, f"http://127.0.0.1:{registry.port}")
        (path / "agent.toml").write_text(
            f'ntp_port = {free_port()}\nlocal_stratum = 10\nclock_source = "kernel"\n[acme]\nmode = "own-account"\n'
            f'directory_url = "{ca.directory_url}"\nca_file = "{ca.ca_file}"\n'
        )
        argv = (sys.executable, "-m", "lab.mortal_agent", str(number), when, *run_it)
        async with program(*argv) as first, asyncio.timeout(20):
            end = asyncio.create_task(first.wait())
            while not end.done() and not is_done():
                await asyncio.wait({end}, timeout=0.02)
            if not end.done():
                return False
            assert end.result() == -signal.SIGKILL
        is_known = (alice.directory.path / JOURNAL).exists() and alice.journal()["order"] is not None
        is_lost = ca.asked[Resource.NEW_ORDER] == 1 and not is_known and alice.store.current() is None
        registry.reports.clear()
        async with program(script("pool-agent"), *run_it) as second, asyncio.timeout(20):
            end = asyncio.create_task(second.wait())
            while not is_done():
                assert not end.done()
                await asyncio.wait({end}, timeout=0.02)
        pair = alice.store.current()
        assert load_pair(pair.chain_path, pair.key_path).fingerprint == registry.reports[-1]["installed"]
        assert ca.asked[Resource.NEW_ORDER] == (2 if is_lost else 1)
        assert ca.orders == orders + 1
    return True


@pytest.mark.parametrize(("when", "number"), [("before", 7), ("after", 7)])
async def test_an_agent_that_is_killed_ends_in_the_same_place(tmp_path, ca, when, number):
    assert await dies_at(tmp_path, ca, number, when)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("when", ["before", "after"])
async def test_an_agent_that_is_killed_at_any_moment_ends_in_the_same_place(tmp_path, ca, when):
    """From its start to the certificate and the plan of its renewal."""
    deaths = 0
    while await dies_at(tmp_path / str(deaths), ca, deaths + 1, when):
        deaths += 1
    assert deaths >= 20


def test_the_library_is_not_loaded_without_the_mode():
    code = "import sys, member_agent.cli; sys.exit('acme' in sys.modules or 'josepy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_the_next_order_is_above_all_that_is_kept(tmp_path):
    store = CertificateStore(tmp_path / "certificates", NAME)
    assert store.next_order() == 1
    store.pending(4711)
    assert store.next_order() == 4712
    pair = Authority(tmp_path / "authority").issue(NAME)
    assert load_pair(pair.cert, pair.key)
    (tmp_path / "certificates/generations/0000009000-0123456789abcdef").mkdir()
    (tmp_path / "certificates/generations/.tmp-half").mkdir()
    assert store.next_order() == 9001
