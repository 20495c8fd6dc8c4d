"""`poolsvc` that ends by SIGKILL at one chosen request to the CA: just before it is sent, or once it was answered.

    python -m lab.mortal_ca 7 after acme serve --config poolsvc.toml

Signed requests count: those for a nonce or the directory change nothing.
"""

import os
import signal
import sys
from functools import wraps
from itertools import count
from typing import Any

from requests import PreparedRequest, Response
from requests.adapters import HTTPAdapter

from poolsvc import cli


def main() -> None:
    at, when, *arguments = sys.argv[1:]
    numbers, ask = count(1), HTTPAdapter.send

    @wraps(ask)
    def send(self: HTTPAdapter, request: PreparedRequest, *args: Any, **kwargs: Any) -> Response:
        is_last = request.method == "POST" and next(numbers) == int(at)
        if is_last and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        answer = ask(self, request, *args, **kwargs)
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    HTTPAdapter.send = send  # type: ignore[method-assign]
    sys.argv[1:] = arguments
    cli.main()


if __name__ == "__main__":
    main()
