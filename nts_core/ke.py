"""Key establishment (RFC 8915 sections 4 and 5.1) without sockets.

    client                                            server
      Next Protocol, AEAD Algorithm, End of Message  ->
      <-  Next Protocol, AEAD Algorithm, [NTP Server], [NTP Port], 8 x New Cookie, End of Message

One message each way. `KeServer` and `KeClient` are told plaintext and give plaintext; the TLS session lends them
its exporter. What the server decides is written down in one table of outcomes:

    request                                  answer
    unknown critical record                  Error 0
    malformed, missing, duplicate, misplaced Error 1
    no protocol in common                    empty Next Protocol record
    no AEAD algorithm in common              empty AEAD record
    silence until the deadline, or the end   Error 1
    anything, when we fail ourselves         Error 2
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address

from nts_core import records
from nts_core.aead import KEY_LENGTH, SUPPORTED, AeadId, SessionKeys
from nts_core.cookies import MAX_COOKIE_LENGTH, MAX_COOKIES, NONCE_LENGTH, Keyring, Random
from nts_core.errors import KeError, NoOverlap, WireError
from nts_core.records import ErrorCode, MessageReader, Record, RecordType
from nts_core.wire import uint16, uint16_list

NTPV4 = 0
DEFAULT_NTP_PORT = 123
KE_PORT = 4460

Exporter = Callable[[bytes, int], bytes]

# Records that both sides may send; a request must not carry others that are known (section 4.1).
_REQUEST_TYPES = frozenset(
    {
        RecordType.NEXT_PROTOCOL,
        RecordType.AEAD_ALGORITHM,
        RecordType.NTP_SERVER,
        RecordType.NTP_PORT,
        RecordType.COMPLIANT_128GCM_EXPORT,
    }
)
_KNOWN_TYPES = frozenset(RecordType)
# Letters, digits and hyphens, and the underscore that hosts have in practice; a last label of digits would be
# taken for an address.
_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST_NAME = re.compile(rf"({_LABEL}[.])*(?!\d+$){_LABEL}")
_MAX_HOST_NAME = 253


def export_keys(export: Exporter, aead: AeadId, context_id: AeadId | None = None) -> SessionKeys:
    """The session keys of a TLS session (section 5.1): context is protocol, algorithm, direction.

    `context_id` is the algorithm named in the context when it is not the one whose keys are made.
    """
    context = uint16(NTPV4) + uint16(aead if context_id is None else context_id)
    length = KEY_LENGTH[aead]
    return SessionKeys(aead, export(context + b"\x00", length), export(context + b"\x01", length))


def _export_as_chrony_4_4(export: Exporter) -> SessionKeys:
    """Keys of AES-128-GCM-SIV as chrony 4.4 to 4.6 make them: exported in the name of AES-SIV-CMAC-256."""
    return export_keys(export, AeadId.AES_128_GCM_SIV, AeadId.AES_SIV_CMAC_256)


class _RequestRefused(Exception):
    def __init__(self, answer: Sequence[Record]) -> None:
        self.answer = answer


def _error(code: ErrorCode) -> tuple[Record, ...]:
    return (Record(RecordType.ERROR, uint16(code), critical=True),)


def _message(body: Sequence[Record]) -> bytes:
    return records.encode((*body, Record(RecordType.END_OF_MESSAGE, critical=True)))


@dataclass(frozen=True, slots=True)
class KeReply:
    """What to send before closing; `outcome` is one word for the counters."""

    octets: bytes
    outcome: str


@dataclass(frozen=True, slots=True)
class NtpEndpoint:
    """Where NTP is served when it is not the KE server's address and port 123 (records 6 and 7)."""

    host: str | None = None
    port: int = DEFAULT_NTP_PORT

    def records(self) -> tuple[Record, ...]:
        # Critical, as chrony sends them: a client that ignored them would ask the wrong server.
        told: list[Record] = []
        if self.host is not None:
            told.append(Record(RecordType.NTP_SERVER, self.host.encode("ascii"), critical=True))
        if self.port != DEFAULT_NTP_PORT:
            told.append(Record(RecordType.NTP_PORT, uint16(self.port), critical=True))
        return tuple(told)


