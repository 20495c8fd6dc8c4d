"""What the NTP server answers to one datagram, and what it never does (RFC 8915 section 5.7)."""

import secrets
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nts_core import ntptime
from nts_core.aead import KEY_LENGTH, Aead, AeadId, SessionKeys
from nts_core.association import Association
from nts_core.cookies import DAY, CookieKey, Keyring, Schedule
from nts_core.errors import WireError
from nts_core.ke import KeResult
from nts_core.packet import (
    Authenticator,
    Field,
    FieldType,
    Header,
    Leap,
    Mode,
    Packet,
    encode_fields,
    protect,
)
from nts_core.server import ClockState, Drop, Kiss, NtpServer, Outcome, Reply

VECTORS = Path(__file__).parent.parent / "vectors"
SECOND = 1_000_000_000
RECEIVED = 1_800_000_000 * SECOND
TRANSMITTED = RECEIVED + 20_000
KEYS = SessionKeys(AeadId.AES_SIV_CMAC_256, bytes(range(32)), bytes(range(32, 64)))
KEYRING = Keyring((CookieKey(8, DAY, b"n" * 32), CookieKey(7, 0, b"k" * 32)), Schedule())
SERVER = NtpServer(KEYRING, secrets.token_bytes)
CLOCK = ClockState(
    leap=Leap.NONE,
    stratum=2,
    precision=-20,
    root_delay=10,
    root_dispersion=20,
    reference_id=b"TEST",
    reference=ntptime.timestamp(RECEIVED - SECOND),
)
COOKIE = KEYRING.seal(KEYS, secrets.token_bytes(16))
IDENTIFIER = Field(FieldType.UNIQUE_IDENTIFIER, bytes(range(32)))
COOKIE_FIELD = Field(FieldType.COOKIE, COOKIE)
PLACEHOLDER = Field(FieldType.COOKIE_PLACEHOLDER, bytes(len(COOKIE)))
REQUEST_HEADER = Header(transmit=0x0123_4567_89AB_CDEF, poll=6)


def respond(datagram, kiss=None):
    return SERVER.respond(
        datagram, received=RECEIVED, transmit_time=lambda: TRANSMITTED, clock=CLOCK, kiss=kiss
    )


def make_request(*fields, hidden=(), key=KEYS.c2s, header=REQUEST_HEADER, nonce=bytes(range(16)), after=()):
    clear = header.encode() + encode_fields(fields)
    return protect(clear, encode_fields(hidden), Aead(15, key), nonce) + encode_fields(after)


def cookies_in(reply):
    """The cookies of an answer, which has to be authentic and of the right form."""
    packet = Packet.decode(reply.octets)
    assert [field.type for field in packet.fields] == [FieldType.UNIQUE_IDENTIFIER]
    hidden = packet.decrypt(reply.octets, Aead(15, KEYS.s2c))
    assert {field.type for field in hidden} == {FieldType.COOKIE}
    for field in hidden:
        assert KEYRING.open(field.value) == KEYS
    return [field.value for field in hidden]


# Time


def test_plain_time():
    reply = respond(REQUEST_HEADER.encode())
    assert reply.outcome is Outcome.TIME
    answer = Header.decode(reply.octets)
    assert len(reply.octets) == 48
    assert (answer.mode, answer.version, answer.poll) == (Mode.SERVER, 4, 6)
    assert answer.origin == REQUEST_HEADER.transmit
    assert answer.receive == ntptime.timestamp(RECEIVED)
    assert answer.transmit == ntptime.timestamp(TRANSMITTED)
    assert (answer.stratum, answer.leap, answer.reference_id) == (2, 0, b"TEST")
    assert (answer.root_delay, answer.root_dispersion, answer.precision) == (10, 20, -20)
    assert answer.reference == ntptime.timestamp(RECEIVED - SECOND)


@pytest.mark.rfc8915("5.3-4", "5.3-5")
def test_a_plain_request_gets_its_identifier_back():
    reply = respond(REQUEST_HEADER.encode() + IDENTIFIER.encode())
    assert reply.outcome is Outcome.TIME
    assert reply.octets[48:] == IDENTIFIER.encode()


