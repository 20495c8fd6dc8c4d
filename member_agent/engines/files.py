"""Files of ours in a daemon's directories, changed as one: what was there comes back until the new was seen working.

    OWN/served.json     what was last seen working, and which files it needs
    OWN/change.json     a change is under way: which of the files were there before
    .NAME.new           beside each file: what it becomes, complete and on the disk
    .NAME.old           beside each file: what it was, by a second link

A change writes everything aside first, so a full disk stops it before anything has changed; after that it only renames,
and so does the way back. `change.json` is there from before the first file until the daemon was seen working: whoever
finds it goes back first, whatever ended the one before. The functions block.
"""

import fcntl
import os
import pwd
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from member_agent.engines import EngineError
from member_agent.sockets import Endpoint
from nts_core.shell import replace_file, sync, write_aside

LOCK_DEADLINE = 30.0  # seconds
_PUBLIC_MODE, _PRIVATE_MODE, _DIRECTORY_MODE, _OWN_MODE = 0o644, 0o640, 0o755, 0o750


@dataclass(frozen=True, slots=True)
class Content:
    """What a file of ours is to hold. What is private, nobody but the daemon's group may read."""

    octets: bytes = field(repr=False)
    is_private: bool

    @property
    def mode(self) -> int:
        return _PRIVATE_MODE if self.is_private else _PUBLIC_MODE


@dataclass(frozen=True, slots=True)
class Served:
    """What a daemon was seen serving: certificates by domain, where, and from which files of ours."""

    fingerprints: dict[str, str]
    ke: tuple[Endpoint, ...]
    ntp: tuple[Endpoint, ...]
    files: tuple[Path, ...]  # in the order in which they appear
    pairs: frozenset[Path]
    state: Path | None
    made: frozenset[Path]  # directories that were not there before


@dataclass(frozen=True, slots=True)
class _Change:
    """The files that a change touches, and whether they were there before; once it is to stay, what is `served`."""

    files: dict[Path, bool]
    made: frozenset[Path]
    state: Path | None
    served: Served | None = None


_Document = TypeVar("_Document")
_served = TypeAdapter(Served)
_change = TypeAdapter(_Change)


