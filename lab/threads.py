"""What serves in a thread of its own, with an event loop of its own, while a test does something else."""

import asyncio
import threading
from abc import ABC, abstractmethod
from contextlib import AbstractAsyncContextManager
from typing import Self

from lab.processes import LabError

_DEADLINE = 10.0


class InThread(ABC):
    """A context manager that serves while it lasts. A `failure` that is noted meanwhile is raised at its end."""

    def __init__(self, name: str) -> None:
        self.failure: BaseException | None = None
        self._name = name
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    @abstractmethod
    def serving(self) -> AbstractAsyncContextManager[object]:
        """In the thread's loop: serves from when it is entered until it is left. OSError: it cannot."""

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(_DEADLINE) or self.failure is not None:
            raise LabError(f"{self._name} did not come up: {self.failure}")
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(_DEADLINE)
        if self.failure is not None:
            raise LabError(f"{self._name} itself failed") from self.failure

    def _work(self) -> None:
        try:
            asyncio.run(self._run())
        except OSError as error:
            self.failure = error
            self._ready.set()

    async def _run(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        async with self.serving():
            self._ready.set()
            await self._end.wait()
