"""How a host answers the CA: by HTTP-01, by TLS-ALPN-01, or by a redirect to the registry; at a strict Pebble, with real servers."""

import hashlib
from contextlib import asynccontextmanager
from datetime import timedelta

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from lab.certificates import Authority, challenge_pair
from lab.processes import free_port
from lab.web import WebServer, by_tls, http, says
from nts_core.acme import AcmeError, Challenge
from nts_core.certificates import ChainError, check_challenge_certificate
from nts_core.control import ACME_ALPN, ACME_PATH, ServerState, Validation
from nts_core.tls import new_key_and_csr
from poolsvc import issuance, validation
from poolsvc.acme_process import RULES, Charge
from poolsvc.app import create_app
from poolsvc.db import Database
from poolsvc.derived import RegistryKey
from poolsvc.models import Order, OrderStatus, Server
from poolsvc.outbound import FetchError
from poolsvc.publication import Publication

S, ST, V = ServerState, OrderStatus, Validation
HERE = "127.0.0.1"
NAME = "alice.servers.pool.example"
BOTH = pytest.mark.parametrize("engine", ["sqlite", "postgresql"], indirect=True)
AUTHORIZATION = "t" * 43 + "." + "k" * 43
DIGEST = hashlib.sha256(AUTHORIZATION.encode()).hexdigest()


def told(flow, server, by, account=None):
    """What follows from an agent's report."""
    issuance.note_agent(flow.settings, server, by, account, flow.now)


def with_ports(settings, **ports):
    return settings.model_copy(update={"ports": settings.ports.model_copy(update=ports)})


@pytest.fixture
async def flow_by(flow):
    """Makes a Flow whose host answers in some way, in CAA as well."""

    async def make(by, **options):
        tls_port = free_port()
        made = await flow(tls_port=tls_port, **options)
        made.settings = made.registry.settings = with_ports(made.settings, tls=tls_port)
        async with made.registry.change(made.server_id) as (_, server):
            told(made, server, by)
            server.named_at = made.now
        return made

    return make


@asynccontextmanager
async def serving_by_tls(flow, tmp_path):
    """The agent shows what the registry relays, and says so."""
    (challenge,) = issuance.tls_challenges(await flow.server())
    pair = challenge_pair(tmp_path, NAME, challenge.digest)
    async with WebServer(says(b""), port=flow.settings.ports.tls, tls=by_tls(pair, ACME_ALPN)) as web:
        async with flow.registry.change(flow.server_id) as (_, server):
            issuance.note_serving(server, ("another", challenge.digest), flow.now)
        yield web


@BOTH
async def test_the_agent_answers_by_tls_with_the_digest_alone(flow_by, tmp_path, caa):
    """At a CA that obeys CAA, which is as the publication would have it."""
    flow = await flow_by(V.TLS_ALPN_01, front={})
    account = await flow.account()
    await flow.registry.open_account(account.uri)
    leader = Publication(flow.database, flow.settings)
    await leader.look(flow.now)
    caa[f"{NAME}."] = list(leader.whole()[f"{NAME}.", "CAA"].rdatas)
    await flow.begin()
    order = await flow.step(account)
    assert (order.status, order.validation, order.due_at) == (ST.PENDING, V.TLS_ALPN_01, None)
    server = await flow.server()
    assert issuance.challenges(server) == (), "the key authorization stays here"
    async with flow.registry.change(flow.server_id) as (_, row):
        issuance.note_serving(row, (order.token,), flow.now)
    assert (await flow.order()).served_at is None, "that is how HTTP-01 is named"
    async with serving_by_tls(flow, tmp_path) as web:
        assert (await flow.step(account)).status is ST.ANSWERED
        assert (await flow.until(ST.ISSUED)).error is None
        assert web.connections == 1 + 3, "the registry looks once, Pebble three times"
    assert (await flow.step(account)).deactivated_at is not None
    assert issuance.tls_challenges(await flow.server()) == ()
    assert flow.ca.refusals == []


