"""`pool-client check`: a signed zone, NTS servers on loopback, and everything that a network may do in between."""

import asyncio
import socket
import time
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dns.asyncquery
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import pytest
from cryptography import x509

from lab.certificates import Authority
from lab.knot import Knot
from lab.namespaces import in_namespace
from lab.nts_server import NtsServer
from lab.peers import ChronydServer
from lab.pool_zone import PoolZone
from lab.processes import free_port
from lab.programs import run
from lab.relay import Relay
from nts_core.check import Check, Patience
from nts_core.cli import ExitStatus, exit_status
from nts_core.client import Failure
from nts_core.diagnosis import Outcome, Part
from nts_core.packet import Leap
from nts_core.resolve import Resolver, TrustAnchors
from nts_core.verdict import Verdict

MANUAL = (Path(__file__).parents[2] / "docs/clients.md").read_text()
POOL = "pool.example"
YEAR = 365 * 86_400
MEMBERS = {
    name: f"127.{number}.0.1" for number, name in enumerate(("anna", "bert", "cara", "dora", "emil"), 1)
}
OPERATORS = {name: letter * 13 for name, letter in zip(MEMBERS, "abcde", strict=True)}
SECOND = 1_000_000_000
OF_A_RESOLVER = list(Part)[:4]
PATIENCE = Patience(dns=2.0)
# Where silence is the rule.
HASTY = Patience(dns=0.4, ke=0.4, ntp=0.2)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A CA that nobody trusts."""
    return Authority(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="module")
def knot(tmp_path_factory):
    with Knot(tmp_path_factory.mktemp("knot"), ttl=1, soa_minimum=1) as running:
        zone = PoolZone(running)
        zone.add(*((name, at, f"op={OPERATORS[name]} as=6450{at[4]} cc=DE") for name, at in MEMBERS.items()))
        zone.add(("same", "127.9.0.1", f"op={OPERATORS['anna']}"))
        yield running


@pytest.fixture(scope="module")
def zone(knot):
    return PoolZone(knot)


def domain(name):
    return f"{name}.servers.{POOL}"


class Front(asyncio.DatagramProtocol):
    """A resolver whose answers are what `alter` makes of the true ones, over UDP and TCP; None is silence."""

    def __init__(self, knot, alter):
        self._knot = knot
        self._alter = alter
        self._running = set()

    def connection_made(self, transport):
        self._transport = transport

    def datagram_received(self, data, address):
        task = asyncio.ensure_future(self._answer_datagram(data, address))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _answer_datagram(self, data, address):
        octets = await self._answer(data, is_tcp=False)
        if octets is not None:
            self._transport.sendto(octets, address)

    async def serve(self, reader, writer):
        length = int.from_bytes(await reader.readexactly(2), "big")
        octets = await self._answer(await reader.readexactly(length), is_tcp=True)
        if octets is not None:
            writer.write(len(octets).to_bytes(2, "big") + octets)
        writer.close()

    async def _answer(self, data, *, is_tcp):
        query = dns.message.from_wire(data)
        true = await dns.asyncquery.tcp(query, self._knot.address, timeout=5, port=self._knot.port)
        altered = self._alter(true, query, is_tcp)
        return altered.to_wire(max_size=65535) if isinstance(altered, dns.message.Message) else altered


@asynccontextmanager
async def fronted(knot, alter):
    """A resolver at 127.0.0.1 that alters what the zone's own server says."""
    loop = asyncio.get_running_loop()
    port = free_port("127.0.0.1")
    transport, front = await loop.create_datagram_endpoint(
        lambda: Front(knot, alter), local_addr=("127.0.0.1", port)
    )
    async with await asyncio.start_server(front.serve, "127.0.0.1", port):
        yield resolver(knot, port)
    transport.close()


def resolver(knot, port=None):
    return Resolver(knot.address, port or knot.port, TrustAnchors.parse(knot.trust_anchor()), PATIENCE.dns)


@asynccontextmanager
async def listening(address, port, words=b""):
    """A listener that says `words` to whoever speaks, or nothing at all until the other goes."""

    ended = asyncio.Event()

    async def serve(reader, writer):
        with suppress(ConnectionError):
            while await reader.read(4096) and not words:
                pass
            writer.write(words)
            writer.close()
            await writer.wait_closed()
        ended.set()

    async with await asyncio.start_server(serve, address, port):
        yield
        await ended.wait()


