"""Both engines answer the same datagrams with the same octets: RFC 8915 section 5.7 has one reading here."""

import random
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz import native
from fuzz.native import MOST_RANDOM, Answer, Request, Times
from nts_core.aead import KEY_LENGTH, SUPPORTED, Aead, AeadId, SessionKeys
from nts_core.cookies import DAY, CookieKey, Keyring, Schedule, cookie_length
from nts_core.packet import HEADER_LENGTH, MAX_DATAGRAM, ClockState, FieldType, Header, Leap
from nts_core.server import Kiss, Outcome

nts_engine = pytest.importorskip("nts_engine", reason=native.NOT_BUILT)

VECTORS = Path(__file__).parent.parent / "vectors"
SECOND = 1_000_000_000
RECEIVED = 1_800_000_000 * SECOND
CLOCK = ClockState(Leap.NONE, 2, -20, 10, 20, b"TEST", (RECEIVED - SECOND) % (1 << 64))
TIMES = Times(RECEIVED, RECEIVED + 20_000, CLOCK)
# Octets that mean nothing, and are the same in every run.
OCTETS = random.Random(10).randbytes(65_536)


def key(number):
    return CookieKey(number, 0, OCTETS[number : number + 32])


def keyring(*numbers):
    return Keyring(tuple(map(key, numbers)), Schedule())


# The next key, the one that seals, two that are retired.
KEYRING = keyring(8, 7, 6, 5)
# Who seals by the second key: each key of ours, one that is unknown, and another's under an id of ours.
SEALERS = [keyring(0, number) for number in (7, 8, 6, 5, 99)]
FORGER = Keyring((key(0), replace(key(7), secret=bytes(32))), Schedule())
SESSIONS = {
    aead: SessionKeys(aead, OCTETS[aead : aead + KEY_LENGTH[aead]], OCTETS[500 : 500 + KEY_LENGTH[aead]])
    for aead in SUPPORTED
}
KISSES = (None, Kiss.RATE, Kiss.DENY)


def randomness(place):
    return OCTETS[place * MOST_RANDOM : (place + 1) * MOST_RANDOM]


def check(datagrams, times=TIMES):
    """Answer datagrams, each with its kiss, in one batch and alone, with both engines; what they all say."""
    requests = [
        Request(datagram, kiss, randomness(place)) for place, (datagram, kiss) in enumerate(datagrams)
    ]
    expected = [native.respond_in_python(KEYRING, request, times) for request in requests]
    assert native.respond(KEYRING, requests, times) == expected
    for answer, request in zip(expected, requests, strict=True):
        assert answer.octets is None or len(answer.octets) <= len(request.datagram)
    return expected


def check_one(datagram, kiss=None):
    (answer,) = check([(datagram, kiss)])
    return answer


# Requests of every kind


def field(kind, value, length=None):
    """A field as it is, padded or not, perhaps with another length than the true one."""
    return kind.to_bytes(2) + (4 + len(value) if length is None else length & 0xFFFF).to_bytes(2) + value


def sealed(clear, keys, *, nonce, hidden=b"", padding=0, is_forged=False):
    """`clear` with an authenticator behind it; what cannot be sealed gets octets that mean nothing."""
    try:
        ciphertext = Aead(keys.aead, keys.s2c if is_forged else keys.c2s).seal(nonce, hidden, clear)
    except ValueError:
        ciphertext = OCTETS[: 16 + len(hidden)]
    body = len(nonce).to_bytes(2) + len(ciphertext).to_bytes(2)
    body += nonce + bytes(-len(nonce) % 4) + ciphertext + bytes(-len(ciphertext) % 4 + padding)
    return clear + field(FieldType.AUTHENTICATOR, body)


numbers = st.integers(0, (1 << 64) - 1)
# Fields of types that there are and are not, with true lengths and with others.
odd_fields = st.builds(
    lambda kind, length, off: field(kind, OCTETS[:length], length + 4 + off),
    st.sampled_from((*FieldType, 0x0002, 0x2005, 0xFFFF)),
    st.sampled_from((0, 8, 12, 13, 16, 32, 68, 100, 132, 164)),
    st.sampled_from((0, 0, 0, 0, 1, -4, 4, 400)),
)


def headers(versions=(4,), modes=(3,)):
    return st.builds(
        lambda leap, version, mode, poll, transmit: Header(
            leap=leap, version=version, mode=mode, poll=poll, transmit=transmit
        ).encode(),
        st.integers(0, 3),
        st.sampled_from(versions),
        st.sampled_from(modes),
        st.integers(-128, 127),
        numbers,
    )


