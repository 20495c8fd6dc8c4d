"""The agent's state directory: who this host is in which pools, and all keys; every file 0600, written aside and renamed.

STATE/lock                   held while an agent runs
STATE/cookie-keys.json       the host's cookie keys
STATE/engine.json            the engine that was agreed to at join; what was told to a time daemon: `engines.succession`
STATE/joining/               keys of joins under way, by join token
STATE/members/DOMAIN/        one server that this host is: membership.json, lock, listening.json, proofs.json, hooked, certificates/;
                             given-up when it is to go, whatever its pool says;
                             with an ACME account of its own also acme-account.pem, own-account.json
"""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, TypeAdapter, ValidationError

from member_agent.errors import AgentError, ExitStatus
from member_agent.privileges import give
from nts_core.cookies import Keyring
from nts_core.errors import WireError
from nts_core.shell import locked, replace_file, sync

_COOKIE_KEYS, _ENGINE = "cookie-keys.json", "engine.json"
_JOINING, _MEMBERS = "joining", "members"
_MEMBERSHIP, _LISTENING, _PROOFS = "membership.json", "listening.json", "proofs.json"
_LOCK, _CERTIFICATES, _HOOKED, _ROOTS = "lock", "certificates", "hooked", "registry-ca.pem"
# What is being removed; no domain begins so.
_GONE = ".gone-"
_GIVEN_UP = "given-up"
# Seconds for which one who joins waits for an agent that writes a token down.
_JOIN_PATIENCE = 10.0
_CHECK = "check the directory's owner, rights and space"


@dataclass(frozen=True, slots=True)
class Membership:
    """What a registry told us when we joined. `token` is the agent's own API token, had since `token_at` (Unix seconds),
    `key` the Ed25519 key that joined (PKCS 8, PEM), `joined_by` a digest of the join token.
    """

    registry: str
    pool: str
    server: str
    domain: str
    token: str = field(repr=False)
    token_at: int
    key: str = field(repr=False)
    joined_by: str
    ca: str | None = None  # a file of roots for the registry instead of the system's


@dataclass(frozen=True, slots=True)
class Listening:
    """Where a server last served, so that it can go on while the registry is away."""

    hosts: tuple[str, ...]
    ke_port: int
    http_port: int = 80
    tls_port: int = 443


@dataclass(frozen=True, slots=True)
class Agreed:
    """The engine that the member chose at join."""

    kind: Literal["builtin", "chrony", "ntpsec", "ntpd-rs"]


_engine_adapter = TypeAdapter(Agreed)
_listening_adapter = TypeAdapter(Listening)
_membership_adapter = TypeAdapter(Membership)
# Signatures by nonce.
_proofs_adapter = TypeAdapter(
    dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")], Annotated[bytes, Field(max_length=200)]]
)


