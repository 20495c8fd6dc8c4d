"""One full probe of one address: what it asks, what it makes of losses, lies and the zone."""

import asyncio
import secrets
import socket
import struct
from datetime import UTC, datetime
from itertools import count
from random import Random

import pytest
from cryptography import x509

from lab.certificates import Authority
from lab.knot import Knot
from lab.nts_server import NtsServer, forged_kiss
from lab.pool_zone import PoolZone
from lab.processes import free_port
from nts_core.aead import AeadId
from nts_core.client import is_own_fault
from nts_core.control import NameFinding, Stage
from nts_core.packet import FieldType, Packet
from nts_core.tls import Trust
from poolsvc import prober, scoring, views
from poolsvc.lookups import Named, Nameservers, judge
from poolsvc.outbound import Guard
from poolsvc.prober import EXCHANGES, probe

HOST = "127.0.0.1"
NAME = "alice.servers.pool.example"
# Lost requests are waited for; answers on loopback take a hundredth of it.
PATIENCE = 0.15


class Path(NtsServer):
    """A server behind a path: `passes(number, datagram)` says what arrives. `requests` are what was sent, as packets."""

    def __init__(self, pair):
        super().__init__(pair)
        self.passes = lambda _number, _data: True
        self.requests = []
        self.octets = []
        self.sources = []

    def datagram_received(self, data, address):
        self.requests.append(Packet.decode(data))
        self.octets.append(len(data))
        self.sources.append(address[1])
        if self.passes(len(self.requests), data):
            super().datagram_received(data, address)

    @property
    def placeholders(self):
        return [len(packet.of_type(FieldType.COOKIE_PLACEHOLDER)) for packet in self.requests]


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def trust(authority):
    return Trust.of(x509.load_pem_x509_certificates(authority.root.read_bytes()), datetime.now(UTC))


@pytest.fixture
async def server(authority):
    server = Path(authority.issue(NAME))
    await server.start()
    yield server
    await server.stop()


class Draws(Random):
    """Draws these numbers of placeholders, then none."""

    def __init__(self, *placeholders):
        super().__init__(0)
        self._left = list(placeholders)

    def random(self):
        return 0.99 if self._left and self._left[0] else (self._left and self._left.pop(0), 0.0)[1]

    def randrange(self, *_):
        return self._left.pop(0)

    def uniform(self, *_):
        return 1.0


@pytest.fixture
def probed(server, trust, settings):
    """`probed(*placeholders)`: a probe of the server with so many in each request."""

    async def run(*placeholders, **options):
        return await probe(
            NAME,
            HOST,
            server.ke_port,
            trust,
            own_addresses=frozenset({HOST}),
            guard=Guard(settings),
            **{"spacing": 0, "patience": PATIENCE, "random": Draws(*placeholders), **options},
        )

    return run


def is_full(result):
    return result.failed is None and scoring.step(result).value == scoring.FULL_STEP


async def test_a_good_server(server, probed):
    result = await probed(0, 3, 7)
    assert is_full(result)
    assert (result.exchanges, result.lost, result.filtered) == (EXCHANGES, 0, None)
    assert server.placeholders == [0, 3, 7]
    assert result.longest == max(server.octets)
    assert (result.asked, result.cookies) == (13, 13)
    assert (result.stratum, result.leap, result.aead) == (2, 0, AeadId.AES_128_GCM_SIV)
    assert result.ntp == f"{HOST}:{server.ntp_port}"
    assert min(result.tcp_took, result.tls_took, result.ke_took, result.delay) > 0


async def test_cookies_are_used_once_and_those_got_by_ntp_first(server, probed):
    given = []
    server.before = lambda data: given.append(server.answer(data)) or given[-1:]
    await probed(0, 0, 0)
    assert set(server.cookies.values()) == {1}
    assert len(server.cookies) == EXCHANGES


async def test_each_exchange_has_a_new_port_and_nothing_tells_it_from_a_clients(server, probed):
    await probed(0, 0, 0)
    assert len(set(server.sources)) == EXCHANGES
    for packet in server.requests:
        header = packet.header
        assert (header.stratum, header.leap, header.poll, header.precision, header.reference_id) == (
            *(0, 0, 0, 0),
            bytes(4),
        )


async def test_placeholders_are_drawn_as_clients_have_them():
    random = Random(7)
    drawn = [prober._draw_placeholders(random) for _ in range(2000)]
    assert set(drawn) == set(range(8))
    assert 0.45 < drawn.count(0) / len(drawn) < 0.55


