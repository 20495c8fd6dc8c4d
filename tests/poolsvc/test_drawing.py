"""Who gets into which answer: shares, caps, thin regions, young accounts, many sets."""

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolsvc.drawing import Candidate, Draw, Odds, Rules, sets_for
from poolsvc.regions import CONTINENT_OF, CONTINENTS, REGIONS, WORLD, regions_of, wider

NOW = datetime(2026, 11, 27, tzinfo=UTC)
OLD, YOUNG = NOW - timedelta(days=31), NOW - timedelta(days=29)
RULES = Rules(8)


def crowd(count, *, weights=(10,), first=0, countries=(), **options):
    """Servers of as many members in as many networks and prefixes."""
    return [
        Candidate(
            f"s{number}",
            number,
            weights[number % len(weights)],
            networks=(64_000 + number,),
            prefixes=(f"10.{number // 256}.{number % 256}.0/24",),
            regions=regions_of(countries),
            **options,
        )
        for number in range(first, first + count)
    ]


def draw(candidates, number=0, *, regions=(), rules=RULES):
    return Draw(candidates, regions, rules, number, NOW)


def world(candidates, number=0, **options):
    return draw(candidates, number, **options).sets()[WORLD]


def counted(candidates, drawings, *, region=WORLD, regions=(), rules=RULES):
    """How often each server was drawn, over so many sets at least, and over how many."""
    total, names, number = 0, Counter(), 0
    while total < drawings:
        sets = draw(candidates, number, regions=regions, rules=rules).sets()[region]
        names.update(name for some in sets for name in some)
        total, number = total + len(sets), number + 1
    return names, total


def test_shares_over_ten_thousand_drawings_are_within_a_tenth_of_weight_where_no_cap_binds():
    """The standard deviation of a weight's mean share is below 2 % here."""
    weights = (1, 2, 5, 10)
    candidates = crowd(600, weights=weights)
    names, total = counted(candidates, 10_000)
    whole = sum(one.weight for one in candidates)
    for weight in weights:
        some = [names[one.name] for one in candidates if one.weight == weight]
        assert sum(some) / len(some) == pytest.approx(total * 8 * weight / whole, rel=0.1)
    assert names.total() == 8 * total


@pytest.mark.parametrize(
    ("servers", "sets"),
    [(0, 1), (8, 1), (9, 16), (100, 16), (1_000, 64), (10_000, 256), (20_000, 256), (100_000, 8_192)],
)
def test_the_larger_the_pool_the_more_sets(servers, sets):
    assert sets_for(servers, 8) == sets


pools = st.lists(
    st.builds(
        lambda number, member, weight, network, prefix: Candidate(
            f"s{number}", member, weight, (network,), (f"p{prefix}",)
        ),
        st.integers(0, 60),
        st.integers(0, 12),
        st.integers(1, 50),
        st.integers(0, 12),
        st.integers(0, 12),
    ),
    max_size=40,
    unique_by=lambda one: one.name,
)


@given(pools, st.integers(0, 1000))
def test_a_set_is_full_and_varied_while_it_can_be(candidates, number):
    by_name = {one.name: one for one in candidates}
    members = {one.member for one in candidates}
    for names in world(candidates, number):
        chosen = [by_name[name] for name in names]
        assert len(set(names)) == len(names) == min(8, len(candidates))
        by_member = Counter(one.member for one in chosen)
        assert len(by_member) == min(8, len(members))
        if len(members) >= 8:
            # Two of one network or prefix are there only when nobody else was left.
            for kind in (lambda one: one.prefixes, lambda one: one.networks):
                twins = [value for value, count in Counter(map(kind, chosen)).items() if count > 1]
                others = [
                    one
                    for one in candidates
                    if kind(one) not in set(map(kind, chosen)) and one.member not in by_member
                ]
                assert not twins or not others or _is_blocked(others, chosen)


def _is_blocked(others, chosen):
    """Whether each of those that were left shares something else with the chosen ones."""
    networks = {one.networks for one in chosen}
    prefixes = {one.prefixes for one in chosen}
    return all(one.networks in networks or one.prefixes in prefixes for one in others)


