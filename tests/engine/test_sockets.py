"""The engine's threads on real sockets: what is answered, counted, swapped while they run, and given back."""

import os
import socket
import threading
import time
from contextlib import ExitStack, closing, contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from fuzz.native import NOT_BUILT, limits_with
from lab.processes import wait_until
from member_agent.config import MAX_WORKERS
from member_agent.ntp_server import prepare
from member_agent.sockets import Endpoint, bind_shared
from nts_core import ntptime
from nts_core.aead import Aead, AeadId, SessionKeys
from nts_core.cookies import CookieKey, Keyring, Schedule
from nts_core.kernel import SO_TIMESTAMPNS, receive_time
from nts_core.packet import Field, FieldType, Header, Leap, Packet, encode_fields, protect

nts_engine = pytest.importorskip("nts_engine", reason=NOT_BUILT)

SECOND = 1_000_000_000
DEADLINE = 5
CLOCK = {
    "leap": 0,
    "stratum": 1,
    "precision": -20,
    "root_delay": 10,
    "root_dispersion": 20,
    "reference_id": b"TEST",
    "reference": 0,
}
KEYS = SessionKeys(AeadId.AES_SIV_CMAC_256, bytes(range(32)), bytes(range(32, 64)))
RINGS = [
    Keyring(tuple(CookieKey(number, 0, bytes([number]) * 32) for number in numbers), Schedule())
    for numbers in ((8, 7), (9, 8, 7))
]
PLAIN = Header(poll=6, transmit=0x0123_4567_89AB_CDEF).encode()
NO_SERVICE = 0xFFFF


def native(ring):
    return nts_engine.Keyring([(key.id, key.secret) for key in ring.keys])


def new_engine(threads=1, **changes):
    return nts_engine.Engine(
        threads, limits_with(**changes), [15], native(RINGS[0]), nts_engine.Clock(**CLOCK)
    )


@pytest.fixture
def engine():
    with closing(new_engine()) as found:
        yield found


def bound(engine, host="127.0.0.1", port=0):
    """A socket for each thread that is not heard yet, and their place."""
    sockets = bind_shared(Endpoint(host, port), socket.SOCK_DGRAM, engine.threads)
    for sock in sockets:
        prepare(sock)
    return sockets, sockets[0].getsockname()[:2]


def hear(engine, sockets):
    """The number to leave by."""
    return engine.listen_ntp([sock.detach() for sock in sockets])


def listen(engine, host="127.0.0.1", port=0):
    """The number to leave by, and where the engine answers now."""
    sockets, place = bound(engine, host, port)
    return hear(engine, sockets), place


