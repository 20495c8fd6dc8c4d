"""What the programs share at their edges (I/O): how they log, how files are replaced, where settings come from."""

import asyncio
import fcntl
import logging
import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import structlog
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)
from pydantic_settings import SettingsError as SourceError

# Enough for every listener's cap several times over.
_DESCRIPTORS = 65_536
# Seconds between looks at a lock that another one holds.
_LOCK_LOOK = 0.02


def configure_logging(level: int = logging.INFO) -> None:
    """JSON lines on standard error, or readable ones on a terminal."""
    renderer = structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        # Looked up with each line: where it was replaced for a while, the old one may be closed by then.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )


async def until(stop: asyncio.Event, *tasks: asyncio.Task[None]) -> None:
    """Wait for the stop signal or for a task that ends, whose error is raised; end the others."""
    stopped = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait({stopped, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in (stopped, *tasks):
            task.cancel()
        await asyncio.gather(stopped, *tasks, return_exceptions=True)


def raise_descriptor_limit() -> None:
    """Use what the host allows: the usual soft limit of 1,024 would let idle connections starve everything."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def affordable_connections(wanted: int, reserved: int) -> int:
    """As many connections as there are descriptors for when `reserved` are left to the rest of the process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - reserved))


def replace_file(path: Path, content: bytes, *, user: int = -1, group: int = -1) -> None:
    """Replace a file as a whole, for its owner's eyes only, and safe against a crash at any point."""
    write_aside(path, content, user=user, group=group).replace(path)
    sync(path.parent)


@contextmanager
def locked(file: Path, seconds: float) -> Iterator[None]:
    """Hold a lock file, made if need be, against all other processes and threads.

    It blocks for so many seconds at most, and raises TimeoutError then. The kernel frees it when its holder dies.
    """
    end = time.monotonic() + seconds
    with os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)) as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise TimeoutError(f"{file} is locked by another process") from None
                time.sleep(_LOCK_LOOK)
        yield


def write_aside(path: Path, content: bytes, *, mode: int = 0o600, user: int = -1, group: int = -1) -> Path:
    """The content on the disk in a file beside `path`, to be renamed to it; nothing is left where that fails."""
    aside = path.with_name(f".{path.name}.new")
    aside.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        with os.fdopen(os.open(aside, flags, 0o600), "wb") as file:
            if (user, group) != (-1, -1):
                # Nothing that would change nothing: a unit's filter may not let it.
                os.fchown(file.fileno(), user, group)
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    return aside


def make_file(path: Path, content: bytes) -> None:
    """Make a file for its owner's eyes only. One that is there stays: of several programs that start together, one makes
    it and the others read it.
    """
    descriptor, aside = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as new:
            new.write(content)
            new.flush()
            os.fsync(new.fileno())
        with suppress(FileExistsError):
            os.link(aside, path)
    finally:
        Path(aside).unlink()
    sync(path.parent)


def sync(path: Path) -> None:
    """Return once the file, or the names in the directory, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class SettingsError(Exception):
    """A file, variable or flag that cannot be used; the text names the setting."""


class ProgramSettings(BaseSettings):
    """Frozen settings: flags before environment before a TOML file before defaults.

    A subclass says its `env_prefix`. Unknown keys in the file and unknown variables with the prefix are
    refused.
    """

    model_config = SettingsConfigDict(extra="forbid", frozen=True)

    @classmethod
    def load(cls, file: Path, **flags: Any) -> Self:
        """The settings that hold. Flags that are None were not given. Raises SettingsError."""
        prefix = cls.model_config["env_prefix"]
        for variable in os.environ:
            setting = variable.removeprefix(prefix).lower().split("__")[0]
            if variable.startswith(prefix) and setting not in cls.model_fields:
                raise SettingsError(
                    f"the environment variable {variable} sets nothing: there is no setting {setting}"
                )
        # A directory or a link to nothing would count as no file, and its settings as not wanted.
        if os.path.lexists(file) and not (file.is_file() or file.is_char_device()):
            raise SettingsError(f"{file}: not a file")
        place = f"{file}: " if file.is_file() else ""
        # The file is part of pydantic's class configuration, so every file has a class of its own.
        loader: type[Self] = type(cls.__name__, (cls,), {"model_config": SettingsConfigDict(toml_file=file)})
        try:
            return loader(**{name: value for name, value in flags.items() if value is not None})
        except ValidationError as error:
            faults = (
                f"{'.'.join(map(str, each['loc'])) or 'settings'}: {_fault(each['type'], each['msg'])}"
                for each in _causes(error.errors())
            )
            raise SettingsError(f"{place}{'; '.join(faults)}") from None
        except SourceError as error:
            raise SettingsError(f"{error}: lists and tables in the environment are written as JSON") from None
        except (ValueError, OSError) as error:
            raise SettingsError(f"{place}{error}") from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is pydantic's
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is pydantic's
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def _is_ipv6(text: str) -> bool:
    try:
        return ip_address(text).version == 6
    except ValueError:
        return False


def _causes(faults: list[ErrorDetails]) -> Iterator[ErrorDetails]:
    """Without what a list is told that is empty for no other reason than a fault in its only entry."""
    for each in faults:
        loc = each["loc"]
        if not any(len(loc) < len(other["loc"]) and other["loc"][: len(loc)] == loc for other in faults):
            yield each


def _fault(kind: str, message: str) -> str:
    """Pydantic's words for a fault, where people would not know what they mean."""
    match kind:
        case "extra_forbidden":
            return "there is no such setting"
        case "tuple_type":
            return "write a list, in brackets"
        case "model_type" | "model_attributes_type":
            return "write a table of settings"
        case _:
            return message.removeprefix("Value error, ")


def check_https(text: str) -> str:
    """An https:// address without a user in it. Raises ValueError."""
    if not text.startswith("https://") or not urlsplit(text).hostname or "@" in urlsplit(text).netloc:
        raise ValueError("write it as https://HOST/PATH")
    return text


def check_contact(text: str) -> str:
    """A URL by which a CA reaches us. Raises ValueError."""
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*:[!-~]{1,250}", text):
        raise ValueError("write it as a URL, mailto:NAME@DOMAIN")
    return text


def parse_host_port(text: str, default_port: int) -> tuple[str, int]:
    """HOST, HOST:PORT, an IPv6 address, [IPV6] or [IPV6]:PORT. Raises ValueError that says how to write it."""
    host, port = text, str(default_port)
    if text.startswith("["):
        host, closing, rest = text[1:].partition("]")
        port = port if closing and not rest else rest.removeprefix(":") if rest.startswith(":") else ""
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    host = host.rstrip(".").lower()
    if "://" in text or (":" in host and not _is_ipv6(host)):
        port = ""
    # Five digits at most: Python refuses to read thousands with a ValueError that says nothing of ports.
    if not host or re.fullmatch(r"[0-9]{1,5}", port) is None or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is not a host and a port: write HOST:PORT, and IPv6 as [ADDRESS]:PORT")
    return host, int(port)
