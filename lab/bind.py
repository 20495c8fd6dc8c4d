"""BIND on loopback, as a primary and as a secondary, with the configuration that `poolsvc init` writes."""

from abc import abstractmethod

from lab.nameservers import NameServer, Primary, Secondary

# BIND listens only on addresses that an interface has, which of 127.0.0.0/8 is this one.
OPTIONS = """\
    listen-on port {port} {{ {address}; }};
    listen-on-v6 {{ none; }};
    pid-file none;
    session-keyfile none;
    managed-keys-directory "{directory}";
"""
LISTEN = "    listen-on-v6 { any; };\n"


class _Named(NameServer):
    """named without a control channel."""

    argv = ("named", "-g", "-n", "1", "-c", "named.conf")

    @abstractmethod
    def _configuration(self) -> str:
        """What follows the options."""

    def _shipped(self, primary: Primary, name: str) -> str:
        """A file of `poolsvc init`, for this directory and port."""
        text = primary.shipped()[name]
        for directory in ("/etc/bind", "/var/lib/bind", "/var/cache/bind"):
            text = text.replace(directory, str(self.directory.resolve()))
        return text

    def _options(self, primary: Primary) -> str:
        text = self._shipped(primary, "bind-options.conf")
        own = OPTIONS.format(directory=self.directory.resolve(), address=self.address, port=self.port)
        assert LISTEN in text
        return text.replace(LISTEN, own) + "controls { };\n"

    def prepare(self) -> None:
        (self.directory / "named.conf").write_text(self._configuration())


class Bind(_Named, Primary):
    """named as a primary; only a start without a zone file reads the seed."""

    def _configuration(self) -> str:
        zone = self.directory / f"{self.zone}.zone"
        if not zone.exists():
            zone.write_text(self._seed())
        (self.directory / "bind-tsig.conf").write_text(self._shipped(self, "bind-tsig.conf"))
        return self._options(self) + self._shipped(self, "bind-pool.conf")

    def _lose(self) -> None:
        for path in self.directory.glob(f"{self.zone}.zone*"):
            path.unlink()


class BindSecondary(_Named, Secondary):
    """named as a secondary that passes on the primary's signatures."""

    def _configuration(self) -> str:
        return self._options(self.primary) + self._shipped(self.primary, "bind-secondary.conf")
