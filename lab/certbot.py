"""Debian's certbot with directories of its own, as a member without our agent runs it."""

import os
import subprocess
from pathlib import Path

from lab.ca_front import CaFront
from lab.certificates import Pair
from lab.pebble import Pebble
from lab.processes import LabError

_DEADLINE = 90.0


class Certbot:
    """One account at a CA, and the certificates of one host.

    It answers HTTP-01 itself on `address`:`http_port`, only while it orders.
    """

    def __init__(self, directory: Path, ca: Pebble | CaFront, *, address: str, http_port: int) -> None:
        self._directory = directory
        self._options = ["--non-interactive", "--server", ca.directory_url]
        for kind in ("config", "work", "logs"):
            (directory / kind).mkdir(parents=True, exist_ok=True)
            self._options += [f"--{kind}-dir", str(directory / kind)]
        self._standalone = ["--standalone", "--http-01-address", address, "--http-01-port", str(http_port)]
        self._env = {**os.environ, "REQUESTS_CA_BUNDLE": str(ca.ca_file)}

    def register(self) -> str:
        """A new account; the URI by which the CA knows it."""
        self._run("register", "--agree-tos", "--register-unsafely-without-email")
        shown = self._run("show_account")
        found = next((line for line in shown.splitlines() if "Account URL:" in line), None)
        if found is None:
            raise LabError(f"certbot shows no account URL: {shown}")
        return found.partition("Account URL:")[2].strip()

    def order(self, domain: str) -> Pair:
        """A certificate for a name that leads here; ordered anew each time."""
        self._run("certonly", *self._standalone, "--force-renewal", "--key-type", "ecdsa", "-d", domain)
        live = self._directory / "config" / "live" / domain
        return Pair(cert=live / "fullchain.pem", key=live / "privkey.pem")

    def _run(self, command: str, *arguments: str) -> str:
        argv = ["certbot", command, *self._options, *arguments]
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=_DEADLINE, check=False, env=self._env
        )
        if done.returncode:
            raise LabError(f"certbot {command}: {done.stdout}{done.stderr}")
        return done.stdout
