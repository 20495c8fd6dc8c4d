"""What all authoritative servers of the laboratory are: primaries that sign and take updates, and their secondaries."""

import base64
import secrets
import signal
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import dns.dnssec
import dns.exception
import dns.message
import dns.query
from dns.rdatatype import DNSKEY, RRSIG, SOA, RdataType

from lab.processes import LabError, Process, free_port
from poolsvc import setup

SEED = """\
$ORIGIN {zone}.
$TTL {ttl}
@ SOA ns1 hostmaster {serial} 2 1 604800 {soa_minimum}
@ NS ns1
ns1 A {address}
"""


class NameServer(ABC):
    """An authoritative server in the foreground on its own port; what it knows of the zone outlives `restart`."""

    argv: ClassVar[tuple[str, ...]]

    def __init__(self, directory: Path, zone: str) -> None:
        self.zone = zone
        self.address = "127.0.0.1"
        self.port = free_port(self.address)
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._process = Process(self.argv[0], self.argv, directory)

    @abstractmethod
    def prepare(self) -> None:
        """Write what the next start needs."""

    @abstractmethod
    def _is_ready(self) -> bool:
        """Whether it serves the zone."""

    def start(self) -> Self:
        """Start and wait until the zone is served."""
        self.prepare()
        try:
            self._process.start(self._is_ready)
        except LabError:
            self.stop()
            raise
        return self

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        self._process.stop()

    def running(self) -> bool:
        return self._process.running()

    def kill(self) -> None:
        """As a power failure ends it."""
        self._process.signal(signal.SIGKILL)
        self._process.wait()
        self.stop()

    def restart(self) -> Self:
        """Stop and start on the same port with the data kept."""
        self.stop()
        return self.start()

    def serial(self) -> int:
        """The serial of the zone as it is served; 0 while it is not."""
        return next((soa.serial for soa in self._shown(SOA)), 0)

    def _shown(self, rdtype: RdataType, wanted: RdataType | None = None) -> list[Any]:
        """Records of the apex in the answer to a question for a type: those of this type, or of another one."""
        query = dns.message.make_query(f"{self.zone}.", rdtype, want_dnssec=True)
        try:
            answer = dns.query.tcp(query, self.address, timeout=2, port=self.port)
        except (OSError, EOFError, dns.exception.Timeout):
            return []
        return [one for rrset in answer.answer if rrset.rdtype == (wanted or rdtype) for one in rrset]

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Primary(NameServer):
    """One signed zone that takes updates and transfers under TSIG; another key is for the secondaries.

    `records` are further lines of the seed in zone-file form, relative to the zone. `ttl` and `soa_minimum` are
    seconds. Secrets are base64. Only secondaries that were made before it starts are notified.
    """

    def __init__(
        self,
        directory: Path,
        *,
        zone: str = "pool.example",
        ttl: int = 2,
        soa_minimum: int = 2,
        records: Sequence[str] = (),
    ) -> None:
        super().__init__(directory, zone)
        self.tsig_name = f"publisher.{zone}"
        self.tsig_secret, self.transfer_secret, self.edge_secret = (
            base64.b64encode(secrets.token_bytes(32)).decode() for _ in range(3)
        )
        self.secondaries: list[Secondary] = []
        self._ttl, self._soa_minimum, self._records = ttl, soa_minimum, tuple(records)
        self._first_serial = 1

    def lose(self, first_serial: int) -> None:
        """Of a stopped server all is gone but the zone's keys; the next start begins the zone anew with this serial."""
        self._first_serial = first_serial
        self._lose()

    @property
    def ttl(self) -> int:
        return self._ttl

    @abstractmethod
    def _lose(self) -> None:
        """Remove everything but the zone's keys."""

    def _seed(self) -> str:
        """The zone to begin with, as a zone file."""
        lines = SEED.format(
            zone=self.zone,
            ttl=self._ttl,
            serial=self._first_serial,
            soa_minimum=self._soa_minimum,
            address=self.address,
        )
        return lines + "".join(f"{line}\n" for line in self._records)

    def shipped(self) -> Mapping[str, str]:
        """The files that `poolsvc init` writes for such a zone, by name."""
        servers = tuple(
            setup.NamedServer(f"ns{number}.{self.zone}", server.address, server.port)
            for number, server in enumerate((self, *self.secondaries), start=1)
        )
        # Not checked, as a pool's domain is: a zone here may be a top-level domain.
        answers = setup.Answers.model_construct(
            pool=self.zone, nameservers=servers, public_url="", ca="", caa_identity=""
        )
        files = setup.nameserver_files(answers, self.tsig_secret, self.transfer_secret, self.edge_secret)
        return {name: content.decode() for name, content in files.items()}

    def trust_anchor(self) -> str:
        """The zone's DNSKEY records (flags 257), one line each in zone-file form."""
        return "".join(f"{self.zone}. 3600 IN DNSKEY {key.to_text()}\n" for key in self._shown(DNSKEY))

    def ds(self) -> str:
        """The zone's DS records (SHA-256), one line each in zone-file form, as the parent would hold them."""
        digests = [dns.dnssec.make_ds(f"{self.zone}.", key, "SHA256") for key in self._shown(DNSKEY)]
        return "".join(f"{self.zone}. {self._ttl} IN DS {digest.to_text()}\n" for digest in digests)

    def _is_ready(self) -> bool:
        return bool(self._shown(DNSKEY) and self._shown(SOA, RRSIG))


class Secondary(NameServer):
    """A server that has the zone, signed, by transfer from a running primary."""

    def __init__(self, directory: Path, primary: Primary) -> None:
        super().__init__(directory, primary.zone)
        assert not primary.running(), "it would not be notified"
        self.primary = primary
        primary.secondaries.append(self)

    def _is_ready(self) -> bool:
        return self.serial() != 0
