"""The bench's programs in Rust, `engine/examples`: built by cargo, where that is."""

import json
import re
import subprocess
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bench.load import WINDOW, Burst, Load, LoadClient, LoadError
from lab.processes import LabError

_ENGINE = Path(__file__).resolve().parent.parent / "engine"
# Without the module for Python, whose headers need not be there.
_BUILD = ("cargo", "build", "--quiet", "--release", "--locked", "--no-default-features", "--examples")
# Beyond what a run is to take: for requests to be read, and for answers that are late.
_PATIENCE = 30.0


@cache
def has_cargo() -> bool:
    """Whether there is a cargo that `engine/Cargo.toml` can use."""
    wanted = tomllib.loads((_ENGINE / "Cargo.toml").read_text())["package"]["rust-version"]
    try:
        found = subprocess.run(["cargo", "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return False
    return _version(found.split()[1]) >= _version(wanted)


def _version(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)[:3]]


@cache
def program(name: str) -> str:
    """The path of one of them, which is built first; LabError with the compiler's words when that fails."""
    if not has_cargo():
        raise LabError("cargo is missing, or too old for engine/Cargo.toml: install Rust")
    done = subprocess.run(_BUILD, cwd=_ENGINE, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"cargo build: {done.stderr}")
    return str(_ENGINE / "target/release/examples" / name)


@dataclass(frozen=True, slots=True)
class Establishments:
    """What a client of key establishment has done; `cpu_ns` is its own processor time."""

    established: int
    seconds: float
    cpu_ns: int


def establish_many(server: str, certificate: Path, clients: int, seconds: float) -> Establishments:
    """So many clients at a time, each with one key establishment after the other. Raises LoadError."""
    argv = [program("establish"), server, str(certificate), str(clients), str(seconds)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=seconds + _PATIENCE)
    if done.returncode:
        raise LoadError(done.stderr.strip())
    return Establishments(**json.loads(done.stdout))


class NativeLoad:
    """As `Load`, by `engine/examples/load.rs`: from several addresses, and at a rate if that is wanted."""

    def __init__(self, address: str, port: int, requests: Sequence[bytes], sources: Sequence[str]) -> None:
        if len({len(request) for request in requests}) != 1 or len(requests) < WINDOW:
            raise ValueError(f"a load needs {WINDOW} or more requests of one length")
        self._argv = [program("load"), f"{address}:{port}", ",".join(sources), str(len(requests[0]))]
        self._requests = b"".join(requests)

    def run(self, seconds: float, *, samples: int, rate: float | None = None) -> Burst:
        """Keep a window full for each source, or send `rate` requests a second whatever comes back."""
        options = [str(seconds), str(samples), *([] if rate is None else [str(rate)])]
        done = subprocess.run(
            [*self._argv, *options],
            input=self._requests,
            capture_output=True,
            check=False,
            timeout=seconds + _PATIENCE,
        )
        if done.returncode:
            raise LoadError(done.stderr.decode().strip())
        found = json.loads(done.stdout)
        return Burst(**{**found, "sample": tuple(map(bytes.fromhex, found["sample"]))})


def load(address: str, port: int, requests: Sequence[bytes], sources: Sequence[str]) -> LoadClient:
    """The faster client where it can be built."""
    if has_cargo():
        return NativeLoad(address, port, requests, sources)
    return Load(address, port, requests, sources[0])
