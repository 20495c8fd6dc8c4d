"""The migrations on both engines: up, down, up, and that they make what the models describe."""

import asyncio
import re
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from sqlalchemy.exc import IntegrityError, StatementError

import migrations
from nts_core.certificates import csr_key_sha256
from nts_core.control import ServerState, Stage, StageStatus
from nts_core.tls import new_key_and_csr
from poolsvc import auth, schema
from poolsvc.db import Database
from poolsvc.errors import NotFound
from poolsvc.models import (
    Address,
    Base,
    Event,
    Hold,
    HoldKind,
    Member,
    MemberRole,
    Order,
    OrderStatus,
    Server,
    StaffRole,
    StageRecord,
    Token,
    TokenKind,
)
from poolsvc.names import skeleton
from poolsvc.pool import the_pool
from poolsvc.schema import DatabaseUnusable

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request, tmp_path):
    if request.param == "sqlite":
        yield f"sqlite+aiosqlite:///{tmp_path / 'empty.db'}"
        return
    cluster = request.getfixturevalue("cluster")
    url = cluster.create_database()
    yield url
    cluster.drop_database(url)


def tables(url):
    """The tables as a program without our models sees them."""
    engine = sa.create_engine(url.replace("+aiosqlite", ""), poolclass=sa.NullPool)
    names = set(sa.inspect(engine).get_table_names()) - {"alembic_version"}
    return {name for name in names if not name.startswith("samples_")}


def test_up_from_empty_down_to_base_and_up_again(empty_url, alembic):
    config = alembic(empty_url)
    command.upgrade(config, "head")
    assert tables(empty_url) == set(Base.metadata.tables)
    command.downgrade(config, "base")
    assert tables(empty_url) == set()
    command.upgrade(config, "head")
    assert tables(empty_url) == set(Base.metadata.tables)


def test_migrating_twice_changes_nothing(database_url, alembic):
    before = tables(database_url)
    command.upgrade(alembic(database_url), "head")
    assert tables(database_url) == before


def test_models_and_migrations_agree(database_url, alembic):
    command.check(alembic(database_url))


@pytest.fixture
def before_this_version(cluster, alembic):
    """A PostgreSQL database of the version before, with a session that is at work in it."""
    url = cluster.create_database()
    command.upgrade(alembic(url), "6c55726924fc")
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as session:
        yield url, session
    cluster.drop_database(url)


@pytest.fixture
def at(settings):
    """Settings for a database."""
    return lambda url: settings.model_copy(update={"database": url})


def test_a_migration_that_cannot_get_its_lock_gives_up_and_leaves_everything_as_it_was(
    before_this_version, at
):
    url, session = before_this_version
    session.execute(sa.text("SELECT count(*) FROM servers"))
    before = tables(url)
    with pytest.raises(DatabaseUnusable, match="another session holds a lock"):
        schema.upgrade(at(url))
    assert tables(url) == before
    session.rollback()
    schema.upgrade(at(url))
    assert tables(url) == set(Base.metadata.tables)


def test_a_lock_that_is_held_for_a_moment_only_delays_a_migration(before_this_version, at):
    url, session = before_this_version
    session.execute(sa.text("SELECT count(*) FROM servers"))
    release = threading.Timer(3, session.rollback)
    release.start()
    schema.upgrade(at(url))
    release.join()
    assert tables(url) == set(Base.metadata.tables)


