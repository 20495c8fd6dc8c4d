"""Entity tags: with them two people change one thing without losing either's change (RFC 9110 sections 8.8.3, 13.1)."""

import hashlib
import json
import re
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from fastapi import Header, Response
from pydantic import BaseModel

from poolsvc.errors import PreconditionFailed

IfMatch = Annotated[
    str | None, Header(alias="If-Match", max_length=1000, description="the tag that the change is meant for")
]
IfNoneMatch = Annotated[
    str | None, Header(alias="If-None-Match", max_length=1000, description="the tag that is known already")
]
# What an endpoint that answers with `tagged` may answer besides its document.
NOT_MODIFIED: dict[int | str, dict[str, Any]] = {304: {"description": "it is as `If-None-Match` says"}}
D = TypeVar("D", bound=BaseModel)
_TAG = re.compile(r'(W/)?("[!#-~]*")')


def etag_of(document: BaseModel) -> str:
    """A strong tag: equal documents have the same, and no others."""
    canonical = json.dumps(document.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return f'"{hashlib.sha256(canonical.encode()).hexdigest()[:32]}"'


def require_match(header: str | None, current: str) -> None:
    """Raise PreconditionFailed unless `If-Match` is absent, `*`, or holds the current tag (strong comparison)."""
    if header is None or header.strip() == "*":
        return
    if current not in {tag for weak, tag in _TAG.findall(header) if not weak}:
        raise PreconditionFailed(
            "somebody changed it since you read it",
            remedy="read it again, and repeat your change on what you find",
            field="If-Match",
        )


def tagged(document: D, response: Response, if_none_match: str | None) -> D | Response:
    """The document with its tag; or, for a caller that has it, nothing but the tag."""
    tag = etag_of(document)
    if is_known(if_none_match, tag):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers={"ETag": tag})
    response.headers["ETag"] = tag
    return document


def is_known(header: str | None, current: str) -> bool:
    """Whether `If-None-Match` says that the caller has the current document (weak comparison)."""
    if header is None:
        return False
    return header.strip() == "*" or current in {tag for _, tag in _TAG.findall(header)}
