"""regions of the pool that are switched on"""

import sqlalchemy as sa
from alembic import op

from poolsvc.db import UtcDateTime

revision = "5c7e19d2b8a4"
down_revision = "0b8d4f6a2e17"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "regions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("label", sa.String(length=20), nullable=False),
        sa.Column("on_since", UtcDateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_regions")),
        sa.UniqueConstraint("label", name=op.f("uq_regions_label")),
    )


def downgrade() -> None:
    op.drop_table("regions")
