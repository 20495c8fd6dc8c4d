"""What a time daemon answers, and everything that is not an answer."""

import asyncio
import itertools
import os
import socket
import stat
import struct
from datetime import UTC, datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lab.processes import free_port, wait_until
from member_agent.errors import AgentError, ExitStatus
from member_agent.sockets import Endpoint
from member_agent.tracking import (
    AUTO,
    KERNEL,
    ClockSource,
    Daemon,
    Tracking,
    ask,
    is_smeared,
    ntpd_tracking,
    parse_chronyc,
    parse_source,
)
from nts_core import asking, ntptime
from nts_core.asking import Unanswered, parse_variables
from nts_core.packet import Leap

SECOND = 1_000_000_000
NOW = 1_800_000_000 * SECOND
MONTH_END = int(datetime(2026, 12, 31, 18, tzinfo=UTC).timestamp()) * SECOND
MID_MONTH = int(datetime(2026, 12, 15, tzinfo=UTC).timestamp()) * SECOND

# chronyd 4.3, synchronised over NTP to a server of stratum 10 in the laboratory.
REFERENCE = (
    "7F000001,127.0.0.1,11,1795697493.749223026,-0.000002110,0.000002116,0.000002116,-0.995,-0.250,507.770,"
    "0.000007485,0.000457730,0.0,Normal"
)
SOURCE = (
    "127.0.0.1,7F000001,28967,127.0.0.1,7F000001,Normal,4,Server,10,-2,0,-25,0.000000030,0.000000,0.000000,"
    "{},,1795697493.034189237,-0.000002145,0.000007485,0.000000189,0.000059148,0.00,111,111,1111,No,Yes,"
    "Kernel,Kernel,3,3,3,3"
)
# NTPsec 1.2.2 in the laboratory, with the values of a server that has a source.
VARIABLES = (
    "leap=0, stratum=3, precision=-24, rootdelay=12.345, rootdisp=6.789,\r\n"
    "refid=192.0.2.7, reftime=0xeeb2aa08.80000000, tc=6, peer=30611,\r\noffset=-0.123456, "
    'clock=0xeeb2aa09.97298d06, processor="x86_64",\r\nsystem="Linux, and, more", version="ntpd ntpsec-1.2.2"'
    ",\r\nclk_wander=0.000000, mintc=0\r\n"
)


def chronyc(report, **options):
    return parse_chronyc(report, **{"asked_at": 5, "now_ns": NOW, **options})


def tracking_row(**changes):
    fields = REFERENCE.split(",")
    for index, value in changes.items():
        fields[int(index.removeprefix("f"))] = value
    return ",".join(fields)


def ntpd(system=VARIABLES, peer="", **options):
    options = {"asked_at": 5, "now_ns": NOW, **options}
    return ntpd_tracking(parse_variables(system), parse_variables(peer), **options)


# Sources


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("auto", AUTO),
        ("kernel", KERNEL),
        ("chronyd", ClockSource((Daemon.CHRONYD,))),
        ("chronyd:/run/x/socket", ClockSource((Daemon.CHRONYD,), chronyd="/run/x/socket")),
        ("chronyd:[::1]:323", ClockSource((Daemon.CHRONYD,), chronyd=Endpoint("::1", 323))),
        ("ntpd", ClockSource((Daemon.NTPD,), ntpd=Endpoint("127.0.0.1", 123))),
        ("ntpd:127.0.0.2:5123", ClockSource((Daemon.NTPD,), ntpd=Endpoint("127.0.0.2", 5123))),
    ],
)
def test_sources(text, source):
    assert parse_source(text) == source


@pytest.mark.parametrize(
    "text",
    [
        "",
        "chrony",
        "auto:",
        "kernel:x",
        "chronyd:",
        "chronyd:socket",
        "chronyd:-h",
        "chronyd:192.0.2.1:323",
        "ntpd:",
        "ntpd:127.0.0.1",
        "ntpd:127.0.0.1:0",
        "ntpd:192.0.2.1:123",
        "ntpd:/run/socket",
    ],
)
def test_sources_that_are_none(text):
    """Another host's daemon is none: it speaks of another clock."""
    with pytest.raises(AgentError) as caught:
        parse_source(text)
    assert "--clock-source" in caught.value.message
    assert caught.value.remedy
    assert caught.value.status == ExitStatus.CONFIGURATION


