"""What the CA asks for at the registry, where a member's own web server has sent it."""

import re

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse

from nts_core.control import ACME_PATH
from poolsvc import validation
from poolsvc.api.request import SessionDep
from poolsvc.errors import NotFound

router = APIRouter()
# As agents take them (RFC 8555 section 8.3).
_TOKEN = re.compile(r"[A-Za-z0-9_-]{22,128}")


@router.get(ACME_PATH + "{token}", include_in_schema=False)
async def answer_challenge(token: str, session: SessionDep) -> PlainTextResponse:
    """The key authorization of an order whose host redirects; for everybody, as the CA asks from anywhere."""
    found = await validation.answer_to(session, token) if _TOKEN.fullmatch(token) else None
    if found is None:
        raise NotFound("there is no such challenge")
    return PlainTextResponse(found, headers={"Cache-Control": "no-store"})
