"""Key establishment (RFC 8915 sections 4 and 5.1): the server's table of outcomes and the client's judgement."""

import hashlib
import secrets
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nts_core import records
from nts_core.aead import KEY_LENGTH, SUPPORTED, AeadId, SessionKeys
from nts_core.cookies import MAX_COOKIE_LENGTH, Keyring
from nts_core.errors import KeError, NoOverlap, WireError
from nts_core.ke import KeClient, KeServer, KeTerms, NtpEndpoint, NtpService, export_keys
from nts_core.records import MessageReader, Record, RecordType
from nts_core.wire import uint16, uint16_list

VECTORS = Path(__file__).parent.parent / "vectors"
END = Record(RecordType.END_OF_MESSAGE, critical=True)
NTPV4 = Record(RecordType.NEXT_PROTOCOL, uint16(0), critical=True)
SIV = Record(RecordType.AEAD_ALGORITHM, uint16(15), critical=True)
COOKIE = Record(RecordType.NEW_COOKIE, b"c" * 100)


def vector(name):
    """The named octets of a vector file."""
    named = tomllib.loads((VECTORS / f"{name}.toml").read_text())
    return {key: bytes.fromhex(value) for key, value in named.items()}


def export(context, length):
    """Stands for the exporter of one TLS session: both ends get the same octets for the same context."""
    return hashlib.shake_256(context).digest(length)


def message(*body):
    return records.encode([*body, END])


def make_server(endpoint=None, keyring=None):
    keyring = keyring or Keyring.new(0, secrets.token_bytes)
    return KeServer(KeTerms(keyring, NtpService(endpoint or NtpEndpoint())), export, secrets.token_bytes)


def parse(octets):
    found = MessageReader(records.MAX_RESPONSE).receive(octets)
    assert found is not None, "the answer is not a whole message"
    return list(found)


def answer(*body):
    """What the server answers to a request, and the word for its counter."""
    reply = make_server().receive(message(*body))
    assert reply is not None
    return parse(reply.octets), reply.outcome


# The exporter


@pytest.mark.rfc8915("4.3-3", "4.3-4", "5.1-1", "5.1-4", "5.1-5", "5.1-6", "5.1-7", "5.1-8")
def test_the_exporter_contexts_are_those_of_the_rfc():
    expected = vector("exporter-contexts")
    asked = []

    def recorded(context, length):
        asked.append((context, length))
        return bytes(length)

    export_keys(recorded, AeadId.AES_SIV_CMAC_256)
    assert asked == [(expected["c2s"], 32), (expected["s2c"], 32)]


@pytest.mark.rfc8915("5.1-1", "5.1-7")
def test_the_directions_get_different_keys():
    keys = export_keys(export, AeadId.AES_SIV_CMAC_256)
    assert keys.c2s == export(b"\0\0\0\x0f\0", 32)
    assert keys.s2c == export(b"\0\0\0\x0f\1", 32)


# The server's table of outcomes


@pytest.mark.rfc8915(
    "4-5",
    "4-6",
    "4.1.1-1",
    "4.1.1-2",
    "4.1.2-1",
    "4.1.2-2",
    "4.1.5-2",
    "4.1.5-4",
    "4.1.5-6",
    "4.1.5-7",
    "4.1.6-4",
    "4.1.6-5",
    "4.1.6-6",
)
def test_a_good_request_gets_eight_cookies_that_open():
    keyring = Keyring.new(0, secrets.token_bytes)
    reply = make_server(keyring=keyring).receive(message(NTPV4, SIV))
    assert reply.outcome == "ok"
    protocol, aead, *cookies = parse(reply.octets)
    assert (protocol, aead) == (NTPV4, SIV)
    assert [cookie.type for cookie in cookies] == [RecordType.NEW_COOKIE] * 8
    assert len({cookie.body for cookie in cookies}) == 8
    for cookie in cookies:
        assert keyring.open(cookie.body) == export_keys(export, AeadId.AES_SIV_CMAC_256)
        assert not cookie.critical


@pytest.mark.rfc8915("4.1.5-7")
def test_the_request_of_chronyd_is_served():
    reply = make_server().receive(vector("chrony-ke-request")["request"])
    assert reply.outcome == "ok"


