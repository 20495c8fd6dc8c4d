"""Looking at a server from outside on request: real servers, relays and web servers, good and bad; and what follows: nothing."""

import socket
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from sqlalchemy import select

from lab.certificates import Authority
from lab.processes import free_port
from lab.programs import AgentServer
from lab.relay import Relay
from lab.web import WebServer, http, says
from member_agent.challenges import Responder
from nts_core.association import MAX_REQUEST
from nts_core.control import ACME_PATH, CheckStatus, ProofWay, ServerState, Validation
from poolsvc import inspection
from poolsvc.errors import RateLimited
from poolsvc.inspection import Check, Inspector
from poolsvc.models import Order, OrderStatus, SampleRecord

HERE, NAME = "127.0.0.1", "alice.servers.pool.example"
NOW = datetime.now(UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
OK, FAILED, SKIPPED = CheckStatus
NTP = (Check.NTP_PLAIN, Check.NTS_SHORT, Check.NTS_LONG, Check.CLOCK)


@pytest.fixture
def database_url(sqlite_url):
    """What looks at a network looks the same on both engines."""
    return sqlite_url


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The agent's own server, which sends its clients to a relay for NTP."""
    authority = Authority(tmp_path_factory.mktemp("authority"))
    pair = authority.issue(NAME)
    relayed, direct = free_port(HERE), free_port(HERE)
    with ExitStack() as stack:
        relay = Relay(HERE, ke=(free_port(HERE), (HERE, direct)), ntp=(relayed, (HERE, direct)))
        options = ["--local-stratum=10", f"--ntp-server={HERE}:{relayed}"]
        server = AgentServer(tmp_path_factory.mktemp("server"), pair, *options, ntp=[f"{HERE}:{direct}"])
        stack.enter_context(server)
        stack.enter_context(relay)
        roots = x509.load_pem_x509_certificates(authority.root.read_bytes())
        yield SimpleNamespace(authority=authority, pair=pair, server=server, relay=relay, roots=roots)


@pytest.fixture
def relay(world):
    world.relay.loss, world.relay.longest = 0.0, 10_000
    return world.relay


@pytest.fixture
async def responder():
    async with Responder([NAME]) as responder:
        await responder.listen((HERE, 0))
        yield responder


def facts(pair):
    leaf = x509.load_pem_x509_certificate(pair.cert.read_bytes())
    return {
        "fingerprint": leaf.fingerprint(hashes.SHA256()).hex(),
        "not_before": leaf.not_valid_before_utc,
        "not_after": leaf.not_valid_after_utc,
    }


@pytest.fixture
async def alice(registry, tuned, world, relay):
    """The server at 127.0.0.1 with the certificate that it was ordered; `look` looks at it."""
    identifier = await registry.server("alice", HERE, state=ServerState.ACTIVE)

    async def order(**values):
        async with registry.database.transaction("test") as session:
            row = {"status": OrderStatus.ISSUED, "created_at": NOW, **facts(world.pair), **values}
            session.add(Order(server_id=identifier, **row))

    async def look(http_port=None, *, ke_port=None, tls_port=443, now=NOW, **policy):
        settings = tuned(
            ports={
                "http": http_port or free_port(HERE),
                "ke": world.server.ke_port if ke_port is None else ke_port,
                "tls": tls_port,
            },
            **{"max_stratum": 15, **policy},
        )
        server = await registry.get(identifier)
        findings = await Inspector(settings, world.roots).inspect(server, now)
        for finding in findings:
            assert bool(finding.remedy) == (finding.status is FAILED), finding
            assert finding.status is OK or finding.detail, finding
        return {(finding.address, finding.check): finding for finding in findings}

    return SimpleNamespace(id=identifier, registry=registry, order=order, look=look)


def port_of(responder):
    return responder.endpoints[0][1]


def statuses(found, *checks):
    return [found[HERE, check].status for check in checks or Check]


async def test_a_good_server_passes_every_check(alice, responder):
    await alice.order()
    found = await alice.look(port_of(responder))
    passed = [finding.status for (_, check), finding in found.items() if check is not Check.TLS_ALPN]
    assert passed == [OK] * (len(Check) - 1), found
    assert statuses(found, Check.TLS_ALPN) == [SKIPPED]
    assert list(found) == [(HERE, check) for check in Check]
    assert found[HERE, Check.CERTIFICATE].detail.startswith("valid until ")
    assert found[HERE, Check.NTP_PLAIN].detail == "48 octets pass"
    sizes = [int(found[HERE, check].detail.split()[0]) for check in (Check.NTS_SHORT, Check.NTS_LONG)]
    assert 150 < sizes[0] < 300
    assert 900 < sizes[1] <= MAX_REQUEST
    assert found[HERE, Check.CLOCK].detail.endswith("stratum 10")


async def test_nothing_follows_from_a_check(alice):
    before = await alice.registry.get(alice.id)
    found = await alice.look(ke_port=free_port(HERE))
    assert FAILED in statuses(found)
    after = await alice.registry.get(alice.id)
    assert (after.state, after.addresses[0].score, after.stages) == (before.state, 12.0, [])
    assert (after.probe_due_at, after.addresses[0].confirmed_at) == (
        before.probe_due_at,
        before.addresses[0].confirmed_at,
    )
    async with alice.registry.database.transaction() as session:
        assert list(await session.scalars(select(SampleRecord))) == []


async def test_where_nothing_runs_the_ports_are_closed_and_the_rest_is_not_reached(alice):
    found = await alice.look(ke_port=free_port(HERE))
    assert statuses(found, Check.HTTP, Check.HOST, Check.TCP) == [FAILED, SKIPPED, FAILED]
    assert "closed" in found[HERE, Check.HTTP].detail
    assert "Connection refused" in found[HERE, Check.TCP].detail
    assert found[HERE, Check.HOST].detail == "after http failed"
    for check in list(Check)[list(Check).index(Check.TLS) :]:
        assert found[HERE, check].detail == "after tcp failed"


@pytest.mark.parametrize(
    ("longest", "lost", "passes"),
    [(900, [Check.NTS_LONG], 228), (100, [Check.NTS_SHORT, Check.NTS_LONG], 48), (0, list(NTP[:3]), 0)],
)
async def test_a_way_that_drops_long_packets_is_told_by_the_size(
    alice, relay, responder, monkeypatch, longest, lost, passes
):
    monkeypatch.setattr(inspection, "_TRIES", 1)
    await alice.order()
    relay.longest = longest
    found = await alice.look(port_of(responder))
    assert [check for check in NTP[:3] if found[HERE, check].status is FAILED] == lost
    for check in lost:
        is_told = f"while {passes} octets pass" in found[HERE, check].detail
        assert is_told is (passes > 0), found[HERE, check]
        assert (
            "long NTP packets let" in found[HERE, check].remedy or "drops long" in found[HERE, check].remedy
        ) is (passes > 0)
    assert found[HERE, Check.CLOCK].status is (OK if Check.NTS_SHORT not in lost else SKIPPED)


async def test_one_lost_packet_of_a_size_is_made_up_for(alice, relay, responder):
    await alice.order()
    fates = iter([False] * 3 + [True] * 6)
    relay.passes = lambda _octets: next(fates)
    try:
        found = await alice.look(port_of(responder))
    finally:
        del relay.passes
    assert statuses(found, *NTP) == [OK] * 4
    assert next(fates, None) is None


PAGE = http("200 OK", b"<html>It works!</html>")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (PAGE, "a host that is not its own"),
        (http("200 OK", b"x" * 100_000), "a host that is not its own"),
        (http("301 Moved Permanently", more="Location: http://127.0.0.1:1/\r\n"), "301 for alice"),
        (http("200 OK"), "200 for alice"),
        (http("503 Service Unavailable", b"\x1b[31m"), "503 for alice"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "for alice.servers.pool.example: no HTTP answer"),
        (b"", "for alice.servers.pool.example: no HTTP answer"),
    ],
)
async def test_who_else_answers_on_the_http_port_is_found(alice, answer, words):
    async with WebServer(says(answer)) as web:
        found = await alice.look(web.port, ke_port=free_port(HERE))
        assert len(web.heads) <= 2
    assert statuses(found, Check.HTTP, Check.HOST) == [OK, FAILED]
    assert words in found[HERE, Check.HOST].detail
    assert found[HERE, Check.HOST].detail.isprintable()


