"""Answer sets that are drawn: what is refused, who gets which, what leaves with an address."""

from random import Random

import dns.dnssec
import dns.message
import dns.name
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import dns.update
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolsvc.nameserver import records, sets
from poolsvc.nameserver.answers import Answers
from poolsvc.nameserver.draws import Draws
from poolsvc.nameserver.keys import Keyring
from poolsvc.nameserver.sets import NO_DRAW, Head, Malformed
from poolsvc.nameserver.updates import Refused, evaluate
from tests.nameserver.conftest import APEX, NOW, ORIGIN, make, name, new_key, new_zone, rrset, run
from tests.nameserver.test_answers import asker, responder_of

SERVICE, REGION, MARKER = "_ntske._tcp", "_ntske._tcp.eu", "_draw"
SERVERS = [f"m{number}.servers" for number in range(10)]
DAY = 86_400


RANDOM = Random(1)


class World:
    """A zone of ten servers with the sets of its names, and who asks it."""

    def __init__(self, uniform=RANDOM.random):
        self.zone = new_zone()
        self.answers = Answers(self.zone)
        self.draws = Draws(self.zone, self.answers, NOW)
        self.change(
            {(name(one), records.A): rrset("A", f"198.51.100.{at}") for at, one in enumerate(SERVERS)}
            | {
                (name(owner), records.SRV): rrset("SRV", *map(srv, SERVERS[:8]), ttl=60)
                for owner in (SERVICE, REGION)
            }
            | {(name(MARKER), records.TXT): rrset("TXT", '"-"', ttl=0)}
        )
        self.ask = asker(responder_of(self.zone, self.answers, uniform=uniform, responses_at_once=10**6))

    def change(self, wanted, now=NOW, **options):
        edition = make(self.zone, wanted, now, **options)
        self.answers.renew(edition)
        self.draws.drop(edition)

    def draw(self, *parts, token="1-a", now=NOW):
        for index, part in enumerate(parts):
            self.part(part, Head(index, len(parts), token), now)

    def part(self, some, head, now=NOW):
        run(self.draws.take(self.draws.read(update(some, head)), now))

    def targets(self, owner=SERVICE, **options):
        """Of one answer, whose signature was checked."""
        answer = self.ask(owner, "SRV", **options)
        rrset, signatures = answer.answer
        keys = self.ask("@", "DNSKEY").answer[0]
        dns.dnssec.validate(rrset, signatures, {ORIGIN: keys}, now=NOW)
        return frozenset(one.target.relativize(ORIGIN).to_text() for one in rrset)

    def seen(self, owner=SERVICE, times=400):
        return {self.targets(owner) for _ in range(times)}


def srv(target):
    return f"0 10 4460 {target}"


def data(some):
    rdatas = [[b"\0\0\0\x0a\x11\x6c" + name(target) for target in one] for one in some]
    return list(sets.encode(APEX, rdatas))


def generic(octets):
    return dns.rdata.GenericRdata(dns.rdataclass.IN, dns.rdatatype.RdataType.make(records.SETS), octets)


def update(some, head, more=lambda update: None):
    """A message as it is read from the wire."""
    message = dns.update.UpdateMessage("pool.example.")
    message.add(MARKER, 0, generic(head.encode()))
    for owner, variants in some.items():
        for octets in data(variants):
            message.add(owner, 60, generic(octets))
    more(message)
    return dns.message.from_wire(message.to_wire(), one_rr_per_rrset=True)


SETS = [SERVERS[:4], SERVERS[2:8], SERVERS[5:9]]
ALL = {frozenset(one) for one in SETS}


@pytest.fixture
def world():
    return World()


def test_each_question_gets_one_of_the_sets_and_each_as_often():
    numbers = iter([0.0, 0.33, 0.34, 0.66, 0.67, 0.999] * 2)
    world = World(uniform=lambda: next(numbers))
    world.draw({SERVICE: SETS})
    for _ in range(2):  # the second time from what is kept of the first
        found = [world.ask(SERVICE, "SRV").answer[0] for _ in range(6)]
        shown = [{one.target.relativize(ORIGIN).to_text() for one in rrset} for rrset in found]
        assert shown == [set(SETS[at]) for at in (0, 0, 1, 1, 2, 2)]


