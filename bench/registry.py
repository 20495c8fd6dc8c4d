"""`python -m bench.registry`: the registry with many servers: passes of the publisher, answers of the API, memory.

A pool is made in a PostgreSQL of its own. The publisher's part is measured in this process, the API's with the
processes that an operator would run on two cores: two `poolsvc serve --role api` and one `--role worker`.
"""

import asyncio
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import command, pools
from bench.processes import cpu_s, rss_mib, settle
from bench.requests import Answer, Call, Client
from lab.knot import Knot
from lab.postgres import Postgres
from lab.processes import LabError, Process, free_port
from lab.programs import script
from nts_core.shell import configure_logging
from poolsvc import schema, servers
from poolsvc.config import Settings, load_settings
from poolsvc.db import Database
from poolsvc.primary import PublishError
from poolsvc.publication import Publication

_RATE = 200.0
_MIX = {"sync": 80, "server": 10, "pool": 5, "list": 5}
_SYNC = json.dumps({"engine": "builtin", "clock": "synchronised to within 1 ms", "serving": []}).encode()
_SQLITE_SHARE = 10  # one writer at a time, and a pool that SQLite is for is small
_WARM_UP = 5.0
_MAX_SERVERS = 1_000_000
_READY = 60.0
_CONFIG = """\
pool = "{pool}"
database = "{database}"
listen = ["127.0.0.1:{port}"]
allow_private_addresses = true

[dns]
primary = "127.0.0.1:{dns}"
tsig_name = "publisher.{pool}"
tsig_secret_file = "tsig.secret"
nameservers = ["127.0.0.1:{dns}"]
srv_ttl = 3600

[ca]
directory_url = "https://{ca}/dir"
caa_identity = "ca.example"
account_key_file = "account.pem"

[policy]
requests_per_second_and_address = 100000
requests_per_second_and_token = 100000
request_burst = 100000
"""


@dataclass(frozen=True, slots=True)
class Latency:
    """Answers of one kind, in milliseconds from the moment at which each request was due."""

    count: int
    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> "Latency":
        times = sorted(answer.seconds * 1000 for answer in answers)
        p50, p95, p99 = (times[math.ceil(len(times) * part) - 1] for part in (0.5, 0.95, 0.99))
        return cls(len(times), p50, p95, p99)


