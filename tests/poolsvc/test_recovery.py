"""Copies and what comes after: a backup is whole, goes into either engine, and a restore resurrects nobody."""

import json
import zipfile
from datetime import UTC, timedelta
from types import SimpleNamespace

import pytest
from hypothesis import given, settings, strategies
from sqlalchemy import func, select

from nts_core.control import ServerState
from poolsvc import backup, journal, members, recovery, removal, servers, teams, transfers
from poolsvc.auth import authenticate
from poolsvc.backup import BackupError
from poolsvc.db import Base, Database
from poolsvc.errors import ConfusableName, NameTaken, Unauthenticated
from poolsvc.journal import Entry, JournalError
from poolsvc.models import (
    DailyCount,
    IdempotencyKey,
    Invitation,
    Member,
    MemberRole,
    Server,
    Token,
    TokenKind,
    Transfer,
    User,
)
from poolsvc.plans import Outlook
from poolsvc.pool import the_pool

S = ServerState


@pytest.fixture(params=["sqlite", "postgresql"])
def other_url(request, tmp_path, cluster, postgresql_template, sqlite_template):
    """A second migrated database, of each engine in turn."""
    if request.param == "sqlite":
        path = tmp_path / "other.db"
        path.write_bytes(sqlite_template.read_bytes())
        yield f"sqlite+aiosqlite:///{path}"
        return
    url = cluster.create_database(template=postgresql_template)
    yield url
    cluster.drop_database(url)


@pytest.fixture
async def other(other_url):
    database = Database(other_url)
    yield database
    await database.close()


@pytest.fixture
async def pool(registry):
    """A pool with servers in every state, people with tokens, and values of every type of column."""
    for number, state in enumerate(S, 1):
        await registry.server(f"s{number}", f"198.18.1.{number}", state=state)
    token = await registry.owner_token(await registry.member("Owner"))
    async with registry.database.transaction("test") as session:
        _, operator = await members.create_operator(session, registry.now, email="op@example.org")
        agent = Token(kind=TokenKind.AGENT, sha256="a" * 64, scopes=[], server_id=1, created_at=registry.now)
        session.add_all(
            [
                agent,
                DailyCount(day=registry.now.date(), counts={"active": 4}),
                IdempotencyKey(
                    key_sha256="k" * 64,
                    request_sha256="r" * 64,
                    status=201,
                    sealed=bytes(range(256)),
                    created_at=registry.now,
                ),
            ]
        )
        (await the_pool(session, registry.settings)).epoch = 7
    return SimpleNamespace(registry=registry, token=token, operator=operator)


async def content(database):
    """All rows of all tables."""
    async with database.engine.connect() as connection:
        return {
            table.name: [
                tuple(row)
                for row in await connection.execute(select(table).order_by(*table.primary_key.columns))
            ]
            for table in Base.metadata.sorted_tables
        }


async def test_a_backup_goes_into_either_engine_and_is_the_same_there(pool, other, tmp_path):
    registry = pool.registry
    file = tmp_path / "pool.backup"
    manifest = await backup.dump(registry.database, file, "pool.example", registry.now)
    assert file.stat().st_mode & 0o777 == 0o600
    assert manifest == backup.read_manifest(file)
    async with other.engine.begin() as connection:
        await backup.load(other, file, connection)
    assert await content(other) == await content(registry.database)
    async with other.transaction() as session:
        member = await members.create(
            session, "New", registry.now, owner=await members.create_user(session, registry.now)
        )
    assert member.id > 1


async def test_moving_a_database_copies_all_of_it_and_new_rows_follow(pool, other):
    counts = await backup.move(pool.registry.database, other)
    assert await content(other) == await content(pool.registry.database)
    assert counts["servers"] == len(S)
    async with other.transaction() as session:
        assert (await authenticate(session, pool.token, pool.registry.now)).user_id is not None
        made = await servers.register(
            session, pool.registry.settings, 1, "after", ["198.18.9.9"], pool.registry.now, actor="test"
        )
    assert made.id == len(S) + 1
    with pytest.raises(BackupError, match="not empty"):
        await backup.move(pool.registry.database, other)


async def test_a_backup_is_of_one_moment_while_others_write(pool, tmp_path):
    registry = pool.registry
    async with registry.database.snapshot() as connection:
        before = await connection.scalar(select(func.count()).select_from(Server))
        await registry.server("late", "198.18.8.8")
        assert await connection.scalar(select(func.count()).select_from(Server)) == before
    assert await registry.member("Somebody") > 0


