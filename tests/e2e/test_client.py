"""A pool's client against everything that goes wrong at once: 12 members of 5 operators in a network of its own.

The members are real NTS servers at port 4460, each in a network of its own, the zone is Knot's, the resolver Unbound, the
client asks them over the network namespace's loopback as it would over the Internet.
"""

import asyncio
import json
import os
import secrets
from datetime import UTC, datetime, timedelta

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest
from cryptography import x509

from lab.certificates import Authority
from lab.knot import Knot
from lab.namespaces import in_namespace
from lab.nts_server import NtsServer, forged_kiss
from lab.pool_zone import PoolZone
from lab.programs import script
from lab.unbound import Unbound
from nts_core.denial import Witnesses
from nts_core.independence import Bond
from nts_core.packet import Header, Mode, Packet
from nts_core.panel import BURST, Standing
from nts_core.pool import PoolClient
from nts_core.resolve import Resolver, Resolvers, TrustAnchors
from nts_core.roster import Fault
from nts_core.source import SystemClock
from nts_core.srv import targets_that_fit

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace of its own takes root")

POOL = "pool.example"
SECOND = 1_000_000_000
# Operator, autonomous system and country of each.
MEMBERS = {
    "hangs": ("a", 64500, "DE"),
    "liar": ("b", 64501, "FR"),
    "denies": ("c", 64502, "JP"),
    "expires": ("d", 64503, "US"),
    "leaver": ("e", 64504, "BR"),
    "good1": ("a", 64500, "DE"),
    "good2": ("b", 64501, "FR"),
    "good3": ("c", 64502, "JP"),
    "good4": ("d", 64503, "US"),
    "good5": ("a", 64505, "NL"),
    "good6": ("b", 64501, "FR"),
    "good7": ("c", 64506, "JP"),
}
ADDRESSES = {name: f"198.51.{number}.7" for number, name in enumerate(MEMBERS, 1)}
HANGS, LIAR, DENIES, EXPIRES, LEAVER = BAD = list(MEMBERS)[:5]
GOOD = list(MEMBERS)[5:]


def domain(name):
    return f"{name}.servers.{POOL}"


class Silent(asyncio.Protocol):
    """Takes connections and never says a word."""


class Counting:
    """Counts the looks at the pool's answer."""

    def __init__(self, lookup):
        self._lookup = lookup
        self.asked = 0

    async def lookup(self, owner, rdtype, now):
        self.asked += rdtype == "SRV"
        return await self._lookup.lookup(owner, rdtype, now)


class World:
    """The pool, its DNS, and whoever asks."""

    def __init__(self, directory):
        self.directory = directory
        self.authority = Authority(directory / "ca")
        self.roots = x509.load_pem_x509_certificates(self.authority.root.read_bytes())
        self.knot = Knot(directory / "knot", ttl=1, soa_minimum=1)
        self.unbound = Unbound(directory / "unbound", [self.knot])
        self.zone = PoolZone(self.knot)
        self.servers = {}

    async def __aenter__(self):
        self.knot.start()
        self.zone.add(
            *(
                (name, ADDRESSES[name], f"op={operator * 13} as={network} cc={country}")
                for name, (operator, network, country) in MEMBERS.items()
            )
        )
        self.unbound.start()
        now = datetime.now(UTC)
        self.end = now + timedelta(seconds=6)
        for name in MEMBERS:
            if name == HANGS:
                continue
            ends = self.end if name == EXPIRES else None
            begins = now - timedelta(days=1)
            server = NtsServer(
                self.authority.issue(domain(name), not_before=begins, not_after=ends), ADDRESSES[name]
            )
            await server.start(4460, 123)
            self.servers[name] = server
        loop = asyncio.get_running_loop()
        self._silent = await loop.create_server(Silent, ADDRESSES[HANGS], 4460)
        self.servers[LIAR].offset = 40 * SECOND
        rude = self.servers[DENIES]
        rude.before, rude.is_silent = rude.kiss(b"DENY"), True
        return self

    async def __aexit__(self, *_):
        self._silent.close()
        for server in self.servers.values():
            await server.stop()
        self.unbound.stop()
        self.knot.stop()
        for name, server in self.servers.items():
            assert max(server.cookies.values(), default=0) <= 1, f"{name} saw a cookie twice"

    def resolver(self, server):
        return Resolver(server.address, server.port, TrustAnchors.parse(self.knot.trust_anchor()), 0.6)

    def client(self, **options):
        self.lookup = Counting(Resolvers([self.resolver(self.unbound)]))
        values = {
            "lookup": self.lookup,
            "denier": Witnesses([(self.unbound.address, self.unbound.port)]),
            "roots": self.roots,
            "interval": 0.1,
            "clock": SystemClock(is_good=lambda: True),
        }
        return PoolClient(POOL, **(values | options))

    def asked_for_srv(self):
        """How often since this was asked first."""
        self.since = getattr(self, "since", self.lookup.asked)
        return self.lookup.asked - self.since


