"""What answers on the sockets of the builtin engine: `native`, the Rust module of `engine/`, or `python`. Both do the same.

Only the one that is used is loaded.
"""

import socket
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import structlog

from member_agent.clock import Clock
from member_agent.config import AgentSettings, PacketEngine
from member_agent.engines.serving import Counts, PemPair, Place
from member_agent.errors import AgentError, ExitStatus
from nts_core.cookies import Keyring

_log = structlog.get_logger()


class Packets(Protocol):
    """Answers NTS-KE and NTP from the first `listen` to `close`, by as many workers as the settings name."""

    name: PacketEngine

    def check(self, pair: PemPair) -> None:
        """Raises ValueError for a pair that is well, but not of use to it."""

    async def use_pairs(self, pairs: Mapping[str, PemPair]) -> None:
        """The checked pair of each domain for new connections; those under way are not touched."""

    def use_keyring(self, keyring: Keyring) -> None:
        """From now on."""

    def use_clock(self) -> None:
        """The clock has heard something."""

    def listen(self, sockets: Mapping[Place, Sequence[socket.socket]]) -> None:
        """Answer on bound sockets, one for each worker at each place. They are its own from now on.

        Raises OSError when that cannot be, and then does at none of the places.
        """

    async def leave(self, places: Collection[Place]) -> None:
        """Answer there no more. Another socket can be bound there afterwards."""

    async def tend(self) -> None:
        """What it needs while it serves, for ever. Raises AgentError when it can serve no more."""

    async def close(self) -> None:
        """Answer no more."""

    @property
    def counts(self) -> Counts:
        """Of all workers that ever lived; may be read in another thread."""

    @property
    def workers(self) -> int:
        """How many live now."""

    @property
    def restarts(self) -> int:
        """How often one was started again."""


def packets_of(settings: AgentSettings, clock: Clock, keyring: Keyring) -> Packets:
    """The one of the settings. Raises AgentError."""
    wanted = settings.engine.packets
    if wanted is not PacketEngine.PYTHON:
        try:
            from member_agent.engines.native import NativePackets  # noqa: PLC0415 - it is an extra that need not be there
        except ImportError as error:
            if wanted is PacketEngine.NATIVE:
                raise AgentError(
                    f"engine.packets: there are no native packets here ({error})",
                    "build them, with cargo and `make setup` in the source; or set engine.packets to auto",
                    ExitStatus.CONFIGURATION,
                ) from None
            if not isinstance(error, ModuleNotFoundError):
                _log.warning("native_packets_not_usable", detail=str(error))
        else:
            return NativePackets(settings, clock, keyring)
    from member_agent.engines.python import PythonPackets  # noqa: PLC0415 - not for an agent that has the other

    return PythonPackets(settings, clock, keyring)
