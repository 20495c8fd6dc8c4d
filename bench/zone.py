"""`python -m bench.zone`: a registry that serves a large zone itself, with a secondary that passes it on.

One `poolsvc serve`, API, worker and embedded DNS server, at a PostgreSQL with so many servers; NSD is the secondary. What is
measured is what an operator waits for: the first publication, a start with a zone that is as it should be, the DNS server's
own start, and, for one change after the other, the time from the commit of the change to its signed answer at the secondary:
while the zone is verified for the first time, and when the registry is at rest.
"""

import asyncio
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dns.exception
import dns.message
import dns.query
import dns.tsig
from dns.rdatatype import AAAA, RRSIG, SRV, RdataType
from rich.console import Console
from rich.table import Table

from bench import command, pools
from bench.processes import rss_mib, settle
from lab.embedded import RegistryDns
from lab.nameservers import NameServer
from lab.nsd import Nsd
from lab.postgres import Postgres
from lab.processes import LabError, Process, free_port, wait_until
from lab.programs import scrape, script
from poolsvc import schema, servers
from poolsvc.config import Settings, load_settings
from poolsvc.db import Database

_MAX_SERVERS, _MAX_CHANGES = 200_000, 1_000
_PATIENCE = 1800.0
_VISIBLE = 30.0
_POLL = 0.002
_PARTS = {"p50": 0.5, "p95": 0.95, "max": 1.0}
_SERVICE = (f"_ntske._tcp.{pools.POOL}.", SRV)
_AGE = "poolsvc_publish_age_seconds"
_CONFIG = """\
pool = "{pool}"
database = "{database}"
listen = ["127.0.0.1:{port}"]
allow_private_addresses = true

{dns}nameservers = ["{primary}", "{secondary}"]
srv_ttl = 3600

[[dns.embedded.secondaries]]
address = "{secondary}"
tsig_name = "transfer.{pool}"
tsig_secret_file = "transfer.secret"

[ca]
directory_url = "https://{ca}/dir"
caa_identity = "ca.example"
account_key_file = "account.pem"
"""


