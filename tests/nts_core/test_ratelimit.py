"""Token buckets, access lists and slots: the rules of `nts_core.ratelimit`, against plain models of them."""

import ipaddress
import secrets
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nts_core.ratelimit import (
    WIDE_FACTOR,
    AccessList,
    Admission,
    Cap,
    NoSlot,
    RateLimiter,
    RatePolicy,
    Slots,
    Verdict,
)

SECOND = 1_000_000_000
NOW = 10**15


def address(text):
    return ipaddress.ip_address(text).packed


def random_address(length=4):
    return secrets.token_bytes(length)


V4, V6 = address("192.0.2.1"), address("2001:db8:0:1::1")


def limiter(interval=SECOND, burst=4, entries=1024):
    return RateLimiter(interval, burst, secrets.token_bytes, entries=entries)


def taken(limits, who, count, now=NOW):
    return sum(limits.take(who, now) for _ in range(count))


# Token buckets


@pytest.mark.parametrize("who", [V4, V6])
def test_a_burst_is_answered_then_one_request_an_interval(who):
    limits = limiter(SECOND, 4)
    assert taken(limits, who, 10) == 4
    assert taken(limits, who, 10, NOW + SECOND - 1) == 0
    assert taken(limits, who, 10, NOW + SECOND) == 1
    assert taken(limits, who, 10, NOW + 3 * SECOND) == 2
    assert taken(limits, who, 10, NOW + 3600 * SECOND) == 4


@given(
    st.lists(st.tuples(st.integers(0, 3 * SECOND), st.sampled_from((V4, address("192.0.2.2")))), max_size=80),
    st.integers(1, 5),
)
def test_it_is_a_token_bucket(steps, burst):
    """The model counts tokens in nanoseconds; one address is no matter to the other."""
    limits = limiter(SECOND, burst)
    tokens = defaultdict(lambda: burst * SECOND)
    seen = {}
    now = NOW
    for step, who in steps:
        now += step
        tokens[who] = min(burst * SECOND, tokens[who] + now - seen.get(who, now))
        seen[who] = now
        has_one = tokens[who] >= SECOND
        assert limits.take(who, now) == has_one
        tokens[who] -= SECOND * has_one


def test_a_refused_request_runs_up_no_debt():
    """Or a forger could silence an address for longer than it goes on."""
    limits = limiter(SECOND, 4)
    assert taken(limits, V4, 100_000) == 4
    assert taken(limits, V4, 10, NOW + 4 * SECOND) == 4


def test_the_addresses_of_a_64_share_a_bucket():
    limits = limiter(SECOND, 4)
    assert sum(limits.take(V6[:8] + random_address(8), NOW) for _ in range(100)) == 4


def test_a_48_has_a_wider_budget_of_its_own():
    limits = limiter(SECOND, 4, entries=65_536)
    subnets = [V6[:6] + number.to_bytes(2, "big") + bytes(8) for number in range(4 * WIDE_FACTOR)]
    assert sum(limits.take(subnet, NOW) for subnet in subnets for _ in range(2)) == 4 * WIDE_FACTOR
    later = NOW + SECOND
    assert sum(limits.take(subnet, later) for subnet in subnets) == pytest.approx(WIDE_FACTOR, abs=1)
    assert limits.take(address("2001:db8:1::1"), NOW), "the neighbour has its own"


def test_a_64_at_its_limit_takes_nothing_from_its_48():
    limits = limiter(SECOND, 4)
    assert taken(limits, V6, 100 * WIDE_FACTOR) == 4
    neighbours = [V6[:6] + number.to_bytes(2, "big") + bytes(8) for number in range(2, 200)]
    assert all(limits.take(neighbour, NOW) for neighbour in neighbours)


def test_families_do_not_mix():
    limits = limiter(SECOND, 1)
    assert limits.take(V4, NOW)
    assert limits.take(V4 + bytes(12), NOW)


def test_the_table_is_bounded_whatever_comes():
    limits = limiter(SECOND, 4, entries=256)
    for step in range(5000):
        limits.take(random_address(16 if step % 2 else 4), NOW + step)
    assert len(limits) <= 256
    assert limits.forgotten > 0


def test_a_flood_of_forged_addresses_never_takes_from_others():
    limits = limiter(SECOND, 4, entries=64)
    for step in range(2000):
        limits.take(random_address(), NOW + step)
        assert taken(limits, (NOW + step).to_bytes(4 + 12, "big")[-4:], 1, NOW + step)


