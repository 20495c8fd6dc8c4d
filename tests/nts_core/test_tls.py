"""Two ends of a TLS session without sockets (RFC 8915 section 3): who is let in, and when."""

import hashlib
import hmac
import ssl
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from OpenSSL import SSL

from lab.certificates import Authority
from nts_core.errors import CertificateError, TlsError
from nts_core.tls import ALPN, EXPORTER_LABEL, ServerCredentials, Trust, client_channel

VECTORS = Path(__file__).parent.parent / "vectors"
NAME = "ntp.example"
ROUNDS = 20
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def pair(authority):
    return authority.issue(NAME, "192.0.2.1", "2001:db8::1", file="pair")


def load(pair):
    chain = x509.load_pem_x509_certificates(pair.cert.read_bytes())
    return chain, load_pem_private_key(pair.key.read_bytes(), None)


def trust(authority, at=None):
    roots = x509.load_pem_x509_certificates(authority.root.read_bytes())
    return Trust.of(roots, at or datetime.now(UTC))


@pytest.fixture
def server(pair):
    return ServerCredentials(*load(pair)).channel()


def client(authority, name=NAME, at=None):
    return client_channel(name, trust(authority, at))


def handshake(client, server, piece=1 << 16):
    """Carry octets to and fro, `piece` at a time, until both are established. Errors pass through."""
    client.receive(b"")
    for _ in range(ROUNDS):
        for sender, receiver in ((client, server), (server, client)):
            octets = sender.to_send()
            for start in range(0, len(octets), piece):
                assert receiver.receive(octets[start : start + piece]) == b""
        if client.established and server.established:
            return
    raise AssertionError("the handshake does not come to an end")


class Raw:
    """A plain pyOpenSSL end: what peers look like that do not keep the rules. `to_send` as TlsChannel's."""

    def __init__(self, context, *, is_server):
        self.connection = SSL.Connection(context, None)
        if is_server:
            self.connection.set_accept_state()
        else:
            self.connection.set_connect_state()
        self.established = False
        self.failure = ""

    def receive(self, octets):
        if octets:
            self.connection.bio_write(octets)
        try:
            self.connection.do_handshake()
            self.established = True
        except SSL.WantReadError:
            pass
        except SSL.Error as error:
            self.failure = str(error)
        return b""

    def to_send(self):
        try:
            return self.connection.bio_read(1 << 16)
        except SSL.WantReadError:
            return b""


def raw_client(*, alpn=(ALPN,), version=None):
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    if alpn:
        context.set_alpn_protos(list(alpn))
    if version is not None:
        context.set_max_proto_version(version)
    return Raw(context, is_server=False)


def raw_server(pair, *, alpn=ALPN, version=None):
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.use_certificate_chain_file(str(pair.cert))
    context.use_privatekey_file(str(pair.key))
    if alpn is not None:
        context.set_alpn_select_callback(lambda _connection, _offered: alpn)
    if version is not None:
        context.set_max_proto_version(version)
    return Raw(context, is_server=True)


# A good session


@pytest.mark.parametrize("piece", [1 << 16, 100, 1])
def test_both_ends_agree_however_the_octets_arrive(authority, server, piece):
    one = client(authority)
    handshake(one, server, piece)
    one.send(b"question")
    assert server.receive(one.to_send()) == b"question"
    server.send(b"answer" * 10_000)
    answer = server.to_send()
    got = b"".join(
        one.receive(answer[at : at + max(piece, 100)]) for at in range(0, len(answer), max(piece, 100))
    )
    assert got == b"answer" * 10_000


def test_octet_by_octet_plaintext(authority, server):
    one = client(authority)
    handshake(one, server)
    one.send(b"question")
    assert b"".join(server.receive(bytes((octet,))) for octet in one.to_send()) == b"question"


def test_the_client_knows_the_chain(authority, pair, server):
    one = client(authority)
    handshake(one, server)
    assert list(one.peer_chain) == load(pair)[0]
    assert server.peer_chain == ()


@pytest.mark.rfc8915("4.3-3")
def test_exporters_agree_and_depend_on_the_context(authority, server):
    one = client(authority)
    handshake(one, server)
    keys = [one.export(context, 32) for context in (b"\0\0\0\x0f\0", b"\0\0\0\x0f\1", b"")]
    assert keys == [server.export(context, 32) for context in (b"\0\0\0\x0f\0", b"\0\0\0\x0f\1", b"")]
    assert len(set(keys)) == 3


def test_exporters_of_two_sessions_differ(authority, pair):
    found = set()
    for _ in range(2):
        one = client(authority)
        handshake(one, ServerCredentials(*load(pair)).channel())
        found.add(one.export(b"\0\0\0\x0f\0", 32))
    assert len(found) == 2


