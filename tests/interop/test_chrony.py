"""chronyd 4.3 of Debian 12 as a client of our server and as a server for our client."""

import urllib.request

import pytest

from lab.certificates import Authority
from lab.peers import ChronydClient, ChronydServer
from lab.processes import free_port, wait_until
from lab.programs import AgentServer, run

NAME = "ntp.example"
# chronyd begins with a burst, and waits 16 s after the first failed key establishment.
DEADLINE = 40.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def pair(authority):
    return authority.issue(NAME, "127.0.0.1", "::1")


class OurServer:
    """`pool-agent serve` on ports that stay the same; each start has a log and metrics of its own."""

    def __init__(self, directory, pair, address="127.0.0.1"):
        self.directory = directory
        self.pair = pair
        self.host = f"[{address}]" if ":" in address else address
        self.ke_port, self.ntp_port = free_port(address), free_port(address)
        self.starts = 0

    def start(self, *arguments):
        self.starts += 1
        self.metrics = free_port()
        return AgentServer(
            self.directory / f"start-{self.starts}",
            self.pair,
            "--local-stratum=2",
            f"--metrics=127.0.0.1:{self.metrics}",
            *arguments,
            ke=(f"{self.host}:{self.ke_port}",),
            ntp=(f"{self.host}:{self.ntp_port}",),
        )

    def count(self, counter, outcome):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        name = f'pool_agent_{counter}_total{{outcome="{outcome}"}} '
        return next((float(line.removeprefix(name)) for line in lines if line.startswith(name)), 0.0)


def is_served(chronyd):
    """Whether chronyd has selected its source, with the last eight polls answered."""
    sources = chronyd.report("sources")
    return bool(sources) and sources[0][1] == "*" and sources[0][5] == "377"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_chronyd_uses_our_server(tmp_path, authority, pair, address):
    server = OurServer(tmp_path, pair, address)
    with (
        server.start(),
        ChronydClient(tmp_path / "chronyd", authority.root, address, server.ke_port) as chronyd,
    ):
        wait_until(lambda: is_served(chronyd), "chronyd is served", DEADLINE)
        (authdata,) = chronyd.report("authdata")
        (source,) = chronyd.report("sources")
        (ntpdata,) = chronyd.report("ntpdata")
        keys = server.count("ke", "ok")
    name, mode, _, algorithm, key_length, _, _, naks, cookies, cookie_length = authdata
    assert (name, mode, algorithm, key_length) == (address, "NTS", "15", "256")
    assert (naks, cookies, cookie_length) == ("0", "8", "100")
    assert source[3] == "2"
    assert abs(float(source[7])) < 0.05
    assert ntpdata[2] == str(server.ntp_port), "record 7 was not followed"
    assert ntpdata[-7] == "Yes", "not authenticated"
    assert keys == 1


def client_of(server, directory, authority):
    return ChronydClient(directory / "chronyd", authority.root, "127.0.0.1", server.ke_port)


def test_chronyd_goes_on_after_a_restart_with_kept_keys(tmp_path, authority, pair):
    server = OurServer(tmp_path, pair)
    state = f"--state={tmp_path / 'state'}"
    with server.start(state) as first, client_of(server, tmp_path, authority) as chronyd:
        wait_until(lambda: is_served(chronyd), "chronyd is served", DEADLINE)
        first.stop()
        with server.start(state):
            wait_until(lambda: server.count("ntp", "nts-time") >= 10, "chronyd goes on", DEADLINE)
            assert server.count("ke", "ok") == 0
            assert server.count("ntp", "ntsn") == 0
            wait_until(lambda: chronyd.report("authdata")[0][8] == "8", "eight cookies again", DEADLINE)
            assert chronyd.report("authdata")[0][7] == "0"


def test_chronyd_recovers_after_a_restart_with_lost_keys(tmp_path, authority, pair):
    """NTSN makes it run key establishment again; its own back-off is all it waits for."""
    server = OurServer(tmp_path, pair)
    with server.start() as first, client_of(server, tmp_path, authority) as chronyd:
        wait_until(lambda: is_served(chronyd), "chronyd is served", DEADLINE)
        first.stop()
        with server.start():
            wait_until(lambda: server.count("ke", "ok") == 1, "chronyd comes for new cookies", DEADLINE)
            assert server.count("ntp", "ntsn") >= 1
            wait_until(lambda: server.count("ntp", "nts-time") >= 3, "chronyd is served again", DEADLINE)
            wait_until(lambda: chronyd.report("authdata")[0][8] == "8", "eight cookies again", DEADLINE)
            assert chronyd.report("ntpdata")[0][-7] == "Yes"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_our_client_uses_chronyd(tmp_path, authority, pair, address):
    with ChronydServer(tmp_path, pair, address=address, stratum=10) as chronyd:
        done = run(
            "pool-client",
            "query",
            f"{NAME}:{chronyd.ke_port}",
            f"--address={address}",
            f"--ca={authority.root}",
            "--json",
        )
        (statistics,) = chronyd.report("serverstats")
    assert done.status == 0, done
    document = done.document
    assert document["authenticated"] is True
    assert (document["aead"], document["cookies"]) == (15, 8)
    assert (document["stratum"], document["leap"]) == (10, 0)
    assert (document["ntp_address"], document["ntp_port"]) == (address, chronyd.ntp_port)
    assert abs(document["offset_ns"]) < 50_000_000
    assert document["error"] is None
    # NTP received, dropped, commands received, dropped, log drops, KE accepted, dropped, authenticated NTP.
    assert (statistics[0], statistics[5], statistics[7]) == ("4", "1", "4")
