"""The documents that people accept before they register a server, such as the CA's subscriber agreement."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from poolsvc.config import Settings
from poolsvc.errors import InvalidDocument, TermsNotAccepted
from poolsvc.models import Acceptance

# A document and its version.
Accepted = tuple[str, str]


@dataclass(frozen=True, slots=True)
class TermsState:
    """One current document, and when the user accepted it."""

    document: str
    version: str
    title: str
    url: str
    accepted_at: datetime | None


def check_current(settings: Settings, given: Collection[Accepted], *, shown: str) -> None:
    """Refuse an acceptance that is not of exactly the current documents; `shown` is the call that has them.

    Raises InvalidDocument.
    """
    current = {(entry.document, entry.version) for entry in settings.terms}
    if set(given) != current:
        named = ", ".join(f"{document} {version}" for document, version in sorted(current)) or "none"
        raise InvalidDocument(
            "`accept` does not name the current terms, each with its version",
            remedy=f"read them ({shown}) and name them all: {named}",
            field="accept",
        )


async def state(session: AsyncSession, settings: Settings, user_id: int | None) -> list[TermsState]:
    """The current documents in the settings' order; nobody has accepted them without an account."""
    found = await session.scalars(select(Acceptance).where(Acceptance.user_id == user_id))
    accepted = {(row.document, row.version): row.at for row in found}
    return [
        TermsState(
            entry.document,
            entry.version,
            entry.title,
            entry.url,
            accepted.get((entry.document, entry.version)),
        )
        for entry in settings.terms
    ]


async def accept(
    session: AsyncSession, settings: Settings, user_id: int, given: Sequence[Accepted], now: datetime
) -> None:
    """Record that a user accepted all current documents; what was accepted before stays. Raises InvalidDocument."""
    check_current(settings, given, shown="GET /v1/me/terms")
    await record(session, user_id, given, now)


async def record(session: AsyncSession, user_id: int, given: Sequence[Accepted], now: datetime) -> None:
    known = select(Acceptance.document, Acceptance.version).where(Acceptance.user_id == user_id)
    before = {(document, version) for document, version in await session.execute(known)}
    for document, version in dict.fromkeys(given):
        if (document, version) not in before:
            session.add(Acceptance(user_id=user_id, document=document, version=version, at=now))
    await session.flush()


async def require(session: AsyncSession, settings: Settings, user_id: int | None) -> None:
    """Refuse who has not accepted all current documents. Raises TermsNotAccepted."""
    if not settings.terms:
        return
    assert user_id is not None, "only people accept terms"
    missing = [entry for entry in await state(session, settings, user_id) if entry.accepted_at is None]
    if missing:
        raise TermsNotAccepted(
            f"you have not accepted: {', '.join(f'{entry.title} ({entry.version})' for entry in missing)}",
            remedy="read them and accept them: POST /v1/me/terms",
        )
