"""`pool-agent`'s bad input beyond `serve`: each is an error with a remedy and its exit status, never a traceback."""

import subprocess
import sys

import pytest

from lab.certificates import Authority
from lab.programs import run, script
from member_agent.errors import ExitStatus


def refused(*arguments):
    done = run("pool-agent", *arguments)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) >= 2, "there is no remedy"
    return done


@pytest.mark.parametrize(
    "url",
    ["https://127.0.0.1:bad", "https://[::1", "http://pool.example", "ftp://localhost", "", "https://a b"],
)
def test_an_address_that_is_no_registrys(url, tmp_path):
    assert refused("join", url, "--token", "tc_join_x", "--state", str(tmp_path)).status == ExitStatus.USAGE


@pytest.mark.parametrize("token", ["tökén", "a\nb", "a b", ""])
def test_a_token_that_is_none_is_refused_and_not_shown(token, tmp_path):
    done = refused("join", "https://localhost:1", "--token", token, "--state", str(tmp_path))
    assert done.status == ExitStatus.USAGE
    assert not token or token not in done.stderr


@pytest.mark.parametrize("offset", ["nan", "inf", "1e18"])
def test_a_clock_offset_out_of_range(offset, authority, tmp_path):
    pair = authority.issue("localhost")
    serve = refused("serve", "--cert", str(pair.cert), "--key", str(pair.key), f"--clock-offset={offset}")
    assert serve.status == ExitStatus.CONFIGURATION
    assert "clock_offset" in serve.stderr


def test_a_clock_source_that_is_none(authority, tmp_path):
    pair = authority.issue("localhost")
    serve = refused("serve", "--cert", str(pair.cert), "--key", str(pair.key), "--clock-source=sundial")
    assert serve.status == ExitStatus.CONFIGURATION
    assert "--clock-source sundial" in serve.stderr


def test_a_state_directory_that_is_not_there_is_not_made(tmp_path):
    for command in ("run", "status"):
        assert refused(command, "--state", str(tmp_path / "none")).status == ExitStatus.STATE
    assert not (tmp_path / "none").exists()


def test_nothing_is_imported_from_where_an_agent_is_started(tmp_path):
    """`run` becomes another program, which Python would look for there first."""
    for name in ("json", "member_agent", "asyncio"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(77)")
    done = subprocess.run(
        [script("pool-agent"), "run", "--state", str(tmp_path / "none")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, "holds no membership" in done.stderr) == (ExitStatus.STATE, True), done


def test_an_agent_that_runs_knows_nothing_of_command_lines():
    """2 MB of it that Python would not give back."""
    loaded = "import sys, member_agent.running; print({'typer', 'member_agent.cli', 'nts_core.client'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", loaded], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "set()\n"


def test_an_unknown_variable_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("POOL_AGENT_STRATUM", "3")
    done = refused("run", "--state", str(tmp_path))
    assert done.status == ExitStatus.CONFIGURATION
    assert "POOL_AGENT_STRATUM" in done.stderr


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "authority")