def test_every_set_is_signed_and_seen_with_and_without_dnssec_and_by_whom_ever(world):
    world.draw({SERVICE: SETS, REGION: SETS[:1]})
    assert world.seen() == ALL  # one is missed with a chance of 3 (2/3)^400 < 1e-69
    assert world.seen(REGION, 20) == {frozenset(SETS[0])}
    plain = [world.ask(SERVICE, "SRV", dnssec=False).answer for _ in range(200)]
    assert {len(answer) for answer in plain} == {1}
    assert {len(answer[0]) for answer in plain} == {4, 6}


def test_any_and_rrsig_are_of_what_is_answered(world):
    world.draw({SERVICE: SETS})
    keys = world.ask("@", "DNSKEY").answer[0]
    for _ in range(20):
        found, signatures = world.ask(SERVICE, "ANY").answer
        dns.dnssec.validate(found, signatures, {ORIGIN: keys}, now=NOW)
        assert {one.target.relativize(ORIGIN).to_text() for one in found} in map(set, SETS)
    (signature,) = world.ask(SERVICE, "RRSIG").answer[0]
    assert signature.type_covered == dns.rdatatype.SRV


def test_the_marker_tells_the_draw_and_the_zone_itself_tells_of_none(world):
    assert [one.to_text() for one in world.ask(MARKER, "TXT").answer[0]] == ['"-"']
    world.draw({SERVICE: SETS}, token="7-abc")
    assert [one.to_text() for one in world.ask(MARKER, "TXT").answer[0]] == ['"7-abc"']
    assert (world.draws.token, len(world.draws)) == ("7-abc", 3)


def test_a_draw_is_in_place_with_its_last_part_and_all_at_once(world):
    before = world.targets()
    first, second = Head(0, 2, "1-a"), Head(1, 2, "1-a")
    world.part({SERVICE: SETS[:2], REGION: SETS[:1]}, first)
    assert {world.targets() for _ in range(50)} == {before}
    world.part({SERVICE: SETS[2:]}, second)
    assert world.seen() == ALL
    assert world.targets(REGION) == frozenset(SETS[0])
    world.draw({REGION: SETS[1:2]}, token="2-b")
    assert world.targets() == before, "an owner without sets answers with the zone's RRset"
    assert world.targets(REGION) == frozenset(SETS[1])
    world.draw({}, token="3-c")
    assert world.targets(REGION) == before
    assert len(world.draws) == 0


def refused(world, some, head, more=lambda update: None):
    with pytest.raises(Refused) as caught:
        run(world.draws.take(world.draws.read(update(some, head, more)), NOW))
    return caught.value.rcode


def test_a_part_that_is_not_the_next_is_refused_and_the_draw_goes_on(world):
    assert refused(world, {SERVICE: SETS}, Head(1, 2, "1-a")) == dns.rcode.NXRRSET
    world.part({SERVICE: SETS[:1]}, Head(0, 3, "1-a"))
    for head in (Head(2, 3, "1-a"), Head(1, 2, "1-a"), Head(1, 3, "2-b")):
        assert refused(world, {SERVICE: SETS}, head) == dns.rcode.NXRRSET
    world.part({SERVICE: SETS[1:2]}, Head(1, 3, "1-a"))
    world.part({SERVICE: SETS[2:]}, Head(2, 3, "1-a"))
    assert world.seen() == ALL


def test_a_draw_that_begins_ends_the_one_that_has_not_ended(world):
    world.part({SERVICE: SETS[:1]}, Head(0, 2, "1-a"))
    world.draw({SERVICE: SETS[1:2]}, token="2-b")
    assert refused(world, {SERVICE: SETS}, Head(1, 2, "1-a")) == dns.rcode.NXRRSET
    assert world.seen(times=20) == {frozenset(SETS[1])}


@pytest.mark.parametrize("missing", ["nobody.servers", "servers", "_tcp", MARKER])
def test_a_target_without_an_address_is_refused(world, missing):
    assert refused(world, {SERVICE: [[*SERVERS[:3], missing]]}, Head(0, 1, "1-a")) == dns.rcode.NXDOMAIN
    assert world.draws.token == NO_DRAW


