"""A volunteer's host in a directory: a time daemon laid out as Debian does, and what systemd is to it.

The daemon starts as its unit and the drop-ins beside it say, and is told to restart or to reload by a command, the
setting `engine.reload`. It can break: then it does not come back.
"""

import os
import pwd
import re
import shlex
import signal
import socketserver
import sys
import threading
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self
from unittest.mock import patch

from cryptography.hazmat.primitives.asymmetric import ec

from lab.certificates import Authority
from lab.internet import Host
from lab.peers import (
    CHRONY,
    NO_CLOCK,
    NTPD_RS_TRIXIE,
    NTPSEC,
    STILL_CLOCK,
    Namespace,
    Package,
    library_environment,
)
from lab.processes import Process, free_port
from member_agent.engines.layout import DROP_IN, Kind
from member_agent.install import InstalledPair, load_pair
from member_agent.sockets import Endpoint

_TELL = """
import socket, sys
with socket.socket(socket.AF_UNIX) as manager:
    manager.connect(sys.argv[1])
    manager.sendall(sys.argv[2].encode() + b"\\n")
    sys.exit(int(manager.recv(1) or b"1"))
"""


class Volunteer(ABC):
    """One host with one daemon, which runs between `start` and `stop`."""

    kind: ClassVar[Kind]
    unit: ClassVar[str]

    def __init__(
        self, directory: Path, package: Package, places: tuple[Endpoint, Endpoint] | None = None
    ) -> None:
        """`places` are those of NTS-KE and NTP."""
        self.directory = directory
        self.package = package
        self.units = directory / "etc/systemd/system"
        self.var = directory / "var"
        for place in (self.config, self.units):
            place.mkdir(parents=True)
        # Daemons refuse directories for their keys that others may enter.
        self.var.mkdir(mode=0o700)
        self.is_broken = False
        self.told: list[str] = []
        self.ke, self.ntp = places or self._endpoints()
        for path, text in self._own_files().items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self.process: Process | None = None
        self.log = directory / f"{self.kind}.log"
        self._manager = _Manager(directory / "manager", self._tell)

    @property
    @abstractmethod
    def config(self) -> Path:
        """The daemon's own directory."""

    @abstractmethod
    def _own_files(self) -> dict[Path, str]:
        """The user's configuration."""

    @abstractmethod
    def _command(self) -> list[str]:
        """As its unit says now."""

    def _endpoints(self) -> tuple[Endpoint, Endpoint]:
        return Endpoint("127.0.0.1", free_port()), Endpoint("127.0.0.1", free_port())

    def user(self) -> str:
        """As whom the daemon runs."""
        return pwd.getpwuid(os.geteuid()).pw_name

    def settings(self, **more: Any) -> dict[str, Any]:
        """The table `engine` of the agent's settings."""
        return {
            "kind": self.kind.value,
            "config_dir": str(self.config),
            "unit_dir": str(self.units),
            "state_dir": str(self.directory / "state-of-daemon"),
            "user": self.user(),
            "reload": [sys.executable, "-I", "-S", "-c", _TELL, str(self._manager.path)],
            "log": str(self.log),
            "deadline": 20,
            **more,
        }

    def tree(self) -> dict[str, tuple[int, bytes]]:
        """Everything below /etc, with its rights and what it holds."""
        etc = self.directory / "etc"
        return {
            str(path.relative_to(etc)): (path.stat().st_mode, path.read_bytes() if path.is_file() else b"")
            for path in sorted(etc.rglob("*"))
        }

    def drop_in(self) -> str:
        """What the unit gets from us; empty without."""
        file = self.units / f"{self.unit}.d" / DROP_IN
        return file.read_text() if file.exists() else ""

    def restart(self) -> None:
        """As a boot does it, with what is on the disk."""
        if self.process is not None:
            self.process.stop()
        environment = {} if self.package.is_newer else library_environment()
        self.process = Process(str(self.kind), self._command(), self.directory, env=environment).start()

    def _tell(self, word: str) -> bool:
        self.told.append(word)
        if self.is_broken:
            if self.process is not None:
                self.process.stop()
            return False
        if word == "reload" and self.process is not None:
            self.process.signal(signal.SIGHUP)
        else:
            self.restart()
        return True

    def start(self) -> Self:
        self._manager.start()
        self.restart()
        return self

    def stop(self) -> None:
        self._manager.stop()
        if self.process is not None:
            self.process.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


_CHRONY = """\
confdir {config}/conf.d
bindaddress {ntp.address}
port {ntp.port}
cmdport 0
bindcmdaddress {var}/socket
pidfile {var}/pid
ntsdumpdir {var}
dumpdir {var}/dump
local stratum 10
"""


