"""An external engine that ends by SIGKILL at one chosen moment of its work: just before it, or just after.

    python -m lab.mortal_engine STATE

Each line of standard input is a JSON list: the moment, "before" or "after", the engine's settings, and a service (`null`
to take it away). What another engine was told in STATE goes first, as in an agent. A fork does that work, and a line of
standard output says how it ended: the number of the signal, negative, or its status.
Moments are whatever it does to names on the disk, to their rights, and to what has to reach the disk, and the programs
that it starts.
"""

import asyncio
import json
import os
import sys
from collections.abc import Coroutine, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lab.moments import moments, mortal
from member_agent.config import EngineSettings
from member_agent.engines import EngineError, Service
from member_agent.engines.external import ExternalEngine
from member_agent.engines.layout import Kind
from member_agent.engines.succession import Succession
from member_agent.install import load_pair
from member_agent.sockets import parse_endpoint

_OPERATIONS = ("mkdir", "rename", "replace", "link", "unlink", "rmdir", "fchown", "fsync")


def document_of(service: Service) -> dict[str, Any]:
    """A service as this program takes it."""
    return {
        "pairs": {name: [str(pair.chain_path), str(pair.key_path)] for name, pair in service.pairs.items()},
        "ke": list(map(str, service.ke)),
        "ntp": list(map(str, service.ntp)),
    }


def _service(document: Mapping[str, Any]) -> Service:
    return Service(
        {name: load_pair(Path(chain), Path(key)) for name, (chain, key) in document["pairs"].items()},
        tuple(parse_endpoint(text, "ke") for text in document["ke"]),
        tuple(parse_endpoint(text, "ntp") for text in document["ntp"]),
    )


async def _serve(state: Path, settings: EngineSettings, document: Mapping[str, Any] | None) -> None:
    engine = ExternalEngine(Kind(settings.kind), settings, state)
    succession = Succession(state, settings, engine.name)
    if document is None:
        await engine.remove()
        await succession.end()
    else:
        await succession.begin()
        await engine.apply(_service(document))


def _work(work: Coroutine[Any, Any, None], at: int, when: str) -> int:
    moment = moments(str(at), when)
    with ExitStack() as patched:
        for name in _OPERATIONS:
            patched.enter_context(patch.object(os, name, mortal(moment, getattr(os, name))))
        start = asyncio.create_subprocess_exec
        patched.enter_context(patch.object(asyncio, "create_subprocess_exec", mortal(moment, start)))
        try:
            asyncio.run(work)
        except EngineError as error:
            print(error.message, file=sys.stderr)
            return error.status
    return 0


def main() -> None:
    state = Path(sys.argv[1])
    for line in sys.stdin:
        at, when, settings, document = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_work(_serve(state, EngineSettings(**settings), document), at, when))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
