"""What the registry dials, and what it makes of those who answer: real sockets, hostile peers."""

import asyncio
import base64
import gzip
import ipaddress
import socket
import ssl
import subprocess
import sys
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from lab.certificates import Authority
from lab.processes import free_port
from lab.saboteur import NAME as SABOTEUR
from lab.saboteur import Saboteur
from lab.saboteur.server import KeSabotage
from lab.web import WebServer, http, says
from nts_core.client import load_roots
from nts_core.control import Stage
from nts_core.records import Record, RecordType, encode
from nts_core.tls import Trust
from poolsvc import monitoring, outbound, proofs
from poolsvc.errors import AddressRefused, InvalidAddress
from poolsvc.models import Order, OrderStatus
from poolsvc.outbound import MAX_ADDRESSES, Answer, FetchError, Guard, Outbound, http_origin
from poolsvc.prober import probe
from poolsvc.rounds import Rounds

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
HERE = "127.0.0.1"
NAME = "alice.servers.pool.example"
PUBLIC, PUBLIC_TOO = "8.8.8.8", "2001:4860:4860::8888"


@pytest.fixture
def strict(settings):
    """As in production."""
    return settings.model_copy(update={"allow_private_addresses": False})


class Names:
    """A resolver that gives its answers in turn, the last one for ever, and keeps the questions."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    async def __call__(self, host, port):
        self.asked.append((host, port))
        return self.answers[min(len(self.asked), len(self.answers)) - 1]


async def get(settings, url, *, deadline=5.0, limit=256, host=None, **seams):
    return await Outbound(settings, **seams).get(url, host=host, deadline=deadline, limit=limit)


@pytest.fixture
def fetched(settings):
    """`fetched(serve)`: what comes of asking a server on loopback."""

    async def fetch(serve, *, deadline=5.0, limit=256):
        async with WebServer(serve) as web:
            return await get(settings, f"http://{HERE}:{web.port}/x", deadline=deadline, limit=limit)

    return fetch


# What IANA has set aside in its registries of special-purpose addresses, and what is not unicast.
SPECIAL = [
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
    *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
    *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
    *("::/8", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32"),
    *("2002::/16", "3fff::/20", "4000::/2", "5f00::/16", "8000::/1", "fc00::/7", "fe80::/10", "fec0::/10"),
    *("ff00::/8",),
]


def test_no_address_outside_global_unicast_passes(strict):
    guard = Guard(strict)

    @given(st.sampled_from(SPECIAL).flatmap(lambda of: st.ip_addresses(network=of)), st.integers(1, 65535))
    def refused(address, port):
        with pytest.raises(InvalidAddress):
            guard.check(str(address), port)

    refused()


def test_what_passes_is_global_unicast_and_not_set_aside(strict):
    guard = Guard(strict)

    @given(st.ip_addresses() | st.ip_addresses(network="2000::/3"))
    def passes(address):
        try:
            guard.check(str(address), 443)
        except InvalidAddress:
            return
        assert address.is_global
        assert not address.is_multicast
        assert not any(address in ipaddress.ip_network(network) for network in SPECIAL)

    passes()
    guard.check(PUBLIC, 443)
    guard.check(PUBLIC_TOO, 443)


OWN = ["9.9.9.9", "9.9.9.10", "2620:fe::fe", "1.1.1.1", "1.1.1.3"]


def own(settings):
    """The pool's parts at the addresses of OWN."""
    dns = settings.dns.model_copy(
        update={"primary": "9.9.9.9:53", "nameservers": ("9.9.9.10:53", "[2620:fe::fe]:5353")}
    )
    web_tls = settings.web_tls.model_copy(update={"acme": True, "http_listen": ("1.1.1.3:80",)})
    listen = ("1.1.1.1:443", "0.0.0.0:8080")
    return settings.model_copy(update={"dns": dns, "listen": listen, "web_tls": web_tls})


@pytest.mark.parametrize("address", OWN)
def test_the_pools_own_addresses_are_refused_on_any_port(strict, address):
    for port in (53, 80, 4460):
        with pytest.raises(InvalidAddress, match="the pool's own registry or nameservers") as caught:
            Guard(own(strict)).check(address, port)
    assert (caught.value.field, caught.value.code) == ("addresses", "invalid-address")
    assert caught.value.remedy
    Guard(own(strict)).check("1.1.1.2", 443)