# chronyd


def test_chronyds_tracking():
    assert chronyc(REFERENCE + "\n") == Tracking(
        daemon=Daemon.CHRONYD,
        asked_at=5,
        leap=Leap.NONE,
        stratum=11,
        reference_id=bytes((127, 0, 0, 1)),
        reference_ns=1795697493_749223026,
        root_delay_ns=7485,
        root_dispersion_ns=457730 + 2110,
        drift_ppb=250 + 507770 + 15000,
        remark="chronyd does not show whether its source smears",
    )


def test_the_correction_under_way_is_an_error_of_the_clock_that_we_serve():
    """chronyd's own answers have it in them already; the system's clock has not."""
    for sign in ("", "-"):
        found = chronyc(tracking_row(f4=sign + "0.250000000"))
        assert found.root_dispersion_ns == 457730 + 250_000_000
        assert "250 ms off" in found.remark
    assert "off" not in chronyc(REFERENCE).remark


@pytest.mark.parametrize(
    ("words", "leap"), [("Normal", 0), ("Insert second", 1), ("Delete second", 2), ("Not synchronised", 3)]
)
def test_chronyds_leap(words, leap):
    found = chronyc(tracking_row(f13=words))
    assert found.leap == leap
    assert found.is_synchronised == (leap != 3)


def test_chronyd_without_a_source():
    """As chronyd 4.3 says it after its start."""
    row = (
        "00000000,,0,0.000000000,0.000000000,0.000000000,0.000000000,0.000,0.000,0.000,"
        "1.000000000,1.000000000,0.0,Not synchronised"
    )
    found = chronyc(row)
    assert not found.is_synchronised
    assert found.reference_ns is None


@pytest.mark.parametrize("reference_id", ["7F7F01FF", "FE3FFFFF"])
def test_the_smear_of_chronyds_source_is_seen(reference_id):
    found = chronyc(f"{REFERENCE}\n{SOURCE.format(reference_id)}\n", now_ns=MONTH_END)
    assert found.smear_id == bytes.fromhex(reference_id)
    # A hash of an IPv6 address may begin like ntpd's smear; chrony's id is no hash.
    calm = chronyc(f"{REFERENCE}\n{SOURCE.format(reference_id)}\n", now_ns=MID_MONTH)
    assert (calm.smear_id is None) == (reference_id == "FE3FFFFF")


def test_what_cannot_be_known_of_smearing_is_said():
    """chronyd shows its sources to users of its Unix socket only. A reference clock does not smear."""
    assert chronyc(f"{REFERENCE}\n{SOURCE.format('C0000201')}\n").remark == ""
    assert "whether its source smears" in chronyc(f"{REFERENCE}\n501 Not authorised\n").remark
    assert chronyc(tracking_row(f0="50505300", f1="PPS", f2="1")).remark == ""


def test_the_smear_of_another_source_is_not_ours():
    row = SOURCE.format("7F7F01FF").replace("127.0.0.1,", "192.0.2.1,", 1)
    assert chronyc(f"{REFERENCE}\n{row}\n").smear_id is None


@pytest.mark.parametrize(
    "rest", ["501 Not authorised", "127.0.0.1,", SOURCE.format("xyz"), SOURCE.format("")]
)
def test_sources_that_are_not_shown_leave_the_tracking_good(rest):
    assert chronyc(f"{REFERENCE}\n{rest}\n") == chronyc(REFERENCE)


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ("", "says nothing"),
        ("506 Cannot talk to daemon\n", "506 Cannot talk to daemon"),
        ("\x1b[31m" + "x" * 5000, "[31mxxx"),
        (tracking_row(f0="7F0000"), "makes no sense"),
        (tracking_row(f0="7F00000g"), "not understood"),
        (tracking_row(f2="17"), "makes no sense"),
        (tracking_row(f2="-1"), "makes no sense"),
        (tracking_row(f11="-0.1"), "makes no sense"),
        (tracking_row(f11="nan"), "not understood"),
        (tracking_row(f11="1e9"), "not understood"),
        (tracking_row(f11="9" * 16), "not understood"),
        (tracking_row(f13="Fine"), "not understood"),
        (REFERENCE + ",more", "7F000001,127.0.0.1"),
    ],
)
def test_reports_that_are_none(report, words):
    with pytest.raises(Unanswered) as caught:
        chronyc(report)
    said = str(caught.value)
    assert words in said
    assert said.isprintable()
    assert len(said) < 100


