"""One query in, one reply out, for UDP and TCP: header, EDNS (RFC 6891), cookies (RFC 7873), what one network may take.

Pure: octets, addresses and times are arguments. Everything that is not a plain question (updates, transfers, signed
questions) is handed back to be looked at by `poolsvc.nameserver.exchange`.

Rules for UDP, where the source of a question may be forged:

1. No reply is longer than 1,232 octets, or than the client says it takes.
2. Who shows a cookie that we made for its address gets all its answers.
3. Of everybody else, a network gets so many answers of one kind a second. Of what is over that, one in two is answered
   without its content: truncated, so that whoever is there asks again by TCP, or, with a cookie that we did not make,
   BADCOOKIE and the right one. Neither is longer than its question by more than a cookie of ours.
"""

import hmac
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import dns.flags
import dns.opcode
import dns.rcode

from nts_core.ratelimit import RateLimiter
from poolsvc.nameserver import records
from poolsvc.nameserver.answers import Answer, Answers, Found

UDP_PAYLOAD = 1232
_LEAST_PAYLOAD = 512
_HEADER = 12
_NONE, _ONE = b"\0\0", b"\0\1"
_OPT = b"\0\x29"
_COOKIE = 10
_COOKIE_HEAD = b"\0\x0a\0\x18"
_CLIENT_COOKIE, _SERVER_COOKIE = 8, 16
_SERVER_COOKIES = range(_CLIENT_COOKIE + 8, _CLIENT_COOKIE + 33)
_VERSION = b"\1\0\0\0"
# RFC 9018 section 4.3: how old a cookie may be, how much ours may be ahead of it, and when it is time for a new one.
_COOKIE_LIFE, _COOKIE_AHEAD, _COOKIE_FRESH = 3600, 300, 1800
# Questions to the letter whose replies are kept until the zone changes.
_MOST_REPLIES, _LONGEST_KEPT = 20_000, 300
# RD and CD come back as they were asked.
_ECHOED = 0x0110
_QR, _OPCODE, _TC = 0x8000, 0x7800, 0x0200


class Malformed(Exception):
    """The message breaks the rules of its own form."""


class Edns(NamedTuple):
    """What an OPT record says; `cookie` is the client's own and, if it has one, ours."""

    payload: int
    dnssec: bool
    version: int
    cookie: bytes


class Question(NamedTuple):
    """A plain question: `octets` as the client wrote it, `name` in lower case, of a header with `flags`."""

    identifier: bytes
    flags: int
    octets: bytes
    name: bytes
    rdtype: int
    rdclass: int
    edns: Edns | None


class Other(Exception):
    """The message is none that this module answers: an update, a notification, a signed one, a transfer."""


def parse(message: bytes) -> Question:
    """Raises Other, Malformed."""
    try:
        return _parse(message)
    except IndexError:
        raise Malformed from None


def _parse(message: bytes) -> Question:
    flags = message[2] << 8 | message[3]
    if flags & _OPCODE:
        raise Other
    if message[4:8] != _ONE + _NONE:
        raise Malformed
    octets = _question(message)
    end = _HEADER + len(octets)
    rdtype = octets[-4] << 8 | octets[-3]
    if rdtype in (records.AXFR, records.IXFR):
        raise Other
    if message[8:10] != _NONE:
        raise Other if rdtype == records.SETS else Malformed
    additional, edns = message[10:12], None
    if additional != _NONE:
        if additional != _ONE or message[end] or message[end + 1 : end + 3] != _OPT:
            raise Other
        edns, end = _edns(message, end), end + 11 + (message[end + 9] << 8 | message[end + 10])
    if end != len(message):
        raise Malformed
    # No label has a length that is a letter, so all octets can be lowered at once.
    return Question(
        message[:2], flags, octets, octets[:-4].lower(), rdtype, octets[-2] << 8 | octets[-1], edns
    )


def _question(message: bytes) -> bytes:
    """Name, type and class as they were written; a pointer could lead nowhere from the first name."""
    at = _HEADER
    while length := message[at]:
        if length > 63:
            raise Malformed
        at += 1 + length
    octets = message[_HEADER : at + 5]
    if at >= _HEADER + 255 or len(octets) != at + 5 - _HEADER:
        raise Malformed
    return octets


def _edns(message: bytes, at: int) -> Edns:
    """The OPT record at a place, the root's name first."""
    payload = message[at + 3] << 8 | message[at + 4]
    version, dnssec = message[at + 6], bool(message[at + 7] & 0x80)
    cookie, at = b"", at + 11
    end = at + (message[at - 2] << 8 | message[at - 1])
    if end > len(message):
        raise Malformed
    while at < end:
        code, length = message[at] << 8 | message[at + 1], message[at + 2] << 8 | message[at + 3]
        at += 4 + length
        if at > end:
            raise Malformed
        if code == _COOKIE and not cookie:
            if length != _CLIENT_COOKIE and length not in _SERVER_COOKIES:
                raise Malformed
            cookie = message[at - length : at]
    return Edns(payload, dnssec, version, cookie)


