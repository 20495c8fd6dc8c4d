"""A monitor at work (I/O): loops that never wait for each other, and one registry.

The local check says whether anything counts; work is asked for; probes begin when they are due; what was found is told. A
registry that is down stops none of the others.
"""

import asyncio
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from ipaddress import ip_address
from random import SystemRandom

import structlog
from cryptography import x509
from cryptography.x509.verification import Store
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from nts_core.client import load_roots
from nts_core.control import MonitorReport, MonitorTask, MonitorWork, ProbeResult
from nts_core.errors import printable
from nts_core.shell import until
from nts_core.systemd import Notifier
from nts_core.tls import Trust
from poolsvc.config import EndpointText, split_endpoint
from poolsvc.errors import InvalidAddress
from poolsvc.lookups import Nameservers
from poolsvc.monitor.outbox import Begun, Drop, Outbox
from poolsvc.monitor.references import References
from poolsvc.monitor.schedule import Schedule, Skip
from poolsvc.monitor.settings import MonitorSettings
from poolsvc.monitor.soundness import Reading, Soundness, agrees
from poolsvc.monitor.uplink import Uplink, UplinkError
from poolsvc.names import check_address
from poolsvc.prober import ProbeImpossible, probe, settled

_log = structlog.get_logger()
# Nobody is to know a monitor by its hour.
_RANDOM = SystemRandom()
_PROGRAM = f"poolsvc-monitor {version('truechimer')}"
# Seconds. What a registry asks for is kept within these.
_LEAST_POLL, _MOST_POLL, _MOST_SPACING = 0.05, 600.0, 60.0
_BACK_OFF, _MOST_BACK_OFF = 5.0, 300.0
# A monitor with nothing to tell says so as often.
_HEARTBEAT = 60.0
# While the local check fails, it is made as often at least.
_RECHECK = 15.0
_LAST_WORDS = 5.0
# A loop that was late by so much may have missed answers: what failed meanwhile says nothing.
_PULSE, _LAG = 0.1, 0.5
_MAX_NAMESERVERS = 32
_MAX_SAMPLES = 2000
_MAX_OWN = 64


class PublicOnly:
    """A guard that knows no pool: whatever a registry says, only the Internet's own addresses are dialled."""

    def __init__(self, *, allow_private: bool) -> None:
        self._allow_private = allow_private

    def check(self, text: str, *_ports: int) -> None:
        """Raises InvalidAddress."""
        check_address(text, allow_private=self._allow_private)