async def test_networks_that_opted_out_are_neither_registered_nor_dialled(registry, tuned):
    listed = await registry.server("early", "198.18.7.1")
    prefixes = (ipaddress.ip_network("198.18.0.0/16"), ipaddress.ip_network("fd00:1::/32"))
    registry.settings = tuned(refused_prefixes=prefixes)
    for name, address in (("alice", "198.18.255.255"), ("carol", "fd00:1:2::3")):
        with pytest.raises(AddressRefused) as caught:
            await registry.server(name, "198.19.0.1", address)
        assert (caught.value.code, caught.value.field) == ("address-refused", "addresses")
    async with registry.change(listed) as (session, server):
        with pytest.raises(AddressRefused):
            await proofs.call(session, registry.settings, server, "198.18.7.1", "198.18.7.1", registry.now)
    with pytest.raises(FetchError, match="not dialled"):
        await Outbound(registry.settings).get("http://198.18.7.1/", deadline=5, limit=10)
    assert await registry.server("bob", "198.19.0.1", "fd00:2::1")


def test_where_all_share_loopback_only_the_pools_own_endpoints_are_refused(settings):
    guard = Guard(own(settings))
    guard.check("9.9.9.9", 80, 4460)
    for address, port in (("9.9.9.9", 53), ("9.9.9.10", 53), ("2620:fe:0::fe", 5353), ("1.1.1.1", 443)):
        with pytest.raises(InvalidAddress, match="the pool's own"):
            guard.check(address, 80, port)


@pytest.mark.parametrize("address", OWN)
async def test_a_server_is_not_registered_at_an_address_of_the_pool(registry, strict, address):
    registry.settings = own(strict)
    with pytest.raises(InvalidAddress, match="the pool's own"):
        await registry.server("alice", PUBLIC, address)
    assert await registry.server("bob", PUBLIC)


@pytest.mark.parametrize("port", ["http", "ke"])
async def test_where_all_share_loopback_it_is_not_registered_at_an_endpoint_of_the_pool(
    registry, tuned, port
):
    registry.settings = tuned(ports={port: 853}, dns={"nameservers": ("127.0.0.9:853",)})
    with pytest.raises(InvalidAddress, match="the pool's own"):
        await registry.server("alice", "127.0.0.9")
    assert await registry.server("bob", "127.0.0.8")


@pytest.mark.parametrize(
    "host",
    [
        *(HERE, "127.1", "2130706433", "0x7f.1", "017700000001", "localhost", "[::1]", "0.0.0.0", "[::]"),
        *("[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[::127.0.0.1]"),
        *("[fe80::1%25lo]", "169.254.169.254", "10.0.0.1", "localhost."),
    ],
)
async def test_no_spelling_of_an_inner_address_is_dialled(strict, host):
    """With this system's own resolver, which takes some of them for addresses."""
    async with WebServer(says(http("200 OK"))) as web:
        with pytest.raises(FetchError, match=r"^not dialled: |has no addresses") as caught:
            await get(strict, f"http://{host}:{web.port}/")
    assert caught.value.remedy
    assert web.connections == 0


@pytest.mark.parametrize(
    "found",
    [
        [PUBLIC, HERE],
        [HERE, PUBLIC],
        [PUBLIC_TOO, PUBLIC, "::1"],
        [PUBLIC, "::ffff:127.0.0.1"],
        [PUBLIC, "fe80::1%lo"],
        [PUBLIC, "9.9.9.9"],
    ],
)
async def test_one_forbidden_address_of_a_name_refuses_it_before_any_is_dialled(strict, found):
    """The public ones cannot be reached from here: an attempt would end by another error."""
    async with WebServer(says(http("200 OK"))) as web:
        url = f"http://member.example:{web.port}/"
        with pytest.raises(FetchError) as caught:
            await get(own(strict), url, resolve=Names(found))
    assert str(caught.value) == "not dialled: member.example has an address that is not dialled"
    assert web.connections == 0


