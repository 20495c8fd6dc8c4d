"""Truechimers and falsetickers (RFC 5905 section 11.2.1)."""

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nts_core.association import Sample
from nts_core.select import MIN_DISTANCE, Estimate, Selection, best, estimate, select, unfit

MS = 1_000_000


def ms(offset, distance=10):
    return Estimate(offset * MS, distance * MS)


def sample(offset, delay, root_delay=0, root_dispersion=0):
    return Sample(offset, delay, 2, 0, root_delay, root_dispersion, -20, b"TEST", 1, 1)


@pytest.mark.rfc8915("8.6-1")
def test_who_admits_to_be_useless_has_no_vote():
    """A wide claim covers every other one, whatever its offset: it would be a truechimer with any time."""
    honest, useless = sample(0, 2 * MS), sample(5000 * MS, 2 * MS, root_dispersion=60_000 * MS)
    assert unfit(honest) is None
    assert "60.0 s" in unfit(useless)
    assert "not synchronised" in unfit(replace(honest, leap=3))
    assert unfit(sample(0, 2 * MS, root_delay=2990 * MS)) is None
    assert unfit(sample(0, 2 * MS, root_delay=3000 * MS)) is not None


def test_nothing_gives_nothing():
    assert select([]) == Selection(frozenset(), None)


def test_one_source_is_believed():
    assert select([ms(3)]) == Selection(
        frozenset({0}), 3 * MS, frozenset({0}), interval=(3 * MS - ms(3).distance, 3 * MS + ms(3).distance)
    )


def test_two_that_agree():
    found = select([ms(0), ms(4)])
    assert found.truechimers == {0, 1}
    assert 0 <= found.offset <= 4 * MS


def test_two_that_disagree_give_none():
    """Nobody can tell which of two is wrong."""
    assert select([ms(0), ms(100)]) == Selection(frozenset(), None)


def test_a_majority_against_one_falseticker():
    found = select([ms(0), ms(250), ms(2)])
    assert found.truechimers == {0, 2}
    assert abs(found.offset) <= 2 * MS


@pytest.mark.rfc8915("8.5-6")
def test_four_of_which_one_is_wrong():
    found = select([ms(1), ms(-1), ms(0), ms(-250)])
    assert found.truechimers == {0, 1, 2}
    assert abs(found.offset) <= MS


def test_two_against_two_give_none():
    assert select([ms(0), ms(1), ms(100), ms(101)]) == Selection(frozenset(), None)


def test_three_that_all_disagree_give_none():
    assert select([ms(0), ms(100), ms(200)]) == Selection(frozenset(), None)


def test_intervals_that_only_touch_agree():
    assert select([ms(0), ms(20)]).truechimers == {0, 1}


def test_the_closer_claim_weighs_more():
    found = select([ms(0, 5), ms(10, 20)])
    assert 0 < found.offset < 5 * MS


def test_no_side_is_preferred():
    """Turned around, the same sources are truechimers: 0 and 20 both share an interval with 10.

    RFC 5905's algorithm searches the lower end from below and the upper end from above.
    """
    sources = [ms(0, 6), ms(10, 6), ms(20, 6)]
    mirrored = [Estimate(-claim.offset, claim.distance) for claim in sources]
    assert select(sources).truechimers == select(mirrored).truechimers


estimates = st.builds(
    Estimate, offset=st.integers(-(10**12), 10**12), distance=st.integers(MIN_DISTANCE, 10**11)
)


@given(st.lists(estimates, max_size=9))
def test_a_selection_is_a_majority_or_nothing(claims):
    found = select(claims)
    if found.offset is None:
        assert found.truechimers == frozenset()
    else:
        assert len(found.truechimers) > len(claims) / 2
        chosen = [claims[index].offset for index in found.truechimers]
        assert min(chosen) <= found.offset <= max(chosen)


@given(st.lists(estimates, min_size=1, max_size=9), st.integers(-(10**12), 10**12))
def test_where_the_sources_start_from_does_not_matter(claims, shift):
    moved = [Estimate(claim.offset + shift, claim.distance) for claim in claims]
    assert select(moved).truechimers == select(claims).truechimers


