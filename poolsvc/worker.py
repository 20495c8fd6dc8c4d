"""The registry's engine: finds what is due, takes it under a lease, does it, and records what came of it.

Each kind of work has a due-time column; a claim pushes it ahead by a lease, renewed while the work lasts, so that a
worker that dies leaves its work to whoever looks next. Steps are safe to repeat. A failing peer (CA, DNS, member) delays its own kind of
work only.
"""

import asyncio
import itertools
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import structlog
from cryptography import x509
from sqlalchemy import ColumnElement, Select, select, true, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import InstrumentedAttribute

from poolsvc import (
    addresses,
    alarms,
    authorities,
    disagreements,
    idempotency,
    issuance,
    journal,
    leases,
    local_check,
    maintenance,
    monitoring,
    monitors,
    notices,
    onboarding,
    proofs,
    removal,
    renewals,
    reports,
    reviews,
    samples,
    servers,
    sign_in,
    teams,
    troubles,
)
from poolsvc.config import Settings
from poolsvc.db import LEASE, Database
from poolsvc.deliveries import Post
from poolsvc.derived import RegistryKey
from poolsvc.geo import Geo
from poolsvc.leader import Leader
from poolsvc.models import Address, Channel, Delivery, MaintenanceWindow, Order, Server, Webhook
from poolsvc.outbound import Outbound

_log = structlog.get_logger()
# Renewals within one life: two may fail before the work is anybody's.
_RENEWALS = 3
_HOUSE_KEEPING = timedelta(hours=1)
_FAREWELL = 2.0
# How often orders are looked at for as long after the last one began, in seconds.
_QUICK, _YOUNG = 0.01, 10.0
# How often silent agents are looked for.
_WATCH = timedelta(minutes=1)
# How often it is compared what monitors with a say and others see.
_COMPARE = timedelta(minutes=5)
# How often the outbox of the zone is looked at, in seconds.
_GLANCE = 0.1
_REVIEWED = 20  # servers at once
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Kind:
    """Work that is found by a due-time column: so many rows are claimed at once, so many are worked on at a time.

    `name` is that of the worker's method, which metrics show.
    """

    name: str
    row: type[Any]
    due: InstrumentedAttribute[datetime | None]
    batch: int
    concurrency: int
    only: ColumnElement[bool] = field(default_factory=true)


PROOFS = Kind("prove", Address, Address.proof_due_at, batch=64, concurrency=16)
PROBES = Kind("probe", Server, Server.probe_due_at, batch=192, concurrency=64)
JUDGEMENTS = Kind("judge", Server, Server.judge_due_at, batch=500, concurrency=16)
REVIEWS = Kind("review", Server, Server.review_due_at, batch=200, concurrency=2)
NEW_ORDERS = Kind("begin_orders", Server, Server.order_due_at, batch=200, concurrency=1)
ORDERS = Kind("advance_orders", Order, Order.due_at, batch=50, concurrency=16)
WINDOWS = Kind("maintain", MaintenanceWindow, MaintenanceWindow.due_at, batch=50, concurrency=4)
REMOVALS = Kind("remove", Server, Server.removal_due_at, batch=50, concurrency=16)
MAILS = Kind(
    "mail", Delivery, Delivery.due_at, batch=50, concurrency=16, only=Delivery.channel == Channel.MAIL
)
CALLS = Kind(
    "call_webhooks",
    Delivery,
    Delivery.due_at,
    batch=50,
    concurrency=16,
    only=Delivery.channel == Channel.WEBHOOK,
)
CHALLENGES = Kind("challenge_webhooks", Webhook, Webhook.challenge_due_at, batch=50, concurrency=16)
ENDS = Kind("watch", Order, Order.ending_due_at, batch=200, concurrency=1)
RENEWALS = Kind("ask_renewals", Order, Order.window_due_at, batch=50, concurrency=4)
KINDS = (
    PROOFS,
    PROBES,
    JUDGEMENTS,
    REVIEWS,
    NEW_ORDERS,
    ORDERS,
    WINDOWS,
    REMOVALS,
    MAILS,
    CALLS,
    CHALLENGES,
    ENDS,
    RENEWALS,
)


