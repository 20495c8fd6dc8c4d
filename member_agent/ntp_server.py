"""UDP around `nts_core.server`: batches of datagrams, the kernel's receive times, counters by outcome.

asyncio's own datagram protocol takes one packet a turn of its loop; a reader that drains the socket is four to
seven times faster (measured). It stops after a batch, so that NTS-KE and the agent get their turn.
"""

import asyncio
import secrets
import socket
import time
from collections import Counter
from collections.abc import Sequence

from member_agent.clock import Clock
from member_agent.config import Limits
from member_agent.sockets import Endpoint, bound_endpoint, packed
from nts_core.cookies import Keyring
from nts_core.kernel import SO_TIMESTAMPNS, TIMESPEC
from nts_core.packet import MAX_DATAGRAM
from nts_core.ratelimit import Admission, Cap, RatePolicy, Verdict
from nts_core.server import Kiss, NtpServer, Reply

_BATCH = 64
_ANCILLARY = 256
# linux/in.h and linux/in6.h; Python 3.11 does not name all of them.
_IP_PKTINFO = 8
_IPV6_RECVPKTINFO, _IPV6_PKTINFO = 49, 50
# Looking a member of an enumeration up takes longer than comparing with it.
_SOL_SOCKET, _IPPROTO_IP, _IPPROTO_IPV6 = socket.SOL_SOCKET, int(socket.IPPROTO_IP), int(socket.IPPROTO_IPV6)
# One octet more than is looked at: what is longer shows.
_LONGEST = MAX_DATAGRAM + 1
_ANSWER = Verdict.ANSWER
_KISSES = {Verdict.KISS_RATE: Kiss.RATE, Verdict.KISS_DENY: Kiss.DENY}


# Counters that count something else than a datagram that came.
_ERRORS = ("receive-error", "send-error", "internal-error")
# A shorter time says little of how many come in a second.
_MEASURED = 10.0

_Ancillary = tuple[int, int, bytes]


def prepare(sock: socket.socket) -> None:
    """Have the kernel note when a datagram came and, on a wildcard, to which address: from the first one on."""
    sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    if bound_endpoint(sock).is_wildcard:
        # The answer must leave from the address that was asked, or the client discards it.
        if sock.family is socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)


def requests(counters: Counter[str]) -> int:
    """Datagrams that came, answered or not."""
    return counters.total() - sum(counters[name] for name in _ERRORS)


class NtpListener:
    """One UDP socket that answers NTP."""

    def __init__(
        self,
        sock: socket.socket,
        server: NtpServer,
        clock: Clock,
        counters: Counter[str],
        admission: Admission | None,
    ) -> None:
        """`sock` is bound and has been through `prepare`."""
        self._server = server
        self._admission = admission
        self._family = sock.family
        self._clock = clock
        self._counters = counters
        self._socket = sock
        self.endpoint = bound_endpoint(self._socket)
        asyncio.get_running_loop().add_reader(self._socket, self._drain)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()

    def _drain(self) -> None:
        admission, kiss = self._admission, None
        now = 0 if admission is None else time.monotonic_ns()
        sock, clock, counters = self._socket, self._clock, self._counters
        for _ in range(_BATCH):
            try:
                datagram, ancillary, _flags, peer = sock.recvmsg(_LONGEST, _ANCILLARY)
            except BlockingIOError:
                return
            except OSError:
                # A queued ICMP error of an earlier answer; the next call brings the next datagram.
                counters["receive-error"] += 1
                continue
            if admission is not None:
                kiss = None
                verdict = admission.judge(packed(self._family, peer), now)
                if verdict is not _ANSWER:
                    kiss = _KISSES.get(verdict)
                    if kiss is None:
                        counters[verdict] += 1
                        continue
            received, origin = self._read_ancillary(ancillary)
            action = self._server.respond(
                datagram,
                received=received,
                transmit_time=clock.now_ns,
                clock=clock.state(received),
                kiss=kiss,
            )
            counters[action.outcome] += 1
            if isinstance(action, Reply):
                try:
                    if origin is None:
                        sock.sendto(action.octets, peer)
                    else:
                        sock.sendmsg((action.octets,), (origin,), 0, peer)
                except OSError:
                    counters["send-error"] += 1

    def _read_ancillary(self, ancillary: Sequence[_Ancillary]) -> tuple[int, _Ancillary | None]:
        """The receive time to be served, and what makes the answer leave from the address asked.

        As `kernel.receive_time` does; a second walk over the messages of each datagram would take longer.
        """
        received: int | None = None
        origin: _Ancillary | None = None
        for level, kind, data in ancillary:
            if level == _SOL_SOCKET and kind == SO_TIMESTAMPNS:
                seconds, nanoseconds = TIMESPEC.unpack_from(data)
                received = seconds * 1_000_000_000 + nanoseconds + self._clock.offset_ns
            elif level == _IPPROTO_IP and kind == _IP_PKTINFO:
                # struct in_pktinfo: interface, local address (used as the source), header destination.
                origin = (level, kind, bytes(4) + data[4:8] + bytes(4))
            elif level == _IPPROTO_IPV6 and kind == _IPV6_PKTINFO:
                origin = (level, kind, data)
        return (self._clock.now_ns() if received is None else received), origin


