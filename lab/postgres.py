"""A throw-away PostgreSQL cluster behind a Unix socket, for one run of the demo or the tests."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg
from sqlalchemy import URL, make_url

from lab.processes import LabError, Process

# Debian keeps the server's programs out of PATH, one directory for each version.
_DEBIAN_PROGRAMS = Path("/usr/lib/postgresql")
_USER = "postgres"
_INITDB_DEADLINE = 60.0
# Nothing here has to outlive a crash.
_SETTINGS = (
    "listen_addresses=",
    "fsync=off",
    "synchronous_commit=off",
    "full_page_writes=off",
    "wal_level=minimal",
    "max_wal_senders=0",
    "max_connections=200",
    "shared_buffers=32MB",
    "autovacuum=off",
)


class Postgres:
    """`postgres` in the foreground; its log is in `directory`, its data in a place that `stop` removes.

    The cluster refuses to run as root, and an unprivileged user has no way into a directory of root's: for
    root it runs as the package's own user, with its data directly under the system's temporary directory.
    Whoever can open the socket there (root and that user) is trusted.
    """

    def __init__(self, directory: Path, *, durable: bool = False) -> None:
        """`durable`: what was committed survives the server's sudden end, as in production."""
        self._settings = (*_SETTINGS, *(("synchronous_commit=on", "full_page_writes=on") if durable else ()))
        self._programs = _programs()
        self._directory = directory
        self._place: tempfile.TemporaryDirectory[str] | None = None
        self._process: Process | None = None
        self._made = 0

    def start(self) -> Self:
        """Make a new cluster, start it and wait until it answers."""
        # The path of the socket may have 107 octets at most, so it gets a short place.
        self._place = tempfile.TemporaryDirectory(prefix="pg-")
        place = Path(self._place.name)
        try:
            if os.geteuid() == 0:
                owner = pwd.getpwnam(_USER)
                os.chown(place, owner.pw_uid, owner.pw_gid)
            self._initialise(place)
            settings = [option for text in self._settings for option in ("-c", text)]
            argv = self._as_user("postgres", "-D", str(place / "data"), "-k", str(place), *settings)
            self._process = Process("postgres", argv, self._directory)
            self._process.start(self._answers)
        except (LabError, KeyError, OSError):
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End it without waiting for clients, and remove the data."""
        if self._process is not None:
            if self._process.running():
                self._process.signal(signal.SIGQUIT)
            self._process.stop()
            self._process = None
        if self._place is not None:
            self._place.cleanup()
            self._place = None

    def halt(self, number: int = signal.SIGQUIT) -> None:
        """End the server, at once or with another signal in order; the data stay."""
        assert self._process is not None, "the cluster was not started"
        self._process.signal(number)
        self._process.wait()

    def resume(self) -> None:
        """Start the server that was halted, and wait until it answers."""
        assert self._process is not None, "the cluster was not started"
        self._process.start(self._answers)

    def create_database(self, *, template: str | None = None) -> str:
        """The URL of a new database, empty or a copy of the one at `template`, which nobody may have open."""
        self._made += 1
        name = f"registry{self._made}"
        source = "template1" if template is None else make_url(template).database
        self._execute(f'CREATE DATABASE "{name}" TEMPLATE "{source}" STRATEGY FILE_COPY')
        return self._url(name).render_as_string(hide_password=False)

    def drop_database(self, url: str) -> None:
        """Drop a database, whoever still has it open."""
        self._execute(f'DROP DATABASE "{make_url(url).database}" WITH (FORCE)')

    def _url(self, database: str) -> URL:
        assert self._place is not None, "the cluster was not started"
        return URL.create(
            "postgresql+psycopg", username=_USER, database=database, query={"host": self._place.name}
        )

    def _execute(self, statement: str) -> None:
        with self._connect() as connection:
            connection.execute(statement.encode())

    def _connect(self) -> psycopg.Connection:
        assert self._place is not None, "the cluster was not started"
        return psycopg.connect(
            host=self._place.name, user=_USER, dbname="postgres", autocommit=True, connect_timeout=5
        )

    def _answers(self) -> bool:
        try:
            self._connect().close()
        except psycopg.OperationalError:
            return False
        return True

    def _initialise(self, place: Path) -> None:
        options = ["--no-sync", "--no-locale", "--no-instructions", "--encoding=UTF8", "--auth=trust"]
        argv = self._as_user("initdb", f"--username={_USER}", *options, "-D", str(place / "data"))
        done = subprocess.run(
            argv, cwd=place, capture_output=True, text=True, timeout=_INITDB_DEADLINE, check=False
        )
        if done.returncode:
            raise LabError(f"initdb: {done.stderr or done.stdout}")

    def _as_user(self, program: str, *arguments: str) -> list[str]:
        command = [str(self._programs / program), *arguments]
        if os.geteuid() != 0:
            return command
        # setpriv becomes the program, so that signals and the exit status are the program's own.
        return ["setpriv", f"--reuid={_USER}", f"--regid={_USER}", "--init-groups", "--", *command]

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _programs() -> Path:
    """The directory of the newest installed server's programs; LabError when there is none."""
    versions = [path for path in _DEBIAN_PROGRAMS.glob("*/bin") if (path / "initdb").exists()]
    if versions:
        return max(versions, key=lambda path: int(path.parent.name))
    elsewhere = shutil.which("initdb")
    if elsewhere is None:
        raise LabError("PostgreSQL is not installed; run `make setup`")
    return Path(elsewhere).resolve().parent
