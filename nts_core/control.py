"""The documents that registry, agent and prober exchange, as frozen data.

Rules:

1. Closed data only: names, addresses, tokens, PEM text. Never a command, a path or configuration.
2. Every document carries `version`. Unknown fields are ignored and new fields have defaults, so that a
   registry and an agent two versions apart still understand each other.
3. This module knows nothing of HTTP, JSON or databases; pydantic on either side reads these dataclasses.
"""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

VERSION = 1


class ServerState(StrEnum):
    """Where a server is in its life (`poolsvc.servers` holds the table of transitions)."""

    REGISTERED = "registered"
    VERIFIED = "verified"
    CERTIFIED = "certified"
    ACTIVE = "active"
    SUSPENDED = "suspended"
    LEAVING = "leaving"
    REMOVED = "removed"


class Stage(StrEnum):
    """What must hold, in this order, before a server is in the pool's SRV answer."""

    NAME = "name"
    ADDRESSES = "addresses"
    ISSUANCE = "issuance"
    TCP = "tcp"
    TLS = "tls"
    CERTIFICATE = "certificate"
    KE = "ke"
    COOKIES = "cookies"
    NTP_KE_COOKIE = "ntp-ke-cookie"
    NTP_NTP_COOKIE = "ntp-ntp-cookie"
    OFFSET = "offset"
    SCORE = "score"
    POOL = "pool"


class StageStatus(StrEnum):
    MET = "met"
    FAILED = "failed"
    WAITING = "waiting"


class MonitorStatus(StrEnum):
    """What a monitor is to the pool."""

    PENDING = "pending"  # registered, and not approved
    TESTING = "testing"  # it probes, and has no say
    ACTIVE = "active"
    PAUSED = "paused"  # it is to do nothing for now
    ENDED = "ended"  # for good


class Validation(StrEnum):
    """How a server's host answers a CA that looks whether somebody controls its name, as the agent says."""

    HTTP_01 = "http-01"
    TLS_ALPN_01 = "tls-alpn-01"
    REDIRECT = "redirect"  # HTTP-01, by a web server that sends the CA to the registry
    DNS_01 = "dns-01"  # not at all: the registry answers in DNS, where the pool's policy lets it


class ProofWay(StrEnum):
    """How an agent answers the registry that connects back to an address."""

    HTTP = "http"  # at PROOF_PATH, on the HTTP port
    TLS = "tls"  # by PROOF_ALPN, on the NTS-KE port


@dataclass(frozen=True, slots=True)
class JoinRequest:
    """An agent presents its own key; the join token travels in the Authorization header."""

    public_key: str  # Ed25519, raw 32 octets, base64
    agent: str = ""  # name and version, for the operator's eyes
    signature: str = ""  # of `join_statement` by that key, base64: the same agent may ask again
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class JoinAnswer:
    """What the agent must remember: its API token and the names it will ever answer for."""

    token: str
    pool: str
    server: str
    domain: str
    version: int = VERSION

    def __repr__(self) -> str:
        return f"JoinAnswer(pool={self.pool!r}, server={self.server!r}, domain={self.domain!r})"


@dataclass(frozen=True, slots=True)
class RejoinQuestion:
    """An agent whose token is good no more, and that still has its key, asks for something to sign."""

    server: str
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class RejoinChallenge:
    """What to sign (see `rejoin_statement`), soon."""

    nonce: str
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class RejoinRequest:
    """The challenge signed by the key that joined, base64; it is answered by a `JoinAnswer`."""

    server: str
    nonce: str
    signature: str
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class ProofRequest:
    """Sent from the address itself: the registry connects back only after such a call.

    `by` is how the agent will answer: "http" on the HTTP port, or "tls" on the KE port (`PROOF_ALPN`).
    """

    address: str
    by: str = ProofWay.HTTP
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class ProofAnswer:
    """The nonce that the agent's key must sign (see `proof_statement`), served on that address."""

    address: str
    nonce: str
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class AddressAssignment:
    """One address of the server; `call` asks the agent to call the registry from it again."""

    address: str
    proved: bool
    call: bool


@dataclass(frozen=True, slots=True)
class HttpChallenge:
    """An HTTP-01 challenge relayed from the CA (RFC 8555 section 8.3)."""

    token: str
    key_authorization: str


@dataclass(frozen=True, slots=True)
class TlsChallenge:
    """A TLS-ALPN-01 challenge relayed from the CA (RFC 8737)."""

    digest: str  # SHA-256 of the key authorization, lower-case hex


@dataclass(frozen=True, slots=True)
class IssuedCertificate:
    """A certificate chain for the key of the CSR that was sent for `order`."""

    order: int
    chain: str  # PEM, leaf first
    fingerprint: str  # SHA-256 of the leaf's DER, lower-case hex


