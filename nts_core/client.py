"""Asking servers for authenticated time over real sockets (asyncio).

`establish` runs key establishment, `measure` authenticated exchanges; for one server over a longer time see
`nts_core.source`, for a pool `nts_core.pool`. Every wait has a deadline. ICMP errors are not
listened to: anybody can forge them, so only silence counts. Nothing here touches the system clock.
"""

import asyncio
import errno
import os
import secrets
import socket
import ssl
import time
import warnings
from asyncio.staggered import staggered_race
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from ipaddress import ip_address
from itertools import zip_longest
from pathlib import Path

from cryptography import x509
from cryptography.utils import CryptographyDeprecationWarning

from nts_core import select
from nts_core.aead import SUPPORTED, AeadId
from nts_core.association import Association, Plain, Sample
from nts_core.errors import (
    CertificateError,
    KeError,
    KissOfDeath,
    NotAuthentic,
    OutOfCookies,
    TlsError,
    WireError,
)
from nts_core.ke import KeClient, KeResult
from nts_core.kernel import SO_TIMESTAMPNS, receive_time
from nts_core.packet import MAX_DATAGRAM
from nts_core.records import ErrorCode
from nts_core.tls import Pin, TlsChannel, Trust, client_channel

KE_TIMEOUT = 5.0
# Seconds until another address of a server is tried while the last one has not answered (RFC 8305 section 5).
_CONNECTION_DELAY = 0.25
NTP_TIMEOUT = 1.5
_READ = 16 * 1024
# What says nothing of the server that was asked.
OWN_FAULTS = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENETDOWN, errno.ENETUNREACH}
)
# Without a route, without an address of the family, and without the family.
_NO_ROUTE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})
# Kiss codes that tell of the server's own clock and refuse nobody (RFC 5905 section 7.4).
STARTING = frozenset({"INIT", "STEP"})
# Whose the targets are only orders them: it is not waited for as long as an address.
_METADATA_TIMEOUT = 2.0


class Failure(StrEnum):
    """Where it failed, in the order in which things happen."""

    CONFIGURATION = "configuration"
    LOCAL = "local"
    DNS = "dns"
    TCP = "tcp"
    TLS = "tls"
    CERTIFICATE = "certificate"
    KE = "ke"
    NTP = "ntp"
    KISS = "kiss-of-death"
    UNSYNCHRONISED = "unsynchronised"
    CLOCK = "clock"
    TOO_FEW_SOURCES = "too-few-sources"
    DAEMON = "daemon"


_REMEDIES = {
    Failure.LOCAL: "this host itself cannot make connections now: free memory or descriptors, check its network",
    Failure.TCP: "check the address, that the server runs, and that no firewall stops TCP to its NTS-KE port",
    Failure.TLS: "check that the port is an NTS-KE port; it must speak TLS 1.3 with the protocol ntske/1",
    Failure.CERTIFICATE: "check the name, this machine's date, and the trusted roots (--ca)",
    Failure.KE: "the server does not give cookies to us: ask its operator",
    Failure.NTP: "check that UDP reaches the server's NTP port; some networks drop long NTP packets",
    Failure.KISS: "the server does not want to answer us: ask its operator, or use another server",
    Failure.UNSYNCHRONISED: "the server does not know the time itself now: use another one",
}


