"""Servers without an agent: the file that proves an address, the account in CAA, what probes see, and the end."""

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from sqlalchemy import select

from lab.certificates import Authority
from member_agent.challenges import Responder
from nts_core.control import PROOF_PATH, ProbeResult, ServerState, Stage, StageStatus
from poolsvc import issuance, monitoring, own_account, prober, proofs, removal, servers, worker
from poolsvc.errors import InvalidDocument
from poolsvc.explain import explain
from poolsvc.models import Order, OrderStatus, Server
from poolsvc.pool import the_pool
from poolsvc.prober import why_irrevocable
from poolsvc.publication import Publication
from poolsvc.publisher import Observation
from poolsvc.rounds import Rounds

S = ServerState
HERE = "127.0.0.1"
NAME = "alice.servers.pool.example"
ACCOUNT = "https://ca.example/acct/7"
ENDS = int(datetime(2026, 6, 1, tzinfo=UTC).timestamp())
URL = "/v1/servers/alice"


@pytest.fixture
async def responder():
    async with Responder([NAME]) as responder:
        await responder.listen((HERE, 0))
        yield responder


@pytest.fixture
async def alice(registry, responder):
    """A server without an agent at 127.0.0.1, where the responder is its web server."""
    ports = registry.settings.ports.model_copy(update={"http": responder.endpoints[0][1]})
    registry.settings = registry.settings.model_copy(update={"ports": ports})
    owner = await registry.member("Owner")
    registry.alice = await registry.server("alice", HERE, member=owner, agentless=True)
    registry.token = await registry.owner_token(owner)
    await registry.open_account()
    return registry


async def begin(alice, client, source=HERE):
    async with client(alice.token, source=source) as http:
        return await http.post(f"{URL}/proofs", json={"address": HERE})


async def look(alice):
    """The worker's look at the address, whenever it is due; the address then."""
    row = (await alice.get(alice.alice)).addresses[0]
    await proofs.prove(alice.database, alice.settings, row.id, datetime.now(UTC))
    return (await alice.get(alice.alice)).addresses[0]


async def test_the_file_that_was_asked_for_proves_the_address(alice, responder, client):
    asked = await begin(alice, client)
    assert asked.status_code == 201, asked.text
    document = asked.json()
    assert document["path"].startswith(PROOF_PATH)
    assert document["content"] not in document["path"]
    responder.publish(NAME, document["path"], document["content"].encode() + b"\n")
    row = await look(alice)
    assert row.proved_at is not None
    assert (await alice.get(alice.alice)).state is S.VERIFIED


@pytest.mark.parametrize("answer", [b"", b"no", b"x" * 300, "ä".encode(), b"<html>It works!</html>"])
async def test_any_other_content_proves_nothing(alice, responder, client, answer):
    document = (await begin(alice, client)).json()
    responder.publish(NAME, document["path"], answer)
    row = await look(alice)
    assert (row.proved_at, row.nonce) == (None, None)
    assert row.proof_error
    assert document["content"] not in row.proof_error


async def test_a_server_that_echoes_the_path_proves_nothing(alice, responder, client):
    """Many web servers repeat the path that was asked for in their answer."""
    document = (await begin(alice, client)).json()
    name = document["path"].removeprefix(PROOF_PATH)
    responder.publish(NAME, document["path"], name.encode())
    assert (await look(alice)).proved_at is None


async def test_a_proof_has_to_be_asked_for_from_the_address(alice, client):
    answer = await begin(alice, client, "198.18.9.9")
    assert (answer.status_code, answer.json()["code"]) == (409, "address-mismatch")
    async with client(alice.token, source=HERE) as http:
        other = await http.post(f"{URL}/proofs", json={"address": "198.18.9.9"})
    assert (other.status_code, other.json()["code"]) == (404, "not-found")


