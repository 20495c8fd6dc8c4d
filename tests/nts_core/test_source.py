"""A source over real sockets: kept cookies, lost keys, crashes, and certificates without a right clock."""

import asyncio
import secrets
import signal
import socket
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509

from lab.certificates import Authority
from lab.nts_server import NtsServer, forged_kiss
from lab.processes import free_port
from lab.programs import AgentServer, run
from member_agent.sockets import Endpoint, bind
from nts_core.aead import AeadId
from nts_core.cli import ExitStatus
from nts_core.client import ClientError, Failure
from nts_core.ke import NtpEndpoint, NtpService
from nts_core.kernel import read_kernel
from nts_core.session import EstablishAt, Phase, PollAt, Stop
from nts_core.source import INTERVAL, CertificateCheck, Source, SystemClock, query
from nts_core.store import TimeRecord

NAME = "ntp.example"
HOST = "127.0.0.1"
DAY = timedelta(days=1)
GOOD = SystemClock(is_good=lambda: True)
UNKNOWN = SystemClock(is_good=lambda: False)


def clock_at(moment, *, is_good=False):
    """A host whose clock stands at `moment`, for certificates only."""
    return SystemClock(now=lambda: round(moment.timestamp() * 1e9), is_good=lambda: is_good)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def pair(authority):
    return authority.issue(NAME, HOST)


@pytest.fixture(scope="module")
def roots(authority):
    return x509.load_pem_x509_certificates(authority.root.read_bytes())


@pytest.fixture
async def server(pair):
    serving = NtsServer(pair)
    await serving.start()
    yield serving
    await serving.stop()
    assert max(serving.cookies.values(), default=0) <= 1, "a cookie was seen twice"


@pytest.fixture
def make(server, roots, tmp_path):
    """Sources of that server that keep their state in one directory."""

    def make_source(of=server, name=NAME, **changes):
        values = {"addresses": [HOST], "state": tmp_path / "state", "interval": 0, "clock": GOOD}
        return Source(name, of.ke_port, roots, **(values | changes))

    return make_source


async def fails(work, code):
    with pytest.raises(ClientError) as caught:
        await work
    assert caught.value.code == code, caught.value
    assert caught.value.remedy
    return caught.value


# Kept cookies


@pytest.mark.rfc8915("5.7-41")
async def test_a_second_run_needs_no_key_establishment(server, make):
    first = await query(make())
    second = await query(make())
    assert (first.key_establishment, second.key_establishment) == (True, False)
    assert (first.cookies, second.cookies) == (8, 8)
    assert len(second.samples) == 4
    assert server.establishments == 1
    assert len(server.cookies) == 8


async def test_kept_keys_of_an_algorithm_that_is_not_offered_are_not_used(server, make):
    await query(make(offered=[AeadId.AES_SIV_CMAC_256]))
    found = await query(make(offered=[AeadId.AES_128_GCM_SIV]))
    assert (found.key_establishment, found.aead) == (True, AeadId.AES_128_GCM_SIV)


async def test_without_state_nothing_is_kept(server, make, tmp_path):
    for _ in range(2):
        assert (await query(make(state=None))).key_establishment
    assert server.establishments == 2
    assert not (tmp_path / "state").exists()


async def test_cookies_of_one_address_are_not_used_for_another(server, make):
    await query(make())
    await fails(query(make(addresses=["127.0.0.77"])), Failure.TCP)
    assert not (await query(make())).key_establishment
    # The name is not even looked up.
    assert not (await query(make(addresses=()))).key_establishment


@pytest.mark.rfc8915("5.7-38", "5.7-39")
async def test_a_server_that_lost_its_keys(server, make):
    """Two polls in vain, as RFC 8915 section 5.7 asks, and then fresh keys."""
    await query(make())
    server.lose_keys()
    found = await query(make())
    assert found.key_establishment
    assert len(found.samples) == 4
    assert server.establishments == 2


async def test_a_server_that_lost_its_keys_while_a_source_runs(server, make):
    async with make() as source:
        await source.next()
        server.lose_keys()
        for _ in range(2):
            await fails(source.next(), Failure.KISS)
        assert source.phase is Phase.RENEWING


async def test_a_forged_ntsn_before_the_true_answer_costs_nothing(server, make):
    server.before = lambda request: [forged_kiss(request, b"NTSN")]
    async with make() as source:
        for _ in range(20):
            await source.next()
    assert server.establishments == 1


