"""The bench of scores at a tiny size. Nothing is timed."""

import json
import subprocess
import sys

import pytest


def run(*options):
    return subprocess.run(
        [sys.executable, "-m", "bench.scoring", *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_bench_gives_every_figure():
    done = run("--servers", "50", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["addresses"], found["probes"], found["reviews"]) == (100, 700, 1)
    assert {"rescoring_s", "plain_median_s", "shadow_s", "comparison_s", "reviews_s"} <= found.keys()
    assert found["would_drop"] >= found["would_add"]


@pytest.mark.parametrize("count", ["0", "1000001"])
def test_the_bench_is_bounded(count):
    assert run("--servers", count).returncode == 2
