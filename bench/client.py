"""`python -m bench.client`: from nothing to four sources that agree, beside chronyd and ntpd-rs, and an hour of watching.

One network namespace holds a signed zone (Knot), a resolver (Unbound) and four members (`pool-agent serve`). In each round
each client starts with nothing kept and has four sources to find. Ours looks the SRV answer up and validates DNSSEC down to
addresses and metadata; chronyd and ntpd-rs are given the four names, since neither reads SRV records here (ntpd-rs validates
from the root alone), and ask the same resolver for addresses. The hour is one of events: the looks at DNS and the polls of an
hour, with less waiting between them.
"""

import argparse
import asyncio
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from cryptography import x509
from rich.console import Console
from rich.table import Table

from lab.certificates import Authority
from lab.knot import Knot
from lab.namespaces import in_namespace
from lab.peers import CHRONY, NO_CLOCK, NTPD_RS_TRIXIE, STILL_CLOCK, library_environment
from lab.pool_zone import PoolZone
from lab.processes import LabError, Process
from lab.programs import AgentServer, run, script
from lab.unbound import Unbound
from nts_core import membership
from nts_core.asking import Unanswered, ask_ntpd_rs
from nts_core.denial import Witnesses
from nts_core.pool import PoolClient
from nts_core.resolve import Answer, Lookup, Moment, Resolver, TrustAnchors

POOL = "pool.example"
MEMBERS = tuple(f"s{number}" for number in range(1, 5))
ADDRESSES = {name: f"198.51.{number}.7" for number, name in enumerate(MEMBERS, 1)}
_DEADLINE = 60.0
_LOOK = 0.01
_HOUR, _TTL, _INTERVAL = 3600.0, 60.0, 64.0

_CHRONY = """\
{servers}
nosystemcert
ntstrustedcerts {root}
port 0
cmdport 0
bindcmdaddress {directory}/socket
pidfile {directory}/pid
"""
_NTPD_RS = """\
[observability]
log-level = "warn"
observation-path = "{directory}/observe"
{servers}
"""


@dataclass(frozen=True, slots=True)
class Places:
    """What a client needs to know of the laboratory."""

    directory: Path
    root: Path
    anchor: Path
    resolver: str
    port: int


@contextmanager
def laboratory(directory: Path) -> Iterator[Places]:
    """The pool, in the namespace of the thread that enters."""
    authority = Authority(directory / "ca")
    with ExitStack() as stack:
        knot = stack.enter_context(Knot(directory / "knot", ttl=1, soa_minimum=1))
        unbound = Unbound(directory / "unbound", [knot])
        unbound.port = 53
        stack.enter_context(unbound)
        zone = PoolZone(knot, ttl=1)
        zone.add(
            *((name, ADDRESSES[name], f"op={name[1] * 13:a<13.13}".replace("1", "b")) for name in MEMBERS)
        )
        zone.list(MEMBERS)
        for name in MEMBERS:
            pair = authority.issue(f"{name}.servers.{POOL}")
            address = ADDRESSES[name]
            options = {"ke": (f"{address}:4460",), "ntp": (f"{address}:123",)}
            stack.enter_context(AgentServer(directory / name, pair, "--local-stratum=3", **options))
        anchor = directory / "anchor"
        anchor.write_text(knot.trust_anchor())
        yield Places(directory, authority.root, anchor, unbound.address, unbound.port)


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds from the start of a client until each of four sources had answered, and until they agreed."""

    heard: float | None
    agreed: float


def with_resolver(places: Places, argv: Sequence[str]) -> list[str]:
    """A command line under which the system's resolver is the laboratory's."""
    file = places.directory / "resolv.conf"
    file.write_text(f"nameserver {places.resolver}\n")
    inside = f"mount --bind {shlex.quote(str(file))} /etc/resolv.conf && exec {shlex.join(argv)}"
    return ["unshare", "--mount", "sh", "-c", inside]


def options(places: Places) -> list[str]:
    """What `pool-client` is told of the laboratory."""
    return [
        f"--trust-anchor={places.anchor}",
        f"--resolver={places.resolver}:{places.port}",
        f"--ca={places.root}",
    ]


def start_ours(places: Places) -> Start:
    """The whole program, with the start of its interpreter."""
    began = time.monotonic()
    done = run("pool-client", "sources", POOL, "--json", *options(places))
    if done.status != 0 or done.document["agreeing"] != len(MEMBERS):
        raise LabError(f"pool-client found {done.stdout} {done.stderr}")
    return Start(None, time.monotonic() - began)


def start_library(places: Places) -> Start:
    """PoolClient in a program that runs already."""

    async def ask() -> float:
        began = time.monotonic()
        async with client(places) as pool:
            async for view in pool.views():
                if view.truechimers == len(MEMBERS):
                    break
            return time.monotonic() - began

    return Start(None, asyncio.run(ask()))


def resolver(places: Places) -> Resolver:
    """Unbound, of whose word nothing is believed."""
    return Resolver(places.resolver, places.port, TrustAnchors.parse(places.anchor.read_text()))


def client(places: Places, interval: float = _INTERVAL, lookup: Lookup | None = None) -> PoolClient:
    """A client of the laboratory's pool that keeps nothing."""
    return PoolClient(
        POOL,
        lookup=lookup or resolver(places),
        denier=Witnesses([(places.resolver, places.port)]),
        roots=x509.load_pem_x509_certificates(places.root.read_bytes()),
        interval=interval,
    )