def test_our_own_request_is_as_chronyds():
    client = KeClient(export, (AeadId.AES_SIV_CMAC_256,))
    assert client.request() == vector("chrony-ke-request")["request"]


@pytest.mark.rfc8915("4-5", "4-6", "4.1.1-1", "4.1.1-2", "4.1.2-1", "4.1.2-2", "4.1.2-5")
@pytest.mark.rfc8915("4.1.3-2", "4.1.4-2", "4.1.5-1", "4.1.5-2", "4.1.5-3", "4.1.6-3")
@pytest.mark.rfc8915("4.1.7-10", "4.1.7-14", "4.1.8-4")
@pytest.mark.parametrize(
    ("offered", "more"),
    [([AeadId.AES_SIV_CMAC_256], []), (SUPPORTED, [RecordType.COMPLIANT_128GCM_EXPORT])],
)
def test_our_request_holds_what_a_request_must_and_nothing_that_it_must_not(offered, more):
    request = parse(KeClient(export, offered).request())
    protocol, aead = request[:2]
    assert protocol == NTPV4
    assert (aead.type, aead.critical) == (RecordType.AEAD_ALGORITHM, True)
    assert 15 in uint16_list(aead.body)
    # No Error, Warning or New Cookie, and no wish for an NTP server.
    assert [record.type for record in request[2:]] == more


@pytest.mark.rfc8915("4.1.7-1", "4.1.7-13", "4.1.8-3")
def test_record_6_and_7_say_where_ntp_is():
    reply = make_server(NtpEndpoint("192.0.2.1", 11123)).receive(message(NTPV4, SIV))
    told = {record.type: record for record in parse(reply.octets)}
    assert told[RecordType.NTP_SERVER] == Record(6, b"192.0.2.1", critical=True)
    assert told[RecordType.NTP_PORT] == Record(7, uint16(11123), critical=True)


def test_nothing_is_said_of_the_usual_port():
    told = {record.type for record in parse(make_server().receive(message(NTPV4, SIV)).octets)}
    assert not told & {RecordType.NTP_SERVER, RecordType.NTP_PORT}


IGNORED = {
    "an unknown record": Record(0x4000, b"x"),
    "record 1024 of chrony": Record(1024, b""),
    "a wish for a server": Record(RecordType.NTP_SERVER, b"ntp.example."),
    "a wish for a port": Record(RecordType.NTP_PORT, uint16(4123)),
}


@pytest.mark.rfc8915("4-10", "4-13")
@pytest.mark.parametrize("extra", IGNORED.values(), ids=IGNORED)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_a_request_may_contain_besides(extra, place):
    body = [NTPV4, SIV]
    body.insert(place, extra)
    assert answer(*body)[1] == "ok"


@pytest.mark.rfc8915("4.1.5-1")
def test_records_in_another_order_and_uncritical_aead():
    """The critical bit of the AEAD record MAY be set (section 4.1.5); no order is demanded."""
    assert answer(Record(RecordType.AEAD_ALGORITHM, uint16(15)), NTPV4)[1] == "ok"


def test_algorithms_we_do_not_speak_are_passed_over():
    offered = Record(RecordType.AEAD_ALGORITHM, uint16(1) + uint16(77) + uint16(15), critical=True)
    told, outcome = answer(NTPV4, offered)
    assert outcome == "ok"
    assert told[1] == SIV


@pytest.mark.rfc8915("4.1.2-3")
def test_protocols_we_do_not_speak_are_passed_over():
    protocols = Record(RecordType.NEXT_PROTOCOL, uint16(0x8001) + uint16(0), critical=True)
    told, outcome = answer(protocols, SIV)
    assert outcome == "ok"
    assert told[0] == NTPV4


@pytest.mark.rfc8915("4-11", "4.1.3-1", "4.1.3-5")
@pytest.mark.parametrize("place", [0, 1, 2])
def test_unknown_critical_record(place):
    body = [NTPV4, SIV]
    body.insert(place, Record(0x4000, b"x", critical=True))
    assert answer(*body) == ([Record(RecordType.ERROR, uint16(0), critical=True)], "unknown-critical")


