"""What one peer may take of a running `pool-agent serve`, and what hostile peers cost: slots, tokens, and no more."""

import asyncio
import contextlib
import itertools
import os
import resource
import secrets
import select
import socket
import struct
import time
from collections import Counter
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from bench import hostile
from lab.processes import free_port, wait_until
from lab.programs import AgentServer, run, scrape
from member_agent.config import Limits, load_settings
from member_agent.errors import AgentError, ExitStatus
from member_agent.ke_server import MAX_RECEIVED, RESERVED_DESCRIPTORS, KeListeners, connections
from member_agent.ntp_server import Meter, requests
from member_agent.sockets import Endpoint, bind
from nts_core import records
from nts_core.association import Association
from nts_core.client import establish
from nts_core.cookies import Keyring
from nts_core.errors import KissOfDeath
from nts_core.ke import KeClient, NtpEndpoint, NtpService
from nts_core.packet import Header, Leap, Mode
from nts_core.records import MessageReader, Record, RecordType
from nts_core.tls import ServerCredentials, client_channel

NAME = "ntp.example"
HOST = "127.0.0.1"
BOTH = pytest.mark.usefixtures("packets")
LIMITS = Limits()
ERROR_1 = (Record(RecordType.ERROR, b"\0\1", critical=True),)
# Longer than any deadline of the server.
PATIENCE = 10.0


@contextlib.contextmanager
def serving(tmp_path, pair, *arguments, toml="", wrapper=()):
    """A server with metrics, with an agent.toml, and with nothing bad in its log at the end."""
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    (state / "agent.toml").write_text(toml)
    metrics = free_port()
    server = AgentServer(
        tmp_path / "server",
        pair,
        "--local-stratum=3",
        f"--metrics={HOST}:{metrics}",
        f"--state={state}",
        *arguments,
        ke=(f"{HOST}:0", "[::1]:0"),
        ntp=(f"{HOST}:0", "[::1]:0"),
    )
    server.process.argv[:0] = wrapper
    server.metrics = metrics
    with server:
        yield server
        log = server.process.output()
        assert "Traceback" not in log
        assert len(log.splitlines()) < 20, "peers can fill the log"
        assert server.process.running()


@pytest.fixture(scope="module")
def shared(tmp_path_factory, pair, packets):
    """One server with the limits that hold by default."""
    with serving(tmp_path_factory.mktemp("shared"), pair) as server:
        yield server


@pytest.fixture(scope="module")
def _many_descriptors():
    """Room for a few thousand sockets, here and in the servers that are started."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4 * LIMITS.ke_connections, hard)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def sources():
    """Addresses of this host, none twice."""
    return (f"127.{a}.{b}.{c}" for a, b, c in itertools.product(range(1, 99), range(99), range(1, 99)))


def connect(port, source=HOST, host=HOST):
    return socket.create_connection((host, port), timeout=PATIENCE, source_address=(source, 0))


def is_cut_off(sock):
    """Whether the server closes the connection; it sends nothing before the client does."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def refused(port, source=HOST, host=HOST):
    """Whether a connection is reset at once, which may be before connect() has returned."""
    try:
        with connect(port, source, host) as sock:
            return is_cut_off(sock)
    except ConnectionResetError:
        return True


def ke_count(server, outcome):
    return scrape(server.metrics).get(f'pool_agent_ke_total{{outcome="{outcome}"}}', 0)


def ntp_count(server, outcome):
    return scrape(server.metrics).get(f'pool_agent_ntp_total{{outcome="{outcome}"}}', 0)


def slots_taken(server):
    return scrape(server.metrics)["pool_agent_ke_connections"]


def descriptors(pid):
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def is_served(server, trust):
    """Whether an honest client gets its cookies, within the deadline of clients."""
    return len((await establish(NAME, HOST, server.ke_port, trust)).result.cookies) == 8


