"""Our own programs, as the peers of the matrix meet them."""

import asyncio
import json
import secrets
import signal
import urllib.request
from datetime import UTC, datetime

import pytest

from lab.certificates import Authority
from lab.processes import free_port, wait_until
from lab.programs import AgentServer
from nts_core.aead import AeadId
from nts_core.association import Association
from nts_core.client import establish, exchange, load_roots
from nts_core.tls import Trust

NAME = "ntp.example"
RELAY = "127.77.99.1"
DAY = 86400


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "authority")


@pytest.fixture
def issue(authority):
    """Issues a certificate; each time another one into the same files."""
    return lambda: authority.issue(NAME, "localhost", "127.0.0.1", "::1", RELAY)


class OurServer:
    """`pool-agent serve` on ports that stay the same; each start has a log and metrics of its own."""

    def __init__(self, directory, pair, *arguments, address="127.0.0.1"):
        self.directory = directory
        self.pair = pair
        self.arguments = arguments
        self.address = address
        self.ke_port, self.ntp_port = free_port(address), free_port(address)
        self.starts = 0
        self.agent = None

    @property
    def _keys(self):
        return self.directory / "state" / "cookie-keys.json"

    def start(self):
        self.starts += 1
        self.metrics = free_port()
        host = f"[{self.address}]" if ":" in self.address else self.address
        self.agent = AgentServer(
            self.directory / f"start-{self.starts}",
            self.pair,
            "--local-stratum=2",
            f"--metrics=127.0.0.1:{self.metrics}",
            f"--state={self.directory / 'state'}",
            *self.arguments,
            ke=(f"{host}:{self.ke_port}",),
            ntp=(f"{host}:{self.ntp_port}",),
        ).start()
        return self

    def stop(self):
        self.agent.stop()

    def forget_keys(self):
        self._keys.unlink()

    def rotate_keys(self):
        """Its daily rotation, hurried: the server starts with the keys of yesterday."""
        self.stop()
        document = json.loads(self._keys.read_bytes())
        for key in document["keys"]:
            key["starts_at"] -= DAY + 60
        self._keys.write_text(json.dumps(document))
        self.start()

    def take_certificate(self):
        self.agent.process.signal(signal.SIGHUP)
        wait_until(
            lambda: "certificate_reloaded" in self.agent.process.output(), "our server has its certificate"
        )

    def count(self, counter, outcome):
        """A counter since the last start."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        name = f'pool_agent_{counter}_total{{outcome="{outcome}"}} '
        return next((float(line.removeprefix(name)) for line in lines if line.startswith(name)), 0.0)

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()


@pytest.fixture
def our_server(slow_packets):
    return OurServer


class OurClient:
    """Our client's library, with the server behind one address and two ports."""

    def __init__(self, root, aead, address, ke_port, ntp_port):
        self.trust = Trust.of(load_roots(root), datetime.now(UTC))
        self.aead = aead
        self.address = address
        self.ke_port, self.ntp_port = ke_port, ntp_port

    def establish(self):
        """Key establishment; what follows uses its keys and cookies."""
        established = asyncio.run(
            establish(NAME, self.address, self.ke_port, self.trust, offered=(AeadId(self.aead),))
        )
        assert established.result.keys.aead == self.aead
        self.association = Association(established.result, secrets.token_bytes)
        return established

    def exchange(self, timeout=1.5):
        """One authenticated exchange; raises as `nts_core.client.exchange`."""
        return asyncio.run(exchange(self.association, self.address, self.ntp_port, timeout=timeout))


@pytest.fixture
def our_client(authority):
    return lambda *arguments: OurClient(authority.root, *arguments)