def living(directory, monkeypatch, story):
    """Run an asynchronous story in a world of its own."""
    monkeypatch.setattr("nts_core.membership.MIN_LOOK", 0.2)
    monkeypatch.setattr("nts_core.session.MIN_RETRY", SECOND // 2)
    monkeypatch.setattr("nts_core.client.establish_any.__kwdefaults__", {"offered": (15,), "timeout": 1.5})
    monkeypatch.setattr("nts_core.client.exchange.__kwdefaults__", {"timeout": 0.25})

    async def told():
        async with World(directory) as world:
            await story(world)

    addresses = [f"{address}/32" for address in ADDRESSES.values()]
    in_namespace(lambda: asyncio.run(told()), addresses)


def used(view, *standings):
    return {
        source.candidate.name.partition(".")[0]
        for source in view.sources
        if not standings or source.standing in standings
    }


def faults(view):
    return {source.candidate.name.partition(".")[0]: source.hold.fault for source in view.held}


async def until(pool, wanted, what, timeout=40.0):
    view = None
    try:
        async with asyncio.timeout(timeout):
            async for view in pool.views():
                if wanted(view):
                    return view
    except TimeoutError:
        raise AssertionError(f"never: {what}; {view}") from None
    raise AssertionError("the client has ended")


def is_well(view):
    """Four good sources that do not depend on each other."""
    return (
        len(view.sources) == len(used(view, Standing.TRUECHIMER)) == 4
        and view.given_up == ()
        and len(view.reading.sources) >= 3
    )


def test_four_good_independent_sources_whatever_happens(tmp_path, monkeypatch):
    # An answer with room for more would say that all others are no members.
    full = [HANGS, *GOOD]
    assert len(full) == targets_that_fit(POOL)

    async def story(world):
        world.zone.list(["good1", "good2", "good3"], first=BAD)
        async with world.client(state=tmp_path / "state") as pool:
            view = await until(pool, lambda view: is_well(view) and len(view.held) >= 3, "four at the start")
            wrong = {HANGS: Fault.UNREACHABLE, LIAR: Fault.FALSETICKER, DENIES: Fault.REFUSED}
            assert faults(view) | {EXPIRES: None} == wrong | {EXPIRES: None}
            assert LEAVER in used(view)

            # Its keys work on, and its CA gives it no other certificate.
            world.zone.list(full)
            view = await until(
                pool, lambda view: EXPIRES in faults(view) and is_well(view), "the expired one's end"
            )
            assert [source.trouble for source in view.held if source.candidate.name == domain(EXPIRES)] == [
                f"the certificate for {domain(EXPIRES)} ended on {world.end:%Y-%m-%d %H:%M} UTC"
            ]

            # A large pool's answer is another one each TTL: nobody is dropped for that.
            before = used(view)
            world.zone.list([LEAVER, *BAD[:3], *GOOD[:4]])
            await until(pool, lambda _: world.asked_for_srv() > 2, "two other answers")
            assert used(pool.view()) == before
            assert LEAVER in before

            # It serves on, and hands out cookies gladly.
            world.zone.remove(LEAVER)
            world.zone.list([*BAD[:3], *GOOD[:5]])
            view = await until(
                pool, lambda view: LEAVER not in used(view) and view.truechimers == 4, "the leaver's end"
            )
            assert LEAVER not in faults(view)
            assert not list((tmp_path / "state").glob(f"{domain(LEAVER)}*.json"))
            asked = sum(world.servers[LEAVER].cookies.values())

            # DNS is away altogether.
            before = used(view)
            world.unbound.stop()
            world.knot.stop()
            view = await until(pool, lambda view: view.problem is not None, "the outage of DNS")
            taken = max(source.samples for source in view.sources)
            view = await until(
                pool, lambda view: min(source.samples for source in view.sources) > taken, "time without DNS"
            )
            assert used(view, Standing.TRUECHIMER) == before
            world.knot.start()
            world.unbound.start()
            view = await until(pool, lambda view: view.problem is None, "DNS again")
            assert used(view) == before
            assert sum(world.servers[LEAVER].cookies.values()) == asked, "nobody asks who has left"

            # Two die at once. Of the operators that are left three have somebody good: that is told.
            dead = {"good4", *sorted(before)[:1]}
            assert dead <= before, "of the fourth operator nobody else is good"
            for name in dead:
                world.servers[name].is_silent = True
            world.zone.list(full)
            view = await until(
                pool, lambda view: not used(view) & dead and view.truechimers == 4, "the dead ones' end"
            )
            assert {faults(view)[name] for name in dead} == {Fault.UNREACHABLE}
            operators = [MEMBERS[name][0] for name in used(view)]
            shared = sum(operators.count(each) - 1 for each in set(operators))
            assert sum(Bond.OPERATOR in pair.bonds for pair in view.given_up) >= shared > 0
        async with world.client(state=tmp_path / "state") as pool:
            again = await until(pool, lambda view: view.truechimers == 4, "four in a later run")
            assert used(again) == used(view)

    living(tmp_path, monkeypatch, story)


class Forger:
    """On the path: before each true answer come many that are not."""

    def __init__(self, server):
        self.server = server
        self.sent = 0
        self._former = []

    def __call__(self, request):
        asked = Packet.decode(request)
        plain = Header(
            mode=Mode.SERVER, stratum=1, origin=asked.header.transmit, receive=1 << 60, transmit=1 << 60
        ).encode()
        true = self.server.answer(request)
        flipped = bytearray(true)
        flipped[secrets.randbelow(len(true))] ^= 1 << secrets.randbelow(8)
        forged = [
            *[forged_kiss(request, code) for code in (b"NTSN", b"DENY", b"RSTR", b"RATE")] * 10,
            *self._former[-4:][::-1],
            plain,
            bytes(flipped),
            secrets.token_bytes(len(true)),
            true[:-4],
        ]
        self._former.append(true)
        self.sent += len(forged)
        return forged


class HostileResolver(asyncio.DatagramProtocol):
    """Says with confidence what is not so: another pool, other addresses, and that nobody is there."""

    def connection_made(self, transport):
        self.transport = transport
        self.asked = 0

    def datagram_received(self, data, address):
        self.asked += 1
        query = dns.message.from_wire(data)
        (question,) = query.question
        answer = dns.message.make_response(query)
        answer.flags |= dns.flags.AD | dns.flags.AA
        lies = {
            "SRV": "0 0 4460 evil.example.",
            "A": "198.51.66.6",
            "TXT": '"v=truechimer1 op=evilevilevile"',
        }
        kind = dns.rdatatype.to_text(question.rdtype)
        if kind in lies:
            answer.answer.append(dns.rrset.from_text(question.name, 60, "IN", kind, lies[kind]))
        else:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        self.transport.sendto(answer.to_wire(), address)


def test_forgers_on_the_way_and_a_hostile_resolver_change_nothing(tmp_path, monkeypatch):
    async def story(world):
        forgers = {name: Forger(server) for name, server in world.servers.items() if name in GOOD}
        for name, forger in forgers.items():
            world.servers[name].before = forger
        loop = asyncio.get_running_loop()
        transport, hostile = await loop.create_datagram_endpoint(
            HostileResolver, local_addr=("127.0.0.1", 53)
        )
        world.zone.list(GOOD)
        evil = Resolver("127.0.0.1", 53, TrustAnchors.parse(world.knot.trust_anchor()), 0.6)
        resolvers = Resolvers([evil, world.resolver(world.unbound)])
        witnesses = Witnesses([("127.0.0.1", 53), (world.unbound.address, world.unbound.port)])
        async with world.client(lookup=resolvers, denier=witnesses) as pool:
            await until(pool, is_well, "four at the start")
            view = await until(
                pool, lambda view: min(source.samples for source in view.sources) > 3 * BURST, "many polls"
            )
            assert is_well(view)
            assert view.held == ()
            assert abs(view.reading.offset) < SECOND
        transport.close()
        assert hostile.asked > 0
        assert list(resolvers.passed_over) == [str(evil)]
        busy = [name for name in GOOD if world.servers[name].cookies]
        assert len(busy) == 4
        assert all(forgers[name].sent > 40 * 3 * BURST for name in busy)
        assert all(world.servers[name].establishments == 1 for name in busy), (
            "NTSN that is forged costs no keys"
        )

    living(tmp_path, monkeypatch, story)


async def run_client(world, command, *arguments, terminal=None):
    """`pool-client COMMAND POOL` to its end: status and standard output, or what a terminal got."""
    anchor = world.directory / "anchor"
    anchor.write_text(world.knot.trust_anchor())
    validates = not any("--dnssec" in argument for argument in arguments)
    process = await asyncio.create_subprocess_exec(
        script("pool-client"),
        command,
        POOL,
        *([f"--trust-anchor={anchor}"] if validates else []),
        f"--resolver={world.unbound.address}:{world.unbound.port}",
        f"--ca={world.authority.root}",
        *arguments,
        stdout=asyncio.subprocess.PIPE if terminal is None else terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "160"},
    )
    told, _ = await process.communicate()
    return process.returncode, (told or b"").decode()


