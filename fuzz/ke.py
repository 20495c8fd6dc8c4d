"""Targets of key establishment: the reader of records and both sides (RFC 8915 section 4).

An input's first octet says in pieces of how many octets the rest is fed (0: all at once). Where the packet engine is
built, it has to say the same as `nts_core.ke.KeServer`, and at the same piece.
"""

from collections.abc import Callable, Iterable

from fuzz import native
from fuzz.mutate import Layout
from fuzz.target import NOW, Drawn, OracleError, Plan, Target, hold, pieces
from nts_core import records
from nts_core.aead import KEY_LENGTH, SUPPORTED, AeadId
from nts_core.cookies import MAX_COOKIE_LENGTH, MAX_COOKIES, NONCE_LENGTH, Keyring, cookie_length
from nts_core.errors import KeError, NoOverlap, WireError
from nts_core.ke import KeClient, KeReply, KeResult, KeServer, KeTerms, NtpEndpoint, NtpService, host_of
from nts_core.records import MessageReader, Record, RecordType
from nts_core.wire import uint16, uint16_list

_CRITICAL = 0x8000
_LAYOUT = Layout(
    clear=1,
    counts_head=False,
    unit=1,
    types=tuple(kind | critical for kind in (*RecordType, 0x7FFF) for critical in (0, _CRITICAL)),
)
_TOKENS = (
    *(Record(kind, critical=True).encode() for kind in RecordType),
    *(Record(RecordType.AEAD_ALGORITHM, uint16(aead), critical=True).encode() for aead in (15, 16, 17, 30)),
    Record(RecordType.NEXT_PROTOCOL, uint16(0), critical=True).encode(),
    Record(RecordType.COMPLIANT_128GCM_EXPORT).encode(),
)
# Of the bare reader; short, so that it is passed.
_LIMIT = 1024
_KEYRING = Keyring.new(NOW, Drawn(b"keyring"))
_ELSEWHERE = NtpEndpoint("ntp.example", 1123)
_OTHERS = (NtpEndpoint("192.0.2.1"), NtpEndpoint("2001:db8::1", 2123))
_TERMS = KeTerms(_KEYRING, NtpService(_ELSEWHERE, _OTHERS))
_Export = Callable[[bytes, int], bytes]


def _whole(message: bytes) -> tuple[Record, ...]:
    found = MessageReader(records.MAX_RESPONSE).receive(message)
    if found is None:
        raise OracleError("a message that we send is whole")
    return found


def _read_records(data: bytes) -> str:
    plan = Plan(data)
    length, fed = plan.octet(), 0
    reader = MessageReader(_LIMIT)
    try:
        for piece in pieces(plan.rest(), length):
            fed += len(piece)
            found = reader.receive(piece)
            if found is not None:
                break
        else:
            return "incomplete"
    except WireError:
        return "refused"
    message = data[1 : 1 + fed]
    end = Record(RecordType.END_OF_MESSAGE, critical=True)
    hold(fed <= _LIMIT, "no message is longer than the limit")
    hold(records.encode((*found, end)) == message, "what is read encodes to what was sent")
    whole = MessageReader(_LIMIT).receive(message)
    hold(whole == found, "how the network cuts a message does not matter")
    return "read"


def _server(data: bytes) -> str:
    plan = Plan(data)
    length, request = plan.octet(), plan.rest()
    exported: list[bytes] = []
    randomness = Drawn(b"server")

    def export(context: bytes, length: int) -> bytes:
        exported.append(context)
        return Drawn(context)(length)

    server = KeServer(_TERMS, export, randomness)
    if native.IS_BUILT:
        _check_native(pieces(request, length))
    reply, fed = None, 0
    for piece in pieces(request, length):
        fed += len(piece)
        reply = server.receive(piece)
        if reply is not None:
            break
    if reply is None:
        reply = server.timeout()
    hold(randomness.octets <= MAX_COOKIES * NONCE_LENGTH, "no more is drawn than a nonce a cookie")
    hold(len(exported) <= 2, "one key is exported for each direction")
    # What came after the end of the message is nobody's.
    _check_reply(request[:fed], reply, export)
    return reply.outcome


def _check_native(stream: Iterable[bytes]) -> None:
    servers = native.KeServers(
        _TERMS, lambda context, length: Drawn(context)(length), Drawn(b"server")(MAX_COOKIES * NONCE_LENGTH)
    )
    for piece in stream:
        expected, found = servers.receive(piece)
        hold(found == expected, "both engines answer the same")
        if expected is not None:
            return


