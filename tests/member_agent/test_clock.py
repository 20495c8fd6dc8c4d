"""What the agent says of its clock, for everything that the kernel and a time daemon may report."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from lab.processes import free_port
from member_agent.clock import Clock
from member_agent.sockets import Endpoint
from member_agent.tracking import AUTO, ClockSource, Daemon, Tracking
from nts_core import ntptime
from nts_core.kernel import KernelClock
from nts_core.packet import Leap

SECOND = 1_000_000_000
NOW = 1_800_000_000 * SECOND
UNKNOWN = KernelClock(synchronised=False, leap=Leap.UNSYNCHRONISED, max_error_ns=0)
GOOD = KernelClock(synchronised=True, leap=Leap.NONE, max_error_ns=20_000_000)
MIDNIGHT = int(datetime(2027, 1, 1, tzinfo=UTC).timestamp()) * SECOND
TRACKING = Tracking(
    daemon=Daemon.CHRONYD,
    asked_at=1000 * SECOND,
    leap=Leap.NONE,
    stratum=3,
    reference_id=bytes((192, 0, 2, 7)),
    reference_ns=NOW - 64 * SECOND,
    root_delay_ns=12_000_000,
    root_dispersion_ns=2_000_000,
    drift_ppb=20_000,
)
UNREADY = replace(TRACKING, leap=Leap.UNSYNCHRONISED, stratum=0, reference_id=bytes(4), reference_ns=None)


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


# With a time daemon


def tracked(tracking=TRACKING, *, age=0, **options):
    """A clock whose daemon gave this answer `age` seconds ago."""
    options = {"source": AUTO, "kernel": Kernel(UNKNOWN), **options}
    clock = Clock(**options, boottime=lambda: TRACKING.asked_at + round(age * SECOND))
    clock.hear(tracking)
    return clock


def test_what_the_daemon_says_is_served():
    said = tracked().state(NOW)
    assert (said.leap, said.stratum, said.reference_id) == (Leap.NONE, 3, bytes((192, 0, 2, 7)))
    assert said.reference == ntptime.timestamp(NOW - 64 * SECOND)
    assert said.root_delay == ntptime.short(12_000_000)
    assert said.root_dispersion == ntptime.short(2_000_000)


@pytest.mark.parametrize("local_stratum", [None, 1, 15])
def test_a_daemon_that_is_synchronised_comes_before_the_members_word(local_stratum):
    """As in chrony: a local stratum never hides a source that is there."""
    assert tracked(local_stratum=local_stratum).state(NOW).stratum == 3


def test_a_daemon_that_is_not_synchronised():
    said = tracked(UNREADY).state(NOW)
    assert (said.leap, said.stratum, said.reference) == (Leap.UNSYNCHRONISED, 16, 0)
    assert "chronyd is not synchronised, nobody vouches" in tracked(UNREADY).describe()
    vouched = tracked(UNREADY, local_stratum=5)
    assert (vouched.state(NOW).leap, vouched.state(NOW).stratum) == (Leap.NONE, 5)
    assert vouched.describe() == "vouched for as stratum 5: chronyd is not synchronised"


@given(st.floats(0, 299))
def test_a_silent_daemons_word_grows_less_exact(age):
    young, old = tracked().state(NOW), tracked(age=age).state(NOW)
    assert replace(old, root_dispersion=0) == replace(young, root_dispersion=0)
    assert old.root_dispersion == ntptime.short(TRACKING.dispersion_ns(round(age * SECOND)))


def test_a_daemon_that_is_silent_for_too_long_is_believed_no_more():
    assert tracked(age=300).state(NOW).stratum == 3
    clock = tracked(age=301)
    clock.hear(None, "chronyd: 506 Cannot talk to daemon")
    assert clock.state(NOW).leap is Leap.UNSYNCHRONISED
    assert "chronyd has not answered for 301 s (chronyd: 506 Cannot talk to daemon)" in clock.describe()


def test_a_clock_that_may_be_16_seconds_off_is_not_synchronised():
    """MAXDISP of RFC 5905; chronyd with -x, or one that slews a great correction."""
    nearly = replace(TRACKING, root_dispersion_ns=16 * SECOND - 1)
    assert tracked(nearly).state(NOW).stratum == 3
    assert tracked(nearly, age=1).state(NOW).leap is Leap.UNSYNCHRONISED
    assert "may be 16 s off" in tracked(nearly, age=1).describe()


@pytest.mark.parametrize(("leap", "words"), [(Leap.INSERT, "inserted"), (Leap.DELETE, "deleted")])
def test_a_leap_second_is_announced_until_its_midnight(leap, words):
    warned = replace(TRACKING, leap=leap)
    assert tracked(warned, age=10).state(MIDNIGHT - 1).leap is leap
    assert tracked(warned, age=10).state(MIDNIGHT + SECOND).leap is Leap.NONE
    assert words in tracked(warned).describe()


def test_news_count_at_once():
    clock = tracked()
    assert clock.state(NOW).stratum == 3
    clock.hear(replace(TRACKING, stratum=4))
    assert clock.state(NOW).stratum == 4
    clock.hear(UNREADY)
    assert clock.state(NOW).stratum == 16


@pytest.mark.parametrize("offset", [0, 3600 * SECOND, -3600 * SECOND])
def test_the_reference_moves_with_a_test_offset_and_is_never_in_the_future(offset):
    clock = tracked(offset_ns=offset)
    assert clock.state(NOW + offset).reference == ntptime.timestamp(NOW + offset - 64 * SECOND)
    early = tracked(replace(TRACKING, reference_ns=NOW + SECOND))
    assert early.state(NOW).reference == ntptime.timestamp(NOW)
    assert tracked(replace(TRACKING, reference_ns=None)).state(NOW).reference == 0


@pytest.mark.parametrize("smear", [bytes((127, 127, 1, 255)), bytes((254, 63, 255, 255))])
def test_smearing_is_never_silent(smear):
    clock = tracked(replace(TRACKING, smear_id=smear))
    assert clock.state(NOW).reference_id == smear
    assert clock.is_smeared
    assert f"SMEARED by its source ({'.'.join(map(str, smear))})" in clock.describe()
    assert not tracked().is_smeared
    old = tracked(replace(TRACKING, smear_id=smear), age=301)
    assert not old.is_smeared
    assert old.state(NOW).reference_id == bytes(4)


def test_a_status_says_what_is_served():
    said = tracked(replace(TRACKING, remark="REMARK")).describe()
    for part in (
        "stratum 3 by chronyd",
        "reference 192.0.2.7",
        "delay 12 ms",
        "dispersion 2.01 ms",
        "REMARK",
    ):
        assert part in said
    primary = replace(TRACKING, stratum=1, reference_id=b"PPS\0")
    assert "reference PPS," in tracked(primary).describe()
    assert "reference 80.80.83.0," in tracked(replace(primary, stratum=2)).describe()


def test_before_the_first_question_nothing_is_claimed():
    clock = Clock(source=AUTO)
    assert clock.state(NOW).leap is Leap.UNSYNCHRONISED
    assert "no time daemon was asked yet" in clock.describe()


async def test_a_change_is_logged_once(tmp_path, monkeypatch):
    """A search that finds nobody is one line, however often it is repeated."""
    monkeypatch.setenv("PATH", str(tmp_path))
    source = ClockSource((Daemon.CHRONYD, Daemon.NTPD), ntpd=Endpoint("127.0.0.1", free_port()))
    clock = Clock(source=source, boottime=lambda: TRACKING.asked_at)
    with capture_logs() as logs:
        assert [await clock.refresh() for _ in range(5)] == [True, False, False, False, False]
        (line,) = logs
        assert (line["event"], line["log_level"]) == ("clock", "warning")
        assert "no chronyc on the PATH" in line["said"]
        clock.hear(TRACKING)
        assert [await clock.refresh() for _ in range(5)] == [True, False, False, False, False]
        assert len(logs) == 2
    assert "stratum 3 by chronyd" in logs[1]["said"]
    assert "as it was before: chronyd: no chronyc on the PATH" in clock.describe()