def test_one_of_a_member_a_network_and_a_prefix_while_there_are_others():
    many = crowd(40)
    greedy = [replace(one, name=f"m{one.name}", member=1_000) for one in crowd(100, first=100)]
    one_network = [replace(one, name=f"n{one.name}", networks=(1,)) for one in crowd(100, first=300)]
    one_prefix = [replace(one, name=f"p{one.name}", prefixes=("x",)) for one in crowd(100, first=500)]
    for names in world([*many, *greedy, *one_network, *one_prefix]):
        for begin in "mnp":
            assert sum(name.startswith(begin) for name in names) <= 1


def test_a_rare_other_is_found_before_a_cap_gives_way():
    """Of 5,000 servers eight members are to be found, of whom seven have one small server each."""
    giant = [Candidate(f"g{number}", 1, 1_000) for number in range(5_000)]
    others = [Candidate(f"s{number}", number + 2) for number in range(7)]
    for names in world([*giant, *others])[:20]:
        assert sum(name.startswith("g") for name in names) == 1
        assert len(names) == 8


def test_a_small_pool_of_one_member_is_answered_all_the_same():
    alone = [Candidate(f"s{number}", 1, networks=(1,), prefixes=("x",)) for number in range(12)]
    assert [len(world(alone[:size])[0]) for size in (0, 1, 4, 8, 12)] == [0, 1, 4, 8, 8]


@given(pools, st.integers(0, 1000), st.randoms(use_true_random=False))
def test_the_same_draw_of_the_same_servers_is_the_same_whatever_their_order(candidates, number, random):
    shuffled = random.sample(candidates, len(candidates))
    assert world(shuffled, number) == world(candidates, number)


def test_another_draw_is_another_one():
    many = crowd(40)
    assert world(many, 1) != world(many, 2)
    assert {name for number in range(30) for names in world(many, number) for name in names} == {
        one.name for one in many
    }


def test_who_is_gone_is_out_of_all_sets_and_nobody_else_moves():
    many, gone = crowd(200), {"s3", "s77"}
    before = draw(many, 5).sets()
    after = draw([one for one in many if one.name not in gone], 5).again(before, gone)
    for was, now in zip(before[WORLD], after[WORLD], strict=True):
        assert gone.isdisjoint(now)
        assert len(now) == 8
        assert was == now or not gone.isdisjoint(was)


def test_a_region_of_its_size_is_answered_by_its_own():
    here = crowd(20, countries=("DE",))
    found = draw([*here, *crowd(100, first=100, countries=("FR",))], regions=["de", "europe"])
    assert not found.is_thin("de")
    sets = found.sets()
    assert {name for names in sets["de"] for name in names} <= {one.name for one in here}
    assert len(sets["de"]) == RULES.region_sets
    assert len({name for names in sets["europe"] for name in names}) > 20


def test_who_is_alone_in_a_country_has_one_place_of_each_answer_and_the_continent_the_others():
    alone = crowd(1, countries=("LU",))
    neighbours = crowd(50, first=100, countries=("FR",))
    far = crowd(50, first=300, countries=("JP",))
    found = draw([*alone, *neighbours, *far], regions=["lu", "europe"])
    assert found.is_thin("lu")
    for names in found.sets()["lu"]:
        assert "s0" in names
        assert len(names) == 8
        assert {name for name in names if name != "s0"} <= {one.name for one in neighbours}


def test_a_thin_country_of_a_thin_continent_is_filled_from_the_world():
    own = crowd(3, countries=("FJ",))
    far = crowd(50, first=300, countries=("JP",))
    found = draw([*own, *far], regions=["fj", "oceania"])
    for region in ("fj", "oceania"):
        for names in found.sets()[region]:
            assert 1 <= len({one.name for one in own}.intersection(names)) <= 3
            assert len(names) == 8


def test_many_servers_of_few_members_leave_a_region_thin():
    """Else one member with enough servers would answer for a country alone."""
    few = [replace(one, member=one.member % 3) for one in crowd(40, countries=("LU",))]
    found = draw([*few, *crowd(50, first=100, countries=("FR",))], regions=["lu"])
    assert found.is_thin("lu")
    for names in found.sets()["lu"]:
        assert sum(int(name[1:]) < 40 for name in names) <= 3