def test_two_that_migrate_at_once_do_it_once(before_this_version, at):
    """Each in a process of its own: Alembic's context is one for each process."""
    url, _ = before_this_version
    code = "import sys; from poolsvc import schema; from poolsvc.config import Settings;"
    code += "schema.upgrade(Settings.model_validate_json(sys.argv[1]))"
    settings = at(url).model_dump_json()
    both = [subprocess.Popen([sys.executable, "-c", code, settings]) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert tables(url) == set(Base.metadata.tables)


def test_who_migrates_waits_for_another_one_longer_than_for_a_lock(before_this_version, at, monkeypatch):
    url, session = before_this_version
    session.execute(sa.text("SELECT pg_advisory_lock(:lock)"), {"lock": 0x7472_7565_0002})
    monkeypatch.setattr(schema, "_WAITS", ())
    release = threading.Timer(3, session.invalidate)
    release.start()
    schema.upgrade(at(url))
    release.join()
    assert tables(url) == set(Base.metadata.tables)


def test_a_database_of_another_pool_is_refused(database_url, settings):
    other = settings.model_copy(update={"database": database_url, "pool": "other.example"})
    schema.check_current(other)

    async def begin():
        database = Database(database_url)
        async with database.transaction() as session:
            await the_pool(session, settings)
        await database.close()

    asyncio.run(begin())
    with pytest.raises(DatabaseUnusable, match=r"that of the pool pool\.example, not of other\.example"):
        schema.check_current(other)
    schema.check_current(settings.model_copy(update={"database": database_url}))


# Before the first release, on tables that had next to nothing in them.
_AT_ONCE = ("1000_", "1600_", "1710_", "1730_", "1740_", "1745_")


def test_no_migration_builds_an_index_under_everybodys_writes():
    for file in (Path(migrations.__file__).parent / "versions").glob("*.py"):
        if file.stem[9:].startswith(_AT_ONCE):
            continue
        text = file.read_text()
        made = set(re.findall(r'create_table\(\s*"(\w+)"', text))
        for call in re.findall(r"create_index\((.*?)\)\n", text, re.DOTALL):
            table = re.findall(r'"(\w+)"', call)[1]
            assert table in made or "postgresql_concurrently=True" in call, f"{file.stem}: {table}"


def constraints(url):
    engine = sa.create_engine(url.replace("+aiosqlite", ""), poolclass=sa.NullPool)
    inspector = sa.inspect(engine)
    return {
        (table, *entry)
        for table in Base.metadata.tables
        for entry in [
            *(("fk", found["name"]) for found in inspector.get_foreign_keys(table)),
            *(("unique", found["name"]) for found in inspector.get_unique_constraints(table)),
            *(("check", found["name"]) for found in inspector.get_check_constraints(table)),
            *(("index", found["name"], found["unique"]) for found in inspector.get_indexes(table)),
            *(("null", found["name"], found["nullable"]) for found in inspector.get_columns(table)),
        ]
    }


def test_migrations_make_the_same_constraints_as_the_models(empty_url, alembic):
    """Alembic's own comparison looks neither at checks nor at names."""
    command.upgrade(alembic(empty_url), "head")
    migrated = constraints(empty_url)
    command.downgrade(alembic(empty_url), "base")
    Base.metadata.create_all(sa.create_engine(empty_url.replace("+aiosqlite", ""), poolclass=sa.NullPool))
    assert constraints(empty_url) == migrated


async def test_every_value_of_every_enum_can_be_stored(registry):
    """The CHECK constraints hold exactly the values that the program has."""
    ids = [await registry.server(f"s{n}", f"198.18.1.{n}", state=s) for n, s in enumerate(ServerState, 1)]
    async with registry.database.transaction() as session:
        session.add_all(Hold(server_id=ids[0], kind=kind, reason="", set_at=NOW) for kind in HoldKind)
        session.add_all(Order(server_id=ids[0], status=status, created_at=NOW) for status in OrderStatus)
        session.add_all(
            Token(kind=kind, sha256=f"{kind:64}", scopes=[], created_at=NOW) for kind in TokenKind
        )
        for number, status in enumerate(StageStatus):
            session.add_all(
                StageRecord(server_id=ids[number], stage=stage, status=status, since=NOW) for stage in Stage
            )
    async with registry.database.transaction() as session:
        found = set(await session.scalars(sa.text("SELECT state FROM servers")))
    assert found == {state.value for state in ServerState}


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE servers SET state = 'sleeping'",
        "INSERT INTO pool (id, domain, epoch) VALUES (2, 'other.example', 0)",
        "INSERT INTO members (name, created_at, opaque_id) VALUES ('Member', '2026-01-01', 'other')",
        "UPDATE servers SET member_id = 999",
        "INSERT INTO addresses (server_id, address, full_probes) SELECT server_id, address, 0 FROM addresses",
    ],
)
async def test_the_database_refuses_what_the_program_must_never_write(registry, statement):
    await registry.server("alice", member=await registry.member("Member"))
    with pytest.raises(IntegrityError):
        async with registry.database.transaction() as session:
            await session.execute(sa.text(statement))


