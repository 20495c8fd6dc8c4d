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
DEFAULT_LIMIT, MAX_LIMIT = 50, 200
_MAX_DIGITS = 18  # what both engines can compare with an id


class Page(Document, Generic[T]):
    """One page of a list."""

    items: list[T]
    next: str | None  # None: this is the last page


@dataclass(frozen=True, slots=True)
class Paging:
    """Which page is asked for: so many rows beyond an id."""

    limit: int = DEFAULT_LIMIT
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
        return rows[: self.limit], cursor_of(str(getattr(rows[self.limit - 1], key.key))) if more else None


def cursor_of(key: str) -> str:
    """The cursor of the page after the row with this key."""
    return base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")


def key_of(cursor: str) -> str:
    """The key of which it was made. Raises InvalidCursor."""
    try:
        return base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise no_cursor() from None


def _read(cursor: str) -> int:
    text = key_of(cursor)
    if (
        not (text.isascii() and text.isdigit())
        or len(text) > _MAX_DIGITS
        or cursor_of(str(int(text))) != cursor
    ):
        raise no_cursor()
    return int(text)


def no_cursor() -> InvalidCursor:
    return InvalidCursor(
        "the cursor is none of this registry's",
        remedy="give `next` of the page before, or none for the first page",
        field="cursor",
    )


CursorQuery = Annotated[Line | None, Query(max_length=120, description="`next` of the page before")]


def _paging(
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT, description="rows in a page")] = DEFAULT_LIMIT,
    cursor: CursorQuery = None,
) -> Paging:
    return Paging(limit, None if cursor is None else _read(cursor))


PagingDep = Annotated[Paging, Depends(_paging)]
