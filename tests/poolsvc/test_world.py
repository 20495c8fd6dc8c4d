"""The rules of scores and monitors over weeks of a simulated pool: what they must do, and the page that tells of it."""

import subprocess
import sys
from datetime import timedelta
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab import world as worlds
from lab.course import FULL, QUORUM, SILENCE, START, follow, off, times
from lab.scoring_page import DOCS, fill, rule_charts, rules_parts, world_charts, world_parts
from lab.world import ISLANDS, World
from poolsvc.scoring import FULL_SHARE, MAX_SCORE, advance, step
from poolsvc.vantage import ACTIVE
from poolsvc.verdicts import SCORERS, View, overall

MAJORITY = ACTIVE // 2 + 1
HOUR = timedelta(hours=1)


@pytest.fixture(scope="module")
def world():
    return World(servers=200, days=25).run()


@pytest.mark.parametrize(("seconds", "rounds"), [(3.001, 1), (-5, 1), (1, 4), (0.2, 23), (-0.2, 23)])
@pytest.mark.parametrize("reach", [MAJORITY, ACTIVE])
def test_from_full_score_a_wrong_clock_is_out_after_so_many_rounds_of_a_majority(seconds, rounds, reach):
    assert times(off(seconds), runs=3, reach=reach).rounds == rounds


@pytest.mark.parametrize("fault", [off(5), SILENCE, off(1)])
def test_what_fewer_than_half_of_its_monitors_see_takes_no_place(fault):
    assert times(fault, runs=2, reach=MAJORITY - 1).out is None


@pytest.mark.parametrize("fault", [off(5), SILENCE, off(1)])
def test_it_is_back_only_after_hours_of_nothing_but_full_probes(fault):
    """A majority has seen it good for at least fourteen probes in a row, which is what leads from nothing to the cutoff."""
    lasts = 2 * HOUR
    found = follow(lambda since, _: fault if since < lasts else FULL, 14 * HOUR)
    back = found.first_change(into=True, after=2)
    assert back is not None
    seen = [monitor for at, monitor in found.probes if 2 <= at <= back]
    assert sum(seen.count(monitor) >= 14 for monitor in range(ACTIVE)) >= MAJORITY


def test_one_that_is_good_now_and_then_stays_out():
    """Bad for an hour and then at one of three probes: never back, for two weeks."""

    def behaviour(since, monitor):
        return off(5) if since < HOUR or int(since / timedelta(minutes=9)) % 3 == 0 else FULL

    found = follow(behaviour, timedelta(days=14))
    assert [into for _, into in found.changes] == [False]


def test_one_lost_probe_of_all_changes_nothing():
    found = follow(lambda since, _: SILENCE if since < timedelta(minutes=8) else FULL, 12 * HOUR)
    assert found.changes == []


def test_no_good_server_loses_its_place_through_fewer_than_half_of_its_monitors(world):
    for name, found in world.outcomes.items():
        assert all(part > 0.5 for part in found.wrong), name


def test_faults_of_the_pool_punish_nobody(world):
    faults = [one for one in world.situations if one.away or one.unheard or one.cut]
    assert len(faults) == 3
    for one in faults:
        assert world.outcomes[one.name].concerned > 100
        assert world.outcomes[one.name].wrong == []
    assert world.outcomes["25 of 40 monitors lose their network"].unknown > 0
    assert world.outcomes["otherwise, losses only"].wrong == []


def test_neither_liars_of_one_region_nor_a_group_in_one_as_bring_a_server_down(world):
    for name in ("three monitors of one region lie", "ten monitors in one AS lie"):
        assert world.outcomes[name].concerned > 50
        assert world.outcomes[name].wrong == []
    for way in ("one AS, delay 0", "one region, delay 0"):
        assert all(part == 0 for _, part in world.lies[way]), way


def test_who_lies_about_delays_brings_down_no_more_than_who_does_not(world):
    """Of 200 servers: four liars none, eight a few, with whatever delay."""
    for way, points in world.lies.items():
        values = dict(points)
        assert (values[3], values[4]) == (0, 0), way
        assert values[8] <= 3, way


def test_what_is_really_wrong_is_found(world):
    limits = {"clocks 5 s off": 9, "clocks 1 s off": 36, "clocks 200 ms off": 207, "silent servers": 18}
    for name, minutes in limits.items():
        found = world.outcomes[name]
        assert len(found.out) == found.concerned
        assert max(found.out) <= minutes
        assert len(found.back) == found.concerned
        assert found.missed == 0
    third = world.outcomes["a third of all servers is silent"]
    assert (len(third.out), third.missed, len(third.back)) == (third.concerned, 0, third.concerned)
    assert world.outcomes["silence of 9 minutes"].out == []


def test_servers_that_are_good_for_their_monitors_only_are_flagged_by_others_and_good_ones_are_not(world):
    false = {one.number for one in world.servers if one.kind == worlds.FALSE}
    assert set(world.flags) == false
    assert all(world.servers[number].is_listed for number in false), "a flag is no verdict"


def test_a_drifting_clock_is_out_soon_after_a_tenth_of_a_second(world):
    for one in world.servers:
        if one.kind == worlds.DRIFTING:
            (round_, into), *later = world.changes[one.number]
            assert (into, later) == (False, [])
            assert 0.1 <= 0.02 * round_ / 160 <= 0.11


def test_the_only_server_of_a_region_without_monitors_stays(world):
    (island,) = (one for one in world.servers if one.region == ISLANDS)
    assert len(island.active) == ACTIVE
    assert island.number not in world.changes


@given(st.lists(st.floats(FULL_SHARE, MAX_SCORE), min_size=3, max_size=12))
def test_what_the_world_leaves_out_would_change_nothing(scores):
    """Servers whose views are all heard and worth a whole share; views at full score that see a full probe."""
    views = [View(number, number, True, score, 0, START) for number, score in enumerate(scores)]
    for scorer in SCORERS.values():
        score = overall(views, QUORUM, START, scorer).score
        assert score is not None
        assert score >= FULL_SHARE
        assert advance(MAX_SCORE, step(FULL, rule=scorer.rule), scorer.rule) == MAX_SCORE


def test_the_page_has_the_times_that_the_rules_give():
    page = (DOCS / "scoring.md").read_text()
    assert fill(page, rules_parts()) == page
    for name, drawing in rule_charts().items():
        assert (DOCS / name).read_text() == drawing


def test_the_page_and_its_charts_tell_of_every_situation(world):
    page = (DOCS / "scoring.md").read_text()
    for name, lines in world_parts(world).items():
        part = page.split(f"<!-- {name} -->\n", 1)[1].split(f"<!-- /{name} -->\n", 1)[0]
        first = [line.split("|")[1] for line in lines]
        assert [line.split("|")[1] for line in part.splitlines()] == first
    for name, drawing in (rule_charts() | world_charts(world)).items():
        assert ET.fromstring(drawing).tag.endswith("svg")
        assert f"({name})" in page


def test_a_page_without_a_place_for_a_table_is_refused():
    with pytest.raises(LookupError, match="has no lines"):
        fill("nothing", {"times": []})


@pytest.mark.parametrize("options", [("--servers", "99"), ("--days", "61"), ("--servers", "50001")])
def test_the_world_is_bounded(options):
    done = subprocess.run(
        [sys.executable, "-m", "lab.scoring_page", *options], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 2


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_page_has_what_came_of_ten_thousand_servers_in_thirty_days():
    whole = World().run()
    page = (DOCS / "scoring.md").read_text()
    assert fill(page, world_parts(whole)) == page
    for name, drawing in world_charts(whole).items():
        assert (DOCS / name).read_text() == drawing
