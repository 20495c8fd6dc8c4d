"""What probes do to a server: stages, admission, scores, holds. What monitors saw is all that counts here.

A probe changes its monitor's view of an address (`poolsvc.views`); all views together are judged (`judge`). The registry's
own monitor goes the same way as every other one. Below the quorum nothing is raised, and states stay as they are.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, Protocol
from urllib.parse import urlsplit

import structlog
from cryptography import x509
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.client import has_route
from nts_core.control import ProbeResult, ServerState, Stage, StageStatus
from nts_core.errors import printable
from nts_core.tls import Trust
from poolsvc import (
    maintenance,
    monitors,
    own_account,
    reviews,
    samples,
    scoring,
    servers,
    troubles,
    verdicts,
    views,
)
from poolsvc.config import Settings, split_endpoint
from poolsvc.db import Database
from poolsvc.lookups import Nameservers
from poolsvc.models import (
    INNER,
    Hold,
    HoldKind,
    Monitor,
    MonitorView,
    Order,
    OrderStatus,
    Server,
    StageRecord,
    ViewRole,
)
from poolsvc.monitors import Council
from poolsvc.notices import NoticeKind
from poolsvc.outbound import Guard
from poolsvc.pool import count_active
from poolsvc.prober import ProbeImpossible, probe, settled
from poolsvc.rounds import Round, Rounds, version_of
from poolsvc.servers import EventKind
from poolsvc.verdicts import FRESH, Verdict
from poolsvc.views import PROBED

_log = structlog.get_logger()
_ACTOR = "prober"
# Of a server, valid at the same time: another one at each probe must not fill the database.
MAX_SEEN = 50
_AT_ONCE = 16  # rounds that are recorded
_SMALL = 10  # servers, from which on the publication looks after how many leave at once
_WAVE = timedelta(minutes=10)
_MOMENT = timedelta(seconds=1)
_ANY = timedelta(microseconds=1)  # later at all: its own rounds are as far apart as it makes them
_NEVER_MIND = timedelta(hours=1)  # for what may not be looked at


async def probe_server(
    database: Database,
    settings: Settings,
    roots: Sequence[x509.Certificate],
    server_id: int,
    now: datetime,
    rounds: Rounds,
) -> None:
    """Probe every proved address of a server once, as the registry's own monitor, and record what was found.

    What has to wait is left in `rounds`.
    """
    async with database.transaction() as session:
        server = await servers.get(session, server_id)
        rows = servers.publishable(server)
        addresses = [row.address for row in rows]
        is_listed = server.state is ServerState.ACTIVE
        good = frozenset(row.address for row in rows if is_listed and scoring.is_good(row.score))
        is_ordered = servers.newest_certificate(server) is not None
        may_have_certificate = is_ordered or own_account.may_order_at(server) is not None
        worth_probing = server.state in servers.NAMED_STATES and may_have_certificate
    if not worth_probing:
        return
    trust, guard = Trust.of(roots, now), Guard(settings)
    nameservers = _nameservers(settings.dns.nameservers)
    begun = rounds.begin(server_id, now, time.monotonic())
    try:
        results = await asyncio.gather(
            *(
                settled(
                    probe(
                        settings.domain_of(server.name),
                        address,
                        settings.ports.ke,
                        trust,
                        own_addresses=frozenset(addresses),
                        guard=guard,
                        is_own=own_account.is_used(server),
                        names=nameservers,
                        spacing=settings.policy.exchange_spacing,
                    ),
                    server.name,
                    address,
                )
                for address in _within_reach(addresses, rounds)
            )
        )
    except (ProbeImpossible, OSError) as error:
        # Our fault is never the member's: the round does not count, and is made up for later.
        _log.error("probe_impossible", server=server.name, detail=str(error))
        return
    rounds.add(Round(begun, time.monotonic(), results, good))
    await settle(database, settings, rounds, time.monotonic())
    if not results or server_id in rounds:
        await _come_back(database, settings, rounds, server_id, now)


def _within_reach(addresses: Iterable[str], rounds: Rounds) -> list[str]:
    """Those that this host can say anything of. Raises OSError."""
    found = []
    for address in addresses:
        version = version_of(address)
        if not rounds.may_look(version):
            continue
        if reaches := has_route(address):
            found.append(address)
        rounds.note_route(version, has_route=reaches)
    return found


async def settle(database: Database, settings: Settings, rounds: Rounds, now: float) -> None:
    """Record the rounds that have waited long enough; one that cannot be recorded keeps no other back."""
    ready, failures = rounds.ready(now), []
    for first in range(0, len(ready), _AT_ONCE):
        some = (_take(database, settings, one, now) for one in ready[first : first + _AT_ONCE])
        outcomes = await asyncio.gather(*some, return_exceptions=True)
        failures += [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    if failures:
        raise ExceptionGroup("rounds were not recorded", failures)


async def _take(database: Database, settings: Settings, one: Round, now: float) -> None:
    begun = one.begun
    moment = begun.at + timedelta(seconds=now - begun.began)
    async with database.transaction() as session:
        server = await servers.get(session, begun.server_id)
        await record(session, settings, server, one.results, moment, at=begun.at)


async def _come_back(
    database: Database, settings: Settings, rounds: Rounds, server_id: int, now: datetime
) -> None:
    """Look again at a server whose round waits, or found nothing; not before it could be recorded, which sets the time itself."""
    wait = 2 * settings.policy.probe_interval
    wait += 2 * settings.monitor.check_interval if settings.monitor.references else 0
    is_waiting = server_id in rounds
    async with database.transaction() as session:
        server = await servers.get(session, server_id)
        is_recorded = is_waiting and server_id not in rounds
        if server.state in servers.NAMED_STATES and not is_recorded:
            server.probe_due_at = now + timedelta(seconds=wait)


@cache
def _nameservers(endpoints: tuple[str, ...]) -> Nameservers:
    """One for all probes: it knows which of them are silent."""
    return Nameservers([split_endpoint(endpoint) for endpoint in endpoints])


async def record(
    session: AsyncSession,
    settings: Settings,
    server: Server,
    results: Sequence[ProbeResult],
    now: datetime,
    monitor: Monitor | None = None,
    at: datetime | None = None,
) -> None:
    """Let one round of probes of a server by one monitor, the registry's own if none is named, take effect.

    `at` is when it began, if that is not now.
    """
    at = at or now
    if server.state not in servers.NAMED_STATES or not results:
        return
    by = monitor or await monitors.inner(session)
    if by.status not in monitors.WORKING or not monitors.is_sound(by):
        return
    standing = await monitors.council(session, settings, now)
    found = await views_of(session, server)
    # A probe that was on its way when the maintenance began does not end it.
    hold = servers.held(server, HoldKind.MAINTENANCE)
    began = at if hold is None else max(at, hold.set_at)
    is_exempt = await maintenance.is_under_way(session, server, began)
    by_address = {row.address: row for row in server.addresses}
    for result in results:
        row = by_address.get(result.address)
        if row is None:
            continue
        view = next((view for view in found.get(row.id, ()) if view.monitor_id == by.id), None)
        if view is None:
            view = MonitorView(
                address_id=row.id,
                monitor_id=by.id,
                role=ViewRole.ACTIVE,
                role_since=now,
                full_probes=0,
                points=0,
            )
            session.add(view)
            found[row.id].append(view)
        if view.at is not None and not views.is_later(view.at, at, _ANY, now):
            continue
        after = views.after(view, result, at, standing.measure, begins_with=row.score, is_exempt=is_exempt)
        for name, value in after.items():
            setattr(view, name, value)
        session.add(samples.sample(row.id, by.name, result, after["step"], view.score, at))
    if by.id in standing.own:
        await note_certificates(session, server, results, now)
    await judge(session, settings, server, standing, found, now)
    if by.name == INNER:
        server.probe_due_at = _next_round(settings, server, found, by, at, now)


def _next_round(
    settings: Settings,
    server: Server,
    found: Mapping[int, Sequence[MonitorView]],
    by: Monitor,
    at: datetime,
    now: datetime,
) -> datetime:
    """When the registry's own monitor looks again: as the policy says while it is alone, or a server waits for it."""
    everything = [view for some in found.values() for view in some]
    alone = {view.monitor_id for view in everything if view.role is ViewRole.ACTIVE} <= {by.id}
    if alone or server.state in (ServerState.VERIFIED, ServerState.CERTIFIED):
        return at + timedelta(seconds=settings.policy.probe_interval)
    server.probe_due_at = None
    return reviews.next_due(settings, by.id, server, everything, now) or now + _NEVER_MIND


