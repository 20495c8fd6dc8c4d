"""A server that breaks the rules of NTS in one named way at a time, for clients to prove themselves against.

`KE_SABOTAGES` and `NTP_SABOTAGES` are the tables: each entry has a name, a sentence (what the server does; what the
client must do), and the outcome that a client of ours has to come to. `Saboteur` plays them: a real NTS-KE server
over TLS and a real NTP server over UDP on an address of 127.0.0.0/8, in a thread of their own, so that a client
which blocks its own loop is found out.

What makes the proofs sharp:

1. The true answer tells a time three seconds ahead, every lie that is well sealed an hour. Who took what is seen
   in the offset.
2. `keyring` opens every cookie that was given honestly: whatever else a client keeps came from a lie.
3. Everything is counted, also plain NTP on the port that was told and, where this process may bind it, on port 123.
4. The randomness of keys, cookies, nonces and garbage comes from a seed; only TLS and the clock use their own.
"""

import asyncio
import contextlib
import itertools
import random
import secrets
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import partial
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID
from OpenSSL import SSL

from lab.certificates import Authority, Pair
from lab.processes import LabError, free_port
from nts_core import records
from nts_core.aead import KEY_LENGTH, NONCE_LENGTH, SUPPORTED, Aead, AeadId, SessionKeys
from nts_core.association import Association
from nts_core.client import Failure
from nts_core.cookies import MAX_COOKIE_LENGTH, MAX_COOKIES, Keyring
from nts_core.cookies import NONCE_LENGTH as COOKIE_NONCE_LENGTH
from nts_core.errors import NtsError, TlsError
from nts_core.ke import KeResult, KeServer, KeTerms, NtpEndpoint, NtpService
from nts_core.packet import (
    HEADER_LENGTH,
    MAX_DATAGRAM,
    ClockState,
    Field,
    FieldType,
    Header,
    Leap,
    Mode,
    Packet,
    encode_fields,
    protect,
)
from nts_core.records import MessageReader, Record, RecordType
from nts_core.server import NtpServer, Reply
from nts_core.tls import ALPN, ServerCredentials, TlsChannel
from nts_core.wire import uint16

