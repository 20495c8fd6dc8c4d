"""From the database to DNS and back: what should be in the zone, and what each server's row learns of it.

DNS is derived state. The leader keeps a picture of the pool: `look` brings it in step with the database, `publish`
the primary in step with it, and what every authoritative server shows is noted in the servers' rows.

Rules:

1. A name is burnt, in a transaction of its own, before the first update with it leaves.
2. What changed is read from the outbox (`poolsvc.models.zone_changes`); its rows are removed when that is published
   and noted, never before. A change that comes meanwhile has a row of its own.
3. What a leader knows it knows from its beginning: every server, and the zone by transfer. From then on it follows the
   zone by what happened to it (IXFR), its own doing and that of others, which is undone and told. All servers are
   read again every `full_pass_interval`, which finds what the outbox did not tell; the whole zone is transferred
   every `transfer_interval`, and after a failure.
4. Only the rows that learn something are locked, and only if they still are as the picture has them.
5. What would take too much of the zone, or too many servers out of the SRV, is asked for first (`Question`).
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, TypeVar

import structlog
from sqlalchemy import ColumnElement, Select, delete, exists, select, true, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute, selectinload

from nts_core.acme import Challenge
from nts_core.control import ServerState, Validation
from nts_core.independence import prefix_of
from nts_core.metadata import MAX_VALUES, Metadata
from poolsvc import drawing, own_account, regional, scoring, servers, subsets, validation
from poolsvc.authorities import account_uris
from poolsvc.config import Settings, split_endpoint
from poolsvc.db import LEASE, Database
from poolsvc.derived import RegistryKey
from poolsvc.geo import Geo, Place
from poolsvc.models import (
    Address,
    Hold,
    HoldKind,
    Member,
    Order,
    RevocationOrder,
    Server,
    ZoneChange,
    ZonePlan,
)
from poolsvc.pool import the_pool
from poolsvc.primary import Nameserver, PrimaryConfig
from poolsvc.publisher import Draw as PublisherDraw
from poolsvc.publisher import Mismatch, Observation, Publisher
from poolsvc.regions import regions_of
from poolsvc.unconfirmed import Unconfirmed
from poolsvc.zone import (
    CaaIssuer,
    Change,
    Key,
    Question,
    RRset,
    ServerRecords,
    Zone,
    ZonePolicy,
    diff,
    guard,
    is_too_much,
    of_settings_alone,
    ordered,
    records_of,
    services_of,
    wanted,
)

_log = structlog.get_logger()
T = TypeVar("T")
_BY_DNS = (Challenge.DNS_01,)
_LOGGED_MISMATCHES = 10
_READ = 2_000  # servers read in one transaction
_TAKEN = 5_000  # rows of the outbox that one look takes
_NOTED = 50  # servers locked and noted in one transaction, and in one pass what DNS shows of them
_LOOKED = 500  # servers of which one pass finds out whether there is anything to note
# What one pass asks all authoritative servers together: a fifth of a second's work, for which a change may have to wait.
_QUESTIONS = 100
_SAMPLE = 5_000  # keys of an old zone that are asked for when all of it was planned
_RECENT = 50  # of the last changes: what a server that has an older serial is asked for
_ASK_AGAIN = (
    0.1  # seconds after which an authoritative server that does not show the zone is asked again, at first
)
_PATIENCE = timedelta(seconds=10)  # in which it may come to it: most are a moment behind the primary
_DRAWS = 2  # before the present one that edges may answer from
_FEW_SETS = 64  # of a whole draw, which is made anew whenever anything changes
_AT_ONCE = timedelta(minutes=10)  # within which servers that leave the SRV leave it together
_STATES = (*servers.NAMED_STATES, ServerState.LEAVING)


_HELD = exists().where(Hold.server_id == Server.id, Hold.kind == HoldKind.OPERATOR, Hold.lifted_at.is_(None))


@dataclass(frozen=True, slots=True)
class _Row:
    """What the zone needs to know of a server that was ever sent to DNS, and what its row knows of the zone."""

    state: ServerState
    records: ServerRecords
    validation: Validation
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
    held: bool  # by an operator
    kept: bool  # it stays in the SRV though it is suspended
    since: datetime  # of its state
    member_since: datetime
    prefixes: tuple[str, ...]  # of its published addresses

    @property
    def candidate(self) -> drawing.Candidate | None:
        """The server as one that may be drawn; None of one that may not."""
        records = self.records
        if not records.listed or not records.addresses:
            return None
        place = records.metadata
        return drawing.Candidate(
            records.name,
            records.member,
            records.weight,
            networks=() if place is None else place.networks,
            prefixes=self.prefixes,
            regions=frozenset() if place is None else regions_of(place.countries),
            since=self.member_since,
        )

    @property
    def is_excepted(self) -> bool:
        """Whether somebody meant it to go."""
        return self.held or self.state is ServerState.LEAVING

    @property
    def falls(self) -> bool:
        """Whether it would leave the SRV, and nobody meant it to."""
        return self.listed and self.state is ServerState.SUSPENDED and not self.held

    @property
    def is_kept_over(self) -> bool:
        return self.kept and (self.state is not ServerState.SUSPENDED or not self.records.listed)

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
        if self.proves or self.is_kept_over:
            return True
        if self.state is ServerState.LEAVING:
            is_told = self.closed if self.revoked else self.turned or not self.revoking
            return not (self.withdrawn and (self.broken or self.stays) and is_told)
        if self.listed != self.records.listed and (self.listed or is_open):
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
        notify=settings.dns.notify,
    )


@dataclass(frozen=True, slots=True)
class _Reasons:
    """Of what answers are made, beside the candidates: with others, they are made anew."""

    number: int  # of the draw
    policy: ZonePolicy
    regions: frozenset[str]
    is_open: bool


@dataclass(frozen=True, slots=True)
class _Drawn:
    """What is to be answered, and of what it was made at that time."""

    at: datetime
    reasons: _Reasons
    sets: drawing.AnswerSets = field(default_factory=dict)
    zone: Zone = field(default_factory=dict)  # the SRV RRsets as they should be: the first set of each region
    thin: tuple[drawing.Standing, ...] = ()  # regions that have too few servers of their own

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name for some in self.sets.values() for names in some for name in names)


@dataclass(frozen=True, slots=True)
class _Answers:
    """What the sink has: these sets, and the owners that have several of them.

    `draws` are those that count, the newest last: of each its token and everybody who is named in it.
    """

    sets: drawing.AnswerSets
    owners: frozenset[str]
    draws: tuple[tuple[str, frozenset[str]], ...]

    def names(self, server: str) -> bool:
        return any(server in names for _, names in self.draws)

    def __bool__(self) -> bool:
        """Whether anything is answered from it, and not from the zone alone."""
        return bool(self.owners)


class Publication:
    """One leader's picture of the pool and of its zone, good for as long as it leads.

    One that `only_looks` writes nothing, neither rows nor records: it finds what a leader would do.
    """

    def __init__(self, database: Database, settings: Settings, *, only_looks: bool = False) -> None:
        """Reads the registry's key from its file. Raises OSError, ValueError."""
        self._database = database
        self._settings = settings
        self._key = RegistryKey.load(settings.key_file)
        self._geo = Geo(settings.geo.database)
        self._only_looks = only_looks
        self.is_ready = False
        self.is_frozen = False
        self._policy: ZonePolicy | None = None
        self._rows: dict[int, _Row] = {}
        self._candidates: dict[int, drawing.Candidate] = {}  # who may be an SRV target
        self._drawn: _Drawn | None = None
        self._lost: set[str] = set()  # names of those who may be none any more, and may be in what was drawn
        self._answers: _Answers | None = None  # what the sink of answer sets was given last
        self._has_sink = True  # as far as is known
        self._listed: set[int] = set()  # servers of which the SRV is told
        self._falling: set[int] = set()  # those among them that would leave it, and nobody meant them to
        self._fallen: dict[int, datetime] = {}  # those that left it so, and when
        self._let_go: set[int] = set()  # those that an operator let leave it
        self._seen: Observation | None = None  # the zone on the primary, as it was last seen
        self._is_astray = False  # and it may have become something else in a way that cannot be followed
        self._in_flight: dict[Key, Change] = {}  # what we may have made since
        self._is_planned_whole = True  # the next plan is made of all servers, not of those that have changed
        self._is_plan_due = True
        self._stale: set[int] = set()  # servers whose records in the zone may not be as they should
        self._gone: set[str] = set()  # names that no server has any more
        self._waiting: set[int] = set()  # servers whose rows have to learn something yet
        self._ripe: dict[int, None] = {}  # those of them that may learn something now, the newest last
        self._unconfirmed = Unconfirmed()
        self._recent: deque[Key] = deque(maxlen=_RECENT)
        self._shown_services: Zone | None = None  # the SRV as it was seen everywhere
        self._taken: list[int] = []  # rows of the outbox that the picture has and DNS may not have
        self._pending: set[int] = set()  # and their servers
        self._is_full_batch = False
        self.question = Question()
        self._approved: Question | None = None  # by an operator, if it is still the plan
        self._granted: Question | None = None  # and what was, until it is made
        self._drift: list[Change] = []
        self._read_at: datetime | None = None
        self._observed_at: datetime | None = None
        self._checked_at: datetime | None = None
        self._late: dict[Mismatch, datetime] = {}  # who does not show what, and since when
        self.ask_at: datetime | None = None  # when those are asked again

    async def look(self, now: datetime, *, even_frozen: bool = False) -> bool:
        """Bring the picture in step with the database.

        False while the pool is frozen, and before there is an account at any CA, without which no CAA can be made.
        Touches no network.
        """
        async with self._database.transaction() as session:
            pool = await the_pool(session, self._settings)
            self.is_frozen = pool.frozen_at is not None
            issuers = _issuers(self._settings, await account_uris(session))
            self.is_ready = bool(issuers)
            if not issuers or (self.is_frozen and not even_frozen):
                return False
            found = await session.execute(
                select(ZoneChange.id, ZoneChange.server_id).order_by(ZoneChange.id).limit(_TAKEN)
            )
            changes = found.all()
            regions = await regional.switched_on(session)
            is_approved = bool(self.question) and await _is_approved(session, self.question.checksum, now)
        self._taken = [change.id for change in changes]
        self._is_full_batch = len(changes) == _TAKEN
        changed = {change.server_id for change in changes}
        self._pending |= changed
        if is_approved:
            # Whether that is still the plan is seen when it is made.
            self._approved, self._is_planned_whole = self.question, True
        if self._has_passed(self._read_at, now, self._settings.policy.full_pass_interval):
            changed |= self._rows.keys()
            await asyncio.to_thread(self._geo.refresh)
            self._rows = await self._read_all(now)
            changed |= self._rows.keys()
            self._read_at, self._is_planned_whole, self._is_plan_due = now, True, True
        elif changed:
            await self._read_some(sorted(changed), now)
        policy = zone_policy(self._settings, *issuers)
        is_other_policy, self._policy = policy != self._policy, policy
        self._stale |= self._rows.keys() if is_other_policy else changed
        changed |= await self._keep_those_that_fall(changed, now)
        is_other_choice = self._note_candidates(changed)
        is_open = pool.opened_at is not None or await self._open(now)
        before, services = self._drawn, self._services
        number = int(now.timestamp()) // self._settings.dns.srv_ttl
        reasons = _Reasons(number, policy, regions, is_open)
        if is_other_choice or before is None or reasons != before.reasons:
            self._drawn = await asyncio.to_thread(self._draw, reasons, now)
            self._lost.clear()
        self._is_plan_due |= is_other_policy or bool(changed) or is_approved or self._services != services
        everybody = bool(services) != bool(self._services)
        for server_id in list(self._rows) if everybody else changed:
            self._judge(server_id)
        return True

    def is_due(self, now: datetime) -> bool:
        """Whether `publish` has anything to do."""
        is_new = self._ripe or self._unconfirmed.has_new
        return bool(
            self._seen is None
            or self._is_astray
            or self._taken
            or self._is_plan_due
            or self._is_check_due(now)
            or self._is_hand_over_due
            or (is_new and not self._is_silent)
            or ((self._unconfirmed or self._waiting) and self._may_ask_again(now))
        )

    @property
    def geo_trouble(self) -> str | None:
        """What is wrong with the files that tell networks and countries."""
        return self._geo.trouble

    @property
    def thin_regions(self) -> tuple[drawing.Standing, ...]:
        """Regions that are switched on and have too few servers of their own."""
        return () if self._drawn is None else self._drawn.thin

    @property
    def publisher(self) -> Publisher:
        """The zone's writer under the present policy."""
        return Publisher(self._the_policy, primary_config(self._settings))

    async def publish(self, epoch: int, now: datetime) -> bool:
        """Bring the primary to the picture, ask the authoritative servers, and note what is true there.

        The fence must have been taken with `epoch`. False when one of them does not show what it was asked for; then it
        is asked again soon, and ever later. Raises PublishError when the primary cannot be brought to it.
        """
        started = time.monotonic()
        publisher = self.publisher
        is_check = self._is_check_due(now)
        if is_check:
            await self._check(publisher, now)
        if self._is_closing:
            # An edge goes on to answer from sets, whatever the zone says of their owner.
            await self._hand_over(publisher, epoch)
        changes = await self._bring(publisher, epoch, now)
        assert self._seen is not None
        if await self._hand_over(publisher, epoch) or is_check or changes or self._waiting:
            self._unconfirmed.add(self._service_keys(self._seen.zone))
        await self._verify(publisher, self._seen.zone, now, started)
        # What is noted was true when the last nameserver had answered, not when the pass began.
        ended = now + timedelta(seconds=time.monotonic() - started)
        await self._note(self._seen.zone, ended)
        await self._forget_taken()
        if is_check:
            self._checked_at = now
        return not self._late

    def is_late(self, now: datetime) -> bool:
        """Whether some authoritative server has not shown something for longer than that takes."""
        return any(now - since >= _PATIENCE for since in self._late.values())

    def take_drift(self) -> tuple[Change, ...]:
        """What somebody else did to our part of the zone since this was last asked."""
        drift, self._drift = tuple(self._drift), []
        return drift

    @property
    def has_more(self) -> bool:
        """Whether a limit ended the pass before the work did."""
        is_asking = self._unconfirmed.has_new or (self.ask_at is None and len(self._unconfirmed) > 0)
        return self._is_full_batch or bool(self._ripe) or (is_asking and not self._is_silent)

    @property
    def _is_silent(self) -> bool:
        """Whether an authoritative server did not answer: asking it again holds a pass up until it is given up."""
        return any(mismatch.key is None for mismatch in self._late)

    def _may_ask_again(self, now: datetime) -> bool:
        return self.ask_at is None or now >= self.ask_at

    @property
    def _the_policy(self) -> ZonePolicy:
        assert self._policy is not None, "look first"
        return self._policy

    @property
    def _services(self) -> Zone:
        """The SRV RRsets as they should be; none while the pool is not open."""
        return {} if self._drawn is None else self._drawn.zone

    @property
    def _service_key(self) -> Key:
        return self._the_policy.service, "SRV"

    def _service_keys(self, zone: Zone) -> list[Key]:
        """That of the pool, and those of its regions that are there or should be."""
        keys = [(owner, "SRV") for owner in self._the_policy.services]
        return [key for key in keys if key == self._service_key or key in zone or key in self._services]

    def _draw(self, reasons: _Reasons, now: datetime) -> _Drawn:
        """The answers as they should be: a new draw, or the present one without those who were lost."""
        before, regions = self._drawn, reasons.regions
        if not reasons.is_open:
            return _Drawn(now, reasons)
        is_many = before is not None and sum(map(len, before.sets.values())) > _FEW_SETS
        if before is not None and is_many and before.reasons == reasons and not self._lost:
            # Who came, or weighs something else, waits for the next draw.
            return before
        rules = regional.rules_of(self._settings)
        draw = drawing.Draw(self._candidates.values(), regions, rules, reasons.number, now)
        is_same = before is not None and before.reasons.number == reasons.number
        if before is not None and is_many and is_same and before.reasons.regions == regions:
            sets = draw.again(before.sets, self._lost)
        else:
            sets = draw.sets()
        first = {region: some[0] for region, some in sets.items() if some}
        thin = tuple(draw.standing(region) for region in sorted(regions) if draw.is_thin(region))
        return _Drawn(now, reasons, sets, services_of(first, reasons.policy), thin)

    @property
    def _several(self) -> dict[str, tuple[drawing.Names, ...]]:
        """By owner the sets where there is more than one."""
        policy, sets = self._the_policy, {} if self._drawn is None else self._drawn.sets
        return {policy.service_at(region): some for region, some in sets.items() if len(set(some)) > 1}

    @property
    def _is_hand_over_due(self) -> bool:
        """Whether the sink has other answer sets than are drawn."""
        if not self._has_sink or self._only_looks or self._drawn is None:
            return False
        if self._answers is None:
            return True  # a leader before may have left sets there
        return self._answers.sets is not self._drawn.sets and (bool(self._several) or bool(self._answers))

    async def _hand_over(self, publisher: Publisher, epoch: int) -> bool:
        """Give the sink what is drawn, if there is one; whether it was."""
        if not self._is_hand_over_due or (drawn := self._drawn) is None:
            return False
        several = self._several
        try:
            token = await subsets.Sink(publisher).publish(several, drawn.reasons.number, epoch)
        except subsets.NoSink:
            self._has_sink = False
            return False
        before = () if self._answers is None else self._answers.draws[-_DRAWS:]
        # Those before go on to count while all who are named in them are candidates: an edge that is behind is not wrong.
        candidates = {one.name for one in self._candidates.values()}
        kept = [draw for draw in before if draw[1] <= candidates]
        self._answers = _Answers(drawn.sets, frozenset(several), (*kept, (token, drawn.names)))
        return True

    @property
    def _is_closing(self) -> bool:
        """Whether an owner that has sets is to have no SRV any more."""
        return self._answers is not None and any(
            (owner, "SRV") not in self._services for owner in self._answers.owners
        )

    @property
    def _counting(self) -> PublisherDraw | None:
        """The draws that count, for who verifies what the nameservers answer."""
        if not self._answers:
            return None
        tokens = [token for token, _ in self._answers.draws]
        return subsets.draw_of(self._the_policy, self._answers.owners, tokens)

    @staticmethod
    def _has_passed(since: datetime | None, now: datetime, seconds: float) -> bool:
        return since is None or now - since >= timedelta(seconds=seconds)

    def _is_check_due(self, now: datetime) -> bool:
        return self._has_passed(self._checked_at, now, self._settings.policy.reconcile_interval)

    def _judge_answers(self, asked: Collection[Key], wrong: Sequence[Mismatch], now: datetime) -> None:
        """When to ask those again that did not show the zone, and whether to doubt what we know of it."""
        late = {
            one: since
            for one, since in self._late.items()
            if one.key is not None and one.key not in asked and one.key in self._unconfirmed
        }
        self._late = late | {one: self._late.get(one, now) for one in wrong}
        if not self._late:
            self.ask_at = None
            return
        since = min(self._late.values())
        # As long as it has been so already: a moment at first, and ever longer. What is new does not wait for what is not.
        silent = [begun for one, begun in self._late.items() if one.key is None]
        waited = now - (min(silent) if silent else max(self._late.values()))
        wait = min(max(waited.total_seconds(), _ASK_AGAIN), self._settings.policy.step_retry)
        self.ask_at = now + timedelta(seconds=wait)
        if self.is_late(now):
            _tell(wrong)
        is_old = self._observed_at is None or self._observed_at < since
        if is_old and self._has_passed(since, now, self._settings.policy.reconcile_interval):
            self._is_astray = True

    def _keys(self, row: _Row) -> list[Key]:
        """What a server's row has to know of."""
        keys = self._the_policy.keys(row.records.name)
        challenge = self._the_policy.challenge(row.records.name)
        return [key for key in keys if key[0] != challenge or row.has_text]

    def _is_shown(self, row: _Row, *kinds: str) -> bool:
        """Whether every authoritative server shows these of a server's records, or all, as the zone has them."""
        keys = (key for key in self._keys(row) if not kinds or key[1] in kinds)
        return not self._unconfirmed.covers(keys)

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
            if not self._only_looks:
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
            everywhere = {address for some in proved.values() for address, _ in some}
            places = await asyncio.to_thread(self._geo.places, everywhere)
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
                    Server.ke_cap,
                    Server.ke_traffic,
                    Server.named_at.is_not(None).label("named"),
                    Server.listed_at.is_not(None).label("listed"),
                    Server.agentless,
                    Server.own_account_uri,
                    Server.dns_01,
                    Server.validation,
                    Server.leave_at.is_not(None).label("stays"),
                    Server.leave_final,
                    Server.srv_withdrawn_at.is_not(None).label("withdrawn"),
                    Server.name_broken_at.is_not(None).label("broken"),
                    Server.revoking_since.is_not(None).label("revoking"),
                    Server.revoking_ended_at.is_not(None).label("revoked"),
                    Server.caa_turned_at.is_not(None).label("turned"),
                    Server.caa_closed_at.is_not(None).label("closed"),
                    _HELD.label("held"),
                    Server.kept_at.is_not(None).label("kept"),
                    Server.state_since,
                    Member.created_at.label("member_since"),
                )
                .join(Member, Member.id == Server.member_id)
                .where(
                    among(Server.id),
                    Server.state.in_(_STATES),
                    true() if self._only_looks else Server.burnt_at.is_not(None),
                )
            )
            return {
                row.id: _Row(
                    state=row.state,
                    records=ServerRecords(
                        name=row.name,
                        member=row.member_id,
                        addresses=tuple(servers.without_failing(proved.get(row.id, []))),
                        listed=row.state is ServerState.ACTIVE
                        or (row.state is ServerState.SUSPENDED and self._stays_listed(row)),
                        weight=scoring.sampling_weight(
                            row.weight,
                            row.traffic_cap,
                            row.traffic,
                            row.ke_cap,
                            row.ke_traffic,
                            score=scoring.best(score for _, score in proved.get(row.id, [])),
                        ),
                        account_uri=_own_account(row.own_account_uri, agentless=row.agentless),
                        methods=self._methods(row, needed=row.id in proofs),
                        proofs=tuple(proofs.get(row.id, ())),
                        metadata=self._metadata(
                            row.member_id, [places[address] for address, _ in proved.get(row.id, [])]
                        ),
                    ),
                    validation=row.validation,
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
                    held=row.held,
                    kept=row.kept,
                    since=row.state_since,
                    member_since=row.member_since,
                    prefixes=_prefixes(address for address, _ in proved.get(row.id, [])),
                )
                for row in found
            }

    def _metadata(self, member: int, places: Iterable[Place]) -> Metadata:
        """What everybody may know of a server whose proved addresses are at these places."""
        networks, countries = set[int](), set[str]()
        for place in places:
            networks |= set() if place.network is None else {place.network}
            countries |= set() if place.country is None else {place.country}
        return Metadata(
            self._key.operator_id(member),
            networks=tuple(sorted(networks)[:MAX_VALUES]),
            countries=tuple(sorted(countries)[:MAX_VALUES]),
        )

    def _methods(self, row: Any, *, needed: bool) -> tuple[Challenge, ...]:
        """How the account of a name's CAA may prove control of it: in DNS only one of the registry's."""
        is_chosen = validation.is_in_dns(self._settings, row) and row.own_account_uri is None
        return validation.methods(row.validation, in_dns=needed or is_chosen)

    def _stays_listed(self, row: Any) -> bool:
        return bool(row.kept and not row.held and row.id not in self._let_go)

    async def _keep_those_that_fall(self, changed: Iterable[int], now: datetime) -> set[int]:
        """Keep the servers that would leave the SRV as candidates, if too many would at once; those that it keeps now.

        "At once" is within ten minutes: scores fall one by one, as servers are probed.
        """
        for server_id in changed:
            self._count(server_id)
        new = {server_id for server_id in self._falling if not self._rows[server_id].records.listed}
        if not new:
            return new
        self._fallen = {one: since for one, since in self._fallen.items() if now - since < _AT_ONCE}
        lost, of = (len(some) + len(self._fallen) for some in (self._falling, self._listed))
        if not is_too_much(lost, of):
            return set()
        kept = new if self._only_looks else await self._note_kept(new, now)
        for server_id in kept:
            row = self._rows[server_id]
            self._rows[server_id] = replace(row, kept=True, records=replace(row.records, listed=True))
        return kept

    def _count(self, server_id: int) -> None:
        """Note whether a server is in the SRV, or is to leave it, or has."""
        for some in (self._listed, self._falling):
            some.discard(server_id)
        self._fallen.pop(server_id, None)
        if (row := self._rows.get(server_id)) is None:
            self._let_go.discard(server_id)
            return
        if row.listed:
            self._listed.add(server_id)
        if row.state is not ServerState.SUSPENDED or not (row.listed or row.kept):
            self._let_go.discard(server_id)
        if row.falls and server_id not in self._let_go:
            self._falling.add(server_id)
        elif row.state is ServerState.SUSPENDED and not row.listed and not row.held:
            self._fallen[server_id] = row.since

    async def _note_kept(self, ids: Iterable[int], now: datetime) -> set[int]:
        noted: set[int] = set()
        for some in _batches(sorted(ids), _NOTED):
            async with self._database.transaction() as session:
                found = await session.scalars(
                    select(Server)
                    .where(Server.id.in_(some), Server.state == ServerState.SUSPENDED)
                    .order_by(Server.id)
                    .with_for_update()
                )
                for server in found:
                    server.kept_at = server.kept_at or now
                    noted.add(server.id)
        _log.warning("srv_targets_kept", servers=len(noted))
        return noted

    def _note_candidates(self, changed: Iterable[int]) -> bool:
        """Keep the candidates in step with the rows; whether the choice of targets may be another one now."""
        is_other = False
        for server_id in changed:
            row = self._rows.get(server_id)
            before = self._candidates.pop(server_id, None)
            after = None if row is None else row.candidate
            if after is not None:
                self._candidates[server_id] = after
            elif before is not None:
                self._lost.add(before.name)
            is_other |= before != after
        return is_other

    async def _open(self, now: datetime) -> bool:
        """Open the pool once enough servers can be offered; it stays open."""
        active = sum(row.records.listed for row in self._rows.values())
        if active < self._settings.policy.opening_size:
            return False
        if self._only_looks:
            return True
        async with self._database.transaction() as session:
            pool = await the_pool(session, self._settings, lock=True)
            pool.opened_at = pool.opened_at or now
        _log.info("pool_opened", active=active)
        return True

    def _judge(self, server_id: int) -> None:
        """Note whether a row has to learn something yet, and what has to be asked for that."""
        row = self._rows.get(server_id)
        if row is None or not row.waits(is_open=bool(self._services)):
            self._waiting.discard(server_id)
            return
        self._waiting.add(server_id)
        self._ripe[server_id] = None
        if row.state is ServerState.LEAVING or row.proves or not row.named:
            self._unconfirmed.add(self._keys(row))

    def _changes(self, zone: Zone) -> tuple[Change, ...]:
        """What `zone` lacks of the picture, as far as the picture has changed since the zone was made."""
        policy = self._the_policy
        due: dict[Key, RRset | None] = {(owner, "SRV"): None for owner in policy.services}
        due |= self._services
        for name in self._gone:
            due |= dict.fromkeys(policy.keys(name))
        for row in filter(None, map(self._rows.get, self._stale)):
            due |= dict.fromkeys(policy.keys(row.records.name)) | records_of(row.published, policy)
        return ordered(
            Change(*key, zone.get(key), rrset) for key, rrset in due.items() if zone.get(key) != rrset
        )

    def whole(self) -> Zone:
        """The managed part of the zone as it should be."""
        return wanted((row.published for row in self._rows.values()), self._the_policy) | self._services

    async def plan(self, zone: Zone) -> tuple[Change, ...]:
        """What is to be made of a zone that is as given; what has to be asked for first becomes `question`."""
        if self._is_planned_whole:
            changes = await asyncio.to_thread(lambda: diff(self.whole(), zone))
        else:
            changes = self._changes(zone)
        made, question = guard(changes, zone, self._the_policy)
        if question:
            rows = self._rows.values()
            excepted = {row.records.name for row in rows if row.is_excepted}
            unlisted = {row.records.name for row in rows if not row.records.listed}
            others = await self._others(question.changes)
            excepted |= {name for name, state in others.items() if state is ServerState.REMOVED}
            made, question = guard(changes, zone, self._the_policy, excepted, unlisted | others.keys())
        if question and not self._is_planned_whole:
            # An operator looks at all that there is to do.
            self._is_planned_whole = True
            return await self.plan(zone)
        kept = (self._rows[one] for one in self._falling)
        names = sorted(row.records.name for row in kept if row.records.listed)
        self.question = replace(question, kept=tuple(names))
        approved, self._approved = self._approved, None
        if approved is not None and approved.checksum == self.question.checksum:
            # From here on until all of it is made: also when some of it is, and the zone has changed.
            self._granted = approved
            if self._let_them_go(names):
                return await self.plan(zone)
        if self._granted is not None and set(question.changes) <= set(self._granted.changes):
            self.question = replace(self.question, changes=())
            return changes
        return made

    def _let_them_go(self, names: Collection[str]) -> bool:
        """The kept servers leave the SRV; whether there are any."""
        gone = {one for one in self._falling if self._rows[one].records.name in names}
        for server_id in gone:
            row = self._rows[server_id]
            self._rows[server_id] = replace(row, records=replace(row.records, listed=False))
        self._let_go |= gone
        self._falling -= gone
        if gone and self._note_candidates(gone) and self._drawn is not None:
            self._drawn = self._draw(self._drawn.reasons, self._drawn.at)
        for server_id in gone:
            self._judge(server_id)
        return bool(gone)

    async def _others(self, changes: Iterable[Change]) -> dict[str, ServerState]:
        """Servers of which changes take something away, and that do not belong in DNS."""
        owners = (self._the_policy.name_of(change.owner) for change in changes if change.after is None)
        known = {row.records.name for row in self._rows.values()}
        names = sorted({name for name in owners if name is not None and name not in known})
        others: dict[str, ServerState] = {}
        for some in _batches(names, _READ):
            async with self._database.transaction() as session:
                found = await session.execute(select(Server.name, Server.state).where(Server.name.in_(some)))
                others |= {row.name: row.state for row in found}
        return others

    async def _check(self, publisher: Publisher, now: datetime) -> None:
        """See what has become of the zone since it was last seen."""
        if self._has_passed(self._observed_at, now, self._settings.policy.transfer_interval):
            self._is_astray = True
        if self._seen is None:
            return
        # Since the last look at the serial everybody has had the time to come to it.
        if await publisher.behind(self._seen.serial):
            # A serial is no fault: one that signs by itself has its own. What it shows counts.
            self._unconfirmed.add(self._recent)
        if not self._is_astray:
            self._seen, happened = await publisher.follow(self._seen)
            self._note_drift(happened)
            # If only to see whose the zone is.
            self._is_plan_due = True

    async def _bring(self, publisher: Publisher, epoch: int, now: datetime) -> tuple[Change, ...]:
        """What was changed on the primary, so that its zone is as it should be."""
        if self._seen is None or self._is_astray:
            await self._observe(publisher, now)
        if not self._is_plan_due:
            return ()
        # Until the primary has answered, its zone is not known.
        self._is_astray = True
        done: list[Change] = []
        is_settled = False
        while not is_settled:
            was_whole = self._is_planned_whole
            published = await publisher.bring(self._in_flight_plan, epoch, self._seen)
            self._seen = published.seen
            done += published.changes
            self._note_drift(published.foreign)
            is_settled = was_whole or not self._is_planned_whole
        keys = [change.key for change in done]
        self._unconfirmed.add(keys)
        self._recent.extend(keys[-_RECENT:])
        if was_whole:
            zone = list(published.seen.zone)
            room = max(0, _SAMPLE - len(self._unconfirmed))
            self._unconfirmed.add_last(random.sample(zone, min(len(zone), room)))
        await self._end_plan(now)
        if done:
            await publisher.notify()
            _log.info("zone_published", serial=published.seen.serial, changes=len(done))
        return tuple(done)

    async def _observe(self, publisher: Publisher, now: datetime) -> None:
        """See the whole zone anew."""
        fresh, before = await publisher.observe(), self._seen
        self._seen, self._observed_at, self._is_astray = fresh, now, False
        self._is_planned_whole = self._is_plan_due = True
        if before is not None:
            self._note_drift(diff(fresh.zone, before.zone))
        elif fresh.zone:
            self._drift += await self._drift_at_start(fresh.zone)

    async def _in_flight_plan(self, zone: Zone) -> tuple[Change, ...]:
        made = await self.plan(zone)
        self._in_flight.update((change.key, change) for change in made)
        return made

    async def _end_plan(self, now: datetime) -> None:
        """What was planned is made. What was stopped is planned again, of all servers, when anything else is."""
        self._is_astray = self._is_plan_due = False
        self._in_flight.clear()
        self._is_planned_whole = bool(self.question.changes)
        self._stale.clear()
        self._gone.clear()
        granted, self._granted = self._granted, None
        if granted is None or self.question:
            return
        gone = sorted(one for one in self._let_go if self._rows[one].kept or self._rows[one].listed)
        async with self._database.transaction() as session:
            await _note_made(session, granted.checksum, now)
            # In one with that, or a leader that comes now would keep them, and ask, once more.
            for some in _batches(gone, _READ):
                await session.execute(
                    update(Server)
                    .where(Server.id.in_(some), Server.state == ServerState.SUSPENDED)
                    .values(kept_at=None, listed_at=None)
                )
        for server_id in gone:
            self._learn(server_id, {"kept_at": None, "listed_at": None}, served=False)

    def _note_drift(self, changes: Iterable[Change]) -> None:
        """Of what happened to the zone: what was not our doing, which a plan of everything undoes."""
        ours = self._in_flight
        drift = [one for one in changes if one.key not in ours or ours[one.key].after != one.after]
        if drift:
            self._drift += drift
            self._is_planned_whole = self._is_plan_due = True

    async def _drift_at_start(self, zone: Zone) -> list[Change]:
        """What a leader before us did not leave so, as far as that can be told: what it had begun is in the outbox.

        Neither the SRV, which rotates, nor what other settings explain, nor anything if it is too much to be made.
        """
        if self._is_full_batch:
            return []
        made = await self.plan(zone)
        if self.question.changes:
            return []
        async with self._database.transaction() as session:
            found = await session.scalars(select(Server.name).where(Server.id.in_(self._pending)))
            pending = set(found)
        policy = self._the_policy
        rest = [
            change
            for change in made
            if change.rdtype != "SRV" and policy.name_of(change.owner) not in pending
        ]
        others = {key: rrset for key, rrset in zone.items() if policy.name_of(key[0]) not in pending}
        explained = await asyncio.to_thread(of_settings_alone, rest, others, policy)
        return [
            Change(change.owner, change.rdtype, change.after, change.before)
            for change in rest
            if change not in explained
        ]

    async def _verify(self, publisher: Publisher, zone: Zone, now: datetime, started: float) -> None:
        """Ask for some of what is not confirmed; who waits for what everybody shows may learn it now."""
        is_again = self._may_ask_again(now)
        if self._is_silent and not is_again:
            return
        count = max(1, _QUESTIONS // len(self._settings.dns.nameservers))
        asked = set(self._unconfirmed.turn(count, again=is_again))
        if self._service_key in self._unconfirmed:
            asked.add(self._service_key)
        wrong = await publisher.verify(sorted(asked), zone, self._counting) if asked else ()
        is_silent = any(mismatch.key is None for mismatch in wrong)
        failed = asked if is_silent else {mismatch.key for mismatch in wrong if mismatch.key is not None}
        if (subsets.marker(self._the_policy), "TXT") in failed:
            # What it shows for these is of a draw that does not count.
            failed = failed | {key for key in asked if key[1] == "SRV"}
        self._unconfirmed.answered(asked, failed)
        ended = now + timedelta(seconds=time.monotonic() - started)
        self._judge_answers(asked, wrong, ended)
        names = {self._the_policy.name_of(owner) for owner, _ in asked - failed}
        self._ripe.update(
            dict.fromkeys(one for one in self._waiting if self._rows[one].records.name in names)
        )
        before, self._shown_services = self._shown_services, None
        if self._is_service_shown(zone):
            self._shown_services = {key: zone[key] for key in self._service_keys(zone) if key in zone}
            if self._shown_services != before:
                self._ripe = dict.fromkeys(self._waiting) | self._ripe

    def _is_service_shown(self, zone: Zone) -> bool:
        """Whether everybody answers for the pool and its regions as the zone and the draws that count have it."""
        return not self._unconfirmed.covers(self._service_keys(zone))

    async def _note(self, zone: Zone, now: datetime) -> None:
        """Tell the rows of some servers, the newest first, what the authoritative servers show."""
        looked: list[int] = []
        news: dict[int, dict[str, datetime | None]] = {}
        served: set[int] = set()
        for server_id in islice(reversed(self._ripe), _LOOKED):
            if len(news) == _NOTED:
                break
            looked.append(server_id)
            row = self._rows[server_id] if server_id in self._waiting else None
            values, is_served = (
                ({}, False) if row is None else (self._news(row, zone, now), self._serves(row, zone))
            )
            if values or is_served:
                news[server_id] = values
                served |= {server_id} if is_served else set()
        noted = await self._write(news, served, now) if news else []
        for server_id in looked:
            del self._ripe[server_id]
        for server_id in noted:
            self._learn(server_id, news[server_id], served=server_id in served)

    async def _write(
        self, news: Mapping[int, dict[str, datetime | None]], served: Collection[int], now: datetime
    ) -> list[int]:
        """Those of the servers that could be told."""
        noted: list[int] = []
        async with self._database.transaction() as session:
            found = await session.scalars(
                select(Server)
                .where(Server.id.in_(news))
                .order_by(Server.id)
                .options(selectinload(Server.orders), selectinload(Server.revocation_orders))
                .with_for_update(of=Server)
            )
            for server in found:
                # One that changed meanwhile has a row in the outbox: it is looked at again.
                row = self._rows[server.id]
                account = _own_account(server.own_account_uri, agentless=server.agentless)
                present = (server.state, account, server.validation)
                if present == (row.state, row.records.account_uri, row.validation):
                    for name, value in news[server.id].items():
                        setattr(server, name, value)
                    _hurry(server, news[server.id], now)
                    if "named_at" in news[server.id]:
                        server.order_due_at = self._first_order(server, now)
                        server.queue_round, server.caa_changed = None, False
                    if server.id in served:
                        self._note_served(server, row, now)
                    noted.append(server.id)
        return noted

    def _serves(self, row: _Row, zone: Zone) -> bool:
        """Whether everybody shows a proof of control, and the CAA that lets it count."""
        owner = self._the_policy.challenge(row.records.name)
        return row.proves and (owner, "TXT") in zone and self._is_shown(row, "TXT", "CAA")

    def _note_served(self, server: Server, row: _Row, now: datetime) -> None:
        """The CA may look once its resolvers have forgotten what was there before."""
        shown, due_at = row.published.proofs, now + self._forgetting
        proofs: list[Order | RevocationOrder] = [*server.orders, *server.revocation_orders]
        for proof in proofs:
            is_over = isinstance(proof, Order) and proof.status not in validation.PROVING
            if proof.txt in shown and proof.served_at is None and not is_over:
                proof.served_at, proof.due_at = now, due_at

    @property
    def _negative_ttl(self) -> timedelta:
        return timedelta(seconds=0 if self._seen is None else self._seen.soa_minimum)

    @property
    def _forgetting(self) -> timedelta:
        """How long a resolver may know a server's records, or their absence, as they were."""
        return max(self._negative_ttl, timedelta(seconds=self._settings.dns.address_ttl))

    def _first_order(self, server: Server, now: datetime) -> datetime | None:
        """When an order is due for a name that everybody shows: not before the last resolver forgot its absence.

        Nor the CAA that let nobody, another account, or another method. By a member's own account: that it is due means
        that this one may. A certificate from before is renewed in its time.
        """
        if own_account.is_used(server):
            return None if server.own_account_uri is None else now + self._forgetting
        planned = servers.renewal_at(server) or now
        if server.caa_changed:
            soonest = servers.soonest_order(self._settings, server, now)
            return max(now + self._forgetting, planned, soonest)
        return max(now + self._negative_ttl, planned)

    def _news(self, row: _Row, zone: Zone, now: datetime) -> dict[str, datetime | None]:
        """The columns of a server's row that what was seen in DNS changes."""
        owner = self._the_policy.domain(row.records.name)
        is_shown = self._is_shown(row)
        is_named = (owner, "CAA") in zone
        is_service_right = self._is_service_shown(zone)
        if row.state is ServerState.LEAVING:
            news: dict[str, datetime | None] = {}
            if not row.withdrawn and is_service_right and not self._is_named(zone, row.records.name):
                news |= {"srv_withdrawn_at": now, "listed_at": None, "kept_at": None}
            kinds = ("A", "AAAA") if row.revoking else ("A", "AAAA", "CAA")
            is_out = all((owner, kind) not in zone for kind in kinds) and self._is_shown(row, *kinds)
            if not row.broken and is_out:
                news["name_broken_at"] = now
            return news | self._news_of_revocation(row, is_named=is_named, now=now)
        news = {}
        if not row.named and is_named and is_shown:
            # Resolvers may have cached that the name does not exist, or a whole gap of names around it.
            news["named_at"] = now
        if row.listed and not row.records.listed:
            news["listed_at"] = None
        elif row.records.listed and not row.listed and self._services and is_service_right:
            news["listed_at"] = now
        if row.is_kept_over:
            news["kept_at"] = None
        return news

    def _is_named(self, zone: Zone, name: str) -> bool:
        """Whether anything that is answered for the pool or a region may name a server."""
        owner = self._the_policy.domain(name)
        is_given = self._answers is not None and self._answers.names(name)
        return is_given or any(_lists(zone[key], owner) for key in self._service_keys(zone) if key in zone)

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
            kept=row.kept and "kept_at" not in news,
        )
        self._count(server_id)
        self._judge(server_id)

    async def _forget_taken(self) -> None:
        """Remove what was taken from the outbox: it is published and noted."""
        for some in _batches(self._taken, _READ):
            async with self._database.transaction() as session:
                await session.execute(delete(ZoneChange).where(ZoneChange.id.in_(some)))
        self._taken = []