def test_what_names_a_target_goes_with_its_last_address(world):
    world.draw({SERVICE: SETS, REGION: [SERVERS[5:9]]})
    world.part({SERVICE: SETS, REGION: SETS}, Head(0, 2, "2-b"))
    gone = SERVERS[5]
    world.change({(name(gone), records.AAAA): rrset("AAAA", "2001:db8::5")})
    world.change({(name(gone), records.A): None})
    assert world.seen() == ALL, "it has another address yet"
    world.change({(name(gone), records.AAAA): None})
    left = {one for one in ALL if gone not in one}
    assert world.seen() == left
    assert world.targets(REGION) == frozenset(SERVERS[:8]), "without a set the zone's own answers"
    world.part({}, Head(1, 2, "2-b"))
    assert (world.seen(), world.seen(REGION)) == (left, left), "a draw that had begun has lost them as well"


def test_what_loses_its_address_while_its_sets_are_signed_is_in_none(world):
    part = world.draws.read(update({SERVICE: SETS}, Head(0, 1, "1-a")))
    steps = world.draws.take(part, NOW)
    next(steps)
    world.change({(name(SERVERS[5]), records.A): None})
    run(steps)
    assert world.seen() == {one for one in ALL if SERVERS[5] not in one}


def test_a_name_without_an_rrset_in_the_zone_answers_nothing(world):
    world.draw({SERVICE: SETS})
    world.change({(name(SERVICE), records.SRV): None})
    assert world.ask(SERVICE, "SRV").answer == []
    world.change({(name(SERVICE), records.SRV): rrset("SRV", *map(srv, SERVERS[:4]), ttl=60)})
    assert world.seen() == ALL


def test_proofs_of_absence_are_the_zones(world):
    before = [world.ask(owner, kind).to_text() for owner, kind in ((SERVICE, "MX"), ("nobody", "A"))]
    world.draw({SERVICE: SETS})
    after = [world.ask(owner, kind).to_text() for owner, kind in ((SERVICE, "MX"), ("nobody", "A"))]
    assert [text.splitlines()[1:] for text in before] == [text.splitlines()[1:] for text in after]


def test_sets_are_no_zone_data(world):
    serial, content = world.zone.serial, dict(world.zone.copy())
    message = update({SERVICE: SETS}, Head(0, 1, "1-a"))
    assert evaluate(message, world.zone) == {}
    world.draw({SERVICE: SETS})
    assert (world.zone.serial, world.zone.copy()) == (serial, content)


def test_sets_that_come_again_keep_their_signatures(world):
    def signatures():
        return {one.signatures for one in world.answers._drawn[name(SERVICE), records.SRV].signed}

    world.draw({SERVICE: SETS})
    before = signatures()
    world.draw({SERVICE: SETS}, token="2-b", now=NOW + 60)
    assert signatures() == before
    world.draw({SERVICE: SETS}, token="3-c", now=NOW + DAY)
    assert not signatures() & before


def test_signatures_begin_seven_days_ago_and_are_renewed_within_a_day(world):
    world.draw({SERVICE: SETS})
    signature = world.ask(SERVICE, "SRV").answer[1][0]
    assert (signature.inception, signature.expiration) == (NOW - 7 * DAY, NOW + 7 * DAY)
    assert not world.draws.is_due(NOW)
    later = NOW + DAY + 1
    assert world.draws.is_due(later)
    run(world.draws.renew(later))
    assert not world.draws.is_due(later)
    assert world.ask(SERVICE, "SRV").answer[1][0].expiration == later + 7 * DAY
    assert world.draws.is_due(NOW - DAY), "a clock that was set back finds signatures of the future"


def test_another_key_signs_all_sets_anew(world):
    world.draw({SERVICE: SETS, REGION: SETS})
    key = new_key()
    world.change({}, keyring=Keyring(APEX, [key]), renewed=())
    assert world.draws.is_due(NOW)
    run(world.draws.renew(NOW))
    assert not world.draws.is_due(NOW)
    assert {world.ask(SERVICE, "SRV").answer[1][0].key_tag for _ in range(50)} == {key.tag}
    assert world.seen() == ALL


