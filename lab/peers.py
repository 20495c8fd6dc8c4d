"""Other people's NTS: chrony and NTPsec, from Debian's packages unpacked but never installed.

They lie in `.peers` in the repository's root, or where TRUECHIMER_PEERS says, one directory a package, as
`dpkg-deb -x` leaves them: .peers/chrony/usr/sbin/chronyd, .peers/ntpsec/usr/sbin/ntpd. None of them can set the
clock: chronyd runs with -x, and both without the capability that setting takes.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from lab.certificates import Pair
from lab.processes import LabError, Process, free_port

PEERS_VARIABLE = "TRUECHIMER_PEERS"
_DEFAULT = Path(__file__).resolve().parent.parent / ".peers"
_REPORT_DEADLINE = 10.0
_NO_CLOCK = ("setpriv", "--bounding-set=-sys_time", "--inh-caps=-sys_time")


def peer_program(package: str, path: str) -> str:
    """The path of a program of an unpacked package; LabError with the remedy when it is not there."""
    program = _directory() / package / path
    if not program.is_file():
        raise LabError(f"{program} is missing; run `make setup`, or set {PEERS_VARIABLE}")
    return str(program)


def _directory() -> Path:
    told = os.environ.get(PEERS_VARIABLE)
    return Path(told) if told else _DEFAULT


def _environment() -> dict[str, str]:
    """What lets the programs find shared libraries that were unpacked next to them."""
    unpacked = sorted({str(library.parent) for library in _directory().glob("*/usr/lib/*/*.so.*")})
    inherited = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": ":".join([*unpacked, *([inherited] if inherited else [])])}


def chronyc_environment() -> dict[str, str]:
    """What lets a program find `chronyc` on its PATH."""
    directory = Path(peer_program("chrony", "usr/bin/chronyc")).parent
    return {**_environment(), "PATH": f"{directory}:{os.environ.get('PATH', '')}"}


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

    def __init__(self, directory: Path, configuration: str) -> None:
        # chronyd refuses a directory for its socket that others may enter.
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.socket = directory / "socket"
        config = directory / "chrony.conf"
        config.write_text(configuration + _CHRONY_COMMON.format(directory=directory))
        argv = [peer_program("chrony", "usr/sbin/chronyd"), "-x", "-d", "-f", str(config)]
        argv = [*_NO_CLOCK, *argv, "-u", "root"] if os.geteuid() == 0 else [*argv, "-U"]
        self.process = Process("chronyd", argv, directory, env=_environment())

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
            env={**os.environ, **_environment()},
        )
        if done.returncode:
            return []
        return [line.split(",") for line in done.stdout.splitlines()]

    def chronyc(self, name: str) -> str:
        """The command line that shows a report to a person."""
        return shlex.join([*self._chronyc("-n"), name])

    def _chronyc(self, *options: str) -> list[str]:
        return [peer_program("chrony", "usr/bin/chronyc"), *options, "-h", str(self.socket)]

    def _answers(self) -> bool:
        return self.socket.exists() and bool(self.report("tracking"))

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


class ChronydServer(Chronyd):
    """chronyd as an NTS server on one address, with free ports and a clock that it vouches for."""

    def __init__(self, directory: Path, pair: Pair, *, address: str = "127.0.0.1", stratum: int = 10) -> None:
        self.address = address
        self.ke_port, self.ntp_port = free_port(address), free_port(address)
        super().__init__(
            directory,
            _CHRONY_SERVER.format(
                address=address,
                ke_port=self.ke_port,
                ntp_port=self.ntp_port,
                pair=pair,
                directory=directory,
                stratum=stratum,
            ),
        )


class ChronydClient(Chronyd):
    """chronyd as an NTS client of one server, trusting one root; `poll` is log2 of seconds.

    With `address`, the server's name leads there in a mount namespace of chronyd's own (root only), as a line
    in /etc/hosts would: chronyd has no option for it.
    """

    def __init__(
        self,
        directory: Path,
        root: Path,
        server: str,
        ke_port: int,
        *,
        poll: int = -2,
        address: str | None = None,
    ) -> None:
        super().__init__(
            directory, _CHRONY_CLIENT.format(server=server, ke_port=ke_port, root=root, poll=poll)
        )
        if address is not None:
            hosts = directory / "hosts"
            hosts.write_text(f"127.0.0.1 localhost\n{address} {server}\n")
            command = (
                f"mount --bind {shlex.quote(str(hosts))} /etc/hosts && exec {shlex.join(self.process.argv)}"
            )
            self.process.argv = ["unshare", "--mount", "sh", "-c", command]


_NTPSEC = """\
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
nts cookie {directory}/cookies
"""
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
# Prints the stratum of a plain answer; to be run inside the namespace.
_PROBE = """\
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
    udp.settimeout(1)
    udp.sendto(bytes([0x23]) + bytes(47), ("127.0.0.1", 123))
    print(udp.recv(48)[1])
"""


class NtpsecNtpd:
    """NTPsec's ntpd as an NTS server on 127.0.0.1 and ::1 of a network namespace of its own.

    It knows no ports but 123 and 4460, hence the namespace; `inside` is what a command line needs in front
    to run there. Namespaces of a user need no rights, and have no power over the system's clock.
    """

    address = "127.0.0.1"
    ke_port = 4460
    ntp_port = 123

    def __init__(self, directory: Path, pair: Pair, *, stratum: int = 10) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        config = directory / "ntp.conf"
        config.write_text(_NTPSEC.format(directory=directory, pair=pair, stratum=stratum))
        self._stratum = stratum
        ntpd = [peer_program("ntpsec", "usr/sbin/ntpd"), "-n", "-c", str(config)]
        self.process = Process("ntpd", [*_NAMESPACE, *_NO_CLOCK, *ntpd], directory, env=_environment())

    def start(self) -> Self:
        """Start and wait until ntpd gives out cookies and calls its clock synchronised."""
        self.process.start(self._serves)
        return self

    def stop(self) -> None:
        self.process.stop()

    def inside(self) -> Sequence[str]:
        """The beginning of a command line that runs in ntpd's network."""
        return ("nsenter", "--user", "--preserve-credentials", "--net", f"--target={self.process.pid}", "--")

    def _serves(self) -> bool:
        if "Private Key OK" not in self.process.output():
            return False
        asked = subprocess.run(
            [*self.inside(), sys.executable, "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=_REPORT_DEADLINE,
            check=False,
        )
        return asked.stdout.strip() == str(self._stratum)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
