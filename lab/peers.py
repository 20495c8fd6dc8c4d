"""Other people's NTS: chrony, NTPsec and ntpd-rs, from Debian's packages unpacked but never installed.

They lie in `.peers` in the repository's root, or where TRUECHIMER_PEERS says, as `dpkg-deb -x` leaves them:
.peers/chrony/usr/sbin/chronyd, .peers/newer/trixie/usr/sbin/chronyd. Those of newer Debian releases run with the C library
and the loader that were unpacked beside them. None of them can set the clock: all run without the capability that
setting takes, chronyd with -x besides, and ntpd-rs as a client behind `still_clock`.
"""

import json
import os
import secrets
import shlex
import signal
import socket
import struct
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, Self

from lab.certificates import Pair
from lab.newer_peers import read_pins
from lab.processes import LabError, Process, free_port, wait_until

PEERS_VARIABLE = "TRUECHIMER_PEERS"
_HERE = Path(__file__).resolve().parent
_DEFAULT = _HERE.parent / ".peers"
_REPORT_DEADLINE = 10.0
NO_CLOCK = ("setpriv", "--bounding-set=-sys_time", "--inh-caps=-sys_time")
STILL_CLOCK = (sys.executable, str(_HERE / "still_clock.py"))


def _directory() -> Path:
    told = os.environ.get(PEERS_VARIABLE)
    return Path(told) if told else _DEFAULT


@dataclass(frozen=True, slots=True)
class Package:
    """One unpacked package; `version` is the upstream version, as the program itself tells it."""

    name: str
    version: str
    directory: str
    is_newer: bool = False
    is_required: bool = True

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    def is_there(self) -> bool:
        """Whether it was unpacked; only a package that is not required may be missing."""
        return (_directory() / self.directory / "usr").is_dir()

    def command(self, path: str) -> list[str]:
        """The beginning of a command line that runs a program; LabError with the remedy when it is not there."""
        program = _directory() / self.directory / path
        if not program.is_file():
            raise LabError(f"{program} is missing; run `make setup`, or set {PEERS_VARIABLE}")
        if not self.is_newer:
            return [str(program)]
        # Programs of every newer release run with trixie's libraries.
        libraries = _directory() / "newer/trixie/usr/lib"
        loader = next(libraries.glob("*/ld-linux-*.so.*"), None)
        if loader is None:
            raise LabError(f"{libraries} has no loader; run `make setup`, or set {PEERS_VARIABLE}")
        return [str(loader), "--library-path", str(loader.parent), str(program)]


@cache
def _newer(name: str, release: str) -> Package:
    pin = next(pin for pin in read_pins(release) if pin.package == name)
    return Package(name, pin.upstream, f"newer/{release}", is_newer=True, is_required=release == "trixie")


# Debian 12's; its versions change by patches only.
CHRONY = Package("chrony", "4.3", "chrony")
NTPSEC = Package("NTPsec", "1.2.2", "ntpsec")
CHRONY_TRIXIE = _newer("chrony", "trixie")
CHRONY_SID = _newer("chrony", "sid")
NTPD_RS_TRIXIE = _newer("ntpd-rs", "trixie")
NTPD_RS_SID = _newer("ntpd-rs", "sid")
PEBBLE_SID = _newer("pebble", "sid")


def library_environment() -> dict[str, str]:
    """What lets Debian 12's programs find shared libraries that were unpacked next to them."""
    unpacked = sorted({str(library.parent) for library in _directory().glob("*/usr/lib/*/*.so.*")})
    inherited = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": ":".join([*unpacked, *([inherited] if inherited else [])])}


def chronyc_environment() -> dict[str, str]:
    """What lets a program find `chronyc` on its PATH."""
    directory = Path(*CHRONY.command("usr/bin/chronyc")).parent
    return {**library_environment(), "PATH": f"{directory}:{os.environ.get('PATH', '')}"}


class Server(Protocol):
    """What all NTS servers of the laboratory can be asked to do."""

    address: str
    ke_port: int
    ntp_port: int

    def start(self) -> Self: ...

    def stop(self) -> None: ...

    def forget_keys(self) -> None:
        """Remove the cookie keys that it keeps on disk; it must be stopped."""

    def rotate_keys(self) -> None:
        """Make it seal new cookies with a new key; it must be running, and may be started anew for that."""

    def take_certificate(self) -> None:
        """Make it use what its certificate's files hold now, in the way that its manual names."""