def client(place, source=None):
    """A socket that takes nothing but what comes from the place that it asks."""
    sock = socket.socket(socket.AF_INET6 if ":" in place[0] else socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(DEADLINE)
    if source is not None:
        sock.bind((source, 0))
    sock.connect(place)
    return sock


def ask(place, datagram=PLAIN, source=None):
    with client(place, source) as sock:
        sock.send(datagram)
        return sock.recv(4096)


def nts_request(ring, identifier):
    clear = PLAIN + encode_fields(
        [
            Field(FieldType.UNIQUE_IDENTIFIER, identifier),
            Field(FieldType.COOKIE, ring.seal(KEYS, identifier[:16])),
        ]
    )
    return protect(clear, b"", Aead(15, KEYS.c2s), identifier[:16])


def counted(engine, **expected):
    """Wait until exactly this was counted: the threads count before they send, and drop without a word."""
    labels = {name.replace("_", "-"): count for name, count in expected.items()}
    wait_until(lambda: engine.counts.ntp == labels, f"counts of {labels}", DEADLINE)


def names_of_threads():
    found = []
    for task in Path("/proc/self/task").iterdir():
        try:
            found.append((task / "comm").read_text().strip())
        except FileNotFoundError:
            continue
    return [name for name in found if name.startswith("ntp-")]


def descriptors():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


# Answers


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_time_of_this_host_in_both_families(engine, host):
    _, place = listen(engine, host)
    before = ntptime.timestamp(time.time_ns())
    answer = Header.decode(ask(place))
    after = ntptime.timestamp(time.time_ns())
    assert before <= answer.receive <= answer.transmit <= after
    assert (answer.leap, answer.stratum, answer.reference_id) == (0, 1, b"TEST")
    assert answer.origin == 0x0123_4567_89AB_CDEF
    counted(engine, time=1)


@pytest.mark.parametrize(
    ("wildcard", "asked"), [("0.0.0.0", "127.0.0.1"), ("0.0.0.0", "127.0.0.2"), ("::", "::1")]
)
def test_the_answer_of_a_wildcard_leaves_from_the_address_that_was_asked(engine, wildcard, asked):
    _, (_, port) = listen(engine, wildcard)
    assert len(ask((asked, port))) == 48


def test_an_offset_moves_both_times(engine):
    _, place = listen(engine)
    engine.use_clock(nts_engine.Clock(**CLOCK, offset_ns=-3600 * SECOND), 60 * SECOND)
    answer = Header.decode(ask(place))
    now = time.time_ns()
    for stamp in (answer.receive, answer.transmit):
        assert -3601 * SECOND < ntptime.unix_ns(stamp, now) - now <= -3600 * SECOND


def test_what_is_dropped_is_counted_by_its_reason(engine):
    _, place = listen(engine)
    dropped = {
        "malformed": [b"", PLAIN[:47], PLAIN + bytes(2001), bytes([0x23]) * 65_507],
        "mode": [Header(mode=4).encode()],
        "version": [Header(version=2).encode()],
        "legacy_mac": [PLAIN + bytes(20)],
        "incomplete_nts": [PLAIN + Field(FieldType.COOKIE, bytes(100)).encode()],
    }
    with client(place) as sock:
        for datagrams in dropped.values():
            for datagram in datagrams:
                sock.send(datagram)
        counted(engine, **{name: len(datagrams) for name, datagrams in dropped.items()})
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(1)


def test_the_longest_datagram_that_is_looked_at_is_answered(engine):
    _, place = listen(engine)
    datagram = PLAIN + Field(FieldType.UNIQUE_IDENTIFIER, bytes(2048 - 52)).encode()
    assert ask(place, datagram)[48:] == datagram[48:]


# Clock and keys


def test_a_clock_that_is_not_said_again_is_served_as_not_synchronised(engine):
    _, place = listen(engine)
    engine.use_clock(nts_engine.Clock(**CLOCK), 60 * SECOND)
    assert Header.decode(ask(place)).stratum == 1
    engine.use_clock(nts_engine.Clock(**CLOCK), 1)
    wait_until(lambda: Header.decode(ask(place)).stratum == 16, "stratum 16", DEADLINE)
    assert Header.decode(ask(place)).leap == Leap.UNSYNCHRONISED
    engine.use_clock(nts_engine.Clock(**{**CLOCK, "leap": 1}), 60 * SECOND)
    assert Header.decode(ask(place)).leap == Leap.INSERT


def test_no_request_is_lost_while_keys_and_clock_are_swapped(engine):
    _, place = listen(engine)
    requests, failed = 1500, []

    def poll(salt):
        with client(place) as sock:
            for number in range(requests):
                identifier = bytes([salt]) * 28 + number.to_bytes(4)
                sock.send(nts_request(RINGS[0], identifier))
                answer = sock.recv(4096)
                (cookie,) = Packet.decode(answer).decrypt(answer, Aead(15, KEYS.s2c))
                if RINGS[1].open(cookie.value) != KEYS:
                    failed.append(identifier)

    clients = [threading.Thread(target=poll, args=(salt,)) for salt in (1, 2)]
    for each in clients:
        each.start()
    swaps = 0
    rings = [native(ring) for ring in RINGS]
    while any(each.is_alive() for each in clients):
        engine.use_keyring(rings[swaps % 2])
        engine.use_clock(nts_engine.Clock(**CLOCK), SECOND)
        swaps += 1
        time.sleep(0.0005)
    assert not failed
    counted(engine, nts_time=2 * requests)
    counts = engine.counts
    assert counts.opened.keys() <= {"sealing", "retired"}
    assert (sum(counts.opened.values()), counts.sealed) == (2 * requests, 2 * requests)
    assert swaps > 10


def test_a_cookie_of_the_key_made_ahead_and_of_an_unknown_one(engine):
    _, place = listen(engine)
    ahead = Keyring((RINGS[1].keys[0], RINGS[0].keys[0]), Schedule())
    assert Packet.decode(ask(place, nts_request(ahead, bytes(32)))).authenticator is not None
    unknown = Keyring((RINGS[0].keys[0], RINGS[1].keys[0]), Schedule())
    assert Header.decode(ask(place, nts_request(unknown, bytes(32)))).reference_id == b"NTSN"
    counted(engine, nts_time=1, ntsn=1)
    assert engine.counts.opened == {"next": 1}


# What leaves when, and to whom


@contextmanager
def waiting(engine, datagrams):
    """A client whose requests were all there before the engine looks: they come in batches of 64."""
    sockets, place = bound(engine)
    with client(place) as asking:
        asking.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        for datagram in datagrams:
            asking.send(datagram)
        time.sleep(0.05)  # the engine's thread is asleep by then
        hear(engine, sockets)
        yield asking


def told(asking):
    """When the next answer says that it left, and when it came."""
    answer, ancillary, _, _ = asking.recvmsg(4096, 256)
    return Header.decode(answer).transmit, ntptime.timestamp(receive_time(ancillary))


def many(count):
    return [nts_request(RINGS[0], number.to_bytes(32)) for number in range(count)]


def test_all_that_was_there_before_is_answered(engine):
    with waiting(engine, [PLAIN] * 150) as asking:
        for _ in range(150):
            asking.recv(4096)
    counted(engine, time=150)


def test_answers_leave_one_by_one_until_the_engine_is_behind(engine):
    """A group of a kind and size that was not seen before is told one time: nothing is known of its turns yet."""
    with waiting(engine, many(128)) as asking:
        times = [told(asking)[0] for _ in range(128)]
    assert len(set(times[:64])) == 64
    assert len(set(times[64:72])) == 1


def test_who_leaves_alone_is_told_a_time_after_the_one_before_has_come_and_before_it_comes(engine):
    with waiting(engine, many(64)) as asking:
        times = [told(asking) for _ in range(64)]
    assert all(ntptime.difference(left, came) >= 0 for (_, came), (left, _) in pairwise(times))
    assert sum(ntptime.difference(left, came) > 0 for left, came in times) <= 2


def test_each_gets_its_own_answer(engine):
    identifiers = [number.to_bytes(32) for number in range(8)]
    datagrams = [nts_request(RINGS[0], each) for each in identifiers]
    forged = [*datagrams[0]]
    forged[48 + 36 + 60] ^= 1
    datagrams[0] = bytes(forged)
    sockets, place = bound(engine)
    with ExitStack() as stack:
        clients = [stack.enter_context(client(place)) for _ in identifiers]
        for number, (asking, datagram) in enumerate(zip(clients, datagrams, strict=True)):
            clients[number - 1].send(b"garbage")
            asking.send(datagram)
        hear(engine, sockets)
        for asking, identifier in zip(clients, identifiers, strict=True):
            assert asking.recv(4096)[52:84] == identifier
    counted(engine, ntsn=1, nts_time=7, malformed=8)


def test_who_has_an_answer_is_counted(engine):
    _, place = listen(engine)
    with client(place) as asking:
        for number in range(1, 501):
            asking.send(PLAIN)
            asking.recv(4096)
            assert engine.counts.ntp == {"time": number}


def test_an_idle_engine_sleeps():
    with closing(new_engine(threads=2)) as engine:
        listen(engine)
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.25, (
            "a thread that looks again and again takes all of half a second"
        )


# Several threads


@pytest.mark.parametrize("threads", [0, MAX_WORKERS + 1, 1 << 40])
def test_no_engine_has_no_threads_or_more_than_an_agent_may_have(threads):
    with pytest.raises(ValueError, match=f"1 to {MAX_WORKERS} threads"):
        new_engine(threads)


def test_two_threads_share_a_place_and_count_all_that_was_sent():
    with closing(new_engine(threads=2)) as engine:
        _, place = listen(engine)
        assert engine.threads == 2
        sources, each = [f"127.0.0.{number}" for number in range(1, 41)], 25
        for source in sources:
            with client(place, source) as sock:
                for _ in range(each):
                    sock.send(PLAIN)
                answers = [sock.recv(4096) for _ in range(each)]
                assert {len(answer) for answer in answers} == {48}
        counted(engine, time=each * len(sources))


def test_limits_are_kept_also_where_two_threads_share():
    """What one address sends comes to one thread (`kernel.deal_by_source`), so that it has one account."""
    given = {"ntp_interval_ns": 3600 * SECOND, "ntp_burst": 3, "ntp_leak": 1 << 31}
    with closing(new_engine(threads=2, **given)) as engine:
        _, place = listen(engine)
        for source in ("127.0.0.1", "127.0.0.7", "127.0.0.8", "127.0.0.9"):
            with client(place, source) as sock:
                for _ in range(10):
                    sock.send(PLAIN)
        counted(engine, time=12, rate_limited=28)
        assert engine.counts.forgotten == 0


def test_who_is_denied_is_told_so_or_not():
    for kiss_denied in (False, True):
        with closing(new_engine(deny=["127.0.0.2/32"], kiss_denied=kiss_denied)) as engine:
            _, place = listen(engine)
            with client(place, "127.0.0.2") as sock:
                sock.send(PLAIN)
                sock.send(PLAIN)
                if kiss_denied:
                    assert Header.decode(sock.recv(4096)).reference_id == b"DENY"
                    counted(engine, kiss_deny=1, denied=1)
                else:
                    counted(engine, denied=2)
            assert Header.decode(ask(place)).stratum == 1


def test_above_the_cap_an_address_is_told_once():
    with closing(new_engine(ntp_pps=0.001, kiss_above=True)) as engine:
        _, place = listen(engine)
        with client(place) as sock:
            for _ in range(4):
                sock.send(PLAIN)
            assert Header.decode(sock.recv(4096)).stratum == 1
            assert Header.decode(sock.recv(4096)).reference_id == b"RATE"
        counted(engine, time=1, kiss_rate=1, over_cap=2)


# Beginning and end


def test_to_leave_frees_the_place_and_keeps_the_others(engine):
    numbers, places = zip(*[listen(engine) for _ in range(3)], strict=True)
    assert len(set(numbers)) == 3
    engine.leave(numbers[1])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(places[1])
    for place in (places[0], places[2]):
        assert len(ask(place)) == 48
    # The same place once more.
    listen(engine, *places[1])
    assert len(ask(places[1])) == 48
    engine.leave(NO_SERVICE)
    assert len(ask(places[0])) == 48


def test_to_close_frees_the_places_and_ends_the_threads():
    engine = new_engine(threads=2)
    _, place = listen(engine)
    assert len(ask(place)) == 48
    assert sorted(names_of_threads()) == ["ntp-0", "ntp-1"]
    engine.close()
    assert names_of_threads() == []
    assert engine.threads == 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(place)
    assert engine.counts.ntp == {"time": 1}
    engine.close()


def test_what_comes_after_the_end_says_so():
    engine = new_engine()
    number, _ = listen(engine)
    engine.close()
    late = datagram_socket()
    with pytest.raises(OSError, match="has ended"):
        engine.listen_ntp([late])
    assert open_descriptors(late) == []
    with pytest.raises(OSError, match="has ended"):
        engine.leave(number)
    # What is only taken note of harms nobody.
    engine.use_keyring(native(RINGS[1]))
    engine.use_clock(nts_engine.Clock(**CLOCK), SECOND)


def test_an_engine_that_is_forgotten_closes_itself():
    engine = new_engine()
    _, place = listen(engine)
    del engine
    assert names_of_threads() == []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(place)


def test_nothing_is_left_open_after_many_places_and_engines(engine):
    for _ in range(3):
        engine.leave(listen(engine)[0])
    before = descriptors()
    for _ in range(200):
        number, place = listen(engine)
        assert len(ask(place)) == 48
        engine.leave(number)
    assert descriptors() == before
    for _ in range(20):
        with closing(new_engine(threads=2)) as other:
            listen(other)
    del other
    assert descriptors() == before


# What cannot be used


def open_descriptors(*numbers):
    found = []
    for number in numbers:
        try:
            os.fstat(number)
        except OSError:
            continue
        found.append(number)
    return found


def datagram_socket():
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    return sock.detach()


def test_sockets_that_are_not_as_many_as_threads_are_closed(engine):
    numbers = [datagram_socket() for _ in range(2)]
    with pytest.raises(ValueError, match="2 sockets for 1 threads"):
        engine.listen_ntp(numbers)
    assert open_descriptors(*numbers) == []
    with pytest.raises(ValueError, match="0 sockets for 1 threads"):
        engine.listen_ntp([])


def test_a_number_that_is_no_descriptor():
    with closing(new_engine(threads=2)) as engine:
        for wrong in (-1, 1 << 20):
            number = datagram_socket()
            with pytest.raises(OSError, match="Bad file descriptor"):
                engine.listen_ntp([number, wrong])
            assert open_descriptors(number) == []


def test_a_socket_that_is_given_twice():
    with closing(new_engine(threads=2)) as engine:
        number = datagram_socket()
        with pytest.raises(ValueError, match="1 sockets for 2 threads"):
            engine.listen_ntp([number, number])
        assert open_descriptors(number) == []


@pytest.mark.parametrize("kind", ["stream", "pipe", "file"])
def test_what_is_no_datagram_socket(engine, kind, tmp_path):
    match kind:
        case "stream":
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            sock.bind(("127.0.0.1", 0))
            sock.listen()
            number = sock.detach()
        case "pipe":
            number, other = os.pipe()
            os.close(other)
        case _:
            number = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    with pytest.raises(OSError, match="socket"):
        engine.listen_ntp([number])
    assert open_descriptors(number) == []
    _, place = listen(engine)
    assert len(ask(place)) == 48
    assert engine.counts.ntp == {"time": 1}