def altered(octets, place, mask):
    """Octets with one of them changed."""
    place %= len(octets)
    return octets[:place] + bytes([octets[place] ^ mask]) + octets[place + 1 :]


places, masks = st.integers(0, 4095), st.integers(1, 255)
# What may be wrong with a request, or only unusual.
ODDITIES = (
    *("version", "mode", "identifier", "cookie", "cookie-cut", "forger", "retired", "next", "unknown"),
    *(
        "field",
        "dropped",
        "doubled",
        "moved",
        "short-placeholder",
        "placeholders",
        "hidden",
        "hidden-placeholders",
    ),
    *("hidden-malformed", "nonce", "padding", "reflected", "after", "cut", "flipped"),
)
SEALER_OF = {"next": SEALERS[1], "retired": SEALERS[2], "unknown": SEALERS[4], "forger": FORGER}


@st.composite
def nts_requests(draw):
    odd = draw(st.sets(st.sampled_from(ODDITIES), max_size=2))
    keys = SESSIONS[draw(st.sampled_from(SUPPORTED))]
    sealer = next((SEALER_OF[name] for name in SEALER_OF if name in odd), SEALERS[0])
    header = draw(
        headers((0, 1, 2, 3, 5) if "version" in odd else (4,), (1, 2, 4, 6) if "mode" in odd else (3,))
    )
    nonce = OCTETS[: 12 if keys.aead == AeadId.AES_128_GCM_SIV else 16]
    if "nonce" in odd:
        nonce = OCTETS[: draw(st.sampled_from((0, 1, 8, 12, 13, 15, 16, 17, 32, 64)))]
    datagram = sealed(
        header + b"".join(_clear_fields(draw, odd, sealer.seal(keys, OCTETS[77:93]))),
        keys,
        nonce=nonce,
        hidden=_hidden_fields(draw, odd, cookie_length(keys.aead)),
        padding=draw(st.sampled_from((4, 8, 12, 16, 64, 1))) if "padding" in odd else 0,
        is_forged="reflected" in odd,
    )
    if "after" in odd:
        datagram += draw(odd_fields)
    if "cut" in odd:
        datagram = datagram[: draw(st.integers(0, len(datagram)))]
    return altered(datagram, draw(places), draw(masks)) if "flipped" in odd and datagram else datagram


