"""A client's side of one server (RFC 8915 section 5.7): what is believed, and what an answer costs."""

import secrets
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nts_core import ntptime
from nts_core.aead import Aead, AeadId, SessionKeys
from nts_core.association import MAX_REQUEST, Association, Plain
from nts_core.cookies import DAY, CookieKey, Keyring, Schedule
from nts_core.errors import KissOfDeath, NotAuthentic, OutOfCookies
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
from nts_core.server import ClockState, Kiss, NtpServer

VECTORS = Path(__file__).parent.parent / "vectors"
MS = 1_000_000
SENT = 1_800_000_000_000_000_000
KEYS = SessionKeys(AeadId.AES_SIV_CMAC_256, bytes(range(32)), bytes(range(32, 64)))
KEYRING = Keyring((CookieKey(8, DAY, b"n" * 32), CookieKey(7, 0, b"k" * 32)), Schedule())
CLOCK = ClockState(
    leap=Leap.NONE,
    stratum=2,
    precision=-20,
    root_delay=ntptime.short(20 * MS),
    root_dispersion=ntptime.short(5 * MS),
    reference_id=b"TEST",
    reference=0,
)

STAMP = ntptime.timestamp(SENT)


def make_association(cookies=8):
    sealed = tuple(KEYRING.seal(KEYS, secrets.token_bytes(16)) for _ in range(cookies))
    return Association(KeResult(KEYS, sealed), secrets.token_bytes)


def serve(request, *, at=SENT, took=0, clock=CLOCK):
    reply = NtpServer(KEYRING, secrets.token_bytes).respond(
        request, received=at, transmit_time=lambda: at + took, clock=clock
    )
    return reply.octets


def receive(association, datagram, received=SENT):
    return association.receive(datagram, sent=SENT, received=received)


def forge(request, *, fields=None, hidden=(), header=None, key=KEYS.s2c):
    """An answer to `request` with whatever is to be wrong about it; `key` None leaves it unprotected."""
    asked = Packet.decode(request)
    header = header or Header(
        mode=Mode.SERVER, stratum=2, origin=asked.header.transmit, receive=STAMP, transmit=STAMP
    )
    fields = asked.of_type(FieldType.UNIQUE_IDENTIFIER) if fields is None else fields
    clear = header.encode() + encode_fields(fields)
    return (
        clear
        if key is None
        else protect(clear, encode_fields(hidden), Aead(15, key), secrets.token_bytes(16))
    )


# Requests


@pytest.mark.rfc8915("5.4-3", "5.6-14")
def test_a_request_says_nothing_of_the_client():
    """Data minimisation: everything is zero but version, mode and a random transmit timestamp."""
    first, second = (Packet.decode(make_association().poll()) for _ in range(2))
    assert first.header._replace(transmit=0) == Header(version=4, mode=Mode.CLIENT)
    assert first.header.transmit != second.header.transmit


@pytest.mark.rfc8915("5.3-2", "5.6-3", "5.7-1", "5.7-2", "5.7-3", "5.7-5", "5.7-6", "5.7-26")
def test_the_form_of_a_request():
    association = make_association()
    request = association.poll()
    packet = Packet.decode(request)
    assert [field.type for field in packet.fields] == [FieldType.UNIQUE_IDENTIFIER, FieldType.COOKIE]
    assert len(packet.fields[0].value) == 32
    assert packet.decrypt(request, Aead(15, KEYS.c2s)) == []


@pytest.mark.rfc8915("5.3-1", "5.7-4", "5.7-8")
def test_no_cookie_and_no_identifier_is_used_twice():
    association = make_association()
    packets = [Packet.decode(association.poll()) for _ in range(8)]
    for kind in (FieldType.COOKIE, FieldType.UNIQUE_IDENTIFIER):
        assert len({packet.of_type(kind)[0].value for packet in packets}) == 8


@pytest.mark.rfc8915("5.7-10")
def test_out_of_cookies():
    association = make_association(cookies=2)
    association.poll()
    association.poll()
    with pytest.raises(OutOfCookies):
        association.poll()


@pytest.mark.rfc8915("5.5-2", "5.6-12", "5.7-11", "5.7-13")
@pytest.mark.parametrize("lost", range(8))
def test_the_cookies_come_back_to_eight_after_losses(lost):
    association = make_association()
    for _ in range(lost):
        association.poll()
    request = association.poll()
    assert len(Packet.decode(request).of_type(FieldType.COOKIE_PLACEHOLDER)) == lost
    sample = receive(association, serve(request))
    assert (sample.asked, sample.cookies) == (lost + 1, lost + 1)
    assert len(association.jar) == 8


