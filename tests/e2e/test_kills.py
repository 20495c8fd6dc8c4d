"""The registry's processes killed at every step and at random, and its database stopped: nothing lost, nothing twice.

Members join and leave meanwhile; whatever ends is started again, as an init system would, and nobody helps otherwise.
"""

import asyncio
import random
import re
import signal
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import dns.message
import dns.query
import httpx
import pytest
from cryptography import x509
from sqlalchemy import select, update

from lab.certificates import shown_certificate
from lab.pool import POOL, LabPool
from lab.postgres import Postgres
from lab.processes import LabError, Process, free_port, wait_until
from lab.programs import script
from member_agent.errors import ExitStatus
from nts_core.control import ServerState
from poolsvc import journal
from poolsvc.db import Database
from poolsvc.models import Delivery, DeliveryStatus, Event, Order, OrderStatus, Server
from poolsvc.servers import TRANSITIONS, EventKind

# A process that is killed while it works leaves its lease, and under 200 kills that comes often.
DEADLINE = 300
ONCE = {EventKind.REGISTERED, EventKind.LEAVE, EventKind.CLOSED}


class Keeper(ExitStack):
    """Processes that are started again as soon as they have ended, but for a status of `final`."""

    def __init__(self, processes, final=()):
        super().__init__()
        self.processes, self.final, self.restarts = processes, final, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join(20)

    def _keep(self):
        while not self._over.wait(0.02):
            for process in self.processes:
                if not process.running() and process.wait() not in self.final:
                    process.start()
                    self.restarts += 1


def is_up(process):
    """Whether it has a socket that listens: killed before, nothing of it would be tested."""
    table = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    listening = {f"socket:[{row[9]}]" for row in table if row[3] == "0A"}
    with suppress(FileNotFoundError, ProcessLookupError):
        return any(str(fd.readlink()) in listening for fd in Path(f"/proc/{process.pid}/fd").iterdir())
    return False


@contextmanager
def killing(keeper, kills, chance):
    """Ends processes of the keeper by SIGKILL, each some time after it came up."""

    def kill():
        while len(done) < kills:
            victim = chance.choice(keeper.processes)
            while not is_up(victim):
                if over.wait(0.05):
                    return
            if over.wait(chance.uniform(0.5, 2.5)):
                return
            if victim.running():
                victim.signal(signal.SIGKILL)
                done.append(victim)

    done, over = [], threading.Event()
    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield done, thread
    finally:
        over.set()
        thread.join()


def insist(work, what):
    """The result of something that is tried until the registry is there and does it."""
    end = time.monotonic() + DEADLINE
    while True:
        try:
            return work()
        except (LabError, httpx.HTTPError) as error:
            if time.monotonic() > end:
                raise LabError(f"{what}: not within {DEADLINE} s: {error}") from error
        time.sleep(0.05)


def join(pool, name):
    """A member that repeats what was not answered, as pool-agent's users and our API's callers may."""
    member = pool.add(name)
    body = {"name": name, "addresses": list(member.addresses)}
    headers = {"Idempotency-Key": f"registration-of-{name}"}
    created = insist(
        lambda: pool.member.call("POST", "/v1/servers", body, headers=headers), f"{name} registered"
    )

    def joined():
        done = member.join(created["join"]["join_token"])
        if done.status:
            raise LabError(done.stderr)

    insist(joined, f"{name} joined")
    member.process.start()
    return member


def reach(pool, member, state):
    def reached():
        view = member.view()
        if view["state"] != state:
            raise LabError(view["why"])

    insist(reached, f"{member.name} {state}")


def leave(pool, member):
    insist(lambda: pool.operator.call("DELETE", f"/v1/servers/{member.name}"), f"{member.name} leaves")


def targets(pool):
    query = dns.message.make_query(f"_ntske._tcp.{POOL}.", "SRV")
    answer = dns.query.udp(query, pool.primary.address, port=pool.primary.port, timeout=5)
    return {str(record.target).split(".")[0] for rrset in answer.answer for record in rrset}


