"""The agent's answers over TLS: TLS-ALPN-01 on port 443 (RFC 8737), and address proofs on the KE port.

Both speak one protocol each, for names confirmed at join alone, with a key of their own that is worth nothing. On the
KE port this is so only until an engine serves there: then its certificate proves the address.
"""

import asyncio
import datetime as dt
import re
from collections.abc import Mapping
from enum import StrEnum

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from member_agent import attend
from member_agent.attend import Attendant, Connection
from member_agent.challenges import ChallengeError
from nts_core.control import ACME_ALPN, PROOF_ALPN, TlsChallenge
from nts_core.errors import TlsError
from nts_core.tls import NamedCredentials, ServerCredentials, TlsChannel, acme_identifier

_ACME, _PROOF = ACME_ALPN.encode(), PROOF_ALPN.encode()
_DIGEST = re.compile(r"[0-9a-f]{64}")
_READ = 16 * 1024
_MAX_RECEIVED = 32 * 1024  # octets of a whole connection, the ClientHello included
_MAX_NONCE = 200
# Nobody looks at it.
_LIFE = dt.timedelta(days=7)


class Outcome(StrEnum):
    """How a connection ended; the counters' labels."""

    SERVED = "served"
    UNKNOWN = "unknown"  # a nonce that we never asked for
    TLS_FAILED = "tls-failed"  # also for other names and protocols
    TOO_LONG = "too-long"
    TIMEOUT = attend.TIMEOUT
    EVICTED = attend.EVICTED
    CLOSED = attend.CLOSED
    ACCEPT_FAILED = attend.ACCEPT_FAILED


def validate_tls_challenge(challenge: TlsChallenge) -> None:
    """ChallengeError unless it is a SHA-256 digest in lower-case hex."""
    if not _DIGEST.fullmatch(challenge.digest):
        raise ChallengeError("the TLS-ALPN-01 challenge is not a SHA-256 digest in hex")


def _throw_away(domain: str, alpn: bytes, *extensions: x509.ExtensionType) -> ServerCredentials:
    """A self-signed certificate for the domain and the protocol; the extensions are critical."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = dt.datetime.now(dt.UTC)
    name = x509.Name([])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _LIFE)
        .not_valid_after(now + _LIFE)
        # RFC 5280 section 4.2.1.6: critical, as the subject is empty.
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(domain)]), critical=True)
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    return ServerCredentials([builder.sign(key, hashes.SHA256())], key, alpn)


class AlpnResponder(Attendant):
    """TLS-ALPN-01: completes the handshake with the challenge's certificate, and ends. It counts by `Outcome`.

    One challenge a domain: what comes last is answered.
    """

    def __init__(self, *, limit: int = 1024, deadline: float = 5.0) -> None:
        super().__init__(limit=limit, deadline=deadline)
        self._digests: dict[str, str] = {}
        self._credentials: dict[str, ServerCredentials] = {}
        self._named = NamedCredentials({}, _ACME, exact=True)

    def replace(self, domain: str, challenges: tuple[TlsChallenge, ...]) -> None:
        """Answer exactly these for the domain. Raises ChallengeError, and then changes nothing."""
        for challenge in challenges:
            validate_tls_challenge(challenge)
        digest = challenges[-1].digest if challenges else None
        if digest is None:
            self.forget(domain)
        elif self._digests.get(domain) != digest:
            self._credentials[domain] = _throw_away(domain, _ACME, acme_identifier(digest))
            self._digests[domain] = digest
            self._named = NamedCredentials(self._credentials, _ACME, exact=True)

    def forget(self, domain: str) -> None:
        self._digests.pop(domain, None)
        if self._credentials.pop(domain, None) is not None:
            self._named = NamedCredentials(self._credentials, _ACME, exact=True)

    async def answer(self, connection: Connection) -> tuple[Outcome, bytes]:
        channel = self._named.channel()
        outcome, _ = await _handshake(connection, channel)
        channel.close()
        return outcome, channel.to_send()


class ProofResponder(Attendant):
    """Signed address proofs over TLS: a nonce and a newline come, its signature and a newline go. It counts by `Outcome`."""

    def __init__(self, *, limit: int = 256, deadline: float = 5.0) -> None:
        super().__init__(limit=limit, deadline=deadline)
        self._proofs: dict[str, Mapping[str, bytes]] = {}
        self._credentials: dict[str, ServerCredentials] = {}
        self._named = NamedCredentials({}, _PROOF, exact=True)

    def replace(self, domain: str, proofs: Mapping[str, bytes]) -> None:
        """Answer exactly these, signatures by nonce, for the domain."""
        self._proofs[domain] = dict(proofs)
        if domain not in self._credentials:
            self._credentials[domain] = _throw_away(domain, _PROOF)
            self._named = NamedCredentials(self._credentials, _PROOF, exact=True)

    def forget(self, domain: str) -> None:
        self._proofs.pop(domain, None)
        if self._credentials.pop(domain, None) is not None:
            self._named = NamedCredentials(self._credentials, _PROOF, exact=True)

    async def answer(self, connection: Connection) -> tuple[Outcome, bytes]:
        channel = self._named.channel()
        outcome, received = await _handshake(connection, channel)
        while outcome is Outcome.SERVED and b"\n" not in received:
            if len(received) > _MAX_NONCE:
                return Outcome.TOO_LONG, b""
            octets = await asyncio.get_running_loop().sock_recv(connection.sock, _READ)
            if not octets:
                return Outcome.CLOSED, b""
            try:
                received += channel.receive(octets)
            except TlsError:
                return Outcome.TLS_FAILED, channel.to_send()
        if outcome is Outcome.SERVED:
            signature = self._signature(received)
            outcome = Outcome.SERVED if signature else Outcome.UNKNOWN
            channel.send(signature + b"\n")
            channel.close()
        return outcome, channel.to_send()

    def _signature(self, line: bytes) -> bytes:
        """Empty when nobody told us that nonce. Nonces are drawn by registries, so no two domains share one."""
        nonce = line.partition(b"\n")[0].decode("ascii", "replace")
        return next((proofs[nonce] for proofs in self._proofs.values() if nonce in proofs), b"")


async def _handshake(connection: Connection, channel: TlsChannel) -> tuple[Outcome, bytes]:
    """Until TLS is established; with what the peer has said by then."""
    loop, received, plaintext = asyncio.get_running_loop(), 0, b""
    while not channel.established:
        octets = await loop.sock_recv(connection.sock, _READ)
        received += len(octets)
        if not octets:
            return Outcome.CLOSED, plaintext
        if received > _MAX_RECEIVED:
            return Outcome.TOO_LONG, plaintext
        try:
            plaintext += channel.receive(octets)
        except TlsError:
            return Outcome.TLS_FAILED, plaintext
        await loop.sock_sendall(connection.sock, channel.to_send())
    return Outcome.SERVED, plaintext
