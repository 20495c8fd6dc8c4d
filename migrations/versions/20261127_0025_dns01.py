"""control of a name proved in DNS, for a server's orders and to revoke what a member's own account had"""

import sqlalchemy as sa
from alembic import op

from poolsvc.db import UtcDateTime

revision = "c41f8a6d27be"
down_revision = "93d2a7f5b06c"
branch_labels = None
depends_on = None

_TIMES = ("revoking_since", "caa_turned_at", "control_proved_at", "revoking_ended_at", "caa_closed_at")


def upgrade() -> None:
    op.create_table(
        "revocation_orders",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("server_id", sa.Integer(), nullable=False),
        sa.Column("ca", sa.String(length=253), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("authorization_url", sa.Text(), nullable=False),
        sa.Column("challenge_url", sa.Text(), nullable=True),
        sa.Column("txt", sa.String(length=64), nullable=True),
        sa.Column("served_at", UtcDateTime(), nullable=True),
        sa.Column("due_at", UtcDateTime(), nullable=True),
        sa.Column("answered_at", UtcDateTime(), nullable=True),
        sa.Column("proved_at", UtcDateTime(), nullable=True),
        sa.Column("deactivated_at", UtcDateTime(), nullable=True),
        sa.Column("ended_at", UtcDateTime(), nullable=True),
        sa.Column("error", sa.String(length=1000), nullable=True),
        sa.ForeignKeyConstraint(
            ["server_id"], ["servers.id"], name=op.f("fk_revocation_orders_server_id_servers")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_revocation_orders")),
    )
    op.create_index(op.f("ix_revocation_orders_server_id"), "revocation_orders", ["server_id"], unique=False)
    with op.batch_alter_table("orders", schema=None) as batch_op:
        batch_op.add_column(sa.Column("txt", sa.String(length=64), nullable=True))
    with op.batch_alter_table("servers", schema=None) as batch_op:
        batch_op.add_column(sa.Column("dns_01", sa.Boolean(), nullable=False, server_default=sa.false()))
        for name in _TIMES:
            batch_op.add_column(sa.Column(name, UtcDateTime(), nullable=True))
        batch_op.add_column(sa.Column("not_revoked", sa.String(length=1000), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("servers", schema=None) as batch_op:
        for name in ("not_revoked", *reversed(_TIMES), "dns_01"):
            batch_op.drop_column(name)
    with op.batch_alter_table("orders", schema=None) as batch_op:
        batch_op.drop_column("txt")
    op.drop_index(op.f("ix_revocation_orders_server_id"), table_name="revocation_orders")
    op.drop_table("revocation_orders")
