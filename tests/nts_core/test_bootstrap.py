"""The time out of nothing but a pool: worlds whose time is not this host's, and such as would like to be believed.

This host's clock is never set: each world is moved away from it, with its zone's signatures, certificates and servers.
"""

import asyncio
import time
from datetime import UTC, datetime, timedelta

import dns.dnssec
import dns.flags
import dns.message
import dns.name
import dns.rrset
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from dns.rdatatype import RdataType

from lab.certificates import Authority
from lab.knot import Knot
from lab.nts_server import NtsServer
from nts_core import pool as pool_module
from nts_core import show, store
from nts_core.bootstrap import bootstrap
from nts_core.client import ClientError, Failure
from nts_core.panel import Standing
from nts_core.pool import PoolClient
from nts_core.resolve import Dnssec, ResolveError, Resolver, TrustAnchors, Window
from nts_core.source import CertificateCheck, SystemClock
from nts_core.store import TimeRecord

POOL = "pool.example"
SECOND = 1_000_000_000
DAY = timedelta(days=1)
YEAR = 365 * DAY
NONE = timedelta()
UNSURE = SystemClock(is_good=lambda: False)


class Zone(asyncio.DatagramProtocol):
    """A pool's zone that is signed for each question: `since` to `until`, from this host's present, or by name."""

    def __init__(self):
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.dnskey = dns.dnssec.make_dnskey(self.key.public_key(), "ECDSAP256SHA256", flags=257)
        self.name = dns.name.from_text(POOL)
        self.since, self.until = -7 * DAY, 7 * DAY
        self.of_name = {}
        self.records = {(self.name, RdataType.DNSKEY): [self.dnskey.to_text()]}
        self.before_answer = lambda _name, _rdtype: None

    def connection_made(self, transport):
        self.transport = transport

    def put(self, name, rdtype, *texts):
        self.records[dns.name.from_text(f"{name}.{POOL}"), RdataType.make(rdtype)] = list(texts)

    def remove(self, name):
        srv = self.records[dns.name.from_text(f"_ntske._tcp.{POOL}"), RdataType.SRV]
        srv[:] = [text for text in srv if f" {name}.servers" not in text]
        self.records = {
            key: texts for key, texts in self.records.items() if not key[0].to_text().startswith(f"{name}.")
        }

    def datagram_received(self, data, address):
        query = dns.message.from_wire(data)
        answer = dns.message.make_response(query)
        name, rdtype = query.question[0].name, query.question[0].rdtype
        texts = self.records.get((name, rdtype))
        if texts:
            rrset = dns.rrset.from_text_list(name, 60, "IN", rdtype, texts)
            since, until = self.of_name.get(name.to_text(), (self.since, self.until))
            now = datetime.now(UTC)
            signature = dns.dnssec.sign(
                rrset,
                self.key,
                self.name,
                self.dnskey,
                inception=now + since,
                expiration=now + until,
            )
            answer.answer += [rrset, dns.rrset.from_rdata(name, 60, signature)]
        self.transport.sendto(answer.to_wire(), address)
        self.before_answer(name, rdtype)

    def seed(self):
        """Its records as lines of a zone file, but for its keys."""
        return [
            f"{name.relativize(self.name)} {RdataType.to_text(rdtype)} {text}"
            for (name, rdtype), texts in self.records.items()
            for text in texts
            if rdtype != RdataType.DNSKEY
        ]

    def resolver(self, **options):
        host, port = self.transport.get_extra_info("sockname")
        return Resolver(
            host, port, TrustAnchors.parse(f"{POOL}. IN DNSKEY {self.dnskey.to_text()}"), **options
        )

    async def deny(self, name):
        return (dns.name.from_text(name), RdataType.A) not in self.records