@dataclass(frozen=True, slots=True)
class NtpService:
    """Where NTP is served with our cookies: where clients are sent, and where else they may ask to go."""

    default: NtpEndpoint = NtpEndpoint()
    others: tuple[NtpEndpoint, ...] = ()

    def choose(self, host: str | None, port: int | None) -> NtpEndpoint:
        """The endpoint that a client asks for by records 6 and 7, if it is one of ours (section 4.1.7)."""
        for endpoint in (self.default, *self.others):
            if host in {None, endpoint.host} and port in {None, endpoint.port}:
                return endpoint
        return self.default


@dataclass(frozen=True, slots=True)
class KeTerms:
    """What a KE server gives: cookies of one keyring, for one service, under the algorithms it prefers.

    AES-SIV-CMAC-256 has to be among them (section 5.1); the first that a client offers is chosen.
    """

    keyring: Keyring
    service: NtpService = NtpService()
    preference: tuple[AeadId, ...] = SUPPORTED

    def __post_init__(self) -> None:
        self.check_preference(self.preference)

    @staticmethod
    def check_preference(preference: Sequence[AeadId]) -> None:
        """Raise ValueError for a preference that no server may have."""
        if AeadId.AES_SIV_CMAC_256 not in preference:
            raise ValueError("a server has to support 15 (AES-SIV-CMAC-256)")


class KeServer:
    """The server's side of one TLS session."""

    def __init__(self, terms: KeTerms, export: Exporter, random: Random) -> None:
        self._terms = terms
        self._export = export
        self._random = random
        self._reader = MessageReader(records.MAX_REQUEST)

    def receive(self, plaintext: bytes) -> KeReply | None:
        """The reply once the request is whole; None while octets are missing."""
        try:
            request = self._reader.receive(plaintext)
            if request is None:
                return None
            return KeReply(_message(self._answer(request)), "ok")
        except WireError:
            return KeReply(_message(_error(ErrorCode.BAD_REQUEST)), "bad-request")
        except _RequestRefused as refused:
            return KeReply(_message(refused.answer), _outcome(refused.answer))

    @staticmethod
    def timeout() -> KeReply:
        """The reply when the deadline passed before the request was whole (section 4.1.3)."""
        return KeReply(_message(_error(ErrorCode.BAD_REQUEST)), "timeout")

    @staticmethod
    def cut_short() -> KeReply:
        """The reply when the client said that it sends no more before its request was whole."""
        return KeReply(_message(_error(ErrorCode.BAD_REQUEST)), "cut-short")

    @staticmethod
    def internal_error() -> KeReply:
        """The reply when we failed by a fault of our own (section 4.1.3)."""
        return KeReply(_message(_error(ErrorCode.INTERNAL_SERVER_ERROR)), "internal-error")

    def _answer(self, request: Sequence[Record]) -> list[Record]:
        by_type = _sort_request(request)
        protocols = uint16_list(by_type[RecordType.NEXT_PROTOCOL].body)
        if not protocols:
            raise WireError("an empty list of protocols")
        if NTPV4 not in protocols:
            raise _RequestRefused((Record(RecordType.NEXT_PROTOCOL, critical=True),))
        aead_record = by_type.get(RecordType.AEAD_ALGORITHM)
        if aead_record is None:
            raise WireError("NTPv4 without an AEAD Algorithm Negotiation record")
        offered = uint16_list(aead_record.body)
        if not offered:
            raise WireError("an empty list of AEAD algorithms")
        next_protocol = Record(RecordType.NEXT_PROTOCOL, uint16(NTPV4), critical=True)
        is_compliant = RecordType.COMPLIANT_128GCM_EXPORT in by_type
        aead = _choose(self._terms.preference, offered, is_compliant=is_compliant)
        if aead is None:
            raise _RequestRefused((next_protocol, Record(RecordType.AEAD_ALGORITHM, critical=True)))
        told = [next_protocol, Record(RecordType.AEAD_ALGORITHM, uint16(aead), critical=True)]
        if aead != AeadId.AES_128_GCM_SIV:
            keys = export_keys(self._export, aead)
        elif is_compliant:
            told.append(Record(RecordType.COMPLIANT_128GCM_EXPORT))
            keys = export_keys(self._export, aead)
        else:
            keys = _export_as_chrony_4_4(self._export)
        wanted = _endpoint(by_type)
        endpoint = self._terms.service.choose(
            wanted.host, wanted.port if RecordType.NTP_PORT in by_type else None
        )
        cookies = self._terms.keyring.seal_many(keys, self._random(MAX_COOKIES * NONCE_LENGTH))
        return [*told, *endpoint.records(), *(Record(RecordType.NEW_COOKIE, cookie) for cookie in cookies)]


