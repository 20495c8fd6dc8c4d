"""`python -m bench.ke`: key establishments (RFC 8915 section 4) a second of server processor time, of all servers.

The client is slower than the servers, each of which it finds waiting: compare the processor time, not the rate. Each is complete: TCP, TLS 1.3 with a checked P-256 certificate, request, eight cookies. One cookie of each turn is
then used for an authenticated exchange; one that fails ends the bench with an error.
"""

import asyncio
import sys
import time

from bench import report
from bench.contenders import ADDRESS, AEAD, CHRONYD, NATIVE, NTPD_RS, PYTHON, TimeServer, contest, possible
from bench.report import Comparison, Goal, Turn
from nts_core.client import Established, establish
from nts_core.client import measure as exchanges
from nts_core.tls import Trust

# Below chronyd's limit of 100 connections.
_CLIENTS = 8
SERVERS = (NATIVE, PYTHON, CHRONYD, NTPD_RS)
GOALS = (Goal(NATIVE, CHRONYD, 3.0), Goal(NATIVE, NTPD_RS, 1.0), Goal(PYTHON, CHRONYD))
TITLES = {"ke": (f"NTS-KE: P-256 certificate, {_CLIENTS} clients at a time", "handshake")}


async def _turn(contender: TimeServer, trust: Trust, seconds: float) -> Turn:
    """Several clients, each with one key establishment after the other."""
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
            return asyncio.run(_turn(contender, running.trust, length))

        for contender in running.contenders:
            turn(contender)
        return {"ke": Comparison.run(running.contenders, rounds, turn, GOALS)}


def main() -> int:
    return report.main("ke", "NTS-KE beside chronyd's, on loopback", measure, TITLES)


if __name__ == "__main__":
    sys.exit(main())
