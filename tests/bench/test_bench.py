"""The benches at a tiny size: their figures are complete, and what they check can fail. Nothing is timed."""

import json
import os
import secrets
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from bench import command, dns, flood, hostile, ke, ntp
from bench.contenders import CHRONYD, ECHO, PYTHON, TimeServer, is_native_here, possible
from bench.load import WINDOW, Load, LoadError
from bench.native import NativeLoad, has_cargo, program
from bench.ntp import Question, Questions
from bench.quality import CONDITIONS, Figure, Seen
from bench.report import Comparison, Goal, Turn
from bench.soak import Soak, overflowed
from lab.processes import LabError, wait_until
from nts_core.aead import AeadId, SessionKeys
from nts_core.cookies import Keyring
from nts_core.errors import NotAuthentic, WireError
from nts_core.packet import Leap
from nts_core.server import ClockState, NtpServer

RING = Keyring.new(0, secrets.token_bytes)
CLOCK = ClockState(Leap.NONE, 1, -20, 0, 0, b"TEST", 1)


needs_cargo = pytest.mark.skipif(not has_cargo(), reason="takes cargo")
needs_native = pytest.mark.skipif(not is_native_here(), reason="takes nts_engine")


@pytest.fixture(scope="module", autouse=True)
def built():
    """What is built once is not built within the time that a test has."""
    if has_cargo():
        program("load")


@pytest.fixture(params=["python", pytest.param("native", marks=needs_cargo)])
def load(request):
    """Either client, for a port of this host and some requests."""
    if request.param == "native":
        return lambda port, requests: NativeLoad("127.0.0.1", port, requests, ("127.0.0.1",))
    return lambda port, requests: Load("127.0.0.1", port, requests)


def run(module, *options):
    return subprocess.run(
        [sys.executable, "-m", module, *options], capture_output=True, text=True, timeout=120, check=False
    )


def answer(request):
    now = 1_700_000_000 * 10**9
    server = NtpServer(RING, secrets.token_bytes)
    return server.respond(request, received=now, transmit_time=lambda: now, clock=CLOCK).octets


def nts_question():
    keys = SessionKeys(AeadId.AES_SIV_CMAC_256, secrets.token_bytes(32), secrets.token_bytes(32))
    return Question.nts(keys, RING.seal(keys, secrets.token_bytes(16)))


