"""A monitor at work: real servers and references on loopback, and a registry that does what a test says."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from contextlib import asynccontextmanager

import pytest
from typer.testing import CliRunner

from lab.certificates import Authority
from lab.nts_server import NtsServer
from lab.processes import Process, free_port, require, wait_until
from lab.programs import scrape, script
from lab.stand_in import StandIn, saying
from nts_core.client import load_roots
from poolsvc.cli import app
from poolsvc.cli.common import ExitStatus
from poolsvc.monitor.program import Monitor
from poolsvc.monitor.settings import load_settings
from poolsvc.monitor.uplink import Uplink, read_token

NAME = "alice.servers.pool.example"
HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
WORK, REPORT = "/v1/monitor/work", "/v1/monitor/report"
MS = 1_000_000
UNAVAILABLE = b"HTTP/1.1 503 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Lab:
    """Three references, the last one with NTS; alice; a registry that has her probed every time it is asked."""

    def __init__(self, directory, authority):
        self.directory = directory
        self.authority = authority
        self.references = [NtsServer(authority.issue(host), host) for host in HOSTS]
        self.alice = NtsServer(authority.issue(NAME))
        self.registry = StandIn()
        self.registry.heed = self.heed
        self.registry.answers[REPORT] = {"taken": 0}
        self.reports = []
        self.came = asyncio.Event()

    async def heed(self, path, said):
        if path == REPORT:
            self.reports.append(said)
            self.came.set()

    async def start(self):
        for server in (*self.references, self.alice):
            await server.start()
        await self.registry.open()
        self.hand_out({"target": 7, "address": "127.0.0.1"})
        (self.directory / "token").write_text("tc_monitor_x\n")
        self.write()

    async def stop(self):
        # Whoever was accepted last is still to be served.
        for _ in range(50):
            await asyncio.sleep(0)
        await until(lambda: not self.registry._connections)
        await self.registry.__aexit__()
        for server in (*self.references, self.alice):
            await server.stop()
        for _ in range(50):
            # Transports that were given up close their sockets in the loop.
            await asyncio.sleep(0)

    def hand_out(self, *tasks, **values):
        whole = {"domain": NAME, "after": 0, "spacing": 0, "own_addresses": ["127.0.0.1"]}
        self.registry.answers[WORK] = {
            "pool": "pool.example",
            "monitor": "m1",
            "status": "active",
            "poll_after": 0.1,
            "ke_port": self.alice.ke_port,
            "tasks": [{**whole, **task} for task in tasks],
            **values,
        }

    def write(self, **values):
        places = [f"ntp:{each.host}:{each.ntp_port}" for each in self.references[:2]]
        nts = self.references[2]
        self.settings = {
            "registry": self.registry.url,
            "token_file": "token",
            "references": [*places, f"nts:{nts.host}:{nts.ke_port}"],
            "roots_file": str(self.authority.root),
            "check_interval": 0.1,
            "report_interval": 0.1,
            "jitter": 0,
            "allow_private_addresses": True,
            **values,
        }
        self.config = self.directory / "monitor.toml"
        lines = [f"{key} = {json.dumps(value)}" for key, value in self.settings.items()]
        self.config.write_text("\n".join(lines))
        return self.config

    @asynccontextmanager
    async def running(self):
        settings = load_settings(self.config)
        uplink = Uplink(settings, read_token(settings))
        monitor, stop = Monitor(settings, uplink, load_roots(settings.roots_file)), asyncio.Event()
        running = asyncio.create_task(monitor.run(stop))
        try:
            yield monitor
        finally:
            stop.set()
            await running
            uplink.close()

    async def reported(self, wanted, deadline=10):
        """The first report from now on that is wanted."""
        seen = len(self.reports)
        async with asyncio.timeout(deadline):
            while True:
                for report in self.reports[seen:]:
                    if wanted(report):
                        return report
                seen = len(self.reports)
                self.came.clear()
                await self.came.wait()


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
async def lab(authority, tmp_path):
    lab = Lab(tmp_path, authority)
    await lab.start()
    yield lab
    await lab.stop()


async def until(condition):
    await asyncio.to_thread(wait_until, condition, "what the monitor should do", 10)


def has_samples(report):
    return bool(report["samples"])


async def test_it_tells_what_it_has_found(lab):
    async with lab.running():
        report = await lab.reported(has_samples)
        later = await lab.reported(has_samples)
    assert (report["sound"], report["ipv4"], report["ipv6"]) == (True, True, False)
    assert report["program"].startswith("poolsvc-monitor ")
    (sample, *_) = report["samples"]
    assert (sample["target"], sample["result"]["failed"], sample["result"]["exchanges"]) == (7, None, 3)
    assert 0 < sample["age"] < 10
    assert abs(sample["result"]["offset"]) < 10 * MS
    assert later["sequence"] > report["sequence"]
    assert lab.references[2].establishments == 1, "a reference with NTS is asked for keys once"


async def test_with_a_wrong_clock_of_its_own_it_blames_nobody(lab):
    """To this host it is the same whether all references are wrong or its own clock is."""
    for reference in lab.references:
        reference.offset = 30 * MS
    async with lab.running() as monitor:
        report = await lab.reported(lambda each: each["dropped"])
        assert monitor.soundness.agreeing == 0
    assert (report["sound"], report["samples"]) == (False, [])
    assert "0 of 3 references agree" in report["detail"]
    assert lab.alice.establishments == 0, "what cannot be told is not looked at"


async def test_one_lying_reference_is_outvoted_and_two_are_not(lab):
    lab.references[0].offset = -3600_000 * MS
    async with lab.running():
        assert (await lab.reported(has_samples))["sound"]
        lab.references[1].is_silent = True
        report = await lab.reported(lambda each: not each["sound"])
        assert report["samples"] == []
        assert "1 of 3" in report["detail"]
        lab.references[1].is_silent = False
        assert (await lab.reported(has_samples))["sound"]


async def test_where_no_reference_is_reached_by_ipv6_nothing_is_said_of_it(lab):
    lab.hand_out({"target": 6, "address": "::1"}, {"target": 7, "address": "127.0.0.1"})
    async with lab.running() as monitor:
        report = await lab.reported(has_samples)
        assert monitor._schedule.skipped["unsound"] > 0
    assert {sample["target"] for sample in report["samples"]} == {7}


async def test_what_fails_while_this_host_has_too_much_to_do_says_nothing(lab):
    lab.hand_out({"target": 7, "address": "127.0.0.9"})
    async with lab.running() as monitor:
        await until(lambda: monitor._ended["tcp"])
        begin = monitor._begin

        def blocked(task):
            begun = begin(task)
            time.sleep(0.8)
            return begun

        monitor._begin = blocked
        await until(lambda: monitor._ended["overloaded"])
        monitor._begin = begin
        assert monitor._lost >= 1


async def test_a_registry_that_is_down_stops_nothing(lab):
    later = ({"target": number, "address": "127.0.0.1", "after": number / 20} for number in range(8, 20))
    lab.hand_out({"target": 7, "address": "127.0.0.1"}, *later)
    async with lab.running() as monitor:
        await lab.reported(has_samples)
        async with lab.registry.failing(saying(UNAVAILABLE)):
            await until(lambda: monitor._requests["report", "failed"] and monitor._requests["work", "failed"])
            await until(lambda: monitor._outbox.is_repeating)
            number, waiting = monitor._sequence, len(monitor._outbox)
            assert waiting > 0
        report = await lab.reported(has_samples)
    assert report["sequence"] == number, "what was not answered is sent again under its number"


async def test_a_report_that_is_refused_for_good_is_not_sent_for_ever(lab):
    refused = b"HTTP/1.1 422 No\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    say = saying(refused)

    async def once(writer):
        lab.registry.fault = None
        await say(writer)

    async def refuse_reports(path, _said):
        if path == REPORT:
            lab.registry.fault = once

    lab.registry.heed = refuse_reports
    async with lab.running() as monitor:
        await until(lambda: monitor._outbox.dropped["refused"])
        assert monitor._requests["work", "failed"] == 0
        assert not monitor._outbox.is_repeating


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\n{]}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n[]",
        b"\x16\x03\x01 garbage",
        b"",
    ],
)
async def test_garbage_of_a_registry_is_survived(lab, answer):
    async with lab.running() as monitor, lab.registry.failing(saying(answer)):
        await until(lambda: monitor._requests["work", "failed"])


async def test_a_hostile_registry_leads_it_nowhere(lab):
    lab.write(allow_private_addresses=False)
    lab.hand_out(
        {"target": 1, "address": "127.0.0.1"},
        {"target": 2, "address": "garbage"},
        nameservers=["127.0.0.1:53", "nonsense", "[::1]:53"],
        poll_after=1e-9,
        max_samples=-1,
    )
    async with lab.running() as monitor:
        await until(lambda: monitor._schedule.skipped["refused"] >= 2)
        assert list(monitor._usable(["127.0.0.1:53", "nonsense"])) == []
    assert lab.alice.establishments == 0


async def test_as_a_service(lab, tmp_path):
    """Ready for systemd, metrics, and at SIGTERM what is known is told."""
    port = free_port()
    lab.write(metrics=f"127.0.0.1:{port}", report_interval=30)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        process = Process(
            "poolsvc monitor",
            [script("poolsvc"), "monitor", f"--config={lab.config}"],
            tmp_path / "process",
            env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")},
        )
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(process.start, lambda: True)
        try:
            async with asyncio.timeout(30):
                assert b"READY=1" in await loop.sock_recv(manager, 1000)
                while True:
                    figures = await asyncio.to_thread(scrape, port)
                    if figures.get('pool_monitor_probes_total{outcome="ok"}', 0) > 2:
                        break
                    await asyncio.sleep(0.1)
            assert figures["pool_monitor_sound"] == 1
            assert figures['pool_monitor_requests_total{kind="work",outcome="answered"}'] > 0
            process.signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait) == 0
        finally:
            process.stop()
    assert has_samples(lab.reports[-1])


async def test_the_local_check_alone(lab):
    async def check():
        return await asyncio.to_thread(
            CliRunner().invoke, app, ["monitor", "--check", "--config", str(lab.config)]
        )

    done = await check()
    assert done.exit_code == 0, done.output
    assert "sound, by IPv4: 3 of 3" in done.stdout
    lab.references[0].offset = lab.references[1].offset = 50 * MS
    done = await check()
    assert done.exit_code == ExitStatus.DOCTOR
    assert done.stdout.count("fail") == 2
    assert "1 of 3" in done.stderr


def test_what_cannot_be_used_is_named(tmp_path):
    (tmp_path / "m.toml").write_text(
        'registry = "https://registry.example.net"\ntoken_file = "none"\n'
        'references = ["ntp:a.example", "ntp:b.example", "ntp:c.example"]\n'
    )
    done = CliRunner().invoke(app, ["monitor", "--config", str(tmp_path / "m.toml")])
    assert (done.exit_code, "token_file" in done.stderr) == (ExitStatus.CONFIGURATION, True)
    done = CliRunner().invoke(app, ["monitor", "--show", "--config", str(tmp_path / "m.toml")])
    assert json.loads(done.stdout)["token_file"] == str(tmp_path / "none")
    done = CliRunner().invoke(app, ["monitor", "--config", str(tmp_path / "missing.toml")])
    assert done.exit_code == ExitStatus.CONFIGURATION


def test_its_unit_is_one_that_systemd_reads(tmp_path):
    config = tmp_path / "m.toml"
    config.write_text(
        'registry = "https://registry.example.net"\ntoken_file = "none"\n'
        'references = ["ntp:a.example", "ntp:b.example", "ntp:c.example"]\n'
    )
    done = CliRunner().invoke(app, ["monitor", "--unit", "--config", str(config)])
    assert done.exit_code == 0, done.output
    unit = tmp_path / "pool-monitor.service"
    unit.write_text(done.stdout)
    checked = subprocess.run(
        [require("systemd-analyze"), "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    assert (checked.returncode, str(unit) in checked.stderr) == (0, False), checked.stderr
    assert f"monitor --config {config}" in done.stdout
