"""Who is right among a client's sources and who is dismissed; samples and times are arguments."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nts_core.association import Sample
from nts_core.panel import BURST, NO_PATIENCE, OUTVOTED, PATIENCE, Dismissal, Failing, Panel, Standing
from nts_core.roster import Fault

SECOND = 1_000_000_000
LIFE = 640 * SECOND
MS = 1_000_000


def sample(offset=0, **changes):
    honest = Sample(
        offset=offset,
        delay=2 * MS,
        stratum=2,
        leap=0,
        root_delay=MS,
        root_dispersion=MS,
        precision=-20,
        reference_id=b"TEST",
        cookies=1,
        asked=1,
    )
    return replace(honest, **changes)


class Sitting:
    """A panel with a clock; `base` is the system's clock minus the monotonic one."""

    def __init__(self, names, count=4):
        self.panel = Panel(count, LIFE)
        self.now, self.base = 1000 * SECOND, 1_700_000_000 * SECOND
        for name in names:
            self.panel.seat(name, self.now)

    def hear(self, offsets, times=1, **changes):
        """A sample of each, a second later."""
        for _ in range(times):
            self.now += SECOND
            for name, offset in offsets.items():
                self.panel.sampled(name, sample(offset, **changes), self.now, self.base)
        return self

    def miss(self, name, failing=Failing.POLL, reason="no answer"):
        self.now += SECOND
        self.panel.failed(name, failing, reason, self.now, self.base)
        return self

    def standings(self):
        return {name: seat.standing for name, seat in self.panel.seats.items()}

    def reading(self):
        return self.panel.reading(self.now)


def right(names, offset=0):
    return dict.fromkeys(names, offset)


def test_nobodys_word_counts_before_its_burst():
    sitting = Sitting("abcd").hear(right("abcd"), BURST - 1)
    assert set(sitting.standings().values()) == {Standing.PENDING}
    assert sitting.reading() is None
    assert sitting.panel.is_waiting
    sitting.hear(right("abcd"))
    assert set(sitting.standings().values()) == {Standing.TRUECHIMER}
    assert sitting.reading().sources == tuple("abcd")
    assert not sitting.panel.is_waiting


def test_more_than_half_of_those_wanted_make_a_reading():
    sitting = Sitting("abcd").hear(right("ab"), BURST)
    assert sitting.reading() is None
    assert sitting.panel.truechimers == ["a", "b"]
    assert sitting.hear(right("c"), BURST).reading().sources == tuple("abc")


def test_a_reading_goes_on_with_the_monotonic_clock_and_becomes_less_sure():
    sitting = Sitting("abc", 3).hear(right("abc", 5 * SECOND), BURST)
    first = sitting.reading()
    assert first.unix == sitting.now + sitting.base + 5 * SECOND
    assert (first.offset, first.time.tzinfo is None) == (5 * SECOND, False)
    sitting.now += 100 * SECOND
    later = sitting.reading()
    assert later.unix - first.unix == 100 * SECOND
    assert later.error - first.error == 100 * 15_000
    sitting.now += LIFE
    assert sitting.reading() is None, "that majority is too long ago"


def test_samples_from_before_the_systems_clock_was_set_count_as_before():
    sitting = Sitting("abc", 3).hear(right("abc"), BURST)
    before = sitting.reading()
    sitting.base += 3600 * SECOND
    sitting.hear({"a": -3600 * SECOND})
    assert sitting.standings() == dict.fromkeys("abc", Standing.TRUECHIMER)
    assert abs(sitting.reading().unix - before.unix - SECOND) < MS


def test_a_new_falseticker_is_dismissed_once_all_are_heard():
    sitting = Sitting("abcd").hear({**right("abc"), "d": SECOND}, BURST - 1)
    assert sitting.panel.dismissals() == []
    sitting.hear({"d": SECOND}).hear(right("ab"))
    assert sitting.panel.dismissals() == [], "c is not heard yet"
    sitting.hear(right("c"))
    assert sitting.panel.dismissals() == [
        Dismissal("d", Fault.FALSETICKER, "its time disagrees with the majority")
    ]


def test_a_good_source_may_be_outvoted_for_a_while():
    sitting = Sitting("abcd").hear(right("abcd"), BURST)
    for _ in range(OUTVOTED):
        assert sitting.panel.dismissals() == []
        # Its best sample counts: only when all its samples are wrong does it disagree.
        sitting.hear(
            {"d": 5 * SECOND, **right("abc")}, 1 if sitting.standings()["d"] is Standing.FALSETICKER else 8
        )
    assert [each.name for each in sitting.panel.dismissals()] == ["d"]


def test_two_against_two_dismiss_nobody_and_make_no_time():
    sitting = Sitting("abcd").hear({**right("ab"), **right("cd", SECOND)}, BURST + 5)
    assert sitting.panel.dismissals() == []
    assert sitting.reading() is None
    assert {seat.trouble for seat in sitting.panel.seats.values()} == {"the sources disagree"}


