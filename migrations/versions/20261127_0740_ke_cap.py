"""how many key establishments a server takes, and how many come"""

import sqlalchemy as sa
from alembic import op

revision = "3b7e15c9f204"
down_revision = "8d41f0a7c3b6"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("servers", schema=None) as batch_op:
        batch_op.add_column(sa.Column("ke_cap", sa.Double(), nullable=True))
        batch_op.add_column(sa.Column("ke_traffic", sa.Double(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("servers", schema=None) as batch_op:
        batch_op.drop_column("ke_traffic")
        batch_op.drop_column("ke_cap")