@pytest.mark.parametrize("code", [b"DENY", b"RSTR", b"RATE", b"INIT"])
async def test_forged_kisses_have_no_effect(server, make, code):
    server.before = lambda request: [forged_kiss(request, code)]
    async with make() as source:
        for _ in range(3):
            await source.next()
        assert isinstance(source.action, PollAt)
        assert source.action.at <= time.monotonic_ns()


async def test_a_silent_server_is_asked_for_keys_again_after_a_restart(server, make):
    await query(make())
    server.is_silent = True
    error = await fails(query(make(), samples=1), Failure.NTP)
    assert "no authentic answer" in error.message
    assert server.establishments == 2


@pytest.fixture
async def blocked(server):
    """An address of the server where key establishment works and NTP does not."""
    bound = bind(Endpoint("127.0.0.2", server.ke_port), socket.SOCK_STREAM)
    nowhere = NtpService(NtpEndpoint(None, free_port("127.0.0.2")))
    server.listeners.listen(bound, lambda _local, _names: nowhere)
    return "127.0.0.2"


async def test_ntp_that_works_at_another_address(server, make, blocked):
    found = await query(make(addresses=[blocked, HOST]))
    assert (found.ntp_host, len(found.samples)) == (HOST, 4)
    assert server.establishments == 2


async def test_another_address_is_tried_at_once_whatever_the_interval(server, make, blocked):
    async with make(addresses=[blocked, HOST], interval=INTERVAL) as source:
        await fails(source.next(), Failure.NTP)
        assert isinstance(source.action, EstablishAt)
        assert source.action.at <= time.monotonic_ns()
        await source.next()
        assert source.credentials.host == HOST
    assert server.establishments == 2


# Names


@pytest.mark.parametrize("name", ["ntp.example.", "NTP.Example", "NTP.EXAMPLE."])
async def test_a_name_is_the_same_however_it_is_written(server, make, tmp_path, name):
    """To TLS, to the certificate, and to what an earlier run kept."""
    assert (await query(make(name=name))).key_establishment
    assert not (await query(make())).key_establishment
    assert len(list((tmp_path / "state").glob("*.json"))) == 2, "one server's file, and the recorded time"


def test_an_address_as_a_name_has_one_form():
    assert Source("2001:DB8:0::1", 4460, []).name == "2001:db8::1"


@pytest.mark.parametrize(
    "name",
    ["", ".", "ntp.example..", "a b", "-.\n", "zeit.müller.example", "fe80::1%eth0", "a" * 254, "\udc80"],
)
def test_a_name_that_is_none(name):
    with pytest.raises(ClientError) as caught:
        Source(name, 4460, [])
    assert caught.value.code == Failure.CONFIGURATION
    assert repr(name)[1:-1] in caught.value.message
    assert "ASCII" in caught.value.remedy


# Kisses


@pytest.mark.rfc8915("5.7-36")
@pytest.mark.parametrize("code", [b"DENY", b"RSTR"])
async def test_a_refusal_ends_a_source(server, make, code):
    async with make() as source:
        await source.next()
        server.before = server.kiss(code)
        assert [sample async for sample in source.samples()] == []
        assert source.action == Stop(code.decode())
        asked = len(server.cookies)
        await fails(source.next(), Failure.KISS)
        assert len(server.cookies) == asked


async def test_a_refusal_ends_a_query(server, make):
    server.before = server.kiss(b"DENY")
    await fails(query(make()), Failure.KISS)
    assert len(server.cookies) == 1


@pytest.mark.rfc8915("5.7-36")
async def test_rate_is_kept_over_runs(server, make):
    server.before = server.kiss(b"RATE")
    error = await fails(query(make()), Failure.KISS)
    assert "RATE" in error.message
    server.before = lambda _request: []
    async with make() as source:
        await source.next()
        assert source.action.at > time.monotonic_ns() + 10 * 10**9
    assert len((await query(make())).samples) == 1


async def test_a_server_that_is_starting(server, make):
    server.before = server.kiss(b"INIT")
    async with make() as source:
        await fails(source.next(), Failure.UNSYNCHRONISED)
        server.before = lambda _request: []
        assert (await source.next()).synchronised


# A long life


async def test_samples_go_on_through_failures(server, make):
    """What fails is told, and done again when it is due."""
    asked = 0

    def every_third(request):
        nonlocal asked
        asked += 1
        return server.kiss(b"STEP")(request) if asked % 3 == 0 else []

    server.before = every_third
    async with make() as source:
        seen = 0
        async for sample in source.samples():
            assert sample.synchronised
            assert source.last_failure is None
            seen += 1
            if seen == 20:
                break
    assert asked > 20
    assert server.establishments == 1


