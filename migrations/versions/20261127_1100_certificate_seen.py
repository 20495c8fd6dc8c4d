"""when a certificate was first seen working from outside"""

import sqlalchemy as sa
from alembic import op

from poolsvc.db import UtcDateTime

revision = "d5e8a1f7c462"
down_revision = "c3a7e15b9f20"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("orders", schema=None) as batch_op:
        batch_op.add_column(sa.Column("seen_at", UtcDateTime(timezone=True), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("orders", schema=None) as batch_op:
        batch_op.drop_column("seen_at")
