"""A server goes from its host without its registry, which is gone: by the agent, without one, and killed on the way."""

import contextlib
import json
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from lab.processes import Process, free_port
from lab.programs import NO_DAEMON, alice, run, script
from lab.volunteer import ChronyVolunteer
from member_agent.clock import clock_of
from member_agent.config import load_settings
from member_agent.engines.choice import engine_of
from member_agent.engines.succession import Succession
from member_agent.errors import ExitStatus
from member_agent.host import Host as Shared
from member_agent.install import CertificateStore
from member_agent.member import all_last_served, take_away
from member_agent.state import Listening, StateDirectory
from nts_core.client import establish
from nts_core.tls import Pin

ALICE, BOB = "alice.servers.pool.example", "bob.servers.pool.example"
HOST = "127.0.0.1"


class Host:
    """Servers that were served, and whose registry does not answer any more."""

    def __init__(self, state, authority):
        self.path, self.state, self.authority = state, StateDirectory(state), authority
        self.ke, self.ntp = free_port(), free_port()
        self.me = alice(state, f"http://127.0.0.1:{free_port()}")
        self.has_served(ALICE)

    def has_served(self, domain):
        server = self.state.member(domain)
        server.save_membership(replace(self.me, server=domain.partition(".")[0], domain=domain))
        store = CertificateStore(server.certificates, domain)
        store.stage(1, self.authority.chain_for(store.pending(1)), now=datetime.now(UTC))
        store.adopt()
        server.save_listening(Listening((HOST,), self.ke))
        return store.current()

    def leave(self, *arguments, status=ExitStatus.OK):
        done = run("pool-agent", "leave", "--local", "--state", str(self.path), *arguments)
        assert done.status == status, done
        return done

    @contextlib.contextmanager
    def running(self):
        options = ["--state", str(self.path), "--local-stratum=10", NO_DAEMON, f"--ntp-port={self.ntp}"]
        agent = Process("pool-agent", [script("pool-agent"), "run", *options], self.path.parent)
        with agent.start(self.serves):
            yield agent

    def serves(self):
        with contextlib.suppress(OSError), socket.create_connection((HOST, self.ke), 1):
            return True
        return False

    @property
    def domains(self):
        return [*self.state.members()]


@pytest.fixture
def host(tmp_path, authority):
    return Host(tmp_path / "state", authority)


def test_a_running_agent_takes_one_server_away_and_goes_on_and_then_ends(host):
    host.has_served(BOB)
    with host.running() as agent:
        host.leave("--yes", status=ExitStatus.USAGE)
        done = host.leave("--yes", "--server", "alice")
        assert f"goes on as {BOB}" in done.stdout
        assert "its names in DNS, and its certificate, which is not revoked" in done.stdout
        assert (host.domains, host.serves(), agent.running()) == ([BOB], True, True)
        host.leave("--yes")
        assert agent.wait() == ExitStatus.REMOVED
    assert not host.serves()
    assert [path.name for path in (host.path / "members").iterdir()] == []


def test_without_an_agent_it_is_asked_and_a_damaged_membership_goes_too(host):
    done = run("pool-agent", "leave", "--local", "--state", str(host.path))
    assert (done.status, host.domains) != (ExitStatus.OK, [])
    assert host.domains == [ALICE]
    assert not host.state.members()[ALICE].is_given_up
    host.leave("--yes", "--at", "3d", status=ExitStatus.USAGE)
    (host.path / "members" / ALICE / "membership.json").write_text("{")
    assert host.leave("--yes").stdout.endswith(f"{ALICE} is gone from this host\n")
    assert [path.name for path in (host.path / "members").iterdir()] == []
    host.leave("--yes", status=ExitStatus.STATE)


@pytest.fixture
def chrony(host, tmp_path):
    """What serves on the host."""
    with ChronyVolunteer(tmp_path / "host") as chrony:
        settings = "".join(f"{name} = {json.dumps(value)}\n" for name, value in chrony.settings().items())
        (host.path / "agent.toml").write_text(f"ntp_port = {chrony.ntp.port}\n[engine]\n{settings}")
        host.ke = chrony.ke.port
        yield chrony