async def test_a_name_that_changes_its_address_gets_one_look_and_is_dialled_where_it_was_checked(settings):
    """DNS rebinding: the second answer is an endpoint of the pool itself."""
    async with WebServer(says(http("200 OK", b"member")), address="127.0.0.2") as member:
        port = member.port
        dns = settings.dns.model_copy(update={"nameservers": (f"127.0.0.3:{port}",)})
        settings = settings.model_copy(update={"dns": dns})
        names = Names(["127.0.0.2"], ["127.0.0.3"])
        async with WebServer(says(http("200 OK", b"pool")), address="127.0.0.3", port=port) as pool:
            url = f"http://member.example:{port}/"
            assert await get(settings, url, resolve=names) == Answer(200, b"member")
            assert names.asked == [("member.example", port)]
            with pytest.raises(FetchError, match="not dialled"):
                await get(settings, url, resolve=names)
    assert (member.connections, pool.connections) == (1, 0)
    assert f"host: member.example:{port}" in member.heads[0].lower().split("\r\n")


REBINDING = """
import asyncio, sys
from lab.web import WebServer, http, says
from poolsvc.config import Settings
from poolsvc.outbound import FetchError, Outbound

async def main():
    answers = iter([["8.8.8.8"], ["127.0.0.1"]])
    async def resolve(host, port):
        return next(answers)
    outbound = Outbound(Settings.model_validate_json(sys.argv[1]), resolve=resolve)
    async with (
        WebServer(says(http("200 OK", b"public")), address="8.8.8.8") as public,
        WebServer(says(http("200 OK", b"inner")), port=public.port) as inner,
    ):
        url = f"http://member.example:{public.port}/"
        print(await outbound.get(url, deadline=5, limit=10))
        try:
            print(await outbound.get(url, deadline=5, limit=10))
        except FetchError as error:
            print(error)
        print(public.connections, inner.connections)

asyncio.run(main())
"""


def test_a_public_name_that_becomes_an_inner_one_under_the_rules_of_production(strict):
    """In a network namespace, where the public address is this host's."""
    up = 'ip link set lo up && ip addr add 8.8.8.8/32 dev lo && exec "$@"'
    done = subprocess.run(
        [
            *("unshare", "--user", "--map-root-user", "--net", "sh", "-c", up, "sh"),
            *(sys.executable, "-c", REBINDING, strict.model_dump_json()),
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == [
        "Answer(status=200)",
        "not dialled: member.example has an address that is not dialled",
        "1 0",
    ], done.stderr


@contextmanager
def swallowing(address, port):
    """A port whose queue is full: the kernel drops what comes."""
    with socket.create_server((address, port), backlog=0), ExitStack() as waiting:
        for _ in range(4):
            client = waiting.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex((address, port))
        yield


async def test_the_next_address_is_dialled_when_one_swallows_everything_or_is_closed(settings):
    port = free_port("127.0.0.2", "127.0.0.3", "127.0.0.4")
    names = Names(["127.0.0.2", "127.0.0.3", "127.0.0.4"])
    with swallowing("127.0.0.2", port):
        async with WebServer(says(http("200 OK", b"x")), address="127.0.0.4", port=port) as last:
            url = f"http://member.example:{port}/"
            assert await get(settings, url, deadline=3, resolve=names) == Answer(200, b"x")
    assert last.connections == len(names.asked) == 1


@pytest.mark.parametrize(
    ("found", "text"),
    [([], "has no addresses"), ([f"127.0.1.{n}" for n in range(MAX_ADDRESSES + 1)], "has 17 addresses")],
)
async def test_a_name_without_an_address_or_with_too_many_is_refused(settings, found, text):
    with pytest.raises(FetchError, match=text) as caught:
        await get(settings, "http://member.example/", resolve=Names(found))
    assert "public DNS" in caught.value.remedy


async def test_a_resolver_that_fails_or_never_answers_is_a_fetch_error(settings):
    async def fails(_host, _port):
        raise socket.gaierror(socket.EAI_AGAIN, "again")

    async def hangs(_host, _port):
        await asyncio.Event().wait()

    with pytest.raises(FetchError, match="has no addresses"):
        await get(settings, "http://member.example/", resolve=fails)
    with pytest.raises(FetchError, match=r"within 0\.2 s"):
        await get(settings, "http://member.example/", resolve=hangs, deadline=0.2)
    with pytest.raises(FetchError, match="has no addresses"):
        await get(settings, f"http://{'a' * 64}.example/")


async def test_the_systems_resolver_is_asked_by_default(settings):
    assert HERE in await outbound.system_addresses("localhost", 80)
    async with WebServer(says(http("200 OK", b"x"))) as web:
        assert await get(settings, f"http://127.1:{web.port}/") == Answer(200, b"x")


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("http://user@127.0.0.1:{}/", "user name or password"),
        ("http://user:secret@127.0.0.1:{}/", "user name or password"),
        ("ftp://127.0.0.1:{}/", "http:// or https://"),
        ("file:///etc/passwd", "http:// or https://"),
        ("gopher://127.0.0.1:{}/", "http:// or https://"),
        ("ws://127.0.0.1:{}/", "http:// or https://"),
        ("//127.0.0.1:{}/", "http:// or https://"),
        ("127.0.0.1:{}", "http:// or https://"),
        ("", "http:// or https://"),
        ("http://", "no HTTP answer"),
        ("http:///x", "no HTTP answer"),
        ("http://127.0.0.1:99999/", "no port 99999"),
        ("http://member.example:65536/", "no port 65536"),
        ("http://127.0.0.1:port/", "no HTTP answer"),
        ("http://127.0.0.1:{}/\r\nX: y", "no HTTP answer"),
        ("http://\ud800/", "no HTTP answer"),
    ],
)
async def test_what_is_no_plain_web_address_is_refused(settings, url, text):
    async with WebServer(says(http("200 OK"))) as web:
        with pytest.raises(FetchError, match=text) as caught:
            await get(settings, url.format(web.port))
    assert caught.value.remedy
    assert "secret" not in str(caught.value)
    assert web.connections == 0


