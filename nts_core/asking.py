"""The time daemons of this host, asked by their own tools (I/O): chronyc, mode 6 of NTP, ntpd-rs's socket.

chronyd is asked with its own `chronyc`, whose CSV reports are made for programs; ntpd by NTP mode 6 (RFC 9327), which
classic ntpd and NTPsec both answer; ntpd-rs by the socket that its configuration names. Whoever answers is not trusted
to be well: every answer has a bound and a deadline.
"""

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

# chronyc gives up by itself before our deadline ends it: one that is killed leaves its socket behind.
_CHRONYC = ("-c", "-m", "timeout 400", "retries 0")
_CHRONYC_DEADLINE = 2.0
# A row of `ntpdata` has some 300 characters; a host with a hundred sources has room.
_CHRONYC_LIMIT = 64 * 1024
_NTPD_DEADLINE = 1.0
# RFC 9327 section 2: version 2, mode 6; then the opcode and the bits of an answer.
_CONTROL = struct.Struct("!BBHHHHH")
_CONTROL_FIRST, _MODE_CONTROL = 0x16, 6
_READ_STATUS, _READ_VARIABLES, _RESPONSE, _ERROR, _MORE = 1, 2, 0x80, 0x40, 0x20
_CONTROL_LIMIT, _MAX_FRAGMENTS, _MAX_DATAGRAM = 16 * 1024, 64, 2048
# In a list of associations: its id and its status word.
_ASSOCIATION = struct.Struct("!HH")
_OBSERVED_DEADLINE = 2.0
_OBSERVED_LIMIT = 1024 * 1024
_LENGTH = struct.Struct("!Q")


class Unanswered(Exception):
    """Why there is no answer, or none that can be used, in words for a status line."""


# chronyd


async def ask_chronyc(*reports: str, where: Sequence[str] = (), names: bool = False) -> str:
    """Reports of chronyd as CSV, one after the other. Raises Unanswered.

    `where` are options of chronyc; without them it knows the place. With `names` sources are called as in chronyd's
    configuration, else by their addresses.
    """
    program = shutil.which("chronyc")
    if program is None:
        raise Unanswered("chronyd: no chronyc on the PATH")
    output = await _output(program, *where, "-N" if names else "-n", *_CHRONYC, *reports)
    return output.decode("ascii", "replace")