class World:
    """A zone and servers with one letter as their name. `at` is where its time is, from this host's."""

    def __init__(self, authority, zone):
        self._authority, self.zone = authority, zone
        self.servers = {}

    def move(self, at):
        self.zone.since, self.zone.until = at - 7 * DAY, at + 7 * DAY

    async def add(self, *names, at=NONE, since=None, until=None, operator=None, has_metadata=True):
        now = datetime.now(UTC)
        for name in names:
            pair = self._authority.issue(
                f"{name}.servers.{POOL}",
                not_before=now + (at - DAY if since is None else since),
                not_after=now + (at + 10 * DAY if until is None else until),
                file=f"{name}{time.monotonic_ns()}",
            )
            server = NtsServer(pair, f"127.{ord(name)}.0.1")
            server.offset = round(at.total_seconds()) * SECOND
            await server.start()
            self.servers[name] = server
            self.zone.put(f"{name}.servers", "A", server.host)
            if has_metadata:
                self.zone.put(
                    f"{name}.servers", "TXT", f'"v=truechimer1 op={(operator or name) * 3:a<13.13}"'
                )
        self.zone.put(
            "_ntske._tcp",
            "SRV",
            *(f"0 10 {server.ke_port} {name}.servers.{POOL}." for name, server in self.servers.items()),
        )

    @property
    def roots(self):
        return x509.load_pem_x509_certificates(self._authority.root.read_bytes())

    async def bootstrap(self, floor=-300 * DAY):
        return await bootstrap(POOL, self.zone.resolver(), self.roots, datetime.now(UTC) + floor)

    async def refusal(self, floor=-300 * DAY):
        with pytest.raises(ClientError) as caught:
            await self.bootstrap(floor)
        assert caught.value.remedy
        return caught.value

    def client(self, **options):
        defaults = {"lookup": self.zone.resolver(), "denier": self.zone, "roots": self.roots, "clock": UNSURE}
        return PoolClient(POOL, **(defaults | options))

    async def close(self):
        for server in self.servers.values():
            await server.stop()
        self.zone.transport.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    now = datetime.now(UTC)
    return Authority(
        tmp_path_factory.mktemp("authority"), not_before=now - 3 * YEAR, not_after=now + 65 * YEAR
    )


@pytest.fixture
async def world(authority):
    loop = asyncio.get_running_loop()
    _, zone = await loop.create_datagram_endpoint(Zone, local_addr=("127.0.0.1", 0))
    made = World(authority, zone)
    yield made
    await made.close()


# How far this host's clock is behind: negative is ahead.
BEHIND = [
    pytest.param(50 * YEAR, id="50 years behind"),
    pytest.param(30 * DAY, id="a month behind"),
    pytest.param(-YEAR, id="a year ahead"),
]


@pytest.mark.parametrize("at", BEHIND)
async def test_a_clock_that_is_wrong_is_no_obstacle(world, at, monkeypatch):
    monkeypatch.setattr(pool_module, "BUILT", datetime.now(UTC) + at - 100 * DAY)
    world.move(at)
    await world.add(*"abcd", at=at)
    async with world.client() as client:
        view = await client.settled()
    assert [source.standing for source in view.sources] == [Standing.TRUECHIMER] * 4, view
    assert abs(view.reading.offset - at.total_seconds() * SECOND) < SECOND
    assert (view.problem, view.warnings) == (None, ())
    assert len(view.shortcuts) == 2
    assert all("checked again at the time found" in text for text in view.shortcuts)
    assert show.document(view)["shortcuts"] == list(view.shortcuts)
    assert f"shortcut: {view.shortcuts[0]}" in show.summary(view)
    assert f"shortcut: {view.shortcuts[0]}" in show.changes(None, view)


@pytest.mark.parametrize("behind", [50 * YEAR, DAY, -YEAR])
async def test_a_zone_that_knot_signs_leads_to_the_time(world, tmp_path, behind):
    """With a clock of its own for this client, as Knot's is this host's."""
    await world.add(*"abcd")
    with Knot(tmp_path, records=world.zone.seed()) as knot:
        resolver = Resolver(knot.address, knot.port, TrustAnchors.parse(knot.trust_anchor()))
        clock = SystemClock(lambda: time.time_ns() - round(behind.total_seconds()) * SECOND, lambda: False)
        async with world.client(lookup=resolver, clock=clock) as client:
            view = await client.settled()
    assert view.truechimers == 4, view
    assert abs(view.reading.unix - time.time_ns()) < SECOND
    assert len(view.shortcuts) == 2


async def test_a_clock_that_is_an_hour_ahead_needs_no_shortcut(world):
    await world.add(*"abcd", at=timedelta(hours=-1))
    async with world.client() as client:
        view = await client.settled()
    assert view.truechimers == 4
    assert view.shortcuts == ()


async def test_certificates_that_are_not_good_yet_lead_to_the_time_as_well(world):
    """A day behind: the zone's signatures still hold, the certificates are of this morning."""
    await world.add(*"abcd", at=DAY, since=DAY / 2)
    async with world.client() as client:
        view = await client.settled()
    assert view.truechimers == 4, view
    assert len(view.shortcuts) == 2


