"""The registry's engine: finds what is due, takes it under a lease, does it, and records what came of it.

Each kind of work has a due-time column; a claim pushes it ahead by a lease, so that a worker that dies leaves
its work to whoever looks next. Steps are safe to repeat. A failing peer (CA, DNS, member) delays its own kind of
work only.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog
from cryptography import x509
from sqlalchemy import select
from sqlalchemy.orm import InstrumentedAttribute

from poolsvc import idempotency, issuance, journal, monitoring, proofs, publication, removal, servers, teams
from poolsvc.acme import AcmeAccount, AcmeConfig, AcmeError
from poolsvc.config import Settings
from poolsvc.db import Database
from poolsvc.models import Address, Order, Server
from poolsvc.publisher import Fenced, PublishError

_log = structlog.get_logger()
_LEASE = timedelta(minutes=2)
_BATCH = 50
_CONCURRENCY = 16


async def claim(
    database: Database, row: type[Any], due: InstrumentedAttribute[datetime | None], now: datetime
) -> list[int]:
    """Ids of rows whose time has come, leased to this caller for two minutes."""
    async with database.transaction() as session:
        found = await session.scalars(
            select(row).where(due <= now).order_by(due).limit(_BATCH).with_for_update(skip_locked=True)
        )
        claimed = list(found)
        for entry in claimed:
            setattr(entry, due.key, now + _LEASE)
        return [entry.id for entry in claimed]


@dataclass(slots=True)
class Passes:
    """One kind of work since the process began."""

    count: int = 0
    failures: int = 0
    seconds: float = 0.0


class Health:
    """What this process last heard of the pool's own parts; shown by the API and its metrics."""

    def __init__(self) -> None:
        self.dns: str | None = None
        self.ca: str | None = None
        self.work: dict[str, str] = {}  # kinds of work that failed last time, with the error's name
        self.passes: defaultdict[str, Passes] = defaultdict(Passes)
        self.published_at: datetime | None = None
        self.web_certificate_ends_at: datetime | None = None
        self.stopping = asyncio.Event()  # no new work is begun, and the process is not ready


