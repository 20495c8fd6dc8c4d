"""What a forged source gets, and what a cookie is good for."""

import random
from itertools import count

import dns.edns
import dns.flags
import dns.message
import dns.rcode
import pytest

from poolsvc.nameserver.answers import Answers
from poolsvc.nameserver.responder import Responder
from tests.nameserver.conftest import NOW

HERE, THERE = b"\xc0\0\2\1", b"\xc6\x33\x64\1"
SIX, OTHER_SIX = (
    bytes.fromhex("20010db8000000010000000000000001"),
    bytes.fromhex("20010db8000001010000000000000001"),
)
CLIENT = b"12345678"


@pytest.fixture
def responder(zone):
    """Three answers of a kind at once, one a second."""
    counter = count(1)
    return Responder(
        Answers(zone),
        lambda size: bytes([next(counter)]) * size,
        responses_per_second=1,
        responses_at_once=3,
        uniform=random.random,
    )


def query(owner="alice.servers.pool.example.", kind="A", cookie=None):
    options = [] if cookie is None else [dns.edns.GenericOption(10, cookie)]
    return dns.message.make_query(owner, kind, want_dnssec=True, options=options).to_wire()


def ask(responder, address=HERE, now=NOW, at=0, **options):
    asked = query(**options)
    reply = responder.over_udp(asked, address, now, round(at * 1e9))
    return None if reply is None else dns.message.from_wire(reply)


def cookie_of(answer):
    (option,) = (one for one in answer.options if one.otype == dns.edns.OptionType.COOKIE)
    return option.to_wire()


def replies(responder, number, **options):
    return [ask(responder, **options) for _ in range(number)]


def test_a_flood_of_one_question_is_answered_in_part_by_a_hint_to_come_by_tcp(responder):
    answers = replies(responder, 23)
    whole = [answer for answer in answers if answer is not None and answer.answer]
    cut = [answer for answer in answers if answer is not None and answer.flags & dns.flags.TC]
    assert (len(whole), len(cut), answers.count(None)) == (3, 10, 10)
    assert responder.counters["limited"] == 20
    assert responder.counters["slipped"] == 10
    assert ask(responder, at=1).answer, "one more a second"


def test_what_is_sent_instead_is_no_longer_than_the_question(responder):
    asked = query()
    for reply in [responder.over_udp(asked, HERE, NOW, 0) for _ in range(20)][3:]:
        assert reply is None or len(reply) <= len(asked)


def test_kinds_of_answers_and_networks_are_counted_apart(responder):
    assert len([one for one in replies(responder, 10) if one and one.answer]) == 3
    assert ask(responder, owner="bob.servers.pool.example.").answer
    assert ask(responder, address=THERE).answer
    assert not any(one and one.answer for one in replies(responder, 4, address=HERE[:3] + b"\xfe")), (
        "a /24 is one"
    )


def test_names_that_do_not_exist_are_of_one_kind(responder):
    answers = [ask(responder, owner=f"x{number}.servers.pool.example.") for number in range(10)]
    assert len([one for one in answers if one is not None and one.rcode() == dns.rcode.NXDOMAIN]) == 3


def test_refusals_and_malformed_questions_are_limited_as_well(responder):
    answers = [ask(responder, owner=f"x{number}.example.net.") for number in range(10)]
    assert len([one for one in answers if one is not None and one.rcode() == dns.rcode.REFUSED]) == 3
    broken = query()[:-1]
    assert [responder.over_udp(broken, THERE, NOW, 0) is None for _ in range(5)] == [False] * 3 + [True] * 2


def test_ipv6_counts_by_56_bits(responder):
    assert len([one for one in replies(responder, 10, address=SIX) if one and one.answer]) == 3
    assert ask(responder, address=OTHER_SIX).answer


def test_a_cookie_comes_back_with_ours_and_whoever_shows_it_is_not_limited(responder):
    cookie = cookie_of(ask(responder, cookie=CLIENT))
    assert cookie[:8] == CLIENT
    assert len(cookie) == 24
    answers = replies(responder, 50, cookie=cookie)
    assert all(answer.answer and cookie_of(answer) == cookie for answer in answers)


def test_who_has_a_wrong_cookie_and_is_over_the_limit_is_told_the_right_one(responder):
    answers = replies(responder, 13, cookie=CLIENT)[3:]
    told = [answer for answer in answers if answer is not None]
    assert len(told) == 5
    assert {answer.rcode() for answer in told} == {dns.rcode.BADCOOKIE}
    assert ask(responder, cookie=cookie_of(told[0])).answer


@pytest.mark.parametrize(
    ("address", "now"), [(THERE, NOW), (HERE, NOW + 3601), (HERE, NOW - 301)], ids=["stolen", "old", "ahead"]
)
def test_a_cookie_is_good_for_its_address_and_an_hour(responder, address, now):
    cookie = cookie_of(ask(responder, cookie=CLIENT))
    assert (
        len(
            [
                one
                for one in replies(responder, 20, address=address, now=now, cookie=cookie)
                if one and one.answer
            ]
        )
        <= 3
    )


def test_a_cookie_is_renewed_at_half_its_life(responder):
    cookie = cookie_of(ask(responder, cookie=CLIENT))
    assert cookie_of(ask(responder, cookie=cookie, now=NOW + 1800)) == cookie
    assert cookie_of(ask(responder, cookie=cookie, now=NOW + 1801)) != cookie


def test_a_forged_cookie_is_none(responder):
    cookie = bytearray(cookie_of(ask(responder, cookie=CLIENT)))
    cookie[-1] ^= 1
    assert len([one for one in replies(responder, 20, cookie=bytes(cookie)) if one and one.answer]) <= 3


@pytest.mark.parametrize("length", [0, 1, 7, 9, 15, 41])
def test_a_cookie_of_a_length_that_there_is_not_is_malformed(responder, length):
    reply = responder.over_udp(query(cookie=bytes(length)), HERE, NOW, 0)
    assert dns.rcode.from_flags(int.from_bytes(reply[2:4], "big"), 0) == dns.rcode.FORMERR


def test_replies_to_answers_are_no_conversation(responder):
    answer = bytearray(query())
    answer[2] |= 0x80
    assert responder.over_udp(bytes(answer), HERE, NOW, 0) is None
