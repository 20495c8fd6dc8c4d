"""What a pool's zone should hold, and the ordered way there from what it holds now. Pure.

DNS is derived state: `wanted` is the one function from servers and policy to RRsets, `diff` the one way to
find what a primary has to change. A server's addresses and CAA exist from proof to removal, its place in
the SRV answer only while it is listed, a TXT for a CA that asks for one only while it does; the order of `diff` keeps
every SRV target resolvable after each single change.
"""

import hashlib
import heapq
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache
from ipaddress import IPv4Address, ip_address
from urllib.parse import urlsplit

import dns.ipv6
import dns.rdata

LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
CAA_WORD = re.compile(r"[!#-:<-[\]-~]+")  # RFC 8659 section 4.2 without what the quoted form would escape
_SERVER_TYPES = ("A", "AAAA", "CAA")
_CHALLENGE = "_acme-challenge."
CLOSED = '0 issue ";"'  # no certification authority may issue (RFC 8659 section 4.2)
SRV_PRIORITY_AND_WEIGHT = "0 10"  # equal for all: a server's share is given by the sampling alone


@dataclass(frozen=True, slots=True)
class CaaIssuer:
    """A certification authority that may issue, for one account of it only (RFC 8657)."""

    identity: str
    account_uri: str

    def __post_init__(self) -> None:
        for word in (self.identity, self.account_uri):
            if CAA_WORD.fullmatch(word) is None:
                raise ValueError(f"a CAA value cannot hold {word!r}")


@dataclass(frozen=True, slots=True)
class ZonePolicy:
    """What the pool decided about its zone; TTLs are seconds, `pool` has no trailing dot."""

    pool: str
    srv_ttl: int
    address_ttl: int
    ke_port: int
    caa: tuple[CaaIssuer, ...]
    max_targets: int = 8

    @property
    def apex(self) -> str:
        return f"{self.pool.lower()}."

    @property
    def servers(self) -> str:
        """The owner above all server names; its CAA closes every name that has none of its own."""
        return f"servers.{self.apex}"

    @property
    def service(self) -> str:
        """The owner of the SRV RRset (RFC 2782)."""
        return f"_ntske._tcp.{self.apex}"

    @property
    def fence(self) -> str:
        """The owner of the TXT record that holds the leader's epoch; not a managed owner."""
        return f"_fence.{self.apex}"

    def domain(self, name: str) -> str:
        """The owner of a server's addresses and CAA."""
        return f"{name}.{self.servers}"

    def challenge(self, name: str) -> str:
        """The owner of the TXT by which a CA sees that we control a server's name (RFC 8555 section 8.4)."""
        return f"{_CHALLENGE}{self.domain(name)}"

    def keys(self, name: str) -> tuple["Key", ...]:
        """All that a server may have in the zone, the SRV aside."""
        return *((self.domain(name), kind) for kind in _SERVER_TYPES), (self.challenge(name), "TXT")


@dataclass(frozen=True, slots=True)
class ServerRecords:
    """What DNS needs to know of one server.

    `name` is the label, `member` a number that it shares with the other servers of its member, `addresses` the
    proved ones, `listed` whether it may be an SRV target, `weight` its share of SRV answers relative to the others.
    `account_uri` is the only account that may order for it, in place of the pool's at the same CA; empty while none may.
    `methods` are those by which the account may prove control, `proofs` the texts by which it does so in DNS now.
    `keeps_caa`: also without an address.
    """

    name: str
    member: int
    addresses: tuple[str, ...]
    listed: bool
    weight: int = 1
    account_uri: str | None = None
    methods: tuple[str, ...] = ("http-01",)
    proofs: tuple[str, ...] = ()
    keeps_caa: bool = False

    def __post_init__(self) -> None:
        if LABEL.fullmatch(self.name) is None:
            raise ValueError(f"not a server name: {self.name!r}")
        if self.weight < 1:
            raise ValueError(f"{self.name}: the weight must be positive")


@dataclass(frozen=True, slots=True)
class RRset:
    """TTL in seconds and the records as text in one canonical form, names absolute and lower-case."""

    ttl: int
    rdatas: frozenset[str]

    @classmethod
    def of(cls, ttl: int, rdtype: str, rdatas: Iterable[str]) -> "RRset":
        """Bring zone-file text with absolute names into the canonical form."""
        parsed = (dns.rdata.from_text("IN", rdtype, text).to_text() for text in rdatas)
        return cls(ttl, frozenset(text.lower() if rdtype == "SRV" else text for text in parsed))


Key = tuple[str, str]
"""Owner (absolute, lower-case) and type, both as text."""

Zone = dict[Key, RRset]


@dataclass(frozen=True, slots=True)
class Change:
    """One RRset to create (`before` is None), replace, or delete (`after` is None)."""

    owner: str
    rdtype: str
    before: RRset | None
    after: RRset | None


def managed(owner: str, rdtype: str, policy: ZonePolicy) -> bool:
    """Whether an RRset is ours to change; everything else in the zone is the operator's."""
    if rdtype == "SRV":
        return owner == policy.service
    if rdtype == "TXT":
        return owner.startswith(_CHALLENGE) and owner.endswith(f".{policy.servers}")
    return rdtype in _SERVER_TYPES and (owner == policy.servers or owner.endswith(f".{policy.servers}"))


