"""What the daemons are told, what they say, and when that counts."""

import asyncio
import json
import os
import stat
import struct
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nts_core.asking import Unanswered
from nts_core.client import ClientError, Failure
from nts_core.feeding import Kind, Member, Verdict, chrony, member_of, ntpd_rs, ntpsec
from nts_core.feeding import hand as hands
from nts_core.feeding.hand import DAEMONS, Hand
from nts_core.feeding.judge import LEAST_LOOKS, PATIENCE, Judge
from nts_core.roster import Fault

POOL = "pool.example"
A, B, C, D = (Member(f"{name}.servers.{POOL}") for name in "abcd")
ELSEWHERE = Member(f"e.servers.{POOL}", 14460)

names = st.sampled_from("abcdef").map(lambda label: f"{label}.servers.{POOL}")
members = st.lists(st.builds(Member, names, st.integers(1, 65535)), unique_by=lambda member: member.name)


# Lines


@pytest.mark.parametrize("kind", Kind)
@given(chosen=members)
def test_whoever_is_written_is_read(kind, chosen):
    daemon = DAEMONS[kind]
    text = "\n".join(line for member in chosen for line in daemon.lines(member, ()))
    assert daemon.members(text) == tuple(chosen)


@pytest.mark.parametrize("kind", Kind)
@given(text=st.text(max_size=300))
def test_any_text_names_members_or_nobody(kind, text):
    for member in DAEMONS[kind].members(text):
        assert member_of(str(member)) == member


def test_the_lines_of_each_daemon():
    assert chrony.lines(A, ["minpoll 6"]) == ["server a.servers.pool.example nts iburst minpoll 6"]
    assert chrony.lines(ELSEWHERE, []) == ["server e.servers.pool.example nts iburst ntsport 14460"]
    assert ntpsec.lines(A, []) == ["server a.servers.pool.example nts iburst"]
    assert ntpsec.lines(ELSEWHERE, []) == ["server e.servers.pool.example:14460 nts iburst"]
    assert tomllib.loads("\n".join(ntpd_rs.lines(A, ["ntp-version = 4"]))) == {
        "source": [{"mode": "nts", "address": "a.servers.pool.example:4460", "ntp-version": 4}]
    }


# Answers

CHRONYC = """\
^,-,a.servers.pool.example,2,6,377,0,-0.000001549,-0.000002481,0.000147874
^,*,B.servers.pool.example,2,6,377,0,-0.000000728,-0.000001885,0.000146943
^,x,c.servers.pool.example,2,6,377,0,-4.999986172,-4.999986172,0.000130430
^,?,d.servers.pool.example,0,6,0,4294967295,0.000000000,0.000000000,0.000000000
^,?,e.servers.pool.example,0,6,0,4294967295,0.000000000,0.000000000,0.000000000
^,?,f.servers.pool.example,2,6,17,10,0.000000000,0.000000000,0.000000000
^,~,g.servers.pool.example,2,6,377,10,0.000000000,0.000000000,0.000000000
#,+,PPS0,0,4,377,10,0.000000000,0.000000000,0.000000000
a.servers.pool.example,NTS,1,15,256,2,0,0,8,100
c.servers.pool.example,NTS,1,15,256,2,0,0,8,100
d.servers.pool.example,NTS,0,0,0,4294967295,7,0,0,0
e.servers.pool.example,NTS,1,15,256,100,0,0,4,100
"""


def test_what_chronyd_says():
    found = {name[0]: verdict for name, verdict in chrony.verdicts(CHRONYC).items()}
    assert found["a"] == found["b"] == Verdict(is_good=True)
    assert {name: verdict.fault for name, verdict in found.items() if not verdict.is_good} == {
        "c": Fault.FALSETICKER,
        "d": Fault.UNREACHABLE,
        "e": Fault.UNREACHABLE,
        "f": Fault.UNFIT,
        "g": Fault.UNFIT,
    }
    assert found["d"].reason == "chronyd got no keys from it"
    assert found["e"].reason == "it has not answered chronyd eight times"


def test_a_chronyd_without_sources_or_one_that_is_away():
    assert chrony.verdicts("") == {}
    with pytest.raises(Unanswered, match="506 Cannot talk to daemon"):
        chrony.verdicts("506 Cannot talk to daemon\n")


