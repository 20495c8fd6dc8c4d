"""What a client keeps on disk between runs (I/O): cookies with their keys, and the last recorded time.

    DIR/NAME-PORT-DIGEST.json   one server's credentials (RFC 8915 section 5.7)
    DIR/NAME-PORT-DIGEST.lock   held by the one process that uses them
    DIR/recorded-time.json      a time that was known to be right (section 8.5)
    DIR/pool-NAME-DIGEST.json   which of a pool's servers are used, and which are held back until when

Rules:

1. A cookie that is going to be used is gone from the file, durably, before its request is sent: `CookieFile.save`
   returns when the new content has reached the disk.
2. One process at a time uses a server's file. The lock ends with the process, however that ends.
3. Every file is 0600, written aside and renamed. One that is damaged, or that others could read or write, is not
   believed; it is moved aside, and never overwritten.
4. Credentials are bound to what they were asked for: name, port, roots.
"""

import asyncio
import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import BaseModel, ConfigDict, Field, IPvAnyAddress, ValidationError

from nts_core.aead import KEY_LENGTH, AeadId, SessionKeys
from nts_core.built import BUILT
from nts_core.client import ClientError, Failure
from nts_core.cookies import MAX_COOKIE_LENGTH, MAX_COOKIES
from nts_core.errors import printable
from nts_core.independence import Candidate
from nts_core.resolve import Proof
from nts_core.roster import MAX_HOLDS, REFUSED_HOLD, Fault, Hold
from nts_core.session import CHECKED_ANSWERS, COOKIE_LIFETIME, MAX_INTERVAL, CertificateTime, Credentials
from nts_core.shell import replace_file, sync
from nts_core.srv import MAX_TARGETS

# How long a second process waits for the first one's lock, in seconds.
LOCK_TIMEOUT = 5.0
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LOCK_POLL = 0.05
# Eight cookies of the longest kind in base64 take less than 4 KiB.
_MAX_FILE = 16 * 1024
_VERSION = 1
_RECORDED_TIME = "recorded-time"
# As many holds as a roster has, with names and reasons of the longest kind.
_MAX_POOL_FILE = 256 * 1024
_MAX_REASON = 200
_Result = TypeVar("_Result")
_REMEDY = "check the directory's owner, rights and space, or give another --state"


@dataclass(frozen=True, slots=True)
class Binding:
    """What credentials were asked for; they serve nothing else. `roots` is a digest of those that were trusted."""

    name: str
    port: int
    roots: str

    @classmethod
    def of(cls, name: str, port: int, roots: Sequence[x509.Certificate]) -> Self:
        digest = hashlib.sha256()
        for der in sorted(root.public_bytes(Encoding.DER) for root in roots):
            digest.update(hashlib.sha256(der).digest())
        return cls(name, port, digest.hexdigest())

    @property
    def stem(self) -> str:
        """A file name for the server, safe for every name and no longer than file systems allow."""
        return _stem(self.name, self.port)


def _stem(name: str, port: int) -> str:
    digest = hashlib.sha256(f"{name}\0{port}".encode()).hexdigest()
    readable = re.sub(r"[^a-z0-9.-]", "_", name.lower())[:80].lstrip(".")
    return f"{readable}-{port}-{digest[:16]}"


@dataclass(frozen=True, slots=True)
class Kept:
    """One server's file.

    `ke_address` is where key establishment was done; `established_at` and `received_at` (the newest cookie)
    are Unix nanoseconds. `rate_floor` is the interval between polls, in nanoseconds, that the server's RATE
    demands.
    """

    credentials: Credentials
    ke_address: str
    established_at: int
    received_at: int
    rate_floor: int = 0


class _Document(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        ser_json_bytes="base64",
        val_json_bytes="base64",
        hide_input_in_errors=True,
    )


_Cookie = Annotated[bytes, Field(min_length=1, max_length=MAX_COOKIE_LENGTH)]
_Nanoseconds = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]


