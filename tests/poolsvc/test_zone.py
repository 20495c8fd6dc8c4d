"""The wanted zone and the way to it, as properties over many pools."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address

import dns.edns
import dns.flags
import dns.message
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.zones import wanted
from nts_core.metadata import Metadata, parse
from nts_core.srv import ANSWER_OCTETS, MAX_LABEL, MAX_TARGETS, MIN_TARGETS, targets_that_fit
from poolsvc.regions import REGIONS
from poolsvc.zone import (
    CaaIssuer,
    Change,
    RRset,
    ServerRecords,
    Zone,
    ZonePolicy,
    diff,
    guard,
    managed,
    of_settings_alone,
)

POLICY = ZonePolicy(
    pool="pool.example",
    srv_ttl=60,
    address_ttl=300,
    ke_port=4460,
    caa=(
        CaaIssuer("ca.example", "https://ca.example/acct/1"),
        CaaIssuer("other.example", "https://other.example/2"),
    ),
)
SERVICE = ("_ntske._tcp.pool.example.", "SRV")

addresses = st.lists(
    st.one_of(
        st.integers(0, 2**32 - 1).map(lambda n: str(IPv4Address(n))),
        st.integers(0, 2**128 - 1).map(lambda n: str(IPv6Address(n))),
    ),
    max_size=3,
).map(tuple)
labels = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,6}[a-z0-9])?", fullmatch=True)
metadata = st.none() | st.builds(
    Metadata,
    st.just("abcdefghij234"),
    st.sampled_from([(), (64500,), (1, 2)]),
    st.sampled_from([(), ("DE",)]),
)
servers = st.lists(
    st.builds(
        ServerRecords,
        labels,
        st.integers(1, 6),
        addresses,
        st.booleans(),
        st.integers(1, 10),
        metadata=metadata,
    ),
    max_size=14,
    unique_by=lambda server: server.name,
)
zones = st.builds(
    lambda some, is_open, draw: wanted(some, POLICY, is_open=is_open, draw=draw),
    servers,
    st.booleans(),
    st.integers(0, 1000),
)


@given(servers, st.booleans())
def test_what_is_wanted_reads_as_what_is_seen_on_a_primary(some, is_open):
    """The texts are made without a parser; observed ones come from dnspython's."""
    for (_, kind), rrset in wanted(some, POLICY, is_open=is_open, draw=0).items():
        assert rrset == RRset.of(rrset.ttl, kind, rrset.rdatas)


@pytest.mark.parametrize(
    "text", ["::", "::1", "::ffff:192.0.2.1", "::192.0.2.1", "2001:DB8:0:0::1", "1:0:0:2::"]
)
def test_every_form_of_an_address_reads_as_seen_on_a_primary(text):
    (rrset,) = (
        rrset
        for (_, kind), rrset in wanted(
            [ServerRecords("alice", 1, (text,), listed=False)], POLICY, is_open=False, draw=0
        ).items()
        if kind == "AAAA"
    )
    assert rrset == RRset.of(rrset.ttl, "AAAA", [text])


def targets(zone: Zone) -> list[str]:
    return [text.split()[3] for text in zone[SERVICE].rdatas] if SERVICE in zone else []


def resolvable(zone: Zone, owner: str) -> bool:
    return (owner, "A") in zone or (owner, "AAAA") in zone


def test_one_server_of_an_open_pool():
    server = ServerRecords("alice", 1, ("192.0.2.1", "2001:DB8::1", "192.0.2.2"), listed=True)
    alice = "alice.servers.pool.example."
    assert wanted([server], POLICY, is_open=True, draw=0) == {
        ("servers.pool.example.", "CAA"): RRset(300, frozenset({'0 issue ";"'})),
        (alice, "A"): RRset(300, frozenset({"192.0.2.1", "192.0.2.2"})),
        (alice, "AAAA"): RRset(300, frozenset({"2001:db8::1"})),
        (alice, "CAA"): RRset(
            300,
            frozenset(
                {
                    '0 issue "ca.example; accounturi=https://ca.example/acct/1; validationmethods=http-01"',
                    '0 issue "other.example; accounturi=https://other.example/2; validationmethods=http-01"',
                }
            ),
        ),
        SERVICE: RRset(60, frozenset({"0 10 4460 alice.servers.pool.example."})),
    }


ALICE = "alice.servers.pool.example."


