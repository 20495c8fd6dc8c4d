"""Cookies and their keys (RFC 8915 section 6)."""

import hmac
import json
import os
import secrets

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from hypothesis import given
from hypothesis import strategies as st

from nts_core.aead import KEY_LENGTH, AeadId, SessionKeys
from nts_core.cookies import (
    DAY,
    MAX_COOKIE_LENGTH,
    MAX_COOKIES,
    CookieJar,
    CookieKey,
    Keyring,
    Schedule,
    cookie_length,
)
from nts_core.errors import NotAuthentic, OutOfCookies, WireError

KEYS = SessionKeys(AeadId.AES_SIV_CMAC_256, bytes(range(32)), bytes(range(32, 64)))
NOW = 1_800_000_000
KEPT_3 = Schedule(DAY, 3 * DAY)
RATCHET = Schedule(DAY, 3 * DAY, ratchet=True)


def keys_of(algorithm):
    length = KEY_LENGTH[algorithm]
    secret = st.binary(min_size=length, max_size=length)
    return st.builds(SessionKeys, aead=st.just(algorithm), c2s=secret, s2c=secret)


session_keys = st.sampled_from(AeadId).flatmap(keys_of)
cookie_keys = st.builds(
    CookieKey,
    id=st.integers(0, 65535),
    starts_at=st.integers(0, 253_402_300_799),
    secret=st.binary(min_size=32, max_size=32),
)
schedules = st.builds(
    Schedule, rotation=st.integers(3600, DAY), history=st.integers(0, 30 * DAY), ratchet=st.booleans()
)
keyrings = st.builds(
    Keyring,
    st.lists(cookie_keys, min_size=2, max_size=12, unique_by=lambda key: key.id).map(tuple),
    schedules,
)


def seal(keyring, keys=KEYS):
    return keyring.seal(keys, secrets.token_bytes(16))


def key_id(cookie):
    return int.from_bytes(cookie[2:4], "big")


@pytest.fixture
def keyring():
    return Keyring.new(NOW, secrets.token_bytes)


@pytest.mark.rfc8915("4.1.6-1", "5.4-1", "6-8")
@given(keyrings, session_keys)
def test_a_cookie_opens_to_what_was_sealed(keyring, keys):
    cookie = seal(keyring, keys)
    assert keyring.open(cookie) == keys
    assert len(cookie) == cookie_length(keys.aead) <= 192
    assert len(cookie) % 4 == 0


def test_the_lengths_of_cookies():
    """chrony keeps 256 octets at most, NTPsec 192; and short packets pass where long ones do not."""
    assert [cookie_length(algorithm) for algorithm in (15, 16, 17, 30)] == [100, 132, 164, 68]


@given(keyrings, session_keys, st.integers(0, 8))
def test_many_cookies_at_once(keyring, keys, count):
    cookies = keyring.seal_many(keys, secrets.token_bytes(count * 16))
    assert len(set(cookies)) == count
    assert [keyring.open(cookie) for cookie in cookies] == [keys] * count


@pytest.mark.rfc8915("6-1", "6-8", "6-9", "6-10")
def test_the_layout_of_a_cookie():
    """Version, algorithm and key id in front; then nonce, and the session keys sealed with AES-SIV."""
    keys = (CookieKey(0x0709, NOW + DAY, b"n" * 32), CookieKey(0x0708, NOW, b"k" * 32))
    cookie = seal(Keyring(keys, Schedule()))
    head, nonce, sealed = cookie[:4], cookie[4:20], cookie[20:]
    assert head == bytes.fromhex("010f0708")
    assert AESSIV(b"k" * 32).decrypt(sealed, [head, nonce]) == KEYS.c2s + KEYS.s2c


@pytest.mark.rfc8915("6-9")
def test_no_two_cookies_are_alike(keyring):
    assert len({seal(keyring) for _ in range(64)}) == 64


@pytest.mark.rfc8915("6-8")
def test_a_cookie_does_not_show_the_keys(keyring):
    cookie = seal(keyring)
    assert KEYS.c2s not in cookie
    assert KEYS.s2c not in cookie


def test_every_truncation_is_refused(keyring):
    cookie = seal(keyring)
    for length in range(len(cookie)):
        with pytest.raises(NotAuthentic):
            keyring.open(cookie[:length])


