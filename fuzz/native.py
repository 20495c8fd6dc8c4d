"""The packet engine (`nts_engine`) beside the Python one: both get the same octets, keys, times and randomness.

What both decide is one value for either, so that tests and targets compare whole values. Where the engine is not built
there is nothing to compare, and `IS_BUILT` says so.
"""

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from member_agent.config import Limits
from nts_core.cookies import MAX_COOKIES, NONCE_LENGTH, Keyring
from nts_core.ke import Exporter, KeServer, KeTerms, NtpEndpoint
from nts_core.packet import ClockState
from nts_core.server import Kiss, NtpServer, Reply

IS_BUILT = importlib.util.find_spec("nts_engine") is not None
NOT_BUILT = "nts_engine is not built: make setup builds it where cargo is there"
# Randomness that one answer takes at most: the nonce of its authenticator, then one for each cookie.
MOST_RANDOM = 16 + MAX_COOKIES * NONCE_LENGTH

if TYPE_CHECKING or IS_BUILT:
    import nts_engine

    from member_agent.engines.native import limits_of


def limits_with(**changes: Any) -> "nts_engine.Limits":
    """Those of an agent with no settings of its own, but for what is changed."""
    return nts_engine.Limits(**limits_of(Limits(), 1) | changes)


class Request(NamedTuple):
    """A datagram, the kiss code that it is to get, and the `MOST_RANDOM` octets that its nonces are taken from."""

    datagram: bytes
    kiss: Kiss | None
    random: bytes


class Times(NamedTuple):
    """When requests came and when they are answered, in Unix nanoseconds, and what is said of the clock."""

    received: int
    now: int
    clock: ClockState


class Answer(NamedTuple):
    """What became of a request: the outcome, the answer, the role of the key of its cookie, cookies in the answer."""

    outcome: str
    octets: bytes | None
    opened: str | None
    sealed: int


def respond(keyring: Keyring, requests: Sequence[Request], times: Times) -> list[Answer]:
    """What the packet engine answers to a batch."""
    made = nts_engine.respond(
        [(request.datagram, request.kiss and request.kiss.value) for request in requests],
        [request.random for request in requests],
        keyring=nts_engine.Keyring([(key.id, key.secret) for key in keyring.keys]),
        clock=nts_engine.Clock(**{name: getattr(times.clock, name) for name in ClockState.__slots__}),
        received=times.received,
        now=times.now,
    )
    return [Answer(*each) for each in made]


def respond_in_python(keyring: Keyring, request: Request, times: Times) -> Answer:
    """What the Python engine answers to one of them."""
    server = NtpServer(keyring, lambda length: request.random[:length])
    made = server.respond(
        request.datagram,
        received=times.received,
        transmit_time=lambda: times.now,
        clock=times.clock,
        kiss=request.kiss,
    )
    octets = made.octets if isinstance(made, Reply) else None
    return Answer(made.outcome, octets, next(iter(server.opened), None), server.sealed)


class KeServers:
    """One KE session in both engines, which are told the same plaintext."""

    def __init__(self, terms: KeTerms, export: Exporter, random: bytes) -> None:
        self._python = KeServer(terms, export, lambda length: random[:length])
        service = terms.service
        self._native = nts_engine.KeExchange(
            nts_engine.Keyring([(key.id, key.secret) for key in terms.keyring.keys]),
            (_pair(service.default), [_pair(each) for each in service.others]),
            terms.preference,
            export,
            random,
        )

    def receive(self, plaintext: bytes) -> tuple[tuple[bytes, str] | None, tuple[bytes, str] | None]:
        """What the Python engine answers and what the packet engine does: octets and outcome, None while more is
        awaited.
        """
        made = self._python.receive(plaintext)
        return None if made is None else (made.octets, made.outcome), self._native.receive(plaintext)


def _pair(endpoint: NtpEndpoint) -> tuple[str | None, int]:
    return endpoint.host, endpoint.port
