"""Lists in pages, the same way everywhere: `?limit=` rows, and `next` as the `?cursor=` of the page after.

A page goes on from the last id of the one before. So a row that is there all the time comes exactly once, whatever
is added meanwhile, and a cursor is good for as long as the list is.
"""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Generic, TypeVar

from fastapi import Depends, Query
from sqlalchemy import Select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from poolsvc.api.request import Document, Line
from poolsvc.errors import InvalidCursor

T = TypeVar("T")
DEFAULT_LIMIT, MAX_LIMIT = 50, 200
_EPOCH, _TICK = datetime(1970, 1, 1, tzinfo=UTC), timedelta(microseconds=1)
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
        return rows[: self.limit], _cursor(getattr(rows[self.limit - 1], key.key)) if more else None

    @property
    def before(self) -> datetime | None:
        """The moment that is the cursor of a list by time."""
        if self.after is None:
            return None
        try:
            return _EPOCH + self.after * _TICK
        except OverflowError:
            raise _no_cursor() from None


def cursor_of(at: datetime) -> str:
    """The cursor of a list by time: the page after has what was before this moment."""
    return _cursor((at - _EPOCH) // _TICK)


def _cursor(key: int) -> str:
    return base64.urlsafe_b64encode(str(key).encode()).decode().rstrip("=")


def _read(cursor: str) -> int:
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        text = b""
    if not text.isdigit() or len(text) > _MAX_DIGITS or _cursor(int(text)) != cursor:
        raise _no_cursor()
    return int(text)


def _no_cursor() -> InvalidCursor:
    return InvalidCursor(
        "the cursor is none of this registry's",
        remedy="give `next` of the page before, or none for the first page",
        field="cursor",
    )


def _paging(
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT, description="rows in a page")] = DEFAULT_LIMIT,
    cursor: Annotated[Line | None, Query(max_length=40, description="`next` of the page before")] = None,
) -> Paging:
    return Paging(limit, None if cursor is None else _read(cursor))


PagingDep = Annotated[Paging, Depends(_paging)]