def _clear_fields(draw, odd, cookie):
    """What stands before the authenticator."""
    length = len(cookie)
    if "cookie" in odd:
        cookie = altered(cookie, draw(places), draw(masks))
    if "cookie-cut" in odd:
        cookie = cookie[: draw(st.integers(0, len(cookie) // 4)) * 4]
    lengths = (12, 16, 28, 32, 36, 64, 400, 1200) if "identifier" in odd else (32,)
    fields = [
        field(FieldType.UNIQUE_IDENTIFIER, OCTETS[: draw(st.sampled_from(lengths))]),
        field(FieldType.COOKIE, cookie),
    ]
    count = draw(st.integers(0, 10)) if "placeholders" in odd else 0
    fields += [field(FieldType.COOKIE_PLACEHOLDER, bytes(length))] * count
    if "short-placeholder" in odd:
        fields.append(
            field(FieldType.COOKIE_PLACEHOLDER, bytes(draw(st.sampled_from((12, length - 4, length + 4)))))
        )
    place = draw(places) % len(fields)
    if "field" in odd:
        fields.insert(place, draw(odd_fields))
    if "doubled" in odd:
        fields.insert(0, fields[place])
    if "moved" in odd:
        fields.append(fields.pop(place))
    if "dropped" in odd:
        del fields[place]
    return fields


def _hidden_fields(draw, odd, length):
    hidden = b""
    if "hidden-placeholders" in odd:
        hidden += field(FieldType.COOKIE_PLACEHOLDER, bytes(length)) * draw(st.integers(1, 9))
    if "hidden" in odd:
        hidden += b"".join(draw(st.lists(odd_fields, min_size=1, max_size=3)))
    if "hidden-malformed" in odd:
        # Short fields are good here, and lengths that are no multiple of four are not.
        hidden += b"\x01\x04\x00\x04" * draw(st.integers(0, 3)) + bytes(draw(st.integers(0, 9)))
    return hidden


@st.composite
def plain_requests(draw):
    datagram = draw(headers((3, 4, 4, 0, 1, 2, 5, 6, 7), (3,) * 8 + (0, 1, 2, 4, 5, 6, 7)))
    match draw(st.integers(0, 5)):
        case 0:
            return datagram + OCTETS[: draw(st.sampled_from((1, 4, 12, 16, 20, 24, 28, 72)))]
        case 1:
            return datagram + b"".join(draw(st.lists(odd_fields, max_size=4)))
        case 2:
            return datagram + field(
                FieldType.UNIQUE_IDENTIFIER, OCTETS[: draw(st.sampled_from((12, 32, 33, 64)))]
            )
        case 3:
            return datagram[: draw(st.integers(0, 48))]
        case _:
            return datagram


long_datagrams = st.builds(
    lambda header, length: header + field(FieldType.UNIQUE_IDENTIFIER, OCTETS[: length - HEADER_LENGTH - 4]),
    headers(),
    st.sampled_from(range(MAX_DATAGRAM - 8, MAX_DATAGRAM + 12, 4)),
)
octets = st.binary(max_size=300)
datagrams = st.one_of(
    nts_requests(), nts_requests(), nts_requests(), plain_requests(), long_datagrams, octets
)
batches = st.lists(st.tuples(datagrams, st.sampled_from((None, *KISSES))), min_size=1, max_size=20)


@settings(deadline=None, max_examples=120)
@given(batches)
def test_batches_of_all_kinds_are_answered_alike(batch):
    check(batch)


@pytest.mark.long
@settings(deadline=None, max_examples=1500)
@given(batches)
def test_many_batches_of_all_kinds_are_answered_alike(batch):
    check(batch)


@settings(deadline=None, max_examples=60)
@given(st.lists(nts_requests(), min_size=2, max_size=20))
def test_an_answer_does_not_depend_on_what_it_is_answered_with(batch):
    requests = [Request(datagram, None, randomness(place)) for place, datagram in enumerate(batch)]
    together = native.respond(KEYRING, requests, TIMES)
    assert together == [native.respond(KEYRING, [request], TIMES)[0] for request in requests]
    assert native.respond(KEYRING, requests[::-1], TIMES) == together[::-1]


times = st.integers(-(1 << 63), (1 << 63) - 1)


@given(
    received=times,
    now=times,
    clock=st.builds(
        ClockState,
        leap=st.sampled_from(Leap),
        stratum=st.integers(0, 255),
        precision=st.integers(-128, 127),
        root_delay=st.integers(0, (1 << 32) - 1),
        root_dispersion=st.integers(0, (1 << 32) - 1),
        reference_id=st.binary(min_size=4, max_size=4),
        reference=numbers,
    ),
)
def test_any_time_and_any_clock_is_said_alike(received, now, clock):
    header = Header(poll=-3, transmit=now % (1 << 64)).encode()
    check([(header, None), (usual_request(15), None)], Times(received, now, clock))


# Every kind is among them


def usual_request(
    aead, *, identifier=32, hidden=b"", nonce=None, placeholders=0, padding=0, sealer=SEALERS[0]
):
    keys = SESSIONS[aead]
    nonce = OCTETS[900 : 900 + (12 if aead == AeadId.AES_128_GCM_SIV else 16)] if nonce is None else nonce
    clear = Header(poll=6, transmit=0x0123_4567_89AB_CDEF).encode()
    clear += field(FieldType.UNIQUE_IDENTIFIER, OCTETS[:identifier])
    clear += field(FieldType.COOKIE, sealer.seal(keys, OCTETS[77:93]))
    clear += field(FieldType.COOKIE_PLACEHOLDER, bytes(cookie_length(aead))) * placeholders
    return sealed(clear, keys, nonce=nonce, hidden=hidden, padding=padding)


@pytest.mark.parametrize("aead", SUPPORTED)
@pytest.mark.parametrize("placeholders", range(10))
def test_as_many_cookies_as_are_asked_for_and_eight_at_most(aead, placeholders):
    cookies = min(placeholders + 1, 8)
    answer = check_one(usual_request(aead, placeholders=placeholders))
    assert (answer.outcome, answer.sealed) == (Outcome.NTS_TIME, cookies)
    hidden = field(FieldType.COOKIE_PLACEHOLDER, bytes(cookie_length(aead))) * placeholders
    assert check_one(usual_request(aead, hidden=hidden)).sealed == cookies
    for kiss, outcome in ((Kiss.RATE, "kiss-rate"), (Kiss.DENY, "kiss-deny")):
        assert check_one(usual_request(aead, placeholders=placeholders), kiss).outcome == outcome


@pytest.mark.parametrize("aead", SUPPORTED)
@pytest.mark.parametrize(
    ("sealer", "role"),
    list(zip(SEALERS, ("sealing", "next", "retired", "retired", None), strict=True)),
    ids=("sealing", "next", "retired", "older", "unknown"),
)
def test_the_role_of_the_key_that_opened_a_cookie_is_counted_alike(aead, sealer, role):
    answer = check_one(usual_request(aead, sealer=sealer))
    assert (answer.outcome, answer.opened) == ("nts-time" if role else "ntsn", role)


# AES-SIV and AES-GCM-SIV against `cryptography`


@pytest.mark.parametrize("aead", SUPPORTED)
def test_ciphertexts_of_every_length_open(aead):
    """What opens and has no form is malformed; what does not open is answered with NTSN."""
    for length in range(200):
        hidden = field(0x2005, bytes(length - 4)) if length >= 4 else bytes(length)
        datagram = usual_request(aead, hidden=hidden)
        expected = Outcome.NTS_TIME if length % 4 == 0 else Outcome.MALFORMED
        assert check_one(datagram).outcome == expected, length
        for place in (len(datagram) - 1 - -length % 4, len(datagram) - 16 - length // 2 - 4, 8, 60):
            assert check_one(altered(datagram, place, 0x10)).outcome == Outcome.NTSN, (length, place)


@pytest.mark.parametrize("aead", [aead for aead in SUPPORTED if aead != AeadId.AES_128_GCM_SIV])
def test_nonces_and_associated_data_of_every_length_open(aead):
    """AES-SIV takes nonces of any length; the associated data grows with the identifier."""
    batch = [
        usual_request(aead, nonce=OCTETS[:nonce], identifier=identifier, padding=16)
        for nonce in (1, 7, 15, 16, 17, 31, 32, 33, 48, 65)
        for identifier in range(32, 84, 4)
    ]
    answers = check([(datagram, None) for datagram in batch])
    assert {answer.outcome for answer in answers} == {"nts-time"}


@pytest.mark.parametrize("aead", SUPPORTED)
def test_answers_of_every_length_are_sealed_alike(aead):
    batch = [
        usual_request(aead, identifier=identifier, placeholders=placeholders)
        for identifier in (32, 36, 40, 44, 48, 52, 64, 128)
        for placeholders in range(8)
    ]
    answers = check([(datagram, None) for datagram in batch])
    assert [answer.sealed for answer in answers] == list(range(1, 9)) * 8


@pytest.mark.parametrize("missing", range(4))
def test_captured_requests_of_chronyd_are_answered_alike(missing):
    """Keys and requests are those of `tests/vectors`; the vectors of RFC 5297 itself have other associated data."""
    named = tomllib.loads((VECTORS / "chrony-ntp-requests.toml").read_text())
    captured = {name: bytes.fromhex(value) for name, value in named.items()}
    number = int.from_bytes(captured["cookie_key_id"], "big")
    ring = Keyring(
        (CookieKey(number ^ 1, DAY, bytes(32)), CookieKey(number, 0, captured["cookie_key"])), Schedule()
    )
    request = Request(captured[f"request_{missing}"], None, randomness(missing))
    (answer,) = native.respond(ring, [request], TIMES)
    assert answer == native.respond_in_python(ring, request, TIMES)
    assert (answer.outcome, answer.opened, answer.sealed) == ("nts-time", "sealing", missing + 1)


# What is not answered, and arguments that cannot be


@pytest.mark.parametrize("length", [0, 1, 47, 49, 63, 2049, 2052, 65_507])
def test_lengths_that_no_request_has(length):
    assert check_one((Header().encode() + bytes(length))[:length]) == Answer("malformed", None, None, 0)


def test_each_request_takes_its_randomness():
    ring = nts_engine.Keyring([(each.id, each.secret) for each in KEYRING.keys])
    clock = nts_engine.Clock(**{name: getattr(CLOCK, name) for name in ClockState.__slots__})
    rest = {"keyring": ring, "clock": clock, "received": 0, "now": 0}
    assert nts_engine.respond([], [], **rest) == []
    for given_octets in ([], [bytes(MOST_RANDOM - 1)], [bytes(MOST_RANDOM)] * 2):
        with pytest.raises(ValueError, match="random octets"):
            nts_engine.respond([(bytes(48), None)], given_octets, **rest)
    with pytest.raises(ValueError, match="NTSN"):
        nts_engine.respond([(bytes(48), "NTSN")], [bytes(MOST_RANDOM)], **rest)


@pytest.mark.parametrize(
    "keys", [[], [(1, bytes(32))], [(1, bytes(32)), (1, bytes(32))], [(1, bytes(32)), (2, bytes(48))]]
)
def test_keyrings_that_cannot_be(keys):
    with pytest.raises(ValueError, match="two or more keys of 32 octets"):
        nts_engine.Keyring(keys)