class OwnFiles:
    """The files of one daemon. Everything below is done under `lock`."""

    def __init__(self, own: Path, user: str) -> None:
        """`own` is a directory for ours alone; its group, and that of private files, is that of the daemon's `user`."""
        self._own = own
        self._user = user
        self._served, self._change = own / "served.json", own / "change.json"

    def lock(self) -> ExitStack:
        """Keeps every other process out until it is closed. EngineError when one does not come to an end."""
        held = ExitStack()
        descriptor = os.open(self._own.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        held.callback(os.close, descriptor)
        end = time.monotonic() + LOCK_DEADLINE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    held.close()
                    raise EngineError(
                        f"another pool-agent is changing {self._own.parent}", "wait for it, or end it"
                    ) from None
                time.sleep(0.05)
            else:
                return held

    @property
    def is_there(self) -> bool:
        """Whether there is anything of ours."""
        return self._own.exists()

    def served(self) -> Served | None:
        """What was last seen working."""
        change = _read(self._change, _change)
        return change.served if change and change.served else _read(self._served, _served)

    def mend(self) -> bool:
        """Go back from a change of which nobody said how it ended; whether there was one.

        The daemon may have seen it, so it has to be told anew, whatever comes next.
        """
        change = _read(self._change, _change)
        if change is None:
            return False
        if change.served:
            with suppress(OSError):
                self._finish(change, change.served)
            return False
        self.undo()
        return True

    def is_as_wanted(self, wanted: Mapping[Path, Content], served: Served | None) -> bool:
        """Whether there is nothing to write and nothing to take away."""
        return not any(self._differences(wanted, served))

    def _differences(
        self, wanted: Mapping[Path, Content], served: Served | None
    ) -> tuple[list[Path], list[Path]]:
        """What has to be written, and what has to go, each in the order in which files appear."""
        before = served.files if served else ()
        return (
            [path for path, content in wanted.items() if not self._is(path, content)],
            [path for path in before if path not in wanted and path.exists()],
        )

    def begin(self, wanted: Mapping[Path, Content], state: Path | None, served: Served | None) -> set[Path]:
        """Put everything in its place; what differs now. After an error nothing has changed."""
        changed, gone = self._differences(wanted, served)
        directories = [path for path in dict.fromkeys(path.parent for path in wanted) if not path.exists()]
        unfinished = _read(self._change, _change)
        made = frozenset(directories) | (unfinished.made if unfinished else frozenset())
        change = _Change({path: path.exists() for path in (*changed, *gone)}, made - {self._own}, state)
        if unfinished and unfinished.served:
            # There was no space to end the last change; there has to be some now.
            self._finish(unfinished, unfinished.served)
            unfinished = None
        try:
            _make(self._own, _OWN_MODE)
            os.chown(self._own, -1, self._account().pw_gid)
            replace_file(self._change, _change.dump_json(change))
            for directory in change.made:
                _make(directory, _DIRECTORY_MODE)
            if state is not None:
                self._make_state(state)
            self._put_aside(wanted, changed, gone)
            for path in changed:
                _new(path).replace(path)
            for path in gone:
                path.unlink()
            _sync_parents((*changed, *gone))
        except (OSError, EngineError):
            if self._change.exists():
                self.undo()
            if unfinished is None:
                self.abandon()
            raise
        return {*changed, *gone}

    def _put_aside(self, wanted: Mapping[Path, Content], changed: list[Path], gone: list[Path]) -> None:
        group = self._account().pw_gid
        for path in changed:
            write_aside(path, wanted[path].octets, mode=wanted[path].mode, group=group)
        for path in (*changed, *gone):
            _old(path).unlink(missing_ok=True)
            if path.exists():
                os.link(path, _old(path))
        _sync_parents((*changed, *gone))

    def undo(self) -> None:
        """What was there before the change is there again; the change is not over until `abandon`."""
        change = self._under_way()
        for path, was_there in reversed(change.files.items()):
            if not was_there:
                path.unlink(missing_ok=True)
            # A rename to another link of the same file would do nothing.
            elif _old(path).exists() and not (path.exists() and path.samefile(_old(path))):
                _old(path).replace(path)
            _forget_asides(path)
        _sync_parents(change.files)

    def abandon(self) -> None:
        """The change is over, and what was there before is in use again."""
        change, served = _read(self._change, _change), self.served()
        if served is None:
            self.clear()
        elif change is not None:
            _remove_state(change.state, unless=served.state)
            self._change.unlink()

    def commit(self, served: Served) -> None:
        """The change is over, and what it brought is in use."""
        change, earlier = self._under_way(), self.served()
        made = change.made | (earlier.made if earlier else frozenset())
        served = replace(served, made=made)
        replace_file(self._change, _change.dump_json(replace(change, served=served)))
        # It stays whatever comes now; without space the rest is done before the next change.
        with suppress(OSError):
            _remove_state(earlier.state if earlier else None, unless=served.state)
            self._finish(change, served)

    def _finish(self, change: _Change, served: Served) -> None:
        replace_file(self._served, _served.dump_json(served))
        for path in change.files:
            _forget_asides(path)
        self._change.unlink()

    def withdraw(self, *, pairs: bool) -> None:
        """Take away what the daemon was told or, once it has forgotten that, the pairs that it was told of."""
        served = self.served()
        change = _read(self._change, _change)
        known = served.pairs if served else frozenset()
        for path in (*reversed(change.files if change else {}), *reversed(served.files if served else ())):
            if (path in known) == pairs:
                path.unlink(missing_ok=True)
                _forget_asides(path)

    def clear(self) -> None:
        """The end of withdrawing: the directories that we made, and the memory of it all."""
        known = [each for each in (_read(self._change, _change), self.served()) if each is not None]
        for each in known:
            _remove_state(each.state)
        for directory in frozenset().union(*(each.made for each in known)):
            if directory.exists() and not any(directory.iterdir()):
                directory.rmdir()
        if self._own.exists():
            # What is needed to begin here again goes last.
            for path in sorted(self._own.iterdir(), key=lambda path: path in (self._served, self._change)):
                path.unlink()
            self._own.rmdir()
            sync(self._own.parent)

    def _under_way(self) -> _Change:
        change = _read(self._change, _change)
        if change is None:
            raise EngineError(f"{self._change} is missing", "run it again; nothing else may write there")
        return change

    def _account(self) -> pwd.struct_passwd:
        try:
            return pwd.getpwnam(self._user)
        except KeyError:
            raise EngineError(
                f"this host has no user {self._user} for the daemon",
                "name the user that it runs as in the setting engine.user",
            ) from None

    def _make_state(self, state: Path) -> None:
        _make(state, 0o700)
        account = self._account()
        os.chown(state, account.pw_uid, account.pw_gid)

    def _is(self, path: Path, content: Content) -> bool:
        try:
            status = path.stat()
            rights = (status.st_mode & 0o777, status.st_gid)
            return rights == (content.mode, self._account().pw_gid) and path.read_bytes() == content.octets
        except OSError:
            return False


def _read(file: Path, adapter: TypeAdapter[_Document]) -> _Document | None:
    """A document of ours, None when there is none. EngineError when it is not legible."""
    try:
        return adapter.validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        raise EngineError(
            f"{file} is damaged", "take away by hand what docs/engines.md names, and apply again"
        ) from None


def _make(directory: Path, mode: int) -> None:
    """A directory of ours with these rights, whatever the umask takes away and whoever was killed here before."""
    directory.mkdir(exist_ok=True)
    directory.chmod(mode)


def _remove_state(state: Path | None, *, unless: Path | None = None) -> None:
    if state is not None and state != unless and state.exists():
        shutil.rmtree(state)


def _forget_asides(path: Path) -> None:
    for aside in (_new(path), _old(path)):
        aside.unlink(missing_ok=True)


def _sync_parents(paths: Iterable[Path]) -> None:
    for directory in {path.parent for path in paths}:
        if directory.exists():
            sync(directory)


def _new(path: Path) -> Path:
    """Where `write_aside` puts it."""
    return path.with_name(f".{path.name}.new")


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")
