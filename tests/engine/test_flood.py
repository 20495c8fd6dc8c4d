"""The times that an honest client is told while others keep the engine busy."""

import secrets
import socket
import threading
from contextlib import closing, contextmanager

import pytest

from bench.load import WINDOW, Load
from bench.ntp import Question
from fuzz.native import NOT_BUILT, limits_with
from member_agent.ntp_server import prepare
from member_agent.sockets import Endpoint, bind_shared
from nts_core import ntptime
from nts_core.aead import AeadId, SessionKeys
from nts_core.cookies import NONCE_LENGTH, Keyring
from nts_core.kernel import SO_TIMESTAMPNS, receive_time
from nts_core.packet import Field, FieldType, Header

nts_engine = pytest.importorskip("nts_engine", reason=NOT_BUILT)

HOST = "127.0.0.1"
DEADLINE = 5
RING = Keyring.new(0, secrets.token_bytes)
KEYS = SessionKeys(AeadId.AES_SIV_CMAC_256, secrets.token_bytes(32), secrets.token_bytes(32))
CLOCK = {"leap": 0, "stratum": 1, "precision": -20, "root_delay": 0, "root_dispersion": 0}
ANSWERS = 500
# By how much the time of an answer may be later than its arrival, in nanoseconds; and of how many in a hundred by more.
AHEAD, EXCEPT = 30_000, 2
# The last octets of a request's cookie.
COOKIE_TAIL = slice(48 + 36 + 4 + 84, 48 + 36 + 4 + 100)


@pytest.fixture
def port():
    """Of an engine with one thread."""
    clock = nts_engine.Clock(**CLOCK, reference_id=b"TEST", reference=0)
    ring = nts_engine.Keyring([(key.id, key.secret) for key in RING.keys])
    with closing(nts_engine.Engine(1, limits_with(), [15], ring, clock)) as engine:
        (sock,) = bind_shared(Endpoint(HOST, 0), socket.SOCK_DGRAM, 1)
        prepare(sock)
        port = sock.getsockname()[1]
        engine.listen_ntp([sock.detach()])
        yield port
        counted = engine.counts.ntp
        assert counted.keys() == {"time", "nts-time", "ntsn"}
        assert min(counted.values()) > WINDOW, "it was flooded with all kinds"


def question():
    return Question.nts(KEYS, RING.seal(KEYS, secrets.token_bytes(NONCE_LENGTH)))


def garbage():
    """With a cookie that names a key of the engine's and was not sealed by it: refused as late as can be, by NTSN."""
    forged = bytearray(question().datagram)
    forged[COOKIE_TAIL] = secrets.token_bytes(16)
    return bytes(forged)


def plain(length):
    """A request without NTS, as long as the others."""
    padding = Field(FieldType.UNIQUE_IDENTIFIER, bytes(length - 52))
    return Header(transmit=secrets.randbits(64)).encode() + padding.encode()


@contextmanager
def flooded(port, datagrams):
    """A window of them on their way all the time, for which the engine's socket has room beside an honest client's."""
    load, over = Load(HOST, port, datagrams), threading.Event()

    def keep_busy():
        while not over.is_set():
            load.run(0.5, samples=0)

    thread = threading.Thread(target=keep_busy)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(DEADLINE)


def test_hardly_an_answer_is_told_a_time_in_the_future_whatever_else_the_engine_answers(port):
    """The time in an answer is sealed before it leaves, so it is reckoned. What others take is no measure for that."""
    asked = question()
    others = [garbage, lambda: plain(len(asked.datagram)), lambda: question().datagram]
    ahead = []
    with (
        flooded(port, [kind() for _ in range(WINDOW) for kind in others]),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
    ):
        sock.settimeout(DEADLINE)
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        sock.connect((HOST, port))
        while len(ahead) < ANSWERS:
            asked = question()
            sock.send(asked.datagram)
            reply, ancillary, _, _ = sock.recvmsg(2048, 256)
            came = receive_time(ancillary)
            asked.check(reply)
            answer = Header.decode(reply)
            assert answer.origin == asked.transmit
            assert ntptime.difference(answer.transmit, answer.receive) >= 0
            ahead.append(ntptime.difference(answer.transmit, ntptime.timestamp(came)))
    assert sum(each > AHEAD for each in ahead) <= len(ahead) * EXCEPT / 100, max(ahead)
