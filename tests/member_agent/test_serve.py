"""`pool-agent serve` and `pool-client query` as people run them, on loopback."""

import asyncio
import json
import os
import secrets
import shutil
import signal
import socket
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from lab.certificates import Authority, Pair
from lab.processes import free_port, wait_until
from lab.programs import AgentServer, alice, run, scrape
from member_agent.config import Limits
from member_agent.engines.serving import PemPair
from member_agent.errors import ExitStatus
from member_agent.ke_server import KeListeners
from member_agent.sockets import Endpoint, bind
from nts_core import records
from nts_core.association import Association
from nts_core.cli import ExitStatus as ClientStatus
from nts_core.client import _key_exchange, establish, exchange
from nts_core.cookies import Keyring
from nts_core.errors import KissOfDeath
from nts_core.ke import KeClient, NtpEndpoint, NtpService
from nts_core.records import ErrorCode, MessageReader, Record, RecordType
from nts_core.tls import ServerCredentials, client_channel
from nts_core.wire import uint16

NAME = "ntp.example"
HOST = "127.0.0.1"
BOTH = pytest.mark.usefixtures("packets")


@pytest.fixture(scope="module")
def shared(tmp_path_factory, pair, packets):
    """One server on both families that vouches for its clock, for tests that do not change it."""
    directory = tmp_path_factory.mktemp("shared")
    metrics = free_port()
    server = AgentServer(
        directory,
        pair,
        "--local-stratum=3",
        f"--metrics={HOST}:{metrics}",
        ke=(f"{HOST}:0", "[::1]:0"),
        ntp=(f"{HOST}:0", "[::1]:0"),
    )
    server.metrics = metrics
    with server:
        yield server
    assert "Traceback" not in server.process.output()


def endpoints(server):
    """The endpoints of the ready line: NTS-KE and NTP as lists of text."""
    (line,) = [line for line in server.process.output().splitlines() if line.startswith("ready ")]
    words = line.split(" ")
    assert len(words) == 3
    return words[1].removeprefix("ke=").split(","), words[2].removeprefix("ntp=").split(",")


def port_of(endpoint):
    return int(endpoint.rpartition(":")[2])


def query(authority, endpoint, *arguments, host=NAME, address=HOST):
    """`pool-client query` with --json; exactly one object must be on standard output."""
    done = run(
        "pool-client",
        "query",
        f"{host}:{port_of(endpoint)}",
        f"--address={address}",
        f"--ca={authority.root}",
        "--json",
        *arguments,
    )
    assert len(done.stdout.splitlines()) == 1, done
    assert "Traceback" not in done.stderr
    return done.status, done.document


# Serving


def test_the_ready_line_tells_every_endpoint(shared):
    ke, ntp = endpoints(shared)
    for found in (ke, ntp):
        assert [text.rpartition(":")[0] for text in found] == [HOST, "[::1]"]
        assert all(0 < port_of(text) < 65536 for text in found)


@pytest.mark.rfc8915("4.1.7-12")
@pytest.mark.parametrize(("index", "address"), [(0, HOST), (1, "::1")])
def test_clients_are_sent_to_the_ntp_port_of_their_address(shared, authority, index, address):
    """Record 7, because the port is not 123; no record 6."""
    ke, ntp = endpoints(shared)
    status, document = query(authority, ke[index], address=address)
    assert status == ClientStatus.OK
    assert document["authenticated"] is True
    assert document["error"] is None
    assert (document["ntp_address"], document["ntp_port"]) == (address, port_of(ntp[index]))
    assert (document["aead"], document["cookies"]) == (30, 8)
    assert (document["stratum"], document["leap"]) == (3, 0)
    assert abs(document["offset_ns"]) < 50_000_000
    assert 0 <= document["delay_ns"] < 100_000_000


def test_a_query_for_people(shared, authority):
    port = shared.ke_port
    done = run("pool-client", "query", f"{NAME}:{port}", f"--address={HOST}", f"--ca={authority.root}")
    assert done.status == ClientStatus.OK
    for word in (NAME, HOST, "authenticated", "offset", "stratum 3"):
        assert word in done.stdout
    assert done.stderr == ""