def test_each_server_lets_its_own_methods_prove_control():
    zone = wanted(
        [
            ServerRecords("alice", 1, ("192.0.2.1",), listed=False, methods=("http-01", "dns-01")),
            ServerRecords("bob", 2, ("192.0.2.2",), listed=False),
        ],
        POLICY,
        is_open=False,
        draw=0,
    )
    assert all("validationmethods=http-01,dns-01" in text for text in zone[ALICE, "CAA"].rdatas)
    assert all(text.endswith('=http-01"') for text in zone["bob.servers.pool.example.", "CAA"].rdatas)


def test_a_server_that_is_out_keeps_only_what_proves_control_of_its_name():
    server = ServerRecords("alice", 1, (), listed=True, methods=("dns-01",), proofs=("text",), keeps_caa=True)
    zone = wanted([server], POLICY, is_open=True, draw=0)
    text = (f"_acme-challenge.{ALICE}", "TXT")
    assert set(zone) == {("servers.pool.example.", "CAA"), (ALICE, "CAA"), text}
    assert zone[text] == RRset(300, frozenset({'"text"'}))
    assert set(zone) <= {*POLICY.keys("alice"), ("servers.pool.example.", "CAA")}
    gone = wanted([replace(server, keeps_caa=False)], POLICY, is_open=True, draw=0)
    assert set(gone) == {("servers.pool.example.", "CAA")}, "without an address, nothing but that is a reason"


@pytest.mark.parametrize(
    ("owner", "ours"),
    [
        (f"_acme-challenge.{ALICE}", True),
        (ALICE, True),
        (f"_dmarc.{ALICE}", False),
        ("servers.pool.example.", False),
        ("_acme-challenge.pool.example.", False),
        ("_acme-challenge.alice.servers.other.example.", False),
        (f"x_acme-challenge.{ALICE}", False),
    ],
)
def test_a_text_elsewhere_is_the_operators(owner, ours):
    assert managed(owner, "TXT", POLICY) is ours


def test_a_pool_that_is_not_open_has_no_srv_but_its_servers_have_addresses():
    zone = wanted([ServerRecords("alice", 1, ("192.0.2.1",), listed=True)], POLICY, is_open=False, draw=0)
    assert SERVICE not in zone
    assert resolvable(zone, "alice.servers.pool.example.")


def test_a_server_that_is_not_listed_or_has_no_address_is_no_target():
    some = [
        ServerRecords("alice", 1, ("192.0.2.1",), listed=True),
        ServerRecords("bob", 2, ("192.0.2.2",), listed=False),
        ServerRecords("carol", 3, (), listed=True),
    ]
    zone = wanted(some, POLICY, is_open=True, draw=0)
    assert targets(zone) == ["alice.servers.pool.example."]
    assert resolvable(zone, "bob.servers.pool.example.")
    assert not any(owner.startswith("carol") for owner, _ in zone)


def test_without_an_issuer_a_server_is_closed():
    zone = wanted(
        [ServerRecords("alice", 1, ("192.0.2.1",), listed=False)],
        replace(POLICY, caa=()),
        is_open=True,
        draw=0,
    )
    assert zone["alice.servers.pool.example.", "CAA"].rdatas == {'0 issue ";"'}


@pytest.mark.parametrize("word", ["a;b", "a b", 'a"b', "a\\b", ""])
def test_words_that_would_change_the_meaning_of_a_caa_are_refused(word):
    with pytest.raises(ValueError, match="CAA"):
        CaaIssuer("ca.example", word)


@pytest.mark.parametrize("name", ["", "a.b", "Alice", "-a", "a-", "_tcp", "*", "a" * 64])
def test_names_that_are_not_one_label_are_refused(name):
    with pytest.raises(ValueError, match="server name"):
        ServerRecords(name, 1, (), listed=False)


def test_a_weight_of_zero_is_refused():
    with pytest.raises(ValueError, match="weight"):
        ServerRecords("alice", 1, (), listed=False, weight=0)


@given(zones)
def test_every_target_resolves_and_caa_and_addresses_go_together(zone):
    assert len(targets(zone)) <= POLICY.max_targets
    assert all(resolvable(zone, target) for target in targets(zone))
    closed = {owner for owner, rdtype in zone if rdtype == "CAA"} - {POLICY.servers}
    assert closed == {owner for owner, rdtype in zone if rdtype in {"A", "AAAA"}}


@given(zones)
def test_all_that_is_wanted_is_managed(zone):
    assert all(managed(owner, rdtype, POLICY) for owner, rdtype in zone)


@pytest.mark.parametrize(
    ("owner", "rdtype"),
    [
        ("pool.example.", "CAA"),
        ("ns1.pool.example.", "A"),
        ("_fence.pool.example.", "TXT"),
        ("_ntske._tcp.pool.example.", "RRSIG"),
        ("_https._tcp.pool.example.", "SRV"),
        ("alice.servers.pool.example.", "NSEC"),
        ("_4460._tcp.alice.servers.pool.example.", "TLSA"),
        ("otherservers.pool.example.", "A"),
    ],
)
def test_the_operators_records_are_not_managed(owner, rdtype):
    assert not managed(owner, rdtype, POLICY)


