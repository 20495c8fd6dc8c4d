"""Members whose agent has an account of its own at the CA: in, renewed, killed in between, and out again."""

import json
import signal

import pytest

from lab.ca_front import Fault, Resource
from lab.pool import LabPool
from lab.processes import wait_until
from lab.programs import run

pytestmark = pytest.mark.timeout(150)


def settle(pool, member, validation="http-01"):
    """Join with an account of one's own."""
    assert member.join(member.register()).status == 0
    acme = {
        "mode": "own-account",
        "directory_url": pool.ca.directory_url,
        "ca_file": str(pool.ca.ca_file),
        "validation": validation,
    }
    lines = (f"{name} = {json.dumps(value)}\n" for name, value in acme.items())
    (member.state / "agent.toml").write_text("[acme]\n" + "".join(lines))


def journal(member):
    try:
        return json.loads((member.state / "members" / member.domain / "own-account.json").read_text())
    except FileNotFoundError:
        return {"account_uri": None, "order": None}


@pytest.mark.long
def test_an_agent_with_an_account_of_its_own_comes_renews_and_goes(tmp_path):
    """Its CA obeys CAA, and certificates that live for 20 s are renewed at half of that."""
    with LabPool(tmp_path, opening_size=1, validity=20, nonce_reject=0, fronted=True) as pool:
        member = pool.add("alice")
        settle(pool, member, "tls-alpn-01")

        # Killed while the CA has the order, the agent goes on with it, and asks for no other one.
        pool.ca.faults[Resource.ORDER] = Fault.UNDECIDED
        member.process.start()
        wait_until(lambda: journal(member)["order"] is not None, "an order in the journal", 40)
        order = journal(member)["order"]
        member.process.signal(signal.SIGKILL)
        assert member.process.wait() == -signal.SIGKILL
        assert journal(member)["order"] == order
        del pool.ca.faults[Resource.ORDER]
        member.process.start()
        view = pool.wait_for_state(member, "active")
        assert pool.ca.asked[Resource.NEW_ORDER] == 1
        assert pool.ca.refusals == []
        assert view["acme_account"] == journal(member)["account_uri"]
        assert pool.query(member).document["authenticated"] is True
        first = view["certificates"][-1]
        status = run("pool-agent", "status", "--state", str(member.state))
        assert f"account    {view['acme_account']}" in status.stdout

        wait_until(
            lambda: member.view()["certificates"][-1]["fingerprint"] != first["fingerprint"], "renewal", 40
        )
        view = member.view()
        assert view["state"] == "active"
        assert pool.query(member).document["authenticated"] is True

        pool.member.call("DELETE", "/v1/servers/alice")
        receipt = pool.wait_for_state(member, "removed")["receipt"]
        assert receipt["certificate_revoked_at"] is not None
        assert pool.ca.certificate_status(view["certificates"][-1]["serial"]) == "Revoked"
        wait_until(lambda: not member.process.running(), "the agent has ended")
        assert list((member.state / "members").iterdir()) == []