@dataclass(frozen=True, slots=True)
class Assignment:
    """What the registry wants of an agent now."""

    pool: str
    server: str
    domain: str
    state: ServerState
    addresses: tuple[AddressAssignment, ...]
    http_port: int
    ke_port: int
    poll_after: float  # seconds until the agent should report again
    csr_for: int | None = None  # an order that waits for a certificate signing request
    challenges: tuple[HttpChallenge, ...] = ()
    certificate: IssuedCertificate | None = None
    why: str = ""  # why the server is not in DNS, empty when it is
    tls_port: int = 443  # where a CA looks for TLS-ALPN-01
    tls_challenges: tuple[TlsChallenge, ...] = ()
    may_order: bool = False  # the agent's own account may: every resolver knows the CAA that names it
    in_dns: bool | None = None  # the registry answers the CA, in DNS; None of one that does not say
    account_refused: str = ""  # why the agent's own account cannot order for this pool
    seen: str | None = None  # fingerprint of the last certificate that was seen working from outside
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class CsrAnswer:
    order: int
    pem: str


@dataclass(frozen=True, slots=True)
class AgentReport:
    """What the agent says of itself. It helps the operator; it never raises a status."""

    engine: str
    clock: str = ""
    serving: tuple[str, ...] = ()  # challenge tokens and digests and proof nonces that are answered now
    csr: CsrAnswer | None = None
    installed: str | None = None  # fingerprint of the certificate that is served
    problem: str | None = None
    traffic_cap: float | None = None  # NTP requests a second that it answers at most
    traffic: float | None = None  # and how many come
    ke_cap: float | None = None  # NTS-KE connections a minute that it takes at most
    ke_traffic: float | None = None  # and how many come
    validation: str = Validation.HTTP_01  # anything that is none counts as that
    account_uri: str | None = None  # the agent's own at a CA, which orders in place of the registry's
    version: int = VERSION


class NameFinding(StrEnum):
    """What the zone's own nameservers say of a server's name. What is wrong there is the pool's doing, never the member's."""

    UNKNOWN = "unknown"  # nobody told
    OK = "ok"
    ALIAS = "alias"
    ABSENT = "absent"  # it has no address
    ELSEWHERE = "elsewhere"  # it has an address that is not the server's
    UNLISTED = "unlisted"  # it has others of the server's addresses: this one may have been withdrawn


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What a probe of one address found: the first stage that failed, and what was measured until then.

    `offset` (server minus prober), `delay` and `root_distance` are nanoseconds, of the exchange with the least delay; None
    while unknown. `asked` and `cookies` count the cookies asked for by NTP and those that came. Of `exchanges` by NTP,
    `lost` had no authentic answer; those that a filter took are not among them. What ends in `_took` are nanoseconds from
    the stage before.
    """

    address: str
    failed: Stage | None
    detail: str
    offset: int | None = None
    delay: int | None = None
    stratum: int | None = None
    leap: int | None = None
    root_distance: int = 0
    kiss: str | None = None
    asked: int = 0
    cookies: int = 0
    fingerprint: str | None = None  # SHA-256 of the leaf's DER, lower-case hex; None unless it was valid
    serial: str | None = None  # of the leaf, lower-case hex
    not_before: int | None = None  # of the leaf, seconds since 1970
    not_after: int | None = None
    leaf: str | None = None  # in PEM; None of one that is longer than a certificate has to be
    is_silent: bool = False  # what failed had no answer at all, or a closed port
    names: str = NameFinding.UNKNOWN  # anything that is none counts as that
    names_detail: str = ""
    aead: int | None = None
    ntp: str | None = None  # where key establishment sends clients, ADDRESS:PORT
    exchanges: int = 0
    lost: int = 0
    longest: int | None = None  # octets of the longest request that was answered
    filtered: int | None = None  # octets of a request that was lost twice, while shorter ones were answered
    name_took: int | None = None
    tcp_took: int | None = None
    tls_took: int | None = None
    ke_took: int | None = None
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class MonitorTask:
    """One address of a server that a monitor is to probe, `after` so many seconds, give or take its own randomness."""

    target: int  # what names the address in the sample
    domain: str
    address: str
    after: float
    own_addresses: tuple[str, ...] = ()  # where key establishment may send clients to
    own_account: bool = False  # its certificate is ordered by the member's own ACME account
    spacing: float = 2.0  # seconds between two exchanges


@dataclass(frozen=True, slots=True)
class MonitorWork:
    """What a monitor is to do until it asks again."""

    pool: str
    monitor: str
    status: MonitorStatus
    ke_port: int
    poll_after: float  # seconds
    nameservers: tuple[str, ...] = ()  # the zone's authoritative servers, each ADDRESS:PORT
    tasks: tuple[MonitorTask, ...] = ()
    reason: str = ""  # why it has nothing to do
    max_samples: int = 500  # of one report
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class MonitorSample:
    """One probe. `age` is how many seconds before the report it began, so that no clock but one's own is needed."""

    target: int
    age: float
    result: ProbeResult