class Network:
    """The pool's servers, all at one NTS-KE and one NTP port; those in `behind` stand behind a relay."""

    def __init__(self, authority, zone):
        self.authority = authority
        self.zone = zone
        self.ke_port, self.ntp_port = free_port("127.0.0.1"), free_port("127.0.0.1")
        self.servers = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        for server in self.servers.values():
            await server.stop()
        await self._stack.aclose()

    def list(self, *names):
        self.zone.list(names, port=self.ke_port)

    async def serve(self, *names, longest=None, authority=None, certified=None, **validity):
        """Servers, with a relay before each that loses what is longer than `longest`."""
        for name in names:
            at = MEMBERS[name]
            pair = (authority or self.authority).issue(
                certified or domain(name), file=f"{name}-{self.ke_port}", **validity
            )
            behind = at if longest is None else at.removesuffix("1") + "2"
            server = self.servers[name] = NtsServer(pair, behind)
            await server.start(self.ke_port, self.ntp_port)
            if longest is not None:
                self._stack.enter_context(
                    Relay(
                        at,
                        ke=(self.ke_port, (behind, self.ke_port)),
                        ntp=(self.ntp_port, (behind, self.ntp_port)),
                        longest=longest,
                    )
                )

    @property
    def roots(self):
        return x509.load_pem_x509_certificates(self.authority.root.read_bytes())

    async def check(self, *resolvers, **options):
        self.told = []
        self.last = Check(
            POOL,
            resolvers,
            self.roots,
            tell=self.told.append,
            **({"is_synchronised": lambda: True, "patience": PATIENCE} | options),
        )
        summary = await self.last.run()
        assert self.told == self.last.steps
        order = [step.part for step in self.told if step.part not in OF_A_RESOLVER]
        assert order == sorted(order, key=list(Part).index)
        for step in self.told:
            assert step.found
            assert f"`{step.code or step.part}`" in MANUAL, step
            assert bool(step.code) == (step.verdict is not Verdict.OK), step
            assert bool(step.remedy) == (step.verdict in {Verdict.WARN, Verdict.FAIL}), step
            assert (step.verdict is Verdict.FAIL) == (step.failure is not None), step
        return summary

    def seen(self, part):
        """Verdicts and codes of a part's steps."""
        return [(str(step.verdict), step.code) for step in self.told if step.part is part]

    def only(self, part):
        (step,) = [step for step in self.told if step.part is part]
        return step


@pytest.fixture
async def network(authority, zone):
    async with Network(authority, zone) as made:
        yield made


OK, NEEDS = ("ok", ""), ("skipped", "needs-earlier")


async def test_a_good_pool_is_usable(knot, network):
    network.list(*MEMBERS)
    await network.serve(*MEMBERS)
    summary = await network.check(resolver(knot))
    assert (summary.outcome, summary.servers, summary.operators) == (Outcome.USABLE, 5, 5)
    assert summary.first is None
    assert summary.error is None
    assert network.seen(Part.KE) == [OK] * 5
    assert network.seen(Part.NTP) == [OK] * 5
    assert "5 servers" in str(summary)
    assert {step.verdict for step in network.told} == {Verdict.OK}
    # A plain request, and one that asks for seven further cookies.
    assert [sum(server.cookies.values()) for server in network.servers.values()] == [1] * 5
    assert "0.000 s" in network.only(Part.TIME).found
    # What a client with one cookie left sends to a server whose cookies are as long as chrony's, at least.
    assert all(int(step.found.split()[0]) > 900 for step in network.told if step.part is Part.NTP)


async def test_fewer_than_four_operators(knot, network):
    network.list("anna", "bert", "same")
    await network.serve("anna", "bert")
    summary = await network.check(resolver(knot))
    assert (summary.outcome, summary.servers, summary.operators) == (Outcome.FEW_SOURCES, 2, 2)
    assert summary.error.code == Failure.TOO_FEW_SOURCES
    assert network.seen(Part.SRV) == [("warn", "few-targets")]
    assert network.seen(Part.INDEPENDENCE) == [("warn", "few-operators")]
    assert "anna.servers.pool.example and same.servers.pool.example have the same operator" in (
        network.only(Part.INDEPENDENCE).found
    )
    assert summary.first.code == "ke-refused"


