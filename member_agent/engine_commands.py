"""`pool-agent engine`: what root does for an agent that may not, and what people may want to see.

What drives daemons is loaded by the commands alone (`choice` says why).
"""

import asyncio
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from member_agent.commands import DEFAULT_STATE, StateOption, failing
from member_agent.config import EngineSettings, load_settings
from member_agent.engines import EngineError
from member_agent.engines.layout import Kind
from member_agent.engines.requests import Task, answer, settings_for_root, take
from member_agent.engines.succession import forget, recorded
from member_agent.errors import AgentError, ExitStatus
from member_agent.state import StateDirectory
from nts_core.shell import configure_logging

if TYPE_CHECKING:
    from member_agent.engines.external import Hands

app = typer.Typer(no_args_is_help=True, help="The time daemon of this host as the engine.")


def _hands(kind: Kind, settings: EngineSettings) -> "Hands":
    from member_agent.engines.external import Hands  # noqa: PLC0415 - not for an agent that drives none

    return Hands(kind, settings)


@app.command("detect")
def show(state: StateOption = DEFAULT_STATE) -> None:
    """Which time daemons there are, and whether they can be the engine."""
    from member_agent.engines.detect import detect  # noqa: PLC0415 - not for an agent that drives none

    with failing():
        settings = load_settings(state, {}).engine
    found = detect(settings)
    for each in found:
        runs = "runs" if each.is_running else "does not run"
        typer.echo(f"{each.kind} {each.version} {runs}, {each.config}")
        if each.problem:
            typer.echo(f"  {each.problem}\n  {each.remedy}")
    if not found:
        typer.echo("no time daemon that can be the engine; there is always the builtin one")


@app.command()
def apply(state: StateOption = DEFAULT_STATE) -> None:
    """Do what the agent asks for: for pool-agent-engine.service, as root."""
    configure_logging()
    with failing():
        task = take(state)
        if task is None:
            typer.echo("nothing is asked for")
            return
        asyncio.run(_follow(state, task))
    typer.echo(f"{task.kind} serves {', '.join(sorted(task.bundles)) or 'nothing of ours any more'}")


async def _follow(state: Path, task: Task) -> None:
    """Whatever happens, the agent is told: it waits."""
    fault: EngineError | None = EngineError("it was stopped in the middle", "it is asked for again")
    try:
        hands = _hands_for(task, settings_for_root(state))
        if task.bundles:
            await hands.apply(task.bundles, task.ke, task.ntp)
        else:
            await hands.remove()
        fault = None
    except EngineError as error:
        fault = error
        raise
    except AgentError as error:
        fault = EngineError(error.message, error.remedy)
        raise
    finally:
        answer(state, task.id, fault)


def _hands_for(task: Task, settings: EngineSettings) -> "Hands":
    """Raises EngineError when the agent has another daemon serve than the settings name, which are root's.

    Any may be rid of what is ours: the settings may have named it before.
    """
    if task.bundles and settings.kind not in ("auto", task.kind):
        raise EngineError(
            f"the settings name {settings.kind}, and the agent asks for {task.kind}",
            "correct engine.kind in the agent's settings, and restart the agent",
        )
    return _hands(task.kind, settings.of(task.kind))


@app.command()
def remove(state: StateOption = DEFAULT_STATE) -> None:
    """Take away, from every time daemon, all that the agent ever wrote: as root, while no agent runs."""
    configure_logging()
    with failing():
        if state.exists():
            _keep_agent_away(state)
            places = [*_last_place(state), *_places(settings_for_root(state))]
        else:
            places = _places(load_settings(None, {}).engine)
        faults = [fault for place in places if (fault := asyncio.run(_fault_of_removal(place))) is not None]
        if faults:
            raise EngineError(
                "; ".join(fault.message for fault in faults), "; ".join(fault.remedy for fault in faults)
            )
        forget(state)
    typer.echo("nothing of ours is in the configuration of a time daemon")


def _keep_agent_away(state: Path) -> None:
    """Until this process ends: an agent that runs looks after its lines, and would write them again. Raises AgentError."""
    try:
        StateDirectory(state, create=False).lock()
    except AgentError as error:
        if error.status is not ExitStatus.LOCKED:
            raise
        raise AgentError(
            f"an agent runs on {state}, and would write again what is taken away",
            "stop it first: systemctl stop pool-agent; or leave the pool: pool-agent leave",
            ExitStatus.LOCKED,
        ) from None


def _places(settings: EngineSettings) -> list[EngineSettings]:
    return [settings.of(kind) for kind in Kind]


def _last_place(state: Path) -> list[EngineSettings]:
    """Where the agent last wrote, as far as it may be believed: that names a command."""
    is_ours = state.stat().st_uid == os.geteuid()
    with suppress(EngineError):  # a damaged note
        return [last] if is_ours and (last := recorded(state)) is not None else []
    return []


async def _fault_of_removal(place: EngineSettings) -> EngineError | None:
    try:
        await _hands(Kind(place.kind), place).remove()
    except EngineError as error:
        return error
    return None