@pytest.mark.rfc8915("5.3-3", "5.3-4", "5.7-17", "5.7-19", "5.7-20", "5.7-21")
def test_authenticated_time():
    reply = respond(make_request(IDENTIFIER, COOKIE_FIELD))
    assert reply.outcome is Outcome.NTS_TIME
    packet = Packet.decode(reply.octets)
    assert packet.fields[0].value == IDENTIFIER.value
    assert packet.header.origin == REQUEST_HEADER.transmit
    assert packet.header.transmit == ntptime.timestamp(TRANSMITTED)
    assert len(cookies_in(reply)) == 1


def test_the_transmit_time_is_asked_for_once_after_the_cookies_were_sealed():
    calls = []

    class Watched(Keyring):
        def seal_many(self, keys, nonces):
            calls.append("cookies")
            return super().seal_many(keys, nonces)

    def now():
        calls.append("time")
        return TRANSMITTED

    keyring = Watched.load(KEYRING.dump())
    request = make_request(IDENTIFIER, COOKIE_FIELD, PLACEHOLDER)
    NtpServer(keyring, secrets.token_bytes).respond(
        request, received=RECEIVED, transmit_time=now, clock=CLOCK
    )
    assert calls == ["cookies", "time"]


# Cookies and placeholders


@pytest.mark.rfc8915("5.5-1", "5.6-4", "5.7-18", "5.7-22", "5.7-23", "5.7-24", "5.7-25", "5.7-27", "8.4-1")
@pytest.mark.parametrize(("placeholders", "cookies"), [(0, 1), (1, 2), (6, 7), (7, 8), (8, 8), (14, 8)])
def test_as_many_cookies_as_asked_for_and_eight_at_most(placeholders, cookies):
    request = make_request(IDENTIFIER, COOKIE_FIELD, *([PLACEHOLDER] * placeholders))
    reply = respond(request)
    assert len(set(cookies_in(reply))) == cookies
    assert len(reply.octets) <= len(request)
    if placeholders < 8:
        assert len(reply.octets) == len(request)


@pytest.mark.rfc8915("5.7-12", "5.7-23")
def test_placeholders_may_be_encrypted():
    """Section 5.7: placeholders MAY be encrypted."""
    request = make_request(IDENTIFIER, COOKIE_FIELD, hidden=[PLACEHOLDER] * 3)
    reply = respond(request)
    assert len(cookies_in(reply)) == 4
    assert len(reply.octets) <= len(request)


@pytest.mark.rfc8915("5.5-3", "5.7-24")
@pytest.mark.parametrize("length", [12, 96, 104, 400])
def test_placeholders_of_another_length_are_not_valid(length):
    """Section 5.5: only the same length keeps the answer from being longer than the request."""
    other = Field(FieldType.COOKIE_PLACEHOLDER, bytes(length))
    reply = respond(make_request(IDENTIFIER, COOKIE_FIELD, other, PLACEHOLDER))
    assert len(cookies_in(reply)) == 2


@pytest.mark.rfc8915("5.5-5")
def test_what_a_placeholder_holds_does_not_matter():
    odd = Field(FieldType.COOKIE_PLACEHOLDER, b"\xff" * len(COOKIE))
    assert len(cookies_in(respond(make_request(IDENTIFIER, COOKIE_FIELD, odd)))) == 2


@pytest.mark.rfc8915("5.7-16")
def test_placeholders_after_the_authenticator_do_not_count():
    request = make_request(IDENTIFIER, COOKIE_FIELD, after=[PLACEHOLDER] * 5)
    assert len(cookies_in(respond(request))) == 1


def test_an_unknown_field_is_passed_over():
    unknown = Field(0x5555, bytes(24))
    assert len(cookies_in(respond(make_request(unknown, IDENTIFIER, COOKIE_FIELD, hidden=[unknown])))) == 1


@pytest.mark.rfc8915("6-4", "6-6")
def test_a_retired_key_still_opens_and_the_new_one_seals():
    rotated = KEYRING.at(DAY, secrets.token_bytes)
    server = NtpServer(rotated, secrets.token_bytes)
    reply = server.respond(
        make_request(IDENTIFIER, COOKIE_FIELD),
        received=RECEIVED,
        transmit_time=lambda: TRANSMITTED,
        clock=CLOCK,
    )
    (hidden,) = Packet.decode(reply.octets).decrypt(reply.octets, Aead(15, KEYS.s2c))
    assert rotated.open(hidden.value) == KEYS
    assert hidden.value[2:4] != COOKIE[2:4]


