"""`pool-agent` that ends by SIGKILL at one chosen moment of its work: just before it, or just after.

    python -m lab.mortal_agent 3 after run --state DIR

Moments are what it puts in its place on the disk, and what it says to the registry for the first time: a signing
request, a challenge that it serves. Reports without news come with the clock and do not count.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any
from unittest.mock import patch

import httpx

from member_agent import cli

_NEWS = ("csr", "serving", "address")


def main() -> None:
    at, when, *arguments = sys.argv[1:]
    numbers = count(1)

    @contextmanager
    def moment() -> Iterator[None]:
        is_last = next(numbers) == int(at)
        if is_last and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        yield
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)

    def placing(place: Callable[..., None]) -> Callable[..., None]:
        def placed(*args: Any, **options: Any) -> None:
            with moment():
                place(*args, **options)

        return placed

    send, said = httpx.AsyncHTTPTransport.handle_async_request, set[str]()

    async def sent(self: httpx.AsyncHTTPTransport, request: httpx.Request) -> httpx.Response:
        document = json.loads(request.content)
        news = json.dumps([request.url.path, *(document.get(name) for name in _NEWS)])
        if news in said:
            return await send(self, request)
        said.add(news)
        with moment():
            return await send(self, request)

    sys.argv[1:] = arguments
    with (
        patch.object(os, "rename", placing(os.rename)),
        patch.object(os, "replace", placing(os.replace)),
        patch.object(httpx.AsyncHTTPTransport, "handle_async_request", sent),
    ):
        cli.main()


if __name__ == "__main__":
    main()
