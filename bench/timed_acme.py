"""`poolsvc` that notes when it asked the CA and when the answer was there: a JSON line for each request.

python -m bench.timed_acme FILE acme serve --config poolsvc.toml
"""

import json
import sys
import time
from pathlib import Path

from requests import PreparedRequest, Response

from lab import asked_ca


def main() -> None:
    file, *arguments = sys.argv[1:]

    def around(_request: PreparedRequest, ask: asked_ca.Ask) -> Response:
        began = time.time()
        answer = ask()
        with Path(file).open("a") as notes:
            notes.write(json.dumps([began, time.time()]) + "\n")
        return answer

    asked_ca.run(arguments, around)


if __name__ == "__main__":
    main()
