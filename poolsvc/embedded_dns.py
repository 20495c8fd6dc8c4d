"""The embedded server as a process of its own, by the registry's settings.

`poolsvc serve` starts it as its child. The sockets are the parent's: a mistake in them is told at the start, and questions
that come while a child that ended is replaced wait in them for the next one. The child ends with its parent. With
`dns.embedded.own_process` it is `poolsvc dns serve` instead, which outlives restarts of the registry.
"""

import asyncio
import errno
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Self

import dns.name
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.tsig
import structlog
from pydantic import BaseModel, ConfigDict

from nts_core import acceptor
from nts_core.children import keep_running, wait_or_kill
from nts_core.shell import configure_logging, make_file, raise_descriptor_limit
from poolsvc.config import DnsSettings, EmbeddedDnsSettings, Settings, bare_environment, split_endpoint
from poolsvc.errors import PoolError
from poolsvc.nameserver import records
from poolsvc.nameserver.exchange import Peer, Right
from poolsvc.nameserver.keys import SigningKey
from poolsvc.nameserver.primary import Apex, Primary, rrset
from poolsvc.nameserver.server import NameServer, Secondary, Terms
from poolsvc.nameserver.store import Store, StoreUnusable
from poolsvc.primary import new_secret, read_secret
from poolsvc.zone import CLOSED

_log = structlog.get_logger()
# For the sockets of a registry that was killed to be free again, and for an IPv6 address of a host that boots.
_BINDING, _BINDING_AGAIN = 15.0, 0.05
_PASSING = (errno.EADDRINUSE, errno.EADDRNOTAVAIL)
_CHARGE = 15.0
_LEAST_SECRET = 16
_OF_SECONDARIES = "dns.embedded.secondaries.tsig_secret_file"
_KEYMGR = 30.0
_UNUSABLE = 3


class DnsUnusable(PoolError):
    """The embedded server cannot be started as the settings have it."""

    code = "dns-unusable"


@dataclass(frozen=True, slots=True)
class Sockets:
    """For UDP and for TCP, bound to the same places."""

    datagrams: Sequence[socket.socket]
    streams: Sequence[socket.socket]

    @property
    def descriptors(self) -> tuple[int, ...]:
        return tuple(sock.fileno() for sock in (*self.datagrams, *self.streams))


class Charge(BaseModel):
    """All that the server's process knows of the settings."""

    model_config = ConfigDict(frozen=True)

    pool: str
    dns: DnsSettings

    @classmethod
    def of(cls, settings: Settings) -> Self:
        return cls(pool=settings.pool, dns=settings.dns)

    @property
    def embedded(self) -> EmbeddedDnsSettings:
        assert self.dns.embedded is not None, "the settings have a primary of their own"
        return self.dns.embedded

    @property
    def zone(self) -> records.Name:
        return records.to_wire(dns.name.from_text(self.pool))

    def prepare(self) -> None:
        """Make the directory, and the publisher's secret if there is none. Raises DnsUnusable."""
        directory, file = self.embedded.directory, self.dns.tsig_secret_file
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not file.exists():
                make_file(file, f"{new_secret()}\n".encode())
        except OSError as error:
            raise DnsUnusable(
                f"dns.embedded.directory: {directory}: {error.strerror}",
                remedy="give a directory that this user may make or write to",
                field="dns.embedded.directory",
            ) from None

    @property
    def apex(self) -> Apex:
        embedded = self.embedded
        named = {f"{each.name}.": [str(one) for one in each.addresses] for each in embedded.nameservers}
        here = [split_endpoint(endpoint)[0] for endpoint in self.dns.nameservers]
        return Apex(
            name=self.zone,
            nameservers=named or {f"ns1.{self.pool}.": here},
            ttl=embedded.ttl,
            negative_ttl=embedded.negative_ttl,
            longest_ttl=max(self.dns.srv_ttl, self.dns.address_ttl),
            ds_ttl=embedded.ds_ttl,
            margin=embedded.margin,
            seed={(self.zone, int(dns.rdatatype.CAA)): rrset(embedded.ttl, "CAA", CLOSED)},
        )

    def terms(self) -> Terms:
        """Raises DnsUnusable."""
        embedded = self.embedded
        publisher = _key(
            self.dns.tsig_name, self.dns.tsig_secret_file, self.dns.tsig_algorithm, "dns.tsig_secret_file"
        )
        peers, secondaries = [Peer(publisher, frozenset(Right))], []
        for each in embedded.secondaries:
            key = _key(each.tsig_name, each.tsig_secret_file, each.tsig_algorithm, _OF_SECONDARIES)
            peers.append(Peer(key, frozenset({Right.TRANSFER}), signs=each.signs))
            secondaries.append(Secondary(*split_endpoint(each.address), key))
        return Terms(
            peers=peers,
            secondaries=secondaries,
            parents=[split_endpoint(text) for text in embedded.parents],
            responses_per_second=embedded.responses_per_second,
            responses_at_once=embedded.responses_at_once,
        )


