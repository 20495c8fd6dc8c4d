"""How a stock time daemon is kept on chosen servers: what it is told, and what it says of them.

`chrony`, `ntpd_rs` and `ntpsec` say what the daemon of that name needs to be told and how it answers; `hand` tells it;
`judge` says when its word is reason enough to replace a server.
"""

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from nts_core.ke import KE_PORT
from nts_core.roster import Fault

_NAME = re.compile(r"(?=.{1,253}$)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class Kind(StrEnum):
    """The daemons that can be fed."""

    CHRONY = "chrony"
    NTPD_RS = "ntpd-rs"
    NTPSEC = "ntpsec"


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """A server of the pool, as a daemon is told of it. Its NTP port comes from key establishment."""

    name: str
    port: int = KE_PORT

    def __str__(self) -> str:
        return f"{self.name}:{self.port}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a daemon says of a server: it follows it or would, finds fault with it, or neither yet."""

    is_good: bool = False
    fault: Fault | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class TimeDaemon:
    """What is different from one daemon to another.

    `directory` and `file` (of a pool's name) are where it reads of sources; with `is_shared` the file is the user's, and
    a part of it ours. `lines` is one source with the user's own options, `members` reads what we wrote. `tell` makes it
    read that; with `spacing` seconds at least from one time to the next, since it begins anew then. `ask` is what it says
    of sources, by name, given its directory; `missing` what it means that one is not there. Without that it means that
    the daemon does not read our file, and `remedy` helps.
    """

    kind: Kind
    program: str
    directory: Path
    file: Callable[[str], str]
    lines: Callable[[Member, Sequence[str]], list[str]]
    members: Callable[[str], tuple[Member, ...]]
    tell: tuple[str, ...]
    spacing: float
    ask: Callable[[Path], Awaitable[Mapping[str, Verdict]]]
    missing: Verdict | None
    remedy: str
    is_shared: bool = False


def member_of(text: str) -> Member | None:
    """NAME or NAME:PORT as one of our lines has it; None for what we did not write."""
    name, colon, port = text.lower().partition(":")
    if _NAME.fullmatch(name) is None or (colon and re.fullmatch("[0-9]{1,5}", port) is None):
        return None
    number = int(port) if colon else KE_PORT
    return Member(name, number) if 0 < number < 65536 else None
