"""Who is a member of a pool now, looked at again each TTL (asyncio).

A pool's answer holds all its listed servers or, of a large pool, a part of them that is drawn anew each TTL
(`nts_core.srv`). So a server that a client uses is a member no longer when

- its name has no addresses any more, by a denial that counts (`nts_core.denial`), or
- the pool's answer has room for more servers, and does not name it. That counts for servers that the pool named itself, and
  not in an answer that nothing proves.

A lookup that fails changes nothing: an outage of DNS is not a removal.
"""

import asyncio
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Protocol

from nts_core.errors import WireError
from nts_core.independence import Candidate
from nts_core.ke import host_of
from nts_core.metadata import Metadata
from nts_core.resolve import Answer, Lookup, Moment, Proof, ResolveError, addresses, listing, metadata
from nts_core.srv import is_own_around, targets_that_fit

# Seconds between two looks, whatever the TTL; and after failures, twice as long each time.
MIN_LOOK, MAX_LOOK = 30.0, 3600.0
MAX_RETRY = 960.0
# Whose the servers are only orders them: it is not waited for as long as an address.
_METADATA_TIMEOUT = 2.0
# There is nothing at the pool's name, which may be meant; its servers' own names tell more.
_NOTHING_LISTED = frozenset({"no-srv", "no-service"})
_NO_HOST = "its name is not that of a host"
_FOREIGN = "it has no name of the pool's, and nothing proves the pool's answer"


class Denier(Protocol):
    """Who tells whether a name is gone."""

    async def deny(self, name: str) -> bool:
        """As `denial.Witnesses.deny`."""


@dataclass(slots=True)
class Look:
    """What one look found.

    `listed` are the servers of the answer in the order of RFC 2782, `others` those asked for that are members and
    not in it, `gone` those that are members no longer. `unusable` says why listed ones cannot be used, `proof` how the
    answer is proved if there is one, `problem` what could not be found out. `again_in` is in seconds.
    """

    listed: list[Candidate] = field(default_factory=list)
    others: list[Candidate] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)
    unusable: dict[str, str] = field(default_factory=dict)
    proof: Proof | None = None
    problem: ResolveError | None = None
    again_in: float = MIN_LOOK


class Membership:
    """One pool's. `lookup` gives what is believed, `denier` what is gone."""

    def __init__(self, pool: str, lookup: Lookup, denier: Denier) -> None:
        self.pool = pool.removesuffix(".").lower()
        self._lookup = lookup
        self._denier = denier
        self._retry = MIN_LOOK
        # What is known of servers, and until when.
        self._facts: dict[str, tuple[Candidate, float]] = {}

    async def look(self, held: Iterable[Candidate], now: datetime | float) -> Look:
        """The members now, and what became of those held. Never raises for what DNS does."""
        moment = now.timestamp() if isinstance(now, datetime) else now
        look = Look()
        answer = _Timed(self._lookup)
        try:
            found = await listing(answer, self.pool, moment)
            targets, look.proof = found.targets, found.proof
            look.unusable = dict.fromkeys(found.refused, _FOREIGN)
            look.unusable |= {each.name: _NO_HOST for each in targets if not _is_host(each.name)}
        except ResolveError as error:
            look.problem, targets = error, ()
        mine = {candidate.name: candidate for candidate in held}
        if look.problem is None or look.problem.code in _NOTHING_LISTED:
            listed = [
                Candidate(target.name, target.port, target.priority)
                for target in targets
                if target.name not in look.unusable
            ]
            others = [mine[name] for name in mine.keys() - {target.name for target in targets}]
            if targets and look.proof is not Proof.UNPROVEN and len(targets) < targets_that_fit(self.pool):
                delisted = {other.name for other in others if is_own_around(other.name, self.pool)}
                look.gone |= delisted
                others = [other for other in others if other.name not in delisted]
            checked = await asyncio.gather(
                *(self._check(each, look, moment, is_held=each.name in mine) for each in (*listed, *others))
            )
            look.listed = [each for each in checked[: len(listed)] if each is not None]
            look.others = [each for each in checked[len(listed) :] if each is not None]
            wanted = {each.name for each in (*look.listed, *look.others)}
            self._facts = {name: facts for name, facts in self._facts.items() if name in wanted}
        if look.problem is None:
            self._retry = MIN_LOOK
            look.again_in = min(max(answer.ttl, MIN_LOOK), MAX_LOOK)
        else:
            look.again_in, self._retry = self._retry, min(2 * self._retry, MAX_RETRY)
        return look

    async def _check(self, server: Candidate, look: Look, now: float, *, is_held: bool) -> Candidate | None:
        """A server with what the zone says of it. Notes in `look` if it is gone, or if nothing can be said."""
        known, until = self._facts.get(server.name, (server, -math.inf))
        if time.monotonic() >= until:
            answer = _Timed(self._lookup)
            found, whose = await asyncio.gather(
                _addresses(answer, server.name, now), self._metadata(server.name, now, known.metadata)
            )
            if isinstance(found, ResolveError):
                look.unusable[server.name] = found.message
                if is_held:
                    await self._check_denial(server.name, look, found)
                return None
            known, until = (
                replace(server, addresses=tuple(found), metadata=whose),
                time.monotonic() + answer.ttl,
            )
            self._facts[server.name] = known, until
        return replace(known, port=server.port, priority=server.priority)

    async def _check_denial(self, name: str, look: Look, error: ResolveError) -> None:
        if error.code != "no-address":
            look.problem = look.problem or error
            return
        try:
            if await self._denier.deny(name):
                look.gone.add(name)
                look.unusable.pop(name, None)
        except ResolveError as unknown:
            look.problem = look.problem or unknown

    async def _metadata(self, name: str, now: float, before: Metadata | None) -> Metadata | None:
        """What the zone says, or if that does not come in time, what it said before."""
        try:
            async with asyncio.timeout(_METADATA_TIMEOUT):
                return await metadata(self._lookup, name, now)
        except TimeoutError:
            return before


def _is_host(name: str) -> bool:
    """DNS allows more names than a certificate can carry."""
    try:
        return host_of(name.encode()) == name
    except (UnicodeEncodeError, WireError):
        return False


async def _addresses(lookup: Lookup, name: str, now: float) -> list[str] | ResolveError:
    """As a value, so that the lookup beside it comes to its end."""
    try:
        return await addresses(lookup, name, now)
    except ResolveError as error:
        return error


class _Timed:
    """A lookup that keeps the least TTL of its answers, in seconds."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self.ttl = MAX_LOOK

    async def lookup(self, owner: str, rdtype: str, now: Moment) -> Answer:
        answer = await self._lookup.lookup(owner, rdtype, now)
        self.ttl = min(self.ttl, answer.ttl)
        return answer
