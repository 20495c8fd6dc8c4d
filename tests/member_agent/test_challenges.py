"""The agent's HTTP responder: every outcome, and that nobody can hold it up."""

import asyncio
import contextlib
import os
import resource
import socket
import time
from pathlib import Path

import pytest

from lab.processes import free_port
from member_agent.challenges import (
    BODY_LIMIT,
    ENTRY_LIMIT,
    HEADER_LIMIT,
    ChallengeError,
    Outcome,
    Responder,
    validate_challenge,
)
from member_agent.errors import AgentError
from nts_core.control import ACME_PATH, PROOF_PATH, HttpChallenge

NAME = "alice.servers.pool.example"
TOKEN = "a" * 43
AUTHORIZATION = f"{TOKEN}.{'b' * 43}"
PATH = ACME_PATH + TOKEN
PROOF = PROOF_PATH + "nonce-1"


@pytest.fixture
async def responder():
    async with Responder([NAME], deadline=30) as responder:
        await responder.listen(("127.0.0.1", 0))
        responder.publish(NAME, PATH, AUTHORIZATION.encode())
        responder.publish(NAME, PROOF, b"\x00signature")
        yield responder


async def exchange(responder, octets: bytes, *, eof=False) -> bytes:
    """Everything that one connection answers to `octets`."""
    reader, writer = await asyncio.open_connection(*responder.endpoints[0])
    try:
        writer.write(octets)
        if eof:
            writer.write_eof()
        async with asyncio.timeout(10):
            return await reader.read()
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def request(path=PATH, *, method="GET", host=f"Host: {NAME}\r\n", version="1.1", more="", body="") -> bytes:
    return f"{method} {path} HTTP/{version}\r\n{host}{more}\r\n{body}".encode("latin-1")


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


async def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        await asyncio.sleep(0.01)


async def test_a_published_key_authorization_is_served_exactly(responder):
    answer = await exchange(responder, request())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert status(answer) == 200
    assert body == AUTHORIZATION.encode()
    lower = head.lower()
    assert b"content-type: application/octet-stream" in lower
    assert b"connection: close" in lower
    assert f"content-length: {len(AUTHORIZATION)}".encode() in lower
    assert b"set-cookie" not in lower
    assert b"location" not in lower
    assert responder.counters == {Outcome.SERVED: 1}


async def test_an_address_proof_is_served_as_octets(responder):
    assert (await exchange(responder, request(PROOF))).endswith(b"\r\n\r\n\x00signature")


async def test_head_has_the_length_and_no_body(responder):
    answer = await exchange(responder, request(method="HEAD"))
    assert status(answer) == 200
    assert answer.endswith(b"\r\n\r\n")
    assert f"Content-Length: {len(AUTHORIZATION)}".encode() in answer


@pytest.mark.parametrize(
    "host", [NAME, NAME.upper(), NAME + ".", NAME + ":80", NAME.title() + ".:8080"], ids=str
)
async def test_our_name_in_each_spelling_is_ours(responder, host):
    assert status(await exchange(responder, request(host=f"Host: {host}\r\n"))) == 200


@pytest.mark.parametrize(
    "host",
    [
        "bob.servers.pool.example",
        "127.0.0.1",
        "[::1]:80",
        "",
        NAME + ":",
        NAME + ":port",
        NAME + "..",
        "u@" + NAME,
        NAME + ".evil.example",
    ],
)
async def test_a_foreign_or_odd_host_is_misdirected(responder, host):
    answer = await exchange(responder, request(host=f"Host: {host}\r\n"))
    assert status(answer) == 421
    assert AUTHORIZATION.encode() not in answer
    assert responder.counters == {Outcome.MISDIRECTED: 1}


async def test_http_1_0_needs_our_host_too(responder):
    assert status(await exchange(responder, request(version="1.0"))) == 200
    assert status(await exchange(responder, request(version="1.0", host=""))) == 421


