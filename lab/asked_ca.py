"""`poolsvc` with something around each of its requests to a CA."""

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any
from unittest.mock import patch

from requests import PreparedRequest, Response
from requests.adapters import HTTPAdapter

from poolsvc import cli

Ask = Callable[[], Response]


def run(arguments: Sequence[str], around: Callable[[PreparedRequest, Ask], Response]) -> None:
    """`poolsvc ARGUMENTS`; `around` is given each request and what sends it, and returns the answer."""
    ask = HTTPAdapter.send

    @wraps(ask)
    def send(self: HTTPAdapter, request: PreparedRequest, *args: Any, **options: Any) -> Response:
        return around(request, lambda: ask(self, request, *args, **options))

    sys.argv[1:] = arguments
    with patch.object(HTTPAdapter, "send", send):
        cli.main()