@pytest.mark.rfc8915("4.2-1")
async def test_key_establishment_fails_and_backs_off(make):
    async with make(addresses=["127.0.0.77"]) as source:
        await fails(source.next(), Failure.TCP)
        action = source.action
    assert isinstance(action, EstablishAt)
    assert action.at > time.monotonic_ns() + 8 * 10**9


async def test_a_query_waits_for_no_back_off(make):
    """One attempt, and its failure: not ten seconds and another one."""
    async with asyncio.timeout(8):
        await fails(query(make(addresses=["127.0.0.77"])), Failure.TCP)


async def test_a_disk_that_takes_nothing_stops_the_poll(server, make, tmp_path):
    """Rather no time than a cookie that a later run would use again."""
    async with make() as source:
        await source.next()
        asked = len(server.cookies)
        (file,) = (tmp_path / "state").glob("ntp.example-*.json")
        aside = file.with_name(f".{file.name}.new")
        aside.mkdir()
        await fails(source.next(), Failure.CONFIGURATION)
        assert len(server.cookies) == asked
        aside.rmdir()
        await source.next()


# Certificates and the clock


@pytest.fixture
async def expired(authority):
    """A server whose certificate has ended, and whose own clock stands at a time before that."""
    now = datetime.now(UTC)
    pair = authority.issue(NAME, HOST, not_before=now - DAY, not_after=now - DAY / 2, file="expired")
    serving = NtsServer(pair)
    serving.offset = -round((0.75 * DAY).total_seconds()) * 10**9
    await serving.start()
    yield serving
    await serving.stop()


def recorded(tmp_path):
    return TimeRecord(tmp_path / "state").load()[0]


@pytest.mark.rfc8915("8.5-1")
async def test_with_a_right_clock_an_ended_certificate_is_refused(expired, make, tmp_path):
    await fails(query(make(expired)), Failure.CERTIFICATE)
    assert abs(recorded(tmp_path) - time.time_ns()) < 60 * 10**9


async def test_without_a_right_clock_it_may_be_the_clock(expired, make, tmp_path):
    found = await query(make(expired, clock=UNKNOWN))
    assert found.certificate_time == "floor"
    assert recorded(tmp_path) is None, "a time that nobody vouches for is not recorded"


@pytest.mark.rfc8915("8.5-3")
async def test_the_recorded_time_is_the_floor(expired, make, tmp_path):
    moment = datetime.now(UTC) - DAY / 4
    TimeRecord(tmp_path / "state").save(round(moment.timestamp() * 1e9))
    error = await fails(query(make(expired, clock=UNKNOWN)), Failure.CERTIFICATE)
    assert "recorded time" in error.message


async def test_a_recorded_time_within_the_validity_is_no_obstacle(expired, make, tmp_path):
    moment = datetime.now(UTC) - 0.75 * DAY
    TimeRecord(tmp_path / "state").save(round(moment.timestamp() * 1e9))
    assert (await query(make(expired, clock=UNKNOWN))).certificate_time == "floor"


@pytest.mark.rfc8915("8.5-2")
@pytest.mark.parametrize("changes", [{"check": CertificateCheck.STRICT}, {"state": None}])
async def test_strict_is_strict(expired, make, changes):
    """Without a state directory there is no recorded time, so there is nothing to go by but the clock."""
    await fails(query(make(expired, clock=UNKNOWN, **changes)), Failure.CERTIFICATE)


@pytest.mark.rfc8915("8.5-4")
async def test_answers_must_lie_within_the_certificate(expired, make, tmp_path):
    """The certificate was let pass as the clock might be wrong; the server's own time shows that it was not."""
    expired.offset = 0
    async with make(expired, clock=UNKNOWN) as source:
        error = await fails(source.next(), Failure.CERTIFICATE)
        assert "validity" in error.message
        assert source.credentials is None
        assert isinstance(source.action, EstablishAt)
        assert source.action.at > time.monotonic_ns()
    assert not list((tmp_path / "state").glob("*-*-*.json"))


@pytest.mark.parametrize("year", [1970, 2090])
async def test_a_clock_that_is_far_off(server, make, year):
    clock = clock_at(datetime(year, 1, 2, tzinfo=UTC))
    assert (await query(make(clock=clock))).certificate_time == "floor"
    await fails(query(make(clock=clock, state=None)), Failure.CERTIFICATE)


