"""NTP time formats (RFC 5905 section 6), in the first era and after 2036."""

from hypothesis import given
from hypothesis import strategies as st

from nts_core import ntptime

SECOND = 1_000_000_000
YEAR = 31_556_952 * SECOND
# 2036-02-07T06:28:16Z, when the 32 bits of seconds since 1900 begin anew (RFC 5905 figure 4).
ERA_1 = 2_085_978_496 * SECOND
times = st.integers(0, 200 * YEAR)


def test_known_timestamps():
    assert ntptime.timestamp(0) == 2_208_988_800 << 32
    assert ntptime.timestamp(SECOND // 2) == (2_208_988_800 << 32) + (1 << 31)
    assert ntptime.timestamp(ERA_1) == 0
    assert ntptime.timestamp(ERA_1 - SECOND) == 0xFFFF_FFFF << 32


@given(times, st.integers(-68 * YEAR, 68 * YEAR))
def test_a_time_comes_back_exactly_when_read_within_68_years(unix_ns, away):
    assert ntptime.unix_ns(ntptime.timestamp(unix_ns), unix_ns + away) == unix_ns


@given(times, st.integers(-68 * YEAR, 68 * YEAR))
def test_differences_are_exact_across_eras(earlier, apart):
    found = ntptime.difference(ntptime.timestamp(earlier + apart), ntptime.timestamp(earlier))
    assert found == apart


@given(st.integers(-10 * SECOND, 10 * SECOND), st.integers(-10 * SECOND, 10 * SECOND))
def test_the_turn_of_2036(before, after):
    found = ntptime.difference(ntptime.timestamp(ERA_1 + after), ntptime.timestamp(ERA_1 + before))
    assert found == after - before
    assert ntptime.unix_ns(ntptime.timestamp(ERA_1 + after), ERA_1 + before) == ERA_1 + after


@given(times)
def test_a_timestamp_has_64_bits(unix_ns):
    assert 0 <= ntptime.timestamp(unix_ns) < 1 << 64


@given(st.integers(0, 65_000 * SECOND))
def test_the_short_format_never_understates(nanoseconds):
    read = ntptime.short_ns(ntptime.short(nanoseconds))
    assert nanoseconds <= read <= nanoseconds + 15_259


def test_the_short_format_saturates():
    assert ntptime.short(65_536 * SECOND) == ntptime.short(10**18) == 0xFFFF_FFFF
    assert ntptime.short(0) == 0
    assert ntptime.short(1) == 1
