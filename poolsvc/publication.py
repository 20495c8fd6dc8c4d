"""From the database to DNS and back: what should be in the zone, and what each server's row learns of it.

DNS is derived state. The leader keeps a picture of the pool: `look` brings it in step with the database, `publish`
the primary in step with it, and what every authoritative server shows is noted in the servers' rows.

Rules:

1. A name is burnt, in a transaction of its own, before the first update with it leaves.
2. What changed is read from the outbox (`poolsvc.models.zone_changes`); its rows are removed when that is published
   and noted, never before. A change that comes meanwhile has a row of its own.
3. What a leader knows it knows from a full pass at its beginning: every server, and the zone by transfer. Later ones,
   every `full_pass_interval`, find what the outbox and the serials did not tell.
4. Only the rows that learn something are locked, and only if they still are as the picture has them.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import islice

import structlog
from sqlalchemy import ColumnElement, Select, delete, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute, selectinload

from nts_core.control import ServerState
from poolsvc import scoring, servers
from poolsvc.acme import Challenge
from poolsvc.authorities import account_uris
from poolsvc.config import Settings, split_endpoint
from poolsvc.db import LEASE, Database
from poolsvc.models import Address, Order, OrderStatus, RevocationOrder, Server, ZoneChange
from poolsvc.pool import the_pool
from poolsvc.publisher import Conflict, Mismatch, Nameserver, PrimaryConfig, Publisher
from poolsvc.zone import (
    CaaIssuer,
    Change,
    Key,
    RRset,
    ServerRecords,
    Zone,
    ZonePolicy,
    ordered,
    records_of,
    service_of,
    wanted,
)

_log = structlog.get_logger()
_BY_HTTP, _BY_BOTH, _BY_DNS = (Challenge.HTTP_01,), tuple(Challenge), (Challenge.DNS_01,)
# An order whose challenge the CA looks at, or is about to.
_PROVING = (OrderStatus.PENDING, OrderStatus.ANSWERED)
_LOGGED_MISMATCHES = 10
_READ = 2_000  # servers read in one transaction
_TAKEN = 5_000  # rows of the outbox that one look takes
_NOTED = 200  # servers locked and noted in one transaction
_ASKED = 5_000  # keys that one pass asks the authoritative servers for
_STATES = (*servers.NAMED_STATES, ServerState.LEAVING)


@dataclass(frozen=True, slots=True)
class _Row:
    """What the zone needs to know of a server that was ever sent to DNS, and what its row knows of the zone."""

    state: ServerState
    records: ServerRecords
    named: bool
    listed: bool
    stays: bool  # it leaves, but its name lives yet
    final: bool  # and nothing changes that
    withdrawn: bool
    broken: bool
    unserved: bool  # it has a proof of control that was not seen everywhere
    revoking: bool  # the registry has begun to revoke what its member's own account had
    revoked: bool  # or given that up
    turned: bool
    closed: bool

    @property
    def published(self) -> ServerRecords:
        """What belongs in DNS; a leaving server's addresses only until its day, and its SRV is out.

        Once that is final nobody may order for it any more. Only the registry proves control, to revoke.
        """
        if self.state is not ServerState.LEAVING:
            return self.records
        is_out = self.withdrawn and not self.stays
        records = replace(self.records, addresses=()) if is_out else self.records
        if self.revoking and not self.revoked:
            return replace(records, account_uri=None, methods=_BY_DNS, keeps_caa=True)
        return replace(records, account_uri="", proofs=()) if self.final else records

    @property
    def proves(self) -> bool:
        """Whether everybody is to see a proof of control that is not known to be everywhere."""
        shown = self.published
        return self.unserved and bool(shown.proofs) and (bool(shown.addresses) or shown.keeps_caa)

    @property
    def has_text(self) -> bool:
        """Whether the TXT of its name is to be looked at as well."""
        return bool(self.records.proofs) or self.revoking

    def waits(self, *, is_open: bool) -> bool:
        """Whether the row has to learn something yet."""
        if self.proves:
            return True
        if self.state is ServerState.LEAVING:
            is_told = self.closed if self.revoked else self.turned or not self.revoking
            return not (self.withdrawn and (self.broken or self.stays) and is_told)
        if self.state is not ServerState.ACTIVE and self.listed:
            return True
        if self.state is ServerState.ACTIVE and is_open and not self.listed:
            return True
        return not self.named and bool(self.records.addresses)


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


class Publication:
    """One leader's picture of the pool and of its zone, good for as long as it leads."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self.is_frozen = False
        self._policy: ZonePolicy | None = None
        self._rows: dict[int, _Row] = {}
        self._candidates: dict[int, ServerRecords] = {}  # who may be an SRV target
        self._draw: int | None = None
        self._service: RRset | None = None  # the SRV as it should be
        self._zone: Zone | None = None  # what the primary holds; None when it has to be looked at
        self._serial = 0  # of the zone that `_zone` is
        self._negative_ttl = timedelta()
        self._stale: set[int] = set()  # servers whose records in `_zone` may not be as they should
        self._gone: set[str] = set()  # names that no server has any more
        self._waiting: set[int] = set()  # servers whose rows have to learn something yet
        self._unconfirmed: set[Key] = set()  # what some authoritative server may not show as `_zone` has it
        self._taken: list[int] = []  # rows of the outbox that the picture has and DNS may not have
        self._is_full_batch = False
        self._read_at: datetime | None = None
        self._observed_at: datetime | None = None
        self._checked_at: datetime | None = None

    async def look(self, now: datetime, *, even_frozen: bool = False) -> bool:
        """Bring the picture in step with the database.

        False while the pool is frozen, and before there is an account at any CA, without which no CAA can be made.
        Touches no network.
        """
        async with self._database.transaction() as session:
            pool = await the_pool(session, self._settings)
            self.is_frozen = pool.frozen_at is not None
            issuers = _issuers(self._settings, await account_uris(session))
            if not issuers or (self.is_frozen and not even_frozen):
                return False
            found = await session.execute(
                select(ZoneChange.id, ZoneChange.server_id).order_by(ZoneChange.id).limit(_TAKEN)
            )
            changes = found.all()
        self._taken = [change.id for change in changes]
        self._is_full_batch = len(changes) == _TAKEN
        changed = {change.server_id for change in changes}
        if self._has_passed(self._read_at, now, self._settings.policy.full_pass_interval):
            changed |= self._rows.keys()
            self._rows = await self._read_all(now)
            changed |= self._rows.keys()
            self._read_at, self._zone = now, None
        elif changed:
            await self._read_some(sorted(changed), now)
        policy = zone_policy(self._settings, *issuers)
        is_other_policy, self._policy = policy != self._policy, policy
        self._stale |= self._rows.keys() if is_other_policy else changed
        is_other_choice = self._note_candidates(changed)
        is_open = pool.opened_at is not None or await self._open(now)
        offered = self._service is not None
        draw = int(now.timestamp()) // self._settings.dns.srv_ttl
        if is_other_policy or is_other_choice or draw != self._draw or is_open != offered:
            listed = list(self._candidates.values())
            self._service = (
                await asyncio.to_thread(service_of, listed, policy, draw=draw) if is_open else None
            )
            self._draw = draw
        everybody = offered != (self._service is not None)
        for server_id in list(self._rows) if everybody else changed:
            self._judge(server_id)
        return True

    def is_due(self, now: datetime) -> bool:
        """Whether `publish` has anything to do."""
        return bool(
            self._zone is None
            or self._taken
            or self._unconfirmed
            or self._waiting
            or self._is_check_due(now)
            or self._changes(self._zone)
        )

    @property
    def publisher(self) -> Publisher:
        """The zone's writer under the present policy."""
        return Publisher(self._the_policy, primary_config(self._settings))

    async def publish(self, epoch: int, now: datetime) -> bool:
        """Bring the primary to the picture, ask the authoritative servers, and note what is true there.

        The fence must have been taken with `epoch`. True when all of them show the zone. Raises PublishError when
        the primary cannot be brought to it.
        """
        started = time.monotonic()
        publisher = self.publisher
        behind: tuple[Mismatch, ...] = ()
        is_check = self._is_check_due(now)
        if is_check and self._zone is not None:
            # Since the last look at the serial everybody has had the time to come to it.
            behind = await publisher.behind(self._serial)
            if await publisher.serial() != self._serial:
                self._zone = None
        zone, changes = await self._bring(publisher, epoch, now)
        if is_check or changes or self._waiting:
            self._unconfirmed.add(self._service_key)
        wrong = await self._verify(publisher, zone)
        is_doubtful = any(mismatch.key is not None for mismatch in wrong)
        # What is noted was true when the last nameserver had answered, not when the pass began.
        await self._note(zone, now + timedelta(seconds=time.monotonic() - started))
        await self._forget_taken()
        if is_check:
            self._checked_at = now
        if is_doubtful and self._has_passed(self._observed_at, now, self._settings.policy.reconcile_interval):
            # The primary may have acknowledged what it did not do.
            self._zone = None
        _tell(behind)
        return not wrong and not behind

    @property
    def has_more(self) -> bool:
        """Whether a limit ended the pass before the work did."""
        return self._is_full_batch or bool(self._unconfirmed)

    @property
    def _the_policy(self) -> ZonePolicy:
        assert self._policy is not None, "look first"
        return self._policy

    @property
    def _service_key(self) -> Key:
        return self._the_policy.service, "SRV"

    @staticmethod
    def _has_passed(since: datetime | None, now: datetime, seconds: float) -> bool:
        return since is None or now - since >= timedelta(seconds=seconds)

    def _is_check_due(self, now: datetime) -> bool:
        return self._has_passed(self._checked_at, now, self._settings.policy.reconcile_interval)

    def _keys(self, row: _Row) -> list[Key]:
        """What a server's row has to know of."""
        keys = self._the_policy.keys(row.records.name)
        return [key for key in keys if key[1] != "TXT" or row.has_text]

    def _is_shown(self, row: _Row, *kinds: str) -> bool:
        """Whether every authoritative server shows these of a server's records, or all, as the zone has them."""
        keys = (key for key in self._keys(row) if not kinds or key[1] in kinds)
        return self._unconfirmed.isdisjoint(keys)

    async def _read_all(self, now: datetime) -> dict[int, _Row]:
        async with self._database.transaction() as session:
            found = await session.scalars(
                select(Server.id).where(Server.state.in_(_STATES)).order_by(Server.id)
            )
            ids = list(found)
        rows: dict[int, _Row] = {}
        for some in _batches(ids, _READ):
            began = time.monotonic()
            rows |= await self._read(_between(some[0], some[-1]), now)
            if self._rows:
                # Not the first time: what is in DNS stays meanwhile, and requests need the processors too.
                await asyncio.sleep(time.monotonic() - began)
        return rows

    async def _read_some(self, ids: Sequence[int], now: datetime) -> None:
        for some in _batches(ids, _READ):
            found = await self._read(_in(some), now)
            for server_id in some:
                before = self._rows.pop(server_id, None)
                if server_id in found:
                    self._rows[server_id] = found[server_id]
                elif before is not None:
                    self._gone.add(before.records.name)

    async def _read(self, among: "_Among", now: datetime) -> dict[int, _Row]:
        """Every server of some that was or is now to be sent to DNS; one that is new there is burnt first."""
        async with self._database.transaction() as session:
            await _burn(session, among, now)
            proved: dict[int, list[tuple[str, float | None]]] = {}
            for server_id, address, score, ipv4, ipv6 in await session.execute(
                select(Address.server_id, Address.address, Address.score, Server.ipv4, Server.ipv6)
                .join(Server, Server.id == Address.server_id)
                .where(among(Address.server_id), Address.proved_at.is_not(None))
                .order_by(Address.id)
            ):
                if servers.is_wanted(address, ipv4=ipv4, ipv6=ipv6):
                    proved.setdefault(server_id, []).append((address, score))
            proofs: dict[int, list[str]] = {}
            unserved: set[int] = set()
            for chosen in _proofs(among):
                for server_id, txt, is_served in await session.execute(chosen):
                    assert txt is not None
                    proofs.setdefault(server_id, []).append(txt)
                    unserved |= set() if is_served else {server_id}
            found = await session.execute(
                select(
                    Server.id,
                    Server.name,
                    Server.member_id,
                    Server.state,
                    Server.weight,
                    Server.traffic_cap,
                    Server.traffic,
                    Server.named_at.is_not(None).label("named"),
                    Server.listed_at.is_not(None).label("listed"),
                    Server.agentless,
                    Server.own_account_uri,
                    Server.dns_01,
                    Server.leave_at.is_not(None).label("stays"),
                    Server.leave_final,
                    Server.srv_withdrawn_at.is_not(None).label("withdrawn"),
                    Server.name_broken_at.is_not(None).label("broken"),
                    Server.revoking_since.is_not(None).label("revoking"),
                    Server.revoking_ended_at.is_not(None).label("revoked"),
                    Server.caa_turned_at.is_not(None).label("turned"),
                    Server.caa_closed_at.is_not(None).label("closed"),
                ).where(among(Server.id), Server.state.in_(_STATES), Server.burnt_at.is_not(None))
            )
            return {
                row.id: _Row(
                    state=row.state,
                    records=ServerRecords(
                        name=row.name,
                        member=row.member_id,
                        addresses=tuple(servers.without_failing(proved.get(row.id, []))),
                        listed=row.state is ServerState.ACTIVE,
                        weight=scoring.sampling_weight(row.weight, row.traffic_cap, row.traffic),
                        account_uri=_own_account(row.own_account_uri, agentless=row.agentless),
                        methods=self._methods(chosen=row.dns_01, needed=row.id in proofs),
                        proofs=tuple(proofs.get(row.id, ())),
                    ),
                    named=row.named,
                    listed=row.listed,
                    stays=row.stays,
                    final=row.leave_final,
                    withdrawn=row.withdrawn,
                    broken=row.broken,
                    unserved=row.id in unserved,
                    revoking=row.revoking,
                    revoked=row.revoked,
                    turned=row.turned,
                    closed=row.closed,
                )
                for row in found
            }

    def _methods(self, *, chosen: bool, needed: bool) -> tuple[Challenge, ...]:
        """How the pool's accounts may prove control of a name; no more than it takes."""
        return _BY_BOTH if needed or (chosen and self._settings.policy.dns_01) else _BY_HTTP

    def _note_candidates(self, changed: Iterable[int]) -> bool:
        """Keep the candidates in step with the rows; whether the choice of targets may be another one now."""
        is_other = False
        for server_id in changed:
            row = self._rows.get(server_id)
            before = self._candidates.pop(server_id, None)
            after = None
            if row is not None and row.records.listed and row.records.addresses:
                after = self._candidates[server_id] = replace(row.records, addresses=())
            is_other |= before != after
        return is_other

    async def _open(self, now: datetime) -> bool:
        """Open the pool once enough servers can be offered; it stays open."""
        active = sum(row.records.listed for row in self._rows.values())
        if active < self._settings.policy.opening_size:
            return False
        async with self._database.transaction() as session:
            pool = await the_pool(session, self._settings, lock=True)
            pool.opened_at = pool.opened_at or now
        _log.info("pool_opened", active=active)
        return True

    def _judge(self, server_id: int) -> None:
        """Note whether a row has to learn something yet, and what has to be asked for that."""
        row = self._rows.get(server_id)
        if row is None or not row.waits(is_open=self._service is not None):
            self._waiting.discard(server_id)
            return
        self._waiting.add(server_id)
        if row.state is ServerState.LEAVING or row.proves or not row.named:
            self._unconfirmed.update(self._keys(row))

    def _changes(self, zone: Zone) -> tuple[Change, ...]:
        """What `zone` lacks of the picture, as far as the picture has changed since the zone was made."""
        due: dict[Key, RRset | None] = {self._service_key: self._service}
        policy = self._the_policy
        for name in self._gone:
            due |= dict.fromkeys(policy.keys(name))
        for row in filter(None, map(self._rows.get, self._stale)):
            due |= dict.fromkeys(policy.keys(row.records.name)) | records_of(row.published, policy)
        return ordered(
            Change(*key, zone.get(key), rrset) for key, rrset in due.items() if zone.get(key) != rrset
        )

    def whole(self) -> Zone:
        """The managed part of the zone as it should be."""
        zone = wanted((row.published for row in self._rows.values()), self._the_policy, is_open=False, draw=0)
        return zone if self._service is None else {**zone, self._service_key: self._service}

    async def _bring(
        self, publisher: Publisher, epoch: int, now: datetime
    ) -> tuple[Zone, tuple[Change, ...]]:
        """The zone on the primary after it was changed, and the changes."""
        # Until the primary has answered, its zone is not known.
        zone, self._zone = self._zone, None
        done: tuple[Change, ...] | None = None
        if zone is not None:
            changes = self._changes(zone)
            with suppress(Conflict):
                messages = await publisher.apply(changes, epoch)
                self._serial = (self._serial + messages) % 2**32
                _make(zone, changes)
                done = changes
        if zone is None or done is None:
            zone = await asyncio.to_thread(self.whole)
            published = await publisher.publish(zone, epoch)
            done, self._serial, self._observed_at = published.changes, published.serial, now
            self._negative_ttl = timedelta(seconds=published.soa_minimum)
            self._unconfirmed.update(random.sample(list(zone), min(len(zone), _ASKED)))
        self._zone = zone
        self._stale.clear()
        self._gone.clear()
        self._unconfirmed.update((change.owner, change.rdtype) for change in done)
        if done:
            _log.info("zone_published", serial=self._serial, changes=len(done))
        return zone, done

    async def _verify(self, publisher: Publisher, zone: Zone) -> tuple[Mismatch, ...]:
        """Ask for what is not confirmed, a bounded number of keys; what is wrong of it."""
        asked = set(islice(self._unconfirmed, _ASKED)) | (self._unconfirmed & {self._service_key})
        if not asked:
            return ()
        mismatches = await publisher.verify(sorted(asked), zone)
        _tell(mismatches)
        if not any(mismatch.key is None for mismatch in mismatches):
            self._unconfirmed -= asked - {mismatch.key for mismatch in mismatches}
        return mismatches

    async def _note(self, zone: Zone, now: datetime) -> None:
        """Tell the servers' rows what the authoritative servers show."""
        news = {server_id: self._news(self._rows[server_id], zone, now) for server_id in self._waiting}
        served = {server_id for server_id in self._waiting if self._serves(self._rows[server_id], zone)}
        for some in _batches(sorted(served | {key for key, values in news.items() if values}), _NOTED):
            noted: list[int] = []
            async with self._database.transaction() as session:
                found = await session.scalars(
                    select(Server)
                    .where(Server.id.in_(some))
                    .order_by(Server.id)
                    .options(selectinload(Server.orders), selectinload(Server.revocation_orders))
                    .with_for_update(of=Server)
                )
                for server in found:
                    # One that changed meanwhile has a row in the outbox: it is looked at again.
                    row = self._rows[server.id]
                    account = _own_account(server.own_account_uri, agentless=server.agentless)
                    if (server.state, account) == (row.state, row.records.account_uri):
                        for name, value in news[server.id].items():
                            setattr(server, name, value)
                        _hurry(server, news[server.id], now)
                        if "named_at" in news[server.id]:
                            server.order_due_at = self._first_order(server, now)
                            server.queue_round = None
                        if server.id in served:
                            self._note_served(server, row, now)
                        noted.append(server.id)
            for server_id in noted:
                self._learn(server_id, news[server_id], served=server_id in served)

    def _serves(self, row: _Row, zone: Zone) -> bool:
        """Whether everybody shows a proof of control, and the CAA that lets it count."""
        owner = self._the_policy.challenge(row.records.name)
        return row.proves and (owner, "TXT") in zone and self._is_shown(row, "TXT", "CAA")

    def _note_served(self, server: Server, row: _Row, now: datetime) -> None:
        """The CA may look once its resolvers have forgotten what was there before."""
        shown, due_at = row.published.proofs, now + self._forgetting
        proofs: list[Order | RevocationOrder] = [*server.orders, *server.revocation_orders]
        for proof in proofs:
            is_over = isinstance(proof, Order) and proof.status not in _PROVING
            if proof.txt in shown and proof.served_at is None and not is_over:
                proof.served_at, proof.due_at = now, due_at

    @property
    def _forgetting(self) -> timedelta:
        """How long a resolver may know a server's records, or their absence, as they were."""
        return max(self._negative_ttl, timedelta(seconds=self._settings.dns.address_ttl))

    def _first_order(self, server: Server, now: datetime) -> datetime | None:
        """When an order is due for a name that everybody shows: not before the last resolver forgot its absence.

        Without an agent: nor the CAA that let nobody, or another account, order; that it is due means that the member
        may. A certificate from before the addresses were lost is renewed in its time.
        """
        if server.agentless:
            return None if server.own_account_uri is None else now + self._forgetting
        return max(now + self._negative_ttl, servers.renewal_at(server) or now)

    def _news(self, row: _Row, zone: Zone, now: datetime) -> dict[str, datetime | None]:
        """The columns of a server's row that what was seen in DNS changes."""
        owner = self._the_policy.domain(row.records.name)
        is_shown = self._is_shown(row)
        is_named = (owner, "CAA") in zone
        is_service_right = self._service_key not in self._unconfirmed
        if row.state is ServerState.LEAVING:
            news: dict[str, datetime | None] = {}
            if not row.withdrawn and is_service_right and not _lists(zone.get(self._service_key), owner):
                news |= {"srv_withdrawn_at": now, "listed_at": None}
            kinds = ("A", "AAAA") if row.revoking else ("A", "AAAA", "CAA")
            is_out = all((owner, kind) not in zone for kind in kinds) and self._is_shown(row, *kinds)
            if not row.broken and is_out:
                news["name_broken_at"] = now
            return news | self._news_of_revocation(row, is_named=is_named, now=now)
        news = {}
        if not row.named and is_named and is_shown:
            # Resolvers may have cached that the name does not exist, or a whole gap of names around it.
            news["named_at"] = now
        if row.state is not ServerState.ACTIVE and row.listed:
            news["listed_at"] = None
        elif row.state is ServerState.ACTIVE and not row.listed and self._service and is_service_right:
            news["listed_at"] = now
        return news

    def _news_of_revocation(self, row: _Row, *, is_named: bool, now: datetime) -> dict[str, datetime | None]:
        """Of a server whose CAA is turned to the registry's accounts, and closed when they need it no more."""
        if not row.revoking or not self._is_shown(row, "CAA", "TXT"):
            return {}
        if row.revoked:
            return {} if row.closed or is_named else {"caa_closed_at": now}
        return {} if row.turned or not is_named else {"caa_turned_at": now}

    def _learn(self, server_id: int, news: Mapping[str, datetime | None], *, served: bool) -> None:
        row = self._rows[server_id]
        self._rows[server_id] = replace(
            row,
            named=row.named or "named_at" in news,
            listed=news["listed_at"] is not None if "listed_at" in news else row.listed,
            withdrawn=row.withdrawn or "srv_withdrawn_at" in news,
            broken=row.broken or "name_broken_at" in news,
            unserved=row.unserved and not served,
            turned=row.turned or "caa_turned_at" in news,
            closed=row.closed or "caa_closed_at" in news,
        )
        self._judge(server_id)

    async def _forget_taken(self) -> None:
        """Remove what was taken from the outbox: it is published and noted."""
        for some in _batches(self._taken, _READ):
            async with self._database.transaction() as session:
                await session.execute(delete(ZoneChange).where(ZoneChange.id.in_(some)))
        self._taken = []


