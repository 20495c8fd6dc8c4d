"""Prometheus metrics of a program, read from their owners when somebody asks (I/O)."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

Families = Callable[[], Iterable[Metric]]


class Collected(Collector):
    """One owner's figures, for a registry of Prometheus's library."""

    def __init__(self, families: Families) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families()


def expose(address: str, port: int, *sources: Families) -> None:
    """Serve /metrics there, in a thread of its own. Raises OSError."""
    registry = CollectorRegistry(auto_describe=False)
    for source in sources:
        registry.register(Collected(source))
    start_http_server(port, address, registry)