@given(servers)
def test_metadata_is_where_addresses_are(some):
    zone = wanted(some, POLICY, is_open=True, draw=0)
    for server in some:
        found = zone.get((POLICY.domain(server.name), "TXT"))
        if not server.addresses or server.metadata is None:
            assert found is None
        else:
            (text,) = found.rdatas
            assert parse([(text.strip('"').encode(),)]) == server.metadata


def test_a_challenge_and_metadata_are_each_at_their_own_owner():
    server = ServerRecords(
        "alice", 1, ("192.0.2.1",), listed=False, proofs=("x" * 43,), metadata=Metadata("abcdefghij234")
    )
    zone = wanted([server], POLICY, is_open=False, draw=0)
    assert zone["alice.servers.pool.example.", "TXT"] == RRset(
        300, frozenset({'"v=truechimer1 op=abcdefghij234"'})
    )
    assert zone["_acme-challenge.alice.servers.pool.example.", "TXT"].rdatas == {f'"{"x" * 43}"'}
    assert set(zone) - {("servers.pool.example.", "CAA")} <= set(POLICY.keys("alice"))


def octets_of_an_answer(pool, count):
    """A whole answer of the region with the longest name, over UDP: signed with P-256, all names as long as they may be."""
    service = f"_ntske._tcp.{max(REGIONS, key=len)}.{pool}."
    query = dns.message.make_query(service, "SRV", want_dnssec=True, payload=ANSWER_OCTETS)
    answer = dns.message.make_response(query)
    names = (f"{number:0{MAX_LABEL}}.servers.{pool}." for number in range(count))
    answer.answer += [
        dns.rrset.from_text(service, 60, "IN", "SRV", *(f"0 10 4460 {name}" for name in names)),
        dns.rrset.from_text(
            service, 60, "IN", "RRSIG", f"SRV 13 4 60 20260101000000 20260101000000 1 {pool}. {'A' * 86}=="
        ),
    ]
    cookie = dns.edns.CookieOption(bytes(8), bytes(16))
    answer.use_edns(payload=ANSWER_OCTETS, ednsflags=dns.flags.DO, options=[cookie])
    return len(answer.to_wire(max_size=65535))


pool_names = (
    st.integers(3, 200)
    .map(lambda length: "x.".join("a" * 50 for _ in range(5))[-length:])
    .filter(lambda name: not name.startswith("."))
)


@given(pool_names)
def test_as_many_targets_are_offered_as_fit_an_answer(pool):
    fit = targets_that_fit(pool)
    assert fit <= MAX_TARGETS
    if fit > 0:
        assert octets_of_an_answer(pool, fit) <= ANSWER_OCTETS
    if fit < MAX_TARGETS:
        assert octets_of_an_answer(pool, fit + 1) > ANSWER_OCTETS


def test_a_pool_with_a_long_name_offers_fewer_servers_at_a_time():
    assert [targets_that_fit("a" * length) for length in (53, 54, 132, 133)] == [8, 7, 4, 3]
    assert MIN_TARGETS == 4
    long = replace(POLICY, pool=f"{'a' * 63}.{'b' * 60}.example")
    many = [target(f"s{number}", number) for number in range(12)]
    (found,) = (rrset for key, rrset in wanted(many, long, is_open=True, draw=1).items() if key[1] == "SRV")
    assert len(found.rdatas) == long.max_targets == 4


@given(zones, zones)
def test_applying_the_difference_gives_what_is_wanted(before, after):
    zone = dict(before)
    for change in diff(after, before):
        key = change.owner, change.rdtype
        assert zone.pop(key, None) == change.before
        assert change.before != change.after
        if change.after is not None:
            zone[key] = change.after
    assert zone == after
    assert (diff(after, before) == ()) == (before == after)


@given(zones, zones)
def test_at_no_step_has_a_target_lost_its_addresses(before, after):
    zone = dict(before)
    for change in diff(after, before):
        zone.pop((change.owner, change.rdtype), None)
        if change.after is not None:
            zone[change.owner, change.rdtype] = change.after
        assert all(resolvable(zone, target) for target in targets(zone))


@given(servers)
def test_a_new_zone_is_closed_before_the_first_name_exists(some):
    first, *_ = diff(wanted(some, POLICY, is_open=True, draw=0), {})
    assert (first.owner, first.rdtype) == (POLICY.servers, "CAA")


