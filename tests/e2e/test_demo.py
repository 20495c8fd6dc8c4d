"""The demo's path as a test: what `make demo JSON=1` runs."""

import json
import subprocess
import sys

import pytest


@pytest.mark.usefixtures("slow_packets")
def test_the_whole_life_of_a_pool_is_told_and_checked(tmp_path):
    """Join, admission, refusal of a wrong clock, look-up, removal, replacement: every statement holds."""
    done = subprocess.run(
        [sys.executable, "-m", "lab.demo", "--json", "--directory", str(tmp_path / "demo")],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["ok"] is True
    assert document["error"] is None
    assert len(document["statements"]) >= 17
    assert all(statement["holds"] for statement in document["statements"])
    assert None not in (document["receipt"][step] for step in ("srv_withdrawn_at", "name_broken_at"))


def test_a_false_statement_ends_the_demo_with_an_error(tmp_path):
    """The demo can fail: without its resolver's configuration directory nothing is told."""
    blocked = tmp_path / "demo"
    blocked.mkdir()
    (blocked / "unbound").write_text("a file where a directory has to be")
    done = subprocess.run(
        [sys.executable, "-m", "lab.demo", "--json", "--directory", str(blocked)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 1
    assert json.loads(done.stdout)["ok"] is False
    assert "demo failed" in done.stderr