def with_hosts(directory: Path, argv: Sequence[str], addresses: Mapping[str, str]) -> list[str]:
    """A command line under which these names lead to these addresses, as lines in /etc/hosts would make it.

    In a mount namespace of its own: neither chronyd nor ntpd-rs has an option for it.
    """
    hosts = directory / "hosts"
    lines = [f"{address} {name}\n" for name, address in addresses.items()]
    hosts.write_text("".join(["127.0.0.1 localhost\n", *lines]))
    command = f"mount --bind {shlex.quote(str(hosts))} /etc/hosts && exec {shlex.join(argv)}"
    own_user = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    return ["unshare", *own_user, "--mount", "sh", "-c", command]


def _wait_for_change(file: Path, what: str) -> None:
    before = file.read_bytes() if file.exists() else b""
    wait_until(lambda: file.exists() and file.read_bytes() not in {before, b""}, what)


def _reached(register: int) -> bool:
    """Whether the last three polls were answered; the register has one bit a poll, the newest the lowest."""
    return register & 0b111 == 0b111


_CHRONY_COMMON = """\
cmdport 0
bindcmdaddress {directory}/socket
pidfile {directory}/pid
"""

_CHRONY_SERVER = """\
bindaddress {address}
port {ntp_port}
ntsport {ke_port}
ntsservercert {pair.cert}
ntsserverkey {pair.key}
ntsdumpdir {directory}
ntsrotate {rotation_s}
local stratum {stratum}
allow
"""

_CHRONY_CLIENT = """\
server {server} nts ntsport {ke_port} iburst minpoll {poll} maxpoll {poll}
nosystemcert
ntstrustedcerts {root}
port 0
"""


class Chronyd:
    """chronyd in the foreground, controlled over `socket` in its directory."""

    def __init__(self, directory: Path, configuration: str, package: Package = CHRONY) -> None:
        # chronyd refuses a directory for its socket that others may enter.
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory = directory
        self.package = package
        self.socket = directory / "socket"
        config = directory / "chrony.conf"
        config.write_text(configuration + _CHRONY_COMMON.format(directory=directory))
        argv = [*package.command("usr/sbin/chronyd"), "-x", "-d", "-f", str(config)]
        argv = [*NO_CLOCK, *argv, "-u", "root"] if os.geteuid() == 0 else [*argv, "-U"]
        self.process = Process("chronyd", argv, directory, env=self._environment())

    def start(self) -> Self:
        self.process.start(self._answers)
        return self

    def stop(self) -> None:
        self.process.stop()

    def report(self, name: str) -> list[list[str]]:
        """A report of chronyc (`sources`, `authdata`, `ntpdata`, `serverstats`) as rows of fields.

        Empty while chronyd does not answer.
        """
        done = subprocess.run(
            [*self._chronyc("-n", "-c"), name],
            capture_output=True,
            text=True,
            timeout=_REPORT_DEADLINE,
            check=False,
            env={**os.environ, **self._environment()},
        )
        if done.returncode:
            return []
        return [line.split(",") for line in done.stdout.splitlines()]

    def chronyc(self, name: str) -> str:
        """The command line that shows a report to a person."""
        return shlex.join([*self._chronyc("-n"), name])

    def put_chronyc(self, directory: Path) -> None:
        """A program `chronyc` there, for a PATH, that asks this chronyd."""
        environment = [f"{name}={value}" for name, value in self._environment().items()]
        program = directory / "chronyc"
        program.write_text(f'#!/bin/sh\nexec {shlex.join(["env", *environment, *self._chronyc()])} "$@"\n')
        program.chmod(0o755)

    def _environment(self) -> Mapping[str, str]:
        return {} if self.package.is_newer else library_environment()

    def _chronyc(self, *options: str) -> list[str]:
        # From 4.9 on chronyc becomes a user that only an installed package makes; the protocol is the same.
        package = CHRONY_TRIXIE if self.package.is_newer else self.package
        return [*package.command("usr/bin/chronyc"), *options, "-h", str(self.socket)]

    def _answers(self) -> bool:
        return self.socket.exists() and bool(self.report("tracking"))

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


