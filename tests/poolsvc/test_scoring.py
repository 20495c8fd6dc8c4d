"""Scores: the table's rows, the lowest step, and the fixed points of the recurrence."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nts_core.control import ProbeResult, Stage
from poolsvc.scoring import ADMITTED, CUTOFF, MAX_SCORE, Step, advance, sampling_weight, share, step

MS = 1_000_000
SECOND = 1000 * MS
GOOD = ProbeResult("198.18.0.1", None, "", offset=0, delay=MS, stratum=2, leap=0, asked=2, cookies=2)
SILENT = ProbeResult("198.18.0.1", Stage.TCP, "no answer")


def worth(result, **options):
    """Value and cap of a probe's step."""
    found = step(result, **options)
    return found.value, found.cap


def test_a_probe_without_a_fault_is_a_full_step():
    assert worth(GOOD) == (1, 20)


@pytest.mark.parametrize(("lost", "value"), [(0, 1), (1, 0.75), (2, 0.25), (5, 0.25)])
def test_lost_exchanges_lower_a_step_a_little(lost, value):
    assert worth(replace(GOOD, exchanges=5, lost=lost)) == (value, 20)
    assert worth(replace(GOOD, exchanges=5, lost=lost, offset=751 * MS)) == (-2, 20), (
        "the lowest step applies"
    )


@pytest.mark.parametrize(("share_lost", "is_in"), [(0.05, True), (0.3, True), (0.35, False)])
def test_a_third_of_round_trips_is_what_a_server_may_lose(share_lost, is_in):
    """Of three exchanges, each lost by itself: the score settles at twenty times the mean step."""
    q = share_lost
    mean = (1 - q) ** 3 + 0.75 * 3 * q * (1 - q) ** 2 + 0.25 * 3 * q**2 * (1 - q) - 5 * q**3
    assert (20 * mean >= CUTOFF) is is_in