async def test_a_challenge_that_is_open_has_to_be_answered_with_what_the_ca_expects(alice, responder):
    await alice.order()
    challenge = {"token": "T" * 43, "key_authorization": f"{'T' * 43}.{'U' * 43}", "served_at": NOW}
    await alice.order(status=OrderStatus.PENDING, fingerprint=None, **challenge)
    silent = await alice.look(port_of(responder), ke_port=free_port(HERE))
    assert "404 for alice" in silent[HERE, Check.HOST].detail
    responder.publish(NAME, ACME_PATH + challenge["token"], challenge["key_authorization"].encode())
    found = await alice.look(port_of(responder), ke_port=free_port(HERE))
    assert statuses(found, Check.HOST) == [OK]
    assert "challenge that is open" in found[HERE, Check.HOST].detail


async def test_a_port_that_swallows_what_comes_is_told_from_a_closed_one(alice, monkeypatch):
    monkeypatch.setattr(inspection, "_CONNECT", 0.3)
    with socket.socket() as full, ExitStack() as stack:
        full.bind((HERE, 0))
        full.listen(0)
        for _ in range(4):  # more than the queue holds: the kernel drops whoever comes then
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        found = await alice.look(full.getsockname()[1], ke_port=free_port(HERE))
    assert found[HERE, Check.HTTP].status is FAILED
    assert "timeout" in found[HERE, Check.HTTP].detail