def has_address(pool, member):
    query = dns.message.make_query(f"{member.domain}.", "A")
    return bool(dns.query.udp(query, pool.primary.address, port=pool.primary.port, timeout=5).answer)


def rows(url):
    """All servers, events, orders and deliveries."""

    async def read():
        database = Database(url)
        try:
            async with database.transaction() as session:
                return [
                    list(await session.scalars(select(table).order_by(table.id)))
                    for table in (Server, Event, Order, Delivery)
                ]
        finally:
            await database.close()

    return asyncio.run(read())


def is_quiet(url):
    """Whether nothing is left to be done with orders and notices: leases of killed processes have ended."""
    _, _, orders, deliveries = rows(url)
    return all(order.due_at is None for order in orders) and not [
        row for row in deliveries if row.status is DeliveryStatus.PENDING
    ]


def examine(pool, url, active, removed):
    """What must be true in the database, the zone and the journal once all is quiet."""
    wait_until(lambda: is_quiet(url), "all orders and notices settled", DEADLINE)
    servers, events, orders, deliveries = rows(url)
    assert {row.name: row.state for row in servers} == {
        **dict.fromkeys((member.name for member in active), ServerState.ACTIVE),
        **dict.fromkeys((member.name for member in removed), ServerState.REMOVED),
    }
    for server in servers:
        life = [entry for entry in events if entry.server_id == server.id and entry.kind in set(EventKind)]
        kinds = [EventKind(entry.kind) for entry in life]
        assert all(kinds.count(kind) <= 1 for kind in ONCE), f"{server.name}: {kinds}"
        for one, other in pairwise(life):
            assert one.after == other.before, f"{server.name}: {kinds}"
            assert (
                TRANSITIONS[ServerState(other.before["state"]), EventKind(other.kind)] == other.after["state"]
            )
        assert life[-1].after["state"] == server.state
        own = [order for order in orders if order.server_id == server.id]
        assert len({order.url for order in own if order.url}) == len([order for order in own if order.url])
        issued = [order for order in own if order.status is OrderStatus.ISSUED]
        assert len(issued) == 1, f"{server.name}: {[order.status for order in own]}"
        assert all(order.deactivated_at for order in own if order.authorization_url)
        if server.state is ServerState.REMOVED:
            assert None not in (server.srv_withdrawn_at, server.name_broken_at, issued[0].revoked_at)
    told = [(row.notice_id, row.channel, row.user_id, row.webhook_id) for row in deliveries]
    assert len(told) == len(set(told))
    assert targets(pool) == {member.name for member in active}
    assert [member.name for member in removed if has_address(pool, member)] == []
    wait_until(lambda: journalled(pool) == {member.name for member in removed}, "the journal", DEADLINE)


def journalled(pool):
    entries = journal.read(pool.directory / "removals.journal")
    return {entry.name for entry in entries if entry.is_gone}


def live(pool, keeper, kills, lives):
    """Members join; every second one leaves again; until the killer is done."""
    active, removed = [], []
    chance = random.Random(kills)
    with killing(keeper, kills, chance) as (done, killer):
        number = 0
        while number < lives or killer.is_alive():
            if number < lives:
                member = join(pool, f"m{number}")
                reach(pool, member, "active")
                active.append(member)
                if number % 2:
                    leaver = active.pop(chance.randrange(len(active)))
                    leave(pool, leaver)
                    reach(pool, leaver, "removed")
                    removed.append(leaver)
            else:
                killer.join(1)
            number += 1
        assert len(done) == kills
    assert keeper.restarts >= kills

    def quiet():
        if alarms := pool.operator.call("GET", "/v1/pool")["alarms"]:
            raise LabError(f"alarms: {alarms}")
        if (found := targets(pool)) != {member.name for member in active}:
            raise LabError(f"in DNS: {found}")

    insist(quiet, "all in order")
    return active, removed


# Half of the lives stay, and an answer names eight servers at a time.
SIZES = [(2, 2), pytest.param(200, 16, marks=pytest.mark.long)]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("kills", "lives"), SIZES)
def test_one_process_on_sqlite_killed_at_random(tmp_path, kills, lives):
    url = f"sqlite+aiosqlite:///{tmp_path}/registry.db"
    with LabPool(tmp_path / "pool", database=url, addresses=lives, opening_size=1, knot=True) as pool:
        with Keeper([pool.registry]) as keeper:
            found = live(pool, keeper, kills, lives)
        examine(pool, url, *found)


@contextmanager
def fleet(tmp_path, lives):
    """A pool with one API process and two workers at one PostgreSQL."""
    with ExitStack() as stack:
        cluster = stack.enter_context(Postgres(tmp_path / "postgres", durable=True))
        url = cluster.create_database()
        pool = stack.enter_context(
            LabPool(
                tmp_path / "pool",
                database=url,
                addresses=lives,
                opening_size=1,
                knot=True,
                program=[script("poolsvc"), "serve", "--role", "api"],
            )
        )
        argv = [script("poolsvc"), "serve", "--role", "worker", "--config", str(pool.config)]
        workers = [
            stack.enter_context(
                Process(name, argv, pool.directory, env={"POOLSVC_LISTEN": f'["127.0.0.1:{free_port()}"]'})
            ).start()
            for name in ("worker-1", "worker-2")
        ]
        yield cluster, url, pool, [pool.registry, *workers]


@pytest.mark.timeout(3600)
@pytest.mark.long
@pytest.mark.parametrize(("kills", "lives"), SIZES)
def test_api_and_workers_on_postgresql_killed_at_random(tmp_path, kills, lives):
    with fleet(tmp_path, lives) as (_, url, pool, processes):
        with Keeper(processes) as keeper:
            found = live(pool, keeper, kills, lives)
        examine(pool, url, *found)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGQUIT, marks=pytest.mark.long),
        pytest.param(signal.SIGINT, marks=pytest.mark.long),
    ],
    ids=["at-once", "in-order"],
)
def test_postgresql_stopped_and_started_while_members_come_and_go(tmp_path, number):
    with fleet(tmp_path, 3) as (cluster, url, pool, processes):
        stay, goes = join(pool, "stay"), join(pool, "goes")
        reach(pool, goes, "active")
        leave(pool, goes)
        for _ in range(3):
            cluster.halt(number)
            assert pool.operator.request("GET", "/v1/servers/stay").status_code == 503
            cluster.resume()
        late = join(pool, "late")
        for member, state in ((stay, "active"), (late, "active"), (goes, "removed")):
            reach(pool, member, state)
        wait_until(lambda: targets(pool) == {"stay", "late"}, "the two in DNS", DEADLINE)
        wait_until(
            lambda: insist(lambda: pool.operator.call("GET", "/v1/pool"), "the pool")["alarms"] == [],
            "no alarm",
            DEADLINE,
        )
        assert all(process.running() for process in processes)
        examine(pool, url, [stay, late], [goes])


def dies_at(pool, number, when):
    """The registry ends at its change `number` of a whole life, and is started again whole; whether it did."""
    mortal = [sys.executable, "-m", "lab.mortal", str(number), when, "serve", "--config", str(pool.config)]
    healthy = pool.registry.argv
    pool.registry.stop()
    pool.registry.argv = mortal
    pool.registry.start()  # and may have died before it answers anybody
    pool.registry.argv = healthy
    with Keeper([pool.registry]) as keeper:
        member = join(pool, f"{when}{number}")
        reach(pool, member, "active")
        leave(pool, member)
        reach(pool, member, "removed")
    return member, keeper.restarts > 0