def test_whatever_the_url_is_the_error_is_ours(settings):
    @given(st.text(max_size=60) | st.text(max_size=40).map("http://".__add__))
    def fetch(url):
        with pytest.raises(FetchError) as caught:
            asyncio.run(get(settings, url, resolve=Names([])))
        assert str(caught.value).isprintable()

    fetch()


async def test_a_get_says_the_host_it_is_told_and_nothing_of_ours(settings, monkeypatch):
    """Proxies and passwords of the environment are another program's."""
    monkeypatch.setenv("HTTP_PROXY", f"http://{HERE}:{free_port()}")
    async with WebServer(says(http("200 OK", b"x" * 256))) as web:
        answer = await get(settings, f"http://{HERE}:{web.port}/x", host=NAME)
    assert answer == Answer(200, b"x" * 256)
    assert answer.require_ok() == b"x" * 256
    lines = web.heads[0].lower().split("\r\n")
    assert lines[0] == "get /x http/1.1"
    assert [line for line in lines if line.startswith("host:")] == [f"host: {NAME}"]
    assert "accept-encoding: identity" in lines
    assert not any("authorization" in line or "cookie" in line for line in lines)


async def test_a_post_sends_its_content_and_headers(settings):
    bodies = []

    async def take(reader, writer):
        bodies.append(await reader.readexactly(5))
        writer.write(http("202 Accepted"))

    async with WebServer(take) as web:
        answer = await Outbound(settings).post(
            f"http://{HERE}:{web.port}/hook",
            content=b"event",
            headers={"X-Signature": "abc"},
            deadline=5,
            limit=10,
        )
    assert answer == Answer(202, b"")
    assert bodies == [b"event"]
    lines = web.heads[0].lower().split("\r\n")
    assert lines[0] == "post /hook http/1.1"
    assert {"x-signature: abc", "content-length: 5"} <= set(lines)


def test_addresses_become_origins():
    assert http_origin("192.0.2.1", 80) == "http://192.0.2.1:80"
    assert http_origin("2001:db8::1", 8080) == "http://[2001:db8::1]:8080"