async def test_without_the_method_in_caa_the_ca_refuses(flow_by, tmp_path, caa):
    flow = await flow_by(V.TLS_ALPN_01, front={})
    account = await flow.account()
    caa[f"{NAME}."] = [f'0 issue "ca.example; accounturi={account.uri}; validationmethods=http-01"']
    await flow.begin()
    await flow.step(account)
    async with serving_by_tls(flow, tmp_path):
        await flow.step(account)
        order = await flow.until(ST.FAILED)
    assert "caa" in order.error


async def test_a_host_that_does_not_show_it_is_told_to_no_ca(flow_by):
    flow = await flow_by(V.TLS_ALPN_01)
    account = await flow.account()
    await flow.begin()
    order = await flow.step(account)
    (challenge,) = issuance.tls_challenges(await flow.server())
    async with flow.registry.change(flow.server_id) as (_, server):
        issuance.note_serving(server, (challenge.digest,), flow.now)
    order = await flow.step(account)
    assert order.status is ST.PENDING
    assert order.error.startswith("precheck: no TLS answer")


def placed(by=V.TLS_ALPN_01):
    return Order(status=ST.PENDING, validation=by, token=AUTHORIZATION[:43], key_authorization=AUTHORIZATION)


async def look(registry, server_id, order, **ports):
    settings = with_ports(registry.settings, **ports)
    await validation.look(settings, order, await registry.get(server_id))


@pytest.fixture
async def here(sqlite_url, settings, registry_of):
    """A registry with the server alice at 127.0.0.1, on one engine: none of this is the database's."""
    database = Database(sqlite_url)
    registry = registry_of(database, settings)
    registry.alice = await registry.server("alice", HERE, state=S.VERIFIED)
    yield registry
    await database.close()


@pytest.mark.parametrize(
    ("names", "digest", "protocols", "error"),
    [
        (NAME, DIGEST, (ACME_ALPN,), None),
        (NAME, DIGEST, ("ntske/1", ACME_ALPN), None),
        (NAME, "00" * 32, (ACME_ALPN,), "answers another challenge"),
        (NAME, DIGEST[:62], (ACME_ALPN,), "answers another challenge"),
        ("bob.servers.pool.example", DIGEST, (ACME_ALPN,), "not alice.servers.pool.example alone"),
        (NAME, DIGEST, ("h2", "http/1.1"), "does not speak acme-tls/1"),
        (NAME, DIGEST, (), "does not speak acme-tls/1"),
        (NAME, None, (ACME_ALPN,), "not a certificate for TLS-ALPN-01"),
    ],
)
async def test_what_a_host_shows_by_tls_is_looked_at_as_a_ca_does(
    here, tmp_path, names, digest, protocols, error
):
    pair = Authority(tmp_path).issue(names) if digest is None else challenge_pair(tmp_path, names, digest)
    async with WebServer(says(b""), tls=by_tls(pair, *protocols)) as web:
        if error is None:
            await look(here, here.alice, placed(), tls=web.port)
            return
        with pytest.raises(FetchError, match=error):
            await look(here, here.alice, placed(), tls=web.port)


@pytest.mark.parametrize(
    "octets", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"\0" * 70_000]
)
async def test_what_is_no_tls_is_an_answer_with_words_and_an_end(here, octets):
    async with WebServer(says(octets), until=b"\x03") as web:
        with pytest.raises(FetchError, match="no TLS answer") as caught:
            await look(here, here.alice, placed(), tls=web.port)
    assert str(caught.value).isprintable()


async def test_every_published_address_has_to_show_it(here, tmp_path):
    two = await here.server("bob", HERE.replace("0.0.1", "0.0.2"), "127.0.0.3", state=S.VERIFIED)
    pair = challenge_pair(tmp_path, "bob.servers.pool.example", DIGEST)
    async with WebServer(says(b""), address="127.0.0.2", tls=by_tls(pair, ACME_ALPN)) as web:
        with pytest.raises(FetchError, match="no TLS answer"):
            await look(here, two, placed(), tls=web.port)


