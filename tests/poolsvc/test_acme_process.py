"""The process that holds the account's key: what passes, what it refuses, and how it ends."""

import asyncio
import contextlib
import grp
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from hypothesis import HealthCheck, given, strategies
from hypothesis import settings as hypothesis_settings

from lab.processes import Process, wait_until
from lab.programs import run, script
from nts_core.acme import CALLS, AcmeError, Challenge, OrderState, RevocationReason, load_account_key
from nts_core.certificates import ChainError, CsrError
from nts_core.tls import new_key_and_csr
from nts_core.verdict import Verdict
from poolsvc.acme_client import RemoteAccount
from poolsvc.acme_process import MAX_CONNECTIONS_OF_USER, RULES, Charge
from poolsvc.acme_wire import LINE_LIMIT, TABLE, Refusal
from poolsvc.cli.common import ExitStatus
from poolsvc.config import load_settings
from poolsvc.doctor.ca import sockets
from poolsvc.doctor.report import Examination
from poolsvc.models import OrderStatus

NAME = "alice.servers.pool.example"
# Nothing of what strangers say is to be found in the log.
CANARY = b"canary-7f3a"


def make_csr(name=NAME) -> str:
    return new_key_and_csr(name)[1]


@pytest.fixture
def at_pebble(lab, tuned):
    """Makes settings whose CA is this Pebble."""

    def make(pebble, **ca):
        return tuned(
            ca={
                "directory_url": pebble.directory_url,
                "ca_file": pebble.ca_file,
                "account_key_file": lab.directory / "account.pem",
                **ca,
            }
        )

    return make


@pytest.fixture
async def reach(at_pebble):
    """`await reach(pebble)`: the account, by a child of ours."""
    with contextlib.ExitStack() as stack:

        async def open_(pebble, **ca):
            settings = at_pebble(pebble, **ca)
            account = await RemoteAccount.reach(settings, settings.ca)
            stack.callback(account.close)
            return account

        yield open_


def child_of(account) -> subprocess.Popen:
    assert account._child is not None
    return account._child


def test_every_call_of_the_account_has_a_rule():
    """A call that is added to the account is none here until somebody has said what it may do."""
    assert set(RULES) == set(CALLS) == set(TABLE)


async def test_a_whole_life_of_a_certificate(flow, at_pebble):
    """The steps of issuance do not know the difference."""
    life = await flow()
    settings = at_pebble(life.pebble)
    account = await RemoteAccount.reach(settings, settings.ca)
    life.account = lambda: asyncio.sleep(0, account)
    order = await life.certified()
    assert order.status is OrderStatus.ISSUED
    assert order.deactivated_at is not None
    await account.revoke(order.chain, RevocationReason.KEY_COMPROMISE)
    assert life.pebble.revocation_reason(order.serial) == RevocationReason.KEY_COMPROMISE
    account.close()


async def test_calls_under_way_get_their_own_answers(lab, reach):
    account = await reach(lab.pebble())
    names = [f"n{number}.servers.pool.example" for number in range(8)]
    orders = await asyncio.gather(*(account.order(make_csr(name), name) for name in names))
    assert len({order.url for order in orders}) == len(names)
    found = await asyncio.gather(*(account.poll(order.url) for order in orders))
    assert {status.status for status in found} == {OrderState.PENDING}


@pytest.mark.parametrize(
    "domain",
    [
        "www.example.org",
        "servers.pool.example",
        "pool.example",
        "a.b.servers.pool.example",
        "alice.servers.pool.example.",
        "Alice.servers.pool.example",
        "alice.servers.pool.example.evil.example",
        "xservers.pool.example",
        "*.servers.pool.example",
        ".servers.pool.example",
        "registry.example.net",
        "",
    ],
)
async def test_no_other_name_is_ordered_or_finalized(lab, reach, domain):
    """Whatever a worker that was taken over asks for."""
    account = await reach(lab.pebble())
    with pytest.raises(AcmeError) as caught:
        await account.order(make_csr(domain) if domain.strip(".") else make_csr(), domain)
    assert (caught.value.code, caught.value.permanent) == ("refused", True)
    order = await account.order(make_csr(), NAME)
    with pytest.raises((AcmeError, CsrError)):
        await account.finalize(order.url, make_csr(domain) if domain.strip(".") else "no request")
    assert (await account.poll(order.url)).status is OrderState.PENDING


