"""The table of spoiled answers to NTP requests: `NTP_SABOTAGES`, an entry for each function that `_ntp` marks."""

import itertools
import struct
from collections.abc import Callable, Iterator

from lab.saboteur.server import Fate, NtpPlay, NtpSabotage, NtpTurn, Source, title
from nts_core.cookies import MAX_COOKIE_LENGTH
from nts_core.packet import HEADER_LENGTH, MAX_DATAGRAM, Field, FieldType, Header, Mode

_LONGEST_DATAGRAM = 65_507

NTP_SABOTAGES: dict[str, NtpSabotage] = {}


def _ntp(
    fate: Fate, *, source: Source = Source.SERVER, kiss: str = "", endless: bool = False
) -> Callable[[NtpPlay], NtpPlay]:
    def enter(play: NtpPlay) -> NtpPlay:
        name, sentence = title(play)
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
