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
    ClockState,
    Field,
    FieldType,
    Header,
    Leap,
    Mode,
    Packet,
    encode_fields,
    has_legacy_mac,
    seal,
)

_SERVED_VERSIONS = (3, 4)
# Section 5.3 asks for 32 octets; NTPsec sends them too, and refuses more than 64.
_MIN_UNIQUE_IDENTIFIER = 32
# What an answer holds besides the echoed identifier and the cookies.
_FIXED = HEADER_LENGTH + Authenticator.length(NONCE_LENGTH, 0)
_NTSN = ClockState(Leap.UNSYNCHRONISED, 0, 0, 0, 0, b"NTSN", 0)


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
            packet = Packet.decode(datagram, header)
        except WireError:
            return Drop(Outcome.MALFORMED)

        def answer() -> bytes:
            transmit = ntptime.timestamp(transmit_time())
            return clock.answer(header, ntptime.timestamp(received), transmit)

        if packet.authenticator is None and not packet.of_type(FieldType.COOKIE):
            return _plain(packet, answer)
        return self._authenticated(packet, datagram, answer)

    def _authenticated(self, packet: Packet, datagram: bytes, answer: Callable[[], bytes]) -> Reply | Drop:
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
            return _negative_acknowledgement(identifiers[0], packet.header)
        slots = 1 + _placeholders((*packet.fields, *hidden), len(cookies[0].value))
        return self._time(keys, identifiers[0].encode(), min(slots, MAX_COOKIES), len(datagram), answer)

    def _time(
        self, keys: SessionKeys, echo: bytes, wanted: int, limit: int, answer: Callable[[], bytes]
    ) -> Reply | Drop:
        cookie = self._cookie(keys)
        count = min(wanted, (limit - _FIXED - len(echo)) // len(cookie))
        if count < 1:
            return Drop(Outcome.TOO_SHORT_FOR_ANSWER)
        hidden = b"".join((cookie, *(self._cookie(keys) for _ in range(count - 1)))) if count > 1 else cookie
        aead, nonce = Aead(keys.s2c), self._random(NONCE_LENGTH)
        return Reply(seal(answer() + echo, hidden, aead, nonce), Outcome.NTS_TIME)

    def _cookie(self, keys: SessionKeys) -> bytes:
        return Field(FieldType.COOKIE, self.keyring.seal(keys, self._random)).encode()


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


def _plain(packet: Packet, answer: Callable[[], bytes]) -> Reply:
    """Unauthenticated time; a unique identifier is echoed, which protects even plain NTP from spoofing."""
    echo = encode_fields(packet.of_type(FieldType.UNIQUE_IDENTIFIER)[:1])
    return Reply(answer() + echo, Outcome.TIME)


def _negative_acknowledgement(identifier: Field, request: Header) -> Reply:
    """NTS NAK: stratum 0 and the kiss code NTSN, protected by nothing (section 5.7)."""
    header = _NTSN.answer(request, request.transmit, request.transmit)
    return Reply(header + identifier.encode(), Outcome.NTSN)
