"""`poolsvc zone` as an operator runs it, beside a leader and without one, on a real Knot."""

import asyncio
import json
from datetime import UTC, datetime, timedelta

import dns.message
import dns.query
import dns.tsig
import dns.update
import pytest
from sqlalchemy import select, update
from typer.testing import CliRunner

from lab.processes import free_port
from nts_core.control import ServerState
from poolsvc import plans
from poolsvc.cli import ExitStatus, app
from poolsvc.config import load_settings
from poolsvc.leader import Leader
from poolsvc.models import Server, ZonePlan
from poolsvc.pool import the_pool

CONFIG = """\
pool = "pool.example"
database = "{database}"
allow_private_addresses = true
[dns]
primary = "{dns}"
tsig_name = "{tsig_name}"
tsig_secret_file = "tsig.secret"
nameservers = ["{dns}", {more}]
srv_ttl = 3600
address_ttl = 2
[ca]
directory_url = "https://ca.example/dir"
caa_identity = "ca.example"
account_key_file = "account.pem"
[policy]
opening_size = 2
"""


class Site:
    """A registry with ten active servers in the zone, its settings file, and a leader."""

    def __init__(self, path, registry, knot):
        self.path, self.registry, self.knot, self.database = path, registry, knot, registry.database
        self.leader = Leader(self.database, registry.settings, "one")
        self.now = datetime.now(UTC)

    async def lead(self, steps=1):
        for _ in range(steps):
            self.now += timedelta(seconds=1)
            await self.leader.step(self.now)

    async def poolsvc(self, *arguments, answer=None):
        command = ["zone", *arguments, "--config", str(self.path)]
        done = await asyncio.to_thread(CliRunner().invoke, app, command, input=answer)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done

    async def lose_all(self):
        async with self.database.transaction() as session:
            # A database in which nobody has these names.
            other = {"state": ServerState.REGISTERED, "name": Server.name + "-other"}
            await session.execute(update(Server).values(other))

    def ask(self, name, kind="A"):
        query = dns.message.make_query(f"{name}.servers.pool.example.", kind)
        return dns.query.udp(query, self.knot.address, timeout=5, port=self.knot.port).answer

    def by_hand(self, change):
        key = dns.tsig.Key(self.knot.tsig_name, self.knot.tsig_secret, "hmac-sha256")
        message = dns.update.UpdateMessage("pool.example.", keyring=key)
        change(message)
        assert dns.query.tcp(message, self.knot.address, timeout=5, port=self.knot.port).rcode() == 0


@pytest.fixture
def write(tmp_path, knot, database_url):
    def write(more=""):
        (tmp_path / "tsig.secret").write_text(knot.tsig_secret)
        path = tmp_path / "poolsvc.toml"
        dns = f"{knot.address}:{knot.port}"
        path.write_text(CONFIG.format(database=database_url, dns=dns, tsig_name=knot.tsig_name, more=more))
        return path

    return write


@pytest.fixture
async def site(write, database, knot, registry_of):
    path = write()
    registry = registry_of(database, load_settings(path))
    await registry.open_account()
    for number in range(1, 11):
        await registry.server(f"s{number}", f"198.18.0.{number}", state=ServerState.ACTIVE)
    site = Site(path, registry, knot)
    await site.lead(2)
    assert site.ask("s1")
    return site


async def test_a_zone_that_is_as_it_should_be(site):
    done = await site.poolsvc("diff")
    assert (done.exit_code, done.stdout) == (
        0,
        "0 RRsets of the zone would change: 0 created, 0 replaced, 0 deleted\n",
    )
    document = json.loads((await site.poolsvc("diff", "--json")).stdout)
    assert (document["changes"], document["plan"], document["leave_srv"]) == ([], None, [])
    assert document["ready"]
    done = await site.poolsvc("check")
    assert (done.exit_code, "32 RRsets asked of 1 nameservers, 0 mismatches" in done.stdout) == (0, True)
    assert "5 RRsets asked" in (await site.poolsvc("check", "--sample", "5")).stdout
    assert (await site.poolsvc("apply")).exit_code == 0


async def test_a_stopped_plan_is_looked_at_confirmed_and_made_by_the_leader(site):
    await site.lose_all()
    site.now += timedelta(seconds=600)
    await site.lead(2)
    done = await site.poolsvc("diff")
    assert "? s1.servers.pool.example. A  2 198.18.0.1 -> nothing" in done.stdout
    assert "30 deleted" in done.stdout
    document = json.loads((await site.poolsvc("diff", "--json")).stdout)
    checksum = site.leader.question.checksum
    assert (document["plan"], document["counts"]["deleted"]) == (checksum, 30)
    assert document["changes"][0]["stopped"]
    for wrong in ("0" * 16, "x"):
        refused = await site.poolsvc("apply", "--plan", wrong)
        assert refused.exit_code == ExitStatus.USAGE
        assert checksum in refused.stderr
    assert "Make this?" in (await site.poolsvc("apply", answer="n\n")).stdout
    await site.lead(2)
    assert site.ask("s1"), "the operator said no"
    done = await site.poolsvc("apply", "--plan", checksum)
    assert (done.exit_code, "the leader makes it within seconds" in done.stdout) == (0, True)
    assert site.ask("s1"), "only the leader writes the zone"
    await site.lead(2)
    assert not site.ask("s1")