class Peer:
    """A client that goes as far as it is told to, with a blocking socket."""

    def __init__(self, port, trust, source=HOST, *, receive_buffer=None):
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.socket.settimeout(PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer is not None:
            # Before connecting: the window that is offered follows from it.
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.bind((source, 0))
        self.socket.connect((HOST, port))
        self.channel = client_channel(NAME, trust)
        self.client = KeClient(self.channel.export)

    def hello(self):
        self.channel.receive(b"")
        return self.channel.to_send()

    def finish_handshake(self):
        """Read until the handshake is done; what is to be sent for that."""
        while not self.channel.established:
            octets = self.socket.recv(1 << 16)
            assert octets, "cut off in the handshake"
            assert self.channel.receive(octets) == b""
        return self.channel.to_send()

    def handshake(self):
        self.socket.sendall(self.hello())
        self.socket.sendall(self.finish_handshake())
        return self

    def seal(self, plaintext):
        self.channel.send(plaintext)
        return self.channel.to_send()

    def ask(self):
        self.socket.sendall(self.seal(self.client.request()))
        return self

    def answer(self):
        """All that the server says until it says that it closes."""
        plaintext = b""
        while not self.channel.closed_by_peer:
            octets = self.socket.recv(1 << 16)
            assert octets, "closed without close_notify"
            plaintext += self.channel.receive(octets)
        return plaintext

    def reset(self):
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def parse(plaintext):
    return MessageReader(records.MAX_RESPONSE).receive(plaintext)


def drip(sock, octets):
    """Send one octet whenever there was nothing to hear for a moment, until all is sent or the peer speaks."""
    for octet in octets:
        if select.select([sock], [], [], 0.02)[0]:
            return False
        sock.sendall(bytes([octet]))
    return True


# Slots


@BOTH
@pytest.mark.usefixtures("_many_descriptors")
async def test_hundreds_of_idle_peers_do_not_stop_a_client(tmp_path, pair, trust):
    """Also from the client's own address, as long as that has a slot left."""
    with serving(tmp_path, pair) as server, contextlib.ExitStack() as idle:
        for source in [HOST] * 120 + [source for source in itertools.islice(sources(), 8) for _ in range(40)]:
            idle.enter_context(connect(server.ke_port, source))
        wait_until(lambda: slots_taken(server) > 400, "hundreds are connected")
        assert await is_served(server, trust)


@BOTH
@pytest.mark.usefixtures("_many_descriptors")
async def test_the_cap_holds_and_slots_come_free_again(tmp_path, pair, trust):
    with serving(tmp_path, pair) as server:
        with contextlib.ExitStack() as idle:
            for source in itertools.islice(sources(), LIMITS.ke_connections):
                idle.enter_context(connect(server.ke_port, source))
            wait_until(lambda: slots_taken(server) == LIMITS.ke_connections, "the server is full")
            assert refused(server.ke_port)
            assert ke_count(server, "too-many-connections") == 1
        wait_until(lambda: slots_taken(server) == 0, "the slots are free again")
        assert await is_served(server, trust)


@BOTH
async def test_an_address_has_a_cap_and_leaves_room_for_others(tmp_path, pair, trust):
    toml = "[limits]\nke_connections_per_address = 5\n"
    with serving(tmp_path, pair, toml=toml) as server, contextlib.ExitStack() as idle:
        for source in ["127.0.0.2"] * 5:
            idle.enter_context(connect(server.ke_port, source))
        wait_until(lambda: slots_taken(server) == 5, "all are connected")
        assert refused(server.ke_port, "127.0.0.2")
        assert ke_count(server, "too-many-of-address") == 1
        assert await is_served(server, trust)


@BOTH
async def test_ipv6_counts_as_well(tmp_path, pair, trust):
    toml = "[limits]\nke_connections_per_48 = 1\n"
    with serving(tmp_path, pair, toml=toml) as server:
        words = server.process.output().split()
        port = int(next(word for word in words if word.startswith("ke=")).rpartition(":")[2])
        with connect(port, "::1", "::1"):
            wait_until(lambda: slots_taken(server) == 1, "it is connected")
            assert refused(port, "::1", "::1")
        assert ke_count(server, "too-many-of-prefix") == 1
        assert await is_served(server, trust), "IPv4 counts by itself"


def test_a_bench_on_one_address_fits(shared, trust):
    """A hundred clients at a time, each served."""
    peers = [Peer(shared.ke_port, trust).handshake() for _ in range(100)]
    for peer in peers:
        peer.ask()
    for peer in peers:
        assert len(peer.client.receive(peer.answer()).cookies) == 8
        peer.socket.close()


@BOTH
async def test_the_rate_of_connections_can_be_limited(tmp_path, pair, trust):
    toml = "[limits]\nke_interval = 4096\nke_burst = 2\n"
    with serving(tmp_path, pair, toml=toml) as server:
        for _ in range(2):
            Peer(server.ke_port, trust, "127.0.0.2").handshake().reset()
        assert refused(server.ke_port, "127.0.0.2")
        assert ke_count(server, "rate-limited") == 1
        assert await is_served(server, trust)


# Descriptors


def plain_answer(port, source=HOST, host=HOST, patience=PATIENCE):
    """The answer to one plain request, None when there is none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as udp:
        udp.settimeout(patience)
        udp.bind((source, 0))
        request = Header(transmit=secrets.randbits(64)).encode()
        udp.sendto(request, (host, port))
        try:
            answer = udp.recv(2048)
        except TimeoutError:
            return None
        assert len(answer) <= len(request)
        header = Header.decode(answer)
        assert (header.mode, header.origin) == (Mode.SERVER, Header.decode(request).transmit)
        return header


@BOTH
async def test_no_descriptor_is_left(tmp_path, pair, trust):
    """The limit falls below the cap while the server runs: accept() fails, NTP goes on, all comes back."""
    with serving(tmp_path, pair) as server:
        assert await is_served(server, trust)
        wait_until(lambda: slots_taken(server) == 0, "the slot is free again")
        _, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
        room = 6
        limit = descriptors(server.process.pid) + room
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (limit, hard))
        with contextlib.ExitStack() as idle:
            for source in itertools.islice(sources(), 60):
                idle.enter_context(connect(server.ke_port, source))
            wait_until(lambda: descriptors(server.process.pid) >= limit, "descriptors are used up")
            for _ in range(300):
                assert plain_answer(server.ntp_port).stratum == 3
        assert await is_served(server, trust)
        assert ke_count(server, "no-descriptor") > 0
        wait_until(lambda: slots_taken(server) == 0, "the slots are free again")
        assert (
            descriptors(server.process.pid)
            <= resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)[0] - room + 2
        )


@BOTH
async def test_a_host_with_few_descriptors_has_fewer_connections(tmp_path, pair, trust, packets):
    """From the start: the rest of the agent keeps what it needs, so nothing fails for want of a descriptor."""
    # A thread of the native engine has some of its own.
    allowed = RESERVED_DESCRIPTORS + 10 + (16 if packets == "native" else 0)
    wrapper = ["/usr/bin/prlimit", f"--nofile={allowed}:{allowed}"]
    with serving(tmp_path, pair, wrapper=wrapper) as server:
        with contextlib.ExitStack() as idle:
            for source in itertools.islice(sources(), 10):
                idle.enter_context(connect(server.ke_port, source))
            wait_until(lambda: slots_taken(server) == 10, "the server is full")
            assert refused(server.ke_port, "127.0.0.2")
            assert plain_answer(server.ntp_port).stratum == 3
        wait_until(lambda: slots_taken(server) == 0, "the slots are free again")
        assert await is_served(server, trust)
        assert (ke_count(server, "too-many-connections"), ke_count(server, "no-descriptor")) == (1, 0)


# Slow peers


def silent(server, _trust):
    with connect(server.ke_port, "127.0.1.1") as sock:
        assert is_cut_off(sock)
    return "tls-timeout"


def drips_its_hello(server, trust):
    """An endless one: the length of the record promises more than will ever come."""
    peer = Peer(server.ke_port, trust, "127.0.1.2")
    with peer.socket:
        assert not drip(peer.socket, b"\x16\x03\x01\x3f\xff\x01\x00\x3f\xf0" + bytes(4000))
        assert is_cut_off(peer.socket)
    return "tls-timeout"


def says_half_of_its_request(server, trust):
    peer = Peer(server.ke_port, trust, "127.0.1.3").handshake()
    with peer.socket:
        peer.socket.sendall(peer.seal(peer.client.request()[:-1]))
        assert parse(peer.answer()) == ERROR_1
    return "timeout"


def drips_records_without_end(server, trust):
    """Whole TLS records, one octet of the request in each."""
    peer = Peer(server.ke_port, trust, "127.0.1.4").handshake()
    skipped = Record(0x4000, bytes(4000))
    with peer.socket:
        for octet in peer.client.request()[:-4] + skipped.encode():
            if select.select([peer.socket], [], [], 0.02)[0]:
                break
            peer.socket.sendall(peer.seal(bytes([octet])))
        assert parse(peer.answer()) == ERROR_1
    return "timeout"


@pytest.mark.rfc8915("4.1.3-7")
async def test_slow_peers_get_the_deadline_and_no_more(shared, trust):
    """Silence before TLS is cut off; a request that never ends gets Error 1 (RFC 8915 section 4.1.3)."""
    slow = (silent, drips_its_hello, says_half_of_its_request, drips_records_without_end)
    before = {outcome: ke_count(shared, outcome) for outcome in ("tls-timeout", "timeout")}
    under_way = asyncio.gather(*(asyncio.to_thread(peer, shared, trust) for peer in slow))
    assert await is_served(shared, trust)
    ended = await under_way
    for outcome, count in before.items():
        assert ke_count(shared, outcome) == count + ended.count(outcome)
    wait_until(lambda: slots_taken(shared) == 0, "the slots are free again")


def test_octets_and_records_may_come_one_by_one(shared, trust):
    """Slow is no fault by itself."""
    peer = Peer(shared.ke_port, trust)
    with peer.socket:
        for octet in peer.hello():
            peer.socket.sendall(bytes([octet]))
        for octet in peer.finish_handshake():
            peer.socket.sendall(bytes([octet]))
        for octet in peer.client.request():
            for part in peer.seal(bytes([octet])):
                peer.socket.sendall(bytes([part]))
        assert len(peer.client.receive(peer.answer()).cookies) == 8


# Peers that do not listen


@BOTH
def test_a_peer_that_never_reads_costs_a_slot_for_a_while(tmp_path, pair, trust):
    """Neither its slot nor its descriptor outlives the deadline. Half of the peers read until they have asked."""
    with serving(tmp_path, pair) as server:
        assert slots_taken(server) == 0
        before = descriptors(server.process.pid)
        deaf = []
        for step in range(20):
            if step % 2:
                peer = Peer(server.ke_port, trust).handshake().ask()
            else:
                peer = Peer(server.ke_port, trust, receive_buffer=1)
                peer.socket.sendall(peer.hello())
            deaf.append(peer)
        wait_until(lambda: ke_count(server, "ok") + ke_count(server, "tls-timeout") == 20, "all were heard")
        wait_until(lambda: slots_taken(server) == 0, "the slots are free again")
        wait_until(lambda: descriptors(server.process.pid) <= before, "the descriptors are free again")
        assert ke_count(server, "ok") == 10
        for peer in deaf:
            peer.socket.close()


async def test_what_cannot_be_sent_is_thrown_away_at_the_deadline(authority, trust):
    """A certificate that is too long for the kernel's buffers, and a peer that never reads: asyncio's own close
    would keep both for as long as the peer likes.
    """
    long = authority.issue(NAME, *(f"{number:050}.example" for number in range(1200)), file="long")
    key = load_pem_private_key(long.key.read_bytes(), None)
    credentials = ServerCredentials(x509.load_pem_x509_certificates(long.cert.read_bytes()), key)
    listeners = KeListeners(credentials, Keyring.new(0, secrets.token_bytes), LIMITS)
    bound = bind(Endpoint(HOST, 0), socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    listeners.listen(bound, lambda _local, _names: NtpService(NtpEndpoint()))
    peer = Peer(listeners.endpoints[0].port, trust, receive_buffer=1)
    with peer.socket:
        before = descriptors("self")
        peer.socket.sendall(peer.hello())
        await asyncio.to_thread(wait_until, lambda: listeners.counters, "the deadline has passed")
        await asyncio.to_thread(
            wait_until, lambda: descriptors("self") <= before, "the descriptor is free again"
        )
    assert listeners.slots.taken == 0
    assert listeners.counters == {"tls-timeout": 1}
    await listeners.close()


def test_a_peer_that_talks_on_and_on_is_cut_off(shared):
    """A ClientHello that OpenSSL would collect up to 128 KiB of."""
    before = ke_count(shared, "too-long")
    hello = b"\x01\x01\xff\xff" + bytes(MAX_RECEIVED + 1)
    chunks = (hello[start : start + 0x4000] for start in range(0, len(hello), 0x4000))
    with connect(shared.ke_port) as sock, contextlib.suppress(ConnectionError):
        for chunk in chunks:
            sock.sendall(b"\x16\x03\x01" + len(chunk).to_bytes(2, "big") + chunk)
        assert is_cut_off(sock)
    wait_until(lambda: ke_count(shared, "too-long") == before + 1, "it was counted")


def test_a_flood_after_the_request_changes_nothing(shared, trust):
    peer = Peer(shared.ke_port, trust).handshake().ask()
    with peer.socket:
        result = peer.client.receive(peer.answer())
        with contextlib.suppress(ConnectionError):
            while True:
                peer.socket.sendall(os.urandom(1 << 16))
    assert len(result.cookies) == 8
    wait_until(lambda: slots_taken(shared) == 0, "the slot is free again")


# Peers that go away


def after_connecting(peer):
    del peer


def in_its_hello(peer):
    peer.socket.sendall(peer.hello()[:100])


def after_its_hello(peer):
    peer.socket.sendall(peer.hello())


def after_the_servers_flight(peer):
    peer.socket.sendall(peer.hello())
    peer.finish_handshake()


def after_the_handshake(peer):
    peer.handshake()


def in_its_request(peer):
    peer.handshake()
    peer.socket.sendall(peer.seal(peer.client.request()[:5]))


def with_its_request_under_way(peer):
    peer.handshake().ask()


def with_the_answer_half_read(peer):
    peer.handshake().ask()
    assert peer.socket.recv(100)


STAGES = (
    after_connecting,
    in_its_hello,
    after_its_hello,
    after_the_servers_flight,
    after_the_handshake,
    in_its_request,
    with_its_request_under_way,
    with_the_answer_half_read,
)


@pytest.mark.parametrize("stage", STAGES, ids=[stage.__name__ for stage in STAGES])
async def test_resets_at_each_stage(shared, trust, stage):
    for _ in range(10):
        peer = Peer(shared.ke_port, trust)
        stage(peer)
        peer.reset()
    wait_until(lambda: slots_taken(shared) == 0, "the slots are free again")
    assert await is_served(shared, trust)


# All of them at once


@BOTH
async def test_a_crowd_of_hostile_clients_leaves_nothing_behind(tmp_path, pair, trust):
    """They come until the server has told of all the ways in which they end; honest ones are served meanwhile."""
    ways = ("bad-request", "timeout", "tls-timeout", "tls-failed", "connection-lost")
    begun = Counter()
    with serving(tmp_path, pair) as server:
        assert await is_served(server, trust)
        wait_until(lambda: slots_taken(server) == 0, "the slot is free again")
        before = descriptors(server.process.pid)
        crowd = asyncio.create_task(hostile.crowd((HOST, server.ke_port), trust, begun, clients=64))
        end = time.monotonic() + 60
        while missing := [way for way in ways if not ke_count(server, way)]:
            assert time.monotonic() < end, missing
            assert await is_served(server, trust)
            assert not crowd.done(), crowd.exception()
        crowd.cancel()
        await asyncio.wait((crowd,))
        wait_until(lambda: slots_taken(server) == 0, "the slots are free again")
        wait_until(lambda: descriptors(server.process.pid) <= before, "the descriptors are free again")
        assert await is_served(server, trust)
    assert begun.keys() == set(hostile.KINDS)


# The answer


def data_segments(sock):
    """How many segments with data have come: tcpi_data_segs_in of struct tcp_info. On loopback one is one write."""
    return struct.unpack_from("@I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160), 152)[0]


@pytest.mark.rfc8915("4-2", "4-3")
def test_the_answer_is_one_write_that_ends_with_close_notify(shared, trust, packets):
    """RFC 8915 section 4."""
    peer = Peer(shared.ke_port, trust).handshake()
    with peer.socket:
        if packets == "python":
            # Session tickets, which came behind the handshake.
            assert select.select([peer.socket], [], [], PATIENCE)[0]
            assert peer.channel.receive(peer.socket.recv(1 << 16)) == b""
        before = data_segments(peer.socket)
        peer.ask()
        assert len(peer.client.receive(peer.answer()).cookies) == 8
        assert peer.channel.closed_by_peer
        assert data_segments(peer.socket) == before + 1
        assert peer.socket.recv(1) == b"", "and no more follows"


@pytest.mark.rfc8915("4.1.3-7")
@pytest.mark.parametrize("length", [0, 1, 9])
@pytest.mark.parametrize("says_so", [True, False], ids=["close_notify", "FIN"])
def test_a_client_that_closes_its_side_too_early_gets_error_1(shared, trust, length, says_so):
    peer = Peer(shared.ke_port, trust).handshake()
    with peer.socket:
        if length:
            peer.socket.sendall(peer.seal(peer.client.request()[:length]))
        if says_so:
            peer.channel.close()
            peer.socket.sendall(peer.channel.to_send())
        else:
            peer.socket.shutdown(socket.SHUT_WR)
        assert parse(peer.answer()) == ERROR_1


def test_a_client_that_does_not_hang_up_loses_its_slot(shared, trust):
    peer = Peer(shared.ke_port, trust).handshake().ask()
    with peer.socket:
        assert len(peer.client.receive(peer.answer()).cookies) == 8
        wait_until(lambda: slots_taken(shared) == 0, "the slot is free again")


# Access


@BOTH
async def test_the_denied_get_nothing(tmp_path, pair, trust):
    with serving(tmp_path, pair, "--deny=127.0.0.2", "--deny=127.0.3.0/24", "--deny=::1") as server:
        assert refused(server.ke_port, "127.0.0.2")
        for source in ("127.0.0.2", "127.0.3.9"):
            assert plain_answer(server.ntp_port, source, patience=0.2) is None
        wait_until(lambda: ntp_count(server, "denied") == 2, "the drops are counted")
        assert ke_count(server, "denied") == 1
        assert plain_answer(server.ntp_port, "127.0.0.3").stratum == 3
        assert await is_served(server, trust)


@BOTH
async def test_only_the_allowed_are_served(tmp_path, pair, trust):
    with serving(tmp_path, pair, "--allow=127.0.0.0/24", "--deny=127.0.0.128/25") as server:
        assert await is_served(server, trust)
        assert plain_answer(server.ntp_port).stratum == 3
        for source in ("127.0.0.200", "127.1.0.1"):
            assert refused(server.ke_port, source)
            assert plain_answer(server.ntp_port, source, patience=0.2) is None


def assert_kiss(header, code):
    assert (header.leap, header.stratum, header.reference_id) == (Leap.UNSYNCHRONISED, 0, code)


async def nts_answer(found, server, source):
    """What comes of one authenticated request from `source`: the sample, or KissOfDeath; and the jar after it."""
    association = Association(found.result, secrets.token_bytes)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(PATIENCE)
        udp.bind((source, 0))
        request = association.poll()
        udp.sendto(request, (HOST, server.ntp_port))
        answer = udp.recv(2048)
    assert len(answer) <= len(request)
    try:
        return association.receive(answer, sent=0, received=0), len(association.jar)
    except KissOfDeath as kiss:
        return kiss, len(association.jar)


@BOTH
async def test_the_denied_can_be_told_so(tmp_path, pair, trust):
    """KoD DENY, once in a while: authentic to an NTS request, and the cookie that it used comes back."""
    toml = '[limits]\ndeny = ["127.0.0.2", "127.0.0.3"]\ndeny_action = "kod"\n'
    with serving(tmp_path, pair, toml=toml) as server:
        assert_kiss(plain_answer(server.ntp_port, "127.0.0.2"), b"DENY")
        assert plain_answer(server.ntp_port, "127.0.0.2", patience=0.2) is None
        found = await establish(NAME, HOST, server.ke_port, trust)
        kiss, cookies = await nts_answer(found, server, "127.0.0.3")
        assert (kiss.code, kiss.authentic, cookies) == ("DENY", True, 8)
        assert ntp_count(server, "kiss-deny") == 2
        assert ntp_count(server, "denied") == 1


# The rate of NTP


def burst(server, source, count, host=HOST):
    """How many of so many requests are answered; all have been looked at when one from elsewhere is."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind((source, 0))
        for _ in range(count):
            udp.sendto(Header(transmit=1).encode(), (host, server.ntp_port))
        assert plain_answer(server.ntp_port, "127.9.9.9") is not None
        answers = 0
        udp.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while udp.recv(2048):
                answers += 1
    return answers


@BOTH
def test_an_address_that_asks_too_often_is_not_answered(tmp_path, pair):
    """A few of what is over the limit are: one in 256 here, by chance."""
    toml = "[limits]\nntp_burst = 20\nntp_leak = 256\n"
    with serving(tmp_path, pair, "--ntp-interval=4096", toml=toml) as server:
        assert 20 <= burst(server, "127.0.0.2", 120) <= 35
        assert ntp_count(server, "rate-limited") >= 85
        assert 20 <= burst(server, "127.0.0.3", 120) <= 35, "another address has its own tokens"


@BOTH
def test_another_port_is_the_same_address(tmp_path, pair):
    toml = "[limits]\nntp_interval = 4096\nntp_burst = 20\nntp_leak = 256\n"
    with serving(tmp_path, pair, toml=toml) as server:
        assert sum(burst(server, "127.0.0.2", 10) for _ in range(12)) <= 35


@BOTH
def test_ipv6_is_limited_too(tmp_path, pair):
    toml = "[limits]\nntp_interval = 4096\nntp_burst = 2\nntp_leak = 256\nntp_kod = 1\n"
    with serving(tmp_path, pair, toml=toml) as server:
        words = server.process.output().split()
        port = int(next(word for word in words if word.startswith("ntp=")).rpartition(":")[2])
        found = [plain_answer(port, "::1", "::1") for _ in range(3)]
        assert [header.stratum for header in found] == [3, 3, 0]
        assert_kiss(found[2], b"RATE")


@BOTH
async def test_an_address_can_be_told_that_it_asks_too_often(tmp_path, pair, trust):
    """KoD RATE to an NTS request is authentic, and the cookie that it used comes back."""
    toml = "[limits]\nntp_interval = 4096\nntp_burst = 1\nntp_kod = 1\n"
    with serving(tmp_path, pair, toml=toml) as server:
        found = await establish(NAME, HOST, server.ke_port, trust)
        sample, _ = await nts_answer(found, server, "127.0.0.2")
        assert sample.stratum == 3
        found = await establish(NAME, HOST, server.ke_port, trust)
        kiss, cookies = await nts_answer(found, server, "127.0.0.2")
        assert (kiss.code, kiss.authentic, cookies) == ("RATE", True, 8)
        assert plain_answer(server.ntp_port, "127.0.0.2", patience=0.2) is None, "one is enough for a while"
        assert ntp_count(server, "kiss-rate") == 1


def test_without_settings_nothing_is_limited(shared):
    assert burst(shared, "127.0.0.2", 90) == 90


# Settings


@pytest.mark.parametrize(
    ("option", "field"),
    [
        ("--deny=10.0.0.1/8", "limits.deny.0"),
        ("--deny=nonsense", "limits.deny.0"),
        ("--allow=::/129", "limits.allow.0"),
        ("--ntp-interval=0", "limits.ntp_interval"),
        ("--ntp-interval=nan", "limits.ntp_interval"),
        ("--ntp-interval=1e9", "limits.ntp_interval"),
    ],
)
def test_options_that_make_no_sense_are_named(pair, option, field):
    done = run("pool-agent", "serve", f"--cert={pair.cert}", f"--key={pair.key}", f"--ke={HOST}:0", option)
    assert done.status == ExitStatus.CONFIGURATION
    assert done.stderr.startswith(f"error: {field}: ")
    assert "correct the option" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("toml", "named"),
    [
        ('allow = ["10.0.0.0/8"]\ndeny = ["10.0.0.0/8"]', "10.0.0.0/8 is both allowed and denied"),
        ("ke_connections = 0", "limits.ke_connections"),
        ("ntp_leak = 1", "limits.ntp_leak"),
        ('deny_action = "shout"', "limits.deny_action"),
        ("burst = 8", "limits.burst"),
    ],
)
def test_a_file_that_makes_no_sense_is_named(tmp_path, pair, toml, named):
    (tmp_path / "agent.toml").write_text(f"[limits]\n{toml}\n")
    done = run("pool-agent", "serve", f"--cert={pair.cert}", f"--key={pair.key}", f"--state={tmp_path}")
    assert done.status == ExitStatus.CONFIGURATION
    assert named in done.stderr
    assert "agent.toml" in done.stderr