async def test_what_proves_control_of_a_name_is_never_finalized(lab, reach):
    account = await reach(lab.pebble())
    order = await account.authorize(NAME, Challenge.DNS_01)
    with pytest.raises(AcmeError) as caught:
        await account.finalize(order.url, make_csr())
    assert (caught.value.code, caught.value.permanent) == ("refused", True)


async def test_the_registrys_own_name_is_ordered_where_it_is_wanted(settings):
    host = {"public_url": "https://registry.example.net"}
    assert not Charge.of(settings.model_copy(update=host), settings.ca).has_name("registry.example.net")
    web_tls = settings.web_tls.model_copy(update={"acme": True})
    charge = Charge.of(settings.model_copy(update={**host, "web_tls": web_tls}), settings.ca)
    assert charge.has_name("registry.example.net")
    assert not charge.has_name("www.registry.example.net")


async def test_requests_are_looked_at_where_the_key_is(lab, reach):
    account = await reach(lab.pebble())
    with pytest.raises(CsrError, match="names must be"):
        await account.order(make_csr("bob.servers.pool.example"), NAME)
    key = load_account_key(lab.directory / "account.pem")
    builder = x509.CertificateSigningRequestBuilder(x509.Name([]))
    names = x509.SubjectAlternativeName([x509.DNSName(NAME)])
    own = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    with pytest.raises(CsrError, match="account at the CA"):
        await account.order(own.public_bytes(serialization.Encoding.PEM).decode(), NAME)
    with pytest.raises(ChainError):
        await account.revoke("no chain", RevocationReason.CESSATION_OF_OPERATION)
    with pytest.raises(AcmeError, match="not an address of this CA"):
        await account.deactivate_authorization("https://ca.example.net/authz/1")


async def test_a_request_that_is_too_long_is_not_sent(lab, reach):
    account = await reach(lab.pebble())
    with pytest.raises(AcmeError, match="octets"):
        await account.order("x" * LINE_LIMIT, NAME)
    assert not account.lost


@given(
    strategies.text(max_size=50),
    strategies.text(max_size=1000),
    strategies.none() | strategies.floats(0, 1e6),
    strategies.booleans(),
    strategies.none() | strategies.integers(100, 599),
)
def test_an_error_passes_with_all_that_it_says(code, detail, retry_after, permanent, status):
    error = AcmeError(code, detail, retry_after=retry_after, permanent=permanent, status=status)
    passed = Refusal.read(Refusal.of(error).line()).error()
    assert vars(passed) == vars(error)
    assert str(passed) == str(error)
    for words in (CsrError(detail), ChainError(detail)):
        other = Refusal.read(Refusal.of(words).line()).error()
        assert (type(other), str(other)) == (type(words), detail)


async def test_a_process_that_is_killed_leaves_the_order_to_the_next(lab, reach):
    pebble = lab.pebble()
    account = await reach(pebble)
    order = await account.order(make_csr(), NAME)
    child_of(account).kill()
    with pytest.raises(AcmeError) as caught:
        await account.poll(order.url)
    assert (caught.value.code, caught.value.permanent) == ("unreachable", False)
    assert account.lost
    again = await reach(pebble)
    assert again.uri == account.uri
    assert (await again.poll(order.url)).status is OrderState.PENDING


async def test_a_call_under_way_when_the_process_is_killed_fails_at_once(lab, reach):
    account = await reach(lab.pebble())
    os.kill(child_of(account).pid, signal.SIGSTOP)
    call = asyncio.create_task(account.order(make_csr(), NAME))
    await asyncio.sleep(0)
    child_of(account).kill()
    with pytest.raises(AcmeError, match="has ended"):
        await asyncio.wait_for(call, 10)


async def test_the_child_ends_with_us_and_not_by_a_signal_to_the_group(lab, reach):
    account = await reach(lab.pebble())
    child = child_of(account)
    for number in (signal.SIGTERM, signal.SIGINT):
        child.send_signal(number)
    await account.order(make_csr(), NAME)
    account._writer.transport.abort()
    assert await asyncio.to_thread(child.wait, 10) == 0