def expand_label(hash_name, secret, label, context, length):
    """HKDF-Expand-Label of RFC 8446 section 7.1, for outputs of one hash at most."""
    full = b"tls13 " + label
    info = length.to_bytes(2, "big") + bytes((len(full),)) + full + bytes((len(context),)) + context
    return hmac.digest(secret, info + b"\1", hash_name)[:length]


@pytest.mark.rfc8915("4.3-1", "4.3-2", "4.3-3", "5.1-2", "5.1-3")
def test_the_exporter_is_the_one_of_the_rfcs(server):
    """Computed anew from the key log by RFC 8446 section 7.5 with the label of RFC 8915 section 4.3."""
    vector = tomllib.loads((VECTORS / "exporter-contexts.toml").read_text())
    label, context = bytes.fromhex(vector["label"]), bytes.fromhex(vector["c2s"])
    logged: list[bytes] = []
    settings = SSL.Context(SSL.TLS_CLIENT_METHOD)
    settings.set_alpn_protos([ALPN])
    settings.set_keylog_callback(lambda _connection, line: logged.append(line))
    one = Raw(settings, is_server=False)
    handshake(one, server)
    exporter = next(line.split()[2] for line in logged if line.startswith(b"EXPORTER_SECRET"))
    hash_name = "sha384" if (one.connection.get_cipher_name() or "").endswith("SHA384") else "sha256"

    def hashed(octets):
        return hashlib.new(hash_name, octets).digest()

    derived = expand_label(
        hash_name, bytes.fromhex(exporter.decode()), label, hashed(b""), hashlib.new(hash_name).digest_size
    )
    assert label == EXPORTER_LABEL
    assert server.export(context, 32) == expand_label(hash_name, derived, b"exporter", hashed(context), 32)


def test_close_notify_is_noticed_with_what_came_before_it(authority, server):
    one = client(authority)
    handshake(one, server)
    server.send(b"answer")
    server.close()
    assert one.receive(server.to_send()) == b"answer"
    assert one.closed_by_peer


def test_a_peer_that_closed_its_direction_still_gets_the_answer(authority, server):
    """Section 4: each side closes after its own message, so the request may come with close_notify."""
    one = client(authority)
    handshake(one, server)
    one.send(b"question")
    one.close()
    assert server.receive(one.to_send()) == b"question"
    assert server.closed_by_peer
    server.send(b"answer")
    server.close()
    assert one.receive(server.to_send()) == b"answer"


def test_close_before_the_handshake_is_harmless(server):
    server.close()
    assert not server.established


# What a client refuses


def assert_refused(error, one, server, match=None):
    """The client fails before it is established, so that it never sends a request."""
    with pytest.raises(error, match=match):
        handshake(one, server)
    assert not one.established


@pytest.mark.rfc8915("3-4", "3-5")
@pytest.mark.parametrize(
    "name", ["other.example", "example", "x.ntp.example", "ntp.example.com", "192.0.2.2", "2001:db8::2"]
)
def test_a_certificate_for_another_name(authority, server, name):
    assert_refused(CertificateError, client(authority, name), server, match=name)


@pytest.mark.rfc8915("3-4", "3-5")
@pytest.mark.parametrize("name", [NAME, "NTP.Example", "192.0.2.1", "2001:db8::1", "2001:DB8:0:0::1"])
def test_names_and_addresses_in_the_certificate(authority, server, name):
    handshake(client(authority, name), server)


@pytest.mark.rfc8915("3-4")
def test_a_name_does_not_match_an_address_and_the_reverse(authority):
    only_name = ServerCredentials(*load(authority.issue(NAME, file="only-name")))
    assert_refused(CertificateError, client(authority, "127.0.0.1"), only_name.channel())
    only_address = ServerCredentials(*load(authority.issue("127.0.0.1", file="only-address")))
    assert_refused(CertificateError, client(authority, NAME), only_address.channel())


@pytest.mark.rfc8915("3-5")
def test_the_common_name_does_not_count(authority):
    pair = authority.issue("other.example", common_name=NAME, file="common-name")
    credentials = ServerCredentials(*load(pair))
    handshake(client(authority, "other.example"), credentials.channel())
    assert_refused(CertificateError, client(authority), credentials.channel(), match=NAME)


@pytest.mark.parametrize("name", [NAME, "192.0.2.1", "2001:db8::1"])
def test_an_address_is_never_sent_as_server_name(authority, pair, name):
    """RFC 6066 section 3: literal addresses are not permitted in SNI."""
    server = raw_server(pair)
    handshake(client(authority, name), server)
    assert server.connection.get_servername() == (NAME.encode() if name == NAME else None)


