"""What an NTP server answers to one datagram (RFC 5905, RFC 8915 section 5.7); stateless.

Rules:

1. Mode 3 only is answered, whatever else the packet says: two servers never talk to each other.
2. An answer is never longer than its request.
3. Whatever the answer costs is bounded before any cryptography: at most eight cookies are made.
4. NTSN is sent only to a packet that had a unique identifier, a cookie and an authenticator.
5. Cookies are sealed before the transmit time is taken, and the authenticator after it, as it must be.
6. What is not answered is a `Drop` with its reason, for a counter.
"""

import struct
from collections import Counter
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import NamedTuple

from nts_core import ntptime
from nts_core.aead import NONCE_LENGTH, Aead, SessionKeys
from nts_core.cookies import MAX_COOKIES, Keyring, Random, cookie_length
from nts_core.cookies import NONCE_LENGTH as COOKIE_NONCE_LENGTH
from nts_core.errors import NotAuthentic, WireError
from nts_core.packet import (
    HEADER_LENGTH,
    MAX_DATAGRAM,
    Authenticator,
    ClockState,
    Field,
    FieldType,
    Leap,
    Mode,
    encode_field,
    has_legacy_mac,
    open_hidden,
    parse_fields,
    protect,
)

_SERVED_VERSIONS = (3, 4)
# Section 5.3 asks for 32 octets; NTPsec sends them too, and refuses more than 64.
_MIN_UNIQUE_IDENTIFIER = 32
# Looking a member of an enumeration up takes longer than comparing with it.
_CLIENT = Mode.CLIENT.value
_UNIQUE_IDENTIFIER = FieldType.UNIQUE_IDENTIFIER.value
_COOKIE = FieldType.COOKIE.value
_PLACEHOLDER = FieldType.COOKIE_PLACEHOLDER.value
_AUTHENTICATOR = FieldType.AUTHENTICATOR.value


class Kiss(StrEnum):
    """Kiss codes that a server may answer with instead of the time (RFC 5905 section 7.4)."""

    RATE = "RATE"
    DENY = "DENY"
    NTSN = "NTSN"

    @property
    def state(self) -> ClockState:
        """What the header says: no clock at all, and the code where the reference id stands."""
        return ClockState(Leap.UNSYNCHRONISED, 0, 0, 0, 0, self.encode("ascii"), 0)


class Outcome(StrEnum):
    """What became of a datagram; the label of a counter."""

    TIME = "time"
    NTS_TIME = "nts-time"
    NTSN = "ntsn"
    KISS_RATE = "kiss-rate"
    KISS_DENY = "kiss-deny"
    MALFORMED = "malformed"
    MODE = "mode"
    VERSION = "version"
    LEGACY_MAC = "legacy-mac"
    INCOMPLETE_NTS = "incomplete-nts"
    TOO_SHORT_FOR_ANSWER = "too-short-for-answer"


_KISS_OUTCOME = {Kiss.RATE: Outcome.KISS_RATE, Kiss.DENY: Outcome.KISS_DENY}


class Reply(NamedTuple):
    octets: bytes
    outcome: Outcome


class Drop(NamedTuple):
    outcome: Outcome


# Encodes the header of the answer, as late as can be: it holds the transmit time.
_Head = Callable[[], bytes]


