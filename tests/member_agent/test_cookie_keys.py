"""`pool-agent cookie-keys`, and servers that share their keys."""

import json
import os
import pwd
import secrets
import stat
import time

import pytest

from lab.processes import free_port
from lab.programs import AgentServer, run
from member_agent.errors import ExitStatus
from member_agent.state import StateDirectory
from nts_core.cookies import DAY, Keyring, Schedule

NAME = "ntp.example"


def keys(command, *arguments, state):
    return run("pool-agent", "cookie-keys", command, *map(str, arguments), f"--state={state}")


def succeeds(done):
    assert (done.status, done.stderr) == (0, ""), done
    return done.stdout


def fails(done, text, status=ExitStatus.STATE):
    assert done.status == status, done
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 2, "what happened, and what to do"


def fresh(state):
    StateDirectory(state).save_keyring(Keyring.new(int(time.time()), secrets.token_bytes))


@pytest.mark.parametrize("command", ["show", "renew"])
def test_a_directory_that_is_not_there_is_not_made(tmp_path, command):
    """A slip of the pen would leave the keys in use that were to be renewed."""
    fails(keys(command, state=tmp_path / "typo"), "holds no cookie keys")
    assert not (tmp_path / "typo").exists()


def test_there_is_nothing_to_renew_where_there_are_no_keys(tmp_path):
    fails(keys("renew", state=tmp_path), "holds no cookie keys")


def test_a_directory_that_others_may_change_is_refused(tmp_path):
    fresh(tmp_path)
    tmp_path.chmod(0o777)
    fails(keys("renew", state=tmp_path), "may be written to by others")


def test_show(tmp_path):
    assert "no cookie keys yet" in succeeds(keys("show", state=tmp_path))
    fresh(tmp_path)
    told = succeeds(keys("show", state=tmp_path))
    assert "random keys of this host alone" in told
    content = (tmp_path / "cookie-keys.json").read_text()
    assert not any(word in told for word in content.split('"') if len(word) > 40)


@pytest.mark.rfc8915("8.2-1")
def test_renewing_throws_every_key_away(tmp_path):
    fresh(tmp_path)
    before = secrets_in(tmp_path)
    succeeds(keys("renew", state=tmp_path))
    assert not before & secrets_in(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root writes for another")
def test_what_root_writes_is_the_agents(tmp_path):
    """Or the agent could not read its keys at the next start, nor take the lock."""
    nobody, state, other = pwd.getpwnam("nobody"), tmp_path / "a", tmp_path / "b"
    for directory in (state, other):
        directory.mkdir(mode=0o700)
        os.chown(directory, nobody.pw_uid, nobody.pw_gid)
    share, planted = tmp_path / "share", tmp_path / "of-root"
    succeeds(keys("share", share, state=state))
    succeeds(keys("renew", state=state))
    succeeds(keys("adopt", share, state=other))
    made = [*state.iterdir(), *other.iterdir()]
    assert sorted(path.name for path in made) == ["cookie-keys.json", "cookie-keys.json", "lock", "lock"]
    for path in made:
        status = path.stat()
        assert (status.st_uid, status.st_gid) == (nobody.pw_uid, nobody.pw_gid), path
        assert stat.S_IMODE(status.st_mode) == 0o600
    assert share.stat().st_uid == 0, "the share is whose who asked for it"

    planted.write_text("of root")
    (state / "lock").unlink()
    (state / "lock").symlink_to(planted)
    fails(keys("renew", state=state), "lock: ")
    (state / "lock").unlink()
    (state / "lock").hardlink_to(planted)
    succeeds(keys("renew", state=state))
    assert planted.stat().st_uid == 0


def secrets_in(state):
    return {key["secret"] for key in json.loads((state / "cookie-keys.json").read_text())["keys"]}


def test_the_share_is_for_its_owner_only_and_replaces_nothing(tmp_path):
    share = tmp_path / "share"
    told = succeeds(keys("share", share, state=tmp_path / "a"))
    assert "delete every copy" in told
    assert stat.S_IMODE(share.stat().st_mode) == 0o600
    content = share.read_bytes()
    fails(keys("share", share, state=tmp_path / "a"), "name a file that is not there yet")
    assert share.read_bytes() == content


def test_adopting_garbage(tmp_path):
    share = tmp_path / "share"
    for content in (b"", b"\xff" * 10_000, b"{}"):
        share.write_bytes(content)
        fails(keys("adopt", share, state=tmp_path / "a"), "cookie-keys share")
    fails(keys("adopt", tmp_path / "nowhere", state=tmp_path / "a"), "No such file")
    fresh(tmp_path / "b")
    fails(keys("adopt", tmp_path / "b" / "cookie-keys.json", state=tmp_path / "a"), "no share of a ratchet")
    assert StateDirectory(tmp_path / "a").keyring() is None


def test_ones_own_keys_are_no_share(tmp_path):
    """Whoever did as told would delete them then."""
    succeeds(keys("share", tmp_path / "share", state=tmp_path / "a"))
    fails(keys("adopt", tmp_path / "a" / "cookie-keys.json", state=tmp_path / "a"), "no share of a ratchet")


def test_a_share_from_the_future_is_refused(tmp_path):
    ring = Keyring.new(int(time.time()) + 30 * DAY, secrets.token_bytes, Schedule(ratchet=True))
    (tmp_path / "share").write_bytes(ring.share().dump())
    fails(keys("adopt", tmp_path / "share", state=tmp_path / "a"), "lie in the future")


def test_a_running_server_keeps_its_keys(tmp_path, authority):
    with AgentServer(tmp_path / "log", authority.issue(NAME), f"--state={tmp_path / 'a'}"):
        fails(keys("renew", state=tmp_path / "a"), "another pool-agent uses", ExitStatus.LOCKED)


@pytest.mark.rfc8915("6-7")
def test_two_hosts_open_each_others_cookies(tmp_path, authority):
    """One does NTS-KE and sends its clients to the other for NTP, each with a state of its own."""
    share, pair = tmp_path / "share", authority.issue(NAME)
    succeeds(keys("share", share, state=tmp_path / "a"))
    succeeds(keys("adopt", share, state=tmp_path / "b"))
    ntp_port = free_port()
    with (
        AgentServer(
            tmp_path / "log-b",
            pair,
            "--local-stratum=3",
            f"--state={tmp_path / 'b'}",
            ntp=(f"127.0.0.1:{ntp_port}",),
        ),
        AgentServer(
            tmp_path / "log-a",
            pair,
            f"--state={tmp_path / 'a'}",
            f"--ntp-server=127.0.0.1:{ntp_port}",
        ) as first,
    ):
        done = run(
            "pool-client",
            "query",
            f"{NAME}:{first.ke_port}",
            "--address=127.0.0.1",
            f"--ca={authority.root}",
            "--json",
        )
    assert done.status == 0, done
    assert (done.document["ntp_address"], done.document["ntp_port"]) == ("127.0.0.1", ntp_port)
    assert done.document["stratum"] == 3
    rings = [StateDirectory(tmp_path / name).keyring() for name in ("a", "b")]
    assert rings[0].share().dump() == rings[1].share().dump()
    assert rings[0].fingerprint in succeeds(keys("show", state=tmp_path / "b"))
    assert rings[0].schedule == Schedule(DAY, 10 * DAY, ratchet=True)
