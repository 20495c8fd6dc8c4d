"""The registry as one ASGI application: API, worker, health, metrics, and errors as problem documents (RFC 9457)."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from http import HTTPStatus
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import structlog
from cryptography import x509
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.exceptions import HTTPException
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from poolsvc import disagreements
from poolsvc.api import ROUTERS, Limits, Services
from poolsvc.api.openapi import describe, refuse_unknown_parameters
from poolsvc.config import Settings
from poolsvc.db import Database
from poolsvc.derived import RegistryKey
from poolsvc.errors import PoolError
from poolsvc.gate import NOT_READY, Gate, problem
from poolsvc.inspection import Inspector
from poolsvc.metrics import Metrics
from poolsvc.oidc import Provider
from poolsvc.pool import Kept, take_census
from poolsvc.readiness import Readiness
from poolsvc.regional import Atlas, odds_of
from poolsvc.worker import Health, Worker

# How long the worker's steps may go on when the process is to stop.
_STOP = 5.0

# What the framework refuses by itself, as the API says it. A body that it cannot parse is no document, whatever is wrong.
_HTTP_ERRORS: Mapping[int, tuple[int, str, str]] = {
    HTTPStatus.BAD_REQUEST: (
        HTTPStatus.UNPROCESSABLE_ENTITY,
        "invalid-document",
        "send JSON in UTF-8, as /openapi.json has it",
    ),
    HTTPStatus.NOT_FOUND: (HTTPStatus.NOT_FOUND, "not-found", "see /openapi.json for what there is"),
    HTTPStatus.METHOD_NOT_ALLOWED: (
        HTTPStatus.METHOD_NOT_ALLOWED,
        "method-not-allowed",
        "see /openapi.json for what the path takes",
    ),
}

_log = structlog.get_logger()


class Part(StrEnum):
    """What one process does of the registry."""

    ALL = "all"
    API = "api"
    WORKER = "worker"  # and its own metrics


class _Registry(FastAPI):
    """An application whose description says what a problem looks like."""

    def openapi(self) -> dict[str, Any]:
        return describe(self)


async def _disagreements(settings: Settings, session: AsyncSession) -> Sequence[disagreements.Found]:
    return await disagreements.look(session, settings, datetime.now(UTC))


def create_app(
    settings: Settings,
    database: Database,
    roots: Sequence[x509.Certificate],
    key: RegistryKey,
    part: Part = Part.ALL,
) -> FastAPI:
    """The application with its worker, or one of both. `roots` are what the prober trusts."""
    health = Health()
    readiness = Readiness(database, health, has_worker=part is not Part.API)
    metrics = Metrics(database, settings, health)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        worker = None
        if part is not Part.API:
            worker = readiness.worker = asyncio.create_task(
                Worker(database, settings, roots, health, key).run()
            )
            worker.add_done_callback(_tell_end)
        try:
            yield
        finally:
            health.stopping.set()
            if worker is not None:
                await asyncio.wait({worker}, timeout=_STOP)
                worker.cancel()
                await asyncio.wait({worker})
            await readiness.close()
            await metrics.close()
            await database.close()

    # No /docs: FastAPI's page would load scripts of a third party into the registry's origin.
    app = _Registry(
        title=f"Truechimer registry of {settings.pool}",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None if part is Part.WORKER else "/openapi.json",
        redirect_slashes=False,  # to the host that the caller names
    )
    providers = {entry.name: Provider(entry, settings) for entry in settings.oidc}
    atlas = Atlas(settings)
    app.state.services = Services(
        settings,
        database,
        key,
        _limits(settings),
        census=Kept(take_census),
        odds=Kept(partial(odds_of, settings=settings)),
        atlas=atlas,
        regions=Kept(atlas.look),
        concentration=Kept(atlas.concentration),
        disagreements=Kept(partial(_disagreements, settings)),
        providers=providers,
        inspector=Inspector(settings, roots),
    )
    app.state.metrics = metrics
    if part is not Part.WORKER:
        for router in ROUTERS:
            app.include_router(router, dependencies=[Depends(refuse_unknown_parameters)])
    _add_health(app, readiness)
    _add_metrics(app, settings, metrics)
    _add_problems(app)
    if settings.trusted_proxies:
        trusted = [str(address) for address in settings.trusted_proxies]
        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=trusted)
    # The last that is added is the first to be asked.
    app.add_middleware(Gate, metrics=metrics, trusted_proxies=settings.trusted_proxies)
    return app


def _limits(settings: Settings) -> Limits:
    policy = settings.policy
    return Limits(
        per_address=policy.requests_per_second_and_address,
        per_token=policy.requests_per_second_and_token,
        burst=policy.request_burst,
    )


def _tell_end(worker: asyncio.Task[None]) -> None:
    if not worker.cancelled() and (error := worker.exception()) is not None:
        _log.error("worker_ended", exc_info=error)


def _add_health(app: FastAPI, readiness: Readiness) -> None:
    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz", include_in_schema=False)
    async def readyz(request: Request) -> Response:
        fault = await readiness.fault()
        if fault is not None:
            return problem(request.scope, HTTPStatus.SERVICE_UNAVAILABLE, NOT_READY, fault)
        return JSONResponse({"status": "ready"})


def _add_metrics(app: FastAPI, settings: Settings, metrics: Metrics) -> None:
    @app.get("/metrics", include_in_schema=False)
    async def read_metrics(request: Request) -> Response:
        address = _caller(request)
        if address is None or not any(address in network for network in settings.metrics_allow):
            raise HTTPException(HTTPStatus.NOT_FOUND)
        return Response(await metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _caller(request: Request) -> IPv4Address | IPv6Address | None:
    """Where a request comes from; a proxy may have said anything."""
    try:
        return ip_address(request.client.host) if request.client else None
    except ValueError:
        return None


def _add_problems(app: FastAPI) -> None:
    @app.exception_handler(PoolError)
    async def pool_error(request: Request, error: PoolError) -> JSONResponse:
        return problem(
            request.scope,
            error.status,
            error.code,
            error.detail,
            remedy=error.remedy,
            field=error.field,
            headers=error.headers,
        )

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        _, *parts = first["loc"]  # path, query, header or body
        # A number alone is a position in a body that is no JSON at all.
        field = ".".join(map(str, parts)) if any(isinstance(part, str) for part in parts) else None
        return problem(
            request.scope,
            HTTPStatus.UNPROCESSABLE_ENTITY,
            "invalid-document",
            f"{field or 'the body'}: {first['msg']}",
            remedy="see /openapi.json for the documents",
            field=field,
        )

    @app.exception_handler(IntegrityError)
    async def lost_race(request: Request, _error: IntegrityError) -> JSONResponse:
        # Two requests wanted the same name, or the like, at the same moment.
        return problem(
            request.scope,
            HTTPStatus.CONFLICT,
            "conflict",
            "another request was faster",
            remedy="look again, then try again",
        )

    @app.exception_handler(OperationalError)
    @app.exception_handler(PoolTimeout)
    async def database_away(request: Request, _error: OperationalError | PoolTimeout) -> JSONResponse:
        return problem(
            request.scope,
            HTTPStatus.SERVICE_UNAVAILABLE,
            "database-unavailable",
            "the registry's database does not answer",
            remedy="try again in a minute",
            headers={"Retry-After": "60"},
        )

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        status, code, remedy = _HTTP_ERRORS.get(error.status_code, (error.status_code, "http-error", ""))
        return problem(request.scope, status, code, str(error.detail), remedy=remedy, headers=error.headers)