async def test_an_existing_file_is_not_overwritten_and_a_failed_backup_leaves_none(pool, tmp_path):
    file = tmp_path / "pool.backup"
    file.write_text("precious")
    with pytest.raises(BackupError, match="exists"):
        await backup.dump(pool.registry.database, file, "pool.example", pool.registry.now)
    assert file.read_text() == "precious"
    with pytest.raises(OSError):
        await backup.dump(pool.registry.database, tmp_path / "no" / "x", "pool.example", pool.registry.now)
    file.unlink()
    assert not list(tmp_path.glob("*.backup*"))


def damaged(file, name, change):
    """The backup with one of its members changed."""
    other = file.with_name("damaged.backup")
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(other, "w") as new:
        for member in old.namelist():
            octets = old.read(member)
            new.writestr(member, change(octets) if member == name else octets)
    return other


def without_a_line(octets):
    return b"".join(octets.splitlines(keepends=True)[1:])


def of_another_pool(octets):
    return octets.replace(b"pool.example", b"other.example")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("servers.jsonl", without_a_line),
        ("servers.jsonl", lambda octets: octets.replace(b'"active"', b'"ACTIVE"', 1)),
        ("servers.jsonl", lambda octets: octets.replace(b'"weight"', b'"wait"', 1)),
        ("servers.jsonl", lambda octets: b"\x00garbage\n" + octets),
        ("servers.jsonl", lambda octets: b"[1]\n"),
        ("members.jsonl", lambda octets: octets.replace(b"Owner", b"Other")),
        ("manifest.json", of_another_pool),
        ("manifest.json", lambda octets: octets.replace(b'"format": 1', b'"format": 2')),
        ("manifest.json", lambda octets: octets.replace(b'"revision": "', b'"revision": "x')),
        ("manifest.json", lambda octets: b"{}"),
        ("manifest.json", lambda octets: b"[" * 100_000),
    ],
)
async def test_a_damaged_or_foreign_backup_restores_nothing(pool, other, tmp_path, name, change):
    file = tmp_path / "pool.backup"
    await backup.dump(pool.registry.database, file, "pool.example", pool.registry.now)
    with pytest.raises(BackupError) as caught:
        await recovery.restore(
            other, pool.registry.settings, damaged(file, name, change), [], pool.registry.now
        )
    assert caught.value.remedy
    assert not any((await content(other)).values())


@pytest.mark.parametrize("octets", [b"", b"PK\x03\x04", b"\x00" * 1000, b"{}"])
def test_what_is_no_backup_is_an_error(tmp_path, octets):
    file = tmp_path / "x"
    file.write_bytes(octets)
    with pytest.raises(BackupError, match="not a backup"):
        backup.read_manifest(file)


async def state_of(database, name):
    async with database.transaction() as session:
        return (await servers.find(session, name)).state


async def test_a_restore_resurrects_nobody(pool, other, tmp_path):
    """What left after the copy leaves again, a name that came and went is burnt, and nothing is published."""
    registry, settings = pool.registry, pool.registry.settings
    file = tmp_path / "pool.backup"
    await backup.dump(registry.database, file, "pool.example", registry.now)
    later = registry.now + timedelta(days=1)
    short = await registry.server("shortlived", "198.18.7.7", state=S.ACTIVE)
    for identifier in (4, short):
        async with registry.change(identifier) as (session, server):
            await servers.leave(session, server, actor="test", reason="gone", now=later)
    await journal.write_due(registry.database, settings, later)

    done = await recovery.restore(other, settings, file, [settings.journal_file], later)
    assert (done.left_again, done.burnt) == (("s4",), ("shortlived",))
    assert await state_of(other, "s4") is S.LEAVING
    assert await state_of(other, "s5") is S.SUSPENDED
    async with other.transaction() as session:
        pool_row = await the_pool(session, settings)
        assert pool_row.frozen_at == later
        for secret in (pool.token, pool.operator):
            with pytest.raises(Unauthenticated, match="revoked"):
                await authenticate(session, secret, later)
        assert set(await session.scalars(select(Token.revoked_at))) == {later}
        with pytest.raises(NameTaken, match="never given again"):
            await servers.register(session, settings, 1, "shortlived", ["198.18.7.8"], later, actor="test")
        with pytest.raises(ConfusableName):
            await servers.register(session, settings, 1, "short-lived", ["198.18.7.8"], later, actor="test")
    outlook = Outlook(later, 41, (), ("late",), {})
    await recovery.thaw(other, settings, outlook, later)
    async with other.transaction() as session:
        pool_row = await the_pool(session, settings)
        assert (pool_row.frozen_at, pool_row.epoch) == (None, 41)
        for name in ("late", "1ate"):
            with pytest.raises((NameTaken, ConfusableName)):
                await servers.register(session, settings, 1, name, ["198.18.7.9"], later, actor="test")
        assert (await session.scalars(select(User.staff).distinct())).all() == [None]


