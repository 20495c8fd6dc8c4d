"""The sockets of the embedded server: datagrams in batches, connections under deadlines, news to the secondaries."""

import asyncio
import random
import secrets
import socket
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass

import dns.asyncquery
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdatatype
import dns.tsig
import structlog

from nts_core.acceptor import Acceptor
from nts_core.ratelimit import Slots
from nts_core.shell import affordable_connections
from poolsvc.nameserver import records
from poolsvc.nameserver.exchange import Exchange, Peer
from poolsvc.nameserver.primary import Primary
from poolsvc.nameserver.responder import Malformed, Other, Responder
from poolsvc.nameserver.store import StoreUnusable

_log = structlog.get_logger()
# Datagrams of one socket before everybody else gets a turn.
_BATCH = 64
_LARGEST_DATAGRAM = 4096
_BUFFER = 4 * 1024 * 1024
# Updates, signed questions and the like that came by UDP and are under way.
_OTHERS = 32
# Seconds: until the first octet of a message, for its rest, and for a peer to take a reply.
_IDLE, _IDLE_WHEN_CROWDED, _READING, _WRITING = 10.0, 2.0, 5.0, 15.0
_CONNECTIONS, _PER_ADDRESS, _PER_PREFIX = 400, 40, 160
_RESERVED_DESCRIPTORS = 64
# For all replies to one message, of which a transfer has many.
_EXCHANGE = 900.0
_NOTIFY_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
_NOTIFY_PAUSE = 30.0
_MAINTAIN = 1.0
_ASK_PARENT = 60.0
_ASKING = 5.0


@dataclass(frozen=True, slots=True)
class Secondary:
    """Who is told of changes."""

    address: str
    port: int
    key: dns.tsig.Key


@dataclass(frozen=True, slots=True)
class Terms:
    """What the server is told besides its zone; `parents` are servers of the parent zone, address and port."""

    peers: Sequence[Peer]
    secondaries: Sequence[Secondary]
    parents: Sequence[tuple[str, int]]
    responses_per_second: float
    responses_at_once: int


