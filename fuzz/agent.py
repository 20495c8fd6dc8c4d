"""Target of the agent's responder on port 80: one connection with any octets (RFC 9112, RFC 8555 section 8.3).

First octet of an input: in pieces of how many octets the rest is sent (0: all at once).
"""

import asyncio
import socket
import struct

from fuzz.target import OracleError, Plan, Target, hold, pieces
from member_agent.challenges import Outcome, Responder
from nts_core.control import ACME_PATH, PROOF_PATH

_HOST = "alice.servers.pool.example"
_TOKEN = "A" * 43
_AUTHORIZATION = f"{_TOKEN}.{'B' * 43}".encode()
_ENTRIES = {ACME_PATH + _TOKEN: _AUTHORIZATION, PROOF_PATH + "nonce": b"signature"}
# Long, as a busy machine is no finding; the engine gives up on an input much sooner.
_DEADLINE = 60.0
# What a client that closes sends instead of waiting: a reset, so that no port stays taken.
_RESET = struct.pack("ii", 1, 0)
# Not of a request that anybody could have sent whole.
_NO_ANSWER = frozenset({Outcome.CLOSED})
_UNREACHED = frozenset({Outcome.TIMEOUT, Outcome.EVICTED, Outcome.ACCEPT_FAILED})


def _http(data: bytes) -> str:
    return asyncio.run(_connection(data))


async def _connection(data: bytes) -> str:
    plan = Plan(data)
    length = plan.octet()
    async with Responder([_HOST], deadline=_DEADLINE) as responder:
        responder.replace(_HOST, _ENTRIES)
        await responder.listen(("127.0.0.1", 0))
        answer = await _ask(responder.endpoints[0], plan.rest(), length)
        # The peer sees the end of the answer before the responder has left the connection.
        hold(responder.counters.total() == 1, "a connection is counted once")
        (outcome,) = map(Outcome, responder.counters)
    hold(outcome not in _UNREACHED, "the answer does not wait for the deadline")
    if outcome in _NO_ANSWER:
        hold(not answer, "who says nothing whole hears nothing")
        return outcome
    head, separator, body = answer.partition(b"\r\n\r\n")
    hold(separator and head.startswith(b"HTTP/1.1 "), "an answer is an HTTP response")
    hold(f"Content-Length: {len(body)}\r\n".encode() in head or not body, "the length is true")
    hold((outcome is Outcome.SERVED) == head.startswith(b"HTTP/1.1 200 "), "200 is for what is published")
    hold(body in {b"", *_ENTRIES.values()}, "nothing is said but what was published")
    return outcome


async def _ask(endpoint: tuple[str, int], octets: bytes, length: int) -> bytes:
    loop = asyncio.get_running_loop()
    answer = bytearray()
    with socket.socket() as sock:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await loop.sock_connect(sock, endpoint)
        for piece in pieces(octets, length):
            await loop.sock_sendall(sock, piece)
        sock.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(2 * _DEADLINE):
            while received := await loop.sock_recv(sock, 65536):
                answer += received
    if len(answer) > 4096:
        raise OracleError("an answer is short")
    return bytes(answer)


TARGETS = (
    Target(
        "http",
        "No exception; one outcome a connection and no wait; nothing is said but what was published.",
        _http,
        frozenset(Outcome) - _UNREACHED,
        longest=9000,
        tokens=(
            b"GET ",
            b"HEAD ",
            b" HTTP/1.1\r\n",
            b"\r\n\r\n",
            f"Host: {_HOST}\r\n".encode(),
            b"Content-Length: 1\r\n",
            b"Transfer-Encoding: chunked\r\n",
            next(iter(_ENTRIES)).encode(),
            f"http://{_HOST}/".encode(),
        ),
    ),
)
