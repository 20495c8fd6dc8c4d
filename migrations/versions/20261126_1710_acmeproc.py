"""each order's key, which no other order may have"""

import sqlalchemy as sa
from alembic import op

from nts_core.certificates import CsrError, csr_key_sha256

revision = "7f1c0a9d52e3"
down_revision = "4a054848f497"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("orders") as table:
        table.add_column(sa.Column("key_sha256", sa.String(length=64), nullable=True))
    _note_keys()
    with op.batch_alter_table("orders") as table:
        table.create_unique_constraint(op.f("uq_orders_key_sha256"), ["key_sha256"])


def downgrade() -> None:
    with op.batch_alter_table("orders") as table:
        table.drop_constraint(op.f("uq_orders_key_sha256"), type_="unique")
        table.drop_column("key_sha256")


def _note_keys() -> None:
    """Of orders that there are; the first keeps a key that two have."""
    connection, seen = op.get_bind(), set[str]()
    rows = connection.execute(sa.text("SELECT id, csr FROM orders WHERE csr IS NOT NULL ORDER BY id")).all()
    for identifier, csr in rows:
        try:
            key = csr_key_sha256(csr)
        except CsrError:
            continue
        if key not in seen:
            seen.add(key)
            connection.execute(
                sa.text("UPDATE orders SET key_sha256 = :key WHERE id = :id"), {"key": key, "id": identifier}
            )
