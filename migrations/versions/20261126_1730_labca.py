"""a leaving that nobody can cancel, while the name waits for caches"""

import sqlalchemy as sa
from alembic import op

revision = "8c1f0e5b72d3"
down_revision = "7f1c0a9d52e3"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "servers", sa.Column("leave_final", sa.Boolean(), nullable=False, server_default=sa.false())
    )


def downgrade() -> None:
    op.drop_column("servers", "leave_final")