class ChronydServer(Chronyd):
    """chronyd as an NTS server on one address, with free ports and a clock that it vouches for."""

    def __init__(
        self,
        directory: Path,
        pair: Pair,
        *,
        package: Package = CHRONY,
        address: str = "127.0.0.1",
        stratum: int = 10,
        rotation_s: int = 604800,
    ) -> None:
        self.address = address
        self.ke_port, self.ntp_port = free_port(address), free_port(address)
        self._keys = directory / "ntskeys"
        super().__init__(
            directory,
            _CHRONY_SERVER.format(
                address=address,
                ke_port=self.ke_port,
                ntp_port=self.ntp_port,
                pair=pair,
                directory=directory,
                stratum=stratum,
                rotation_s=rotation_s,
            ),
            package,
        )

    def forget_keys(self) -> None:
        self._keys.unlink()

    def rotate_keys(self) -> None:
        """It has no command for that: give it a short `rotation_s`; two old keys are kept."""
        _wait_for_change(self._keys, "chronyd has a new key")

    def take_certificate(self) -> None:
        """Start it anew: chronyd reads its certificate only once."""
        self.stop()
        self.start()


class ChronydClient(Chronyd):
    """chronyd as an NTS client of one server, trusting one root; `poll` is log2 of seconds.

    With `address`, the server's name leads there (root only, else chronyd finds itself to be root).
    """

    def __init__(
        self,
        directory: Path,
        root: Path,
        server: str,
        ke_port: int,
        *,
        package: Package = CHRONY,
        poll: int = -2,
        address: str | None = None,
    ) -> None:
        super().__init__(
            directory, _CHRONY_CLIENT.format(server=server, ke_port=ke_port, root=root, poll=poll), package
        )
        if address is not None:
            self.process.argv = with_hosts(directory, self.process.argv, {server: address})

    def cookies(self) -> int:
        authdata = self.report("authdata")
        return int(authdata[0][8]) if authdata else 0

    def is_served(self) -> bool:
        sources = self.report("sources")
        return bool(sources) and sources[0][1] == "*" and _reached(int(sources[0][5], 8))


_NTPD_RS_SERVER = """\
[observability]
log-level = "info"
observation-path = "{directory}/observe"
[synchronization]
local-stratum = {stratum}
[[server]]
listen = "{address}:{ntp_port}"
[[nts-ke-server]]
listen = "{address}:{ke_port}"
certificate-chain-path = "{pair.cert}"
private-key-path = "{pair.key}"
ntp-port = {ntp_port}
[keyset]
key-storage-path = "{directory}/keys"
key-rotation-interval = {rotation_s}
"""

_NTPD_RS_CLIENT = """\
[observability]
log-level = "info"
observation-path = "{directory}/observe"
[source-defaults]
poll-interval-limits = {{ min = 0, max = 0 }}
initial-poll-interval = 0
[synchronization]
minimum-agreeing-sources = 1
[[source]]
mode = "nts"
address = "{server}:{ke_port}"
certificate-authority = "{root}"
"""
_LENGTH = struct.Struct(">Q")