NAME = "saboteur.example"
# What the true answer says, and what a sealed lie says, in nanoseconds ahead of this clock.
TRUTH = 3_000_000_000
LIE = 3_600_000_000_000
# systemd's mock server stalls for as long; every client of ours has gone by then.
STALL = 20.0
_LIE_STEPS = (LIE // 1_000_000_000) << 32
_CLOCK = ClockState(Leap.NONE, 2, -20, 0, 0, b"TRUE", 0)
_END = Record(RecordType.END_OF_MESSAGE, critical=True)
_READ = 16 * 1024
# An endless answer stops here if nobody stopped it; `outlasted` then says so.
_ENDLESS = 64 * 1024 * 1024
# Datagrams between two breaths: a receiver's buffer holds several times as many.
_PORTION = 32
_BREATH = 0.005
_DAY = timedelta(days=1)
_LONGEST_DATAGRAM = 65_507


# --- Key establishment ---------------------------------------------------------------------------------------------


class Manner(StrEnum):
    """How the server presents itself in the TLS handshake."""

    HONEST = "honest"
    EXPIRED = "expired"
    NOT_YET_VALID = "not-yet-valid"
    WRONG_NAME = "wrong-name"
    OTHER_CA = "other-ca"
    SELF_SIGNED = "self-signed"
    TLS_1_2 = "tls-1.2"
    NO_ALPN = "no-alpn"
    OTHER_ALPN = "other-alpn"


class _Gone(Exception):
    """The client has left."""


class KeTalk:
    """One connection, as the functions of the table use it."""

    def __init__(
        self, saboteur: "Saboteur", reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._saboteur = saboteur
        self._reader = reader
        self._writer = writer
        self._asked = b""
        self.channel = saboteur.channel(Manner.HONEST)

    async def handshake(self, manner: Manner = Manner.HONEST) -> None:
        """TLS until it is established."""
        self.channel = self._saboteur.channel(manner)
        while not self.channel.established:
            await self._feed()

    async def hello(self) -> bytes:
        """What an honest server says first, which the client has not got yet."""
        self.channel.receive(await self._read())
        return self.channel.to_send()

    async def request(self) -> bytes:
        """The client's message."""
        while not self._asked:
            await self._feed()
        self._saboteur.counted.ke_requests += 1
        return self._asked

    async def answer(self) -> list[Record]:
        """The records of the honest answer to the client's message, End of Message last."""
        asked = await self.request()
        return self._saboteur.honest_records(asked, self.channel)

    def cookies_of_others(self) -> list[bytes]:
        """Eight good cookies of a session that is not this one."""
        return self._saboteur.cookies_of_others()

    async def say(self, *pieces: bytes) -> None:
        """Each piece in TLS records of its own."""
        for piece in pieces:
            self.channel.send(piece)
            await self.say_raw(self.channel.to_send())

    async def say_raw(self, octets: bytes) -> None:
        """Octets under TLS, or instead of it."""
        self._writer.write(octets)
        await self._writer.drain()

    async def close(self) -> None:
        """close_notify, then the end of the stream."""
        self.channel.close()
        self._writer.write(self.channel.to_send())
        await self.hang_up()

    async def hang_up(self) -> None:
        """The end of the stream, without a word of TLS."""
        self._writer.write_eof()
        await self.stall()

    def reset(self) -> None:
        """A TCP reset."""
        sock = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def stall(self) -> None:
        """Silence until the client leaves; `outlasted` counts when it is still there after `STALL` seconds."""
        try:
            async with asyncio.timeout(STALL):
                while await self._reader.read(_READ):
                    pass
        except TimeoutError:
            self._saboteur.counted.outlasted += 1

    async def flood(self, piece: bytes, *, pause: float = 0) -> None:
        """The same plaintext again and again until the client leaves."""
        for _ in range(_ENDLESS // len(piece)):
            if self._reader.at_eof():
                raise _Gone
            await self.say(piece)
            await asyncio.sleep(pause)
        self._saboteur.counted.outlasted += 1

    async def _read(self) -> bytes:
        octets = await self._reader.read(_READ)
        if not octets:
            raise _Gone
        return octets

    async def _feed(self) -> None:
        octets = await self._read()
        try:
            self._asked += self.channel.receive(octets)
        finally:
            self._writer.write(self.channel.to_send())


@dataclass(frozen=True, slots=True)
class KeSabotage:
    """One way to spoil key establishment.

    `failure` is what a client reports, None when it has to take the answer nevertheless; `says` stands in its
    message. With `waits` only the client's own deadline ends it. `kept` is how many cookies it keeps at most, and
    `useful` whether they get it any time.
    """

    name: str
    sentence: str
    play: Callable[[KeTalk], Awaitable[None]]
    failure: Failure | None
    says: str
    waits: bool
    kept: int
    useful: bool = True


KE_SABOTAGES: dict[str, KeSabotage] = {}


def _ke(
    failure: Failure | None, *, says: str = "", waits: bool = False, kept: int = 8, useful: bool = True
) -> Callable[[Callable[[KeTalk], Awaitable[None]]], Callable[[KeTalk], Awaitable[None]]]:
    def enter(play: Callable[[KeTalk], Awaitable[None]]) -> Callable[[KeTalk], Awaitable[None]]:
        name, sentence = _title(play)
        KE_SABOTAGES[name] = KeSabotage(name, sentence, play, failure, says, waits, kept, useful)
        return play

    return enter


def _title(play: Callable[..., object]) -> tuple[str, str]:
    assert play.__doc__ is not None, "a sabotage says what it does"
    return play.__name__.replace("_", "-").strip("-"), " ".join(play.__doc__.split())


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

        name, sentence = _title(spoil)
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
    return [*_without(_without(honest, RecordType.NEW_COOKIE), RecordType.END_OF_MESSAGE), *cookies, _END]


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
    return records.encode(honest[:-2]) + b"\0\5" + uint16(len(cookie) + 100) + cookie + _END.encode()


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
    return [*_without(_cookies(honest), RecordType.END_OF_MESSAGE), _END, *honest]


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
    return _with([_END], RecordType.ERROR, uint16(1))


@_answer(Failure.KE, says="error 2")
def error_2(_honest: list[Record]) -> list[Record]:
    """Answers Error 2 alone; the client reports the code."""
    return _with([_END], RecordType.ERROR, uint16(2))


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
    return [Record(0x4000, b"x"), Record(0x7FFF), *honest[:-1], Record(0x4000, b"x"), _END]


@_answer(None)
def records_in_another_order(honest: list[Record]) -> list[Record]:
    """Sends the cookies first and the rest backwards; the client does not mind (section 4)."""
    return [*reversed(honest[:-1]), _END]


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
        _END,
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


# --- NTP -----------------------------------------------------------------------------------------------------------


class Fate(StrEnum):
    """What a client makes of datagrams."""

    # Alone they end in the client's deadline; the true answer after them is taken.
    IGNORED = "ignored"
    # The same, but at the deadline the client may say that there was a kiss code nobody vouches for.
    HINT = "hint"
    # They end the exchange at once with an authentic kiss code.
    KISS = "kiss"
    # They hold the true answer, and what is wrong with them does not matter.
    TAKEN = "taken"


class Source(StrEnum):
    """Where the datagrams come from."""

    SERVER = "server"
    OTHER_PORT = "other-port"
    OTHER_ADDRESS = "other-address"


@dataclass(frozen=True, slots=True)
class NtpTurn:
    """One request, the true answer to it, and what is needed to make others."""

    request: bytes
    packet: Packet
    keys: SessionKeys
    truth: bytes
    # True answers to earlier requests, and one to another client.
    earlier: tuple[bytes, ...]
    answer_of_others: bytes
    cookie_of_others: bytes
    keyring: Keyring
    random: random.Random

    @property
    def echo(self) -> bytes:
        """The unique identifier as the answer has to echo it."""
        return encode_fields(self.packet.of_type(FieldType.UNIQUE_IDENTIFIER))

    def true_header(self, **changes: Any) -> Header:
        return Header.decode(self.truth)._replace(**changes)

    def lie(self, **changes: Any) -> bytes:
        """A header that answers the request with a time an hour off."""
        true = Header.decode(self.truth)
        receive, transmit = true.receive + _LIE_STEPS, true.transmit + _LIE_STEPS
        return self.true_header(**{"receive": receive, "transmit": transmit, **changes}).encode()

    def cookie(self) -> bytes:
        """A field with one more honest cookie."""
        return Field(
            FieldType.COOKIE, self.keyring.seal(self.keys, self.random.randbytes(COOKIE_NONCE_LENGTH))
        ).encode()

    def sealed(self, clear: bytes, hidden: bytes | None = None, key: bytes | None = None) -> bytes:
        """`clear` under the session's S2C key or another one, with hidden fields (an honest cookie unless told)."""
        plaintext = self.cookie() if hidden is None else hidden
        aead = Aead(self.keys.aead, self.keys.s2c if key is None else key)
        return protect(clear, plaintext, aead, self.random.randbytes(NONCE_LENGTH[self.keys.aead]))

    def kiss(self, code: bytes, **changes: Any) -> bytes:
        """The header and identifier of a kiss-of-death."""
        told = {"leap": Leap.UNSYNCHRONISED, "stratum": 0, "reference_id": code, **changes}
        return self.true_header(**told).encode() + self.echo


_Play = Callable[[NtpTurn], Iterable[bytes]]


@dataclass(frozen=True, slots=True)
class NtpSabotage:
    """One way to spoil the answer to an NTP request; `endless` when its datagrams never stop."""

    name: str
    sentence: str
    play: _Play
    fate: Fate
    source: Source
    kiss: str
    endless: bool


NTP_SABOTAGES: dict[str, NtpSabotage] = {}


def _ntp(
    fate: Fate, *, source: Source = Source.SERVER, kiss: str = "", endless: bool = False
) -> Callable[[_Play], _Play]:
    def enter(play: _Play) -> _Play:
        name, sentence = _title(play)
        NTP_SABOTAGES[name] = NtpSabotage(name, sentence, play, fate, source, kiss, endless)
        return play

    return enter


def _flipped(octets: bytes, bit: int) -> bytes:
    flipped = bytearray(octets)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


# Answers that are not authentic


@_ntp(Fate.IGNORED)
def bit_flip(turn: NtpTurn) -> Iterator[bytes]:
    """The true answer with one bit flipped, once in each octet; each is ignored."""
    return (_flipped(turn.truth, 8 * octet + octet % 8) for octet in range(len(turn.truth)))


@_ntp(Fate.IGNORED)
def unprotected(turn: NtpTurn) -> list[bytes]:
    """Header and identifier are right and nothing protects them; ignored."""
    return [turn.lie() + turn.echo]


@_ntp(Fate.IGNORED)
def plain_ntp(turn: NtpTurn) -> list[bytes]:
    """An answer of plain NTP, 48 octets; ignored."""
    return [turn.lie()]


@_ntp(Fate.IGNORED)
def wrong_identifier(turn: NtpTurn) -> list[bytes]:
    """Well sealed, with the identifier of another request, a part of ours, or ours and more; ignored."""
    (own,) = turn.packet.of_type(FieldType.UNIQUE_IDENTIFIER)
    values = (turn.random.randbytes(32), own.value[:28], own.value + bytes(4), bytes(32))
    return [turn.sealed(turn.lie() + Field(FieldType.UNIQUE_IDENTIFIER, value).encode()) for value in values]


@_ntp(Fate.IGNORED)
def no_identifier(turn: NtpTurn) -> list[bytes]:
    """Well sealed, without a unique identifier in the clear; ignored (section 5.3)."""
    return [turn.sealed(turn.lie()), turn.sealed(turn.lie(), turn.echo)]


@_ntp(Fate.IGNORED)
def two_identifiers(turn: NtpTurn) -> list[bytes]:
    """Well sealed, with our identifier twice, or with another one beside it; ignored."""
    other = Field(FieldType.UNIQUE_IDENTIFIER, turn.random.randbytes(32)).encode()
    clears = (turn.echo + turn.echo, turn.echo + other, other + turn.echo)
    return [turn.sealed(turn.lie() + clear) for clear in clears]


@_ntp(Fate.IGNORED)
def identifier_after_the_authenticator(turn: NtpTurn) -> list[bytes]:
    """Well sealed, with the identifier where nothing protects it; ignored (section 5.7)."""
    return [turn.sealed(turn.lie()) + turn.echo]


@_ntp(Fate.IGNORED)
def wrong_origin(turn: NtpTurn) -> list[bytes]:
    """Well sealed, but not for the transmit timestamp that was sent: zero, one off, our real time; ignored."""
    origins = (0, turn.packet.header.transmit ^ 1, Header.decode(turn.truth).receive)
    return [turn.sealed(turn.lie(origin=origin) + turn.echo) for origin in origins]


@_ntp(Fate.IGNORED)
def wrong_mode(turn: NtpTurn) -> list[bytes]:
    """Well sealed, in each mode that is not a server's; ignored."""
    return [turn.sealed(turn.lie(mode=mode) + turn.echo) for mode in range(8) if mode != Mode.SERVER]


@_ntp(Fate.IGNORED)
def wrong_version(turn: NtpTurn) -> list[bytes]:
    """Well sealed, in versions of NTP that do not exist or that NTS is not made for; ignored."""
    return [turn.sealed(turn.lie(version=version) + turn.echo) for version in (0, 1, 2, 3, 5, 6, 7)]


@_ntp(Fate.IGNORED)
def zero_timestamps(turn: NtpTurn) -> list[bytes]:
    """Well sealed, without the time of receipt or of sending (RFC 5905 section 8); ignored."""
    lies = (turn.lie(receive=0), turn.lie(transmit=0), turn.lie(receive=0, transmit=0))
    return [turn.sealed(lie + turn.echo) for lie in lies]


@_ntp(Fate.IGNORED)
def reflection(turn: NtpTurn) -> list[bytes]:
    """Our own request, and a lie under our own C2S key; ignored."""
    return [turn.request, turn.sealed(turn.lie() + turn.echo, key=turn.keys.c2s)]


@_ntp(Fate.IGNORED)
def other_key(turn: NtpTurn) -> list[bytes]:
    """Sealed with a key that is not ours; ignored."""
    return [turn.sealed(turn.lie() + turn.echo, key=turn.random.randbytes(len(turn.keys.s2c)))]


@_ntp(Fate.IGNORED)
def replay(turn: NtpTurn) -> tuple[bytes, ...]:
    """The true answers to earlier requests of ours again; ignored."""
    assert turn.earlier, "nothing to replay yet"
    return turn.earlier


@_ntp(Fate.IGNORED)
def replay_for_this_request(turn: NtpTurn) -> list[bytes]:
    """An earlier answer's seal behind our present header and identifier; ignored."""
    assert turn.earlier, "nothing to replay yet"
    seal_of_old = turn.earlier[-1][HEADER_LENGTH + len(turn.echo) :]
    return [turn.truth[: HEADER_LENGTH + len(turn.echo)] + seal_of_old]


@_ntp(Fate.IGNORED)
def answer_of_another_association(turn: NtpTurn) -> list[bytes]:
    """The true answer to another client, and its seal behind our header and identifier; ignored."""
    clear = HEADER_LENGTH + len(turn.echo)
    return [turn.answer_of_others, turn.truth[:clear] + turn.answer_of_others[clear:]]


@_ntp(Fate.IGNORED)
def truncated(turn: NtpTurn) -> Iterator[bytes]:
    """The true answer cut after each of its octets; ignored."""
    return (turn.truth[:length] for length in range(len(turn.truth)))


@_ntp(Fate.IGNORED)
def authenticator_lengths_that_lie(turn: NtpTurn) -> Iterator[bytes]:
    """The true answer with other lengths of nonce and ciphertext in its authenticator; ignored."""
    at = HEADER_LENGTH + len(turn.echo) + 4
    nonce, ciphertext = struct.unpack_from("!HH", turn.truth, at)
    lengths = (0, 1, 4, 12, 15, 16, 17, 255, 0x7FFF, 0x8000, 0xFFFC, 0xFFFF)
    pairs = {(wrong, ciphertext) for wrong in lengths} | {(nonce, wrong) for wrong in lengths}
    pairs |= {(wrong, wrong) for wrong in lengths} | {(nonce, ciphertext - 1), (nonce, ciphertext + 1)}
    return (
        turn.truth[:at] + struct.pack("!HH", *pair) + turn.truth[at + 4 :]
        for pair in sorted(pairs - {(nonce, ciphertext)})
    )


@_ntp(Fate.IGNORED)
def field_lengths_that_lie(turn: NtpTurn) -> Iterator[bytes]:
    """The true answer with other lengths of its extension fields; ignored."""
    for at in (HEADER_LENGTH, HEADER_LENGTH + len(turn.echo)):
        (true,) = struct.unpack_from("!H", turn.truth, at + 2)
        for wrong in (0, 1, 4, 8, 12, 16, true - 4, true - 1, true + 1, true + 4, 0x7FFC, 0xFFFC, 0xFFFF):
            yield turn.truth[: at + 2] + struct.pack("!H", wrong) + turn.truth[at + 4 :]


@_ntp(Fate.IGNORED)
def empty_authenticator(turn: NtpTurn) -> list[bytes]:
    """Authenticators that hold nothing, or a nonce and no ciphertext; ignored."""
    bodies = (bytes(12), bytes(64), b"\0\x10\0\0" + bytes(16), b"\0\x10\0\x10" + bytes(32))
    return [turn.lie() + turn.echo + Field(FieldType.AUTHENTICATOR, body).encode() for body in bodies]


@_ntp(Fate.IGNORED)
def hidden_fields_malformed(turn: NtpTurn) -> list[bytes]:
    """Well sealed, with a cookie and then no whole field inside; ignored, and that cookie is not kept."""
    hostile = Field(FieldType.COOKIE, b"\xbb" * 100).encode()
    tails = (b"\0", bytes(4), b"\2\4\0\3", b"\2\4\xff\xff", b"\2\4\0\x08" + bytes(3))
    return [turn.sealed(turn.lie() + turn.echo, hostile + tail) for tail in tails]


@_ntp(Fate.IGNORED)
def cookies_in_clear_only(turn: NtpTurn) -> list[bytes]:
    """Cookies beside header and identifier, and no authenticator; ignored, and no cookie is kept."""
    return [turn.lie() + turn.echo + Field(FieldType.COOKIE, b"\xbb" * 100).encode() * 2]


@_ntp(Fate.IGNORED)
def datagrams_too_long(turn: NtpTurn) -> list[bytes]:
    """The true answer, made longer than anybody looks at, up to what UDP can carry; ignored."""
    return [
        turn.truth + _filler(length - len(turn.truth))
        for length in (MAX_DATAGRAM + 4, 9000, _LONGEST_DATAGRAM - 3)
    ]


def _filler(length: int) -> bytes:
    """One unknown extension field."""
    return struct.pack("!HH", 0x4000, length) + bytes(length - 4)


@_ntp(Fate.IGNORED)
def garbage(turn: NtpTurn) -> list[bytes]:
    """Random octets of many lengths, none of them included, and zeroes; ignored."""
    return [turn.random.randbytes(length) for length in (0, 1, 3, 47, 48, 49, 68, 72, 100, 228, 1500)] + [
        bytes(228)
    ]


@_ntp(Fate.IGNORED, endless=True)
def flood_of_garbage(turn: NtpTurn) -> Iterator[bytes]:
    """Answers with a broken seal without end, faster than they can be checked; the deadline still ends it."""
    broken = [_flipped(turn.truth, -1 - bit) for bit in range(64)]
    return itertools.cycle([*broken, b"", turn.random.randbytes(48)])


@_ntp(Fate.IGNORED, source=Source.OTHER_PORT, endless=True)
def flood_from_another_port(turn: NtpTurn) -> Iterator[bytes]:
    """Sealed lies without end from another port; the deadline still ends it."""
    return itertools.repeat(turn.sealed(turn.lie() + turn.echo))


@_ntp(Fate.IGNORED, source=Source.OTHER_PORT)
def answer_from_another_port(turn: NtpTurn) -> list[bytes]:
    """A sealed answer, but from another port of the server's address; ignored."""
    return [turn.sealed(turn.lie() + turn.echo)]


@_ntp(Fate.IGNORED, source=Source.OTHER_ADDRESS)
def answer_from_another_address(turn: NtpTurn) -> list[bytes]:
    """A sealed answer, but from the same port of another address; ignored."""
    return [turn.sealed(turn.lie() + turn.echo)]


# Kisses of death


@_ntp(Fate.HINT, kiss="NTSN")
def forged_ntsn(turn: NtpTurn) -> list[bytes]:
    """NTSN with the right identifier, which nothing protects; a hint, and the client waits on (section 5.7)."""
    return [turn.kiss(b"NTSN")] * 3


@_ntp(Fate.IGNORED, source=Source.OTHER_PORT)
def ntsn_from_another_port(turn: NtpTurn) -> list[bytes]:
    """The same from another port; not even a hint."""
    return [turn.kiss(b"NTSN")]


@_ntp(Fate.IGNORED)
def ntsn_for_another_request(turn: NtpTurn) -> list[bytes]:
    """NTSN with another identifier, another origin or another mode; not even a hint."""
    other = Field(FieldType.UNIQUE_IDENTIFIER, turn.random.randbytes(32)).encode()
    return [
        turn.kiss(b"NTSN")[:HEADER_LENGTH] + other,
        turn.kiss(b"NTSN", origin=turn.packet.header.transmit ^ 1),
        turn.kiss(b"NTSN", mode=Mode.CLIENT),
        turn.kiss(b"NTSN", stratum=1),
    ]


@_ntp(Fate.IGNORED)
def forged_kisses(turn: NtpTurn) -> list[bytes]:
    """RATE, DENY and RSTR with the right identifier, which nothing protects; ignored (section 5.7)."""
    return [turn.kiss(code) for code in (b"RATE", b"DENY", b"RSTR")]


@_ntp(Fate.IGNORED)
def kisses_with_a_broken_seal(turn: NtpTurn) -> list[bytes]:
    """RATE, DENY, RSTR and NTSN with a seal that does not fit; ignored."""
    return [_flipped(turn.sealed(turn.kiss(code)), -1) for code in (b"RATE", b"DENY", b"RSTR", b"NTSN")]


@_ntp(Fate.KISS, kiss="RATE")
def authentic_rate(turn: NtpTurn) -> list[bytes]:
    """RATE that the session's key protects; the client stops asking."""
    return [turn.sealed(turn.kiss(b"RATE"))]


@_ntp(Fate.KISS, kiss="DENY")
def authentic_deny(turn: NtpTurn) -> list[bytes]:
    """DENY that the session's key protects; the client stops asking."""
    return [turn.sealed(turn.kiss(b"DENY"))]


@_ntp(Fate.KISS, kiss="RSTR")
def authentic_rstr(turn: NtpTurn) -> list[bytes]:
    """RSTR that the session's key protects; the client stops asking."""
    return [turn.sealed(turn.kiss(b"RSTR"))]


@_ntp(Fate.KISS, kiss="1b5b324a")
def authentic_kiss_of_control_characters(turn: NtpTurn) -> list[bytes]:
    """A protected kiss code that would clear a terminal; the client stops and shows it in hexadecimal."""
    return [turn.sealed(turn.kiss(b"\x1b[2J"))]


# What does not matter


@_ntp(Fate.TAKEN)
def same_answer_twice(turn: NtpTurn) -> list[bytes]:
    """The true answer twice; the first is taken, the second is nothing any more."""
    return [turn.truth, turn.truth]


@_ntp(Fate.TAKEN)
def fields_after_the_authenticator(turn: NtpTurn) -> list[bytes]:
    """Cookies, an identifier and a second authenticator behind the first; all of that is ignored (section 5.7)."""
    hostile = Field(FieldType.COOKIE, b"\xbb" * 100).encode()
    other = Field(FieldType.UNIQUE_IDENTIFIER, bytes(32)).encode()
    return [turn.truth + hostile + other + Field(FieldType.AUTHENTICATOR, bytes(64)).encode() + hostile]


@_ntp(Fate.TAKEN)
def rubbish_after_the_authenticator(turn: NtpTurn) -> list[bytes]:
    """Three octets behind the authenticator, which are no field; they are not looked at (section 5.7)."""
    return [turn.truth + b"\xff" * 3]


@_ntp(Fate.TAKEN)
def cookies_in_clear(turn: NtpTurn) -> list[bytes]:
    """Cookies beside the authenticator and before it; only those inside are kept (section 5.7)."""
    hostile = Field(FieldType.COOKIE, b"\xbb" * 100).encode()
    return [turn.sealed(turn.true_header().encode() + turn.echo + hostile)]


@_ntp(Fate.TAKEN)
def unknown_fields(turn: NtpTurn) -> list[bytes]:
    """Unknown fields in the clear and inside, so that the answer is longer than was asked for; skipped."""
    return [turn.sealed(turn.true_header().encode() + turn.echo + _filler(600), turn.cookie() + _filler(600))]


@_ntp(Fate.TAKEN)
def more_cookies_than_asked(turn: NtpTurn) -> list[bytes]:
    """Twelve good cookies inside; taken, and the client never has more than eight."""
    hidden = b"".join(turn.cookie() for _ in range(12))
    return [turn.sealed(turn.true_header().encode() + turn.echo, hidden)]


@_ntp(Fate.TAKEN)
def no_cookies_back(turn: NtpTurn) -> list[bytes]:
    """No cookie inside; the time is taken."""
    return [turn.sealed(turn.true_header().encode() + turn.echo, b"")]


@_ntp(Fate.TAKEN)
def swapped_cookies_back(turn: NtpTurn) -> list[bytes]:
    """Another client's cookies inside; the client cannot know, and takes the time."""
    return [
        turn.sealed(
            turn.true_header().encode() + turn.echo, Field(FieldType.COOKIE, turn.cookie_of_others).encode()
        )
    ]


@_ntp(Fate.TAKEN)
def zero_length_cookies_back(turn: NtpTurn) -> list[bytes]:
    """Eight cookies of no octets inside; the time is taken and none is kept."""
    return [turn.sealed(turn.true_header().encode() + turn.echo, struct.pack("!HH", FieldType.COOKIE, 4) * 8)]


@_ntp(Fate.TAKEN)
def oversized_cookies_back(turn: NtpTurn) -> list[bytes]:
    """A cookie longer than a client keeps inside; the time is taken and that cookie is not kept."""
    hidden = Field(FieldType.COOKIE, b"\xbb" * (MAX_COOKIE_LENGTH + 4)).encode()
    return [turn.sealed(turn.true_header().encode() + turn.echo, hidden)]


# --- The server ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Counted:
    """What the saboteur has seen; `outlasted` is how often a client was still there when it should not be."""

    connections: int = 0
    ke_requests: int = 0
    nts_requests: int = 0
    plain_requests: int = 0
    outlasted: int = 0


class Saboteur:
    """The server; a context manager. Without a sabotage it keeps the rules.

    `ke` and `ntp` are what is played to whoever comes next, `algorithm` what is preferred. With `truth_follows` the true answer is sent after
    an NTP sabotage, or in its midst when it never ends. One client at a time: its next NTP request ends what is
    still being sent for the one before.
    """

    def __init__(self, authority: Authority, *, seed: int = 0) -> None:
        self.ke: KeSabotage | None = None
        self.ntp: NtpSabotage | None = None
        self.truth_follows = False
        self.algorithm = SUPPORTED[0]
        self.counted = Counted()
        self.last_truth = b""
        self.random = random.Random(seed)
        self.keyring = Keyring.new(0, self.random.randbytes)
        self._ntp_server = NtpServer(self.keyring, self.random.randbytes)
        self._channels = _channels(authority)
        self._earlier: list[bytes] = []
        self._talks: set[asyncio.Task[None]] = set()
        self._shots: set[asyncio.Task[None]] = set()
        self._faults: list[Exception] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="saboteur", daemon=True)
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self._bind()

    def _bind(self) -> None:
        middle, last = (
            f"127.{64 + secrets.randbelow(64)}.{secrets.randbelow(256)}",
            1 + secrets.randbelow(250),
        )
        self.address, self.other_address = f"{middle}.{last}", f"{middle}.{last + 1}"
        others = ("127.0.0.1", "::1")
        self.ntp_port = free_port(self.address, self.other_address, *others)
        self._listener = socket.create_server((self.address, 0))
        self.ke_port: int = self._listener.getsockname()[1]
        server = _udp(self.address, self.ntp_port)
        self._sources = {
            Source.SERVER: server,
            Source.OTHER_PORT: _udp(self.address, 0),
            Source.OTHER_ADDRESS: _udp(self.other_address, self.ntp_port),
        }
        self._inboxes = [server, *(_udp(address, self.ntp_port) for address in others)]
        # A fall-back to plain NTP would go there; only the privileged may listen, and only where nobody else does.
        with contextlib.suppress(OSError):
            self._inboxes.append(_udp(self.address, 123))

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(10):
            raise LabError("the saboteur did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        for sock in {*self._sources.values(), *self._inboxes}:
            sock.close()
        self._blame()

    def _blame(self) -> None:
        """What went wrong in the saboteur itself is never taken for the client's merit."""
        faults, self._faults = self._faults, []
        if faults:
            raise LabError(f"the saboteur failed: {faults[0]!r}") from faults[0]

    def reset(self) -> None:
        """End what is under way, forget what was counted, and keep the rules from now on."""

        async def forget() -> None:
            self.ke = self.ntp = None
            self.truth_follows = False
            self.algorithm = SUPPORTED[0]
            await _end(self._talks | self._shots)
            self._drain()
            await _end(self._shots)
            self.counted = Counted()
            self._earlier.clear()

        asyncio.run_coroutine_threadsafe(forget(), self._loop).result(30)
        self._blame()

    def settle(self) -> Counted:
        """What was counted, once every client that has left is known to have left."""

        async def wait() -> None:
            if self._talks:
                await asyncio.wait(self._talks)
            self._drain()

        asyncio.run_coroutine_threadsafe(wait(), self._loop).result(2 * STALL)
        self._blame()
        return self.counted

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._accepted, sock=self._listener)
        for sock in self._inboxes:
            self._loop.add_reader(sock, self._drain)
        self._ready.set()
        await self._stop.wait()
        server.close()
        for sock in self._inboxes:
            self._loop.remove_reader(sock)
        await _end(self._talks | self._shots)

    # Key establishment

    def channel(self, manner: Manner) -> TlsChannel:
        return self._channels[manner]()

    def honest_records(self, asked: bytes, channel: TlsChannel) -> list[Record]:
        """What a server that keeps the rules answers."""
        service = NtpService(NtpEndpoint(None, self.ntp_port))
        terms = KeTerms(self.keyring, service, (self.algorithm, AeadId.AES_SIV_CMAC_256))
        reply = KeServer(terms, channel.export, self.random.randbytes).receive(asked)
        assert reply is not None, "a client of ours sends its request at once"
        message = MessageReader(records.MAX_RESPONSE).receive(reply.octets)
        assert message is not None, "a server's answer is whole"
        return [*message, _END]

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.counted.connections += 1
        task = asyncio.current_task()
        assert task is not None, "a server's callback is a task"
        self._talks.add(task)
        talk = KeTalk(self, reader, writer)
        try:
            await (_keep_the_rules if self.ke is None else self.ke.play)(talk)
        except (_Gone, OSError):
            # The client has left, as it should.
            pass
        except TlsError:
            # Who spoils TLS does not get to its end; what TLS has said of that stands in the client's buffer.
            with contextlib.suppress(OSError):
                await talk.hang_up()
        except Exception as error:  # noqa: BLE001 - the root of a task; raised to whoever runs the saboteur
            self._faults.append(error)
        finally:
            self._talks.discard(task)
            writer.transport.abort()

    # NTP

    def _drain(self) -> None:
        for sock in self._inboxes:
            while True:
                try:
                    datagram, peer = sock.recvfrom(_READ)
                except BlockingIOError:
                    break
                try:
                    self._answer(sock, datagram, peer)
                except Exception as error:  # noqa: BLE001 - the root of a callback; raised as above
                    self._faults.append(error)

    def _answer(self, sock: socket.socket, datagram: bytes, peer: tuple[str, int]) -> None:
        packet = Packet.decode(datagram)
        if packet.authenticator is None:
            self.counted.plain_requests += 1
            return
        self.counted.nts_requests += 1
        truth = self.honest_reply(datagram)
        sabotage = self.ntp
        try:
            keys = self.keyring.open(packet.of_type(FieldType.COOKIE)[0].value)
            packet.decrypt(datagram, Aead(keys.aead, keys.c2s))
        except NtsError:
            # Not a cookie of this session: what is sent is NTSN, and there is no key to lie with.
            sabotage = None
        if sabotage is None:
            sock.sendto(truth, peer)
        else:
            others = self._others(keys.aead)
            cookies = self.keyring.seal_many(others, self.random.randbytes(2 * COOKIE_NONCE_LENGTH))
            asked_by_others = Association(KeResult(others, (cookies[0],)), self.random.randbytes).poll()
            turn = NtpTurn(
                request=datagram,
                packet=packet,
                keys=keys,
                truth=truth,
                earlier=tuple(self._earlier),
                answer_of_others=self.honest_reply(asked_by_others),
                cookie_of_others=cookies[1],
                keyring=self.keyring,
                random=self.random,
            )
            source = sock if sabotage.source is Source.SERVER else self._sources[sabotage.source]
            self._shoot(sabotage, turn, _Line(source, sock, peer))
        self.last_truth = truth
        self._earlier.append(truth)

    def honest_reply(self, datagram: bytes) -> bytes:
        """What a server that keeps the rules answers."""

        def now() -> int:
            return time.time_ns() + TRUTH

        action = self._ntp_server.respond(datagram, received=now(), transmit_time=now, clock=_CLOCK)
        assert isinstance(action, Reply), f"a client of ours sent what no server answers: {action.outcome}"
        return action.octets

    def _others(self, aead: AeadId) -> SessionKeys:
        """Keys of another client."""
        size = KEY_LENGTH[aead]
        return SessionKeys(aead, self.random.randbytes(size), self.random.randbytes(size))

    def cookies_of_others(self) -> list[bytes]:
        """Good cookies of another client."""
        return self.keyring.seal_many(
            self._others(self.algorithm), self.random.randbytes(MAX_COOKIES * COOKIE_NONCE_LENGTH)
        )

    def _shoot(self, sabotage: NtpSabotage, turn: NtpTurn, line: "_Line") -> None:
        for task in self._shots:
            task.cancel()
        task = self._loop.create_task(_send(sabotage, turn, line, truth_follows=self.truth_follows))
        self._shots.add(task)
        task.add_done_callback(self._shot)

    def _shot(self, task: asyncio.Task[None]) -> None:
        self._shots.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._faults.append(error)


@dataclass(frozen=True, slots=True)
class _Line:
    """From where lies and truth are sent, and to whom."""

    lies: socket.socket
    truth: socket.socket
    peer: tuple[str, int]


async def _send(sabotage: NtpSabotage, turn: NtpTurn, line: _Line, *, truth_follows: bool) -> None:
    shots = iter(sabotage.play(turn))
    while portion := list(itertools.islice(shots, _PORTION)):
        for shot in portion:
            # A full buffer loses datagrams, as any network does.
            with contextlib.suppress(BlockingIOError):
                line.lies.sendto(shot, line.peer)
        if sabotage.endless and truth_follows:
            line.truth.sendto(turn.truth, line.peer)
            truth_follows = False
        # A flood takes no breath: a client might use it to see that its deadline has passed.
        await asyncio.sleep(0 if sabotage.endless else _BREATH)
    if truth_follows:
        line.truth.sendto(turn.truth, line.peer)


async def _end(tasks: set[asyncio.Task[None]]) -> None:
    ending = list(tasks)
    for task in ending:
        task.cancel()
    await asyncio.gather(*ending, return_exceptions=True)
    # One turn of the loop lets the transports close their sockets.
    await asyncio.sleep(0)


async def _keep_the_rules(talk: KeTalk) -> None:
    await talk.handshake()
    await talk.say(records.encode(await talk.answer()))
    await talk.close()


def _udp(address: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        sock.bind((address, port))
    except OSError:
        sock.close()
        raise
    return sock


# How each manner looks


def _channels(authority: Authority) -> dict[Manner, Callable[[], TlsChannel]]:
    now = datetime.now(UTC)
    hour = timedelta(hours=1)
    good = authority.issue(NAME, file="honest")
    pairs = {
        Manner.HONEST: good,
        Manner.EXPIRED: authority.issue(NAME, not_after=now - hour, file="expired"),
        Manner.NOT_YET_VALID: authority.issue(NAME, not_before=now + hour, file="not-yet-valid"),
        Manner.WRONG_NAME: authority.issue(f"not-{NAME}", file="wrong-name"),
        Manner.OTHER_CA: Authority(authority.directory / "other-ca").issue(NAME),
    }
    credentials = {manner: ServerCredentials(*_load(pair)) for manner, pair in pairs.items()}
    credentials[Manner.SELF_SIGNED] = ServerCredentials(*_self_signed(now))
    contexts = {manner: _context(good) for manner in (Manner.TLS_1_2, Manner.NO_ALPN, Manner.OTHER_ALPN)}
    contexts[Manner.TLS_1_2].set_max_proto_version(SSL.TLS1_2_VERSION)
    contexts[Manner.TLS_1_2].set_alpn_select_callback(lambda _connection, _offered: ALPN)
    contexts[Manner.OTHER_ALPN].set_alpn_select_callback(lambda _connection, _offered: b"h2")
    return {
        **{manner: kept.channel for manner, kept in credentials.items()},
        **{manner: partial(_bare_channel, context) for manner, context in contexts.items()},
    }


def _load(pair: Pair) -> tuple[list[x509.Certificate], ec.EllipticCurvePrivateKey]:
    key = load_pem_private_key(pair.key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey), "the laboratory's keys are P-256"
    return x509.load_pem_x509_certificates(pair.cert.read_bytes()), key


def _self_signed(now: datetime) -> tuple[list[x509.Certificate], ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)
        .not_valid_after(now + _DAY)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return [certificate], key


def _context(pair: Pair) -> SSL.Context:
    chain, key = _load(pair)
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.use_certificate(chain[0])
    context.use_privatekey(key)
    return context


def _bare_channel(context: SSL.Context) -> TlsChannel:
    connection = SSL.Connection(context, None)
    connection.set_accept_state()
    return TlsChannel(connection, None)