# DNS


async def test_nobody_at_the_resolvers_address(knot, network):
    summary = await network.check(resolver(knot, free_port("127.0.0.1")), patience=HASTY)
    assert [network.seen(part) for part in OF_A_RESOLVER] == [
        [("fail", "resolver-unreachable")],
        [NEEDS],
        [NEEDS],
        [NEEDS],
    ]
    assert (summary.outcome, summary.error.code) == (Outcome.UNUSABLE, Failure.DNS)
    assert summary.first is network.only(Part.RESOLVER)
    assert all(network.seen(part) == [NEEDS] for part in list(Part)[5:])


def stripped(answer, _query, _is_tcp):
    for section in (answer.answer, answer.authority, answer.additional):
        section[:] = [rrset for rrset in section if rrset.rdtype != dns.rdatatype.RRSIG]
    return answer


def servfail(answer, _query, _is_tcp):
    answer.set_rcode(dns.rcode.SERVFAIL)
    return answer


def forged(answer, _query, _is_tcp):
    for rrset in answer.answer:
        if rrset.rdtype == dns.rdatatype.SRV:
            rrset.ttl += 1
            (first, *_) = rrset
            rrset.clear()
            rrset.add(first.replace(port=1))
    return answer


def short_only(answer, query, is_tcp):
    """What a path does that loses all that is long, and all TCP."""
    return None if is_tcp or query.edns >= 0 else answer


def no_tcp(answer, _query, is_tcp):
    return None if is_tcp else answer


@pytest.mark.parametrize(
    ("alter", "part", "code"),
    [
        (stripped, Part.SIGNATURES, "resolver-no-dnssec"),
        (servfail, Part.RESOLVER, "resolver-failed"),
        (forged, Part.VALIDATION, "bogus"),
        (short_only, Part.LONG_ANSWERS, "long-answers"),
        (lambda _answer, _query, _is_tcp: b"\0" * 20, Part.RESOLVER, "resolver-unreachable"),
        (lambda _answer, _query, _is_tcp: b"", Part.RESOLVER, "resolver-unreachable"),
    ],
)
async def test_a_resolver_that_is_no_good(knot, network, alter, part, code):
    network.list(*MEMBERS)
    async with fronted(knot, alter) as bad:
        summary = await network.check(bad, patience=HASTY)
    assert network.seen(part) == [("fail", code)]
    assert (summary.first.part, summary.error.code) == (part, Failure.DNS)


async def test_a_bad_resolver_beside_a_good_one_is_told_and_not_relied_on(knot, network):
    network.list(*MEMBERS)
    await network.serve(*MEMBERS)
    async with fronted(knot, stripped) as bad:
        summary = await network.check(bad, resolver(knot))
    assert network.seen(Part.SIGNATURES) == [("fail", "resolver-no-dnssec"), OK]
    assert network.seen(Part.CLOCK) == [OK]
    assert (summary.outcome, summary.first.part) == (Outcome.USABLE, Part.SIGNATURES)


async def test_a_resolver_without_tcp_is_a_warning(knot, network):
    network.list(*MEMBERS)
    async with fronted(knot, no_tcp) as deaf:
        await network.check(deaf, patience=HASTY)
    assert network.seen(Part.LONG_ANSWERS) == [("warn", "no-tcp")]
    assert network.seen(Part.VALIDATION) == [OK]


@pytest.mark.parametrize("offset", [-YEAR, YEAR])
async def test_signatures_that_are_not_valid_now_mean_a_wrong_clock(knot, network, offset):
    network.list(*MEMBERS)
    summary = await network.check(resolver(knot), now=lambda: time.time() + offset)
    assert network.seen(Part.VALIDATION) == [("fail", "expired")]
    assert network.seen(Part.CLOCK) == [("fail", "expired")]
    assert summary.first is network.only(Part.CLOCK)
    assert "clock" in summary.error.message


async def test_a_kernel_that_does_not_know_the_time_is_a_warning(knot, network):
    network.list(*MEMBERS)
    await network.serve(*MEMBERS)
    summary = await network.check(resolver(knot), is_synchronised=lambda: False)
    assert network.seen(Part.CLOCK) == [("warn", "clock-unsynchronised")]
    assert (summary.outcome, summary.first.part) == (Outcome.USABLE, Part.CLOCK)