@dataclass(frozen=True, slots=True)
class MonitorReport:
    """What a monitor has found. One that is not sound has no samples: what it sees says nothing of servers.

    `sequence` grows with each report of a monitor; the same one sent again is answered as before and not counted again.
    """

    sequence: int
    sound: bool | None  # None: it has no references to compare its clock with
    detail: str = ""  # why it is not
    ipv4: bool = True  # families in which it reaches its references
    ipv6: bool = True
    samples: tuple[MonitorSample, ...] = ()
    dropped: int = 0  # probes since the last report of which nothing can be told: too old, or too much to do
    program: str = ""  # name and version
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class MonitorAnswer:
    """How many samples were taken; those of targets that are not the monitor's, or too old, are not."""

    taken: int
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """Its place among the servers that wait for the CA's limits; the next has 1."""

    position: int
    waiting: int
    turn_at: datetime


@dataclass(frozen=True, slots=True)
class SightStatus:
    """One address as one monitor last saw it; `counts` while it has a say."""

    monitor: str
    country: str | None = None
    role: str = ""
    counts: bool = False
    at: datetime | None = None
    failed: str | None = None  # a registry may know more stages than its agents
    failed_since: datetime | None = None
    detail: str = ""
    step_reason: str = ""
    score: float | None = None
    offset_ns: int | None = None


@dataclass(frozen=True, slots=True)
class AddressStatus:
    """One address: when it was proved, why it was not, and its score, None until it is admitted.

    `unknown` is why the pool does not know it now, which is the pool's fault.
    """

    address: str
    proved_at: datetime | None = None
    proof_error: str | None = None
    score: float | None = None
    unknown: str | None = None
    monitors: tuple[SightStatus, ...] = ()


@dataclass(frozen=True, slots=True)
class StageSeen:
    """One stage as it stands."""

    stage: str
    status: str
    since: datetime | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class WeightStatus:
    """Of what a server's share is made."""

    wanted: int = 1
    score: float = 1.0  # the part that its score gives
    capacity: float = 1.0  # the part that it answers, by its caps
    young: bool = False  # its account is young, and shares a part with the others that are


@dataclass(frozen=True, slots=True)
class HoldStatus:
    """Why it is suspended: one of its reasons."""

    kind: str
    reason: str
    set_at: datetime


@dataclass(frozen=True, slots=True)
class CertificateStatus:
    """The certificate that a server has, and when it orders the next one."""

    not_after: datetime | None
    renewal_at: datetime | None = None  # None while an order is under way
    ordering: bool = False
    problem: str | None = None  # of the last order


@dataclass(frozen=True, slots=True)
class AgentStatus:
    """What the registry last heard of the agent."""

    seen_at: datetime | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """What an agent shows of its server: a part of what `GET /v1/servers/NAME` answers."""

    name: str
    domain: str
    state: ServerState
    state_since: datetime
    in_dns: bool
    why: str = ""  # why it is not in DNS, empty when it is
    share: float = 0.0  # the part of the pool's answers that name it, from 0 to 1
    weight: WeightStatus = WeightStatus()
    stages: tuple[StageSeen, ...] = ()
    leave_at: datetime | None = None
    queue: QueueStatus | None = None
    expected_at: datetime | None = (
        None  # when it can be in DNS if nothing fails, while it is on its way there
    )
    addresses: tuple[AddressStatus, ...] = ()
    holds: tuple[HoldStatus, ...] = ()
    certificate: CertificateStatus | None = None  # None before the first one
    agent: AgentStatus = AgentStatus()


class CheckStatus(StrEnum):
    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look at one address from outside has found; the remedy is empty unless it failed."""

    address: str
    check: str  # a registry may know more of them than its agents
    status: CheckStatus
    detail: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class CheckAnswer:
    """All findings of one check, by address."""

    findings: tuple[Finding, ...]
    version: int = VERSION


PROOF_PATH = "/.well-known/truechimer-proof/"
PROOF_ALPN = "truechimer-proof/1"
ACME_PATH = "/.well-known/acme-challenge/"
ACME_ALPN = "acme-tls/1"


def proof_statement(*, pool: str, server: str, address: str, nonce: str) -> bytes:
    """The octets that the agent's key signs to prove an address.

    A fixed first line keeps the signature from meaning anything elsewhere.
    """
    return f"truechimer address proof v1\n{pool}\n{server}\n{address}\n{nonce}".encode("ascii")


def join_statement(*, token: str, public_key: str) -> bytes:
    """The octets that an agent's key signs when it joins: an answer that got lost can be had again."""
    digest = hashlib.sha256(token.encode()).hexdigest()
    return f"truechimer agent join v1\n{digest}\n{public_key}".encode("ascii")


def rejoin_statement(*, pool: str, server: str, nonce: str) -> bytes:
    """The octets that an agent's key signs to get a new token."""
    return f"truechimer agent rejoin v1\n{pool}\n{server}\n{nonce}".encode("ascii")
