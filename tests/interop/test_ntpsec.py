"""ntpd of NTPsec 1.2.2 (Debian 12) as a server for our client, in a network namespace of its own."""

import json
import subprocess

import pytest

from lab.certificates import Authority
from lab.peers import NtpsecNtpd
from lab.programs import RUN_DEADLINE, script

NAME = "ntp.example"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def ntpd(tmp_path_factory, authority):
    pair = authority.issue(NAME, "127.0.0.1", "::1")
    with NtpsecNtpd(tmp_path_factory.mktemp("ntpd"), pair, stratum=10) as running:
        yield running


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_our_client_uses_ntpd(ntpd, authority, address):
    """On the usual ports: neither record 6 nor record 7 is sent."""
    done = subprocess.run(
        [
            *ntpd.inside(),
            script("pool-client"),
            "query",
            NAME,
            f"--address={address}",
            f"--ca={authority.root}",
            "--samples=6",
            "--json",
        ],
        capture_output=True,
        text=True,
        timeout=RUN_DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done
    document = json.loads(done.stdout)
    assert document["authenticated"] is True
    assert (document["aead"], document["cookies"]) == (15, 8)
    assert (document["stratum"], document["leap"]) == (10, 0)
    assert (document["ke_port"], document["ntp_address"], document["ntp_port"]) == (4460, address, 123)
    assert abs(document["offset_ns"]) < 50_000_000
    assert document["error"] is None
    assert f"NTS-KE from {'[::1]' if ':' in address else address}" in ntpd.process.output()
