"""Entity tags: with them two people change one thing without losing either's change (RFC 9110 sections 8.8.3, 13.1)."""

import hashlib
import json
import re
from typing import Annotated

from fastapi import Header
from pydantic import BaseModel

from poolsvc.errors import PreconditionFailed

IfMatch = Annotated[str | None, Header(max_length=1000, description="the tag that the change is meant for")]
IfNoneMatch = Annotated[str | None, Header(max_length=1000, description="the tag that is known already")]
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


def is_known(header: str | None, current: str) -> bool:
    """Whether `If-None-Match` says that the caller has the current document (weak comparison)."""
    if header is None:
        return False
    return header.strip() == "*" or current in {tag for _, tag in _TAG.findall(header)}
