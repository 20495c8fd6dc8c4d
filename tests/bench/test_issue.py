"""The bench of issues at a tiny size: its figures are complete and belong together. Nothing is timed."""

import json
import subprocess
import sys

import pytest


def run(*options):
    return subprocess.run(
        [sys.executable, "-m", "bench.issue", *options],
        capture_output=True,
        text=True,
        timeout=160,
        check=False,
    )


@pytest.mark.timeout(180)
@pytest.mark.long
def test_a_bench_gives_the_cas_part_and_ours():
    done = run("--orders", "2", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["bench"], document["orders"]) == ("issue", 2)
    results = document["results"]
    for part in ("total", "ca", "ours"):
        assert 0 < results[part]["p50"] <= results[part]["p95"]
    for figure in ("p50", "p95"):
        assert results["ca"][figure] < results["total"][figure]
        assert results["ours"][figure] < results["total"][figure]


def test_a_bench_is_bounded():
    done = run("--orders", "1000000")
    assert done.returncode == 2
    assert "2 to 1000 orders" in done.stderr
