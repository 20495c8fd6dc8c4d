"""The journal of removals: a file outside the database, so that a restored database resurrects nobody.

One line of JSON for each server that began to leave, was taken back, or is out; appended and synced before the
database notes that it was. A crash in between repeats a line, which changes nothing. Every machine that runs a worker
writes its own file; a restore reads all of them.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from sqlalchemy import select

from nts_core.control import ServerState
from nts_core.shell import sync
from poolsvc.config import Settings
from poolsvc.db import Database
from poolsvc.errors import PoolError
from poolsvc.models import ENDED_STATES, Server

_BATCH = 100
_MAX_LINE = 4096


class JournalError(PoolError):
    """A line that is no entry; the text names the file and the line."""

    code = "journal"


@dataclass(frozen=True, slots=True)
class Entry:
    """What became of one server at one time. `burnt` is whether its name was in DNS."""

    at: datetime
    pool: str
    server: int
    name: str
    member: int
    state: ServerState
    burnt: bool
    reason: str

    @property
    def is_gone(self) -> bool:
        return self.state in ENDED_STATES


async def write_due(database: Database, settings: Settings, now: datetime) -> bool:
    """Append what the journal lacks, a bounded number of entries; whether it may lack more."""
    async with database.transaction() as session:
        found = list(
            await session.scalars(
                select(Server)
                .where(Server.journal_due_at <= now)
                .order_by(Server.journal_due_at)
                .limit(_BATCH)
                .with_for_update(skip_locked=True)
            )
        )
        if not found:
            return False
        write(settings, found)
        return len(found) == _BATCH


def write(settings: Settings, servers: Sequence[Server]) -> None:
    """Append how these servers are, which are locked. Raises OSError; then the transaction must not commit.

    Local and short: the one piece of I/O inside a transaction, since its order is the point.
    """
    append(settings.journal_file, (_entry(settings, server) for server in servers))
    for server in servers:
        server.journal_due_at = None


def _entry(settings: Settings, server: Server) -> Entry:
    return Entry(
        at=server.state_since,
        pool=settings.pool,
        server=server.id,
        name=server.name,
        member=server.member_id,
        state=server.state,
        burnt=server.burnt_at is not None,
        reason=server.leave_reason or "",
    )


def append(file: Path, entries: Iterable[Entry]) -> None:
    """Add lines to the file and return once they are on the disk. Raises OSError."""
    is_new = not file.exists()
    descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "r+b", buffering=0) as stream:
        # A crash may have left half a line: it ends here, and its entry is written again.
        end = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, end - 1))
        torn = end > 0 and stream.read(1) != b"\n"
        lines = b"".join(_line(entry) for entry in entries)
        stream.write(b"\n" * torn + lines)
        os.fsync(stream.fileno())
    if is_new:
        sync(file.parent)


def _line(entry: Entry) -> bytes:
    document = asdict(entry) | {"at": entry.at.isoformat()}
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def read(file: Path) -> Iterator[Entry]:
    """The entries of a file. Raises OSError, and JournalError for a line that is neither an entry nor torn."""
    with file.open("rb") as stream:
        for number in range(1, 10_000_000):
            line = stream.readline(_MAX_LINE)
            if not line:
                return
            if not line.strip():
                continue
            try:
                yield _parse(line)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                # A crash may have cut a line off: it begins as an entry does, and its entry was written again.
                if isinstance(error, json.JSONDecodeError) and line.startswith(b'{"at":'):
                    continue
                raise JournalError(
                    f"{file}, line {number}: not an entry of the journal ({error})",
                    remedy="is it the right file? Remove the line if you know why it is there",
                ) from None


def _parse(line: bytes) -> Entry:
    found = json.loads(line)
    at = datetime.fromisoformat(found["at"])
    if at.tzinfo is None:
        raise ValueError("a time without a zone")
    return Entry(
        at=at,
        pool=str(found["pool"]),
        server=int(found["server"]),
        name=str(found["name"]),
        member=int(found["member"]),
        state=ServerState(found["state"]),
        burnt=bool(found["burnt"]),
        reason=str(found["reason"]),
    )


def latest(files: Sequence[Path], pool: str) -> dict[tuple[int, str], Entry]:
    """The newest entry of each server in all the files. Raises OSError, JournalError.

    By id and name: after a restore an id that only the lost database knew is given again.
    """
    found: dict[tuple[int, str], Entry] = {}
    for file in files:
        for entry in read(file):
            if entry.pool != pool:
                raise JournalError(
                    f"{file}: the journal of the pool {entry.pool}, not of {pool}", remedy="give this pool's"
                )
            key = entry.server, entry.name
            if key not in found or entry.at >= found[key].at:
                found[key] = entry
    return found
