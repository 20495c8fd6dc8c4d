"""Zone transfers of which a part is wanted: AXFR (RFC 5936) and IXFR (RFC 1995) under TSIG, read from the wire.

A signed zone is mostly RRSIG and NSEC, and objects of a DNS library for each of its records take ten times as long as
the transfer. So records of other types and owners are stepped over, and those that are wanted become text at once, in
the form of `poolsvc.zone.RRset`.

A whole zone is read in a process of its own, since that is a second of work for each 20,000 servers: `whole` starts
this module as a program, which gives back what is wanted. What happened since a serial is small, and `since` reads it
where it is called, message by message. Nothing counts before the transfer's last message and its signature.
"""

import asyncio
import gc
import json
import math
import re
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import Enum, auto
from functools import lru_cache
from typing import Any

import dns.ipv6
import dns.message
import dns.name
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.serial
import dns.tsig

from poolsvc.config import bare_environment
from poolsvc.primary import Conflict, PublishError, Rejected, Unreachable, primary_errors, refusal
from poolsvc.zone import Key, RRset

WHOLE_OCTETS = 1024 * 1024 * 1024  # of a transfer in a process of its own; five million records
STEPS_OCTETS = 32 * 1024 * 1024  # of what happened since a serial
INLINE_OCTETS = 2 * 1024 * 1024  # of a whole zone in place of that
_UNSIGNED = 99  # messages in a row that may go unsigned (RFC 8945 section 5.3.1)
_HOPS = 16  # pointers of one name
_PLAIN = re.compile(rb"[a-z0-9_.-]*")
_HEADER, _RECORD, _SOA_NUMBERS = struct.Struct("!6H"), struct.Struct("!HHIH"), struct.Struct("!5L")
_QR_AND_OPCODE, _ANSWER = 0xF800, 0x8000
_IN = dns.rdataclass.IN
_A, _AAAA, _SRV = dns.rdatatype.A, dns.rdatatype.AAAA, dns.rdatatype.SRV
_SOA, _TSIG = dns.rdatatype.SOA, dns.rdatatype.TSIG
_validate: Any = dns.tsig.validate  # which has no types
_LINE_RECORDS = 1_000  # of the process's answer
_LINE_OCTETS = 4 * 1024 * 1024
_REQUEST_OCTETS = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A zone at its primary, and what of it is wanted: records of `types` at or below `owners`, and at those of
    `names` (absolute, lower-case).

    `timeout` (seconds) is for a connection and for each message. `tsig_secret` is base64.
    """

    address: str
    port: int
    zone: str
    tsig_name: str
    tsig_secret: str = field(repr=False)
    tsig_algorithm: str
    owners: tuple[str, ...]
    types: tuple[str, ...]
    timeout: float
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Soa:
    """Of the zone's SOA what matters here; `minimum` in seconds."""

    serial: int
    minimum: int


@dataclass(frozen=True, slots=True)
class Record:
    """One record that is wanted."""

    owner: str
    rdtype: str
    ttl: int
    text: str


@dataclass(slots=True)
class Step:
    """What one new serial took away, then brought."""

    deleted: list[Record] = field(default_factory=list)
    added: list[Record] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Whole:
    """What is wanted of a whole zone."""

    soa: Soa
    records: dict[Key, RRset]


@dataclass(frozen=True, slots=True)
class Since:
    """What happened to what is wanted since a serial, in order; nothing when the zone is still at it."""

    soa: Soa
    steps: tuple[Step, ...]


class NotIncremental(Exception):
    """What happened since the serial cannot be had this way; the whole zone can."""


class _Phase(Enum):
    BEGIN = auto()
    UNDECIDED = auto()  # asked for changes: the second record tells whether these or the whole zone come
    WHOLE = auto()
    DELETING = auto()
    ADDING = auto()
    DONE = auto()


