"""The engine inside the agent: several certificates, places that come and go while it serves, several processes."""

import asyncio
import contextlib
import gc
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from lab.processes import free_port, wait_until
from lab.programs import AgentServer, scrape
from member_agent.clock import Clock
from member_agent.config import AgentSettings, Limits
from member_agent.engines import EngineError, Service
from member_agent.engines.builtin import BuiltinEngine
from member_agent.engines.serving import Charge, Counts, PemPair, Place, Protocol
from member_agent.engines.workers import ClockOrders, News, Orders, Report, _Serving
from member_agent.errors import AgentError, ExitStatus
from member_agent.install import load_pair
from member_agent.sockets import Endpoint, bind
from member_agent.tracking import Daemon, Tracking, boottime_ns
from nts_core.association import Association
from nts_core.client import ClientError, establish, exchange
from nts_core.cookies import Keyring
from nts_core.packet import Leap
from nts_core.ratelimit import Admission, Cap, Verdict

HOST, OTHER = "127.0.0.1", "127.0.0.2"
ALICE, BOB = "alice.pool.example", "bob.pool.example"
KE, NTP = Protocol.KE, Protocol.NTP
BOTH = pytest.mark.usefixtures("packets")
# Addresses of which the kernel gives each of two processes some.
SOURCES = [f"127.0.0.{number}" for number in range(1, 17)]


@pytest.fixture(scope="module")
def pairs(authority):
    """Of two domains; both may be asked for by address."""
    return {
        name: load_pair(pair.cert, pair.key)
        for name in (ALICE, BOB)
        for pair in [authority.issue(name, HOST, "::1", file=name)]
    }


def service(pairs, *hosts, port=0, ntp=None):
    ke = tuple(Endpoint(host, port) for host in hosts)
    return Service(pairs, ke, tuple(Endpoint(host, 0) for host in ntp or hosts))


@contextlib.asynccontextmanager
async def engine(first=None, **settings):
    """One that serves `first`, and ends with the test."""
    built = BuiltinEngine(Clock(3), AgentSettings(**settings), None)
    try:
        if first is not None:
            await built.apply(first)
        yield built
    finally:
        await built.close()


async def certificate(built, name, trust):
    """The serial number of the certificate that a client of `name` is shown."""
    found = await establish(name, HOST, built.endpoints(KE)[0].port, trust)
    return found.chain[0].serial_number


def serial(pair):
    return x509.load_pem_x509_certificates(pair.chain_path.read_bytes())[0].serial_number


# Certificates


@BOTH
async def test_each_name_has_its_own_certificate(pairs, trust):
    async with engine(service(pairs, HOST)) as built:
        for name, pair in pairs.items():
            assert await certificate(built, name, trust) == serial(pair)
            assert await certificate(built, name.upper(), trust) == serial(pair), "SNI has no case"


@pytest.mark.parametrize("name", ["carol.pool.example", HOST, "x" * 60 + ".example"])
@BOTH
async def test_among_several_nobody_is_shown_one_that_was_not_asked_for(pairs, trust, name, capfd):
    """By another name, or by none, as who asks for an address."""
    async with engine(service(pairs, HOST)) as built:
        with pytest.raises(ClientError):
            await certificate(built, name, trust)
        assert built.counts.ke == {"tls-failed": 1}
        assert await certificate(built, BOB, trust) == serial(pairs[BOB])
    assert "Traceback" not in capfd.readouterr().err


@BOTH
async def test_the_only_certificate_is_shown_to_everybody(pairs, trust):
    async with engine(service({ALICE: pairs[ALICE]}, HOST)) as built:
        assert await certificate(built, HOST, trust) == serial(pairs[ALICE])


@BOTH
async def test_before_any_certificate_there_is_an_alert(pairs, trust):
    async with engine(service({}, HOST)) as built:
        with pytest.raises(ClientError):
            await certificate(built, ALICE, trust)
        await built.apply(replace(service(pairs, HOST)))
        assert await certificate(built, ALICE, trust) == serial(pairs[ALICE])