def test_the_certificate_of_a_challenge_is_nothing_else(tmp_path):
    pair = challenge_pair(tmp_path, NAME, DIGEST)
    der = x509.load_pem_x509_certificate(pair.cert.read_bytes()).public_bytes(Encoding.DER)
    check_challenge_certificate(der, NAME, DIGEST)
    place = der.index(bytes.fromhex("06082b0601050507011f0101ff"))
    loose = der[: place + 12] + b"\0" + der[place + 13 :]
    for octets in (b"", b"\x30\x80", der[:-40], loose, b"\0" * 100_000):
        with pytest.raises(ChainError):
            check_challenge_certificate(octets, NAME, DIGEST)


def test_the_process_with_the_key_orders_by_tls_for_servers_alone(settings):
    charge = Charge.of(settings, settings.ca)
    order = {"csr_pem": new_key_and_csr(NAME)[1], "challenge": Challenge.TLS_ALPN_01}
    RULES["order"](charge, order | {"domain": NAME})
    with pytest.raises(AcmeError, match="not a server"):
        RULES["order"](charge, order | {"domain": "registry.example.net"})


def redirecting(target):
    """A web server with the one rule that members are told to write."""

    async def serve(reader, writer):
        path = web.heads[-1].split(" ")[1]
        writer.write(http("301 Moved Permanently", more=f"Location: {target(path)}\r\n"))
        await writer.drain()

    web = WebServer(serve)
    return web


@asynccontextmanager
async def registry_at(flow):
    """The registry's own API on a port."""
    app = create_app(flow.settings, flow.database, [], RegistryKey(bytes(32)))

    async def serve(_reader, writer):
        transport = httpx.ASGITransport(app, client=("192.0.2.1", 40_000))
        async with httpx.AsyncClient(transport=transport, base_url="https://registry") as client:
            answer = await client.get(web.heads[-1].split(" ")[1])
        kind = f"Content-Type: {answer.headers['Content-Type']}\r\n"
        writer.write(http(f"{answer.status_code} {answer.reason_phrase}", answer.content, kind))
        await writer.drain()

    web = WebServer(serve, port=int(flow.settings.public_url.rpartition(":")[2]))
    async with web:
        yield web


@BOTH
async def test_where_the_host_redirects_the_registry_answers_the_ca(flow_by):
    url = f"http://127.0.0.1:{free_port()}"
    async with redirecting(lambda path: url + path) as web:
        flow = await flow_by(V.REDIRECT, http_port=web.port)
        settings = with_ports(flow.settings, http=web.port).model_copy(update={"public_url": url})
        flow.settings = flow.registry.settings = settings
        async with registry_at(flow) as registry:
            account = await flow.account()
            await flow.begin()
            order = await flow.step(account)
            assert (order.status, order.due_at) == (ST.PENDING, flow.now), "nobody has to be waited for"
            server = await flow.server()
            assert (issuance.challenges(server), issuance.tls_challenges(server)) == ((), ())
            assert (await flow.step(account)).status is ST.ANSWERED
            await flow.until(ST.ISSUED)
            assert web.connections - registry.connections == 1, "the registry knows what it would say"
            answered = registry.heads[0].split(" ")[1]
            assert answered == ACME_PATH + order.token
            async with httpx.AsyncClient(trust_env=False) as client:
                assert (await client.get(url + answered)).status_code == 404, "the order is over"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (
            http(
                "302 Found", more=f"Location: https://registry.example.net{ACME_PATH}{AUTHORIZATION[:43]}\r\n"
            ),
            None,
        ),
        (http("200 OK", AUTHORIZATION.encode()), None),
        (
            http("302 Found", more=f"Location: https://elsewhere.example{ACME_PATH}{AUTHORIZATION[:43]}\r\n"),
            "elsewhere",
        ),
        (
            http("302 Found", more="Location: https://registry.example.net/\r\n"),
            "does not lead the CA to https://registry.example.net/.well-known",
        ),
        (
            http("302 Found", more=f"Location: {ACME_PATH}{AUTHORIZATION[:43]}\r\n"),
            "does not lead the CA to https://registry.example.net/.well-known",
        ),
        (http("302 Found"), "but to nowhere"),
        (http("302 Found", more=f"Location: {'x' * 5000}\r\n"), "but to xxx"),
        (http("304 Not Modified"), "HTTP status 304"),
        (http("200 OK", b"<html>It works!</html>"), "something else"),
        (http("404 Not Found"), "HTTP status 404"),
    ],
)
async def test_a_redirect_has_to_lead_to_the_registry_and_nowhere_else(here, answer, error):
    here.settings = here.settings.model_copy(update={"public_url": "https://registry.example.net"})
    async with WebServer(says(answer)) as web:
        if error is None:
            await look(here, here.alice, placed(V.REDIRECT), http=web.port)
            return
        with pytest.raises(FetchError, match=error) as caught:
            await look(here, here.alice, placed(V.REDIRECT), http=web.port)
    assert len(caught.value.detail) <= 1000


