"""Drawn answer sets end to end: from the leader to the embedded server and to a Knot edge, and what a validating resolver sees."""

import asyncio
from random import Random

import dns.dnssec
import dns.flags
import dns.message
import dns.name
import dns.query
import dns.rcode
import pytest

from lab.embedded import Embedded
from lab.knot import KnotEdge
from lab.primaries import PRIMARIES
from lab.processes import Process, free_port, wait_until
from lab.programs import poolsvc, scrape, script
from lab.unbound import Unbound
from lab.zones import wanted
from poolsvc.cli import ExitStatus
from poolsvc.primary import NO_DRAW, Conflict, Fenced, Nameserver, PrimaryConfig
from poolsvc.publisher import Publisher
from poolsvc.subsets import NoSink, Sink, draw_of, marker
from poolsvc.zone import ServerRecords, ZonePolicy, diff, records_of

# Without a TTL a resolver asks for each answer, so that it sees them all.
POLICY = ZonePolicy("pool.example", srv_ttl=0, address_ttl=1, ke_port=4460, caa=())
EPOCH = 7
NAMES = [f"m{number}" for number in range(40)]
SERVERS = [ServerRecords(name, at, (f"198.51.100.{at}",), listed=True) for at, name in enumerate(NAMES)]
SERVICE = POLICY.service
VARIANTS = 16
# One of 16 is missed in so many questions with a chance below 16 (15/16)^1000 < 1e-26.
ENOUGH = 1000


def config_of(primary, *nameservers):
    return PrimaryConfig(
        address=primary.address,
        port=primary.port,
        tsig_name=primary.tsig_name,
        tsig_secret=primary.tsig_secret,
        nameservers=tuple(Nameserver(one.address, one.port) for one in (primary, *nameservers)),
    )


def drawn(seed, names=NAMES, count=VARIANTS):
    random = Random(seed)
    return [random.sample(names, 8) for _ in range(count)]


def all_of(sets):
    return {frozenset(POLICY.domain(name) for name in names) for names in sets}


async def filled(primary, *nameservers):
    """A publisher whose zone has all servers."""
    publisher = Publisher(POLICY, config_of(primary, *nameservers))
    await publisher.take_fence(EPOCH)
    zone = wanted(SERVERS, POLICY, is_open=True, draw=1)
    await publisher.apply(diff(zone, {}), EPOCH)
    return publisher, zone


def ask(server, owner=SERVICE, kind="SRV", **options):
    query = dns.message.make_query(owner, kind, want_dnssec=True, payload=1232, **options)
    return dns.query.udp(query, server.address, timeout=5, port=server.port)


def shown(answer):
    return frozenset(one.target.to_text() for one in answer.answer[0])


def seen(server, times=ENOUGH):
    """Every answer whole and signed by the zone's key, without an octet that was not asked for."""
    keys = ask(server, "pool.example.", "DNSKEY").answer[0]
    found = set()
    for _ in range(times):
        answer = ask(server)
        rrset, signatures = answer.answer
        dns.dnssec.validate(rrset, signatures, {keys.name: keys})
        assert not answer.flags & dns.flags.TC
        assert (answer.authority, answer.additional) == ([], [])
        found.add(shown(answer))
    return found


def token_at(server):
    answer = ask(server, marker(POLICY), "TXT").answer
    return answer[0][0].to_text().strip('"') if answer else None


@pytest.fixture
def embedded(tmp_path):
    with Embedded(tmp_path / "embedded", ttl=1, soa_minimum=1) as embedded:
        yield embedded


