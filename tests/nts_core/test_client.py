"""The client over real sockets on loopback, against servers that keep the rules and servers that do not."""

import asyncio
import contextlib
import secrets
import socket
import time
from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from lab.certificates import Authority
from lab.processes import free_port
from lab.programs import run
from nts_core import records
from nts_core.aead import NONCE_LENGTH, Aead, AeadId
from nts_core.association import Association
from nts_core.client import (
    ClientError,
    Failure,
    _by_turns,
    establish,
    establish_any,
    exchange,
    measure,
    ntp_address,
    system_addresses,
)
from nts_core.cookies import Keyring
from nts_core.errors import KissOfDeath, TlsError
from nts_core.ke import KeServer, KeTerms, NtpEndpoint, NtpService, export_keys
from nts_core.packet import Field, FieldType, Header, Leap, Mode, Packet, encode_fields, protect
from nts_core.records import Record, RecordType
from nts_core.server import ClockState, NtpServer, Reply
from nts_core.source import Source, query
from nts_core.tls import ServerCredentials, Trust
from nts_core.wire import uint16

NAME = "ntp.example"
HOST = "127.0.0.1"
END = Record(RecordType.END_OF_MESSAGE, critical=True)
NTPV4 = Record(RecordType.NEXT_PROTOCOL, uint16(0), critical=True)
SIV = Record(RecordType.AEAD_ALGORITHM, uint16(15), critical=True)
CLOCK = ClockState(Leap.NONE, 2, -20, 0, 0, b"TEST", 0)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def credentials(authority):
    pair = authority.issue(NAME, HOST)
    key = load_pem_private_key(pair.key.read_bytes(), None)
    return ServerCredentials(x509.load_pem_x509_certificates(pair.cert.read_bytes()), key)


@pytest.fixture(scope="module")
def roots(authority):
    return x509.load_pem_x509_certificates(authority.root.read_bytes())


@pytest.fixture(scope="module")
def trust(roots):
    return Trust.of(roots, datetime.now(UTC))


@contextlib.asynccontextmanager
async def listening(serve):
    """A TCP listener that runs `serve(reader, writer)` for each connection; gives its port."""

    running = set()

    async def accepted(reader, writer):
        running.add(asyncio.current_task())
        try:
            await serve(reader, writer)
        except (OSError, TlsError):
            return
        finally:
            writer.close()

    server = await asyncio.start_server(accepted, HOST, 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        # One turn of the loop lets the transports close their sockets.
        await asyncio.sleep(0)


async def read_request(channel, reader, writer):
    """The handshake, and the first plaintext that the client sends."""
    while octets := await reader.read(4096):
        asked = channel.receive(octets)
        writer.write(channel.to_send())
        if asked:
            return asked
    raise TlsError("the client went away")


@contextlib.asynccontextmanager
async def ke_server(credentials, answer, *, piece=1 << 16):
    """An NTS-KE server whose answer is `answer(KeServer)`'s octets to a request, sent in pieces."""

    async def serve(reader, writer):
        channel = credentials.channel()
        channel.send(answer(channel, await read_request(channel, reader, writer)))
        channel.close()
        octets = channel.to_send()
        for start in range(0, len(octets), piece):
            writer.write(octets[start : start + piece])
            await writer.drain()
        await reader.read(1)

    async with listening(serve) as port:
        yield port


def good(keyring, endpoint=None):
    """The answer of a server that keeps the rules."""

    def answer(channel, asked):
        server = KeServer(
            KeTerms(keyring, NtpService(endpoint or NtpEndpoint())), channel.export, secrets.token_bytes
        )
        return server.receive(asked).octets

    return answer


def scripted(*body):
    return lambda _channel, _asked: records.encode([*body, END])


class NtpEnd(asyncio.DatagramProtocol):
    """Sends whatever `answers(request)` lists, in that order."""

    def __init__(self, answers):
        self.answers = answers
        self.requests = []
        self.asked = asyncio.Event()

    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, address):
        self.requests.append((data, address))
        self.asked.set()
        for octets in self.answers(data):
            self.transport.sendto(octets, address)


