"""What is made of what was seen of a pool, where it takes no network to see it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nts_core.client import Failure
from nts_core.diagnosis import (
    MembersSeen,
    Outcome,
    Part,
    ResolverSeen,
    Step,
    judge_members,
    judge_resolver,
    operators,
    summarise,
)
from nts_core.independence import Candidate
from nts_core.metadata import Metadata
from nts_core.resolve import ResolveError
from nts_core.verdict import Verdict

POOL = "pool.example"


def candidate(name, operator=None, priority=0):
    whose = None if operator is None else Metadata(operator * 13)
    return Candidate(f"{name}.servers.{POOL}", priority=priority, addresses=("192.0.2.1",), metadata=whose)


FOUR = [candidate(name, name) for name in "abcd"]


def codes(seen):
    return {step.part: step.code for step in judge_members(POOL, seen, 4)}


def test_members_of_which_nothing_is_to_be_said():
    assert set(codes(MembersSeen(FOUR, ttl=300)).values()) == {""}


def test_what_a_pools_zone_may_lack():
    outside = Candidate("time.example.net", addresses=("2001:db8::1",))
    found = codes(MembersSeen([*FOUR, outside], {"x.servers.pool.example": "x is an alias"}, ttl=86_400))
    assert found == {
        Part.SRV: "",
        Part.TARGETS: "targets-outside",
        Part.ADDRESSES: "addresses",
        Part.METADATA: "no-metadata",
        Part.INDEPENDENCE: "",
        Part.TTL: "long-ttl",
    }


def test_a_region_is_told_by_where_its_servers_are():
    steps = judge_members(f"europe.{POOL}", MembersSeen(FOUR, ttl=300), 4)
    (step,) = [step for step in steps if step.part is Part.TARGETS]
    assert (step.code, step.found) == ("", f"all below servers.{POOL}: a region of the pool {POOL}")


def test_a_list_of_which_no_server_can_be_used_is_a_fault_of_dns():
    steps = judge_members(POOL, MembersSeen(unusable={"x.servers.pool.example": "x is an alias"}), 4)
    (step,) = [step for step in steps if step.verdict is Verdict.FAIL]
    assert (step.part, step.failure) == (Part.ADDRESSES, Failure.DNS)


def test_priorities_may_lead_to_one_operator_though_there_are_others():
    first = [candidate(f"a{number}", "a") for number in range(4)]
    others = [candidate(name, name, priority=1) for name in "bcd"]
    assert codes(MembersSeen([*first, *others]))[Part.INDEPENDENCE] == "few-operators"


def test_of_whom_nothing_is_known_is_one_of_their_own():
    assert operators([*FOUR, candidate("e"), candidate("f"), candidate("g", "a")]) == 6


@pytest.mark.parametrize("code", ["bogus", "expired", "unsigned", "not-under-anchor", "cname"])
def test_what_is_wrong_with_a_chain_is_no_fault_of_who_passes_it_on(code):
    error = ResolveError(code, "message", "remedy")
    verdicts = [step.verdict for step in judge_resolver(ResolverSeen("it", None, error))]
    assert verdicts == [Verdict.OK, Verdict.OK, Verdict.FAIL, Verdict.OK]


STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from(Part),
        st.just("it"),
        st.sampled_from(Verdict),
        st.just("found"),
        st.just("remedy"),
        st.sampled_from(["one", "two"]),
        st.sampled_from(Failure),
    ),
    max_size=20,
)


@given(STEPS, st.lists(st.sampled_from(FOUR), unique_by=lambda each: each.name))
def test_every_summary_says_what_to_mend_if_there_is_anything(steps, working):
    summary = summarise(steps, working, 4)
    faults = [step for step in steps if step.verdict is Verdict.FAIL]
    assert (summary.outcome is Outcome.USABLE) == (len(working) == 4)
    assert (summary.outcome is Outcome.UNUSABLE) == (not working)
    if faults:
        assert summary.first in faults
    if summary.outcome is Outcome.UNUSABLE and faults:
        assert summary.error.code == summary.first.failure
    if summary.outcome is Outcome.FEW_SOURCES:
        assert summary.error.code == Failure.TOO_FEW_SOURCES
    assert str(summary)
