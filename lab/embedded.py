"""The embedded server on loopback: alone, as `poolsvc dns serve` runs it, and as a part of a registry."""

import dns.query
import dns.rcode
import dns.tsig
import dns.update

from lab.knot import KnotEdge
from lab.nameservers import Primary
from lab.processes import LabError, wait_until
from lab.programs import Finished, poolsvc, script

CONFIGURATION = """\
pool = "{zone}"

[dns]
tsig_name = "{tsig_name}"
tsig_secret_file = "publisher.secret"
nameservers = ["{address}:{port}"]
srv_ttl = {ttl}
address_ttl = {ttl}

[dns.embedded]
listen = ["{address}:{port}"]
nameservers = [{{ name = "ns1.{zone}", addresses = ["{address}"] }}]
own_process = true
ttl = {ttl}
negative_ttl = {negative_ttl}
# Here all who ask are one network.
responses_per_second = 100000
responses_at_once = 100000

{more}
[ca]
directory_url = "https://ca.invalid/directory"
caa_identity = "ca.invalid"
account_key_file = "acme-account.pem"
"""

SECTION = """\
[dns.embedded]
listen = ["{address}:{port}"]
ttl = {ttl}
negative_ttl = {negative_ttl}
# Here all who ask are one network.
responses_per_second = 100000
responses_at_once = 100000

[dns]
"""

SECONDARY = """
[[dns.embedded.secondaries]]
address = "{server.address}:{server.port}"
tsig_name = "{kind}.{server.zone}"
tsig_secret_file = "{kind}.secret"
signs = {signs}
"""


class Embedded(Primary):
    """Its zone and keys lie in `dns` of the directory. `more` is added to its section of the settings."""

    more = ""
    argv = (script("poolsvc"), "dns", "serve", "--config", "poolsvc.toml")

    def prepare(self) -> None:
        text = CONFIGURATION.format(
            zone=self.zone,
            tsig_name=self.tsig_name,
            address=self.address,
            port=self.port,
            ttl=self._ttl,
            negative_ttl=self._soa_minimum,
            more=self.more,
        )
        for server in self.secondaries:
            is_edge = isinstance(server, KnotEdge)
            kind = "edge" if is_edge else "transfer"
            text += SECONDARY.format(server=server, kind=kind, signs=str(is_edge).lower())
        for file, content in (
            ("poolsvc.toml", text),
            ("publisher.secret", self.tsig_secret),
            ("transfer.secret", self.transfer_secret),
            ("edge.secret", self.edge_secret),
        ):
            path = self.directory / file
            path.touch(mode=0o600)
            path.write_text(content)

    def start(self) -> "Embedded":
        super().start()
        if self._records:
            self._add_records()
        return self

    def poolsvc(self, *arguments: str) -> Finished:
        """A command with its settings."""
        return poolsvc(self.directory / "poolsvc.toml", *arguments)

    def _add_records(self) -> None:
        """What an operator adds by nsupdate."""
        key = dns.tsig.Key(self.tsig_name, self.tsig_secret, "hmac-sha256")
        update = dns.update.UpdateMessage(f"{self.zone}.", keyring=key)
        for line in self._records:
            owner, *rest = line.split()
            ttl = int(rest.pop(0)) if rest[0].isdecimal() else self._ttl
            update.add(owner, ttl, rest[0], " ".join(rest[1:]))
        answer = dns.query.tcp(update, self.address, timeout=5, port=self.port)
        if answer.rcode() != dns.rcode.NOERROR:
            raise LabError(f"the seed was refused: {dns.rcode.to_text(answer.rcode())}")

    def _lose(self) -> None:
        for path in (self.directory / "dns").glob("zone.db*"):
            path.unlink()


class RegistryDns(Embedded):
    """The server that a registry's `poolsvc serve` runs, with the secret that it made; not ours to start and stop."""

    def section(self) -> str:
        """The settings of the registry that it follows from."""
        return SECTION.format(
            address=self.address, port=self.port, ttl=self._ttl, negative_ttl=self._soa_minimum
        )

    def start(self) -> "RegistryDns":
        wait_until(self._is_ready, "the registry's DNS server")
        self.tsig_name = "publisher"
        self.tsig_secret = (self.directory / "dns" / "publisher.secret").read_text().strip()
        return self

    def stop(self) -> None:
        """It ends with its registry."""
