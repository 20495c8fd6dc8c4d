"""What a client keeps between runs: whole or not at all, for nobody else, and never lost in silence."""

import asyncio
import fcntl
import json
import os
from dataclasses import replace

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from lab.certificates import Authority
from nts_core import store
from nts_core.aead import AeadId, SessionKeys
from nts_core.client import ClientError, Failure
from nts_core.session import COOKIE_LIFETIME, DAY, CertificateTime, Credentials
from nts_core.store import Binding, CookieFile, Kept, TimeRecord

NOW = 20_000 * DAY
BINDING = Binding("ntp.example", 4460, "r" * 64)
KEYS = SessionKeys(AeadId.AES_SIV_CMAC_256, b"c" * 32, b"s" * 32)
OTHER = SessionKeys(AeadId.AES_SIV_CMAC_256, b"C" * 32, b"S" * 32)
KEPT = Kept(
    Credentials(
        keys=KEYS,
        cookies=(b"\0\xff" * 50, b"x" * 256),
        host="2001:db8::1",
        port=123,
        not_before=NOW - DAY,
        not_after=NOW + DAY,
        certificate_time=CertificateTime.FLOOR,
        alternative=OTHER,
        unchecked=3,
    ),
    ke_address="192.0.2.1",
    established_at=NOW - DAY,
    received_at=NOW,
    rate_floor=5,
)


@pytest.fixture
async def file(tmp_path):
    opened = await CookieFile.open(tmp_path / "state", BINDING)
    yield opened
    opened.close()


def path_of(directory):
    (path,) = directory.glob("state/*.json")
    return path


@pytest.mark.rfc8915("5.7-41")
async def test_what_is_saved_is_loaded(file, tmp_path):
    file.save(KEPT)
    assert file.load(NOW) == (KEPT, None)
    plain = replace(KEPT, credentials=replace(KEPT.credentials, alternative=None, cookies=()))
    file.save(plain)
    assert file.load(NOW) == (plain, None)
    assert path_of(tmp_path).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700


async def test_nothing_is_kept_at_first_and_after_forgetting(file, tmp_path):
    assert file.load(NOW) == (None, None)
    file.save(KEPT)
    file.forget()
    assert file.load(NOW) == (None, None)
    assert not list(tmp_path.glob("state/*.json"))
    file.forget()


@pytest.mark.parametrize("changes", [{"name": "other.example"}, {"port": 1}, {"roots": "other"}])
async def test_credentials_serve_only_what_they_were_asked_for(tmp_path, changes):
    asked = replace(BINDING, **changes)
    first = await CookieFile.open(tmp_path, BINDING)
    first.save(KEPT)
    first.close()
    if asked.stem != BINDING.stem:
        # Even if somebody renames the file.
        (tmp_path / f"{BINDING.stem}.json").rename(tmp_path / f"{asked.stem}.json")
    second = await CookieFile.open(tmp_path, asked)
    assert second.load(NOW) == (None, None)
    second.close()


async def test_old_cookies_are_not_used(file):
    file.save(KEPT)
    assert file.load(NOW + COOKIE_LIFETIME)[0] == KEPT
    assert file.load(NOW + COOKIE_LIFETIME + 1) == (None, None)


async def test_a_clock_that_was_set_back_makes_no_cookie_old(file):
    file.save(KEPT)
    assert file.load(0) == (KEPT, None)


SPOILED = {
    "empty": b"",
    "cut off": None,
    "not UTF-8": b"\xff\xfe",
    "another document": b"[]",
    "deep": b"[" * 5000,
    "long": b" " * (17 * 1024),
}


@pytest.mark.parametrize("content", SPOILED.values(), ids=SPOILED)
async def test_a_damaged_file_is_set_aside_with_a_message(file, tmp_path, content):
    file.save(KEPT)
    path = path_of(tmp_path)
    spoiled = path.read_bytes()[:-20] if content is None else content
    path.write_bytes(spoiled)
    kept, message = file.load(NOW)
    assert kept is None
    assert str(path) in message
    (aside,) = (tmp_path / "state").glob("*.damaged-*")
    assert aside.name in message
    assert aside.read_bytes() == spoiled
    assert aside.stat().st_mode & 0o777 == 0o600
    # The next run starts afresh.
    file.save(KEPT)
    assert file.load(NOW) == (KEPT, None)
    assert aside.read_bytes() == spoiled


@pytest.mark.parametrize("name", ["\x1b[2J", "AAAAsecretAAAA"])
async def test_the_message_about_a_damaged_file_shows_nothing_of_it(file, tmp_path, name):
    file.save(KEPT)
    path = path_of(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), name: 1}))
    kept, message = file.load(NOW)
    assert kept is None
    assert "not known" in message
    assert name not in message


FIELDS = {
    "a later version": {"version": 2},
    "a key of another length": {"keys": {"aead": 15, "c2s": "AAAA", "s2c": "AAAA"}},
    "an unknown AEAD": {"keys": {"aead": 99, "c2s": "AAAA", "s2c": "AAAA"}},
    "too many cookies": {"cookies": ["AAAA"] * 9},
    "an empty cookie": {"cookies": [""]},
    "a long cookie": {"cookies": ["A" * 344]},
    "a cookie that is no base64": {"cookies": ["!!!!"]},
    "a field more": {"what": 1},
    "a port": {"ntp_port": 0},
    "a host that is no address": {"host": "ntp.example"},
    "a time": {"received_at": 1 << 80},
    "no number": {"established_at": "yesterday"},
}