def test_who_is_at_the_limit_stays_there_through_a_flood():
    """Sixteen times as many forged addresses as there is room for, once each: none pushes a full debtor out."""
    limits = limiter(SECOND, 8, entries=256)
    assert taken(limits, V4, 20) == 8
    for step in range(16 * 256):
        limits.take(random_address(), NOW + step)
    assert taken(limits, V4, 20, NOW + 16 * 256) == 0


def test_buckets_that_are_full_again_are_not_missed():
    limits = limiter(SECOND, 4, entries=16)
    for number in range(16):
        limits.take(number.to_bytes(4, "big"), NOW)
    for number in range(16, 32):
        limits.take(number.to_bytes(4, "big"), NOW + 5 * SECOND)
    assert (len(limits), limits.forgotten) == (16, 0)


def test_nobody_can_know_who_shares_a_slot_with_whom():
    """Places depend on a salt of the limiter: addresses that crowd one slot of this table do not in that."""

    def crowd(limits, addresses):
        for who in addresses:
            limits.take(who, NOW)
        return len(limits)

    first = limiter(entries=65_536)
    addresses = [random_address() for _ in range(4096 * 20)]
    by_slot = defaultdict(list)
    for who in addresses:
        by_slot[hash(first._salt + who) & first._mask].append(who)
    crowded = max(by_slot.values(), key=len)
    assert len(crowded) > 16
    assert crowd(first, crowded) == 16
    assert crowd(limiter(entries=65_536), crowded) > 16


# Access lists

networks = st.one_of(
    st.builds(
        lambda number, length: ipaddress.IPv4Network((number, length), strict=False),
        st.integers(0, 0xFF).map(lambda number: number << 24),
        st.integers(0, 32),
    ),
    st.builds(
        lambda number, length: ipaddress.IPv6Network((number, length), strict=False),
        st.integers(0, 0xFF).map(lambda number: number << 120),
        st.integers(0, 128),
    ),
)
addresses = st.one_of(
    st.integers(0, 0x3FF).map(lambda number: ipaddress.IPv4Address(number << 22)),
    st.integers(0, 0x3FF).map(lambda number: ipaddress.IPv6Address(number << 118)),
)


@given(st.dictionaries(networks, st.booleans(), max_size=12), st.lists(addresses, min_size=1, max_size=12))
def test_the_longest_prefix_decides(rules, asked):
    access = AccessList(
        [network for network, is_allowed in rules.items() if is_allowed],
        [network for network, is_allowed in rules.items() if not is_allowed],
    )
    for who in asked:
        holding = [network for network in rules if who in network]
        if holding:
            expected = rules[max(holding, key=lambda network: network.prefixlen)]
        else:
            expected = not any(rules.values())
        assert access.allows(who.packed) == expected


@given(networks)
def test_a_prefix_cannot_be_both(network):
    with pytest.raises(ValueError, match="both allowed and denied"):
        AccessList([network], [network])


# Datagrams


def admission(*, access=None, burst=4, leak=4, kiss=0, kiss_denied=False, rate=True):
    policy = RatePolicy(SECOND, burst, leak, kiss) if rate else None
    return Admission(secrets.token_bytes, access=access, rate=policy, kiss_denied=kiss_denied)


def verdicts(rule, who, count, now=NOW):
    return Counter(rule.judge(who, now) for _ in range(count))


def test_over_the_limit_a_share_is_answered_all_the_same():
    found = verdicts(admission(leak=4), V4, 40_004)
    assert found.keys() == {Verdict.ANSWER, Verdict.RATE_LIMITED}
    assert 9_000 < found[Verdict.ANSWER] - 4 < 11_000


def test_a_share_of_what_is_over_the_limit_gets_a_kiss_but_an_address_few():
    """One chance in two of it each time, and one kiss in 32 s whatever comes; those of a /64 count as one."""
    rule = admission(kiss=2, leak=256)
    now = NOW
    for _ in range(5):
        found = Counter(rule.judge(V6[:8] + random_address(8), now) for _ in range(1000))
        assert found[Verdict.KISS_RATE] == 1
        now += 32 * SECOND


def test_without_kisses_there_are_none():
    assert Verdict.KISS_RATE not in verdicts(admission(kiss=0), V4, 1000)