def test_an_edge_gets_the_sets_and_is_told_when_there_are_no_others(world):
    (head,) = world.draws.listed(None)
    assert head.endswith(b"-")
    world.draw({SERVICE: SETS, REGION: SETS})
    first, *found, last = world.draws.listed(None)
    assert first == last
    assert len(found) == 2
    known = first.rpartition(b"\0\1")[2].decode()
    assert list(world.draws.listed(known)) == [first]
    world.change({(name(SERVERS[5]), records.A): None})
    assert len(list(world.draws.listed(known))) == 4, "there are others, though of the same draw"
    assert len(list(world.draws.listed(NO_DRAW))) == 1


def record(octets, owner=SERVICE):
    return lambda message: message.add(owner, 60, generic(octets))


SOME = data([SERVERS[:2]])[0]


@pytest.mark.parametrize(
    "octets",
    [
        b"\1",
        b"\2" + SOME[1:],
        SOME[:-1],
        SOME + b"\0",
        SOME + b"\x09" + SOME[8:] * 5,
        SOME[:7] + b"\2" + SOME[8:20] * 2,  # one target twice
        SOME[:7] + b"\1\0",  # the zone itself
        SOME[:7] + b"\1\2\5a",
        SOME[:7] + b"\1\x41\x40" + b"a" * 64,
        SOME[:7] + b"\1\xff" + (b"\x3f" + b"a" * 63) * 3 + b"\x3e" + b"a" * 62,
    ],
    ids=repr,
)
def test_malformed_sets_are_refused(world, octets):
    assert refused(world, {}, Head(0, 1, "1-a"), record(octets)) == dns.rcode.FORMERR


@pytest.mark.parametrize(
    "more",
    [
        lambda message: message.add("alice.servers", 60, "A", "192.0.2.1"),
        lambda message: message.delete(SERVICE, "TYPE65400"),
        lambda message: message.delete(SERVICE, generic(SOME)),
        lambda message: message.delete(SERVICE),
    ],
)
def test_sets_beside_other_changes_or_deleted_are_refused(world, more):
    assert refused(world, {SERVICE: SETS}, Head(0, 1, "1-a"), more) == dns.rcode.FORMERR


def test_sets_outside_of_the_zone_are_refused(world):
    assert refused(world, {"a.example.net.": SETS}, Head(0, 1, "1-a")) == dns.rcode.NOTZONE


@pytest.mark.parametrize(
    "octets", [b"", b"\0", b"\0\0\0\0\1", b"\0\0\1\0\1a", b"\0\0\0\0\1A", b"\0\0\0\0\1" + b"a" * 65, SOME]
)
def test_a_malformed_head_is_refused(world, octets):
    message = dns.update.UpdateMessage("pool.example.")
    message.add(MARKER, 0, generic(octets))
    with pytest.raises(Refused) as caught:
        world.draws.read(dns.message.from_wire(message.to_wire(), one_rr_per_rrset=True))
    assert caught.value.rcode == dns.rcode.FORMERR


def test_there_are_no_more_sets_than_memory_is_meant_for(world, monkeypatch):
    monkeypatch.setattr("poolsvc.nameserver.draws._MOST_SETS", 4)
    world.part({SERVICE: SETS}, Head(0, 3, "1-a"))
    assert refused(world, {SERVICE: SETS}, Head(1, 3, "1-a")) == dns.rcode.REFUSED
    assert refused(world, {SERVICE: SETS}, Head(1, 3, "1-a")) == dns.rcode.NXRRSET, "the draw is given up"


@given(st.binary(max_size=200))
def test_garbage_is_no_sets(octets):
    for begins in (b"", b"\1", SOME[:7]):
        try:
            found = sets.decode(begins + octets, APEX)
        except Malformed:
            continue
        assert all(1 <= len(one) <= sets.MOST_TARGETS for one in found)
        assert all(len(sets.target(rdata)) <= 255 for one in found for rdata in one)


TARGETS = st.lists(
    st.from_regex(r"[a-z0-9]{1,20}\.servers", fullmatch=True), min_size=1, max_size=8, unique=True
)


@given(st.lists(TARGETS, min_size=1, max_size=200))
def test_what_is_encoded_is_read_again(some):
    read = [one for octets in data(some) for one in sets.decode(octets, APEX)]
    assert [{sets.target(rdata) for rdata in one} for one in read] == [
        {name(one) for one in each} for each in some
    ]