class MemberDirectory:
    """One server that this host is in a pool: who it is, and its certificates."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def certificates(self) -> Path:
        return self.path / _CERTIFICATES

    def membership(self) -> Membership:
        """Who we are. Raises AgentError with the remedy."""
        path = self.path / _MEMBERSHIP
        try:
            membership = _membership_adapter.validate_json(path.read_bytes())
        except OSError as error:
            raise unusable(path, error) from None
        except ValidationError:
            membership = None
        if membership is None or membership.domain != self.path.name:
            raise AgentError(
                f"{path} is damaged",
                "ask for a new join token and run `pool-agent join` again",
                ExitStatus.STATE,
            )
        return membership

    def stamp(self) -> int:
        """Changes when another membership is saved, or when the server is given up; 0 while there is none."""
        return _changed_at(self.path / _MEMBERSHIP) + _changed_at(self.path / _GIVEN_UP)

    def save_roots(self, file: Path) -> Path:
        """Keep a copy of the registry's roots where the agent can read it; its place. Raises AgentError."""
        try:
            roots = file.read_bytes()
        except OSError as error:
            raise AgentError(f"--ca {file}: {error}", "give a PEM file", ExitStatus.CONFIGURATION) from None
        kept = self.path / _ROOTS
        _write(kept, roots)
        return kept.absolute()

    def save_membership(self, membership: Membership) -> None:
        """What came of joining, which also takes `give_up` back. Raises AgentError."""
        with self._changing(_JOIN_PATIENCE):
            self._save(membership)
            _remove(self.path / _GIVEN_UP)

    def save_token(self, membership: Membership) -> bool:
        """The same membership with a newer token; False if the server was joined anew meanwhile. Raises AgentError."""
        with self._changing(0):
            is_same = self.membership().key == membership.key
            if is_same:
                self._save(membership)
        return is_same

    @contextmanager
    def _changing(self, seconds: float) -> Iterator[None]:
        """One writer of the membership at a time: people join while an agent runs."""
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.path / _LOCK, seconds))
            except OSError as error:
                raise unusable(self.path / _LOCK, error) from None
            yield

    def _save(self, membership: Membership) -> None:
        _write(self.path / _MEMBERSHIP, _membership_adapter.dump_json(membership))

    def listening(self) -> Listening | None:
        """Where it served in the last run; None when that is not known."""
        try:
            return _listening_adapter.validate_json((self.path / _LISTENING).read_bytes())
        except (OSError, ValidationError):
            return None

    def save_listening(self, listening: Listening) -> None:
        if listening != self.listening():
            _write(self.path / _LISTENING, _listening_adapter.dump_json(listening))

    def hooked(self) -> str | None:
        """The fingerprint of the certificate for which the hook after an installation was run last."""
        try:
            return (self.path / _HOOKED).read_text("ascii")
        except (OSError, ValueError):
            return None

    def save_hooked(self, fingerprint: str) -> None:
        _write(self.path / _HOOKED, fingerprint.encode("ascii"))

    def proofs(self) -> dict[str, bytes]:
        """The signatures that the registry may still come for, by nonce; none when they are not known."""
        try:
            return _proofs_adapter.validate_json((self.path / _PROOFS).read_bytes())
        except (OSError, ValidationError):
            return {}

    def save_proofs(self, proofs: dict[str, bytes]) -> None:
        _write(self.path / _PROOFS, _proofs_adapter.dump_json(proofs))

    def give_up(self) -> None:
        """Whatever its pool says, it is to go: from here on each start of an agent takes it away. Raises AgentError."""
        _write(self.path / _GIVEN_UP, b"")

    @property
    def is_given_up(self) -> bool:
        return (self.path / _GIVEN_UP).exists()

    def remove(self) -> None:
        """The server has left its pool: its keys are of no use to anybody any more."""
        try:
            gone = self.path.with_name(_GONE + self.path.name)
            self.path.rename(gone)
            sync(gone.parent)
            shutil.rmtree(gone)
        except OSError as error:
            raise unusable(self.path, error) from None


