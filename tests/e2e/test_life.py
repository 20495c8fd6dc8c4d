"""What the demo does not show: renewal, a certificate's swap under load, both database engines, IPv6, re-join."""

import pytest

from lab.pool import HAS_IPV6, LabPool
from lab.postgres import Postgres
from lab.processes import wait_until

pytestmark = pytest.mark.timeout(150)


def test_a_certificate_is_renewed_with_a_new_key_and_swapped_without_a_gap(tmp_path):
    """Certificates that live for 24 s are renewed at half of that; every query meanwhile succeeds."""
    with LabPool(tmp_path, opening_size=1, validity=24) as pool:
        member = pool.add("alice").start()
        first = pool.wait_for_state(member, "active")["certificates"][-1]

        def renewed():
            answer = pool.query(member)
            assert answer.document["authenticated"] is True, answer.stdout
            issued = [row for row in member.view()["certificates"] if row["status"] == "issued"]
            return len(issued) >= 2

        wait_until(renewed, "the renewal", 60)
        view = member.view()
        assert view["state"] == "active"
        assert view["certificates"][-1]["fingerprint"] != first["fingerprint"]


@pytest.mark.long
def test_a_pool_lives_on_postgresql(tmp_path):
    """The same life on the other engine: join, issue, admission, look-up, removal."""
    with Postgres(tmp_path / "postgres") as postgres:
        url = postgres.create_database()
        with LabPool(tmp_path / "pool", database=url, opening_size=2) as pool:
            members = [pool.add(name).start() for name in ("alice", "bob")]
            for member in members:
                pool.wait_for_state(member, "active")
            wait_until(lambda: members[0].view()["in_dns"] and members[1].view()["in_dns"], "the SRV record")
            found = pool.client("--count", "2")
            assert found.status == 0, found.stdout
            operators = {source["operator"] for source in found.document["sources"]}
            assert len(operators) == 1
            assert None not in operators
            pool.member.call("DELETE", "/v1/servers/bob")
            view = pool.wait_for_state(members[1], "removed")
            assert pool.pebble.certificate_status(view["certificates"][-1]["serial"]) == "Revoked"
            taken = pool.member.request("POST", "/v1/servers", {"name": "bob", "addresses": ["127.77.3.1"]})
            assert taken.status_code == 409
            assert taken.json()["code"] == "name-taken"


def test_a_reinstalled_host_joins_again_under_its_name(tmp_path):
    """A new token, a new state directory: the name, its address proof and its place are kept."""
    with LabPool(tmp_path, opening_size=1) as pool:
        member = pool.add("alice").start()
        before = len(pool.wait_for_state(member, "active")["certificates"])
        member.process.stop()
        member.state.rename(tmp_path / "lost")
        token = pool.member.call("POST", "/v1/servers/alice/join-token")["join_token"]
        assert member.join(token).status == 0
        member.process.start()

        wait_until(lambda: len(member.view()["certificates"]) > before, "a new order")
        view = pool.wait_for_state(member, "active")
        wait_until(
            lambda: member.view()["certificates"][-1]["status"] == "issued", "the certificate for the new key"
        )
        assert view["name"] == "alice"


@pytest.mark.skipif(not HAS_IPV6, reason="this host has no IPv6 loopback")
def test_a_server_with_ipv6_only_is_a_full_member(tmp_path):
    """Proof call, connection back, issue, probes and the client all go over IPv6."""
    with LabPool(tmp_path, opening_size=1, registry_address="[::1]") as pool:
        member = pool.add("six", addresses=["::1"]).start()
        pool.wait_for_state(member, "active")
        wait_until(lambda: member.view()["in_dns"], "the SRV record")

        found = pool.client("--count", "1")

        assert found.status == 0, found.stdout
        assert found.document["sources"][0]["address"] == "::1"
