"""What probes do to a server: stages, admission, scores, holds. The prober's word is all that counts here."""

import asyncio
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from urllib.parse import urlsplit

import structlog
from cryptography import x509
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.control import ProbeResult, ServerState, Stage, StageStatus
from nts_core.errors import printable
from nts_core.tls import Trust
from poolsvc import maintenance, own_account, samples, scoring, servers, troubles
from poolsvc.config import Settings, split_endpoint
from poolsvc.db import Database
from poolsvc.lookups import Nameservers
from poolsvc.models import HoldKind, Order, OrderStatus, SampleRecord, Server, StageRecord
from poolsvc.notices import NoticeKind
from poolsvc.outbound import Guard
from poolsvc.pool import count_active
from poolsvc.prober import ProbeImpossible, probe, settled
from poolsvc.servers import EventKind

_log = structlog.get_logger()
_ACTOR = "prober"
# Of a server, valid at the same time: another one at each probe must not fill the database.
MAX_SEEN = 50
_PROBED = tuple(Stage)[tuple(Stage).index(Stage.TCP) : tuple(Stage).index(Stage.OFFSET) + 1]


async def probe_server(
    database: Database, settings: Settings, roots: Sequence[x509.Certificate], server_id: int, now: datetime
) -> None:
    """Probe every proved address of a server once, and record what was found."""
    async with database.transaction() as session:
        server = await servers.get(session, server_id)
        addresses = [row.address for row in servers.publishable(server)]
        is_ordered = servers.newest_certificate(server) is not None
        may_have_certificate = is_ordered or own_account.may_order_at(server) is not None
        worth_probing = server.state in servers.NAMED_STATES and may_have_certificate
    if not worth_probing:
        return
    trust, guard = Trust.of(roots, now), Guard(settings)
    nameservers = _nameservers(settings.dns.nameservers)
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
                for address in addresses
            )
        )
    except ProbeImpossible as error:
        # Our fault is never the member's: the round does not count, and is made up for later.
        _log.error("probe_impossible", server=server.name, detail=str(error))
        return
    async with database.transaction() as session:
        server = await servers.get(session, server_id)
        await record(session, settings, server, results, now)


@cache
def _nameservers(endpoints: tuple[str, ...]) -> Nameservers:
    """One for all probes: it knows which of them are silent."""
    return Nameservers([split_endpoint(endpoint) for endpoint in endpoints])


async def record(
    session: AsyncSession, settings: Settings, server: Server, results: Sequence[ProbeResult], now: datetime
) -> None:
    """Let one round of probes of a server take effect."""
    if server.state not in servers.NAMED_STATES or not results:
        return
    _record_stages(server, results, now)
    published = servers.published_addresses(server)
    _confirm(server, results, now)
    if own_account.is_used(server):
        _note_certificates(server, results, now)
    else:
        await _tell_not_ordered(session, server, results, now)
    _note_seen(server, results, now)
    # A probe that was on its way when the maintenance began does not end it.
    hold = servers.held(server, HoldKind.MAINTENANCE)
    is_exempt = await maintenance.is_under_way(
        session, server, now if hold is None else max(now, hold.set_at)
    )
    session.add_all(_score(server, settings, results, now, is_exempt=is_exempt))
    await _tell_withdrawn(session, server, published, now)
    if hold is not None and not is_exempt:
        await _end_maintenance(session, server, settings, results, now)
    if server.state is ServerState.VERIFIED and all(is_ours(server, result) for result in results):
        await servers.apply(
            session,
            server,
            EventKind.CERTIFICATE_SEEN,
            actor=_ACTOR,
            reason="every address serves a certificate that it should have",
            now=now,
        )
    if server.state in (ServerState.ACTIVE, ServerState.SUSPENDED):
        await _hold_or_lift(session, server, settings, now)
    await _judge_certificate(session, server, results, now)
    if server.state is ServerState.CERTIFIED and _admissible(server, settings):
        await _admit(session, server, settings, now)
    server.probe_due_at = now + timedelta(seconds=settings.policy.probe_interval)


def is_ours(server: Server, result: ProbeResult) -> bool:
    """Whether the certificate is one that the server should have.

    Where the member's own account orders, one need only be valid for the server's name, and for no other, which the probe
    has checked: CAA lets nobody but that account have one.
    """
    if own_account.is_used(server):
        return result.fingerprint is not None and result.failed is not Stage.CERTIFICATE
    return result.fingerprint in servers.fingerprints(server)


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


def _note_seen(server: Server, results: Sequence[ProbeResult], now: datetime) -> None:
    """Each address works with one certificate: the agent need not keep the one before it."""
    seen = {result.fingerprint for result in results}
    if len(seen) > 1 or any(result.failed is not None for result in results):
        return
    for order in server.orders:
        if order.fingerprint is not None and order.fingerprint in seen and order.seen_at is None:
            order.seen_at = now


