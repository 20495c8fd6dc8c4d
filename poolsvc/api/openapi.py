"""The description of the API (OpenAPI 3.1): what each call may answer besides its document, and that it takes no more."""

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic import Field

from poolsvc.api.request import Document
from poolsvc.errors import InvalidDocument

PROBLEM_TYPE = "application/problem+json"
_METHODS = frozenset({"get", "put", "post", "patch", "delete"})
_SHOWN = 100  # characters of a parameter that there is not
# What FastAPI would answer to a document that does not fit; here that is a problem like any other.
_UNUSED = ("HTTPValidationError", "ValidationError")


class Problem(Document):
    """What was refused, why, and what to do about it (RFC 9457)."""

    type: str
    title: str = Field(description="the status in words")
    status: int
    code: str = Field(description="stable; what programs look at")
    detail: str
    remedy: str
    field: str | None = Field(description="the part of the request that it is about, if it is one")


def describe(app: FastAPI) -> dict[str, Any]:
    """The document behind /openapi.json; made once."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = document["components"]["schemas"]
        for name in _UNUSED:
            schemas.pop(name, None)
        schemas["Problem"] = Problem.model_json_schema()
        reference = {"schema": {"$ref": "#/components/schemas/Problem"}}
        for operation in _operations(document):
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = {
                "description": "a problem",
                "content": {PROBLEM_TYPE: reference},
            }
        app.openapi_schema = document
    return app.openapi_schema


async def refuse_unknown_parameters(request: Request) -> None:
    """Raise InvalidDocument for a parameter that the description does not give to this call."""
    if not request.scope["query_string"]:
        return
    path, method = request.scope["route"].path, request.method.lower()
    described = request.app.openapi()["paths"][path][method].get("parameters", ())
    known = {parameter["name"] for parameter in described if parameter["in"] == "query"}
    unknown = [name[:_SHOWN] for name in request.query_params if name not in known]
    if unknown:
        there = ", ".join(f"`{name}`" for name in sorted(known)) or "none"
        raise InvalidDocument(
            f"{unknown[0]}: no such parameter", remedy=f"there are: {there}", field=unknown[0]
        )


def _operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in document["paths"].values():
        for method, operation in path.items():
            if method in _METHODS:
                yield operation
