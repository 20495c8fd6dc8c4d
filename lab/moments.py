"""The moments of a program's work at one of which it ends by SIGKILL."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from typing import Any

Moment = Callable[[], AbstractContextManager[None]]


def moments(at: str, when: str) -> Moment:
    """Surrounds each moment; the process ends at the one of number `at`, just "before" it or just "after"."""
    numbers = count(1)

    @contextmanager
    def moment() -> Iterator[None]:
        is_last = next(numbers) == int(at)
        if is_last and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        yield
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)

    return moment


def mortal(moment: Moment, operation: Callable[..., Any]) -> Callable[..., Any]:
    """The operation, surrounded by moments; one that fails has a moment after it, too."""

    def operated(*args: Any, **options: Any) -> Any:
        fault: OSError | None = None
        with moment():
            try:
                return operation(*args, **options)
            except OSError as error:
                fault = error
        raise fault

    return operated
