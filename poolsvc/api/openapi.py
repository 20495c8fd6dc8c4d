"""The description of the API (OpenAPI 3.1): what every operation may answer besides its document."""

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import Field

from poolsvc.api.request import Document

PROBLEM_TYPE = "application/problem+json"
_METHODS = frozenset({"get", "put", "post", "patch", "delete"})
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


def _operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in document["paths"].values():
        for method, operation in path.items():
            if method in _METHODS:
                yield operation
