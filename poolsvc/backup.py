"""Copies of the whole database: into a file, out of one, and from one engine to the other.

A backup is one zip: `manifest.json`, and each table as lines of JSON. It is read from one snapshot, so it is the
database at one moment, and it goes into either engine. What is read is checked against the manifest before anything
is committed.
"""

import base64
import hashlib
import json
import os
import zipfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass
from datetime import date, datetime
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import IO, Any

from sqlalchemy import Date, Integer, LargeBinary, Table, func, insert, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from nts_core.shell import sync
from poolsvc.db import Base, Database, UtcDateTime
from poolsvc.errors import PoolError

FORMAT = 1
_BATCH = 1000
_MANIFEST = "manifest.json"
_MAX_MANIFEST = 1024 * 1024
# What reading garbage as a zip, as JSON, or as rows ends with.
_UNREADABLE = (
    zipfile.BadZipFile,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    EOFError,
    RecursionError,
)

Row = dict[str, Any]


class BackupError(PoolError):
    """A copy that cannot be made or used."""

    code = "backup"

    def __init__(self, detail: str, remedy: str) -> None:
        super().__init__(detail, remedy=remedy)


@dataclass(frozen=True, slots=True)
class Content:
    """What a backup holds of one table."""

    rows: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a backup says of itself. `revision` is the schema's."""

    pool: str
    created_at: datetime
    revision: str
    tables: Mapping[str, Content]
    format: int = FORMAT


async def dump(database: Database, file: Path, pool: str, now: datetime) -> Manifest:
    """Write a backup; the file is there whole or not at all. Raises BackupError, OSError."""
    aside = _new_name(file)
    try:
        with os.fdopen(
            os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w+b"
        ) as stream:
            with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
                async with database.snapshot() as connection:
                    tables = {
                        table.name: await _dump_table(connection, table, archive) for table in _tables()
                    }
                    manifest = Manifest(pool, now, await _revision(connection), tables)
                document = asdict(manifest) | {"created_at": now.isoformat()}
                archive.writestr(_MANIFEST, json.dumps(document, indent=2))
            stream.flush()
            os.fsync(stream.fileno())
        aside.rename(file)
        sync(file.parent)
    finally:
        aside.unlink(missing_ok=True)
    return manifest


def _new_name(file: Path) -> Path:
    if file.exists():
        raise BackupError(f"{file} exists", "give another file name")
    aside = file.with_name(f".{file.name}.new")
    aside.unlink(missing_ok=True)
    return aside


async def _dump_table(connection: AsyncConnection, table: Table, archive: zipfile.ZipFile) -> Content:
    rows, digest = 0, hashlib.sha256()
    with archive.open(f"{table.name}.jsonl", "w", force_zip64=True) as member:
        async for batch in _read(connection, table):
            lines = b"".join(json.dumps(_encode(row)).encode() + b"\n" for row in batch)
            digest.update(lines)
            member.write(lines)
            rows += len(batch)
    return Content(rows, digest.hexdigest())


def read_manifest(file: Path) -> Manifest:
    """What a backup says of itself. Raises BackupError, OSError."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open(_MANIFEST) as member:
            found = json.loads(member.read(_MAX_MANIFEST))
        if found["format"] != FORMAT:
            raise BackupError(
                f"{file}: a backup of format {found['format']}", "use the version that wrote it"
            )
        tables = {
            str(name): Content(int(each["rows"]), str(each["sha256"]))
            for name, each in found["tables"].items()
        }
        created = datetime.fromisoformat(found["created_at"])
        return Manifest(str(found["pool"]), created, str(found["revision"]), tables)
    except _UNREADABLE as error:
        raise BackupError(
            f"{file} is not a backup ({error})", "give a file that `poolsvc backup` wrote"
        ) from None


async def load(database: Database, file: Path, connection: AsyncConnection) -> Manifest:
    """Fill empty tables from a backup, in the caller's transaction. Raises BackupError, OSError."""
    manifest = read_manifest(file)
    if manifest.revision != (found := await _revision(connection)):
        raise BackupError(
            f"the backup's tables are those of revision {manifest.revision}, the database's of {found}",
            "restore with the version that made the backup, then update it",
        )
    await _require_empty(connection)
    with zipfile.ZipFile(file) as archive:
        for table in _tables():
            await _load_table(connection, table, archive, manifest)
    await _follow_sequences(database, connection)
    return manifest


