"""All that Prometheus can read of the registry: counted here for requests, read from their owners for the rest."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from sqlalchemy import QueuePool, func, select, true
from sqlalchemy.exc import SQLAlchemyError

from nts_core.control import ServerState
from nts_core.exposition import Collected
from poolsvc import monitors, onboarding
from poolsvc.config import Settings
from poolsvc.db import Database
from poolsvc.listener import Listeners
from poolsvc.models import Monitor, Server
from poolsvc.monitors import Council
from poolsvc.pool import count_by_state
from poolsvc.readiness import Look
from poolsvc.worker import KINDS, Health

# How old the figures of the database may be, in seconds.
_KEEP = 15.0
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# Under the names of the passes; the journal has no Kind, since one process writes all that is due.
_DUE = {kind.name: (kind.due, kind.only) for kind in KINDS} | {"journal": (Server.journal_due_at, true())}


@dataclass(frozen=True, slots=True)
class _Figures:
    """What the database says.

    For each kind of work how many rows are due and since when; who waits for the CA's limits; servers by state; monitors,
    who of them has a say, and addresses that they do not know.
    """

    due: dict[str, tuple[int, datetime | None]]
    queue: onboarding.Queue
    servers: dict[ServerState, int]
    monitors: Sequence[Monitor]
    standing: Council
    unknown: int


class Metrics:
    """The figures of one process."""

    def __init__(self, database: Database, settings: Settings, health: Health) -> None:
        self.health = health
        self._settings = settings
        self._listeners: dict[str, Listeners] = {}
        self._database = database
        self._registry = CollectorRegistry(auto_describe=False)
        self._requests = Counter(
            "poolsvc_requests",
            "Requests by method, route and status.",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "poolsvc_request_seconds",
            "From a request's head to its answer.",
            ("route",),
            registry=self._registry,
        )
        self._look = Look(self._ask, keep=_KEEP)
        self._figures: _Figures | None = None
        self._registry.register(Collected(self._families))

    def add_listeners(self, service: str, listeners: Listeners) -> None:
        """Show the connections of one more service."""
        self._listeners[service] = listeners

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request. Words of strangers become no labels."""
        method = method if method in _METHODS else "other"
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    async def render(self) -> bytes:
        """The text that Prometheus reads; without the database's figures while it does not answer."""
        try:
            self._figures = await self._look.answer()
        except (SQLAlchemyError, OSError):  # TimeoutError is one
            self._figures = None
        return generate_latest(self._registry)

    async def close(self) -> None:
        await self._look.close()

    async def _ask(self) -> _Figures:
        now = datetime.now(UTC)
        async with self._database.transaction() as session:
            due = {}
            for kind, (column, only) in _DUE.items():
                found = select(func.count(), func.min(column)).where(column <= now, only)
                rows, oldest = (await session.execute(found)).one()
                due[kind] = (rows, oldest)
            return _Figures(
                due,
                await onboarding.queue(session),
                await count_by_state(session),
                await monitors.living(session),
                await monitors.council(session, self._settings, now),
                await monitors.count_unknown(session),
            )

    def _families(self) -> Iterable[Metric]:
        now = datetime.now(UTC)
        yield from self._of_worker()
        yield self._of_vigil()
        yield from self._of_database(now)
        yield from self._of_listeners()
        health = self.health
        up = GaugeMetricFamily("poolsvc_up", "1 unless this part of the pool fails.", labels=["part"])
        up.add_metric(["ca"], not health.cas)
        up.add_metric(["dns"], health.dns is None)
        up.add_metric(["mail"], health.mail is None)
        up.add_metric(["database"], self._figures is not None)
        yield up
        yield CounterMetricFamily(
            "poolsvc_zone_drift", "RRsets of the zone that somebody else changed.", health.zone_drift
        )
        yield GaugeMetricFamily(
            "poolsvc_zone_held",
            "RRsets and SRV targets whose change waits for an operator.",
            health.zone_held,
        )
        for name, text, moment in (
            ("publish_age", "Since the zone was last published.", health.published_at),
            (
                "web_certificate_age",
                "Since the API's certificate ended; negative before.",
                health.web_certificate_ends_at,
            ),
        ):
            if moment is not None:
                yield GaugeMetricFamily(f"poolsvc_{name}_seconds", text, (now - moment).total_seconds())

    def _of_vigil(self) -> Metric:
        apart = GaugeMetricFamily(
            "poolsvc_disagreements",
            "Servers that are so for monitors with a say, and the contrary for others.",
            labels=["verdict"],
        )
        apart.add_metric(["good"], self.health.vigil.count(is_good=True))
        apart.add_metric(["bad"], self.health.vigil.count(is_good=False))
        return apart

    def _of_worker(self) -> Iterable[Metric]:
        passes = CounterMetricFamily("poolsvc_passes", "Passes of the worker.", labels=["kind"])
        failures = CounterMetricFamily("poolsvc_pass_failures", "Passes that failed.", labels=["kind"])
        seconds = CounterMetricFamily("poolsvc_pass_seconds", "Time that passes took.", labels=["kind"])
        for kind, of_kind in self.health.passes.items():
            passes.add_metric([kind], of_kind.count)
            failures.add_metric([kind], of_kind.failures)
            seconds.add_metric([kind], of_kind.seconds)
        return [passes, failures, seconds]

    def _of_database(self, now: datetime) -> Iterable[Metric]:
        pool = self._database.engine.pool
        if isinstance(pool, QueuePool):
            yield GaugeMetricFamily(
                "poolsvc_database_connections", "Connections to the database in use.", pool.checkedout()
            )
        if self._figures is None:
            return
        rows = GaugeMetricFamily("poolsvc_due", "Rows whose time has come.", labels=["kind"])
        age = GaugeMetricFamily("poolsvc_due_age_seconds", "How late the oldest of them is.", labels=["kind"])
        for kind, (count, oldest) in self._figures.due.items():
            rows.add_metric([kind], count)
            age.add_metric([kind], (now - oldest).total_seconds() if oldest else 0)
        states = GaugeMetricFamily("poolsvc_servers", "Servers by state.", labels=["state"])
        for state in ServerState:
            states.add_metric([state], self._figures.servers.get(state, 0))
        yield from (rows, age, states)
        yield from self._of_monitors(self._figures, now)
        queue = self._figures.queue
        yield GaugeMetricFamily("poolsvc_queue", "Servers that wait for the CA's limits.", queue.waiting)
        yield GaugeMetricFamily(
            "poolsvc_queue_wait_seconds",
            "Until the last of them has its turn, as things stand.",
            queue.wait(now).total_seconds(),
        )

    @staticmethod
    def _of_monitors(figures: _Figures, now: datetime) -> Iterable[Metric]:
        seen = GaugeMetricFamily(
            "poolsvc_monitor_seen_age_seconds", "Since a monitor was last heard of.", labels=["monitor"]
        )
        sound = GaugeMetricFamily(
            "poolsvc_monitor_sound", "1 if its own check of clock and network is good.", labels=["monitor"]
        )
        taken = CounterMetricFamily("poolsvc_monitor_samples", "Samples that counted.", labels=["monitor"])
        for monitor in figures.monitors:
            if monitor.seen_at is not None:
                seen.add_metric([monitor.name], (now - monitor.seen_at).total_seconds())
            sound.add_metric([monitor.name], monitors.is_sound(monitor))
            taken.add_metric([monitor.name], monitor.samples)
        yield from (seen, sound, taken)
        yield GaugeMetricFamily(
            "poolsvc_quorum", "Monitors that have to agree.", figures.standing.quorum.number
        )
        yield GaugeMetricFamily(
            "poolsvc_monitors_heard", "Monitors with a say that are heard.", figures.standing.heard
        )
        yield GaugeMetricFamily(
            "poolsvc_unknown_addresses", "Addresses that too few monitors know.", figures.unknown
        )

    def _of_listeners(self) -> Iterable[Metric]:
        open_now = GaugeMetricFamily("poolsvc_connections", "Open connections.", labels=["service"])
        ended = CounterMetricFamily(
            "poolsvc_connections_ended", "Connections refused or ended early.", labels=["service", "reason"]
        )
        for service, listeners in self._listeners.items():
            open_now.add_metric([service], listeners.connections)
            for reason, count in listeners.counters.items():
                ended.add_metric([service, reason], count)
        return [open_now, ended]