class Inbound:
    """One transfer as it comes in, message by message; `since` is the serial that changes are asked from.

    Garbage raises Unreachable, a wrong signature Rejected or what dnspython raises, and an answer to `since` that does
    not begin there NotIncremental. What was taken is worth nothing until `take` has said that it was the last.
    """

    def __init__(self, source: Source, since: int | None = None) -> None:
        self._since = since
        self._tsig = dns.tsig.Key(source.tsig_name, source.tsig_secret, source.tsig_algorithm)
        self._zone = source.zone
        self._exact = frozenset(source.owners + source.names)
        self._below = tuple(f".{owner}" for owner in source.owners)
        self._types = {int(dns.rdatatype.from_text(text)): text for text in source.types}
        self._question = dns.message.make_query(source.zone, "AXFR" if since is None else "IXFR", flags=0)
        if since is not None:
            name = dns.name.from_text(source.zone)
            soa = self._question.find_rrset(self._question.authority, name, _IN, _SOA, create=True)
            soa.add(dns.rdata.from_text("IN", "SOA", f". . {since} 0 0 0 0"), 0)
        self._question.use_tsig(self._tsig)
        self.query = self._question.to_wire(prepend_length=True)
        self._signing: Any = None
        self._unsigned = 0
        self._phase = _Phase.BEGIN
        self.is_whole = since is None
        self._first = self._last = (0, 0, 0, 0, 0)
        self._records: dict[Key, tuple[int, set[str]]] = {}
        self._steps: list[Step] = []
        self._names: dict[int, str] = {}

    @property
    def soa(self) -> Soa:
        return Soa(self._first[0], self._first[4])

    @property
    def result(self) -> Whole | Since:
        """What came; good once `take` has said that it was the last message."""
        if not self.is_whole:
            return Since(self.soa, tuple(self._steps))
        return Whole(self.soa, {key: RRset(ttl, frozenset(texts)) for key, (ttl, texts) in self.records()})

    def records(self) -> Iterator[tuple[Key, tuple[int, set[str]]]]:
        """Of a whole zone what is wanted: keys, TTLs and texts."""
        return iter(self._records.items())

    def take(self, wire: bytes) -> bool:
        """Take one message; whether it was the last."""
        try:
            return self._take(wire)
        except (IndexError, struct.error, ValueError) as error:
            raise Unreachable("a message of the transfer is cut off or garbage") from error

    def _take(self, wire: bytes) -> bool:
        identifier, flags, *_ = _HEADER.unpack_from(wire)
        if identifier != self._question.id or flags & _QR_AND_OPCODE != _ANSWER:
            raise Unreachable("not an answer to the transfer's question")
        rcode = dns.rcode.Rcode(flags & 0xF)
        signature = self._read(wire, is_read=rcode == dns.rcode.NOERROR)
        if signature is not None:
            self._verify(wire, signature)
        if self._since is not None and rcode in {dns.rcode.NOTIMP, dns.rcode.FORMERR}:
            raise NotIncremental("the primary has no incremental transfers")
        if rcode != dns.rcode.NOERROR:
            raise refusal(rcode)
        self._check_signed(is_signed=signature is not None, wire=wire)
        return self._phase is _Phase.DONE

    def _read(self, wire: bytes, *, is_read: bool) -> int | None:
        """Walk through a message and take its answers; where its TSIG is, if it has one."""
        _, _, questions, answers, authorities, additionals = _HEADER.unpack_from(wire)
        self._names.clear()
        position = _HEADER.size
        for _ in range(questions):
            position = _after_name(wire, position) + 4
        for _ in range(answers):
            position = self._answer(wire, position, is_read=is_read)
        signature = None
        for _ in range(authorities + additionals):
            start = position
            position, kind = _after_record(wire, position)
            if signature is not None:
                raise Unreachable("records after the TSIG")
            signature = start if kind == _TSIG else None
        if position != len(wire):
            raise Unreachable("octets after the message, or too few")
        return signature

    def _verify(self, wire: bytes, start: int) -> None:
        owner, used = dns.name.from_wire(wire, start)
        *_, length = _RECORD.unpack_from(wire, start + used)
        position = start + used + _RECORD.size
        rdata = dns.rdata.from_wire(dns.rdataclass.ANY, _TSIG, wire, position, length)
        self._signing = _validate(
            wire,
            self._tsig,
            owner,
            rdata,
            int(time.time()),
            self._question.mac,
            start,
            self._signing,
            multi=True,
        )

    def _check_signed(self, *, is_signed: bool, wire: bytes) -> None:
        """The first message and the last one are signed, and of those between enough (RFC 8945 section 5.3.1)."""
        if is_signed:
            self._unsigned = 0
            return
        self._unsigned += 1
        if self._signing is None or self._phase is _Phase.DONE or self._unsigned > _UNSIGNED:
            raise Rejected("the primary's transfer carries no TSIG signature where it must")
        self._signing.update(wire)

    def _answer(self, wire: bytes, start: int, *, is_read: bool) -> int:
        """Take one record of the answer; where the next one begins."""
        position = _after_name(wire, start)
        kind, rdclass, ttl, length = _RECORD.unpack_from(wire, position)
        position += _RECORD.size
        end: int = position + length
        if end > len(wire):
            raise Unreachable("a record is cut off")
        if is_read:
            if self._phase is _Phase.DONE:
                raise Unreachable("records after the zone's last")
            if kind == _SOA:
                if self._owner(wire, start) != self._zone or rdclass != _IN:
                    raise Unreachable("the SOA of another zone")
                self._soa(_SOA_NUMBERS.unpack_from(wire, end - _SOA_NUMBERS.size))
                return end
            if self._phase is _Phase.BEGIN:
                raise Unreachable("a transfer that does not begin with the SOA")
            if self._phase is _Phase.UNDECIDED:
                self._phase, self.is_whole = _Phase.WHOLE, True
            rdtype = self._types.get(kind)
            if rdtype is not None and rdclass == _IN:
                owner = self._owner(wire, start)
                if owner in self._exact or owner.endswith(self._below):
                    self._keep(owner, rdtype, ttl, _text(kind, wire, position, length))
        return end

    def _keep(self, owner: str, rdtype: str, ttl: int, text: str) -> None:
        if self._phase is _Phase.WHOLE:
            known = self._records.get((owner, rdtype))
            if known is None:
                self._records[owner, rdtype] = ttl, {text}
            else:
                known[1].add(text)
                if ttl < known[0]:
                    self._records[owner, rdtype] = ttl, known[1]
            return
        step = self._steps[-1]
        records = step.deleted if self._phase is _Phase.DELETING else step.added
        records.append(Record(owner, rdtype, ttl, text))

    def _soa(self, numbers: tuple[int, int, int, int, int]) -> None:
        """Each SOA of the zone begins or ends something."""
        serial, phase = numbers[0], self._phase
        if phase is _Phase.BEGIN:
            self._first = numbers
            if self._since is None:
                self._phase = _Phase.WHOLE
            elif serial == self._since:
                self._phase = _Phase.DONE
            elif dns.serial.Serial(serial) < dns.serial.Serial(self._since):
                raise NotIncremental(f"the zone has gone back from {self._since} to {serial}")
            else:
                self._phase = _Phase.UNDECIDED
        elif phase is _Phase.WHOLE:
            if numbers != self._first:
                raise Unreachable("the transfer ends with another SOA than it began with")
            self._phase = _Phase.DONE
        elif phase is _Phase.DELETING:
            self._last = numbers
            self._phase = _Phase.ADDING
        elif phase is _Phase.ADDING and numbers == self._last == self._first:
            self._phase = _Phase.DONE
        elif serial == (self._since if phase is _Phase.UNDECIDED else self._last[0]):
            self._steps.append(Step())
            self._phase = _Phase.DELETING
        else:
            raise NotIncremental(f"the changes do not lead on from {self._since}")

    def _owner(self, wire: bytes, start: int) -> str:
        """A record's owner as text, absolute and lower-case."""
        if (known := self._names.get(start)) is not None:
            return known
        labels: list[bytes] = []
        position, least, tail = start, start, "."
        for _ in range(_HOPS):
            while 0 < (size := wire[position]) < 0x40:
                labels.append(wire[position + 1 : position + 1 + size])
                position += size + 1
            if not size:
                break
            position = (size & 0x3F) << 8 | wire[position + 1]
            if position >= least:
                raise Unreachable("a name that points ahead")
            least = position
            if (known := self._names.get(position)) is not None:
                tail = known
                break
        else:
            raise Unreachable("a name of too many pointers")
        raw = b".".join(labels).lower()
        if len(raw) + len(tail) > 255 or _PLAIN.fullmatch(raw) is None or any(b"." in one for one in labels):
            # As the library writes it, and refuses it.
            text = dns.name.from_wire(wire, start)[0].to_text().lower()
        elif not labels:
            text = tail
        else:
            text = f"{raw.decode()}." if tail == "." else f"{raw.decode()}.{tail}"
        self._names[start] = text
        if wire[start] >= 0xC0:
            self._names[(wire[start] & 0x3F) << 8 | wire[start + 1]] = text
        return text