@pytest.mark.parametrize("young", [10, 100, 400])
def test_young_accounts_share_a_fifth_at_most_once_older_servers_suffice(young):
    candidates = [*crowd(60, since=OLD), *crowd(young, first=100, since=YOUNG)]
    names, total = counted(candidates, 2_000)
    share = sum(names[one.name] for one in candidates if one.since == YOUNG) / (8 * total)
    whole = young / (60 + young)
    assert share == pytest.approx(min(whole, 0.2), abs=0.02)


def test_young_accounts_have_their_whole_weight_while_there_is_nobody_else():
    candidates = [*crowd(7, since=OLD), *crowd(70, first=100, since=YOUNG)]
    names, total = counted(candidates, 2_000)
    share = sum(names[one.name] for one in candidates if one.since == YOUNG) / (8 * total)
    assert share == pytest.approx(70 / 77, abs=0.02)


def test_every_country_lies_on_a_continent():
    assert len(CONTINENT_OF) == 250
    assert CONTINENT_OF.keys() | CONTINENTS == REGIONS
    assert (wider("de"), wider("europe"), wider(WORLD)) == ("europe", WORLD, WORLD)
    assert regions_of(["DE", "US", "ZZ"]) == {"de", "europe", "us", "north-america"}


def test_a_weight_of_nothing_is_refused():
    with pytest.raises(ValueError, match="weight"):
        Candidate("alice", 1, 0)


def lot(*members_with_weights):
    """Candidates: for each member the weights of its servers."""
    return [
        Candidate(f"s{member}-{place}", member, weight)
        for member, weights in enumerate(members_with_weights)
        for place, weight in enumerate(weights)
    ]


@pytest.mark.parametrize(
    "candidates",
    [
        lot(),
        lot(*[[10]] * 5),
        lot(*[[10]] * 8),
        lot(*[[10]] * 20),
        lot(*[[1]] * 5, *[[10]] * 10, [50]),
        lot([10] * 12, *[[10]] * 11),
        lot([10] * 3, [10] * 4, [10] * 5),
        lot([10] * 9, [1, 10, 30]),
        lot([1, 2, 3], *[[5]] * 7),
        lot([10] * 30),
    ],
)
def test_the_odds_are_those_of_the_drawing(candidates):
    """Counted over many sets; among equals the figure is exact, else it is off by a few percent of an answer."""
    odds = Odds.of(((one.member, one.weight, False) for one in candidates), Rules(8))
    names, total = counted(candidates, 3_000)
    figures = {one.name: odds.chance(one.member, one.weight) for one in candidates}
    for name, figure in figures.items():
        assert figure == pytest.approx(names[name] / total, abs=0.05), name
    assert sum(figures.values()) == pytest.approx(min(len(candidates), 8), abs=1e-6)


def test_who_came_since_the_odds_were_reckoned_has_a_share_all_the_same():
    odds = Odds.of([(1, 10, False)] * 20, Rules(8))
    assert 0 < odds.chance(2, 10) <= 1


def test_the_odds_of_young_accounts_are_those_of_the_drawing():
    candidates = [*crowd(30, since=OLD), *crowd(60, first=100, weights=(5, 20), since=YOUNG)]
    odds = Odds.of(((one.member, one.weight, one.since == YOUNG) for one in candidates), RULES)
    names, total = counted(candidates, 3_000)
    figures = {
        one.name: odds.chance(one.member, one.weight, is_young=one.since == YOUNG) for one in candidates
    }
    for name, figure in figures.items():
        assert figure == pytest.approx(names[name] / total, abs=0.03), name
    assert sum(figures.values()) == pytest.approx(8, abs=1e-6)


def test_how_a_region_came_out_is_told():
    here = [*crowd(30, since=OLD, countries=("DE",)), *crowd(30, first=100, since=YOUNG, countries=("DE",))]
    found = draw([*here, *crowd(2, first=200, countries=("LU",))], regions=["de", "lu"])
    whole, small = found.standing("de"), found.standing("lu")
    assert (whole.servers, whole.members, whole.filled_from, whole.is_thin) == (60, 60, (), False)
    assert (whole.young_wanted, whole.young_given) == (pytest.approx(0.5), pytest.approx(0.2))
    assert (small.servers, small.filled_from, small.young_given) == (2, ("europe",), 0)
    assert found.standing("europe").servers == 62
    assert draw([], regions=["fj"]).standing("fj").filled_from == ("oceania", WORLD)