class NtpListeners:
    """All NTP sockets of one engine, sharing one keyring and one account of who asked how often."""

    def __init__(self, clock: Clock, keyring: Keyring, limits: Limits) -> None:
        self._clock = clock
        self._server = NtpServer(keyring, secrets.token_bytes)
        self.admission = _admission(limits)
        self._listeners: dict[socket.socket, NtpListener] = {}
        self.counters: Counter[str] = Counter()

    @property
    def endpoints(self) -> list[Endpoint]:
        return [listener.endpoint for listener in self._listeners.values()]

    @property
    def opened(self) -> Counter[str]:
        """Cookies of authentic requests, by what the key that opened them is there for."""
        return self._server.opened

    @property
    def sealed(self) -> int:
        """Cookies given in answers."""
        return self._server.sealed

    def listen(self, sock: socket.socket) -> None:
        """Answer on a bound socket that has been through `prepare`."""
        self._listeners[sock] = NtpListener(sock, self._server, self._clock, self.counters, self.admission)

    def leave(self, sock: socket.socket) -> None:
        """Close a socket."""
        self._listeners.pop(sock).close()

    def use_keyring(self, keyring: Keyring) -> None:
        self._server.keyring = keyring

    def close(self) -> None:
        for sock in tuple(self._listeners):
            self.leave(sock)


class Meter:
    """How many come in a second, of a count that only grows."""

    def __init__(self) -> None:
        self._since: tuple[float, int] | None = None
        self._last: float | None = None

    def read(self, count: int | None, now: float) -> float | None:
        """The mean since ten seconds ago or more; None until so much is known. `now` is monotonic seconds."""
        if count is None:
            return None
        if self._since is None:
            self._since = now, count
        elif now - self._since[0] >= _MEASURED:
            self._last = (count - self._since[1]) / (now - self._since[0])
            self._since = now, count
        return self._last


def _admission(limits: Limits) -> Admission | None:
    """None when every datagram is to be answered, which then costs nothing to find out."""
    access = limits.access()
    if access is None and limits.ntp_interval is None and limits.ntp_pps is None:
        return None
    rate = None
    if limits.ntp_interval is not None:
        interval_ns = round(limits.ntp_interval * 1e9)
        rate = RatePolicy(interval_ns, limits.ntp_burst, limits.ntp_leak, limits.ntp_kod)
    cap = None if limits.ntp_pps is None else Cap(limits.ntp_pps)
    # A KoD costs what an answer costs: no more of them than of those.
    kisses = Cap(limits.ntp_pps) if limits.ntp_pps is not None and limits.above == "rate" else None
    return Admission(
        secrets.token_bytes,
        access=access,
        rate=rate,
        cap=cap,
        kisses_above=kisses,
        kiss_denied=limits.deny_action == "kod",
    )
