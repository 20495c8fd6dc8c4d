"""monitors, what each saw of each address, and summaries of that"""

from datetime import UTC, datetime

import sqlalchemy as sa
from alembic import op

import poolsvc.db

revision = "f7a1c3e5d904"
down_revision = "e6f9b2a8d573"
branch_labels = None
depends_on = None

_KINDS = ("session", "api", "join", "agent")


def _let_tokens(*kinds: str) -> None:
    one_of = ", ".join(f"'{kind}'" for kind in kinds)
    with op.batch_alter_table("tokens", schema=None) as batch_op:
        batch_op.drop_constraint(op.f("ck_tokens_kind"), type_="check")
        batch_op.create_check_constraint(op.f("ck_tokens_kind"), f"kind IN ({one_of})")


def upgrade() -> None:
    op.create_table(
        "daily_summaries",
        sa.Column("address_id", sa.Integer(), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("monitor", sa.String(length=40), nullable=False),
        sa.Column("probes", sa.Integer(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("step", sa.Double(), nullable=False),
        sa.Column("score", sa.Double(), nullable=True),
        sa.Column("offset_ns", sa.BigInteger(), nullable=True),
        sa.Column("offset_most_ns", sa.BigInteger(), nullable=True),
        sa.Column("delay_ns", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("address_id", "day", "monitor", name=op.f("pk_daily_summaries")),
    )
    op.create_index("ix_daily_summaries_day", "daily_summaries", ["day"])

    op.create_table(
        "hourly_summaries",
        sa.Column("address_id", sa.Integer(), nullable=False),
        sa.Column("hour", poolsvc.db.UtcDateTime(timezone=True), nullable=False),
        sa.Column("monitor", sa.String(length=40), nullable=False),
        sa.Column("probes", sa.Integer(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("step", sa.Double(), nullable=False),
        sa.Column("score", sa.Double(), nullable=True),
        sa.Column("offset_ns", sa.BigInteger(), nullable=True),
        sa.Column("offset_most_ns", sa.BigInteger(), nullable=True),
        sa.Column("delay_ns", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("address_id", "hour", "monitor", name=op.f("pk_hourly_summaries")),
    )
    op.create_index("ix_hourly_summaries_hour", "hourly_summaries", ["hour"])

    op.create_table(
        "monitors",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=40), nullable=False),
        sa.Column("member_id", sa.Integer(), nullable=True),
        sa.Column(
            "status",
            sa.Enum(
                "pending",
                "testing",
                "active",
                "paused",
                "ended",
                name="status",
                native_enum=False,
                create_constraint=True,
                length=32,
            ),
            nullable=False,
        ),
        sa.Column("status_reason", sa.String(length=300), nullable=False),
        sa.Column("status_since", poolsvc.db.UtcDateTime(timezone=True), nullable=False),
        sa.Column("created_at", poolsvc.db.UtcDateTime(timezone=True), nullable=False),
        sa.Column("program", sa.String(length=100), nullable=False),
        sa.Column("seen_at", poolsvc.db.UtcDateTime(timezone=True), nullable=True),
        sa.Column("sound", sa.Boolean(), nullable=True),
        sa.Column("sound_since", poolsvc.db.UtcDateTime(timezone=True), nullable=True),
        sa.Column("sound_detail", sa.String(length=300), nullable=False),
        sa.Column("ipv4", sa.Boolean(), nullable=False),
        sa.Column("ipv6", sa.Boolean(), nullable=False),
        sa.Column("ipv4_address", sa.String(length=45), nullable=True),
        sa.Column("ipv6_address", sa.String(length=45), nullable=True),
        sa.Column("network", sa.BigInteger(), nullable=True),
        sa.Column("country", sa.String(length=2), nullable=True),
        sa.ForeignKeyConstraint(["member_id"], ["members.id"], name=op.f("fk_monitors_member_id_members")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_monitors")),
        sa.UniqueConstraint("name", name=op.f("uq_monitors_name")),
    )
    op.create_index("ix_monitors_member_id", "monitors", ["member_id"])

    op.create_table(
        "monitor_views",
        sa.Column("address_id", sa.Integer(), nullable=False),
        sa.Column("monitor_id", sa.Integer(), nullable=False),
        sa.Column(
            "role",
            sa.Enum(
                "candidate",
                "testing",
                "active",
                "paused",
                name="role",
                native_enum=False,
                create_constraint=True,
                length=32,
            ),
            nullable=False,
        ),
        sa.Column("role_since", poolsvc.db.UtcDateTime(timezone=True), nullable=False),
        sa.Column("role_reason", sa.String(length=200), nullable=False),
        sa.Column("due_at", poolsvc.db.UtcDateTime(timezone=True), nullable=True),
        sa.Column("at", poolsvc.db.UtcDateTime(timezone=True), nullable=True),
        sa.Column("score", sa.Double(), nullable=True),
        sa.Column("shadow_score", sa.Double(), nullable=True),
        sa.Column("full_probes", sa.Integer(), nullable=False),
        sa.Column(
            "failed",
            sa.Enum(
                "name",
                "addresses",
                "issuance",
                "tcp",
                "tls",
                "certificate",
                "ke",
                "cookies",
                "ntp-ke-cookie",
                "ntp-ntp-cookie",
                "offset",
                "score",
                "pool",
                name="failed",
                native_enum=False,
                create_constraint=True,
                length=32,
            ),
            nullable=True,
        ),
        sa.Column("failed_since", poolsvc.db.UtcDateTime(timezone=True), nullable=True),
        sa.Column("silent_since", poolsvc.db.UtcDateTime(timezone=True), nullable=True),
        sa.Column("detail", sa.String(length=300), nullable=False),
        sa.Column("step", sa.Double(), nullable=True),
        sa.Column("step_reason", sa.String(length=200), nullable=False),
        sa.Column("offset_ns", sa.BigInteger(), nullable=True),
        sa.Column("delay_ns", sa.BigInteger(), nullable=True),
        sa.Column("mean_delay_ns", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["address_id"], ["addresses.id"], name=op.f("fk_monitor_views_address_id_addresses")
        ),
        sa.ForeignKeyConstraint(
            ["monitor_id"], ["monitors.id"], name=op.f("fk_monitor_views_monitor_id_monitors")
        ),
        sa.PrimaryKeyConstraint("address_id", "monitor_id", name=op.f("pk_monitor_views")),
    )
    op.create_index("ix_monitor_views_monitor_id", "monitor_views", ["monitor_id", "due_at"])

    with op.batch_alter_table("addresses", schema=None) as batch_op:
        batch_op.add_column(sa.Column("shadow_score", sa.Double(), nullable=True))
        batch_op.add_column(sa.Column("judged_at", poolsvc.db.UtcDateTime(timezone=True), nullable=True))
        batch_op.add_column(sa.Column("unknown", sa.String(length=200), nullable=True))

    with op.batch_alter_table("pool", schema=None) as batch_op:
        batch_op.add_column(sa.Column("quorum", sa.Integer(), nullable=False, server_default="1"))

    with op.batch_alter_table("tokens", schema=None) as batch_op:
        batch_op.add_column(sa.Column("monitor_id", sa.Integer(), nullable=True))
        batch_op.create_foreign_key(
            batch_op.f("fk_tokens_monitor_id_monitors"), "monitors", ["monitor_id"], ["id"]
        )

    with op.batch_alter_table("pool", schema=None) as batch_op:
        batch_op.alter_column("quorum", server_default=None)
    _let_tokens(*_KINDS, "monitor")
    _keep_scores()


def _keep_scores() -> None:
    """The one monitor that there was has said all that is known of addresses."""
    if op.get_context().as_sql:
        return
    connection, now = op.get_bind(), datetime.now(UTC)
    if connection.execute(sa.text("SELECT 1 FROM servers LIMIT 1")).first() is None:
        return  # an empty database stays one, into which a backup may go
    monitors = sa.table(
        "monitors",
        *map(sa.column, ("id", "name", "status", "status_reason", "sound_detail", "program")),
        *(sa.column(name, poolsvc.db.UtcDateTime) for name in ("status_since", "created_at")),
        *(sa.column(name, sa.Boolean) for name in ("ipv4", "ipv6")),
    )
    connection.execute(
        monitors.insert().values(
            name="registry",
            status="active",
            status_reason="the pool's own, in the registry",
            status_since=now,
            created_at=now,
            program="",
            sound_detail="",
            ipv4=True,
            ipv6=True,
        )
    )
    copied = sa.text(
        "INSERT INTO monitor_views"
        " (address_id, monitor_id, role, role_since, role_reason, score, full_probes, detail, step_reason)"
        " SELECT addresses.id, monitors.id, 'active', monitors.created_at, '', addresses.score,"
        " addresses.full_probes, '', addresses.step_reason"
        " FROM addresses CROSS JOIN monitors WHERE addresses.proved_at IS NOT NULL"
    )
    connection.execute(copied)


def downgrade() -> None:
    op.execute("DELETE FROM tokens WHERE kind = 'monitor'")
    _let_tokens(*_KINDS)
    with op.batch_alter_table("tokens", schema=None) as batch_op:
        batch_op.drop_constraint(op.f("fk_tokens_monitor_id_monitors"), type_="foreignkey")
        batch_op.drop_column("monitor_id")
    with op.batch_alter_table("pool", schema=None) as batch_op:
        batch_op.drop_column("quorum")
    with op.batch_alter_table("addresses", schema=None) as batch_op:
        for name in ("unknown", "judged_at", "shadow_score"):
            batch_op.drop_column(name)
    for name in ("monitor_views", "monitors", "hourly_summaries", "daily_summaries"):
        op.drop_table(name)
