"""Disks that are full, or that nobody can write to."""

import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Self

_PAGE = 4096


class SmallDisk:
    """A filesystem of some pages in a mount namespace of its own, reached from outside through /proc."""

    def __init__(self, place: Path) -> None:
        place.mkdir()
        own_user = () if os.geteuid() == 0 else ("--user", "--map-root-user")
        mount = f"mount -t tmpfs -o size=128k tmpfs {place} && echo ready && read -r _"
        script = f"{mount} && mount -o remount,bind,ro {place} && echo ready && read -r _"
        self._holder = subprocess.Popen(
            ["unshare", *own_user, "--mount", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._hear()
        self.path = Path(f"/proc/{self._holder.pid}/root{place}")

    def _hear(self) -> None:
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"ready\n"

    def leave(self, pages: int) -> None:
        """Fill it but for so many pages."""
        with (self.path / "filling").open("wb") as file, suppress(OSError):
            file.write(bytes(pages * _PAGE))
            file.flush()
            rest = os.statvfs(self.path).f_bavail
            file.truncate(0)
            file.write(bytes(rest * _PAGE))
            file.flush()

    def empty(self) -> None:
        """Nothing but what others have put there."""
        (self.path / "filling").unlink(missing_ok=True)

    def make_readonly(self) -> None:
        assert self._holder.stdin is not None
        self._holder.stdin.write(b"\n")
        self._holder.stdin.flush()
        self._hear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.close()
        self._holder.wait(10)
        self._holder.stdout.close()
