"""A socket in the state directory by which `pool-agent`'s commands reach the agent that runs there.

Who may enter the directory may ask. One line comes, one JSON object goes; nothing can be changed this way but the times
of the next report and of the next renewal by an account of this host's own.
"""

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import structlog

_NAME = "agent.sock"
_DEADLINE = 5.0
_MAX_QUESTION, _MAX_ANSWER = 64, 1 << 20
_MAX_OPEN = 16
_log = structlog.get_logger()

# What is answered, by question.
Answers = Mapping[str, Callable[[], dict[str, Any]]]


@contextlib.contextmanager
def _short(directory: Path) -> Iterator[str]:
    """A path to the socket that fits a socket's address (108 octets), however deep the directory is."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{_NAME}"
    finally:
        os.close(descriptor)


@contextlib.asynccontextmanager
async def answering(directory: Path, answers: Answers) -> AsyncIterator[None]:
    """Answer for as long as the context is open. The directory's lock must be held.

    Where no socket can be made, as on a full disk, everything but this goes on.
    """
    open_now: dict[asyncio.StreamWriter, None] = {}

    async def attend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while len(open_now) >= _MAX_OPEN:
            # Who asks does so at once; the oldest has had its time.
            oldest = next(iter(open_now))
            del open_now[oldest]
            oldest.transport.abort()
        open_now[writer] = None
        try:
            async with asyncio.timeout(_DEADLINE):
                question = (await reader.readuntil(b"\n")).strip().decode("ascii", "replace")
                if question in answers:
                    writer.write(json.dumps(answers[question]()).encode() + b"\n")
                    await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            open_now.pop(writer, None)
            writer.close()

    try:
        server = await _listen(directory, attend)
    except OSError as error:
        _log.error("commands_not_answered", directory=str(directory), detail=str(error))
        yield
        return
    try:
        yield
    finally:
        server.close()
        with contextlib.suppress(OSError):
            (directory / _NAME).unlink(missing_ok=True)


async def _listen(
    directory: Path, attend: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
) -> asyncio.Server:
    with _short(directory) as path:
        # What a killed agent has left.
        (directory / _NAME).unlink(missing_ok=True)
        old = os.umask(0o177)
        try:
            return await asyncio.start_unix_server(attend, path, limit=_MAX_QUESTION)
        finally:
            os.umask(old)


def ask(directory: Path, question: str) -> dict[str, Any] | None:
    """What the agent that runs there answers; None when none does, or none that understands."""
    answer = bytearray()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock, contextlib.suppress(OSError):
        sock.settimeout(_DEADLINE)
        with _short(directory) as path:
            sock.connect(path)
        sock.sendall(question.encode("ascii") + b"\n")
        while len(answer) < _MAX_ANSWER and (octets := sock.recv(65_536)):
            answer += octets
    try:
        document: dict[str, Any] = json.loads(answer)
    except ValueError:
        return None
    return document