async def views_of(session: AsyncSession, server: Server) -> dict[int, list[MonitorView]]:
    """What monitors last saw of each address of a server, which is locked."""
    rows = await session.scalars(
        select(MonitorView)
        .where(MonitorView.address_id.in_([row.id for row in server.addresses]))
        .execution_options(populate_existing=True)
    )
    found: dict[int, list[MonitorView]] = defaultdict(list)
    for view in rows:
        found[view.address_id].append(view)
    return found


async def judge_due(database: Database, settings: Settings, server_id: int, now: datetime) -> None:
    """Judge a server by the views that there are."""
    async with database.transaction() as session:
        server = await servers.get(session, server_id)
        server.judge_due_at = None
        if server.state in servers.NAMED_STATES:
            standing = await monitors.council(session, settings, now)
            await judge(session, settings, server, standing, await views_of(session, server), now)


@dataclass(frozen=True, slots=True)
class Judged:
    """What the views of one address come to; `row` is the address's, or has its columns.

    `speaking` are those that count and are fresh, `own` the fresh ones of the pool's own monitors, the newest last.
    """

    row: Any
    verdict: Verdict
    shadow: float | None
    is_heard: bool  # enough parties have looked at it
    is_admitted: bool  # it is new, and they would let it in
    is_silent: bool
    full_probes: int
    speaking: Sequence[Any]
    own: Sequence[Any]
    known_until: datetime | None  # without another probe
    unseen: str | None  # why no quorum can look at it
    is_own_seen: bool  # one of the pool's own has looked, or can

    @property
    def is_seen(self) -> bool:
        """Whether it is looked at, or could be; otherwise it has no part in what becomes of its server."""
        return self.unseen is None or self.is_heard

    @property
    def may_change(self) -> bool:
        """Whether enough is known of it to change anything."""
        return self.verdict.is_known or (self.row.score is None and self.is_heard)


