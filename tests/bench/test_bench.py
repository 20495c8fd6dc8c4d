"""The benches at a tiny size: their figures are complete, and what they check can fail. Nothing is timed."""

import json
import os
import secrets
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from bench.contenders import OURS, THEIRS, TimeServer
from bench.load import WINDOW, Load, LoadError
from bench.ntp import Question, Questions
from bench.report import Comparison, Turn
from lab.processes import wait_until
from nts_core.aead import AeadId, SessionKeys
from nts_core.cookies import Keyring
from nts_core.errors import NotAuthentic, WireError
from nts_core.packet import Leap
from nts_core.server import ClockState, NtpServer

RING = Keyring.new(0, secrets.token_bytes)
CLOCK = ClockState(Leap.NONE, 1, -20, 0, 0, b"TEST", 1)


def run(module, *options):
    return subprocess.run(
        [sys.executable, "-m", module, *options], capture_output=True, text=True, timeout=90, check=False
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
        ("bench.ntp", {OURS, THEIRS}, {"nts", "plain"}),
        ("bench.ke", {OURS, THEIRS}, {"ke"}),
        ("bench.dns", {"embedded", "knot"}, {"service", "addresses", "absences", "drawn"}),
    ],
)
def test_a_bench_gives_every_figure_of_both_servers(module, servers, kinds):
    done = run(module, "--seconds", "1", "--rounds", "2", "--json")

    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["bench"] == module.removeprefix("bench.")
    assert document["rounds"] == 2
    assert document["results"].keys() == kinds
    for result in document["results"].values():
        assert 0 < result["ratio"]["min"] <= result["ratio"]["median"] <= result["ratio"]["max"]
        assert result["servers"].keys() == servers
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


def test_a_server_that_changes_its_answers_ends_the_bench():
    questions = [nts_question() for _ in range(WINDOW)]

    def change(request):
        right = answer(request)
        return right[:-1] + bytes((right[-1] ^ 1,))

    with udp_server(change) as port:
        asked = Questions(TimeServer("liar", os.getpid(), 0, port), questions)
        with pytest.raises(LoadError, match="a wrong answer of liar"):
            asked.turn(0.1)


def test_answers_and_losses_are_counted():
    """A server that leaves out every fourth request: all that were sent are accounted for."""
    requests = [bytes((number,)) * 48 for number in range(128)]
    with udp_server(lambda request: request if request[0] % 4 else None) as port:
        burst = Load("127.0.0.1", port, requests).run(0.1, samples=8)

    assert burst.answered >= burst.lost * 2
    assert burst.lost > 0
    assert 0 < len(burst.sample) <= 8
    assert set(burst.sample) <= set(requests)


def test_a_silent_server_ends_the_bench():
    with (
        udp_server(lambda _request: None) as port,
        pytest.raises(LoadError, match="no answer"),
    ):
        Load("127.0.0.1", port, [bytes(48)] * WINDOW).run(0.1, samples=1)


def test_a_closed_port_ends_the_bench():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with pytest.raises(LoadError, match="the server is gone"):
        Load("127.0.0.1", port, [bytes(48)] * WINDOW).run(1, samples=1)


def test_the_processor_time_of_child_processes_counts():
    """As chronyd's helpers are children: the shell itself does nothing but wait."""
    spin = f"{sys.executable} -c 'while True: pass' & wait"
    with subprocess.Popen(["/bin/sh", "-c", spin], start_new_session=True) as shell:
        try:
            contender = TimeServer("shell", shell.pid, 0, 0)
            wait_until(lambda: contender.cpu_ns() > 200_000_000, "processor time of the child")
        finally:
            os.killpg(shell.pid, 9)


def test_the_ratio_is_ours_over_theirs_round_by_round():
    turns = {
        OURS: tuple(Turn(100, 0, 1, 1.0, cpu) for cpu in (1000, 2000, 4000)),
        THEIRS: tuple(Turn(200, 0, 1, 1.0, cpu) for cpu in (1000, 1000, 1000)),
    }
    ratio = Comparison(turns).ratio

    assert (ratio.median, ratio.min, ratio.max) == (0.25, 0.125, 0.5)