def test_who_is_denied_is_ignored_or_told_so_once_in_a_while():
    access = AccessList(deny=[ipaddress.ip_network("192.0.2.0/24")])
    ignoring = admission(access=access, rate=False)
    assert verdicts(ignoring, V4, 100) == {Verdict.DENIED: 100}
    assert verdicts(ignoring, address("198.51.100.1"), 100) == {Verdict.ANSWER: 100}
    telling = admission(access=access, rate=False, kiss_denied=True)
    assert verdicts(telling, V4, 100) == {Verdict.KISS_DENY: 1, Verdict.DENIED: 99}
    assert verdicts(telling, V4, 100, NOW + 32 * SECOND)[Verdict.KISS_DENY] == 1


def test_the_denied_take_no_tokens():
    access = AccessList(deny=[ipaddress.ip_network("2001:db8:0:1::/64")])
    rule = admission(access=access)
    verdicts(rule, V6, 4 * WIDE_FACTOR)
    assert rule.judge(address("2001:db8:0:2::1"), NOW) == Verdict.ANSWER


# Slots


def slots(total=1024, per_address=128, per_prefix=256):
    return Slots(total, per_address=per_address, per_prefix=per_prefix)


def test_a_household_and_a_bench_fit():
    shared = slots()
    assert [shared.take(V4) for _ in range(128)] == [None] * 128
    assert shared.take(V4) == NoSlot.OF_ADDRESS
    assert shared.take(address("192.0.2.2")) is None


def test_a_64_counts_as_one_address_and_a_48_as_two():
    shared = slots()
    of_64 = [shared.take(V6[:8] + random_address(8)) for _ in range(200)]
    assert Counter(of_64) == {None: 128, NoSlot.OF_ADDRESS: 72}
    of_48 = [shared.take(V6[:6] + random_address(10)) for _ in range(300)]
    assert Counter(of_48) == {None: 128, NoSlot.OF_PREFIX: 172}
    assert shared.take(address("2001:db8:1::1")) is None


def test_few_cannot_take_all():
    """A hundred addresses that want all they can get leave room for whoever comes next."""
    shared = slots()
    greedy = [number.to_bytes(4, "big") for number in range(100)]
    for _ in range(128):
        for who in greedy:
            shared.take(who)
    assert shared.total - shared.taken >= 32
    assert shared.take(V4) is None


def test_the_whole_has_an_end():
    shared = slots(total=64)
    found = Counter(shared.take(number.to_bytes(4, "big")) for number in range(100))
    assert found == {None: 64, NoSlot.ALL: 36}


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=200), st.sampled_from((4, 16)))
def test_what_is_given_back_can_be_taken_again(steps, length):
    shared = slots(total=16, per_address=4, per_prefix=8)
    held = []
    for number, is_taking in steps:
        who = bytes([number]) * length
        if is_taking:
            if shared.take(who) is None:
                held.append(who)
        elif who in held:
            held.remove(who)
            shared.give_back(who)
        assert shared.taken == len(held) <= 16
        assert max(Counter(held).values(), default=0) <= 4
    for who in held:
        shared.give_back(who)
    assert (shared.taken, shared._held) == (0, Counter())


def test_a_cap_lets_so_many_through_in_a_second_and_no_debt_is_run_up():
    cap, answered = Cap(100), 0
    for now in range(0, 10 * SECOND, SECOND // 1000):
        answered += cap.take(now)
    assert 1000 <= answered <= 1021
    assert cap.take(10 * SECOND + SECOND // 100)


def test_a_cap_of_less_than_one_in_a_second_lets_one_through():
    cap = Cap(0.5)
    assert [cap.take(seconds * SECOND) for seconds in range(5)] == [True, False, True, False, True]


def test_what_the_lists_drop_takes_nothing_from_the_cap():
    denied = AccessList(deny=[ipaddress.ip_network("192.0.2.0/24")])
    admission = Admission(secrets.token_bytes, access=denied, cap=Cap(0.01))
    other = address("198.51.100.1")
    verdicts = [admission.judge(source, 0) for source in (V4, V4, other, other, V4)]
    assert verdicts == [
        Verdict.DENIED,
        Verdict.DENIED,
        Verdict.ANSWER,
        Verdict.OVER_CAP,
        Verdict.DENIED,
    ]
