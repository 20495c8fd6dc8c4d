"""The end of a server on this host: after it has left its pool, or without asking a registry that is gone."""

import asyncio
import time

from member_agent import local
from member_agent.clock import clock_of
from member_agent.config import AgentSettings
from member_agent.engines.choice import BUILTIN, engine_of, kind_of
from member_agent.engines.requests import longest
from member_agent.engines.succession import Succession
from member_agent.errors import AgentError, ExitStatus
from member_agent.host import Host
from member_agent.member import all_last_served, take_away
from member_agent.state import MemberDirectory, StateDirectory

# Seconds for which an agent may be in the midst of asking the registry, and until root has begun, beside those that a
# change of its engine may take.
_PATIENCE = 60.0
_LOOK = 0.1


async def leave_here(state: StateDirectory, settings: AgentSettings, directory: MemberDirectory) -> None:
    """Take a server away from this host: by the agent, where one runs. Raises AgentError.

    Whatever ends this before its time, the next start of an agent goes on with it.
    """
    directory.give_up()
    if local.ask(state.path, "wake") is None:
        await _leave_alone(state, settings, directory)
        return
    end = time.monotonic() + _PATIENCE + longest(settings.engine.deadline)
    while directory.is_given_up:
        if time.monotonic() > end:
            raise AgentError(
                f"the agent has not taken {directory.path.name} away",
                "pool-agent logs says why; it is tried again by this command, and when the agent starts",
                ExitStatus.ENGINE,
            )
        await asyncio.sleep(_LOOK)


async def _leave_alone(state: StateDirectory, settings: AgentSettings, directory: MemberDirectory) -> None:
    """As an agent would. A time daemon goes on with the other servers of this host."""
    state.lock()
    state.clean()
    kind = kind_of(settings, state)
    succession = Succession(state.path, settings.engine, kind)
    if kind == BUILTIN:
        # Nothing is served now; but a time daemon may have been the engine before.
        await succession.end()
        directory.remove()
        return
    clock = clock_of(settings)
    host = Host(settings, clock, engine_of(settings, state, clock), succession)
    await host.resume(await all_last_served(state, settings))
    await take_away(host, directory)