@pytest.mark.parametrize("changes", FIELDS.values(), ids=FIELDS)
async def test_values_that_we_never_wrote_are_refused(file, tmp_path, changes):
    file.save(KEPT)
    path = path_of(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))
    kept, message = file.load(NOW)
    assert kept is None
    assert "damaged" in message


async def test_messages_hold_no_secret(file, tmp_path):
    file.save(KEPT)
    path = path_of(tmp_path)
    document = json.loads(path.read_bytes())
    document["cookies"].append("SECRET!!")
    document["keys"]["c2s"] = "SECRET=="
    path.write_text(json.dumps(document))
    _, message = file.load(NOW)
    assert "SECRET" not in message
    assert "ccccc" not in repr(KEPT)


@given(content=st.binary(max_size=300))
def test_any_octets_are_credentials_or_a_message(tmp_path_factory, content):
    directory = tmp_path_factory.mktemp("any")

    async def load():
        file = await CookieFile.open(directory, BINDING)
        try:
            path = directory / f"{BINDING.stem}.json"
            path.write_bytes(content)
            path.chmod(0o600)
            return file.load(NOW)
        finally:
            file.close()

    kept, message = asyncio.run(load())
    assert kept is None
    assert message


async def test_a_file_that_others_could_write_is_not_believed(file, tmp_path):
    """Whoever can write it chooses the keys, and by them the time."""
    file.save(KEPT)
    path_of(tmp_path).chmod(0o620)
    kept, message = file.load(NOW)
    assert kept is None
    assert "others" in message


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/etc/passwd")])
async def test_what_is_no_file_is_set_aside(file, tmp_path, make):
    path = tmp_path / "state" / f"{BINDING.stem}.json"
    make(path)
    kept, message = file.load(NOW)
    assert kept is None
    assert "is not used" in message
    file.save(KEPT)
    assert file.load(NOW) == (KEPT, None)


async def test_a_crash_while_writing_leaves_the_old_file(file, tmp_path):
    """The half-written file lies aside, and is no obstacle either."""
    file.save(KEPT)
    (tmp_path / "state" / f".{BINDING.stem}.json.new").write_bytes(b"{half")
    assert file.load(NOW) == (KEPT, None)
    file.save(replace(KEPT, rate_floor=6))
    assert file.load(NOW)[0].rate_floor == 6


async def test_one_process_at_a_time(file, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "LOCK_TIMEOUT", 0.1)
    with pytest.raises(ClientError) as caught:
        await CookieFile.open(tmp_path / "state", BINDING)
    assert caught.value.code == Failure.CONFIGURATION
    assert "another process" in caught.value.message
    other = await CookieFile.open(tmp_path / "state", replace(BINDING, name="other.example"))
    other.close()


async def test_who_waits_gets_the_lock(file, tmp_path):
    waiting = asyncio.create_task(CookieFile.open(tmp_path / "state", BINDING))
    await asyncio.sleep(0)
    assert not waiting.done()
    file.save(KEPT)
    file.close()
    second = await waiting
    assert second.load(NOW) == (KEPT, None)
    # The fixture closes what is open.
    file._lock = second._lock


async def test_a_directory_that_cannot_be(tmp_path):
    (tmp_path / "state").write_bytes(b"")
    with pytest.raises(ClientError) as caught:
        await CookieFile.open(tmp_path / "state", BINDING)
    assert caught.value.code == Failure.CONFIGURATION
    assert "--state" in caught.value.remedy


@given(name=st.text(max_size=300), port=st.integers(1, 65535))
def test_every_name_makes_a_file_name(name, port):
    stem = Binding(name, port, "").stem
    assert len(stem) < 120
    assert "/" not in stem
    assert not stem.startswith(".")
    assert stem.isascii()


def test_servers_do_not_share_a_file():
    stems = {
        Binding(name, port, "").stem
        for name in ("a_b", "a b", "a" * 200, "a" * 201, "::1")
        for port in (1, 11)
    }
    assert len(stems) == 10


def test_the_roots_are_part_of_what_was_asked(tmp_path):
    one, two = (
        x509.load_pem_x509_certificates(Authority(tmp_path / name).root.read_bytes()) for name in ("a", "b")
    )
    bindings = [Binding.of("a", 1, roots) for roots in (one, two, one + two, two + one)]
    assert bindings[2] == bindings[3]
    assert len(set(bindings)) == 3


# The recorded time


@pytest.mark.rfc8915("8.5-3")
def test_the_recorded_time_never_goes_back(tmp_path):
    record = TimeRecord(tmp_path / "state")
    assert record.load() == (None, None)
    record.save(NOW)
    record.save(NOW - 1)
    assert record.load() == (NOW, None)
    record.save(NOW + 1)
    assert record.load() == (NOW + 1, None)
    assert (tmp_path / "state/recorded-time.json").stat().st_mode & 0o777 == 0o600


def test_nobody_waits_to_record_the_time(tmp_path):
    record = TimeRecord(tmp_path)
    record.save(NOW)
    with (tmp_path / "recorded-time.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        record.save(NOW + 1)
    assert record.load() == (NOW, None)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"version":1,"recorded_ns":-1}'])
def test_a_damaged_record_is_set_aside(tmp_path, content):
    record = TimeRecord(tmp_path)
    record.save(NOW)
    (tmp_path / "recorded-time.json").write_bytes(content)
    recorded, message = record.load()
    assert recorded is None
    assert "recorded-time.json" in message
    record.save(NOW)
    assert record.load() == (NOW, None)
    assert len(list(tmp_path.glob("*.damaged-*"))) == 1
