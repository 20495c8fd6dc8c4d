"""Looks at an SRV all the time and everywhere, and notes each target that should not be there at that moment."""

import math
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Self

import dns.exception
import dns.flags
import dns.message
import dns.query
import dns.rdatatype

from lab.nameservers import NameServer
from lab.unbound import Unbound

_TIMEOUT = 0.3
_PAUSE = 0.005


class Watcher:
    """Asks `servers` by name in turn, in a thread of its own; a context manager.

    A resolver may show for `ttl` seconds what is not wanted any more, and must show nothing that it has not validated.
    `faults` are sentences, `answers` how many SRV each server has shown. A server that does not answer is no fault.
    """

    def __init__(self, owner: str, servers: Mapping[str, NameServer | Unbound], *, ttl: float) -> None:
        self.faults: list[str] = []
        self.answers: Counter[str] = Counter()
        self._owner = owner
        self._servers = dict(servers)
        self._ttl = ttl
        self._wanted: dict[str, dict[str, float]] = {name: {} for name in servers}
        self.names = tuple(servers)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="the watcher", daemon=True)

    def allow(self, targets: Iterable[str]) -> None:
        """From now on every server may show these too."""
        targets = tuple(targets)
        for wanted in self._wanted.values():
            wanted.update(dict.fromkeys(targets, math.inf))

    def settled(self, targets: Iterable[str], *names: str) -> None:
        """From now on these servers, or all, show these alone."""
        kept, now = set(targets), time.monotonic()
        for name in names or self.names:
            wanted = self._wanted[name]
            wanted.update(
                {target: now for target, until in wanted.items() if target not in kept and until > now}
            )

    def _watch(self) -> None:
        while not self._end.is_set():
            for name, server in self._servers.items():
                self._look(name, server)
            time.sleep(_PAUSE)

    def _look(self, name: str, server: NameServer | Unbound) -> None:
        asked = time.monotonic()
        query = dns.message.make_query(self._owner, dns.rdatatype.SRV, want_dnssec=True)
        try:
            answer, _ = dns.query.udp_with_fallback(query, server.address, _TIMEOUT, server.port)
        except (OSError, EOFError, dns.exception.DNSException):
            return
        is_resolver = isinstance(server, Unbound)
        targets = {
            srv.target.to_text().lower()
            for rrset in answer.answer
            if rrset.rdtype == dns.rdatatype.SRV
            for srv in rrset
        }
        if not targets:
            return
        self.answers[name] += 1
        since = asked - (self._ttl if is_resolver else 0)
        for target in targets:
            if self._wanted[name].get(target, -math.inf) < since:
                self.faults.append(f"{name} shows {target}")
        if is_resolver and not answer.flags & dns.flags.AD:
            self.faults.append(f"{name} shows what it has not validated")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
