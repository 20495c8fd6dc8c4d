"""What systemd hears of the agent, and the sockets that it passes, with systemd's own programs."""

import asyncio
import json
import os
import signal
import socket
import sys
import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lab.processes import Process, free_port, is_free, wait_until
from lab.programs import NO_DAEMON, script
from member_agent import systemd
from member_agent.errors import AgentError, ExitStatus
from member_agent.state import Membership, StateDirectory, agent_key_pem
from nts_core.client import establish
from nts_core.systemd import Notifier

HOST = "127.0.0.1"
# Asks for each of its arguments in turn, and prints what it was given; "close" gives the last one back.
ASK = """
import json, os, socket, sys
from member_agent.systemd import inherited
found, given = [], []
for text in sys.argv[1:]:
    if text == "close":
        given.pop().close()
        continue
    kind, address, port = text.split(",")
    sock = inherited(address, int(port), socket.SocketKind[kind])
    given += [sock] if sock else []
    found.append(sock and [os.get_inheritable(sock.fileno()), sock.getblocking(), *sock.getsockname()[:2]])
print(json.dumps([found, sorted(name for name in os.environ if name.startswith("LISTEN_"))]))
"""

# A pipe is 3, one end of a connection 4, and nothing 5 and so on.
STRANGE = """
import fcntl, os, socket
pipe, end = (fcntl.fcntl(each, fcntl.F_DUPFD, 100) for each in (os.pipe()[0], socket.socketpair()[0].detach()))
os.dup2(pipe, 3), os.dup2(end, 4), os.closerange(5, 100)
"""


