"""What every endpoint stands on: the application's services, one transaction, one moment, and who is asking."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

from fastapi import Depends, Path, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.ext.asyncio import AsyncSession

from poolsvc import auth
from poolsvc.api.limits import Limits
from poolsvc.auth import Principal
from poolsvc.config import Settings
from poolsvc.db import Database, act_as
from poolsvc.derived import RegistryKey
from poolsvc.oidc import Provider
from poolsvc.pool import CensusTaker


@dataclass(frozen=True, slots=True)
class Services:
    """What the application lends to every request."""

    settings: Settings
    database: Database
    key: RegistryKey
    limits: Limits
    counts: CensusTaker
    providers: Mapping[str, Provider]  # of OpenID Connect, by name


# Not plain functions: FastAPI would send each through a thread.
async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    if request.client is not None:
        services.limits.take_for_address(request.client.host)
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
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Principal:
    async with services.database.transaction("anybody") as session:
        return await _principal(session, now, services, credentials)


# For endpoints that ask somebody else: the transaction that found who is asking has ended.
CallerDep = Annotated[Principal, Depends(_caller)]
NamePath = Annotated[str, Path(max_length=64)]
IdPath = Annotated[int, Path(ge=1, le=2**31 - 1)]
RandomIdPath = Annotated[int, Path(ge=1, le=2**53 - 1)]
# Without control characters: PostgreSQL takes no NUL, and people read these in one line.
_LINE = r"^[^\x00-\x1f\x7f]*$"
TextQuery = Annotated[str | None, Query(max_length=100, pattern=_LINE)]


class Document(BaseModel):
    """A JSON document: unknown fields are refused, and rows can be read as one."""

    model_config = ConfigDict(extra="forbid", from_attributes=True)


class Reason(Document):
    """Why something is decided about somebody."""

    reason: str = Field(
        min_length=1,
        max_length=300,
        pattern=_LINE,
        description="shown to whom it concerns, and kept in the log: without names or addresses of people",
    )