def _after_name(wire: bytes, position: int) -> int:
    while size := wire[position]:
        if size >= 0x40:
            if size < 0xC0:
                raise Unreachable("a label of no known kind")
            return position + 2
        position += size + 1
    return position + 1


def _after_record(wire: bytes, position: int) -> tuple[int, int]:
    """Where a record ends, and its type."""
    position = _after_name(wire, position)
    kind, _, _, length = _RECORD.unpack_from(wire, position)
    end: int = position + _RECORD.size + length
    if end > len(wire):
        raise Unreachable("a record is cut off")
    return end, kind


def _text(kind: int, wire: bytes, position: int, length: int) -> str:
    """A record's data in the canonical form of `RRset`."""
    if kind == _A and length == 4:
        return socket.inet_ntoa(wire[position : position + 4])
    if kind == _AAAA:
        return dns.ipv6.inet_ntoa(wire[position : position + length])
    if kind == _SRV:
        # Its target may be a pointer into the message.
        rdtype = dns.rdatatype.RdataType(kind)
        return dns.rdata.from_wire(_IN, rdtype, wire, position, length).to_text().lower()
    return _text_of(kind, wire[position : position + length])


@lru_cache(maxsize=256)
def _text_of(kind: int, data: bytes) -> str:
    """Of records that many names share, such as CAA."""
    return dns.rdata.from_wire(_IN, dns.rdatatype.RdataType(kind), data, 0, len(data)).to_text()


