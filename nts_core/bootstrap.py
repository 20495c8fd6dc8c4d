"""The time for a host whose clock is wrong, from a pool (RFC 8915 section 8.5; asyncio).

Signatures and certificates hold at certain times, and the time is what we ask for. The way out of that circle:

1. Signatures are accepted that were all valid at one moment since the floor, which is certainly past: the last recorded
   time or, if that is later, the one at which this program was made. So are certificates. What had ended by the floor
   is refused.
2. Servers of at least OPERATORS operators agree, a majority of those asked. An operator has one vote.
3. At the time that they tell, everything is checked again: it must not be before the floor, the signatures of step 1 must
   hold then, the pool's records are asked for anew, and each server must be a member by them with a good certificate.

So who replays a zone of the past needs the keys of three of its operators, of certificates that ended after the floor.
Where the zone names no operators, servers in different networks count as such; `Bootstrap.shortcuts` says so, as it says
everything that was not checked at a known time at first. Nothing sets the clock.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from cryptography import x509

from nts_core import select
from nts_core.client import ClientError, Established, Failure, establish_any, measure
from nts_core.errors import CertificateError
from nts_core.independence import Candidate, choose, prefix_of
from nts_core.kernel import steady_ns
from nts_core.membership import Membership
from nts_core.resolve import Lookup, Proof, ResolveError, SrvTarget, Window, addresses, listing, metadata
from nts_core.select import Estimate
from nts_core.tls import Trust

# Who must agree.
OPERATORS = 3
# Servers that are asked.
COUNT = 8
_SAMPLES = 4
_METADATA_TIMEOUT = 2.0
_SECOND = 1_000_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_REMEDY = "set this host's clock to within a day, then try again"


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """The time found, in nanoseconds: `truth` is what to add to `kernel.steady_ns` for the time since 1970.

    It is no more than `error` wrong, if most of the operators asked are right. `sources` are the servers that it is of, one
    of an operator; `shortcuts` say in sentences what was at first not checked at a known time.
    """

    truth: int
    error: int
    sources: tuple[str, ...]
    shortcuts: tuple[str, ...]

    @property
    def unix(self) -> int:
        """The time now, in nanoseconds since 1970."""
        return steady_ns() + self.truth


@dataclass(frozen=True, slots=True)
class _Vote:
    """What one server claims: the truth minus the clock that is never set."""

    candidate: Candidate
    established: Established
    claim: Estimate


async def bootstrap(
    pool: str,
    lookup: Lookup,
    roots: Sequence[x509.Certificate],
    floor: datetime,
    *,
    count: int = COUNT,
) -> Bootstrap:
    """Find the time, asking `count` servers of the pool. Raises ClientError, which says why there is none.

    `lookup` must validate here: whoever else validates does it by a clock that we do not know.
    """
    window, troubles = Window(floor.timestamp()), dict[str, str]()
    candidates = await _members(pool, lookup, window, troubles)
    # Of all moments one at which the signatures hold.
    trust = Trust.of(roots, max(floor, _datetime(round(window.since * _SECOND))), floor)
    asked = await asyncio.gather(*(_ask(each, trust, troubles) for each in choose(candidates, count)))
    votes = [vote for vote in asked if vote is not None]
    has_operators = any(candidate.metadata is not None for candidate in candidates)
    ballot = _by_operator(votes, has_operators=has_operators)
    chosen = select.select([vote.claim for vote in ballot])
    agreeing = [ballot[index] for index in sorted(chosen.truechimers)]
    if chosen.offset is None or len(agreeing) < OPERATORS:
        raise _too_few(len(agreeing), troubles, "agree on a time")
    found = steady_ns() + chosen.offset
    _check_time(found, floor, window)
    confirmed = await _confirmed(pool, lookup, roots, agreeing, found, troubles)
    still = _by_operator(confirmed, has_operators=has_operators)
    last = select.select([vote.claim for vote in still])
    sources = tuple(still[index].candidate.name for index in sorted(last.truechimers))
    if last.offset is None or len(sources) < OPERATORS or 2 * len(sources) <= len(ballot):
        raise _too_few(len(sources), troubles, f"are confirmed at the time that they tell, {_text(found)}")
    error = max(abs(bound - last.offset) for bound in last.interval)
    return Bootstrap(last.offset, error, sources, _shortcuts(floor, has_operators=has_operators))


async def _members(pool: str, lookup: Lookup, window: Window, troubles: dict[str, str]) -> list[Candidate]:
    """The pool's servers, as of some moment in the window, which is narrowed."""
    try:
        found = await listing(lookup, pool, window)
    except ResolveError as error:
        raise ClientError(Failure.DNS, error.message, error.remedy) from None
    if found.proof is not Proof.PROVEN:
        raise ClientError(
            Failure.CLOCK,
            "without validation here the pool's records may be of any time",
            f"validate them (--dnssec require), or {_REMEDY}",
        )
    known = await asyncio.gather(*(_candidate(each, lookup, window, troubles) for each in found.targets))
    return [candidate for candidate in known if candidate is not None]


