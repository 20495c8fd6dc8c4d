"""A small certification authority for servers that the laboratory starts."""

import ipaddress
import socket
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nts_core.tls import acme_identifier

_DAY = timedelta(days=1)
_PEM = serialization.Encoding.PEM
_CA_USAGE = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


class Pair(NamedTuple):
    """PEM files of a chain (leaf first) and its key."""

    cert: Path
    key: Path


class Authority:
    """A root that lives for a month, or between the times given; `root` is its PEM file."""

    def __init__(
        self, directory: Path, *, not_before: datetime | None = None, not_after: datetime | None = None
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "laboratory root")])
        now = datetime.now(UTC)
        self._certificate = (
            x509.CertificateBuilder()
            .subject_name(self._name)
            .issuer_name(self._name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(not_before or now - _DAY)
            .not_valid_after(not_after or now + 30 * _DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_CA_USAGE, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        self.root = directory / "root.pem"
        self.root.write_bytes(self._certificate.public_bytes(_PEM))

    def issue(
        self,
        *names: str,
        not_before: datetime | None = None,
        not_after: datetime | None = None,
        common_name: str | None = None,
        file: str | None = None,
    ) -> Pair:
        """A certificate for DNS names and IP addresses, valid now unless told otherwise."""
        key = ec.generate_private_key(ec.SECP256R1())
        chain = self._chain(key.public_key(), names, not_before, not_after, common_name)
        return _write(self.directory / (file or names[0].replace(":", "_")), chain, key)

    def chain_for(
        self, csr_pem: str, *, not_before: datetime | None = None, not_after: datetime | None = None
    ) -> str:
        """A chain (PEM) for the key and the names of a request, whoever sent it."""
        csr = x509.load_pem_x509_csr(csr_pem.encode())
        key = csr.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        dns_names = names.get_values_for_type(x509.DNSName)
        return self._chain(key, dns_names, not_before, not_after, None).decode()

    def _chain(
        self,
        key: ec.EllipticCurvePublicKey,
        names: Sequence[str],
        not_before: datetime | None,
        not_after: datetime | None,
        common_name: str | None,
    ) -> bytes:
        now = datetime.now(UTC)
        leaf = (
            x509.CertificateBuilder()
            .subject_name(x509.Name(_common_name(common_name)))
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(not_before or now - _DAY)
            .not_valid_after(not_after or now + 10 * _DAY)
            # Critical exactly when there is no subject (RFC 5280 section 4.2.1.6).
            .add_extension(
                x509.SubjectAlternativeName([_general(name) for name in names]), critical=common_name is None
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return leaf.public_bytes(_PEM) + self._certificate.public_bytes(_PEM)


def challenge_pair(directory: Path, domain: str, digest: str) -> Pair:
    """What answers TLS-ALPN-01 for a domain: a certificate that nobody signed, with the digest (hex) in it."""
    now, key = datetime.now(UTC), ec.generate_private_key(ec.SECP256R1())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name([]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)
        .not_valid_after(now + _DAY)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(domain)]), critical=True)
        .add_extension(acme_identifier(digest), critical=True)
        .sign(key, hashes.SHA256())
    )
    return _write(directory / f"challenge-{digest[:8]}", certificate.public_bytes(_PEM), key)


def _write(stem: Path, chain: bytes, key: ec.EllipticCurvePrivateKey) -> Pair:
    pair = Pair(stem.with_name(f"{stem.name}.pem"), stem.with_name(f"{stem.name}.key"))
    pair.cert.write_bytes(chain)
    pair.key.write_bytes(
        key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    pair.key.chmod(0o600)
    return pair


def _common_name(text: str | None) -> list[x509.NameAttribute[str]]:
    return [] if text is None else [x509.NameAttribute(NameOID.COMMON_NAME, text)]


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def shown_certificate(address: str, port: int) -> str:
    """The certificate (PEM) of an NTS-KE server, whoever issued it. Native packets show it to clients of NTS-KE alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["ntske/1"])
    with socket.create_connection((address, port), timeout=5) as sock, context.wrap_socket(sock) as tls:
        return ssl.DER_cert_to_PEM_cert(tls.getpeercert(binary_form=True) or b"")
