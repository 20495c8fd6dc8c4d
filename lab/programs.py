"""Our own console scripts, run as a user would run them."""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from lab.certificates import Pair
from lab.processes import Process
from member_agent.state import Membership, StateDirectory, agent_key_pem, token_digest
from poolsvc.cli import app as poolsvc_app

_SCRIPTS = Path(sys.executable).parent
RUN_DEADLINE = 60.0


def script(name: str) -> str:
    """The path of one of our console scripts in this environment."""
    return str(_SCRIPTS / name)


@dataclass(frozen=True, slots=True)
class Finished:
    """A program that has ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        """Standard output as the one JSON object that it must be."""
        parsed: dict[str, Any] = json.loads(self.stdout)
        return parsed


def run(name: str, *arguments: str, deadline: float = RUN_DEADLINE, inside: Sequence[str] = ()) -> Finished:
    """Run one of our programs to its end, after the words of `inside`, which say where."""
    done = subprocess.run(
        [*inside, script(name), *arguments], capture_output=True, text=True, timeout=deadline, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def poolsvc(config: Path, *arguments: str) -> Finished:
    """A command of the registry with its settings, in this process, since a new one takes seconds to load what is here."""
    done = CliRunner().invoke(poolsvc_app, [*arguments, "--config", str(config)])
    return Finished(done.exit_code, done.stdout, done.stderr)


# Whatever time daemon the host of the tests has, it is not part of them.
NO_DAEMON = "--clock-source=kernel"


def scrape(port: int) -> dict[str, float]:
    """The metrics that one of our programs serves on loopback: name, with labels, to value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


class AgentServer:
    """`pool-agent serve`, with the endpoints of its ready line; a later --clock-source overrides ours."""

    def __init__(
        self,
        directory: Path,
        pair: Pair,
        *arguments: str,
        ke: Sequence[str] = ("127.0.0.1:0",),
        ntp: Sequence[str] = ("127.0.0.1:0",),
    ) -> None:
        options = [*(f"--ke={endpoint}" for endpoint in ke), *(f"--ntp={endpoint}" for endpoint in ntp)]
        files = [f"--cert={pair.cert}", f"--key={pair.key}"]
        self.process = Process(
            "pool-agent", [script("pool-agent"), "serve", NO_DAEMON, *files, *options, *arguments], directory
        )

    def start(self) -> Self:
        self.process.start(lambda: self._ready_line() is not None)
        return self

    def stop(self) -> None:
        self.process.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _ready_line(self) -> str | None:
        return next(
            (line for line in self.process.output().splitlines() if line.startswith("ready ke=")), None
        )

    @property
    def ke_port(self) -> int:
        """The port of the first NTS-KE listener."""
        return self._port("ke=")

    @property
    def ntp_port(self) -> int:
        """The port of the first NTP listener."""
        return self._port("ntp=")

    def _port(self, word: str) -> int:
        line = self._ready_line()
        assert line is not None, "the server is not ready"
        first = next(part for part in line.split() if part.startswith(word)).removeprefix(word).split(",")[0]
        return int(first.rpartition(":")[2])


def alice(
    state: Path,
    registry: str = "https://registry.example",
    *,
    token: str = "tc_agent_x",
    token_at: int | None = None,
) -> Membership:
    """Make a state directory that of alice in pool.example, as joining would, without a registry."""
    key = agent_key_pem(Ed25519PrivateKey.generate()).decode()
    domain = "alice.servers.pool.example"
    membership = Membership(
        registry,
        "pool.example",
        "alice",
        domain,
        token,
        int(time.time()) if token_at is None else token_at,
        key,
        token_digest("tc_join_x"),
    )
    StateDirectory(state).member(domain).save_membership(membership)
    return membership