@pytest.mark.timeout(900)
@pytest.mark.long
@pytest.mark.parametrize(("when", "steps"), [("after", [1, 11])])
def test_killed_at_some_steps_of_a_life(tmp_path, when, steps):
    assert step_through(tmp_path, when, steps) == len(steps)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_every_step_of_a_life(tmp_path, when):
    deaths = step_through(tmp_path, when, range(1, 200))
    assert deaths >= 20, "a life has more changes than that"


def step_through(tmp_path, when, numbers):
    """How often the registry died, until it did no more."""
    url = f"sqlite+aiosqlite:///{tmp_path}/registry.db"
    removed, deaths = [], 0
    with LabPool(tmp_path / "pool", database=url, addresses=220, opening_size=1, knot=True) as pool:
        for number in numbers:
            member, died = dies_at(pool, number, when)
            removed.append(member)
            if not died:
                break
            deaths += 1
        wait_until(lambda: targets(pool) == set(), "nobody in DNS", DEADLINE)
        examine(pool, url, [], removed)
    return deaths


@contextmanager
def account_apart(tmp_path, monkeypatch, url, addresses):
    """A pool whose account is held by a process on a socket; both."""
    monkeypatch.setenv("POOLSVC_CA__SOCKET", str(tmp_path / "run" / "acme.sock"))
    with LabPool(tmp_path / "pool", database=url, addresses=addresses, opening_size=1, knot=True) as pool:
        argv = [script("poolsvc"), "acme", "serve", "--config", str(pool.config)]
        with Process("acme", argv, pool.directory) as account:
            yield pool, account


def renew(url, name):
    """Let the next certificate be due now; return once it is there."""

    async def make_due():
        database = Database(url)
        try:
            async with database.transaction() as session:
                due = update(Server).where(Server.name == name).values(order_due_at=datetime.now(UTC))
                await session.execute(due)
        finally:
            await database.close()

    asyncio.run(make_due())
    wait_until(lambda: len(orders_of(url, name, OrderStatus.ISSUED)) == 2, f"{name} renewed", DEADLINE)


def orders_of(url, name, *statuses):
    servers, _, orders, _ = rows(url)
    (server,) = (row for row in servers if row.name == name)
    return [row for row in orders if row.server_id == server.id and row.status in (statuses or OrderStatus)]


def account_dies_at(pool, account, url, number, when):
    """A member gets its certificate, another one, and leaves, while the account's process dies once; whether it did."""
    name, healthy = f"{when}{number}", account.argv
    account.stop()
    account.argv = [sys.executable, "-m", "lab.mortal_ca", str(number), when, *healthy[1:]]
    account.start()
    account.argv = healthy
    with Keeper([account]) as keeper:
        member = join(pool, name)
        reach(pool, member, "active")
        renew(url, name)
        leave(pool, member)
        reach(pool, member, "removed")
    wait_until(lambda: is_quiet(url), "all orders and notices settled", DEADLINE)
    found = orders_of(url, name)
    assert [order.status for order in found] == [OrderStatus.ISSUED] * 2, [order.error for order in found]
    assert len({order.url for order in found}) == 2
    for order in found:
        assert None not in (order.deactivated_at, order.revoked_at)
        assert pool.pebble.certificate_status(order.serial) == "Revoked"
    return keeper.restarts > 0


def account_dies_at_each(tmp_path, monkeypatch, when, numbers):
    """How often the process died, until it did no more."""
    url = f"sqlite+aiosqlite:///{tmp_path}/registry.db"
    deaths = 0
    with account_apart(tmp_path, monkeypatch, url, 220) as (pool, account):
        for number in numbers:
            if not account_dies_at(pool, account, url, number, when):
                break
            deaths += 1
        known = {order.serial for order in rows(url)[2]}
        made = set(re.findall(r"Issued certificate serial ([0-9a-f]+)", pool.pebble.process.output()))
        assert made, "the CA's log says what it issued"
        assert {serial.lstrip("0") for serial in made} == known, "a certificate was lost"
    return deaths