def test_ttl_alone_is_a_difference():
    rrset = RRset(60, frozenset({"192.0.2.1"}))
    key = ("alice.servers.pool.example.", "A")
    (change,) = diff({key: replace(rrset, ttl=300)}, {key: rrset})
    assert (change.before, change.after) == (rrset, replace(rrset, ttl=300))


def target(name, member, *, weight=1):
    return ServerRecords(name, member, ("192.0.2.1",), listed=True, weight=weight)


def crowd(count: int, **options) -> list[ServerRecords]:
    """Servers with an address and a CAA each: with the closing CAA, 2 * count + 1 records."""
    return [
        ServerRecords(f"s{number:02}", number, (f"198.18.0.{number}",), listed=True, **options)
        for number in range(1, count + 1)
    ]


def zone_of(some, policy=POLICY, draw=0) -> Zone:
    return wanted(some, replace(policy, caa=policy.caa[:1]), is_open=True, draw=draw)


def guarded(before, after, excepted=()):
    """What may be made on the way from one pool to another, and what is asked."""
    zone = zone_of(before)
    return guard(diff(zone_of(after), zone), zone, POLICY, excepted)


def names(changes) -> set[str]:
    return {POLICY.name_of(change.owner) for change in changes if change.rdtype != "SRV"}


@pytest.mark.parametrize(
    ("count", "left", "is_asked"),
    [
        (4, 0, False),  # nine records are few
        (5, 4, False),  # two of eleven
        (5, 3, True),  # four of eleven
        (15, 11, False),  # eight of thirty-one
        (15, 10, True),  # ten of thirty-one
        (15, 0, True),
    ],
)
def test_more_than_30_percent_of_at_least_10_records_are_asked_for(count, left, is_asked):
    made, question = guarded(crowd(count), crowd(count)[:left])
    assert bool(question) is is_asked
    lost = 2 * (count - left)
    assert names(made) == (set() if is_asked else {f"s{one:02}" for one in range(left + 1, count + 1)})
    assert (question.deleted, question.replaced) == ((lost, 0) if is_asked else (0, 0))


def test_creations_never_count_and_are_made_beside_what_is_stopped():
    made, question = guarded(
        crowd(10), [*crowd(10)[:2], ServerRecords("new", 99, ("198.18.9.9",), listed=False)]
    )
    assert names(made) == {"new"}
    assert len(names(question.changes)) == 8
    assert not guarded([], crowd(50))[1]


def test_those_who_were_meant_to_go_do_not_count_and_go_also_when_others_are_stopped():
    everybody = crowd(12)
    gone = {server.name for server in everybody[:8]}
    made, question = guarded(everybody, everybody[8:], gone)
    assert (names(made), bool(question)) == (gone, False)
    made, question = guarded(everybody, everybody[11:], gone - {"s01"})
    assert (names(made), names(question.changes)) == (gone - {"s01"}, {"s01", "s09", "s10", "s11"})


def test_a_target_stays_in_the_srv_while_its_records_wait_for_a_word_and_one_that_was_meant_to_go_does_not():
    everybody = crowd(8)
    made, question = guarded(everybody, [], {"s01"})
    (service,) = (change for change in made if change.rdtype == "SRV")
    assert sorted(targets({SERVICE: service.after})) == [POLICY.domain(f"s{one:02}") for one in range(2, 9)]
    assert service.owner not in {change.owner for change in question.changes}


def test_an_srv_that_keeps_targets_is_no_longer_than_any_and_takes_new_ones_in():
    before = crowd(12)
    zone = zone_of(before)
    shown = {target.split(".")[0] for target in targets(zone)}
    lost = set(sorted(shown)[:5])
    after = [server for server in before if server.name not in lost]
    made, _ = guard(diff(zone_of(after, draw=9), zone), zone, POLICY)
    (service,) = (change for change in made if change.rdtype == "SRV")
    now = {target.split(".")[0] for target in targets({SERVICE: service.after})}
    assert lost <= now
    assert len(now) == 8


def test_other_settings_are_asked_for_and_known_as_such():
    zone = zone_of(crowd(10))
    for other in (
        replace(POLICY, address_ttl=60),
        replace(POLICY, caa=(CaaIssuer("x.example", "https://x/1"),)),
    ):
        _, question = guard(diff(zone_of(crowd(10), other), zone), zone, other)
        assert question.is_of_settings
        assert question.replaced >= 10
    moved = [replace(server, addresses=("203.0.113.1",)) for server in crowd(10)]
    assert not guarded(crowd(10), moved)[1].is_of_settings


