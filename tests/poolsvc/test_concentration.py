"""In how few hands a pool is: counted in answers, and checked by what hostile servers then get."""

from datetime import UTC, datetime
from itertools import combinations

import pytest

from poolsvc.concentration import MAJORITY, TAKEN, TIPPING, Largest, look
from poolsvc.drawing import Candidate, Draw, Rules
from poolsvc.regions import WORLD, regions_of

NOW = datetime(2026, 11, 27, tzinfo=UTC)
RULES = Rules(8)


def crowd(count, *, first=0, weight=10, countries=("DE",), name="s"):
    return [
        Candidate(
            f"{name}{number}",
            number,
            weight,
            networks=(number,),
            prefixes=(f"p{number}",),
            regions=regions_of(countries),
        )
        for number in range(first, first + count)
    ]


def looked(candidates, regions=()):
    draw = Draw(candidates, regions, RULES, 1, NOW)
    return look(draw, draw.sets(), RULES)


def hostile_majority(candidates, region=WORLD, regions=(), draws=20):
    """How often TAKEN of one answer are hostile in their majority, over all choices of all answers of some draws."""
    hits = total = 0
    for number in range(draws):
        for names in Draw(candidates, regions, RULES, number, NOW).sets()[region]:
            for some in combinations(names, TAKEN):
                hits += sum(name.startswith("evil") for name in some) >= MAJORITY
                total += 1
    return hits / total


def test_the_tipping_point_gives_every_second_client_a_hostile_majority():
    assert pytest.approx(0.5, abs=1e-4) == TIPPING**4 + 4 * TIPPING**3 * (1 - TIPPING)


def test_so_many_would_have_to_join_for_a_majority():
    pool = crowd(60)
    needed = looked(pool)[WORLD].to_add
    assert needed == 96
    evil = crowd(needed, first=1_000, name="evil")
    # Eight different ones are drawn: a little more even than by chance.
    assert hostile_majority([*pool, *evil]) == pytest.approx(0.5, abs=0.06)
    assert hostile_majority([*pool, *evil[: needed // 2]]) < 0.25


def test_so_many_members_would_have_to_be_hostile():
    """One member with many servers has one place all the same."""
    small, giant = crowd(40), [Candidate(f"g{number}", 999, 10) for number in range(200)]
    found = looked([*small, *giant])[WORLD]
    assert found.members == 41
    assert found.operator == Largest(999, pytest.approx(200 / 240))
    # The giant is in each answer, and each of the others has a like part of the seven places that are left.
    assert found.to_take == 1 + round((TIPPING * 8 - 1) / (7 / 40) + 0.5)
    evil = {one.name for one in small[: found.to_take - 1]} | {one.name for one in giant}
    turned = [
        Candidate(f"evil-{one.name}" if one.name in evil else one.name, one.member, one.weight, one.networks)
        for one in [*small, *giant]
    ]
    assert hostile_majority(turned) == pytest.approx(0.5, abs=0.06)


def test_a_pool_that_is_too_small_for_that_says_so():
    assert looked([])[WORLD].to_add is None
    assert looked([])[WORLD].varied is None
    assert looked([])[WORLD].to_take is None


def test_what_answers_are_made_of():
    found = looked(crowd(60))[WORLD].varied
    assert (found.operators, found.networks, found.prefixes, found.all) == (1, 1, 1, 1)
    few = [Candidate(f"s{number}", number % 3, 10, networks=(1,)) for number in range(30)]
    found = looked(few)[WORLD].varied
    assert (found.operators, found.networks) == (0, 0)
    assert found.prefixes == 1, "what is not known is shared by nobody"


def test_the_largest_network_and_country_by_weight():
    pool = [
        *crowd(20, weight=10),
        *(Candidate(f"big{n}", 500 + n, 50, (7_000,), regions=regions_of(["FR"])) for n in range(20)),
    ]
    found = looked(pool)[WORLD]
    assert found.network == Largest(7_000, pytest.approx(1000 / 1200))
    assert found.country == Largest("fr", pytest.approx(1000 / 1200))


def test_a_thin_region_is_as_hard_to_take_as_what_is_around_it_or_to_fill():
    europe = crowd(200, countries=("FR",))
    found = looked([*europe, *crowd(1, first=900, countries=("LU",))], ["lu", "europe"])
    assert found["lu"].to_add == 15, "so many and it is its own"
    assert found["lu"].to_take == found["europe"].to_take
    assert found["europe"].to_add > 300
