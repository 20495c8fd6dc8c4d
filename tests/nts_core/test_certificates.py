"""What requests and chains are refused for, pure."""

import contextlib
import datetime as dt

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from nts_core import weak_keys
from nts_core.certificates import (
    ChainError,
    CsrError,
    certificate_id,
    chain_facts,
    check_chain,
    check_csr,
    moment_of,
    renew_at,
    renew_by,
)
from nts_core.errors import DETAIL_LIMIT, printable

NAME = "alice.servers.pool.example"
SAN = x509.SubjectAlternativeName([x509.DNSName(NAME)])
NOW = dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC)


def make_csr(*, key=None, extensions=((SAN, False),), subject=()) -> str:
    key = key or ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(subject))
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def test_a_request_of_our_form_is_accepted():
    check_csr(make_csr(), NAME)
    common = x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)
    check_csr(make_csr(subject=[common]), NAME)


def bad_signature() -> str:
    der = x509.load_pem_x509_csr(make_csr().encode()).public_bytes(serialization.Encoding.DER)
    for position in range(len(der) - 4, len(der)):
        broken = der[:position] + bytes([der[position] ^ 1]) + der[position + 1 :]
        with contextlib.suppress(ValueError):
            csr = x509.load_der_x509_csr(broken)
            return csr.public_bytes(serialization.Encoding.PEM).decode()
    pytest.fail("no octet of the signature can be changed")


def san(*names: x509.GeneralName):
    return [(x509.SubjectAlternativeName(names), False)]


OTHER = x509.DNSName("bob.servers.pool.example")
CLIENT_AUTH = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.CLIENT_AUTH])


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: make_csr(extensions=san(OTHER)), "names must be"),
        (lambda: make_csr(extensions=san(x509.DNSName(NAME), OTHER)), "names must be"),
        (lambda: make_csr(extensions=san(x509.DNSName("*." + NAME))), "names must be"),
        (lambda: make_csr(extensions=san(x509.UniformResourceIdentifier("http://x/"))), "names must be"),
        (lambda: make_csr(extensions=[]), "subjectAltName"),
        (lambda: make_csr(extensions=[*san(x509.DNSName(NAME)), (CLIENT_AUTH, False)]), "only extension"),
        (
            lambda: make_csr(subject=[x509.NameAttribute(x509.NameOID.COMMON_NAME, "bob.example")]),
            "subject must be",
        ),
        (
            lambda: make_csr(subject=[x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, NAME)]),
            "subject must be",
        ),
        (lambda: make_csr(key=rsa.generate_private_key(65_537, 2048)), "P-256"),
        (lambda: make_csr(key=ec.generate_private_key(ec.SECP384R1())), "P-256"),
        (bad_signature, "signature"),
        (lambda: "garbage", "not a certificate signing request"),
        (lambda: "", "not a certificate signing request"),
        (lambda: make_csr().replace("M", "A", 5), "not a certificate signing request"),
        (lambda: make_csr() + "\n" * 70_000, "longer than"),
        (lambda: make_csr() + "\x00", "NUL"),
        (lambda: make_csr().replace("-----BEGIN", "\udce4-----BEGIN"), "not a certificate signing request"),
    ],
)
def test_other_requests_are_refused_by_their_fault(make, fault):
    with pytest.raises(CsrError, match=fault):
        check_csr(make(), NAME)


X_COORDINATES = {
    "RFC 5903 section 8.1, initiator": "DAD0B65394221CF9B051E1FECA5787D098DFE637FC90B9EF945D0C3772581180",
    "RFC 5903 section 8.1, responder": "D12DFB5289C8D4F81208B70270398C342296970A0BCCB74C736FC7554494BF63",
    "RFC 6979 appendix A.2.5": "60FED4BA255A9D31C961EB74C6356D68C049B8923B61FA6CE669622E60F29FB6",
    "RFC 7515 appendix A.3": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
    "RFC 7517 appendix A.2": "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4",
    "RFC 7518 appendix C, Alice": "gI0GAILBdu7T53akrFmMyGcsF3n5dO7MmwNBHKW5SV0",
    "RFC 7518 appendix C, Bob": "weNJy2HscCSM6AEDTDg04biOvhFhyyWvOHQfeF_PxMQ",
    "RFC 9500 section 2.3": "422548F88FB782FFB5ECA3744452C72A1E558FBD6F73BE5E48E93232CC45C5B1",
}


@pytest.mark.parametrize("source", weak_keys.PUBLISHED)
def test_a_key_that_a_standard_prints_is_refused(source):
    """The public key that the standard prints beside it says that none was copied wrongly."""
    key = ec.derive_private_key(weak_keys.scalar(weak_keys.PUBLISHED[source]), ec.SECP256R1())
    assert key.public_key().public_numbers().x == weak_keys.scalar(X_COORDINATES[source])
    with pytest.raises(CsrError, match="others have the private key"):
        check_csr(make_csr(key=key), NAME)