@BOTH
async def test_clients_are_sent_on_by_the_name_that_they_asked_for(pairs, trust):
    """NTP in the other family only: a name of another domain might be gone tomorrow."""
    async with engine(service(pairs, "::1", ntp=["0.0.0.0"])) as built:
        for name in pairs:
            found = await establish(name, "::1", built.endpoints(KE)[0].port, trust)
            assert found.result.endpoint.host == name


@BOTH
async def test_a_pair_that_cannot_be_used_leaves_what_was(tmp_path, pairs, trust):
    async with engine(service({ALICE: pairs[ALICE]}, HOST)) as built:
        before = built.endpoints(KE)
        broken = replace(pairs[BOB], key_path=pairs[ALICE].key_path)
        with pytest.raises(EngineError, match="do not match") as refused:
            await built.apply(service({ALICE: pairs[ALICE], BOB: broken}, HOST, OTHER))
        assert refused.value.status is ExitStatus.CERTIFICATE
        assert built.endpoints(KE) == before
        assert await certificate(built, HOST, trust) == serial(pairs[ALICE])


# Places


async def served_at(built, host, trust, name=ALICE):
    """Whether both protocols answer at an address that is asked for by name."""
    ke = next(endpoint for endpoint in built.endpoints(KE) if endpoint.address in {host, "0.0.0.0"})
    found = await establish(name, host, ke.port, trust)
    sample = await exchange(Association(found.result, secrets.token_bytes), host, found.ntp_port)
    return sample.stratum == 3


@BOTH
async def test_addresses_come_and_go_while_it_serves(pairs, trust):
    async with engine(service(pairs, HOST)) as built:
        kept = built.endpoints(KE)[0]
        await built.apply(service(pairs, HOST, OTHER))
        assert built.endpoints(KE)[0] == kept, "what stays is not bound anew"
        assert await served_at(built, HOST, trust)
        assert await served_at(built, OTHER, trust)
        gone = built.endpoints(KE)[1]
        reader, writer = await asyncio.open_connection(HOST, kept.port)
        await built.apply(service(pairs, HOST))
        with pytest.raises(ClientError):
            await establish(ALICE, OTHER, gone.port, trust)
        assert await served_at(built, HOST, trust)
        assert not reader.at_eof(), "connections under way are spared"
        writer.close()


@pytest.mark.parametrize("workers", [1, 2])
@BOTH
async def test_what_cannot_be_bound_leaves_what_was(pairs, trust, workers):
    """Also where the new place is taken by us: a wildcard instead of an address, on the same port."""
    port = free_port(HOST, "127.0.0.9")
    first = service({ALICE: pairs[ALICE]}, HOST, port=port)
    async with engine(first, workers=workers) as built:
        with socket.create_server(("127.0.0.9", port)) as taken:
            with pytest.raises(EngineError, match="already in use") as refused:
                await built.apply(service(pairs, "0.0.0.0", port=port, ntp=[HOST]))
            assert refused.value.status is ExitStatus.CONFIGURATION
            taken.close()
        assert await served_at(built, HOST, trust)
        assert await certificate(built, HOST, trust) == serial(pairs[ALICE]), "nor are other pairs taken"
        await built.apply(service(pairs, "0.0.0.0", port=port, ntp=[HOST]))
        assert await served_at(built, HOST, trust)


@BOTH
async def test_places_have_a_bound(pairs):
    hosts = [f"127.1.{number}.1" for number in range(130)]
    async with engine() as built:
        with pytest.raises(EngineError, match="too many"):
            await built.apply(service(pairs, *hosts))
        assert built.endpoints(KE) == []


@BOTH
async def test_one_change_after_the_other(pairs, trust):
    """The last one that was asked for holds, however they overlap."""
    async with engine(service(pairs, HOST)) as built:
        await asyncio.gather(
            *(built.apply(service(pairs, HOST, *more)) for more in ([OTHER], [], [OTHER], ["127.0.0.3"]))
        )
        assert [endpoint.address for endpoint in built.endpoints(KE)] == [HOST, "127.0.0.3"]


