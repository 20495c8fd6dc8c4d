"""Which time daemons there are on this host: by /proc, by systemd, and by what they say of themselves."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from member_agent.config import EngineSettings
from member_agent.engines.external import DAEMONS, SYSTEM_PATH, places_of
from member_agent.engines.layout import Kind, TimeDaemon

_DEADLINE = 5.0
_SYSTEMD = Path("/run/systemd/system")
_PROC = Path("/proc")
_ENVIRONMENT = {"PATH": SYSTEM_PATH, "LC_ALL": "C.UTF-8"}


@dataclass(frozen=True, slots=True)
class Found:
    """A daemon on this host; with a `problem` it cannot be an engine."""

    kind: Kind
    version: str
    config: Path
    is_running: bool
    problem: str | None = None
    remedy: str = ""


def detect(settings: EngineSettings, *, path: str = SYSTEM_PATH) -> tuple[Found, ...]:
    """What is installed, those that run first."""
    processes = set(_processes())
    found = [
        each for daemon in DAEMONS.values() if (each := _look(daemon, settings, path, processes)) is not None
    ]
    return tuple(sorted(found, key=lambda each: not each.is_running))


def _look(daemon: TimeDaemon, settings: EngineSettings, path: str, processes: set[str]) -> Found | None:
    program = shutil.which(daemon.program, path=path)
    if program is None:
        return None
    said = _said(program, "--version")
    config = places_of(daemon, settings).config
    is_running = daemon.process in processes or _is_active(daemon.unit)
    told = re.search(daemon.version, said)
    if told is None:
        # Several programs are called ntpd.
        return Found(
            daemon.kind,
            said.split("\n")[0][:60] or "unknown",
            config,
            is_running,
            f"{program} is not {daemon.kind}, or does not say so",
            "use the builtin engine, and give the other daemon no port; or install chrony",
        )
    version = ".".join(told.groups())
    if tuple(map(int, told.groups())) < daemon.oldest:
        oldest = ".".join(map(str, daemon.oldest))
        return Found(
            daemon.kind,
            version,
            config,
            is_running,
            f"{daemon.kind} {version} is too old to be an NTS server here; {oldest} is needed",
            "update it, or use the builtin engine",
        )
    return Found(daemon.kind, version, config, is_running)


def _processes() -> Iterator[str]:
    for place in _PROC.glob("[0-9]*/comm"):
        try:
            yield place.read_text().rstrip("\n")
        except OSError:
            continue


def _is_active(unit: str) -> bool:
    if not _SYSTEMD.is_dir() or (systemctl := shutil.which("systemctl", path=SYSTEM_PATH)) is None:
        return False
    return _said(systemctl, "is-active", unit).strip() == "active"


def _said(program: str, *arguments: str) -> str:
    """What a program prints; nothing when it does not run."""
    try:
        done = subprocess.run(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_DEADLINE,
            check=False,
            env=_ENVIRONMENT,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr
