"""Where a zone and its keys survive: an SQLite file for the zone and its last editions, a PEM file for each key.

An edition is on the disk before anybody sees it. All calls are of one thread at a time.
"""

import fcntl
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from nts_core.shell import replace_file
from poolsvc.nameserver import records
from poolsvc.nameserver.keys import KeyState, SigningKey, new_private
from poolsvc.nameserver.records import Key, Name, RRset, Signed
from poolsvc.nameserver.zone import Edition

_FILE, _LOCK, _SERIAL = "zone.db", "lock", "serial"
# How far ahead of the zone's serial the file is that outlives the loss of all else.
_RESERVED = 100_000
# What the file of a key that is in the zone no more ends with; nobody takes it for one.
_REMOVED = ".removed"
_APPLICATION = 0x54434E53
_VERSION = 1
# Octets of the editions that are kept for secondaries; one that is further behind gets the whole zone.
_MOST_STEPS = 32 * 1024 * 1024
_BUSY = 5.0
_TABLES = (
    "CREATE TABLE zone (apex BLOB NOT NULL)",
    (
        "CREATE TABLE rrset (owner BLOB NOT NULL, type INTEGER NOT NULL, ttl INTEGER NOT NULL, expires INTEGER NOT NULL,"
        " rdatas BLOB NOT NULL, signatures BLOB NOT NULL, PRIMARY KEY (owner, type)) WITHOUT ROWID"
    ),
    (
        "CREATE TABLE step (id INTEGER PRIMARY KEY, before INTEGER NOT NULL, soa_before BLOB NOT NULL,"
        " soa_after BLOB NOT NULL, deleted BLOB NOT NULL, added BLOB NOT NULL, total INTEGER NOT NULL)"
    ),
    "CREATE INDEX step_before ON step (before)",
    "CREATE INDEX step_total ON step (total)",
    (
        "CREATE TABLE key (id INTEGER PRIMARY KEY, file TEXT NOT NULL UNIQUE, state TEXT NOT NULL, since INTEGER NOT NULL,"
        " ds_seen INTEGER)"
    ),
)