def observed(*sources):
    """ntpd-rs's document with sources of these letters, offsets and numbers of polls without an answer."""
    return json.dumps(
        {
            "sources": [
                {
                    "name": f"{letter}.servers.{POOL}:4460",
                    "offset": offset,
                    "uncertainty": uncertainty,
                    "delay": 0.02,
                    "remote_delay": 0.0,
                    "remote_uncertainty": 0.0,
                    "unanswered_polls": unanswered,
                    "nts_cookies": 8,
                }
                for letter, offset, uncertainty, unanswered in sources
            ]
        }
    ).encode()


def test_what_ntpd_rs_measured_tells_who_is_outvoted():
    good = [(letter, 0.001, 0.0001, 0) for letter in "abc"]
    document = observed(*good, ("d", 5.0, 0.0001, 0), ("e", 0.0, 0.0001, 8), ("f", 0.0, 9.0, 0))
    found = {name[0]: verdict for name, verdict in ntpd_rs.verdicts(document).items()}
    assert all(found[letter] == Verdict(is_good=True) for letter in "abc")
    assert [found[letter].fault for letter in "def"] == [
        Fault.FALSETICKER,
        Fault.UNREACHABLE,
        Fault.UNFIT,
    ]


def test_without_a_majority_ntpd_rs_says_nothing_of_anybody():
    document = observed(("a", 0.0, 0.0001, 0), ("b", 5.0, 0.0001, 0))
    assert set(ntpd_rs.verdicts(document).values()) == {Verdict()}


@pytest.mark.parametrize(
    ("selection", "reach", "cookies", "fault"),
    [
        (0, "0x0", "-1", Fault.UNREACHABLE),
        (0, "0x0", "5", Fault.UNREACHABLE),
        (0, "0x7", "8", Fault.UNFIT),
        (1, "0xff", "8", Fault.FALSETICKER),
        (3, "0xff", "8", None),
        (6, "0xff", "8", None),
    ],
)
def test_what_ntpd_says(selection, reach, cookies, fault):
    found = ntpsec.verdict(0xF000 | selection << 8 | 0x14, {"reach": reach, "ntscookies": cookies})
    assert found.fault is fault
    assert found.is_good == (fault is None)


def answered(ask):
    """The verdicts; none when there is no answer, for a reason that is fit to be shown."""
    try:
        return ask()
    except Unanswered as error:
        reason = str(error)
    assert len(reason) < 120
    assert reason.isprintable()
    return {}


_rows = st.lists(
    st.one_of(
        st.sampled_from(CHRONYC.splitlines()),
        st.text(max_size=60),
        st.text(st.sampled_from("^,?x-19"), max_size=40),
    )
)


@given(_rows.map("\n".join))
def test_any_report_of_chronyc_is_verdicts_or_no_answer(report):
    found = answered(lambda: chrony.verdicts(report))
    assert all(verdict.reason.isprintable() for verdict in found.values())


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["sources", "name", "offset", "delay"]), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(st.one_of(st.binary(max_size=100), _json.map(json.dumps).map(str.encode)))
def test_any_document_of_ntpd_rs_is_verdicts_or_no_answer(document):
    answered(lambda: ntpd_rs.verdicts(document))


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdefgh"), *[st.floats(-1e10, 1e10)] * 2, st.integers(0, 10**30)),
        max_size=9,
    )
)
def test_any_numbers_of_ntpd_rs_are_verdicts(sources):
    assert len(ntpd_rs.verdicts(observed(*sources))) <= 8


@given(st.integers(0, 65535), st.dictionaries(st.sampled_from(["reach", "ntscookies"]), st.text(max_size=9)))
def test_any_peer_of_ntpd_has_a_verdict(status, peer):
    assert ntpsec.verdict(status, peer).reason.isprintable()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("[observability]\n", "names no observation-path"),
        ("observability = 5\n", "is not understood"),
        ("\x00", "is not understood"),
        ("[observability]\nobservation-path = '/nowhere/at/all'\n", "/nowhere/at/all: No such file"),
    ],
)
async def test_an_ntpd_rs_that_cannot_be_asked(tmp_path, text, words):
    if text is not None:
        (tmp_path / "ntp.toml").write_text(text)
    with pytest.raises(Unanswered, match=words):
        await ntpd_rs.ask(tmp_path)


