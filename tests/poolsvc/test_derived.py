"""Secrets that derive from the registry's key: what they prove, and what becomes of them with another key."""

import base64
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from poolsvc.derived import Purpose, RegistryKey


def test_a_token_proves_its_row_and_its_purpose_only():
    key = RegistryKey(bytes(32))
    token = key.token(Purpose.SIGN_IN, 42)
    assert key.read(Purpose.SIGN_IN, token) == 42
    assert key.read(Purpose.INVITATION, token) is None
    assert RegistryKey(b"\x01" * 32).read(Purpose.SIGN_IN, token) is None
    assert key.read(Purpose.SIGN_IN, token.replace("42.", "43.")) is None


def test_an_operator_id_is_a_members_and_a_registrys():
    key = RegistryKey(bytes(32))
    assert re.fullmatch(r"[a-z2-7]{13}", key.operator_id(1))
    assert key.operator_id(1) == RegistryKey(bytes(32)).operator_id(1)
    others = {key.operator_id(2), key.operator_id(11), RegistryKey(b"\x01" * 32).operator_id(1)}
    assert len(others | {key.operator_id(1)}) == 4


@pytest.mark.parametrize(
    "text", ["", ".", "42", "42.", ".x", "-1.x", "٤٢.x", "1" * 5000 + ".x", "42.é", "042.", "\x00", "42. "]
)
def test_what_is_no_token_is_none(text):
    assert RegistryKey(bytes(32)).read(Purpose.SIGN_IN, text) is None


def test_another_spelling_of_a_token_is_no_token():
    key = RegistryKey(bytes(32))
    token = key.token(Purpose.SIGN_IN, 42)
    for other in (f"0{token}", f" {token}", f"{token}=", token[:-1], token.upper()):
        assert key.read(Purpose.SIGN_IN, other) is None


def test_the_key_is_made_once_even_by_many_at_a_time(tmp_path):
    file = tmp_path / "registry.key"
    with ThreadPoolExecutor(16) as threads:
        keys = list(threads.map(lambda _: RegistryKey.load(file), range(64)))
    assert len({key.secret(Purpose.WEBHOOK, 1) for key in keys}) == 1
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [file]


def test_a_renewed_key_makes_what_was_derived_from_the_old_one_void(tmp_path):
    file = tmp_path / "registry.key"
    token = RegistryKey.load(file).token(Purpose.INVITATION, 7)
    RegistryKey.renew(file)
    assert RegistryKey.load(file).read(Purpose.INVITATION, token) is None


@pytest.mark.parametrize("content", [b"", b"not base64!", base64.b64encode(bytes(31)), b"\xff" * 50])
def test_a_file_that_is_no_key_is_an_error(tmp_path, content):
    file = tmp_path / "registry.key"
    file.write_bytes(content)
    with pytest.raises(ValueError):
        RegistryKey.load(file)


def test_the_key_is_in_no_representation(tmp_path):
    file = tmp_path / "registry.key"
    key = RegistryKey.load(file)
    assert file.read_text() not in repr(key)