class NtpServer:
    """Answers datagrams with the cookies of one keyring."""

    def __init__(self, keyring: Keyring, random: Random) -> None:
        self.keyring = keyring
        self._random = random
        # Cookies of authentic requests by the role of their key, and cookies in answers.
        self.opened: Counter[str] = Counter()
        self.sealed = 0

    def respond(
        self,
        datagram: bytes,
        *,
        received: int,
        transmit_time: Callable[[], int],
        clock: ClockState,
        kiss: Kiss | None = None,
    ) -> Reply | Drop:
        """The reply to one datagram.

        `received` and what `transmit_time` returns are Unix nanoseconds; `transmit_time` is called once, as
        late as the authenticator allows. With `kiss` the answer has this code instead of the time, and to an
        NTS request it is authentic and brings new cookies all the same (section 5.7).
        """
        request = _read(datagram)
        if isinstance(request, Drop):
            return request

        def head() -> bytes:
            if kiss is not None:
                return _kiss(kiss, request)
            times = (ntptime.timestamp(received), ntptime.timestamp(transmit_time()))
            return clock.answer(request.version, request.poll, request.transmit, *times)

        if request.authenticator is None and not request.cookies:
            outcome = Outcome.TIME if kiss is None else _KISS_OUTCOME[kiss]
            return Reply(head() + _echo(datagram, request.identifiers), outcome)
        outcome = Outcome.NTS_TIME if kiss is None else _KISS_OUTCOME[kiss]
        return self._authenticated(request, datagram, head, outcome)

    def _authenticated(
        self, request: "_Request", datagram: bytes, head: _Head, outcome: Outcome
    ) -> Reply | Drop:
        authenticator, identifiers = request.authenticator, request.identifiers
        if (
            request.version != 4
            or authenticator is None
            or len(request.cookies) != 1
            or len(identifiers) != 1
            or len(identifiers[0].value) < _MIN_UNIQUE_IDENTIFIER
        ):
            return Drop(Outcome.INCOMPLETE_NTS)
        echo, cookie = _echo(datagram, identifiers), request.cookies[0].value
        try:
            sealed = Authenticator.decode(authenticator.value)
            keys = self.keyring.open(cookie)
            if not sealed.leaves_room(authenticator.value, NONCE_LENGTH[keys.aead]):
                return Drop(Outcome.MALFORMED)
            hidden = open_hidden(sealed, datagram[: authenticator.start], Aead(keys.aead, keys.c2s))
        except WireError:
            return Drop(Outcome.MALFORMED)
        except NotAuthentic:
            # NTS NAK: protected by nothing, and only the identifier tells whom it answers (section 5.7).
            return Reply(_kiss(Kiss.NTSN, request) + echo, Outcome.NTSN)
        self.opened[self.keyring.role(cookie)] += 1
        # Placeholders of another length than the cookie do not count: section 5.5 demands the same length, and
        # only that keeps the answer from being longer.
        wanted = 1 + request.placeholders.count(len(cookie))
        if hidden:
            wanted += _sort(hidden)[2].count(len(cookie))
        octets = self._seal(keys, echo, wanted, len(datagram), head)
        return Drop(Outcome.TOO_SHORT_FOR_ANSWER) if octets is None else Reply(octets, outcome)

    def _seal(self, keys: SessionKeys, echo: bytes, wanted: int, limit: int, head: _Head) -> bytes | None:
        """The authentic answer with as many cookies as are wanted and fit; None when not even one does."""
        nonce_length, fixed, each = _LENGTHS[keys.aead]
        count = min(wanted, MAX_COOKIES, (limit - fixed - len(echo)) // each)
        if count < 1:
            return None
        random = self._random(nonce_length + count * COOKIE_NONCE_LENGTH)
        nonce = random[:nonce_length]
        cookies = self.keyring.seal_many(keys, random[nonce_length:])
        self.sealed += count
        hidden = b"".join([encode_field(_COOKIE, cookie) for cookie in cookies])
        aead = Aead(keys.aead, keys.s2c)
        return protect(head() + echo, hidden, aead, nonce)


# For each algorithm: the octets of a nonce, of an answer without its cookies and identifier, of a cookie's field.
_LENGTHS = {
    algorithm: (length, HEADER_LENGTH + Authenticator.length(length, 0), 4 + cookie_length(algorithm))
    for algorithm, length in NONCE_LENGTH.items()
}


class _Request(NamedTuple):
    """What a datagram asks for: of its header what the answer repeats, of placeholders their lengths."""

    version: int
    poll: int
    transmit: int
    identifiers: list[Field]
    cookies: list[Field]
    placeholders: list[int]
    authenticator: Field | None


# Leap, version and mode; the poll interval; the transmit timestamp: see `packet`.
_REQUEST = struct.Struct("!Bxb37xQ")


def _read(datagram: bytes) -> _Request | Drop:
    """One pass over a datagram."""
    if len(datagram) < HEADER_LENGTH or len(datagram) > MAX_DATAGRAM:
        return Drop(Outcome.MALFORMED)
    first, poll, transmit = _REQUEST.unpack_from(datagram)
    if first & 7 != _CLIENT:
        return Drop(Outcome.MODE)
    version = first >> 3 & 7
    if version not in _SERVED_VERSIONS:
        return Drop(Outcome.VERSION)
    if has_legacy_mac(datagram):
        return Drop(Outcome.LEGACY_MAC)
    try:
        fields = parse_fields(datagram, HEADER_LENGTH)
    except WireError:
        return Drop(Outcome.MALFORMED)
    authenticator = fields.pop() if fields and fields[-1].type == _AUTHENTICATOR else None
    return _Request(version, poll, transmit, *_sort(fields), authenticator)


def _sort(fields: Sequence[Field]) -> tuple[list[Field], list[Field], list[int]]:
    """Identifiers, cookies, and the lengths of placeholders; other fields are for others."""
    identifiers: list[Field] = []
    cookies: list[Field] = []
    placeholders: list[int] = []
    for field in fields:
        kind = field.type
        if kind == _UNIQUE_IDENTIFIER:
            identifiers.append(field)
        elif kind == _COOKIE:
            cookies.append(field)
        elif kind == _PLACEHOLDER:
            placeholders.append(len(field.value))
    return identifiers, cookies, placeholders


def _echo(datagram: bytes, identifiers: Sequence[Field]) -> bytes:
    """The first unique identifier as it came. It protects even plain NTP from spoofing off the path."""
    if not identifiers:
        return b""
    start = identifiers[0].start
    return datagram[start : start + 4 + len(identifiers[0].value)]


def _kiss(code: Kiss, request: _Request) -> bytes:
    """The header of a kiss-o'-death packet; its times are all the request's own."""
    return code.state.answer(request.version, request.poll, *[request.transmit] * 3)