class Bench:
    """One registry; `figures` is what came of it, by name."""

    def __init__(self, directory: Path, database: str) -> None:
        self.figures: dict[str, Any] = {}
        self.primary = RegistryDns(directory, zone=pools.POOL, ttl=60, soa_minimum=60)
        self.secondary = Nsd(directory / "nsd", self.primary)
        self._config = directory / "poolsvc.toml"
        (directory / "transfer.secret").write_text(self.primary.transfer_secret)
        self._config.write_text(
            _CONFIG.format(
                pool=pools.POOL,
                database=database,
                port=free_port(),
                dns=self.primary.section(),
                primary=f"{self.primary.address}:{self.primary.port}",
                secondary=f"{self.secondary.address}:{self.secondary.port}",
                ca=pools.CA,
            )
        )
        self._process = Process(
            "poolsvc", [script("poolsvc"), "serve", "--config", str(self._config)], directory
        )

    @property
    def settings(self) -> Settings:
        return load_settings(self._config)

    @contextmanager
    def timed(self, figure: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.figures[figure] = time.monotonic() - began

    def start(self) -> None:
        self._process.start()
        self.primary.start()

    def stop(self) -> None:
        self._process.stop()

    @property
    def _dns(self) -> int:
        """The DNS server's process."""
        for task in Path(f"/proc/{self._process.pid}/task").iterdir():
            for pid in (task / "children").read_text().split():
                if b"embedded_dns" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return int(pid)
        raise LabError("the registry has no DNS server")

    def publish_first(self) -> None:
        """The SRV comes last. The verification of the zone has only begun then."""
        with self.timed("first_publication_s"):
            wait_until(lambda: self._shows(self.secondary, *_SERVICE), "the zone at the secondary", _PATIENCE)

    def rest(self, count: int) -> None:
        with self.timed("first_verification_s"):
            settle([self._process], _PATIENCE)
        self.figures["records"] = _transferred(self.primary)
        self.figures["dns_rss_mib"] = rss_mib(self._dns)
        self.figures["registry_rss_mib"] = rss_mib(self._process.pid)
        self.figures["servers"] = count

    def restart(self) -> None:
        """The registry, until its first pass over a zone that is as it should be has ended."""
        self._process.stop()
        with self.timed("registry_start_s"):
            self.start()
            wait_until(lambda: _AGE in self._metrics(), "a pass of the publisher", _PATIENCE)
        settle([self._process], _PATIENCE)

    def restart_dns(self) -> None:
        """The DNS server after a crash, until it answers."""
        with self.timed("dns_start_s"):
            os.kill(self._dns, signal.SIGKILL)
            wait_until(lambda: self._shows(self.primary, *_SERVICE), "the zone at the server", _PATIENCE)

    def _metrics(self) -> dict[str, float]:
        try:
            return scrape(int(self.settings.listen[0].rpartition(":")[2]))
        except OSError:
            return {}

    @staticmethod
    def _shows(server: NameServer, name: str, kind: RdataType) -> bool:
        """Whether it has records of the kind, signed."""
        query = dns.message.make_query(name, kind, want_dnssec=True)
        try:
            answer = dns.query.udp(query, server.address, timeout=1, port=server.port)
        except (OSError, dns.exception.DNSException):
            return False
        return {kind, RRSIG} <= {rrset.rdtype for rrset in answer.answer}

    def change(self, count: int, figure: str) -> None:
        """One server's IPv6 address goes and comes, again and again; when the secondary says so."""
        times = sorted(asyncio.run(self._change(count)))
        self.figures[figure] = {
            name: round(1000 * times[math.ceil(len(times) * part) - 1]) for name, part in _PARTS.items()
        }

    async def _change(self, count: int) -> list[float]:
        database, times = Database(self.settings.database), list[float]()
        try:
            for number in range(count):
                server_id, is_there = number // 2 + 1, number % 2 == 1
                async with database.transaction() as session:
                    server = await servers.get(session, server_id)
                    server.addresses[1].score = 20.0 if is_there else 0.0
                committed, name = time.monotonic(), f"{pools.name(server_id)}.servers.{pools.POOL}."
                while self._shows(self.secondary, name, AAAA) != is_there:
                    if time.monotonic() - committed > _VISIBLE:
                        raise LabError(f"{name}: the change was not seen within {_VISIBLE:g} s")
                    await asyncio.sleep(_POLL)
                times.append(time.monotonic() - committed)
                await asyncio.sleep(random.uniform(0, 1))
        finally:
            await database.close()
        return times


def _transferred(server: RegistryDns) -> int:
    """Records of the signed zone."""
    key = dns.tsig.Key(server.tsig_name, server.tsig_secret, "hmac-sha256")
    messages = dns.query.xfr(
        server.address, f"{server.zone}.", port=server.port, keyring={key.name: key}, keyname=key.name
    )
    return sum(len(rrset) for message in messages for rrset in message.answer)


def measure(count: int, changes: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="truechimer-bench-") as name, ExitStack() as stack:
        directory = Path(name)
        database = stack.enter_context(Postgres(directory / "postgres")).create_database()
        bench = Bench(directory, database)
        schema.upgrade(bench.settings)
        pools.fill(database, count, datetime.now(UTC))
        stack.callback(bench.stop)
        bench.start()
        stack.enter_context(bench.secondary)
        bench.publish_first()
        bench.change(changes, "commit_to_secondary_verifying_ms")
        bench.rest(count)
        bench.change(changes, "commit_to_secondary_ms")
        bench.restart_dns()
        bench.restart()
        return bench.figures


def _show(figures: dict[str, Any]) -> None:
    table = Table("figure", "value", title="a zone that the registry serves itself", title_justify="left")
    for figure, value in figures.items():
        shown = f"{value:,.2f}" if isinstance(value, float) else str(value)
        table.add_row(figure, shown)
    Console(width=110).print(table)


def main() -> int:
    parser = command.parser("zone", __doc__)
    parser.add_argument("--servers", type=int, default=20_000)
    parser.add_argument("--changes", type=int, default=100, help="one after the other")
    options = command.parse(parser)
    if not (4 <= options.servers <= _MAX_SERVERS and 1 <= options.changes <= _MAX_CHANGES):
        parser.error(f"4 to {_MAX_SERVERS} servers and 1 to {_MAX_CHANGES} changes")
    with command.failing(OSError):
        figures = measure(options.servers, options.changes)
    if options.json:
        print(json.dumps({"bench": "zone", "results": figures}, indent=1))
    else:
        _show(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
