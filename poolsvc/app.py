"""The registry as one ASGI application: API, worker, metrics, and errors as problem documents (RFC 9457)."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from http import HTTPStatus

import structlog
from cryptography import x509
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from sqlalchemy.exc import IntegrityError, OperationalError
from starlette.exceptions import HTTPException

from poolsvc.api import ROUTERS, Limits, Services
from poolsvc.api.openapi import PROBLEM_TYPE, describe
from poolsvc.config import Settings
from poolsvc.db import Database
from poolsvc.derived import RegistryKey
from poolsvc.errors import PoolError
from poolsvc.worker import Health, Worker

_log = structlog.get_logger()
# No document of the API is longer; a CSR has a few hundred octets.
MAX_BODY = 64 * 1024
# Digits alone, and few: Python reads other digits too, and refuses thousands of them with a ValueError.
_LENGTH = re.compile(r"[0-9]{1,20}")


def create_app(
    settings: Settings, database: Database, roots: Sequence[x509.Certificate], key: RegistryKey
) -> FastAPI:
    """The application with its worker. `roots` are what the prober trusts."""
    health = Health()

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(Worker(database, settings, roots, health).run())
        try:
            yield
        finally:
            worker.cancel()
            with suppress(asyncio.CancelledError):
                await worker
            await database.close()

    # No /docs: FastAPI's page would load scripts of a third party into the registry's origin.
    app = FastAPI(
        title=f"Truechimer registry of {settings.pool}",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.openapi = partial(describe, app)  # type: ignore[method-assign]
    app.state.services = Services(settings, database, health, key, _limits(settings))
    for router in ROUTERS:
        app.include_router(router)
    _add_metrics(app)
    _add_problems(app)
    return app


def _limits(settings: Settings) -> Limits:
    policy = settings.policy
    return Limits(
        per_address=policy.requests_per_second_and_address,
        per_token=policy.requests_per_second_and_token,
        burst=policy.request_burst,
    )


def _add_metrics(app: FastAPI) -> None:
    registry = CollectorRegistry()
    requests = Counter(
        "poolsvc_requests", "API requests by route and status.", ("route", "status"), registry=registry
    )

    @app.middleware("http")
    async def count(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        length = request.headers.get("content-length", "0")
        is_number = _LENGTH.fullmatch(length) is not None
        if "transfer-encoding" in request.headers or not is_number or int(length) > MAX_BODY:
            response: Response = _problem(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                "too-large",
                f"a body without its length or of more than {MAX_BODY} octets",
            )
        else:
            response = await call_next(request)
        route = getattr(request.scope.get("route"), "path", "none")
        requests.labels(route, str(response.status_code)).inc()
        return response

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def _problem(
    status: int,
    code: str,
    detail: str,
    *,
    remedy: str = "",
    field: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    document = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
    document |= {"code": code, "detail": detail, "remedy": remedy, "field": field}
    return JSONResponse(document, status_code=status, headers=headers, media_type=PROBLEM_TYPE)


def _add_problems(app: FastAPI) -> None:
    @app.exception_handler(PoolError)
    async def pool_error(_request: Request, error: PoolError) -> JSONResponse:
        return _problem(
            error.status,
            error.code,
            error.detail,
            remedy=error.remedy,
            field=error.field,
            headers=error.headers,
        )

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        parts = [part for part in first["loc"] if part != "body"]
        # A number alone is a position in a body that is no JSON at all.
        field = ".".join(map(str, parts)) if any(isinstance(part, str) for part in parts) else None
        return _problem(
            HTTPStatus.UNPROCESSABLE_ENTITY,
            "invalid-document",
            f"{field or 'the body'}: {first['msg']}",
            remedy="see /openapi.json for the documents",
            field=field,
        )

    @app.exception_handler(IntegrityError)
    async def lost_race(_request: Request, _error: IntegrityError) -> JSONResponse:
        # Two requests wanted the same name, or the like, at the same moment.
        return _problem(
            HTTPStatus.CONFLICT, "conflict", "another request was faster", remedy="look again, then try again"
        )

    @app.exception_handler(OperationalError)
    async def database_away(_request: Request, _error: OperationalError) -> JSONResponse:
        return _problem(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "database-unavailable",
            "the registry's database does not answer",
            remedy="try again in a minute",
            headers={"Retry-After": "60"},
        )

    @app.exception_handler(Exception)
    async def unforeseen(_request: Request, error: Exception) -> JSONResponse:
        # A request's root: the caller gets a document, the log gets what happened.
        _log.error("request_failed", exc_info=error)
        return _problem(
            HTTPStatus.INTERNAL_SERVER_ERROR,
            "internal-error",
            "the registry made a mistake",
            remedy="try again; if it stays, tell the pool's operator when it happened",
        )

    @app.exception_handler(HTTPException)
    async def http_error(_request: Request, error: HTTPException) -> JSONResponse:
        code = "not-found" if error.status_code == HTTPStatus.NOT_FOUND else "http-error"
        return _problem(error.status_code, code, str(error.detail), headers=error.headers)