class ClientError(Exception):
    """A failure with its stage, what happened, and what to do about it.

    `ke_error` is the code of the Error record that key establishment ended with, if it did. `is_silent`: nothing came
    before the deadline. `shown` is the chain that was not acceptable.
    """

    def __init__(
        self,
        code: str,
        message: str,
        remedy: str | None = None,
        *,
        ke_error: int | None = None,
        is_silent: bool = False,
        shown: tuple[x509.Certificate, ...] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.ke_error = ke_error
        self.is_silent = is_silent
        self.shown = shown
        self.remedy = _REMEDIES.get(Failure(code), "") if remedy is None else remedy

    @property
    def is_unacceptable(self) -> bool:
        """Whether a server called our request bad: then it is not to be repeated (RFC 8915 section 4.1.3)."""
        return self.ke_error in {ErrorCode.UNRECOGNIZED_CRITICAL_RECORD, ErrorCode.BAD_REQUEST}


def load_roots(file: Path | None) -> list[x509.Certificate]:
    """The trusted roots: those of a PEM file, else the system's that can be used. Raises ClientError."""
    if file is not None:
        try:
            return x509.load_pem_x509_certificates(file.read_bytes())
        except (OSError, ValueError) as error:
            raise ClientError(
                Failure.CONFIGURATION,
                f"{file} holds no roots: {_strerror(error)}",
                "give a readable file of PEM certificates",
            ) from None
    roots: list[x509.Certificate] = []
    for der in ssl.create_default_context().get_ca_certs(binary_form=True):
        # Some systems carry a root that breaks X.509's rules; it must not take the others with it.
        with suppress(ValueError), warnings.catch_warnings():
            warnings.simplefilter("error", CryptographyDeprecationWarning)
            roots.append(_parse_root(der))
    if not roots:
        raise ClientError(
            Failure.CONFIGURATION,
            "this system has no trusted roots",
            "install ca-certificates, or give a file of roots",
        )
    return roots


def _parse_root(der: bytes) -> x509.Certificate:
    try:
        return x509.load_der_x509_certificate(der)
    except CryptographyDeprecationWarning as warning:
        raise ValueError(str(warning)) from None


@dataclass(frozen=True, slots=True)
class Established:
    """A finished key establishment: what it gave, with whom, and how long it took (nanoseconds).

    `connected` and `secured` are how long it took until the connection stood, and until TLS did.
    """

    result: KeResult
    chain: tuple[x509.Certificate, ...] = field(repr=False)
    address: str
    took: int
    connected: int = 0
    secured: int = 0

    @property
    def ntp_host(self) -> str:
        """Where NTP is served: record 6, else the address that key establishment used."""
        return self.result.endpoint.host or self.address

    @property
    def ntp_port(self) -> int:
        return self.result.endpoint.port


async def establish(
    name: str,
    address: str,
    port: int,
    trust: Trust | Pin,
    *,
    offered: Sequence[AeadId] = SUPPORTED,
    timeout: float = KE_TIMEOUT,
) -> Established:
    """Key establishment with the server `name` at one address. Raises ClientError."""
    return await establish_any(name, [address], port, trust, offered=offered, timeout=timeout)


async def establish_any(
    name: str,
    addresses: list[str],
    port: int,
    trust: Trust | Pin,
    *,
    offered: Sequence[AeadId] = SUPPORTED,
    timeout: float = KE_TIMEOUT,
) -> Established:
    """Key establishment at that one of several addresses of a server which answers first (RFC 8305). Raises ClientError.

    An address is taken out of the list once it has been tried, so that those in it are left for another attempt. TLS is
    begun with one address alone.
    """
    started = time.monotonic_ns()
    stage, place, address = Failure.TCP, _places(addresses, port), ""
    channel: TlsChannel | None = None
    try:
        async with asyncio.timeout(timeout):
            address, reader, writer = await _connect(addresses, port)
            connected = time.monotonic_ns()
            stage, place = Failure.TLS, _join(address, port)
            try:
                channel = client_channel(name, trust)
                result, secured = await _key_exchange(channel, reader, writer, offered)
            finally:
                writer.transport.abort()
    except TimeoutError:
        if stage is Failure.TCP:
            addresses.clear()
        raise ClientError(stage, f"no answer from {place} within {timeout:g} s", is_silent=True) from None
    except OSError as error:
        stage = Failure.LOCAL if is_own_fault(error, address) else stage
        raise ClientError(stage, f"no connection to {place}: {_strerror(error)}") from None
    except CertificateError as error:
        shown = () if channel is None else channel.peer_chain
        raise ClientError(Failure.CERTIFICATE, str(error), shown=shown) from None
    except TlsError as error:
        raise ClientError(Failure.TLS, str(error)) from None
    except KeError as error:
        raise ClientError(Failure.KE, str(error), ke_error=error.code) from None
    except WireError as error:
        raise ClientError(Failure.KE, str(error)) from None
    took = time.monotonic_ns() - started
    return Established(result, channel.peer_chain, address, took, connected - started, secured - started)


def is_own_fault(error: OSError, address: str) -> bool:
    """Whether a failed connection says nothing of the server, since this host lacks something.

    That a network is unreachable may be a router's word, which a server's owner could send for years: it is this host's own
    only where it knows no way there.
    """
    if error.errno != errno.ENETUNREACH:
        return error.errno in OWN_FAULTS
    try:
        return not has_route(address)
    except OSError:
        return True


def has_route(address: str) -> bool:
    """Whether this host knows a way there. Nothing is sent: UDP's connect() only looks for it.

    Raises OSError for want of anything else.
    """
    try:
        with socket.socket(_family(address), socket.SOCK_DGRAM) as udp:
            udp.connect((address, 9))
    except OSError as error:
        if error.errno in _NO_ROUTE:
            return False
        raise
    return True


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ip_address(address).version == 6 else socket.AF_INET


async def _connect(addresses: list[str], port: int) -> tuple[str, asyncio.StreamReader, asyncio.StreamWriter]:
    """The first connection that stands; its address and those that failed are taken out. Raises ClientError."""
    order = _by_turns(addresses)
    opening = [partial(asyncio.open_connection, address, port) for address in order]
    # A race that is cancelled may leave a connection open, so one address runs none.
    winner, index, faults = await (
        staggered_race(opening, _CONNECTION_DELAY) if len(opening) > 1 else _alone(opening[0])
    )
    failed = {order[number]: fault for number, fault in enumerate(faults) if isinstance(fault, OSError)}
    if winner is None or index is None:
        addresses.clear()
        is_ours = all(is_own_fault(fault, address) for address, fault in failed.items())
        told = ", ".join(f"{_join(address, port)}: {_strerror(fault)}" for address, fault in failed.items())
        raise ClientError(Failure.LOCAL if is_ours else Failure.TCP, f"no connection to {told}")
    addresses[:] = [address for address in addresses if address not in {*failed, order[index]}]
    return order[index], *winner


_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _alone(
    opening: Callable[[], Awaitable[_Streams]],
) -> tuple[_Streams | None, int | None, list[Exception | None]]:
    """What `staggered_race` gives for one."""
    try:
        return await opening(), 0, [None]
    except OSError as error:
        return None, None, [error]


def _by_turns(addresses: Sequence[str]) -> list[str]:
    """One family after the other, beginning with that of the first (RFC 8305 section 4)."""
    wanted = ip_address(addresses[0]).version
    ours = [address for address in addresses if ip_address(address).version == wanted]
    others = [address for address in addresses if ip_address(address).version != wanted]
    return [address for pair in zip_longest(ours, others) for address in pair if address is not None]


def _places(addresses: Sequence[str], port: int) -> str:
    return " and ".join(_join(address, port) for address in addresses)


async def _key_exchange(
    channel: TlsChannel,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    offered: Sequence[AeadId] = SUPPORTED,
) -> tuple[KeResult, int]:
    """What the server gives, and when TLS stood, in nanoseconds of the monotonic clock."""
    client = KeClient(channel.export, offered)
    secured: int | None = None
    octets = b""
    while True:
        try:
            plaintext = channel.receive(octets)
            if channel.established and secured is None:
                secured = time.monotonic_ns()
                channel.send(client.request())
            result = client.receive(plaintext) if plaintext else None
        except (KeError, WireError):
            # Each side says that it closes, also over an answer that it cannot use (section 4).
            channel.close()
            raise
        finally:
            # Also on failure: the server then gets the alert that says why.
            writer.write(channel.to_send())
        if result is not None:
            assert secured is not None
            channel.close()
            writer.write(channel.to_send())
            await writer.drain()
            return result, secured
        await writer.drain()
        octets = b"" if channel.closed_by_peer else await reader.read(_READ)
        if not octets:
            raise TlsError("the server closed the connection before it had answered")


async def exchange(
    association: Association | Plain, host: str, port: int, *, timeout: float = NTP_TIMEOUT
) -> Sample:
    """One exchange from a fresh random port (RFC 9109), authenticated if the association is.

    Raises ClientError, KissOfDeath (for NTSN only once the deadline has passed without a proper answer, since
    anybody may forge it) and OutOfCookies.
    """
    hint: KissOfDeath | None = None
    try:
        udp = socket.socket(_family(host), socket.SOCK_DGRAM)
    except OSError as error:
        raise ClientError(Failure.LOCAL, f"no socket: {_strerror(error)}") from None
    with udp:
        udp.setblocking(False)
        udp.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        try:
            request = association.poll()
            sent = time.time_ns()
            udp.sendto(request, (host, port))
            async with asyncio.timeout(timeout):
                while True:
                    datagram, received = await _receive(udp, (host, port))
                    try:
                        return association.receive(datagram, sent=sent, received=received)
                    except KissOfDeath as kiss:
                        if kiss.authentic:
                            raise
                        hint = kiss
                    except NotAuthentic:
                        continue
        except TimeoutError:
            if hint is not None:
                raise hint from None
            raise ClientError(
                Failure.NTP, f"no authentic answer from {_join(host, port)} within {timeout:g} s"
            ) from None
        except OSError as error:
            # By our own route alone: the socket is not connected, and so hears no ICMP.
            stage = Failure.LOCAL if error.errno in OWN_FAULTS else Failure.NTP
            raise ClientError(stage, f"cannot send to {_join(host, port)}: {_strerror(error)}") from None


async def _receive(udp: socket.socket, peer: tuple[str, int]) -> tuple[bytes, int]:
    """The next datagram from `peer` with the kernel's receive time."""
    loop = asyncio.get_running_loop()
    while True:
        # Garbage may come faster than it can be checked: it must stop neither our deadline nor other sources.
        await asyncio.sleep(0)
        try:
            datagram, ancillary, _flags, source = udp.recvmsg(MAX_DATAGRAM + 1, 64)
        except BlockingIOError:
            readable = asyncio.Event()
            loop.add_reader(udp, readable.set)
            try:
                await readable.wait()
            finally:
                loop.remove_reader(udp)
            continue
        if ip_address(source[0]) != ip_address(peer[0]) or source[1] != peer[1]:
            continue
        received = receive_time(ancillary)
        return datagram, time.time_ns() if received is None else received


@dataclass(frozen=True, slots=True)
class Measurement:
    """Authenticated samples of one server."""

    established: Established
    samples: tuple[Sample, ...]

    @property
    def best(self) -> Sample:
        return select.best(self.samples)


async def measure(established: Established, samples: int) -> Measurement:
    """`samples` exchanges; one lost packet is made up for.

    Raises ClientError if there is no sample at all, and for an authentic kiss code.
    """
    association = Association(established.result, secrets.token_bytes)
    host = await ntp_address(established)
    taken: list[Sample] = []
    failure: ClientError | None = None
    for _ in range(samples + 1):
        if len(taken) == samples:
            break
        try:
            taken.append(await exchange(association, host, established.ntp_port))
        except ClientError as error:
            failure = error
        except KissOfDeath as kiss:
            code = Failure.UNSYNCHRONISED if kiss.code in STARTING else Failure.KISS
            failure = ClientError(code, str(kiss))
            if kiss.authentic:
                raise failure from None
            # Anybody may have sent it: it costs no more than the loss of a packet.
        except OutOfCookies as error:
            failure = failure or ClientError(Failure.NTP, str(error))
            break
    if not taken:
        assert failure is not None
        raise failure
    return Measurement(established, tuple(taken))


async def ntp_address(established: Established) -> str:
    """The IP address at which NTP is served. Raises ClientError when record 6's name does not resolve."""
    host = established.ntp_host
    try:
        return str(ip_address(host))
    except ValueError:
        found = await _whole_name_addresses(host)
    family = ip_address(established.address).version
    return min(found, key=lambda address: ip_address(address).version != family)


async def _whole_name_addresses(host: str) -> list[str]:
    """The addresses of a fully qualified name (section 4.1.7): no search list leads it elsewhere."""
    try:
        return await system_addresses(f"{host}.")
    except ClientError as error:
        # /etc/hosts knows names without their last dot only, and they are their own canonical names there.
        with suppress(ClientError):
            return await system_addresses(host, canonical=host)
        raise error from None


async def system_addresses(name: str, *, canonical: str | None = None) -> list[str]:
    """The addresses of a host by the system's resolver. Raises ClientError.

    With `canonical` they count only if that is the name that they were found under.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(KE_TIMEOUT):
            found = await loop.getaddrinfo(name, None, type=socket.SOCK_STREAM, flags=socket.AI_CANONNAME)
        if canonical is not None and found[0][3].rstrip(".").lower() != canonical:
            raise OSError("it is found under another name only")  # noqa: TRY301 - as if it were not found
    except (OSError, TimeoutError, UnicodeError) as error:
        raise ClientError(
            Failure.DNS,
            f"{name} does not resolve: {_strerror(error)}",
            "check the name and this machine's resolver, or give the server's address with --address",
        ) from None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _strerror(error: BaseException) -> str:
    """What an operating system error says, without its numbers and without what asyncio adds to it."""
    if isinstance(error, OSError) and not isinstance(error, socket.gaierror) and error.errno:
        return os.strerror(error.errno)
    text = error.strerror if isinstance(error, OSError) else None
    return text or str(error) or type(error).__name__


def _join(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
