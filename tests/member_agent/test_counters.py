"""What driven time daemons say of themselves in the metrics: the real ones, and everything that is not an answer."""

import asyncio
import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lab.peers import Namespace, NtpsecServer, chronyc_environment
from lab.processes import free_port, wait_until
from lab.programs import script
from lab.volunteer import ChronyVolunteer, NtpdRsVolunteer, Pairs
from member_agent import metrics
from member_agent.clock import clock_of
from member_agent.config import AgentSettings
from member_agent.engines import Service
from member_agent.engines.counters import DaemonCounts, read_counts
from member_agent.engines.external import ExternalEngine
from member_agent.engines.layout import Kind
from member_agent.engines.probe import ask
from nts_core.association import Plain
from nts_core.client import exchange

ALICE = "alice.servers.pool.example"
HOST = "127.0.0.1"
NOTHING = DaemonCounts()


def settings_of(host, **more):
    return AgentSettings(engine=host.settings(), **more)


async def serve(host, settings, tmp_path):
    pair = Pairs(tmp_path / "authority").issue(ALICE)
    engine = ExternalEngine(host.kind, settings.engine, host.directory)
    await engine.apply(Service({ALICE: pair}, (host.ke,), (host.ntp,)))
    return engine, pair


async def use(host, pair):
    """Two authenticated answers and one that is not."""
    for _ in range(2):
        await ask(ALICE, pair.fingerprint, host.ke)
    await exchange(Plain(os.urandom), *host.ntp)


@pytest.fixture
def with_chronyc(monkeypatch):
    for name, value in chronyc_environment().items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("with_chronyc")
async def test_what_chronyd_counts_is_in_the_metrics(tmp_path):
    place = free_port()
    with ChronyVolunteer(tmp_path / "host") as host:
        settings = settings_of(host, clock_source=f"chronyd:{host.var}/socket")
        engine, pair = await serve(host, settings, tmp_path)
        before = await read_counts(host.kind, settings)
        await use(host, pair)
        counts = await read_counts(host.kind, settings)
        gained = {outcome: counts.ntp[outcome] - before.ntp[outcome] for outcome in counts.ntp}
        assert gained == {"nts-time": 2, "rate-limited": 0, "other": 1}
        assert counts.ke["accepted"] - before.ke["accepted"] == 2

        metrics.expose(f"{HOST}:{place}", *metrics.sources(engine, settings, clock_of(settings), lambda: ()))
        told = await asyncio.to_thread(scrape, place)
        assert told["pool_agent_ntp_total", "nts-time"] == counts.ntp["nts-time"]
        assert told["pool_agent_ke_total", "accepted"] == counts.ke["accepted"]
        assert ("pool_agent_cookies_sealed_total", None) not in told, "chronyd does not count them"
    async with asyncio.timeout(20):
        while any(name == "pool_agent_ntp_total" for name, _ in told):
            told = await asyncio.to_thread(scrape, place)
            await asyncio.sleep(0.1)
    assert ("pool_agent_clock_stratum", None) in told, "a daemon that is gone takes nothing else along"


def scrape(port):
    with urllib.request.urlopen(f"http://{HOST}:{port}/metrics", timeout=10) as page:
        families = list(text_string_to_metric_families(page.read().decode()))
    return {
        (sample.name, sample.labels.get("outcome")): sample.value
        for family in families
        for sample in family.samples
    }


@pytest.mark.parametrize(
    "says",
    [
        "echo 506 Cannot talk to daemon",
        "echo 501 Not authorised",
        "exit 1",
        "echo 1,2,3",
        "echo 1,0,2,0,0,-1,0,1,0",
        "echo 1,0,2,0,0,nan,0,1,0",
        "echo 1,0,2,0,0,999999999999999999999,0,1,0",
        "head -c 100000 /dev/zero | tr '\\0' 1",
    ],
)
async def test_what_is_no_report_of_chronyd(tmp_path, monkeypatch, says):
    program = tmp_path / "chronyc"
    program.write_text(f"#!/bin/sh\n{says}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert await read_counts(Kind.CHRONY, AgentSettings()) == NOTHING


_READ = """
import asyncio, dataclasses, json
from member_agent.config import AgentSettings
from member_agent.engines.counters import read_counts
from member_agent.engines.layout import Kind
print(json.dumps(dataclasses.asdict(asyncio.run(read_counts(Kind.NTPSEC, AgentSettings(clock_source="ntpd"))))))
"""


def test_what_ntpd_counts(tmp_path, authority):
    with (
        Namespace(tmp_path) as namespace,
        NtpsecServer(tmp_path / "ntpd", authority.issue(ALICE, HOST), namespace),
    ):

        def inside(*argv):
            return subprocess.run(
                [*namespace.inside(), *argv], capture_output=True, text=True, timeout=60, check=True
            ).stdout

        before = json.loads(inside(sys.executable, "-c", _READ))
        inside(
            script("pool-client"),
            "query",
            f"{ALICE}:4460",
            f"--address={HOST}",
            f"--ca={authority.root}",
            "--samples=1",
        )
        counts = json.loads(inside(sys.executable, "-c", _READ))
    assert counts["ntp"]["nts-time"] - before["ntp"]["nts-time"] == 1
    assert counts["ke"]["ok"] - before["ke"]["ok"] == 1
    assert counts["sealed"] - before["sealed"] == 9, (
        "eight by key establishment, one for the one that was spent"
    )
    assert set(counts["ntp"]) == {"nts-time", "nts-refused", "malformed", "denied", "rate-limited"}


class _Ntpd(asyncio.DatagramProtocol):
    """Answers mode 6 with what it is told: a text, or an error when there is none."""

    def __init__(self, answer):
        self.answer = answer

    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, place):
        first, operation, sequence, _, association, _, count = struct.unpack_from("!BBHHHHH", data)
        text = self.answer(data[12 : 12 + count].decode())
        flags = 0xC0 if text is None else 0x80
        status = 0x0500 if text is None else 0
        octets = (text or "").encode()
        head = struct.pack(
            "!BBHHHHH", first, operation | flags, sequence, status, association, 0, len(octets)
        )
        self.transport.sendto(head + octets, place)