@pytest.mark.parametrize(
    ("octets", "words"),
    [
        (b"", "cut short"),
        (struct.pack("!Q", 1 << 40), "too much"),
        (struct.pack("!Q", 10) + b"{}", "cut short"),
        (struct.pack("!Q", 2) + b"{}", "is not understood"),
    ],
)
async def test_an_ntpd_rs_that_answers_garbage(tmp_path, octets, words):
    async def answer(_reader, writer):
        writer.write(octets)
        writer.close()

    place = tmp_path / "observe"
    (tmp_path / "ntp.toml").write_text(f'[observability]\nobservation-path = "{place}"\n')
    async with await asyncio.start_unix_server(answer, place):
        with pytest.raises(Unanswered, match=words):
            await ntpd_rs.ask(tmp_path)


# When it counts

LIAR, DEAD, VAGUE, GOOD = (
    Verdict(fault=Fault.FALSETICKER, reason="lies"),
    Verdict(fault=Fault.UNREACHABLE, reason="dead"),
    Verdict(fault=Fault.UNFIT, reason="vague"),
    Verdict(is_good=True),
)


def hear(verdicts, *, judge=None, looks=1000, every=60.0, is_online=True):
    """Who is dismissed, and after how many seconds, when it is always the same."""
    judge = judge or Judge()
    for number in range(looks):
        found = judge.heard(verdicts, number * every, is_online=is_online)
        if found:
            return [(dismissal.name, dismissal.fault) for dismissal in found], number * every
    return [], None


@pytest.mark.parametrize(
    ("verdict", "fault"), [(LIAR, Fault.FALSETICKER), (DEAD, Fault.UNREACHABLE), (VAGUE, Fault.UNFIT)]
)
def test_what_lasts_counts(verdict, fault):
    assert hear({"a": verdict, "b": GOOD, "c": GOOD}) == ([("a", fault)], PATIENCE[fault])


def test_few_looks_are_not_enough_however_long_it_takes():
    verdicts = {"a": LIAR, "b": GOOD, "c": GOOD}
    assert hear(verdicts, every=86_400.0) == ([("a", Fault.FALSETICKER)], (LEAST_LOOKS - 1) * 86_400.0)


@pytest.mark.parametrize("between", [GOOD, DEAD, Verdict(), None])
def test_one_other_word_begins_it_anew(between):
    judge = Judge()
    others = {"b": GOOD, "c": GOOD}
    for number in range(200):
        verdict = between if number % 8 == 7 else LIAR
        assert judge.heard({"a": verdict, **others}, number * 60.0, is_online=True) == []


def test_a_silence_begins_it_anew():
    judge = Judge()
    for number in range(200):
        assert judge.heard({"a": LIAR, "b": GOOD, "c": GOOD}, number * 60.0, is_online=True) == []
        if number % 8 == 7:
            judge.silence()


def test_nobody_is_outvoted_by_one():
    assert hear({"a": LIAR, "b": GOOD, "c": DEAD}, is_online=False) == ([("c", Fault.UNREACHABLE)], 1200.0)
    assert hear({"a": LIAR, "b": GOOD}) == ([], None)
    assert hear(dict.fromkeys("abcd", LIAR)) == ([], None)


def test_a_host_without_a_network_blames_nobody():
    for verdict in (DEAD, VAGUE):
        assert hear(dict.fromkeys("abcd", verdict), is_online=False) == ([], None)


def test_when_dns_answers_and_nobody_is_reached_others_are_tried():
    found, after = hear(dict.fromkeys("ab", DEAD))
    assert found == [("a", Fault.UNREACHED), ("b", Fault.UNREACHED)]
    assert after == PATIENCE[Fault.UNREACHABLE]


# Telling


@pytest.fixture
def script(tmp_path):
    """A command that notes each time that it ran, and fails if there is a file `broken`."""
    program = tmp_path / "tell"
    program.write_text(
        f"#!/bin/sh\necho told >> {tmp_path}/log\nif [ -e {tmp_path}/broken ]; then echo no; exit 3; fi\n"
    )
    program.chmod(stat.S_IRWXU)
    return program


@pytest.fixture
def told(tmp_path):
    log = tmp_path / "log"
    return lambda: log.read_text().count("told") if log.exists() else 0