@pytest.mark.rfc8915("5.5-4")
def test_placeholders_hold_zeroes():
    placeholders = Packet.decode(make_association(cookies=3).poll()).of_type(FieldType.COOKIE_PLACEHOLDER)
    assert len(placeholders) == 5
    assert {field.value for field in placeholders} == {bytes(100)}


@pytest.mark.rfc8915("5.6-11")
def test_each_request_has_a_nonce_of_its_own():
    association = make_association()
    fields = [Packet.decode(association.poll()).authenticator for _ in range(8)]
    assert len({Authenticator.decode(field.value).nonce for field in fields}) == 8


def test_a_server_that_gives_fewer_cookies_is_noticed():
    association = make_association(cookies=3)
    answer = forge(association.poll(), hidden=[Field(FieldType.COOKIE, b"c" * 100)])
    sample = receive(association, answer)
    assert (sample.asked, sample.cookies) == (6, 1)


@pytest.mark.rfc8915("5.5-3", "5.7-14", "5.7-15")
@pytest.mark.parametrize("length", [100, 104, 168, 256])
def test_a_request_is_never_longer_than_the_smallest_path_allows(length):
    association = Association(KeResult(KEYS, (b"c" * length,)), secrets.token_bytes)
    request = association.poll()
    assert len(request) <= MAX_REQUEST
    assert len(request) + 40 + 8 <= 1280, "with the headers of IPv6 and UDP, the smallest MTU of IPv6"
    placeholders = Packet.decode(request).of_type(FieldType.COOKIE_PLACEHOLDER)
    assert {len(field.value) for field in placeholders} <= {length}
    assert len(placeholders) == min(7, (MAX_REQUEST - 48 - 36 - 40 - 4 - length) // (4 + length))


def test_a_server_that_floods_with_cookies():
    association = make_association()
    answer = forge(association.poll(), hidden=[Field(FieldType.COOKIE, bytes((n,)) * 16) for n in range(40)])
    assert receive(association, answer).cookies == 8
    assert len(association.jar) == 8


# Samples


@given(
    offset=st.integers(-(10**15), 10**15),
    forth=st.integers(0, 10**9),
    back=st.integers(0, 10**9),
    took=st.integers(0, 10**8),
)
def test_offset_and_delay(offset, forth, back, took):
    """RFC 5905 section 8: the error of the offset is half the asymmetry of the path."""
    association = make_association()
    answer = serve(association.poll(), at=SENT + forth + offset, took=took)
    sample = receive(association, answer, received=SENT + forth + took + back)
    assert abs(sample.delay - (forth + back)) <= 1
    assert abs(sample.offset - offset - (forth - back) // 2) <= 1


def test_what_a_sample_tells():
    association = make_association()
    sample = receive(association, serve(association.poll()), received=SENT + 10 * MS)
    assert (sample.stratum, sample.leap, sample.precision) == (2, 0, -20)
    assert sample.reference_id == b"TEST"
    assert sample.synchronised
    assert 0 <= sample.root_distance - (20 * MS + 10 * MS) // 2 - 5 * MS < 50_000


@pytest.mark.parametrize(
    ("leap", "stratum", "synchronised"),
    [(0, 1, True), (1, 15, True), (3, 2, False), (0, 16, False), (3, 16, False)],
)
def test_who_is_synchronised(leap, stratum, synchronised):
    association = make_association()
    clock = replace(CLOCK, leap=Leap(leap), stratum=stratum)
    assert receive(association, serve(association.poll(), clock=clock)).synchronised is synchronised


def test_the_turn_of_2036():
    """A server already in the next era is not 136 years behind."""
    turn = 2_085_978_496_000_000_000
    association = make_association()
    answer = serve(association.poll(), at=turn + 5)
    sample = association.receive(answer, sent=turn - 10, received=turn - 10)
    assert abs(sample.offset - 15) <= 1


# What is not the answer


def assert_ignored(association, datagram):
    """Nothing is kept of it, and the true answer is still taken."""
    held = len(association.jar)
    with pytest.raises(NotAuthentic):
        receive(association, datagram)
    assert len(association.jar) == held


@pytest.mark.rfc8915("5.6-4", "5.7-29", "5.7-30", "5.7-31")
def test_forged_answers_are_ignored_and_the_true_one_is_taken():
    association = make_association()
    request = association.poll()
    asked = Packet.decode(request)
    right = Header(mode=Mode.SERVER, stratum=2, origin=asked.header.transmit, receive=STAMP, transmit=STAMP)
    identifier = asked.of_type(FieldType.UNIQUE_IDENTIFIER)[0]
    cookie = [Field(FieldType.COOKIE, b"c" * 100)]
    forgeries = {
        "nothing": b"",
        "random octets": secrets.token_bytes(200),
        "no identifier": forge(request, fields=[], hidden=cookie),
        "another identifier": forge(
            request, fields=[Field(FieldType.UNIQUE_IDENTIFIER, bytes(32))], hidden=cookie
        ),
        "two identifiers": forge(request, fields=[identifier, identifier], hidden=cookie),
        "another origin": forge(request, header=right._replace(origin=right.origin ^ 1), hidden=cookie),
        "version 3": forge(request, header=right._replace(version=3), hidden=cookie),
        "no receive time": forge(request, header=right._replace(receive=0), hidden=cookie),
        "no transmit time": forge(request, header=right._replace(transmit=0), hidden=cookie),
        "origin zero": forge(request, header=right._replace(origin=0), hidden=cookie),
        "a client's mode": forge(request, header=right._replace(mode=Mode.CLIENT), hidden=cookie),
        "broadcast": forge(request, header=right._replace(mode=5), hidden=cookie),
        "the key of the other direction": forge(request, key=KEYS.c2s, hidden=cookie),
        "a stranger's key": forge(request, key=bytes(32), hidden=cookie),
        "no protection": forge(request, key=None),
        "no protection but a cookie": forge(request, key=None, fields=[identifier, *cookie]),
        "our own request": request,
        "kiss code RATE without protection": forge(
            request, header=right._replace(stratum=0, reference_id=b"RATE"), key=None
        ),
        "kiss code DENY without protection": forge(
            request, header=right._replace(stratum=0, reference_id=b"DENY"), key=None
        ),
        "NTSN that is not stratum 0": forge(
            request, header=right._replace(stratum=1, reference_id=b"NTSN"), key=None
        ),
    }
    for name, datagram in forgeries.items():
        try:
            assert_ignored(association, datagram)
        except BaseException as error:
            error.add_note(name)
            raise
    assert receive(association, serve(request)).cookies == 1


@pytest.mark.rfc8915("5.7-29", "5.7-30")
def test_every_changed_bit_of_an_answer_is_found():
    association = make_association()
    answer = serve(association.poll())
    for position in range(0, len(answer) * 8, 3):
        forged = bytearray(answer)
        forged[position // 8] ^= 1 << position % 8
        assert_ignored(association, bytes(forged))
    receive(association, answer)


def test_every_truncation_of_an_answer_is_ignored():
    association = make_association()
    answer = serve(association.poll())
    for length in range(len(answer)):
        assert_ignored(association, answer[:length])
    receive(association, answer)


@given(st.binary(max_size=300))
def test_random_octets_are_ignored(datagram):
    association = make_association()
    association.poll()
    assert_ignored(association, datagram)


@pytest.mark.rfc8915("5.7-29")
def test_a_replayed_answer_is_ignored():
    association = make_association()
    answer = serve(association.poll())
    receive(association, answer)
    assert_ignored(association, answer)
    association.poll()
    assert_ignored(association, answer)


@pytest.mark.rfc8915("5.7-29")
def test_an_answer_to_an_older_request_is_ignored():
    association = make_association()
    late = serve(association.poll())
    association.poll()
    assert_ignored(association, late)


def test_an_answer_nobody_asked_for_is_ignored():
    assert_ignored(make_association(), serve(make_association().poll()))


@pytest.mark.rfc8915("5.7-28")
def test_cookies_behind_the_authenticator_are_not_kept():
    association = make_association()
    answer = serve(association.poll()) + Field(FieldType.COOKIE, b"f" * 100).encode()
    assert receive(association, answer).cookies == 1
    assert b"f" * 100 not in [association.jar.take() for _ in range(8)]


@pytest.mark.rfc8915("5.7-27")
def test_cookies_in_the_clear_are_not_kept():
    """Section 5.7: cookies from the server MUST be encrypted."""
    association = make_association()
    request = association.poll()
    identifier = Packet.decode(request).of_type(FieldType.UNIQUE_IDENTIFIER)[0]
    answer = forge(request, fields=[identifier, Field(FieldType.COOKIE, b"f" * 100)])
    assert receive(association, answer).cookies == 0
    assert len(association.jar) == 7


# Kiss codes


def ntsn(request):
    asked = Packet.decode(request)
    header = Header(mode=Mode.SERVER, stratum=0, reference_id=b"NTSN", origin=asked.header.transmit)
    return forge(request, header=header, key=None)


def test_ntsn_is_a_hint_and_the_true_answer_is_still_taken():
    """Anybody can forge NTSN: section 5.7 waits for a valid answer."""
    association = make_association()
    request = association.poll()
    with pytest.raises(KissOfDeath) as caught:
        receive(association, ntsn(request))
    assert (caught.value.code, caught.value.authentic) == ("NTSN", False)
    assert receive(association, serve(request)).cookies == 1


@pytest.mark.rfc8915("5.7-34", "5.7-35")
def test_ntsn_to_another_request_is_ignored():
    association = make_association()
    old = ntsn(association.poll())
    association.poll()
    assert_ignored(association, old)


@pytest.mark.rfc8915("5.7-34", "5.7-35")
def test_ntsn_without_its_identifier_is_ignored():
    association = make_association()
    request = association.poll()
    assert_ignored(association, ntsn(request)[:48])
    assert receive(association, serve(request)).cookies == 1


def test_the_ntsn_of_our_server_is_understood():
    stranger = Keyring.new(0, secrets.token_bytes).seal(KEYS, secrets.token_bytes(16))
    association = Association(KeResult(KEYS, (stranger,)), secrets.token_bytes)
    with pytest.raises(KissOfDeath) as caught:
        receive(association, serve(association.poll()))
    assert (caught.value.code, caught.value.authentic) == ("NTSN", False)


@pytest.mark.parametrize("code", [b"RATE", b"DENY", b"RSTR", b"INIT", b"ABC\0"])
def test_an_authentic_kiss_code(code):
    association = make_association()
    request = association.poll()
    header = Header(
        mode=Mode.SERVER, stratum=0, reference_id=code, origin=Packet.decode(request).header.transmit
    )
    answer = forge(request, header=header, hidden=[Field(FieldType.COOKIE, b"c" * 100)])
    with pytest.raises(KissOfDeath) as caught:
        receive(association, answer)
    assert (caught.value.code, caught.value.authentic) == (code.decode().rstrip("\0"), True)
    assert len(association.jar) == 8, "its cookies are authentic too"
    assert_ignored(association, answer)


# A captured answer


@pytest.mark.rfc8915("4.1.6-2", "5.3-1", "5.4-2", "5.7-4", "5.7-7")
def test_the_captured_answer_of_chronyd():
    """The request's random octets are played back, so that the recorded answer fits."""
    named = tomllib.loads((VECTORS / "chrony-ntp-answer.toml").read_text())
    octets = {key: bytes.fromhex(value) for key, value in named.items()}
    asked = Packet.decode(octets["request"])
    played = iter(
        [
            asked.of_type(FieldType.UNIQUE_IDENTIFIER)[0].value,
            octets["request"][40:48],
            asked.authenticator.value[4:20],
        ]
    )
    cookie = asked.of_type(FieldType.COOKIE)[0].value
    keys = SessionKeys(AeadId.AES_SIV_CMAC_256, octets["c2s"], octets["s2c"])
    association = Association(KeResult(keys, (cookie, *[b"other" * 20] * 4)), lambda _count: next(played))
    assert association.poll() == octets["request"]
    header = Header.decode(octets["answer"])
    received = ntptime.unix_ns(header.transmit, SENT)
    sample = association.receive(octets["answer"], sent=received - 30_000, received=received)
    assert (sample.stratum, sample.leap, sample.asked, sample.cookies) == (10, 0, 4, 4)
    assert sample.synchronised
    assert len(association.jar) == 8


# Without NTS


def test_plain_requests_have_48_octets_and_their_answer_a_sample():
    plain = Plain(secrets.token_bytes)
    first, second = plain.poll(), plain.poll()
    assert (len(first), first != second) == (48, True)
    sample = receive(plain, serve(second, at=SENT + 5 * MS), SENT + MS)
    assert (sample.stratum, sample.cookies, sample.asked) == (2, 0, 0)
    with pytest.raises(NotAuthentic, match="not an answer to our request"):
        receive(plain, serve(first))


def test_a_plain_kiss_code_is_nobodys_word():
    plain = Plain(secrets.token_bytes)
    with pytest.raises(KissOfDeath, match="RATE") as caught:
        receive(plain, serve(plain.poll(), clock=Kiss.RATE.state))
    assert not caught.value.authentic


@given(st.binary(max_size=200))
def test_garbage_is_no_answer_to_a_plain_request(octets):
    plain = Plain(secrets.token_bytes)
    plain.poll()
    with pytest.raises(NotAuthentic):
        receive(plain, octets)