async def test_an_account_that_the_ca_lost_is_lost_here_too(lab, reach):
    pebble = lab.pebble()
    account = await reach(pebble)
    pebble.restart()
    with pytest.raises(AcmeError) as caught:
        await account.order(make_csr(), NAME)
    assert caught.value.code == "accountDoesNotExist"
    assert account.lost


async def test_a_key_that_cannot_be_used_is_told_by_the_child(lab, at_pebble):
    settings = at_pebble(lab.pebble())
    settings.ca.account_key_file.touch(mode=0o644)
    with pytest.raises(AcmeError, match="0644") as caught:
        await RemoteAccount.reach(settings, settings.ca)
    assert caught.value.code == "account-key"


async def test_a_parent_that_is_killed_takes_the_child_with_it(lab, at_pebble):
    program = (
        "import asyncio, sys, time\n"
        "from poolsvc.acme_client import RemoteAccount\n"
        "from poolsvc.config import Settings\n"
        "async def main():\n"
        "    settings = Settings.model_validate_json(sys.argv[1])\n"
        "    account = await RemoteAccount.reach(settings, settings.ca)\n"
        "    print(account._child.pid, flush=True)\n"
        "    time.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    document = at_pebble(lab.pebble()).model_dump_json()
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, document, stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    child = int(await parent.stdout.readline())
    assert is_running(child)
    parent.kill()
    await parent.wait()
    await asyncio.to_thread(wait_until, lambda: not is_running(child), "the end of the child")


def is_running(pid) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


SETTINGS = """\
pool = "pool.example"
[dns]
primary = "127.0.0.1:53"
tsig_name = "publisher.pool.example"
tsig_secret_file = "tsig.secret"
nameservers = ["127.0.0.1:53"]
[ca]
directory_url = "{url}"
caa_identity = "ca.example"
account_key_file = "account.pem"
ca_file = "{ca_file}"
socket = "run/acme.sock"
"""


@pytest.fixture
def written(lab, tmp_path):
    """Writes the settings of an account on a socket; the file."""

    def write(*more):
        pebble = lab.pebble()
        text = SETTINGS.format(url=pebble.directory_url, ca_file=pebble.ca_file)
        file = tmp_path / "poolsvc.toml"
        file.write_text("\n".join((text, *more)))
        return file

    return write


@pytest.fixture
def serving(written):
    """Starts `poolsvc acme serve`; the process, the settings."""
    with contextlib.ExitStack() as stack:

        def start(*more):
            file = written(*more)
            settings = load_settings(file)
            argv = [script("poolsvc"), "acme", "serve", "--config", str(file)]
            process = Process("acme", argv, file.parent)
            stack.callback(process.stop)
            process.start(lambda: listens(settings.ca.socket))
            return process, settings

        yield start


async def test_one_process_serves_several_workers_on_a_socket(serving):
    process, settings = serving()
    path = settings.ca.socket
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) & 0o027 == 0
    first, second = await asyncio.gather(*(RemoteAccount.reach(settings, settings.ca) for _ in range(2)))
    assert first.uri == second.uri
    order = await first.order(make_csr(), NAME)
    first.close()
    assert (await second.poll(order.url)).status is OrderState.PENDING
    await asyncio.to_thread(process.stop)
    assert not path.exists()
    with pytest.raises(AcmeError):
        await second.poll(order.url)
    with pytest.raises(AcmeError) as caught:
        await RemoteAccount.reach(settings, settings.ca)
    assert caught.value.code == "unreachable"
    second.close()


LINES = strategies.one_of(
    strategies.binary(max_size=300),
    strategies.recursive(
        strategies.none() | strategies.integers() | strategies.text(max_size=10),
        lambda inner: (
            strategies.lists(inner, max_size=3)
            | strategies.dictionaries(strategies.sampled_from(["id", "call", "arguments", "x"]), inner)
        ),
    ).map(lambda document: json.dumps(document).encode() + b"\n"),
    strategies.builds(
        lambda call, arguments: json.dumps({"id": 1, "call": call, "arguments": arguments}).encode() + b"\n",
        strategies.sampled_from([*CALLS, "open", "close", "__init__", "_fetch", "uri"]),
        strategies.dictionaries(
            strategies.sampled_from(["csr_pem", "domain", "order_url", "url", "self"]),
            strategies.integers() | strategies.none(),
            min_size=1,
        ),
    ),
)


