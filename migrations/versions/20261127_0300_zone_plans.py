"""changes of the zone that an operator has confirmed, and servers that stay in the SRV until then"""

import sqlalchemy as sa
from alembic import op

from poolsvc.db import UtcDateTime

revision = "8d41f0a7c3b6"
down_revision = "5e0b7c92d4f3"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "zone_plans",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("checksum", sa.String(length=64), nullable=False),
        sa.Column("deleted", sa.Integer(), nullable=False),
        sa.Column("replaced", sa.Integer(), nullable=False),
        sa.Column("withdrawn", sa.Integer(), nullable=False),
        sa.Column("approved_at", UtcDateTime(timezone=True), nullable=False),
        sa.Column("expires_at", UtcDateTime(timezone=True), nullable=False),
        sa.Column("made_at", UtcDateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_zone_plans")),
    )
    op.create_index(op.f("ix_zone_plans_checksum"), "zone_plans", ["checksum"])
    with op.batch_alter_table("servers", schema=None) as batch_op:
        batch_op.add_column(sa.Column("kept_at", UtcDateTime(timezone=True), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("servers", schema=None) as batch_op:
        batch_op.drop_column("kept_at")
    op.drop_index(op.f("ix_zone_plans_checksum"), table_name="zone_plans")
    op.drop_table("zone_plans")
