"""The process that alone holds the account's key, and what it does not do whoever asks.

`poolsvc serve` starts it as its child, with one end of a socket pair as standard input; it ends when that ends. Or
`poolsvc acme serve` listens on a socket of the file system, as another user than the rest of the registry. A worker
that was taken over can then order, end and revoke what the pool could order, and nothing else: not the key, no
certificate for another name, no signature for another host than the CA's.
"""

import asyncio
import os
import pwd
import resource
import signal
import socket
import stat
import struct
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from grp import getgrnam
from pathlib import Path
from typing import Any, Self

import structlog
from pydantic import TypeAdapter

from nts_core.acme import TLS_SERVER, AcmeAccount, AcmeConfig, AcmeError, Challenge
from nts_core.certificates import ChainError, CsrError, check_csr, csr_name
from nts_core.errors import printable
from nts_core.shell import configure_logging
from poolsvc.acme_wire import CALL_DEADLINE, LINE_LIMIT, OPEN, TABLE, Answer, Refusal, Request
from poolsvc.config import AUTO_PROFILE, AuthoritySettings, Settings
from poolsvc.errors import PoolError
from poolsvc.names import is_label

MAX_CALLS = 64  # of one connection under way; the next is read when one has ended
# In all, and of one user: none who may call keeps the others out.
MAX_CONNECTIONS, MAX_CONNECTIONS_OF_USER = 128, 32
MAX_AUTHORIZED = 1024  # orders of `authorize` that are remembered
_WRITING = 10.0
_PEER = struct.Struct("iII")
_log = structlog.get_logger()


class SocketUnusable(PoolError):
    """`ca.socket` cannot be listened on, or not safely."""

    code = "socket-unusable"


def account_of(ca: AuthoritySettings) -> AcmeConfig:
    """Our account at a CA, as the settings describe it."""
    return AcmeConfig(
        directory_url=ca.directory_url,
        account_key_file=ca.account_key_file,
        binding_key_id=ca.binding_key_id,
        binding_key_file=ca.binding_key_file,
        contact=ca.contact,
        ca_file=ca.ca_file,
        profile=TLS_SERVER if ca.profile == AUTO_PROFILE else ca.profile,
    )


@dataclass(frozen=True, slots=True)
class Charge:
    """All that the process knows: one CA, with the files of our keys there, and what it may order for."""

    ca: AcmeConfig
    servers_domain: str
    web_host: str | None
    dns_01: bool

    @classmethod
    def of(cls, settings: Settings, ca: AuthoritySettings) -> Self:
        is_for_web = settings.web_tls.acme and ca.name == settings.ca.name
        web_host = settings.web_host if is_for_web else None
        return cls(account_of(ca), settings.servers_domain, web_host, settings.policy.dns_01)

    def has_name(self, domain: str) -> bool:
        """Whether it is a server's name, or the registry's own."""
        return self.has_server(domain) or domain == self.web_host

    def has_server(self, domain: str) -> bool:
        """Whether it is a server's name, in the zone that the registry writes."""
        label, _, parent = domain.partition(".")
        return parent == self.servers_domain and is_label(label) and label.islower()


def _check_order(charge: Charge, arguments: Mapping[str, Any]) -> None:
    """The account itself checks the request: this name alone, and not for the account's own key."""
    challenge = arguments["challenge"]
    if challenge is Challenge.HTTP_01:
        _check_name(charge, arguments["domain"])
    elif challenge is Challenge.TLS_ALPN_01 or charge.dns_01:
        _check_server(charge, arguments)
    else:
        raise AcmeError("refused", "this pool orders nothing by DNS-01 (policy.dns_01)", permanent=True)


def _check_server(charge: Charge, arguments: Mapping[str, Any]) -> None:
    if not charge.has_server(domain := arguments["domain"]):
        raise AcmeError("refused", f"{printable(domain)} is not a server of this pool", permanent=True)


def _check_request(charge: Charge, arguments: Mapping[str, Any]) -> None:
    """What is finalized has to be what could have been ordered."""
    domain = csr_name(arguments["csr_pem"])
    _check_name(charge, domain)
    check_csr(arguments["csr_pem"], domain)


def _check_name(charge: Charge, domain: str) -> None:
    if not charge.has_name(domain):
        raise AcmeError("refused", f"{printable(domain)} is not a name of this pool", permanent=True)


def _leave_to_account(_charge: Charge, _arguments: Mapping[str, Any]) -> None:
    """It asks no other host than the CA, which knows what is ours."""