def judged(row: Any, found: Iterable[Any], standing: Council, now: datetime) -> Judged:
    """Pure: changes nothing."""
    everything = list(found)
    standing = standing.at(everything)
    seen = sorted(
        (view for view in everything if view.at is not None), key=lambda view: (view.at, view.monitor_id)
    )
    pairs = [(view, standing.view(view)) for view in seen]
    said = [each for _, each in pairs if each.is_active]
    speaking = [(view, each) for view, each in pairs if each.is_active and each.is_fresh(now)]
    number = standing.quorum.number
    own = [view for view, _ in pairs if view.monitor_id in standing.own and now - view.at <= FRESH]
    known_until: dict[int, datetime] = {}
    full: dict[int, int] = defaultdict(int)
    for view, each in speaking:
        known_until[each.party] = max(known_until.get(each.party, now), view.at + each.lasts)
        full[each.party] = max(full[each.party], each.full_probes)
    is_heard = len(known_until) >= number
    shadow = standing.shadow
    return Judged(
        row=row,
        verdict=verdicts.overall(said, standing.quorum, now, standing.scorer),
        shadow=None if shadow is None else _by_shadow(speaking, said, standing, shadow, now),
        is_heard=is_heard,
        is_admitted=row.score is None and _is_admitted(said, standing, now),
        is_silent=verdicts.is_silent(said, standing.quorum, now),
        full_probes=sorted(full.values(), reverse=True)[number - 1] if is_heard else 0,
        speaking=[view for view, _ in speaking],
        own=own,
        known_until=sorted(known_until.values(), reverse=True)[number - 1] if is_heard else None,
        unseen=standing.why_unseen(row.address),
        is_own_seen=bool(own) or version_of(row.address) in standing.own_families,
    )