def test_a_query_by_address(shared, authority):
    """An IP address as the name needs no --address and no SNI."""
    status, document = query(authority, endpoints(shared)[0][0], host=HOST)
    assert (status, document["server"]) == (ClientStatus.OK, HOST)


async def converse(port, trust, request, *, is_last=False):
    """The records that a server answers `request` with; it has to say that it closes.

    `is_last` says close_notify behind the request.
    """
    reader, writer = await asyncio.open_connection(HOST, port)
    channel = client_channel(NAME, trust)
    channel.receive(b"")
    writer.write(channel.to_send())
    plaintext = b""
    async with asyncio.timeout(10):
        while octets := await reader.read(1 << 16):
            was_established = channel.established
            plaintext += channel.receive(octets)
            if channel.established and not was_established:
                if request:
                    channel.send(request)
                if is_last:
                    channel.close()
            writer.write(channel.to_send())
    writer.close()
    assert channel.closed_by_peer
    return list(MessageReader(records.MAX_RESPONSE).receive(plaintext))


REQUEST = KeClient(lambda _context, length: bytes(length)).request()


@pytest.mark.rfc8915("4-2", "4-3")
async def test_a_server_sends_one_answer_and_close_notify(shared, trust):
    answer = await converse(shared.ke_port, trust, REQUEST)
    assert [record.type for record in answer].count(RecordType.NEW_COOKIE) == 8