BAD = {
    "nothing": (),
    "no protocol": (SIV,),
    "no algorithm": (NTPV4,),
    "protocol twice": (NTPV4, NTPV4, SIV),
    "algorithm twice": (NTPV4, SIV, SIV),
    "an empty list of protocols": (Record(RecordType.NEXT_PROTOCOL, critical=True), SIV),
    "an empty list of algorithms": (NTPV4, Record(RecordType.AEAD_ALGORITHM, critical=True)),
    "half a protocol": (Record(RecordType.NEXT_PROTOCOL, b"\0\0\0", critical=True), SIV),
    "half an algorithm": (NTPV4, Record(RecordType.AEAD_ALGORITHM, b"\0\x0f\0", critical=True)),
    "an Error record": (NTPV4, SIV, Record(RecordType.ERROR, uint16(1), critical=True)),
    "a Warning record": (NTPV4, SIV, Record(RecordType.WARNING, uint16(1), critical=True)),
    "a cookie": (NTPV4, SIV, COOKIE),
    "record 1024 with a body": (NTPV4, SIV, Record(1024, b"x")),
    "record 1024 twice": (NTPV4, SIV, Record(1024), Record(1024)),
    "a wish for a server that is no name": (NTPV4, SIV, Record(RecordType.NTP_SERVER, b"a b")),
    "a wish for a zone of an address": (NTPV4, SIV, Record(RecordType.NTP_SERVER, b"fe80::1%eth0")),
    "a wish for port 0": (NTPV4, SIV, Record(RecordType.NTP_PORT, uint16(0))),
    "two wishes for a server": (NTPV4, SIV, *([IGNORED["a wish for a server"]] * 2)),
}


@pytest.mark.rfc8915("4-5", "4-14", "4.1.2-1", "4.1.2-5", "4.1.3-1", "4.1.3-7", "4.1.5-2", "4.1.5-3")
@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_bad_requests(body):
    assert answer(*body) == ([Record(RecordType.ERROR, uint16(1), critical=True)], "bad-request")


@pytest.mark.rfc8915("4.1.1-1", "4.1.1-2", "4.1.3-7")
@pytest.mark.parametrize("octets", ["00000000", "8000000100", "800000000000", "8000000080000000"])
def test_bad_ends_of_message(octets):
    reply = make_server().receive(bytes.fromhex(octets))
    assert reply.outcome == "bad-request"
    assert parse(reply.octets) == [Record(RecordType.ERROR, uint16(1), critical=True)]


@pytest.mark.rfc8915("4-5", "4.1.2-1", "4.1.2-2", "4.1.2-3", "4.1.2-6")
def test_no_protocol_in_common():
    told, outcome = answer(Record(RecordType.NEXT_PROTOCOL, uint16(0x8001), critical=True), SIV)
    assert (told, outcome) == ([Record(RecordType.NEXT_PROTOCOL, critical=True)], "no-protocol")


def test_no_algorithm_in_common():
    told, outcome = answer(NTPV4, Record(RecordType.AEAD_ALGORITHM, uint16(31), critical=True))
    assert (told, outcome) == ([NTPV4, Record(RecordType.AEAD_ALGORITHM, critical=True)], "no-aead")


def offer(*algorithms):
    return Record(RecordType.AEAD_ALGORITHM, b"".join(map(uint16, algorithms)), critical=True)


COMPLIANT = Record(RecordType.COMPLIANT_128GCM_EXPORT)


@pytest.mark.rfc8915("4.1.6-5", "5.1-6")
@pytest.mark.parametrize("algorithm", AeadId)
def test_every_algorithm_has_its_keys_and_cookies(algorithm):
    keyring = Keyring.new(0, secrets.token_bytes)
    reply = make_server(keyring=keyring).receive(message(NTPV4, offer(algorithm), COMPLIANT))
    told = parse(reply.octets)
    assert told[1] == offer(algorithm)
    cookies = [record.body for record in told if record.type == RecordType.NEW_COOKIE]
    keys = export_keys(export, algorithm)
    assert (len(keys.c2s), len(keys.s2c)) == (KEY_LENGTH[algorithm],) * 2
    assert [keyring.open(cookie) for cookie in cookies] == [keys] * 8
    assert len({len(cookie) for cookie in cookies}) == 1