def test_a_key_of_a_small_number_or_its_negative_is_refused():
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    for number in (1, 2, weak_keys.SMALLEST, order - 1, order - weak_keys.SMALLEST):
        with pytest.raises(CsrError, match="small number"):
            check_csr(make_csr(key=ec.derive_private_key(number, ec.SECP256R1())), NAME)
    check_csr(make_csr(key=ec.derive_private_key(weak_keys.SMALLEST + 1, ec.SECP256R1())), NAME)


def self_signed(key, name=NAME) -> str:
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), 0xABC, NOW, NOW + dt.timedelta(days=6))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def test_chain_facts_of_a_known_certificate():
    key = ec.generate_private_key(ec.SECP256R1())
    facts = chain_facts(self_signed(key))
    assert facts.serial == "abc"
    assert (facts.not_before, facts.not_after) == (NOW, NOW + dt.timedelta(days=6))
    assert len(facts.fingerprint) == len(facts.spki_sha256) == 64
    assert facts.spki_sha256 == chain_facts(self_signed(key, "bob.example")).spki_sha256
    assert facts.fingerprint != chain_facts(self_signed(key, "bob.example")).fingerprint


def test_a_certificate_with_a_key_of_an_unknown_kind_has_no_facts():
    der = x509.load_pem_x509_certificate(self_signed(ec.generate_private_key(ec.SECP256R1())).encode())
    oid = bytes.fromhex("2a8648ce3d0201")  # id-ecPublicKey
    changed = der.public_bytes(serialization.Encoding.DER).replace(oid, oid[:-1] + b"\x7f")
    pem = x509.load_der_x509_certificate(changed).public_bytes(serialization.Encoding.PEM).decode()
    with pytest.raises(ChainError):
        chain_facts(pem)


def test_a_chain_for_another_key_or_name_or_out_of_order_is_refused():
    key, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    csr = make_csr(key=key)
    check_chain(self_signed(key), csr, NAME)
    for chain, fault in (
        (self_signed(other), "request's key"),
        (self_signed(key, "bob.example"), "bob"),
        (self_signed(key) + self_signed(other), "together"),
        ("garbage", "not a certificate chain"),
        ("", "not a certificate chain"),
        (self_signed(key) * 200, "longer than"),
    ):
        with pytest.raises(ChainError, match=fault):
            check_chain(chain, csr, NAME)


@pytest.mark.parametrize(("life", "after"), [(90, 60), (45, 30), (10, 10 * 2 / 3), (6, 3), (1, 0.5)])
def test_renewal_is_due_with_a_third_of_the_life_left_or_half_of_a_short_one(life, after):
    assert renew_at(NOW, NOW + dt.timedelta(days=life)) == NOW + dt.timedelta(days=after)


@pytest.mark.parametrize("days", [1, 6, 10, 45, 90])
def test_the_latest_renewal_is_between_the_right_moment_and_the_warning(days):
    end = NOW + dt.timedelta(days=days)
    begin = renew_at(NOW, end)
    assert begin < renew_by(NOW, end) < begin + (end - begin) / 2


def test_a_draw_is_a_moment_of_the_window():
    end = NOW + dt.timedelta(hours=4)
    assert [moment_of(NOW, end, draw) for draw in (0, 0.25, 1)] == [NOW, NOW + dt.timedelta(hours=1), end]


def issued_by(key_identifier, serial) -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    end = NOW + dt.timedelta(days=6)
    builder = x509.CertificateBuilder(name, name, key.public_key(), serial, NOW, end)
    builder = builder.add_extension(x509.AuthorityKeyIdentifier(*key_identifier), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


@pytest.mark.parametrize(
    ("serial", "end"), [(0x87654321, "AIdlQyE"), (0x7F, "fw"), (0x80, "AIA"), (0x0100, "AQA")]
)
def test_a_certificate_is_known_by_its_issuers_key_and_its_serial(serial, end):
    """The first one is the example of RFC 9773 section 4.1."""
    issuer = bytes.fromhex("69885b6b87464041e1b37b847ba0ae2cde01c8d4")
    assert certificate_id(issued_by((issuer, None, None), serial)) == f"aYhba4dGQEHhs3uEe6CuLN4ByNQ.{end}"


def test_a_certificate_that_does_not_name_its_issuers_key_is_not_known():
    name = x509.DirectoryName(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")]))
    for pem in (
        self_signed(ec.generate_private_key(ec.SECP256R1())),
        issued_by((None, [name], 7), 1),
        "",
        "x",
    ):
        with pytest.raises(ChainError):
            certificate_id(pem)


def test_a_peers_words_are_bounded_and_without_control_characters():
    assert printable("a\nb\x1b[31m\u202ec") == "a b [31m c"
    assert printable("w" * 5000) == "w" * DETAIL_LIMIT
