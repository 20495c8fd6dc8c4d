"""The member's own commands around the installation of a certificate: such as one that copies it elsewhere.

They are run as the agent's user, without a shell, with what they need to know in the environment and nothing of ours.
"""

import asyncio
import os
from collections.abc import Mapping, Sequence

import structlog

from member_agent.errors import AgentError, ExitStatus
from nts_core.errors import printable

_log = structlog.get_logger()
_DEADLINE = 60.0
_MOST = 2000  # octets of what a command says that are shown
_KEPT = ("PATH", "LANG", "HOME")


async def run(
    name: str, command: Sequence[str], facts: Mapping[str, str], deadline: float = _DEADLINE
) -> None:
    """Run a hook and wait for it; nothing without a command. Raises AgentError when it fails or takes too long.

    `facts` are told as POOL_HOOK_ variables: those of POOL_AGENT_ are settings.
    """
    if not command:
        return
    told = {f"POOL_HOOK_{key.upper()}": value for key, value in facts.items()}
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={key: os.environ[key] for key in _KEPT if key in os.environ} | told,
            start_new_session=True,
        )
    except OSError as error:
        raise _failed(name, command, error.strerror or str(error)) from None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(deadline):
            said = await _read(process.stdout)
            status = await process.wait()
    except TimeoutError:
        raise _failed(name, command, f"not done in {deadline:g} s") from None
    finally:
        if process.returncode is None:
            # With what it has started.
            os.killpg(process.pid, 9)
            await process.wait()
    if status:
        raise _failed(name, command, f"status {status}: {said}")
    _log.info("hook_done", hook=name, said=said)


async def _read(stream: asyncio.StreamReader) -> str:
    """The beginning of what comes, as printable text; the rest is read and dropped."""
    kept = bytearray()
    while octets := await stream.read(65_536):
        kept += octets[: _MOST - len(kept)]
    text = kept.decode("utf-8", "replace").strip()
    return printable(text, None)


def _failed(name: str, command: Sequence[str], why: str) -> AgentError:
    return AgentError(
        f"the hook {name}, {command[0]}, failed: {why}",
        f"correct the command, or take hooks.{name} out of the settings",
        ExitStatus.CONFIGURATION,
    )