async def test_garbage_ends_its_connection_and_nothing_else(serving):
    process, settings = serving()
    good = await RemoteAccount.reach(settings, settings.ca)

    @hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(LINES)
    def insist(line):
        assert answer_to(settings.ca.socket, line) == b""

    def try_all():
        insist()
        # Never a line's end, a document that is too long, a call that is none.
        assert answer_to(settings.ca.socket, CANARY * (LINE_LIMIT // 5)) == b""
        assert answer_to(settings.ca.socket, b'{"id":1,"call":"' + CANARY + b'"}\n') == b""
        assert answer_to(settings.ca.socket, b'{"id":-1,"call":"open"}\n') == b""
        assert answer_to(settings.ca.socket, b'{"id":1,"call":"open","arguments":{"a":1}}\n') == b""

    await asyncio.to_thread(try_all)
    assert process.running()
    assert (await good.poll((await good.order(make_csr(), NAME)).url)).status is OrderState.PENDING
    good.close()
    log = process.output()
    assert "acme_connection_refused" in log
    assert CANARY.decode() not in log


def answer_to(path, octets) -> bytes:
    """All that comes until the other side closes."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(path))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(octets)
            sock.shutdown(socket.SHUT_WR)
            return sock.recv(65_536)
        return b""


def listens(path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


OPENING = b'{"id":1,"call":"open"}\n'
CALL = (
    "import socket, sys\n"
    "s = socket.socket(socket.AF_UNIX); s.settimeout(10); s.connect(sys.argv[1])\n"
    "try:\n"
    '    s.sendall(b\'{"id":1,"call":"open"}\\n\'); print(s.recv(65536).decode())\n'
    "except (BrokenPipeError, ConnectionResetError): pass\n"
)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can ask as another user")
class TestStrangers:
    """What another user of the machine gets."""

    @pytest.fixture(autouse=True)
    def _in_a_place_that_all_can_enter(self, tmp_path):
        for path in (tmp_path, *tmp_path.parents):
            if path.owner() == "root" and path != Path("/tmp"):
                path.chmod(path.stat().st_mode | 0o011)

    @staticmethod
    def ask(path, *options):
        argv = ["setpriv", "--reuid=nobody", "--clear-groups", *options, "/usr/bin/python3", "-c", CALL]
        return subprocess.run([*argv, str(path)], capture_output=True, text=True, check=False, timeout=30)

    def test_a_stranger_is_refused_by_the_files_mode_and_by_the_kernels_word(self, serving):
        process, settings = serving()
        path = settings.ca.socket
        path.parent.chmod(0o711)
        assert "Permission denied" in self.ask(path, "--regid=nogroup").stderr
        path.chmod(0o666)
        done = self.ask(path, "--regid=nogroup")
        assert (done.stdout.strip(), done.stderr) == ("", "")
        assert "acme_peer_refused" in process.output()
        assert "uri" not in process.output()

    def test_users_of_the_group_are_served(self, serving):
        group = grp.getgrgid(65534).gr_name
        _, settings = serving(f'socket_group = "{group}"')
        path = settings.ca.socket
        path.parent.chmod(0o711)
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        answer = json.loads(self.ask(path, f"--regid={group}").stdout)
        assert "/my-account/" in answer["result"]
        assert self.ask(path, "--regid=daemon").stdout.strip() == ""

    def test_a_user_with_many_idle_connections_keeps_nobody_else_out(self, serving):
        process, settings = serving('socket_group = "nogroup"')
        path = settings.ca.socket
        path.parent.chmod(0o711)
        with contextlib.ExitStack() as stack:
            for _ in range(MAX_CONNECTIONS_OF_USER):
                stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(path))
            assert answer_to(path, OPENING) == b""
            assert "acme_peer_refused" in process.output()
            assert "/my-account/" in self.ask(path, "--regid=nogroup").stdout
        wait_until(lambda: answer_to(path, OPENING), "there is room again", 10)


def refused(file, *words):
    """By a process of its own: the command sets up the log, which is that of all tests here."""
    done = run("poolsvc", "acme", "serve", "--config", str(file))
    assert done.status == ExitStatus.CONFIGURATION, done.stderr
    for word in words:
        assert word in done.stderr


def test_a_place_that_is_not_safe_is_refused(written, tmp_path):
    file = written()
    run = tmp_path / "run"
    run.mkdir(mode=0o700)
    run.chmod(0o770)
    refused(file, "ca.socket", "others may write", "chmod go-w")
    run.chmod(0o700)
    (run / "acme.sock").write_text("")
    refused(file, "ca.socket", "is no socket")
    (run / "acme.sock").unlink()
    run.rmdir()
    run.write_text("")
    refused(file, "ca.socket")


def test_what_the_settings_lack_is_told(written, tmp_path):
    file = written('socket_group = "no-such-group"')
    refused(file, "ca.socket_group", "no-such-group")
    file.write_text(file.read_text().replace('socket = "run/acme.sock"', ""))
    refused(file, "ca.socket", "poolsvc serve")


def test_a_key_for_all_eyes_is_refused_at_the_start(written, tmp_path):
    file = written()
    (tmp_path / "account.pem").touch(mode=0o644)
    refused(file, "ca.account_key_file", "0644", "chmod 600")


def test_a_socket_that_was_left_is_replaced_and_one_that_answers_is_not(serving, tmp_path):
    process, settings = serving()
    refused(tmp_path / "poolsvc.toml", "another process listens")
    process.signal(signal.SIGKILL)
    process.wait()
    assert settings.ca.socket.exists()
    process.start(lambda: listens(settings.ca.socket))


# As the doctor sees it


async def doctors_word(settings):
    return await sockets(Examination(settings, Path("poolsvc.toml"), datetime.now(UTC)))


async def test_the_doctor_is_content_with_our_process_whatever_its_ca_does(serving):
    process, settings = serving()
    path = settings.ca.socket
    found = await doctors_word(settings)
    assert (found.verdict, found.found) == (Verdict.OK, f"{path}: our process answers")
    (await RemoteAccount.reach(settings, settings.ca)).close()
    assert (await doctors_word(settings)).verdict is Verdict.OK, "with an open account as well"
    await asyncio.to_thread(process.stop)
    found = await doctors_word(settings)
    assert (found.verdict, found.found) == (Verdict.FAIL, f"{path}: No such file or directory")
    assert "poolsvc acme serve" in found.remedy


@pytest.mark.parametrize(
    ("mode", "of_socket", "words"),
    [(0o770, 0o600, "may write to"), (0o707, 0o600, "may write to"), (0o750, 0o606, "everybody may connect")],
)
async def test_the_doctor_sees_whom_else_the_socket_lets_in(serving, mode, of_socket, words):
    _, settings = serving()
    path = settings.ca.socket
    path.parent.chmod(mode)
    path.chmod(of_socket)
    found = await doctors_word(settings)
    assert found.verdict is Verdict.FAIL
    assert words in found.found
    assert "chmod" in found.remedy


async def test_the_doctor_does_not_take_another_program_for_ours(written):
    """A file; one that is silent; one that says what is no answer; one that nobody listens on any more."""
    path = load_settings(written()).ca.socket
    settings = load_settings(path.parent.parent / "poolsvc.toml")
    path.parent.mkdir(mode=0o700)
    path.touch(mode=0o600)
    assert "is no socket" in (await doctors_word(settings)).found
    path.unlink()

    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        path.chmod(0o600)
        assert "no answer within" in (await doctors_word(settings)).found
    path.unlink()

    async def talk(_, writer):
        with contextlib.closing(writer):
            writer.write(b"220 mail.example ESMTP\n")

    async with await asyncio.start_unix_server(talk, path):
        path.chmod(0o600)
        found = await doctors_word(settings)
    assert found.verdict is Verdict.FAIL
    assert "is not ours" in found.found
    assert path.is_socket()
    assert "Connection refused" in (await doctors_word(settings)).found