class ChronyVolunteer(Volunteer):
    kind = Kind.CHRONY
    unit = "chrony.service"

    def __init__(
        self,
        directory: Path,
        package: Package = CHRONY,
        places: tuple[Endpoint, Endpoint] | None = None,
        *,
        host: Host | None = None,
        own: str = "",
    ) -> None:
        """On that host, with `own` lines of its user."""
        self._host, self._own = host, own
        super().__init__(directory, package, places)

    @property
    def config(self) -> Path:
        return self.directory / "etc/chrony"

    def _own_files(self) -> dict[Path, str]:
        return {
            self.config / "chrony.conf": self._chrony_conf(),
            self.config / "conf.d/README": "Files found here with the .conf suffix are parsed.\n",
            self.directory / "etc/default/chrony": 'DAEMON_OPTS="-F 0"\n',
        }

    def _chrony_conf(self) -> str:
        return _CHRONY.format(config=self.config, ntp=self.ntp, var=self.var) + self._own

    def change(self, own: str) -> None:
        """Its user writes other lines of their own, and restarts it."""
        self._own = own
        (self.config / "chrony.conf").write_text(self._chrony_conf())
        self.restart()

    def options(self) -> list[str]:
        """DAEMON_OPTS: the last file of environment that names it wins."""
        files = [self.directory / "etc/default/chrony"]
        files += map(Path, re.findall("^EnvironmentFile=(.*)$", self.drop_in(), re.MULTILINE))
        told = [line for file in files for line in file.read_text().splitlines()]
        (words,) = shlex.split([line for line in told if line.startswith("DAEMON_OPTS=")][-1])
        return words.removeprefix("DAEMON_OPTS=").split()

    def _command(self) -> list[str]:
        program = self.package.command("usr/sbin/chronyd")
        argv = [*program, "-x", "-d", "-f", str(self.config / "chrony.conf"), *self.options()]
        argv += ["-u", self.user()]
        argv = argv if self._host is None else [*self._host.inside(), *argv]
        return [*NO_CLOCK, *argv] if os.geteuid() == 0 else [*argv, "-U"]


_NTPD_RS = """\
[observability]
log-level = "info"
[synchronization]
local-stratum = 10
"""


class NtpdRsVolunteer(Volunteer):
    kind = Kind.NTPD_RS
    unit = "ntpd-rs.service"

    def __init__(
        self,
        directory: Path,
        package: Package = NTPD_RS_TRIXIE,
        places: tuple[Endpoint, Endpoint] | None = None,
    ) -> None:
        super().__init__(directory, package, places)

    @property
    def config(self) -> Path:
        return self.directory / "etc/ntpd-rs"

    def _own_files(self) -> dict[Path, str]:
        return {self.config / "ntp.toml": _NTPD_RS}

    def _command(self) -> list[str]:
        chosen = re.findall("^ExecStart=/usr/bin/ntp-daemon -c (.+)$", self.drop_in(), re.MULTILINE)
        file = chosen[-1] if chosen else str(self.config / "ntp.toml")
        return [*NO_CLOCK, *STILL_CLOCK, *self.package.command("usr/bin/ntp-daemon"), "-c", file]


_NTPSEC = """\
driftfile {var}/drift
nts cookie {var}/nts-keys
restrict default kod nomodify noquery
restrict 127.0.0.1
restrict ::1
"""


class NtpsecVolunteer(Volunteer):
    """In a network namespace that is there already: ntpd serves on ports 123 and 4460 only.

    It never learns the time there, as a host's after a restart does not for a while, unless its user's own lines say so.
    """

    kind = Kind.NTPSEC
    unit = "ntpsec.service"

    def __init__(self, directory: Path, namespace: Namespace | Host, own: str = "") -> None:
        self.namespace, self._own = namespace, own
        super().__init__(directory, NTPSEC)

    def _endpoints(self) -> tuple[Endpoint, Endpoint]:
        return Endpoint("127.0.0.1", 4460), Endpoint("127.0.0.1", 123)

    def user(self) -> str:
        """Whoever started it is root in the namespace."""
        return "root"

    @property
    def config(self) -> Path:
        return self.directory / "etc/ntpsec"

    def _own_files(self) -> dict[Path, str]:
        return {self.config / "ntp.conf": _NTPSEC.format(var=self.var) + self._own}

    def _command(self) -> list[str]:
        program = self.package.command("usr/sbin/ntpd")
        return [*self.namespace.inside(), *NO_CLOCK, *program, "-n", "-c", str(self.config / "ntp.conf")]


class Pairs:
    """Issues pairs, each into files of its own."""

    def __init__(self, directory: Path) -> None:
        self._authority = Authority(directory)
        self._count = 0

    def issue(self, name: str) -> InstalledPair:
        self._count += 1
        pair = self._authority.issue(name, file=f"{name}-{self._count}")
        return load_pair(pair.cert, pair.key)

    def useless(self, name: str) -> InstalledPair:
        """A pair that belongs together, of a curve that TLS does not know."""
        make = ec.generate_private_key
        with patch.object(ec, "generate_private_key", lambda _: make(ec.SECP256K1())):
            return self.issue(name)


class _Manager:
    """Takes words over a socket, and says 0 or 1."""

    def __init__(self, path: Path, tell: Any) -> None:
        self.path = path

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                word = self.rfile.readline().decode().strip()
                self.wfile.write(b"0" if tell(word) else b"1")

        self._handler = Handler

    def start(self) -> None:
        self.path.unlink(missing_ok=True)
        self._server = socketserver.UnixStreamServer(str(self.path), self._handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
