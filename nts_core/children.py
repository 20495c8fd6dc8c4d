"""Processes that we start (I/O): our own, which run as long as we do, and programs that come to an end."""

import asyncio
import os
import re
import signal
import tempfile
import time
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import NoReturn

# Before a child that ended is started again, longer each time; one that lived for a minute begins anew.
_RESTARTS = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)
_STEADY = 60.0
_STOPPING = 5.0
# What is kept of what a program prints, and what is quoted of that.
_PRINTED = 64 * 1024
QUOTED_LINES, _QUOTED_LIMIT = 20, 2000
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


async def keep_running(once: Callable[[], Awaitable[int]], ended: Callable[[int, float], None]) -> NoReturn:
    """Start a child again whenever it ends, until cancelled.

    `once` runs it to its end and returns its status; `ended` is told that, and the seconds until the next start.
    """
    failures = 0
    while True:
        await asyncio.sleep(_pause(failures))
        began = time.monotonic()
        status = await once()
        failures = 1 if time.monotonic() - began > _STEADY else failures + 1
        ended(status, _pause(failures))


def _pause(failures: int) -> float:
    return _RESTARTS[min(failures, len(_RESTARTS) - 1)]


async def wait_or_kill(child: Process) -> int:
    """The status of a child that knows that it has to end; it is killed when that takes too long."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_STOPPING):
            await child.wait()
    if child.returncode is None:
        with suppress(ProcessLookupError):
            child.kill()
    return await child.wait()


def environment_without(*prefixes: str) -> dict[str, str]:
    """For a child that gets its charge from us: without settings of ours, which may hold secrets."""
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}


def quoted(octets: bytes, label: str = "") -> str:
    """The last lines of what a program printed, bounded and made safe for a message."""
    text = _ESCAPES.sub("", octets.decode("utf-8", "replace"))
    lines = [re.sub(r"[^\x20-\x7e]", "?", line).strip() for line in text.splitlines()]
    told = "\n".join(line for line in lines[-QUOTED_LINES:] if line)[-_QUOTED_LIMIT:]
    return f"; {label}{told}" if told else ""


async def run(command: Sequence[str], deadline: float, *, path: str) -> tuple[int | None, bytes]:
    """A program's exit status, None when it had to be killed, and the end of what it printed.

    It is found on `path`, and has nothing else of our environment. It prints to a file: a daemon that it starts may keep
    a pipe open for ever.
    """
    with tempfile.TemporaryFile() as printed:
        try:
            child = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                env={"PATH": path, "LC_ALL": "C.UTF-8"},
                start_new_session=True,
            )
        except OSError as error:
            return 127, str(error.strerror).encode()
        status: int | None = None
        try:
            async with asyncio.timeout(deadline):
                status = await child.wait()
        except TimeoutError:
            pass
        finally:
            if child.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                await child.wait()
        size = printed.seek(0, os.SEEK_END)
        printed.seek(max(0, size - _PRINTED))
        return status, printed.read(_PRINTED)