@contextlib.asynccontextmanager
async def ntp_end(answers, host=HOST):
    loop = asyncio.get_running_loop()
    transport, end = await loop.create_datagram_endpoint(lambda: NtpEnd(answers), local_addr=(host, 0))
    end.port = transport.get_extra_info("sockname")[1]
    try:
        yield end
    finally:
        transport.close()


def honest(keyring, clock=CLOCK, offset=0):
    """Answers as a server whose clock is `offset` ahead."""
    server = NtpServer(keyring, secrets.token_bytes)

    def answers(request):
        def now():
            return time.time_ns() + offset

        action = server.respond(request, received=now(), transmit_time=now, clock=clock)
        return [action.octets] if isinstance(action, Reply) else []

    return answers


@pytest.fixture
def keyring():
    return Keyring.new(0, secrets.token_bytes)


async def fails(work, code):
    with pytest.raises(ClientError) as caught:
        await work
    error = caught.value
    assert error.code == code
    assert error.message
    assert error.remedy
    return error


# Key establishment


@pytest.mark.rfc8915("4.1.7-7")
@pytest.mark.parametrize("piece", [1 << 16, 1])
async def test_establish(credentials, trust, keyring, piece):
    async with ke_server(credentials, good(keyring, NtpEndpoint(None, 4123)), piece=piece) as port:
        found = await establish(NAME, HOST, port, trust)
    assert len(found.result.cookies) == 8
    assert (found.ntp_host, found.ntp_port) == (HOST, 4123)
    assert found.took > 0
    assert keyring.open(found.result.cookies[0]) == found.result.keys


async def test_record_6_overrides_the_address(credentials, trust, keyring):
    async with ke_server(credentials, good(keyring, NtpEndpoint("192.0.2.7", 123))) as port:
        found = await establish(NAME, HOST, port, trust)
    assert found.ntp_host == "192.0.2.7"


@pytest.mark.rfc8915("4.1.7-6")
async def test_a_name_in_record_6_is_a_whole_name(credentials, trust, keyring, monkeypatch):
    """No search list may lead it elsewhere; of its addresses one of the family that works is taken."""
    known = {"ntp.": "ntp"}

    async def getaddrinfo(host, *_, **__):
        if host not in known:
            raise socket.gaierror(socket.EAI_NONAME, "not known")
        return [(None, None, None, known[host], (address, 0)) for address in ("2001:db8::7", "192.0.2.7")]

    async with ke_server(credentials, good(keyring, NtpEndpoint("ntp", 123))) as port:
        found = await establish(NAME, HOST, port, trust)
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    assert await ntp_address(found) == "192.0.2.7"
    # As in /etc/hosts; and as by a search list.
    known = {"ntp": "ntp"}
    assert await ntp_address(found) == "192.0.2.7"
    known = {"ntp": "ntp.evil.example"}
    await fails(ntp_address(found), Failure.DNS)


@pytest.mark.rfc8915("4-1", "4-3")
@pytest.mark.parametrize("is_usable", [True, False])
async def test_a_client_sends_one_request_and_close_notify(credentials, trust, keyring, is_usable):
    told = asyncio.get_running_loop().create_future()

    async def serve(reader, writer):
        channel = credentials.channel()
        asked = await read_request(channel, reader, writer)
        answer = good(keyring) if is_usable else scripted(Record(RecordType.ERROR, uint16(1), critical=True))
        channel.send(answer(channel, asked))
        writer.write(channel.to_send())
        while octets := await reader.read(4096):
            asked += channel.receive(octets)
        told.set_result((asked, channel.closed_by_peer))

    async with listening(serve) as port:
        with contextlib.nullcontext() if is_usable else pytest.raises(ClientError):
            await establish(NAME, HOST, port, trust)
        async with asyncio.timeout(5):
            asked, is_closed = await told
    assert is_closed
    assert records.MessageReader(records.MAX_REQUEST).receive(asked) is not None


