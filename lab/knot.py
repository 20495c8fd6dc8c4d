"""A Knot DNS primary on loopback: one DNSSEC-signed zone that takes updates and transfers under TSIG."""

import base64
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import dns.dnssec
import dns.exception
import dns.message
import dns.query
import dns.rdata
import dns.rdatatype

from lab.processes import LabError, Process, free_port

# Knot matches a whole message against one acl rule, so everything a publisher writes stands in `upd`.
CONFIGURATION = """\
server:
  listen: {address}@{port}
  rundir: {rundir}
  background-workers: 1
database:
  storage: db
  journal-db-max-size: 200M
key:
  - id: {key}
    algorithm: hmac-sha256
    secret: {secret}
acl:
  - id: xfr
    key: {key}
    action: transfer
  - id: upd
    key: {key}
    action: update
    update-type: [A, AAAA, CAA, TXT, SRV]
    update-owner: name
    update-owner-match: sub-or-equal
    update-owner-name: [servers.{zone}., _tcp.{zone}., _fence.{zone}.]
policy:
  - id: csk
    algorithm: ecdsap256sha256
    single-type-signing: on
    dnskey-ttl: {ttl}
zone:
  - domain: {zone}
    storage: .
    file: seed.zone
    acl: [xfr, upd]
    dnssec-signing: on
    dnssec-policy: csk
    zonefile-sync: -1
    journal-content: all
    zonefile-load: {load}
"""

SEED = """\
$ORIGIN {zone}.
$TTL {ttl}
@ SOA ns1 hostmaster 1 3600 600 604800 {soa_minimum}
@ NS ns1
ns1 A {address}
"""


class Knot:
    """knotd in the foreground on its own port; the zone's data and keys outlive `restart`.

    `records` are further lines of the seed in zone-file form, relative to the zone. `ttl` and
    `soa_minimum` are seconds. `tsig_secret` is base64.
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
        self.zone = zone
        self.address = "127.0.0.1"
        self.port = free_port(self.address)
        self.tsig_name = f"publisher.{zone}"
        self.tsig_secret = base64.b64encode(secrets.token_bytes(32)).decode()
        self.directory = directory
        self._ttl = ttl
        self._process = Process("knotd", ["knotd", "-c", "knot.conf"], directory)
        self._rundir: tempfile.TemporaryDirectory[str] | None = None
        (directory / "db").mkdir(parents=True, exist_ok=True)
        seed = SEED.format(zone=zone, ttl=ttl, soa_minimum=soa_minimum, address=self.address)
        (directory / "seed.zone").write_text(seed + "".join(f"{line}\n" for line in records))

    def start(self) -> Self:
        """Start and wait until the signed zone answers; only the very first start reads the seed."""
        # With the journal in place, loading the zone file again would throw every update away.
        seeded = (self.directory / "db" / "journal").exists()
        # The path of knotd's control socket may have 107 octets at most, so it gets a short place, and a
        # fresh one: a pid file left behind would stop the next start.
        self._rundir = tempfile.TemporaryDirectory(prefix="knot-")
        configuration = CONFIGURATION.format(
            rundir=self._rundir.name,
            address=self.address,
            port=self.port,
            key=self.tsig_name,
            secret=self.tsig_secret,
            zone=self.zone,
            ttl=self._ttl,
            load="none" if seeded else "whole",
        )
        (self.directory / "knot.conf").write_text(configuration)
        try:
            self._process.start(self._dnskeys)
        except LabError:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        self._process.stop()
        if self._rundir is not None:
            self._rundir.cleanup()
            self._rundir = None

    def restart(self) -> Self:
        """Stop and start on the same port with the data kept."""
        self.stop()
        return self.start()

    def trust_anchor(self) -> str:
        """The zone's DNSKEY records (flags 257), one line each in zone-file form."""
        return "".join(f"{self.zone}. 3600 IN DNSKEY {key.to_text()}\n" for key in self._dnskeys())

    def ds(self) -> str:
        """The zone's DS records (SHA-256), one line each in zone-file form, as the parent would hold them."""
        digests = [dns.dnssec.make_ds(f"{self.zone}.", key, "SHA256") for key in self._dnskeys()]
        return "".join(f"{self.zone}. {self._ttl} IN DS {digest.to_text()}\n" for digest in digests)

    def _dnskeys(self) -> Sequence[dns.rdata.Rdata]:
        query = dns.message.make_query(f"{self.zone}.", dns.rdatatype.DNSKEY)
        try:
            answer = dns.query.tcp(query, self.address, timeout=2, port=self.port)
        except (OSError, EOFError, dns.exception.Timeout):
            return ()
        return [key for rrset in answer.answer if rrset.rdtype == dns.rdatatype.DNSKEY for key in rrset]

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
