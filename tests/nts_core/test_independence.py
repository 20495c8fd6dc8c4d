"""Which servers are used together."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nts_core.independence import MAX_CANDIDATES, Bond, Candidate, GivenUp, choose, given_up, prefix_of
from nts_core.metadata import Metadata


def candidates(*rows):
    """In the order of RFC 2782: operator, networks, countries, then maybe addresses; no operator: nothing is known."""
    found = []
    for number, (operator, networks, countries, *addresses) in enumerate(rows):
        known = None if operator is None else Metadata(operator * 10, networks, countries)
        found.append(Candidate(f"s{number}", metadata=known, addresses=tuple(addresses)))
    return found


def names(chosen):
    return [candidate.name for candidate in chosen]


def test_of_which_nothing_is_known_is_taken_in_the_order_of_the_answer():
    waiting = candidates(*[(None, (), ())] * 5)
    assert names(choose(waiting, 3)) == ["s0", "s1", "s2"]
    assert names(choose(waiting, 9)) == ["s0", "s1", "s2", "s3", "s4"]
    assert choose([], 4) == []
    assert choose(waiting, 0) == []


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        (("b", (), ("DE",)), ("c", (), ("FR",))),
        (("b", (), (), "192.0.2.9"), ("c", (), ("DE",), "198.51.100.1")),
        (("b", (), (), "2001:db8:0:7::1"), ("c", (), ("DE",), "2001:db8:1::1")),
        (("b", (1,), ()), ("c", (), ("DE",), "192.0.2.9")),
        (("a", (), ()), ("b", (1,), ("DE",), "192.0.2.9", "2001:db8::9")),
    ],
)
def test_the_worse_a_bond_the_later_it_is_taken(worse, better):
    """A better bond never outweighs a worse one."""
    used = candidates(("a", (1, 2), ("DE", "FI"), "192.0.2.1", "2001:db8::1"))
    waiting = candidates((None, (), ()), worse, better)[1:]
    assert names(choose(waiting, 1, beside=used)) == ["s2"]
    assert names(choose(waiting, 2, beside=used)) == ["s1", "s2"]


def test_a_server_that_is_tied_to_many_does_not_spoil_the_choice():
    """Going from one to the next, s0 would come first, and then two of one operator."""
    waiting = candidates(
        ("a", (1, 2, 3), ()),
        ("a", (4,), ()),
        ("b", (1,), ()),
        ("c", (2,), ()),
        ("d", (3,), ()),
        ("b", (4,), ()),
    )
    assert names(choose(waiting, 4)) == ["s1", "s2", "s3", "s4"]


def test_independence_is_no_reason_to_leave_the_order_of_priorities():
    first, second = candidates(("a", (), ()), ("a", (), ()))
    spare = Candidate("spare", priority=1, metadata=Metadata("b" * 10))
    assert names(choose([first, second, spare], 2)) == ["s0", "s1"]
    assert names(choose([first, second, spare], 3)) == ["s0", "s1", "spare"]
    other = Candidate("other", priority=1, metadata=Metadata("a" * 10))
    assert names(choose([first, other, spare], 2)) == ["s0", "spare"], (
        "of the next level, the independent one"
    )


def test_no_answer_makes_more_work_than_that_of_sixteen():
    waiting = candidates(*[("a", (1,), ("DE",), "192.0.2.1")] * 200)
    assert len(choose(waiting, 8)) == 8
    assert len(choose(waiting, 100)) == MAX_CANDIDATES


def test_what_was_given_up_is_told_for_each_pair():
    one, other, third = candidates(
        ("a", (1,), ("DE",), "192.0.2.1"), ("a", (2,), ("DE",), "192.0.2.200"), ("b", (2,), (), "192.0.3.1")
    )
    assert given_up([other, one, third]) == (
        GivenUp(("s0", "s1"), (Bond.OPERATOR, Bond.PREFIX, Bond.COUNTRY)),
        GivenUp(("s1", "s2"), (Bond.NETWORK,)),
    )
    assert str(given_up([one, other])[0]) == "s0 and s1 have the same operator, address prefix, country"
    assert given_up([one, third]) == ()


def test_prefixes():
    assert prefix_of("192.0.2.77") == "192.0.2.0/24"
    assert prefix_of("2001:4860:4860::8888") == "2001:4860:4860::/48"
    assert prefix_of("2001:db8:aaaa:bbbb::1") == "2001:db8:aaaa::/48"


ROWS = st.tuples(
    st.none() | st.sampled_from("abc"),
    st.lists(st.integers(1, 3), max_size=2, unique=True).map(tuple),
    st.lists(st.sampled_from(("DE", "FR")), max_size=1).map(tuple),
    st.sampled_from(("192.0.2.1", "192.0.2.2", "198.51.100.1", "2001:db8::1")),
)


def cost(used):
    """How many pairs of those in use share each of the four, the worst first."""
    bonds = [bond for one, other in combinations(used, 2) for bond in one.bonds(other)]
    return [bonds.count(bond) for bond in Bond]


@given(st.lists(ROWS, max_size=8), st.integers(1, 5), st.lists(ROWS, max_size=2))
def test_no_other_choice_is_more_independent(rows, count, used):
    waiting = candidates(*rows)
    beside = [Candidate(f"u{index}", **vars_of(row)) for index, row in enumerate(candidates(*used))]
    chosen = choose(waiting, count, beside=beside)
    assert len(chosen) == min(count, len(rows))
    assert chosen == [candidate for candidate in waiting if candidate in chosen], "in the answer's order"
    best = min(cost([*beside, *others]) for others in combinations(waiting, len(chosen)))
    assert cost([*beside, *chosen]) == best


def vars_of(candidate):
    return {"metadata": candidate.metadata, "addresses": candidate.addresses}
