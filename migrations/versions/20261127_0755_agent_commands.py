"""what was done for a server by hand, and when an address was last called from"""

import sqlalchemy as sa
from alembic import op

from poolsvc.db import UtcDateTime

revision = "c3a7e15b9f20"
down_revision = "b7d2e94c1f60"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "commands",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("server_id", sa.Integer(), nullable=False),
        sa.Column(
            "kind",
            sa.Enum("renewal", "check", name="kind", native_enum=False, length=32, create_constraint=True),
            nullable=False,
        ),
        sa.Column("at", UtcDateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["server_id"], ["servers.id"], name=op.f("fk_commands_server_id_servers")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_commands")),
    )
    op.create_index("ix_commands_server_id", "commands", ["server_id", "kind", "at"])
    with op.batch_alter_table("addresses", schema=None) as batch_op:
        batch_op.add_column(sa.Column("called_at", UtcDateTime(timezone=True), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("addresses", schema=None) as batch_op:
        batch_op.drop_column("called_at")
    op.drop_index("ix_commands_server_id", table_name="commands")
    op.drop_table("commands")
