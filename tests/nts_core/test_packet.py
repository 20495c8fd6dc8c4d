"""NTP packets, extension fields and the authenticator (RFC 5905, RFC 7822, RFC 8915 section 5)."""

import tomllib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from hypothesis import given
from hypothesis import strategies as st

from nts_core.aead import Aead
from nts_core.errors import NotAuthentic, WireError
from nts_core.packet import (
    MAX_DATAGRAM,
    Authenticator,
    ClockState,
    Field,
    FieldType,
    Header,
    Mode,
    Packet,
    encode_fields,
    parse_fields,
    protect,
)
from nts_core.wire import uint16

VECTORS = Path(__file__).parent.parent / "vectors"
KEY = bytes(range(32))
NONCE = bytes(range(16))
uint32s, uint64s = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
headers = st.builds(
    Header,
    leap=st.integers(0, 3),
    version=st.integers(1, 4),
    mode=st.integers(0, 7),
    stratum=st.integers(0, 255),
    poll=st.integers(-128, 127),
    precision=st.integers(-128, 127),
    root_delay=uint32s,
    root_dispersion=uint32s,
    reference_id=st.binary(min_size=4, max_size=4),
    reference=uint64s,
    origin=uint64s,
    receive=uint64s,
    transmit=uint64s,
)
kinds = st.integers(0, 0xFFFF).filter(lambda kind: kind != FieldType.AUTHENTICATOR)
values = st.integers(3, 30).flatmap(lambda words: st.binary(min_size=4 * words, max_size=4 * words))
some_fields = st.lists(st.builds(Field, type=kinds, value=values), max_size=6)


def vector(name):
    """The named octets of a vector file."""
    named = tomllib.loads((VECTORS / f"{name}.toml").read_text())
    return {key: bytes.fromhex(value) for key, value in named.items()}


def plain(fields):
    """Fields without the positions that parsing adds."""
    return [(field.type, field.value) for field in fields]


# AES-SIV


def test_aes_siv_of_rfc_5297_without_a_nonce():
    octets = vector("rfc5297-siv")
    sealed = AESSIV(octets["a1_key"]).encrypt(octets["a1_plaintext"], [octets["a1_ad"]])
    assert sealed == octets["a1_output"]


def test_aes_siv_of_rfc_5297_with_a_nonce():
    octets = vector("rfc5297-siv")
    data = [octets["a2_ad1"], octets["a2_ad2"], octets["a2_nonce"]]
    assert AESSIV(octets["a2_key"]).encrypt(octets["a2_plaintext"], data) == octets["a2_output"]


@pytest.mark.rfc8915("5.6-2")
def test_our_aead_puts_the_nonce_last():
    """RFC 5297 section 3: the nonce is the last string before the plaintext."""
    sealed = Aead(15, KEY).seal(NONCE, b"plaintext", b"data")
    assert AESSIV(KEY).decrypt(sealed, [b"data", NONCE]) == b"plaintext"


@given(st.binary(max_size=200), st.binary(min_size=1, max_size=32), st.binary(max_size=200))
def test_aead_round_trip(plaintext, nonce, data):
    """An empty plaintext is every NTS request."""
    aead = Aead(15, KEY)
    sealed = aead.seal(nonce, plaintext, data)
    assert len(sealed) == 16 + len(plaintext)
    assert aead.open(nonce, sealed, data) == plaintext


def test_aead_refuses_whatever_does_not_belong_together():
    aead = Aead(15, KEY)
    sealed = aead.seal(NONCE, b"plaintext", b"data")
    for nonce, ciphertext, data in (
        (bytes(16), sealed, b"data"),
        (NONCE, sealed, b"date"),
        (NONCE, sealed, b""),
        (NONCE, sealed[:-1], b"data"),
        (NONCE, sealed + b"\0", b"data"),
        (NONCE, b"", b"data"),
        (b"", sealed, b"data"),
        (NONCE, bytes(15), b"data"),
        (NONCE, bytes(16), b"data"),
    ):
        with pytest.raises(NotAuthentic):
            aead.open(nonce, ciphertext, data)
    with pytest.raises(NotAuthentic):
        Aead(15, KEY[::-1]).open(NONCE, sealed, b"data")


# Headers and fields


@given(headers)
def test_header_round_trip(header):
    octets = header.encode()
    assert len(octets) == 48
    assert Header.decode(octets) == header


@given(st.binary(min_size=48, max_size=48))
def test_header_octets_round_trip(octets):
    version = octets[0] >> 3 & 7
    if 1 <= version <= 4:
        assert Header.decode(octets).encode() == octets
    else:
        with pytest.raises(WireError):
            Header.decode(octets)


def test_every_truncation_of_a_header_is_refused():
    octets = Header().encode()
    for length in range(48):
        with pytest.raises(WireError):
            Header.decode(octets[:length])
        with pytest.raises(WireError):
            Packet.decode(octets[:length])