# Several processes


async def ask_from(sources, built, trust, name=ALICE):
    """A key establishment and an authenticated request from each address."""
    for source in sources:
        found = await establish(name, HOST, built.endpoints(KE)[0].port, trust)
        association = Association(found.result, secrets.token_bytes)
        request = association.poll()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.setblocking(False)
            udp.bind((source, 0))
            await asyncio.get_running_loop().sock_sendto(udp, request, (HOST, built.endpoints(NTP)[0].port))
            async with asyncio.timeout(10):
                answer = await asyncio.get_running_loop().sock_recv(udp, 2048)
        association.receive(answer, sent=0, received=0)


def shown_from(source, port, name):
    """What certificate a client at this address is shown, by OpenSSL's own client."""
    done = subprocess.run(
        [
            *("openssl", "s_client", "-connect", f"{HOST}:{port}", "-bind", source),
            *("-servername", name, "-alpn", "ntske/1", "-tls1_3"),
        ],
        input=b"",
        capture_output=True,
        timeout=20,
        check=False,
    )
    return done.stdout.decode(errors="replace")


async def until(condition, what):
    await asyncio.to_thread(wait_until, condition, what)


@pytest.mark.usefixtures("python_packets")
async def test_all_processes_serve_alike(pairs, trust):
    async with engine(service({ALICE: pairs[ALICE]}, HOST), workers=2) as built:
        await ask_from(SOURCES, built, trust)
        assert built.workers == 2
        await until(lambda: built.counts.ntp["nts-time"] == len(SOURCES), "the worker has reported")
        assert 0 < built._packets._server.counts.ntp["nts-time"] < len(SOURCES), "both had some"
        assert built.counts.opened == {"sealing": len(SOURCES)}
        assert built.counts.sealed == 9 * len(SOURCES)
        assert built.requests == built.ke_requests == len(SOURCES)
        await built.apply(service({BOB: pairs[BOB]}, HOST))
        port = built.endpoints(KE)[0].port
        for source in SOURCES[:4]:
            shown = await asyncio.to_thread(shown_from, source, port, BOB)
            assert pairs[BOB].chain_path.read_text().partition("-----END")[0] in shown


@pytest.mark.usefixtures("python_packets")
async def test_a_worker_that_dies_is_started_again_and_nothing_is_lost(pairs, trust):
    async with engine(service(pairs, HOST), workers=2) as built:
        await ask_from(SOURCES, built, trust)
        await until(lambda: built.counts.ntp["nts-time"] == len(SOURCES), "the worker has reported")
        (pid,) = children(os.getpid(), "engines.workers")
        os.kill(pid, signal.SIGKILL)
        await built.apply(service(pairs, HOST, OTHER))  # meanwhile things change
        await ask_from(SOURCES, built, trust)
        assert built.restarts == 1
        await until(lambda: built.counts.ntp["nts-time"] == 2 * len(SOURCES), "counts do not go back")
    assert children(os.getpid(), "engines.workers") == []


def children(pid, word):
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # threads and children end meanwhile
            found += [int(child) for child in (task / "children").read_text().split() if runs(child, word)]
    return found


def runs(pid, word):
    return word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.usefixtures("python_packets")
def test_workers_end_with_their_agent_whatever_ends_it(tmp_path, pair, monkeypatch):
    monkeypatch.setenv("POOL_AGENT_WORKERS", "2")
    metrics = free_port()
    with AgentServer(tmp_path, pair, f"--metrics={HOST}:{metrics}") as server:
        assert scrape(metrics)["pool_agent_workers"] == 2
        (worker,) = children(server.process.pid, "engines.workers")
        words = Path(f"/proc/{worker}/cmdline").read_bytes() + Path(f"/proc/{worker}/environ").read_bytes()
        assert b"POOL_AGENT" not in words
        assert b"PRIVATE" not in words
        server.process.signal(signal.SIGKILL)
        server.process.wait()
        wait_until(lambda: not Path(f"/proc/{worker}").exists() or is_zombie(worker), "the worker has ended")