@contextlib.contextmanager
def black_hole(host, port):
    """An address that takes no connection and refuses none: its queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(0)
        for _ in range(2):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex((host, port))
        yield


async def test_the_address_that_answers_first_is_used_and_the_others_are_left(credentials, trust, keyring):
    async with ke_server(credentials, good(keyring)) as port:
        with black_hole("127.0.0.2", port):
            spare = ["127.0.0.3", "127.0.0.2", HOST, "127.0.0.4"]
            found = await establish_any(NAME, spare, port, trust)
            assert found.address == HOST
            assert spare == ["127.0.0.2", "127.0.0.4"], (
                "one refused, one is used, two may be tried another time"
            )
            with pytest.raises(ClientError) as caught:
                await establish_any(NAME, spare, port, trust, timeout=0.6)
    assert (caught.value.code, spare) == (Failure.TCP, [])
    assert "127.0.0.2" in caught.value.message
    assert "127.0.0.4" in caught.value.message


async def test_a_second_address_is_asked_for_no_keys(credentials, trust, keyring):
    """TLS is begun with one alone, however many connections stood for a moment."""
    asked = []

    async def serve(reader, writer):
        asked.append(await reader.read(4096))

    async with ke_server(credentials, good(keyring)) as port:
        other = await asyncio.start_server(serve, "127.0.0.2", port)
        async with other:
            await establish_any(NAME, [HOST, "127.0.0.2"], port, trust)
    assert not any(asked)


def test_families_take_turns():
    assert _by_turns(["2001:db8::1", "2001:db8::2", "2001:db8::3", "192.0.2.1"]) == [
        "2001:db8::1",
        "192.0.2.1",
        "2001:db8::2",
        "2001:db8::3",
    ]
    assert _by_turns(["192.0.2.1", "192.0.2.2", "2001:db8::1"]) == ["192.0.2.1", "2001:db8::1", "192.0.2.2"]


async def test_a_family_that_this_host_does_not_have_says_less_than_a_refusal(trust):
    error = await fails(establish_any(NAME, ["2001:db8::1", HOST], free_port(), trust), Failure.TCP)
    assert "refused" in error.message


async def test_nobody_listens(trust):
    await fails(establish(NAME, HOST, free_port(), trust), Failure.TCP)


async def test_a_port_that_says_nothing(trust):
    async def silence(reader, _writer):
        await reader.read(1 << 16)
        await reader.read(1)

    async with listening(silence) as port:
        error = await fails(establish(NAME, HOST, port, trust, timeout=0.2), Failure.TLS)
    assert "0.2 s" in error.message


async def test_a_port_that_does_not_speak_tls(trust):
    async def talk(_reader, writer):
        writer.write(b"220 mail.example ESMTP\r\n" * 10)
        await writer.drain()

    async with listening(talk) as port:
        await fails(establish(NAME, HOST, port, trust), Failure.TLS)


async def test_a_port_that_closes_at_once(trust):
    async def close(_reader, _writer):
        pass

    async with listening(close) as port:
        await fails(establish(NAME, HOST, port, trust), Failure.TLS)


async def test_a_server_that_closes_without_an_answer(credentials, trust):
    """close_notify says that nothing more will come: waiting on would only cost the deadline."""
    async with ke_server(credentials, lambda _channel, _asked: b"") as port:
        before = time.monotonic()
        error = await fails(establish(NAME, HOST, port, trust, timeout=2.0), Failure.TLS)
    assert time.monotonic() - before < 1
    assert "closed" in error.message


async def test_a_server_that_never_ends_its_answer(credentials, trust):
    async def serve(reader, writer):
        channel = credentials.channel()
        await read_request(channel, reader, writer)
        channel.send(NTPV4.encode())
        writer.write(channel.to_send())
        await reader.read(1)

    async with listening(serve) as port:
        await fails(establish(NAME, HOST, port, trust, timeout=0.3), Failure.TLS)


async def test_the_wrong_name_sends_no_request(credentials, trust):
    asked = []

    def answer(_channel, octets):
        asked.append(octets)
        return b""

    async with ke_server(credentials, answer) as port:
        await fails(establish("other.example", HOST, port, trust), Failure.CERTIFICATE)
    assert asked == []


@pytest.mark.parametrize("name", ["z\u00fcrich.example", "a..b", "a b"])
async def test_a_name_that_no_certificate_can_carry(credentials, trust, keyring, name):
    """SRV targets and people's typing may hold any name: it fails like any other wrong name."""
    async with ke_server(credentials, good(keyring)) as port:
        await fails(establish(name, HOST, port, trust), Failure.CERTIFICATE)