def _timed(process: Process, look: Callable[[], tuple[bool, bool]]) -> Start:
    """`look` says whether all were heard and whether they agree."""
    heard: float | None = None
    began = time.monotonic()
    process.start(lambda: True)
    try:
        while (now := time.monotonic() - began) < _DEADLINE:
            are_heard, do_agree = look()
            heard = now if heard is None and are_heard else heard
            if do_agree:
                return Start(heard, now)
            time.sleep(_LOOK)
    finally:
        process.stop()
    raise LabError(f"{process.name} had no time within {_DEADLINE:g} s")


def start_chronyd(places: Places) -> Start:
    """Chronyd with a `server ... nts iburst` for each."""
    directory = Path(tempfile.mkdtemp(dir=places.directory, prefix="chronyd-"))
    servers = "\n".join(f"server {name}.servers.{POOL} nts iburst" for name in MEMBERS)
    config = directory / "chrony.conf"
    config.write_text(_CHRONY.format(servers=servers, root=places.root, directory=directory))
    argv = [*NO_CLOCK, *CHRONY.command("usr/sbin/chronyd"), "-x", "-d", "-f", str(config), "-u", "root"]
    process = Process("chronyd", with_resolver(places, argv), directory, env=library_environment())
    ask = [*CHRONY.command("usr/bin/chronyc"), "-c", "-h", str(directory / "socket"), "-n", "sources"]
    environment = {**os.environ, **library_environment()}

    def look() -> tuple[bool, bool]:
        said = subprocess.run(ask, capture_output=True, text=True, check=False, env=environment).stdout
        rows = [line.split(",") for line in said.splitlines()]
        is_whole = len(rows) == len(MEMBERS) and all(len(row) > 5 for row in rows)
        return (
            is_whole and all(row[5] != "0" for row in rows),
            is_whole and all(row[1] in "*+-" for row in rows),
        )

    return _timed(process, look)


def start_ntpd_rs(places: Places) -> Start:
    """ntpd-rs with an NTS source for each; it never says whether they agree, so that they were heard counts."""
    directory = Path(tempfile.mkdtemp(dir=places.directory, prefix="ntpd-rs-"))
    servers = "\n".join(
        f'[[source]]\nmode = "nts"\naddress = "{name}.servers.{POOL}"\ncertificate-authority = "{places.root}"'
        for name in MEMBERS
    )
    config = directory / "ntp.toml"
    config.write_text(_NTPD_RS.format(servers=servers, directory=directory))
    argv = [*NO_CLOCK, *STILL_CLOCK, *NTPD_RS_TRIXIE.command("usr/bin/ntp-daemon"), "-c", str(config)]
    process = Process("ntp-daemon", with_resolver(places, argv), directory)

    def look() -> tuple[bool, bool]:
        try:
            observed = json.loads(asyncio.run(ask_ntpd_rs(directory / "observe")))
        except (Unanswered, ValueError):
            return False, False
        sources = observed["sources"]
        are_heard = len(sources) == len(MEMBERS) and all(source["delay"] > 0 for source in sources)
        return are_heard, are_heard

    return _timed(process, look)


PEERS = ("chronyd", "ntpd-rs")
CLIENTS: dict[str, Callable[[Places], Start]] = {
    "pool-client sources": start_ours,
    "PoolClient": start_library,
    "chronyd": start_chronyd,
    "ntpd-rs": start_ntpd_rs,
}