def test_with_somebody_else_there_the_loneliest_goes_until_there_is_a_majority():
    sitting = Sitting("abcd").hear({**right("ab"), "c": SECOND, "d": 2 * SECOND}, BURST)
    assert sitting.panel.dismissals(has_spare=True) == [
        Dismissal("c", Fault.TIED, "the sources disagree, and the fewest agree with it")
    ]
    assert sitting.panel.dismissals(has_spare=True) == [], "one at a time"
    sitting.panel.leave("c")
    sitting.panel.seat("e", sitting.now)
    assert sitting.panel.dismissals(has_spare=True) == [], "first it is heard"
    sitting.hear({**right("abe"), "d": 2 * SECOND}, BURST)
    assert [(each.name, each.fault) for each in sitting.panel.dismissals(has_spare=True)] == [
        ("d", Fault.FALSETICKER)
    ]


def test_fewer_than_a_quorum_call_nobody_a_falseticker():
    """Two that collude, one that is honest, and one that says itself that it is of no use."""
    sitting = Sitting("abcd").hear({"d": 0}, 1, leap=3).hear({**right("ab", SECOND), "c": 0}, BURST)
    assert sitting.standings()["d"] is Standing.UNFIT
    assert sitting.panel.dismissals() == []


def test_after_a_long_sleep_nobody_counts_and_all_are_waited_for():
    sitting = Sitting("abcd").hear(right("abcd"), BURST)
    sitting.now += LIFE + SECOND
    sitting.panel.judge(sitting.now, sitting.base)
    assert set(sitting.standings().values()) == {Standing.SILENT}
    assert sitting.panel.is_waiting
    assert sitting.reading() is None
    assert not sitting.hear(right("abcd")).panel.is_waiting


@pytest.mark.parametrize(("was_good", "polls"), [(False, NO_PATIENCE), (True, PATIENCE)])
def test_silence_is_borne_for_a_while_and_counts_only_if_others_answer(was_good, polls):
    sitting = Sitting("abcd").hear(right("abcd" if was_good else "abc"), BURST)
    for _ in range(polls):
        assert sitting.panel.dismissals() == []
        sitting.hear(right("abc")).miss("d")
    assert sitting.panel.dismissals() == [Dismissal("d", Fault.UNREACHABLE, "no answer")]


def test_a_network_that_is_down_is_nobodys_fault():
    sitting = Sitting("abcd").hear(right("abcd"), BURST)
    for _ in range(PATIENCE):
        for name in "abcd":
            sitting.miss(name)
    assert {(each.name, each.fault) for each in sitting.panel.dismissals()} == {
        (name, Fault.UNREACHED) for name in "abcd"
    }


def test_an_answer_ends_the_count_of_misses():
    sitting = Sitting("abcd").hear(right("abcd"), BURST)
    for _ in range(3):
        for _ in range(PATIENCE - 1):
            sitting.miss("d")
        sitting.hear(right("abcd"))
    assert sitting.panel.dismissals() == []


@pytest.mark.parametrize(
    ("failing", "fault"),
    [
        (Failing.REFUSED, Fault.REFUSED),
        (Failing.KEYS, Fault.UNREACHABLE),
        (Failing.CONTACT, Fault.UNREACHED),
    ],
)
def test_what_is_final_is_final_at_once(failing, fault):
    sitting = Sitting("ab").miss("a", failing, "reason")
    assert sitting.panel.dismissals() == [Dismissal("a", fault, "reason")]


def test_who_cannot_be_reached_while_others_are_is_to_blame():
    sitting = Sitting("ab").hear(right("b"), BURST).miss("a", Failing.CONTACT)
    assert [each.fault for each in sitting.panel.dismissals()] == [Fault.UNREACHABLE]


def test_who_says_it_is_not_synchronised_has_no_vote_and_goes():
    sitting = Sitting("abcd").hear(right("abc"), BURST).hear(right("d"), NO_PATIENCE, leap=3)
    assert sitting.standings()["d"] is Standing.UNFIT
    assert [(each.name, each.fault) for each in sitting.panel.dismissals()] == [("d", Fault.UNFIT)]
    assert sitting.reading().sources == tuple("abc")


def test_who_has_not_answered_for_long_has_no_vote():
    sitting = Sitting("abcd").hear(right("abcd"), BURST)
    sitting.now += LIFE + SECOND
    sitting.hear(right("abc"))
    assert sitting.standings()["d"] is Standing.SILENT
    assert sitting.reading().sources == tuple("abc")


def test_who_has_left_has_no_vote():
    sitting = Sitting("abc", 3).hear(right("abc"), BURST)
    sitting.panel.leave("c")
    sitting.panel.leave("c")
    assert sitting.hear(right("ab")).reading().sources == tuple("ab")


_NAMES = st.sampled_from("abcd")
_EVENTS = st.one_of(
    st.tuples(st.just("hear"), _NAMES, st.integers(-3 * SECOND, 3 * SECOND)),
    st.tuples(st.just("miss"), _NAMES, st.sampled_from(Failing)),
    st.tuples(st.just("wait"), _NAMES, st.integers(0, 2 * LIFE)),
)


@given(events=st.lists(_EVENTS, max_size=60))
def test_whatever_happens_a_reading_has_a_quorum_and_holds_what_is_said_of_it(events):
    sitting = Sitting("abcd")
    for kind, name, value in events:
        match kind:
            case "hear":
                sitting.hear({name: value})
            case "miss":
                sitting.miss(name, value)
            case "wait":
                sitting.now += value
        reading = sitting.reading()
        if reading is not None:
            assert len(reading.sources) >= 3
            assert reading.error > 0
        assert len({each.name for each in sitting.panel.dismissals()}) == len(sitting.panel.dismissals())
        assert set(sitting.panel.truechimers) <= set(sitting.panel.seats)
