"""`python -m bench.soak`: the native packets at full load, with new cookie keys and another certificate every ten seconds.

They serve in a process of their own, as in the agent. Clients establish keys all the time, and ask for the time with
the cookies as fast as they are answered. The bench fails for a request that was lost and did not overflow a socket (the
kernel counts those), for one whose cookie was not opened, for a key establishment that fails, and for memory that grows.
"""

import argparse
import asyncio
import json
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path

from cryptography import x509

from bench import command
from bench.contenders import ADDRESS, AEAD, SOURCES, TimeServer
from bench.load import LoadError
from bench.ntp import Questions, nts_questions
from bench.processes import rss_mib
from lab.certificates import Authority, Pair
from member_agent.clock import Clock
from member_agent.config import load_settings
from member_agent.engines.packets import packets_of
from member_agent.engines.serving import PemPair, Place, Protocol
from member_agent.ntp_server import prepare
from member_agent.sockets import Endpoint, bind_shared, bound_endpoint
from nts_core.client import ClientError, establish
from nts_core.cookies import Keyring, Schedule
from nts_core.errors import NtsError
from nts_core.tls import Trust

DEFAULT_SECONDS, DEFAULT_ROTATION = 600.0, 10
_MAX_SECONDS = 3600.0
_THREADS = 1
_STRATUM = 10
# How many retired keys open cookies. Each is used while two keys seal, and made a while before on a busy machine.
_KEPT = 30
# Memory may grow in the first part of the time: by then whatever is used is used.
_SETTLED = 0.2
_GROWTH_MIB = 2.0
# Between key establishments: NTP is to have most of the machine.
_PAUSE = 0.05
_DEADLINE = 10.0


def _bound(protocol: Protocol) -> tuple[Place, list[socket.socket]]:
    """A place where the protocol is served, and the sockets there."""
    anywhere = Place(protocol, Endpoint(ADDRESS, 0))
    sockets = bind_shared(anywhere.endpoint, anywhere.kind, _THREADS)
    for sock in sockets if protocol is Protocol.NTP else ():
        prepare(sock)
    return Place(protocol, bound_endpoint(sockets[0])), sockets


async def _serve(pairs: Sequence[Pair], rotation: int) -> None:
    """What the agent does, more often, until standard input ends. Prints its ports, and at last its counters."""
    keyring = Keyring.new(int(time.time()), secrets.token_bytes, Schedule(rotation, rotation * _KEPT))
    settings = load_settings(None, {"engine": {"packets": "native"}, "workers": _THREADS})
    packets = packets_of(settings, Clock(_STRATUM), keyring)
    shown = cycle(PemPair(pair.cert.read_text(), pair.key.read_text()) for pair in pairs)
    await packets.use_pairs({ADDRESS: next(shown)})
    places = dict(map(_bound, Protocol))
    packets.listen(places)
    print(json.dumps({place.protocol: place.endpoint.port for place in places}), flush=True)
    tending = asyncio.create_task(packets.tend())
    ended = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    while not (await asyncio.wait((ended, tending), timeout=rotation, return_when=asyncio.FIRST_COMPLETED))[
        0
    ]:
        keyring = keyring.at(keyring.next_at, secrets.token_bytes)
        packets.use_keyring(keyring)
        await packets.use_pairs({ADDRESS: next(shown)})
    tending.cancel()
    print(json.dumps(packets.counts.ntp))
    await packets.close()


@dataclass(frozen=True, slots=True)
class Soak:
    """What came of it; memory is resident MiB, once it was settled and at the end."""

    answered: int
    lost: int
    overflowed: int
    checked: int
    established: int
    outcomes: dict[str, int]
    early: float
    late: float

    def faults(self) -> list[str]:
        """What must not be."""
        found = []
        if self.lost > self.overflowed:
            found.append(f"{self.lost} requests were lost, and {self.overflowed} overflowed a socket")
        if set(self.outcomes) != {"nts-time"}:
            found.append(f"not all requests were answered with the time: {self.outcomes}")
        if self.late - self.early > _GROWTH_MIB:
            found.append(f"memory grew from {self.early:.1f} to {self.late:.1f} MiB")
        return found