@dataclass(frozen=True, slots=True)
class Watching:
    """What an hour's events cost, in seconds of processor time, and how many there were."""

    cpu: float
    polls: int
    looks: int


@dataclass(frozen=True, slots=True)
class Figures:
    """All that was measured; the memory, in octets, is that of `pool-client watch`."""

    starts: dict[str, list[Start]]
    watching: Watching
    memory: int

    def ratio(self, other: str) -> float:
        """Another client's time to four sources over ours, both with the start of their programs."""
        pairs = zip(self.starts["pool-client sources"], self.starts[other], strict=True)
        return statistics.median(theirs.agreed / ours.agreed for ours, theirs in pairs)


class _Counting:
    """Counts the looks at the pool's answer."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self.looks = 0

    async def lookup(self, owner: str, rdtype: str, now: Moment) -> Answer:
        self.looks += rdtype == "SRV"
        return await self._lookup.lookup(owner, rdtype, now)


async def watch(places: Places, seconds: float) -> Watching:
    """The events of an hour within `seconds`, in this process."""
    speed = _HOUR / seconds
    membership.MIN_LOOK = _TTL / speed
    counting = _Counting(resolver(places))
    async with client(places, _INTERVAL / speed, counting) as pool:
        view = await pool.settled()
        polls, looks = sum(source.samples for source in view.sources), counting.looks
        before = time.process_time()
        await asyncio.sleep(seconds)
        cpu = time.process_time() - before
        polls = sum(source.samples for source in pool.view().sources) - polls
        return Watching(cpu, polls, counting.looks - looks)


def memory_of_watching(places: Places) -> int:
    """The resident set, in octets, of `pool-client watch` once its sources agree."""
    argv = [script("pool-client"), "watch", POOL, *options(places)]
    process = Process("pool-client", argv, places.directory / "watch")
    process.start(lambda: f"sources that agree: {len(MEMBERS)}" in process.output())
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024
    finally:
        process.stop()


def measure(rounds: int, seconds: float) -> Figures:
    """All clients in turn, and the hour in a process of its own."""

    def inside() -> Figures:
        with tempfile.TemporaryDirectory() as scratch, laboratory(Path(scratch)) as places:
            starts: dict[str, list[Start]] = {name: [] for name in CLIENTS}
            for _ in range(rounds):
                for name, start in CLIENTS.items():
                    starts[name].append(start(places))
            words = [str(places.root), str(places.anchor), places.resolver, str(places.port), str(seconds)]
            done = subprocess.run(
                [sys.executable, "-m", "bench.client", "--watching", *words],
                capture_output=True,
                text=True,
                check=True,
            )
            return Figures(starts, Watching(**json.loads(done.stdout)), memory_of_watching(places))

    return in_namespace(inside, [f"{address}/32" for address in ADDRESSES.values()])


def _document(figures: Figures) -> dict[str, object]:
    return {
        "starts": {name: [asdict(each) for each in found] for name, found in figures.starts.items()},
        "ratios": {name: figures.ratio(name) for name in PEERS},
        "watching": asdict(figures.watching),
        "memory": figures.memory,
    }


def _show(figures: Figures) -> None:
    table = Table(title="From nothing to four sources that agree, seconds", title_justify="left")
    for column in ("client", "all were heard", "they agree"):
        table.add_column(column, justify="left" if column == "client" else "right")
    for name, found in figures.starts.items():
        heard = [each.heard for each in found if each.heard is not None]
        table.add_row(name, _spread(heard), _spread([each.agreed for each in found]))
    console = Console(width=130)
    console.print(table)
    for name in PEERS:
        console.print(f"{name} over pool-client sources: {figures.ratio(name):.2f}")
    watching = figures.watching
    console.print(
        f"an hour of watching: {watching.polls} polls and {watching.looks} looks at DNS, {watching.cpu:.2f} s of"
        f" processor time; pool-client watch has {figures.memory / 1e6:.1f} MB"
    )


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.client", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="starts of each client")
    parser.add_argument("--seconds", type=float, default=60.0, help="in which the hour's events take place")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--watching", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.watching is not None:
        root, anchor, address, port, seconds = given.watching
        places = Places(Path(), Path(root), Path(anchor), address, int(port))
        found = asyncio.run(watch(places, float(seconds)))
        print(json.dumps(asdict(found)))
        return 0
    figures = measure(given.rounds, given.seconds)
    if given.json:
        print(json.dumps(_document(figures)))
    else:
        _show(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
