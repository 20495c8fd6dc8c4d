"""The registry's bench at a small size, and the client that asks at a fixed rate."""

import asyncio
import json
import subprocess
import sys
import time

import pytest

from bench.requests import Call, Client


def run(*options):
    return subprocess.run(
        [sys.executable, "-m", "bench.registry", *options],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )


@pytest.fixture(scope="module")
def results():
    """One run with so many servers that PostgreSQL uses an index where there is one."""
    sizes = ("--servers", "3000", "--zone-servers", "30", "--sqlite-servers", "20")
    done = run(*sizes, "--seconds", "2", "--rate", "100", "--json")
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout)["results"].values())


@pytest.mark.long
def test_the_bench_gives_every_figure_of_every_pool(results):
    large, zone, small = results
    passes = {"fill_s", "full_look_s", "full_plan_s", "unchanged_pass_s", "changed_look_s", "rrsets"}
    assert passes <= large.keys() & zone.keys() & small.keys()
    assert {"full_publish_s", "changed_publish_s", "check_s"} <= zone.keys()
    assert (large["rrsets"], zone["rrsets"], small["rrsets"]) == (12_002, 122, 82)
    for figures, parts in ((large, ("api-1", "api-2", "worker")), (small, ("all",))):
        assert figures["api_ms"]["all"]["count"] == (20 if parts == ("all",) else 200)
        assert {"all", "sync"} <= figures["api_ms"].keys()
        assert figures["api_unavailable"] == 0
        for part in parts:
            assert figures[f"{part}_rss_mib"] > 10


@pytest.mark.long
def test_no_request_reads_a_whole_table(results):
    """Counts of the pool do, and are made rarely."""
    large, *_ = results
    assert large["api_ms"]["server"]["count"] > 10
    assert large["api_ms"]["list"]["count"] > 3
    assert large["whole_reads"] < 30, "two processes and a worker count, once a second each"


@pytest.mark.parametrize("options", [("--servers", "0"), ("--seconds", "601"), ("--zone-servers", "1000001")])
def test_the_bench_is_bounded(options):
    done = run(*options)
    assert done.returncode == 2
    assert "1 to 600 seconds" in done.stderr


async def test_a_server_that_stalls_pays_for_all_who_come_meanwhile():
    """The first request is kept waiting, on the one connection there is: the others' time counts from when they were due."""
    gate, gone = asyncio.Event(), asyncio.Event()

    async def answer(reader, writer):
        while await reader.readline():
            while await reader.readline() != b"\r\n":
                pass
            await gate.wait()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        writer.close()
        gone.set()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        client = Client([server.sockets[0].getsockname()[1]], connections=1)
        began = time.monotonic()
        asking = asyncio.create_task(client.run([Call.of("x", "GET", "/")] * 5, 1000))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.5, gate.set)
        answers = await asking
        took = time.monotonic() - began
        await asyncio.wait_for(gone.wait(), 10)
    assert [answer.status for answer in answers] == [200] * 5
    assert all(0.4 < answer.seconds <= took for answer in answers)
