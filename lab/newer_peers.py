"""Peers of newer Debian releases than this machine's, unpacked with their own libraries into .peers/newer/.

    python3 lab/newer_peers.py          fetch and unpack what is missing (lab/system-packages calls this)
    python3 lab/newer_peers.py renew    write lab/newer-peers.toml anew from Debian's signed indices

The pins in lab/newer-peers.toml say which files, each with its SHA-256. The archive keeps a file only while a release
still has it, so a pin grows old. When one has gone, the release's signed index is asked for the package of today: apt
checks Debian's signature, and the program must still have the upstream version of the pin, since that version is what
docs/interop.md speaks of. Where it has another one, an optional release is left out and a required one is an error;
`renew` is the remedy for both. The mirror is the one of this machine's apt configuration.

It stands on the standard library alone, since it runs before the virtual environment is there.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "lab" / "newer-peers.toml"
UNPACKED = ROOT / ".peers" / "newer"
_APT_HELPER = "/usr/lib/apt/apt-helper"
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_RENEW = "run `python3 lab/newer_peers.py renew`, then the interop tests, and commit the new pins"
_DEADLINE = 300.0


@dataclass(frozen=True, slots=True)
class Release:
    """What is taken from one Debian release."""

    programs: tuple[str, ...]
    libraries: tuple[str, ...]
    required: bool


# Programs of sid run with trixie's libraries too. sid moves on with every upload; nothing may depend on it.
RELEASES = {
    "trixie": Release(
        programs=("chrony", "ntpd-rs"),
        libraries=(
            "libc6",
            "libcap2",
            "libedit2",
            "libbsd0",
            "libffi8",
            "libgcc-s1",
            "libgmp10",
            "libgnutls30t64",
            "libhogweed6t64",
            "libidn2-0",
            "libmd0",
            "libnettle8t64",
            "libp11-kit0",
            "libseccomp2",
            "libtasn1-6",
            "libtinfo6",
            "libunistring5",
        ),
        required=True,
    ),
    "sid": Release(programs=("chrony", "ntpd-rs", "pebble"), libraries=(), required=False),
}


class Unavailable(Exception):
    """A package cannot be had as it was asked for."""


@dataclass(frozen=True, slots=True)
class Pin:
    """One file of the archive."""

    package: str
    version: str
    path: str
    sha256: str

    @property
    def upstream(self) -> str:
        """The version without epoch and Debian's own revision."""
        return self.version.split(":")[-1].rpartition("-")[0]


def read_pins(release: str) -> list[Pin]:
    """The pins of a release."""
    document = tomllib.loads(PINS.read_text())
    return [Pin(**entry) for entry in document[release]]


def _output(*argv: str, config: Path | None = None, cwd: Path | None = None) -> str:
    """Standard output of a command. Raises Unavailable with what it said when it failed."""
    environment = {**os.environ, "LC_ALL": "C", **({"APT_CONFIG": str(config)} if config else {})}
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, timeout=_DEADLINE, env=environment, cwd=cwd
    )
    if done.returncode:
        said = [
            line for line in done.stderr.splitlines() if line.startswith("E: ")
        ] or done.stderr.splitlines()
        raise Unavailable(f"{Path(argv[0]).name}: {said[0] if said else done.returncode}")
    return done.stdout


def _mirrors() -> list[str]:
    """The base addresses from which this machine takes its Debian packages."""
    codename = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    found: dict[str, bool] = {}
    lines = _output(
        "apt-get",
        "indextargets",
        "--format",
        "$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)",
        "Created-By: Packages",
    )
    for line in lines.splitlines():
        uri, release, component, origin = line.split("|")
        if component == "main" and release in {codename, "stable", "oldstable"}:
            found[uri.rstrip("/")] = origin == "Debian"
    if not found:
        raise Unavailable(f"apt's sources name no mirror with {codename or 'Debian'} main; add one")
    return sorted(found, key=lambda uri: not found[uri])


def download(mirrors: Sequence[str], pin: Pin, target: Path) -> None:
    """One file into `target`, its hash checked by apt. Raises Unavailable."""
    failure = Unavailable("no mirror")
    for mirror in mirrors:
        address = f"{mirror}/{urllib.parse.quote(pin.path)}"
        try:
            _output(
                _APT_HELPER, "download-file", address, str(target), f"SHA256:{pin.sha256}", cwd=target.parent
            )
        except Unavailable as error:
            failure = error
            continue
        # Only what was measured here is believed.
        if hashlib.sha256(target.read_bytes()).hexdigest() == pin.sha256:
            return
        failure = Unavailable(f"{pin.path} is not what its hash says")
    raise failure


def resolve(mirrors: Sequence[str], release: str) -> list[Pin]:
    """The packages as they are today in a release, from its index signed by Debian. Raises Unavailable."""
    wanted = RELEASES[release]
    failure = Unavailable("no mirror")
    for mirror in mirrors:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                return _from_index(mirror, release, [*wanted.programs, *wanted.libraries], Path(scratch))
            except Unavailable as error:
                failure = error
    raise failure