async def test_keys_of_a_lax_check_are_not_used_when_strict_is_asked(server, make):
    await query(make(clock=UNKNOWN))
    found = await query(make(clock=UNKNOWN, check=CertificateCheck.STRICT))
    assert (found.key_establishment, found.certificate_time) == (True, "strict")
    found = await query(make(clock=UNKNOWN))
    assert (found.key_establishment, found.certificate_time) == (False, "strict")


@pytest.mark.rfc8915("8.5-3")
async def test_the_time_is_recorded_when_it_is_known(server, make, tmp_path):
    before = time.time_ns()
    await query(make())
    assert before <= recorded(tmp_path) <= time.time_ns()


async def test_the_time_is_recorded_after_a_strict_exchange(server, make, tmp_path):
    """Whichever is earlier, of our clock and the server's: one of them may be wrong."""
    server.offset = -3600 * 10**9
    await query(make(clock=UNKNOWN, check=CertificateCheck.STRICT))
    assert abs(recorded(tmp_path) + 3600 * 10**9 - time.time_ns()) < 60 * 10**9


# Damage


async def test_a_damaged_file_is_told_and_kept(server, make, tmp_path):
    await query(make())
    (file,) = (tmp_path / "state").glob("ntp.example-*.json")
    file.write_bytes(b"{")
    source = make()
    assert (await query(source)).key_establishment
    (warning,) = source.warnings
    assert str(file) in warning
    (aside,) = (tmp_path / "state").glob("*.damaged-*")
    assert aside.read_bytes() == b"{"


async def test_a_damaged_record_is_told(server, make, tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state/recorded-time.json").write_bytes(b"soon")
    source = make(clock=UNKNOWN)
    await query(source)
    assert "recorded-time" in source.warnings[0]


# Crashes. The child ends itself by SIGKILL just before its nth change of a file or its nth datagram, as the
# interpreter's own audit events tell them; so each moment between two of them is one of the deaths.

_CHILD = """
import asyncio, os, signal, sys
from pathlib import Path
from cryptography import x509
from nts_core.source import Source, SystemClock

state, roots, port, left = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def audit(event, arguments):
    global left
    is_file = event in ("open", "os.rename", "os.remove") and str(state) in str(arguments[0])
    if is_file or event in ("fcntl.flock", "socket.sendto"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

async def main():
    roots_ = x509.load_pem_x509_certificates(Path(roots).read_bytes())
    clock = SystemClock(is_good=lambda: False)
    source = Source("ntp.example", port, roots_, addresses=["127.0.0.1"], state=state, interval=0, clock=clock)
    async with source:
        for _ in range(int(sys.argv[5])):
            await source.next()

sys.addaudithook(audit)
asyncio.run(main())
"""


async def child(server, authority, state, death, samples=3):
    """Run a client that dies at its `death`th step; how it ended."""
    arguments = [str(state), str(authority.root), str(server.ke_port), str(death), str(samples)]
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", _CHILD, *arguments)
    try:
        async with asyncio.timeout(30):
            return await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.rfc8915("5.7-8")
async def test_no_death_makes_a_cookie_be_seen_twice(server, authority, tmp_path):
    """The fixture looks at every cookie that the server ever saw."""
    death = 0
    while True:
        death += 1
        status = await child(server, authority, tmp_path / "state", death)
        if status == 0:
            break
        assert status == -signal.SIGKILL
    # At least a lock, and for each of three polls a file, its renaming, and a datagram.
    assert death > 10
    assert len(server.cookies) > death
    assert server.establishments < death / 2, "kept cookies were used"


async def test_deaths_at_any_time(server, authority, tmp_path):
    """The same from outside, in the midst of many polls."""
    for _ in range(8):
        seen = len(server.cookies)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _CHILD, str(tmp_path / "state"), str(authority.root)),
            *(str(server.ke_port), "-1", "100000"),
        )
        try:
            async with asyncio.timeout(30):
                wanted = seen + 3 + secrets.randbelow(40)
                while len(server.cookies) < wanted:  # noqa: ASYNC110 - the server has nothing to wait for
                    await asyncio.sleep(0.001)
        finally:
            process.kill()
            await process.wait()


# Programs


def ask(authority, port, *arguments, status=ExitStatus.OK):
    done = run(
        *("pool-client", "query", f"{NAME}:{port}", f"--address={HOST}", f"--ca={authority.root}", "--json"),
        *arguments,
    )
    assert done.status == status, done
    return done.document