@pytest.mark.parametrize("lost", [{1}, {2}, {3}, {1, 2}])
async def test_single_losses_are_told_and_fail_nothing(server, probed, lost):
    server.passes = lambda number, _data: number not in lost
    result = await probed(0, 0, 0)
    assert (result.failed, result.lost) == (None, len(lost))
    assert result.offset is not None


async def test_when_one_cookie_got_by_ntp_is_lost_another_one_speaks_for_it(server, probed):
    server.passes = lambda number, _data: number not in {2, 3}
    result = await probed(2, 0, 0)
    assert (result.failed, result.exchanges, result.lost) == (None, 4, 2)


async def test_a_server_that_opens_no_cookie_got_by_ntp_fails_there(server, probed):
    server.passes = lambda number, _data: number == 1
    result = await probed(3, 0, 0)
    assert (result.failed, result.exchanges, result.lost) == (Stage.NTP_NTP_COOKIE, 4, 3)
    assert (result.offset, result.is_silent) == (None, False)
    assert scoring.step(result).value == -5


async def test_a_server_that_lost_its_key_fails_at_the_first_cookie(server, probed):
    server.keyring = type(server.keyring).new(0, secrets.token_bytes)
    result = await probed()
    assert (result.failed, result.lost) == (Stage.NTP_KE_COOKIE, EXCHANGES)
    assert "NTSN" in result.detail


async def test_silence_is_told_apart(server, probed):
    server.is_silent = True
    result = await probed()
    assert (result.failed, result.is_silent, result.exchanges) == (Stage.NTP_KE_COOKIE, True, EXCHANGES)
    await server.stop()
    result = await probed()
    assert (result.failed, result.is_silent) == (Stage.TCP, True)
    await server.start()


async def test_long_packets_that_are_dropped_are_a_finding(server, probed):
    server.passes = lambda _number, data: len(data) < 500
    result = await probed(0, 7, 0)
    assert result.failed is None
    assert (result.filtered, result.lost, result.exchanges) == (server.octets[1], 0, 5)
    assert result.longest < 500
    assert scoring.step(result).value == scoring.FULL_STEP


async def test_where_packets_after_one_loss_are_dropped_clients_suffer(server, probed):
    server.passes = lambda _number, data: not Packet.decode(data).of_type(FieldType.COOKIE_PLACEHOLDER)
    result = await probed(0, 1, 0)
    assert (result.failed, result.filtered) == (Stage.COOKIES, server.octets[1])
    assert "clients lose their cookies" in result.detail
    assert scoring.step(result).value == -1


async def test_a_long_packet_that_was_lost_once_is_no_finding(server, probed):
    server.passes = lambda number, _data: number != 2
    result = await probed(0, 7, 0)
    assert (result.failed, result.filtered, result.exchanges) == (None, None, 5)
    assert server.placeholders == [0, 7, 0, 0, 7]


async def test_an_authentic_kiss_ends_it(server, probed):
    server.before = server.kiss(b"DENY")
    result = await probed()
    assert (result.failed, result.kiss, result.exchanges) == (Stage.NTP_KE_COOKIE, "DENY", 0)
    assert scoring.step(result).value == -10


async def test_garbage_and_forged_kisses_change_nothing(server, probed):
    server.before = lambda data: [b"", b"\0" * 48, secrets.token_bytes(400), forged_kiss(data, b"DENY")]
    assert is_full(await probed())