def _from_index(mirror: str, release: str, packages: Sequence[str], scratch: Path) -> list[Pin]:
    """Ask apt with lists, cache and sources of its own; nothing of the machine's is touched."""
    (scratch / "state" / "lists" / "partial").mkdir(parents=True)
    (scratch / "cache" / "archives" / "partial").mkdir(parents=True)
    (scratch / "sources.list").write_text(f"deb [signed-by={_KEYRING}] {mirror}/ {release} main\n")
    config = scratch / "apt.conf"
    config.write_text(
        f'Dir::Etc::sourcelist "{scratch}/sources.list";\n'
        'Dir::Etc::sourceparts "-";\n'
        f'Dir::State "{scratch}/state";\n'
        'Dir::State::status "/dev/null";\n'
        f'Dir::Cache "{scratch}/cache";\n'
        'Acquire::Languages "none";\n'
        'Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";\n'
        'APT::Sandbox::User "root";\n'
        'APT::Update::Error-Mode "any";\n'
    )
    _output("apt-get", "-q", "update", config=config)
    printed = _output("apt-get", "download", "--print-uris", *packages, config=config)
    base = f"{mirror}/"
    pins: dict[str, Pin] = {}
    for line in printed.splitlines():
        address, file, _size, digest = line.split()
        package, version, _architecture = urllib.parse.unquote(file).removesuffix(".deb").split("_")
        path = urllib.parse.unquote(address.strip("'")).removeprefix(base)
        if not re.fullmatch(r"SHA256:[0-9a-f]{64}", digest):
            raise Unavailable(f"the index of {release} has no SHA-256 for {package}")
        pins[package] = Pin(package, version, path, digest.removeprefix("SHA256:"))
    return [pins[package] for package in packages]


def _unpack(mirrors: Sequence[str], pins: Sequence[Pin], target: Path) -> None:
    """All files of one release into `target`, which is there as a whole or not at all."""
    with tempfile.TemporaryDirectory() as scratch:
        new = target.with_name(f"{target.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        for pin in pins:
            file = Path(scratch) / f"{pin.package}.deb"
            download(mirrors, pin, file)
            _output("dpkg", "-x", str(file), str(new))
        shutil.rmtree(target, ignore_errors=True)
        new.rename(target)


def check_stand_ins(release: str, pins: Sequence[Pin], today: Sequence[Pin]) -> None:
    """Whether the packages of today may stand in for pins that have gone.

    Raises Unavailable when a program has another upstream version by now.
    """
    found = {pin.package: pin for pin in today}
    for pin in pins:
        now = found[pin.package]
        if pin.package in RELEASES[release].programs and now.upstream != pin.upstream:
            raise Unavailable(f"{release} now has {pin.package} {now.upstream}, the pin says {pin.upstream}")
        if now != pin:
            print(f"note: {pin.package} {now.version} stands in for the pinned {pin.version}")


def _obtain(release: str, pins: Sequence[Pin], target: Path) -> None:
    """The pinned files into `target`, else what may stand in for them. Raises Unavailable."""
    mirrors = _mirrors()
    try:
        if _output("dpkg", "--print-architecture").strip() == "amd64":
            _unpack(mirrors, pins, target)
            return
        print("note: the pins are of amd64")
    except Unavailable as error:
        print(f"note: a pinned file has gone ({error})")
    print(f"note: asking the signed index of {release}")
    today = resolve(mirrors, release)
    check_stand_ins(release, pins, today)
    _unpack(mirrors, today, target)


def fetch() -> None:
    """Unpack every release that is not there as its pins say. Raises Unavailable for a required one."""
    for release, wanted in RELEASES.items():
        target, state = UNPACKED / release, UNPACKED / f"{release}.state"
        pins = read_pins(release)
        fingerprint = hashlib.sha256(repr(pins).encode()).hexdigest()
        settled = state.read_text().split() if state.is_file() else []
        if settled == [fingerprint, "absent"] or (settled == [fingerprint, "unpacked"] and target.is_dir()):
            continue
        print(f"unpacking: {', '.join(wanted.programs)} of Debian {release}")
        UNPACKED.mkdir(parents=True, exist_ok=True)
        try:
            _obtain(release, pins, target)
        except Unavailable as error:
            if wanted.required:
                raise
            shutil.rmtree(target, ignore_errors=True)
            print(f"note: left out: {error}\n  {_RENEW}")
            state.write_text(f"{fingerprint} absent\n")
        else:
            state.write_text(f"{fingerprint} unpacked\n")


def renew() -> None:
    """Write the pins of today."""
    mirrors = _mirrors()
    text = "# Written by `python3 lab/newer_peers.py renew`. Files of amd64, relative to the mirror's base.\n"
    for release in RELEASES:
        for pin in resolve(mirrors, release):
            text += (
                f'\n[[{release}]]\npackage = "{pin.package}"\nversion = "{pin.version}"\n'
                f'path = "{pin.path}"\nsha256 = "{pin.sha256}"\n'
            )
    PINS.write_text(text)


def main() -> None:
    commands = {"fetch": fetch, "renew": renew}
    name = sys.argv[1] if len(sys.argv) > 1 else "fetch"
    if name not in commands or len(sys.argv) > 2:
        sys.exit(f"usage: {sys.argv[0]} [fetch|renew]")
    try:
        commands[name]()
    except (Unavailable, subprocess.TimeoutExpired) as error:
        sys.exit(f"error: {error}\n  check the network and apt's sources; else {_RENEW}")


if __name__ == "__main__":
    main()
