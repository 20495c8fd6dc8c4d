"""`python -m bench.ingest`: reports of monitors, as one registry process takes them, and the scores of a whole pool.

A pool with monitors that look at every address is made in a PostgreSQL of its own. Beside the reports the same samples are only
inserted, without anything that they mean: no way of taking them could be faster.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import sqlalchemy as sa
from pydantic import TypeAdapter

from bench import pools
from lab.postgres import Postgres
from lab.processes import LabError
from nts_core.control import MonitorReport, MonitorSample, MonitorStatus, ProbeResult
from poolsvc import disagreements, monitors, reports, reviews, schema
from poolsvc.config import Settings
from poolsvc.db import Database
from poolsvc.derived import RegistryKey
from poolsvc.models import Monitor, SampleRecord, ViewRole

_MONITORS, _ACTIVE = 12, 7
_TOLD = 500  # samples of a report
_AT_ONCE = 4  # reports
_BATCH = 500  # servers
_REVIEWED, _TOGETHER = 400, 20  # servers; those of one transaction
_DISPUTED = 100  # one address of so many is bad for the monitors on trial
_DOCUMENT = TypeAdapter(MonitorReport)


@dataclass(frozen=True, slots=True)
class Figures:
    """What came of one run."""

    servers: int
    monitors: int
    samples_per_second: float
    cpu_us_per_sample: float  # of the registry's process
    inserts_per_second: float
    rescored_addresses: int
    rescoring_s: float
    reviews_per_second: float  # servers whose monitors are chosen anew
    comparing_s: float  # what monitors with a say and others see, once
    disagreements: int


def _settings(database: str) -> Settings:
    return Settings.model_validate(
        {
            "pool": pools.POOL,
            "database": database,
            "dns": {
                "primary": "127.0.0.1:53",
                "nameservers": ["127.0.0.1:53"],
                "tsig_name": "publisher.example",
                "tsig_secret_file": "tsig.secret",
            },
            "ca": {
                "directory_url": f"https://{pools.CA}/dir",
                "caa_identity": "ca.example",
                "account_key_file": "account.pem",
            },
        }
    )


def _look(database: str, now: datetime) -> None:
    """Let every monitor look at every address, as it has for days."""
    engine = sa.create_engine(database)
    with engine.begin() as connection:
        for number in range(1, _MONITORS + 1):
            connection.execute(
                sa.insert(Monitor).values(
                    name=f"m{number}",
                    status=MonitorStatus.ACTIVE,
                    status_since=now,
                    created_at=now,
                    seen_at=now,
                    sound=True,
                )
            )
        connection.execute(
            sa.text(
                "INSERT INTO monitor_views (address_id, monitor_id, role, role_since, role_reason, due_at, at, score,"
                " full_probes, points, detail, step, step_reason, mean_delay_ns)"
                f" SELECT a.id, m.id, CASE WHEN (a.id + m.id) % {_MONITORS} < {_ACTIVE} THEN '{ViewRole.ACTIVE}'"
                f" ELSE '{ViewRole.TESTING}' END, :now, '', :now, :before, 20, 3, 100, '',"
                f" CASE WHEN a.id % {_DISPUTED} = 0 AND (a.id + m.id) % {_MONITORS} >= {_ACTIVE} THEN -5 ELSE 1 END,"
                " '', 20000000 FROM addresses a CROSS JOIN monitors m"
            ),
            {"now": now, "before": now - timedelta(minutes=5)},
        )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("ANALYZE"))
    engine.dispose()


def _result(number: int) -> ProbeResult:
    return ProbeResult(
        "192.0.2.1",
        None,
        "",
        offset=random.randint(-5_000_000, 5_000_000),
        delay=random.randint(1_000_000, 90_000_000),
        stratum=2,
        leap=0,
        asked=3,
        cookies=3,
        exchanges=3,
        fingerprint=pools.certificate(number),
        serial=f"{number:x}",
    )


def _report(targets: Sequence[int], sequence: int) -> bytes:
    """As a monitor sends it: half of the addresses of as many servers."""
    samples = tuple(
        MonitorSample(target, random.uniform(0, 20), _result((target + 1) // 2)) for target in targets
    )
    return _DOCUMENT.dump_json(MonitorReport(sequence, sound=True, samples=samples, program="bench"))


async def _all(jobs: Sequence[Callable[[], Awaitable[None]]]) -> float:
    """Seconds that it takes, some at once."""
    slots = asyncio.Semaphore(_AT_ONCE)

    async def one(job: Callable[[], Awaitable[None]]) -> None:
        async with slots:
            await job()

    began = time.monotonic()
    await asyncio.gather(*map(one, jobs))
    return time.monotonic() - began


async def _measure(settings: Settings, servers: int, count: int) -> Figures:
    database = Database(settings.database)
    chosen = [random.sample(range(1, 2 * servers + 1), _TOLD) for _ in range(count)]
    bodies = [_report(targets, sequence) for sequence, targets in enumerate(chosen, start=1)]

    def take(number: int) -> Callable[[], Awaitable[None]]:
        async def job() -> None:
            report = _DOCUMENT.validate_json(bodies[number])
            async with database.transaction("bench") as session:
                monitor = await monitors.reporting(session, number % _MONITORS + 1)
                taken = await reports.take(session, settings, monitor, report, datetime.now(UTC))
            if taken < 0.9 * _TOLD:
                raise LabError(f"only {taken} of {_TOLD} samples counted")

        return job

    def insert(number: int) -> Callable[[], Awaitable[None]]:
        at = datetime.now(UTC) + timedelta(seconds=number + 1)
        rows = [
            {"address_id": target, "at": at, "monitor": "plain", "step": 1.0, "score": 20.0}
            for target in chosen[number]
        ]

        async def job() -> None:
            async with database.transaction("bench") as session:
                await session.execute(sa.insert(SampleRecord), rows)

        return job

    try:
        for warm in range(_AT_ONCE):
            await take(warm)()
        rest = range(_AT_ONCE, count)
        began = time.process_time()
        taking = await _all([take(number) for number in rest])
        spent = time.process_time() - began
        inserting = await _all([insert(number) for number in rest])
        rescoring, left = await _rescore(database, settings, servers)
        reviewing = await _review(database, settings)
        began = time.monotonic()
        async with database.transaction("bench") as session:
            found = await disagreements.look(session, settings, datetime.now(UTC))
        comparing = time.monotonic() - began
    finally:
        await database.close()
    if left > servers / 100:
        raise LabError(f"{left} servers were left to be judged one by one")
    samples = _TOLD * len(rest)
    return Figures(
        servers=servers,
        monitors=_MONITORS,
        samples_per_second=samples / taking,
        cpu_us_per_sample=spent / samples * 1e6,
        inserts_per_second=samples / inserting,
        rescored_addresses=2 * servers,
        rescoring_s=rescoring,
        reviews_per_second=_REVIEWED / reviewing,
        comparing_s=comparing,
        disagreements=len(found),
    )


async def _rescore(database: Database, settings: Settings, servers: int) -> tuple[float, int]:
    """Seconds for all servers, as the worker does it, and how many it has to look at one by one."""
    left = 0
    began = time.monotonic()
    for first in range(1, servers + 1, _BATCH):
        ids = range(first, min(first + _BATCH, servers + 1))
        left += len(await reports.settle_due(database, settings, ids, datetime.now(UTC)))
    return time.monotonic() - began, left


async def _review(database: Database, settings: Settings) -> float:
    """Seconds for some servers, as the worker does it."""
    key = RegistryKey(bytes(32))
    began = time.monotonic()
    for first in range(1, _REVIEWED + 1, _TOGETHER):
        ids = range(first, first + _TOGETHER)
        await reviews.review_due(database, settings, key, ids, datetime.now(UTC))
    return time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", type=int, default=10_000)
    parser.add_argument("--reports", type=int, default=60)
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, Postgres(Path(directory) / "postgres") as postgres:
        settings = _settings(postgres.create_database())
        schema.upgrade(settings)
        now = datetime.now(UTC)
        pools.fill(settings.database, wanted.servers, now)
        _look(settings.database, now)
        figures = asyncio.run(_measure(settings, wanted.servers, wanted.reports))
    if wanted.json:
        json.dump(asdict(figures), sys.stdout, indent=2)
        return 0
    print(f"{figures.servers} servers with 2 addresses, {figures.monitors} monitors at each")
    print(f"reports of {_TOLD}:      {figures.samples_per_second:8.0f} samples a second, one process")
    print(f"  processor time:    {figures.cpu_us_per_sample:8.0f} us a sample")
    print(f"the insert alone:    {figures.inserts_per_second:8.0f} samples a second")
    print(f"all scores anew:     {figures.rescoring_s:8.1f} s")
    print(f"monitors chosen:     {figures.reviews_per_second:8.0f} servers a second")
    print(f"views compared:      {figures.comparing_s:8.2f} s; {figures.disagreements} addresses disputed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
