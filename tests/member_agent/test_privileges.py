"""An agent that was started as root, and sockets that systemd handed over."""

import os
import pwd
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lab.processes import wait_until
from lab.programs import AgentServer, run
from member_agent.errors import ExitStatus
from nts_core.client import establish

HOST = "127.0.0.1"
NAME = "ntp.example"
USER = "nobody"
CAP_NET_BIND_SERVICE = 1 << 10
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def readable(authority, open_path):
    """A pair that the user may read."""
    pair = authority.issue(NAME, HOST)
    target = open_path / "pair"
    target.mkdir()
    for path in (pair.cert, pair.key):
        (target / path.name).write_bytes(path.read_bytes())
        (target / path.name).chmod(0o644)
    return type(pair)(target / pair.cert.name, target / pair.key.name)


def low_port():
    for port in range(1023, 900, -1):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


def status_of(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.split() for name, _, value in (line.partition(":") for line in lines)}


def children_of(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def threads_of(pid):
    return [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]


@as_root
async def test_root_becomes_the_user_and_serves_on_low_ports(
    open_path, readable, trust, monkeypatch, packets
):
    """All that root made before is the user's; nothing else is left of root, in any process or thread."""
    monkeypatch.setenv("POOL_AGENT_USER", USER)
    monkeypatch.setenv("POOL_AGENT_WORKERS", "2")
    state = open_path / "state"
    (state / "members").mkdir(parents=True, mode=0o700)
    state.chmod(0o700)
    (state / "members" / "key.pem").write_text("mine")
    (state / "elsewhere").symlink_to(readable.key)
    hidden = open_path / "secret"
    hidden.write_text("of root")
    (state / "planted").hardlink_to(hidden)
    port = low_port()
    entry = pwd.getpwnam(USER)
    with AgentServer(
        open_path / "log", readable, f"--state={state}", ke=(f"{HOST}:{port}",), ntp=(f"{HOST}:{port}",)
    ) as server:
        found = await establish(NAME, HOST, port, trust)
        assert len(found.result.cookies) == 8
        pid = server.process.pid
        workers = children_of(pid)
        assert len(workers) == (packets == "python")
        for each, kept in (
            *((each, CAP_NET_BIND_SERVICE) for each in threads_of(pid)),
            *((each, 0) for each in workers),
        ):
            status = status_of(each)
            assert set(status["Uid"]) == {str(entry.pw_uid)}
            assert set(status["Gid"]) == {str(entry.pw_gid)}
            assert set(map(int, status["Groups"])) == set(os.getgrouplist(USER, entry.pw_gid))
            assert int(status["CapEff"][0], 16) == int(status["CapPrm"][0], 16) == kept
            assert int(status["CapInh"][0], 16) == int(status["CapAmb"][0], 16) == 0
    for path in (state, state / "members", state / "members" / "key.pem", state / "cookie-keys.json"):
        assert path.stat().st_uid == entry.pw_uid
    assert hidden.stat().st_uid == readable.key.stat().st_uid == 0, "what is not the agent's stays root's"


def fails(status, *arguments):
    done = run("pool-agent", "serve", *arguments, f"--ke={HOST}:0", f"--ntp={HOST}:0")
    assert done.status == status, done
    assert "Traceback" not in done.stderr
    assert "ready" not in done.stdout
    return done.stderr


@as_root
@pytest.mark.parametrize(
    ("user", "group", "said"),
    [
        ("no-such-user", None, "has no user no-such-user"),
        (USER, "no-such-group", "has no group no-such-group"),
        ("root", None, "root is root"),
    ],
)
def test_whom_nobody_knows(pair, monkeypatch, user, group, said):
    monkeypatch.setenv("POOL_AGENT_USER", user)
    if group:
        monkeypatch.setenv("POOL_AGENT_GROUP", group)
    assert said in fails(ExitStatus.CONFIGURATION, f"--cert={pair.cert}", f"--key={pair.key}")


@as_root
def test_a_state_directory_that_the_user_cannot_reach(tmp_path, readable, monkeypatch):
    """It is his, but one above it is closed."""
    monkeypatch.setenv("POOL_AGENT_USER", USER)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    options = (f"--cert={readable.cert}", f"--key={readable.key}", f"--state={closed}/state")
    assert f"cannot be used by {USER}" in fails(ExitStatus.STATE, *options)


# What a process says that calls `become`; it needs none of our files as another user.
_BECOME = """
import os, sys
from member_agent.errors import AgentError
from member_agent.privileges import become
user = sys.argv[1]
if len(sys.argv) > 2:
    os.setgroups([]); os.setgid(int(sys.argv[3])); os.setuid(int(sys.argv[2]))
try:
    become(user, None, None)
except AgentError as error:
    print(int(error.status), error)
else:
    print("became", os.getuid())
"""


def become(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", _BECOME, *arguments], capture_output=True, text=True, timeout=30, check=True
    )
    return done.stdout


@as_root
def test_only_root_can_become_another_user():
    nobody, daemon = pwd.getpwnam(USER), pwd.getpwnam("daemon")
    said = become(USER, str(daemon.pw_uid), str(daemon.pw_gid))
    assert said.startswith(f"{ExitStatus.CONFIGURATION:d} user: only root can become {USER}")
    assert become(USER, str(nobody.pw_uid), str(nobody.pw_gid)) == f"became {nobody.pw_uid}\n"


# systemd

# Binds as systemd does, and becomes the program: 3 is a stream, 4 a datagram socket at the same place.
_HAND_OVER = """
import os, socket, sys
address, port = sys.argv[1], int(sys.argv[2])
for number, kind in ((3, socket.SOCK_STREAM), (4, socket.SOCK_DGRAM)):
    sock = socket.socket(socket.AF_INET, kind)
    sock.bind((address, port))
    if kind is socket.SOCK_STREAM:
        sock.listen()
    os.dup2(sock.detach(), 20 + number)
for number in (3, 4):
    os.dup2(20 + number, number)
    os.close(20 + number)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2"}
os.execv(sys.argv[3], sys.argv[3:])
"""


def handed_over(directory, pair, *arguments):
    """A server that could bind nothing itself: who handed the sockets over has them bound."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    place = (f"{HOST}:{port}",)
    server = AgentServer(directory, pair, "--local-stratum=3", *arguments, ke=place, ntp=place)
    server.process.argv[:0] = [sys.executable, "-c", _HAND_OVER, HOST, str(port)]
    return server


async def test_sockets_that_systemd_handed_over_are_served(tmp_path, pair, trust):
    with handed_over(tmp_path, pair) as server:
        found = await establish(NAME, HOST, server.ke_port, trust)
        assert len(found.result.cookies) == 8
        assert server.ke_port == server.ntp_port


def test_one_socket_is_not_for_several_processes(tmp_path, pair, monkeypatch):
    monkeypatch.setenv("POOL_AGENT_WORKERS", "2")
    server = handed_over(tmp_path, pair)
    server.process.start()
    assert server.process.wait(30) == ExitStatus.CONFIGURATION
    assert "workers = 1" in server.process.output()


# What it takes while nothing happens


def test_an_agent_that_serves_is_small(tmp_path, pair):
    """`bench.idle` says how small; this is for what comes in by mistake, such as a library for people."""
    with AgentServer(tmp_path, pair) as server:
        wait_until(lambda: "serving" in server.process.output(), "it serves")
        kib = int(status_of(server.process.pid)["VmRSS"][0])
        mapped = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert kib < 66_000
    assert "greenlet" not in mapped
