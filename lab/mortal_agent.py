"""`pool-agent` that ends by SIGKILL at one chosen moment of its work: just before it, or just after.

    python -m lab.mortal_agent 3 after run --state DIR

Moments are whatever it does to names on the disk, and what it says to the registry for the first time: a signing
request, a challenge that it serves, a certificate. Reports without news come with the clock and do not count.
"""

import json
import os
import sys
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from lab.moments import moments, mortal
from member_agent import cli, running
from nts_core import https

_NEWS = ("csr", "serving", "address", "installed")
_OPERATIONS = ("mkdir", "rename", "replace", "symlink", "unlink", "rmdir")


def _go_on(words: list[str]) -> None:
    """As the program that `run` becomes, in this one."""
    sys.argv[1:] = words[words.index(running.WORD) :]
    running.main()


def main() -> None:
    at, when, *arguments = sys.argv[1:]
    moment = moments(at, when)
    send, said = https.Client.request, set[str]()

    async def sent(self: https.Client, method: str, path: str, **options: Any) -> https.Answer:
        document = json.loads(options["body"] or b"{}")
        news = json.dumps([path, *(document.get(name) for name in _NEWS)])
        if news in said:
            return await send(self, method, path, **options)
        said.add(news)
        with moment():
            return await send(self, method, path, **options)

    sys.argv[1:] = arguments
    with ExitStack() as patched:
        for name in _OPERATIONS:
            patched.enter_context(patch.object(os, name, mortal(moment, getattr(os, name))))
        patched.enter_context(patch.object(https.Client, "request", sent))
        # The program that `run` becomes would have moments of its own.
        patched.enter_context(patch.object(os, "execv", lambda _, words: _go_on(words)))
        cli.main()


if __name__ == "__main__":
    main()
