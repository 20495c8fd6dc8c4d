"""Parts of the pool that fail while members come and go: the work resumes, and the reason is shown meanwhile."""

import json
import signal

import pytest

from lab.processes import free_port, wait_until
from lab.programs import run
from lab.relay import Relay
from member_agent.errors import ExitStatus

pytestmark = pytest.mark.timeout(150)


def test_join_with_a_wrong_token_is_refused(pool, tmp_path):
    done = pool.join("tc_join_wrong", tmp_path)

    assert done.status == ExitStatus.REGISTRY
    assert "the token is not valid" in done.stderr
    assert "copied whole" in done.stderr


def test_a_join_token_serves_one_host(pool, tmp_path):
    """Said twice there it changes nothing; another host's use of it is refused."""
    member = pool.add("twice")
    token = member.register()
    assert member.join(token).status == 0

    before = sorted(path.read_bytes() for path in member.state.rglob("*.json"))
    again = member.join(token)
    stranger = pool.join(token, tmp_path)

    assert again.status == ExitStatus.OK
    assert "twice.servers.pool.example" in again.stdout
    assert sorted(path.read_bytes() for path in member.state.rglob("*.json")) == before
    assert stranger.status == ExitStatus.REGISTRY
    assert "used already" in stranger.stderr


def test_join_needs_https_beyond_loopback(tmp_path):
    done = run("pool-agent", "join", "http://pool.example", "--token", "x", "--state", str(tmp_path))

    assert done.status == ExitStatus.USAGE
    assert "https" in done.stderr


def test_join_with_a_registry_whose_certificate_is_not_trusted_is_refused(pool, tmp_path):
    """No token leaves before the registry has shown who it is."""
    done = run("pool-agent", "join", pool.url, "--token", "tc_join_x", "--state", str(tmp_path))

    assert done.status == ExitStatus.REGISTRY
    assert "certificate" in done.stderr


def test_run_before_join_names_the_next_step(tmp_path):
    done = run("pool-agent", "run", "--state", str(tmp_path))

    assert done.status == ExitStatus.STATE
    assert "pool-agent join" in done.stderr


def test_registry_down_at_join_is_said_and_nothing_is_kept(pool, tmp_path):
    member = pool.add("later")
    token = member.register()
    pool.registry.stop()
    try:
        refused = member.join(token)
    finally:
        pool.start_registry()

    assert refused.status == ExitStatus.REGISTRY
    assert "does not answer" in refused.stderr
    assert member.join(token).status == 0


def test_members_serve_on_while_the_registry_is_down(pool):
    """Also an agent that starts meanwhile: it has its certificate and knows where it served."""
    member = pool.add("steady").start()
    pool.wait_for_state(member, "active")
    pool.registry.stop()
    try:
        query = pool.query(member)
        member.process.signal(signal.SIGKILL)
        member.process.wait()
        member.process.start()
        wait_until(lambda: pool.query(member).status == 0, "the restarted agent serves")
    finally:
        pool.start_registry()

    assert query.document["authenticated"] is True
    seen = member.view()["agent"]["seen_at"]
    wait_until(lambda: member.view()["agent"]["seen_at"] > seen, "the agent reports again")
    assert member.view()["state"] == "active"


def test_a_dead_primary_delays_and_loses_nothing(pool):
    """The pool says which of its parts is down; once it is back, the member gets in by itself."""
    pool.primary.stop()
    try:
        member = pool.add("patient").start()
        pool.wait_for_state(member, "verified")
        wait_until(lambda: any(text.startswith("DNS") for text in _alarms(pool)), "the alarm about DNS")
        waiting = member.view()
    finally:
        pool.primary.start()

    assert waiting["why"].startswith("addresses: proved, on the way into DNS")
    view = pool.wait_for_state(member, "active")
    assert view["certificates"][-1]["status"] == "issued"
    wait_until(lambda: not _alarms(pool), "the alarm ends")


def test_a_dead_ca_delays_issue_and_removal_and_loses_nothing(pool):
    """A CA that comes back with its accounts forgotten is met with a new account, by itself."""
    leaver = pool.add("leaver").start()
    pool.wait_for_state(leaver, "active")
    pool.pebble.stop()
    member = pool.add("thrifty").start()
    wait_until(lambda: member.view()["why"].startswith("issuance: CA:"), "the reason is shown")
    pool.member.call("DELETE", f"/v1/servers/{leaver.name}")
    wait_until(lambda: leaver.view()["receipt"]["name_broken_at"], "DNS does not wait for the CA")
    wait_until(lambda: leaver.view()["receipt"]["error"], "the receipt says what is outstanding")
    outstanding = leaver.view()
    pool.pebble.start()
    # Pebble forgets everything, its issuing root too: the prober and the clients are told the new one.
    pool.write_files()
    pool.registry.stop()
    pool.start_registry()

    assert outstanding["state"] == "leaving"
    assert outstanding["receipt"]["certificate_revoked_at"] is None
    assert outstanding["receipt"]["error"].startswith("CA: ")
    pool.wait_for_state(member, "active")


def test_a_lying_host_proves_nothing(pool):
    """Another web server on the address: the proof fails at the stage that says so."""
    member = pool.add("squatter")
    token = member.register()
    assert member.join(token).status == 0
    other = pool.add("other")
    other_token = other.register()
    assert other.join(other_token).status == 0
    # The agent of one server calls for the address of the other.
    (member.state / "agent.toml").write_text(f'listen = ["{other.address}"]\n')
    member.process.start()
    wait_until(lambda: member.view()["addresses"][0]["proof_error"], "the failed proof")

    view = member.view()
    assert view["state"] == "registered"
    assert view["why"].startswith("addresses: ")
    assert "no HTTP answer" in view["why"]


def test_the_api_says_where_its_documents_are(pool):
    document = pool.api().call("GET", "/openapi.json")

    assert {"/v1/members", "/v1/servers", "/v1/servers/{name}", "/v1/agent/sync"} <= set(document["paths"])


def _alarms(pool):
    return pool.api().call("GET", "/v1/pool")["alarms"]


def test_an_agent_renews_by_hand_and_learns_from_a_check_what_a_firewall_drops(pool):
    """What its commands ask, asked with its own token; long NTP packets are dropped on the way at first."""
    member = pool.add("walled")
    assert member.join(member.register()).status == 0
    behind = free_port(member.address)
    (member.state / "agent.toml").write_text(f'ntp_server = "{member.address}:{behind}"\n')
    unused, ntp = free_port(member.address), (member.address, pool.ntp_port)
    with Relay(member.address, ke=(unused, ntp), ntp=(behind, ntp), longest=400) as relay:
        member.process.start()
        pool.wait_for_state(member, "certified")
        membership = json.loads(next(member.state.rglob("membership.json")).read_text())
        agent = pool.api(membership["token"])

        def failures():
            answer = agent.call("POST", f"/v1/servers/{member.name}/check")
            return {row["check"]: row for row in answer["findings"] if row["status"] == "failed"}

        failed = failures()
        assert set(failed) == {"nts-long"}
        assert "octets pass" in failed["nts-long"]["detail"]
        assert member.view()["state"] == "certified"
        relay.longest = 1500
        pool.wait_for_state(member, "active")
        assert failures() == {}
        before = agent.server(member.name)["certificate"]
        agent.call("POST", f"/v1/servers/{member.name}/renewal")

        def renewed():
            now = agent.server(member.name)["certificate"]
            return now["fingerprint"] != before["fingerprint"] and not now["ordering"]

        wait_until(renewed, "the renewal", 40)
        assert agent.request("POST", f"/v1/servers/{member.name}/renewal").status_code == 429
