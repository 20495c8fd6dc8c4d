"""first tables"""

import sqlalchemy as sa
from alembic import op

from poolsvc.db import UtcDateTime

revision = "6c55726924fc"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:

    op.create_table(
        "connect_backs",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("address", sa.String(length=45), nullable=False),
        sa.Column("prefix", sa.String(length=49), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_connect_backs")),
    )
    with op.batch_alter_table("connect_backs", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_connect_backs_address"), ["address"], unique=False)
        batch_op.create_index(batch_op.f("ix_connect_backs_at"), ["at"], unique=False)
        batch_op.create_index(batch_op.f("ix_connect_backs_prefix"), ["prefix"], unique=False)

    op.create_table(
        "members",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_members")),
        sa.UniqueConstraint("name", name=op.f("uq_members_name")),
    )
    op.create_table(
        "pool",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("domain", sa.String(length=253), nullable=False),
        sa.Column("opened_at", UtcDateTime(), nullable=True),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("account_uri", sa.Text(), nullable=True),
        sa.CheckConstraint("id = 1", name=op.f("ck_pool_single")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pool")),
    )
    op.create_table(
        "servers",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("member_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=36), nullable=False),
        sa.Column(
            "state",
            sa.Enum(
                "registered",
                "verified",
                "certified",
                "active",
                "suspended",
                "leaving",
                "removed",
                name="state",
                native_enum=False,
                create_constraint=True,
                length=32,
            ),
            nullable=False,
        ),
        sa.Column("state_since", UtcDateTime(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("weight", sa.Integer(), nullable=False),
        sa.Column("joined_at", UtcDateTime(), nullable=True),
        sa.Column("agent_key", sa.String(length=64), nullable=True),
        sa.Column("agent_seen_at", UtcDateTime(), nullable=True),
        sa.Column("agent_engine", sa.String(length=100), nullable=False),
        sa.Column("agent_clock", sa.String(length=300), nullable=False),
        sa.Column("agent_problem", sa.String(length=1000), nullable=True),
        sa.Column("burnt_at", UtcDateTime(), nullable=True),
        sa.Column("released_at", UtcDateTime(), nullable=True),
        sa.Column("named_at", UtcDateTime(), nullable=True),
        sa.Column("listed_at", UtcDateTime(), nullable=True),
        sa.Column("probe_due_at", UtcDateTime(), nullable=True),
        sa.Column("order_due_at", UtcDateTime(), nullable=True),
        sa.Column("order_failures", sa.Integer(), nullable=False),
        sa.Column("leave_reason", sa.String(length=300), nullable=True),
        sa.Column("srv_withdrawn_at", UtcDateTime(), nullable=True),
        sa.Column("name_broken_at", UtcDateTime(), nullable=True),
        sa.Column("authorization_deactivated_at", UtcDateTime(), nullable=True),
        sa.Column("certificate_revoked_at", UtcDateTime(), nullable=True),
        sa.Column("removal_due_at", UtcDateTime(), nullable=True),
        sa.Column("removal_error", sa.String(length=1000), nullable=True),
        sa.ForeignKeyConstraint(["member_id"], ["members.id"], name=op.f("fk_servers_member_id_members")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_servers")),
    )
    with op.batch_alter_table("servers", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_servers_member_id"), ["member_id"], unique=False)
        batch_op.create_index(batch_op.f("ix_servers_order_due_at"), ["order_due_at"], unique=False)
        batch_op.create_index(batch_op.f("ix_servers_probe_due_at"), ["probe_due_at"], unique=False)
        batch_op.create_index(batch_op.f("ix_servers_removal_due_at"), ["removal_due_at"], unique=False)
        batch_op.create_index(batch_op.f("ix_servers_state"), ["state"], unique=False)
        batch_op.create_index(
            "uq_servers_name_held",
            ["name"],
            unique=True,
            sqlite_where=sa.text("released_at IS NULL"),
            postgresql_where=sa.text("released_at IS NULL"),
        )

    op.create_table(
        "addresses",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("server_id", sa.Integer(), nullable=False),
        sa.Column("address", sa.String(length=45), nullable=False),
        sa.Column("nonce", sa.String(length=64), nullable=True),
        sa.Column("proof_due_at", UtcDateTime(), nullable=True),
        sa.Column("proof_error", sa.String(length=300), nullable=True),
        sa.Column("proved_at", UtcDateTime(), nullable=True),
        sa.Column("full_probes", sa.Integer(), nullable=False),
        sa.Column("score", sa.Double(), nullable=True),
        sa.Column("step_reason", sa.String(length=200), nullable=False),
        sa.ForeignKeyConstraint(["server_id"], ["servers.id"], name=op.f("fk_addresses_server_id_servers")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_addresses")),
        sa.UniqueConstraint("server_id", "address", name=op.f("uq_addresses_server_id")),
    )
    with op.batch_alter_table("addresses", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_addresses_address"), ["address"], unique=False)
        batch_op.create_index(batch_op.f("ix_addresses_proof_due_at"), ["proof_due_at"], unique=False)
        batch_op.create_index(batch_op.f("ix_addresses_server_id"), ["server_id"], unique=False)

    op.create_table(
        "events",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("server_id", sa.Integer(), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("actor", sa.String(length=100), nullable=False),
        sa.Column("kind", sa.String(length=50), nullable=False),
        sa.Column(
            "before",
            sa.Enum(
                "registered",
                "verified",
                "certified",
                "active",
                "suspended",
                "leaving",
                "removed",
                name="before",
                native_enum=False,
                create_constraint=True,
                length=32,
            ),
            nullable=True,
        ),
        sa.Column(
            "after",
            sa.Enum(
                "registered",
                "verified",
                "certified",
                "active",
                "suspended",
                "leaving",
                "removed",
                name="after",
                native_enum=False,
                create_constraint=True,
                length=32,
            ),
            nullable=False,
        ),
        sa.Column("reason", sa.String(length=300), nullable=False),
        sa.ForeignKeyConstraint(["server_id"], ["servers.id"], name=op.f("fk_events_server_id_servers")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
    )
    with op.batch_alter_table("events", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_events_server_id"), ["server_id"], unique=False)

    op.create_table(
        "holds",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("server_id", sa.Integer(), nullable=False),
        sa.Column(
            "kind",
            sa.Enum(
                "score",
                "certificate",
                "maintenance",
                "operator",
                name="kind",
                native_enum=False,
                create_constraint=True,
                length=32,
            ),
            nullable=False,
        ),
        sa.Column("reason", sa.String(length=300), nullable=False),
        sa.Column("set_at", UtcDateTime(), nullable=False),
        sa.Column("lifted_at", UtcDateTime(), nullable=True),
        sa.ForeignKeyConstraint(["server_id"], ["servers.id"], name=op.f("fk_holds_server_id_servers")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_holds")),
    )
    with op.batch_alter_table("holds", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_holds_server_id"), ["server_id"], unique=False)

    op.create_table(
        "orders",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("server_id", sa.Integer(), nullable=False),
        sa.Column(
            "status",
            sa.Enum(
                "wanted",
                "requested",
                "pending",
                "answered",
                "finalizing",
                "issued",
                "failed",
                name="status",
                native_enum=False,
                create_constraint=True,
                length=32,
            ),
            nullable=False,
        ),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("due_at", UtcDateTime(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("error", sa.String(length=1000), nullable=True),
        sa.Column("csr", sa.Text(), nullable=True),
        sa.Column("url", sa.Text(), nullable=True),
        sa.Column("authorization_url", sa.Text(), nullable=True),
        sa.Column("challenge_url", sa.Text(), nullable=True),
        sa.Column("token", sa.String(length=128), nullable=True),
        sa.Column("key_authorization", sa.String(length=200), nullable=True),
        sa.Column("served_at", UtcDateTime(), nullable=True),
        sa.Column("issued_at", UtcDateTime(), nullable=True),
        sa.Column("chain", sa.Text(), nullable=True),
        sa.Column("fingerprint", sa.String(length=64), nullable=True),
        sa.Column("serial", sa.String(length=64), nullable=True),
        sa.Column("not_before", UtcDateTime(), nullable=True),
        sa.Column("not_after", UtcDateTime(), nullable=True),
        sa.Column("deactivated_at", UtcDateTime(), nullable=True),
        sa.Column("revoked_at", UtcDateTime(), nullable=True),
        sa.ForeignKeyConstraint(["server_id"], ["servers.id"], name=op.f("fk_orders_server_id_servers")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_orders")),
    )
    with op.batch_alter_table("orders", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_orders_due_at"), ["due_at"], unique=False)
        batch_op.create_index(batch_op.f("ix_orders_fingerprint"), ["fingerprint"], unique=False)
        batch_op.create_index(batch_op.f("ix_orders_server_id"), ["server_id"], unique=False)
        batch_op.create_index(batch_op.f("ix_orders_status"), ["status"], unique=False)

    op.create_table(
        "stages",
        sa.Column("server_id", sa.Integer(), nullable=False),
        sa.Column(
            "stage",
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
                name="stage",
                native_enum=False,
                create_constraint=True,
                length=32,
            ),
            nullable=False,
        ),
        sa.Column(
            "status",
            sa.Enum(
                "met",
                "failed",
                "waiting",
                name="status",
                native_enum=False,
                create_constraint=True,
                length=32,
            ),
            nullable=False,
        ),
        sa.Column("since", UtcDateTime(), nullable=False),
        sa.Column("detail", sa.String(length=300), nullable=False),
        sa.ForeignKeyConstraint(["server_id"], ["servers.id"], name=op.f("fk_stages_server_id_servers")),
        sa.PrimaryKeyConstraint("server_id", "stage", name=op.f("pk_stages")),
    )
    op.create_table(
        "tokens",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column(
            "kind",
            sa.Enum(
                "operator",
                "member",
                "join",
                "agent",
                name="kind",
                native_enum=False,
                create_constraint=True,
                length=32,
            ),
            nullable=False,
        ),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("member_id", sa.Integer(), nullable=True),
        sa.Column("server_id", sa.Integer(), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=True),
        sa.Column("used_at", UtcDateTime(), nullable=True),
        sa.Column("revoked_at", UtcDateTime(), nullable=True),
        sa.ForeignKeyConstraint(["member_id"], ["members.id"], name=op.f("fk_tokens_member_id_members")),
        sa.ForeignKeyConstraint(["server_id"], ["servers.id"], name=op.f("fk_tokens_server_id_servers")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tokens")),
        sa.UniqueConstraint("sha256", name=op.f("uq_tokens_sha256")),
    )
    with op.batch_alter_table("tokens", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_tokens_server_id"), ["server_id"], unique=False)


def downgrade() -> None:

    with op.batch_alter_table("tokens", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_tokens_server_id"))

    op.drop_table("tokens")
    op.drop_table("stages")
    with op.batch_alter_table("orders", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_orders_status"))
        batch_op.drop_index(batch_op.f("ix_orders_server_id"))
        batch_op.drop_index(batch_op.f("ix_orders_fingerprint"))
        batch_op.drop_index(batch_op.f("ix_orders_due_at"))

    op.drop_table("orders")
    with op.batch_alter_table("holds", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_holds_server_id"))

    op.drop_table("holds")
    with op.batch_alter_table("events", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_events_server_id"))

    op.drop_table("events")
    with op.batch_alter_table("addresses", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_addresses_server_id"))
        batch_op.drop_index(batch_op.f("ix_addresses_proof_due_at"))
        batch_op.drop_index(batch_op.f("ix_addresses_address"))

    op.drop_table("addresses")
    with op.batch_alter_table("servers", schema=None) as batch_op:
        batch_op.drop_index(
            "uq_servers_name_held",
            sqlite_where=sa.text("released_at IS NULL"),
            postgresql_where=sa.text("released_at IS NULL"),
        )
        batch_op.drop_index(batch_op.f("ix_servers_state"))
        batch_op.drop_index(batch_op.f("ix_servers_removal_due_at"))
        batch_op.drop_index(batch_op.f("ix_servers_probe_due_at"))
        batch_op.drop_index(batch_op.f("ix_servers_order_due_at"))
        batch_op.drop_index(batch_op.f("ix_servers_member_id"))

    op.drop_table("servers")
    op.drop_table("pool")
    op.drop_table("members")
    with op.batch_alter_table("connect_backs", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_connect_backs_prefix"))
        batch_op.drop_index(batch_op.f("ix_connect_backs_at"))
        batch_op.drop_index(batch_op.f("ix_connect_backs_address"))

    op.drop_table("connect_backs")