async def since(source: Source, serial: int) -> Whole | Since:
    """What happened since `serial`, or a small whole zone if the primary has nothing better.

    Raises PublishError, and NotIncremental when only `whole` helps.
    """
    inbound, octets = Inbound(source, serial), 0
    with primary_errors():
        async with asyncio.timeout(source.timeout):
            reader, writer = await asyncio.open_connection(source.address, source.port)
        try:
            writer.write(inbound.query)
            is_last = False
            while not is_last:
                async with asyncio.timeout(source.timeout):
                    size = int.from_bytes(await reader.readexactly(2), "big")
                    message = await reader.readexactly(size)
                octets += size
                is_last = inbound.take(message)
                if octets > (INLINE_OCTETS if inbound.is_whole else STEPS_OCTETS):
                    raise NotIncremental("the changes are as large as the zone")
                # The loop has others to serve while more is there already.
                await asyncio.sleep(0)
        finally:
            writer.close()
    return inbound.result


async def whole(source: Source, deadline: float) -> Whole:
    """What is wanted of the whole zone, read by another process within `deadline` seconds. Raises PublishError."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        __name__,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_LINE_OCTETS,
        env=bare_environment(),
    )
    try:
        async with asyncio.timeout(deadline):
            return await _ask(process, {"source": asdict(source), "deadline": deadline})
    except TimeoutError:
        raise Unreachable(f"the transfer did not end within {deadline:g} s") from None
    except (OSError, ValueError) as error:
        raise Unreachable(f"the transfer's process failed: {type(error).__name__}") from error
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _ask(process: asyncio.subprocess.Process, request: dict[str, Any]) -> Whole:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(request).encode())
    process.stdin.close()
    records: dict[Key, RRset] = {}
    while line := await process.stdout.readline():
        document = json.loads(line)
        if isinstance(document, list):
            for owner, rdtype, ttl, texts in document:
                records[owner, rdtype] = RRset(ttl, frozenset(texts))
            await asyncio.sleep(0)
        elif "error" in document:
            raise _ERRORS[document["error"]](document["text"])
        else:
            return Whole(Soa(**document), records)
    raise Unreachable("the transfer's process ended without a result")


_ERRORS: dict[str, type[PublishError]] = {error.code: error for error in (Rejected, Unreachable, Conflict)}


def _fetch(source: Source) -> Inbound:
    """A whole zone, by sockets that block."""
    inbound, octets = Inbound(source), 0
    with (
        socket.create_connection((source.address, source.port), source.timeout) as connection,
        connection.makefile("rb", buffering=1024 * 1024) as stream,
    ):
        connection.sendall(inbound.query)
        is_last = False
        while not is_last:
            size = int.from_bytes(_exactly(stream, 2), "big")
            octets += size
            if octets > WHOLE_OCTETS:
                raise Rejected(f"the zone has more than {WHOLE_OCTETS} octets")
            is_last = inbound.take(_exactly(stream, size))
    return inbound


def _exactly(stream: Any, size: int) -> bytes:
    octets: bytes = stream.read(size)
    if len(octets) < size:
        raise EOFError("the transfer was cut off")
    return octets


def _answer(request: dict[str, Any]) -> Iterator[object]:
    """The lines that `whole` reads."""
    try:
        with primary_errors():
            inbound = _fetch(Source(**request["source"]))
    except PublishError as error:
        yield {"error": error.code, "text": str(error)}
        return
    lines: list[object] = []
    for (owner, rdtype), (ttl, texts) in inbound.records():
        lines.append([owner, rdtype, ttl, list(texts)])
        if len(lines) == _LINE_RECORDS:
            yield lines
            lines = []
    yield lines
    yield asdict(inbound.soa)


def main() -> None:
    """What `whole` starts: a request on standard input, the answer on standard output."""
    request = json.loads(sys.stdin.buffer.read(_REQUEST_OCTETS))
    # Whatever became of who asked.
    signal.alarm(math.ceil(request["deadline"]) + 1)
    # Millions of objects of which none is garbage before the end.
    gc.disable()
    for line in _answer(request):
        sys.stdout.write(json.dumps(line, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