def shared(host, kind=Shared):
    settings = load_settings(host.path, {})
    clock = clock_of(settings)
    engine = engine_of(settings, host.state, clock)
    return kind(settings, clock, engine, Succession(host.path, settings.engine, engine.name))


async def serve(host):
    """As an agent does, which then ends."""
    await shared(host).resume(await all_last_served(host.state, load_settings(host.path, {})))


async def test_who_joins_anew_while_the_lines_of_the_old_membership_go_keeps_the_new_one(host):
    """A time daemon may take minutes for that, and the join token is used up."""
    directory, again = host.state.member(ALICE), replace(host.me, key="ANOTHER")

    class Slow(Shared):
        async def forget(self, domain, *, has_served):
            await super().forget(domain, has_served=has_served)
            directory.save_membership(again)

    directory.give_up()
    await take_away(shared(host, Slow), directory)
    assert (directory.membership(), directory.is_given_up) == (again, False)
    await take_away(shared(host), directory)
    assert host.domains == []


async def test_a_time_daemon_goes_on_with_the_other_servers_and_then_with_none(host, chrony):
    before = chrony.tree()
    (host.path / "members" / ALICE / "listening.json").unlink()
    for domain in (ALICE, BOB):
        pair = host.has_served(domain)
    await serve(host)
    assert ALICE in str(chrony.tree())

    host.leave("--yes", "--server", "alice")
    assert host.domains == [BOB]
    assert ALICE not in str(chrony.tree())
    await establish(BOB, HOST, host.ke, Pin(pair.fingerprint))

    chrony.is_broken = True
    assert "nothing of ours is there any more" in host.leave("--yes", status=ExitStatus.ENGINE).stderr
    assert chrony.tree() == before
    status = run("pool-agent", "status", "--json", "--state", str(host.path)).document
    assert status["servers"][0]["given_up"] is True
    host.leave("--yes")
    assert (host.domains, chrony.tree()) == ([], before)


async def test_the_lines_of_an_engine_before_this_one_go_too(host, chrony):
    before = chrony.tree()
    await serve(host)
    assert chrony.tree() != before
    (host.path / "agent.toml").write_text('[engine]\nkind = "builtin"\n')
    host.leave("--yes")
    assert (host.domains, chrony.tree()) == ([], before)


def dies(host, number, when, *command):
    """Whether it died at that moment."""
    words = [sys.executable, "-m", "lab.mortal_agent", str(number), when, *command, "--state", str(host.path)]
    return subprocess.run(words, check=False, capture_output=True, timeout=60).returncode < 0


def at_each(tmp_path, authority, numbers, when):
    """How often it died before the server was gone, by the command or by an agent that finds it given up."""
    deaths = 0
    for number in numbers:
        by_command, by_agent = (Host(tmp_path / f"{when}{number}{who}", authority) for who in ("c", "a"))
        by_agent.state.members()[ALICE].give_up()
        options = ["--local-stratum=10", NO_DAEMON, f"--ntp-port={by_agent.ntp}"]
        died = [
            dies(by_command, number, when, "leave", "--local", "--yes"),
            dies(by_agent, number, when, "run", *options),
        ]
        again = run("pool-agent", "run", *options, "--state", str(by_agent.path))
        assert again.status in {ExitStatus.REMOVED, ExitStatus.STATE}
        again = run("pool-agent", "leave", "--local", "--yes", "--state", str(by_command.path))
        assert again.status in {ExitStatus.OK, ExitStatus.STATE}
        for host in (by_command, by_agent):
            assert [*(host.path / "members").iterdir()] == []
        deaths += sum(died)
        if not any(died):
            break
    return deaths


def test_killed_in_the_midst_it_goes_all_the_same(tmp_path, authority):
    assert at_each(tmp_path, authority, [3], "before") == 2


@pytest.mark.long
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_any_moment_it_goes_all_the_same(tmp_path, authority, when):
    assert at_each(tmp_path, authority, range(1, 100), when) >= 10
