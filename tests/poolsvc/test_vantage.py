"""Which monitors look at which address, and when: who may not, who is chosen, how few change, and what others see."""

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from itertools import combinations
from math import gcd
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolsvc.vantage import (
    ACTIVE,
    LEAST,
    LOST,
    NEW,
    POINTS,
    TESTING,
    Candidate,
    Glance,
    Target,
    ViewRole,
    disagreement,
    interval,
    next_probe,
    review,
)
from poolsvc.verdicts import FRESH, FRESH_HOPELESS

NOW = datetime(2026, 11, 27, 20, tzinfo=UTC)
SERVER = Target(ip_address("198.51.100.7"), 1, (ip_address("198.51.100.7"), ip_address("2001:db8:7::1")))
MS = 1_000_000
LATER = timedelta(days=3)


def monitor(number, delay=None, **options):
    """One of a network of its own; `delay` in milliseconds."""
    place = {
        "party": 100 + number,
        "addresses": (ip_address(f"10.{number}.0.1"), ip_address(f"2001:db8:{number:x}00::1")),
        "network": 64512 + number,
        "mean_delay_ns": None if delay is None else delay * MS,
    }
    return Candidate(number, **(place | options))


def monitors(count=20):
    return [monitor(number, 10 * number) for number in range(1, count + 1)]


def apply(candidates, choices, points=POINTS):
    """The candidates with what was chosen, some hours later."""
    return [
        replace(one, role=choice.role, points=points) for one, choice in zip(candidates, choices, strict=True)
    ]


def settled(candidates, target=SERVER, **options):
    for _ in range(30):
        choices = review(target, candidates, NOW, **options)
        if not any(choice.is_change for choice in choices):
            return candidates
        candidates = apply(candidates, choices)
    raise AssertionError("reviews never come to an end")


def with_role(candidates, role=ViewRole.ACTIVE):
    return [one.monitor for one in candidates if one.role is role]


def test_seven_are_active_and_five_testing_and_each_has_a_reason():
    found = settled(monitors())
    assert len(with_role(found)) == ACTIVE
    assert len(with_role(found, ViewRole.TESTING)) == TESTING
    choices = review(SERVER, found, NOW)
    assert all(choice.reason for choice in choices)
    moved = [replace(one, mean_delay_ns=one.mean_delay_ns + 3 * MS) for one in found]
    assert review(SERVER, moved, NOW) == choices, "a reason has nothing that changes with every probe"
    assert [choice.monitor for choice in choices] == [one.monitor for one in found]


def test_neither_the_nearer_nor_the_farther_half_has_more_than_three_places_and_the_one_that_is_drawn_from_all():
    for number in range(50):
        target = replace(SERVER, address=ip_address(f"198.51.100.{number}"))
        active = with_role(settled(monitors(), target))
        assert sum(number <= 10 for number in active) in {3, 4}
        reasons = Counter(choice.reason for choice in review(target, monitors(), NOW))
        assert reasons["drawn from the nearer half"] >= 3


def test_they_are_drawn_for_each_address_and_by_the_pools_secret():
    others = replace(SERVER, address=ip_address("198.51.100.8"))
    drawn = {
        tuple(with_role(settled(monitors(), target, lot=lot)))
        for target in (SERVER, others)
        for lot in (b"", b"one", b"two")
    }
    assert len(drawn) > 3


ADDRESSES = [ip_address(f"198.51.100.{number}") for number in range(100)]


def pools(candidates, addresses=ADDRESSES):
    """Who is active in the end for each address."""
    return [set(with_role(settled(candidates, replace(SERVER, address=address)))) for address in addresses]


def told(candidates, lies):
    """The same monitors, of which some report another round trip."""
    return [
        replace(one, mean_delay_ns=lies.get(one.monitor, one.mean_delay_ns / MS) * MS) for one in candidates
    ]


@pytest.mark.parametrize("claims", [(0, 0, 0, 0), (5000, 5000, 5000, 5000), (0, 0, 0, 5000)])
def test_who_lies_about_how_near_it_is_has_no_more_places_and_no_majority_with_others_who_do(claims):
    liars = (7, 19, 26, 40)
    found = pools(told(monitors(40), dict(zip(liars, claims, strict=True))))
    load = Counter(number for active in found for number in active)
    mean = ACTIVE * len(ADDRESSES) / 40
    assert sum(load[number] for number in liars) <= 1.3 * mean * len(liars)
    assert max(load.values()) <= 2 * mean
    assert all(len(active & set(liars)) < 4 for active in found)


def test_who_is_only_on_trial_does_not_move_the_middle():
    liars = (7, 19, 26, 40)
    crowd = [
        monitor(number, 0, is_active=False, network=1, addresses=(ip_address(f"10.0.0.{number}"),))
        for number in range(41, 61)
    ]
    found = pools(told(monitors(40), dict.fromkeys(liars, 0)) + crowd)
    assert all(len(active & set(liars)) < 4 for active in found)
    assert sum(len(active & set(liars)) == 3 for active in found) <= 5


