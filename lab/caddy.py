"""Caddy's ACME server on loopback: a second CA, made by others, which says other things when something fails."""

import json
import ssl
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from lab.pebble import write_front
from lab.peers import with_hosts
from lab.processes import Process, free_port, require


class Caddy:
    """Debian 12's 2.6.2. It keeps a challenge that failed pending, with an error, and refuses to end authorizations.

    It looks names up by /etc/hosts, in which `name` leads to 127.0.0.1, and asks on port 80, as it cannot be told
    another one.
    """

    def __init__(self, directory: Path, *, name: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.directory_url = f"https://localhost:{port}/acme/local/directory"
        self.ca_file = directory / "ca.pem"
        write_front(directory)
        self._tls = ssl.create_default_context(cafile=str(self.ca_file))
        server = {
            "listen": [f"127.0.0.1:{port}"],
            "automatic_https": {"disable": True},
            "tls_connection_policies": [{}],
            "routes": [{"handle": [{"handler": "acme_server", "ca": "local", "host": f"localhost:{port}"}]}],
        }
        pair = {"certificate": str(directory / "front.pem"), "key": str(directory / "front.key")}
        settings = {
            "admin": {"disabled": True, "config": {"persist": False}},
            "storage": {"module": "file_system", "root": str(directory / "store")},
            "apps": {
                "http": {"servers": {"ca": server}},
                "tls": {"certificates": {"load_files": [pair]}},
                "pki": {"certificate_authorities": {"local": {"install_trust": False}}},
            },
        }
        config = directory / "caddy.json"
        config.write_text(json.dumps(settings))
        argv = with_hosts(directory, [require("caddy"), "run", "--config", str(config)], {name: "127.0.0.1"})
        self.process = Process("caddy", argv, directory)

    def _answers(self) -> bool:
        try:
            httpx.get(self.directory_url, verify=self._tls, timeout=5, trust_env=False).raise_for_status()
        except httpx.TransportError:
            return False
        return True

    def __enter__(self) -> Self:
        self.process.start(self._answers)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.stop()