def _key(name: str, file: Path, algorithm: str, field: str) -> dns.tsig.Key:
    try:
        return dns.tsig.Key(name, read_secret(file, _LEAST_SECRET), algorithm)
    except (OSError, ValueError) as error:
        raise DnsUnusable(
            f"{field}: {error}", remedy="give a readable file with the key's base64 secret", field=field
        ) from None


def bind(charge: Charge) -> Sockets:
    """The sockets of `dns.embedded.listen`. Raises DnsUnusable."""
    deadline = time.monotonic() + _BINDING
    while True:
        try:
            return _bind_all(charge.embedded.listen)
        except DnsUnusable as error:
            passes = isinstance(error.__cause__, OSError) and error.__cause__.errno in _PASSING
            if not passes or time.monotonic() > deadline:
                raise
        time.sleep(_BINDING_AGAIN)


def _bind_all(endpoints: Sequence[str]) -> Sockets:
    with ExitStack() as stack:
        found: dict[socket.SocketKind, list[socket.socket]] = {socket.SOCK_DGRAM: [], socket.SOCK_STREAM: []}
        for endpoint, kind in product(endpoints, found):
            try:
                sock = acceptor.bind(*split_endpoint(endpoint), kind)
            except OSError as error:
                raise DnsUnusable(
                    f"dns.embedded.listen {endpoint}: {os.strerror(error.errno or 0)}",
                    remedy="choose another address or port, or end what listens there; ports below 1024 need"
                    " AmbientCapabilities=CAP_NET_BIND_SERVICE, as the unit of `poolsvc init` has it",
                    field="dns.embedded.listen",
                ) from error
            found[kind].append(stack.enter_context(sock))
        stack.pop_all()
        return Sockets(found[socket.SOCK_DGRAM], found[socket.SOCK_STREAM])


class Child:
    """The server as a child of the registry, started again when it ends."""

    def __init__(self, charge: Charge, sockets: Sockets) -> None:
        self._charge = charge
        self._sockets = sockets

    async def run(self) -> None:
        """Until cancelled, then the child has its time to end."""
        await keep_running(self._run_once, _note_end)

    async def _run_once(self) -> int:
        try:
            return await self._run_one()
        except (OSError, DnsUnusable) as error:
            _log.error("dns_server_not_started", reason=str(error))
            return -1

    async def _run_one(self) -> int:
        self._charge.prepare()
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                ours.sendall(self._charge.model_dump_json().encode() + b"\n")
                child = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", "poolsvc.embedded_dns"),
                    str(len(self._sockets.datagrams)),
                    *map(str, self._sockets.descriptors),
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    pass_fds=self._sockets.descriptors,
                    env=bare_environment(),
                )
            try:
                return await child.wait()
            except asyncio.CancelledError:
                ours.close()
                await wait_or_kill(child)
                raise


def _note_end(status: int, next_in: float) -> None:
    _log.error("dns_server_ended", status=status, next_in=next_in)


def serve(charge: Charge) -> None:
    """Serve in this process until SIGTERM. Raises DnsUnusable."""
    charge.prepare()
    asyncio.run(_serve(charge, bind(charge), parent=None))