async def test_a_pool_that_lists_nobody(knot, network):
    network.list()
    summary = await network.check(resolver(knot))
    assert network.seen(Part.VALIDATION) == [OK]
    assert network.seen(Part.SRV) == [("fail", "no-srv")]
    assert network.seen(Part.KE) == [NEEDS]
    assert (summary.first.part, summary.error.code) == (Part.SRV, Failure.DNS)


async def test_targets_that_nothing_leads_to(knot, network):
    network.list("anna", "nobody")
    await network.serve("anna")
    await network.check(resolver(knot))
    step = network.only(Part.ADDRESSES)
    assert (step.verdict, step.code) == (Verdict.WARN, "addresses")
    assert domain("nobody") in step.found


# NTS-KE


async def test_a_port_that_hangs_and_one_where_nobody_is(knot, network):
    network.list("anna", "bert")
    async with listening(MEMBERS["anna"], network.ke_port):
        summary = await network.check(resolver(knot), patience=HASTY)
    assert sorted(network.seen(Part.KE)) == [("fail", "ke-refused"), ("fail", "tls-silent")]
    assert network.seen(Part.NTP) == [NEEDS]
    assert summary.outcome is Outcome.UNUSABLE
    assert summary.first.part is Part.KE
    assert exit_status(Failure(summary.error.code)) == ExitStatus.NOT_ESTABLISHED


