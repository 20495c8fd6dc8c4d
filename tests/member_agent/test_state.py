"""The agent's state directory: rights, damage, crashes and a second agent."""

import itertools
import os
import secrets
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from member_agent import state
from member_agent.errors import AgentError, ExitStatus
from member_agent.state import (
    Listening,
    MemberDirectory,
    Membership,
    StateDirectory,
    read_agent_key,
    token_digest,
)
from nts_core.aead import AeadId, SessionKeys
from nts_core.cookies import Keyring
from nts_core.shell import locked, replace_file

DOMAIN = "alice.servers.pool.example"
MEMBERSHIP = Membership(
    "https://registry.example",
    "pool.example",
    "alice",
    DOMAIN,
    "TOKEN",
    1_700_000_000,
    "KEY",
    token_digest("joining"),
    "/etc/ca.pem",
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


def refused(call, *words, status=ExitStatus.STATE):
    with pytest.raises(AgentError) as caught:
        call()
    assert caught.value.status is status
    assert caught.value.remedy
    for word in words:
        assert word in caught.value.message
    return caught.value


def test_a_fresh_directory_is_empty_and_private(directory):
    assert mode(directory.path) == 0o700
    assert directory.members() == {}
    assert directory.keyring() is None
    with pytest.raises(AgentError, match="holds no membership"):
        directory.require_members()


def test_everything_comes_back(directory):
    keyring = Keyring.new(7, secrets.token_bytes)
    member = directory.member(DOMAIN)
    assert directory.members() == {}, "a directory alone is no membership"
    assert member.listening() is None
    member.save_membership(MEMBERSHIP)
    member.save_listening(Listening(("127.0.0.1", "::1"), 4460, 8080, 8443))
    directory.save_keyring(keyring)
    again = StateDirectory(directory.path)
    (found,) = again.require_members().values()
    assert found.membership() == MEMBERSHIP
    assert found.listening() == Listening(("127.0.0.1", "::1"), 4460, 8080, 8443)
    keys = SessionKeys(AeadId.AES_SIV_CMAC_256, bytes(32), bytes(32))
    assert again.keyring().open(keyring.seal(keys, secrets.token_bytes(16))) == keys


def test_every_file_is_for_its_owner_alone(directory):
    old = os.umask(0)
    try:
        directory.member(DOMAIN).save_membership(MEMBERSHIP)
        directory.member(DOMAIN).save_listening(Listening(("127.0.0.1",), 4460))
        directory.save_keyring(Keyring.new(7, secrets.token_bytes))
        directory.joining_key("token")
        directory.lock()
    finally:
        os.umask(old)
    everything = list(directory.path.rglob("*"))
    files = [path for path in everything if path.is_file()]
    assert len(files) == 6
    assert {mode(file) for file in files} == {0o600}
    assert {mode(path) for path in everything if path.is_dir()} == {0o700}


def test_a_membership_does_not_show_its_secrets():
    assert "TOKEN" not in repr(MEMBERSHIP)
    assert "KEY" not in repr(MEMBERSHIP)


def test_the_key_to_join_with_is_the_same_until_the_token_has_served(directory):
    first = directory.joining_key("token").private_bytes_raw()
    assert directory.joining_key("other").private_bytes_raw() != first
    assert StateDirectory(directory.path).joining_key("token").private_bytes_raw() == first
    directory.joined("token")
    directory.joined("token")
    assert directory.joining_key("token").private_bytes_raw() != first
    assert "token" not in "".join(str(path) for path in directory.path.rglob("*")).replace("pytest", "")


def test_what_came_of_a_token_is_known(directory):
    assert directory.joined_by("joining") is None
    directory.member(DOMAIN).save_membership(MEMBERSHIP)
    assert directory.joined_by("joining") == MEMBERSHIP
    assert directory.joined_by("other") is None
    # One that is damaged hides no other, and joining anew is what mends it.
    (directory.member("another.example").path / "membership.json").write_bytes(b"damage")
    assert directory.joined_by("joining") == MEMBERSHIP


def test_a_server_that_left_takes_its_keys_with_it(directory):
    for name in ("alice", "bob"):
        directory.member(f"{name}.example").save_membership(replace(MEMBERSHIP, domain=f"{name}.example"))
    directory.member("alice.example").certificates.mkdir()
    directory.member("alice.example").remove()
    assert set(directory.members()) == {"bob.example"}
    left = directory.path / "members" / ".gone-carol.example"
    (left / "certificates").mkdir(parents=True)
    directory.clean()
    assert [path.name for path in (directory.path / "members").iterdir()] == ["bob.example"]


def test_a_new_token_never_takes_the_place_of_a_server_that_was_joined_anew(directory):
    """An agent renews its token, again and again, while somebody joins."""
    member, joined = directory.member(DOMAIN), replace(MEMBERSHIP, key="ANOTHER KEY", token="JOINED")
    member.save_membership(MEMBERSHIP)
    kept, renewed = threading.Event(), []

    def renew():
        for number in itertools.count():
            try:
                renewed.append(member.save_token(replace(MEMBERSHIP, token=f"{number}")))
            except AgentError:
                continue  # somebody else writes; it is tried again with the next report
            if kept.is_set():
                return

    thread = threading.Thread(target=renew)
    thread.start()
    while True not in renewed and thread.is_alive():
        pass
    MemberDirectory(member.path).save_membership(joined)
    kept.set()
    thread.join(20)
    assert (thread.is_alive(), renewed[-1]) == (False, False)
    assert member.membership() == joined


def test_who_joins_anew_is_not_given_up_any_more(directory):
    member = directory.member(DOMAIN)
    member.save_membership(MEMBERSHIP)
    joined = member.stamp()
    member.give_up()
    assert (member.is_given_up, member.stamp() != joined) == (True, True)
    member.save_membership(replace(MEMBERSHIP, key="ANOTHER KEY"))
    assert not member.is_given_up


def test_who_holds_the_membership_too_long_is_named(directory, monkeypatch):
    monkeypatch.setattr(state, "_JOIN_PATIENCE", 0.1)
    member = directory.member(DOMAIN)
    with locked(member.path / "lock", 0), pytest.raises(AgentError, match="locked by another process"):
        member.save_membership(MEMBERSHIP)
    member.save_membership(MEMBERSHIP)
    assert member.membership() == MEMBERSHIP


def test_another_membership_shows(directory):
    member = directory.member(DOMAIN)
    assert member.stamp() == 0
    member.save_membership(MEMBERSHIP)
    before = member.stamp()
    assert before == member.stamp() != 0
    member.save_membership(replace(MEMBERSHIP, token="OTHER"))
    assert member.stamp() != before


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
    member = directory.member(DOMAIN)
    member.save_listening(Listening(("127.0.0.1",), 4460))
    (member.path / ".listening.json.new").mkdir()
    refused(lambda: member.save_listening(Listening(("127.0.0.2",), 4461)), "listening.json")
    assert member.listening() == Listening(("127.0.0.1",), 4460)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"registry": 1}'])
def test_a_damaged_membership(directory, content):
    member = directory.member(DOMAIN)
    (member.path / "membership.json").write_bytes(content)
    error = refused(member.membership, "membership.json", "damaged")
    assert "join" in error.remedy


def test_a_membership_in_anothers_directory_is_damage(directory):
    """As copied by hand: the directory's name is what the agent answers for."""
    member = directory.member("bob.servers.pool.example")
    member.save_membership(MEMBERSHIP)
    refused(member.membership, "damaged")


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
def test_a_damaged_key_to_join_with_is_refused_and_kept(directory, content):
    directory.joining_key("token")
    (path,) = (directory.path / "joining").iterdir()
    path.write_bytes(content)
    refused(lambda: directory.joining_key("token"))
    assert path.read_bytes() == content


def test_an_agent_key_of_another_kind():
    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with pytest.raises(ValueError, match="Ed25519"):
        read_agent_key(pem)


def test_damage_to_what_can_be_learnt_again_is_nothing(directory):
    member = directory.member(DOMAIN)
    (member.path / "listening.json").write_bytes(b"nonsense")
    assert member.listening() is None


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
        refused(directory.lock, "another pool-agent", status=ExitStatus.LOCKED)
        holder.communicate(timeout=10)
    directory.lock()