FIELDS = st.one_of(
    st.sampled_from(REFERENCE.split(",")), st.text(max_size=12), st.decimals().map(str), st.just("9" * 15)
)


@given(st.one_of(st.text(), st.lists(FIELDS, min_size=14, max_size=14).map(",".join)))
def test_any_report_is_tracking_or_a_tracking_error(report):
    try:
        found = chronyc(report)
    except Unanswered:
        return
    assert 0 <= found.stratum <= 16
    assert min(found.root_delay_ns, found.root_dispersion_ns) >= 0
    assert found.drift_ppb >= 15_000


# ntpd


def test_ntpds_variables():
    assert ntpd() == Tracking(
        daemon=Daemon.NTPD,
        asked_at=5,
        leap=Leap.NONE,
        stratum=3,
        reference_id=bytes((192, 0, 2, 7)),
        reference_ns=(0xEEB2AA08 - ntptime.UNIX_EPOCH) * SECOND + SECOND // 2,
        root_delay_ns=12_345_000,
        root_dispersion_ns=6_789_000,
    )


def test_classic_ntpd_writes_timestamps_without_0x():
    assert ntpd(VARIABLES.replace("0xeeb2aa08", "eeb2aa08")) == ntpd()


def test_ntpd_with_a_reference_clock():
    found = ntpd(VARIABLES.replace("refid=192.0.2.7", "refid=PPS").replace("stratum=3", "stratum=1"))
    assert (found.reference_id, found.stratum) == (b"PPS\0", 1)


def test_ntpd_without_a_source():
    unready = VARIABLES.replace("leap=0", "leap=3").replace("stratum=3", "stratum=16")
    found = ntpd(unready.replace("192.0.2.7", "INIT").replace("0xeeb2aa08.80000000", "0x00000000.00000000"))
    assert not found.is_synchronised
    assert found.reference_ns is None


def test_the_smear_of_ntpds_source_is_seen():
    assert ntpd(peer="srcadr=192.0.2.7, refid=254.63.255.255", now_ns=MONTH_END).smear_id == bytes(
        (254, 63, 255, 255)
    )
    assert ntpd(peer="refid=254.63.255.255", now_ns=MID_MONTH).smear_id is None
    assert ntpd(peer="refid=127.127.1.255").smear_id == bytes((127, 127, 1, 255))
    assert ntpd(peer="refid=192.0.2.9").smear_id is None
    assert ntpd(peer="refid=toolong").smear_id is None


def test_ntpds_own_smear_is_told_as_not_ours():
    """It is in what ntpd sends, not in the system's clock."""
    found = ntpd(VARIABLES.replace("mintc=0", "leapsmearinterval=86400, leapsmearoffset=-12.5"))
    assert found.smear_id is None
    assert "this server does not" in found.remark
    assert ntpd(VARIABLES.replace("mintc=0", "leapsmearoffset=-0.000000")).remark == ""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("leap=0", "leap=4"),
        ("leap=0", "peal=0"),
        ("stratum=3", "stratum=17"),
        ("stratum=3", "stratum=x"),
        ("rootdisp=6.789", "rootdisp=-1"),
        ("rootdisp=6.789", "rootdisp=inf"),
        ("refid=192.0.2.7", "refid=192.0.2.777"),
        ("refid=192.0.2.7", "refid=\xe9"),
        ("reftime=0xeeb2aa08.80000000", "reftime=0xeeb2aa08"),
    ],
)
def test_variables_that_make_no_sense(old, new):
    assert old in VARIABLES
    with pytest.raises(Unanswered):
        ntpd(VARIABLES.replace(old, new))


@given(st.text())
def test_any_text_is_variables(text):
    assert all(isinstance(value, str) for value in parse_variables(text).values())