class StateDirectory:
    """One agent's directory; `lock` keeps a second agent out of it."""

    def __init__(self, path: Path, *, create: bool = True) -> None:
        if create:
            _make(path)
        self.path = path
        self._lock: int | None = None

    def lock(self) -> None:
        """Hold the directory until this process ends; AgentError when another process holds it."""
        try:
            # For reading: so a lock that is there can be held on a disk that nobody can write to any more.
            flags = os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(self.path / "lock", flags, 0o600)
            give(descriptor, *_owner(self.path))
        except FileNotFoundError:
            raise self._not_joined() from None
        except OSError as error:
            raise unusable(self.path / "lock", error) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise AgentError(
                f"another pool-agent uses {self.path}", "stop it, or give another --state", ExitStatus.LOCKED
            ) from None
        self._lock = descriptor
        self.check_rights()

    def check_rights(self) -> None:
        """Refuse a directory in which others could change keys."""
        if self.path.stat().st_mode & 0o022:
            raise AgentError(
                f"{self.path} may be written to by others, who could change its keys",
                f"chmod go-w {self.path}, or give another --state",
                ExitStatus.STATE,
            )

    def members(self) -> dict[str, MemberDirectory]:
        """The servers that this host is, by domain. One that was joined while an agent runs appears here."""
        try:
            found = sorted((self.path / _MEMBERS).iterdir())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise unusable(self.path / _MEMBERS, error) from None
        return {
            path.name: MemberDirectory(path)
            for path in found
            if not path.name.startswith(_GONE) and (path / _MEMBERSHIP).exists()
        }

    def member(self, domain: str) -> MemberDirectory:
        """The directory of one server, made if need be."""
        _make(self.path / _MEMBERS)
        _make(path := self.path / _MEMBERS / domain)
        return MemberDirectory(path)

    def require_members(self) -> dict[str, MemberDirectory]:
        """`members`; AgentError with the next step before we joined."""
        members = self.members()
        if not members:
            raise self._not_joined()
        return members

    def _not_joined(self) -> AgentError:
        return AgentError(
            f"{self.path} holds no membership",
            "run `pool-agent join REGISTRY_URL --token TOKEN` first",
            ExitStatus.STATE,
        )

    def clean(self) -> None:
        """Remove what a crash left of servers that were being removed. The lock must be held."""
        for path in (self.path / _MEMBERS).glob(f"{_GONE}*"):
            shutil.rmtree(path, ignore_errors=True)

    def joined_by(self, token: str) -> Membership | None:
        """What came of a join token, if it has served here."""
        for member in self.members().values():
            # A damaged one is what joining anew mends.
            with suppress(AgentError):
                membership = member.membership()
                if membership.joined_by == token_digest(token):
                    return membership
        return None

    def joining_key(self, token: str) -> Ed25519PrivateKey:
        """The key to join with by this token, the same one until `joined`: an answer that got lost can be had again."""
        path = self._joining(token)
        if path.exists():
            try:
                return read_agent_key(path.read_bytes())
            except (OSError, ValueError) as error:
                raise unusable(path, error) from None
        fresh = Ed25519PrivateKey.generate()
        _make(path.parent)
        _write(path, agent_key_pem(fresh))
        return fresh

    def joined(self, token: str) -> None:
        """The membership that came of this token is kept; what else was begun is of no use any more."""
        _remove(self._joining(token))

    def _joining(self, token: str) -> Path:
        return self.path / _JOINING / f"{token_digest(token)}.pem"

    def engine(self) -> str | None:
        """The engine that was agreed to when this host joined; None before that."""
        try:
            return _engine_adapter.validate_json((self.path / _ENGINE).read_bytes()).kind
        except FileNotFoundError:
            return None
        except OSError as error:
            raise unusable(self.path / _ENGINE, error) from None
        except ValidationError:
            raise AgentError(
                f"{self.path / _ENGINE} is damaged",
                "name the engine in the settings: engine.kind",
                ExitStatus.STATE,
            ) from None

    def save_engine(self, kind: str) -> None:
        agreed = _engine_adapter.validate_python({"kind": kind})
        _write(self.path / _ENGINE, _engine_adapter.dump_json(agreed))

    def keyring(self) -> Keyring | None:
        """The cookie keys of the last run; AgentError for a damaged file, which is never overwritten."""
        path = self.path / _COOKIE_KEYS
        try:
            return Keyring.load(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, WireError) as error:
            raise AgentError(
                f"{path}: {error}",
                "move the file away; clients then get new cookies by key establishment",
                ExitStatus.STATE,
            ) from None

    def is_key_file(self, file: Path) -> bool:
        """Whether a file is the one that `save_keyring` writes."""
        own = self.path / _COOKIE_KEYS
        return own.exists() and own.samefile(file)

    def save_keyring(self, keyring: Keyring) -> None:
        _write(self.path / _COOKIE_KEYS, keyring.dump())


def token_digest(token: str) -> str:
    """What tells a join token from others, and is no secret."""
    return hashlib.sha256(token.encode()).hexdigest()[:32]


def agent_key_pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def read_agent_key(pem: bytes) -> Ed25519PrivateKey:
    """Raises ValueError for what is no Ed25519 key."""
    key = serialization.load_pem_private_key(pem, None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError("not an Ed25519 key")  # noqa: TRY004 - a fault of the file
    return key


def _make(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise unusable(path, error) from None


def _owner(directory: Path) -> tuple[int, int]:
    """User and group whose a file there is to be: also what root writes has to be read and replaced by the agent."""
    found = directory.stat()
    wanted = found.st_uid, found.st_gid
    return (-1, -1) if os.geteuid() or wanted == (0, os.getegid()) else wanted


def _write(path: Path, content: bytes) -> None:
    try:
        user, group = _owner(path.parent)
        replace_file(path, content, user=user, group=group)
    except OSError as error:
        raise unusable(path, error) from None


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise unusable(path, error) from None


def _changed_at(path: Path) -> int:
    """In nanoseconds; 0 of what is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def unusable(path: Path, error: Exception) -> AgentError:
    """What to say of an error of the disk's. A full one is worth another attempt, as others make room."""
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return AgentError(
            f"no room for {path}: {error.strerror}",
            f"make room there (`df {path.parent}`); a running agent goes on by itself, and systemd starts one again",
            ExitStatus.NO_ROOM,
        )
    return AgentError(f"{path}: {error}", _CHECK, ExitStatus.STATE)
