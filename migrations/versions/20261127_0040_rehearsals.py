"""whether an order is tried at a staging CA is said by the order"""

import sqlalchemy as sa
from alembic import op

revision = "5e0b7c92d4f3"
down_revision = "c41f8a6d27be"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("orders", schema=None) as batch_op:
        batch_op.add_column(sa.Column("rehearsal", sa.Boolean(), nullable=False, server_default=sa.false()))


def downgrade() -> None:
    with op.batch_alter_table("orders", schema=None) as batch_op:
        batch_op.drop_column("rehearsal")
