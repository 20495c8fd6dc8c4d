"""From the database to DNS and back: what should be in the zone, and what each server's row learns of it.

DNS is derived state. One pass computes the wanted zone, publishes it, asks every authoritative server, and only
then notes that a name is there, a target listed, an SRV withdrawn or a name broken.
"""

import time
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.control import ServerState
from poolsvc import servers
from poolsvc.config import Settings, split_endpoint
from poolsvc.db import Database
from poolsvc.models import Server
from poolsvc.publisher import Mismatch, Nameserver, PrimaryConfig, Publisher
from poolsvc.zone import CaaIssuer, Key, ServerRecords, Zone, ZonePolicy, wanted

_log = structlog.get_logger()
_METHODS = ("http-01",)
_RECORD_TYPES = ("A", "AAAA", "CAA")
_LOGGED_MISMATCHES = 10


@dataclass(frozen=True, slots=True)
class Plan:
    """One pass: the zone as it should be, who may be a target, and which keys have to be asked about."""

    policy: ZonePolicy
    zone: Zone
    keys: frozenset[Key]
    candidates: frozenset[str]  # owners that the SRV may hold; at most eight of them are in it at a time

    def shows(self, owner: str, wrong: AbstractSet[Key]) -> bool:
        """Whether every authoritative server has the owner's records exactly as planned."""
        return not any((owner, kind) in wrong for kind in _RECORD_TYPES)

    @property
    def is_open(self) -> bool:
        return (self.policy.service, "SRV") in self.zone

    def lists(self, owner: str) -> bool:
        rrset = self.zone.get((self.policy.service, "SRV"))
        return rrset is not None and any(text.split()[-1] == owner for text in rrset.rdatas)


def primary_config(settings: Settings) -> PrimaryConfig:
    """The primary as the settings describe it; reads the TSIG secret from its file."""
    address, port = split_endpoint(settings.dns.primary)
    return PrimaryConfig(
        address=address,
        port=port,
        tsig_name=settings.dns.tsig_name,
        tsig_secret=settings.dns.tsig_secret_file.read_text().strip(),
        tsig_algorithm=settings.dns.tsig_algorithm,
        nameservers=tuple(Nameserver(*split_endpoint(text)) for text in settings.dns.nameservers),
    )


async def plan(database: Database, settings: Settings, now: datetime) -> Plan | None:
    """What the zone should hold now; None before the CA account exists, without which no CAA can be made."""
    async with database.transaction() as session:
        pool = await servers.the_pool(session, settings)
        if pool.account_uri is None:
            return None
        policy = zone_policy(settings, CaaIssuer(settings.ca.caa_identity, pool.account_uri, _METHODS))
        rows = await _rows(session)
        active = [row for row in rows if row.state is ServerState.ACTIVE]
        if pool.opened_at is None and len(active) >= settings.policy.opening_size:
            pool.opened_at = now
            _log.info("pool_opened", active=len(active))
        for row in rows:
            if row.burnt_at is None and _is_named(row):
                # Before the first update leaves: a name that may have been seen is never given again.
                row.burnt_at = now
        records = [_records(row) for row in rows if _is_named(row)]
        draw = int(now.timestamp()) // settings.dns.srv_ttl
        zone = wanted(records, policy, is_open=pool.opened_at is not None, draw=draw)
        gone = {policy.domain(row.name) for row in rows if not _is_named(row)}
    keys = {*zone, (policy.service, "SRV"), *((owner, kind) for owner in gone for kind in _RECORD_TYPES)}
    candidates = {policy.domain(record.name) for record in records if record.listed}
    return Plan(policy, zone, frozenset(keys), frozenset(candidates))


