"""What a pool's client shows to people and to machines."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from nts_core import show
from nts_core.independence import Bond, Candidate, GivenUp
from nts_core.metadata import Metadata
from nts_core.panel import Reading, Standing
from nts_core.pool import PoolView, SourceView
from nts_core.resolve import ResolveError
from nts_core.roster import Fault, Hold

ALICE = SourceView(
    Candidate(
        "alice.servers.pool.example", 4460, 0, ("192.0.2.1",), Metadata("abcdefghij234", (64500,), ("DE",))
    ),
    address="192.0.2.1",
    standing=Standing.TRUECHIMER,
    offset=1_500_000,
    delay=20_000_000,
    samples=9,
    next_in=64.0,
    is_listed=True,
)
BOB = SourceView(
    Candidate("bob.servers.pool.example"),
    standing=Standing.FALSETICKER,
    trouble="its time disagrees with the majority",
    hold=Hold(3600.0, 1, Fault.FALSETICKER, "its time disagrees with the majority"),
)
VIEW = PoolView(
    pool="pool.example",
    sources=(ALICE,),
    held=(BOB,),
    unusable={"carol.servers.pool.example": "carol has no addresses"},
    given_up=(GivenUp((ALICE.candidate.name, "dave.servers.pool.example"), (Bond.OPERATOR,)),),
    reading=Reading(1_795_793_577_000_000_000, 6_000_000, 1_500_000, (ALICE.candidate.name,)),
    problem=None,
    look_in=42.0,
    is_settled=True,
    warnings=("a warning",),
)
OUTAGE = ResolveError("resolver-unreachable", "nobody answers", "wait")


def drawn(view, **options):
    console = Console(file=io.StringIO(), width=200)
    console.print(show.table(view, **options))
    return console.file.getvalue()


def test_a_document_has_everybody_and_is_json():
    document = json.loads(json.dumps(show.document(VIEW)))
    assert [(each["name"][:3], each["verdict"]) for each in document["sources"]] == [
        ("ali", "truechimer"),
        ("bob", "falseticker"),
        ("car", "failed"),
    ]
    assert document["sources"][0]["operator"] == "abcdefghij234"
    assert document["sources"][1]["held_s"] == 3600.0
    assert document["sources"][2]["reason"] == "carol has no addresses"
    assert (document["offset_ns"], document["error_ns"], document["agreeing"]) == (1_500_000, 6_000_000, 1)
    assert document["not_independent"] == [{"names": list(VIEW.given_up[0].names), "same": ["operator"]}]
    assert (document["problem"], document["next_look_s"], document["warnings"]) == (None, 42.0, ["a warning"])


@pytest.mark.parametrize(
    ("standing", "word"),
    [
        (Standing.TRUECHIMER, "truechimer"),
        (Standing.FALSETICKER, "falseticker"),
        (Standing.PENDING, "pending"),
        (Standing.UNFIT, "failed"),
        (Standing.SILENT, "failed"),
    ],
)
def test_verdicts(standing, word):
    assert show.verdict(replace(ALICE, standing=standing)) == word
    assert show.verdict(replace(BOB, hold=replace(BOB.hold, fault=Fault.REFUSED))) == "failed"


def test_a_table_says_what_comes_next_when_it_is_live():
    assert "+1.500 ms" in drawn(VIEW)
    assert "next poll" not in drawn(VIEW)
    live = drawn(VIEW, is_live=True)
    assert "64 s" in live
    assert "held 60 min" in live


def test_what_a_peer_says_is_text_and_never_markup():
    evil = replace(ALICE, trouble="[red]x[/red][link=file:///]", candidate=Candidate("[bold]evil.example"))
    shown = drawn(replace(VIEW, sources=(evil,)))
    assert "[red]x[/red][link=file:///]" in shown
    assert "[bold]evil.example" in shown


def test_a_summary_says_the_offset_its_bound_and_what_was_given_up():
    lines = show.summary(replace(VIEW, problem=OUTAGE))
    assert lines[0] == "the truechimers agree on an offset of +1.500 ms, within 6.000 ms"
    assert lines[1].startswith("not independent: alice")
    assert lines[2] == "DNS: nobody answers; wait"
    assert show.summary(replace(VIEW, reading=None, given_up=())) == []


def test_changes_are_told_once():
    first = show.changes(None, VIEW)
    assert "alice.servers.pool.example: truechimer" in first
    assert "warning: a warning" in first
    assert "sources that agree: 1" in first
    assert show.changes(VIEW, VIEW) == []
    later = replace(VIEW, sources=(), held=(BOB, replace(BOB, candidate=ALICE.candidate)), problem=OUTAGE)
    assert show.changes(VIEW, later) == [
        "alice.servers.pool.example: falseticker, its time disagrees with the majority (was truechimer)",
        "DNS: nobody answers; wait",
        "sources that agree: 0",
    ]
    exchanged = replace(VIEW, sources=())
    assert "alice.servers.pool.example: no source any more" in show.changes(VIEW, exchanged)
    gone = replace(exchanged, departed=(ALICE.candidate.name,))
    assert "alice.servers.pool.example: no member any more" in show.changes(VIEW, gone)
    assert show.summary(gone)[-1] == "alice.servers.pool.example is a member no longer"
    assert "DNS: it answers again" in show.changes(later, replace(later, problem=None))


@pytest.mark.parametrize(
    ("duration", "words"), [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (604_800, "7 d")]
)
def test_durations(duration, words):
    assert show.seconds(duration) == words
