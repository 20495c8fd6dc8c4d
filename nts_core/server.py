"""What an NTP server answers to one datagram (RFC 5905, RFC 8915 section 5.7); stateless.

Rules:

1. Mode 3 only is answered, whatever else the packet says: two servers never talk to each other.
2. An answer is never longer than its request.
3. Whatever the answer costs is bounded before any cryptography: at most eight cookies are counted.
4. NTSN is sent only to a packet that had a unique identifier, a cookie and an authenticator.
5. Cookies are sealed before the transmit time is taken, and the authenticator after it, as it must be.
6. What is not answered is a `Drop` with its reason, for a counter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from nts_core import ntptime
from nts_core.aead import NONCE_LENGTH, Aead, SessionKeys
from nts_core.cookies import MAX_COOKIES, Keyring, Random
from nts_core.errors import NotAuthentic, WireError
from nts_core.packet import (
    HEADER_LENGTH,
    Authenticator,
    Field,
    FieldType,
    Header,
    Leap,
    Mode,
    Packet,
    encode_fields,
    has_legacy_mac,
    protect,
    server_header,
)

_SERVED_VERSIONS = (3, 4)
# Section 5.3 asks for 32 octets; NTPsec sends them too, and refuses more than 64.
_MIN_UNIQUE_IDENTIFIER = 32


class Outcome(StrEnum):
    """What became of a datagram; the label of a counter."""

    TIME = "time"
    NTS_TIME = "nts-time"
    NTSN = "ntsn"
    MALFORMED = "malformed"
    MODE = "mode"
    VERSION = "version"
    LEGACY_MAC = "legacy-mac"
    INCOMPLETE_NTS = "incomplete-nts"
    TOO_SHORT_FOR_ANSWER = "too-short-for-answer"


@dataclass(frozen=True, slots=True)
class ClockState:
    """What the server says of its clock: short-format distances, a timestamp, four octets of reference id."""

    leap: Leap
    stratum: int
    precision: int
    root_delay: int
    root_dispersion: int
    reference_id: bytes
    reference: int

    def header(self) -> Header:
        return Header(
            leap=self.leap,
            stratum=self.stratum,
            precision=self.precision,
            root_delay=self.root_delay,
            root_dispersion=self.root_dispersion,
            reference_id=self.reference_id,
            reference=self.reference,
        )


@dataclass(frozen=True, slots=True)
class Reply:
    octets: bytes
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Drop:
    outcome: Outcome


class NtpServer:
    """Answers datagrams with the cookies of one keyring."""

    def __init__(self, keyring: Keyring, random: Random) -> None:
        self.keyring = keyring
        self._random = random

    def respond(
        self, datagram: bytes, *, received: int, transmit_time: Callable[[], int], clock: ClockState
    ) -> Reply | Drop:
        """The reply to one datagram.

        `received` and what `transmit_time` returns are Unix nanoseconds; `transmit_time` is called once, as
        late as the authenticator allows.
        """
        try:
            header = Header.decode(datagram)
        except WireError:
            return Drop(Outcome.MALFORMED)
        if header.mode != Mode.CLIENT:
            return Drop(Outcome.MODE)
        if header.version not in _SERVED_VERSIONS:
            return Drop(Outcome.VERSION)
        if has_legacy_mac(datagram):
            return Drop(Outcome.LEGACY_MAC)
        try:
            packet = Packet.decode(datagram)
        except WireError:
            return Drop(Outcome.MALFORMED)
        times = _Times(header, ntptime.timestamp(received), transmit_time, clock.header())
        if packet.authenticator is None and not packet.of_type(FieldType.COOKIE):
            return _plain(packet, times)
        return self._authenticated(packet, datagram, times)

    def _authenticated(self, packet: Packet, datagram: bytes, times: "_Times") -> Reply | Drop:
        identifiers = packet.of_type(FieldType.UNIQUE_IDENTIFIER)
        cookies = packet.of_type(FieldType.COOKIE)
        if (
            packet.header.version != 4
            or packet.authenticator is None
            or len(cookies) != 1
            or len(identifiers) != 1
            or len(identifiers[0].value) < _MIN_UNIQUE_IDENTIFIER
        ):
            return Drop(Outcome.INCOMPLETE_NTS)
        if not Authenticator.leaves_room(packet.authenticator.value):
            return Drop(Outcome.MALFORMED)
        try:
            keys = self.keyring.open(cookies[0].value)
            hidden = packet.decrypt(datagram, Aead(keys.c2s))
        except NotAuthentic:
            return _negative_acknowledgement(identifiers[0], times)
        slots = 1 + _placeholders((*packet.fields, *hidden), len(cookies[0].value))
        return self._time(keys, identifiers[0], min(slots, MAX_COOKIES), len(datagram), times)

    def _time(
        self, keys: SessionKeys, identifier: Field, wanted: int, limit: int, times: "_Times"
    ) -> Reply | Drop:
        echo = identifier.encode()
        cookie = Field(FieldType.COOKIE, self.keyring.seal(keys, self._random))
        cookie_length = len(cookie.encode())
        fixed = HEADER_LENGTH + len(echo) + Authenticator.length(NONCE_LENGTH, 0)
        count = min(wanted, (limit - fixed) // cookie_length)
        if count < 1:
            return Drop(Outcome.TOO_SHORT_FOR_ANSWER)
        sealed = (
            cookie,
            *(Field(FieldType.COOKIE, self.keyring.seal(keys, self._random)) for _ in range(count - 1)),
        )
        aead, nonce = Aead(keys.s2c), self._random(NONCE_LENGTH)
        return Reply(protect(times.header() + echo, sealed, aead, nonce), Outcome.NTS_TIME)


@dataclass(frozen=True, slots=True)
class _Times:
    """The request's header and what it takes to answer it once everything else is ready."""

    request: Header
    received: int
    transmit_time: Callable[[], int]
    template: Header

    def header(self) -> bytes:
        transmit = ntptime.timestamp(self.transmit_time())
        return server_header(self.request, self.template, self.received, transmit).encode()


def _placeholders(fields: tuple[Field, ...], length: int) -> int:
    """How many more cookies are asked for. Placeholders of another length than the cookie do not count:
    section 5.5 demands the same length, and only that keeps the answer from being longer.
    """
    count = 0
    for field in fields:
        if field.type == FieldType.COOKIE_PLACEHOLDER and len(field.value) == length:
            count += 1
            if count == MAX_COOKIES:
                break
    return count


def _plain(packet: Packet, times: _Times) -> Reply:
    """Unauthenticated time; a unique identifier is echoed, which protects even plain NTP from spoofing."""
    echo = encode_fields(packet.of_type(FieldType.UNIQUE_IDENTIFIER)[:1])
    return Reply(times.header() + echo, Outcome.TIME)


def _negative_acknowledgement(identifier: Field, times: _Times) -> Reply:
    """NTS NAK: stratum 0 and the kiss code NTSN, protected by nothing (section 5.7)."""
    kiss = Header(leap=Leap.UNSYNCHRONISED, stratum=0, reference_id=b"NTSN")
    header = server_header(times.request, kiss, times.request.transmit, times.request.transmit)
    return Reply(header.encode() + identifier.encode(), Outcome.NTSN)
