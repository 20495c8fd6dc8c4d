"""Packets by `nts_engine`, the Rust module of `engine/`: threads of this process, and no lock of Python's while they flow.

It is told what the agent knows (certificates, cookie keys, sockets, the clock) and asked for its counters.
"""

import asyncio
import socket
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import nts_engine
from cryptography import x509

from member_agent.clock import Clock
from member_agent.config import AgentSettings, Limits, PacketEngine
from member_agent.engines.serving import Counts, PemPair, Place, Protocol, service_at
from member_agent.errors import AgentError, ExitStatus
from member_agent.ke_server import RESERVED_DESCRIPTORS
from nts_core.cookies import Keyring
from nts_core.ke import NtpEndpoint
from nts_core.shell import affordable_connections
from nts_core.tls import dns_names

if TYPE_CHECKING:
    from member_agent.sockets import Endpoint

# Of the module that this one was written for: they are released together.
VERSION = "0.1.0"
# Seconds between words about the clock, and nanoseconds for which one holds: an agent that stands still is not to vouch for
# a clock that it does not look at.
_CLOCK_EVERY, _CLOCK_GOOD_NS = 1.0, 30_000_000_000
# Two event queues and what wakes them up, and a socket at each of a few places.
_DESCRIPTORS_EACH = 4 + 12

if nts_engine.__version__ != VERSION:
    raise ImportError(f"nts_engine {nts_engine.__version__} is there, and {VERSION} is needed")


class NativePackets:
    """As `packets.Packets`; each worker is a thread with a socket of its own at each place."""

    name = PacketEngine.NATIVE
    restarts = 0  # a thread that ends ends the agent

    def __init__(self, settings: AgentSettings, clock: Clock, keyring: Keyring) -> None:
        """Raises AgentError."""
        self._clock = clock
        self._numbers: dict[Place, int] = {}
        self._services = _Services(settings.ntp_server)
        self._wanted = settings.workers
        try:
            self._engine = nts_engine.Engine(
                settings.workers,
                nts_engine.Limits(**limits_of(settings.limits, settings.workers)),
                [int(algorithm) for algorithm in settings.aead],
                _keyring(keyring),
                _said(clock),
            )
        except OSError as error:
            raise AgentError(
                f"the threads of the packet engine cannot be started: {error}",
                "lower workers, or allow more open files and threads",
                ExitStatus.ENGINE,
            ) from None
        self.use_clock()

    def check(self, pair: PemPair) -> None:
        nts_engine.Credentials([_named("", pair)])

    async def use_pairs(self, pairs: Mapping[str, PemPair]) -> None:
        await asyncio.to_thread(self._use_pairs, pairs)

    def _use_pairs(self, pairs: Mapping[str, PemPair]) -> None:
        named = [_named(domain, pair) for domain, pair in pairs.items()]
        self._engine.use_credentials(nts_engine.Credentials(named))

    def use_keyring(self, keyring: Keyring) -> None:
        self._engine.use_keyring(_keyring(keyring))

    def use_clock(self) -> None:
        self._engine.use_clock(_said(self._clock), _CLOCK_GOOD_NS)

    def listen(self, sockets: Mapping[Place, Sequence[socket.socket]]) -> None:
        heard: dict[Place, int] = {}
        try:
            for place, shared in sockets.items():
                descriptors = [sock.detach() for sock in shared]
                heard[place] = (
                    self._engine.listen_ke(descriptors, self._services.at)
                    if place.protocol is Protocol.KE
                    else self._engine.listen_ntp(descriptors)
                )
        except OSError:
            with suppress(OSError):
                for number in heard.values():
                    self._engine.leave(number)
            if self.workers < self._wanted:
                raise self._ended() from None
            raise
        self._numbers.update(heard)
        self._note_places()

    async def leave(self, places: Collection[Place]) -> None:
        numbers = [self._numbers.pop(place) for place in places]
        self._note_places()
        try:
            for number in numbers:
                await asyncio.to_thread(self._engine.leave, number)
        except OSError:
            raise self._ended() from None

    def _note_places(self) -> None:
        self._services.ntp = tuple(
            place.endpoint for place in self._numbers if place.protocol is Protocol.NTP
        )
        try:
            self._engine.forget_services()
        except OSError:
            raise self._ended() from None

    async def tend(self) -> None:
        while self.workers == self._wanted:
            self.use_clock()
            await asyncio.sleep(_CLOCK_EVERY)
        raise self._ended()

    def _ended(self) -> AgentError:
        return AgentError(
            f"of {self._wanted} threads of the packet engine {self.workers} are left"
            f" ({self._engine.fault or 'nobody knows why'})",
            "start the agent again, and tell us; engine.packets = python does without them",
            ExitStatus.ENGINE,
        )

    async def close(self) -> None:
        self._numbers.clear()
        await asyncio.to_thread(self._engine.close)

    @property
    def counts(self) -> Counts:
        counts = self._engine.counts
        return Counts(
            Counter(counts.ke),
            Counter(counts.ntp),
            Counter(counts.opened),
            counts.sealed,
            counts.forgotten,
            counts.ke_open,
        )

    @property
    def workers(self) -> int:
        return self._engine.threads


