"""The running server: threads, sockets, counting, and what the tables' functions are given to play with."""

import asyncio
import contextlib
import itertools
import random
import secrets
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from lab.certificates import Authority
from lab.processes import LabError, free_port
from lab.saboteur.tls import Manner, channels
from nts_core import records
from nts_core.aead import KEY_LENGTH, NONCE_LENGTH, SUPPORTED, Aead, AeadId, SessionKeys
from nts_core.association import Association
from nts_core.client import Failure
from nts_core.cookies import MAX_COOKIES, Keyring
from nts_core.cookies import NONCE_LENGTH as COOKIE_NONCE_LENGTH
from nts_core.errors import NtsError, TlsError
from nts_core.ke import KeResult, KeServer, KeTerms, NtpEndpoint, NtpService
from nts_core.packet import ClockState, Field, FieldType, Header, Leap, Packet, encode_fields, protect
from nts_core.records import MessageReader, Record, RecordType
from nts_core.server import NtpServer, Reply
from nts_core.tls import TlsChannel

# What the true answer says, and what a sealed lie says, in nanoseconds ahead of this clock.
TRUTH = 3_000_000_000
LIE = 3_600_000_000_000
# systemd's mock server stalls for as long; every client of ours has gone by then.
STALL = 20.0
# The last record of a message.
END = Record(RecordType.END_OF_MESSAGE, critical=True)
_LIE_STEPS = (LIE // 1_000_000_000) << 32
_CLOCK = ClockState(Leap.NONE, 2, -20, 0, 0, b"TRUE", 0)
_READ = 16 * 1024
# An endless answer stops here if nobody stopped it; `outlasted` then says so.
_ENDLESS = 64 * 1024 * 1024
# Datagrams between two breaths: a receiver's buffer holds several times as many.
_PORTION = 32
_BREATH = 0.005


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


KePlay = Callable[[KeTalk], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class KeSabotage:
    """One way to spoil key establishment.

    `failure` is what a client reports, None when it has to take the answer nevertheless; `says` stands in its
    message. With `waits` only the client's own deadline ends it. `kept` is how many cookies it keeps at most, and
    `useful` whether they get it any time.
    """

    name: str
    sentence: str
    play: KePlay
    failure: Failure | None
    says: str
    waits: bool
    kept: int
    useful: bool = True


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


NtpPlay = Callable[[NtpTurn], Iterable[bytes]]


@dataclass(frozen=True, slots=True)
class NtpSabotage:
    """One way to spoil the answer to an NTP request; `endless` when its datagrams never stop."""

    name: str
    sentence: str
    play: NtpPlay
    fate: Fate
    source: Source
    kiss: str
    endless: bool


def title(play: Callable[..., object]) -> tuple[str, str]:
    """Name and sentence of a sabotage, as its function has them."""
    assert play.__doc__ is not None, "a sabotage says what it does"
    return play.__name__.replace("_", "-").strip("-"), " ".join(play.__doc__.split())


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

    `ke` and `ntp` are what is played to whoever comes next, `algorithm` what is preferred. With `truth_follows` the
    true answer is sent after an NTP sabotage, or in its midst when it never ends. One client at a time: its next
    NTP request ends what is still being sent for the one before.
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
        self._channels = channels(authority)
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
        return [*message, END]

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
