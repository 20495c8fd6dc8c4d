"""Databases of pools that never were: as many servers as asked for, each with all that a real one has."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

import psycopg
import sqlalchemy as sa

from nts_core.control import ServerState, Stage, StageStatus
from poolsvc.db import UtcDateTime
from poolsvc.models import (
    Address,
    OrderStatus,
    SampleRecord,
    Scope,
    Server,
    StaffRole,
    StageRecord,
    TokenKind,
)

POOL = "pool.example"
CA = "127.0.0.1:9"  # where nobody answers
ACCOUNT = "https://ca.example/acct/1"
OPERATOR = "tc_api_bench-operator"
_BATCH = 2_000
_CHAIN = "-----BEGIN CERTIFICATE-----\n" + "MIIB" * 900 + "\n-----END CERTIFICATE-----\n"
_MEMBERS = 1_000
_STAGES = [
    stage
    for stage in Stage
    if stage not in (Stage.NAME, Stage.ADDRESSES, Stage.ISSUANCE, Stage.SCORE, Stage.POOL)
]
_SAMPLES = 2  # of each address


def name(number: int) -> str:
    return f"s{number}"


def agent_token(number: int) -> str:
    return f"tc_agent_bench-{number}"


def ipv4(number: int) -> str:
    return f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"


def ipv6(number: int) -> str:
    return f"fd00::{number >> 16:x}:{number & 65535:x}"


@dataclass(frozen=True, slots=True)
class _Filling:
    """Rows of one table, in the order of `columns`."""

    table: str
    columns: tuple[str, ...]
    rows: Iterator[tuple[Any, ...]]


def fill(url: str, servers: int, now: datetime) -> None:
    """Fill a migrated database with ACTIVE servers that nothing is due for.

    Each has an IPv4 and an IPv6 address, a certificate, the stages of its last probe, samples, an agent and its token.
    """
    engine = sa.create_engine(url.replace("+aiosqlite", ""), poolclass=sa.NullPool)
    put: Callable[[sa.Connection, _Filling], None] = _copy if engine.dialect.name == "postgresql" else _insert
    with engine.connect() as connection:
        for filling in _fillings(servers, now):
            put(connection, filling)
        _derive(connection, now)
        if engine.dialect.name == "postgresql":
            for table in ("servers", "addresses", "orders", "tokens", "users", "members", "memberships"):
                connection.execute(
                    sa.text(
                        f"SELECT setval(pg_get_serial_sequence('{table}', 'id'),"
                        f" (SELECT max(id) FROM {table}))"
                    )
                )
        connection.commit()
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        # As a database that has been there for long: with statistics, and nothing for its first readers to clean up.
        connection.execute(sa.text("VACUUM ANALYZE" if engine.dialect.name == "postgresql" else "ANALYZE"))
    engine.dispose()


def whole_reads(url: str) -> int:
    """How often a PostgreSQL database's large tables were read from end to end."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        found = connection.scalar(
            sa.text("SELECT sum(seq_scan) FROM pg_stat_user_tables WHERE relname = ANY(:tables)"),
            {"tables": ["servers", "addresses", "orders", "tokens", "stages"]},
        )
    engine.dispose()
    return int(found or 0)