def test_who_is_always_there_has_not_all_places_in_the_end_while_others_come_and_go():
    draw = Random(1)
    steady = {7, 19, 26, 40}
    load = Counter()
    for address in ADDRESSES[:12]:
        target = replace(SERVER, address=address)
        candidates = settled(told(monitors(40), dict.fromkeys(steady, 0)), target)
        for _ in range(40):
            gone = {number for number in range(1, 41) if number not in steady and draw.random() < 0.1}
            for _ in range(3):
                seen = [
                    replace(one, lost_since=NOW - LATER) if one.monitor in gone else one for one in candidates
                ]
                seen = apply(seen, review(target, seen, NOW))
                candidates = [replace(one, lost_since=None) for one in seen]
        load.update(with_role(candidates))
    mean = ACTIVE * 12 / 40
    assert sum(load[number] for number in steady) <= 2 * mean * len(steady)


def test_round_trips_that_waver_change_few():
    draw = Random(1)
    changes = 0
    for address in ADDRESSES[:10]:
        target = replace(SERVER, address=address)
        candidates = settled(monitors(40), target)
        for _ in range(50):
            seen = told(candidates, {n: 10 * n * draw.uniform(0.95, 1.05) for n in range(1, 41)})
            choices = review(target, seen, NOW)
            candidates = apply(candidates, choices)
            changes += sum(choice.is_change and choice.role is ViewRole.ACTIVE for choice in choices)
    assert changes <= 15, "of 500 reviews"


def test_a_server_that_is_bad_keeps_its_monitors():
    found = settled(monitors())
    bad = [replace(one, mean_delay_ns=None) if one.role is ViewRole.ACTIVE else one for one in found]
    for _ in range(10):
        choices = review(SERVER, bad, NOW)
        bad = apply(bad, choices)
        assert len(with_role(bad)) == ACTIVE


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"party": 1}, "it is the server's own member's"),
        ({"addresses": (ip_address("198.51.100.200"),)}, "it is in the server's own network"),
        ({"addresses": (ip_address("2001:db8:7::2"),)}, "it is in the server's own network"),
    ],
)
def test_who_is_too_near_a_server_in_name_or_network_never_looks_at_it(change, reason):
    found = [
        replace(one, role=ViewRole.ACTIVE, **change) if one.monitor == 1 else one
        for one in settled(monitors())
    ]
    first = review(SERVER, found, NOW)[0]
    assert (first.role, first.reason, first.is_change) == (ViewRole.PAUSED, reason, True)


def test_a_pool_with_nobody_else_looks_from_the_servers_own_network_but_never_with_its_member():
    beside = monitor(1, addresses=(ip_address("198.51.100.200"),))
    assert review(SERVER, [beside], NOW)[0].role is ViewRole.ACTIVE
    assert review(SERVER, [replace(beside, party=1)], NOW)[0].role is ViewRole.PAUSED
    assert review(SERVER, [beside, monitor(2)], NOW)[0].role is ViewRole.PAUSED


def test_two_monitors_of_a_member_are_active_at_most():
    found = settled([replace(one, party=500) if one.monitor < 8 else one for one in monitors()])
    assert sum(number < 8 for number in with_role(found)) == 2
    reasons = [choice.reason for choice in review(SERVER, found, NOW) if choice.role is ViewRole.CANDIDATE]
    assert "2 monitors of its member look at it already" in reasons


def test_two_monitors_of_an_as_are_active_at_most():
    found = settled([replace(one, network=1) if one.monitor < 8 else one for one in monitors()])
    assert sum(number < 8 for number in with_role(found)) == 2


def test_monitors_whose_network_is_not_known_count_as_of_one_where_most_are_known():
    hidden = [replace(one, network=None) if one.monitor < 8 else one for one in monitors()]
    found = settled(hidden)
    assert sum(number < 8 for number in with_role(found)) == 2
    reasons = [choice.reason for choice in review(SERVER, found, NOW)]
    assert "2 monitors of unknown networks look at it already" in reasons
    for known in (0, 4):
        some = [replace(one, network=None) if one.monitor > known else one for one in monitors(9)]
        assert len(with_role(settled(some))) == ACTIVE


def test_a_region_has_fewer_than_half_of_the_places_unless_it_has_most_of_the_monitors():
    for many, most in ((8, 3), (10, 4), (15, 6), (20, 7)):
        placed = [
            replace(one, region="europe" if one.monitor <= many else f"{one.monitor % 3}")
            for one in monitors()
        ]
        found = pools(placed, ADDRESSES[:20])
        assert max(sum(number <= many for number in active) for active in found) == most
        assert all(len(active) == ACTIVE for active in found)