@contextmanager
def udp_server(reply):
    """Answers each datagram with `reply(datagram)`, unless that is None; gives its port."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        stop = os.urandom(8)

        def serve():
            while True:
                datagram, peer = sock.recvfrom(2048)
                if datagram == stop:
                    return
                octets = reply(datagram)
                if octets is not None:
                    sock.sendto(octets, peer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield sock.getsockname()[1]
        finally:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as knock:
                knock.sendto(stop, sock.getsockname())
            thread.join(10)


@pytest.mark.parametrize(
    ("module", "servers", "kinds"),
    [
        ("bench.ntp", ntp.SERVERS, {"nts", "plain"}),
        ("bench.ke", ke.SERVERS, {"ke"}),
        ("bench.dns", ("embedded", "knot"), {"service", "addresses", "absences", "drawn"}),
    ],
)
def test_a_bench_gives_every_figure_of_all_servers(module, servers, kinds):
    done = run(module, "--seconds", "1", "--rounds", "2", "--json")

    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["bench"] == module.removeprefix("bench.")
    assert document["rounds"] == 2
    assert document["results"].keys() == kinds
    for result in document["results"].values():
        assert result["ratios"]
        for ratio in result["ratios"]:
            assert {ratio["ours"], ratio["theirs"]} <= result["servers"].keys()
            assert 0 < ratio["ratio"]["min"] <= ratio["ratio"]["median"] <= ratio["ratio"]["max"]
        assert result["servers"].keys() == set(possible(*servers))
        for figures in result["servers"].values():
            # A bench ends with an error at the first sampled answer that is not authentic.
            assert figures["answered"] >= figures["checked"] >= 2
            for figure in ("rate", "cpu_us", "busy"):
                spread = figures[figure]
                assert 0 < spread["min"] <= spread["median"] <= spread["max"]


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace of its own takes root")
def test_the_clients_bench_gives_every_figure():
    done = run("bench.client", "--rounds", "1", "--seconds", "4", "--json")

    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["starts"].keys() == {"pool-client sources", "PoolClient", "chronyd", "ntpd-rs"}
    assert all(start["agreed"] > 0 for starts in document["starts"].values() for start in starts)
    assert document["ratios"].keys() == {"chronyd", "ntpd-rs"}
    # An hour has 225 polls of four sources, and 60 looks at an answer with a TTL of a minute.
    assert 150 < document["watching"]["polls"] <= 240
    assert 0 < document["watching"]["looks"] <= 61
    assert document["watching"]["cpu"] > 0
    assert document["memory"] > 1e6


def test_a_bench_is_bounded():
    done = run("bench.ntp", "--seconds", "1000000")

    assert done.returncode == 2
    assert "at most 600 seconds" in done.stderr


def test_the_request_is_the_one_that_is_promised():
    """228 octets: header, identifier, one cookie of 100 octets, authenticator; no placeholder."""
    assert len(nts_question().datagram) == 48 + 36 + 104 + 40
    assert len(Question.plain().datagram) == 48


def test_an_authentic_answer_is_accepted():
    question = nts_question()
    question.check(answer(question.datagram))
    plain = Question.plain()
    plain.check(answer(plain.datagram))


def test_an_answer_with_any_octet_changed_is_refused():
    question = nts_question()
    right = answer(question.datagram)
    for position in range(48, len(right)):
        wrong = bytearray(right)
        wrong[position] ^= 1
        with pytest.raises((NotAuthentic, WireError)):
            question.check(bytes(wrong))


def test_a_negative_acknowledgement_is_refused():
    """A server that cannot open the cookie is not measured as one that answers."""
    stranger = Keyring.new(0, secrets.token_bytes)
    keys = SessionKeys(AeadId.AES_SIV_CMAC_256, secrets.token_bytes(32), secrets.token_bytes(32))
    question = Question.nts(keys, stranger.seal(keys, secrets.token_bytes(16)))
    with pytest.raises(NotAuthentic):
        question.check(answer(question.datagram))


def test_an_echo_is_accepted_as_it_was_sent_and_in_no_other_way():
    question = nts_question()
    question.check_echo(question.datagram)
    with pytest.raises(NotAuthentic):
        question.check_echo(answer(question.datagram))


def test_a_server_that_changes_its_answers_ends_the_bench():
    questions = [nts_question() for _ in range(WINDOW)]

    def change(request):
        right = answer(request)
        return right[:-1] + bytes((right[-1] ^ 1,))

    with udp_server(change) as port:
        asked = Questions(TimeServer("liar", os.getpid(), 0, port), questions)
        with pytest.raises(LoadError, match="a wrong answer of liar"):
            asked.turn(0.1)


def test_answers_and_losses_are_counted(load):
    """A server that leaves out every fourth request: all that were sent are accounted for."""
    requests = [bytes((number,)) * 48 for number in range(128)]
    with udp_server(lambda request: request if request[0] % 4 else None) as port:
        burst = load(port, requests).run(0.1, samples=8)

    assert burst.answered >= burst.lost * 2
    assert burst.lost > 0
    assert burst.cpu_ns > 0
    assert 0 < len(burst.sample) <= 8
    assert set(burst.sample) <= set(requests)


def test_a_silent_server_ends_the_bench(load):
    with (
        udp_server(lambda _request: None) as port,
        pytest.raises(LoadError, match="no answer"),
    ):
        load(port, [bytes(48)] * WINDOW).run(0.1, samples=1)


def test_a_closed_port_ends_the_bench(load):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with pytest.raises(LoadError, match="the server is gone"):
        load(port, [bytes(48)] * WINDOW).run(1, samples=1)


@needs_cargo
def test_a_rate_is_kept_whatever_comes_back():
    """From each of two addresses a half; a server that answers one in ten of them."""
    requests = [bytes((number,)) * 48 for number in range(100)]
    with udp_server(lambda request: request if request[0] % 10 == 0 else None) as port:
        load = NativeLoad("127.0.0.1", port, requests, ("127.0.0.1", "127.0.0.2"))
        burst = load.run(0.5, samples=1, rate=2000)

    assert 900 <= burst.answered + burst.lost <= 1000
    assert 80 <= burst.answered <= 120


def test_what_overflows_a_socket_is_counted():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as full:
        full.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        full.bind(("127.0.0.1", 0))
        assert overflowed(full.getsockname()[1]) == 0
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for _ in range(100):
                sender.sendto(bytes(228), full.getsockname())
        assert 0 < overflowed(full.getsockname()[1]) < 100


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({}, None),
        ({"lost": 5, "overflowed": 5}, None),
        ({"lost": 6, "overflowed": 5}, "6 requests were lost"),
        ({"outcomes": {"nts-time": 99, "ntsn": 1}}, "not all requests"),
        ({"late": 33.0}, "memory grew"),
    ],
)
def test_a_soak_finds_what_must_not_be(changed, fault):
    good = {"answered": 100, "lost": 0, "overflowed": 0, "checked": 9, "established": 9}
    good |= {"outcomes": {"nts-time": 100}, "early": 30.0, "late": 31.0}
    faults = Soak(**{**good, **changed}).faults()
    assert len(faults) == (fault is not None)
    assert fault is None or faults[0].startswith(fault)


@pytest.mark.long
@needs_cargo
@needs_native
def test_a_short_soak_has_no_fault():
    done = run("bench.soak", "--seconds", "6", "--rotation", "1", "--json")

    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout)
    assert document["answered"] > document["checked"] > 0
    assert document["established"] > 0


@pytest.mark.long
@needs_cargo
def test_the_bench_of_quality_gives_every_figure():
    done = run("bench.quality", "--seconds", "6", "--rounds", "1", "--json")

    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document.keys() == set(CONDITIONS)
    for figures in document["idle"].values():
        assert figures["answers"] > 10
        assert figures["lost"] < 0.1
        for figure in ("offset", "response", "delay"):
            assert 0 <= figures[figure]["median"] <= figures[figure]["p99"]


@pytest.mark.long
@needs_cargo
def test_the_bench_of_floods_gives_every_figure():
    done = run("bench.flood", "--seconds", "1", "--json")

    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document.keys() == {"ntp", "ke"}
    for floods in document.values():
        assert floods.keys() == set(possible(*flood.SERVERS))
        for found in floods.values():
            assert 1 < found["memory"]["late"] < 2 * found["memory"]["early"]
    for found in document["ntp"].values():
        assert found["answered"] > 0
    for name, found in document["ke"].items():
        assert found["connections"].keys() == set(hostile.KINDS)
        assert found["calm"]["established"] > found["calm"]["failed"] == 0
        if name != CHRONYD:  # which has fewer connections than there are hostile clients
            assert found["beset"]["established"] > found["beset"]["failed"] == 0


def test_of_few_answers_nothing_is_said():
    assert Figure.of([1e-6] * 9) is None
    assert Figure.of([1e-6] * 90 + [5e-6] * 10) == Figure(pytest.approx(1), pytest.approx(5))
    assert Seen(sent=10, valid=4).lost == pytest.approx(0.6)


def test_the_processor_time_of_child_processes_counts():
    """As chronyd's helpers are children: the shell itself does nothing but wait."""
    spin = f"{sys.executable} -c 'while True: pass' & wait"
    with subprocess.Popen(["/bin/sh", "-c", spin], start_new_session=True) as shell:
        try:
            contender = TimeServer("shell", shell.pid, 0, 0)
            wait_until(lambda: contender.cpu_ns() > 200_000_000, "processor time of the child")
        finally:
            os.killpg(shell.pid, 9)


