"""TLS 1.3 without sockets (RFC 8915 section 3): octets in, octets out.

Rules:

1. TLS 1.3 only, one ALPN protocol at a time (`ntske/1` unless told), certificates checked here and nowhere else.
2. A client checks the certificate at an explicit time, after the handshake and before it sends anything.
3. No sockets, no clock. `cryptography` and pyOpenSSL do the work; the stdlib's `ssl` has no exporter.
"""

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Self

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from OpenSSL import SSL

from nts_core.errors import CertificateError, TlsError

ALPN = b"ntske/1"
EXPORTER_LABEL = b"EXPORTER-network-time-security"
ACME_IDENTIFIER = x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31")
_READ = 16 * 1024

# What reading a hostile certificate can raise; not all of it is a ValueError.
_X509_FAULTS = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
# The kinds of key that TLS 1.3 authenticates a server with.
ServerKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey


def _context(method: int) -> SSL.Context:
    context = SSL.Context(method)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_options(SSL.OP_NO_TICKET)
    return context


def _server_context(alpn: bytes) -> SSL.Context:
    """For servers of one protocol."""

    def choose(_connection: SSL.Connection, offered: list[bytes]) -> bytes:
        if alpn not in offered:
            # An exception makes the fatal alert that RFC 7301 section 3.2 demands.
            raise TlsError(f"the client does not offer {alpn.decode()}")
        return alpn

    context = _context(SSL.TLS_SERVER_METHOD)
    context.set_alpn_select_callback(choose)
    return context


class ServerCredentials:
    """A certificate chain and its key, ready for handshakes; replaced as a whole when either changes.

    They answer for one protocol, by default NTS-KE.
    """

    __slots__ = ("_alpn", "_context", "names", "validity")

    def __init__(self, chain: Sequence[x509.Certificate], key: ServerKey, alpn: bytes = ALPN) -> None:
        """`chain` is leaf first. Raises TlsError when certificate and key do not belong together."""
        self.names = dns_names(chain[0])
        self.validity = chain[0].not_valid_before_utc, chain[0].not_valid_after_utc
        self._alpn = alpn
        self._context = _server_context(alpn)
        try:
            self._context.use_certificate(chain[0])
            for issuer in chain[1:]:
                self._context.add_extra_chain_cert(issuer)
            self._context.use_privatekey(key)
            self._context.check_privatekey()
        except SSL.Error as error:
            raise TlsError(f"certificate and key do not belong together ({_reason(error)})") from None

    def channel(self) -> "TlsChannel":
        return _accepting(self._context, self, self._alpn)

    def take_over(self, connection: SSL.Connection) -> None:
        """Finish a handshake that began without a certificate."""
        connection.set_context(self._context)
        connection.set_app_data(self)


class NamedCredentials:
    """The credentials of each name that is served here.

    A client gets those of the name that it asks for (SNI). One that asks for another name, or for none, gets the only
    ones there are; where there are several, or with `exact`, it gets an alert, since none of them is what it wants.
    All answer for the protocol `alpn`.
    """

    __slots__ = ("_alpn", "_by_name", "_context", "_only")

    def __init__(
        self, by_name: Mapping[str, ServerCredentials], alpn: bytes = ALPN, *, exact: bool = False
    ) -> None:
        self._by_name = {name.lower(): credentials for name, credentials in by_name.items()}
        self._only = next(iter(by_name.values())) if len(by_name) == 1 and not exact else None
        self._alpn = alpn
        # It has no certificate: a handshake that is not taken over ends with an alert.
        self._context = _server_context(alpn)
        self._context.set_tlsext_servername_callback(self._choose)

    def channel(self) -> "TlsChannel":
        if self._only is not None:
            return self._only.channel()
        return _accepting(self._context, None, self._alpn)

    def _choose(self, connection: SSL.Connection) -> None:
        name = (connection.get_servername() or b"").decode("ascii", "replace").lower()
        credentials = self._by_name.get(name)
        if credentials is not None:
            credentials.take_over(connection)