async def _serve(charge: Charge, sockets: Sockets, parent: socket.socket | None) -> None:
    """Until a signal, or until the parent has ended. Raises DnsUnusable."""
    terms = charge.terms()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    if parent is not None:
        loop.add_reader(parent, stopping.set)  # which says nothing more, and so is readable at its end
    else:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
    try:
        primary = await Primary.open(charge.embedded.directory, charge.apex, int(time.time()))
    except StoreUnusable as error:
        raise DnsUnusable(f"dns.embedded.directory: {error}", field="dns.embedded.directory") from None
    # The zone is no garbage: a collection that looks at all of it would hold answers up, for some 100 ms of 10,000 members.
    gc.freeze()
    server = NameServer(primary, terms)
    work = asyncio.create_task(server.run(sockets.datagrams, sockets.streams))
    end = asyncio.create_task(stopping.wait())
    _log.info("dns_serves", zone=charge.pool, serial=primary.zone.serial, names=len(primary.zone))
    await asyncio.wait({work, end}, return_when=asyncio.FIRST_COMPLETED)
    is_fault = work.done()
    for task in (work, end):
        task.cancel()
    await asyncio.gather(work, end, return_exceptions=True)
    await primary.close()
    _log.info("dns_served", **server.counters)
    if is_fault:
        work.result()


def ds_text(charge: Charge, key: SigningKey) -> str:
    """The DS of a key as the parent's zone file has it."""
    octets = key.ds(charge.zone)
    ds = dns.rdata.from_wire(dns.rdataclass.IN, dns.rdatatype.DS, octets, 0, len(octets))
    return f"{charge.pool}. {charge.embedded.ds_ttl} IN DS {ds.to_text()}"


def copy_to_knot(charge: Charge, store: Store, config: Path) -> int:
    """Import the zone's key into the key database of a Knot on this host; its tag. Raises DnsUnusable."""
    rows = store.key_rows()
    if len(rows) != 1:
        raise DnsUnusable(
            "a roll-over is under way", remedy="wait until there is one key only: poolsvc dns keys list"
        )
    (row,) = rows
    times = [f"{name}={row.since}" for name in ("created", "publish", "ready", "active")]
    command = ["keymgr", "-c", str(config.absolute()), charge.pool, "import-pem", str(store.key_file(row))]
    command += ["algorithm=ecdsap256sha256", "ksk=yes", "zsk=yes", *times]
    try:
        done = subprocess.run(
            command,
            cwd=config.absolute().parent,
            capture_output=True,
            text=True,
            timeout=_KEYMGR,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DnsUnusable(f"keymgr: {error}", remedy="install knot on this host") from None
    if done.returncode:
        raise DnsUnusable(
            f"keymgr: {(done.stderr or done.stdout).strip()[:500]}",
            remedy="run this as a user that may read Knot's configuration and write its key database",
            field="--knot-config",
        )
    return row.key.tag


def _read_charge(sock: socket.socket) -> Charge:
    """The first line that the parent says. Raises OSError, ValueError."""
    sock.settimeout(_CHARGE)
    with sock.makefile("rb", buffering=0) as stream:
        line = b""
        while not line.endswith(b"\n"):
            octets = stream.read(1024)
            if not octets:
                raise ConnectionError("the registry has ended")
            line += octets
    sock.setblocking(False)
    return Charge.model_validate_json(line)


def main() -> None:
    """The child: how many sockets are for UDP, and all sockets; its charge comes by standard input, which ends with the
    parent.
    """
    _, count, *descriptors = sys.argv
    configure_logging()
    raise_descriptor_limit()
    # A signal for the whole group is the parent's to answer.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    sockets = [socket.socket(fileno=int(descriptor)) for descriptor in descriptors]
    parts = Sockets(sockets[: int(count)], sockets[int(count) :])
    parent = socket.socket(fileno=os.dup(0))
    try:
        asyncio.run(_serve(_read_charge(parent), parts, parent))
    except (DnsUnusable, OSError, ValueError) as error:
        _log.error("dns_unusable", reason=str(error))
        sys.exit(_UNUSABLE)


if __name__ == "__main__":
    main()
