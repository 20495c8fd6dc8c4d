"""The TXT record of a server: what is written is read, and whatever else is read does no harm."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nts_core.metadata import MAX_AS, MAX_TEXT, MAX_VALUES, Metadata, parse

OPERATOR = "abcdefghij234"
WHOLE = b"v=truechimer1 op=abcdefghij234 as=64500,64501 cc=DE,FR"

some = {"unique": True, "max_size": MAX_VALUES}
metadata = st.builds(
    Metadata,
    operator=st.from_regex(r"[a-z2-7]{10,26}", fullmatch=True),
    networks=st.lists(st.integers(1, MAX_AS), **some).map(tuple),
    countries=st.lists(st.from_regex(r"[A-Z]{2}", fullmatch=True), **some).map(tuple),
)


@given(metadata)
def test_what_is_written_is_read(written):
    text = written.to_text()
    assert len(text) <= MAX_TEXT
    assert not set(text) & set('"\\;()')
    assert parse([(text.encode(),)]) == written


def test_the_form_that_is_documented():
    found = Metadata(OPERATOR, (64500, 64501), ("DE", "FR"))
    assert found.to_text().encode() == WHOLE
    assert parse([(WHOLE,)]) == found
    assert Metadata(OPERATOR).to_text() == f"v=truechimer1 op={OPERATOR}"


def test_other_records_versions_and_keys_do_not_count():
    known = parse([(WHOLE,)])
    others = [(b"v=spf1 -all",), (b"v=truechimer10 op=x",), (b"v=truechimer2 op=other",), (), (b"",)]
    assert parse([*others, (WHOLE,)]) == known
    assert parse([(WHOLE + b" x-new=any;thing lat=~",)]) == known
    assert parse([(b"v=truechimer1 cc=DE,FR new=1 as=64500,64501 op=abcdefghij234",)]) == known
    assert parse(others) is None
    assert parse([]) is None


@pytest.mark.parametrize(
    "records",
    [
        [(WHOLE,), (b"v=truechimer1 op=zzzzzzzzzzzzz",)],  # which of the two?
        [(WHOLE, b" as=1")],  # two character-strings
        [(b"v=truechimer1",)],
        [(b"v=truechimer1 as=64500",)],
        [(b"v=truechimer1 op=short",)],
        [(b"v=truechimer1 op=ABCDEFGHIJ234",)],
        [(b"v=truechimer1 op=abcdefghij234 op=abcdefghij234",)],
        [(b"v=truechimer1  op=abcdefghij234",)],
        [(b"v=truechimer1 op=abcdefghij234 ",)],
        [(b"v=truechimer1 op=abcdefghij234\tcc=DE",)],
        [(WHOLE.replace(b"64500", b"0"),)],
        [(WHOLE.replace(b"64500", b"064500"),)],
        [(WHOLE.replace(b"64500", b"4294967296"),)],
        [(WHOLE.replace(b"64500", b"64501"),)],
        [(WHOLE.replace(b"64500", b"AS64500"),)],
        [(WHOLE.replace(b"64500", b""),)],
        [(WHOLE.replace(b"DE", b"de"),)],
        [(WHOLE.replace(b"DE", b"DEU"),)],
        [(WHOLE.replace(b"DE", b"FR"),)],
        [(b"v=truechimer1 op=abcdefghij234 as=" + b",".join(b"%d" % n for n in range(1, 10)),)],
        [(b"v=truechimer1 op=abcdefghij234 9=x",)],
        [(b"v=truechimer1 op=abcdefghij234 k=",)],
        [(b"v=truechimer1 op=abcdefghij234 k",)],
        [(b"v=truechimer1 op=abcdefghij234 k=\xff",)],
        [(b"v=truechimer1 op=abcdefghij234 k=" + b"x" * 230,)],
    ],
)
def test_a_record_that_breaks_the_grammar_says_nothing(records):
    assert parse(records) is None


@given(st.lists(st.lists(st.binary() | st.just(WHOLE), max_size=3).map(tuple), max_size=4))
def test_any_octets_give_metadata_or_nothing(records):
    parse(records)


@given(st.binary(max_size=40))
def test_whatever_follows_the_version(rest):
    found = parse([(b"v=truechimer1 op=abcdefghij234 " + rest,)])
    assert found is None or found.operator == OPERATOR


@pytest.mark.parametrize(
    "values",
    [
        {"operator": ""},
        {"operator": "ann@example.org"},
        {"networks": (0,)},
        {"networks": (MAX_AS + 1,)},
        {"networks": (1, 1)},
        {"networks": tuple(range(1, MAX_VALUES + 2))},
        {"countries": ("Germany",)},
        {"countries": ("DE", "DE")},
    ],
)
def test_what_no_record_can_hold_is_refused(values):
    with pytest.raises(ValueError):
        Metadata(**{"operator": OPERATOR, **values})
