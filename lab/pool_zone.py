"""The records of a pool in a primary's zone, as a registry would keep them, changed by a test as it likes."""

from collections.abc import Iterable

import dns.query
import dns.rcode
import dns.tsig
import dns.update

from lab.nameservers import Primary
from lab.processes import LabError


class PoolZone:
    """Servers come and go; each change is signed and served when the call returns. `ttl` is in seconds."""

    def __init__(self, primary: Primary, ttl: int = 2) -> None:
        self._primary = primary
        self._ttl = ttl

    def add(self, *servers: tuple[str, str, str]) -> None:
        """Servers by name, address and further pairs of their metadata: `op=... as=... cc=...`."""
        update = self._update()
        for name, address, pairs in servers:
            update.add(f"{name}.servers", self._ttl, "AAAA" if ":" in address else "A", address)
            update.add(f"{name}.servers", self._ttl, "TXT", f'"v=truechimer1 {pairs}"')
        self._send(update)

    def remove(self, *names: str) -> None:
        """These names exist no more."""
        update = self._update()
        for name in names:
            for rdtype in ("A", "AAAA", "TXT"):
                update.delete(f"{name}.servers", rdtype)
        self._send(update)

    def list(
        self, names: Iterable[str], *, first: Iterable[str] = (), port: int = 4460, region: str = ""
    ) -> None:
        """The SRV answer from now on, with those before all others that are to be tried `first`; nobody is no answer.

        That of the pool, or of a region of it.
        """
        update = self._update()
        owner = f"_ntske._tcp.{region}" if region else "_ntske._tcp"
        update.delete(owner, "SRV")
        for priority, several in enumerate((first, names)):
            for name in several:
                target = f"{name}.servers.{self._primary.zone}."
                update.add(owner, self._ttl, "SRV", f"{priority} 10 {port} {target}")
        self._send(update)

    def _update(self) -> dns.update.UpdateMessage:
        key = dns.tsig.Key(self._primary.tsig_name, self._primary.tsig_secret, "hmac-sha256")
        return dns.update.UpdateMessage(f"{self._primary.zone}.", keyring=key)

    def _send(self, update: dns.update.UpdateMessage) -> None:
        answer = dns.query.tcp(update, self._primary.address, timeout=5, port=self._primary.port)
        if answer.rcode() != dns.rcode.NOERROR:
            raise LabError(f"the change was refused: {dns.rcode.to_text(answer.rcode())}")