def test_ratios_are_formed_round_by_round_and_held_against_what_is_asked_for():
    turns = {
        PYTHON: tuple(Turn(100, 0, 1, 1.0, cpu) for cpu in (1000, 2000, 4000)),
        CHRONYD: tuple(Turn(200, 0, 1, 1.0, cpu) for cpu in (1000, 1000, 1000)),
    }
    goal = Goal(PYTHON, CHRONYD, 0.25)
    comparison = Comparison(turns, (goal,))
    ratio = comparison.ratio(goal)

    assert (ratio.median, ratio.min, ratio.max) == (0.25, 0.125, 0.5)
    assert comparison.rate_ratio(goal).median == 0.5
    assert goal.verdict(0.25).endswith("met")
    assert goal.verdict(0.24).endswith("MISSED")
    assert Goal(PYTHON, CHRONYD).verdict(0.1) == ""


def test_goals_of_servers_that_are_missing_are_left_out():
    here, elsewhere = Goal(PYTHON, CHRONYD), Goal(PYTHON, ECHO)
    servers = [TimeServer(name, 1, 0, 0) for name in (PYTHON, CHRONYD)]
    comparison = Comparison.run(servers, 1, lambda _: Turn(1, 0, 1, 1.0, 1), (here, elsewhere))
    assert comparison.goals == (here,)


def test_a_server_that_answers_nothing_ends_the_bench():
    with pytest.raises(LoadError, match="python answered nothing"):
        Comparison.run([TimeServer(PYTHON, 1, 0, 0)], 1, lambda _: Turn(0, 9, 0, 2.0, 1), ())


@pytest.mark.parametrize("error", [LabError("no room"), LoadError("no room")])
def test_what_cannot_be_measured_is_told_in_a_line(capsys, error):
    with pytest.raises(SystemExit) as ended, command.failing(LoadError):
        raise error
    assert (ended.value.code, capsys.readouterr().err) == (1, "bench failed: no room\n")


def test_an_error_of_ours_is_not_taken_for_one_of_the_machine():
    with pytest.raises(LoadError), command.failing(OSError):
        raise LoadError("no room")


def test_a_name_server_that_is_silent_ends_the_bench(monkeypatch):
    monkeypatch.setattr(dns, "ANSWERED_WITHIN", 0.1)
    with (
        udp_server(lambda _: None) as port,
        pytest.raises(LoadError, match=r"no answer to pool.example. IN DNSKEY within 0.1 s"),
    ):
        dns.DnsServer.of("silent", SimpleNamespace(pid=1, address="127.0.0.1", port=port))