async def test_for_http_01_no_redirect_is_followed(here):
    here.settings = here.settings.model_copy(update={"public_url": "https://registry.example.net"})
    target = f"https://registry.example.net{ACME_PATH}{AUTHORIZATION[:43]}"
    async with WebServer(says(http("302 Found", more=f"Location: {target}\r\n"))) as web:
        with pytest.raises(FetchError, match="HTTP status 302"):
            await look(here, here.alice, placed(V.HTTP_01), http=web.port)


async def test_the_registry_answers_for_open_challenges_of_hosts_that_redirect_alone(registry, call):
    alice = await registry.server("alice", "198.18.0.1", state=S.VERIFIED)
    tokens = {}
    cases = [(by, status) for by in V for status in ST]
    async with registry.change(alice) as (_, server):
        for number, (by, status) in enumerate(cases):
            order = placed(by)
            order.server_id, order.created_at, order.status = alice, registry.now, status
            order.token = f"{number:043}"
            order.key_authorization = f"{order.token}.{'k' * 43}"
            tokens[order.token] = by is V.REDIRECT and status in (ST.PENDING, ST.ANSWERED)
            server.orders.append(order)
    for token, is_answered in tokens.items():
        answer = await call(None, "GET", ACME_PATH + token)
        assert (answer.status_code == 200) is is_answered, token
        if is_answered:
            assert answer.text == f"{token}.{'k' * 43}"
            assert answer.headers["Content-Type"].startswith("text/plain")
            assert answer.headers["Cache-Control"] == "no-store"


async def test_what_is_no_token_is_not_looked_for_nor_said_again(registry, call):
    tail = "A" * 30
    for path in (
        "",
        "x",
        tail * 5,
        tail * 200,
        "%00" * 30,
        f"%3Cscript%3E{tail}",
        f"{tail}/../x",
        "ä" * 30,
        f"{tail}=",
    ):
        answer = await call(None, "GET", ACME_PATH + path)
        assert answer.status_code == 404, path
        assert "script" not in answer.text
        assert tail not in answer.text
    assert (await call(None, "POST", ACME_PATH + tail)).status_code == 405


def test_what_an_agent_says_that_is_no_way_counts_as_http_01():
    assert validation.said("tls-alpn-01") is V.TLS_ALPN_01
    assert validation.said("dns-01") is V.DNS_01
    for text in ("", "DNS-01", "TLS-ALPN-01", "tls-alpn-01 ", "x" * 10_000):
        assert validation.said(text) is V.HTTP_01


@pytest.mark.parametrize("lets", [True, False])
async def test_a_host_that_answers_no_ca_is_answered_for_in_dns_where_the_pool_does_that(flow_by, lets):
    flow = await flow_by(V.HTTP_01)
    policy = flow.settings.policy.model_copy(update={"dns_01": lets})
    flow.settings = flow.registry.settings = flow.settings.model_copy(update={"policy": policy})
    async with flow.registry.change(flow.server_id) as (_, server):
        told(flow, server, V.DNS_01)
        assert (server.validation, server.dns_01) == (V.DNS_01, False)
        assert (server.named_at is None) is lets, "CAA comes first, if it is another one"
        assert validation.is_in_dns(flow.settings, server) is lets
        assert validation.challenge_for(flow.settings, server) is (
            Challenge.DNS_01 if lets else Challenge.HTTP_01
        )
        assert validation.allowed(flow.settings, server) == validation.methods(V.DNS_01, in_dns=lets)
        told(flow, server, V.HTTP_01)
        assert validation.challenge_for(flow.settings, server) is Challenge.HTTP_01


