"""The registry's own clock and network (I/O): looked at like those of every other monitor, and noted in the row of its own one.

Each process that works checks itself, by `monitor.references`. Without any only the families are noted to which it knows a way.
"""

import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import structlog
from cryptography import x509

from poolsvc import monitors
from poolsvc.config import Settings
from poolsvc.db import Database
from poolsvc.models import Monitor
from poolsvc.monitor.references import References
from poolsvc.monitor.soundness import Soundness, agrees
from poolsvc.rounds import VERSIONS, Rounds

_log = structlog.get_logger()
# Seconds; while the check fails, it is made as often at least.
_RECHECK = 15.0
_MISSED = 3  # checks of another process, after which what it said is too old


class LocalCheck:
    """What one process knows of itself, and the rounds of its probes that wait for that."""

    def __init__(self, database: Database, settings: Settings, roots: Sequence[x509.Certificate]) -> None:
        own = settings.monitor
        self._database = database
        self._interval = own.check_interval
        self._references = (
            References(own.parsed_references, roots, VERSIONS) if own.parsed_references else None
        )
        self._due_at = 0.0
        self._soundness: Soundness | None = None
        self._noted: tuple[bool, bool] | None = None
        self._noted_at: datetime | None = None
        self.rounds = Rounds(settings.policy.probe_interval, is_checked=self._references is not None)

    @property
    def may_probe(self) -> bool:
        """Whether what is probed now may count."""
        return any(map(self.rounds.may_look, VERSIONS))

    @property
    def alarm(self) -> str | None:
        """What is wrong with this process's own clock or network."""
        if self._soundness is not None and not self._soundness.is_sound:
            return f"it probes nothing: {self._soundness.detail}"
        return self.rounds.fault

    async def look(self) -> None:
        """Check if it is time to, and note what is new."""
        if self._references is None:
            families = self.rounds.sees(4), self.rounds.sees(6)
            if families != self._noted:
                await self._note(None, families, datetime.now(UTC))
            return
        began = time.monotonic()
        if began < self._due_at:
            return
        found = agrees(await self._references.read(), self._references.names)
        self.rounds.check(found, began)
        before, self._soundness = self._soundness, found
        if before is None or before.is_sound != found.is_sound:
            log = _log.info if found.is_sound else _log.warning
            log("local_check", sound=found.is_sound, detail=found.detail, ipv4=found.ipv4, ipv6=found.ipv6)
        pause = self._interval if found.is_sound else min(self._interval, _RECHECK)
        self._due_at = time.monotonic() + pause
        await self._note(found, (self.rounds.sees(4), self.rounds.sees(6)), datetime.now(UTC))

    async def _note(self, found: Soundness | None, families: tuple[bool, bool], now: datetime) -> None:
        async with self._database.transaction() as session:
            first = await monitors.inner(session)
            monitor = await session.get_one(
                Monitor, first.id, with_for_update={"key_share": True}, populate_existing=True
            )
            if found is not None and not found.is_sound and self._is_another_sound(monitor, now):
                return
            monitors.note_soundness(
                monitor,
                is_sound=None if found is None else found.is_sound,
                detail="" if found is None else found.detail,
                has_ipv4=families[0],
                has_ipv6=families[1],
                now=now,
            )
            if found is not None:
                monitor.seen_at = now
        self._noted, self._noted_at = families, now

    def _is_another_sound(self, monitor: Monitor, now: datetime) -> bool:
        """Whether another process has just found itself in order: then the monitor works, though not here."""
        if not monitor.sound or monitor.seen_at is None or monitor.seen_at == self._noted_at:
            return False
        return now - monitor.seen_at <= _MISSED * timedelta(seconds=self._interval)
