"""What the external engines have in common: a time daemon, and the files that make it serve.

A daemon's own configuration is read and never written. What has to be said stands in files of ours beside it, each of
which begins with `MARK`, and a key and its chain are one file. So what is there is either the old or the new, by one
rename, and whose it is can be seen.
"""

import ipaddress
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from member_agent.engines import EngineError
from member_agent.sockets import Endpoint

MARK = "# Written by pool-agent; `pool-agent leave` takes it away. Changes here are lost."
DROP_IN = "pool-agent.conf"
# More than any daemon's configuration holds.
_READ_LIMIT = 1024 * 1024


class Kind(StrEnum):
    """The time daemons that can be told to serve."""

    CHRONY = "chrony"
    NTPSEC = "ntpsec"
    NTPD_RS = "ntpd-rs"


@dataclass(frozen=True, slots=True)
class Places:
    """Where a daemon's configuration is, where its unit gets a drop-in, and where it may keep what we make it keep."""

    config: Path
    units: Path
    state: Path

    @property
    def own(self) -> Path:
        """The directory that holds nothing but ours."""
        return self.config / "pool-agent"


@dataclass(frozen=True, slots=True)
class Offer:
    """What is to be served, without keys: enough to say what will be written.

    In a draft the addresses are not known yet, only the ports.
    """

    domains: tuple[str, ...]
    ke: tuple[Endpoint, ...]
    ntp: tuple[Endpoint, ...]
    is_draft: bool = False


@dataclass(frozen=True, slots=True)
class OwnFile:
    """A file of ours: these lines, or the key and chain of a domain. What is private is for the daemon's eyes only."""

    path: Path
    lines: tuple[str, ...] = ()
    pair_of: str | None = None
    is_private: bool = False

    @property
    def text(self) -> str:
        """Of a file without a pair."""
        return "\n".join((MARK, *self.lines, ""))


@dataclass(frozen=True, slots=True)
class Layout:
    """Files in the order in which they appear, each standing on those before it; they go in the other direction.

    `state` is a directory of the daemon's user. With `pairs_reload` the daemon takes new pairs without a restart.
    """

    files: tuple[OwnFile, ...]
    state: Path | None = None
    pairs_reload: bool = False


@dataclass(frozen=True, slots=True)
class TimeDaemon:
    """What is known of a daemon before it is looked at."""

    kind: Kind
    unit: str
    program: str
    process: str  # as /proc names it
    user: str
    config: Path
    version: str  # a pattern for what --version prints
    oldest: tuple[int, ...]  # that can be an NTS server
    lay_out: Callable[[Places, Offer], Layout]


def own_text(path: Path) -> str | None:
    """What a configuration file holds, None when there is none. EngineError when it cannot be read."""
    try:
        with path.open("rb") as file:
            octets = file.read(_READ_LIMIT + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise EngineError(
            f"{path} cannot be read: {error.strerror}", "check that it is a file and who may read it"
        ) from None
    if len(octets) > _READ_LIMIT:
        raise EngineError(f"{path} is too large for a configuration", "check what it is")
    return octets.decode("utf-8", "surrogateescape")


def required_text(path: Path) -> str:
    """The daemon's own configuration. EngineError when there is none."""
    text = own_text(path)
    if text is None:
        raise EngineError(
            f"there is no {path}",
            "install the daemon, or name its directory in the setting engine.config_dir",
        )
    return text


def check_ours(files: Iterable[OwnFile]) -> None:
    """EngineError when a file stands where ours would, and is not ours."""
    for file in files:
        if not os.path.lexists(file.path):
            continue
        text = None if file.path.is_symlink() or not file.path.is_file() else own_text(file.path)
        if text is None or text.partition("\n")[0] != MARK:
            raise EngineError(
                f"{file.path} is there already, and pool-agent did not write it",
                "move it away if nothing needs it, or use another engine",
            )


def one_port(endpoints: Iterable[Endpoint], what: str, kind: Kind) -> int:
    """The port of all of them, as these daemons have one for all addresses."""
    ports = {endpoint.port for endpoint in endpoints}
    if len(ports) != 1:
        raise EngineError(
            f"{kind} has one {what} port, not {', '.join(map(str, sorted(ports))) or 'none'}",
            "give all addresses the same port, or use the builtin engine",
        )
    return ports.pop()


def one_domain(offer: Offer, kind: Kind) -> str:
    """The only domain, for a daemon that shows the same certificate to everybody."""
    if len(offer.domains) != 1:
        raise EngineError(
            f"{kind} shows one certificate to everybody, and this host is {', '.join(offer.domains) or 'nobody'}",
            "use chrony or the builtin engine for several names",
        )
    return offer.domains[0]


def covers(listener: Endpoint, wanted: Endpoint) -> bool:
    """Whether who listens there is reached at `wanted`: there itself, or at every address ([::] takes IPv4 along)."""
    if listener.port != wanted.port:
        return False
    if listener.is_wildcard:
        return ":" in listener.address or listener.family == wanted.family
    return ipaddress.ip_address(listener.address) == ipaddress.ip_address(wanted.address)


def without_covered(endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    """Only those that can be bound beside each other."""
    kept: list[Endpoint] = []
    for endpoint in sorted(endpoints, key=lambda each: (not each.is_wildcard, ":" not in each.address)):
        if not any(covers(other, endpoint) for other in kept):
            kept.append(endpoint)
    return tuple(kept)