async def publish(database: Database, settings: Settings, made: Plan, epoch: int, now: datetime) -> bool:
    """Bring the primary to the plan, ask every authoritative server, and note what is true there.

    True when all of them show the plan. Raises PublishError when the primary cannot be brought to it.
    """
    started = time.monotonic()
    publisher = Publisher(made.policy, primary_config(settings))
    await publisher.take_fence(epoch)
    published = await publisher.publish(made.zone, epoch)
    if published.changes:
        _log.info("zone_published", serial=published.serial, changes=len(published.changes))
    wrong = _wrong(made, await publisher.verify(made.keys, made.zone))
    negative_ttl = timedelta(seconds=published.soa_minimum)
    # What is noted was true when the last nameserver had answered, not when the pass began.
    seen_at = now + timedelta(seconds=time.monotonic() - started)
    async with database.transaction() as session:
        for row in await _rows(session):
            _note(row, made, wrong, negative_ttl, seen_at)
    return not wrong


def _wrong(made: Plan, mismatches: Sequence[Mismatch]) -> frozenset[Key]:
    """The keys that some authoritative server does not show as planned; all, when one does not answer."""
    for mismatch in mismatches[:_LOGGED_MISMATCHES]:
        owner, kind = mismatch.key or ("", "")
        server = str(mismatch.nameserver)
        _log.warning("zone_mismatch", nameserver=server, owner=owner, type=kind, reason=mismatch.reason)
    if any(mismatch.key is None for mismatch in mismatches):
        return made.keys
    return frozenset(mismatch.key for mismatch in mismatches if mismatch.key is not None)


def zone_policy(settings: Settings, *issuers: CaaIssuer) -> ZonePolicy:
    """The settings' part of the policy, and who may issue."""
    return ZonePolicy(
        pool=settings.pool,
        srv_ttl=settings.dns.srv_ttl,
        address_ttl=settings.dns.address_ttl,
        ke_port=settings.ports.ke,
        caa=issuers,
    )


async def _rows(session: AsyncSession) -> list[Server]:
    """Every server that is or may still be in DNS."""
    states = (*servers.NAMED_STATES, ServerState.LEAVING)
    found = await session.scalars(
        select(Server)
        .where(Server.state.in_(states))
        .order_by(Server.id)
        .options(*servers.WHOLE)
        # A server that leaves meanwhile would be published and its name released at the same moment.
        .with_for_update(of=Server)
    )
    return list(found)


def _is_named(row: Server) -> bool:
    """Whether a server's addresses and CAA belong in DNS; a leaving one's only until its SRV is out."""
    if row.state is ServerState.LEAVING:
        return row.burnt_at is not None and row.srv_withdrawn_at is None
    return row.state in servers.NAMED_STATES


def _records(row: Server) -> ServerRecords:
    return ServerRecords(
        name=row.name,
        addresses=tuple(servers.published_addresses(row)),
        listed=row.state is ServerState.ACTIVE,
        weight=row.weight,
    )


def _note(row: Server, made: Plan, wrong: AbstractSet[Key], negative_ttl: timedelta, now: datetime) -> None:
    owner = made.policy.domain(row.name)
    service_is_right = (made.policy.service, "SRV") not in wrong
    if row.state is ServerState.LEAVING:
        _note_leaving(
            row, made, owner, service_is_right=service_is_right, shown=made.shows(owner, wrong), now=now
        )
        return
    if row.named_at is None and (owner, "CAA") in made.zone and made.shows(owner, wrong):
        row.named_at = now
        # Resolvers may have cached that the name does not exist, or a whole gap of names around it.
        row.order_due_at = now + negative_ttl
    if row.state is not ServerState.ACTIVE:
        row.listed_at = None
    elif owner in made.candidates and made.is_open and service_is_right:
        row.listed_at = row.listed_at or now


def _note_leaving(
    row: Server, made: Plan, owner: str, *, service_is_right: bool, shown: bool, now: datetime
) -> None:
    if row.srv_withdrawn_at is None and service_is_right and not made.lists(owner):
        row.srv_withdrawn_at, row.listed_at = now, None
    if row.name_broken_at is None and (owner, "CAA") not in made.zone and shown:
        row.name_broken_at = row.removal_due_at = now