async def test_an_ipv6_literal_is_dialled(settings):
    async with WebServer(says(http("200 OK", b"x")), address="::1") as web:
        assert await get(settings, f"{http_origin('::1', web.port)}/") == Answer(200, b"x")


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 Other", "307 Temporary", "308 Permanent"])
async def test_a_redirect_is_never_followed(fetched, status):
    async with WebServer(says(http("200 OK", b"x"))) as other:
        answer = await fetched(says(http(status, more=f"Location: http://{HERE}:{other.port}/\r\n")))
    assert other.connections == 0
    with pytest.raises(FetchError, match=f"HTTP status {status[:3]} instead of 200") as caught:
        answer.require_ok()
    assert "redirect" in caught.value.remedy


async def test_of_a_refusal_the_beginning_is_enough(fetched):
    answer = await fetched(says(http("404 Not Found", b"<html>" + b"x" * 100_000)))
    assert (answer.status, len(answer.body)) == (404, 256)


@pytest.mark.parametrize(
    "head", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 200\r\n\r\n"]
)
async def test_a_server_that_drips_is_held_to_the_deadline_of_the_whole(fetched, head):
    """Each octet comes in time."""

    async def drip(_reader, writer):
        writer.write(head)
        while True:
            writer.write(b"H")
            await writer.drain()
            await asyncio.sleep(0.05)  # the peer's own pace, which is what is tested

    with pytest.raises(FetchError, match=r"no HTTP answer within 0\.5 s"):
        await asyncio.wait_for(fetched(drip, deadline=0.5), 30)


async def test_a_server_that_says_nothing_ends_by_the_deadline(fetched):
    async def silent(reader, _writer):
        await reader.read()

    with pytest.raises(FetchError, match=r"^no HTTP answer within 0\.3 s$") as caught:
        await fetched(silent, deadline=0.3)
    assert "firewall" in caught.value.remedy


async def test_an_endless_preface_ends_by_the_deadline(fetched):
    """Informational answers come before the answer, in any number."""

    async def prefaces(_reader, writer):
        while True:
            writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
            await writer.drain()
            await asyncio.sleep(0.01)

    with pytest.raises(FetchError, match=r"within 0\.5 s"):
        await fetched(prefaces, deadline=0.5)


async def endless(_reader, writer):
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    while True:
        writer.write(b"x" * 65_536)
        await writer.drain()


@pytest.mark.parametrize(
    "serve",
    [
        endless,
        says(http("200 OK", b"x" * 257)),
        says(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n"
            + b"x" * 65_535
            + b"\r\n0\r\n\r\n"
        ),
    ],
)
async def test_an_oversized_answer_is_not_read_to_its_end(fetched, serve):
    with pytest.raises(FetchError, match="more than 256 octets") as caught:
        await fetched(serve)
    assert caught.value.remedy


async def test_a_packed_answer_is_not_unpacked(fetched):
    """A few octets of gzip could become any number."""
    bomb = gzip.compress(bytes(10_000_000))
    answer = await fetched(says(http("200 OK", bomb, "Content-Encoding: gzip\r\n")), limit=len(bomb))
    assert answer.body == bomb


@pytest.mark.parametrize(
    "octets",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1_000_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
        b"HTTP/1.1 \x1b[31m\x00\r\n\r\n",
        b"\x16\x03\x01",
        b"\x00" * 300_000,
        b"garbage " * 1000 + b"\r\n\r\n",
    ],
)
async def test_what_is_no_http_answer_is_a_fetch_error(fetched, octets):
    with pytest.raises(FetchError, match=r"^no HTTP answer: ") as caught:
        await fetched(says(octets))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 1000


async def test_a_connection_closed_at_once_and_a_closed_port_are_fetch_errors(settings):
    async with await asyncio.start_server(lambda _reader, writer: writer.close(), HERE, 0) as server:
        with pytest.raises(FetchError, match="no HTTP answer: "):
            await get(settings, f"http://{HERE}:{server.sockets[0].getsockname()[1]}/")
    with pytest.raises(FetchError, match="no HTTP answer: "):
        await get(settings, f"http://{HERE}:{free_port()}/")


@pytest.fixture
def tls(tmp_path):
    """`server(name)`: a server's context with a certificate for a name; `client` trusts its authority."""
    authority = Authority(tmp_path / "authority")

    class Tls:
        client = ssl.create_default_context(cafile=str(authority.root))

        @staticmethod
        def server(*names):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*authority.issue(*names))
            return context

    return Tls