@pytest.mark.rfc8915("4.1.5-4", "4.1.5-5", "4.1.5-7")
@pytest.mark.parametrize(
    ("offered", "is_compliant", "chosen"),
    [
        ((30, 15), True, 30),
        ((15, 30), True, 30),
        ((30, 15), False, 15),
        ((30, 17), False, 17),
        ((30,), False, 30),
        ((16, 17, 15), True, 15),
        ((16, 17), False, 17),
    ],
)
def test_the_server_chooses_what_it_prefers(offered, is_compliant, chosen):
    """AES-128-GCM-SIV first if both ends mean the same by it, and last if they may not."""
    told, outcome = answer(NTPV4, offer(*offered), *([COMPLIANT] if is_compliant else []))
    assert (told[1], outcome) == (offer(chosen), "ok")


@pytest.mark.rfc8915("4.1.5-5")
def test_the_preference_is_the_operators():
    terms = KeTerms(Keyring.new(0, secrets.token_bytes), preference=(AeadId(17), AeadId(15)))
    for offered, chosen in (((15, 17, 30), 17), ((30, 15), 15)):
        reply = KeServer(terms, export, secrets.token_bytes).receive(
            message(NTPV4, offer(*offered), COMPLIANT)
        )
        assert parse(reply.octets)[1] == offer(chosen)


@pytest.mark.rfc8915("4.1.5-6")
def test_a_server_without_the_algorithm_that_everybody_has_is_refused():
    with pytest.raises(ValueError, match="AES-SIV-CMAC-256"):
        KeTerms(Keyring.new(0, secrets.token_bytes), preference=(AeadId(30),))


@pytest.mark.rfc8915("5.1-6")
@pytest.mark.parametrize(("is_compliant", "context_id"), [(True, 30), (False, 15)])
def test_the_export_of_aes_128_gcm_siv(is_compliant, context_id):
    """With record 1024 as section 5.1 has it; without, as chrony 4.4 to 4.6, in the name of algorithm 15."""
    keyring = Keyring.new(0, secrets.token_bytes)
    request = message(NTPV4, offer(30), *([COMPLIANT] if is_compliant else []))
    told = parse(make_server(keyring=keyring).receive(request).octets)
    assert (COMPLIANT in told) is is_compliant
    cookie = next(record.body for record in told if record.type == RecordType.NEW_COOKIE)
    contexts = [bytes((0, 0, 0, context_id, direction)) for direction in (0, 1)]
    assert keyring.open(cookie) == SessionKeys(AeadId(30), *(export(context, 16) for context in contexts))


def test_record_1024_is_echoed_for_the_algorithm_it_speaks_of_only():
    told, _ = answer(NTPV4, offer(15), COMPLIANT)
    assert COMPLIANT not in told


# Records 6 and 7 of a client

SERVICE = NtpService(
    NtpEndpoint(None, 123),
    (NtpEndpoint("192.0.2.1"), NtpEndpoint("2001:db8::1", 4123), NtpEndpoint("ntp.example")),
)


def wish(host=None, port=None):
    return [
        *([] if host is None else [Record(RecordType.NTP_SERVER, host)]),
        *([] if port is None else [Record(RecordType.NTP_PORT, uint16(port))]),
    ]


@pytest.mark.rfc8915("4.1.7-9", "4.1.7-11", "4.1.8-2")
@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (wish(b"192.0.2.1"), wish(b"192.0.2.1")),
        (wish(b"192.0.2.1", 123), wish(b"192.0.2.1")),
        (wish(b"192.0.2.1", 4123), []),
        (wish(b"2001:DB8:0::1", 4123), wish(b"2001:db8::1", 4123)),
        (wish(b"2001:db8::1"), wish(b"2001:db8::1", 4123)),
        (wish(b"NTP.example."), wish(b"ntp.example")),
        (wish(b"elsewhere.example"), []),
        (wish(port=4123), wish(b"2001:db8::1", 4123)),
        (wish(port=123), []),
        ([], []),
    ],
)
def test_a_wish_is_granted_if_it_names_what_is_served(wanted, told):
    """Section 4.1.7: the same record back if we can supply cookies for it; else we say what we serve."""
    server = KeServer(KeTerms(Keyring.new(0, secrets.token_bytes), SERVICE), export, secrets.token_bytes)
    sent = parse(server.receive(message(NTPV4, SIV, *wanted)).octets)
    found = [record for record in sent if record.type in {RecordType.NTP_SERVER, RecordType.NTP_PORT}]
    assert [(record.type, record.body) for record in found] == [(record.type, record.body) for record in told]
    assert all(record.critical for record in found)


