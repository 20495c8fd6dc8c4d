"""Which engine serves on this host: chosen at join, by the member, and shown whole before anything is changed.

What drives daemons is loaded where it is needed: with its client it is a tenth of an idle agent's memory.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from member_agent.clock import Clock
from member_agent.config import AgentSettings
from member_agent.engines import Engine
from member_agent.engines.builtin import BuiltinEngine
from member_agent.engines.layout import Kind, Offer
from member_agent.errors import AgentError, ExitStatus
from member_agent.sockets import Endpoint
from member_agent.state import StateDirectory
from nts_core.ke import KE_PORT

if TYPE_CHECKING:
    from member_agent.engines.detect import Found
    from member_agent.engines.external import ExternalEngine

AUTO, BUILTIN = "auto", "builtin"
ENGINES = (BUILTIN, *Kind)
# Until the registry has said: the pool's usual KE port, at every address.
_ANYWHERE = ("0.0.0.0", "::")
_SOME_NAME = "this-server.servers.the-pool.example"


def kind_of(settings: AgentSettings, state: StateDirectory) -> str:
    """The engine of the settings; with `auto`, the one that was agreed to at join. Raises AgentError."""
    kind: str = settings.engine.kind
    return (state.engine() or BUILTIN) if kind == AUTO else kind


def engine_of(settings: AgentSettings, state: StateDirectory, clock: Clock) -> Engine:
    """The engine that serves here. Raises AgentError."""
    kind = kind_of(settings, state)
    if kind == BUILTIN:
        return BuiltinEngine(clock, settings, state)
    return _external(kind, settings, state)


def choose(wanted: str, settings: AgentSettings) -> str:
    """What `wanted` means on this host: with `auto`, a daemon that runs and can serve, else builtin. Raises AgentError."""
    if wanted == BUILTIN:
        return wanted
    found = _found(settings)
    if wanted == AUTO:
        return next((each.kind for each in found if each.is_running and not each.problem), BUILTIN)
    known = next((each for each in found if each.kind == wanted), None)
    if known is None and settings.engine.kind != wanted:
        raise AgentError(
            f"--engine {wanted}: {wanted} is not installed here",
            "install it, or use the builtin engine",
            ExitStatus.ENGINE,
        )
    if known is not None and known.problem:
        raise AgentError(f"--engine {wanted}: {known.problem}", known.remedy, ExitStatus.ENGINE)
    return wanted


def explain(kind: str, settings: AgentSettings, state: StateDirectory) -> Iterator[str]:
    """What an engine means for this host, in lines for people. Raises AgentError when it cannot be."""
    if kind == BUILTIN:
        yield "engine     builtin: the agent itself answers NTS-KE and NTP; no file of this host is changed"
        yield from (_in_the_way(each) for each in _found(settings) if each.is_running)
        return
    engine = _external(kind, settings, state)
    ntp = tuple(Endpoint(address, settings.ntp_port) for address in _ANYWHERE)
    ke = tuple(Endpoint(address, KE_PORT) for address in _ANYWHERE)
    changes = engine.plan(Offer((_SOME_NAME,), ke, ntp, is_draft=True))
    yield f"engine     {kind}: it goes on keeping the clock, and serves NTS with the pool's certificate"
    yield "once there is a certificate, and nothing before, these files are written, and no other is touched:"
    for change in changes:
        yield f"  {change.path}"
        yield from (f"    {line}" for line in change.lines)
    yield f"then, and at each renewal: {engine.how()}"


def _found(settings: AgentSettings) -> "tuple[Found, ...]":
    from member_agent.engines.detect import detect  # noqa: PLC0415 - see above

    return detect(settings.engine)


def _external(kind: str, settings: AgentSettings, state: StateDirectory) -> "ExternalEngine":
    from member_agent.engines.external import ExternalEngine  # noqa: PLC0415 - see above

    return ExternalEngine(Kind(kind), settings.engine.of(kind), state.path)


def _in_the_way(found: "Found") -> str:
    return (
        f"           {found.kind} runs here: if it holds UDP port 123 of the server's addresses, let it serve"
        f" (--engine {found.kind}) or give it `port 0`"
    )