def _accepting(context: SSL.Context, credentials: ServerCredentials | None, alpn: bytes) -> "TlsChannel":
    connection = SSL.Connection(context, None)
    connection.set_app_data(credentials)
    connection.set_accept_state()
    return TlsChannel(connection, None, alpn)


def dns_names(leaf: x509.Certificate) -> tuple[str, ...]:
    """The host names in a certificate, without those that stand for many."""
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (*_X509_FAULTS, x509.ExtensionNotFound):
        return ()
    return tuple(name.lower() for name in names.get_values_for_type(x509.DNSName) if "*" not in name)


@dataclass(frozen=True, slots=True)
class Trust:
    """The roots a client accepts and the time at which certificates have to be valid.

    With a `floor` the time `at` is that of a clock that nobody vouches for (RFC 8915 section 8.5): a certificate
    must not have ended before the floor, and its chain is checked at `at` if that fits, else at the first time
    that does.
    """

    roots: Store
    at: datetime
    floor: datetime | None = None

    @classmethod
    def of(cls, roots: Sequence[x509.Certificate], at: datetime, floor: datetime | None = None) -> Self:
        return cls(Store(list(roots)), at, floor)

    def verify(self, name: str, chain: Sequence[x509.Certificate]) -> None:
        """Raise CertificateError unless `chain` is good for `name` (a DNS name or an IP address)."""
        try:
            at = self._time(name, chain[0])
            _check_validity(name, chain[0], at)
            builder = PolicyBuilder().store(self.roots).time(at)
            # A name that no certificate can carry is a ValueError.
            builder.build_server_verifier(_subject(name)).verify(chain[0], list(chain[1:]))
        except (*_X509_FAULTS, VerificationError) as error:
            # What the library was looking at is shown as Python writes it, and says nothing to people.
            reason = str(error).partition(" (encountered processing")[0]
            if reason.startswith("candidates exhausted"):
                reason = f"no trusted root leads to it ({reason})"
            raise CertificateError(f"the certificate is not acceptable for {name}: {reason}") from None

    def _time(self, name: str, leaf: x509.Certificate) -> datetime:
        if self.floor is None:
            return self.at
        first, last = max(self.floor, leaf.not_valid_before_utc), leaf.not_valid_after_utc
        if last < first:
            raise CertificateError(
                f"the certificate for {name} ended on {last:%Y-%m-%d %H:%M:%S} UTC, "
                f"before the last recorded time, {self.floor:%Y-%m-%d %H:%M:%S} UTC"
            )
        return self.at if first <= self.at <= last else first


@dataclass(frozen=True, slots=True)
class Pin:
    """Accepts one certificate only, whoever issued it: for asking a server whose certificate one has.

    `fingerprint` is SHA-256 of its DER in lower-case hex.
    """

    fingerprint: str

    def verify(self, name: str, chain: Sequence[x509.Certificate]) -> None:
        """Raise CertificateError unless `chain` begins with that certificate."""
        shown = chain[0].fingerprint(hashes.SHA256()).hex()
        if shown != self.fingerprint:
            raise CertificateError(
                f"another certificate is shown for {name}: {shown[:16]}, not {self.fingerprint[:16]}"
            )