KE_FAILURES = {
    "an Error record": (Record(RecordType.ERROR, uint16(1), critical=True),),
    "a Warning record": (NTPV4, SIV, Record(RecordType.WARNING, uint16(1), critical=True)),
    "nothing in common": (Record(RecordType.NEXT_PROTOCOL, critical=True),),
    "a malformed answer": (NTPV4, NTPV4, SIV),
    "no cookies": (NTPV4, SIV),
    "octets behind the end": (END,),
}


@pytest.mark.rfc8915("4.1.3-4")
@pytest.mark.parametrize("body", KE_FAILURES.values(), ids=KE_FAILURES)
async def test_answers_without_cookies(credentials, trust, body):
    async with ke_server(credentials, scripted(*body)) as port:
        await fails(establish(NAME, HOST, port, trust), Failure.KE)


@pytest.mark.rfc8915("4-9")
async def test_an_answer_of_64_kib(credentials, trust):
    filler = [Record(0x4000, bytes(1000))] * 64
    cookie = Record(RecordType.NEW_COOKIE, b"c" * 100)
    async with ke_server(credentials, scripted(NTPV4, SIV, *filler, cookie)) as port:
        found = await establish(NAME, HOST, port, trust)
    assert found.result.cookies == (cookie.body,)


async def test_an_endless_answer(credentials, trust):
    filler = [Record(0x4000, bytes(60_000))] * 20
    async with ke_server(credentials, scripted(NTPV4, SIV, *filler)) as port:
        await fails(establish(NAME, HOST, port, trust), Failure.KE)


# Exchanges


@pytest.fixture
async def established(credentials, trust, keyring):
    async with ke_server(credentials, good(keyring)) as port:
        return await establish(NAME, HOST, port, trust)


@pytest.fixture
def association(established):
    return Association(established.result, secrets.token_bytes)


async def test_exchange_on_both_families(association, keyring):
    for host in (HOST, "::1"):
        async with ntp_end(honest(keyring, offset=3_000_000_000), host) as end:
            sample = await exchange(association, host, end.port)
        assert abs(sample.offset - 3_000_000_000) < 50_000_000
        assert sample.delay < 100_000_000
        assert len(association.jar) == 8


async def test_each_request_leaves_from_another_port(association, keyring):
    """RFC 9109: a port that cannot be guessed; a repetition in eight is possible, eight alike are not."""
    async with ntp_end(honest(keyring)) as end:
        for _ in range(8):
            await exchange(association, HOST, end.port)
    assert len({address for _, address in end.requests}) > 4


@pytest.mark.rfc8915("5.7-30")
async def test_forgeries_before_the_answer_change_nothing(association, keyring):
    def answers(request):
        (true,) = honest(keyring)(request)
        broken = bytearray(true)
        broken[60] ^= 1
        return [b"", secrets.token_bytes(100), request, bytes(broken), forged_kiss(request, b"NTSN"), true]

    async with ntp_end(answers) as end:
        sample = await exchange(association, HOST, end.port)
    assert sample.synchronised


def forged_kiss(request, code):
    asked = Packet.decode(request)
    header = Header(mode=Mode.SERVER, stratum=0, reference_id=code, origin=asked.header.transmit)
    return header.encode() + encode_fields(asked.of_type(FieldType.UNIQUE_IDENTIFIER))


async def test_an_answer_from_another_port_is_not_taken(association, keyring):
    async with ntp_end(lambda _request: []) as end, ntp_end(lambda _request: []) as stranger:
        waiting = asyncio.create_task(exchange(association, HOST, end.port, timeout=0.5))
        async with asyncio.timeout(5):
            await end.asked.wait()
        request, address = end.requests[0]
        stranger.transport.sendto(honest(keyring)(request)[0], address)
        error = await fails(waiting, Failure.NTP)
    assert "no authentic answer" in error.message


async def test_silence_ends_at_the_deadline(association):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind((HOST, 0))
        before = time.monotonic()
        await fails(exchange(association, HOST, silent.getsockname()[1], timeout=0.2), Failure.NTP)
        assert 0.2 <= time.monotonic() - before < 2


