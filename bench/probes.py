"""`python -m bench.probes`: full probes a second of one monitor, and what one takes of its core.

`poolsvc monitor` runs on a core of its own. On the other one are the servers, the zone's nameserver and the registry that
hands out work: so many probes a second, each of another address and name, with the exchanges two seconds apart as in
service. Beside it, in the same run, the parts of a probe alone: key establishment and three exchanges, one after the other.
"""

import asyncio
import json
import os
import secrets
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from bench import command
from bench.contenders import Contender
from bench.processes import rss_mib
from lab.certificates import Authority
from lab.knot import Knot
from lab.processes import LabError, Process, free_port
from lab.programs import AgentServer, scrape, script
from lab.stand_in import StandIn
from nts_core.association import Association
from nts_core.client import ClientError, establish, exchange
from nts_core.tls import Trust

_ZONE = "pool.example"
_POLL = 0.5  # seconds
_SETTLING = 8.0  # until as many probes are under way as will be
_BARE = 200
_MAX_SECONDS, _MAX_RATE = 600.0, 2000
_OK = 'pool_monitor_probes_total{outcome="ok"}'


@dataclass(frozen=True, slots=True)
class Result:
    """`rate` and `asked` are probes a second, `cpu_us` processor time of the monitor for one, `busy` the share of its core.

    `left_out` probes did not begin or failed, `rss` is in MiB; `bare_us` is what the parts alone take.
    """

    asked: int
    rate: float
    cpu_us: float
    busy: float
    left_out: int
    rss: float
    bare_us: float


class _Registry(StandIn):
    """Hands out work for `rate` probes a second, and takes what comes."""

    def __init__(self, rate: int, ke_port: int, nameserver: str) -> None:
        super().__init__()
        self._rate, self._ke_port, self._nameserver = rate, ke_port, nameserver
        self._next = 0
        self._until = time.monotonic()
        self.answers["/v1/monitor/report"] = {"taken": 0}
        self.heed = self._hand_out
        self.told = 0

    async def _hand_out(self, path: str, said: dict[str, object]) -> None:
        if path == "/v1/monitor/report":
            samples = said["samples"]
            assert isinstance(samples, list)
            self.told += len(samples)
            return
        # Up to the next question, and a little further for one that is late.
        end, tasks = time.monotonic() + 2 * _POLL, []
        while self._until < end:
            number = self._next = (self._next + 1) % 60_000
            address = f"127.1.{number // 250}.{number % 250 + 1}"
            tasks.append(
                {
                    "target": number,
                    "domain": f"n{number}.servers.{_ZONE}",
                    "address": address,
                    "after": max(0.0, self._until - time.monotonic()),
                    "own_addresses": [address, "127.0.0.1"],
                }
            )
            self._until += 1 / self._rate
        self.answers["/v1/monitor/work"] = {
            "pool": _ZONE,
            "monitor": "bench",
            "status": "active",
            "ke_port": self._ke_port,
            "poll_after": _POLL,
            "nameservers": [self._nameserver],
            "tasks": tasks,
        }


async def _bare(ke_port: int, trust: Trust) -> float:
    """Microseconds of this process for key establishment and three exchanges."""
    before = time.process_time_ns()
    for _ in range(_BARE):
        established = await establish(f"bare.servers.{_ZONE}", "127.0.0.1", ke_port, trust)
        association = Association(established.result, secrets.token_bytes)
        for _ in range(3):
            await exchange(association, established.ntp_host, established.ntp_port)
    return (time.process_time_ns() - before) / 1000 / _BARE


async def _watch(monitor: Process, port: int, seconds: float) -> tuple[int, float, int, int]:
    """Probes that ended well, seconds, nanoseconds of the monitor's, and probes that did not."""

    async def figures() -> tuple[int, int]:
        found = await asyncio.to_thread(scrape, port)
        good = int(found.get(_OK, 0))
        counted = ("pool_monitor_probes_total", "pool_monitor_skipped_total", "pool_monitor_dropped_total")
        return good, int(sum(value for name, value in found.items() if name.startswith(counted))) - good

    contender = Contender("monitor", monitor.pid)
    (good, bad), began, cpu = await figures(), time.monotonic(), contender.cpu_ns()
    await asyncio.sleep(seconds)
    took, spent, (good_after, bad_after) = (
        time.monotonic() - began,
        contender.cpu_ns() - cpu,
        await figures(),
    )
    return good_after - good, took, spent, bad_after - bad


