"""One agent that is several servers: joined while it runs, each with its own certificate, and left one by one."""

import pytest

from lab.pool import LabPool
from lab.processes import wait_until
from member_agent.errors import ExitStatus

pytestmark = pytest.mark.timeout(120)


def test_one_agent_is_two_servers_and_ends_with_the_last(tmp_path):
    with LabPool(tmp_path, opening_size=1) as pool:
        alice = pool.add("alice").start()
        bob = pool.add("bob")
        # Bob is another name of alice's host, with an address of its own.
        bob.state = alice.state
        pool.wait_for_state(alice, "active")
        assert bob.join(bob.register()).status == ExitStatus.OK
        pool.wait_for_state(bob, "active")
        for member in (alice, bob):
            assert pool.query(member).document["authenticated"] is True
        fingerprints = {member.view()["certificates"][-1]["fingerprint"] for member in (alice, bob)}
        assert len(fingerprints) == 2

        pool.member.call("DELETE", "/v1/servers/alice")
        pool.wait_for_state(alice, "removed")
        left = {bob.domain}
        wait_until(
            lambda: {path.name for path in (alice.state / "members").iterdir()} == left, "alice's keys gone"
        )
        assert pool.query(bob).document["authenticated"] is True
        assert alice.process.running()

        pool.member.call("DELETE", "/v1/servers/bob")
        pool.wait_for_state(bob, "removed")
        assert alice.process.wait() == ExitStatus.REMOVED
        assert list((alice.state / "members").iterdir()) == []
        assert "has left the pool" in alice.process.output()


def test_a_host_that_joins_again_takes_over_from_itself(tmp_path):
    """A new join token for a server whose agent runs here: the agent goes on with the new key, and the certificate stays."""
    with LabPool(tmp_path, opening_size=1) as pool:
        member = pool.add("alice").start()
        before = pool.wait_for_state(member, "active")["certificates"]
        token = pool.member.call("POST", "/v1/servers/alice/join-token")["join_token"]
        assert member.join(token).status == ExitStatus.OK
        wait_until(lambda: "server_given_up" in member.process.output(), "the old key is refused")
        seen = member.view()["agent"]["seen_at"]
        wait_until(lambda: member.view()["agent"]["seen_at"] > seen, "a report with the new key")
        assert member.process.running()
        assert pool.query(member).document["authenticated"] is True
        assert member.view()["certificates"][0] == before[0]
