"""Knot DNS on loopback, as a primary and as a secondary."""

import shutil
import subprocess
import tempfile
from abc import abstractmethod
from pathlib import Path

from lab.nameservers import NameServer, Primary, Secondary
from poolsvc import setup

SERVER = """\
server:
  listen: {address}@{port}
  rundir: {rundir}
  background-workers: 1
database:
  storage: db
  journal-db-max-size: 200M
"""


class _Knotd(NameServer):
    """knotd with a control socket in a place of its own."""

    argv = ("knotd", "-c", "knot.conf")
    _rundir: tempfile.TemporaryDirectory[str] | None = None

    @abstractmethod
    def _configuration(self) -> str:
        """What follows the server's own sections."""

    def prepare(self) -> None:
        # The path of knotd's control socket may have 107 octets at most, so it gets a short place, and a
        # fresh one: a pid file left behind would stop the next start.
        self._rundir = tempfile.TemporaryDirectory(prefix="knot-")
        (self.directory / "db").mkdir(exist_ok=True)
        server = SERVER.format(rundir=self._rundir.name, address=self.address, port=self.port)
        (self.directory / "knot.conf").write_text(server + self._configuration())

    def stop(self) -> None:
        super().stop()
        if self._rundir is not None:
            self._rundir.cleanup()
            self._rundir = None


class Knot(_Knotd, Primary):
    """knotd with the primary's configuration that `poolsvc init` writes; only a start without a journal reads the seed.

    There is no limit to its answers: here all who ask have one address.
    """

    def _configuration(self) -> str:
        (self.directory / "knot-tsig.conf").write_text(self.shipped()["knot-tsig.conf"])
        own = {
            "    rrsig-refresh:": f"    dnskey-ttl: {self._ttl}\n    rrsig-refresh:",
            f"    module: mod-rrl/{self.zone}-limit\n": "",
        }
        # With the journal in place, loading the zone file again would throw every update away.
        if not (self.directory / "db" / "journal").exists():
            (self.directory / "seed.zone").write_text(self._seed())
            own["zonefile-load: none"] = "zonefile-load: whole\n    storage: .\n    file: seed.zone"
        text = self.shipped()["knot-pool.conf"]
        for shipped, line in own.items():
            assert shipped in text, shipped
            text = text.replace(shipped, line)
        return text

    def sign_anew(self) -> None:
        """Make every signature of the zone anew."""
        command = ["knotc", "-c", "knot.conf", "-b", "zone-sign", self.zone]
        subprocess.run(command, cwd=self.directory, check=True, capture_output=True, timeout=30)

    def _lose(self) -> None:
        for name in ("journal", "timers"):
            shutil.rmtree(self.directory / "db" / name)


class KnotSecondary(_Knotd, Secondary):
    """knotd with the secondary's configuration that `poolsvc init` writes."""

    def _configuration(self) -> str:
        return self.primary.shipped()["knot-secondary.conf"]


class KnotEdge(_Knotd, Secondary):
    """knotd with the edge's configuration that `poolsvc init` writes: it signs by itself, with keys that it was given.

    There is no limit to its answers: here all who ask have one address. `settings` are those of `poolsvc dns edge`.
    """

    @property
    def settings(self) -> Path:
        return self.directory / "edge.toml"

    def _configuration(self) -> str:
        text = self._here("knot-edge.conf").replace(f"mod-rrl/{self.zone}-limit, ", "")
        return text.replace("    ttl: 60\n", f"    ttl: {self.primary.ttl}\n")

    def prepare(self) -> None:
        sets = self.directory / f"{self.zone}-sets.conf"
        sets.touch()
        super().prepare()
        (self.directory / "edge.secret").write_text(self.primary.edge_secret)
        own = {
            "/etc/knot/knot.conf": "knot.conf",
            'knotd = "127.0.0.1:53"': f'knotd = "{self.address}:{self.port}"\ninterval = 0.1',
        }
        text = self._here("edge.toml")
        for shipped, line in own.items():
            assert shipped in text, shipped
            text = text.replace(shipped, line)
        self.settings.write_text(text)

    def _here(self, name: str) -> str:
        """A file that `poolsvc init` writes, with the answer sets in this directory."""
        return self.primary.shipped()[name].replace(setup.KNOT_STORAGE, str(self.directory.resolve()))
