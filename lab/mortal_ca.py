"""`poolsvc` that ends by SIGKILL at one chosen request to the CA: just before it is sent, or once it was answered.

    python -m lab.mortal_ca 7 after acme serve --config poolsvc.toml

Signed requests count: those for a nonce or the directory change nothing.
"""

import os
import signal
import sys
from itertools import count

from requests import PreparedRequest, Response

from lab import asked_ca


def main() -> None:
    at, when, *arguments = sys.argv[1:]
    numbers = count(1)

    def around(request: PreparedRequest, ask: asked_ca.Ask) -> Response:
        is_last = request.method == "POST" and next(numbers) == int(at)
        if is_last and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        answer = ask()
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    asked_ca.run(arguments, around)


if __name__ == "__main__":
    main()