async def test_a_server_that_says_nothing_costs_no_more_than_the_deadline(alice, monkeypatch):
    monkeypatch.setattr(inspection, "DEADLINE", 0.5)

    with socket.create_server((HERE, 0)) as silent:
        port = silent.getsockname()[1]
        found = await alice.look(port, ke_port=port)
    assert statuses(found, Check.HTTP) == [OK]
    port_only = (Check.HTTP, Check.TLS_ALPN)
    rest = [finding for (_, check), finding in found.items() if check not in port_only]
    assert {(finding.status, finding.detail) for finding in rest} == {
        (SKIPPED, "there was no time left for it")
    }


async def test_a_certificate_that_the_pool_did_not_order_fails(alice):
    await alice.order(fingerprint="0" * 64)
    found = await alice.look()
    assert statuses(found, Check.TLS, Check.CERTIFICATE, Check.KE) == [OK, FAILED, OK]
    assert "not one that the pool ordered" in found[HERE, Check.CERTIFICATE].detail


async def test_one_of_another_name_fails(alice, world, tmp_path):
    with AgentServer(tmp_path, world.authority.issue("bob.servers.pool.example")) as server:
        found = await alice.look(ke_port=server.ke_port)
    assert statuses(found, Check.TLS, Check.CERTIFICATE, Check.KE) == [OK, FAILED, SKIPPED]
    assert found[HERE, Check.KE].detail == "after certificate failed"


async def test_one_that_is_about_to_end_fails_and_one_before_the_newest_is_told(alice):
    await alice.order()
    late = await alice.look(now=NOW + 9 * DAY)
    assert statuses(late, Check.CERTIFICATE) == [FAILED]
    assert "not renewed" in late[HERE, Check.CERTIFICATE].detail
    await alice.order(fingerprint="f" * 64)
    found = await alice.look()
    assert statuses(found, Check.CERTIFICATE) == [OK]
    assert "a newer one is not installed yet" in found[HERE, Check.CERTIFICATE].detail