async def test_a_connection_that_nobody_takes_is_a_firewall(knot, network):
    """A listener whose queue is full: the kernel drops what comes, as a firewall does."""
    network.list("anna")
    with socket.socket() as full:
        full.bind((MEMBERS["anna"], network.ke_port))
        full.listen(0)
        waiting = [socket.socket() for _ in range(3)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex((MEMBERS["anna"], network.ke_port))
        summary = await network.check(resolver(knot), patience=HASTY)
        for each in waiting:
            each.close()
    assert ("fail", "ke-silent") in network.seen(Part.KE)
    assert "firewall" in summary.error.remedy
    assert summary.error.code == Failure.TCP


async def test_somebody_who_speaks_another_protocol(knot, network):
    network.list("anna")
    async with listening(MEMBERS["anna"], network.ke_port, b"HTTP/1.1 418 I'm a teapot\r\n\r\n"):
        summary = await network.check(resolver(knot))
    assert ("fail", "tls") in network.seen(Part.KE)
    assert summary.error.code == Failure.TLS


async def test_tls_that_is_opened_on_the_way(knot, network, stranger):
    network.list("anna", "bert")
    await network.serve("anna", "bert", authority=stranger)
    summary = await network.check(resolver(knot))
    assert network.seen(Part.KE) == [("fail", "certificate-untrusted")] * 2
    assert "issued by CN=laboratory root" in summary.error.message
    assert "inspection" in summary.error.remedy
    assert summary.error.code == Failure.CERTIFICATE


async def test_a_certificate_for_another_name(knot, network):
    network.list("anna")
    await network.serve("anna", certified="proxy.example")
    summary = await network.check(resolver(knot))
    assert ("fail", "certificate-name") in network.seen(Part.KE)
    assert "it is for proxy.example" in summary.error.message


async def test_a_certificate_that_has_ended_and_one_that_ends_soon(knot, network):
    now = datetime.now(UTC)
    network.list("anna", "bert", "cara")
    await network.serve("anna", not_before=now - timedelta(days=90), not_after=now - timedelta(days=1))
    await network.serve("bert", not_before=now - timedelta(days=80), not_after=now + timedelta(days=10))
    await network.serve("cara")
    await network.check(resolver(knot))
    assert sorted(network.seen(Part.KE)) == [("fail", "certificate-dates"), OK, ("warn", "certificate-ends")]


def test_a_host_without_ipv6_is_no_fault_and_one_without_any_network_is(tmp_path, authority):
    """In a network of its own, where there is nothing but loopback."""

    async def story():
        with Knot(tmp_path / "knot", ttl=1, soa_minimum=1) as knot:
            zone = PoolZone(knot)
            zone.add(
                ("anna", MEMBERS["anna"], "op=aaaaaaaaaaaaa"), ("anna", "2001:db8::1", "op=aaaaaaaaaaaaa")
            )
            zone.add(("far", "192.0.2.1", "op=bbbbbbbbbbbbb"), ("far", "2001:db8::2", "op=bbbbbbbbbbbbb"))
            async with Network(authority, zone) as network:
                network.list("anna")
                await network.serve("anna")
                summary = await network.check(resolver(knot))
                assert "IPv4 at 1 of them, IPv6 at 1" in network.only(Part.ADDRESSES).found
                assert network.seen(Part.KE) == [("skipped", "no-ipv6"), OK]
                assert summary.outcome is Outcome.FEW_SOURCES
                network.list("far")
                summary = await network.check(resolver(knot))
                assert network.seen(Part.KE) == [("fail", "no-route")]
                assert network.seen(Part.NTP) == [NEEDS]
                assert summary.error.code == Failure.LOCAL

    in_namespace(lambda: asyncio.run(story()))


# NTP


@pytest.mark.parametrize(("longest", "verdict"), [(48, "fail"), (500, "warn"), (2000, "ok")])
async def test_networks_that_drop_long_ntp_packets(knot, network, longest, verdict):
    network.list("anna", "bert", "cara", "dora")
    await network.serve("anna", "bert", "cara", "dora", longest=longest)
    summary = await network.check(resolver(knot), patience=HASTY)
    code = "" if verdict == "ok" else "long-packets"
    assert network.seen(Part.NTP) == [(verdict, code)] * 4
    step = next(step for step in network.told if step.part is Part.NTP)
    if verdict == "fail":
        assert "long NTP packets are dropped on the way: 48 octets are answered" in step.found
        assert (summary.outcome, summary.error.code) == (Outcome.UNUSABLE, Failure.NTP)
        assert "and so at 3 others" in summary.error.message
    else:
        assert summary.outcome is Outcome.USABLE
    if verdict == "warn":
        passed = int(step.found.split(": ")[1].split()[0])
        assert 500 - 120 < passed <= 500
        assert summary.first is step
    for server in network.servers.values():
        assert max(server.cookies.values(), default=0) <= 1


@pytest.mark.parametrize(
    ("longest", "word"), [(2000, " octets are answered, delay"), (600, "are dropped on the way")]
)
async def test_a_chronyd_behind_a_network(knot, network, tmp_path, longest, word):
    with ChronydServer(
        tmp_path / "chronyd", network.authority.issue(domain("anna")), address="127.1.0.2"
    ) as chronyd:
        network.zone.list(["anna"], port=chronyd.ke_port)
        ke, ntp = (("127.1.0.2", port) for port in (chronyd.ke_port, chronyd.ntp_port))
        with Relay("127.1.0.1", ke=(ke[1], ke), ntp=(ntp[1], ntp), longest=longest) as relay:
            await network.check(resolver(knot), patience=HASTY)
            assert word in network.only(Part.NTP).found
            assert len(relay.last_request) <= longest
    assert network.only(Part.TIME).verdict is Verdict.OK


async def test_a_network_that_drops_all_udp(knot, network):
    network.list("anna")
    await network.serve("anna", longest=0)
    summary = await network.check(resolver(knot), patience=HASTY)
    assert network.seen(Part.NTP) == [("fail", "udp-silent")]
    assert network.seen(Part.TIME) == [NEEDS]
    assert "firewall" in summary.error.remedy


async def test_a_server_that_only_answers_nts_is_good(knot, network):
    network.list("anna")
    await network.serve("anna")
    server = network.servers["anna"]
    true = server.answer
    server.answer = lambda request: true(request) if len(request) > 48 else None
    await network.check(resolver(knot), patience=HASTY)
    assert network.seen(Part.NTP) == [OK]


async def test_a_lost_packet_is_no_fault_and_garbage_no_answer(knot, network):
    network.list("anna", "bert")
    await network.serve("anna", "bert")
    lossy, noisy = network.servers["anna"], network.servers["bert"]
    true, seen = lossy.answer, []

    def every_second(request):
        seen.append(request)
        return None if len(seen) % 2 else true(request)

    lossy.answer = every_second
    noisy.answer = lambda request: bytes(len(request))
    await network.check(resolver(knot), patience=HASTY)
    assert sorted(network.seen(Part.NTP)) == [("fail", "udp-silent"), OK]
    assert len(seen) == 4


@pytest.mark.parametrize(("code", "word"), [(b"DENY", "refuses"), (b"RATE", "too often")])
async def test_a_server_that_refuses(knot, network, code, word):
    network.list("anna")
    await network.serve("anna")
    server = network.servers["anna"]
    kiss = server.kiss(code)
    server.before = lambda request: kiss(request) if len(request) > 48 else ()
    server.is_silent = True
    summary = await network.check(resolver(knot), patience=HASTY)
    assert network.seen(Part.NTP) == [("fail", "kiss-of-death")]
    assert word in summary.error.remedy
    assert summary.error.code == Failure.KISS


async def test_a_server_that_does_not_know_the_time(knot, network):
    network.list("anna")
    await network.serve("anna")
    network.servers["anna"].clock = replace(network.servers["anna"].clock, leap=Leap.UNSYNCHRONISED)
    summary = await network.check(resolver(knot))
    assert network.seen(Part.NTP) == [("fail", "unsynchronised")]
    assert summary.error.code == Failure.UNSYNCHRONISED


async def test_servers_that_do_not_agree(knot, network):
    network.list(*MEMBERS)
    await network.serve(*MEMBERS)
    network.servers["emil"].offset = 40 * SECOND
    summary = await network.check(resolver(knot))
    assert network.seen(Part.TIME) == [("warn", "falseticker")]
    assert domain("emil") in network.only(Part.TIME).found
    assert (summary.outcome, summary.servers) == (Outcome.USABLE, 4)


async def test_two_servers_of_which_one_must_be_wrong(knot, network):
    network.list("anna", "bert")
    await network.serve("anna", "bert")
    network.servers["bert"].offset = 40 * SECOND
    summary = await network.check(resolver(knot))
    assert network.seen(Part.TIME) == [("fail", "disagree")]
    assert (summary.outcome, summary.error.code) == (Outcome.UNUSABLE, Failure.TOO_FEW_SOURCES)


async def test_a_clock_that_is_behind_what_all_servers_say(knot, network):
    network.list(*MEMBERS)
    await network.serve(*MEMBERS)
    for server in network.servers.values():
        server.offset = 40 * SECOND
    summary = await network.check(resolver(knot))
    assert network.seen(Part.TIME) == [("warn", "clock-offset")]
    assert "40.000 s behind" in summary.first.found


# The program itself


async def test_the_program_tells_people_and_machines(knot, network, tmp_path):
    network.list("anna", "bert", "cara", "dora")
    await network.serve("anna", "bert", "cara", "dora")
    anchor = tmp_path / "anchor"
    anchor.write_text(knot.trust_anchor())
    arguments = (
        "check",
        POOL,
        f"--trust-anchor={anchor}",
        f"--resolver={knot.address}:{knot.port}",
        f"--ca={network.authority.root}",
    )
    told, shown = await asyncio.gather(
        asyncio.to_thread(run, "pool-client", *arguments, "--json"),
        asyncio.to_thread(run, "pool-client", *arguments),
    )
    assert (told.status, shown.status) == (ExitStatus.OK, ExitStatus.OK), (told, shown)
    document = told.document
    assert document["outcome"] == "usable"
    assert (document["servers"], document["operators"], document["error"]) == (4, 4, None)
    assert {tuple(sorted(step)) for step in document["steps"]} == {
        ("about", "code", "found", "name", "remedy", "verdict")
    }
    lines = shown.stdout.splitlines()
    assert lines[0].startswith("ok       resolver")
    assert "usable: 4 servers of 4 operators can be used" in lines
    assert len([line for line in lines if line.startswith("ok       ntp ")]) == 4


@pytest.mark.parametrize("arguments", [("not a pool",), (POOL, "--resolver=nowhere"), (POOL, "--colour")])
def test_a_command_line_that_cannot_be_used_is_one_object(arguments):
    done = run("pool-client", "check", *arguments, "--json")
    assert done.status == ExitStatus.USAGE
    assert done.document["error"]["code"] == "configuration"
    assert (done.document["outcome"], done.document["steps"]) == (None, [])
    assert "Traceback" not in done.stderr