class Cookies:
    """Cookies in the form of RFC 9018 section 4, with BLAKE2b as the hash; RFC 7873 leaves that to a server."""

    def __init__(self, random: Callable[[int], bytes]) -> None:
        self._secret = random(32)

    def make(self, cookie: bytes, address: bytes, now: int) -> bytes:
        """Ours for a client's at Unix time `now`; the one it shows as long as that is fresh."""
        client = cookie[:_CLIENT_COOKIE]
        if self.is_ours(cookie, address, now, _COOKIE_FRESH):
            return cookie[_CLIENT_COOKIE:]
        head = _VERSION + (now % 2**32).to_bytes(4, "big")
        return head + self._hash(client + head + address)

    def is_ours(self, cookie: bytes, address: bytes, now: int, life: int = _COOKIE_LIFE) -> bool:
        """Whether a client's cookie is followed by one that we made for it not long ago."""
        if len(cookie) != _CLIENT_COOKIE + _SERVER_COOKIE or cookie[8:12] != _VERSION:
            return False
        age = (now - int.from_bytes(cookie[12:16], "big") + 2**31) % 2**32 - 2**31
        if not -_COOKIE_AHEAD <= age <= life:
            return False
        return hmac.compare_digest(self._hash(cookie[:16] + address), cookie[16:])

    def _hash(self, octets: bytes) -> bytes:
        return blake2b(octets, digest_size=8, key=self._secret).digest()


@dataclass(frozen=True, slots=True, eq=False)
class _Frame:
    """All of the replies to one message that is the same whichever answer is drawn."""

    flags: bytes
    question: bytes  # with the number of additional records before it
    opt: bytes

    @property
    def octets(self) -> int:
        """Of a reply, without the answer's body."""
        return 2 + len(self.flags) + 4 + len(self.question) + len(self.opt)

    def filled(self, answer: Answer) -> bytes:
        """The reply without its identifier."""
        return b"".join((self.flags, answer.counts, self.question, answer.body, self.opt))


_BAD_VERSION = Found.of(
    Answer(_QR | 0x10000, bytes(4), b"", b"?")
)  # BADVERS is 16: the upper bits go into OPT
_NOT_OURS = Found.of(Answer(_QR | dns.rcode.REFUSED, bytes(4), b"", b"?"))