@pytest.mark.parametrize(
    "options", [{"check": CertificateCheck.STRICT}, {"clock": SystemClock(is_good=lambda: True)}]
)
async def test_who_goes_by_the_clock_alone_gets_no_time_from_elsewhere(world, options):
    world.move(YEAR)
    await world.add(*"abcd", at=YEAR)
    async with world.client(**options) as client:
        view = await client.settled()
    assert view.problem.code == "expired"
    assert (view.reading, view.shortcuts) == (None, ())
    assert all(server.establishments == 0 for server in world.servers.values())


async def test_the_time_found_is_recorded_and_is_the_floor_from_then_on(world, tmp_path):
    world.move(YEAR)
    await world.add(*"abcd", at=YEAR)
    async with world.client(state=tmp_path / "state") as client:
        await client.settled()
    floor, fault = TimeRecord(tmp_path / "state").floor()
    assert abs(floor - datetime.now(UTC) - YEAR) < timedelta(minutes=1)
    assert fault is None


async def test_a_clock_before_the_recorded_time_is_not_believed_even_if_the_zone_agrees_with_it(
    world, tmp_path
):
    """An old zone, as old as the clock: without a record both would be right."""
    await world.add(*"abcd")
    TimeRecord(tmp_path / "state").save(time.time_ns() + 100 * 86_400 * SECOND)
    async with world.client(state=tmp_path / "state") as client:
        view = await client.settled()
        with pytest.raises(ClientError) as caught:
            await client.reading()
    assert (view.problem.code, caught.value.code) == (Failure.CLOCK, Failure.CLOCK)
    assert "before the last time that is known" in view.problem.message
    assert all(server.establishments == 0 for server in world.servers.values())


def test_the_floor_is_the_later_of_the_record_and_the_programs_date(tmp_path):
    record = TimeRecord(tmp_path)
    assert record.floor() == (store.BUILT, None)
    record.save(SECOND)
    assert record.floor() == (store.BUILT, None)
    record.save(4_000_000_000 * SECOND)
    assert record.floor() == (datetime.fromtimestamp(4_000_000_000, UTC), None)


# Who agrees


async def test_what_is_found_is_said(world):
    await world.add(*"abcd")
    world.servers["d"].offset = 3600 * SECOND
    found = await world.bootstrap()
    assert abs(found.unix - time.time_ns()) < SECOND
    assert 0 < found.error < SECOND
    assert sorted(name[0] for name in found.sources) == list("abc")


async def test_two_operators_are_too_few_however_many_servers_they_have(world):
    await world.add(*"abc", operator="a")
    await world.add(*"def", operator="d")
    error = await world.refusal()
    assert error.code == Failure.CLOCK
    assert "servers of 2 operators agree on a time, and 3 are needed" in error.message


async def test_three_that_disagree_tell_nothing(world):
    await world.add(*"abc")
    world.servers["b"].offset, world.servers["c"].offset = 3600 * SECOND, -3600 * SECOND
    assert (await world.refusal()).code == Failure.CLOCK


async def test_a_silent_server_is_named(world):
    await world.add(*"abc")
    world.servers["c"].clock = world.servers["c"].clock.__class__(3, 16, -20, 0, 0, b"INIT", 0)
    error = await world.refusal()
    assert f"c.servers.{POOL}: " in error.message


async def test_where_no_operators_are_named_networks_count_and_that_is_said(world):
    await world.add(*"abc", has_metadata=False)
    found = await world.bootstrap()
    assert len(found.sources) == 3
    assert any("each network was counted as an operator" in text for text in found.shortcuts)


async def test_where_some_are_named_the_others_have_no_vote(world):
    """Who hides the metadata of his servers does not make them several operators'."""
    await world.add(*"ab")
    await world.add(*"cd", has_metadata=False)
    assert "servers of 2 operators" in (await world.refusal()).message


async def test_without_validation_here_there_is_no_time(world):
    await world.add(*"abc")
    with pytest.raises(ClientError) as caught:
        await bootstrap(
            POOL, world.zone.resolver(dnssec=Dnssec.OFF), world.roots, datetime.now(UTC) - 300 * DAY
        )
    assert "--dnssec require" in caught.value.remedy


# The past, replayed: a zone of 50 days ago, with the certificates and keys of then


async def past(world, *names):
    world.move(-50 * DAY)
    await world.add(*names, at=-50 * DAY)


async def test_a_past_that_ended_before_the_recorded_time_is_refused(world):
    await past(world, *"abcd")
    error = await world.refusal(-30 * DAY)
    assert error.code == Failure.DNS
    assert "had ended" in error.message
    assert all(server.establishments == 0 for server in world.servers.values())


