"""several CAs: an account at each, which one an order went to, and when it would have a certificate renewed"""

from urllib.parse import urlsplit

import sqlalchemy as sa
from alembic import op

from poolsvc.db import UtcDateTime

revision = "7d0c3b1e95a2"
down_revision = "b5d07c1e92a4"
branch_labels = None
depends_on = None

_ACCOUNTS = sa.table("ca_accounts", *map(sa.column, ("ca", "uri")), sa.column("profiles", sa.JSON))
_POOL = sa.table("pool", sa.column("account_uri"))
_ORDERS = sa.table("orders", *map(sa.column, ("id", "url", "ca", "account_uri")))


def _keep_account() -> None:
    """The one account, and the orders that it made, belong to the CA whose host their addresses have."""
    connection = op.get_bind()
    uri = connection.scalar(sa.select(_POOL.c.account_uri))
    if uri is not None:
        connection.execute(sa.insert(_ACCOUNTS).values(ca=urlsplit(uri).netloc, uri=uri, profiles=[]))
    orders = connection.execute(sa.select(_ORDERS.c.id, _ORDERS.c.url).where(_ORDERS.c.url.is_not(None)))
    for order, url in orders.all():
        ca = urlsplit(url).netloc
        made_by = uri if uri is not None and urlsplit(uri).netloc == ca else None
        connection.execute(sa.update(_ORDERS).where(_ORDERS.c.id == order).values(ca=ca, account_uri=made_by))


def upgrade() -> None:
    op.create_table(
        "ca_accounts",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("ca", sa.String(length=253), nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("profiles", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ca_accounts")),
        sa.UniqueConstraint("ca", name=op.f("uq_ca_accounts_ca")),
    )
    with op.batch_alter_table("orders", schema=None) as batch_op:
        batch_op.add_column(sa.Column("ca", sa.String(length=253), nullable=True))
        batch_op.add_column(sa.Column("ca_since", UtcDateTime(), nullable=True))
        batch_op.add_column(sa.Column("account_uri", sa.Text(), nullable=True))
        batch_op.add_column(sa.Column("profile", sa.String(length=64), nullable=True))
        batch_op.add_column(sa.Column("window_start", UtcDateTime(), nullable=True))
        batch_op.add_column(sa.Column("window_end", UtcDateTime(), nullable=True))
        batch_op.add_column(sa.Column("window_url", sa.String(length=1000), nullable=True))
        batch_op.add_column(sa.Column("window_due_at", UtcDateTime(), nullable=True))
        batch_op.add_column(sa.Column("renew_at", UtcDateTime(), nullable=True))
        batch_op.create_index(batch_op.f("ix_orders_window_due_at"), ["window_due_at"], unique=False)
    _keep_account()
    with op.batch_alter_table("pool", schema=None) as batch_op:
        batch_op.drop_column("account_uri")
    with op.batch_alter_table("servers", schema=None) as batch_op:
        batch_op.add_column(sa.Column("short_lived", sa.Boolean(), nullable=False, server_default=sa.false()))


def downgrade() -> None:
    with op.batch_alter_table("servers", schema=None) as batch_op:
        batch_op.drop_column("short_lived")
    with op.batch_alter_table("pool", schema=None) as batch_op:
        batch_op.add_column(sa.Column("account_uri", sa.Text(), nullable=True))
    first = sa.select(_ACCOUNTS.c.uri).order_by(sa.column("id")).limit(1).scalar_subquery()
    op.execute(sa.update(_POOL).values(account_uri=first))
    with op.batch_alter_table("orders", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_orders_window_due_at"))
        for name in (
            "renew_at",
            "window_due_at",
            "window_url",
            "window_end",
            "window_start",
            "profile",
            "account_uri",
            "ca_since",
            "ca",
        ):
            batch_op.drop_column(name)
    op.drop_table("ca_accounts")
