"""reports of monitors, and when what they came to is looked at again"""

import sqlalchemy as sa
from alembic import op

from poolsvc.db import UtcDateTime

revision = "4e9c2b7d1a58"
down_revision = "5c7e19d2b8a4"
branch_labels = None
depends_on = None

_COUNTS = ("sequence", "samples", "taken")


def upgrade() -> None:
    op.create_table(
        "summary_progress",
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("until", UtcDateTime(timezone=True), nullable=False),
        sa.Column("address_id", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("kind", name=op.f("pk_summary_progress")),
    )
    with op.batch_alter_table("monitors", schema=None) as batch_op:
        for name in _COUNTS:
            kind = sa.Integer() if name == "taken" else sa.BigInteger()
            batch_op.add_column(sa.Column(name, kind, nullable=False, server_default="0"))
    with op.batch_alter_table("monitors", schema=None) as batch_op:
        for name in _COUNTS:
            batch_op.alter_column(name, server_default=None)
    with op.batch_alter_table("monitor_views", schema=None) as batch_op:
        batch_op.add_column(sa.Column("fingerprint", sa.String(length=64), nullable=True))
        batch_op.add_column(sa.Column("points", sa.Integer(), nullable=False, server_default="0"))
    with op.batch_alter_table("monitor_views", schema=None) as batch_op:
        batch_op.alter_column("points", server_default=None)
    with op.batch_alter_table("servers", schema=None) as batch_op:
        for name in ("judge_due_at", "review_due_at"):
            batch_op.add_column(sa.Column(name, UtcDateTime(timezone=True), nullable=True))
    op.execute(
        "UPDATE servers SET review_due_at = probe_due_at"
        " WHERE state IN ('verified', 'certified', 'active', 'suspended')"
    )


def downgrade() -> None:
    op.drop_table("summary_progress")
    with op.batch_alter_table("servers", schema=None) as batch_op:
        for name in ("review_due_at", "judge_due_at"):
            batch_op.drop_column(name)
    with op.batch_alter_table("monitor_views", schema=None) as batch_op:
        batch_op.drop_column("points")
        batch_op.drop_column("fingerprint")
    with op.batch_alter_table("monitors", schema=None) as batch_op:
        for name in _COUNTS:
            batch_op.drop_column(name)