def _choose(preference: Sequence[AeadId], offered: Sequence[int], *, is_compliant: bool) -> AeadId | None:
    """The first of ours that is offered. AES-128-GCM-SIV without record 1024 comes last: only chrony 4.4 to
    4.6 is sure to mean by it what we then do.
    """
    shared = [algorithm for algorithm in preference if algorithm in offered]
    if not is_compliant:
        shared.sort(key=lambda algorithm: algorithm == AeadId.AES_128_GCM_SIV)
    return shared[0] if shared else None


def _sort_request(request: Sequence[Record]) -> dict[int, Record]:
    by_type: dict[int, Record] = {}
    for record in request:
        if record.type not in _KNOWN_TYPES:
            if record.critical:
                raise _RequestRefused(_error(ErrorCode.UNRECOGNIZED_CRITICAL_RECORD))
            continue
        if record.type not in _REQUEST_TYPES or record.type in by_type:
            raise WireError(f"record type {record.type} is misplaced or doubled")
        by_type[record.type] = record
    if RecordType.NEXT_PROTOCOL not in by_type:
        raise WireError("no Next Protocol Negotiation record")
    _check_compliance(by_type)
    return by_type


def _outcome(answer: Sequence[Record]) -> str:
    match answer[-1].type:
        case RecordType.NEXT_PROTOCOL:
            return "no-protocol"
        case RecordType.AEAD_ALGORITHM:
            return "no-aead"
        case _:
            return "unknown-critical"


@dataclass(frozen=True, slots=True)
class KeResult:
    """What a client takes away from key establishment.

    `alternative` are the keys that the server uses if it does not use `keys`: it chose AES-128-GCM-SIV and did
    not say how it exports. chrony 4.4 to 4.6 is behind `keys`, a server that knows nothing of record 1024 and
    follows section 5.1 behind `alternative`.
    """

    keys: SessionKeys = field(repr=False)
    cookies: tuple[bytes, ...] = field(repr=False)
    endpoint: NtpEndpoint = NtpEndpoint()
    alternative: SessionKeys | None = field(default=None, repr=False)


