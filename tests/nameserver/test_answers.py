"""What is answered to every kind of question, as a resolver reads it."""

import random
import secrets

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolsvc.nameserver import records
from poolsvc.nameserver.answers import Answers
from poolsvc.nameserver.responder import UDP_PAYLOAD, Malformed, Other, Responder
from tests.nameserver.conftest import NOW, ORIGIN, make, name, new_zone, rrset

HERE = b"\x7f\0\0\1"


def responder_of(zone, answers=None, **limits):
    limits = {"responses_per_second": 1000, "responses_at_once": 1000, "uniform": random.random} | limits
    return Responder(answers or Answers(zone), secrets.token_bytes, **limits)


@pytest.fixture
def ask(zone):
    """A question by UDP; the answer as dnspython reads it."""
    return asker(responder_of(zone))


def asker(responder):
    def ask(owner, kind, *, dnssec=True, payload=1232, edns=None, **options):
        owner = owner if isinstance(owner, dns.name.Name) else dns.name.from_text(owner, ORIGIN)
        edns = (0 if dnssec else None) if edns is None else edns
        query = dns.message.make_query(
            owner,
            kind,
            want_dnssec=dnssec,
            use_edns=edns,
            payload=payload if edns is not None else None,
            **options,
        )
        reply = responder.over_udp(query.to_wire(), HERE, NOW, 0)
        assert reply is not None
        answer = dns.message.from_wire(reply)
        assert query.is_response(answer)
        return answer

    return ask


def shown(section):
    return {(rrset.name.to_text(), dns.rdatatype.to_text(rrset.rdtype)) for rrset in section}


ALICE = "alice.servers.pool.example."


def test_what_is_there_comes_signed_with_authority_and_nothing_else(ask):
    answer = ask("alice.servers", "A")
    assert answer.rcode() == dns.rcode.NOERROR
    assert answer.flags & dns.flags.AA
    assert not answer.flags & (dns.flags.RA | dns.flags.AD | dns.flags.TC)
    assert shown(answer.answer) == {(ALICE, "A"), (ALICE, "RRSIG")}
    assert (answer.authority, answer.additional) == ([], [])
    assert answer.payload == UDP_PAYLOAD


def test_without_dnssec_there_are_no_signatures(ask):
    answer = ask("alice.servers", "A", dnssec=False)
    assert shown(answer.answer) == {(ALICE, "A")}
    assert answer.edns == -1


def test_no_data_is_proved_by_the_names_own_nsec(ask):
    answer = ask("alice.servers", "MX")
    assert (answer.rcode(), answer.answer) == (dns.rcode.NOERROR, [])
    assert shown(answer.authority) == {
        ("pool.example.", "SOA"),
        ("pool.example.", "RRSIG"),
        (ALICE, "NSEC"),
        (ALICE, "RRSIG"),
    }
    assert next(one.ttl for one in answer.authority if one.rdtype == dns.rdatatype.SOA) == 60


def test_a_name_with_only_names_under_it_exists(ask):
    for owner in ("_tcp", "_acme-challenge.alice.servers"):
        assert ask(owner, "A").rcode() == dns.rcode.NOERROR
    (nsec,) = (one for one in ask("_tcp", "A").authority if one.rdtype == dns.rdatatype.NSEC)
    assert nsec.name == ORIGIN
    assert nsec[0].next == dns.name.from_text("_ntske._tcp", ORIGIN)


@pytest.mark.parametrize("owner", ["nobody", "x.alice.servers", "a.b.c.servers", "zzz", "-", "www.www", "*"])
def test_what_does_not_exist_is_proved_with_the_wildcard_that_does_not_either(ask, owner):
    answer = ask(owner, "A")
    assert (answer.rcode(), answer.answer) == (dns.rcode.NXDOMAIN, [])
    asked = dns.name.from_text(owner, ORIGIN)
    nsec = [one for one in answer.authority if one.rdtype == dns.rdatatype.NSEC]
    covers = [one for one in nsec if one.name < asked and (asked < one[0].next or one[0].next == ORIGIN)]
    assert covers
    # The closest name that exists is what the covering one and its next have in common with what was asked.
    encloser = max((asked.fullcompare(other)[2] for other in (covers[0].name, covers[0][0].next)), default=0)
    wildcard = dns.name.Name([b"*", *asked.labels[-encloser:]])
    assert any(one.name < wildcard and (wildcard < one[0].next or one[0].next == ORIGIN) for one in nsec)


def test_an_alias_answers_for_every_type(ask):
    for kind in ("A", "MX", "CNAME"):
        assert shown(ask("www", kind).answer) == {
            ("www.pool.example.", "CNAME"),
            ("www.pool.example.", "RRSIG"),
        }


def test_any_gets_one_rrset_that_exists(ask):
    assert shown(ask("alice.servers", "ANY").answer) == {(ALICE, "A"), (ALICE, "RRSIG")}
    assert shown(ask("alice.servers", "ANY", dnssec=False).answer) == {(ALICE, "A")}
    for dnssec in (True, False):
        assert shown(ask("alice.servers", "RRSIG", dnssec=dnssec).answer) == {(ALICE, "RRSIG")}


def test_the_apex_says_that_it_has_no_ds(ask):
    answer = ask("@", "DS")
    assert (answer.rcode(), answer.answer) == (dns.rcode.NOERROR, [])
    assert ("pool.example.", "NSEC") in shown(answer.authority)


