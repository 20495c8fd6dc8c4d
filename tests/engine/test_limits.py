"""Both engines judge the same sources alike, as long as no table is full: those forget by addresses nobody can choose."""

import ipaddress
from itertools import cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.native import NOT_BUILT, limits_with
from nts_core.ratelimit import AccessList, Admission, Cap, RatePolicy, Slots

nts_engine = pytest.importorskip("nts_engine", reason=NOT_BUILT)

SECOND = 1_000_000_000
START = 10**15
# Few, so that they meet: neighbours in IPv4, and in a /64, a /48 and beyond.
ADDRESSES = [
    ipaddress.ip_address(text).packed
    for text in (
        *("192.0.2.1", "192.0.2.2", "192.0.2.129", "198.51.100.1", "0.0.0.0", "255.255.255.255"),
        *(
            "2001:db8::1",
            "2001:db8::2",
            "2001:db8:0:1::1",
            "2001:db8:0:2::1",
            "2001:db8:1::1",
            "c000:201::",
            "::",
        ),
        "::ffff:192.0.2.1",
    )
]
NETWORKS = [
    ipaddress.ip_network(text)
    for text in (
        *("0.0.0.0/0", "192.0.0.0/8", "192.0.2.0/24", "192.0.2.128/25", "192.0.2.1/32", "198.51.100.0/24"),
        *("::/0", "2001:db8::/32", "2001:db8::/48", "2001:db8::/64", "2001:db8:0:1::/64", "2001:db8::1/128"),
        "::ffff:0:0/96",
    )
]
addresses = st.sampled_from(ADDRESSES)
# From none to years between two datagrams; the clock never goes back.
pauses = st.one_of(
    st.just(0),
    st.integers(0, 3 * SECOND),
    st.sampled_from((31, 32, 33, 10**8)).map(lambda each: each * SECOND),
)
networks = st.lists(st.sampled_from(NETWORKS), max_size=4, unique=True)