class NameServer:
    """Serves one zone on sockets that are bound already."""

    def __init__(self, primary: Primary, terms: Terms) -> None:
        self._primary = primary
        self._terms = terms
        self.responder = Responder(
            primary.answers,
            secrets.token_bytes,
            responses_per_second=terms.responses_per_second,
            responses_at_once=terms.responses_at_once,
            uniform=random.random,
        )
        self._exchange = Exchange(primary, self.responder, terms.peers, time.time)
        self._slots = Slots(
            affordable_connections(_CONNECTIONS, _RESERVED_DESCRIPTORS),
            per_address=_PER_ADDRESS,
            per_prefix=_PER_PREFIX,
        )
        self._acceptor = Acceptor(self._slots.take, self._begin, self.counters)
        self._tasks: set[asyncio.Task[None]] = set()
        self._others = 0

    @property
    def counters(self) -> Counter[str]:
        return self.responder.counters

    async def run(self, datagrams: Iterable[socket.socket], listening: Iterable[socket.socket]) -> None:
        """Serve until cancelled; closes the sockets."""
        loop = asyncio.get_running_loop()
        datagrams = list(datagrams)
        try:
            for sock in datagrams:
                sock.setblocking(False)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
                loop.add_reader(sock, self._receive, sock)
            for sock in listening:
                self._acceptor.listen(sock)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._maintain())
                if self._terms.parents:
                    group.create_task(self._ask_parents())
                for secondary in self._terms.secondaries:
                    group.create_task(self._notify(secondary))
        finally:
            for sock in datagrams:
                loop.remove_reader(sock)
                sock.close()
            self._acceptor.close()
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _receive(self, sock: socket.socket) -> None:
        """A batch at a time: one datagram in each turn of the loop would be a quarter of the rate."""
        is_ipv4, reply_to = sock.family == socket.AF_INET, self.responder.over_udp
        now, monotonic = int(time.time()), time.monotonic_ns()
        for _ in range(_BATCH):
            try:
                message, peer = sock.recvfrom(_LARGEST_DATAGRAM)
            except BlockingIOError:
                return
            except OSError:  # what an earlier reply met on its way
                continue
            host = peer[0]
            address = (
                socket.inet_aton(host)
                if is_ipv4
                else socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
            )
            try:
                reply = reply_to(message, address, now, monotonic)
            except Other:
                self._take_other(sock, message, peer, address, monotonic)
                continue
            if reply is not None:
                # A full buffer loses a datagram, as a network does.
                with suppress(OSError):
                    sock.sendto(reply, peer)

    def _take_other(
        self, sock: socket.socket, message: bytes, peer: tuple[str, int], address: bytes, monotonic: int
    ) -> None:
        if self._others >= _OTHERS or not self.responder.may_ask(address, monotonic):
            self.counters["limited"] += 1
            return
        self._others += 1
        self._spawn(self._answer_other(sock, message, peer, address))

    async def _answer_other(
        self, sock: socket.socket, message: bytes, peer: tuple[str, int], address: bytes
    ) -> None:
        try:
            async for reply in self._exchange.replies(message, address, over_udp=True):
                with suppress(OSError):
                    sock.sendto(reply, peer)
        except Malformed:
            with suppress(OSError):
                sock.sendto(self.responder.refuse(message, dns.rcode.FORMERR), peer)
        finally:
            self._others -= 1

    def _spawn(self, work: "asyncio._CoroutineLike[None]") -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        """What one peer has brought about is told, and ends nothing else."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("dns_peer_failed", exc_info=error)

    def _begin(self, connection: socket.socket, address: bytes, _listener: socket.socket) -> None:
        self._spawn(self._attend(connection, address))

    async def _attend(self, connection: socket.socket, address: bytes) -> None:
        try:
            try:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                reader, writer = await asyncio.open_connection(sock=connection, limit=2**16 + 2)
            except BaseException:
                connection.close()
                raise
            try:
                await self._converse(reader, writer, address)
            finally:
                # Not close(), which waits for a peer that never reads, without a slot and without a deadline.
                writer.transport.abort()
        except (OSError, EOFError, TimeoutError, Malformed):
            self.counters["connection-ended"] += 1
        finally:
            self._slots.give_back(address)

    async def _converse(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: bytes
    ) -> None:
        """Message after message (RFC 7766), until the peer ends, errs, or lets us wait."""
        while True:
            is_crowded = self._slots.taken > self._slots.total // 2
            async with asyncio.timeout(_IDLE_WHEN_CROWDED if is_crowded else _IDLE):
                first = await reader.read(1)
            if not first:
                return
            async with asyncio.timeout(_READING):
                size = int.from_bytes(first + await reader.readexactly(1), "big")
                message = await reader.readexactly(size)
            try:
                await self._write(writer, self.responder.reply(message, address, int(time.time())))
            except Other:
                async with (
                    asyncio.timeout(_EXCHANGE),
                    aclosing(self._exchange.replies(message, address)) as replies,
                ):
                    async for reply in replies:
                        await self._write(writer, reply)

    async def _write(self, writer: asyncio.StreamWriter, reply: bytes) -> None:
        self.counters["tcp"] += 1
        writer.write(len(reply).to_bytes(2, "big") + reply)
        async with asyncio.timeout(_WRITING):
            await writer.drain()
        # None of this waits as long as there is something to read and room to write; everybody else does.
        await asyncio.sleep(0)

    async def _maintain(self) -> None:
        while True:
            is_more = False
            try:
                is_more = await self._primary.maintain(int(time.time()))
            except (OSError, sqlite3.Error, StoreUnusable) as error:  # a full disk, a key that cannot be read
                _log.error("zone_not_maintained", exc_info=error)
            await asyncio.sleep(0 if is_more else _MAINTAIN)

    async def _notify(self, secondary: Secondary) -> None:
        """Tell a secondary of each new edition until it has heard (RFC 1996)."""
        while True:
            serial = self._primary.zone.serial
            if await self._tell(secondary):
                await self._primary.wait_for_other(serial)
            else:
                _log.warning("secondary_does_not_hear", secondary=f"{secondary.address}:{secondary.port}")
                await asyncio.sleep(_NOTIFY_PAUSE)

    async def _tell(self, secondary: Secondary) -> bool:
        """Whether it heard."""
        for wait in _NOTIFY_WAITS:
            message = dns.message.make_query(records.from_wire(self._primary.zone.apex), dns.rdatatype.SOA)
            message.set_opcode(dns.opcode.NOTIFY)
            message.flags = dns.flags.Flag(dns.flags.AA | dns.opcode.to_flags(dns.opcode.NOTIFY))
            message.use_tsig(secondary.key)
            try:
                answer = await dns.asyncquery.udp(
                    message, secondary.address, wait, secondary.port, ignore_unexpected=True
                )
            except (OSError, EOFError, dns.exception.DNSException):
                self.counters["notify-unheard"] += 1
            else:
                _heed_cancellation()
                if answer.rcode() == dns.rcode.NOERROR:
                    self.counters["notify"] += 1
                    return True
                self.counters["notify-refused"] += 1
                await asyncio.sleep(wait)
        return False

    async def _ask_parents(self) -> None:
        """While a roll-over waits for the parent: whether all its servers name the active key, and no other."""
        while True:
            if self._primary.awaits_parent:
                found = [await self._ask_parent(*parent) for parent in self._terms.parents]
                _heed_cancellation()
                if all(found):
                    await self._primary.note_ds(int(time.time()))
            await asyncio.sleep(min(_ASK_PARENT, self._primary.ds_ttl))

    async def _ask_parent(self, address: str, port: int) -> bool:
        apex = records.from_wire(self._primary.zone.apex)
        query = dns.message.make_query(apex, dns.rdatatype.DS, flags=0)
        try:
            answer, _ = await dns.asyncquery.udp_with_fallback(query, address, _ASKING, port)
        except (OSError, EOFError, dns.exception.DNSException) as error:
            _log.warning("parent_does_not_answer", parent=address, error=type(error).__name__)
            return False
        ds = [
            records.canonical(rdata)
            for rrset in answer.answer
            if rrset.rdtype == dns.rdatatype.DS and rrset.name == apex
            for rdata in rrset
        ]
        return bool(ds) and bool(answer.flags & dns.flags.AA) and all(map(self._primary.is_named, ds))


def _heed_cancellation() -> None:
    """The library waits by `wait_for`, which (3.11) forgets a cancellation that comes together with a reply."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
