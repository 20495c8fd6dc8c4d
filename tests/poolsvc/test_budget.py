"""The CA's limits: what is left of them, and who goes when."""

import itertools
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from lab.buckets import ExactBucket
from poolsvc import budget
from poolsvc.budget import Grant, Limit, Limits, Refusal, Waiting, fill, next_round, plan

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
WEEK, DAY, HOUR, MINUTE = (timedelta(**{unit: 1}) for unit in ("weeks", "days", "hours", "minutes"))
FIFTY = Limit(50, WEEK)
SLOT = FIFTY.interval
LETS_ENCRYPT = Limits(FIFTY, Limit(300, 3 * HOUR), Limit(5, WEEK), Limit(5, HOUR))


limits = st.builds(Limit, st.integers(1, 20), st.sampled_from([HOUR, DAY, WEEK]))
# Moments as shares of a period, so that buckets run empty and full.
gaps = st.lists(st.floats(0, 0.6), max_size=80)


@given(limits, gaps, st.floats(0, 3))
def test_a_bucket_is_never_thought_to_hold_more_than_it_does(limit, gaps, idle):
    times = list(itertools.accumulate((limit.period * gap for gap in gaps), initial=NOW))[1:]
    exact = ExactBucket(limit, NOW)
    for at in times:
        exact.lose(at)
    now = (times[-1] if times else NOW) + limit.period * idle
    exact.wait(now)
    found = fill(limit, times, now)
    assert found.left(now) <= exact.held
    assert found.spent == sum(at > now - limit.period for at in times)
    assert fill(limit, reversed(times), now) == found, "whatever the order of rows"


@given(limits, st.lists(st.floats(0, 1), max_size=60), st.floats(0, 1))
def test_a_bucket_that_was_full_within_its_memory_is_known_exactly(limit, shares, idle):
    times = sorted(NOW + limit.period * share for share in shares)
    now = NOW + limit.period * (1 + idle)
    exact = ExactBucket(limit, NOW)
    for at in times:
        exact.lose(at)
    exact.wait(now)
    found = fill(limit, times, now)
    assert found.left(now) == int(exact.held)
    assert found.next_at(now) is None or found.next_at(now) > now


def test_a_bucket_after_a_long_rush_is_not_thought_to_be_full():
    """Fifty at once, then one as each comes back, for a year: a count over a week would see fifty and no more."""
    times = [NOW] * 50 + [NOW + number * SLOT for number in range(1, 2600)]
    assert fill(FIFTY, times, times[-1]).left(times[-1]) == 0
    assert fill(FIFTY, times, times[-1] + SLOT).left(times[-1] + SLOT) == 1


def test_a_limit_without_any_use_is_full():
    found = fill(FIFTY, [], NOW)
    assert (found.left(NOW), found.next_at(NOW), found.spent) == (50, None, 0)
    assert found.there_at(50) == NOW
    assert found.there_at(51) == NOW + SLOT


def test_a_refusal_leaves_nothing_until_its_time_and_then_one():
    until = NOW + 2 * HOUR
    found = fill(FIFTY, [NOW - DAY], NOW + MINUTE, Refusal(NOW, until))
    assert found.left(until - MINUTE) == 0
    assert found.left(until) == 1
    assert (found.there_at(1), found.there_at(2)) == (until, until + SLOT)
    assert found.next_at(NOW + MINUTE) == until
    later = until + HOUR
    assert fill(FIFTY, [until], later, Refusal(NOW, until)).there_at(1) == until + SLOT
    far = NOW + 20 * DAY
    assert fill(FIFTY, [NOW + MINUTE], NOW + HOUR, Refusal(NOW, far)).there_at(1) == far


def stand(*, grant=None, refusal=None, certificates=(), orders=(), reserved=0, now=NOW):
    return budget.stand(
        LETS_ENCRYPT,
        grant,
        refusal,
        certificates=certificates,
        orders=orders,
        reserved=reserved,
        now=now,
    )


def test_a_refusal_is_of_that_limit_whose_next_one_comes_as_soon():
    soon, later = Refusal(NOW, NOW + 36 * timedelta(seconds=1)), Refusal(NOW, NOW + HOUR)
    found = stand(refusal=soon)
    assert (found.certificates.left(NOW), found.orders.left(NOW)) == (50, 0)
    assert found.slot(1, NOW) == soon.until
    found = stand(refusal=later)
    assert (found.certificates.left(NOW), found.orders.left(NOW)) == (0, 300)
    assert found.slot(1, NOW) == later.until