def _fillings(servers: int, now: datetime) -> Iterator[_Filling]:
    then, later = now - timedelta(days=3), now + timedelta(days=3)
    numbers = range(1, servers + 1)

    def sha256(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    def table(title: str, columns: str, rows: Iterator[tuple[Any, ...]]) -> _Filling:
        return _Filling(title, tuple(columns.split()), rows)

    yield table(
        "pool",
        "id domain opened_at epoch quorum",
        iter([(1, POOL, then, 1, 3)]),
    )
    yield table("ca_accounts", "ca uri profiles", iter([(CA, ACCOUNT, "[]")]))
    yield table("users", "id name staff created_at", iter([(1, "", StaffRole.OPERATOR.value, then)]))
    yield table(
        "members",
        "id name kind status opaque_id public created_at",
        (
            (n, f"Member {n}", "person", "active", f"m{n}", False, then)
            for n in range(1, min(servers, _MEMBERS) + 1)
        ),
    )
    yield table(
        "servers",
        "id member_id name state state_since created_at weight ipv4 ipv6 public agentless waive_source short_lived"
        " skeleton joined_at agent_key agent_seen_at agent_engine agent_clock burnt_at named_at listed_at order_failures"
        " dead_warnings",
        (
            (
                *(n, n % min(servers, _MEMBERS) + 1, name(n), ServerState.ACTIVE.value, then, then),
                *(1, True, True, False, False, False, False, name(n)),
                *(then, "A" * 43 + "=", now, "builtin", "synchronised", then, then, then, 0, 0),
            )
            for n in numbers
        ),
    )
    yield table(
        "addresses",
        "id server_id address proved_at full_probes score step_reason",
        (
            (2 * n - family, n, address(n), then, 3, 20.0, "")
            for n in numbers
            for family, address in ((1, ipv4), (0, ipv6))
        ),
    )
    yield table(
        "orders",
        "id server_id status created_at attempts chain fingerprint serial not_before not_after issued_at seen_at",
        (
            (
                *(n, n, OrderStatus.ISSUED.value, then, 0, _CHAIN, sha256(f"certificate {n}")),
                *(f"{n:x}", then, later, then, then),
            )
            for n in numbers
        ),
    )
    yield table(
        "tokens",
        "id kind sha256 hint label server_id user_id scopes created_at last_used_at",
        (
            (n + 1, kind, sha256(text), "", "", server, user, json.dumps(scopes), then, now)
            for n, kind, text, server, user, scopes in (
                (0, TokenKind.API.value, OPERATOR, None, 1, sorted(Scope)),
                *((n, TokenKind.AGENT.value, agent_token(n), n, None, []) for n in numbers),
            )
        ),
    )


def certificate(number: int) -> str:
    """The fingerprint of a server's certificate."""
    return hashlib.sha256(f"certificate {number}".encode()).hexdigest()


def _derive(connection: sa.Connection, now: datetime) -> None:
    """What every server and every address has alike."""
    then = now - timedelta(days=3)
    for stage in _STAGES:
        connection.execute(
            sa.insert(StageRecord).from_select(
                ["server_id", "stage", "status", "since", "detail"],
                sa.select(
                    Server.id,
                    sa.literal(stage.value),
                    sa.literal(StageStatus.MET.value),
                    sa.literal(then, UtcDateTime),
                    sa.literal(""),
                ),
            )
        )
    for number in range(_SAMPLES):
        connection.execute(
            sa.insert(SampleRecord).from_select(
                ["address_id", "at", "monitor", "step", "score", "offset_ns", "delay_ns"],
                sa.select(
                    Address.id,
                    sa.literal(now - number * timedelta(minutes=1), UtcDateTime),
                    sa.literal("registry"),
                    sa.literal(1.0),
                    sa.literal(20.0),
                    sa.literal(1000),
                    sa.literal(2_000_000),
                ),
            )
        )


def _copy(connection: sa.Connection, filling: _Filling) -> None:
    raw = connection.connection.driver_connection
    assert isinstance(raw, psycopg.Connection)
    columns = ", ".join(filling.columns)
    with raw.cursor() as cursor, cursor.copy(f"COPY {filling.table} ({columns}) FROM STDIN".encode()) as copy:
        for row in filling.rows:
            copy.write_row(row)


def _insert(connection: sa.Connection, filling: _Filling) -> None:
    plain = sa.table(filling.table, *(sa.column(column) for column in filling.columns))
    rows = filling.rows
    while some := list(islice(rows, _BATCH)):
        connection.execute(
            sa.insert(plain), [dict(zip(filling.columns, map(_as_sqlite, row), strict=True)) for row in some]
        )


def _as_sqlite(value: Any) -> Any:
    return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f") if isinstance(value, datetime) else value


def records(numbers: Sequence[int], ttl: int) -> Iterator[str]:
    """The lines of a zone file for such servers, relative to the pool."""
    issue = f'0 issue "ca.example; accounturi={ACCOUNT}; validationmethods=http-01"'
    yield f'servers {ttl} CAA 0 issue ";"'
    for number in numbers:
        owner = f"{name(number)}.servers {ttl}"
        yield f"{owner} A {ipv4(number)}"
        yield f"{owner} AAAA {ipv6(number)}"
        yield f"{owner} CAA {issue}"