@pytest.fixture
def manager(tmp_path):
    """The socket on which systemd hears its services."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(40)
        yield sock


def heard(manager):
    return manager.recv(4096).decode().splitlines()


def serve(directory, pair, *arguments, env=None, ke="127.0.0.1:0", ntp="127.0.0.1:0", before=()):
    files = [f"--cert={pair.cert}", f"--key={pair.key}"]
    options = [f"--ke={ke}", f"--ntp={ntp}", "--local-stratum=3", NO_DAEMON]
    argv = [*before, script("pool-agent"), "serve", *files, *options, *arguments]
    return Process("pool-agent", argv, directory, env=env)


def test_a_server_tells_systemd_how_it_is(manager, tmp_path, pair):
    env = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "40000000"}
    with serve(tmp_path, pair, env=env).start() as server:
        assert heard(manager) == ["WATCHDOG=1"]
        assert heard(manager) == ["READY=1", "STATUS=serving"]
        server.signal(signal.SIGHUP)
        reloading, at = heard(manager)
        assert reloading == "RELOADING=1"
        assert 0 < int(at.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
        assert heard(manager) == ["READY=1"]
        server.signal(signal.SIGTERM)
        assert heard(manager) == ["STOPPING=1"]
        assert server.wait() == 0


def test_a_member_is_ready_while_its_registry_is_away(manager, tmp_path):
    state = StateDirectory(tmp_path / "state")
    domain = "alice.servers.pool.example"
    nobody = f"http://{HOST}:{free_port()}"
    key = agent_key_pem(Ed25519PrivateKey.generate()).decode()
    membership = Membership(nobody, "pool.example", "alice", domain, "token", int(time.time()), key, "joined")
    state.member(domain).save_membership(membership)
    argv = [script("pool-agent"), "run", f"--state={state.path}", NO_DAEMON]
    agent = Process("pool-agent", argv, tmp_path, env={"NOTIFY_SOCKET": manager.getsockname()})
    with agent.start():
        assert heard(manager) == ["READY=1", f"STATUS=for {domain}"]
        agent.signal(signal.SIGTERM)
        assert heard(manager) == ["STOPPING=1"]
        assert agent.wait() == 0


def test_a_systemd_that_went_away_ends_nothing(tmp_path, pair):
    with serve(tmp_path, pair, env={"NOTIFY_SOCKET": str(tmp_path / "nobody")}) as server:
        server.start(lambda: "systemd_not_told" in server.output())
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


async def test_the_watchdog_is_fed_by_the_loop_alone(manager, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    monkeypatch.setenv("WATCHDOG_USEC", "2000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    async with Notifier():
        assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & set(os.environ)
        assert heard(manager) == ["WATCHDOG=1"]
        time.sleep(0.05)  # noqa: ASYNC251 - this is the loop that hangs
        manager.setblocking(False)
        with pytest.raises(BlockingIOError):
            manager.recv(4096)
        loop = asyncio.get_running_loop()
        for _ in range(3):
            assert await asyncio.wait_for(loop.sock_recv(manager, 4096), 40) == b"WATCHDOG=1"


@pytest.mark.parametrize(
    "variables",
    [
        {"WATCHDOG_USEC": "2000", "WATCHDOG_PID": "1"},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "-5"},
        {"WATCHDOG_USEC": "9" * 5000},
        {"WATCHDOG_USEC": "soon"},
        {},
    ],
)
async def test_a_watchdog_that_is_not_for_us_is_not_fed(variables, manager, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    async with Notifier() as notify:
        notify.ready("up")
    assert [heard(manager), heard(manager)] == [["READY=1", "STATUS=up"], ["STOPPING=1"]]


async def test_an_abstract_socket_is_told_as_well(monkeypatch):
    name = f"truechimer-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}")
        manager.settimeout(40)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        async with Notifier() as notify:
            notify.status("up")
        assert heard(manager) == ["STATUS=up"]


async def test_a_status_is_one_line_whatever_it_holds(manager, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    async with Notifier() as notify:
        notify.status("a\nMAINPID=1\r\x00b\u2028\udc80" + "x" * 100_000)
    (line,) = heard(manager)
    assert line.startswith("STATUS=a MAINPID=1  b")
    assert len(line) < 300


@pytest.mark.parametrize("address", ["", "vsock:2:1", "nowhere"])
async def test_an_address_of_another_kind_is_told_nothing(address, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    async with Notifier() as notify:
        notify.ready("up")


def activated(tmp_path, listen, ask, *, datagram=False):
    """What a program was given that `systemd-socket-activate` started."""
    program = Process(
        "asking",
        [
            *("systemd-socket-activate", *(["--datagram"] if datagram else [])),
            *(f"--listen={each}" for each in listen),
            *(sys.executable, "-c", ASK, *ask),
        ],
        tmp_path,
    )
    host, _, port = listen[0].rpartition(":")
    host = host.strip("[]")
    target = ("::1" if ":" in host else HOST, int(port))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with program.start(lambda: not is_free(*target)):
        with socket.socket(family, socket.SOCK_DGRAM if datagram else socket.SOCK_STREAM) as client:
            client.connect(target)
            client.send(b"wake up")
            wait_until(lambda: not program.running(), "the program's end")
        return json.loads(program.output().splitlines()[-1]), program.output()


def test_each_passed_socket_has_one_owner_at_a_time(tmp_path):
    port, other = free_port(HOST, "::1"), free_port(HOST)
    (found, variables), _ = activated(
        tmp_path,
        [f"{HOST}:{port}", f"[::1]:{port}"],
        [
            f"SOCK_STREAM,{HOST},{other}",
            f"SOCK_DGRAM,{HOST},{port}",
            f"SOCK_STREAM,0.0.0.0,{port}",
            f"SOCK_STREAM,0:0::1,{port}",
            f"SOCK_STREAM,::1,{port}",
            f"SOCK_STREAM,{HOST},{port}",
            "close",
            f"SOCK_STREAM,{HOST},{port}",
            f"SOCK_STREAM,{HOST},{port}",
        ],
    )
    ours, theirs = ([False, False, host, port] for host in (HOST, "::1"))
    assert found == [None, None, None, theirs, None, ours, ours, None]
    assert variables == []


def test_a_datagram_socket_is_passed(tmp_path):
    port = free_port()
    asked = [f"SOCK_STREAM,{HOST},{port}", f"SOCK_DGRAM,{HOST},{port}"]
    (found, _), _ = activated(tmp_path, [f"{HOST}:{port}"], asked, datagram=True)
    assert found == [None, [False, False, HOST, port]]


def test_a_socket_of_both_families_is_refused(tmp_path):
    port = free_port(HOST, "::1")
    (found, _), output = activated(tmp_path, [f"[::]:{port}"], [f"SOCK_STREAM,::,{port}"])
    assert found == [None]
    assert "BindIPv6Only=ipv6-only" in output


@pytest.mark.parametrize(
    ("count", "pid", "faults"),
    [
        ("3", None, 3),
        ("999", None, 64),
        ("-1", None, 0),
        ("x", None, 0),
        ("9" * 5000, None, 0),
        ("3", "1", 0),
    ],
)
def test_what_is_no_socket_of_ours_is_left_alone(count, pid, faults, tmp_path):
    environ = f"os.environ.update(LISTEN_FDS={count!r}, LISTEN_PID={pid!r} or str(os.getpid()))"
    child = Process(
        "asking", [sys.executable, "-c", f"{STRANGE}\n{environ}\n{ASK}", f"SOCK_STREAM,{HOST},80"], tmp_path
    )
    with child.start():
        assert child.wait(40) == 0
    assert json.loads(child.output().splitlines()[-1]) == [[None], []]
    assert child.output().count("passed_socket_unusable") == faults


async def test_a_server_takes_the_sockets_that_systemd_opened(tmp_path, pair, trust):
    """One activator in another, as each passes sockets of one kind."""
    port = free_port()
    at = f"{HOST}:{port}"
    before = [
        "systemd-socket-activate",
        "--datagram",
        f"--listen={at}",
        "systemd-socket-activate",
        f"--listen={at}",
    ]
    server = serve(tmp_path, pair, ke=at, ntp=at, before=before)
    with server.start(lambda: not is_free(HOST, port)):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(b"wake up", (HOST, port))
            wait_until(lambda: server.output().count("Listening on") == 3, "the second activator")
        found = await establish("ntp.example", HOST, port, trust)
    assert found.chain


def test_a_credential_is_read_where_systemd_put_it(tmp_path, monkeypatch):
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    assert systemd.credential("join-token") is None
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert systemd.credential("join-token") is None
    (tmp_path / "join-token").write_text("TOKEN\n")
    assert systemd.credential("join-token") == "TOKEN"
    (tmp_path / "join-token").write_text("\n")
    assert systemd.credential("join-token") is None


def test_a_credential_that_is_none_is_refused_without_its_content(tmp_path, monkeypatch):
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "join-token").write_bytes(b"SECRET\xff")
    with pytest.raises(AgentError, match="join-token: not a text") as raised:
        systemd.credential("join-token")
    assert "SECRET" not in repr(raised.value)
    assert raised.value.status is ExitStatus.CONFIGURATION
    (tmp_path / "directory").mkdir()
    with pytest.raises(AgentError, match="Is a directory"):
        systemd.credential("directory")
    (tmp_path / "join-token").write_bytes(b"x" * 1_000_000)
    assert len(systemd.credential("join-token")) < 10_000
