"""What a monitor judges, plans and holds: pure rules."""

import math
from contextlib import suppress
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nts_core.association import Sample
from nts_core.control import MonitorTask, ProbeResult
from poolsvc.config import ConfigError
from poolsvc.monitor.outbox import MAX_AGE, Drop, Outbox
from poolsvc.monitor.schedule import MAX_PLANNED, Schedule, Skip
from poolsvc.monitor.settings import load_settings
from poolsvc.monitor.soundness import (
    LIMIT,
    Kind,
    Reading,
    Reference,
    Soundness,
    agrees,
    parse_reference,
)

MS = 1_000_000
THREE = ("ntp:one", "ntp:two", "ntp:three")


# The local check


def said(reference, offset=0, *, version=4, delay=20 * MS, leap=0, stratum=2, dispersion=0):
    sample = Sample(offset, delay, stratum, leap, 0, dispersion, -20, b"TEST", 0, 0)
    return Reading(reference, version, sample)


def silent(reference, version=4):
    return Reading(reference, version, None, "no answer")


def test_a_majority_that_agrees_is_sound():
    found = agrees([said(name) for name in THREE], THREE)
    assert (found.is_sound, found.detail, found.ipv4, found.ipv6) == (True, "", True, False)


@pytest.mark.parametrize(
    "bad",
    [
        said("ntp:three", 3_600_000 * MS),
        said("ntp:three", -LIMIT - 1),
        said("ntp:three", leap=3),
        said("ntp:three", stratum=16),
        said("ntp:three", dispersion=2000 * MS),
        silent("ntp:three"),
    ],
)
def test_one_of_three_may_lie_or_be_silent_and_two_may_not(bad):
    assert agrees([said("ntp:one"), said("ntp:two", LIMIT), bad], THREE).is_sound
    found = agrees([said("ntp:one"), silent("ntp:two"), bad], THREE)
    assert not found.is_sound
    assert "1 of 3" in found.detail
    assert "ntp:three" in found.detail


def test_a_wrong_clock_of_ones_own_is_no_servers_fault():
    found = agrees([said(name, 12 * MS) for name in THREE], THREE)
    assert (found.is_sound, found.agreeing) == (False, 0)
    assert "-12.0 ms" in found.detail


def test_split_references_are_no_majority():
    four = (*THREE, "ntp:four")
    halves = [said("ntp:one"), said("ntp:two"), said("ntp:three", 50 * MS), said("ntp:four", 51 * MS)]
    assert not agrees(halves, four).is_sound


def test_without_any_answer_nothing_is_sound():
    found = agrees([], THREE)
    assert (found.is_sound, found.ipv4, found.ipv6) == (False, False, False)


def test_a_family_is_good_when_a_reference_was_reached_by_it():
    readings = [said(name) for name in THREE] + [silent(name, 6) for name in THREE]
    found = agrees(readings, THREE)
    assert (found.holds(4), found.holds(6)) == (True, False)
    assert agrees([*readings, said("ntp:one", version=6)], THREE).holds(6)
    lies = said("ntp:one", 900 * MS, version=6, delay=300 * MS)
    found = agrees([*readings, lies], THREE)
    assert (found.is_sound, found.holds(6)) == (True, False), "the way with the least delay speaks for it"


@given(
    st.lists(
        st.tuples(st.sampled_from(THREE), st.sampled_from([4, 6]), st.integers(-(10**18), 10**18)),
        max_size=12,
    )
)
def test_no_minority_makes_a_clock_sound(answers):
    found = agrees([said(name, offset, version=version) for name, version, offset in answers], THREE)
    near = {name for name, _, offset in answers if abs(offset) <= LIMIT}
    assert not found.is_sound or len(near) >= 2
    assert len(found.detail) <= 300


# The schedule


def task(target=1, after=0.0, address=None):
    return MonitorTask(target, "alice.servers.pool.example", address or f"192.0.2.{target % 250}", after)


def schedule(**values):
    return Schedule(**{"at_once": 10, "jitter": 0, "lateness": 30, "random": Random(1), **values})


