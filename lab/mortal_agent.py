"""`pool-agent` that ends by SIGKILL at one chosen moment of its work: just before it, or just after.

    python -m lab.mortal_agent 3 after run --state DIR

Moments are what it puts in its place on the disk, and what it says to the registry for the first time: a signing
request, a challenge that it serves. Reports without news come with the clock and do not count.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from itertools import count
from typing import Any

import httpx

from member_agent import cli

_NEWS = ("csr", "serving", "address")


def main() -> None:
    at, when, *arguments = sys.argv[1:]
    numbers = count(1)

    def is_last() -> bool:
        return next(numbers) == int(at)

    def placing(place: Callable[..., Any]) -> Callable[..., Any]:
        def placed(*args: Any, **kwargs: Any) -> Any:
            ends = is_last()
            if ends and when == "before":
                _end()
            result = place(*args, **kwargs)
            if ends:
                _end()
            return result

        return placed

    os.rename, os.replace = placing(os.rename), placing(os.replace)
    send, said = httpx.AsyncHTTPTransport.handle_async_request, set[str]()

    async def sent(transport: httpx.AsyncHTTPTransport, request: httpx.Request) -> httpx.Response:
        document = json.loads(request.content)
        news = json.dumps([request.url.path, *(document.get(name) for name in _NEWS)])
        ends = news not in said and is_last()
        said.add(news)
        if ends and when == "before":
            _end()
        response = await send(transport, request)
        if ends:
            _end()
        return response

    httpx.AsyncHTTPTransport.handle_async_request = sent  # type: ignore[method-assign, assignment]
    sys.argv[1:] = arguments
    cli.main()


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
