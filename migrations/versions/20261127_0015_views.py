"""who of the staff reads with somebody's token, and who was ever staff"""

import sqlalchemy as sa
from alembic import op

revision = "93d2a7f5b06c"
down_revision = "2e6b0f94c8d1"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("tokens", schema=None) as batch_op:
        batch_op.add_column(sa.Column("viewer_id", sa.Integer(), nullable=True))
        batch_op.create_foreign_key(batch_op.f("fk_tokens_viewer_id_users"), "users", ["viewer_id"], ["id"])
    with op.batch_alter_table("users", schema=None) as batch_op:
        batch_op.add_column(sa.Column("was_staff", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.execute("UPDATE users SET was_staff = true WHERE staff IS NOT NULL")


def downgrade() -> None:
    with op.batch_alter_table("users", schema=None) as batch_op:
        batch_op.drop_column("was_staff")
    with op.batch_alter_table("tokens", schema=None) as batch_op:
        batch_op.drop_constraint(batch_op.f("fk_tokens_viewer_id_users"), type_="foreignkey")
        batch_op.drop_column("viewer_id")