@pytest.mark.rfc8915("5.6-8")
@given(some_fields)
def test_field_round_trip(fields):
    octets = encode_fields(fields)
    parsed = parse_fields(octets)
    assert plain(parsed) == plain(fields)
    assert encode_fields(parsed) == octets
    for field in parsed:
        assert octets[field.start : field.start + 2] == uint16(field.type)


@given(st.binary(max_size=40))
def test_a_short_or_odd_value_is_padded_with_zeroes(value):
    (parsed,) = parse_fields(Field(0x1234, value).encode())
    assert len(parsed.value) == max(12, len(value) + -len(value) % 4)
    assert parsed.value.rstrip(b"\0") == value.rstrip(b"\0")


@pytest.mark.parametrize(
    "octets",
    [
        "0104",
        "01040000" + "00" * 12,
        "01040004",
        "0104000c" + "00" * 12,
        "01040011" + "00" * 16,
        "01040012" + "00" * 16,
        "01040014" + "00" * 12,
        "0104ffff" + "00" * 12,
        "01040010" + "00" * 16,
    ],
)
def test_malformed_fields(octets):
    with pytest.raises(WireError):
        parse_fields(bytes.fromhex(octets))


@given(st.binary(max_size=300))
def test_random_fields_parse_or_raise_wire_error(octets):
    try:
        parsed = parse_fields(octets)
    except WireError:
        return
    assert encode_fields(parsed) == octets


@given(st.binary(max_size=400))
def test_random_datagrams_parse_or_raise_wire_error(datagram):
    try:
        packet = Packet.decode(datagram)
    except WireError:
        return
    with pytest.raises(NotAuthentic):
        packet.decrypt(datagram, Aead(15, KEY))


def test_a_datagram_that_is_too_long():
    fill = Field(0x1234, bytes(MAX_DATAGRAM - 48 - 4)).encode()
    assert len(Packet.decode(Header().encode() + fill).fields) == 1
    with pytest.raises(WireError):
        Packet.decode(Header().encode() + fill + Field(0x1234, b"").encode())


# The authenticator


@pytest.mark.rfc8915("5.6-1")
@given(st.binary(min_size=1, max_size=40), st.binary(min_size=16, max_size=200))
def test_authenticator_round_trip(nonce, ciphertext):
    authenticator = Authenticator(nonce, ciphertext)
    (field,) = parse_fields(authenticator.encode())
    assert field.type == FieldType.AUTHENTICATOR
    assert len(authenticator.encode()) == Authenticator.length(len(nonce), len(ciphertext) - 16)
    assert Authenticator.decode(field.value) == authenticator


@pytest.mark.rfc8915("5.6-1")
@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.binary(max_size=80))
def test_lengths_of_an_authenticator_are_checked(nonce_length, ciphertext_length, rest):
    """Lengths beyond the field crashed cfnts (CVE-2023-3036)."""
    needed = sum(length + -length % 4 for length in (nonce_length, ciphertext_length))
    value = uint16(nonce_length) + uint16(ciphertext_length) + rest
    if needed > len(rest) or not nonce_length:
        with pytest.raises(WireError):
            Authenticator.decode(value)
    else:
        found = Authenticator.decode(value)
        assert (len(found.nonce), len(found.ciphertext)) == (nonce_length, ciphertext_length)


def test_additional_padding_is_skipped():
    """Section 5.6: senders may pad the authenticator with more than is needed."""
    value = Authenticator(NONCE, bytes(16)).encode()[4:]
    assert Authenticator.decode(value + bytes(20)) == Authenticator(NONCE, bytes(16))


@pytest.mark.rfc8915("5.6-6", "5.6-7")
@given(headers, some_fields, some_fields, st.binary(min_size=1, max_size=24))
def test_a_protected_packet_opens(header, fields, hidden, nonce):
    datagram = protect(header.encode() + encode_fields(fields), encode_fields(hidden), Aead(15, KEY), nonce)
    packet = Packet.decode(datagram)
    assert packet.header == header
    assert plain(packet.fields) == plain(fields)
    assert plain(packet.decrypt(datagram, Aead(15, KEY))) == plain(hidden)


def a_packet():
    clear = Header(transmit=7).encode() + Field(FieldType.UNIQUE_IDENTIFIER, bytes(32)).encode()
    return protect(clear, Field(FieldType.COOKIE, b"c" * 100).encode(), Aead(15, KEY), NONCE)


def opens(datagram):
    try:
        Packet.decode(datagram).decrypt(datagram, Aead(15, KEY))
    except (WireError, NotAuthentic):
        return False
    return True


def test_every_truncation_of_a_packet_is_refused():
    datagram = a_packet()
    assert opens(datagram)
    for length in range(len(datagram)):
        assert not opens(datagram[:length]), length


