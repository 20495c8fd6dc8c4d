"""What was measured of a server over time: which rows, in which order and pages, as JSON and as CSV; on both engines."""

import csv
import io
import itertools
from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nts_core.control import ServerState
from poolsvc import members, series, servers
from poolsvc.api.paging import cursor_of
from poolsvc.api.tables import table
from poolsvc.models import Address, DailySummary, HourlySummary, SampleRecord
from poolsvc.series import Span, Stretch

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
ONE, OTHER = "198.18.0.1", "fd00::1"
PATH = "/v1/servers/alice/history"


@pytest.fixture
async def alice(registry):
    """Alice's addresses' ids: one sample each by two monitors at three moments, two hours and two days of the first."""
    server = await registry.server("alice", ONE, OTHER, state=ServerState.ACTIVE)
    async with registry.database.transaction() as session:
        ids = [row.id for row in (await servers.get(session, server)).addresses]
        session.add_all(
            SampleRecord(
                address_id=address,
                at=NOW + number * HOUR,
                monitor=monitor,
                failed="tcp" if number == 1 else None,
                step=-5.0 if number == 1 else 1.0,
                score=20.0 - number,
                offset_ns=None if number == 1 else -1500,
                delay_ns=9_000_000,
            )
            for address in ids
            for number in range(3)
            for monitor in ("frankfurt", "registry")
        )
        figures = {"probes": 7, "failures": 2, "step": 0.5, "score": 18.0, "offset_most_ns": 99}
        session.add_all(
            HourlySummary(address_id=ids[0], hour=NOW - number * HOUR, monitor="registry", **figures)
            for number in range(2)
        )
        session.add_all(
            DailySummary(address_id=ids[0], day=date(2026, 2, number), monitor="registry", **figures)
            for number in (1, 2)
        )
    return ids


@pytest.fixture
async def http(registry, client, alice):
    async with registry.database.transaction() as session:
        _, token = await members.create_operator(session, datetime.now(UTC))
    async with client(token) as http:
        yield http


async def read(registry, span, *, limit=100, after=None, **stretch):
    async with registry.database.transaction() as session:
        server = await servers.find(session, "alice")
        return await series.read(
            session, span, Stretch(server.addresses, **stretch), after=after, limit=limit
        )


async def test_a_stretch_is_from_its_begin_to_before_its_end(registry, alice):
    points, has_more = await read(registry, Span.SAMPLES, since=NOW + HOUR, until=NOW + 2 * HOUR)
    assert {(point.mark.at, point.address, point.mark.monitor) for point in points} == {
        (NOW + HOUR, address, monitor) for address in (ONE, OTHER) for monitor in ("frankfurt", "registry")
    }
    assert {(point.probes, point.failures, point.failed, point.offset_most_ns) for point in points} == {
        (1, 1, "tcp", None)
    }
    assert not has_more


async def test_one_monitor_and_some_addresses_alone(registry, alice):
    points, _ = await read(registry, Span.SAMPLES, monitor="frankfurt")
    assert {point.mark.monitor for point in points} == {"frankfurt"}
    async with registry.database.transaction() as session:
        row = await session.get_one(Address, alice[1])
        points, _ = await series.read(session, Span.SAMPLES, Stretch([row]), limit=100)
    assert [point.address for point in points] == [OTHER] * 6


async def test_hours_and_days_are_rows_of_their_own(registry, alice):
    hours, _ = await read(registry, Span.HOURS)
    assert [(point.mark.at, point.probes, point.failures, point.score) for point in hours] == [
        (NOW, 7, 2, 18.0),
        (NOW - HOUR, 7, 2, 18.0),
    ]
    days, _ = await read(registry, Span.DAYS)
    first, second = datetime(2026, 2, 1, tzinfo=UTC), datetime(2026, 2, 2, tzinfo=UTC)
    assert [point.mark.at for point in days] == [second, first]
    for stretch, found in (
        ({"since": first}, [second, first]),
        ({"since": first + HOUR}, [second]),
        ({"until": second}, [first]),
        ({"until": second + HOUR}, [second, first]),
    ):
        points, _ = await read(registry, Span.DAYS, **stretch)
        assert [point.mark.at for point in points] == found, stretch


async def test_pages_hold_every_row_once_in_one_order(registry, alice):
    for span, limit in itertools.product(Span, (1, 5)):
        whole, _ = await read(registry, span)
        pages, after, has_more = [], None, True
        while has_more:
            page, has_more = await read(registry, span, limit=limit, after=after)
            pages += page
            after = page[-1].mark
        assert pages == list(whole), (span, limit)
    whole, _ = await read(registry, Span.SAMPLES)
    keys = [(point.mark.at, point.mark.address_id, point.mark.monitor) for point in whole]
    assert keys == sorted(set(keys), reverse=True)