@pytest.mark.rfc8915("5.6-11")
def test_each_answer_has_a_nonce_of_its_own():
    request = make_request(IDENTIFIER, COOKIE_FIELD)
    fields = [Packet.decode(respond(request).octets).authenticator for _ in range(8)]
    assert len({Authenticator.decode(field.value).nonce for field in fields}) == 8


@pytest.mark.rfc8915("5.6-9")
def test_short_encrypted_fields_of_an_authentic_request():
    """Section 5.6: encrypted fields MAY be arbitrarily short; such a request is authentic."""
    clear = REQUEST_HEADER.encode() + encode_fields((IDENTIFIER, COOKIE_FIELD))
    nonce = bytes(range(16))
    sealed = Aead(15, KEYS.c2s).seal(nonce, bytes.fromhex("55550004"), clear)
    reply = respond(clear + Authenticator(nonce, sealed).encode())
    assert reply.outcome is Outcome.NTS_TIME


@pytest.mark.rfc8915("5.6-13")
def test_a_short_nonce_needs_padding():
    """Section 5.6: with a nonce of 4 octets, 12 more of padding; else the server MUST discard the packet."""
    clear = REQUEST_HEADER.encode() + encode_fields((IDENTIFIER, COOKIE_FIELD, PLACEHOLDER))
    nonce = b"once"
    octets = Authenticator(nonce, Aead(15, KEYS.c2s).seal(nonce, b"", clear)).encode()
    assert respond(clear + octets) == Drop(Outcome.MALFORMED)
    padded = Field(FieldType.AUTHENTICATOR, octets[4:] + bytes(12))
    assert len(cookies_in(respond(clear + padded.encode()))) == 2


# NTSN


def assert_ntsn(reply, request):
    assert isinstance(reply, Reply)
    assert reply.outcome is Outcome.NTSN
    packet = Packet.decode(reply.octets)
    assert (packet.header.stratum, packet.header.reference_id) == (0, b"NTSN")
    assert packet.header.mode == Mode.SERVER
    assert packet.header.origin == REQUEST_HEADER.transmit
    assert [(field.type, field.value) for field in packet.fields] == [(IDENTIFIER.type, IDENTIFIER.value)]
    assert packet.authenticator is None
    assert len(reply.octets) <= len(request)


@pytest.mark.rfc8915("5.3-4", "5.7-32", "5.7-33", "6-12")
def test_a_cookie_of_other_keys_gets_ntsn():
    stranger = Keyring.new(0, secrets.token_bytes).seal(KEYS, secrets.token_bytes(16))
    request = make_request(IDENTIFIER, Field(FieldType.COOKIE, stranger))
    assert_ntsn(respond(request), request)


@pytest.mark.rfc8915("5.3-4", "5.7-32", "6-11")
def test_a_cookie_of_an_unknown_key_gets_ntsn():
    keys = (CookieKey(10, DAY, b"n" * 32), CookieKey(9, 0, b"k" * 32))
    stranger = Keyring(keys, Schedule()).seal(KEYS, secrets.token_bytes(16))
    request = make_request(IDENTIFIER, Field(FieldType.COOKIE, stranger))
    assert_ntsn(respond(request), request)


@pytest.mark.rfc8915("5.6-3", "5.7-32", "5.7-33")
def test_a_wrong_session_key_gets_ntsn():
    request = make_request(IDENTIFIER, COOKIE_FIELD, key=KEYS.s2c)
    assert_ntsn(respond(request), request)


@pytest.mark.rfc8915("5.6-5", "5.7-32")
def test_a_changed_header_gets_ntsn():
    request = bytearray(make_request(IDENTIFIER, COOKIE_FIELD))
    request[2] ^= 1
    assert_ntsn(respond(bytes(request)), request)


def test_authentic_fields_without_form_are_dropped():
    """The keys are good: NTSN would send the client to key establishment, for nothing (section 5.7)."""
    clear = REQUEST_HEADER.encode() + encode_fields((IDENTIFIER, COOKIE_FIELD))
    nonce = bytes(range(16))
    sealed = Aead(15, KEYS.c2s).seal(nonce, bytes.fromhex("00010003"), clear)
    assert respond(clear + Authenticator(nonce, sealed).encode()) == Drop(Outcome.MALFORMED)