async def test_a_server_that_was_taken_back_in_the_journal_stays(pool, other, tmp_path):
    registry, settings = pool.registry, pool.registry.settings
    file = tmp_path / "pool.backup"
    await backup.dump(registry.database, file, "pool.example", registry.now)
    entries = [
        Entry(registry.now + timedelta(hours=hours), "pool.example", 4, "s4", 4, state, burnt=True, reason="")
        for hours, state in ((1, S.LEAVING), (2, S.VERIFIED))
    ]
    journal.append(settings.journal_file, entries)
    done = await recovery.restore(other, settings, file, [settings.journal_file], registry.now)
    assert done.left_again == ()
    assert await state_of(other, "s4") is S.ACTIVE


async def test_a_restore_opens_no_invitation_and_no_offer_again(pool, other, tmp_path):
    """They may have been revoked, declined or taken back since the copy was made."""
    registry, file = pool.registry, tmp_path / "pool.backup"
    async with registry.database.transaction("test") as session:
        member = await session.scalar(select(Member).order_by(Member.id.desc()).limit(1))
        made = {"by": 1, "member_id": member.id, "role": MemberRole.OWNER}
        for whose in (made, {"by": 1}):
            await teams.invite(session, registry.settings, "new@example.org", registry.now, **whose)
        await transfers.offer(session, registry.settings, 1, member.opaque_id, registry.now)
    await backup.dump(registry.database, file, "pool.example", registry.now)
    await recovery.restore(other, registry.settings, file, [], registry.now)
    async with other.transaction() as session:
        invitations = list(await session.scalars(select(Invitation)))
        offer = await session.scalar(select(Transfer))
    assert [(row.revoked_at, row.email) for row in invitations] == [(registry.now, None)] * 2
    assert offer.declined_at == registry.now


async def test_a_restore_goes_into_an_empty_database_only(pool, tmp_path):
    registry = pool.registry
    file = tmp_path / "pool.backup"
    await backup.dump(registry.database, file, "pool.example", registry.now)
    with pytest.raises(BackupError, match="not empty"):
        await recovery.restore(registry.database, registry.settings, file, [], registry.now)


async def test_a_removal_is_in_the_journal_once_and_before_the_database_says_so(pool):
    registry, settings = pool.registry, pool.registry.settings
    await journal.write_due(registry.database, settings, registry.now)
    known = {entry.name: entry.state for entry in journal.read(settings.journal_file)}
    assert known == {"s6": S.LEAVING, "s7": S.REMOVED}
    size = settings.journal_file.stat().st_size
    await journal.write_due(registry.database, settings, registry.now + timedelta(hours=1))
    assert settings.journal_file.stat().st_size == size
    assert settings.journal_file.stat().st_mode & 0o777 == 0o600


async def test_a_journal_that_cannot_be_written_is_tried_again(pool):
    registry = pool.registry
    broken = registry.settings.model_copy(update={"journal_file": registry.settings.journal_file / "x"})
    registry.settings.journal_file.write_text("")
    with pytest.raises(OSError):
        await journal.write_due(registry.database, broken, registry.now)
    await journal.write_due(registry.database, registry.settings, registry.now)
    assert len(list(journal.read(registry.settings.journal_file))) == 2


texts = strategies.text(max_size=300)
entries = strategies.builds(
    Entry,
    at=strategies.datetimes(timezones=strategies.just(UTC)),
    pool=texts,
    server=strategies.integers(1, 2**31),
    name=texts,
    member=strategies.integers(1, 2**31),
    state=strategies.sampled_from(S),
    burnt=strategies.booleans(),
    reason=texts,
)


