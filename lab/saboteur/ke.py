"""The table of spoiled key establishments: `KE_SABOTAGES`, an entry for each function that `_ke` or `_answer` marks."""

from collections.abc import Callable, Iterable

from lab.saboteur.server import END, KePlay, KeSabotage, KeTalk, title
from lab.saboteur.tls import NAME, Manner
from nts_core import records
from nts_core.aead import SUPPORTED
from nts_core.client import Failure
from nts_core.cookies import MAX_COOKIE_LENGTH
from nts_core.records import Record, RecordType
from nts_core.wire import uint16

KE_SABOTAGES: dict[str, KeSabotage] = {}


def _ke(
    failure: Failure | None, *, says: str = "", waits: bool = False, kept: int = 8, useful: bool = True
) -> Callable[[KePlay], KePlay]:
    def enter(play: KePlay) -> KePlay:
        name, sentence = title(play)
        KE_SABOTAGES[name] = KeSabotage(name, sentence, play, failure, says, waits, kept, useful)
        return play

    return enter


_Spoil = Callable[[list[Record]], Iterable[Record] | bytes]


def _answer(
    failure: Failure | None, *, says: str = "", kept: int = 8, useful: bool = True
) -> Callable[[_Spoil], _Spoil]:
    """An entry that only changes the honest records, in a TLS session that is in order."""

    def enter(spoil: _Spoil) -> _Spoil:
        async def play(talk: KeTalk) -> None:
            await talk.handshake()
            spoiled = spoil(await talk.answer())
            await talk.say(spoiled if isinstance(spoiled, bytes) else records.encode(spoiled))
            await talk.close()

        name, sentence = title(spoil)
        KE_SABOTAGES[name] = KeSabotage(
            name, sentence, play, failure, says, waits=False, kept=kept, useful=useful
        )
        return spoil

    return enter


def _without(honest: Iterable[Record], kind: int) -> list[Record]:
    return [record for record in honest if record.type != kind]


def _with(honest: Iterable[Record], kind: int, *instead: bytes) -> list[Record]:
    """The records with those of a type replaced by as many as there are bodies, critical, at the beginning."""
    return [*(Record(kind, body, critical=True) for body in instead), *_without(honest, kind)]


def _cookies(honest: Iterable[Record], *bodies: bytes) -> list[Record]:
    """The records with other cookies."""
    cookies = [Record(RecordType.NEW_COOKIE, body) for body in bodies]
    return [*_without(_without(honest, RecordType.NEW_COOKIE), RecordType.END_OF_MESSAGE), *cookies, END]


def _bodies(honest: Iterable[Record]) -> list[bytes]:
    return [record.body for record in honest if record.type == RecordType.NEW_COOKIE]


def _filled(honest: list[Record], total: int) -> list[Record]:
    """The records with unknown ones before them, `total` octets as a whole."""
    missing = total - len(records.encode(honest))
    fillers = []
    while missing:
        # What is left over must have room for a record's head.
        size = missing if missing <= 10_000 else min(10_000, missing - 4)
        fillers.append(Record(0x4000, bytes(size - 4)))
        missing -= size
    return [*fillers, *honest]


# The connection and TLS


@_ke(Failure.TLS, says="closed")
async def drop_before_tls(talk: KeTalk) -> None:
    """Ends the stream before TLS begins; the client reports it at once."""
    await talk.hang_up()


@_ke(Failure.TLS, says="no connection")
async def reset_before_tls(talk: KeTalk) -> None:
    """Resets the connection in answer to the ClientHello; the client reports it at once."""
    await talk.hello()
    talk.reset()


@_ke(Failure.TLS, says="no answer", waits=True)
async def silence_before_tls(talk: KeTalk) -> None:
    """Accepts the connection and says nothing; the client's deadline ends it."""
    await talk.stall()


@_ke(Failure.TLS, says="TLS failed")
async def not_tls(talk: KeTalk) -> None:
    """Speaks another protocol; the client reports that TLS failed."""
    await talk.say_raw(b"220 mail.example ESMTP\r\n")
    await talk.hang_up()