async def test_a_validating_resolver_sees_every_set_and_a_new_draw(embedded, tmp_path):
    publisher, zone = await filled(embedded)
    sink = Sink(publisher)
    assert await sink.token() == NO_DRAW
    proofs = [ask(embedded, SERVICE, "MX").authority, ask(embedded, "nobody.pool.example.").authority]
    serial = embedded.serial()
    sets = drawn(1)
    token = await sink.publish({SERVICE: sets}, 1, EPOCH)
    assert await sink.token() == token == token_at(embedded)
    assert seen(embedded) == all_of(sets)
    with Unbound(tmp_path / "unbound", [embedded]) as resolver:
        answers = [ask(resolver, flags=dns.flags.RD) for _ in range(ENOUGH // 4)]
        assert all(answer.flags & dns.flags.AD for answer in answers)
        assert {shown(answer) for answer in answers} <= all_of(sets)
        assert len({shown(answer) for answer in answers}) > VARIANTS // 2
        again = drawn(2)
        other = await sink.publish({SERVICE: again}, 2, EPOCH)
        assert other != token
        wait_until(lambda: shown(ask(resolver, flags=dns.flags.RD)) in all_of(again), "the new draw")
    assert seen(embedded, 100) <= all_of(again), "nothing of the draw before"
    assert embedded.serial() == serial + 1, "the marker, once"
    assert [one.to_text() for one in proofs[1] if "NSEC" in one.to_text() and "SOA" not in one.to_text()]
    assert await publisher.verify([(SERVICE, "SRV")], zone, draw_of(POLICY, [SERVICE], [other])) == ()


async def test_a_draw_is_its_leaders_comes_again_for_nothing_and_is_lost_with_the_server(embedded):
    publisher, zone = await filled(embedded)
    sink, sets = Sink(publisher), {SERVICE: drawn(1)}
    with pytest.raises(Fenced):
        await sink.publish(sets, 1, EPOCH - 1)
    assert token_at(embedded) in (None, NO_DRAW)
    token = await sink.publish(sets, 1, EPOCH)
    draw = draw_of(POLICY, sets, [token])
    assert await sink.publish(sets, 1, EPOCH) == token
    embedded.kill()
    embedded.start()
    assert await sink.token() == NO_DRAW == token_at(embedded)
    assert await publisher.verify([(SERVICE, "SRV")], zone, draw) == (), "the zone's own RRset"
    assert await sink.publish(sets, 1, EPOCH) == token
    assert await publisher.verify([(SERVICE, "SRV")], zone, draw) == ()


@pytest.mark.long
async def test_large_draws_come_in_parts(embedded):
    publisher, _ = await filled(embedded)
    sets = drawn(3, count=1500)
    await Sink(publisher).publish({SERVICE: sets}, 1, EPOCH)
    found = {shown(ask(embedded)) for _ in range(100)}
    assert found <= all_of(sets)
    assert len(found) > 80, "the chance of so many twins is below 1e-9"


async def test_an_address_leaves_with_the_sets_that_name_it(embedded):
    publisher, _ = await filled(embedded)
    sink, sets = Sink(publisher), drawn(4)
    await sink.publish({SERVICE: sets}, 1, EPOCH)
    gone = SERVERS[0]
    left = [one for one in sets if gone.name not in one]
    assert 0 < len(left) < len(sets)
    await publisher.apply(diff({}, records_of(gone, POLICY)), EPOCH)
    assert seen(embedded) == all_of(left)
    with pytest.raises(Conflict):
        await sink.publish({SERVICE: sets}, 2, EPOCH)
    assert seen(embedded, 50) <= all_of(left), "a draw that is refused changes nothing"


@pytest.mark.long
@pytest.mark.parametrize("kind", [kind for kind in PRIMARIES if PRIMARIES[kind] is not Embedded])
async def test_other_primaries_have_no_place_for_sets(tmp_path, kind):
    with PRIMARIES[kind](tmp_path / "primary", ttl=1) as primary:
        publisher = Publisher(POLICY, config_of(primary))
        await publisher.take_fence(EPOCH)
        with pytest.raises(NoSink):
            await Sink(publisher).publish({SERVICE: drawn(1)}, 1, EPOCH)


class Edge:
    """A knotd with the program beside it."""

    def __init__(self, tmp_path):
        self.embedded = Embedded(tmp_path / "embedded", ttl=1, soa_minimum=1)
        self.knot = KnotEdge(tmp_path / "edge", self.embedded)
        command = [script("poolsvc"), "dns", "edge", "--config", str(self.knot.settings)]
        self.program = Process("edge", command, self.knot.directory)

    async def once(self):
        return await asyncio.to_thread(poolsvc, self.knot.settings, "dns", "edge", "--once")

    def copy_key(self):
        self.knot.prepare()
        config = str(self.knot.directory / "knot.conf")
        copied = self.embedded.poolsvc("dns", "keys", "copy-to-knot", "--knot-config", config)
        assert copied.status == 0, copied.stderr
        self.knot.stop()


@pytest.fixture
def edge(tmp_path):
    edge = Edge(tmp_path)
    with edge.embedded:
        edge.copy_key()
        with edge.knot:
            yield edge


@pytest.mark.long
async def test_an_edge_answers_from_the_draw_and_goes_on_without_its_source(edge, tmp_path):
    publisher, zone = await filled(edge.embedded, edge.knot)
    sink, sets = Sink(publisher), drawn(1)
    done = await edge.once()
    assert done.stdout == "nothing new\n", done.stderr
    port = free_port("127.0.0.1")
    with edge.knot.settings.open("a") as file:
        file.write(f'metrics = "127.0.0.1:{port}"\n')
    with edge.program:
        edge.program.start()
        token = await sink.publish({SERVICE: sets}, 1, EPOCH)
        wait_until(lambda: token_at(edge.knot) == token, "the draw at the edge")
        assert seen(edge.knot) == all_of(sets)
        draw = draw_of(POLICY, [SERVICE], [token])
        assert await publisher.verify([(SERVICE, "SRV")], zone, draw) == ()
        with Unbound(tmp_path / "unbound", [edge.embedded]) as resolver:  # which asks both
            again = drawn(2)
            other = await sink.publish({SERVICE: again}, 2, EPOCH)
            wait_until(lambda: token_at(edge.knot) == other, "the next draw at the edge")
            wait_until(
                lambda: (
                    (answer := ask(resolver, flags=dns.flags.RD)).answer and shown(answer) in all_of(again)
                ),
                "the next draw at the resolver",
            )
            for _ in range(50):
                assert ask(resolver, flags=dns.flags.RD).flags & dns.flags.AD
        (late,) = {one.key for one in await publisher.verify([(SERVICE, "SRV")], zone, draw)}
        assert late == (marker(POLICY), "TXT"), "they are asked for the draw before"
        edge.embedded.stop()
        assert seen(edge.knot) == all_of(again)
        edge.embedded.start()
        assert token_at(edge.knot) == other, "a source without a draw changes nothing"
        gone = SERVERS[0]
        left = [[name for name in one if name != gone.name] for one in again]
        last = await sink.publish({SERVICE: left}, 3, EPOCH)
        wait_until(lambda: token_at(edge.knot) == last, "the edge is past the restart")
        assert seen(edge.knot, 100) <= all_of(left)
        figures = scrape(port)
        assert figures["truechimer_edge_sets"] == VARIANTS
        assert figures['truechimer_edge_events_total{event="reloaded"}'] >= 3
    assert "answer_sets_served" in edge.program.log.read_text()


async def test_an_edge_says_what_is_wrong_and_knotd_keeps_its_sets(edge):
    publisher, _ = await filled(edge.embedded, edge.knot)
    sink, sets = Sink(publisher), drawn(1)
    token = await sink.publish({SERVICE: sets}, 1, EPOCH)
    assert (await edge.once()).stdout == "knotd has new answer sets\n"
    settings = edge.knot.settings.read_text()
    for shipped, wrong, status, word in (
        ("tsig_name", "tsig_nam", ExitStatus.CONFIGURATION, "tsig_nam"),
        ('tsig_name = "edge.', 'tsig_name = "other.', ExitStatus.PEER, "TSIG key"),
        ("edge.secret", "none.secret", ExitStatus.CONFIGURATION, "tsig_secret_file"),
        (f"{edge.knot.zone}-sets.conf", "none/sets.conf", ExitStatus.CONFIGURATION, "sets_file"),
        (f":{edge.embedded.port}", ":1", ExitStatus.PEER, "refused"),
    ):
        edge.knot.settings.write_text(settings.replace(shipped, wrong))
        done = await edge.once()
        assert (done.status, word in done.stderr) == (status, True), done.stderr
    edge.knot.settings.write_text(settings)
    config = edge.knot.directory / "knot.conf"
    text = config.read_text()
    await sink.publish({SERVICE: drawn(2)}, 2, EPOCH)
    config.write_text(text + "nonsense:\n")
    done = await edge.once()
    assert (done.status, "does not reload" in done.stderr) == (ExitStatus.PEER, True), done.stderr
    config.write_text(text.replace(f"    module: [mod-geoip/{edge.knot.zone}-sets]\n", ""))
    done = await edge.once()
    assert (done.status, "include mod-geoip" in done.stderr) == (ExitStatus.PEER, True), done.stderr
    config.write_text(text)
    assert (await edge.once()).stdout == "knotd has new answer sets\n"
    assert token_at(edge.knot) not in (None, NO_DRAW, token)