class StoreUnusable(Exception):
    """The directory cannot be used; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Step:
    """The way from one edition to the next: both SOAs, and the other records that go and come."""

    soa_before: bytes
    soa_after: bytes
    deleted: tuple[bytes, ...]
    added: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class KeyRow:
    """A key and since when (Unix time) it is in its state; `ds_seen` is when its parent was seen to name it."""

    id: int
    key: SigningKey
    file: str
    since: int
    ds_seen: int | None


class Store:
    """One zone's directory, which no other process may open as a server at the same time."""

    def __init__(self, directory: Path, connection: sqlite3.Connection, lock: int | None) -> None:
        self._directory = directory
        self._connection = connection
        self._lock = lock
        self._reserved = _read_number(directory / _SERIAL)

    @classmethod
    def open(cls, directory: Path, apex: Name, *, as_server: bool) -> Self:
        """Made if it is not there, when it is opened by a server. Raises StoreUnusable."""
        try:
            if as_server:
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            else:
                _check_owner(directory)
            lock = _lock(directory / _LOCK) if as_server else None
            connection = sqlite3.connect(
                directory / _FILE, timeout=_BUSY, isolation_level=None, check_same_thread=False
            )
            (directory / _FILE).chmod(0o600)
            _prepare(connection, apex)
        except (OSError, sqlite3.Error) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise StoreUnusable(
                f"{directory}: {reason}; give it to this user, with room on its disk"
            ) from None
        return cls(directory, connection, lock)

    def close(self) -> None:
        self._connection.close()
        if self._lock is not None:
            os.close(self._lock)

    def first_serial(self, now: int) -> int:
        """For a zone that begins, or begins anew: one that no secondary has seen."""
        return max(now, self._reserved) % 2**32

    @property
    def version(self) -> int:
        """Another number after another process has written."""
        (number,) = self._connection.execute("PRAGMA data_version").fetchone()
        return int(number)

    def content(self) -> dict[Key, Signed]:
        """All of the zone."""
        rows = self._connection.execute("SELECT owner, type, ttl, expires, rdatas, signatures FROM rrset")
        return {
            (owner, rdtype): Signed(RRset(ttl, _unpacked(rdatas)), _unpacked(signatures), expires)
            for owner, rdtype, ttl, expires, rdatas, signatures in rows
        }

    def commit(self, edition: Edition, states: Iterable[KeyRow] = ()) -> None:
        """Keep an edition, and the keys that it moves on."""
        self._reserve(records.soa_serial(edition.soa))
        gone = [key for key, signed in edition.changed.items() if signed is None]
        rows = [
            (*key, signed.rrset.ttl, signed.expires, _packed(signed.rrset.rdatas), _packed(signed.signatures))
            for key, signed in edition.changed.items()
            if signed is not None
        ]
        with self._transaction() as transaction:
            transaction.executemany("DELETE FROM rrset WHERE owner = ? AND type = ?", gone)
            transaction.executemany("INSERT OR REPLACE INTO rrset VALUES (?, ?, ?, ?, ?, ?)", rows)
            if edition.before is not None:
                _put_step(transaction, edition, edition.before)
            for row in states:
                transaction.execute(
                    "UPDATE key SET state = ?, since = ? WHERE id = ?", (row.key.state, row.since, row.id)
                )
        for row in states:
            if row.key.state is KeyState.REMOVED:
                file = self._directory / row.file
                file.replace(file.with_name(row.file + _REMOVED))

    def _reserve(self, serial: int) -> None:
        if serial >= self._reserved:
            self._reserved = serial + _RESERVED
            replace_file(self._directory / _SERIAL, str(self._reserved).encode())

    def steps(self, serial: int, most: int) -> list[Step] | None:
        """The way from an edition to the newest; None when it is not kept, or has more octets than `most`."""
        with self._transaction() as transaction:
            first = transaction.execute("SELECT max(id) FROM step WHERE before = ?", (serial,)).fetchone()[0]
            if first is None:
                return None
            (octets,) = transaction.execute(
                "SELECT max(total) - (SELECT total - length(deleted) - length(added) FROM step WHERE id = ?) FROM step",
                (first,),
            ).fetchone()
            if octets > most:
                return None
            rows = transaction.execute(
                "SELECT soa_before, soa_after, deleted, added FROM step WHERE id >= ? ORDER BY id", (first,)
            )
            return [Step(before, after, _unpacked(gone), _unpacked(new)) for before, after, gone, new in rows]

    def key_rows(self) -> list[KeyRow]:
        """Those that are in the zone, the oldest first."""
        rows = self._connection.execute(
            "SELECT id, file, state, since, ds_seen FROM key WHERE state != ? ORDER BY id",
            (KeyState.REMOVED,),
        )
        return [
            KeyRow(number, self._load_key(file, KeyState(state)), file, since, ds_seen)
            for number, file, state, since, ds_seen in rows.fetchall()
        ]

    def first_key(self, now: int) -> KeyRow:
        """The key of a zone that has none yet: the one whose file is there, as after the loss of all else, or a new one.

        Raises StoreUnusable when there are several, of which only the parent knows which one counts.
        """
        files = sorted(self._directory.glob("*.pem"))
        if len(files) > 1:
            raise StoreUnusable(
                f"{self._directory} has several keys and no zone; leave there only the key that the parent's DS names"
            )
        if files:
            return self._put_key(self._load_key(files[0].name, KeyState.ACTIVE), files[0].name, now)
        return self.add_key(KeyState.ACTIVE, now)

    def add_key(self, state: KeyState, now: int) -> KeyRow:
        """A new key, with a tag that no other one here has: by their tags signatures are told apart."""
        taken = {path.name.partition("-")[0] for path in self._directory.glob("*.pem*")}
        while True:
            private = new_private()
            key = SigningKey.of(private, state)
            if f"{key.tag:05}" not in taken:
                break
        file = f"{key.tag:05}-{now}.pem"
        octets = private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        replace_file(self._directory / file, octets)
        return self._put_key(key, file, now)

    def _put_key(self, key: SigningKey, file: str, now: int) -> KeyRow:
        with self._transaction() as transaction:
            cursor = transaction.execute(
                "INSERT INTO key (file, state, since) VALUES (?, ?, ?)", (file, key.state, now)
            )
            assert cursor.lastrowid is not None
            return KeyRow(cursor.lastrowid, key, file, now, None)

    def note_ds(self, row: KeyRow, now: int) -> bool:
        """The parent names this key; False when it is not active any more."""
        with self._transaction() as transaction:
            done = transaction.execute(
                "UPDATE key SET ds_seen = ? WHERE id = ? AND state = ?", (now, row.id, KeyState.ACTIVE)
            )
            return done.rowcount == 1

    def key_file(self, row: KeyRow) -> Path:
        return self._directory / row.file

    def _load_key(self, file: str, state: KeyState) -> SigningKey:
        try:
            private = serialization.load_pem_private_key((self._directory / file).read_bytes(), None)
        except (OSError, ValueError) as error:
            raise StoreUnusable(
                f"{self._directory / file}: the key of the zone cannot be read ({type(error).__name__}); bring it"
                " back from a copy, or see docs/runbook.md"
            ) from None
        if not isinstance(private, ec.EllipticCurvePrivateKey) or not isinstance(private.curve, ec.SECP256R1):
            raise StoreUnusable(
                f"{self._directory / file} is not a P-256 key; bring back the zone's own from a copy"
            )
        return SigningKey.of(private, state)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise


def _check_owner(directory: Path) -> None:
    """What is made here has to be the server's. Raises StoreUnusable, OSError."""
    if not (directory / _FILE).exists():
        raise StoreUnusable(f"{directory}: no zone was served from here yet; start `poolsvc serve` once")
    owner = (directory / _FILE).stat().st_uid
    if owner != os.geteuid():
        raise StoreUnusable(f"{directory} belongs to user {owner}; run this as that user")


def _read_number(file: Path) -> int:
    """0 without a file. Raises StoreUnusable for one that has no number."""
    try:
        return int(file.read_text())
    except FileNotFoundError:
        return 0
    except ValueError:
        raise StoreUnusable(
            f"{file} is damaged; write a number into it that is above every serial of the zone"
        ) from None


def _put_step(transaction: sqlite3.Connection, edition: Edition, before: bytes) -> None:
    """Keep the way to an edition, with those before that fit; `total` counts the octets of all that ever were."""
    deleted, added = _packed(edition.deleted), _packed(edition.added)
    (total,) = transaction.execute("SELECT coalesce(max(total), 0) FROM step").fetchone()
    total += len(deleted) + len(added)
    transaction.execute(
        "INSERT INTO step (before, soa_before, soa_after, deleted, added, total) VALUES (?, ?, ?, ?, ?, ?)",
        (records.soa_serial(before), before, edition.soa, deleted, added, total),
    )
    transaction.execute(
        "DELETE FROM step WHERE total < ? AND id != (SELECT max(id) FROM step)", (total - _MOST_STEPS,)
    )


def _lock(file: Path) -> int:
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StoreUnusable(f"{file.parent}: another process serves from here; end that one first") from None
    return descriptor


def _prepare(connection: sqlite3.Connection, apex: Name) -> None:
    """Raises StoreUnusable."""
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if not application and not version:
        connection.execute("BEGIN IMMEDIATE")
        for table in _TABLES:
            connection.execute(table)
        connection.execute("INSERT INTO zone VALUES (?)", (apex,))
        connection.execute(f"PRAGMA application_id = {_APPLICATION}")
        connection.execute(f"PRAGMA user_version = {_VERSION}")
        connection.execute("COMMIT")
        return
    if (application, version) != (_APPLICATION, _VERSION):
        raise StoreUnusable(
            "the file is none of this program's, or of a newer one; restore the one that was here"
        )
    (held,) = connection.execute("SELECT apex FROM zone").fetchone()
    if held != apex:
        raise StoreUnusable(f"it holds the zone {records.text(held)}; give each pool a directory of its own")


def _packed(parts: Iterable[bytes]) -> bytes:
    return b"".join(piece for part in parts for piece in (len(part).to_bytes(2, "big"), part))


def _unpacked(octets: bytes) -> tuple[bytes, ...]:
    parts, at = [], 0
    while at < len(octets):
        end = at + 2 + (octets[at] << 8 | octets[at + 1])
        parts.append(octets[at + 2 : end])
        at = end
    return tuple(parts)
