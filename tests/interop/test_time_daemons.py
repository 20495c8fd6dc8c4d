"""The agent serves what the time daemon of its host says: chronyd 4.3 and NTPsec's ntpd 1.2.2 (Debian 12)."""

import asyncio
import json
import os
import socket
import subprocess
import urllib.request

import pytest

from lab.certificates import Authority
from lab.peers import ChronydClient, ChronydServer, Namespace, NtpsecServer, chronyc_environment
from lab.processes import free_port, wait_until
from lab.programs import RUN_DEADLINE, AgentServer, alice, run, script
from member_agent.errors import ExitStatus
from member_agent.sockets import Endpoint
from member_agent.tracking import ClockSource, Daemon, ask
from nts_core import ntptime
from nts_core.asking import Unanswered
from nts_core.packet import Header, Leap

NAME = "localhost"
HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def pair(authority):
    return authority.issue(NAME, HOST)


@pytest.fixture(scope="module")
def upstream(tmp_path_factory, pair):
    """Where the time comes from, at stratum 4."""
    with ChronydServer(tmp_path_factory.mktemp("upstream"), pair, stratum=4) as server:
        yield server


@pytest.fixture(autouse=True)
def _chronyc(monkeypatch):
    for name, value in chronyc_environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def daemon(tmp_path, authority, upstream):
    """The time daemon of this host, synchronised at stratum 5."""
    with ChronydClient(tmp_path / "daemon", authority.root, NAME, upstream.ke_port) as client:
        wait_until(lambda: stratum(client) == 5, "chronyd synchronised")
        yield client


def stratum(chronyd):
    """What chronyd's own tracking says; 0 while it is not synchronised."""
    rows = chronyd.report("tracking")
    return int(rows[0][2]) if rows else None


def header(port):
    """The header of the agent's answer to a plain request."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(5)
        udp.sendto(Header(transmit=1).encode(), (HOST, port))
        return Header.decode(udp.recv(100))


def agent(directory, pair, source, *arguments):
    return AgentServer(directory, pair, f"--clock-source={source}", *arguments)


def test_what_chronyd_tracks_is_served(tmp_path, pair, daemon):
    metrics = free_port()
    source = f"chronyd:{daemon.socket}"
    with agent(tmp_path, pair, source, "--local-stratum=9", f"--metrics={HOST}:{metrics}") as server:
        said = header(server.ntp_port)
        row = daemon.report("tracking")[0]
        with urllib.request.urlopen(f"http://{HOST}:{metrics}/metrics", timeout=5) as answer:
            gauges = answer.read().decode().splitlines()
        log = server.process.output()
    assert (said.leap, said.stratum) == (Leap.NONE, 5)
    assert said.reference_id.hex().upper() == row[0] == "7F000001"
    assert said.reference <= said.transmit
    # The reference is at most a few polls of a quarter of a second old.
    assert ntptime.difference(said.transmit, said.reference) < 60_000_000_000
    # The bound of the error covers what chronyd says and grows from there; on loopback it stays small.
    assert 0 < said.root_dispersion < ntptime.short(1_000_000_000)
    assert "pool_agent_clock_synchronised 1.0" in gauges
    assert "pool_agent_clock_stratum 5.0" in gauges
    assert "pool_agent_clock_smeared 0.0" in gauges
    assert "stratum 5 by chronyd" in log
    assert "smears" not in log


def test_a_local_stratum_of_chronyd_is_chronyds_word(tmp_path, pair, upstream):
    with agent(tmp_path, pair, f"chronyd:{upstream.socket}") as server:
        said = header(server.ntp_port)
    assert (said.leap, said.stratum, said.reference_id) == (Leap.NONE, 4, bytes((127, 127, 1, 1)))


def test_a_chronyd_that_loses_its_time_and_comes_back(tmp_path, authority, pair, upstream, daemon):
    with agent(tmp_path, pair, f"chronyd:{daemon.socket}") as server:
        before = header(server.ntp_port)
        daemon.stop()
        wait_until(lambda: "as it was before" in server.process.output(), "the silence is noticed")
        silent = header(server.ntp_port)
        # Believed for a while, with less confidence each second.
        assert (silent.stratum, silent.reference) == (5, before.reference)
        assert silent.root_dispersion > before.root_dispersion
        # The same socket, but nobody to synchronise to.
        nobody = ChronydClient(daemon.process.directory, authority.root, NAME, free_port())
        with nobody:
            wait_until(lambda: header(server.ntp_port).leap == Leap.UNSYNCHRONISED, "the loss is served")
            assert header(server.ntp_port).stratum == 16
        back = ChronydClient(daemon.process.directory, authority.root, NAME, upstream.ke_port)
        with back:
            wait_until(lambda: header(server.ntp_port).stratum == 5, "the time is back")
        lines = [line for line in server.process.output().splitlines() if "said=" in line or '"said"' in line]
    # One line for each change, not one for each question.
    assert 3 <= len(lines) <= 8, lines


async def test_chronyd_over_udp_tells_its_tracking_but_not_its_sources(tmp_path, authority, upstream):
    client = ChronydClient(tmp_path / "udp", authority.root, NAME, upstream.ke_port)
    config = tmp_path / "udp" / "chrony.conf"
    port = free_port()
    config.write_text(config.read_text().replace("cmdport 0", f"cmdport {port}\nbindcmdaddress {HOST}"))
    with client:
        wait_until(lambda: stratum(client) == 5, "chronyd synchronised")
        source = ClockSource((Daemon.CHRONYD,), chronyd=Endpoint(HOST, port))
        found = await ask(source)
    assert (found.daemon, found.stratum, found.leap) == (Daemon.CHRONYD, 5, Leap.NONE)
    assert found.reference_id == bytes((127, 0, 0, 1))
    assert "whether its source smears" in found.remark


async def test_a_command_socket_that_never_answers(tmp_path):
    """The real chronyc gives up before our own deadline, and takes its socket away."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as silent:
        silent.bind(str(tmp_path / "socket"))
        with pytest.raises(Unanswered, match="506 Cannot talk to daemon"):
            await ask(ClockSource((Daemon.CHRONYD,), chronyd=str(tmp_path / "socket")))
    assert [left.name for left in tmp_path.iterdir()] == ["socket"]


