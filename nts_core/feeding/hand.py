"""What tells one daemon of a pool's members (I/O).

    DIR/FILE                       what the daemon reads; replaced as a whole
    DIR/.truechimer-POOL.told      a digest of what it was last told of, written when its command had ended well; its
                                   time is when that was

So a change that the daemon was not told of is known as one, also by a later process, and is told at once. Other changes
wait for the daemon's spacing, unless they are urgent.
"""

import asyncio
import hashlib
import os
import stat
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nts_core.children import quoted, run
from nts_core.client import ClientError, Failure
from nts_core.feeding import Member, TimeDaemon, Verdict, chrony, ntpd_rs, ntpsec
from nts_core.shell import write_aside

DAEMONS = {each.kind: each for each in (chrony.DAEMON, ntpd_rs.DAEMON, ntpsec.DAEMON)}
TELL_DEADLINE = 60.0
_MAX_FILE = 1024 * 1024
_PUBLIC = 0o644
_SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of a wish. `members` are whom the daemon's file names now; `due_in` is in seconds when the wish has to
    wait, None when it is fulfilled.
    """

    members: tuple[Member, ...]
    is_told: bool = False
    due_in: float | None = None


class Hand:
    """One daemon's for one pool. Raises ClientError with a remedy, and can be tried again then."""

    def __init__(
        self,
        daemon: TimeDaemon,
        pool: str,
        *,
        directory: Path | None = None,
        options: Sequence[str] = (),
        tell: Sequence[str] = (),
    ) -> None:
        """`options` are added to each source as they are; `tell` is in place of the daemon's own command."""
        self.daemon = daemon
        self.directory = directory or daemon.directory
        self.path = self.directory / daemon.file(pool)
        self._told = self.directory / f".truechimer-{pool}.told"
        self._options = tuple(options)
        self._tell = tuple(tell) or daemon.tell
        self._begin = f"# {pool}: written by pool-client feed, which overwrites what is changed here."
        self._end = f"# {pool}: the end of that."

    async def members(self) -> tuple[Member, ...]:
        """Whom the daemon's file names as members of this pool."""
        return await asyncio.to_thread(lambda: self._members(self._read()))

    async def apply(self, members: Sequence[Member], *, is_urgent: bool = False) -> Applied:
        """Have the daemon use these servers of the pool and no others of it."""
        before, after, due_in = await asyncio.to_thread(self._prepare, members, is_urgent=is_urgent)
        if due_in is not None:
            return Applied(self._members(before), due_in=due_in or None)
        status, said = await run(self._tell, TELL_DEADLINE, path=os.environ.get("PATH", _SYSTEM_PATH))
        if status != 0:
            ended = "does not end" if status is None else f"ends with {status}"
            raise ClientError(
                Failure.DAEMON,
                f"{self.daemon.program} was not told: `{' '.join(self._tell)}` {ended}{quoted(said)}",
                "see its log; give the command that makes it read its files with --reload",
            )
        await asyncio.to_thread(self._note, after)
        return Applied(self._members(after), is_told=True)

    async def verdicts(self, members: Sequence[Member]) -> dict[str, Verdict | None]:
        """What the daemon says of each; None of one that it does not know. Raises Unanswered."""
        found = await self.daemon.ask(self.directory)
        return {member.name: found.get(member.name, self.daemon.missing) for member in members}

    def _prepare(self, members: Sequence[Member], *, is_urgent: bool) -> tuple[str, str, float | None]:
        """The file's text before and now, and the seconds to wait: 0 if there is nothing to tell, None to tell now."""
        before = self._read()
        if not members and not self._ours(before):
            return before, before, 0.0
        after = self._with(before, members)
        told, age = self._last()
        was_told = told == _digest(self._ours(before))
        if was_told and after == before:
            return before, after, 0.0
        if was_told and not is_urgent and age < self.daemon.spacing:
            return before, after, max(self.daemon.spacing - age, 1.0)
        if after != before:
            self._write(after)
        return before, after, None

    def _members(self, text: str) -> tuple[Member, ...]:
        return self.daemon.members(self._ours(text))

    # Text

    def _ours(self, text: str) -> str:
        """Our part; empty if there is none."""
        _, begin, rest = text.partition(self._begin)
        return begin + rest.partition(self._end)[0] if begin else ""

    def _theirs(self, text: str) -> tuple[str, str]:
        """What comes before our part and after it."""
        before, begin, rest = text.partition(self._begin)
        if not begin:
            return before if not before or before.endswith("\n") else before + "\n", ""
        _, end, after = rest.partition(self._end)
        if not end:
            raise self._unusable("the last line of our part is missing", f"put `{self._end}` back there")
        return before, after.removeprefix("\n")

    def _with(self, text: str, members: Sequence[Member]) -> str:
        before, after = self._theirs(text)
        if not self.daemon.is_shared and (before or after):
            raise self._unusable(
                "there is something else in it than pool-client wrote", "move it away, or give another --dir"
            )
        lines = [line for member in sorted(members) for line in self.daemon.lines(member, self._options)]
        whole = before + "\n".join([self._begin, *lines, self._end, ""]) + after
        if self.daemon.is_shared:
            if not members:
                return before + after
            self._check(before + after, whole)
        return whole

    def _check(self, theirs: str, whole: str) -> None:
        """Our part must not change what the user's own says."""
        try:
            user, ours, both = map(tomllib.loads, (theirs, self._ours(whole), whole))
        except ValueError as error:
            raise self._unusable(
                f"it cannot be extended: {error}", "write each source there as a [[source]] of its own"
            ) from None
        wanted = [*user.get("source", []), *ours.get("source", [])]
        is_same = {**both, "source": 0} == {**user, "source": 0}
        if not is_same or sorted(map(repr, both.get("source", []))) != sorted(map(repr, wanted)):
            raise self._unusable(
                "lines after our part would belong to it",
                "move them before it, or begin them with their table",
            )

    # Files

    def _read(self) -> str:
        try:
            with self.path.open("rb") as file:
                octets = file.read(_MAX_FILE + 1)
            if len(octets) > _MAX_FILE:
                raise self._unusable("it is too long", "give another --dir")
            return octets.decode()
        except FileNotFoundError:
            if self.daemon.is_shared or not self.directory.is_dir():
                raise self._unusable(
                    "there is no such file" if self.daemon.is_shared else "there is no such directory",
                    f"install {self.daemon.program}, or give its directory with --dir",
                ) from None
            return ""
        except OSError as error:
            raise self._unusable(
                error.strerror or str(error),
                "run as a user that may read and write there, or give another --dir",
            ) from None
        except UnicodeDecodeError:
            raise self._unusable("it is not text", "move it away, or give another --dir") from None

    def _write(self, text: str) -> None:
        # A link would be replaced, and not what it leads to.
        path = self.path.resolve()
        try:
            if self.daemon.is_shared:
                found = path.stat()
                mode = stat.S_IMODE(found.st_mode)
                user = found.st_uid if found.st_uid != os.geteuid() else -1
                group = found.st_gid if found.st_gid != os.getegid() else -1
            else:
                # The daemon has another user than we, perhaps.
                mode, user, group = _PUBLIC, -1, -1
            write_aside(path, text.encode(), mode=mode, user=user, group=group).replace(path)
        except OSError as error:
            raise self._unusable(
                error.strerror or str(error),
                "check the rights and the space of its directory, or give another --dir",
            ) from None

    def _last(self) -> tuple[str, float]:
        """What the daemon was told of last, as a digest, and how many seconds ago; empty if that is not known."""
        try:
            with self._told.open("rb") as file:
                age = time.time() - os.fstat(file.fileno()).st_mtime
                told = file.read(100).decode("ascii", "replace").strip()
        except OSError:
            return "", float("inf")
        # Of a clock that was set back it is not known.
        return told, age if age >= 0 else float("inf")

    def _note(self, text: str) -> None:
        try:
            write_aside(self._told, f"{_digest(self._ours(text))}\n".encode()).replace(self._told)
        except OSError as error:
            raise self._unusable(
                error.strerror or str(error), "check the rights and the space of its directory"
            ) from None

    def _unusable(self, message: str, remedy: str) -> ClientError:
        return ClientError(Failure.CONFIGURATION, f"{self.path}: {message}", remedy)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