# Every call there is. One that is not here is none.
RULES: Mapping[str, Callable[[Charge, Mapping[str, Any]], None]] = {
    "read_directory": _leave_to_account,
    "renewal_info": _leave_to_account,
    "order": _check_order,
    "authorize": _check_server,
    "answer": _leave_to_account,
    "poll": _leave_to_account,
    "finalize": _check_request,
    "download": _leave_to_account,
    "deactivate_authorization": _leave_to_account,
    "revoke": _leave_to_account,
}


class Custodian:
    """The account, shared by all connections."""

    def __init__(self, charge: Charge) -> None:
        self._charge = charge
        self._account: AcmeAccount | None = None
        self._unfinished: dict[
            str, None
        ] = {}  # orders of `authorize`, of which no certificate comes; in order
        self._opening = asyncio.Lock()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the calls of one connection until it ends, or brings what is no call."""
        slots = asyncio.Semaphore(MAX_CALLS)
        answering: set[asyncio.Task[None]] = set()
        try:
            while line := await reader.readline():
                request = Request.read(line)
                work = self._prepare(request)
                await slots.acquire()
                task = asyncio.create_task(self._answer(request, work, writer))
                answering.add(task)
                task.add_done_callback(answering.discard)
                task.add_done_callback(lambda _: slots.release())
        except ValueError:  # too long, no document, no call; what it says may be a secret sent astray
            _log.warning("acme_connection_refused", reason="not a call")
        except OSError as error:
            _log.warning("acme_connection_broken", error=type(error).__name__)
        finally:
            for task in answering:
                task.cancel()
            writer.transport.abort()

    def _prepare(self, request: Request) -> Callable[[], Coroutine[Any, Any, Any]]:
        """The work of a call; ValueError when there is no such call, or none with such arguments."""
        if request.call == OPEN and not request.arguments:
            return self._open
        rule = RULES.get(request.call)
        if rule is None:
            raise ValueError("no such call")
        return partial(self._perform, rule, request.call, TABLE[request.call].read(request.arguments))

    async def _answer(
        self, request: Request, work: Callable[[], Coroutine[Any, Any, Any]], writer: asyncio.StreamWriter
    ) -> None:
        result, refusal = None, None
        try:
            async with asyncio.timeout(CALL_DEADLINE):
                result = await work()
        except (AcmeError, CsrError, ChainError) as error:
            refusal = Refusal.of(error)
        except TimeoutError:
            refusal = Refusal.of(AcmeError("unreachable", f"no answer within {CALL_DEADLINE:g} s"))
        except Exception as error:  # noqa: BLE001 - a task's root: one call must not end the others
            _log.error("acme_call_failed", call=request.call, exc_info=error)
            refusal = Refusal.of(AcmeError("server-error", f"{request.call}: {type(error).__name__}"))
        lost = self._account is not None and self._account.lost
        line = Answer(id=request.id, lost=lost, result=result, refusal=refusal).line()
        try:
            writer.write(line)
            async with asyncio.timeout(_WRITING):
                await writer.drain()
        except (OSError, TimeoutError):
            writer.transport.abort()

    async def _open(self) -> str:
        """The account's URI. One that the CA has lost is made anew."""
        async with self._opening:
            if self._account is None or self._account.lost:
                account = await AcmeAccount.open(self._charge.ca)
                if self._account is not None:
                    self._account.close()
                self._account = account
            return self._account.uri

    async def _perform(
        self, rule: Callable[[Charge, Mapping[str, Any]], None], call: str, arguments: dict[str, Any]
    ) -> Any:
        try:
            rule(self._charge, arguments)
        except (AcmeError, CsrError) as error:
            _log.warning("acme_call_refused", call=call, reason=str(error))
            raise
        if self._account is None:
            raise AcmeError("unreachable", "the account is not open")
        if call == "finalize" and arguments["order_url"] in self._unfinished:
            raise AcmeError("refused", "the order is there to prove control of a name alone", permanent=True)
        result = await getattr(self._account, call)(**arguments)
        if call == "authorize":
            self._unfinished[result.url] = None
            if len(self._unfinished) > MAX_AUTHORIZED:
                del self._unfinished[next(iter(self._unfinished))]
        return TABLE[call].result.dump_python(result, mode="json")


