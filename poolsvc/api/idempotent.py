"""Endpoints that take an `Idempotency-Key`: a repeated request is answered as before and does nothing."""

import inspect
import json
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Annotated, Any, TypeVar, cast

from fastapi import Depends, Header, Request, Response
from fastapi.encoders import jsonable_encoder
from fastapi.responses import JSONResponse

from poolsvc.api.request import NowDep, PrincipalDep, SessionDep
from poolsvc.idempotency import Answer, Once


class _Repeatable:
    """The request at hand, if its sender may repeat it."""

    def __init__(self, request: Request, session: SessionDep, now: NowDep, once: Once | None) -> None:
        self._request, self._session, self._now, self._once = request, session, now, once

    async def answer(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """What was answered before, or what `work` returns now."""
        if self._once is None:
            return await work()
        before = await self._once.recall(self._session, self._now)
        if before is not None:
            headers = {"Idempotency-Replayed": "true"}
            return Response(before.body, before.status, headers, media_type="application/json")
        document = JSONResponse(
            jsonable_encoder(await work()), self._request.scope["route"].status_code or 200
        )
        await self._once.remember(
            self._session, Answer(document.status_code, bytes(document.body)), self._now
        )
        return document


async def _repeatable(
    request: Request,
    session: SessionDep,
    now: NowDep,
    _principal: PrincipalDep,
    key: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key", max_length=200, description="the same key, the same effect and answer"
        ),
    ] = None,
) -> _Repeatable:
    if key is None:
        return _Repeatable(request, session, now, None)
    secret = request.headers["authorization"].partition(" ")[2]
    asked = json.dumps([request.method, request.url.path, request.url.query]).encode() + await request.body()
    return _Repeatable(request, session, now, Once(key, secret=secret, request=asked))


Endpoint = TypeVar("Endpoint", bound=Callable[..., Awaitable[Any]])


def idempotent(endpoint: Endpoint) -> Endpoint:
    """Let an endpoint's requests be repeated. The endpoint is one that needs a token."""

    @wraps(endpoint)
    async def once(repeatable: _Repeatable, **arguments: Any) -> Any:
        return await repeatable.answer(lambda: endpoint(**arguments))

    signature = inspect.signature(endpoint)
    extra = inspect.Parameter(
        "repeatable", inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[_Repeatable, Depends(_repeatable)]
    )
    # FastAPI reads the signature, and so learns of both the endpoint's dependencies and ours.
    vars(once)["__signature__"] = signature.replace(parameters=[*signature.parameters.values(), extra])
    return cast("Endpoint", once)
