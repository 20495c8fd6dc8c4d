"""how a server's host answers the CA and the registry, and whether another CAA of it is on the way into DNS"""

import sqlalchemy as sa
from alembic import op

revision = "b7d2e94c1f60"
down_revision = "3b7e15c9f204"
branch_labels = None
depends_on = None


def _kind(name: str, *values: str) -> sa.Enum:
    return sa.Enum(*values, name=name, native_enum=False, create_constraint=True, length=32)


_VALIDATION = ("validation", "http-01", "tls-alpn-01", "redirect")


def upgrade() -> None:
    with op.batch_alter_table("servers", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column("validation", _kind(*_VALIDATION), nullable=False, server_default="http-01")
        )
        batch_op.add_column(sa.Column("caa_changed", sa.Boolean(), nullable=False, server_default=sa.false()))
    with op.batch_alter_table("orders", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column("validation", _kind(*_VALIDATION), nullable=False, server_default="http-01")
        )
    with op.batch_alter_table("addresses", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column("proof_by", _kind("proof_by", "http", "tls"), nullable=False, server_default="http")
        )


def downgrade() -> None:
    # SQLite keeps the checks of a column that is dropped alone.
    with op.batch_alter_table("addresses", schema=None) as batch_op:
        batch_op.drop_constraint(op.f("ck_addresses_proof_by"), type_="check")
        batch_op.drop_column("proof_by")
    with op.batch_alter_table("orders", schema=None) as batch_op:
        batch_op.drop_constraint(op.f("ck_orders_validation"), type_="check")
        batch_op.drop_column("validation")
    with op.batch_alter_table("servers", schema=None) as batch_op:
        batch_op.drop_column("caa_changed")
        batch_op.drop_constraint(op.f("ck_servers_validation"), type_="check")
        batch_op.drop_column("validation")