def test_a_probe_begins_when_it_is_due_and_once():
    plan = schedule()
    plan.take([task(1, 5), task(2)], 100)
    assert [each.target for each in plan.due(100)] == [2]
    assert plan.next_at() == 105
    assert plan.due(104.9) == []
    assert [each.target for each in plan.due(105)] == [1]
    assert (plan.due(1000), plan.planned, plan.under_way) == ([], 0, 2)


def test_a_random_moment_later():
    plan = schedule(jitter=5)
    plan.take([task(target) for target in range(1, 200)], 0)
    assert plan.due(0) == []
    halfway = len(plan.due(2.5))
    plan._busy.clear()
    assert 0 <= halfway <= 199
    assert plan.skipped.total() + halfway > 50


def test_never_two_of_one_address_at_once():
    plan = schedule()
    plan.take([task(1, address="192.0.2.1"), task(2, address="192.0.2.1")], 0)
    (begun,) = plan.due(0)
    assert plan.skipped == {Skip.BUSY: 1}
    plan.take([task(1, address="192.0.2.1")], 1)
    assert plan.due(1) == []
    plan.end(begun)
    plan.take([task(1, address="192.0.2.1")], 2)
    assert len(plan.due(2)) == 1


def test_overload_leaves_out_and_does_not_delay():
    plan = schedule(at_once=2)
    plan.take([task(target) for target in range(1, 6)], 0)
    assert len(plan.due(0)) == 2
    assert (plan.skipped, plan.planned) == ({Skip.CROWDED: 3}, 0)


def test_a_late_probe_is_left_out():
    plan = schedule()
    plan.take([task(1), task(2, 25)], 0)
    assert [each.target for each in plan.due(31)] == [2]
    assert plan.skipped == {Skip.LATE: 1}


def test_a_new_task_replaces_the_old_one():
    plan = schedule()
    plan.take([task(1, 5)], 0)
    plan.take([task(1, 20)], 1)
    assert plan.due(10) == []
    assert len(plan.due(21)) == 1


def test_what_is_planned_is_bounded_and_odd_times_are_now_or_within_an_hour():
    plan = schedule()
    plan.take([task(target) for target in range(MAX_PLANNED + 3)], 0)
    assert (plan.planned, plan.skipped) == (MAX_PLANNED, {Skip.BEYOND: 3})
    for _ in range(5):
        plan.take([task(target) for target in range(MAX_PLANNED)], 0)
    assert len(plan._order) <= 2 * MAX_PLANNED + 1000
    plan.clear()
    for target, after in enumerate((math.nan, math.inf, -5.0, 1e300)):
        plan.take([task(target, after)], 0)
    assert sorted(at for at, _ in plan._order) == [0, 0, 0, 3600]


# What waits to be told

GOOD = Soundness(True, "", True, True, 3, 3)
BAD = Soundness(False, "the network is down", False, False, 0, 3)
RESULT = ProbeResult("192.0.2.1", None, "")


def told(outbox, now, limit=100):
    return [sample.target for sample in outbox.batch(limit, now)]


def test_a_result_is_told_once_a_check_after_it_was_good():
    outbox = Outbox()
    begun = outbox.begin(task(1), 10)
    outbox.add(begun, RESULT, 15)
    assert told(outbox, 16) == []
    outbox.check(GOOD, 14)
    assert told(outbox, 17) == [], "that check began before the probe had ended"
    outbox.check(GOOD, 20)
    assert told(outbox, 21) == [1]
    assert outbox.batch(100, 30)[0].age == 20
    outbox.taken()
    assert (told(outbox, 31), len(outbox)) == ([], 0)


def test_of_an_outage_between_two_good_checks_nothing_is_told():
    outbox = Outbox()
    before = outbox.begin(task(1), 10)
    outbox.add(before, RESULT, 12)
    during = outbox.begin(task(2), 13)
    outbox.check(BAD, 14)
    outbox.add(during, RESULT, 16)
    after = outbox.begin(task(3), 17)
    outbox.add(after, RESULT, 18)
    outbox.check(GOOD, 20)
    assert told(outbox, 21) == [3]
    assert outbox.dropped == {Drop.UNSOUND: 2}