@pytest.fixture
def make(tmp_path, script):
    directory = tmp_path / "dir"
    directory.mkdir()
    (directory / "ntp.toml").write_text('[observability]\nlog-level = "info"\n')

    def made(kind, pool=POOL, **options):
        return Hand(DAEMONS[kind], pool, **({"directory": directory, "tell": [str(script)]} | options))

    return made


def age(hand, seconds):
    """The daemon was told so long ago."""
    file = hand._told
    moment = file.stat().st_mtime - seconds
    os.utime(file, (moment, moment))


@pytest.mark.parametrize("kind", Kind)
async def test_a_daemon_is_told_once_of_what_is_new(make, told, kind):
    hand = make(kind)
    assert await hand.members() == ()
    applied = await hand.apply([B, A, ELSEWHERE])
    assert (applied.members, applied.is_told, applied.due_in) == ((A, B, ELSEWHERE), True, None)
    assert await make(kind).members() == (A, B, ELSEWHERE)
    before = hand.path.stat()
    again = await make(kind).apply([A, B, ELSEWHERE])
    assert (again.is_told, again.due_in) == (False, None)
    assert hand.path.stat().st_ino == before.st_ino
    assert told() == 1


@pytest.mark.parametrize("kind", Kind)
async def test_nobody_to_tell_of_is_nothing_to_write(make, told, kind):
    hand = make(kind)
    await hand.apply([])
    assert told() == 0
    assert not hand.path.exists() or "written by" not in hand.path.read_text()


@pytest.mark.parametrize("kind", Kind)
async def test_the_last_one_can_be_taken_away(make, told, kind):
    hand = make(kind)
    await hand.apply([A])
    await hand.apply([], is_urgent=True)
    assert await hand.members() == ()
    assert told() == 2


async def test_a_daemon_that_need_not_restart_is_told_at_once(make, told):
    hand = make(Kind.CHRONY)
    await hand.apply([A, B])
    await hand.apply([B, C])
    assert told() == 2
    assert stat.S_IMODE(hand.path.stat().st_mode) == 0o644


@pytest.mark.parametrize("kind", [Kind.NTPD_RS, Kind.NTPSEC])
async def test_a_daemon_that_restarts_is_told_once_an_hour(make, told, kind):
    hand = make(kind)
    await hand.apply([A, B])
    waiting = await make(kind).apply([B, C])
    assert 3500 < waiting.due_in <= 3600
    assert waiting.members == (A, B)
    assert await hand.members() == (A, B)
    age(hand, 3601)
    assert (await make(kind).apply([B, C])).members == (B, C)
    assert told() == 2


async def test_who_is_gone_leaves_at_once(make, told):
    hand = make(Kind.NTPSEC)
    await hand.apply([A, B])
    assert (await hand.apply([B, C], is_urgent=True)).is_told
    assert told() == 2


async def test_after_a_clock_that_was_far_ahead_nobody_waits_for_it(make):
    hand = make(Kind.NTPSEC)
    await hand.apply([A, B])
    age(hand, -86_400 * 365)
    assert (await hand.apply([B, C])).is_told


@pytest.mark.parametrize("kind", Kind)
async def test_a_daemon_that_was_not_told_is_told_again_also_by_a_later_feed(make, told, tmp_path, kind):
    hand = make(kind)
    await hand.apply([A])
    (tmp_path / "broken").touch()
    with pytest.raises(ClientError) as caught:
        await hand.apply([A, B], is_urgent=True)
    assert caught.value.code is Failure.DAEMON
    assert "ends with 3" in caught.value.message
    assert "no" in caught.value.message
    with pytest.raises(ClientError):
        await make(kind).apply([A, B])
    (tmp_path / "broken").unlink()
    assert (await make(kind).apply([A, B])).is_told
    assert told() == 4


async def test_a_file_that_was_removed_is_written_again(make, told):
    hand = make(Kind.NTPSEC)
    await hand.apply([A])
    hand.path.unlink()
    assert (await hand.apply([A])).is_told
    assert told() == 2


@pytest.mark.parametrize(
    ("command", "words"),
    [(["/does/not/exist"], "No such file"), (["sh", "-c", "exec sleep 600"], "does not end")],
)
async def test_a_command_that_is_none_or_has_no_end(make, monkeypatch, command, words):
    monkeypatch.setattr(hands, "TELL_DEADLINE", 0.2)
    with pytest.raises(ClientError, match=words):
        await make(Kind.CHRONY, tell=command).apply([A])


