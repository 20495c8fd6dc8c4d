"""Verdicts: who has a say, how many it takes, and what the votes come to."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nts_core.control import ProbeResult
from poolsvc.scoring import ADMITTED, CUTOFF, MAX_SCORE, RULE, advance, is_good, step
from poolsvc.verdicts import (
    FRESH,
    FRESH_HOPELESS,
    MEDIAN,
    QUARTILE,
    SCORERS,
    SILENT,
    Quorum,
    View,
    admits,
    compare,
    first_score,
    is_silent,
    overall,
    quorum,
)

NOW = datetime(2026, 11, 27, 20, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
FULL = Quorum(3, 2)


def view(monitor=1, score=20.0, *, party=None, full=5, age=MINUTE, active=True, silent=None):
    since = None if silent is None else NOW - silent
    return View(monitor, monitor if party is None else party, active, score, full, NOW - age, since)


def views(*scores, **options):
    return [view(number, score, **options) for number, score in enumerate(scores, 1)]


@pytest.mark.parametrize(
    ("approved", "least", "number", "probes"),
    [(0, 1, 1, 3), (1, 1, 1, 3), (2, 1, 2, 2), (3, 1, 3, 2), (40, 1, 3, 2), (1, 3, 3, 2), (2, 3, 3, 2)],
)
def test_the_quorum_grows_with_the_pool_and_does_not_fall_by_itself(approved, least, number, probes):
    found = quorum(approved, least, 3)
    assert (found.number, found.probes, found.is_bootstrap) == (number, probes, number < 3)


def test_the_median_rules_and_of_two_in_the_middle_the_lower_one():
    assert overall(views(20, 18, 3, 2, -5), FULL, NOW).score == 3
    assert overall(views(20, 18, 3, 2), FULL, NOW).score == 3
    assert overall(views(20, 18, 3), FULL, NOW).score == 18


def test_the_quartile_hears_whom_the_median_does_not():
    seen = views(20, 20, 20, 20, 20, 1, 0)
    assert overall(seen, FULL, NOW).score == 20
    assert overall(seen, FULL, NOW, QUARTILE).score == 1


def test_the_hopeless_are_looked_at_seldom_and_known_all_the_same():
    seen = views(-100, -100, -100, age=FRESH_HOPELESS)
    assert overall(seen, FULL, NOW).score == -100
    assert not overall(views(-89, -89, -89, age=FRESH_HOPELESS), FULL, NOW).is_known


def test_neither_who_was_not_asked_nor_who_is_late_has_a_say():
    silenced = [view(4, -80, active=False), view(5, -80, age=FRESH + MINUTE)]
    assert overall([*views(20, 20, 20), *silenced], FULL, NOW).score == 20
    found = overall([*views(20, 20), *silenced], FULL, NOW)
    assert not found.is_known
    assert found.reason == "2 of the 3 monitors that it takes know it"


def test_all_monitors_of_one_member_are_one_vote():
    seen = [*views(20, 20, 20), *(view(number, -100, party=9) for number in range(10, 20))]
    assert overall(seen, FULL, NOW).score == 20
    assert overall(seen, FULL, NOW).votes == 4


def test_two_monitors_that_do_not_agree_say_nothing():
    two = quorum(2, 1, 3)
    assert overall(views(20, 19), two, NOW).score == 19
    assert overall(views(2, 1), two, NOW).score == 1
    assert not overall(views(20, 1), two, NOW).is_known


@given(
    st.lists(st.sampled_from(["good", "bad", "late"]), min_size=1, max_size=12),
    st.integers(1, 3),
)
def test_fewer_than_half_of_its_monitors_never_bring_an_address_down(kinds, number):
    values = {"good": (20.0, MINUTE), "bad": (-100.0, MINUTE), "late": (20.0, FRESH + MINUTE)}
    seen = [view(number, values[kind][0], age=values[kind][1]) for number, kind in enumerate(kinds)]
    found = overall(seen, Quorum(number, 2), NOW)
    if 2 * kinds.count("bad") < len(kinds):
        assert found.score is None or is_good(found.score)
    if kinds.count("bad") == len(kinds) >= number:
        assert found.score == -100
    if number == 3 and 2 * kinds.count("good") > len(kinds) and kinds.count("good") >= 3:
        assert found.score == 20


def test_a_quorum_of_full_probes_in_a_row_admits():
    assert admits(views(None, None, None, full=2), FULL, NOW)
    assert admits([*views(None, None, None, full=2), view(4, None, full=0)], FULL, NOW)
    assert not admits([*views(None, None, full=2), view(3, None, full=1)], FULL, NOW)
    assert not admits([*views(None, None, full=9), view(3, None, full=9, party=2)], FULL, NOW)
    assert not admits(views(None, None, None, full=9, active=False), FULL, NOW)


def test_one_monitor_alone_takes_the_probes_of_the_policy_and_two_must_agree():
    one, two = quorum(1, 1, 3), quorum(2, 1, 3)
    assert not admits([view(1, None, full=2)], one, NOW)
    assert admits([view(1, None, full=3)], one, NOW)
    assert admits(views(None, None, full=2), two, NOW)
    assert not admits([*views(None, None, full=2), view(3, None, full=0)], two, NOW)


def test_scores_begin_above_the_cutoff_for_who_has_seen_it_work():
    assert first_score(view(full=1)) == ADMITTED
    assert first_score(view(full=0)) < CUTOFF


def test_silence_is_what_everybody_who_looks_has_found_for_long():
    assert is_silent(views(20, -5, silent=SILENT), FULL, NOW)
    assert not is_silent([*views(20, -5, silent=SILENT), view(3, silent=SILENT - MINUTE)], FULL, NOW)
    assert not is_silent([*views(20, silent=SILENT), view(3)], FULL, NOW)
    assert not is_silent(views(20, silent=SILENT, age=FRESH + MINUTE), FULL, NOW)
    assert not is_silent([], FULL, NOW)


def test_of_one_who_looks_silence_counts_where_one_is_the_quorum():
    assert is_silent([view(silent=SILENT)], quorum(1, 1, 3), NOW)
    assert not is_silent([view(silent=SILENT)], FULL, NOW), "it could be that one's own network"
    assert not is_silent([view(1, silent=SILENT, party=7), view(2, silent=SILENT, party=7)], FULL, NOW)


def test_the_ruling_scorer_is_the_median():
    assert MEDIAN.of([1, 2, 3, 4]) == 2
    assert QUARTILE.of([1, 2, 3, 4, 5]) == 2


@pytest.mark.parametrize("scorer", SCORERS.values(), ids=SCORERS)
def test_the_scores_of_every_scorer_mean_the_same(scorer):
    """Twenty times the mean step, lines that meet, a full step for a good clock and none for a bad one."""
    rule = scorer.rule
    assert rule.gain == pytest.approx(MAX_SCORE * (1 - rule.decay))
    good = ProbeResult("198.18.0.1", None, "", offset=0, stratum=2, asked=1, cookies=1)
    silent = ProbeResult("198.18.0.1", None, "", asked=1)
    for result, settles in ((good, 20), (silent, -100)):
        score = 0.0
        for _ in range(500):
            score = advance(score, step(result, rule=rule), rule)
        assert score == pytest.approx(settles)
    for line, following in zip(rule.lines, rule.lines[1:], strict=False):
        assert line.until < following.until
        here, there = (part.slope * line.until + part.start for part in (line, following))
        assert here == pytest.approx(there, abs=1e-3)
    assert rule.lines[-1].until == RULE.lines[-1].until


def test_two_scorers_are_compared_by_the_servers_that_are_good_by_one_of_them():
    found = compare(
        [
            ("alice", 20, 9),
            ("bob", 20, 9),
            ("bob", 9, 20),
            ("carol", 9.9, 10),
            ("dave", 20, None),
            ("erin", None, 20),
            ("alice", 12, 3),
            ("frank", 1, 2),
        ]
    )
    assert (found.dropped, found.added) == (["alice"], ["carol"])
    assert str(found) == "would drop 1, add 1"


def test_one_of_a_time_to_come_is_no_last_word():
    assert not view(age=-timedelta(days=1)).is_fresh(NOW)
