"""monitors' tokens are found by monitor"""

from alembic import op

revision = "0b8d4f6a2e17"
down_revision = "f7a1c3e5d904"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Without a lock that would keep everybody from writing while it is made; one that was left half made goes first.
    with op.get_context().autocommit_block():
        op.drop_index("ix_tokens_monitor_id", "tokens", if_exists=True, postgresql_concurrently=True)
        op.create_index("ix_tokens_monitor_id", "tokens", ["monitor_id"], postgresql_concurrently=True)


def downgrade() -> None:
    op.drop_index("ix_tokens_monitor_id", table_name="tokens")