async def test_a_command_socket_that_answers_garbage(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as garbage:
        garbage.bind(str(tmp_path / "socket"))

        def talk():
            _, peer = garbage.recvfrom(4096)
            for size in (0, 1, 28, 100, 1000):
                garbage.sendto(os.urandom(size), peer)

        garbage.settimeout(10)
        asked = asyncio.create_task(asyncio.to_thread(talk))
        with pytest.raises(Unanswered, match="506 Cannot talk to daemon"):
            await ask(ClockSource((Daemon.CHRONYD,), chronyd=str(tmp_path / "socket")))
        await asked


def test_status_says_what_chronyd_says(tmp_path, daemon):
    alice(tmp_path / "state")
    (tmp_path / "state" / "agent.toml").write_text(f'clock_source = "chronyd:{daemon.socket}"\n')
    done = run("pool-agent", "status", f"--state={tmp_path}/state")
    assert done.status == ExitStatus.OK
    assert "stratum 5 by chronyd, reference 127.0.0.1, root delay" in done.stdout


@pytest.fixture
def namespace(tmp_path):
    with Namespace(tmp_path / "namespace") as entered:
        yield entered


@pytest.fixture(scope="module")
def ntpd(tmp_path_factory, pair):
    directory = tmp_path_factory.mktemp("ntpd")
    with Namespace(directory) as namespace, NtpsecServer(directory, pair, namespace, stratum=10) as running:
        yield running


def inside(ntpd, *argv):
    return subprocess.run(
        [*ntpd.namespace.inside(), *argv], capture_output=True, text=True, timeout=RUN_DEADLINE, check=False
    )


@pytest.mark.parametrize("source", ["ntpd", "ntpd:[::1]:123", "auto"])
def test_status_says_what_ntpd_says(tmp_path, ntpd, source):
    """`auto` finds no chronyd in ntpd's network, and a command socket of the host's is out of the question."""
    alice(tmp_path / "state")
    (tmp_path / "state" / "agent.toml").write_text(f'clock_source = "{source}"\n')
    done = inside(
        ntpd, "env", "PATH=/nonexistent", script("pool-agent"), "status", f"--state={tmp_path}/state"
    )
    assert done.returncode == ExitStatus.OK, done
    assert "stratum 10 by ntpd, reference 127.0.0.1, root delay" in done.stdout


def test_what_ntpd_tells_is_served(tmp_path, authority, pair, ntpd):
    server = agent(tmp_path, pair, "ntpd")
    server.process.argv = [*ntpd.namespace.inside(), *server.process.argv]
    with server:
        done = inside(
            ntpd,
            script("pool-client"),
            "query",
            f"{NAME}:{server.ke_port}",
            f"--address={HOST}",
            f"--ca={authority.root}",
            "--json",
        )
    assert done.returncode == 0, done
    document = json.loads(done.stdout)
    assert (document["leap"], document["stratum"]) == (0, 10)


def test_an_ntpd_without_a_source_is_not_synchronised(tmp_path, namespace, pair):
    """The real ntpd's leap 3, stratum 16 and reference id INIT; a member may vouch for the clock all the same."""
    lost = NtpsecServer(tmp_path / "ntpd", pair, namespace)
    config = tmp_path / "ntpd" / "ntp.conf"
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if not line.startswith("tos orphan")))
    alice(tmp_path / "state")
    settings = tmp_path / "state" / "agent.toml"
    with lost.process.start(lambda: "Private Key OK" in lost.process.output()):
        for vouched, words in (("", "served as not synchronised"), ("local_stratum = 5", "as stratum 5")):
            settings.write_text(f'clock_source = "ntpd"\n{vouched}\n')
            done = inside(lost, script("pool-agent"), "status", f"--state={tmp_path}/state")
            assert words in done.stdout, done
            assert "ntpd is not synchronised" in done.stdout
