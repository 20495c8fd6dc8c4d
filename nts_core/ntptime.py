"""NTP's time formats (RFC 5905 section 6) and the two integers they stand for.

Inside the core a time is an integer of nanoseconds since 1970 (Unix, UTC); on the wire it is 32 bits of seconds
since 1900 and 32 bits of fraction. The wire form has eras of 136 years: reading one needs a time nearby.
"""

UNIX_EPOCH = 2_208_988_800  # seconds from 1900 to 1970 (RFC 5905 figure 4)
NANOSECONDS = 1_000_000_000
_ERA = 1 << 64


def timestamp(unix_ns: int) -> int:
    """The 64-bit timestamp of a time, rounded down to its 233 ps steps."""
    return ((unix_ns << 32) // NANOSECONDS + (UNIX_EPOCH << 32)) % _ERA


def unix_ns(stamp: int, near: int) -> int:
    """The time of a timestamp in the era that puts it within 68 years of the time `near`."""
    return near + difference(stamp, timestamp(near))


def difference(later: int, earlier: int) -> int:
    """`later - earlier` in nanoseconds for two timestamps less than 68 years apart, across eras."""
    steps = (later - earlier) % _ERA
    if steps >= _ERA // 2:
        steps -= _ERA
    return (steps * NANOSECONDS + (1 << 31)) >> 32


def short(nanoseconds: int) -> int:
    """The 32-bit short format (16.16 seconds), rounded up, since it states error bounds; saturates."""
    return min(-(-(nanoseconds << 16) // NANOSECONDS), 0xFFFF_FFFF)


def short_ns(value: int) -> int:
    """Nanoseconds of a short-format value."""
    return (value * NANOSECONDS) >> 16
