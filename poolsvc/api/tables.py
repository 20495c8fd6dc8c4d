"""Rows as CSV (RFC 4180), which spreadsheets open: none of a cell's words is taken for a formula there."""

import csv
import io
from collections.abc import Iterable, Sequence

from fastapi import Response

Cell = str | int | float | None
# By which a spreadsheet knows a formula, or a cell that begins with one after what it leaves out.
_FORMULA = ("=", "+", "-", "@", "|", "%", "\t", "\r", "\n", "\0", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def table(names: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """One head line and one line for each row, in CRLF. Nothing is an empty cell, and numbers stay numbers."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(names)
    writer.writerows([_safe(cell) for cell in row] for row in rows)
    return text.getvalue()


def _safe(cell: Cell) -> Cell:
    if isinstance(cell, str) and cell.lstrip(" \u00a0").startswith(_FORMULA):
        return "'" + cell
    return cell


def csv_answer(name: str, content: str, further: str | None) -> Response:
    """A file named by host labels, and where the next part of it is (RFC 8288)."""
    headers = {"Content-Disposition": f'attachment; filename="{name}.csv"'}
    if further is not None:
        headers["Link"] = f'<{further}>; rel="next"'
    return Response(content, headers=headers, media_type="text/csv; charset=utf-8; header=present")