def test_every_flipped_bit_is_refused(keyring):
    cookie = seal(keyring)
    for position in range(len(cookie) * 8):
        forged = bytearray(cookie)
        forged[position // 8] ^= 1 << position % 8
        with pytest.raises(NotAuthentic):
            keyring.open(bytes(forged))


def test_padding_is_refused(keyring):
    with pytest.raises(NotAuthentic):
        keyring.open(seal(keyring) + bytes(4))


@given(keyrings, st.binary(max_size=300))
def test_random_octets_are_no_cookie(keyring, octets):
    with pytest.raises(NotAuthentic):
        keyring.open(octets)


def test_another_key_with_the_same_id_does_not_open():
    first, second = (
        Keyring((CookieKey(8, NOW, bytes(32)), CookieKey(7, 0, secret)), Schedule())
        for secret in (bytes(32), bytes(31) + b"\1")
    )
    with pytest.raises(NotAuthentic):
        second.open(seal(first))


def test_processes_of_one_origin_do_not_repeat_each_others_nonces(keyring):
    """chrony's did once: a generator's state had been copied by fork. Here all randomness is the kernel's."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        os.write(theirs, seal(keyring))
        os._exit(0)
    mine = seal(keyring)
    its = os.read(ours, 200)
    os.waitpid(child, 0)
    assert keyring.open(its) == KEYS
    assert its[4:20] != mine[4:20]


# Rotation


def test_a_keyring_stays_itself_until_its_next_key_begins(keyring):
    for now in (NOW, NOW + 1, NOW + DAY - 1):
        assert keyring.at(now, secrets.token_bytes) is keyring
    assert keyring.next_at == NOW + DAY


@pytest.mark.rfc8915("6-4")
def test_the_key_made_ahead_is_the_one_that_seals_next(keyring):
    """Another host or process that has the file opens such cookies before it has moved on itself."""
    moved = keyring.at(NOW + DAY, secrets.token_bytes)
    assert key_id(seal(moved)) == (key_id(seal(keyring)) + 1) % 65536
    assert keyring.open(seal(moved)) == KEYS
    assert moved.next_at == NOW + 2 * DAY


@pytest.mark.rfc8915("6-5", "6-6")
@pytest.mark.parametrize("schedule", [KEPT_3, RATCHET], ids=["random", "ratchet"])
def test_cookies_live_as_long_as_the_history(schedule):
    """With three days of history a cookie survives three rotations and not the fourth."""
    keyring = Keyring.new(NOW, secrets.token_bytes, schedule)
    cookie = seal(keyring)
    for _ in range(3):
        keyring = keyring.at(keyring.next_at, secrets.token_bytes)
        assert keyring.open(cookie) == KEYS
    keyring = keyring.at(keyring.next_at, secrets.token_bytes)
    with pytest.raises(NotAuthentic):
        keyring.open(cookie)


@given(st.lists(st.integers(0, 40 * DAY), min_size=1, max_size=12), schedules)
def test_whatever_the_clock_does_a_keyring_is_whole(steps, schedule):
    keyring, now = Keyring.new(NOW, secrets.token_bytes, schedule), NOW
    for step in steps:
        now += step
        before, keyring = keyring, keyring.at(now, secrets.token_bytes)
        assert keyring.open(seal(keyring)) == KEYS
        assert now < keyring.next_at <= now + schedule.rotation
        assert Keyring.load(keyring.dump()).open(seal(keyring)) == KEYS
        if step < schedule.rotation:
            assert before.open(seal(keyring)) == KEYS, "the key made ahead was not used"


def test_ids_that_do_not_follow_each_other_do_no_harm():
    """As in a file that somebody wrote by hand: the next key takes the place of a retired one with its id."""
    keyring = Keyring((CookieKey(1, DAY, b"n" * 32), CookieKey(2, 0, b"s" * 32)), Schedule())
    assert key_id(seal(keyring.at(DAY, secrets.token_bytes).at(2 * DAY, secrets.token_bytes))) == 2


def test_a_clock_that_was_set_back_begins_anew_with_random_keys(keyring):
    earlier = keyring.at(NOW - 400 * DAY, secrets.token_bytes)
    assert earlier.next_at == NOW - 399 * DAY
    assert earlier.open(seal(keyring)) == KEYS


@pytest.mark.rfc8915("6-3")
def test_key_ids_begin_anew_after_65535():
    last = Keyring((CookieKey(0, DAY, b"n" * 32), CookieKey(65535, 0, bytes(32))), KEPT_3)
    rotated = last.at(DAY, secrets.token_bytes)
    assert key_id(seal(rotated)) == 0
    assert rotated.open(seal(last)) == KEYS


@pytest.mark.rfc8915("6-3")
@pytest.mark.parametrize(
    "keys", [(), (CookieKey(1, 0, bytes(32)),), (CookieKey(1, 0, bytes(32)), CookieKey(1, 1, bytes(32)))]
)
def test_a_keyring_needs_keys_with_different_ids(keys):
    with pytest.raises(ValueError, match="different ids"):
        Keyring(keys, Schedule())


@pytest.mark.parametrize(("rotation", "history"), [(0, 0), (367 * DAY, 0), (60, 60 * 1023), (DAY, -1)])
def test_schedules_that_cannot_be(rotation, history):
    with pytest.raises(ValueError, match="rotation"):
        Schedule(rotation, history)


def test_another_schedule_for_the_same_keys(keyring):
    hourly = keyring.under(3600, DAY)
    assert hourly.next_at == NOW + 3600
    assert hourly.open(seal(keyring)) == KEYS
    assert hourly.schedule == Schedule(3600, DAY)


# The ratchet


@pytest.mark.rfc8915("6-7")
def test_the_ratchet_is_hkdf_of_the_key_salted_with_its_id():
    """Section 6, checked against HKDF written out (RFC 5869): extract, then one block of expand."""
    key = CookieKey(0x1234, NOW, bytes(range(32)))
    extracted = hmac.digest(bytes.fromhex("1234"), key.secret, "sha256")
    expected = hmac.digest(extracted, b"truechimer cookie key" + b"\1", "sha256")
    assert key.successor(DAY) == CookieKey(0x1235, NOW + DAY, expected)


@pytest.mark.rfc8915("6-7")
def test_hosts_that_share_a_ratchet_once_rotate_together():
    """Each opens the other's cookies for ever after, whoever rotates first, and no key is sent again."""
    first = Keyring.new(NOW, secrets.token_bytes, RATCHET)
    second = Keyring.new(NOW, secrets.token_bytes).adopt(Keyring.load(first.share().dump()))
    for day in range(1, 30):
        first = first.at(NOW + day * DAY, secrets.token_bytes)
        assert second.open(seal(first)) == KEYS
        second = second.at(NOW + day * DAY, secrets.token_bytes)
        assert first.open(seal(second)) == KEYS
        assert first.next_at == second.next_at


def test_a_host_that_slept_catches_up():
    first = Keyring.new(NOW, secrets.token_bytes, RATCHET)
    late = NOW + 500 * DAY
    stepped = first
    for day in range(1, 501):
        stepped = stepped.at(NOW + day * DAY, secrets.token_bytes)
    assert first.at(late, secrets.token_bytes).dump() == stepped.dump()


def test_a_ratchet_never_turns_back():
    ring = Keyring.new(NOW, secrets.token_bytes, RATCHET).at(NOW + 9 * DAY, secrets.token_bytes)
    assert ring.at(NOW, secrets.token_bytes) is ring


def test_a_shared_ratchet_does_not_open_what_was_sealed_before():
    """Who gets the share learns the keys from now on, and none of those before."""
    ring = Keyring.new(NOW, secrets.token_bytes, RATCHET)
    cookie = seal(ring)
    with pytest.raises(NotAuthentic):
        ring.at(NOW + DAY, secrets.token_bytes).share().open(cookie)


def test_adopting_keeps_ones_own_cookies(keyring):
    adopted = keyring.adopt(Keyring.new(NOW, secrets.token_bytes, RATCHET).share())
    assert adopted.open(seal(keyring)) == KEYS


def test_random_keys_cannot_be_shared(keyring):
    with pytest.raises(ValueError, match="no successors"):
        keyring.share()


def test_a_ratchet_keeps_its_rotation():
    ring = Keyring.new(NOW, secrets.token_bytes, RATCHET)
    assert ring.under(3600, DAY).schedule == Schedule(DAY, DAY, ratchet=True)


def test_a_quick_ratchet_takes_a_long_history_as_far_as_it_goes():
    """The rotation is another host's choice, so that this host's history may not fit it."""
    ring = Keyring.new(NOW, secrets.token_bytes, Schedule(600, 3600, ratchet=True))
    assert ring.under(DAY, 10 * DAY).schedule == Schedule(600, 600 * 1022, ratchet=True)


# The rest


def test_secrets_stay_out_of_representations(keyring):
    shown = (
        repr(keyring) + repr(CookieKey(1, 2, b"S" * 32)) + repr(SessionKeys(AeadId(15), b"S" * 32, b"S" * 32))
    )
    assert "SSSS" not in shown


@given(keyrings, session_keys)
def test_a_key_file_round_trip(keyring, keys):
    loaded = Keyring.load(keyring.dump())
    assert loaded.open(seal(keyring, keys)) == keys
    assert loaded.dump() == keyring.dump()


def test_every_truncation_of_a_key_file_is_refused(keyring):
    content = keyring.at(NOW + DAY, secrets.token_bytes).dump()
    for length in range(len(content.rstrip())):
        with pytest.raises(WireError):
            Keyring.load(content[:length])


@given(st.binary(max_size=200))
def test_random_octets_are_no_key_file(octets):
    with pytest.raises(WireError):
        Keyring.load(octets)


def altered(**changes):
    """A key file in which one thing is not as `dump` writes it."""
    key = {"id": 1, "starts_at": NOW, "secret": "A" * 43 + "="}
    document = {"version": 2, "rotation": DAY, "history": DAY, "ratchet": False}
    document |= {name: value for name, value in changes.items() if name not in key}
    keys = [key | {"id": 2}, key | {name: value for name, value in changes.items() if name in key}]
    return {"keys": keys} | document


def test_the_file_that_is_altered_below_is_a_key_file():
    Keyring.load(json.dumps(altered()).encode())


@pytest.mark.parametrize(
    "document",
    [
        [],
        "text",
        None,
        3,
        {},
        {"version": 2},
        altered(version=1),
        altered(version="2"),
        altered(rotation=0),
        altered(rotation="day"),
        altered(rotation=float("nan")),
        altered(history=-1),
        altered(history=float("inf")),
        altered(keys=[]),
        altered(keys=3),
        altered(keys={"id": 1}),
        altered(keys=[1, 2]),
        altered(keys=altered()["keys"][:1]),
        altered(keys=[{**altered()["keys"][0], "id": number} for number in range(1025)]),
        altered(id=-1),
        altered(id=2),
        altered(id=65536),
        altered(id=None),
        altered(id=float("inf")),
        altered(starts_at="yesterday"),
        altered(starts_at=-1),
        altered(starts_at=253_402_300_800),
        altered(starts_at=10**400),
        altered(starts_at=float("inf")),
        altered(secret="A" * 20 + "===="),
        altered(secret="AAAA"),
        altered(secret="\u20ac" * 44),
        altered(secret=7),
    ],
)
def test_other_json_is_no_key_file(document):
    with pytest.raises(WireError):
        Keyring.load(json.dumps(document).encode())


def test_deeply_nested_json_is_no_key_file():
    with pytest.raises(WireError):
        Keyring.load(b"[" * 100_000)


def test_an_error_about_a_key_file_does_not_show_its_secrets():
    with pytest.raises(WireError) as caught:
        Keyring.load(json.dumps(altered(secret="SECRET" * 4)).encode())
    assert "SECRET" not in str(caught.value)


def test_a_jar_gives_each_cookie_once_the_oldest_first():
    jar = CookieJar((b"a", b"b"))
    jar.add(b"c")
    assert [jar.take() for _ in range(3)] == [b"a", b"b", b"c"]
    with pytest.raises(OutOfCookies):
        jar.take()


@given(st.lists(st.binary(max_size=300), max_size=30))
def test_a_jar_holds_the_eight_latest_usable_cookies(cookies):
    jar = CookieJar(tuple(cookies))
    usable = [cookie for cookie in cookies if 0 < len(cookie) <= MAX_COOKIE_LENGTH][-MAX_COOKIES:]
    assert [jar.take() for _ in range(len(jar))] == usable