async def _is_approved(session: AsyncSession, checksum: str, now: datetime) -> bool:
    """Whether an operator has confirmed exactly this plan."""
    found = select(ZonePlan.id).where(
        ZonePlan.checksum == checksum, ZonePlan.made_at.is_(None), ZonePlan.expires_at > now
    )
    return await session.scalar(found.limit(1)) is not None


async def _note_made(session: AsyncSession, checksum: str, now: datetime) -> None:
    """One word is good for one time."""
    for plan in await session.scalars(
        select(ZonePlan).where(
            ZonePlan.checksum == checksum, ZonePlan.made_at.is_(None), ZonePlan.expires_at > now
        )
    ):
        plan.made_at = now


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
            among(Order.server_id), Order.txt.is_not(None), Order.status.in_(validation.PROVING)
        ),
        select(RevocationOrder.server_id, RevocationOrder.txt, RevocationOrder.served_at.is_not(None)).where(
            among(RevocationOrder.server_id),
            RevocationOrder.txt.is_not(None),
            RevocationOrder.ended_at.is_(None),
        ),
    )


def _own_account(uri: str | None, *, agentless: bool) -> str | None:
    """The account that a server's CAA names in place of the pool's."""
    return uri or ("" if agentless else None)


def _hurry(server: Server, news: Mapping[str, datetime | None], now: datetime) -> None:
    """A removal that waited for this goes on; one that a worker may have at this moment ends by itself, and looks again."""
    due_at = server.removal_due_at
    if {"name_broken_at", "caa_closed_at"} & news.keys() and (due_at is None or due_at > now + LEASE):
        server.removal_due_at = now