async def _load_table(
    connection: AsyncConnection, table: Table, archive: zipfile.ZipFile, manifest: Manifest
) -> None:
    name = f"{table.name}.jsonl"
    remedy = "the file is damaged: use another backup"
    try:
        with archive.open(name) as member:
            found = _content(member)
        if found != manifest.tables.get(table.name):
            raise BackupError(f"{table.name} is not as the manifest says", remedy)
        with archive.open(name) as member:
            rows = (_decode(table, json.loads(line)) for line in member)
            while batch := list(islice(rows, _BATCH)):
                await connection.execute(insert(table), batch)
    except _UNREADABLE as error:
        raise BackupError(f"{table.name}: {error}", remedy) from None


def _content(member: IO[bytes]) -> Content:
    rows, digest = 0, hashlib.sha256()
    for line in member:
        rows += 1
        digest.update(line)
    return Content(rows, digest.hexdigest())


async def move(source: Database, target: Database) -> dict[str, int]:
    """Copy every row into another, empty database of the same revision; how many rows each table has.

    The source takes no changes meanwhile. Raises BackupError.
    """
    counts: dict[str, int] = {}
    async with source.snapshot(exclusive=True) as here, target.engine.begin() as there:
        if await _revision(here) != await _revision(there):
            raise BackupError("the two databases have different tables", "run `poolsvc migrate` for both")
        await _require_empty(there)
        for table in _tables():
            counts[table.name] = 0
            async for batch in _read(here, table):
                await there.execute(insert(table), batch)
                counts[table.name] += len(batch)
            found = await there.scalar(select(func.count()).select_from(table))
            if found != counts[table.name]:
                raise BackupError(
                    f"{table.name}: {counts[table.name]} rows became {found}", "nothing was kept"
                )
        await _follow_sequences(target, there)
    return counts


def _tables() -> list[Table]:
    """In the order of their foreign keys."""
    return Base.metadata.sorted_tables


async def _read(connection: AsyncConnection, table: Table) -> AsyncIterator[list[Row]]:
    statement = select(table).order_by(*table.primary_key.columns)
    async with connection.stream(statement, execution_options={"yield_per": _BATCH}) as result:
        async for batch in result.mappings().partitions(_BATCH):
            yield [dict(row) for row in batch]


async def _revision(connection: AsyncConnection) -> str:
    return str(await connection.scalar(text("SELECT version_num FROM alembic_version")))


async def _require_empty(connection: AsyncConnection) -> None:
    for table in _tables():
        if await connection.scalar(select(func.count()).select_from(table)):
            raise BackupError(f"the database is not empty: {table.name} has rows", "give a new database")


async def _follow_sequences(database: Database, connection: AsyncConnection) -> None:
    """Let new rows get ids above those that were loaded; SQLite does so by itself."""
    if database.engine.dialect.name != "postgresql":
        return
    for table in _tables():
        key = table.primary_key.columns[0]
        if table.autoincrement_column is not None and isinstance(key.type, Integer):
            await connection.execute(
                text(
                    f"SELECT setval(pg_get_serial_sequence('{table.name}', '{key.name}'),"  # noqa: S608 - our names
                    f" (SELECT coalesce(max({key.name}), 0) + 1 FROM {table.name}), false)"
                )
            )


def _encode(row: Row) -> Row:
    return {name: _plain(value) for name, value in row.items() if value is not None}


def _plain(value: Any) -> Any:
    match value:
        case datetime() | date():
            return value.isoformat()
        case bytes():
            return base64.b64encode(value).decode()
        case Enum():
            return value.value
        case _:
            return value


def _decode(table: Table, found: Row) -> Row:
    """A row with all its columns, as each type wants its value. Raises ValueError, KeyError, TypeError."""
    if unknown := found.keys() - table.columns.keys():
        raise ValueError(f"there is no column {min(unknown)}")
    return {column.name: _typed(column.type, found.get(column.name)) for column in table.columns}


def _typed(kind: object, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(kind, UtcDateTime):
        return datetime.fromisoformat(value)
    if isinstance(kind, Date):
        return date.fromisoformat(value)
    if isinstance(kind, LargeBinary):
        return base64.b64decode(value, validate=True)
    return value