@pytest.mark.rfc8915("4.1.3-1", "4.1.3-7")
def test_silence_until_the_deadline():
    server = make_server()
    assert server.receive(message(NTPV4, SIV)[:-1]) is None
    reply = server.timeout()
    assert reply.outcome == "timeout"
    assert parse(reply.octets) == [Record(RecordType.ERROR, uint16(1), critical=True)]


@pytest.mark.rfc8915("4-6")
def test_every_truncation_of_a_request_is_waited_for():
    request = message(NTPV4, Record(0x4000, b"xyz"), SIV)
    for length in range(len(request)):
        assert make_server().receive(request[:length]) is None


def test_a_request_may_come_octet_by_octet():
    server = make_server()
    request = message(NTPV4, SIV)
    replies = [server.receive(bytes((octet,))) for octet in request]
    assert replies[:-1] == [None] * (len(request) - 1)
    assert replies[-1].outcome == "ok"


@pytest.mark.rfc8915("4-7", "4-8")
def test_a_request_longer_than_the_limit_is_bad():
    """A server must take 1,024 octets (section 4) and needs a bound."""
    room = records.MAX_REQUEST - len(message(NTPV4, SIV))
    assert room > 1024
    filler = [Record(0x4000, bytes(room - 4))]
    assert answer(NTPV4, SIV, *filler)[1] == "ok"
    reply = make_server().receive(message(NTPV4, SIV, Record(0x4000, bytes(room - 3))))
    assert reply.outcome == "bad-request"


@given(st.lists(st.binary(max_size=64), max_size=8))
def test_the_server_survives_random_octets(pieces):
    server = make_server()
    for piece in pieces:
        reply = server.receive(piece)
        if reply is not None:
            parse(reply.octets)
            break


@given(
    st.lists(
        st.builds(
            Record,
            type=st.sampled_from([*range(9), 1024, 0x7FFF]),
            body=st.binary(max_size=6),
            critical=st.booleans(),
        ),
        max_size=6,
    )
)
def test_the_server_answers_every_whole_message(body):
    reply = make_server().receive(records.encode([*body, END]))
    assert reply is not None
    parse(reply.octets)


# The client


def conclude(*body, octets=None):
    return KeClient(export).receive(message(*body) if octets is None else octets)


@pytest.mark.rfc8915("4.1.7-8")
def test_client_and_server_agree():
    client = KeClient(export)
    reply = make_server(NtpEndpoint("2001:db8::1", 4123)).receive(client.request())
    result = client.receive(reply.octets)
    assert result.keys == export_keys(export, AeadId.AES_128_GCM_SIV)
    assert result.alternative is None
    assert len(result.cookies) == 8
    assert result.endpoint == NtpEndpoint("2001:db8::1", 4123)


def test_the_request_names_every_algorithm_and_how_keys_are_exported():
    asked = parse(KeClient(export).request())
    assert asked == [NTPV4, offer(30, 15, 17, 16), COMPLIANT]


@pytest.mark.parametrize("algorithm", AeadId)
def test_client_and_server_agree_on_every_algorithm(algorithm):
    client = KeClient(export, (algorithm,))
    keyring = Keyring.new(0, secrets.token_bytes)
    result = client.receive(make_server(keyring=keyring).receive(client.request()).octets)
    assert result.keys.aead is algorithm
    assert keyring.open(result.cookies[0]) == result.keys


def test_an_answer_of_aes_128_gcm_siv_without_record_1024_means_one_of_two_things():
    """chrony 4.4 to 4.6 exports it in the name of algorithm 15; who knows RFC 8915 only, in its own."""
    result = conclude(NTPV4, offer(30), COOKIE)
    assert result.keys == export_keys(export, AeadId(30), AeadId(15))
    assert result.alternative == export_keys(export, AeadId(30))
    assert conclude(NTPV4, offer(30), COMPLIANT, COOKIE).keys == result.alternative
    assert conclude(NTPV4, offer(15), COOKIE).alternative is None


