"""A whole pool at a CA that obeys CAA and keeps authorizations: who was removed gets no certificate in any way."""

import asyncio
import contextlib
from dataclasses import replace
from datetime import UTC, datetime

import dns.message
import dns.query
import pytest

from lab.ca_front import CaFront, Fault, Resource
from lab.certbot import Certbot
from lab.pebble import Pebble
from lab.pool import LabPool
from lab.processes import LabError, wait_until
from lab.programs import AgentServer
from nts_core.acme import AcmeAccount, AcmeConfig, OrderState
from nts_core.tls import new_key_and_csr

pytestmark = pytest.mark.timeout(180)
OTHERS = r"CAA record for carol\.servers\.pool\.example prevents issuance"
CLOSED = "CAA record for servers.pool.example prevents issuance"


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Authorizations that are valid are used again, always: the worst that a CA does."""
    directory = tmp_path_factory.mktemp("pool")
    # certbot repeats a request once only whose nonce is refused: of good ones none is, here.
    options = {"fronted": True, "authz_reuse": 100, "nonce_reject": 0}
    with LabPool(directory, opening_size=1, leaving_margin=60, knot=True, **options) as running:
        yield running


def knows(pool, domain, kind):
    """Whether the resolver that the CA asks knows such records."""
    query = dns.message.make_query(domain, kind)
    answer = dns.query.udp(query, pool.unbound.address, port=pool.unbound.port, timeout=3)
    return bool(answer.answer)


def remove(pool, member):
    pool.operator.call("DELETE", f"/v1/servers/{member.name}?emergency=true")


async def order_as(config, domain):
    """What becomes of an order with an account's key."""
    csr = new_key_and_csr(domain)[1]
    with contextlib.closing(await AcmeAccount.open(config)) as account:
        order = await account.order(csr, domain)
        assert order.token is not None, "the pool ends each authorization after its issue"
        await account.answer(order.challenge_url)
        for _ in range(500):
            status = await account.poll(order.url)
            if status.status is not OrderState.PENDING:
                return status
            await asyncio.sleep(0.02)
    raise AssertionError(f"never decided: {status}")


def test_a_removed_member_with_the_pools_account_gets_no_certificate(pool, tmp_path):
    """Not even with the key of the registry's account, and what that account has at the CA."""
    member = pool.add("alice").start()
    serial = pool.wait_for_state(member, "active")["certificates"][-1]["serial"]
    key = tmp_path / "account.pem"
    key.touch(mode=0o600)
    key.write_bytes((pool.directory / "acme-account.pem").read_bytes())
    remove(pool, member)
    pool.wait_for_state(member, "removed", 60)
    wait_until(lambda: not knows(pool, member.domain, "CAA"), "the CA's resolver forgets the CAA")

    config = AcmeConfig(pool.ca.directory_url, key, ca_file=pool.ca.ca_file)
    status = asyncio.run(order_as(config, member.domain))

    assert (status.status, status.error_detail) == (OrderState.INVALID, f"caa: {CLOSED}")
    assert pool.pebble.certificate_status(serial) == "Revoked"
    stranger = replace(config, account_key_file=tmp_path / "stranger.pem")
    assert asyncio.run(order_as(stranger, member.domain)).error_detail == f"caa: {CLOSED}"


