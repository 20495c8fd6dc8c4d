"""`python -m bench.ke`: key establishments (RFC 8915 section 4) a second of server processor time, of all servers.

Each is complete: TCP, TLS 1.3 with a P-256 certificate, request, eight cookies, close. Where there is a cargo, the client
is `engine/examples/establish.rs`, which keeps a server busy. Otherwise it is ours, which verifies certificates and is
slower than the servers, each of which it finds waiting: compare the processor time then, not the rate. After each turn one
key establishment more is done by our client, and one of its cookies used for an authenticated exchange; one that fails
ends the bench with an error.
"""

import asyncio
import sys
import time

from bench import report
from bench.contenders import (
    ADDRESS,
    AEAD,
    CHRONYD,
    NATIVE,
    NTPD_RS,
    PYTHON,
    Contest,
    TimeServer,
    contest,
    possible,
)
from bench.native import establish_many, has_cargo
from bench.report import Comparison, Goal, Turn
from nts_core.client import Established, establish
from nts_core.client import measure as exchanges
from nts_core.tls import Trust

# Below chronyd's limit of 100 connections.
_CLIENTS = 16
SERVERS = (NATIVE, PYTHON, CHRONYD, NTPD_RS)
GOALS = (Goal(NATIVE, CHRONYD, 3.0), Goal(NATIVE, NTPD_RS, 1.0), Goal(PYTHON, CHRONYD))
TITLES = {"ke": (f"NTS-KE: P-256 certificate, {_CLIENTS} clients at a time", "handshake")}


def _busy(contender: TimeServer, contest: Contest, seconds: float) -> Turn:
    """By the quick client."""
    before = contender.cpu_ns()
    found = establish_many(f"{ADDRESS}:{contender.ke_port}", contest.pair.cert, _CLIENTS, seconds)
    cpu_ns = contender.cpu_ns() - before
    established = asyncio.run(establish(ADDRESS, ADDRESS, contender.ke_port, contest.trust, offered=(AEAD,)))
    checked = asyncio.run(exchanges(established, 1)).samples
    return Turn(found.established, 0, len(checked), found.seconds, cpu_ns, found.cpu_ns)


async def _waiting(contender: TimeServer, trust: Trust, seconds: float) -> Turn:
    """By several of our clients in one process, each with one key establishment after the other."""
    started, client_before = time.monotonic(), time.thread_time_ns()
    before = contender.cpu_ns()

    async def client() -> list[Established]:
        done: list[Established] = []
        while not done or time.monotonic() - started < seconds:
            done.append(await establish(ADDRESS, ADDRESS, contender.ke_port, trust, offered=(AEAD,)))
        return done

    of_clients = await asyncio.gather(*(client() for _ in range(_CLIENTS)))
    elapsed, cpu_ns = time.monotonic() - started, contender.cpu_ns() - before
    client_ns = time.thread_time_ns() - client_before
    finished = [established for done in of_clients for established in done]
    checked = (await exchanges(finished[-1], 1)).samples
    return Turn(len(finished), 0, len(checked), elapsed, cpu_ns, client_ns)


def measure(seconds: float, rounds: int) -> dict[str, Comparison]:
    """`seconds` of load in all."""
    with contest(possible(*SERVERS)) as running:
        length = seconds / (rounds * len(running.contenders))

        def turn(contender: TimeServer) -> Turn:
            if has_cargo():
                return _busy(contender, running, length)
            return asyncio.run(_waiting(contender, running.trust, length))

        for contender in running.contenders:
            turn(contender)
        return {"ke": Comparison.run(running.contenders, rounds, turn, GOALS)}


def main() -> int:
    return report.main("ke", "NTS-KE beside chronyd's, on loopback", measure, TITLES)


if __name__ == "__main__":
    sys.exit(main())