@st.composite
def limits(draw):
    """Arguments of `nts_engine.Limits` that limit something."""
    found = {
        "allow": list(map(str, draw(networks))),
        "deny": list(map(str, draw(networks))),
        "kiss_denied": draw(st.booleans()),
        "ntp_interval_ns": draw(
            st.none() | st.sampled_from((1, 255, 256, SECOND // 10, SECOND, 16 * SECOND))
        ),
        "ntp_burst": draw(st.integers(1, 9)),
        "ntp_leak": draw(st.integers(1, 5)),
        "ntp_kod": draw(st.integers(0, 3)),
        "ntp_pps": draw(st.none() | st.sampled_from((0.01, 1.0, 3.0, 12.5, 1000.0, 3e9))),
        "kiss_above": draw(st.booleans()),
    }
    found["deny"] = [text for text in found["deny"] if text not in found["allow"]]
    if not (found["allow"] or found["deny"] or found["ntp_interval_ns"] or found["ntp_pps"]):
        found["ntp_interval_ns"] = SECOND
    return found


def in_python(given_limits, random):
    """The Python engine's rule, which draws the words of `random` one after the other."""
    words = cycle([random[place : place + 4] for place in range(0, len(random) // 4 * 4, 4)])

    def draw(length):
        # Longer ones are salts of tables.
        return next(words) if length == 4 else bytes(length)

    allow, deny = (list(map(ipaddress.ip_network, given_limits[name])) for name in ("allow", "deny"))
    interval, pps = given_limits["ntp_interval_ns"], given_limits["ntp_pps"]
    rate = (given_limits["ntp_burst"], given_limits["ntp_leak"], given_limits["ntp_kod"])
    return Admission(
        draw,
        access=AccessList(allow, deny) if allow or deny else None,
        rate=None if interval is None else RatePolicy(interval, *rate),
        cap=None if pps is None else Cap(pps),
        kisses_above=Cap(pps) if pps is not None and given_limits["kiss_above"] else None,
        kiss_denied=given_limits["kiss_denied"],
    )


def check(given_limits, random, visits):
    both = in_python(given_limits, random), nts_engine.Admission(limits_with(**given_limits), random)
    now, found = START, []
    for address, pause, count in visits:
        now += pause
        for _ in range(count):
            expected, verdict = (each.judge(address, now) for each in both)
            assert verdict == expected, (address, now)
            found.append(verdict)
    assert both[1].forgotten == both[0].forgotten == 0
    return found


visits = st.lists(st.tuples(addresses, pauses, st.integers(1, 12)), max_size=40)


@settings(deadline=None, max_examples=200)
@given(limits(), st.binary(min_size=4, max_size=40), visits)
def test_sources_are_judged_alike(given_limits, random, seen):
    check(given_limits, random, seen)


@pytest.mark.long
@settings(deadline=None, max_examples=4000)
@given(limits(), st.binary(min_size=4, max_size=40), visits)
def test_many_sources_are_judged_alike(given_limits, random, seen):
    check(given_limits, random, seen)


def test_every_verdict_is_among_them():
    given_limits = {
        "allow": [],
        "deny": ["198.51.100.0/24"],
        "kiss_denied": True,
        "ntp_interval_ns": SECOND,
        "ntp_burst": 2,
        "ntp_leak": 4,
        "ntp_kod": 2,
        "ntp_pps": 50.0,
        "kiss_above": True,
    }
    random = bytes(range(64))
    found = check(given_limits, random, [(address, 0, 9) for address in ADDRESSES])
    assert set(found) == {"answer", "rate-limited", "over-cap", "denied", "kiss-rate", "kiss-deny"}


@pytest.mark.parametrize(("interval_ns", "answered"), [(SECOND, 512), (255, 510), (10**7 + 1, 512)])
def test_all_of_a_48_together_are_limited_alike(interval_ns, answered):
    """It takes more /64 than the strategy has."""
    given_limits = {
        "allow": [],
        "deny": [],
        "kiss_denied": False,
        "ntp_interval_ns": interval_ns,
        "ntp_burst": 2,
        "ntp_leak": 1 << 31,
        "ntp_kod": 0,
        "ntp_pps": None,
        "kiss_above": False,
    }
    subnets = [bytes.fromhex("20010db80000") + subnet.to_bytes(2) + bytes(8) for subnet in range(600)]
    seen = [(subnet, 0, 1) for subnet in subnets]
    seen += [(subnet, interval_ns // 7, 1) for subnet in subnets[::5]]
    found = check(given_limits, b"\0\0\0\1", seen)
    assert found[:600] == ["answer"] * answered + ["rate-limited"] * (600 - answered)


# More limits than the strategy has: what a configuration may say at its ends


@pytest.mark.parametrize("pps", [1e-9, 1e-3, 1 / 3, 7.7, 999_999_999.0, 2e9, 1e300])
@pytest.mark.parametrize("burst", [1, 2**31])
def test_numbers_at_their_ends(pps, burst):
    given_limits = {
        "allow": [],
        "deny": [],
        "kiss_denied": False,
        "ntp_interval_ns": 86_400 * SECOND,
        "ntp_burst": burst,
        "ntp_leak": 2**32 - 1,
        "ntp_kod": 2**32 - 1,
        "ntp_pps": pps,
        "kiss_above": True,
    }
    check(given_limits, b"\xff" * 8 + bytes(4), [(address, 7, 5) for address in ADDRESSES * 2])


# Slots


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 40),
    st.integers(0, 12),
    st.integers(0, 20),
    st.lists(st.tuples(addresses, st.booleans()), max_size=120),
)
def test_slots_are_given_alike(total, per_address, per_prefix, steps):
    shares = {"per_address": per_address, "per_prefix": per_prefix}
    expected, found = Slots(total, **shares), nts_engine.Slots(total, **shares)
    held = []
    for address, takes in steps:
        if takes or address not in held:
            refused = expected.take(address)
            assert found.take(address) == refused
            held += [] if refused else [address]
        else:
            held.remove(address)
            expected.give_back(address)
            found.give_back(address)


# What cannot be


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"allow": ["192.0.2.1/24"]}, "192.0.2.1/24"),
        ({"deny": ["name"]}, "name"),
        ({"allow": ["::/0"], "deny": ["::/0"]}, "both allowed and denied"),
    ],
)
def test_limits_that_cannot_be(arguments, words):
    with pytest.raises(ValueError, match=words):
        limits_with(**arguments)


def test_what_cannot_be_judged():
    judge = nts_engine.Admission(limits_with(ntp_pps=1.0), bytes(4)).judge
    for address in (b"", bytes(5), bytes(17)):
        with pytest.raises(ValueError, match="4 or 16 octets"):
            judge(address, START)
    with pytest.raises(ValueError, match="four random octets"):
        nts_engine.Admission(limits_with(ntp_pps=1.0), bytes(3))
    with pytest.raises(ValueError, match="limit nothing"):
        nts_engine.Admission(limits_with(), bytes(4))