@st.composite
def truths(draw):
    """Claims that all hold the true offset."""
    true = draw(st.integers(-(10**12), 10**12))
    found = []
    for _ in range(draw(st.integers(1, 6))):
        distance = draw(st.integers(MIN_DISTANCE, 10**11))
        found.append(Estimate(true + draw(st.integers(-distance, distance)), distance))
    return true, found


@pytest.mark.rfc8915("8.5-6")
@given(truths(), st.lists(estimates, max_size=5), st.randoms())
def test_a_majority_that_holds_the_truth_is_always_found(truth, liars, random):
    """Whatever a minority claims, there is a selection and a true claim is in it."""
    _, claims = truth
    assume(len(liars) < len(claims))
    mixed = [*claims, *liars]
    random.shuffle(mixed)
    found = select(mixed)
    assert found.offset is not None
    assert {mixed[index] for index in found.truechimers} & set(claims)


@given(truths(), st.lists(estimates, max_size=5), st.randoms())
def test_a_majority_that_overlaps_is_chosen_whole(truth, liars, random):
    """Liars that touch no true claim are exactly those left out."""
    _, claims = truth
    low = min(claim.offset - claim.distance for claim in claims)
    high = max(claim.offset + claim.distance for claim in claims)
    far = [liar for liar in liars if liar.offset + liar.distance < low or liar.offset - liar.distance > high]
    assume(len(far) < len(claims))
    mixed = [*claims, *far]
    random.shuffle(mixed)
    assert {mixed[index] for index in select(mixed).truechimers} == set(claims)


# Estimates


def test_the_best_sample_has_the_least_delay():
    samples = [sample(5, 30), sample(7, 10), sample(9, 20)]
    assert best(samples) == samples[1]


def test_an_estimate_states_the_root_distance():
    found = estimate([sample(3 * MS, 40 * MS, root_delay=20 * MS, root_dispersion=7 * MS)])
    assert (found.offset, found.distance) == (3 * MS, 37 * MS)


def test_no_claim_is_narrower_than_the_minimum():
    found = estimate([sample(0, 1)])
    assert (found.offset, found.distance) == (0, MIN_DISTANCE)
    assert found.jitter == 1e9 * 2**-20, "no less than its clock can tell"


def test_scatter_widens_a_claim():
    assert estimate([sample(0, 1), sample(8 * MS, 2)]) == Estimate(0, MIN_DISTANCE + 8 * MS, 8 * MS)
    scattered = estimate([sample(0, 1), sample(3 * MS, 2), sample(-4 * MS, 2)])
    assert scattered.jitter == pytest.approx(math.sqrt(12.5) * MS)


def scattering(*offsets, jitter=0.1):
    return [Estimate(round(offset * MS), 50 * MS, jitter * MS) for offset in offsets]


def test_of_those_that_agree_the_farthest_is_left_out():
    found = select(scattering(0, 1, 2, 30))
    assert found.truechimers == {0, 1, 2, 3}, "it tells the truth, but not well"
    assert (found.survivors, found.offset) == ({0, 1, 2}, 1 * MS)
    assert found.jitter == math.sqrt(2.5) * MS


def test_who_is_as_near_as_they_are_steady_is_kept():
    """Nothing is won by leaving one out whose distance from the others is less than their own jitter."""
    assert select(scattering(0, 1, 2, 30, jitter=40)).survivors == {0, 1, 2, 3}
    assert select(scattering(0, 1, 2, 30, jitter=5)).survivors == {0, 1, 2}


def test_three_survive_whatever_they_say():
    assert select(scattering(0, 20, 45)).survivors == {0, 1, 2}
    assert len(select(scattering(0, 1, 3, 6, 10, 15, 21, 28)).survivors) == 3


@given(st.lists(st.integers(-40, 40), min_size=3, max_size=10))
def test_leaving_out_never_makes_them_differ_more(offsets):
    found = select(scattering(*offsets))
    if found.offset is None:
        return
    assert found.survivors <= found.truechimers
    assert len(found.survivors) >= min(3, len(found.truechimers))
    said = [offsets[index] * MS for index in found.survivors]
    assert min(said) <= found.offset <= max(said)


@given(st.lists(st.builds(sample, st.integers(-(10**9), 10**9), st.integers(0, 10**9)), min_size=1))
def test_an_estimate_covers_every_sample(samples):
    found = estimate(samples)
    assert all(abs(one.offset - found.offset) <= found.distance for one in samples)
