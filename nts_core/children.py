"""Processes of our own that run as long as we do (I/O)."""

import asyncio
import os
import time
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NoReturn

# Before a child that ended is started again, longer each time; one that lived for a minute begins anew.
_RESTARTS = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)
_STEADY = 60.0
_STOPPING = 5.0


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