class _KeysDocument(_Document):
    aead: int
    c2s: bytes
    s2c: bytes

    @classmethod
    def of(cls, keys: SessionKeys) -> Self:
        return cls(aead=keys.aead, c2s=keys.c2s, s2c=keys.s2c)

    def keys(self) -> SessionKeys:
        """Raises ValueError for an algorithm that we do not speak, or keys that are not its."""
        aead = AeadId(self.aead)
        if len(self.c2s) != KEY_LENGTH[aead] or len(self.s2c) != KEY_LENGTH[aead]:
            raise ValueError("the session keys have a wrong length")
        return SessionKeys(aead, self.c2s, self.s2c)


class _CookieDocument(_Document):
    version: Literal[1]
    name: str
    port: int
    roots: str
    ke_address: IPvAnyAddress
    host: IPvAnyAddress
    ntp_port: Annotated[int, Field(ge=1, le=65535)]
    not_before: _Nanoseconds
    not_after: _Nanoseconds
    certificate_time: CertificateTime
    unchecked: Annotated[int, Field(ge=0, le=CHECKED_ANSWERS)]
    established_at: _Nanoseconds
    received_at: _Nanoseconds
    rate_floor: Annotated[int, Field(ge=0, le=MAX_INTERVAL)]
    keys: _KeysDocument
    alternative: _KeysDocument | None
    cookies: Annotated[tuple[_Cookie, ...], Field(max_length=MAX_COOKIES)]


class _TimeDocument(_Document):
    version: Literal[1]
    recorded_ns: Annotated[int, Field(ge=0, lt=1 << 63)]


class _ServerDocument(_Document):
    name: Annotated[str, Field(min_length=1, max_length=253)]
    port: Annotated[int, Field(ge=1, le=65535)]


class _HoldDocument(_Document):
    name: Annotated[str, Field(min_length=1, max_length=253)]
    until_ns: _Nanoseconds
    failures: Annotated[int, Field(ge=1)]
    fault: Fault
    reason: Annotated[str, Field(max_length=_MAX_REASON)]


class _PoolDocument(_Document):
    version: Literal[1]
    pool: str
    membership: Proof | None
    used: Annotated[tuple[_ServerDocument, ...], Field(max_length=MAX_TARGETS)]
    holds: Annotated[tuple[_HoldDocument, ...], Field(max_length=MAX_HOLDS)]


