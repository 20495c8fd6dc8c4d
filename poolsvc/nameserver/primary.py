"""The zone as a whole: in memory, on the disk, in answers; the only place where it changes, one change at a time.

A change is worked out and signed in turns with everything else, is then on the disk, and is then seen, by everybody at
once. What fails before that has changed nothing.
"""

import asyncio
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import SystemRandom
from typing import ParamSpec, Self, TypeVar

import dns.name
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.update
import structlog
from dns.dnssectypes import DSDigest

from poolsvc.nameserver import records, rollover
from poolsvc.nameserver.answers import Answers
from poolsvc.nameserver.draws import Draws
from poolsvc.nameserver.keys import Keyring, KeyState
from poolsvc.nameserver.records import Key, Name, RRset
from poolsvc.nameserver.rollover import Waits
from poolsvc.nameserver.store import KeyRow, Step, Store, StoreUnusable
from poolsvc.nameserver.updates import evaluate
from poolsvc.nameserver.zone import SignedZone

_log = structlog.get_logger()
_T = TypeVar("_T")
_P = ParamSpec("_P")
# Signatures in a row, of some 50 microseconds each, before others get their turn.
_IN_A_ROW = 8
# Signatures that one edition renews.
_RENEWED = 400


@dataclass(frozen=True, slots=True)
class Apex:
    """What the operator's settings say of the zone itself: names of nameservers with their addresses, TTLs in seconds.

    A new zone begins with `seed` as well, which is the operator's to change afterwards.
    """

    name: Name
    nameservers: Mapping[str, Sequence[str]]
    ttl: int
    negative_ttl: int
    longest_ttl: int
    ds_ttl: int
    margin: int
    seed: Mapping[Key, RRset] = field(default_factory=dict)

    @property
    def waits(self) -> Waits:
        """How long the keys' states have to last at least."""
        return Waits(self.ttl, max(self.longest_ttl, self.ttl), self.ds_ttl, self.margin)

    def rrsets(self) -> dict[Key, RRset | None]:
        """SOA (with the serial 0), NS, and the addresses of nameservers that are in the zone."""
        hosts = [records.to_wire(dns.name.from_text(name)) for name in self.nameservers]
        first, apex = records.from_wire(hosts[0]), records.from_wire(self.name)
        # A secondary that missed a notification asks within a minute; one that is cut off ends before signatures do.
        soa = f"{first} hostmaster.{apex} 0 60 30 345600 {self.negative_ttl}"
        found: dict[Key, RRset | None] = {
            (self.name, records.SOA): rrset(self.ttl, "SOA", soa),
            (self.name, records.NS): RRset.of(self.ttl, hosts),
        }
        for host, addresses in zip(hosts, self.nameservers.values(), strict=True):
            if not records.is_below(host, self.name):
                continue
            for kind, rdtype in (("A", records.A), ("AAAA", records.AAAA)):
                texts = [address for address in addresses if (":" in address) == (kind == "AAAA")]
                found[host, rdtype] = rrset(self.ttl, kind, *texts) if texts else None
        return found


def rrset(ttl: int, kind: str, *texts: str) -> RRset:
    """Of records in zone-file form with absolute names."""
    return RRset.of(ttl, (records.canonical(dns.rdata.from_text("IN", kind, one)) for one in texts))