async def test_icmp_errors_are_not_listened_to(association):
    """A closed port is silence like any other: anybody can forge ICMP."""
    before = time.monotonic()
    await fails(exchange(association, HOST, free_port(), timeout=0.2), Failure.NTP)
    assert time.monotonic() - before >= 0.2


async def test_ntsn_counts_only_at_the_deadline(association):
    async with ntp_end(lambda request: [forged_kiss(request, b"NTSN")]) as end:
        before = time.monotonic()
        with pytest.raises(KissOfDeath) as caught:
            await exchange(association, HOST, end.port, timeout=0.2)
    assert (caught.value.code, caught.value.authentic) == ("NTSN", False)
    assert time.monotonic() - before >= 0.2


def kissing(established, code):
    """Answers with a kiss code that the session's key protects."""

    def answers(request):
        cookie = Field(FieldType.COOKIE, b"c" * 100).encode()
        keys = established.result.keys
        nonce = secrets.token_bytes(NONCE_LENGTH[keys.aead])
        return [protect(forged_kiss(request, code), cookie, Aead(keys.aead, keys.s2c), nonce)]

    return answers


async def test_an_authentic_kiss_ends_it_at_once(association, established):
    async with ntp_end(kissing(established, b"DENY")) as end:
        with pytest.raises(KissOfDeath) as caught:
            await exchange(association, HOST, end.port)
    assert (caught.value.code, caught.value.authentic) == ("DENY", True)


# Measurements


async def measured(credentials, trust, keyring, answers, samples=4):
    async with (
        ntp_end(answers) as end,
        ke_server(credentials, good(keyring, NtpEndpoint(None, end.port))) as port,
    ):
        return await measure(await establish(NAME, HOST, port, trust), samples)


@pytest.mark.rfc8915("4.1.3-4", "8.7-1")
async def test_after_an_error_there_is_no_ntp(credentials, authority):
    """Neither with the cookie that came all the same, nor without protection."""
    async with ntp_end(lambda request: [request]) as end:
        where = Record(RecordType.NTP_PORT, uint16(end.port), critical=True)
        cookie = Record(RecordType.NEW_COOKIE, b"c" * 100)
        error = Record(RecordType.ERROR, uint16(2), critical=True)
        async with ke_server(credentials, scripted(NTPV4, SIV, where, cookie, error)) as port:
            arguments = (f"{NAME}:{port}", f"--address={HOST}", f"--ca={authority.root}", "--json")
            done = await asyncio.to_thread(run, "pool-client", "query", *arguments)
        assert done.document["error"]["code"] == Failure.KE
        assert end.requests == []


@pytest.mark.rfc8915("5.7-31", "8.7-1")
async def test_plain_answers_are_never_taken(credentials, trust, keyring):
    """And a server that gives none but these gets no request without protection."""
    asked = []

    def plain(request):
        asked.append(Packet.decode(request))
        header = Header(mode=Mode.SERVER, stratum=2, origin=asked[-1].header.transmit).encode()
        return [header, header + encode_fields(asked[-1].of_type(FieldType.UNIQUE_IDENTIFIER))]

    await fails(measured(credentials, trust, keyring, plain, samples=1), Failure.NTP)
    assert asked
    assert all(packet.authenticator for packet in asked)


async def test_measure_takes_as_many_samples_as_wanted(credentials, trust, keyring):
    found = await measured(credentials, trust, keyring, honest(keyring, offset=-(10**9)))
    assert len(found.samples) == 4
    assert found.best.delay == min(sample.delay for sample in found.samples)
    assert abs(found.best.offset + 10**9) < 50_000_000


async def test_one_lost_packet_is_made_up_for(credentials, trust, keyring):
    seen = []

    def answers(request):
        seen.append(request)
        return [] if len(seen) == 1 else honest(keyring)(request)

    found = await measured(credentials, trust, keyring, answers, samples=2)
    assert len(found.samples) == 2
    assert [sample.asked for sample in found.samples] == [2, 1]


