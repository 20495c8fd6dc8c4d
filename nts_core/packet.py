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

from nts_core.aead import NONCE_LENGTH, TAG_LENGTH, Aead
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


@dataclass(frozen=True, slots=True)
class Header:
    """The 48 octets that every packet begins with; delays and dispersions in the short format."""

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
        first, *rest = _HEADER.unpack_from(datagram)
        version = first >> 3 & 7
        if not 1 <= version <= 4:
            raise WireError(f"NTP version {version}")
        return cls(first >> 6, version, first & 7, *rest)


class Field(NamedTuple):
    """One extension field; `start` is where it begins in what it was parsed from.

    Not a dataclass, as every packet makes several and a tuple is made in half the time.
    """

    type: int
    value: bytes
    start: int = 0

    def encode(self) -> bytes:
        value = pad4(self.value)
        if len(value) < MIN_FIELD - 4:
            value = value.ljust(MIN_FIELD - 4, b"\0")
        return _PAIR.pack(self.type, 4 + len(value)) + value


def encode_fields(fields: Iterable[Field]) -> bytes:
    return b"".join(field.encode() for field in fields)


def parse_fields(octets: bytes, start: int = 0, *, shortest: int = MIN_FIELD) -> list[Field]:
    """The extension fields from `start` to the end; WireError unless they fill it exactly."""
    fields: list[Field] = []
    total = len(octets)
    while start < total:
        if total - start < shortest:
            raise WireError(f"{total - start} octets after the last extension field")
        kind, length = _PAIR.unpack_from(octets, start)
        end = start + length
        if length < shortest or length % 4 or end > total:
            raise WireError(f"an extension field of {length} octets")
        fields.append(Field(kind, octets[start + 4 : end], start))
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
        middle = _PAIR.size + nonce_length + -nonce_length % 4
        if middle + ciphertext_length + -ciphertext_length % 4 > len(value):
            raise WireError(
                f"a nonce of {nonce_length} and a ciphertext of {ciphertext_length} octets do not fit"
            )
        nonce = value[_PAIR.size : _PAIR.size + nonce_length]
        return cls(nonce, value[middle : middle + ciphertext_length])

    @staticmethod
    def leaves_room(value: bytes) -> bool:
        """Whether nonce and additional padding have room for a server's nonce (section 5.6)."""
        ciphertext_length = int.from_bytes(value[2:4], "big")
        return len(value) - 4 - ciphertext_length - -ciphertext_length % 4 >= NONCE_LENGTH

    def field(self) -> Field:
        lengths = _PAIR.pack(len(self.nonce), len(self.ciphertext))
        return Field(FieldType.AUTHENTICATOR, lengths + pad4(self.nonce) + pad4(self.ciphertext))

    @staticmethod
    def length(nonce_length: int, plaintext_length: int) -> int:
        """Octets of the whole field for a nonce and a plaintext of these lengths."""
        return 8 + nonce_length + -nonce_length % 4 + TAG_LENGTH + plaintext_length + -plaintext_length % 4


def protect(clear: bytes, encrypted: Iterable[Field], aead: Aead, nonce: bytes) -> bytes:
    """`clear` (header and fields) with the authenticator behind it, which also hides `encrypted`."""
    return seal(clear, encode_fields(encrypted), aead, nonce)


def seal(clear: bytes, hidden: bytes, aead: Aead, nonce: bytes) -> bytes:
    """The same for fields that are encoded already."""
    return clear + Authenticator(nonce, aead.seal(nonce, hidden, clear)).field().encode()


@dataclass(frozen=True, slots=True)
class Packet:
    """A parsed datagram. Fields after the authenticator are not authentic and left out (section 5.7)."""

    header: Header
    fields: tuple[Field, ...]
    authenticator: Field | None

    @classmethod
    def decode(cls, datagram: bytes, header: Header | None = None) -> "Packet":
        """Raises WireError for a datagram that is too long or not well-formed.

        `header` is the datagram's own, from a caller that has decoded it already.
        """
        if len(datagram) > MAX_DATAGRAM:
            raise WireError(f"a datagram of {len(datagram)} octets")
        header = header or Header.decode(datagram)
        fields = parse_fields(datagram, HEADER_LENGTH)
        for position, field in enumerate(fields):
            if field.type == FieldType.AUTHENTICATOR:
                return cls(header, tuple(fields[:position]), field)
        return cls(header, tuple(fields), None)

    def of_type(self, kind: FieldType) -> list[Field]:
        return [field for field in self.fields if field.type == kind]

    def decrypt(self, datagram: bytes, aead: Aead) -> list[Field]:
        """The encrypted fields, once the whole packet has been found authentic; NotAuthentic if it is not."""
        if self.authenticator is None:
            raise NotAuthentic("no authenticator")
        try:
            body = Authenticator.decode(self.authenticator.value)
            plaintext = aead.open(body.nonce, body.ciphertext, datagram[: self.authenticator.start])
            # Encrypted fields may be arbitrarily short (section 5.6).
            return parse_fields(plaintext, shortest=4)
        except WireError as error:
            raise NotAuthentic(f"a malformed authenticator: {error}") from None


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

    def answer(self, request: Header, receive: int, transmit: int) -> bytes:
        """The header that answers `request`, encoded: these facts with the four times in place."""
        return _HEADER.pack(
            self.leap << 6 | request.version << 3 | Mode.SERVER,
            self.stratum,
            request.poll,
            self.precision,
            self.root_delay,
            self.root_dispersion,
            self.reference_id,
            self.reference,
            request.transmit,
            receive,
            transmit,
        )