class Bench:
    """One run; `figures` is what came of it, by name."""

    def __init__(self, directory: Path, postgres: Postgres, knot: Knot | None, rate: float) -> None:
        self._rate = rate
        self._directory = directory
        self._postgres = postgres
        self._knot = knot
        self.figures: dict[str, Any] = {}

    def settings(self, title: str, database: str) -> tuple[Path, Settings]:
        """A settings file and what it says; without a Knot the primary is a port that nobody listens on."""
        directory = self._directory / title
        directory.mkdir()
        (directory / "tsig.secret").write_text("c2VjcmV0" if self._knot is None else self._knot.tsig_secret)
        file = directory / "poolsvc.toml"
        file.write_text(
            _CONFIG.format(
                pool=pools.POOL,
                database=database,
                port=free_port(),
                dns=free_port() if self._knot is None else self._knot.port,
                ca=pools.CA,
            )
        )
        return file, load_settings(file)

    def prepare(self, database: str, count: int) -> None:
        _, settings = self.settings(f"fill-{count}-{len(self.figures)}", database)
        with self._timed("fill_s"):
            schema.upgrade(settings)
            pools.fill(database, count, datetime.now(UTC))

    @contextmanager
    def _timed(self, figure: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.figures[figure] = time.monotonic() - began

    async def passes(self, settings: Settings) -> None:
        """What a leader does: the first pass, one without a change, one with a single change."""
        database, now = Database(settings.database), datetime.now(UTC)
        publication = Publication(database, settings)
        try:
            with self._timed("full_look_s"):
                await publication.look(now)
            with self._timed("full_plan_s"):
                zone = publication.whole()
            self.figures["rrsets"] = len(zone)
            del zone
            if self._knot is not None:
                await publication.publisher.take_fence(2)
                with self._timed("full_publish_s"):
                    await publication.publish(2, now)
                    while publication.has_more:
                        await publication.publish(2, now)
            with self._timed("unchanged_pass_s"):
                await publication.look(now + timedelta(seconds=1))
                if self._knot is not None and publication.is_due(now + timedelta(seconds=1)):
                    raise PublishError("a pass without a change has something to do")
            async with database.transaction() as session:
                server = await servers.get(session, 1)
                server.addresses[0].score = 0.0
            with self._timed("changed_look_s"):
                await publication.look(now + timedelta(seconds=2))
            if self._knot is not None:
                with self._timed("changed_publish_s"):
                    await publication.publish(2, now + timedelta(seconds=2))
                    while publication.has_more:
                        await publication.publish(2, now + timedelta(seconds=2))
                later = now + timedelta(seconds=settings.policy.reconcile_interval + 2)
                with self._timed("check_s"):
                    await publication.look(later)
                    await publication.publish(2, later)
        finally:
            await database.close()

    def serve(self, database: str, count: int, seconds: float, *, split: bool) -> None:
        """Ask the API at the rate of the goal, with a worker beside it."""
        with ExitStack() as stack:
            # One process for each of the cores that the goal names.
            parts = {"api-1": "api", "api-2": "api", "worker": "worker"} if split else {"all": "all"}
            running: dict[str, Process] = {}
            ports: list[int] = []
            for part, role in parts.items():
                file, settings = self.settings(f"{part}-{count}", database)
                argv = [script("poolsvc"), "serve", "--role", role, "--config", str(file)]
                process = stack.enter_context(Process(part, argv, file.parent))
                running[part] = process.start(partial(_answers, settings), _READY)
                if role != "worker":
                    ports.append(_port(settings))
            with self._timed("start_s"):
                settle(running.values())
            asyncio.run(
                Client(ports).run(_calls(count, int(min(_WARM_UP, seconds) * self._rate)), self._rate)
            )
            calls = _calls(count, int(seconds * self._rate))
            cpu = {part: cpu_s(process.pid) for part, process in running.items()}
            reads = pools.whole_reads(database) if split else 0
            answers = asyncio.run(Client(ports).run(calls, self._rate))
            if split:
                self.figures["whole_reads"] = pools.whole_reads(database) - reads
            if wrong := {answer.status for answer in answers} - {
                HTTPStatus.OK,
                HTTPStatus.SERVICE_UNAVAILABLE,
            }:
                raise LabError(f"the API answered {sorted(wrong)}")
            self.figures["api_unavailable"] = sum(answer.status != HTTPStatus.OK for answer in answers)
            kinds = {answer.kind for answer in answers}
            self.figures["api_ms"] = {
                "all": asdict(Latency.of(answers)),
                **{
                    kind: asdict(Latency.of([a for a in answers if a.kind == kind])) for kind in sorted(kinds)
                },
            }
            for part, process in running.items():
                spent = cpu_s(process.pid) - cpu[part]
                self.figures[f"{part}_cpu_ms_a_request"] = 1000 * spent / len(answers)
                self.figures[f"{part}_rss_mib"] = rss_mib(process.pid)


def _answers(settings: Settings) -> bool:
    try:
        asyncio.run(Client([_port(settings)]).run([Call.of("", "GET", "/metrics")], 1))
    except OSError:
        return False
    return True


def _port(settings: Settings) -> int:
    return int(settings.listen[0].rpartition(":")[2])


def _calls(servers_: int, count: int) -> list[Call]:
    """A realistic mix, the same at each run."""
    chance = random.Random(1)

    def call(kind: str) -> Call:
        number = chance.randint(1, servers_)
        match kind:
            case "sync":
                return Call.of(kind, "POST", "/v1/agent/sync", pools.agent_token(number), _SYNC)
            case "server":
                return Call.of(kind, "GET", f"/v1/servers/{pools.name(number)}", pools.OPERATOR)
            case "list":
                return Call.of(kind, "GET", "/v1/servers?state=active", pools.OPERATOR)
            case _:
                return Call.of(kind, "GET", "/v1/pool")

    kinds = chance.choices(list(_MIX), weights=list(_MIX.values()), k=count)
    return [call(kind) for kind in kinds]


def measure(
    servers_: int, zone_servers: int, sqlite_servers: int, seconds: float, rate: float
) -> dict[str, Any]:
    """All parts, each with a database of its own."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="truechimer-bench-") as name, ExitStack() as stack:
        directory = Path(name)
        postgres = stack.enter_context(Postgres(directory / "postgres"))
        whole = Bench(directory, postgres, None, rate)
        database = postgres.create_database()
        whole.prepare(database, servers_)
        asyncio.run(whole.passes(whole.settings("passes", database)[1]))
        whole.serve(database, servers_, seconds, split=True)
        found[f"PostgreSQL, {servers_:,} servers"] = whole.figures
        (directory / "zone").mkdir()
        lines = list(pools.records(range(1, zone_servers + 1), 300))
        knot = stack.enter_context(Knot(directory / "zone" / "knot", zone=pools.POOL, records=lines))
        zone = Bench(directory / "zone", postgres, knot, rate)
        database = postgres.create_database()
        zone.prepare(database, zone_servers)
        asyncio.run(zone.passes(zone.settings("passes", database)[1]))
        found[f"PostgreSQL and Knot, {zone_servers:,} servers"] = zone.figures
        (directory / "sqlite").mkdir()
        small = Bench(directory / "sqlite", postgres, None, rate / _SQLITE_SHARE)
        database = f"sqlite+aiosqlite:///{directory / 'sqlite' / 'registry.db'}"
        small.prepare(database, sqlite_servers)
        asyncio.run(small.passes(small.settings("passes", database)[1]))
        small.serve(database, sqlite_servers, seconds, split=False)
        found[f"SQLite, {sqlite_servers:,} servers"] = small.figures
    return found


def _show(found: dict[str, Any]) -> None:
    console = Console(width=110)
    for title, figures in found.items():
        table = Table("figure", "value", title=title, title_justify="left")
        for figure, value in figures.items():
            if figure == "api_ms":
                for kind, latency in value.items():
                    text = ", ".join(f"{key} {latency[key]:.1f}" for key in ("p50", "p95", "p99"))
                    table.add_row(f"API, {kind} ({latency['count']})", f"{text} ms")
            else:
                table.add_row(figure, f"{value:,.3f}" if isinstance(value, float) else f"{value:,}")
        console.print(table)


def main() -> int:
    parser = command.parser("registry", __doc__)
    parser.add_argument("--servers", type=int, default=100_000, help="for passes and API on PostgreSQL")
    parser.add_argument("--zone-servers", type=int, default=10_000, help="for passes with a Knot")
    parser.add_argument("--sqlite-servers", type=int, default=2_000, help="for passes and API on SQLite")
    parser.add_argument("--seconds", type=float, default=20.0, help="seconds of load on the API, each")
    parser.add_argument("--rate", type=float, default=_RATE, help="requests a second")
    options = command.parse(parser)
    sizes = (options.servers, options.zone_servers, options.sqlite_servers)
    if (
        not all(1 <= size <= _MAX_SERVERS for size in sizes)
        or not 1 <= options.seconds <= 600
        or not 0 < options.rate <= 10_000
    ):
        parser.error(f"1 to {_MAX_SERVERS} servers and 1 to 600 seconds, at most 10000 requests a second")
    configure_logging()
    with command.failing(PublishError, OSError):
        found = measure(*sizes, options.seconds, options.rate)
    if options.json:
        print(json.dumps({"bench": "registry", "results": found}, indent=1))
    else:
        _show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
