"""Cookies and their keys (RFC 8915 section 6)."""

import json
import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nts_core.aead import AeadId, SessionKeys
from nts_core.cookies import MAX_COOKIE_LENGTH, MAX_COOKIES, CookieJar, CookieKey, Keyring
from nts_core.errors import NotAuthentic, OutOfCookies, WireError

KEYS = SessionKeys(AeadId.AES_SIV_CMAC_256, bytes(range(32)), bytes(range(32, 64)))
NOW = 1_800_000_000
session_keys = st.builds(
    SessionKeys,
    aead=st.just(AeadId.AES_SIV_CMAC_256),
    c2s=st.binary(min_size=32, max_size=32),
    s2c=st.binary(min_size=32, max_size=32),
)
cookie_keys = st.builds(
    CookieKey,
    id=st.integers(0, 65535),
    made_at=st.integers(0, 1 << 40),
    secret=st.binary(min_size=32, max_size=32),
)
keyrings = st.lists(cookie_keys, min_size=1, max_size=11, unique_by=lambda key: key.id).map(
    lambda keys: Keyring(tuple(keys))
)


@pytest.fixture
def keyring():
    return Keyring.new(NOW, secrets.token_bytes)


@given(keyrings, session_keys)
def test_a_cookie_opens_to_what_was_sealed(keyring, keys):
    cookie = keyring.seal(keys, secrets.token_bytes)
    assert len(cookie) == 100
    assert keyring.open(cookie) == keys


def test_no_two_cookies_are_alike(keyring):
    assert len({keyring.seal(KEYS, secrets.token_bytes) for _ in range(64)}) == 64


def test_a_cookie_does_not_show_the_keys(keyring):
    cookie = keyring.seal(KEYS, secrets.token_bytes)
    assert KEYS.c2s not in cookie
    assert KEYS.s2c not in cookie


def test_every_truncation_is_refused(keyring):
    cookie = keyring.seal(KEYS, secrets.token_bytes)
    for length in range(len(cookie)):
        with pytest.raises(NotAuthentic):
            keyring.open(cookie[:length])


def test_every_flipped_bit_is_refused(keyring):
    cookie = keyring.seal(KEYS, secrets.token_bytes)
    for position in range(len(cookie) * 8):
        forged = bytearray(cookie)
        forged[position // 8] ^= 1 << position % 8
        with pytest.raises(NotAuthentic):
            keyring.open(bytes(forged))


def test_padding_is_refused(keyring):
    with pytest.raises(NotAuthentic):
        keyring.open(keyring.seal(KEYS, secrets.token_bytes) + bytes(4))


@given(keyrings, st.binary(max_size=300))
def test_random_octets_are_no_cookie(keyring, octets):
    with pytest.raises(NotAuthentic):
        keyring.open(octets)


def test_another_key_with_the_same_id_does_not_open(keyring):
    first = Keyring((CookieKey(7, NOW, bytes(32)),))
    second = Keyring((CookieKey(7, NOW, bytes(31) + b"\1"),))
    with pytest.raises(NotAuthentic):
        second.open(first.seal(KEYS, secrets.token_bytes))


def test_cookies_live_as_long_as_the_history(keyring):
    """With a history of 3 a cookie survives three rotations and not the fourth."""
    cookie = keyring.seal(KEYS, secrets.token_bytes)
    rotated = keyring
    for turn in range(1, 4):
        rotated = rotated.rotated(NOW + turn, secrets.token_bytes, history=3)
        assert rotated.open(cookie) == KEYS
        assert rotated.sealing_since == NOW + turn
    with pytest.raises(NotAuthentic):
        rotated.rotated(NOW + 4, secrets.token_bytes, history=3).open(cookie)


def test_rotation_leaves_the_old_keyring_alone(keyring):
    cookie = keyring.rotated(NOW + 1, secrets.token_bytes, history=3).seal(KEYS, secrets.token_bytes)
    with pytest.raises(NotAuthentic):
        keyring.open(cookie)


def test_key_ids_begin_anew_after_65535():
    last = Keyring((CookieKey(65535, NOW, bytes(32)),))
    rotated = last.rotated(NOW + 1, secrets.token_bytes, history=3)
    assert rotated.seal(KEYS, secrets.token_bytes)[2:4] == b"\0\0"
    assert rotated.open(last.seal(KEYS, secrets.token_bytes)) == KEYS


@pytest.mark.parametrize("keys", [(), (CookieKey(1, 0, bytes(32)), CookieKey(1, 1, bytes(32)))])
def test_a_keyring_needs_keys_with_different_ids(keys):
    with pytest.raises(ValueError, match="different ids"):
        Keyring(keys)


def test_secrets_stay_out_of_representations(keyring):
    shown = (
        repr(keyring) + repr(CookieKey(1, 2, b"S" * 32)) + repr(SessionKeys(AeadId(15), b"S" * 32, b"S" * 32))
    )
    assert "SSSS" not in shown


@given(keyrings, session_keys)
def test_a_key_file_round_trip(keyring, keys):
    loaded = Keyring.load(keyring.dump())
    assert loaded.open(keyring.seal(keys, secrets.token_bytes)) == keys
    assert loaded.dump() == keyring.dump()


def test_every_truncation_of_a_key_file_is_refused(keyring):
    content = keyring.rotated(NOW + 1, secrets.token_bytes, history=1).dump()
    for length in range(len(content.rstrip())):
        with pytest.raises(WireError):
            Keyring.load(content[:length])


@given(st.binary(max_size=200))
def test_random_octets_are_no_key_file(octets):
    with pytest.raises(WireError):
        Keyring.load(octets)


def altered(**changes):
    key = {"id": 1, "made_at": NOW, "secret": "A" * 43 + "="}
    return {"version": 1, "keys": [key | changes]}


@pytest.mark.parametrize(
    "document",
    [
        [],
        "text",
        None,
        3,
        {},
        {"version": 1},
        {"version": 2, "keys": []},
        {"version": 1, "keys": []},
        {"version": 1, "keys": 3},
        {"version": 1, "keys": {"id": 1}},
        {"version": 1, "keys": [1]},
        altered(id=-1),
        altered(id=65536),
        altered(id=None),
        altered(id=float("inf")),
        altered(made_at="yesterday"),
        altered(made_at=float("inf")),
        altered(secret="A" * 20 + "===="),
        altered(secret="AAAA"),
        altered(secret="\u20ac" * 44),
        altered(secret=7),
        {"version": 1, "keys": altered()["keys"] * 2},
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
