"""A client's side of one server (RFC 8915 section 5.7): one cookie a packet, one answer a request.

Rules:

1. A cookie is used once. Placeholders ask for as many as are missing to eight.
2. An answer is checked completely (identifier, origin, authenticator) before anything of it is kept.
3. Whatever is not the authentic answer changes nothing; only a deadline ends the wait.
4. The request's header says nothing of the client: its transmit timestamp is random (data minimisation).
"""

from dataclasses import dataclass

from nts_core import ntptime
from nts_core.aead import NONCE_LENGTH, Aead
from nts_core.cookies import MAX_COOKIES, CookieJar, Random
from nts_core.errors import KissOfDeath, NotAuthentic, WireError
from nts_core.ke import KeResult
from nts_core.packet import (
    Authenticator,
    Field,
    FieldType,
    Header,
    Leap,
    Mode,
    Packet,
    encode_field,
    encode_fields,
    protect,
)

_IDENTIFIER_LENGTH = 32
# The longest request, so that a path of IPv6's minimum MTU carries it with its headers.
MAX_REQUEST = 1232
_MAX_STRATUM = 15


@dataclass(frozen=True, slots=True)
class Sample:
    """One authenticated exchange; all durations in nanoseconds.

    `offset` is server minus client. `cookies` is how many came back, `asked` how many were asked for.
    """

    offset: int
    delay: int
    stratum: int
    leap: int
    root_delay: int
    root_dispersion: int
    precision: int
    reference_id: bytes
    cookies: int
    asked: int

    @property
    def synchronised(self) -> bool:
        return self.leap != Leap.UNSYNCHRONISED and 1 <= self.stratum <= _MAX_STRATUM

    @property
    def root_distance(self) -> int:
        """Half the way to the reference clock and back, with its errors (RFC 5905 section 11.1)."""
        return (self.root_delay + self.delay) // 2 + self.root_dispersion


@dataclass(frozen=True, slots=True)
class _Request:
    identifier: bytes
    transmit: int
    asked: int


class Association:
    """Session keys and cookies for one server, and the one request that is under way."""

    def __init__(self, established: KeResult, random: Random) -> None:
        keys = established.keys
        self._c2s = Aead(keys.aead, keys.c2s)
        self._s2c = Aead(keys.aead, keys.s2c)
        self._nonce_length = NONCE_LENGTH[keys.aead]
        self._random = random
        self._pending: _Request | None = None
        self.jar = CookieJar(established.cookies)

    def poll(self) -> bytes:
        """The next request, which uses up a cookie and replaces a request under way.

        Raises OutOfCookies when key establishment has to run again.
        """
        cookie = self.jar.take()
        field = Field(FieldType.COOKIE, cookie)
        placeholder = encode_field(FieldType.COOKIE_PLACEHOLDER, bytes(len(cookie)))
        identifier = self._random(_IDENTIFIER_LENGTH)
        transmit = int.from_bytes(self._random(8), "big")
        clear = Header(transmit=transmit).encode()
        clear += encode_fields((Field(FieldType.UNIQUE_IDENTIFIER, identifier), field))
        room = MAX_REQUEST - len(clear) - Authenticator.length(self._nonce_length, 0)
        missing = min(MAX_COOKIES - 1 - len(self.jar), max(room, 0) // len(placeholder))
        self._pending = _Request(identifier, transmit, missing + 1)
        return protect(clear + placeholder * missing, b"", self._c2s, self._random(self._nonce_length))

    def receive(self, datagram: bytes, *, sent: int, received: int) -> Sample:
        """The sample that an answer holds; `sent` and `received` are Unix nanoseconds of this clock.

        Raises NotAuthentic for everything that is not the answer (to be ignored while waiting on) and
        KissOfDeath for a kiss code that answers our request.
        """
        pending = self._pending
        if pending is None:
            raise NotAuthentic("no request is under way")
        packet = _parse(datagram)
        identifiers = packet.of_type(FieldType.UNIQUE_IDENTIFIER)
        if len(identifiers) != 1 or identifiers[0].value != pending.identifier:
            raise NotAuthentic("another unique identifier")
        header = packet.header
        if header.mode != Mode.SERVER or header.version != 4 or header.origin != pending.transmit:
            raise NotAuthentic("not an answer to our request")
        if packet.authenticator is None:
            if header.stratum == 0 and header.reference_id == b"NTSN":
                raise KissOfDeath("NTSN", authentic=False)
            raise NotAuthentic("an unprotected answer to a protected request")
        hidden = packet.decrypt(datagram, self._s2c)
        if header.stratum and not (header.receive and header.transmit):
            # RFC 5905 section 8: a time that is not there must not be taken for one.
            raise NotAuthentic("an answer without its times")
        self._pending = None
        cookies = [field.value for field in hidden if field.type == FieldType.COOKIE][:MAX_COOKIES]
        for cookie in cookies:
            self.jar.add(cookie)
        if header.stratum == 0:
            raise KissOfDeath(_kiss_code(header.reference_id), authentic=True)
        return _sample(header, sent, received, len(cookies), pending.asked)


class Plain:
    """Requests of 48 octets without NTS. Anybody may have made the answer: only that one came counts."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._transmit = 0

    def poll(self) -> bytes:
        """The next request."""
        self._transmit = int.from_bytes(self._random(8), "big")
        return Header(transmit=self._transmit).encode()

    def receive(self, datagram: bytes, *, sent: int, received: int) -> Sample:
        """The sample of an answer, as `Association.receive` does. Raises NotAuthentic and KissOfDeath."""
        header = _parse(datagram).header
        if header.mode != Mode.SERVER or header.origin != self._transmit:
            raise NotAuthentic("not an answer to our request")
        if header.stratum == 0:
            raise KissOfDeath(_kiss_code(header.reference_id), authentic=False)
        return _sample(header, sent, received, 0, 0)


def _kiss_code(reference_id: bytes) -> str:
    """Four letters or digits as RFC 5905 has them; whatever else a server sends, in hexadecimal."""
    code = reference_id.rstrip(b"\0").decode("ascii", "replace")
    return code if code.isascii() and code.isalnum() else reference_id.hex()


def _parse(datagram: bytes) -> Packet:
    try:
        return Packet.decode(datagram)
    except WireError as error:
        raise NotAuthentic(f"not an NTP packet: {error}") from None


def _sample(header: Header, sent: int, received: int, cookies: int, asked: int) -> Sample:
    """Offset and delay of the four times (RFC 5905 section 8)."""
    forth = ntptime.difference(header.receive, ntptime.timestamp(sent))
    back = ntptime.difference(header.transmit, ntptime.timestamp(received))
    server_took = ntptime.difference(header.transmit, header.receive)
    return Sample(
        offset=(forth + back) // 2,
        delay=max(received - sent - server_took, 0),
        stratum=header.stratum,
        leap=header.leap,
        root_delay=ntptime.short_ns(header.root_delay),
        root_dispersion=ntptime.short_ns(header.root_dispersion),
        precision=header.precision,
        reference_id=header.reference_id,
        cookies=cookies,
        asked=asked,
    )
