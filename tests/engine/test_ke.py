"""Both engines answer the same NTS-KE streams with the same octets, and at the same octet (RFC 8915 section 4)."""

import random
import tomllib
from hashlib import shake_128
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz import native
from nts_core import records
from nts_core.aead import SUPPORTED, AeadId
from nts_core.cookies import MAX_COOKIES, NONCE_LENGTH, CookieKey, Keyring, Schedule
from nts_core.ke import KeTerms, NtpEndpoint, NtpService
from nts_core.records import Record, RecordType
from nts_core.wire import uint16

nts_engine = pytest.importorskip("nts_engine", reason=native.NOT_BUILT)

VECTORS = Path(__file__).parent.parent / "vectors"
RANDOM = random.Random(4460).randbytes(MAX_COOKIES * NONCE_LENGTH)
KEYRING = Keyring(
    (CookieKey(8, 0, bytes(range(32))), CookieKey(7, 0, bytes(range(7, 39))), CookieKey(6, 0, bytes(32))),
    Schedule(),
)
SERVICES = (
    NtpService(),
    NtpService(
        NtpEndpoint("ntp.example", 1123), (NtpEndpoint("192.0.2.1"), NtpEndpoint("2001:db8::1", 2123))
    ),
    NtpService(NtpEndpoint(None, 4123), (NtpEndpoint(None, 123), NtpEndpoint("other.example", 4123))),
    NtpService(
        NtpEndpoint("::102:304", 2), (NtpEndpoint("::ffff:c000:201", 3), NtpEndpoint("1::2:0:0:3", 4))
    ),
)
PREFERENCES = (
    SUPPORTED,
    (AeadId.AES_SIV_CMAC_256,),
    tuple(sorted(SUPPORTED)),
    tuple(sorted(SUPPORTED, reverse=True)),
)
# Names and addresses that clients may ask for, and what is none.
HOSTS = (
    *(
        "ntp.example",
        "NTP.Example.",
        "other.example",
        "192.0.2.1",
        "2001:db8::1",
        "2001:DB8:0::1",
        "no.example",
    ),
    *(
        "",
        ".",
        "..",
        "a..b",
        "-a.example",
        "a-.example",
        "_ntp._udp.example",
        "1.2.3",
        "1.2.3.4.5",
        "a.1",
        "1a.a1",
    ),
    *(
        "192.0.2.01",
        "192.0.2.256",
        "::",
        "0.0.0.0",
        "224.0.0.1",
        "ff02::1",
        "fe80::1%eth0",
        "fe80::1%",
        "::1%1",
    ),
    *(
        "::ffff:192.0.2.1",
        "::ffff:0:0",
        "::1.2.3.4",
        "1:0:0:0:2:0:0:3",
        "0001::2:0:0:3",
        "::0001:2",
        "00001::",
        "[::1]",
        "1::2::3",
        "a" * 63 + ".example",
        "a" * 64 + ".example",
    ),
    *(
        "a." * 126 + "a",
        "a." * 127 + "a",
        "a." * 126 + "a.",
        "x y",
        "a\n",
        "\0",
        "caf\xe9",
        "\u212aelvin",
        "a\x7f",
    ),
    *(
        "1.2.3.4.",
        "0x7f.0.0.1",
        "127.1",
        "12345",
        "1.",
        "a.1b",
        "a.b_",
        "_",
        "-",
        "255.255.255.255",
        "240.0.0.1",
    ),
)


def export(context, length):
    return shake_128(context).digest(length)


def check(pieces, service=SERVICES[0], preference=SUPPORTED):
    """Tell both engines a stream piece by piece; the octets and the outcome of the answer, None while more is awaited."""
    servers = native.KeServers(KeTerms(KEYRING, service, preference), export, RANDOM)
    for piece in pieces:
        expected, found = servers.receive(piece)
        assert found == expected
        if expected is not None:
            return expected
    return None


def check_records(*told, service=SERVICES[0], preference=SUPPORTED):
    stream = records.encode((*told, Record(RecordType.END_OF_MESSAGE, critical=True)))
    return check([stream], service, preference)


def protocols(*numbers, critical=True):
    return Record(RecordType.NEXT_PROTOCOL, b"".join(map(uint16, numbers)), critical=critical)


def algorithms(*numbers, critical=True):
    return Record(RecordType.AEAD_ALGORITHM, b"".join(map(uint16, numbers)), critical=critical)


COMPLIANT = Record(RecordType.COMPLIANT_128GCM_EXPORT)
numbers = st.lists(st.sampled_from((0, 1, 15, 15, 16, 17, 30, 30, 0x4000, 0xFFFF)), max_size=6)
hosts = st.sampled_from(HOSTS).map(lambda host: host.encode("utf-8"))
bodies = st.one_of(
    numbers.map(lambda each: b"".join(map(uint16, each))),
    hosts,
    st.binary(max_size=9),
    st.sampled_from((bytes(1), bytes(255), bytes(4096), uint16(123), uint16(1123), uint16(0), uint16(4123))),
)
ports = st.one_of(st.sampled_from((123, 1123, 2, 4123, 0)).map(uint16), bodies)
odd_records = st.builds(
    Record,
    st.sampled_from((*RecordType, *RecordType, 8, 1023, 1025, 0x3FFF, 0x4000, 0x7FFF)),
    bodies,
    st.booleans(),
)


ENDS = (*(b"\x80\0\0\0",) * 12, b"\0\0\0\0", b"\x80\0\0\1a", b"", b"\x80\0\0", b"\x80\0\0\0a")
optional = st.booleans()