class CookieFile:
    """The file of one server, held under its lock from `open` to `close`."""

    def __init__(self, directory: Path, binding: Binding, lock: int) -> None:
        self._path = directory / f"{binding.stem}.json"
        self._binding = binding
        self._lock = lock

    @classmethod
    async def open(cls, directory: Path, binding: Binding) -> Self:
        """Raises ClientError when the directory is of no use, or another process keeps the lock for too long."""
        _make_directory(directory)
        path = directory / f"{binding.stem}.lock"
        lock = _open_lock(path)
        try:
            async with asyncio.timeout(LOCK_TIMEOUT):
                while not _try_lock(lock):  # noqa: ASYNC110 - the kernel tells of a free lock only by blocking
                    await asyncio.sleep(_LOCK_POLL)
        except TimeoutError:
            os.close(lock)
            raise ClientError(
                Failure.CONFIGURATION,
                f"another process uses what is kept of {binding.name} in {directory}",
                "wait until it has ended, or give another --state",
            ) from None
        except BaseException:
            os.close(lock)
            raise
        return cls(directory, binding, lock)

    def close(self) -> None:
        os.close(self._lock)

    def load(self, now: int) -> tuple[Kept | None, str | None]:
        """What is kept, and a sentence if something is wrong with the file. `now` is in Unix nanoseconds.

        Nothing is kept that was asked for otherwise or is too old. An age below zero is that of a clock that
        was set back, and says nothing.
        """
        content, fault = _read(self._path)
        if content is None:
            return None, fault
        try:
            document = _CookieDocument.model_validate_json(content)
            kept = Kept(
                Credentials(
                    keys=document.keys.keys(),
                    cookies=document.cookies,
                    host=str(document.host),
                    port=document.ntp_port,
                    not_before=document.not_before,
                    not_after=document.not_after,
                    certificate_time=document.certificate_time,
                    alternative=None if document.alternative is None else document.alternative.keys(),
                    unchecked=document.unchecked,
                ),
                str(document.ke_address),
                document.established_at,
                document.received_at,
                document.rate_floor,
            )
        except (ValueError, KeyError) as error:
            return None, _set_aside(self._path, content, _explain(error))
        binding = Binding(document.name, document.port, document.roots)
        if binding != self._binding or now - kept.received_at > COOKIE_LIFETIME:
            return None, None
        return kept, None

    def save(self, kept: Kept) -> None:
        """Replace the file durably. Raises ClientError; then the old content or the new one is there."""
        credentials, binding = kept.credentials, self._binding
        document = _CookieDocument(
            version=_VERSION,
            name=binding.name,
            port=binding.port,
            roots=binding.roots,
            ke_address=ip_address(kept.ke_address),
            host=ip_address(credentials.host),
            ntp_port=credentials.port,
            not_before=credentials.not_before,
            not_after=credentials.not_after,
            certificate_time=credentials.certificate_time,
            unchecked=credentials.unchecked,
            established_at=kept.established_at,
            received_at=kept.received_at,
            rate_floor=kept.rate_floor,
            keys=_KeysDocument.of(credentials.keys),
            alternative=None
            if credentials.alternative is None
            else _KeysDocument.of(credentials.alternative),
            cookies=credentials.cookies,
        )
        _guarded(
            self._path, lambda: replace_file(self._path, document.model_dump_json(indent=1).encode() + b"\n")
        )

    def forget(self) -> None:
        """Remove the file durably. Raises ClientError."""
        _guarded(self._path, lambda: _remove(self._path))


class PoolFile:
    """What a client of a pool keeps beside the cookies, held under its lock from `open` to `close`."""

    def __init__(self, path: Path, pool: str, lock: int) -> None:
        self._path = path
        self._pool = pool
        self._lock = lock

    @classmethod
    def open(cls, directory: Path, pool: str) -> Self:
        """Raises ClientError when the directory is of no use, or another process uses it for this pool."""
        _make_directory(directory)
        path = directory / f"pool-{_stem(pool, 0)}.json"
        lock = _open_lock(path.with_suffix(".lock"))
        if not _try_lock(lock):
            os.close(lock)
            raise ClientError(
                Failure.CONFIGURATION,
                f"another process uses what is kept of the pool {pool} in {directory}",
                "wait until it has ended, or give another --state",
            )
        return cls(path, pool, lock)

    def close(self) -> None:
        os.close(self._lock)

    def load(self, now: int) -> tuple[list[Candidate], dict[str, Hold], Proof | None, str | None]:
        """The servers in use, the holds with `until` in seconds from `now` (Unix nanoseconds), and how it was proved who
        is a member; and a sentence if something is wrong with the file. No hold is longer than the longest one, wherever
        the clock was set to.
        """
        content, fault = _read(self._path, _MAX_POOL_FILE)
        if content is None:
            return [], {}, None, fault
        try:
            document = _PoolDocument.model_validate_json(content)
        except ValueError as error:
            return [], {}, None, _set_aside(self._path, content, _explain(error))
        if document.pool != self._pool:
            return [], {}, None, None
        holds = {
            each.name: Hold(
                min((each.until_ns - now) / 1e9, REFUSED_HOLD),
                each.failures,
                each.fault,
                printable(each.reason),
            )
            for each in document.holds
        }
        return [Candidate(each.name, each.port) for each in document.used], holds, document.membership, None

    def save(
        self, used: Iterable[Candidate], holds: Mapping[str, Hold], membership: Proof | None, now: int
    ) -> None:
        """Replace the file durably; times as in `load`. Raises ClientError."""
        document = _PoolDocument(
            version=_VERSION,
            pool=self._pool,
            membership=membership,
            used=tuple(_ServerDocument(name=each.name, port=each.port) for each in used),
            holds=tuple(
                _HoldDocument(
                    name=name,
                    until_ns=now + round(hold.until * 1e9),
                    failures=hold.failures,
                    fault=hold.fault,
                    reason=hold.reason[:_MAX_REASON],
                )
                for name, hold in holds.items()
            ),
        )
        _guarded(
            self._path, lambda: replace_file(self._path, document.model_dump_json(indent=1).encode() + b"\n")
        )


