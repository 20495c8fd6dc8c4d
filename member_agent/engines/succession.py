"""One engine after another: what a time daemon was told by us goes before another engine serves on the same ports.

    STATE/applied-engine.json    the daemon that may have lines of ours, and how it is found

It is written before the first of them and goes after the last: whoever is killed in between takes away, or writes, what
is there already, which changes nothing. The builtin engine has no lines, and so no file.
"""

import os
from pathlib import Path

from pydantic import ValidationError

from member_agent.config import EngineSettings
from member_agent.engines import EngineError
from member_agent.engines.layout import Kind
from member_agent.state import unusable
from nts_core.shell import replace_file, sync

_FILE = "applied-engine.json"
_LIMIT = 64 * 1024


class Succession:
    """Of the engine that this agent has now to the one that the last agent had."""

    def __init__(self, state: Path, settings: EngineSettings, engine: str) -> None:
        """`engine` is the name of the one that serves now; `settings` may leave it open."""
        self._state = state
        self._settings = settings
        self._now = settings.of(engine) if engine in set(Kind) else None

    async def begin(self) -> None:
        """Before our engine is told anything. Raises AgentError while another one cannot be rid of what it was told."""
        last = await self._without_another()
        if self._now is not None and last != self._now:
            try:
                replace_file(self._state / _FILE, self._now.model_dump_json().encode())
            except OSError as error:
                raise unusable(self._state / _FILE, error) from None

    async def end(self) -> None:
        """Our engine has nothing of ours any more. Raises AgentError as `begin`."""
        await self._without_another()
        forget(self._state)

    async def _without_another(self) -> EngineSettings | None:
        """The daemon that has lines of ours, which is that of our engine or none."""
        last = recorded(self._state)
        if last is None or (self._now is not None and last.is_for_the_same(self._now)):
            return last
        await self._take_away(last)
        forget(self._state)
        return None

    async def _take_away(self, last: EngineSettings) -> None:
        from member_agent.engines.external import ExternalEngine  # noqa: PLC0415 - where a daemon is driven alone: see `choice`

        engine = ExternalEngine(Kind(last.kind), last, self._state)
        if not engine.may_write and not last.is_for_the_same(self._settings.of(last.kind)):
            # Root believes the settings alone, and they say nothing of this place any more.
            raise EngineError(
                f"{last.kind} in {last.config_dir} still serves for the agent, and the settings name it no more",
                "set engine.kind and engine.config_dir as they were, stop the agent, run `pool-agent engine remove` as"
                " root, and set them anew",
            )
        try:
            await engine.remove()
        except EngineError as error:
            raise EngineError(
                f"{last.kind}, the engine before this one: {error.message}", error.remedy
            ) from None


def recorded(state: Path) -> EngineSettings | None:
    """The daemon that may have lines of ours. EngineError when that is not legible."""
    file = state / _FILE
    try:
        with file.open("rb") as source:
            return EngineSettings.model_validate_json(source.read(_LIMIT))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unusable(file, error) from None
    except ValidationError:
        raise EngineError(
            f"{file} is damaged", "stop the agent, and run `pool-agent engine remove` as root"
        ) from None


def forget(state: Path) -> None:
    """No time daemon has lines of ours. Raises AgentError."""
    file = state / _FILE
    if not os.path.lexists(file):
        return
    try:
        file.unlink()
        sync(state)
    except OSError as error:
        raise unusable(file, error) from None
