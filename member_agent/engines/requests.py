"""How an agent without rights asks root to change the time daemon, and what root believes of it.

    STATE/engine/request.json    written by the agent; a systemd path unit then runs `pool-agent engine apply`
    STATE/engine/result.json     written by root, under the request's own id

Everything in STATE can be written by the agent's user, so root takes nothing from there but closed data: a kind of
daemon, names, addresses, ports, and where in STATE the pairs are. Pairs have to be the agent's own files, are checked,
and are written anew from what was understood. Which commands root runs and where it writes come from settings that
root alone can change. A request is taken away before it is followed: one that makes root fail comes once.
"""

import asyncio
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from member_agent.config import CONFIG_FILE, EngineSettings, load_settings
from member_agent.engines import EngineError, Service
from member_agent.engines.layout import Kind
from member_agent.errors import AgentError, ExitStatus
from member_agent.install import FILE_LIMIT, Bundle, InstallError, bundle
from member_agent.sockets import Endpoint, parse_endpoint
from nts_core.shell import replace_file

_DIRECTORY, _REQUEST, _RESULT = "engine", "request.json", "result.json"
_LIMIT = 64 * 1024
_TAKE_DEADLINE = 30.0  # seconds until root has begun
# For the new state and, when that does not serve, for the old: two commands to the daemon, and the look whether it serves.
_STEPS = 6
# Beside them: until another one has let go of the daemon's files, and for the daemon's log.
_BESIDE = 60.0
_POLL = 0.1
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def _endpoint(text: str) -> str:
    # A zone may hold any character, and means nothing to the outside.
    if "%" in text:
        raise ValueError(f"{text!r}: an address has no zone here")
    try:
        endpoint = parse_endpoint(text, "address")
    except AgentError as error:
        raise ValueError(error.message) from None
    if not endpoint.port:
        raise ValueError(f"{text}: port 0")
    return str(endpoint)


def _inside(text: str) -> str:
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or "\0" in text:
        raise ValueError(f"{text!r} is not below the agent's directory")
    return text


_Seen = TypeVar("_Seen")
_Domain = Annotated[
    str, Field(max_length=253, pattern=r"^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?[.])+[a-z0-9-]{2,63}$")
]
_Path = Annotated[str, Field(max_length=1000), AfterValidator(_inside)]
_Endpoint = Annotated[str, Field(max_length=64), AfterValidator(_endpoint)]
_Id = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PairFiles(_Document):
    """Where a pair is, below STATE."""

    chain: _Path
    key: _Path


class Request(_Document):
    """What the daemon is to serve; nothing when there are no pairs."""

    id: _Id
    kind: Kind
    pairs: dict[_Domain, PairFiles] = Field(max_length=16)
    ke: tuple[_Endpoint, ...] = Field(max_length=64)
    ntp: tuple[_Endpoint, ...] = Field(max_length=64)


class Result(_Document):
    """How it went."""

    id: _Id
    problem: str | None = None
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Task:
    """A request, understood."""

    id: str
    kind: Kind
    bundles: dict[str, Bundle]
    ke: tuple[Endpoint, ...]
    ntp: tuple[Endpoint, ...]


def longest(deadline: float) -> float:
    """Seconds that a change takes at most where each of its steps has `deadline`."""
    return _STEPS * deadline + _BESIDE


# The agent's side


async def ask(state: Path, kind: Kind, service: Service, deadline: float) -> None:
    """Have root serve this. EngineError with what root says, or when root does not say anything."""
    request = Request(
        id=secrets.token_hex(16),
        kind=kind,
        pairs={
            domain: PairFiles(chain=_below(state, pair.chain_path), key=_below(state, pair.key_path))
            for domain, pair in service.pairs.items()
        },
        ke=tuple(map(str, service.ke)),
        ntp=tuple(map(str, service.ntp)),
    )
    place = state / _DIRECTORY
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        replace_file(place / _REQUEST, request.model_dump_json().encode())
    except OSError as error:
        raise AgentError(
            f"{place}: {error.strerror}", "check the directory's owner, rights and space", ExitStatus.STATE
        ) from None
    try:
        async with asyncio.timeout(_TAKE_DEADLINE):
            await _until(lambda: not (place / _REQUEST).exists())
    except TimeoutError:
        (place / _REQUEST).unlink(missing_ok=True)
        raise EngineError(
            "nobody takes what the time daemon is to serve",
            "run `systemctl enable --now pool-agent-engine.path`, or the agent as root",
        ) from None
    try:
        async with asyncio.timeout(longest(deadline)):
            result = await _until(lambda: _result(place / _RESULT, request.id))
    except TimeoutError:
        raise EngineError(
            "root does not say what became of the time daemon", "see `journalctl -u pool-agent-engine`"
        ) from None
    if result.problem is not None:
        raise EngineError(result.problem, result.remedy)


async def _until(look: Callable[[], _Seen | None]) -> _Seen:
    """What is seen once anything is; the caller has a deadline."""
    while True:
        if seen := look():
            return seen
        await asyncio.sleep(_POLL)


def _below(state: Path, path: Path) -> str:
    return str(path.resolve().relative_to(state.resolve()))


def _result(file: Path, wanted: str) -> Result | None:
    try:
        result = Result.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None
    return result if result.id == wanted else None


