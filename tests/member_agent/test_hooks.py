"""The member's own commands: what they are told, and that a bad one ends by itself."""

import sys
from pathlib import Path

import pytest

from member_agent import hooks
from member_agent.errors import AgentError

FACTS = {"domain": "alice.servers.pool.example", "chain": "/state/fullchain.pem"}


def state_of(pid):
    """As /proc has it; None when there is no such process."""
    file = Path(f"/proc/{pid}/stat")
    return file.read_text().rpartition(")")[2].split()[0] if file.exists() else None


def python(*lines):
    return (sys.executable, "-c", "\n".join(lines))


async def test_a_hook_is_told_what_it_needs_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("POOL_JOIN_TOKEN", "tc_join_secret")
    out = tmp_path / "out"
    program = python("import os, json", f"open({str(out)!r}, 'w').write(json.dumps(dict(os.environ)))")
    await hooks.run("after", program, FACTS)
    told = out.read_text()
    assert '"POOL_HOOK_DOMAIN": "alice.servers.pool.example"' in told
    assert '"POOL_HOOK_CHAIN": "/state/fullchain.pem"' in told
    assert "tc_join_secret" not in told


async def test_without_a_command_nothing_happens():
    await hooks.run("before", (), FACTS)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (python("print('no space left'); raise SystemExit(3)"), "status 3: no space left"),
        (python("print('\\x1b[2J' + 'x' * 100_000); raise SystemExit(1)"), "status 1:"),
        (("/nonexistent/hook",), "No such file"),
        (("/",), "denied"),
    ],
)
async def test_a_hook_that_fails_is_said_with_its_words(command, words):
    with pytest.raises(AgentError, match=words) as caught:
        await hooks.run("before", command, FACTS)
    assert "hooks.before" in caught.value.remedy
    assert len(caught.value.message) < 3000
    assert caught.value.message.isprintable()


async def test_a_hook_that_does_not_end_is_ended_with_its_children(tmp_path):
    file = tmp_path / "pid"
    program = python(
        "import subprocess, sys, time",
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])",
        f"open({str(file)!r}, 'w').write(str(child.pid))",
        "time.sleep(600)",
    )
    with pytest.raises(AgentError, match="not done in 2 s"):
        await hooks.run("after", program, FACTS, deadline=2)
    assert state_of(int(file.read_text())) in {None, "Z", "X"}