def wanted(servers: Iterable[ServerRecords], policy: ZonePolicy, *, is_open: bool, draw: int) -> Zone:
    """The managed part of the zone.

    `is_open` is whether the pool offers its service; without it no SRV exists. `draw` numbers the choice
    of SRV targets where more servers are listed than fit: the same draw gives the same choice.
    """
    present = list(servers)
    zone: Zone = {(policy.servers, "CAA"): RRset.of(policy.address_ttl, "CAA", [CLOSED])}
    for server in present:
        zone |= records_of(server, policy)
    listed = (server for server in present if server.listed and server.addresses)
    if is_open and (service := service_of(listed, policy, draw=draw)) is not None:
        zone[policy.service, "SRV"] = service
    return zone


def records_of(server: ServerRecords, policy: ZonePolicy) -> Zone:
    """The records of one server: its addresses, the CAA that lets only our CAs issue, and what proves control to them."""
    if not server.addresses and not server.keeps_caa:
        return {}
    owner, texts = policy.domain(server.name), dict[str, list[str]]()
    for text in server.addresses:
        address = ip_address(text)
        # The forms that `RRset.of` gives, without its parser: a large pool has a hundred thousand of them.
        if isinstance(address, IPv4Address):
            texts.setdefault("A", []).append(str(address))
        else:
            texts.setdefault("AAAA", []).append(dns.ipv6.inet_ntoa(address.packed))
    found = {(owner, kind): RRset(policy.address_ttl, frozenset(some)) for kind, some in texts.items()}
    if server.proofs:
        proofs = RRset.of(policy.address_ttl, "TXT", (f'"{text}"' for text in server.proofs))
        found[policy.challenge(server.name), "TXT"] = proofs
    return {(owner, "CAA"): _caa(server, policy), **found}


def _caa(server: ServerRecords, policy: ZonePolicy) -> RRset:
    if server.account_uri is None:
        return _issuers(policy, server.methods)
    host = urlsplit(server.account_uri).netloc
    own = [one for one in policy.caa if host and urlsplit(one.account_uri).netloc == host]
    issuers = (replace(one, account_uri=server.account_uri) for one in own)
    return _caa_of(issuers, server.methods, policy)


@lru_cache(maxsize=16)
def _issuers(policy: ZonePolicy, methods: tuple[str, ...]) -> RRset:
    """The CAA that live names with an agent have: one RRset for each choice of methods, shared by all."""
    return _caa_of(policy.caa, methods, policy)


def _caa_of(issuers: Iterable[CaaIssuer], methods: tuple[str, ...], policy: ZonePolicy) -> RRset:
    texts = [
        f'0 issue "{issuer.identity}; accounturi={issuer.account_uri}; validationmethods={",".join(methods)}"'
        for issuer in issuers
    ]
    return RRset.of(policy.address_ttl, "CAA", texts or [CLOSED])


def service_of(listed: Iterable[ServerRecords], policy: ZonePolicy, *, draw: int) -> RRset | None:
    """The SRV RRset of an open pool; None when nobody is listed."""
    texts = [
        f"{SRV_PRIORITY_AND_WEIGHT} {policy.ke_port} {policy.domain(server.name)}"
        for server in sample(listed, policy.max_targets, draw=draw)
    ]
    return RRset.of(policy.srv_ttl, "SRV", texts) if texts else None


def sample(servers: Iterable[ServerRecords], count: int, *, draw: int) -> list[ServerRecords]:
    """At most `count` servers, by weight and without replacement (Efraimidis and Spirakis 2006).

    Of a member one, while there are others; the places that are left then go to the rest. The random source is a
    hash of draw and name, so that one server's coming or going displaces at most one other within a draw.
    """

    def waiting_time(server: ServerRecords) -> float:
        digest = hashlib.sha256(f"{draw} {server.name}".encode()).digest()
        uniform = (int.from_bytes(digest[:6], "big") + 0.5) / 2**48
        return -math.log(uniform) / server.weight

    # A name is one server's only, so servers themselves are never compared.
    queue = [(waiting_time(server), server.name, server) for server in servers]
    heapq.heapify(queue)
    first: dict[int, ServerRecords] = {}
    rest: list[ServerRecords] = []
    while queue and len(first) < count:
        *_, server = heapq.heappop(queue)
        if first.setdefault(server.member, server) is not server:
            rest.append(server)
    return [*first.values(), *rest[: count - len(first)]]


class _Turn(IntEnum):
    """When a change is due: a target leaves the SRV before its addresses go and joins after they exist."""

    SRV_DELETE = 0
    ADDRESS_CREATE = 1
    ADDRESS_UPDATE = 2
    SRV_UPDATE = 3
    SRV_CREATE = 4
    ADDRESS_DELETE = 5


def _turn(change: Change) -> _Turn:
    is_srv = change.rdtype == "SRV"
    if change.before is None:
        return _Turn.SRV_CREATE if is_srv else _Turn.ADDRESS_CREATE
    if change.after is None:
        return _Turn.SRV_DELETE if is_srv else _Turn.ADDRESS_DELETE
    return _Turn.SRV_UPDATE if is_srv else _Turn.ADDRESS_UPDATE


def diff(wanted: Mapping[Key, RRset], observed: Mapping[Key, RRset]) -> tuple[Change, ...]:
    """The changes that turn `observed` into `wanted`, in the order in which they must be made.

    Both must hold managed RRsets only. A parent's records go before its children's, so that the closing
    CAA stands before the first name under it.
    """
    return ordered(
        Change(owner, rdtype, observed.get((owner, rdtype)), wanted.get((owner, rdtype)))
        for owner, rdtype in wanted.keys() | observed.keys()
        if observed.get((owner, rdtype)) != wanted.get((owner, rdtype))
    )


def ordered(changes: Iterable[Change]) -> tuple[Change, ...]:
    """Changes in the order in which they must be made."""
    return tuple(
        sorted(
            changes, key=lambda change: (_turn(change), change.owner.count("."), change.owner, change.rdtype)
        )
    )