def _forget_on_crash() -> None:
    """No key in a file that a crash leaves behind."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end(listened: Path | None = None) -> None:
    """At once: a call under way is repeated, as after a crash, and need not be waited for."""
    if listened is not None:
        listened.unlink(missing_ok=True)
    sys.stderr.flush()
    os._exit(0)


async def _serve_parent() -> None:
    sock = socket.socket(fileno=os.dup(0))
    reader, writer = await asyncio.open_unix_connection(sock=sock, limit=LINE_LIMIT)
    if line := await reader.readline():  # empty: the parent ended as soon as it had begun
        charge = TypeAdapter(Charge).validate_json(line)
        await Custodian(charge).serve(reader, writer)
    _end()


def main() -> None:
    """The child of `poolsvc serve`: by standard input come its charge, in the first line, and its calls."""
    configure_logging()
    _forget_on_crash()
    # A signal for the whole group is the parent's to answer: steps under way need this process until it ends.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    asyncio.run(_serve_parent())


def serve(settings: Settings, ca: AuthoritySettings) -> None:
    """Listen on the CA's `socket` until SIGTERM. Raises SocketUnusable."""
    assert ca.socket is not None
    _forget_on_crash()
    group = _group(ca.socket_group)
    sock = _bind(ca.socket, group)
    asyncio.run(_listen(Charge.of(settings, ca), sock, group))


async def _listen(charge: Charge, sock: socket.socket, group: int | None) -> None:
    custodian, peers = Custodian(charge), Counter[int]()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pid, uid, gid = _peer(writer)
        is_full = peers.total() >= MAX_CONNECTIONS or peers[uid] >= MAX_CONNECTIONS_OF_USER
        if is_full or not _may_call(uid, gid, group):
            _log.warning("acme_peer_refused", pid=pid, uid=uid, connections=peers[uid])
            writer.transport.abort()
            return
        peers[uid] += 1
        try:
            await custodian.serve(reader, writer)
        finally:
            peers[uid] -= 1

    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    path = Path(sock.getsockname())
    await asyncio.start_unix_server(accept, sock=sock, limit=LINE_LIMIT)
    _log.info("acme_process_listens", socket=str(path))
    await stopping.wait()
    _end(path)


def _peer(writer: asyncio.StreamWriter) -> tuple[int, int, int]:
    """Process, user and group of whoever connected, as the kernel says."""
    octets = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    pid, uid, gid = _PEER.unpack(octets)
    return pid, uid, gid


def _may_call(uid: int, gid: int, group: int | None) -> bool:
    """Our own user, and those of the group that the settings name."""
    if uid == os.geteuid():
        return True
    try:
        return group is not None and group in os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
    except KeyError:  # a user without a name is in its own group alone
        return gid == group


def _group(name: str | None) -> int | None:
    try:
        return None if name is None else getgrnam(name).gr_gid
    except KeyError:
        raise SocketUnusable(
            f"ca.socket_group: there is no group {name}",
            remedy="make it, or name another",
            field="ca.socket_group",
        ) from None


def _bind(path: Path, group: int | None) -> socket.socket:
    """A socket for our user alone, and for the group if there is one."""
    with ExitStack() as stack:
        try:
            path.parent.mkdir(mode=0o750, exist_ok=True)
            _check_directory(path.parent)
            _remove_left_over(path)
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            mask = os.umask(0o177)
            try:
                sock.bind(str(path))
            finally:
                os.umask(mask)
            if group is not None:
                os.chown(path, -1, group)
                path.chmod(0o660)
        except OSError as error:
            raise SocketUnusable(
                f"ca.socket: {path}: {error.strerror or error}",
                remedy="name a place in a directory of this user's, and a group of its",
                field="ca.socket",
            ) from None
        stack.pop_all()
        return sock


def is_open_to_others(directory: Path, uid: int) -> bool:
    """Whether others than a user and root could put a socket of their own in the place of that user's."""
    status = directory.stat()
    return status.st_uid not in (0, uid) or bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _check_directory(path: Path) -> None:
    if is_open_to_others(path, os.geteuid()):
        raise SocketUnusable(
            f"ca.socket: others may write to {path}",
            remedy=f"chmod go-w {path}, and let it belong to this user or to root",
            field="ca.socket",
        )


def _remove_left_over(path: Path) -> None:
    """The socket of a process that was killed; not one that answers."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise SocketUnusable(
                f"ca.socket: {path} is there and is no socket", remedy="remove it", field="ca.socket"
            )
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
                return
        raise SocketUnusable(
            f"ca.socket: another process listens on {path}", remedy="end that one first", field="ca.socket"
        )


if __name__ == "__main__":
    main()
