"""NTS-KE and NTP in one process: the same in the agent itself and in each of its workers."""

import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from member_agent.clock import Clock
from member_agent.config import AgentSettings, Limits
from member_agent.ke_server import KeListeners
from member_agent.ntp_server import NtpListeners
from member_agent.sockets import Endpoint
from nts_core.aead import AeadId
from nts_core.cookies import MAX_COOKIES, Keyring
from nts_core.errors import TlsError
from nts_core.ke import NtpEndpoint, NtpService
from nts_core.tls import NamedCredentials, ServerCredentials, ServerKey

# What the kernel carries with one message is 253 descriptors; a worker is told of that many places at most.
MOST_PLACES = 240


class Protocol(StrEnum):
    KE = "ke"
    NTP = "ntp"


@dataclass(frozen=True, slots=True)
class Place:
    """Where one protocol is served."""

    protocol: Protocol
    endpoint: Endpoint

    @property
    def kind(self) -> socket.SocketKind:
        return socket.SOCK_STREAM if self.protocol is Protocol.KE else socket.SOCK_DGRAM

    def is_in_the_way_of(self, other: "Place") -> bool:
        """Whether sockets at both places cannot be bound at a time."""
        ours, theirs = self.endpoint, other.endpoint
        same = (self.protocol, ours.port, ours.family) == (other.protocol, theirs.port, theirs.family)
        return same and (ours.is_wildcard or theirs.is_wildcard or ours.address == theirs.address)


@dataclass(frozen=True, slots=True)
class PemPair:
    """A certificate chain, leaf first, and its key."""

    chain: str
    key: str = field(repr=False)

    def credentials(self) -> ServerCredentials:
        """Raises TlsError, ValueError."""
        private = serialization.load_pem_private_key(self.key.encode(), None)
        if not isinstance(private, ServerKey):
            raise TlsError("a kind of key that TLS does not use")
        return ServerCredentials(x509.load_pem_x509_certificates(self.chain.encode()), private)


@dataclass(frozen=True, slots=True)
class Charge:
    """All that a process that serves knows of the settings."""

    limits: Limits
    aead: tuple[AeadId, ...]
    ntp_server: NtpEndpoint | None

    @classmethod
    def of(cls, settings: AgentSettings) -> Self:
        """The same for each of the processes."""
        return cls(
            limits=settings.limits.of_each(settings.workers),
            aead=settings.aead,
            ntp_server=settings.ntp_server,
        )


@dataclass(frozen=True, slots=True)
class Counts:
    """What happened since the start; `ke_open` is what is open now."""

    ke: Counter[str] = field(default_factory=Counter)
    ntp: Counter[str] = field(default_factory=Counter)
    opened: Counter[str] = field(default_factory=Counter)
    sealed: int = 0
    forgotten: int = 0
    ke_open: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.ke + other.ke,
            self.ntp + other.ntp,
            self.opened + other.opened,
            self.sealed + other.sealed,
            self.forgotten + other.forgotten,
            self.ke_open + other.ke_open,
        )


class Server:
    """Serves at the places that are opened, until `close`."""

    def __init__(self, charge: Charge, clock: Clock, keyring: Keyring) -> None:
        self._ntp_server = charge.ntp_server
        self._ke = KeListeners(NamedCredentials({}), keyring, charge.limits, charge.aead)
        self._ntp = NtpListeners(clock, keyring, charge.limits)
        self._sockets: dict[Place, socket.socket] = {}

    def use_credentials(self, by_domain: Mapping[str, ServerCredentials]) -> None:
        """The certificates for new connections; those under way are not touched."""
        self._ke.credentials = NamedCredentials(by_domain)

    def use_keyring(self, keyring: Keyring) -> None:
        self._ke.keyring = keyring
        self._ntp.use_keyring(keyring)

    def open(self, place: Place, sock: socket.socket) -> None:
        """Answer on a socket that is bound there."""
        self._sockets[place] = sock
        if place.protocol is Protocol.KE:
            self._ke.listen(sock, self._service_at)
        else:
            self._ntp.listen(sock)

    def leave(self, place: Place) -> None:
        """Answer there no more, and close the socket."""
        sock = self._sockets.pop(place)
        (self._ke if place.protocol is Protocol.KE else self._ntp).leave(sock)

    async def close(self) -> None:
        await self._ke.close()
        self._ntp.close()
        self._sockets.clear()

    @property
    def counts(self) -> Counts:
        """May be read in another thread."""
        ke = Counter(dict(self._ke.counters))
        return Counts(
            ke,
            Counter(dict(self._ntp.counters)),
            Counter(dict(self._ntp.opened)),
            self._ntp.sealed + MAX_COOKIES * ke["ok"],
            self._ntp.admission.forgotten if self._ntp.admission else 0,
            self._ke.slots.taken,
        )

    def _service_at(self, local: str, names: tuple[str, ...]) -> NtpService:
        return service_at(self._ntp.endpoints, self._ntp_server, local, names)


def service_at(
    endpoints: Sequence[Endpoint], ntp_server: NtpEndpoint | None, local: str, names: tuple[str, ...]
) -> NtpService:
    """Where clients of the KE address `local` find NTP, which is served at `endpoints`: there if it is served there.

    Otherwise at an address of the same family, at another, or by the certificate's name, which may lead to
    any (RFC 8915 section 4.1.7). Addresses with a zone mean nothing elsewhere and are not told. The member's own
    `ntp_server` comes before all.
    """
    family = Endpoint(local, 0).family
    here: list[NtpEndpoint] = []
    told: list[NtpEndpoint] = []
    for ntp in sorted(endpoints, key=lambda ntp: ntp.family != family):
        if ntp.address == local or (ntp.is_wildcard and ntp.family == family):
            here.append(NtpEndpoint(None, ntp.port))
            # By these names, too, a client may ask for what it would get anyway.
            told += [NtpEndpoint(name, ntp.port) for name in (local, *names)]
        elif ntp.is_wildcard:
            told += [NtpEndpoint(name, ntp.port) for name in names]
        else:
            told.append(NtpEndpoint(ntp.address, ntp.port))
    told = [endpoint for endpoint in told if endpoint.host and "%" not in endpoint.host]
    elsewhere = [ntp_server] if ntp_server else []
    last = [NtpEndpoint(None, ntp.port) for ntp in endpoints[:1]]
    choices = [*elsewhere, *here, *told, *last, NtpEndpoint()]
    return NtpService(choices[0], tuple(told))