# ntpd-rs's file is the user's

USERS = """\
# mine
[observability]
log-level = "info"
[[source]]
mode = "server"
address = "192.0.2.1"
"""


@pytest.fixture
def ntp_toml(make):
    file = make(Kind.NTPD_RS).path
    file.write_text(USERS)
    file.chmod(0o640)
    return file


async def test_what_the_user_wrote_stays(make, ntp_toml):
    hand, other = make(Kind.NTPD_RS), make(Kind.NTPD_RS, "other.example")
    await hand.apply([A])
    await other.apply([D])
    assert await hand.members() == (A,)
    assert await other.members() == (D,)
    await hand.apply([B], is_urgent=True)
    sources = tomllib.loads(ntp_toml.read_text())["source"]
    assert [source["address"] for source in sources] == ["192.0.2.1", str(B), str(D)]
    assert stat.S_IMODE(ntp_toml.stat().st_mode) == 0o640
    await hand.apply([], is_urgent=True)
    await other.apply([], is_urgent=True)
    assert ntp_toml.read_text() == USERS


async def test_a_link_stays_one(make, ntp_toml, tmp_path):
    real = tmp_path / "real.toml"
    ntp_toml.rename(real)
    ntp_toml.symlink_to(real)
    await make(Kind.NTPD_RS).apply([A])
    assert ntp_toml.is_symlink()
    assert str(A) in real.read_text()


async def test_options_are_lines_of_each_source(make, ntp_toml):
    hand = make(Kind.NTPD_RS, options=['certificate-authority = "/root.pem"'])
    await hand.apply([A, B])
    ours = [source for source in tomllib.loads(ntp_toml.read_text())["source"] if source["mode"] == "nts"]
    assert [source["certificate-authority"] for source in ours] == ["/root.pem"] * 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("source = []\n", "cannot be extended"),
        ("[broken\n", "cannot be extended"),
        ("x" * 1_100_000, "too long"),
        ("\udcff", "not text"),
    ],
)
async def test_a_file_that_cannot_be_extended_stays(make, ntp_toml, told, text, words):
    ntp_toml.write_text(text, errors="surrogateescape")
    with pytest.raises(ClientError, match=words) as caught:
        await make(Kind.NTPD_RS).apply([A])
    assert caught.value.code is Failure.CONFIGURATION
    assert caught.value.remedy
    assert ntp_toml.read_text(errors="surrogateescape") == text
    assert told() == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text + "ntp-version = 4\n", "would belong to it"),
        (lambda text: "\n".join(text.splitlines()[:-1]), "last line of our part"),
    ],
)
async def test_what_was_changed_around_our_part_is_told(make, ntp_toml, change, words):
    hand = make(Kind.NTPD_RS)
    await hand.apply([A])
    ntp_toml.write_text(change(ntp_toml.read_text()))
    with pytest.raises(ClientError, match=words):
        await hand.apply([B], is_urgent=True)


# Places


async def test_a_file_of_somebody_else_stays(make):
    hand = make(Kind.CHRONY)
    hand.path.write_text("server ntp.example iburst\n")
    with pytest.raises(ClientError, match="something else"):
        await hand.apply([A])
    assert hand.path.read_text() == "server ntp.example iburst\n"


@pytest.mark.parametrize("kind", Kind)
async def test_a_directory_that_is_not_there(make, tmp_path, kind):
    hand = make(kind, directory=tmp_path / "nowhere")
    with pytest.raises(ClientError, match="there is no such") as caught:
        await hand.members()
    assert "--dir" in caught.value.remedy


async def test_a_directory_without_rights(make, tmp_path):
    """A file in its place refuses everybody, also root."""
    place = tmp_path / "file"
    place.touch()
    with pytest.raises(ClientError, match=r"there is no such|Not a directory"):
        await make(Kind.CHRONY, directory=place).apply([A])


async def test_a_full_disk_changes_nothing(make, monkeypatch, told):
    hand = make(Kind.CHRONY)
    await hand.apply([A])

    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hands, "write_aside", full)
    with pytest.raises(ClientError, match="No space left"):
        await hand.apply([B])
    assert await hand.members() == (A,)
    assert told() == 1
