"""What one address may take of a server: token buckets, access lists, slots for connections.

Nothing here knows of ports: whoever asks can choose those. An IPv4 address counts alone. IPv6 counts by /64, which
is the least that a site gets, and by /48 with a wider budget, as one site may hold 65,536 of the former.

Addresses are 4 or 16 octets, `now` is nanoseconds of a clock that never goes back.

The table of token buckets has a fixed size. Rules for when it is full:

1. An address that the table does not hold has all its tokens. So whatever an attacker sends from forged addresses,
   it never takes anything from an address of another prefix: at worst the limits are lost, never the service.
2. The bucket that is nearest to being full is forgotten first: full ones cost nothing, and whoever is at the limit
   stays there. To have one such bucket forgotten, a forger has to empty sixteen others that it cannot aim at.
3. No step looks at more than sixteen entries.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network

Random = Callable[[int], bytes]
Network = IPv4Network | IPv6Network

# Addresses and prefixes remembered; about 10 MB when all are in use.
TABLE_ENTRIES = 65_536
# A /48 has 256 prefixes of length 56, which is what many providers give to a home.
WIDE_FACTOR = 256
_WAYS = 16
_SALT_LENGTH = 16
_SECOND = 1_000_000_000
# KoDs cost as much as an answer, so an address gets one in half a minute, and no more for asking faster.
_KISS_INTERVAL = 32 * _SECOND
_KISS_ENTRIES = 4096


class Verdict(StrEnum):
    """What to do with a datagram, by its source address alone; those that drop it are labels of a counter."""

    ANSWER = "answer"
    RATE_LIMITED = "rate-limited"
    OVER_CAP = "over-cap"
    DENIED = "denied"
    KISS_RATE = "kiss-rate"
    KISS_DENY = "kiss-deny"


# Looking a member of an enumeration up costs as much as looking a bucket up.
_ANSWER = Verdict.ANSWER
_DROPS = (Verdict.RATE_LIMITED, Verdict.DENIED)


@dataclass(frozen=True, slots=True)
class RatePolicy:
    """One request in `interval_ns` on average, `burst` at once.

    Of what is over the limit, one in `leak` is answered nevertheless, drawn by chance: otherwise a forger of
    somebody's address could silence the server for that address. One in `kiss` gets KoD RATE; 0 is none.
    """

    interval_ns: int
    burst: int
    leak: int = 4
    kiss: int = 0


class RateLimiter:
    """Token buckets in bounded memory.

    A bucket is one number, the time at which it will be full. It is empty when that is `burst` intervals away,
    and need not be kept once it has passed. A request that is refused takes nothing: no debt can be run up in
    somebody else's name.
    """

    def __init__(self, interval_ns: int, burst: int, random: Random, *, entries: int = TABLE_ENTRIES) -> None:
        """`entries` is a power of two, at least 16."""
        self._interval = interval_ns
        self._wide_interval = max(1, interval_ns // WIDE_FACTOR)
        self._capacity = interval_ns * burst
        self._slots: list[dict[bytes, int]] = [{} for _ in range(entries // _WAYS)]
        self._mask = entries // _WAYS - 1
        # `hash` of bytes is SipHash under a key that Python draws for each process, unless PYTHONHASHSEED
        # fixes it. With a salt of our own nobody can choose addresses that share a slot in either case.
        self._salt = random(_SALT_LENGTH)
        # How many buckets were forgotten before they were full: the table is too small for its traffic.
        self.forgotten = 0

    def take(self, address: bytes, now: int) -> bool:
        """Take a token from the bucket of the address, and of its /48; from both or, returning False, neither."""
        if len(address) == 4:
            return self.take_key(address, now)
        key, wide = address[:8], address[:6]
        slot, wide_slot = self._slot(key), self._slot(wide)
        full_at = max(slot.get(key, now), now) + self._interval
        wide_full_at = max(wide_slot.get(wide, now), now) + self._wide_interval
        if max(full_at, wide_full_at) - now > self._capacity:
            return False
        self._put(wide_slot, wide, wide_full_at, now)
        self._put(slot, key, full_at, now)
        return True

    def take_key(self, key: bytes, now: int) -> bool:
        """Take a token from the one bucket of a key that its caller has made, or, returning False, none."""
        slot = self._slot(key)
        full_at = max(slot.get(key, now), now) + self._interval
        if full_at - now > self._capacity:
            return False
        self._put(slot, key, full_at, now)
        return True

    def _slot(self, key: bytes) -> dict[bytes, int]:
        return self._slots[hash(self._salt + key) & self._mask]

    def _put(self, slot: dict[bytes, int], key: bytes, full_at: int, now: int) -> None:
        if len(slot) >= _WAYS and key not in slot and slot.pop(min(slot, key=slot.__getitem__)) > now:
            self.forgotten += 1
        slot[key] = full_at

    def __len__(self) -> int:
        """Buckets that are remembered."""
        return sum(map(len, self._slots))


class Cap:
    """So many requests a second of all clients together, and at once what comes in `at_once` seconds at that rate."""

    def __init__(self, per_second: float, at_once: float = 0.2) -> None:
        self._interval = max(1, round(_SECOND / per_second))
        self._capacity = max(self._interval, round(_SECOND * at_once))
        self._full_at = 0

    def take(self, now: int) -> bool:
        """Take one, or, returning False, none."""
        full_at = max(self._full_at, now) + self._interval
        if full_at - now > self._capacity:
            return False
        self._full_at = full_at
        return True


class AccessList:
    """Prefixes that are allowed and denied; the longest that holds an address decides.

    What no prefix holds is allowed, unless something is allowed by name: then it is denied, in both families.
    A look-up costs one step for each length of prefix in use, however many prefixes there are.
    """

    def __init__(self, allow: Iterable[Network] = (), deny: Iterable[Network] = ()) -> None:
        """Raises ValueError for a prefix that is both allowed and denied."""
        self._otherwise = True
        by_shift: dict[int, dict[int, dict[int, bool]]] = {4: {}, 16: {}}
        for networks, is_allowed in ((allow, True), (deny, False)):
            for network in networks:
                self._otherwise &= not is_allowed
                shift = network.max_prefixlen - network.prefixlen
                table = by_shift[network.max_prefixlen // 8].setdefault(shift, {})
                if table.setdefault(int(network.network_address) >> shift, is_allowed) != is_allowed:
                    raise ValueError(f"{network} is both allowed and denied")
        self._tables = {length: sorted(tables.items()) for length, tables in by_shift.items()}

    def allows(self, address: bytes) -> bool:
        number = int.from_bytes(address, "big")
        for shift, table in self._tables[len(address)]:
            found = table.get(number >> shift)
            if found is not None:
                return found
        return self._otherwise


class Admission:
    """The whole rule for one datagram: first the access list, then the rate, then the cap on all traffic."""

    def __init__(
        self,
        random: Random,
        *,
        access: AccessList | None = None,
        rate: RatePolicy | None = None,
        cap: Cap | None = None,
        kisses_above: Cap | None = None,
        kiss_denied: bool = False,
    ) -> None:
        """`kiss_denied` tells those who are denied so (KoD DENY); otherwise they are ignored.

        Above the cap so many are told to ask less often (KoD RATE) as `kisses_above` allows, an address once in half
        a minute; without it nobody is.
        """
        self._random = random
        self._access = access
        self._rate = rate
        self._cap = cap
        self._kisses_above = kisses_above
        self._kiss_denied = kiss_denied
        self._limiter = RateLimiter(rate.interval_ns, rate.burst, random) if rate else None
        self._kisses = RateLimiter(_KISS_INTERVAL, 1, random, entries=_KISS_ENTRIES)

    @property
    def forgotten(self) -> int:
        """Buckets that were forgotten before they were full."""
        return self._limiter.forgotten if self._limiter else 0

    def judge(self, address: bytes, now: int) -> Verdict:
        verdict = self._of_address(address, now)
        # What is dropped anyway takes nothing of what there is for others.
        if self._cap is None or verdict in _DROPS or self._cap.take(now):
            return verdict
        if self._kisses_above is None or not self._may_kiss(address, now):
            return Verdict.OVER_CAP
        return Verdict.KISS_RATE if self._kisses_above.take(now) else Verdict.OVER_CAP

    def _of_address(self, address: bytes, now: int) -> Verdict:
        if self._access is not None and not self._access.allows(address):
            return Verdict.KISS_DENY if self._kiss_denied and self._may_kiss(address, now) else Verdict.DENIED
        if self._limiter is None or self._limiter.take(address, now):
            return _ANSWER
        return self._over_limit(address, now)

    def _over_limit(self, address: bytes, now: int) -> Verdict:
        assert self._rate is not None
        drawn = int.from_bytes(self._random(4), "big")
        if self._rate.kiss:
            drawn, is_other = divmod(drawn, self._rate.kiss)
            if not is_other:
                return Verdict.KISS_RATE if self._may_kiss(address, now) else Verdict.RATE_LIMITED
        return Verdict.RATE_LIMITED if drawn % self._rate.leak else _ANSWER

    def _may_kiss(self, address: bytes, now: int) -> bool:
        return self._kisses.take(address, now)


class NoSlot(StrEnum):
    """Why a connection gets no slot; the label of a counter."""

    ALL = "too-many-connections"
    OF_ADDRESS = "too-many-of-address"
    OF_PREFIX = "too-many-of-prefix"


class Slots:
    """A fixed number of slots, shared so that no few can take all.

    An address (or /64) may hold `per_address`, a /48 `per_prefix`, and never more than a quarter, or half, of
    what is free at the moment. So the fuller it gets the less each may have, and a newcomer finds a slot until
    about as many prefixes hold slots as there are (dynamic thresholds, as in the buffers of switches).
    """

    def __init__(self, total: int, *, per_address: int, per_prefix: int) -> None:
        self.total = total
        self.taken = 0
        self._per_address = per_address
        self._per_prefix = per_prefix
        self._held: Counter[bytes] = Counter()

    def take(self, address: bytes) -> NoSlot | None:
        """Take a slot, to be given back; or say why there is none."""
        free = self.total - self.taken
        if free <= 0:
            return NoSlot.ALL
        own, *wide = keys = _groups(address)
        if self._held[own] >= min(self._per_address, max(1, free // 4)):
            return NoSlot.OF_ADDRESS
        if wide and self._held[wide[0]] >= min(self._per_prefix, max(1, free // 2)):
            return NoSlot.OF_PREFIX
        self._held.update(keys)
        self.taken += 1
        return None

    def give_back(self, address: bytes) -> None:
        self.taken -= 1
        for key in _groups(address):
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key]


def _groups(address: bytes) -> tuple[bytes, ...]:
    """What an address counts towards: itself for IPv4, its /64 and its /48 for IPv6."""
    return (address,) if len(address) == 4 else (address[:8], address[:6])