def test_the_programs_show_what_becomes_of_the_sources(tmp_path, monkeypatch):
    async def story(world):
        world.zone.list(["good1", "good2", "good3"], first=[LIAR, LEAVER])
        state = f"--state={tmp_path / 'state'}"
        status, told = await run_client(world, "sources", "--json", state)
        document = json.loads(told)
        verdicts = {source["name"].partition(".")[0]: source["verdict"] for source in document["sources"]}
        assert (status, document["agreeing"], verdicts[LIAR]) == (0, 4, "falseticker")
        asked = [server.establishments for server in world.servers.values()]

        # A later run goes on where that one was, and nobody is asked for keys again.
        status, told = await run_client(world, "watch", "--json", "--for=2", state)
        lines = [json.loads(line) for line in told.splitlines()]
        assert status == 0
        assert lines[-1]["agreeing"] == 4
        (held,) = (source["held_s"] for source in lines[-1]["sources"] if source["name"] == domain(LIAR))
        assert held > 3000
        assert [server.establishments for server in world.servers.values()] == asked, lines

        status, told = await run_client(world, "watch", "--for=2")
        assert status == 0
        assert f"{domain(LEAVER)}: truechimer" in told
        assert "sources that agree: 4" in told
        ours, theirs = os.openpty()
        try:
            status, _ = await run_client(world, "watch", "--for=2", terminal=theirs)
            drawn = os.read(ours, 65536).decode()
        finally:
            os.close(ours)
            os.close(theirs)
        assert status == 0
        assert "next look at DNS" in drawn
        assert domain("good1") in drawn

        for dnssec, words in (("off", "unproven"), ("trust-resolver", "on the resolver's word")):
            status, told = await run_client(world, "sources", f"--dnssec={dnssec}")
            assert (status, f"membership {words}" in told) == (0, True)
        status, told = await run_client(world, "sources", "--dnssec=off", "--json")
        assert json.loads(told)["membership"] == "unproven"

        # Five are four and a liar: with six wanted it is said who is missing and why.
        status, told = await run_client(world, "sources", "--json", "--count=6")
        document = json.loads(told)
        assert (status, document["error"]["code"]) == (6, "too-few-sources")
        assert f"{domain(LIAR)}: its time disagrees" in document["error"]["message"]

    living(tmp_path, monkeypatch, story)