@pytest.mark.parametrize("host", ["", f"Host: {NAME}\r\nHost: {NAME}\r\n"], ids=["none", "two"])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_no_host_or_two_are_refused(responder, host, version):
    """RFC 9112 section 3.2 asks for 400; HTTP/1.0 without one is for a name that we do not know."""
    answer = await exchange(responder, request(host=host, version=version))
    assert status(answer) == (421 if version == "1.0" and not host else 400)
    assert AUTHORIZATION.encode() not in answer


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        (f"http://{NAME}{PATH}", 200),
        (f"HTTP://{NAME}:80{PATH}", 200),
        (f"http://bob.servers.pool.example{PATH}", 421),
        (f"http://{PATH}", 421),
        (f"https://{NAME}{PATH}", 404),
        (f"{PATH}?x=1", 404),
        (f"/x/..{PATH}", 404),
        (PATH[:-1], 404),
        (PATH + "/", 404),
        (ACME_PATH, 404),
        ("/", 404),
        ("*", 404),
    ],
)
async def test_targets(responder, target, wanted):
    assert status(await exchange(responder, request(target))) == wanted


@pytest.mark.parametrize("method", ["POST", "PUT", "OPTIONS", "DELETE", "get", "CONNECT"])
async def test_other_methods_are_405(responder, method):
    answer = await exchange(responder, request(method=method))
    assert status(answer) == 405
    assert b"Allow: GET, HEAD\r\n" in answer


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ("Content-Length: 5\r\n", 413),
        ("Transfer-Encoding: chunked\r\n", 413),
        ("Content-Length: 0\r\n", 200),
        ("Content-Length: -1\r\n", 400),
        ("Content-Length: 1\r\nContent-Length: 2\r\n", 400),
    ],
)
async def test_bodies_are_not_taken(responder, more, wanted):
    assert status(await exchange(responder, request(more=more, body="hello"))) == wanted


async def test_a_body_that_is_still_coming_does_not_reset_the_connection(responder):
    loop = asyncio.get_running_loop()
    with socket.create_connection(responder.endpoints[0]) as sock:
        sock.setblocking(False)
        await loop.sock_sendall(
            sock, request(method="POST", more="Content-Length: 60000\r\n", body="x" * 20_000)
        )
        answer = b""
        async with asyncio.timeout(5):
            while data := await loop.sock_recv(sock, 4096):
                answer += data
        assert status(answer) == 405
        for _ in range(5):
            await loop.sock_sendall(sock, b"x" * 1000)  # a reset would break the second of these
            await exchange(responder, request())


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"GET\r\n\r\n",
        b"\x00" * 50 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: \x00\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
async def test_garbage_is_400(responder, garbage):
    assert status(await exchange(responder, garbage, eof=True)) == 400
    assert responder.counters == {Outcome.MALFORMED: 1}


async def test_a_peer_that_says_nothing_and_leaves_is_counted(responder):
    assert await exchange(responder, b"", eof=True) == b""
    await until(lambda: responder.counters == {Outcome.CLOSED: 1})


async def test_the_header_limit_is_exact(responder):
    plain = len(request(more="X: \r\n"))
    fits = request(more=f"X: {'x' * (HEADER_LIMIT - plain)}\r\n")
    assert len(fits) == HEADER_LIMIT
    assert status(await exchange(responder, fits)) == 200
    over = request(more=f"X: {'x' * (HEADER_LIMIT - plain + 1)}\r\n")
    assert status(await exchange(responder, over)) == 431
    assert status(await exchange(responder, b"GET /" + b"a" * 60_000)) == 431
    assert responder.counters == {Outcome.SERVED: 1, Outcome.TOO_LARGE: 2}


async def test_only_the_first_request_of_a_connection_is_answered(responder):
    answer = await exchange(responder, request() + request())
    assert answer.count(b"HTTP/1.1 200") == 1


