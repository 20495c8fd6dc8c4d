"""servers are found by name without reading all of them"""

from alembic import op

revision = "2e6b0f94c8d1"
down_revision = "7d0c3b1e95a2"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_servers_name", "servers", ["name", "id"], unique=False)


def downgrade() -> None:
    op.drop_index("ix_servers_name", table_name="servers")
