"""an operator's word on the quorum, where monitors are, and what they see of names"""

import sqlalchemy as sa
from alembic import op

import poolsvc.db

revision = "3f6d8b20c9a5"
down_revision = "c81f5a3e7b02"
branch_labels = None
depends_on = None

_NAMES = "ix_monitor_views_names"


def upgrade() -> None:
    op.add_column("pool", sa.Column("quorum_set_at", poolsvc.db.UtcDateTime(timezone=True), nullable=True))
    op.add_column("monitors", sa.Column("placed_for", sa.String(length=45), nullable=True))
    op.add_column("monitor_views", sa.Column("names", sa.String(length=16), nullable=True))
    # Without a lock that would keep everybody from writing while it is made; one that was left half made goes first.
    with op.get_context().autocommit_block():
        op.drop_index(_NAMES, "monitor_views", if_exists=True, postgresql_concurrently=True)
        op.create_index(
            _NAMES,
            "monitor_views",
            ["address_id"],
            sqlite_where=sa.text("names IS NOT NULL"),
            postgresql_where=sa.text("names IS NOT NULL"),
            postgresql_concurrently=True,
        )


def downgrade() -> None:
    op.drop_index(_NAMES, table_name="monitor_views")
    for table, column in (("monitor_views", "names"), ("monitors", "placed_for"), ("pool", "quorum_set_at")):
        with op.batch_alter_table(table, schema=None) as batch_op:
            batch_op.drop_column(column)