# Root's side


def take(state: Path) -> Task | None:
    """The request, taken away; None when there is none. EngineError when it is not one, with nobody to tell."""
    owner = state.stat().st_uid
    with _open(state, owner) as place:
        if place is None:
            _refuse_directory(state)
            return None
        try:
            descriptor = os.open(_REQUEST, _READ, dir_fd=place)
        except FileNotFoundError:
            return None
        except OSError as error:
            _clear(place, _REQUEST)
            raise _refused(f"{_REQUEST}: {error.strerror}") from None
        try:
            _clear(place, _REQUEST)
            request = Request.model_validate_json(_content(descriptor, owner, _LIMIT))
        except ValidationError as error:
            raise _refused("; ".join(each["msg"] for each in error.errors()[:3])) from None
        finally:
            os.close(descriptor)
    try:
        bundles = {
            domain: bundle(
                _file(state / files.chain, owner, FILE_LIMIT),
                _file(state / files.key, owner, FILE_LIMIT),
                domain,
            )
            for domain, files in request.pairs.items()
        }
    except InstallError as error:
        answer(state, request.id, error)
        raise EngineError(error.message, error.remedy) from None
    except EngineError as error:
        answer(state, request.id, error)
        raise
    ke, ntp = (
        tuple(parse_endpoint(text, "address") for text in texts) for texts in (request.ke, request.ntp)
    )
    return Task(request.id, request.kind, bundles, ke, ntp)


def answer(state: Path, request: str, fault: EngineError | InstallError | None) -> None:
    """Tell the agent how it went, in a directory of its own that it may have filled with anything."""
    result = Result(
        id=request,
        problem=None if fault is None else fault.message,
        remedy="" if fault is None else fault.remedy,
    )
    owner = state.stat()
    aside = f".{_RESULT}.new"
    with _open(state, owner.st_uid) as place:
        if place is None:
            return
        _clear(place, aside)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(aside, flags, 0o600, dir_fd=place), "wb") as file:
            os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
            file.write(result.model_dump_json().encode())
            file.flush()
            os.fsync(file.fileno())
        _clear(place, _RESULT)
        os.rename(aside, _RESULT, src_dir_fd=place, dst_dir_fd=place)


def settings_for_root(state: Path) -> EngineSettings:
    """The settings, if nobody else can have written them: they name a command that root runs."""
    file = state / CONFIG_FILE
    if state.stat().st_uid == os.geteuid():
        return load_settings(state, {}).engine
    try:
        descriptor = os.open(file, _READ)
    except FileNotFoundError:
        return load_settings(None, {}).engine
    except OSError as error:
        raise EngineError(f"{file}: {error.strerror}", f"make {file} a file that root owns") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise EngineError(
                f"{file} can be written by others than root, and says what root is to run",
                f"chown root {file} && chmod 644 {file}",
            )
        # This very file, whatever its name leads to by now.
        return load_settings(state, {}, file=Path(f"/proc/self/fd/{descriptor}")).engine
    finally:
        os.close(descriptor)


@contextmanager
def _open(state: Path, owner: int) -> Iterator[int | None]:
    """The directory of requests; None when there is none that belongs to the agent."""
    try:
        place = os.open(state / _DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        yield place if os.fstat(place).st_uid == owner else None
    finally:
        os.close(place)


def _clear(place: int, name: str) -> None:
    """Nothing has this name there any more, whatever it was: systemd starts root's part for as long as there is a request.

    No link is followed. A directory, which may hold anything, gets another name.
    """
    try:
        os.unlink(name, dir_fd=place)
    except FileNotFoundError:
        pass
    except IsADirectoryError:
        _rename_aside(place, name)
    except OSError as error:
        raise EngineError(
            f"the agent's {name} cannot be taken away: {error.strerror}",
            "make its directory one that can be written to, or stop pool-agent-engine.path",
        ) from None


def _rename_aside(place: int, name: str) -> None:
    os.rename(name, f".refused-{secrets.token_hex(8)}", src_dir_fd=place, dst_dir_fd=place)


def _refuse_directory(state: Path) -> None:
    """EngineError when what stands in the place of the directory of requests is none of the agent's; it gets another name."""
    place = os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _rename_aside(place, _DIRECTORY)
    except FileNotFoundError:
        return
    finally:
        os.close(place)
    raise _refused(f"{state / _DIRECTORY} is no directory of the agent's user")


def _file(path: Path, owner: int, limit: int) -> bytes:
    try:
        descriptor = os.open(path, _READ)
    except OSError as error:
        raise _refused(f"{path}: {error.strerror}") from None
    try:
        return _content(descriptor, owner, limit)
    finally:
        os.close(descriptor)


def _content(descriptor: int, owner: int, limit: int) -> bytes:
    """What a file of the agent's own holds. EngineError for anybody else's, and for what is no file."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != owner:
        raise _refused("it names what is not a file of the agent's user")
    octets = b""
    while len(octets) <= limit and (more := os.read(descriptor, limit + 1 - len(octets))):
        octets += more
    if len(octets) > limit:
        raise _refused("it is too large")
    return octets


def _refused(why: str) -> EngineError:
    return EngineError(f"the agent's request is refused: {why}", "if the agent is yours, update it")