def test_a_result_shows_no_secrets():
    result = conclude(NTPV4, SIV, Record(RecordType.NEW_COOKIE, b"COOKIE" * 4))
    assert "COOKIE" not in repr(result)
    assert repr(result.keys.c2s) not in repr(result)


def test_every_truncation_of_an_answer_is_waited_for():
    octets = message(NTPV4, SIV, COOKIE, COOKIE)
    for length in range(len(octets)):
        assert conclude(octets=octets[:length]) is None


@pytest.mark.rfc8915("4.1.3-4", "4.1.4-3", "4.1.4-4")
@pytest.mark.parametrize("code", [0, 1, 2, 77])
@pytest.mark.parametrize("kind", [RecordType.ERROR, RecordType.WARNING])
def test_errors_and_warnings_end_it_whatever_else_was_sent(kind, code):
    """Section 4.1.4: unknown warnings count as errors, and none is defined."""
    with pytest.raises(KeError) as caught:
        conclude(NTPV4, SIV, COOKIE, Record(kind, uint16(code), critical=True))
    assert caught.value.code == code


@pytest.mark.rfc8915("4.1.3-3")
def test_after_an_error_no_key_is_made():
    exported = []

    def recorded(context, length):
        exported.append(context)
        return bytes(length)

    with pytest.raises(KeError):
        KeClient(recorded).receive(
            message(NTPV4, SIV, COOKIE, Record(RecordType.ERROR, uint16(2), critical=True))
        )
    assert exported == []
    assert KeClient(recorded).receive(message(NTPV4, SIV, COOKIE)) is not None
    assert exported


def test_an_error_alone():
    with pytest.raises(KeError) as caught:
        conclude(Record(RecordType.ERROR, uint16(1), critical=True))
    assert caught.value.code == 1


NO_OVERLAP = {
    "an empty protocol list": (Record(RecordType.NEXT_PROTOCOL, critical=True),),
    "another protocol": (Record(RecordType.NEXT_PROTOCOL, uint16(1), critical=True), SIV, COOKIE),
    "an empty algorithm list": (NTPV4, Record(RecordType.AEAD_ALGORITHM, critical=True)),
}


@pytest.mark.rfc8915("4.1.2-4", "4.1.2-6")
@pytest.mark.parametrize("body", NO_OVERLAP.values(), ids=NO_OVERLAP)
def test_nothing_in_common(body):
    with pytest.raises(NoOverlap):
        conclude(*body)


UNUSABLE = {
    "an algorithm that was not offered": (
        NTPV4,
        Record(RecordType.AEAD_ALGORITHM, uint16(18), critical=True),
        COOKIE,
    ),
    "two algorithms": (NTPV4, Record(RecordType.AEAD_ALGORITHM, uint16(15) * 2, critical=True), COOKIE),
    "no cookie": (NTPV4, SIV),
    "only empty cookies": (NTPV4, SIV, *([Record(RecordType.NEW_COOKIE)] * 8)),
    "only cookies that are too long": (
        NTPV4,
        SIV,
        Record(RecordType.NEW_COOKIE, bytes(MAX_COOKIE_LENGTH + 1)),
    ),
    "an unknown critical record": (NTPV4, SIV, COOKIE, Record(0x4000, critical=True)),
}


@pytest.mark.rfc8915("4-11", "4.1.5-4")
@pytest.mark.parametrize("body", UNUSABLE.values(), ids=UNUSABLE)
def test_answers_that_cannot_be_used(body):
    with pytest.raises(KeError):
        conclude(*body)