async def _measure(directory: Path, rate: int, seconds: float) -> Result:
    cores = sorted(os.sched_getaffinity(0))
    authority = Authority(directory / "authority")
    pair = authority.issue(f"*.servers.{_ZONE}")
    trust = Trust.of(x509.load_pem_x509_certificates(authority.root.read_bytes()), datetime.now(UTC))
    os.sched_setaffinity(0, {cores[-1]})
    everywhere = ("0.0.0.0:0",)
    agent = AgentServer(directory / "agent", pair, "--local-stratum=2", ke=everywhere, ntp=everywhere)
    zone = Knot(directory / "knot", zone=_ZONE, records=["*.servers A 127.0.0.1"])
    with agent, zone:
        bare = await _bare(agent.ke_port, trust)
        async with _Registry(rate, agent.ke_port, f"{zone.address}:{zone.port}") as registry:
            port = free_port()
            config = directory / "monitor.toml"
            (directory / "token").write_text("tc_monitor_bench")
            places = [f"ntp:127.0.0.{number}:{agent.ntp_port}" for number in (1, 2, 3)]
            config.write_text(
                f'registry = "{registry.url}"\ntoken_file = "token"\nreferences = {json.dumps(places)}\n'
                f'roots_file = "{authority.root}"\nmetrics = "127.0.0.1:{port}"\nprobes_at_once = 10000\n'
                "check_interval = 5\nreport_interval = 5\nallow_private_addresses = true\n"
            )
            monitor = Process(
                "poolsvc monitor", [script("poolsvc"), "monitor", f"--config={config}"], directory / "monitor"
            )
            await asyncio.to_thread(monitor.start, lambda: "local_check" in monitor.output())
            try:
                os.sched_setaffinity(monitor.pid, {cores[0]})
                await asyncio.sleep(_SETTLING)
                good, took, spent, bad = await _watch(monitor, port, seconds)
                rss = rss_mib(monitor.pid)
            finally:
                await asyncio.to_thread(monitor.stop)
    if not good or not registry.told:
        raise LabError(f"no probe ended well: {monitor.output()[-1000:]}")
    return Result(
        rate,
        round(good / took, 1),
        round(spent / 1000 / good),
        round(spent / 1e9 / took, 3),
        bad,
        round(rss),
        round(bare),
    )


def main() -> int:
    parser = command.parser("probes", "one monitor on one core")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each rate")
    parser.add_argument("--rate", type=int, action="append", help="probes a second; again for another; 150")
    arguments = command.parse(parser)
    rates = arguments.rate or [150]
    if not 0 < arguments.seconds <= _MAX_SECONDS or not all(0 < rate <= _MAX_RATE for rate in rates):
        parser.error(f"at most {_MAX_SECONDS:g} seconds, and 1 to {_MAX_RATE} probes a second")
    results = []
    for rate in rates:
        with tempfile.TemporaryDirectory(prefix="truechimer-bench-") as name, command.failing(ClientError):
            results.append(asyncio.run(_measure(Path(name), rate, arguments.seconds)))
    if arguments.json:
        print(json.dumps({"bench": "probes", "results": [asdict(result) for result in results]}, indent=1))
        return 0
    for result in results:
        print(
            f"{result.asked} probes/s asked: {result.rate:g}/s done, {result.left_out} left out,"
            f" {result.cpu_us} µs of the monitor's core each ({100 * result.busy:.0f} % busy, {result.rss} MiB);"
            f" one core has {1e6 / result.cpu_us:.0f}/s in it; the parts alone: {result.bare_us} µs"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