def agents_die_at(pool, url, when, numbers):
    """Members get their certificates, others, and leave, while the agent of each dies once; how many did."""
    members = [join(pool, f"{when}{number}") for number in numbers]
    for member, number in zip(members, numbers, strict=True):
        member.process.stop()
        healthy = member.process.argv
        member.process.argv = [sys.executable, "-m", "lab.mortal_agent", str(number), when, *healthy[1:]]
        member.process.start()
        member.process.argv = healthy
    with Keeper(
        [member.process for member in members], final={ExitStatus.REMOVED, ExitStatus.STATE}
    ) as keeper:
        for member in members:
            reach(pool, member, "active")
        for member in members:
            renew(url, member.name)
        for member in members:
            newest = max(orders_of(url, member.name), key=lambda order: order.id).serial
            wait_until(
                lambda serial=newest, member=member: serial in served_serial(pool, member),
                f"{member.name} serves the new one",
                DEADLINE,
            )
            leave(pool, member)
        for member in members:
            reach(pool, member, "removed")
            wait_until(lambda member=member: has_ended(member), f"{member.name} ended", DEADLINE)
    wait_until(lambda: is_quiet(url), "all orders and notices settled", DEADLINE)
    for member in members:
        found = orders_of(url, member.name)
        assert [order.status for order in found] == [OrderStatus.ISSUED] * 2, [order.error for order in found]
        for order in found:
            assert pool.pebble.certificate_status(order.serial) == "Revoked"
        assert list((member.state / "members").iterdir()) == []
    return keeper.restarts


def has_ended(member):
    return not member.process.running() and member.process.wait() in {ExitStatus.REMOVED, ExitStatus.STATE}


def served_serial(pool, member):
    """The serial of the certificate that the member's server shows, as the CA writes it; empty while it is away."""
    try:
        shown = shown_certificate(member.addresses[0], pool.ke_port)
    except OSError:
        return ""
    return f"{x509.load_pem_x509_certificate(shown.encode()).serial_number:x}"


def agents_die_at_each(tmp_path, monkeypatch, when, numbers, *, together=6):
    """How many agents died, until one did no more."""
    # One that dies between its call and the answer waits for the next of an hour's, here for seconds.
    for name in ("PROOFS_PER_HOUR", "PROOFS_PER_HOUR_AND_PREFIX"):
        monkeypatch.setenv(f"POOLSVC_POLICY__{name}", "900")
    url = f"sqlite+aiosqlite:///{tmp_path}/registry.db"
    deaths = 0
    with LabPool(tmp_path / "pool", database=url, addresses=120, opening_size=1, knot=True) as pool:
        for some in batched(numbers, together):
            died = agents_die_at(pool, url, when, some)
            deaths += died
            if died < len(some):
                break
    return deaths


def batched(numbers, size):
    return [numbers[begin : begin + size] for begin in range(0, len(numbers), size)]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("when", "numbers"), [("after", [14, 26, 38])])
def test_agents_killed_at_some_moments(tmp_path, monkeypatch, when, numbers):
    assert agents_die_at_each(tmp_path, monkeypatch, when, numbers) == len(numbers)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_agent_killed_at_every_moment(tmp_path, monkeypatch, when):
    """From its first report to the end of its server."""
    assert agents_die_at_each(tmp_path, monkeypatch, when, range(1, 115)) >= 40


@pytest.mark.timeout(900)
@pytest.mark.long
@pytest.mark.parametrize(("when", "requests"), [("after", [8])])
def test_the_accounts_process_killed_at_some_requests(tmp_path, monkeypatch, when, requests):
    assert account_dies_at_each(tmp_path, monkeypatch, when, requests) == len(requests)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_accounts_process_killed_at_every_request(tmp_path, monkeypatch, when):
    """From the account's registration to the last revocation."""
    deaths = account_dies_at_each(tmp_path, monkeypatch, when, range(1, 200))
    assert deaths >= 15, "a life asks the CA more often than that"
