"""What the agent says of its clock, for every state that the kernel may report."""

import pytest

from member_agent.clock import Clock, KernelClock, read_kernel
from nts_core import ntptime
from nts_core.packet import Leap

SECOND = 1_000_000_000
NOW = 1_800_000_000 * SECOND
UNKNOWN = KernelClock(synchronised=False, leap=Leap.UNSYNCHRONISED, max_error_ns=0)
GOOD = KernelClock(synchronised=True, leap=Leap.NONE, max_error_ns=20_000_000)


class Kernel:
    """A kernel that says what it is told to say, and counts how often it was asked."""

    def __init__(self, *states):
        self.states = list(states)
        self.asked = 0

    def __call__(self):
        self.asked += 1
        return self.states[0] if len(self.states) == 1 else self.states.pop(0)


def state(kernel, **options):
    return Clock(**options, kernel=Kernel(kernel)).state(NOW)


@pytest.mark.parametrize("kernel", [UNKNOWN, GOOD])
def test_nobody_vouches(kernel):
    """A disciplined kernel does not tell its stratum, so without an option nothing is claimed."""
    said = state(kernel)
    assert (said.leap, said.stratum, said.reference) == (Leap.UNSYNCHRONISED, 16, 0)


@pytest.mark.parametrize(
    ("stratum", "reference_id"), [(1, b"LOCL"), (2, b"\x7f\x7f\1\1"), (15, b"\x7f\x7f\1\1")]
)
def test_vouched_for(stratum, reference_id):
    said = state(UNKNOWN, local_stratum=stratum)
    assert (said.leap, said.stratum, said.reference_id) == (Leap.NONE, stratum, reference_id)
    assert said.reference == ntptime.timestamp(NOW)
    assert ntptime.short_ns(said.root_dispersion) >= 1_000_000


@pytest.mark.parametrize("leap", [Leap.NONE, Leap.INSERT, Leap.DELETE])
def test_the_kernels_error_and_leap_second_are_passed_on(leap):
    kernel = KernelClock(synchronised=True, leap=leap, max_error_ns=20_000_000)
    said = state(kernel, local_stratum=2)
    assert said.leap is leap
    assert 20_000_000 <= ntptime.short_ns(said.root_dispersion) < 20_050_000


def test_an_error_without_bound_saturates():
    kernel = KernelClock(synchronised=True, leap=Leap.NONE, max_error_ns=10**15)
    assert state(kernel, local_stratum=2).root_dispersion == 0xFFFF_FFFF


def test_the_kernel_is_asked_once_a_second():
    kernel = Kernel(GOOD)
    clock = Clock(local_stratum=2, kernel=kernel)
    clock.state(NOW)
    asked = kernel.asked
    for moment in range(100):
        clock.state(NOW + moment * 9_000_000)
    assert kernel.asked == asked
    clock.state(NOW + SECOND)
    assert kernel.asked == asked + 1


def test_a_clock_that_was_set_back_is_read_anew():
    kernel = Kernel(GOOD)
    clock = Clock(local_stratum=2, kernel=kernel)
    clock.state(NOW)
    asked = kernel.asked
    said = clock.state(NOW - 3600 * SECOND)
    assert kernel.asked == asked + 1
    assert said.reference == ntptime.timestamp(NOW - 3600 * SECOND)


def test_a_change_of_the_kernel_is_told():
    insert = KernelClock(synchronised=True, leap=Leap.INSERT, max_error_ns=1)
    clock = Clock(local_stratum=2, kernel=Kernel(GOOD, GOOD, insert))
    assert clock.state(NOW).leap is Leap.NONE
    assert clock.state(NOW + 2 * SECOND).leap is Leap.INSERT


@pytest.mark.parametrize("offset", [0, 250_000_000, -3 * SECOND])
def test_the_test_offset_is_added_to_the_time_served(offset):
    plain, moved = Clock(1), Clock(1, offset)
    before = plain.now_ns()
    served = moved.now_ns()
    assert before <= served - offset <= plain.now_ns()


def test_descriptions():
    assert "nobody vouches" in Clock(kernel=Kernel(UNKNOWN)).describe()
    assert "not synchronised" in Clock(kernel=Kernel(UNKNOWN)).describe()
    vouched = Clock(3, kernel=Kernel(GOOD)).describe()
    assert "stratum 3" in vouched
    assert "TEST OFFSET" not in vouched
    assert "TEST OFFSET of -0.25 s" in Clock(3, -250_000_000, kernel=Kernel(GOOD)).describe()


def test_this_hosts_kernel_answers():
    found = read_kernel()
    assert found.synchronised == (found.leap is not Leap.UNSYNCHRONISED)
    assert found.max_error_ns >= 0
