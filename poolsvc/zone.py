"""What a pool's zone should hold, and the ordered way there from what it holds now. Pure.

DNS is derived state: `wanted` is the one function from servers and policy to RRsets, `diff` the one way to
find what a primary has to change. A server's addresses and CAA exist from proof to removal, the TXT that tells whose it
is (`nts_core.metadata`) as long as the addresses, a TXT for a CA that asks for one only while it does. Its place in the SRV
answer exists only while it is listed, which is while it is ACTIVE, but for those that fell with too many others at once.
The order of `diff` keeps every SRV target resolvable after each single change.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache
from ipaddress import IPv4Address, ip_address
from types import MappingProxyType
from urllib.parse import urlsplit

import dns.ipv6
import dns.rdata

from nts_core.metadata import Metadata
from nts_core.srv import service_name, targets_that_fit
from poolsvc.regions import REGIONS, WORLD

LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
CAA_WORD = re.compile(r"[!#-:<-[\]-~]+")  # RFC 8659 section 4.2 without what the quoted form would escape
_SERVER_TYPES = ("A", "AAAA", "CAA", "TXT")
MANAGED_TYPES = (*_SERVER_TYPES, "SRV")  # of which records may be ours, or the fence
_CHALLENGE = "_acme-challenge."
CLOSED = '0 issue ";"'  # no certification authority may issue (RFC 8659 section 4.2)
# What may vanish at once without a question: this share, and anything where there are few.
_SHARE_PERCENT, _LEAST = 30, 10
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

    @property
    def max_targets(self) -> int:
        """How many servers an SRV answer may name."""
        return targets_that_fit(self.pool)

    @property
    def apex(self) -> str:
        return f"{self.pool.lower()}."

    @property
    def servers(self) -> str:
        """The owner above all server names; its CAA closes every name that has none of its own."""
        return f"servers.{self.apex}"

    @property
    def service(self) -> str:
        """The owner of the pool's SRV RRset (RFC 2782)."""
        return self.service_at(WORLD)

    def service_at(self, region: str) -> str:
        """The owner of a region's SRV RRset."""
        return service_name(f"{region}.{self.pool.lower()}" if region else self.pool.lower())

    @property
    def services(self) -> Mapping[str, str]:
        """All owners at which there may be an SRV RRset of ours, with their regions."""
        return _services(self.pool.lower())

    @property
    def fence(self) -> str:
        """The owner of the TXT record that holds the leader's epoch; not a managed owner."""
        return f"_fence.{self.apex}"

    @property
    def owners(self) -> tuple[str, ...]:
        """At or below which everything is that we write, the SRV aside."""
        return self.servers, self.fence

    def domain(self, name: str) -> str:
        """The owner of a server's addresses, CAA and metadata."""
        return f"{name}.{self.servers}"

    def challenge(self, name: str) -> str:
        """The owner of the TXT by which a CA sees that we control a server's name (RFC 8555 section 8.4)."""
        return f"{_CHALLENGE}{self.domain(name)}"

    def name_of(self, owner: str) -> str | None:
        """The server that a managed owner belongs to, if it is one's."""
        below = owner.removesuffix(f".{self.servers}")
        return None if below == owner else below.rpartition(".")[2]

    def keys(self, name: str) -> tuple["Key", ...]:
        """All that a server may have in the zone, the SRV aside."""
        return *((self.domain(name), kind) for kind in _SERVER_TYPES), (self.challenge(name), "TXT")


@lru_cache(maxsize=16)
def _services(pool: str) -> Mapping[str, str]:
    return {service_name(f"{region}.{pool}" if region else pool): region for region in (WORLD, *REGIONS)}


@dataclass(frozen=True, slots=True)
class ServerRecords:
    """What DNS needs to know of one server.

    `name` is the label, `member` a number that it shares with the other servers of its member, `addresses` the
    proved ones, `listed` whether it may be an SRV target, `weight` its share of SRV answers relative to the others.
    `account_uri` is the only account that may order for it, in place of the pool's at the same CA; empty while none may.
    `methods` are those by which the account may prove control, `proofs` the texts by which it does so in DNS now.
    `keeps_caa`: also without an address. `metadata` is shown with the addresses.
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
    metadata: Metadata | None = None

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

    @property
    def key(self) -> Key:
        return self.owner, self.rdtype


def managed(owner: str, rdtype: str, policy: ZonePolicy) -> bool:
    """Whether an RRset is ours to change; everything else in the zone is the operator's."""
    if rdtype == "SRV":
        return owner in policy.services
    if rdtype == "TXT":
        name, _, above = owner.removeprefix(_CHALLENGE).partition(".")
        return bool(name) and above == policy.servers
    return rdtype in _SERVER_TYPES and (owner == policy.servers or owner.endswith(f".{policy.servers}"))


