"""the queue for the CA's limits: places, what was counted, what the CA granted and refused"""

import sqlalchemy as sa
from alembic import op

from poolsvc.db import UtcDateTime

revision = "b5d07c1e92a4"
down_revision = "8c1f0e5b72d3"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "ca_limits",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("certificates", sa.Integer(), nullable=True),
        sa.Column("orders", sa.Integer(), nullable=True),
        sa.Column("until", UtcDateTime(), nullable=True),
        sa.Column("note", sa.String(length=200), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_ca_limits_single")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ca_limits")),
    )
    op.create_table(
        "ca_refusals",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("until", UtcDateTime(), nullable=False),
        sa.Column("detail", sa.String(length=1000), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_ca_refusals_single")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ca_refusals")),
    )
    op.add_column("servers", sa.Column("queue_round", sa.Integer(), nullable=True))
    op.add_column("servers", sa.Column("counted_at", UtcDateTime(), nullable=True))
    op.execute(
        "UPDATE servers SET counted_at ="
        " (SELECT min(issued_at) FROM orders WHERE orders.server_id = servers.id)"
    )
    op.create_index(op.f("ix_servers_counted_at"), "servers", ["counted_at"], unique=False)
    op.create_index(
        "ix_servers_queue",
        "servers",
        ["queue_round", "named_at", "id"],
        unique=False,
        sqlite_where=sa.text("queue_round IS NOT NULL"),
        postgresql_where=sa.text("queue_round IS NOT NULL"),
    )
    op.create_index(op.f("ix_orders_created_at"), "orders", ["created_at"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_orders_created_at"), table_name="orders")
    op.drop_index("ix_servers_queue", table_name="servers")
    op.drop_index(op.f("ix_servers_counted_at"), table_name="servers")
    op.drop_column("servers", "counted_at")
    op.drop_column("servers", "queue_round")
    op.drop_table("ca_refusals")
    op.drop_table("ca_limits")