class _NtpDaemon:
    """ntpd-rs's ntp-daemon, observed over a socket in its directory."""

    def __init__(self, directory: Path, configuration: str, package: Package) -> None:
        # It refuses a directory for its keys that others may enter.
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory = directory
        self._observe = directory / "observe"
        config = directory / "ntp.toml"
        config.write_text(configuration)
        argv = [*NO_CLOCK, *STILL_CLOCK, *package.command("usr/bin/ntp-daemon"), "-c", str(config)]
        self.process = Process("ntp-daemon", argv, directory)

    def start(self) -> Self:
        self._observe.unlink(missing_ok=True)
        self.process.start(self._is_ready)
        return self

    def stop(self) -> None:
        self.process.stop()

    def observed(self) -> dict[str, Any]:
        """What the daemon says of itself; empty while it does not answer."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_REPORT_DEADLINE)
            try:
                connection.connect(str(self._observe))
            except (FileNotFoundError, ConnectionRefusedError):
                return {}
            with connection.makefile("rb") as answer:
                (length,) = _LENGTH.unpack(answer.read(_LENGTH.size))
                document: dict[str, Any] = json.loads(answer.read(length))
                return document

    def _is_ready(self) -> bool:
        return bool(self.observed())

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


class NtpdRsServer(_NtpDaemon):
    """ntpd-rs as an NTS server on one address. It never calls itself synchronised, having no source (leap 3)."""

    def __init__(
        self,
        directory: Path,
        pair: Pair,
        *,
        package: Package = NTPD_RS_TRIXIE,
        address: str = "127.0.0.1",
        stratum: int = 10,
        rotation_s: int = 86400,
    ) -> None:
        self.address = address
        self.ke_port, self.ntp_port = free_port(address), free_port(address)
        self._keys = directory / "keys"
        host = f"[{address}]" if ":" in address else address
        super().__init__(
            directory,
            _NTPD_RS_SERVER.format(
                address=host,
                ke_port=self.ke_port,
                ntp_port=self.ntp_port,
                pair=pair,
                directory=directory,
                stratum=stratum,
                rotation_s=rotation_s,
            ),
            package,
        )

    def forget_keys(self) -> None:
        self._keys.unlink()

    def rotate_keys(self) -> None:
        """It has no command for that: give it a short `rotation_s`; seven old keys are kept."""
        _wait_for_change(self._keys, "ntpd-rs has a new key")

    def take_certificate(self) -> None:
        self.stop()
        self.start()

    def _is_ready(self) -> bool:
        if not super()._is_ready() or not self._keys.exists():
            return False
        try:
            socket.create_connection((self.address, self.ke_port), _REPORT_DEADLINE).close()
        except ConnectionRefusedError:
            return False
        return True


class NtpdRsClient(_NtpDaemon):
    """ntpd-rs as an NTS client of one server, whose name leads to `address`; it polls every second."""

    def __init__(
        self,
        directory: Path,
        root: Path,
        server: str,
        ke_port: int,
        *,
        address: str,
        package: Package = NTPD_RS_TRIXIE,
    ) -> None:
        super().__init__(
            directory,
            _NTPD_RS_CLIENT.format(directory=directory, server=server, ke_port=ke_port, root=root),
            package,
        )
        self.process.argv = with_hosts(directory, self.process.argv, {server: address})

    def cookies(self) -> int:
        return int(self._source().get("nts_cookies") or 0)

    def is_served(self) -> bool:
        source = self._source()
        return bool(source) and source["unanswered_polls"] == 0 and self.observed()["system"]["stratum"] < 16

    def _source(self) -> dict[str, Any]:
        sources = self.observed().get("sources") or [{}]
        source: dict[str, Any] = sources[0]
        return source


# The kernel gives a fresh namespace a loopback interface that is down.
_NAMESPACE = (
    "unshare",
    "--user",
    "--map-root-user",
    "--net",
    "sh",
    "-c",
    'ip link set lo up && exec "$@"',
    "sh",
)
_HOLDER = str(_HERE / "namespace_holder.py")


class Namespace:
    """A network of its own with nothing but loopback. It needs no rights, and has no power over the clock."""

    def __init__(self, directory: Path) -> None:
        self._socket = directory / "sockets"
        self.process = Process(
            "namespace", [*_NAMESPACE, sys.executable, _HOLDER, str(self._socket)], directory
        )

    def inside(self) -> Sequence[str]:
        """The beginning of a command line that runs in this network."""
        return ("nsenter", "--user", "--preserve-credentials", "--net", f"--target={self.process.pid}", "--")

    def socket(self, kind: socket.SocketKind) -> socket.socket:
        """A fresh IPv4 socket of this network, for use by this process."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.settimeout(_REPORT_DEADLINE)
            asking.connect(str(self._socket))
            asking.sendall(bytes([kind]))
            _, descriptors, _, _ = socket.recv_fds(asking, 1, 1)
        return socket.socket(fileno=descriptors[0])

    def _answers(self) -> bool:
        try:
            self.socket(socket.SOCK_DGRAM).close()
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True

    def __enter__(self) -> Self:
        self.process.start(self._answers)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stop()


_NTPSEC_SERVER = """\
driftfile {directory}/drift
statsdir {directory}/
tos orphan {stratum} orphanwait 1 minsane 1 minclock 1
restrict default
restrict 127.0.0.1
restrict ::1
limit average 1000
nts enable
nts cert {pair.cert}
nts key {pair.key}
nts cookie {cookies}
"""
_NTPSEC_CLIENT = """\
driftfile {directory}/drift
statsdir {directory}/
tos minsane 1 minclock 1
restrict 127.0.0.1
server {server} nts ca {root} aead {aead} minpoll 0 maxpoll 0
"""
_NTPSEC_AEADS = {15: "AES_SIV_CMAC_256", 16: "AES_SIV_CMAC_384", 17: "AES_SIV_CMAC_512"}
_MODE_6 = struct.Struct(">BBHHHHH")
_READ_STATUS, _READ_VARIABLES = 1, 2