def overflowed(port: int) -> int:
    """Datagrams that found no room in the sockets of a port."""
    rows = [line.split() for line in Path("/proc/net/udp").read_text().splitlines()[1:]]
    return sum(int(row[-1]) for row in rows if int(row[1].rpartition(":")[2], 16) == port)


async def _establish(server: TimeServer, trust: Trust, end: float) -> int:
    """One key establishment after the other."""
    done = 0
    while time.monotonic() < end:
        await establish(ADDRESS, ADDRESS, server.ke_port, trust, offered=(AEAD,))
        done += 1
        await asyncio.sleep(_PAUSE)
    return done


def measure(seconds: float, rotation: int) -> Soak:
    """Raises LoadError for an answer that is not authentic, ClientError for a key establishment that fails."""
    with (
        tempfile.TemporaryDirectory(prefix="truechimer-bench-") as scratch,
        ThreadPoolExecutor(1) as establishing,
    ):
        authority = Authority(Path(scratch))
        pairs = [authority.issue(ADDRESS, file=name) for name in ("one", "other")]
        files = [str(file) for pair in pairs for file in pair]
        argv = [sys.executable, "-m", "bench.soak", "--rotation", str(rotation), "--serve", *files]
        trust = Trust.of(x509.load_pem_x509_certificates(authority.root.read_bytes()), datetime.now(UTC))
        pipe = subprocess.PIPE
        with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) as child:
            assert child.stdout is not None
            ports = json.loads(child.stdout.readline() or "null")
            if ports is None:
                raise LoadError("the server did not start")
            server = TimeServer("native", child.pid, ports["ke"], ports["ntp"], SOURCES[:_THREADS])
            end = time.monotonic() + seconds
            clients = establishing.submit(lambda: asyncio.run(_establish(server, trust, end)))
            sizes: list[float] = []
            answered = lost = checked = 0
            while time.monotonic() < end:
                questions = Questions(server, asyncio.run(nts_questions(server, trust)))
                # Keys change in between: a cookie is used longer than one key seals.
                turn = questions.turn(min(rotation * 1.5, max(1.0, end - time.monotonic())))
                answered += turn.answered
                lost += turn.lost
                checked += turn.checked
                sizes.append(rss_mib(child.pid))
            established, over = clients.result(), overflowed(server.ntp_port)
            outcomes = json.loads(child.communicate(timeout=_DEADLINE)[0])
    settled = sizes[int(len(sizes) * _SETTLED)]
    return Soak(answered, lost, over, checked, established, outcomes, settled, sizes[-1])


def main() -> int:
    parser = command.parser("soak", "a soak of the native packets")
    parser.add_argument("--seconds", type=float, default=DEFAULT_SECONDS, help="of load")
    parser.add_argument(
        "--rotation", type=int, default=DEFAULT_ROTATION, help="seconds for which a key seals"
    )
    parser.add_argument("--serve", nargs=4, type=Path, help=argparse.SUPPRESS)
    given = command.parse(parser)
    if not (0 < given.seconds <= _MAX_SECONDS and given.rotation >= 1):
        parser.error(f"at most {_MAX_SECONDS:g} seconds, and keys that seal for one at least")
    if given.serve is not None:
        asyncio.run(_serve((Pair(*given.serve[:2]), Pair(*given.serve[2:])), given.rotation))
        return 0
    with command.failing(LoadError, ClientError, NtsError, what="soak"):
        soak = measure(given.seconds, given.rotation)
    if given.json:
        print(json.dumps(asdict(soak)))
    else:
        print(
            f"{soak.answered:,} answers ({soak.checked} checked), {soak.lost} requests lost, {soak.overflowed} overflowed a"
            f" socket; {soak.established:,} key establishments; memory {soak.early:.1f} MiB, at the end {soak.late:.1f}"
        )
    for fault in soak.faults():
        print(f"soak failed: {fault}", file=sys.stderr)
    return 1 if soak.faults() else 0


if __name__ == "__main__":
    sys.exit(main())
