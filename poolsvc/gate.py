"""What every request passes first: its identifier, whether it may carry a secret here, its sizes, and how it is counted."""

import re
import secrets
import time
from collections.abc import Collection, Mapping, MutableMapping
from http import HTTPStatus
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import structlog
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from poolsvc.api.openapi import PROBLEM_TYPE
from poolsvc.metrics import Metrics

# No document of the API is longer; a CSR has a few hundred octets.
MAX_BODY = 64 * 1024
# But a monitor's report of as many probes as one may have, some with a certificate.
MAX_REPORT = 2 * 1024 * 1024
_REPORT, _REPORTER = "/v1/monitor/report", "Bearer tc_monitor_"
# Of the target and all headers together; uvicorn limits only what it has not read whole. Tokens and tags have hundreds.
MAX_HEAD, MAX_HEADERS = 16 * 1024, 100
# A state that others ask for again and again, and no failure of a request.
NOT_READY = "not-ready"
# Digits alone, and few: Python reads other digits too, and refuses thousands of them with a ValueError.
_LENGTH = re.compile(r"[0-9]{1,20}")
_READING = frozenset({"GET", "HEAD"})

_log = structlog.get_logger()


def problem(
    scope: MutableMapping[str, Any],
    status: int,
    code: str,
    detail: str,
    *,
    remedy: str = "",
    field: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """The answer to a request as a problem document (RFC 9457); the log learns its code from the scope."""
    scope["problem"] = code
    document = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
    document |= {"code": code, "detail": detail, "remedy": remedy, "field": field}
    return JSONResponse(document, status_code=status, headers=headers, media_type=PROBLEM_TYPE)


def insecure_transport(scope: MutableMapping[str, Any]) -> JSONResponse:
    """The refusal of a request that should not have come by plain HTTP. What it carried is spoilt."""
    return problem(
        scope,
        HTTPStatus.FORBIDDEN,
        "insecure-transport",
        "tokens and documents are taken over HTTPS only",
        remedy="use https://, and have a token that was sent in the open replaced",
    )


def may_carry_secret(scope: Scope) -> bool:
    """Whether a request has a token or a cookie, or a method that is sent with them, or with a password."""
    headers = Headers(scope=scope)
    return scope["method"] not in _READING or "authorization" in headers or "cookie" in headers


class Gate:
    """Around the whole application, before the headers of proxies are believed."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, trusted_proxies: Collection[IPv4Address | IPv6Address]
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._trusted = frozenset(trusted_proxies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        identifier = secrets.token_hex(8)
        began = time.monotonic()
        status, fault = 0, None

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {
                    **message,
                    "headers": [*message["headers"], (b"x-request-id", identifier.encode())],
                }
            await send(message)

        try:
            await (self._refusal(scope) or self._app)(scope, receive, answer)
        except Exception as error:  # noqa: BLE001 - a request's root: the caller gets a document, the log gets what happened
            fault = error
            if not status:
                await self._unforeseen(scope)(scope, receive, answer)
        route = getattr(scope.get("route"), "path", "none")
        self._metrics.observe(scope["method"], route, status, time.monotonic() - began)
        if fault or (status >= HTTPStatus.INTERNAL_SERVER_ERROR and scope.get("problem") != NOT_READY):
            _log.error(
                "request_failed",
                request=identifier,
                route=route,
                status=status,
                code=scope.get("problem"),
                exc_info=fault,
            )

    @staticmethod
    def _unforeseen(scope: Scope) -> JSONResponse:
        return problem(
            scope,
            HTTPStatus.INTERNAL_SERVER_ERROR,
            "internal-error",
            "the registry made a mistake",
            remedy="try again; if it stays, tell the pool's operator the answer's X-Request-Id",
        )

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        if may_carry_secret(scope) and self._is_in_the_open(scope, headers):
            return insecure_transport(scope)
        head = len(scope["raw_path"]) + len(scope["query_string"])
        head += sum(len(name) + len(value) for name, value in headers.raw)
        if head > MAX_HEAD or len(headers.raw) > MAX_HEADERS:
            return problem(
                scope,
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                "head-too-large",
                f"a target and headers of more than {MAX_HEAD} octets, or more than {MAX_HEADERS} headers",
                remedy="send only what the API asks for",
            )
        length = headers.get("content-length", "0")
        is_number = _LENGTH.fullmatch(length) is not None
        is_report = scope["path"] == _REPORT and headers.get("authorization", "").startswith(_REPORTER)
        most = MAX_REPORT if is_report else MAX_BODY
        if "transfer-encoding" in headers or not is_number or int(length) > most:
            return problem(
                scope,
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                "too-large",
                f"a body without its length or of more than {most} octets",
            )
        return None

    def _is_in_the_open(self, scope: Scope, headers: Headers) -> bool:
        """Whether others could read the request on its way: to us, or to a proxy that says so."""
        peer = ip_address(scope["client"][0])
        if peer not in self._trusted and not peer.is_loopback:
            return bool(scope["scheme"] != "https")
        said = ",".join(headers.getlist("x-forwarded-proto"))
        return bool(said) and any(part.strip().lower() != "https" for part in said.split(","))