def _by_shadow(
    speaking: Sequence[tuple[Any, verdicts.View]],
    said: Sequence[verdicts.View],
    standing: Council,
    shadow: verdicts.Scorer,
    now: datetime,
) -> float | None:
    """The score by the scorer on trial: of what it makes of every probe."""
    own = {view.monitor_id: view.shadow_score for view, _ in speaking}
    scored = [replace(each, score=own.get(each.monitor, each.score)) for each in said]
    return verdicts.overall(scored, standing.quorum, now, shadow).score


def _is_admitted(said: Sequence[verdicts.View], standing: Council, now: datetime) -> bool:
    """A quorum admits it, and all that look together would keep it."""
    if not verdicts.admits(said, standing.quorum, now):
        return False
    scored = [replace(view, score=verdicts.first_score(view)) for view in said]
    return scoring.is_good(verdicts.overall(scored, standing.quorum, now, standing.scorer).score)


async def judge(
    session: AsyncSession,
    settings: Settings,
    server: Server,
    standing: Council,
    found: Mapping[int, Sequence[MonitorView]],
    now: datetime,
) -> None:
    """Bring a server, which is locked, in step with what monitors see of its addresses."""
    published = servers.published_addresses(server)
    everything = [judged(row, found.get(row.id, ()), standing, now) for row in server.addresses]
    for each in everything:
        _note(each, now)
    proved = set(map(id, servers.publishable(server)))
    current = [each for each in everything if id(each.row) in proved]
    _record_stages(server, current, now)
    _confirm(server, current)
    _note_seen(server, current, now)
    await _tell_withdrawn(session, server, published, now)
    if standing.is_met:
        await _end_maintenance(session, server, current, now)
    if server.state is ServerState.VERIFIED and standing.is_met and _is_certified(server, current):
        await servers.apply(
            session,
            server,
            EventKind.CERTIFICATE_SEEN,
            actor=_ACTOR,
            reason="every address serves a certificate that it should have",
            now=now,
        )
    if server.state in (ServerState.ACTIVE, ServerState.SUSPENDED):
        await _hold_or_lift(session, server, settings, standing, current, found, now)
    await _judge_certificate(session, server, current, now)
    if server.state is ServerState.CERTIFIED and _admissible(server, current):
        await _admit(session, server, standing, current, found, now)
    server.judge_due_at = next_look(everything, now)


def next_look(everything: Iterable[Judged], now: datetime) -> datetime | None:
    """When what is known of a server gets too old, if nobody looks before."""
    ends = [each.known_until for each in everything if each.known_until is not None]
    return max(min(ends), now) + _MOMENT if ends else None


def _note(each: Judged, now: datetime) -> None:
    """What the views of an address come to, in its row."""
    row, verdict = each.row, each.verdict
    if each.speaking:
        row.step_reason = deciding(each).step_reason
    if row.score is None:
        row.unknown = None if each.is_seen else each.unseen
        if each.speaking:
            row.full_probes = each.full_probes
        return
    row.shadow_score = each.shadow
    if verdict.is_known:
        row.score, row.judged_at, row.unknown = verdict.score, now, None
    else:
        row.unknown = verdict.reason[:200]


def deciding(each: Judged) -> Any:
    """Of the views that count the one whose score is the address's, or else the last."""
    return next(
        (view for view in reversed(each.speaking) if view.score == each.verdict.score), each.speaking[-1]
    )


class _Shown(Protocol):
    """What was seen of a certificate: a result or a view."""

    @property
    def fingerprint(self) -> str | None: ...
    @property
    def failed(self) -> Stage | None: ...