def _check_reply(request: bytes, reply: KeReply, export: _Export) -> None:
    answer = _whole(reply.octets)
    types = [record.type for record in answer]
    cookies = [record.body for record in answer if record.type == RecordType.NEW_COOKIE]
    hold(types.count(RecordType.ERROR) <= 1, "there is one Error record at most")
    if RecordType.ERROR in types:
        hold(types == [RecordType.ERROR], "an Error record comes alone, above all without cookies")
    if reply.outcome != "ok":
        hold(not cookies, "who is refused gets no cookie")
        return
    hold(len(cookies) == MAX_COOKIES, "there are eight cookies")
    hold(len(set(cookies)) == MAX_COOKIES, "no two cookies are the same")
    asked = _whole(request)
    offered = [a for r in asked if r.type == RecordType.AEAD_ALGORITHM for a in uint16_list(r.body)]
    protocols = [p for r in asked if r.type == RecordType.NEXT_PROTOCOL for p in uint16_list(r.body)]
    hold(0 in protocols, "NTPv4 was offered")
    chosen = [a for r in answer if r.type == RecordType.AEAD_ALGORITHM for a in uint16_list(r.body)]
    hold(
        len(chosen) == 1 and chosen[0] in offered, "one AEAD algorithm is chosen, of those that were offered"
    )
    hold({len(cookie) for cookie in cookies} == {cookie_length(chosen[0])}, "all cookies have their length")
    hold(cookie_length(chosen[0]) % 4 == 0 and cookie_length(chosen[0]) <= 192, "a cookie fits a field")
    compliance = RecordType.COMPLIANT_128GCM_EXPORT
    hold(compliance not in types or chosen == [AeadId.AES_128_GCM_SIV], "1024 is said of one algorithm only")
    hold(compliance not in types or compliance in {record.type for record in asked}, "1024 answers 1024")
    result = KeClient(export, (AeadId(chosen[0]),)).receive(reply.octets)
    if result is None:
        raise OracleError("our client understands what our server says")
    hold(result.endpoint in {_ELSEWHERE, *_OTHERS}, "the client is told where NTP is served")
    hold({_KEYRING.open(cookie) for cookie in cookies} == {result.keys}, "cookies hold the client's keys")


def _client(data: bytes) -> str:
    plan = Plan(data)
    length, response = plan.octet(), plan.rest()
    client = KeClient(lambda context, length: Drawn(context)(length))
    client.request()
    try:
        for piece in pieces(response, length):
            result = client.receive(piece)
            if result is not None:
                return _check_result(response, result)
    except NoOverlap:
        return "no-overlap"
    except KeError as error:
        return "refused" if error.code is None else "told-an-error"
    except WireError:
        return "malformed"
    return "incomplete"


def _check_result(response: bytes, result: KeResult) -> str:
    # The message may have ended before the octets did.
    reader, whole = MessageReader(records.MAX_RESPONSE), None
    for octet in pieces(response, 1):
        whole = reader.receive(octet)
        if whole is not None:
            break
    types = [record.type for record in whole or ()]
    hold(RecordType.ERROR not in types and RecordType.WARNING not in types, "an error is not a success")
    hold(1 <= len(result.cookies) <= MAX_COOKIES, "one to eight cookies are kept")
    hold(all(0 < len(c) <= MAX_COOKIE_LENGTH for c in result.cookies), "cookies are usable")
    hold(result.keys.aead in SUPPORTED, "the algorithm is one that was offered")
    length = KEY_LENGTH[result.keys.aead]
    for keys in (result.keys, result.alternative or result.keys):
        hold({len(keys.c2s), len(keys.s2c)} == {length}, "the keys are as long as the algorithm's")
    host, port = result.endpoint.host, result.endpoint.port
    hold(0 < port < 65536, "the port is a port")
    hold(host is None or host_of(host.encode()) == host, "the host is a host name or an address")
    return "established"


TARGETS = (
    Target(
        "ke-records",
        "Only WireError; what is read encodes to what was sent, however it was cut; the limit holds.",
        _read_records,
        frozenset({"read", "refused", "incomplete"}),
        longest=1100,
        layout=_LAYOUT,
        tokens=_TOKENS,
    ),
    Target(
        "ke-server",
        "No exception; one well-formed answer; an Error comes alone; eight equal cookies, or none, that hold the"
        " client's keys; the algorithm was offered; few draws and exports.",
        _server,
        frozenset({"ok", "bad-request", "no-protocol", "no-aead", "unknown-critical", "timeout"}),
        longest=records.MAX_REQUEST + 16,
        layout=_LAYOUT,
        tokens=_TOKENS,
    ),
    Target(
        "ke-client",
        "Only KeError and WireError; no success beside an error; one to eight usable cookies; an algorithm that was"
        " offered, with keys of its length; a host that is a name or an address.",
        _client,
        frozenset({"established", "no-overlap", "refused", "told-an-error", "malformed", "incomplete"}),
        layout=_LAYOUT,
        tokens=_TOKENS,
    ),
)
