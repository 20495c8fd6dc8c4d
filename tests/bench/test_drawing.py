"""The bench of answer sets at a tiny size. Nothing is timed."""

import json
import subprocess
import sys

import pytest

from bench.drawing import plain, spread


def run(*options):
    return subprocess.run(
        [sys.executable, "-m", "bench.drawing", *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_bench_draws_for_the_pool_and_all_countries():
    done = run("--servers", "200", "--draw-only", "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["results"]["draw"]
    assert (found["servers"], found["regions"], found["sets_of_the_pool"]) == (200, 250, 64)
    assert found["sets"] == 64 + 250 * 16
    assert {"draw_s", "again_s", "thin_regions"} <= found.keys()


def test_with_more_sets_nobody_is_left_out_for_an_hour():
    few, many = (spread(plain(200), sets, 20_000) for sets in (1, 64))
    assert few["mean_minute"] == many["mean_minute"] == pytest.approx(6.7, abs=0.1)
    assert few["unused_percent"] > many["unused_percent"] == 0
    assert few["share_p95"] - few["share_p5"] > many["share_p95"] - many["share_p5"]


@pytest.mark.parametrize("count", ["99", "200001"])
def test_the_bench_is_bounded(count):
    assert run("--servers", count).returncode == 2