async def test_tls_is_checked_against_the_name_at_the_pinned_address(settings, tls):
    asked = []
    server = tls.server("hook.example")
    server.sni_callback = lambda _socket, name, _context: asked.append(name)
    names = Names([HERE])
    async with WebServer(says(http("200 OK", b"x")), tls=server) as web:
        good, bad = (f"https://{name}.example:{web.port}/" for name in ("hook", "other"))
        assert await get(settings, good, resolve=names, verify=tls.client) == Answer(200, b"x")
        with pytest.raises(FetchError, match=r"no HTTP answer: .*ertificate"):
            await get(settings, bad, resolve=names, verify=tls.client)
        with pytest.raises(FetchError, match=r"no HTTP answer: .*ertificate"):
            await get(settings, good, resolve=names)
    assert asked == ["hook.example", "other.example", "hook.example"]
    assert [head.lower().split("\r\n")[1] for head in web.heads] == [f"host: hook.example:{web.port}"]


async def test_tls_at_a_literal_address_is_checked_against_it(settings, tls):
    async with WebServer(says(http("200 OK", b"x")), tls=tls.server(HERE)) as web:
        url = f"https://{HERE}:{web.port}/"
        assert await get(settings, url, verify=tls.client) == Answer(200, b"x")
    async with WebServer(says(http("200 OK", b"x")), tls=tls.server("hook.example")) as web:
        with pytest.raises(FetchError, match=r"no HTTP answer: .*ertificate"):
            await get(settings, f"https://{HERE}:{web.port}/", verify=tls.client)


class TestAClientOfALibrary:
    """What httpx does by itself around the guarded transport."""

    async def test_is_refused_as_by_a_failing_connection(self, strict):
        async with (
            WebServer(says(http("200 OK"))) as web,
            httpx.AsyncClient(transport=Outbound(strict).transport(), trust_env=False) as client,
        ):
            with pytest.raises(
                httpx.ConnectError, match=r"not dialled: 127\.0\.0\.1 is not a public address"
            ):
                await client.get(f"http://{HERE}:{web.port}/")
        assert web.connections == 0

    async def test_that_follows_redirects_is_refused_where_they_lead(self, settings):
        async with WebServer(says(http("200 OK"))) as pool:
            listen = (f"{HERE}:{pool.port}",)
            guarded = Outbound(settings.model_copy(update={"listen": listen})).transport()
            away = says(http("302 Found", more=f"Location: http://{HERE}:{pool.port}/v1/pool\r\n"))
            async with (
                WebServer(away) as member,
                httpx.AsyncClient(transport=guarded, trust_env=False, follow_redirects=True) as client,
            ):
                with pytest.raises(httpx.ConnectError, match="the pool's own"):
                    await client.get(f"http://{HERE}:{member.port}/")
        assert (member.connections, pool.connections) == (1, 0)

    async def test_keeps_no_connection_that_another_name_could_get(self, settings, tls):
        """Two names at one address: a kept connection would spare the second one its certificate."""

        async def twice(reader, writer):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")
            await reader.read()

        guarded = Outbound(settings, resolve=Names([HERE]), verify=tls.client).transport()
        async with (
            WebServer(twice, tls=tls.server("hook.example")) as web,
            httpx.AsyncClient(transport=guarded, trust_env=False) as client,
        ):
            assert (await client.get(f"https://hook.example:{web.port}/")).text == "x"
            with pytest.raises(httpx.ConnectError, match="ertificate"):
                await client.get(f"https://other.example:{web.port}/")


