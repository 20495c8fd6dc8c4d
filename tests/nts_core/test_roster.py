"""Who a client's sources are over time; times are arguments."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nts_core.independence import Candidate
from nts_core.metadata import Metadata
from nts_core.roster import (
    EXCHANGE_EVERY,
    MAX_HOLD,
    MAX_HOLDS,
    MAX_UNREACHED_HOLD,
    MIN_HOLD,
    MIN_UNREACHED_HOLD,
    REFUSED_HOLD,
    Fault,
    Hold,
    Roster,
)

DAY = 86_400.0


def candidate(name, operator=None, address=None, priority=0):
    known = None if operator is None else Metadata(operator * 10)
    return Candidate(name, 4460, priority, () if address is None else (address,), known)


def pool(*names):
    """Each of an operator of its own."""
    return [candidate(name, name, f"192.0.{number}.1") for number, name in enumerate(names)]


def names(candidates):
    return [each.name for each in candidates]


def started(*listed, count=4):
    roster = Roster(count)
    roster.listed(listed)
    roster.choose(0)
    return roster


def test_places_are_filled_once():
    roster = Roster(4)
    roster.listed(pool(*"abcdef"))
    assert names(roster.choose(0)) == list("abcd")
    assert roster.choose(0) == []
    assert names(roster.used) == list("abcd")


def test_who_is_not_in_the_newest_answer_is_used_on():
    roster = started(*pool(*"abcd"))
    roster.listed(pool(*"efgh"))
    assert roster.choose(60) == []
    assert names(roster.used) == list("abcd")


def test_who_is_gone_is_dropped_at_once_and_replaced():
    roster = started(*pool(*"abcdef"))
    assert names(roster.gone(["b", "f", "unknown"])) == ["b"]
    assert names(roster.choose(1)) == ["e"], "f is no member either"
    assert names(roster.used) == list("acde")


def test_who_failed_is_replaced_and_held_back_ever_longer():
    roster = started(*pool(*"ab"), count=1)
    now, lengths = 0.0, []
    for _ in range(8):
        roster.failed("a", Fault.UNREACHABLE, "no answer", now)
        roster.gone(["b"])
        assert roster.choose(now) == []
        release = roster.next_release(now)
        lengths.append(release - now)
        assert roster.choose(release - 1) == []
        assert names(roster.choose(release)) == ["a"]
        now = release
    assert lengths[:3] == [MIN_HOLD, 2 * MIN_HOLD, 4 * MIN_HOLD]
    assert lengths[-2:] == [MAX_HOLD, MAX_HOLD]


def test_a_long_good_life_is_remembered_instead_of_old_failures():
    roster = started(*pool("a"), count=1)
    for now in (0.0, DAY):
        roster.failed("a", Fault.FALSETICKER, "it disagrees", now)
        assert names(roster.choose(now + MAX_HOLD)) == ["a"]
    roster.failed("a", Fault.FALSETICKER, "it disagrees", 10 * DAY)
    assert roster.held(10 * DAY) == {"a": Hold(10 * DAY + MIN_HOLD, 1, Fault.FALSETICKER, "it disagrees")}


def test_who_refuses_is_left_alone_for_a_week():
    roster = started(*pool("a"), count=1)
    roster.failed("a", Fault.REFUSED, "DENY", 0)
    assert roster.next_release(0) == REFUSED_HOLD


def test_while_nobody_can_be_reached_servers_are_held_back_for_minutes_and_not_blamed():
    roster = started(*pool("a"), count=1)
    now, lengths = 0.0, []
    for _ in range(7):
        roster.failed("a", Fault.UNREACHED, "no network", now)
        lengths.append(roster.next_release(now) - now)
        now += lengths[-1]
        roster.choose(now)
    assert lengths[:2] == [MIN_UNREACHED_HOLD, 2 * MIN_UNREACHED_HOLD]
    assert lengths[-1] == MAX_UNREACHED_HOLD
    roster.failed("a", Fault.UNREACHABLE, "no answer", now)
    assert roster.held(now)["a"].failures == 1
    assert roster.next_release(now) - now == MIN_HOLD


def test_when_the_network_is_back_nobody_waits():
    roster = started(*pool(*"ab"), count=2)
    roster.failed("a", Fault.UNREACHED, "no network", 0)
    roster.failed("b", Fault.FALSETICKER, "it disagrees", 0)
    assert not roster.has_choice(1)
    roster.release(Fault.UNREACHED)
    assert roster.has_choice(1)
    assert names(roster.choose(1)) == ["a"]
    assert not roster.has_choice(1)


def test_who_is_held_and_gone_is_still_held_when_it_comes_again():
    roster = started(*pool(*"ab"), count=1)
    roster.failed("a", Fault.UNREACHABLE, "no answer", 0)
    roster.gone(["a", "b"])
    assert roster.next_release(0) is None, "nobody waits for one that is no member"
    roster.listed(pool("a"))
    assert roster.choose(1) == []


def test_holds_survive_a_restart():
    before = started(*pool("a"), count=1)
    before.failed("a", Fault.UNREACHABLE, "no answer", 0)
    after = Roster(1, before.holds)
    after.listed(pool("a"))
    assert after.choose(1) == []
    assert names(after.choose(MIN_HOLD)) == ["a"]


def test_an_earlier_runs_sources_are_taken_first_unless_held_back():
    roster = Roster(2, {"x": Hold(10.0, 1, Fault.UNREACHABLE, "no answer")})
    *earlier, listed = pool("x", "y", "z", "a")
    assert names(roster.resume(earlier, 0)) == ["y", "z"]
    roster.listed([listed])
    assert roster.choose(0) == []
    assert names(roster.used) == ["y", "z"]


def test_two_names_with_one_address_are_one_source():
    roster = started(candidate("a", "a", "192.0.2.1"), candidate("b", "b", "192.0.2.1"), count=2)
    assert names(roster.used) == ["a"]
    roster.failed("a", Fault.UNREACHABLE, "no answer", 0)
    assert names(roster.choose(0)) == ["b"]


def test_new_facts_of_a_source_replace_what_was_known():
    roster = started(*pool("a"))
    roster.known([candidate("a", "a", "192.0.2.99"), candidate("z", "z")])
    assert [each.addresses for each in roster.used] == [("192.0.2.99",)]


def test_one_source_an_hour_is_exchanged_for_more_independence():
    roster = started(*(candidate(name, "q") for name in "abc"), count=3)
    assert len(roster.given_up) == 3
    roster.listed([candidate("a", "q"), *pool(*"xy")])
    left, came = roster.exchange(10)
    assert came.name == "x"
    assert left.name not in names(roster.used)
    assert len(roster.given_up) == 1
    assert roster.exchange(10 + EXCHANGE_EVERY - 1) is None
    assert roster.exchange(10 + EXCHANGE_EVERY)[1].name == "y"
    assert roster.given_up == ()
    assert roster.exchange(10 + 2 * EXCHANGE_EVERY) is None, "nothing is better than this"


def test_nobody_is_exchanged_for_one_of_a_worse_priority():
    roster = started(candidate("a", "q"), candidate("b", "q"), count=2)
    roster.listed([candidate("x", "x", priority=1)])
    assert roster.exchange(0) is None


def test_a_hostile_pool_cannot_fill_the_memory():
    roster = Roster(1)
    for number in range(2 * MAX_HOLDS):
        roster.failed(f"s{number}", Fault.UNREACHABLE, "no answer", number)
    assert len(roster.holds) == MAX_HOLDS
    assert f"s{2 * MAX_HOLDS - 1}" in roster.holds


_NAMES = st.sampled_from("abcdefgh")
_EVENTS = st.one_of(
    st.tuples(st.just("listed"), st.sets(_NAMES)),
    st.tuples(st.just("gone"), _NAMES),
    st.tuples(st.just("failed"), _NAMES),
    st.tuples(st.just("wait"), st.integers(1, 90_000)),
    st.tuples(st.just("exchange"), st.none()),
)


@pytest.mark.parametrize("count", [1, 4])
@given(events=st.lists(_EVENTS, max_size=40))
def test_whatever_happens_the_rules_hold(count, events):
    roster, now, listed = Roster(count), 0.0, set()
    for kind, value in events:
        match kind:
            case "listed":
                listed = set(value)
                roster.listed(candidate(name, name[0] if name < "e" else "q") for name in sorted(value))
            case "gone":
                listed.discard(value)
                roster.gone([value])
                assert value not in names(roster.used)
            case "failed":
                roster.failed(value, Fault.UNREACHABLE, "no answer", now)
                assert value not in names(roster.used)
            case "wait":
                now += value
            case "exchange":
                roster.exchange(now)
        new = roster.choose(now)
        used = names(roster.used)
        assert set(names(new)) <= listed
        assert len(set(used)) == len(used) <= count
        assert not roster.held(now).keys() & set(used)
        free = listed - set(used) - roster.held(now).keys()
        assert len(used) == count or not free