MALFORMED = {
    "nothing": (),
    "no protocol": (SIV, COOKIE),
    "no algorithm": (NTPV4, COOKIE),
    "protocol twice": (NTPV4, NTPV4, SIV, COOKIE),
    "algorithm twice": (NTPV4, SIV, SIV, COOKIE),
    "server twice": (NTPV4, SIV, COOKIE, *([Record(RecordType.NTP_SERVER, b"a.example")] * 2)),
    "port twice": (NTPV4, SIV, COOKIE, *([Record(RecordType.NTP_PORT, uint16(123))] * 2)),
    "half an algorithm": (NTPV4, Record(RecordType.AEAD_ALGORITHM, b"\0\x0f\0"), COOKIE),
    "an Error record of one octet": (Record(RecordType.ERROR, b"\0", critical=True),),
    "an Error record of four octets": (Record(RecordType.ERROR, bytes(4), critical=True),),
    "an empty server name": (NTPV4, SIV, COOKIE, Record(RecordType.NTP_SERVER)),
    "a server name that is not ASCII": (
        NTPV4,
        SIV,
        COOKIE,
        Record(RecordType.NTP_SERVER, "z\u00fcrich".encode()),
    ),
    "a server name with a control character": (NTPV4, SIV, COOKIE, Record(RecordType.NTP_SERVER, b"a\0b")),
    "a server name with a space": (NTPV4, SIV, COOKIE, Record(RecordType.NTP_SERVER, b"a b")),
    "a long server name": (NTPV4, SIV, COOKIE, Record(RecordType.NTP_SERVER, b"a" * 254)),
    "a server address with a zone": (NTPV4, SIV, COOKIE, Record(RecordType.NTP_SERVER, b"fe80::1%1")),
    "a server name with an empty label": (NTPV4, SIV, COOKIE, Record(RecordType.NTP_SERVER, b"a..b")),
    "an address that is none": (NTPV4, SIV, COOKIE, Record(RecordType.NTP_SERVER, b"192.0.2.256")),
    "record 1024 with a body": (NTPV4, SIV, COOKIE, Record(1024, b"x")),
    "port 0": (NTPV4, SIV, COOKIE, Record(RecordType.NTP_PORT, uint16(0))),
    "no port": (NTPV4, SIV, COOKIE, Record(RecordType.NTP_PORT)),
    "two ports": (NTPV4, SIV, COOKIE, Record(RecordType.NTP_PORT, uint16(1) * 2)),
}


@pytest.mark.rfc8915("4-5", "4-14", "4.1.2-1", "4.1.5-2", "4.1.7-8")
@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
def test_malformed_answers(body):
    with pytest.raises(WireError):
        conclude(*body)


@pytest.mark.rfc8915("4.1.6-2")
def test_unusable_cookies_are_left_out():
    empty, long = Record(RecordType.NEW_COOKIE), Record(RecordType.NEW_COOKIE, bytes(60_000))
    result = conclude(NTPV4, empty, SIV, long, COOKIE, empty)
    assert result.cookies == (COOKIE.body,)


def test_no_more_than_eight_cookies_are_kept():
    cookies = [Record(RecordType.NEW_COOKIE, bytes((n,)) * 100) for n in range(20)]
    assert conclude(NTPV4, SIV, *cookies).cookies == tuple(record.body for record in cookies[:8])


@pytest.mark.rfc8915("4-7", "4-10")
def test_64_kib_of_unknown_records_are_read():
    filler = [Record(0x4000)] * ((records.MAX_RESPONSE - len(message(NTPV4, SIV, COOKIE))) // 4)
    assert conclude(NTPV4, *filler, SIV, COOKIE).cookies == (COOKIE.body,)
    with pytest.raises(WireError):
        conclude(NTPV4, *filler, SIV, COOKIE, COOKIE)


@pytest.mark.rfc8915("4.1.8-1")
@pytest.mark.parametrize("name", [b"ntp.example", b"ntp.example."])
def test_a_server_name_with_and_without_its_dot(name):
    """Section 4.1.7: a name is fully qualified, with or without the dot."""
    result = conclude(NTPV4, SIV, COOKIE, Record(RecordType.NTP_SERVER, name))
    assert result.endpoint == NtpEndpoint("ntp.example", 123)


@given(st.binary(max_size=200))
def test_the_client_survives_random_octets(octets):
    try:
        assert conclude(octets=octets) is None
    except (KeError, WireError):
        return


@given(
    st.lists(
        st.builds(
            Record,
            type=st.sampled_from([*range(9), 1024, 0x7FFF]),
            body=st.one_of(st.binary(max_size=6), st.just(uint16(0)), st.just(uint16(15))),
            critical=st.booleans(),
        ),
        max_size=8,
    )
)
def test_the_client_judges_every_whole_message(body):
    try:
        result = KeClient(export).receive(records.encode([*body, END]))
    except (KeError, WireError):
        return
    assert result is not None
    assert result.cookies