@pytest.fixture
def agent(tmp_path, pair):
    """How to start `pool-agent serve` on ports that stay the same."""
    ports = [free_port(), free_port()]

    def start(*arguments, pair=pair):
        return AgentServer(
            tmp_path / "agent",
            pair,
            "--local-stratum=2",
            *arguments,
            ke=(f"{HOST}:{ports[0]}",),
            ntp=(f"{HOST}:{ports[1]}",),
        )

    return start


def test_cookies_outlive_a_restart_of_the_server(tmp_path, authority, agent):
    state = f"--state={tmp_path / 'state'}"
    with agent(f"--state={tmp_path / 'keys'}") as server:
        first = ask(authority, server.ke_port, state)
    with agent(f"--state={tmp_path / 'keys'}") as server:
        second = ask(authority, server.ke_port, state)
    assert (first["key_establishment"], second["key_establishment"]) == (True, False)
    assert second["authenticated"]
    assert second["warnings"] == []


def test_a_restarted_server_without_its_keys(tmp_path, authority, agent):
    state = f"--state={tmp_path / 'state'}"
    for _ in range(2):
        with agent() as server:
            assert ask(authority, server.ke_port, state)["key_establishment"]


def test_kept_cookies_need_no_key_establishment_server(tmp_path, authority, pair, agent):
    """RFC 8915 section 5.7: sessions resume while NTS-KE is unavailable."""
    with agent(f"--state={tmp_path / 'keys'}") as server:
        ask(authority, server.ke_port, f"--state={tmp_path / 'state'}")
        port = server.ke_port
    wrong = authority.issue("other.example", file="other")
    with agent(f"--state={tmp_path / 'keys'}", pair=wrong):
        assert not ask(authority, port, f"--state={tmp_path / 'state'}")["key_establishment"]
        failed = ask(authority, port, status=ExitStatus.NOT_ESTABLISHED)
    assert failed["error"]["code"] == "certificate"


@pytest.mark.rfc8915("5.7-8")
async def test_two_programs_at_once(server, authority, tmp_path):
    """One waits for the other; the fixture looks for cookies that were seen twice."""
    arguments = (f"--state={tmp_path / 'state'}", "--samples=8")
    both = await asyncio.gather(
        *(asyncio.to_thread(ask, authority, server.ke_port, *arguments) for _ in range(4))
    )
    assert sum(each["key_establishment"] for each in both) == 1
    assert len(server.cookies) == 32


def test_a_state_that_is_in_use_for_long(tmp_path, authority, agent, roots):
    async def hold(port):
        async with Source(NAME, port, roots, addresses=[HOST], state=tmp_path / "state") as source:
            await source.next()
            return await asyncio.to_thread(
                ask, authority, port, f"--state={tmp_path / 'state'}", status=ExitStatus.USAGE
            )

    with agent() as server:
        document = asyncio.run(hold(server.ke_port))
    assert "another process" in document["error"]["message"]


def test_what_people_see(tmp_path, authority, agent):
    with agent() as server:
        command = [f"{NAME}:{server.ke_port}", f"--address={HOST}", f"--ca={authority.root}"]
        run("pool-client", "query", *command, f"--state={tmp_path / 'state'}")
        (file,) = (tmp_path / "state").glob("ntp.example-*.json")
        told = run("pool-client", "query", *command, f"--state={tmp_path / 'state'}")
        file.write_bytes(b"")
        warned = run("pool-client", "query", *command, f"--state={tmp_path / 'state'}")
    assert told.status == warned.status == 0
    assert "without key establishment" in told.stdout
    assert "warning: " in warned.stderr
    assert "damaged" in warned.stderr


def test_strictness_on_the_command_line(tmp_path, authority, agent):
    now = datetime.now(UTC)
    old = authority.issue(NAME, HOST, not_before=now - DAY, not_after=now - DAY / 2, file="old")
    with agent("--clock-offset=-64800", pair=old) as server:
        state = f"--state={tmp_path / 'state'}"
        strict = ask(
            *(authority, server.ke_port, state, "--certificate-time=strict"),
            status=ExitStatus.NOT_ESTABLISHED,
        )
        assert strict["error"]["code"] == "certificate"
        if not read_kernel().synchronised:
            assert ask(authority, server.ke_port, state)["certificate_time"] == "floor"


def test_a_state_directory_that_cannot_be(tmp_path, authority, agent):
    (tmp_path / "file").write_bytes(b"")
    with agent() as server:
        document = ask(authority, server.ke_port, f"--state={tmp_path / 'file'}", status=ExitStatus.USAGE)
    assert document["error"]["code"] == "configuration"
    assert document["error"]["remedy"]