@pytest.mark.long
def test_a_removed_member_with_an_account_of_its_own_gets_no_certificate(pool, tmp_path, web_server):
    """Neither with a valid authorization of before, nor with a new account, nor at another CA."""
    member = pool.add("carol")
    url = "/v1/servers/carol"
    body = {"name": "carol", "addresses": [member.address], "agentless": True}
    pool.member.call("POST", "/v1/servers", body)
    there = pool.api(pool.member_token, source=member.address)
    proof = there.call("POST", f"{url}/proofs", {"address": member.address})
    with web_server(member.address, pool.http_port, proof["path"], proof["content"]):
        pool.member.call("POST", f"{url}/proofs/{member.address}/ready")
        pool.wait_for_state(member, "verified")

    def certbot(name, ca):
        made = Certbot(tmp_path / name, ca, address=member.address, http_port=pool.http_port)
        return made, made.register()

    own, account = certbot("own", pool.ca)
    stranger, _ = certbot("stranger", pool.ca)
    pool.member.call("PUT", f"{url}/acme-account", {"account_uri": account})

    def may_order():
        moment = member.view()["may_order_at"]
        return moment is not None and datetime.fromisoformat(moment) <= datetime.now(UTC)

    wait_until(may_order, "the CAA with the account is everywhere")
    pair = own.order(member.domain)
    with pytest.raises(LabError, match=OTHERS):
        stranger.order(member.domain)

    resolver = pool.unbound.address, pool.unbound.port
    second = Pebble(
        tmp_path / "second",
        resolver=f"{resolver[0]}:{resolver[1]}",
        http_port=pool.http_port,
        nonce_reject=0,
    )
    ke, ntp = (f"{member.address}:{port}" for port in (pool.ke_port, pool.ntp_port))
    with (
        second,
        CaFront(second, identity="second.ca.test", resolver=resolver) as second_front,
        AgentServer(tmp_path / "server", pair, "--local-stratum=10", ke=[ke], ntp=[ntp]),
    ):
        elsewhere, _ = certbot("elsewhere", second_front)
        with pytest.raises(LabError, match=OTHERS):
            elsewhere.order(member.domain)
        serial = pool.wait_for_state(member, "active")["certificates"][-1]["serial"]
        remove(pool, member)
        receipt = pool.wait_for_state(member, "removed", 60)["receipt"]
        wait_until(lambda: not knows(pool, member.domain, "CAA"), "the CA's resolver forgets the CAA")
        assert pool.ca.certificate_status(serial) == "Revoked"
        assert (receipt["outstanding"], receipt["not_revoked"]) == ([], None)
        assert None not in [receipt[name] for name in receipt if name.endswith("_at")]
        assert not knows(pool, f"_acme-challenge.{member.domain}", "TXT")
        before = pool.ca.asked[Resource.CHALLENGE]
        for client, ca in ((own, pool.ca), (stranger, pool.ca), (elsewhere, second_front)):
            ca.refusals.clear()
            with pytest.raises(LabError):
                client.order(member.domain)
            (why,) = ca.refusals
            assert why.endswith(CLOSED)
        assert pool.ca.asked[Resource.CHALLENGE] == before + 1, (
            "the first had a valid authorization still: only the lock stopped it"
        )


def test_an_emergency_is_over_in_a_minute_or_says_what_is_outstanding(pool):
    """In order the addresses would stay for the SRV's TTL and a minute."""
    healthy, without_ca, without_dns = (pool.add(name).start() for name in ("dora", "emil", "fred"))
    serials = {
        member: pool.wait_for_state(member, "active")["certificates"][-1]["serial"]
        for member in (healthy, without_ca, without_dns)
    }
    remove(pool, healthy)
    receipt = pool.wait_for_state(healthy, "removed", 60)["receipt"]
    assert receipt["outstanding"] == []
    assert receipt["last_certificate_ends_at"] is not None

    pool.ca.faults = dict.fromkeys(Resource, Fault.DOWN)
    remove(pool, without_ca)
    wait_until(lambda: without_ca.view()["receipt"]["name_broken_at"], "DNS does not wait for the CA")
    wait_until(lambda: without_ca.view()["receipt"]["error"], "the receipt says what is outstanding")
    assert without_ca.view()["receipt"]["outstanding"] == ["certificate: not revoked by the CA"]
    pool.ca.faults = {}
    pool.wait_for_state(without_ca, "removed")

    pool.primary.stop()
    try:
        remove(pool, without_dns)
        wait_until(lambda: without_dns.view()["receipt"]["certificate_revoked_at"], "the CA waits for no DNS")
        steps = [text.partition(":")[0] for text in without_dns.view()["receipt"]["outstanding"]]
        assert steps == ["SRV", "addresses and CAA"]
        public = pool.api()
        wait_until(
            lambda: any(text.startswith("DNS") for text in public.call("GET", "/v1/pool")["alarms"]),
            "the alarm about DNS",
        )
    finally:
        pool.primary.start()
    pool.wait_for_state(without_dns, "removed")
    for serial in serials.values():
        assert pool.pebble.certificate_status(serial) == "Revoked"