_Among = Callable[[InstrumentedAttribute[int]], ColumnElement[bool]]
"""Which servers are meant, as a condition on a column with their ids."""


def _between(first: int, last: int) -> _Among:
    return lambda column: column.between(first, last)


def _in(ids: Sequence[int]) -> _Among:
    return lambda column: column.in_(ids)


async def _burn(session: AsyncSession, among: _Among, now: datetime) -> None:
    """Before the first update leaves: a name that may have been seen is never given again."""
    fresh = await session.scalars(
        select(Server)
        .where(among(Server.id), Server.state.in_(servers.NAMED_STATES), Server.burnt_at.is_(None))
        .order_by(Server.id)
        # A server that leaves meanwhile would be published and its name released at the same moment.
        .with_for_update()
    )
    for server in fresh:
        server.burnt_at = now
    await session.flush()


def _proofs(among: _Among) -> tuple[Select[int, str | None, bool], ...]:
    """Of some servers: the texts that prove control of their names to a CA now, and whether everybody shows them."""
    return (
        select(Order.server_id, Order.txt, Order.served_at.is_not(None)).where(
            among(Order.server_id), Order.txt.is_not(None), Order.status.in_(_PROVING)
        ),
        select(RevocationOrder.server_id, RevocationOrder.txt, RevocationOrder.served_at.is_not(None)).where(
            among(RevocationOrder.server_id),
            RevocationOrder.txt.is_not(None),
            RevocationOrder.ended_at.is_(None),
        ),
    )