@st.composite
def requests(draw):
    """Records of a usual request, with up to three things changed."""
    told = [
        protocols(*draw(st.sampled_from(((0,), (0,), (0,), (0, 1), (1, 0), (1,), ())))),
        algorithms(*draw(st.one_of(st.just([15]), numbers))),
        *([COMPLIANT] if draw(optional) else []),
        *([Record(RecordType.NTP_SERVER, draw(hosts), critical=True)] if draw(optional) else []),
        *([Record(RecordType.NTP_PORT, draw(ports))] if draw(optional) else []),
    ]
    for _ in range(draw(st.sampled_from((0, 0, 0, 1, 2, 3)))):
        place = draw(st.integers(0, len(told) - 1))
        match draw(st.sampled_from(("odd", "odd", "dropped", "moved", "doubled"))):
            case "odd":
                told.insert(place, draw(odd_records))
            case "dropped" if len(told) > 1:
                del told[place]
            case "moved":
                told.append(told.pop(place))
            case _:
                told.insert(0, told[place])
    return records.encode(told) + draw(st.sampled_from(ENDS))


streams = st.one_of(
    requests(),
    requests(),
    requests(),
    st.builds(lambda stream, length: stream[:length], requests(), st.integers(0, 200)),
    st.builds(
        lambda stream, place, octets: stream[:place] + octets + stream[place + 1 :],
        requests(),
        st.integers(0, 60),
        st.binary(min_size=1, max_size=2),
    ),
    st.binary(max_size=64),
)


@st.composite
def pieces(draw):
    stream = draw(streams)
    cuts = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    return [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


terms = (st.sampled_from(SERVICES), st.sampled_from(PREFERENCES))


@settings(deadline=None, max_examples=400)
@given(pieces(), *terms)
def test_streams_of_all_kinds_are_answered_alike(told, service, preference):
    check(told, service, preference)


@pytest.mark.long
@settings(deadline=None, max_examples=4000)
@given(pieces(), *terms)
def test_many_streams_of_all_kinds_are_answered_alike(told, service, preference):
    check(told, service, preference)


@settings(deadline=None, max_examples=60)
@given(streams)
def test_streams_that_come_octet_by_octet_are_answered_alike(stream):
    check([bytes([octet]) for octet in stream])


# Every kind is among them


def test_every_outcome_is_among_them():
    assert check_records(protocols(0), algorithms(15))[1] == "ok"
    assert check_records(protocols(1), algorithms(15))[1] == "no-protocol"
    assert check_records(protocols(0), algorithms(1))[1] == "no-aead"
    assert check_records(protocols(0), algorithms(15), Record(99, critical=True))[1] == "unknown-critical"
    assert check_records(protocols(0), algorithms(15), Record(99))[1] == "ok"
    assert check_records(algorithms(15))[1] == "bad-request"
    assert check([b"\x80\x01\x00\x02"]) is None


@pytest.mark.parametrize("preference", PREFERENCES)
@pytest.mark.parametrize("is_compliant", [False, True])
@pytest.mark.parametrize(
    "offered", [(15,), (30,), (30, 15), (15, 30), (16,), (17, 16), (17, 16, 15, 30), (1, 15)]
)
def test_the_same_algorithm_is_chosen_and_its_keys_exported(preference, is_compliant, offered):
    told = [protocols(0), algorithms(*offered), *([COMPLIANT] if is_compliant else [])]
    check_records(*told, preference=preference)


@pytest.mark.parametrize("host", [None, *HOSTS], ids=ascii)
def test_wishes_for_a_server_are_granted_alike(host):
    wish = [] if host is None else [Record(RecordType.NTP_SERVER, host.encode("utf-8"))]
    for service in SERVICES:
        for port in (
            None,
            b"",
            b"\0",
            uint16(0),
            uint16(2),
            uint16(123),
            uint16(1123),
            uint16(4123),
            bytes(4),
        ):
            wishes = wish if port is None else [*wish, Record(RecordType.NTP_PORT, port)]
            check_records(protocols(0), algorithms(15), *wishes, service=service)


@pytest.mark.parametrize("excess", [-1, 0, 1])
@pytest.mark.parametrize("step", [1, 1000, 1 << 20])
def test_the_limit_is_the_same(excess, step):
    told = [protocols(0), algorithms(15)]
    length = len(records.encode(told)) + 8
    stream = records.encode(
        [*told, Record(0x2000, bytes(records.MAX_REQUEST - length + excess)), Record(0, critical=True)]
    )
    assert len(stream) == records.MAX_REQUEST + excess
    answer = check([stream[start : start + step] for start in range(0, len(stream), step)])
    assert answer[1] == ("bad-request" if excess > 0 else "ok")


def test_a_captured_request_of_chronyd_is_answered_alike():
    named = tomllib.loads((VECTORS / "chrony-ke-request.toml").read_text())
    assert check([bytes.fromhex(named["request"])])[1] == "ok"


def test_an_exporter_that_fails_is_a_fault_of_our_own():
    def fail(_context, _length):
        raise RuntimeError("no exporter")

    server = nts_engine.KeExchange(
        nts_engine.Keyring([(key.id, key.secret) for key in KEYRING.keys]),
        ((None, 123), []),
        [15],
        fail,
        RANDOM,
    )
    stream = records.encode((protocols(0), algorithms(15), Record(0, critical=True)))
    with pytest.raises(RuntimeError, match="no exporter"):
        server.receive(stream)