class TimeRecord:
    """The last recorded time of a state directory, which never goes back (section 8.5)."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / f"{_RECORDED_TIME}.json"

    def load(self) -> tuple[int | None, str | None]:
        """The time in Unix nanoseconds, and a sentence if something is wrong with the file."""
        content, fault = _read(self._path)
        if content is None:
            return None, fault
        try:
            return _TimeDocument.model_validate_json(content).recorded_ns, None
        except ValueError as error:
            return None, _set_aside(self._path, content, _explain(error))

    def floor(self) -> tuple[datetime, str | None]:
        """What is certainly past: the recorded time, or when this program was made if that is later; and as `load`."""
        recorded, fault = self.load()
        at = BUILT if recorded is None else _EPOCH + timedelta(microseconds=recorded // 1000)
        return max(at, BUILT), fault

    def save(self, time: int) -> None:
        """Record `time` unless a later one is recorded. Raises ClientError."""
        _make_directory(self._path.parent)
        lock = _open_lock(self._path.with_suffix(".lock"))
        try:
            if not _try_lock(lock):
                # Another process records the time just now: it knows it as well as we do.
                return
            recorded, _ = self.load()
            if recorded is None or recorded < time:
                document = _TimeDocument(version=_VERSION, recorded_ns=time)
                _guarded(
                    self._path, lambda: replace_file(self._path, document.model_dump_json().encode() + b"\n")
                )
        finally:
            os.close(lock)


def _make_directory(directory: Path) -> None:
    _guarded(directory, lambda: directory.mkdir(mode=0o700, parents=True, exist_ok=True))
    if directory.stat().st_mode & 0o022:
        raise ClientError(
            Failure.CONFIGURATION,
            f"{directory} may be written to by others, who could change what is kept there",
            f"chmod go-w {directory}, or give another --state",
        )


def _open_lock(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    return _guarded(path, lambda: os.open(path, flags, 0o600))


def _guarded(path: Path, work: Callable[[], _Result]) -> _Result:
    try:
        return work()
    except OSError as error:
        raise ClientError(Failure.CONFIGURATION, f"{path}: {error.strerror or error}", _REMEDY) from None


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(path: Path, limit: int = _MAX_FILE) -> tuple[bytes | None, str | None]:
    """The content of one of our files; or None, with a sentence when it is there and cannot be used."""
    try:
        # Without O_NONBLOCK a named pipe in the file's place would hold us up.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None, None
    except OSError as error:
        return None, _set_aside(path, b"", error.strerror or str(error))
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            return None, _set_aside(path, b"", "it is not a file")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(limit + 1)
    except OSError as error:
        return None, _set_aside(path, b"", error.strerror or str(error))
    finally:
        os.close(descriptor)
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        return None, _set_aside(path, content, "others may read or write it")
    if len(content) > limit:
        return None, _set_aside(path, content, f"it is longer than {limit} octets")
    return content, None


def _explain(error: ValueError | KeyError) -> str:
    """What is wrong with a document, without anything of its content."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "extra_forbidden":
        # The place would be the field's name, which is content, and may be a secret or no text for a terminal.
        return "it has a field that is not known here"
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else first["msg"]


def _set_aside(path: Path, content: bytes, fault: str) -> str:
    """Move a file of no use out of the way, for whoever wants to look at it."""
    aside = path.with_name(f"{path.name}.damaged-{hashlib.sha256(content).hexdigest()[:8]}")
    with suppress(OSError):
        path.rename(aside)
        return f"{path} is not used: {fault}; it is now {aside.name}"
    return f"{path} is not used: {fault}"


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    sync(path.parent)
