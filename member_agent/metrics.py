"""Prometheus metrics of the agent, read from the engine's own counters when somebody asks."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from member_agent.clock import Clock
from member_agent.engines.builtin import BuiltinEngine
from member_agent.errors import AgentError, ExitStatus
from member_agent.sockets import parse_endpoint
from nts_core import ntptime
from nts_core.packet import Leap

Families = Callable[[], Iterable[Metric]]


class _EngineCollector(Collector):
    def __init__(self, families: Families) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families()


def engine_families(engine: BuiltinEngine) -> Families:
    """What there is to tell of an engine. It is read in another thread than the engine's, and changes nothing."""

    def families() -> Iterable[Metric]:
        ke = CounterMetricFamily("pool_agent_ke", "Key establishments by outcome.", labels=["outcome"])
        for outcome, count in tuple(engine.ke.counters.items()):
            ke.add_metric([outcome], count)
        ntp = CounterMetricFamily("pool_agent_ntp", "NTP datagrams by outcome.", labels=["outcome"])
        for outcome, count in tuple(engine.ntp.counters.items()):
            ntp.add_metric([outcome], count)
        forgotten = CounterMetricFamily(
            "pool_agent_rate_forgotten",
            "Token buckets forgotten too early: more addresses than fit the table.",
        )
        forgotten.add_metric([], engine.ntp.admission.forgotten if engine.ntp.admission else 0)
        open_now = GaugeMetricFamily("pool_agent_ke_connections", "Open NTS-KE connections.")
        open_now.add_metric([], engine.ke.slots.taken)
        offset = GaugeMetricFamily(
            "pool_agent_clock_offset_seconds", "Test option: added to the time served."
        )
        offset.add_metric([], engine.clock.offset_ns / 1e9)
        return [ke, ntp, forgotten, open_now, offset, *_clock_families(engine.clock)]

    return families


def _clock_families(clock: Clock) -> Iterable[Metric]:
    """What is said of the clock in every answer."""
    said = clock.said_at(clock.now_ns())
    values = {
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


def expose(text: str | None, families: Families) -> None:
    """Serve /metrics at ADDR:PORT, in a thread of its own; nothing without one. Raises AgentError."""
    if text is None:
        return
    endpoint = parse_endpoint(text, "--metrics")
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_EngineCollector(families))
    try:
        start_http_server(endpoint.port, endpoint.address, registry)
    except OSError as error:
        raise AgentError(
            f"--metrics {endpoint}: {error.strerror}", "choose another port", ExitStatus.CONFIGURATION
        ) from None