@pytest.mark.parametrize(
    "other", ["example.", "pool.example.net.", "notpool.example.", "xpool.example.", "."]
)
def test_other_zones_are_refused(ask, other):
    answer = ask(dns.name.from_text(other), "A")
    assert (answer.rcode(), answer.answer, answer.authority) == (dns.rcode.REFUSED, [], [])
    assert not answer.flags & dns.flags.AA


def test_other_classes_are_refused(ask):
    assert ask(dns.name.from_text("version.bind."), "TXT", rdclass="CH").rcode() == dns.rcode.REFUSED
    assert ask("alice.servers", "A", rdclass="CH").rcode() == dns.rcode.REFUSED


def test_the_question_comes_back_as_it_was_written(zone):
    query = dns.message.make_query("aLiCe.SeRvErS.pOoL.ExAmPlE.", "A", want_dnssec=True)
    answer = dns.message.from_wire(responder_of(zone).over_udp(query.to_wire(), HERE, NOW, 0))
    assert answer.question[0].name.to_text() == "aLiCe.SeRvErS.pOoL.ExAmPlE."
    assert answer.answer[0].name.to_text() == "aLiCe.SeRvErS.pOoL.ExAmPlE."


def test_rd_and_cd_come_back_as_they_were_asked(ask):
    for flags in (0, dns.flags.RD, dns.flags.CD, dns.flags.RD | dns.flags.CD):
        assert ask("alice.servers", "A", flags=flags).flags & (dns.flags.RD | dns.flags.CD) == flags


def test_an_unknown_version_of_edns_is_told_ours(ask):
    answer = ask("alice.servers", "A", edns=1)
    assert (answer.rcode(), answer.answer, answer.edns) == (dns.rcode.BADVERS, [], 0)


def test_answers_follow_the_zone():
    zone = new_zone()
    answers = Answers(zone)
    responder = responder_of(zone, answers)
    ask = asker(responder)
    assert ask("new", "A").rcode() == dns.rcode.NXDOMAIN
    assert ask("ns1", "MX").rcode() == dns.rcode.NOERROR

    def change(wanted):
        edition = make(zone, wanted)
        answers.renew(edition)
        return ask("@", "SOA").answer[0][0].serial

    assert change({(name("new"), records.A): rrset("A", "192.0.2.1")}) == 2
    assert ask("new", "A").answer[0][0].address == "192.0.2.1"
    assert change({(name("new"), records.A): rrset("A", "192.0.2.2")}) == 3
    assert ask("new", "A").answer[0][0].address == "192.0.2.2"
    assert ask("ns1", "MX").authority[0][0].serial == 3, "what proves an absence has the newest SOA"
    assert change({(name("new"), records.A): None}) == 4
    assert ask("new", "A").rcode() == dns.rcode.NXDOMAIN
    assert responder.counters["ignored"] == 0


def test_what_does_not_fit_is_cut_and_comes_whole_by_tcp(zone):
    make(zone, {(name("big"), records.TXT): rrset("TXT", *(f'"{number:0200}"' for number in range(8)))})
    responder = responder_of(zone)
    ask = asker(responder)
    for options in (
        {"payload": 512},
        {"payload": 1232},
        {"payload": 4096},
        {"dnssec": False},
        {"payload": 0},
    ):
        answer = ask("big", "TXT", **options)
        assert answer.flags & dns.flags.TC
        assert answer.answer == []
    query = dns.message.make_query("big.pool.example.", "TXT", want_dnssec=True)
    whole = dns.message.from_wire(responder.reply(query.to_wire(), HERE, NOW))
    assert len(whole.answer[0]) == 8
    assert not whole.flags & dns.flags.TC


def test_eight_targets_with_the_longest_labels_fit_one_datagram(zone):
    targets = [f"0 10 4460 {str(number) * 36}.servers" for number in range(8)]
    make(zone, {(name("_ntske._tcp"), records.SRV): rrset("SRV", *targets, ttl=60)})
    answer = asker(responder_of(zone))("_ntske._tcp", "SRV", payload=1232)
    assert len(answer.answer[0]) == 8
    assert not answer.flags & dns.flags.TC


@given(st.binary(max_size=600))
def test_garbage_is_ignored_refused_or_handed_on_and_never_gets_more_than_it_sent(octets):
    responder = GARBAGE
    try:
        reply = responder.over_udp(octets, HERE, NOW, 0)
    except Other:
        return
    if reply is None:
        return
    assert reply[:2] == octets[:2]
    assert reply[2] & 0x80
    assert dns.rcode.from_flags(int.from_bytes(reply[2:4], "big"), 0) in {
        dns.rcode.FORMERR,
        dns.rcode.REFUSED,
        dns.rcode.NOERROR,
    }
    if reply[3] & 0xF:
        assert len(reply) <= max(len(octets), 12)


GARBAGE = responder_of(new_zone(), responses_per_second=1e9, responses_at_once=10**9)
QUESTION = dns.message.make_query("alice.servers.pool.example.", "A", want_dnssec=True).to_wire()


@given(st.integers(0, len(QUESTION) - 1), st.integers(0, 255), st.integers(0, len(QUESTION)))
def test_a_question_with_one_octet_changed_or_an_end_cut_off_is_answered_or_refused(at, octet, length):
    changed = bytearray(QUESTION)
    changed[at] = octet
    for message in (bytes(changed), QUESTION[:length], QUESTION + bytes(changed)):
        try:
            reply = GARBAGE.over_udp(message, HERE, NOW, 0)
        except Other:
            continue
        if reply is not None:
            dns.message.from_wire(reply)
        if len(message) >= 12 and not message[2] & 0x80:
            try:
                GARBAGE.reply(message, HERE, NOW)
            except (Malformed, Other):
                continue