def test_caa_lets_what_is_used_and_no_more():
    lets = {
        (by, in_dns): ",".join(validation.methods(by, in_dns=in_dns)) for by in V for in_dns in (False, True)
    }
    assert lets == {
        (V.HTTP_01, False): "http-01",
        (V.REDIRECT, False): "http-01",
        (V.TLS_ALPN_01, False): "http-01,tls-alpn-01",
        (V.DNS_01, False): "http-01",
        (V.HTTP_01, True): "http-01,dns-01",
        (V.REDIRECT, True): "http-01,dns-01",
        (V.DNS_01, True): "http-01,dns-01",
        (V.TLS_ALPN_01, True): "http-01,tls-alpn-01,dns-01",
    }


@pytest.mark.parametrize("by", [V.TLS_ALPN_01, V.REDIRECT])
async def test_an_order_that_the_host_answers_no_more_is_dropped_and_ended_at_the_ca(flow_by, by):
    flow = await flow_by(V.HTTP_01)
    await flow.begin()
    order = await flow.step(await flow.account())
    assert order.status is ST.PENDING
    async with flow.registry.change(flow.server_id) as (_, server):
        told(flow, server, by)
        is_caa_to_change = by is V.TLS_ALPN_01
        assert (server.named_at is None) is is_caa_to_change
        if is_caa_to_change:
            assert server.order_due_at is None, "CAA comes first"
        else:
            assert server.order_due_at == order.created_at + flow.settings.policy.order_wait(0)
        told(flow, server, by)
    dropped = await flow.order()
    assert (dropped.status, dropped.error) == (ST.FAILED, f"its host answers by {by} now")
    assert (await flow.step()).deactivated_at is not None


async def test_whoever_changes_again_and_again_waits_longer_each_time(flow_by):
    flow = await flow_by(V.HTTP_01)
    account, waits = await flow.account(), []
    for by in (V.REDIRECT, V.HTTP_01, V.REDIRECT):
        await flow.begin()
        created = (await flow.step(account)).created_at
        async with flow.registry.change(flow.server_id) as (_, server):
            told(flow, server, by)
            waits.append(server.order_due_at - created)
            server.order_due_at = None
        flow.now += timedelta(seconds=1)
    assert waits == [flow.settings.policy.order_wait(number) for number in range(3)]


@pytest.mark.parametrize("status", [ST.WANTED, ST.REQUESTED])
async def test_an_order_that_no_ca_has_seen_takes_the_new_way_if_caa_lets_it(flow_by, status):
    flow = await flow_by(V.HTTP_01)
    await flow.begin()
    async with flow.registry.change(flow.server_id) as (_, server):
        server.orders[-1].status = status
        told(flow, server, V.REDIRECT)
        assert server.orders[-1].status is status
        told(flow, server, V.TLS_ALPN_01)
        assert (server.orders[-1].status, server.orders[-1].due_at) == (ST.FAILED, None)


async def test_what_the_ca_looks_at_already_and_what_the_registry_answers_in_dns_goes_on(flow_by):
    flow = await flow_by(V.HTTP_01)
    await flow.begin()
    async with flow.registry.change(flow.server_id) as (_, server):
        server.orders[-1].status = ST.ANSWERED
        told(flow, server, V.REDIRECT)
        assert server.orders[-1].status is ST.ANSWERED
        server.orders[-1].status, server.orders[-1].txt = ST.PENDING, "text"
        told(flow, server, V.TLS_ALPN_01)
        assert server.orders[-1].status is ST.PENDING


def test_a_name_that_dns_never_had_waits_for_nothing_to_be_forgotten(settings):
    server = Server(name="alice", validation=V.HTTP_01, caa_changed=False, orders=[], agentless=False)
    issuance.note_agent(settings, server, V.TLS_ALPN_01, None, None)
    assert (server.validation, server.caa_changed) == (V.TLS_ALPN_01, False)