def _batches(some: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (some[start : start + size] for start in range(0, len(some), size))


def _lists(service: RRset, owner: str) -> bool:
    return any(text.split()[-1] == owner for text in service.rdatas)


def _tell(mismatches: Sequence[Mismatch]) -> None:
    for mismatch in mismatches[:_LOGGED_MISMATCHES]:
        owner, kind = mismatch.key or ("", "")
        server = str(mismatch.nameserver)
        _log.warning("zone_mismatch", nameserver=server, owner=owner, type=kind, reason=mismatch.reason)


def _issuers(settings: Settings, accounts: Mapping[str, str]) -> list[CaaIssuer]:
    """The registry's account at each CA of the settings; one of which there is none yet may not issue."""
    cas = settings.ca.with_rehearsal
    return [CaaIssuer(ca.caa_identity, accounts[ca.name]) for ca in cas if ca.name in accounts]


def _prefixes(addresses: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(map(prefix_of, addresses))))


def zone_policy(settings: Settings, *issuers: CaaIssuer) -> ZonePolicy:
    """The settings' part of the policy, and who may issue."""
    return ZonePolicy(
        pool=settings.pool,
        srv_ttl=settings.dns.srv_ttl,
        address_ttl=settings.dns.address_ttl,
        ke_port=settings.ports.ke,
        caa=issuers,
    )
