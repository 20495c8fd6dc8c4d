"""A client that asks at a fixed rate, whether or not the answers keep up.

The time of an answer counts from the moment at which its request was due, so that a server that stalls pays for all
who come meanwhile.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Call:
    """One request, ready to be sent; `kind` is what its figures stand under."""

    kind: str
    octets: bytes

    @classmethod
    def of(cls, kind: str, method: str, path: str, token: str | None = None, body: bytes = b"") -> "Call":
        head = [f"{method} {path} HTTP/1.1", "Host: registry", "Content-Type: application/json"]
        head.append(f"Content-Length: {len(body)}")
        if token is not None:
            head.append(f"Authorization: Bearer {token}")
        return cls(kind, "\r\n".join([*head, "", ""]).encode() + body)


@dataclass(frozen=True, slots=True)
class Answer:
    kind: str
    status: int
    seconds: float


class Client:
    """Asks the processes behind some ports in turn, as a proxy before them would.

    Keeps as many connections to each as it needs, up to a bound, and uses each for one request at a time.
    """

    # The registry gives one address 64.
    def __init__(self, ports: Sequence[int], connections: int = 48) -> None:
        self._idle: dict[int, list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]] = {
            port: [] for port in ports
        }
        self._slots = {port: asyncio.Semaphore(connections) for port in ports}

    async def run(self, calls: Sequence[Call], rate: float) -> list[Answer]:
        """Send the calls at `rate` a second; raises OSError for a server that is gone."""
        began = time.monotonic()

        async def one(number: int, call: Call) -> Answer:
            due = began + number / rate
            await asyncio.sleep(due - time.monotonic())
            port = list(self._idle)[number % len(self._idle)]
            async with self._slots[port]:
                status = await self._ask(port, call.octets)
            return Answer(call.kind, status, time.monotonic() - due)

        try:
            return list(await asyncio.gather(*(one(number, call) for number, call in enumerate(calls))))
        finally:
            for connections in self._idle.values():
                for _, writer in connections:
                    writer.close()

    async def _ask(self, port: int, octets: bytes) -> int:
        reader, writer = await self._connection(port)
        writer.write(octets)
        head = await reader.readuntil(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
        await reader.readexactly(int(fields[b"content-length"]))
        if fields.get(b"connection") == b"close":
            writer.close()
        else:
            self._idle[port].append((reader, writer))
        return int(head[9:12])

    async def _connection(self, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """An idle connection that the server has not closed meanwhile, or a new one."""
        while self._idle[port]:
            reader, writer = self._idle[port].pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return await asyncio.open_connection("127.0.0.1", port)
