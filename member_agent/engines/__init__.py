"""What answers NTS-KE and NTP on the member's host.

`builtin` is the one inside the agent; `chrony`, `ntpsec` and `ntpd_rs` say what the time daemon of that name needs to
be told, and `external` tells it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from member_agent.errors import AgentError, ExitStatus
from member_agent.install import InstalledPair
from member_agent.sockets import Endpoint


@dataclass(frozen=True, slots=True)
class Service:
    """What an engine is to serve: the installed pair of each domain, and where."""

    pairs: Mapping[str, InstalledPair]
    ke: tuple[Endpoint, ...]
    ntp: tuple[Endpoint, ...]


class EngineError(AgentError):
    """What is to be served cannot be; the message holds a daemon's own last log lines."""

    def __init__(self, message: str, remedy: str, status: ExitStatus = ExitStatus.ENGINE) -> None:
        super().__init__(message, remedy, status)


class Engine(Protocol):
    """What serves on this host."""

    name: str
    # Seconds before what failed is tried again: after the first failure, the second, and so on with the last.
    patience: tuple[float, ...]

    async def apply(self, service: Service) -> None:
        """Serve this instead of what is served now; on EngineError what was served before is served again."""

    async def tend(self) -> None:
        """What it needs while it serves, for ever."""

    async def close(self) -> None:
        """The agent ends: a daemon goes on without it."""

    async def remove(self) -> None:
        """Take every line away: a daemon goes on without NTS from us."""

    @property
    def packets(self) -> str | None:
        """What answers in the agent itself; None where a daemon does."""

    @property
    def requests(self) -> int | None:
        """NTP requests so far; None when that is not known."""

    @property
    def ke_requests(self) -> int | None:
        """NTS-KE connections so far; None when that is not known."""
