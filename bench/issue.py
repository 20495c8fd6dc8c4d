"""How long the pool takes for a certificate when the CA takes no time: orders of a whole pool, one after the other.

Registry, account's process and agent run as in a pool, with the policy's own intervals but for the time between reports
of an idle agent. The time counts from the moment at which an order begins to the one at which the agent has installed
the certificate. The CA's part is the time in which a request to it is under way; what it does between two requests counts
as ours.
"""

import asyncio
import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.table import Table
from sqlalchemy import select, update

from bench import command
from lab.pool import LabPool, Member
from lab.processes import Process, wait_until
from poolsvc.db import Database
from poolsvc.models import Order, Server

_MAX_ORDERS = 1000
_DEADLINE = 60.0
# Before an order is due, so that the agent has heard of it; in a pool it has months.
_NOTICE = timedelta(seconds=3)
_POLICY = {
    "TICK": "1",
    "AGENT_INTERVAL": "2",
    "STEP_RETRY": "10",
    "REQUESTS_PER_SECOND_AND_TOKEN": "100",  # of the bench itself, which looks whether alice is active
    "REQUESTS_PER_SECOND_AND_ADDRESS": "200",
}


@dataclass(frozen=True, slots=True)
class Issue:
    """Seconds from the beginning of an order to the certificate in use; `ca` of these in requests to the CA."""

    total: float
    ca: float

    @property
    def ours(self) -> float:
        return self.total - self.ca


@dataclass(frozen=True, slots=True)
class Figures:
    p50: float
    p95: float

    @classmethod
    def of(cls, values: list[float]) -> Self:
        return cls(statistics.median(values), statistics.quantiles(values, n=20, method="inclusive")[-1])


def measure(orders: int) -> list[Issue]:
    """Issue so many certificates for one server."""
    with tempfile.TemporaryDirectory(prefix="truechimer-bench-") as name:
        directory = Path(name)
        url = f"sqlite+aiosqlite:///{directory}/registry.db"
        notes = directory / "ca-requests"
        os.environ["POOLSVC_CA__SOCKET"] = str(directory / "run" / "acme.sock")
        os.environ.update({f"POOLSVC_POLICY__{name}": value for name, value in _POLICY.items()})
        with LabPool(directory / "pool", database=url, addresses=1, opening_size=1) as pool:
            argv = [
                sys.executable,
                "-m",
                "bench.timed_acme",
                str(notes),
                "acme",
                "serve",
                "--config",
                str(pool.config),
            ]
            with Process("acme", argv, directory).start():
                member = pool.add("alice").start()
                pool.wait_for_state(member, "active", _DEADLINE)
                return [_issue(url, member, notes) for _ in range(orders)]


def _issue(url: str, member: Member, notes: Path) -> Issue:
    known = set(_installed(member))
    asyncio.run(_make_due(url, datetime.now(UTC) + _NOTICE))
    wait_until(lambda: set(_installed(member)) - known, "another certificate", _DEADLINE)
    (order,) = set(_installed(member)) - known
    began, ended = asyncio.run(_began(url, order)).timestamp(), _installed(member)[order]
    requests = [json.loads(line) for line in notes.read_text().splitlines()]
    ca = sum(min(end, ended) - start for start, end in requests if began <= start < ended)
    return Issue(ended - began, ca)


def _installed(member: Member) -> dict[int, float]:
    """When the agent installed the certificate of each order, by its log."""
    lines = (json.loads(line) for line in member.process.output().splitlines() if line.startswith("{"))
    return {
        line["order"]: datetime.fromisoformat(line["timestamp"]).timestamp()
        for line in lines
        if line["event"] == "certificate_installed"
    }


async def _make_due(url: str, at: datetime) -> None:
    database = Database(url)
    try:
        async with database.transaction() as session:
            await session.execute(update(Server).values(order_due_at=at))
    finally:
        await database.close()


async def _began(url: str, order: int) -> datetime:
    database = Database(url)
    try:
        async with database.transaction() as session:
            return (await session.scalars(select(Order.created_at).where(Order.id == order))).one()
    finally:
        await database.close()


def main() -> int:
    parser = command.parser("issue", __doc__)
    parser.add_argument("--orders", type=int, default=30)
    options = command.parse(parser)
    if not 2 <= options.orders <= _MAX_ORDERS:
        parser.error(f"2 to {_MAX_ORDERS} orders")
    with command.failing(OSError):
        issues = measure(options.orders)
    figures = {
        part: Figures.of([getattr(issue, part) for issue in issues]) for part in ("total", "ca", "ours")
    }
    if options.json:
        results = {part: asdict(figure) for part, figure in figures.items()}
        print(json.dumps({"bench": "issue", "orders": len(issues), "results": results}, indent=1))
        return 0
    table = Table("a certificate, s", "p50", "p95", title=f"{len(issues)} orders", title_justify="left")
    for part, figure in figures.items():
        table.add_row(part, f"{figure.p50:.3f}", f"{figure.p95:.3f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
