"""What the CA's limits leave, and who may order when: pure.

A limit is a bucket, as Let's Encrypt has them: it holds `count` at most, and one comes back each `period / count`.
Where a bucket stands follows from what was taken and when, so that nothing is lost in a restart.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

# Periods that a bucket is followed through. It is taken for empty at their beginning: never is it thought to hold more
# than it does, and it holds less than is there only where nearly all was used for as long.
_MEMORY = 8
# What no limit is above: none at all can be said by it.
MOST = 1_000_000


@dataclass(frozen=True, slots=True)
class Limit:
    """So many within a period."""

    count: int
    period: timedelta

    @property
    def interval(self) -> timedelta:
        """After which one more is there."""
        return self.period / self.count

    @property
    def memory(self) -> timedelta:
        """How far back it matters what was taken."""
        return self.period * _MEMORY


@dataclass(frozen=True, slots=True)
class Limits:
    """What a CA allows: of first certificates in the pool's domain, of orders for them, and of one name."""

    certificates: Limit
    orders: Limit
    same_name: Limit
    failed_validations: Limit


@dataclass(frozen=True, slots=True)
class Grant:
    """Other counts for the same periods, by the CA's leave; until a moment, if it named one."""

    certificates: int | None
    orders: int | None
    until: datetime | None


@dataclass(frozen=True, slots=True)
class Refusal:
    """The CA said no (429), and when to ask again: what it then allows is one."""

    at: datetime
    until: datetime


@dataclass(frozen=True, slots=True)
class Bucket:
    """A limit as it stands: there has come one each interval since `empty_at`, or will, where that is still ahead.

    `spent` were taken within the last period. From `changes_at` on one comes each interval of `afterwards`.
    """

    limit: Limit
    empty_at: datetime
    spent: int
    changes_at: datetime | None = None
    afterwards: Limit | None = None

    def left(self, now: datetime) -> int:
        return min(self.limit.count, max(0, (now - self.empty_at) // self.limit.interval))

    def next_at(self, now: datetime) -> datetime | None:
        """When one more is there; None for a full bucket."""
        left = self.left(now)
        return None if left == self.limit.count else self.there_at(left + 1)

    def there_at(self, number: int) -> datetime:
        """When that many are there, if none is taken meanwhile; a full bucket's are counted on."""
        at = self.empty_at + number * self.limit.interval
        if self.changes_at is None or self.afterwards is None or at <= self.changes_at:
            return at
        before = max(0, (self.changes_at - self.empty_at) // self.limit.interval)
        return max(self.changes_at, self.empty_at) + (number - before) * self.afterwards.interval


def fill(limit: Limit, taken: Iterable[datetime], now: datetime, refusal: Refusal | None = None) -> Bucket:
    """How a limit stands after all that was taken in its memory. It is never less than empty, but by a refusal."""
    full = limit.interval * limit.count
    empty_at = now - limit.memory
    times = [at for at in taken if at > empty_at]
    events = [(at, False) for at in times]
    if refusal is not None and refusal.at > empty_at:
        events.append((refusal.at, True))
    for at, is_refusal in sorted(events):
        if is_refusal and refusal is not None:
            empty_at = max(empty_at, refusal.until - limit.interval)
        else:
            empty_at = min(max(empty_at, at - full) + limit.interval, max(empty_at, at))
    return Bucket(limit, max(empty_at, now - full), sum(at > now - limit.period for at in times))


@dataclass(frozen=True, slots=True)
class Budget:
    """What the pool may order. `reserved`: orders under way that will each take a certificate."""

    certificates: Bucket
    orders: Bucket
    reserved: int

    def slot(self, number: int, now: datetime) -> datetime:
        """When the first order of that number may begin, counted from 1."""
        return max(now, self.certificates.there_at(self.reserved + number), self.orders.there_at(number))


def stand(
    limits: Limits,
    grant: Grant | None,
    refusal: Refusal | None,
    *,
    certificates: Iterable[datetime],
    orders: Iterable[datetime],
    reserved: int,
    now: datetime,
) -> Budget:
    """The budget after what was taken: the times of first certificates, and of orders for them."""
    granted = grant_to(limits, grant, now)
    of_orders = refusal is not None and _is_of_orders(refusal, granted)
    found = fill(granted.certificates, certificates, now, None if of_orders else refusal)
    ordered = fill(granted.orders, orders, now, refusal if of_orders else None)
    if grant is not None and grant.until is not None and grant.until > now:
        found = replace(found, changes_at=grant.until, afterwards=limits.certificates)
        ordered = replace(ordered, changes_at=grant.until, afterwards=limits.orders)
    return Budget(found, ordered, reserved)


def grant_to(limits: Limits, grant: Grant | None, now: datetime) -> Limits:
    """The limits that hold now."""
    if grant is None or (grant.until is not None and grant.until <= now):
        return limits
    return replace(
        limits,
        certificates=Limit(grant.certificates or limits.certificates.count, limits.certificates.period),
        orders=Limit(grant.orders or limits.orders.count, limits.orders.period),
    )


def _is_of_orders(refusal: Refusal, limits: Limits) -> bool:
    """Which of the two was empty: its next one comes within an interval. What CAs say of it in words differs."""
    return refusal.until - refusal.at <= min(limits.orders.interval, limits.certificates.interval)


@dataclass(frozen=True, slots=True, order=True)
class Waiting:
    """A server that waits for its first order, in the order in which they go.

    `since` is when its name was in DNS. It cannot go before `ready_at`, when its own name has reached a limit.
    """

    round: int
    since: datetime
    server: int
    member: int
    ready_at: datetime


def next_round(rounds: Sequence[tuple[int, int]], member: int) -> int:
    """The round of one more server of a member, among the members and rounds of those that wait.

    Everybody's first goes before anybody's second: no member holds up the others, however many servers it has.
    """
    own = [number for whose, number in rounds if whose == member]
    first = min((number for _, number in rounds), default=0)
    return max(first, max(own) + 1) if own else first


def plan(waiting: Iterable[Waiting], budget: Budget, now: datetime) -> dict[int, datetime]:
    """When each server's order may begin. One whose own name has to wait lets the others by."""
    later = [(each.ready_at, each) for each in waiting]
    heapq.heapify(later)
    ready: list[Waiting] = []
    starts: dict[int, datetime] = {}
    at = now
    while later or ready:
        at = max(at, budget.slot(len(starts) + 1, now))
        if not ready:
            at = max(at, later[0][0])
        while later and later[0][0] <= at:
            heapq.heappush(ready, heapq.heappop(later)[1])
        starts[heapq.heappop(ready).server] = at
    return starts


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server stands among those that wait for a limit, the first at 1, and when its turn comes."""

    position: int
    waiting: int
    turn_at: datetime
    limit: Limit
