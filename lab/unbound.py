"""Unbound on loopback: a validating resolver that knows the laboratory's zones and nothing else."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import dns.exception
import dns.flags
import dns.message
import dns.query
import dns.rcode

from lab.nameservers import Primary
from lab.processes import Process, free_port

# Every name outside the stub zones is refused here, so that no query leaves the machine.
CONFIGURATION = """\
server:
  directory: "{directory}"
  chroot: ""
  username: ""
  pidfile: ""
  use-syslog: no
  num-threads: 1
  interface: {address}@{port}
  do-ip6: no
  do-not-query-localhost: no
  module-config: "validator iterator"
  trust-anchor-file: "anchor"
  access-control: 127.0.0.0/8 allow
  local-zone: "." refuse
remote-control:
  control-enable: no
"""

STUB = """\
server:
  local-zone: "{zone}." transparent
stub-zone:
  name: "{zone}"
"""


class Unbound:
    """unbound in the foreground, caching and validating, with a stub to each of `authorities` and their secondaries.

    The first authority's key is the only trust anchor, unless there is another `anchor`; the other zones are validated
    through a DS in their parent. The authorities must be running when it starts.
    """

    def __init__(self, directory: Path, authorities: Sequence[Primary], *, anchor: str | None = None) -> None:
        self.address = "127.0.0.1"
        self.port = free_port(self.address)
        self._directory = directory
        self._authorities = tuple(authorities)
        self._anchor = anchor
        self._process = Process("unbound", ["unbound", "-d", "-c", "unbound.conf"], directory)

    def start(self) -> Self:
        """Start and wait until the first zone's SOA is answered as validated; with another anchor, at all."""
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / "anchor").write_text(self._anchor or self._authorities[0].trust_anchor())
        configuration = CONFIGURATION.format(
            directory=self._directory.resolve(), address=self.address, port=self.port
        )
        for primary in self._authorities:
            configuration += STUB.format(zone=primary.zone)
            for server in (primary, *primary.secondaries):
                configuration += f"  stub-addr: {server.address}@{server.port}\n"
        (self._directory / "unbound.conf").write_text(configuration)
        self._process.start(self._validates)
        return self

    def stop(self) -> None:
        self._process.stop()

    def restart(self) -> Self:
        """Stop and start on the same port with an empty cache."""
        self.stop()
        return self.start()

    def _validates(self) -> bool:
        query = dns.message.make_query(f"{self._authorities[0].zone}.", "SOA", want_dnssec=True)
        try:
            answer = dns.query.tcp(query, self.address, timeout=2, port=self.port)
        except (OSError, EOFError, dns.exception.Timeout):
            return False
        if self._anchor is not None:
            return True
        return answer.rcode() == dns.rcode.NOERROR and bool(answer.flags & dns.flags.AD)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