async def test_without_a_leader_the_word_waits_for_the_next_one(site):
    """The command that found the plan, and a leader that has just begun, have the same one."""
    await site.lose_all()
    await site.leader.stop()
    done = await site.poolsvc("apply", answer="y\n")
    assert (done.exit_code, "no process publishes now" in done.stdout) == (0, True)
    async with site.database.transaction() as session:
        (plan,) = await session.scalars(select(ZonePlan))
        assert (plan.deleted, plan.replaced, plan.withdrawn) == (30, 0, 0)
    site.leader = Leader(site.database, site.registry.settings, "two")
    await site.lead(3)
    assert not site.ask("s1")


async def test_a_command_changes_nothing_by_looking(site):
    """It burns no name, keeps no server, opens no pool, and works while the registry is frozen."""
    new = await site.registry.server("new", "198.18.0.99", state=ServerState.VERIFIED)
    async with site.database.transaction() as session:
        await session.execute(update(Server).where(Server.id == new).values(burnt_at=None))
        (await the_pool(session, site.registry.settings)).frozen_at = site.now
    async with site.database.transaction() as session:
        await session.execute(
            update(Server).where(Server.id.between(1, 8)).values(state=ServerState.SUSPENDED)
        )
    done = await site.poolsvc("diff")
    assert "  new.servers.pool.example. A  nothing -> 2 198.18.0.99" in done.stdout
    assert "? s8 would leave the SRV" in done.stdout
    async with site.database.transaction() as session:
        rows = list(await session.scalars(select(Server).where(Server.kept_at.is_not(None))))
        assert (rows, (await session.get(Server, new)).burnt_at) == ([], None)
    assert (await site.poolsvc("check")).exit_code == ExitStatus.DOCTOR, "the zone lacks what was found"


async def test_each_fault_of_a_nameserver_is_a_line_with_a_remedy(site, write, monkeypatch):
    monkeypatch.setattr(plans, "_ROUNDS", 1)
    silent = f"127.0.0.1:{free_port()}"
    write(f'"{silent}"')
    done = await site.poolsvc("check", "--sample", "2")
    assert done.exit_code == ExitStatus.DOCTOR
    lines = [line for line in done.stdout.splitlines() if line.startswith(silent)]
    assert lines
    assert all("  > see whether it runs" in line for line in lines)


async def test_what_somebody_else_changed_is_shown_until_it_is_put_back(site):
    site.by_hand(lambda update: update.replace("s1.servers.pool.example.", 2, "A", "198.51.100.9"))
    assert "2 198.51.100.9 -> 2 198.18.0.1" in (await site.poolsvc("diff")).stdout
    done = await site.poolsvc("check")
    assert (
        done.exit_code,
        "1 RRsets are not as the registry has them  > poolsvc zone diff" in done.stdout,
    ) == (
        ExitStatus.DOCTOR,
        True,
    )
    site.now += timedelta(seconds=60)
    await site.lead(2)
    assert (await site.poolsvc("check")).exit_code == 0


async def test_a_change_under_way_is_no_fault(site, monkeypatch):
    """The leader publishes it while it is looked at; what nobody publishes stays due."""
    monkeypatch.setattr(plans, "_PAUSE", 0.2)
    alice = await site.registry.server("alice", "198.18.0.77", state=ServerState.VERIFIED)
    checked = asyncio.create_task(plans.check(site.database, site.registry.settings, site.now))
    while not checked.done():
        await site.lead()
        await asyncio.sleep(0)
    assert (await checked).is_good
    async with site.registry.change(alice) as (_, server):
        server.addresses[0].score = 0.0
        server.weight = 2
    async with site.database.transaction() as session:
        await session.execute(update(Server).where(Server.id == alice).values(name="bob"))
    found = await plans.check(site.database, site.registry.settings, site.now)
    assert found.due > 0


async def test_a_word_while_the_registry_is_frozen_waits_for_the_thaw(site):
    await site.lose_all()
    async with site.database.transaction() as session:
        (await the_pool(session, site.registry.settings)).frozen_at = site.now
    done = await site.poolsvc("apply", answer="y\n")
    assert "frozen: nothing is published until `poolsvc thaw`" in done.stdout
    assert "within seconds" not in done.stdout


async def test_before_there_is_an_account_nothing_is_ready(write, database, registry_of):
    path = write()
    site = Site(path, registry_of(database, load_settings(path)), None)
    document = json.loads((await site.poolsvc("diff", "--json")).stdout)
    assert (document["ready"], document["changes"]) == (False, [])


async def test_before_an_embedded_server_has_begun_its_zone_the_first_start_is_the_remedy(
    tmp_path, write, database, registry_of
):
    path = write()
    site = Site(path, registry_of(database, load_settings(path)), None)
    head, _, rest = path.read_text().partition("[dns]\n")
    embedded = '[dns]\nsrv_ttl = 3600\n[dns.embedded]\nlisten = ["127.0.0.1:53"]\n'
    path.write_text(f"{head}{embedded}[ca]\n{rest.partition('[ca]')[2].lstrip()}")
    for command in ("diff", "apply", "check"):
        done = await site.poolsvc(command)
        assert (done.exit_code, "start `poolsvc serve`" in done.stderr) == (ExitStatus.CONFIGURATION, True)


async def test_a_primary_that_is_away_is_said_so(site):
    site.knot.stop()
    for command in ("diff", "check", "apply"):
        done = await site.poolsvc(command)
        assert done.exit_code == ExitStatus.PEER
        assert "the primary" in done.stderr