async def claim(database: Database, kind: Kind, now: datetime) -> list[int]:
    """Ids of rows whose time has come, those due longest, leased to this caller."""
    longest = select(kind.row.id).where(kind.due <= now, kind.only).order_by(kind.due).limit(kind.batch)
    return await _lease(database, kind, longest, now + LEASE)


@asynccontextmanager
async def hold(database: Database, kind: Kind, now: datetime) -> AsyncIterator[list[int]]:
    """Ids of rows claimed as by `claim`, which stay this caller's while the body runs."""
    ids = await claim(database, kind, now)
    renewing = asyncio.create_task(_renew(database, kind, ids, now + LEASE))
    try:
        yield ids
    finally:
        renewing.cancel()
        # Not awaited itself: its end by cancellation would hide that of the body.
        await asyncio.wait({renewing})


async def _renew(database: Database, kind: Kind, ids: Sequence[int], until: datetime) -> None:
    """Push the time of those rows that still have one that was given here; any other one was set by their step."""
    given = [until]
    while ids:
        await asyncio.sleep(LEASE.total_seconds() / _RENEWALS)
        until = datetime.now(UTC) + LEASE
        ours = select(kind.row.id).where(kind.row.id.in_(ids), kind.due.in_(given))
        # Rows that were skipped, or all if this fails, have an older time until the next turn.
        given = [*given[-_RENEWALS:], until]
        try:
            await _lease(database, kind, ours, until)
        except (SQLAlchemyError, OSError) as error:
            _log.warning("lease_not_renewed", work=kind.name, error=type(error).__name__)


async def _lease(database: Database, kind: Kind, rows: Select[tuple[int]], until: datetime) -> list[int]:
    """Give chosen rows their time; one that is locked is passed over, for its step is writing it."""
    # Evaluated once: inside IN, PostgreSQL may run it again and lock more rows than the limit says.
    picked = rows.with_for_update(skip_locked=True).cte("picked")
    async with database.transaction() as session:
        leased = await session.scalars(
            update(kind.row)
            .where(kind.row.id.in_(select(picked.c.id)))
            .values({kind.due.key: until})
            .returning(kind.row.id)
            .execution_options(synchronize_session=False)
        )
        return list(leased)


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
        self.zone: list[str] = []  # what waits for an operator, or was done by somebody else
        self.zone_drift = 0  # RRsets that somebody else changed
        self.zone_held = 0  # RRsets and servers that wait for an operator
        self.geo: str | None = None  # the files that tell where servers are
        self.cas: dict[str, str] = {}  # that are out of reach, with why
        self.ca_faults: dict[str, str] = {}  # what does not keep them from issuing
        self.queue: str | None = None  # for the CA's limits, when it is too long
        self.mail: str | None = None
        self.monitors: str | None = None  # too few to say how servers are
        self.own_monitor: str | None = None  # this process's own clock or network
        self.vigil = disagreements.Vigil()  # what monitors with a say and others see differently
        self.apart: list[str] = []  # of that what has lasted
        self.not_ordered = 0  # servers that showed a certificate which the pool did not order
        self.work: dict[str, str] = {}  # kinds of work that failed last time, with the error's name
        self.passes: defaultdict[str, Passes] = defaultdict(Passes)
        self.published_at: datetime | None = None
        self.web_certificate_ends_at: datetime | None = None
        self.stopping = asyncio.Event()  # no new work is begun, and the process is not ready

    def alarms(self) -> list[str]:
        found = [f"DNS: {self.dns}"] if self.dns else []
        found += [f"DNS: {text}" for text in self.zone]
        found += [f"geo: {self.geo}"] if self.geo else []
        found += [f"CA: {name}: {text}" for name, text in self.cas.items()]
        found += [f"CA settings: {text}" for text in self.ca_faults.values()]
        if self.not_ordered:
            found.append(
                f"certificates: {self.not_ordered} servers showed one that the pool did not order, in a week"
            )
        found += [f"queue: {self.queue}"] if self.queue else []
        found += [f"mail: {self.mail}"] if self.mail else []
        found += [f"monitors: {self.monitors}"] if self.monitors else []
        found += [f"registry: its own clock or network: {self.own_monitor}"] if self.own_monitor else []
        found += [f"monitors: {text}" for text in self.apart]
        return found + [f"worker: {work.strip('_')} failed with {error}" for work, error in self.work.items()]