async def test_icmp_errors_are_not_listened_to(server, probed):
    """A port unreachable, forged as a rival would, comes before each answer."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:

        def forge(_number, data):
            raw.sendto(unreachable(server.sources[-1], server.ntp_port, data), (HOST, 0))
            return True

        server.passes = forge
        result = await probed()
    assert (result.failed, result.lost) == (None, 0)


def unreachable(source, port, data):
    """ICMP type 3 code 3 (RFC 792) about a datagram from `source` to `port` on loopback."""
    udp = struct.pack("!HHHH", source, port, 8 + len(data), 0)
    here = socket.inet_aton(HOST)
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28 + len(data), 1, 0, 64, 17, 0, here, here)
    message = struct.pack("!BBHI", 3, 3, 0, 0) + ip + udp + data[:8]
    total = sum(struct.unpack(f"!{len(message) // 2}H", message))
    total = (total & 0xFFFF) + (total >> 16)
    total += total >> 16
    return message[:2] + struct.pack("!H", ~total & 0xFFFF) + message[4:]


def test_a_routers_word_is_not_our_own_fault():
    error = OSError(101, "Network is unreachable")
    assert not is_own_fault(error, HOST), "this host knows the way"
    assert is_own_fault(OSError(24, "Too many open files"), HOST)


# The name


class Zone:
    def __init__(self, *addresses, is_alias=False):
        self.named = Named(frozenset(addresses), is_alias, 1)

    async def find(self, _domain):
        return self.named


@pytest.mark.parametrize(
    ("found", "finding"),
    [
        (None, NameFinding.UNKNOWN),
        (Named(frozenset(), True, 0), NameFinding.ALIAS),
        (Named(frozenset(), False, 0), NameFinding.ABSENT),
        (Named(frozenset({HOST, "192.0.2.1"}), False, 0), NameFinding.ELSEWHERE),
        (Named(frozenset({"2001:DB8::1"}), False, 0), NameFinding.UNLISTED),
        (Named(frozenset({HOST, "2001:db8::1"}), False, 0), NameFinding.OK),
    ],
)
def test_what_a_name_means(found, finding):
    assert judge(found, HOST, {HOST, "2001:db8::1"})[0] is finding


async def test_what_is_wrong_with_the_name_is_the_pools(probed):
    result = await probed(names=Zone("192.0.2.1"))
    assert (result.failed, result.names) == (None, NameFinding.ELSEWHERE)
    assert "192.0.2.1" in result.names_detail
    assert views.is_full(result, scoring.step(result))


@pytest.mark.parametrize("zone", [Zone(is_alias=True), Zone()])
async def test_an_alias_is_refused_and_so_is_a_name_without_addresses(probed, zone):
    """Not by a step, since the zone is the pool's: but nobody is admitted by such a probe."""
    result = await probed(names=zone)
    assert scoring.step(result).value == scoring.FULL_STEP
    assert not views.is_full(result, scoring.step(result))


@pytest.fixture(scope="module")
def primary(tmp_path_factory):
    records = ["bob.servers CNAME alice.servers"]
    with Knot(tmp_path_factory.mktemp("knot"), records=records) as primary:
        PoolZone(primary).add(("alice", HOST, "op=a"), ("alice", "::1", "op=a"))
        yield primary


async def test_the_zones_own_nameservers_are_asked(primary):
    nameservers = Nameservers([(primary.address, primary.port)])
    assert (await nameservers.find(NAME)).addresses == {HOST, "::1"}
    assert (await nameservers.find(NAME)).took == 0, "it is kept for a moment"
    assert (await nameservers.find("bob.servers.pool.example")).is_alias
    assert (await nameservers.find("carol.servers.pool.example")).addresses == frozenset()


async def test_a_nameserver_that_is_silent_refuses_or_lies_is_passed_over_and_left_alone(primary):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind((HOST, 0))
        place = silent.getsockname()
        nameservers = Nameservers([place, (primary.address, primary.port)], timeout=0.1)
        for name in ("alice", "bob", "carol"):
            assert await nameservers.find(f"{name}.servers.pool.example") is not None
        assert nameservers.resting <= 1
    assert await Nameservers([(HOST, free_port())], timeout=0.1).find(NAME) is None
    assert await Nameservers([]).find(NAME) is None
    refuses = Nameservers([(primary.address, primary.port)])
    assert await refuses.find("alice.servers.other.example") is None, "no zone of this server's"
    assert refuses.resting == 1
    assert await refuses.find(NAME) is None, "it is left alone for a while"


async def test_answers_of_a_hostile_nameserver_are_bounded():
    garbage = count()

    class Hostile(asyncio.DatagramProtocol):
        def connection_made(self, transport):
            self.transport = transport

        def datagram_received(self, data, address):
            next(garbage)
            for octets in (b"", secrets.token_bytes(40), data[:2] + b"\x84\0" + secrets.token_bytes(300)):
                self.transport.sendto(octets, address)

    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Hostile, local_addr=(HOST, 0))
    try:
        place = transport.get_extra_info("sockname")[:2]
        assert await Nameservers([place], timeout=0.1).find(NAME) is None
        assert await Nameservers([place], timeout=0.1).find("x" * 70 + ".example") is None
    finally:
        transport.close()
    assert next(garbage) > 0
