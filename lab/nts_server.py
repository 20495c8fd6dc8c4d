"""An NTS server within a test: its own keys, certificate and clock on loopback, and it does what it is told."""

import asyncio
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from lab.certificates import Pair
from member_agent.config import Limits
from member_agent.ke_server import KeListeners
from member_agent.sockets import Endpoint, bind
from nts_core.aead import NONCE_LENGTH, Aead
from nts_core.cookies import Keyring
from nts_core.errors import NotAuthentic
from nts_core.ke import NtpEndpoint, NtpService
from nts_core.packet import ClockState, Field, FieldType, Header, Leap, Mode, Packet, encode_fields, protect
from nts_core.server import NtpServer, Reply
from nts_core.tls import ServerCredentials

CLOCK = ClockState(Leap.NONE, 2, -20, 0, 0, b"TEST", 0)
Answers = Callable[[bytes], Iterable[bytes]]


def load_credentials(pair: Pair) -> ServerCredentials:
    """What a server needs of a certificate."""
    key = load_pem_private_key(pair.key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return ServerCredentials(x509.load_pem_x509_certificates(pair.cert.read_bytes()), key)


class NtsServer(asyncio.DatagramProtocol):
    """Counts each cookie that it ever sees. `offset` (nanoseconds) is how far its clock is ahead.

    `before` makes datagrams that are sent before the true answer; when `is_silent` that is not sent.
    """

    transport: asyncio.DatagramTransport
    ke_port: int
    ntp_port: int

    def __init__(self, pair: Pair, host: str = "127.0.0.1") -> None:
        self.host = host
        self.keyring = Keyring.new(0, secrets.token_bytes)
        self.listeners = KeListeners(load_credentials(pair), self.keyring, Limits())
        self.cookies: Counter[bytes] = Counter()
        self.clock = CLOCK
        self.offset = 0
        self.before: Answers = lambda _request: ()
        self.is_silent = False

    async def start(self, ke_port: int = 0, ntp_port: int = 0) -> None:
        """At these ports, or any that are free."""
        loop = asyncio.get_running_loop()
        self.transport, _ = await loop.create_datagram_endpoint(
            lambda: self, local_addr=(self.host, ntp_port)
        )
        bound = bind(Endpoint(self.host, ke_port), socket.SOCK_STREAM)
        self.ntp_port = self.transport.get_extra_info("sockname")[1]
        service = NtpService(NtpEndpoint(None, self.ntp_port))
        self.listeners.listen(bound, lambda _local, _names: service)
        self.ke_port = self.listeners.endpoints[0].port

    async def stop(self) -> None:
        await self.listeners.close()
        self.transport.close()
        await asyncio.sleep(0)

    def lose_keys(self) -> None:
        self.keyring = self.listeners.keyring = Keyring.new(0, secrets.token_bytes)

    def certify(self, pair: Pair) -> None:
        """Another certificate from now on."""
        self.listeners.credentials = load_credentials(pair)

    @property
    def establishments(self) -> int:
        return self.listeners.counters["ok"]

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        self.cookies.update(field.value for field in Packet.decode(data).of_type(FieldType.COOKIE))
        for octets in self.before(data):
            self.transport.sendto(octets, address)
        true = self.answer(data)
        if true is not None and not self.is_silent:
            self.transport.sendto(true, address)

    def answer(self, request: bytes) -> bytes | None:
        """What is true."""

        def now() -> int:
            return time.time_ns() + self.offset

        server = NtpServer(self.keyring, secrets.token_bytes)
        action = server.respond(request, received=now(), transmit_time=now, clock=self.clock)
        return action.octets if isinstance(action, Reply) else None

    def kiss(self, code: bytes) -> Answers:
        """An authentic kiss for a request; nothing for one whose cookie does not open."""

        def answers(request: bytes) -> list[bytes]:
            asked = Packet.decode(request)
            try:
                keys = self.keyring.open(asked.of_type(FieldType.COOKIE)[0].value)
            except NotAuthentic:
                return []
            cookie = self.keyring.seal(keys, secrets.token_bytes(16))
            hidden = encode_fields([Field(FieldType.COOKIE, cookie)])
            nonce = secrets.token_bytes(NONCE_LENGTH[keys.aead])
            return [protect(forged_kiss(request, code), hidden, Aead(keys.aead, keys.s2c), nonce)]

        return answers


def forged_kiss(request: bytes, code: bytes) -> bytes:
    """What anybody who has seen a request can answer."""
    asked = Packet.decode(request)
    header = Header(mode=Mode.SERVER, stratum=0, reference_id=code, origin=asked.header.transmit)
    return header.encode() + encode_fields(asked.of_type(FieldType.UNIQUE_IDENTIFIER))
