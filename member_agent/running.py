"""`pool-agent run` once its command line has been read: the same process, as a program that knows nothing of command lines.

An agent runs for years, and Python gives no memory back: what reads command lines and talks to people would be 2 MB of it.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from member_agent.config import load_settings
from member_agent.daemon import Agent
from member_agent.errors import AgentError
from member_agent.state import StateDirectory
from nts_core.shell import configure_logging, raise_descriptor_limit

WORD = "--running"


def become(state: Path, flags: dict[str, Any]) -> NoReturn:
    """Go on as that program: with this process's id, environment and sockets. `flags` are settings."""
    # Nothing is imported from the directory where people happen to be.
    where_from = "-I" if sys.flags.isolated else "-P"
    words = ["-m", "member_agent.program", WORD, str(state), json.dumps(flags)]
    os.execv(sys.executable, [sys.executable, where_from, *words])  # noqa: S606 - there is no shell


def main() -> None:
    """That program."""
    state, flags = Path(sys.argv[2]), json.loads(sys.argv[3])
    configure_logging()
    raise_descriptor_limit()

    async def work() -> None:
        settings = load_settings(state, flags)
        await Agent(StateDirectory(state, create=False), settings).run()

    try:
        asyncio.run(work())
    except AgentError as error:
        sys.stderr.write(f"{error.told()}\n")
        sys.exit(error.status)