class KeClient:
    """The client's side of one TLS session."""

    def __init__(self, export: Exporter, offered: Sequence[AeadId] = SUPPORTED) -> None:
        self._export = export
        self._offered = tuple(offered)
        self._reader = MessageReader(records.MAX_RESPONSE)

    def request(self) -> bytes:
        """The only message a client sends."""
        algorithms = b"".join(uint16(aead) for aead in self._offered)
        asked = [
            Record(RecordType.NEXT_PROTOCOL, uint16(NTPV4), critical=True),
            Record(RecordType.AEAD_ALGORITHM, algorithms, critical=True),
        ]
        if AeadId.AES_128_GCM_SIV in self._offered:
            asked.append(Record(RecordType.COMPLIANT_128GCM_EXPORT))
        return _message(asked)

    def receive(self, plaintext: bytes) -> KeResult | None:
        """The result once the response is whole, None while octets are missing.

        Raises KeError for an Error or Warning record, NoOverlap when nothing is shared, WireError for a
        response that is not well-formed (section 4).
        """
        response = self._reader.receive(plaintext)
        return None if response is None else self._conclude(response)

    def _conclude(self, response: Sequence[Record]) -> KeResult:
        single: dict[int, Record] = {}
        cookies: list[bytes] = []
        for record in response:
            if record.type == RecordType.NEW_COOKIE:
                if len(cookies) < MAX_COOKIES and 0 < len(record.body) <= MAX_COOKIE_LENGTH:
                    cookies.append(record.body)
            elif record.type in _KNOWN_TYPES:
                if record.type in single:
                    raise WireError(f"record type {record.type} comes twice")
                single[record.type] = record
            elif record.critical:
                raise KeError(f"the server sent the unknown critical record type {record.type}")
        _refuse_errors(single)
        aead = self._negotiated(single)
        if not cookies:
            raise KeError("the server sent no usable cookie")
        _check_compliance(single)
        keys, alternative = export_keys(self._export, aead), None
        if aead == AeadId.AES_128_GCM_SIV and RecordType.COMPLIANT_128GCM_EXPORT not in single:
            keys, alternative = _export_as_chrony_4_4(self._export), keys
        return KeResult(keys, tuple(cookies), _endpoint(single), alternative)

    def _negotiated(self, single: dict[int, Record]) -> AeadId:
        protocol, algorithm = single.get(RecordType.NEXT_PROTOCOL), single.get(RecordType.AEAD_ALGORITHM)
        if protocol is None:
            raise WireError("the response lacks its Next Protocol record")
        if uint16_list(protocol.body) != (NTPV4,):
            raise NoOverlap("the server does not serve NTPv4 with NTS")
        if algorithm is None:
            raise WireError("the response lacks its AEAD Algorithm record")
        match uint16_list(algorithm.body):
            case ():
                raise NoOverlap("the server shares no AEAD algorithm with us")
            case (chosen,) if chosen in self._offered:
                return AeadId(chosen)
            case answered:
                raise KeError(f"the server chose AEAD algorithms {answered}, which were not offered")


def _refuse_errors(single: dict[int, Record]) -> None:
    for kind in (RecordType.ERROR, RecordType.WARNING):
        if kind in single:
            body = uint16_list(single[kind].body)
            if len(body) != 1:
                raise WireError(f"an {kind.name} record of {len(single[kind].body)} octets")
            raise KeError(f"the server answered with {kind.name.lower()} {body[0]}", body[0])


def _check_compliance(single: dict[int, Record]) -> None:
    if RecordType.COMPLIANT_128GCM_EXPORT in single and single[RecordType.COMPLIANT_128GCM_EXPORT].body:
        raise WireError("a record of type 1024 with a body")


def _endpoint(single: dict[int, Record]) -> NtpEndpoint:
    """What records 6 and 7 name, whichever side sent them (sections 4.1.7 and 4.1.8)."""
    host, port = None, DEFAULT_NTP_PORT
    if RecordType.NTP_SERVER in single:
        host = host_of(single[RecordType.NTP_SERVER].body)
    if RecordType.NTP_PORT in single:
        ports = uint16_list(single[RecordType.NTP_PORT].body)
        if len(ports) != 1 or ports[0] == 0:
            raise WireError("the NTP port is not one port")
        port = ports[0]
    return NtpEndpoint(host, port)


def host_of(body: bytes) -> str:
    """A host name without its last dot, or an address as `ipaddress` writes it (section 4.1.7)."""
    try:
        host = body.decode("ascii")
    except UnicodeDecodeError:
        raise WireError("the NTP server's name is not ASCII") from None
    try:
        address = ip_address(host)
    except ValueError:
        host = host.removesuffix(".").lower()
        if not _HOST_NAME.fullmatch(host) or len(host) > _MAX_HOST_NAME:
            raise WireError("the NTP server's name is not a host name or an address") from None
        return host
    if "%" in host:
        raise WireError("the NTP server's address has a zone identifier")
    if address.is_unspecified or address.is_multicast:
        raise WireError("the NTP server's address is not that of a host")
    return str(address)