class Primary:
    """`now` is Unix time in whole seconds."""

    def __init__(self, apex: Apex, store: Store, rows: Sequence[KeyRow], zone: SignedZone, now: int) -> None:
        self.zone = zone
        self.answers = Answers(zone)
        self.draws = Draws(zone, self.answers, now)
        self._changed = asyncio.Condition()  # told of each edition
        self._apex = apex
        self._store = store
        self._rows = list(rows)
        self._seen_version: int | None = None
        self._signed_since: int | None = None  # since when nothing is signed by another key than it should be
        self._now = 0
        self._lock = asyncio.Lock()
        self._drawing = asyncio.Lock()  # of the answer sets, which wait for no edition, nor the reverse
        self._thread = ThreadPoolExecutor(1, "zone-store")

    @classmethod
    async def open(cls, directory: Path, apex: Apex, now: int) -> Self:
        """The zone that is in the directory, brought to what the settings say of it; a new one where none is.

        Raises StoreUnusable.
        """
        store = Store.open(directory, apex.name, as_server=True)
        try:
            rows = store.key_rows() or [store.first_key(now)]
            try:
                keyring = Keyring(apex.name, [row.key for row in rows])
            except ValueError:
                raise StoreUnusable(
                    "not exactly one key is active; restore the directory from a copy"
                ) from None
            zone = SignedZone(keyring, store.content(), SystemRandom(), now)
            primary = cls(apex, store, rows, zone, now)
            await primary._settle(now)
            while zone.is_expired(now):  # before anybody sees it
                await primary._change({}, now, renewed=zone.due(now, _RENEWED))
        except BaseException:
            store.close()
            raise
        return primary

    async def close(self) -> None:
        async with self._lock:
            self._thread.shutdown()
            self._store.close()

    async def update(self, message: dns.update.UpdateMessage, now: int) -> None:
        """Make an update; it is on the disk and in answers when this returns. Raises Refused.

        A part of a draw is signed then, and in answers with the last one.
        """
        async with self._lock:
            changed, part = evaluate(message, self.zone), self.draws.read(message)
            await self._change(changed, now)
        if part is not None:
            async with self._drawing:
                await _in_turns(self.draws.take(part, now))

    async def steps(self, serial: int, most: int) -> list[Step] | None:
        """The way from an edition to the newest one, as `Store.steps`."""
        return await self._in_thread(self._store.steps, serial, most)

    async def wait_for_other(self, serial: int) -> None:
        """Return once the zone has another serial."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.zone.serial != serial)

    async def maintain(self, now: int) -> bool:
        """Sign what ages anew, take the keys on; whether more of it is due at once."""
        async with self._lock:
            if now < self._now:
                self.zone.survey(now)
            self._now = now
            await self._read_keys()
            if self.zone.due(now, 1) or self.draws.is_due(now):
                self._signed_since = None
            elif self._signed_since is None:
                self._signed_since = now
            news = rollover.advance(self._rows, self._waits, now, signed_since=self._signed_since)
            if news:
                await self._take_keys(rollover.moved(self._rows, news), news, now)
            aging = self.zone.due(now, _RENEWED)
            if aging:
                await self._change({}, now, renewed=aging)
        async with self._drawing:
            if self.draws.is_due(now):
                await _in_turns(self.draws.renew(now))
        return len(aging) == _RENEWED

    async def note_ds(self, now: int) -> None:
        """The parent names the active key, and no other."""
        async with self._lock:
            for row in self._rows:
                if row.key.state is KeyState.ACTIVE and row.ds_seen is None:
                    await self._in_thread(self._store.note_ds, row, now)
                    _log.info("parent_names_key", tag=row.key.tag)
            self._rows = await self._in_thread(self._store.key_rows)

    @property
    def ds_ttl(self) -> int:
        """How long the parent's DS is kept by others, seconds."""
        return self._apex.ds_ttl

    @property
    def awaits_parent(self) -> bool:
        """Whether a roll-over waits for the parent to name the active key."""
        states = {row.key.state for row in self._rows}
        return KeyState.RETIRING in states and any(
            row.key.state is KeyState.ACTIVE and row.ds_seen is None for row in self._rows
        )

    def is_named(self, ds: bytes) -> bool:
        """Whether a DS of the parent is that of the active key."""
        active, apex = self.zone.keyring.active, self.zone.apex
        return ds in {active.ds(apex, digest) for digest in (DSDigest.SHA256, DSDigest.SHA384)}

    async def _settle(self, now: int) -> None:
        """Bring the apex to the settings. Nameservers that are gone from them keep their addresses."""
        wanted = self._apex.rrsets()
        key = self._apex.name, records.SOA
        # A zone that was lost begins anew with a serial that its secondaries have not seen yet.
        serial = self.zone.serial if len(self.zone) else self._store.first_serial(now)
        wanted |= {} if len(self.zone) else self._apex.seed
        soa = wanted[key]
        assert soa is not None
        wanted[key] = replace(soa, rdatas=(records.with_serial(soa.rdatas[0], serial),))
        await self._change(wanted, now)

    @property
    def _waits(self) -> Waits:
        """As the settings say, and no shorter than what is in the zone."""
        waits = self._apex.waits
        if len(self._rows) == 1:
            return waits
        keys = (self.zone.node(self.zone.apex) or {})[records.DNSKEY].rrset.ttl
        return replace(waits, keys=max(waits.keys, keys), zone=max(waits.zone, self.zone.longest_ttl))

    async def _read_keys(self) -> None:
        """See what commands of other processes have done: a key that they made, a DS that they saw."""
        version = await self._in_thread(lambda: self._store.version)
        if version != self._seen_version:
            self._rows = await self._in_thread(self._store.key_rows)
            self._seen_version = version

    async def _take_keys(self, rows: Sequence[KeyRow], news: Sequence[KeyRow], now: int) -> None:
        keyring = Keyring(self.zone.apex, [row.key for row in rows])
        await self._change({}, now, keyring=keyring, states=news)
        self._rows, self._signed_since = list(rows), None
        for row in news:
            _log.info("zone_key", tag=row.key.tag, state=row.key.state.value)

    async def _change(
        self,
        wanted: Mapping[Key, RRset | None],
        now: int,
        *,
        keyring: Keyring | None = None,
        renewed: Sequence[Key] = (),
        states: Sequence[KeyRow] = (),
    ) -> None:
        if not (wanted or keyring or renewed):
            return
        edition = await _in_turns(self.zone.edit(wanted, now, keyring=keyring, renewed=renewed))
        if edition is None:
            return
        await self._in_thread(self._store.commit, edition, states)
        self.zone.adopt(edition)
        self.answers.renew(edition)
        self.draws.drop(edition)
        async with self._changed:
            self._changed.notify_all()

    async def _in_thread(self, work: Callable[_P, _T], *arguments: _P.args, **options: _P.kwargs) -> _T:
        call = partial(work, *arguments, **options)
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)


async def _in_turns(steps: Generator[None, None, _T]) -> _T:
    count = 0
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: _T = end.value
            return result
        count += 1
        if count % _IN_A_ROW == 0:
            await asyncio.sleep(0)