def test_a_malformed_authenticator_gets_ntsn_or_nothing():
    clear = REQUEST_HEADER.encode() + encode_fields((IDENTIFIER, COOKIE_FIELD))
    for value in (b"\xff" * 16, bytes(16), b"\0\x10\0\x10" + bytes(16)):
        action = respond(clear + Field(FieldType.AUTHENTICATOR, value).encode())
        assert action.outcome in {Outcome.NTSN, Outcome.MALFORMED}


# No answer

SHORT_IDENTIFIER = Field(FieldType.UNIQUE_IDENTIFIER, bytes(28))
VERSION_3 = Header(version=3, transmit=1)
INCOMPLETE = {
    "no identifier": make_request(COOKIE_FIELD),
    "a short identifier": make_request(SHORT_IDENTIFIER, COOKIE_FIELD),
    "two identifiers": make_request(IDENTIFIER, IDENTIFIER, COOKIE_FIELD),
    "no cookie": make_request(IDENTIFIER),
    "two cookies": make_request(IDENTIFIER, COOKIE_FIELD, COOKIE_FIELD),
    "no authenticator": REQUEST_HEADER.encode() + encode_fields((IDENTIFIER, COOKIE_FIELD)),
    "the cookie after the authenticator": make_request(IDENTIFIER, after=[COOKIE_FIELD]),
    "the identifier after the authenticator": make_request(COOKIE_FIELD, after=[IDENTIFIER]),
    "the cookie encrypted": make_request(IDENTIFIER, hidden=[COOKIE_FIELD]),
    "version 3": make_request(IDENTIFIER, COOKIE_FIELD, header=VERSION_3),
}


@pytest.mark.rfc8915("5.3-2", "5.7-16")
@pytest.mark.parametrize("request_", INCOMPLETE.values(), ids=INCOMPLETE)
def test_incomplete_requests_are_not_answered(request_):
    assert respond(request_) == Drop(Outcome.INCOMPLETE_NTS)


@pytest.mark.rfc8915("5.4-3", "5.6-14", "8.1-1")
@pytest.mark.parametrize("mode", [0, 1, 2, 4, 5, 6, 7])
def test_only_clients_are_answered(mode):
    """Answers to answers made two ntpd-rs talk for ever (CVE-2025-58066), NTSN included."""
    header = Header(mode=mode, transmit=1)
    stranger = Field(FieldType.COOKIE, b"\0" * 100)
    for datagram in (
        header.encode(),
        make_request(IDENTIFIER, COOKIE_FIELD, header=header),
        make_request(IDENTIFIER, stranger, header=header),
    ):
        assert respond(datagram) == Drop(Outcome.MODE)


def test_version_3_gets_plain_time_in_version_3():
    reply = respond(VERSION_3.encode())
    assert reply.outcome is Outcome.TIME
    assert Header.decode(reply.octets).version == 3


@pytest.mark.parametrize("version", [0, 1, 2, 5, 6, 7])
def test_other_versions_are_not_answered(version):
    datagram = bytes((version << 3 | Mode.CLIENT,)) + bytes(47)
    assert respond(datagram) == Drop(Outcome.VERSION)


@pytest.mark.parametrize("length", [20, 24])
def test_legacy_mac(length):
    assert respond(REQUEST_HEADER.encode() + secrets.token_bytes(length)) == Drop(Outcome.LEGACY_MAC)


def test_a_crypto_nak_is_not_answered():
    assert respond(REQUEST_HEADER.encode() + bytes(4)) == Drop(Outcome.MALFORMED)


def test_a_datagram_that_is_too_long_is_not_answered():
    assert respond(REQUEST_HEADER.encode() + Field(0x5555, bytes(2100)).encode()) == Drop(Outcome.MALFORMED)


def test_every_truncation_of_a_request_is_survived():
    request = make_request(IDENTIFIER, COOKIE_FIELD, PLACEHOLDER)
    for length in range(len(request)):
        action = respond(request[:length])
        assert action.outcome is not Outcome.NTS_TIME
        if isinstance(action, Reply):
            assert len(action.octets) <= length


# Properties of every answer