def is_ours(server: Server, result: _Shown) -> bool:
    """Whether the certificate is one that the server should have.

    Where the member's own account orders, one need only be valid for the server's name, and for no other, which the probe
    has checked: CAA lets nobody but that account have one.
    """
    if own_account.is_used(server):
        return result.fingerprint is not None and result.failed is not Stage.CERTIFICATE
    return result.fingerprint in servers.fingerprints(server)


def _is_certified(server: Server, current: Sequence[Judged]) -> bool:
    """Whether one of the pool's own has seen a right certificate at every address that it can see."""
    seen = [each for each in current if each.is_own_seen]
    return bool(seen) and all(each.own and is_ours(server, each.own[-1]) for each in seen)


async def note_certificates(
    session: AsyncSession, server: Server, results: Sequence[ProbeResult], now: datetime
) -> None:
    """What one of the pool's own monitors saw of certificates."""
    if own_account.is_used(server):
        _note_certificates(server, results, now)
    else:
        await _tell_not_ordered(session, server, results, now)


def _note_certificates(server: Server, results: Sequence[ProbeResult], now: datetime) -> None:
    """What is seen of certificates that the registry did not order: when they end, and what revokes them at a removal."""
    ca = None if server.own_account_uri is None else urlsplit(server.own_account_uri).netloc
    for order in server.orders:
        if order.url is None and order.not_after is not None and order.not_after <= now:
            order.chain = None
    for result in results:
        known = {order.fingerprint: order for order in server.orders}
        if result.fingerprint is None:
            continue
        if (seen := known.get(result.fingerprint)) is not None:
            # One that was seen before copies were kept has none.
            seen.ca, seen.chain = seen.ca or ca, seen.chain or result.leaf
            continue
        if sum(order.not_after is None or order.not_after > now for order in server.orders) >= MAX_SEEN:
            _log.warning("certificate_not_kept", server=server.name, fingerprint=result.fingerprint)
            continue
        order = Order(
            server_id=server.id,
            status=OrderStatus.ISSUED,
            created_at=now,
            issued_at=now,
            ca=ca,
            chain=result.leaf,
            fingerprint=result.fingerprint,
            serial=result.serial,
            not_before=_moment(result.not_before),
            not_after=_moment(result.not_after),
        )
        server.orders.append(order)


async def _tell_not_ordered(
    session: AsyncSession, server: Server, results: Sequence[ProbeResult], now: datetime
) -> None:
    """CAA should have kept every CA from it: somebody else can prove control of the name, or a CA did not look."""
    ordered = {order.fingerprint for order in server.orders}
    for result in results:
        if result.fingerprint is not None and result.fingerprint not in ordered:
            await troubles.tell_not_ordered(session, server, result, now)


def _note_seen(server: Server, current: Sequence[Judged], now: datetime) -> None:
    """Each address that can be seen works with one certificate: the agent need not keep the one before it."""
    shown = [each.own[-1] for each in current if each.own]
    seen = {view.fingerprint for view in shown}
    if (
        len(shown) < sum(each.is_own_seen for each in current)
        or len(seen) > 1
        or any(view.failed is not None for view in shown)
    ):
        return
    for order in server.orders:
        if order.fingerprint is not None and order.fingerprint in seen and order.seen_at is None:
            order.seen_at = now