async def test_certificates_that_ended_before_the_recorded_time_are_refused(world):
    """Somebody has the zone's keys of today, and old ones of its servers."""
    await world.add(*"abcd", at=-50 * DAY)
    error = await world.refusal(-30 * DAY)
    assert error.code == Failure.CLOCK
    assert "ended on" in error.message
    assert "before the last recorded time" in error.message


async def test_a_past_of_which_somebody_has_the_keys_of_two_operators_is_refused(world, tmp_path):
    await past(world, *"abcd")
    other = Authority(tmp_path)
    for name in "cd":
        world.servers[name].certify(other.issue(f"{name}.servers.{POOL}"))
    error = await world.refusal()
    assert "servers of 2 operators agree" in error.message
    assert "signature does not match" in error.message


async def test_a_past_with_the_keys_of_three_operators_is_what_remains_without_a_record(world):
    """The limit, as docs/adr/0048-bootstrap.md has it."""
    await past(world, *"abc")
    found = await world.bootstrap()
    assert abs(found.unix - time.time_ns() + 50 * 86_400 * SECOND) < SECOND


async def test_a_removed_member_does_not_count_at_the_time_found(world):
    """The first answer is an old one that still holds; the pool's own of today names one less."""
    await world.add(*"abc")

    def remove(name, rdtype):
        if rdtype == RdataType.TXT and name.to_text().startswith("c."):
            world.zone.remove("c")

    world.zone.before_answer = remove
    error = await world.refusal()
    assert "servers of 2 operators are confirmed" in error.message
    assert f"c.servers.{POOL}: it is not a member" in error.message


async def test_old_and_new_signatures_are_not_mixed(world):
    await world.add(*"abc")
    world.zone.of_name[f"c.servers.{POOL}."] = -60 * DAY, -40 * DAY
    error = await world.refusal()
    assert f"c.servers.{POOL}: the signature over c.servers.{POOL}. had ended, or was not valid together" in (
        error.message
    )


# What is told is held against what is known


async def test_a_time_before_the_floor_is_refused(world):
    await world.add(*"abc", until=60 * DAY)
    world.zone.until = 60 * DAY
    error = await world.refusal(30 * DAY)
    assert error.code == Failure.CLOCK
    assert "which is certainly past" in error.message


@pytest.mark.parametrize("begins", [8 * DAY, 60 * YEAR])
async def test_signatures_of_the_future_do_not_hold_at_the_time_told(world, begins):
    world.zone.since, world.zone.until = begins, begins + DAY
    await world.add(*"abc", until=61 * YEAR)
    error = await world.refusal()
    assert error.code == Failure.CLOCK
    assert "not valid at the time that these tell" in error.message


async def test_a_certificate_that_is_not_good_at_the_time_told_takes_its_server_out(world):
    await world.add(*"abc")
    await world.add("d", until=-timedelta(hours=1))
    assert sorted(name[0] for name in (await world.bootstrap()).sources) == list("abc")
    await world.servers.pop("a").stop()
    error = await world.refusal()
    assert f"d.servers.{POOL}" in error.message
    assert "ended on" in error.message


# A lookup whose time is open


async def test_a_window_is_narrowed_by_what_was_relied_on_and_by_nothing_else(world):
    await world.add("a", "b")
    now = time.time()
    world.zone.of_name[f"a.servers.{POOL}."] = -DAY, DAY
    world.zone.of_name[f"b.servers.{POOL}."] = 2 * DAY, 3 * DAY
    resolver, window = world.zone.resolver(), Window(now - 300 * 86_400)
    await resolver.lookup(f"a.servers.{POOL}.", "A", window)
    assert window.since == pytest.approx(now - 86_400, abs=5)
    assert window.until == pytest.approx(now + 86_400, abs=5)
    with pytest.raises(ResolveError) as caught:
        await resolver.lookup(f"b.servers.{POOL}.", "A", window)
    assert caught.value.code == "expired"
    assert window.until == pytest.approx(now + 86_400, abs=5)


async def test_what_was_found_with_the_time_left_open_is_not_used_at_a_known_time(world):
    await world.add("a")
    world.zone.since, world.zone.until = 8 * DAY, 9 * DAY
    resolver = world.zone.resolver()
    await resolver.lookup(f"a.servers.{POOL}.", "A", Window(0))
    assert resolver.keys == {}
    with pytest.raises(ResolveError):
        await resolver.lookup(f"a.servers.{POOL}.", "A", time.time())
