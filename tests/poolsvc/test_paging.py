"""Lists in pages: every row once while rows are added, filters, and cursors that are none."""

import asyncio
import base64
from datetime import timedelta

import hypothesis
import pytest
from hypothesis import strategies
from sqlalchemy import delete, select

from nts_core.control import ServerState
from poolsvc import auth
from poolsvc.api.paging import MAX_LIMIT, Paging, _read, cursor_of
from poolsvc.db import Database
from poolsvc.errors import InvalidCursor
from poolsvc.models import ConnectBack, Identity, MaintenanceWindow, Scope, StaffRole, TokenKind

MAINTENANCE = "/v1/servers/alice/maintenance"


def row(number, now):
    return ConnectBack(address=f"198.18.0.{number % 2}", prefix="198.18.0.0/24", at=now)


async def walk(database, limit, newest_first, kept, now, additions):
    """All pages of a list, while rows are added between them."""
    seen, after = [], None
    found = select(ConnectBack)
    if kept is not None:
        found = found.where(ConnectBack.address == f"198.18.0.{kept}")
    for added in [*additions, *[0] * 100]:
        async with database.transaction() as session:
            paging = Paging(limit, after)
            rows, further = await paging.rows(session, found, ConnectBack.id, newest_first=newest_first)
            assert len(rows) <= limit
            seen += [entry.id for entry in rows]
            session.add_all(row(number, now) for number in range(added))
        if further is None:
            return seen
        after = _read(further)
    pytest.fail("the pages do not end")


def test_paging_gives_every_row_once_while_rows_are_added(database_url, registry):
    now = registry.now
    with asyncio.Runner() as runner:
        database = Database(database_url)

        async def one(rows, limit, newest_first, kept, additions):
            async with database.transaction() as session:
                await session.execute(delete(ConnectBack))
                session.add_all(row(number, now) for number in range(rows))
            async with database.transaction() as session:
                there = {
                    entry.id: entry.address
                    for entry in await session.scalars(select(ConnectBack).order_by(ConnectBack.id))
                }
            seen = await walk(database, limit, newest_first, kept, now, additions)
            wanted = [key for key, address in there.items() if kept is None or address.endswith(str(kept))]
            assert len(set(seen)) == len(seen), "a row came twice"
            assert [key for key in sorted(seen) if key in there] == wanted
            assert seen == sorted(seen, reverse=newest_first)
            if newest_first:
                assert set(seen) <= set(there), (
                    "what is newer than the first page is not among the older ones"
                )

        @hypothesis.settings(max_examples=25, deadline=None)
        @hypothesis.given(
            rows=strategies.integers(0, 12),
            limit=strategies.integers(1, 5),
            newest_first=strategies.booleans(),
            kept=strategies.sampled_from([None, 0, 1]),
            additions=strategies.lists(strategies.integers(0, 3), max_size=6),
        )
        def every(**case):
            runner.run(one(**case))

        try:
            every()
        finally:
            runner.run(database.close())


@hypothesis.settings(deadline=None)
@hypothesis.given(strategies.integers(0, 10**18 - 1))
def test_a_cursor_is_read_as_it_was_made(key):
    assert _read(cursor_of(str(key))) == key


def encoded(octets):
    return base64.urlsafe_b64encode(octets).decode().rstrip("=")


CURSORS = ["", "=", "x", "é", "MQ==", "MQ=", "M Q", "MR", encoded(b"-1"), encoded(b"01"), encoded(b"1.0")]
CURSORS += [encoded(b"\xff"), encoded("\u0661".encode()), encoded(b"9" * 19), encoded(b"1\x00"), "\x00"]


@pytest.mark.parametrize("cursor", CURSORS)
def test_what_is_no_cursor_is_refused(cursor):
    with pytest.raises(InvalidCursor):
        _read(cursor)


@pytest.fixture
async def staff(registry):
    return (await registry.person(staff=StaffRole.SUPPORT)).token