@pytest.mark.rfc8915("8.5-3")
@pytest.mark.parametrize("at", [-30, -5, 0, 5, 30])
@pytest.mark.parametrize(
    ("floor", "is_good"), [(-100, True), (-2, True), (1, True), (3, False), (100, False)]
)
def test_a_floor_in_place_of_a_clock(authority, at, floor, is_good):
    """RFC 8915 section 8.5: refused is what ended before the floor, whatever the clock says."""
    now = datetime.now(UTC)
    pair = authority.issue(NAME, not_before=now - DAY, not_after=now + 2 * DAY, file="floor")
    chain, _ = load(pair)
    roots = x509.load_pem_x509_certificates(authority.root.read_bytes())
    lax = Trust.of(roots, now + at * DAY, now + floor * DAY)
    if is_good:
        lax.verify(NAME, chain)
    else:
        with pytest.raises(CertificateError, match="recorded time"):
            lax.verify(NAME, chain)
    with pytest.raises(CertificateError):
        lax.verify("other.example", chain)


def test_a_floor_is_not_a_way_around_the_roots(authority, tmp_path):
    chain, _ = load(Authority(tmp_path).issue(NAME))
    roots = x509.load_pem_x509_certificates(authority.root.read_bytes())
    with pytest.raises(CertificateError):
        Trust.of(roots, datetime.now(UTC), datetime(2026, 1, 1, tzinfo=UTC)).verify(NAME, chain)


@pytest.mark.rfc8915("3-4")
def test_validity_is_judged_at_the_time_given(authority):
    now = datetime.now(UTC)
    pair = authority.issue(NAME, not_before=now - DAY, not_after=now + 5 * DAY, file="validity")
    credentials = ServerCredentials(*load(pair))
    for at in (now, now - DAY + timedelta(seconds=2), now + 5 * DAY - timedelta(seconds=2)):
        handshake(client(authority, at=at), credentials.channel())
    for at in (now - DAY - timedelta(seconds=2), now + 5 * DAY + timedelta(seconds=2)):
        assert_refused(CertificateError, client(authority, at=at), credentials.channel())


def test_an_expired_certificate(authority):
    now = datetime.now(UTC)
    pair = authority.issue(NAME, not_before=now - DAY / 2, not_after=now - DAY / 4, file="expired")
    assert_refused(CertificateError, client(authority), ServerCredentials(*load(pair)).channel())


def test_a_certificate_that_is_not_yet_valid(authority):
    now = datetime.now(UTC)
    pair = authority.issue(NAME, not_before=now + DAY, not_after=now + 2 * DAY, file="early")
    assert_refused(CertificateError, client(authority), ServerCredentials(*load(pair)).channel())


@pytest.mark.rfc8915("3-4")
def test_a_certificate_of_an_unknown_root(authority, tmp_path):
    stranger = Authority(tmp_path).issue(NAME)
    assert_refused(CertificateError, client(authority), ServerCredentials(*load(stranger)).channel())


def test_a_certificate_that_only_openssl_can_read(authority, tmp_path):
    """OpenSSL takes a BOOLEAN of 1 for TRUE, DER and `cryptography` only 255; no other error may escape."""
    pair = authority.issue(NAME, file="sloppy")
    der = bytearray(load(pair)[0][0].public_bytes(Encoding.DER))
    at = der.index(bytes.fromhex("0603551d110101ff"))
    der[at + 7] = 1
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    (tmp_path / "sloppy.pem").write_text(ssl.DER_cert_to_PEM_cert(bytes(der)))
    context.use_certificate_file(str(tmp_path / "sloppy.pem"))
    context.use_privatekey_file(str(pair.key))
    context.set_alpn_select_callback(lambda _connection, _offered: ALPN)
    assert_refused(CertificateError, client(authority), Raw(context, is_server=True))


@pytest.mark.parametrize("name", ["under_score..example", "a b", "", "z\u00fcrich.example", "a" * 300])
def test_a_name_that_no_certificate_can_carry(authority, server, name):
    with pytest.raises(CertificateError):
        handshake(client(authority, name), server)


@pytest.mark.rfc8915("3-1", "3-2")
def test_a_server_that_speaks_tls_1_2_only(authority, pair):
    assert_refused(TlsError, client(authority), raw_server(pair, version=SSL.TLS1_2_VERSION))


@pytest.mark.rfc8915("3-3")
def test_a_server_without_alpn(authority, pair):
    assert_refused(TlsError, client(authority), raw_server(pair, alpn=None), match="ntske/1")


@pytest.mark.rfc8915("3-3")
def test_a_server_that_chooses_another_protocol(authority, pair):
    assert_refused(TlsError, client(authority), raw_server(pair, alpn=b"http/1.1"))


