"""A strict Pebble (the small ACME server for tests) on loopback, with its own front certificate."""

import base64
import datetime as dt
import ipaddress
import json
import ssl
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from lab.peers import PEBBLE_SID
from lab.processes import Process, free_port
from nts_core.certificates import load_chain

SIX_DAYS = 518_400
# As Let's Encrypt has them, in seconds; the one who asks for none gets "classic" there.
PROFILES = MappingProxyType({"classic": 7_776_000, "tlsserver": 3_888_000, "shortlived": 576_000})


class Pebble:
    """Pebble in strict mode; its ports and front certificate stay the same over restarts.

    It keeps no state: after `restart` every account, order, authorization and issuing root is new.
    `resolver` is address:port of the DNS server that validation asks, `http_port` and `tls_port` are the ports
    on which it validates HTTP-01 (whose redirects it follows to any port) and TLS-ALPN-01, `authz_reuse` the
    percentage of valid authorizations used again (None leaves Pebble's own 50; at 0 it still uses one in a
    hundred again), `nonce_reject` the percentage of good nonces refused, `validity` the certificates'
    life in seconds. `binding_keys` are the keys of external accounts (RFC 8555 section 7.3.4) by their
    identifiers; with any, an account needs one.

    It is Debian 12's 2.4.0, or with `newer` sid's (`lab.peers.PEBBLE_SID`; whether it is there must be asked
    first), which has renewal information (RFC 9773), `replaces` and `profiles`: life in seconds by name. To an
    order that names no profile it gives one by chance.
    """

    def __init__(
        self,
        directory: Path,
        *,
        resolver: str,
        http_port: int,
        tls_port: int | None = None,
        authz_reuse: int | None = None,
        nonce_reject: int = 5,
        validity: int = SIX_DAYS,
        newer: bool = False,
        profiles: Mapping[str, int] | None = None,
        binding_keys: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        listen, management = (f"127.0.0.1:{free_port()}" for _ in range(2))
        self.directory_url = f"https://{listen}/dir"
        self.ca_file = directory / "ca.pem"
        self._management = f"https://{management}"
        write_front(directory)
        self._tls = ssl.create_default_context(cafile=str(self.ca_file))
        settings = {
            "listenAddress": listen,
            "managementListenAddress": management,
            "certificate": str(directory / "front.pem"),
            "privateKey": str(directory / "front.key"),
            "httpPort": http_port,
            "tlsPort": tls_port or free_port(),
            "externalAccountBindingRequired": bool(binding_keys),
            "externalAccountMACKeys": {
                name: base64.urlsafe_b64encode(key).decode().rstrip("=") for name, key in binding_keys.items()
            },
            "certificateValidityPeriod": validity,
            "profiles": {
                name: {"description": f"{life} s", "validityPeriod": life}
                for name, life in (profiles or {"default": validity}).items()
            },
        }
        config = directory / "pebble.json"
        config.write_text(json.dumps({"pebble": settings}))
        env = {"PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": str(nonce_reject)}
        if authz_reuse is not None:
            env["PEBBLE_AUTHZREUSE"] = str(authz_reuse)
        program = PEBBLE_SID.command("usr/bin/pebble") if newer else ["pebble"]
        argv = [*program, "-config", str(config), "-strict", "-dnsserver", resolver]
        self.process = Process("pebble", argv, directory, env=env)

    def start(self) -> Self:
        self.process.start(self._answers)
        return self

    def stop(self) -> None:
        self.process.stop()

    def restart(self) -> Self:
        """Stop and start on the same ports, with every account, order and root forgotten."""
        self.stop()
        return self.start()

    def issuer_roots(self) -> str:
        """The root that signs issued certificates (PEM): what clients take as `--ca`."""
        return self._get(f"{self._management}/roots/0").text

    def issuer_intermediate(self) -> str:
        """The intermediate under `issuer_roots` (PEM)."""
        return self._get(f"{self._management}/intermediates/0").text

    def certificate_status(self, serial: str) -> str:
        """Either Valid or Revoked for a serial in hex; httpx.HTTPStatusError for one it never issued."""
        status: str = self._status_of(serial)["Status"]
        return status

    def revocation_reason(self, serial: str) -> int | None:
        """The reason code with which a certificate was revoked."""
        reason: int | None = self._status_of(serial).get("Reason")
        return reason

    def set_renewal_window(
        self, cert_pem: str, start: dt.datetime, end: dt.datetime, *, why: str = ""
    ) -> None:
        """What the newer Pebble says from now on of when a certificate (the leaf, PEM) is to be renewed."""
        window = {"start": start.isoformat(), "end": end.isoformat()}
        answer = {"suggestedWindow": window, **({"explanationURL": why} if why else {})}
        body = {"Certificate": cert_pem, "ARIResponse": json.dumps(answer)}
        url = f"{self._management}/set-renewal-info/"
        httpx.post(url, json=body, verify=self._tls, timeout=5, trust_env=False).raise_for_status()

    def _status_of(self, serial: str) -> dict[str, Any]:
        found: dict[str, Any] = self._get(f"{self._management}/cert-status-by-serial/{serial}").json()
        return found

    def _get(self, url: str) -> httpx.Response:
        return httpx.get(url, verify=self._tls, timeout=5, trust_env=False).raise_for_status()

    def _answers(self) -> bool:
        try:
            self._get(self.directory_url)
            self._get(f"{self._management}/roots/0")
        except httpx.TransportError:
            return False
        return True

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def is_known(chain_pem: str) -> bool:
    """Whether the newer Pebble finds a certificate of its own that an order replaces.

    It looks for the serial as it is in DER. Where that begins with an octet of zeros, in one of 256, it kept it without.
    """
    return load_chain(chain_pem)[0].serial_number.bit_length() % 8 != 0


def write_front(directory: Path) -> None:
    """The CA (ca.pem) of a front, and its certificate (front.pem, front.key) for localhost and 127.0.0.1."""
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "laboratory front CA")])
    now = dt.datetime.now(dt.UTC)
    base = (
        x509.CertificateBuilder()
        .issuer_name(ca_name)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=30))
    )
    signer = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    authority = (
        base.subject_name(ca_name)
        .public_key(ca_key.public_key())
        .serial_number(x509.random_serial_number())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(signer, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))]
    front = (
        base.subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(signer), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    (directory / "ca.pem").write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    (directory / "front.pem").write_bytes(front.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (directory / "front.key").write_bytes(private)
