"""A key goes on when everybody can have forgotten what was before, and the parent says so; never sooner."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolsvc.nameserver.keys import KeyState
from poolsvc.nameserver.rollover import Waits, advance, explain, moved
from poolsvc.nameserver.store import KeyRow
from tests.nameserver.conftest import NOW, new_key

WAITS = Waits(keys=3600, zone=7200, ds=86_400, margin=60)
KEYS = [new_key() for _ in range(3)]


def row(number, state, since=NOW, ds_seen=None):
    key = KEYS[number]
    return KeyRow(number, type(key)(key.private, state, key.dnskey, key.tag), f"{number}.pem", since, ds_seen)


def states(rows):
    return {each.id: each.key.state for each in rows}


def test_one_key_stays():
    assert advance([row(0, KeyState.ACTIVE)], WAITS, NOW + 10**9, signed_since=NOW - 10**7) == []


def test_a_new_key_waits_for_the_old_set_of_keys_to_be_forgotten():
    rows = [row(0, KeyState.ACTIVE, NOW - 10**6), row(1, KeyState.PUBLISHED)]
    assert advance(rows, WAITS, NOW + 3659, signed_since=NOW - 10**7) == []
    news = advance(rows, WAITS, NOW + 3660, signed_since=NOW - 10**7)
    assert states(news) == {0: KeyState.RETIRING, 1: KeyState.ACTIVE}
    assert {each.since for each in news} == {NOW + 3660}
    assert explain(rows[1], rows, WAITS) == ("until resolvers know it", NOW + 3660)


@pytest.mark.parametrize(
    ("ds_seen", "signed_since", "due"),
    [
        (None, NOW, None),
        (NOW, None, None),
        (NOW, NOW, NOW + 86_460),
        (NOW - 10**6, NOW - 5, NOW + 7260),
        (NOW - 10**6, NOW + 9, NOW + 7269),
        (NOW + 1000, NOW, NOW + 87_460),
    ],
)
def test_an_old_key_waits_for_the_parent_and_for_all_that_it_signed(ds_seen, signed_since, due):
    rows = [row(0, KeyState.RETIRING), row(1, KeyState.ACTIVE, ds_seen=ds_seen)]
    text, moment = explain(rows[0], rows, WAITS)
    if due is None:
        assert advance(rows, WAITS, NOW + 10**9, signed_since=signed_since) == []
        assert ds_seen is not None or (moment is None and str(KEYS[1].tag) in text)
        return
    assert due - 9 <= moment <= due
    assert advance(rows, WAITS, due - 1, signed_since=signed_since) == []
    news = advance(rows, WAITS, due, signed_since=signed_since)
    assert states(news) == {0: KeyState.REMOVED}
    assert states(moved(rows, news)) == {1: KeyState.ACTIVE}


def test_a_key_that_was_made_is_published_first_however_long_ago_that_was():
    rows = [row(0, KeyState.ACTIVE), row(1, KeyState.MADE, NOW - 10**8)]
    (news,) = advance(rows, WAITS, NOW, signed_since=None)
    assert (news.id, news.key.state, news.since) == (1, KeyState.PUBLISHED, NOW)
    assert advance([rows[0], news], WAITS, NOW + 3659, signed_since=NOW) == []


def test_a_second_roll_over_waits_for_the_first():
    rows = [row(0, KeyState.RETIRING), row(1, KeyState.ACTIVE), row(2, KeyState.PUBLISHED, NOW - 10**6)]
    assert advance(rows, WAITS, NOW, signed_since=NOW - 10**7) == []


@given(
    st.lists(
        st.tuples(st.integers(1, 50_000), st.booleans(), st.booleans(), st.booleans()),
        min_size=1,
        max_size=40,
    )
)
def test_whatever_happens_there_is_one_active_key_and_the_parent_names_one_in_the_zone(moments):
    rows, named, now = [row(0, KeyState.ACTIVE, NOW - 10**6, NOW - 10**6)], {0: NOW - 10**6}, NOW
    for pause, begins, parent_acts, is_signed in moments:
        now += pause
        if begins and len(rows) == 1 and rows[0].id < 2:
            rows = [*rows, row(rows[0].id + 1, KeyState.PUBLISHED, now)]
        active = next(each for each in rows if each.key.state is KeyState.ACTIVE)
        if parent_acts and active.ds_seen is None:
            rows = [replace(each, ds_seen=now) if each is active else each for each in rows]
            named[active.id] = now
        rows = moved(rows, advance(rows, WAITS, now, signed_since=NOW if is_signed else None))
        assert [each.key.state for each in rows].count(KeyState.ACTIVE) == 1
        # A resolver may know any DS for its TTL after it was replaced.
        newest = max(named.values())
        known = {key for key, since in named.items() if since == newest or newest + WAITS.ds > now}
        known &= {key for key in named if key >= max(named) - 1}
        assert known <= {each.id for each in rows}