@_ke(Failure.TLS, says="closed")
async def close_within_the_handshake(talk: KeTalk) -> None:
    """Ends the stream in the middle of its first flight; the client reports it at once."""
    flight = await talk.hello()
    await talk.say_raw(flight[: len(flight) // 2])
    await talk.hang_up()


@_ke(Failure.TLS, says="TLS failed")
async def bit_flip_in_tls(talk: KeTalk) -> None:
    """Flips one bit of an encrypted TLS record; the client reports that TLS failed."""
    await talk.handshake()
    talk.channel.send(records.encode(await talk.answer()))
    octets = bytearray(talk.channel.to_send())
    octets[-1] ^= 1
    await talk.say_raw(bytes(octets))
    await talk.stall()


@_ke(Failure.TLS, says="closed")
async def close_after_the_handshake(talk: KeTalk) -> None:
    """Ends the stream as soon as TLS is established; the client reports it at once."""
    await talk.handshake()
    await talk.hang_up()


@_ke(Failure.TLS, says="closed")
async def close_after_the_request(talk: KeTalk) -> None:
    """Says close_notify instead of an answer; the client reports it and waits for no deadline."""
    await talk.handshake()
    await talk.request()
    await talk.close()


@_ke(Failure.TLS, says="no connection")
async def reset_after_the_request(talk: KeTalk) -> None:
    """Resets the connection instead of an answer; the client reports it at once."""
    await talk.handshake()
    await talk.request()
    talk.reset()


@_ke(Failure.TLS, says="no answer", waits=True)
async def silence_after_the_request(talk: KeTalk) -> None:
    """Takes the request and never answers; the client's deadline ends it."""
    await talk.handshake()
    await talk.request()
    await talk.stall()


@_ke(Failure.TLS, says="no answer", waits=True)
async def stall_before_the_answer(talk: KeTalk) -> None:
    """Answers honestly, but 20 s late; the client has gone by then."""
    await talk.handshake()
    answer = await talk.answer()
    await talk.stall()
    await talk.say(records.encode(answer))
    await talk.close()


@_ke(Failure.TLS, says="no answer", waits=True)
async def silence_within_the_answer(talk: KeTalk) -> None:
    """Sends all of the answer but its last octet and keeps the connection; the client's deadline ends it."""
    await talk.handshake()
    await talk.say(records.encode(await talk.answer())[:-1])
    await talk.stall()


@_ke(Failure.TLS, says="no answer", waits=True)
async def drip(talk: KeTalk) -> None:
    """Sends a small record every 10 ms without end: each octet is progress, and the one deadline still ends it."""
    await talk.handshake()
    await talk.request()
    await talk.flood(Record(0x4000).encode(), pause=0.01)


async def _presented(talk: KeTalk, manner: Manner) -> None:
    """An honest answer behind a handshake that is not."""
    await talk.handshake(manner)
    await talk.say(records.encode(await talk.answer()))
    await talk.close()


@_ke(Failure.TLS, says="protocol version")
async def tls_1_2_only(talk: KeTalk) -> None:
    """Speaks no TLS above 1.2 and answers honestly by that; the client refuses it (section 3)."""
    await _presented(talk, Manner.TLS_1_2)


@_ke(Failure.TLS, says="ntske/1")
async def no_alpn(talk: KeTalk) -> None:
    """Answers no ALPN; the client refuses it before it asks anything (section 4)."""
    await talk.handshake(Manner.NO_ALPN)


@_ke(Failure.TLS)
async def other_alpn(talk: KeTalk) -> None:
    """Chooses an ALPN protocol that was not offered; the client refuses it before it asks anything."""
    await talk.handshake(Manner.OTHER_ALPN)


@_ke(Failure.CERTIFICATE, says=NAME)
async def wrong_name(talk: KeTalk) -> None:
    """Has a good certificate of another name; the client refuses it and asks nothing."""
    await _presented(talk, Manner.WRONG_NAME)


@_ke(Failure.CERTIFICATE, says=NAME)
async def expired(talk: KeTalk) -> None:
    """Has a certificate that ended an hour ago; the client refuses it and asks nothing."""
    await _presented(talk, Manner.EXPIRED)


@_ke(Failure.CERTIFICATE, says=NAME)
async def not_yet_valid(talk: KeTalk) -> None:
    """Has a certificate that begins in an hour; the client refuses it and asks nothing."""
    await _presented(talk, Manner.NOT_YET_VALID)


@_ke(Failure.CERTIFICATE, says=NAME)
async def self_signed(talk: KeTalk) -> None:
    """Has a certificate that only itself vouches for; the client refuses it and asks nothing."""
    await _presented(talk, Manner.SELF_SIGNED)


@_ke(Failure.CERTIFICATE, says=NAME)
async def other_ca(talk: KeTalk) -> None:
    """Has a certificate of a CA of the same name that is not trusted; the client refuses it and asks nothing."""
    await _presented(talk, Manner.OTHER_CA)


# How the answer is put on the wire


@_ke(None)
async def octet_by_octet(talk: KeTalk) -> None:
    """Sends each octet in a TLS record of its own; the client puts the answer together."""
    await talk.handshake()
    answer = records.encode(await talk.answer())
    await talk.say(*(answer[i : i + 1] for i in range(len(answer))))
    await talk.close()


@_ke(Failure.TLS, says="closed")
async def half_a_record(talk: KeTalk) -> None:
    """Closes in the middle of the last cookie; the client keeps nothing of the seven before it."""
    await talk.handshake()
    await talk.say(records.encode(await talk.answer())[:-40])
    await talk.close()


@_ke(Failure.TLS, says="closed")
async def half_an_end_of_message(talk: KeTalk) -> None:
    """Closes in the middle of End of Message; the client takes nothing."""
    await talk.handshake()
    await talk.say(records.encode(await talk.answer())[:-2])
    await talk.close()


@_answer(Failure.TLS, says="closed")
def no_end_of_message(honest: list[Record]) -> list[Record]:
    """Closes after the last cookie; without End of Message the client takes nothing (section 4)."""
    return honest[:-1]


@_answer(Failure.TLS, says="closed")
def record_length_too_long(honest: list[Record]) -> bytes:
    """The last cookie's length reaches beyond the message; the client waits for the rest, which never comes."""
    cookie = honest[-2].body
    return records.encode(honest[:-2]) + b"\0\5" + uint16(len(cookie) + 100) + cookie + END.encode()


@_answer(Failure.KE, says="16-bit")
def record_length_too_short(honest: list[Record]) -> bytes:
    """The algorithm's length is one octet short, so that all behind it is read askew; the client refuses it."""
    askew = b"\x80\4\0\1\0\x0f" + Record(0x4001, b"\0").encode()[1:]
    return (
        records.encode([Record(RecordType.NEXT_PROTOCOL, uint16(0), critical=True)])
        + askew
        + (records.encode(_without(_without(honest, RecordType.NEXT_PROTOCOL), RecordType.AEAD_ALGORITHM)))
    )


@_answer(None)
def exactly_64_kib(honest: list[Record]) -> list[Record]:
    """Fills the answer with unknown records to 65,536 octets; the client takes it (section 4)."""
    return _filled(honest, 65_536)


@_answer(Failure.KE, says="longer than")
def one_octet_more_than_64_kib(honest: list[Record]) -> list[Record]:
    """Fills the answer to 65,537 octets; the client refuses it."""
    return _filled(honest, 65_537)


@_answer(None)
def huge_record(honest: list[Record]) -> list[Record]:
    """An unknown record of 60,000 octets that is not critical; the client skips it."""
    return [Record(0x4000, bytes(60_000)), *honest]


@_answer(Failure.KE, says="longer than")
def longest_record(honest: list[Record]) -> list[Record]:
    """A record as long as its length can say; with the rest that is too long, and the client refuses it."""
    return [Record(0x4000, bytes(65_535)), *honest]


@_ke(Failure.KE, says="longer than")
async def endless_records(talk: KeTalk) -> None:
    """Sends records without end as fast as it can; the client breaks off after 64 KiB."""
    await talk.handshake()
    await talk.request()
    await talk.flood(Record(0x4000, bytes(996)).encode())


@_ke(Failure.KE, says="longer than")
async def endless_empty_records(talk: KeTalk) -> None:
    """The same with records without a body, of which 16,384 fit; the client breaks off after 64 KiB."""
    await talk.handshake()
    await talk.request()
    await talk.flood(Record(0x4000).encode() * 1024)


@_answer(Failure.KE, says="after End of Message")
def octets_after_the_end(honest: list[Record]) -> bytes:
    """One octet follows End of Message; the client refuses the answer (section 4.1.1)."""
    return records.encode(honest) + b"\0"


@_answer(Failure.KE, says="after End of Message")
def records_after_the_end(honest: list[Record]) -> list[Record]:
    """End of Message comes before the cookies; the client refuses the answer."""
    return [*_without(_cookies(honest), RecordType.END_OF_MESSAGE), END, *honest]


@_answer(Failure.KE, says="End of Message")
def end_with_a_body(honest: list[Record]) -> list[Record]:
    """End of Message has a body; the client refuses the answer (section 4.1.1)."""
    return [*honest[:-1], Record(RecordType.END_OF_MESSAGE, b"\0\0", critical=True)]


@_answer(Failure.KE, says="End of Message")
def end_that_is_not_critical(honest: list[Record]) -> list[Record]:
    """End of Message lacks its critical bit; the client refuses the answer (section 4.1.1)."""
    return [*honest[:-1], Record(RecordType.END_OF_MESSAGE)]


# Errors, warnings, unknown records


@_answer(Failure.KE, says="error 0")
def error_0(honest: list[Record]) -> list[Record]:
    """Adds Error 0 to an honest answer; the client keeps no cookie and reports the code (section 4.1.3)."""
    return _with(honest, RecordType.ERROR, uint16(0))


@_answer(Failure.KE, says="error 1")
def error_1(_honest: list[Record]) -> list[Record]:
    """Answers Error 1 alone; the client reports the code."""
    return _with([END], RecordType.ERROR, uint16(1))


@_answer(Failure.KE, says="error 2")
def error_2(_honest: list[Record]) -> list[Record]:
    """Answers Error 2 alone; the client reports the code."""
    return _with([END], RecordType.ERROR, uint16(2))


@_answer(Failure.KE, says="error 40000")
def error_unknown(honest: list[Record]) -> list[Record]:
    """Adds an Error of no assigned code; the client treats it as any other error."""
    return _with(honest, RecordType.ERROR, uint16(40_000))


@_answer(Failure.KE, says="ERROR record of 0 octets")
def error_without_a_code(honest: list[Record]) -> list[Record]:
    """Adds an Error record without a body; the client refuses the answer."""
    return _with(honest, RecordType.ERROR, b"")


@_answer(Failure.KE, says="warning 7")
def warning(honest: list[Record]) -> list[Record]:
    """Adds a Warning; no code is assigned, so that the client treats it as an error (section 4.1.4)."""
    return _with(honest, RecordType.WARNING, uint16(7))


@_answer(Failure.KE, says="unknown critical record")
def unknown_critical_record(honest: list[Record]) -> list[Record]:
    """Adds an unknown critical record; the client refuses the answer (section 4)."""
    return [Record(0x4000, b"understand me", critical=True), *honest]


@_answer(None)
def unknown_record(honest: list[Record]) -> list[Record]:
    """Adds unknown records that are not critical, one of them twice; the client skips them (section 4)."""
    return [Record(0x4000, b"x"), Record(0x7FFF), *honest[:-1], Record(0x4000, b"x"), END]


@_answer(None)
def records_in_another_order(honest: list[Record]) -> list[Record]:
    """Sends the cookies first and the rest backwards; the client does not mind (section 4)."""
    return [*reversed(honest[:-1]), END]


# Negotiation


@_answer(Failure.KE, says="lacks its Next Protocol")
def next_protocol_missing(honest: list[Record]) -> list[Record]:
    """Leaves the Next Protocol record out; the client refuses the answer (section 4.1.2)."""
    return _without(honest, RecordType.NEXT_PROTOCOL)


@_answer(Failure.KE, says="does not serve NTPv4")
def next_protocol_empty(honest: list[Record]) -> list[Record]:
    """Chooses no protocol and gives cookies all the same; the client keeps none."""
    return _with(honest, RecordType.NEXT_PROTOCOL, b"")


@_answer(Failure.KE, says="does not serve NTPv4")
def next_protocol_not_offered(honest: list[Record]) -> list[Record]:
    """Chooses a protocol that was not offered; the client refuses the answer."""
    return _with(honest, RecordType.NEXT_PROTOCOL, uint16(0x8001))


@_answer(Failure.KE, says="does not serve NTPv4")
def two_protocols(honest: list[Record]) -> list[Record]:
    """Chooses two protocols, ours among them; the client refuses the answer."""
    return _with(honest, RecordType.NEXT_PROTOCOL, uint16(0) + uint16(0x8001))


@_answer(Failure.KE, says="16-bit")
def next_protocol_of_three_octets(honest: list[Record]) -> list[Record]:
    """The list of protocols is one octet too long; the client refuses the answer."""
    return _with(honest, RecordType.NEXT_PROTOCOL, bytes(3))


@_answer(Failure.KE, says="comes twice")
def next_protocol_twice(honest: list[Record]) -> list[Record]:
    """Sends the Next Protocol record twice; the client refuses the answer."""
    return _with(honest, RecordType.NEXT_PROTOCOL, uint16(0), uint16(0))


@_answer(Failure.KE, says="lacks its AEAD")
def aead_missing(honest: list[Record]) -> list[Record]:
    """Leaves the AEAD record out; the client refuses the answer (section 4.1.5)."""
    return _without(honest, RecordType.AEAD_ALGORITHM)


@_answer(Failure.KE, says="no AEAD algorithm")
def aead_empty(honest: list[Record]) -> list[Record]:
    """Chooses no AEAD and gives cookies all the same; the client keeps none."""
    return _with(honest, RecordType.AEAD_ALGORITHM, b"")


@_answer(Failure.KE, says="not offered")
def aead_not_offered(honest: list[Record]) -> list[Record]:
    """Chooses AEAD_AES_128_GCM, which no client of ours offers; the client refuses the answer."""
    return _with(honest, RecordType.AEAD_ALGORITHM, uint16(1))


@_answer(Failure.KE, says="not offered")
def two_aeads(honest: list[Record]) -> list[Record]:
    """Chooses two AEADs, a good one first; the client refuses the answer."""
    return _with(honest, RecordType.AEAD_ALGORITHM, uint16(15) + uint16(1))


@_answer(None, useful=False)
def aead_of_other_keys(honest: list[Record]) -> list[Record]:
    """Names an AEAD that was offered, but its cookies are for another; the client gets no time with them."""
    (chosen,) = (record.body for record in honest if record.type == RecordType.AEAD_ALGORITHM)
    return _with(honest, RecordType.AEAD_ALGORITHM, uint16(next(i for i in SUPPORTED if uint16(i) != chosen)))


@_answer(Failure.KE, says="type 1024 with a body")
def compliance_with_a_body(honest: list[Record]) -> list[Record]:
    """Record 1024 has a body; the client refuses the answer."""
    return [
        *_without(_without(honest, RecordType.COMPLIANT_128GCM_EXPORT), RecordType.END_OF_MESSAGE),
        Record(RecordType.COMPLIANT_128GCM_EXPORT, b"\0"),
        END,
    ]


@_answer(Failure.KE, says="comes twice")
def aead_twice(honest: list[Record]) -> list[Record]:
    """Sends the AEAD record twice; the client refuses the answer."""
    return _with(honest, RecordType.AEAD_ALGORITHM, uint16(15), uint16(15))


# Cookies


@_answer(Failure.KE, says="no usable cookie")
def no_cookies(honest: list[Record]) -> list[Record]:
    """Gives no cookie; the client reports it, as it could ask nothing with that."""
    return _cookies(honest)


@_answer(Failure.KE, says="no usable cookie")
def zero_length_cookies(honest: list[Record]) -> list[Record]:
    """Gives eight cookies of no octets; the client keeps none and reports it."""
    return _cookies(honest, *[b""] * 8)


@_answer(None, kept=7)
def one_zero_length_cookie(honest: list[Record]) -> list[Record]:
    """Gives seven good cookies and an empty one before them; the client keeps the seven."""
    return _cookies(honest, b"", *_bodies(honest)[:7])


@_answer(Failure.KE, says="no usable cookie")
def oversized_cookies(honest: list[Record]) -> list[Record]:
    """Gives cookies one octet longer than a client keeps; the client keeps none and reports it."""
    return _cookies(honest, *[bytes(MAX_COOKIE_LENGTH + 1)] * 8)


@_answer(Failure.KE, says="no usable cookie")
def huge_cookie(honest: list[Record]) -> list[Record]:
    """Gives one cookie of 60,000 octets; the client does not keep it."""
    return _cookies(honest, bytes(60_000))


@_answer(None)
def more_than_eight_cookies(honest: list[Record]) -> list[Record]:
    """Gives 300 cookies, good ones first; the client keeps eight."""
    return _cookies(honest, *_bodies(honest), *[bytes(100)] * 292)


@_answer(None, kept=1)
def one_cookie(honest: list[Record]) -> list[Record]:
    """Gives a single cookie; the client asks with it and gets the others by NTP."""
    return _cookies(honest, _bodies(honest)[0])


@_ke(None, useful=False)
async def swapped_cookies(talk: KeTalk) -> None:
    """Gives another client's cookies; the client cannot know, but gets no time with them."""
    await talk.handshake()
    await talk.say(records.encode(_cookies(await talk.answer(), *talk.cookies_of_others())))
    await talk.close()


@_ke(None)
async def one_swapped_cookie(talk: KeTalk) -> None:
    """Gives another client's cookie as the second; one exchange is lost with it, and no more."""
    await talk.handshake()
    answer = await talk.answer()
    first, *rest = _bodies(answer)
    await talk.say(records.encode(_cookies(answer, first, talk.cookies_of_others()[0], *rest[:6])))
    await talk.close()


@_answer(None)
def cookies_of_different_lengths(honest: list[Record]) -> list[Record]:
    """Gives a good cookie, then some of 1 to 256 octets; the client keeps them and its requests stay well-formed."""
    return _cookies(honest, _bodies(honest)[0], b"\1", bytes(2), bytes(11), bytes(12), bytes(101), bytes(256))


# Where NTP is


@_answer(Failure.KE, says="not ASCII")
def host_of_garbage(honest: list[Record]) -> list[Record]:
    """The NTP server's name is not ASCII; the client refuses the answer (section 4.1.7)."""
    return _with(honest, RecordType.NTP_SERVER, bytes(range(128, 256)))


@_answer(Failure.KE, says="not a host name")
def host_with_control_characters(honest: list[Record]) -> list[Record]:
    """The NTP server's name holds a zero and a line feed; the client refuses the answer."""
    return _with(honest, RecordType.NTP_SERVER, b"127.0.0.1\0\n")


@_answer(Failure.KE, says="not a host name")
def host_empty(honest: list[Record]) -> list[Record]:
    """The NTP server's name is empty; the client refuses the answer."""
    return _with(honest, RecordType.NTP_SERVER, b"")


@_answer(Failure.KE, says="not a host name")
def host_of_a_dot(honest: list[Record]) -> list[Record]:
    """The NTP server's name is the root; the client refuses the answer."""
    return _with(honest, RecordType.NTP_SERVER, b".")


@_answer(Failure.KE, says="not a host name")
def host_too_long(honest: list[Record]) -> list[Record]:
    """The NTP server's name is longer than DNS allows; the client refuses the answer."""
    return _with(honest, RecordType.NTP_SERVER, b"a." * 130)


@_answer(Failure.KE, says="comes twice")
def host_twice(honest: list[Record]) -> list[Record]:
    """Names two NTP servers; the client refuses the answer."""
    return _with(honest, RecordType.NTP_SERVER, b"127.0.0.1", b"127.0.0.2")


@_answer(None)
def host_with_a_trailing_dot(honest: list[Record]) -> list[Record]:
    """The NTP server's name ends in a dot; the client looks it up without the dot."""
    return _with(honest, RecordType.NTP_SERVER, b"localhost.")


@_answer(Failure.KE, says="not a host name")
def address_with_a_trailing_dot(honest: list[Record]) -> list[Record]:
    """The NTP server's address ends in a dot, which makes it neither address nor name; refused (section 4.1.7)."""
    return _with(honest, RecordType.NTP_SERVER, b"127.0.0.1.")


@_answer(Failure.KE, says="zone identifier")
def address_with_a_zone(honest: list[Record]) -> list[Record]:
    """The NTP server's IPv6 address names an interface of ours; the client refuses the answer."""
    return _with(honest, RecordType.NTP_SERVER, b"fe80::1%lo")


@_answer(None)
def host_of_ipv6(honest: list[Record]) -> list[Record]:
    """Names an IPv6 address as it stands; the client asks it although NTS-KE was over IPv4."""
    return _with(honest, RecordType.NTP_SERVER, b"::1")


@_answer(Failure.KE, says="not one port")
def port_zero(honest: list[Record]) -> list[Record]:
    """The NTP port is zero; the client refuses the answer."""
    return _with(honest, RecordType.NTP_PORT, uint16(0))


@_answer(Failure.KE, says="not one port")
def port_empty(honest: list[Record]) -> list[Record]:
    """The NTP port has no octets; the client refuses the answer (section 4.1.8)."""
    return _with(honest, RecordType.NTP_PORT, b"")


@_answer(Failure.KE, says="16-bit")
def port_of_three_octets(honest: list[Record]) -> list[Record]:
    """The NTP port has three octets; the client refuses the answer."""
    return _with(honest, RecordType.NTP_PORT, bytes(3))


@_answer(Failure.KE, says="not one port")
def two_ports(honest: list[Record]) -> list[Record]:
    """Names two ports in one record; the client refuses the answer."""
    return _with(honest, RecordType.NTP_PORT, uint16(1) + uint16(2))
