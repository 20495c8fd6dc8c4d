"""servers are found by when they are judged, and when their monitors are chosen anew; addresses that are unknown"""

import sqlalchemy as sa
from alembic import op

revision = "c81f5a3e7b02"
down_revision = "4e9c2b7d1a58"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Without a lock that would keep everybody from writing while it is made; one that was left half made goes first.
    with op.get_context().autocommit_block():
        for name in ("ix_servers_judge_due_at", "ix_servers_review_due_at"):
            op.drop_index(name, "servers", if_exists=True, postgresql_concurrently=True)
        op.create_index("ix_servers_judge_due_at", "servers", ["judge_due_at"], postgresql_concurrently=True)
        op.create_index(
            "ix_servers_review_due_at", "servers", ["review_due_at"], postgresql_concurrently=True
        )
        op.drop_index("ix_addresses_unknown", "addresses", if_exists=True, postgresql_concurrently=True)
        op.create_index(
            "ix_addresses_unknown",
            "addresses",
            ["server_id"],
            sqlite_where=sa.text("unknown IS NOT NULL"),
            postgresql_where=sa.text("unknown IS NOT NULL"),
            postgresql_concurrently=True,
        )


def downgrade() -> None:
    op.drop_index("ix_addresses_unknown", table_name="addresses")
    op.drop_index("ix_servers_review_due_at", table_name="servers")
    op.drop_index("ix_servers_judge_due_at", table_name="servers")
