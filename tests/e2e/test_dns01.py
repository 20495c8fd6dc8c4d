"""A member whose port 80 is closed to the CA: the registry answers in DNS, and CAA lets it."""

import dns.message
import dns.query
import pytest

from lab.pool import LabPool
from lab.processes import wait_until

pytestmark = pytest.mark.timeout(180)


def shown(pool, owner, kind):
    """The records that the authoritative server gives."""
    query = dns.message.make_query(owner, kind)
    answer = dns.query.udp(query, pool.primary.address, port=pool.primary.port, timeout=3)
    return [
        rdata.to_text()
        for rrset in answer.answer
        for rdata in rrset
        if rrset.rdtype == query.question[0].rdtype
    ]


def test_a_server_whose_port_80_is_closed_gets_its_certificate_and_is_removed(tmp_path):
    with LabPool(tmp_path / "pool", opening_size=1, fronted=True, closed=True) as pool:
        member, other = pool.add("alice"), pool.add("bob")
        assert member.join(member.register()).status == 0
        (member.state / "agent.toml").write_text('[acme]\nvalidation = "dns-01"\n')
        member.process.start()
        other.start()

        view = pool.wait_for_state(member, "active", 60)
        (certificate,) = view["certificates"]
        assert (certificate["status"], certificate["error"]) == ("issued", None)
        assert (view["agent"]["validation"], view["agent"]["problem"]) == ("dns-01", None)
        (caa,) = shown(pool, member.domain, "CAA")
        assert caa.endswith('validationmethods=http-01,dns-01"')
        text = f"_acme-challenge.{member.domain}"
        wait_until(lambda: not shown(pool, text, "TXT"), "the text goes with the order")

        wait_until(
            lambda: any(row["status"] == "failed" for row in other.view()["certificates"]),
            "the host that is to answer itself cannot",
        )
        assert pool.ca.refusals == [], "CAA lets both"
        (caa,) = shown(pool, other.domain, "CAA")
        assert caa.endswith('validationmethods=http-01"')

        pool.operator.call("DELETE", f"/v1/servers/{member.name}?emergency=true")
        receipt = pool.wait_for_state(member, "removed", 60)["receipt"]
        assert receipt["outstanding"] == []
        assert pool.pebble.certificate_status(certificate["serial"]) == "Revoked"
        assert shown(pool, text, "TXT") == []