def test_a_region_fills_the_places_that_others_cannot():
    placed = [replace(one, region="europe" if one.monitor < 6 else f"{one.monitor}") for one in monitors(11)]
    trial = [replace(one, is_active=one.monitor < 8) for one in placed]
    assert with_role(settled(trial)) == [1, 2, 3, 4, 5, 6, 7]


def test_one_monitor_of_a_neighbourhood_is_active():
    near = [replace(one, addresses=(ip_address(f"10.1.0.{one.monitor}"),)) for one in monitors(8)]
    assert sum(number < 9 for number in with_role(settled(near + monitors()[8:]))) == 1
    assert len(with_role(settled(near))) == 3, (
        "where there are no others, a quorum of them is better than none"
    )


def test_only_monitors_that_the_pool_has_made_active_are_active():
    trial = [replace(one, is_active=False) for one in monitors(10)]
    found = settled(trial + monitors(25)[10:])
    assert min(with_role(found)) > 10
    assert sum(number <= 10 for number in with_role(found, ViewRole.TESTING)) <= 1
    assert with_role(settled(trial)) == []
    assert len(with_role(settled(trial), ViewRole.TESTING)) == 10


def test_a_new_address_has_a_quorum_at_once_and_others_are_tested_first():
    candidates = [monitor(number) for number in range(1, 21)]
    first = apply(candidates, review(SERVER, candidates, NOW), points=0)
    assert len(with_role(first)) == 4
    second = apply(first, review(SERVER, first, NOW), points=0)
    third = apply(second, review(SERVER, second, NOW), points=0)
    assert (len(with_role(second)), len(with_role(third))) == (6, 6)
    assert len(with_role(third, ViewRole.TESTING)) == TESTING + 1
    assert len(with_role(settled([replace(one, points=POINTS) for one in third]))) == ACTIVE


def test_two_change_at_a_time_and_nobody_before_a_better_one_is_there():
    found = settled(monitors())
    moved = [replace(one, mean_delay_ns=(500 - 10 * one.monitor) * MS) for one in found]
    choices = review(SERVER, moved, NOW)
    after = apply(moved, choices)
    assert len(with_role(after)) == ACTIVE
    assert len(set(with_role(found)) - set(with_role(after))) <= 2
    assert len(set(with_role(found, ViewRole.TESTING)) - set(with_role(after, ViewRole.TESTING))) <= 4


def test_who_is_not_heard_is_replaced_after_an_hour_and_not_when_nobody_is_heard():
    found = settled(monitors())
    lost = with_role(found)[0]
    for silence, stays in ((LOST - timedelta(minutes=1), True), (LOST, False)):
        seen = [replace(one, lost_since=NOW - silence) if one.monitor == lost else one for one in found]
        active = with_role(settled(seen))
        assert (lost in active) is stays
        assert len(active) == ACTIVE
    gone = [replace(one, lost_since=NOW - LATER) for one in found]
    assert with_role(settled(gone)) == with_role(found)


def test_who_loses_a_family_is_replaced_and_not_sent_away_before_that():
    found = settled(monitors())
    number = with_role(found)[0]
    mute = [replace(one, families=frozenset((6,))) if one.monitor == number else one for one in found]
    after = settled(mute)
    choice = review(SERVER, after, NOW)[number - 1]
    assert (choice.role, choice.reason) == (ViewRole.PAUSED, "it has no IPv4")
    assert len(with_role(after)) == ACTIVE
    nobody = [replace(one, families=frozenset((6,))) for one in found]
    assert with_role(settled(nobody)) == with_role(found)


candidates_of_all_kinds = st.lists(
    st.builds(
        Candidate,
        monitor=st.just(0),
        party=st.integers(1, 6),
        is_active=st.booleans(),
        addresses=st.builds(
            lambda a, b: (ip_address(f"198.51.{a}.{b}"),),
            st.sampled_from([1, 100, 101, 200]),
            st.integers(1, 9),
        ),
        families=st.sampled_from([frozenset((4,)), frozenset((6,)), frozenset((4, 6))]),
        network=st.none() | st.integers(1, 4),
        region=st.none() | st.sampled_from(["europe", "asia"]),
        lost_since=st.none() | st.sampled_from([NOW, NOW - LOST]),
        role=st.sampled_from(ViewRole),
        points=st.integers(0, 20),
        mean_delay_ns=st.none() | st.floats(0, 1e9),
    ),
    max_size=30,
).map(lambda found: [replace(one, monitor=number) for number, one in enumerate(found, 1)])