def _check_validity(name: str, leaf: x509.Certificate, at: datetime) -> None:
    """For the sake of the dates: the library's verdict names none."""
    if at > leaf.not_valid_after_utc:
        raise CertificateError(
            f"the certificate for {name} ended on {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        )
    if at < leaf.not_valid_before_utc:
        raise CertificateError(
            f"the certificate for {name} begins on {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} UTC only"
        )


def _subject(name: str) -> x509.DNSName | x509.IPAddress:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError:
        raise CertificateError(f"{name!r} is not a DNS name: write it in its ASCII form") from None


_client_context: list[SSL.Context] = []


def new_key_and_csr(domain: str) -> tuple[str, str]:
    """A P-256 key (PKCS 8) and a request with an empty subject and the domain as only name, both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(domain)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return private.decode(), csr.public_bytes(Encoding.PEM).decode()


def acme_identifier(digest: str) -> x509.UnrecognizedExtension:
    """The extension, critical, by which a certificate answers TLS-ALPN-01 (RFC 8737 section 3); `digest` is in hex."""
    octets = bytes.fromhex(digest)
    return x509.UnrecognizedExtension(ACME_IDENTIFIER, bytes((4, len(octets))) + octets)


def client_channel(name: str, trust: Trust | Pin) -> "TlsChannel":
    """A client's channel to the server `name`: no trailing dot; an IP literal sends no SNI (RFC 6066)."""
    if not _client_context:
        context = _context(SSL.TLS_CLIENT_METHOD)
        context.set_alpn_protos([ALPN])
        _client_context.append(context)
    connection = SSL.Connection(_client_context[0], None)
    if isinstance(_subject(name), x509.DNSName):
        connection.set_tlsext_host_name(name.encode("ascii"))
    connection.set_connect_state()
    return TlsChannel(connection, (name, trust))


class TlsChannel:
    """One TLS session over memory buffers.

    Feed what the network brings to `receive`, and send what `to_send` gives after each call.
    """

    def __init__(
        self, connection: SSL.Connection, verify: tuple[str, Trust | Pin] | None, alpn: bytes = ALPN
    ) -> None:
        self._connection = connection
        self._verify = verify
        self._alpn = alpn
        self.established = False
        self.closed_by_peer = False
        self.peer_chain: tuple[x509.Certificate, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The host names in the certificate that this side, a server, has shown."""
        credentials = self._connection.get_app_data()
        return credentials.names if isinstance(credentials, ServerCredentials) else ()

    def receive(self, ciphertext: bytes) -> bytes:
        """Plaintext that has come so far; call it once with nothing to start a client.

        Raises TlsError when the session is broken, CertificateError when the server is not who it should
        be. `to_send` may then still hold an alert for the peer.
        """
        try:
            if ciphertext:
                self._connection.bio_write(ciphertext)
            if not self.established:
                self._connection.do_handshake()
                self._finish_handshake()
            return self._read()
        except SSL.WantReadError:
            return b""
        except SSL.Error as error:
            raise TlsError(f"TLS failed: {_reason(error)}") from None

    def _finish_handshake(self) -> None:
        if self._connection.get_alpn_proto_negotiated() != self._alpn:
            raise TlsError(f"the peer does not speak {self._alpn.decode()}")
        try:
            self.peer_chain = tuple(self._connection.get_peer_cert_chain(as_cryptography=True) or ())
        except _X509_FAULTS as error:
            # OpenSSL reads more than `cryptography` does.
            raise CertificateError(f"the server's certificate is not well-formed: {error}") from None
        if self._verify is not None:
            name, trust = self._verify
            if not self.peer_chain:
                raise CertificateError("the server sent no certificate")
            trust.verify(name, self.peer_chain)
        self.established = True

    def _read(self) -> bytes:
        plaintext = bytearray()
        while True:
            try:
                plaintext += self._connection.recv(_READ)
            except SSL.WantReadError:
                return bytes(plaintext)
            except SSL.ZeroReturnError:
                self.closed_by_peer = True
                return bytes(plaintext)

    def send(self, plaintext: bytes) -> None:
        """Encrypt application data for `to_send`."""
        self._connection.sendall(plaintext)

    def close(self) -> None:
        """Say close_notify, which each side SHALL do after its message (section 4)."""
        try:
            self._connection.shutdown()
        except SSL.Error:
            # Before the handshake is done there is nothing to close.
            return

    def to_send(self) -> bytes:
        """Ciphertext for the network; empty when there is none."""
        octets = bytearray()
        while True:
            try:
                octets += self._connection.bio_read(_READ)
            except SSL.WantReadError:
                return bytes(octets)

    def export(self, context: bytes, length: int) -> bytes:
        """Keying material under RFC 8915's label (section 4.3; the deployed one, without `/1`)."""
        return self._connection.export_keying_material(EXPORTER_LABEL, length, context)


def _reason(error: SSL.Error) -> str:
    """OpenSSL's own words for a failure, the last of its error queue."""
    queue = error.args[0] if error.args else ()
    if isinstance(queue, list | tuple) and queue:
        return str(queue[-1][-1])
    return "the connection broke off" if not error.args else str(error.args[-1])