@pytest.mark.parametrize("path", ["/v1/members", "/v1/servers", "/v1/users", "/v1/events", "/v1/me/events"])
async def test_every_list_has_the_same_pages_and_refusals(call, registry, staff, path):
    for name in ("alice", "bob", "carol"):
        await registry.server(name, f"198.18.0.{len(name)}")
    full = (await call(staff, "GET", path, params={"limit": MAX_LIMIT})).json()
    assert full["next"] is None
    seen, cursor = [], {}
    while cursor is not None:
        page = (await call(staff, "GET", path, params={"limit": 2, **cursor})).json()
        seen += page["items"]
        cursor = page["next"] and {"cursor": page["next"]}
    assert seen == full["items"]
    answer = await call(staff, "GET", path, params={"cursor": "nonsense"})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid-cursor")
    assert answer.json()["field"] == "cursor"
    for wrong in ({"limit": 0}, {"limit": MAX_LIMIT + 1}, {"limit": "x"}, {"cursor": "M" * 121}):
        answer = await call(staff, "GET", path, params=wrong)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid-document")


@pytest.mark.parametrize("path", ["/v1/me/sessions", "/v1/me/tokens", "/v1/me/identities", MAINTENANCE])
async def test_ones_own_things_come_in_pages(call, registry, path):
    member = await registry.member("Owner")
    person, server = await registry.person(member), await registry.server("alice", member=member)
    async with registry.database.transaction() as session:
        for number in range(3):
            for kind in (TokenKind.SESSION, TokenKind.API):
                await auth.issue(session, kind, now=registry.now, user_id=person.id, scopes={Scope.READ})
            start = registry.now + timedelta(days=number)
            window = {"starts_at": start, "ends_at": start + timedelta(hours=1), "created_at": registry.now}
            session.add(MaintenanceWindow(server_id=server, **window))
            issuer = f"https://i{number}.example"
            session.add(Identity(user_id=person.id, issuer=issuer, subject="s", created_at=registry.now))
    full = (await call(person.token, "GET", path)).json()
    ids = [entry["id"] for entry in full["items"]]
    assert (len(ids) >= 3, full["next"]) == (True, None)
    assert ids == sorted(ids, reverse="identities" not in path)
    seen, cursor = [], {}
    while cursor is not None:
        page = (await call(person.token, "GET", path, params={"limit": 1, **cursor})).json()
        seen += page["items"]
        cursor = page["next"] and {"cursor": page["next"]}
    assert [entry["id"] for entry in seen] == ids


async def test_servers_are_listed_by_state_member_and_name_each_to_its_own(call, registry, staff):
    first, second = await registry.member("First"), await registry.member("Second")
    await registry.server("alice", "198.18.0.1", member=first, state=ServerState.ACTIVE)
    await registry.server("alan", "198.18.0.2", member=first)
    await registry.server("bob", "198.18.0.3", member=second, state=ServerState.REMOVED)
    owner = await registry.person(first)

    async def names(token, **params):
        answer = await call(token, "GET", "/v1/servers", params=params)
        return [entry["name"] for entry in answer.json()["items"]]

    assert await names(staff) == ["alice", "alan", "bob"]
    assert await names(owner.token) == ["alice", "alan"]
    assert await names(staff, state="removed") == ["bob"]
    assert await names(staff, member=second) == ["bob"]
    assert await names(owner.token, member=second) == []
    assert await names(staff, q="AL") == ["alice", "alan"]
    assert await names(staff, q="al%") == await names(staff, q="_") == []
    assert await names(owner.token, q="alic", state="active") == ["alice"]
    for wrong in ({"state": "dead"}, {"member": 0}, {"member": 2**31}, {"q": "a\x00"}, {"q": "a" * 101}):
        answer = await call(staff, "GET", "/v1/servers", params=wrong)
        assert answer.status_code == 422, wrong