async def test_times_come_back_as_aware_utc(database):
    there = timezone(timedelta(hours=-5))
    async with database.transaction() as session:
        session.add(Member(name="m", opaque_id="o", created_at=NOW.astimezone(there)))
    async with database.transaction() as session:
        (found,) = await session.scalars(sa.select(Member))
    assert found.created_at == NOW
    assert found.created_at.utcoffset() == timedelta(0)


async def test_a_time_without_a_zone_is_refused(database):
    with pytest.raises(StatementError, match="without a zone"):
        async with database.transaction() as session:
            session.add(Member(name="m", opaque_id="o", created_at=NOW.replace(tzinfo=None)))


async def test_a_transaction_that_raises_leaves_nothing(database):
    async def interrupted():
        async with database.transaction() as session:
            session.add(Member(name="m", opaque_id="o", created_at=NOW))
            await session.flush()
            raise NotFound("something")

    with pytest.raises(NotFound):
        await interrupted()
    async with database.transaction() as session:
        assert await session.scalar(sa.select(sa.func.count()).select_from(Member)) == 0


async def test_another_process_sees_a_committed_row_and_no_other(database_url):
    first, second = Database(database_url), Database(database_url)
    try:
        async with first.transaction() as session:
            session.add(Member(name="m", opaque_id="o", created_at=NOW))
        async with second.transaction() as session:
            assert [row.name for row in await session.scalars(sa.select(Member))] == ["m"]
    finally:
        await first.close()
        await second.close()


OLD = """
INSERT INTO members (id, name, created_at) VALUES (1, 'Club', '2026-01-01 00:00:00');
INSERT INTO tokens (id, kind, sha256, member_id, created_at)
  VALUES (1, 'operator', '{operator}', NULL, '2026-01-01 00:00:00'), (2, 'member', '{member}', 1, '2026-01-01 00:00:00');
INSERT INTO servers (id, member_id, name, state, state_since, created_at, weight, agent_engine, agent_clock,
  order_failures) VALUES (1, 1, 'a1ice', 'active', '2026-01-01 00:00:00', '2026-01-01 00:00:00', 1, '', '', 0),
  (2, 1, 'gone', 'removed', '2026-01-01 00:00:00', '2026-01-01 00:00:00', 1, '', '', 0);
INSERT INTO addresses (id, server_id, address, full_probes, step_reason) VALUES (1, 1, '192.0.2.1', 0, '');
INSERT INTO events (id, server_id, at, actor, kind, before, after, reason) VALUES
  (1, 1, '2026-01-01 00:00:00', 'member 1', 'registered', NULL, 'registered', ''),
  (2, 1, '2026-01-01 00:00:01', 'worker', 'address-proved', 'registered', 'verified', 'why')
"""


def test_keys_of_orders_that_are_there_are_known_from_now_on(empty_url, alembic):
    """Whoever has the same key in two orders: the first one has it."""
    config = alembic(empty_url)
    command.upgrade(config, "6c55726924fc")
    csr = new_key_and_csr("alice.servers.pool.example")[1]
    engine = sa.create_engine(empty_url.replace("+aiosqlite", ""), poolclass=sa.NullPool)
    with engine.begin() as connection:
        member, _, server, *_ = OLD.split(";")
        connection.execute(sa.text(member))
        connection.execute(sa.text(server))
        for request in (csr, csr, "garbage", None):
            connection.execute(
                sa.text(
                    "INSERT INTO orders (server_id, status, created_at, attempts, csr)"
                    " VALUES (1, 'issued', '2026-01-01 00:00:00', 0, :csr)"
                ),
                {"csr": request},
            )
    command.upgrade(config, "head")
    with engine.connect() as connection:
        found = connection.execute(sa.text("SELECT key_sha256 FROM orders ORDER BY id")).scalars().all()
    assert found == [csr_key_sha256(csr), None, None, None]