def _moment(seconds: int | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def _confirm(server: Server, results: Sequence[ProbeResult], now: datetime) -> None:
    """Who has the certificate's key at an address has the address: as good as another proof."""
    seen = {result.address for result in results if is_ours(server, result)}
    for row in server.addresses:
        if row.address in seen:
            row.confirmed_at = now


def _record_stages(server: Server, results: Sequence[ProbeResult], now: datetime) -> None:
    """The worst address speaks for the server: a stage is met when it is met on all of them."""
    failures = {result.failed: result for result in reversed(results) if result.failed is not None}
    first = min((_PROBED.index(stage) for stage in failures), default=len(_PROBED))
    known = {row.stage: row for row in server.stages}
    for position, stage in enumerate(_PROBED):
        if position < first:
            status, detail = StageStatus.MET, ""
        elif position == first:
            result = failures[stage]
            status, detail = StageStatus.FAILED, printable(f"{result.address}: {result.detail}")[:300]
        else:
            status, detail = StageStatus.WAITING, ""
        row = known.get(stage)
        if row is None:
            row = StageRecord(server_id=server.id, stage=stage, status=status, since=now, detail=detail)
            server.stages.append(row)
        elif row.status is not status:
            row.status, row.since = status, now
        row.detail = detail


def _score(
    server: Server, settings: Settings, results: Sequence[ProbeResult], now: datetime, *, is_exempt: bool
) -> Iterator[SampleRecord]:
    """Let each probe take effect on its address, and give what is kept of it.

    One that is exempt, during maintenance, does not count against the server.
    """
    by_address = {result.address: result for result in results}
    for row in server.addresses:
        result = by_address.get(row.address)
        if result is None:
            continue
        step = scoring.step(result, max_stratum=settings.policy.max_stratum)
        row.step_reason = printable(step.reason)[:200]
        if row.score is not None:
            after = scoring.advance(row.score, step)
            row.score = max(row.score, after) if is_exempt else after
        elif not is_exempt:
            row.full_probes = row.full_probes + 1 if _is_full(result, step) else 0
        yield samples.sample(row, result, step, now)


def _is_full(result: ProbeResult, step: scoring.Step) -> bool:
    return step.value >= scoring.FULL_STEP and result.failed is None


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


def _admissible(server: Server, settings: Settings) -> bool:
    proved = servers.publishable(server)
    enough = all(row.full_probes >= settings.policy.admission_probes for row in proved)
    return bool(proved) and enough and not servers.open_holds(server)


async def _admit(session: AsyncSession, server: Server, settings: Settings, now: datetime) -> None:
    for row in servers.publishable(server):
        row.score = scoring.ADMITTED
    await servers.apply(
        session,
        server,
        EventKind.NTS_CONFIRMED,
        actor=_ACTOR,
        reason=f"{settings.policy.admission_probes} full probes in a row (bootstrap quorum)",
        now=now,
    )
    _log.info("server_admitted", server=server.name)


async def _end_maintenance(
    session: AsyncSession, server: Server, settings: Settings, results: Sequence[ProbeResult], now: datetime
) -> None:
    """After maintenance: a server whose score is bad is held for that, one with a full probe for nothing any more."""
    scores = [row.score for row in servers.publishable(server) if row.score is not None]
    steps = [(result, scoring.step(result, max_stratum=settings.policy.max_stratum)) for result in results]
    if scores and max(scores) < scoring.CUTOFF:
        reason = _why_low(server, max(scores))
        await servers.set_hold(session, server, HoldKind.SCORE, reason=reason, actor=_ACTOR, now=now)
    elif not any(_is_full(result, step) for result, step in steps):
        return
    over = "the maintenance is over"
    await servers.lift_hold(session, server, HoldKind.MAINTENANCE, reason=over, actor=_ACTOR, now=now)


def _why_low(server: Server, score: float | None) -> str:
    failed = servers.first_failure(server)
    low = "no address is admitted yet" if score is None else f"score {score:.1f}"
    return low + (f", {failed.stage}: {failed.detail}" if failed else "")


async def _hold_or_lift(session: AsyncSession, server: Server, settings: Settings, now: datetime) -> None:
    for row in server.addresses:
        # An address proved after the server's admission is admitted by itself.
        if row.score is None and row.full_probes >= settings.policy.admission_probes:
            row.score = scoring.ADMITTED
    # What was never admitted speaks for nobody: a member could change to a dead address otherwise.
    best = max((row.score for row in servers.publishable(server) if row.score is not None), default=None)
    if best is None or best < scoring.CUTOFF:
        is_back_soon = servers.held(server, HoldKind.CERTIFICATE) is not None
        if servers.held(server, HoldKind.SCORE) or (
            server.state is ServerState.SUSPENDED and not is_back_soon
        ):
            return
        # Scores alone never shrink the answer below the pool's opening size: that is an alarm instead.
        least = settings.policy.opening_size
        if await count_active(session, limit=least + 1) <= least:
            _log.error("pool_alarm_too_few_servers", server=server.name, score=best)
            return
        reason = _why_low(server, best)
        await servers.set_hold(session, server, HoldKind.SCORE, reason=reason, actor=_ACTOR, now=now)
        _log.warning("server_suspended", server=server.name, reason=reason)
    elif server.state is ServerState.SUSPENDED:
        await servers.lift_hold(
            session, server, HoldKind.SCORE, reason="the score is good again", actor=_ACTOR, now=now
        )


async def _judge_certificate(
    session: AsyncSession, server: Server, results: Sequence[ProbeResult], now: datetime
) -> None:
    """A server whose newest certificate has ended can serve nobody, however few others there are.

    It is back when a probe sees one that it should have; its score may then hold it still.
    """
    kind, newest = HoldKind.CERTIFICATE, servers.newest_certificate(server)
    if any(is_ours(server, result) for result in results):
        reason = "a valid certificate is seen again"
        await servers.lift_hold(session, server, kind, reason=reason, actor=_ACTOR, now=now)
    elif newest is not None and newest.not_after is not None and newest.not_after <= now:
        reason = f"the newest certificate ended on {newest.not_after:%Y-%m-%d %H:%M} UTC"
        await servers.set_hold(session, server, kind, reason=reason, actor="worker", now=now)