def is_zombie(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@BOTH
async def test_another_agent_does_not_share_unasked(pairs):
    """SO_REUSEPORT would let any process of the same user in."""
    async with engine(service(pairs, HOST), workers=2) as built:
        port = built.endpoints(KE)[0].port
        async with engine(workers=2) as second:
            with pytest.raises(EngineError, match="already in use"):
                await second.apply(service(pairs, HOST, port=port))


def first_orders(**change):
    charge = Charge(Limits(), AgentSettings().aead, None)
    tracking = Tracking(Daemon.NTPD, 1, Leap.NONE, 2, b"\xff\xfe\0\1", None, 5, 6)
    orders = Orders(
        charge, ClockOrders(None, 0, tracking, "\N{SNOWMAN}"), Keyring.new(0, secrets.token_bytes)
    )
    return News.since(None, replace(orders, **change))


def test_orders_come_over_whole():
    news = first_orders()
    again = News.model_validate_json(news.model_dump_json())
    assert again == news
    assert again.clock.tracking.reference_id == b"\xff\xfe\0\1"
    report = Report(number=7, counts=Counts(sealed=3, ke_open=1) + Counts(sealed=4))
    assert Report.model_validate_json(report.model_dump_json()) == report
    pair = PemPair("CHAIN", "SECRET")
    assert "SECRET" not in repr(pair)


def framed(octets):
    return struct.pack("!I", len(octets)) + octets


@pytest.mark.parametrize(
    ("octets", "status"),
    [
        (b"", 0),
        (framed(b""), 1),
        (framed(b"nonsense"), 1),
        (framed(b'{"number": 1}'), 1),
        (framed(b'{"number": "\xff"}'), 1),
        (struct.pack("!I", 1 << 31), 1),
        (framed(first_orders().model_dump_json().encode())[:-1], 0),
        (
            framed(first_orders(sockets={Place(KE, Endpoint(HOST, 1)): ()}).model_dump_json().encode()),
            1,
        ),
        (framed(first_orders(pairs={"a": PemPair("x", "y")}).model_dump_json().encode()), 1),
    ],
)
async def test_a_worker_ends_with_what_it_does_not_understand(octets, status, capfd):
    """Its agent then starts another one: better than one that does something else than the rest."""
    ours, theirs = socket.socketpair()
    reports, unread = socket.socketpair()
    with ours, theirs, reports, unread:
        theirs.setblocking(False)
        ours.sendall(octets)
        ours.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(10):
            assert await _Serving(theirs, reports.fileno()).run() == status
    assert "Traceback" not in capfd.readouterr().err


# Packets


def test_the_engine_in_rust_is_of_our_version():
    """One that is not is left alone: see below."""
    root = Path(__file__).parents[2]
    ours = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    assert tomllib.loads((root / "engine/pyproject.toml").read_text())["project"]["version"] == ours
    assert tomllib.loads((root / "engine/Cargo.toml").read_text())["package"]["version"] == ours
    assert f'VERSION = "{ours}"' in (root / "member_agent/engines/native.py").read_text()


@pytest.mark.parametrize("found", [None, "0.0.0"])
async def test_without_native_packets_of_our_version_there_are_those_in_python(monkeypatch, found):
    """Unless the settings want the others."""
    module = None
    if found is not None:
        module = ModuleType("nts_engine")
        module.__version__ = found
    monkeypatch.setitem(sys.modules, "nts_engine", module)
    monkeypatch.delitem(sys.modules, "member_agent.engines.native", raising=False)
    async with engine(engine={"packets": "auto"}) as built:
        assert built.packets == "python"
    with pytest.raises(AgentError, match="no native packets here") as refused:
        async with engine(engine={"packets": "native"}):
            pass
    assert refused.value.status is ExitStatus.CONFIGURATION
    assert "make setup" in refused.value.remedy


@BOTH
def test_what_answers_is_said(tmp_path, pair, packets):
    metrics = free_port()
    with AgentServer(tmp_path, pair, f"--metrics={HOST}:{metrics}") as server:
        assert scrape(metrics)[f'pool_agent_packets{{engine="{packets}"}}'] == 1
        (line,) = [line for line in server.process.output().splitlines() if "serving" in line]
        assert packets in line


async def stratum(built, pairs, trust):
    """As a client sees it."""
    (name,) = list(pairs)[:1]
    found = await establish(name, HOST, built.endpoints(KE)[0].port, trust)
    return (await exchange(Association(found.result, secrets.token_bytes), HOST, found.ntp_port)).stratum


def threads():
    return len(list(Path("/proc/self/task").iterdir()))


def heard(stratum):
    return Tracking(Daemon.NTPD, boottime_ns(), Leap.NONE, stratum, b"\xff\xfe\0\1", None, 5, 6)


@BOTH
async def test_news_of_the_clock_is_served_at_once(pairs, trust):
    async with engine(service(pairs, HOST)) as built:
        assert await stratum(built, pairs, trust) == 3
        built.clock.hear(heard(7))
        assert await stratum(built, pairs, trust) == 7


@pytest.mark.usefixtures("native_packets")
async def test_an_agent_that_stands_still_vouches_for_no_clock(pairs, trust, monkeypatch):
    monkeypatch.setattr("member_agent.engines.native._CLOCK_GOOD_NS", 1_000_000)
    async with engine(service(pairs, HOST)) as built:
        assert await stratum(built, pairs, trust) == 16
        monkeypatch.setattr("member_agent.engines.native._CLOCK_GOOD_NS", 30_000_000_000)
        tending = asyncio.create_task(built.tend())
        async with asyncio.timeout(10):
            while await stratum(built, pairs, trust) != 3:
                pass
        tending.cancel()


@BOTH
async def test_a_new_key_seals_and_the_old_one_opens(pairs, trust):
    async with engine(service(pairs, HOST), cookie_rotation=60, cookie_history=120) as built:
        port = built.endpoints(KE)[0].port
        found = await establish(ALICE, HOST, port, trust)
        association = Association(found.result, secrets.token_bytes)
        built.keyring = Keyring(
            tuple(replace(key, starts_at=key.starts_at - 61) for key in built.keyring.keys),
            built.keyring.schedule,
        )
        built.rotate_if_due()
        for _ in range(9):
            await exchange(association, HOST, found.ntp_port)
        assert built.counts.opened == {"retired": 8, "sealing": 1}


@pytest.mark.usefixtures("native_packets")
async def test_threads_serve_alike(pairs, trust):
    async with engine(service({ALICE: pairs[ALICE]}, HOST), workers=2) as built:
        await ask_from(SOURCES, built, trust)
        assert built.workers == 2
        assert built.counts.ntp == {"nts-time": len(SOURCES)}
        assert built.counts.opened == {"sealing": len(SOURCES)}
        assert built.counts.sealed == 9 * len(SOURCES)
        await until(lambda: built.ke_requests == len(SOURCES), "clients have gone")
        assert built.requests == len(SOURCES)
        serving = threads()
    assert threads() <= serving - 4, "they end with the engine"


@pytest.mark.usefixtures("native_packets")
async def test_a_thread_that_is_missing_ends_the_agent(pairs):
    async with engine(service(pairs, HOST)) as built:
        built._packets._wanted = 2
        with pytest.raises(AgentError, match="1 are left") as ended:
            await built.tend()
        assert ended.value.status is ExitStatus.ENGINE


@pytest.mark.usefixtures("native_packets")
async def test_threads_that_were_ended_are_told_of_wherever_they_are_asked_for_something(pairs):
    async with engine(service(pairs, HOST)) as built:
        built._packets._engine.close()
        with pytest.raises(AgentError, match="0 are left"):
            await built.apply(service(pairs, OTHER))


@pytest.mark.usefixtures("native_packets")
def test_packets_that_nobody_holds_end_their_threads():
    """Threads that ask where NTP is served hold nothing that holds them."""
    native = pytest.importorskip("member_agent.engines.native")
    before = threads()
    keyring = Keyring.new(int(time.time()), secrets.token_bytes)
    packets = native.NativePackets(AgentSettings(), Clock(), keyring)
    place = Place(KE, Endpoint(HOST, free_port()))
    packets.listen({place: [bind(place.endpoint, place.kind)]})
    assert threads() > before
    del packets
    gc.collect()
    assert threads() == before


@pytest.mark.usefixtures("native_packets")
def test_connections_leave_descriptors_for_threads_and_sockets(monkeypatch):
    native = pytest.importorskip("member_agent.engines.native")
    monkeypatch.setattr("resource.getrlimit", lambda _: (300, 300))
    share = native.limits_of(AgentSettings().limits, 8)["ke_connections"]
    assert 0 < 8 * share <= 300 - 64 - 8 * 8


@BOTH
async def test_a_kind_of_key_that_only_openssl_uses(tmp_path, pairs, trust, packets):
    """Refused before anything is changed."""
    key = Ed448PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ed448")])
    now = datetime.now(UTC)
    leaf = (
        x509.CertificateBuilder(
            name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(1)
        )
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(BOB)]), critical=False)
        .sign(key, None)
    )
    (tmp_path / "key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "chain").write_bytes(leaf.public_bytes(Encoding.PEM))
    pair = load_pair(tmp_path / "chain", tmp_path / "key")
    async with engine(service({ALICE: pairs[ALICE]}, HOST)) as built:
        if packets == "native":
            with pytest.raises(EngineError, match="chain") as refused:
                await built.apply(service({ALICE: pairs[ALICE], BOB: pair}, HOST, OTHER))
            assert refused.value.status is ExitStatus.CERTIFICATE
            assert len(built.endpoints(KE)) == 1
        else:
            await built.apply(service({ALICE: pairs[ALICE], BOB: pair}, HOST))
        assert await certificate(built, ALICE, trust) == serial(pairs[ALICE])


# Caps


def test_each_of_several_processes_has_its_part():
    limits = Limits(ntp_pps=10, ke_per_minute=30, ke_connections=9, ntp_interval=8, ke_interval=2)
    part = limits.of_each(4)
    assert (part.ntp_pps, part.ke_per_minute, part.ke_connections) == (2.5, 7.5, 2)
    assert (part.ntp_interval, part.ke_interval, part.ntp_burst) == (8, 2, 8), "an address has one process"
    assert Limits().of_each(4).ntp_pps is None


def test_above_the_cap_there_are_no_more_kods_than_answers():
    """And an address gets one in half a minute."""
    admission = Admission(secrets.token_bytes, cap=Cap(100), kisses_above=Cap(100))
    addresses = [bytes((10, 0, high, low)) for high in range(4) for low in range(250)]
    verdicts = [admission.judge(address, 0) for address in addresses]
    assert verdicts.count(Verdict.ANSWER) == verdicts.count(Verdict.KISS_RATE) == 20
    assert verdicts.count(Verdict.OVER_CAP) == 960
    kissed = addresses[verdicts.index(Verdict.KISS_RATE)]
    later = [admission.judge(kissed, 1 + step) for step in range(30)]
    assert Verdict.KISS_RATE not in later


def test_without_a_word_for_it_nobody_is_told():
    admission = Admission(secrets.token_bytes, cap=Cap(1))
    assert [admission.judge(b"\x0a\0\0\1", 0) for _ in range(3)] == [
        Verdict.ANSWER,
        Verdict.OVER_CAP,
        Verdict.OVER_CAP,
    ]
