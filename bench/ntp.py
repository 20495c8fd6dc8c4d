"""`python -m bench.ntp`: NTP answers a second, and the server's processor time an answer, of all servers there are.

Requests are made and authenticated beforehand and sent many times: no server remembers requests. A sample of
the answers is checked; one that is not authentic ends the bench with an error.
"""

import asyncio
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench import native, report
from bench.contenders import (
    ADDRESS,
    AEAD,
    CHRONYD,
    ECHO,
    NATIVE,
    NATIVE_2,
    NTPD_RS,
    PYTHON,
    TimeServer,
    contest,
    possible,
)
from bench.load import LoadError
from bench.report import Comparison, Goal, Turn
from nts_core.aead import NONCE_LENGTH, Aead, SessionKeys
from nts_core.association import Association
from nts_core.client import establish, exchange
from nts_core.errors import NotAuthentic, WireError
from nts_core.ke import KeResult
from nts_core.packet import Field, FieldType, Header, Mode, Packet, encode_fields, protect
from nts_core.tls import Trust

TITLES = {
    "nts": ("NTS: one cookie, no placeholder, 228 octets, AES-SIV-CMAC-256", "answer"),
    "plain": ("Plain NTP: 48 octets", "answer"),
}
SERVERS = (NATIVE, NATIVE_2, PYTHON, CHRONYD, NTPD_RS, ECHO)
GOALS = {
    "nts": (
        Goal(NATIVE, CHRONYD, 1.7),
        Goal(NATIVE, ECHO, 0.7),
        # A second thread makes an answer dearer by 10 % at most.
        Goal(NATIVE_2, NATIVE, 1 / 1.1),
        Goal(NATIVE, NTPD_RS),
        Goal(PYTHON, CHRONYD, 1 / 9),
    ),
    "plain": (Goal(NATIVE, CHRONYD, 1.0), Goal(NATIVE, ECHO), Goal(NATIVE, NTPD_RS), Goal(PYTHON, CHRONYD)),
}
DEFAULT_SECONDS = 60.0
# Different session keys, so that nothing is measured that a server keeps by them.
_SESSIONS = 32
_REQUESTS = 2048
# Octets of a cookie with two keys of 32, as ours and chronyd's are.
_COOKIE = 100
_SAMPLES = 64
_WARM_UP = 0.1


@dataclass(frozen=True, slots=True)
class Question:
    """One request, and what its answer is known by; without a key it is plain NTP."""

    datagram: bytes
    transmit: int
    identifier: bytes = b""
    s2c: bytes | None = field(default=None, repr=False)

    @classmethod
    def plain(cls) -> "Question":
        transmit = secrets.randbits(64)
        return cls(Header(transmit=transmit).encode(), transmit)

    @classmethod
    def nts(cls, keys: SessionKeys, cookie: bytes) -> "Question":
        """A request with one cookie and no placeholder, as a client with a full jar sends it."""
        transmit, identifier = secrets.randbits(64), secrets.token_bytes(32)
        fields = (Field(FieldType.UNIQUE_IDENTIFIER, identifier), Field(FieldType.COOKIE, cookie))
        clear = Header(transmit=transmit).encode() + encode_fields(fields)
        datagram = protect(
            clear, b"", Aead(keys.aead, keys.c2s), secrets.token_bytes(NONCE_LENGTH[keys.aead])
        )
        return cls(datagram, transmit, identifier, keys.s2c)

    def check(self, reply: bytes) -> None:
        """Raise NotAuthentic or WireError unless `reply` answers this, with one new cookie for NTS."""
        packet = Packet.decode(reply)
        if packet.header.mode != Mode.SERVER or packet.header.stratum == 0 or len(reply) > len(self.datagram):
            raise NotAuthentic(f"not an answer with the time, but {packet.header}")
        if self.s2c is None:
            return
        if [found.value for found in packet.of_type(FieldType.UNIQUE_IDENTIFIER)] != [self.identifier]:
            raise NotAuthentic("another unique identifier")
        hidden = packet.decrypt(reply, Aead(AEAD, self.s2c))
        if [found.type for found in hidden].count(FieldType.COOKIE) != 1:
            raise NotAuthentic("not the one cookie that was asked for")

    def check_echo(self, reply: bytes) -> None:
        """Raise NotAuthentic unless `reply` is this."""
        if reply != self.datagram:
            raise NotAuthentic("not what was sent")


class Questions:
    """What one server is asked, ready to be sent."""

    def __init__(self, contender: TimeServer, questions: Sequence[Question]) -> None:
        self._contender = contender
        self._by_origin = {question.transmit: question for question in questions}
        datagrams = [question.datagram for question in questions]
        self._load = native.load(ADDRESS, contender.ntp_port, datagrams, contender.sources)

    def turn(self, seconds: float) -> Turn:
        before = self._contender.cpu_ns()
        burst = self._load.run(seconds, samples=_SAMPLES)
        cpu_ns = self._contender.cpu_ns() - before
        for reply in burst.sample:
            self._check(reply)
        return Turn(burst.answered, burst.lost, len(burst.sample), burst.seconds, cpu_ns, burst.cpu_ns)

    def _check(self, reply: bytes) -> None:
        try:
            header = Header.decode(reply)
            if self._contender.name == ECHO:
                self._by_origin[header.transmit].check_echo(reply)
            else:
                self._by_origin[header.origin].check(reply)
        except KeyError:
            raise LoadError(f"an answer of {self._contender.name} to no request of ours") from None
        except (NotAuthentic, WireError) as error:
            raise LoadError(f"a wrong answer of {self._contender.name}: {error}") from None


async def nts_questions(contender: TimeServer, trust: Trust) -> list[Question]:
    """64 requests a session: each of its eight cookies buys eight. What is echoed only looks like that."""
    if contender.name == ECHO:
        keys = SessionKeys(AEAD, secrets.token_bytes(32), secrets.token_bytes(32))
        return [Question.nts(keys, secrets.token_bytes(_COOKIE)) for _ in range(_REQUESTS)]
    questions: list[Question] = []
    for _ in range(_SESSIONS):
        established = await establish(ADDRESS, ADDRESS, contender.ke_port, trust, offered=(AEAD,))
        keys = established.result.keys
        for cookie in established.result.cookies:
            association = Association(KeResult(keys, (cookie,)), secrets.token_bytes)
            await exchange(association, ADDRESS, contender.ntp_port)
            questions += [Question.nts(keys, association.jar.take()) for _ in range(len(association.jar))]
    return questions


def measure(seconds: float, rounds: int) -> dict[str, Comparison]:
    """Both kinds of requests; `seconds` of load in all."""
    with contest(possible(*SERVERS)) as running:
        asked: dict[tuple[str, str], Questions] = {}
        for contender in running.contenders:
            nts = asyncio.run(nts_questions(contender, running.trust))
            asked["nts", contender.name] = Questions(contender, nts)
            plain = [Question.plain() for _ in range(_REQUESTS)]
            asked["plain", contender.name] = Questions(contender, plain)
        for questions in asked.values():
            questions.turn(_WARM_UP)
        length = seconds / (rounds * len(asked))

        def turn_of(kind: str) -> Callable[[TimeServer], Turn]:
            return lambda contender: asked[kind, contender.name].turn(length)

        return {
            kind: Comparison.run(running.contenders, rounds, turn_of(kind), GOALS[kind]) for kind in TITLES
        }


def main() -> int:
    return report.main("ntp", "NTP beside chronyd's, on loopback", measure, TITLES, DEFAULT_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