async def test_told_that_the_file_is_there_the_registry_looks_at_once_and_once(alice, client):
    await begin(alice, client)
    async with client(alice.token) as http:
        for _ in range(2):
            told = await http.post(f"{URL}/proofs/{HERE}/ready")
            assert told.status_code == 202, told.text
        now = datetime.now(UTC)
        assert len(await worker.claim(alice.database, worker.PROOFS, now)) == 1
        await http.post(f"{URL}/proofs/{HERE}/ready")
        assert await worker.claim(alice.database, worker.PROOFS, now) == []
        unknown = await http.post(f"{URL}/proofs/198.18.9.9/ready")
        assert (unknown.status_code, unknown.json()["code"]) == (404, "not-found")


async def test_ready_without_a_proof_under_way_is_refused(alice, client):
    async with client(alice.token) as http:
        answer = await http.post(f"{URL}/proofs/{HERE}/ready")
    assert (answer.status_code, answer.json()["code"]) == (409, "wrong-state")


async def test_registered_without_an_agent_there_is_no_join_token_and_no_order(registry, client):
    owner = await registry.member("Owner")
    async with client(await registry.owner_token(owner)) as http:
        body = {"name": "alice", "addresses": [HERE], "agentless": True}
        made = await http.post("/v1/servers", json=body)
        assert made.json()["join"] is None
        assert made.json()["server"]["agentless"] is True
        again = await http.post(f"{URL}/join-token")
        assert (again.status_code, again.json()["code"]) == (409, "wrong-state")


async def test_with_an_agent_there_is_nothing_to_be_done_by_hand(registry, client):
    owner = await registry.member("Owner")
    await registry.server("alice", HERE, member=owner)
    async with client(await registry.owner_token(owner), source=HERE) as http:
        for method, path, body in (
            ("POST", "/proofs", {"address": HERE}),
            ("POST", f"/proofs/{HERE}/ready", None),
            ("PUT", "/acme-account", {"account_uri": ACCOUNT}),
        ):
            answer = await http.request(method, URL + path, json=body)
            assert (answer.status_code, answer.json()["code"]) == (409, "wrong-state"), path


@pytest.mark.parametrize(
    "uri",
    [
        *(
            "",
            "x",
            "http://ca.example/acct/7",
            "https://other.example/acct/7",
            "https://ca.example",
            ACCOUNT + "?a",
        ),
        *(
            "https://ca.example/",
            "https://ca.example:444/acct/7",
            "https://me@ca.example/acct/7",
            ACCOUNT + "#a",
        ),
        *(
            ACCOUNT + '"; x',
            ACCOUNT + ";validationmethods=dns-01",
            ACCOUNT + " ",
            ACCOUNT + "\\",
            ACCOUNT + "\n",
        ),
        *("https://ca.example.evil.example/acct", "https://ca.example/" + "a" * 500, "https://ca.example/ä"),
    ],
)
def test_what_is_no_account_of_the_pools_ca_is_refused(settings, uri):
    server = Server(name="alice", agentless=True)
    with pytest.raises(InvalidDocument) as caught:
        own_account.choose(settings, server, uri)
    assert caught.value.field == "account_uri"
    assert server.own_account_uri is None


async def caa(alice):
    leader = Publication(alice.database, alice.settings)
    await leader.look(alice.now)
    (text,) = leader.whole()[f"{NAME}.", "CAA"].rdatas
    return text


async def test_caa_lets_nobody_order_until_the_account_is_known_and_then_that_one_only(alice):
    async with alice.change(alice.alice) as (session, server):
        await servers.apply(
            session, server, servers.EventKind.ADDRESS_PROVED, actor="t", reason="", now=alice.now
        )
        server.addresses[0].proved_at = alice.now
    assert await caa(alice) == '0 issue ";"'
    async with alice.change(alice.alice) as (_, server):
        own_account.choose(alice.settings, server, ACCOUNT)
    assert await caa(alice) == f'0 issue "ca.example; accounturi={ACCOUNT}; validationmethods=http-01"'


async def note(alice):
    """What the publication notes once the nameservers were asked."""
    leader = Publication(alice.database, alice.settings)
    await leader.look(alice.now)
    leader._seen = Observation(1, {}, 60, None)
    leader._unconfirmed.clear()
    await leader._note(leader.whole(), alice.now)
    return await alice.get(alice.alice)


@pytest.fixture
async def verified(alice):
    async with alice.change(alice.alice) as (session, server):
        await servers.apply(
            session, server, servers.EventKind.ADDRESS_PROVED, actor="t", reason="", now=alice.now
        )
        server.addresses[0].proved_at = alice.now
    return alice


