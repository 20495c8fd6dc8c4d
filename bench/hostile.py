"""Hostile clients of NTS-KE: many at a time, each of which takes a connection for as long as it is let.

They come from addresses of 127.1.0.0/16, one for each of them, so that it is not the limit of one address that is met.
"""

import asyncio
import secrets
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path

from cryptography import x509

from nts_core.acceptor import RESET
from nts_core.errors import TlsError
from nts_core.ke import KeClient
from nts_core.records import Record
from nts_core.shell import affordable_connections
from nts_core.tls import TlsChannel, Trust, client_channel

CLIENTS = 512
# Descriptors for everything else.
_RESERVED = 64
# The longest that one connection takes: more than any server lets it.
PATIENCE = 8.0
# More than a server waits for the close of a client that has its answer.
_DEAF = 3.0
# Between two connections of one client, so that a server that refuses them is not kept busy by that alone.
_PAUSE = 0.25
# Between two of the pieces that a slow client sends.
_DRIP = 0.05
_READ = 1 << 16
_NOISE = 4096
# A handshake record of nearly 16 KiB, all of it a ClientHello, of which the lengths are all that is true.
_ANNOUNCED = 0x3FF0
_HELLO = b"\x16\x03\x01" + _ANNOUNCED.to_bytes(2) + b"\x01" + (_ANNOUNCED - 4).to_bytes(3)
# Filled in more than five seconds, the longest that a server waits.
_PIECE = 128
# A record that nobody knows and everybody has to skip.
_UNKNOWN = Record(0x4000, secrets.token_bytes(252)).encode()


@dataclass(frozen=True, slots=True)
class _Connection:
    """One that stands, and the client's side of TLS for those that need it."""

    sock: socket.socket
    channel: TlsChannel

    async def say(self, octets: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, octets)

    async def hear(self) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self.sock, _READ)

    async def hear_out(self) -> None:
        """Listen until the server closes."""
        while await self.hear():
            pass

    def hello(self) -> bytes:
        self.channel.receive(b"")
        return self.channel.to_send()

    async def handshake(self) -> None:
        await self.say(self.hello())
        while not self.channel.established:
            octets = await self.hear()
            if not octets:
                raise ConnectionResetError
            self.channel.receive(octets)
        await self.say(self.channel.to_send())

    async def seal(self, plaintext: bytes) -> None:
        self.channel.send(plaintext)
        await self.say(self.channel.to_send())


async def _silent(connection: _Connection) -> None:
    await connection.hear_out()


async def _noise(connection: _Connection) -> None:
    await connection.say(secrets.token_bytes(_NOISE))
    await connection.hear_out()


async def _slow_hello(connection: _Connection) -> None:
    """One octet after the other."""
    for octet in connection.hello():
        await connection.say(bytes((octet,)))
        await asyncio.sleep(_DRIP)
    await connection.hear_out()


async def _long_record(connection: _Connection) -> None:
    """Its head announces 16 KiB, which come slowly."""
    await connection.say(_HELLO)
    for _ in range(0, _ANNOUNCED - 4 - _PIECE, _PIECE):
        await connection.say(bytes(_PIECE))
        await asyncio.sleep(_DRIP)
    await connection.hear_out()


async def _endless_request(connection: _Connection) -> None:
    await connection.handshake()
    while True:
        await connection.seal(_UNKNOWN)
        await asyncio.sleep(_DRIP)


async def _no_request(connection: _Connection) -> None:
    await connection.handshake()
    await connection.hear_out()


async def _deaf(connection: _Connection) -> None:
    """Establishes keys, and neither reads the answer nor closes while the server still waits for that."""
    await connection.handshake()
    await connection.seal(KeClient(connection.channel.export).request())
    await asyncio.sleep(_DEAF)


async def _reset(connection: _Connection) -> None:
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


_KINDS: dict[str, Callable[[_Connection], Awaitable[None]]] = {
    "silent": _silent,
    "noise": _noise,
    "slow hello": _slow_hello,
    "long record": _long_record,
    "endless request": _endless_request,
    "no request": _no_request,
    "deaf": _deaf,
    "reset": _reset,
}
KINDS = tuple(_KINDS)


async def _client(number: int, place: tuple[str, int], trust: Trust, begun: Counter[str]) -> None:
    """One connection after the other, of each kind in turn."""
    source = f"127.1.{number // 250}.{number % 250 + 1}"
    first = number % len(KINDS)
    for kind in cycle(KINDS[first:] + KINDS[:first]):
        with (
            suppress(OSError, TlsError),
            socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock,
        ):
            sock.bind((source, 0))
            async with asyncio.timeout(PATIENCE):
                await asyncio.get_running_loop().sock_connect(sock, place)
                begun[kind] += 1
                await _KINDS[kind](_Connection(sock, client_channel(place[0], trust)))
        await asyncio.sleep(_PAUSE)


async def crowd(place: tuple[str, int], trust: Trust, begun: Counter[str], clients: int = CLIENTS) -> None:
    """So many clients, until it is cancelled; counts the connections of each kind."""
    async with asyncio.TaskGroup() as group:
        for number in range(affordable_connections(clients, _RESERVED)):
            group.create_task(_client(number, place, trust, begun))


def attack(place: tuple[str, int], root: Path, seconds: float) -> dict[str, int]:
    """The same for so long, in a process of its own; how many connections of each kind there were."""
    roots = x509.load_pem_x509_certificates(root.read_bytes())
    begun: Counter[str] = Counter()

    async def bounded() -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await crowd(place, Trust.of(roots, datetime.now(UTC)), begun)

    asyncio.run(bounded())
    return dict(begun)