def _moment(seconds: int | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def _confirm(server: Server, current: Sequence[Judged]) -> None:
    """Who has the certificate's key at an address has the address: as good as another proof."""
    for each in current:
        for view in each.own:
            if view.at is not None and is_ours(server, view):
                before = each.row.confirmed_at
                each.row.confirmed_at = view.at if before is None else max(before, view.at)


def _record_stages(server: Server, current: Sequence[Judged], now: datetime) -> None:
    """The worst address speaks for the server, and for an address most of those who look at it.

    A stage is met when it is met on all addresses.
    """
    failures = [(*views.first_failure(each.speaking), each.row.address) for each in current if each.speaking]
    if not failures:
        return
    first, text, address = min(failures, key=lambda failure: failure[0])
    known = {row.stage: row for row in server.stages}
    for position, stage in enumerate(PROBED):
        if position < first:
            status, detail = StageStatus.MET, ""
        elif position == first:
            status, detail = StageStatus.FAILED, printable(f"{address}: {text}")[:300]
        else:
            status, detail = StageStatus.WAITING, ""
        row = known.get(stage)
        if row is None:
            row = StageRecord(server_id=server.id, stage=stage, status=status, since=now, detail=detail)
            server.stages.append(row)
        elif row.status is not status:
            row.status, row.since = status, now
        row.detail = detail


async def _tell_withdrawn(
    session: AsyncSession, server: Server, published: Sequence[str], now: datetime
) -> None:
    """Tell of each address that its score takes out of DNS while another one serves."""
    left = servers.published_addresses(server)
    for row in server.addresses:
        if row.address in published and row.address not in left and row.score is not None:
            reason = f"score {row.score:.1f}, {row.step_reason}"
            await servers.tell(
                session, server, NoticeKind.ADDRESS_WITHDRAWN, now=now, address=row.address, reason=reason
            )


def _admissible(server: Server, current: Sequence[Judged]) -> bool:
    """By the families that a quorum can see; of the others an address comes in by itself, once it can be seen."""
    seen = [each for each in current if each.is_seen]
    return bool(seen) and all(each.is_admitted for each in seen) and not servers.open_holds(server)


async def _admit(
    session: AsyncSession,
    server: Server,
    standing: Council,
    current: Sequence[Judged],
    found: Mapping[int, Sequence[MonitorView]],
    now: datetime,
) -> None:
    for each in current:
        if each.is_admitted:
            _admit_address(each, found[each.row.id], standing, now)
    quorum = standing.quorum
    whose = "bootstrap quorum" if quorum.is_bootstrap else f"a quorum of {quorum.number}"
    await servers.apply(
        session,
        server,
        EventKind.NTS_CONFIRMED,
        actor=_ACTOR,
        reason=f"{quorum.probes} full probes in a row ({whose})",
        now=now,
    )
    _log.info("server_admitted", server=server.name)


def _admit_address(each: Judged, found: Iterable[MonitorView], standing: Council, now: datetime) -> None:
    """Let every monitor's score of it begin."""
    everything = list(found)
    standing = standing.at(everything)
    for view in everything:
        if view.score is None and view.at is not None:
            view.score = verdicts.first_score(standing.view(view))
    said = [standing.view(view) for view in each.speaking]
    verdict = verdicts.overall(said, standing.quorum, now, standing.scorer)
    each.row.score, each.row.judged_at = verdict.score, now


async def _end_maintenance(
    session: AsyncSession, server: Server, current: Sequence[Judged], now: datetime
) -> None:
    """After maintenance: a server whose score is bad is held for that, one with a full probe for nothing any more."""
    hold = servers.held(server, HoldKind.MAINTENANCE)
    if hold is None or await maintenance.is_under_way(session, server, max(now, hold.set_at)):
        return
    ended = await maintenance.ended_at(session, server, now)
    scores = [each.row.score for each in current if each.row.score is not None]
    if scores and max(scores) < scoring.CUTOFF:
        reason = _why_low(server, max(scores))
        await servers.set_hold(session, server, HoldKind.SCORE, reason=reason, actor=_ACTOR, now=now)
    elif not any(_is_good_since(view, ended) for each in current for view in each.speaking):
        return
    over = "the maintenance is over"
    await servers.lift_hold(session, server, HoldKind.MAINTENANCE, reason=over, actor=_ACTOR, now=now)


def _is_good_since(view: MonitorView, since: datetime | None) -> bool:
    """Whether its last probe was a full one, and began later."""
    is_full = view.failed is None and view.step is not None and view.step >= scoring.FULL_STEP
    return is_full and _is_since(view, since)


def _why_low(server: Server, score: float | None) -> str:
    failed = servers.first_failure(server)
    low = "no address is admitted yet" if score is None else f"score {score:.1f}"
    return low + (f", {failed.stage}: {failed.detail}" if failed else "")


async def _hold_or_lift(
    session: AsyncSession,
    server: Server,
    settings: Settings,
    standing: Council,
    current: Sequence[Judged],
    found: Mapping[int, Sequence[MonitorView]],
    now: datetime,
) -> None:
    is_known = any(each.may_change for each in current)
    for each in current:
        # An address proved after the server's admission is admitted by itself.
        if each.row.score is None and each.is_admitted:
            _admit_address(each, found[each.row.id], standing, now)
    seen = [each for each in current if each.is_seen or each.speaking]
    is_silent = bool(seen) and all(each.is_silent for each in seen)
    if not is_silent and not is_known:
        return
    # What was never admitted speaks for nobody: a member could change to a dead address otherwise.
    best = max((each.row.score for each in current if each.row.score is not None), default=None)
    if best is None or best < scoring.CUTOFF or is_silent:
        await _hold(session, server, settings, best, now)
    elif server.state is ServerState.SUSPENDED:
        await servers.lift_hold(
            session, server, HoldKind.SCORE, reason="the score is good again", actor=_ACTOR, now=now
        )


async def _hold(
    session: AsyncSession, server: Server, settings: Settings, best: float | None, now: datetime
) -> None:
    is_back_soon = servers.held(server, HoldKind.CERTIFICATE) is not None
    if servers.held(server, HoldKind.SCORE) or (server.state is ServerState.SUSPENDED and not is_back_soon):
        return
    # Scores alone never shrink the answer below the pool's opening size, nor by much at once: that is an alarm instead.
    active = await count_active(session, limit=settings.policy.opening_size + _SMALL)
    if active <= settings.policy.opening_size or await _is_wave(session, active, now):
        _log.error("pool_alarm_too_few_servers", server=server.name, score=best)
        return
    reason = _why_low(server, best)
    if scoring.is_good(best):
        reason = f"silent for {verdicts.SILENT // timedelta(minutes=1)} minutes to every monitor that looks"
    await servers.set_hold(session, server, HoldKind.SCORE, reason=reason, actor=_ACTOR, now=now)
    _log.warning("server_suspended", server=server.name, reason=reason)


async def _is_wave(session: AsyncSession, active: int, now: datetime) -> bool:
    """Whether more than 30 % of a small pool would have fallen within ten minutes; one server alone never is.

    Of a larger one the publication keeps those that fall too many at once, until an operator has looked.
    """
    if active >= _SMALL:
        return False
    late = select(func.count()).where(Hold.kind == HoldKind.SCORE, Hold.set_at > now - _WAVE)
    fallen = await session.scalar(late) or 0
    return fallen > 0 and (fallen + 1) * 100 > 30 * (active + fallen)


async def _judge_certificate(
    session: AsyncSession, server: Server, current: Sequence[Judged], now: datetime
) -> None:
    """A server whose newest certificate has ended can serve nobody, however few others there are.

    It is back when one of the pool's own sees one that it should have; its score may then hold it still.
    """
    kind, newest = HoldKind.CERTIFICATE, servers.newest_certificate(server)
    hold = servers.held(server, kind)
    ended = None if newest is None or newest.not_after is None or newest.not_after > now else newest.not_after
    # What was seen before one ended, or before the hold, says nothing of now.
    moments = [ended, None if hold is None else hold.set_at]
    since = max((moment for moment in moments if moment is not None), default=None)
    shown = [view for each in current for view in each.own if _is_since(view, since)]
    if any(is_ours(server, view) for view in shown):
        reason = "a valid certificate is seen again"
        await servers.lift_hold(session, server, kind, reason=reason, actor=_ACTOR, now=now)
    elif ended is not None:
        reason = f"the newest certificate ended on {ended:%Y-%m-%d %H:%M} UTC"
        await servers.set_hold(session, server, kind, reason=reason, actor="worker", now=now)


def _is_since(view: MonitorView, since: datetime | None) -> bool:
    return since is None or (view.at is not None and view.at >= since)