@pytest.mark.rfc8915("4.1.3-7")
@pytest.mark.parametrize("length", [0, 1, len(REQUEST) // 2, len(REQUEST) - 1])
async def test_a_request_that_ends_too_early_is_a_bad_request(shared, trust, length):
    answer = await converse(shared.ke_port, trust, REQUEST[:length], is_last=True)
    assert answer == [Record(RecordType.ERROR, uint16(ErrorCode.BAD_REQUEST), critical=True)]


@pytest.mark.rfc8915("4.1.3-9")
async def test_a_fault_of_our_own_is_error_2(pair, trust):
    """Here the keys of cookies fail; the client is told, and nothing is left behind."""

    class Broken(Keyring):
        def seal_many(self, keys, nonces):
            raise RuntimeError("broken on purpose")

    keyring = Broken.load(Keyring.new(0, secrets.token_bytes).dump())
    credentials = PemPair(pair.cert.read_text(), pair.key.read_text()).credentials()
    listeners = KeListeners(credentials, keyring, Limits())
    listeners.listen(bind(Endpoint(HOST, 0), socket.SOCK_STREAM), lambda _local, _names: NtpService())
    answer = await converse(listeners.endpoints[0].port, trust, REQUEST)
    await listeners.close()
    assert answer == [Record(RecordType.ERROR, uint16(ErrorCode.INTERNAL_SERVER_ERROR), critical=True)]
    assert listeners.counters == {"internal-error": 1}
    assert listeners.slots.taken == 0


@BOTH
@pytest.mark.rfc8915("4.1.7-1", "4.1.7-2", "4.1.7-3")
@pytest.mark.parametrize(("address", "other"), [("::1", HOST), (HOST, "::1")])
async def test_ntp_on_another_address_is_told_by_record_6(tmp_path, pair, trust, address, other):
    with AgentServer(
        tmp_path, pair, ke=(str(Endpoint(address, 0)),), ntp=(str(Endpoint(other, 0)),)
    ) as server:
        found = await establish(NAME, address, server.ke_port, trust)
    assert found.result.endpoint == NtpEndpoint(other, server.ntp_port)


@BOTH
@pytest.mark.rfc8915("4.1.7-12")
async def test_ntp_in_the_other_family_only_is_told_by_name(tmp_path, pair, trust):
    """An address of its own a wildcard cannot tell; the certificate's name leads to either family."""
    with AgentServer(tmp_path, pair, ke=("[::1]:0",), ntp=("0.0.0.0:0",)) as server:
        found = await establish(NAME, "::1", server.ke_port, trust)
    assert found.result.endpoint == NtpEndpoint(NAME, server.ntp_port)


@BOTH
async def test_wildcards_answer_from_the_address_that_was_asked(tmp_path, pair, trust):
    wild = ("0.0.0.0:0", "[::]:0")
    with AgentServer(tmp_path, pair, "--local-stratum=1", ke=wild, ntp=wild) as server:
        ke, _ = endpoints(server)
        for endpoint, address in ((ke[0], "127.0.0.9"), (ke[0], HOST), (ke[1], "::1")):
            found = await establish(NAME, address, port_of(endpoint), trust)
            assert found.ntp_host == address
            sample = await exchange(Association(found.result, secrets.token_bytes), address, found.ntp_port)
            assert sample.stratum == 1


@BOTH
def test_without_a_word_for_the_clock_the_server_is_not_synchronised(tmp_path, authority, pair):
    with AgentServer(tmp_path, pair) as server:
        status, document = query(authority, endpoints(server)[0][0])
        log = server.process.output()
    assert status == ClientStatus.NO_TIME
    assert document["authenticated"] is True
    assert (document["leap"], document["stratum"]) == (3, 16)
    assert document["error"]["code"] == "unsynchronised"
    assert document["error"]["message"]
    assert document["error"]["remedy"]
    assert "nobody vouches" in log


@BOTH
@pytest.mark.parametrize("offset", ["0.25", "-3600"])
def test_a_test_offset_is_served_and_shown(tmp_path, authority, pair, offset):
    with AgentServer(tmp_path, pair, "--local-stratum=2", f"--clock-offset={offset}") as server:
        _, document = query(authority, endpoints(server)[0][0])
        log = server.process.output()
    assert abs(document["offset_ns"] - float(offset) * 1e9) < 50_000_000
    assert document["delay_ns"] < 100_000_000
    assert f"TEST OFFSET of {float(offset):+g} s" in log


def test_status_shows_the_test_offset(tmp_path):
    alice(tmp_path)
    (tmp_path / "agent.toml").write_text("clock_offset = 0.25\nlocal_stratum = 2\n")
    done = run("pool-agent", "status", f"--state={tmp_path}")
    assert done.status == ExitStatus.OK
    assert "TEST OFFSET of +0.25 s" in done.stdout
    assert "alice.servers.pool.example" in done.stdout
    assert "TOKEN" not in done.stdout + done.stderr


def test_status_with_a_bad_setting_names_it(tmp_path):
    alice(tmp_path)
    (tmp_path / "agent.toml").write_text("colour = 1\n")
    done = run("pool-agent", "status", f"--state={tmp_path}")
    assert done.status == ExitStatus.CONFIGURATION
    assert "colour" in done.stderr
    assert "Traceback" not in done.stderr


# Signals


@BOTH
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_with_0(tmp_path, pair, number):
    with AgentServer(tmp_path, pair) as server, socket.create_connection((HOST, server.ke_port)):
        server.process.signal(number)
        assert server.process.wait() == 0
        assert "Traceback" not in server.process.output()


@pytest.fixture
def reloadable(tmp_path, pair, packets):
    """A server with certificate files of its own and metrics."""
    mine = Pair(tmp_path / "cert.pem", tmp_path / "key.pem")
    install(pair, mine)
    metrics = free_port()
    server = AgentServer(tmp_path / "server", mine, f"--metrics={HOST}:{metrics}")
    server.metrics = metrics
    server.pair = mine
    with server:
        yield server


def install(source, target):
    shutil.copy(source.cert, target.cert)
    shutil.copy(source.key, target.key)


def serial(pair):
    return x509.load_pem_x509_certificates(pair.cert.read_bytes())[0].serial_number


async def shown(server, trust):
    """The serial number of the certificate that the server shows now."""
    return (await establish(NAME, HOST, server.ke_port, trust)).chain[0].serial_number


def reload(server):
    """SIGHUP, and wait for what the log says of it."""
    before = server.process.output().count("reloaded")
    server.process.signal(signal.SIGHUP)
    wait_until(lambda: server.process.output().count("reloaded") > before, "the reload is logged")


async def test_sighup_swaps_the_certificate_and_spares_open_connections(reloadable, authority, pair, trust):
    reader, writer = await asyncio.open_connection(HOST, reloadable.ke_port)
    wait_until(
        lambda: scrape(reloadable.metrics)["pool_agent_ke_connections"] == 1, "the connection is accepted"
    )
    fresh = authority.issue(NAME, file="fresh")
    install(fresh, reloadable.pair)
    reload(reloadable)
    assert await shown(reloadable, trust) == serial(fresh)
    channel = client_channel(NAME, trust)
    result, _ = await _key_exchange(channel, reader, writer)
    assert channel.peer_chain[0].serial_number == serial(pair)
    assert len(result.cookies) == 8
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("damage", ["no file", "nonsense", "another key"])
async def test_sighup_with_bad_files_keeps_the_old_certificate(reloadable, authority, pair, trust, damage):
    if damage == "no file":
        reloadable.pair.cert.unlink()
    elif damage == "nonsense":
        reloadable.pair.cert.write_text("nonsense")
    else:
        shutil.copy(authority.issue(NAME, file="another").key, reloadable.pair.key)
    reload(reloadable)
    assert "certificate_not_reloaded" in reloadable.process.output()
    assert await shown(reloadable, trust) == serial(pair)
    fresh = authority.issue(NAME, file="mended")
    install(fresh, reloadable.pair)
    reload(reloadable)
    assert await shown(reloadable, trust) == serial(fresh)


# What it does not start with


def start_fails(status, *arguments):
    done = run("pool-agent", "serve", *arguments, deadline=20)
    assert done.status == status, done
    assert "ready" not in done.stdout
    assert "Traceback" not in done.stderr
    assert done.stderr
    return done.stderr


def files(pair):
    return (f"--cert={pair.cert}", f"--key={pair.key}", f"--ke={HOST}:0", f"--ntp={HOST}:0")


def test_certificate_and_key_that_do_not_match(authority, pair):
    other = authority.issue(NAME, file="unmatched")
    start_fails(ExitStatus.CERTIFICATE, *files(Pair(pair.cert, other.key)))


def test_files_that_cannot_be_read(tmp_path, pair):
    assert "none.pem" in start_fails(ExitStatus.CERTIFICATE, *files(Pair(tmp_path / "none.pem", pair.key)))
    assert "none.key" in start_fails(ExitStatus.CERTIFICATE, *files(Pair(pair.cert, tmp_path / "none.key")))


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff\xfe", b"-----BEGIN CERTIFICATE-----\nAA\n"])
def test_files_that_hold_something_else(tmp_path, pair, content):
    bad = tmp_path / "bad"
    bad.write_bytes(content)
    start_fails(ExitStatus.CERTIFICATE, *files(Pair(bad, pair.key)))
    start_fails(ExitStatus.CERTIFICATE, *files(Pair(pair.cert, bad)))


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_port_that_is_taken(pair, kind):
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind((HOST, 0))
        if kind is socket.SOCK_STREAM:
            taken.listen()
        option = "--ke" if kind is socket.SOCK_STREAM else "--ntp"
        port = taken.getsockname()[1]
        said = start_fails(ExitStatus.CONFIGURATION, *files(pair), f"{option}={HOST}:{port}")
    assert f"{HOST}:{port}" in said
    assert "another program" in said


def test_an_address_that_is_not_ours(pair):
    assert "192.0.2.1" in start_fails(ExitStatus.CONFIGURATION, *files(pair), "--ke=192.0.2.1:0")


def test_a_port_of_thousands_of_digits(pair):
    assert "port" in start_fails(ExitStatus.CONFIGURATION, *files(pair), f"--ke={HOST}:{'9' * 5000}")


@pytest.mark.parametrize(
    "text",
    ["", "4460", "localhost:1", f"{HOST}", f"{HOST}:65536", f"{HOST}:x", "::1:1", "[::1]", "[127.0.0.1]:1"],
)
def test_endpoints_that_make_no_sense(pair, text):
    said = start_fails(ExitStatus.CONFIGURATION, *files(pair), f"--ntp={text}")
    assert "--ntp" in said


def test_options_out_of_range(pair):
    for option in ("--local-stratum=0", "--local-stratum=16", "--clock-offset=x", "--colour"):
        start_fails(ExitStatus.USAGE, *files(pair), option)


# State


@BOTH
def test_a_state_directory_in_use(tmp_path, pair):
    with AgentServer(tmp_path / "log", pair, f"--state={tmp_path}/state"):
        said = start_fails(ExitStatus.LOCKED, *files(pair), f"--state={tmp_path}/state")
    assert "another pool-agent" in said


def test_damaged_cookie_keys_are_refused_and_not_overwritten(tmp_path, pair):
    path = tmp_path / "cookie-keys.json"
    path.write_bytes(b'{"version": 1, "keys": [')
    assert "cookie-keys.json" in start_fails(ExitStatus.STATE, *files(pair), f"--state={tmp_path}")
    assert path.read_bytes() == b'{"version": 1, "keys": ['


async def session(server, trust):
    found = await establish(NAME, HOST, server.ke_port, trust)
    return Association(found.result, secrets.token_bytes)


def restarted(tmp_path, pair, ntp_port, *arguments):
    """A server on the NTP port of an earlier one, with a log of its own."""
    directory = tmp_path / f"log-{secrets.token_hex(4)}"
    return AgentServer(directory, pair, "--local-stratum=1", *arguments, ntp=(f"{HOST}:{ntp_port}",))


@pytest.mark.rfc8915("6-4", "6-6")
async def test_cookies_outlive_a_restart_with_state(tmp_path, pair, trust):
    """And a rotation that was due meanwhile: the key of the day before still opens."""
    port = free_port()
    state = tmp_path / "state"
    with restarted(tmp_path, pair, port, f"--state={state}") as server:
        association = await session(server, trust)
        await exchange(association, HOST, port)
    keys = json.loads((state / "cookie-keys.json").read_text())
    with restarted(tmp_path, pair, port, f"--state={state}"):
        assert (await exchange(association, HOST, port)).synchronised
    assert json.loads((state / "cookie-keys.json").read_text()) == keys
    for key in keys["keys"]:
        key["starts_at"] -= 2 * 86400
    (state / "cookie-keys.json").write_text(json.dumps(keys))
    with restarted(tmp_path, pair, port, f"--state={state}"):
        assert (await exchange(association, HOST, port)).synchronised
    rotated = json.loads((state / "cookie-keys.json").read_text())
    following, sealing, retired = rotated["keys"]
    assert retired == keys["keys"][1]
    assert sealing["secret"] == keys["keys"][0]["secret"], "the key made ahead is the one that seals"
    assert abs(sealing["starts_at"] - time.time()) < 60
    assert following["starts_at"] == sealing["starts_at"] + 86400


@pytest.mark.rfc8915("6-2")
async def test_cookies_die_with_a_server_without_state(tmp_path, pair, trust):
    port = free_port()
    with restarted(tmp_path, pair, port) as server:
        association = await session(server, trust)
        await exchange(association, HOST, port)
    with restarted(tmp_path, pair, port), pytest.raises(KissOfDeath) as caught:
        await exchange(association, HOST, port, timeout=0.5)
    assert (caught.value.code, caught.value.authentic) == ("NTSN", False)


@pytest.mark.rfc8915("8.2-1")
async def test_cookies_die_with_a_key_file_that_was_taken_away(tmp_path, pair, trust):
    """What an operator does whose cookie keys were stolen; key establishment then gives new cookies."""
    port = free_port()
    state = tmp_path / "state"
    with restarted(tmp_path, pair, port, f"--state={state}") as server:
        association = await session(server, trust)
        await exchange(association, HOST, port)
    (state / "cookie-keys.json").unlink()
    with restarted(tmp_path, pair, port, f"--state={state}") as server:
        with pytest.raises(KissOfDeath) as caught:
            await exchange(association, HOST, port, timeout=0.5)
        assert caught.value.code == "NTSN"
        assert (await exchange(await session(server, trust), HOST, port)).synchronised


@BOTH
@pytest.mark.rfc8915("6-2")
def test_the_cookie_keys_are_private(tmp_path, pair):
    with AgentServer(tmp_path / "log", pair, f"--state={tmp_path}/state"):
        path = tmp_path / "state" / "cookie-keys.json"
        secret = json.loads(path.read_text())["keys"][0]["secret"]
        assert path.stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    logged = "".join(file.read_text() for file in (tmp_path / "log").iterdir())
    assert secret not in logged


# Bad company


async def test_a_client_that_closes_its_direction_with_the_request_is_served(shared, trust):
    """RFC 8915 section 4: close_notify may follow the request at once."""
    reader, writer = await asyncio.open_connection(HOST, shared.ke_port)
    channel = client_channel(NAME, trust)
    client = KeClient(channel.export)
    result = None
    octets = b""
    async with asyncio.timeout(5):
        while result is None:
            was_established = channel.established
            plaintext = channel.receive(octets)
            result = client.receive(plaintext) if plaintext else None
            if channel.established and not was_established:
                channel.send(client.request())
                channel.close()
            writer.write(channel.to_send())
            octets = await reader.read(1 << 16) if result is None else b""
    assert len(result.cookies) == 8
    writer.close()


GARBAGE = [
    b"",
    b"\0",
    b"GET / HTTP/1.1\r\n\r\n",
    bytes(100),
    b"\x16\x03\x01\x02\0" + bytes(512),
    os.urandom(3000),
]


def datagrams_seen(server):
    found = scrape(server.metrics)
    return sum(value for name, value in found.items() if name.startswith("pool_agent_ntp_total"))


def test_garbage_on_both_ports(shared, authority):
    before = datagrams_seen(shared)
    for octets in GARBAGE:
        with socket.create_connection((HOST, shared.ke_port), timeout=2) as tcp:
            tcp.sendall(octets)
    datagrams = [*GARBAGE[:5], *(os.urandom(length) for length in range(0, 1400, 25))]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        for octets in datagrams:
            udp.sendto(octets, (HOST, shared.ntp_port))
    wait_until(lambda: datagrams_seen(shared) == before + len(datagrams), "the garbage was counted")
    status, _ = query(authority, endpoints(shared)[0][0], "--samples=1")
    assert status == ClientStatus.OK
    assert "Traceback" not in shared.process.output()


# Clients in trouble


def fails(outcome, status, code):
    found, document = outcome
    assert found == status
    assert document["authenticated"] is False
    assert document["error"]["code"] == code
    assert document["error"]["message"]
    assert document["error"]["remedy"]


def test_a_query_with_the_wrong_name(shared, authority):
    ke = endpoints(shared)[0][0]
    fails(query(authority, ke, host="other.example"), ClientStatus.NOT_ESTABLISHED, "certificate")


def test_a_query_with_the_wrong_roots(shared, tmp_path):
    stranger = Authority(tmp_path)
    ke = endpoints(shared)[0][0]
    fails(query(stranger, ke), ClientStatus.NOT_ESTABLISHED, "certificate")


def test_a_query_to_a_port_that_does_not_speak_tls(shared, authority):
    """The metrics port speaks HTTP."""
    outcome = query(authority, f"{HOST}:{shared.metrics}")
    fails(outcome, ClientStatus.NOT_ESTABLISHED, "tls")


async def test_a_query_to_a_server_whose_ntp_port_is_silent(authority, pair):
    key = load_pem_private_key(pair.key.read_bytes(), None)
    credentials = ServerCredentials(x509.load_pem_x509_certificates(pair.cert.read_bytes()), key)
    listeners = KeListeners(credentials, Keyring.new(0, secrets.token_bytes), Limits())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind((HOST, 0))
        service = NtpService(NtpEndpoint(None, silent.getsockname()[1]))
        listeners.listen(bind(Endpoint(HOST, 0), socket.SOCK_STREAM), lambda _local, _names: service)
        outcome = await asyncio.to_thread(query, authority, str(listeners.endpoints[0]), "--samples=1")
        await listeners.close()
    fails(outcome, ClientStatus.NO_TIME, "ntp")