class Responder:
    """Answers plain questions about the zones that `answers` finds; where it finds several, each gets one at random."""

    def __init__(
        self,
        answers: Answers,
        random: Callable[[int], bytes],
        *,
        responses_per_second: float,
        responses_at_once: int,
        uniform: Callable[[], float],
    ) -> None:
        """Both are of one kind of answer to one IPv4 /24 or IPv6 /56. `uniform` draws from [0, 1)."""
        self.counters: Counter[str] = Counter()
        self._answers = answers
        self._cookies = Cookies(random)
        self._limiter = RateLimiter(round(1e9 / responses_per_second), responses_at_once, random)
        self._uniform = uniform
        self._slips = 0
        # What a question without a cookie gets, by all of it but the identifier: the frame and the answers, of which one is
        # drawn, or the reply itself where there is one answer only.
        self._replies: dict[bytes, tuple[bytes, bytes | _Frame, tuple[Answer, ...]]] = {}
        self._edition = answers.edition

    def over_udp(self, message: bytes, address: bytes, now: int, monotonic: int) -> bytes | None:
        """The reply to a datagram, None for none; `now` is Unix time, `monotonic` nanoseconds. Raises Other."""
        if self._edition != self._answers.edition:
            self._edition = self._answers.edition
            self._replies.clear()
        kept = self._replies.get(message[2:])
        if kept is not None and self._limiter.take_key(_network(address) + kept[0], monotonic):
            _, reply, answers = kept
            return message[:2] + (reply if isinstance(reply, bytes) else reply.filled(self._drawn(answers)))
        if len(message) < _HEADER or message[2] & 0x80:
            self.counters["ignored"] += 1
            return None
        try:
            question = parse(message)
        except Malformed:
            if self._limiter.take_key(_network(address) + b"!", monotonic):
                return self.refuse(message, dns.rcode.FORMERR)
            self.counters["limited"] += 1
            return None
        return self._answer(message, question, address, now, monotonic)

    def _answer(
        self, message: bytes, question: Question, address: bytes, now: int, monotonic: int
    ) -> bytes | None:
        edns = question.edns
        has_cookie = edns is not None and bool(edns.cookie)
        if edns is not None and has_cookie and self._cookies.is_ours(edns.cookie, address, now):
            return self._reply(question, address, now, _limit_of(edns))
        found, limit = self._found(question), _limit_of(edns)
        answer = self._drawn(found.answers)
        if not self._limiter.take_key(_network(address) + answer.kind, monotonic):
            return self._slip(question, address, now)
        reply = self._assemble(question, answer, address, now, limit)
        if not has_cookie and len(message) <= _LONGEST_KEPT:
            if len(self._replies) >= _MOST_REPLIES:
                self._replies.clear()
            if len(found.answers) == 1:
                self._replies[message[2:]] = answer.kind, reply[2:], ()
            elif (frame := self._frame(question, answer.head, address, now)).octets + found.longest <= limit:
                self._replies[message[2:]] = answer.kind, frame, found.answers
        return reply

    def _drawn(self, answers: tuple[Answer, ...]) -> Answer:
        return answers[0] if len(answers) == 1 else answers[int(self._uniform() * len(answers))]

    def reply(self, message: bytes, address: bytes, now: int, limit: int = 65_535) -> bytes:
        """The reply to somebody who is where it says, of at most `limit` octets. Raises Other, Malformed."""
        if len(message) < _HEADER or message[2] & 0x80:
            raise Malformed
        return self._reply(parse(message), address, now, limit)

    def may_ask(self, address: bytes, monotonic: int) -> bool:
        """Whether a network may have another message looked at that costs more than a question."""
        return self._limiter.take_key(_network(address) + b"*", monotonic)

    def refuse(self, message: bytes, rcode: dns.rcode.Rcode) -> bytes:
        """A reply that has nothing but a header: the question of what was not understood cannot be repeated."""
        self.counters[dns.rcode.to_text(rcode)] += 1
        flags = (message[2] << 8 | message[3]) & (_OPCODE | _ECHOED) | _QR | rcode
        return message[:2] + flags.to_bytes(2, "big") + bytes(8)

    def _reply(self, question: Question, address: bytes, now: int, limit: int) -> bytes:
        answer = self._drawn(self._found(question).answers)
        return self._assemble(question, answer, address, now, limit)

    def _found(self, question: Question) -> Found:
        edns = question.edns
        if edns is not None and edns.version:
            return _BAD_VERSION
        if question.rdclass == records.IN:
            found = self._answers.find(
                question.name, question.rdtype, dnssec=edns is not None and edns.dnssec
            )
            if found is not None:
                return found
        return _NOT_OURS

    def _slip(self, question: Question, address: bytes, now: int) -> bytes | None:
        self.counters["limited"] += 1
        self._slips ^= 1
        if self._slips:
            return None
        self.counters["slipped"] += 1
        head = _QR | _TC
        if question.edns is not None and question.edns.cookie:
            head = _QR | 0x10000 | 7  # BADCOOKIE is 23
        return self._assemble(question, Answer(head, bytes(4), b"", b""), address, now, UDP_PAYLOAD)

    def _assemble(self, question: Question, answer: Answer, address: bytes, now: int, limit: int) -> bytes:
        frame = self._frame(question, answer.head, address, now)
        reply = question.identifier + frame.filled(answer)
        if len(reply) <= limit:
            return reply
        self.counters["truncated"] += 1
        frame = self._frame(question, answer.head | _TC, address, now)
        return question.identifier + frame.filled(Answer(0, bytes(4), b"", b""))

    def _frame(self, question: Question, head: int, address: bytes, now: int) -> _Frame:
        edns, opt, additional = question.edns, b"", _NONE
        if edns is not None:
            opt, additional = self._opt(edns, head >> 16, address, now), _ONE
        flags = head & 0xFFFF | question.flags & _ECHOED
        return _Frame(flags.to_bytes(2, "big") + _ONE, additional + question.octets, opt)

    def _opt(self, edns: Edns, upper_rcode: int, address: bytes, now: int) -> bytes:
        options = b""
        if edns.cookie:
            ours = self._cookies.make(edns.cookie, address, now)
            options = _COOKIE_HEAD + edns.cookie[:_CLIENT_COOKIE] + ours
        flags = b"\x80\0" if edns.dnssec else b"\0\0"
        return b"".join(
            (
                b"\0" + _OPT,
                UDP_PAYLOAD.to_bytes(2, "big"),
                bytes((upper_rcode, 0)),
                flags,
                len(options).to_bytes(2, "big"),
                options,
            )
        )


def _limit_of(edns: Edns | None) -> int:
    return _LEAST_PAYLOAD if edns is None else min(max(edns.payload, _LEAST_PAYLOAD), UDP_PAYLOAD)


def _network(address: bytes) -> bytes:
    return address[:3] if len(address) == 4 else address[:7]