def test_what_is_under_way_is_not_given_twice():
    found = stand(certificates=[NOW] * 20, orders=[NOW] * 30, reserved=10)
    assert found.slot(20, NOW) == NOW
    assert found.slot(21, NOW) == NOW + SLOT


def test_both_limits_hold_a_slot_back():
    found = stand(grant=Grant(10_000, None, None))
    assert found.slot(300, NOW) == NOW
    assert found.slot(301, NOW) == NOW + 36 * timedelta(seconds=1)


def test_a_grant_ends_at_its_time_and_slots_beyond_come_at_the_usual_pace():
    until = NOW + DAY
    found = stand(grant=Grant(700, None, until), certificates=[NOW] * 700)
    assert found.certificates.limit == Limit(700, WEEK)
    assert found.slot(100, NOW) == NOW + DAY, "a hundred a day"
    assert found.slot(101, NOW) == until + SLOT
    assert found.slot(150, NOW) == until + 50 * SLOT
    assert stand(grant=Grant(700, None, until), now=until).certificates.limit == FIFTY
    assert stand(grant=Grant(None, 9, None)).orders.limit == Limit(9, 3 * HOUR)


moments = st.integers(0, 5000).map(lambda minutes: NOW - minutes * MINUTE)


@st.composite
def queues(draw):
    """Servers of a few members, in any state of readiness."""
    count = draw(st.integers(0, 25))
    return [
        Waiting(
            round=draw(st.integers(0, 4)),
            since=draw(moments),
            server=number,
            member=draw(st.integers(0, 5)),
            ready_at=NOW + draw(st.sampled_from([0, 0, 0, 7, 400, 4000])) * MINUTE,
        )
        for number in range(count)
    ]


budgets = st.builds(
    lambda taken, ordered, reserved: stand(certificates=taken, orders=ordered, reserved=reserved),
    st.lists(moments, max_size=70),
    st.lists(moments, max_size=20),
    st.integers(0, 9),
)


@given(queues(), budgets, st.randoms())
def test_a_plan_gives_everybody_a_turn_and_never_more_than_there_is(waiting, found, chance):
    starts = plan(waiting, found, NOW)
    assert set(starts) == {each.server for each in waiting}
    for number, at in enumerate(sorted(starts.values()), start=1):
        assert at >= found.slot(number, NOW) >= NOW
    for each in waiting:
        assert starts[each.server] >= each.ready_at
    chance.shuffle(waiting)
    assert plan(waiting, found, NOW) == starts, "whatever the order of rows"


@given(queues(), budgets)
def test_those_who_are_ready_go_in_order(waiting, found):
    ready = sorted(each for each in waiting if each.ready_at == NOW)
    starts = plan(ready, found, NOW)
    assert [starts[each.server] for each in ready] == [
        found.slot(number + 1, NOW) for number in range(len(ready))
    ]


@given(queues(), budgets)
def test_a_name_that_has_to_wait_delays_no_other(waiting, found):
    if not waiting:
        return
    held = waiting[0]
    others = plan(waiting[1:], found, NOW)
    never = Waiting(held.round, held.since, held.server, held.member, max(others.values(), default=NOW) + DAY)
    with_it = plan([never, *waiting[1:]], found, NOW)
    assert {server: with_it[server] for server in others} == others


@given(st.lists(st.integers(0, 6), max_size=40))
def test_everybodys_first_goes_before_anybodys_second(members):
    rounds = []
    for member in members:
        rounds.append((member, next_round(rounds, member)))
    turn = [member for _, member in sorted((number, at) for at, (_, number) in enumerate(rounds))]
    order = [rounds[at][0] for at in turn]
    nth = [order[:at].count(member) for at, member in enumerate(order)]
    assert nth == sorted(nth)


def test_who_has_had_a_turn_is_behind_those_who_wait_and_not_behind_all_rounds():
    rounds = [(1, 3), (2, 3), (1, 4)]
    assert next_round(rounds, 3) == 3
    assert next_round(rounds, 1) == 5
    assert next_round([], 1) == 0
