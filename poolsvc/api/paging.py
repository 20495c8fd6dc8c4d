"""Lists in pages, the same way everywhere: `?limit=` rows, and `next` as the `?cursor=` of the page after.

A page goes on from the last id of the one before. So a row that is there all the time comes exactly once, whatever
is added meanwhile, and a cursor is good for as long as the list is.
"""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

from fastapi import Depends, Query
from sqlalchemy import Select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from poolsvc.api.request import Document, Line
from poolsvc.errors import InvalidCursor

T = TypeVar("T")
MAX_LIMIT = 200
_MAX_DIGITS = 18  # what both engines can compare with an id


class Page(Document, Generic[T]):
    """One page of a list."""

    items: list[T]
    next: str | None  # None: this is the last page


@dataclass(frozen=True, slots=True)
class Paging:
    """Which page is asked for: so many rows beyond an id."""

    limit: int
    after: int | None = None

    async def rows(
        self,
        session: AsyncSession,
        found: Select[T],
        key: InstrumentedAttribute[int],
        *,
        newest_first: bool = False,
    ) -> tuple[Sequence[T], str | None]:
        """The page's rows by ascending `key`, or descending, and the cursor of the next page."""
        if self.after is not None:
            found = found.where(key < self.after if newest_first else key > self.after)
        found = found.order_by(key.desc() if newest_first else key).limit(self.limit + 1)
        rows: list[Any] = list(await session.scalars(found))
        more = len(rows) > self.limit
        return rows[: self.limit], _cursor(getattr(rows[self.limit - 1], key.key)) if more else None


def _cursor(key: int) -> str:
    return base64.urlsafe_b64encode(str(key).encode()).decode().rstrip("=")


def _read(cursor: str) -> int:
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        text = b""
    if not text.isdigit() or len(text) > _MAX_DIGITS or _cursor(int(text)) != cursor:
        raise InvalidCursor(
            "the cursor is none of this registry's",
            remedy="give `next` of the page before, or none for the first page",
            field="cursor",
        )
    return int(text)


def _paging(
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT, description="rows in a page")] = 50,
    cursor: Annotated[Line | None, Query(max_length=40, description="`next` of the page before")] = None,
) -> Paging:
    return Paging(limit, None if cursor is None else _read(cursor))


PagingDep = Annotated[Paging, Depends(_paging)]