Work = Callable[[datetime], Awaitable[bool]]
"""One look for work of one kind; whether more of it is due at once."""


class Worker:
    """All the work of one registry process."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        roots: Sequence[x509.Certificate],
        health: Health,
        key: RegistryKey,
    ) -> None:
        self._database = database
        self._settings = settings
        self._roots = roots
        self._health = health
        self._authorities = authorities.Authorities(database, settings, health.cas, health.ca_faults)
        self._holder = leases.new_holder()
        self._leader = Leader(database, settings, self._holder)
        self._reported: list[str] | None = None
        self._reported_at: datetime | None = None
        self._house_kept_at: datetime | None = None
        self._key = key
        self._geo = Geo(settings.geo.database)
        self._local = local_check.LocalCheck(database, settings, roots)
        self._post = Post(database, settings, key, Outbound(settings))
        self._watched_at: datetime | None = None
        self._compared_at: datetime | None = None
        self._quick_until = 0.0
        self._queue_seen_at: datetime | None = None

    async def run(self) -> None:
        """Work until cancelled, or until the steps under way have ended once the process is stopping."""
        try:
            async with asyncio.TaskGroup() as group:
                for work in (
                    self._prove,
                    self._reconcile,
                    self._begin_orders,
                    *itertools.starmap(self._orders_at, issuance.shares_of(self._settings)),
                    self._ask_renewals,
                    self._keep_accounts,
                    self._check_locally,
                    self._probe,
                    self._judge,
                    self._review,
                    self._remove,
                    self._maintain,
                    self._expire,
                    self._journal,
                    self._keep_house,
                    self._report,
                    self._mail,
                    self._call_webhooks,
                    self._challenge_webhooks,
                    self._watch,
                ):
                    group.create_task(self._repeat(work))
        finally:
            self._authorities.close()
            await self._resign()

    async def _resign(self) -> None:
        """Others need not wait until it is clear that this process has ended."""
        try:
            async with asyncio.timeout(_FAREWELL):
                await self._leader.stop()
                async with self._database.transaction() as session:
                    await alarms.resign(session, self._holder)
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            _log.warning("worker_ends_untold", error=type(error).__name__)

    async def _repeat(self, work: Work) -> None:
        passes = self._health.passes[work.__name__.strip("_")]
        while not self._health.stopping.is_set():
            began, is_more = time.monotonic(), False
            try:
                is_more = await work(datetime.now(UTC))
                self._health.work.pop(work.__name__, None)
            except Exception as error:  # noqa: BLE001 - a task's root: one kind of work must not end the others
                self._health.work[work.__name__] = type(error).__name__
                _log.error("work_failed", work=work.__name__, exc_info=error)
                passes.failures += 1
            passes.count += 1
            passes.seconds += time.monotonic() - began
            if work.__name__ in self._health.work:
                await self._pause(self._settings.policy.step_retry)
            if not is_more:
                await self._pause(self._until_next(work))

    def _until_next(self, work: Work) -> float:
        """Seconds between two looks for the same work: hardly any while an order of ours is young.

        The leader looks for what others changed, which costs it one small query; the rest of it has its own time.
        """
        if work == self._reconcile:
            return min(_GLANCE, self._settings.policy.tick)
        is_quick = work.__name__.startswith(ORDERS.name) and time.monotonic() < self._quick_until
        return min(_QUICK, self._settings.policy.tick) if is_quick else self._settings.policy.tick

    async def _pause(self, seconds: float) -> None:
        """Sleep, but not beyond the moment at which the process is to stop."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._health.stopping.wait()

    async def _take(self, kind: Kind, now: datetime, work: Callable[[int], Awaitable[None]]) -> bool:
        """Do what is due of one kind; whether there may be more."""
        async with hold(self._database, kind, now) as ids:
            await self._each(ids, work, kind.concurrency)
        return len(ids) == kind.batch

    async def _each(
        self, pieces: Sequence[_T], work: Callable[[_T], Awaitable[None]], concurrency: int
    ) -> None:
        async def one(piece: _T) -> None:
            async with slots:
                await work(piece)

        # Of this kind of work alone: a slow peer of one kind must not hold up the others.
        slots = asyncio.Semaphore(concurrency)

        outcomes = await asyncio.gather(*map(one, pieces), return_exceptions=True)
        if failures := [outcome for outcome in outcomes if isinstance(outcome, Exception)]:
            raise ExceptionGroup("pieces of work failed", failures)

    async def _prove(self, now: datetime) -> bool:
        return await self._take(
            PROOFS, now, lambda row: proofs.prove(self._database, self._settings, row, now)
        )

    async def _check_locally(self, _now: datetime) -> bool:
        """Look whether what this process sees may be the servers' doing, and let count what waited for that."""
        try:
            await self._local.look()
            await monitoring.settle(self._database, self._settings, self._local.rounds, time.monotonic())
        finally:
            self._health.own_monitor = self._local.alarm
        return False

    async def _probe(self, now: datetime) -> bool:
        if not self._local.may_probe:
            return False
        async with self._database.transaction() as session:
            if (await monitors.inner(session)).status not in monitors.WORKING:
                return False
        return await self._take(
            PROBES,
            now,
            lambda row: monitoring.probe_server(
                self._database, self._settings, self._roots, row, now, self._local.rounds
            ),
        )

    async def _judge(self, now: datetime) -> bool:
        async with hold(self._database, JUDGEMENTS, now) as ids:
            left = await reports.settle_due(self._database, self._settings, ids, now) if ids else []
            await self._each(
                left,
                lambda row: monitoring.judge_due(self._database, self._settings, row, now),
                JUDGEMENTS.concurrency,
            )
        return len(ids) == JUDGEMENTS.batch

    async def _review(self, now: datetime) -> bool:
        async with hold(self._database, REVIEWS, now) as ids:
            await self._each(
                [sorted(ids)[first : first + _REVIEWED] for first in range(0, len(ids), _REVIEWED)],
                lambda some: reviews.review_due(self._database, self._settings, self._key, some, now),
                REVIEWS.concurrency,
            )
        return len(ids) == REVIEWS.batch

    async def _begin_orders(self, now: datetime) -> bool:
        is_look = self._queue_seen_at is None or now - self._queue_seen_at >= onboarding.LOOK
        async with hold(self._database, NEW_ORDERS, now) as ids:
            if ids or is_look:
                async with self._database.transaction() as session:
                    for server in await onboarding.admit(session, self._settings, ids, now):
                        issuance.want(server, now)
                        self._quick_until = time.monotonic() + _YOUNG
                self._queue_seen_at = now
        return len(ids) == NEW_ORDERS.batch

    def _orders_at(self, ca: str, share: ColumnElement[bool]) -> Work:
        """The orders of one CA: another one that does not answer must not hold them up."""

        async def advance_orders(now: datetime) -> bool:
            return await self._advance_orders(replace(ORDERS, only=share), now)

        if ca != self._settings.ca.name:
            advance_orders.__name__ += f" at {ca}"
        return advance_orders

    async def _advance_orders(self, kind: Kind, now: datetime) -> bool:
        async def advance(order_id: int) -> None:
            accounts = self._authorities.account
            await issuance.advance(self._database, self._settings, accounts, order_id, datetime.now(UTC))

        return await self._take(kind, now, advance)

    async def _ask_renewals(self, now: datetime) -> bool:
        async def ask(order_id: int) -> None:
            accounts = self._authorities.account
            await renewals.ask(self._database, self._settings, accounts, order_id, datetime.now(UTC))

        return await self._take(RENEWALS, now, ask)

    async def _keep_accounts(self, now: datetime) -> bool:
        await self._authorities.keep(now)
        return False

    async def _remove(self, now: datetime) -> bool:
        async def advance(server_id: int) -> None:
            accounts = self._authorities.account
            await removal.advance(self._database, self._settings, accounts, server_id, datetime.now(UTC))

        return await self._take(REMOVALS, now, advance)

    async def _maintain(self, now: datetime) -> bool:
        return await self._take(WINDOWS, now, lambda row: maintenance.turn(self._database, row, now))

    async def _expire(self, now: datetime) -> bool:
        async with self._database.transaction() as session:
            await teams.forget_expired(session, now)
            await idempotency.forget_old(session, now)
            await sign_in.expire(session, now)
            return await servers.expire_unfinished(session, self._settings, now)

    async def _keep_house(self, now: datetime) -> bool:
        if self._house_kept_at is not None and now - self._house_kept_at < _HOUSE_KEEPING:
            return False
        await addresses.withdraw_stale(self._database, self._settings, now)
        more_dead = await removal.bury_the_dead(self._database, now)
        more_samples = await samples.keep_house(self._database, self._settings, now)
        async with self._database.transaction() as session:
            more_notices = await notices.forget_old(session, self._settings, now)
        is_more = more_dead or more_samples or more_notices
        self._house_kept_at = None if is_more else now
        return is_more

    async def _report(self, now: datetime) -> bool:
        """Let every process show what this one sees."""
        seen = self._health.alarms()
        is_old = self._reported_at is None or now - self._reported_at >= alarms.REPORT_EVERY
        if is_old or seen != self._reported:
            async with self._database.transaction() as session:
                await alarms.report(session, self._holder, seen, now)
            self._reported, self._reported_at = seen, now
        return False

    async def _journal(self, now: datetime) -> bool:
        return await journal.write_due(self._database, self._settings, now)

    async def _mail(self, now: datetime) -> bool:
        async with hold(self._database, MAILS, now) as ids:
            if ids:
                letters = await self._post.letters(ids, now)
                await self._each(letters, lambda letter: self._post.send(letter, now), MAILS.concurrency)
                self._health.mail = self._post.trouble
        return len(ids) == MAILS.batch

    async def _call_webhooks(self, now: datetime) -> bool:
        async with hold(self._database, CALLS, now) as ids:
            if ids:
                calls = await self._post.calls(ids)
                await self._each(calls, lambda some: self._post.call(some, now), CALLS.concurrency)
        return len(ids) == CALLS.batch

    async def _challenge_webhooks(self, now: datetime) -> bool:
        return await self._take(CHALLENGES, now, lambda row: self._post.challenge(row, now))

    async def _watch(self, now: datetime) -> bool:
        """Tell of trouble that nothing but time shows."""

        async def tell(order_id: int) -> None:
            async with self._database.transaction() as session:
                await troubles.tell_end(session, order_id, now)

        is_more = await self._take(ENDS, now, tell)
        if self._watched_at is None or now - self._watched_at >= _WATCH:
            async with self._database.transaction() as session:
                more_silent = await troubles.tell_silence(session, now)
                self._health.not_ordered = await troubles.count_not_ordered(session, now)
                queue = await onboarding.queue(session)
                await monitors.raise_quorum(session, self._settings, now)
                standing = await monitors.council(session, self._settings, now)
                self._health.monitors = monitors.alarm(
                    standing,
                    await monitors.count_unknown(session),
                    await monitors.count_amiss(session, standing, now),
                )
            if self._settings.geo.database:
                await monitors.place(self._database, self._geo)
            self._health.queue = onboarding.alarm(self._settings, queue, now)
            self._watched_at = None if more_silent else now
        if self._compared_at is None or now - self._compared_at >= _COMPARE:
            async with self._database.transaction() as session:
                self._health.vigil.note(await disagreements.look(session, self._settings, now), now)
            self._health.apart = self._health.vigil.alarms(now)
            self._compared_at = now
        return is_more

    async def _reconcile(self, now: datetime) -> bool:
        try:
            return await self._leader.step(now)
        finally:
            self._health.dns = self._leader.alarm
            self._health.zone = list(self._leader.warnings(now))
            self._health.zone_drift = self._leader.drifted
            question = self._leader.question
            self._health.zone_held = len(question.changes) + len(question.kept)
            self._health.geo = self._leader.geo_alarm
            self._health.published_at = self._leader.published_at
