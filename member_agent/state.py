"""The agent's state directory: who we are, our keys; every file 0600, written aside and renamed."""

import fcntl
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import TypeAdapter, ValidationError

from member_agent.errors import AgentError, ExitStatus
from nts_core.cookies import Keyring
from nts_core.errors import WireError
from nts_core.shell import replace_file

_MEMBERSHIP = "membership.json"
_AGENT_KEY = "agent-key.pem"
_LISTENING = "listening.json"
_COOKIE_KEYS = "cookie-keys.json"


@dataclass(frozen=True, slots=True)
class Membership:
    """What a registry told us when we joined; `token` is the agent's own API token."""

    registry: str
    pool: str
    server: str
    domain: str
    token: str = field(repr=False)
    ca: str | None = None  # a file of roots for the registry instead of the system's


@dataclass(frozen=True, slots=True)
class Listening:
    """Where the engine last served, so that it can go on while the registry is away."""

    hosts: tuple[str, ...]
    ke_port: int


_listening_adapter = TypeAdapter(Listening)
_membership_adapter = TypeAdapter(Membership)


class StateDirectory:
    """One agent's directory; `lock` keeps a second agent out of it."""

    def __init__(self, path: Path, *, create: bool = True) -> None:
        if create:
            try:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise _unusable(path, error) from None
        self.path = path
        self._lock: int | None = None

    def lock(self) -> None:
        """Hold the directory until this process ends; AgentError when another process holds it."""
        try:
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unusable(self.path / "lock", error) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise AgentError(
                f"another pool-agent uses {self.path}", "stop it, or give another --state", ExitStatus.STATE
            ) from None
        self._lock = descriptor
        if self.path.stat().st_mode & 0o022:
            raise AgentError(
                f"{self.path} may be written to by others, who could change its keys",
                f"chmod go-w {self.path}, or give another --state",
                ExitStatus.STATE,
            )

    def membership(self) -> Membership | None:
        """Who we are, or None before we joined."""
        try:
            content = (self.path / _MEMBERSHIP).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unusable(self.path, error) from None
        try:
            return _membership_adapter.validate_json(content)
        except ValidationError:
            raise AgentError(
                f"{self.path / _MEMBERSHIP} is damaged",
                "ask for a new join token and run `pool-agent join` again",
                ExitStatus.STATE,
            ) from None

    def require_membership(self) -> Membership:
        """Who we are; AgentError with the next step before we joined."""
        membership = self.membership()
        if membership is None:
            raise AgentError(
                f"{self.path} holds no membership",
                "run `pool-agent join REGISTRY_URL --token TOKEN` first",
                ExitStatus.STATE,
            )
        return membership

    def save_membership(self, membership: Membership) -> None:
        self._write(_MEMBERSHIP, _membership_adapter.dump_json(membership))

    def listening(self) -> Listening | None:
        """Where the engine served in the last run; None when that is not known."""
        try:
            return _listening_adapter.validate_json((self.path / _LISTENING).read_bytes())
        except (OSError, ValidationError):
            return None

    def save_listening(self, hosts: Sequence[str], ke_port: int) -> None:
        self._write(_LISTENING, _listening_adapter.dump_json(Listening(tuple(hosts), ke_port)))

    def agent_key(self) -> Ed25519PrivateKey:
        """The agent's own key, made on first use."""
        path = self.path / _AGENT_KEY
        if not path.exists():
            fresh = Ed25519PrivateKey.generate()
            pem = fresh.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            self._write(_AGENT_KEY, pem)
            return fresh
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), None)
        except (OSError, ValueError) as error:
            raise _unusable(path, error) from None
        if not isinstance(key, Ed25519PrivateKey):
            raise _unusable(path, ValueError("not an Ed25519 key"))
        return key

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
        self._write(_COOKIE_KEYS, keyring.dump())

    def _write(self, name: str, content: bytes) -> None:
        try:
            replace_file(self.path / name, content)
        except OSError as error:
            raise _unusable(self.path / name, error) from None


def _unusable(path: Path, error: Exception) -> AgentError:
    return AgentError(f"{path}: {error}", "check the directory's owner, rights and space", ExitStatus.STATE)
