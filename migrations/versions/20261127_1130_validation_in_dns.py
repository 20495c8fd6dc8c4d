"""a server whose host answers no CA at all"""

from alembic import op

revision = "e6f9b2a8d573"
down_revision = "d5e8a1f7c462"
branch_labels = None
depends_on = None

_BEFORE = ("http-01", "tls-alpn-01", "redirect")


def _let(*values: str) -> None:
    one_of = ", ".join(f"'{value}'" for value in values)
    for table in ("servers", "orders"):
        with op.batch_alter_table(table, schema=None) as batch_op:
            batch_op.drop_constraint(op.f(f"ck_{table}_validation"), type_="check")
            batch_op.create_check_constraint(op.f(f"ck_{table}_validation"), f"validation IN ({one_of})")


def upgrade() -> None:
    _let(*_BEFORE, "dns-01")


def downgrade() -> None:
    op.execute("UPDATE servers SET validation = 'redirect' WHERE validation = 'dns-01'")
    op.execute("UPDATE orders SET validation = 'redirect' WHERE validation = 'dns-01'")
    _let(*_BEFORE)
