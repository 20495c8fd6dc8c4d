"""`poolsvc` that notes when it asked the CA and when the answer was there: a JSON line for each request.

python -m bench.timed_acme FILE acme serve --config poolsvc.toml
"""

import json
import sys
import time
from functools import wraps
from pathlib import Path
from typing import Any

from requests import PreparedRequest, Response
from requests.adapters import HTTPAdapter

from poolsvc import cli


def main() -> None:
    file, *arguments = sys.argv[1:]
    ask = HTTPAdapter.send

    @wraps(ask)
    def send(self: HTTPAdapter, request: PreparedRequest, *args: Any, **kwargs: Any) -> Response:
        began = time.time()
        answer = ask(self, request, *args, **kwargs)
        with Path(file).open("a") as notes:
            notes.write(json.dumps([began, time.time()]) + "\n")
        return answer

    HTTPAdapter.send = send  # type: ignore[method-assign]
    sys.argv[1:] = arguments
    cli.main()


if __name__ == "__main__":
    main()