@contextlib.asynccontextmanager
async def ntpd_that_says(answer):
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: _Ntpd(answer), local_addr=(HOST, 0)
    )
    try:
        yield AgentSettings(clock_source=f"ntpd:{HOST}:{transport.get_extra_info('sockname')[1]}")
    finally:
        transport.close()


async def test_an_ntpd_that_does_not_know_of_nts_says_the_rest():
    def answer(names):
        return None if "nts_" in names else "ss_badformat=1, ss_restricted=2, ss_limited=3"

    async with ntpd_that_says(answer) as settings:
        counts = await read_counts(Kind.NTPSEC, settings)
    assert counts == DaemonCounts(ntp={"malformed": 1, "denied": 2, "rate-limited": 3})


@pytest.mark.parametrize(
    "said", [None, "", "ss_limited", "ss_limited=-1", "ss_limited=1e3", "ss_limited=\xff"]
)
async def test_what_is_no_answer_of_ntpd(said):
    async with ntpd_that_says(lambda _: said) as settings:
        assert await read_counts(Kind.NTPSEC, settings) == NOTHING


async def test_what_ntpd_rs_counts(tmp_path):
    host = NtpdRsVolunteer(tmp_path / "host")
    config, place = host.config / "ntp.toml", host.var / "observe"
    settings = settings_of(host)
    with host:
        assert await read_counts(host.kind, settings) == NOTHING, "its configuration names no socket"
    config.write_text(
        config.read_text().replace("[observability]", f'[observability]\nobservation-path = "{place}"')
    )
    with host:
        _, pair = await serve(host, settings, tmp_path)
        await asyncio.to_thread(wait_until, place.exists, "ntpd-rs can be observed")
        before = await read_counts(host.kind, settings)
        await use(host, pair)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.sendto(b"garbage", tuple(host.ntp))
        counts = await read_counts(host.kind, settings)
    gained = {outcome: counts.ntp[outcome] - before.ntp[outcome] for outcome in counts.ntp}
    assert (gained["nts-time"], gained["time"]) == (2, 1)
    assert (counts.ke, counts.sealed) == ({}, None)


@pytest.mark.parametrize(
    "says",
    [
        b"",
        b"\0" * 7,
        struct.pack("!Q", 1 << 63),
        struct.pack("!Q", 100) + b"{}",
        struct.pack("!Q", 2) + b"[]",
        struct.pack("!Q", 16) + b'{"servers":[{}]}',
        struct.pack("!Q", 9) + b"\xff" * 9,
        None,
    ],
)
async def test_what_is_no_answer_of_ntpd_rs(tmp_path, says):
    config = tmp_path / "ntp.toml"
    settings = AgentSettings(engine={"kind": "ntpd-rs", "config_dir": str(tmp_path)})

    done = asyncio.Event()

    async def talk(reader, writer):
        if says is not None:
            writer.write(says)
            writer.write_eof()
        await reader.read()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        done.set()

    config.write_text(f'[observability]\nobservation-path = "{tmp_path}/observe"\n')
    async with await asyncio.start_unix_server(talk, tmp_path / "observe"):
        assert await read_counts(Kind.NTPD_RS, settings) == NOTHING
        await asyncio.wait_for(done.wait(), 20)


@pytest.mark.parametrize(
    "text",
    ["observability = 1", "[observability]\nobservation-path = 1", "[", "[observability]", None],
)
async def test_an_ntpd_rs_that_names_no_socket(tmp_path, text):
    if text is not None:
        (tmp_path / "ntp.toml").write_text(text)
    settings = AgentSettings(engine={"kind": "ntpd-rs", "config_dir": str(tmp_path)})
    assert await read_counts(Kind.NTPD_RS, settings) == NOTHING