def test_what_the_version_before_kept_is_there_and_works(empty_url, alembic):
    """Tokens belong to people, events are the beginning of the log, and new rules know old servers."""
    config = alembic(empty_url)
    command.upgrade(config, "6c55726924fc")
    secrets = {"operator": "tc_operator_x", "member": "tc_member_x"}
    hashes = {name: auth.hash_secret(secret) for name, secret in secrets.items()}
    engine = sa.create_engine(empty_url.replace("+aiosqlite", ""), poolclass=sa.NullPool)
    with engine.begin() as connection:
        for statement in OLD.format(**hashes).split(";"):
            connection.execute(sa.text(statement))
    command.upgrade(config, "head")

    async def look():
        database = Database(empty_url)
        try:
            async with database.transaction() as session:
                found = [await auth.authenticate(session, secret, NOW) for secret in secrets.values()]
                events = list(await session.scalars(sa.select(Event).order_by(Event.id)))
                servers = list(await session.scalars(sa.select(Server).order_by(Server.id)))
                address = (await session.scalars(sa.select(Address))).one()
                member = (await session.scalars(sa.select(Member))).one()
                session.add(Event(at=NOW, actor="a", kind="k", subject="s", reason=""))
            return found, events, servers, address, member
        finally:
            await database.close()

    (operator, person), events, (alice, gone), address, member = asyncio.run(look())
    assert operator.staff is StaffRole.OPERATOR
    assert (person.staff, person.members) == (None, {1: MemberRole.OWNER})
    operator.may(auth.Operation.CREATE_MEMBER)
    person.may(auth.Operation.REGISTER_SERVER, member=1)
    assert [(entry.kind, entry.before, entry.after) for entry in events] == [
        ("registered", None, {"state": "registered"}),
        ("address-proved", {"state": "registered"}, {"state": "verified"}),
    ]
    assert (alice.skeleton, alice.journal_due_at) == (skeleton("alice"), None)
    assert gone.journal_due_at is not None
    assert address.confirmed_at is not None
    assert len(member.opaque_id) == 16


BEFORE_SEVERAL_CAS = """
INSERT INTO pool (id, domain, epoch, account_uri) VALUES (1, 'pool.example', 3, 'https://ca.example/acct/1');
INSERT INTO members (id, name, kind, status, opaque_id, public, created_at)
  VALUES (1, 'M', 'person', 'active', 'm1', false, '2026-03-01 12:00:00');
INSERT INTO servers (id, member_id, name, state, state_since, created_at, weight, agent_engine, agent_clock, order_failures)
  VALUES (1, 1, 'alice', 'active', '2026-03-01 12:00:00', '2026-03-01 12:00:00', 1, '', '', 0);
INSERT INTO orders (id, server_id, status, created_at, attempts, url) VALUES
  (1, 1, 'issued', '2026-03-01 12:00:00', 0, 'https://ca.example/order/1'),
  (2, 1, 'failed', '2026-03-01 12:00:00', 0, 'https://ca.before.example:8443/order/7'),
  (3, 1, 'wanted', '2026-03-01 12:00:00', 0, NULL)
"""


def test_the_account_and_its_orders_belong_to_the_ca_whose_host_they_have(empty_url, alembic):
    config = alembic(empty_url)
    command.upgrade(config, "b5d07c1e92a4")
    engine = sa.create_engine(empty_url.replace("+aiosqlite", ""), poolclass=sa.NullPool)
    with engine.begin() as connection:
        for statement in BEFORE_SEVERAL_CAS.split(";"):
            connection.execute(sa.text(statement))
    command.upgrade(config, "7d0c3b1e95a2")
    with engine.connect() as connection:
        accounts = connection.execute(sa.text("SELECT ca, uri FROM ca_accounts")).all()
        orders = connection.execute(sa.text("SELECT ca, account_uri FROM orders ORDER BY id")).all()
    assert accounts == [("ca.example", "https://ca.example/acct/1")]
    assert orders == [
        ("ca.example", "https://ca.example/acct/1"),
        ("ca.before.example:8443", None),
        (None, None),
    ]
    command.downgrade(config, "b5d07c1e92a4")
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT account_uri FROM pool")) == "https://ca.example/acct/1"