@given(st.dictionaries(st.sampled_from(sorted(parse_variables(VARIABLES))), st.text(max_size=20)))
def test_any_variables_are_tracking_or_a_tracking_error(changes):
    try:
        found = ntpd_tracking({**parse_variables(VARIABLES), **changes}, changes, asked_at=0, now_ns=NOW)
    except Unanswered:
        return
    assert len(found.reference_id) == 4


def fragment(
    sequence, data=b"", *, association=0, offset=0, more=False, operation=0x82, count=None, first=0x16
):
    return struct.pack(
        "!BBHHHHH",
        first,
        operation | more << 5,
        sequence,
        0,
        association,
        offset,
        len(data) if count is None else count,
    ) + data.ljust(-(-len(data) // 4) * 4, b"\0")


@given(st.binary(max_size=2000), st.data())
def test_fragments_in_any_order_make_the_text(octets, data):
    text = bytes(octet & 0x7F for octet in octets)
    cuts = sorted({0, len(text), *data.draw(st.lists(st.integers(0, len(text)), max_size=10))})
    spans = list(itertools.pairwise(cuts)) or [(0, 0)]
    parts = [fragment(7, text[a:b], offset=a, more=b != len(text)) for a, b in spans]
    answer = asking._Answer(2, 7, 0)
    found = [answer.add(part) for part in data.draw(st.permutations(parts))]
    assert found[-1] == text
    assert found[:-1] == [None] * (len(parts) - 1)


@given(st.lists(st.binary(max_size=40), max_size=5))
@example([fragment(7, b"x", offset=0xFFFF)])
@example([fragment(7, b"x", count=2000)])
def test_any_datagrams_are_an_answer_nothing_or_a_tracking_error(datagrams):
    answer = asking._Answer(2, 7, 0)
    try:
        for datagram in datagrams:
            answer.add(datagram)
    except Unanswered:
        pass


@pytest.mark.parametrize(
    "stranger",
    [
        b"",
        fragment(8, b"a=1"),
        fragment(7, b"a=1", association=2),
        fragment(7, b"a=1", operation=0x02),
        fragment(7, b"a=1", operation=0x81),
        fragment(7, b"a=1", first=0x24),
    ],
)
def test_answers_to_somebody_else_are_left_out(stranger):
    assert asking._Answer(2, 7, 0).add(stranger) is None


# Smearing


def test_what_smearing_looks_like():
    assert is_smeared(bytes((127, 127, 1, 255)), MID_MONTH)
    assert is_smeared(bytes((254, 0, 0, 1)), MONTH_END)
    assert is_smeared(bytes((254, 0, 0, 1)), MONTH_END + 12 * 3600 * SECOND)
    assert not is_smeared(bytes((254, 0, 0, 1)), MID_MONTH)
    assert not is_smeared(bytes((127, 127, 1, 1)), MONTH_END)


# Growing old


@given(st.integers(0, 10**15), st.integers(0, 10**12), st.integers(0, 10**12))
def test_the_error_grows_with_time(drift, young, older):
    found = ntpd()
    assert found.dispersion_ns(0) == found.root_dispersion_ns
    assert found.dispersion_ns(young) <= found.dispersion_ns(young + older)
    assert found.dispersion_ns(1000 * SECOND) == found.root_dispersion_ns + 15_000_000


# Programs and sockets


def program(directory, text, monkeypatch):
    """A `chronyc` that is none, first on the PATH."""
    script = directory / "chronyc"
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


CHRONYD = ClockSource((Daemon.CHRONYD,))


async def test_without_chronyc(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unanswered, match="no chronyc on the PATH"):
        await ask(CHRONYD)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("exit 1", "says nothing"),
        ("head -c 5000 /dev/urandom", "chronyd: "),
        ("exec yes", "answers too much"),
        ("yes & wait", "answers too much"),
        ("sleep 600 & wait", "does not end"),
        ("exec >&-; exec sleep 600", "does not end"),
    ],
)
async def test_a_chronyc_that_is_none_ends_in_time(tmp_path, monkeypatch, text, words):
    """Nothing of it stays behind either, its children included."""
    program(tmp_path, f"echo $$ > {tmp_path}/pid\n{text}", monkeypatch)
    with pytest.raises(Unanswered, match=words):
        await ask(CHRONYD)
    group = int((tmp_path / "pid").read_text())
    wait_until(lambda: not is_group(group), "the end of chronyc's processes")