async def _candidate(
    target: SrvTarget, lookup: Lookup, window: Window, troubles: dict[str, str]
) -> Candidate | None:
    try:
        where = await addresses(lookup, target.name, window)
    except ResolveError as error:
        troubles[target.name] = error.message
        return None
    whose = None
    try:
        async with asyncio.timeout(_METADATA_TIMEOUT):
            whose = await metadata(lookup, target.name, window)
    except TimeoutError:
        troubles[target.name] = "what the zone says of it did not come in time"
    return Candidate(target.name, target.port, target.priority, tuple(where), whose)


async def _ask(candidate: Candidate, trust: Trust, troubles: dict[str, str]) -> _Vote | None:
    try:
        established = await establish_any(candidate.name, list(candidate.addresses), candidate.port, trust)
        samples = (await measure(established, _SAMPLES)).samples
    except ClientError as error:
        troubles[candidate.name] = error.message
        return None
    if (reason := select.unfit(select.best(samples))) is not None:
        troubles[candidate.name] = reason
        return None
    # Somebody may set the system's clock meanwhile.
    base = time.time_ns() - steady_ns()
    claim = select.estimate(samples)
    return _Vote(candidate, established, replace(claim, offset=claim.offset + base))


def _by_operator(votes: Sequence[_Vote], *, has_operators: bool) -> list[_Vote]:
    """One vote of each. Of whom nothing is known has none where others are named, as it may be one of these."""
    first: dict[str, _Vote] = {}
    for vote in votes:
        known = vote.candidate.metadata
        if not has_operators:
            first.setdefault(prefix_of(vote.established.address), vote)
        elif known is not None:
            first.setdefault(known.operator, vote)
    return list(first.values())


def _check_time(found: int, floor: datetime, window: Window) -> None:
    """The time found against what is known of it without asking anybody. Raises ClientError."""
    if _datetime(found) < floor:
        raise ClientError(
            Failure.CLOCK,
            f"the servers agree on {_text(found)}, before {floor:%Y-%m-%d %H:%M:%S} UTC, which is certainly past",
            f"do not trust these servers; {_REMEDY}",
        )
    if not window.admits(found / _SECOND, found / _SECOND):
        raise ClientError(
            Failure.CLOCK,
            f"the signatures that led to the servers are not valid at the time that these tell, {_text(found)}",
            f"the pool's records may be old ones that somebody replays; {_REMEDY}",
        )


class _Nobody:
    """Who confirms no removal: one that is not confirmed to be a member counts for nothing here anyway."""

    async def deny(self, name: str) -> bool:  # noqa: ARG002 - a Denier's
        return False


async def _confirmed(
    pool: str,
    lookup: Lookup,
    roots: Sequence[x509.Certificate],
    votes: Sequence[_Vote],
    found: int,
    troubles: dict[str, str],
) -> list[_Vote]:
    """Those that the pool's records of the time found name as they are, with a certificate that is good then."""
    look = await Membership(pool, lookup, _Nobody()).look([vote.candidate for vote in votes], found / _SECOND)
    if look.problem is not None:
        troubles[pool] = look.problem.message
    members = {candidate.name: candidate for candidate in (*look.listed, *look.others)}
    trust, confirmed = Trust.of(roots, _datetime(found)), []
    for vote in votes:
        name = vote.candidate.name
        member = members.get(name)
        if member is None or vote.established.address not in member.addresses:
            troubles.setdefault(name, "it is not a member, or not at that address, at the time found")
            continue
        try:
            trust.verify(name, vote.established.chain)
        except CertificateError as error:
            troubles[name] = str(error)
            continue
        confirmed.append(replace(vote, candidate=member))
    return confirmed


def _shortcuts(floor: datetime, *, has_operators: bool) -> tuple[str, ...]:
    since = f"as of any time since {floor:%Y-%m-%d %H:%M:%S} UTC, and checked again at the time found"
    sentences = [
        f"the signatures of the pool's records were first accepted {since}",
        f"certificates were first accepted {since}",
    ]
    if not has_operators:
        sentences.append(
            "the pool does not say who operates its servers: each network was counted as an operator"
        )
    return tuple(sentences)


def _too_few(count: int, troubles: Mapping[str, str], what: str) -> ClientError:
    reasons = [f"{name}: {why}" for name, why in troubles.items()]
    return ClientError(
        Failure.CLOCK,
        "; ".join([f"servers of {count} operators {what}, and {OPERATORS} are needed", *reasons]),
        _REMEDY,
    )


def _datetime(unix: int) -> datetime:
    return _EPOCH + timedelta(microseconds=unix // 1000)


def _text(unix: int) -> str:
    return f"{_datetime(unix):%Y-%m-%d %H:%M:%S} UTC"
