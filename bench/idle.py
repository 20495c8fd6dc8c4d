"""`python -m bench.idle`: what an agent takes of a host on which nothing happens: memory, and processor time.

A whole pool runs on loopback until the agent's server is active. Then the registry goes on with the intervals of the
default policy, and for a minute only they, the clock and the agent itself give it anything to do. chronyd runs beside
it, since an agent that asks nobody of the clock is no usual one; `chronyc`, which it starts for that, counts as its own.
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import command
from bench.contenders import Contender
from bench.processes import rss_mib
from lab.peers import Chronyd
from lab.pool import LabPool

_POLICY = {"AGENT_INTERVAL": "60", "PROBE_INTERVAL": "60", "TICK": "1"}
# A clock that vouches for itself: nothing is sent anywhere.
_CHRONYD = "local stratum 8\nport 0\n"
_MAX_SECONDS = 3600.0
# For the last of what happens once.
_SETTLING = 20.0


@dataclass(frozen=True, slots=True)
class Idle:
    """`rss` is in MiB, of which `private` is the process's own; `cpu` is the share of one core, in per cent."""

    seconds: float
    rss: float
    private: float
    cpu: float


def measure(seconds: float, workers: int) -> Idle:
    """One agent for so long."""
    with tempfile.TemporaryDirectory(prefix="truechimer-bench-") as name:
        directory = Path(name)
        os.environ["POOL_AGENT_WORKERS"] = str(workers)
        with (
            Chronyd(directory / "chronyd", _CHRONYD) as chronyd,
            LabPool(directory / "pool", addresses=1, opening_size=1) as pool,
        ):
            alice = pool.add("alice", f"--clock-source=chronyd:{chronyd.socket}").start()
            pool.wait_for_state(alice, "active")
            pool.registry.stop()
            pool.registry.env |= {f"POOLSVC_POLICY__{name}": value for name, value in _POLICY.items()}
            pool.start_registry()
            time.sleep(_SETTLING)
            return _watch(alice.process.pid, seconds)


def _watch(pid: int, seconds: float) -> Idle:
    agent = Contender("pool-agent", pid)
    began, before = time.monotonic(), _cpu_ns(agent)
    time.sleep(seconds)
    took = time.monotonic() - began
    return Idle(
        seconds=round(took, 1),
        rss=round(sum(rss_mib(each) for each in agent.pids()), 1),
        private=round(sum(_private_mib(each) for each in agent.pids()), 1),
        cpu=round((_cpu_ns(agent) - before) / 1e7 / took, 3),
    )


def _cpu_ns(agent: Contender) -> int:
    """Its own, and that of children that have ended: those are counted in steps of 10 ms, so an hour tells more."""
    ended = 0
    for pid in agent.pids():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ended += (int(fields[13]) + int(fields[14])) * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    return agent.cpu_ns() + ended


def _private_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def main() -> int:
    parser = command.parser("idle", "an idle agent")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--workers", type=int, default=1)
    arguments = command.parse(parser)
    if not (0 < arguments.seconds <= _MAX_SECONDS and 1 <= arguments.workers <= 64):
        parser.error(f"at most {_MAX_SECONDS:g} seconds and 64 workers")
    with command.failing():
        idle = measure(arguments.seconds, arguments.workers)
    if arguments.json:
        print(json.dumps(asdict(idle)))
    else:
        print(
            f"{idle.seconds:g} s: {idle.rss:g} MiB, {idle.private:g} of it private, {idle.cpu:g} % of a core"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