def check_bounds(datagram):
    action = respond(datagram)
    assert isinstance(action, Reply | Drop)
    if isinstance(action, Reply):
        assert len(action.octets) <= len(datagram)
        assert datagram[0] & 7 == Mode.CLIENT
        assert action.octets[0] & 7 == Mode.SERVER
        assert action.octets[24:32] == datagram[40:48]


@given(st.binary(max_size=400))
def test_random_octets(datagram):
    check_bounds(datagram)


@pytest.mark.rfc8915("8.4-1")
@given(st.sampled_from([0x1B, 0x23]), st.binary(min_size=47, max_size=400))
def test_random_octets_that_look_like_a_request(first, rest):
    check_bounds(bytes((first,)) + rest)


the_fields = st.sampled_from(
    [
        IDENTIFIER,
        COOKIE_FIELD,
        PLACEHOLDER,
        SHORT_IDENTIFIER,
        Field(FieldType.UNIQUE_IDENTIFIER, bytes(64)),
        Field(FieldType.COOKIE, bytes(100)),
        Field(FieldType.COOKIE_PLACEHOLDER, bytes(12)),
        Field(FieldType.COOKIE_PLACEHOLDER, bytes(300)),
        Field(FieldType.AUTHENTICATOR, bytes(36)),
        Field(0x5555, bytes(16)),
    ]
)


@pytest.mark.rfc8915("5.7-24", "8.4-1")
@given(
    st.lists(the_fields, max_size=14),
    st.lists(the_fields, max_size=3),
    st.lists(the_fields, max_size=2),
    st.binary(min_size=1, max_size=20),
)
def test_any_mixture_of_fields(fields, hidden, after, nonce):
    datagram = make_request(*fields, hidden=hidden, after=after, nonce=nonce)
    check_bounds(datagram)
    action = respond(datagram)
    if action.outcome is Outcome.NTS_TIME:
        asked = [field for field in (*fields, *hidden) if field == PLACEHOLDER]
        assert 1 <= len(cookies_in(action)) <= min(8, 1 + len(asked))


@given(st.data())
def test_authentic_requests_with_octets_changed(data):
    request = bytearray(make_request(IDENTIFIER, COOKIE_FIELD, PLACEHOLDER))
    for _ in range(data.draw(st.integers(1, 4))):
        request[data.draw(st.integers(0, len(request) - 1))] = data.draw(st.integers(0, 255))
    check_bounds(bytes(request))


# chronyd as a client


def chrony_requests():
    named = tomllib.loads((VECTORS / "chrony-ntp-requests.toml").read_text())
    return {key: bytes.fromhex(value) for key, value in named.items()}


@pytest.mark.rfc8915("5.6-1", "5.7-17")
@pytest.mark.parametrize("missing", range(4))
def test_captured_requests_of_chronyd_get_what_they_ask_for(missing):
    octets = chrony_requests()
    key = CookieKey(int.from_bytes(octets["cookie_key_id"], "big"), 0, octets["cookie_key"])
    request = octets[f"request_{missing}"]
    reply = NtpServer(
        Keyring((CookieKey(key.id ^ 1, DAY, bytes(32)), key), Schedule()), secrets.token_bytes
    ).respond(request, received=RECEIVED, transmit_time=lambda: TRANSMITTED, clock=CLOCK)
    assert reply.outcome is Outcome.NTS_TIME
    hidden = Packet.decode(reply.octets).decrypt(reply.octets, Aead(15, octets["s2c"]))
    assert len(hidden) == missing + 1
    assert len(reply.octets) == len(request)


def test_a_reply_of_ours_is_not_answered_by_ourselves():
    """Two servers never talk to each other."""
    for request in (REQUEST_HEADER.encode(), make_request(IDENTIFIER, COOKIE_FIELD)):
        assert respond(respond(request).octets) == Drop(Outcome.MODE)


@pytest.mark.parametrize("poll", [-128, -6, 0, 17, 127])
def test_every_poll_interval_is_repeated(poll):
    reply = respond(REQUEST_HEADER._replace(poll=poll).encode())
    assert Header.decode(reply.octets).poll == poll


def test_header_decode_and_respond_agree_on_what_is_malformed():
    with pytest.raises(WireError):
        Header.decode(bytes(47))
    assert respond(bytes(47)) == Drop(Outcome.MALFORMED)