async def test_the_member_may_order_when_everybody_sees_its_caa(verified, client):
    found = await note(verified)
    assert (found.named_at, found.order_due_at) == (verified.now, None), "nobody may order yet"
    assert own_account.may_order_at(found) is None
    async with client(verified.token) as http:
        view = (await http.put(f"{URL}/acme-account", json={"account_uri": ACCOUNT})).json()
        assert (view["acme_account"], view["may_order_at"]) == (ACCOUNT, None)
        found = await note(verified)
        later = verified.now + timedelta(seconds=verified.settings.dns.address_ttl)
        view = (await http.get(URL)).json()
        assert datetime.fromisoformat(view["may_order_at"]) == later
        assert f"from {later.isoformat()} on" in view["why"]
        assert "acme-account" in view["why"]
        # The same account once more changes nothing.
        again = (await http.put(f"{URL}/acme-account", json={"account_uri": ACCOUNT})).json()
        assert again["may_order_at"] == view["may_order_at"]
    async with verified.change(verified.alice) as (session, server):
        issuance.want(server, later)
        await session.flush()
        assert (server.orders, server.probe_due_at) == ([], later), (
            "there is no order, but something to be seen"
        )
        assert own_account.may_order_at(server) == verified.now


async def test_another_account_has_to_be_seen_everywhere_first(verified):
    async with verified.change(verified.alice) as (_, server):
        own_account.choose(verified.settings, server, ACCOUNT)
    await note(verified)
    async with verified.change(verified.alice) as (_, server):
        own_account.choose(verified.settings, server, ACCOUNT + "8")
        assert (server.named_at, server.order_due_at) == (None, None)


def seen(fingerprint="0a" * 32, failed=None, address=HERE, **values):
    values = {"offset": 0, "delay": 1000, "stratum": 2, "leap": 0, "asked": 2, "cookies": 2} | values
    facts = {"serial": "abc", "not_before": ENDS - 86_400, "not_after": ENDS} if fingerprint else {}
    return ProbeResult(address, failed, "", fingerprint=fingerprint, **values, **facts)


async def probe(alice, *results):
    alice.now += timedelta(minutes=1)
    async with alice.change(alice.alice) as (session, server):
        await monitoring.record(session, alice.settings, server, results, alice.now)
    return await alice.get(alice.alice)


async def test_any_valid_certificate_certifies_and_is_remembered_once(verified):
    found = await probe(verified, seen(None, Stage.CERTIFICATE))
    assert (found.state, found.orders) == (S.VERIFIED, [])
    for _ in range(2):
        found = await probe(verified, seen())
    assert found.state is S.CERTIFIED
    (order,) = found.orders
    assert (order.status, order.serial, order.chain) == (OrderStatus.ISSUED, "abc", None)
    assert int(order.not_after.timestamp()) == ENDS
    assert (order.due_at, found.order_due_at) == (None, None), "the registry has nothing to do for it"
    found = await probe(verified, seen("0b" * 32))
    assert (found.state, len(found.orders)) == (S.ACTIVE, 2), "a renewal is no event"
    assert found.addresses[0].confirmed_at == verified.now


async def test_one_that_the_pool_could_not_revoke_is_remembered_and_certifies_nothing(verified):
    found = await probe(verified, seen(failed=Stage.CERTIFICATE))
    assert (found.state, found.addresses[0].confirmed_at < verified.now) == (S.VERIFIED, True)
    assert [order.serial for order in found.orders] == ["abc"]
    assert {row.stage: row.status for row in found.stages}[Stage.CERTIFICATE] is StageStatus.FAILED


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([NAME], None),
        ([NAME, "x.member.example"], f"order one for {NAME} alone"),
        (["x.member.example"], f"order one for {NAME} alone"),
        ([NAME, HERE], f"order one for {NAME} alone"),
        ([NAME, *(f"{'a' * 60}.{number}.{'b' * 60}.example" for number in range(60))], "for other names"),
    ],
)
def test_a_certificate_has_to_be_for_the_one_name(tmp_path, names, words):
    leaf = x509.load_pem_x509_certificate(Authority(tmp_path).issue(*names).cert.read_bytes())
    why = why_irrevocable(leaf, NAME)
    assert why is None if words is None else words in why