@pytest.mark.parametrize("octets", [b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes(64), b"\x16\x03\x03\xff\xff"])
def test_a_server_that_does_not_speak_tls(authority, octets):
    one = client(authority)
    one.receive(b"")
    with pytest.raises(TlsError):
        one.receive(octets * 500)
    assert not one.established


# What a server refuses


@pytest.mark.rfc8915("3-3")
def test_a_client_without_alpn(server):
    with pytest.raises(TlsError, match="ntske/1"):
        handshake(raw_client(alpn=()), server)
    assert not server.established


@pytest.mark.rfc8915("3-3")
def test_a_client_with_another_protocol_gets_an_alert(server):
    """RFC 7301 section 3.2: no_application_protocol, alert 120."""
    one = raw_client(alpn=(b"h2", b"http/1.1"))
    with pytest.raises(TlsError, match="ntske/1"):
        handshake(one, server)
    alert = server.to_send()
    assert not server.established
    one.receive(alert)
    assert "no application protocol" in one.failure


def test_a_client_that_offers_more_protocols_is_served(server):
    one = raw_client(alpn=(b"h2", ALPN))
    handshake(one, server)
    assert one.connection.get_alpn_proto_negotiated() == ALPN


@pytest.mark.rfc8915("3-1", "3-2")
def test_a_client_that_speaks_tls_1_2_only(server):
    with pytest.raises(TlsError):
        handshake(raw_client(version=SSL.TLS1_2_VERSION), server)
    assert not server.established


@pytest.mark.rfc8915("3-1")
def test_tickets_cannot_be_switched_off_yet():
    """When this fails, set their number to zero and remove docs/adr/0018."""
    assert not hasattr(SSL.Context, "set_num_tickets")


def test_no_session_is_resumed(pair):
    """A client that offers its ticket gets a full handshake, certificates included (docs/adr/0018)."""
    credentials = ServerCredentials(*load(pair))
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_alpn_protos([ALPN])
    flights = []
    ticket = None
    for _ in range(2):
        one, server = Raw(context, is_server=False), credentials.channel()
        if ticket is not None:
            one.connection.set_session(ticket)
        one.receive(b"")
        hello = one.to_send()
        assert (PRE_SHARED_KEY in extensions(hello)) is (ticket is not None)
        server.receive(hello)
        flights.append(server.to_send())
        one.receive(flights[-1])
        server.receive(one.to_send())
        server.send(b"answer")
        one.connection.bio_write(server.to_send())
        assert one.connection.recv(100) == b"answer"
        ticket = one.connection.get_session()
        # OpenSSL forgets sessions that were not shut down on their own.
        one.connection.shutdown()
        server.close()
    certificates = sum(len(each.public_bytes(Encoding.DER)) for each in load(pair)[0])
    assert len(flights[1]) > len(flights[0]) - certificates // 2


PRE_SHARED_KEY = 41


def extensions(hello):
    """The types of a ClientHello's extensions (RFC 8446 section 4.1.2) in its one TLS record."""
    at = 5 + 4 + 2 + 32
    at += 1 + hello[at]
    at += 2 + int.from_bytes(hello[at : at + 2], "big")
    at += 1 + hello[at]
    at += 2
    found = set()
    while at < len(hello):
        found.add(int.from_bytes(hello[at : at + 2], "big"))
        at += 4 + int.from_bytes(hello[at + 2 : at + 4], "big")
    return found


@pytest.mark.parametrize(
    "octets", [b"GET / HTTP/1.1\r\n\r\n", bytes(64), b"\x16\x03\x01\x00\x05hello", b"\xff" * 600]
)
def test_a_client_that_does_not_speak_tls(server, octets):
    with pytest.raises(TlsError):
        server.receive(octets * 3)
    assert not server.established


def test_a_session_that_is_tampered_with(authority, server):
    one = client(authority)
    handshake(one, server)
    one.send(b"question")
    octets = bytearray(one.to_send())
    octets[-1] ^= 1
    with pytest.raises(TlsError):
        server.receive(bytes(octets))


# Credentials


def test_certificate_and_key_must_belong_together(authority, pair):
    other = authority.issue(NAME, file="other")
    with pytest.raises(TlsError, match="do not belong together"):
        ServerCredentials(load(pair)[0], load(other)[1])


def test_sessions_of_one_server_are_independent(authority, pair):
    """A failed handshake leaves nothing behind for the next one."""
    credentials = ServerCredentials(*load(pair))
    for _ in range(3):
        with pytest.raises(TlsError):
            handshake(raw_client(alpn=(b"h2",)), credentials.channel())
        handshake(client(authority), credentials.channel())
