"""The saboteur's certificates and TLS contexts, for each manner to present itself."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import partial

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID
from OpenSSL import SSL

from lab.certificates import Authority, Pair
from nts_core.tls import ALPN, ServerCredentials, TlsChannel

NAME = "saboteur.example"
_DAY = timedelta(days=1)


class Manner(StrEnum):
    """How the server presents itself in the TLS handshake."""

    HONEST = "honest"
    EXPIRED = "expired"
    NOT_YET_VALID = "not-yet-valid"
    WRONG_NAME = "wrong-name"
    OTHER_CA = "other-ca"
    SELF_SIGNED = "self-signed"
    TLS_1_2 = "tls-1.2"
    NO_ALPN = "no-alpn"
    OTHER_ALPN = "other-alpn"


def channels(authority: Authority) -> dict[Manner, Callable[[], TlsChannel]]:
    """What makes a new connection's TLS, for each manner; the certificates are issued now."""
    now = datetime.now(UTC)
    hour = timedelta(hours=1)
    good = authority.issue(NAME, file="honest")
    pairs = {
        Manner.HONEST: good,
        Manner.EXPIRED: authority.issue(NAME, not_after=now - hour, file="expired"),
        Manner.NOT_YET_VALID: authority.issue(NAME, not_before=now + hour, file="not-yet-valid"),
        Manner.WRONG_NAME: authority.issue(f"not-{NAME}", file="wrong-name"),
        Manner.OTHER_CA: Authority(authority.directory / "other-ca").issue(NAME),
    }
    credentials = {manner: ServerCredentials(*_load(pair)) for manner, pair in pairs.items()}
    credentials[Manner.SELF_SIGNED] = ServerCredentials(*_self_signed(now))
    contexts = {manner: _context(good) for manner in (Manner.TLS_1_2, Manner.NO_ALPN, Manner.OTHER_ALPN)}
    contexts[Manner.TLS_1_2].set_max_proto_version(SSL.TLS1_2_VERSION)
    contexts[Manner.TLS_1_2].set_alpn_select_callback(lambda _connection, _offered: ALPN)
    contexts[Manner.OTHER_ALPN].set_alpn_select_callback(lambda _connection, _offered: b"h2")
    return {
        **{manner: kept.channel for manner, kept in credentials.items()},
        **{manner: partial(_bare_channel, context) for manner, context in contexts.items()},
    }


def _load(pair: Pair) -> tuple[list[x509.Certificate], ec.EllipticCurvePrivateKey]:
    key = load_pem_private_key(pair.key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey), "the laboratory's keys are P-256"
    return x509.load_pem_x509_certificates(pair.cert.read_bytes()), key


def _self_signed(now: datetime) -> tuple[list[x509.Certificate], ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)
        .not_valid_after(now + _DAY)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return [certificate], key


def _context(pair: Pair) -> SSL.Context:
    chain, key = _load(pair)
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.use_certificate(chain[0])
    context.use_privatekey(key)
    return context


def _bare_channel(context: SSL.Context) -> TlsChannel:
    connection = SSL.Connection(context, None)
    connection.set_accept_state()
    return TlsChannel(connection, None)
