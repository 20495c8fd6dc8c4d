"""One signed zone in memory: what it holds, what a change makes of it, and what proves that something is not there. Pure.

Every RRset has its signatures at all times, and every name its place in the chain of NSEC (RFC 4035 section 2.3), so
that an answer, a transfer and the next change find all they need. A change is made in two steps: `edit` works out and
signs everything, with pauses in which others get their turn; `adopt` puts it in place at once.
"""

import heapq
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from random import Random

from poolsvc.nameserver import records
from poolsvc.nameserver.keys import REFRESH, VALID_AFTER, Keyring
from poolsvc.nameserver.records import Key, Name, RRset, Signed

Node = Mapping[int, Signed]
"""All RRsets of a name by their type; never changed, only replaced."""

# Signatures of one moment end over half a day, so that they are renewed over half a day.
_SPREAD = 43_200
_TOGETHER = 3_600
_AT_ONCE = 0
# Entries that are out of date are forgotten when there are so many more than RRsets.
_STALE = 10_000
_NOTHING = {records.NSEC}


@dataclass(frozen=True, slots=True)
class Edition:
    """What a change makes of the zone: `changed` has the new RRsets, None for those that are gone.

    `deleted` and `added` are the records in which the editions differ, without the SOA, as IXFR tells them (RFC 1995).
    `before` is the SOA that it replaces, as a record, None for the first edition.
    """

    before: bytes | None
    soa: bytes
    changed: Mapping[Key, Signed | None]
    deleted: tuple[bytes, ...]
    added: tuple[bytes, ...]
    order: list[bytes]
    keyring: Keyring
    made_at: int


@dataclass(slots=True)
class _Draft:
    """The names that a change touches with all that they have after it, and the order of all names then."""

    nodes: dict[Name, dict[int, RRset]]
    order: list[bytes]
    owners: dict[bytes, Name]  # those of `nodes`, by their place in the order


