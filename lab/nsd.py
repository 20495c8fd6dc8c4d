"""NSD on loopback, as a secondary with the configuration that `poolsvc init` writes."""

import dns.rdatatype
import dns.zone

from lab.nameservers import Secondary

CONFIGURATION = """\
server:
    ip-address: {address}@{port}
    username: ""
    chroot: ""
    zonesdir: "{directory}"
    zonelistfile: "{directory}/zone.list"
    xfrdfile: "{directory}/xfrd.state"
    xfrdir: "{directory}"
    pidfile: ""
    database: ""
    zonefiles-write: 1
    server-count: 1
    verbosity: 1
remote-control:
    control-enable: no
"""


class Nsd(Secondary):
    """nsd in the foreground."""

    argv = ("nsd", "-d", "-c", "nsd.conf")

    def saved(self) -> bool:
        """Whether it has written to its disk what it serves; what it does not have there is gone when it is killed."""
        try:
            file = dns.zone.from_file(str(self.directory / f"{self.zone}.zone"), self.zone, relativize=False)
        except OSError:
            return False
        return bool(file.get_soa().serial == self.serial())

    def prepare(self) -> None:
        own = CONFIGURATION.format(directory=self.directory.resolve(), address=self.address, port=self.port)
        (self.directory / "nsd.conf").write_text(own + self.primary.shipped()["nsd-secondary.conf"])
