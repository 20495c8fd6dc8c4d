"""NTS-KE records (RFC 8915 section 4).

     0                   1                   2                   3
    |C|        Record Type          |          Body Length          |
    .                                                               .
    .                          Record Body                          .

Rules: a message ends with End of Message and nothing may follow it; no message is longer than its limit;
record types that nobody assigned stay numbers, so that nothing unknown is lost.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from nts_core.errors import WireError
from nts_core.wire import uint16, uint16_list

# A server MUST accept 1,024 octets (section 4); chrony takes 16 KiB, and so do we.
MAX_REQUEST = 16 * 1024
# A client SHOULD accept 65,536 octets (section 4).
MAX_RESPONSE = 64 * 1024
_CRITICAL = 0x8000


class RecordType(IntEnum):
    """Assigned record types (section 7.6), and the one that chrony 4.6.1 brought and others took over.

    An empty record 1024 says: AES-128-GCM-SIV keys are exported as section 5.1 demands, and not under the
    context of AES-SIV-CMAC-256, as chrony 4.4 to 4.6 did.
    """

    END_OF_MESSAGE = 0
    NEXT_PROTOCOL = 1
    ERROR = 2
    WARNING = 3
    AEAD_ALGORITHM = 4
    NEW_COOKIE = 5
    NTP_SERVER = 6
    NTP_PORT = 7
    COMPLIANT_128GCM_EXPORT = 1024


class ErrorCode(IntEnum):
    """Codes of the Error record (section 4.1.3)."""

    UNRECOGNIZED_CRITICAL_RECORD = 0
    BAD_REQUEST = 1
    INTERNAL_SERVER_ERROR = 2


@dataclass(frozen=True, slots=True)
class Record:
    """One record; `type` is a plain number, comparable with RecordType."""

    type: int
    body: bytes = b""
    critical: bool = False

    def encode(self) -> bytes:
        return uint16(self.type | (_CRITICAL if self.critical else 0)) + uint16(len(self.body)) + self.body


def encode(records: Iterable[Record]) -> bytes:
    """A whole message; the caller's last record is End of Message."""
    return b"".join(record.encode() for record in records)


class MessageReader:
    """Collects octets until a whole message is there; knows nothing of what the records mean."""

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._limit = limit
        self._buffer = bytearray()
        self._records: list[Record] = []

    def receive(self, octets: bytes) -> tuple[Record, ...] | None:
        """The message without its End of Message record, or None while octets are missing.

        Raises WireError when the limit is passed, when octets follow the end, or when End of Message has a
        body or lacks its critical bit (section 4.1.1).
        """
        self._left -= len(octets)
        if self._left < 0:
            raise WireError(f"a message longer than {self._limit} octets")
        self._buffer += octets
        while (record := self._next()) is not None:
            if record.type == RecordType.END_OF_MESSAGE:
                if record.body or not record.critical:
                    raise WireError("End of Message has a body or is not critical")
                if self._buffer:
                    raise WireError("octets after End of Message")
                return tuple(self._records)
            self._records.append(record)
        return None

    def _next(self) -> Record | None:
        if len(self._buffer) < 4:
            return None
        head, length = uint16_list(self._buffer[:4])
        if len(self._buffer) < 4 + length:
            return None
        body = bytes(self._buffer[4 : 4 + length])
        del self._buffer[: 4 + length]
        return Record(head & ~_CRITICAL, body, critical=bool(head & _CRITICAL))
