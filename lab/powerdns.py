"""PowerDNS on loopback: a primary with SQLite, with the configuration that `poolsvc init` writes."""

import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

from lab.nameservers import Primary
from lab.processes import LabError, require

SCHEMA = Path("/usr/share/pdns-backend-sqlite3/schema/schema.sqlite3.sql")
CONFIGURATION = """\
local-address={address}
local-port={port}
socket-dir={directory}
receiver-threads=1
disable-syslog=yes
security-poll-suffix=
"""


class PowerDns(Primary):
    """pdns_server in the foreground; only a start without a database makes the zone."""

    argv = ("pdns_server", "--config-dir=.", "--daemon=no", "--guardian=no")

    def prepare(self) -> None:
        directory = str(self.directory.resolve())
        for name, text in self.shipped().items():
            own = text.replace("/etc/powerdns", directory).replace("/var/lib/powerdns", directory)
            (self.directory / name).write_text(own)
        server = CONFIGURATION.format(address=self.address, port=self.port, directory=directory)
        (self.directory / "pdns.conf").write_text(server + (self.directory / "pdns-pool.conf").read_text())
        (self.directory / "pool.zone").write_text(self._seed())
        if not self._database.exists():
            self._begin()

    @property
    def _database(self) -> Path:
        return self.directory / "pdns.sqlite3"

    @property
    def _saved_key(self) -> Path:
        return self.directory / "zone.key"

    def _begin(self) -> None:
        with closing(sqlite3.connect(self._database)) as database:
            database.executescript(SCHEMA.read_text())
        self._run("sh", "pdns-pool.sh", "--config-dir=.")
        if self._saved_key.exists():
            self._pdnsutil("remove-zone-key", self.zone, "1")
            self._pdnsutil("import-zone-key", self.zone, self._saved_key.name)

    def _lose(self) -> None:
        self._saved_key.write_text(self._pdnsutil("export-zone-key", self.zone, "1"))
        for path in self.directory.glob(f"{self._database.name}*"):
            path.unlink()

    def _pdnsutil(self, *arguments: str) -> str:
        return self._run("pdnsutil", "--config-dir=.", *arguments)

    def _run(self, program: str, *arguments: str) -> str:
        done = subprocess.run(
            [require(program), *arguments],
            cwd=self.directory,
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
        if done.returncode:
            raise LabError(f"{program} {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout
