"""The wanted zone and the way to it, as properties over many pools."""

from collections import Counter
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolsvc.zone import (
    CaaIssuer,
    RRset,
    ServerRecords,
    Zone,
    ZonePolicy,
    diff,
    managed,
    sample,
    wanted,
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
servers = st.lists(
    st.builds(ServerRecords, labels, st.integers(1, 6), addresses, st.booleans(), st.integers(1, 10)),
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
        (ALICE, False),
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


def test_the_share_of_a_server_follows_its_weight():
    """One of many small servers is drawn about in proportion: weights 1, 2 and 4 for one place of one."""
    three = [target(f"s{weight}", weight, weight=weight) for weight in (1, 2, 4)]
    share = Counter(server.weight for draw in range(7000) for server in sample(three, 1, draw=draw))
    for weight in (1, 2, 4):
        # The standard deviation is at most sqrt(7000 * 4/7 * 3/7), about 41.
        assert abs(share[weight] - 1000 * weight) < 205


def test_a_draw_repeats_and_another_rotates():
    many = [target(f"s{number}", number) for number in range(40)]
    chosen = [targets(wanted(many, POLICY, is_open=True, draw=draw)) for draw in range(60)]
    assert targets(wanted(many[::-1], POLICY, is_open=True, draw=7)) == targets(
        wanted(many, POLICY, is_open=True, draw=7)
    )
    assert all(len(set(some)) == 8 for some in chosen)
    assert len({target for some in chosen for target in some}) == 40


pools = st.lists(
    st.tuples(labels, st.integers(1, 20), st.integers(1, 5)),
    max_size=40,
    unique_by=lambda server: server[0],
).map(lambda rows: [target(name, member, weight=weight) for name, member, weight in rows])


@given(pools, st.integers(0, 1000))
def test_a_member_has_one_target_while_other_members_have_none(some, draw):
    chosen = sample(some, 8, draw=draw)
    assert len({server.name for server in chosen}) == len(chosen) == min(8, len(some))
    assert set(chosen) <= set(some)
    members = {server.member for server in some}
    by_member = Counter(server.member for server in chosen)
    assert len(by_member) == min(8, len(members))
    if len(members) >= 8:
        assert set(by_member.values()) == {1}


@given(pools, st.integers(0, 1000), st.randoms(use_true_random=False))
def test_a_choice_does_not_depend_on_the_order_of_the_servers(some, draw, random):
    shuffled = random.sample(some, len(some))
    assert sample(shuffled, 8, draw=draw) == sample(some, 8, draw=draw)


def test_a_pool_of_one_member_has_as_many_targets_as_any_other():
    alone = [target(f"s{number}", 1) for number in range(12)]
    assert [len(sample(alone[:size], 8, draw=3)) for size in (0, 1, 7, 8, 12)] == [0, 1, 7, 8, 8]


def test_many_servers_give_a_member_no_more_than_one_place_and_its_servers_take_turns():
    big = [target(f"big{number}", 1) for number in range(30)]
    small = [target(f"s{number}", number + 2) for number in range(10)]
    chosen = [[one for one in sample(big + small, 8, draw=draw) if one.member == 1] for draw in range(400)]
    assert max(map(len, chosen)) == 1
    assert {server for some in chosen for server in some} == set(big)


@given(pools.filter(len), st.integers(0, 100))
def test_a_servers_coming_or_going_displaces_at_most_one_other(some, draw):
    gone, *others = some
    with_it, without = (set(sample(each, 8, draw=draw)) for each in (some, others))
    assert len(without - with_it) <= 1
    assert len(with_it - {gone} - without) == 0
