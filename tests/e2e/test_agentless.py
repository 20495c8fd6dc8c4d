"""A member without our agent: Debian's certbot orders, a stand-alone server serves, from registration to removal.

Pebble itself lets no account revoke what another one ordered: it is the CA that refuses.
"""

import signal
from datetime import UTC, datetime

import dns.message
import dns.query
import pytest

from lab.certbot import Certbot
from lab.pool import CAA_IDENTITY, LabPool
from lab.processes import wait_until
from lab.programs import AgentServer

pytestmark = pytest.mark.timeout(180)


def caa(pool, domain):
    """The CAA records that the authoritative server gives."""
    query = dns.message.make_query(domain, "CAA")
    answer = dns.query.udp(query, pool.primary.address, port=pool.primary.port, timeout=3)
    return [rdata.to_text() for rrset in answer.answer for rdata in rrset]


def may_order(member):
    moment = member.view()["may_order_at"]
    return moment is not None and datetime.fromisoformat(moment) <= datetime.now(UTC)


def test_a_member_with_certbot_comes_renews_and_goes(tmp_path, web_server):
    # certbot repeats a request once only whose nonce is refused: of good ones none is, here.
    with LabPool(tmp_path / "pool", opening_size=1, nonce_reject=0) as pool:
        member = pool.add("carol")
        created = pool.member.call(
            "POST", "/v1/servers", {"name": "carol", "addresses": [member.address], "agentless": True}
        )
        assert created["join"] is None
        url = "/v1/servers/carol"

        there = pool.api(pool.member_token, source=member.address)
        proof = there.call("POST", f"{url}/proofs", {"address": member.address})
        with web_server(member.address, pool.http_port, proof["path"], proof["content"]):
            pool.member.call("POST", f"{url}/proofs/{member.address}/ready")
            pool.wait_for_state(member, "verified")

        certbot = Certbot(tmp_path / "certbot", pool.pebble, address=member.address, http_port=pool.http_port)
        account = certbot.register()
        pool.member.call("PUT", f"{url}/acme-account", {"account_uri": account})
        wait_until(lambda: may_order(member), "the CAA with the account is everywhere")
        assert caa(pool, member.domain) == [
            f'0 issue "{CAA_IDENTITY}; accounturi={account}; validationmethods=http-01"'
        ]

        pair = certbot.order(member.domain)
        ke, ntp = (f"{member.address}:{port}" for port in (pool.ke_port, pool.ntp_port))
        with AgentServer(tmp_path / "server", pair, "--local-stratum=10", ke=[ke], ntp=[ntp]) as server:
            view = pool.wait_for_state(member, "active")
            (first,) = view["certificates"]
            wait_until(lambda: member.view()["in_dns"], "the SRV record")
            assert pool.query(member).document["authenticated"] is True

            certbot.order(member.domain)
            server.process.signal(signal.SIGHUP)
            wait_until(lambda: len(member.view()["certificates"]) == 2, "the renewal is seen")
            view = member.view()
            assert view["state"] == "active"
            last = view["certificates"][-1]
            assert last["fingerprint"] != first["fingerprint"]

            pool.member.call("DELETE", url)
            view = pool.wait_for_state(member, "removed", 60)

        receipt = view["receipt"]
        assert receipt["name_broken_at"] is not None
        assert receipt["control_proved_at"] is not None
        assert receipt["certificate_revoked_at"] is None
        assert "not associated with account" in receipt["not_revoked"]
        assert pool.pebble.certificate_status(last["serial"]) == "Valid", "as the receipt says"
        ends = [datetime.fromisoformat(row["not_after"]) for row in view["certificates"]]
        assert datetime.fromisoformat(receipt["last_certificate_ends_at"]) == max(ends)
        assert "not revoked" in receipt["exposure"]
        assert caa(pool, member.domain) == []