async def test_replace_and_forget(responder):
    other = "c" * 22
    responder.replace(NAME.upper() + ".", {ACME_PATH + other: f"{other}.{'d' * 43}".encode()})
    assert status(await exchange(responder, request())) == 404
    assert status(await exchange(responder, request(PROOF))) == 404
    assert status(await exchange(responder, request(ACME_PATH + other))) == 200
    with pytest.raises(ChallengeError):
        responder.replace(NAME, {"/index.html": b"x"})
    assert status(await exchange(responder, request(ACME_PATH + other))) == 200
    responder.forget(NAME)
    assert status(await exchange(responder, request(ACME_PATH + other))) == 421


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/index.html", b"x"),
        (PROOF_PATH, b"x"),
        (PROOF_PATH + "a/b", b"x"),
        (PROOF, b"x" * (BODY_LIMIT + 1)),
        (PATH, b"something else"),
        (PATH, AUTHORIZATION.encode() + b"\n"),
    ],
)
def test_what_has_not_our_form_cannot_be_published(path, body):
    with pytest.raises(ChallengeError):
        Responder([NAME]).publish(NAME, path, body)


def test_the_table_is_bounded():
    responder = Responder([NAME])
    for number in range(ENTRY_LIMIT):
        responder.publish(NAME, f"{PROOF_PATH}{number}", b"x")
    responder.publish(NAME, f"{PROOF_PATH}0", b"again")
    with pytest.raises(ChallengeError):
        responder.publish(NAME, f"{PROOF_PATH}one-more", b"x")
    with pytest.raises(ChallengeError):
        responder.replace(NAME, {f"{PROOF_PATH}{number}": b"x" for number in range(ENTRY_LIMIT + 1)})


def test_a_challenge_of_the_rfcs_form_is_accepted():
    for length in (22, 128):
        token = "A-_9" * 32
        validate_challenge(HttpChallenge(token[:length], f"{token[:length]}.{'Z' * 43}"))


@pytest.mark.parametrize(
    ("token", "authorization", "fault"),
    [
        ("a" * 21, f"{'a' * 21}.{'b' * 43}", "token is not"),
        ("a" * 129, f"{'a' * 129}.{'b' * 43}", "token is not"),
        ("a" * 42 + "/", f"{'a' * 42}/.{'b' * 43}", "token is not"),
        ("a" * 43 + "\n", f"{'a' * 43}\n.{'b' * 43}", "token is not"),
        (TOKEN, f"{'x' * 43}.{'b' * 43}", "does not begin"),
        (TOKEN, TOKEN, "does not begin"),
        (TOKEN, f"{TOKEN}.{'b' * 42}", "thumbprint"),
        (TOKEN, f"{TOKEN}.{'b' * 43}=", "thumbprint"),
        (TOKEN, f"{TOKEN}.{'b' * 42}<", "thumbprint"),
    ],
)
def test_other_challenges_are_refused_by_the_part_that_is_wrong(token, authorization, fault):
    with pytest.raises(ChallengeError, match=fault):
        validate_challenge(HttpChallenge(token, authorization))


async def test_several_addresses_are_served_and_a_taken_port_is_an_error(responder):
    await responder.listen(("127.0.0.1", 0), ("127.0.0.2", 0), ("::1", 0))
    assert len(responder.endpoints) == 3
    for endpoint in responder.endpoints:
        reader, writer = await asyncio.open_connection(*endpoint)
        writer.write(request())
        assert status(await reader.read()) == 200
        writer.close()
        await writer.wait_closed()
    first, second, third = responder.endpoints
    with pytest.raises(AgentError, match="in use"):
        await responder.listen(("127.0.0.1", 0), ("127.0.0.2", 0), ("::1", 0), ("127.0.0.3", 0), first)
    assert responder.endpoints == (first, second, third)


async def test_what_is_not_wanted_any_more_is_left_and_the_rest_goes_on(responder):
    # Below the ports of outgoing connections, one of which could be in the way of all addresses at once.
    port = free_port("127.0.0.1", "127.0.0.2", "0.0.0.0")
    await responder.listen(("127.0.0.1", port), ("127.0.0.2", port))
    stays, goes = responder.endpoints
    await responder.listen(("127.0.0.1", port))
    assert responder.endpoints == (stays,)
    assert status(await exchange(responder, request())) == 200
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*goes)
    # One address of a family makes room for all of it.
    await responder.listen(("0.0.0.0", stays.port))
    assert status(await exchange(responder, request())) == 200