class Worker:
    """All the work of one registry process."""

    def __init__(
        self, database: Database, settings: Settings, roots: Sequence[x509.Certificate], health: Health
    ) -> None:
        self._database = database
        self._settings = settings
        self._roots = roots
        self._health = health
        self._account: AcmeAccount | None = None
        self._epoch: int | None = None
        self._fenced = False
        self._planned: publication.Plan | None = None
        self._reconciled_at: datetime | None = None
        self._account_due: datetime | None = None
        self._account_failures = 0
        self._opening = asyncio.Lock()

    async def run(self) -> None:
        """Work until cancelled, or until the steps under way have ended once the process is stopping."""
        try:
            async with asyncio.TaskGroup() as group:
                for work in (
                    self._prove,
                    self._reconcile,
                    self._begin_orders,
                    self._advance_orders,
                    self._probe,
                    self._remove,
                    self._expire,
                    self._journal,
                ):
                    group.create_task(self._repeat(work))
        finally:
            if self._account is not None:
                self._account.close()

    async def _repeat(self, work: Callable[[datetime], Awaitable[None]]) -> None:
        passes = self._health.passes[work.__name__.strip("_")]
        while not self._health.stopping.is_set():
            began = time.monotonic()
            try:
                await work(datetime.now(UTC))
                self._health.work.pop(work.__name__, None)
            except Exception as error:  # noqa: BLE001 - a task's root: one kind of work must not end the others
                self._health.work[work.__name__] = type(error).__name__
                _log.error("work_failed", work=work.__name__, exc_info=error)
                passes.failures += 1
            passes.count += 1
            passes.seconds += time.monotonic() - began
            if work.__name__ in self._health.work:
                await self._pause(self._settings.policy.step_retry)
            await self._pause(self._settings.policy.tick)

    async def _pause(self, seconds: float) -> None:
        """Sleep, but not beyond the moment at which the process is to stop."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._health.stopping.wait()

    async def _each(self, ids: Sequence[int], work: Callable[[int], Awaitable[None]]) -> None:
        async def one(identifier: int) -> None:
            async with slots:
                await work(identifier)

        # Of this kind of work alone: a slow peer of one kind must not hold up the others.
        slots = asyncio.Semaphore(_CONCURRENCY)

        outcomes = await asyncio.gather(*map(one, ids), return_exceptions=True)
        if failures := [outcome for outcome in outcomes if isinstance(outcome, Exception)]:
            raise ExceptionGroup("pieces of work failed", failures)

    async def _prove(self, now: datetime) -> None:
        ids = await claim(self._database, Address, Address.proof_due_at, now)
        await self._each(ids, lambda row: proofs.prove(self._database, self._settings, row, now))

    async def _probe(self, now: datetime) -> None:
        ids = await claim(self._database, Server, Server.probe_due_at, now)
        await self._each(
            ids,
            lambda row: monitoring.probe_server(self._database, self._settings, self._roots, row, now),
        )

    async def _begin_orders(self, now: datetime) -> None:
        for identifier in await claim(self._database, Server, Server.order_due_at, now):
            async with self._database.transaction() as session:
                issuance.want(await servers.get(session, identifier), now)

    async def _advance_orders(self, now: datetime) -> None:
        account = await self._open_account(now)
        if account is None:
            return
        ids = await claim(self._database, Order, Order.due_at, now)
        await self._each(
            ids, lambda row: issuance.advance(self._database, self._settings, account, row, datetime.now(UTC))
        )

    async def _remove(self, now: datetime) -> None:
        ids = await claim(self._database, Server, Server.removal_due_at, now)
        if not ids:
            return
        account = await self._open_account(now)
        await self._each(
            ids, lambda row: removal.advance(self._database, self._settings, account, row, datetime.now(UTC))
        )

    async def _expire(self, now: datetime) -> None:
        async with self._database.transaction() as session:
            await servers.expire_unfinished(session, self._settings, now)
            await teams.forget_expired(session, now)
            await idempotency.forget_old(session, now)

    async def _journal(self, now: datetime) -> None:
        await journal.write_due(self._database, self._settings, now)

    async def _open_account(self, now: datetime) -> AcmeAccount | None:
        """The registry's account at the CA; None while the CA is out of reach."""
        async with self._opening:
            return await self._opened(now)

    async def _opened(self, now: datetime) -> AcmeAccount | None:
        if self._account is not None and not self._account.lost:
            return self._account
        if self._account_due is not None and now < self._account_due:
            return None
        try:
            account = await AcmeAccount.open(AcmeConfig.of(self._settings.ca))
        except AcmeError as error:
            if self._health.ca is None:
                _log.error("ca_unreachable", code=error.code, detail=error.detail)
            self._health.ca = error.detail
            wait = self._settings.policy.step_retry * 2 ** min(self._account_failures, 8)
            self._account_due = now + timedelta(seconds=max(wait, error.retry_after or 0))
            self._account_failures += 1
            return None
        self._health.ca = self._account_due = None
        self._account_failures = 0
        async with self._database.transaction() as session:
            pool = await servers.the_pool(session, self._settings, lock=True)
            pool.account_uri = account.uri
        if self._account is not None:
            self._account.close()
        self._account = account
        _log.info("acme_account_open", uri=account.uri, at=now.isoformat())
        return account

    async def _reconcile(self, now: datetime) -> None:
        """Publish when the plan has changed, when the last pass failed, and now and then for drift."""
        if self._fenced:
            return
        if await self._is_frozen():
            self._health.dns = "restored and frozen: nothing is published until `poolsvc thaw`"
            return
        made = await publication.plan(self._database, self._settings, now)
        if made is None or not self._is_due(made, now):
            return
        try:
            epoch = await self._new_epoch() if self._epoch is None else self._epoch
            self._epoch = epoch
            everywhere = await publication.publish(self._database, self._settings, made, epoch, now)
        except Fenced as error:
            self._fenced = True
            self._health.dns = str(error)
            _log.error("publisher_fenced", detail=str(error))
        except (PublishError, OSError) as error:
            self._planned = None
            self._health.dns = str(error)
            _log.error("publish_failed", detail=str(error))
            await self._pause(self._settings.policy.step_retry)
        else:
            self._reconciled_at, self._health.dns = now, None
            self._health.published_at = now
            self._planned = made if everywhere else None
            if not everywhere:
                self._health.dns = "not every authoritative server shows the zone"
                await self._pause(self._settings.policy.step_retry)

    async def _is_frozen(self) -> bool:
        async with self._database.transaction() as session:
            return (await servers.the_pool(session, self._settings)).frozen_at is not None

    def _is_due(self, made: publication.Plan, now: datetime) -> bool:
        if self._planned != made or self._reconciled_at is None:
            return True
        return now - self._reconciled_at >= timedelta(seconds=self._settings.policy.reconcile_interval)

    async def _new_epoch(self) -> int:
        """An epoch above all earlier ones: whoever published before cannot any more."""
        async with self._database.transaction() as session:
            pool = await servers.the_pool(session, self._settings, lock=True)
            pool.epoch += 1
            return pool.epoch
