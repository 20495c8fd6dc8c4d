"""The registry's accounts at its CAs: each opened when it is needed, so that a CA that is away holds up no other.

Orders name their CA by the host of its directory. Which CA an order goes to is `poolsvc.issuance`'s to decide.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import structlog
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.acme import AcmeAccount, AcmeError, Terms
from poolsvc.acme_client import RemoteAccount
from poolsvc.config import AUTO_PROFILE, AuthoritySettings, Settings
from poolsvc.db import Database
from poolsvc.models import CaAccount
from poolsvc.pool import the_pool

_log = structlog.get_logger()
# How long a directory is believed.
_DIRECTORY_LIFE = timedelta(days=1)
# An account's process may end once in this time before it is waited for.
_STEADY = timedelta(minutes=1)

UNKNOWN_CA = "unknown-ca"

Accounts = Callable[[str, datetime], Awaitable[AcmeAccount]]
"""Gives the account at the CA of a name. Raises AcmeError: not permanent while the CA is out of reach, permanent for a
name that the settings do not have."""


async def account_uris(session: AsyncSession) -> dict[str, str]:
    """The accounts that were opened so far, by CA."""
    rows = await session.scalars(select(CaAccount))
    return {row.ca: row.uri for row in rows}


async def offers(session: AsyncSession, settings: Settings, profile: str) -> bool:
    """Whether a CA of the settings has a certificate profile, as far as it was asked."""
    rows = await session.scalars(
        select(CaAccount).where(CaAccount.ca.in_([ca.name for ca in settings.ca.all]))
    )
    return any(profile in row.profiles for row in rows)


@dataclass(slots=True)
class _Place:
    """One CA as this process knows it."""

    settings: AuthoritySettings
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    account: RemoteAccount | None = None
    unopened: RemoteAccount | None = None  # a process whose CA has not answered yet
    opened_at: datetime | None = None
    read_at: datetime | None = None  # when its directory was
    failures: int = 0  # in a row
    due_at: datetime | None = None  # of the next try
    error: AcmeError | None = None  # of the last one


class Authorities:
    """All CAs of the settings. `away` and `faults` are told which are out of reach, and what else is wrong with them."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        away: MutableMapping[str, str],
        faults: MutableMapping[str, str],
    ) -> None:
        self._database = database
        self._settings = settings
        self._away = away
        self._faults = faults
        self._places = {ca.name: _Place(ca) for ca in settings.ca.with_rehearsal}

    async def account(self, name: str, now: datetime) -> AcmeAccount:
        """As `Accounts` says."""
        place = self._places.get(name)
        if place is None:
            raise AcmeError(UNKNOWN_CA, f"the settings have no CA {name} (any more)", permanent=True)
        async with place.lock:
            if place.account is None or place.account.lost:
                return await self._open(place, now)
            return place.account

    async def keep(self, now: datetime) -> None:
        """Open what is not open, since CAA names all accounts from the start, and read old directories again.

        What nobody foresaw at one CA is raised once all others are looked after.
        """
        looks = (self._keep(place, now) for place in self._places.values())
        outcomes = await asyncio.gather(*looks, return_exceptions=True)
        if failures := [outcome for outcome in outcomes if isinstance(outcome, Exception)]:
            raise ExceptionGroup("accounts could not be kept", failures)

    def close(self) -> None:
        for place in self._places.values():
            for account in (place.account, place.unopened):
                if account is not None:
                    account.close()

    async def _keep(self, place: _Place, now: datetime) -> None:
        try:
            account = await self.account(place.settings.name, now)
            if place.read_at is not None and now - place.read_at < _DIRECTORY_LIFE:
                return
            place.read_at = now
            await self._note(place, account.uri, await account.read_directory())
        except AcmeError as error:
            _log.debug("ca_not_read", ca=place.settings.name, code=error.code)

    async def _open(self, place: _Place, now: datetime) -> AcmeAccount:
        if place.due_at is not None and place.error is not None and now < place.due_at:
            raise _later(place.error, (place.due_at - now).total_seconds())
        name = place.settings.name
        try:
            account = await self._way_to(place)
            await account.enter()
            terms = await account.read_directory()
        except AcmeError as error:
            if name not in self._away:
                _log.error("ca_unreachable", ca=name, code=error.code, detail=error.detail)
            self._away[name] = error.detail
            wait = self._settings.policy.step_wait(place.failures)
            wait = max(wait, timedelta(seconds=error.retry_after or 0))
            place.due_at, place.error = now + wait, error
            place.failures += 1
            raise _later(error, wait.total_seconds()) from error
        self._away.pop(name, None)
        # A process that ends again and again is started again only after a wait.
        is_steady = place.opened_at is None or now - place.opened_at > _STEADY
        place.due_at = None if is_steady else now + self._settings.policy.step_wait(0)
        place.error, place.failures = AcmeError("unreachable", "the process with the account's key ended"), 0
        await self._note(place, account.uri, terms)
        if place.account is not None:
            place.account.close()
        place.account, place.unopened = account, None
        place.opened_at = place.read_at = now
        _log.info("acme_account_open", ca=name, uri=account.uri, at=now.isoformat())
        return account

    async def _way_to(self, place: _Place) -> RemoteAccount:
        """The process that holds the account: a CA that is away costs no start of another one."""
        if place.unopened is not None and place.unopened.has_ended:
            place.unopened.close()
            place.unopened = None
        if place.unopened is None:
            place.unopened = await RemoteAccount.connect(self._settings, place.settings)
        return place.unopened

    async def _note(self, place: _Place, uri: str, terms: Terms) -> None:
        """What CAA needs to know, and whether the CA still has the profile that it is asked for."""
        name, profile = place.settings.name, place.settings.profile
        async with self._database.transaction() as session:
            await the_pool(session, self._settings, lock=True)  # of several processes one makes the row
            row = await session.scalar(select(CaAccount).where(CaAccount.ca == name))
            if row is None:
                session.add(CaAccount(ca=name, uri=uri, profiles=list(terms.profiles)))
            else:
                row.uri, row.profiles = uri, list(terms.profiles)
        if profile == AUTO_PROFILE or profile in terms.profiles:
            self._faults.pop(name, None)
        else:
            self._faults[name] = f"{name} has no profile {profile}: its certificates have the CA's own choice"


def _later(error: AcmeError, seconds: float) -> AcmeError:
    """What keeps an account from being opened keeps orders waiting; it refuses none of them."""
    return AcmeError(error.code, error.detail, retry_after=seconds)
