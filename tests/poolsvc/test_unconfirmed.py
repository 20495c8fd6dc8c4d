"""Whose turn it is to be asked for."""

from poolsvc.unconfirmed import Unconfirmed


def keys(*numbers):
    return [(f"s{number}.servers.pool.example.", "A") for number in numbers]


def test_the_newest_is_asked_for_first_and_a_sample_last():
    some = Unconfirmed()
    some.add(keys(1, 2))
    some.add_last(keys(8, 9, 2))
    some.add(keys(3, 1))
    assert some.turn(9, again=True) == keys(1, 3, 2, 9, 8)
    assert some.turn(2, again=True) == keys(1, 3)


def test_what_was_asked_for_in_vain_takes_turns_and_half_of_each_at_most():
    some = Unconfirmed()
    some.add(keys(*range(10)))
    some.answered(keys(*range(10)), keys(*range(6)))
    assert not some.has_new
    assert some.turn(4, again=True) == keys(0, 1)
    some.add(keys(20, 21, 22, 23, 24))
    assert some.turn(4, again=False) == keys(24, 23, 22, 21)
    asked = some.turn(4, again=True)
    assert asked == keys(24, 23, 0, 1)
    some.answered(asked, keys(0, 1))
    assert some.turn(4, again=True) == keys(22, 21, 2, 3)
    assert [len(some), keys(24)[0] in some, some.covers(keys(24, 0))] == [9, False, True]


def test_what_changes_again_is_new_again():
    some = Unconfirmed()
    some.add(keys(1, 2))
    some.answered(keys(1, 2), keys(1, 2))
    some.add(keys(1))
    assert (some.has_new, some.turn(9, again=False), len(some)) == (True, keys(1), 2)
    some.answered(keys(1, 2), [])
    assert len(some) == 0