def _own_account(uri: str | None, *, agentless: bool) -> str | None:
    """The account that a server's CAA names in place of the pool's."""
    return (uri or "") if agentless else None


def _hurry(server: Server, news: Mapping[str, datetime | None], now: datetime) -> None:
    """A removal that waited for this goes on; one that a worker may have at this moment ends by itself, and looks again."""
    due_at = server.removal_due_at
    if {"name_broken_at", "caa_closed_at"} & news.keys() and (due_at is None or due_at > now + LEASE):
        server.removal_due_at = now


def _batches(ids: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (ids[start : start + size] for start in range(0, len(ids), size))


def _make(zone: Zone, changes: Iterable[Change]) -> None:
    """Make the changes in a zone that is held in memory."""
    for change in changes:
        if change.after is None:
            zone.pop((change.owner, change.rdtype), None)
        else:
            zone[change.owner, change.rdtype] = change.after


def _lists(service: RRset | None, owner: str) -> bool:
    return service is not None and any(text.split()[-1] == owner for text in service.rdatas)


def _tell(mismatches: Sequence[Mismatch]) -> None:
    for mismatch in mismatches[:_LOGGED_MISMATCHES]:
        owner, kind = mismatch.key or ("", "")
        server = str(mismatch.nameserver)
        _log.warning("zone_mismatch", nameserver=server, owner=owner, type=kind, reason=mismatch.reason)


def _issuers(settings: Settings, accounts: Mapping[str, str]) -> list[CaaIssuer]:
    """The registry's account at each CA of the settings; one of which there is none yet may not issue."""
    cas = settings.ca.with_rehearsal
    return [CaaIssuer(ca.caa_identity, accounts[ca.name]) for ca in cas if ca.name in accounts]


def zone_policy(settings: Settings, *issuers: CaaIssuer) -> ZonePolicy:
    """The settings' part of the policy, and who may issue."""
    return ZonePolicy(
        pool=settings.pool,
        srv_ttl=settings.dns.srv_ttl,
        address_ttl=settings.dns.address_ttl,
        ke_port=settings.ports.ke,
        caa=issuers,
    )