def is_group(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_chronyc_that_does_not_start(tmp_path, monkeypatch):
    script = tmp_path / "chronyc"
    script.write_text("#!/does/not/exist\n")
    script.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unanswered, match="does not start"):
        await ask(CHRONYD)


async def test_a_question_that_is_given_up_leaves_nothing_behind(tmp_path, monkeypatch):
    program(
        tmp_path, f"echo $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; sleep 600 & wait", monkeypatch
    )
    question = asyncio.create_task(ask(CHRONYD))
    await asyncio.to_thread(wait_until, (tmp_path / "pid").exists, "the start of chronyc")
    question.cancel()
    with pytest.raises(asyncio.CancelledError):
        await question
    group = int((tmp_path / "pid").read_text())
    wait_until(lambda: not is_group(group), "the end of chronyc's processes")


class FakeNtpd(asyncio.DatagramProtocol):
    """Answers each request with what `respond` makes of its sequence and association."""

    def __init__(self, respond):
        self.respond = respond

    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, addr):
        _, _, sequence, _, association, _, _ = struct.unpack_from("!BBHHHHH", data)
        for datagram in self.respond(sequence, association):
            self.transport.sendto(datagram, addr)


async def ask_fake(respond):
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: FakeNtpd(respond), local_addr=("127.0.0.1", 0))
    try:
        port = transport.get_extra_info("sockname")[1]
        return await ask(ClockSource((Daemon.NTPD,), ntpd=Endpoint("127.0.0.1", port)))
    finally:
        transport.close()


async def test_an_answer_in_fragments_with_strangers_between():
    def respond(sequence, association):
        text = VARIABLES.encode() if association == 0 else b"srcadr=192.0.2.7, refid=127.127.1.255"
        yield b"?"
        yield fragment(sequence, text[20:], association=association, offset=20)
        yield fragment(sequence ^ 1, b"leap=3", association=association)
        yield fragment(sequence, text[:20], association=association, more=True)

    found = await ask_fake(respond)
    assert (found.stratum, found.leap) == (3, Leap.NONE)
    assert found.smear_id == bytes((127, 127, 1, 255))


async def test_a_peer_that_is_gone_leaves_the_rest_good():
    def respond(sequence, association):
        if association:
            return [fragment(sequence, association=association, operation=0xC2)]
        return [fragment(sequence, VARIABLES.encode())]

    assert (await ask_fake(respond)).stratum == 3


@pytest.mark.parametrize(
    ("respond", "words"),
    [
        (lambda *_: [], "no answer"),
        (lambda *_: [os.urandom(100)] * 10, "no answer|has no end"),
        (lambda sequence, _: [fragment(sequence, operation=0xC2)], "refuses"),
        (lambda sequence, _: [fragment(sequence)], "not understood"),
        (lambda sequence, _: [fragment(sequence, b"x" * 400, offset=0x8000)], "not well-formed"),
        (lambda sequence, _: [fragment(sequence, b"x", count=900)], "not well-formed"),
        (
            lambda sequence, _: [fragment(sequence, b"x" * 4, offset=4 * i, more=True) for i in range(200)],
            "has no end",
        ),
    ],
)
async def test_an_ntpd_that_is_none(respond, words):
    with pytest.raises(Unanswered, match=words):
        await ask_fake(respond)


async def test_nobody_on_ntpds_port():
    with pytest.raises(Unanswered, match="refused"):
        await ask(ClockSource((Daemon.NTPD,), ntpd=Endpoint("127.0.0.1", free_port())))


async def test_both_reasons_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    source = ClockSource((Daemon.CHRONYD, Daemon.NTPD), ntpd=Endpoint("127.0.0.1", free_port()))
    with pytest.raises(Unanswered, match=r"no chronyc on the PATH; ntpd: .*refused"):
        await ask(source)


async def test_the_first_daemon_that_answers_counts(tmp_path, monkeypatch):
    program(tmp_path, f"echo '{REFERENCE}'", monkeypatch)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        found = await ask(ClockSource((Daemon.CHRONYD, Daemon.NTPD), ntpd=Endpoint(*silent.getsockname())))
    assert found.daemon is Daemon.CHRONYD