def wanted(
    servers: Iterable[ServerRecords],
    policy: ZonePolicy,
    answers: Mapping[str, Iterable[str]] = MappingProxyType({}),
) -> Zone:
    """The managed part of the zone.

    `answers` has by region the names of the servers that its SRV RRset lists (`poolsvc.drawing`); without any no SRV exists.
    """
    zone: Zone = {(policy.servers, "CAA"): RRset.of(policy.address_ttl, "CAA", [CLOSED])}
    for server in servers:
        zone |= records_of(server, policy)
    return zone | services_of(answers, policy)


def records_of(server: ServerRecords, policy: ZonePolicy) -> Zone:
    """The records of one server: addresses and whose they are, the CAA for our CAs only, what proves control to them."""
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
    if server.addresses and server.metadata is not None:
        found[owner, "TXT"] = RRset(policy.address_ttl, frozenset({f'"{server.metadata.to_text()}"'}))
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


def services_of(answers: Mapping[str, Iterable[str]], policy: ZonePolicy) -> Zone:
    """The SRV RRsets of an open pool, by region; one that lists nobody does not exist."""
    target = f"{SRV_PRIORITY_AND_WEIGHT} {policy.ke_port} "
    found = {
        region: frozenset(target + policy.domain(name) for name in names) for region, names in answers.items()
    }
    return {
        (policy.service_at(region), "SRV"): RRset(policy.srv_ttl, texts)
        for region, texts in found.items()
        if texts
    }


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


def make(zone: Zone, changes: Iterable[Change]) -> None:
    """Make the changes in a zone that is held in memory."""
    for change in changes:
        if change.after is None:
            zone.pop(change.key, None)
        else:
            zone[change.key] = change.after


def is_too_much(lost: int, of: int) -> bool:
    """Whether so many may not vanish without a question: more than 30 % of at least 10."""
    return of >= _LEAST and lost * 100 > of * _SHARE_PERCENT


@dataclass(frozen=True, slots=True)
class Question:
    """What waits for an operator's word: changes that were stopped, and servers that stay in the SRV for now."""

    changes: tuple[Change, ...] = ()
    kept: tuple[str, ...] = ()
    existing: int = 0  # records of which the changes take so many

    def __bool__(self) -> bool:
        return bool(self.changes or self.kept)

    @property
    def checksum(self) -> str:
        """Of exactly this plan, in whatever order."""
        lines = [
            f"{change.owner} {change.rdtype} {_line(change.before)} -> {_line(change.after)}"
            for change in self.changes
        ]
        text = "\n".join(sorted(lines + [f"{name} leaves the SRV" for name in self.kept]))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def deleted(self) -> int:
        """How many records would go."""
        return sum(_lost(change) for change in self.changes if change.after is None)

    @property
    def replaced(self) -> int:
        """How many records would become others, or get another TTL."""
        return sum(_lost(change) for change in self.changes if change.after is not None)

    @property
    def is_of_settings(self) -> bool:
        """Whether TTLs, CAA and metadata are all that would change, as after a change of the settings."""
        return bool(self.changes) and all(is_of_settings(change) for change in self.changes)


def is_of_settings(change: Change) -> bool:
    """Whether a change may come of other settings, and of no server: another TTL, CAA or text of whose it is."""
    if change.before is None or change.after is None:
        return False
    return change.rdtype in {"CAA", "TXT"} or change.before.rdatas == change.after.rdatas


def of_settings_alone(
    changes: Iterable[Change], observed: Mapping[Key, RRset], policy: ZonePolicy
) -> set[Change]:
    """Those of the changes that other settings explain: all servers that had a value get the same other one.

    The texts that tell whose a server is differ: there it is that all of them change. What one alone has, and a text for
    a CA, is explained by nothing.
    """
    servers = [key for key in observed if policy.name_of(key[0]) is not None and _counts(*key)]
    had = Counter(value for key in servers for value in _values(key[1], observed[key]))
    steps = {
        change: _steps(change)
        for change in changes
        if is_of_settings(change) and policy.name_of(change.owner) is not None and _counts(*change.key)
    }
    made = Counter(step for some in steps.values() for step in some)
    return {change for change, some in steps.items() if all(made[step] == had[step[0]] > 1 for step in some)}


