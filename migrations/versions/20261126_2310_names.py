"""servers are found by name without reading all of them"""

from alembic import op

revision = "2e6b0f94c8d1"
down_revision = "7d0c3b1e95a2"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Without a lock that would keep everybody from writing while it is made; one that was left half made goes first.
    with op.get_context().autocommit_block():
        op.drop_index("ix_servers_name", "servers", if_exists=True, postgresql_concurrently=True)
        op.create_index("ix_servers_name", "servers", ["name", "id"], postgresql_concurrently=True)


def downgrade() -> None:
    op.drop_index("ix_servers_name", table_name="servers")
