"""NTP packets and their extension fields (RFC 5905 section 7.3, RFC 7822, RFC 8915 section 5).

     0                   1                   2                   3
    |LI | VN  |Mode |    Stratum    |     Poll      |   Precision   |
    |                          Root Delay                           |
    |                       Root Dispersion                         |
    |                         Reference ID                          |
    |                    Reference Timestamp (64)                   |
    |                      Origin Timestamp (64)                    |
    |                     Receive Timestamp (64)                    |
    |                     Transmit Timestamp (64)                   |
    |        Field Type             |        Field Length           |   extension field, any number
    .                            Value, padded                      .

Timestamps are plain 64-bit integers here; `ntptime` knows what they mean.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from nts_core.aead import TAG_LENGTH, Aead
from nts_core.errors import NotAuthentic, WireError
from nts_core.wire import pad4

HEADER_LENGTH = 48
# The longest datagram that is looked at; a request with eight long cookies stays below.
MAX_DATAGRAM = 2048
# RFC 7822 section 7.5.1.1: no field is shorter than 16 octets.
MIN_FIELD = 16
# A key id and an MD5 or SHA-1 digest: what follows the header of a packet with a legacy MAC.
_LEGACY_MAC = (20, 24)
_HEADER = struct.Struct("!BBbbII4sQQQQ")
# Type and length of a field; also the two lengths that an authenticator begins with.
_PAIR = struct.Struct("!HH")
_AUTHENTICATOR_HEAD = struct.Struct("!HHHH")


class Mode(IntEnum):
    CLIENT = 3
    SERVER = 4


class Leap(IntEnum):
    """The leap indicator (RFC 5905 section 7.3)."""

    NONE = 0
    INSERT = 1
    DELETE = 2
    UNSYNCHRONISED = 3


class FieldType(IntEnum):
    """Extension fields of NTS (RFC 8915 section 7.7)."""

    UNIQUE_IDENTIFIER = 0x0104
    COOKIE = 0x0204
    COOKIE_PLACEHOLDER = 0x0304
    AUTHENTICATOR = 0x0404


# Looking a member of an enumeration up takes longer than comparing with it.
_AUTHENTICATOR = FieldType.AUTHENTICATOR.value
_SERVER = Mode.SERVER.value


class Header(NamedTuple):
    """The 48 octets that every packet begins with; delays and dispersions in the short format.

    Like the other values that every packet makes, a tuple: it is made in half the time of a dataclass.
    """

    leap: int = 0
    version: int = 4
    mode: int = Mode.CLIENT
    stratum: int = 0
    poll: int = 0
    precision: int = 0
    root_delay: int = 0
    root_dispersion: int = 0
    reference_id: bytes = bytes(4)
    reference: int = 0
    origin: int = 0
    receive: int = 0
    transmit: int = 0

    def encode(self) -> bytes:
        return _HEADER.pack(
            self.leap << 6 | self.version << 3 | self.mode,
            self.stratum,
            self.poll,
            self.precision,
            self.root_delay,
            self.root_dispersion,
            self.reference_id,
            self.reference,
            self.origin,
            self.receive,
            self.transmit,
        )

    @classmethod
    def decode(cls, datagram: bytes) -> "Header":
        """The header of a datagram; WireError when it is too short or its version is not 1 to 4."""
        if len(datagram) < HEADER_LENGTH:
            raise WireError(f"a datagram of {len(datagram)} octets")
        rest = _HEADER.unpack_from(datagram)
        first = rest[0]
        version = first >> 3 & 7
        if not 1 <= version <= 4:
            raise WireError(f"NTP version {version}")
        return cls._make((first >> 6, version, first & 7, *rest[1:]))


class Field(NamedTuple):
    """One extension field; `start` is where it begins in what it was parsed from."""

    type: int
    value: bytes
    start: int = 0

    def encode(self) -> bytes:
        return encode_field(self.type, self.value)


def encode_field(kind: int, value: bytes) -> bytes:
    """A field with its padding, and never shorter than RFC 7822 allows."""
    length = len(value)
    if length % 4 or length < MIN_FIELD - 4:
        value = pad4(value).ljust(MIN_FIELD - 4, b"\0")
        length = len(value)
    return _PAIR.pack(kind, 4 + length) + value


def encode_fields(fields: Iterable[Field]) -> bytes:
    return b"".join(field.encode() for field in fields)


def parse_fields(octets: bytes, start: int = 0, *, shortest: int = MIN_FIELD) -> list[Field]:
    """The extension fields from `start` to the end or up to an authenticator, which is then the last.

    What follows an authenticator is not authentic, and not looked at (RFC 8915 section 5.7). WireError unless
    the fields fill the room exactly.
    """
    fields: list[Field] = []
    total = len(octets)
    while start < total:
        if total - start < shortest:
            raise WireError(f"{total - start} octets after the last extension field")
        kind, length = _PAIR.unpack_from(octets, start)
        end = start + length
        if length < shortest or length & 3 or end > total:
            raise WireError(f"an extension field of {length} octets")
        fields.append(Field(kind, octets[start + 4 : end], start))
        if kind == _AUTHENTICATOR:
            break
        start = end
    return fields


def has_legacy_mac(datagram: bytes) -> bool:
    """Whether the header is followed by nothing but a symmetric-key MAC, which we do not speak."""
    return len(datagram) - HEADER_LENGTH in _LEGACY_MAC


class Authenticator(NamedTuple):
    """The body of the NTS Authenticator and Encrypted Extension Fields field (section 5.6).

    |         Nonce Length          |      Ciphertext Length        |
    .                Nonce, padded to a word                        .
    .                Ciphertext, padded to a word                   .
    .                Additional padding                             .
    """

    nonce: bytes
    ciphertext: bytes

    @classmethod
    def decode(cls, value: bytes) -> "Authenticator":
        """Raises WireError when the two lengths do not fit the field."""
        if len(value) < _PAIR.size:
            raise WireError(f"an authenticator of {len(value)} octets")
        nonce_length, ciphertext_length = _PAIR.unpack_from(value)
        if not nonce_length:
            # No algorithm of ours takes an empty one (RFC 5297 section 6, RFC 8452 section 6).
            raise WireError("an authenticator without a nonce")
        middle = _PAIR.size + nonce_length + -nonce_length % 4
        if middle + ciphertext_length + -ciphertext_length % 4 > len(value):
            raise WireError(
                f"a nonce of {nonce_length} and a ciphertext of {ciphertext_length} octets do not fit"
            )
        nonce = value[_PAIR.size : _PAIR.size + nonce_length]
        return cls(nonce, value[middle : middle + ciphertext_length])

    def leaves_room(self, value: bytes, nonce_length: int) -> bool:
        """Whether nonce and additional padding of the field's `value` have room for a nonce of the server's,
        `nonce_length` octets (section 5.6).
        """
        return len(value) - _PAIR.size - _padded(len(self.ciphertext)) >= nonce_length

    def encode(self) -> bytes:
        """The whole field; a tag is longer than the shortest field."""
        nonce, ciphertext = pad4(self.nonce), pad4(self.ciphertext)
        length = _AUTHENTICATOR_HEAD.size + len(nonce) + len(ciphertext)
        head = (_AUTHENTICATOR, length, len(self.nonce), len(self.ciphertext))
        return _AUTHENTICATOR_HEAD.pack(*head) + nonce + ciphertext

    @staticmethod
    def length(nonce_length: int, plaintext_length: int) -> int:
        """Octets of the whole field for a nonce and a plaintext of these lengths."""
        return _AUTHENTICATOR_HEAD.size + _padded(nonce_length) + _padded(TAG_LENGTH + plaintext_length)


def _padded(length: int) -> int:
    return length + -length % 4


def protect(clear: bytes, hidden: bytes, aead: Aead, nonce: bytes) -> bytes:
    """`clear` (header and fields) with the authenticator behind it, which also hides the fields `hidden`."""
    return clear + Authenticator(nonce, aead.seal(nonce, hidden, clear)).encode()


class Packet(NamedTuple):
    """A parsed datagram. Fields after the authenticator are not authentic and left out (section 5.7)."""

    header: Header
    fields: list[Field]
    authenticator: Field | None

    @classmethod
    def decode(cls, datagram: bytes) -> "Packet":
        """Raises WireError for a datagram that is too long or not well-formed."""
        if len(datagram) > MAX_DATAGRAM:
            raise WireError(f"a datagram of {len(datagram)} octets")
        header = Header.decode(datagram)
        fields = parse_fields(datagram, HEADER_LENGTH)
        authenticator = fields.pop() if fields and fields[-1].type == _AUTHENTICATOR else None
        return cls(header, fields, authenticator)

    def of_type(self, kind: int) -> list[Field]:
        return [field for field in self.fields if field.type == kind]

    def decrypt(self, datagram: bytes, aead: Aead) -> list[Field]:
        """The encrypted fields, once the whole packet has been found authentic; NotAuthentic if it is not."""
        if self.authenticator is None:
            raise NotAuthentic("no authenticator")
        try:
            body = Authenticator.decode(self.authenticator.value)
            return open_hidden(body, datagram[: self.authenticator.start], aead)
        except WireError as error:
            raise NotAuthentic(f"a malformed authenticator: {error}") from None


def open_hidden(body: Authenticator, clear: bytes, aead: Aead) -> list[Field]:
    """The fields in an authenticator.

    Raises NotAuthentic unless it and `clear`, all before it, are authentic; WireError when they are, and what is
    hidden has no form.
    """
    plaintext = aead.open(body.nonce, body.ciphertext, clear)
    # Encrypted fields may be arbitrarily short (section 5.6).
    return parse_fields(plaintext, shortest=4) if plaintext else []


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

    def answer(self, version: int, poll: int, origin: int, receive: int, transmit: int) -> bytes:
        """The header that answers a request, encoded: these facts with its version, poll and the times."""
        return _HEADER.pack(
            self.leap << 6 | version << 3 | _SERVER,
            self.stratum,
            poll,
            self.precision,
            self.root_delay,
            self.root_dispersion,
            self.reference_id,
            self.reference,
            origin,
            receive,
            transmit,
        )