_Value = tuple[str, int | frozenset[str] | None]


def _values(rdtype: str, rrset: RRset) -> tuple[_Value, _Value]:
    """The TTL of a server's RRset, and its content as far as that is the same at all servers."""
    return ("TTL", rrset.ttl), (rdtype, None if rdtype == "TXT" else rrset.rdatas)


def _steps(change: Change) -> list[tuple[_Value, _Value]]:
    """Of an RRset that is replaced: from which TTL to which, and from which content to which."""
    before, after = change.before, change.after
    assert before is not None
    assert after is not None
    ttl, content = zip(_values(change.rdtype, before), _values(change.rdtype, after), strict=True)
    return [ttl] * (before.ttl != after.ttl) + [content] * (before.rdatas != after.rdatas)


def _line(rrset: RRset | None) -> str:
    return "nothing" if rrset is None else f"{rrset.ttl} {' | '.join(sorted(rrset.rdatas))}"


def _lost(change: Change) -> int:
    """How many records a change deletes or replaces."""
    if change.before is None or not _counts(*change.key):
        return 0
    if change.after is None or change.after.ttl != change.before.ttl:
        return len(change.before.rdatas)
    return len(change.before.rdatas - change.after.rdatas)


def _counts(owner: str, rdtype: str) -> bool:
    """Whether what the guard counts is in an RRset: not in the SRV, a sample that rotates, nor in texts for a CA."""
    return rdtype != "SRV" and not owner.startswith(_CHALLENGE)


def guard(
    plan: Sequence[Change],
    observed: Mapping[Key, RRset],
    policy: ZonePolicy,
    excepted: Collection[str] = (),
    unlisted: Collection[str] = (),
) -> tuple[tuple[Change, ...], Question]:
    """Split a plan into what may be made and what has to be asked for, because it would take too much of the zone.

    What other settings change and what servers lose are two plans, each with the threshold for itself: neither holds up
    the other. One server alone is never too much. `excepted` are servers that somebody meant to go. What is created never
    counts. A target of the SRV whose addresses were all to go stays in it, before all others, unless it is one of the
    `unlisted`, of which the database knows that they are no targets: an empty database would empty the SRV first.
    """
    counted = [change for change in plan if _lost(change) and policy.name_of(change.owner) not in excepted]
    existing = sum(len(rrset.rdatas) for key, rrset in observed.items() if _counts(*key)) if counted else 0
    parts = [[change for change in counted if is_of_settings(change) is of] for of in (True, False)]
    stopped = [change for part in parts if _is_wave(part, existing, policy) for change in part]
    if not stopped:
        return tuple(plan), Question()
    rest, gone = set(stopped), {change.key for change in stopped if change.after is None}
    held = {
        owner
        for owner in {owner for owner, _ in gone} - {policy.domain(name) for name in unlisted}
        if (there := {key for kind in ("A", "AAAA") if (key := (owner, kind)) in observed}) and there <= gone
    }
    made = (_without_loss(change, held, policy) for change in plan if change not in rest)
    return tuple(filter(None, made)), Question(tuple(stopped), existing=existing)


def _is_wave(changes: Collection[Change], existing: int, policy: ZonePolicy) -> bool:
    names = {policy.name_of(change.owner) for change in changes}
    return len(names) > 1 and is_too_much(sum(map(_lost, changes)), existing)


def _without_loss(change: Change, held: Collection[str], policy: ZonePolicy) -> Change | None:
    """The change, but for the SRV so that it keeps targets that are held."""
    if change.rdtype != "SRV" or change.before is None:
        return change
    kept = sorted(text for text in change.before.rdatas if text.split()[-1] in held)
    others = sorted(change.after.rdatas - set(kept)) if change.after else []
    if not kept:
        return change
    ttl = (change.after or change.before).ttl
    after = RRset(ttl, frozenset([*kept, *others][: max(policy.max_targets, len(kept))]))
    return None if after == change.before else replace(change, after=after)