def test_a_variable_sets_a_limit(pair, monkeypatch):
    monkeypatch.setenv("POOL_AGENT_LIMITS__NTP_BURST", "0")
    done = run("pool-agent", "serve", f"--cert={pair.cert}", f"--key={pair.key}", f"--ke={HOST}:0")
    assert done.status == ExitStatus.CONFIGURATION
    assert "limits.ntp_burst" in done.stderr


@BOTH
def test_beyond_the_cap_nobody_is_answered_whoever_asks(tmp_path, pair):
    """One request in 100 s: of two clients only the first one is answered."""
    with serving(tmp_path, pair, toml="[limits]\nntp_pps = 0.01\n") as server:
        assert plain_answer(server.ntp_port, "127.0.0.2") is not None
        assert plain_answer(server.ntp_port, "127.0.0.3", patience=0.5) is None
        assert ntp_count(server, "over-cap") >= 1


@BOTH
def test_beyond_the_cap_an_address_may_be_told_so(tmp_path, pair):
    toml = '[limits]\nntp_pps = 0.01\nabove = "rate"\n'
    with serving(tmp_path, pair, toml=toml) as server:
        assert plain_answer(server.ntp_port, "127.0.0.2").stratum == 3
        assert_kiss(plain_answer(server.ntp_port, "127.0.0.3"), b"RATE")
        assert plain_answer(server.ntp_port, "127.0.0.4", patience=0.5) is None, "no more KoDs than answers"
        assert (ntp_count(server, "kiss-rate"), ntp_count(server, "over-cap")) == (1, 1)