@pytest.mark.rfc8915("5.6-2", "5.6-5")
def test_every_flipped_bit_is_found():
    datagram = a_packet()
    for position in range(len(datagram) * 8):
        forged = bytearray(datagram)
        forged[position // 8] ^= 1 << position % 8
        assert not opens(bytes(forged)), position


def test_a_packet_without_authenticator_is_not_authentic():
    datagram = Header().encode() + Field(FieldType.UNIQUE_IDENTIFIER, bytes(32)).encode()
    with pytest.raises(NotAuthentic):
        Packet.decode(datagram).decrypt(datagram, Aead(15, KEY))


@pytest.mark.rfc8915("5.7-16", "5.7-28")
def test_fields_after_the_authenticator_are_left_out():
    """Section 5.7: unauthenticated fields must be discarded."""
    datagram = a_packet() + Field(FieldType.COOKIE, b"f" * 100).encode()
    packet = Packet.decode(datagram)
    assert [field.type for field in packet.fields] == [FieldType.UNIQUE_IDENTIFIER]
    assert plain(packet.decrypt(datagram, Aead(15, KEY))) == [(FieldType.COOKIE, b"c" * 100)]


def test_only_the_first_authenticator_counts():
    datagram = a_packet() + Authenticator(NONCE, bytes(32)).encode()
    assert opens(datagram)


@pytest.mark.rfc8915("5.6-9")
@pytest.mark.parametrize("value", [b"", b"\1\2\3\4", b"\1\2\3\4\5\6\7\x08"])
def test_encrypted_fields_may_be_arbitrarily_short(value):
    """Section 5.6: "encrypted extension fields MAY be arbitrarily short", in multiples of four octets."""
    clear = Header().encode() + Field(FieldType.UNIQUE_IDENTIFIER, bytes(32)).encode()
    plaintext = uint16(0x1234) + uint16(4 + len(value)) + value
    sealed = Authenticator(NONCE, Aead(15, KEY).seal(NONCE, plaintext, clear)).encode()
    datagram = clear + sealed
    assert plain(Packet.decode(datagram).decrypt(datagram, Aead(15, KEY))) == [(0x1234, value)]


@pytest.mark.rfc8915("5.6-8", "5.6-10")
@pytest.mark.parametrize("plaintext", [b"\0", bytes(4), b"\1\4\0\x10", b"\1\4\0\3" + bytes(12)])
def test_malformed_encrypted_fields_are_not_accepted(plaintext):
    clear = Header().encode()
    datagram = clear + Authenticator(NONCE, Aead(15, KEY).seal(NONCE, plaintext, clear)).encode()
    with pytest.raises(NotAuthentic):
        Packet.decode(datagram).decrypt(datagram, Aead(15, KEY))


@given(headers, headers, uint64s, uint64s)
def test_the_header_of_an_answer(asked, template, receive, transmit):
    facts = ClockState(
        template.leap,
        template.stratum,
        template.precision,
        template.root_delay,
        template.root_dispersion,
        template.reference_id,
        template.reference,
    )
    answer = Header.decode(facts.answer(asked.version, asked.poll, asked.transmit, receive, transmit))
    assert answer.mode == Mode.SERVER
    assert (answer.version, answer.poll) == (asked.version, asked.poll)
    assert (answer.origin, answer.receive, answer.transmit) == (asked.transmit, receive, transmit)
    assert (answer.leap, answer.stratum) == (template.leap, template.stratum)


# Captured packets


@pytest.mark.rfc8915("5.6-1", "5.6-2", "5.6-3", "5.6-5")
def test_the_requests_of_chronyd_open():
    octets = vector("chrony-ntp-requests")
    for missing in range(4):
        datagram = octets[f"request_{missing}"]
        packet = Packet.decode(datagram)
        assert packet.decrypt(datagram, Aead(15, octets["c2s"])) == []
        assert len(packet.of_type(FieldType.UNIQUE_IDENTIFIER)[0].value) == 32
        assert len(packet.of_type(FieldType.COOKIE)) == 1
        assert len(packet.of_type(FieldType.COOKIE_PLACEHOLDER)) == missing
        with pytest.raises(NotAuthentic):
            packet.decrypt(datagram, Aead(15, octets["s2c"]))


@pytest.mark.rfc8915("5.6-1", "5.6-2", "5.6-4", "5.6-5", "5.6-7")
def test_the_answer_of_chronyd_opens():
    octets = vector("chrony-ntp-answer")
    request, answer = Packet.decode(octets["request"]), Packet.decode(octets["answer"])
    assert answer.header.origin == request.header.transmit
    assert (answer.header.mode, answer.header.stratum) == (Mode.SERVER, 10)
    hidden = answer.decrypt(octets["answer"], Aead(15, octets["s2c"]))
    assert [(field.type, len(field.value)) for field in hidden] == [(FieldType.COOKIE, 100)] * 4
