"""A small Internet within a network namespace: hosts in networks of their own, loss and delay between any two of them.

Each host has one address of either family, in a prefix of its own, behind a cable to the namespace of the caller, which
forwards between them and has addresses of its own. What gets lost, nftables draws (`numgen`). What is late, relays of ours
hold back, since not every kernel has netem: NTP packets only, and by IPv4.
"""

import asyncio
import shlex
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from lab.processes import LabError, Process, wait_until
from lab.threads import InThread

_READ = 2048
_MAX_FLOWS = 256
_TABLE = "lab"


def _run(*command: str, text: str | None = None) -> None:
    done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
    if done.returncode:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip()}")


class Host:
    """A network with one host in it, number `index` from 1; programs run there by `inside`.

    `known` is a file of host names that it has in place of /etc/hosts.
    """

    def __init__(self, name: str, index: int, directory: Path, known: Path) -> None:
        self.name = name
        self.index = index
        # No two are in one /20 or /44: a pool wants to be seen from different places.
        self._prefix = f"2001:db8:{16 * index:x}"
        self.address = f"10.{index}.1.2"
        self.gateway = f"10.{index}.1.1"
        self.ipv6_address = f"{self._prefix}::2"
        self.cable = f"lab{index}"
        # It does nothing, and the network ends with it.
        resting = f"mount --bind {shlex.quote(str(known))} /etc/hosts && exec sleep infinity"
        argv = ["unshare", "--net", "--mount", "--", "sh", "-c", resting]
        self._holder = Process(f"host-{name}", argv, directory / "hosts")

    def inside(self) -> Sequence[str]:
        """The beginning of a command line that runs on this host."""
        return ("nsenter", "--net", "--mount", f"--target={self._holder.pid}", "--")

    def start(self) -> None:
        ours = Path("/proc/thread-self/ns/net").readlink()
        holder = self._holder
        holder.start(lambda: Path(f"/proc/{holder.pid}/comm").read_text() == "sleep\n")
        assert Path(f"/proc/{holder.pid}/ns/net").readlink() != ours
        far = f"far{self.index}"
        here = [
            f"link add {self.cable} type veth peer name {far} netns {self._holder.pid}",
            f"addr add {self.gateway}/24 dev {self.cable}",
            f"addr add {self._prefix}::1/48 dev {self.cable} nodad",
            f"link set {self.cable} up",
        ]
        there = [
            "link set lo up",
            f"addr add {self.address}/24 dev {far}",
            f"addr add {self.ipv6_address}/48 dev {far} nodad",
            f"link set {far} up",
            f"route add default via {self.gateway}",
            f"-6 route add default via {self._prefix}::1",
        ]
        for command in here:
            _run("ip", *command.split())
        for command in there:
            _run(*self.inside(), "ip", *command.split())

    def stop(self) -> None:
        self._holder.stop()


@dataclass(frozen=True, slots=True)
class Fault:
    """What becomes of packets from one host to another one; None is everybody."""

    source: Host | None
    target: Host | None
    percent: int  # lost, of so many of 100
    udp_port: int | None = None  # only of those to this port
    ipv6_only: bool = False