class _NtpsecNtpd(ABC):
    """NTPsec's ntpd in a network namespace that is there already, since it knows no ports but 123 and, as a server, 4460."""

    def __init__(self, directory: Path, configuration: str, namespace: Namespace) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.namespace = namespace
        config = directory / "ntp.conf"
        config.write_text(configuration)
        ntpd = [*NO_CLOCK, *NTPSEC.command("usr/sbin/ntpd"), "-n", "-c", str(config)]
        self.process = Process("ntpd", [*namespace.inside(), *ntpd], directory, env=library_environment())

    def start(self) -> Self:
        self.process.start(self._is_ready)
        return self

    def stop(self) -> None:
        self.process.stop()

    def ask(self, request: bytes) -> bytes:
        """One datagram's answer by ntpd; empty when there is none."""
        with self.namespace.socket(socket.SOCK_DGRAM) as udp:
            udp.settimeout(1.0)
            udp.connect(("127.0.0.1", 123))
            try:
                udp.send(request)
                return udp.recv(4096)
            except (TimeoutError, ConnectionRefusedError):
                return b""

    @abstractmethod
    def _is_ready(self) -> bool: ...

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


class NtpsecServer(_NtpsecNtpd):
    """ntpd as an NTS server on 127.0.0.1 and ::1 of a namespace."""

    address = "127.0.0.1"
    ke_port = 4460
    ntp_port = 123

    def __init__(self, directory: Path, pair: Pair, namespace: Namespace, *, stratum: int = 10) -> None:
        self._stratum = stratum
        self._cookies = directory / "cookies"
        self._starts = 0
        super().__init__(
            directory,
            _NTPSEC_SERVER.format(directory=directory, pair=pair, stratum=stratum, cookies=self._cookies),
            namespace,
        )

    def forget_keys(self) -> None:
        self._cookies.unlink()

    def rotate_keys(self) -> None:
        """Write what ntpd's daily timer would, which cannot be hurried: a new key before the old ones."""
        self.stop()
        lines = self._cookies.read_text().splitlines()
        fresh = [f"I: {secrets.randbits(32)}", f"K: {secrets.token_hex(32)}"]
        self._cookies.write_text("\n".join([*lines[:2], *fresh, *lines[2:], ""]))
        self.start()

    def take_certificate(self) -> None:
        loaded = self.process.output().count("Private Key OK")
        self.process.signal(signal.SIGHUP)
        wait_until(
            lambda: self.process.output().count("Private Key OK") > loaded, "ntpd has loaded its certificate"
        )

    def start(self) -> Self:
        """Start and wait until ntpd gives out cookies and calls its clock synchronised."""
        self._starts += 1
        return super().start()

    def _is_ready(self) -> bool:
        if self.process.output().count("Private Key OK") < self._starts:
            return False
        return self.ask(bytes([0x23]) + bytes(47))[1:2] == bytes([self._stratum])


class NtpsecClient(_NtpsecNtpd):
    """ntpd as an NTS client of the server on port 4460 of `localhost` in its namespace.

    It offers exactly the one AEAD that it is configured with, and polls every two seconds at best.
    """

    def __init__(self, directory: Path, root: Path, namespace: Namespace, *, aead: int = 15) -> None:
        super().__init__(
            directory,
            _NTPSEC_CLIENT.format(
                directory=directory, root=root, server="localhost", aead=_NTPSEC_AEADS[aead]
            ),
            namespace,
        )

    def cookies(self) -> int:
        return int(self._variables("ntscookies").get("ntscookies", 0))

    def is_served(self) -> bool:
        return _reached(int(self._variables("reach").get("reach", "0"), 0))

    def _is_ready(self) -> bool:
        return bool(self._control(_READ_STATUS))

    def _variables(self, *names: str) -> dict[str, str]:
        """Variables of the first association by mode 6 (RFC 9327); empty before there is one."""
        associations = self._control(_READ_STATUS)
        if len(associations) < 4:
            return {}
        association = int.from_bytes(associations[:2])
        text = self._control(_READ_VARIABLES, association, ",".join(names).encode()).decode()
        pairs = (item.partition("=") for item in text.split(","))
        return {name.strip(): value.strip() for name, _, value in pairs}

    def _control(self, operation: int, association: int = 0, data: bytes = b"") -> bytes:
        header = _MODE_6.pack(0x16, operation, 1, 0, association, 0, len(data))
        answer = self.ask(header + data + bytes(-len(data) % 4))
        if len(answer) < _MODE_6.size:
            return b""
        length = _MODE_6.unpack_from(answer)[6]
        return answer[_MODE_6.size : _MODE_6.size + length]
