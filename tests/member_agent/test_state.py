"""The agent's state directory: rights, damage, crashes and a second agent."""

import os
import secrets
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from member_agent.errors import AgentError, ExitStatus
from member_agent.state import Listening, Membership, StateDirectory
from nts_core.aead import AeadId, SessionKeys
from nts_core.cookies import Keyring
from nts_core.shell import replace_file

MEMBERSHIP = Membership(
    "https://registry.example", "pool.example", "s-1", "alice.servers.pool.example", "TOKEN", "/etc/ca.pem"
)
# Takes the lock of the directory given and holds it until its standard input ends.
HOLDER = """
import sys
from pathlib import Path
from member_agent.state import StateDirectory
StateDirectory(Path(sys.argv[1])).lock()
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def directory(tmp_path):
    return StateDirectory(tmp_path / "a" / "state")


def mode(path):
    return path.stat().st_mode & 0o777


def refused(call, *words):
    with pytest.raises(AgentError) as caught:
        call()
    assert caught.value.status is ExitStatus.STATE
    assert caught.value.remedy
    for word in words:
        assert word in caught.value.message
    return caught.value


def test_a_fresh_directory_is_empty_and_private(directory):
    assert mode(directory.path) == 0o700
    assert directory.membership() is None
    assert directory.keyring() is None
    assert directory.listening() is None


def test_everything_comes_back(directory):
    keyring = Keyring.new(7, secrets.token_bytes)
    directory.save_membership(MEMBERSHIP)
    directory.save_keyring(keyring)
    directory.save_listening(["127.0.0.1", "::1"], 4460)
    again = StateDirectory(directory.path)
    assert again.membership() == MEMBERSHIP
    assert again.listening() == Listening(("127.0.0.1", "::1"), 4460)
    keys = SessionKeys(AeadId.AES_SIV_CMAC_256, bytes(32), bytes(32))
    assert again.keyring().open(keyring.seal(keys, secrets.token_bytes(16))) == keys


def test_every_file_is_for_its_owner_alone(directory):
    old = os.umask(0)
    try:
        directory.save_membership(MEMBERSHIP)
        directory.save_keyring(Keyring.new(7, secrets.token_bytes))
        directory.save_listening(["127.0.0.1"], 4460)
        directory.agent_key()
        directory.lock()
    finally:
        os.umask(old)
    files = list(directory.path.iterdir())
    assert len(files) == 5
    assert {mode(file) for file in files} == {0o600}


def test_a_membership_does_not_show_its_token():
    assert "TOKEN" not in repr(MEMBERSHIP)


def test_the_agents_key_is_made_once(directory):
    first = directory.agent_key().private_bytes_raw()
    assert StateDirectory(directory.path).agent_key().private_bytes_raw() == first


def test_a_rewritten_file_loses_wide_rights(directory):
    """Also when somebody left the file aside of a crash with other rights."""
    path = directory.path / "file"
    aside = directory.path / ".file.new"
    aside.write_bytes(b"left by a crash, and longer than what follows")
    aside.chmod(0o666)
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert mode(path) == 0o600
    assert not aside.exists()


def test_a_failed_write_leaves_the_old_file(directory):
    directory.save_listening(["127.0.0.1"], 4460)
    (directory.path / ".listening.json.new").mkdir()
    refused(lambda: directory.save_listening(["127.0.0.2"], 4461), "listening.json")
    assert directory.listening() == Listening(("127.0.0.1",), 4460)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"registry": 1}'])
def test_a_damaged_membership(directory, content):
    (directory.path / "membership.json").write_bytes(content)
    error = refused(directory.membership, "membership.json", "damaged")
    assert "join" in error.remedy


@pytest.mark.parametrize("content", [b"", b"{}", b"nonsense", b"\xff", b'{"version": 9, "keys": []}'])
def test_damaged_cookie_keys_are_refused_and_kept(directory, content):
    path = directory.path / "cookie-keys.json"
    path.write_bytes(content)
    refused(directory.keyring, "cookie-keys.json")
    assert path.read_bytes() == content


def test_every_truncation_of_the_cookie_keys_is_refused(directory):
    directory.save_keyring(Keyring.new(7, secrets.token_bytes))
    path = directory.path / "cookie-keys.json"
    content = path.read_bytes()
    for length in range(0, len(content.rstrip()), 7):
        path.write_bytes(content[:length])
        refused(directory.keyring)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff"])
def test_a_damaged_agent_key_is_refused_and_kept(directory, content):
    path = directory.path / "agent-key.pem"
    path.write_bytes(content)
    refused(directory.agent_key)
    assert path.read_bytes() == content


def test_an_agent_key_of_another_kind(directory):
    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (directory.path / "agent-key.pem").write_bytes(pem)
    refused(directory.agent_key, "Ed25519")


def test_damage_to_what_can_be_learnt_again_is_nothing(directory):
    (directory.path / "listening.json").write_bytes(b"nonsense")
    assert directory.listening() is None


def test_a_file_in_the_place_of_the_directory(tmp_path):
    (tmp_path / "file").touch()
    refused(lambda: StateDirectory(tmp_path / "file"))
    refused(lambda: StateDirectory(tmp_path / "file" / "below"))


def test_a_lock_that_cannot_be_opened(directory):
    (directory.path / "lock").mkdir()
    refused(directory.lock)


def test_one_agent_a_directory(directory):
    """Another process holds the lock; it is free again when that process has ended."""
    argv = [sys.executable, "-c", HOLDER, str(directory.path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"locked\n"
        refused(directory.lock, "another pool-agent")
        holder.communicate(timeout=10)
    directory.lock()
