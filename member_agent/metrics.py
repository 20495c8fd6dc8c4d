"""Prometheus metrics of the agent, read from the engine's own counters when somebody asks."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from member_agent.clock import Clock
from member_agent.config import AgentSettings
from member_agent.engines import Engine
from member_agent.engines.builtin import BuiltinEngine
from member_agent.engines.layout import Kind
from member_agent.errors import AgentError, ExitStatus
from member_agent.member import Member
from member_agent.sockets import parse_endpoint
from nts_core import exposition, ntptime
from nts_core.exposition import Families
from nts_core.packet import Leap

# Names, texts and labels of what several engines count.
_KE = ("pool_agent_ke", "NTS-KE connections by outcome.", "outcome")
_NTP = ("pool_agent_ntp", "NTP datagrams by answer, or by why there was none.", "outcome")
_OPENED = (
    "pool_agent_cookies_opened",
    "Cookies of authentic requests by what their key is there for.",
    "key",
)
_SEALED = ("pool_agent_cookies_sealed", "Cookies given to clients.")
# Seconds for which what a daemon said is shown again.
_FRESH = 2.0


def sources(
    engine: Engine, settings: AgentSettings, clock: Clock, members: Callable[[], Iterable[Member]]
) -> Iterator[Families]:
    """All that an agent tells."""
    if isinstance(engine, BuiltinEngine):
        yield engine_families(engine)
    else:
        yield _DaemonFamilies(Kind(engine.name), settings)
    yield partial(clock_families, clock)
    yield lambda: member_families(members())


def engine_families(engine: BuiltinEngine) -> Families:
    """What there is to tell of an engine. It is read in another thread than the engine's, and changes nothing."""

    def families() -> Iterable[Metric]:
        counts = engine.counts
        yield _by_label(_KE, counts.ke)
        yield _by_label(_NTP, counts.ntp)
        yield _by_label(_OPENED, counts.opened)
        totals = (
            (*_SEALED, counts.sealed),
            (
                "pool_agent_rate_forgotten",
                "Token buckets forgotten too early: more addresses than fit the table.",
                counts.forgotten,
            ),
            ("pool_agent_worker_restarts", "Workers that ended and were started again.", engine.restarts),
        )
        for name, text, total in totals:
            yield CounterMetricFamily(name, text, value=total)
        age = engine.clock.now_ns() / 1e9 - engine.keyring.sealing_since
        now = (
            ("pool_agent_ke_connections", "Open NTS-KE connections.", counts.ke_open),
            ("pool_agent_cookie_key_age_seconds", "Since the key that seals cookies began to.", age),
            ("pool_agent_workers", "Processes, or threads of native packets, that serve.", engine.workers),
        )
        for name, text, figure in now:
            yield GaugeMetricFamily(name, text, value=figure)
        kind = GaugeMetricFamily("pool_agent_packets", "1 for what answers.", labels=["engine"])
        kind.add_metric([engine.packets], 1)
        yield kind

    return families


def _by_label(named: tuple[str, str, str], counts: Mapping[str, int]) -> Metric:
    name, text, label = named
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family


class _DaemonFamilies:
    """What a driven daemon has counted, asked when somebody looks: one question at a time, and not twice in a moment."""

    def __init__(self, kind: Kind, settings: AgentSettings) -> None:
        from member_agent.engines.counters import read_counts  # noqa: PLC0415 - where a daemon is driven alone: see `engines.choice`

        self._read = partial(read_counts, kind, settings)
        self._asking = threading.Lock()
        self._families: tuple[Metric, ...] = ()
        self._fresh_until = 0.0

    def __call__(self) -> Iterable[Metric]:
        with self._asking:
            if time.monotonic() >= self._fresh_until:
                counts = asyncio.run(self._read())
                told = ((_KE, counts.ke), (_NTP, counts.ntp))
                found = [_by_label(named, by_outcome) for named, by_outcome in told if by_outcome]
                if counts.sealed is not None:
                    found.append(CounterMetricFamily(*_SEALED, value=counts.sealed))
                self._families, self._fresh_until = tuple(found), time.monotonic() + _FRESH
            return self._families


def clock_families(clock: Clock) -> Iterable[Metric]:
    """What is said of the clock in every answer."""
    said = clock.said_at(clock.now_ns())
    values = {
        "offset_seconds": ("Test option: added to the time served.", clock.offset_ns / 1e9),
        "synchronised": (
            "1 unless the answers say that the clock is not synchronised.",
            said.leap is not Leap.UNSYNCHRONISED,
        ),
        "stratum": ("Stratum in the answers; 16 is not synchronised.", said.stratum),
        "root_delay_seconds": ("Root delay in the answers.", ntptime.short_ns(said.root_delay) / 1e9),
        "root_dispersion_seconds": (
            "Root dispersion in the answers.",
            ntptime.short_ns(said.root_dispersion) / 1e9,
        ),
        "smeared": ("1 while the source of the time says that it smears a leap second.", clock.is_smeared),
    }
    for name, (text, value) in values.items():
        gauge = GaugeMetricFamily(f"pool_agent_clock_{name}", text)
        gauge.add_metric([], value)
        yield gauge


def member_families(members: Iterable[Member]) -> Iterable[Metric]:
    """How it stands with each server of this host."""
    ends = GaugeMetricFamily(
        "pool_agent_certificate_end_seconds",
        "When the installed certificate ends, Unix time.",
        labels=["domain"],
    )
    installs = CounterMetricFamily(
        "pool_agent_certificates_installed", "Certificates installed since the start.", labels=["domain"]
    )
    contact = GaugeMetricFamily(
        "pool_agent_registry_contact_seconds",
        "When the registry last answered, Unix time.",
        labels=["domain"],
    )
    reports = CounterMetricFamily(
        "pool_agent_reports", "Reports to the registry by outcome.", labels=["domain", "outcome"]
    )
    problem = GaugeMetricFamily(
        "pool_agent_problem", "1 while something that the registry wants cannot be done.", labels=["domain"]
    )
    refused = GaugeMetricFamily(
        "pool_agent_registry_refuses", "1 while the registry does not know this agent.", labels=["domain"]
    )
    for member in members:
        labels = [member.me.domain]
        if member.certificate is not None:
            ends.add_metric(labels, member.certificate.not_after.timestamp())
        if member.contact.at is not None:
            contact.add_metric(labels, member.contact.at)
        installs.add_metric(labels, member.installs)
        reports.add_metric([*labels, "answered"], member.contact.answered)
        reports.add_metric([*labels, "failed"], member.contact.failures)
        problem.add_metric(labels, float(member.problem is not None))
        refused.add_metric(labels, float(member.contact.is_refused))
    return [ends, installs, contact, reports, problem, refused]


def expose(text: str, *sources: Families) -> None:
    """Serve /metrics at ADDR:PORT, in a thread of its own. Raises AgentError."""
    endpoint = parse_endpoint(text, "--metrics")
    try:
        exposition.expose(endpoint.address, endpoint.port, *sources)
    except OSError as error:
        raise AgentError(
            f"--metrics {endpoint}: {error.strerror}", "choose another port", ExitStatus.CONFIGURATION
        ) from None