def test_other_settings_that_wait_hold_up_neither_a_loss_nor_another_address_nor_the_srv():
    other, zone = replace(POLICY, address_ttl=60), zone_of(crowd(10))
    after = [replace(crowd(10)[1], addresses=("203.0.113.1",)), *crowd(10)[2:]]
    made, question = guard(diff(zone_of(after, other), zone), zone, other)
    assert question.is_of_settings
    done = {change.key: change.after for change in made}
    gone, moved = POLICY.domain("s01"), POLICY.domain("s02")
    assert (done[gone, "A"], done[gone, "CAA"]) == (None, None)
    assert done[moved, "A"].rdatas == {"203.0.113.1"}
    assert gone not in targets({SERVICE: done.get(SERVICE, zone[SERVICE])})


def test_one_server_is_never_a_wave():
    trio = [
        ServerRecords(f"s{number}", number, (f"198.18.0.{number}", f"2001:db8::{number}"), listed=True)
        for number in range(1, 4)
    ]
    made, question = guarded(trio, trio[1:])
    assert (names(made), bool(question)) == ({"s1"}, False)
    assert names(guarded(trio, trio[2:])[1].changes) == {"s1", "s2"}


def test_a_target_is_held_only_when_all_its_addresses_would_go_and_the_database_does_not_know_better():
    before = [replace(server, addresses=(*server.addresses, "2001:db8::1")) for server in crowd(8)]
    four = [replace(server, listed=False) for server in crowd(8)]
    made, question = guarded(before, four)
    assert {change.rdtype for change in question.changes} == {"AAAA"}
    assert [change.after for change in made if change.rdtype == "SRV"] == [None]
    zone = zone_of(crowd(8))
    made, question = guard(diff(zone_of([]), zone), zone, POLICY, unlisted={"s01", "s02"})
    (service,) = (change.after for change in made if change.rdtype == "SRV")
    assert sorted(targets({SERVICE: service})) == [POLICY.domain(f"s{one:02}") for one in range(3, 9)]
    assert "s01" in names(question.changes)


def test_what_settings_explain_is_what_all_that_were_alike_become():
    zone = zone_of(crowd(3))
    other = replace(POLICY, address_ttl=60, caa=(CaaIssuer("x.example", "https://x/1"),))
    plan = [change for change in diff(zone_of(crowd(3), other), zone) if POLICY.name_of(change.owner)]
    assert of_settings_alone(plan, zone, POLICY) == set(plan)
    for rdtype in ("A", "CAA"):
        some = [change for change in plan if (change.owner, change.rdtype) != (POLICY.domain("s01"), rdtype)]
        assert not of_settings_alone(some, zone, POLICY)
    proof = Change(POLICY.challenge("s01"), "TXT", RRset.of(2, "TXT", ["a"]), RRset.of(2, "TXT", ["b"]))
    assert not of_settings_alone([proof], {**zone, proof.key: proof.before}, POLICY)


def test_texts_for_a_ca_and_the_rotation_of_the_srv_do_not_count():
    proving = crowd(10, proofs=("a" * 43,) * 1)
    made, question = guarded(proving, crowd(10))
    assert not question
    assert len(made) == 10
    zone = zone_of(crowd(40))
    assert not guard(diff(zone_of(crowd(40), draw=5), zone), zone, POLICY)[1]


def test_an_address_more_is_no_loss_and_one_less_is():
    more = [replace(server, addresses=(*server.addresses, "203.0.113.7")) for server in crowd(10)]
    assert not guarded(crowd(10), more)[1]
    assert guarded(more, crowd(10))[1].replaced == 10


@given(zones, zones)
def test_what_is_made_and_what_is_asked_are_the_whole_plan_and_the_checksum_is_of_the_plan_alone(old, new):
    plan = diff(new, old)
    made, question = guard(plan, old, POLICY)
    assert {change.key for change in made} | {change.key for change in question.changes} <= {
        change.key for change in plan
    }
    assert {change.key for change in plan if change.rdtype != "SRV"} <= {
        change.key for change in (*made, *question.changes)
    }
    assert replace(question, changes=question.changes[::-1], existing=0).checksum == question.checksum
    if question:
        assert replace(question, changes=question.changes[1:]).checksum != question.checksum
        assert replace(question, kept=("alice",)).checksum != question.checksum


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (ALICE, "alice"),
        (f"_acme-challenge.{ALICE}", "alice"),
        ("servers.pool.example.", None),
        ("_ntske._tcp.pool.example.", None),
    ],
)
def test_whose_an_owner_is(owner, name):
    assert POLICY.name_of(owner) == name