async def test_a_slow_client_is_ended_by_the_deadline():
    async with Responder([NAME], deadline=0.5) as responder:
        await responder.listen(("127.0.0.1", 0))
        reader, writer = await asyncio.open_connection(*responder.endpoints[0])
        begun = time.monotonic()
        for octet in request():
            writer.write(bytes([octet]))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    assert await reader.read(1) == b""
                    break
        else:
            pytest.fail("every octet was awaited")
        assert 0.4 < time.monotonic() - begun < 3
        assert responder.counters == {Outcome.TIMEOUT: 1}
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_a_client_that_stays_after_its_answer_is_counted_once_and_ended():
    async with Responder([NAME], deadline=0.3) as responder:
        await responder.listen(("127.0.0.1", 0))
        reader, writer = await asyncio.open_connection(*responder.endpoints[0])
        writer.write(request())
        assert status(await reader.read()) == 404
        await until(lambda: not responder._connections)
        assert responder.counters == {Outcome.NOT_FOUND: 1}
        writer.close()
        await writer.wait_closed()


def _room_for_descriptors(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))


async def test_a_request_that_waits_in_the_backlog_is_answered_before_what_came_after_it():
    async with Responder([NAME], limit=5, deadline=60) as responder:
        await responder.listen(("127.0.0.1", 0))
        with contextlib.ExitStack() as stack:
            socks = []
            for _ in range(5 + 20):  # all connect before the responder runs again; the first has asked
                socks.append(stack.enter_context(socket.create_connection(responder.endpoints[0], timeout=5)))
                if len(socks) == 1:
                    socks[0].sendall(request())
            await until(lambda: responder.counters[Outcome.EVICTED] >= 20 - 1)
            assert responder.counters[Outcome.NOT_FOUND] == 1
            assert status(socks[0].recv(4096)) == 404


async def test_1100_idle_connections_do_not_delay_a_validation():
    """The oldest idle ones make room; the deadline is too long to be the reason."""
    _room_for_descriptors(4096)
    async with Responder([NAME], deadline=60) as responder:
        await responder.listen(("127.0.0.1", 0))
        responder.publish(NAME, PATH, AUTHORIZATION.encode())
        with contextlib.ExitStack() as stack:
            idle = []
            for _ in range(1100):
                sock = stack.enter_context(socket.socket())
                sock.setblocking(False)
                async with asyncio.timeout(5):
                    await asyncio.get_running_loop().sock_connect(sock, responder.endpoints[0])
                idle.append(sock)
            begun = time.monotonic()
            assert status(await exchange(responder, request())) == 200
            assert time.monotonic() - begun < 2
            await until(lambda: responder.counters[Outcome.EVICTED] >= 1101 - 1024)
            assert responder.counters[Outcome.EVICTED] == 1101 - 1024
            assert idle[0].recv(1) == b"", "the oldest was closed"
            with pytest.raises(BlockingIOError):
                idle[-1].recv(1)
    assert not responder._connections


def _highest_descriptor() -> int:
    return max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())


async def test_accept_survives_running_out_of_descriptors():
    """An idle connection is given up for the next one, and accept goes on."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    fillers: list[int] = []
    async with Responder([NAME], deadline=60) as responder:
        await responder.listen(("127.0.0.1", 0))
        responder.publish(NAME, PATH, AUTHORIZATION.encode())
        with socket.socket() as idle, socket.socket() as asker:
            idle.connect(responder.endpoints[0])
            await until(lambda: len(responder._connections) == 1)
            try:
                highest = _highest_descriptor()
                while not fillers or fillers[-1] <= highest:
                    fillers.append(os.dup(asker.fileno()))
                resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[-1] + 1, before[1]))
                asker.connect(responder.endpoints[0])
                await until(lambda: responder.counters[Outcome.ACCEPT_FAILED])
                asker.sendall(request())
                asker.setblocking(False)
                async with asyncio.timeout(5):
                    answer = await asyncio.get_running_loop().sock_recv(asker, 4096)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, before)
                for descriptor in fillers:
                    os.close(descriptor)
            assert status(answer) == 200
            assert responder.counters[Outcome.EVICTED] == 1
        assert status(await exchange(responder, request())) == 200