async def test_a_bad_clock_is_told_with_what_was_seen(alice):
    await alice.order()
    found = await alice.look(max_stratum=3)
    assert statuses(found, Check.NTS_LONG, Check.CLOCK) == [OK, FAILED]
    assert "stratum 10" in found[HERE, Check.CLOCK].detail


async def test_only_addresses_that_are_proved_or_were_called_from_are_looked_at(alice, registry):
    """The member has listed another address, which is anybody's."""
    one, other = "127.77.7.6", "127.77.7.7"
    identifier = await registry.server("bob", one, other)
    async with registry.change(identifier) as (_, server):
        server.addresses[0].called_at = NOW - HOUR
        server.addresses[1].called_at = NOW - HOUR + timedelta(seconds=1)
        assert inspection.addresses_of(server, NOW) == [other]
        server.addresses[1].called_at = None
        server.addresses[0].proved_at = NOW
        assert inspection.addresses_of(server, NOW) == [one]


async def test_an_address_that_opted_out_since_is_not_dialled(alice, responder):
    found = await alice.look(port_of(responder), refused_prefixes=(ip_network("127.0.0.0/8"),))
    for check in (Check.HTTP, Check.TCP):
        assert found[HERE, check].status is FAILED
        assert found[HERE, check].detail.startswith("not dialled")


async def test_an_agentless_server_may_have_any_web_server(alice):
    async with alice.registry.change(alice.id) as (_, server):
        server.agentless = True
    async with WebServer(says(PAGE)) as web:
        found = await alice.look(web.port)
        assert web.heads == []
    assert statuses(found, Check.HTTP, Check.HOST, Check.CERTIFICATE) == [OK, SKIPPED, OK]


async def test_a_host_that_answers_by_tls_needs_that_port_and_no_http(alice):
    async with alice.registry.change(alice.id) as (_, server):
        server.validation = Validation.TLS_ALPN_01
        server.addresses[0].proof_by = ProofWay.TLS
    with socket.create_server((HERE, 0)) as there:
        found = await alice.look(tls_port=there.getsockname()[1])
    assert statuses(found, Check.HTTP, Check.HOST, Check.TLS_ALPN) == [SKIPPED, SKIPPED, OK]
    found = await alice.look(tls_port=free_port(HERE))
    assert statuses(found, Check.HTTP, Check.TLS_ALPN) == [SKIPPED, FAILED]
    assert "closed" in found[HERE, Check.TLS_ALPN].detail
    async with alice.registry.change(alice.id) as (_, server):
        server.addresses[0].proof_by = ProofWay.HTTP
    assert statuses(await alice.look(), Check.HTTP) == [FAILED], "the address is proved there"


@pytest.mark.parametrize("origin", ["http://127.0.0.1:8080", "http://127.0.0.1:9", None])
async def test_a_web_server_that_redirects_has_to_lead_the_ca_to_the_registry(alice, origin):
    async with alice.registry.change(alice.id) as (_, server):
        server.validation = Validation.REDIRECT

    async def redirect(reader, writer):
        path = web.heads[-1].split()[1]
        writer.write(PAGE if origin is None else http("302 Found", more=f"Location: {origin}{path}\r\n"))

    async with WebServer(redirect) as web:
        found = await alice.look(web.port)
    is_right = origin == alice.registry.settings.public_url
    assert statuses(found, Check.HTTP, Check.HOST) == [OK, OK if is_right else FAILED]
    assert is_right or "redirect /.well-known/acme-challenge/" in found[HERE, Check.HOST].remedy


def test_so_many_at_a_time_and_no_more(settings):
    inspector = Inspector(settings, [])
    with ExitStack() as stack:
        for _ in range(inspection.MAX_AT_ONCE):
            stack.enter_context(inspector.place())
        with pytest.raises(RateLimited), inspector.place():
            pass
    with inspector.place():
        pass
