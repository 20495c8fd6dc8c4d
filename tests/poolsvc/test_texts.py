"""What notices say: every kind, with what the registry gives it, with nothing, and with hostile data."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nts_core.control import Stage
from poolsvc.explain import REMEDIES
from poolsvc.notices import Letter, NoticeKind
from poolsvc.texts import _LETTERS, _TEXTS, joined, text_of

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
POOL, URL = "pool.example", "https://registry.example.net"
NASTY = "x\r\nBcc: victim@example.org\r\n\r\n\x1b[31m\u202e{token}{0}%s\ud800" + "y" * 5000
KEYS = [
    "server",
    "address",
    "problem",
    "reason",
    "hold",
    "stage",
    "webhook",
    "host",
    "member",
    "user",
    "role",
    "change",
    "from_member",
    "to_member",
    "suspended_at",
    "leave_at",
    "remove_at",
    "days",
    "seen_at",
    "ends_at",
    "next_at",
    "expires_at",
    "receipt",
]
SECRET = "12.SECRET"


def text(kind, data, token=None):
    return text_of(kind, data, at=NOW, pool=POOL, public_url=URL, token=token)


def test_the_table_has_words_for_every_kind():
    assert set(_TEXTS) == set(NoticeKind)


@pytest.mark.parametrize("kind", NoticeKind)
def test_every_kind_says_what_happened_and_where_to_look_even_without_data(kind):
    bare = text(kind, {})
    assert bare.subject
    assert "{" not in bare.subject + bare.body
    assert bare.body.endswith(f"Look at: {URL}\n")


@pytest.mark.parametrize("kind", NoticeKind)
def test_hostile_data_is_one_bounded_line_of_printable_text(kind):
    found = text(kind, dict.fromkeys(KEYS, NASTY), token=SECRET)
    harmless = text(kind, dict.fromkeys(KEYS, "x"), token=SECRET)
    assert found.subject.isprintable()
    assert len(found.subject) <= 150
    assert len(found.body.splitlines()) == len(harmless.body.splitlines()), "a value made lines of its own"
    assert all(line.isprintable() for line in found.body.split("\n"))
    assert len(found.body) < 4000
    if kind not in (NoticeKind.SIGN_IN, NoticeKind.INVITATION):
        assert SECRET not in found.body, "a value reached another value"


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.sampled_from(NoticeKind), st.dictionaries(st.sampled_from(KEYS) | st.text(), json, max_size=8))
def test_any_data_gives_a_text(kind, data):
    found = text(kind, data)
    assert found.subject.isprintable()
    assert all(line.isprintable() for line in found.body.split("\n"))


def test_a_suspension_has_its_hold_stage_reason_remedy_and_time():
    data = {"server": "alice", "hold": "score", "stage": "ntp-ke-cookie", "reason": "score: score 3.2"}
    found = text(NoticeKind.SUSPENDED, data)
    assert found.subject == "alice is suspended (score)"
    for part in (
        "since 2026-03-01 12:00 UTC",
        "First stage that failed: ntp-ke-cookie",
        "Reason: score: score 3.2",
        f"What to do: {REMEDIES[Stage.NTP_KE_COOKIE]}",
    ):
        assert part in found.body


@pytest.mark.parametrize(
    ("hold", "remedy"), [("operator", "ask the pool's operator"), ("maintenance", "nothing: it comes back")]
)
def test_a_hold_without_a_failed_stage_has_its_own_remedy(hold, remedy):
    found = text(NoticeKind.SUSPENDED, {"server": "alice", "hold": hold, "stage": None})
    assert f"What to do: {remedy}" in found.body
    assert "First stage" not in found.body


def test_a_receipt_lists_each_step_that_has_a_time():
    receipt = {
        "srv_withdrawn_at": "2026-03-01T12:01:00+00:00",
        "certificate_revoked_at": None,
        "exposure": "little",
    }
    body = text(NoticeKind.REMOVED, {"server": "alice", "receipt": receipt}).body
    assert "Out of the pool's answers: 2026-03-01 12:01 UTC" in body
    assert "revoked" not in body
    assert "What remains possible: little" in body


@pytest.mark.parametrize(
    ("kind", "path"), [(NoticeKind.SIGN_IN, "sign-in"), (NoticeKind.INVITATION, "invitation")]
)
def test_a_link_has_its_token_in_the_fragment_and_alone(kind, path):
    body = text(kind, {}, token=SECRET).body
    assert f"    {URL}/{path}#{SECRET}\n" in body
    assert f"\n    {SECRET}\n" in body


@pytest.mark.parametrize("letter", list(_LETTERS))
def test_a_letter_has_its_link_unless_there_is_no_account(letter):
    found = text(NoticeKind.SIGN_IN, {"letter": letter, "sign_in": 12}, token=SECRET)
    assert found != text(NoticeKind.SIGN_IN, {}, token=SECRET)
    assert (SECRET in found.body) == (letter != "no-account")


def test_there_are_words_for_every_letter():
    assert set(_LETTERS) == set(Letter) - {Letter.SIGN_IN}
    assert text(NoticeKind.SIGN_IN, {"letter": "sign-in"}) == text(NoticeKind.SIGN_IN, {})


def test_several_notices_are_one_text_with_all_of_them():
    parts = [text(NoticeKind.ADMITTED, {"server": name}) for name in ("alice", "bob")]
    whole = joined(parts)
    assert whole.subject == "2 notices"
    for part in parts:
        assert f"{part.subject}\n---" in whole.body
        assert part.body in whole.body