# Kiss-o'-death by policy


@pytest.mark.rfc8915("5.3-4")
@pytest.mark.parametrize(
    ("kiss", "outcome"), [(Kiss.RATE, Outcome.KISS_RATE), (Kiss.DENY, Outcome.KISS_DENY)]
)
def test_a_kiss_is_as_authentic_as_the_time(kiss, outcome):
    """Section 5.7 leaves NTSN alone without protection; and a client must not lose its cookies by others."""
    request = make_request(IDENTIFIER, COOKIE_FIELD, PLACEHOLDER)
    reply = respond(request, kiss=kiss)
    assert reply.outcome is outcome
    answer = Header.decode(reply.octets)
    assert (answer.stratum, answer.leap, answer.reference_id) == (0, 3, kiss.encode())
    assert (answer.mode, answer.origin) == (Mode.SERVER, REQUEST_HEADER.transmit)
    assert len(cookies_in(reply)) == 2
    assert len(reply.octets) <= len(request)


@pytest.mark.rfc8915("5.3-4")
def test_a_plain_kiss():
    reply = respond(REQUEST_HEADER.encode() + IDENTIFIER.encode(), kiss=Kiss.RATE)
    assert (reply.outcome, len(reply.octets)) == (Outcome.KISS_RATE, 84)
    assert Header.decode(reply.octets).reference_id == b"RATE"
    assert reply.octets[48:] == IDENTIFIER.encode()


def test_what_would_not_be_answered_is_not_kissed():
    for datagram in (b"", bytes(48), REQUEST_HEADER._replace(mode=Mode.SERVER).encode()):
        assert isinstance(respond(datagram, kiss=Kiss.DENY), Drop)


# Every algorithm


@pytest.mark.rfc8915("5.7-15", "5.7-23", "8.4-1")
@pytest.mark.parametrize("algorithm", AeadId)
@pytest.mark.parametrize("missing", range(8))
def test_every_algorithm_and_number_of_cookies(algorithm, missing):
    """Client and server together: as many cookies as are wanted, and never a longer answer."""
    length = KEY_LENGTH[algorithm]
    keys = SessionKeys(algorithm, secrets.token_bytes(length), secrets.token_bytes(length))
    cookies = tuple(KEYRING.seal_many(keys, secrets.token_bytes((8 - missing) * 16)))
    association = Association(KeResult(keys, cookies), secrets.token_bytes)
    request = association.poll()
    reply = respond(request)
    assert len(request) <= 1232
    assert len(reply.octets) == len(request)
    sample = association.receive(reply.octets, sent=RECEIVED, received=TRANSMITTED)
    assert sample.cookies == sample.asked
    # Eight long cookies do not fit a packet that no network splits (section 5.7).
    assert len(association.jar) == 8 or len(request) + 4 + len(cookies[0]) > 1232


def gcm_request(nonce_length, padding):
    keys = SessionKeys(AeadId.AES_128_GCM_SIV, b"c" * 16, b"s" * 16)
    cookie = Field(FieldType.COOKIE, KEYRING.seal(keys, secrets.token_bytes(16)))
    clear = REQUEST_HEADER.encode() + encode_fields((IDENTIFIER, cookie))
    sealed = Aead(keys.aead, keys.c2s).seal(bytes(12), b"", clear)
    octets = Authenticator(bytes(nonce_length), sealed).encode()
    return clear + Field(FieldType.AUTHENTICATOR, octets[4:] + bytes(padding)).encode()


@pytest.mark.rfc8915("5.6-13")
def test_a_nonce_of_12_octets_is_long_enough_for_aes_gcm_siv():
    """Section 5.6: N_REQ is 16, or the algorithm's longest nonce if that is less."""
    assert respond(gcm_request(12, 0)).outcome is Outcome.NTS_TIME


@pytest.mark.parametrize(("length", "padding"), [(8, 4), (16, 0), (13, 0)])
def test_other_nonces_of_aes_gcm_siv_authenticate_nothing(length, padding):
    assert respond(gcm_request(length, padding)).outcome is Outcome.NTSN


@pytest.mark.rfc8915("5.6-13")
def test_a_short_nonce_of_aes_gcm_siv_needs_padding_too():
    assert respond(gcm_request(8, 0)) == Drop(Outcome.MALFORMED)
