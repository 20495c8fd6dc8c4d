"""Octets and NTS-KE records (RFC 8915 section 4): what goes in comes out, and nothing else does."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nts_core import records
from nts_core.errors import WireError
from nts_core.records import MessageReader, Record, RecordType
from nts_core.wire import pad4, uint16, uint16_list

END = Record(RecordType.END_OF_MESSAGE, critical=True)
bodies = st.binary(max_size=300)
some_records = st.lists(
    st.builds(Record, type=st.integers(1, 0x7FFF), body=bodies, critical=st.booleans()), max_size=12
)


def read_in_pieces(message: bytes, cuts: list[int]):
    """What a reader makes of a message that arrives cut at `cuts`; the last answer counts."""
    reader = MessageReader(records.MAX_RESPONSE)
    edges = sorted({0, len(message), *(cut % (len(message) + 1) for cut in cuts)})
    found = None
    for start, end in itertools.pairwise(edges):
        assert found is None, "a message before its last octet"
        found = reader.receive(message[start:end])
    return found


@given(st.integers(0, 0xFFFF))
def test_uint16_round_trip(value):
    assert uint16_list(uint16(value)) == (value,)


@given(st.lists(st.integers(0, 0xFFFF)))
def test_uint16_list_round_trip(values):
    assert uint16_list(b"".join(map(uint16, values))) == tuple(values)


@given(st.binary().filter(lambda body: len(body) % 2))
def test_half_an_integer_is_refused(body):
    with pytest.raises(WireError):
        uint16_list(body)


@given(st.binary())
def test_pad4_adds_up_to_three_zeroes(octets):
    padded = pad4(octets)
    assert len(padded) % 4 == 0
    assert padded.startswith(octets)
    assert padded[len(octets) :] in {b"", b"\0", b"\0\0", b"\0\0\0"}


@pytest.mark.rfc8915("4-4", "4-13")
@given(some_records, st.lists(st.integers(0), max_size=8))
def test_records_round_trip_however_they_arrive(sent, cuts):
    assert read_in_pieces(records.encode([*sent, END]), cuts) == tuple(sent)


@pytest.mark.rfc8915("4-4")
def test_the_octets_of_a_record():
    assert Record(4, b"\x00\x0f", critical=True).encode() == bytes.fromhex("80040002000f")
    assert Record(5, b"x").encode() == bytes.fromhex("0005000178")


@pytest.mark.rfc8915("4-6")
@given(some_records)
def test_every_truncation_is_waited_for(sent):
    message = records.encode([*sent, END])
    for length in range(len(message)):
        assert MessageReader(records.MAX_RESPONSE).receive(message[:length]) is None


@pytest.mark.rfc8915("4.1.1-1", "4.1.1-2")
@pytest.mark.parametrize(
    ("message", "why"),
    [
        ("00000000", "End of Message is not critical"),
        ("8000000100", "End of Message has a body"),
        ("8000000000", "an octet follows End of Message"),
        ("8000000080000000", "End of Message comes twice"),
    ],
)
def test_malformed_ends(message, why):
    with pytest.raises(WireError):
        MessageReader(1024).receive(bytes.fromhex(message))


def test_octets_after_the_end_that_come_later_are_refused():
    reader = MessageReader(1024)
    assert reader.receive(END.encode()[:2]) is None
    with pytest.raises(WireError):
        reader.receive(END.encode()[2:] + b"\0")


@pytest.mark.rfc8915("4-9")
def test_a_message_may_be_as_long_as_the_limit_and_no_longer():
    """RFC 8915 section 4: a client should take 65,536 octets."""
    filler = Record(0x4000, bytes(records.MAX_RESPONSE - 8))
    message = records.encode([filler, END])
    assert len(message) == 65536
    assert MessageReader(records.MAX_RESPONSE).receive(message) == (filler,)
    with pytest.raises(WireError):
        MessageReader(records.MAX_RESPONSE).receive(message + b"\0")


def test_the_limit_holds_over_many_pieces():
    reader = MessageReader(100)
    reader.receive(bytes.fromhex("0005ffff"))
    for _ in range(96):
        assert reader.receive(b"x") is None
    with pytest.raises(WireError):
        reader.receive(b"x")


def test_64_kib_of_empty_records():
    empty = Record(0x4000)
    sent = (empty,) * (records.MAX_RESPONSE // 4 - 1)
    assert MessageReader(records.MAX_RESPONSE).receive(records.encode([*sent, END])) == sent


@given(st.lists(st.binary(max_size=64), max_size=16))
def test_random_octets_never_do_more_than_raise_wire_error(pieces):
    reader = MessageReader(512)
    try:
        for piece in pieces:
            if reader.receive(piece) is not None:
                break
    except WireError:
        return
