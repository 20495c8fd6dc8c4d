"""Which names and addresses may be registered."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nts_core.srv import MAX_LABEL
from poolsvc.errors import InvalidAddress, InvalidName, ReservedName
from poolsvc.names import (
    MAX_ADDRESSES,
    RESERVED,
    check_address,
    check_addresses,
    check_name,
    reserved_lookalike,
    skeleton,
)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("alice", "alice"),
        (" Alice ", "alice"),
        ("a", "a"),
        ("7", "7"),
        ("ntp-1", "ntp-1"),
        ("a" * MAX_LABEL, "a" * MAX_LABEL),
    ],
)
def test_a_host_label_is_taken_in_lower_case(text, name):
    assert check_name(text) == name


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "-", "-alice", "alice-", "al ice", "al_ice", "alice.example", "alice.", "al\nice", "*"),
        *("alice\x00", "alice/..", "alice;", "a" * (MAX_LABEL + 1), "\u2028"),
    ],
)
def test_what_is_not_a_host_label_is_refused(text):
    with pytest.raises(InvalidName) as caught:
        check_name(text)
    assert caught.value.code == "invalid-name"
    assert caught.value.field == "name"
    assert caught.value.remedy


def test_a_name_that_is_too_long_is_told_the_limit():
    with pytest.raises(InvalidName, match="has 37 characters") as caught:
        check_name("a" * (MAX_LABEL + 1))
    assert str(MAX_LABEL) in caught.value.remedy
    with pytest.raises(InvalidName) as caught:
        check_name("a" * 5000)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "text", ["älice", "xn--lice-loa", "XN--lice-loa", "алиса", "alice\u200b", "\u212aelvin"]
)
def test_internationalised_names_are_refused_and_told_so(text):
    """U+212A, the Kelvin sign, becomes an ASCII letter in lower case."""
    with pytest.raises(InvalidName, match="internationalised"):
        check_name(text)


@pytest.mark.parametrize("name", ["www", "NTP", "pool", "localhost", "wpad", "mta-sts"])
def test_reserved_names_are_refused(name):
    with pytest.raises(ReservedName) as caught:
        check_name(name)
    assert caught.value.code == "reserved-name"


def test_every_reserved_name_would_be_a_valid_one():
    assert all(name == name.lower() and len(name) <= MAX_LABEL for name in RESERVED)


@given(st.text(max_size=50))
def test_whatever_is_accepted_is_one_lower_case_label(text):
    try:
        name = check_name(text)
    except InvalidName:
        return
    assert name.isascii()
    assert name == name.lower()
    assert 1 <= len(name) <= MAX_LABEL
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("8.8.8.8", "8.8.8.8"),
        (" 8.8.8.8 ", "8.8.8.8"),
        ("2001:4860:4860::8888", "2001:4860:4860::8888"),
        ("2001:4860:4860:0:0:0:0:8888", "2001:4860:4860::8888"),
        ("2001:4860:4860::ABCD", "2001:4860:4860::abcd"),
    ],
)
def test_public_addresses_are_taken_in_canonical_form(text, address):
    assert check_addresses([text], allow_private=False) == [address]


NOT_PUBLIC = [
    *("10.0.0.1", "172.16.0.1", "192.168.0.1", "100.64.0.1", "127.0.0.1", "169.254.1.1", "0.1.2.3"),
    *("240.0.0.1", "198.18.0.1", "192.0.0.1", "192.0.2.1", "198.51.100.1", "203.0.113.1"),
    *("::1", "fc00::1", "fd00::1", "fe80::1", "100::1", "2001:db8::1", "2001:2::1", "2001:10::1"),
]
# Ranges that Python 3.11 takes for global: NAT64 and IPv4-compatible ones hide another address, the others are
# deprecated (fec0, 192.88.99), special (192.0.0) or documentation (3fff, RFC 9637).
NOT_PUBLIC_EITHER = [
    *("64:ff9b::7f00:1", "64:ff9b::10.0.0.1", "64:ff9b:1::1", "::10.0.0.1", "::127.0.0.1", "fec0::1"),
    *("192.88.99.1", "192.0.0.170", "3fff::1", "5f00::1", "4000::1", "2001:0:1::1"),
    # Services of protocols (PCP, AMT, AS112, ORCHID): newer lists of Python take them for global.
    *("192.0.0.9", "192.0.0.10", "2001:1::1", "2001:3::1", "2001:4:112::1", "2001:20::1", "2001:30::1"),
]


@pytest.mark.parametrize("text", [*NOT_PUBLIC, *NOT_PUBLIC_EITHER])
def test_an_address_that_the_internet_does_not_route_is_refused(text):
    with pytest.raises(InvalidAddress) as caught:
        check_address(text, allow_private=False)
    assert caught.value.code == "invalid-address"
    assert caught.value.field == "addresses"
    assert caught.value.remedy


@pytest.mark.parametrize("text", NOT_PUBLIC)
def test_the_demo_may_take_them(text):
    assert check_address(text, allow_private=True) == ipaddress.ip_address(text)


@pytest.mark.parametrize("allow_private", [True, False])
@pytest.mark.parametrize(
    "text",
    [
        *("224.0.0.1", "239.1.2.3", "ff02::1", "ff0e::1", "0.0.0.0", "::", "255.255.255.255"),
        *("::ffff:8.8.8.8", "::ffff:127.0.0.1", "2002:808:808::1", "fe80::1%eth0", "fe80::1%1"),
        *("64:ff9b::8.8.8.8", "64:ff9b::127.0.0.1", "64:ff9b:1::a00:1", "2001:0:808:808::f7f7:f7f7"),
        *("", "alice", "8.8.8", "8.8.8.8/32", "8.8.8.8:80", "08.8.8.8", "0x8.8.8.8", "[2001:db8::1]"),
        *("134744072", "8.8.8.8\x00", "1:2", "٨.٨.٨.٨"),
    ],
)
def test_what_is_no_single_plain_unicast_address_is_always_refused(text, allow_private):
    with pytest.raises(InvalidAddress):
        check_address(text, allow_private=allow_private)


def test_at_least_one_address_at_most_the_limit_and_none_twice():
    many = [f"8.8.8.{number}" for number in range(MAX_ADDRESSES)]
    assert check_addresses(many, allow_private=False) == many
    with pytest.raises(InvalidAddress, match=r"^0 addresses"):
        check_addresses([], allow_private=False)
    with pytest.raises(InvalidAddress, match=r"^9 addresses"):
        check_addresses([*many, "8.8.4.4"], allow_private=False)
    with pytest.raises(InvalidAddress, match="twice"):
        check_addresses(["2001:4860::1", "2001:4860:0::1"], allow_private=False)


@given(st.ip_addresses())
def test_whatever_is_accepted_is_global_unicast_and_stays_itself(address):
    try:
        found = check_address(str(address), allow_private=False)
    except InvalidAddress:
        return
    assert found == address
    assert found.is_global
    assert not found.is_multicast
    assert found.version == 4 or found in ipaddress.ip_network("2000::/3")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(
            ("alice", "a1ice"),
            ("alice", "allce"),
            ("alice", "AL1CE"),
            ("clock0", "clocko"),
            ("time5", "times"),
        ),
        *(("alice", "al-ice"), ("modern", "modem"), ("modern", "mode-rn"), ("vvest", "west"), ("a-1", "ai")),
    ],
)
def test_names_that_look_alike_have_one_skeleton(one, other):
    assert skeleton(one) == skeleton(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("alice", "alices"), ("ntp2", "ntp3"), ("clive", "dive"), ("north", "south"), ("m", "w")],
)
def test_names_that_are_told_apart_have_not(one, other):
    assert skeleton(one) != skeleton(other)


@given(st.from_regex(r"[a-z0-9]([a-z0-9-]{0,34}[a-z0-9])?", fullmatch=True))
def test_a_skeleton_fits_its_column_and_hyphens_and_capitals_do_not_change_it(name):
    found = skeleton(name)
    assert 1 <= len(found) <= 72
    assert skeleton(name.upper()) == skeleton(name.replace("-", "")) == found


@pytest.mark.parametrize(
    ("name", "reserved"),
    [("rnail", "mail"), ("vvww", "www"), ("t1me", "time"), ("n-t-p", "ntp"), ("nsi", "ns1")],
)
def test_a_name_that_looks_like_a_reserved_one_is_told_which(name, reserved):
    assert check_name(name) == name
    assert reserved_lookalike(name) == reserved


def test_an_honest_name_looks_like_nothing_reserved():
    assert reserved_lookalike("alice") is None