async def test_measure_reports_a_kiss(credentials, trust, keyring):
    stranger = Keyring.new(0, secrets.token_bytes)
    error = await fails(measured(credentials, trust, keyring, honest(stranger), samples=1), Failure.KISS)
    assert "NTSN" in error.message


@pytest.mark.parametrize("code", [b"INIT", b"STEP"])
async def test_a_server_that_is_still_starting_is_not_synchronised(credentials, roots, keyring, code):
    """RFC 5905 section 7.4: INIT and STEP tell of the server's clock; they are no refusal. ntpd sends them."""
    keys = {}

    def answer(channel, asked):
        reply = good(keyring, NtpEndpoint(None, end.port))(channel, asked)
        keys["s2c"] = channel.export(b"\0\0\0\x1e\1", 16)
        return reply

    def answers(request):
        return [protect(forged_kiss(request, code), b"", Aead(30, keys["s2c"]), secrets.token_bytes(12))]

    async with ntp_end(answers) as end, ke_server(credentials, answer) as port:
        source = Source(NAME, port, roots, addresses=[HOST], interval=0)
        await fails(query(source), Failure.UNSYNCHRONISED)


@pytest.mark.parametrize(("exported_as", "requests"), [(15, 4), (30, 5)])
async def test_a_server_that_does_not_say_how_it_exports(credentials, roots, keyring, exported_as, requests):
    """AES-128-GCM-SIV without record 1024: the first keys, and if only NTSN comes the others."""
    gcm_siv = AeadId.AES_128_GCM_SIV

    def answer(channel, _asked):
        keys = export_keys(channel.export, gcm_siv, AeadId(exported_as))
        chosen = Record(RecordType.AEAD_ALGORITHM, uint16(gcm_siv), critical=True)
        port = NtpEndpoint(None, end.port).records()
        sealed = keyring.seal_many(keys, secrets.token_bytes(8 * 16))
        cookies = [Record(RecordType.NEW_COOKIE, cookie) for cookie in sealed]
        return records.encode([NTPV4, chosen, *port, *cookies, END])

    async with ntp_end(honest(keyring)) as end, ke_server(credentials, answer) as port:
        found = await query(Source(NAME, port, roots, addresses=[HOST], interval=0))
    assert len(found.samples) == 4
    assert found.aead == gcm_siv
    assert len(end.requests) == requests


@pytest.mark.rfc8915("4.1.3-6", "4.1.3-8")
@pytest.mark.parametrize(("code", "seconds"), [(0, 432_000), (1, 432_000), (2, 10)])
async def test_a_request_that_was_called_bad_is_not_soon_repeated(credentials, roots, code, seconds):
    """RFC 8915 section 4.1.3: the unmodified request only after an internal error of the server."""
    error = Record(RecordType.ERROR, uint16(code), critical=True)
    asked = []

    def answer(channel, octets):
        asked.append(octets)
        return scripted(error)(channel, octets)

    async with (
        ke_server(credentials, answer) as port,
        # Two addresses of one server, as far as it can tell.
        Source(NAME, port, roots, addresses=[HOST, "::ffff:127.0.0.1"]) as source,
    ):
        before = time.monotonic()
        await fails(source.next(), Failure.KE)
        assert len(asked) == (2 if code == 2 else 1)
        assert before + seconds <= source.action.at / 1e9 <= time.monotonic() + seconds


async def test_query_goes_on_to_the_next_address(credentials, roots, keyring):
    """`localhost` has an IPv6 address on most systems; the server listens on IPv4 alone."""
    pool = await system_addresses("localhost")
    if HOST not in pool:
        pytest.fail("localhost does not resolve to 127.0.0.1")
    async with ntp_end(honest(keyring)) as end:
        answer = good(keyring, NtpEndpoint(None, end.port))
        async with ke_server(credentials, answer) as port:
            await fails(query(Source("localhost", port, roots, interval=0)), Failure.CERTIFICATE)
            found = await query(Source(HOST, port, roots, interval=0), samples=1)
    assert found.ntp_host == HOST


async def test_a_name_that_does_not_resolve():
    """An empty label fails before any resolver is asked."""
    await fails(system_addresses("a..b"), Failure.DNS)