@BOTH
async def test_beyond_the_cap_of_key_establishments_connections_end_before_tls(tmp_path, pair, trust):
    """Ten in ten minutes, of which six seconds' worth come at once: one. Whose connection it is does not count."""
    with serving(tmp_path, pair, toml="[limits]\nke_per_minute = 1\n") as server:
        assert await is_served(server, trust)
        assert refused(server.ke_port, "127.0.0.2")
        assert refused(server.ke_port, "127.0.0.3")
        assert ke_count(server, "over-cap") == 2
        wait_until(lambda: slots_taken(server) == 0, "no slot is lost")
        assert plain_answer(server.ntp_port).stratum == 3, "NTP has a cap of its own"


@pytest.mark.parametrize("name", ["ntp_pps", "ke_per_minute"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "2e9", '"much"'])
def test_a_cap_that_is_none_is_refused(tmp_path, name, value):
    (tmp_path / "agent.toml").write_text(f"[limits]\n{name} = {value}\n")
    with pytest.raises(AgentError, match=name):
        load_settings(tmp_path, {})


@pytest.mark.parametrize(
    ("toml", "named"),
    [
        ("workers = 0", "workers"),
        ("workers = 65", "workers"),
        ('workers = "all"', "workers"),
        ("workers = 3\n[limits]\nke_connections = 2", "3 cannot share limits.ke_connections = 2"),
        ('group = "nogroup"', "give user as well"),
        ('[limits]\nabove = "shout"', "limits.above"),
        ("[limits]\ntraffic_cap = 5", "limits.traffic_cap: there is no such setting"),
    ],
)
def test_settings_of_processes_that_make_no_sense(tmp_path, toml, named):
    (tmp_path / "agent.toml").write_text(toml + "\n")
    with pytest.raises(AgentError, match=named):
        load_settings(tmp_path, {})


def test_auto_is_a_process_for_each_core(tmp_path):
    (tmp_path / "agent.toml").write_text('workers = "auto"\n')
    assert load_settings(tmp_path, {}).workers == len(os.sched_getaffinity(0))


def test_a_meter_tells_the_mean_of_ten_seconds_or_more():
    meter = Meter()
    assert meter.read(1000, 50.0) is None
    assert meter.read(1500, 59.9) is None, "too short a time"
    assert meter.read(1600, 62.0) == 50.0
    assert meter.read(9999, 65.0) == 50.0, "the last mean holds until there is another"
    assert meter.read(1600, 82.0) == 0.0


def test_what_comes_is_counted_answered_or_not():
    counters = Counter({"plain": 3, "rate-limited": 4, "send-error": 2, "receive-error": 1})
    assert requests(counters) == 7
    assert connections(Counter({"ok": 2, "over-cap": 3, "accept-error": 4, "no-descriptor": 5})) == 5