class Monitor:
    """One vantage point. `soundness` is None before the first local check."""

    def __init__(self, settings: MonitorSettings, uplink: Uplink, roots: list[x509.Certificate]) -> None:
        self._settings = settings
        self._uplink = uplink
        self._store = Store(roots)
        self._references = References(settings.parsed_references, roots, settings.versions)
        self._guard = PublicOnly(allow_private=settings.allow_private_addresses)
        self._schedule = Schedule(
            at_once=settings.probes_at_once,
            jitter=settings.jitter,
            lateness=settings.lateness,
            random=_RANDOM,
        )
        self._outbox = Outbox()
        self._work: MonitorWork | None = None
        self._nameservers = Nameservers(())
        self._asked: tuple[str, ...] = ()
        self._ended: Counter[str] = Counter()
        self._requests: Counter[tuple[str, str]] = Counter()
        self._sequence = time.time_ns() // 1000
        self._told = 0
        self._lagged_at = -math.inf
        self._is_planned = asyncio.Event()
        self._is_judged = asyncio.Event()
        self.soundness: Soundness | None = None

    async def run(self, stop: asyncio.Event, ready: Callable[[], None] = lambda: None) -> None:
        """Until `stop`. What is known to be good by then is told, if the registry takes it at once."""
        loops = (self._check(), self._ask(), self._probe_all(), self._tell(), self._feel_pulse())
        tasks = [asyncio.create_task(loop) for loop in loops]
        ready()
        await until(stop, *tasks)
        with suppress(UplinkError, TimeoutError):
            async with asyncio.timeout(_LAST_WORDS):
                while self._outbox.has_ready and self._is_sound:
                    await self._report()

    @property
    def _is_sound(self) -> bool:
        return self.soundness is not None and self.soundness.is_sound

    # The local check

    async def _check(self) -> None:
        while True:
            began = time.monotonic()
            found = agrees(await self._references.read(), self._references.names)
            self._outbox.check(found, began)
            before, self.soundness = self.soundness, found
            if before is None or before.is_sound != found.is_sound:
                log = _log.info if found.is_sound else _log.warning
                log(
                    "local_check", sound=found.is_sound, detail=found.detail, ipv4=found.ipv4, ipv6=found.ipv6
                )
            self._is_judged.set()
            pause = self._settings.check_interval
            await asyncio.sleep(_about(pause if found.is_sound else min(pause, _RECHECK)))

    # Work

    async def _ask(self) -> None:
        failures = 0
        while True:
            try:
                work = await self._uplink.work()
            except UplinkError as error:
                self._requests["work", "failed"] += 1
                if not failures:
                    _log.warning("work_not_had", detail=str(error))
                failures += 1
                await asyncio.sleep(_wait(failures, error))
                continue
            self._requests["work", "answered"] += 1
            if failures:
                _log.info("work_had_again")
            failures = 0
            self._take(work)
            await asyncio.sleep(_about(_within(work.poll_after, _LEAST_POLL, _MOST_POLL)))

    def _take(self, work: MonitorWork) -> None:
        before, self._work = self._work, work
        if before is None or (before.status, before.reason) != (work.status, work.reason):
            _log.info("status", pool=work.pool, monitor=work.monitor, status=work.status, reason=work.reason)
        if work.nameservers != self._asked:
            self._asked = work.nameservers
            self._nameservers = Nameservers(list(self._usable(work.nameservers)))
        if not work.tasks and work.reason:
            self._schedule.clear()
        self._schedule.take(work.tasks, time.monotonic())
        self._is_planned.set()

    def _usable(self, nameservers: Iterable[str]) -> Iterable[tuple[str, int]]:
        for endpoint in tuple(nameservers)[:_MAX_NAMESERVERS]:
            try:
                host, port = split_endpoint(endpoint)
                self._guard.check(host)
            except (InvalidAddress, ValueError):
                _log.warning("nameserver_not_asked", nameserver=printable(endpoint, 60))
                continue
            if ip_address(host).version in self._settings.versions:
                yield host, port

    # Probes

    async def _probe_all(self) -> None:
        # Nothing that is found before the first check could be told.
        await self._is_judged.wait()
        async with asyncio.TaskGroup() as probes:
            while True:
                self._is_planned.clear()
                for task in self._schedule.due(time.monotonic()):
                    begun = self._begin(task)
                    if begun is None:
                        self._schedule.end(task)
                    else:
                        probes.create_task(self._probe(begun))
                at = self._schedule.next_at()
                pause = None if at is None else max(0.001, at - time.monotonic())
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._is_planned.wait()

    def _begin(self, task: MonitorTask) -> Begun | None:
        """A probe that may begin now, or why not in the counters."""
        try:
            self._guard.check(task.address)
        except InvalidAddress:
            self._schedule.skip(Skip.REFUSED)
            return None
        version = ip_address(task.address).version
        if version not in self._settings.versions:
            self._schedule.skip(Skip.FAMILY)
        elif self.soundness is None or not self.soundness.holds(version):
            self._schedule.skip(Skip.UNSOUND)
        else:
            return self._outbox.begin(task, time.monotonic())
        return None

    async def _probe(self, begun: Begun) -> None:
        task, work = begun.task, self._work
        assert work is not None
        try:
            result = await settled(
                probe(
                    task.domain,
                    task.address,
                    work.ke_port,
                    Trust(self._store, datetime.now(UTC)),
                    own_addresses=frozenset(task.own_addresses[:_MAX_OWN]),
                    guard=self._guard,
                    is_own=task.own_account,
                    names=self._nameservers,
                    spacing=_within(task.spacing, 0.0, _MOST_SPACING),
                ),
                task.domain,
                task.address,
            )
        except ProbeImpossible as error:
            self._ended["impossible"] += 1
            _log.error("probe_impossible", domain=task.domain, detail=str(error))
        else:
            if result.failed is not None and self._lagged_at >= begun.at:
                self._ended["overloaded"] += 1
                return
            self._ended[_outcome(result)] += 1
            self._outbox.add(begun, result, time.monotonic())
        finally:
            self._schedule.end(task)

    async def _feel_pulse(self) -> None:
        """Notice when this process, or the host, has too much to do."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(_PULSE)
            now = time.monotonic()
            if now - before > _PULSE + _LAG:
                self._lagged_at = now

    # Reports

    async def _tell(self) -> None:
        failures, last = 0, -math.inf
        said: tuple[bool, bool, bool] | None = None
        await self._is_judged.wait()
        while True:
            found = self.soundness
            assert found is not None
            now_said = found.is_sound, found.ipv4, found.ipv6
            is_due = now_said != said or time.monotonic() - last >= _HEARTBEAT
            if not is_due and not (found.is_sound and self._outbox.has_ready):
                await asyncio.sleep(self._settings.report_interval)
                continue
            try:
                has_more = await self._report()
            except UplinkError as error:
                self._requests["report", "failed"] += 1
                if not failures:
                    _log.warning("report_not_sent", detail=str(error))
                failures += 1
                if error.is_useless:
                    self._outbox.give_up(Drop.REFUSED)
                await asyncio.sleep(_wait(failures, error))
                continue
            if failures:
                _log.info("report_sent_again")
            failures, last, said = 0, time.monotonic(), now_said
            if not has_more:
                await asyncio.sleep(_about(self._settings.report_interval))

    async def _report(self) -> bool:
        """Send one report; whether there is more to tell. Raises UplinkError."""
        found = self.soundness
        most = self._work.max_samples if self._work else 1
        limit = int(_within(most, 1, _MAX_SAMPLES))
        if not self._is_sound:
            # Who is not sound tells nothing, and a report between would let the repeated one count twice, or not at all.
            self._outbox.give_up(Drop.UNSOUND)
        # A report that is repeated keeps its number.
        if not self._outbox.is_repeating:
            self._sequence += 1
        samples = self._outbox.batch(limit, time.monotonic()) if self._is_sound else ()
        lost = self._lost
        report = MonitorReport(
            sequence=self._sequence,
            sound=None if found is None else found.is_sound,
            detail="" if found is None else found.detail,
            ipv4=found is not None and found.ipv4,
            ipv6=found is not None and found.ipv6,
            samples=samples,
            dropped=lost - self._told,
            program=_PROGRAM,
        )
        await self._uplink.report(report)
        self._requests["report", "answered"] += 1
        self._told = lost
        self._outbox.taken()
        return self._is_sound and self._outbox.has_ready

    @property
    def _lost(self) -> int:
        """Probes of which nothing is told."""
        return (
            sum(self._schedule.skipped.values())
            + sum(self._outbox.dropped.values())
            + self._ended["impossible"]
            + self._ended["overloaded"]
        )

    # Metrics

    def families(self) -> Iterable[Metric]:
        """What Prometheus reads, in another thread."""
        for name, text, counts in (
            ("probes", "Probes by the stage that failed first, or ok, impossible, overloaded.", self._ended),
            ("skipped", "Probes that did not begin, by reason.", self._schedule.skipped),
            ("dropped", "Results of which nothing is told, by reason.", self._outbox.dropped),
        ):
            counter = CounterMetricFamily(f"pool_monitor_{name}", text, labels=["outcome"])
            for label, count in tuple(counts.items()):
                counter.add_metric([label], count)
            yield counter
        requests = CounterMetricFamily(
            "pool_monitor_requests", "Requests to the registry.", labels=["kind", "outcome"]
        )
        for labels, count in tuple(self._requests.items()):
            requests.add_metric(labels, count)
        yield requests
        sound = self.soundness
        for name, text, value in (
            ("under_way", "Probes under way.", self._schedule.under_way),
            ("planned", "Probes that wait for their time.", self._schedule.planned),
            ("waiting", "Results that wait for the local check or for the registry.", len(self._outbox)),
            ("sound", "1 while the local check is good.", float(self._is_sound)),
            ("agreeing", "References that agree with this host's clock.", sound.agreeing if sound else 0),
            ("ipv4", "1 while the check is good by IPv4.", float(sound is not None and sound.holds(4))),
            ("ipv6", "1 while the check is good by IPv6.", float(sound is not None and sound.holds(6))),
            ("nameservers_silent", "Nameservers that did not answer last.", self._nameservers.resting),
        ):
            yield GaugeMetricFamily(f"pool_monitor_{name}", text, value)


def _outcome(result: ProbeResult) -> str:
    return "ok" if result.failed is None else result.failed.value


def _about(seconds: float) -> float:
    """Give or take a tenth: many monitors must not come at once."""
    return seconds * _RANDOM.uniform(0.9, 1.1)


def _within(value: float, least: float, most: float) -> float:
    return min(max(value, least), most) if math.isfinite(value) else most


def _wait(failures: int, error: UplinkError) -> float:
    """Before the registry is asked again: as it says, or longer each time."""
    if error.retry_after is not None:
        return _about(_within(error.retry_after, 1.0, _MOST_BACK_OFF) * 1.1)
    return _about(min(_BACK_OFF * 2.0 ** min(failures - 1, 16), _MOST_BACK_OFF))


async def run(
    settings: MonitorSettings, uplink: Uplink, expose: Callable[[EndpointText, Monitor], None]
) -> None:
    """A monitor until SIGTERM or SIGINT. Raises ClientError for roots that cannot be used."""
    monitor = Monitor(settings, uplink, load_roots(settings.roots_file))
    if settings.metrics is not None:
        expose(settings.metrics, monitor)
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with Notifier() as notify:
        await monitor.run(stop, lambda: notify.ready(f"for {settings.registry}"))
    uplink.close()


async def check(settings: MonitorSettings) -> tuple[list[Reading], Soundness]:
    """One local check. Raises ClientError for roots that cannot be used."""
    references = References(settings.parsed_references, load_roots(settings.roots_file), settings.versions)
    readings = await references.read()
    return readings, agrees(readings, references.names)
