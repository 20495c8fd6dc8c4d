"""The packet engine of pool-agent: NTS-KE and NTP on threads of its own, by the rules of `nts_core`.

It owns sockets that the agent has bound, and gives counters back. No thread holds the interpreter's lock while
packets flow. Times are Unix nanoseconds, addresses are texts as `ipaddress` writes them.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias, final

__version__: str

# A host (None: the KE server's own address) and a port.
Endpoint: TypeAlias = tuple[str | None, int]
# Where NTP is served with our cookies: where clients are sent, and where else they may ask to go.
Service: TypeAlias = tuple[Endpoint, Sequence[Endpoint]]
# Of a local address that a connection came in on, and the host names of the certificate that was shown.
ServiceAt: TypeAlias = Callable[[str, tuple[str, ...]], Service]

@final
class Keyring:
    """Master keys of cookies, newest first, as in `nts_core.cookies.Keyring`: the second one seals."""

    def __init__(self, keys: Sequence[tuple[int, bytes]]) -> None:
        """Ids and keys of 32 octets. Raises ValueError for fewer than two, equal ids, or a wrong length."""

@final
class Clock:
    """What is said of the clock (`nts_core.packet.ClockState`), and what is added to the host's time (a test option)."""

    def __init__(
        self,
        *,
        leap: int,
        stratum: int,
        precision: int,
        root_delay: int,
        root_dispersion: int,
        reference_id: bytes,
        reference: int,
        offset_ns: int = 0,
    ) -> None: ...

@final
class Limits:
    """What one address, and all of them together, may take; as `member_agent.config.Limits`, in plain numbers."""

    def __init__(
        self,
        *,
        allow: Sequence[str],
        deny: Sequence[str],
        kiss_denied: bool,
        ntp_interval_ns: int | None,
        ntp_burst: int,
        ntp_leak: int,
        ntp_kod: int,
        ntp_pps: float | None,
        kiss_above: bool,
        ke_connections: int,
        ke_per_address: int,
        ke_per_prefix: int,
        ke_interval_ns: int | None,
        ke_burst: int,
        ke_per_second: float | None,
    ) -> None:
        """Prefixes are texts. Raises ValueError for one that is none, or that is both allowed and denied."""

@final
class Credentials:
    """Certificate chains and keys, by the names that they are for; see `nts_core.tls.NamedCredentials`."""

    def __init__(self, pairs: Sequence[tuple[str, tuple[str, ...], str, str]]) -> None:
        """For each: the name that is asked for (SNI), the certificate's host names, chain and key in PEM.

        Raises ValueError when a pair does not belong together, or is of a kind that TLS 1.3 does not use.
        """

@final
class Counts:
    """What happened since the start, by the labels that the Python engine has; `ke_open` is what is open now."""

    @property
    def ntp(self) -> dict[str, int]: ...
    @property
    def ke(self) -> dict[str, int]: ...
    @property
    def opened(self) -> dict[str, int]: ...
    @property
    def sealed(self) -> int: ...
    @property
    def forgotten(self) -> int: ...
    @property
    def ke_open(self) -> int: ...

@final
class Engine:
    """Serves from the first `listen_*` to `close`. Each place has one socket for each of `threads`."""

    def __init__(
        self, threads: int, limits: Limits, aead: Sequence[int], keyring: Keyring, clock: Clock
    ) -> None:
        """`limits` are those of each thread. Raises ValueError for less than 1 or more than 64, OSError when they cannot
        be started.
        """

    def use_keyring(self, keyring: Keyring) -> None:
        """From the next datagram on, and for the next connections."""

    def use_clock(self, clock: Clock, good_for_ns: int) -> None:
        """To be said again before `good_for_ns` have passed: after them the clock is served as not synchronised."""

    def use_credentials(self, credentials: Credentials) -> None:
        """For new connections; those under way are not touched."""

    def listen_ntp(self, descriptors: Sequence[int]) -> int:
        """Answer NTP on bound datagram sockets, which are the engine's from now on; the number to `leave` by.

        Raises ValueError when there are not `threads` of them, OSError when one cannot be used.
        """

    def listen_ke(self, descriptors: Sequence[int], service: ServiceAt) -> int:
        """The same for NTS-KE on listening stream sockets. `service` is asked once for each address and certificate,
        and again after `forget_services`.
        """

    def forget_services(self) -> None:
        """Where NTP is served has changed."""

    def leave(self, number: int) -> None:
        """Answer there no more, and close the sockets; KE connections that came by them go on."""

    @property
    def counts(self) -> Counts: ...
    @property
    def threads(self) -> int:
        """Threads of each kind that live."""

    @property
    def fault(self) -> str | None:
        """Why a thread has ended that was not told to."""

    def close(self) -> None:
        """Answer no more. Returns when all threads have ended; connections under way are closed."""

# The rules alone, without sockets, for tests that compare both engines.

def respond(
    requests: Sequence[tuple[bytes, str | None]],
    random: Sequence[bytes],
    *,
    keyring: Keyring,
    clock: Clock,
    received: int,
    now: int,
) -> list[tuple[str, bytes | None, str | None, int]]:
    """Answer datagrams side by side. Each comes with a kiss code ("RATE", "DENY") or None, and with the octets that its
    nonces are taken from. For each: outcome, answer, role of the key that opened its cookie, cookies in the answer.
    """

@final
class KeExchange:
    """The server's side of one TLS session, as `nts_core.ke.KeServer`."""

    def __init__(
        self,
        keyring: Keyring,
        service: Service,
        preference: Sequence[int],
        export: Callable[[bytes, int], bytes],
        random: bytes,
    ) -> None: ...
    def receive(self, plaintext: bytes) -> tuple[bytes, str] | None:
        """Answer and outcome once the request is whole; None while octets are missing."""

@final
class Admission:
    """The whole rule for one datagram's source address, as `nts_core.ratelimit.Admission`."""

    def __init__(self, limits: Limits, random: bytes) -> None:
        """What is drawn by chance is taken from `random`, round and round."""

    def judge(self, address: bytes, now: int) -> str: ...
    @property
    def forgotten(self) -> int: ...

@final
class Slots:
    """As `nts_core.ratelimit.Slots`."""

    def __init__(self, total: int, *, per_address: int, per_prefix: int) -> None: ...
    def take(self, address: bytes) -> str | None: ...
    def give_back(self, address: bytes) -> None: ...
