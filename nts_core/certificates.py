"""Requests and chains: what may be ordered and what may be installed. Pure."""

import base64
import datetime as dt
import hashlib
from dataclasses import dataclass
from itertools import pairwise

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from nts_core import weak_keys
from nts_core.errors import printable
from nts_core.tls import acme_identifier

PEM_LIMIT = 65_536  # characters of a chain or CSR
SHORT_LIFE = dt.timedelta(days=10)

_X509_FAULTS = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


class CsrError(Exception):
    """A certificate signing request that is not what this pool orders; the text names the fault."""


class ChainError(Exception):
    """A certificate chain that does not belong to the request it was ordered for."""


@dataclass(frozen=True, slots=True)
class ChainFacts:
    """The leaf: SHA-256 of its DER and of its public key (SPKI) and its serial, in lower-case hex."""

    fingerprint: str
    serial: str
    not_before: dt.datetime
    not_after: dt.datetime
    spki_sha256: str


def check_csr(pem: str, domain: str) -> None:
    """A signed request for a P-256 key with one name, the domain, and no extension but that name's.

    CsrError names the fault.
    """
    if len(pem) > PEM_LIMIT:
        raise CsrError(f"the request is longer than {PEM_LIMIT} characters")
    if "\x00" in pem:  # readers skip what stands around the armour; PostgreSQL cannot store it
        raise CsrError("not a certificate signing request: it contains a NUL")
    try:
        csr = x509.load_pem_x509_csr(pem.encode())
        key, signed, algorithm = csr.public_key(), csr.is_signature_valid, csr.signature_hash_algorithm
        extensions, attributes, subject = list(csr.extensions), list(csr.attributes), list(csr.subject)
    except _X509_FAULTS as error:
        raise CsrError(f"not a certificate signing request: {printable(str(error))}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise CsrError("the key is not a P-256 key")
    if weak_keys.is_known(key):
        raise CsrError("others have the private key: it is one of a standard's examples, or a small number")
    if not signed or not isinstance(algorithm, hashes.SHA256 | hashes.SHA384 | hashes.SHA512):
        raise CsrError("the signature is not valid for the request's key and SHA-2")
    if [e.oid for e in extensions] != [x509.OID_SUBJECT_ALTERNATIVE_NAME] or len(attributes) != 1:
        raise CsrError("subjectAltName must be the only extension and attribute")
    names = list(extensions[0].value) if isinstance(extensions[0].value, x509.SubjectAlternativeName) else []
    if names != [x509.DNSName(domain)]:
        raise CsrError(f"the names must be {domain} alone, not {printable(repr(names))}")
    if any(a.oid != x509.NameOID.COMMON_NAME or a.value != domain for a in subject):
        raise CsrError(f"the subject must be empty or the common name {domain}")


def csr_name(pem: str) -> str:
    """The first name that a request asks for. Raises CsrError."""
    try:
        names = x509.load_pem_x509_csr(pem.encode()).extensions
        found = names.get_extension_for_class(x509.SubjectAlternativeName).value
        return found.get_values_for_type(x509.DNSName)[0]
    except (*_X509_FAULTS, x509.ExtensionNotFound, IndexError) as error:
        raise CsrError(f"not a certificate signing request: {printable(str(error))}") from error


def csr_key_sha256(pem: str) -> str:
    """SHA-256 of a request's public key (SPKI) in lower-case hex. Raises CsrError."""
    try:
        return hashlib.sha256(_spki(x509.load_pem_x509_csr(pem.encode()))).hexdigest()
    except _X509_FAULTS as error:
        raise CsrError(f"not a certificate signing request: {printable(str(error))}") from error


def key_sha256(key: ec.EllipticCurvePublicKey) -> str:
    """The same for a key itself."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def load_chain(pem: str) -> list[x509.Certificate]:
    """The certificates of a PEM text, at least one; ChainError when there is none or the text is too long."""
    if len(pem) > PEM_LIMIT:
        raise ChainError(f"the chain is longer than {PEM_LIMIT} characters")
    try:
        return x509.load_pem_x509_certificates(pem.encode())
    except _X509_FAULTS as error:
        raise ChainError(f"not a certificate chain: {printable(str(error))}") from error


def chain_facts(chain_pem: str) -> ChainFacts:
    """Facts of the first certificate; ChainError when there is none, or none of a kind that can be read."""
    leaf = load_chain(chain_pem)[0]
    try:
        return ChainFacts(
            fingerprint=leaf.fingerprint(hashes.SHA256()).hex(),
            serial=f"{leaf.serial_number:x}",
            not_before=leaf.not_valid_before_utc,
            not_after=leaf.not_valid_after_utc,
            spki_sha256=hashlib.sha256(_spki(leaf)).hexdigest(),
        )
    except _X509_FAULTS as error:
        raise ChainError(f"not a usable certificate: {printable(str(error))}") from error


def check_chain(chain_pem: str, csr_pem: str, domain: str) -> None:
    """The leaf has the request's key and exactly the domain's name, and each certificate signs the one before."""
    chain = load_chain(chain_pem)
    try:
        if _spki(chain[0]) != _spki(x509.load_pem_x509_csr(csr_pem.encode())):
            raise ChainError("the certificate is not for the request's key")
        names = list(chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
        for certificate, issuer in pairwise(chain):
            certificate.verify_directly_issued_by(issuer)
    except (*_X509_FAULTS, x509.ExtensionNotFound, InvalidSignature) as error:
        raise ChainError(f"the chain does not hold together: {printable(str(error))}") from error
    if names != [x509.DNSName(domain)]:
        raise ChainError(f"the certificate names {printable(repr(names))}, not {domain} alone")


def check_challenge_certificate(der: bytes, domain: str, digest: str) -> None:
    """What a host shows by TLS-ALPN-01 (RFC 8737 section 3): the domain alone, and the digest (hex) of what the CA asks for.

    ChainError names the fault.
    """
    wanted = acme_identifier(digest)
    try:
        extensions = x509.load_der_x509_certificate(der).extensions
        names = list(extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
        found = extensions.get_extension_for_oid(wanted.oid)
    except (*_X509_FAULTS, x509.ExtensionNotFound) as error:
        raise ChainError(f"not a certificate for TLS-ALPN-01: {printable(str(error))}") from error
    if names != [x509.DNSName(domain)]:
        raise ChainError(f"the certificate names {printable(repr(names))}, not {domain} alone")
    if found.value != wanted or not found.critical:
        raise ChainError("the certificate answers another challenge")


def _spki(holder: x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    return holder.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def renew_at(not_before: dt.datetime, not_after: dt.datetime) -> dt.datetime:
    """When a third of the life is left; when half is left for lives under 10 days."""
    life = not_after - not_before
    return not_after - life / (2 if life < SHORT_LIFE else 3)


def renew_by(not_before: dt.datetime, not_after: dt.datetime) -> dt.datetime:
    """The latest moment of a renewal, whatever a CA suggests: with a quarter of the time that `renew_at` leaves gone.

    Enough is left for an order that fails, and for its repetitions.
    """
    begin = renew_at(not_before, not_after)
    return begin + (not_after - begin) / 4


def moment_of(start: dt.datetime, end: dt.datetime, draw: float) -> dt.datetime:
    """The moment of a CA's window (RFC 9773 section 4.2) that a random number from 0 to 1 draws."""
    return start + (end - start) * draw


def certificate_id(chain_pem: str) -> str:
    """How a CA with renewal information knows the first certificate (RFC 9773 section 4.1).

    ChainError of one that cannot be known: without a key identifier of its issuer.
    """
    leaf = load_chain(chain_pem)[0]
    try:
        issuer = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    except (*_X509_FAULTS, x509.ExtensionNotFound) as error:
        raise ChainError(f"no authority key identifier: {printable(str(error))}") from error
    if issuer is None:
        raise ChainError("no authority key identifier")
    # As in DER: an octet more where the first bit is set, which would make it negative.
    serial = leaf.serial_number.to_bytes(leaf.serial_number.bit_length() // 8 + 1)
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in (issuer, serial))
