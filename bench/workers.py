"""`python -m bench.workers`: what a second process adds to the Python packets: NTS answers and NTS-KE a second.

Two clients ask at a time, each a process of its own with an address of its own, since all that one address sends comes
to one process. With as many cores as processes the clients take from the servers what they need themselves: look at the
processor time of an answer as well.
"""

import asyncio
import json
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

from cryptography import x509

from bench import command
from bench.contenders import ADDRESS, AEAD, SOURCES, Contender
from bench.load import Load, LoadError
from bench.ntp import Question
from lab.certificates import Authority
from lab.programs import AgentServer
from nts_core.ke import KeClient, KeResult
from nts_core.tls import Trust, client_channel

_REQUESTS = 1024
_CLIENTS = 4
_DEADLINE = 10.0


@dataclass(frozen=True, slots=True)
class Rate:
    """Answers a second of time that passed, and the servers' processor time an answer in microseconds."""

    per_second: float
    cpu_us: float
    busy: tuple[float, ...]  # the share of a core that each process took


@dataclass(frozen=True, slots=True)
class Target:
    """A running server, as a client in another process needs to know it."""

    ke_port: int
    ntp_port: int
    root: Path

    def trust(self) -> Trust:
        roots = x509.load_pem_x509_certificates(self.root.read_bytes())
        return Trust.of(roots, datetime.now(UTC))


async def _establish(target: Target, trust: Trust, source: str) -> KeResult:
    """A whole key establishment from one address of this host."""
    async with asyncio.timeout(_DEADLINE):
        reader, writer = await asyncio.open_connection(ADDRESS, target.ke_port, local_addr=(source, 0))
        channel = client_channel(ADDRESS, trust)
        client = KeClient(channel.export, (AEAD,))
        result, octets, asked = None, b"", False
        while result is None:
            plaintext = channel.receive(octets)
            if channel.established and not asked:
                asked = True
                channel.send(client.request())
            writer.write(channel.to_send())
            result = client.receive(plaintext) if plaintext else None
            if result is None:
                octets = await reader.read(1 << 16)
                if not octets:
                    raise LoadError("the server closes too early")
        writer.close()
        return result


def _ask_ke(target: Target, source: str, seconds: float) -> tuple[int, float]:
    """How many key establishments one client process gets done, and in how many seconds."""
    trust = target.trust()

    async def work() -> tuple[int, float]:
        began = time.monotonic()

        async def client() -> int:
            done = 0
            while time.monotonic() - began < seconds:
                await _establish(target, trust, source)
                done += 1
            return done

        done = sum(await asyncio.gather(*(client() for _ in range(_CLIENTS))))
        return done, time.monotonic() - began

    return asyncio.run(work())


def _ask_ntp(target: Target, source: str, seconds: float) -> tuple[int, float]:
    """How many authenticated requests are answered to one client process, and in how many seconds."""
    result = asyncio.run(_establish(target, target.trust(), source))
    questions = [Question.nts(result.keys, secrets.choice(result.cookies)) for _ in range(_REQUESTS)]
    load = Load(ADDRESS, target.ntp_port, [question.datagram for question in questions], source)
    burst = load.run(seconds, samples=1)
    by_origin = {question.transmit.to_bytes(8, "big"): question for question in questions}
    for reply in burst.sample:
        by_origin[reply[24:32]].check(reply)
    return burst.answered, burst.seconds


def _rate(
    agent: Contender, ask: Callable[[Target, str, float], tuple[int, float]], target: Target, seconds: float
) -> Rate:
    with ProcessPoolExecutor(len(SOURCES), mp_context=get_context("spawn")) as clients:
        # Whatever they load is loaded before anything counts.
        list(clients.map(ask, repeat(target), SOURCES, repeat(0.3)))
        before = agent.each_cpu_ns()
        turns = list(clients.map(ask, repeat(target), SOURCES, repeat(seconds)))
        spent = [after - earlier for after, earlier in zip(agent.each_cpu_ns(), before, strict=True)]
    return Rate(
        per_second=round(sum(answered / took for answered, took in turns), 1),
        cpu_us=round(sum(spent) / 1000 / sum(answered for answered, _ in turns), 1),
        busy=tuple(round(each / 1e9 / turns[0][1], 2) for each in spent),
    )


def measure(seconds: float, workers: Sequence[int]) -> dict[str, dict[str, Rate]]:
    """By protocol and number of processes; `seconds` of load each."""
    found: dict[str, dict[str, Rate]] = {"nts": {}, "ke": {}}
    with tempfile.TemporaryDirectory(prefix="truechimer-bench-") as name:
        directory = Path(name)
        authority = Authority(directory / "authority")
        pair = authority.issue(ADDRESS)
        for count in workers:
            server = AgentServer(directory / f"agent-{count}", pair, "--local-stratum=10")
            # Threads of the native engine are in `bench.ntp`.
            server.process.env |= {"POOL_AGENT_WORKERS": str(count), "POOL_AGENT_ENGINE__PACKETS": "python"}
            with server:
                agent = Contender("pool-agent", server.process.pid)
                target = Target(server.ke_port, server.ntp_port, authority.root)
                for protocol, ask in (("nts", _ask_ntp), ("ke", _ask_ke)):
                    found[protocol][str(count)] = rate = _rate(agent, ask, target, seconds)
                    if len(rate.busy) != count or min(rate.busy) == 0:
                        raise LoadError(f"not all of {count} processes had something to do")
    return found


def main() -> int:
    parser = command.parser("workers", "several processes")
    parser.add_argument("--seconds", type=float, default=5.0, help="of load for each figure")
    arguments = command.parse(parser)
    with command.failing(LoadError):
        found = measure(arguments.seconds, (1, 2))
    if arguments.json:
        print(json.dumps({kind: {n: asdict(r) for n, r in rates.items()} for kind, rates in found.items()}))
        return 0
    for protocol, rates in found.items():
        for count, rate in rates.items():
            print(
                f"{protocol}, {count}: {rate.per_second:,.0f}/s, {rate.cpu_us:g} µs each, cores {rate.busy}"
            )
        print(f"{protocol}: {rates['2'].per_second / rates['1'].per_second:.2f} times as many")
    return 0


if __name__ == "__main__":
    sys.exit(main())