def test_ipv6_alone_may_be_down():
    outbox = Outbox()
    for target, address in ((4, "192.0.2.1"), (6, "2001:db8::1")):
        outbox.add(outbox.begin(task(target, address=address), 0), RESULT, 1)
    outbox.check(Soundness(True, "", True, False, 3, 3), 2)
    assert told(outbox, 3) == [4]
    assert outbox.dropped == {Drop.UNSOUND: 1}


def test_a_batch_stays_the_same_until_it_is_taken():
    outbox = Outbox()
    for target in range(5):
        outbox.add(outbox.begin(task(target), 0), RESULT, 1)
    outbox.check(GOOD, 2)
    assert told(outbox, 3, limit=2) == [0, 1]
    assert outbox.is_repeating
    assert told(outbox, 4) == [0, 1]
    outbox.taken()
    assert told(outbox, 5) == [2, 3, 4]
    outbox.give_up(Drop.REFUSED)
    assert (outbox.has_ready, outbox.dropped) == (False, {Drop.REFUSED: 3})


def test_what_the_registry_has_not_taken_in_twenty_minutes_is_dropped():
    outbox = Outbox()
    for target, at in ((1, 0), (2, 300)):
        outbox.add(outbox.begin(task(target), at), RESULT, at + 1)
    outbox.check(GOOD, 302)
    assert told(outbox, 303, limit=1) == [1]
    assert told(outbox, MAX_AGE + 1) == [2]
    assert outbox.dropped[Drop.OLD] == 1


def test_what_waits_is_bounded(monkeypatch):
    monkeypatch.setattr("poolsvc.monitor.outbox.MAX_HELD", 3)
    outbox = Outbox()
    for target in range(5):
        outbox.add(outbox.begin(task(target), target), RESULT, target)
    outbox.check(GOOD, 10)
    assert told(outbox, 11) == [2, 3, 4]
    assert outbox.dropped == {Drop.FULL: 2}


# Settings

TEXT = """
registry = "https://registry.example.net"
token_file = "monitor.token"
references = ["nts:time.example.net", "ntp:192.0.2.1:1123", "ntp:[2001:db8::1]"]
"""


def settings(tmp_path, text, **flags):
    file = tmp_path / "monitor.toml"
    file.write_text(text)
    return load_settings(file, **flags)


def test_settings(tmp_path, monkeypatch):
    found = settings(tmp_path, TEXT)
    assert found.token_file == tmp_path / "monitor.token"
    assert found.versions == {4, 6}
    assert found.parsed_references[1:] == (
        Reference(Kind.NTP, "192.0.2.1", 1123),
        Reference(Kind.NTP, "2001:db8::1", 123),
    )
    assert settings(tmp_path, TEXT + 'families = ["ipv4"]').versions == {4}
    monkeypatch.setenv("POOL_MONITOR_PROBES_AT_ONCE", "7")
    assert settings(tmp_path, TEXT).probes_at_once == 7
    assert settings(tmp_path, TEXT, metrics="127.0.0.1:9100").metrics == "127.0.0.1:9100"


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ('references = ["ntp:a.example", "ntp:b.example"]', "references"),
        ('references = ["ntp:a.example", "ntp:a.example", "ntp:b.example"]', "references"),
        ('references = ["a.example", "ntp:b.example", "ntp:c.example"]', "nts:HOST"),
        ('registry = "http://registry.example.net"', "registry"),
        ('registry = "https://user@registry.example.net"', "registry"),
        ('famlies = ["ipv4"]', "famlies"),
        ("families = []", "families"),
        ("check_interval = 0", "check_interval"),
    ],
)
def test_settings_that_cannot_be_used_are_named(tmp_path, line, names):
    key = line.partition(" ")[0]
    kept = "\n".join(each for each in TEXT.splitlines() if not each.startswith(key))
    with pytest.raises(ConfigError, match=names):
        settings(tmp_path, f"{kept}\n{line}\n")


@given(st.text(max_size=40))
def test_a_reference_is_read_or_refused_in_words(text):
    with suppress(ValueError):
        assert parse_reference(text).port > 0