class _Late(InThread):
    """Passes on NTP packets, both ways late by so many seconds."""

    def __init__(self, listen: tuple[str, int], target: tuple[str, int], delay: float) -> None:
        super().__init__(f"what is late to {target[0]}")
        self._listen, self._target, self._delay = listen, target, delay
        self._flows: dict[tuple[str, int], socket.socket] = {}

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as near:
            near.setblocking(False)
            near.bind(self._listen)
            loop.add_reader(near, self._from_client, near)
            yield
            loop.remove_reader(near)
        for flow in self._flows.values():
            loop.remove_reader(flow)
            flow.close()

    def _from_client(self, near: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        octets, client = near.recvfrom(_READ)
        flow = self._flows.get(client)
        if flow is None:
            if len(self._flows) >= _MAX_FLOWS:
                oldest = self._flows.pop(next(iter(self._flows)))
                loop.remove_reader(oldest)
                oldest.close()
            flow = self._flows[client] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            flow.setblocking(False)
            flow.connect(self._target)
            loop.add_reader(flow, self._from_server, flow, near, client)
        loop.call_later(self._delay, self._send, flow, octets)

    def _from_server(self, flow: socket.socket, near: socket.socket, client: tuple[str, int]) -> None:
        with suppress(OSError):
            octets = flow.recv(_READ)
            asyncio.get_running_loop().call_later(self._delay, self._send, near, octets, client)

    @staticmethod
    def _send(sock: socket.socket, octets: bytes, to: tuple[str, int] | None = None) -> None:
        # Who has ended meanwhile gets nothing.
        with suppress(OSError):
            if to is None:
                sock.send(octets)
            else:
                sock.sendto(octets, to)


@dataclass
class Internet:
    """A context manager, to be entered in the thread of `lab.namespaces.in_namespace`.

    `names` are addresses by the names that all hosts know.
    """

    directory: Path
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    hosts: list[Host] = field(default_factory=list)
    faults: set[Fault] = field(default_factory=set)
    _late: dict[tuple[str, str, int], int] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        for setting in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            Path(f"/proc/sys/net/{setting}").write_text("1")
        lines = ["127.0.0.1 localhost", "::1 localhost"]
        lines += [f"{address} {name}" for name, some in self.names.items() for address in some]
        (self.directory / "hosts-file").write_text("\n".join([*lines, ""]))
        if shutil.which("nft", path="/usr/sbin:/usr/bin") is None:
            raise LabError("nft is not installed; run `make setup`")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def host(self, name: str) -> Host:
        """Another host, which is reached at once."""
        host = Host(name, len(self.hosts) + 1, self.directory, self.directory / "hosts-file")
        host.start()
        self._stack.callback(host.stop)
        self.hosts.append(host)
        wait_until(lambda: _reaches(host), f"the network of {name}")
        return host

    def break_down(self, *faults: Fault) -> None:
        """From now on, beside those that there are."""
        self.faults |= set(faults)
        self._apply()

    def mend(self, *faults: Fault) -> None:
        """These, or all."""
        self.faults -= set(faults or self.faults)
        self._apply()

    def delay(self, source: Host, target: Host, port: int, seconds: float) -> None:
        """NTP packets of one host to another one's port, and the answers, take so much longer from now on."""
        listen = source.gateway, 20_000 + len(self._late)
        self._stack.enter_context(_Late(listen, (target.address, port), seconds))
        self._late[source.cable, target.address, port] = listen[1]
        self._apply()

    def _apply(self) -> None:
        """All rules at once; those of before are gone in the same moment."""
        lost = "\n".join(map(_rule, sorted(self.faults, key=repr)))
        late = "\n".join(
            f'iifname "{cable}" ip daddr {address} udp dport {port} redirect to :{to}'
            for (cable, address, port), to in self._late.items()
        )
        text = f"""\
table inet {_TABLE}
delete table inet {_TABLE}
table inet {_TABLE} {{
  chain lost {{
    type filter hook prerouting priority -200;
    {lost}
  }}
  chain late {{
    type nat hook prerouting priority -100;
    {late}
  }}
}}
"""
        _run("/usr/sbin/nft", "-f", "-", text=text)


def _rule(fault: Fault) -> str:
    parts = []
    if fault.source is not None:
        parts.append(f'iifname "{fault.source.cable}"')
    if fault.target is not None and not fault.ipv6_only:
        # By whichever family: those by IPv6 have a rule of their own below.
        parts.append(f"ip daddr {fault.target.address}")
    if fault.ipv6_only:
        target = "" if fault.target is None else f"ip6 daddr {fault.target.ipv6_address}"
        parts.append(target or "meta nfproto ipv6")
    if fault.udp_port is not None:
        parts.append(f"udp dport {fault.udp_port}")
    chance = "" if fault.percent >= 100 else f"numgen random mod 100 < {fault.percent} "
    rule = f"{' '.join(parts)} {chance}drop"
    if fault.target is not None and not fault.ipv6_only:
        return f"{rule}\n{rule.replace(f'ip daddr {fault.target.address}', f'ip6 daddr {fault.target.ipv6_address}')}"
    return rule


def _reaches(host: Host) -> bool:
    """Whether a connection to it is refused, and does not hang: there is somebody."""
    for family, address in ((socket.AF_INET, host.address), (socket.AF_INET6, host.ipv6_address)):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.settimeout(0.2)
            try:
                probe.connect((address, 9))
            except ConnectionRefusedError:
                continue
            except OSError:
                return False
    return True