# Facts: pool-operators, section 2. Up to 25 ms full, then lines to 750 ms, then -2, from 3 s on -4 and a cap.
@pytest.mark.parametrize(
    ("offset", "value", "cap"),
    [
        (25 * MS, 1.0, 20),
        (25 * MS + 1, 1.0003, 20),
        (50 * MS, 1.167 - 6.667 * 0.05, 20),
        (100 * MS, 1.167 - 6.667 * 0.1, 20),
        (100 * MS + 1, 0.731 - 2.308 * 0.1, 20),
        (500 * MS, 0.731 - 2.308 * 0.5, 20),
        (750 * MS, 0.731 - 2.308 * 0.75, 20),
        (750 * MS + 1, -2, 20),
        (3 * SECOND, -2, 20),
        (3 * SECOND + 1, -4, -20),
        (10**18, -4, -20),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_offsets_count_by_their_size(offset, value, cap, sign):
    found = step(replace(GOOD, offset=sign * offset))
    assert found.value == pytest.approx(value, abs=1e-3)
    assert found.cap == cap


def test_the_lines_meet_within_what_the_pool_itself_rounds():
    """Neighbouring segments differ by no more than 0.0005 at 25 ms and by what the pool has at 100 ms."""
    near = [step(replace(GOOD, offset=offset)).value for offset in (25 * MS, 25 * MS + 1)]
    assert abs(near[0] - near[1]) < 0.0005
    far = [step(replace(GOOD, offset=offset)).value for offset in (100 * MS, 100 * MS + 1)]
    assert abs(far[0] - far[1]) < 0.001


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"kiss": "RATE"}, (-3.5, 20)),
        ({"kiss": "DENY"}, (-10, -50)),
        ({"kiss": "RSTR"}, (-10, -50)),
        ({"kiss": "NTSN"}, (-2, 5)),
        ({"kiss": "XXXX"}, (-2, 5)),
        ({"offset": None}, (-5, 20)),
        ({"stratum": None}, (-5, 20)),
        ({"stratum": 7}, (1, 20)),
        ({"stratum": 8}, (-4, 20)),
        ({"stratum": 16}, (-4, 20)),
        ({"leap": 1}, (1, 20)),
        ({"leap": 3}, (-4, 20)),
        ({"root_distance": 3 * SECOND // 2}, (1, 20)),
        ({"root_distance": 3 * SECOND // 2 + 1}, (-4, 20)),
        ({"cookies": 1}, (-1, 20)),
        ({"asked": 9, "cookies": 8}, (-1, 20)),
    ],
)
def test_each_fault_has_its_step(change, found):
    assert worth(replace(GOOD, **change)) == found


def test_the_lowest_step_counts_and_its_cap_with_it():
    assert worth(replace(GOOD, cookies=0, offset=SECOND)) == (-2, 20)
    assert step(replace(GOOD, cookies=0, leap=3, offset=SECOND)).value == -4
    assert step(replace(GOOD, stratum=9, offset=4 * SECOND)).cap == -20, "an equal step does not lose the cap"
    assert worth(replace(GOOD, kiss="DENY", offset=None)) == (-10, -50)


def test_a_pool_may_allow_more_strata():
    assert worth(replace(GOOD, stratum=9), max_stratum=15) == (1, 20)


@pytest.mark.parametrize("mean", [1, 0.75, 0.5, 0, -1, -3.5])
def test_a_score_settles_at_twenty_times_the_mean_step(mean):
    score = 0.0
    for _ in range(500):
        score = advance(score, Step(mean))
    assert score == pytest.approx(20 * mean, abs=1e-6)


@pytest.mark.parametrize(
    ("found", "settles"), [(Step(-10, -50), -100), (Step(-4, -20), -80), (Step(-5), -100)]
)
def test_bad_steps_settle_where_they_lead_and_never_below_the_floor(found, settles):
    score = 20.0
    for _ in range(500):
        score = advance(score, found)
    assert score == pytest.approx(settles, abs=1e-6)


def test_one_denial_is_a_score_of_minus_fifty_at_best():
    assert advance(MAX_SCORE, Step(-10, -50)) == -50


def test_an_admitted_server_stands_above_the_cutoff_and_one_silence_does_not_end_that():
    assert ADMITTED > CUTOFF
    assert advance(MAX_SCORE, step(SILENT)) >= CUTOFF
    assert advance(ADMITTED, step(SILENT)) < CUTOFF


steps = st.builds(
    step,
    st.builds(
        ProbeResult,
        address=st.just("198.18.0.1"),
        failed=st.sampled_from([None, *Stage]),
        detail=st.just(""),
        offset=st.none() | st.integers(-(10**20), 10**20),
        stratum=st.none() | st.integers(0, 255),
        leap=st.none() | st.integers(0, 3),
        root_distance=st.integers(0, 10**12),
        kiss=st.none() | st.sampled_from(["RATE", "DENY", "RSTR", "NTSN", "INIT"]),
        asked=st.integers(0, 20),
        cookies=st.integers(0, 20),
    ),
)


@given(st.lists(steps, max_size=60), st.floats(-100, 20))
def test_a_score_stays_between_its_bounds(found, score):
    for entry in found:
        score = advance(score, entry)
        assert -100 <= score <= 20
        assert score <= entry.cap


@given(steps, steps, st.floats(-100, 20))
def test_a_better_step_is_never_worth_less(one, other, score):
    low, high = sorted((one, other), key=lambda entry: (entry.value, entry.cap))
    if low.cap <= high.cap:
        assert advance(score, low) <= advance(score, high)


@given(steps)
def test_whatever_is_less_than_a_full_step_has_its_reason(found):
    assert bool(found.reason) is (found.value < 1)
    assert len(found.reason) <= 200


@pytest.mark.parametrize(
    ("weight", "cap", "traffic", "share"),
    [
        (1, None, None, 10),
        (1, None, 5000.0, 10),
        (1, 100.0, None, 10),
        (1, 100.0, 0.0, 10),
        (7, 100.0, 99.0, 70),
        (7, 100.0, 100.0, 70),
        (7, 100.0, 200.0, 35),
        (1000, 1.0, 1e9, 1),
        (1, 0.0, 50.0, 1),
    ],
)
def test_who_cannot_answer_all_that_comes_has_a_smaller_share(weight, cap, traffic, share):
    assert sampling_weight(weight, cap, traffic) == share
    assert sampling_weight(weight, None, None, cap, traffic) == share, "key establishments count alike"


@pytest.mark.parametrize(("ntp", "ke", "share"), [(200.0, 400.0, 25), (400.0, 200.0, 25), (50.0, 200.0, 50)])
def test_the_worse_of_both_protocols_counts(ntp, ke, share):
    assert sampling_weight(10, 100.0, ntp, 100.0, ke) == share


@pytest.mark.parametrize(("score", "part"), [(-100, 0), (10, 0), (11, 0.2), (12.5, 0.5), (15, 1), (20, 1)])
def test_the_share_grows_between_the_cutoff_and_fifteen(score, part):
    assert share(score) == pytest.approx(part)


@pytest.mark.parametrize(
    ("score", "tenths"), [(20, 70), (15, 70), (12.5, 35), (12.4, 35), (11, 14), (10, 1), (9, 1)]
)
def test_who_was_just_bad_has_a_smaller_share_of_what_its_member_wants(score, tenths):
    assert sampling_weight(7, None, None, score=score) == tenths
