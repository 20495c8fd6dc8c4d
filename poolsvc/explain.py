"""Why a server is, or is not, in the pool's answer: its stages in order, each with since when and the remedy."""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from nts_core.control import ServerState, Stage, StageStatus
from poolsvc import own_account, servers
from poolsvc.budget import Place
from poolsvc.config import Settings
from poolsvc.models import ENDED_STATES, Order, Pool, Server
from poolsvc.verdicts import Quorum, quorum


@dataclass(frozen=True, slots=True)
class StageView:
    """One stage as it stands."""

    stage: Stage
    status: StageStatus
    since: datetime | None = None
    detail: str = ""
    remedy: str = ""


# What a member can do about a stage that is not met.
REMEDIES = {
    Stage.NAME: "run the `pool-agent join` line of the registration on the server",
    Stage.ADDRESSES: "run `pool-agent run`, and let the pool reach the port of each address on which it proves that",
    Stage.ISSUANCE: "let everybody reach the port of each address that answers the CA; the order is repeated by itself",
    Stage.TCP: "let everybody reach the NTS-KE port over TCP",
    Stage.TLS: "let the agent serve the NTS-KE port; another program seems to answer there",
    Stage.CERTIFICATE: "check that the agent runs and has installed its certificate",
    Stage.KE: "check the agent's log; key establishment was refused",
    Stage.COOKIES: "check the agent's log; it gave fewer cookies than were asked for",
    Stage.NTP_KE_COOKIE: "let everybody reach the NTP port over UDP, long packets included",
    Stage.NTP_NTP_COOKIE: "check that all servers behind the address share their cookie keys",
    Stage.OFFSET: "correct the server's clock, and keep it synchronised",
    Stage.SCORE: "keep the server reachable and on time; the score rises by itself",
    Stage.POOL: "nothing: the pool lacks other servers or its own parts work on it",
}
# And where there is no agent to do it.
_BY_HAND = {
    Stage.ADDRESSES: "from each address POST to .../proofs, serve the content at the path, then POST .../ready",
    Stage.ISSUANCE: "PUT the account's URI to .../acme-account; order with your ACME client from `may_order_at` on",
    Stage.CERTIFICATE: "let the server use the certificate that your ACME client got for this name, and for no other",
}
_ON_THE_WAY = frozenset({ServerState.REGISTERED, ServerState.VERIFIED, ServerState.CERTIFIED})
_PROBED = (
    Stage.TCP,
    Stage.TLS,
    Stage.CERTIFICATE,
    Stage.KE,
    Stage.COOKIES,
    Stage.NTP_KE_COOKIE,
    Stage.NTP_NTP_COOKIE,
    Stage.OFFSET,
)


def explain(
    server: Server, pool: Pool, settings: Settings, *, active: int, place: Place | None = None
) -> list[StageView]:
    """All stages in order. `active` is how many servers are ACTIVE; it matters until the pool opens.

    `place`: where it stands, if it waits for the CA's limits.
    """
    views = [
        _name(server),
        _addresses(server),
        _issuance(server) if place is None else _queued(server, place),
    ]
    probed = {record.stage: record for record in server.stages}
    for stage in _PROBED:
        record = probed.get(stage)
        if record is None:
            views.append(_view(stage, StageStatus.WAITING, None, "not probed yet"))
        else:
            views.append(_view(stage, record.status, record.since, record.detail))
    views.append(_score(server, pool, settings))
    views.append(_pool(server, pool, settings, active))
    return [_by_hand(view) for view in views] if server.agentless else views


# What the way to the next step commonly takes (docs/performance.md), rounded up: until everybody shows the name and its
# absence is forgotten, and from an order's turn to a certificate that is served.
_NAMING, _ISSUING = timedelta(minutes=2), timedelta(minutes=1)


def expected_at(
    server: Server, pool: Pool, settings: Settings, place: Place | None, now: datetime
) -> datetime | None:
    """When a server on its way into the pool can be in the answer if nothing fails; None of every other one."""
    if server.state not in _ON_THE_WAY or (server.joined_at is None and not server.agentless):
        return None
    at = now
    if server.state is not ServerState.CERTIFIED:
        begins = server.order_due_at or now + _NAMING
        at = max(now, begins if place is None else place.turn_at) + _ISSUING
    done = _full_probes(server)
    probes = max(0, _needed(pool, settings).probes - done)
    return at + probes * timedelta(seconds=settings.policy.probe_interval)


def _by_hand(view: StageView) -> StageView:
    return replace(view, remedy=_BY_HAND.get(view.stage, view.remedy)) if view.remedy else view


def why_not(views: list[StageView], server: Server) -> str:
    """One sentence for the first stage that is not met; empty when the server is in the answer."""
    if server.state in ENDED_STATES:
        day = f" on {server.leave_at:%Y-%m-%d %H:%M} UTC" if server.leave_at is not None else ""
        return f"{server.state}{day}: {server.leave_reason or 'the registration expired'}"
    for view in views:
        if view.status is not StageStatus.MET:
            return f"{view.stage}: {view.detail or view.status} ({view.remedy})"
    return ""


def _view(stage: Stage, status: StageStatus, since: datetime | None, detail: str = "") -> StageView:
    remedy = "" if status is StageStatus.MET else REMEDIES[stage]
    return StageView(stage, status, since, detail, remedy)