@settings(deadline=None)
@given(
    strategies.lists(entries, max_size=5), strategies.lists(entries, max_size=5), strategies.integers(1, 80)
)
def test_a_journal_survives_a_line_that_a_crash_cut_off(tmp_path_factory, first, second, cut):
    file = tmp_path_factory.mktemp("journal") / "journal"
    journal.append(file, first)
    if first:
        whole = file.read_bytes()
        file.write_bytes(whole[:-cut] if cut < len(whole.splitlines()[-1]) - 8 else whole)
    kept = list(journal.read(file))
    assert kept == first[: len(kept)]
    assert len(kept) >= len(first) - 1
    journal.append(file, second)
    assert list(journal.read(file))[len(kept) :] == second


@pytest.mark.parametrize(
    "line", ["x", "{}", "[]", "null", '{"at":"2026"}', json.dumps({"at": 1}), "[" * 5000, '{"at":1,"pool":2}']
)
def test_a_journal_that_is_none_names_the_line(tmp_path, line):
    file = tmp_path / "journal"
    file.write_text(f"\n{line}\n")
    with pytest.raises(JournalError, match="line 2"):
        list(journal.read(file))


def test_a_journal_of_another_pool_is_refused(tmp_path, registry):
    file = tmp_path / "journal"
    journal.append(file, [Entry(registry.now, "other.example", 1, "a", 1, S.REMOVED, burnt=True, reason="")])
    with pytest.raises(JournalError, match=r"other\.example"):
        journal.latest([file], "pool.example")


async def restored(pool, other, tmp_path, entries):
    """The registry restored from a copy of now, with these entries in the journal since."""
    registry, settings = pool.registry, pool.registry.settings
    file = tmp_path / "pool.backup"
    await backup.dump(registry.database, file, "pool.example", registry.now)
    journal.append(settings.journal_file, entries)
    return await recovery.restore(other, settings, file, [settings.journal_file], registry.now)


def entry(pool, hours, server, name, state, *, burnt=True):
    at = pool.registry.now + timedelta(hours=hours)
    return Entry(at, "pool.example", server, name, 1, state, burnt=burnt, reason="")


async def test_a_name_that_entered_dns_after_the_copy_stays_burnt(pool, other, tmp_path):
    """The copy knows s1 as never published; since then it was, and was taken out."""
    await restored(pool, other, tmp_path, [entry(pool, 1, 1, "s1", S.REMOVED)])
    async with other.transaction() as session:
        assert (await servers.find(session, "s1")).burnt_at is not None
    await removal.advance(other, pool.registry.settings, None, 1, pool.registry.now)
    async with other.transaction() as session:
        assert (await servers.find(session, "s1")).released_at is None


async def test_leaving_that_was_cancelled_after_the_copy_is_cancelled_again(pool, other, tmp_path):
    registry = pool.registry
    async with registry.change(4) as (session, server):
        at = registry.now + timedelta(days=9)
        await servers.schedule_leave(session, server, at=at, actor="test", reason="", now=registry.now)
    done = await restored(pool, other, tmp_path, [entry(pool, 1, 4, "s4", S.VERIFIED)])
    assert done.left_again == ()
    assert await state_of(other, "s4") is S.VERIFIED


async def test_an_id_that_came_again_after_an_earlier_restore_hides_no_name(pool, other, tmp_path):
    lost, later = entry(pool, 1, 102, "dave", S.REMOVED), entry(pool, 9, 102, "erin", S.VERIFIED)
    done = await restored(pool, other, tmp_path, [lost, later])
    assert done.burnt == ("dave", "erin")


async def test_a_removal_is_closed_only_once_the_journal_knows_of_it(registry):
    """A database restored from a copy of before would otherwise publish a server whose receipt was given."""
    server = await registry.server(state=ServerState.LEAVING)
    broken = registry.settings.model_copy(update={"journal_file": registry.settings.journal_file / "x"})
    registry.settings.journal_file.write_text("")
    async with registry.change(server) as (_, row):
        row.srv_withdrawn_at = row.name_broken_at = row.journal_due_at = registry.now
    with pytest.raises(NotADirectoryError):
        await removal.advance(registry.database, broken, None, server, registry.now)
    assert (await registry.get(server)).state is ServerState.LEAVING
    await removal.advance(registry.database, registry.settings, None, server, registry.now)
    assert (await registry.get(server)).state is ServerState.REMOVED
    assert [entry.server for entry in journal.read(registry.settings.journal_file)] == [server]