async def test_json_says_of_what_it_is(http):
    answer = (await http.get(PATH, params={"limit": 1, "address": "FD00:0::1"})).json()
    assert {"server": "alice", "span": "samples", "scorer": "median"}.items() <= answer.items()
    (row,) = answer["items"]
    assert datetime.fromisoformat(row.pop("at")) == NOW + 2 * HOUR
    assert row == {
        "address": OTHER,
        "monitor": "registry",
        "probes": 1,
        "failures": 0,
        "failed": None,
        "step": 1.0,
        "score": 18.0,
        "offset_ns": -1500,
        "offset_most_ns": 1500,
        "delay_ns": 9_000_000,
    }
    rest = (await http.get(PATH, params={"address": OTHER, "cursor": answer["next"]})).json()
    assert (len(rest["items"]), rest["next"]) == (5, None)


async def test_csv_has_the_same_rows_and_says_where_the_next_are(http):
    query = {"format": "csv", "limit": 10, "since": NOW.isoformat()}
    answer = await http.get(PATH, params=query)
    assert answer.headers["content-type"] == "text/csv; charset=utf-8; header=present"
    assert answer.headers["content-disposition"] == 'attachment; filename="alice-samples.csv"'
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert len(rows) == 10
    assert rows[0] == {
        "server": "alice",
        "span": "samples",
        "scorer": "median",
        "at": "2026-03-01T14:00:00.000000Z",
        "address": OTHER,
        "monitor": "registry",
        "probes": "1",
        "failures": "0",
        "failed": "",
        "step": "1.0",
        "score": "18.0",
        "offset_ns": "-1500",
        "offset_most_ns": "1500",
        "delay_ns": "9000000",
    }
    rest = await http.get(answer.links["next"]["url"])
    assert len(list(csv.DictReader(io.StringIO(rest.text)))) == 2
    assert "link" not in rest.headers


async def test_what_is_no_question_is_refused(http):
    for query, code in (
        ("limit=0", "invalid-document"),
        ("limit=1001", "invalid-document"),
        ("span=weeks", "invalid-document"),
        ("format=xml", "invalid-document"),
        ("since=yesterday", "invalid-document"),
        ("since=2026-03-01T12:00:00", "invalid-document"),
        ("since=0001-01-01T00:00:00%2B23:59", "invalid-document"),
        ("until=9999-12-31T23:59:59-23:59", "invalid-document"),
        ("until=" + "9" * 99, "invalid-document"),
        ("address=alice", "invalid-address"),
        ("cursor=" + "A" * 121, "invalid-document"),
        ("cursor=%FF", "invalid-cursor"),
        ("cursor=MQ", "invalid-cursor"),
        ("cursor=" + cursor_of("1.1"), "invalid-cursor"),
        ("cursor=" + cursor_of("1.0.registry"), "invalid-cursor"),
        ("cursor=" + cursor_of("1.4294967296.registry"), "invalid-cursor"),
        ("cursor=" + cursor_of("9" * 30 + ".1.registry"), "invalid-cursor"),
        ("cursor=" + cursor_of(" 1.1.registry"), "invalid-cursor"),
        ("cursor=" + cursor_of("1.1.\0"), "invalid-cursor"),
    ):
        answer = await http.get(f"{PATH}?{query}")
        assert (answer.status_code, answer.json()["code"]) == (422, code), query


async def test_nobody_measured_a_server_that_is_not_there(http):
    assert (await http.get("/v1/servers/nobody/history")).status_code == 404
    empty = (await http.get(PATH, params={"monitor": "nobody", "span": "days"})).json()
    assert (empty["items"], empty["next"]) == ([], None)


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "  =1", "\uff1d1", "|calc", '=HYPERLINK("x")']
)
def test_no_word_becomes_a_formula(text):
    _, (cell,) = csv.reader(io.StringIO(table(["a"], [[text]]), newline=""))
    assert cell == "'" + text


@given(
    st.lists(
        st.lists(
            st.one_of(
                st.none(), st.integers(), st.text(st.characters(codec="utf-8", exclude_characters="\0"))
            ),
            min_size=2,
            max_size=2,
        ),
        max_size=5,
    )
)
def test_every_cell_is_read_back(rows):
    read_back = list(csv.reader(io.StringIO(table(["a", "b"], rows), newline="")))
    assert [len(row) for row in read_back] == [2] * (len(rows) + 1)
    for row, found in zip(rows, read_back[1:], strict=True):
        for cell, text in zip(row, found, strict=True):
            assert text in {"" if cell is None else str(cell), f"'{cell}"}
