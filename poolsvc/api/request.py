"""What every endpoint stands on: the application's services, one transaction, one moment, and who is asking."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import MAXYEAR, MINYEAR, UTC, datetime
from typing import Annotated

from fastapi import Depends, Path, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy.ext.asyncio import AsyncSession

from poolsvc import auth
from poolsvc.api.limits import Limits
from poolsvc.auth import Principal
from poolsvc.concentration import Concentration
from poolsvc.config import Settings
from poolsvc.db import Database, act_as
from poolsvc.derived import RegistryKey
from poolsvc.disagreements import Found
from poolsvc.drawing import Odds
from poolsvc.inspection import Inspector
from poolsvc.oidc import Provider
from poolsvc.pool import Census, Kept
from poolsvc.regional import Atlas, Place


@dataclass(frozen=True, slots=True)
class Services:
    """What the application lends to every request."""

    settings: Settings
    database: Database
    key: RegistryKey
    limits: Limits
    census: Kept[Census]
    odds: Kept[Odds]
    atlas: Atlas
    regions: Kept[dict[str, Place]]
    concentration: Kept[dict[str, Concentration]]
    disagreements: Kept[Sequence[Found]]
    providers: Mapping[str, Provider]  # of OpenID Connect, by name
    inspector: Inspector


# Not plain functions: FastAPI would send each through a thread.
async def _source(request: Request) -> str:
    return request.client.host if request.client else ""


# The address that a request comes from; empty when that is not known.
SourceDep = Annotated[str, Depends(_source)]


async def _services(request: Request, source: SourceDep) -> Services:
    services: Services = request.app.state.services
    if source:
        services.limits.take_for_address(source)
    return services


ServicesDep = Annotated[Services, Depends(_services)]


async def _session(services: ServicesDep) -> AsyncIterator[AsyncSession]:
    """One request is one transaction: it commits when the endpoint returns and rolls back when it raises."""
    async with services.database.transaction("anybody") as session:
        yield session


# Scope "function": the transaction has ended before the answer leaves, so an answer never promises too much.
SessionDep = Annotated[AsyncSession, Depends(_session, scope="function")]


async def _now() -> datetime:
    return datetime.now(UTC)


NowDep = Annotated[datetime, Depends(_now)]
_bearer = HTTPBearer(auto_error=False, description="a session's, API, agent's or join token")
CredentialsDep = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


async def _principal(
    session: SessionDep,
    now: NowDep,
    services: ServicesDep,
    credentials: CredentialsDep,
) -> Principal:
    principal = await auth.authenticate(session, credentials.credentials if credentials else None, now)
    services.limits.take_for_token(principal.token_id)
    act_as(session, principal.actor)
    return principal


PrincipalDep = Annotated[Principal, Depends(_principal)]


async def _caller(
    services: ServicesDep,
    now: NowDep,
    credentials: CredentialsDep,
) -> Principal:
    async with services.database.transaction("anybody") as session:
        return await _principal(session, now, services, credentials)


# For endpoints that ask somebody else: the transaction that found who is asking has ended.
CallerDep = Annotated[Principal, Depends(_caller)]
# Without control characters: PostgreSQL takes no NUL, and people read these in one line.
_LINE = r"^[^\x00-\x1f\x7f]*$"
# All that is said in words: every text of a request is one, so that none reaches a statement with a NUL.
Line = Annotated[str, Field(pattern=_LINE)]
NamePath = Annotated[str, Path(max_length=64, pattern=_LINE)]
AddressPath = Annotated[str, Path(max_length=45, pattern=_LINE)]
IdPath = Annotated[int, Path(ge=1, le=2**31 - 1)]
RandomIdPath = Annotated[int, Path(ge=1, le=2**53 - 1)]
TextQuery = Annotated[str | None, Query(max_length=100, pattern=_LINE)]


def _in_utc(moment: datetime) -> datetime:
    # At either end of the calendar there is no UTC to be stored in, or no time in the zone of a database's connection.
    if not MINYEAR < moment.year < MAXYEAR:
        raise ValueError("the year is not within 2 to 9998")
    return moment.astimezone(UTC)


# All that is a time in a request.
Moment = Annotated[AwareDatetime, AfterValidator(_in_utc)]
# 200: what is made of it, such as "until 2026-03-01 18:00 UTC: new disk", has room where 300 have.
ReasonText = Annotated[
    Line,
    StringConstraints(strip_whitespace=True),
    Field(
        max_length=200,
        description="shown to whom it concerns, and kept in the log: without names or addresses of people",
    ),
]


class Document(BaseModel):
    """A JSON document: unknown fields are refused, and rows can be read as one."""

    model_config = ConfigDict(extra="forbid", from_attributes=True)


class Reason(Document):
    """Why something is decided about somebody."""

    reason: ReasonText = Field(min_length=1)


class MailedToken(Document):
    """What proves that a mail was read."""

    token: Line = Field(max_length=200, description="from the mail")