def test_a_certificate_has_to_be_short_enough_for_a_copy(tmp_path, monkeypatch):
    leaf = x509.load_pem_x509_certificate(Authority(tmp_path).issue(NAME).cert.read_bytes())
    monkeypatch.setattr(prober, "_LEAF_LIMIT", 300)
    assert "300 characters" in why_irrevocable(leaf, NAME)


async def test_another_certificate_at_each_probe_fills_no_database(verified, monkeypatch):
    monkeypatch.setattr(monitoring, "MAX_SEEN", 3)
    for number in range(5):
        found = await probe(verified, seen(f"{number:064x}"))
    assert len(found.orders) == 3
    async with verified.change(verified.alice) as (_, server):
        server.orders[0].not_after = verified.now
        for order in server.orders:
            order.chain = "copy"
    found = await probe(verified, seen(f"{9:064x}"))
    assert [order.chain for order in found.orders] == [None, "copy", "copy", None]
    assert found.orders[-1].fingerprint == f"{9:064x}"


async def test_every_address_has_to_serve_a_valid_certificate(alice):
    server = await alice.server("carol", "198.18.0.1", "198.18.0.2", state=S.VERIFIED, agentless=True)
    async with alice.change(server) as (session, row):
        results = [seen(address="198.18.0.1"), seen(None, Stage.CERTIFICATE, "198.18.0.2")]
        await monitoring.record(session, alice.settings, row, results, alice.now)
        assert row.state is S.VERIFIED


async def test_probes_begin_when_there_may_be_a_certificate(verified, tmp_path):
    roots = x509.load_pem_x509_certificates(Authority(tmp_path / "authority").root.read_bytes())

    async def probed():
        await monitoring.probe_server(
            verified.database, verified.settings, roots, verified.alice, verified.now, Rounds(0)
        )
        return (await verified.get(verified.alice)).stages

    assert await probed() == []
    async with verified.change(verified.alice) as (_, server):
        own_account.choose(verified.settings, server, ACCOUNT)
    await note(verified)
    stages = {row.stage: row.status for row in await probed()}
    assert stages[Stage.TCP] is StageStatus.FAILED


async def test_what_is_to_be_done_by_hand_is_told(alice):
    async with alice.database.transaction() as session:
        server = await servers.find(session, "alice")
        pool = await the_pool(session, alice.settings)
        views = {view.stage: view for view in explain(server, pool, alice.settings, active=0)}
    assert views[Stage.NAME].status is StageStatus.MET
    assert "proofs" in views[Stage.ADDRESSES].remedy
    assert "pool-agent" not in "".join(view.remedy for view in views.values())


async def test_the_removal_ends_and_the_receipt_does_not_claim_what_was_not_done(verified):
    await probe(verified, seen())
    async with verified.change(verified.alice) as (session, server):
        server.burnt_at = verified.now
        await servers.leave(session, server, actor="user 1", reason="enough", now=verified.now)
    await removal.advance(verified.database, verified.settings, None, verified.alice, verified.now)
    found = await verified.get(verified.alice)
    assert (found.state, found.removal_error) == (S.LEAVING, None), "DNS is still to come, nothing else"
    async with verified.change(verified.alice) as (_, server):
        server.srv_withdrawn_at = server.name_broken_at = verified.now
    await removal.advance(verified.database, verified.settings, None, verified.alice, verified.now)
    found = await verified.get(verified.alice)
    receipt = removal.receipt(found, verified.settings)
    assert found.state is S.REMOVED
    assert (receipt.certificate_revoked_at, receipt.authorization_deactivated_at) == (None, None)
    assert int(receipt.last_certificate_ends_at.timestamp()) == ENDS
    assert (
        f"not revoked, and stays valid until {receipt.last_certificate_ends_at.isoformat()}"
        in receipt.exposure
    )
    async with verified.database.transaction() as session:
        assert (await session.scalars(select(Order))).one().revoked_at is None