async def _output(program: str, *arguments: str) -> bytes:
    """What the program prints, whatever its exit status then: one refused report does not spoil the other."""
    try:
        child = await asyncio.create_subprocess_exec(
            program,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        raise Unanswered(f"chronyd: chronyc does not start: {error.strerror}") from None
    assert child.stdout is not None
    output = bytearray()
    try:
        async with asyncio.timeout(_CHRONYC_DEADLINE):
            while chunk := await child.stdout.read(_CHRONYC_LIMIT):
                output += chunk
                if len(output) > _CHRONYC_LIMIT:
                    raise Unanswered("chronyd: chronyc answers too much")
            await child.wait()
    except TimeoutError:
        raise Unanswered("chronyd: chronyc does not end") from None
    finally:
        if child.returncode is None:
            # The whole session, or a descendant could hold the pipe open for ever.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            # asyncio closes the pipe when it has seen its end.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CHRONYC_DEADLINE):
                    while await child.stdout.read(_CHRONYC_LIMIT):
                        pass
                    await child.wait()
    if child.returncode and not output:
        raise Unanswered("chronyd: chronyc says nothing")
    return bytes(output)


# ntpd


@contextlib.asynccontextmanager
async def asking_ntpd(address: str = "127.0.0.1", port: int = 123) -> AsyncIterator[socket.socket]:
    """A socket that is good for a second. Raises Unanswered when what is done with it takes longer or fails."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    place = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    try:
        async with asyncio.timeout(_NTPD_DEADLINE):
            with socket.socket(family, socket.SOCK_DGRAM) as udp:
                udp.setblocking(False)
                # Connected: only datagrams from there come in.
                udp.connect((address, port))
                yield udp
    except TimeoutError:
        raise Unanswered(f"ntpd: no answer from {place}") from None
    except OSError as error:
        raise Unanswered(f"ntpd: {place}: {error.strerror}") from None


async def read_variables(udp: socket.socket, association: int, names: Sequence[str] = ()) -> dict[str, str]:
    """Variables of the system (association 0) or of one peer, all or these.

    Raises Unanswered, also when there is one that ntpd does not know.
    """
    octets = await _read(udp, _READ_VARIABLES, association, ",".join(names).encode("ascii"))
    return parse_variables(octets.decode("ascii", "replace"))


async def read_associations(udp: socket.socket) -> dict[int, int]:
    """The status word of each association, by its id (RFC 9327 section 3). Raises Unanswered."""
    octets = await _read(udp, _READ_STATUS, 0)
    if len(octets) % _ASSOCIATION.size:
        raise Unanswered("ntpd: its answer is not well-formed")
    return dict(_ASSOCIATION.iter_unpack(octets))


async def _read(udp: socket.socket, operation: int, association: int, wanted: bytes = b"") -> bytes:
    """One answer, from as many datagrams as it comes in."""
    loop = asyncio.get_running_loop()
    sequence = secrets.randbelow(1 << 16)
    request = _CONTROL.pack(_CONTROL_FIRST, operation, sequence, 0, association, 0, len(wanted))
    # In whole words (RFC 9327 section 2).
    await loop.sock_sendall(udp, request + wanted + bytes(-len(wanted) % 4))
    answer = _Answer(operation, sequence, association)
    for _ in range(_MAX_FRAGMENTS):
        octets = answer.add(await loop.sock_recv(udp, _MAX_DATAGRAM))
        if octets is not None:
            return octets
    raise Unanswered("ntpd: its answer has no end")


class _Answer:
    """The fragments of one mode 6 answer; they may come in any order."""

    def __init__(self, operation: int, sequence: int, association: int) -> None:
        self._asked = (_MODE_CONTROL, _RESPONSE | operation, sequence, association)
        self._parts: dict[int, bytes] = {}
        self._end: int | None = None

    def add(self, datagram: bytes) -> bytes | None:
        """All of it once it is whole; other datagrams than fragments of this answer are left out."""
        if len(datagram) < _CONTROL.size:
            return None
        first, operation, sequence, status, association, offset, count = _CONTROL.unpack_from(datagram)
        if (first & 7, operation & 0x9F, sequence, association) != self._asked:
            return None
        if operation & _ERROR:
            raise Unanswered(f"ntpd: refuses with error {status >> 8}")
        data = datagram[_CONTROL.size : _CONTROL.size + count]
        if len(data) < count or offset + count > _CONTROL_LIMIT:
            raise Unanswered("ntpd: its answer is not well-formed")
        self._parts[offset] = data
        if not operation & _MORE:
            self._end = offset + count
        whole = bytearray()
        while len(whole) in self._parts and (part := self._parts[len(whole)]):
            whole += part
        return bytes(whole) if len(whole) == self._end else None


def parse_variables(text: str) -> dict[str, str]:
    """`name=value, name="quoted, value"`, as mode 6 writes them (RFC 9327 section 4), with quotes removed."""
    found = {}
    for item in re.findall(r'(?:[^,"]|"[^"]*")+', text):
        name, _, value = item.partition("=")
        found[name.strip()] = value.strip().strip('"')
    return found


# ntpd-rs


async def ask_ntpd_rs(place: Path) -> bytes:
    """The JSON document of its observation socket. Raises Unanswered."""
    try:
        async with asyncio.timeout(_OBSERVED_DEADLINE):
            return await _observed(place)
    except TimeoutError:
        raise Unanswered(f"ntpd-rs: no answer from {place}") from None
    except OSError as error:
        raise Unanswered(f"ntpd-rs: {place}: {error.strerror}") from None
    except asyncio.IncompleteReadError:
        raise Unanswered("ntpd-rs: its answer is cut short") from None


async def _observed(place: Path) -> bytes:
    """One document, its length before it."""
    reader, writer = await asyncio.open_unix_connection(place)
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > _OBSERVED_LIMIT:
            raise Unanswered("ntpd-rs: it answers too much")
        return await reader.readexactly(length)
    finally:
        writer.transport.abort()