@pytest.mark.parametrize("allow", [True, False])
async def test_proof_precheck_and_probe_dial_no_inner_address_unless_that_is_allowed(flow, allow):
    """The address was proved under other settings, or the database came from elsewhere."""
    flow = await flow()
    registry, server_id, earlier = flow.registry, flow.server_id, flow.settings
    async with WebServer(says(http("404 Not Found"))) as web:
        ports = flow.settings.ports.model_copy(update={"http": web.port, "ke": web.port})
        flow.settings = registry.settings = flow.settings.model_copy(
            update={"ports": ports, "allow_private_addresses": allow}
        )
        await flow.begin()
        await flow.step()
        await flow.serve()
        order = await flow.step()
        precheck, before = order.error, web.connections

        async with registry.change(server_id) as (session, server):
            nonce = await proofs.call(session, earlier, server, HERE, HERE, NOW)
            server.agent_key = base64.b64encode(
                Ed25519PrivateKey.generate().public_key().public_bytes_raw()
            ).decode()
            row = server.addresses[0].id
        assert nonce
        await proofs.prove(registry.database, registry.settings, row, NOW)
        proof, between = (await flow.server()).addresses[0].proof_error, web.connections

        async with registry.database.transaction() as session:
            session.add(
                Order(server_id=server_id, status=OrderStatus.ISSUED, created_at=NOW, fingerprint="0a" * 32)
            )
        await monitoring.probe_server(
            registry.database, registry.settings, load_roots(None), server_id, NOW, Rounds(0)
        )
        stages = {stage.stage: stage for stage in (await flow.server()).stages}
        probe = next(record for stage, record in stages.items() if record.status == "failed")
    if allow:
        assert (before, between, web.connections) == (1, 2, 3)
        assert precheck == "precheck: HTTP status 404 instead of 200"
        assert proof == "HTTP status 404 instead of 200"
        assert probe.stage is Stage.TLS
    else:
        assert web.connections == 0
        assert precheck == "precheck: not dialled: 127.0.0.1 is not a public address"
        assert proof == "not dialled: 127.0.0.1 is not a public address"
        assert (probe.stage, probe.detail) == (Stage.TCP, f"{HERE}: {proof}")


@pytest.mark.parametrize(
    ("told", "proved", "detail"),
    [
        ("127.0.0.9", False, "sends clients astray: 127.0.0.9 is not a proved address of the server"),
        ("localhost", True, "sends clients astray: 'localhost' is not an IP address"),
        ("127.0.0.9", True, None),
    ],
)
async def test_the_prober_follows_records_6_and_7_to_the_servers_own_addresses(
    settings, tmp_path, told, proved, detail
):
    found, datagrams = await probed_at(settings, tmp_path, told, proved=proved)
    if detail is None:
        assert found.failed is Stage.NTP_KE_COOKIE
        assert datagrams > 0
    else:
        assert (found.failed, found.detail, datagrams) == (Stage.KE, detail, 0)


async def test_the_prober_follows_them_to_no_endpoint_of_the_pool(settings, tmp_path):
    """The name server shares the address of a member's server, as in the demo."""
    found, datagrams = await probed_at(settings, tmp_path, "127.0.0.9", proved=True, pools=True)
    assert found.failed is Stage.KE
    assert "the pool's own" in found.detail
    assert datagrams == 0


async def probed_at(settings, directory, told, *, proved, pools=False):
    """A probe of a server that sends clients to `told`: the result, and how many datagrams 127.0.0.9 got."""
    authority = Authority(directory / "authority")
    trust = Trust.of(x509.load_pem_x509_certificates(authority.root.read_bytes()), datetime.now(UTC))
    with Saboteur(authority) as server, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.setblocking(False)
        other.bind(("127.0.0.9", server.ntp_port))

        async def lead(talk):
            await talk.handshake()
            *said, end = await talk.answer()
            await talk.say(encode([*said, Record(RecordType.NTP_SERVER, told.encode()), end]))
            await talk.close()

        server.ke = KeSabotage("elsewhere", "", lead, None, "", waits=False, kept=8)
        if pools:
            dns = settings.dns.model_copy(update={"nameservers": (f"127.0.0.9:{server.ntp_port}",)})
            settings = settings.model_copy(update={"dns": dns})
        own_addresses = {server.address, *(["127.0.0.9"] if proved else [])}
        found = await probe(
            SABOTEUR,
            server.address,
            server.ke_port,
            trust,
            own_addresses=own_addresses,
            guard=Guard(settings),
        )
        datagrams = 0
        with suppress(BlockingIOError):
            while other.recv(2048):
                datagrams += 1
    return found, datagrams