class SignedZone:
    """`now` is Unix time in whole seconds."""

    def __init__(self, keyring: Keyring, content: Mapping[Key, Signed], random: Random, now: int) -> None:
        """`content` is all of a zone that was signed before, or nothing."""
        self.apex = keyring.apex
        self.keyring = keyring
        self._random = random
        self._nodes: dict[Name, dict[int, Signed]] = {}
        self._inner: Counter[Name] = Counter()  # how many names with data are under a name
        for (owner, rdtype), signed in content.items():
            self._nodes.setdefault(owner, {})[rdtype] = signed
        for owner in self._nodes:
            self._inner.update(records.ancestors(owner, self.apex))
        self._owners = {records.order(owner): owner for owner in self._nodes}
        self._order = sorted(self._owners)
        self._aging: list[tuple[int, Name, int]] = []  # a heap: when signatures end
        self._renewing: dict[Key, None] = {}  # in order
        self.survey(now)

    @property
    def soa(self) -> Signed:
        return self._nodes[self.apex][records.SOA]

    @property
    def serial(self) -> int:
        return records.soa_serial(self.soa.rrset.rdatas[0])

    @property
    def longest_ttl(self) -> int:
        """For how long others may know anything of the zone, seconds. It looks at all of it."""
        return max(signed.rrset.ttl for node in self._nodes.values() for signed in node.values())

    def is_expired(self, now: int) -> bool:
        """Whether something may be shown that is not valid any more, as after a week without a server."""
        return bool(self._aging) and self._aging[0][0] <= now

    def __len__(self) -> int:
        """How many names have data."""
        return len(self._nodes)

    def node(self, name: Name) -> Node | None:
        """The RRsets of a name; none for one that only has names under it; None for one that does not exist."""
        found = self._nodes.get(name)
        return {} if found is None and name in self._inner else found

    def copy(self) -> Mapping[Name, Node]:
        """The zone as it is now, whatever comes next."""
        return dict(self._nodes)

    def covering(self, name: Name) -> Name:
        """The owner of the NSEC that is at a name, or proves that the name has nothing."""
        return self._owners[self._order[bisect_right(self._order, records.order(name)) - 1]]

    def encloser(self, name: Name) -> Name:
        """The closest name above one that exists."""
        return next(above for above in records.ancestors(name, self.apex) if self.node(above) is not None)

    def due(self, now: int, most: int) -> list[Key]:
        """RRsets to sign anew, the most urgent first: their signatures age, or are not of those who should sign.

        Once there is one, all that would be due within the hour come with it. Those that are not renewed are due again.
        """
        for key in self._renewing:
            self._watch(key)
        self._renewing = {}
        while self._aging and len(self._renewing) < most:
            if self._aging[0][0] - now >= REFRESH + (_TOGETHER if self._renewing else 0):
                break
            ends, owner, rdtype = heapq.heappop(self._aging)
            signed = self._nodes.get(owner, {}).get(rdtype)
            if signed is not None and ends in (_AT_ONCE, self._end_of(signed, rdtype)):
                self._renewing[owner, rdtype] = None
        return [*self._renewing]

    def edit(
        self,
        wanted: Mapping[Key, RRset | None],
        now: int,
        *,
        keyring: Keyring | None = None,
        renewed: Iterable[Key] = (),
    ) -> Generator[None, None, Edition | None]:
        """Work out the next edition, which may have other keys; None when nothing changes.

        `wanted` is of the zone's own data, without what signing adds. Its SOA, if it has one, gets the next serial, or its
        own if that is higher. RRsets in `renewed` are signed anew even if they stay. Each pause is a signature's.
        """
        keyring = keyring or self.keyring
        again = {key for key in renewed if key[1] in self._nodes.get(key[0], ())}
        draft = self._draft(wanted, keyring, again)
        changed: dict[Key, Signed | None] = {}
        for owner, node in draft.nodes.items():
            present = self._nodes.get(owner, {})
            for rdtype in present.keys() - node.keys():
                changed[owner, rdtype] = None
            for rdtype, rrset in node.items():
                held = present.get(rdtype)
                is_same = held is not None and held.rrset == rrset and _is_signed_by(held, keyring, rdtype)
                if rdtype != records.SOA and (not is_same or (owner, rdtype) in again):
                    early = self._random.randrange(_SPREAD)
                    changed[owner, rdtype] = keyring.sign(owner, rdtype, rrset, now, early=early)
                    yield
        soa, held = draft.nodes[self.apex][records.SOA], self._nodes.get(self.apex, {}).get(records.SOA)
        if held is None:
            before, data = None, soa.rdatas[0]
        else:
            if not changed and held.rrset == soa and (self.apex, records.SOA) not in again:
                return None
            old = held.rrset.rdatas[0]
            before, data = (
                records.record(self.apex, records.SOA, held.rrset.ttl, old),
                _next(old, soa.rdatas[0]),
            )
        key = self.apex, records.SOA
        changed[key] = keyring.sign(*key, RRset(soa.ttl, (data,)), now)
        deleted, added = self._difference(changed)
        after = records.record(self.apex, records.SOA, soa.ttl, data)
        return Edition(before, after, changed, deleted, added, draft.order, keyring, now)

    def adopt(self, edition: Edition) -> None:
        """Put an edition in place; nothing was adopted since it was made."""
        is_other_keyring = edition.keyring is not self.keyring
        self.keyring = edition.keyring
        nodes: dict[Name, dict[int, Signed]] = {}
        for (owner, rdtype), signed in edition.changed.items():
            node = nodes.setdefault(owner, dict(self._nodes.get(owner, {})))
            if signed is None:
                del node[rdtype]
            else:
                node[rdtype] = signed
                heapq.heappush(self._aging, (signed.expires, owner, rdtype))
        for owner, node in nodes.items():
            if not node:
                self._forget(owner)
                continue
            if owner not in self._nodes:
                self._owners[records.order(owner)] = owner
                self._inner.update(records.ancestors(owner, self.apex))
            self._nodes[owner] = node
        self._order = edition.order
        count = len(self._nodes)
        if is_other_keyring or len(self._aging) > 8 * count + _STALE:
            self.survey(edition.made_at)

    def _forget(self, owner: Name) -> None:
        del self._nodes[owner], self._owners[records.order(owner)]
        for above in records.ancestors(owner, self.apex):
            self._inner[above] -= 1
            if not self._inner[above]:
                del self._inner[above]

    def survey(self, now: int) -> None:
        """Look at all signatures, as after a change of keys, or after the clock was set back: those of a clock that was
        ahead are not valid yet.
        """
        self._aging = [
            (
                _AT_ONCE if signed.expires > now + VALID_AFTER else self._end_of(signed, rdtype),
                owner,
                rdtype,
            )
            for owner, node in self._nodes.items()
            for rdtype, signed in node.items()
        ]
        heapq.heapify(self._aging)

    def _watch(self, key: Key) -> None:
        signed = self._nodes.get(key[0], {}).get(key[1])
        if signed is not None:
            heapq.heappush(self._aging, (self._end_of(signed, key[1]), *key))

    def _end_of(self, signed: Signed, rdtype: int) -> int:
        return signed.expires if _is_signed_by(signed, self.keyring, rdtype) else _AT_ONCE

    def _unsigned(self, owner: Name) -> dict[int, RRset]:
        return {rdtype: signed.rrset for rdtype, signed in self._nodes.get(owner, {}).items()}

    def _draft(self, wanted: Mapping[Key, RRset | None], keyring: Keyring, again: Iterable[Key]) -> _Draft:
        nodes: dict[Name, dict[int, RRset]] = {self.apex: self._unsigned(self.apex)}
        for owner, _ in again:
            nodes.setdefault(owner, self._unsigned(owner))
        for (owner, rdtype), rrset in wanted.items():
            node = nodes.setdefault(owner, self._unsigned(owner))
            if rrset is None:
                node.pop(rdtype, None)
            else:
                node[rdtype] = rrset
        apex = nodes[self.apex]
        apex |= keyring.sets(apex[records.NS].ttl)
        for node in nodes.values():
            if node.keys() == _NOTHING:
                node.clear()
        draft = _Draft(nodes, self._order.copy(), {records.order(owner): owner for owner in nodes})
        self._link(draft)
        return draft

    def _link(self, draft: _Draft) -> None:
        """Give every name whose types or successor change its NSEC."""
        order = draft.order
        for place, owner in draft.owners.items():
            node = draft.nodes[owner]
            if node and owner not in self._nodes:
                insort(order, place)
            elif not node and owner in self._nodes:
                del order[bisect_left(order, place)]
        apex = draft.nodes[self.apex]
        soa = apex[records.SOA]
        # RFC 9077: a proof that something does not exist lives as long as its absence would.
        ttl = min(soa.ttl, records.soa_minimum(soa.rdatas[0]))
        is_other_ttl = records.NSEC in apex and apex[records.NSEC].ttl != ttl
        for place in order.copy() if is_other_ttl else self._touched(draft):
            owner = self._owner(draft, place)
            node = draft.nodes.setdefault(owner, self._unsigned(owner))
            after = bisect_right(order, place)
            successor = self._owner(draft, order[after] if after < len(order) else order[0])
            types = frozenset(node) | {records.NSEC, records.RRSIG}
            node[records.NSEC] = RRset(ttl, (successor + records.bitmap(types),))

    @staticmethod
    def _touched(draft: _Draft) -> set[bytes]:
        """The places of the names in a draft, and of those right before."""
        touched = set()
        for place, owner in draft.owners.items():
            at = bisect_left(draft.order, place)
            touched.add(draft.order[at - 1])  # before the first one is the last one
            if draft.nodes[owner]:
                touched.add(place)
        return touched

    def _owner(self, draft: _Draft, place: bytes) -> Name:
        return draft.owners.get(place) or self._owners[place]

    def _difference(
        self, changed: Mapping[Key, Signed | None]
    ) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        deleted: list[bytes] = []
        added: list[bytes] = []
        for (owner, rdtype), signed in changed.items():
            held = self._nodes.get(owner, {}).get(rdtype)
            old = [] if held is None else list(records.records(owner, rdtype, held))
            new = [] if signed is None else list(records.records(owner, rdtype, signed))
            if rdtype == records.SOA:  # which frames the difference; its signatures are part of it
                old, new = old[1:], new[1:]
            deleted += [one for one in old if one not in new]
            added += [one for one in new if one not in old]
        return tuple(deleted), tuple(added)


def _is_signed_by(signed: Signed, keyring: Keyring, rdtype: int) -> bool:
    """Whether the signatures are of exactly those who should sign."""
    return [signature[16:18] for signature in signed.signatures] == [
        key.tag.to_bytes(2, "big") for key in keyring.signers(rdtype)
    ]


def _next(before: bytes, wanted: bytes) -> bytes:
    """The wanted SOA with a serial after the one before (RFC 1982)."""
    held, asked = records.soa_serial(before), records.soa_serial(wanted)
    is_later = 0 < (asked - held) % 2**32 < 2**31
    return wanted if is_later else records.with_serial(wanted, (held + 1) % 2**32)
