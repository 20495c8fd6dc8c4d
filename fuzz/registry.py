"""Targets of the registry: certificate requests and chains, names and addresses."""

import base64
import datetime as dt
import ipaddress

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from fuzz.target import NOW, Plan, Target, hold
from nts_core.certificates import ChainError, CsrError, chain_facts, check_chain, check_csr
from nts_core.errors import printable
from nts_core.independence import prefix_of
from nts_core.srv import MAX_LABEL
from poolsvc.errors import InvalidAddress, InvalidName
from poolsvc.names import DOMAIN, check_address, check_addresses, check_name, is_label

_DOMAIN = "alice.servers.pool.example"
# Fixed, so that files of the corpus stay what they are; it protects nothing.
_KEY = ec.derive_private_key(0xF022, ec.SECP256R1())
_ECDSA_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")
_SAN = x509.SubjectAlternativeName([x509.DNSName(_DOMAIN)])
_WHEN = dt.datetime.fromtimestamp(NOW, dt.UTC)
_REQUEST = (
    x509.CertificateSigningRequestBuilder()
    .subject_name(x509.Name([]))
    .add_extension(_SAN, critical=False)
    .sign(_KEY, hashes.SHA256())
)
_AS_SENT, _IN_ARMOUR, _SIGNED = range(3)


def _der(tag: int, content: bytes) -> bytes:
    length = len(content)
    if length < 128:
        return bytes((tag, length)) + content
    count = (length.bit_length() + 7) // 8
    return bytes((tag, 0x80 | count)) + length.to_bytes(count) + content


def _armour(label: str, der: bytes) -> str:
    return f"-----BEGIN {label}-----\n{base64.encodebytes(der).decode()}-----END {label}-----\n"


def _signed(content: bytes) -> bytes:
    """What `content` is the inside of, signed by our key: a request or a certificate."""
    signature = _KEY.sign(content, ec.ECDSA(hashes.SHA256()))
    return _der(0x30, content + _ECDSA_SHA256 + _der(0x03, b"\0" + signature))


def _pem(label: str, form: int, octets: bytes) -> str:
    """`octets` as a text that was sent, as the DER in the armour, or as what is signed of it."""
    match form % 3:
        case 0:
            return octets.decode("utf-8", "replace")
        case 1:
            return _armour(label, octets)
        case _:
            return _armour(label, _signed(octets))


def _csr(data: bytes) -> str:
    """First octet: whether the rest is text, DER or what is to be signed."""
    plan = Plan(data)
    pem = _pem("CERTIFICATE REQUEST", plan.octet(), plan.rest())
    try:
        check_csr(pem, _DOMAIN)
    except CsrError as error:
        hold(printable(str(error)) == str(error)[:1000], "the fault can be shown")
        return "refused"
    csr = x509.load_pem_x509_csr(pem.encode())
    san = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    hold(san.public_bytes() == _SAN.public_bytes(), "the domain is the only name")
    hold(csr.subject.rfc4514_string() in {"", f"CN={_DOMAIN}"}, "the subject names nothing else")
    return "accepted"


def _chain(data: bytes) -> str:
    """First octet: whether the rest is text, DER or what is to be signed."""
    plan = Plan(data)
    pem = _pem("CERTIFICATE", plan.octet(), plan.rest())
    try:
        facts = chain_facts(pem)
    except ChainError:
        return "unreadable"
    hold(len(facts.fingerprint) == len(facts.spki_sha256) == 64, "SHA-256 has 64 digits")
    try:
        check_chain(pem, _REQUEST.public_bytes(Encoding.PEM).decode(), _DOMAIN)
    except ChainError as error:
        hold(printable(str(error)) == str(error)[:1000], "the fault can be shown")
        return "refused"
    leaf = x509.load_pem_x509_certificates(pem.encode())[0]
    hold(leaf.public_key() == _KEY.public_key(), "the certificate is for the request's key")
    san = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    hold(san.public_bytes() == _SAN.public_bytes(), "the domain is the only name")
    return "accepted"


def _names(data: bytes) -> str:
    text, read = data.decode("utf-8", "replace"), []
    try:
        name = check_name(text)
        hold(check_name(name) == name and is_label(name), "a good name stays good")
        hold(name.isascii() and len(name) <= MAX_LABEL, "a name is a short ASCII label")
        hold(DOMAIN.fullmatch(f"{name}.pool.example"), "a name makes a domain")
        read.append("name")
    except InvalidName as error:
        hold(error.remedy and error.field == "name", "a refusal names the field and the remedy")
    try:
        address = check_address(text, allow_private=True)
        hold(check_address(str(address), allow_private=True) == address, "an address reads as it is written")
        hold(address in ipaddress.ip_network(prefix_of(str(address))), "an address is in its prefix")
        read.append("address")
    except InvalidAddress as error:
        hold(error.remedy and error.field == "addresses", "a refusal names the field and the remedy")
    try:
        listed = check_addresses(text.split("\n"), allow_private=False)
        found = [ipaddress.ip_address(each) for each in listed]
        hold(all(each.is_global and not each.is_multicast for each in found), "addresses are global unicast")
        hold(len(set(listed)) == len(listed), "each address is listed once")
        read.append("public")
    except InvalidAddress as error:
        hold(error.remedy and error.field == "addresses", "a refusal names the field and the remedy")
    return "-".join(read) or "refused"


TARGETS = (
    Target(
        "csr",
        "Only CsrError, fit to be shown; what is accepted names the domain alone.",
        _csr,
        frozenset({"refused", "accepted"}),
        tokens=(b"-----BEGIN CERTIFICATE REQUEST-----\n", _SAN.public_bytes(), _DOMAIN.encode()),
    ),
    Target(
        "chain",
        "Only ChainError, fit to be shown; what is accepted is for the request's key and the domain alone.",
        _chain,
        frozenset({"unreadable", "refused", "accepted"}),
        tokens=(b"-----BEGIN CERTIFICATE-----\n", _SAN.public_bytes(), _DOMAIN.encode()),
    ),
    Target(
        "names",
        "Only InvalidName, ReservedName and InvalidAddress, with field and remedy; what is accepted stays accepted;"
        " public addresses are global unicast.",
        _names,
        frozenset({"refused", "name", "address", "address-public", "public"}),
        longest=400,
        tokens=(b"xn--", b"::ffff:1.2.3.4", b"2002::1", b"fe80::1%1", b"2001:db8::1", b"9.9.9.9\n"),
    ),
)