class _Services:
    """Where NTP is served, as threads of the module ask for it. They hold this one, and nothing that holds them."""

    def __init__(self, elsewhere: NtpEndpoint | None) -> None:
        self._elsewhere = elsewhere
        # Replaced as a whole, and never changed.
        self.ntp: Sequence[Endpoint] = ()

    def at(self, local: str, names: tuple[str, ...]) -> "nts_engine.Service":
        service = service_at(self.ntp, self._elsewhere, local, names)
        default, *others = ((each.host, each.port) for each in (service.default, *service.others))
        return default, others


def limits_of(limits: Limits, threads: int) -> dict[str, Any]:
    """The parameters of `nts_engine.Limits` for each of several threads, which share the process's descriptors."""
    reserved = RESERVED_DESCRIPTORS + threads * _DESCRIPTORS_EACH
    affordable = affordable_connections(limits.ke_connections, reserved)
    each = limits.model_copy(update={"ke_connections": max(affordable, threads)}).of_each(threads)
    return {
        "allow": list(map(str, each.allow)),
        "deny": list(map(str, each.deny)),
        "kiss_denied": each.deny_action == "kod",
        "ntp_interval_ns": _interval_ns(each.ntp_interval),
        "ntp_burst": each.ntp_burst,
        "ntp_leak": each.ntp_leak,
        "ntp_kod": each.ntp_kod,
        "ntp_pps": each.ntp_pps,
        "kiss_above": each.above == "rate",
        "ke_connections": each.ke_connections,
        "ke_per_address": each.ke_connections_per_address,
        "ke_per_prefix": each.ke_connections_per_48,
        "ke_interval_ns": _interval_ns(each.ke_interval),
        "ke_burst": each.ke_burst,
        "ke_per_second": None if each.ke_per_minute is None else each.ke_per_minute / 60,
    }


def _interval_ns(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1e9)


def _keyring(keyring: Keyring) -> nts_engine.Keyring:
    return nts_engine.Keyring([(key.id, key.secret) for key in keyring.keys])


def _said(clock: Clock) -> nts_engine.Clock:
    """What is said of it now."""
    said = clock.said_at(clock.now_ns())
    return nts_engine.Clock(
        leap=said.leap,
        stratum=said.stratum,
        precision=said.precision,
        root_delay=said.root_delay,
        root_dispersion=said.root_dispersion,
        reference_id=said.reference_id,
        reference=said.reference,
        offset_ns=clock.offset_ns,
    )


def _named(domain: str, pair: PemPair) -> tuple[str, tuple[str, ...], str, str]:
    leaf = x509.load_pem_x509_certificates(pair.chain.encode())[0]
    return domain, dns_names(leaf), pair.chain, pair.key