@given(candidates_of_all_kinds)
def test_whoever_there_is_the_rules_hold(candidates):
    choices = review(SERVER, candidates, NOW)
    assert [choice.monitor for choice in choices] == [one.monitor for one in candidates]
    assert all(choice.reason and len(choice.reason) <= 200 for choice in choices)
    active = [one for one, choice in zip(candidates, choices, strict=True) if choice.role is ViewRole.ACTIVE]
    for one in active:
        assert one.is_active
        assert one.party != SERVER.party
        assert 4 in one.families or one.role is ViewRole.ACTIVE
    joined = [one for one in active if one.role is not ViewRole.ACTIVE]
    assert len(joined) <= 4
    able = [one for one in candidates if one.is_active and one.party != SERVER.party and 4 in one.families]
    if any(one.lost_since != NOW - LOST for one in able):
        assert active, "whoever may look at it is better than nobody"
    settled(candidates)


@given(candidates_of_all_kinds)
def test_in_the_end_no_two_active_ones_are_too_near_each_other_while_there_are_enough(candidates):
    fresh = [replace(one, role=ViewRole.CANDIDATE, points=POINTS) for one in candidates]
    found = [one for one in settled(fresh) if one.role is ViewRole.ACTIVE]
    parties = [one.party for one in found]
    assert max(map(parties.count, parties), default=0) <= 2
    if len(found) > 3:
        for one, other in combinations(found, 2):
            assert int(one.addresses[0]) >> 12 != int(other.addresses[0]) >> 12


EVERY = {
    "active": (ViewRole.ACTIVE, 20.0, LATER),
    "testing": (ViewRole.TESTING, 20.0, LATER),
    "new": (ViewRole.ACTIVE, None, timedelta()),
    "hopeless": (ViewRole.ACTIVE, -95.0, LATER),
    "glance": (ViewRole.CANDIDATE, 20.0, LATER),
}


def every(kind, number=1, active=ACTIVE, least=LEAST):
    role, score, age = EVERY[kind]
    return interval(role, score, monitor=number, active=active, age=age, least=least)


def test_the_hopeless_are_looked_at_seldom_and_the_new_often():
    assert every("new") < every("active") < every("testing") < every("hopeless") < every("glance")
    assert interval(ViewRole.PAUSED, 20.0, monitor=1, active=7, age=LATER) is None
    assert interval(ViewRole.ACTIVE, 12.0, monitor=1, active=7, age=NEW) == every("active")


def test_no_interval_is_a_multiple_of_another():
    found = {every(kind, number) for kind in EVERY for number in range(40)}
    assert len(found) > 20
    assert all(gcd(int(one), int(other)) == 1 for one, other in combinations(found, 2))


def test_of_a_view_that_counts_one_probe_may_be_missed():
    for kind, lasts in (("active", FRESH), ("hopeless", FRESH_HOPELESS)):
        assert all(2 * 1.05 * every(kind, number) < lasts.total_seconds() for number in range(40))


def test_the_fewer_look_the_more_often_each_does_and_a_demo_is_faster():
    assert every("active", active=1) == pytest.approx(every("active") / 7)
    assert every("new", active=1) == LEAST
    assert every("active", active=1, least=1.0) == pytest.approx(every("active", active=1) / 60)


@given(st.lists(st.integers(0, 3000), max_size=40), st.integers(0, 2**32))
def test_a_probe_is_a_minute_from_all_others_of_its_address(others, seed):
    taken = [NOW + timedelta(seconds=second) for second in others]
    at = next_probe(NOW, 541.0, taken, Random(seed).random)
    assert at >= NOW + timedelta(seconds=0.95 * 541)
    assert all(abs(at - other) >= timedelta(seconds=LEAST) for other in taken)
    assert at <= NOW + timedelta(seconds=1.05 * 541 + 123 * (len(others) + 1))


def test_times_are_not_known_beforehand():
    draw = Random(1).random
    assert len({next_probe(NOW, 541.0, (), draw) for _ in range(10)}) == 10


def glances(*steps, age=timedelta(hours=1)):
    return [Glance(number, step, NOW - age) for number, step in enumerate(steps)]


def test_disagreement_is_what_most_of_the_others_see():
    assert disagreement(20.0, glances(-5, -5, 1), NOW).is_flagged
    assert not disagreement(20.0, glances(-5, 1, 1, -5), NOW).is_flagged
    assert not disagreement(20.0, glances(-5, -5), NOW).is_flagged, "two are not enough"
    assert disagreement(-20.0, glances(1, 1, 0.6), NOW).is_flagged
    assert not disagreement(None, glances(-5, -5, -5), NOW).is_flagged
    assert not disagreement(20.0, glances(-5, -5, -5, age=LATER), NOW).is_flagged
    one_member = [Glance(1, -5, NOW) for _ in range(9)]
    found = disagreement(20.0, [*one_member, *glances(1, 1, 1)], NOW)
    assert (found.asked, found.against) == (3, 1)