def _name(server: Server) -> StageView:
    if server.agentless:
        return _view(Stage.NAME, StageStatus.MET, server.created_at)
    if server.joined_at is None:
        return _view(Stage.NAME, StageStatus.WAITING, server.created_at, "no agent has joined")
    return _view(Stage.NAME, StageStatus.MET, server.joined_at)


def _addresses(server: Server) -> StageView:
    unproved = [row for row in server.addresses if row.proved_at is None]
    proved = [row.proved_at for row in servers.publishable(server) if row.proved_at is not None]
    details = "; ".join(
        f"{row.address}: {row.proof_error or 'not proved yet'}"
        for row in server.addresses
        if row.proved_at is None or row.proof_error
    )
    if not proved and len(unproved) < len(server.addresses):
        return _view(
            Stage.ADDRESSES, StageStatus.FAILED, None, "the family of its proved addresses is turned off"
        )
    if not proved:
        failed = any(row.proof_error for row in unproved)
        status = StageStatus.FAILED if failed else StageStatus.WAITING
        return _view(Stage.ADDRESSES, status, server.joined_at, details)
    if server.named_at is None:
        return _view(Stage.ADDRESSES, StageStatus.WAITING, max(proved), "proved, on the way into DNS")
    return _view(Stage.ADDRESSES, StageStatus.MET, server.named_at, details)


def _issuance(server: Server) -> StageView:
    orders = server.orders
    if own_account.is_used(server) and servers.newest_certificate(server) is None:
        return _view(Stage.ISSUANCE, StageStatus.WAITING, server.named_at, _own_order(server))
    if not orders:
        return _view(Stage.ISSUANCE, StageStatus.WAITING, server.named_at, "no order yet")
    latest: Order = orders[-1]
    if (newest := servers.newest_certificate(server)) is not None:
        detail = "" if latest.error is None else f"renewal: {latest.error}"
        return _view(Stage.ISSUANCE, StageStatus.MET, newest.issued_at, detail)
    if latest.error is not None:
        return _view(Stage.ISSUANCE, StageStatus.FAILED, latest.created_at, latest.error)
    return _view(Stage.ISSUANCE, StageStatus.WAITING, latest.created_at, f"order {latest.status}")


def _queued(server: Server, place: Place) -> StageView:
    days = place.limit.period / timedelta(days=1)
    detail = (
        f"{_ordinal(place.position)} of {place.waiting} that wait for the CA's limit of {place.limit.count}"
        f" new certificates in {days:g} days; about {place.turn_at:%Y-%m-%d %H:%M} UTC"
    )
    if server.orders and (error := server.orders[-1].error) is not None:
        detail += f"; the order before: {error}"
    remedy = "nothing: you are let in when it is your turn"
    return StageView(Stage.ISSUANCE, StageStatus.WAITING, server.named_at, detail, remedy)


def _ordinal(number: int) -> str:
    is_teen = 11 <= number % 100 <= 13
    return f"{number}{'th' if is_teen else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


def _own_order(server: Server) -> str:
    """What the member's own account waits for, before any probe has seen a certificate."""
    if server.own_account_uri is None:
        return "no CA may issue yet: the pool does not know your ACME account"
    begin = own_account.may_order_at(server)
    return "on the way into DNS" if begin is None else f"your account may order from {begin.isoformat()} on"


def _needed(pool: Pool, settings: Settings) -> Quorum:
    """Who has to admit it, by how many probes each."""
    return quorum(0, pool.quorum, settings.policy.admission_probes)


def _full_probes(server: Server) -> int:
    """Those in a row at every address that can be looked at."""
    return min((row.full_probes for row in servers.publishable(server) if row.unknown is None), default=0)


def _score(server: Server, pool: Pool, settings: Settings) -> StageView:
    if holds := servers.open_holds(server):
        reasons = "; ".join(f"{hold.kind}: {hold.reason}" for hold in holds)
        return _view(Stage.SCORE, StageStatus.FAILED, holds[0].set_at, reasons)
    if server.state is ServerState.ACTIVE:
        return _view(Stage.SCORE, StageStatus.MET, server.state_since)
    proved = servers.publishable(server)
    probes = _full_probes(server)
    needed = _needed(pool, settings)
    detail = f"{probes} of {needed.probes} full probes in a row"
    detail += f" by each of {needed.number} monitors" if needed.number > 1 else ""
    told = [(row.address, row.unknown or row.step_reason) for row in proved]
    reasons = "; ".join(f"{address}: {reason}" for address, reason in told if reason)
    return _view(Stage.SCORE, StageStatus.WAITING, None, f"{detail}; {reasons}" if reasons else detail)


def _pool(server: Server, pool: Pool, settings: Settings, active: int) -> StageView:
    if server.state is not ServerState.ACTIVE:
        return _view(Stage.POOL, StageStatus.WAITING, None, "when the server is active")
    if pool.opened_at is None:
        needed = settings.policy.opening_size
        return _view(
            Stage.POOL,
            StageStatus.WAITING,
            server.state_since,
            f"{active} of the {needed} active servers that the pool opens with",
        )
    if server.listed_at is None:
        return _view(Stage.POOL, StageStatus.WAITING, server.state_since, "on the way into DNS")
    return _view(Stage.POOL, StageStatus.MET, server.listed_at)
